"""Flows that follow one task: made with it, as far as it is, ended by its end, and changed by nobody's hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.effect import StartTask, StopReason, StopTask
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, StoredFlow, SyncMode, has_ended
from flowstead.model.limits import Limits
from flowstead.model.task import (
    Cancelled,
    Failed,
    Launch,
    Lost,
    OnRestart,
    Succeeded,
    TaskStatus,
    TerminalOutcome,
    TimedOut,
)
from flowstead.rules.turn import Turn
from flowstead.rules.view import View
from tests.unit.given import (
    CREATED_AT,
    ENDED,
    NOTHING_TO_PATCH,
    NOW,
    a_draft,
    a_flow,
    a_launched,
    a_linked,
    a_nested,
    a_turn,
    a_view,
    book,
    retrying,
)

PROFILE = settings(deadline=None, derandomize=True, database=None)
WHY = Failure(kind="exception", code="ValueError", message="ValueError: no")

# What the contract says: how a task stands, and how its flow stands then.
TABLE: dict[TaskStatus, FlowStatus] = {
    TaskStatus.QUEUED: FlowStatus.QUEUED,
    TaskStatus.RUNNING: FlowStatus.RUNNING,
    TaskStatus.SUCCEEDED: FlowStatus.SUCCEEDED,
    TaskStatus.FAILED: FlowStatus.FAILED,
    TaskStatus.TIMED_OUT: FlowStatus.FAILED,
    TaskStatus.CANCELLED: FlowStatus.CANCELLED,
    TaskStatus.LOST: FlowStatus.LOST,
}
OUTCOMES: dict[TaskStatus, Any] = {
    TaskStatus.SUCCEEDED: Succeeded(),
    TaskStatus.FAILED: Failed(WHY),
    TaskStatus.TIMED_OUT: TimedOut(WHY),
    TaskStatus.CANCELLED: Cancelled(WHY),
    TaskStatus.LOST: Lost(WHY),
}
EVENTS: dict[FlowStatus, EventType] = {
    FlowStatus.SUCCEEDED: EventType.FLOW_SUCCEEDED,
    FlowStatus.FAILED: EventType.FLOW_FAILED,
    FlowStatus.CANCELLED: EventType.FLOW_CANCELLED,
    FlowStatus.LOST: EventType.FLOW_LOST,
}


def mirrored(status: FlowStatus = FlowStatus.RUNNING, **fields: Any) -> StoredFlow:
    bare = {"sync_mode": SyncMode.TASK_MIRRORED, "controller_id": None, "state_json": UNSET}
    return a_flow(status, **{"wait_json": UNSET, "current_step": None} | bare | fields)


def a_fresh_flow(**fields: Any) -> StoredFlow:
    return mirrored(FlowStatus.QUEUED, revision=0, created_at=NOW, updated_at=NOW, **fields)


def spawned(draft: c.TaskDraft | None = None, **more: Any) -> tuple[View, Turn]:
    draft = a_draft("t", launch=Launch(function="work")) if draft is None else draft
    view = a_view(None, **more)
    turn = a_turn(view)
    turn.take(c.Spawn(draft=a_fresh_flow(), task=draft), "owner")
    return view, turn


def told(turn: Turn) -> list[EventType]:
    return [event.type for event in turn.events]


# ---- the table ------------------------------------------------------------------------------------


def test_the_table_of_this_test_covers_every_status() -> None:
    assert TABLE.keys() == set(TaskStatus)
    assert OUTCOMES.keys() | {TaskStatus.QUEUED, TaskStatus.RUNNING} == set(TaskStatus)


@pytest.mark.parametrize("status", OUTCOMES)
@pytest.mark.parametrize("before", [FlowStatus.QUEUED, FlowStatus.RUNNING])
@pytest.mark.parametrize("linked", [True, False])
def test_the_flow_ends_in_the_same_turn_as_its_task_and_the_way_it_did(
    status: TaskStatus, before: FlowStatus, linked: bool
) -> None:
    active = TaskStatus(before.value)
    task = a_linked("t", active) if linked else a_launched("t")
    view = a_view(mirrored(before), task, running=set() if linked else {"t"})
    turn = a_turn(view, last_seq=4)
    end = c.EndReport(task_id="t", attempt=None if linked else 1, outcome=OUTCOMES[status])

    turn.take(end, "someone")

    flow, ended = view.flow, turn.tasks["t"]
    assert flow is not None
    assert flow.status is TABLE[status]
    assert flow.revision == 8
    assert flow.ended_at == NOW
    assert flow.failure == ended.failure
    assert (flow.failure is None) == (status is TaskStatus.SUCCEEDED)
    assert told(turn) == [EventType.TASK_ENDED, EVENTS[TABLE[status]]]
    assert [(event.seq, event.revision) for event in turn.events] == [(5, 7), (6, 8)]


def test_a_linked_task_takes_its_flow_along_from_its_start_to_its_end() -> None:
    view, first = spawned(a_draft("t"))
    assert view.flow is not None
    standings = [(view.flow.status, view.flow.revision)]
    for command in (
        c.StartReport(task_id="t"),
        c.ProgressReport(task_id="t", summary="half"),
        c.StartReport(task_id="t"),
        c.EndReport(task_id="t", outcome=Succeeded(), result=Raw(b"7")),
        c.EndReport(task_id="t", outcome=Failed(WHY)),
    ):
        a_turn(view).take(command, "owner")
        standings.append((view.flow.status, view.flow.revision))

    assert told(first) == [EventType.FLOW_CREATED, EventType.TASK_CREATED]
    assert standings == [
        (FlowStatus.QUEUED, 0),
        (FlowStatus.RUNNING, 1),
        (FlowStatus.RUNNING, 1),
        (FlowStatus.RUNNING, 1),
        (FlowStatus.SUCCEEDED, 2),
        (FlowStatus.SUCCEEDED, 2),
    ]


def test_a_task_that_is_tried_again_takes_its_flow_back_to_the_queue() -> None:
    view, _ = spawned(a_draft("t", launch=retrying(2)))
    view.running = {"t": 1}
    retried = a_turn(view)

    retried.take(c.EndReport(task_id="t", attempt=1, outcome=Failed(WHY)), "runtime")
    assert view.flow is not None
    between = view.flow
    view.now += 60_000
    due = a_turn(view)
    due.take(c.Tick(), "runtime")

    assert told(retried) == [EventType.TASK_RETRY_SCHEDULED, EventType.FLOW_UPDATED]
    assert (between.status, between.failure, between.ended_at) == (FlowStatus.QUEUED, None, None)
    assert told(due) == [EventType.TASK_STARTED, EventType.FLOW_STARTED]
    assert view.flow.status is FlowStatus.RUNNING


def test_a_task_released_by_a_clean_shutdown_takes_its_flow_back_to_the_queue() -> None:
    view = a_view(mirrored(), a_launched("t"), closing=True)

    a_turn(view).take(c.ReleaseTasks(task_ids=("t",)), "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.QUEUED


def test_a_task_that_is_started_again_after_a_crash_changes_nothing_about_its_flow() -> None:
    flow = mirrored()
    view = a_view(flow, a_launched("t"))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert view.flow is flow
    assert [type(effect) for effect in turn.effects()] == [StartTask]


def test_a_task_that_is_lost_in_a_crash_loses_its_flow() -> None:
    once = Launch(function="work", on_restart=OnRestart.LOST)
    view = a_view(mirrored(), a_launched("t", launch=once))

    a_turn(view).take(c.Recover(), "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.LOST
    assert view.flow.failure is not None
    assert (view.flow.failure.kind, view.flow.failure.code) == ("interrupted", "unknown")


@pytest.mark.parametrize("flow", [FlowStatus.QUEUED, FlowStatus.RUNNING])
def test_an_idle_load_changes_nothing(flow: FlowStatus) -> None:
    stored = mirrored(flow)
    view = a_view(stored, a_linked("t", TaskStatus(flow.value)))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")
    turn.take(c.Tick(), "runtime")
    turn.take(c.Wake(), "runtime")

    assert view.flow is stored
    assert not (turn.events or turn.effects())


# ---- nobody's hand --------------------------------------------------------------------------------

BY_HAND: dict[str, c.Command] = {
    "set_waiting": c.SetWaiting(
        expected_revision=7, patch=NOTHING_TO_PATCH, wait_json=Raw(b"null")
    ),
    "resume": c.Resume(expected_revision=7, patch=NOTHING_TO_PATCH, status=FlowStatus.QUEUED),
    "update": c.Update(expected_revision=7, patch=NOTHING_TO_PATCH),
    "finish": c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH),
    "fail": c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH),
    "request_cancel": c.RequestCancel(expected_revision=7),
    "run_task": c.AddTasks(drafts=(a_draft("another"),)),
    "run_task, launched": c.AddTasks(drafts=(a_draft("x", launch=Launch(function="work")),)),
    "run_task, nested": c.AddTasks(
        drafts=(a_draft("x", launch=a_nested(), child_flow_id="inner-1"),)
    ),
}


@pytest.mark.parametrize("operation", BY_HAND)
@pytest.mark.parametrize("status", FlowStatus)
def test_a_flow_that_follows_its_task_is_not_changed_by_hand(
    operation: str, status: FlowStatus
) -> None:
    flow = mirrored(status)
    tasks = () if status in ENDED else (a_launched("t"),)
    view = a_view(flow, *tasks, running={"t"})
    before = book(view)
    turn = a_turn(view)

    taken = turn.take(BY_HAND[operation], "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.NOT_MANAGED
    assert view.flow is flow
    assert book(view) == before
    assert not (turn.events or turn.effects())


def test_it_can_be_cancelled_and_ends_when_its_code_has() -> None:
    view, _ = spawned()
    view.running = {"t": 1}
    asked = a_turn(view)

    asked.take(c.Cancel(), "owner")
    assert view.flow is not None
    between = view.flow
    a_turn(view).take(c.EndReport(task_id="t", attempt=1, outcome=Cancelled(WHY)), "runtime")

    assert list(asked.effects()) == [StopTask("t", StopReason.CANCELLED)]
    assert between.status is FlowStatus.RUNNING
    assert (between.cancel_requested_at, between.cancel_started_at) == (NOW, NOW)
    assert view.flow.status is FlowStatus.CANCELLED
    assert view.flow.revision == between.revision + 1


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("how", ["flow", "task"])
def test_cancelling_what_has_no_code_here_ends_task_and_flow_at_once(
    linked: bool, how: str
) -> None:
    task = a_linked("t") if linked else a_launched("t", TaskStatus.QUEUED)
    status = FlowStatus.RUNNING if linked else FlowStatus.QUEUED
    view = a_view(mirrored(status), task)
    turn = a_turn(view)

    turn.take(c.Cancel() if how == "flow" else c.CancelTask(task_id="t"), "owner")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED
    assert turn.tasks["t"].status is TaskStatus.CANCELLED
    assert told(turn).count(EventType.FLOW_CANCELLED) == 1


@pytest.mark.parametrize("status", [s for s in OUTCOMES if s is not TaskStatus.CANCELLED])
def test_a_task_that_comes_to_its_own_end_under_a_cancel_keeps_it_and_so_does_its_flow(
    status: TaskStatus,
) -> None:
    view = a_view(mirrored(), a_launched("t", launch=retrying()), running={"t"})
    a_turn(view).take(c.Cancel(), "owner")

    a_turn(view).take(c.EndReport(task_id="t", attempt=1, outcome=OUTCOMES[status]), "runtime")

    assert view.flow is not None
    assert view.flow.status is TABLE[status]
    assert view.flow.cancel_requested_at == NOW


# ---- blocked --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "progress", "summary"),
    [
        ("no budget left", "half", "no budget left"),
        (None, "half", "half"),
        (None, None, None),
    ],
)
def test_a_task_that_ended_without_what_it_was_for_blocks_its_flow(
    terminal: str | None, progress: str | None, summary: str | None
) -> None:
    view = a_view(mirrored(), a_linked("t", progress_summary=progress))
    end = c.EndReport(
        task_id="t",
        outcome=Succeeded(),
        terminal_summary=terminal,
        terminal_outcome=TerminalOutcome.BLOCKED,
    )
    turn = a_turn(view)

    turn.take(end, "owner")

    flow = view.flow
    assert flow is not None
    assert (flow.status, flow.revision, flow.ended_at) == (FlowStatus.BLOCKED, 8, None)
    assert (flow.blocked_task_id, flow.blocked_summary) == ("t", summary)
    assert turn.tasks["t"].status is TaskStatus.SUCCEEDED
    assert told(turn) == [EventType.TASK_ENDED, EventType.FLOW_BLOCKED]


def test_a_flow_blocked_for_good_stays_so_until_its_owner_cancels_it() -> None:
    view = a_view(mirrored(), a_linked("t"))
    blocked = c.EndReport(
        task_id="t", outcome=Succeeded(), terminal_outcome=TerminalOutcome.BLOCKED
    )
    a_turn(view).take(blocked, "owner")
    flow = view.flow
    for command in (c.Recover(), c.Tick(), blocked, c.StartReport(task_id="t")):
        a_turn(view).take(command, "owner")
        assert view.flow is flow

    a_turn(view).take(c.Cancel(), "owner")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED
    assert (view.flow.blocked_task_id, view.flow.blocked_summary) == (None, None)


@pytest.mark.parametrize("answer", ["retry_task", "cancel_task"])
def test_a_review_blocks_the_flow_and_its_answer_lets_it_follow_again(answer: str) -> None:
    view = a_view(mirrored(), a_launched("t", run_id="step"), running={"t"})
    odd = c.EndReport(task_id="t", attempt=1, outcome=Failed(WHY), again=False, review=True)
    a_turn(view).take(odd, "runtime")
    assert view.flow is not None
    blocked = view.flow
    turn = a_turn(view)

    command = c.RetryTask(task_id="t") if answer == "retry_task" else c.CancelTask(task_id="t")
    turn.take(command, "owner")

    assert (blocked.status, blocked.blocked_task_id) == (FlowStatus.BLOCKED, "t")
    assert blocked.revision == 8
    assert view.flow.blocked_task_id is None
    goes_on = FlowStatus.RUNNING if answer == "retry_task" else FlowStatus.CANCELLED
    assert view.flow.status is goes_on


# ---- being made -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [TaskStatus.QUEUED, TaskStatus.RUNNING])
def test_flow_and_linked_task_are_made_together_and_stand_alike(status: TaskStatus) -> None:
    draft = a_draft("t", status=status, run_id="once", started_at=CREATED_AT)
    view = a_view(None)
    turn = a_turn(view)

    taken = turn.take(c.Spawn(draft=a_fresh_flow(), task=draft), "owner")

    flow, task = view.flow, view.children.active["t"]
    assert taken.refusal is None
    assert taken.children == (task,)
    assert taken.flow is flow
    assert flow is not None
    assert (flow.status.value, flow.revision) == (status.value, 0)
    assert task.status is status
    assert (task.flow_id, task.flow_key) == (flow.flow_id, flow.key)
    assert view.children.run_ids == {"once": "t"}
    assert turn.created == {"t"}
    assert [(event.seq, event.revision, event.type) for event in turn.events] == [
        (1, 0, EventType.FLOW_CREATED),
        (2, 0, EventType.TASK_CREATED),
    ]
    assert turn.events[0].changed["status"] == status.value
    assert turn.events[0].changed["syncMode"] == "task_mirrored"
    assert list(turn.effects()) == []


def test_a_launched_task_is_started_in_the_turn_that_makes_it() -> None:
    view, turn = spawned()

    assert view.flow is not None
    assert (view.flow.status, view.flow.revision) == (FlowStatus.RUNNING, 1)
    assert told(turn) == [
        EventType.FLOW_CREATED,
        EventType.TASK_CREATED,
        EventType.TASK_STARTED,
        EventType.FLOW_STARTED,
    ]
    [start] = turn.effects()
    assert isinstance(start, StartTask)
    assert start.task.attempt == 1


def test_while_the_runtime_closes_it_is_made_and_waits() -> None:
    view, turn = spawned(closing=True)

    assert view.flow is not None
    assert view.flow.status is FlowStatus.QUEUED
    assert list(turn.effects()) == []


def test_the_id_of_a_flow_that_is_there_is_refused() -> None:
    flow = a_flow()
    view = a_view(flow)
    turn = a_turn(view)

    taken = turn.take(c.Spawn(draft=a_fresh_flow(), task=a_draft("t")), "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.FLOW_EXISTS
    assert view.flow is flow
    assert not (turn.events or view.children.active)


def test_an_input_that_json_cannot_hold_makes_neither_flow_nor_task() -> None:
    broken = c.Defect(Code.STATE_TOO_LARGE, "input_json takes 9 bytes. Nothing was written.")
    view = a_view(None)
    turn = a_turn(view)

    taken = turn.take(c.Spawn(draft=a_fresh_flow(), task=a_draft("t", input_json=broken)), "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.STATE_TOO_LARGE
    assert view.flow is None
    assert not (turn.events or turn.tasks or view.children.active)


# ---- for good -------------------------------------------------------------------------------------

MOVES = st.sampled_from(
    [
        "start", "progress", "succeed", "block", "fail", "odd", "lose", "retry", "cancel",
        "cancel task", "tick", "load", "release", "later",
    ]
)  # fmt: skip


@given(
    moves=st.lists(MOVES, max_size=14),
    launch=st.sampled_from([None, Launch(function="work"), retrying(2)]),
)
@settings(PROFILE, max_examples=400)
def test_whatever_is_done_the_flow_stands_as_its_task_does_and_its_end_is_final(
    moves: list[str], launch: Launch | None
) -> None:
    view, _ = spawned(a_draft("t", launch=launch), limits=Limits(interruptions=2))
    task = view.children.active["t"]
    view.running = {"t": 1} if launch else {}
    for move in moves:
        before = view.flow
        assert before is not None
        attempt = task.attempt if launch else None
        ends: dict[str, Any] = {
            "succeed": {"outcome": Succeeded()},
            "block": {"outcome": Succeeded(), "terminal_outcome": TerminalOutcome.BLOCKED},
            "fail": {"outcome": Failed(WHY)},
            "odd": {"outcome": Failed(WHY), "again": False, "review": True},
            "lose": {"outcome": Lost(WHY)},
        }
        commands: dict[str, c.Command] = {
            "start": c.StartReport(task_id="t"),
            "progress": c.ProgressReport(task_id="t"),
            "retry": c.RetryTask(task_id="t"),
            "cancel": c.Cancel(),
            "cancel task": c.CancelTask(task_id="t"),
            "tick": c.Tick(),
            "later": c.Tick(),
            "load": c.Recover(),
            "release": c.ReleaseTasks(task_ids=("t",)),
        }
        view.now += 120_000 if move == "later" else 1
        if move in {"load", "release"}:
            view.running = {}
        turn = a_turn(view)
        command = commands.get(move) or c.EndReport(task_id="t", attempt=attempt, **ends[move])
        turn.take(command, "someone")

        task = turn.tasks.get("t", task)
        running = task.status is TaskStatus.RUNNING and launch is not None
        if running and move != "release":
            view.running = {"t": task.attempt}
        flow = view.flow
        assert flow is not None
        if has_ended(before):
            assert flow is before
        if flow.status is FlowStatus.BLOCKED:
            assert flow.blocked_task_id == "t"
            gone_wrong = task.terminal_outcome is TerminalOutcome.BLOCKED
            assert gone_wrong or task.review_requested_at is not None
        elif task.terminal_outcome is not TerminalOutcome.BLOCKED:
            assert flow.status is TABLE[task.status]
            assert has_ended(flow) == (task.ended_at is not None)
        told_of_flow = [event for event in turn.events if event.type.startswith("flow.")]
        assert flow.revision == before.revision + len(told_of_flow)
