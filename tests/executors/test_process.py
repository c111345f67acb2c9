"""Functions in worker processes: found by name, stopped at any instant, and nobody's death but their own."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psutil
import pytest

from flowstead.executors import (
    Process,
    ProcessExecutor,
    RaisedInWorker,
    WorkerDied,
    WorkerUnusable,
)
from flowstead.executors.program import how_it_ended
from tests.executors import functions
from tests.executors.stage import Attempt, Host, is_alive, outcome, until


@pytest.fixture(autouse=True)
def light_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker runs its host's main module, so that it finds what is there. Ours is the test runner: no need."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)


def workers() -> set[int]:
    """The worker processes of this process."""
    found = set()
    for child in psutil.Process().children():
        try:
            if "anyio.to_process" in child.cmdline():
                found.add(child.pid)
        except psutil.NoSuchProcess:
            pass
    return found


# ---- what can be run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda info, given: None, id="lambda"),
        pytest.param(partial(functions.echo), id="partial"),
        pytest.param(functions.Holder().method, id="bound method"),
        pytest.param(functions.original, id="hidden by its decorator"),
    ],
)
def test_what_a_worker_could_not_find_is_refused_when_it_is_named(function: Any) -> None:
    with pytest.raises(ValueError, match="cannot be found by another process"):
        Process(function)


def test_a_closure_is_refused_when_it_is_named() -> None:
    def inner(info: Any, given: Any) -> None: ...

    with pytest.raises(ValueError, match="inner cannot be found by another process"):
        Process(inner)


@pytest.mark.parametrize(
    ("function", "what"), [(functions.is_async, "an async function"), ("echo", "str")]
)
def test_what_is_no_plain_function_is_refused_when_it_is_named(function: Any, what: str) -> None:
    with pytest.raises(TypeError, match=f"takes a plain function .* not {what}"):
        Process(function)


def test_a_process_stands_for_its_function_and_cannot_be_changed() -> None:
    process = Process(functions.echo)

    assert process == Process(functions.echo)
    with pytest.raises(AttributeError):
        process.function = functions.pid  # type: ignore[misc]


# ---- calls ----------------------------------------------------------------------------------------


async def test_the_function_is_told_who_it_is_and_workers_are_used_again() -> None:
    executor = ProcessExecutor(1)
    attempt = Attempt(function=functions.echo, input={"ü": [1, None]}, attempt=2)
    task_id = attempt.context.task_id

    first = await executor.run(attempt.call)
    one = await executor.run(Attempt(function=Process(functions.pid)).call)
    two = await executor.run(Attempt(function=functions.pid).call)

    assert first == ["flow", task_id, "step", 2, 12345, {"ü": [1, None]}]
    assert one == two
    assert one in workers()


async def test_whatever_the_function_raises_is_an_answer_and_its_worker_goes_on() -> None:
    executor = ProcessExecutor(1)
    before = await executor.run(Attempt(function=functions.pid).call)

    kinds = ["Told", "Stubborn", "SystemExit", "KeyboardInterrupt", "local"]
    raised = [
        await outcome(executor.run(Attempt(function=functions.raises, input=kind).call))
        for kind in kinds
    ]
    went_on = await executor.run(Attempt(function=functions.interrupts_itself).call)

    assert [type(error) for error in raised] == [
        functions.Told,
        RaisedInWorker,
        SystemExit,
        KeyboardInterrupt,
        RaisedInWorker,
    ]
    assert raised[0].args == ("so", 7)
    assert str(raised[1]) == "Stubborn: 1 and 2"
    assert str(raised[4]) == "Local: only here"
    assert went_on == "went on"
    assert await executor.run(Attempt(function=functions.pid).call) == before


async def test_an_answer_that_cannot_be_carried_is_told_and_its_worker_goes_on() -> None:
    executor = ProcessExecutor(1)
    before = await executor.run(Attempt(function=functions.pid).call)

    with pytest.raises(WorkerUnusable, match=r"cannot be carried between processes.*lock"):
        await executor.run(Attempt(function=functions.answers_with_a_lock).call)
    with pytest.raises(WorkerUnusable, match="cannot be carried between processes"):
        await executor.run(Attempt(function=lambda info, given: None).call)

    assert await executor.run(Attempt(function=functions.pid).call) == before


async def test_the_death_of_a_worker_is_told_with_its_status_and_the_next_call_has_another() -> (
    None
):
    executor = ProcessExecutor(1)

    died = [
        await outcome(executor.run(Attempt(function=functions.dies, input=how).call))
        for how in ("exit", "segfault", "kill")
    ]

    assert [type(error) for error in died] == [WorkerDied, WorkerDied, WorkerDied]
    # Where the loop learns of the end through a thread, the status can be taken under its hands: 255.
    assert [died[0].returncode in (7, 255), died[1].returncode in (-11, 255)] == [True, True]
    assert died[2].returncode in (-9, 255)
    assert "the worker process " in str(died[0])
    assert await executor.run(Attempt(function=functions.pid).call) in workers()


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (None, "ended"),
        (7, "exited with status 7"),
        (-11, "was ended by SIGSEGV"),
        (-63, "was ended by signal 63"),
    ],
)
def test_the_end_of_a_process_is_told_in_words(returncode: int | None, words: str) -> None:
    assert how_it_ended(returncode) == words
    assert str(WorkerDied(returncode)) == f"the worker process {words} while the function ran"


# ---- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_native", [False, True])
async def test_cancelling_kills_a_busy_worker_before_run_is_over(
    is_native: bool, tmp_path: Path
) -> None:
    executor = ProcessExecutor(1)
    said = tmp_path / "pid"
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await executor.run(Attempt(function=functions.spins, input=str(said)).call)

    task = asyncio.create_task(run())
    await until(said.exists, "it spins")
    pid = int(said.read_text())
    was_alive = is_alive(pid)

    if is_native:
        task.cancel()
    else:
        scope.cancel()
    error = await outcome(task)

    assert was_alive
    assert isinstance(error, asyncio.CancelledError) == is_native
    assert not is_alive(pid)
    assert await executor.run(Attempt(function=functions.pid).call) != pid


@pytest.mark.parametrize("is_native", [False, True])
async def test_cancelling_while_a_worker_starts_loses_no_worker_and_runs_nothing(
    is_native: bool, tmp_path: Path
) -> None:
    executor = ProcessExecutor(1)
    before = workers()
    said = tmp_path / "pid"
    attempt = Attempt(function=functions.spins, input=str(said))
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await executor.run(attempt.call)

    task = asyncio.create_task(run())
    await until(lambda: bool(workers() - before), "one starts")
    if is_native:
        task.cancel()
    else:
        scope.cancel()
    error = await outcome(task)

    assert scope.cancelled_caught != is_native
    assert isinstance(error, asyncio.CancelledError) == is_native
    assert not said.exists()
    left = workers() - before
    pid = await executor.run(Attempt(function=functions.pid).call)
    assert left <= {pid}
    assert workers() - before <= {pid}


async def test_a_stop_that_passed_unheard_while_a_worker_started_is_heeded(
    tmp_path: Path,
) -> None:
    executor = ProcessExecutor(1)
    said = tmp_path / "pid"
    attempt = Attempt(function=functions.spins, input=str(said), is_stopped=lambda: True)

    error = await outcome(executor.run(attempt.call))

    assert isinstance(error, asyncio.CancelledError)
    assert not said.exists()
    assert await executor.run(Attempt(function=functions.pid).call) in workers()


async def test_no_more_workers_than_allowed_run_at_once() -> None:
    executor = ProcessExecutor(2)
    before = workers()
    pids: set[int] = set()

    async def run() -> None:
        pids.add(await executor.run(Attempt(function=functions.pid).call))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(run)

    assert 1 <= len(pids) <= 2
    assert len(workers() - before) <= 2


@pytest.mark.crash
async def test_workers_end_with_their_host_busy_or_not(tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    with Host("workers", str(busy)) as host:
        idle_pid = int(await anyio.to_thread.run_sync(host.says))
        await until(busy.exists, "one spins")
        busy_pid = int(busy.read_text())
        were_alive = is_alive(idle_pid) and is_alive(busy_pid)

        host.kill()

        assert were_alive
        await until(lambda: not is_alive(idle_pid), "the idle one has ended")
        await until(lambda: not is_alive(busy_pid), "the busy one has ended")
