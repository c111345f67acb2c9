"""Mirrored flows: a flow that follows the one task it was made with, and that nobody changes by hand.

For work whose life is one detached task: it shows up among its owner's flows, can be waited for and cancelled
like any other, and has no state of its own.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from flowstead.model import command as c
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow, has_ended
from flowstead.model.task import StoredTask, TaskStatus, TerminalOutcome, is_active
from flowstead.rules.view import NOTHING, Decision, change_flow

_STATUS: Final[dict[TaskStatus, tuple[FlowStatus, EventType]]] = {
    TaskStatus.QUEUED: (FlowStatus.QUEUED, EventType.FLOW_UPDATED),
    TaskStatus.RUNNING: (FlowStatus.RUNNING, EventType.FLOW_STARTED),
    TaskStatus.SUCCEEDED: (FlowStatus.SUCCEEDED, EventType.FLOW_SUCCEEDED),
    TaskStatus.FAILED: (FlowStatus.FAILED, EventType.FLOW_FAILED),
    TaskStatus.TIMED_OUT: (FlowStatus.FAILED, EventType.FLOW_FAILED),
    TaskStatus.CANCELLED: (FlowStatus.CANCELLED, EventType.FLOW_CANCELLED),
    TaskStatus.LOST: (FlowStatus.LOST, EventType.FLOW_LOST),
}


def first(draft: StoredFlow, task: c.TaskDraft) -> StoredFlow:
    """The flow as it begins, with its task."""
    return msgspec.structs.replace(draft, status=_STATUS[task.status][0])


def follow(flow: StoredFlow, decision: Decision, now: int) -> Decision:
    """What the flow becomes once its task has changed."""
    if has_ended(flow) or not decision.tasks:
        return NOTHING
    task = decision.tasks[-1]
    status, event = _STATUS[task.status]
    if task.review_requested_at is not None or flow.status is status:
        return NOTHING
    fields: dict[str, Any] = {"status": status, "blocked_task_id": None, "blocked_summary": None}
    if not is_active(task):
        if task.terminal_outcome is TerminalOutcome.BLOCKED:
            return _blocked(flow, task, now)
        fields |= {"failure": task.failure, "ended_at": max(now, flow.updated_at)}
    after, fact = change_flow(flow, now, event, **fields)
    return Decision(flow=after, facts=(fact,))


def _blocked(flow: StoredFlow, task: StoredTask, now: int) -> Decision:
    """It ended, but not with what it was for: its owner has to see to it, and closes the flow by cancelling it."""
    after, fact = change_flow(
        flow,
        now,
        EventType.FLOW_BLOCKED,
        status=FlowStatus.BLOCKED,
        blocked_task_id=task.task_id,
        blocked_summary=task.terminal_summary or task.progress_summary,
    )
    return Decision(flow=after, facts=(fact,))
