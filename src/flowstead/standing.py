"""Where a controller stands still: until one of its steps ends, or until it is parked.

A controller may leave memory only from its own task, and not from under a deadline (`anyio.move_on_after`), which
would be forgotten: then it stays. What else it runs beside, in a task group around its wait or under
`asyncio.timeout`, nobody can see: that is cut off, and begun again when it is entered again. Steps are not; they
run on without their controller.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import anyio

from flowstead.engine.parked import Parked
from flowstead.errors import FlowError
from flowstead.model.command import Await, StopAwaiting, TaskDraft
from flowstead.results import raise_refusal
from flowstead.steps import CONTROLLER, Begun, Steps
from flowstead.store import codec


class Standing:
    """The waits of one controller. Made in the task that runs it."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._task = asyncio.current_task()
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def park(self) -> None:
        """End the controller where it waits; after that its steps and its flow take nothing from it any more."""
        self._steps.is_parked = True
        if not self._left.done():
            self._left.set_result(None)

    async def stand(
        self, names: Sequence[str], drafts: Sequence[TaskDraft] = (), *, withdraw: bool = False
    ) -> list[Begun]:
        """Wait until one of these steps has ended, `drafts` among them, and answer the child of each.

        With `withdraw` those that nobody has begun end with it.

        Raises:
            CancelPending: A cancel is requested, and none of them has ended.
        """
        ends = {d.task_id: self._steps.end_of(d.task_id) for d in drafts}
        begun: list[Begun] = []
        try:
            command = Await(
                drafts=tuple(drafts),
                steps=tuple(names),
                may_park=self._may_park(),
                withdraw=withdraw,
            )
            await self._begin(command, ends, begun)
            await self._until_any([end for _, end, _ in begun if end is not None], len(begun))
            return begun
        except asyncio.CancelledError:
            self._go_on_without(names)
            raise
        finally:
            for end in (*ends.values(), *(end for _, end, _ in begun)):
                if end is not None and not end.done():
                    end.cancel()

    async def _begin(
        self,
        command: Await,
        ends: dict[str, asyncio.Future[bytes]],
        begun: list[Begun],
    ) -> None:
        reply = await self._steps.ask(command)
        if reply.refusal is not None:
            raise_refusal(reply.refusal, None if reply.doc is None else codec.read_flow(reply.doc))
        for child in reply.children:
            if isinstance(child, str) or child.ended_at is not None:
                begun.append(Begun(child if isinstance(child, str) else child.task_id, None))
            elif child.task_id in ends:
                begun.append(Begun(child.task_id, ends[child.task_id]))
            else:
                begun.append(Begun(child.task_id, await self._steps.join(child.task_id)))

    async def _until_any(self, ends: list[asyncio.Future[bytes]], steps: int) -> None:
        if len(ends) == steps:
            first: set[asyncio.Future[Any]] = {*ends, self._left}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end.done():
                    end.result()  # raises where the runtime has closed
        if self._left.done():
            raise Parked

    def _may_park(self) -> bool:
        is_own = asyncio.current_task() is self._task
        return is_own and math.isinf(anyio.current_effective_deadline())

    def _go_on_without(self, names: Sequence[str]) -> None:
        """Nobody stands in this wait any more. Nobody is there to hear the answer, either."""
        try:
            command = StopAwaiting(steps=tuple(names))
            self._steps.engine.ask(self._steps.key, command, CONTROLLER, bounded=False)
        except FlowError:
            return
