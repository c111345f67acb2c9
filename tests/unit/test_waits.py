"""A controller that stands still: its flow waits, is woken by the first step to end, and is parked meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.approval import VoteKind
from flowstead.model.code import Code
from flowstead.model.effect import ParkController, StartController, StopController
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, SyncMode, has_ended
from flowstead.model.limits import Limits
from flowstead.model.task import Failed, Succeeded, TaskStatus
from flowstead.model.wait import OnTimeout, WaitKind
from flowstead.rules.view import View
from flowstead.rules.waits import NEVER_PARKED, may_be_in_memory
from tests.unit.given import (
    ENDED,
    NOTHING_TO_PATCH,
    NOW,
    a_flow,
    a_launched,
    a_linked,
    a_turn,
    a_view,
    in_review,
)
from tests.unit.given_waits import (
    FITS,
    PARK_MS,
    SCHEMA,
    SECOND,
    TOKEN,
    a_telling_view,
    a_timer_draft,
    a_vote,
    a_wait_draft,
    addressed,
    an_approval_draft,
    an_old_wait,
    cast,
    decoded,
    flow_of,
    ignored,
    play,
    refused,
    set_waiting,
    stand_in,
    standing_in,
    taken,
    tick,
    told,
    types,
    waited_for,
)

BLOCK = OnTimeout.BLOCK
REGISTERED = frozenset({"triage"})
WAITING, BLOCKED = FlowStatus.WAITING, FlowStatus.BLOCKED
RUNNING, QUEUED = FlowStatus.RUNNING, FlowStatus.QUEUED


# ---- standings ------------------------------------------------------------------------------------
# Each answers a view; the controller is in memory until the case says otherwise.


def queued() -> View:
    return a_telling_view(a_flow(QUEUED), driven=True)


def running() -> View:
    return a_telling_view(a_flow(RUNNING), driven=True)


def waiting_by_hand() -> View:
    view = running()
    play(view, set_waiting(view))
    return view


def waiting_for_another_step() -> View:
    return standing_in(a_wait_draft("other", deadline_at=NOW + 600 * SECOND))


def blocked_by_a_review() -> View:
    view = a_telling_view(a_flow(RUNNING), in_review(), driven=True)
    play(view, c.Wake())
    return view


def blocked_by_a_step_in_no_time() -> View:
    """The step blocks its flow at its deadline, which has come."""
    view = standing_in(a_wait_draft("other", deadline_at=NOW - 1, on_timeout=BLOCK))
    tick(view, NOW)
    return view


def with_an_intent() -> View:
    return a_telling_view(a_flow(RUNNING, intent=True), driven=True)


def with_a_cancel_begun() -> View:
    flow = a_flow(RUNNING, intent=True, cancel_started_at=NOW - 1)
    return a_telling_view(flow, driven=True)


LIVE_STANDINGS: dict[str, tuple[Callable[[], View], FlowStatus]] = {
    "queued": (queued, QUEUED),
    "running": (running, RUNNING),
    "waiting by hand": (waiting_by_hand, WAITING),
    "waiting for another step": (waiting_for_another_step, WAITING),
    "blocked by a review": (blocked_by_a_review, BLOCKED),
    "blocked by a step": (blocked_by_a_step_in_no_time, BLOCKED),
}
AN_INTENT: dict[str, Callable[[], View]] = {
    "intent": with_an_intent,
    "cancel begun": with_a_cancel_begun,
}
EITHER = (False, True)


def made(make: Callable[[], View], *, driven: bool, registered: bool) -> View:
    view = make()
    view.driven = driven
    view.controllers = REGISTERED if registered else frozenset()
    return view


@pytest.mark.parametrize("name", LIVE_STANDINGS)
def test_the_standings_are_what_they_are_called(name: str) -> None:
    make, status = LIVE_STANDINGS[name]

    assert flow_of(make()).status is status


# ---- coming to stand ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "driven", "registered"), list(product(LIVE_STANDINGS, EITHER, EITHER))
)
def test_a_live_flow_waits_for_the_step_and_a_blocked_one_stays_blocked(
    name: str, driven: bool, registered: bool
) -> None:
    make, status = LIVE_STANDINGS[name]
    view = made(make, driven=driven, registered=registered)
    before = flow_of(view)

    turn = play(view, stand_in(a_wait_draft("a")))

    flow = flow_of(view)
    is_blocked = status is BLOCKED
    assert flow.status is (BLOCKED if is_blocked else WAITING)
    assert flow.revision == before.revision + 1
    assert types(turn) == [
        EventType.TASK_CREATED,
        EventType.FLOW_UPDATED if is_blocked else EventType.FLOW_WAITING,
    ]
    assert flow.awaiting == (*before.awaiting, ("A",))
    assert flow.wait is None
    assert flow.park_at == NOW + PARK_MS
    assert (flow.blocked_task_id, flow.blocked_summary) == (
        before.blocked_task_id,
        before.blocked_summary,
    )
    assert view.children.active["A"].status is TaskStatus.QUEUED
    assert turn.effects() == ()


@pytest.mark.parametrize(("name", "driven", "registered"), list(product(AN_INTENT, EITHER, EITHER)))
def test_nothing_is_waited_for_once_a_cancel_is_requested(
    name: str, driven: bool, registered: bool
) -> None:
    view = made(AN_INTENT[name], driven=driven, registered=registered)

    refused(view, stand_in(a_wait_draft("a")), Code.CANCEL_REQUESTED)


@pytest.mark.parametrize("status", ENDED)
@pytest.mark.parametrize("driven", EITHER)
def test_nothing_is_waited_for_once_the_flow_has_ended(status: FlowStatus, driven: bool) -> None:
    view = a_view(a_flow(status), driven=driven, controllers=REGISTERED)

    refused(view, stand_in(a_wait_draft("a")), Code.TERMINAL)


@pytest.mark.parametrize("name", AN_INTENT)
def test_nor_for_a_step_that_is_still_open_by_its_row(name: str) -> None:
    view = AN_INTENT[name]()
    view.children.put(an_old_wait("old"))

    refused(view, stand_in(steps=("old",)), Code.CANCEL_REQUESTED)


def test_a_flow_that_is_not_there_and_one_that_follows_a_task_wait_for_nothing() -> None:
    mirrored = a_flow(RUNNING, sync_mode=SyncMode.TASK_MIRRORED)

    refused(a_view(None), stand_in(a_wait_draft("a")), Code.NOT_FOUND)
    refused(a_view(mirrored), stand_in(a_wait_draft("a")), Code.NOT_MANAGED)


def test_a_step_that_has_ended_answers_at_once_and_the_flow_does_not_wait() -> None:
    view = standing_in(a_wait_draft("a"))
    play(view, c.Deliver(task_id="a", payload=FITS))
    before = flow_of(view)

    answer = taken(view, stand_in(a_wait_draft("a")))

    assert answer.refusal is None
    assert answer.children == ("A",)
    assert view.flow is before


def test_a_step_that_ended_answers_also_once_a_cancel_is_requested() -> None:
    view = standing_in(a_wait_draft("a"))
    play(view, c.Deliver(task_id="a", payload=FITS))
    play(view, c.RequestCancel(expected_revision=None))

    ignored(view, stand_in(a_wait_draft("a")))


def test_one_of_several_that_has_ended_is_enough_to_go_on() -> None:
    view = standing_in(a_wait_draft("a"))
    play(view, c.Deliver(task_id="a", payload=FITS))
    before = flow_of(view)

    turn = play(view, stand_in(a_wait_draft("b"), steps=("a",)))

    assert view.flow is before
    assert types(turn) == [EventType.TASK_CREATED]
    assert "B" in view.children.active


def test_children_that_run_are_no_wait_and_leave_the_flow_running() -> None:
    view = a_view(a_flow(RUNNING), a_launched("work"), a_linked("theirs"), driven=True)

    ignored(view, stand_in(steps=("work", "theirs")))


def test_a_wait_among_running_children_makes_the_flow_wait_for_any_of_them() -> None:
    view = a_view(a_flow(RUNNING), a_launched("work", run_id="job"), running={"work"}, driven=True)

    play(view, stand_in(a_wait_draft("a"), steps=("job",)))

    assert flow_of(view).awaiting == (("work", "A"),)
    assert waited_for(view) == {"kind": "signal", "name": "a"}


@pytest.mark.parametrize("steps", [("a", "a"), ("A", "a"), ("a", "A", "a")])
def test_a_step_named_twice_or_by_its_id_is_one_step(steps: tuple[str, ...]) -> None:
    view = running()
    play(view, c.AddTasks(drafts=(a_wait_draft("a"),)))

    answer = taken(view, stand_in(steps=steps))

    assert flow_of(view).awaiting == (("A",),)
    assert [child.task_id for child in answer.children if not isinstance(child, str)] == ["A"]


def test_a_controller_that_stands_in_the_same_step_again_stands_in_it_once() -> None:
    view = standing_in(a_wait_draft("a"))

    play(view, stand_in(a_wait_draft("a")), at=NOW + 60 * SECOND)

    flow = flow_of(view)
    assert flow.awaiting == (("A",),)
    assert flow.park_at == NOW + 60 * SECOND + PARK_MS
    assert waited_for(view) == {"kind": "signal", "name": "a"}


def test_too_many_children_leave_no_room_for_a_wait() -> None:
    limits = Limits(active_children=1)
    view = a_view(a_flow(RUNNING), a_linked("theirs"), limits=limits, driven=True)

    reason = refused(view, stand_in(a_wait_draft("a")), Code.OVERLOADED)

    assert "limit is 1" in reason


# ---- what is told of it ---------------------------------------------------------------------------


def test_a_wait_is_described_with_everything_but_its_token() -> None:
    key = Raw(b'{"threadKey":"t1","n":1}')
    draft = a_wait_draft(
        "a",
        key=key,
        wait_key="digest",
        prompt="Well?",
        schema=SCHEMA,
        deadline_at=NOW + 9,
        on_timeout=OnTimeout.RESUME,
        remind_at=(NOW + 5,),
    )

    view = standing_in(draft)

    assert waited_for(view) == {
        "kind": "signal",
        "name": "a",
        "prompt": "Well?",
        "deadlineAt": NOW + 9,
        "onTimeout": "resume",
        "schema": {"const": "fits"},
        "threadKey": "t1",
        "n": 1,
    }


def test_a_timer_tells_when_it_wakes() -> None:
    view = standing_in(a_timer_draft("nap", NOW + 9))

    assert waited_for(view) == {"kind": "timer", "name": "nap", "wakeAt": NOW + 9}


def test_several_waits_are_any_of_them() -> None:
    view = standing_in(a_wait_draft("a"), a_timer_draft("nap", NOW + 9))

    assert waited_for(view) == {
        "anyOf": [
            {"kind": "signal", "name": "a"},
            {"kind": "timer", "name": "nap", "wakeAt": NOW + 9},
        ]
    }


def every_answer(view: View) -> list[c.Command]:
    return [
        addressed("a", FITS),
        told(FITS, 1),
        cast(a_vote()),
        c.Tick(),
        c.RequestCancel(expected_revision=None),
    ]


def test_the_token_is_told_nowhere() -> None:
    every: list[c.Command] = every_answer(running())
    events: list[Any] = []
    shown: list[bytes] = []
    for first in every:
        view = running()
        drafts = (
            a_wait_draft("a", remind_at=(NOW + 1,), deadline_at=NOW + 2, on_timeout=BLOCK),
            an_approval_draft(remind_at=(NOW + 1,), deadline_at=NOW + 2),
            a_wait_draft("in", WaitKind.MESSAGE),
        )
        events += play(view, stand_in(*drafts)).events
        shown.append(bytes(flow_of(view).wait_json))  # type: ignore[arg-type]
        events += play(view, first, at=NOW + 1).events
        events += tick(view, NOW + 1).events
        events += tick(view, NOW + 2).events
        for task in drafts:
            assert task.wait is not None
            assert task.wait.token == TOKEN
    view = running()
    events += play(view, set_waiting(view, remind_at=(NOW,), deadline_at=NOW + 1)).events
    events += tick(view, NOW).events
    events += play(view, c.Deliver(task_id="", payload=FITS)).events

    assert len(events) > 40
    for event in events:
        assert TOKEN.encode() not in msgspec.json.encode(event)
    for wait_json in shown:
        assert TOKEN.encode() not in wait_json


# ---- waking ---------------------------------------------------------------------------------------

ENDINGS: dict[str, tuple[Callable[[View], c.Command], TaskStatus]] = {
    "an answer": (lambda view: c.Deliver(task_id="a", payload=FITS), TaskStatus.SUCCEEDED),
    "a withdrawal": (lambda view: c.CancelTask(task_id="A"), TaskStatus.CANCELLED),
    "a letter": (lambda view: addressed("a", FITS), TaskStatus.SUCCEEDED),
}


@pytest.mark.parametrize(("how", "driven", "registered"), list(product(ENDINGS, EITHER, EITHER)))
def test_whatever_ends_the_step_lets_the_flow_go_on(
    how: str, driven: bool, registered: bool
) -> None:
    view = made(lambda: standing_in(a_wait_draft("a")), driven=driven, registered=registered)
    before = flow_of(view)

    turn = play(view, ENDINGS[how][0](view))

    flow = flow_of(view)
    assert turn.tasks["A"].status is ENDINGS[how][1]
    assert flow.status is (RUNNING if driven or registered else QUEUED)
    assert flow.revision == before.revision + 1
    assert types(turn)[-1] is EventType.FLOW_RESUMED
    assert (flow.awaiting, flow.wait_json, flow.park_at) == ((), UNSET, None)
    entered = (StartController("triage"),) if registered and not driven else ()
    assert turn.effects() == entered


@pytest.mark.parametrize(("driven", "registered"), list(product(EITHER, EITHER)))
def test_a_flow_blocked_by_the_step_goes_on_when_it_is_answered_late(
    driven: bool, registered: bool
) -> None:
    def make() -> View:
        view = standing_in(a_wait_draft("a", deadline_at=NOW - 1, on_timeout=BLOCK))
        tick(view, NOW)
        return view

    view = made(make, driven=driven, registered=registered)
    assert flow_of(view).blocked_task_id == "A"

    turn = play(view, c.Deliver(task_id="a", payload=FITS))

    flow = flow_of(view)
    assert flow.status is (RUNNING if driven or registered else QUEUED)
    assert (flow.blocked_task_id, flow.blocked_summary) == (None, None)
    assert (flow.awaiting, flow.wait_json, flow.park_at) == ((), UNSET, None)
    assert turn.effects() == ((StartController("triage"),) if registered and not driven else ())


@pytest.mark.parametrize(
    ("driven", "registered", "answer"),
    list(product(EITHER, EITHER, ["retry", "withdraw"])),
)
def test_a_flow_blocked_by_a_review_goes_on_when_that_is_answered_too(
    driven: bool, registered: bool, answer: str
) -> None:
    def make() -> View:
        view = blocked_by_a_review()
        play(view, stand_in(a_wait_draft("a")))
        return view

    view = made(make, driven=driven, registered=registered)

    first = play(view, c.Deliver(task_id="a", payload=FITS))
    between = flow_of(view)
    answers = {
        "retry": c.RetryTask(task_id="reviewed"),
        "withdraw": c.CancelTask(task_id="reviewed"),
    }
    second = play(view, answers[answer])

    assert between.status is BLOCKED
    assert between.blocked_task_id == "reviewed"
    assert (between.awaiting, between.wait_json, between.park_at) == ((), UNSET, None)
    assert first.effects() == ()
    assert flow_of(view).status is (RUNNING if driven else QUEUED)
    entered = StartController("triage") in second.effects()
    assert entered is (registered and not driven)


def test_a_review_that_is_answered_first_leaves_the_flow_waiting() -> None:
    view = blocked_by_a_review()
    play(view, stand_in(a_wait_draft("a")))

    play(view, c.CancelTask(task_id="reviewed"))

    flow = flow_of(view)
    assert flow.status is WAITING
    assert flow.awaiting == (("A",),)
    assert waited_for(view) == {"kind": "signal", "name": "a"}


def test_a_review_that_comes_while_the_flow_waits_blocks_it_and_then_it_waits_again() -> None:
    task = a_launched("work", run_id="job")
    view = a_telling_view(a_flow(RUNNING), task, running={"work"}, driven=True)
    play(view, stand_in(a_wait_draft("a")))
    odd = Failed(Failure(kind="exception"))

    play(view, c.EndReport(task_id="work", attempt=1, outcome=odd, again=False, review=True))
    blocked = flow_of(view)
    play(view, c.CancelTask(task_id="work"))

    assert blocked.status is BLOCKED
    assert blocked.awaiting == (("A",),)
    assert flow_of(view).status is WAITING
    play(view, c.Deliver(task_id="a", payload=FITS))
    assert flow_of(view).status is RUNNING


@pytest.mark.parametrize("first", ["a", "b"])
def test_the_first_of_a_group_to_end_wakes_the_flow_and_the_other_stays_open(first: str) -> None:
    view = standing_in(a_wait_draft("a"), a_wait_draft("b"))
    other = "b" if first == "a" else "a"

    play(view, c.Deliver(task_id=first, payload=FITS))

    assert flow_of(view).status is RUNNING
    assert flow_of(view).awaiting == ()
    assert list(view.children.active) == [other.upper()]
    before = flow_of(view)
    play(view, c.Deliver(task_id=other, payload=FITS))
    assert view.flow is before


@pytest.mark.parametrize("order", list(permutations(["a", "b", "c"])))
def test_of_several_groups_each_is_woken_by_its_own_step(order: tuple[str, ...]) -> None:
    view = running()
    for name in ("a", "b", "c"):
        play(view, stand_in(a_wait_draft(name), may_park=False))
    assert flow_of(view).awaiting == (("A",), ("B",), ("C",))
    assert [one["name"] for one in waited_for(view)["anyOf"]] == ["a", "b", "c"]

    left = ["a", "b", "c"]
    for name in order:
        before = flow_of(view).revision
        play(view, c.Deliver(task_id=name, payload=FITS))
        left.remove(name)

        flow = flow_of(view)
        assert flow.status is RUNNING
        assert flow.awaiting == tuple((one.upper(),) for one in left)
        assert flow.revision == before + 1


def test_two_groups_that_share_a_step_are_both_over_when_it_ends() -> None:
    view = running()
    play(view, stand_in(a_wait_draft("a"), a_wait_draft("b")))
    play(view, stand_in(a_wait_draft("c"), steps=("a",)))
    assert flow_of(view).awaiting == (("A", "B"), ("A", "C"))

    play(view, c.Deliver(task_id="a", payload=FITS))

    assert flow_of(view).awaiting == ()
    assert flow_of(view).status is RUNNING


def selecting(*drafts: c.TaskDraft, steps: tuple[str, ...] = (), may_park: bool = True) -> c.Await:
    """The controller selects among these."""
    stand = stand_in(*drafts, steps=steps, may_park=may_park)
    return msgspec.structs.replace(stand, withdraw=True)


@pytest.mark.parametrize("first", ["signal", "timer"])
@pytest.mark.parametrize("driven", EITHER)
def test_a_selection_is_decided_and_its_losers_are_withdrawn_in_one_turn(
    driven: bool, first: str
) -> None:
    view = running()
    play(view, selecting(a_wait_draft("a"), a_timer_draft("b", NOW + SECOND), a_wait_draft("c")))
    view.driven = driven
    command = c.Deliver(task_id="a", payload=FITS) if first == "signal" else c.Tick()

    turn = play(view, command, at=NOW + (SECOND if first == "timer" else 0))

    winner = "A" if first == "signal" else "B"
    left = {"A", "B", "C"} - {winner}
    assert turn.tasks[winner].status is TaskStatus.SUCCEEDED
    assert {turn.tasks[loser].status for loser in left} == {TaskStatus.CANCELLED}
    assert next(e.task_id for e in turn.events if e.type == "task.ended") == winner
    assert view.children.active == {}
    assert (flow_of(view).awaiting, flow_of(view).selecting) == ((), ())
    for loser in sorted(left):
        refused(view, c.Deliver(task_id=loser, payload=FITS), Code.UNAWAITED)


def test_of_the_losers_of_a_selection_only_what_nobody_has_begun_ends_with_the_winner() -> None:
    view = a_view(
        a_flow(RUNNING),
        a_launched("runs"),
        a_launched("queued", TaskStatus.QUEUED),
        a_linked("theirs"),
        running={"runs"},
        driven=True,
    )
    view.closing = True
    play(view, selecting(a_wait_draft("a"), steps=("runs", "queued", "theirs")))

    play(view, c.Deliver(task_id="a", payload=FITS))

    assert set(view.children.active) == {"runs", "theirs"}
    assert {task.cancel_requested_at for task in view.children.active.values()} == {None}


def test_a_selection_of_which_one_has_ended_withdraws_the_others_at_once() -> None:
    view = running()
    play(view, c.AddTasks(drafts=(a_wait_draft("a"), a_wait_draft("b"))))
    play(view, c.Deliver(task_id="a", payload=FITS))
    assert "B" in view.children.active, "vacuous"

    turn = play(view, selecting(steps=("a", "b")))

    assert turn.tasks["B"].status is TaskStatus.CANCELLED
    assert flow_of(view).status is RUNNING


def test_what_one_selection_withdraws_wakes_whoever_stands_in_it_as_well() -> None:
    view = running()
    play(view, selecting(a_wait_draft("a"), a_wait_draft("b"), may_park=False))
    play(view, selecting(a_wait_draft("c"), steps=("b",), may_park=False))
    play(view, stand_in(a_wait_draft("d"), steps=("c",), may_park=False))

    play(view, c.Deliver(task_id="a", payload=FITS))

    assert (flow_of(view).awaiting, flow_of(view).selecting) == ((), ())
    assert list(view.children.active) == ["D"]


def test_who_only_stands_withdraws_nothing() -> None:
    view = running()
    play(view, stand_in(a_wait_draft("a"), a_wait_draft("b")))

    play(view, c.Deliver(task_id="a", payload=FITS))

    assert list(view.children.active) == ["B"]


def test_a_group_that_stands_on_is_described_with_the_next() -> None:
    view = running()
    play(view, stand_in(a_wait_draft("a"), may_park=False))
    play(view, stand_in(a_wait_draft("b"), may_park=False))
    play(view, c.Deliver(task_id="b", payload=FITS))

    play(view, stand_in(a_wait_draft("c"), may_park=False))

    assert [one["name"] for one in waited_for(view)["anyOf"]] == ["a", "c"]
    assert flow_of(view).status is WAITING


@pytest.mark.parametrize("driven", EITHER)
@pytest.mark.parametrize("status", [QUEUED, RUNNING])
def test_resuming_by_hand_lets_the_flow_go_on_and_leaves_the_step_open(
    status: FlowStatus, driven: bool
) -> None:
    view = made(lambda: standing_in(a_wait_draft("a")), driven=driven, registered=True)
    revision = flow_of(view).revision

    turn = play(view, c.Resume(expected_revision=revision, patch=NOTHING_TO_PATCH, status=status))

    flow = flow_of(view)
    assert flow.status is status
    assert (flow.awaiting, flow.wait_json, flow.park_at) == ((), UNSET, None)
    assert list(view.children.active) == ["A"]
    # One that is in memory leaves first. Entered again, it asks for the same step, and waits again.
    assert turn.effects() == ((ParkController() if driven else StartController("triage")),)
    if driven:
        view.driven = False
        assert play(view, c.ControllerParked()).effects() == (StartController("triage"),)
    play(view, stand_in(a_wait_draft("a")))
    assert flow_of(view).awaiting == (("A",),)


def test_a_resume_by_hand_sends_nobody_away_who_would_lose_something_by_it() -> None:
    view = standing_in(a_wait_draft("a"), may_park=False, controllers=REGISTERED)
    revision = flow_of(view).revision

    turn = play(view, c.Resume(expected_revision=revision, patch=NOTHING_TO_PATCH, status=RUNNING))

    assert turn.effects() == ()
    assert flow_of(view).status is RUNNING
    assert list(view.children.active) == ["A"]


# ---- the end of the flow --------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["finish", "fail", "cancel", "request_cancel"])
@pytest.mark.parametrize("standing", LIVE_STANDINGS)
def test_every_end_takes_open_waits_timers_and_letters_along(end: str, standing: str) -> None:
    view = made(LIVE_STANDINGS[standing][0], driven=False, registered=False)
    play(view, stand_in(a_wait_draft("a", deadline_at=NOW + SECOND), a_timer_draft("nap", NOW + 5)))
    play(view, told(FITS), addressed("early", FITS, 1), told(FITS, 2, wants_reply=True))
    patch = NOTHING_TO_PATCH
    ends: dict[str, c.Command] = {
        "finish": c.Finish(expected_revision=None, patch=patch),
        "fail": c.Fail(expected_revision=None, patch=patch),
        "cancel": c.Cancel(),
        "request_cancel": c.RequestCancel(expected_revision=None),
    }
    ours = [t for t in view.children.active.values() if t.launch is None]
    assert len(ours) >= 5

    turn = play(view, ends[end])

    assert all(turn.tasks[task.task_id].status is TaskStatus.CANCELLED for task in ours)
    flow = flow_of(view)
    assert has_ended(flow)
    assert (flow.awaiting, flow.wait_json, flow.wait, flow.park_at) == ((), UNSET, None, None)
    assert not view.children.active
    assert not view.children.waits
    assert not view.children.letters


@pytest.mark.parametrize("end", ["cancel", "request_cancel"])
def test_a_cancel_of_a_flow_whose_controller_is_in_memory_waits_for_it(end: str) -> None:
    view = standing_in(a_wait_draft("a"), controllers=REGISTERED)
    commands: dict[str, c.Command] = {
        "cancel": c.Cancel(),
        "request_cancel": c.RequestCancel(expected_revision=None),
    }

    turn = play(view, commands[end])

    assert not has_ended(flow_of(view))
    assert turn.tasks["A"].status is TaskStatus.CANCELLED
    assert flow_of(view).awaiting == ()
    stopped = StopController() in turn.effects()
    assert stopped is (end == "cancel")
    view.driven = False
    play(view, c.ControllerStopped())
    assert flow_of(view).status is FlowStatus.CANCELLED


def test_a_parked_flow_with_other_children_ends_when_the_last_of_them_does() -> None:
    linked = a_linked("theirs")
    view = a_telling_view(a_flow(RUNNING), linked, driven=True, controllers=REGISTERED)
    play(view, stand_in(a_wait_draft("a")))
    tick(view, NOW + PARK_MS)
    view.driven = False

    turn = play(view, c.RequestCancel(expected_revision=None))
    between = flow_of(view)
    play(view, c.EndReport(task_id="theirs", outcome=Succeeded()))

    assert not has_ended(between)
    assert turn.effects() == ()
    assert flow_of(view).status is FlowStatus.CANCELLED


# ---- going on without an answer -------------------------------------------------------------------


@pytest.mark.parametrize(("driven", "registered"), list(product(EITHER, EITHER)))
def test_a_controller_that_stops_waiting_runs_again_and_its_step_stays_open(
    driven: bool, registered: bool
) -> None:
    view = made(lambda: standing_in(a_wait_draft("a")), driven=driven, registered=registered)
    before = flow_of(view).revision

    turn = play(view, c.StopAwaiting(steps=("a",)))

    flow = flow_of(view)
    assert flow.status is (RUNNING if driven or registered else QUEUED)
    assert flow.revision == before + 1
    assert (flow.awaiting, flow.wait_json, flow.park_at) == ((), UNSET, None)
    assert view.children.active["A"].status is TaskStatus.QUEUED
    assert turn.effects() == ((StartController("triage"),) if registered and not driven else ())


@pytest.mark.parametrize("steps", [(), ("nobody",), ("a",), ("b",), ("a", "b", "c")], ids=",".join)
def test_steps_that_nobody_stands_in_so_are_nothing_to_stop(steps: tuple[str, ...]) -> None:
    view = standing_in(a_wait_draft("a"), a_wait_draft("b"))

    ignored(view, c.StopAwaiting(steps=steps))


@pytest.mark.parametrize("steps", [("b", "a"), ("A", "B"), ("B", "a", "b")], ids=",".join)
def test_the_steps_may_be_named_in_any_order_and_way(steps: tuple[str, ...]) -> None:
    view = standing_in(a_wait_draft("a"), a_wait_draft("b"))

    play(view, c.StopAwaiting(steps=steps))

    assert flow_of(view).awaiting == ()


def test_one_group_that_is_stopped_leaves_the_others() -> None:
    view = running()
    play(view, stand_in(a_wait_draft("a"), may_park=False))
    play(view, stand_in(a_wait_draft("b"), may_park=False))

    play(view, c.StopAwaiting(steps=("a",)))

    assert flow_of(view).awaiting == (("B",),)
    assert flow_of(view).status is RUNNING


def test_nothing_is_stopped_twice_nor_after_the_answer_nor_after_the_end() -> None:
    twice = standing_in(a_wait_draft("a"))
    play(twice, c.StopAwaiting(steps=("a",)))
    answered = standing_in(a_wait_draft("a"))
    play(answered, c.Deliver(task_id="a", payload=FITS))
    ended = standing_in(a_wait_draft("a"))
    play(ended, c.Finish(expected_revision=None, patch=NOTHING_TO_PATCH))

    for view in (twice, answered, ended):
        ignored(view, c.StopAwaiting(steps=("a",)))
    refused(a_view(None), c.StopAwaiting(steps=("a",)), Code.NOT_FOUND)


def test_a_flow_blocked_by_the_step_runs_again_when_its_controller_stops_waiting() -> None:
    view = standing_in(a_wait_draft("a", deadline_at=NOW - 1, on_timeout=BLOCK))
    tick(view, NOW)

    play(view, c.StopAwaiting(steps=("a",)))

    assert flow_of(view).status is RUNNING
    assert flow_of(view).blocked_task_id is None


def test_a_flow_blocked_by_a_review_stays_so_when_its_controller_stops_waiting() -> None:
    view = blocked_by_a_review()
    play(view, stand_in(a_wait_draft("a")))

    play(view, c.StopAwaiting(steps=("a",)))

    assert flow_of(view).status is BLOCKED
    assert flow_of(view).blocked_task_id == "reviewed"
    assert flow_of(view).awaiting == ()


# ---- parking --------------------------------------------------------------------------------------


def test_a_controller_that_has_stood_long_enough_leaves_memory_and_its_flow_waits_on() -> None:
    view = standing_in(a_wait_draft("a"))
    before = flow_of(view)

    early = tick(view, NOW + PARK_MS - 1)
    parked = tick(view, NOW + PARK_MS)
    flow = flow_of(view)
    again = tick(view, NOW + 2 * PARK_MS)

    assert types(early) == types(again) == []
    assert types(parked) == [EventType.FLOW_PARKED]
    assert parked.effects() == (ParkController(),)
    assert flow.revision == before.revision + 1
    assert (flow.status, flow.awaiting) == (WAITING, (("A",),))
    assert flow.park_at is None
    assert view.flow is flow


@pytest.mark.parametrize("registered", EITHER)
def test_one_that_is_gone_already_is_entered_again_and_nothing_is_written(registered: bool) -> None:
    view = made(lambda: standing_in(a_wait_draft("a")), driven=False, registered=registered)

    before = flow_of(view)
    turn = tick(view, NOW + PARK_MS)

    assert view.flow is before
    assert turn.effects() == ((StartController("triage"),) if registered else ())


@pytest.mark.parametrize("first", EITHER)
def test_one_that_may_not_leave_stays_whatever_it_stands_in_besides(first: bool) -> None:
    view = running()
    play(view, stand_in(a_wait_draft("a"), may_park=first))
    play(view, stand_in(a_wait_draft("b"), may_park=not first))
    assert flow_of(view).park_at == NEVER_PARKED

    turn = tick(view, NOW + 1000 * PARK_MS)

    assert types(turn) == []
    assert turn.effects() == ()
    assert may_be_in_memory(flow_of(view))


def test_one_that_may_not_leave_stays_also_after_another_of_its_steps_was_answered() -> None:
    view = running()
    play(view, stand_in(a_wait_draft("a"), may_park=False))
    play(view, stand_in(a_wait_draft("b")))
    play(view, c.Deliver(task_id="b", payload=FITS))
    play(view, stand_in(a_wait_draft("c")))

    turn = tick(view, NOW + PARK_MS)

    assert turn.effects() == ()


def test_how_long_a_controller_stays_is_a_limit() -> None:
    view = a_telling_view(a_flow(), driven=True, limits=Limits(park_seconds=0.0015))

    play(view, stand_in(a_wait_draft("a")))

    assert flow_of(view).park_at == NOW + 2


def test_an_answer_that_comes_with_the_instant_of_parking_wakes_it_instead() -> None:
    view = standing_in(a_timer_draft("nap", NOW + PARK_MS))

    turn = tick(view, NOW + PARK_MS)

    assert turn.effects() == ()
    assert flow_of(view).status is RUNNING
    assert flow_of(view).park_at is None


@pytest.mark.parametrize("blocked_by", ["review", "step"])
def test_a_blocked_flow_parks_its_controller_as_well(blocked_by: str) -> None:
    view = blocked_by_a_review() if blocked_by == "review" else running()
    play(view, stand_in(a_wait_draft("a", deadline_at=NOW + 1, on_timeout=BLOCK)))
    tick(view, NOW + 1)
    assert flow_of(view).status is BLOCKED

    turn = tick(view, NOW + PARK_MS)

    assert turn.effects() == (ParkController(),)
    assert flow_of(view).park_at is None
    assert flow_of(view).status is BLOCKED


@pytest.mark.parametrize("registered", EITHER)
def test_a_parked_flow_that_nothing_has_woken_is_left_alone(registered: bool) -> None:
    view = made(lambda: standing_in(a_wait_draft("a")), driven=True, registered=registered)
    tick(view, NOW + PARK_MS)
    view.driven = False

    ignored(view, c.ControllerParked())
    ignored(view, c.Recover())


WOKEN: dict[str, Callable[[View], c.Command]] = {
    "an answer": lambda view: c.Deliver(task_id="a", payload=FITS),
    "a withdrawal": lambda view: c.CancelTask(task_id="A"),
    "a resume": lambda view: c.Resume(
        expected_revision=flow_of(view).revision, patch=NOTHING_TO_PATCH, status=QUEUED
    ),
    "its own code": lambda view: c.StopAwaiting(steps=("a",)),
}


@pytest.mark.parametrize(("how", "registered"), list(product(WOKEN, EITHER)))
def test_a_flow_that_is_woken_while_its_controller_leaves_is_entered_again(
    how: str, registered: bool
) -> None:
    view = made(lambda: standing_in(a_wait_draft("a")), driven=True, registered=registered)
    tick(view, NOW + PARK_MS)

    # Its coroutine has not come to its end yet.
    woken = play(view, WOKEN[how](view))
    view.driven = False
    turn = play(view, c.ControllerParked())

    # A resume by hand asks it to leave, which it is about to.
    assert woken.effects() == ((ParkController(),) if how == "a resume" else ())
    assert turn.effects() == ((StartController("triage"),) if registered else ())
    assert turn.events == []


def test_one_that_leaves_a_flow_with_a_cancel_requested_ends_it() -> None:
    view = standing_in(a_wait_draft("a"), controllers=REGISTERED)
    tick(view, NOW + PARK_MS)
    play(view, c.RequestCancel(expected_revision=None))
    assert not has_ended(flow_of(view))

    view.driven = False
    turn = play(view, c.ControllerParked())

    assert flow_of(view).status is FlowStatus.CANCELLED
    assert turn.effects() == ()


@pytest.mark.parametrize("status", ENDED)
def test_one_that_leaves_a_flow_that_has_ended_changes_nothing(status: FlowStatus) -> None:
    ignored(a_view(a_flow(status), controllers=REGISTERED), c.ControllerParked())


def test_a_flow_that_waits_by_hand_by_then_is_not_entered() -> None:
    view = standing_in(a_wait_draft("a"), controllers=REGISTERED)
    tick(view, NOW + PARK_MS)
    play(view, set_waiting(view))
    view.driven = False

    ignored(view, c.ControllerParked())


def test_nobody_can_leave_a_flow_that_is_not_there() -> None:
    refused(a_view(None), c.ControllerParked(), Code.NOT_FOUND)


# ---- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("may_park", EITHER)
def test_a_controller_that_a_crash_found_in_memory_is_entered_again(
    registered: bool, may_park: bool
) -> None:
    view = made(
        lambda: standing_in(a_wait_draft("a"), may_park=may_park),
        driven=False,
        registered=registered,
    )
    before = flow_of(view)

    turn = play(view, c.Recover(), c.Tick())

    assert may_be_in_memory(before)
    assert view.flow is before
    assert turn.events == []
    # Told twice to enter it where it has stood long enough as well; it is entered once.
    assert set(turn.effects()) == ({StartController("triage")} if registered else set())


def test_a_controller_that_a_crash_found_blocked_is_entered_again_unless_it_was_parked() -> None:
    view = blocked_by_a_step_in_no_time()
    view.driven, view.controllers = False, REGISTERED

    turn = play(view, c.Recover())

    assert turn.effects() == (StartController("triage"),)
    assert turn.events == []


def test_a_flow_that_waits_by_hand_has_no_controller_in_memory() -> None:
    view = waiting_by_hand()
    view.driven, view.controllers = False, REGISTERED

    assert not may_be_in_memory(flow_of(view))
    ignored(view, c.Recover())


def test_opening_and_standing_and_an_answer_may_share_one_turn() -> None:
    view = running()

    turn = play(view, stand_in(a_wait_draft("a")), c.Deliver(task_id="a", payload=FITS))

    assert turn.tasks["A"].status is TaskStatus.SUCCEEDED
    assert flow_of(view).status is RUNNING
    assert flow_of(view).revision == 9
    assert types(turn) == [
        EventType.TASK_CREATED,
        EventType.FLOW_WAITING,
        EventType.TASK_ENDED,
        EventType.FLOW_RESUMED,
    ]


# ---- a step that blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("a", "nap"), ("nap", "a")], ids=",".join)
def test_a_step_that_nobody_stands_in_does_not_hold_the_flow_up(order: tuple[str, ...]) -> None:
    view = a_telling_view(a_flow(), driven=True, controllers=REGISTERED)
    play(view, c.AddTasks(drafts=(a_wait_draft("a", deadline_at=NOW + 1, on_timeout=BLOCK),)))
    play(view, stand_in(a_timer_draft("nap", NOW + 9)))
    tick(view, NOW + 1)
    view.driven = False

    for name in order:
        if name == "a":
            play(view, c.Deliver(task_id="a", payload=FITS))
        else:
            tick(view, NOW + 9)

    assert flow_of(view).status is RUNNING
    assert flow_of(view).blocked_task_id is None


def test_a_step_whose_time_is_over_blocks_the_flow_once_it_is_waited_for() -> None:
    view = running()
    play(view, c.AddTasks(drafts=(a_wait_draft("a", deadline_at=NOW + 1, on_timeout=BLOCK),)))
    tick(view, NOW + 1)
    assert flow_of(view).status is RUNNING

    play(view, stand_in(steps=("a",)))

    assert flow_of(view).status is BLOCKED
    assert flow_of(view).blocked_task_id == "A"


def test_a_step_whose_time_is_over_blocks_the_flow_once_a_review_has_been_answered() -> None:
    view = blocked_by_a_review()
    play(view, stand_in(a_wait_draft("a", deadline_at=NOW + 1, on_timeout=BLOCK)))
    tick(view, NOW + 1)
    assert flow_of(view).blocked_task_id == "reviewed"

    play(view, c.CancelTask(task_id="reviewed"))

    assert flow_of(view).status is BLOCKED
    assert flow_of(view).blocked_task_id == "A"


def test_one_of_several_steps_that_blocks_lets_go_when_another_of_its_group_is_answered() -> None:
    view = standing_in(a_wait_draft("a", deadline_at=NOW + 1, on_timeout=BLOCK), a_wait_draft("b"))
    tick(view, NOW + 1)
    assert flow_of(view).blocked_task_id == "A"

    play(view, c.Deliver(task_id="b", payload=FITS))

    assert flow_of(view).status is RUNNING
    assert flow_of(view).blocked_task_id is None


def test_withdrawing_the_step_that_blocks_lets_the_flow_go_on() -> None:
    view = blocked_by_a_step_in_no_time()

    play(view, c.CancelTask(task_id="OTHER"))

    assert flow_of(view).status is RUNNING
    assert flow_of(view).blocked_task_id is None


def test_a_wait_is_no_linked_child_that_somebody_could_report_on() -> None:
    view = standing_in(a_wait_draft("a"))

    for report in (
        c.StartReport(task_id="A"),
        c.EndReport(task_id="A", outcome=Succeeded()),
    ):
        refused(view, report, Code.NOT_LINKED)
    refused(view, c.RetryTask(task_id="A"), Code.NOT_RETRYABLE)
    ignored(view, c.ReleaseTasks(task_ids=("A",)))
    ignored(view, c.EndReport(task_id="A", outcome=Succeeded(), attempt=0))


def test_an_approval_that_is_decided_wakes_its_controller() -> None:
    view = standing_in(an_approval_draft())

    turn = play(view, cast(a_vote(VoteKind.REJECT)))

    assert decoded(turn.tasks["OK"].result_json)["verdict"] == "rejected"
    assert flow_of(view).status is RUNNING


def test_a_turn_that_stands_changes_no_view_that_is_merely_looked_at() -> None:
    view = running()
    turn = a_turn(view)
    turn.take(stand_in(a_wait_draft("a")), "someone")

    # The answer shows the flow as the command left it.
    answer = turn.take(c.Deliver(task_id="a", payload=FITS), "someone")

    assert answer.flow is not None
    assert answer.flow.status is WAITING
    assert flow_of(view).status is RUNNING
