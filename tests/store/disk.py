"""A disk that does as it is told: connections that note what they run, fail on request, and can be held up.

Give `Disk().connect` to a `SqliteStore` as its `connect`. The connections are real ones on a real file; a
fault is raised where SQLite would raise it, before or after the statement has really run.
"""

from __future__ import annotations

import sqlite3
import threading
from typing import Any, ClassVar

import anyio.to_thread

from flowstead.store.sqlite import SqliteStore

PATIENCE = 30.0


def disk_error(code: int = sqlite3.SQLITE_IOERR_FSYNC, text: str = "disk I/O error") -> Exception:
    """An error as SQLite raises it."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


class TendedStore(SqliteStore):
    """A store that is closed after the test, see the fixture `stores_end`."""

    made: ClassVar[list[TendedStore]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)


class Fault:
    """One thing that goes wrong: `times` times, at statements that begin with `statement`."""

    def __init__(self, statement: str, error: BaseException, *, done: bool, times: float) -> None:
        self.statement = statement
        self.error = error
        self.done = done
        self.times = times
        self.fired = 0

    def strikes(self, statement: str, *, done: bool) -> bool:
        if self.done is not done or self.times <= 0 or not statement.startswith(self.statement):
            return False
        self.times -= 1
        self.fired += 1
        return True


class Gate:
    """A place where a worker thread waits until it is let through."""

    def __init__(self, statement: str) -> None:
        self.statement = statement
        self._reached = threading.Event()
        self._open = threading.Event()

    def stop_here(self) -> None:
        self._reached.set()
        assert self._open.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        assert await anyio.to_thread.run_sync(self._reached.wait, PATIENCE)


class NotedConnection(sqlite3.Connection):
    """A connection that tells its disk before and after each statement."""

    disk: Disk

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self.disk.before(sql)
        cursor = super().execute(sql, *values)
        self.disk.after(sql)
        return cursor

    def executemany(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self.disk.before(sql)
        cursor = super().executemany(sql, *values)
        self.disk.after(sql)
        return cursor


class Disk:
    """What the connections of a store have in common."""

    def __init__(self) -> None:
        self.writers: list[NotedConnection] = []
        self.readers: list[NotedConnection] = []
        self.statements: list[str] = []
        self.threads: list[threading.Thread] = []
        self._faults: list[Fault] = []
        self._gate: Gate | None = None

    def connect(self, *args: Any, **kwargs: Any) -> NotedConnection:
        self.threads.append(threading.current_thread())
        self.before("connect")
        connection = sqlite3.connect(*args, factory=NotedConnection, **kwargs)
        assert isinstance(connection, NotedConnection)
        connection.disk = self
        (self.readers if "mode=ro" in str(args[0]) else self.writers).append(connection)
        return connection

    def before(self, statement: str) -> None:
        statement = statement.lstrip()
        self.statements.append(statement)
        gate = self._gate
        if gate is not None and statement.startswith(gate.statement):
            self._gate = None
            gate.stop_here()
        self._strike(statement, done=False)

    def after(self, statement: str) -> None:
        self._strike(statement.lstrip(), done=True)

    def _strike(self, statement: str, *, done: bool) -> None:
        for fault in self._faults:
            if fault.strikes(statement, done=done):
                raise fault.error

    def fail(
        self,
        statement: str,
        error: BaseException | None = None,
        *,
        done: bool = False,
        times: float = 1,
    ) -> Fault:
        """Fail at a statement, or, with `done`, right after it has really run."""
        fault = Fault(statement, error or disk_error(), done=done, times=times)
        self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Let everything succeed from now on."""
        self._faults.clear()

    def hold(self, statement: str) -> Gate:
        """Make the next such statement wait at a gate."""
        self._gate = Gate(statement)
        return self._gate

    def ran(self, statement: str) -> int:
        """How often a statement was begun."""
        return sum(one.startswith(statement) for one in self.statements)
