"""Waiting for an end: futures by name, settled once by whoever sees the end become durable."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Waiters(Generic[K]):
    """Register first, then look whether the end has already come: nothing can slip between."""

    def __init__(self) -> None:
        self._waiting: dict[K, list[asyncio.Future[bytes]]] = {}

    def register(self, key: K) -> asyncio.Future[bytes]:
        """A future for the record of the end."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(future)
        future.add_done_callback(lambda _: self._forget(key, future))
        return future

    def settle(self, key: K, doc: bytes) -> None:
        """The end has come: tell everybody who waits for it."""
        for future in self._waiting.pop(key, ()):
            if not future.done():
                future.set_result(doc)

    def wanted(self, key: K) -> bool:
        """Whether anybody waits for this end."""
        return key in self._waiting

    def fail_all(self, error: Exception) -> None:
        """No more ends will be seen here."""
        waiting, self._waiting = self._waiting, {}
        for futures in waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(error)
                    future.exception()

    def _forget(self, key: K, future: asyncio.Future[bytes]) -> None:
        if futures := self._waiting.get(key):
            if future in futures:
                futures.remove(future)
            if not futures:
                del self._waiting[key]
