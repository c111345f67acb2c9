"""A person wants a child's next attempt now: in which standings that is granted, and what it changes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.effect import StartTask
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, StoredFlow
from flowstead.model.limits import Limits
from flowstead.model.task import Failed, Launch, OnRestart, StoredTask, TaskStatus
from tests.unit.given import (
    ENDED,
    LIVE,
    NOW,
    a_command,
    a_flow,
    a_launched,
    a_linked,
    a_nested,
    a_turn,
    a_view,
    book,
    in_review,
    retrying,
)

RUNNING, QUEUED = TaskStatus.RUNNING, TaskStatus.QUEUED
DEFECT = c.Defect(Code.INVALID_STATE, "input_json is nan. Nothing was written.")

CHILDREN: dict[str, StoredTask | None] = {
    "none": None,
    "linked, queued": a_linked("t", QUEUED),
    "linked, running": a_linked("t"),
    "in line": a_launched("t", QUEUED, queue_timeout=5.0),
    "in line again": a_launched("t", QUEUED, attempt=1, started_at=NOW - 5),
    "waits for its retry": a_launched(
        "t", QUEUED, launch=retrying(), attempt=1, next_attempt_at=NOW + 60_000
    ),
    "its retry is due": a_launched("t", QUEUED, launch=retrying(), attempt=1, next_attempt_at=NOW),
    "in review": in_review("t"),
    "in review, not to be done twice": in_review(
        "t", launch=Launch(function="work", on_restart=OnRestart.LOST)
    ),
    "a program in review": in_review("t", launch=a_command()),
    "runs": a_launched("t"),
    "is being stopped": a_launched("t", cancel_requested_at=NOW - 5),
    "stands for a flow": a_launched("t", launch=a_nested(), child_flow_id="inner-1"),
}
GRANTED = {
    name
    for name, task in CHILDREN.items()
    if task is not None and task.launch is not None and task.status is QUEUED
} - {"in line", "in line again"}
FLOWS: dict[str, StoredFlow | None] = {
    "none": None,
    **{status.value: a_flow(status) for status in LIVE},
    "intent": a_flow(intent=True),
    "demanded": a_flow(intent=True, cancel_started_at=NOW - 5),
    **{status.value: a_flow(status) for status in ENDED},
}


def answer_by_the_table(flow: str, child: str) -> Code | None:
    if flow == "none" or child == "none":
        return Code.NOT_FOUND
    if flow in {status.value for status in ENDED}:
        return Code.TERMINAL
    if flow in {"intent", "demanded"}:
        return Code.CANCEL_REQUESTED
    return None if child in GRANTED else Code.NOT_RETRYABLE


@pytest.mark.parametrize(("flow", "child"), list(product(FLOWS, CHILDREN)))
@pytest.mark.parametrize("given", ["nothing", "input", "defect"])
def test_it_is_granted_to_what_waits_here_in_a_flow_that_goes_on_and_to_nothing_else(
    flow: str, child: str, given: str
) -> None:
    stored, task = FLOWS[flow], CHILDREN[child]
    view = a_view(stored, *(() if task is None else (task,)), running={"t"}, driven=True)
    before, turn = book(view), a_turn(view)
    inputs: dict[str, Any] = {"nothing": UNSET, "input": Raw(b"[2]"), "defect": DEFECT}
    says = answer_by_the_table(flow, child)
    if says is None and given == "defect":
        says = Code.INVALID_STATE

    taken = turn.take(c.RetryTask(task_id="t", input_json=inputs[given]), "owner")

    if says is not None:
        assert taken.refusal is not None
        assert taken.refusal.code is says
        assert taken.refusal.reason.endswith(".")
        assert view.flow is stored
        assert book(view) == before
        assert not (turn.events or turn.tasks or turn.effects())
        return
    after = view.children.active["t"]
    assert task is not None
    assert taken.refusal is None
    assert [child.task_id for child in taken.children if isinstance(child, StoredTask)] == ["t"]
    assert (after.status, after.attempt) == (RUNNING, task.attempt + 1)
    assert (after.next_attempt_at, after.review_requested_at) == (None, None)
    assert after.input_json == (Raw(b"[2]") if given == "input" else task.input_json)
    assert after.failure == task.failure
    assert after.interruptions == task.interruptions
    assert [event.type for event in turn.events if event.task_id] == [
        EventType.TASK_RETRY_REQUESTED,
        EventType.TASK_STARTED,
    ]
    assert [effect.task for effect in turn.effects() if isinstance(effect, StartTask)] == [after]


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("linked, queued", "Task is run by somebody else."),
        ("linked, running", "Task is run by somebody else."),
        ("runs", "Task is running."),
        ("stands for a flow", "Task is running."),
        ("in line", "Task stands in line already."),
    ],
)
def test_a_refusal_says_what_the_child_does_instead(child: str, reason: str) -> None:
    task = CHILDREN[child]
    assert task is not None

    taken = a_turn(a_view(a_flow(), task)).take(c.RetryTask(task_id="t"), "owner")

    assert taken.refusal is not None
    assert taken.refusal.reason == reason


def test_the_table_grants_and_refuses_something_of_every_sort() -> None:
    answers = {answer_by_the_table(*facts) for facts in product(FLOWS, CHILDREN)}

    assert answers == {
        None,
        Code.NOT_FOUND,
        Code.TERMINAL,
        Code.CANCEL_REQUESTED,
        Code.NOT_RETRYABLE,
    }
    assert len(GRANTED) == 5


@pytest.mark.parametrize("child", sorted(GRANTED))
def test_a_child_that_blocks_nothing_leaves_its_flow_as_it_is(child: str) -> None:
    task = CHILDREN[child]
    assert task is not None
    flow = a_flow(FlowStatus.BLOCKED, blocked_task_id="another")
    view = a_view(flow, task)

    a_turn(view).take(c.RetryTask(task_id="t"), "owner")

    assert view.flow is flow


def test_a_child_that_is_hurried_still_waits_for_a_place() -> None:
    pending = a_launched("t", QUEUED, launch=retrying(), attempt=1, next_attempt_at=NOW + 60_000)
    view = a_view(
        a_flow(),
        a_launched("busy"),
        pending,
        running={"busy"},
        limits=Limits(running_children=1),
    )
    turn, freed = a_turn(view), a_turn(view)

    turn.take(c.RetryTask(task_id="t"), "owner")
    assert not turn.effects()
    freed.take(c.CancelTask(task_id="busy"), "owner")
    freed.take(
        c.EndReport(task_id="busy", attempt=1, outcome=Failed(Failure(kind="exception"))),
        "runtime",
    )

    assert view.children.active["t"].status is RUNNING


def test_hurrying_a_child_that_is_due_does_not_start_it_twice() -> None:
    due = a_launched("t", QUEUED, launch=retrying(), attempt=0, next_attempt_at=NOW)
    view = a_view(a_flow(), due, lined_up=["t"], closing=True)
    turn = a_turn(view)
    turn.take(c.RetryTask(task_id="t"), "owner")
    view.closing = False
    later = a_turn(view)

    later.take(c.Wake(), "runtime")
    later.take(c.Wake(), "runtime")

    assert len(later.effects()) == 1
    assert view.children.active["t"].attempt == 1


def test_a_hurried_retry_that_falls_due_afterwards_is_not_started_a_second_time() -> None:
    pending = a_launched("t", QUEUED, launch=retrying(), attempt=1, next_attempt_at=NOW + 100)
    view = a_view(a_flow(), pending)
    a_turn(view).take(c.RetryTask(task_id="t"), "owner")
    view.running, view.now = {"t": 2}, NOW + 100
    tick = a_turn(view)

    tick.take(c.Tick(), "runtime")

    assert not (tick.events or tick.effects())


def test_a_hurried_child_whose_function_is_elsewhere_is_not_due_here_any_more() -> None:
    elsewhere = Launch(function="elsewhere")
    view = a_view(a_flow(), in_review("t", launch=elsewhere), closing=False)

    taken = a_turn(view).take(c.RetryTask(task_id="t"), "owner")

    assert taken.refusal is None
    after = view.children.active["t"]
    assert (after.status, after.review_requested_at) == (QUEUED, None)
