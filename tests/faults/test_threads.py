"""Functions in threads, which nothing can stop but themselves: what they are told, and what is told of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import anyio.from_thread
import anyio.to_thread
import pytest

from flowstead import Limits, Registry, Succeeded, TaskContext, open_runtime
from flowstead.executors import SyncContext
from flowstead.testing import ManualClock
from tests.faults.support import Stage, ends_of, launch, listening, stage, task_of
from tests.faulty_store import flows_of, new_flow, running, settle, soon, until
from tests.invariants import check_all

LIMITS = Limits(kill_after=5, abandon_after=25, shutdown_grace=0.01)
PATIENCE = 60.0


class Thread:
    """A function that does nothing in its thread until it is let go."""

    def __init__(self, it: Stage | None = None) -> None:
        self.began, self.let_go = threading.Event(), threading.Event()
        self.ended = 0
        if it is not None:
            it.undo.append(self.let_go.set)

    def __call__(self, ctx: SyncContext, given: object) -> str:
        self.began.set()
        assert self.let_go.wait(PATIENCE)
        self.ended += 1
        return "let go"

    async def begun(self, it: Stage | None = None) -> None:
        await until(self.began.is_set)
        if it is not None:
            it.fire()


# ---- looking ---------------------------------------------------------------------------------------

LOOKS: dict[str, Callable[[SyncContext], object]] = {
    "check_cancelled": lambda ctx: ctx.check_cancelled(),
    "progress": lambda ctx: ctx.progress("still here"),
    "heartbeat": lambda ctx: ctx.heartbeat(),
    "cancel_requested": lambda ctx: stop() if ctx.cancel_requested else None,
}


def stop() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("look", LOOKS)
async def test_a_function_in_a_thread_that_looks_is_stopped_by_its_first_look(
    clock: ManualClock, look: str
):
    async with stage(clock=clock) as it:
        thread, looked = Thread(it), list[str]()

        def works(ctx: SyncContext, given: object) -> str:
            thread(ctx, given)
            looked.append("first")
            LOOKS[look](ctx)
            looked.append("second")
            return "worked on"

        task_id = await it.launch(works)
        await thread.begun(it)

        cancelling = asyncio.create_task(it.flows.cancel_task(task_id))
        # Asked, and asked a second time: it looks between two of those moments.
        await settle()
        thread.let_go.set()

        assert (await soon(cancelling)).cancelled
        assert looked == ["first"]
        assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]
        await it.check_others()


@pytest.mark.xfail(strict=True, reason="the gate hides the cancellation from threads")
async def test_a_thread_of_a_child_in_the_loop_that_looks_is_stopped_by_its_first_look(
    clock: ManualClock,
):
    async with stage(clock=clock) as it:
        began, look = threading.Event(), threading.Event()
        it.undo.append(look.set)

        def works() -> None:
            began.set()
            assert look.wait(PATIENCE)
            anyio.from_thread.check_cancelled()

        async def child(ctx: TaskContext, given: object) -> str:
            await anyio.to_thread.run_sync(works)
            return "worked on"

        task_id = await it.launch(child)
        await until(began.is_set)
        it.fire()

        cancelling = asyncio.create_task(it.flows.cancel_task(task_id))
        await settle()
        look.set()

        assert (await soon(cancelling)).cancelled
        await it.check_others()


# ---- not looking -----------------------------------------------------------------------------------


async def test_a_thread_that_cannot_be_stopped_is_called_that_is_given_up_and_its_end_is_dropped(
    clock: ManualClock,
):
    with listening() as heard:
        async with stage(clock=clock, limits=LIMITS) as it:
            thread = Thread(it)
            task_id = await it.launch(thread)
            await thread.begun(it)

            asked = asyncio.create_task(it.flows.cancel(it.flow_id, grace=1))
            to_the_end = asyncio.create_task(it.flows.cancel(it.flow_id, grace=1000))
            await settle()
            clock.advance(1)
            pending = await soon(asked)
            clock.advance(LIMITS.kill_after)
            await settle()
            clock.advance(LIMITS.abandon_after)
            report = await soon(to_the_end)

            [line] = [line for line in pending.descendants if line.task_id == task_id]
            assert (pending.code, line.state) == ("cancel_pending", "running")
            assert line.why
            assert "thread" in line.why
            [line] = [line for line in report.descendants if line.task_id == task_id]
            assert (report.code, line.state, line.status) == ("abandoned", "abandoned", "cancelled")
            assert thread.ended == 0, "vacuous: it has ended by itself"
            assert it.runtime.statistics().abandoned == 1
            await it.check_others(is_flow_cancelled=True)

            thread.let_go.set()
            await until(lambda: thread.ended)
            await until(lambda: any("end.too_late" in line for line in heard))
            task = await task_of(it.flows, task_id)
            assert (task.status, task.result_json) == ("cancelled", None)
            assert await ends_of(it.flows, it.flow_id, task_id) == ["cancelled"]


async def test_a_runtime_closes_although_a_thread_does_not_end_and_the_late_result_is_nobodys(
    db: Path,
):
    registry, thread, attempts = Registry(), Thread(), list[int]()

    @registry.task
    def stubborn(ctx: SyncContext, given: object) -> str:
        attempts.append(ctx.attempt)
        return thread(ctx, given) if len(attempts) == 1 else "second"

    first = open_runtime(db, registry=registry, limits=LIMITS)
    try:
        async with first:
            flow_id = await new_flow(flows_of(first))
            task_id = await launch(flows_of(first), flow_id, stubborn)
            await thread.begun()

            await soon(first.aclose())

        assert thread.ended == 0, "vacuous: it has ended by itself"
        async with running(db, registry=registry) as second:
            flows = flows_of(second)
            assert await soon(flows.wait_task(task_id)) == Succeeded("second")

            thread.let_go.set()
            await until(lambda: thread.ended)
            await until(lambda: f"flowstead child {task_id}" not in names_of_tasks())

            assert (await task_of(flows, task_id)).result_json == "second"
            assert await ends_of(flows, flow_id, task_id) == ["succeeded"]
    finally:
        thread.let_go.set()
    assert attempts == [1, 2]
    check_all(db)


def names_of_tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks()}


HOST = """
import asyncio, sys, threading
from flowstead import Limits, open_runtime

def never(ctx, given):
    print("began", flush=True)
    over.wait()

async def main():
    async with open_runtime(":memory:", limits=Limits(shutdown_grace=0.01)) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="owner")
        flow = await flows.create_managed(controller_id="nobody", goal="g")
        await flows.run_task(flow_id=flow.flow_id, task="t", run=never)
        await asyncio.to_thread(sys.stdin.readline)

over = threading.Event()
asyncio.run(main())
print("over", flush=True)
"""


@pytest.mark.crash
def test_a_process_can_end_although_a_thread_of_a_child_does_not():
    host = subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert host.stdin
        assert host.stdout
        assert host.stdout.readline() == "began\n"
        host.stdin.write("close\n")
        host.stdin.flush()

        assert host.wait(timeout=PATIENCE / 4) == 0
        assert host.stdout.read() == "over\n"
    finally:
        host.kill()
        host.communicate()
