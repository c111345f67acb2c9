"""What the owner of a flow is told: by policy, each thing in its slot, and of the end exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, NotifyPolicy, StoredFlow, has_ended
from flowstead.model.task import Succeeded, TaskStatus
from flowstead.model.update import DONE, PROGRESS, StoredUpdate, UpdateKind, UpdateStatus
from flowstead.model.wait import OnTimeout
from flowstead.rules.news import addressed, named_key, of_change
from flowstead.rules.turn import Turn
from flowstead.rules.view import News, View
from tests.unit.given import ENDED, LIVE, NOTHING_TO_PATCH, NOW, a_flow, a_linked, a_view
from tests.unit.given_waits import (
    FITS,
    SECOND,
    a_telling_view,
    a_wait_draft,
    flow_of,
    ignored,
    play,
    refused,
    set_waiting,
    stand_in,
    tick,
    told,
    types,
)
from tests.unit.given_waits import (
    addressed as addressed_to,
)

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
DONE_ONLY, STATE_CHANGES, SILENT = (
    NotifyPolicy.DONE_ONLY,
    NotifyPolicy.STATE_CHANGES,
    NotifyPolicy.SILENT,
)
WAITING, BLOCKED = FlowStatus.WAITING, FlowStatus.BLOCKED
RUNNING, QUEUED = FlowStatus.RUNNING, FlowStatus.QUEUED


def telling(policy: NotifyPolicy, status: FlowStatus = RUNNING, **fields: Any) -> View:
    return a_telling_view(a_flow(status, notify_policy=policy, **fields))


def a_notice(name: str = "notify", text: str = "Half done.", **fields: Any) -> c.Notify:
    draft = c.TaskDraft(key=20, task_id=name.upper(), runtime="notice", task="notice", run_id=name)
    return c.Notify(draft=draft, text=text, **fields)


# ---- changes of the flow --------------------------------------------------------------------------

Make = Callable[[View], c.Command]

CHANGES: dict[str, tuple[Make, bool]] = {
    # Whether the owner sees a difference: another status, or another step.
    "a wait": (lambda view: set_waiting(view), True),
    "a step": (
        lambda view: c.Update(
            expected_revision=flow_of(view).revision, patch=c.Patch(current_step="send")
        ),
        True,
    ),
    "the same step": (
        lambda view: c.Update(
            expected_revision=flow_of(view).revision, patch=c.Patch(current_step="classify")
        ),
        False,
    ),
    "a state": (
        lambda view: c.Update(
            expected_revision=flow_of(view).revision, patch=c.Patch(state_json=Raw(b"1"))
        ),
        False,
    ),
    "a child": (lambda view: c.AddTasks(drafts=(a_wait_draft("a"),)), False),
    "a place in the queue": (
        lambda view: c.Resume(
            expected_revision=flow_of(view).revision, patch=NOTHING_TO_PATCH, status=QUEUED
        ),
        False,
    ),
    "an intent": (lambda view: c.RequestCancel(expected_revision=None), False),
}
ENDS: dict[str, tuple[Make, FlowStatus, str]] = {
    "finish": (
        lambda view: c.Finish(expected_revision=None, patch=NOTHING_TO_PATCH),
        FlowStatus.SUCCEEDED,
        "triage inbox is done.",
    ),
    "fail": (
        lambda view: c.Fail(
            expected_revision=None,
            patch=NOTHING_TO_PATCH,
            failure=Failure(kind="exception", code="Odd", message="it was odd"),
        ),
        FlowStatus.FAILED,
        "triage inbox has failed: it was odd",
    ),
    "fail without a word": (
        lambda view: c.Fail(
            expected_revision=None,
            patch=NOTHING_TO_PATCH,
            failure=Failure(kind="exception", code="Odd"),
        ),
        FlowStatus.FAILED,
        "triage inbox has failed: Odd",
    ),
    "cancel": (lambda view: c.Cancel(), FlowStatus.CANCELLED, "triage inbox was cancelled."),
}


@pytest.mark.parametrize(("policy", "change"), list(product(NotifyPolicy, CHANGES)))
def test_a_change_is_told_where_the_policy_wants_to_hear_of_it(
    policy: NotifyPolicy, change: str
) -> None:
    view = telling(policy)
    make, is_seen = CHANGES[change]

    updates = play(view, make(view)).updates()

    if policy is not STATE_CHANGES or not is_seen:
        assert not updates
        return
    [update] = updates
    assert (update.kind, update.slot) == (UpdateKind.PROGRESS, PROGRESS)
    assert update.version == update.revision == flow_of(view).revision
    assert update.flow_status == flow_of(view).status
    assert update.current_step == flow_of(view).current_step


@pytest.mark.parametrize(("policy", "end"), list(product(NotifyPolicy, ENDS)))
def test_the_end_is_told_once_unless_the_flow_is_silent(policy: NotifyPolicy, end: str) -> None:
    view = telling(policy)
    make, status, text = ENDS[end]

    updates = play(view, make(view)).updates()
    after = play(view, c.Recover(), c.Tick(), at=NOW + 99 * SECOND).updates()

    assert not after
    if policy is SILENT:
        assert not updates
        return
    [update] = updates
    assert (update.kind, update.slot, update.version) == (UpdateKind.DONE, DONE, 0)
    assert update.flow_status == status
    assert update.text == text


@pytest.mark.parametrize("end", ENDS)
def test_what_changes_and_ends_in_one_turn_is_told_as_its_end_only(end: str) -> None:
    view = telling(STATE_CHANGES)

    turn = play(view, set_waiting(view), ENDS[end][0](view))

    assert [update.slot for update in turn.updates()] == [DONE]


def test_what_changes_there_and_back_in_one_turn_is_not_told() -> None:
    view = telling(STATE_CHANGES)
    there = set_waiting(view)
    back = c.Resume(expected_revision=8, patch=NOTHING_TO_PATCH, status=RUNNING)

    turn = play(view, there, back)

    assert flow_of(view).revision == 9
    assert not turn.updates()


@pytest.mark.parametrize("policy", NotifyPolicy)
@pytest.mark.parametrize("status", LIVE)
def test_the_making_of_a_flow_is_no_news(policy: NotifyPolicy, status: FlowStatus) -> None:
    view = a_telling_view(None)

    turn = play(view, c.Create(draft=a_flow(status, revision=0, notify_policy=policy)))

    assert not turn.updates()


@pytest.mark.parametrize("status", ENDED)
def test_a_flow_that_is_made_and_ended_in_one_turn_has_ended(status: FlowStatus) -> None:
    [news] = of_change(None, a_flow(status))

    assert news.slot == DONE
    assert of_change(a_flow(status), a_flow(status)) == []


def test_a_turn_that_changes_nothing_tells_nothing_and_nor_does_one_without_a_notifier() -> None:
    deaf = a_view(a_flow(notify_policy=STATE_CHANGES))

    assert not play(telling(STATE_CHANGES), c.Wake()).updates()
    assert not play(deaf, a_notice(), c.Cancel()).updates()
    assert not Turn(a_telling_view(None), 0).updates()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("wait", "triage inbox is waiting, at classify: Well?"),
        ("wait without a prompt", "triage inbox is waiting, at classify."),
        ("block", "triage inbox is blocked, at classify: no answer in time"),
        ("resume", "triage inbox is running, at classify."),
        ("no step", "triage inbox is running."),
    ],
)
def test_progress_is_told_in_a_sentence(change: str, text: str) -> None:
    view = telling(STATE_CHANGES)
    revision = flow_of(view).revision
    commands: dict[str, Callable[[], Turn]] = {
        "wait": lambda: play(view, set_waiting(view, b'{"kind":"reply","prompt":"Well?"}')),
        "wait without a prompt": lambda: play(view, set_waiting(view, b'{"prompt":7}')),
        "block": lambda: block(view),
        "resume": lambda: resume(view),
        "no step": lambda: play(
            view, c.Update(expected_revision=revision, patch=c.Patch(current_step=None))
        ),
    }

    [update] = commands[change]().updates()

    assert update.text == text


def block(view: View) -> Turn:
    play(view, set_waiting(view, deadline_at=NOW + 1, on_timeout=OnTimeout.BLOCK))
    return tick(view, NOW + 1)


def resume(view: View) -> Turn:
    play(view, set_waiting(view))
    revision = flow_of(view).revision
    return play(view, c.Resume(expected_revision=revision, patch=NOTHING_TO_PATCH, status=QUEUED))


# ---- the address ----------------------------------------------------------------------------------


def test_an_update_says_whose_it_is_and_what_it_is_about() -> None:
    origin = Raw(b'{"channel":"c1"}')
    view = telling(DONE_ONLY, requester_origin=origin)

    [update] = play(view, ENDS["finish"][0](view)).updates()

    flow = flow_of(view)
    assert update == StoredUpdate(
        key=1,
        flow_key=flow.key,
        slot=DONE,
        version=0,
        idempotency_key=named_key(flow.owner_key, flow.flow_id, DONE, 0),
        kind=UpdateKind.DONE,
        owner_key=flow.owner_key,
        flow_id=flow.flow_id,
        revision=flow.revision,
        flow_status=FlowStatus.SUCCEEDED,
        goal="triage inbox",
        current_step="classify",
        text="triage inbox is done.",
        requester_origin=origin,
        status=UpdateStatus.PENDING,
        created_at=NOW,
        due_at=NOW,
    )


texts = st.one_of(
    st.sampled_from(["", "a", "b", ":", '"', "a:b", '","', "1", "done"]), st.text(max_size=4)
)
named = st.tuples(texts, texts, texts, st.sampled_from([0, 1, 2, 10, 12]))


@given(one=named, other=named)
@settings(PROFILE, max_examples=500)
def test_two_updates_have_the_same_key_only_if_they_are_the_same(
    one: tuple[str, str, str, int], other: tuple[str, str, str, int]
) -> None:
    assert (named_key(*one) == named_key(*other)) is (one == other)
    assert named_key(*one) == named_key(*one)


@pytest.mark.parametrize("differs", ["owner_key", "flow_id", "slot", "version"])
def test_each_part_of_the_address_makes_another_key(differs: str) -> None:
    news = News(kind=UpdateKind.PROGRESS, slot=PROGRESS, text="")
    flow = a_flow(notify_policy=STATE_CHANGES)
    fields: dict[str, Any] = {"owner_key": "agent:other", "flow_id": "triage-2", "revision": 8}
    before = addressed(news, flow, key=1, now=NOW)
    if differs == "slot":
        news = News(kind=UpdateKind.DONE, slot=DONE, text="")
    else:
        name = "revision" if differs == "version" else differs
        flow = a_flow(notify_policy=STATE_CHANGES, **{name: fields[name]})

    after = addressed(news, flow, key=1, now=NOW)

    assert before.idempotency_key != after.idempotency_key
    assert after.idempotency_key.startswith("upd_")


def test_the_same_revision_told_again_has_the_same_key_whatever_the_row() -> None:
    news = News(kind=UpdateKind.PROGRESS, slot=PROGRESS, text="")

    one = addressed(news, a_flow(), key=1, now=NOW)
    two = addressed(news, a_flow(), key=2, now=NOW + SECOND)

    assert one.idempotency_key == two.idempotency_key


# ---- what the controller says ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", NotifyPolicy)
def test_a_notice_goes_out_at_once_whatever_the_policy_unless_it_is_silent(
    policy: NotifyPolicy,
) -> None:
    view = telling(policy)

    turn = play(view, a_notice(data=Raw(b'{"n":1}')))

    assert types(turn) == [EventType.TASK_CREATED, EventType.TASK_ENDED]
    assert turn.tasks["NOTIFY"].status is TaskStatus.SUCCEEDED
    assert flow_of(view).revision == 7
    if policy is SILENT:
        assert not turn.updates()
        return
    [update] = turn.updates()
    assert (update.kind, update.slot) == (UpdateKind.NOTICE, "notice:notify")
    assert update.text == "Half done."
    assert bytes(update.data) == b'{"n":1}'  # type: ignore[arg-type]
    assert (update.bucket, update.due_at, update.version) == (None, NOW, 0)


def test_what_is_put_by_is_due_with_its_digest() -> None:
    view = telling(DONE_ONLY)

    [update] = play(view, a_notice("later", bucket="daily", due_at=NOW + 9)).updates()

    assert (update.kind, update.bucket, update.due_at) == (UpdateKind.DIGEST, "daily", NOW + 9)
    assert update.created_at == NOW


def test_a_notice_is_said_once_for_each_name() -> None:
    view = telling(DONE_ONLY)

    first = play(view, a_notice(), a_notice("other"), a_notice(text="again"))
    second = play(view, a_notice())

    assert [update.slot for update in first.updates()] == ["notice:notify", "notice:other"]
    assert not second.updates()
    assert second.events == []


def test_a_notice_by_the_name_of_another_step_ends_nothing() -> None:
    view = telling(DONE_ONLY)
    play(view, c.AddTasks(drafts=(a_wait_draft("notify"),)))

    turn = play(view, a_notice())

    assert not turn.updates()
    assert list(view.children.active) == ["NOTIFY"]


def test_a_notice_and_the_end_in_one_turn_are_both_told() -> None:
    view = telling(DONE_ONLY)

    turn = play(view, a_notice(), ENDS["finish"][0](view))

    told_of = turn.updates()
    assert [update.slot for update in told_of] == ["notice:notify", DONE]
    assert len({update.idempotency_key for update in told_of}) == 2
    assert len({update.key for update in told_of}) == 2


@pytest.mark.parametrize("standing", ["intent", "ended", "missing", "broken"])
def test_a_notice_that_is_refused_is_not_told(standing: str) -> None:
    views = {
        "intent": (a_telling_view(a_flow(intent=True), a_linked()), Code.CANCEL_REQUESTED),
        "ended": (telling(DONE_ONLY, FlowStatus.FAILED), Code.TERMINAL),
        "missing": (a_telling_view(None), Code.NOT_FOUND),
        "broken": (telling(DONE_ONLY), Code.INVALID_STATE),
    }
    view, code = views[standing]
    data = c.Defect(Code.INVALID_STATE, "data is nan.") if standing == "broken" else UNSET

    refused(view, a_notice(data=data), code)


# ---- what could not be delivered ------------------------------------------------------------------


@pytest.mark.parametrize("status", [*LIVE, *ENDED])
def test_an_update_that_was_given_up_is_in_the_history_and_tells_nobody(status: FlowStatus) -> None:
    view = telling(STATE_CHANGES, status)
    before = flow_of(view)

    turn = play(view, c.NoteDelivery(slot="done", reason="410 Gone"))

    [event] = turn.events
    assert event.type == EventType.UPDATE_FAILED
    assert event.changed == {"slot": "done", "reason": "410 Gone"}
    assert view.flow is before
    assert not turn.updates()


def test_nothing_can_be_noted_of_a_flow_that_is_not_there() -> None:
    refused(a_view(None), c.NoteDelivery(slot="done", reason="410 Gone"), Code.NOT_FOUND)


# ---- over any course ------------------------------------------------------------------------------

steps = st.sampled_from(["a", "b"])
commands: st.SearchStrategy[tuple[str, Any]] = st.one_of(
    st.tuples(st.just("own"), st.sampled_from([None, 1, 3, 50])),
    st.tuples(st.just("stand"), steps),
    st.tuples(st.just("stand until"), st.sampled_from([1, 3, 50])),
    st.tuples(st.just("answer"), st.sampled_from(["", "a", "b"])),
    st.tuples(st.just("letter"), steps),
    st.tuples(st.just("resume"), st.sampled_from([QUEUED, RUNNING])),
    st.tuples(st.just("update"), st.sampled_from([None, "send", "sort"])),
    st.tuples(st.just("notice"), st.sampled_from(["n1", "n2"])),
    st.tuples(st.just("linked"), st.just("")),
    st.tuples(st.just("linked ends"), st.just("")),
    st.tuples(st.just("leave"), st.booleans()),
    st.tuples(st.just("gone"), st.just("")),
    st.tuples(st.just("note"), st.just("")),
)
endings = st.tuples(
    st.sampled_from(["finish", "fail", "cancel", "request_cancel"]), st.sampled_from(["", "x"])
)
turns = st.lists(
    st.tuples(
        st.lists(st.one_of(commands, commands, commands, endings), min_size=1, max_size=3),
        st.integers(0, 4),
    ),
    min_size=2,
    max_size=12,
)
PLAYED: Counter[str] = Counter()


def command_of(view: View, n: int, what: str, more: Any) -> c.Command:
    revision = 0 if view.flow is None else view.flow.revision
    patch = NOTHING_TO_PATCH
    match what:
        case "own":
            at = None if more is None else view.now + more * SECOND
            return set_waiting(view, deadline_at=at, on_timeout=list(OnTimeout)[n % 3])
        case "stand":
            return stand_in(a_wait_draft(more))
        case "stand until":
            at = view.now + more * SECOND
            return stand_in(
                a_wait_draft(f"d{n}", deadline_at=at, on_timeout=list(OnTimeout)[n % 3])
            )
        case "answer":
            return c.Deliver(task_id=more, payload=FITS)
        case "letter":
            return addressed_to(more, FITS, n, expires_at=view.now + 2 * SECOND)
        case "resume":
            return c.Resume(expected_revision=revision, patch=patch, status=more)
        case "update":
            return c.Update(expected_revision=revision, patch=c.Patch(current_step=more))
        case "notice":
            return a_notice(more)
        case "linked":
            draft = c.TaskDraft(key=n, task_id="linked", runtime="cli", task="x", run_id="linked")
            return c.AddTasks(drafts=(draft,))
        case "linked ends":
            return c.EndReport(task_id="linked", outcome=Succeeded())
        case "gone":
            return c.ControllerStopped()
        case "note":
            return c.NoteDelivery(slot=PROGRESS, reason="gone")
        case "finish":
            return c.Finish(expected_revision=revision, patch=patch)
        case "fail":
            return c.Fail(expected_revision=revision, patch=patch)
        case "request_cancel":
            return c.RequestCancel(expected_revision=revision)
        case _:
            return c.Cancel()


def as_seen(flow: StoredFlow) -> tuple[str, str | None]:
    """Whether a flow runs or stands in line to is all the same to its owner."""
    return flow.status.replace("queued", "running"), flow.current_step


@given(course=turns, policy=st.sampled_from(NotifyPolicy), driven=st.booleans())
@settings(PROFILE, max_examples=400)
def every_course(
    course: list[tuple[list[tuple[str, Any]], int]], policy: NotifyPolicy, driven: bool
) -> None:
    view = a_telling_view(
        a_flow(notify_policy=policy), driven=driven, controllers=frozenset({"triage"})
    )
    every: list[StoredUpdate] = []
    ended_in = None
    for n, (made, seconds) in enumerate(course):
        before = flow_of(view)
        view.now += seconds * SECOND
        turn = Turn(view, 0)
        for what, more in made:
            if what == "leave":
                view.driven = bool(more)
                continue
            if what == "gone":
                view.driven = False
            turn.take(command_of(view, n, what, more), "someone")
        turn.take(c.Tick(), "runtime")
        updates = turn.updates()
        every += updates
        PLAYED.update(update.kind for update in updates)
        after = flow_of(view)
        # One row for each slot that is taken once; the newest of the one that is shared.
        slots = [update.slot for update in updates]
        assert len(slots) == len(set(slots))
        if has_ended(after) and not has_ended(before):
            ended_in = n
            assert (DONE in slots) is (policy is not SILENT)
            assert PROGRESS not in slots
        differs = as_seen(before) != as_seen(after)
        is_told = policy is STATE_CHANGES and differs and not has_ended(after)
        assert (PROGRESS in slots) is is_told

    done = [update for update in every if update.kind is UpdateKind.DONE]
    assert len(done) == (ended_in is not None and policy is not SILENT)
    if policy is SILENT:
        assert every == []
    for update in done:
        assert update.flow_status == flow_of(view).status
        PLAYED[f"done {update.flow_status}"] += 1
    single = [update.slot for update in every if update.slot != PROGRESS]
    assert len(single) == len(set(single)), "one slot, told twice"
    keys = [update.idempotency_key for update in every]
    assert len(keys) == len(set(keys))
    versions = [update.version for update in every if update.slot == PROGRESS]
    assert versions == sorted(set(versions))


def test_over_any_course_the_end_is_told_exactly_once_and_nothing_in_one_slot_twice() -> None:
    every_course()

    needed = {UpdateKind.DONE, UpdateKind.PROGRESS, UpdateKind.NOTICE}
    ends = {"done succeeded", "done failed", "done cancelled"}
    assert not (needed | ends) - PLAYED.keys(), "vacuous"


def test_a_message_is_no_news() -> None:
    view = telling(STATE_CHANGES)

    assert not play(view, told(FITS)).updates()
    ignored(view, c.Wake())
