"""Whatever a child does, exactly one outcome comes out, and its sibling never hears of it."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
import pytest
from msgspec import UNSET, Raw

from flowstead.engine.guard import ChildScope, describe, one_line, run_guarded, stopped
from flowstead.model.effect import StopReason
from flowstead.model.flow import Failure
from flowstead.model.task import Cancelled, Failed, Lost, Outcome, Succeeded, TimedOut
from flowstead.rules.user_json import encode_json, is_encodable

LONGEST = 600


def encode_result(value: Any) -> Any:
    return encode_json(value, name="result", max_bytes=1024, max_depth=20)


async def run(
    code: Callable[[], Awaitable[Any]], child: ChildScope | None = None, *, shutdown: bool = False
) -> tuple[Outcome, Any]:
    return await run_guarded(
        ChildScope(1) if child is None else child,
        code,
        encode_result=encode_result,
        is_shutdown=lambda: shutdown,
    )


class Siblings:
    """A task group with a child in it and a sibling that must not notice."""

    def __init__(self) -> None:
        self.sibling = "not started"
        self.outcomes: list[tuple[Outcome, Any]] = []
        self.escaped = False

    async def run(
        self, code: Callable[[], Awaitable[Any]], child: ChildScope | None = None
    ) -> Outcome:
        gone = asyncio.Event()

        async def guarded() -> None:
            try:
                self.outcomes.append(await run(code, child))
                # What the child left behind must not reach what its runner does next.
                await asyncio.sleep(0)
            except BaseException:
                # Not raised on: some of these cannot even be printed.
                self.escaped = True
            gone.set()

        async def sibling() -> None:
            self.sibling = "runs"
            await gone.wait()
            await asyncio.sleep(0)
            self.sibling = "unharmed"

        async with anyio.create_task_group() as group:
            group.start_soon(sibling)
            group.start_soon(guarded)
        assert not self.escaped, "something of the child's came out of the guard"
        assert self.sibling == "unharmed"
        ((outcome, result),) = self.outcomes
        assert (result is UNSET) == (not isinstance(outcome, Succeeded))
        self._check_record(outcome)
        return outcome

    def _check_record(self, outcome: Outcome) -> None:
        if isinstance(outcome, Succeeded):
            return
        failure = outcome.failure
        for text in (failure.kind, failure.code, failure.message):
            assert text is None or len(text) <= LONGEST
            assert text is None or is_encodable(text)
            assert text is None or text.isprintable()
        msgspec.json.encode(failure)


class Odd(BaseException):
    """Neither an Exception nor one of Python's own."""


class Mute(Exception):
    """Says nothing, and minds being asked."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Quitting(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class TrickText(str):
    __slots__ = ()

    def __format__(self, spec: str) -> str:
        raise RuntimeError("no format")

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __getitem__(self, key: Any) -> str:
        raise RuntimeError("no slice")


class Tricking(Exception):
    def __str__(self) -> str:
        return TrickText("trick")


class NamelessMeta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__name__", "__qualname__"}:
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class Nameless(Exception, metaclass=NamelessMeta):
    """An exception whose class does not tell its name."""


class NoText(Exception):
    def __str__(self) -> Any:  # type: ignore[override]
        return 7


def deep_group(depth: int) -> BaseException:
    error: Exception = ValueError("at the bottom")
    for n in range(depth):
        error = ExceptionGroup(f"level {n}", [error])
    return error


def long_chain(length: int) -> BaseException:
    error: BaseException = ValueError("first")
    for n in range(length):
        later = ValueError(str(n))
        later.__cause__ = error
        error = later
    return error


LoneName = type("Lone", (Exception,), {"__qualname__": "lone \ud800 name"})
LongName = type("L" * 100_000, (Exception,), {})
LineName = type("Line", (Exception,), {"__qualname__": "two\nlines\x1b[31m"})

HOSTILE: dict[str, Callable[[], BaseException]] = {
    "Exception": lambda: ValueError("no"),
    "no text": lambda: ValueError(),
    "BaseException": lambda: Odd("odd"),
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(0),
    "GeneratorExit": GeneratorExit,
    "StopIteration": lambda: StopIteration(7),
    "StopAsyncIteration": StopAsyncIteration,
    "RecursionError": RecursionError,
    "MemoryError": MemoryError,
    "group": lambda: ExceptionGroup("several", [ValueError("a"), TypeError("b")]),
    "base group": lambda: BaseExceptionGroup("several", [KeyboardInterrupt(), SystemExit()]),
    "cancelled in a group": lambda: BaseExceptionGroup("g", [asyncio.CancelledError()]),
    "500 groups deep": lambda: deep_group(500),
    "long chain of causes": lambda: long_chain(2_000),
    "no str": Mute,
    "exits in str": Quitting,
    "str is no text": NoText,
    "str is a trick": Tricking,
    "10 MB of text": lambda: ValueError("x" * 10_000_000),
    "10 MB of blanks": lambda: ValueError(" " * 10_000_000),
    "surrogates": lambda: ValueError("lone \ud800 surrogate"),
    "control characters": lambda: ValueError("\x1b[2J\r\n\x00 wiped"),
    "class named by a surrogate": LoneName,
    "class with a long name": LongName,
    "class with lines in its name": LineName,
    "class without a name": Nameless,
    "TimeoutError": TimeoutError,
    "EndOfStream": anyio.EndOfStream,
    "InvalidStateError": asyncio.InvalidStateError,
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("when", ["at once", "after a while"])
async def test_whatever_a_child_raises_is_one_recorded_failure(
    make: Callable[[], BaseException], when: str
) -> None:
    async def child() -> None:
        if when == "after a while":
            await asyncio.sleep(0)
        raise make()

    outcome = await Siblings().run(child)

    assert isinstance(outcome, Failed)
    assert outcome.failure.kind == "exception"
    assert outcome.failure.message


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
async def test_code_that_raises_before_it_is_awaited_fails_the_same_way(
    make: Callable[[], BaseException],
) -> None:
    def child() -> Any:
        raise make()

    assert isinstance(await Siblings().run(child), Failed)


async def test_a_failure_names_the_class_and_what_it_said() -> None:
    async def child() -> None:
        raise ValueError("no  such\nthread")

    outcome = await Siblings().run(child)

    assert outcome == Failed(
        Failure(kind="exception", code="ValueError", message="ValueError: no such thread")
    )


async def test_code_that_cannot_be_awaited_fails() -> None:
    def child() -> Any:
        return 7

    outcome = await Siblings().run(child)

    assert isinstance(outcome, Failed)
    assert outcome.failure.code == "TypeError"


async def test_real_recursion_is_a_failure() -> None:
    async def child(depth: int = 0) -> Any:
        return await child(depth + 1)

    outcome = await Siblings().run(child)

    assert isinstance(outcome, Failed)
    assert outcome.failure.code == "RecursionError"
    gc.collect()


# ---- results --------------------------------------------------------------------------------------


class HostileKey:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class HostileDict(dict[str, int]):
    def items(self) -> Any:
        raise SystemExit(1)


def cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep() -> Any:
    value: Any = 1
    for _ in range(10_000):
        value = [value]
    return value


async def test_a_result_is_kept_encoded() -> None:
    async def child() -> Any:
        return {"route": ("urgent", 1)}

    assert await run(child) == (Succeeded(), Raw(b'{"route":["urgent",1]}'))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: math.nan, "invalid_state"),
        (lambda: [math.inf], "invalid_state"),
        (cycle, "invalid_state"),
        (deep, "invalid_state"),
        (lambda: {1, 2}, "invalid_state"),
        (lambda: b"raw", "invalid_state"),
        (lambda: {1: 2}, "invalid_state"),
        (lambda: "\ud800", "invalid_state"),
        (lambda: {HostileKey(): 1}, "invalid_state"),
        (lambda: 10**5_000, "invalid_state"),
        (object, "invalid_state"),
        (lambda: "x" * 1023, "state_too_large"),
        (lambda: [None] * 1_000_000, "state_too_large"),
    ],
    ids=[
        "nan",
        "inf",
        "cycle",
        "deep",
        "set",
        "bytes",
        "key",
        "surrogate",
        "hostile key",
        "huge number",
        "object",
        "too large",
        "too many",
    ],
)
async def test_a_result_json_cannot_hold_is_a_failure(make: Callable[[], Any], code: str) -> None:
    async def child() -> Any:
        return make()

    outcome = await Siblings().run(child)

    assert isinstance(outcome, Failed)
    assert outcome.failure.kind == "bad_result"
    assert outcome.failure.code == code
    assert outcome.failure.message is not None
    assert outcome.failure.message.startswith("result")


async def test_a_result_that_raises_while_it_is_read_is_a_failure() -> None:
    async def child() -> Any:
        return HostileDict(a=1)

    assert isinstance(await Siblings().run(child), Failed)


# ---- cancellation ---------------------------------------------------------------------------------


async def test_a_child_that_raises_cancellation_of_its_own_has_failed() -> None:
    async def child() -> None:
        raise asyncio.CancelledError("mine")

    outcome = await Siblings().run(child)

    assert isinstance(outcome, Failed)
    assert outcome.failure.kind == "child_cancelled_itself"


async def test_a_child_that_awaits_something_cancelled_has_failed() -> None:
    async def child() -> None:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    outcome = await Siblings().run(child)

    assert isinstance(outcome, Failed)
    assert outcome.failure.kind == "child_cancelled_itself"


def cancel_own_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def test_a_child_that_cancels_its_own_task_has_failed() -> None:
    async def child() -> None:
        cancel_own_task()
        await asyncio.sleep(0)

    outcome = await Siblings().run(child)

    assert isinstance(outcome, Failed)
    assert outcome.failure.kind == "child_cancelled_itself"


async def test_a_child_that_cancels_its_own_task_and_thinks_better_of_it_has_succeeded() -> None:
    async def child() -> str:
        cancel_own_task()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            pass
        return "done"

    assert await Siblings().run(child) == Succeeded()


async def test_a_cancellation_a_child_leaves_behind_hits_nobody() -> None:
    async def child() -> str:
        cancel_own_task()
        return "done"

    outcome = await Siblings().run(child)

    assert isinstance(outcome, (Succeeded, Failed))


REASONS = {
    StopReason.CANCELLED: (Cancelled, "cancelled", "stopped on request"),
    StopReason.TIMED_OUT: (TimedOut, "timed_out", "stopped at its deadline"),
    StopReason.FLOW_ENDED: (Cancelled, "cancelled", "stopped because the flow ended"),
    StopReason.INTERRUPTED: (
        Lost,
        "interrupted",
        "interrupted, unknown: the process ended before the child's outcome was recorded",
    ),
}
CODES = {StopReason.INTERRUPTED: "unknown"}
OVERRIDES_WHAT_IS_RETURNED = {StopReason.TIMED_OUT, StopReason.INTERRUPTED}
"""Too late to count: the deadline had passed, or the attempt was only run to see to what it left behind."""


def test_every_reason_to_stop_has_its_outcome() -> None:
    assert REASONS.keys() == set(StopReason)


def stop_soon(child: ChildScope, *reasons: StopReason) -> None:
    loop = asyncio.get_running_loop()
    for reason in reasons:
        loop.call_soon(child.stop, reason)


@pytest.mark.parametrize("reason", StopReason)
async def test_a_stopped_child_ends_as_the_reason_says(reason: StopReason) -> None:
    scope = ChildScope(1)
    kind, failure_kind, message = REASONS[reason]

    stop_soon(scope, reason)
    outcome, result = await run(lambda: asyncio.sleep(60), scope)

    assert outcome == kind(Failure(kind=failure_kind, code=CODES.get(reason), message=message))
    assert result is UNSET


async def test_the_first_reason_to_stop_counts() -> None:
    scope = ChildScope(1)

    stop_soon(scope, StopReason.TIMED_OUT, StopReason.CANCELLED, StopReason.FLOW_ENDED)
    outcome, _ = await run(lambda: asyncio.sleep(60), scope)

    assert isinstance(outcome, TimedOut)


@pytest.mark.parametrize("reason", StopReason)
async def test_a_child_stopped_before_its_first_line_stops_where_it_first_waits(
    reason: StopReason,
) -> None:
    scope = ChildScope(1)
    reached: list[str] = []

    async def child() -> None:
        reached.append("first line")
        await asyncio.sleep(0)
        reached.append("after the wait")

    scope.stop(reason)
    outcome, _ = await run(child, scope)

    assert isinstance(outcome, REASONS[reason][0])
    assert reached == ["first line"]


@pytest.mark.parametrize("reason", StopReason)
async def test_a_child_that_swallows_its_stop_and_returns_has_succeeded_unless_it_was_late(
    reason: StopReason,
) -> None:
    scope = ChildScope(1)

    async def child() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
        return "all the same"

    stop_soon(scope, reason)
    outcome, result = await run(child, scope)
    await asyncio.sleep(0)

    if reason in OVERRIDES_WHAT_IS_RETURNED:
        assert isinstance(outcome, REASONS[reason][0])
        assert result is UNSET
    else:
        assert outcome == Succeeded()
        assert result == Raw(b'"all the same"')


@pytest.mark.parametrize("times", [2, 5])
async def test_a_child_that_refuses_to_stop_a_few_times_still_ends_once(times: int) -> None:
    scope = ChildScope(1)
    refusals = 0

    async def child() -> None:
        nonlocal refusals
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                refusals += 1
                if refusals > times:
                    raise

    stop_soon(scope, StopReason.CANCELLED)
    outcome, _ = await run(child, scope)
    await asyncio.sleep(0)

    assert isinstance(outcome, Cancelled)
    assert refusals == times + 1


@pytest.mark.parametrize("reason", StopReason)
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_child_whose_cleanup_fails_was_stopped_all_the_same(
    reason: StopReason, make: Callable[[], BaseException]
) -> None:
    scope = ChildScope(1)

    async def child() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise make()

    stop_soon(scope, reason)
    outcome = await Siblings().run(child, scope)

    assert isinstance(outcome, REASONS[reason][0])
    assert not isinstance(outcome, Succeeded)
    assert outcome.failure.kind == REASONS[reason][1]


async def test_a_stop_after_the_end_changes_nothing() -> None:
    scope = ChildScope(1)

    async def child() -> int:
        return 1

    outcome, _ = await run(child, scope)
    scope.stop(StopReason.CANCELLED)
    await asyncio.sleep(0)

    assert outcome == Succeeded()


async def test_stopping_one_child_leaves_its_sibling_alone() -> None:
    scopes = [ChildScope(1), ChildScope(1)]
    outcomes: dict[int, Outcome] = {}
    go_on = asyncio.Event()

    async def guarded(n: int) -> None:
        outcomes[n], _ = await run(go_on.wait, scopes[n])

    async with anyio.create_task_group() as group:
        group.start_soon(guarded, 0)
        group.start_soon(guarded, 1)
        await anyio.wait_all_tasks_blocked()
        scopes[0].stop(StopReason.CANCELLED)
        await anyio.wait_all_tasks_blocked()
        go_on.set()

    assert isinstance(outcomes[0], Cancelled)
    assert outcomes[1] == Succeeded()


# ---- shutdown -------------------------------------------------------------------------------------


async def shut_down_over(code: Callable[[], Awaitable[Any]]) -> str:
    """Run a child, cancel the group it lives in, and say what came of it."""
    what = "nothing"

    async def guarded() -> None:
        nonlocal what
        try:
            outcome, _ = await run(code, shutdown=True)
        except asyncio.CancelledError:
            what = "no outcome"
            raise
        what = type(outcome).__name__

    async with anyio.create_task_group() as group:
        group.start_soon(guarded)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    return what


async def test_a_child_stopped_by_shutdown_has_no_outcome() -> None:
    assert await shut_down_over(lambda: asyncio.sleep(60)) == "no outcome"


async def test_a_child_that_still_finishes_during_shutdown_has_succeeded() -> None:
    async def child() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "just in time"
        return "never"

    assert await shut_down_over(child) == "Succeeded"


async def test_a_child_whose_cleanup_fails_during_shutdown_has_no_outcome_either() -> None:
    async def child() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise RuntimeError("the connection is gone")

    assert await shut_down_over(child) == "no outcome"


# ---- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("  a \n\t b\r\n", "a b"),
        ("a\x00b", "a\ufffdb"),
        ("\x1b[31mred", "\ufffd[31mred"),
        ("lone \ud800", "lone \ufffd"),
        ("é — 漢", "é — 漢"),
        ("x" * 500, "x" * 500),
        ("x" * 501, "x" * 499 + "…"),
        ("", ""),
    ],
)
def test_a_message_becomes_one_capped_printable_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_an_exception_without_text_is_described_by_its_name() -> None:
    assert describe(ValueError()) == Failure(
        kind="exception", code="ValueError", message="ValueError"
    )


@pytest.mark.parametrize("reason", [*StopReason, None])
def test_a_stop_always_has_an_outcome_and_keeps_the_detail(reason: StopReason | None) -> None:
    plain, detailed = stopped(reason), stopped(reason, "then it broke")

    assert not isinstance(plain, Succeeded)
    assert not isinstance(detailed, Succeeded)
    assert type(plain) is type(detailed)
    assert detailed.failure.message == f"{plain.failure.message}; then then it broke"
