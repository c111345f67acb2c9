"""The committer: one batch at a time for everybody, and nothing is told before it is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from flowstead import (
    CommitFailed,
    Limits,
    OutcomeUnknown,
    Registry,
    Rejected,
    RuntimeClosed,
    StoreInUse,
    TaskContext,
)
from flowstead.engine.committer import Committer
from flowstead.model.flow import FlowKey
from flowstead.store.codec import FlowWrite
from flowstead.store.memory import MemoryStore
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

EMPTY = FlowWrite(None, [], [])


class Told:
    """A writer that remembers what it was told."""

    def __init__(self) -> None:
        self.answers: list[object] = []

    def committed(self, first_position: int) -> None:
        self.answers.append(first_position)

    def failed(self, error: Exception) -> None:
        self.answers.append(error)


def a_committer(store: Any, batch: int = 512) -> Committer:
    return Committer(store, batch, on_lost=lambda: None)


async def opened() -> FaultyStore:
    store = FaultyStore()
    await store.open()
    return store


async def test_a_lone_write_is_committed_at_once():
    store = await opened()
    committer, writer = a_committer(store), Told()
    job = asyncio.create_task(committer.run())
    await settle()

    committer.submit(EMPTY, writer)
    await settle()

    assert store.batches == [1]
    assert len(writer.answers) == 1
    committer.stop()
    await soon(job)


async def test_what_queued_while_a_commit_ran_goes_into_the_next_one():
    store = await opened()
    committer, writers = a_committer(store), [Told() for _ in range(8)]
    job = asyncio.create_task(committer.run())
    store.hold()
    committer.submit(EMPTY, writers[0])
    await store.wait_held()

    for writer in writers[1:]:
        committer.submit(EMPTY, writer)
    await settle()
    store.release()
    await settle()

    assert store.batches == [1, 7]
    assert [len(writer.answers) for writer in writers] == [1] * 8
    counts = committer.statistics
    assert (counts.batches, counts.writes, counts.largest_batch) == (2, 8, 7)
    committer.stop()
    await soon(job)


async def test_a_batch_is_never_larger_than_its_bound():
    store = await opened()
    committer, writers = a_committer(store, batch=3), [Told() for _ in range(10)]
    for writer in writers:
        committer.submit(EMPTY, writer)

    committer.stop()
    await soon(committer.run())

    assert store.batches == [3, 3, 3, 1]
    assert [len(writer.answers) for writer in writers] == [1] * 10


async def test_stopping_writes_and_answers_all_that_was_submitted():
    store = await opened()
    committer, first, second = a_committer(store), Told(), Told()
    job = asyncio.create_task(committer.run())
    store.hold()
    committer.submit(EMPTY, first)
    await store.wait_held()
    committer.submit(EMPTY, second)

    committer.stop()
    await settle()
    assert not job.done()
    store.release()
    await soon(job)

    assert store.batches == [1, 1]
    assert len(first.answers) == len(second.answers) == 1


@pytest.mark.parametrize("error", [NOT_WRITTEN, UNKNOWN, StoreInUse("x", "y")])
async def test_a_failure_is_told_to_everybody_in_the_batch(error: Exception):
    store = await opened()
    store.fail_commits(error)
    committer, writers = a_committer(store), [Told() for _ in range(5)]
    for writer in writers:
        committer.submit(EMPTY, writer)

    committer.stop()
    await soon(committer.run())

    assert [writer.answers for writer in writers] == [[error]] * 5
    assert committer.statistics.failed == 5
    assert committer.statistics.writes == 0


async def test_a_fault_of_the_stores_own_leaves_the_outcome_unknown():
    store, fault = await opened(), ZeroDivisionError("a fault of the store's own")
    store.fail_commits(fault)
    committer, writer = a_committer(store), Told()
    committer.submit(EMPTY, writer)

    committer.stop()
    await soon(committer.run())

    [told] = writer.answers
    assert isinstance(told, OutcomeUnknown)
    assert told.__cause__ is fault


async def test_a_store_that_was_taken_over_is_told_to_whoever_runs_code():
    store, lost = await opened(), []
    store.fail_commits(StoreInUse("x", "another"))
    committer = Committer(store, 8, on_lost=lambda: lost.append(True))
    committer.submit(EMPTY, Told())

    committer.stop()
    await soon(committer.run())

    assert lost == [True]


async def test_a_misfit_is_refused_alone_and_the_others_of_its_batch_are_written():
    store = await opened()
    store.fail_commits(MISFIT)  # the batch of four
    committer, writers = a_committer(store), [Told() for _ in range(4)]
    for writer in writers:
        committer.submit(EMPTY, writer)
    run_alone = store.commit

    async def refuse_the_third(writes: Any) -> int:
        if store.attempts == 3:
            store.fail_commits(MISFIT)
        return await run_alone(writes)

    store.commit = refuse_the_third  # type: ignore[method-assign]
    committer.stop()
    await soon(committer.run())

    assert [writer.answers[0] is MISFIT for writer in writers] == [False, False, True, False]
    assert [len(writer.answers) for writer in writers] == [1] * 4
    assert store.batches == [1, 1, 1]


async def test_a_failing_upkeep_does_not_stop_the_commits():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.fail_reads("upkeep", OSError("the checkpoint failed"), times=2)

        first = await soon(flows.update(flow_id=flow_id, expected_revision=0))
        second = await soon(flows.update(flow_id=flow_id, expected_revision=1))

        assert first.applied
        assert second.applied


# ---- through the door ---------------------------------------------------------------------------


async def test_flows_created_at_once_share_one_transaction():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)

        await soon(asyncio.gather(*(new_flow(flows) for _ in range(100))))

        assert store.batches == [100]


async def test_the_bound_on_a_batch_is_the_limit_of_the_runtime():
    store = FaultyStore()
    async with running(store, limits=Limits(batch=4)) as runtime:
        flows = flows_of(runtime)

        await soon(asyncio.gather(*(new_flow(flows) for _ in range(10))))

        assert sum(store.batches) == 10
        assert max(store.batches) == runtime.statistics().largest_batch == 4


async def test_a_flow_whose_row_was_changed_behind_its_back_does_not_spoil_the_batch():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows) for _ in range(5)]
        key = store.tables.flow_keys[FlowKey("owner", ids[2])]
        store.tables.flows[key] = store.tables.flows[key]._replace(revision=7)

        answers = await soon(
            asyncio.gather(*(flows.update(flow_id=i, expected_revision=0) for i in ids))
        )

        assert [answer.code for answer in answers] == [None, None, "persist_failed", None, None]
        assert [flow.revision for i in ids if (flow := await flows.get(i))] == [1, 1, 0, 1, 1]


async def test_a_failed_commit_answers_everybody_and_changes_nothing():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows) for _ in range(5)]
        before = [await flows.get(i) for i in ids]
        store.fail_commits(NOT_WRITTEN)

        answers = await soon(
            asyncio.gather(*(flows.update(flow_id=i, expected_revision=0) for i in ids))
        )

        assert [answer.code for answer in answers] == ["persist_failed"] * 5
        assert [answer.current for answer in answers] == before
        assert [await flows.get(i) for i in ids] == before
        again = await soon(flows.update(flow_id=ids[0], expected_revision=0))
        assert again.applied


async def test_a_failed_create_leaves_no_flow():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        store.fail_commits(NOT_WRITTEN)

        with pytest.raises(CommitFailed):
            await soon(flows.create_managed(controller_id="c", goal="g", flow_id="mine"))

        assert await flows.get("mine") is None
        assert runtime.statistics().flows_in_memory == 0
        assert (await soon(flows.create_managed(controller_id="c", goal="g", flow_id="mine"))) == (
            await flows.get("mine")
        )


async def test_an_unknown_outcome_is_answered_as_unknown_without_a_flow():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.fail_commits(UNKNOWN)

        answer = await soon(flows.update(flow_id=flow_id, expected_revision=0))

        assert isinstance(answer, Rejected)
        assert (answer.code, answer.current) == ("outcome_unknown", None)
        flow = await flows.get(flow_id)
        assert flow
        assert flow.revision == 0


async def test_after_an_unknown_outcome_that_was_written_the_flow_is_as_the_disk_has_it():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.fail_commits(UNKNOWN, written=True)

        answer = await soon(flows.update(flow_id=flow_id, expected_revision=0))
        again = await soon(flows.update(flow_id=flow_id, expected_revision=0))

        assert answer.code == "outcome_unknown"
        assert again.code == "revision_conflict"
        assert again.current
        assert again.current.revision == 1


async def test_a_runtime_that_was_overtaken_writes_nothing_and_stops_its_code():
    tables_of_first = MemoryStore()
    started, stopped = asyncio.Event(), asyncio.Event()

    async def child(ctx: TaskContext, given: object) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with running(tables_of_first) as first:
        flows = flows_of(first)
        flow_id = await new_flow(flows)
        await flows.run_task(flow_id=flow_id, task="t", run=child)
        await soon(started.wait())

        async with running(MemoryStore(tables_of_first.tables), takeover=True) as second:
            refused = await soon(flows.update(flow_id=flow_id, expected_revision=0))

            assert refused.code == "persist_failed"
            await soon(stopped.wait())
            flow = await flows_of(second).get(flow_id)
            assert flow
            assert flow.revision == 0


async def test_an_accepted_mutation_outlives_its_caller():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        committing = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        queued = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=1))
        await settle()

        committing.cancel()
        queued.cancel()
        await settle()
        store.release()
        await settle()

        assert committing.cancelled()
        assert queued.cancelled()
        flow = await flows.get(flow_id)
        assert flow
        assert flow.revision == 2


async def test_closing_waits_for_the_commit_under_way_and_answers_everybody():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        first = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        second = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=1))
        await settle()

        closing = asyncio.create_task(runtime.aclose())
        await settle()
        assert not closing.done()
        with pytest.raises(RuntimeClosed):
            await flows.update(flow_id=flow_id, expected_revision=2)
        store.release()
        await soon(closing)

        assert (await first).applied
        assert (await second).applied
        assert store.tables.owner is None


async def test_no_commit_happens_after_the_close():
    store = FaultyStore()
    let_go = asyncio.Event()

    async def stubborn(ctx: TaskContext, given: object) -> str:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                pass
        return "too late"

    async with running(store, limits=Limits(shutdown_grace=0.01)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.run_task(flow_id=flow_id, task="t", run=stubborn)
        await turns()
        await soon(runtime.aclose())
        attempts = store.attempts

        let_go.set()
        await turns()

        assert store.attempts == attempts


# ---- nothing is seen before it is durable ---------------------------------------------------------


async def test_a_reply_waits_for_its_commit():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()

        call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        await settle()

        assert not call.done()
        store.release()
        assert (await soon(call)).applied


@pytest.mark.parametrize("fails", [False, True])
async def test_a_refusal_that_names_a_revision_waits_for_the_commit_of_that_revision(fails: bool):
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()

        calls = [
            asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0, state_json=n))
            for n in range(2)
        ]
        await store.wait_held()
        calls.append(asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0)))
        await settle()

        assert [call.done() for call in calls] == [False, False, False]
        if fails:
            store.fail_commits(NOT_WRITTEN)
        store.release()
        codes = [(await soon(call)).code for call in calls]
        if fails:
            # The third one comes to a flow that is still at revision 0.
            assert codes == ["persist_failed", "persist_failed", None]
        else:
            assert codes == [None, "revision_conflict", "revision_conflict"]


async def test_a_call_that_changes_nothing_is_answered_without_a_commit():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()

        refused = await soon(flows.update(flow_id=flow_id, expected_revision=9))

        assert refused.code == "revision_conflict"
        assert store.attempts == 1


async def test_no_read_shows_what_is_not_committed():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        calls = [
            asyncio.create_task(flows.finish(flow_id=flow_id, expected_revision=0)),
            asyncio.create_task(new_flow(flows, flow_id="second")),
        ]
        await store.wait_held()
        await settle()

        flow = await flows.get(flow_id)

        assert flow
        assert (flow.revision, flow.status) == (0, "queued")
        assert await flows.get("second") is None
        assert [found.flow_id for found in await flows.list()] == [flow_id]
        assert len(await flows.history(flow_id)) == 1
        store.release()
        await soon(asyncio.gather(*calls))
        assert await flows.get("second")


async def test_a_watcher_sees_no_event_before_its_commit():
    store, seen = FaultyStore(), []
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        async def watch() -> None:
            async with flows.watch(flow_id) as events:
                async for event in events:
                    seen.append(event.type)

        watching = asyncio.create_task(watch())
        await settle()
        store.hold()
        call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        await settle()

        assert seen == []
        store.release()
        await soon(call)
        await settle()
        assert seen == ["flow.updated"]
        watching.cancel()


async def test_a_child_starts_only_once_its_row_is_durable():
    store, ran = FaultyStore(), []

    async def child(ctx: TaskContext, given: object) -> None:
        ran.append(ctx.task_id)

    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        call = asyncio.create_task(flows.run_task(flow_id=flow_id, task="t", run=child))
        await store.wait_held()
        await settle()

        assert ran == []
        store.release()
        made = (await soon(call)).unwrap()
        await settle()
        assert ran == [made.task_id]


async def test_a_child_whose_row_could_not_be_written_never_starts():
    store, ran = FaultyStore(), []

    async def child(ctx: TaskContext, given: object) -> None:
        ran.append(ctx.task_id)

    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.fail_commits(NOT_WRITTEN)

        refused = await soon(flows.run_task(flow_id=flow_id, task="t", run=child))
        await settle()

        assert (refused.created, refused.code) == (False, "persist_failed")
        assert ran == []
        assert await flows.list_tasks(flow_id) == []
        assert runtime._code.functions._bound == {}


async def test_a_controller_starts_only_once_its_flow_is_durable():
    store, registry, ran = FaultyStore(), Registry(), []

    @registry.controller("c")
    async def controller(flow: object) -> None:
        ran.append(True)

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)
        store.hold()
        call = asyncio.create_task(new_flow(flows, "c"))
        await store.wait_held()
        await settle()

        assert ran == []
        store.release()
        await soon(call)
        await settle()
        assert ran == [True]


async def test_waiting_for_an_end_lasts_until_the_end_is_durable():
    store = FaultyStore()

    async def child(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "result"

    go = asyncio.Event()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        made = (await flows.run_task(flow_id=flow_id, task="t", run=child)).unwrap()
        task_end = asyncio.create_task(flows.wait_task(made.task_id))
        flow_end = asyncio.create_task(flows.result(flow_id))
        await settle()

        store.hold()
        go.set()
        await store.wait_held()
        finishing = asyncio.create_task(flows.finish(flow_id=flow_id, expected_revision=0))
        await settle()

        assert not task_end.done()
        assert not flow_end.done()
        store.release()
        assert (await soon(task_end)).result == "result"
        assert (await soon(flow_end)).status == "succeeded"
        assert (await soon(finishing)).applied


# ---- a loop that ends under it --------------------------------------------------------------------


async def test_a_committer_that_is_cancelled_leaves_nobody_without_an_answer_and_says_that_it_is_over():
    store, lost = await opened(), []
    committer = Committer(store, 2, on_lost=lambda: lost.append(True))
    writers = [Told() for _ in range(6)]
    job = asyncio.create_task(committer.run())
    store.hold()
    for writer in writers[:5]:
        committer.submit(EMPTY, writer)
    await store.wait_held()

    job.cancel()
    await asyncio.wait({job})
    committer.submit(EMPTY, writers[5])
    await settle()

    assert job.cancelled()
    told = [[type(answer) for answer in writer.answers] for writer in writers]
    assert told == [[OutcomeUnknown]] * 2 + [[CommitFailed]] * 4
    assert lost == [True]


async def test_a_committer_cancelled_while_it_writes_one_by_one_answers_the_others_too():
    class Hanging(FaultyStore):
        async def commit(self, writes: Sequence[FlowWrite]) -> int:
            if len(writes) > 1:
                raise MISFIT
            self.hold()
            return await super().commit(writes)

    store = Hanging()
    await store.open()
    committer, writers = a_committer(store), [Told() for _ in range(3)]
    for writer in writers:
        committer.submit(EMPTY, writer)
    job = asyncio.create_task(committer.run())
    await store.wait_held()

    job.cancel()
    await asyncio.wait({job})

    told = [[type(answer) for answer in writer.answers] for writer in writers]
    assert told == [[OutcomeUnknown], [CommitFailed], [CommitFailed]]
