"""What is due of waits: seen to at its instant or later, once, and agreed on by the rows and the tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.effect import ParkController, StartController
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, NotifyPolicy, has_ended
from flowstead.model.task import TaskStatus, is_active
from flowstead.model.update import UpdateKind
from flowstead.model.wait import OnTimeout, WaitKind
from flowstead.rules.ladder import flow_due_at, task_due_at
from flowstead.rules.turn import Turn
from flowstead.rules.view import View
from flowstead.rules.waits import NEVER_PARKED
from tests.unit.given import ENDED, NOTHING_TO_PATCH, NOW, a_flow, a_linked, a_view, in_review
from tests.unit.given_waits import (
    DAY,
    FITS,
    PARK_MS,
    SECOND,
    a_letter,
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
    tick,
    told,
    types,
)

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
REGISTERED = frozenset({"triage"})
FAIL, RESUME, BLOCK = OnTimeout.FAIL, OnTimeout.RESUME, OnTimeout.BLOCK
WAITING, BLOCKED = FlowStatus.WAITING, FlowStatus.BLOCKED
RUNNING, QUEUED = FlowStatus.RUNNING, FlowStatus.QUEUED
EITHER = (False, True)


def running(**fields: Any) -> View:
    return a_telling_view(a_flow(RUNNING, **fields), driven=True)


def next_due(view: View) -> int | None:
    """The earliest instant in the rows."""
    flow = flow_of(view)
    tasks = view.children.active.values()
    dues = [flow_due_at(flow, view.limits), *(task_due_at(task, view.limits) for task in tasks)]
    return min((at for at in dues if at is not None), default=None)


# ---- timers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("late_by", [0, 1, SECOND, 400 * DAY])
def test_a_timer_fires_at_its_instant_or_later_and_once(late_by: int) -> None:
    view = standing_in(a_timer_draft("nap", NOW + SECOND))

    early = tick(view, NOW + SECOND - 1)
    fired = tick(view, NOW + SECOND + late_by)

    assert early.events == []
    assert types(fired) == [EventType.TASK_ENDED, EventType.FLOW_RESUMED]
    task = fired.tasks["NAP"]
    assert (task.status, decoded(task.result_json)) == (TaskStatus.SUCCEEDED, None)
    assert task.ended_at == NOW + SECOND + late_by
    assert next_due(view) is None
    ignored(view, c.Tick())


def test_a_clock_that_is_set_back_fires_nothing_early_and_nothing_twice() -> None:
    view = standing_in(a_timer_draft("one", NOW + SECOND), a_timer_draft("two", NOW + 9 * SECOND))

    first = tick(view, NOW + SECOND)
    back = tick(view, NOW - DAY)
    again = tick(view, NOW + SECOND)
    second = tick(view, NOW + 9 * SECOND)

    assert [list(turn.tasks) for turn in (first, back, again, second)] == [["ONE"], [], [], ["TWO"]]


def test_all_timers_that_are_due_fire_in_one_tick_and_wake_the_flow_once() -> None:
    drafts = [a_timer_draft(f"n{n}", NOW + n) for n in range(5)]
    view = standing_in(*drafts)

    turn = tick(view, NOW + 3)

    assert list(turn.tasks) == ["N0", "N1", "N2", "N3"]
    assert types(turn).count(EventType.FLOW_RESUMED) == 1
    assert next_due(view) == NOW + 4


def test_a_timer_that_is_due_before_it_is_asked_for_fires_at_once() -> None:
    view = running()
    play(view, stand_in(a_timer_draft("nap", NOW - DAY)))

    turn = tick(view, NOW)

    assert turn.tasks["NAP"].status is TaskStatus.SUCCEEDED


# ---- deadlines of steps ---------------------------------------------------------------------------

HOW_THE_STEP_STANDS: dict[str, Callable[[c.TaskDraft], View]] = {}


def stands(name: str) -> Callable[[Callable[[c.TaskDraft], View]], Callable[[c.TaskDraft], View]]:
    def note(make: Callable[[c.TaskDraft], View]) -> Callable[[c.TaskDraft], View]:
        HOW_THE_STEP_STANDS[name] = make
        return make

    return note


@stands("waited for")
def _waited_for(draft: c.TaskDraft) -> View:
    return standing_in(draft)


@stands("open beside a running controller")
def _beside(draft: c.TaskDraft) -> View:
    view = running()
    play(view, c.AddTasks(drafts=(draft,)))
    return view


@stands("open beside another wait")
def _beside_another(draft: c.TaskDraft) -> View:
    view = _beside(draft)
    play(view, stand_in(a_wait_draft("other")))
    return view


@stands("waited for during a review")
def _during_a_review(draft: c.TaskDraft) -> View:
    view = running()
    view.children.put(in_review())
    play(view, c.Wake(), stand_in(draft))
    return view


@pytest.mark.parametrize("standing", HOW_THE_STEP_STANDS)
@pytest.mark.parametrize("on_timeout", [FAIL, RESUME])
@pytest.mark.parametrize("kind", [WaitKind.SIGNAL, WaitKind.MESSAGE])
def test_a_step_that_nobody_has_answered_in_time_ends_as_timed_out(
    standing: str, on_timeout: OnTimeout, kind: WaitKind
) -> None:
    draft = a_wait_draft("a", kind, deadline_at=NOW + SECOND, on_timeout=on_timeout)
    view = HOW_THE_STEP_STANDS[standing](draft)
    before = flow_of(view).status

    early = tick(view, NOW + SECOND - 1)
    turn = tick(view, NOW + SECOND)

    assert early.events == []
    task = turn.tasks["A"]
    assert task.status is TaskStatus.TIMED_OUT
    assert task.failure is not None
    assert (task.failure.kind, task.failure.code) == ("timed_out", "wait")
    assert "'a'" in (task.failure.message or "")
    assert flow_of(view).status is (RUNNING if standing == "waited for" else before)
    assert not turn.updates()
    ignored(view, c.Tick())


@pytest.mark.parametrize("standing", HOW_THE_STEP_STANDS)
def test_a_step_that_blocks_stays_open_and_blocks_the_flow_that_stands_in_it(standing: str) -> None:
    draft = a_wait_draft(
        "a", deadline_at=NOW + SECOND, on_timeout=BLOCK, remind_at=(NOW + 2 * SECOND,)
    )
    view = HOW_THE_STEP_STANDS[standing](draft)
    before = flow_of(view)

    turn = tick(view, NOW + SECOND)

    task = turn.tasks["A"]
    assert task.status is TaskStatus.QUEUED
    assert task.wait is not None
    assert (task.wait.deadline_at, task.wait.remind_at) == (None, ())
    flow = flow_of(view)
    if standing == "waited for":
        assert types(turn) == [EventType.TASK_OVERDUE, EventType.FLOW_BLOCKED]
        assert (flow.status, flow.blocked_task_id) == (BLOCKED, "A")
        assert flow.blocked_summary == "no answer to 'a' in time"
        assert flow.awaiting == (("A",),)
        assert flow.wait_json is not UNSET
    else:
        assert types(turn) == [EventType.TASK_OVERDUE]
        assert flow is before
    ignored(view, c.Tick())
    # It is not too late.
    play(view, c.Deliver(task_id="a", payload=FITS))
    assert flow_of(view).blocked_task_id != "A"


@pytest.mark.parametrize("needed", [1, 2])
def test_an_approval_that_expires_ends_with_that_verdict_and_the_votes_so_far(needed: int) -> None:
    rules = {"quorum": needed}
    view = standing_in(an_approval_draft(rules=rules, deadline_at=NOW + SECOND))
    if needed == 2:
        play(view, cast(a_vote(rules=rules)))

    early = tick(view, NOW + SECOND - 1)
    turn = tick(view, NOW + SECOND)

    assert early.events == []
    task = turn.tasks["OK"]
    assert task.status is TaskStatus.SUCCEEDED
    result = decoded(task.result_json)
    assert result["verdict"] == "expired"
    assert len(result["votes"]) == needed - 1
    assert flow_of(view).grants == {}
    assert flow_of(view).status is RUNNING
    ignored(view, c.Tick())


# ---- deadlines of the flow's own wait -------------------------------------------------------------


def by_hand(*, is_blocked: bool = False, reviewed: bool = False, **wait: Any) -> View:
    view = running()
    summary = "odd" if is_blocked else None
    play(view, msgspec.structs.replace(set_waiting(view, **wait), blocked_summary=summary))
    if reviewed:
        view.children.put(in_review())
        play(view, c.Wake())
    return view


OWN_STANDINGS: dict[str, dict[str, bool]] = {
    "waiting": {},
    "blocked by hand": {"is_blocked": True},
    "blocked by a review": {"reviewed": True},
}


@pytest.mark.parametrize("standing", OWN_STANDINGS)
@pytest.mark.parametrize("late_by", [0, 400 * DAY])
def test_a_flow_that_fails_at_its_deadline_has_failed_as_timed_out(
    standing: str, late_by: int
) -> None:
    view = by_hand(**OWN_STANDINGS[standing], deadline_at=NOW + SECOND)
    before = flow_of(view)

    early = tick(view, NOW + SECOND - 1)
    turn = tick(view, NOW + SECOND + late_by)

    flow = flow_of(view)
    assert early.events == []
    assert flow.status is FlowStatus.FAILED
    assert flow.failure is not None
    assert (flow.failure.kind, flow.failure.code) == ("timed_out", "wait")
    assert (flow.wait_json, flow.wait) == (UNSET, None)
    assert flow.revision == before.revision + 1
    assert [update.slot for update in turn.updates()] == ["done"]
    refused(view, c.Deliver(task_id="", payload=FITS), Code.LATE)
    ignored(view, c.Tick())


@pytest.mark.parametrize("standing", OWN_STANDINGS)
@pytest.mark.parametrize(("driven", "registered"), list(product(EITHER, EITHER)))
def test_a_flow_that_resumes_at_its_deadline_is_answered_that_its_time_was_over(
    standing: str, driven: bool, registered: bool
) -> None:
    view = by_hand(**OWN_STANDINGS[standing], deadline_at=NOW + SECOND, on_timeout=RESUME)
    view.driven = driven
    view.controllers = REGISTERED if registered else frozenset()
    before = flow_of(view)

    turn = tick(view, NOW + SECOND)

    flow = flow_of(view)
    reviewed = standing == "blocked by a review"
    assert decoded(flow.answer_json) == {"timedOut": True, "at": NOW + SECOND}
    goes_on = RUNNING if driven else QUEUED
    assert flow.status is (BLOCKED if reviewed else goes_on)
    assert flow.revision == before.revision + 1
    assert (flow.wait_json, flow.wait) == (UNSET, None)
    entered = registered and not driven and not reviewed
    assert (StartController("triage") in turn.effects()) is entered
    refused(view, c.Deliver(task_id="", payload=FITS), Code.UNAWAITED)
    ignored(view, c.Tick())


@pytest.mark.parametrize("standing", OWN_STANDINGS)
def test_a_flow_that_blocks_at_its_deadline_waits_on_without_one(standing: str) -> None:
    view = by_hand(**OWN_STANDINGS[standing], deadline_at=NOW + SECOND, on_timeout=BLOCK)
    before = flow_of(view)

    turn = tick(view, NOW + SECOND)

    flow = flow_of(view)
    assert types(turn) == [EventType.FLOW_BLOCKED]
    assert flow.status is BLOCKED
    assert flow.revision == before.revision + 1
    assert flow.wait is not None
    assert flow.wait.deadline_at is None
    assert flow.wait_json is not UNSET
    blocked_by = (flow.blocked_task_id, flow.blocked_summary)
    if standing == "waiting":
        assert blocked_by == (None, "no answer in time")
    else:
        assert blocked_by == (before.blocked_task_id, before.blocked_summary)
    ignored(view, c.Tick())
    play(view, c.Deliver(task_id="", payload=FITS))
    reviewed = standing == "blocked by a review"
    assert flow_of(view).status is (BLOCKED if reviewed else RUNNING)


def test_a_flow_that_was_to_block_is_blocked_once_a_review_has_been_answered() -> None:
    view = by_hand(reviewed=True, deadline_at=NOW + SECOND, on_timeout=BLOCK)
    tick(view, NOW + SECOND)

    play(view, c.CancelTask(task_id="reviewed"))

    flow = flow_of(view)
    assert (flow.status, flow.blocked_task_id) == (BLOCKED, None)
    assert flow.blocked_summary == "no answer in time"


@pytest.mark.parametrize("how", ["answer", "resume", "new wait", "update"])
def test_a_deadline_is_over_with_its_wait_and_with_nothing_else(how: str) -> None:
    view = by_hand(deadline_at=NOW + SECOND)
    revision = flow_of(view).revision
    commands: dict[str, c.Command] = {
        "answer": c.Deliver(task_id=""),
        "resume": c.Resume(expected_revision=revision, patch=NOTHING_TO_PATCH, status=QUEUED),
        "new wait": set_waiting(view, deadline_at=NOW + 9 * SECOND),
        "update": c.Update(expected_revision=revision, patch=c.Patch(current_step="x")),
    }
    play(view, commands[how])

    turn = tick(view, NOW + SECOND)

    assert has_ended(flow_of(view)) is (how == "update")
    assert bool(turn.events) is (how == "update")


# ---- nothing is due any more ----------------------------------------------------------------------


@pytest.mark.parametrize("begun", EITHER, ids=["intent", "cancel begun"])
@pytest.mark.parametrize("on_timeout", OnTimeout)
def test_no_deadline_changes_anything_once_a_cancel_is_requested(
    begun: bool, on_timeout: OnTimeout
) -> None:
    view = by_hand(deadline_at=NOW + 1, on_timeout=on_timeout, remind_at=(NOW + 1,))
    view.children.put(a_linked("theirs"))
    play(view, c.RequestCancel(expected_revision=None))
    if begun:
        play(view, msgspec.structs.replace(c.Cancel()))
    if has_ended(flow_of(view)):
        pytest.fail("vacuous: there is nothing left to look at")
    view.now = NOW + 2

    ignored(view, c.Tick())


@pytest.mark.parametrize("status", ENDED)
def test_nothing_of_a_flow_that_has_ended_is_due(status: FlowStatus) -> None:
    flow = a_flow(status)

    assert flow_due_at(flow, a_view(flow).limits) is None
    ignored(a_view(flow, now=NOW + 400 * DAY), c.Tick())


# ---- reminders ------------------------------------------------------------------------------------

REMIND_AT = (NOW + SECOND, NOW + 2 * SECOND, NOW + 3 * SECOND)


def reminded(whose: str, **fields: Any) -> View:
    given = {"remind_at": REMIND_AT, "deadline_at": NOW + 9 * SECOND, **fields}
    if whose == "step":
        return standing_in(a_wait_draft("a", **given), may_park=False)
    if whose == "approval":
        return standing_in(an_approval_draft("a", **given), may_park=False)
    return by_hand(**given)


def reminders(turn: Turn) -> list[str]:
    return [update.slot for update in turn.updates() if update.kind is UpdateKind.REMINDER]


@pytest.mark.parametrize("whose", ["step", "approval", "flow"])
def test_each_reminder_goes_out_once_at_its_instant(whose: str) -> None:
    view = reminded(whose)

    told_at = [
        at - NOW
        for at in range(NOW, NOW + 5 * SECOND, SECOND // 2)
        if reminders(tick(view, at)) or reminders(tick(view, at))
    ]

    assert told_at == [SECOND, 2 * SECOND, 3 * SECOND]
    assert next_due(view) == (NOW + 9 * SECOND if whose == "flow" else NEVER_PARKED)


@pytest.mark.parametrize("whose", ["step", "approval", "flow"])
@pytest.mark.parametrize("missed", [1, 2, 3])
def test_several_that_were_missed_are_one(whose: str, missed: int) -> None:
    view = reminded(whose, prompt="Well?")
    before = flow_of(view)

    turn = tick(view, REMIND_AT[missed - 1])

    [update] = turn.updates()
    assert update.kind is UpdateKind.REMINDER
    assert update.text == "Reminder: Well?"
    assert update.slot.endswith(str(REMIND_AT[missed - 1]))
    is_own = whose == "flow"
    assert types(turn) == [EventType.FLOW_REMINDED if is_own else EventType.TASK_REMINDED]
    assert turn.events[0].changed == {}
    assert flow_of(view).revision == before.revision + is_own
    wait = flow_of(view).wait if is_own else view.children.active["A"].wait
    assert wait is not None
    assert wait.remind_at == REMIND_AT[missed:]


@pytest.mark.parametrize(
    ("whose", "text"),
    [("step", "still waiting for 'a'"), ("flow", "still waiting for 'wait'")],
)
def test_a_reminder_without_a_prompt_names_what_is_waited_for(whose: str, text: str) -> None:
    [update] = tick(reminded(whose), REMIND_AT[0]).updates()

    assert update.text == f"Reminder: {text}"


@pytest.mark.parametrize("whose", ["step", "approval", "flow"])
@pytest.mark.parametrize("on_timeout", OnTimeout)
def test_nobody_is_reminded_at_the_deadline_or_after_it(whose: str, on_timeout: OnTimeout) -> None:
    deadline = REMIND_AT[1]
    view = reminded(whose, deadline_at=deadline, on_timeout=on_timeout)

    turns = [tick(view, at) for at in (deadline, REMIND_AT[2], NOW + DAY)]

    assert not any(reminders(turn) for turn in turns)
    assert turns[0].events


@pytest.mark.parametrize("how", ["answer", "withdrawal"])
def test_nobody_is_reminded_of_what_is_over(how: str) -> None:
    view = reminded("step")
    play(view, c.Deliver(task_id="a") if how == "answer" else c.CancelTask(task_id="A"))

    assert reminders(tick(view, REMIND_AT[2])) == []


@pytest.mark.parametrize("policy", NotifyPolicy)
def test_a_reminder_goes_out_whatever_the_policy_unless_it_is_silent(policy: NotifyPolicy) -> None:
    view = a_telling_view(a_flow(notify_policy=policy), driven=True)
    play(view, stand_in(a_wait_draft("a", remind_at=REMIND_AT), may_park=False))

    turn = tick(view, REMIND_AT[0])

    assert len(reminders(turn)) == (policy is not NotifyPolicy.SILENT)
    assert types(turn) == [EventType.TASK_REMINDED]


def test_no_two_reminders_of_a_flow_have_the_same_slot() -> None:
    view = running()
    play(view, c.AddTasks(drafts=(a_wait_draft("wait", remind_at=REMIND_AT[:1]),)))
    slots = []

    for _ in range(3):
        # Asked again with the very same words, whose instant is over by now.
        play(view, set_waiting(view, remind_at=REMIND_AT[:1]))
        slots += reminders(tick(view, REMIND_AT[0]))
    play(view, c.Deliver(task_id=""))
    play(view, set_waiting(view, remind_at=REMIND_AT[:1]))
    slots += reminders(tick(view, REMIND_AT[0]))

    assert len(slots) == 5
    assert len(set(slots)) == 5


def test_a_step_and_the_flow_are_reminded_of_in_one_tick() -> None:
    view = running()
    play(view, c.AddTasks(drafts=(a_wait_draft("a", remind_at=REMIND_AT),)))
    play(view, set_waiting(view, remind_at=REMIND_AT))

    turn = tick(view, REMIND_AT[0])

    assert types(turn) == [EventType.TASK_REMINDED, EventType.FLOW_REMINDED]
    assert len(set(reminders(turn))) == 2


# ---- letters --------------------------------------------------------------------------------------


def test_a_letter_that_nobody_takes_is_taken_away_when_its_time_is_over() -> None:
    view = running()
    play(view, addressed("a", FITS, expires_at=NOW + SECOND), told(FITS, 1))

    early = tick(view, NOW + SECOND - 1)
    turn = tick(view, NOW + SECOND)

    assert early.events == []
    task = turn.tasks["letter-0"]
    assert task.status is TaskStatus.CANCELLED
    assert task.failure is not None
    assert task.failure.message == "nobody took it"
    assert list(view.children.active) == ["letter-1"]
    assert view.children.untaken == 1
    ignored(view, c.Tick())


def test_a_letter_that_was_taken_does_not_expire() -> None:
    view = running()
    letter = a_letter("message:in", FITS, wants_reply=True, expires_at=NOW + SECOND)
    play(view, c.Tell(draft=letter), stand_in(a_wait_draft("in", WaitKind.MESSAGE)))
    view.now = NOW + DAY

    ignored(view, c.Tick())


# ---- the rows and the tick ------------------------------------------------------------------------


def test_what_is_due_of_a_wait_is_in_its_row() -> None:
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({}, None),
        ({"deadline_at": 5}, 5),
        ({"remind_at": (3, 4)}, 3),
        ({"remind_at": (3, 4), "deadline_at": 5}, 3),
        ({"remind_at": (7,), "deadline_at": 5}, 5),
        ({"remind_at": (), "deadline_at": 0}, 0),
    ]
    for fields, at in cases:
        draft = a_wait_draft("a", **fields)
        flow = a_flow(WAITING, wait=draft.wait)
        limits = a_view(None).limits

        assert task_due_at(an_old_wait(wait=draft.wait), limits) == at
        assert flow_due_at(flow, limits) == at


offsets = st.integers(-2, 12).map(lambda n: NOW + n * SECOND)
some_reminders = st.lists(offsets, max_size=3).map(lambda found: tuple(sorted(set(found))))
waits = st.fixed_dictionaries(
    {
        "deadline_at": st.one_of(st.none(), offsets),
        "on_timeout": st.sampled_from(OnTimeout),
        "remind_at": some_reminders,
    }
)
names = st.sampled_from(["a", "b", "d"])
ops = st.one_of(
    st.tuples(st.just("open"), names, waits),
    st.tuples(st.just("stand"), st.lists(names, min_size=1, max_size=2), st.booleans()),
    st.tuples(st.just("nap"), names, offsets),
    st.tuples(st.just("approve"), st.just("ok"), waits),
    st.tuples(st.just("own"), st.just(""), waits),
    st.tuples(st.just("letter"), names, offsets),
    st.tuples(st.just("review"), st.just(""), st.booleans()),
    st.tuples(st.just("answer"), names, st.none()),
    st.tuples(st.just("drop"), names, st.none()),
    st.tuples(st.just("leave"), st.just(""), st.booleans()),
)
courses = st.lists(
    st.one_of(ops, ops, ops, st.tuples(st.just("tick"), st.just(""), offsets)),
    min_size=2,
    max_size=14,
)
PLAYED: Counter[str] = Counter()


def do(view: View, n: int, op: tuple[str, Any, Any]) -> None:
    """Take one command, which may well be refused."""
    what, name, more = op
    turn = Turn(view, 0)
    commands: dict[str, Callable[[], c.Command]] = {
        "open": lambda: c.AddTasks(drafts=(a_wait_draft(name, **more),)),
        "stand": lambda: stand_in(
            *[a_wait_draft(one) for one in dict.fromkeys(name)], may_park=more
        ),
        "nap": lambda: stand_in(a_timer_draft(f"nap-{name}", more)),
        "approve": lambda: stand_in(an_approval_draft(**more)),
        "own": lambda: set_waiting(view, **more),
        "letter": lambda: addressed(name, FITS, n, expires_at=more),
        "answer": lambda: c.Deliver(task_id=name, payload=FITS),
        "drop": lambda: c.CancelTask(task_id=name.upper()),
    }
    if what == "review":
        if "reviewed" not in view.children.active:
            view.children.put(in_review(run_id="reviewed"))
        turn.take(c.Wake() if more else c.CancelTask(task_id="reviewed"), "someone")
    elif what == "leave":
        view.driven = more
    else:
        turn.take(commands[what](), "someone")
    settle(view, turn)


def settle(view: View, turn: Turn) -> None:
    """What the engine does about the controller."""
    for effect in turn.effects():
        if isinstance(effect, ParkController):
            view.driven = False
            settle(view, play(view, c.ControllerParked()))
        elif isinstance(effect, StartController):
            # From the top, to where it stood.
            view.driven = True
            for group in flow_of(view).awaiting:
                play(view, stand_in(steps=group))


def rests(view: View) -> bool:
    """Whether the flow's row is due for ever: a controller that stays, or that nobody could enter."""
    flow = flow_of(view)
    if flow.park_at is None or flow.cancel_requested_at is not None:
        return False
    return flow.park_at == NEVER_PARKED or not view.driven


@given(course=courses, registered=st.booleans())
@settings(PROFILE, max_examples=400)
def every_course(course: list[tuple[str, Any, Any]], registered: bool) -> None:
    view = a_telling_view(
        a_flow(RUNNING), driven=True, controllers=REGISTERED if registered else frozenset()
    )
    for n, op in enumerate([*course, ("tick", "", NOW + 12 * SECOND), ("tick", "", NOW + DAY)]):
        if has_ended(flow_of(view)):
            break
        if op[0] != "tick":
            do(view, n, op)
            continue
        view.now = op[2]
        due = next_due(view)
        before, active = view.flow, dict(view.children.active)

        turn = play(view, c.Tick())

        PLAYED.update(types(turn))
        PLAYED.update(update.kind for update in turn.updates())
        if due is None or due > view.now:
            assert view.flow is before
            assert dict(view.children.active) == active
            assert turn.effects() == ()
            PLAYED["not due"] += 1
            continue
        did = bool(turn.events or turn.effects())
        assert did or rests(view), "it was due, and nobody saw to it"
        settle(view, turn)
        # What is due of the flow itself may take another tick, which its row asks for.
        settle(view, play(view, c.Tick()))
        third = play(view, c.Tick())
        assert third.events == [], "the same tick again and again"
        if (following := next_due(view)) is not None and following <= view.now:
            assert rests(view), "it is due for ever"
        for task in view.children.active.values():
            at = task_due_at(task, view.limits)
            assert at is None or at > view.now


def test_the_tick_sees_to_all_that_is_due_by_the_rows_once_and_to_nothing_else() -> None:
    every_course()

    needed = {
        EventType.TASK_ENDED, EventType.TASK_REMINDED, EventType.TASK_OVERDUE,
        EventType.FLOW_BLOCKED, EventType.FLOW_FAILED, EventType.FLOW_PARKED,
        EventType.FLOW_REMINDED, EventType.FLOW_RESUMED, UpdateKind.REMINDER, UpdateKind.DONE,
        "not due",
    }  # fmt: skip
    assert not needed - PLAYED.keys(), "vacuous"


# ---- parking is due as well -----------------------------------------------------------------------


def test_a_flow_is_due_when_its_controller_is_to_leave_and_not_again_after_that() -> None:
    view = standing_in(a_wait_draft("a"))
    assert next_due(view) == NOW + PARK_MS

    tick(view, NOW + PARK_MS)

    assert next_due(view) is None


def test_everything_that_is_due_at_once_is_seen_to_at_once() -> None:
    view = running()
    step = a_wait_draft("a", deadline_at=NOW + PARK_MS, on_timeout=BLOCK)
    beside = a_wait_draft("b", deadline_at=NOW + PARK_MS)
    play(view, c.AddTasks(drafts=(beside,)))
    play(view, addressed("z", FITS, expires_at=NOW + PARK_MS), stand_in(step))

    turn = tick(view, NOW + PARK_MS)
    # Its row says that it is due still, until the controller is on its way out as well.
    while (due := next_due(view)) is not None and due <= view.now:
        rest = tick(view, NOW + PARK_MS)
        assert rest.events, "it is due for ever"

    assert EventType.FLOW_BLOCKED in types(turn)
    assert turn.tasks["B"].status is TaskStatus.TIMED_OUT
    assert turn.tasks["letter-0"].status is TaskStatus.CANCELLED
    assert flow_of(view).park_at is None
    assert flow_of(view).status is BLOCKED


def test_the_children_of_a_flow_that_fails_at_its_deadline_end_with_it() -> None:
    view = running()
    play(view, c.AddTasks(drafts=(a_wait_draft("a"), a_timer_draft("nap", NOW + DAY))))
    play(view, told(Raw(b"1")), set_waiting(view, deadline_at=NOW + 1))

    turn = tick(view, NOW + 1)

    assert {task.status for task in turn.tasks.values()} == {TaskStatus.CANCELLED}
    assert len(turn.tasks) == 3
    assert not any(is_active(task) for task in turn.tasks.values())
