"""How often and how fast a failed child is tried again: a frozen policy, no state.

The count and the next instant live in the child's row, so they survive restarts.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

_TEN_YEARS: Final = 10 * 365 * 24 * 3600


class Category(StrEnum):
    """What sort of failure it was, which decides what is worth doing about it.

    Transient ones are worth another attempt, authentication is not, validation needs a person's eyes, fatal is
    what the child itself called hopeless. `other` is everything nobody has a better word for.
    """

    TRANSIENT = "transient"
    TIMED_OUT = "timed_out"
    AUTH = "auth"
    VALIDATION = "validation"
    FATAL = "fatal"
    OTHER = "other"


RETRIED: Final = frozenset({Category.TRANSIENT, Category.TIMED_OUT, Category.OTHER})
"""What is tried again where a policy does not say."""

if TYPE_CHECKING:
    RetryOn: TypeAlias = str | type[BaseException] | Sequence[str | type[BaseException]]
else:
    # Kept by name, so that a policy is JSON and means the same in the next process.
    RetryOn = tuple[str, ...]


class Retry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Try again after a failure or a time-out, at most `max_attempts` times in all.

    The n-th retry waits `initial * factor ** (n - 1)` seconds, never more than `max_delay`; `jitter` takes
    up to that share of the delay away, at random (0 for none, 1 for all of it).

    `retry_on` says what is worth it: categories (`"transient"`, `"timed_out"`, `"auth"`, `"validation"`,
    `"other"`), exception classes, or their dotted names; unless given, transient failures, time-outs and
    others. What the child says of itself (`Transient`, `Fatal`, `NeedsReview`) comes before it.
    """

    max_attempts: int = 3
    initial: float = 1.0
    factor: float = 2.0
    max_delay: float = 60.0
    jitter: float = 0.1
    retry_on: RetryOn | None = None

    def __post_init__(self) -> None:
        if type(self.max_attempts) is not int or self.max_attempts < 1:
            raise ValueError(
                f"Retry.max_attempts must be a whole number of at least 1, not {self.max_attempts!r}."
            )
        for name in ("initial", "factor", "max_delay", "jitter"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= _TEN_YEARS:
                raise ValueError(f"Retry.{name} must be a number from 0 to {_TEN_YEARS}.")
        if self.factor < 1:
            raise ValueError(f"Retry.factor must be at least 1, not {self.factor}.")
        if self.jitter > 1:
            raise ValueError(f"Retry.jitter is a share between 0 and 1, not {self.jitter}.")
        if self.retry_on is not None:
            msgspec.structs.force_setattr(self, "retry_on", _names(self.retry_on))

    @property
    def reasons(self) -> frozenset[str] | None:
        """What is tried again: categories and names of exception classes; None if the policy does not say."""
        return None if self.retry_on is None else frozenset(_names(self.retry_on))

    def delay_after(self, failures: int, chance: float) -> float:
        """Seconds to wait after the given number of failures; `chance` in [0, 1) places the jitter."""
        try:
            delay = min(self.initial * self.factor ** (failures - 1), self.max_delay)
        except OverflowError:
            delay = self.max_delay
        return delay * (1 - self.jitter * chance)


def name_of(kind: type[BaseException]) -> str:
    """The name an exception class is kept under: `builtins.ConnectionError`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _names(given: object) -> tuple[str, ...]:
    several = (given,) if isinstance(given, (str, type)) else given
    if not isinstance(several, Iterable):
        raise TypeError(
            f"Retry.retry_on takes categories and exception classes, not {given!r:.80}."
        )
    return tuple(_name(each) for each in several)


def _name(given: object) -> str:
    if isinstance(given, type) and issubclass(given, BaseException):
        return name_of(given)
    if not isinstance(given, str):
        raise TypeError(
            f"Retry.retry_on takes categories and exception classes, not {given!r:.80}."
        )
    if given in tuple(Category) or "." in given:
        return given
    kind = getattr(builtins, given, None)
    if isinstance(kind, type) and issubclass(kind, BaseException):
        return name_of(kind)
    words = ", ".join(word.value for word in Category)
    raise ValueError(
        f"Retry.retry_on: {given!r:.80} is neither an exception nor one of {words}; name a class as 'module.Class'."
    )
