"""How one child changes: started, reported on, retried, ended. Each ends exactly once.

Every function takes a child and answers the child afterwards with the fact that tells of it. Who may call
for the change is decided in `decide`.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.event import EventType
from flowstead.model.flow import Failure, NotifyPolicy
from flowstead.model.task import (
    DeliveryStatus,
    Lost,
    Outcome,
    StoredTask,
    Succeeded,
    TaskStatus,
    TerminalOutcome,
    outcome_status,
)
from flowstead.rules.view import Fact, change_task

Change = tuple[StoredTask, Fact]

NULL: Final = Raw(b"null")
RETENTION_MS: Final = 7 * 24 * 3600 * 1000
LOST_RETENTION_MS: Final = 24 * 3600 * 1000


def start(task: StoredTask, now: int) -> Change:
    """queued → running; the attempt is counted before its first line runs."""
    return change_task(
        task,
        now,
        EventType.TASK_STARTED,
        status=TaskStatus.RUNNING,
        attempt=task.attempt + 1,
        started_at=now if task.started_at is None else task.started_at,
        next_attempt_at=None,
    )


def restart(task: StoredTask, now: int) -> Change:
    """running → running under a new attempt: the old one was cut off by a crash."""
    return change_task(
        task,
        now,
        EventType.TASK_STARTED,
        attempt=task.attempt + 1,
        interruptions=task.interruptions + 1,
    )


def interrupt(task: StoredTask, now: int) -> Change:
    """running → queued: cut off by a crash, and others have taken the room meanwhile."""
    return change_task(
        task,
        now,
        EventType.TASK_INTERRUPTED,
        status=TaskStatus.QUEUED,
        interruptions=task.interruptions + 1,
    )


def release(task: StoredTask, now: int) -> Change:
    """running → queued: stopped by shutdown, so there is no outcome and no attempt is spent."""
    return change_task(
        task, now, EventType.TASK_RELEASED, status=TaskStatus.QUEUED, attempt=task.attempt - 1
    )


def report_start(task: StoredTask, now: int) -> Change:
    """queued → running, by the word of whoever runs a linked child."""
    return change_task(
        task,
        now,
        EventType.TASK_STARTED,
        status=TaskStatus.RUNNING,
        started_at=now if task.started_at is None else task.started_at,
    )


def progress(task: StoredTask, now: int, summary: str | UnsetType | None) -> Change:
    """A sign of life, with or without a summary."""
    if summary is UNSET:
        return change_task(task, now, EventType.TASK_PROGRESSED)
    return change_task(task, now, EventType.TASK_PROGRESSED, progress_summary=summary)


def request_cancel(task: StoredTask, now: int) -> Change:
    """The child is asked to stop: whatever becomes of this attempt, there will be no other."""
    return change_task(task, now, EventType.TASK_CANCEL_REQUESTED, cancel_requested_at=now)


def request_kill(task: StoredTask, now: int) -> Change:
    """The child would not stop by itself: what it still has running is ended by force."""
    return change_task(task, now, EventType.TASK_KILL_REQUESTED, kill_requested_at=now)


def request_review(task: StoredTask, now: int, outcome: Outcome) -> Change:
    """running → queued until a person has looked at the failure, which stays in the record."""
    return change_task(
        task,
        now,
        EventType.TASK_REVIEW_REQUESTED,
        status=TaskStatus.QUEUED,
        failure=None if isinstance(outcome, Succeeded) else outcome.failure,
        review_requested_at=now,
    )


def request_retry(task: StoredTask, now: int, input_json: Raw | UnsetType) -> Change:
    """A person wants the next attempt now: what held the child back is over."""
    changed: dict[str, object] = {"next_attempt_at": None, "review_requested_at": None}
    if input_json is not UNSET:
        changed["input_json"] = input_json
    return change_task(task, now, EventType.TASK_RETRY_REQUESTED, **changed)


def may_retry(task: StoredTask, outcome: Outcome) -> bool:
    """Whether a failed or timed-out attempt is followed by another one. Not once it was asked to stop."""
    if task.launch is None or task.launch.retry is None or task.cancel_requested_at is not None:
        return False
    if outcome_status(outcome) not in {TaskStatus.FAILED, TaskStatus.TIMED_OUT}:
        return False
    return task.attempt - task.interruptions < task.max_attempts


def schedule_retry(
    task: StoredTask, now: int, outcome: Outcome, chance: float, retry_after: float | None = None
) -> Change:
    """running → queued until its next attempt is due; the failure so far stays in the record.

    Whoever asked to be left alone for `retry_after` seconds is, however short the policy's own delay.
    """
    assert task.launch is not None and task.launch.retry is not None
    failures = task.attempt - task.interruptions
    delay = max(task.launch.retry.delay_after(failures, chance), retry_after or 0.0)
    return change_task(
        task,
        now,
        EventType.TASK_RETRY_SCHEDULED,
        status=TaskStatus.QUEUED,
        failure=None if isinstance(outcome, Succeeded) else outcome.failure,
        next_attempt_at=now + round(delay * 1000),
    )


def end(
    task: StoredTask,
    now: int,
    outcome: Outcome,
    *,
    result: Raw | UnsetType = UNSET,
    terminal_summary: str | None = None,
    terminal_outcome: TerminalOutcome | None = None,
) -> Change:
    """active → final, with the result or the failure, and the day its record may be pruned."""
    status = outcome_status(outcome)
    if status is TaskStatus.SUCCEEDED and terminal_outcome is None:
        terminal_outcome = TerminalOutcome.SUCCEEDED
    ended_at = max(now, task.created_at)
    keep = LOST_RETENTION_MS if status is TaskStatus.LOST else RETENTION_MS
    return change_task(
        task,
        now,
        EventType.TASK_ENDED,
        status=status,
        result_json=result,
        failure=None if isinstance(outcome, Succeeded) else outcome.failure,
        terminal_summary=terminal_summary,
        terminal_outcome=terminal_outcome if status is TaskStatus.SUCCEEDED else None,
        next_attempt_at=None,
        review_requested_at=None,
        ended_at=ended_at,
        cleanup_after=ended_at + keep,
    )


def answer(task: StoredTask, now: int, result: Raw | UnsetType, cause: str | None = None) -> Change:
    """active → succeeded, for a wait or a message: what came in is its result."""
    ended, fact = end(task, now, Succeeded(), result=NULL if result is UNSET else result)
    return ended, msgspec.structs.replace(fact, cause=cause)


def interrupted(why: str) -> Lost:
    """The outcome of a child that was cut off, and may or may not have done what it was there for."""
    return Lost(Failure(kind="interrupted", code="unknown", message=f"interrupted, unknown: {why}"))


def cancelled(message: str) -> Failure:
    """The failure a cancelled child is recorded with."""
    return Failure(kind="cancelled", message=message)


def initial_delivery(policy: NotifyPolicy) -> DeliveryStatus:
    """A silent child has nobody to tell."""
    return (
        DeliveryStatus.NOT_APPLICABLE if policy is NotifyPolicy.SILENT else DeliveryStatus.PENDING
    )
