"""The codes and the sentences a refusal carries. Codes are for programs; hosts match the sentences too."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Code(StrEnum):
    """Why a call changed nothing."""

    NOT_FOUND = "not_found"
    NOT_MANAGED = "not_managed"
    REVISION_CONFLICT = "revision_conflict"
    TERMINAL = "terminal"
    CANCEL_REQUESTED = "cancel_requested"
    CANCEL_PENDING = "cancel_pending"
    STATE_TOO_LARGE = "state_too_large"
    INVALID_STATE = "invalid_state"
    DUPLICATE = "duplicate"
    FLOW_EXISTS = "flow_exists"
    NOT_LINKED = "not_linked"
    NOT_RETRYABLE = "not_retryable"
    ABANDONED = "abandoned"
    LIMIT_REACHED = "limit_reached"
    UNAWAITED = "unawaited"
    LATE = "late"
    WRONG_SHAPE = "wrong_shape"
    NOT_APPROVED = "not_approved"
    OVERLOADED = "overloaded"
    PERSIST_FAILED = "persist_failed"
    OUTCOME_UNKNOWN = "outcome_unknown"


class Refusal(msgspec.Struct, frozen=True):
    """A command that changed nothing, and why; `detail` is the code of the rules that were asked."""

    code: Code
    reason: str
    detail: str | None = None


NOT_FOUND = Refusal(Code.NOT_FOUND, "Flow not found.")
TASK_NOT_FOUND = Refusal(Code.NOT_FOUND, "Task not found.")
NOT_MANAGED = Refusal(Code.NOT_MANAGED, "Flow is not managed by its owner.")
NO_CHILDREN_ACCEPTED = Refusal(Code.NOT_MANAGED, "Flow does not accept managed child tasks.")
CANCEL_REQUESTED = Refusal(Code.CANCEL_REQUESTED, "Flow cancellation has already been requested.")
CANCEL_PENDING = Refusal(Code.CANCEL_PENDING, "One or more child tasks are still active.")
ABANDONED = Refusal(
    Code.ABANDONED,
    "Flow is cancelled, but code of it that would not stop was given up and may still run.",
)
MAILBOX_FULL = Refusal(
    Code.OVERLOADED, "Flow has too many mutations waiting. Nothing changed; try again."
)
FLOW_PERSIST_FAILED = Refusal(Code.PERSIST_FAILED, "Flow persistence failed.")
OUTCOME_UNKNOWN = Refusal(
    Code.OUTCOME_UNKNOWN,
    "The disk failed during the commit and reading back could not settle it."
    " Read the flow again before retrying.",
)
