"""The ledger face under many callers at once, in several runtimes, loops and threads."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead import (
    Applied,
    Limits,
    MailboxFull,
    Rejected,
    Runtime,
    SessionFlows,
    StoreInUse,
    open_runtime,
)
from tests.runtime.support import PATIENCE, Where, bound, link, make, step


async def test_a_thousand_mutations_carried_by_returned_revisions_need_no_read(
    flows: SessionFlows,
) -> None:
    flow = await make(flows, state_json=0)

    for number in range(1, 1001):
        flow = (
            await flows.update(
                flow_id=flow.flow_id, expected_revision=flow.revision, state_json=number
            )
        ).unwrap()

    assert (flow.revision, flow.state_json) == (1000, 1000)
    assert await flows.get(flow.flow_id) == flow
    assert len(await flows.history(flow.flow_id, limit=2000)) == 1001


async def test_of_a_hundred_mutations_from_one_revision_exactly_one_is_applied(
    flows: SessionFlows,
) -> None:
    flow = await make(flows)

    answers = await asyncio.gather(
        *(
            flows.update(flow_id=flow.flow_id, expected_revision=0, state_json={"by": number})
            for number in range(100)
        )
    )

    [won] = [answer for answer in answers if isinstance(answer, Applied)]
    lost = [answer for answer in answers if isinstance(answer, Rejected)]
    assert len(lost) == 99
    assert {answer.code for answer in lost} == {"revision_conflict"}
    assert all(answer.current == won.flow for answer in lost)
    assert await flows.get(flow.flow_id) == won.flow


async def test_mixed_mutations_from_one_revision_apply_exactly_one(flows: SessionFlows) -> None:
    for _ in range(20):
        flow = await make(flows)
        calls: list[Any] = []
        for name in ("set_waiting", "resume", "update", "finish", "fail", "request_cancel"):
            calls += [
                getattr(flows, name)(flow_id=flow.flow_id, expected_revision=0) for _ in range(5)
            ]

        answers = await asyncio.gather(*calls)

        assert sum(answer.applied for answer in answers) == 1
        assert {a.code for a in answers if not a.applied} == {"revision_conflict"}


async def test_a_hundred_loops_of_read_and_write_end_at_exactly_a_hundred(
    flows: SessionFlows,
) -> None:
    flow = await make(flows, state_json=0)

    async def increment() -> None:
        while True:
            now = await flows.get(flow.flow_id)
            assert now is not None
            answer = await flows.update(
                flow_id=now.flow_id,
                expected_revision=now.revision,
                state_json=now.state_json + 1,
            )
            if answer.applied:
                return
            assert answer.code == "revision_conflict"

    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(increment)

    end = await flows.get(flow.flow_id)
    assert end is not None
    assert (end.state_json, end.revision) == (100, 100)


async def test_a_full_mailbox_refuses_at_once_and_loses_nothing(store: Where) -> None:
    async with open_runtime(store, limits=Limits(mailbox=10)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)

        answers = await asyncio.gather(
            *(
                flows.run_task(flow_id=flow.flow_id, runtime="acp", task=str(number))
                for number in range(200)
            )
        )

        created = {answer.task.task for answer in answers if answer.created}
        refused = [answer for answer in answers if not answer.created]
        assert {answer.code for answer in refused} == {"overloaded"}
        assert {answer.found for answer in refused} == {True}
        assert len(created) >= 10
        assert len(created) + len(refused) == 200
        assert {task.task for task in await flows.list_tasks(flow.flow_id)} == created
        with pytest.raises(MailboxFull):
            refused[0].unwrap()
        # What was refused may simply be asked again.
        assert (await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="x")).created


async def test_an_overloaded_flow_answers_every_kind_of_call(store: Where) -> None:
    async with open_runtime(store, limits=Limits(mailbox=1)) as runtime:
        flows = bound(runtime)
        flow = await make(flows, flow_id="f")
        task = await link(flows, "f")
        names = ("set_waiting", "resume", "update", "request_cancel")
        calls: list[Any] = [
            getattr(flows, name)(flow_id="f", expected_revision=0) for name in names * 5
        ]
        calls += [flows.progress_task(task.task_id) for _ in range(5)]
        calls += [flows.cancel("f", expected_revision=99) for _ in range(5)]
        calls += [flows.cancel_task("nobody") for _ in range(5)]
        calls += [make(flows, flow_id="f") for _ in range(5)]

        with anyio.fail_after(PATIENCE):
            answers = await asyncio.gather(*calls, return_exceptions=True)

        assert sum(getattr(answer, "applied", False) is True for answer in answers) <= 1
        assert any(getattr(answer, "code", None) == "overloaded" for answer in answers)
        assert any(isinstance(answer, MailboxFull) for answer in answers)
        now = await flows.get("f")
        assert now is not None
        assert now.revision - flow.revision == sum(
            getattr(answer, "applied", False) is True for answer in answers
        )


async def test_one_callers_misuse_never_reaches_another(flows: SessionFlows) -> None:
    async def work(_: object, __: object) -> None: ...

    flow = await make(flows)

    misuse, honest = await asyncio.gather(
        flows.run_task(flow_id=flow.flow_id, task="t", run=work, retry=3),  # type: ignore[arg-type]
        flows.update(flow_id=flow.flow_id, expected_revision=0),
        return_exceptions=True,
    )

    assert isinstance(honest, Applied)
    assert isinstance(misuse, TypeError)


async def test_flows_do_not_wait_for_each_other(flows: SessionFlows) -> None:
    made = [await make(flows) for _ in range(50)]

    answers = await asyncio.gather(
        *(
            flows.run_task(flow_id=flow.flow_id, runtime="acp", task=str(number))
            for flow in made
            for number in range(20)
        )
    )

    assert all(answer.created for answer in answers)
    for flow in made:
        told = [event.seq for event in await flows.history(flow.flow_id)]
        assert told == list(range(1, 22))
        tasks = await flows.list_tasks(flow.flow_id)
        assert [task.task for task in tasks] == [str(number) for number in range(20)]


async def test_one_flow_takes_its_mutations_in_the_order_they_were_asked_for(
    flows: SessionFlows,
) -> None:
    flow = await make(flows)

    answers = await asyncio.gather(
        *(
            flows.update(flow_id=flow.flow_id, expected_revision=number, state_json=number)
            for number in range(300)
        )
    )

    assert [answer.unwrap().revision for answer in answers] == list(range(1, 301))


# ---- several of everything ------------------------------------------------------------------------


async def test_two_runtimes_on_two_stores_know_nothing_of_each_other(tmp_path: Path) -> None:
    async with (
        open_runtime(tmp_path / "a.db") as a,
        open_runtime(tmp_path / "b.db") as b,
        open_runtime(":memory:") as c,
        open_runtime(":memory:") as d,
    ):
        made = [await make(bound(runtime), flow_id="f") for runtime in (a, b, c)]
        await bound(a).finish(flow_id="f", expected_revision=0)

        assert await bound(b).get("f") == made[1]
        assert await bound(c).get("f") == made[2]
        assert await bound(d).get("f") is None


async def test_a_store_has_one_owner_at_a_time(store: Where) -> None:
    async with open_runtime(store) as first:
        flow = await make(bound(first))
        with pytest.raises(StoreInUse, match="in use by"):
            async with open_runtime(store):
                pass  # pragma: no cover
        assert (await bound(first).update(flow_id=flow.flow_id, expected_revision=0)).applied

    async with open_runtime(store) as second:
        assert await bound(second).get(flow.flow_id) is not None


def test_two_loops_in_two_threads_have_a_runtime_each(tmp_path: Path) -> None:
    finished: Counter[str] = Counter()

    def host(name: str) -> None:
        async def serve() -> None:
            async with open_runtime(tmp_path / f"{name}.db") as runtime:
                flows = bound(runtime)
                flow = await make(flows, state_json=name)
                for _ in range(50):
                    flow = (
                        await flows.update(flow_id=flow.flow_id, expected_revision=flow.revision)
                    ).unwrap()
                done = await flows.finish(flow_id=flow.flow_id, expected_revision=50)
                assert done.unwrap().state_json == name
                finished[name] += 1

        asyncio.run(serve())

    threads = [threading.Thread(target=host, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert finished == {"a": 1, "b": 1}


async def _from_another_loop(call: Any) -> BaseException | None:
    """What a call answers in a loop of another thread, given up on if it never does."""

    def elsewhere() -> BaseException | None:
        async def run() -> None:
            async with asyncio.timeout(2):
                await call()

        try:
            asyncio.run(run())
        except BaseException as error:
            return error
        return None

    return await asyncio.to_thread(elsewhere)


async def test_a_call_from_another_loop_is_told_so(runtime: Runtime, flows: SessionFlows) -> None:
    flow = await make(flows)

    for call in (
        lambda: flows.get(flow.flow_id),
        lambda: flows.update(flow_id=flow.flow_id, expected_revision=0),
        lambda: make(flows),
        lambda: flows.result(flow.flow_id),
        lambda: flows.cancel(flow.flow_id),
        lambda: flows.watch(flow.flow_id).__aenter__(),
    ):
        error = await _from_another_loop(call)
        assert isinstance(error, RuntimeError)
        assert "belongs to another event loop" in str(error)

    assert await flows.get(flow.flow_id) == flow


async def test_closing_from_another_loop_is_told_so_and_closes_nothing(
    runtime: Runtime, flows: SessionFlows
) -> None:
    flow = await make(flows)

    error = await _from_another_loop(runtime.aclose)

    assert isinstance(error, RuntimeError)
    assert "belongs to another event loop" in str(error)
    assert await flows.get(flow.flow_id) == flow


async def test_a_flow_that_left_memory_is_the_same_when_it_comes_back(store: Where) -> None:
    from flowstead.testing import ManualClock

    clock = ManualClock()
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        made = [await make(flows, state_json=number) for number in range(20)]
        task = await link(flows, made[0].flow_id, run_id="r")
        for _ in range(5):
            clock.advance(6)
            await step(5)
        assert runtime.statistics().flows_in_memory == 0

        updated = await flows.update(flow_id=made[0].flow_id, expected_revision=0)
        again = await flows.run_task(flow_id=made[0].flow_id, runtime="acp", task="t", run_id="r")

        assert updated.unwrap().state_json == 0
        assert again.task == task
        assert [await flows.get(flow.flow_id) for flow in made[1:]] == made[1:]
