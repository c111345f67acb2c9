"""Due instants: one heap for the near future, one indexed query for the rest, one timer in all.

A due instant lives in its row. Those within the horizon are in the heap as well; the far ones stay on disk
until the horizon reaches them. A thousand parked flows therefore cost rows, not timers, and an idle runtime
with nothing due arms nothing at all. A tick that comes twice is harmless: the rules look at the clock again.

What comes due at once, such as at opening after a long while, is ticked a portion at a time: the next when there is
room for it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable
from typing import Final

from flowstead.engine.clock import Clock, Handle
from flowstead.errors import StoreError
from flowstead.log import get_logger
from flowstead.model.flow import FlowKey
from flowstead.store.port import Store

log = get_logger(__name__)

HORIZON_MS: Final = 60_000
_READ_AGAIN_SECONDS: Final = 1.0
_PORTION: Final = 256


class Timers:
    """Note what is due; `tick` is called for each flow when its instant has come, `wait_room` between portions."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        tick: Callable[[FlowKey], object],
        wait_room: Callable[[], Awaitable[object]],
    ) -> None:
        self._store = store
        self._clock = clock
        self._tick = tick
        self._wait_room = wait_room
        self._is_ticking = False
        self._heap: list[tuple[int, FlowKey]] = []
        self._horizon = 0
        self._armed: tuple[int, Handle] | None = None
        self._look = asyncio.Event()

    def note(self, at: int, key: FlowKey) -> None:
        """A row with a due instant has just been committed."""
        if at <= self._horizon:
            heapq.heappush(self._heap, (at, key))
        self._arm(at)

    async def run(self) -> None:
        """Fetch what comes due, for ever; cancelled at shutdown."""
        after = 0
        while True:
            self._look.clear()
            try:
                after = await self._fetch(after)
            except StoreError as error:
                log.error("timers.not_read", reason=str(error))
                self._clock.call_later(_READ_AGAIN_SECONDS, self._look.set)
            await self._look.wait()

    async def _fetch(self, after: int) -> int:
        """Put what is due up to the horizon on the heap, tick what is due already, arm for the next."""
        self._horizon = until = self._clock.now() + HORIZON_MS
        found = await self._store.list_due(after=after, until=until)
        self._heap += [(due.at, due.key) for due in found]
        heapq.heapify(self._heap)
        self._is_ticking = True
        while not self._tick_due():
            await self._wait_room()
        self._is_ticking = False
        if self._heap:
            self._arm(self._heap[0][0])
        elif (following := await self._store.next_due(after=until)) is not None:
            self._arm(following)
        return until

    def close(self) -> None:
        """Arm nothing any more."""
        if self._armed is not None:
            self._armed[1].cancel()
            self._armed = None

    def _arm(self, at: int) -> None:
        """See to it that we look again at the instant, at the latest."""
        if self._armed is not None:
            if self._armed[0] <= at:
                return
            self._armed[1].cancel()
        self._armed = (at, self._clock.call_at(at, self._fire))

    def _fire(self) -> None:
        self._armed = None
        if not self._is_ticking and self._tick_due() and self._heap:
            self._arm(self._heap[0][0])
        else:
            self._look.set()

    def _tick_due(self) -> bool:
        """Tick a portion of what is due; answers whether that was all."""
        now = self._clock.now()
        for _ in range(_PORTION):
            if not self._heap or self._heap[0][0] > now:
                return True
            self._tick(heapq.heappop(self._heap)[1])
        return False
