"""Lanes: jobs by key, those of one key one after another, those of others beside.

Each job is seen to its end whatever becomes of its caller, because what it has begun may be on its way to the disk.
A lane is there as long as it has jobs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import TypeVar

from flowstead.errors import RuntimeClosed

T = TypeVar("T")


class Lanes:
    """Jobs by key: those of one key one after another, each to its end whatever becomes of its caller."""

    def __init__(self) -> None:
        self._lanes: dict[Hashable, deque[Callable[[], Awaitable[None]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, key: Hashable, job: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        """Add a job to a lane; the future has its answer."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = deque()
            task = asyncio.create_task(self._work_off(key, lane), name="flowstead desk")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        lane.append(partial(_settle, answer, job))
        return answer

    async def _work_off(self, key: Hashable, lane: deque[Callable[[], Awaitable[None]]]) -> None:
        try:
            while lane:
                await lane.popleft()()
        finally:
            del self._lanes[key]

    async def drain(self) -> None:
        """Return once every job has been seen to its end."""
        while self._tasks:
            await asyncio.wait(self._tasks)


async def _settle(answer: asyncio.Future[T], job: Callable[[], Awaitable[T]]) -> None:
    try:
        found = await job()
    except asyncio.CancelledError:
        if not answer.done():
            answer.set_exception(RuntimeClosed("This runtime is closing."))
            answer.exception()
        raise
    except Exception as error:
        if not answer.done():
            answer.set_exception(error)
            answer.exception()
    else:
        if not answer.done():
            answer.set_result(found)
