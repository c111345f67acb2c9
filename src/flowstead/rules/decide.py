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

import msgspec
from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.code import (
    NOT_FOUND,
    NOT_MANAGED,
    Code,
    Refusal,
)
from flowstead.model.effect import DrainTask, Effect, ParkController, StopController
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow, SyncMode, has_ended
from flowstead.rules import answers, lifecycle, mirror, news, review, stops, waits
from flowstead.rules import decide_tasks as tasks
from flowstead.rules.lifecycle import Operation
from flowstead.rules.recovery import recover
from flowstead.rules.view import (
    NO_WAIT,
    NOTHING,
    Answer,
    Decision,
    Fact,
    View,
    all_fields,
    change_flow,
    defect_refusal,
    enter_controller,
    start_cancel,
)
from flowstead.rules.wait_keys import place_digest_of
from flowstead.rules.waits import NEVER_PARKED, may_be_in_memory


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
        if not same:
            return Refusal(Code.FLOW_EXISTS, "Flow already exists.")
        # Whoever stands for a nested flow asks for it, made or not; then it may move again.
        return NOTHING if existing.parent_task_id is None else recover(view, c.Recover())
    if command.defect is not None:
        return Refusal(Code(command.defect.code), command.defect.reason)
    carried = [fact for task in command.carried for fact in tasks.carried_facts(task)]
    return Decision(
        flow=draft,
        tasks=command.carried,
        facts=(Fact(EventType.FLOW_CREATED, all_fields(draft)), *carried),
        effects=enter_controller(view, draft),
    )


def _spawn(view: View, command: c.Spawn) -> Answer:
    if view.flow is not None:
        return Refusal(Code.FLOW_EXISTS, "Flow already exists.")
    if isinstance(command.task.input_json, c.Defect):
        return defect_refusal(command.task.input_json)
    flow = mirror.first(command.draft, command.task)
    return tasks.add_first(view, flow, command.task, Fact(EventType.FLOW_CREATED, all_fields(flow)))


def _set_waiting(view: View, command: c.SetWaiting) -> Answer:
    flow = _admit(view, Operation.SET_WAITING, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    if isinstance(command.wait_json, c.Defect):
        return defect_refusal(command.wait_json)
    blocked = command.blocked_task_id is not None or command.blocked_summary is not None
    answer = _changed(
        flow,
        view.now,
        EventType.FLOW_BLOCKED if blocked else EventType.FLOW_WAITING,
        command.patch,
        status=FlowStatus.BLOCKED if blocked else FlowStatus.WAITING,
        wait_json=command.wait_json,
        wait=command.wait,
        wait_key=None if command.wait is None else command.wait.wait_key,
        # Kept where nothing is to be answered: those that were given lead here all the same.
        wait_token=place_digest_of(command.wait) or flow.wait_token,
        awaiting=(),
        selecting=(),
        park_at=None,
        blocked_task_id=command.blocked_task_id,
        blocked_summary=command.blocked_summary,
    )
    if isinstance(answer, Refusal):
        return answer
    return msgspec.structs.replace(_stamp_content(answer), effects=_leave_wait(view, flow))


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
        blocked_task_id=None,
        blocked_summary=None,
        **NO_WAIT,
    )
    if isinstance(answer, Refusal):
        return answer
    if command.patch != c.Patch():
        answer = _stamp_content(answer)
    reviewed = review.approve_blocker(view, flow)
    return Decision(
        flow=answer.flow,
        tasks=reviewed.tasks,
        facts=(*answer.facts, *reviewed.facts),
        effects=_enter_again(view, flow),
        lined_up=reviewed.lined_up,
    )


def _enter_again(view: View, flow: StoredFlow) -> tuple[Effect, ...]:
    """Enter the controller; one that stands in a wait which is not its flow's any more leaves it first."""
    return _leave_wait(view, flow) or enter_controller(view, flow)


def _leave_wait(view: View, flow: StoredFlow) -> tuple[Effect, ...]:
    """Send a controller away from where it stands; one that would lose something by it stays."""
    stays = not flow.awaiting or flow.park_at == NEVER_PARKED
    return () if stays or not view.driven else (ParkController(),)


def _update(view: View, command: c.Update) -> Answer:
    flow = _admit(view, Operation.UPDATE, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    # Whoever stands in a wait would know the flow as it was: woken, it is run again and sees what was done.
    left = () if command.by_controller else _leave_wait(view, flow)
    gone = {"park_at": None} if left else {}
    answer = _changed(flow, view.now, EventType.FLOW_UPDATED, command.patch, **gone)
    if command.by_controller or isinstance(answer, Refusal):
        return answer
    return msgspec.structs.replace(_stamp_content(answer), effects=left)


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
        blocked_task_id=None,
        blocked_summary=None,
        ended_at=max(view.now, flow.updated_at),
        **NO_WAIT,
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
        failure=command.failure,
        ended_at=max(view.now, flow.updated_at),
        **NO_WAIT,
        **{name: value for name, value in named.items() if value is not UNSET},
    )


def _request_cancel(view: View, command: c.RequestCancel) -> Answer:
    flow = _admit(view, Operation.REQUEST_CANCEL, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    after, fact = change_flow(
        flow, view.now, EventType.FLOW_CANCEL_REQUESTED, cancel_requested_at=view.now
    )
    unstarted = [task for task in view.children.active.values() if not stops.has_begun(view, task)]
    ended = [
        stops.end_cancelled(task, view.now, "cancellation was requested") for task in unstarted
    ]
    return Decision(
        flow=after,
        tasks=tuple(task for task, _ in ended),
        facts=(fact, *(fact for _, fact in ended)),
        effects=tuple(
            DrainTask(task.task_id)
            for task in view.children.active.values()
            if task.child_flow_id is not None and view.has_code(task)
        ),
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
    if flow.cancel_started_at is None:
        flow, fact = start_cancel(flow, view.now)
        facts.append(fact)
    changes, stopped = stops.stop_children(
        view, list(view.children.active.values()), "flow cancelled"
    )
    return Decision(
        flow=flow if facts else None,
        tasks=tuple(task for task, _ in changes),
        facts=(*facts, *(fact for _, fact in changes)),
        effects=(*stopped, *((StopController(),) if view.driven else ())),
    )


# ---- the controller -------------------------------------------------------------------------------


def _enter_controller(view: View, command: c.EnterController) -> Answer:
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if has_ended(flow):
        return Refusal(Code.TERMINAL, f"Flow is already {flow.status.value}.")
    fields: dict[str, Any] = {}
    if may_be_in_memory(flow):
        # It stood in a wait when its process ended; now it is on its way there again.
        is_blocked = flow.status is FlowStatus.BLOCKED
        fields = {"park_at": NEVER_PARKED} if is_blocked else NO_WAIT
        if is_blocked and flow.park_at == NEVER_PARKED:
            return NOTHING
    elif flow.status is not FlowStatus.QUEUED:
        return NOTHING
    if flow.status is not FlowStatus.BLOCKED:
        fields = {**fields, "status": FlowStatus.RUNNING}
    after, fact = change_flow(flow, view.now, EventType.FLOW_STARTED, **fields)
    return Decision(flow=after, facts=(fact,))


def _controller_stopped(view: View, command: c.ControllerStopped) -> Answer:
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if command.failure is None or flow.cancel_requested_at is not None or has_ended(flow):
        return NOTHING
    return _fail(view, c.Fail(expected_revision=None, patch=c.Patch(), failure=command.failure))


def _wake(view: View, command: c.Wake) -> Answer:
    return NOT_FOUND if view.flow is None else NOTHING


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


def _stamp_content(answer: Decision) -> Decision:
    """Note that somebody else than the controller has changed what the flow holds."""
    flow = answer.flow
    assert flow is not None
    stamped = msgspec.structs.replace(flow, content_revision=flow.revision)
    return msgspec.structs.replace(answer, flow=stamped)


def _changed(flow: StoredFlow, now: int, event: EventType, patch: c.Patch, **fields: Any) -> Answer:
    if patch.current_step is not UNSET:
        fields["current_step"] = patch.current_step
    if patch.state_json is not UNSET:
        if isinstance(patch.state_json, c.Defect):
            return defect_refusal(patch.state_json)
        fields["state_json"] = patch.state_json
    after, fact = change_flow(flow, now, event, **fields)
    return Decision(flow=after, facts=(fact,))


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
    c.Spawn: _spawn,
    c.AddTasks: answers.add_tasks,
    c.Await: waits.await_steps,
    c.StopAwaiting: waits.stop_awaiting,
    c.ControllerParked: waits.controller_parked,
    c.Deliver: answers.deliver,
    c.Tell: answers.tell,
    c.CastVote: answers.cast_vote,
    c.Notify: news.notify,
    c.NoteDelivery: news.note_delivery,
    c.StartReport: tasks.report_start,
    c.ProgressReport: tasks.report_progress,
    c.EndReport: tasks.report_end,
    c.RetryTask: review.retry_task,
    c.CancelTask: stops.cancel_task,
    c.ReleaseTasks: stops.release_tasks,
    c.Tick: stops.tick,
    c.Wake: _wake,
    c.Recover: recover,
}
