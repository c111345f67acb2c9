"""The public surface: names, signatures, docstrings, and what importing it does not do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest

import flowstead
from flowstead import FlowContext, Registry, Runtime, SessionFlows, Step, TaskContext

PROMISED = {
    "open_runtime",
    "Runtime",
    "Registry",
    "SessionFlows",
    "FlowContext",
    "TaskContext",
    "Step",
    "Flow",
    "Task",
    "Event",
    "Applied",
    "Rejected",
    "Created",
    "Refused",
    "CancelReport",
    "TaskSummary",
    "Retry",
    "Limits",
    "Succeeded",
    "Failed",
    "TimedOut",
    "Cancelled",
    "Lost",
    "UNSET",
    "Category",
    "Command",
    "Nested",
    "Process",
    "Settlement",
    "TaskCancelReport",
    "TaskRetryReport",
}

ERRORS = {
    "FlowError": "Exception",
    "RefusedError": "FlowError",
    "Unavailable": "FlowError",
    "StoreError": "FlowError",
    "ChildError": "FlowError",
    "FlowNotFound": "RefusedError",
    "FlowExists": "RefusedError",
    "RevisionConflict": "RefusedError",
    "IllegalTransition": "RefusedError",
    "CancelPending": "RefusedError",
    "MailboxFull": "Unavailable",
    "RuntimeClosed": "Unavailable",
    "CommitFailed": "StoreError",
    "SnapshotUnreadable": "StoreError",
    "StoreInUse": "StoreError",
    "ChildFailed": "ChildError",
    "ChildTimedOut": "ChildError",
    "ChildCancelled": "ChildError",
    "TaskNotRetryable": "RefusedError",
    "LimitReached": "RefusedError",
}

SIGNALS = {
    "TaskSignal": "Exception",
    "Transient": "TaskSignal",
    "Fatal": "TaskSignal",
    "NeedsReview": "TaskSignal",
}
"""What children raise: a family of its own, so that no `except FlowError` in a child swallows it."""

REQUIRED: Any = inspect.Parameter.empty
UNSET = flowstead.UNSET

LEDGER: dict[str, tuple[list[str], dict[str, Any]]] = {
    "create_managed": (
        [],
        {
            "controller_id": REQUIRED,
            "goal": REQUIRED,
            "flow_id": None,
            "correlation_id": None,
            "idempotency_key": None,
            "status": "queued",
            "notify_policy": "done_only",
            "current_step": None,
            "state_json": UNSET,
            "wait_json": UNSET,
            "state_version": 1,
        },
    ),
    "get": (["flow_id"], {}),
    "find_latest": ([], {}),
    "resolve": (["token"], {}),
    "list": (
        [],
        {
            "status": None,
            "controller_id": None,
            "correlation_id": None,
            "limit": 100,
            "after": None,
        },
    ),
    "get_task_summary": (["flow_id"], {"nested": False}),
    "run_task": (
        [],
        {
            "flow_id": REQUIRED,
            "task": REQUIRED,
            "runtime": None,
            "run": None,
            "input_json": (None, UNSET),
            "run_id": None,
            "child_session_key": None,
            "label": None,
            "status": "queued",
            "started_at": None,
            "last_event_at": None,
            "timeout": None,
            "idle_timeout": None,
            "queue_timeout": None,
            "retry": None,
            "idempotent": None,
        },
    ),
    "spawn_detached": (
        [],
        {
            "task": REQUIRED,
            "runtime": None,
            "run": None,
            "goal": None,
            "input_json": UNSET,
            "run_id": None,
            "child_session_key": None,
            "label": None,
            "correlation_id": None,
            "notify_policy": "done_only",
            "status": "queued",
            "started_at": None,
            "last_event_at": None,
            "timeout": None,
            "idle_timeout": None,
            "queue_timeout": None,
            "retry": None,
            "idempotent": None,
        },
    ),
    "get_task": (["task_id"], {}),
    "list_tasks": (["flow_id"], {"status": None}),
    "wait_task": (["task_id"], {}),
    "start_task": (["task_id"], {}),
    "progress_task": (["task_id"], {"summary": None}),
    "complete_task": (
        ["task_id"],
        {"result_json": (None, UNSET), "terminal_summary": None, "terminal_outcome": None},
    ),
    "fail_task": (["task_id"], {"error": REQUIRED, "status": "failed"}),
    "cancel_task": (["task_id"], {"grace": 5.0}),
    "retry_task": (["task_id"], {"input_json": UNSET}),
    "retry_flow": (["flow_id"], {}),
    "set_waiting": (
        [],
        {
            "flow_id": REQUIRED,
            "expected_revision": REQUIRED,
            "current_step": UNSET,
            "state_json": UNSET,
            "wait_json": None,
            "blocked_task_id": None,
            "blocked_summary": None,
        },
    ),
    "resume": (
        [],
        {
            "flow_id": REQUIRED,
            "expected_revision": REQUIRED,
            "status": "queued",
            "current_step": UNSET,
            "state_json": UNSET,
        },
    ),
    "update": (
        [],
        {
            "flow_id": REQUIRED,
            "expected_revision": REQUIRED,
            "current_step": UNSET,
            "state_json": UNSET,
        },
    ),
    "finish": (
        [],
        {
            "flow_id": REQUIRED,
            "expected_revision": REQUIRED,
            "current_step": UNSET,
            "state_json": UNSET,
        },
    ),
    "fail": (
        [],
        {
            "flow_id": REQUIRED,
            "expected_revision": REQUIRED,
            "current_step": UNSET,
            "state_json": UNSET,
            "blocked_task_id": None,
            "blocked_summary": None,
        },
    ),
    "request_cancel": ([], {"flow_id": REQUIRED, "expected_revision": REQUIRED}),
    "cancel": (["flow_id"], {"expected_revision": None, "grace": 5.0}),
    "history": (["flow_id"], {"after_seq": 0, "limit": 1000}),
    "result": (["flow_id"], {}),
    "watch": (["flow_id"], {"after_seq": None}),
}
"""Each method: its leading positional parameters, and its keyword-only ones with their defaults."""

POLICY = {
    "timeout": None,
    "idle_timeout": None,
    "queue_timeout": None,
    "retry": None,
    "idempotent": None,
}
STEPS = {
    "run": {"name": None, **POLICY, "fallback": ()},
    "start": {"name": None, **POLICY},
    "gather": {"return_outcomes": False},
    "first": {},
    "map": {"name": None, "limit": None, "return_outcomes": False},
    "once": {},
    "update": {"current_step": UNSET, "state_json": UNSET},
    "finish": {},
    "fail": {},
}


def _keywords(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _leading(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


# ---- names ----------------------------------------------------------------------------------------


def test_the_list_of_names_is_sorted_and_has_no_doubles() -> None:
    names = flowstead.__all__

    assert len(set(names)) == len(names)
    constants, classes, functions = (
        sorted(name for name in names if kind(name))
        for kind in (
            str.isupper,
            lambda name: name[0].isupper() and not name.isupper(),
            lambda name: name[0].islower(),
        )
    )
    assert names == constants + classes + functions


def test_every_name_is_there_and_nothing_else_is_public() -> None:
    for name in flowstead.__all__:
        assert getattr(flowstead, name) is not None
    loose = {
        name
        for name, value in vars(flowstead).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }

    assert loose == set(flowstead.__all__)


def test_what_was_promised_is_there() -> None:
    assert set(flowstead.__all__) >= PROMISED | ERRORS.keys() | SIGNALS.keys()


@pytest.mark.parametrize("name", ERRORS | SIGNALS)
def test_an_error_has_its_place_in_the_tree(name: str) -> None:
    error = getattr(flowstead, name)

    assert issubclass(error, Exception)
    assert error.__bases__[0].__name__ == (ERRORS | SIGNALS)[name]


def test_every_error_is_exported_and_part_of_the_tree() -> None:
    from flowstead import errors

    defined = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }

    signals = {name for name, value in defined.items() if issubclass(value, errors.TaskSignal)}
    assert signals == SIGNALS.keys()
    assert all(
        issubclass(value, flowstead.FlowError)
        for name, value in defined.items()
        if name not in signals
    )
    assert defined.keys() - {"WriteConflict"} <= set(flowstead.__all__)


# ---- signatures -----------------------------------------------------------------------------------


def test_the_runtime_is_opened_with_a_store_and_keywords() -> None:
    parameters = inspect.signature(flowstead.open_runtime).parameters

    assert parameters["store"].default == "flows.db"
    assert [
        (name, p.default)
        for name, p in parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in ("limits", "deliveries")
    ] == [
        ("registry", None),
        ("durability", "full"),
        ("clock", None),
        ("ids", None),
        ("takeover", False),
        ("notifier", None),
        ("digest_time", None),
    ]
    assert parameters["limits"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", LEDGER)
def test_a_method_of_the_ledger_has_the_promised_signature(name: str) -> None:
    leading, keywords = LEDGER[name]

    method = getattr(SessionFlows, name)

    assert _leading(method) == leading
    found = _keywords(method)
    for parameter, default in keywords.items():
        allowed = default if isinstance(default, tuple) else (default,)
        assert parameter in found
        assert any(found[parameter] is one or found[parameter] == one for one in allowed)
    # It may grow, but whoever calls it as promised need not know.
    assert REQUIRED not in [found[extra] for extra in found.keys() - keywords.keys()]
    assert inspect.iscoroutinefunction(method) or name == "watch"


def test_a_method_takes_no_owner() -> None:
    for name, method in inspect.getmembers(SessionFlows, inspect.isfunction):
        if not name.startswith("_"):
            assert (
                not {"owner", "owner_key", "session_key"}
                & inspect.signature(method).parameters.keys()
            )


@pytest.mark.parametrize("name", STEPS)
def test_a_controller_has_the_promised_steps(name: str) -> None:
    method = getattr(FlowContext, name)

    found = _keywords(method)
    assert inspect.iscoroutinefunction(method)
    for parameter, default in STEPS[name].items():
        assert parameter in found
        assert found[parameter] is default or found[parameter] == default


def test_steps_are_taken_as_they_end_with_async_for_and_raced_by_count() -> None:
    assert not inspect.iscoroutinefunction(FlowContext.as_completed)
    assert inspect.signature(FlowContext.first).parameters["count"].default == 1
    assert list(inspect.signature(FlowContext.as_completed).parameters) == ["self", "steps"]


def test_a_step_can_be_waited_for_and_cancelled() -> None:
    for name in ("outcome", "result", "cancel"):
        assert inspect.iscoroutinefunction(getattr(Step, name))


def test_the_contexts_have_the_promised_attributes() -> None:
    assert {"flow_id", "flow", "revision", "state_json", "current_step"} <= set(dir(FlowContext))
    assert {"progress", "heartbeat"} <= set(dir(TaskContext))


def test_a_session_is_bound_by_keywords() -> None:
    bind = inspect.signature(flowstead.runtime.TaskFlow.bind_session).parameters

    assert [(p.name, p.kind, p.default) for p in list(bind.values())[1:]] == [
        ("session_key", inspect.Parameter.KEYWORD_ONLY, REQUIRED),
        ("requester_origin", inspect.Parameter.KEYWORD_ONLY, None),
    ]


def test_a_task_is_registered_with_its_policy() -> None:
    keywords = _keywords(Registry.task)

    assert keywords == {
        "name": None,
        "timeout": None,
        "idle_timeout": None,
        "queue_timeout": None,
        "retry": None,
        "classify": None,
        "idempotent": True,
        "concurrency": None,
        "executor": "code",
    }


# ---- docstrings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in flowstead.__all__ if name != "UNSET"])
def test_every_public_thing_says_what_it_is(name: str) -> None:
    thing = getattr(flowstead, name)

    assert (thing.__doc__ or "").strip(), name
    if not inspect.isclass(thing):
        return
    for attribute, member in vars(thing).items():
        if attribute.startswith("_"):
            continue
        plain = member.fget if isinstance(member, property) else member
        if not inspect.isfunction(plain):
            continue
        # A property named like what it is needs no sentence; a method does.
        if not isinstance(member, property):
            assert (plain.__doc__ or "").strip(), f"{name}.{attribute}"


@pytest.mark.parametrize("face", [SessionFlows, Runtime, FlowContext, TaskContext, Registry, Step])
def test_every_method_of_a_face_says_what_it_does(face: type[Any]) -> None:
    for name, method in inspect.getmembers(face, inspect.isfunction):
        if not name.startswith("_"):
            assert (method.__doc__ or "").strip(), f"{face.__name__}.{name}"
            assert len(method.__doc__.split()) > 3, f"{face.__name__}.{name} says too little"


# ---- importing ------------------------------------------------------------------------------------


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("flowstead").joinpath("py.typed").is_file()


def test_importing_is_light_and_configures_nothing() -> None:
    program = """
import logging, sys, warnings
warnings.simplefilter("error")
before = list(logging.getLogger().handlers), logging.getLogger().level
import structlog
already = set(sys.modules)
import flowstead
heavy = {"rich", "hypothesis", "pytest", "uvicorn", "starlette", "fastapi", "mcp", "typer", "click"}
print(sorted(heavy & (set(sys.modules) - already)))
print((list(logging.getLogger().handlers), logging.getLogger().level) == before)
print(structlog.is_configured())
import threading
print(threading.active_count())
"""

    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.stdout.split("\n")[:4], done.stderr) == (["[]", "True", "False", "1"], "")
