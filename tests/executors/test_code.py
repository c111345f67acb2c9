"""Functions of the host: which run on the loop and which in a thread, and that a thread does nothing on its own."""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest

from flowstead.executors import CodeExecutor, SyncContext
from tests.executors.stage import Attempt, outcome


class Gate:
    """Holds functions in their threads until the test has seen enough."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.opened = threading.Event()
        self.inside = self.most = 0

    def __call__(self, context: SyncContext, given: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.arrived.release()
        assert self.opened.wait(20)
        self.inside -= 1
        return given


async def on_loop(context: Any, given: Any) -> list[Any]:
    return [threading.current_thread() is threading.main_thread(), context.task_id, given]


def in_thread(context: Any, given: Any) -> list[Any]:
    return [threading.current_thread() is threading.main_thread(), context.task_id, given]


class Both:
    async def __call__(self, context: Any, given: Any) -> list[Any]:
        return await on_loop(context, given)

    async def method(self, context: Any, given: Any) -> list[Any]:
        return await on_loop(context, given)

    def plain(self, context: Any, given: Any) -> list[Any]:
        return in_thread(context, given)


@pytest.mark.parametrize(
    ("function", "is_on_loop"),
    [
        pytest.param(on_loop, True, id="async def"),
        pytest.param(functools.partial(functools.partial(on_loop)), True, id="partial of one"),
        pytest.param(Both(), True, id="object with an async call"),
        pytest.param(functools.partial(Both()), True, id="partial of such an object"),
        pytest.param(Both().method, True, id="async method"),
        pytest.param(in_thread, False, id="def"),
        pytest.param(functools.partial(in_thread), False, id="partial of a plain one"),
        pytest.param(Both().plain, False, id="plain method"),
        pytest.param(lambda context, given: in_thread(context, given), False, id="lambda"),
    ],
)
async def test_async_functions_run_on_the_loop_and_all_others_in_a_thread(
    function: Any, is_on_loop: bool
) -> None:
    attempt = Attempt(function=function, input={"a": 1})

    result = await CodeExecutor().run(attempt.call)

    assert result == [is_on_loop, attempt.context.task_id, {"a": 1}]


async def test_a_plain_function_that_returns_something_to_await_is_told_what_to_do() -> None:
    attempt = Attempt(function=lambda context, given: on_loop(context, given))

    with pytest.raises(TypeError, match=r"returned something to await .* `async def`"):
        await CodeExecutor().run(attempt.call)


async def test_a_function_in_a_thread_sees_the_same_facts_and_is_heard_on_the_loop() -> None:
    def function(context: SyncContext, given: Any) -> list[Any]:
        context.progress("half")
        context.heartbeat()
        assert not context.cancel_requested
        context.check_cancelled()
        return [context.flow_id, context.run_id, context.attempt, context.deadline]

    attempt = Attempt(function=function, attempt=3)

    result = await CodeExecutor().run(attempt.call)

    assert result == ["flow", "step", 3, 12345]
    assert attempt.context.said == ["half", None]


async def test_an_error_of_the_context_reaches_the_function_in_its_thread() -> None:
    def function(context: SyncContext, given: Any) -> str:
        try:
            context.progress("half")
        except OSError as error:
            return str(error)
        return "nothing was wrong"

    async def refuse(summary: str) -> None:
        raise OSError("no room")

    attempt = Attempt(function=function)
    attempt.context.progress = refuse  # type: ignore[method-assign]

    assert await CodeExecutor().run(attempt.call) == "no room"


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (ValueError, ValueError),
        (StopIteration, RuntimeError),
        (StopAsyncIteration, StopAsyncIteration),
        (GeneratorExit, GeneratorExit),
        (KeyboardInterrupt, KeyboardInterrupt),
        (SystemExit, SystemExit),
        (asyncio.CancelledError, asyncio.CancelledError),
    ],
)
async def test_whatever_a_thread_raises_comes_out_of_run_and_nowhere_else(
    kind: type[BaseException], seen: type[BaseException]
) -> None:
    def function(context: SyncContext, given: Any) -> None:
        raise kind("from the thread")

    executor = CodeExecutor(threads=1)

    error = await outcome(executor.run(Attempt(function=function).call))

    assert type(error) is seen
    assert kind is seen or isinstance(error.__cause__, kind)
    assert await executor.run(Attempt(function=lambda context, given: 7).call) == 7


async def test_cancelling_waits_until_the_function_returns_and_keeps_its_result() -> None:
    gate = Gate()
    scope = anyio.CancelScope()
    ended: list[Any] = []

    async def run() -> None:
        with scope:
            ended.append(await CodeExecutor().run(Attempt(function=gate, input="kept").call))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await anyio.to_thread.run_sync(gate.arrived.acquire)
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        was_running = not ended and gate.inside == 1
        gate.opened.set()

    assert was_running
    assert ended == ["kept"]


@pytest.mark.parametrize("way", ["check", "progress", "heartbeat", "look"])
async def test_a_function_that_asks_learns_that_it_is_to_stop(way: str) -> None:
    gate = Gate()
    scope = anyio.CancelScope()
    seen: list[str] = []

    def function(context: SyncContext, given: Any) -> str:
        gate(context, given)
        try:
            if way == "check":
                context.check_cancelled()
            elif way == "progress":
                context.progress("too late")
            elif way == "heartbeat":
                context.heartbeat()
            elif context.cancel_requested:
                return "returned early"
        finally:
            seen.append("cleaned up")
        return "went on"

    results: list[Any] = []

    async def run() -> None:
        with scope:
            attempt = Attempt(function=function, is_stopped=lambda: scope.cancel_called)
            results.append(await CodeExecutor().run(attempt.call))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await anyio.to_thread.run_sync(gate.arrived.acquire)
        scope.cancel()
        gate.opened.set()

    assert seen == ["cleaned up"]
    assert results == (["returned early"] if way == "look" else [])
    assert scope.cancelled_caught == (way != "look")


async def test_threads_are_bounded_and_the_hosts_are_left_alone() -> None:
    gate = Gate()
    executor = CodeExecutor(threads=2)
    limiter = anyio.to_thread.current_default_thread_limiter()
    results: list[Any] = []

    async def run(number: int) -> None:
        results.append(await executor.run(Attempt(function=gate, input=number).call))

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(run, number)
        await anyio.to_thread.run_sync(gate.arrived.acquire)
        await anyio.to_thread.run_sync(gate.arrived.acquire)
        await anyio.wait_all_tasks_blocked()
        inside, borrowed = gate.inside, limiter.borrowed_tokens
        gate.opened.set()

    assert (inside, borrowed) == (2, 0)
    assert gate.most <= 2
    assert sorted(results) == [0, 1, 2, 3, 4]


async def test_a_child_cancelled_while_it_waits_for_a_thread_never_runs() -> None:
    gate = Gate()
    executor = CodeExecutor(threads=1)
    ran: list[str] = []

    async with anyio.create_task_group() as group:
        group.start_soon(executor.run, Attempt(function=gate).call)
        await anyio.to_thread.run_sync(gate.arrived.acquire)
        waiting = Attempt(function=lambda context, given: ran.append("ran"))
        task = asyncio.create_task(executor.run(waiting.call))
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        error = await outcome(task)
        gate.opened.set()

    assert isinstance(error, asyncio.CancelledError)
    assert ran == []
