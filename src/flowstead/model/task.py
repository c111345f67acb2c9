"""The child task: one piece of work under a flow, linked (run elsewhere) or launched (run here)."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeAlias, assert_never

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.flow import Failure, Json, NotifyPolicy, Whole
from flowstead.model.retry import Retry
from flowstead.model.wait import Letter, Wait


class TaskStatus(StrEnum):
    """Where a child stands. `queued` and `running` are active, the rest are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    LOST = "lost"


LAUNCHED_RUNTIME: Final = "task"
"""The `runtime` of children this runtime runs itself, unless their caller gives another word."""

CODE: Final = "code"
"""The executor of plain functions."""

ACTIVE_TASK_STATUSES: Final = frozenset({TaskStatus.QUEUED, TaskStatus.RUNNING})
FAILED_TASK_STATUSES: Final = frozenset({TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.LOST})


class TerminalOutcome(StrEnum):
    """What a succeeded child says of its result: usable, or finished without one."""

    SUCCEEDED = "succeeded"
    BLOCKED = "blocked"


class DeliveryStatus(StrEnum):
    """How far the news of a child's end has come."""

    PENDING = "pending"
    DELIVERED = "delivered"
    SESSION_QUEUED = "session_queued"
    FAILED = "failed"
    PARENT_MISSING = "parent_missing"
    NOT_APPLICABLE = "not_applicable"


class OnRestart(StrEnum):
    """What becomes of a launched child whose process died before its outcome was recorded."""

    RETRY = "retry"
    LOST = "lost"


class Task(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """A child task as its flow's owner sees it: a snapshot that shares nothing.

    `attempt` counts starts, from 1; it is 0 while the child has never been started by this runtime.
    `cancel_requested_at` is set once it has been asked to stop while it ran: it is not tried again, and
    `kill_requested_at` once it was given up on stopping by itself. `review_requested_at` is set while a person
    has to look at its failure. `timeout` and `idle_timeout` bound each attempt, `queue_timeout` the wait for
    the first. `child_flow_id` is the flow a nested child stands for.
    """

    task_id: str
    flow_id: str
    runtime: str
    run_id: str | None = None
    child_session_key: str | None = None
    task: str
    label: str | None = None
    input_json: Json = None
    status: TaskStatus
    attempt: Whole = 0
    max_attempts: Whole = 1
    next_attempt_at: Whole | None = None
    timeout: float | None = None
    idle_timeout: float | None = None
    queue_timeout: float | None = None
    child_flow_id: str | None = None
    result_json: Json = None
    failure: Failure | None = None
    progress_summary: str | None = None
    terminal_summary: str | None = None
    terminal_outcome: TerminalOutcome | None = None
    delivery_status: DeliveryStatus
    notify_policy: NotifyPolicy
    created_at: Whole
    started_at: Whole | None = None
    last_event_at: Whole | None = None
    review_requested_at: Whole | None = None
    cancel_requested_at: Whole | None = None
    kill_requested_at: Whole | None = None
    ended_at: Whole | None = None
    cleanup_after: Whole | None = None


class Launch(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """How the runtime runs a child itself; a linked child has none.

    `function` names a registered task; without one the callable was handed over in memory and is gone
    after a crash, unless the `executor` needs none: then `spec` says what it does. Children of one `group`
    share its `limit`; without a group, the flow's own. Something of an `external` child may live on after our
    process has died. One that does not `hold_slot` only waits for others, and counts towards no limit but its
    flow's. `depth` and `root_id` are those of the nested flow the child stands for.
    """

    executor: str = CODE
    spec: Raw | UnsetType = UNSET
    external: bool = False
    holds_slot: bool = True
    depth: int = 0
    root_id: str | None = None
    function: str | None = None
    on_restart: OnRestart = OnRestart.RETRY
    retry: Retry | None = None
    group: str | None = None
    limit: int | None = None


class StoredTask(Task, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """A child as the runtime keeps it. `interruptions` counts attempts cut off by a crash.

    One with a `wait` stands still for its flow until it is answered; one with a `letter` is a message to it.
    """

    key: Whole
    flow_key: Whole
    input_json: Raw | UnsetType = UNSET
    result_json: Raw | UnsetType = UNSET
    launch: Launch | None = None
    interruptions: Whole = 0
    wait: Wait | None = None
    letter: Letter | None = None


def is_bare(launch: Launch) -> bool:
    """Whether the child runs a function that only its own process has."""
    return launch.function is None and launch.spec is UNSET


def is_owned(task: StoredTask) -> bool:
    """Whether the child is the runtime's own affair, rather than run and reported on by somebody else."""
    return task.launch is not None or task.wait is not None or task.letter is not None


def is_active(task: Task) -> bool:
    """Whether the child has no outcome yet."""
    return task.ended_at is None


class Succeeded(msgspec.Struct, frozen=True, tag="succeeded", tag_field="status"):
    """The child returned `result`."""

    result: Json = None


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="status"):
    """The child raised, or was reported as failed."""

    failure: Failure


class TimedOut(msgspec.Struct, frozen=True, tag="timed_out", tag_field="status"):
    """The child was still running at its deadline and was stopped."""

    failure: Failure


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled", tag_field="status"):
    """The child was stopped on request, or never started because of one."""

    failure: Failure


class Lost(msgspec.Struct, frozen=True, tag="lost", tag_field="status"):
    """Nobody knows how the child ended; `failure.message` says why."""

    failure: Failure


Outcome: TypeAlias = Succeeded | Failed | TimedOut | Cancelled | Lost


def outcome_status(outcome: Outcome) -> TaskStatus:
    """The status a child ends with."""
    match outcome:
        case Succeeded():
            return TaskStatus.SUCCEEDED
        case Failed():
            return TaskStatus.FAILED
        case TimedOut():
            return TaskStatus.TIMED_OUT
        case Cancelled():
            return TaskStatus.CANCELLED
        case Lost():
            return TaskStatus.LOST
        case _:
            assert_never(outcome)


def outcome_of(task: Task) -> Outcome:
    """The outcome an ended child's record stands for."""
    failure = task.failure or Failure(kind=task.status.value)
    match task.status:
        case TaskStatus.SUCCEEDED:
            return Succeeded(task.result_json)
        case TaskStatus.FAILED:
            return Failed(failure)
        case TaskStatus.TIMED_OUT:
            return TimedOut(failure)
        case TaskStatus.CANCELLED:
            return Cancelled(failure)
        case TaskStatus.LOST:
            return Lost(failure)
        case TaskStatus.QUEUED | TaskStatus.RUNNING:
            raise ValueError(f"task {task.task_id} has not ended; it is {task.status.value}")
        case _:
            assert_never(task.status)


class TaskSummary(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Counts of a flow's children; every status and every usual runtime is present, zero or not.

    `failures` counts failed, timed-out and lost children.
    """

    total: int
    active: int
    terminal: int
    failures: int
    by_status: dict[str, int]
    by_runtime: dict[str, int]
