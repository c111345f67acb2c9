"""A controller that stands still: how its flow waits, is woken, and is parked meanwhile.

The controller names the steps of which the first to end lets it go on. As long as none has, the flow is waiting,
and after a while the controller leaves memory; what wakes the flow then enters it again. Whether it stays or
leaves makes no difference to what it sees, because each step answers from its record.

A crash may find a controller that had not left. Until the flow is on record as parked, its controller is therefore
entered again like that of a running one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import NOT_FOUND, Refusal
from flowstead.model.effect import ParkController
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow, has_ended
from flowstead.model.task import Cancelled, StoredTask, TaskStatus
from flowstead.model.wait import OnTimeout
from flowstead.rules import answers, endings, lifecycle
from flowstead.rules.lifecycle import Operation
from flowstead.rules.overdue import first_overdue
from flowstead.rules.view import NOTHING, Answer, Decision, View, change_flow, enter_controller

NEVER_PARKED: Final = 1
"""The `park_at` of a controller that stays in memory: long over, so that after a crash it is looked for at once."""

_TOLD: Final = {
    None: EventType.FLOW_UPDATED,
    FlowStatus.WAITING: EventType.FLOW_WAITING,
    FlowStatus.BLOCKED: EventType.FLOW_BLOCKED,
}
_STANDING: Final = frozenset({FlowStatus.WAITING, FlowStatus.BLOCKED})


def may_be_in_memory(flow: StoredFlow) -> bool:
    """Whether the flow's controller stands in a wait and has not left on record."""
    return bool(flow.awaiting) and flow.park_at is not None and flow.status in _STANDING


def await_steps(view: View, command: c.Await) -> Answer:
    """Add the waits that are new; unless one of the steps has ended, the flow waits."""
    opened = answers.add_tasks(view, c.AddTasks(drafts=command.drafts))
    if isinstance(opened, Refusal):
        return opened
    flow = opened.flow or view.flow
    assert flow is not None
    ends = {task.task_id: task for task in opened.tasks}
    new = {task.run_id: task.task_id for task in opened.tasks}
    known = view.children.run_ids
    steps = tuple(dict.fromkeys(new.get(step) or known.get(step, step) for step in command.steps))
    found = [ends.get(task_id) or view.children.active.get(task_id) for task_id in steps]
    left = [task for task in found if task is not None and task.ended_at is None]
    waits = [task for task in left if task.wait is not None]
    if len(left) < len(steps):
        lost = _withdraw(left, view.now) if command.withdraw else []
        return _with_ends(msgspec.structs.replace(opened, answered=steps), lost)
    if not waits:
        return msgspec.structs.replace(opened, answered=steps)
    if refused := lifecycle.refusal(flow, Operation.SET_WAITING):
        return refused
    after, fact = _stand(
        view, flow, steps, waits, may_park=command.may_park, withdraw=command.withdraw
    )
    return msgspec.structs.replace(
        opened,
        flow=after,
        facts=(*opened.facts, fact),
        answered=steps,
    )


def _stand(
    view: View,
    flow: StoredFlow,
    steps: tuple[str, ...],
    waits: list[StoredTask],
    *,
    may_park: bool,
    withdraw: bool,
) -> tuple[StoredFlow, Any]:
    others_select = tuple(group for group in flow.selecting if group != steps)
    groups = (*(group for group in flow.awaiting if group != steps), steps)
    others = [view.children.active.get(i) for group in groups[:-1] for i in group]
    shown = [*(task for task in others if task is not None and task.wait is not None), *waits]
    is_blocked = flow.status is FlowStatus.BLOCKED
    fields: dict[str, Any] = {}
    if not is_blocked:
        late = first_overdue(waits)
        fields["status"] = FlowStatus.WAITING if late is None else FlowStatus.BLOCKED
        if late is not None:
            fields |= {"blocked_task_id": late.task_id, "blocked_summary": late.summary}
    stands_beside = any(group != steps for group in flow.awaiting)
    stays = not may_park or (stands_beside and flow.park_at == NEVER_PARKED)
    park_at = NEVER_PARKED if stays else view.now + round(view.limits.park_seconds * 1000)
    return change_flow(
        flow,
        view.now,
        _TOLD[fields.get("status")],
        wait_json=_describe(shown),
        wait=None,
        wait_key=None,
        awaiting=groups,
        selecting=(*others_select, steps) if withdraw else others_select,
        park_at=park_at,
        **fields,
    )


def _withdraw(losers: Iterable[StoredTask], now: int) -> list[endings.Change]:
    """End what nobody has begun, so that nothing answers it any more; what runs its controller stops."""
    why = Cancelled(endings.cancelled("another step was first"))
    return [endings.end(task, now, why) for task in losers if task.status is TaskStatus.QUEUED]


def _with_ends(answer: Decision, ends: list[endings.Change]) -> Decision:
    return msgspec.structs.replace(
        answer,
        tasks=(*answer.tasks, *(task for task, _ in ends)),
        facts=(*answer.facts, *(fact for _, fact in ends)),
    )


def _describe(waits: Iterable[StoredTask]) -> Raw:
    """What is waited for, for people and for tools, without the token that answers it."""
    told = [describe(task) for task in waits]
    return Raw(msgspec.json.encode(told[0] if len(told) == 1 else {"anyOf": told}))


def describe(task: StoredTask) -> dict[str, Any]:
    """One wait, without the token that answers it."""
    wait = task.wait
    assert wait is not None
    key = {} if wait.key is UNSET else msgspec.json.decode(wait.key)
    at = "wakeAt" if wait.kind == "timer" else "deadlineAt"
    told = {
        "name": task.run_id,
        "prompt": wait.prompt,
        at: wait.deadline_at,
        "onTimeout": None if wait.on_timeout is OnTimeout.FAIL else wait.on_timeout,
        "schema": None if wait.schema is UNSET else wait.schema,
    }
    return {"kind": wait.kind, **{k: v for k, v in told.items() if v is not None}, **key}


def stop_awaiting(view: View, command: c.StopAwaiting) -> Answer:
    """The controller went on by itself: the flow runs again, the wait stays open."""
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    run_ids = view.children.run_ids
    gone = {run_ids.get(step, step) for step in command.steps}
    over = [group for group in flow.awaiting if set(group) == gone]
    return _go_on(view, flow, over) if over and not has_ended(flow) else NOTHING


def wake(view: View) -> Decision:
    """The flow goes on where something that its controller stood in has ended; a selection is decided by it."""
    flow = view.flow
    assert flow is not None
    active = view.children.active
    over = [group for group in flow.awaiting if any(task_id not in active for task_id in group)]
    if not over:
        return NOTHING
    decided = dict.fromkeys(i for group in over if group in flow.selecting for i in group)
    lost = _withdraw([active[task_id] for task_id in decided if task_id in active], view.now)
    woken = _go_on(view, flow, over)
    return Decision(
        flow=woken.flow,
        tasks=tuple(task for task, _ in lost),
        facts=(*(fact for _, fact in lost), *woken.facts),
        effects=woken.effects,
    )


def _go_on(view: View, flow: StoredFlow, over: list[tuple[str, ...]]) -> Decision:
    is_over = flow.cancel_requested_at is not None and not view.driven
    left = tuple(group for group in flow.awaiting if group not in over)
    ours = flow.blocked_task_id in {task_id for group in over for task_id in group}
    stood = flow.status is FlowStatus.WAITING or (flow.status is FlowStatus.BLOCKED and ours)
    stays = bool(left) and flow.park_at == NEVER_PARKED
    fields: dict[str, Any] = {
        "awaiting": left,
        "selecting": tuple(group for group in flow.selecting if group in left),
        "wait_json": UNSET,
        "park_at": NEVER_PARKED if stays else None,
    }
    if not stood or is_over:
        after, fact = change_flow(flow, view.now, EventType.FLOW_UPDATED, **fields)
        return Decision(flow=after, facts=(fact,))
    if ours:
        fields |= {"blocked_task_id": None, "blocked_summary": None}
    entered = enter_controller(view, flow)
    # It runs from here: whoever was woken is not queued first, which would be one more commit for each.
    goes_on = FlowStatus.RUNNING if view.driven or entered else FlowStatus.QUEUED
    after, fact = change_flow(flow, view.now, EventType.FLOW_RESUMED, status=goes_on, **fields)
    return Decision(flow=after, facts=(fact,), effects=entered)


# ---- parking --------------------------------------------------------------------------------------


def park(view: View, flow: StoredFlow) -> Decision:
    """The controller has stood long enough: it leaves memory. One that is gone already is entered again."""
    if flow.park_at is None or flow.park_at > view.now or flow.status not in _STANDING:
        return NOTHING
    if not view.driven:
        return Decision(effects=enter_controller(view, flow))
    if flow.park_at == NEVER_PARKED:
        return NOTHING
    after, fact = change_flow(flow, view.now, EventType.FLOW_PARKED, park_at=None)
    return Decision(flow=after, facts=(fact,), effects=(ParkController(),))


def controller_parked(view: View, command: c.ControllerParked) -> Answer:
    """The controller has left; one whose flow was woken meanwhile is entered again."""
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if has_ended(flow) or flow.cancel_requested_at is not None:
        return NOTHING
    if flow.status in _STANDING and flow.park_at is None:
        return NOTHING
    return Decision(effects=enter_controller(view, flow))
