"""What the ledger face answers with: values that say what happened, and can raise it on request."""

from __future__ import annotations

from typing import Any, Final, Literal, NoReturn

import msgspec

from flowstead import errors
from flowstead.decision import Ballot
from flowstead.model.approval import Verdict, VoteCode
from flowstead.model.code import Code, Refusal
from flowstead.model.flow import Flow, Json
from flowstead.model.signal import SignalCode
from flowstead.model.task import Task
from flowstead.settlement import Settlement

_ERRORS: Final[dict[Code, Any]] = {
    Code.NOT_FOUND: errors.FlowNotFound,
    Code.NOT_MANAGED: errors.FlowNotManaged,
    Code.REVISION_CONFLICT: errors.RevisionConflict,
    Code.TERMINAL: errors.IllegalTransition,
    Code.CANCEL_REQUESTED: errors.CancelPending,
    Code.CANCEL_PENDING: errors.CancelPending,
    Code.STATE_TOO_LARGE: errors.StateTooLarge,
    Code.INVALID_STATE: errors.InvalidState,
    Code.DUPLICATE: errors.FlowExists,
    Code.FLOW_EXISTS: errors.FlowExists,
    Code.NOT_LINKED: errors.TaskNotLinked,
    Code.NOT_RETRYABLE: errors.TaskNotRetryable,
    Code.LIMIT_REACHED: errors.LimitReached,
    Code.NOT_APPROVED: errors.NotApproved,
    Code.UNAWAITED: errors.NotAwaited,
    Code.LATE: errors.NotAwaited,
    Code.WRONG_SHAPE: errors.NotAwaited,
    Code.ABANDONED: errors.CancelPending,
    Code.OVERLOADED: errors.MailboxFull,
    Code.PERSIST_FAILED: errors.CommitFailed,
    Code.OUTCOME_UNKNOWN: errors.OutcomeUnknown,
}


def error_for(code: Code, reason: str, current: Flow | None = None) -> errors.FlowError:
    """The exception that says the same as a refusal."""
    error: errors.FlowError = _ERRORS[code](reason, current)
    return error


def raise_refusal(refusal: Refusal, current: Flow | None = None) -> NoReturn:
    """Raise a refusal as its exception."""
    raise error_for(refusal.code, refusal.reason, current)


class Applied(msgspec.Struct, frozen=True, rename="camel", tag=True, tag_field="type", gc=False):
    """The mutation is durable; `flow` is the flow right after it."""

    flow: Flow

    @property
    def applied(self) -> Literal[True]:
        return True

    @property
    def code(self) -> None:
        return None

    def unwrap(self) -> Flow:
        """The flow."""
        return self.flow


class Rejected(msgspec.Struct, frozen=True, rename="camel", tag=True, tag_field="type", gc=False):
    """Nothing changed. `code` is for programs, `reason` for people, `current` the flow as it is now."""

    code: Code
    current: Flow | None = None
    reason: str = ""

    @property
    def applied(self) -> Literal[False]:
        return False

    @property
    def flow(self) -> Flow | None:
        """The same as `current`."""
        return self.current

    def unwrap(self) -> NoReturn:
        """Raise what this rejection stands for."""
        raise error_for(self.code, self.reason, self.current)


class Created(msgspec.Struct, frozen=True, rename="camel", tag=True, tag_field="type", gc=False):
    """The child exists; `flow` is its flow, whose revision the child has not touched."""

    flow: Flow
    task: Task

    @property
    def created(self) -> Literal[True]:
        return True

    @property
    def code(self) -> None:
        return None

    @property
    def reason(self) -> None:
        return None

    @property
    def found(self) -> Literal[True]:
        return True

    def unwrap(self) -> Task:
        """The child."""
        return self.task


class Refused(msgspec.Struct, frozen=True, rename="camel", tag=True, tag_field="type", gc=False):
    """No child was made. With code `duplicate`, `task` is the one that already has the run id."""

    code: Code
    reason: str
    found: bool
    flow: Flow | None = None
    task: Task | None = None

    @property
    def created(self) -> Literal[False]:
        return False

    def unwrap(self) -> NoReturn:
        """Raise what this refusal stands for."""
        raise error_for(self.code, self.reason, self.flow)


class CancelReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What `cancel` achieved. `cancelled` means: ended as cancelled, and no code of the flow runs here.

    With code `cancel_pending` the intent stands and `tasks` are the children still active; the flow ends when
    they do. With `abandoned` the flow is cancelled, but code that would not stop was given up and may still run.
    Otherwise `tasks` are all children. `descendants` has a line for each child, however deep, that was alive
    when the cancel began: how it ended, or why it has not, and when. What others run for a flow below that has
    ended by itself goes on whatever becomes of this one, and its line says so.

    Work that a child has put behind `asyncio.shield`, `asyncio.create_task` or an executor of its own is out of
    the runtime's sight. Task groups, shielded scopes and `anyio.to_thread` are not.
    """

    found: bool
    cancelled: bool
    code: Code | None = None
    reason: str | None = None
    flow: Flow | None = None
    tasks: list[Task] = []
    descendants: list[Settlement] = []


class TaskRetryReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What `retry_task` achieved. `task` is the child as it is now."""

    found: bool
    retried: bool
    reason: str | None = None
    task: Task | None = None


class TaskCancelReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What `cancel_task` achieved."""

    found: bool
    cancelled: bool
    reason: str | None = None
    task: Task | None = None


class SignalReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What became of a signal. `matched` counts the flows it has woken, named in `flow_ids`.

    `code` is `matched`; `kept`, where it came early and is kept until `expires_at`; or why it woke nobody: `late`,
    `duplicate`, `unawaited`, `wrong_shape`, `not_found`. `reason` says the same for people.
    """

    matched: int
    kept: bool
    code: SignalCode
    reason: str
    flow_ids: list[str] = []
    expires_at: int | None = None


class VoteReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What became of a vote. `verdict` is how the approval came out, once it has.

    `code` is `counted`; `kept`, where it came before the question, on which it will be counted if it names the
    digest of what is then shown; or why it does not count: `late` (decided, or over), `expired`, `stale`, `changed`
    (it names another digest than is asked now), `not_an_approver`, `no_approver`, `wrong_role`, `four_eyes`,
    `already_voted`, `wrong_shape` and `wrong_items` (of an edit), `too_many`, `decided`, `not_found`. `reason` says
    the same for people.
    """

    counted: bool
    kept: bool = False
    code: VoteCode
    verdict: Verdict | None = None
    reason: str | None = None


class OpenApproval(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What is to be decided, by whom, and what has been said so far. A vote must name the `digest`."""

    items: Json
    digest: str
    quorum: int
    roles: list[str] = []
    approvers: list[str] = []
    votes: list[Ballot] = []


class OpenWait(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Something that a flow waits for, with all that is needed to answer it.

    `name` is the step, None for a wait of the flow itself. `token` answers it without knowing the flow: whoever has
    it may. `approval` is what is to be decided, `schema` what the answer must fit. `number` is its place among all
    that are listed: that of the last one of a page is the next page's `after`.
    """

    number: int
    owner_key: str
    flow_id: str
    task_id: str | None = None
    name: str | None = None
    kind: str
    key: dict[str, Json] = {}
    token: str | None = None
    prompt: str | None = None
    schema: Json = None
    deadline_at: int | None = None
    opened_at: int | None = None
    approval: OpenApproval | None = None
