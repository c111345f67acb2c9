# ruff: noqa: ASYNC240 - a test may wait for a file
"""The file of a SQLite store: how it is made, refused, read when rows are bad, and kept in shape."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from flowstead.errors import SnapshotUnreadable, StoreInUse, StoreUnusable, WriteConflict
from flowstead.model.flow import FlowKey, FlowStatus
from flowstead.store import codec, schema, sqlite
from flowstead.store.codec import FlowWrite
from flowstead.store.port import EVERYONE, FlowQuery, Snapshot, WaitLookup
from flowstead.store.sqlite import SqliteStore
from flowstead.store.worker import WorkerConnection
from tests.store.disk import Disk, TendedStore, disk_error
from tests.store.rows import (
    ALICE,
    NOW,
    changes,
    creates,
    event_of,
    flow_of,
    put,
    put_end,
    put_signal,
    put_task,
    put_update,
    signals,
    tells,
    update_of,
    updates,
    wait_of,
)

pytestmark = pytest.mark.usefixtures("stores_end")

TABLES = ("flows", "tasks", "events", "signals", "updates")
AS_ROOT = os.geteuid() == 0
needs_permissions = pytest.mark.skipif(AS_ROOT, reason="permissions do not stop root")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
async def store(db: Path, disk: Disk) -> AsyncIterator[SqliteStore]:
    store = TendedStore(db, durability="normal", connect=disk.connect)
    await store.open()
    yield store
    await store.aclose()


def plain(path: Path, *statements: str, values: tuple[Any, ...] = ()) -> list[Any]:
    """What another program would find in the file; the rows of the last statement."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        rows: list[Any] = []
        for statement in statements:
            rows = connection.execute(statement, values).fetchall()
        return rows


def modes(directory: Path) -> dict[str, str]:
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in directory.iterdir()}


def everything(directory: Path) -> dict[str, bytes]:
    """All bytes beside the database, but for the file that says who owns it."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.is_file() and not path.name.endswith(".lock")
    }


async def flow_ids(store: SqliteStore) -> list[str]:
    return [flow.flow_id for flow in await store.list_flows(EVERYONE, FlowQuery(), 100)]


async def refusal(db: Path) -> StoreUnusable:
    """Why the file is refused; that it was left alone is checked beside."""
    before = everything(db.parent)
    with pytest.raises(StoreUnusable) as refused:
        await TendedStore(db).open()
    assert everything(db.parent) == before
    return refused.value


# ---- making the file --------------------------------------------------------------------------------


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
async def test_only_the_user_can_read_what_is_kept(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store)

    assert modes(db.parent) == {
        "flows.db": "0o600",
        "flows.db-wal": "0o600",
        "flows.db-shm": "0o600",
        "flows.db.lock": "0o600",
    }
    await store.aclose()


@pytest.mark.usefixtures("open_umask")
async def test_a_store_that_was_taken_over_stays_private(store: SqliteStore, db: Path) -> None:
    second = TendedStore(db)

    await second.open(takeover=True)

    assert set(modes(db.parent).values()) == {"0o600"}
    assert set(modes(db.parent)) == {"flows.db", "flows.db-wal", "flows.db-shm", "flows.db.lock"}
    await second.aclose()


async def test_closing_folds_the_log_into_the_file(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store)

    await store.aclose()

    assert set(modes(db.parent)) == {"flows.db", "flows.db.lock"}


@pytest.mark.parametrize(("durability", "level"), [("full", 2), ("normal", 1)])
async def test_durability_is_what_the_connection_really_does(
    db: Path, disk: Disk, durability: Any, level: int
) -> None:
    store = TendedStore(db, durability=durability, connect=disk.connect)
    await store.open()

    [writer] = disk.writers
    assert writer.execute("PRAGMA synchronous").fetchone() == (level,)
    assert writer.execute("PRAGMA journal_mode").fetchone() == (b"wal",)
    await store.aclose()


async def test_a_misspelt_durability_is_misuse(db: Path) -> None:
    with pytest.raises(ValueError, match="'fast'"):
        TendedStore(db, durability="fast")  # type: ignore[arg-type]


async def test_full_durability_is_the_default(db: Path, disk: Disk) -> None:
    store = TendedStore(db, connect=disk.connect)
    await store.open()

    assert disk.writers[0].execute("PRAGMA synchronous").fetchone() == (2,)
    await store.aclose()


async def test_the_writer_checks_what_it_reads_and_checkpoints_only_on_request(
    store: SqliteStore, disk: Disk
) -> None:
    [writer] = disk.writers

    assert writer.execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)
    assert writer.execute("PRAGMA trusted_schema").fetchone() == (0,)
    assert writer.execute("PRAGMA cell_size_check").fetchone() == (1,)
    assert writer.execute("PRAGMA busy_timeout").fetchone() == (5_000,)
    assert writer.execute("PRAGMA journal_size_limit").fetchone()[0] > 0


async def test_the_reader_can_neither_write_nor_checkpoint(store: SqliteStore, disk: Disk) -> None:
    [reader] = disk.readers

    assert reader.execute("PRAGMA query_only").fetchone() == (1,)
    assert reader.execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("DELETE FROM flows")


async def test_reads_go_to_the_reader_and_writes_to_the_writer(
    store: SqliteStore, disk: Disk
) -> None:
    said: list[str] = []
    disk.readers[0].set_trace_callback(lambda text: said.append(f"reader {text.split()[0]}"))
    disk.writers[0].set_trace_callback(lambda text: said.append(f"writer {text.split()[0]}"))

    await put(store)
    assert {line.split()[0] for line in said} == {"writer"}
    said.clear()
    await flow_ids(store)
    await store.load([FlowKey("alice", "flow")])
    await store.list_unreadable()

    assert set(said) == {"reader SELECT", "reader BEGIN", "reader COMMIT", "reader PRAGMA"}


async def test_a_batch_is_one_hop_and_one_transaction(
    store: SqliteStore, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops: list[str] = []
    run = WorkerConnection.run

    async def noted(self: WorkerConnection, function: Callable[..., Any], *args: Any) -> Any:
        hops.append(function.__name__)
        return await run(self, function, *args)

    monkeypatch.setattr(WorkerConnection, "run", noted)
    begun, committed = disk.ran("BEGIN"), disk.ran("COMMIT")

    await store.commit([creates(flow_of(store.next_key(), f"flow-{n}")) for n in range(100)])

    assert len(hops) == 1
    assert (disk.ran("BEGIN") - begun, disk.ran("COMMIT") - committed) == (1, 1)


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "what?#.db", "ünï-👩.db", "it's.db"])
async def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    store = TendedStore(tmp_path / name)
    await store.open()

    await put(store)

    assert await flow_ids(store) == ["flow"]
    assert store.name == name
    await store.aclose()
    assert {path.name for path in tmp_path.iterdir()} == {name, name + ".lock"}


async def test_a_relative_path_stays_where_it_was_when_the_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = TendedStore("flows.db")
    monkeypatch.chdir(tmp_path / "elsewhere")

    await store.open()

    await put(store)
    await store.aclose()
    assert (tmp_path / "flows.db").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


async def test_an_empty_file_is_a_new_store(db: Path) -> None:
    db.touch()
    store = TendedStore(db)

    await store.open()

    await put(store)
    assert await flow_ids(store) == ["flow"]
    await store.aclose()


# ---- refusing a file --------------------------------------------------------------------------------


async def test_another_programs_database_is_refused_and_left_alone(db: Path) -> None:
    plain(db, "PRAGMA application_id = 7", "CREATE TABLE theirs (x)")

    assert "another program" in str(await refusal(db))


async def test_another_programs_unmarked_database_is_refused_and_left_alone(db: Path) -> None:
    plain(db, "CREATE TABLE theirs (x)", "INSERT INTO theirs VALUES (1)")

    assert "another program" in str(await refusal(db))


async def test_another_programs_database_without_tables_is_refused_and_left_alone(
    db: Path,
) -> None:
    plain(db, "PRAGMA application_id = 7")

    assert "another program" in str(await refusal(db))


async def test_another_programs_database_keeps_its_log(tmp_path: Path) -> None:
    theirs, db = tmp_path / "theirs.db", tmp_path / "copy" / "flows.db"
    db.parent.mkdir()
    with closing(sqlite3.connect(theirs, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE theirs (x)")
        connection.execute("INSERT INTO theirs VALUES (1)")
        shutil.copy(theirs, db)
        shutil.copy(f"{theirs}-wal", f"{db}-wal")
    before = (db.read_bytes(), Path(f"{db}-wal").read_bytes())

    with pytest.raises(StoreUnusable, match="another program"):
        await TendedStore(db).open()

    assert (db.read_bytes(), Path(f"{db}-wal").read_bytes()) == before


async def test_a_later_schema_is_refused_and_left_alone(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store)
    await store.aclose()
    plain(db, f"PRAGMA user_version = {schema.VERSION + 1}")

    told = str(await refusal(db))

    assert str(schema.VERSION + 1) in told
    assert "newer release" in told


async def test_a_later_schema_without_tables_is_refused_and_left_alone(db: Path) -> None:
    plain(
        db,
        f"PRAGMA application_id = {schema.APPLICATION_ID}",
        f"PRAGMA user_version = {schema.VERSION + 1}",
    )

    assert "newer release" in str(await refusal(db))


async def test_a_file_of_ours_without_a_version_is_refused_and_left_alone(db: Path) -> None:
    plain(db, f"PRAGMA application_id = {schema.APPLICATION_ID}", "CREATE TABLE flows (x)")

    assert "version is missing" in str(await refusal(db))


async def test_a_file_of_ours_without_its_tables_is_refused(db: Path) -> None:
    plain(
        db,
        f"PRAGMA application_id = {schema.APPLICATION_ID}",
        f"PRAGMA user_version = {schema.VERSION}",
        "CREATE TABLE something (x)",
    )

    with pytest.raises(StoreUnusable):
        await TendedStore(db).open()


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"flow: triage inbox\n",
        b"SQLite format 3\x00",
        b"SQLite format 3\x00" + b"\xff" * 84,
        bytes(range(256)) * 64,
        b"\x00" * 8192,
        b'{"flows": []}' * 1000,
    ],
    ids=["one byte", "text", "magic only", "bad header", "garbage", "zeros", "json"],
)
async def test_a_file_that_is_no_database_is_refused_and_left_alone(
    db: Path, content: bytes
) -> None:
    db.write_bytes(content)

    told = str(await refusal(db))

    assert "damaged" in told
    assert "flows.db" in told


@pytest.mark.parametrize("kept", [50, 100, 4096, 6000])
async def test_a_file_that_was_cut_short_is_refused(db: Path, kept: int) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store)
    await store.aclose()
    content = db.read_bytes()
    assert len(content) > kept
    db.write_bytes(content[:kept])

    with pytest.raises(StoreUnusable, match="damaged"):
        await TendedStore(db).open()


async def test_damaged_pages_are_reported_and_never_read_as_nothing(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    for n in range(300):
        await store.commit([creates(flow_of(store.next_key(), f"flow-{n}", goal="g" * 500))])
    await store.aclose()
    content = bytearray(db.read_bytes())
    for page in range(20 * 4096, len(content), 4096):
        content[page : page + 4096] = b"\xff" * 4096
    db.write_bytes(content)

    async def read_all() -> None:
        await store.open()
        try:
            await store.list_flows(ALICE, FlowQuery(), 1_000)
        finally:
            await store.aclose()

    with pytest.raises(StoreUnusable):
        await read_all()


async def test_a_log_without_its_database_is_refused(db: Path) -> None:
    wal = Path(f"{db}-wal")
    wal.write_bytes(b"the newest flows")

    assert wal.name in str(await refusal(db))
    assert not db.exists()


async def test_a_log_beside_an_empty_database_is_refused(db: Path) -> None:
    db.touch()
    Path(f"{db}-wal").write_bytes(b"the newest flows")

    assert "-wal" in str(await refusal(db))


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="does not exist"):
        await TendedStore(tmp_path / "nowhere" / "flows.db").open()

    assert list(tmp_path.iterdir()) == []


async def test_a_directory_in_place_of_the_file_is_refused(db: Path) -> None:
    db.mkdir()

    with pytest.raises(StoreUnusable):
        await TendedStore(db).open()

    assert list(db.iterdir()) == []


async def test_a_directory_in_place_of_the_lock_is_refused(db: Path) -> None:
    Path(f"{db}.lock").mkdir()

    with pytest.raises(StoreUnusable):
        await TendedStore(db).open()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place no file can be made in")
async def test_a_place_that_takes_no_files_is_refused() -> None:
    with pytest.raises(StoreUnusable):
        await TendedStore("/proc/flows.db").open()


@needs_permissions
async def test_a_read_only_file_is_refused_at_once(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    await store.aclose()
    db.chmod(0o400)

    with pytest.raises(StoreUnusable, match="written"):
        await TendedStore(db).open()


@needs_permissions
async def test_an_unreadable_file_is_refused_at_once(db: Path) -> None:
    db.touch(mode=0)

    with pytest.raises(StoreUnusable):
        await TendedStore(db).open()


@needs_permissions
async def test_a_read_only_directory_is_refused_at_once(db: Path) -> None:
    db.parent.chmod(0o500)
    try:
        with pytest.raises(StoreUnusable):
            await TendedStore(db).open()
    finally:
        db.parent.chmod(0o700)


async def test_a_file_sqlite_may_not_write_is_refused_as_such(db: Path, disk: Disk) -> None:
    error = disk_error(sqlite3.SQLITE_READONLY, "attempt to write a readonly database")
    disk.fail("PRAGMA journal_mode", error)

    with pytest.raises(StoreUnusable, match="cannot be written"):
        await TendedStore(db, connect=disk.connect).open()


async def test_a_reader_that_cannot_be_opened_is_told_as_such_and_lets_go(
    db: Path, disk: Disk
) -> None:
    disk.fail("PRAGMA query_only")
    store = TendedStore(db, connect=disk.connect)

    with pytest.raises(StoreUnusable):
        await store.open()

    await store.open()
    await put(store)
    await store.aclose()


async def test_a_refused_file_is_let_go_at_once(db: Path) -> None:
    db.write_text("no database")
    await refusal(db)
    db.unlink()

    store = TendedStore(db)
    await store.open()

    assert await flow_ids(store) == []
    await store.aclose()


async def test_a_refused_opening_leaves_no_thread_behind(db: Path, disk: Disk) -> None:
    db.write_text("no database at all" * 20)

    with pytest.raises(StoreUnusable):
        await TendedStore(db, connect=disk.connect).open()

    assert disk.threads
    assert not any(thread.is_alive() for thread in disk.threads)


async def test_a_writer_in_the_midst_of_a_transaction_is_waited_for_and_then_named(
    db: Path, disk: Disk
) -> None:
    disk.fail("BEGIN IMMEDIATE", disk_error(sqlite3.SQLITE_BUSY, "database is locked"))

    with pytest.raises(StoreInUse):
        await TendedStore(db, connect=disk.connect).open()


async def test_a_log_sqlite_cannot_keep_is_refused(db: Path) -> None:
    class NoLog(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return super().execute(
                sql.replace("journal_mode = WAL", "journal_mode = DELETE"), *values
            )

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return sqlite3.connect(*args, factory=NoLog, **kwargs)

    with pytest.raises(StoreUnusable, match="write-ahead log"):
        await TendedStore(db, connect=connect).open()


@pytest.mark.parametrize(
    "statement", ["BEGIN", "CREATE TABLE flows", "CREATE VIEW", "PRAGMA user_version =", "COMMIT"]
)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
async def test_a_migration_cut_off_leaves_a_file_that_opens(
    db: Path, disk: Disk, statement: str, done: bool
) -> None:
    fault = disk.fail(statement, done=done)
    with pytest.raises(StoreUnusable):
        await TendedStore(db, connect=disk.connect).open()
    assert fault.fired == 1

    store = TendedStore(db)
    await store.open()

    await put(store)
    assert await flow_ids(store) == ["flow"]
    assert plain(db, "PRAGMA user_version") == [(schema.VERSION,)]
    await store.aclose()


async def test_a_file_is_marked_as_ours(store: SqliteStore, db: Path) -> None:
    assert plain(db, "PRAGMA application_id") == [(schema.APPLICATION_ID,)]
    assert plain(db, "PRAGMA user_version") == [(schema.VERSION,)]
    assert plain(db, "PRAGMA integrity_check") == [("ok",)]


async def test_opening_and_closing_changes_no_flow(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    flow = await put(store)
    await put_task(store, flow, "task", launched=True)
    await put_signal(store, wait_key="k", signal_id="id")
    await put_update(store, flow)
    await store.aclose()
    rows = [plain(db, f"SELECT * FROM {table}") for table in TABLES]

    for _ in range(3):
        await store.open()
        await store.aclose()

    assert rows == [plain(db, f"SELECT * FROM {table}") for table in TABLES]
    assert [len(found) for found in rows] == [1, 1, 1, 1, 1]


# ---- bad rows ---------------------------------------------------------------------------------------

BAD_DOCS = {
    "cut": "'{\"flowId\":'",
    "empty": "''",
    "not json": "'goal: triage'",
    "unknown status": "replace(doc, '\"running\"', '\"hibernating\"')",
    "unknown mode": "replace(doc, '\"managed\"', '\"feral\"')",
    "wrong type": 'replace(doc, \'"revision":1\', \'"revision":"one"\')',
    "fraction": "replace(doc, '\"revision\":1', '\"revision\":1.5')",
    "field missing": "replace(doc, '\"ownerKey\"', '\"owner\"')",
    "huge int": "replace(doc, '\"revision\":1', '\"revision\":1' || printf('%.*c', 40, '0'))",
    "monstrous int": "replace(doc, '\"revision\":1', '\"revision\":1' || printf('%.*c', 9999, '0'))",
    "integer doc": "42",
    "real doc": "1.5",
    "blob": "x'00ff00ff'",
    "invalid utf-8": "CAST(x'7b22666c6f774964223a22ff227d' AS TEXT)",
    "deep": "replace(doc, '\"a goal\"', printf('%.*c', 100000, '['))",
    "huge": "zeroblob(3000000)",
}


@pytest.mark.parametrize("value", BAD_DOCS.values(), ids=BAD_DOCS.keys())
async def test_a_bad_flow_is_set_aside_and_the_others_work(db: Path, value: str) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store, "good-1")
    bad = await put(store, "bad")
    good = await put(store, "good-2")
    await store.aclose()
    plain(db, f"UPDATE flows SET doc = {value} WHERE flow_id = 'bad'")
    stored = plain(db, "SELECT CAST(doc AS BLOB) FROM flows WHERE flow_id = 'bad'")

    await store.open()
    keys = [FlowKey("alice", name) for name in ("good-1", "bad", "good-2")]
    first, broken, second = await store.load(keys)
    listed = await store.list_unreadable()
    await store.commit([changes(replace(good, revision=2, status=FlowStatus.WAITING))])

    assert isinstance(first, Snapshot)
    assert isinstance(broken, SnapshotUnreadable)
    assert isinstance(second, Snapshot)
    assert await flow_ids(store) == ["good-2", "good-1"]
    assert [(row.table, row.key) for row in listed] == [("flows", bad.key)]
    with pytest.raises(SnapshotUnreadable):
        await store.find_flow(ALICE, "bad")
    assert await store.list_due(after=0, until=10**15) == []
    assert len(await store.events_after(EVERYONE, 0, 10)) == 3
    await store.aclose()
    assert plain(db, "SELECT CAST(doc AS BLOB) FROM flows WHERE flow_id = 'bad'") == stored


async def test_what_is_said_of_a_bad_row_does_not_show_its_secrets(store: SqliteStore) -> None:
    flow = flow_of(store.next_key(), "bad", state_json=Raw(b'{"token":"hunter2"}'))
    write = creates(flow)
    assert write.flow is not None
    doc = write.flow.doc.replace('"running"', '"hibernating"')
    await store.commit([replace(write, flow=write.flow._replace(doc=doc))])

    [listed] = await store.list_unreadable()

    assert "bad" in listed.problem
    assert "hunter2" not in listed.problem


@pytest.mark.parametrize(
    "value", ["'{'", "7", "x'ff'", "replace(doc, '\"queued\"', '\"hibernating\"')"]
)
async def test_a_bad_child_is_set_aside_with_its_flow(db: Path, value: str) -> None:
    store = TendedStore(db)
    await store.open()
    hurt = await put(store, "hurt")
    await put(store, "fine")
    task = await put_task(store, hurt, "bad-task", launched=True)
    await store.aclose()
    plain(db, f"UPDATE tasks SET doc = {value}")

    await store.open()
    broken, whole = await store.load([FlowKey("alice", "hurt"), FlowKey("alice", "fine")])
    listed = await store.list_unreadable()
    unfinished = await store.list_unfinished([], after_key=0, limit=9)

    assert isinstance(broken, SnapshotUnreadable)
    assert isinstance(whole, Snapshot)
    assert [(row.table, row.key) for row in listed] == [("tasks", task.key)]
    assert [key for _, key in unfinished] == [FlowKey("alice", "hurt")]
    assert await flow_ids(store) == ["fine", "hurt"]
    await store.aclose()


@pytest.mark.parametrize(
    "value", ["'{'", "''", "7", "1.5", "x'ff'", "replace(doc, '\"key\"', '\"keys\"')", "doc || ' '"]
)
async def test_bad_signals_and_updates_are_left_out_and_the_others_work(
    db: Path, value: str
) -> None:
    store = TendedStore(db)
    await store.open()
    flow = await put(store)
    bad = await put_signal(store, wait_key="k", signal_id="bad")
    good = await put_signal(store, wait_key="k", signal_id="good")
    hurt = await put_update(store, flow, "hurt")
    fine = await put_update(store, flow, "fine", due_at=NOW + 1)
    await store.aclose()
    plain(
        db,
        f"UPDATE signals SET doc = {value} WHERE signal_id = 'bad'",
        f"UPDATE updates SET doc = {value} WHERE slot = 'hurt'",
    )

    await store.open()
    [found] = await store.look_up_waits([WaitLookup("alice", "k", "bad", NOW)])

    assert found.is_known
    assert found.kept is not None and found.kept.key == good.key
    assert [one.key for one in await store.list_updates_due(until=2 * NOW, limit=9)] == [fine.key]
    assert await store.next_update_due() == NOW + 1
    listed = {(row.table, row.key) for row in await store.list_unreadable()}
    assert listed == {("signals", bad.key), ("updates", hurt.key)}
    await store.commit([updates(replace(fine, due_at=None), fresh=False)])
    assert await store.next_update_due() is None
    await store.aclose()


@pytest.mark.parametrize(
    "change", ["version = 'two'", "due_at = 'soon'", "doc = 'x'", "owner_key = x'ff'"]
)
async def test_newer_progress_comes_whatever_happened_to_the_older(db: Path, change: str) -> None:
    store = TendedStore(db)
    await store.open()
    flow, other = await put(store), await put(store, "other")
    await put_update(store, flow)
    await put_update(store, other)
    await store.aclose()
    plain(db, f"UPDATE updates SET {change}")

    await store.open()
    await put_update(store, flow, text="newer")
    await put_end(store, other)

    texts = [update.text for update in await store.list_updates_due(until=NOW, limit=9)]
    assert "done" in texts
    assert texts == (["done"] if change.startswith("owner_key") else ["newer", "done"])
    await store.aclose()


async def test_a_bad_event_is_listed_by_its_position(store: SqliteStore) -> None:
    flow = await put(store)
    bad = event_of(flow, 2)._replace(doc="[]")
    position = await store.commit([replace(tells(flow), events=[bad])])

    [listed] = await store.list_unreadable()

    assert (listed.table, listed.key) == ("events", position)


@pytest.mark.parametrize("table", ["flows", "tasks"])
@pytest.mark.parametrize("value", ["'soon'", "x'00'", "1e300"])
async def test_a_bad_due_time_does_not_stop_the_clock_for_others(
    db: Path, table: str, value: str
) -> None:
    store = TendedStore(db)
    await store.open()
    hurt = await put(store, "hurt")
    await put_task(store, hurt, "task")
    await put(store, "fine", due_at=50)
    await store.aclose()
    plain(
        db,
        f"UPDATE {table} SET due_at = {value} WHERE "
        + ("flow_id = 'hurt'" if table == "flows" else "task_id = 'task'"),
    )

    await store.open()

    assert await store.next_due(after=0) == 50
    assert [due.key.flow_id for due in await store.list_due(after=0, until=100)] == ["fine"]
    after_the_last = await store.next_due(after=50)
    assert after_the_last is None or isinstance(after_the_last, int)
    await store.aclose()


async def test_a_bad_sequence_number_is_no_ones_last(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    flow = await put(store)
    await store.commit([tells(flow, 2)])
    await store.aclose()
    plain(db, "UPDATE events SET seq = 'two' WHERE seq = 2")

    await store.open()
    [found] = await store.load([FlowKey("alice", "flow")])

    assert isinstance(found, SnapshotUnreadable) or found.last_seq == 1
    await store.aclose()


async def test_damaged_bytes_in_an_id_disturb_nobody_else(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    hurt = await put(store, "hurt", controller_id="k", due_at=5)
    await put_task(store, hurt, "hurt-task", run_id="run", runtime="acp")
    await put(store, "fine", controller_id="k")
    await store.aclose()
    plain(
        db,
        "UPDATE flows SET flow_id = CAST(x'ff68ff' AS TEXT) WHERE flow_id = 'hurt'",
        "UPDATE tasks SET run_id = CAST(x'ff' AS TEXT), runtime = x'ff', status = x'fe'",
    )

    await store.open()

    assert isinstance((await store.load([FlowKey("alice", "fine")]))[0], Snapshot)
    assert await store.load([FlowKey("alice", "hurt")]) == [None]
    assert len(await store.list_unfinished(["k"], after_key=0, limit=9)) == 2
    assert len(await store.list_due(after=0, until=10)) == 1
    assert await store.count_by_controller() == {"k": 2}
    await store.aclose()


# ---- ownership --------------------------------------------------------------------------------------


async def test_a_second_runtime_in_this_process_is_told_who_holds_the_store(
    store: SqliteStore, db: Path
) -> None:
    with pytest.raises(StoreInUse) as refused:
        await TendedStore(db).open()

    assert str(os.getpid()) in str(refused.value)
    assert "flows.db" in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"pid":1,"host":"h","since":"2026-01-01T00:00:00Z"}', b"garbage \xff", b"{" * 9999],
    ids=["empty", "dead owner", "garbage", "long"],
)
async def test_a_lock_file_left_behind_does_not_matter(db: Path, content: bytes) -> None:
    Path(f"{db}.lock").write_bytes(content)
    store = TendedStore(db)

    await store.open()

    with pytest.raises(StoreInUse, match=f"process {os.getpid()} "):
        await TendedStore(db).open()
    await store.aclose()


async def test_a_lock_file_that_says_nothing_still_refuses(store: SqliteStore, db: Path) -> None:
    Path(f"{db}.lock").write_bytes(b"")

    with pytest.raises(StoreInUse, match="another process"):
        await TendedStore(db).open()


async def test_the_overtaken_is_told_who_took_over(store: SqliteStore, db: Path) -> None:
    second = TendedStore(db)
    await second.open(takeover=True)

    with pytest.raises(StoreInUse, match=f"process {os.getpid()}, which took it over"):
        await put(store)
    await second.aclose()


async def test_a_third_runtime_is_refused_after_a_takeover(store: SqliteStore, db: Path) -> None:
    second = TendedStore(db)
    await second.open(takeover=True)

    with pytest.raises(StoreInUse):
        await TendedStore(db).open()
    await second.aclose()


async def test_each_owner_raises_the_epoch(db: Path) -> None:
    store = TendedStore(db)
    epochs = []
    for _ in range(3):
        await store.open()
        epochs += plain(db, "SELECT epoch FROM ownership")
        await store.aclose()

    assert epochs == [(1,), (2,), (3,)]


async def test_every_commit_is_counted(store: SqliteStore, db: Path) -> None:
    for name in ("a", "b", "c"):
        await put(store, name)

    assert plain(db, "SELECT commits, last_position FROM ownership") == [(3, 3)]


async def test_every_row_is_counted_once_however_often_it_is_written(
    store: SqliteStore, db: Path
) -> None:
    flow = await put(store)
    signal = await put_signal(store, wait_key="k")
    await put_signal(store, wait_key="k")
    await store.commit([signals(replace(signal, taken_by="flow"), fresh=False)])
    for _ in range(3):
        await put_update(store, flow)
    await store.commit([updates(*(update_of(store.next_key(), flow) for _ in range(2)))])
    done = await put_update(store, flow, "done")
    await store.commit([updates(replace(done, attempt=1), fresh=False)])
    with pytest.raises(WriteConflict):
        await put_update(store, flow, "done")

    totals = plain(db, "SELECT flows, tasks, events, signals, updates FROM ownership")

    assert totals == [(1, 0, 1, 2, 2)]
    assert plain(db, "SELECT count(*) FROM signals") + plain(
        db, "SELECT count(*) FROM updates"
    ) == [(2,), (2,)]
    assert await store.list_unreadable() == []


# ---- for people -------------------------------------------------------------------------------------


async def test_the_views_answer_any_sqlite_shell(store: SqliteStore, db: Path) -> None:
    flow = await put(
        store,
        controller_id="plugin/triage",
        correlation_id="c",
        goal="triage inbox",
        current_step="classify",
        state_json=Raw(b'{"n":[1]}'),
        wait_json=Raw(b'{"kind":"reply"}'),
    )
    await put_task(store, flow, "task", run_id="run", task="classify it")

    def first(view: str) -> dict[str, Any]:
        with closing(sqlite3.connect(db)) as connection:
            connection.row_factory = sqlite3.Row
            return dict(connection.execute(f"SELECT * FROM {view}").fetchone())

    assert first("v_flows") == {
        "flow_id": "flow",
        "owner_key": "alice",
        "status": "running",
        "revision": 1,
        "controller_id": "plugin/triage",
        "correlation_id": "c",
        "goal": "triage inbox",
        "current_step": "classify",
        "state_json": '{"n":[1]}',
        "wait_json": '{"kind":"reply"}',
        "blocked_summary": None,
        "created": "2027-01-15 08:00:00",
        "updated": "2027-01-15 08:00:00",
        "ended": None,
    }
    assert first("v_tasks") == {
        "flow_id": "flow",
        "owner_key": "alice",
        "task_id": "task",
        "run_id": "run",
        "runtime": "subagent",
        "status": "queued",
        "task": "classify it",
        "attempt": None,
        "result_json": None,
        "failure": None,
        "waits_for": None,
        "prompt": None,
        "deadline": None,
    }
    assert first("v_history") == {
        "flow_id": "flow",
        "owner_key": "alice",
        "seq": 1,
        "position": 1,
        "revision": 1,
        "at": "2027-01-15 08:00:00",
        "type": "flow.updated",
        "actor": "owner",
        "changed": None,
    }


async def test_waits_and_updates_are_views_for_people_and_show_no_token(
    store: SqliteStore, db: Path
) -> None:
    flow = await put(store)
    wait = wait_of(
        "digest",
        token="secret",
        key=Raw(b'{"ticket":7}'),
        prompt="Which team?",
        deadline_at=NOW + 60_000,
    )
    await put_task(store, flow, "wait", runtime="signal", run_id="ask", wait=wait)
    update = await put_update(
        store, flow, "done", bucket="daily", due_at=NOW + 1000, attempt=2, failure="no answer"
    )

    with closing(sqlite3.connect(db)) as connection:
        connection.row_factory = sqlite3.Row
        [task] = map(dict, connection.execute("SELECT * FROM v_tasks"))
        [told] = map(dict, connection.execute("SELECT * FROM v_updates"))

    assert (task["runtime"], task["status"], task["run_id"]) == ("signal", "queued", "ask")
    assert (task["waits_for"], task["prompt"]) == ('{"ticket":7}', "Which team?")
    assert task["deadline"] == "2027-01-15 08:01:00"
    assert told == {
        "flow_id": "flow",
        "owner_key": "alice",
        "slot": "done",
        "status": "pending",
        "kind": "notice",
        "text": "It goes on.",
        "attempt": 2,
        "failure": "no answer",
        "bucket": "daily",
        "idempotency_key": update.idempotency_key,
        "created": "2027-01-15 08:00:00",
        "due": "2027-01-15 08:00:01",
        "delivered": None,
    }
    assert "secret" not in f"{task}{told}"


async def test_one_bad_row_does_not_blind_the_views(store: SqliteStore, db: Path) -> None:
    await put(store, "good")
    write = creates(flow_of(store.next_key(), "bad"))
    assert write.flow is not None
    await store.commit([replace(write, flow=write.flow._replace(doc="{"))])

    good = await put(store, "told")
    row = codec.update_row(update_of(store.next_key(), good), fresh=True)._replace(doc="{")
    await store.commit([FlowWrite(None, [], [], updates=[row])])

    rows = plain(db, "SELECT flow_id, goal FROM v_flows ORDER BY flow_id")

    assert rows == [("bad", None), ("good", "a goal"), ("told", "a goal")]
    assert plain(db, "SELECT flow_id, text FROM v_updates") == [("told", None)]


async def test_every_record_is_text_any_tool_can_read(store: SqliteStore, db: Path) -> None:
    flow = await put(store, goal="é 👩🏽‍🚀")
    await put_task(store, flow, "task")

    await put_signal(store, wait_key="k", payload=Raw(b'"\xc3\xa9"'))
    await put_update(store, flow, text="é 👩🏽‍🚀")

    for table in TABLES:
        rows = plain(db, f"SELECT typeof(doc), json_valid(doc) FROM {table}")
        assert set(rows) == {("text", 1)}


# ---- upkeep -----------------------------------------------------------------------------------------

MEGABYTE = Raw(b'"' + b"x" * 1_000_000 + b'"')


async def fill(store: SqliteStore, megabytes: int) -> None:
    await store.commit(
        [
            creates(flow_of(store.next_key(), f"{store.next_key()}", state_json=MEGABYTE))
            for _ in range(megabytes)
        ]
    )


async def test_the_log_is_folded_in_when_idle_past_a_size(
    store: SqliteStore, disk: Disk, db: Path
) -> None:
    await put(store)
    disk.statements.clear()
    await store.upkeep(idle=True)
    assert disk.ran("PRAGMA wal_checkpoint") == 0

    await fill(store, 18)
    await store.upkeep(idle=False)
    assert disk.ran("PRAGMA wal_checkpoint") == 0
    await store.upkeep(idle=True)
    assert disk.ran("PRAGMA wal_checkpoint") == 1

    await store.upkeep(idle=True)
    assert disk.ran("PRAGMA wal_checkpoint") == 1
    await put(store, "after")
    assert Path(f"{db}-wal").stat().st_size < 5_000_000
    assert len(await flow_ids(store)) == 20


async def test_the_log_is_folded_in_when_busy_past_a_larger_size(
    store: SqliteStore, disk: Disk
) -> None:
    await fill(store, 68)
    disk.statements.clear()

    await store.upkeep(idle=False)

    assert disk.ran("PRAGMA wal_checkpoint") == 1


async def test_a_checkpoint_that_fails_hurts_nobody(store: SqliteStore, disk: Disk) -> None:
    await fill(store, 18)
    disk.statements.clear()
    fault = disk.fail("PRAGMA wal_checkpoint")

    await store.upkeep(idle=True)

    assert fault.fired == 1
    await put(store, "after")
    await store.upkeep(idle=True)
    assert disk.ran("PRAGMA wal_checkpoint") == 2


async def test_upkeep_of_a_closed_store_does_nothing(db: Path) -> None:
    store = TendedStore(db)
    await store.upkeep(idle=True)
    await store.open()
    await put(store)
    await store.aclose()

    await store.upkeep(idle=True)

    assert not Path(f"{db}-wal").exists()


async def test_a_log_that_a_foreign_reader_keeps_from_being_folded_in_is_told_once_per_doubling(
    store: SqliteStore, db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[int]:
        return [record.log_bytes for record in caplog.records if "log_grows" in record.message]

    for name, size in (("_WAL_IDLE", 50_000), ("_WAL_BUSY", 50_000)):
        monkeypatch.setattr(sqlite, name, size)
    kept = []
    with closing(sqlite3.connect(db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM flows").fetchall()
        for _ in range(16):
            await store.commit(
                [creates(flow_of(store.next_key(), f"{store.next_key()}", state_json=LARGE))]
            )
            await store.upkeep(idle=False)
            kept.append(Path(f"{db}-wal").stat().st_size)
        while_kept = told()
        reader.execute("ROLLBACK")
    for _ in range(3):
        await put(store, f"after-{store.next_key()}")
        await store.upkeep(idle=True)

    assert max(kept) > 1_600_000
    assert len(while_kept) == 4
    assert all(size > 200_000 * 2**n for n, size in enumerate(while_kept))
    assert told() == while_kept
    assert all(record.levelname == "WARNING" for record in caplog.records)
    assert Path(f"{db}-wal").stat().st_size < 5_000_000


LARGE = Raw(b'"' + b"x" * 120_000 + b'"')
