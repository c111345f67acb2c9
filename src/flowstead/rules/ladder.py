"""When something is due: waits, retries, queue deadlines, and the rungs of a stop. Pure, from the rows alone.

A stop climbs: *request* (nothing new starts) → *cancel* (what runs is asked to end) → *kill* (its processes are
ended by force) → *abandon* (it counts no more). Each rung is stamped in the row of the child, or the flow for
its controller, when it is reached; so after a crash the climb goes on from the rung and the instant on record.
"""

from __future__ import annotations

from flowstead.model.flow import StoredFlow, has_ended
from flowstead.model.limits import Limits
from flowstead.model.task import StoredTask, TaskStatus, is_active
from flowstead.model.wait import Wait


def flow_due_at(flow: StoredFlow, limits: Limits) -> int | None:
    """The next instant at which the flow itself needs a tick, epoch ms, if any."""
    if has_ended(flow):
        return None
    if flow.cancel_requested_at is None:
        # A flow has a wait of its own, or its controller stands in some.
        return flow.park_at if flow.wait is None else wait_due_at(flow.wait)
    if flow.cancel_started_at is None:
        return cancel_due_at(flow, limits)
    return abandon_controller_at(flow, limits)


def cancel_due_at(flow: StoredFlow, limits: Limits) -> int:
    """When a requested cancel is brought to an end by the runtime itself, epoch ms."""
    assert flow.cancel_requested_at is not None
    return flow.cancel_requested_at + _ms(limits.cancel_grace)


def abandon_controller_at(flow: StoredFlow, limits: Limits) -> int:
    """When a controller that will not stop is given up, epoch ms."""
    assert flow.cancel_started_at is not None
    return flow.cancel_started_at + _ms(limits.kill_after + limits.abandon_after)


def task_due_at(task: StoredTask, limits: Limits) -> int | None:
    """The next instant at which the child needs a tick, epoch ms, if any."""
    if not is_active(task):
        return None
    if task.wait is not None:
        return wait_due_at(task.wait)
    if task.letter is not None:
        return task.letter.expires_at if task.status is TaskStatus.QUEUED else None
    if task.launch is None or task.review_requested_at is not None:
        return None
    if task.status is TaskStatus.QUEUED:
        return task.next_attempt_at if task.next_attempt_at is not None else queue_deadline(task)
    if task.cancel_requested_at is None or task.child_flow_id is not None:
        # A nested flow climbs by itself, and ends; whoever stands for it here waits for that.
        return None
    return kill_at(task, limits) if task.kill_requested_at is None else abandon_at(task, limits)


def wait_due_at(wait: Wait) -> int | None:
    """The deadline of a wait, or an earlier reminder of it, epoch ms, if any."""
    if not wait.remind_at or wait.deadline_at is None:
        return wait.remind_at[0] if wait.remind_at else wait.deadline_at
    return min(wait.remind_at[0], wait.deadline_at)


def queue_deadline(task: StoredTask) -> int | None:
    """When a child that has never been started is not wanted any more, epoch ms, if ever."""
    if task.queue_timeout is None or task.started_at is not None:
        return None
    return task.created_at + _ms(task.queue_timeout)


def is_late(task: StoredTask, now: int) -> bool:
    """Whether a child has waited for its first start for longer than it may."""
    deadline = queue_deadline(task)
    return deadline is not None and deadline <= now


def kill_at(task: StoredTask, limits: Limits) -> int:
    """When a child that was asked to stop is ended by force, epoch ms."""
    assert task.cancel_requested_at is not None
    return task.cancel_requested_at + _ms(limits.kill_after)


def abandon_at(task: StoredTask, limits: Limits) -> int:
    """When a child that could not be ended by force is given up, epoch ms."""
    assert task.kill_requested_at is not None
    return task.kill_requested_at + _ms(limits.abandon_after)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
