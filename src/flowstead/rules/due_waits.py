"""Waits whose instant has come: timers fire, reminders go out, deadlines do what they were set to do.

Another part of the tick. What is due is read from the rows alone, so an instant that passed while nobody was there
is seen to once, late rather than never, and not again.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from flowstead.model.approval import Verdict
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, StoredFlow, has_ended
from flowstead.model.task import Cancelled, StoredTask, TimedOut
from flowstead.model.update import StoredUpdate, UpdateKind
from flowstead.model.wait import OnTimeout, Wait, WaitKind
from flowstead.rules import answers, endings, waits
from flowstead.rules.endings import NULL
from flowstead.rules.overdue import Blocker, first_overdue
from flowstead.rules.view import (
    NO_WAIT,
    NOTHING,
    Decision,
    News,
    View,
    change_flow,
    change_task,
)
from flowstead.rules.wait_keys import token_digest_of


def see_to(view: View, flow: StoredFlow, overdue: list[StoredTask]) -> Decision:
    """What becomes of these children, of the flow's own wait, and of a controller that has stood long enough."""
    if has_ended(flow) or flow.cancel_requested_at is not None:
        return NOTHING
    changes: list[endings.Change] = []
    news: list[News] = []
    # However late this is, what was over first is first: the first of several may be all that counts.
    for task in sorted(overdue, key=_over_at):
        if task.letter is not None:
            changes.append(endings.end(task, view.now, Cancelled(_expired("nobody took it"))))
            continue
        assert task.wait is not None
        news += _reminders(task.run_id or task.task_id, task.task_id, task.wait, view.now)
        changes.append(_child_due(task, task.wait, view.now))
    stood_in = {task_id for group in flow.awaiting for task_id in group}
    seen = [task for task, _ in changes if task.task_id in stood_in]
    late = first_overdue(seen)
    is_woken = any(task.ended_at is not None for task in seen)
    answer = _flow_due(view, flow, late, is_woken=is_woken)
    if answer.flow is None and flow.wait is not None:
        # A wait of the flow's own may come back, and be reminded of at the same instant.
        news += _reminders("wait", _own_name(flow), flow.wait, view.now)
        answer = _reminded(view, flow, flow.wait)
    return msgspec.structs.replace(
        answer,
        tasks=tuple(task for task, _ in changes),
        facts=(*(fact for _, fact in changes), *answer.facts),
        news=tuple(news),
    )


def _over_at(task: StoredTask) -> int:
    return 0 if task.wait is None else task.wait.deadline_at or 0


def _child_due(task: StoredTask, wait: Wait, now: int) -> endings.Change:
    """The child afterwards: reminded of, overdue, or ended."""
    if not _is_over(wait, now):
        return change_task(task, now, EventType.TASK_REMINDED, wait=_without_reminders(wait, now))
    if wait.kind is WaitKind.TIMER:
        return endings.answer(task, now, NULL)
    if wait.approval is not None:
        return answers.decided(task, now, Verdict.EXPIRED)
    if wait.on_timeout is OnTimeout.BLOCK:
        return change_task(task, now, EventType.TASK_OVERDUE, wait=_overdue(wait))
    return endings.end(task, now, TimedOut(_expired(f"no answer to {task.run_id!r} in time")))


def _flow_due(view: View, flow: StoredFlow, late: Blocker | None, *, is_woken: bool) -> Decision:
    if late is not None and flow.status is FlowStatus.WAITING:
        return _block(view, flow, late)
    if flow.wait is not None and _is_over(flow.wait, view.now):
        return _own_wait_over(view, flow, flow.wait)
    return NOTHING if is_woken or not flow.awaiting else waits.park(view, flow)


def _own_wait_over(view: View, flow: StoredFlow, wait: Wait) -> Decision:
    """The deadline of the flow's own wait."""
    match wait.on_timeout:
        case OnTimeout.RESUME:
            told = {"timedOut": True, "at": view.now}
            return answers.resume_own(view, flow, Raw(msgspec.json.encode(told)))
        case OnTimeout.BLOCK:
            return _block(view, flow, Blocker(None, "no answer in time"), wait=_overdue(wait))
        case OnTimeout.FAIL:
            after, fact = change_flow(
                flow,
                view.now,
                EventType.FLOW_FAILED,
                status=FlowStatus.FAILED,
                failure=_expired("no answer in time"),
                ended_at=max(view.now, flow.updated_at),
                **NO_WAIT,
            )
            return Decision(flow=after, facts=(fact,))


def _overdue(wait: Wait) -> Wait:
    return msgspec.structs.replace(wait, deadline_at=None, remind_at=(), is_overdue=True)


def _block(view: View, flow: StoredFlow, late: Blocker, **fields: Any) -> Decision:
    """The flow needs attention now; its wait stays open. What blocked it before goes first."""
    if flow.status is not FlowStatus.BLOCKED:
        fields |= {
            "status": FlowStatus.BLOCKED,
            "blocked_task_id": late.task_id,
            "blocked_summary": late.summary,
        }
    after, fact = change_flow(flow, view.now, EventType.FLOW_BLOCKED, **fields)
    return Decision(flow=after, facts=(fact,))


def _reminded(view: View, flow: StoredFlow, wait: Wait) -> Decision:
    if not wait.remind_at or wait.remind_at[0] > view.now:
        return NOTHING
    left = _without_reminders(wait, view.now)
    after, fact = change_flow(flow, view.now, EventType.FLOW_REMINDED, wait=left)
    return Decision(flow=after, facts=(fact,))


def _reminders(name: str, slot: str, wait: Wait, now: int) -> list[News]:
    """One reminder, however many are due: who was away is reminded once."""
    due = [at for at in wait.remind_at if at <= now]
    if not due or _is_over(wait, now):
        return []
    told = wait.prompt or f"still waiting for {name!r}"
    return [
        News(kind=UpdateKind.REMINDER, slot=f"reminder:{slot}:{due[-1]}", text=f"Reminder: {told}")
    ]


def is_reminder_of(update: StoredUpdate, wait: StoredFlow | StoredTask) -> bool:
    """Whether a reminder is of this wait: of a child that waits, or of the flow's own."""
    name = update.slot.removeprefix("reminder:").rpartition(":")[0]
    if isinstance(wait, StoredTask):
        return name == wait.task_id
    # Those of earlier versions do not say which wait of the flow's own it was.
    return name.partition(".")[2] in ("", _own_name(wait).partition(".")[2])


def _own_name(flow: StoredFlow) -> str:
    return f"r{flow.revision}.{token_digest_of(flow.wait) or ''}"


def _without_reminders(wait: Wait, now: int) -> Wait:
    left = tuple(at for at in wait.remind_at if at > now)
    return msgspec.structs.replace(wait, remind_at=left)


def _is_over(wait: Wait, now: int) -> bool:
    return wait.deadline_at is not None and wait.deadline_at <= now


def _expired(message: str) -> Failure:
    return Failure(kind="timed_out", code="wait", message=message)
