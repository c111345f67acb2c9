"""The deadline of one attempt, that does not charge a child for what others held up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flowstead.engine.clock import Clock, Handle


class Deadline:
    """Calls `late` once so many seconds have gone by, not counting what `lost` says was taken away meanwhile.

    `lost` answers the seconds lost to stalls of the loop so far; what it grows by is given back to the child.
    """

    __slots__ = (
        "_began",
        "_clock",
        "_due",
        "_given_back",
        "_late",
        "_lost",
        "_lost_before",
        "_timer",
        "seconds",
    )

    def __init__(
        self, seconds: float, clock: Clock, lost: Callable[[], float], late: Callable[[], object]
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._lost = lost
        self._late = late
        self._timer: Handle | None = None
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self.cancel()
        self._began = asyncio.get_running_loop().time()
        self._lost_before = self._lost()
        self._given_back = 0.0
        self._due = self._began + self.seconds
        self._timer = self._clock.call_later(self.seconds, self._look)

    def cancel(self) -> None:
        """Do not call any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> None:
        """See whether the time has run out although the loop had no chance to say so."""
        lost = self._lost() - self._lost_before
        elapsed = asyncio.get_running_loop().time() - self._began
        if self._timer is not None and elapsed - lost > self.seconds:
            self._look()

    def _look(self) -> None:
        self.cancel()
        lost = self._lost() - self._lost_before
        now = asyncio.get_running_loop().time()
        # By as much as this comes late, the child has had its time back already.
        owed = lost - self._given_back - max(0.0, now - self._due)
        if owed > 0:
            self._given_back = lost
            self._due = max(self._due, now) + owed
            self._timer = self._clock.call_later(owed, self._look)
        else:
            self._late()
