"""A disk that fails below SQLite, seen from above the door: what a caller is told is what the file says, for good.

A disk that says "synced" and lies costs nothing as long as the power stays on; that it cannot be survived when the
power goes is shown where power is cut, in tests/disk.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flowstead import (
    CommitFailed,
    Registry,
    Runtime,
    SessionFlows,
    SnapshotUnreadable,
    StoreError,
    StoreUnusable,
    Succeeded,
    TaskContext,
)
from flowstead.store import sqlite
from flowstead.store.sqlite import SqliteStore
from flowstead.testing import ManualClock
from tests import invariants
from tests.crash.harness import Zygote
from tests.disk.vfs import Disk
from tests.faults.support import ends_of, launch, types_of
from tests.faulty_store import flows_of, new_flow, running, soon, until

CROWD = 12
PAGE = 4096


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as disk:
        yield disk


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@asynccontextmanager
async def on(disk: Disk, db: Path, **options: Any) -> AsyncIterator[Runtime]:
    """A runtime on this disk; it must close clean, and leave a file that holds every invariant."""
    async with running(SqliteStore(db, connect=disk.connect), **options) as runtime:
        yield runtime
        disk.heal()
    invariants.check_all(db)


async def change(flows: SessionFlows, ids: list[str], revision: int, word: str) -> list[Any]:
    """Change all these flows at once."""
    calls = [
        flows.update(flow_id=each, expected_revision=revision, current_step=word) for each in ids
    ]
    return [await soon(call) for call in [asyncio.ensure_future(call) for call in calls]]


def codes(answers: list[Any]) -> Counter[str]:
    return Counter(str(answer.code) for answer in answers)


async def revisions(flows: SessionFlows) -> list[int]:
    """What a reader sees, oldest first."""
    return [flow.revision for flow in reversed(await soon(flows.list()))]


# ---- full -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 4])
async def test_on_a_full_disk_everybody_is_refused_reads_go_on_and_space_heals_it(
    disk: Disk, db: Path, after: int
) -> None:
    async with on(disk, db) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows) for _ in range(CROWD)]
        fault = disk.fail("write", "wal", code="ENOSPC", after=after)

        refused = await change(flows, ids, 0, "no room")
        with pytest.raises(CommitFailed, match="full"):
            await new_flow(flows)
        during = await revisions(flows)
        disk.heal()
        applied = await change(flows, ids, 0, "room")

        assert fault.fired > 0
        assert codes(refused)["persist_failed"] >= CROWD - 1
        assert {answer.code for answer in refused} <= {None, "persist_failed"}
        told = [int(answer.applied) for answer in refused]
        assert during == told
        assert [answer.applied for answer in applied] == [not each for each in told]
        assert await revisions(flows) == [1] * CROWD
        assert all("full" in answer.reason for answer in refused if answer.code == "persist_failed")


async def test_a_child_that_ends_on_a_full_disk_is_recorded_once_there_is_room(
    disk: Disk, db: Path, clock: ManualClock
) -> None:
    go = asyncio.Event()
    returned = asyncio.Event()

    async def works(ctx: TaskContext, given: Any) -> str:
        await go.wait()
        returned.set()
        return "done"

    async with on(disk, db, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, works)
        fault = disk.fail("write", "wal", code="ENOSPC")
        go.set()
        await soon(returned.wait())
        await until(lambda: runtime.statistics().failed_writes)
        task = await flows.get_task(task_id)
        assert task is not None and task.status == "running"

        disk.heal()
        ended = asyncio.create_task(flows.wait_task(task_id))
        await _while_time_passes(clock, ended)

        assert fault.fired > 0
        assert ended.result() == Succeeded("done")
        assert await ends_of(flows, flow_id, task_id) == ["succeeded"]


async def _while_time_passes(clock: ManualClock, task: asyncio.Task[Any]) -> None:
    def passes() -> bool:
        clock.advance(1.0)
        return task.done()

    await until(passes)


@pytest.mark.parametrize("kind", ["write", "sync", "truncate"])
@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
async def test_a_checkpoint_that_fails_costs_nobody_an_answer(
    disk: Disk, db: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, code: str
) -> None:
    monkeypatch.setattr(sqlite, "_WAL_IDLE", 1)
    monkeypatch.setattr(sqlite, "_WAL_BUSY", 1)
    monkeypatch.setattr(sqlite, "_WAL_KEPT", 0)
    async with on(disk, db) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows) for _ in range(CROWD)]
        role: Any = "wal" if kind == "truncate" else "db"
        fault = disk.fail(kind, role, code=code)

        answers = [
            answer for lap in range(4) for answer in await change(flows, ids, lap, f"lap {lap}")
        ]

        assert fault.fired > 0
        assert codes(answers) == {"None": 4 * CROWD}
        assert await revisions(flows) == [4] * CROWD
        disk.heal()
        written = disk.count("write", "db")
        assert codes(await change(flows, ids, 4, "after")) == {"None": CROWD}
        await until(lambda: disk.count("write", "db") > written)


# ---- failing at a write or a sync, with death right after -----------------------------------------

NO_OR_YES = {"None", "persist_failed"}
ANY = NO_OR_YES | {"outcome_unknown"}
FAILING: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "a sync fails": ({"kind": "sync", "at": 1}, 1, NO_OR_YES),
    "a sync fails after it was done": ({"kind": "sync", "at": 1, "done": True}, 1, NO_OR_YES),
    "a sync fails and others follow": ({"kind": "sync", "at": 1}, 3, NO_OR_YES),
    "a sync and the one that settles it fail": ({"kind": "sync", "times": 2}, 1, ANY),
    "no sync works any more": ({"kind": "sync"}, 1, ANY),
    "no sync works any more, time after time": ({"kind": "sync"}, 3, ANY),
    "a sync lies": ({"kind": "sync", "lie": True}, 3, {"None"}),
    "a write fails": ({"kind": "write", "at": 1}, 1, NO_OR_YES),
    "a later write fails": ({"kind": "write", "at": 4}, 3, NO_OR_YES),
    "a write fails after it was done": ({"kind": "write", "at": 2, "done": True}, 1, NO_OR_YES),
    "a write is torn in its header": ({"kind": "write", "at": 1, "torn": 7}, 1, NO_OR_YES),
    "a write is torn in its page": ({"kind": "write", "at": 2, "torn": 1000}, 1, NO_OR_YES),
    "no write works any more": ({"kind": "write"}, 3, ANY),
    "the disk is full after a write": ({"kind": "write", "after": 1, "code": "ENOSPC"}, 3, ANY),
}


@pytest.mark.crash
@pytest.mark.parametrize("name", FAILING)
def test_killed_right_after_an_answer_the_file_says_the_same(
    zygote: Zygote, db: Path, tmp_path: Path, name: str
) -> None:
    fault, laps, allowed = FAILING[name]
    child = zygote.fork(
        "answer_on_a_failing_disk",
        tmp_path / "journal",
        path=str(db),
        fault={"file": "wal", **fault},
        laps=laps,
    )
    assert child.wait() == -9, child.facts()
    answers = [fact for fact in child.facts() if "lap" in fact]
    [fired] = [fact["fired"] for fact in child.facts() if "fired" in fact]
    assert fired > 0, "vacuous: the disk did not fail"
    assert len(answers) == laps * 6
    assert {str(answer["code"]) for answer in answers} <= allowed

    for look in ("right after", "after another runtime"):
        laps = _laps(invariants.check_all(db))
        for answer in answers:
            is_there = answer["lap"] in laps[answer["flow"]]
            if answer["code"] != "outcome_unknown":
                assert is_there == (answer["code"] is None), (look, answer, laps)
        if look == "right after":
            first = laps
            again = zygote.fork("try_open", tmp_path / "again", path=str(db))
            assert again.wait() == 0, again.facts()
    assert laps == first, "what was unknown has changed from one look to the next"


def _laps(file: invariants.File) -> dict[str, list[int]]:
    """Which changes each flow's history tells of."""
    return {
        flow.row["flow_id"]: [
            event["changed"]["stateJson"]["lap"]
            for event in flow.events
            if event["type"] == "flow.updated"
        ]
        for flow in file.flows.values()
    }


# ---- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["db", "wal"])
@pytest.mark.parametrize("code", ["EMFILE", "EACCES"])
async def test_a_file_that_cannot_be_opened_refuses_the_start_and_the_next_one_works(
    disk: Disk, db: Path, file: Any, code: str
) -> None:
    fault = disk.fail("open", file, code=code)

    with pytest.raises(StoreUnusable):
        async with running(SqliteStore(db, connect=disk.connect)):
            pass

    assert fault.fired > 0
    disk.heal()
    async with on(disk, db) as runtime:
        await new_flow(flows_of(runtime))


async def test_a_writer_that_cannot_be_opened_anew_says_so_and_comes_back_by_itself(
    disk: Disk, db: Path
) -> None:
    async with on(disk, db) as runtime:
        flows = flows_of(runtime)
        [flow_id] = ids = [await new_flow(flows)]
        sync = disk.fail("sync", "wal", at=1)
        opened = disk.fail("open", "db", code="EMFILE")

        unknown = await change(flows, ids, 0, "maybe")
        refused = await change(flows, ids, 0, "not now")
        disk.heal()
        found = await soon(flows.get(flow_id))
        assert found is not None
        after = await change(flows, ids, found.revision, "now")

        assert sync.fired == 1
        assert opened.fired > 1
        assert codes(unknown) == {"outcome_unknown": 1}
        assert codes(refused) in ({"persist_failed": 1}, {"revision_conflict": 1})
        assert codes(after) == {"None": 1}
        expected = ["flow.created", *["flow.updated"] * (found.revision + 1)]
        assert await types_of(flows, flow_id) == expected


# ---- reading --------------------------------------------------------------------------------------


async def _furnish(db: Path, count: int = 8) -> list[str]:
    """A closed file with flows, one to a page, so that each has to be read."""
    async with running(db) as runtime:
        flows = flows_of(runtime)
        return [
            await new_flow(
                flows, flow_id=f"flow-{number}", state_json={"mark": f"mark-{number}" * 500}
            )
            for number in range(count)
        ]


async def _reads_to_open(db: Path) -> int:
    """How many pages are read until a store is open."""
    with Disk() as disk:
        store = SqliteStore(db, connect=disk.connect)
        await store.open()
        count = disk.count("read", "db")
        await store.aclose()
    return count


async def test_a_read_that_fails_while_opening_refuses_the_start_and_changes_no_row(
    db: Path,
) -> None:
    await _furnish(db, count=2)
    before, struck = invariants.dump(db), 0

    for number in range(1, await _reads_to_open(db) + 1):
        with Disk() as disk:
            fault = disk.fail("read", "db", at=number)
            try:
                async with running(SqliteStore(db, connect=disk.connect)) as runtime:
                    # Reads at the edge of the file are tried for size only, and may fail for nothing.
                    assert len(await soon(flows_of(runtime).list())) == 2
            except StoreUnusable:
                struck += fault.fired
        assert invariants.dump(db) == before

    assert struck > 1
    invariants.check_all(db)


async def test_a_read_that_fails_is_raised_and_neither_invents_nor_loses_a_flow(
    disk: Disk, db: Path
) -> None:
    ids = await _furnish(db)
    async with on(disk, db) as runtime:
        flows = flows_of(runtime)
        fault = disk.fail("read", "any")

        for call in (
            lambda: flows.get(ids[0]),
            lambda: flows.list(),
            lambda: flows.history(ids[1]),
            lambda: flows.update(flow_id=ids[2], expected_revision=0, current_step="no"),
            lambda: flows.cancel(ids[3], grace=1.0),
        ):
            with pytest.raises(StoreUnusable):
                await soon(call())
        disk.heal()

        assert fault.fired >= 5
        assert await revisions(flows) == [0] * len(ids)
        assert codes(await change(flows, ids, 0, "yes")) == {"None": len(ids)}


async def test_recovery_on_a_disk_that_cannot_be_read_starts_nothing_by_halves(
    db: Path, clock: ManualClock
) -> None:
    starts: list[str] = []
    go = asyncio.Event()
    registry = Registry()

    @registry.task
    async def works(ctx: TaskContext, given: Any) -> str:
        starts.append(f"{ctx.flow_id} {ctx.attempt}")
        await go.wait()
        return "done"

    ids = await _furnish(db)
    async with running(db, registry=registry) as runtime:
        children = [await launch(flows_of(runtime), each, works) for each in ids]
        await until(lambda: len(starts) == len(ids))
    starts.clear()
    before = invariants.dump(db)

    opening = await _reads_to_open(db)
    with Disk() as disk:
        fault = disk.fail("read", "db", after=opening)
        async with on(disk, db, registry=registry, clock=clock) as runtime:
            await until(lambda: fault.fired)
            with pytest.raises(StoreUnusable):
                await soon(flows_of(runtime).list())
            blind = list(starts)

            disk.heal()
            await _until_while_time_passes(clock, lambda: len(starts) >= len(ids))
            go.set()
            outcomes = [await soon(flows_of(runtime).wait_task(each)) for each in children]

            assert blind == []
            assert sorted(starts) == [f"{each} 1" for each in ids]
            assert outcomes == [Succeeded("done")] * len(ids)
    assert len(invariants.dump(db)["flows"]) == len(before["flows"])


async def _until_while_time_passes(clock: ManualClock, condition: Any) -> None:
    def passes() -> bool:
        clock.advance(1.0)
        return bool(condition())

    await until(passes)


@pytest.mark.parametrize("number", range(8))
async def test_a_bit_that_turns_over_in_a_read_record_is_found_and_its_row_named(
    db: Path, number: int
) -> None:
    ids = await _furnish(db)
    victim, content = ids[number], db.read_bytes()  # noqa: ASYNC240
    at = content.index(f"mark-{number}".encode() * 20) + 100
    page, inside = divmod(at, PAGE)

    async def look(disk: Disk) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        async with running(SqliteStore(db, connect=disk.connect)) as runtime:
            for each in ids:
                try:
                    seen[each] = await soon(flows_of(runtime).get(each))
                except StoreError as error:
                    seen[each] = error
        return seen

    with Disk() as disk:
        whole = await look(disk)
        reads = [each for each in disk.operations if (each.kind, each.file) == ("read", "db")]
        which = max(i for i, each in enumerate(reads, 1) if each.offset == page * PAGE)
    with Disk() as disk:
        fault = disk.fail("read", "db", at=which, flip=inside * 8 + number)
        seen = await look(disk)

    assert fault.fired == 1
    assert isinstance(seen[victim], SnapshotUnreadable), seen[victim]
    assert victim in str(seen[victim])
    assert {each: seen[each] for each in ids if each != victim} == {
        each: whole[each] for each in ids if each != victim
    }
    with Disk() as disk:
        assert await look(disk) == whole
    invariants.check_all(db)
