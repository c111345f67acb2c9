"""What answers a wait: signals, messages and votes, in every standing, in time and too late, of every shape."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw, UnsetType

from flowstead.model import command as c
from flowstead.model.approval import Verdict, VoteKind
from flowstead.model.code import Code
from flowstead.model.effect import StartController
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, SyncMode
from flowstead.model.limits import Limits
from flowstead.model.task import Succeeded, TaskStatus
from flowstead.model.wait import OnTimeout, WaitKind, inbox_of
from flowstead.rules.children import Children
from flowstead.rules.view import View
from flowstead.rules.wait_keys import token_digest, wait_key
from tests.unit.given import ENDED, NOTHING_TO_PATCH, NOW, a_flow, a_linked, a_view, in_review
from tests.unit.given_waits import (
    DAY,
    FITS,
    MISFIT,
    SCHEMA,
    SECOND,
    TOKEN,
    Checked,
    a_letter,
    a_telling_view,
    a_timer_draft,
    a_vote,
    a_wait_draft,
    addressed,
    an_approval,
    an_approval_draft,
    cast,
    decoded,
    flow_of,
    ignored,
    play,
    refused,
    set_waiting,
    stand_in,
    standing_in,
    tick,
    told,
    types,
)

PROFILE = settings(deadline=None, derandomize=True, database=None)
REGISTERED = frozenset({"triage"})
BLOCK = OnTimeout.BLOCK
WAITING, BLOCKED = FlowStatus.WAITING, FlowStatus.BLOCKED
RUNNING, QUEUED = FlowStatus.RUNNING, FlowStatus.QUEUED
EITHER = (False, True)

ANSWERED, CANCELLED = TaskStatus.SUCCEEDED, TaskStatus.CANCELLED
FAILED, OPEN = TaskStatus.FAILED, TaskStatus.QUEUED


def with_steps(status: FlowStatus = RUNNING, **fields: Any) -> View:
    """A flow that has opened one wait of each kind, and stands in none."""
    view = a_telling_view(a_flow(RUNNING), driven=True, **fields)
    opened = (
        a_wait_draft("a", wait_key="k"),
        an_approval_draft(),
        a_wait_draft("in", WaitKind.MESSAGE),
        a_timer_draft("nap", NOW + DAY),
    )
    play(view, c.AddTasks(drafts=opened))
    if status is QUEUED:
        play(view, c.Resume(expected_revision=7, patch=NOTHING_TO_PATCH, status=QUEUED))
    return view


def waiting_by_hand(**wait: Any) -> View:
    view = with_steps()
    play(view, set_waiting(view, **wait))
    return view


def in_the_step() -> View:
    view = with_steps()
    play(view, stand_in(steps=("a", "ok", "in")))
    return view


def blocked_by_hand() -> View:
    view = with_steps()
    command = msgspec.structs.replace(set_waiting(view), blocked_summary="odd")
    play(view, command)
    return view


def blocked_by_a_review() -> View:
    view = with_steps()
    view.children.put(in_review())
    play(view, c.Wake())
    return view


def blocked_by_its_own_deadline() -> View:
    view = waiting_by_hand(deadline_at=NOW - 1, on_timeout=BLOCK)
    tick(view, NOW)
    return view


def blocked_by_a_step() -> View:
    view = with_steps()
    play(view, stand_in(a_wait_draft("slow", deadline_at=NOW - 1, on_timeout=BLOCK)))
    tick(view, NOW)
    return view


LIVE_STANDINGS: dict[str, tuple[Callable[[], View], FlowStatus]] = {
    "queued": (lambda: with_steps(QUEUED), QUEUED),
    "running": (with_steps, RUNNING),
    "waiting by hand": (waiting_by_hand, WAITING),
    "waiting in the step": (in_the_step, WAITING),
    "blocked by hand": (blocked_by_hand, BLOCKED),
    "blocked by a review": (blocked_by_a_review, BLOCKED),
    "blocked by its own deadline": (blocked_by_its_own_deadline, BLOCKED),
    "blocked by a step": (blocked_by_a_step, BLOCKED),
}
HAS_OWN = {"waiting by hand", "blocked by hand", "blocked by its own deadline"}

# What reaches a step of the flow, and the step it reaches.
TO_STEPS: dict[str, tuple[Callable[[], c.Command], str]] = {
    "a signal by key": (lambda: c.Deliver(wait_key="k", payload=FITS), "A"),
    "a signal by name": (lambda: c.Deliver(task_id="a", payload=FITS), "A"),
    "a signal by token": (lambda: c.Deliver(task_id="A", payload=FITS), "A"),
    "a signal to a step": (lambda: addressed("a", FITS), "A"),
    "a message": (lambda: told(FITS), "IN"),
    "a question": (lambda: told(FITS, wants_reply=True), "IN"),
    "a vote by name": (lambda: cast(a_vote()), "OK"),
    "a vote by token": (lambda: cast(a_vote(), "OK"), "OK"),
}


@pytest.mark.parametrize("name", LIVE_STANDINGS)
def test_the_standings_are_what_they_are_called(name: str) -> None:
    make, status = LIVE_STANDINGS[name]
    view = make()

    assert flow_of(view).status is status
    assert {"A", "OK", "IN", "NAP"} <= view.children.active.keys()


# ---- who can be reached ---------------------------------------------------------------------------


@pytest.mark.parametrize(("standing", "how"), list(product(LIVE_STANDINGS, TO_STEPS)))
def test_an_open_step_is_answered_however_its_live_flow_stands(standing: str, how: str) -> None:
    view = LIVE_STANDINGS[standing][0]()
    before = flow_of(view)
    command, step = TO_STEPS[how]

    turn = play(view, command())

    assert turn.tasks[step].status is ANSWERED
    assert step not in view.children.active
    goes_on = standing == "waiting in the step"
    # The vote is the last one: it leaves a grant, unless somebody has changed the flow by hand meanwhile.
    grown = goes_on + (step == "OK" and standing not in HAS_OWN)
    assert flow_of(view).revision == before.revision + grown
    assert flow_of(view).status is (RUNNING if goes_on else before.status)
    assert len([t for t in types(turn) if t.startswith("flow.")]) == grown


@pytest.mark.parametrize(("how", "driven"), list(product(TO_STEPS, EITHER)))
@pytest.mark.parametrize("begun", EITHER, ids=["intent", "cancel begun"])
def test_nothing_is_answered_once_a_cancel_is_requested(
    how: str, driven: bool, begun: bool
) -> None:
    started = NOW - 1 if begun else None
    linked = a_linked("theirs")
    view = a_view(a_flow(RUNNING, intent=True, cancel_started_at=started), linked, driven=driven)

    refused(view, TO_STEPS[how][0](), Code.CANCEL_REQUESTED)
    refused(view, c.Deliver(task_id="", payload=FITS), Code.CANCEL_REQUESTED)


@pytest.mark.parametrize(("how", "status"), list(product(TO_STEPS, ENDED)))
def test_what_comes_to_a_flow_that_has_ended_is_late(how: str, status: FlowStatus) -> None:
    view = a_view(a_flow(status))

    reason = refused(view, TO_STEPS[how][0](), Code.LATE)

    assert status in reason


@pytest.mark.parametrize("how", TO_STEPS)
def test_no_flow_is_not_found_and_one_that_follows_a_task_is_not_managed(how: str) -> None:
    command = TO_STEPS[how][0]()

    refused(a_view(None), command, Code.NOT_FOUND)
    refused(a_view(a_flow(sync_mode=SyncMode.TASK_MIRRORED)), command, Code.NOT_MANAGED)


@pytest.mark.parametrize("standing", LIVE_STANDINGS)
@pytest.mark.parametrize("by", ["key", "flow"])
def test_the_wait_of_the_flow_itself_is_answered_where_it_has_one(standing: str, by: str) -> None:
    view = LIVE_STANDINGS[standing][0]()
    key, task_id = ("reply", None) if by == "key" else (None, "")
    command = c.Deliver(wait_key=key, task_id=task_id, payload=FITS, signal_id="s1")
    if standing not in HAS_OWN:
        refused(view, command, Code.UNAWAITED)
        return
    before = flow_of(view)

    turn = play(view, command)

    flow = flow_of(view)
    assert flow.status is RUNNING, "its controller is in memory"
    assert flow.revision == before.revision + 1
    assert decoded(flow.answer_json) == {"payload": "fits", "at": NOW, "signalId": "s1"}
    assert (flow.wait_json, flow.wait, flow.blocked_task_id) == (UNSET, None, None)
    assert flow.wait_key == "reply"
    assert types(turn) == [EventType.FLOW_RESUMED]
    assert turn.events[0].cause == "s1"
    refused(view, command, Code.UNAWAITED)


@pytest.mark.parametrize(("driven", "registered"), list(product(EITHER, EITHER)))
def test_an_answered_flow_enters_its_controller_where_one_is_registered_and_none_runs(
    driven: bool, registered: bool
) -> None:
    view = waiting_by_hand()
    view.driven = driven
    view.controllers = REGISTERED if registered else frozenset()

    turn = play(view, c.Deliver(task_id=""))

    assert turn.effects() == ((StartController("triage"),) if registered and not driven else ())
    assert flow_of(view).status is (RUNNING if driven else QUEUED)
    assert decoded(flow_of(view).answer_json) == {"payload": None, "at": NOW}


def test_a_flow_that_a_review_blocks_has_its_answer_and_stays_blocked() -> None:
    view = waiting_by_hand()
    view.controllers = REGISTERED
    view.children.put(in_review())
    play(view, c.Wake())
    assert flow_of(view).blocked_task_id == "reviewed"
    view.driven = False

    turn = play(view, c.Deliver(task_id="", payload=FITS))
    between = flow_of(view)
    after = play(view, c.CancelTask(task_id="reviewed"))

    assert types(turn) == [EventType.FLOW_UPDATED]
    assert turn.effects() == ()
    assert (between.status, between.blocked_task_id) == (BLOCKED, "reviewed")
    assert (between.wait_json, between.wait) == (UNSET, None)
    assert decoded(between.answer_json)["payload"] == "fits"
    assert flow_of(view).status is QUEUED
    assert StartController("triage") in after.effects()


# ---- which wait -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        c.Deliver(wait_key="another", payload=FITS),
        c.Deliver(task_id="nobody", payload=FITS),
        c.Deliver(task_id="theirs", payload=FITS),
        c.Deliver(payload=FITS),
    ],
    ids=["another key", "no such step", "a child that is no wait", "nothing named"],
)
def test_what_nobody_waits_for_changes_nothing(command: c.Command) -> None:
    view = waiting_by_hand()
    view.children.put(a_linked("theirs"))

    refused(view, command, Code.UNAWAITED)


def test_one_signal_answers_one_wait_of_a_flow_and_of_several_steps_the_oldest() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for name in ("z", "a", "m"):
        play(view, c.AddTasks(drafts=(a_wait_draft(name, wait_key="k"),)))
    signal = c.Deliver(wait_key="k", payload=FITS)

    order = [next(iter(play(view, signal).tasks)) for _ in range(3)]

    assert order == ["Z", "A", "M"]
    refused(view, signal, Code.UNAWAITED)


def test_a_wait_of_the_flow_and_one_of_a_step_on_the_same_key_take_a_signal_each() -> None:
    view = with_steps()
    play(view, set_waiting(view, wait_key="k"))
    signal = c.Deliver(wait_key="k", payload=FITS)

    first = play(view, signal)
    second = play(view, signal)

    assert bool(first.tasks) is not bool(second.tasks)
    assert decoded(flow_of(view).answer_json)["payload"] == "fits"
    assert "A" not in view.children.active
    refused(view, signal, Code.UNAWAITED)


def test_a_wait_without_a_key_is_answered_by_none() -> None:
    view = waiting_by_hand(wait_key=None)

    refused(view, c.Deliver(wait_key=None, payload=FITS), Code.UNAWAITED)
    play(view, c.Deliver(task_id="", payload=FITS))


@pytest.mark.parametrize(
    ("step", "says"), [("ok", "a vote"), ("nap", "the clock"), ("OK", "a vote")]
)
def test_an_approval_and_a_timer_are_answered_by_no_signal(step: str, says: str) -> None:
    view = in_the_step()

    assert says in refused(view, c.Deliver(task_id=step, payload=FITS), Code.UNAWAITED)
    assert step in view.children.active or step.upper() in view.children.active


def test_an_approval_is_answered_by_no_signal_to_its_step_either() -> None:
    refused(in_the_step(), addressed("ok", FITS), Code.UNAWAITED)


@pytest.mark.parametrize("by", ["key", "flow"])
def test_a_wait_from_before_waits_woke_anybody_is_answered_by_its_key_or_its_flow(by: str) -> None:
    key = wait_key("agent:main:main", {"kind": "reply"})
    view = a_view(a_flow(WAITING, wait_key=key))

    play(view, c.Deliver(wait_key=key) if by == "key" else c.Deliver(task_id=""))

    assert flow_of(view).status is QUEUED
    assert flow_of(view).wait_json is UNSET


def test_one_without_plain_fields_is_answered_by_its_flow() -> None:
    view = a_view(a_flow(WAITING, wait_json=Raw(b'{"on":["x"]}')))

    play(view, c.Deliver(task_id=""))

    assert flow_of(view).status is QUEUED


@pytest.mark.parametrize(("token", "fits"), [(TOKEN, True), ("the one before", False)])
def test_a_token_of_the_flow_answers_no_other_wait_than_its_own(token: str, fits: bool) -> None:
    view = waiting_by_hand()
    command = c.Deliver(task_id="", token=token_digest(token), payload=FITS)

    if fits:
        play(view, command)
        assert flow_of(view).status is RUNNING
    else:
        refused(view, command, Code.LATE)


def test_a_wait_for_nothing_is_not_answered_by_the_key_of_the_one_before() -> None:
    view = waiting_by_hand()
    play(view, c.Deliver(wait_key="reply"))
    command = set_waiting(view, b"null")
    play(view, msgspec.structs.replace(command, wait=None))

    refused(view, c.Deliver(wait_key="reply"), Code.UNAWAITED)


def test_a_signal_for_a_step_that_is_over_is_late_also_where_it_is_not_to_be_kept() -> None:
    view = in_the_step()
    play(view, c.Deliver(task_id="a", payload=FITS))

    refused(view, c.Deliver(task_id="a", payload=FITS), Code.LATE)
    # By its id it is only known to be answered no more; that its token was used is for the door to say.
    refused(view, c.Deliver(task_id="A", payload=FITS), Code.UNAWAITED)


# ---- what a wait is answered with -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "result"),
    [(UNSET, None), (Raw(b"null"), None), (Raw(b'{"a":[1]}'), {"a": [1]}), (Raw(b"0"), 0)],
    ids=["none", "null", "object", "zero"],
)
@pytest.mark.parametrize("how", ["by key", "by name", "by letter"])
def test_the_answer_is_the_payload_as_it_came(
    payload: Raw | UnsetType, result: Any, how: str
) -> None:
    view = in_the_step()
    commands: dict[str, c.Command] = {
        "by key": c.Deliver(wait_key="k", payload=payload, signal_id="s1"),
        "by name": c.Deliver(task_id="a", payload=payload, signal_id="s1"),
        "by letter": addressed("a", payload),
    }

    turn = play(view, commands[how])

    task = turn.tasks["A"]
    assert decoded(task.result_json) == result
    assert task.ended_at == NOW
    ended = [e for e in turn.events if e.type == "task.ended" and e.task_id == "A"]
    assert len(ended) == 1
    assert ended[0].cause == (None if how == "by letter" else "s1")
    assert "resultJson" not in ended[0].changed


def test_a_message_comes_in_its_envelope() -> None:
    by_hand, asked, by_token = in_the_step(), in_the_step(), in_the_step()

    one = play(by_hand, told(FITS))
    two = play(asked, told(FITS, wants_reply=True))
    three = play(by_token, c.Deliver(task_id="IN", payload=FITS))

    assert decoded(one.tasks["IN"].result_json) == {
        "id": "letter-0",
        "body": "fits",
        "wantsReply": False,
    }
    assert decoded(two.tasks["IN"].result_json)["wantsReply"] is True
    assert decoded(three.tasks["IN"].result_json) == {
        "id": None,
        "body": "fits",
        "wantsReply": False,
    }


# ---- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_timeout", [OnTimeout.FAIL, OnTimeout.RESUME])
@pytest.mark.parametrize(("after", "is_late"), [(-1, False), (0, True), (1, True)])
@pytest.mark.parametrize("whose", ["step", "flow", "letter"])
def test_an_answer_at_the_deadline_or_after_it_is_late_also_before_the_tick(
    on_timeout: OnTimeout, after: int, is_late: bool, whose: str
) -> None:
    fields: dict[str, Any] = {"deadline_at": NOW, "on_timeout": on_timeout}
    view = a_telling_view(a_flow(RUNNING), driven=True, now=NOW - SECOND)
    if whose == "flow":
        play(view, set_waiting(view, **fields))
    else:
        play(view, stand_in(a_wait_draft("a", **fields)))
    commands: dict[str, c.Command] = {
        "step": c.Deliver(task_id="a", payload=FITS),
        "flow": c.Deliver(task_id="", payload=FITS),
        "letter": addressed("a", FITS),
    }
    view.now = NOW + after

    if is_late:
        refused(view, commands[whose], Code.LATE)
    else:
        play(view, commands[whose])
        assert flow_of(view).status in (RUNNING, QUEUED)


@pytest.mark.parametrize("on_timeout", [OnTimeout.FAIL, OnTimeout.RESUME])
@pytest.mark.parametrize(("after", "is_kept"), [(-1, False), (0, True), (1, True)])
@pytest.mark.parametrize("wants_reply", EITHER)
def test_a_message_too_late_for_the_wait_that_is_open_is_kept_for_the_next(
    on_timeout: OnTimeout, after: int, is_kept: bool, wants_reply: bool
) -> None:
    fields: dict[str, Any] = {"deadline_at": NOW, "on_timeout": on_timeout}
    view = a_telling_view(a_flow(RUNNING), driven=True, now=NOW - SECOND)
    play(view, stand_in(a_wait_draft("first", WaitKind.MESSAGE, inbox="in", **fields)))

    view.now = NOW + after
    turn = play(view, told(FITS, wants_reply=wants_reply))
    assert (turn.tasks.get("FIRST") is None) == is_kept
    tick(view, NOW + SECOND)
    after_it = play(view, stand_in(a_wait_draft("next", WaitKind.MESSAGE, inbox="in")))

    assert (after_it.tasks["NEXT"].ended_at is not None) == is_kept


def test_a_message_too_late_for_one_wait_is_taken_by_another_that_is_open() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True, now=NOW - SECOND)
    overdue = a_wait_draft("overdue", WaitKind.MESSAGE, inbox="in", deadline_at=NOW)
    play(view, stand_in(overdue, a_wait_draft("open", WaitKind.MESSAGE, inbox="in")))

    turn = play(view, told(FITS), at=NOW)

    assert turn.tasks["OPEN"].ended_at == NOW
    assert "OVERDUE" not in turn.tasks


@pytest.mark.parametrize("ticked", EITHER)
@pytest.mark.parametrize("whose", ["step", "flow"])
def test_a_wait_that_blocks_at_its_deadline_is_answered_later_whether_the_tick_has_come_or_not(
    ticked: bool, whose: str
) -> None:
    fields: dict[str, Any] = {"deadline_at": NOW, "on_timeout": BLOCK}
    view = a_telling_view(a_flow(RUNNING), driven=True, now=NOW - SECOND)
    if whose == "flow":
        play(view, set_waiting(view, **fields))
    else:
        play(view, stand_in(a_wait_draft("a", **fields)))
    view.now = NOW + 1
    if ticked:
        tick(view, NOW + 1)
        assert flow_of(view).status is BLOCKED

    play(view, c.Deliver(task_id="" if whose == "flow" else "a", payload=FITS))

    assert flow_of(view).status is RUNNING
    assert flow_of(view).blocked_summary is None


def test_a_wait_whose_time_is_over_does_not_keep_a_signal_from_a_younger_one() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    old = a_wait_draft("old", wait_key="k", deadline_at=NOW)
    young = a_wait_draft("young", wait_key="k", deadline_at=NOW + DAY)
    play(view, c.AddTasks(drafts=(old, young)))

    turn = play(view, c.Deliver(wait_key="k", payload=FITS))

    assert turn.tasks["YOUNG"].status is ANSWERED


# ---- shapes ---------------------------------------------------------------------------------------

WITH_SHAPES: dict[
    str, tuple[Callable[[View], c.Command], Callable[[Raw | UnsetType], c.Command]]
] = {
    "a step": (
        lambda view: stand_in(a_wait_draft("a", schema=SCHEMA)),
        lambda payload: c.Deliver(task_id="a", payload=payload),
    ),
    "the flow": (
        lambda view: set_waiting(view, schema=SCHEMA),
        lambda payload: c.Deliver(task_id="", payload=payload),
    ),
    "a letter": (
        lambda view: stand_in(a_wait_draft("a", schema=SCHEMA)),
        lambda payload: addressed("a", payload),
    ),
    "a message": (
        lambda view: stand_in(a_wait_draft("in", WaitKind.MESSAGE, schema=SCHEMA)),
        lambda payload: told(payload),
    ),
}


@pytest.mark.parametrize("whose", WITH_SHAPES)
@pytest.mark.parametrize("payload", [MISFIT, UNSET, Raw(b"null")], ids=["misfit", "none", "null"])
def test_an_answer_of_the_wrong_shape_is_refused_and_the_wait_stays_open_for_a_better_one(
    whose: str, payload: Raw | UnsetType
) -> None:
    opened, answered = WITH_SHAPES[whose]
    view = a_telling_view(a_flow(RUNNING), driven=True)
    shapes = view.shapes = Checked()
    play(view, opened(view))

    reason = refused(view, answered(payload), Code.WRONG_SHAPE)
    assert reason == "$ is of the wrong shape. The wait stays open."
    assert flow_of(view).status is WAITING
    play(view, answered(FITS))

    assert flow_of(view).status in (RUNNING, QUEUED)
    asked = None if payload is UNSET else bytes(payload)
    assert shapes.asked == [(bytes(SCHEMA), asked), (bytes(SCHEMA), bytes(FITS))]


def test_no_shape_is_looked_at_where_none_is_asked_for_nor_after_the_deadline() -> None:
    plain = in_the_step()
    over = standing_in(a_wait_draft("a", schema=SCHEMA, deadline_at=NOW))
    plain.shapes = over.shapes = shapes = Checked()

    play(plain, c.Deliver(task_id="a", payload=MISFIT))
    refused(over, c.Deliver(task_id="a", payload=MISFIT), Code.LATE)

    assert shapes.asked == []


# ---- letters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_messages_are_taken_in_the_order_in_which_they_came_and_each_once(count: int) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for n in range(count):
        play(view, told(Raw(str(n).encode()), n))
    assert view.children.untaken == count

    bodies = []
    for n in range(count):
        receive = a_wait_draft(f"r{n}", WaitKind.MESSAGE, inbox="in")
        turn = play(view, stand_in(receive))
        bodies.append(decoded(turn.tasks[f"R{n}"].result_json))

    assert [told["body"] for told in bodies] == list(range(count))
    assert [told["id"] for told in bodies] == [f"letter-{n}" for n in range(count)]
    assert view.children.untaken == 0
    assert flow_of(view).status is RUNNING


def test_messages_keep_their_order_over_a_restart() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for n in range(3):
        play(view, told(Raw(str(n).encode()), n))
    stored = sorted(view.children.active.values(), key=lambda task: task.key)
    view.children = Children.of(stored, [])

    turn = play(view, stand_in(a_wait_draft("r", WaitKind.MESSAGE, inbox="in")))

    assert decoded(turn.tasks["R"].result_json)["body"] == 0


def test_who_waits_longest_is_told_first() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for name in ("z", "a"):
        draft = a_wait_draft(name, WaitKind.MESSAGE, inbox="in")
        play(view, c.AddTasks(drafts=(draft,)))

    first, second = play(view, told(FITS, 0)), play(view, told(FITS, 1))

    assert "Z" in first.tasks
    assert "A" in second.tasks


@pytest.mark.parametrize("letters", [1, 2, 3])
def test_two_waits_that_are_opened_at_once_take_a_message_each(letters: int) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for n in range(letters):
        play(view, told(FITS, n))
    drafts = [a_wait_draft(name, WaitKind.MESSAGE, inbox="in") for name in ("one", "two")]

    turn = play(view, c.AddTasks(drafts=tuple(drafts)))

    ends = [event.task_id for event in turn.events if event.type == EventType.TASK_ENDED]
    assert len(ends) == len(set(ends)) == 2 * min(letters, 2)
    assert view.children.untaken == max(letters - 2, 0)


def test_a_message_for_another_inbox_is_nobodys_here() -> None:
    view = in_the_step()

    turn = play(view, told(FITS, inbox="other"))

    assert turn.tasks["letter-0"].status is OPEN
    assert flow_of(view).status is WAITING


@pytest.mark.parametrize("early", EITHER)
@pytest.mark.parametrize("opened", ["stood in", "opened beside"])
def test_a_signal_to_a_step_is_taken_whether_it_comes_before_the_step_or_after(
    early: bool, opened: str
) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    draft = a_wait_draft("a")
    opening = stand_in(draft) if opened == "stood in" else c.AddTasks(drafts=(draft,))
    commands: list[c.Command] = [addressed("a", FITS), opening]

    turns = [play(view, one) for one in (commands if early else commands[::-1])]

    tasks = turns[0].tasks | turns[1].tasks
    assert tasks["A"].status is ANSWERED
    assert decoded(tasks["A"].result_json) == "fits"
    assert tasks["letter-0"].status is ANSWERED
    assert not view.children.active
    assert flow_of(view).status is RUNNING


def test_of_early_letters_one_answers_and_the_others_wait_until_nobody_wants_them() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for n in range(3):
        play(view, addressed("a", Raw(str(n).encode()), n))

    turn = play(view, stand_in(a_wait_draft("a")))
    over = tick(view, NOW + DAY)

    assert decoded(turn.tasks["A"].result_json) == 0
    assert {t.status for i, t in over.tasks.items() if i.startswith("letter")} == {CANCELLED}
    assert not view.children.active


def test_an_early_letter_of_the_wrong_shape_is_put_aside_and_the_next_is_tried() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    view.shapes = Checked()
    for n, payload in enumerate([MISFIT, UNSET, FITS, FITS]):
        play(view, addressed("a", payload, n))

    turn = play(view, stand_in(a_wait_draft("a", schema=SCHEMA)))

    assert turn.tasks["A"].status is ANSWERED
    aside = [turn.tasks[f"letter-{n}"] for n in (0, 1)]
    assert [task.status for task in aside] == [FAILED, FAILED]
    assert {task.failure.code for task in aside if task.failure} == {"wrong_shape"}
    assert turn.tasks["letter-2"].status is ANSWERED
    assert "letter-3" not in turn.tasks


def test_a_step_that_finds_only_letters_of_the_wrong_shape_waits() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    view.shapes = Checked()
    play(view, addressed("a", MISFIT))

    turn = play(view, stand_in(a_wait_draft("a", schema=SCHEMA)))

    assert turn.tasks["letter-0"].status is FAILED
    assert flow_of(view).status is WAITING
    assert list(view.children.active) == ["A"]


@pytest.mark.parametrize("after", [-1, 0, 1])
def test_a_step_that_is_opened_after_its_deadline_takes_no_early_letter(after: int) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    play(view, addressed("a", FITS))

    turn = play(view, stand_in(a_wait_draft("a", deadline_at=NOW - after)))

    in_time = after < 0
    assert (turn.tasks["A"].status is ANSWERED) is in_time
    assert ("letter-0" in turn.tasks) is in_time  # else it stays, for the next wait of this name


@pytest.mark.parametrize("after", [0, 1])
def test_messages_outlive_a_wait_that_is_opened_after_its_deadline(after: int) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for n in range(3):
        play(view, told(Raw(str(n).encode()), n))
    asked = {"inbox": "in", "on_timeout": OnTimeout.RESUME}

    late = play(
        view, stand_in(a_wait_draft("a", WaitKind.MESSAGE, deadline_at=NOW - after, **asked))
    )
    tick(view, NOW)
    turns = [play(view, stand_in(a_wait_draft(name, WaitKind.MESSAGE, **asked))) for name in "bcd"]

    assert late.tasks["A"].status is OPEN
    assert view.children.untaken == 0
    bodies = [decoded(t.tasks[n].result_json)["body"] for t, n in zip(turns, "BCD", strict=True)]
    assert bodies == [0, 1, 2]


@pytest.mark.parametrize("after", [0, 1])
def test_a_letter_whose_time_is_over_is_not_taken_whether_the_tick_has_come_or_not(
    after: int,
) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    play(view, addressed("a", FITS, expires_at=NOW + SECOND))

    turn = play(view, stand_in(a_wait_draft("a")), at=NOW + SECOND + after)

    assert turn.tasks["A"].status is OPEN


@pytest.mark.parametrize("ended_by", ["answer", "withdrawal", "deadline"])
def test_a_signal_to_a_step_that_is_over_is_late_and_not_kept(ended_by: str) -> None:
    view = standing_in(a_wait_draft("a", deadline_at=NOW + 1))
    ends: dict[str, c.Command] = {
        "answer": c.Deliver(task_id="a"),
        "withdrawal": c.CancelTask(task_id="A"),
        "deadline": c.Tick(),
    }
    play(view, ends[ended_by], at=NOW + (ended_by == "deadline"))
    assert not view.children.active

    reason = refused(view, addressed("a", FITS), Code.LATE)

    assert "'a'" in reason


@pytest.mark.parametrize("limit", [1, 3])
def test_messages_that_nobody_has_taken_are_bounded(limit: int) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True, limits=Limits(messages=limit))
    for n in range(limit):
        play(view, told(FITS, n, inbox=f"{n}"))

    for command in (told(FITS, 9), addressed("a", FITS, 9), cast(a_vote(), n=9)):
        assert str(limit) in refused(view, command, Code.OVERLOADED)

    # Whoever waits is told all the same, and then there is room again.
    play(view, stand_in(a_wait_draft("in", WaitKind.MESSAGE)))
    play(view, told(FITS, 10))
    play(view, stand_in(a_wait_draft("r", WaitKind.MESSAGE, inbox="0")))
    play(view, told(FITS, 11, inbox="in"))
    assert view.children.untaken == limit


def test_what_json_cannot_hold_is_refused_after_the_flow_has_been_looked_at() -> None:
    broken = c.Defect(Code.INVALID_STATE, "message is nan. Nothing was written.")
    letter = msgspec.structs.replace(a_letter("inbox:in"), input_json=broken)

    refused(in_the_step(), c.Tell(draft=letter), Code.INVALID_STATE)
    refused(a_view(a_flow(FlowStatus.FAILED)), c.Tell(draft=letter), Code.LATE)


# ---- questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", EITHER)
def test_a_question_stays_open_until_it_is_replied_to(early: bool) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    receive = stand_in(a_wait_draft("in", WaitKind.MESSAGE))
    commands: list[c.Command] = [told(FITS, wants_reply=True), receive]
    for command in commands if early else commands[::-1]:
        play(view, command)
    letter = view.children.active["letter-0"]
    assert letter.letter is not None

    reply = c.EndReport(task_id="letter-0", outcome=Succeeded(), result=Raw(b"7"))
    turn = play(view, reply)

    assert (letter.status, letter.letter.taken_by) == (TaskStatus.RUNNING, "in")
    assert turn.tasks["letter-0"].status is ANSWERED
    assert decoded(turn.tasks["letter-0"].result_json) == 7
    assert not view.children.active
    ignored(view, reply)


def test_a_question_that_was_taken_is_handed_to_nobody_else_and_does_not_expire() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    play(view, told(FITS, wants_reply=True, expires_at=NOW + SECOND))
    play(view, stand_in(a_wait_draft("in", WaitKind.MESSAGE)))

    play(view, stand_in(a_wait_draft("r", WaitKind.MESSAGE, inbox="in")))
    tick(view, NOW + DAY)

    assert view.children.active["letter-0"].status is TaskStatus.RUNNING
    assert flow_of(view).awaiting == (("R",),)
    assert view.children.untaken == 0


# ---- votes ----------------------------------------------------------------------------------------


def test_an_approval_that_needs_several_votes_stays_open_until_the_last() -> None:
    rules = {"quorum": 2}
    view = standing_in(an_approval_draft(rules=rules))
    before = flow_of(view)

    one = play(view, cast(a_vote(approver="ann", rules=rules)))
    between = flow_of(view)
    two = play(view, cast(a_vote(approver="bob", rules=rules)))

    assert types(one) == [EventType.TASK_VOTED]
    assert one.events[0].changed == {"approver": "ann", "vote": "approve", "role": None}
    assert between is before
    assert types(two) == [
        EventType.TASK_VOTED,
        EventType.TASK_ENDED,
        EventType.FLOW_UPDATED,
        EventType.FLOW_RESUMED,
    ]
    result = decoded(two.tasks["OK"].result_json)
    assert result["verdict"] == Verdict.APPROVED
    assert [vote["approver"] for vote in result["votes"]] == ["ann", "bob"]
    assert result["items"] == {"eur": 5}
    assert result["digest"] == result["asked"] == an_approval(**rules).digest
    assert flow_of(view).grants["ok"].used_by is None
    assert flow_of(view).revision == before.revision + 2


@pytest.mark.parametrize("kind", [VoteKind.REJECT])
def test_what_is_rejected_grants_nothing(kind: VoteKind) -> None:
    view = standing_in(an_approval_draft())

    turn = play(view, cast(a_vote(kind)))

    assert decoded(turn.tasks["OK"].result_json)["verdict"] == Verdict.REJECTED
    assert flow_of(view).grants == {}


@pytest.mark.parametrize(
    "fields",
    [{"digest": "another"}, {"approver": " "}, {"items": Raw(b"1")}],
    ids=["another digest", "nobody", "items without an edit"],
)
def test_a_vote_that_does_not_count_leaves_the_approval_open(fields: dict[str, Any]) -> None:
    view = standing_in(an_approval_draft())

    reason = refused(view, cast(a_vote(**fields)), Code.NOT_APPROVED)

    assert "Nothing was counted" in reason
    play(view, cast(a_vote()))


def test_an_edit_of_the_wrong_shape_is_refused_and_one_that_fits_is_what_is_approved() -> None:
    view = standing_in(an_approval_draft(schema=SCHEMA))
    view.shapes = Checked()

    reason = refused(view, cast(a_vote(VoteKind.EDIT, items=MISFIT)), Code.WRONG_SHAPE)
    turn = play(view, cast(a_vote(VoteKind.EDIT, items=FITS)))

    assert reason.endswith("The approval stays open.")
    result = decoded(turn.tasks["OK"].result_json)
    assert (result["verdict"], result["items"]) == (Verdict.APPROVED, "fits")
    assert result["asked"] == an_approval().digest != result["digest"]


@pytest.mark.parametrize(("after", "verdict"), [(-1, "approved"), (0, "expired"), (1, "expired")])
def test_a_vote_at_the_deadline_or_after_it_finds_the_approval_expired(
    after: int, verdict: str
) -> None:
    view = standing_in(an_approval_draft(deadline_at=NOW + SECOND))

    turn = play(view, cast(a_vote()), at=NOW + SECOND + after)

    assert decoded(turn.tasks["OK"].result_json)["verdict"] == verdict
    assert bool(flow_of(view).grants) is (verdict == "approved")
    assert flow_of(view).status is RUNNING


@pytest.mark.parametrize(
    ("changed_by", "verdict"),
    [("hand", "stale"), ("controller", "approved"), ("step", "stale"), ("nothing", "approved")],
)
def test_an_approval_is_stale_once_somebody_else_has_changed_what_the_flow_holds(
    changed_by: str, verdict: str
) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    play(view, c.AddTasks(drafts=(an_approval_draft(),)))
    patch = c.Patch(state_json=Raw(b"1"))
    if changed_by == "step":
        patch = c.Patch(current_step="other")
    if changed_by != "nothing":
        by_controller = changed_by == "controller"
        revision = flow_of(view).revision
        play(
            view,
            c.Update(expected_revision=revision, patch=patch, by_controller=by_controller),
        )

    turn = play(view, cast(a_vote()))

    assert decoded(turn.tasks["OK"].result_json)["verdict"] == verdict
    assert bool(flow_of(view).grants) is (verdict == "approved")


@pytest.mark.parametrize("by", ["ok", "OK"])
def test_a_vote_on_an_approval_that_is_decided_is_late(by: str) -> None:
    view = standing_in(an_approval_draft())
    play(view, cast(a_vote()))

    late = msgspec.structs.replace(cast(a_vote(approver="bob"), by), early=None)

    refused(view, late, Code.LATE)
    if by == "ok":
        refused(view, cast(a_vote(approver="bob"), n=1), Code.LATE)


def test_a_vote_on_a_step_that_is_no_approval_is_late() -> None:
    refused(in_the_step(), cast(a_vote(), "a"), Code.LATE)


@pytest.mark.parametrize("opened", ["stood in", "opened beside"])
def test_votes_that_come_before_the_question_are_counted_when_it_is_asked(opened: str) -> None:
    rules = {"quorum": 2}
    view = a_telling_view(a_flow(RUNNING), driven=True)
    for n, approver in enumerate(["ann", "ann", "bob", "cleo"]):
        play(view, cast(a_vote(approver=approver, rules=rules), n=n, expires_at=NOW + DAY))
    draft = an_approval_draft(rules=rules)

    turn = play(view, stand_in(draft) if opened == "stood in" else c.AddTasks(drafts=(draft,)))

    result = decoded(turn.tasks["OK"].result_json)
    assert result["verdict"] == Verdict.APPROVED
    assert [vote["approver"] for vote in result["votes"]] == ["ann", "bob"]
    letters = {i: task.status for i, task in turn.tasks.items() if i.startswith("letter")}
    assert letters == {"letter-0": ANSWERED, "letter-1": FAILED, "letter-2": ANSWERED}
    assert view.children.active.keys() == {"letter-3"}
    assert flow_of(view).grants.keys() == {"ok"}
    assert flow_of(view).status is RUNNING


def test_an_early_vote_about_something_else_does_not_count() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    play(view, cast(a_vote(digest="another"), expires_at=NOW + DAY))

    turn = play(view, stand_in(an_approval_draft()))

    assert turn.tasks["letter-0"].status is FAILED
    assert turn.tasks["OK"].status is OPEN
    assert flow_of(view).grants == {}


# ---- letters of another kind ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [Raw(b'{"x":1}'), UNSET, Raw(msgspec.json.encode(a_vote()))],
    ids=["no vote", "nothing", "a vote"],
)
def test_an_early_signal_is_no_vote_whatever_it_says(payload: Raw | UnsetType) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    play(view, addressed("ok", payload))

    turn = play(view, stand_in(an_approval_draft()))

    assert turn.tasks["OK"].status is OPEN
    assert flow_of(view).grants == {}


def test_an_early_vote_answers_no_wait_for_a_signal() -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    play(view, cast(a_vote(), expires_at=NOW + DAY))

    turn = play(view, stand_in(a_wait_draft("ok")))

    assert turn.tasks["OK"].status is OPEN


@pytest.mark.parametrize("name", ["in", "message:in", "inbox:in"])
def test_a_message_answers_no_wait_for_a_signal_however_that_is_called(name: str) -> None:
    view = standing_in(a_wait_draft(name))

    turn = play(view, told(FITS))

    assert turn.tasks["letter-0"].status is OPEN
    assert flow_of(view).status is WAITING


# ---- every order of letters and waits -------------------------------------------------------------

mail = st.lists(
    st.one_of(
        st.tuples(st.just("tell"), st.sampled_from(["x", "y"]), st.booleans()),
        st.tuples(st.just("receive"), st.sampled_from(["x", "y"]), st.booleans()),
        st.tuples(st.just("restart"), st.just(""), st.booleans()),
        st.tuples(st.just("withdraw"), st.sampled_from(["x", "y"]), st.booleans()),
    ),
    min_size=3,
    max_size=14,
)


@given(mail=mail)
@settings(PROFILE, max_examples=300)
def test_whatever_the_order_each_message_is_taken_once_and_in_order(
    mail: list[tuple[str, str, bool]],
) -> None:
    view = a_telling_view(a_flow(RUNNING), driven=True)
    sent: dict[str, list[str]] = {"x": [], "y": []}
    got: dict[str, list[str]] = {"x": [], "y": []}
    asked = 0

    def note(turn: Any) -> None:
        for task in turn.tasks.values():
            if task.wait is not None and task.status is ANSWERED:
                got[task.wait.inbox[-1]].append(decoded(task.result_json)["id"])

    for n, (what, inbox, flag) in enumerate(mail):
        if what == "tell":
            note(play(view, told(FITS, n, inbox=inbox, wants_reply=flag)))
            sent[inbox].append(f"letter-{n}")
        elif what == "receive":
            asked += 1
            draft = a_wait_draft(f"r{n}", WaitKind.MESSAGE, inbox=inbox)
            note(play(view, stand_in(draft) if flag else c.AddTasks(drafts=(draft,))))
        elif what == "withdraw":
            open_ones = [t for t in view.children.open_waits() if t.wait and t.wait.inbox]
            if open_ones:
                play(view, c.CancelTask(task_id=open_ones[-1].task_id))
        else:
            active = list(view.children.active.values())
            view.children = Children.of(active, list(view.children.run_ids.items()))

    for inbox in sent:
        assert got[inbox] == sent[inbox][: len(got[inbox])]
        waits = [
            t
            for t in view.children.open_waits()
            if t.wait and t.wait.inbox == inbox_of(WaitKind.MESSAGE, inbox)
        ]
        untaken = view.children.letters_in(inbox_of(WaitKind.MESSAGE, inbox))
        assert not (waits and untaken), "they have missed each other"
        assert len(got[inbox]) + len(untaken) == len(sent[inbox])
