"""A cancel scope that asks again, but does not insist at every step.

Theory of operation. anyio delivers a cancellation for as long as the code inside goes on, in every step of the
event loop: right for code that obeys, but code that ignores it costs a whole core. So there are two scopes.
Cancelling the outer one delivers; closing the gate, a shield between it and the code, silences it after a few
steps. The gate is opened again now and then, at growing intervals, until the code is gone or given up.

Native `Task.cancel` would be simpler, and would break into what the code has shielded from cancellation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final

import anyio

from flowstead.engine.clock import Clock, Handle

_STEPS: Final = 8
_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGER_BY: Final = 1.25
_LONGEST_PAUSE_SECONDS: Final = 0.5
_PATIENCE_SECONDS: Final = 1.0


class StopScope:
    """The scope of one piece of code. `ignored` is called once if the code does not stop in a second or two."""

    __slots__ = (
        "_again",
        "_clock",
        "_gate",
        "_is_asking",
        "_is_inside",
        "_outer",
        "_pause",
        "_waited",
        "ignored",
        "is_given_up",
    )

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._outer = anyio.CancelScope()
        self._gate = anyio.CancelScope()
        self._is_inside = self._is_asking = False
        self._again: Handle | None = None
        self._pause = _FIRST_PAUSE_SECONDS
        self._waited = 0.0
        self.is_given_up = False
        self.ignored: Callable[[], object] | None = None

    @property
    def cancel_called(self) -> bool:
        """Whether the code has been asked to stop."""
        return self._outer.cancel_called

    def __enter__(self) -> StopScope:
        self._outer.__enter__()
        self._gate.__enter__()
        self._is_inside = True
        if self.cancel_called:
            self._deliver()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._is_inside = False
        self._be_quiet()
        try:
            self._gate.__exit__(kind, error, traceback)
        except BaseException as spoilt:
            return bool(self._outer.__exit__(type(spoilt), spoilt, spoilt.__traceback__))
        return bool(self._outer.__exit__(kind, error, traceback))

    def cancel(self) -> None:
        """Ask the code to stop, or ask again."""
        self._outer.cancel()
        if self._is_inside:
            self._deliver()

    def give_up(self) -> None:
        """Ask no more: the code is not waited for."""
        self.is_given_up = True
        self._be_quiet()

    def _be_quiet(self) -> None:
        self._is_asking = False
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def _deliver(self) -> None:
        """Let the cancellation through for a few steps of the loop."""
        self._be_quiet()
        self._is_asking = True
        self._gate.shield = False
        asyncio.get_running_loop().call_soon(self._count_down, _STEPS)

    def _count_down(self, steps: int) -> None:
        if not self._is_inside:
            return
        if steps:
            asyncio.get_running_loop().call_soon(self._count_down, steps - 1)
            return
        self._gate.shield = True
        if self._clock is not None and self._is_asking and self._again is None:
            self._again = self._clock.call_later(self._pause, self._ask_again)

    def _ask_again(self) -> None:
        self._again = None
        if not self._is_inside:
            return
        self._waited += self._pause
        if self.ignored is not None and self._waited >= _PATIENCE_SECONDS:
            ignored, self.ignored = self.ignored, None
            ignored()
        self._pause = min(_LONGER_BY * self._pause, _LONGEST_PAUSE_SECONDS)
        self._deliver()
