"""Commands: everything that can be asked of one flow, as data. `rules` decides them, the engine carries them.

They live for one turn and hold no cycles, so the garbage collector is kept out (`gc=False`), here and in the
other records of the hot path: with ten thousand live flows it would take half of the time.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.flow import Failure, FlowStatus, StoredFlow
from flowstead.model.task import Launch, Outcome, TaskStatus, TerminalOutcome


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
    """Make the flow. `draft` carries everything; `defect` refuses it."""

    draft: StoredFlow
    defect: Defect | None = None


class SetWaiting(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Park the flow until outside input arrives; a named blocker makes it `blocked`."""

    expected_revision: int
    patch: Patch
    wait_json: Encoded
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
    """Stamp the intent: nothing new starts, what runs goes on."""

    expected_revision: int


class Cancel(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Stamp the intent and stop what runs; the flow ends when its code is gone."""

    expected_revision: int | None = None


class EnterController(msgspec.Struct, frozen=True, gc=False):
    """The controller is about to run: a queued flow becomes running."""


class ControllerStopped(msgspec.Struct, frozen=True, gc=False):
    """The controller was cancelled, or gave way to a cancel intent, without ending the flow."""


class TaskDraft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A child to be: what its caller fixes. With a `launch` the runtime runs it, else it is linked."""

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
    launch: Launch | None = None


class AddTasks(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Link or launch children. A known `run_id` answers the child that has it."""

    drafts: tuple[TaskDraft, ...]


class StartReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A linked child says it has started."""

    task_id: str


class ProgressReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A child says how far it is, or, without a summary, that it lives."""

    task_id: str
    summary: str | UnsetType | None = UNSET


class EndReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A child ended. Code run here names its `attempt`, so that a late result cannot speak for a newer one."""

    task_id: str
    outcome: Outcome
    attempt: int | None = None
    result: Encoded | UnsetType = UNSET
    terminal_summary: str | None = None
    terminal_outcome: TerminalOutcome | None = None
    chance: float = 0.0


class CancelTask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Stop one child."""

    task_id: str


class ReleaseTasks(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Children stopped by shutdown go back to the queue, their attempt unspent."""

    task_ids: tuple[str, ...]


class Tick(msgspec.Struct, frozen=True, gc=False):
    """A due instant of the flow has come: a retry, or the end of a cancel's grace."""


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
    | AddTasks
    | StartReport
    | ProgressReport
    | EndReport
    | CancelTask
    | ReleaseTasks
    | Tick
    | Recover
)
