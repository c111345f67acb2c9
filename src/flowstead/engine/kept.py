"""How many signals are kept for each owner: until when, so that those that expire make room by themselves.

Read from the store once. Whatever is kept or taken afterwards has to be told here.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left, bisect_right, insort

from flowstead.engine.clock import Clock
from flowstead.errors import MailboxFull
from flowstead.store.port import Store


class Kept:
    """Counts the signals that are kept; see above."""

    def __init__(self, store: Store, clock: Clock, most: int) -> None:
        self._store = store
        self._clock = clock
        self._most = most
        self._until: dict[str, array[int]] | None = None
        self._reading = asyncio.Lock()

    async def read(self) -> bool:
        """Be up to date before anything is kept or taken; answers whether anything is kept.

        Raises:
            StoreError: The store cannot say it now; ask again.
        """
        async with self._reading:
            if self._until is None:
                until: dict[str, array[int]] = {}
                for owner_key, expires_at in await self._store.list_kept(now=self._clock.now()):
                    until.setdefault(owner_key, array("q")).append(expires_at)
                self._until = until
        return bool(self._until)

    def add(self, owner_key: str, expires_at: int) -> None:
        """Count one more.

        Raises:
            MailboxFull: There are as many as may be.
        """
        assert self._until is not None
        until = self._until.setdefault(owner_key, array("q"))
        del until[: bisect_right(until, self._clock.now())]
        if len(until) >= self._most:
            raise MailboxFull(
                f"Session has {self._most} signals that nobody has taken. Nothing was added."
            )
        insort(until, expires_at)

    def remove(self, owner_key: str, expires_at: int) -> None:
        """Count one less, if it has not expired meanwhile."""
        assert self._until is not None
        until = self._until.get(owner_key, array("q"))
        place = bisect_left(until, expires_at)
        if place < len(until) and until[place] == expires_at:
            del until[place]
            if not until:
                del self._until[owner_key]
