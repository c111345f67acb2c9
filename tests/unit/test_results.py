"""What calls answer with: values that say what happened, and raise the matching error on request."""

from __future__ import annotations

import pytest

from flowstead import errors
from flowstead.model import code as codes
from flowstead.model.code import Code, Refusal
from flowstead.model.flow import Flow, FlowStatus, NotifyPolicy, SyncMode
from flowstead.model.task import DeliveryStatus, Task, TaskStatus
from flowstead.results import (
    Applied,
    CancelReport,
    Created,
    Refused,
    Rejected,
    TaskCancelReport,
    TaskRetryReport,
    error_for,
    raise_refusal,
)
from flowstead.settlement import SettledAs, Settlement

ERRORS: dict[Code, type[errors.FlowError]] = {
    Code.NOT_FOUND: errors.FlowNotFound,
    Code.NOT_MANAGED: errors.FlowNotManaged,
    Code.REVISION_CONFLICT: errors.RevisionConflict,
    Code.TERMINAL: errors.IllegalTransition,
    Code.CANCEL_REQUESTED: errors.CancelPending,
    Code.CANCEL_PENDING: errors.CancelPending,
    Code.STATE_TOO_LARGE: errors.StateTooLarge,
    Code.INVALID_STATE: errors.InvalidState,
    Code.DUPLICATE: errors.FlowExists,
    Code.FLOW_EXISTS: errors.FlowExists,
    Code.NOT_LINKED: errors.TaskNotLinked,
    Code.NOT_RETRYABLE: errors.TaskNotRetryable,
    Code.LIMIT_REACHED: errors.LimitReached,
    Code.UNAWAITED: errors.NotAwaited,
    Code.LATE: errors.NotAwaited,
    Code.WRONG_SHAPE: errors.NotAwaited,
    Code.NOT_APPROVED: errors.NotApproved,
    Code.ABANDONED: errors.CancelPending,
    Code.OVERLOADED: errors.MailboxFull,
    Code.PERSIST_FAILED: errors.CommitFailed,
    Code.OUTCOME_UNKNOWN: errors.OutcomeUnknown,
}
SAFE_TO_RETRY = {Code.OVERLOADED}
UP_TO_THE_DISK = {Code.PERSIST_FAILED, Code.OUTCOME_UNKNOWN}

FLOW = Flow(
    flow_id="triage-1",
    sync_mode=SyncMode.MANAGED,
    owner_key="agent:main:main",
    revision=3,
    status=FlowStatus.WAITING,
    notify_policy=NotifyPolicy.DONE_ONLY,
    goal="triage inbox",
    state_version=1,
    created_at=1,
    updated_at=2,
)
TASK = Task(
    task_id="t",
    flow_id="triage-1",
    runtime="cli",
    task="work",
    status=TaskStatus.QUEUED,
    delivery_status=DeliveryStatus.PENDING,
    notify_policy=NotifyPolicy.DONE_ONLY,
    created_at=1,
)

LINE = Settlement(
    flow_id="triage-1",
    task_id="t",
    task="work",
    state=SettledAs.SETTLED,
    status=TaskStatus.CANCELLED,
)


def test_every_code_has_its_error() -> None:
    assert ERRORS.keys() == set(Code)


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize("current", [None, FLOW], ids=["no flow", "flow"])
def test_a_rejection_raises_the_error_of_its_code(code: Code, current: Flow | None) -> None:
    rejected = Rejected(code, current, "It is so.")

    with pytest.raises(ERRORS[code]) as caught:
        rejected.unwrap()

    assert type(caught.value) is ERRORS[code]
    assert str(caught.value) == "It is so."
    assert caught.value.current is current  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", Code)
def test_a_refused_child_raises_the_error_of_its_code(code: Code) -> None:
    refused = Refused(code, "It is so.", True, FLOW, TASK)

    with pytest.raises(ERRORS[code]) as caught:
        refused.unwrap()

    assert type(caught.value) is ERRORS[code]
    assert caught.value.current is FLOW  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", Code)
def test_a_refusal_raised_is_the_same_error(code: Code) -> None:
    with pytest.raises(ERRORS[code], match=r"^It is so\.$"):
        raise_refusal(Refusal(code, "It is so."), FLOW)
    assert type(error_for(code, "It is so.")) is ERRORS[code]


@pytest.mark.parametrize("code", Code)
def test_the_family_of_an_error_says_what_to_do_next(code: Code) -> None:
    error = error_for(code, "It is so.")

    assert isinstance(error, errors.Unavailable) == (code in SAFE_TO_RETRY)
    assert isinstance(error, errors.StoreError) == (code in UP_TO_THE_DISK)
    refused = code not in SAFE_TO_RETRY | UP_TO_THE_DISK
    assert isinstance(error, errors.RefusedError) == refused


def test_an_applied_change_unwraps_to_its_flow() -> None:
    applied = Applied(FLOW)

    assert applied.applied
    assert applied.code is None
    assert applied.flow is FLOW
    assert applied.unwrap() is FLOW


def test_a_rejection_holds_the_flow_as_it_is() -> None:
    rejected = Rejected(Code.TERMINAL, FLOW, "Flow is already lost.")

    assert not rejected.applied
    assert rejected.flow is rejected.current is FLOW


def test_a_created_child_unwraps_to_the_child() -> None:
    created = Created(FLOW, TASK)

    assert created.created
    assert created.found
    assert created.code is None
    assert created.reason is None
    assert created.unwrap() is TASK


def test_a_refused_child_says_why_and_whether_its_flow_was_found() -> None:
    refused = Refused(Code.NOT_FOUND, "Flow not found.", False)

    assert not refused.created
    assert (refused.found, refused.flow, refused.task) == (False, None, None)


def test_reports_share_no_list() -> None:
    one, other = CancelReport(found=True, cancelled=True), CancelReport(found=True, cancelled=True)

    one.tasks.append(TASK)
    one.descendants.append(LINE)

    assert other.tasks == []
    assert other.descendants == []
    assert TaskCancelReport(found=False, cancelled=False).task is None
    assert TaskRetryReport(found=False, retried=False).task is None


def test_results_cannot_be_changed() -> None:
    for result in (Applied(FLOW), Rejected(Code.TERMINAL), Created(FLOW, TASK)):
        with pytest.raises(AttributeError):
            result.flow = None  # type: ignore[misc]


def test_every_sentence_the_runtime_refuses_with_is_a_sentence() -> None:
    said = [value for value in vars(codes).values() if isinstance(value, Refusal)]

    assert said
    for refusal in said:
        assert refusal.reason.endswith(".")
        assert refusal.reason[0].isupper()
