"""When something is due, and the rungs of a stop: each at its instant, one after another, none of them twice."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstead.model import command as c
from flowstead.model.effect import (
    AbandonController,
    AbandonTask,
    KillTask,
    StartController,
    StartTask,
    StopController,
    StopReason,
    StopTask,
)
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, StoredFlow, SyncMode
from flowstead.model.limits import Limits
from flowstead.model.task import (
    ACTIVE_TASK_STATUSES,
    Cancelled,
    Failed,
    Launch,
    StoredTask,
    Succeeded,
    TaskStatus,
)
from flowstead.rules.ladder import flow_due_at, task_due_at
from flowstead.rules.view import View
from tests.unit.given import (
    CREATED_AT,
    ENDED,
    LIVE,
    NOTHING_TO_PATCH,
    NOW,
    a_command,
    a_flow,
    a_launched,
    a_linked,
    a_nested,
    a_turn,
    a_view,
    in_review,
    retrying,
    with_fields,
)

PROFILE = settings(deadline=None, derandomize=True, database=None)
LIMITS = Limits(kill_after=5.0, abandon_after=25.0, cancel_grace=60.0, running_children=1)
KILL_MS, ABANDON_MS, GRACE_MS = 5_000, 25_000, 60_000
HOUR_MS = 3_600_000
RUNNING, QUEUED = TaskStatus.RUNNING, TaskStatus.QUEUED


def ticked(view: View, at: int) -> Any:
    """The turn of a tick at an instant."""
    view.now = at
    turn = a_turn(view)
    turn.take(c.Tick(), "runtime")
    return turn


def told(turn: Any) -> list[EventType]:
    return [event.type for event in turn.events]


# ---- what is due when -----------------------------------------------------------------------------


class Row(NamedTuple):
    """All that a child's next due instant may depend on."""

    launch: str  # linked, launched, command, nested
    status: TaskStatus
    started: bool
    pending: bool  # a retry has an instant
    review: bool
    queue_timeout: bool
    asked: bool
    killed: bool


EVERY = [
    Row(*facts)
    for facts in product(
        ("linked", "launched", "command", "nested"),
        TaskStatus,
        *[(False, True)] * 6,
    )
]


def child(row: Row) -> StoredTask:
    launches = {"launched": Launch(function="work"), "command": a_command(), "nested": a_nested()}
    fields: dict[str, Any] = {
        "started_at": NOW - 900 if row.started else None,
        "next_attempt_at": NOW + 70 if row.pending else None,
        "review_requested_at": NOW - 90 if row.review else None,
        "queue_timeout": 120.5 if row.queue_timeout else None,
        "cancel_requested_at": NOW - 80 if row.asked else None,
        "kill_requested_at": NOW - 60 if row.killed else None,
        "ended_at": None if row.status in ACTIVE_TASK_STATUSES else NOW - 1,
        "child_flow_id": "inner-1" if row.launch == "nested" else None,
    }
    if row.launch == "linked":
        return a_linked("t", row.status, **fields)
    return a_launched("t", row.status, launch=launches[row.launch], **fields)


def due_by_the_table(row: Row) -> int | None:
    if row.launch == "linked" or row.status not in ACTIVE_TASK_STATUSES or row.review:
        return None
    waiting = {
        # pending, queue_timeout and never started
        (True, True): NOW + 70,
        (True, False): NOW + 70,
        (False, True): CREATED_AT + 120_500,
        (False, False): None,
    }
    stopping = {
        # asked, killed
        (False, False): None,
        (False, True): None,
        (True, False): NOW - 80 + KILL_MS,
        (True, True): NOW - 60 + ABANDON_MS,
    }
    if row.status is QUEUED:
        return waiting[row.pending, row.queue_timeout and not row.started]
    return None if row.launch == "nested" else stopping[row.asked, row.killed]


def test_every_child_is_due_when_the_table_says_and_no_other_time() -> None:
    seen = set()
    for row in EVERY:
        due = task_due_at(child(row), LIMITS)
        assert due == due_by_the_table(row), row
        seen.add(due)

    assert len(seen) == 5, "vacuous"


def test_a_tick_does_nothing_before_the_instant_and_what_is_due_at_it() -> None:
    acted = 0
    for row in EVERY:
        due = due_by_the_table(row)
        if due is None or row.status not in ACTIVE_TASK_STATUSES:
            continue
        if row.launch != "linked" and row.status is QUEUED and (row.asked or row.killed):
            continue  # what has no code is not asked to stop, it ends
        view = a_view(a_flow(), child(row), running={"t"}, limits=LIMITS)

        early, at_last = ticked(view, due - 1), ticked(view, due)

        assert not (early.events or early.tasks or early.effects()), row
        assert at_last.events, row
        after = view.children.active.get("t")
        assert after is None or (task_due_at(after, LIMITS) or due + 1) > due, "due for ever"
        acted += 1
    assert acted > 10, "vacuous"


@pytest.mark.parametrize("seconds", [0.001, 0.0004, 0.5, 90_000.25, 10 * 365 * 24 * 3600])
def test_an_instant_is_a_whole_number_of_milliseconds(seconds: float) -> None:
    waits = a_launched("t", QUEUED, queue_timeout=seconds)
    asked = a_launched("t", cancel_requested_at=NOW)
    limits = Limits(kill_after=seconds, abandon_after=seconds, cancel_grace=seconds)

    instants = [
        task_due_at(waits, limits),
        task_due_at(asked, limits),
        task_due_at(with_fields(asked, kill_requested_at=NOW), limits),
        flow_due_at(a_flow(intent=True), limits),
        flow_due_at(a_flow(intent=True, cancel_started_at=NOW), limits),
    ]

    for at in instants:
        assert type(at) is int
        assert 0 < at < 2**63


@pytest.mark.parametrize("status", [*LIVE, *ENDED])
@pytest.mark.parametrize("mode", SyncMode)
def test_a_flow_is_due_while_an_intent_stands_and_it_has_not_ended(
    status: FlowStatus, mode: SyncMode
) -> None:
    calm = a_flow(status, sync_mode=mode)
    asked = a_flow(status, sync_mode=mode, intent=True)
    demanded = a_flow(status, sync_mode=mode, intent=True, cancel_started_at=NOW - 10)

    assert flow_due_at(calm, LIMITS) is None
    if status in ENDED:
        assert flow_due_at(asked, LIMITS) is flow_due_at(demanded, LIMITS) is None
    else:
        assert flow_due_at(asked, LIMITS) == NOW - 1_000 + GRACE_MS
        assert flow_due_at(demanded, LIMITS) == NOW - 10 + KILL_MS + ABANDON_MS


# ---- the climb ------------------------------------------------------------------------------------

CANCEL = c.Cancel()
STOPS: dict[str, c.Command] = {
    "cancel": CANCEL,
    "cancel_task": c.CancelTask(task_id="t"),
    "finish": c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH),
    "fail": c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH),
}
LAUNCHES = {"code": Launch(function="work"), "command": a_command(), "retrying": retrying(9)}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_child_that_will_not_stop_climbs_rung_by_rung_and_is_given_up(
    stop: str, launch: str
) -> None:
    view = a_view(a_flow(), a_launched("t", launch=LAUNCHES[launch]), running={"t"}, limits=LIMITS)
    asked = a_turn(view)
    asked.take(STOPS[stop], "owner")
    reason = StopReason.FLOW_ENDED if stop in {"finish", "fail"} else StopReason.CANCELLED

    nothing = [ticked(view, NOW + 1), ticked(view, NOW + KILL_MS - 1)]
    killed = ticked(view, NOW + KILL_MS)
    nothing += [ticked(view, NOW + KILL_MS), ticked(view, NOW + KILL_MS + ABANDON_MS - 1)]
    between = view.children.active["t"]
    abandoned = ticked(view, NOW + KILL_MS + ABANDON_MS)
    nothing += [ticked(view, NOW + KILL_MS + ABANDON_MS), ticked(view, NOW + HOUR_MS)]

    assert list(asked.effects()) == [StopTask("t", reason)]
    assert asked.tasks["t"].cancel_requested_at == NOW
    assert list(killed.effects()) == [KillTask("t")]
    assert told(killed) == [EventType.TASK_KILL_REQUESTED]
    assert killed.events[0].changed == {"killRequestedAt": NOW + KILL_MS}
    assert (between.status, between.attempt) == (RUNNING, 1)
    assert (between.cancel_requested_at, between.kill_requested_at) == (NOW, NOW + KILL_MS)
    assert list(abandoned.effects()) == [AbandonTask("t")]
    assert told(abandoned)[0] is EventType.TASK_ENDED
    for turn in nothing:
        assert not (turn.events or turn.tasks or turn.effects())
    gone = abandoned.tasks["t"]
    assert gone.status is TaskStatus.CANCELLED
    assert gone.failure is not None
    assert gone.failure.kind == "abandoned"
    assert gone.failure.message
    assert gone.ended_at == NOW + KILL_MS + ABANDON_MS
    assert (gone.cancel_requested_at, gone.kill_requested_at) == (NOW, NOW + KILL_MS)


def test_giving_up_the_last_child_ends_a_cancelled_flow_in_the_same_turn() -> None:
    view = a_view(a_flow(), a_launched("t"), running={"t"}, limits=LIMITS)
    a_turn(view).take(CANCEL, "owner")

    ticked(view, NOW + KILL_MS)
    turn = ticked(view, NOW + KILL_MS + ABANDON_MS)

    assert told(turn) == [EventType.TASK_ENDED, EventType.FLOW_CANCELLED]
    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED


@pytest.mark.parametrize("stop", ["finish", "fail"])
def test_the_climb_goes_on_in_a_flow_that_has_ended_and_leaves_it_as_it_is(stop: str) -> None:
    view = a_view(a_flow(), a_launched("t"), running={"t"}, limits=LIMITS)
    a_turn(view).take(STOPS[stop], "owner")
    flow = view.flow

    ticked(view, NOW + KILL_MS)
    ticked(view, NOW + KILL_MS + ABANDON_MS)

    assert view.flow is flow
    assert not view.children.active


def test_a_child_given_up_alone_makes_room_for_the_next_and_its_flow_goes_on() -> None:
    waiting = a_launched("next", QUEUED)
    view = a_view(
        a_flow(), a_launched("t"), waiting, running={"t"}, lined_up=["next"], limits=LIMITS
    )
    flow = view.flow
    a_turn(view).take(c.CancelTask(task_id="t"), "owner")

    ticked(view, NOW + KILL_MS)
    assert view.children.active["next"].status is QUEUED
    ticked(view, NOW + KILL_MS + ABANDON_MS)

    assert view.children.active["next"].status is RUNNING
    assert view.flow is flow


def test_a_request_to_cancel_stops_nobody_and_so_nobody_climbs() -> None:
    view = a_view(a_flow(), a_launched("t"), running={"t"}, limits=LIMITS)
    asked = a_turn(view)
    asked.take(c.RequestCancel(expected_revision=7), "owner")

    later = ticked(view, NOW + HOUR_MS)

    assert view.children.active["t"].cancel_requested_at is None
    assert not (later.events or later.effects())


@pytest.mark.parametrize("late_by", [0, 1, HOUR_MS, 1000 * HOUR_MS])
def test_a_tick_that_comes_late_climbs_one_rung_and_the_next_one_has_its_whole_time(
    late_by: int,
) -> None:
    view = a_view(a_flow(), a_launched("t"), running={"t"}, limits=LIMITS)
    a_turn(view).take(CANCEL, "owner")
    at = NOW + KILL_MS + late_by

    killed, again = ticked(view, at), ticked(view, at)

    assert list(killed.effects()) == [KillTask("t")]
    assert not again.effects()
    assert task_due_at(view.children.active["t"], LIMITS) == at + ABANDON_MS


def test_asking_a_child_a_second_time_to_stop_does_not_give_it_more_time() -> None:
    view = a_view(a_flow(), a_launched("t"), running={"t"}, limits=LIMITS)
    a_turn(view).take(c.CancelTask(task_id="t"), "owner")
    view.now = NOW + KILL_MS - 1

    a_turn(view).take(c.CancelTask(task_id="t"), "owner")
    a_turn(view).take(CANCEL, "owner")

    assert task_due_at(view.children.active["t"], LIMITS) == NOW + KILL_MS


def test_a_clock_set_back_takes_no_rung_back_and_climbs_none_early() -> None:
    view = a_view(a_flow(), a_launched("t"), running={"t"}, limits=LIMITS)
    a_turn(view).take(CANCEL, "owner")
    ticked(view, NOW + KILL_MS)

    early = ticked(view, NOW - HOUR_MS)

    assert not (early.events or early.effects())
    assert view.children.active["t"].kill_requested_at == NOW + KILL_MS


@pytest.mark.parametrize("rung", ["asked", "killed", "abandoned"])
@pytest.mark.parametrize(
    "outcome",
    [
        Succeeded(),
        Failed(Failure(kind="exception")),
        Cancelled(Failure(kind="cancelled")),
    ],
    ids=lambda outcome: type(outcome).__name__,
)
def test_an_end_on_any_rung_is_the_childs_own_and_after_the_last_it_is_nobodys(
    rung: str, outcome: Any
) -> None:
    launch = retrying(9)
    view = a_view(a_flow(), a_launched("t", launch=launch), running={"t"}, limits=LIMITS)
    a_turn(view).take(CANCEL, "owner")
    if rung != "asked":
        ticked(view, NOW + KILL_MS)
    if rung == "abandoned":
        ticked(view, NOW + KILL_MS + ABANDON_MS)
    flow = view.flow
    end = a_turn(view)

    end.take(c.EndReport(task_id="t", attempt=1, outcome=outcome), "runtime")
    later = ticked(view, NOW + HOUR_MS)

    if rung == "abandoned":
        assert view.flow is flow
        assert not (end.events or end.tasks)
    else:
        assert end.tasks["t"].status == type(outcome).__struct_config__.tag
        assert told(end) == [EventType.TASK_ENDED, EventType.FLOW_CANCELLED]
    assert not (later.events or later.effects())


@pytest.mark.parametrize("stop", STOPS)
def test_a_child_that_stands_for_a_flow_does_not_climb_its_flow_does(stop: str) -> None:
    nested = a_launched("t", launch=a_nested(), child_flow_id="inner-1")
    view = a_view(a_flow(), nested, running={"t"}, limits=LIMITS)
    a_turn(view).take(STOPS[stop], "owner")
    asked = view.children.active["t"]

    for at in (NOW + KILL_MS, NOW + KILL_MS + ABANDON_MS, NOW + 1000 * HOUR_MS):
        turn = ticked(view, at)
        assert AbandonTask("t") not in turn.effects()
        assert KillTask("t") not in turn.effects()

    assert asked.cancel_requested_at == NOW
    assert view.children.active["t"] == asked


def test_children_climb_each_by_its_own_clock() -> None:
    view = a_view(a_flow(), a_launched("a"), a_launched("b"), running={"a", "b"}, limits=LIMITS)
    a_turn(view).take(c.CancelTask(task_id="a"), "owner")
    view.now = NOW + 2_000
    a_turn(view).take(c.CancelTask(task_id="b"), "owner")

    effects = [
        list(ticked(view, NOW + seconds * 1_000).effects()) for seconds in (5, 6, 7, 29, 30, 32)
    ]

    assert effects == [
        [KillTask("a")],
        [],
        [KillTask("b")],
        [],
        [AbandonTask("a")],
        [AbandonTask("b")],
    ]


def left_behind(**fields: Any) -> View:
    """A program that was being stopped when its process died."""
    task = a_launched("t", launch=a_command(), cancel_requested_at=NOW - 3_000, **fields)
    flow = a_flow(intent=True, cancel_started_at=NOW - 3_000)
    return a_view(flow, task, limits=LIMITS)


def test_nobody_climbs_before_somebody_has_looked_for_what_a_crash_left_of_the_child() -> None:
    for fields in ({}, {"kill_requested_at": NOW - 1_000}):
        view = left_behind(**fields)

        unseen = ticked(view, NOW + HOUR_MS)
        a_turn(view).take(c.Recover(), "runtime")
        same_turn = ticked(view, NOW + HOUR_MS)

        assert not (unseen.events or unseen.effects())
        assert not (same_turn.events or same_turn.effects())


def test_a_child_that_nobody_here_can_look_for_is_given_up_by_the_clock() -> None:
    view = left_behind()
    view.executors = frozenset[str]()
    a_turn(view).take(c.Recover(), "runtime")

    killed, abandoned = (
        ticked(view, NOW - 3_000 + KILL_MS),
        ticked(view, NOW - 3_000 + KILL_MS + ABANDON_MS),
    )

    assert list(killed.effects()) == [KillTask("t")]
    assert list(abandoned.effects()) == [AbandonTask("t")]


def test_after_a_crash_the_climb_goes_on_from_the_rung_on_record() -> None:
    view = left_behind()
    a_turn(view).take(c.Recover(), "runtime")
    view.running = {"t": 1}
    at = NOW - 3_000 + KILL_MS

    early, killed = ticked(view, at - 1), ticked(view, at)

    assert not early.effects()
    assert list(killed.effects()) == [KillTask("t")]
    assert task_due_at(view.children.active["t"], LIMITS) == at + ABANDON_MS


def test_the_last_rung_begins_anew_for_what_a_crash_left_there() -> None:
    view = left_behind(kill_requested_at=NOW - HOUR_MS)
    loaded = a_turn(view)

    loaded.take(c.Recover(), "runtime")
    view.running = {"t": 1}
    early, given_up = ticked(view, NOW + ABANDON_MS - 1), ticked(view, NOW + ABANDON_MS)

    assert view.flow is not None
    assert told(loaded) == [EventType.TASK_KILL_REQUESTED]
    assert loaded.tasks["t"].kill_requested_at == NOW
    assert not early.effects()
    assert list(given_up.effects()) == [AbandonTask("t")]


waits = st.integers(0, 40_000)


@given(moves=st.lists(st.tuples(st.sampled_from(["tick", "stop", "end"]), waits), max_size=30))
@settings(PROFILE, max_examples=300)
def test_however_time_goes_rungs_only_climb_and_none_is_reached_too_soon(
    moves: list[tuple[str, int]],
) -> None:
    view = a_view(a_flow(), a_launched("t"), running={"t"}, limits=LIMITS)
    events = []
    for move, wait in moves:
        view.now += wait
        commands: dict[str, c.Command] = {
            "tick": c.Tick(),
            "stop": c.CancelTask(task_id="t"),
            "end": c.EndReport(task_id="t", attempt=1, outcome=Succeeded()),
        }
        turn = a_turn(view)
        turn.take(commands[move], "someone")
        events += turn.events

    rungs = [EventType.TASK_CANCEL_REQUESTED, EventType.TASK_KILL_REQUESTED, EventType.TASK_ENDED]
    climbed = [event for event in events if event.type in rungs]
    assert [event.type for event in climbed if event.type is not EventType.TASK_ENDED] == rungs[
        : sum(event.type is not EventType.TASK_ENDED for event in climbed)
    ]
    assert sum(event.type is EventType.TASK_ENDED for event in climbed) <= 1
    for before, after in pairwise(climbed):
        if after.type is EventType.TASK_KILL_REQUESTED:
            assert after.at - before.at >= KILL_MS
        if after.type is EventType.TASK_ENDED and after.changed["status"] == "cancelled":
            assert before.type is EventType.TASK_KILL_REQUESTED
            assert after.at - before.at >= ABANDON_MS


# ---- the controller's rungs -----------------------------------------------------------------------


def driven(**fields: Any) -> View:
    return a_view(a_flow(**fields), driven=True, controllers={"triage"}, limits=LIMITS)


def test_a_controller_is_stopped_when_the_grace_of_a_request_is_over_and_later_given_up() -> None:
    view = driven()
    a_turn(view).take(c.RequestCancel(expected_revision=7), "owner")
    at = NOW + GRACE_MS

    early, stopped = ticked(view, at - 1), ticked(view, at)
    between = view.flow
    not_yet = ticked(view, at + KILL_MS + ABANDON_MS - 1)
    given_up = ticked(view, at + KILL_MS + ABANDON_MS)
    view.driven = False
    end = a_turn(view)
    end.take(c.ControllerStopped(), "runtime")

    assert not (early.effects() or early.events)
    assert list(stopped.effects()) == [StopController()]
    assert told(stopped) == [EventType.FLOW_CANCEL_STARTED]
    assert between is not None
    assert (between.revision, between.cancel_started_at) == (9, at)
    assert not (not_yet.effects() or not_yet.events)
    assert list(given_up.effects()) == [AbandonController()]
    assert not given_up.events
    assert told(end) == [EventType.FLOW_CANCELLED]


@pytest.mark.parametrize("grace", [1.0, 29.0, 31.0, 60.0, 3600.0])
def test_a_controller_that_ignores_a_cancel_is_given_up_whatever_the_grace_of_requests(
    grace: float,
) -> None:
    limits = Limits(kill_after=5.0, abandon_after=25.0, cancel_grace=grace)
    view = a_view(a_flow(), driven=True, limits=limits)
    asked = a_turn(view)
    asked.take(CANCEL, "owner")
    assert view.flow is not None
    at = flow_due_at(view.flow, limits)

    assert list(asked.effects()) == [StopController()]
    assert at == NOW + KILL_MS + ABANDON_MS
    assert not ticked(view, at - 1).effects()
    assert list(ticked(view, at).effects()) == [AbandonController()]


def test_a_controller_is_not_given_up_while_children_are_left_but_with_the_last_of_them() -> None:
    view = a_view(a_flow(), a_linked("l"), a_launched("t"), driven=True, limits=LIMITS)
    view.running = {"t": 1}
    a_turn(view).take(CANCEL, "owner")
    at = NOW + KILL_MS + ABANDON_MS

    ticked(view, NOW + KILL_MS)
    turn = ticked(view, at)

    assert list(turn.effects()) == [AbandonTask("t"), AbandonController()]


def test_a_flow_is_never_ended_over_the_head_of_a_controller_that_still_counts() -> None:
    view = driven()
    a_turn(view).take(CANCEL, "owner")

    ticked(view, NOW + 1000 * HOUR_MS)

    assert view.flow is not None
    assert view.flow.ended_at is None


def test_a_controller_that_was_given_up_is_not_entered_again() -> None:
    view = driven(intent=True, cancel_started_at=NOW - 10)
    view.driven = False
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")
    turn.take(c.ControllerStopped(), "runtime")

    assert not any(isinstance(effect, StartController) for effect in turn.effects())


# ---- queue deadlines ------------------------------------------------------------------------------

DEADLINE = CREATED_AT + 90_000


def waiting(**fields: Any) -> StoredTask:
    return a_launched("t", QUEUED, **{"queue_timeout": 90.0} | fields)


def full(task: StoredTask, flow: StoredFlow | None = None) -> View:
    """A flow whose one place is taken, and a child in line."""
    busy = a_launched("busy")
    return a_view(flow or a_flow(), busy, task, running={"busy"}, lined_up=["t"], limits=LIMITS)


def test_a_child_that_was_never_started_in_time_is_timed_out_and_says_so() -> None:
    view = full(waiting(launch=retrying(9)))

    early, late = ticked(view, DEADLINE - 1), ticked(view, DEADLINE)

    assert not early.events
    ended = late.tasks["t"]
    assert ended.status is TaskStatus.TIMED_OUT
    assert ended.failure == Failure(
        kind="timed_out", code="queue", message="not started within 90 s"
    )
    assert (ended.attempt, ended.started_at, ended.next_attempt_at) == (0, None, None)
    assert told(late) == [EventType.TASK_ENDED]
    assert not late.effects()


def test_a_child_that_fell_out_of_line_is_passed_over_and_the_next_one_starts() -> None:
    view = full(waiting())
    view.children.put(a_launched("next", QUEUED))
    view.children.line_up("next")
    ticked(view, DEADLINE)
    turn = a_turn(view)

    turn.take(c.EndReport(task_id="busy", attempt=1, outcome=Succeeded()), "runtime")

    assert view.children.active["next"].status is RUNNING


@pytest.mark.parametrize("late_by", [-1, 0, HOUR_MS])
@pytest.mark.parametrize("how", ["tick", "recover", "alone"])
def test_a_place_that_comes_free_in_time_saves_the_child_and_one_that_comes_late_does_not(
    late_by: int, how: str
) -> None:
    view = full(waiting())
    view.children.put(a_launched("next", QUEUED))
    view.children.line_up("next")
    view.now = DEADLINE + late_by
    turn = a_turn(view)

    turn.take(c.EndReport(task_id="busy", attempt=1, outcome=Succeeded()), "runtime")
    if how != "alone":
        turn.take(c.Tick() if how == "tick" else c.Recover(), "runtime")

    in_time = late_by < 0
    assert turn.tasks["t"].status is (RUNNING if in_time else TaskStatus.TIMED_OUT)
    assert view.children.active["next"].status is (QUEUED if in_time else RUNNING)
    started = [effect.task.task_id for effect in turn.effects() if isinstance(effect, StartTask)]
    assert started == (["t"] if in_time else ["next"])


class Ledger:
    """Room for everybody, and a note of who took some."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def take(self, task: StoredTask) -> bool:
        self.taken.append(task.task_id)
        return True


def test_a_child_that_is_too_late_takes_no_slot_of_the_runtime() -> None:
    room = Ledger()
    view = a_view(
        a_flow(),
        waiting(),
        a_launched("next", QUEUED),
        lined_up=["t", "next"],
        now=DEADLINE,
        limits=LIMITS,
        room=room,
    )

    a_turn(view).take(c.Wake(), "runtime")

    assert room.taken == ["next"]
    assert list(view.children.active) == ["next"]


@pytest.mark.parametrize(
    "fields",
    [
        {"started_at": CREATED_AT + 1, "attempt": 0},
        {"started_at": CREATED_AT + 1, "attempt": 1, "next_attempt_at": NOW + HOUR_MS},
        {"started_at": CREATED_AT + 1, "attempt": 1, "review_requested_at": NOW},
        {"queue_timeout": None},
    ],
    ids=["released", "waits for a retry", "in review", "no deadline"],
)
def test_only_the_wait_for_the_first_start_is_bounded(fields: dict[str, Any]) -> None:
    view = full(waiting(**fields))

    later = ticked(view, DEADLINE + 1)

    assert "t" not in later.tasks
    assert view.children.active["t"].status is QUEUED


def test_a_linked_childs_wait_is_not_ours_to_bound() -> None:
    view = a_view(a_flow(), a_linked("t", QUEUED, queue_timeout=1.0), limits=LIMITS)

    assert not ticked(view, NOW + HOUR_MS).events


def test_the_deadline_of_a_queue_holds_over_a_restart_and_where_the_function_is_unknown() -> None:
    unknown = waiting(launch=Launch(function="elsewhere"))
    view = a_view(a_flow(), unknown, now=DEADLINE, limits=LIMITS)
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")
    turn.take(c.Tick(), "runtime")

    assert turn.tasks["t"].status is TaskStatus.TIMED_OUT


def test_a_flow_that_only_follows_its_task_fails_with_the_deadline() -> None:
    flow = a_flow(FlowStatus.QUEUED, sync_mode=SyncMode.TASK_MIRRORED, controller_id=None)
    view = a_view(flow, waiting(), limits=LIMITS)

    turn = ticked(view, DEADLINE)

    assert view.flow is not None
    assert view.flow.status is FlowStatus.FAILED
    assert view.flow.failure == turn.tasks["t"].failure


def test_what_a_person_has_to_look_at_is_never_due() -> None:
    reviewed = in_review("t", launch=retrying(), next_attempt_at=None, queue_timeout=1.0)
    view = a_view(a_flow(FlowStatus.BLOCKED, blocked_task_id="t"), reviewed, now=NOW, limits=LIMITS)

    later = ticked(view, NOW + 1000 * HOUR_MS)

    assert task_due_at(reviewed, LIMITS) is None
    assert not (later.events or later.effects())
