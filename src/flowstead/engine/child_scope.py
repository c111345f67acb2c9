"""One attempt of a child as its supervisor holds it: how to stop it, how long it may take, and what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from flowstead.engine.clock import Clock, Handle
from flowstead.engine.deadline import Deadline
from flowstead.engine.stop_scope import StopScope
from flowstead.log import get_logger
from flowstead.model.effect import StopReason
from flowstead.rules.classify import Verdict

log = get_logger(__name__)

Callback: TypeAlias = Callable[[], object]


class ChildScope:
    """The scope of one attempt, why it was stopped, if it was, and the verdict on its failure, if it failed."""

    __slots__ = (
        "_drain",
        "_idle",
        "_is_drained",
        "_is_killed",
        "_kill",
        "_late",
        "_wall",
        "adopted",
        "attempt",
        "begun",
        "climb",
        "flow_id",
        "hint",
        "idled",
        "reason",
        "scope",
        "verdict",
    )

    def __init__(
        self, attempt: int, clock: Clock | None = None, *, flow_id: str = "", adopted: bool = False
    ) -> None:
        self.attempt = attempt
        self.flow_id = flow_id
        self.adopted = adopted
        self.scope = StopScope(clock)
        self.reason: StopReason | None = None
        self.verdict: Verdict | None = None
        self.begun = False
        self.idled = False
        self.hint: str | None = None
        self.climb: Handle | None = None
        self._late: Callback = lambda: None
        self._kill: Callback | None = None
        self._drain: Callback | None = None
        self._is_killed = self._is_drained = False
        self._wall: Deadline | None = None
        self._idle: Deadline | None = None

    # ---- stopping ---------------------------------------------------------------------------------

    def stop(self, reason: StopReason) -> None:
        """Ask the child to stop. The first reason counts."""
        if self.reason is None:
            self.reason = reason
        self.scope.cancel()

    def kill(self) -> bool:
        """End by force what the child has outside this process, if anything, and ask it once more to stop."""
        self._is_killed = True
        if self._kill is not None:
            _call(self._kill)
        self.scope.cancel()
        return self._kill is not None

    def drain(self) -> None:
        """Tell the child that nothing new may start under it."""
        self._is_drained = True
        if self._drain is not None:
            _call(self._drain)

    def on_kill(self, kill: Callback) -> None:
        """What `kill` is to do, besides asking. At once, if it has been asked for already."""
        self._kill = kill
        if self._is_killed:
            _call(kill)

    def on_drain(self, drain: Callback) -> None:
        """What `drain` is to do. At once, if it has been asked for already."""
        self._drain = drain
        if self._is_drained:
            _call(drain)

    # ---- deadlines --------------------------------------------------------------------------------

    def limit(
        self,
        clock: Clock,
        lost: Callable[[], float],
        late: Callback = lambda: None,
        *,
        wall: float | None,
        idle: float | None,
    ) -> None:
        """Stop the child as timed out, and call `late`, after so many seconds in all or without a sign of life."""
        self._late = late
        if wall is not None:
            self._wall = Deadline(wall, clock, lost, self._timed_out)
        if idle is not None:
            self._idle = Deadline(idle, clock, lost, self._went_idle)

    def touch(self) -> None:
        """The child has given a sign of life."""
        if self._idle is not None and self.reason is None:
            self._idle.restart()

    def look(self) -> None:
        """Its code has come to an end: see whether that was in time."""
        for deadline in (self._wall, self._idle):
            if deadline is not None and self.reason is None:
                deadline.look()

    def close(self) -> None:
        """The attempt is over."""
        self.scope.give_up()
        if self.climb is not None:
            self.climb.cancel()
        for deadline in (self._wall, self._idle):
            if deadline is not None:
                deadline.cancel()

    def _timed_out(self) -> None:
        if self.reason is None:
            self.stop(StopReason.TIMED_OUT)
            self._late()

    def _went_idle(self) -> None:
        self.idled = self.reason is None
        self._timed_out()


def _call(callback: Callback) -> None:
    try:
        callback()
    except Exception as error:
        log.error("child.not_killed", error=type(error).__name__)
