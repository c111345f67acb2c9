"""Every exception flowstead raises on purpose. Each family answers one question: what do I do next?

    FlowError
    ├── RefusedError      nothing changed        FlowNotFound FlowExists FlowNotManaged RevisionConflict
    │                                            IllegalTransition CancelPending InvalidState StateTooLarge
    │                                            TaskNotLinked TaskNotRetryable LimitReached NotApproved
    │                                            NotAwaited
    ├── Unavailable       safe to retry          MailboxFull RuntimeClosed
    ├── StoreError        reloaded from disk     CommitFailed (WriteConflict) OutcomeUnknown SnapshotUnreadable
    │                                            StoreInUse StoreUnusable
    └── ChildError        a child's outcome      ChildFailed ChildTimedOut ChildCancelled ChildLost WrongShape

What a child raises to say how its failure is to be taken is a family of its own: `TaskSignal`.

    TaskSignal            raised by children     Transient Fatal NeedsReview

Misuse (a blank controller, a wrong type, a misspelt status) stays `ValueError` or `TypeError`. Cancellation
is never translated. All of these survive pickling: they are built from positional facts, kept as attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowstead.model.flow import Failure, Flow


class FlowError(Exception):
    """The root of the tree."""


class RefusedError(FlowError):
    """The call was understood and refused. Nothing changed."""

    def __init__(self, reason: str, current: Flow | None = None) -> None:
        super().__init__(reason, current)
        self.reason = reason
        self.current = current

    def __str__(self) -> str:
        return self.reason


class FlowNotFound(RefusedError):
    """No such flow or task for this owner; a stranger's looks exactly the same."""


class FlowExists(RefusedError):
    """The owner already has a flow of this id, or used this idempotency key for something else."""


class FlowNotManaged(RefusedError):
    """The flow follows one task and is not changed by hand."""


class RevisionConflict(RefusedError):
    """Someone was faster. `current` is the flow now; decide again from there."""


class IllegalTransition(RefusedError):
    """The flow is final."""


class CancelPending(RefusedError):
    """A cancel intent stands: nothing new starts, or what runs has not stopped yet."""


class InvalidState(RefusedError):
    """A value that JSON cannot hold; the message has its path."""


class StateTooLarge(RefusedError):
    """A value over the size limit."""


class LimitReached(RefusedError):
    """A bound that waiting does not move: flows are nested too deep."""


class TaskNotRetryable(RefusedError):
    """There is nothing to retry: it runs, it has succeeded, or somebody else runs it."""


class NotApproved(RefusedError):
    """The approval does not allow this: it is about something else, used up, void, or was never given."""


class NotAwaited(RefusedError):
    """Nobody waits for the answer, or it is not of the shape that was asked for."""


class TaskNotLinked(RefusedError):
    """A launched child was reported on by hand; its outcome comes from its own code."""


class Unavailable(FlowError):
    """Not accepted, nothing changed, safe to retry."""


class MailboxFull(Unavailable):
    """Too much already waits for this flow."""

    def __init__(self, reason: str, current: Flow | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.current = current


class RuntimeClosed(Unavailable):
    """The runtime is closed, or was never opened."""


class StoreError(FlowError):
    """The disk had the last word. The flow is read from it again before it is touched next."""


class CommitFailed(StoreError):
    """Certainly not written."""

    def __init__(self, reason: str, current: Flow | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.current = current


class OutcomeUnknown(StoreError):
    """The disk failed during the commit and reading back could not settle it. Read before retrying."""

    def __init__(self, reason: str, current: Flow | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.current = current


class WriteConflict(CommitFailed):
    """One write of a batch does not fit the stored rows; the batch was rolled back whole."""


class SnapshotUnreadable(StoreError):
    """One stored row cannot be read. It is left untouched and listed; other flows are unaffected."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what = what
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.what} cannot be read: {self.problem}. The row was left as it is."


class StoreInUse(StoreError):
    """Another runtime owns the store."""

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(name, holder)
        self.name = name
        self.holder = holder

    def __str__(self) -> str:
        return f"{self.name} is in use by {self.holder}."


class StoreUnusable(StoreError):
    """The store cannot be opened as it is: damaged, foreign, too new, or not writable. It was not changed."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name = name
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.name} cannot be opened: {self.problem}"


class ChildError(FlowError):
    """A child task ended without a result."""

    def __init__(self, task_id: str, run_id: str | None, failure: Failure) -> None:
        super().__init__(task_id, run_id, failure)
        self.task_id = task_id
        self.run_id = run_id
        self.failure = failure

    def __str__(self) -> str:
        told = self.failure.message or self.failure.code or self.failure.kind
        return f"child {self.run_id or self.task_id!r} {self._ended}: {told}"

    _ended = "ended without a result"


class ChildFailed(ChildError):
    """The child raised, or was reported as failed."""

    _ended = "failed"


class ChildTimedOut(ChildError):
    """The child was stopped at its deadline."""

    _ended = "timed out"


class ChildCancelled(ChildError):
    """The child was stopped on request."""

    _ended = "was cancelled"


class ChildLost(ChildError):
    """Nobody knows how the child ended."""

    _ended = "was lost"


class WrongShape(ChildError):
    """The answer of a wait fits the schema of its type, and the type does not take it all the same."""

    _ended = "was answered with what its type does not take"


class TaskSignal(Exception):
    """What a child's code raises to say of its own failure what should be done about it."""

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        if type(self) is TaskSignal:
            raise TypeError(
                "raise Transient, Fatal or NeedsReview; TaskSignal is what they have in common."
            )
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return (_signal, (type(self), str(self), self.retry_after))


class Transient(TaskSignal):
    """It may work next time: another attempt, if the policy leaves one, after `retry_after` seconds at least."""


class Fatal(TaskSignal):
    """It will never work: no other attempt."""


class NeedsReview(TaskSignal):
    """A person has to look at it: the flow is blocked with this message until somebody answers."""


def _signal(kind: type[TaskSignal], message: str, retry_after: float | None) -> TaskSignal:
    return kind(message, retry_after=retry_after)
