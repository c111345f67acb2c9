"""The life cycle of a flow, written out a second time and compared with what the rules decide."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations, product
from typing import Any

import pytest
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import Code, Refusal
from flowstead.model.effect import StopReason, StopTask
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, SyncMode
from flowstead.model.limits import Limits
from flowstead.model.task import Succeeded
from flowstead.rules.decide import decide
from flowstead.rules.lifecycle import Operation
from flowstead.rules.view import Decision
from tests.unit.given import (
    CREATED_AT,
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
    book,
)

STATUSES = (*LIVE, *ENDED)
INTENTS = (False, True)

# What the contract says of each operation on a flow without children: live, live with a cancel intent, ended.
# A status means "applied, and this is the status then"; "=" means the status stays; a code in capitals refuses.
TABLE: dict[str, tuple[str, str, str]] = {
    "set_waiting": ("waiting", "CANCEL_REQUESTED", "TERMINAL"),
    "set_waiting, blocker named": ("blocked", "CANCEL_REQUESTED", "TERMINAL"),
    "set_waiting, blocker told": ("blocked", "CANCEL_REQUESTED", "TERMINAL"),
    "resume": ("queued", "CANCEL_REQUESTED", "TERMINAL"),
    "resume, running": ("running", "CANCEL_REQUESTED", "TERMINAL"),
    "update": ("=", "=", "TERMINAL"),
    "finish": ("succeeded", "succeeded", "TERMINAL"),
    "finish, by return": ("succeeded", "succeeded", "TERMINAL"),
    "fail": ("failed", "failed", "TERMINAL"),
    "fail, by exception": ("failed", "failed", "TERMINAL"),
    "request_cancel": ("=", "CANCEL_REQUESTED", "TERMINAL"),
    "cancel": ("cancelled", "cancelled", "TERMINAL"),
    "cancel, with revision": ("cancelled", "cancelled", "TERMINAL"),
    "run_task": ("=", "CANCEL_REQUESTED", "TERMINAL"),
}

# How far the revision rises where the operation is applied. A cancel that finds nothing to wait for is two
# changes of the flow: that its end is demanded, with the intent unless it stood already, and the end.
REVISIONS: dict[str, tuple[int, int]] = {
    "cancel": (2, 2),
    "cancel, with revision": (2, 2),
    "run_task": (0, 0),
}

WAIT = Raw(b'{"kind":"webhook"}')

COMMANDS: dict[str, Callable[[int], c.Command]] = {
    "set_waiting": lambda r: c.SetWaiting(
        expected_revision=r, patch=NOTHING_TO_PATCH, wait_json=WAIT
    ),
    "set_waiting, blocker named": lambda r: c.SetWaiting(
        expected_revision=r, patch=NOTHING_TO_PATCH, wait_json=WAIT, blocked_task_id="t-9"
    ),
    "set_waiting, blocker told": lambda r: c.SetWaiting(
        expected_revision=r, patch=NOTHING_TO_PATCH, wait_json=WAIT, blocked_summary="stuck"
    ),
    "resume": lambda r: c.Resume(
        expected_revision=r, patch=NOTHING_TO_PATCH, status=FlowStatus.QUEUED
    ),
    "resume, running": lambda r: c.Resume(
        expected_revision=r, patch=NOTHING_TO_PATCH, status=FlowStatus.RUNNING
    ),
    "update": lambda r: c.Update(expected_revision=r, patch=c.Patch(current_step="next")),
    "finish": lambda r: c.Finish(expected_revision=r, patch=NOTHING_TO_PATCH),
    "finish, by return": lambda r: c.Finish(expected_revision=None, patch=NOTHING_TO_PATCH),
    "fail": lambda r: c.Fail(expected_revision=r, patch=NOTHING_TO_PATCH),
    "fail, by exception": lambda r: c.Fail(
        expected_revision=None, patch=NOTHING_TO_PATCH, failure=Failure(kind="exception")
    ),
    "request_cancel": lambda r: c.RequestCancel(expected_revision=r),
    "cancel": lambda r: c.Cancel(),
    "cancel, with revision": lambda r: c.Cancel(expected_revision=r),
    "run_task": lambda r: c.AddTasks(drafts=(a_draft(),)),
}

CASES = [
    pytest.param(operation, status, intent, id=f"{operation}-{status}-{'intent' * intent}")
    for operation, status, intent in product(TABLE, STATUSES, INTENTS)
]


def expected(operation: str, status: FlowStatus, intent: bool) -> str:
    live, intended, ended = TABLE[operation]
    return ended if status in ENDED else intended if intent else live


def test_the_table_of_this_test_covers_every_operation() -> None:
    written = {name.partition(",")[0] for name in TABLE}

    assert written == {operation.value for operation in Operation}
    assert TABLE.keys() == COMMANDS.keys()
    assert set(STATUSES) == set(FlowStatus)


@pytest.mark.parametrize(("operation", "status", "intent"), CASES)
def test_every_operation_does_to_every_flow_what_the_table_says(
    operation: str, status: FlowStatus, intent: bool
) -> None:
    flow = a_flow(status, intent=intent)
    view = a_view(flow)
    turn = a_turn(view, last_seq=20)
    says = expected(operation, status, intent)

    taken = turn.take(COMMANDS[operation](flow.revision), "owner")

    if says.isupper():
        assert taken.refusal is not None
        assert taken.refusal.code is Code[says]
        assert taken.refusal.reason.endswith(".")
        assert taken.flow is flow
        assert view.flow is flow
        assert not view.children.active
        assert not (turn.events or turn.tasks or turn.created or turn.effects())
        return
    after = view.flow
    assert taken.refusal is None
    assert after is not None
    assert after.status == (status if says == "=" else says)
    rises = REVISIONS.get(operation, (1, 1))[intent]
    assert after.revision == flow.revision + rises
    assert (after is flow) == (rises == 0)
    assert (after.ended_at is not None) == (after.status in ENDED)
    assert [event.seq for event in turn.events] == list(range(21, 21 + len(turn.events)))


@pytest.mark.parametrize(("operation", "status", "intent"), CASES)
def test_deciding_alone_changes_nothing_and_agrees_with_the_table(
    operation: str, status: FlowStatus, intent: bool
) -> None:
    flow = a_flow(status, intent=intent)
    view = a_view(flow)
    says = expected(operation, status, intent)

    answer = decide(view, COMMANDS[operation](flow.revision))

    assert view.flow is flow
    assert not view.children.active
    assert answer == decide(view, COMMANDS[operation](flow.revision))
    if says.isupper():
        assert isinstance(answer, Refusal)
        assert answer.code is Code[says]
    else:
        assert isinstance(answer, Decision)


@pytest.mark.parametrize(("operation", "status", "intent"), CASES)
def test_the_intent_is_never_forgotten_and_only_cancelling_sets_it(
    operation: str, status: FlowStatus, intent: bool
) -> None:
    flow = a_flow(status, intent=intent)
    view = a_view(flow)

    a_turn(view).take(COMMANDS[operation](flow.revision), "owner")

    assert view.flow is not None
    after = view.flow.cancel_requested_at
    if intent:
        assert after == flow.cancel_requested_at
    elif operation.partition(",")[0] in {"request_cancel", "cancel"} and status in LIVE:
        assert after == NOW
    else:
        assert after is None


@pytest.mark.parametrize("status", LIVE)
@pytest.mark.parametrize("intent", INTENTS)
@pytest.mark.parametrize("operation", ["finish", "fail", "cancel"])
def test_an_end_stamps_the_instant_and_clears_the_wait(
    status: FlowStatus, intent: bool, operation: str
) -> None:
    view = a_view(a_flow(status, intent=intent))

    a_turn(view).take(COMMANDS[operation](7), "owner")

    assert view.flow is not None
    assert view.flow.ended_at == NOW
    assert view.flow.updated_at == NOW
    assert view.flow.wait_json is UNSET


@pytest.mark.parametrize("status", LIVE)
@pytest.mark.parametrize("operation", ["resume", "resume, running", "finish", "cancel"])
def test_leaving_a_wait_clears_its_blockers(status: FlowStatus, operation: str) -> None:
    view = a_view(a_flow(status))

    a_turn(view).take(COMMANDS[operation](7), "owner")

    assert view.flow is not None
    assert view.flow.wait_json is UNSET
    assert view.flow.blocked_task_id is None
    assert view.flow.blocked_summary is None


@pytest.mark.parametrize("status", LIVE)
@pytest.mark.parametrize(
    ("operation", "task_id", "summary"),
    [
        ("set_waiting", None, None),
        ("set_waiting, blocker named", "t-9", None),
        ("set_waiting, blocker told", None, "stuck"),
    ],
)
def test_waiting_replaces_wait_and_blockers_whole(
    status: FlowStatus, operation: str, task_id: str | None, summary: str | None
) -> None:
    view = a_view(a_flow(status))

    a_turn(view).take(COMMANDS[operation](7), "owner")

    assert view.flow is not None
    assert view.flow.wait_json == WAIT
    assert view.flow.blocked_task_id == task_id
    assert view.flow.blocked_summary == summary
    assert view.flow.ended_at is None


@pytest.mark.parametrize("status", LIVE)
@pytest.mark.parametrize("intent", INTENTS)
def test_update_leaves_wait_and_blockers_alone(status: FlowStatus, intent: bool) -> None:
    flow = a_flow(status, intent=intent)
    view = a_view(flow)

    a_turn(view).take(COMMANDS["update"](7), "owner")

    assert view.flow is not None
    assert view.flow.current_step == "next"
    assert view.flow.state_json == flow.state_json
    assert view.flow.wait_json == flow.wait_json
    assert view.flow.blocked_task_id == flow.blocked_task_id
    assert view.flow.blocked_summary == flow.blocked_summary


PATCHED = ["set_waiting", "resume", "update", "finish", "fail"]


def patched(operation: str, revision: int, patch: c.Patch) -> c.Command:
    match operation:
        case "set_waiting":
            return c.SetWaiting(expected_revision=revision, patch=patch, wait_json=WAIT)
        case "resume":
            return c.Resume(expected_revision=revision, patch=patch, status=FlowStatus.QUEUED)
        case "update":
            return c.Update(expected_revision=revision, patch=patch)
        case "finish":
            return c.Finish(expected_revision=revision, patch=patch)
        case _:
            return c.Fail(expected_revision=revision, patch=patch)


@pytest.mark.parametrize("operation", PATCHED)
@pytest.mark.parametrize(
    ("patch", "step", "state"),
    [
        (c.Patch(), "classify", b'{"threads":[]}'),
        (c.Patch(current_step=None), None, b'{"threads":[]}'),
        (c.Patch(current_step="send"), "send", b'{"threads":[]}'),
        (c.Patch(state_json=Raw(b"null")), "classify", b"null"),
        (c.Patch(current_step="send", state_json=Raw(b"[1]")), "send", b"[1]"),
    ],
)
def test_unset_leaves_a_field_alone_and_none_clears_it(
    operation: str, patch: c.Patch, step: str | None, state: bytes
) -> None:
    view = a_view(a_flow())

    a_turn(view).take(patched(operation, 7, patch), "owner")

    assert view.flow is not None
    assert view.flow.current_step == step
    assert bytes(view.flow.state_json) == state  # type: ignore[arg-type]


def test_failing_keeps_the_blocker_it_does_not_mention_and_takes_the_one_it_names() -> None:
    silent = a_view(a_flow(FlowStatus.BLOCKED))
    naming = a_view(a_flow(FlowStatus.BLOCKED))
    clearing = a_view(a_flow(FlowStatus.BLOCKED))

    a_turn(silent).take(c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH), "owner")
    a_turn(naming).take(
        c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH, blocked_summary="gave up"), "owner"
    )
    a_turn(clearing).take(
        c.Fail(
            expected_revision=7,
            patch=NOTHING_TO_PATCH,
            blocked_task_id=None,
            blocked_summary=None,
        ),
        "owner",
    )

    assert silent.flow is not None
    assert (silent.flow.blocked_task_id, silent.flow.blocked_summary) == ("t-0", "needs a person")
    assert naming.flow is not None
    assert (naming.flow.blocked_task_id, naming.flow.blocked_summary) == ("t-0", "gave up")
    assert clearing.flow is not None
    assert (clearing.flow.blocked_task_id, clearing.flow.blocked_summary) == (None, None)


def test_a_clock_set_back_never_ends_a_flow_before_it_began_or_takes_its_update_back() -> None:
    long_ago = CREATED_AT - 3_600_000
    for operation in ("finish", "fail", "cancel", "update", "set_waiting", "resume"):
        flow = a_flow()
        view = a_view(flow, now=long_ago)

        a_turn(view).take(COMMANDS[operation](7), "owner")

        assert view.flow is not None
        assert view.flow.updated_at >= flow.updated_at
        assert view.flow.ended_at is None or view.flow.ended_at >= flow.created_at


def test_a_second_request_to_cancel_is_refused_but_cancel_goes_on() -> None:
    view = a_view(a_flow(intent=True), a_linked())

    asked_again = a_turn(view).take(c.RequestCancel(expected_revision=7), "owner")
    cancelled = a_turn(view).take(c.Cancel(), "owner")

    assert asked_again.refusal is not None
    assert asked_again.refusal.code is Code.CANCEL_REQUESTED
    assert cancelled.refusal is None
    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED
    assert view.flow.cancel_requested_at == NOW - 1_000
    assert view.flow.cancel_started_at == NOW
    assert view.flow.revision == 9


def test_cancelling_again_stops_what_is_left_and_stamps_nothing_a_second_time() -> None:
    view = a_view(a_flow(), a_launched("a"), running={"a"})
    turn = a_turn(view)

    turn.take(c.Cancel(), "owner")
    first, asked = view.flow, view.children.active["a"]
    view.now += 1_000
    again = turn.take(c.Cancel(), "owner")

    assert again.refusal is None
    assert view.flow is first
    assert view.children.active["a"] is asked
    assert list(turn.effects()) == [StopTask("a", StopReason.CANCELLED)] * 2
    assert [event.type for event in turn.events] == [
        EventType.FLOW_CANCEL_REQUESTED,
        EventType.TASK_CANCEL_REQUESTED,
    ]


@pytest.mark.parametrize("intent", INTENTS)
def test_a_cancel_says_in_one_event_that_an_end_is_demanded_of_what_runs(intent: bool) -> None:
    view = a_view(a_flow(intent=intent), a_launched("a"), running={"a"})
    turn = a_turn(view)

    turn.take(c.Cancel(), "owner")

    told, asked = turn.events
    assert told.type == (
        EventType.FLOW_CANCEL_STARTED if intent else EventType.FLOW_CANCEL_REQUESTED
    )
    assert told.revision == asked.revision == 8
    assert told.changed["cancelStartedAt"] == NOW
    assert ("cancelRequestedAt" in told.changed) == (not intent)


# ---- the order of checks --------------------------------------------------------------------------

# From the first to the last. Each names what is wrong; a call with several faults is refused for the first.
ORDER = ("missing", "mirrored", "stale", "ended", "intent", "value")
CODES = {
    "missing": Code.NOT_FOUND,
    "mirrored": Code.NOT_MANAGED,
    "stale": Code.REVISION_CONFLICT,
    "ended": Code.TERMINAL,
    "intent": Code.CANCEL_REQUESTED,
    "value": Code.INVALID_STATE,
}
DEFECT = c.Defect(Code.INVALID_STATE, "state_json is nan. Nothing was written.")

# Which faults an operation knows at all.
FAULTS = {
    "set_waiting": {"missing", "mirrored", "stale", "ended", "intent", "value"},
    "resume": {"missing", "mirrored", "stale", "ended", "intent", "value"},
    "update": {"missing", "mirrored", "stale", "ended", "value"},
    "finish": {"missing", "mirrored", "stale", "ended", "value"},
    "fail": {"missing", "mirrored", "stale", "ended", "value"},
    "request_cancel": {"missing", "mirrored", "stale", "ended", "intent"},
    "cancel": {"missing", "stale", "ended"},
    "run_task": {"missing", "mirrored", "ended", "intent", "value"},
}


def every_combination() -> list[Any]:
    found = []
    for operation in FAULTS:
        sets = chain.from_iterable(combinations(ORDER, n) for n in range(1, len(ORDER) + 1))
        for faults in sets:
            if "missing" in faults and {"mirrored", "ended", "intent"} & set(faults):
                continue  # what is not there has no mode and no standing
            if not FAULTS[operation] & set(faults):
                continue
            found.append(pytest.param(operation, faults, id=f"{operation}-{'+'.join(faults)}"))
    return found


@pytest.mark.parametrize(("operation", "faults"), every_combination())
def test_a_call_with_several_faults_is_refused_for_the_first_of_them(
    operation: str, faults: tuple[str, ...]
) -> None:
    flow = None
    if "missing" not in faults:
        flow = a_flow(
            FlowStatus.SUCCEEDED if "ended" in faults else FlowStatus.RUNNING,
            intent="intent" in faults,
            sync_mode=SyncMode.TASK_MIRRORED if "mirrored" in faults else SyncMode.MANAGED,
        )
    view = a_view(flow)
    turn = a_turn(view)
    revision = 6 if "stale" in faults else 7
    patch = c.Patch(state_json=DEFECT) if "value" in faults else c.Patch()
    command: c.Command
    if operation == "run_task":
        draft = a_draft(input_json=DEFECT if "value" in faults else UNSET)
        command = c.AddTasks(drafts=(draft,))
    elif operation == "request_cancel":
        command = c.RequestCancel(expected_revision=revision)
    elif operation == "cancel":
        command = c.Cancel(expected_revision=revision)
    else:
        command = patched(operation, revision, patch)

    taken = turn.take(command, "owner")

    first = next(fault for fault in ORDER if fault in faults and fault in FAULTS[operation])
    assert taken.refusal is not None
    assert taken.refusal.code is CODES[first]
    assert view.flow is flow
    assert not (turn.events or turn.tasks or turn.effects() or view.children.active)


@pytest.mark.parametrize("faults", ["wait", "wait and state"])
def test_a_wait_that_json_cannot_hold_is_refused_after_everything_else(faults: str) -> None:
    broken = c.Defect(Code.STATE_TOO_LARGE, "wait_json takes 9 bytes. Nothing was written.")
    patch = c.Patch(state_json=DEFECT) if faults == "wait and state" else c.Patch()

    def refused(view: Any, revision: int) -> Code:
        command = c.SetWaiting(expected_revision=revision, patch=patch, wait_json=broken)
        answer = decide(view, command)
        assert isinstance(answer, Refusal)
        return answer.code

    assert refused(a_view(None), 7) is Code.NOT_FOUND
    assert refused(a_view(a_flow(sync_mode=SyncMode.TASK_MIRRORED)), 6) is Code.NOT_MANAGED
    assert refused(a_view(a_flow()), 6) is Code.REVISION_CONFLICT
    assert refused(a_view(a_flow(FlowStatus.LOST)), 7) is Code.TERMINAL
    assert refused(a_view(a_flow(intent=True)), 7) is Code.CANCEL_REQUESTED
    assert refused(a_view(a_flow()), 7) in {Code.STATE_TOO_LARGE, Code.INVALID_STATE}


def test_too_many_children_are_refused_after_the_life_cycle_has_spoken() -> None:
    limits = Limits(active_children=1)
    crowd = c.AddTasks(drafts=(a_draft("x"), a_draft("y")))

    full = decide(a_view(a_flow(), a_linked(), limits=limits), crowd)
    ended = decide(a_view(a_flow(FlowStatus.FAILED), a_linked(), limits=limits), crowd)
    asked = decide(a_view(a_flow(intent=True), a_linked(), limits=limits), crowd)

    assert isinstance(full, Refusal)
    assert full.code is Code.OVERLOADED
    assert isinstance(ended, Refusal)
    assert ended.code is Code.TERMINAL
    assert isinstance(asked, Refusal)
    assert asked.code is Code.CANCEL_REQUESTED


def test_several_children_are_added_all_or_none() -> None:
    view = a_view(a_flow())
    turn = a_turn(view)
    drafts = (a_draft("good"), a_draft("bad", input_json=DEFECT), a_draft("also good"))

    taken = turn.take(c.AddTasks(drafts=drafts), "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.INVALID_STATE
    assert not (view.children.active or view.children.run_ids or turn.events or turn.tasks)


def test_a_known_run_id_is_answered_whatever_the_flow_allows() -> None:
    for flow in (a_flow(), a_flow(intent=True), a_flow(FlowStatus.SUCCEEDED)):
        first = a_linked("first", run_id="classify-1")
        view = a_view(flow, first)
        turn = a_turn(view)

        taken = turn.take(c.AddTasks(drafts=(a_draft("second", run_id="classify-1"),)), "owner")

        assert taken.refusal is None
        assert taken.children == (first,)
        assert not (turn.events or turn.tasks)


def test_one_run_id_twice_in_one_call_makes_one_child() -> None:
    view = a_view(a_flow())
    drafts = (a_draft("one", run_id="r"), a_draft("two", run_id="r"))

    taken = a_turn(view).take(c.AddTasks(drafts=drafts), "owner")

    assert taken.refusal is None
    assert [child.task_id for child in taken.children if not isinstance(child, str)] == [
        "one",
        "one",
    ]
    assert list(view.children.active) == ["one"]


# ---- creating and entering ------------------------------------------------------------------------


def test_creating_a_flow_with_a_registered_controller_starts_it_and_tells_its_first_event() -> None:
    view = a_view(None, controllers={"triage"})
    turn = a_turn(view)
    draft = a_flow(FlowStatus.QUEUED, revision=0)

    taken = turn.take(c.Create(draft=draft), "owner")

    assert taken.refusal is None
    assert view.flow is draft
    assert [(event.seq, event.revision, event.type) for event in turn.events] == [
        (1, 0, EventType.FLOW_CREATED)
    ]
    assert len(turn.effects()) == 1


@pytest.mark.parametrize(
    ("key", "digest", "code"),
    [
        ("k", "d", None),
        ("k", "other", Code.FLOW_EXISTS),
        ("other", "d", Code.FLOW_EXISTS),
        (None, None, Code.FLOW_EXISTS),
    ],
)
def test_only_the_same_idempotency_key_for_the_same_payload_answers_the_first_flow(
    key: str | None, digest: str | None, code: Code | None
) -> None:
    first = a_flow(idempotency_key="k", request_digest="d")
    view = a_view(first)
    turn = a_turn(view)
    draft = a_flow(revision=0, idempotency_key=key, request_digest=digest)

    taken = turn.take(c.Create(draft=draft), "owner")

    assert (None if taken.refusal is None else taken.refusal.code) is code
    assert view.flow is first
    assert not turn.events


def test_two_flows_without_an_idempotency_key_are_never_taken_for_one_another() -> None:
    view = a_view(a_flow())

    taken = a_turn(view).take(c.Create(draft=a_flow()), "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.FLOW_EXISTS


def test_a_flow_with_a_defect_is_not_created() -> None:
    view = a_view(None, controllers={"triage"})
    turn = a_turn(view)

    taken = turn.take(c.Create(draft=a_flow(revision=0), defect=DEFECT), "owner")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.INVALID_STATE
    assert view.flow is None
    assert not (turn.events or turn.effects())


@pytest.mark.parametrize("status", STATUSES)
def test_entering_the_controller_makes_a_queued_flow_running_and_no_other(
    status: FlowStatus,
) -> None:
    flow = a_flow(status)
    view = a_view(flow, driven=True)

    taken = a_turn(view).take(c.EnterController(), "runtime")

    assert view.flow is not None
    if status is FlowStatus.QUEUED:
        assert (view.flow.status, view.flow.revision) == (FlowStatus.RUNNING, 8)
    else:
        assert view.flow is flow
    assert (taken.refusal is not None) == (status in ENDED)


@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_resuming_enters_a_registered_controller_that_is_not_running(
    driven: bool, registered: bool
) -> None:
    controllers = {"triage"} if registered else set[str]()
    view = a_view(a_flow(FlowStatus.WAITING), driven=driven, controllers=controllers)
    turn = a_turn(view)

    turn.take(COMMANDS["resume"](7), "owner")

    assert len(turn.effects()) == (registered and not driven)


def test_a_controller_is_not_started_for_a_flow_that_ended_in_the_same_turn() -> None:
    view = a_view(a_flow(FlowStatus.WAITING), controllers={"triage"})
    turn = a_turn(view)

    turn.take(COMMANDS["resume"](7), "owner")
    turn.take(COMMANDS["finish"](8), "owner")

    assert list(turn.effects()) == []


# ---- children and the standing of their flow ------------------------------------------------------


@pytest.mark.parametrize(("status", "intent"), list(product(STATUSES, INTENTS)))
def test_what_a_child_does_never_touches_its_flows_revision(
    status: FlowStatus, intent: bool
) -> None:
    flow = a_flow(status, intent=intent)
    view = a_view(flow, a_linked("a"), a_linked("b"), a_launched("c"), running={"c"})
    turn = a_turn(view)

    turn.take(c.ProgressReport(task_id="a", summary="half"), "owner")
    turn.take(c.ProgressReport(task_id="c"), "runtime")
    turn.take(c.StartReport(task_id="a"), "owner")
    turn.take(c.CancelTask(task_id="b"), "owner")

    assert view.flow is flow
    assert all(event.revision == flow.revision for event in turn.events)


@pytest.mark.parametrize("task_id", ["c", "nobody"])
def test_a_launched_child_cannot_be_reported_on_by_hand(task_id: str) -> None:
    view = a_view(a_flow(), a_launched("c"), running={"c"})
    before = book(view)

    ended = a_turn(view).take(c.EndReport(task_id=task_id, outcome=Succeeded()), "owner")
    started = a_turn(view).take(c.StartReport(task_id=task_id), "owner")

    assert book(view) == before
    for taken in (ended, started):
        refused = None if taken.refusal is None else taken.refusal.code
        assert refused is (Code.NOT_LINKED if task_id == "c" else None)
