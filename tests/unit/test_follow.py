"""What follows from a change: queued children start, cancels conclude, and ended flows leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from flowstead.model import command as c
from flowstead.model.effect import StartTask, StopController, StopReason, StopTask
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus
from flowstead.model.limits import Limits
from flowstead.model.task import Cancelled, Failed, Launch, StoredTask, Succeeded, TaskStatus
from flowstead.rules.ladder import flow_due_at
from tests.unit.given import (
    ENDED,
    LIVE,
    NOTHING_TO_PATCH,
    NOW,
    a_draft,
    a_flow,
    a_launched,
    a_linked,
    a_turn,
    a_view,
    retrying,
)

LIMITS = Limits(cancel_grace=60.0)
GRACE_MS = 60_000
FAILED = Failed(Failure(kind="exception", message="ValueError: no"))
STOPPED = Cancelled(Failure(kind="cancelled", message="stopped on request"))


def launch_of(group: str | None = None, limit: int | None = None) -> Launch:
    return Launch(function="work", group=group, limit=limit)


def started(turn: Any) -> list[str]:
    return [effect.task.task_id for effect in turn.effects() if isinstance(effect, StartTask)]


def stopped(turn: Any) -> list[str]:
    return [effect.task_id for effect in turn.effects() if isinstance(effect, StopTask)]


def ended(task_id: str, outcome: Any = None, attempt: int | None = 1) -> c.EndReport:
    return c.EndReport(task_id=task_id, outcome=outcome or Succeeded(), attempt=attempt)


def queued_children(count: int, launch: Launch | None = None) -> list[StoredTask]:
    return [a_launched(f"q{n}", TaskStatus.QUEUED, launch=launch) for n in range(count)]


# ---- the intent -----------------------------------------------------------------------------------


def test_requesting_cancel_ends_queued_children_and_lets_running_ones_go_on() -> None:
    queued = queued_children(3)
    view = a_view(
        a_flow(),
        a_launched("running"),
        a_linked("linked"),
        a_linked("linked, queued", TaskStatus.QUEUED),
        *queued,
        running={"running"},
        lined_up=[task.task_id for task in queued],
    )
    turn = a_turn(view)

    turn.take(c.RequestCancel(expected_revision=7), "owner")

    assert sorted(view.children.active) == ["linked", "running"]
    assert {task.status for task in turn.tasks.values()} == {TaskStatus.CANCELLED}
    assert len(turn.tasks) == 4
    assert list(turn.effects()) == []
    assert view.flow is not None
    assert view.flow.status is FlowStatus.RUNNING
    assert view.flow.revision == 8


@pytest.mark.parametrize("status", LIVE)
def test_a_requested_cancel_concludes_with_the_last_running_child(status: FlowStatus) -> None:
    view = a_view(a_flow(status), a_launched("a"), a_linked("b"), running={"a"})
    turn = a_turn(view)
    turn.take(c.RequestCancel(expected_revision=7), "owner")

    turn.take(ended("a"), "runtime")
    assert view.flow is not None
    between = view.flow.status
    turn.take(ended("b", FAILED, attempt=None), "owner")

    assert between is status
    assert view.flow.status is FlowStatus.CANCELLED
    assert view.flow.revision == 9
    assert view.flow.ended_at == NOW
    assert turn.tasks["a"].status is TaskStatus.SUCCEEDED
    assert turn.tasks["b"].status is TaskStatus.FAILED


def test_a_failed_child_is_not_retried_once_cancel_was_requested() -> None:
    view = a_view(a_flow(intent=True), a_launched("a", launch=retrying()), running={"a"})
    turn = a_turn(view)

    turn.take(ended("a", FAILED), "runtime")

    assert turn.tasks["a"].status is TaskStatus.FAILED
    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED


@pytest.mark.parametrize("status", LIVE)
def test_the_intent_alone_does_not_end_a_flow_that_has_no_child(status: FlowStatus) -> None:
    view = a_view(a_flow(status), limits=LIMITS)
    turn = a_turn(view)

    turn.take(c.RequestCancel(expected_revision=7), "owner")
    view.now += GRACE_MS - 1
    turn.take(c.Tick(), "runtime")
    turn.take(c.Recover(), "runtime")
    turn.take(c.Update(expected_revision=8, patch=NOTHING_TO_PATCH), "owner")

    assert view.flow is not None
    assert view.flow.status is status
    assert flow_due_at(view.flow, LIMITS) == NOW + GRACE_MS


@pytest.mark.parametrize("status", LIVE)
@pytest.mark.parametrize("command", [c.Tick(), c.Recover()], ids=["tick", "load"])
def test_a_requested_cancel_past_its_grace_ends_the_flow(
    status: FlowStatus, command: c.Command
) -> None:
    view = a_view(a_flow(status), limits=LIMITS)
    turn = a_turn(view)
    turn.take(c.RequestCancel(expected_revision=7), "owner")

    view.now += GRACE_MS
    turn.take(command, "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED
    assert flow_due_at(view.flow, LIMITS) is None


@pytest.mark.parametrize("status", LIVE)
def test_cancel_ends_a_flow_with_nothing_running_at_once(status: FlowStatus) -> None:
    view = a_view(a_flow(status))
    turn = a_turn(view)

    turn.take(c.Cancel(), "owner")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED
    assert [event.type for event in turn.events] == [
        EventType.FLOW_CANCEL_REQUESTED,
        EventType.FLOW_CANCELLED,
    ]
    assert [event.revision for event in turn.events] == [8, 9]


def test_the_grace_never_ends_a_flow_whose_children_still_run() -> None:
    view = a_view(a_flow(), a_launched("a"), running={"a"}, limits=LIMITS)
    turn = a_turn(view)
    turn.take(c.RequestCancel(expected_revision=7), "owner")

    view.now += 10 * GRACE_MS
    turn.take(c.Tick(), "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.RUNNING
    assert list(view.children.active) == ["a"]


def test_a_controller_may_end_its_flow_honestly_after_the_last_child_has_gone() -> None:
    view = a_view(a_flow(), a_launched("a"), running={"a"}, driven=True)
    turn = a_turn(view)
    turn.take(c.RequestCancel(expected_revision=7), "owner")

    turn.take(ended("a"), "runtime")
    assert view.flow is not None
    between = view.flow.status
    view.driven = False
    turn.take(c.Finish(expected_revision=None, patch=NOTHING_TO_PATCH), "runtime")

    assert between is FlowStatus.RUNNING
    assert view.flow.status is FlowStatus.SUCCEEDED
    assert view.flow.cancel_requested_at == NOW


def test_a_controller_that_stops_under_an_intent_leaves_a_cancelled_flow() -> None:
    view = a_view(a_flow(intent=True), driven=False)

    a_turn(view).take(c.ControllerStopped(), "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED


def test_a_controller_that_stops_without_an_intent_changes_nothing() -> None:
    flow = a_flow()
    view = a_view(flow)
    turn = a_turn(view)

    turn.take(c.ControllerStopped(), "runtime")

    assert view.flow is flow
    assert not turn.events


def test_a_controller_past_the_grace_is_stopped_and_then_the_flow_ends() -> None:
    view = a_view(a_flow(), driven=True, limits=LIMITS)
    turn = a_turn(view)
    turn.take(c.RequestCancel(expected_revision=7), "owner")
    assert list(turn.effects()) == []

    view.now += GRACE_MS
    turn.take(c.Tick(), "runtime")
    effects = list(turn.effects())
    view.driven = False
    turn.take(c.ControllerStopped(), "runtime")

    assert effects == [StopController()]
    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED


def test_cancel_waits_for_running_code_and_for_the_controller() -> None:
    view = a_view(a_flow(), a_launched("a"), running={"a"}, driven=True)
    turn = a_turn(view)

    turn.take(c.Cancel(), "owner")
    assert list(turn.effects()) == [StopTask("a", StopReason.CANCELLED), StopController()]
    view.driven = False
    turn.take(c.ControllerStopped(), "runtime")
    assert view.flow is not None
    between = view.flow.status
    turn.take(ended("a", STOPPED), "runtime")

    assert between is FlowStatus.RUNNING
    assert view.flow.status is FlowStatus.CANCELLED


def test_cancel_marks_linked_and_queued_children_cancelled_at_once() -> None:
    view = a_view(a_flow(), a_linked("l"), *queued_children(2), lined_up=["q0", "q1"])
    turn = a_turn(view)

    turn.take(c.Cancel(), "owner")

    assert {i: t.status.value for i, t in turn.tasks.items()} == {
        "l": "cancelled",
        "q0": "cancelled",
        "q1": "cancelled",
    }
    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED


def test_a_child_that_succeeded_while_cancel_waited_stays_succeeded() -> None:
    view = a_view(a_flow(), a_launched("a"), running={"a"})
    turn = a_turn(view)
    turn.take(c.Cancel(), "owner")

    turn.take(ended("a", Succeeded()), "runtime")

    assert turn.tasks["a"].status is TaskStatus.SUCCEEDED
    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED


def test_a_late_result_of_a_cancelled_child_is_dropped() -> None:
    view = a_view(a_flow(), a_linked("l"), a_launched("cut off"))
    turn = a_turn(view)
    turn.take(c.Cancel(), "owner")
    events, tasks = list(turn.events), dict(turn.tasks)

    turn.take(ended("l", attempt=None), "owner")
    turn.take(ended("cut off"), "runtime")

    assert turn.events == events
    assert turn.tasks == tasks


def test_the_result_of_an_older_attempt_cannot_speak_for_a_newer_one() -> None:
    view = a_view(a_flow(), a_launched("a", attempt=2), running={"a"})
    turn = a_turn(view)

    turn.take(ended("a", attempt=1), "runtime")

    assert not (turn.events or turn.tasks)
    assert view.children.active["a"].status is TaskStatus.RUNNING


# What is queued has no code that could still end it, even where the engine has not let go of its last
# attempt yet: the attempt's end and the command after it come in one turn.


@pytest.mark.parametrize("command", [c.Cancel(), c.CancelTask(task_id="a")], ids=["flow", "task"])
def test_a_child_whose_retry_was_just_scheduled_is_cancelled_with_the_rest(
    command: c.Command,
) -> None:
    view = a_view(a_flow(), a_launched("a", launch=retrying()), running={"a"})
    turn = a_turn(view)

    turn.take(ended("a", FAILED), "runtime")
    turn.take(command, "owner")

    assert turn.tasks["a"].status is TaskStatus.CANCELLED
    assert not view.children.active
    if isinstance(command, c.Cancel):
        assert view.flow is not None
        assert view.flow.status is FlowStatus.CANCELLED


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_a_child_whose_retry_was_just_scheduled_ends_with_its_flow(end: str) -> None:
    view = a_view(a_flow(), a_launched("a", launch=retrying()), running={"a"})
    turn = a_turn(view)
    command = (
        c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH)
        if end == "finish"
        else c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH)
    )

    turn.take(ended("a", FAILED), "runtime")
    turn.take(command, "owner")

    assert turn.tasks["a"].status is TaskStatus.CANCELLED
    assert not view.children.active


# ---- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_an_end_takes_launched_children_along_and_leaves_linked_ones(end: str) -> None:
    view = a_view(
        a_flow(),
        a_launched("runs"),
        a_launched("cut off"),
        a_launched("queued", TaskStatus.QUEUED),
        a_launched("pending", TaskStatus.QUEUED, next_attempt_at=NOW + 9),
        a_linked("linked"),
        a_linked("linked, queued", TaskStatus.QUEUED),
        running={"runs"},
        lined_up=["queued"],
    )
    turn = a_turn(view)
    command = (
        c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH)
        if end == "finish"
        else c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH)
    )

    turn.take(command, "owner")

    assert list(turn.effects()) == [StopTask("runs", StopReason.FLOW_ENDED)]
    asked = turn.tasks.pop("runs")
    assert (asked.status, asked.cancel_requested_at) == (TaskStatus.RUNNING, NOW)
    assert sorted(turn.tasks) == ["cut off", "pending", "queued"]
    assert {task.status for task in turn.tasks.values()} == {TaskStatus.CANCELLED}
    assert sorted(view.children.active) == ["linked", "linked, queued", "runs"]


@pytest.mark.parametrize("by_controller", [False, True])
@pytest.mark.parametrize("kind", [c.Finish, c.Fail])
def test_an_end_from_outside_stops_the_controller_and_one_of_its_own_does_not(
    by_controller: bool, kind: Any
) -> None:
    view = a_view(a_flow(), driven=True)
    turn = a_turn(view)

    turn.take(
        kind(expected_revision=7, patch=NOTHING_TO_PATCH, by_controller=by_controller), "someone"
    )

    assert list(turn.effects()) == ([] if by_controller else [StopController()])


def test_linked_children_of_an_ended_flow_still_report_their_end() -> None:
    flow = a_flow(FlowStatus.SUCCEEDED)
    view = a_view(flow, a_linked("l"))
    turn = a_turn(view)

    turn.take(ended("l", attempt=None), "owner")

    assert turn.tasks["l"].status is TaskStatus.SUCCEEDED
    assert view.flow is flow


@pytest.mark.parametrize("status", ENDED)
def test_nothing_starts_in_a_flow_that_has_ended(status: FlowStatus) -> None:
    view = a_view(
        a_flow(status),
        a_launched("q", TaskStatus.QUEUED, next_attempt_at=NOW - 1),
        lined_up=["q"],
        controllers={"triage"},
    )
    turn = a_turn(view)

    turn.take(c.Tick(), "runtime")

    assert list(turn.effects()) == []
    assert not turn.tasks


def test_a_start_overtaken_in_its_own_turn_is_dropped() -> None:
    for command in (
        c.CancelTask(task_id="new"),
        c.Cancel(),
        c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH),
    ):
        view = a_view(a_flow())
        turn = a_turn(view)

        turn.take(c.AddTasks(drafts=(a_draft("new", launch=launch_of()),)), "owner")
        assert started(turn) == ["new"]
        turn.take(command, "owner")

        assert list(turn.effects()) == []
        assert not view.children.active
        assert turn.tasks["new"].status is TaskStatus.CANCELLED
        assert turn.created == {"new"}


# ---- the limits -----------------------------------------------------------------------------------


def test_each_group_has_its_own_limit_and_the_rest_share_the_flows() -> None:
    view = a_view(a_flow(), limits=Limits(running_children=2))
    turn = a_turn(view)
    drafts = [
        *(a_draft(f"plain{n}", key=n, launch=launch_of()) for n in range(4)),
        *(a_draft(f"map{n}", key=10 + n, launch=launch_of("map", 3)) for n in range(5)),
        *(a_draft(f"one{n}", key=20 + n, launch=launch_of("one", 1)) for n in range(3)),
    ]

    turn.take(c.AddTasks(drafts=tuple(drafts)), "owner")

    assert started(turn) == ["plain0", "plain1", "map0", "map1", "map2", "one0"]


def test_an_end_makes_room_for_the_oldest_in_line_and_only_in_its_group() -> None:
    view = a_view(a_flow(), limits=Limits(running_children=1))
    first = a_turn(view)
    drafts = [
        *(a_draft(f"a{n}", key=n, launch=launch_of("a")) for n in range(3)),
        *(a_draft(f"b{n}", key=10 + n, launch=launch_of("b")) for n in range(3)),
    ]
    first.take(c.AddTasks(drafts=tuple(drafts)), "owner")
    at_first = started(first)
    second = a_turn(view, last_seq=len(first.events))

    second.take(ended("a0"), "runtime")

    assert at_first == ["a0", "b0"]
    assert started(second) == ["a1"]


def test_linked_children_take_no_room() -> None:
    linked = [a_linked(f"l{n}") for n in range(20)]
    view = a_view(a_flow(), *linked, limits=Limits(running_children=1))
    turn = a_turn(view)

    turn.take(c.AddTasks(drafts=(a_draft("new", launch=launch_of()),)), "owner")

    assert started(turn) == ["new"]


def test_a_retry_waits_for_its_instant_and_then_for_its_turn() -> None:
    view = a_view(
        a_flow(),
        a_launched("pending", TaskStatus.QUEUED, attempt=1, next_attempt_at=NOW + 5),
        a_launched("runs"),
        running={"runs"},
        limits=Limits(running_children=1),
    )
    early, due, freed = a_turn(view), a_turn(view), a_turn(view)

    early.take(c.Tick(), "runtime")
    view.now = NOW + 5
    due.take(c.Tick(), "runtime")
    due.take(c.Tick(), "runtime")
    freed.take(ended("runs"), "runtime")

    assert started(early) == started(due) == []
    assert started(freed) == ["pending"]
    assert view.children.active["pending"].attempt == 2
    assert view.children.active["pending"].next_attempt_at is None


def test_children_released_by_shutdown_go_back_to_the_queue_and_make_room_for_nobody() -> None:
    view = a_view(
        a_flow(),
        a_launched("stopped", attempt=3),
        *queued_children(2),
        lined_up=["q0", "q1"],
        limits=Limits(running_children=1),
        closing=True,
    )
    turn = a_turn(view)

    turn.take(c.ReleaseTasks(task_ids=("stopped",)), "runtime")

    assert view.children.active["stopped"].status is TaskStatus.QUEUED
    assert view.children.active["stopped"].attempt == 2
    assert list(turn.effects()) == []
    assert [event.type for event in turn.events] == [EventType.TASK_RELEASED]
    assert view.children.active["q0"].status is TaskStatus.QUEUED
    assert view.children.active["q0"].attempt == 0


@pytest.mark.parametrize("outcome", [Succeeded(), FAILED, STOPPED])
def test_while_closing_an_end_is_recorded_and_nobody_takes_the_room(outcome: Any) -> None:
    view = a_view(
        a_flow(),
        a_launched("a"),
        *queued_children(2),
        running={"a"},
        lined_up=["q0", "q1"],
        limits=Limits(running_children=1),
        closing=True,
    )
    turn = a_turn(view)

    turn.take(ended("a", outcome), "runtime")
    turn.take(c.AddTasks(drafts=(a_draft("new", launch=launch_of()),)), "owner")
    turn.take(c.Tick(), "runtime")

    assert list(turn.effects()) == []
    assert turn.tasks["a"].ended_at == NOW
    assert {task.attempt for task in view.children.active.values()} == {0}


def test_releasing_concerns_running_launched_children_only() -> None:
    tasks = [
        a_linked("linked"),
        a_launched("queued", TaskStatus.QUEUED),
    ]
    view = a_view(a_flow(), *tasks)
    turn = a_turn(view)

    turn.take(c.ReleaseTasks(task_ids=("linked", "queued", "nobody")), "runtime")

    assert not (turn.tasks or turn.events)


class CountedDict(dict[str, StoredTask]):
    """A dict that counts how often it is looked into, and refuses to be gone through."""

    looks = 0

    def get(self, *args: Any) -> Any:
        self.looks += 1
        return super().get(*args)

    def __getitem__(self, key: str) -> StoredTask:
        self.looks += 1
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)

    def _gone_through(self) -> Any:
        raise AssertionError("went through all children to start one")

    __iter__ = values = items = keys = _gone_through


def test_starting_the_next_of_ten_thousand_looks_at_a_handful() -> None:
    view = a_view(a_flow(), limits=Limits(running_children=8))
    drafts = tuple(a_draft(f"t{n}", key=n, launch=launch_of()) for n in range(10_000))
    first = a_turn(view)
    first.take(c.AddTasks(drafts=drafts), "owner")
    assert len(started(first)) == 8
    counted = CountedDict(view.children.active)
    view.children.active = counted

    for n in range(100):
        turn = a_turn(view)
        turn.take(ended(f"t{n}"), "runtime")
        assert started(turn) == [f"t{n + 8}"]

    assert counted.looks <= 100 * 20


def test_children_cancelled_while_they_stood_in_line_are_passed_over_once() -> None:
    view = a_view(a_flow(), limits=Limits(running_children=1))
    drafts = tuple(a_draft(f"t{n}", key=n, launch=launch_of()) for n in range(1_000))
    turn = a_turn(view)
    turn.take(c.AddTasks(drafts=drafts), "owner")
    for n in range(1, 999):
        turn.take(c.CancelTask(task_id=f"t{n}"), "owner")

    after = a_turn(view)
    after.take(ended("t0"), "runtime")

    assert started(after) == ["t999"]
    assert sorted(view.children.active) == ["t999"]
