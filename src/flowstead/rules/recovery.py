"""What must move again once a flow is back in memory, derived from its snapshot alone.

The same rules serve a crash, a clean restart and a flow that was merely idle: a child recorded as running
whose code is not running here was cut off. Recovery changes no row unless something was cut off, so an idle
restart leaves the file as it was.
"""

from __future__ import annotations

from enum import StrEnum

from flowstead.model import command as c
from flowstead.model.code import NOT_FOUND, Refusal
from flowstead.model.effect import (
    StartController,
    StartTask,
    StopReason,
    StopTask,
)
from flowstead.model.flow import Failure, FlowStatus, StoredFlow, has_ended
from flowstead.model.task import Cancelled, Launch, Lost, OnRestart, StoredTask, TaskStatus
from flowstead.rules import endings
from flowstead.rules.view import Decision, View

_ENTERED = frozenset({FlowStatus.QUEUED, FlowStatus.RUNNING})


class Fate(StrEnum):
    """What recovery does with one launched child."""

    KEEP = "keep"
    STOP = "stop"
    LINE_UP = "line_up"
    RESTART = "restart"
    CANCEL = "cancel"
    LOSE = "lose"


def recover(view: View, command: c.Recover) -> Decision | Refusal:
    """The decision that sets a loaded flow in motion again."""
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    changes: list[endings.Change] = []
    lined_up: list[str] = []
    started: list[StartTask] = []
    stopped: list[StopTask] = []
    for task in view.children.launched():
        fate, why = fate_of(task, view)
        if fate is Fate.LINE_UP:
            lined_up.append(task.task_id)
        elif fate is Fate.STOP:
            reason = StopReason.FLOW_ENDED if has_ended(flow) else StopReason.CANCELLED
            stopped.append(StopTask(task.task_id, reason))
        elif fate is Fate.RESTART:
            change = endings.restart(task, view.now)
            changes.append(change)
            started.append(StartTask(change[0]))
        elif fate is Fate.CANCEL:
            changes.append(endings.end(task, view.now, Cancelled(endings.cancelled(why))))
        elif fate is Fate.LOSE:
            lost = Lost(Failure(kind="interrupted", message=why))
            changes.append(endings.end(task, view.now, lost))
    return Decision(
        tasks=tuple(task for task, _ in changes),
        facts=tuple(fact for _, fact in changes),
        effects=(*started, *stopped, *_reenter(flow, view)),
        lined_up=tuple(lined_up),
    )


def fate_of(task: StoredTask, view: View) -> tuple[Fate, str]:
    """What becomes of one launched child, and why."""
    flow, launch = view.flow, task.launch
    assert flow is not None and launch is not None
    if view.has_code(task):
        # A commit in doubt may have left the wish on disk, and nobody stopped. An intent stops nobody.
        if has_ended(flow) or task.cancel_requested_at is not None:
            return Fate.STOP, "its code is running here, and is not wanted any more"
        return Fate.KEEP, "its code is running here"
    if has_ended(flow) or flow.cancel_requested_at is not None:
        return Fate.CANCEL, "interrupted by a restart after the flow ended or was asked to cancel"
    if task.cancel_requested_at is not None:
        return Fate.CANCEL, "interrupted by a restart after it was asked to stop"
    if view.closing:
        return Fate.KEEP, "the runtime is closing; the next one decides"
    if launch.function is None and _is_worn(task, view):
        return Fate.LOSE, f"interrupted {task.interruptions + 1} times; not started again"
    if not view.has_function(task):
        return _without_function(launch)
    if task.status is TaskStatus.QUEUED:
        if task.next_attempt_at is not None and task.next_attempt_at > view.now:
            return Fate.KEEP, "its retry is not due"
        return Fate.LINE_UP, "it was waiting for its turn"
    if launch.on_restart is OnRestart.LOST:
        return Fate.LOSE, "the process ended before the child's outcome was recorded"
    if _is_worn(task, view):
        return Fate.LOSE, f"interrupted {task.interruptions + 1} times; not started again"
    return Fate.RESTART, "it was cut off"


def _is_worn(task: StoredTask, view: View) -> bool:
    """Whether the child has been cut off so often that it may be what kills its process."""
    running = task.status is TaskStatus.RUNNING
    return running and task.interruptions >= view.limits.interruptions


def _without_function(launch: Launch) -> tuple[Fate, str]:
    if launch.function is not None:
        return Fate.KEEP, "its function is not registered in this runtime"
    if launch.on_restart is OnRestart.RETRY:
        return Fate.KEEP, "its controller will ask for it, here or in another runtime"
    return Fate.LOSE, "the process ended, and the child's function was not registered"


def _reenter(flow: StoredFlow, view: View) -> tuple[StartController, ...]:
    controller = flow.controller_id
    if controller is None or controller not in view.controllers or view.driven:
        return ()
    if has_ended(flow) or flow.status not in _ENTERED:
        return ()
    return (StartController(controller),)
