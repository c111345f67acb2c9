"""When a failed child is tried again: how often, how soon, and never because of an interruption."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.event import EventType
from flowstead.model.flow import Failure
from flowstead.model.retry import Retry
from flowstead.model.task import (
    Cancelled,
    Failed,
    Launch,
    Lost,
    Outcome,
    Succeeded,
    TaskStatus,
    TimedOut,
)
from flowstead.rules import endings
from tests.unit.given import (
    ENDED,
    NOW,
    a_flow,
    a_launched,
    a_linked,
    a_turn,
    a_view,
    retrying,
)

PROFILE = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
WHY = Failure(kind="exception", code="ValueError", message="ValueError: no")


@pytest.mark.parametrize(
    ("policy", "delays"),
    [
        (Retry(jitter=0.0), [1, 2, 4, 8, 16, 32, 60, 60]),
        (Retry(initial=0.5, factor=3.0, max_delay=10.0, jitter=0.0), [0.5, 1.5, 4.5, 10, 10]),
        (Retry(initial=5.0, factor=1.0, jitter=0.0), [5, 5, 5]),
        (Retry(initial=0.0, jitter=0.0), [0, 0, 0]),
        (Retry(initial=90.0, max_delay=60.0, jitter=0.0), [60, 60]),
        (Retry(max_delay=0.0, jitter=0.0), [0, 0]),
    ],
)
def test_each_delay_grows_by_the_factor_up_to_the_longest(
    policy: Retry, delays: list[float]
) -> None:
    assert [policy.delay_after(n, 0.7) for n in range(1, len(delays) + 1)] == delays


@pytest.mark.parametrize(
    ("jitter", "chance", "delay"),
    [(0.1, 0.0, 10.0), (0.1, 0.5, 9.5), (1.0, 0.0, 10.0), (1.0, 0.5, 5.0), (0.0, 0.9, 10.0)],
)
def test_jitter_takes_a_share_of_the_delay_away(jitter: float, chance: float, delay: float) -> None:
    policy = Retry(initial=10.0, jitter=jitter)

    assert policy.delay_after(1, chance) == pytest.approx(delay)


durations = st.floats(0, 10_000_000)


@given(
    initial=durations,
    factor=st.floats(1, 1_000_000),
    max_delay=durations,
    jitter=st.floats(0, 1),
    failures=st.integers(1, 10_000),
    chance=st.floats(0, 1, exclude_max=True),
)
@settings(PROFILE, max_examples=500)
def test_every_policy_has_a_finite_delay_within_its_bounds_after_any_number_of_failures(
    initial: float,
    factor: float,
    max_delay: float,
    jitter: float,
    failures: int,
    chance: float,
) -> None:
    policy = Retry(
        max_attempts=20_000,
        initial=initial,
        factor=factor,
        max_delay=max_delay,
        jitter=jitter,
    )

    delay = policy.delay_after(failures, chance)

    assert math.isfinite(delay)
    assert 0 <= delay <= max_delay


@pytest.mark.parametrize(
    "fields",
    [
        {"initial": 1e300, "factor": 1e300, "max_delay": 1e300},
        {"initial": 1.0, "factor": 2.0, "max_delay": 1e18},
        {"initial": 10**400},
        {"max_delay": 10**400},
    ],
    ids=["all", "delay", "initial", "huge int"],
)
def test_a_retry_never_falls_due_where_no_store_can_write_it(fields: dict[str, Any]) -> None:
    try:
        policy = Retry(max_attempts=100, jitter=0.0, **fields)
    except ValueError:
        return  # refused at the door is fine too
    task = a_launched("a", launch=Launch(function="work", retry=policy), attempt=70)
    view = a_view(a_flow(), task, running={"a"})

    a_turn(view).take(
        c.EndReport(task_id="a", outcome=Failed(WHY), attempt=task.attempt), "runtime"
    )

    due = view.children.active["a"].next_attempt_at
    assert due is not None
    assert NOW <= due < 2**63


@pytest.mark.parametrize(
    "fields",
    [
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": 1.5},
        {"max_attempts": True},
        {"max_attempts": "3"},
        {"initial": -1.0},
        {"initial": math.nan},
        {"initial": math.inf},
        {"factor": 0.5},
        {"factor": math.nan},
        {"factor": math.inf},
        {"max_delay": -0.1},
        {"max_delay": math.nan},
        {"max_delay": math.inf},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"jitter": math.nan},
        {"jitter": None},
        {"initial": "1"},
    ],
    ids=str,
)
def test_a_policy_that_makes_no_sense_is_refused_naming_the_field(fields: dict[str, Any]) -> None:
    (name,) = fields

    with pytest.raises((ValueError, TypeError), match=name):
        Retry(**fields)


def test_a_policy_survives_its_own_record() -> None:
    policy = Retry(max_attempts=5, initial=0.25, factor=1.5, max_delay=9.0, jitter=0.5)

    kept = msgspec.json.encode(policy)

    assert b"maxAttempts" in kept
    assert msgspec.json.decode(kept, type=Retry) == policy


OUTCOMES: list[tuple[Outcome, bool]] = [
    (Succeeded(), False),
    (Failed(WHY), True),
    (TimedOut(WHY), True),
    (Cancelled(WHY), False),
    (Lost(WHY), False),
]


@pytest.mark.parametrize(("outcome", "again"), OUTCOMES)
@pytest.mark.parametrize("attempt", [1, 2, 3])
@pytest.mark.parametrize("interruptions", [0, 1])
def test_only_failures_and_time_outs_are_tried_again_and_only_so_often(
    outcome: Outcome, again: bool, attempt: int, interruptions: int
) -> None:
    task = a_launched("a", launch=retrying(2), attempt=attempt, interruptions=interruptions)

    spent = attempt - interruptions
    assert endings.may_retry(task, outcome) == (again and spent < 2)


@pytest.mark.parametrize("outcome", [outcome for outcome, _ in OUTCOMES])
def test_linked_children_and_children_without_a_policy_are_not_tried_again(
    outcome: Outcome,
) -> None:
    assert not endings.may_retry(a_linked(), outcome)
    assert not endings.may_retry(a_launched(max_attempts=5), outcome)


@pytest.mark.parametrize("outcome", [Failed(WHY), TimedOut(WHY)])
def test_a_failed_attempt_goes_back_to_the_queue_with_its_failure_and_the_next_instant(
    outcome: Outcome,
) -> None:
    view = a_view(a_flow(), a_launched("a", launch=retrying()), running={"a"})
    turn = a_turn(view)

    turn.take(c.EndReport(task_id="a", outcome=outcome, attempt=1), "runtime")

    task = view.children.active["a"]
    assert task.status is TaskStatus.QUEUED
    assert task.attempt == 1
    assert task.next_attempt_at == NOW + 1_000
    assert task.failure == WHY
    assert task.ended_at is None
    assert [event.type for event in turn.events] == [EventType.TASK_RETRY_SCHEDULED]
    assert list(turn.effects()) == []


def test_a_child_ends_with_its_last_failure_after_its_last_attempt() -> None:
    view = a_view(a_flow(), a_launched("a", launch=retrying(2)), running={"a"})
    turn = a_turn(view)
    instants = []

    for attempt in (1, 2):
        failure = Failure(kind="exception", message=f"attempt {attempt}")
        turn.take(c.EndReport(task_id="a", outcome=Failed(failure), attempt=attempt), "runtime")
        instants.append(turn.tasks["a"].next_attempt_at)
        view.now += 60_000
        turn.take(c.Tick(), "runtime")

    assert instants == [NOW + 1_000, None]
    ended = turn.tasks["a"]
    assert ended.status is TaskStatus.FAILED
    assert ended.attempt == 2
    assert ended.failure == Failure(kind="exception", message="attempt 2")


def test_a_success_after_a_failure_leaves_no_failure_in_the_record() -> None:
    task = a_launched("a", launch=retrying(), attempt=2, failure=WHY)
    view = a_view(a_flow(), task, running={"a"})
    turn = a_turn(view)

    turn.take(c.EndReport(task_id="a", outcome=Succeeded(), attempt=2), "runtime")

    assert turn.tasks["a"].failure is None
    assert turn.tasks["a"].status is TaskStatus.SUCCEEDED


@pytest.mark.parametrize("status", ENDED)
def test_nothing_is_tried_again_once_the_flow_has_ended(status: Any) -> None:
    view = a_view(a_flow(status), a_launched("a", launch=retrying()), running={"a"})
    turn = a_turn(view)

    turn.take(c.EndReport(task_id="a", outcome=Failed(WHY), attempt=1), "runtime")

    assert turn.tasks["a"].status is TaskStatus.FAILED


def test_attempts_cut_off_or_released_are_not_spent() -> None:
    cut_off, _ = endings.restart(a_launched("a", launch=retrying(2)), NOW)
    released, _ = endings.release(cut_off, NOW)
    again, _ = endings.start(released, NOW)

    assert again.attempt - again.interruptions == 1
    assert endings.may_retry(again, Failed(WHY))


def test_an_attempt_keeps_the_first_start_and_forgets_the_instant_it_was_due() -> None:
    pending = a_launched(
        "a",
        TaskStatus.QUEUED,
        launch=retrying(),
        attempt=1,
        started_at=NOW - 5_000,
        next_attempt_at=NOW,
    )

    running, _ = endings.start(pending, NOW)

    assert running.attempt == 2
    assert running.started_at == NOW - 5_000
    assert running.next_attempt_at is None


def test_a_child_that_was_asked_to_stop_is_not_tried_again_whatever_it_fails_by() -> None:
    task = a_launched("a", launch=retrying(5))
    view = a_view(a_flow(), task, running={"a"})
    turn = a_turn(view)

    turn.take(c.CancelTask(task_id="a"), "someone")
    turn.take(c.EndReport(task_id="a", attempt=1, outcome=Failed(WHY), result=UNSET), "runtime")

    assert turn.tasks["a"].status is TaskStatus.FAILED
    assert turn.tasks["a"].cancel_requested_at == NOW
    told = [event.type for event in turn.events]
    assert told == ["task.cancel_requested", "task.ended"]


def test_asking_twice_to_stop_a_child_changes_it_once() -> None:
    view = a_view(a_flow(), a_launched("a"), running={"a"})
    turn = a_turn(view)

    turn.take(c.CancelTask(task_id="a"), "someone")
    turn.take(c.CancelTask(task_id="a"), "someone else")

    assert [event.type for event in turn.events] == ["task.cancel_requested"]
    assert len(turn.effects()) >= 1


def test_a_child_asked_to_stop_and_then_stopped_by_a_closing_is_cancelled_not_released() -> None:
    view = a_view(a_flow(), a_launched("a", cancel_requested_at=NOW), running={"a"})
    turn = a_turn(view)

    turn.take(c.ReleaseTasks(task_ids=("a",)), "runtime")

    assert turn.tasks["a"].status is TaskStatus.CANCELLED


# ---- what the verdict on a failure says -----------------------------------------------------------


@pytest.mark.parametrize("outcome", [Failed(WHY), TimedOut(WHY)], ids=["failed", "timed out"])
def test_what_is_not_worth_another_attempt_ends_however_many_the_policy_leaves(
    outcome: Outcome,
) -> None:
    view = a_view(a_flow(), a_launched("a", launch=retrying(9)), running={"a"})
    turn = a_turn(view)

    turn.take(c.EndReport(task_id="a", attempt=1, outcome=outcome, again=False), "runtime")

    assert turn.tasks["a"].ended_at == NOW
    assert [event.type for event in turn.events] == [EventType.TASK_ENDED]


def test_what_is_worth_another_attempt_has_none_without_a_policy() -> None:
    view = a_view(a_flow(), a_launched("a"), running={"a"})
    turn = a_turn(view)

    turn.take(
        c.EndReport(task_id="a", attempt=1, outcome=Failed(WHY), again=True, retry_after=5.0),
        "runtime",
    )

    assert turn.tasks["a"].status is TaskStatus.FAILED


@pytest.mark.parametrize(
    ("retry_after", "due_in"),
    [
        (None, 1_000),
        (0.0, 1_000),
        (0.5, 1_000),
        (1.5, 1_500),
        (7.25, 7_250),
        (600.0, 600_000),
    ],
)
def test_whoever_asks_to_be_left_alone_is_and_never_for_less_than_the_policy_says(
    retry_after: float | None, due_in: int
) -> None:
    policy = Retry(max_attempts=3, initial=1.0, max_delay=2.0, jitter=0.0)
    task = a_launched("a", launch=Launch(function="work", retry=policy))
    view = a_view(a_flow(), task, running={"a"})
    turn = a_turn(view)

    turn.take(
        c.EndReport(task_id="a", attempt=1, outcome=Failed(WHY), retry_after=retry_after),
        "runtime",
    )

    assert turn.tasks["a"].next_attempt_at == NOW + due_in
