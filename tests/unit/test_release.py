"""What a clean shutdown does to the children it stops: back to the queue, and the exceptions to that."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest

from flowstead.model import command as c
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus
from flowstead.model.task import Launch, OnRestart, StoredTask, TaskStatus
from tests.unit.given import (
    CREATED_AT,
    NOW,
    a_command,
    a_flow,
    a_launched,
    a_linked,
    a_nested,
    a_turn,
    a_view,
    retrying,
)

RUNNING, QUEUED = TaskStatus.RUNNING, TaskStatus.QUEUED
LOST, CANCELLED = TaskStatus.LOST, TaskStatus.CANCELLED


class Facts(NamedTuple):
    """All that may count for a child that shutdown has stopped."""

    launch: str
    twice: bool  # whether it may be done twice
    begun: bool
    asked: bool
    status: TaskStatus


EVERY = [
    Facts(*facts)
    for facts in product(
        ("linked", "registered", "bare", "command", "nested"),
        (True, False),
        (False, True),
        (False, True),
        (QUEUED, RUNNING),
    )
]


def outcome_by_the_table(facts: Facts) -> TaskStatus | None:
    """How the child stands afterwards; None for as before."""
    if facts.launch in {"linked", "nested"} or facts.status is QUEUED:
        return None
    if facts.asked:
        return CANCELLED
    if not facts.twice and facts.begun and facts.launch != "bare":
        return LOST
    return QUEUED


def child(facts: Facts) -> StoredTask:
    restart = OnRestart.RETRY if facts.twice else OnRestart.LOST
    launches = {
        "registered": Launch(function="work", on_restart=restart),
        "bare": Launch(on_restart=restart),
        "command": a_command(on_restart=restart),
        "nested": a_nested(on_restart=restart),
    }
    fields = {
        "cancel_requested_at": NOW - 5 if facts.asked else None,
        "child_flow_id": "inner-1" if facts.launch == "nested" else None,
        "interruptions": 1,
        "started_at": CREATED_AT + 1,
        "attempt": 3,
    }
    if facts.launch == "linked":
        return a_linked("t", facts.status, **fields)
    return a_launched("t", facts.status, launch=launches[facts.launch], **fields)


@pytest.mark.parametrize("intent", [False, True])
def test_what_shutdown_stopped_stands_as_the_table_says(intent: bool) -> None:
    seen = set()
    for facts in EVERY:
        task = child(facts)
        view = a_view(a_flow(intent=intent), task, closing=True)
        turn = a_turn(view)
        begun = frozenset({"t"} if facts.begun else set[str]())

        turn.take(c.ReleaseTasks(task_ids=("t",), begun=begun), "runtime")

        says = outcome_by_the_table(facts)
        seen.add(says)
        if says is None:
            assert view.children.active == {"t": task}, facts
            assert not (turn.tasks or turn.events), facts
            continue
        after = turn.tasks["t"]
        assert after.status is says, facts
        assert after.attempt == (2 if says is QUEUED else 3)
        assert (after.interruptions, after.started_at) == (1, CREATED_AT + 1)
        told = EventType.TASK_RELEASED if says is QUEUED else EventType.TASK_ENDED
        assert turn.events[0].type == told
        assert not turn.effects()
        if says is LOST:
            assert after.failure is not None
            assert (after.failure.kind, after.failure.code) == ("interrupted", "unknown")
            assert after.failure.message
            assert "closing" in after.failure.message
    assert seen == {None, QUEUED, LOST, CANCELLED}, "vacuous"


def test_an_attempt_that_shutdown_took_back_is_not_spent() -> None:
    task = a_launched("t", launch=retrying(2), attempt=2)
    view = a_view(a_flow(), task)

    a_turn(view).take(c.ReleaseTasks(task_ids=("t",), begun=frozenset({"t"})), "runtime")
    a_turn(view).take(c.Recover(), "runtime")

    assert view.children.active["t"].attempt == 2
    assert view.children.active["t"].interruptions == 0


def test_a_child_named_twice_is_released_once() -> None:
    view = a_view(a_flow(), a_launched("t", attempt=2))
    turn = a_turn(view)

    turn.take(c.ReleaseTasks(task_ids=("t", "t", "nobody")), "runtime")

    assert view.children.active["t"].attempt == 1
    assert len(turn.events) == 1


def test_those_that_had_begun_are_told_apart_from_those_that_had_not() -> None:
    once = Launch(function="work", on_restart=OnRestart.LOST)
    view = a_view(a_flow(), a_launched("begun", launch=once), a_launched("not", launch=once))
    turn = a_turn(view)

    turn.take(
        c.ReleaseTasks(task_ids=("begun", "not"), begun=frozenset({"begun", "stranger"})),
        "runtime",
    )

    assert {i: task.status for i, task in turn.tasks.items()} == {"begun": LOST, "not": QUEUED}


def test_a_child_lost_to_shutdown_does_not_end_its_flow() -> None:
    once = Launch(function="work", on_restart=OnRestart.LOST)
    flow = a_flow()
    view = a_view(flow, a_launched("t", launch=once), closing=True)

    a_turn(view).take(c.ReleaseTasks(task_ids=("t",), begun=frozenset({"t"})), "runtime")

    assert view.flow is flow


def test_the_last_child_lost_to_shutdown_under_an_intent_ends_its_flow_as_cancelled() -> None:
    once = Launch(function="work", on_restart=OnRestart.LOST)
    view = a_view(a_flow(intent=True), a_launched("t", launch=once), closing=True)

    a_turn(view).take(c.ReleaseTasks(task_ids=("t",), begun=frozenset({"t"})), "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED


def test_a_queue_deadline_does_not_run_for_a_child_that_has_been_started_once() -> None:
    task = a_launched("t", queue_timeout=1.0, started_at=CREATED_AT + 1)
    view = a_view(a_flow(), task, closing=True)
    a_turn(view).take(c.ReleaseTasks(task_ids=("t",)), "runtime")
    turn = a_turn(view)

    turn.take(c.Tick(), "runtime")

    assert view.children.active["t"].status is QUEUED
    assert not turn.events
