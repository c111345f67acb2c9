"""Review: a child whose failure a person has to look at blocks its flow, until somebody answers.

The answers are three: resume the flow, and the child may try again; retry the child, with another input if that
was what was wrong; or cancel the child, and the flow goes on without it.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model import command as c
from flowstead.model.code import TASK_NOT_FOUND, Code, Refusal
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow, has_ended
from flowstead.model.task import StoredTask, TaskStatus
from flowstead.rules import endings, lifecycle
from flowstead.rules.approvals import digest_of_raw
from flowstead.rules.lifecycle import Operation
from flowstead.rules.overdue import blocker_of
from flowstead.rules.view import (
    NOTHING,
    Answer,
    Decision,
    View,
    change_flow,
    defect_refusal,
    enter_controller,
)

_TOLD = {
    FlowStatus.WAITING: EventType.FLOW_WAITING,
    FlowStatus.BLOCKED: EventType.FLOW_BLOCKED,
}


def block_on_review(view: View) -> Decision:
    """A live flow that has a child a person has to look at is blocked by it; by the oldest of several."""
    flow = view.flow
    assert flow is not None
    if flow.status is FlowStatus.BLOCKED or not view.children.in_review:
        return NOTHING
    task = view.children.active[next(iter(view.children.in_review))]
    after, fact = change_flow(
        flow,
        view.now,
        EventType.FLOW_BLOCKED,
        status=FlowStatus.BLOCKED,
        blocked_task_id=task.task_id,
        blocked_summary=_review_summary(task),
    )
    return Decision(flow=after, facts=(fact,))


def _review_summary(task: StoredTask) -> str:
    said = None if task.failure is None else task.failure.message
    return f"{(task.run_id or task.task)!r} needs review: {said or 'no reason was given'}"


def blocker_in_review(view: View) -> StoredTask | None:
    """The child whose review blocks the flow, if that is what blocks it."""
    flow = view.flow
    if flow is None or flow.blocked_task_id not in view.children.in_review:
        return None
    return view.children.active[flow.blocked_task_id]


def let_go_on(view: View, blocker: StoredTask) -> Decision:
    """A flow goes on if the child whose review blocked it has ended, whatever ended it."""
    flow = view.flow
    assert flow is not None
    if blocker.task_id in view.children.active:
        return NOTHING
    return unblock(view, flow, blocker, NOTHING)


def retry_task(view: View, command: c.RetryTask) -> Answer:
    """Start a child's next attempt now, whatever holds it back: a person's eyes, or a delay."""
    flow, task = view.flow, view.children.active.get(command.task_id)
    if flow is None or task is None:
        return TASK_NOT_FOUND
    if refused := lifecycle.refusal(flow, Operation.RUN_TASK):
        return refused
    if task.launch is None:
        return Refusal(Code.NOT_RETRYABLE, "Task is run by somebody else.")
    if task.status is TaskStatus.RUNNING:
        return Refusal(Code.NOT_RETRYABLE, "Task is running.")
    if task.review_requested_at is None and task.next_attempt_at is None:
        return Refusal(Code.NOT_RETRYABLE, "Task stands in line already.")
    if isinstance(command.input_json, c.Defect):
        return defect_refusal(command.input_json)
    if not _is_allowed(flow, task, command.input_json):
        told = "The child was begun under an approval, and what was approved is not this input."
        return Refusal(Code.NOT_APPROVED, f"{told} Nothing changed.")
    change = endings.request_retry(task, view.now, command.input_json)
    answer = Decision(
        tasks=(change[0],),
        facts=(change[1],),
        lined_up=(task.task_id,) if view.has_function(task) else (),
        answered=(task.task_id,),
    )
    return unblock(view, flow, task, answer)


def _is_allowed(flow: StoredFlow, task: StoredTask, input_json: Raw | UnsetType) -> bool:
    """Whether a child may have this input: any, or exactly the items of the approval it was begun under."""
    if input_json is UNSET:
        return True
    approved = {g.items_digest for g in flow.grants.values() if g.used_by == task.run_id}
    return not approved or digest_of_raw(input_json) in approved


def approve_blocker(view: View, flow: StoredFlow) -> Decision:
    """Resuming a flow that is blocked by a child in review is the answer it waits for: it may try again."""
    task = view.children.active.get(flow.blocked_task_id or "")
    if task is None or task.review_requested_at is None:
        return NOTHING
    after, fact = endings.request_retry(task, view.now, UNSET)
    lined_up = (task.task_id,) if view.has_function(task) else ()
    return Decision(tasks=(after,), facts=(fact,), lined_up=lined_up)


def unblock(view: View, flow: StoredFlow, task: StoredTask, answer: Decision) -> Decision:
    """The answer to a review of the child that blocks the flow lets the flow go on as well."""
    if task.review_requested_at is None or flow.blocked_task_id != task.task_id:
        return answer
    if flow.status is not FlowStatus.BLOCKED or has_ended(flow):
        return answer
    if flow.cancel_requested_at is not None:
        return answer  # nothing is resumed any more; the end clears the blocker
    waits = flow.wait_json is not UNSET
    late = blocker_of(flow, view.children) if waits else None
    goes_on = FlowStatus.RUNNING if view.driven else FlowStatus.QUEUED
    stands = FlowStatus.WAITING if late is None else FlowStatus.BLOCKED
    status = stands if waits else goes_on
    after, fact = change_flow(
        flow,
        view.now,
        _TOLD.get(status, EventType.FLOW_RESUMED),
        status=status,
        blocked_task_id=None if late is None else late.task_id,
        blocked_summary=None if late is None else late.summary,
    )
    enter = () if waits else enter_controller(view, flow)
    return msgspec.structs.replace(
        answer, flow=after, facts=(fact, *answer.facts), effects=(*answer.effects, *enter)
    )
