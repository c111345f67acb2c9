"""The event: one line of a flow's history, appended in the transaction that made it true."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from flowstead.model.flow import Json


class EventType(StrEnum):
    """What happened, as a fact in the past tense."""

    FLOW_CREATED = "flow.created"
    FLOW_STARTED = "flow.started"
    FLOW_WAITING = "flow.waiting"
    FLOW_PARKED = "flow.parked"
    FLOW_REMINDED = "flow.reminded"
    FLOW_BLOCKED = "flow.blocked"
    FLOW_RESUMED = "flow.resumed"
    FLOW_UPDATED = "flow.updated"
    FLOW_SUCCEEDED = "flow.succeeded"
    FLOW_FAILED = "flow.failed"
    FLOW_CANCEL_REQUESTED = "flow.cancel_requested"
    FLOW_CANCEL_STARTED = "flow.cancel_started"
    FLOW_CANCELLED = "flow.cancelled"
    FLOW_LOST = "flow.lost"
    TASK_CREATED = "task.created"
    TASK_STARTED = "task.started"
    TASK_PROGRESSED = "task.progressed"
    TASK_CANCEL_REQUESTED = "task.cancel_requested"
    TASK_KILL_REQUESTED = "task.kill_requested"
    TASK_RETRY_SCHEDULED = "task.retry_scheduled"
    TASK_RETRY_REQUESTED = "task.retry_requested"
    TASK_REVIEW_REQUESTED = "task.review_requested"
    TASK_RELEASED = "task.released"
    TASK_INTERRUPTED = "task.interrupted"
    TASK_REMINDED = "task.reminded"
    TASK_VOTED = "task.voted"
    TASK_OVERDUE = "task.overdue"
    TASK_TAKEN = "task.taken"
    UPDATE_FAILED = "update.failed"
    TASK_ENDED = "task.ended"


class Event(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False
):
    """One fact about a flow or one of its children.

    `seq` counts from 1 without gaps inside the flow; `position` grows over the whole store, in commit
    order. `revision` is the flow's revision once the fact held. `actor` says on whose word it happened.
    `changed` maps the wire names of the changed fields to their new values; together the events of a flow
    tell its whole state at every revision.
    """

    flow_id: str
    seq: int
    position: int = 0
    revision: int
    at: int
    type: str
    actor: str
    cause: str | None = None
    task_id: str | None = None
    changed: dict[str, Json] = {}
