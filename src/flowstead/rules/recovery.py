"""What must move again once a flow is back in memory, derived from its snapshot alone.

The same rules serve a crash, a clean restart and a flow that was merely idle: a child recorded as running
whose code is not running here was cut off. Recovery changes no row unless something was cut off, so an idle
restart leaves the file as it was.

A child of which something may live on outside our process (a process group, a nested flow) never ends by its
record alone: its attempt is *adopted*, so that its code can see to what is out there, and be stopped at once
where it is not wanted any more.
"""

from __future__ import annotations

from enum import StrEnum

from flowstead.model import command as c
from flowstead.model.code import NOT_FOUND, Refusal
from flowstead.model.effect import (
    DrainTask,
    Effect,
    KillTask,
    StartController,
    StartTask,
    StopReason,
    StopTask,
)
from flowstead.model.flow import Failure, FlowStatus, StoredFlow, has_ended
from flowstead.model.task import Launch, Lost, OnRestart, StoredTask, TaskStatus, is_bare
from flowstead.rules import endings
from flowstead.rules.ladder import task_due_at
from flowstead.rules.stops import end_cancelled
from flowstead.rules.view import Decision, View, enter_controller
from flowstead.rules.waits import may_be_in_memory

_ENTERED = frozenset({FlowStatus.QUEUED, FlowStatus.RUNNING})


class Fate(StrEnum):
    """What recovery does with one launched child."""

    KEEP = "keep"
    STOP = "stop"
    LINE_UP = "line_up"
    RESTART = "restart"
    ADOPT = "adopt"
    ADOPT_TO_STOP = "adopt_to_stop"
    ADOPT_TO_LOSE = "adopt_to_lose"
    CANCEL = "cancel"
    LOSE = "lose"


def recover(view: View, command: c.Recover) -> Decision | Refusal:
    """The decision that sets a loaded flow in motion again."""
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    changes: list[endings.Change] = []
    effects: list[Effect] = []
    lined_up: list[str] = []
    unregistered: list[str] = []
    for task in view.children.launched():
        if view.started.get(task.task_id) == task.attempt:
            continue
        fate, why = fate_of(task, view)
        if fate is Fate.KEEP and not view.closing and not view.has_function(task):
            unregistered += _missing(task)
        match fate:
            case Fate.KEEP if flow.cancel_requested_at is not None and view.has_code(task):
                # The intent may have been written without anybody knowing.
                effects += _drain(task)
            case Fate.LINE_UP:
                lined_up.append(task.task_id)
            case Fate.STOP:
                effects += _stop(flow, task)
            case Fate.RESTART if _has_room(view, task):
                change = endings.restart(task, view.now)
                changes.append(change)
                effects.append(StartTask(change[0], adopted=True))
            case Fate.RESTART:
                changes.append(endings.interrupt(task, view.now))
                lined_up.append(task.task_id)
            case Fate.ADOPT:
                effects += _adopt(flow, task)
            case Fate.ADOPT_TO_STOP:
                if task.cancel_requested_at is None:
                    task = _changed(changes, endings.request_cancel(task, view.now))
                elif task.kill_requested_at is not None or _is_due(task, view):
                    # Due, or begun by a process that is gone: nobody has had the time of this rung yet.
                    task = _changed(changes, endings.request_kill(task, _not_before(task, view)))
                effects += (StartTask(task, adopted=True), *_stop(flow, task))
            case Fate.ADOPT_TO_LOSE:
                effects.append(StartTask(task, adopted=True))
                effects.append(StopTask(task.task_id, StopReason.INTERRUPTED))
            case Fate.CANCEL:
                changes.append(end_cancelled(task, view.now, why))
            case Fate.LOSE:
                changes.append(endings.end(task, view.now, _lost(task, why)))
    return Decision(
        tasks=tuple(task for task, _ in changes),
        facts=tuple(fact for _, fact in changes),
        effects=(*effects, *_reenter(flow, view)),
        lined_up=tuple(lined_up),
        unregistered=tuple(unregistered),
    )


def _missing(task: StoredTask) -> list[str]:
    """What this process would need to run the child; a bare function is its controller's affair."""
    launch = task.launch
    if launch is None or is_bare(launch):
        return []
    return [launch.function or launch.executor]


def _not_before(task: StoredTask, view: View) -> int:
    """Now, unless the wall clock has gone back behind what the record says of the stop."""
    return max(view.now, task.kill_requested_at or 0, task.cancel_requested_at or 0)


def _is_due(task: StoredTask, view: View) -> bool:
    """Whether the next rung of the child's stop is due."""
    due_at = task_due_at(task, view.limits)
    return due_at is not None and due_at <= view.now


def _has_room(view: View, task: StoredTask) -> bool:
    """Whether a child that was cut off may go on at once. What is left of an external one takes room anyway."""
    is_external = task.launch is not None and task.launch.external
    return is_external or view.room.take(task)


def _changed(changes: list[endings.Change], change: endings.Change) -> StoredTask:
    changes.append(change)
    return change[0]


def _adopt(flow: StoredFlow, task: StoredTask) -> list[Effect]:
    drain = [] if flow.cancel_requested_at is None else _drain(task)
    return [StartTask(task, adopted=True), *drain]


def _drain(task: StoredTask) -> list[DrainTask]:
    """Pass an intent on to the flow a child stands for."""
    return [] if task.child_flow_id is None else [DrainTask(task.task_id)]


def _stop(flow: StoredFlow, task: StoredTask) -> list[Effect]:
    """Stop a child's code, on the rung that its record says was reached."""
    reason = StopReason.FLOW_ENDED if has_ended(flow) else StopReason.CANCELLED
    stop: list[Effect] = [StopTask(task.task_id, reason)]
    return stop if task.kill_requested_at is None else [*stop, KillTask(task.task_id)]


def _lost(task: StoredTask, why: str) -> Lost:
    launch = task.launch
    if launch is not None and launch.on_restart is OnRestart.LOST and not is_bare(launch):
        return endings.interrupted(why)
    return Lost(Failure(kind="interrupted", message=why))


def fate_of(task: StoredTask, view: View) -> tuple[Fate, str]:
    """What becomes of one launched child, and why."""
    flow, launch = view.flow, task.launch
    assert flow is not None and launch is not None
    if view.has_code(task):
        # A commit in doubt may have left the wish on disk, and nobody stopped. An intent stops nobody.
        if has_ended(flow) or task.cancel_requested_at is not None:
            return Fate.STOP, "its code is running here, and is not wanted any more"
        return Fate.KEEP, "its code is running here"
    if launch.external and task.status is TaskStatus.RUNNING:
        return _fate_of_external(task, view)
    if has_ended(flow) or flow.cancel_requested_at is not None:
        return Fate.CANCEL, "interrupted by a restart after the flow ended or was asked to cancel"
    if task.cancel_requested_at is not None:
        return Fate.CANCEL, "interrupted by a restart after it was asked to stop"
    if view.closing:
        return Fate.KEEP, "the runtime is closing; the next one decides"
    if is_bare(launch) and _is_worn(task, view):
        return Fate.LOSE, f"interrupted {task.interruptions + 1} times; not started again"
    if not view.has_function(task):
        return _without_function(launch)
    if task.status is TaskStatus.QUEUED:
        return _fate_of_queued(task, view)
    if launch.on_restart is OnRestart.LOST:
        return Fate.LOSE, "the process ended before the child's outcome was recorded"
    if _is_worn(task, view):
        return Fate.LOSE, f"interrupted {task.interruptions + 1} times; not started again"
    return Fate.RESTART, "it was cut off"


def _fate_of_external(task: StoredTask, view: View) -> tuple[Fate, str]:
    """What becomes of a running child of which something may be left outside our process."""
    flow, launch = view.flow, task.launch
    assert flow is not None and launch is not None
    is_nested = task.child_flow_id is not None
    if view.closing or not view.has_function(task):
        return Fate.KEEP, "nobody here can see to what it may have left behind"
    if (
        has_ended(flow)
        or flow.cancel_started_at is not None
        or task.cancel_requested_at is not None
    ):
        return Fate.ADOPT_TO_STOP, "it is not wanted any more, and may have left something behind"
    if is_nested:
        return Fate.ADOPT, "its flow lives on"
    if flow.cancel_requested_at is not None:
        return Fate.ADOPT_TO_STOP, "it was cut off, and nothing new may start"
    if launch.on_restart is OnRestart.LOST or _is_worn(task, view):
        return Fate.ADOPT_TO_LOSE, "it was cut off, and must not be started again"
    return Fate.RESTART, "it was cut off"


def _fate_of_queued(task: StoredTask, view: View) -> tuple[Fate, str]:
    if task.review_requested_at is not None:
        return Fate.KEEP, "a person has to look at it"
    if task.next_attempt_at is not None and task.next_attempt_at > view.now:
        return Fate.KEEP, "its retry is not due"
    return Fate.LINE_UP, "it was waiting for its turn"


def _is_worn(task: StoredTask, view: View) -> bool:
    """Whether the child has been cut off so often that it may be what kills its process."""
    running = task.status is TaskStatus.RUNNING
    return running and task.interruptions >= view.limits.interruptions


def _without_function(launch: Launch) -> tuple[Fate, str]:
    if not is_bare(launch):
        return Fate.KEEP, "its function or executor is not registered in this runtime"
    if launch.on_restart is OnRestart.RETRY:
        return Fate.KEEP, "its controller will ask for it, here or in another runtime"
    return Fate.LOSE, "the process ended, and the child's function was not registered"


def _is_asked_for(flow: StoredFlow, view: View) -> bool:
    """Whether a controller that stands in a wait must ask again for a child of a function that only it has."""
    return bool(flow.awaiting) and any(
        task.launch is not None
        and is_bare(task.launch)
        and not view.has_code(task)
        and not view.has_function(task)
        for task in view.children.launched()
    )


def _reenter(flow: StoredFlow, view: View) -> tuple[StartController, ...]:
    if has_ended(flow) or flow.cancel_started_at is not None:
        return ()
    is_left = not may_be_in_memory(flow) and not _is_asked_for(flow, view)
    if flow.status not in _ENTERED and is_left:
        return ()
    return enter_controller(view, flow)
