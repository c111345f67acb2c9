"""A step that a controller has begun and goes on beside, and several of them together."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections import deque
from collections.abc import Iterable, Sequence

from flowstead import errors
from flowstead.model.code import Code
from flowstead.model.command import CancelTask
from flowstead.model.flow import Json
from flowstead.model.task import (
    Cancelled,
    Failed,
    Lost,
    Outcome,
    Succeeded,
    Task,
    TimedOut,
    outcome_of,
)
from flowstead.results import raise_refusal
from flowstead.steps import Begun, Steps
from flowstead.store import codec


class Step:
    """A child that runs beside its controller. Made by `FlowContext.start`; ends with the flow at the latest.

    Two of the same child are equal.
    """

    def __init__(self, steps: Steps, name: str, begun: Begun) -> None:
        self._steps = steps
        self._end = begun.end
        self._task: Task | None = None
        self.name = name
        self.task_id = begun.task_id

    def __repr__(self) -> str:
        return f"<Step {self.name!r} {self.task_id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and other.task_id == self.task_id

    def __hash__(self) -> int:
        return hash(self.task_id)

    @property
    def _is_known(self) -> bool:
        """Whether the child is known to have ended."""
        return self._task is not None or self._end is None or self._end.done()

    async def outcome(self) -> Outcome:
        """How the child ended: `Succeeded | Failed | TimedOut | Cancelled | Lost`.

        Cancelling only stops the waiting; the child goes on, and can be waited for again.
        """
        return outcome_of(await self.ended())

    async def result(self) -> Json:
        """What the child returned.

        Cancelling only stops the waiting; the child goes on, and can be waited for again.

        Raises:
            ChildError: The child ended without a result.
        """
        return self._read(await self.ended())

    def _read(self, task: Task) -> Json:
        """What the step answers, once it has ended."""
        return result_of(task)

    async def cancel(self) -> None:
        """Have the child stopped; it ends as cancelled when its code does. One that has ended stays as it is.

        Cancelling the caller after acceptance does not take it back.
        """
        reply = await self._steps.ask(CancelTask(task_id=self.task_id))
        if reply.refusal is not None and reply.refusal.code is not Code.NOT_FOUND:
            raise_refusal(reply.refusal)

    async def ended(self) -> Task:
        """The child as it ended. Cancelling only stops the waiting."""
        if self._task is None:
            if self._end is None:
                self._task = (await self._steps.recorded([self.task_id]))[self.task_id]
            else:
                # Not awaited itself: somebody else may wait for it as well.
                await asyncio.wait({self._end})
                self._task = codec.read_task(self._end.result())
        return self._task


def distinct(steps: Iterable[Step]) -> list[Step]:
    """The steps, each once.

    Raises:
        TypeError: Something is none.
    """
    among: dict[Step, None] = {}
    for step in steps:
        if inspect.iscoroutine(step):
            step.close()  # it is told of here, and not once more by a warning
        if not isinstance(step, Step):
            what = type(step).__qualname__
            raise TypeError(
                f"a step is needed, as `await flow.start(...)` or `open_wait` answers it, not {what}."
            )
        among[step] = None
    return list(among)


def result_of(task: Task) -> Json:
    """What an ended child returned.

    Raises:
        ChildError: It ended without a result.
    """
    match outcome_of(task):
        case Succeeded(result):
            return result
        case Failed(failure):
            raise errors.ChildFailed(task.task_id, task.run_id, failure)
        case TimedOut(failure):
            raise errors.ChildTimedOut(task.task_id, task.run_id, failure)
        case Cancelled(failure):
            raise errors.ChildCancelled(task.task_id, task.run_id, failure)
        case Lost(failure):
            raise errors.ChildLost(task.task_id, task.run_id, failure)


class Completed:
    """The steps in the order in which their children ended, each as soon as it has.

    The flow's history is the one source of that order: clocks tie, and are set back.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self._left = distinct(steps)
        self._ready: deque[Step] = deque()

    def __aiter__(self) -> Completed:
        return self

    async def __anext__(self) -> Step:
        """The next to have ended. Cancelling only stops the waiting, and loses none."""
        while not self._ready:
            if not self._left:
                raise StopAsyncIteration
            told = self._left[0]._steps.told_ends
            # What has ended before one that is known from the history is known from it as well.
            if not self._take([step for step in self._left if step.task_id in told]):
                await self._some_ended()
                await self._read_history()
                # Also those whose end is on record and not told yet: they are ahead of others that are told.
                self._take([s for s in self._left if s.task_id in told or s._is_known])
        return self._ready.popleft()

    async def _some_ended(self) -> None:
        ends = [step._end for step in self._left if step._end is not None]
        if len(ends) == len(self._left):
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()  # raises where the runtime has closed

    async def _read_history(self) -> None:
        if self._left:
            await self._left[0]._steps.read_history()

    def _take(self, ended: list[Step]) -> bool:
        """Whether there are any."""
        if ended:
            told = ended[0]._steps.told_ends
            ended.sort(key=lambda step: told.get(step.task_id, sys.maxsize))
            gone = set(ended)
            self._left = [step for step in self._left if step not in gone]
            self._ready.extend(ended)
        return bool(ended)


async def first(steps: Sequence[Step], count: int) -> list[Step]:
    """The first `count` steps to succeed, in the order in which they did; the others are stopped.

    Cancelling only stops the waiting; as long as it waits, nothing is stopped.

    Raises:
        ChildError: So many have ended without a result that fewer than `count` can succeed: the last of them.
            The others are stopped.
    """
    winners: list[Step] = []
    losers = dict.fromkeys(steps)
    spare = len(losers) - count
    async for step in Completed(steps):
        del losers[step]
        if isinstance(await step.outcome(), Succeeded):
            winners.append(step)
        else:
            spare -= 1
        if len(winners) == count or spare < 0:
            break
    # The youngest first, so that none that stands in line takes the place of one that is stopped.
    for loser in reversed(losers):
        await loser.cancel()
    if spare < 0:
        await step.result()
    return winners
