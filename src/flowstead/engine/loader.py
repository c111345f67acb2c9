"""The loader: brings flows back into memory, many in one read.

The mirror image of the committer: whatever was asked for while the last read ran goes into the next one, so
ten thousand flows woken at once cost a few dozen hops to the disk thread, not ten thousand.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final, Protocol

from flowstead.errors import RuntimeClosed
from flowstead.model.flow import FlowKey
from flowstead.store.port import Snapshot, Store

_BATCH: Final = 256
_OVER: Final = "The event loop ended under the runtime: nothing is read any more."


class Reader(Protocol):
    """Whoever asked for a snapshot: told exactly once."""

    key: FlowKey

    def loaded(self, snapshot: Snapshot | Exception | None) -> None:
        """The snapshot, None if there is no such flow, or why it cannot be read."""
        ...


class Loader:
    """Ask with `want`; `run` reads until told to stop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wanted: deque[Reader] = deque()
        self._asked = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_over = False

    def want(self, reader: Reader) -> None:
        """Queue a flow for the next read."""
        if self._is_over:
            asyncio.get_running_loop().call_soon(reader.loaded, RuntimeClosed(_OVER))
            return
        self._wanted.append(reader)
        self._asked.set()
        self._idle.clear()

    async def wait_idle(self) -> None:
        """Return once nothing is being read or waits to be."""
        await self._idle.wait()

    async def run(self) -> None:
        """Read for ever; cancelled at shutdown, when nobody waits any more.

        Cancelled earlier, as by an event loop that ends under a runtime nobody closed, it leaves nobody waiting.
        """
        try:
            await self._run()
        finally:
            self._is_over = True
            self._answer(self._wanted, RuntimeClosed(_OVER))

    async def _run(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._wanted:
                batch = [self._wanted.popleft() for _ in range(min(_BATCH, len(self._wanted)))]
                await self._read(batch)
            self._idle.set()

    async def _read(self, batch: list[Reader]) -> None:
        found: list[Snapshot | Exception | None]
        try:
            found = await self._store.load([reader.key for reader in batch])
        except asyncio.CancelledError:
            self._answer(batch, RuntimeClosed(_OVER))
            raise
        except Exception as error:
            found = [error] * len(batch)
        for reader, snapshot in zip(batch, found, strict=True):
            reader.loaded(snapshot)

    @staticmethod
    def _answer(readers: Iterable[Reader], error: Exception) -> None:
        for reader in list(readers):
            reader.loaded(error)
