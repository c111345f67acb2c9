"""Programs as children that do what they should not: nothing of them is left, and what was in the way is told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import psutil
import pytest

from flowstead import Command, Limits, open_runtime
from flowstead.testing import ManualClock
from tests.faults.support import Stage, ends_of, launch, listening, stage
from tests.faulty_store import flows_of, new_flow, settle, soon
from tests.invariants import check_all

LIMITS = Limits(kill_after=5, abandon_after=25)
PATIENCE = 60.0

FAMILY = """
import os, signal, sys
begun, not_begun = os.pipe()
if os.fork() == 0:
    os.execvp("sleep", ["sleep", "601"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "602"])
    os._exit(0)
os.close(not_begun)
os.read(begun, 1)
"""
"""Leaves one in its group, and one in a session of its own whose parent is gone; both run by now."""

IGNORES_SIGTERM = Command(["sh", "-c", 'trap "" TERM; exec sleep 600'])


def alive(task_id: str) -> list[psutil.Process]:
    """The processes that carry the child's mark, whoever their parent is."""
    return [process for process in psutil.process_iter() if _is_of(process, task_id)]


def _is_of(process: psutil.Process, task_id: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.environ().get("FLOWSTEAD_TASK_ID") == task_id
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def sleeping(task_id: str) -> list[psutil.Process]:
    return [process for process in alive(task_id) if process.name() == "sleep"]


async def until_so(is_so: Callable[[], object]) -> None:
    """Wait for another process to get there."""
    with anyio.fail_after(PATIENCE):
        while not is_so():  # noqa: ASYNC110 - another process gives no event
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    """Whatever a test that fails has left is not there for the next one."""
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=PATIENCE)


# ---- leaving something -----------------------------------------------------------------------------

LEFT: dict[str, tuple[str, str, int]] = {
    # how its leader ends: the code that does it, the child's end, how many are left that have to be killed
    "returns": ("print('done')", "succeeded", 2),
    "fails": ("sys.exit(3)", "failed", 2),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "failed", 2),
    # The one in its group is asked to end as well.
    "is cancelled": ("signal.pause()", "cancelled", 1),
}


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere who leaves the group is out of reach"
)
@pytest.mark.parametrize(("code", "wanted", "killed"), LEFT.values(), ids=list(LEFT))
async def test_of_a_program_that_leaves_processes_behind_none_is_left_in_its_group_or_out_of_it(
    db: Path, code: str, wanted: str, killed: int
):
    with listening() as heard:
        async with stage(db) as it:
            task_id = await it.launch(Command([sys.executable, "-S", "-c", FAMILY + code]))
            if wanted == "cancelled":
                await until_so(lambda: len(sleeping(task_id)) == 2)
                assert (await soon(it.flows.cancel_task(task_id), PATIENCE)).cancelled
            await soon(it.flows.wait_task(task_id), PATIENCE)

            it.fire()
            assert alive(task_id) == []
            assert await ends_of(it.flows, it.flow_id, task_id) == [wanted]
            await it.check_others()

    [told] = [line for line in heard if task_id in line and "command.leftovers" in line]
    assert told.startswith("WARNING")
    assert f"'count': {killed}" in told, told


# ---- not stopping ----------------------------------------------------------------------------------


async def stubborn(it: Stage, **given: float) -> str:
    """A program that does not end when it is asked to."""
    task_id = await it.launch(IGNORES_SIGTERM, **given)
    await until_so(lambda: sleeping(task_id))
    it.fire()
    return task_id


async def test_a_program_that_ignores_sigterm_is_killed_and_the_report_says_so(
    clock: ManualClock,
):
    async with stage(clock=clock, limits=LIMITS) as it:
        task_id = await stubborn(it)

        cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=1000))
        await settle()
        clock.advance(LIMITS.kill_after - 0.1)
        await settle()
        assert len(alive(task_id)) == 1, "vacuous: it has ended when it was asked to"
        clock.advance(0.1)
        report = await soon(cancelling, PATIENCE)

        assert alive(task_id) == []
        assert (report.cancelled, report.code) == (True, None)
        [line] = [line for line in report.descendants if line.task_id == task_id]
        assert (line.state, line.status) == ("killed", "cancelled")
        assert line.asked_at
        assert line.killed_at == line.asked_at + LIMITS.kill_after * 1000
        assert it.runtime.statistics().abandoned == 0
        await it.check_others(is_flow_cancelled=True)


@pytest.mark.parametrize("deadline", ["timeout", "idle_timeout"])
async def test_a_program_past_its_deadline_that_ignores_sigterm_is_killed(
    clock: ManualClock, deadline: str
):
    async with stage(clock=clock, limits=LIMITS) as it:
        task_id = await stubborn(it, **{deadline: 2})
        it.undo.append(lambda: [process.kill() for process in alive(task_id)])

        for seconds in (2, LIMITS.kill_after):
            clock.advance(seconds)
            await settle()

        await soon(it.flows.wait_task(task_id))
        assert alive(task_id) == []
        assert await ends_of(it.flows, it.flow_id, task_id) == ["timed_out"]
        await it.check_others()


async def test_a_program_that_ignores_sigterm_is_killed_by_the_closing(db: Path):
    limits = Limits(shutdown_grace=0.2)
    async with open_runtime(db, limits=limits) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), IGNORES_SIGTERM)
        await until_so(lambda: sleeping(task_id))

    left = alive(task_id)
    for process in left:
        process.kill()
    await until_so(lambda: f"flowstead child {task_id}" not in names_of_tasks())
    assert left == []
    [task] = check_all(db).tasks
    assert task.doc["status"] in ("queued", "lost")


def names_of_tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks()}
