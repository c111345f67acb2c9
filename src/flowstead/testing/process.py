"""What a simulated process is given from outside: a clock, names and chance, and a worker for SQLite."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable
from random import Random
from typing import Any, Final, TypeVar

from flowstead.engine.clock import Clock, Handle, slug
from flowstead.testing.loop import SimulatedLoop

T = TypeVar("T")

_LONGEST_SECONDS: Final = 60.0


class SimulatedClock(Clock):
    """The loop's virtual time as wall time; `shift_ms` is how far the wall clock has been put wrong.

    As long as nobody does that, an instant is waited for at one go: looking again each minute, as other clocks do,
    would be most of what happens in a simulated week. From then on it is looked for each minute here as well.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._shift_ms = 0
        self._is_set_right = True
        self._waiting: dict[_Instant, None] = {}

    @property
    def shift_ms(self) -> int:
        return self._shift_ms

    @shift_ms.setter
    def shift_ms(self, shift_ms: int) -> None:
        self._shift_ms, self._is_set_right = shift_ms, False
        waiting, self._waiting = self._waiting, {}
        for instant in waiting:
            instant.come_within_a_minute()

    def now(self) -> int:
        seconds = asyncio.get_running_loop().time()
        return self._start + self.shift_ms + round(seconds * 1000)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        return asyncio.get_running_loop().call_later(seconds, callback)

    def call_at(self, at: int, callback: Callable[[], object]) -> Handle:
        if not self._is_set_right:
            return super().call_at(at, callback)
        instant = _Instant(self, at, callback)
        self._waiting[instant] = None
        return instant

    def forget(self, instant: _Instant) -> None:
        """It is not waited for any more."""
        self._waiting.pop(instant, None)


class _Instant:
    """A callback for an instant of a clock that nobody has put wrong so far."""

    def __init__(self, clock: SimulatedClock, at: int, callback: Callable[[], object]) -> None:
        self._clock, self._callback = clock, callback
        self._loop = asyncio.get_running_loop()
        self._when = self._loop.time() + max(0, at - clock.now()) / 1000
        self._handle = self._loop.call_at(self._when, self._come)

    def cancel(self) -> None:
        self._handle.cancel()
        self._clock.forget(self)

    def come_within_a_minute(self) -> None:
        """The clock was put wrong, or right again: it may be any time now."""
        if not self._loop.is_closed():
            self._handle.cancel()
            self._when = min(self._when, self._loop.time() + _LONGEST_SECONDS)
            self._handle = self._loop.call_at(self._when, self._come)

    def _come(self) -> None:
        self._clock.forget(self)
        self._callback()


class SimulatedIds:
    """Ids and chance from a seed; no id is given twice, not even after a crash."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._given = 0

    def flow_id(self, controller_id: str, now: int) -> str:
        return f"{slug(controller_id)}-{self._next():04d}"

    def task_id(self) -> str:
        return f"task-{self._next():04d}"

    def chance(self) -> float:
        return self._random.random()

    def token(self) -> str:
        return f"token-{self._next():04d}"

    def _next(self) -> int:
        self._given += 1
        return self._given


class SimulatedWorker:
    """Runs a SQLite connection's functions on the simulated loop, one after another, each after a delay.

    Give it to a `SqliteStore` as its `worker`. Whoever waits may be cancelled; the function runs all the same,
    as it would on a thread.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._free_at = 0.0

    @classmethod
    async def connect(cls, connector: Callable[[], sqlite3.Connection]) -> SimulatedWorker:
        await asyncio.sleep(0)
        return cls(connector())

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        return await self._put(functools.partial(function, self._connection, *args))

    async def close(self) -> None:
        await self._put(self._connection.close)

    def _put(self, function: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        done: asyncio.Future[T] = loop.create_future()
        # Never before the one put before it: a worker has one thread.
        self._free_at = max(self._free_at, loop.time()) + loop.random.uniform(0, 0.002)
        loop.call_at(self._free_at, _run, function, done)
        return done


def _run(function: Callable[[], T], done: asyncio.Future[T]) -> None:
    try:
        result = function()
    except BaseException as error:
        asyncio.get_running_loop().call_soon(_fail, done, error)
    else:
        asyncio.get_running_loop().call_soon(_answer, done, result)


def _answer(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[T], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
