"""The queue of turns: actors that have mail, taken a few at a time by one callback of the event loop.

A callback for each would be simpler, and costs a fifth of a mutation in handles and contexts; a callback for
all would hold up everybody else in the loop for as long as ten thousand turns take.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

_AT_ONCE: Final = 256


class TurnQueue:
    """First come, first served. Nothing awaits in a turn, hence no lock."""

    __slots__ = ("_is_scheduled", "_turns")

    def __init__(self) -> None:
        self._turns: deque[Callable[[], None]] = deque()
        self._is_scheduled = False

    def schedule(self, turn: Callable[[], None]) -> None:
        """Have a turn taken soon, after whatever else is ready in the loop now."""
        self._turns.append(turn)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._take)

    def _take(self) -> None:
        turns = self._turns
        for _ in range(min(_AT_ONCE, len(turns))):
            turns.popleft()()
        self._is_scheduled = bool(turns)
        if turns:
            asyncio.get_running_loop().call_soon(self._take)
