"""The crew of one flow: one task group for all its running code, and a cell for each member inside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import anyio
from anyio.abc import TaskGroup

from flowstead.engine.stop_scope import StopScope
from flowstead.log import get_logger

log = get_logger(__name__)

Run: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
Stop: TypeAlias = Callable[[], object]


class Crew:
    """The code of one flow: its task group and the scopes inside it."""

    def __init__(self) -> None:
        self.controller: StopScope | None = None
        self.members = 0
        self.group: TaskGroup | None = None
        self._waiting: list[tuple[Run, Stop, str]] = []
        self._empty = asyncio.Event()

    async def host(self) -> None:
        """Hold the task group for as long as it has members."""
        async with anyio.create_task_group() as self.group:
            waiting, self._waiting = self._waiting, []
            for run, stop, name in waiting:
                self.group.start_soon(_in_a_cell, run, stop, name)
            await self._empty.wait()

    def start(self, run: Run, stop: Stop, *, name: str) -> None:
        """Run a member, at once or as soon as the group stands; `stop` is how shutdown stops it."""
        self.members += 1
        if self.group is None:
            self._waiting.append((run, stop, name))
        else:
            self.group.start_soon(_in_a_cell, run, stop, name)

    def leave(self) -> bool:
        """A member has ended; answers whether it was the last."""
        self.members -= 1
        if self.members == 0:
            self._empty.set()
        return self.members == 0


async def _in_a_cell(run: Run, stop: Stop, name: str) -> None:
    """Run a member in a bare task inside its place in the group.

    Code that leaves a cancel scope open, as an async generator that is not read to its end easily does, spoils
    the task it ran in, and anyio would take the whole group down with it. So that task is one of its own.
    """
    cell = asyncio.create_task(run(), name=name)
    ended = asyncio.Event()
    cell.add_done_callback(lambda _: ended.set())
    try:
        await ended.wait()
    finally:
        if not cell.done():
            # By its scope, not by Task.cancel: what the code shields from cancellation stays shielded.
            stop()
            with anyio.CancelScope(shield=True):
                await ended.wait()
        if not cell.cancelled() and (error := cell.exception()) is not None:
            log.error("code.escaped_its_guard", error=type(error).__name__)
