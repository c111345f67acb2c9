"""A SQLite connection and the thread it lives on: whole functions are sent there, one after another.

aiosqlite hops to the thread for each statement; here a transaction is one hop, so nothing that happens on the
event loop can come between its statements.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import aiosqlite
import anyio

T = TypeVar("T")


class Worker(Protocol):
    """A connection, and whatever runs functions on it one after another."""

    @classmethod
    async def connect(cls, connector: Callable[[], sqlite3.Connection]) -> Worker:
        """A connection whose connector has run."""
        ...

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(connection, *args)`. Cancelling the caller does not stop the function."""
        ...

    async def close(self) -> None:
        """Run what waits, and close the connection."""
        ...


class WorkerConnection(aiosqlite.Connection):
    """A connection whose thread runs whole functions: one hop for a transaction, not one for a statement."""

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, iter_chunk_size=64)
        # A runtime nobody closed must not keep the process from ending; to the file it is a crash like any.
        self._thread.daemon = True

    @classmethod
    async def connect(cls, connector: Callable[[], sqlite3.Connection]) -> WorkerConnection:
        """A connection whose connector has run, on its own thread.

        A cancelled caller waits for the connector all the same: what it made must not be left to nobody.
        """
        connection = cls(connector)
        opening = asyncio.ensure_future(_await(connection))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await asyncio.wait({opening})
                if not opening.cancelled() and opening.exception() is None:
                    await connection.close()
            raise
        except Exception as error:
            if connection._thread.ident is None:
                raise OSError(errno.EAGAIN, "no thread can be started") from error
            # The connector has returned, so its thread is about to end; nothing of it should outlast us.
            connection._thread.join()
            raise
        return connection

    async def close(self) -> None:
        """Run what waits, close the connection, and see its thread end."""
        await super().close()
        # It has answered already and only has to return.
        self._thread.join()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(connection, *args)` on the connection's thread.

        Cancelling the caller does not stop the function.
        """
        # aiosqlite logs what it runs, at DEBUG: a closure shows nothing of the rows it carries.
        result: T = await self._execute(lambda: function(self._conn, *args))  # type: ignore[no-untyped-call]
        return result


async def _await(connection: aiosqlite.Connection) -> None:
    await connection
