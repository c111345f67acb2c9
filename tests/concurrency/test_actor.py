"""The actor: many envelopes in one commit, a memory that follows the disk, and none at all when idle."""

from __future__ import annotations

import asyncio

import pytest

from flowstead import (
    FlowContext,
    Limits,
    Registry,
    Retry,
    SnapshotUnreadable,
    StoreUnusable,
    TaskContext,
)
from flowstead.model.flow import FlowKey
from flowstead.testing import ManualClock
from tests.faulty_store import (
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    holds_nothing,
    new_flow,
    running,
    settle,
    soon,
)


class Children:
    """Child functions that wait for a word, and how often each input was run."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.runs: list[object] = []

    async def work(self, ctx: TaskContext, given: object) -> object:
        self.runs.append(given)
        await self.go.wait()
        return given


async def forget(flows: object, store: FaultyStore, flow_id: str) -> None:
    """Let one commit of the flow fail, so that its actor starts over from the disk."""
    store.fail_commits(NOT_WRITTEN)
    refused = await soon(flows.run_task(flow_id=flow_id, task="never", runtime="cli"))  # type: ignore[attr-defined]
    assert refused.code == "persist_failed"


# ---- turns --------------------------------------------------------------------------------------


async def test_calls_made_at_once_are_folded_into_one_commit_and_answered_one_by_one():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        before = store.attempts

        answers = await soon(
            asyncio.gather(
                *(
                    flows.update(flow_id=flow_id, expected_revision=revision, state_json=revision)
                    for revision in range(50)
                )
            )
        )

        assert store.attempts == before + 1
        assert [answer.flow.revision for answer in answers if answer.flow] == list(range(1, 51))
        assert [answer.flow.state_json for answer in answers if answer.flow] == list(range(50))
        seqs = [event.seq for event in await flows.history(flow_id)]
        assert seqs == list(range(1, 52))


async def test_each_call_of_a_turn_sees_what_the_calls_before_it_did():
    async with running(FaultyStore()) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        answers = await soon(
            asyncio.gather(
                flows.update(flow_id=flow_id, expected_revision=0),
                flows.update(flow_id=flow_id, expected_revision=0),
                flows.finish(flow_id=flow_id, expected_revision=1),
                flows.update(flow_id=flow_id, expected_revision=2),
                flows.run_task(flow_id=flow_id, task="t", runtime="cli"),
            )
        )

        codes = [answer.code for answer in answers]
        assert codes == [None, "revision_conflict", None, "terminal", "terminal"]


async def test_more_calls_than_a_turn_takes_are_all_answered_in_order():
    async with running(FaultyStore()) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        answers = await soon(
            asyncio.gather(
                *(flows.update(flow_id=flow_id, expected_revision=r) for r in range(1000))
            )
        )

        assert all(answer.applied for answer in answers)
        assert runtime.statistics().commits <= 10


async def test_a_hundred_callers_of_one_revision_change_the_flow_once():
    async with running(FaultyStore()) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        answers = await soon(
            asyncio.gather(
                *(
                    flows.update(flow_id=flow_id, expected_revision=0, state_json=n)
                    for n in range(100)
                )
            )
        )

        assert [answer.applied for answer in answers].count(True) == 1
        assert {answer.flow.revision for answer in answers if answer.flow} == {1}


async def test_asking_for_a_flow_that_is_not_there_leaves_nothing_in_memory():
    async with running(FaultyStore()) as runtime:
        flows = flows_of(runtime)

        answer = await soon(flows.update(flow_id="nowhere", expected_revision=0))

        assert answer.code == "not_found"
        assert runtime.statistics().flows_in_memory == 0


# ---- memory follows the disk ----------------------------------------------------------------------


async def test_after_a_failed_commit_everybody_is_told_and_the_next_call_starts_from_the_disk():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, state_json="before")
        stored = await flows.get(flow_id)
        store.hold()
        calls = [
            asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=r, state_json=r))
            for r in range(3)
        ]
        await store.wait_held()
        store.fail_commits(NOT_WRITTEN)
        store.release()

        answers = await soon(asyncio.gather(*calls))

        assert [answer.code for answer in answers] == ["persist_failed"] * 3
        assert [answer.current for answer in answers] == [stored] * 3  # type: ignore[union-attr]
        assert await flows.get(flow_id) == stored
        again = await soon(flows.update(flow_id=flow_id, expected_revision=0, state_json="after"))
        assert again.flow
        assert (again.flow.revision, again.flow.state_json) == (1, "after")
        assert [event.seq for event in await flows.history(flow_id)] == [1, 2]


async def test_calls_that_waited_behind_a_failed_commit_are_decided_afresh():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        first = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        behind = [
            asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=revision))
            for revision in (1, 0)
        ]
        await settle()
        store.fail_commits(NOT_WRITTEN)
        store.release()

        assert (await soon(first)).code == "persist_failed"
        assert [(await soon(call)).code for call in behind] == ["revision_conflict", None]


async def test_children_that_run_while_memory_is_dropped_are_neither_started_twice_nor_cut_off():
    store, children, registry = FaultyStore(), Children(), Registry()

    @registry.task
    async def registered(ctx: TaskContext, given: object) -> object:
        return await children.work(ctx, given)

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        made = [
            (await flows.run_task(flow_id=flow_id, task="t", run=run, input_json=n)).unwrap()
            for n, run in enumerate([registered, children.work])
        ]
        await settle()

        await forget(flows, store, flow_id)
        assert (await soon(flows.update(flow_id=flow_id, expected_revision=0))).applied
        children.go.set()

        outcomes = [await soon(flows.wait_task(task.task_id)) for task in made]
        assert [outcome.result for outcome in outcomes] == [0, 1]
        assert children.runs == [0, 1]
        assert [task.attempt for task in await flows.list_tasks(flow_id)] == [1, 1]


async def test_a_controller_that_runs_while_memory_is_dropped_is_not_entered_twice():
    store, registry, entered = FaultyStore(), Registry(), []
    go = asyncio.Event()

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        entered.append(flow.revision)
        await go.wait()

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await forget(flows, store, flow_id)
        await settle()
        go.set()

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert entered == [1]


async def test_registered_children_in_line_still_start_after_memory_was_dropped():
    store, children, registry = FaultyStore(), Children(), Registry()
    registry.task(children.work, name="work")

    async with running(store, registry=registry, limits=Limits(running_children=2)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        for n in range(6):
            await flows.run_task(flow_id=flow_id, task="t", run="work", input_json=n)
        await settle()

        await forget(flows, store, flow_id)
        children.go.set()
        await settle()

        assert sorted(children.runs, key=str) == list(range(6))
        tasks = await flows.list_tasks(flow_id)
        assert [(task.status, task.attempt) for task in tasks] == [("succeeded", 1)] * 6


async def test_bare_children_in_line_still_start_after_memory_was_dropped():
    store, children = FaultyStore(), Children()

    async with running(store, limits=Limits(running_children=2)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        for n in range(6):
            await flows.run_task(flow_id=flow_id, task="t", run=children.work, input_json=n)
        await settle()

        await forget(flows, store, flow_id)
        children.go.set()
        await settle()

        tasks = await flows.list_tasks(flow_id)
        assert [task.status for task in tasks] == ["succeeded"] * 6
        assert sorted(children.runs, key=str) == list(range(6))


@pytest.mark.parametrize("registered", [True, False])
async def test_a_map_goes_on_after_memory_was_dropped(registered: bool):
    store, children, registry = FaultyStore(), Children(), Registry()
    results: list[object] = []
    if registered:
        registry.task(children.work, name="work")

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        results.extend(await flow.map(children.work, list(range(6)), limit=2))

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await forget(flows, store, flow_id)
        children.go.set()
        await settle()

        flow = await flows.get(flow_id)
        assert flow
        assert (flow.status, results) == ("succeeded", list(range(6)))


async def test_an_unreadable_flow_fails_its_callers_and_nobody_else():
    store = FaultyStore()
    async with running(
        store, limits=Limits(idle_seconds=1), clock=(clock := ManualClock())
    ) as runtime:
        flows = flows_of(runtime)
        bad, good = await new_flow(flows), await new_flow(flows)
        key = store.tables.flow_keys[FlowKey("owner", bad)]
        row = store.tables.flows[key]
        clock.advance(3)
        assert runtime.statistics().flows_in_memory == 0
        store.tables.flows[key] = row._replace(doc='{"flowId": 7}')

        answers = await soon(
            asyncio.gather(
                flows.update(flow_id=bad, expected_revision=0),
                flows.update(flow_id=good, expected_revision=0),
                flows.finish(flow_id=bad, expected_revision=0),
                return_exceptions=True,
            )
        )

        assert isinstance(answers[0], SnapshotUnreadable)
        assert answers[1].applied  # type: ignore[union-attr]
        assert isinstance(answers[2], SnapshotUnreadable)
        assert store.tables.flows[key].doc == '{"flowId": 7}'
        store.tables.flows[key] = row
        assert (await soon(flows.update(flow_id=bad, expected_revision=0))).applied


async def test_a_read_that_fails_once_fails_its_callers_once():
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        clock.advance(30)
        store.fail_reads("load", StoreUnusable("flows.db", "a read failed"))

        with pytest.raises(StoreUnusable):
            await soon(flows.update(flow_id=flow_id, expected_revision=0))

        assert (await soon(flows.update(flow_id=flow_id, expected_revision=0))).applied


async def test_a_child_whose_flow_cannot_be_read_for_a_moment_ends_all_the_same():
    store, children, clock = FaultyStore(), Children(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        troubled, calm = await new_flow(flows), await new_flow(flows)
        first = (await flows.run_task(flow_id=troubled, task="t", run=children.work)).unwrap()
        await settle()
        go_too = asyncio.Event()

        async def sibling(ctx: TaskContext, given: object) -> str:
            await go_too.wait()
            return "unharmed"

        second = (await flows.run_task(flow_id=calm, task="t", run=sibling)).unwrap()
        await settle()
        await forget(flows, store, troubled)
        store.fail_reads("load", StoreUnusable("flows.db", "a read failed"))

        children.go.set()
        await settle()
        go_too.set()
        await settle()
        for _ in range(3):
            clock.advance(2)
            await settle()

        tasks = [await flows.get_task(task.task_id) for task in (first, second)]
        assert [task.status for task in tasks if task] == ["succeeded", "succeeded"]


async def test_a_controller_whose_flow_cannot_be_read_for_a_moment_harms_no_other_flow():
    store, children, clock, registry = FaultyStore(), Children(), ManualClock(), Registry()
    go = asyncio.Event()

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await go.wait()

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        troubled, calm = await new_flow(flows, "c"), await new_flow(flows)
        made = (await flows.run_task(flow_id=calm, task="t", run=children.work)).unwrap()
        await settle()
        await forget(flows, store, troubled)
        store.fail_reads("load", StoreUnusable("flows.db", "a read failed"))

        go.set()
        await settle()
        children.go.set()
        await settle()
        for _ in range(3):
            clock.advance(2)
            await settle()

        task, flow = await flows.get_task(made.task_id), await flows.get(troubled)
        assert task
        assert task.status == "succeeded"
        assert flow
        assert flow.status == "succeeded"


# ---- an outcome nobody knew ------------------------------------------------------------------------


async def test_waiting_for_a_childs_end_outlasts_an_unknown_outcome_that_was_written():
    store, children, clock = FaultyStore(), Children(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        made = (await flows.run_task(flow_id=flow_id, task="t", run=children.work)).unwrap()
        waiting = asyncio.create_task(flows.wait_task(made.task_id))
        await settle()
        store.fail_commits(UNKNOWN, written=True)

        children.go.set()
        await settle()
        clock.advance(2)
        await settle()

        task = await flows.get_task(made.task_id)
        assert task
        assert task.status == "succeeded"
        assert waiting.done()


async def test_waiting_for_a_flows_end_outlasts_an_unknown_outcome_that_was_written():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        waiting = asyncio.create_task(flows.result(flow_id))
        await settle()
        store.fail_commits(UNKNOWN, written=True)

        answer = await soon(flows.finish(flow_id=flow_id, expected_revision=0))
        again = await soon(flows.finish(flow_id=flow_id, expected_revision=0))
        await settle()

        assert (answer.code, again.code) == ("outcome_unknown", "revision_conflict")
        assert waiting.done()


async def test_a_controllers_step_returns_after_an_unknown_outcome_that_was_written():
    store, children, clock, registry = FaultyStore(), Children(), ManualClock(), Registry()

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        assert await flow.run(children.work, "result") == "result"

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        store.fail_commits(UNKNOWN, written=True)

        children.go.set()
        await settle()
        clock.advance(2)
        await settle()

        flow = await flows.get(flow_id)
        assert flow
        assert flow.status == "succeeded"


async def test_a_watcher_has_no_gap_after_an_unknown_outcome_that_was_written():
    store, seen = FaultyStore(), []
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        async def watch() -> None:
            async with flows.watch(flow_id, after_seq=0) as events:
                async for event in events:
                    seen.append(event.seq)

        watching = asyncio.create_task(watch())
        await settle()
        store.fail_commits(UNKNOWN, written=True)

        await soon(flows.update(flow_id=flow_id, expected_revision=0))
        await soon(flows.update(flow_id=flow_id, expected_revision=1))
        await settle()

        assert seen == [1, 2, 3]
        watching.cancel()


async def test_a_retry_comes_due_after_an_unknown_outcome_that_was_written():
    store, clock, registry, runs = FaultyStore(), ManualClock(), Registry(), []

    @registry.task(retry=Retry(initial=10, jitter=0))
    async def flaky(ctx: TaskContext, given: object) -> str:
        runs.append(ctx.attempt)
        if ctx.attempt == 1:
            store.fail_commits(UNKNOWN, written=True)
            raise ValueError("once")
        return "done"

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.run_task(flow_id=flow_id, task="t", run=flaky)
        await settle()

        for _ in range(20):
            clock.advance(2)
            await settle()

        assert runs == [1, 2]


# ---- idle flows ------------------------------------------------------------------------------------


async def test_idle_flows_leave_memory_and_answer_again():
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows, state_json=n) for n in range(20)]
        assert runtime.statistics().flows_in_memory == 20

        clock.advance(11)
        await settle()

        assert runtime.statistics().flows_in_memory == 0
        assert [flow.state_json for i in ids if (flow := await flows.get(i))] == list(range(20))
        answers = await soon(
            asyncio.gather(*(flows.update(flow_id=i, expected_revision=0) for i in ids))
        )
        assert all(answer.applied for answer in answers)
        assert runtime.statistics().flows_in_memory == 20


async def test_a_flow_that_is_asked_for_stays_in_memory():
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        asked, _idle = await new_flow(flows), await new_flow(flows)

        for revision in range(4):
            clock.advance(3)
            await soon(flows.update(flow_id=asked, expected_revision=revision))

        assert runtime.statistics().flows_in_memory == 1


async def test_a_flow_with_a_running_child_or_controller_stays_in_memory():
    store, clock, registry, children = FaultyStore(), ManualClock(), Registry(), Children()

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await children.go.wait()

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        with_child, _with_controller = await new_flow(flows), await new_flow(flows, "c")
        await flows.run_task(flow_id=with_child, task="t", run=children.work)
        await settle()

        clock.advance(100)
        await settle()
        assert runtime.statistics().flows_in_memory == 2
        children.go.set()
        await settle()
        clock.advance(100)
        await settle()

        assert runtime.statistics().flows_in_memory == 0
        assert holds_nothing(runtime)


async def test_a_flow_whose_commit_is_under_way_stays_in_memory():
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()

        clock.advance(100)
        await settle()

        assert runtime.statistics().flows_in_memory == 1
        store.release()
        assert (await soon(call)).applied


async def test_a_registered_child_waiting_for_its_retry_survives_the_flow_leaving_memory():
    store, clock, registry, runs = FaultyStore(), ManualClock(), Registry(), []

    @registry.task(retry=Retry(initial=30, jitter=0))
    async def flaky(ctx: TaskContext, given: object) -> str:
        runs.append(ctx.attempt)
        if ctx.attempt == 1:
            raise ValueError("once")
        return "done"

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        made = (await flows.run_task(flow_id=flow_id, task="t", run=flaky)).unwrap()
        await settle()

        clock.advance(20)
        await settle()
        assert runtime.statistics().flows_in_memory == 0
        clock.advance(11)
        await settle()

        assert runs == [1, 2]
        assert (await soon(flows.wait_task(made.task_id))).result == "done"


async def test_a_bare_child_waiting_for_its_retry_survives_the_flow_leaving_memory():
    store, clock, runs = FaultyStore(), ManualClock(), []

    async def flaky(ctx: TaskContext, given: object) -> str:
        runs.append(ctx.attempt)
        if ctx.attempt == 1:
            raise ValueError("once")
        return "done"

    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        retry = Retry(initial=30, jitter=0)
        made = (await flows.run_task(flow_id=flow_id, task="t", run=flaky, retry=retry)).unwrap()
        await settle()

        for _ in range(4):
            clock.advance(10)
            await settle()

        task = await flows.get_task(made.task_id)
        assert task
        assert (task.status, task.failure, runs) == ("succeeded", None, [1, 2])


async def test_after_a_busy_run_nothing_is_held_on_to():
    store, clock, registry = FaultyStore(), ManualClock(), Registry()

    @registry.task
    async def double(ctx: TaskContext, given: int) -> int:
        return 2 * given

    async def bare(ctx: TaskContext, given: int) -> int:
        return 3 * given

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await flow.map(double, list(range(20)))
        await flow.map(bare, list(range(20)), limit=3)
        await flow.once("inline", lambda: bare(None, 1))  # type: ignore[arg-type]
        await flow.update(state_json="done")

    before = asyncio.all_tasks()
    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        ids = await asyncio.gather(*(new_flow(flows, "c") for _ in range(20)))
        ended = await soon(asyncio.gather(*(flows.result(i) for i in ids)))
        await settle()

        assert {flow.status for flow in ended} == {"succeeded"}
        assert holds_nothing(runtime)
        names = sorted(task.get_name() for task in asyncio.all_tasks() - before)
        assert names == sorted(
            f"flowstead {job}" for job in ("committer", "loader", "supervisor", "timers")
        )
        clock.advance(100)
        await settle()
        assert runtime.statistics().flows_in_memory == 0
