"""What sort of failure it was, and what is worth doing about it. Pure, and wary: exceptions are other people's.

Asked in this order: what the child says of itself, the task's own `classify` function, the HTTP status an
exception carries, its class. Retry policies are then asked whether that is worth another attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from flowstead.errors import Fatal, NeedsReview, TaskSignal, Transient
from flowstead.model.retry import RETRIED, Category, Retry, name_of
from flowstead.model.task import Outcome, TimedOut

Classify: TypeAlias = Callable[[BaseException], "Category | str | None"]

_TRANSIENT: Final = (ConnectionError, TimeoutError, InterruptedError, BlockingIOError)
_TRANSIENT_NAMES: Final = frozenset({"socket.gaierror"})
_STATUSES: Final = {
    **dict.fromkeys((401, 403, 407), Category.AUTH),
    **dict.fromkeys((400, 422), Category.VALIDATION),
    **dict.fromkeys((408, 425, 429, 500, 502, 503, 504), Category.TRANSIENT),
}
_LONGEST_WAIT: Final = 7 * 24 * 3600.0


class Verdict(msgspec.Struct, frozen=True):
    """What to do about a failure: try again, have it looked at first, or neither. `retry_after` in seconds."""

    category: Category
    again: bool
    review: bool = False
    retry_after: float | None = None


def judge(error: BaseException, retry: Retry | None, classify: Classify | None = None) -> Verdict:
    """The verdict on what a child raised."""
    try:
        return _judge(error, retry, classify)
    except BaseException:
        # An exception may be as broken as the code that raised it.
        reasons = None if retry is None else retry.reasons
        return Verdict(Category.OTHER, again=reasons is None or Category.OTHER in reasons)


def _judge(error: BaseException, retry: Retry | None, classify: Classify | None) -> Verdict:
    leaves = _leaves(error)
    category = category_of(error, classify)
    # One branch that may work next time does not speak for the others; one that is hopeless does.
    said = all(isinstance(each, TaskSignal) for each in leaves) or _is_hopeless(leaves)
    after = max((s for each in leaves if (s := retry_after_of(each)) is not None), default=None)
    reasons = None if retry is None else retry.reasons
    if said or reasons is None:
        again = category in RETRIED
    else:
        again = category in reasons or all(
            not _mro_names(each).isdisjoint(reasons) for each in leaves
        )
    return Verdict(category, again, category is Category.VALIDATION and not again, after)


def judge_outcome(outcome: Outcome, retry: Retry | None) -> Verdict:
    """The verdict on an attempt that ended without raising: past a deadline, or with what cannot be kept."""
    category = Category.TIMED_OUT if isinstance(outcome, TimedOut) else Category.OTHER
    reasons = None if retry is None else retry.reasons
    return Verdict(category, reasons is None or category in reasons)


def category_of(error: BaseException, classify: Classify | None = None) -> Category:
    """The sort of failure an exception tells of. A group is of a sort if all in it are."""
    match error:
        case Transient():
            return Category.TRANSIENT
        case NeedsReview():
            return Category.VALIDATION
        case Fatal():
            return Category.FATAL
    if isinstance(error, BaseExceptionGroup) and (word := _said_in(error)) is not None:
        return word
    if classify is not None and (word := _asked(classify, error)) is not None:
        return word
    if isinstance(error, BaseExceptionGroup):
        inner = {category_of(each, classify) for each in _leaves(error)}
        return inner.pop() if len(inner) == 1 else Category.OTHER
    return _by_status(error) or _by_class(error)


def _is_hopeless(leaves: Sequence[BaseException]) -> bool:
    return any(isinstance(each, Fatal | NeedsReview) for each in leaves)


def _said_in(group: BaseExceptionGroup[BaseException]) -> Category | None:
    """What the child itself called hopeless, or unfit for anything but a person's eyes, in any branch."""
    said = {category_of(each) for each in _leaves(group) if isinstance(each, Fatal | NeedsReview)}
    if Category.FATAL in said:
        return Category.FATAL
    return Category.VALIDATION if said else None


def retry_after_of(error: BaseException) -> float | None:
    """How many seconds whoever refused asks to be left alone, where the exception says so."""
    seconds = _peek(error, "retry_after")
    if type(seconds) in (int, float) and seconds >= 0:
        return float(min(seconds, _LONGEST_WAIT))
    return None


def _asked(classify: Classify, error: BaseException) -> Category | None:
    try:
        word = classify(error)
        return None if word is None else Category(word)
    except BaseException:
        # A classifier that fails must not hide the failure it was asked about.
        return None


def _by_status(error: BaseException) -> Category | None:
    for holder in (error, _peek(error, "response")):
        for name in ("status_code", "status"):
            status = _peek(holder, name)
            if isinstance(status, int) and not isinstance(status, bool) and status in _STATUSES:
                return _STATUSES[status]
    return None


def _by_class(error: BaseException) -> Category:
    if isinstance(error, PermissionError):
        return Category.AUTH
    if isinstance(error, _TRANSIENT) or not _mro_names(error).isdisjoint(_TRANSIENT_NAMES):
        return Category.TRANSIENT
    # msgspec, pydantic, jsonschema and marshmallow all call it this.
    if any(kind.__name__ == "ValidationError" for kind in type(error).__mro__):
        return Category.VALIDATION
    return Category.OTHER


def _mro_names(error: BaseException) -> frozenset[str]:
    return frozenset(
        name_of(kind) for kind in type(error).__mro__ if issubclass(kind, BaseException)
    )


def _leaves(error: BaseException) -> list[BaseException]:
    """The exceptions of a group, or the one that is none."""
    # Without recursion: groups may be nested deeper than the stack.
    unseen: list[BaseException] = [error]
    leaves: list[BaseException] = []
    while unseen:
        one = unseen.pop()
        if isinstance(one, BaseExceptionGroup):
            unseen.extend(one.exceptions)
        else:
            leaves.append(one)
    return leaves


def _peek(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except BaseException:
        return None
