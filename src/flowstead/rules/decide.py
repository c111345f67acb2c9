"""What one command does to one flow. Pure and total: every command in every standing is decided or refused.

Theory of operation. `decide` looks at a `View` and answers a `Decision` or a `Refusal`; it changes nothing.
Checks come in one order everywhere: the flow exists for its owner, it is managed, the revision is current,
the life cycle allows it, the values are within limits. A refused command has no effect at all.

A decision says only what its own command does. What follows from it for others (a queued child may start, a
flow with a cancel intent has lost its last child) is `follow`'s affair, so that it holds whatever the cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.code import (
    CANCEL_REQUESTED,
    NO_CHILDREN_ACCEPTED,
    NOT_FOUND,
    NOT_MANAGED,
    TASK_NOT_FOUND,
    Code,
    Refusal,
)
from flowstead.model.effect import StartController, StartTask, StopController, StopReason, StopTask
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow, SyncMode, has_ended
from flowstead.model.task import Cancelled, StoredTask, TaskStatus
from flowstead.rules import endings, lifecycle
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

Answer: TypeAlias = Decision | Refusal


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
        return _defect(command.wait_json)
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
        ended_at=max(view.now, flow.created_at),
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
        ended_at=max(view.now, flow.created_at),
        **{name: value for name, value in named.items() if value is not UNSET},
    )


def _request_cancel(view: View, command: c.RequestCancel) -> Answer:
    flow = _admit(view, Operation.REQUEST_CANCEL, command.expected_revision)
    if isinstance(flow, Refusal):
        return flow
    after, fact = _stamp_intent(flow, view.now)
    unstarted = [task for task in view.children.active.values() if not _has_begun(view, task)]
    ended = [_end_cancelled(task, view.now, "cancellation was requested") for task in unstarted]
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
    ended, stopped = _stop_children(view, list(view.children.active.values()), "flow cancelled")
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


# ---- the children ---------------------------------------------------------------------------------


def _add_tasks(view: View, command: c.AddTasks) -> Answer:
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if flow.sync_mode is not SyncMode.MANAGED:
        return NO_CHILDREN_ACCEPTED
    named, new = _name(view, command.drafts)
    if new:
        if refused := lifecycle.refusal(flow, Operation.RUN_TASK):
            return refused
        for draft in new:
            if isinstance(draft.input_json, c.Defect):
                return _defect(draft.input_json)
        if len(view.children.active) + len(new) > view.limits.active_children:
            return Refusal(
                Code.OVERLOADED,
                f"Flow has {len(view.children.active)} active children; the limit is"
                f" {view.limits.active_children}. Nothing was added.",
            )
    made = [_make_task(flow, draft, view.now) for draft in new]
    restarted, waiting = _revive(view, named) if len(new) < len(named) else ([], [])
    return Decision(
        tasks=(*(task for task, _ in made), *(task for task, _ in restarted)),
        facts=(*(fact for _, fact in made), *(fact for _, fact in restarted)),
        effects=tuple(StartTask(task) for task, _ in restarted),
        lined_up=(*(draft.task_id for draft in new if draft.launch is not None), *waiting),
        answered=tuple(named),
    )


def _name(view: View, drafts: tuple[c.TaskDraft, ...]) -> tuple[list[str], list[c.TaskDraft]]:
    """The id of the child each draft stands for, and the drafts that are new to the flow."""
    known, fresh = view.children.run_ids, dict[str, str]()
    named, new = [], []
    for draft in drafts:
        run_id = draft.run_id
        first = None if run_id is None else known.get(run_id) or fresh.get(run_id)
        if first is None:
            new.append(draft)
            if run_id is not None:
                fresh[run_id] = draft.task_id
        named.append(first or draft.task_id)
    return named, new


def _make_task(flow: StoredFlow, draft: c.TaskDraft, now: int) -> tuple[StoredTask, Fact]:
    launch, running = draft.launch, draft.status is TaskStatus.RUNNING
    started_at = (now if draft.started_at is None else draft.started_at) if running else None
    assert not isinstance(draft.input_json, c.Defect)
    task = StoredTask(
        key=draft.key,
        flow_key=flow.key,
        task_id=draft.task_id,
        flow_id=flow.flow_id,
        runtime=draft.runtime,
        run_id=draft.run_id,
        child_session_key=draft.child_session_key,
        task=draft.task,
        label=draft.label,
        input_json=draft.input_json,
        status=draft.status,
        max_attempts=launch.retry.max_attempts if launch and launch.retry else 1,
        timeout=draft.timeout,
        delivery_status=endings.initial_delivery(flow.notify_policy),
        notify_policy=flow.notify_policy,
        created_at=now if started_at is None else min(now, started_at),
        started_at=started_at,
        last_event_at=_first_event(draft, started_at),
        launch=launch,
    )
    told = {"status": task.status, "runtime": task.runtime, "task": task.task}
    if task.run_id is not None:
        told["runId"] = task.run_id
    return task, Fact(EventType.TASK_CREATED, told, task.task_id)


def _first_event(draft: c.TaskDraft, started_at: int | None) -> int | None:
    if started_at is None or draft.last_event_at is None:
        return started_at
    return max(started_at, draft.last_event_at)


def _revive(view: View, task_ids: list[str]) -> tuple[list[endings.Change], list[str]]:
    """Known children asked for again whose function died with an earlier process: they can run now.

    Answers the ones restarted under a new attempt, and the ids of those that may stand in line again.
    """
    if view.flow is None or lifecycle.refusal(view.flow, Operation.RUN_TASK):
        return [], []
    asked = [view.children.active.get(task_id) for task_id in dict.fromkeys(task_ids)]
    mine = [task for task in asked if task and task.launch and task.launch.function is None]
    cut_off = [
        task
        for task in mine
        if task.status is TaskStatus.RUNNING
        and task.task_id not in view.running
        and task.interruptions < view.limits.interruptions
    ]
    queued = [
        task.task_id
        for task in mine
        if task.status is TaskStatus.QUEUED and task.next_attempt_at is None
    ]
    return [endings.restart(task, view.now) for task in cut_off], queued


def _start_report(view: View, command: c.StartReport) -> Answer:
    task = _linked(view, command.task_id)
    if not isinstance(task, StoredTask):
        return task
    assert view.flow is not None
    if task.status is TaskStatus.RUNNING:
        return Decision(answered=(task.task_id,))
    if view.flow.cancel_requested_at is not None:
        return CANCEL_REQUESTED
    return _one(endings.report_start(task, view.now))


def _progress_report(view: View, command: c.ProgressReport) -> Answer:
    task = view.children.active.get(command.task_id)
    if task is None:
        return Decision(answered=(command.task_id,))
    return _one(endings.progress(task, view.now, command.summary))


def _end_report(view: View, command: c.EndReport) -> Answer:
    if command.attempt is None:
        linked = _linked(view, command.task_id)
        if not isinstance(linked, StoredTask):
            return linked
        task = linked
    else:
        current = view.children.active.get(command.task_id)
        if current is None or current.attempt != command.attempt:
            return NOTHING
        if current.status is not TaskStatus.RUNNING:
            return NOTHING
        task = current
    if isinstance(command.result, c.Defect):
        return _defect(command.result)
    live = view.flow is not None and lifecycle.refusal(view.flow, Operation.RUN_TASK) is None
    if command.attempt is not None and live and endings.may_retry(task, command.outcome):
        change = endings.schedule_retry(task, view.now, command.outcome, command.chance)
    else:
        change = endings.end(
            task,
            view.now,
            command.outcome,
            result=command.result,
            terminal_summary=command.terminal_summary,
            terminal_outcome=command.terminal_outcome,
        )
    return _one(change)


def _cancel_task(view: View, command: c.CancelTask) -> Answer:
    task = view.children.active.get(command.task_id)
    if task is None:
        return TASK_NOT_FOUND
    ended, stopped = _stop_children(view, [task], "task cancelled")
    return Decision(
        tasks=tuple(task for task, _ in ended),
        facts=tuple(fact for _, fact in ended),
        effects=stopped,
    )


def _release_tasks(view: View, command: c.ReleaseTasks) -> Answer:
    active = view.children.active
    running = [active[i] for i in command.task_ids if i in active]
    released = [
        endings.release(t, view.now)
        for t in running
        if t.launch is not None and t.status is TaskStatus.RUNNING
    ]
    return Decision(
        tasks=tuple(task for task, _ in released),
        facts=tuple(fact for _, fact in released),
    )


def _tick(view: View, command: c.Tick) -> Answer:
    if view.flow is None:
        return NOT_FOUND
    due = [
        task.task_id
        for task in view.children.active.values()
        if task.next_attempt_at is not None
        and task.next_attempt_at <= view.now
        and view.has_function(task)
    ]
    return Decision(lined_up=tuple(due))


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
            return _defect(patch.state_json)
        fields["state_json"] = patch.state_json
    after, fact = change_flow(flow, now, event, **fields)
    return Decision(flow=after, facts=(fact,))


def _defect(defect: c.Defect) -> Refusal:
    return Refusal(Code(defect.code), defect.reason)


def _stamp_intent(flow: StoredFlow, now: int) -> tuple[StoredFlow, Fact]:
    return change_flow(flow, now, EventType.FLOW_CANCEL_REQUESTED, cancel_requested_at=now)


def _linked(view: View, task_id: str) -> StoredTask | Answer:
    """The active linked child; an ended one is past reporting, a launched one reports itself."""
    task = view.children.active.get(task_id)
    if task is None:
        return Decision(answered=(task_id,))
    if task.launch is not None:
        return Refusal(
            Code.NOT_LINKED, "Task is run by this runtime; its outcome comes from its own code."
        )
    return task


def _has_begun(view: View, task: StoredTask) -> bool:
    """Whether the child's work is under way, here or elsewhere. One started in this very turn is not."""
    return task.status is TaskStatus.RUNNING and (task.launch is None or view.has_code(task))


def _one(change: endings.Change) -> Decision:
    task, fact = change
    return Decision(tasks=(task,), facts=(fact,), answered=(task.task_id,))


def _end_cancelled(task: StoredTask, now: int, why: str) -> endings.Change:
    return endings.end(task, now, Cancelled(endings.cancelled(why)))


def _stop_children(
    view: View, tasks: list[StoredTask], why: str
) -> tuple[list[endings.Change], tuple[StopTask, ...]]:
    """End what has no code running here, and stop what has."""
    stopped = [t for t in tasks if view.has_code(t)]
    ended = [_end_cancelled(t, view.now, why) for t in tasks if not view.has_code(t)]
    return ended, tuple(StopTask(t.task_id, StopReason.CANCELLED) for t in stopped)


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
    c.AddTasks: _add_tasks,
    c.StartReport: _start_report,
    c.ProgressReport: _progress_report,
    c.EndReport: _end_report,
    c.CancelTask: _cancel_task,
    c.ReleaseTasks: _release_tasks,
    c.Tick: _tick,
    c.Recover: recover,
}
