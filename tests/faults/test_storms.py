"""Too much at once: cancels, sends, waiting flows and watchers by the thousand; all answered, nothing lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, cast

from flowstead import (
    Applied,
    CancelReport,
    Event,
    FlowNotFound,
    Limits,
    Refused,
    Rejected,
    Runtime,
    RuntimeClosed,
    SessionFlows,
    TaskContext,
)
from flowstead.store.sqlite import SqliteStore
from tests.faults.support import STORM, launch, stage, types_of
from tests.faulty_store import FaultyStore, flows_of, holds_nothing, new_flow, running, settle, soon
from tests.invariants import check_all, dump

LONG = 120.0
FEW = max(10, STORM // 20)
"""More transactions than this for a storm would mean that its flows are written one by one."""

CANCELLED_ONCE = ["flow.created", "flow.cancel_requested", "flow.cancelled"]


async def together(calls: Any) -> list[Any]:
    """Everything at once, exceptions among the answers."""
    return await soon(asyncio.gather(*calls, return_exceptions=True), LONG)


async def make_flows(flows: SessionFlows, count: int, **given: Any) -> list[str]:
    asked = {"controller_id": "nobody", "goal": "storm"} | given
    made = await together(flows.create_managed(**asked) for _ in range(count))
    return [flow.flow_id for flow in made]


def histories(path: Path) -> dict[str, list[str]]:
    """The kinds of events of every flow in a closed file, which must hold every invariant."""
    file = check_all(path)
    return {flow.row["flow_id"]: [e["type"] for e in flow.events] for flow in file.flows.values()}


# ---- cancels ---------------------------------------------------------------------------------------


async def test_thousands_of_flows_cancelled_at_once_end_once_each_in_few_transactions(db: Path):
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, STORM)
        before = runtime.statistics().commits

        reports = await together(flows.cancel(flow_id) for flow_id in ids)

        assert all(report.cancelled for report in reports)
        assert runtime.statistics().commits - before <= FEW
        assert holds_nothing(runtime)

    told = histories(db)
    assert len(told) == STORM
    assert all(types == CANCELLED_ONCE for types in told.values())


async def test_a_storm_of_cancels_over_running_children_stops_each_and_ends_each_flow_once(
    db: Path,
):
    stopped: list[str] = []

    async def waits(ctx: TaskContext, given: object) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(ctx.task_id)
            raise

    count = STORM // 4
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, count)
        await together(launch(flows, flow_id, waits) for flow_id in ids)
        await settle()
        assert runtime.statistics().running_children == count
        before = runtime.statistics().commits

        reports = await together(flows.cancel(flow_id) for flow_id in ids)

        assert all(report.cancelled for report in reports)
        assert len(set(stopped)) == len(stopped) == count
        assert runtime.statistics().commits - before <= max(20, count // 10)
        await settle()
        assert holds_nothing(runtime)

    for types in histories(db).values():
        assert Counter(types)["task.ended"] == 1
        assert Counter(types)["flow.cancelled"] == Counter(types)["flow.cancel_requested"] == 1


async def test_a_hundred_cancels_of_one_flow_some_given_up_are_one_transition(db: Path):
    async with stage(db) as it:
        cancels = [asyncio.create_task(it.flows.cancel(it.flow_id)) for _ in range(100)]
        await asyncio.sleep(0)
        for given_up in cancels[::3]:
            given_up.cancel()
        answers = await together(cancels)

        it.fire()
        kept = [a for a in answers if isinstance(a, CancelReport)]
        assert len(kept) == 66
        assert all(report.cancelled for report in kept)
        types = Counter(await types_of(it.flows, it.flow_id))
        assert types["flow.cancel_requested"] == types["flow.cancelled"] == 1
        await it.check_others(is_flow_cancelled=True)


async def test_flows_cancelled_while_they_are_being_created_are_cancelled_or_were_not_there_yet(
    db: Path,
):
    count = STORM // 2
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = [f"flow-{n}" for n in range(count)]

        async def create(flow_id: str) -> None:
            await flows.create_managed(controller_id="nobody", goal="storm", flow_id=flow_id)

        async def late_cancel(flow_id: str, rounds: int) -> CancelReport:
            for _ in range(rounds):
                await asyncio.sleep(0)
            return await flows.cancel(flow_id)

        creating = [asyncio.create_task(create(flow_id)) for flow_id in ids]
        reports = await together(late_cancel(flow_id, n % 40) for n, flow_id in enumerate(ids))
        await together(creating)

        assert {(report.found, report.cancelled) for report in reports} <= {
            (True, True),
            (False, False),
        }
        missed = [flow_id for flow_id, report in zip(ids, reports, strict=True) if not report.found]
        assert {flow.status for flow in [await flows.get(i) for i in missed] if flow} <= {"queued"}
        again = await together(flows.cancel(flow_id) for flow_id in missed)
        assert all(report.cancelled for report in again)

    told = histories(db)
    assert len(told) == count
    assert all(types == CANCELLED_ONCE for types in told.values())


async def test_a_storm_of_cancels_during_a_commit_waits_for_it_and_shares_the_next_ones(db: Path):
    store, count = FaultyStore(SqliteStore(db, durability="normal")), STORM // 4
    async with running(store) as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, count)
        store.hold()
        updates = [
            asyncio.create_task(
                flows.update(flow_id=flow_id, expected_revision=0, state_json={"n": n})
            )
            for n, flow_id in enumerate(ids)
        ]
        await soon(store.wait_held())
        before = len(store.batches)

        cancels = [asyncio.create_task(flows.cancel(flow_id)) for flow_id in ids]
        await settle()
        assert not any(cancel.done() for cancel in cancels), "vacuous: the commit was not held"
        store.release()

        assert all(answer.applied for answer in await together(updates))
        assert all(report.cancelled for report in await together(cancels))
        assert len(store.batches) - before <= FEW

    wanted = ["flow.created", "flow.updated", "flow.cancel_requested", "flow.cancelled"]
    assert all(types == wanted for types in histories(db).values())


async def test_a_storm_of_cancels_during_the_shutdown_is_answered_and_none_is_half_done(db: Path):
    count, answers = STORM // 4, list[Any]()
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, count)

        async def late_cancel(flow_id: str, rounds: int) -> CancelReport:
            for _ in range(rounds):
                await asyncio.sleep(0)
            return await flows.cancel(flow_id)

        cancels = [asyncio.create_task(late_cancel(i, n % 20)) for n, i in enumerate(ids)]
        for _ in range(8):
            await asyncio.sleep(0)
        await soon(runtime.aclose())
        answers = await together(cancels)

    told = histories(db)
    kinds = Counter(
        "cancelled" if isinstance(a, CancelReport) else type(a).__name__ for a in answers
    )
    assert set(kinds) <= {"cancelled", "RuntimeClosed"}, kinds
    assert kinds["RuntimeClosed"], "vacuous: nothing was cancelled after the closing had begun"
    assert set(map(tuple, told.values())) <= {("flow.created",), tuple(CANCELLED_ONCE)}
    for flow_id, answer in zip(ids, answers, strict=True):
        if isinstance(answer, CancelReport):
            assert answer.cancelled
            assert told[flow_id] == CANCELLED_ONCE

    async with running(db, durability="normal") as again:
        flows = flows_of(again)
        left = [flow_id for flow_id in ids if told[flow_id] == ["flow.created"]]
        reports = await together(flows.cancel(flow_id) for flow_id in left)
        assert all(report.cancelled for report in reports)
    assert all(types == CANCELLED_ONCE for types in histories(db).values())


# ---- sends -----------------------------------------------------------------------------------------


async def test_a_flood_of_sends_to_one_flow_is_refused_beyond_the_bound_and_loses_nothing(
    db: Path,
):
    sends, bound = STORM * 5, 200
    highest = 0
    async with running(db, durability="normal", limits=Limits(mailbox=bound)) as runtime:
        flows = flows_of(runtime)
        flooded, other = await new_flow(flows), await new_flow(flows)

        async def send(n: int) -> Any:
            nonlocal highest
            highest = max(highest, runtime.statistics().waiting_mutations)
            return await flows.run_task(
                flow_id=flooded, task="t", runtime="acp", run_id=f"send-{n}"
            )

        async def elsewhere(revision: int) -> Any:
            return await flows.update(flow_id=other, expected_revision=revision, state_json={})

        answers: list[Any] = []
        # In waves, so that the flow takes some while it refuses others.
        for wave in range(20):
            calls: list[Awaitable[Any]] = [
                send(n) for n in range(wave * sends // 20, (wave + 1) * sends // 20)
            ]
            *sent, neighbour = await together([*calls, elsewhere(wave)])
            answers += sent
            assert isinstance(neighbour, Applied), neighbour

        taken = {answer.task.run_id for answer in answers if not isinstance(answer, Refused)}
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert len(taken) + len(refused) == sends
        assert len(taken) >= 20 * bound
        assert {answer.code for answer in refused} == {"overloaded"}
        assert highest <= bound + 1
        stored = {task.run_id for task in await flows.list_tasks(flooded)}
        assert stored == taken
        # The next one is taken again.
        assert not isinstance(await soon(send(sends)), Refused)
    check_all(db)


async def test_a_send_to_each_of_very_many_flows_is_applied_and_shares_transactions(db: Path):
    count = STORM * 2
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, count)
        before = runtime.statistics().commits

        answers = await together(
            flows.update(flow_id=flow_id, expected_revision=0, state_json=n)
            for n, flow_id in enumerate(ids)
        )

        refused = [answer for answer in answers if not isinstance(answer, Applied)]
        assert not refused
        assert runtime.statistics().commits - before <= max(10, count // 20)
        found = await together(flows.get(flow_id) for flow_id in ids)
        assert [(flow.revision, flow.state_json) for flow in found] == [
            (1, n) for n in range(count)
        ]


async def test_two_rivals_for_every_flow_apply_one_mutation_each(db: Path):
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, STORM // 2)

        async def update(flow_id: str, by: str) -> Any:
            return await flows.update(flow_id=flow_id, expected_revision=0, state_json=by)

        answers = await together(update(flow_id, by) for flow_id in ids for by in "ab")

        pairs = list(zip(answers[::2], answers[1::2], strict=True))
        for first, second in pairs:
            assert isinstance(first, Applied)
            assert isinstance(second, Rejected)
            assert (second.code, second.current) == ("revision_conflict", first.flow)


# ---- waiting ---------------------------------------------------------------------------------------


def timers() -> int:
    """How many timers the event loop has in store."""
    return len(cast(Any, asyncio.get_running_loop())._scheduled)


async def test_ten_thousand_waiting_flows_hold_no_task_and_no_timer_and_a_restart_changes_no_row(
    db: Path,
):
    count = STORM * 5
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        await new_flow(flows)
        await settle()
        tasks, handles = len(asyncio.all_tasks()), timers()

        await make_flows(flows, count - 1, status="waiting", wait_json={"kind": "reply"})
        await settle()

        assert len(asyncio.all_tasks()) <= tasks
        assert timers() <= handles + 1
        assert holds_nothing(runtime)
    before = dump(db)
    assert len(before["flows"]) == count

    async with running(db, durability="normal") as runtime:
        await settle()
        assert runtime.statistics().flows_in_memory == 0
        assert await flows_of(runtime).find_latest()

    assert dump(db) == before


async def test_flows_waiting_for_a_deadline_share_one_timer(db: Path):
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, STORM // 4)
        await settle()
        handles = timers()

        asked = await together(flows.request_cancel(flow_id=i, expected_revision=0) for i in ids)
        await settle()

        assert all(answer.applied for answer in asked)
        assert timers() <= handles + 2


# ---- watching --------------------------------------------------------------------------------------

BOUND = 16


async def test_slow_dead_and_failing_watchers_hold_up_no_commit_and_a_slow_one_misses_nothing():
    rounds = STORM // 10
    async with running(limits=Limits(watcher_events=BOUND)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        slow = await soon(flows.watch(flow_id).__aenter__())
        dead = await soon(flows.watch().__aenter__())
        seen: list[int] = []

        async def fails() -> None:
            async with flows.watch(flow_id) as events:
                async for _ in events:
                    raise ValueError("an observer with a fault")

        async def keeps_up() -> None:
            async with flows.watch(flow_id) as events:
                async for event in events:
                    seen.append(event.seq)

        watching = [asyncio.create_task(fails()), asyncio.create_task(keeps_up())]
        await settle()
        given_up = asyncio.create_task(read(slow, 1))
        await settle()
        given_up.cancel()

        for revision in range(rounds):
            answer = flows.update(flow_id=flow_id, expected_revision=revision, state_json=revision)
            assert (await soon(answer)).applied
            assert len(slow._live) <= BOUND
            assert len(dead._live) <= BOUND

        read_late = await soon(read(slow, rounds), LONG)
        assert [event.seq for event in read_late] == list(range(2, rounds + 2))
        failed, _ = watching
        assert isinstance((await soon(asyncio.wait({failed})))[0].pop().exception(), ValueError)
        await soon(slow.__aexit__(None, None, None))
        runtime_closing = asyncio.create_task(runtime.aclose())
        await soon(asyncio.wait(watching))
        await soon(runtime_closing)
    assert seen == list(range(2, rounds + 2))
    # Nobody reads it, and the closing has not waited until somebody does.
    assert len(dead._live) <= BOUND


async def read(events: AsyncIterator[Event], count: int) -> list[Event]:
    return [await anext(events) for _ in range(count)]


async def test_watchers_that_come_and_go_in_a_storm_leave_nothing_behind():
    async with stage() as it:
        got: list[int] = []

        async def glances(n: int) -> None:
            async with it.flows.watch(it.flow_id if n % 2 else None) as events:
                if n % 5:
                    got.append((await anext(events)).seq)

        watching = [asyncio.create_task(glances(n)) for n in range(STORM // 10)]
        await settle()
        for leaving in watching[::7]:
            leaving.cancel()
        flow = it.flows.update(flow_id=it.flow_id, expected_revision=0, state_json={})
        assert (await soon(flow)).applied
        await together(watching)

        it.fire()
        assert got
        engine = it.runtime._engine
        assert not engine.feed._of_flow
        assert not engine.feed._of_owner
        await it.check_others()


async def test_callers_given_up_by_the_thousand_leave_every_flow_whole(db: Path):
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, STORM // 4)
        calls = [
            asyncio.create_task(flows.update(flow_id=i, expected_revision=0, state_json="asked"))
            for i in ids
        ]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        answers = await together(calls)

        assert sum(isinstance(a, asyncio.CancelledError) for a in answers) == len(calls[::2])
        assert all(a.applied for a in answers[1::2])
        found = await together(flows.get(flow_id) for flow_id in ids)
        # Accepted before its caller gave up: applied all the same.
        assert {(flow.revision, flow.state_json) for flow in found} == {(1, "asked")}
    check_all(db)


async def test_waiting_for_ends_by_the_thousand_is_answered_or_ended_by_the_closing(db: Path):
    runtime: Runtime
    async with running(db, durability="normal") as runtime:
        flows = flows_of(runtime)
        ids = await make_flows(flows, STORM // 4)
        waiting = [asyncio.create_task(flows.result(flow_id)) for flow_id in ids]
        nobody = asyncio.create_task(flows.result("nobody's"))
        await together([nobody])
        finishing = [flows.finish(flow_id=i, expected_revision=0) for i in ids[::2]]
        assert all(answer.applied for answer in await together(finishing))
        await together(waiting[::2])
        await soon(runtime.aclose())
        answers = await together(waiting)

    assert isinstance(nobody.exception(), FlowNotFound)
    assert {answer.status for answer in answers[::2]} == {"succeeded"}
    assert {type(answer) for answer in answers[1::2]} == {RuntimeClosed}
