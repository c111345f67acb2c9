# ruff: noqa: ASYNC240 - a test may wait for a file
"""What fails while a store is opened or given up: it is told as it is, and nothing is left half taken."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio.lowlevel
import anyio.to_thread
import pytest

from flowstead.errors import CommitFailed, StoreInUse, StoreUnusable
from flowstead.store.port import EVERYONE, FlowQuery
from flowstead.store.sqlite import SqliteStore
from flowstead.store.worker import WorkerConnection
from tests.store.disk import Disk, NotedConnection, TendedStore, disk_error
from tests.store.rows import put

pytestmark = pytest.mark.usefixtures("stores_end")

SNAPSHOT = Path(__file__).parents[2] / "tests" / "snapshots" / "v1.sql"


@pytest.fixture
def disk() -> Disk:
    return Disk()


async def flow_ids(store: SqliteStore) -> list[str]:
    return [flow.flow_id for flow in await store.list_flows(EVERYONE, FlowQuery(), 100)]


class Unstartable(threading.Thread):
    """A thread the kernel has no room for."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("started", [0, 1], ids=["writer", "reader"])
async def test_a_thread_that_cannot_be_started_refuses_the_opening_and_keeps_nothing(
    db: Path, started: int
) -> None:
    made: list[WorkerConnection] = []

    class Cramped(WorkerConnection):
        def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
            super().__init__(connector)
            if len(made) >= started:
                self._thread = Unstartable()
            made.append(self)

    with pytest.raises(StoreUnusable, match="no thread can be started"):
        await TendedStore(db, worker=Cramped).open()

    assert len(made) == started + 1
    assert not any(connection._thread.is_alive() for connection in made)
    store = TendedStore(db)
    await store.open()
    await put(store, "after")
    assert await flow_ids(store) == ["after"]


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "UPDATE ownership", "COMMIT"])
async def test_ownership_that_cannot_be_written_is_not_taken(
    db: Path, disk: Disk, statement: str
) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store, "before")
    await store.aclose()
    fault = disk.fail(statement, disk_error(sqlite3.SQLITE_FULL, "database or disk is full"))

    with pytest.raises(StoreUnusable, match="full"):
        await TendedStore(db, connect=disk.connect).open()

    assert fault.fired == 1
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("SELECT epoch FROM ownership").fetchall() == [(1,)]
    await store.open()
    assert await flow_ids(store) == ["before"]


async def test_an_opening_cancelled_while_it_fails_ends_as_cancelled_and_keeps_nothing(
    db: Path, disk: Disk
) -> None:
    store = TendedStore(db, connect=disk.connect)
    fault, gate = disk.fail("PRAGMA journal_mode"), disk.hold("PRAGMA journal_mode")
    cancelled = asyncio.create_task(store.open())
    await gate.reached()

    cancelled.cancel()
    await anyio.lowlevel.checkpoint()
    gate.open()
    await asyncio.wait({cancelled})

    assert cancelled.cancelled()
    assert fault.fired == 1
    await store.open()
    assert await flow_ids(store) == []


async def test_the_overtaken_steps_down_also_if_it_cannot_read_who_took_over(
    db: Path, disk: Disk
) -> None:
    store = TendedStore(db, connect=disk.connect)
    await store.open()
    await put(store, "before")
    second = TendedStore(db)
    await second.open(takeover=True)
    fault = disk.fail("SELECT holder")

    with pytest.raises(StoreInUse, match="another runtime, which took it over"):
        await put(store, "lost")

    assert fault.fired == 1
    with pytest.raises(StoreInUse):
        await put(store, "later")
    assert await flow_ids(second) == ["before"]


class Unclosable(NotedConnection):
    """A connection that complains of being closed."""

    complaints = 0

    def close(self) -> None:
        super().close()
        type(self).complaints += 1
        raise disk_error()


async def test_a_spoiled_writer_that_cannot_be_closed_does_not_keep_the_next_from_writing(
    db: Path, disk: Disk
) -> None:
    healthy: list[bool] = []

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        if "mode=rw" not in str(args[0]) or healthy:
            return disk.connect(*args, **kwargs)
        healthy.append(True)
        connection = sqlite3.connect(*args, factory=Unclosable, **kwargs)
        connection.disk = disk
        return connection

    Unclosable.complaints = 0
    store = TendedStore(db, connect=connect)
    await store.open()
    disk.fail("INSERT INTO flows")
    disk.fail("ROLLBACK")

    with pytest.raises(CommitFailed):
        await put(store, "lost")

    assert Unclosable.complaints == 1
    await put(store, "after")
    assert await flow_ids(store) == ["after"]


async def test_a_file_of_version_1_without_its_ownership_row_is_refused_and_stays_one(
    db: Path,
) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.executescript(SNAPSHOT.read_text())
        connection.execute("DELETE FROM ownership")
        connection.execute("PRAGMA journal_mode = WAL")
    before = db.read_bytes()

    with pytest.raises(StoreUnusable, match="its ownership row is missing"):
        await TendedStore(db).open()

    assert db.read_bytes() == before
    assert sorted(path.name for path in db.parent.iterdir()) == ["flows.db", "flows.db.lock"]


async def test_an_ownership_row_that_goes_after_the_file_was_looked_at_is_missed(
    db: Path, disk: Disk
) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store, "before")
    await store.aclose()
    gate = disk.hold("BEGIN IMMEDIATE")
    opening = asyncio.create_task(TendedStore(db, connect=disk.connect).open())
    await gate.reached()
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("DELETE FROM ownership")
    gate.open()

    with pytest.raises(StoreUnusable, match="its ownership row is missing"):
        await opening

    assert disk.ran("COMMIT") == 0
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("SELECT count(*) FROM flows").fetchall() == [(1,)]


async def test_a_last_event_under_another_number_is_refused(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store, "one")
    await put(store, "two")
    await store.aclose()
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("UPDATE events SET position = 7 WHERE position = 2")

    with pytest.raises(StoreUnusable, match="the newest event is 7, and 2 were written"):
        await store.open()
