"""The rungs of a stop: request, cancel, kill, abandon, each at its instant, whatever disk and process do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest

from flowstead import (
    Cancelled,
    CancelReport,
    FlowContext,
    Limits,
    RefusedError,
    Registry,
    Retry,
    Runtime,
    SessionFlows,
    Succeeded,
    Task,
    TaskContext,
)
from flowstead.executors import Call
from flowstead.store.memory import MemoryStore, MemoryTables
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

LIMITS = Limits(cancel_grace=60, kill_after=5, abandon_after=25, shutdown_grace=0.05)
TROUBLES = {
    "not written": (NOT_WRITTEN, False),
    "unknown and not written": (UNKNOWN, False),
    "unknown and written": (UNKNOWN, True),
}


class Deaf:
    """Children and a controller that do not stop until they are let go, and what they saw."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.runs: list[tuple[str, int]] = []
        self.registry = Registry()
        self.registry.task(self.child, name="deaf")

    async def child(self, ctx: TaskContext, given: Any) -> str:
        self.runs.append((str(given), ctx.attempt))
        await self.stay()
        return "when it liked"

    async def stay(self) -> None:
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                pass


@pytest.fixture
async def deaf() -> AsyncIterator[Deaf]:
    """Deaf code, and a loop that can be closed however the test ends."""
    code = Deaf()
    yield code
    code.let_go.set()
    await settle()


@asynccontextmanager
async def staged(deaf: Deaf, store: Any = ":memory:", **options: Any) -> AsyncIterator[Runtime]:
    """A runtime in which deaf code is let go before it has to close."""
    options.setdefault("limits", LIMITS)
    async with running(store, **options) as runtime:
        try:
            yield runtime
        finally:
            deaf.let_go.set()
            await settle()


async def polite(ctx: TaskContext, given: Any) -> None:
    await asyncio.Event().wait()


async def nobody(ctx: TaskContext, given: Any) -> None:
    """What an executor of our own stands in for."""


async def launch(flows: SessionFlows, flow_id: str, run: Any, **given: Any) -> str:
    made = await soon(flows.run_task(flow_id=flow_id, task="t", run=run, **given))
    return made.unwrap().task_id


async def task_of(flows: SessionFlows, task_id: str) -> Task:
    task = await flows.get_task(task_id)
    assert task
    return task


async def status(flows: SessionFlows, flow_id: str) -> str:
    flow = await flows.get(flow_id)
    assert flow
    return flow.status.value


async def types_of(flows: SessionFlows, flow_id: str) -> list[str]:
    return [str(event.type) for event in await flows.history(flow_id)]


async def pass_time(clock: ManualClock, seconds: float) -> None:
    """Let time go by in small steps, and let happen what it brings."""
    for _ in range(round(seconds * 10)):
        clock.advance(0.1)
        await settle()


async def begin_cancel(flows: SessionFlows, flow_id: str) -> asyncio.Task[CancelReport]:
    """A cancel whose caller has all the time in the world."""
    cancelling = asyncio.create_task(flows.cancel(flow_id, grace=3600))
    await settle()
    return cancelling


def said(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.msg == event]


# ---- a child ----------------------------------------------------------------------------------------


async def test_a_child_that_never_stops_climbs_every_rung_at_its_instant(
    deaf: Deaf, clock: ManualClock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "flowstead")
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child)
        await settle()
        began = clock.now()

        # Requested: nothing stops.
        await soon(flows.request_cancel(flow_id=flow_id, expected_revision=0))
        await pass_time(clock, 10)
        assert (await task_of(flows, task_id)).cancel_requested_at is None

        # Cancelled: it is asked to.
        cancelling = await begin_cancel(flows, flow_id)
        flow = await flows.get(flow_id)
        assert flow
        assert (flow.cancel_requested_at, flow.cancel_started_at) == (began, began + 10_000)
        assert (await task_of(flows, task_id)).cancel_requested_at == began + 10_000
        await pass_time(clock, 4.9)
        assert (await task_of(flows, task_id)).kill_requested_at is None

        # Killed: by force, where there is any.
        await pass_time(clock, 0.1)
        assert (await task_of(flows, task_id)).kill_requested_at == began + 15_000
        await pass_time(clock, 24.9)
        assert (await task_of(flows, task_id)).status == "running"
        assert not cancelling.done()

        # Given up.
        await pass_time(clock, 0.1)
        task = await task_of(flows, task_id)
        assert (task.status, task.ended_at) == ("cancelled", began + 40_000)
        assert task.failure
        assert task.failure.kind == "abandoned"
        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.ended_at) == ("cancelled", began + 40_000)

        report = await soon(cancelling)
        assert (report.found, report.cancelled, report.code) == (True, False, "abandoned")
        assert report.flow == ended
        [line] = report.descendants
        assert (line.task_id, line.state, line.status) == (task_id, "abandoned", "cancelled")
        assert (line.asked_at, line.killed_at, line.ended_at) == (
            began + 10_000,
            began + 15_000,
            began + 40_000,
        )
        assert await types_of(flows, flow_id) == [
            "flow.created",
            "task.created",
            "task.started",
            "flow.cancel_requested",
            "flow.cancel_started",
            "task.cancel_requested",
            "task.kill_requested",
            "task.ended",
            "flow.cancelled",
        ]
        [warned] = said(caplog, "child.ignores_stop")
        assert warned.levelno == logging.WARNING
        assert len(said(caplog, "child.abandoned")) == 1
        counts = runtime.statistics()
        assert (counts.ignored_stops, counts.abandoned, counts.running_children) == (1, 1, 0)


async def test_the_late_end_of_an_abandoned_child_is_dropped_and_told(
    deaf: Deaf, clock: ManualClock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "flowstead")
    store = FaultyStore()
    async with staged(deaf, store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child)
        await settle()
        await begin_cancel(flows, flow_id)
        await pass_time(clock, 30)
        assert (await task_of(flows, task_id)).ended_at
        flow, commits = await flows.get(flow_id), store.attempts

        deaf.let_go.set()
        await settle()

        assert [record.__dict__["task_id"] for record in said(caplog, "end.too_late")] == [task_id]
        assert await flows.get(flow_id) == flow
        assert store.attempts == commits
        assert (await types_of(flows, flow_id)).count("task.ended") == 1
        outcome = await soon(flows.wait_task(task_id))
        assert isinstance(outcome, Cancelled)
        await settle()
        assert holds_nothing(runtime)


async def test_an_abandoned_child_that_goes_on_can_say_nothing_any_more(
    deaf: Deaf, clock: ManualClock
):
    said: list[Any] = []

    async def talks(ctx: TaskContext, given: Any) -> None:
        await deaf.stay()
        for talk in (ctx.progress("still here"), ctx.heartbeat()):
            said.append(await talk)

    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, talks)
        await settle()
        await begin_cancel(flows, flow_id)
        await pass_time(clock, 30)
        before = await task_of(flows, task_id)
        history = await flows.history(flow_id)

        deaf.let_go.set()
        await settle()

        assert said == [None, None]
        assert await task_of(flows, task_id) == before
        assert await flows.history(flow_id) == history


async def test_a_request_alone_lets_a_child_run_for_as_long_as_it_likes(
    deaf: Deaf, clock: ManualClock
):
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child)
        await settle()
        await soon(flows.request_cancel(flow_id=flow_id, expected_revision=0))

        await pass_time(clock, 200)

        task = await task_of(flows, task_id)
        assert (task.status, task.cancel_requested_at) == ("running", None)
        deaf.let_go.set()
        assert await soon(flows.wait_task(task_id)) == Succeeded("when it liked")
        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert runtime.statistics().ignored_stops == 0


@pytest.mark.parametrize(("seconds", "state"), [(0, "settled"), (4, "settled"), (6, "killed")])
async def test_a_child_that_stops_on_the_way_climbs_no_further(
    seconds: float, state: str, clock: ManualClock
):
    tidy = asyncio.Event()

    async def tidies(ctx: TaskContext, given: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await tidy.wait()

    async with running(clock=clock, limits=LIMITS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, tidies)
        await settle()
        cancelling = await begin_cancel(flows, flow_id)
        await pass_time(clock, seconds)

        tidy.set()
        report = await soon(cancelling)
        await pass_time(clock, 100)

        assert (report.cancelled, report.code) == (True, None)
        assert [line.state for line in report.descendants] == [state]
        task = await task_of(flows, task_id)
        assert (task.status, task.failure and task.failure.kind) == ("cancelled", "cancelled")
        assert runtime.statistics().abandoned == 0
        assert (await types_of(flows, flow_id)).count("task.kill_requested") == (state == "killed")
        assert holds_nothing(runtime)


async def test_each_child_of_a_flow_climbs_by_itself(deaf: Deaf, clock: ManualClock):
    outside = Outside()
    deaf.registry.executor(outside)
    deaf.registry.task(nobody, name="outside", executor="outside")
    async with staged(deaf, clock=clock, registry=deaf.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        ids = [await launch(flows, flow_id, run) for run in (polite, "outside", "deaf")]
        await settle()
        began = clock.now()
        cancelling = await begin_cancel(flows, flow_id)

        await pass_time(clock, 30)

        report = await soon(cancelling)
        assert report.code == "abandoned"
        lines = {line.task_id: line for line in report.descendants}
        assert [lines[i].state for i in ids] == ["settled", "killed", "abandoned"]
        assert [lines[i].ended_at for i in ids] == [began, began + 5_000, began + 30_000]
        assert outside.kills == 1


async def test_one_child_is_given_up_and_its_flow_goes_on(deaf: Deaf, clock: ManualClock):
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        stubborn = await launch(flows, flow_id, deaf.child)
        sibling = await launch(flows, flow_id, polite)
        await settle()
        report = asyncio.create_task(flows.cancel_task(stubborn, grace=3600))
        await settle()

        await pass_time(clock, 30)

        assert (await soon(report)).cancelled
        outcome = await soon(flows.wait_task(stubborn))
        assert isinstance(outcome, Cancelled)
        assert outcome.failure.kind == "abandoned"
        assert (await task_of(flows, sibling)).status == "running"
        flow = await flows.get(flow_id)
        assert flow
        assert (flow.revision, flow.cancel_requested_at) == (0, None)
        after = await launch(flows, flow_id, polite)
        await settle()
        assert (await task_of(flows, after)).status == "running"


async def test_an_abandoned_child_makes_room_for_the_next(deaf: Deaf, clock: ManualClock):
    async def passes(ctx: TaskContext, given: Any) -> Any:
        return given

    limits = Limits(kill_after=5, abandon_after=25, running_in_all=1, running_children=1)
    async with staged(deaf, clock=clock, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id, other = await new_flow(flows), await new_flow(flows)
        stubborn = await launch(flows, flow_id, deaf.child)
        waits = [await launch(flows, i, passes, input_json=i) for i in (flow_id, other)]
        await settle()
        cancelling = asyncio.create_task(flows.cancel_task(stubborn, grace=0.05))
        await settle()
        await pass_time(clock, 29)
        assert not (await soon(cancelling)).cancelled
        assert [(await task_of(flows, i)).status for i in waits] == ["queued", "queued"]

        await pass_time(clock, 1)

        assert await soon(flows.wait_task(waits[0])) == Succeeded(flow_id)
        assert await soon(flows.wait_task(waits[1])) == Succeeded(other)


async def test_children_that_a_flow_leaves_behind_when_it_ends_climb_as_well(
    deaf: Deaf, clock: ManualClock
):
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child)
        await settle()
        began = clock.now()

        assert (await soon(flows.finish(flow_id=flow_id, expected_revision=0))).applied
        await pass_time(clock, 30)

        task = await task_of(flows, task_id)
        assert task.failure
        assert (task.status, task.failure.kind) == ("cancelled", "abandoned")
        assert (task.cancel_requested_at, task.kill_requested_at, task.ended_at) == (
            began,
            began + 5_000,
            began + 30_000,
        )
        assert await status(flows, flow_id) == "succeeded"
        assert runtime.statistics().running_children == 0


async def test_asking_again_does_not_begin_the_climb_again(deaf: Deaf, clock: ManualClock):
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child)
        await settle()
        began = clock.now()

        for _ in range(10):
            asking = asyncio.create_task(flows.cancel(flow_id, grace=0.05))
            await settle()
            await pass_time(clock, 3)
            assert (await soon(asking)).code in ("cancel_pending", "abandoned")

        task = await task_of(flows, task_id)
        assert (task.kill_requested_at, task.ended_at) == (began + 5_000, began + 30_000)
        types = await types_of(flows, flow_id)
        assert types.count("task.kill_requested") == types.count("flow.cancel_requested") == 1
        assert "flow.cancel_started" not in types


async def test_a_child_that_fails_while_it_is_stopped_is_not_tried_again(clock: ManualClock):
    tidy, runs = asyncio.Event(), []

    async def fails_late(ctx: TaskContext, given: Any) -> None:
        runs.append(ctx.attempt)
        with anyio.CancelScope(shield=True):
            await tidy.wait()
        raise ConnectionError("on the way out")

    async with running(clock=clock, limits=LIMITS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, fails_late, retry=Retry(max_attempts=9, initial=0.1))
        await settle()
        cancelling = await begin_cancel(flows, flow_id)
        await pass_time(clock, 6)
        tidy.set()

        assert (await soon(cancelling)).cancelled
        await pass_time(clock, 60)
        assert runs == [1]


# ---- a child past its deadline ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["timeout", "idle_timeout"])
async def test_a_child_that_ignores_its_deadline_is_killed_and_given_up_as_timed_out(
    limit: str, deaf: Deaf, clock: ManualClock, caplog: pytest.LogCaptureFixture
):
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child, **{limit: 10})
        await settle()
        began = clock.now()

        await pass_time(clock, 39.9)
        assert (await task_of(flows, task_id)).status == "running"
        await pass_time(clock, 0.1)

        task = await task_of(flows, task_id)
        assert task.failure
        assert (task.status, task.failure.kind) == ("timed_out", "abandoned")
        assert task.ended_at == began + 40_000
        counts = runtime.statistics()
        assert (counts.ignored_stops, counts.abandoned, counts.running_children) == (1, 1, 0)
        flow = await flows.get(flow_id)
        assert flow
        assert flow.ended_at is None
        deaf.let_go.set()
        await settle()
        assert await task_of(flows, task_id) == task
        assert len(said(caplog, "child.ignores_stop")) == 1


async def test_what_a_late_child_has_outside_is_killed_and_it_may_be_tried_again(
    clock: ManualClock,
):
    outside, registry = Outside(), Registry()
    registry.executor(outside)
    registry.task(
        nobody,
        name="outside",
        executor="outside",
        timeout=10,
        retry=Retry(max_attempts=2, initial=1, jitter=0),
    )
    async with running(clock=clock, registry=registry, limits=LIMITS) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), "outside")
        await settle()
        await pass_time(clock, 14.9)
        assert outside.kills == 0

        await pass_time(clock, 0.1)

        assert outside.kills == 1
        task = await task_of(flows, task_id)
        assert (task.status, task.failure and task.failure.kind) == ("queued", "timed_out")
        await pass_time(clock, 1)
        assert [attempt for attempt, _ in outside.calls] == [1, 2]


async def test_a_late_child_that_was_given_up_is_not_tried_again_beside_itself(
    deaf: Deaf, clock: ManualClock
):
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        policy = Retry(max_attempts=9, initial=0.1)
        task_id = await launch(flows, await new_flow(flows), deaf.child, timeout=10, retry=policy)

        await pass_time(clock, 120)

        assert (await task_of(flows, task_id)).status == "timed_out"
        assert deaf.runs == [("None", 1)]


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
async def test_a_late_child_is_given_up_once_although_the_commit_of_its_end_fails(
    trouble: tuple[Exception, bool], deaf: Deaf, clock: ManualClock
):
    error, written = trouble
    store = FaultyStore()
    async with staged(deaf, store, clock=clock, registry=deaf.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "deaf", timeout=10)
        await settle()
        await pass_time(clock, 39.9)
        store.fail_commits(error, written=written)

        await pass_time(clock, 20)

        assert not store._commit_faults, "vacuous: nothing failed"
        assert deaf.runs == [("None", 1)], "a second attempt beside the first"
        task = await task_of(flows, task_id)
        assert task.failure
        assert (task.status, task.failure.kind) == ("timed_out", "abandoned")
        assert (await types_of(flows, flow_id)).count("task.ended") == 1
        assert runtime.statistics().abandoned == 1


async def test_a_late_child_whose_flow_is_cancelled_is_given_up_once(
    deaf: Deaf, clock: ManualClock
):
    async with staged(deaf, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child, timeout=10)
        await pass_time(clock, 20)
        cancelling = await begin_cancel(flows, flow_id)

        await pass_time(clock, 60)

        assert (await soon(cancelling)).code == "abandoned"
        assert await status(flows, flow_id) == "cancelled"
        assert (await task_of(flows, task_id)).ended_at
        assert (await types_of(flows, flow_id)).count("task.ended") == 1
        assert runtime.statistics().abandoned == 1


# ---- a controller -----------------------------------------------------------------------------------


def driven_by(deaf: Deaf) -> Registry:
    @deaf.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await deaf.stay()

    return deaf.registry


async def test_a_controller_that_never_stops_is_given_up_and_its_flow_ends(
    deaf: Deaf, clock: ManualClock, caplog: pytest.LogCaptureFixture
):
    async with staged(deaf, clock=clock, registry=driven_by(deaf)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        began = clock.now()
        cancelling = await begin_cancel(flows, flow_id)

        await pass_time(clock, 29.9)
        assert await status(flows, flow_id) == "running"
        await pass_time(clock, 0.1)

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.ended_at) == ("cancelled", began + 30_000)
        report = await soon(cancelling)
        assert (report.cancelled, report.code, report.flow) == (False, "abandoned", ended)
        assert len(said(caplog, "controller.abandoned")) == 1
        assert runtime.statistics().abandoned == 1
        deaf.let_go.set()
        await settle()
        assert await flows.get(flow_id) == ended
        assert holds_nothing(runtime)


async def test_a_controller_is_stopped_when_the_grace_of_a_request_is_over_and_then_given_up(
    deaf: Deaf, clock: ManualClock
):
    async with staged(deaf, clock=clock, registry=driven_by(deaf)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        began = clock.now()
        await soon(flows.request_cancel(flow_id=flow_id, expected_revision=1))

        await pass_time(clock, 59.9)
        flow = await flows.get(flow_id)
        assert flow
        assert flow.cancel_started_at is None
        await pass_time(clock, 0.1)
        flow = await flows.get(flow_id)
        assert flow
        assert flow.cancel_started_at == began + 60_000
        await pass_time(clock, 29.9)
        assert await status(flows, flow_id) == "running"
        await pass_time(clock, 0.1)

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.ended_at) == ("cancelled", began + 90_000)
        # Created, entered, requested, started, cancelled.
        assert ended.revision == 4
        assert runtime.statistics().abandoned == 1


async def test_an_abandoned_controller_that_comes_back_can_neither_start_nor_change_anything(
    deaf: Deaf, clock: ManualClock
):
    refused: list[str] = []

    @deaf.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await deaf.stay()
        for call in (partial(flow.run, "deaf", "late"), flow.update, flow.finish):
            try:
                await call()
            except RefusedError as error:
                refused.append(type(error).__name__)
        raise ZeroDivisionError("and this is nobody's business any more")

    async with staged(deaf, clock=clock, registry=deaf.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        await begin_cancel(flows, flow_id)
        await pass_time(clock, 30)
        ended = await soon(flows.result(flow_id))
        history = await flows.history(flow_id)

        deaf.let_go.set()
        await settle()

        assert len(refused) == 3
        assert deaf.runs == []
        assert await flows.get(flow_id) == ended
        assert await flows.history(flow_id) == history
        assert holds_nothing(runtime)


async def test_a_deaf_controller_and_its_deaf_child_are_given_up_together(
    deaf: Deaf, clock: ManualClock
):
    @deaf.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await flow.start("deaf")
        await deaf.stay()

    async with staged(deaf, clock=clock, registry=deaf.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        began = clock.now()
        cancelling = await begin_cancel(flows, flow_id)

        await pass_time(clock, 31)

        report = await soon(cancelling)
        assert report.flow
        assert (report.code, report.flow.status) == ("abandoned", "cancelled")
        assert began + 30_000 <= (report.flow.ended_at or 0) <= began + 31_000
        counts = runtime.statistics()
        assert (counts.abandoned, counts.running_children) == (2, 0)


# ---- the disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
@pytest.mark.parametrize("rung", ["cancel", "kill", "abandon"])
async def test_a_commit_that_fails_at_a_rung_holds_up_the_climb_for_a_moment_only(
    rung: str, trouble: tuple[Exception, bool], deaf: Deaf, clock: ManualClock
):
    error, written = trouble
    store = FaultyStore()
    async with staged(deaf, store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, deaf.child)
        await settle()
        began = clock.now()

        async def break_at(this: str) -> None:
            if rung == this:
                store.fail_commits(error, written=written)

        await break_at("cancel")
        await begin_cancel(flows, flow_id)
        if rung == "cancel" and not written:
            await pass_time(clock, 2)
            await begin_cancel(flows, flow_id)
        await pass_time(clock, 4.9)
        await break_at("kill")
        await pass_time(clock, 24.9)
        await break_at("abandon")
        await pass_time(clock, 6)

        assert not store._commit_faults, "vacuous: nothing failed"
        task = await task_of(flows, task_id)
        assert task.failure
        assert (task.status, task.failure.kind) == ("cancelled", "abandoned")
        asked, killed, ended = (task.cancel_requested_at, task.kill_requested_at, task.ended_at)
        assert asked is not None
        assert killed is not None
        assert ended is not None
        assert began <= asked <= began + 2_000
        assert asked + 5_000 <= killed <= asked + 6_100
        assert killed + 25_000 <= ended <= killed + 26_100
        assert await status(flows, flow_id) == "cancelled"
        types = await types_of(flows, flow_id)
        for once in ("task.cancel_requested", "task.kill_requested", "task.ended"):
            assert types.count(once) == 1
        counts = runtime.statistics()
        assert (counts.ignored_stops, counts.abandoned, counts.running_children) == (1, 1, 0)
        deaf.let_go.set()
        await settle()
        assert (await types_of(flows, flow_id)) == types


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
@pytest.mark.parametrize("at", ["stop", "give up"])
async def test_a_commit_that_fails_at_a_rung_of_a_controller_does_not_save_it(
    at: str, trouble: tuple[Exception, bool], deaf: Deaf, clock: ManualClock
):
    error, written = trouble
    store = FaultyStore()
    async with staged(deaf, store, clock=clock, registry=driven_by(deaf)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        await soon(flows.request_cancel(flow_id=flow_id, expected_revision=1))
        await pass_time(clock, 59.9)
        if at == "stop":
            store.fail_commits(error, written=written)
        await pass_time(clock, 29.9)
        if at == "give up":
            store.fail_commits(error, written=written)

        await pass_time(clock, 5)

        assert not store._commit_faults, "vacuous: nothing failed"
        assert await status(flows, flow_id) == "cancelled"
        assert runtime.statistics().abandoned == 1


async def test_a_kill_is_not_carried_out_before_it_is_on_disk(clock: ManualClock):
    outside, registry, store = Outside(), Registry(), FaultyStore()
    registry.executor(outside)
    registry.task(nobody, name="outside", executor="outside")
    async with running(store, clock=clock, registry=registry, limits=LIMITS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, "outside")
        await settle()
        cancelling = await begin_cancel(flows, flow_id)
        await pass_time(clock, 4.9)
        store.hold()

        clock.advance(0.1)
        await store.wait_held()
        await settle()
        assert outside.kills == 0
        store.release()

        assert (await soon(cancelling)).cancelled
        assert outside.kills == 1


# ---- the process ------------------------------------------------------------------------------------


class Outside:
    """An executor whose work lives outside: it hears no cancellation, and ends when it is killed, if it may."""

    name = "outside"
    spec = None

    def __init__(self, *, external: bool = False, dies: bool = True) -> None:
        self.external = external
        self.dies = dies
        self.dead = asyncio.Event()
        self.kills = 0
        self.calls: list[tuple[int, bool]] = []

    async def run(self, call: Call) -> None:
        self.calls.append((call.context.attempt, call.interrupted))
        call.on_kill(self._kill)
        stopped = False
        while not self.dead.is_set():
            try:
                await self.dead.wait()
            except asyncio.CancelledError:
                stopped = True
        if stopped:
            raise asyncio.CancelledError

    def _kill(self) -> None:
        self.kills += 1
        if self.dies:
            self.dead.set()


async def die(tables: MemoryTables, outside: Outside) -> None:
    """Let the process die for the store: whatever its runtime does from here on does not reach the tables."""
    thief = MemoryStore(tables)
    await thief.open(takeover=True)
    await thief.aclose()
    outside.dead.set()
    await settle()


async def climb_to(rung: str, flows: SessionFlows, flow_id: str, clock: ManualClock) -> None:
    """Have the stop of a flow reach a rung, and stay there for two seconds."""
    if rung == "request":
        await soon(flows.request_cancel(flow_id=flow_id, expected_revision=0))
    else:
        await begin_cancel(flows, flow_id)
    await pass_time(clock, {"request": 2, "cancel": 2, "kill": 7}[rung])


@pytest.mark.parametrize("rung", ["request", "cancel", "kill"])
async def test_closing_on_a_rung_leaves_the_code_behind_and_the_next_runtime_ends_the_flow(
    rung: str, deaf: Deaf, clock: ManualClock
):
    tables = MemoryTables()
    store = MemoryStore(tables)
    async with running(store, clock=clock, registry=deaf.registry, limits=LIMITS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "deaf")
        await settle()
        await climb_to(rung, flows, flow_id, clock)
        await soon(runtime.aclose())

        again = running(MemoryStore(tables), clock=clock, registry=deaf.registry, limits=LIMITS)
        async with again as successor:
            flows = flows_of(successor)
            assert (await soon(flows.result(flow_id))).status == "cancelled"
            ended = await task_of(flows, task_id)
            assert (ended.status, deaf.runs) == ("cancelled", [("None", 1)])
            # The code of the closed runtime comes back at last; nobody listens.
            deaf.let_go.set()
            await settle()
            await pass_time(clock, 60)
            assert await task_of(flows, task_id) == ended
            assert (await types_of(flows, flow_id)).count("task.ended") == 1
            assert holds_nothing(successor)


@pytest.mark.parametrize("rung", ["cancel", "kill"])
async def test_the_climb_of_what_lives_outside_goes_on_from_the_rung_on_record(
    rung: str, clock: ManualClock
):
    tables = MemoryTables()

    def registry_with(outside: Outside) -> Registry:
        registry = Registry()
        registry.executor(outside)
        registry.task(nobody, name="outside", executor="outside")
        return registry

    first, second = Outside(external=True, dies=False), Outside(external=True, dies=False)
    began = 0
    async with running(
        MemoryStore(tables), clock=clock, registry=registry_with(first), limits=LIMITS
    ) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "outside")
        await settle()
        began = clock.now()
        await climb_to(rung, flows, flow_id, clock)
        await die(tables, first)

    async with running(
        MemoryStore(tables), clock=clock, registry=registry_with(second), limits=LIMITS
    ) as runtime:
        flows = flows_of(runtime)
        opened = clock.now()
        await settle()
        # The same attempt, taken over to be stopped.
        assert second.calls == [(1, True)]
        assert second.kills == (rung == "kill")
        assert await status(flows, flow_id) == "queued"

        # The last rung begins anew: whoever has taken over has not had the time of it yet.
        killed = opened if rung == "kill" else began + 5_000
        await pass_time(clock, killed / 1000 + 24.9 - clock.now() / 1000)
        assert (await task_of(flows, task_id)).status == "running"
        await pass_time(clock, 0.1)

        task = await task_of(flows, task_id)
        assert task.failure
        assert (task.kill_requested_at, task.ended_at) == (killed, killed + 25_000)
        assert (task.failure.kind, await status(flows, flow_id)) == ("abandoned", "cancelled")
        assert runtime.statistics().abandoned == 1
        second.dead.set()
        await settle()
        assert (await types_of(flows, flow_id)).count("task.ended") == 1


async def test_a_rung_that_came_due_while_nothing_ran_is_climbed_at_opening(clock: ManualClock):
    tables = MemoryTables()
    outsides = [Outside(external=True, dies=False) for _ in range(3)]

    def run_with(outside: Outside) -> Any:
        registry = Registry()
        registry.executor(outside)
        registry.task(nobody, name="outside", executor="outside")
        return running(MemoryStore(tables), clock=clock, registry=registry, limits=LIMITS)

    async with run_with(outsides[0]) as runtime:
        flow_id = await new_flow(flows_of(runtime))
        task_id = await launch(flows_of(runtime), flow_id, "outside")
        await settle()
        await begin_cancel(flows_of(runtime), flow_id)
        await die(tables, outsides[0])
    clock.advance(100)
    opened = clock.now()
    async with run_with(outsides[1]) as runtime:
        await settle()
        # Killed by force first, however long it is ago that it was asked.
        task = await task_of(flows_of(runtime), task_id)
        assert (task.status, task.kill_requested_at) == ("running", opened)
        assert outsides[1].kills >= 1
        await die(tables, outsides[1])
    clock.advance(100)
    async with run_with(outsides[2]) as runtime:
        await settle()
        task = await task_of(flows_of(runtime), task_id)
        assert (task.status, task.kill_requested_at) == ("running", clock.now())
        assert outsides[2].kills >= 1

        await pass_time(clock, 25)

        task = await task_of(flows_of(runtime), task_id)
        assert task.failure
        assert (task.failure.kind, task.ended_at) == ("abandoned", clock.now())
        assert await status(flows_of(runtime), flow_id) == "cancelled"
        outsides[2].dead.set()
        await settle()


async def test_after_a_restart_an_ended_stop_stays_ended(deaf: Deaf, clock: ManualClock):
    tables = MemoryTables()
    async with staged(deaf, MemoryStore(tables), clock=clock, registry=deaf.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, "deaf")
        await settle()
        await begin_cancel(flows, flow_id)
        await pass_time(clock, 30)
        assert await status(flows, flow_id) == "cancelled"
        deaf.let_go.set()
        await settle()

    store = FaultyStore(tables=tables)
    async with staged(deaf, store, clock=clock, registry=deaf.registry) as runtime:
        await pass_time(clock, 100)

        assert deaf.runs == [("None", 1)]
        assert store.attempts == 0
        report = await soon(flows_of(runtime).cancel(flow_id))
        assert report.code == "terminal"
