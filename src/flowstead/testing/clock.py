"""A clock that stands still until it is moved."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from flowstead.engine.clock import Clock


class _Call:
    """A callback waiting for its instant."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock(Clock):
    """Pass it as `open_runtime(clock=...)`; then time passes only by `advance`.

    Args:
        start: The first instant, epoch milliseconds.
    """

    def __init__(self, start: int = 1_800_000_000_000) -> None:
        self._now = float(start)
        self._calls: list[tuple[float, int, _Call]] = []
        self._order = count()

    def now(self) -> int:
        return round(self._now)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Call:
        call = _Call(callback)
        heapq.heappush(self._calls, (self._now + seconds * 1000, next(self._order), call))
        return call

    def advance(self, seconds: float) -> None:
        """Move on, calling back in order whatever comes due on the way.

        What the callbacks set in motion runs when the event loop does: await something before looking.
        """
        until = self._now + seconds * 1000
        while self._calls and self._calls[0][0] <= until:
            at, _, call = heapq.heappop(self._calls)
            self._now = max(self._now, at)
            if call.callback is not None:
                call.callback()
        self._now = until

    def set(self, now: int) -> None:
        """Jump to an instant, as a wall clock does when it is corrected; nothing is called back.

        What was to be called back after some time is not put off by a jump back: the event loop counts for itself.
        """
        back = max(0.0, self._now - now)
        self._calls = [(at - back, order, call) for at, order, call in self._calls]
        self._now = float(now)
