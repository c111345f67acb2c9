"""Cancelling: a request lets what runs go on; a cancel returns when the code is gone, or says that it is not."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from flowstead import (
    Cancelled,
    FlowContext,
    Limits,
    Registry,
    Retry,
    Runtime,
    SessionFlows,
    Succeeded,
    TaskContext,
)
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock, Simulation
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
    turns,
)


class Stage:
    """Child functions of several tempers, and a gate for the well-behaved."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.let_go = asyncio.Event()
        self.started: list[object] = []
        self.stopped: list[object] = []

    async def waits(self, ctx: TaskContext, given: object) -> str:
        self.started.append(given)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.stopped.append(given)
            raise
        return "done"

    async def shields(self, ctx: TaskContext, given: object) -> str:
        self.started.append(given)
        with anyio.CancelScope(shield=True):
            await self.let_go.wait()
        return "shielded"

    async def swallows(self, ctx: TaskContext, given: object) -> str:
        self.started.append(given)
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self.stopped.append(given)
        return "swallowed"


async def launch(flows: SessionFlows, flow_id: str, run: Any, **given: Any) -> str:
    return (
        (await soon(flows.run_task(flow_id=flow_id, task="t", run=run, **given))).unwrap().task_id
    )


async def statuses(flows: SessionFlows, flow_id: str) -> list[str]:
    return [task.status for task in await flows.list_tasks(flow_id)]


async def status(flows: SessionFlows, flow_id: str) -> str:
    flow = await flows.get(flow_id)
    assert flow
    return flow.status


# ---- request_cancel --------------------------------------------------------------------------------


async def test_after_a_request_nothing_new_starts_and_what_runs_goes_on_to_its_end():
    stage = Stage()
    async with running(limits=Limits(running_children=2)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        tasks = [await launch(flows, flow_id, stage.waits, input_json=n) for n in range(5)]
        await settle()

        answer = await soon(flows.request_cancel(flow_id=flow_id, expected_revision=0))

        assert answer.applied
        assert await statuses(flows, flow_id) == ["running"] * 2 + ["cancelled"] * 3
        refused = await flows.run_task(flow_id=flow_id, task="t", run=stage.waits)
        assert refused.code == "cancel_requested"
        for call in (flows.set_waiting, flows.resume, flows.request_cancel):
            assert (await call(flow_id=flow_id, expected_revision=1)).code == "cancel_requested"
        assert await status(flows, flow_id) == "queued"

        stage.go.set()

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.revision) == ("cancelled", 2)
        assert await statuses(flows, flow_id) == ["succeeded"] * 2 + ["cancelled"] * 3
        assert (stage.started, stage.stopped) == ([0, 1], [])
        assert await soon(flows.wait_task(tasks[0])) == Succeeded("done")
        await settle()
        assert holds_nothing(runtime)


async def test_a_requested_cancel_still_lets_the_flow_be_updated_and_finished():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.request_cancel(flow_id=flow_id, expected_revision=0)

        updated = await flows.update(flow_id=flow_id, expected_revision=1, state_json="more")
        finished = await flows.finish(flow_id=flow_id, expected_revision=2)

        assert updated.applied
        assert finished.flow
        assert finished.flow.status == "succeeded"
        assert finished.flow.cancel_requested_at


async def test_a_requested_cancel_of_a_flow_without_children_waits_for_its_grace():
    clock = ManualClock()
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.request_cancel(flow_id=flow_id, expected_revision=0)

        clock.advance(59.9)
        await settle()
        assert await status(flows, flow_id) == "queued"
        clock.advance(0.1)

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.revision) == ("cancelled", 2)
        assert ended.ended_at == clock.now()


async def test_the_grace_of_a_requested_cancel_goes_on_across_a_restart():
    store, clock = MemoryStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flow_id = await new_flow(flows_of(runtime))
        await flows_of(runtime).request_cancel(flow_id=flow_id, expected_revision=0)

    clock.advance(30)
    async with running(MemoryStore(store.tables), clock=clock) as runtime:
        flows = flows_of(runtime)
        await settle()
        assert await status(flows, flow_id) == "queued"
        clock.advance(30)

        assert (await soon(flows.result(flow_id))).status == "cancelled"


@pytest.mark.parametrize("trouble", [NOT_WRITTEN, UNKNOWN])
async def test_the_grace_ends_the_flow_although_a_commit_fails_at_that_moment(trouble: Exception):
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.request_cancel(flow_id=flow_id, expected_revision=0)
        store.fail_commits(trouble)

        for _ in range(20):
            clock.advance(5)
            await settle()

        assert await status(flows, flow_id) == "cancelled"


async def test_the_grace_does_not_cut_off_a_child_that_runs():
    stage, clock = Stage(), ManualClock()
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.waits)
        await settle()
        await flows.request_cancel(flow_id=flow_id, expected_revision=0)

        clock.advance(600)
        await settle()

        assert await statuses(flows, flow_id) == ["running"]
        stage.go.set()
        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert await statuses(flows, flow_id) == ["succeeded"]


async def test_the_grace_stops_a_controller_that_does_not_end():
    clock, registry, stopped = ManualClock(), Registry(), []

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    async with running(clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        await flows.request_cancel(flow_id=flow_id, expected_revision=1)
        clock.advance(59)
        await settle()
        assert stopped == []

        clock.advance(1)

        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert stopped == [True]


async def test_a_requested_cancel_waits_for_a_linked_child():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        linked = (
            await flows.run_task(flow_id=flow_id, task="t", runtime="acp", status="running")
        ).unwrap()
        await flows.request_cancel(flow_id=flow_id, expected_revision=0)
        assert await status(flows, flow_id) == "queued"

        await flows.complete_task(linked.task_id, result_json="elsewhere")

        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert await statuses(flows, flow_id) == ["succeeded"]


# ---- cancel ----------------------------------------------------------------------------------------


async def test_cancel_answers_cancelled_only_when_no_code_of_the_flow_runs():
    stage, cleaning = Stage(), asyncio.Event()

    async def cleans_up(ctx: TaskContext, given: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await cleaning.wait()

    async with running(limits=Limits(running_children=2)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, cleans_up)
        for n in range(3):
            await launch(flows, flow_id, stage.waits, input_json=n)
        await settle()

        cancelling = asyncio.create_task(flows.cancel(flow_id))
        await turns()
        assert not cancelling.done()
        flow = await flows.get(flow_id)
        assert flow
        assert flow.cancel_requested_at
        assert flow.ended_at is None
        cleaning.set()

        report = await soon(cancelling)
        assert (report.found, report.cancelled, report.code, report.reason) == (
            True,
            True,
            None,
            None,
        )
        assert report.flow
        assert (report.flow.status, report.flow.revision) == ("cancelled", 2)
        assert [task.status for task in report.tasks] == ["cancelled"] * 4
        assert stage.stopped == [0]
        assert runtime.statistics().running_children == 0
        await settle()
        assert holds_nothing(runtime)


@pytest.mark.parametrize("temper", ["shields", "swallows"])
async def test_a_child_that_does_not_stop_leaves_the_cancel_pending_and_says_so(temper: str):
    stage, clock = Stage(), ManualClock()
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        stubborn = await launch(flows, flow_id, getattr(stage, temper))
        await launch(flows, flow_id, stage.waits)
        await settle()

        cancelling = asyncio.create_task(flows.cancel(flow_id, grace=2))
        await turns()
        assert not cancelling.done()
        clock.advance(2)

        report = await soon(cancelling)
        assert (report.found, report.cancelled, report.code) == (True, False, "cancel_pending")
        assert report.reason == "One or more child tasks are still active."
        assert [task.task_id for task in report.tasks] == [stubborn]
        assert await status(flows, flow_id) == "queued"

        stage.let_go.set()
        ended = await soon(flows.result(flow_id))
        assert ended.status == "cancelled"
        # It really did its work while the cancel waited.
        assert sorted(await statuses(flows, flow_id)) == ["cancelled", "succeeded"]
        again = await flows.cancel(flow_id)
        assert (again.cancelled, again.code) == (False, "terminal")


async def test_other_flows_go_on_while_a_child_swallows_its_cancellation():
    stage, clock = Stage(), ManualClock()
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id, other = await new_flow(flows), await new_flow(flows)
        await launch(flows, flow_id, stage.swallows)
        task_id = await launch(flows, other, stage.waits)
        await settle()
        cancelling = asyncio.create_task(flows.cancel(flow_id, grace=1))
        await turns()

        stage.go.set()
        assert await soon(flows.wait_task(task_id)) == Succeeded("done")
        assert (await soon(flows.finish(flow_id=other, expected_revision=0))).applied

        clock.advance(1)
        assert (await soon(cancelling)).code == "cancel_pending"
        stage.let_go.set()
        await soon(flows.result(flow_id))


async def test_cancel_stops_the_controller_and_its_children():
    registry, stage, stopped = Registry(), Stage(), []

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        try:
            await flow.map(stage.waits, range(3))
        finally:
            stopped.append("controller")

    async with running(registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        report = await soon(flows.cancel(flow_id))

        assert report.cancelled
        assert stopped == ["controller"]
        assert sorted(stage.stopped, key=str) == [0, 1, 2]
        assert await statuses(flows, flow_id) == ["cancelled"] * 3
        await settle()
        assert holds_nothing(runtime)


async def test_a_cancel_while_only_the_controller_lingers_is_not_answered_as_cancelled():
    registry, clock, let_go = Registry(), ManualClock(), asyncio.Event()

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        with anyio.CancelScope(shield=True):
            await let_go.wait()

    async with running(registry=registry, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        cancelling = asyncio.create_task(flows.cancel(flow_id, grace=1))
        await turns()

        clock.advance(1)

        report = await soon(cancelling)
        assert (report.cancelled, report.code) == (False, "cancel_pending")
        let_go.set()
        assert (await soon(flows.result(flow_id))).ended_at


async def test_cancelling_a_flow_without_code_ends_it_at_once_in_one_commit():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        before = store.attempts

        report = await soon(flows.cancel(flow_id))

        assert report.cancelled
        assert store.attempts == before + 1
        types = [event.type for event in await flows.history(flow_id)]
        assert types == ["flow.created", "flow.cancel_requested", "flow.cancelled"]


async def test_cancel_marks_linked_children_as_cancelled():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        for status_of in ("queued", "running"):
            await flows.run_task(flow_id=flow_id, task="t", runtime="acp", status=status_of)

        report = await soon(flows.cancel(flow_id))

        assert report.cancelled
        assert [task.status for task in report.tasks] == ["cancelled"] * 2


async def test_cancel_takes_a_revision_and_refuses_a_stale_one():
    stage = Stage()
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.waits)
        await settle()

        stale = await soon(flows.cancel(flow_id, expected_revision=7))

        assert (stale.found, stale.cancelled, stale.code) == (True, False, "revision_conflict")
        assert stage.stopped == []
        flow = await flows.get(flow_id)
        assert flow
        assert (flow.revision, flow.cancel_requested_at) == (0, None)
        assert (await soon(flows.cancel(flow_id, expected_revision=0))).cancelled


async def test_cancel_after_a_request_stops_what_the_request_left_running():
    stage = Stage()
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.waits)
        await settle()
        await flows.request_cancel(flow_id=flow_id, expected_revision=0)

        report = await soon(flows.cancel(flow_id))

        assert report.cancelled
        assert report.flow
        # The request, the cancel, and the end.
        assert report.flow.revision == 3
        assert report.flow.cancel_started_at
        assert stage.stopped == [None]


async def test_cancelling_what_is_not_there_or_a_strangers_is_not_found():
    async with running() as runtime:
        flow_id = await new_flow(flows_of(runtime))

        for report in (
            await flows_of(runtime).cancel("nowhere"),
            await flows_of(runtime, "stranger").cancel(flow_id),
        ):
            assert (report.found, report.cancelled, report.code) == (False, False, "not_found")
        assert await status(flows_of(runtime), flow_id) == "queued"


async def test_a_hundred_cancels_at_once_are_all_answered_by_one_transition():
    stage, store = Stage(), FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        for n in range(4):
            await launch(flows, flow_id, stage.waits, input_json=n)
        await settle()

        reports = await soon(asyncio.gather(*(flows.cancel(flow_id) for _ in range(100))))

        assert all(report.cancelled for report in reports)
        flow = await flows.get(flow_id)
        assert flow
        assert flow.revision == 2
        types = [event.type for event in await flows.history(flow_id)]
        assert types.count("flow.cancelled") == types.count("flow.cancel_requested") == 1
        assert types.count("task.ended") == 4
        await settle()
        assert holds_nothing(runtime)


async def test_a_storm_of_cancels_over_three_hundred_flows_ends_them_all():
    stage, store, registry = Stage(), FaultyStore(), Registry()

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await flow.map(stage.waits, [1, 2])

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)
        ids = await asyncio.gather(*(new_flow(flows, "c") for _ in range(300)))
        await settle()
        before = store.attempts

        reports = await soon(asyncio.gather(*(flows.cancel(i) for i in ids)), 60)

        assert all(report.cancelled for report in reports)
        assert store.attempts - before < 30
        await settle()
        assert holds_nothing(runtime)
        assert runtime.statistics().running_children == 0


async def test_a_cancel_outlives_its_caller():
    stage, store = Stage(), FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.waits)
        await settle()
        store.hold()
        cancelling = asyncio.create_task(flows.cancel(flow_id))
        await store.wait_held()

        cancelling.cancel()
        await settle()
        assert cancelling.cancelled()
        store.release()

        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert stage.stopped == [None]
        await settle()
        assert holds_nothing(runtime)


# ---- at bad moments --------------------------------------------------------------------------------


async def test_cancelling_while_the_flow_is_being_created_finds_nothing_or_cancels_it():
    registry, entered, store = Registry(), [], FaultyStore()

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        entered.append(flow.flow_id)
        await asyncio.Event().wait()

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)
        store.hold()
        creating = asyncio.create_task(new_flow(flows, "c", flow_id="mine"))
        await store.wait_held()
        cancelling = asyncio.create_task(flows.cancel("mine"))
        await settle()
        store.release()
        await soon(creating)

        report = await soon(cancelling)

        if report.found:
            assert report.cancelled
        else:
            assert (await soon(flows.cancel("mine"))).cancelled
        assert await status(flows, "mine") == "cancelled"


async def test_a_child_added_in_the_same_turn_as_a_cancel_never_starts():
    stage, store = Stage(), FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        earlier = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        adding = asyncio.create_task(flows.run_task(flow_id=flow_id, task="t", run=stage.waits))
        await settle()
        cancelling = asyncio.create_task(flows.cancel(flow_id))
        await settle()

        store.release()

        assert (await soon(earlier)).applied
        assert (await soon(adding)).created
        assert (await soon(cancelling)).cancelled
        assert stage.started == []
        assert await statuses(flows, flow_id) == ["cancelled"]
        await settle()
        assert holds_nothing(runtime)


async def test_a_cancel_during_the_commit_that_starts_a_child_stops_it():
    stage, store = Stage(), FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        adding = asyncio.create_task(flows.run_task(flow_id=flow_id, task="t", run=stage.waits))
        await store.wait_held()
        cancelling = asyncio.create_task(flows.cancel(flow_id))
        await settle()

        store.release()

        assert (await soon(adding)).created
        assert (await soon(cancelling)).cancelled
        assert await statuses(flows, flow_id) == ["cancelled"]
        assert runtime.statistics().running_children == 0


async def test_a_child_that_succeeded_while_the_cancel_was_on_its_way_stays_succeeded():
    stage, store = Stage(), FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, stage.waits)
        await settle()
        store.hold()
        cancelling = asyncio.create_task(flows.cancel(flow_id))
        await store.wait_held()

        stage.go.set()
        await settle()
        store.release()

        assert (await soon(cancelling)).cancelled
        assert await soon(flows.wait_task(task_id)) == Succeeded("done")
        assert await statuses(flows, flow_id) == ["succeeded"]


@pytest.mark.parametrize("trouble", [NOT_WRITTEN, UNKNOWN])
async def test_a_cancel_that_could_not_be_written_says_so_and_stops_nothing(trouble: Exception):
    stage, store = Stage(), FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.waits)
        await settle()
        store.fail_commits(trouble)

        report = await soon(flows.cancel(flow_id))
        await settle()

        assert (report.found, report.cancelled) == (True, False)
        assert report.code == ("persist_failed" if trouble is NOT_WRITTEN else "outcome_unknown")
        assert stage.stopped == []
        assert (await soon(flows.cancel(flow_id))).cancelled


async def test_a_cancel_that_was_written_although_nobody_knew_is_carried_out():
    stage, store, clock = Stage(), FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.waits)
        await settle()
        store.fail_commits(UNKNOWN, written=True)

        report = await soon(flows.cancel(flow_id))
        assert report.code == "outcome_unknown"
        assert stage.stopped == []
        clock.advance(1)

        # The wish is on disk, so it is obeyed although nobody asks again.
        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert stage.stopped == [None]
        again = await soon(flows.cancel(flow_id))
        assert (again.cancelled, again.code) == (False, "terminal")


async def test_an_end_that_could_not_be_written_keeps_a_cancel_waiting_until_it_is():
    stage, store, clock = Stage(), FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.waits)
        await settle()
        cancelling = asyncio.create_task(flows.cancel(flow_id, grace=60))
        store.hold()
        await store.wait_held()
        store.release()
        await asyncio.sleep(0)
        store.fail_commits(NOT_WRITTEN)

        for _ in range(5):
            await settle()
            clock.advance(1)

        assert (await soon(cancelling)).cancelled
        types = [event.type for event in await flows.history(flow_id)]
        assert types.count("task.ended") == 1


async def test_a_cancel_under_way_is_answered_when_the_runtime_closes():
    stage, clock = Stage(), ManualClock()
    store = MemoryStore()
    async with running(store, clock=clock, limits=Limits(shutdown_grace=0.05)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, stage.shields)
        await settle()
        cancelling = asyncio.create_task(flows.cancel(flow_id))
        await turns()

        closing = asyncio.create_task(runtime.aclose())
        await turns()
        stage.let_go.set()
        await soon(closing)
        await soon(asyncio.wait({cancelling}))

        assert cancelling.done()
    async with running(MemoryStore(store.tables), clock=clock) as runtime:
        flows = flows_of(runtime)
        clock.advance(61)
        assert (await soon(flows.result(flow_id))).status == "cancelled"


async def test_nothing_starts_after_a_restart_once_a_cancel_was_requested():
    store, clock, stage, registry = MemoryStore(), ManualClock(), Stage(), Registry()
    registry.task(stage.waits, name="waits")

    @registry.task(retry=Retry(initial=5, jitter=0))
    async def flaky(ctx: TaskContext, given: object) -> None:
        stage.started.append("flaky")
        raise ValueError

    limits = Limits(running_children=2)
    async with running(store, clock=clock, registry=registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, "flaky")
        await settle()
        for n in range(4):
            await launch(flows, flow_id, "waits", input_json=n)
        await settle()
        assert stage.started == ["flaky", 0, 1]
        await flows.request_cancel(flow_id=flow_id, expected_revision=0)

    async with running(
        MemoryStore(store.tables), clock=clock, registry=registry, limits=limits
    ) as runtime:
        flows = flows_of(runtime)
        for _ in range(10):
            await settle()
            clock.advance(10)

        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert stage.started == ["flaky", 0, 1]
        assert await statuses(flows, flow_id) == ["cancelled"] * 5


# ---- one child ---------------------------------------------------------------------------------------


async def test_cancelling_one_child_stops_it_alone_and_the_flow_goes_on():
    stage = Stage()
    async with running(limits=Limits(running_children=1)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        first, second, third = [
            await launch(flows, flow_id, stage.waits, input_json=n) for n in range(3)
        ]
        await settle()

        queued = await soon(flows.cancel_task(third))
        ran = await soon(flows.cancel_task(first))
        await settle()

        assert (queued.found, queued.cancelled, queued.reason) == (True, True, None)
        assert (ran.found, ran.cancelled, ran.reason) == (True, True, None)
        assert stage.stopped == [0]
        assert await statuses(flows, flow_id) == ["cancelled", "running", "cancelled"]
        stage.go.set()
        assert await soon(flows.wait_task(second)) == Succeeded("done")
        again = await soon(flows.cancel_task(first))
        assert (again.found, again.cancelled, again.reason) == (
            True,
            False,
            "Task is already cancelled.",
        )
        flow = await flows.get(flow_id)
        assert flow
        assert (flow.revision, flow.cancel_requested_at) == (0, None)


async def test_a_child_that_will_not_stop_is_reported_as_such():
    stage, clock = Stage(), ManualClock()
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), stage.shields)
        await settle()
        cancelling = asyncio.create_task(flows.cancel_task(task_id, grace=3))
        await turns()

        clock.advance(3)

        report = await soon(cancelling)
        assert (report.found, report.cancelled) == (True, False)
        assert report.task
        assert report.task.status == "running"
        stage.let_go.set()
        assert await soon(flows.wait_task(task_id)) == Succeeded("shielded")


async def test_a_cancelled_child_is_not_tried_again():
    stage, clock = Stage(), ManualClock()
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(
            flows, await new_flow(flows), stage.waits, retry=Retry(initial=1, max_attempts=9)
        )
        await settle()

        assert (await soon(flows.cancel_task(task_id))).cancelled
        clock.advance(100)
        await settle()

        assert stage.started == [None]


async def test_a_child_waiting_for_its_retry_can_be_cancelled():
    clock, runs = ManualClock(), []

    async def fails(ctx: TaskContext, given: object) -> None:
        runs.append(ctx.attempt)
        raise ValueError

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), fails, retry=Retry(initial=10))
        await settle()

        assert (await soon(flows.cancel_task(task_id))).cancelled
        clock.advance(100)
        await settle()

        assert runs == [1]
        assert holds_nothing(runtime)


async def test_a_strangers_child_cannot_be_cancelled_or_seen():
    stage = Stage()
    async with running() as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), stage.waits)

        report = await soon(flows_of(runtime, "stranger").cancel_task(task_id))

        assert (report.found, report.cancelled, report.task) == (False, False, None)
        assert stage.stopped == []


def test_a_child_that_was_asked_to_stop_is_not_started_again_after_a_crash():
    registry, attempts = Registry(), []

    @registry.task(retry=Retry(max_attempts=9))
    async def stays(ctx: TaskContext, given: object) -> None:
        attempts.append(ctx.attempt)
        with anyio.CancelScope(shield=True):
            await anyio.sleep(3600)

    async def ask(runtime: Runtime) -> str:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), stays)
        report = await flows.cancel_task(task_id, grace=1)
        assert report.found
        assert not report.cancelled
        return task_id

    async def look(runtime: Runtime, task_id: str) -> object:
        return await flows_of(runtime).wait_task(task_id)

    with Simulation() as sim:
        task_id = sim.play(ask(sim.boot(registry=registry)))

        sim.kill()
        end = sim.play(look(sim.boot(registry=registry), task_id))

        assert isinstance(end, Cancelled)
        assert attempts == [1]
        sim.shut()
