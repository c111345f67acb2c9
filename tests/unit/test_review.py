"""A child that a person has to look at: it blocks its flow, one at a time, until somebody answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.effect import StartController, StartTask
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus
from flowstead.model.limits import Limits
from flowstead.model.retry import Category
from flowstead.model.task import (
    Cancelled,
    Failed,
    Launch,
    Lost,
    OnRestart,
    Succeeded,
    TaskStatus,
    TimedOut,
    is_active,
)
from flowstead.rules.children import Children
from flowstead.rules.turn import Turn
from flowstead.rules.view import View
from tests.unit.given import (
    ENDED,
    LIVE,
    NOTHING_TO_PATCH,
    NOW,
    a_flow,
    a_launched,
    a_linked,
    a_turn,
    a_view,
    book,
    in_review,
    retrying,
)

PROFILE = settings(deadline=None, derandomize=True, database=None)
ODD = Failure(
    kind="exception", code="NeedsReview", message="amount is odd", category=Category.VALIDATION
)
SUMMARY = "'step' needs review: amount is odd"
RUNNING, QUEUED = TaskStatus.RUNNING, TaskStatus.QUEUED


def odd_end(task_id: str = "t", attempt: int = 1, **fields: Any) -> c.EndReport:
    """A child's code has ended with something for a person to look at."""
    given_fields = {"outcome": Failed(ODD), "again": False, "review": True}
    return c.EndReport(task_id=task_id, attempt=attempt, **given_fields | fields)


def running(task_id: str = "t", **fields: Any) -> Any:
    return a_launched(task_id, **{"run_id": "step"} | fields)


def told(turn: Turn) -> list[EventType]:
    return [event.type for event in turn.events]


def started(turn: Turn) -> list[str]:
    return [effect.task.task_id for effect in turn.effects() if isinstance(effect, StartTask)]


def blocked_view(*others: Any, **more: Any) -> View:
    """A flow blocked by the child `t`, at revision 8."""
    fields = {name: more.pop(name) for name in ("wait_json", "intent") if name in more}
    flow = a_flow(
        FlowStatus.BLOCKED,
        **{"wait_json": UNSET} | fields,
        revision=8,
        blocked_task_id="t",
        blocked_summary=SUMMARY,
    )
    return a_view(flow, in_review("t", failure=ODD), *others, **more)


# ---- the block ------------------------------------------------------------------------------------


@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("status", [status for status in LIVE if status is not FlowStatus.BLOCKED])
def test_a_child_that_needs_review_waits_and_blocks_its_flow(
    status: FlowStatus, driven: bool
) -> None:
    flow = a_flow(status)
    view = a_view(flow, running(), running={"t"}, driven=driven)
    turn = a_turn(view)

    taken = turn.take(odd_end(), "runtime")

    child, after = view.children.active["t"], view.flow
    assert taken.refusal is None
    assert (child.status, child.attempt) == (QUEUED, 1)
    assert (child.review_requested_at, child.failure) == (NOW, ODD)
    assert (child.next_attempt_at, child.ended_at) == (None, None)
    assert after is not None
    assert (after.status, after.revision) == (FlowStatus.BLOCKED, 8)
    assert (after.blocked_task_id, after.blocked_summary) == ("t", SUMMARY)
    assert after.wait_json == flow.wait_json
    assert told(turn) == [EventType.TASK_REVIEW_REQUESTED, EventType.FLOW_BLOCKED]
    assert turn.events[0].revision == 7
    assert turn.events[1].changed == {
        "status": "blocked",
        "blockedTaskId": "t",
        "blockedSummary": SUMMARY,
    }
    assert list(turn.effects()) == []


@pytest.mark.parametrize(
    ("named", "failure", "summary"),
    [
        ({"run_id": "step"}, ODD, "'step' needs review: amount is odd"),
        ({"run_id": None, "task": "check it"}, ODD, "'check it' needs review: amount is odd"),
        ({}, Failure(kind="exception"), "'step' needs review: no reason was given"),
    ],
)
def test_the_summary_says_in_one_sentence_which_child_and_why(
    named: dict[str, Any], failure: Failure, summary: str
) -> None:
    view = a_view(a_flow(), running(**named), running={"t"})

    a_turn(view).take(odd_end(outcome=Failed(failure)), "runtime")

    assert view.flow is not None
    assert view.flow.blocked_summary == summary


@pytest.mark.parametrize(
    "launch",
    [Launch(function="work"), retrying(3), Launch(function="work", on_restart=OnRestart.LOST)],
    ids=["no policy", "a policy", "not to be done twice"],
)
@pytest.mark.parametrize("attempt", [1, 3])
def test_a_review_asks_for_no_policy_and_counts_no_attempts(launch: Launch, attempt: int) -> None:
    view = a_view(a_flow(), running(launch=launch, attempt=attempt), running={"t"})

    a_turn(view).take(odd_end(attempt=attempt), "runtime")

    assert view.children.active["t"].review_requested_at == NOW


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Succeeded(), TaskStatus.SUCCEEDED),
        (TimedOut(ODD), TaskStatus.TIMED_OUT),
        (Cancelled(ODD), TaskStatus.CANCELLED),
        (Lost(ODD), TaskStatus.LOST),
    ],
)
def test_only_a_failure_can_be_looked_at(outcome: Any, status: TaskStatus) -> None:
    view = a_view(a_flow(), running(), running={"t"})
    turn = a_turn(view)

    turn.take(odd_end(outcome=outcome), "runtime")

    assert turn.tasks["t"].status is status
    assert told(turn) == [EventType.TASK_ENDED]


@pytest.mark.parametrize(
    ("flow", "fields"),
    [
        *((a_flow(status), {}) for status in ENDED),
        (a_flow(intent=True), {}),
        (a_flow(), {"cancel_requested_at": NOW - 1}),
    ],
    ids=[*ENDED, "intent", "asked to stop"],
)
def test_nobody_is_asked_to_look_at_what_will_not_be_tried_again(
    flow: Any, fields: dict[str, Any]
) -> None:
    view = a_view(flow, running(launch=retrying(9), **fields), running={"t"})
    turn = a_turn(view)

    turn.take(odd_end(again=True), "runtime")

    assert turn.tasks["t"].status is TaskStatus.FAILED
    assert EventType.FLOW_BLOCKED not in told(turn)


def test_whoever_runs_a_linked_child_looks_at_its_failures_himself() -> None:
    view = a_view(a_flow(), a_linked("t"))
    turn = a_turn(view)

    turn.take(odd_end(attempt=None), "owner")

    assert turn.tasks["t"].status is TaskStatus.FAILED
    assert told(turn) == [EventType.TASK_ENDED]


def test_the_place_of_a_child_in_review_is_free_for_the_next_although_its_flow_is_blocked() -> None:
    view = a_view(
        a_flow(),
        running(),
        a_launched("next", QUEUED),
        running={"t"},
        lined_up=["next"],
        limits=Limits(running_children=1),
    )
    turn = a_turn(view)

    turn.take(odd_end(), "runtime")

    assert started(turn) == ["next"]
    assert view.flow is not None
    assert view.flow.status is FlowStatus.BLOCKED


# ---- the answers ----------------------------------------------------------------------------------

ANSWERS: dict[str, c.Command] = {
    "resume": c.Resume(expected_revision=8, patch=NOTHING_TO_PATCH, status=FlowStatus.QUEUED),
    "retry_task": c.RetryTask(task_id="t"),
    "retry_task, other input": c.RetryTask(task_id="t", input_json=Raw(b'{"n":2}')),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_an_answer_lets_the_child_try_again_and_the_flow_go_on_at_once(
    answer: str, driven: bool, registered: bool
) -> None:
    view = blocked_view(driven=driven, controllers={"triage"} if registered else set[str]())
    turn = a_turn(view)

    taken = turn.take(ANSWERS[answer], "owner")

    child, after = view.children.active["t"], view.flow
    assert taken.refusal is None
    assert (child.status, child.attempt) == (RUNNING, 2)
    assert child.review_requested_at is None
    assert child.failure == ODD
    assert after is not None
    assert after.revision == 9
    assert (after.blocked_task_id, after.blocked_summary) == (None, None)
    goes_on = FlowStatus.RUNNING if driven and answer != "resume" else FlowStatus.QUEUED
    assert after.status is goes_on
    assert sorted(told(turn)) == [
        EventType.FLOW_RESUMED,
        EventType.TASK_RETRY_REQUESTED,
        EventType.TASK_STARTED,
    ]
    enters = [effect for effect in turn.effects() if isinstance(effect, StartController)]
    assert len(enters) == (registered and not driven)
    assert started(turn) == ["t"]


def test_an_answer_may_bring_another_input_which_the_next_attempt_is_given() -> None:
    view = blocked_view()
    turn = a_turn(view)

    turn.take(ANSWERS["retry_task, other input"], "owner")

    [start] = [effect for effect in turn.effects() if isinstance(effect, StartTask)]
    assert bytes(start.task.input_json) == b'{"n":2}'  # type: ignore[arg-type]
    asked = next(event for event in turn.events if event.type == EventType.TASK_RETRY_REQUESTED)
    assert asked.changed["inputJson"] == Raw(b'{"n":2}')
    assert asked.changed["reviewRequestedAt"] is None


def test_an_input_that_json_cannot_hold_answers_nothing() -> None:
    view = blocked_view()
    before, flow = book(view), view.flow
    broken = c.Defect(Code.INVALID_STATE, "input_json is nan. Nothing was written.")
    turn = a_turn(view)

    taken = turn.take(c.RetryTask(task_id="t", input_json=broken), "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.INVALID_STATE
    assert book(view) == before
    assert view.flow is flow
    assert not turn.events


@pytest.mark.parametrize("revision", [7, 9])
def test_a_resume_that_has_not_seen_the_block_answers_nothing(revision: int) -> None:
    view = blocked_view()
    before, flow = book(view), view.flow
    late = c.Resume(expected_revision=revision, patch=NOTHING_TO_PATCH, status=FlowStatus.QUEUED)

    taken = a_turn(view).take(late, "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.REVISION_CONFLICT
    assert book(view) == before
    assert view.flow is flow


@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_giving_up_on_the_child_ends_it_and_lets_the_flow_go_on(driven: bool, waits: bool) -> None:
    wait = Raw(b'{"kind":"reply"}') if waits else UNSET
    view = blocked_view(driven=driven, wait_json=wait, controllers={"triage"})
    turn = a_turn(view)

    turn.take(c.CancelTask(task_id="t"), "owner")

    gone, after = turn.tasks["t"], view.flow
    assert (gone.status, gone.review_requested_at) == (TaskStatus.CANCELLED, None)
    assert not view.children.active
    assert not view.children.in_review
    assert after is not None
    goes_on = FlowStatus.RUNNING if driven else FlowStatus.QUEUED
    assert after.status is (FlowStatus.WAITING if waits else goes_on)
    assert (after.revision, after.wait_json) == (9, wait)
    assert (after.blocked_task_id, after.blocked_summary) == (None, None)
    assert len(turn.effects()) == (not waits and not driven)


@pytest.mark.parametrize("answer", ["retry_task", "cancel_task"])
@pytest.mark.parametrize("driven", [False, True])
def test_a_flow_that_waited_for_something_else_waits_for_it_again(
    answer: str, driven: bool
) -> None:
    wait = Raw(b'{"kind":"reply"}')
    view = blocked_view(wait_json=wait, driven=driven, controllers={"triage"})
    command = c.RetryTask(task_id="t") if answer == "retry_task" else c.CancelTask(task_id="t")
    turn = a_turn(view)

    turn.take(command, "owner")

    assert view.flow is not None
    assert (view.flow.status, view.flow.wait_json) == (FlowStatus.WAITING, wait)
    assert EventType.FLOW_WAITING in told(turn)
    assert not any(isinstance(effect, StartController) for effect in turn.effects())


def test_a_resume_ends_both_the_wait_and_the_review() -> None:
    view = blocked_view(wait_json=Raw(b'{"kind":"reply"}'))

    a_turn(view).take(ANSWERS["resume"], "owner")

    assert view.flow is not None
    assert (view.flow.status, view.flow.wait_json) == (FlowStatus.QUEUED, UNSET)
    assert view.children.active["t"].status is RUNNING


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_where_the_function_is_not_at_hand_holds_for_whoever_has_it(answer: str) -> None:
    view = blocked_view(functions=frozenset[str]())
    turn = a_turn(view)

    turn.take(ANSWERS[answer], "owner")

    assert started(turn) == []
    assert view.children.active["t"].review_requested_at is None
    view.functions = frozenset({"work"})
    later = a_turn(view)
    later.take(c.Recover(), "runtime")
    assert started(later) == ["t"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_comes_while_the_runtime_closes_holds_for_the_next_one(answer: str) -> None:
    view = blocked_view(closing=True)
    turn = a_turn(view)

    taken = turn.take(ANSWERS[answer], "owner")

    assert taken.refusal is None
    assert started(turn) == []
    assert view.children.active["t"].review_requested_at is None


def test_a_second_answer_is_told_that_the_child_runs() -> None:
    view = blocked_view()
    turn = a_turn(view)
    turn.take(c.RetryTask(task_id="t"), "owner")
    flow, before = view.flow, book(view)

    again = turn.take(c.RetryTask(task_id="t"), "somebody else")

    assert again.refusal is not None
    assert again.refusal.code is Code.NOT_RETRYABLE
    assert view.flow is flow
    assert book(view) == before


def test_the_same_child_may_need_review_again_and_again() -> None:
    view = blocked_view()
    for attempt in (2, 3, 4):
        revision = view.flow.revision  # type: ignore[union-attr]
        a_turn(view).take(c.RetryTask(task_id="t"), "owner")
        view.running = {"t": attempt}
        view.now += 1_000
        a_turn(view).take(odd_end(attempt=attempt), "runtime")

        assert view.flow is not None
        assert (view.flow.status, view.flow.blocked_task_id) == (FlowStatus.BLOCKED, "t")
        assert view.flow.revision == revision + 2
        assert view.children.active["t"].review_requested_at == view.now


def test_after_a_review_the_policy_counts_the_attempts_there_have_been() -> None:
    for most, ends in ((2, TaskStatus.FAILED), (3, QUEUED)):
        launch = retrying(most)
        view = a_view(a_flow(), running(launch=launch), running={"t"})
        a_turn(view).take(odd_end(), "runtime")
        a_turn(view).take(c.RetryTask(task_id="t"), "owner")
        view.running = {"t": 2}
        turn = a_turn(view)

        turn.take(
            c.EndReport(task_id="t", attempt=2, outcome=Failed(Failure(kind="exception"))),
            "runtime",
        )

        assert turn.tasks["t"].status is ends


# ---- beside other things --------------------------------------------------------------------------


def test_a_flow_with_a_blocker_of_its_owners_is_blocked_by_the_review_only_after_that() -> None:
    own = a_flow(FlowStatus.BLOCKED, blocked_task_id=None, blocked_summary="waits for legal")
    view = a_view(own, running(), running={"t"})
    first, second = a_turn(view), a_turn(view)

    first.take(odd_end(), "runtime")
    between = view.flow
    resume = c.Resume(expected_revision=7, patch=NOTHING_TO_PATCH, status=FlowStatus.RUNNING)
    taken = second.take(resume, "owner")

    assert between is own
    assert taken.flow is not None
    assert (taken.flow.status, taken.flow.revision) == (FlowStatus.RUNNING, 8)
    assert view.flow is not None
    assert (view.flow.status, view.flow.revision) == (FlowStatus.BLOCKED, 9)
    assert view.flow.blocked_task_id == "t"
    assert view.children.active["t"].review_requested_at == NOW, "nobody has answered it"


@pytest.mark.parametrize(
    "named",
    [
        running("t"),
        a_linked("t"),
        a_launched("t", QUEUED, launch=retrying(), attempt=1, next_attempt_at=NOW + 60_000),
    ],
    ids=["runs", "linked", "waits for its retry"],
)
def test_a_resume_does_nothing_to_a_child_its_owner_named_as_a_blocker(named: Any) -> None:
    own = a_flow(FlowStatus.BLOCKED, blocked_task_id="t", blocked_summary="slow today")
    view = a_view(own, named, running={"t"})
    turn = a_turn(view)
    resume = c.Resume(expected_revision=7, patch=NOTHING_TO_PATCH, status=FlowStatus.QUEUED)

    turn.take(resume, "owner")

    assert view.children.active["t"] is named
    assert told(turn) == [EventType.FLOW_RESUMED]


@pytest.mark.parametrize(
    "command", [c.CancelTask(task_id="t"), c.RetryTask(task_id="t")], ids=["cancel", "retry"]
)
def test_only_the_owner_lifts_a_block_of_his_own_whatever_becomes_of_the_child_it_names(
    command: c.Command,
) -> None:
    pending = a_launched("t", QUEUED, launch=retrying(), attempt=1, next_attempt_at=NOW + 60_000)
    own = a_flow(FlowStatus.BLOCKED, blocked_task_id="t", blocked_summary="slow today")
    view = a_view(own, pending)

    taken = a_turn(view).take(command, "owner")

    assert taken.refusal is None
    assert view.flow is own


def test_waiting_for_something_does_not_hide_a_review() -> None:
    view = blocked_view()
    wait = Raw(b'{"kind":"webhook"}')

    a_turn(view).take(
        c.SetWaiting(expected_revision=8, patch=NOTHING_TO_PATCH, wait_json=wait), "owner"
    )

    assert view.flow is not None
    assert (view.flow.status, view.flow.revision) == (FlowStatus.BLOCKED, 10)
    assert (view.flow.wait_json, view.flow.blocked_task_id) == (wait, "t")


def test_an_update_leaves_the_block_alone() -> None:
    view = blocked_view()

    a_turn(view).take(c.Update(expected_revision=8, patch=c.Patch(current_step="x")), "owner")

    assert view.flow is not None
    assert (view.flow.status, view.flow.revision) == (FlowStatus.BLOCKED, 9)
    assert (view.flow.blocked_task_id, view.flow.blocked_summary) == ("t", SUMMARY)


@pytest.mark.parametrize(
    "command",
    [
        c.Cancel(),
        c.RequestCancel(expected_revision=8),
        c.Finish(expected_revision=8, patch=NOTHING_TO_PATCH),
        c.Fail(expected_revision=8, patch=NOTHING_TO_PATCH),
    ],
    ids=lambda command: type(command).__name__,
)
def test_whatever_ends_the_flow_or_lets_nothing_new_start_ends_the_review(
    command: c.Command,
) -> None:
    view = blocked_view()
    turn = a_turn(view)

    turn.take(command, "owner")

    assert turn.tasks["t"].status is TaskStatus.CANCELLED
    assert turn.tasks["t"].review_requested_at is None
    assert not (view.children.active or view.children.in_review)
    assert view.flow is not None
    assert view.flow.status in ENDED


@pytest.mark.parametrize("command", [c.RetryTask(task_id="t"), c.CancelTask(task_id="t")])
def test_an_answer_after_an_intent_finds_no_child(command: c.Command) -> None:
    view = blocked_view(driven=True)
    a_turn(view).take(c.RequestCancel(expected_revision=8), "owner")
    flow = view.flow

    taken = a_turn(view).take(command, "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.NOT_FOUND
    assert view.flow is flow


def test_a_review_that_ends_by_a_restart_blocks_nobody_any_more() -> None:
    bare = in_review("t", launch=Launch(on_restart=OnRestart.LOST))
    flow = a_flow(FlowStatus.BLOCKED, wait_json=UNSET, blocked_task_id="t", blocked_summary=SUMMARY)
    view = a_view(flow, bare, controllers={"triage"})
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert turn.tasks["t"].status is TaskStatus.LOST
    assert view.flow is not None
    assert (view.flow.status, view.flow.blocked_task_id) == (FlowStatus.QUEUED, None)
    assert list(turn.effects()) == [StartController("triage")]


def test_a_sign_of_life_of_a_child_in_review_changes_nothing_about_it() -> None:
    view = blocked_view()
    flow = view.flow

    a_turn(view).take(c.ProgressReport(task_id="t", summary="still"), "runtime")
    a_turn(view).take(odd_end(), "runtime")
    a_turn(view).take(c.ReleaseTasks(task_ids=("t",), begun=frozenset({"t"})), "runtime")

    assert view.flow is flow
    assert view.children.active["t"].review_requested_at == NOW - 100
    assert list(view.children.in_review) == ["t"]


# ---- several --------------------------------------------------------------------------------------


def three_in_review() -> View:
    """Asked for in the order c, a, b."""
    view = a_view(
        a_flow(),
        *(running(name, run_id=name, key=n) for n, name in enumerate("abc", start=1)),
        running={"a", "b", "c"},
    )
    for name in "cab":
        view.now += 10
        a_turn(view).take(odd_end(name), "runtime")
    return view


def test_the_one_that_was_asked_for_first_blocks_and_the_others_wait_their_turn() -> None:
    view = three_in_review()
    blockers = []
    for _ in range(3):
        assert view.flow is not None
        blockers.append((view.flow.blocked_task_id, view.flow.revision))
        a_turn(view).take(c.RetryTask(task_id=str(view.flow.blocked_task_id)), "owner")

    # Each answer lets the flow go on, and the next one blocks it: two changes.
    assert blockers == [("c", 8), ("a", 10), ("b", 12)]
    assert view.flow is not None
    assert (view.flow.status, view.flow.revision) == (FlowStatus.QUEUED, 13)


def test_a_restart_does_not_change_whose_turn_it_is() -> None:
    view = three_in_review()
    again = Children.of(sorted(view.children.active.values(), key=lambda t: t.key), [])

    assert list(again.in_review) == list(view.children.in_review) == ["c", "a", "b"]


@pytest.mark.parametrize("answer", ["retry_task", "cancel_task"])
def test_answering_one_that_does_not_block_leaves_the_flow_as_it_is(answer: str) -> None:
    view = three_in_review()
    flow = view.flow
    command = c.RetryTask(task_id="a") if answer == "retry_task" else c.CancelTask(task_id="a")

    a_turn(view).take(command, "owner")

    assert view.flow is flow
    assert list(view.children.in_review) == ["c", "b"]


def test_a_resume_answers_the_one_that_blocks_and_no_other() -> None:
    view = three_in_review()
    turn = a_turn(view)

    turn.take(ANSWERS["resume"], "owner")

    assert started(turn) == ["c"]
    assert view.flow is not None
    assert (view.flow.status, view.flow.blocked_task_id) == (FlowStatus.BLOCKED, "a")
    assert view.flow.revision == 10


NAMES = "abcd"
MOVES = st.one_of(
    st.tuples(st.just("review"), st.sampled_from(NAMES)),
    st.tuples(st.just("review"), st.sampled_from(NAMES)),
    st.tuples(st.just("retry"), st.sampled_from(NAMES)),
    st.tuples(st.just("cancel"), st.sampled_from(NAMES)),
    st.tuples(st.just("end"), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["resume", "wait", "own blocker", "update", "crash"]), st.just("")),
)


def move(view: View, kind: str, name: str) -> Turn:
    assert view.flow is not None
    revision, task = view.flow.revision, view.children.active.get(name)
    attempt = 0 if task is None else task.attempt
    commands: dict[str, c.Command] = {
        "review": odd_end(name, attempt=attempt),
        "end": c.EndReport(task_id=name, attempt=attempt, outcome=Succeeded()),
        "retry": c.RetryTask(task_id=name),
        "cancel": c.CancelTask(task_id=name),
        "resume": c.Resume(
            expected_revision=revision, patch=NOTHING_TO_PATCH, status=FlowStatus.QUEUED
        ),
        "wait": c.SetWaiting(
            expected_revision=revision, patch=NOTHING_TO_PATCH, wait_json=Raw(b"1")
        ),
        "own blocker": c.SetWaiting(
            expected_revision=revision,
            patch=NOTHING_TO_PATCH,
            wait_json=Raw(b"1"),
            blocked_summary="own",
        ),
        "update": c.Update(expected_revision=revision, patch=NOTHING_TO_PATCH),
        "crash": c.Recover(),
    }
    if kind == "crash":
        view.children = Children.of(view.children.active.values(), [])
        view.running = {}
    turn = a_turn(view)
    turn.take(commands[kind], "someone")
    view.running = {
        task.task_id: task.attempt
        for task in view.children.active.values()
        if task.status is RUNNING
    }
    return turn


@given(moves=st.lists(MOVES, max_size=25), driven=st.booleans())
@settings(PROFILE, max_examples=400)
def test_whatever_happens_a_flow_has_one_block_at_a_time_and_none_without_a_reason(
    moves: list[tuple[str, str]], driven: bool
) -> None:
    view = a_view(
        a_flow(FlowStatus.QUEUED, wait_json=UNSET),
        *(running(name, run_id=name, key=n) for n, name in enumerate(NAMES, start=1)),
        running=set(NAMES),
        driven=driven,
    )
    blocked = False
    for kind, name in moves:
        before = view.flow
        assert before is not None
        turn = move(view, kind, name)

        flow = view.flow
        assert flow is not None
        of_flow = [event for event in turn.events if event.type.startswith("flow.")]
        assert flow.revision == before.revision + len(of_flow)
        for event in of_flow:
            if event.type == EventType.FLOW_BLOCKED:
                assert not blocked or kind == "own blocker", "blocked twice"
            blocked = event.type == EventType.FLOW_BLOCKED or (
                blocked and event.type == EventType.FLOW_UPDATED
            )
        assert blocked == (flow.status is FlowStatus.BLOCKED)
        in_review_now = {
            task.task_id
            for task in view.children.active.values()
            if task.review_requested_at is not None
        }
        assert set(view.children.in_review) == in_review_now
        if in_review_now:
            assert blocked, "nobody is told of a review"
        if blocked and flow.blocked_summary != "own":
            assert flow.blocked_task_id in in_review_now, "blocked by what was answered"
        for task in view.children.active.values():
            assert is_active(task)
            assert task.review_requested_at is None or task.status is QUEUED


def test_the_commands_of_the_property_meet_every_standing() -> None:
    view = a_view(a_flow(), running("a", run_id="a"), running={"a"})

    told_in_all = [
        told(move(view, kind, "a"))
        for kind in ("review", "own blocker", "resume", "resume", "review", "cancel", "wait")
    ]

    assert told_in_all == [
        [EventType.TASK_REVIEW_REQUESTED, EventType.FLOW_BLOCKED],
        [EventType.FLOW_BLOCKED],
        [EventType.FLOW_RESUMED, EventType.FLOW_BLOCKED],
        [EventType.FLOW_RESUMED, EventType.TASK_RETRY_REQUESTED, EventType.TASK_STARTED],
        [EventType.TASK_REVIEW_REQUESTED, EventType.FLOW_BLOCKED],
        [EventType.FLOW_RESUMED, EventType.TASK_ENDED],
        [EventType.FLOW_WAITING],
    ]
