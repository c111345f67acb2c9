"""The part of a controller's face that stands still: waits for signals, timers, and the first of several.

Each is a step, so each has a name that must be the same when the controller is run again. What is recorded answers
at once. While a controller stands in one its flow is `waiting`; after `Limits.park_seconds` the controller leaves
memory, and is run again from the top when it is woken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
from msgspec import UNSET

from flowstead import arguments
from flowstead.errors import WrongShape
from flowstead.model.command import TaskDraft
from flowstead.model.flow import Failure, Flow, Json
from flowstead.model.task import Task, TimedOut, outcome_of
from flowstead.model.wait import OnTimeout, Wait, WaitKind, inbox_of
from flowstead.rules import shapes, wait_keys
from flowstead.standing import Standing
from flowstead.step import Completed, Step, distinct, result_of
from flowstead.steps import Begun, Steps

_NOTICE: Final = "notice"
_LONGEST_NOTICE: Final = 4096
_REASONS: Final = 10
"""Rejections that the reason of a decision names; all are in its votes."""


class WaitStep(Step):
    """A wait that is open while its controller goes on. Made by `FlowContext.open_wait` and its kin.

    `token` answers it from outside, without knowing the flow: put it into a link. `digest` is what a vote must
    name. `result()` answers, and raises, as what waits at once does: `wait`, `sleep` or `approve`.
    """

    def __init__(
        self,
        steps: Steps,
        standing: Standing,
        name: str,
        begun: Begun,
        read: Callable[[Task], Any],
    ) -> None:
        super().__init__(steps, name, begun)
        self._standing, self._reader, wait = standing, read, begun.wait
        self.token = None if wait is None else wait.token
        approval = None if wait is None else wait.approval
        self.digest = None if approval is None else approval.digest

    async def ended(self) -> Task:
        """The child as it ended; the flow waits for it. Cancelling only stops the waiting."""
        if not self._is_known:
            [begun] = await self._standing.stand([self.task_id])
            self._end = begun.end
        return await super().ended()

    def _read(self, task: Task) -> Any:
        return self._reader(task)


class FlowWaits:
    """What a controller can wait for."""

    _steps: Steps
    _standing: Standing

    @property
    def flow(self) -> Flow:
        """The flow as this controller last knew it."""
        raise NotImplementedError

    # ---- signals ----------------------------------------------------------------------------------

    async def wait(
        self,
        name: str,
        *,
        timeout: float | None = None,
        on_timeout: str = "fail",
        remind: Sequence[float] = (),
        prompt: str | None = None,
        schema: Any = None,
        key: Mapping[str, Json] | None = None,
        **fields: Json,
    ) -> Any:
        """Wait for an answer from outside, and return its payload.

        The flow is `waiting` until `flows.signal(**fields)` names exactly these fields, or a signal is addressed to
        this flow and `name`, or the wait's token is used. A signal that came early answers at once.

        Args:
            name: The step's name in this flow.
            timeout: Seconds until `on_timeout` happens; no deadline unless given.
            on_timeout: `fail` raises `ChildTimedOut`, `resume` answers None, `block` blocks the flow and waits on.
            remind: Seconds before the deadline at which the owner is reminded.
            prompt: What is asked, for people.
            schema: A JSON Schema, or a type, that an answer must fit; of a type an instance is returned. A wrong
                answer is refused with the path, and the wait stays open. Dates, UUIDs and other texts that a type
                reads are checked like that; the `format`s of a JSON Schema of yours are not. Needs the extra
                `schema`.
            key, fields: What a signal must name: plain JSON values.

        Raises:
            ChildTimedOut: Nobody answered in time.
            ChildCancelled: Somebody withdrew the wait.
            CancelPending: A cancel is requested.
            StateTooLarge: The key or the schema is over `Limits.wait_bytes`.
            WrongShape: The type takes less than its schema says (`__post_init__`, the length of bytes, …), and the
                answer is nothing for it. The wait is over, and has that answer.

        Cancelling the caller leaves the wait open: the same step finds it again. Give `timeout` rather than putting
        `asyncio.timeout` around it: a controller that has left memory forgets that.
        """
        draft = self._signal_draft(name, timeout, on_timeout, remind, prompt, schema, key, fields)
        return answer_of(await self._stand_in(draft), on_timeout, schema)

    async def open_wait(
        self,
        name: str,
        *,
        timeout: float | None = None,
        on_timeout: str = "fail",
        remind: Sequence[float] = (),
        prompt: str | None = None,
        schema: Any = None,
        key: Mapping[str, Json] | None = None,
        **fields: Json,
    ) -> WaitStep:
        """Open a wait and go on: to send its `token` to somebody, or to `select` over several.

        Arguments as for `wait`, whose answer is that of the step's `result()`.

        Cancelling the caller after acceptance leaves the wait open.

        Raises:
            CancelPending: A cancel is requested, and the wait is new.
        """
        draft = self._signal_draft(name, timeout, on_timeout, remind, prompt, schema, key, fields)
        return await self._open(draft, partial(answer_of, on_timeout=on_timeout, schema=schema))

    # ---- time -------------------------------------------------------------------------------------

    async def sleep(
        self, name: str, seconds: float | None = None, *, wake_at: int | None = None
    ) -> None:
        """Stand still for so many seconds, or until an instant (epoch ms): durably, once, late rather than never.

        `await flow.sleep("cool down", 60)`: like every step it has a name.

        Cancelling the caller leaves the timer running; the same step finds it again.

        Raises:
            CancelPending: A cancel is requested.
        """
        result_of(await self._stand_in(self._timer_draft(name, seconds, wake_at)))

    async def start_timer(
        self, name: str, seconds: float | None = None, *, wake_at: int | None = None
    ) -> WaitStep:
        """Start a timer and go on: to `select` over it. Cancelling the caller leaves it running."""
        return await self._open(self._timer_draft(name, seconds, wake_at), result_of)

    # ---- several ----------------------------------------------------------------------------------

    async def select(self, *steps: Step) -> Step:
        """Wait until the first of these steps ends, however it ends; withdraw the others, and return it.

        Steps are signals (`open_wait`), timers (`start_timer`), approvals (`ask_approval`) and children (`start`).
        A controller that is run again is given the same one. `await step.outcome()` or `step.result()` of it says
        how it ended. Waits, and children that have not begun, are withdrawn together with its end: an answer that
        comes afterwards is for the next wait. Children that run are stopped.

        Cancelling only stops the waiting; as long as none has ended, nothing is withdrawn.

        Raises:
            ValueError: There is nothing to select from.
            TypeError: Something is no step, but perhaps the coroutine of one: `await` it first.
            CancelPending: A cancel is requested.
        """
        among = distinct(steps)
        if not among:
            raise ValueError("select needs at least one step.")
        await self._standing.stand([step.task_id for step in among], withdraw=True)
        winner = await anext(Completed(among))
        # Those that nobody had begun are withdrawn already, where the first was seen to end.
        for loser in reversed(among):
            if loser != winner:
                await loser.cancel()
        return winner

    # ---- making and taking steps ------------------------------------------------------------------

    async def _stand_in(self, draft: TaskDraft) -> Task:
        """Wait for one step that runs nothing."""
        assert draft.run_id is not None
        [begun] = await self._standing.stand([draft.run_id], [draft])
        return await Step(self._steps, draft.run_id, begun).ended()

    async def _open(self, draft: TaskDraft, read: Callable[[Task], Any]) -> WaitStep:
        assert draft.run_id is not None
        [begun] = await self._steps.begin([draft])
        return WaitStep(self._steps, self._standing, draft.run_id, begun, read)

    def _signal_draft(
        self,
        name: str,
        timeout: float | None,
        on_timeout: str,
        remind: Sequence[float],
        prompt: str | None,
        schema: Any,
        key: Mapping[str, Json] | None,
        fields: Mapping[str, Json],
    ) -> TaskDraft:
        step = arguments.text(name, "name")
        named = arguments.wait_fields(key, fields)
        wait = self._wait(WaitKind.SIGNAL, timeout, on_timeout, remind, prompt, schema, named)
        wait = msgspec.structs.replace(wait, inbox=inbox_of(WaitKind.SIGNAL, step))
        return self._steps.plain_draft(WaitKind.SIGNAL, step, wait=wait)

    def _timer_draft(self, name: str, seconds: float | None, wake_at: int | None) -> TaskDraft:
        step = arguments.text(name, "name")
        if (seconds is None) == (wake_at is None):
            raise ValueError("give either seconds or wake_at.")
        at = arguments.instant(wake_at, "wake_at")
        if at is None:
            wait = arguments.duration(seconds, "seconds")
            at = self._steps.engine.clock.now() + round(wait * 1000)
        timer = Wait(kind=WaitKind.TIMER, deadline_at=at)
        return self._steps.plain_draft(WaitKind.TIMER, step, wait=timer)

    def _wait(
        self,
        kind: WaitKind,
        timeout: float | None,
        on_timeout: str,
        remind: Sequence[float],
        prompt: str | None,
        schema: Any,
        key: dict[str, Json] | None = None,
    ) -> Wait:
        engine = self._steps.engine
        most = engine.limits.wait_bytes
        seconds = arguments.seconds(timeout, "timeout")
        now = engine.clock.now()
        deadline = None if seconds is None else now + round(seconds * 1000)
        return Wait(
            kind=kind,
            key=UNSET if key is None else self._steps.encode_or_raise(key, "key", max_bytes=most),
            wait_key=None if key is None else wait_keys.wait_key(self._steps.key.owner_key, key),
            token=engine.ids.token(),
            prompt=arguments.optional_text(prompt, "prompt"),
            schema=UNSET
            if schema is None
            else self._steps.encode_or_raise(shapes.schema_of(schema), "schema", max_bytes=most),
            deadline_at=deadline,
            on_timeout=arguments.choice(on_timeout, OnTimeout, "on_timeout"),
            remind_at=arguments.reminders(remind, deadline, now),
        )


def answer_of(task: Task, on_timeout: str, schema: Any) -> Any:
    if isinstance(outcome_of(task), TimedOut) and on_timeout == OnTimeout.RESUME:
        return None
    return as_shape(task, result_of(task), schema)


def as_shape(task: Task, value: Json, schema: Any) -> Any:
    """The answer as an instance of the type that was asked for.

    Raises:
        WrongShape: The type asks for more than its schema can say.
    """
    if schema is None or isinstance(schema, Mapping):
        return value
    try:
        return msgspec.convert(value, schema, str_keys=True)
    except msgspec.ValidationError:
        pass
    try:
        # To a schema 1.0 is an integer.
        return msgspec.convert(_whole(value), schema, str_keys=True)
    except msgspec.ValidationError as error:
        failure = Failure(kind="wrong_shape", code="WrongShape", message=str(error))
        raise WrongShape(task.task_id, task.run_id, failure) from error


def _whole(value: Json) -> Json:
    """The same with integers for whole floats."""
    if isinstance(value, dict):
        return {name: _whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
