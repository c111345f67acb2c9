"""The disk that fails on request does what it is told, and only that: shown with plain sqlite3."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.disk.vfs import Disk, Fault, Operation, Record
from tests.disk.worker import DiskZygote

PAGE = 4096
FRAME = 24 + PAGE


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as disk:
        yield disk


def prepared(disk: Disk, path: Path) -> sqlite3.Connection:
    """A connection with one table, in WAL mode, that syncs at each commit."""
    connection = disk.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE t (x)")
    return connection


def insert(connection: sqlite3.Connection, value: int) -> None:
    connection.execute("INSERT INTO t VALUES (?)", (value,))


def found(path: Path) -> list[int]:
    """What another connection finds, through the real disk."""
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT x FROM t ORDER BY x")]


def test_what_sqlite_asks_of_each_file_is_counted(disk: Disk, db: Path) -> None:
    with closing(prepared(disk, db)) as connection:
        before = {kind: disk.count(kind, "wal") for kind in ("write", "sync")}
        insert(connection, 1)
        after = {kind: disk.count(kind, "wal") for kind in ("write", "sync")}

    assert after == {"write": before["write"] + 2, "sync": before["sync"] + 1}
    assert disk.count("open", "db") == disk.count("close", "db") == 1
    assert disk.count("open", "wal") == disk.count("delete", "wal") == 1
    assert disk.count("write", "db") > 0
    assert disk.count("delete", "journal") == 1
    assert disk.count() == len(disk.operations)
    assert disk.journal == []


def test_the_journal_of_a_disk_makes_the_same_files_again(disk: Disk, db: Path) -> None:
    disk.recording = True
    connection = prepared(disk, db)
    insert(connection, 1)
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    insert(connection, 2)
    disk.mark("two")
    insert(connection, 3)

    files: dict[str, bytearray] = {}
    for record in disk.journal:
        apply(files, record)

    assert files["db"] == db.read_bytes()
    assert files["wal"] == db.with_name(db.name + "-wal").read_bytes()
    kinds = [(record.kind, record.note) for record in disk.journal]
    assert kinds[-4:] == [("mark", "two"), ("write", None), ("write", None), ("sync", None)]
    connection.close()
    assert disk.journal[-1].kind == "delete"


def apply(files: dict[str, bytearray], record: Record) -> None:
    if record.kind == "create":
        files[record.file] = bytearray()
    elif record.kind == "write":
        file = files[record.file]
        file.extend(bytes(max(0, record.offset - len(file))))
        file[record.offset : record.offset + len(record.data)] = record.data
    elif record.kind == "truncate":
        del files[record.file][record.offset :]


@pytest.mark.parametrize(
    ("kind", "file", "code", "name"),
    [
        ("sync", "wal", "EIO", "SQLITE_IOERR_FSYNC"),
        ("write", "wal", "EIO", "SQLITE_IOERR_WRITE"),
        ("write", "wal", "ENOSPC", "SQLITE_FULL"),
        ("write", "wal", 4874, "SQLITE_IOERR_SHMSIZE"),
        ("write", "wal", "EROFS", "SQLITE_READONLY"),
    ],
)
def test_a_refused_operation_fails_the_commit_and_only_that(
    disk: Disk, db: Path, kind: Any, file: Any, code: str | int, name: str
) -> None:
    with closing(prepared(disk, db)) as connection:
        fault = disk.fail(kind, file, code=code, times=1)

        with pytest.raises(sqlite3.Error) as raised:
            insert(connection, 1)

        assert raised.value.sqlite_errorname == name
        assert fault.fired == 1
        insert(connection, 2)
    assert found(db) == [2]


@pytest.mark.parametrize(("file", "code"), [("db", "EMFILE"), ("wal", "EIO")])
def test_a_file_that_cannot_be_opened(disk: Disk, db: Path, file: Any, code: str) -> None:
    fault = disk.fail("open", file, code=code)

    with pytest.raises(sqlite3.OperationalError) as raised:
        prepared(disk, db)

    assert raised.value.sqlite_errorname == "SQLITE_CANTOPEN"
    assert fault.fired >= 1


def test_a_delete_and_a_truncate_that_are_refused_leave_the_file_as_it_is(
    disk: Disk, db: Path
) -> None:
    log = db.with_name(db.name + "-wal")
    connection = prepared(disk, db)
    insert(connection, 1)
    size = log.stat().st_size
    truncate, delete = disk.fail("truncate", "wal"), disk.fail("delete", "wal")

    with pytest.raises(sqlite3.OperationalError) as raised:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()

    assert raised.value.sqlite_errorname == "SQLITE_IOERR_TRUNCATE"
    assert (truncate.fired, delete.fired) == (1, 1)
    assert log.stat().st_size == size
    assert found(db) == [1]


@pytest.mark.parametrize(
    ("done", "written"), [(False, ["write", "write"]), (True, ["write", "write", "sync"])]
)
def test_a_failed_sync_was_carried_out_or_not(
    disk: Disk, db: Path, done: bool, written: list[str]
) -> None:
    with closing(prepared(disk, db)) as connection:
        disk.recording = True
        fault = disk.fail("sync", "wal", code="EIO", done=done, times=1)

        with pytest.raises(sqlite3.OperationalError):
            insert(connection, 1)

        assert [record.kind for record in disk.journal] == written
    assert fault.fired == 1


def test_a_torn_write_leaves_its_first_bytes_in_the_file(disk: Disk, db: Path) -> None:
    log = db.with_name(db.name + "-wal")
    with closing(prepared(disk, db)) as connection:
        size = log.stat().st_size
        fault = disk.fail("write", "wal", torn=512, at=2)

        with pytest.raises(sqlite3.OperationalError) as raised:
            insert(connection, 1)

        assert raised.value.sqlite_errorname == "SQLITE_IOERR_WRITE"
        assert log.stat().st_size == size + 24 + 512
    assert fault.fired == 1


def test_a_lying_sync_says_yes_and_is_not_in_the_journal(disk: Disk, db: Path) -> None:
    with closing(prepared(disk, db)) as connection:
        disk.recording = True
        fault = disk.fail("sync", "wal", lie=True)

        insert(connection, 1)

        assert fault.fired == 1
        assert [record.kind for record in disk.journal] == ["write", "write"]


def test_a_lying_write_is_noticed_only_by_the_next_reader(disk: Disk, db: Path) -> None:
    with closing(prepared(disk, db)) as connection:
        fault = disk.fail("write", "wal", lie=True)

        insert(connection, 1)

        disk.heal()
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            found(db)
    assert fault.fired == 2


@pytest.mark.parametrize("fault", [{"flip": 8 * (PAGE - 1)}, {"short": 100}], ids=str)
def test_what_is_read_wrongly_is_told_to_nobody(
    disk: Disk, db: Path, fault: dict[str, Any]
) -> None:
    with closing(prepared(disk, db)) as connection:
        insert(connection, 7)

    with closing(disk.connect(db)) as connection:
        connection.execute("SELECT * FROM sqlite_schema").fetchall()
        armed = disk.fail("read", "db", **fault)
        value = connection.execute("SELECT x FROM t").fetchone()

    assert armed.fired >= 1
    assert value != (7,)
    assert found(db) == [7]


def test_a_bit_that_turns_over_on_its_way_to_the_disk(disk: Disk, db: Path) -> None:
    connection = prepared(disk, db)
    insert(connection, 1)
    fault = disk.fail("write", "db", flip=0, at=1)
    connection.close()

    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        found(db)
    assert fault.fired == 1


def test_a_read_that_fails(disk: Disk, db: Path) -> None:
    with closing(prepared(disk, db)) as connection:
        insert(connection, 1)

    with closing(disk.connect(db)) as connection:
        connection.execute("SELECT * FROM sqlite_schema").fetchall()
        fault = disk.fail("read", "db")
        with pytest.raises(sqlite3.OperationalError) as raised:
            connection.execute("SELECT x FROM t").fetchall()

    assert fault.fired == 1
    assert raised.value.sqlite_errorname == "SQLITE_IOERR_READ"
    assert found(db) == [1]


def test_a_fault_strikes_at_a_number_after_some_or_a_few_times() -> None:
    write = Operation("write", "wal")
    at = Fault("write", "wal", at=3)
    after = Fault("any", "any", after=2)
    times = Fault("write", "any", after=1, times=2)

    assert [at.strikes(write) for _ in range(5)] == [False, False, True, False, False]
    assert [after.strikes(write) for _ in range(5)] == [False, False, True, True, True]
    assert [times.strikes(write) for _ in range(5)] == [False, True, True, False, False]
    assert after.strikes(Operation("sync", "db"))
    assert (at.fired, after.fired, times.fired) == (1, 4, 2)
    assert not Fault("sync", "db").strikes(write)


def test_a_delay_is_called_where_the_operation_waits(disk: Disk, db: Path) -> None:
    with closing(prepared(disk, db)) as connection:
        seen: list[list[int]] = []
        fault = disk.fail("sync", "wal", delay=lambda: seen.append(found(db)), times=1)

        insert(connection, 1)

        assert fault.fired == 1
        assert seen == [[]]
        assert found(db) == [1]


def test_a_fault_of_the_disk_itself_is_an_io_error_and_raised_in_the_end(db: Path) -> None:
    disk = Disk()
    disk.__enter__()
    connection = prepared(disk, db)
    disk.fail("sync", "wal", delay=lambda: 1 / 0, times=1)

    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        insert(connection, 1)

    connection.close()
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        disk.__exit__()


def test_disks_do_not_disturb_each_other_nor_anybody_else(tmp_path: Path) -> None:
    with Disk() as one, Disk() as other:
        failing = one.fail("sync", "any")

        with closing(prepared(other, tmp_path / "other.db")) as connection:
            insert(connection, 1)
        with closing(sqlite3.connect(tmp_path / "plain.db")) as connection:
            connection.execute("CREATE TABLE t (x)")

        assert failing.fired == one.count() == 0
        assert other.count("sync") > 0
    with pytest.raises(sqlite3.OperationalError, match="no such vfs"):
        one.connect(tmp_path / "late.db")


@pytest.mark.parametrize(
    ("fault", "frames"),
    [
        ({"kind": "write", "at": 2, "kill": "before"}, 24),
        ({"kind": "write", "at": 2, "kill": "after"}, FRAME),
        ({"kind": "write", "at": 2, "kill": "after", "torn": 1024}, 24 + 1024),
        ({"kind": "sync", "at": 1, "kill": "before"}, FRAME),
    ],
    ids=["before", "after", "torn", "sync"],
)
def test_the_process_is_killed_in_the_midst_of_an_operation(
    db: Path, tmp_path: Path, fault: dict[str, Any], frames: int
) -> None:
    with DiskZygote() as zygote:
        child = zygote.fork("one_insert", tmp_path / "journal", path=str(db), fault=fault)

        assert child.wait() == -9, child.facts()

    [told] = child.facts()
    assert db.with_name(db.name + "-wal").stat().st_size == told["size"] + frames
