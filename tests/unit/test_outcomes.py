"""How a child ended: a status in its record, an outcome for its caller, and the two always agree."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from msgspec import UNSET, Raw

from flowstead.model.flow import Failure, NotifyPolicy
from flowstead.model.task import (
    ACTIVE_TASK_STATUSES,
    FAILED_TASK_STATUSES,
    Cancelled,
    DeliveryStatus,
    Failed,
    Lost,
    Outcome,
    Succeeded,
    Task,
    TaskStatus,
    TerminalOutcome,
    TimedOut,
    is_active,
    outcome_of,
    outcome_status,
)
from flowstead.rules import endings
from tests.unit.given import CREATED_AT, NOW, a_launched, a_linked

WHY = Failure(kind="exception", code="ValueError", message="ValueError: no")
OUTCOMES: dict[TaskStatus, Outcome] = {
    TaskStatus.SUCCEEDED: Succeeded({"route": "urgent"}),
    TaskStatus.FAILED: Failed(WHY),
    TaskStatus.TIMED_OUT: TimedOut(WHY),
    TaskStatus.CANCELLED: Cancelled(WHY),
    TaskStatus.LOST: Lost(WHY),
}


def a_task(status: TaskStatus, **fields: object) -> Task:
    given = {
        "task_id": "t",
        "flow_id": "f",
        "runtime": "cli",
        "task": "work",
        "status": status,
        "delivery_status": DeliveryStatus.PENDING,
        "notify_policy": NotifyPolicy.DONE_ONLY,
        "created_at": 1,
    }
    return Task(**given | fields)


def test_every_final_status_has_an_outcome_and_every_outcome_a_status() -> None:
    final = set(TaskStatus) - ACTIVE_TASK_STATUSES

    assert OUTCOMES.keys() == final
    assert {type(outcome) for outcome in OUTCOMES.values()} == set(get_args(Outcome))


@pytest.mark.parametrize("status", OUTCOMES)
def test_an_outcome_and_its_record_say_the_same(status: TaskStatus) -> None:
    outcome = OUTCOMES[status]
    succeeded = isinstance(outcome, Succeeded)

    record = a_task(
        status,
        result_json=outcome.result if succeeded else None,
        failure=None if succeeded else WHY,
        ended_at=2,
    )

    assert outcome_status(outcome) is status
    assert outcome_of(record) == outcome


@pytest.mark.parametrize("status", [s for s in OUTCOMES if s is not TaskStatus.SUCCEEDED])
def test_a_record_without_a_failure_still_has_an_outcome_that_says_its_kind(
    status: TaskStatus,
) -> None:
    outcome = outcome_of(a_task(status, ended_at=2))

    assert not isinstance(outcome, Succeeded)
    assert outcome.failure.kind == status.value


@pytest.mark.parametrize("status", sorted(ACTIVE_TASK_STATUSES))
def test_a_child_that_has_not_ended_has_no_outcome(status: TaskStatus) -> None:
    with pytest.raises(ValueError, match=f"has not ended; it is {status.value}"):
        outcome_of(a_task(status))


@pytest.mark.parametrize("status", OUTCOMES)
def test_an_outcome_travels_as_json_with_its_status(status: TaskStatus) -> None:
    kept = msgspec.json.encode(OUTCOMES[status])

    assert msgspec.json.decode(kept)["status"] == status.value
    assert msgspec.json.decode(kept, type=Outcome) == OUTCOMES[status]


def test_what_counts_as_a_failure_is_failed_timed_out_or_lost() -> None:
    assert {"failed", "timed_out", "lost"} == FAILED_TASK_STATUSES


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
@pytest.mark.parametrize("linked", [True, False])
def test_ending_a_child_sets_everything_an_ended_child_has(outcome: Outcome, linked: bool) -> None:
    task = a_linked("t") if linked else a_launched("t", next_attempt_at=NOW)

    ended, fact = endings.end(task, NOW, outcome, result=Raw(b"1"), terminal_summary="over")

    assert not is_active(ended)
    assert ended.status is outcome_status(outcome)
    assert ended.ended_at == NOW
    assert ended.last_event_at == NOW
    assert ended.next_attempt_at is None
    assert ended.cleanup_after is not None
    assert ended.cleanup_after > NOW
    assert ended.terminal_summary == "over"
    assert (ended.failure is None) == isinstance(outcome, Succeeded)
    assert fact.task_id == "t"
    assert fact.changed["status"] == ended.status
    assert "resultJson" not in fact.changed


def test_only_a_success_has_a_terminal_outcome_and_it_is_usable_unless_said_otherwise() -> None:
    usable, _ = endings.end(a_linked(), NOW, Succeeded())
    blocked, _ = endings.end(a_linked(), NOW, Succeeded(), terminal_outcome=TerminalOutcome.BLOCKED)
    failed, _ = endings.end(a_linked(), NOW, Failed(WHY), terminal_outcome=TerminalOutcome.BLOCKED)

    assert usable.terminal_outcome is TerminalOutcome.SUCCEEDED
    assert blocked.terminal_outcome is TerminalOutcome.BLOCKED
    assert failed.terminal_outcome is None


def test_a_child_never_ends_before_it_was_made_nor_takes_its_last_event_back() -> None:
    task = a_linked("t", last_event_at=NOW)

    ended, _ = endings.end(task, CREATED_AT - 1_000, Succeeded())

    assert ended.ended_at == CREATED_AT
    assert ended.last_event_at == NOW


def test_progress_without_a_summary_is_a_sign_of_life_and_none_clears_the_summary() -> None:
    task = a_linked("t", progress_summary="half")

    alive, quiet = endings.progress(task, NOW, UNSET)
    cleared, told = endings.progress(task, NOW, None)

    assert (alive.progress_summary, alive.last_event_at) == ("half", NOW)
    assert quiet.changed == {}
    assert cleared.progress_summary is None
    assert told.changed == {"progressSummary": None}


@pytest.mark.parametrize("policy", NotifyPolicy)
def test_only_a_silent_flow_has_nobody_to_tell(policy: NotifyPolicy) -> None:
    expected = (
        DeliveryStatus.NOT_APPLICABLE if policy is NotifyPolicy.SILENT else DeliveryStatus.PENDING
    )

    assert endings.initial_delivery(policy) is expected
