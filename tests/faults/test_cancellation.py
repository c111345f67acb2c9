"""Children that resist being stopped, hide, stop themselves or wait for themselves, and ends that come at once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead import (
    CancelReport,
    FlowContext,
    Limits,
    Registry,
    Retry,
    Settlement,
    Succeeded,
    TaskContext,
    TimedOut,
    open_runtime,
)
from flowstead.testing import ManualClock
from tests.faults.support import (
    Stage,
    ends_of,
    launch,
    listening,
    passes,
    stage,
    task_of,
    types_of,
)
from tests.faulty_store import flows_of, new_flow, running, settle, soon, turns, until
from tests.invariants import check_all

GRACE = 5.0
LIMITS = Limits(kill_after=5, abandon_after=25)


def lines_of(report: CancelReport, task_id: str) -> list[Settlement]:
    """The lines of a report about one child; one if all is well."""
    return [line for line in report.descendants if line.task_id == task_id]


async def cancel_at_once(it: Stage, clock: ManualClock) -> CancelReport:
    """Cancel the suffering flow with hardly any patience."""
    cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=0.1))
    await settle()
    clock.advance(0.1)
    return await soon(cancelling)


async def cancel_out_of_patience(it: Stage, clock: ManualClock) -> CancelReport:
    """Cancel the suffering flow, and let the patience for it run out."""
    cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=GRACE))
    await turns()
    assert not cancelling.done()
    clock.advance(GRACE)
    return await soon(cancelling)


# ---- swallowing ------------------------------------------------------------------------------------


class Swallower:
    """A child that swallows its cancellation: so many times, or until it is let go."""

    def __init__(self, it: Stage, times: int | None) -> None:
        self.it = it
        self.times = times
        self.swallowed = 0
        self.let_go = asyncio.Event()
        it.undo.append(self.let_go.set)

    async def __call__(self, ctx: TaskContext, given: object) -> str:
        while not self.let_go.is_set() and self.swallowed != self.times:
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self.swallowed += 1
                self.it.fire()
        return "had its way"


async def climb(clock: ManualClock, seconds: float) -> None:
    """Let so much time pass, a tenth of a second at a time, and let the loop come to rest each time."""
    for _ in range(round(seconds * 10)):
        clock.advance(0.1)
        await settle()


async def test_a_child_that_swallows_its_cancellation_for_ever_is_told_of_once_and_given_up_in_the_end(
    clock: ManualClock,
):
    patience = LIMITS.kill_after + LIMITS.abandon_after
    with listening() as heard:
        async with stage(clock=clock, limits=LIMITS) as it:
            child = Swallower(it, None)
            task_id = await it.launch(child)
            await settle()

            cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=2 * patience))
            await settle()
            await climb(clock, patience - 0.2)
            pending = await cancel_at_once(it, clock)
            await climb(clock, 0.1)
            report = await soon(cancelling)

            assert (pending.cancelled, pending.code) == (False, "cancel_pending")
            [line] = lines_of(pending, task_id)
            assert (line.state, line.status) == ("running", "running")
            assert line.why
            assert (report.cancelled, report.code) == (False, "abandoned")
            [line] = lines_of(report, task_id)
            assert (line.state, line.status) == ("abandoned", "cancelled")
            assert line.asked_at
            assert line.killed_at == line.asked_at + LIMITS.kill_after * 1000
            assert line.ended_at == line.asked_at + patience * 1000
            assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]
            statistics = it.runtime.statistics()
            assert (statistics.ignored_stops, statistics.abandoned) == (1, 1)
            assert statistics.running_children == 1, "the other flow's bystander"
            await it.check_others(is_flow_cancelled=True)

            assert not child.let_go.is_set(), "vacuous: it had been let go"
            child.let_go.set()
            await settle()
            assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]

    told = [line for line in heard if task_id in line]
    for event in ("child.ignores_stop", "child.abandoned", "end.too_late", "cancel.pending"):
        assert len([line for line in told if event in line]) == 1, event
    assert len(told) == 4


async def test_a_child_that_swallows_its_cancellation_for_ever_costs_a_few_steps_and_not_a_core(
    clock: ManualClock,
):
    async with stage(clock=clock, limits=LIMITS) as it:
        child = Swallower(it, None)
        task_id = await it.launch(child)
        await settle()

        cancelling = asyncio.create_task(it.flows.cancel_task(task_id, grace=1000))
        # Each time the loop comes to rest, although the child goes on.
        await settle()
        at_once = child.swallowed
        await climb(clock, LIMITS.kill_after + LIMITS.abandon_after)
        await soon(cancelling)

        assert 1 <= at_once <= 10
        assert 3 * at_once <= child.swallowed <= 1000
        await it.check_others()


async def test_a_child_that_was_given_up_is_asked_no_more(clock: ManualClock):
    async with stage(clock=clock, limits=LIMITS) as it:
        child = Swallower(it, None)
        task_id = await it.launch(child)
        await settle()
        cancelling = asyncio.create_task(it.flows.cancel_task(task_id, grace=1000))
        await settle()
        await climb(clock, LIMITS.kill_after + LIMITS.abandon_after)
        await soon(cancelling)

        before = child.swallowed
        await climb(clock, 20)

        assert child.swallowed == before
        await it.check_others()


async def test_without_the_runtime_such_a_child_does_cost_a_core() -> None:
    let_go, swallowed = asyncio.Event(), 0

    async def swallows() -> None:
        nonlocal swallowed
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                swallowed += 1

    async with anyio.create_task_group() as group:
        group.start_soon(swallows)
        await settle()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await turns(1000)
        let_go.set()

    assert swallowed > 300


async def test_a_child_given_up_after_a_cancel_of_its_own_leaves_its_flow_and_siblings_unharmed(
    clock: ManualClock,
):
    async with stage(clock=clock, limits=LIMITS) as it:
        task_id = await it.launch(Swallower(it, None))
        await settle()

        cancelling = asyncio.create_task(it.flows.cancel_task(task_id, grace=1000))
        await settle()
        await climb(clock, LIMITS.kill_after + LIMITS.abandon_after)

        report = await soon(cancelling)
        assert report.task
        assert report.task.failure
        assert (report.task.status, report.task.failure.kind) == ("cancelled", "abandoned")
        assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]
        await it.check_others()


async def test_a_child_that_swallows_its_cancellation_three_times_ends_once_it_gives_in(
    clock: ManualClock,
):
    with listening() as heard:
        async with stage(clock=clock) as it:
            child = Swallower(it, 3)
            task_id = await it.launch(child)
            await settle()

            report = await soon(it.flows.cancel(it.flow_id))

            assert child.swallowed == 3
            assert report.cancelled
            [line] = lines_of(report, task_id)
            assert (line.state, line.status, line.killed_at) == ("settled", "succeeded", None)
            assert it.runtime.statistics().ignored_stops == 0
            assert await ends_of(it.flows, it.flow_id, task_id) == ["succeeded"]
            types = await types_of(it.flows, it.flow_id)
            assert types.count("flow.cancelled") == types.count("flow.cancel_requested") == 1
            await it.check_others(is_flow_cancelled=True)

    assert not [line for line in heard if task_id in line]


async def test_a_child_that_swallows_more_often_than_it_is_told_at_once_ends_when_it_is_told_again(
    clock: ManualClock,
):
    async with stage(clock=clock) as it:
        child = Swallower(it, 20)
        task_id = await it.launch(child)
        await settle()

        cancelling = asyncio.create_task(it.flows.cancel(it.flow_id))
        await settle()
        assert child.swallowed < 20
        await climb(clock, 1)

        assert (await soon(cancelling)).cancelled
        assert child.swallowed == 20
        assert await ends_of(it.flows, it.flow_id, task_id) == ["succeeded"]
        await it.check_others(is_flow_cancelled=True)


async def test_a_child_past_its_deadline_that_swallows_its_cancellation_times_out_when_it_ends(
    clock: ManualClock,
):
    async with stage(clock=clock) as it:
        child = Swallower(it, None)
        task_id = await it.launch(child, timeout=2)
        await settle()

        clock.advance(2)
        await turns()
        assert await ends_of(it.flows, it.flow_id, task_id) == []
        child.let_go.set()

        assert isinstance(await soon(it.flows.wait_task(task_id)), TimedOut)
        assert await ends_of(it.flows, it.flow_id, task_id) == ["timed_out"]
        await it.check_others()


@pytest.mark.parametrize("deadline", ["timeout", "idle_timeout"])
async def test_a_child_past_its_deadline_that_will_not_stop_is_given_up_as_timed_out(
    clock: ManualClock, deadline: str
):
    async with stage(clock=clock, limits=LIMITS) as it:
        task_id = await it.launch(
            Swallower(it, None), **{deadline: 2}, retry=Retry(max_attempts=3, initial=1, jitter=0)
        )
        await settle()

        await climb(clock, 2 + LIMITS.kill_after + LIMITS.abandon_after + 5)

        # Once, although the policy leaves attempts: its code may still run.
        assert await ends_of(it.flows, it.flow_id, task_id) == ["timed_out"]
        task = await task_of(it.flows, task_id)
        assert task.attempt == 1
        assert it.runtime.statistics().abandoned == 1
        await it.check_others()


async def test_a_result_that_arrives_after_its_runtime_was_closed_is_dropped_and_run_again(
    db: Path,
):
    registry, attempts, results = Registry(), [], []
    held, let_go = asyncio.Event(), asyncio.Event()

    @registry.task
    async def stubborn(ctx: TaskContext, given: object) -> str:
        attempts.append(ctx.attempt)
        if len(attempts) > 1:
            return "second"
        held.set()
        with anyio.CancelScope(shield=True):
            await let_go.wait()
        results.append("late")
        return "late"

    limits, before = Limits(shutdown_grace=0.001), asyncio.all_tasks()
    async with open_runtime(db, registry=registry, limits=limits) as first:
        flow_id = await new_flow(flows_of(first))
        task_id = await launch(flows_of(first), flow_id, stubborn)
        await soon(held.wait())
    async with running(db, registry=registry) as second:
        flows = flows_of(second)
        assert await soon(flows.wait_task(task_id)) == Succeeded("second")

        let_go.set()
        await soon(asyncio.wait(asyncio.all_tasks() - before - flowstead_tasks()))

        assert results == ["late"], "vacuous: there was no late result"
        assert (await task_of(flows, task_id)).result_json == "second"
        assert await ends_of(flows, flow_id, task_id) == ["succeeded"]
    check_all(db)


def flowstead_tasks() -> set[asyncio.Task[Any]]:
    """The tasks of an open runtime, and this one."""
    mine = {asyncio.current_task()}
    return {t for t in asyncio.all_tasks() if t in mine or t.get_name().startswith("flowstead")}


# ---- hiding ----------------------------------------------------------------------------------------


class Den:
    """Where a child hides from being stopped, and whether its work still goes on there."""

    def __init__(self, it: Stage) -> None:
        it.undo.append(self.open)
        self.go = asyncio.Event()
        self.thread_go = threading.Event()
        self.working = 0
        self.worked = 0

    async def shielded_scope(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._work()

    async def shielded_task(self) -> None:
        await asyncio.shield(asyncio.create_task(self._work()))

    async def anyio_thread(self) -> None:
        await anyio.to_thread.run_sync(self._work_in_thread)

    async def asyncio_thread(self) -> None:
        await asyncio.to_thread(self._work_in_thread)

    async def executor(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._work_in_thread)

    async def _work(self) -> None:
        self.working += 1
        await self.go.wait()
        self.working -= 1
        self.worked += 1

    def _work_in_thread(self) -> None:
        self.working += 1
        self.thread_go.wait()
        self.working -= 1
        self.worked += 1

    def open(self) -> None:
        """Let the work come to its end."""
        self.go.set()
        self.thread_go.set()


@pytest.mark.parametrize("hiding", ["shielded_scope", "anyio_thread"])
async def test_a_child_that_hides_from_its_cancellation_leaves_the_cancel_pending(
    clock: ManualClock, hiding: str
):
    async with stage(clock=clock) as it:
        den = Den(it)

        async def hides(ctx: TaskContext, given: object) -> None:
            await getattr(den, hiding)()

        task_id = await it.launch(hides)
        await until(lambda: den.working)
        it.fire()

        report = await cancel_out_of_patience(it, clock)

        assert (report.cancelled, report.code) == (False, "cancel_pending")
        assert [task.task_id for task in report.tasks] == [task_id]
        assert den.working
        await it.check_others(is_flow_cancelled=True)

        den.open()
        assert (await soon(it.flows.result(it.flow_id))).status == "cancelled"
        assert den.worked == 1
        assert len(await ends_of(it.flows, it.flow_id, task_id)) == 1


@pytest.mark.parametrize("hiding", ["shielded_scope", "anyio_thread"])
async def test_a_child_that_hides_and_does_not_come_out_is_given_up_in_the_end_undisturbed(
    clock: ManualClock, hiding: str
):
    async with stage(clock=clock, limits=LIMITS) as it:
        den = Den(it)

        async def hides(ctx: TaskContext, given: object) -> None:
            await getattr(den, hiding)()

        task_id = await it.launch(hides)
        await until(lambda: den.working)
        it.fire()

        cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=1000))
        await settle()
        await climb(clock, LIMITS.kill_after + LIMITS.abandon_after)
        report = await soon(cancelling)

        assert report.code == "abandoned"
        [line] = lines_of(report, task_id)
        assert (line.state, line.status) == ("abandoned", "cancelled")
        assert (den.working, den.worked) == (1, 0), "what it has shielded is broken into"
        await it.check_others(is_flow_cancelled=True)

        den.open()
        await until(lambda: den.worked)
        await settle()
        assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]


@pytest.mark.parametrize("hiding", ["shielded_task", "asyncio_thread", "executor"])
async def test_work_a_child_hides_behind_its_back_has_no_second_end_and_harms_nobody(hiding: str):
    async with stage() as it:
        den = Den(it)

        async def hides(ctx: TaskContext, given: object) -> None:
            await getattr(den, hiding)()

        task_id = await it.launch(hides)
        await until(lambda: den.working)
        it.fire()

        assert (await soon(it.flows.cancel_task(task_id))).cancelled
        await it.check_others()
        den.open()
        await until(lambda: den.worked)
        await settle()

        assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]


@pytest.mark.parametrize("hiding", ["shielded_task", "asyncio_thread", "executor"])
async def test_work_behind_asyncios_back_is_out_of_sight_as_the_report_says(
    clock: ManualClock, hiding: str
):
    async with stage(clock=clock) as it:
        den = Den(it)

        async def hides(ctx: TaskContext, given: object) -> None:
            await getattr(den, hiding)()

        await it.launch(hides)
        await until(lambda: den.working)
        it.fire()
        cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=GRACE))
        await turns()
        clock.advance(GRACE)
        report, working = await soon(cancelling), den.working
        den.open()
        await until(lambda: den.worked)

    assert report.cancelled
    assert working
    assert CancelReport.__doc__ is not None
    assert "asyncio.shield" in CancelReport.__doc__


# ---- stopping and waiting for oneself --------------------------------------------------------------


async def cancels_its_flow(it: Stage, ctx: TaskContext) -> None:
    await it.flows.cancel(ctx.flow_id)


async def cancels_its_flow_out_of_a_shield(it: Stage, ctx: TaskContext) -> None:
    with anyio.CancelScope(shield=True):
        report = await it.flows.cancel(ctx.flow_id, grace=GRACE)
    it.fire(str(report.code))


async def cancels_its_flow_from_a_task_of_its_own(it: Stage, ctx: TaskContext) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(it.flows.cancel, ctx.flow_id)


async def cancels_its_flow_and_works_on(it: Stage, ctx: TaskContext) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await it.flows.cancel(ctx.flow_id)
    await ctx.progress("still here")


SELF_CANCELS = [
    cancels_its_flow,
    cancels_its_flow_out_of_a_shield,
    cancels_its_flow_from_a_task_of_its_own,
    cancels_its_flow_and_works_on,
]


@pytest.mark.parametrize("cancels", SELF_CANCELS, ids=lambda f: f.__name__)
async def test_a_child_that_cancels_its_own_flow_is_stopped_at_its_next_await_without_a_deadlock(
    clock: ManualClock, cancels: Callable[[Stage, TaskContext], Awaitable[None]]
):
    async with stage(clock=clock) as it:

        async def child(ctx: TaskContext, given: object) -> None:
            it.fire("began")
            await cancels(it, ctx)
            await anyio.sleep_forever()

        task_id = await it.launch(child)
        await turns()
        await settle()
        clock.advance(GRACE)

        assert (await soon(it.flows.result(it.flow_id))).status == "cancelled"
        assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]
        if cancels is cancels_its_flow_out_of_a_shield:
            assert it.fired == ["began", "cancel_pending"]
        await it.check_others(is_flow_cancelled=True)


async def test_a_child_that_cancels_itself_ends_as_cancelled_and_its_flow_goes_on():
    async with stage() as it:

        async def child(ctx: TaskContext, given: object) -> None:
            it.fire()
            await it.flows.cancel_task(ctx.task_id)
            await anyio.sleep_forever()

        task_id = await it.launch(child)

        await soon(it.flows.wait_task(task_id))
        assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]
        await it.check_others()


async def test_a_step_that_cancels_the_flow_of_the_controller_that_waits_for_it_ends_both():
    registry, seen = Registry(), []

    @registry.controller("parent")
    async def parent(flow: FlowContext) -> None:
        try:
            await flow.run(child, name="child")
        except asyncio.CancelledError:
            seen.append("controller stopped")
            raise

    async def child(ctx: TaskContext, given: object) -> None:
        seen.append("child began")
        await flows_of(it.runtime).cancel(ctx.flow_id)

    async with stage(registry=registry) as it:
        flow_id = await new_flow(it.flows, "parent")

        assert (await soon(it.flows.result(flow_id))).status == "cancelled"
        it.fired += seen
        assert seen == ["child began", "controller stopped"]
        [task] = await it.flows.list_tasks(flow_id)
        assert await ends_of(it.flows, flow_id, task.task_id) == ["cancelled"]
        await it.check_others()


@pytest.mark.parametrize("awaited", ["its flow", "itself"])
@pytest.mark.parametrize("way_out", ["its deadline", "a cancel"])
async def test_a_child_that_waits_for_its_own_end_is_freed_by_its_deadline_or_a_cancel(
    clock: ManualClock, awaited: str, way_out: str
):
    async with stage(clock=clock) as it:

        async def child(ctx: TaskContext, given: object) -> None:
            it.fire()
            if awaited == "itself":
                await it.flows.wait_task(ctx.task_id)
            else:
                await it.flows.result(ctx.flow_id)

        task_id = await it.launch(child, timeout=10)
        await settle()
        if way_out == "a cancel":
            assert (await soon(it.flows.cancel_task(task_id))).cancelled
        clock.advance(10)

        await soon(it.flows.wait_task(task_id))
        wanted = "timed_out" if way_out == "its deadline" else "cancelled"
        assert await ends_of(it.flows, it.flow_id, task_id) == [wanted]
        await it.check_others()


async def test_children_that_wait_for_each_other_time_out_each_once(clock: ManualClock):
    async with stage(clock=clock) as it:
        met, ids = asyncio.Event(), list[str]()

        async def child(ctx: TaskContext, given: int) -> None:
            await met.wait()
            it.fire()
            await it.flows.wait_task(ids[1 - given])

        for n in range(2):
            ids.append(await it.launch(child, input_json=n, timeout=10))
        met.set()
        await settle()
        clock.advance(10)

        for task_id in ids:
            await soon(it.flows.wait_task(task_id))
        ends = [await ends_of(it.flows, it.flow_id, task_id) for task_id in ids]
        assert ends == [["timed_out"], ["timed_out"]]
        await it.check_others()


async def test_a_controller_that_waits_for_its_own_flow_is_freed_by_a_cancel():
    registry = Registry()

    @registry.controller("selfish")
    async def selfish(flow: FlowContext) -> None:
        it.fire()
        await it.flows.result(flow.flow_id)

    async with stage(registry=registry) as it:
        flow_id = await new_flow(it.flows, "selfish")
        await settle()

        assert (await soon(it.flows.cancel(flow_id))).cancelled
        assert (await types_of(it.flows, flow_id)).count("flow.cancelled") == 1
        await it.check_others()


# ---- several ends at once --------------------------------------------------------------------------

ROUNDS = 24


@pytest.mark.parametrize("rival", ["timeout", "idle_timeout", "cancel_task", "cancel", "finish"])
async def test_of_a_completion_and_another_end_at_the_same_moment_exactly_one_is_recorded(
    clock: ManualClock, rival: str
):
    ends: Counter[str] = Counter()
    async with stage(clock=clock) as it:
        for lead in range(-ROUNDS, ROUNDS):
            flow_id, go = await new_flow(it.flows, status="running"), asyncio.Event()

            async def child(ctx: TaskContext, given: object, go: asyncio.Event = go) -> str:
                await go.wait()
                return "completed"

            deadline = {rival: 10} if rival.endswith("timeout") else {}
            task_id = await launch(it.flows, flow_id, child, **deadline)
            await settle()

            async def end(flow_id: str = flow_id, task_id: str = task_id) -> None:
                match rival:
                    case "timeout" | "idle_timeout":
                        clock.advance(10)
                    case "cancel_task":
                        await it.flows.cancel_task(task_id)
                    case "cancel":
                        await it.flows.cancel(flow_id)
                    case _:
                        await it.flows.finish(flow_id=flow_id, expected_revision=0)

            # The completion is ahead of its rival by so many rounds of the loop, or behind it.
            if lead >= 0:
                go.set()
                await turns(lead)
            ending = asyncio.create_task(end())
            if lead < 0:
                await turns(-lead)
                go.set()
            await soon(ending)
            await soon(it.flows.wait_task(task_id))
            await settle()

            [once] = await ends_of(it.flows, flow_id, task_id)
            stored = await task_of(it.flows, task_id)
            assert stored.status == once
            assert stored.result_json == ("completed" if once == "succeeded" else None)
            ends[once] += 1
        it.fire()
        assert set(ends) == {
            "succeeded",
            "timed_out" if rival.endswith("timeout") else "cancelled",
        }
        await it.check_others()


async def test_of_a_start_and_the_deadline_in_the_queue_at_the_same_moment_only_one_comes_about(
    clock: ManualClock,
):
    ends: Counter[str] = Counter()
    async with stage(clock=clock, limits=Limits(running_children=1)) as it:
        for lead in range(-ROUNDS, ROUNDS):
            flow_id, go = await new_flow(it.flows, status="running"), asyncio.Event()
            begun: list[int] = []

            async def holds(ctx: TaskContext, given: object, go: asyncio.Event = go) -> None:
                await go.wait()

            async def child(ctx: TaskContext, given: object, begun: list[int] = begun) -> str:
                begun.append(ctx.attempt)
                return "completed"

            await launch(it.flows, flow_id, holds)
            task_id = await launch(it.flows, flow_id, child, queue_timeout=10)
            await settle()

            # The slot comes free so many rounds of the loop before it is too late, or after.
            if lead >= 0:
                go.set()
                await turns(lead)
            clock.advance(10)
            if lead < 0:
                await turns(-lead)
                go.set()
            await soon(it.flows.wait_task(task_id))
            await settle()

            [once] = await ends_of(it.flows, flow_id, task_id)
            task = await task_of(it.flows, task_id)
            if once == "timed_out":
                assert task.failure
                assert (task.failure.code, begun) == ("queue", [])
            else:
                assert (once, begun) == ("succeeded", [1])
            ends[once] += 1
        it.fire()
        assert set(ends) == {"succeeded", "timed_out"}
        await it.check_others()


@pytest.mark.parametrize("before", ["cancel", "timed_out"])
async def test_a_result_that_arrives_after_another_end_is_answered_with_that_end_and_changes_nothing(
    before: str,
):
    async with stage() as it:
        flow_id = await new_flow(it.flows)
        made = await it.flows.run_task(flow_id=flow_id, task="t", runtime="acp", status="running")
        task_id = made.unwrap().task_id
        if before == "cancel":
            assert (await soon(it.flows.cancel(flow_id))).cancelled
        else:
            await it.flows.fail_task(task_id, error="too slow", status="timed_out")
        ended = await task_of(it.flows, task_id)
        history = await types_of(it.flows, flow_id)

        late = [
            await it.flows.complete_task(task_id, result_json="late"),
            await it.flows.fail_task(task_id, error="later still"),
            await it.flows.progress_task(task_id, summary="latest"),
            await it.flows.start_task(task_id),
        ]

        it.fire()
        assert late == [ended] * 4
        assert await types_of(it.flows, flow_id) == history
        assert await task_of(it.flows, task_id) == ended
        await it.check_others()


async def test_an_end_that_came_too_late_is_logged():
    with listening() as heard:
        async with stage() as it:
            made = await it.flows.run_task(
                flow_id=it.flow_id, task="t", runtime="acp", status="running"
            )
            task_id = made.unwrap().task_id
            await it.flows.fail_task(task_id, error="too slow", status="timed_out")
            await it.flows.complete_task(task_id, result_json="late")
            it.fire()

    assert [line for line in heard if task_id in line]


async def test_a_repeated_result_of_a_child_that_runs_here_is_refused_and_its_own_counts():
    async with stage() as it:
        task_id = await it.launch(passes, input_json="its own")
        assert await soon(it.flows.wait_task(task_id)) == Succeeded("its own")

        late = await it.flows.complete_task(task_id, result_json="somebody else's")

        it.fire()
        assert late
        assert late.result_json == "its own"
        assert await ends_of(it.flows, it.flow_id, task_id) == ["succeeded"]
        await it.check_others()
