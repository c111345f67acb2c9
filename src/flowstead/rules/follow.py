"""What follows from a change, whatever caused it. Pure, and asked after every applied command.

- A flow that has just ended takes its launched children and its controller with it; linked children run
  elsewhere and report.
- A flow with a cancel intent starts nothing, and becomes cancelled when its last child has ended, when a
  `cancel` finds nothing running, or when the grace of the request is over.
- Any other flow starts the children that stand in line, as far as their limits allow.
"""

from __future__ import annotations

from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.effect import StartTask, StopController, StopReason, StopTask
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow, has_ended
from flowstead.model.limits import Limits
from flowstead.model.task import Cancelled
from flowstead.rules import endings
from flowstead.rules.view import NOTHING, Decision, View, change_flow


def end_code(view: View, command: c.Command) -> Decision:
    """The flow has just ended: children with no code running here end now, the others are stopped.

    So is the controller, unless it ended the flow itself and may tidy up.
    """
    launched = view.children.launched()
    by_itself = isinstance(command, (c.Finish, c.Fail)) and command.by_controller
    controller = (StopController(),) if view.driven and not by_itself else ()
    if not launched and not controller:
        return NOTHING
    idle = [task for task in launched if not view.has_code(task)]
    failure = endings.cancelled("the flow ended")
    ended = [endings.end(task, view.now, Cancelled(failure)) for task in idle]
    stopped = [task.task_id for task in launched if view.has_code(task)]
    return Decision(
        tasks=tuple(task for task, _ in ended),
        facts=tuple(fact for _, fact in ended),
        effects=(
            *(StopTask(task_id, StopReason.FLOW_ENDED) for task_id in stopped),
            *controller,
        ),
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
        return Decision(effects=(StopController(),)) if overdue else NOTHING
    if not (overdue or child_ended or isinstance(command, (c.Cancel, c.ControllerStopped))):
        return NOTHING
    after, fact = change_flow(
        flow,
        view.now,
        EventType.FLOW_CANCELLED,
        status=FlowStatus.CANCELLED,
        wait_json=UNSET,
        blocked_task_id=None,
        blocked_summary=None,
        ended_at=max(view.now, flow.updated_at),
    )
    return Decision(flow=after, facts=(fact,))


def start_children(view: View) -> Decision:
    """Start what stands in line, as far as the limits allow. Lines are consumed: apply the decision."""
    started: list[endings.Change] = []
    for task in view.children.next_startable(view.limits.running_children):
        change = endings.start(task, view.now)
        view.children.put(change[0])
        started.append(change)
    if not started:
        return NOTHING
    return Decision(
        tasks=tuple(task for task, _ in started),
        facts=tuple(fact for _, fact in started),
        effects=tuple(StartTask(task) for task, _ in started),
    )


def cancel_due_at(flow: StoredFlow, limits: Limits) -> int:
    """When a requested cancel is ended by the runtime itself, epoch ms."""
    assert flow.cancel_requested_at is not None
    return flow.cancel_requested_at + round(limits.cancel_grace * 1000)


def due_at(flow: StoredFlow, limits: Limits) -> int | None:
    """The next instant at which the flow itself needs a tick, epoch ms, if any."""
    if has_ended(flow) or flow.cancel_requested_at is None:
        return None
    return cancel_due_at(flow, limits)
