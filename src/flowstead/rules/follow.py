"""What follows from a change, whatever caused it. Pure, and asked after every applied command.

- A flow that has just ended takes its launched children, its waits and its controller with it; linked children
  run elsewhere and report.
- A flow with a cancel intent starts nothing, and becomes cancelled when its last child has ended, when a
  `cancel` finds nothing running, or when the grace of the request is over.
- A flow with a child that a person has to look at is blocked by it.
- A flow whose controller stands in a wait goes on when what it waits for has ended.
- Any other flow starts the children that stand in line, as far as their limits allow.
"""

from __future__ import annotations

from flowstead.model import command as c
from flowstead.model.effect import AbandonController, StartTask, StopController, StopReason
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow
from flowstead.model.task import StoredTask, is_active
from flowstead.rules import endings
from flowstead.rules.ladder import abandon_controller_at, cancel_due_at, is_late
from flowstead.rules.stops import never_started, stop_children
from flowstead.rules.view import NO_WAIT, NOTHING, Decision, View, change_flow, start_cancel


def end_code(view: View, command: c.Command) -> Decision:
    """The flow has just ended: children with no code running here end now, the others are stopped.

    So is the controller, unless it ended the flow itself and may tidy up.
    """
    owned = view.children.owned()
    by_itself = isinstance(command, (c.Finish, c.Fail)) and command.by_controller
    controller = (StopController(),) if view.driven and not by_itself else ()
    if not owned and not controller:
        return NOTHING
    changes, stopped = stop_children(view, owned, "the flow ended", StopReason.FLOW_ENDED)
    return Decision(
        tasks=tuple(task for task, _ in changes),
        facts=tuple(fact for _, fact in changes),
        effects=(*stopped, *controller),
    )


def conclude_cancel(view: View, command: c.Command, *, child_ended: bool) -> Decision:
    """End a live flow whose cancel intent has nothing left to wait for."""
    flow = view.flow
    assert flow is not None
    if view.children.active:
        return NOTHING
    overdue = cancel_due_at(flow, view.limits) <= view.now
    if view.driven:
        # The controller may still end the flow honestly, but not for ever.
        return _stop_controller(view, flow, overdue=overdue)
    demanded = flow.cancel_started_at is not None or isinstance(
        command, c.ControllerStopped | c.ControllerParked
    )
    if not (overdue or child_ended or demanded):
        return NOTHING
    after, fact = change_flow(
        flow,
        view.now,
        EventType.FLOW_CANCELLED,
        status=FlowStatus.CANCELLED,
        blocked_task_id=None,
        blocked_summary=None,
        ended_at=max(view.now, flow.updated_at),
        **NO_WAIT,
    )
    return Decision(flow=after, facts=(fact,))


def _stop_controller(view: View, flow: StoredFlow, *, overdue: bool) -> Decision:
    """The next rung for a controller that holds up the end of its flow."""
    if flow.cancel_started_at is None:
        if not overdue:
            return NOTHING
        after, fact = start_cancel(flow, view.now)
        return Decision(flow=after, facts=(fact,), effects=(StopController(),))
    if abandon_controller_at(flow, view.limits) > view.now:
        return NOTHING
    return Decision(effects=(AbandonController(),))


def start_children(view: View) -> Decision:
    """Start what stands in line, as far as the limits allow; what has stood there too long ends.

    Lines are consumed: apply the decision.
    """
    changes: list[endings.Change] = []

    def has_room(task: StoredTask) -> bool:
        return is_late(task, view.now) or view.room.take(task)

    for task in view.children.next_startable(view.limits.running_children, has_room):
        if is_late(task, view.now):
            change = endings.end(task, view.now, never_started(task))
        else:
            change = endings.start(task, view.now)
        view.children.put(change[0])
        changes.append(change)
    if not changes:
        return NOTHING
    return Decision(
        tasks=tuple(task for task, _ in changes),
        facts=tuple(fact for _, fact in changes),
        effects=tuple(StartTask(task) for task, _ in changes if is_active(task)),
    )
