"""The tree of errors: its shape, and that every one of them travels between processes unharmed."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

import flowstead
from flowstead import errors
from flowstead.model.flow import Failure, Flow, FlowStatus, NotifyPolicy, SyncMode

TREE: dict[str, str] = {
    "FlowError": "Exception",
    "RefusedError": "FlowError",
    "FlowNotFound": "RefusedError",
    "FlowExists": "RefusedError",
    "FlowNotManaged": "RefusedError",
    "RevisionConflict": "RefusedError",
    "IllegalTransition": "RefusedError",
    "CancelPending": "RefusedError",
    "InvalidState": "RefusedError",
    "StateTooLarge": "RefusedError",
    "TaskNotLinked": "RefusedError",
    "TaskNotRetryable": "RefusedError",
    "LimitReached": "RefusedError",
    "NotApproved": "RefusedError",
    "NotAwaited": "RefusedError",
    "Unavailable": "FlowError",
    "MailboxFull": "Unavailable",
    "RuntimeClosed": "Unavailable",
    "StoreError": "FlowError",
    "CommitFailed": "StoreError",
    "WriteConflict": "CommitFailed",
    "OutcomeUnknown": "StoreError",
    "SnapshotUnreadable": "StoreError",
    "StoreInUse": "StoreError",
    "StoreUnusable": "StoreError",
    "ChildError": "FlowError",
    "ChildFailed": "ChildError",
    "ChildTimedOut": "ChildError",
    "ChildCancelled": "ChildError",
    "ChildLost": "ChildError",
    "WrongShape": "ChildError",
}
EVERY: dict[str, type[errors.FlowError]] = {
    name: found
    for name, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, errors.FlowError)
}

FLOW = Flow(
    flow_id="triage-1",
    sync_mode=SyncMode.MANAGED,
    owner_key="agent:main:main",
    revision=3,
    status=FlowStatus.WAITING,
    notify_policy=NotifyPolicy.DONE_ONLY,
    goal="triage inbox",
    state_json={"threads": [1, {"a": None}]},
    state_version=1,
    created_at=1,
    updated_at=2,
)
FAILURE = Failure(kind="exception", code="ValueError", message="ValueError: no")


def made() -> list[Any]:
    """Every error, built in every way it can be."""
    found: list[errors.FlowError] = []
    for kind in EVERY.values():
        parameters = list(inspect.signature(kind.__init__).parameters)[1:]
        if parameters == ["reason", "current"]:
            found += [kind("It is so."), kind("It is so.", FLOW)]
        elif parameters == ["task_id", "run_id", "failure"]:
            found += [kind("t-1", "step", FAILURE), kind("t-1", None, Failure(kind="lost"))]
        elif len(parameters) == 2 and parameters[0] in {"what", "name"}:
            found.append(kind("flows.db", "process 7 on this machine"))
        else:
            found.append(kind("It is so."))
    return [pytest.param(error, id=f"{type(error).__name__}-{n}") for n, error in enumerate(found)]


def test_the_tree_has_this_shape() -> None:
    assert {name: kind.__bases__[0].__name__ for name, kind in EVERY.items()} == TREE
    assert all(len(kind.__bases__) == 1 for kind in EVERY.values())


def test_every_error_says_in_a_sentence_what_it_means() -> None:
    for kind in EVERY.values():
        assert kind.__doc__
        assert kind.__doc__.strip().endswith(".")


def test_no_error_is_misuse_or_cancellation_in_disguise() -> None:
    for kind in EVERY.values():
        assert not issubclass(kind, (ValueError, TypeError, OSError, RuntimeError))


def test_every_error_a_caller_can_meet_is_found_at_the_top() -> None:
    inner = {"WriteConflict"}

    for name, kind in EVERY.items():
        if name not in inner:
            assert getattr(flowstead, name) is kind


@pytest.mark.parametrize("error", made())
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling_with_its_facts_and_its_message(
    error: errors.FlowError, protocol: int
) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))

    assert type(again) is type(error)
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert str(again) == str(error)


@pytest.mark.parametrize("error", made())
def test_every_error_survives_copying_and_raising_from_a_cause(error: errors.FlowError) -> None:
    cause = OSError("disk")

    with pytest.raises(type(error)) as caught:
        raise copy.copy(error) from cause

    assert caught.value.__cause__ is cause
    assert vars(caught.value) == vars(error)
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("error", made())
def test_every_message_is_a_sentence_of_text(error: errors.FlowError) -> None:
    assert str(error)
    assert "Flow(" not in str(error)
    assert "Failure(" not in str(error)


# ---- what children raise --------------------------------------------------------------------------

SIGNALS = [errors.Transient, errors.Fatal, errors.NeedsReview]


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("retry_after", [None, 0, 2.5])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_signal_survives_the_way_between_processes_with_what_it_asks_for(
    kind: type[errors.TaskSignal], retry_after: float | None, protocol: int
) -> None:
    signal = kind("the amount is odd", retry_after=retry_after)

    for again in (pickle.loads(pickle.dumps(signal, protocol)), copy.copy(signal)):
        assert type(again) is kind
        assert str(again) == "the amount is odd"
        assert again.retry_after == retry_after


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_is_no_error_of_ours_so_that_nobody_swallows_it_by_mistake(
    kind: type[errors.TaskSignal],
) -> None:
    assert issubclass(kind, errors.TaskSignal)
    assert not issubclass(kind, (errors.FlowError, OSError, ValueError, RuntimeError))
    assert getattr(flowstead, kind.__name__) is kind
    assert str(kind()) == ""
    assert kind().retry_after is None


def test_what_signals_have_in_common_is_not_raised_by_itself() -> None:
    with pytest.raises(TypeError, match="raise Transient, Fatal or NeedsReview"):
        errors.TaskSignal("odd")


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, parent in TREE.items() if parent == "RefusedError"])
def test_a_refusal_keeps_its_reason_and_the_flow_as_it_is(name: str) -> None:
    error = EVERY[name]("Nothing changed.", FLOW)

    assert error.reason == "Nothing changed."
    assert error.current is FLOW
    assert str(error) == "Nothing changed."


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.ChildFailed, "child 'step' failed: ValueError: no"),
        (errors.ChildTimedOut, "child 'step' timed out: ValueError: no"),
        (errors.ChildCancelled, "child 'step' was cancelled: ValueError: no"),
        (errors.ChildLost, "child 'step' was lost: ValueError: no"),
        (errors.ChildError, "child 'step' ended without a result: ValueError: no"),
    ],
)
def test_a_childs_error_names_the_child_how_it_ended_and_why(
    kind: type[errors.ChildError], says: str
) -> None:
    assert str(kind("t-1", "step", FAILURE)) == says
    assert str(kind("t-1", None, FAILURE)) == says.replace("step", "t-1")


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (Failure(kind="lost", code="C", message="m"), "m"),
        (Failure(kind="lost", code="C"), "C"),
        (Failure(kind="lost"), "lost"),
    ],
)
def test_a_childs_error_tells_the_most_it_knows(failure: Failure, told: str) -> None:
    assert str(errors.ChildLost("t", None, failure)).endswith(f": {told}")


def test_errors_of_the_store_name_the_store_and_what_to_make_of_it() -> None:
    in_use = errors.StoreInUse("flows.db", "process 7")
    unusable = errors.StoreUnusable("flows.db", "it is not a flowstead file.")
    unreadable = errors.SnapshotUnreadable("flow triage-1", "its status is unknown")

    assert str(in_use) == "flows.db is in use by process 7."
    assert str(unusable) == "flows.db cannot be opened: it is not a flowstead file."
    assert "flow triage-1 cannot be read: its status is unknown." in str(unreadable)
