"""The life cycle of a flow: one table of (standing, operation), and nothing else decides what is legal.

A flow stands in one of three places: live, live with a cancel intent, or ended. The status inside "live"
(queued, running, waiting, blocked) never matters for what is allowed; what an operation does to it is the
operation's own affair. Ended is final, and the intent is never forgotten: no operation leads back.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from flowstead.model.code import CANCEL_REQUESTED, Code, Refusal
from flowstead.model.flow import Flow, has_ended


class Standing(StrEnum):
    """All that the life cycle needs to know of a flow."""

    LIVE = "live"
    CANCEL_REQUESTED = "cancel_requested"
    ENDED = "ended"


class Operation(StrEnum):
    """What can be asked of a flow."""

    SET_WAITING = "set_waiting"
    RESUME = "resume"
    UPDATE = "update"
    FINISH = "finish"
    FAIL = "fail"
    REQUEST_CANCEL = "request_cancel"
    CANCEL = "cancel"
    RUN_TASK = "run_task"


class Verdict(StrEnum):
    """Applied, or the code of the refusal."""

    APPLIED = "applied"
    CANCEL_REQUESTED = "cancel_requested"
    TERMINAL = "terminal"


_YES: Final = Verdict.APPLIED
_INTENT: Final = Verdict.CANCEL_REQUESTED
_ENDED: Final = Verdict.TERMINAL

# fmt: off
TABLE: Final[dict[Operation, dict[Standing, Verdict]]] = {
    operation: dict(zip(Standing, row, strict=True))
    for operation, row in {
        #                           live   intent   ended
        Operation.SET_WAITING:    (_YES, _INTENT, _ENDED),
        Operation.RESUME:         (_YES, _INTENT, _ENDED),
        Operation.UPDATE:         (_YES, _YES,    _ENDED),
        Operation.FINISH:         (_YES, _YES,    _ENDED),
        Operation.FAIL:           (_YES, _YES,    _ENDED),
        Operation.REQUEST_CANCEL: (_YES, _INTENT, _ENDED),
        Operation.CANCEL:         (_YES, _YES,    _ENDED),
        Operation.RUN_TASK:       (_YES, _INTENT, _ENDED),
    }.items()
}
# fmt: on


def standing(flow: Flow) -> Standing:
    """Where the flow stands."""
    if has_ended(flow):
        return Standing.ENDED
    if flow.cancel_requested_at is not None:
        return Standing.CANCEL_REQUESTED
    return Standing.LIVE


def refusal(flow: Flow, operation: Operation) -> Refusal | None:
    """Why the operation is illegal for the flow now, or None if it is legal."""
    match TABLE[operation][standing(flow)]:
        case Verdict.APPLIED:
            return None
        case Verdict.CANCEL_REQUESTED:
            return CANCEL_REQUESTED
        case Verdict.TERMINAL:  # pragma: no branch - there is no fourth verdict
            return Refusal(Code.TERMINAL, f"Flow is already {flow.status.value}.")
