"""Commands: everything that can be asked of one flow, as data. `rules` decides them, the engine carries them.

They live for one turn and hold no cycles, so the garbage collector is kept out (`gc=False`), here and in the
other records of the hot path: with ten thousand live flows it would take half of the time.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.approval import Vote
from flowstead.model.flow import Failure, FlowStatus, StoredFlow
from flowstead.model.task import Launch, Outcome, StoredTask, TaskStatus, TerminalOutcome
from flowstead.model.wait import Letter, Wait


class Defect(msgspec.Struct, frozen=True, gc=False):
    """User JSON that cannot be kept, with the code it is refused with and a sentence that says where."""

    code: str
    reason: str


Encoded: TypeAlias = Raw | Defect
"""User JSON as it arrives at the rules: ready for the store, or refused with a reason."""


class Patch(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Fields any mutation may set: UNSET leaves alone, None clears."""

    current_step: str | UnsetType | None = UNSET
    state_json: Encoded | UnsetType = UNSET


class Create(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Make the flow. `draft` has everything; `defect` refuses it; `carried` are ended children it begins with."""

    draft: StoredFlow
    defect: Defect | None = None
    carried: tuple[StoredTask, ...] = ()


class SetWaiting(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Park the flow until outside input arrives; a named blocker makes it `blocked`."""

    expected_revision: int
    patch: Patch
    wait_json: Encoded
    wait: Wait | None = None
    blocked_task_id: str | None = None
    blocked_summary: str | None = None


class Resume(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Put the flow back to `queued` or `running`, clearing wait and blocker."""

    expected_revision: int
    patch: Patch
    status: FlowStatus


class Update(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Set fields, keep the status."""

    expected_revision: int
    patch: Patch
    by_controller: bool = False


class Finish(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """End the flow as succeeded. Without a revision: by its own controller's return."""

    expected_revision: int | None
    patch: Patch
    by_controller: bool = False


class Fail(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """End the flow as failed. Without a revision: by its own controller's exception."""

    expected_revision: int | None
    patch: Patch
    blocked_task_id: str | UnsetType | None = UNSET
    blocked_summary: str | UnsetType | None = UNSET
    failure: Failure | None = None
    by_controller: bool = False


class RequestCancel(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Stamp the intent: nothing new starts, what runs goes on. Without a revision: passed on from a flow above."""

    expected_revision: int | None


class Cancel(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Stamp the intent and stop what runs; the flow ends when its code is gone."""

    expected_revision: int | None = None


class EnterController(msgspec.Struct, frozen=True, gc=False):
    """The controller is about to run: a queued flow becomes running."""


class ControllerStopped(msgspec.Struct, frozen=True, gc=False):
    """The controller was cancelled, or gave way to a cancel intent, without ending the flow.

    `failure` is what the flow fails with if there is no intent that it could have given way to.
    """

    failure: Failure | None = None


class TaskDraft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A child to be: what its caller fixes. With a `launch` the runtime runs it, else it is linked.

    One with a `wait` is waited for, one with a `letter` brings a message. `approval` names the step whose approval
    it needs.
    """

    key: int
    task_id: str
    runtime: str
    task: str
    run_id: str | None = None
    child_session_key: str | None = None
    label: str | None = None
    input_json: Encoded | UnsetType = UNSET
    status: TaskStatus = TaskStatus.QUEUED
    started_at: int | None = None
    last_event_at: int | None = None
    timeout: float | None = None
    idle_timeout: float | None = None
    queue_timeout: float | None = None
    child_flow_id: str | None = None
    launch: Launch | None = None
    wait: Wait | None = None
    letter: Letter | None = None
    approval: str | None = None


class Spawn(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Make a flow that follows the one task it is made with."""

    draft: StoredFlow
    task: TaskDraft


class AddTasks(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Link or launch children. A known `run_id` answers the child that has it."""

    drafts: tuple[TaskDraft, ...]


class Await(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The controller stands still until one of its steps ends, those in `drafts` among them.

    `steps` are run ids or task ids. One that may not be parked is in the midst of something that would be lost.
    With `withdraw` those of the others that nobody has begun end together with the first.
    """

    drafts: tuple[TaskDraft, ...] = ()
    steps: tuple[str, ...]
    may_park: bool = True
    withdraw: bool = False


class StopAwaiting(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The controller went on without an answer: its own code stopped waiting for these steps."""

    steps: tuple[str, ...]


class ControllerParked(msgspec.Struct, frozen=True, gc=False):
    """The controller has left memory; if the flow was woken meanwhile, it is entered again."""


class Deliver(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An answer from outside, for a wait on a key, or for one wait: a child, or by an empty id the flow's own.

    With the digest of a `token`, for no other own wait than the one that has it.
    """

    wait_key: str | None = None
    task_id: str | None = None
    token: str | None = None
    payload: Raw | UnsetType = UNSET
    signal_id: str | None = None


class Tell(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A message for an inbox of the flow: taken at once by who waits for it, or kept until somebody does.

    One for a `step` is not kept once there has been such a step.
    """

    draft: TaskDraft
    step: str | None = None


class CastVote(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One person's word on an approval, named by its child's id or its step.

    `early` keeps it until the question is asked.
    """

    step: str
    vote: Vote
    early: TaskDraft | None = None


class Notify(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tell the owner something, once for each step name; with a bucket, as part of a digest at `due_at`."""

    draft: TaskDraft
    text: str
    data: Encoded | UnsetType = UNSET
    bucket: str | None = None
    due_at: int | None = None


class NoteDelivery(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An update could not be delivered and was given up."""

    slot: str
    reason: str


class StartReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A linked child says it has started."""

    task_id: str


class ProgressReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A child says how far it is, or, without a summary, that it lives."""

    task_id: str
    summary: str | UnsetType | None = UNSET


class EndReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A child ended. Code run here names its `attempt`, so that a late result cannot speak for a newer one.

    `again` says that a failure is worth another attempt, as far as the policy leaves one, `review` that a
    person should look at it first, and `retry_after` how many seconds whoever refused asked for.
    """

    task_id: str
    outcome: Outcome
    attempt: int | None = None
    result: Encoded | UnsetType = UNSET
    terminal_summary: str | None = None
    terminal_outcome: TerminalOutcome | None = None
    chance: float = 0.0
    again: bool = True
    review: bool = False
    retry_after: float | None = None


class RetryTask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Start a child's next attempt now, with another input if one is given."""

    task_id: str
    input_json: Encoded | UnsetType = UNSET


class CancelTask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Stop one child."""

    task_id: str


class ReleaseTasks(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Children stopped by shutdown go back to the queue, their attempt unspent.

    Of those in `begun` code has run: what must not be done twice ends as lost.
    """

    task_ids: tuple[str, ...]
    begun: frozenset[str] = frozenset()


class Tick(msgspec.Struct, frozen=True, gc=False):
    """A due instant of the flow has come: a retry, a deadline, the next rung of a stop."""


class Wake(msgspec.Struct, frozen=True, gc=False):
    """A slot has come free that a child of the flow may take."""


class Recover(msgspec.Struct, frozen=True, gc=False):
    """Derive from the snapshot what must move again after it was loaded."""


Command: TypeAlias = (
    Create
    | SetWaiting
    | Resume
    | Update
    | Finish
    | Fail
    | RequestCancel
    | Cancel
    | EnterController
    | ControllerStopped
    | Spawn
    | AddTasks
    | Await
    | StopAwaiting
    | ControllerParked
    | Deliver
    | Tell
    | CastVote
    | Notify
    | NoteDelivery
    | StartReport
    | ProgressReport
    | EndReport
    | RetryTask
    | CancelTask
    | ReleaseTasks
    | Tick
    | Wake
    | Recover
)
