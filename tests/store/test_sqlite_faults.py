# ruff: noqa: ASYNC240 - a test may wait for a file
"""A SQLite store on a disk that fails: what the caller is told is what the file says, then and later."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from pathlib import Path

import anyio.lowlevel
import anyio.to_thread
import pytest
from msgspec import Raw
from msgspec.structs import replace

from flowstead.errors import (
    CommitFailed,
    OutcomeUnknown,
    StoreError,
    StoreInUse,
    StoreUnusable,
    WriteConflict,
)
from flowstead.model.flow import FlowKey
from flowstead.store.port import EVERYONE, FlowQuery
from flowstead.store.sqlite import SqliteStore
from tests.store.disk import Disk, TendedStore, disk_error
from tests.store.rows import changes, creates, flow_of, put

pytestmark = pytest.mark.usefixtures("stores_end")

AT_COMMIT = {
    "fsync": disk_error(sqlite3.SQLITE_IOERR_FSYNC),
    "write": disk_error(sqlite3.SQLITE_IOERR_WRITE),
    "full": disk_error(sqlite3.SQLITE_FULL, "database or disk is full"),
    "busy": disk_error(sqlite3.SQLITE_BUSY, "database is locked"),
    "corrupt": sqlite3.DatabaseError("database disk image is malformed"),
}
at_commit = pytest.mark.parametrize("error", AT_COMMIT.values(), ids=AT_COMMIT.keys())


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
async def store(db: Path, disk: Disk) -> AsyncIterator[SqliteStore]:
    store = TendedStore(db, durability="normal", connect=disk.connect)
    await store.open()
    await put(store, "before")
    yield store
    disk.heal()
    await store.aclose()


async def flow_ids(store: SqliteStore) -> list[str]:
    return [flow.flow_id for flow in await store.list_flows(EVERYONE, FlowQuery(), 100)]


async def positions(store: SqliteStore) -> list[int]:
    return [event.position for event in await store.events_after(EVERYONE, 0, 100)]


async def reopened(store: SqliteStore, db: Path) -> list[str]:
    """What a new runtime finds."""
    await store.aclose()
    again = TendedStore(db)
    await again.open()
    found = await flow_ids(again)
    await again.aclose()
    return found


# ---- at COMMIT --------------------------------------------------------------------------------------


@at_commit
async def test_a_commit_that_failed_and_is_not_there_is_told_as_failed(
    store: SqliteStore, disk: Disk, db: Path, error: sqlite3.Error
) -> None:
    fault = disk.fail("COMMIT", error)

    with pytest.raises(CommitFailed) as failed:
        await put(store, "lost")

    assert fault.fired == 1
    assert not isinstance(failed.value, WriteConflict)
    assert await flow_ids(store) == ["before"]
    await put(store, "after")
    assert await positions(store) == [1, 2]
    assert await reopened(store, db) == ["after", "before"]


# A disk that is full fails before the commit is there.
@pytest.mark.parametrize("error", [e for name, e in AT_COMMIT.items() if name != "full"], ids=str)
async def test_a_commit_that_failed_but_is_there_is_told_as_applied(
    store: SqliteStore, disk: Disk, db: Path, error: sqlite3.Error
) -> None:
    fault = disk.fail("COMMIT", error, done=True)
    writes = [creates(flow_of(store.next_key(), name), seqs=[1, 2]) for name in ("a", "b")]

    first = await store.commit(writes)

    assert fault.fired == 1
    assert first == 2
    assert await flow_ids(store) == ["b", "a", "before"]
    await put(store, "after")
    assert await positions(store) == [1, 2, 3, 4, 5, 6]
    assert await reopened(store, db) == ["after", "b", "a", "before"]


@pytest.mark.parametrize("done", [False, True], ids=["not there", "there"])
async def test_a_commit_nobody_can_ask_about_is_told_as_unknown_and_the_store_heals(
    store: SqliteStore, disk: Disk, db: Path, done: bool
) -> None:
    disk.fail("COMMIT", done=done)
    disk.fail("connect", times=float("inf"))
    with pytest.raises(OutcomeUnknown):
        await put(store, "maybe")
    with pytest.raises(CommitFailed):
        await put(store, "meanwhile")
    expected = ["maybe", "before"] if done else ["before"]
    assert await flow_ids(store) == expected

    disk.heal()
    await put(store, "after")

    expected = ["after", *expected]
    assert await flow_ids(store) == expected
    assert await positions(store) == list(range(1, len(expected) + 1))
    assert await reopened(store, db) == expected


@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE ownership SET holder", "COMMIT"])
async def test_an_answer_that_could_not_be_nailed_down_is_unknown(
    store: SqliteStore, disk: Disk, statement: str
) -> None:
    gate = disk.hold("COMMIT")
    commit = asyncio.create_task(put(store, "maybe"))
    await gate.reached()
    disk.fail("COMMIT")
    nail = disk.fail(statement, times=1)
    gate.open()

    with pytest.raises(OutcomeUnknown):
        await commit

    assert nail.fired == 1
    disk.heal()
    await put(store, "after")
    assert await flow_ids(store) == ["after", "before"]


async def test_the_answer_is_nailed_down_before_it_is_given(store: SqliteStore, disk: Disk) -> None:
    disk.fail("COMMIT")
    committed = disk.ran("COMMIT")

    with pytest.raises(CommitFailed):
        await put(store, "lost")

    assert disk.ran("UPDATE ownership SET holder = CASE") == 1
    assert disk.ran("COMMIT") == committed + 2
    assert len(disk.writers) == 2


async def test_the_writer_that_failed_is_closed_and_the_new_one_is_set_up_alike(
    store: SqliteStore, disk: Disk
) -> None:
    disk.fail("COMMIT")
    with pytest.raises(CommitFailed):
        await put(store, "lost")

    old, fresh = disk.writers
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        old.execute("SELECT 1")
    assert fresh.execute("PRAGMA synchronous").fetchone() == (1,)
    assert fresh.execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)


async def test_an_owner_overtaken_while_its_commit_was_unclear_steps_down(
    store: SqliteStore, disk: Disk, db: Path
) -> None:
    disk.fail("COMMIT")
    gate = disk.hold("connect")
    commit = asyncio.create_task(put(store, "lost"))
    await gate.reached()
    second = TendedStore(db)
    await second.open(takeover=True)
    gate.open()

    with pytest.raises(StoreInUse):
        await commit
    with pytest.raises(StoreInUse):
        await put(store, "later")

    assert await flow_ids(second) == ["before"]
    await second.aclose()


async def test_a_file_that_vanished_is_not_started_anew(
    store: SqliteStore, disk: Disk, db: Path
) -> None:
    disk.fail("COMMIT")
    gate = disk.hold("connect")
    commit = asyncio.create_task(put(store, "lost"))
    await gate.reached()
    for path in db.parent.glob("flows.db*"):
        path.rename(path.with_name("moved-" + path.name))
    gate.open()

    with pytest.raises(StoreError):
        await commit

    assert not db.exists()


# ---- before COMMIT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE ownership", "INSERT INTO flows"])
@pytest.mark.parametrize(
    "code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE]
)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
async def test_an_error_in_the_midst_of_a_batch_leaves_nothing_behind(
    store: SqliteStore, disk: Disk, db: Path, statement: str, code: int, done: bool
) -> None:
    fault = disk.fail(statement, disk_error(code, "an error"), done=done)

    with pytest.raises(CommitFailed):
        await put(store, "lost")

    assert fault.fired == 1
    assert not any(writer.in_transaction for writer in disk.writers)
    await put(store, "after")
    assert await positions(store) == [1, 2]
    assert await reopened(store, db) == ["after", "before"]


async def test_an_error_at_the_last_row_takes_the_first_ones_back(
    store: SqliteStore, disk: Disk
) -> None:
    flow = await put(store, "flow")
    disk.fail("INSERT INTO events", done=True)

    with pytest.raises(CommitFailed):
        await store.commit(
            [
                creates(flow_of(store.next_key(), "new")),
                changes(replace(flow, revision=2), seqs=[2]),
            ]
        )

    assert await flow_ids(store) == ["flow", "before"]
    await store.commit([changes(replace(flow, revision=2), seqs=[2])])


async def test_a_writer_that_cannot_even_roll_back_does_not_spoil_the_next_batch(
    store: SqliteStore, disk: Disk, db: Path
) -> None:
    disk.fail("INSERT INTO flows")
    disk.fail("ROLLBACK")
    with pytest.raises(CommitFailed):
        await put(store, "lost")

    await put(store, "after")

    assert await reopened(store, db) == ["after", "before"]


async def test_an_error_that_is_not_the_disks_leaves_no_transaction_open(
    store: SqliteStore, disk: Disk
) -> None:
    flow = flow_of(store.next_key(), "flow")
    write = creates(flow)
    assert write.flow is not None
    too_large = replace(write, flow=write.flow._replace(revision=2**70))
    with pytest.raises((StoreError, OverflowError)):
        await store.commit([too_large])

    await put(store, "after")

    assert await flow_ids(store) == ["after", "before"]


async def test_a_writer_beside_us_is_told_as_failed_and_then_forgotten(
    store: SqliteStore, disk: Disk, db: Path
) -> None:
    disk.writers[0].execute("PRAGMA busy_timeout = 20")
    with closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CommitFailed, match="locked"):
            await put(store, "lost")
        assert await flow_ids(store) == ["before"]
        other.execute("ROLLBACK")

    await put(store, "after")

    assert await flow_ids(store) == ["after", "before"]


async def test_a_full_disk_refuses_writes_goes_on_reading_and_heals(
    store: SqliteStore, disk: Disk, db: Path
) -> None:
    [writer] = disk.writers
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    (roomy,) = writer.execute("PRAGMA max_page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages + 4}")
    large = Raw(b'"' + b"x" * 100_000 + b'"')
    for _ in range(3):
        with pytest.raises(CommitFailed, match="full"):
            await put(store, "large", state_json=large)
        assert await flow_ids(store) == ["before"]

    disk.writers[-1].execute(f"PRAGMA max_page_count = {roomy}")
    await put(store, "large", state_json=large)

    assert await positions(store) == [1, 2]
    assert await reopened(store, db) == ["large", "before"]


async def test_a_read_that_fails_is_told_and_the_next_one_works(
    store: SqliteStore, disk: Disk
) -> None:
    disk.fail("SELECT", disk_error(sqlite3.SQLITE_IOERR_READ))
    with pytest.raises(StoreUnusable, match="a read failed"):
        await flow_ids(store)

    assert await flow_ids(store) == ["before"]
    await put(store, "after")


@pytest.mark.parametrize(
    "statement", ["BEGIN", "SELECT f.key", "SELECT count(*), max(seq)", "COMMIT"]
)
async def test_a_load_that_fails_leaves_no_read_transaction_open(
    store: SqliteStore, disk: Disk, statement: str
) -> None:
    flow = (await store.list_flows(EVERYONE, FlowQuery(), 1))[0]
    [reader] = disk.readers
    disk.fail(statement, disk_error(sqlite3.SQLITE_IOERR_READ))
    key = FlowKey(flow.owner_key, flow.flow_id)
    with pytest.raises(StoreUnusable):
        await store.load([key])

    assert not reader.in_transaction
    await put(store, "after")
    assert await flow_ids(store) == ["after", "before"]
    assert (await store.load([key]))[0] is not None


# ---- cancelled here ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement", ["BEGIN", "UPDATE ownership", "INSERT INTO flows", "INSERT INTO events", "COMMIT"]
)
async def test_a_cancelled_commit_goes_on_and_the_next_one_works(
    store: SqliteStore, disk: Disk, db: Path, statement: str
) -> None:
    gate = disk.hold(statement)
    cancelled = asyncio.create_task(put(store, "cancelled"))
    await gate.reached()

    cancelled.cancel()
    await anyio.lowlevel.checkpoint()
    gate.open()
    await asyncio.wait({cancelled})
    await put(store, "after")

    assert cancelled.cancelled()
    assert not disk.writers[-1].in_transaction
    assert await flow_ids(store) == ["after", "cancelled", "before"]
    assert await positions(store) == [1, 2, 3]
    assert await reopened(store, db) == ["after", "cancelled", "before"]


async def test_a_cancelled_commit_is_counted(store: SqliteStore, disk: Disk, db: Path) -> None:
    gate = disk.hold("COMMIT")
    cancelled = asyncio.create_task(
        store.commit([replace(creates(flow_of(store.next_key(), "cancelled")), events=[])])
    )
    await gate.reached()
    cancelled.cancel()
    await anyio.lowlevel.checkpoint()
    gate.open()
    await asyncio.wait({cancelled})

    await put(store, "after")

    assert disk.readers[0].execute("SELECT commits FROM ownership").fetchone() == (3,)


async def test_a_commit_cancelled_before_it_began_changes_nothing(store: SqliteStore) -> None:
    cancelled = asyncio.create_task(put(store, "cancelled"))
    cancelled.cancel()
    await asyncio.wait({cancelled})

    await put(store, "after")

    assert await flow_ids(store) == ["after", "before"]


@pytest.mark.parametrize(
    "statement", ["connect", "PRAGMA journal_mode", "UPDATE ownership SET holder", "COMMIT"]
)
@pytest.mark.parametrize("done", [False, True], ids=["not there", "there"])
async def test_a_commit_cancelled_while_its_outcome_is_looked_up_spoils_nothing(
    store: SqliteStore, disk: Disk, db: Path, statement: str, done: bool
) -> None:
    first = disk.hold("COMMIT")
    cancelled = asyncio.create_task(put(store, "maybe"))
    await first.reached()
    disk.fail("COMMIT", done=done)
    second = disk.hold(statement)
    first.open()
    await second.reached()

    cancelled.cancel()
    await anyio.lowlevel.checkpoint()
    second.open()
    await asyncio.wait({cancelled})
    await put(store, "after")

    expected = ["after", "maybe", "before"] if done else ["after", "before"]
    assert await flow_ids(store) == expected
    assert await positions(store) == list(range(1, len(expected) + 1))
    assert await reopened(store, db) == expected


@pytest.mark.parametrize(
    "statement", ["connect", "PRAGMA journal_mode", "BEGIN", "PRAGMA query_only"]
)
async def test_an_opening_that_was_cancelled_can_be_done_again(
    db: Path, disk: Disk, statement: str
) -> None:
    store = TendedStore(db, connect=disk.connect)
    gate = disk.hold(statement)
    cancelled = asyncio.create_task(store.open())
    await gate.reached()
    cancelled.cancel()
    await anyio.lowlevel.checkpoint()
    gate.open()
    await asyncio.wait({cancelled})
    await anyio.to_thread.run_sync(disk.threads[-1].join)

    await store.open()

    await put(store)
    assert await flow_ids(store) == ["flow"]
    await store.aclose()


async def test_an_opening_that_was_cancelled_takes_the_store_from_nobody(
    db: Path, disk: Disk
) -> None:
    gate = disk.hold("connect")
    cancelled = asyncio.create_task(TendedStore(db, connect=disk.connect).open())
    await gate.reached()
    cancelled.cancel()
    await anyio.lowlevel.checkpoint()

    other = TendedStore(db)
    with suppress(StoreInUse):
        await other.open()
    gate.open()
    await asyncio.wait({cancelled})
    await anyio.to_thread.run_sync(disk.threads[0].join)
    with suppress(StoreInUse):
        await other.open()

    await put(other)
    assert await flow_ids(other) == ["flow"]


async def test_a_cancelled_read_disturbs_nobody(store: SqliteStore, disk: Disk) -> None:
    gate = disk.hold("SELECT")
    cancelled = asyncio.create_task(flow_ids(store))
    await gate.reached()
    cancelled.cancel()
    await anyio.lowlevel.checkpoint()
    gate.open()
    await asyncio.wait({cancelled})

    assert await flow_ids(store) == ["before"]


async def test_reads_do_not_wait_for_a_commit(store: SqliteStore, disk: Disk) -> None:
    gate = disk.hold("COMMIT")
    commit = asyncio.create_task(put(store, "after"))
    await gate.reached()

    during = await flow_ids(store)
    gate.open()
    await commit

    assert during == ["before"]
    assert await flow_ids(store) == ["after", "before"]


async def test_closing_waits_for_the_commit_under_way(
    store: SqliteStore, disk: Disk, db: Path
) -> None:
    gate = disk.hold("COMMIT")
    commit = asyncio.create_task(put(store, "after"))
    await gate.reached()
    closing_down = asyncio.create_task(store.aclose())
    gate.open()

    await commit
    await closing_down

    assert await reopened(store, db) == ["after", "before"]
