"""Stopping children: on request, at shutdown, and by the clock, one rung after another.

Another part of `decide`, under the same rules: nothing is changed here, and a refused command has no effect.
"""

from __future__ import annotations

from flowstead.model import command as c
from flowstead.model.code import NOT_FOUND, TASK_NOT_FOUND
from flowstead.model.effect import AbandonTask, Effect, KillTask, StopReason, StopTask
from flowstead.model.flow import Failure
from flowstead.model.task import Cancelled, OnRestart, StoredTask, TaskStatus, TimedOut, is_bare
from flowstead.rules import due_waits, endings
from flowstead.rules.ladder import task_due_at
from flowstead.rules.review import unblock
from flowstead.rules.view import Answer, Decision, View


def cancel_task(view: View, command: c.CancelTask) -> Answer:
    """Stop one child. One whose code runs is marked first, so that no failure or crash brings it back."""
    flow, task = view.flow, view.children.active.get(command.task_id)
    if flow is None or task is None:
        return TASK_NOT_FOUND
    changes, stopped = stop_children(view, [task], "task cancelled")
    answer = Decision(
        tasks=tuple(task for task, _ in changes),
        facts=tuple(fact for _, fact in changes),
        effects=stopped,
    )
    return unblock(view, flow, task, answer)


def release_tasks(view: View, command: c.ReleaseTasks) -> Answer:
    """running → queued, for children stopped by shutdown.

    Cancelled, if they had been asked to stop anyway; lost, if they must not be done twice and had begun. One
    that stands for a nested flow stays as it is: that flow goes on with the next runtime.
    """
    active = view.children.active
    # One that was stopped and started again while closing is named twice.
    running = [active[i] for i in dict.fromkeys(command.task_ids) if i in active]
    released = [
        _release(task, view.now, begun=task.task_id in command.begun)
        for task in running
        if task.launch is not None
        and task.status is TaskStatus.RUNNING
        and task.child_flow_id is None
    ]
    return Decision(
        tasks=tuple(task for task, _ in released),
        facts=tuple(fact for _, fact in released),
    )


def _release(task: StoredTask, now: int, *, begun: bool) -> endings.Change:
    assert task.launch is not None
    if task.cancel_requested_at is not None:
        return end_cancelled(task, now, "task cancelled")
    once = task.launch.on_restart is OnRestart.LOST and not is_bare(task.launch)
    if once and begun:
        return endings.end(
            task, now, endings.interrupted("stopped because the runtime was closing")
        )
    return endings.release(task, now)


def tick(view: View, command: c.Tick) -> Answer:
    """Whatever is due by the clock: retries, queue deadlines, and the rungs of a stop."""
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    lined_up: list[str] = []
    changes: list[endings.Change] = []
    effects: list[Effect] = []
    overdue: list[StoredTask] = []
    for task in view.children.active.values():
        if (at := task_due_at(task, view.limits)) is None or at > view.now:
            continue
        if task.wait is not None or task.letter is not None:
            overdue.append(task)
        elif task.status is TaskStatus.RUNNING:
            if _is_to_be_adopted(view, task):
                continue
            change, effect = _climb(view, task)
            changes.append(change)
            effects.append(effect)
        elif task.next_attempt_at is None:
            changes.append(endings.end(task, view.now, never_started(task)))
        elif view.has_function(task):
            lined_up.append(task.task_id)
    waited = due_waits.see_to(view, flow, overdue)
    return Decision(
        flow=waited.flow,
        tasks=(*waited.tasks, *(task for task, _ in changes)),
        facts=(*waited.facts, *(fact for _, fact in changes)),
        effects=(*waited.effects, *effects),
        lined_up=tuple(lined_up),
        news=waited.news,
    )


def _is_to_be_adopted(view: View, task: StoredTask) -> bool:
    """Whether somebody has yet to look for what an earlier process left of it; the stop goes on from there."""
    is_external = task.launch is not None and task.launch.external
    runs_here = view.running.get(task.task_id) == task.attempt
    return is_external and not runs_here and view.has_function(task)


def _climb(view: View, task: StoredTask) -> tuple[endings.Change, Effect]:
    """The next rung of a stop that is not obeyed: kill, and then abandon."""
    if task.kill_requested_at is None:
        return endings.request_kill(task, view.now), KillTask(task.task_id)
    given_up = Cancelled(
        Failure(kind="abandoned", message="would not stop and was given up; its code may still run")
    )
    return endings.end(task, view.now, given_up), AbandonTask(task.task_id)


def never_started(task: StoredTask) -> TimedOut:
    """The outcome of a child that has waited for its first start for too long."""
    message = f"not started within {task.queue_timeout:.15g} s"
    return TimedOut(Failure(kind="timed_out", code="queue", message=message))


def stop_children(
    view: View, tasks: list[StoredTask], why: str, reason: StopReason = StopReason.CANCELLED
) -> tuple[list[endings.Change], tuple[StopTask, ...]]:
    """End what has no code running here; mark and stop what has, so that no failure or crash brings it back.

    An external child that runs, and that nobody here can see to, is marked as well: the ladder ends it.
    """
    changes = [end_cancelled(t, view.now, why) for t in tasks if _ends_by_record(view, t)]
    changes += [
        endings.request_cancel(t, view.now)
        for t in tasks
        if not _ends_by_record(view, t) and t.cancel_requested_at is None
    ]
    running = [task.task_id for task in tasks if view.has_code(task)]
    return changes, tuple(StopTask(task_id, reason) for task_id in running)


def _ends_by_record(view: View, task: StoredTask) -> bool:
    """Whether nothing of the child can be left anywhere."""
    is_external = task.launch is not None and task.launch.external
    return not view.has_code(task) and not (is_external and task.status is TaskStatus.RUNNING)


def has_begun(view: View, task: StoredTask) -> bool:
    """Whether the child's work is under way, here or elsewhere. One started in this very turn is not."""
    if task.letter is not None:
        return False
    return task.status is TaskStatus.RUNNING and (
        task.launch is None or not _ends_by_record(view, task)
    )


def end_cancelled(task: StoredTask, now: int, why: str) -> endings.Change:
    """active → cancelled."""
    return endings.end(task, now, Cancelled(endings.cancelled(why)))
