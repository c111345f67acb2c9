"""What a simulated process is given from outside: a clock, names and chance, and a worker for SQLite."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from flowstead.engine.clock import Handle, slug
from flowstead.testing.loop import SimulatedLoop

T = TypeVar("T")


class SimulatedClock:
    """The loop's virtual time as wall time; `shift_ms` is how far the wall clock has been put wrong."""

    def __init__(self, start: int) -> None:
        self.shift_ms = 0
        self._start = start

    def now(self) -> int:
        seconds = asyncio.get_running_loop().time()
        return self._start + self.shift_ms + round(seconds * 1000)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        return asyncio.get_running_loop().call_later(seconds, callback)


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
