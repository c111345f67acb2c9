"""What commands do to the children of a flow: adding them, and reports about them.

Another part of `decide`, under the same rules: nothing is changed here, and a refused command has no effect.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.code import CANCEL_REQUESTED, NO_CHILDREN_ACCEPTED, NOT_FOUND, Code, Refusal
from flowstead.model.effect import StartTask
from flowstead.model.event import EventType
from flowstead.model.flow import Json, StoredFlow, SyncMode
from flowstead.model.task import Failed, StoredTask, TaskStatus, is_bare
from flowstead.rules import endings, lifecycle
from flowstead.rules.approvals import GrantRefusal, digest_of_raw, use_grant
from flowstead.rules.endings import NULL
from flowstead.rules.lifecycle import Operation
from flowstead.rules.view import (
    NOTHING,
    Answer,
    Decision,
    Fact,
    View,
    change_flow,
    defect_refusal,
    told_of,
)

_IS_WAIT = Refusal(Code.NOT_LINKED, "Task is a wait; answer it with a signal or a vote.")
_IS_LETTER = Refusal(
    Code.NOT_LINKED, "Task is a message; its flow answers it once it has taken it."
)


def add_first(view: View, flow: StoredFlow, draft: c.TaskDraft, told: Fact) -> Decision:
    """The one child of a flow that is made with it."""
    task, fact = make_task(flow, draft, view.now)
    return Decision(
        flow=flow,
        tasks=(task,),
        facts=(told, fact),
        lined_up=() if draft.launch is None else (task.task_id,),
        answered=(task.task_id,),
    )


def carried_facts(task: StoredTask) -> tuple[Fact, Fact]:
    """What the history says of an ended child that a flow begins with."""
    told = _told(task)
    ended = {
        name: value
        for name, value in told_of(task).items()
        if name == "status" or told.get(name) != value
    }
    return (
        Fact(EventType.TASK_CREATED, told, task.task_id),
        Fact(EventType.TASK_ENDED, ended, task.task_id),
    )


def add_tasks(view: View, command: c.AddTasks) -> Answer:
    """Make the children that are new, and let known ones whose function is back run again."""
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
                return defect_refusal(draft.input_json)
            if draft.child_flow_id is not None and flow.depth >= view.limits.nested_depth:
                return Refusal(
                    Code.LIMIT_REACHED,
                    f"Flow is nested {flow.depth} deep already; the limit is"
                    f" {view.limits.nested_depth}. Nothing was added.",
                )
        if len(view.children.active) + len(new) > view.limits.active_children:
            return Refusal(
                Code.OVERLOADED,
                f"Flow has {len(view.children.active)} active children; the limit is"
                f" {view.limits.active_children}. Nothing was added.",
            )
    used = use_approvals(view, flow, new)
    if isinstance(used, Refusal):
        return used
    made = [make_task(flow, draft, view.now) for draft in new]
    restarted, waiting = _revive(view, named) if len(new) < len(named) else ([], [])
    return Decision(
        flow=used.flow,
        tasks=(*(task for task, _ in made), *(task for task, _ in restarted)),
        facts=(
            *used.facts,
            *(fact for _, fact in made),
            *(fact for _, fact in restarted),
        ),
        effects=tuple(
            StartTask(task) for task, _ in restarted if task.status is TaskStatus.RUNNING
        ),
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


def use_approvals(view: View, flow: StoredFlow, drafts: list[c.TaskDraft]) -> Decision | Refusal:
    """Take up what approvals allow the new children; without that nothing is added."""
    grants = dict(flow.grants)
    for draft in drafts:
        if draft.approval is None:
            continue
        assert draft.run_id is not None and not isinstance(draft.input_json, c.Defect)
        used = use_grant(
            grants.get(draft.approval),
            items_digest=digest_of_raw(NULL if draft.input_json is UNSET else draft.input_json),
            step=draft.run_id,
            content_revision=flow.content_revision,
            now=view.now,
        )
        if isinstance(used, GrantRefusal):
            return Refusal(Code.NOT_APPROVED, used.reason)
        grants[draft.approval] = used
    if grants == flow.grants:
        return NOTHING
    after, fact = change_flow(flow, view.now, EventType.FLOW_UPDATED, grants=grants)
    return Decision(flow=after, facts=(fact,))


def make_task(flow: StoredFlow, draft: c.TaskDraft, now: int) -> tuple[StoredTask, Fact]:
    launch, running = draft.launch, draft.status is TaskStatus.RUNNING
    if launch is not None and draft.child_flow_id is not None:
        root = flow.root_id or flow.flow_id
        launch = msgspec.structs.replace(launch, depth=flow.depth + 1, root_id=root)
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
        idle_timeout=draft.idle_timeout,
        queue_timeout=draft.queue_timeout,
        child_flow_id=draft.child_flow_id,
        delivery_status=endings.initial_delivery(flow.notify_policy),
        notify_policy=flow.notify_policy,
        created_at=now if started_at is None else min(now, started_at),
        started_at=started_at,
        last_event_at=_first_event(draft, started_at),
        launch=launch,
        wait=draft.wait,
        letter=draft.letter,
    )
    return task, Fact(EventType.TASK_CREATED, _told(task), task.task_id)


def _told(task: StoredTask) -> dict[str, Json]:
    told = {"status": task.status, "runtime": task.runtime, "task": task.task}
    named = {"runId": task.run_id, "childFlowId": task.child_flow_id}
    return told | {name: value for name, value in named.items() if value is not None}


def _first_event(draft: c.TaskDraft, started_at: int | None) -> int | None:
    if started_at is None or draft.last_event_at is None:
        return started_at
    return max(started_at, draft.last_event_at)


def _revive(view: View, task_ids: list[str]) -> tuple[list[endings.Change], list[str]]:
    """Known children asked for again whose function died with an earlier process: they can run now.

    Answers the ones restarted under a new attempt, and the ids of those that may stand in line again.
    """
    if view.closing or view.flow is None or lifecycle.refusal(view.flow, Operation.RUN_TASK):
        return [], []
    asked = [view.children.active.get(task_id) for task_id in dict.fromkeys(task_ids)]
    mine = [task for task in asked if task and task.launch and is_bare(task.launch)]
    cut_off = [
        task
        for task in mine
        if task.status is TaskStatus.RUNNING
        and not view.has_code(task)
        and view.started.get(task.task_id) != task.attempt
        and task.interruptions < view.limits.interruptions
    ]
    queued = [
        task.task_id
        for task in mine
        if task.status is TaskStatus.QUEUED
        and task.next_attempt_at is None
        and task.review_requested_at is None
    ]
    changes = [
        endings.restart(task, view.now)
        if view.room.take(task)
        else endings.interrupt(task, view.now)
        for task in cut_off
    ]
    queued += [task.task_id for task, _ in changes if task.status is TaskStatus.QUEUED]
    return changes, queued


def report_start(view: View, command: c.StartReport) -> Answer:
    """queued → running, for a linked child."""
    task = _linked(view, command.task_id)
    if not isinstance(task, StoredTask):
        return task
    assert view.flow is not None
    if task.status is TaskStatus.RUNNING:
        return Decision(answered=(task.task_id,))
    if view.flow.cancel_requested_at is not None:
        return CANCEL_REQUESTED
    return _one(endings.report_start(task, view.now))


def report_progress(view: View, command: c.ProgressReport) -> Answer:
    """A sign of life of any active child."""
    task = view.children.active.get(command.task_id)
    if task is None:
        return Decision(answered=(command.task_id,))
    if task.wait is not None:
        return _IS_WAIT
    if task.letter is not None:
        return _IS_LETTER
    return _one(endings.progress(task, view.now, command.summary))


def report_end(view: View, command: c.EndReport) -> Answer:
    """active → final, or back to the queue where a retry is left; what comes too late changes nothing."""
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
        return defect_refusal(command.result)
    live = view.flow is not None and lifecycle.refusal(view.flow, Operation.RUN_TASK) is None
    if command.attempt is not None and live and _wants_review(task, command):
        change = endings.request_review(task, view.now, command.outcome)
    elif (
        command.attempt is not None
        and live
        and command.again
        and endings.may_retry(task, command.outcome)
    ):
        change = endings.schedule_retry(
            task, view.now, command.outcome, command.chance, command.retry_after
        )
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


def _wants_review(task: StoredTask, command: c.EndReport) -> bool:
    failed = isinstance(command.outcome, Failed)
    return command.review and failed and task.cancel_requested_at is None


def _linked(view: View, task_id: str) -> StoredTask | Answer:
    """The active linked child; an ended one is past reporting, a launched one reports itself."""
    task = view.children.active.get(task_id)
    if task is None:
        return Decision(answered=(task_id,))
    if task.launch is not None:
        return Refusal(
            Code.NOT_LINKED, "Task is run by this runtime; its outcome comes from its own code."
        )
    if task.wait is not None:
        return _IS_WAIT
    if task.letter is not None and task.status is TaskStatus.QUEUED:
        return _IS_LETTER
    return task


def _one(change: endings.Change) -> Decision:
    task, fact = change
    return Decision(tasks=(task,), facts=(fact,), answered=(task.task_id,))
