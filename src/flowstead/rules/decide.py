"""What one command does to one flow. Pure and total: every command in every standing is decided or refused.

Theory of operation. `decide` looks at a `View` and answers a `Decision` or a `Refusal`; it changes nothing.
Checks come in one order everywhere: the flow exists for its owner, it is managed, the revision is current,
the life cycle allows it, the values are within limits. A refused command has no effect at all.

A decision says only what its own command does. What follows from it for others (a queued child may start, a
flow with a cancel intent has lost its last child) is `follow`'s affair, so that it holds whatever the cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.code import (
    NOT_FOUND,
    NOT_MANAGED,
    Code,
    Refusal,
)
from flowstead.model.effect import StartController, StopController
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow, SyncMode, has_ended
from flowstead.rules import decide_tasks as tasks
from flowstead.rules import lifecycle
from flowstead.rules.decide_tasks import (
    Answer,
    defect_refusal,
    end_cancelled,
    has_begun,
    stop_children,
)
from flowstead.rules.lifecycle import Operation
from flowstead.rules.recovery import recover
from flowstead.rules.view import (
    NOTHING,
    Decision,
    Fact,
    View,
    all_fields,
    change_flow,
)


def decide(view: View, command: c.Command) -> Answer:
    """Decide one command: the new records, facts and effects, or why it is refused."""
    return _DECIDERS[type(command)](view, command)


# ---- the flow -------------------------------------------------------------------------------------


def _create(view: View, command: c.Create) -> Answer:
    existing, draft = view.flow, command.draft
    if existing is not None:
        same = (
            draft.idempotency_key is not None
            and existing.idempotency_key == draft.idempotency_key
            and existing.request_digest == draft.request_digest
        )
        return NOTHING if same else Refusal(Code.FLOW_EXISTS, "Flow already exists.")
    if command.defect is not None:
        return Refusal(Code(command.defect.code), command.defect.reason)
    return Decision(
        flow=draft,
        facts=(Fact(EventType.FLOW_CREATED, all_fields(draft)),),
        effects=_enter(view, draft),
    )


def _set_waiting(view: View, command: c.SetWaiting) -> Answer:
    flow = _admit(view, Operation.SET_WAITING, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    if isinstance(command.wait_json, c.Defect):
        return defect_refusal(command.wait_json)
    blocked = command.blocked_task_id is not None or command.blocked_summary is not None
    return _changed(
        flow,
        view.now,
        EventType.FLOW_BLOCKED if blocked else EventType.FLOW_WAITING,
        command.patch,
        status=FlowStatus.BLOCKED if blocked else FlowStatus.WAITING,
        wait_json=command.wait_json,
        blocked_task_id=command.blocked_task_id,
        blocked_summary=command.blocked_summary,
    )


def _resume(view: View, command: c.Resume) -> Answer:
    flow = _admit(view, Operation.RESUME, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    answer = _changed(
        flow,
        view.now,
        EventType.FLOW_RESUMED,
        command.patch,
        status=command.status,
        wait_json=UNSET,
        blocked_task_id=None,
        blocked_summary=None,
    )
    if isinstance(answer, Refusal):
        return answer
    return Decision(flow=answer.flow, facts=answer.facts, effects=_enter(view, flow))


def _update(view: View, command: c.Update) -> Answer:
    flow = _admit(view, Operation.UPDATE, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    return _changed(flow, view.now, EventType.FLOW_UPDATED, command.patch)


def _finish(view: View, command: c.Finish) -> Answer:
    flow = _admit(view, Operation.FINISH, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    return _changed(
        flow,
        view.now,
        EventType.FLOW_SUCCEEDED,
        command.patch,
        status=FlowStatus.SUCCEEDED,
        wait_json=UNSET,
        blocked_task_id=None,
        blocked_summary=None,
        ended_at=max(view.now, flow.updated_at),
    )


def _fail(view: View, command: c.Fail) -> Answer:
    flow = _admit(view, Operation.FAIL, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    named: dict[str, Any] = {
        "blocked_task_id": command.blocked_task_id,
        "blocked_summary": command.blocked_summary,
    }
    return _changed(
        flow,
        view.now,
        EventType.FLOW_FAILED,
        command.patch,
        status=FlowStatus.FAILED,
        wait_json=UNSET,
        failure=command.failure,
        ended_at=max(view.now, flow.updated_at),
        **{name: value for name, value in named.items() if value is not UNSET},
    )


def _request_cancel(view: View, command: c.RequestCancel) -> Answer:
    flow = _admit(view, Operation.REQUEST_CANCEL, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    after, fact = _stamp_intent(flow, view.now)
    unstarted = [task for task in view.children.active.values() if not has_begun(view, task)]
    ended = [end_cancelled(task, view.now, "cancellation was requested") for task in unstarted]
    return Decision(
        flow=after,
        tasks=tuple(task for task, _ in ended),
        facts=(fact, *(fact for _, fact in ended)),
    )


def _cancel(view: View, command: c.Cancel) -> Answer:
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if command.expected_revision not in (None, flow.revision):
        return _conflict(flow, command.expected_revision)
    if refused := lifecycle.refusal(flow, Operation.CANCEL):
        return refused
    facts: list[Fact] = []
    if flow.cancel_requested_at is None:
        flow, fact = _stamp_intent(flow, view.now)
        facts.append(fact)
    ended, stopped = stop_children(view, list(view.children.active.values()), "flow cancelled")
    return Decision(
        flow=flow if facts else None,
        tasks=tuple(task for task, _ in ended),
        facts=(*facts, *(fact for _, fact in ended)),
        effects=(*stopped, *((StopController(),) if view.driven else ())),
    )


# ---- the controller -------------------------------------------------------------------------------


def _enter_controller(view: View, command: c.EnterController) -> Answer:
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if has_ended(flow):
        return Refusal(Code.TERMINAL, f"Flow is already {flow.status.value}.")
    if flow.status is not FlowStatus.QUEUED:
        return NOTHING
    after, fact = change_flow(flow, view.now, EventType.FLOW_STARTED, status=FlowStatus.RUNNING)
    return Decision(flow=after, facts=(fact,))


def _controller_stopped(view: View, command: c.ControllerStopped) -> Answer:
    return NOT_FOUND if view.flow is None else NOTHING


def _enter(view: View, flow: StoredFlow) -> tuple[StartController, ...]:
    """The effect that starts the flow's controller, where one is registered and none runs."""
    controller = flow.controller_id
    if controller is None or controller not in view.controllers or view.driven:
        return ()
    return (StartController(controller),)


# ---- what the deciders share ----------------------------------------------------------------------


def _admit(view: View, operation: Operation, expected: int | None) -> StoredFlow | Refusal:
    """The flow, once owner, mode, revision and life cycle have let the operation through."""
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if flow.sync_mode is not SyncMode.MANAGED:
        return NOT_MANAGED
    if expected is not None and expected != flow.revision:
        return _conflict(flow, expected)
    return lifecycle.refusal(flow, operation) or flow


def _conflict(flow: StoredFlow, expected: int | None) -> Refusal:
    return Refusal(
        Code.REVISION_CONFLICT,
        f"Flow is at revision {flow.revision}, not {expected}. Nothing changed.",
    )


def _changed(flow: StoredFlow, now: int, event: EventType, patch: c.Patch, **fields: Any) -> Answer:
    if patch.current_step is not UNSET:
        fields["current_step"] = patch.current_step
    if patch.state_json is not UNSET:
        if isinstance(patch.state_json, c.Defect):
            return defect_refusal(patch.state_json)
        fields["state_json"] = patch.state_json
    after, fact = change_flow(flow, now, event, **fields)
    return Decision(flow=after, facts=(fact,))


def _stamp_intent(flow: StoredFlow, now: int) -> tuple[StoredFlow, Fact]:
    return change_flow(flow, now, EventType.FLOW_CANCEL_REQUESTED, cancel_requested_at=now)


_DECIDERS: dict[type[Any], Callable[[View, Any], Answer]] = {
    c.Create: _create,
    c.SetWaiting: _set_waiting,
    c.Resume: _resume,
    c.Update: _update,
    c.Finish: _finish,
    c.Fail: _fail,
    c.RequestCancel: _request_cancel,
    c.Cancel: _cancel,
    c.EnterController: _enter_controller,
    c.ControllerStopped: _controller_stopped,
    c.AddTasks: tasks.add_tasks,
    c.StartReport: tasks.report_start,
    c.ProgressReport: tasks.report_progress,
    c.EndReport: tasks.report_end,
    c.CancelTask: tasks.cancel_task,
    c.ReleaseTasks: tasks.release_tasks,
    c.Tick: tasks.tick,
    c.Recover: recover,
}
