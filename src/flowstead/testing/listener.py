"""A host's listener that hears what the runtime announces, from one process to the next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from flowstead.model.event import Event
from flowstead.runtime import Runtime

T = TypeVar("T")


class Listener:
    """Stands where an owner would be told: `events` is what it heard, each once, in order, across crashes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more: anyio.Event | None = None

    @property
    def ends(self) -> list[tuple[str, str]]:
        """The flows it heard the end of, with how they ended: what `done_only` owners are told."""
        prefix = "flow."
        return [
            (event.flow_id, event.type.removeprefix(prefix))
            for event in self.events
            if event.type in ("flow.succeeded", "flow.failed", "flow.cancelled", "flow.lost")
        ]

    def beside(self, host: Callable[[Runtime], Awaitable[T]]) -> Callable[[Runtime], Awaitable[T]]:
        """The host's code with this listener running beside it until it has heard everything."""

        async def listening(runtime: Runtime) -> T:
            self._more = None  # an event of the process before would belong to a loop that is gone
            async with anyio.create_task_group() as group:
                group.start_soon(self._listen, runtime)
                result = await host(runtime)
                await self._catch_up(runtime)
                group.cancel_scope.cancel()
            return result

        return listening

    async def _listen(self, runtime: Runtime) -> None:
        async with runtime.admin.watch(after_position=self._position) as events:
            async for event in events:
                self.events.append(event)
                if self._more is not None:
                    self._more.set()

    async def _catch_up(self, runtime: Runtime) -> None:
        last = await runtime.core.engine.store.last_position()
        while self._position < last:
            self._more = anyio.Event()
            await self._more.wait()

    @property
    def _position(self) -> int:
        return self.events[-1].position or 0 if self.events else 0
