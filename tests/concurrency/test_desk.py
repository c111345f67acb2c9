"""The desk: lanes that keep an order, signals that meet waits in any interleaving, and nobody left unanswered."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest

from flowstead import Registry, Runtime, open_runtime
from flowstead.engine.lanes import Lanes
from flowstead.errors import CommitFailed, RuntimeClosed
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock, Schedule, Simulation
from tests.faulty_store import (
    MISFIT,
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    new_flow,
    running,
    settle,
    soon,
    turns,
)
from tests.runtime.support import bound, make
from tests.runtime.waiting import registry_of

KEY = {"thread": 1}

# ---- lanes ----------------------------------------------------------------------------------------


class Jobs:
    """Jobs that wait to be let go on."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}

    def job(self, name: str, error: Exception | None = None) -> Any:
        gate = self._gates[name] = asyncio.Event()

        async def run() -> str:
            self.began.append(name)
            await gate.wait()
            if error is not None:
                raise error
            return name

        return run

    def let(self, *names: str) -> None:
        for name in names:
            self._gates[name].set()


async def test_jobs_of_one_key_run_one_after_another_and_those_of_others_beside() -> None:
    lanes, jobs = Lanes(), Jobs()
    answers = [lanes.put(key, jobs.job(f"{key}{n}")) for n in (1, 2) for key in "ab"]
    await turns()
    assert jobs.began == ["a1", "b1"]

    jobs.let("a1", "b2")
    await turns()

    assert jobs.began == ["a1", "b1", "a2"]
    assert [answer.done() for answer in answers] == [True, False, False, False]
    jobs.let("a2", "b1")
    assert await soon(asyncio.gather(*answers)) == ["a1", "b1", "a2", "b2"]
    await turns()
    assert not lanes._lanes and not lanes._tasks


async def test_a_job_that_raises_is_answered_with_it_and_the_next_runs() -> None:
    lanes, jobs = Lanes(), Jobs()
    bad = lanes.put("a", jobs.job("bad", ValueError("no")))
    good = lanes.put("a", jobs.job("good"))
    jobs.let("bad", "good")

    assert await soon(good) == "good"
    with pytest.raises(ValueError, match="no"):
        await bad


async def test_a_caller_that_goes_away_stops_neither_its_job_nor_the_next() -> None:
    lanes, jobs = Lanes(), Jobs()
    gone = lanes.put("a", jobs.job("gone"))
    good = lanes.put("a", jobs.job("good"))
    await turns()
    gone.cancel()
    await turns()
    assert jobs.began == ["gone"]

    jobs.let("gone", "good")

    assert await soon(good) == "good"
    assert jobs.began == ["gone", "good"]


async def test_a_job_put_in_by_the_last_one_of_its_lane_is_not_forgotten() -> None:
    lanes, jobs = Lanes(), Jobs()
    put: list[asyncio.Future[str]] = []

    async def last() -> str:
        put.append(lanes.put("a", jobs.job("next")))
        return "last"

    assert await soon(lanes.put("a", last)) == "last"
    jobs.let("next")
    assert await soon(put[0]) == "next"


# ---- who comes while it closes --------------------------------------------------------------------


async def waiting_flow(runtime: Runtime, controller: str = "waits", **asked: Any) -> str:
    flow_id = await new_flow(flows_of(runtime), controller, state_json={"key": KEY} | asked)
    await settle()
    return flow_id


@pytest.mark.parametrize("held", ["commit", "read"])
async def test_at_closing_everybody_is_answered_and_what_was_answered_is_true(held: str) -> None:
    store, flow_ids = HeldLook(), []
    async with open_runtime(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        flow_ids += [await waiting_flow(runtime, "counts") for _ in range(2)]
        if held == "commit":
            store.hold()
        else:
            store.looking = asyncio.Event()
        calls: list[Any] = [
            flows.signal(payload="a", key=KEY),
            flows.signal(payload="b", id="s-b", key=KEY),
            flows.signal(payload="b2", id="s-b", key=KEY),
            flows.signal(payload="c", key=KEY),
            flows.signal(payload="d", id="s-d", key={"thread": 2}),
            flows.signal(payload="e", id="s-e", flow_id=flow_ids[0], name="answer-5"),
            flows.tell(flow_ids[0], "f", id="s-f"),
        ]
        sending = [asyncio.create_task(call) for call in calls]
        await settle()
        closing = asyncio.create_task(runtime.aclose())
        await settle()
        store.release()
        if store.looking is not None:
            store.looking.set()
        await soon(closing)

        _, pending = await asyncio.wait(sending, timeout=30)
        for task in pending:
            task.cancel()
        assert not pending

    told = [task.exception() or task.result().code.value for task in sending]
    refused = [one for one in told if isinstance(one, BaseException)]
    assert all(isinstance(error, RuntimeClosed | CommitFailed) for error in refused), told
    async with running(MemoryStore(store.tables), registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        assert (await flows.signal(payload="end", key=KEY)).code in ("matched", "kept")
        for _ in range(3):
            await settle()
            await flows.signal(payload="end", key=KEY, lifetime=None)
        taken = set()
        for flow_id in flow_ids:
            ended = await soon(flows.result(flow_id))
            taken |= set(ended.state_json["answered"])
        for payload, one in zip("abb", told[:3], strict=False):
            if one in ("matched", "kept"):
                assert payload in taken
        if isinstance(told[0], BaseException):
            assert "a" not in taken, "refused, and applied all the same"


class HeldLook(FaultyStore):
    """A store in memory whose look for waits can be held up."""

    looking: asyncio.Event | None = None

    async def look_up_waits(self, asked: Any) -> Any:
        if self.looking is not None:
            await self.looking.wait()
        return await super().look_up_waits(asked)


async def test_signals_on_a_closed_runtime_are_refused() -> None:
    async with open_runtime(MemoryStore()) as runtime:
        flows = flows_of(runtime)
    with pytest.raises(RuntimeClosed):
        await flows.signal(key=KEY)


# ---- callers that go away -------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(12))
async def test_a_caller_that_goes_away_takes_no_signal_back(after: int) -> None:
    async with running(registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        flow_id = await waiting_flow(runtime)
        sending = asyncio.create_task(flows.signal(payload="word", id="s-1", key=KEY))
        await turns(after)
        sending.cancel()
        await asyncio.wait({sending})
        await settle()

        again = await soon(flows.signal(payload="again", id="s-1", key=KEY))

        ended = await soon(flows.result(flow_id))
        first = "word" if again.code == "duplicate" else "again"
        assert ended.state_json == {"answered": first}
        assert after == 0 or first == "word"


# ---- orders ---------------------------------------------------------------------------------------


def test_whatever_the_order_each_signal_is_taken_once_by_the_waits_there_are() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(16):
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            kinds.update(world.run(_crowd, registry=registry_of))

    assert kinds["matched"] > 20 and kinds["kept"] > 20, "vacuous: always the same way"


async def _crowd(runtime: Runtime) -> list[str]:
    flows = bound(runtime)
    random = asyncio.get_running_loop().random  # type: ignore[attr-defined]

    async def begin(number: int) -> Any:
        await asyncio.sleep(random.random() * 0.02)
        return await make(flows, controller_id="counts", state_json={"key": {"lane": number}})

    async def send(number: int, payload: int) -> Any:
        await asyncio.sleep(random.random() * 0.02)
        return await flows.signal(payload=payload, id=f"{number}-{payload}", lane=number)

    lanes, each = 3, 4
    made, *reports = await asyncio.gather(
        asyncio.gather(*(begin(number) for number in range(lanes))),
        *(send(number, payload) for number in range(lanes) for payload in range(each)),
    )
    for number, flow in enumerate(made):
        await flows.signal(payload="end", lane=number)
        ended = await flows.result(flow.flow_id)
        assert sorted(ended.state_json["answered"]) == list(range(each))
    return [report.code.value for report in reports]


async def test_many_look_ups_share_one_read() -> None:
    store = CountedLook()
    async with running(store) as runtime:
        flows = flows_of(runtime)

        await asyncio.gather(*(flows.signal(payload=n, thread=n) for n in range(200)))

        assert store.looks < 20


class CountedLook(FaultyStore):
    looks = 0

    async def look_up_waits(self, asked: Any) -> Any:
        self.looks += 1
        return await super().look_up_waits(asked)


# ---- a kept signal that meets several -------------------------------------------------------------


async def test_a_kept_signal_that_cannot_be_handed_over_is_tried_again_until_it_can(
    clock: ManualClock,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), clock=clock) as runtime:
        flows = flows_of(runtime)
        await flows.signal(payload="early", key=KEY)
        store.fail_reads("look_up_waits", NOT_WRITTEN, times=3)
        flow_id = await waiting_flow(runtime)

        for _ in range(5):
            clock.advance(1)
            await settle()

        assert (await soon(flows.result(flow_id))).state_json == {"answered": "early"}


@pytest.mark.parametrize("fault", [NOT_WRITTEN, UNKNOWN], ids=["not written", "unknown"])
@pytest.mark.parametrize("written", [False, True])
async def test_a_kept_signal_whose_handing_over_fails_on_the_disk_is_taken_once(
    clock: ManualClock, fault: Exception, written: bool
) -> None:
    if written and fault is NOT_WRITTEN:
        return
    store = FaultyStore()
    async with running(store, registry=registry_of(), clock=clock) as runtime:
        flows = flows_of(runtime)
        await flows.signal(payload="early", id="s-1", key=KEY)
        store.hold()
        making = asyncio.create_task(
            flows.create_managed(controller_id="counts", goal="g", state_json={"key": KEY})
        )
        # created, entered, waiting; and then the handing over
        for _ in range(3):
            await soon(store.wait_held())
            store.release()
            store.hold()
            await settle()
        store.fail_commits(fault, written=written)
        store.release()
        flow = await soon(making)
        await settle()

        for _ in range(5):
            clock.advance(1)
            await settle()
        store.heal()
        await flows.signal(payload="end", key=KEY)

        assert (await soon(flows.result(flow.flow_id))).state_json == {"answered": ["early"]}
        assert (await flows.signal(id="s-1", key=KEY)).code == "duplicate"


# ---- several that share one transaction -----------------------------------------------------------


@pytest.mark.parametrize("others", ["update", "wait", "cancel"])
async def test_members_of_a_unit_that_do_something_else_meanwhile_hold_nobody_up(
    others: str,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        ids = [await waiting_flow(runtime) for _ in range(4)]
        store.hold()
        busy: list[Any] = []
        for flow_id in ids[:2]:
            revision = (await flows.get(flow_id)).revision  # type: ignore[union-attr]
            given = {"flow_id": flow_id, "expected_revision": revision}
            match others:
                case "update":
                    busy.append(flows.update(**given, current_step="x"))
                case "wait":
                    busy.append(flows.set_waiting(**given, wait_json={"other": 1}))
                case _:
                    busy.append(flows.cancel(flow_id))
        tasks = [asyncio.create_task(one) for one in busy]
        await settle()
        sending = asyncio.create_task(flows.signal(payload="word", id="s-1", key=KEY))
        twice = asyncio.create_task(flows.signal(payload="no", id="s-2", key=KEY))
        await settle()
        store.release()

        report = await soon(sending)
        await asyncio.gather(*tasks)

        wanted = ids[2:] if others == "cancel" else ids
        assert sorted(report.flow_ids) == sorted(wanted)
        assert (await soon(twice)).matched == 0


async def test_a_batch_with_a_misfit_is_written_again_piece_by_piece_but_a_unit_stays_whole() -> (
    None
):
    store = FaultyStore()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        ids = sorted([await waiting_flow(runtime) for _ in range(3)])
        first, other = [await new_flow(flows) for _ in range(2)]
        store.hold()
        others = [asyncio.create_task(flows.update(flow_id=first, expected_revision=0))]
        await soon(store.wait_held())
        sending = asyncio.create_task(flows.signal(payload="word", id="s-1", key=KEY))
        others.append(asyncio.create_task(flows.update(flow_id=other, expected_revision=0)))
        await settle()
        store.release()
        store.hold()
        await soon(store.wait_held())
        store.batches.clear()
        store.fail_commits(MISFIT)
        store.release()

        report = await soon(sending)

        assert sorted(report.flow_ids) == ids
        assert (await soon(others[1])).applied
        assert sorted(store.batches[:2]) == [1, 3]


@pytest.mark.parametrize("count", [1, 3])
async def test_an_id_that_is_on_record_behind_the_desk_s_back_wakes_nobody_of_the_unit(
    count: int,
) -> None:
    store = Forgetful()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        await flows.signal(payload="first", id="s-1", key={"thread": 2})
        ids = [await waiting_flow(runtime) for _ in range(count)]
        store.forgets = True

        with pytest.raises(CommitFailed):
            await soon(flows.signal(payload="second", id="s-1", key=KEY))

        await settle()
        for flow_id in ids:
            assert (await flows.get(flow_id)).status == "waiting"  # type: ignore[union-attr]
        store.forgets = False
        assert (await flows.signal(payload="second", id="s-1", key=KEY)).code == "duplicate"
        assert (await flows.signal(payload="third", key=KEY)).matched == count


class Forgetful(FaultyStore):
    """A store that may say that it knows no signal."""

    forgets = False

    async def look_up_waits(self, asked: Any) -> Any:
        found = await super().look_up_waits(asked)
        if self.forgets:
            return [msgspec.structs.replace(one, is_known=False) for one in found]
        return found


def test_signals_for_overlapping_groups_of_flows_never_wait_for_each_other_for_ever() -> None:
    async def host(runtime: Runtime) -> None:
        flows = bound(runtime)
        made = [
            await make(flows, controller_id="pairs", state_json=[n % 3, (n + 1) % 3])
            for n in range(9)
        ]
        await asyncio.sleep(1)
        await asyncio.gather(*(flows.signal(payload=n, lane=n) for n in (2, 0, 1)))
        for flow in made:
            assert (await flows.result(flow.flow_id)).status == "succeeded"

    async def pairs(flow: Any) -> None:
        steps = [await flow.open_wait(f"w-{lane}", lane=lane) for lane in flow.state_json]
        for step in steps:
            await step.result()

    def registry() -> Registry:
        return registry_of(pairs=pairs)

    for seed in range(10):
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            world.run(host, registry=registry)
