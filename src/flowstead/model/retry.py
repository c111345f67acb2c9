"""How often and how fast a failed child is tried again: a frozen policy, no state.

The count and the next instant live in the child's row, so they survive restarts.
"""

from __future__ import annotations

from typing import Final

import msgspec

_TEN_YEARS: Final = 10 * 365 * 24 * 3600


class Retry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Try again after a failure or a time-out, at most `max_attempts` times in all.

    The n-th retry waits `initial * factor ** (n - 1)` seconds, never more than `max_delay`; `jitter` takes
    up to that share of the delay away, at random (0 for none, 1 for all of it).
    """

    max_attempts: int = 3
    initial: float = 1.0
    factor: float = 2.0
    max_delay: float = 60.0
    jitter: float = 0.1

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

    def delay_after(self, failures: int, chance: float) -> float:
        """Seconds to wait after the given number of failures; `chance` in [0, 1) places the jitter."""
        try:
            delay = min(self.initial * self.factor ** (failures - 1), self.max_delay)
        except OverflowError:
            delay = self.max_delay
        return delay * (1 - self.jitter * chance)
