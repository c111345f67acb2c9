"""Bad input: each kind has its code or its sentence, nothing is written, and the next call works."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import IntEnum, StrEnum
from functools import partial
from typing import Any

import msgspec
import pytest

from flowstead import (
    InvalidState,
    Limits,
    Nested,
    Refused,
    Registry,
    Rejected,
    Retry,
    Runtime,
    SessionFlows,
    StateTooLarge,
    TaskContext,
    open_runtime,
)
from tests.runtime.support import Where, answer_of, bound, dump, link, make

Call = Callable[[SessionFlows], Awaitable[Any]]


@pytest.fixture
async def runtime(store: Where) -> AsyncIterator[Runtime]:
    """Small limits, so that what is too large need not be large."""
    limits = Limits(state_bytes=2_000, state_warn_bytes=1_000, wait_bytes=500, json_depth=20)
    async with open_runtime(store, limits=limits) as runtime:
        await make(bound(runtime), flow_id="f", state_json=1)
        yield runtime


class _Text(str):
    pass


class _Number(int):
    pass


class _Word(StrEnum):
    ONE = "one"


class _Count(IntEnum):
    ONE = 1


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _cycle() -> Any:
    value: dict[str, Any] = {"a": []}
    value["a"].append(value)
    return value


def _shared() -> Any:
    value: Any = [1, 2]
    for _ in range(18):
        value = [value, value]
    return value


NOT_JSON: dict[str, tuple[Any, str]] = {
    "nan": (float("nan"), " is nan"),
    "inf": (float("inf"), " is inf"),
    "minus inf": (float("-inf"), " is -inf"),
    "nan inside": ({"a": [{"b": float("nan")}]}, "['a'][0]['b'] is nan"),
    "nan in a tuple": ((1, (2, float("nan"))), "[1][1] is nan"),
    "set": ({"a": {1}}, "['a'] is of type set"),
    "frozenset": (frozenset({1}), " is of type frozenset"),
    "bytes": ({"a": b"x"}, "['a'] is of type bytes"),
    "datetime": (
        {"at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)},
        "['at'] is of type datetime",
    ),
    "date": ([datetime.date(2026, 1, 1)], "[0] is of type date"),
    "uuid": ([uuid.UUID(int=1)], "[0] is of type UUID"),
    "decimal": ([decimal.Decimal(1)], "[0] is of type Decimal"),
    "object": ([1, object()], "[1] is of type object"),
    "function": ({"f": print}, "['f'] is of type builtin_function_or_method"),
    "complex": (1j, " is of type complex"),
    "int key": ({"a": {1: 2}}, "['a'] has a key of type int"),
    "none key": ({None: 2}, " has a key of type NoneType"),
    "tuple key": ([{(1, 2): 2}], "[0] has a key of type tuple"),
    "bool key": ({True: 2}, " has a key of type bool"),
    "cycle": (_cycle(), "contains itself"),
    "deep": (_deep(21), "nested deeper than 20 levels"),
    "deep dict": ({"a": {"b": _deep(19)}}, "nested deeper than 20 levels"),
    "surrogate": ({"a": ["x", "\ud800"]}, "['a'][1] holds a lone surrogate"),
    "surrogate alone": ("\udfff", " holds a lone surrogate"),
    "surrogate key": ({"a": {"\ud800": 1}}, "['a']: the key '\\ud800' holds a lone surrogate"),
}

TOO_LARGE: dict[str, Any] = {
    "text": "x" * 2_000,
    "list": list(range(2_000)),
    "key": {"x" * 2_000: 1},
    "shared a million times": _shared(),
    "escapes": "\x01" * 400,
}

FITS: dict[str, Any] = {
    "depth": _deep(20),
    "big int": 2**70,
    "small float": 5e-324,
    "minus zero": -0.0,
    "nul": {"\x00": "\x00"},
    "text": "x" * 1_998,
    "astral": {"\U0001f600": "\U0010ffff"},
    "like an escape": "\\ud800 \\u0000 \\",
    "empty": {"": ""},
    "word": {"w": _Word.ONE, "n": _Count.ONE},
    "number of a kind of its own": [_Number(3)],
    "text of a kind of its own": {"a": [_Text("x")]},
    "tuple": (1, (2, [3])),
    "looks like sql": "'); DROP TABLE flows; --",
}

TAKES_JSON: dict[str, tuple[str, Callable[[SessionFlows, Any], Awaitable[Any]]]] = {
    "create": ("state_json", lambda flows, value: make(flows, state_json=value)),
    "create with a key": (
        "state_json",
        lambda flows, value: make(flows, state_json=value, idempotency_key="k"),
    ),
    "create waiting": ("wait_json", lambda flows, value: make(flows, wait_json=value)),
    "set_waiting": (
        "state_json",
        lambda flows, value: flows.set_waiting(flow_id="f", expected_revision=0, state_json=value),
    ),
    "set_waiting wait": (
        "wait_json",
        lambda flows, value: flows.set_waiting(flow_id="f", expected_revision=0, wait_json=value),
    ),
    "resume": (
        "state_json",
        lambda flows, value: flows.resume(flow_id="f", expected_revision=0, state_json=value),
    ),
    "update": (
        "state_json",
        lambda flows, value: flows.update(flow_id="f", expected_revision=0, state_json=value),
    ),
    "finish": (
        "state_json",
        lambda flows, value: flows.finish(flow_id="f", expected_revision=0, state_json=value),
    ),
    "fail": (
        "state_json",
        lambda flows, value: flows.fail(flow_id="f", expected_revision=0, state_json=value),
    ),
    "run_task": (
        "input_json",
        lambda flows, value: flows.run_task(flow_id="f", runtime="acp", task="t", input_json=value),
    ),
    "spawn_detached": (
        "input_json",
        lambda flows, value: flows.spawn_detached(runtime="acp", task="t", input_json=value),
    ),
}


def _refusal_of(answer: Any) -> tuple[str, str]:
    assert isinstance(answer, Rejected | Refused)
    return answer.code.value, answer.reason


async def _refused(call: Awaitable[Any]) -> tuple[str, str]:
    """The code and the sentence, answered or raised."""
    try:
        return _refusal_of(await call)
    except InvalidState as error:
        return "invalid_state", str(error)
    except StateTooLarge as error:
        return "state_too_large", str(error)


async def _works(flows: SessionFlows) -> None:
    assert (await flows.update(flow_id="f", expected_revision=0, state_json=2)).applied
    assert (await make(flows)).revision == 0


@pytest.mark.parametrize("what", NOT_JSON)
async def test_what_is_not_json_is_refused_with_its_path(
    store: Where, flows: SessionFlows, what: str
) -> None:
    value, told = NOT_JSON[what]
    before = dump(store)

    for where, (name, call) in TAKES_JSON.items():
        code, reason = await _refused(call(flows, value))
        assert (where, code) == (where, "invalid_state")
        assert reason.startswith(name)
        assert told in reason

    assert dump(store) == before
    await _works(flows)


async def test_a_number_of_too_many_digits_is_refused_with_its_path(
    store: Where, flows: SessionFlows
) -> None:
    before = dump(store)

    refused = await flows.update(flow_id="f", expected_revision=0, state_json={"a": [10**5000]})

    assert refused.code == "invalid_state"
    assert dump(store) == before
    assert refused.reason.startswith("state_json['a'][0] ")


@pytest.mark.parametrize("what", TOO_LARGE)
async def test_what_is_too_large_is_refused_with_its_size(
    store: Where, flows: SessionFlows, what: str
) -> None:
    before = dump(store)

    for where, (name, call) in TAKES_JSON.items():
        code, reason = await _refused(call(flows, TOO_LARGE[what]))
        assert (where, code) == (where, "state_too_large")
        assert reason.startswith(f"{name} takes ")

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("what", FITS)
async def test_what_json_can_hold_is_kept_as_it_is(store: Where, what: str) -> None:
    value = FITS[what]
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        await make(flows, flow_id="f", state_json=value, wait_json=[value])
        task = await link(flows, "f", input_json=value)
        await flows.complete_task(task.task_id, result_json=value)

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = (await flows.update(flow_id="f", expected_revision=0)).unwrap()
        ended = await flows.get_task(task.task_id)

    expected = [1, [2, [3]]] if what == "tuple" else value
    assert ended is not None
    for kept in (flow.state_json, flow.wait_json[0], ended.input_json, ended.result_json):
        assert kept == expected
        assert (
            repr(kept) == repr(expected)
            or type(value) is not type(kept)
            or "kind" in what
            or what == "word"
        )


async def test_a_result_that_is_not_json_is_refused_with_its_path(
    store: Where, flows: SessionFlows
) -> None:
    task = await link(flows, "f")
    before = dump(store)

    for value, told in NOT_JSON.values():
        with pytest.raises(InvalidState) as caught:
            await flows.complete_task(task.task_id, result_json=value)
        assert str(caught.value).startswith("result_json")
        assert told in str(caught.value)

    assert dump(store) == before
    assert await flows.complete_task(task.task_id) is not None


async def test_an_origin_that_is_not_json_is_refused_with_its_path(runtime: Runtime) -> None:
    for value, told in NOT_JSON.values():
        with pytest.raises(InvalidState) as caught:
            bound(runtime, requester_origin={"to": value})
        assert str(caught.value).startswith("requester_origin['to']")
        assert told in str(caught.value)


@pytest.mark.parametrize("origin", ["slack", ["slack"], 1, True, b"x"])
async def test_an_origin_is_a_mapping(runtime: Runtime, origin: Any) -> None:
    with pytest.raises(TypeError, match=r"^requester_origin must be a mapping, not "):
        bound(runtime, requester_origin=origin)


async def test_an_origin_over_its_limit_is_refused(runtime: Runtime) -> None:
    with pytest.raises(StateTooLarge, match=r"^requester_origin takes "):
        bound(runtime, requester_origin={"to": "x" * 500})


# ---- texts ----------------------------------------------------------------------------------------

BLANK = ["", " ", "\n\t ", "\u3000"]
NOT_TEXT = [None, 1, 1.5, True, b"x", ["x"], {"x": 1}]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("controller_id", "Managed flow controllerId is required."),
        ("goal", "Managed flow goal is required."),
    ],
)
async def test_a_flow_needs_a_controller_and_a_goal(
    store: Where, flows: SessionFlows, name: str, sentence: str
) -> None:
    before = dump(store)

    for blank in BLANK:
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            await make(flows, **{name: blank})
    for value in NOT_TEXT:
        with pytest.raises(TypeError, match=f"^{name} must be a string, not "):
            await make(flows, **{name: value})

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("value", NOT_TEXT, ids=repr)
async def test_a_session_key_is_a_text(runtime: Runtime, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        runtime.tasks.flow.bind_session(session_key=value)


async def test_a_child_needs_an_instruction(store: Where, flows: SessionFlows) -> None:
    before = dump(store)

    for value in [*BLANK, *NOT_TEXT]:
        with pytest.raises((ValueError, TypeError), match=r"^task must "):
            await flows.run_task(flow_id="f", runtime="acp", task=value)  # type: ignore[arg-type]

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("runtime_name", [None, "", " "])
async def test_a_linked_child_needs_a_runtime(
    store: Where, flows: SessionFlows, runtime_name: str | None
) -> None:
    before = dump(store)

    with pytest.raises(ValueError, match=r"^(A linked task needs a runtime|runtime must not)"):
        await flows.run_task(flow_id="f", task="t", runtime=runtime_name)

    assert dump(store) == before


TEXTS: dict[str, Callable[[SessionFlows, Any], Awaitable[Any]]] = {
    "controller_id": lambda flows, value: make(flows, controller_id=value),
    "goal": lambda flows, value: make(flows, goal=value),
    "flow_id": lambda flows, value: make(flows, flow_id=value),
    "correlation_id": lambda flows, value: make(flows, correlation_id=value),
    "idempotency_key": lambda flows, value: make(flows, idempotency_key=value),
    "current_step": lambda flows, value: make(flows, current_step=value),
    "current_step ": lambda flows, value: flows.update(
        flow_id="f", expected_revision=0, current_step=value
    ),
    "blocked_task_id": lambda flows, value: flows.set_waiting(
        flow_id="f", expected_revision=0, blocked_task_id=value
    ),
    "blocked_summary": lambda flows, value: flows.fail(
        flow_id="f", expected_revision=0, blocked_summary=value
    ),
    "run_id": lambda flows, value: flows.run_task(
        flow_id="f", runtime="acp", task="t", run_id=value
    ),
    "label": lambda flows, value: flows.run_task(flow_id="f", runtime="acp", task="t", label=value),
    "child_session_key": lambda flows, value: flows.run_task(
        flow_id="f", runtime="acp", task="t", child_session_key=value
    ),
    "runtime": lambda flows, value: flows.run_task(flow_id="f", task="t", runtime=value),
    "error": lambda flows, value: flows.fail_task("t", error=value),
    "summary": lambda flows, value: flows.progress_task("t", summary=value),
    "terminal_summary": lambda flows, value: flows.complete_task("t", terminal_summary=value),
    "controller_id ": lambda flows, value: flows.list(controller_id=value),
    "correlation_id ": lambda flows, value: flows.list(correlation_id=value),
}


@pytest.mark.parametrize("name", TEXTS)
async def test_a_text_is_a_string(store: Where, flows: SessionFlows, name: str) -> None:
    before = dump(store)

    for value in (1, 1.5, True, b"x", ["x"]):
        with pytest.raises(TypeError) as caught:
            await TEXTS[name](flows, value)
        assert str(caught.value).startswith(f"{name.strip()} must be a string, not ")

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("name", TEXTS)
async def test_a_text_can_be_stored(store: Where, flows: SessionFlows, name: str) -> None:
    before = dump(store)

    for value in ("x\ud800", "x" * 300_000):
        with pytest.raises(ValueError, match=rf"^{name.strip()} ") as caught:
            await TEXTS[name](flows, value)
        assert type(caught.value) is ValueError
        assert len(str(caught.value)) < 200

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("name", ["current_step", "correlation_id", "idempotency_key"])
@pytest.mark.parametrize("blank", BLANK)
async def test_a_blank_optional_text_is_none(flows: SessionFlows, name: str, blank: str) -> None:
    one, two = await make(flows, **{name: blank}), await make(flows, **{name: blank})

    assert one.flow_id != two.flow_id
    assert (one.current_step, one.correlation_id) == (None, None)


# ---- words and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["", "done", "QUEUED", " queued", None, 1, True, "x" * 500, [1]])
async def test_a_misspelt_status_is_misuse(store: Where, flows: SessionFlows, status: Any) -> None:
    before = dump(store)
    calls: list[Awaitable[Any]] = [
        make(flows, status=status),
        flows.resume(flow_id="f", expected_revision=0, status=status),
        flows.run_task(flow_id="f", runtime="acp", task="t", status=status),
        flows.fail_task("t", error="e", status=status),
        make(flows, notify_policy=status),
    ]
    if status is not None:
        calls += [flows.list(status=status), flows.list_tasks("f", status=status)]
        calls += [flows.complete_task("t", terminal_outcome=status)]

    for call in calls:
        with pytest.raises((ValueError, TypeError)) as caught:
            await call
        assert len(str(caught.value)) < 300

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "lost", "timed_out"])
async def test_a_flow_does_not_begin_or_go_on_ended(
    store: Where, flows: SessionFlows, status: str
) -> None:
    before = dump(store)

    with pytest.raises(ValueError, match=r"^status must be one of queued, running, waiting, bloc"):
        await make(flows, status=status)
    with pytest.raises(ValueError, match=r"^status must be one of queued, running; got "):
        await flows.resume(flow_id="f", expected_revision=0, status=status)
    with pytest.raises(ValueError, match=r"^status must be one of queued, running; got "):
        await flows.run_task(flow_id="f", runtime="acp", task="t", status=status)

    assert dump(store) == before


async def test_one_misspelt_status_among_several_is_misuse(flows: SessionFlows) -> None:
    with pytest.raises(ValueError, match="'runing'"):
        await flows.list(status=["queued", "runing"])
    with pytest.raises(ValueError, match="'waiting'"):
        await flows.list_tasks("f", status=["queued", "waiting"])


async def test_a_listing_of_no_status_lists_nothing(flows: SessionFlows) -> None:
    await link(flows, "f")

    assert await flows.list(status=[]) == []
    assert await flows.list_tasks("f", status=()) == []


@pytest.mark.parametrize(
    "name", ["set_waiting", "resume", "update", "finish", "fail", "request_cancel", "cancel"]
)
async def test_an_expected_revision_is_a_whole_number(
    store: Where, flows: SessionFlows, name: str
) -> None:
    before = dump(store)
    wrong: list[Any] = [True, False, 0.0, 1.5, "0", -1, -(2**70), [0]]

    for revision in wrong if name == "cancel" else [None, *wrong]:
        with pytest.raises((TypeError, ValueError), match=r"^expected_revision must be "):
            await getattr(flows, name)(flow_id="f", expected_revision=revision)

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("value", [None, True, 1.5, "1", 0, -1])
async def test_counts_are_whole_numbers_from_one(
    store: Where, flows: SessionFlows, value: Any
) -> None:
    before = dump(store)

    with pytest.raises((TypeError, ValueError), match=r"^state_version must be "):
        await make(flows, state_version=value)
    with pytest.raises((TypeError, ValueError), match=r"^limit must be "):
        await flows.list(limit=value)
    with pytest.raises((TypeError, ValueError), match=r"^limit must be "):
        await flows.history("f", limit=value)

    assert dump(store) == before


@pytest.mark.parametrize("huge", [2**63, 2**64, 2**70, 10**400])
async def test_a_number_too_large_for_any_store_is_answered_all_the_same(
    store: Where, flows: SessionFlows, huge: int
) -> None:
    before = dump(store)

    for call in (
        flows.list(limit=huge),
        flows.history("f", after_seq=huge),
        flows.history("f", limit=huge),
        flows.update(flow_id="f", expected_revision=huge),
    ):
        assert await answer_of(call)

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("value", ["0", 1.5, True, -1])
async def test_a_sequence_number_is_a_whole_number(flows: SessionFlows, value: Any) -> None:
    for call in (
        lambda: flows.watch("f", after_seq=value),
        lambda: flows.watch(after_position=value),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^after_(seq|position) must be "):
            call()
    with pytest.raises((TypeError, ValueError), match=r"^after_seq must be "):
        await flows.history("f", after_seq=value)


async def test_a_flow_is_watched_by_seq_and_everything_by_position(flows: SessionFlows) -> None:
    with pytest.raises(ValueError, match="after_seq counts inside one flow"):
        flows.watch(after_seq=0)
    with pytest.raises(ValueError, match="after_position counts over all flows"):
        flows.watch("f", after_position=0)


@pytest.mark.parametrize("value", ["now", 1.5, True, -1, 2**53, float("nan")])
@pytest.mark.parametrize("name", ["started_at", "last_event_at"])
async def test_an_instant_is_epoch_milliseconds(
    store: Where, flows: SessionFlows, name: str, value: Any
) -> None:
    before = dump(store)

    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be epoch milliseconds"):
        await flows.run_task(
            flow_id="f", runtime="acp", task="t", status="running", **{name: value}
        )

    assert dump(store) == before


# ---- ids ------------------------------------------------------------------------------------------

NAMES_NOTHING = [
    "",
    " ",
    "\x00",
    "f\x00",
    "f\n",
    " f",
    "f ",
    "F",
    "'",
    '"',
    "f'--",
    "' OR '1'='1",
    "f'; DROP TABLE flows; --",
    "%",
    "_",
    "*",
    "\ud800",
    "\udfff\ud800",
    "\u202ef",
    "f\u0301",
    "\ufeff",
    "\U0010ffff",
    "x" * 10_000,
    "\x7f\x1b[31m",
    "../../etc/passwd",
    "{}",
    "null",
]

BY_FLOW: dict[str, tuple[Call | Any, Any]] = {
    "get": (lambda flows, i: flows.get(i), None),
    "resolve": (lambda flows, i: flows.resolve(i), ...),
    "get_task_summary": (lambda flows, i: flows.get_task_summary(i), None),
    "list_tasks": (lambda flows, i: flows.list_tasks(i), []),
    "history": (lambda flows, i: flows.history(i), []),
    "run_task": (lambda flows, i: flows.run_task(flow_id=i, runtime="acp", task="t"), "not_found"),
    "cancel": (lambda flows, i: flows.cancel(i), "not_found"),
    "retry_flow": (lambda flows, i: flows.retry_flow(i), "not_found"),
    "set_waiting": (
        lambda flows, i: flows.set_waiting(flow_id=i, expected_revision=0),
        "not_found",
    ),
    "resume": (lambda flows, i: flows.resume(flow_id=i, expected_revision=0), "not_found"),
    "update": (lambda flows, i: flows.update(flow_id=i, expected_revision=0), "not_found"),
    "finish": (lambda flows, i: flows.finish(flow_id=i, expected_revision=0), "not_found"),
    "fail": (lambda flows, i: flows.fail(flow_id=i, expected_revision=0), "not_found"),
    "request_cancel": (
        lambda flows, i: flows.request_cancel(flow_id=i, expected_revision=0),
        "not_found",
    ),
    "result": (lambda flows, i: flows.result(i), "FlowNotFound"),
    "list": (lambda flows, i: flows.list(after=i), "ValueError"),
    "watch": (lambda flows, i: flows.watch(i).__aenter__(), "FlowNotFound"),
}


@pytest.mark.parametrize("name", BY_FLOW)
async def test_an_id_of_any_bytes_names_nothing(
    store: Where, flows: SessionFlows, name: str
) -> None:
    call, expected = BY_FLOW[name]
    before = dump(store)

    for flow_id in NAMES_NOTHING:
        if name == "resolve":
            assert (await flows.resolve(flow_id) is None) is (flow_id.strip() != "f")
        elif isinstance(expected, str) and expected != "not_found":
            assert (await answer_of(call(flows, flow_id))).startswith(expected)
        elif expected == "not_found":
            assert (await call(flows, flow_id)).code == "not_found"
        else:
            assert await call(flows, flow_id) == expected

    assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize("name", BY_FLOW)
async def test_an_id_is_a_string(store: Where, flows: SessionFlows, name: str) -> None:
    call, _ = BY_FLOW[name]
    before = dump(store)
    wrong: list[Any] = [1, True, b"f", ["f"], {"f": 1}]

    for flow_id in wrong if name in {"list", "watch"} else [None, *wrong]:
        with pytest.raises(TypeError, match=r"^(flow_id|token|after) must be a string, not "):
            await call(flows, flow_id)

    assert dump(store) == before


@pytest.mark.parametrize("task_id", [None, 1, b"t", ["t"]], ids=repr)
async def test_a_childs_id_is_a_string(flows: SessionFlows, task_id: Any) -> None:
    for call in (
        flows.get_task(task_id),
        flows.wait_task(task_id),
        flows.start_task(task_id),
        flows.progress_task(task_id),
        flows.complete_task(task_id),
        flows.fail_task(task_id, error="e"),
        flows.cancel_task(task_id),
        flows.retry_task(task_id),
    ):
        with pytest.raises(TypeError, match=r"^task_id must be a string, not "):
            await call


@pytest.mark.parametrize(
    "flow_id", ["a\x00b", "a\nb", "\x1b[31m", "\u202ea", "\u200b", "x" * 257, "\ud800", "\ufffe"]
)
async def test_an_id_of_ones_own_is_printable_and_short(
    store: Where, flows: SessionFlows, flow_id: str
) -> None:
    before = dump(store)

    with pytest.raises(ValueError, match=r"^flow_id "):
        await make(flows, flow_id=flow_id)

    assert dump(store) == before


@pytest.mark.parametrize("flow_id", [*BLANK, 1, True, b"f"], ids=repr)
async def test_an_id_of_ones_own_is_not_blank(flows: SessionFlows, flow_id: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^flow_id must "):
        await make(flows, flow_id=flow_id)


@pytest.mark.parametrize(
    "flow_id", ["'; DROP TABLE flows; --", "a b", "50%_*?[x]", "ünï", "x" * 256, "null", "0", "a/b"]
)
async def test_an_odd_id_of_ones_own_works_everywhere(store: Where, flow_id: str) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows, flow_id=flow_id)
        task = await link(flows, flow_id)
        await make(flows, flow_id=f"{flow_id[:200]}-other")

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        assert await flows.get(flow_id) == flow
        assert await flows.resolve(flow_id) == flow
        assert await flows.list_tasks(flow_id) == [task]
        assert len(await flows.history(flow_id)) == 2
        assert await flows.list(after=flow_id) == []
        assert (await flows.cancel(flow_id)).cancelled


# ---- launching ------------------------------------------------------------------------------------


async def work(_: TaskContext, value: Any) -> Any:
    return value


class Unrunnable(msgspec.Struct, frozen=True):
    """A spec that no executor takes."""


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"run": "nobody"}, ValueError, "no task named 'nobody' is registered"),
        ({"run": ""}, ValueError, "no task named '' is registered"),
        ({"run": 5}, TypeError, "run= takes a task function, its name or a spec"),
        ({"run": object()}, TypeError, "run= takes a task function, its name or a spec"),
        ({"run": []}, TypeError, "run= takes a task function, its name or a spec"),
        ({"run": {}}, TypeError, "run= takes a task function, its name or a spec"),
        ({"run": Unrunnable()}, TypeError, "no executor is registered that runs Unrunnable"),
        ({"run": Nested("nobody")}, ValueError, "no controller 'nobody' is registered"),
        ({"run": work, "timeout": 0}, ValueError, "timeout must be a positive number of seconds"),
        ({"run": work, "timeout": -1}, ValueError, "timeout must be a positive number of seconds"),
        ({"run": work, "timeout": float("nan")}, ValueError, "timeout must be a positive number"),
        ({"run": work, "timeout": float("inf")}, ValueError, "timeout must be a positive number"),
        ({"run": work, "timeout": True}, TypeError, "timeout must be a number of seconds"),
        ({"run": work, "timeout": "5"}, TypeError, "timeout must be a number of seconds"),
        ({"run": work, "retry": 3}, TypeError, "retry must be"),
        ({"run": work, "retry": {"maxAttempts": 3}}, TypeError, "retry must be"),
        ({"run": work, "status": "running"}, ValueError, "A child launched with run= starts as"),
        ({"run": work, "idle_timeout": 0}, ValueError, "idle_timeout must be a positive number"),
        ({"run": work, "queue_timeout": "5"}, TypeError, "queue_timeout must be a number of"),
        ({"run": work, "idempotent": False, "retry": Retry()}, ValueError, "idempotent=False allo"),
        ({"runtime": "acp", "retry": Retry()}, ValueError, "time-outs and retry are for children"),
        ({"runtime": "acp", "timeout": 5}, ValueError, "time-outs and retry are for children"),
        ({"runtime": "acp", "idle_timeout": 5}, ValueError, "time-outs and retry are for child"),
        ({"runtime": "acp", "queue_timeout": 5}, ValueError, "time-outs and retry are for child"),
        ({"runtime": "acp", "idempotent": True}, ValueError, "time-outs and retry are for child"),
        ({}, ValueError, "A linked task needs a runtime; a launched one needs run="),
    ],
)
async def test_a_launch_that_makes_no_sense_is_misuse(
    store: Where,
    flows: SessionFlows,
    given: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    before = dump(store)

    for call in (
        flows.run_task(flow_id="f", task="t", **given),
        flows.spawn_detached(task="t", **given),
    ):
        with pytest.raises(error) as caught:
            await call

        assert type(caught.value) is error
        assert str(caught.value).startswith(sentence)
        assert dump(store) == before
    await _works(flows)


@pytest.mark.parametrize(
    "given",
    [
        {"max_attempts": 0},
        {"max_attempts": 2.5},
        {"max_attempts": "3"},
        {"initial": -1},
        {"initial": float("nan")},
        {"initial": float("inf")},
        {"factor": 0.5},
        {"factor": float("inf")},
        {"max_delay": -1},
        {"max_delay": float("inf")},
        {"jitter": 1.5},
        {"jitter": float("nan")},
    ],
    ids=str,
)
def test_a_retry_that_cannot_be_kept_is_misuse(given: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Retry(**given)


@pytest.mark.parametrize("value", [0, -1, float("nan"), "many", None], ids=repr)
def test_a_limit_is_positive(value: Any) -> None:
    for name in Limits.__struct_fields__:
        with pytest.raises((ValueError, TypeError)):
            Limits(**{name: value})


# ---- controllers -----------------------------------------------------------------------------------


def _plain(_: Any) -> None:
    """No coroutine comes of it."""


class _Async:
    async def __call__(self, _: Any) -> None:
        """A controller like any other."""


class _Plain:
    def __call__(self, _: Any) -> None:
        """No coroutine comes of it."""


@pytest.mark.parametrize("given", [_plain, _Plain(), partial(_plain), lambda _: None, "run", None])
def test_a_controller_that_is_not_async_is_misuse(given: Any) -> None:
    registry = Registry()

    with pytest.raises(TypeError) as raised:
        registry.controller("shop/order")(given)

    assert str(raised.value) == "the controller 'shop/order' must be an async def of (flow)."
    assert registry.controllers == {}


def test_whatever_makes_a_coroutine_is_a_controller() -> None:
    registry = Registry()
    given = [_Async(), _Async().__call__, partial(_Async().__call__)]

    for place, controller in enumerate(given):
        registry.controller(str(place))(controller)

    assert list(registry.controllers.values()) == given
