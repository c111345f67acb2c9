"""The ceiling: one event loop, one thread with a bare sqlite3 connection, group commit, and nothing else.

It has the schema, the pragmas, the statements and the checkpoints of the store, and is handed rows that are
ready to be written. Whatever was queued while the last commit ran goes into the next one; one hop to the loop
answers a whole batch. What it leaves out is the runtime: no rules, no mailboxes, no encoding, no supervision.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

from flowstead.store import schema
from flowstead.store.codec import FlowWrite
from flowstead.store.sqlite import Durability
from flowstead.store.sqlite_writes import write_batch

_WAL_KEPT: Final = 4 * 1024 * 1024
_WAL_IDLE: Final = 16 * 1024 * 1024
_WAL_BUSY: Final = 64 * 1024 * 1024
_FIND: Final = "SELECT key, revision, doc FROM flows WHERE owner_key = ? AND flow_id = ?"

Found: TypeAlias = tuple[Any, ...]
Waiting: TypeAlias = tuple[Any, asyncio.Future[Any]]


def connect(path: Path, durability: Durability) -> sqlite3.Connection:
    """A writing connection set up like the store's; an empty file is given the store's schema."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.text_factory = bytes
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute(f"PRAGMA synchronous = {durability}")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT}")
    schema.prepare(connection, path.name)
    return connection


class Ceiling:
    """Rows in, futures out: `async with Ceiling(path, durability) as ceiling: await ceiling.submit(write)`."""

    def __init__(self, path: Path, durability: Durability) -> None:
        self._wal = path.with_name(path.name + "-wal")
        self._connection = connect(path, durability)
        (self._epoch,) = self._connection.execute("SELECT epoch FROM ownership").fetchone()
        self.commits = 0
        self._loop = asyncio.get_running_loop()
        self._writes: list[Waiting] = []
        self._reads: list[Waiting] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="ceiling", daemon=True)

    async def __aenter__(self) -> Ceiling:
        self._thread.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        self._connection.close()

    def submit(self, write: FlowWrite) -> asyncio.Future[None]:
        """Queue a write; the future is settled once it is durable."""
        future: asyncio.Future[None] = self._loop.create_future()
        with self._changed:
            self._writes.append((write, future))
            self._changed.notify()
        return future

    def find(self, owner_key: str, flow_id: str) -> asyncio.Future[Found]:
        """Queue a read of one flow's key, revision and record."""
        return self.read(_FIND, owner_key, flow_id)

    def read(self, statement: str, *values: str) -> asyncio.Future[Found]:
        """Queue a read of one row."""
        future: asyncio.Future[Found] = self._loop.create_future()
        with self._changed:
            self._reads.append(((statement, values), future))
            self._changed.notify()
        return future

    # ---- the thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            self._checkpoint()
            with self._changed:
                while not (self._writes or self._reads or self._closing):
                    self._changed.wait()
                reads, self._reads = self._reads, []
                writes, self._writes = self._writes, []
            if reads:
                self._answer(reads, self._read)
            if writes:
                self._answer(writes, self._commit)
            elif not reads:
                return

    def _checkpoint(self) -> None:
        most = _WAL_BUSY if self._writes else _WAL_IDLE
        if os.stat(self._wal).st_size > most:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _answer(self, queued: list[Waiting], run: Callable[[list[Any]], Sequence[Any]]) -> None:
        try:
            answers = run([asked for asked, _ in queued])
        except Exception as error:
            self._loop.call_soon_threadsafe(_fail, queued, error)
        else:
            self._loop.call_soon_threadsafe(_settle, queued, answers)

    def _commit(self, writes: list[FlowWrite]) -> Sequence[None]:
        self.commits += 1
        write_batch(self._connection, self._epoch, writes)
        return [None] * len(writes)

    def _read(self, wanted: list[tuple[str, tuple[str, ...]]]) -> list[Found]:
        self._connection.execute("BEGIN")
        found = [self._connection.execute(*statement).fetchone() for statement in wanted]
        self._connection.execute("COMMIT")
        return found


def _settle(queued: list[Waiting], answers: Sequence[Any]) -> None:
    for (_, future), answer in zip(queued, answers, strict=True):
        future.set_result(answer)


def _fail(queued: list[Waiting], error: Exception) -> None:
    for _, future in queued:
        future.set_exception(error)
