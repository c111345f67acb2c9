"""Children that raise, return and leave behind what they should not: one recorded end each, nobody else harmed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead import Failed, FlowContext, Registry, Succeeded, TaskContext, open_runtime
from flowstead.executors import SyncContext
from tests.faults.support import ends_of, launch, stage, task_of
from tests.faulty_store import flows_of, new_flow, settle, soon
from tests.invariants import check_all

Fault = Callable[[], object]

# ---- what a child may raise ------------------------------------------------------------------------


class Mute(Exception):
    """An exception that will not be looked at."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Unpicklable(Exception):
    """An exception that no other process could be given."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


class Base(BaseException):
    """An end of the world of somebody's own."""


def deep_group(depth: int) -> BaseException:
    error: Exception = ValueError("inmost")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


def raising(make: Callable[[], BaseException]) -> Fault:
    def fault() -> None:
        raise make()

    return fault


def recurse() -> int:
    return recurse() + 1


def exhaust_memory() -> object:
    return bytearray(1 << 62)


RAISED: dict[str, tuple[Fault, str, str | None]] = {
    # fault: how it is done, kind and code of the failure that is recorded (None: whatever it is)
    "Exception": (raising(lambda: Exception("no")), "exception", "Exception"),
    "BaseException": (raising(lambda: Base("no")), "exception", "Base"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt), "exception", "KeyboardInterrupt"),
    "SystemExit": (raising(lambda: SystemExit(3)), "exception", "SystemExit"),
    "GeneratorExit": (raising(GeneratorExit), "exception", "GeneratorExit"),
    # Python itself turns these two into a RuntimeError as they leave a coroutine.
    "StopIteration": (raising(lambda: StopIteration(7)), "exception", "RuntimeError"),
    "StopAsyncIteration": (raising(StopAsyncIteration), "exception", None),
    "a group 1000 deep": (raising(lambda: deep_group(1000)), "exception", "ExceptionGroup"),
    "a group of base exceptions": (
        raising(lambda: BaseExceptionGroup("g", [SystemExit(), KeyboardInterrupt()])),
        "exception",
        "BaseExceptionGroup",
    ),
    "CancelledError of its own": (
        raising(lambda: asyncio.CancelledError("mine")),
        "child_cancelled_itself",
        "CancelledError",
    ),
    "an exception that will not be looked at": (raising(Mute), "exception", "Mute"),
    "10 MB of text": (raising(lambda: ValueError("x" * 10_000_000)), "exception", "ValueError"),
    "control characters": (
        raising(lambda: ValueError("\x1b[2J\r\n\x00 \ud800 wiped")),
        "exception",
        "ValueError",
    ),
    "an unpicklable exception": (raising(Unpicklable), "exception", "Unpicklable"),
    "RecursionError": (recurse, "exception", "RecursionError"),
    "MemoryError": (exhaust_memory, "exception", "MemoryError"),
}


WHERE = ("in the loop", "in a thread")


def child_in(where: str, work: Callable[[], object]) -> Any:
    """A child that does something in the event loop, or in a thread."""

    async def in_the_loop(ctx: TaskContext, given: object) -> object:
        return work()

    def in_a_thread(ctx: SyncContext, given: object) -> object:
        return work()

    return in_the_loop if where == "in the loop" else in_a_thread


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("fault", "kind", "code"), RAISED.values(), ids=list(RAISED))
async def test_a_child_that_raises_has_failed_and_nobody_else_notices(
    db: Path, fault: Fault, kind: str, code: str | None, where: str
):
    async with stage(db) as it:

        def work() -> object:
            it.fire()
            return fault()

        bad = child_in(where, work)
        task_id = await it.launch(bad)
        outcome = await soon(it.flows.wait_task(task_id))

        assert isinstance(outcome, Failed)
        assert outcome.failure.kind == kind
        assert code in (None, outcome.failure.code)
        message = outcome.failure.message or ""
        assert message.isprintable()
        assert len(message) <= 500
        assert await ends_of(it.flows, it.flow_id, task_id) == ["failed"]
        await it.check_others()


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [pytest.param(*raised, id=name) for name, raised in RAISED.items()],
)
async def test_a_controller_that_raises_has_failed_its_flow_and_nobody_else_notices(
    db: Path, fault: Fault, kind: str, code: str | None
):
    registry, fired = Registry(), []

    @registry.controller("bad")
    async def bad(flow: FlowContext) -> None:
        fired.append(flow.flow_id)
        fault()

    async with stage(db, registry=registry) as it:
        flow_id = await new_flow(it.flows, "bad")
        ended = await soon(it.flows.result(flow_id))

        it.fired += fired
        assert ended.status == "failed"
        assert ended.failure
        assert code in (None, ended.failure.code)
        assert len(ended.failure.message or "") <= 500
        assert (ended.revision, fired) == (2, [flow_id])
        await it.check_others()


# ---- what a child may return -----------------------------------------------------------------------


def cyclic() -> object:
    cycle: list[object] = []
    cycle.append({"again": cycle})
    return cycle


def deep(levels: int) -> object:
    value: object = 0
    for _ in range(levels):
        value = [value]
    return value


class Trap(dict[str, Any]):
    """A dict that raises where it is read."""

    def items(self) -> Any:
        raise RuntimeError("trap")

    __iter__ = __len__ = items


RETURNED: dict[str, tuple[Callable[[], object], str]] = {
    "an object": (object, "invalid_state"),
    "bytes": (lambda: b"bytes", "invalid_state"),
    "a set": (lambda: {1}, "invalid_state"),
    "a generator": (lambda: (n for n in range(3)), "invalid_state"),
    "an exception": (lambda: ValueError("returned"), "invalid_state"),
    "NaN": (lambda: float("nan"), "invalid_state"),
    "infinity in a list": (lambda: [1, float("-inf")], "invalid_state"),
    "a cycle": (cyclic, "invalid_state"),
    "keys that are no text": (lambda: {1: 2}, "invalid_state"),
    "keys of both kinds": (lambda: {"a": {None: 1, "b": 2}}, "invalid_state"),
    "a lone surrogate": (lambda: "\ud800", "invalid_state"),
    "a lone surrogate in a key": (lambda: {"a": [{"\udfff": 1}]}, "invalid_state"),
    "10000 levels": (lambda: deep(10_000), "invalid_state"),
    "a level too many": (lambda: deep(101), "invalid_state"),
    "more than the limit": (lambda: "x" * (1024 * 1024), "state_too_large"),
    "more than the limit in small parts": (lambda: ["x" * 90] * 20_000, "state_too_large"),
    "a whole number of a million digits": (lambda: 10**1_000_000, "invalid_state"),
    "a trap": (lambda: Trap(a=1), "invalid_state"),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("make", "code"), RETURNED.values(), ids=list(RETURNED))
async def test_a_result_that_cannot_be_kept_is_a_bad_result_and_nothing_of_it_is_written(
    db: Path, make: Callable[[], object], code: str, where: str
):
    async with stage(db) as it:

        def work() -> object:
            it.fire()
            return make()

        bad = child_in(where, work)
        task_id = await it.launch(bad)
        outcome = await soon(it.flows.wait_task(task_id))

        assert isinstance(outcome, Failed)
        assert (outcome.failure.kind, outcome.failure.code) == ("bad_result", code)
        stored = await task_of(it.flows, task_id)
        assert (stored.status, stored.result_json) == ("failed", None)
        assert await ends_of(it.flows, it.flow_id, task_id) == ["failed"]
        await it.check_others()

    [row] = [task for task in check_all(db).tasks if task.row["task_id"] == task_id]
    assert "resultJson" not in row.doc


async def test_the_largest_result_and_the_deepest_are_kept(db: Path):
    largest, deepest = "x" * (1024 * 1024 - 2), deep(100)
    async with stage(db) as it:

        async def at_the_limit(ctx: TaskContext, given: object) -> object:
            it.fire()
            return largest if given == "large" else deepest

        large = await it.launch(at_the_limit, input_json="large")
        nested = await it.launch(at_the_limit, input_json="deep")

        assert await soon(it.flows.wait_task(large)) == Succeeded(largest)
        assert await soon(it.flows.wait_task(nested)) == Succeeded(deepest)
        await it.check_others()


# ---- what a child may leave behind -----------------------------------------------------------------


KEPT: list[AsyncIterator[int]] = []
"""Generators nobody reads to their end; collecting them in between would warn about the scope they hold."""


class Litter:
    """Things a child leaves running, and the means to take them away when the test is over."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.thread_over = threading.Event()
        self.tasks: list[asyncio.Task[Any]] = []
        self.threads: list[threading.Thread] = []
        self.generators: list[AsyncIterator[int]] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    async def task(self) -> None:
        for _ in range(3):
            self.tasks.append(asyncio.create_task(self.over.wait(), name="left behind"))

    async def failing_task(self) -> None:
        async def fails() -> None:
            raise ValueError("nobody waits for me")

        task = asyncio.create_task(fails())
        self.tasks.append(task)
        await asyncio.wait({task})

    async def thread(self) -> None:
        thread = threading.Thread(target=self.thread_over.wait, daemon=True)
        thread.start()
        self.threads.append(thread)

    async def generator(self) -> None:
        async def stream() -> AsyncIterator[int]:
            yield 1
            yield 2

        self.generators.append(events := stream())
        await events.__anext__()

    async def generator_in_a_scope(self) -> None:
        async def stream() -> AsyncIterator[int]:
            with anyio.CancelScope():
                yield 1
                yield 2

        self.generators.append(events := stream())
        KEPT.append(events)
        await events.__anext__()

    async def subprocess(self) -> None:
        program = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
        self.processes.append(subprocess.Popen(program, stdin=subprocess.PIPE))  # noqa: ASYNC220

    @property
    def count(self) -> int:
        return sum(
            map(len, (self.tasks, self.threads, self.generators, self.processes)),
        )

    @property
    def left(self) -> list[object]:
        """What still runs."""
        return [
            *(task for task in self.tasks if not task.done()),
            *(thread for thread in self.threads if thread.is_alive()),
            *(process for process in self.processes if process.poll() is None),
        ]

    async def sweep(self) -> None:
        """Take everything away, so that nothing of it is there when the runtime is looked at."""
        self.over.set()
        self.thread_over.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for thread in self.threads:
            thread.join()
        for process in self.processes:
            assert process.stdin
            process.stdin.close()
            process.wait()


KINDS = ("task", "failing_task", "thread", "generator", "generator_in_a_scope", "subprocess")


@pytest.mark.parametrize("end", ["returns", "raises", "is stopped"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_child_that_leaves_something_running_has_ended_and_nobody_else_notices(
    db: Path, kind: str, end: str
):
    litter = Litter()
    async with stage(db) as it:

        async def leaks(ctx: TaskContext, given: object) -> str:
            await getattr(litter, kind)()
            it.fire()
            if end == "raises":
                raise ValueError("after leaking")
            if end == "is stopped":
                await asyncio.Event().wait()
            return "returned"

        task_id = await it.launch(leaks)
        await settle()
        if end == "is stopped":
            assert (await soon(it.flows.cancel_task(task_id))).cancelled
        await soon(it.flows.wait_task(task_id))

        wanted = {"returns": "succeeded", "raises": "failed", "is stopped": "cancelled"}[end]
        if kind == "generator_in_a_scope" and end == "returns":
            # The scope it left open is the child's own fault, and is told instead of the result.
            wanted = "failed"
        assert await ends_of(it.flows, it.flow_id, task_id) == [wanted]
        assert litter.count
        await it.check_others()
        await litter.sweep()


@pytest.mark.parametrize("kind", ["task", "thread", "subprocess"])
async def test_a_runtime_closes_although_something_a_child_began_still_runs(db: Path, kind: str):
    litter, registry = Litter(), Registry()

    @registry.task
    async def leaks(ctx: TaskContext, given: object) -> None:
        await getattr(litter, kind)()
        await asyncio.Event().wait()

    runtime = open_runtime(db, registry=registry)
    async with runtime:
        flows = flows_of(runtime)
        await launch(flows, await new_flow(flows), leaks)
        await settle()
        assert litter.left, "vacuous: nothing was left"

        await soon(runtime.aclose())

    await litter.sweep()
    [task] = check_all(db).tasks
    # Stopped by the closing: no outcome, no attempt spent.
    assert (task.doc["status"], task.doc.get("attempt", 0)) == ("queued", 0)
