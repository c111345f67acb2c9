"""The SQLite store: one file, one writer, group commit.

Theory of operation. Two connections, each on its own worker thread. The writer runs whole batches, one
function call each, and is the only connection that ever writes or checkpoints: SQLite releases before 3.51.3
can corrupt a WAL file when two connections do. The reader is read-only and never checkpoints.

Ownership is twofold: a lock on a side file, freed by the kernel at death, and an epoch inside the database that
every transaction checks, so that a process that was frozen and overtaken finds out before it writes.

When COMMIT itself fails on the disk nobody knows whether the batch is there. The writer is then opened anew,
the commit counter is read back, and one more small transaction nails what was found: whatever stale frames
the failed commit left in the WAL are overwritten. Only then is the caller told yes or no.

A file is inspected before it is touched. One of moderate size is checked whole; of a larger one the rows are
counted, and every read checks what it reads.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar

import anyio
import msgspec

from flowstead.errors import (
    CommitFailed,
    OutcomeUnknown,
    RuntimeClosed,
    StoreInUse,
    StoreUnusable,
    WriteConflict,
)
from flowstead.log import get_logger
from flowstead.model.event import Event
from flowstead.model.flow import Flow, FlowKey, StoredFlow
from flowstead.model.task import StoredTask, Task, TaskSummary
from flowstead.model.update import StoredUpdate, Update
from flowstead.store import schema, sqlite_outbox, sqlite_reads, sqlite_unreadable, sqlite_waits
from flowstead.store.codec import FlowWrite
from flowstead.store.lock import Holder, OwnerLock, this_process
from flowstead.store.port import (
    Due,
    FlowQuery,
    Scope,
    Snapshot,
    Unreadable,
    WaitLookup,
    WaitsFound,
)
from flowstead.store.sqlite_writes import (
    CommitUnclear,
    ConnectionSpoiled,
    Overtaken,
    roll_back,
    write_batch,
)
from flowstead.store.worker import Worker, WorkerConnection

T = TypeVar("T")
Durability: TypeAlias = Literal["full", "normal"]
Connect: TypeAlias = Callable[..., sqlite3.Connection]

log = get_logger(__name__)

_BUSY_TIMEOUT_SECONDS: Final = 5.0
_HEADER_BYTES: Final = 100
_WAL_KEPT: Final = 4 * 1024 * 1024
_WAL_IDLE: Final = 16 * 1024 * 1024
_WAL_BUSY: Final = 64 * 1024 * 1024
_CHECKED_WHOLE: Final = 32 * 1024 * 1024


class SqliteStore:
    """A store in one SQLite file.

    Args:
        path: The file; made with mode 0600 if it is not there. Its directory must exist.
        durability: `full` survives a power cut, `normal` survives the death of the process and may lose the
            newest commits in a power cut, never corrupting the file.
        connect: How connections are made; for tests that need a failing disk.
        worker: What runs them; for tests that need no threads.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Durability = "full",
        connect: Connect = sqlite3.connect,
        worker: type[Worker] | None = None,
    ) -> None:
        if durability not in ("full", "normal"):
            raise ValueError(f"durability must be 'full' or 'normal', not {durability!r}.")
        self._path = Path(path).absolute()
        self._wal = self._path.with_name(self._path.name + "-wal")
        self._synchronous = durability.upper()
        self._connect = connect
        self._worker = worker or WorkerConnection
        self._lock = OwnerLock(self._path)
        self._writer: Worker | None = None
        self._reader: Worker | None = None
        self._is_open = False
        self._epoch = 0
        self._key = 0
        self._checkpointed = True
        self._tolerated = 0
        self._lost: StoreInUse | None = None

    @property
    def name(self) -> str:
        return self._path.name

    # ---- ownership --------------------------------------------------------------------------------

    async def open(self, *, takeover: bool = False) -> None:
        if self._is_open:
            raise StoreInUse(self.name, "this very runtime")
        self._is_open, self._lost = True, None
        try:
            self._writer = await self._worker.connect(partial(self._open_writer, takeover))
            self._reader = await self._worker.connect(self._open_reader)
        except BaseException as error:
            await self.aclose()
            if isinstance(error, OSError):
                raise _unusable(self.name, error) from error
            raise

    async def aclose(self) -> None:
        self._is_open = False
        closing = asyncio.ensure_future(self._let_go())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            # Half closed, a connection would be left to nobody.
            with anyio.CancelScope(shield=True):
                await asyncio.wait({closing})
            raise

    async def _let_go(self) -> None:
        reader, self._reader = self._reader, None
        writer, self._writer = self._writer, None
        try:
            # The reader first: the last connection to go folds the log back into the file.
            for connection in (reader, writer):
                if connection is not None:
                    await connection.close()
        finally:
            self._lock.release()

    def _open_writer(self, takeover: bool) -> sqlite3.Connection:
        try:
            if not self._path.parent.is_dir():
                raise StoreUnusable(self.name, f"its directory {self._path.parent} does not exist.")
            self._lock.acquire(takeover=takeover)
            self._look_or_make(takeover)
            connection = self._connect_writer()
            try:
                if schema.prepare(connection, self.name):
                    # Without its log a file must never pass for one that nobody has used yet.
                    _checkpoint(connection)
                self._take_ownership(connection)
                self._lock.confirm()
            except BaseException:
                connection.close()
                raise
        except BaseException as error:
            self._lock.release()
            raise _unusable(self.name, error) from error
        return connection

    def _look_or_make(self, takeover: bool) -> None:
        """Look before anything is touched: a file that is refused stays as it is, log and all.

        A new file is private from its first moment, and nothing ever starts empty over what was left behind.
        """
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            size = None
        if not size and self._wal.exists() and self._wal.stat().st_size:
            raise StoreUnusable(
                self.name,
                f"the database is missing or empty, but its log {self._wal.name} is not."
                " Restore the database beside it, or move the log away.",
            )
        if size is None:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        elif 0 < size < _HEADER_BYTES:
            raise StoreUnusable(self.name, "it is damaged (too short). It was left as it is.")
        elif size:
            if self._wal.exists() and not takeover:
                self._compare_with_log()
            # Without a log there is nothing to recover, and nothing need be made to look.
            onlooker = self._connect_to("ro" if self._wal.exists() else "ro&immutable=1")
            try:
                self._inspect(onlooker, size)
            finally:
                onlooker.close()

    def _inspect(self, onlooker: sqlite3.Connection, size: int) -> None:
        onlooker.execute("PRAGMA trusted_schema = OFF")
        onlooker.execute("PRAGMA cell_size_check = ON")
        log_size = self._wal.stat().st_size if self._wal.exists() else 0
        onlooker.execute("BEGIN")
        if schema.check(onlooker, self.name):
            # What a crash cuts off is in the log; SQLite would take the rest of the last page for zeros.
            if not log_size and size % int(onlooker.execute("PRAGMA page_size").fetchone()[0]):
                raise StoreUnusable(self.name, "it is damaged (cut short). It was left as it is.")
            schema.inspect(onlooker, self.name, whole=size + log_size <= _CHECKED_WHOLE)
        onlooker.execute("ROLLBACK")

    def _compare_with_log(self) -> None:
        """Refuse a log that belongs to another file: SQLite would lay its pages over this one's.

        Not in a takeover: closing the second connection would drop locks of an owner in this very process.
        """
        ids = []
        for mode in ("ro", "ro&immutable=1"):
            connection = self._connect_to(mode)
            try:
                ids.append(schema.file_id(connection))
            finally:
                connection.close()
        if None not in ids and ids[0] != ids[1]:
            raise StoreUnusable(
                self.name,
                f"the log {self._wal.name} belongs to another file. Put its own log in its place, or"
                " move this one away. Neither was changed.",
            )

    def _connect_to(self, mode: str) -> sqlite3.Connection:
        """A connection to a file that is there; SQLite must never make one by itself."""
        connection = self._connect(
            f"{self._path.as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.text_factory = bytes
        return connection

    def _connect_writer(self) -> sqlite3.Connection:
        connection = self._connect_to("rw")
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != b"wal":
                raise StoreUnusable(
                    self.name, "SQLite cannot use a write-ahead log here (a network file system?)."
                )
            connection.execute("PRAGMA synchronous = " + self._synchronous)
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("PRAGMA journal_size_limit = " + str(_WAL_KEPT))
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _take_ownership(self, connection: sqlite3.Connection) -> None:
        """Raise the epoch: from here on every earlier owner is refused by its own transactions."""
        holder = msgspec.json.encode(this_process()).decode()
        try:
            connection.execute("BEGIN IMMEDIATE")
            taken = connection.execute(
                "UPDATE ownership SET epoch = epoch + 1, holder = ?, last_position ="
                " max(last_position, (SELECT ifnull(max(position), 0) FROM events)) WHERE id = 1",
                (holder,),
            )
            if taken.rowcount != 1:
                raise StoreUnusable(self.name, "its ownership row is missing.")
            [(self._epoch,)] = connection.execute("SELECT epoch FROM ownership").fetchall()
            (self._key,) = connection.execute(
                "SELECT max((SELECT ifnull(max(key), 0) FROM flows),"
                " (SELECT ifnull(max(key), 0) FROM tasks),"
                " (SELECT ifnull(max(key), 0) FROM signals),"
                " (SELECT ifnull(max(key), 0) FROM updates))"
            ).fetchone()
            connection.execute("COMMIT")
        except BaseException:
            roll_back(connection)
            raise

    def _open_reader(self) -> sqlite3.Connection:
        try:
            connection = self._connect_to("ro")
            try:
                connection.execute("PRAGMA query_only = ON")
                connection.execute("PRAGMA wal_autocheckpoint = 0")
                connection.execute("PRAGMA trusted_schema = OFF")
            except BaseException:
                connection.close()
                raise
        except sqlite3.Error as error:
            raise _unusable(self.name, error) from error
        return connection

    # ---- writing ----------------------------------------------------------------------------------

    def next_key(self) -> int:
        self._key += 1
        return self._key

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        if self._lost is not None:
            raise self._lost
        if not self._is_open:
            raise CommitFailed(f"{self.name} is closed. Nothing was written.")
        self._checkpointed = False
        try:
            writer = self._writer or await self._open_again()
            return await writer.run(write_batch, self._epoch, writes)
        except Overtaken:
            raise await self._step_down() from None
        except CommitUnclear as unclear:
            return await self._settle(unclear)
        except sqlite3.IntegrityError as error:
            raise WriteConflict(f"{self.name} refused a row: {error}.") from error
        except ConnectionSpoiled as error:
            await self._drop_writer()
            raise CommitFailed(f"{self.name} was not written: {error}.") from error
        except (sqlite3.Error, OverflowError, OSError, StoreUnusable) as error:
            raise CommitFailed(f"{self.name} was not written: {error}.") from error

    async def _step_down(self) -> StoreInUse:
        """Another runtime raised the epoch. From now on nothing is written through this store."""
        taker = "another runtime, which took it over"
        try:
            assert self._reader is not None
            row = await self._reader.run(_read_holder)
            taker = f"process {msgspec.json.decode(row, type=Holder).pid}, which took it over"
        except (sqlite3.Error, msgspec.MsgspecError):
            pass
        self._lost = StoreInUse(self.name, taker)
        return self._lost

    async def _settle(self, unclear: CommitUnclear) -> int:
        """Find out whether a commit that failed on the disk is there, and make the answer last."""
        await self._drop_writer()
        try:
            writer = await self._open_again()
            commits = await writer.run(_nail, self._epoch)
        except Overtaken:
            raise await self._step_down() from unclear
        except (sqlite3.Error, OSError, StoreUnusable) as error:
            await self._drop_writer()
            raise OutcomeUnknown(
                f"{self.name} failed during a commit ({unclear.__cause__}) and could not be read back"
                f" ({error}). Read the flow again before retrying."
            ) from unclear
        if commits < unclear.number:
            raise CommitFailed(f"{self.name} was not written: {unclear.__cause__}.") from unclear
        return unclear.first_position

    async def _open_again(self) -> Worker:
        """A new writer after the disk failed."""
        self._writer = await self._worker.connect(self._connect_writer)
        return self._writer

    async def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                await writer.close()
        except sqlite3.Error:
            pass

    async def upkeep(self, *, idle: bool) -> None:
        if self._checkpointed or self._writer is None or self._lost is not None:
            return
        try:
            size = self._wal.stat().st_size
            if size > (_WAL_IDLE if idle else _WAL_BUSY):
                await self._writer.run(_checkpoint)
                self._checkpointed = True
        except (OSError, sqlite3.Error):
            # The log keeps everything; it can be folded back another time.
            return
        self._watch_log(size)

    def _watch_log(self, size: int) -> None:
        """Tell, once per doubling, that somebody's long read keeps the log from being folded back."""
        if size <= 4 * _WAL_BUSY:
            self._tolerated = 4 * _WAL_BUSY
        elif size > self._tolerated:
            while size > self._tolerated:
                self._tolerated = max(4 * _WAL_BUSY, 2 * self._tolerated)
            log.warning(
                "store.log_grows",
                store=self.name,
                log_bytes=size,
                usual_bytes=_WAL_BUSY,
                cause="a reader that does not end",
            )

    # ---- reading ----------------------------------------------------------------------------------

    async def _read(self, function: Callable[..., T], *args: Any) -> T:
        if self._reader is None:
            raise RuntimeClosed(f"{self.name} is closed.")
        try:
            return await self._reader.run(function, *args)
        except sqlite3.DatabaseError as error:
            raise StoreUnusable(self.name, f"a read failed: {error}.") from error

    async def _read_as_owner(self, function: Callable[..., T], *args: Any) -> T:
        """Read what is the owner's alone to act on."""
        try:
            return await self._read(_read_fenced, self._epoch, function, args)
        except Overtaken:
            raise await self._step_down() from None

    async def load(self, keys: Sequence[FlowKey]) -> list[Snapshot | Exception | None]:
        return await self._read(sqlite_reads.load, keys)

    async def find_flow(self, scope: Scope, flow_id: str) -> Flow | None:
        return await self._read(sqlite_reads.find_flow, scope, flow_id)

    async def find_by_idempotency_key(self, owner_key: str, key: str) -> FlowKey | None:
        return await self._read(sqlite_reads.find_by_idempotency_key, owner_key, key)

    async def list_flows(self, scope: Scope, query: FlowQuery, limit: int) -> list[Flow]:
        return await self._read(sqlite_reads.list_flows, scope, query, limit)

    async def key_of(self, scope: Scope, flow_id: str) -> int | None:
        return await self._read(sqlite_reads.key_of, scope, flow_id)

    async def find_task(self, scope: Scope, task_id: str) -> tuple[FlowKey, Task] | None:
        return await self._read(sqlite_reads.find_task, scope, task_id)

    async def list_tasks(
        self,
        scope: Scope,
        flow_id: str,
        *,
        statuses: Collection[str] = (),
        task_ids: Collection[str] | None = None,
    ) -> list[Task]:
        return await self._read(sqlite_reads.list_tasks, scope, flow_id, statuses, task_ids)

    async def summarize(self, scope: Scope, flow_id: str) -> TaskSummary | None:
        return await self._read(sqlite_reads.summarize, scope, flow_id)

    async def history(
        self, scope: Scope, flow_id: str, *, after_seq: int, limit: int
    ) -> list[Event]:
        return await self._read(sqlite_reads.history, scope, flow_id, after_seq, limit)

    async def last_seq(self, scope: Scope, flow_id: str) -> int:
        return await self._read(sqlite_reads.last_seq, scope, flow_id)

    async def events_after(self, scope: Scope, position: int, limit: int) -> list[Event]:
        return await self._read(sqlite_reads.events_after, scope, position, limit)

    async def last_position(self) -> int:
        return await self._read(sqlite_reads.last_position)

    async def list_due(self, *, after: int, until: int) -> list[Due]:
        return await self._read(sqlite_reads.list_due, after, until)

    async def next_due(self, *, after: int) -> int | None:
        return await self._read(sqlite_reads.next_due, after)

    async def list_unfinished(
        self, controllers: Collection[str], *, after_key: int, limit: int
    ) -> list[tuple[int, FlowKey]]:
        return await self._read(sqlite_reads.list_unfinished, controllers, after_key, limit)

    async def count_by_controller(self) -> dict[str, int]:
        return await self._read(sqlite_reads.count_by_controller)

    async def look_up_waits(self, asked: Sequence[WaitLookup]) -> list[WaitsFound]:
        return await self._read(sqlite_waits.look_up_waits, asked)

    async def list_kept(self, *, now: int) -> list[tuple[str, int]]:
        return await self._read(sqlite_waits.list_kept, now)

    async def find_token(self, token: str) -> tuple[FlowKey, str | None] | None:
        return await self._read(sqlite_waits.find_token, token)

    async def list_met(
        self, *, after_key: int, limit: int, now: int
    ) -> list[tuple[int, FlowKey, str]]:
        return await self._read(sqlite_waits.list_met, after_key, limit, now)

    async def list_open_waits(
        self, scope: Scope, *, flow_id: str | None, after_key: int, limit: int
    ) -> list[StoredFlow | StoredTask]:
        return await self._read(sqlite_waits.list_open_waits, scope, flow_id, after_key, limit)

    async def list_updates_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        return await self._read_as_owner(sqlite_outbox.list_updates_due, until, limit)

    async def list_digests_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        return await self._read_as_owner(sqlite_outbox.list_digests_due, until, limit)

    async def next_update_due(self, *, after: int = -1) -> int | None:
        return await self._read(sqlite_outbox.next_update_due, after)

    async def list_updates(
        self,
        scope: Scope,
        *,
        flow_id: str | None,
        statuses: Collection[str],
        after_key: int,
        limit: int,
    ) -> list[Update]:
        return await self._read(
            sqlite_outbox.list_updates, scope, flow_id, statuses, after_key, limit
        )

    async def list_unreadable(self) -> list[Unreadable]:
        return await self._read(sqlite_unreadable.list_unreadable)


def _read_holder(connection: sqlite3.Connection) -> bytes:
    holder: bytes = connection.execute("SELECT holder FROM ownership").fetchone()[0]
    return holder


def _read_fenced(
    connection: sqlite3.Connection, epoch: int, function: Callable[..., T], args: tuple[Any, ...]
) -> T:
    """Read, and then see that the epoch is still ours: so it was when what was found was written."""
    found = function(connection, *args)
    if connection.execute("SELECT epoch FROM ownership WHERE id = 1").fetchall() != [(epoch,)]:
        raise Overtaken
    return found


def _nail(connection: sqlite3.Connection, epoch: int) -> int:
    """Commit a row that changes nothing, so that what the file says now is what it will say after a crash.

    Answers how many batches the file has seen.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        nailed = connection.execute(
            # It has to change a byte: SQLite leaves a page alone that stays as it is, and commits nothing.
            "UPDATE ownership SET holder = CASE holder WHEN rtrim(holder) THEN holder || ' '"
            " ELSE rtrim(holder) END WHERE id = 1 AND epoch = ?",
            (epoch,),
        )
        if nailed.rowcount != 1:
            raise Overtaken
        [(commits,)] = connection.execute("SELECT commits FROM ownership").fetchall()
        connection.execute("COMMIT")
    except BaseException:
        roll_back(connection)
        raise
    return int(commits)


def _checkpoint(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def _unusable(name: str, error: BaseException) -> BaseException:
    """What went wrong in opening, as one of our own errors where it was the file's fault."""
    if isinstance(error, OSError):
        return StoreUnusable(name, f"{error.strerror or error}.")
    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreInUse(name, "a process that is in the middle of a transaction")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreUnusable(name, f"it is damaged ({error}). It was left as it is.")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreUnusable(name, f"it cannot be written ({error}).")
    return StoreUnusable(name, f"{error}.")
