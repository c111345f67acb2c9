"""The guard around a child's code: whatever it does, exactly one outcome comes out, and nothing escapes.

A child may raise anything, `SystemExit` and a `CancelledError` of its own included; swallow its cancellation;
return what cannot be stored. None of it may reach the task group its siblings live in. Only one thing passes:
a cancellation from outside that is not about this child, which is shutdown, and has no outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from flowstead.engine.child_scope import ChildScope
from flowstead.errors import RuntimeClosed, TaskSignal
from flowstead.model.command import Defect, Encoded
from flowstead.model.effect import StopReason
from flowstead.model.flow import Failure, Json
from flowstead.model.retry import Category
from flowstead.model.task import Cancelled, Failed, Outcome, Succeeded, TimedOut
from flowstead.rules import classify
from flowstead.rules.classify import Verdict
from flowstead.rules.endings import interrupted

_LONGEST_MESSAGE: Final = 500


class EndsAs(Exception):
    """Code of our own that knows its outcome: it stands for something that has ended elsewhere."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Unfinished(Exception):
    """Code of our own had to give way to shutdown before its work was done: there is no outcome."""


async def run_guarded(
    child: ChildScope,
    code: Callable[[], Awaitable[Json]],
    *,
    encode_result: Callable[[Json], Encoded],
    is_shutdown: Callable[[], bool],
    judge: Callable[[BaseException], Verdict] = lambda error: classify.judge(error, None),
) -> tuple[Outcome, Encoded | UnsetType]:
    """Run a child's code to its one outcome, with the encoded result where it succeeded.

    A child that returns although it was asked to cancel has succeeded; one that returns past its deadline has
    timed out all the same. What `judge` says of a failure is left in `child.verdict`.

    Raises:
        asyncio.CancelledError: The runtime is shutting down, so there is no outcome.
    """
    try:
        with child.scope:
            child.begun = True
            value = await code()
            child.look()
            if not child.scope.cancel_called:
                await absorb_own_cancel()
            if child.reason not in (StopReason.TIMED_OUT, StopReason.INTERRUPTED):
                return _succeeded(encode_result, value)
    except EndsAs as error:
        return error.outcome, UNSET
    except Unfinished as error:
        raise asyncio.CancelledError from error
    except BaseException as error:
        if not (child.reason is None and is_shutdown() and _was_stopped(child, error)):
            if isinstance(error, asyncio.CancelledError):
                await absorb_own_cancel()
            return _failed(error, child, judge), UNSET
    if child.reason is None and is_shutdown():
        # Whatever it did while the runtime was stopping it is no outcome.
        raise asyncio.CancelledError
    return stopped(child.reason, idled=child.idled), UNSET


def stopped(
    reason: StopReason | None, detail: str | None = None, *, idled: bool = False
) -> Outcome:
    """The outcome of a child that ended because its scope was cancelled."""
    match reason:
        case StopReason.TIMED_OUT:
            message = "stopped without a sign of life" if idled else "stopped at its deadline"
            code = "idle" if idled else None
            said = _joined(message, detail)
            return TimedOut(Failure(kind="timed_out", code=code, message=said))
        case StopReason.INTERRUPTED:
            message = "the process ended before the child's outcome was recorded"
            return interrupted(_joined(message, detail))
        case StopReason.FLOW_ENDED:
            message = "stopped because the flow ended"
            return Cancelled(Failure(kind="cancelled", message=_joined(message, detail)))
        case StopReason.CANCELLED | None:  # pragma: no branch - there is no fifth reason
            message = "stopped on request"
            return Cancelled(Failure(kind="cancelled", message=_joined(message, detail)))


def describe(error: BaseException) -> Failure:
    """An exception as a failure: its class, and one capped line of what it says."""
    name = _told(lambda: type(error).__qualname__) or "an exception without a name"
    said = _told(lambda: str(error))
    if said is None:
        said = "(its message could not be read)"
    # What the child says of itself is meant for people as it is.
    shown = said if isinstance(error, TaskSignal) else f"{name}: {said}"
    message = one_line(shown if said else name)
    return Failure(kind="exception", code=one_line(name), message=message)


def _told(tell: Callable[[], str]) -> str | None:
    """What somebody else's code says, as a plain string; None if it will not say."""
    try:
        return "".join(tell())[: 4 * _LONGEST_MESSAGE]
    except BaseException:
        return None


def one_line(text: str) -> str:
    """Text fit for a record and a terminal: no control characters, no surrogates, not too long."""
    line = " ".join(text[: 4 * _LONGEST_MESSAGE].split())
    line = "".join(char if char.isprintable() else "�" for char in line)
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"


def _succeeded(
    encode_result: Callable[[Json], Encoded], value: Json
) -> tuple[Outcome, Encoded | UnsetType]:
    encoded = encode_result(value)
    if isinstance(encoded, Defect):
        return Failed(Failure(kind="bad_result", code=encoded.code, message=encoded.reason)), UNSET
    return Succeeded(), encoded


def _failed(
    error: BaseException, child: ChildScope, judge: Callable[[BaseException], Verdict]
) -> Outcome:
    if isinstance(error, asyncio.CancelledError) and child.reason is None:
        return Failed(
            Failure(
                kind="child_cancelled_itself",
                code="CancelledError",
                message="raised CancelledError although nobody had cancelled it",
            )
        )
    if isinstance(error, asyncio.CancelledError):
        return stopped(child.reason, idled=child.idled)
    failure = describe(error)
    if child.reason is not None:
        # Cleaning up after a stop went wrong: the stop is still what ended the child.
        return stopped(child.reason, failure.message, idled=child.idled)
    child.verdict = verdict = judge(error)
    if verdict.category is not Category.OTHER:
        failure = msgspec.structs.replace(failure, category=verdict.category)
    return Failed(failure)


def _was_stopped(child: ChildScope, error: BaseException) -> bool:
    """Whether an error came of being stopped, be it the cancellation itself or what cleaning up made of it."""
    task = asyncio.current_task()
    asked = child.scope.cancel_called or (task is not None and task.cancelling() > 0)
    return asked or isinstance(error, asyncio.CancelledError) or consists_of(error, RuntimeClosed)


def consists_of(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether an error, and whatever it groups, is of one kind and nothing else."""
    # Without recursion: groups may be nested deeper than the stack.
    unseen = [error]
    while unseen:
        one = unseen.pop()
        if isinstance(one, BaseExceptionGroup):
            unseen.extend(one.exceptions)
        elif not isinstance(one, kind):
            return False
    return True


async def absorb_own_cancel() -> None:
    """Take back a cancellation that was nobody's but the code's own, so that its end can still be reported."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    try:
        # One that was asked for but not delivered yet would strike at the next await: let it be this one.
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        pass
    while task.cancelling():
        task.uncancel()


def _joined(message: str, detail: str | None) -> str:
    return message if detail is None else f"{message}; then {detail}"
