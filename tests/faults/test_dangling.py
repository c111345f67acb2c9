"""Rows that point at nothing: what a start makes of them, once and by its rules, and that it is then stable.

The rows are cut out of a closed file between two runtimes, and the file is told that it never had them: what is
left is whole to the last checksum, and still makes no sense.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flowstead import Registry, Retry, Runtime, Succeeded, Task, TaskContext
from flowstead.testing import ManualClock
from tests.faults.support import ends_of, launch, passes, types_of
from tests.faulty_store import flows_of, new_flow, running, settle, soon
from tests.invariants import dump


def cut(path: Path, statement: str, *values: object) -> int:
    """Take rows out of a closed file, with its counts, and answer how many went."""
    with closing(sqlite3.connect(path)) as connection, connection:
        gone = connection.execute(statement, values).rowcount
        told = {row[1] for row in connection.execute("PRAGMA table_info(ownership)")}
        for table in {"flows", "tasks", "events"} & told:
            connection.execute(f"UPDATE ownership SET {table} = (SELECT count(*) FROM {table})")
    assert gone, "vacuous: nothing was cut"
    return gone


def registry() -> Registry:
    """A task that does its work, and one that is never through with it."""
    registry = Registry()

    async def never(ctx: TaskContext, given: object) -> None:
        await asyncio.Event().wait()

    async def fails(ctx: TaskContext, given: object) -> None:
        raise ValueError("not today")

    registry.task(passes, name="passes")
    registry.task(never, name="never")
    registry.task(fails, name="fails", retry=Retry(max_attempts=9, initial=60.0, jitter=0))
    return registry


async def link(runtime: Runtime, flow_id: str) -> Task:
    made = await flows_of(runtime).run_task(
        flow_id=flow_id, task="t", runtime="acp", status="running"
    )
    return made.unwrap()


async def settled_dump(path: Path, **options: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The rows a runtime leaves behind that was opened, left alone and closed."""
    async with running(path, registry=registry(), **options) as runtime:
        await flows_of(runtime).list()
        await settle()
    return dump(path)


async def test_children_and_history_of_a_flow_that_is_gone_are_nobodys_and_harm_nobody(
    db: Path, clock: ManualClock
):
    async with running(db, registry=registry(), clock=clock) as runtime:
        flows = flows_of(runtime)
        gone, kept = await new_flow(flows), await new_flow(flows)
        orphans = [await launch(flows, gone, run) for run in ("never", "fails")]
        orphans.append((await link(runtime, gone)).task_id)
        whole = await link(runtime, kept)
        await settle()
    cut(db, "DELETE FROM flows WHERE flow_id = ?", gone)
    before = dump(db)

    async with running(db, registry=registry(), clock=clock) as runtime:
        flows = flows_of(runtime)
        # The retry of an orphan falls due, and nobody starts it.
        clock.advance(3600)
        await settle()
        assert runtime.statistics().running_children == 0
        assert await flows.get(gone) is None
        assert await flows.list_tasks(gone) == []
        assert await flows.history(gone) == []
        for orphan in orphans:
            assert await flows.get_task(orphan) is None
            assert await flows.complete_task(orphan) is None
            assert not (await flows.cancel_task(orphan)).found
        refused = await flows.update(flow_id=gone, expected_revision=0)
        assert refused.code == "not_found"
        assert [flow.flow_id for flow in await flows.list()] == [kept]
        assert not runtime.statistics().commits
    assert dump(db) == before

    async with running(db, registry=registry(), clock=clock) as runtime:
        done = await soon(flows_of(runtime).complete_task(whole.task_id))
        assert done
        assert done.status == "succeeded"


async def test_operators_are_told_of_children_without_a_flow(db: Path):
    async with running(db) as runtime:
        gone = await new_flow(flows_of(runtime))
        orphan = (await link(runtime, gone)).task_id
    cut(db, "DELETE FROM flows WHERE flow_id = ?", gone)

    async with running(db) as runtime:
        told = await runtime.admin.list_unreadable()

    assert orphan in repr(told)


@pytest.mark.parametrize("missing", ["never was", "is gone"])
async def test_a_flow_blocked_on_a_task_that_is_not_there_stays_blocked_until_it_is_resumed(
    db: Path, missing: str
):
    async with running(db, registry=registry()) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "nobody")
        task = await link(runtime, flow_id)
        blocker = task.task_id if missing == "is gone" else "no-such-task"
        blocked = await flows.set_waiting(
            flow_id=flow_id, expected_revision=0, blocked_task_id=blocker, blocked_summary="stuck"
        )
        assert blocked.applied
    if missing == "is gone":
        cut(db, "DELETE FROM tasks WHERE task_id = ?", blocker)
    before = dump(db)

    assert await settled_dump(db) == before

    async with running(db, registry=registry()) as runtime:
        flows = flows_of(runtime)
        flow = await flows.get(flow_id)
        assert flow
        assert (flow.status, flow.blocked_task_id) == ("blocked", blocker)
        resumed = await soon(flows.resume(flow_id=flow_id, expected_revision=1, status="running"))
        assert resumed.applied
        assert (resumed.flow.status, resumed.flow.blocked_task_id) == ("running", None)
        assert (await soon(flows.finish(flow_id=flow_id, expected_revision=2))).applied
        assert "task.ended" not in await types_of(flows, flow_id)


async def crash_image(runtime: Runtime, db: Path, image: Path) -> None:
    """The file as a kill at this moment would leave it; nothing is being written meanwhile."""
    await settle()
    for beside in ("", "-wal"):
        shutil.copy(f"{db}{beside}", f"{image}{beside}")


CUT_OFF: dict[str, tuple[str | None, list[str], int]] = {
    # what runs: the function, the ends recorded by the next start, its attempts
    "a child that may run again": ("passes_late", ["succeeded"], 2),
    "a child that must not": ("passes_once", ["lost"], 1),
    "a child nobody here can run": ("unknown", [], 1),
    "a linked child": (None, [], 0),
}


@pytest.mark.parametrize(("function", "ends", "attempt"), CUT_OFF.values(), ids=list(CUT_OFF))
async def test_a_running_row_without_a_live_attempt_is_reconciled_once_and_then_stable(
    db: Path, tmp_path: Path, function: str | None, ends: list[str], attempt: int
):
    image = tmp_path / "image" / "flows.db"
    image.parent.mkdir(mode=0o700)
    first = Registry()

    async def waits(ctx: TaskContext, given: object) -> None:
        await asyncio.Event().wait()

    for name in ("passes_late", "passes_once", "unknown"):
        first.task(waits, name=name, idempotent=name != "passes_once")
    async with running(db, registry=first) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        if function is None:
            task_id = (await link(runtime, flow_id)).task_id
        else:
            task_id = await launch(flows, flow_id, function)
        await crash_image(runtime, db, image)

    def second() -> Registry:
        again = Registry()
        for name in ("passes_late", "passes_once"):
            again.task(passes, name=name)
        return again

    async with running(image, registry=second()) as runtime:
        flows = flows_of(runtime)
        if ends:
            await soon(flows.wait_task(task_id))
        task = await flows.get_task(task_id)
        assert task
        assert (task.status, task.attempt) == (ends[0] if ends else "running", attempt)
        assert await ends_of(flows, flow_id, task_id) == ends
    after = dump(image)

    for _ in range(2):
        async with running(image, registry=second()) as runtime:
            await flows_of(runtime).list()
            await settle()
        assert dump(image) == after


Break = Callable[[Path], int]
BREAKS: dict[str, Break] = {
    "every child is gone": lambda path: cut(path, "DELETE FROM tasks"),
    "every flow is gone": lambda path: cut(path, "DELETE FROM flows"),
    "a child belongs to no flow": lambda path: cut(
        path, "DELETE FROM flows WHERE key = (SELECT max(flow_key) FROM tasks)"
    ),
}


@pytest.mark.parametrize("break_it", BREAKS.values(), ids=list(BREAKS))
async def test_whatever_points_at_nothing_a_runtime_opens_takes_new_work_and_is_stable(
    db: Path, break_it: Break
):
    async with running(db, registry=registry()) as runtime:
        flows = flows_of(runtime)
        for _ in range(3):
            flow_id = await new_flow(flows)
            await launch(flows, flow_id, "never")
            await link(runtime, flow_id)
        await settle()
    break_it(db)

    async with running(db, registry=registry()) as runtime:
        flows = flows_of(runtime)
        await settle()
        fresh = await new_flow(flows)
        task_id = await launch(flows, fresh, "passes", input_json=1)
        assert await soon(flows.wait_task(task_id)) == Succeeded(1)
        assert (await soon(flows.finish(flow_id=fresh, expected_revision=0))).applied
        for flow in await flows.list(status=("queued", "running")):
            assert (await soon(flows.cancel(flow.flow_id))).cancelled
    after = dump(db)

    assert await settled_dump(db) == after
