"""Functions in worker processes: the only kind of code that can truly be stopped, and that cannot take us along.

A worker is a fresh interpreter, not a fork, and is used again. The function goes to it by name, so it has to stand
at the top level of a module that the worker can import; the input and the result travel as plain data over the
worker's own pipes, between processes of one program, and are never stored in that form.

Theory of operation. anyio keeps the workers, one pool for each event loop, and kills a worker whose caller is
cancelled. It would lose one that is cancelled while it starts, so a worker is first made ready with a call that
cannot be cancelled, and then claimed: `_ready` counts those that are idle and that nobody has claimed. Nothing
awaits between counting and claiming. Where the host uses anyio's pool as well, the count may be off; what comes of
it is a worker too many, or one that starts late.

A worker notices the death of our process, busy or not, and ends; see `_end_with_the_parent`. It ignores Ctrl-C,
which a terminal sends to it as well and which is for the host to answer. What the function starts on its own,
programs and processes, is not looked after.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, Final

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_process
import msgspec

from flowstead.executors.port import Call
from flowstead.executors.program import Patience, how_it_ended
from flowstead.model.flow import Json


class TaskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a function in a worker process is told about itself; see `TaskContext`."""

    flow_id: str
    task_id: str
    run_id: str | None
    attempt: int
    deadline: int | None


@dataclass(frozen=True)
class Process:
    """A plain function to be run in a worker process: `run=Process(crunch)`.

    It is called with a `TaskInfo` and the input, and can be stopped at any instant, wherever it is.

    Raises:
        TypeError: It is no plain function.
        ValueError: A worker could not find it by its name.
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        check_importable(self.function)


class WorkerDied(Exception):
    """The worker process ended under the function; `returncode` says how, negative for a signal, if known."""

    code: Final = "worker_died"

    def __init__(self, returncode: int | None) -> None:
        super().__init__(returncode)
        self.returncode = returncode

    def __str__(self) -> str:
        return f"the worker process {how_it_ended(self.returncode)} while the function ran"


class WorkerUnusable(Exception):
    """The call or its answer could not be carried between the processes."""

    code: Final = "worker_unusable"


class RaisedInWorker(Exception):
    """What the function raised, told in words because the exception itself could not be carried over."""

    code: Final = "raised_in_worker"

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(kind, said)
        self.kind = kind
        self.said = said

    def __str__(self) -> str:
        return f"{self.kind}: {self.said}" if self.said else self.kind


class ProcessExecutor:
    """Runs functions in worker processes. Cancelling kills the worker and waits for its end.

    Args:
        processes: Most workers at once; the number of processors if None.
    """

    name: Final = "process"
    spec: Final = None
    external: Final = False

    def __init__(self, processes: int | None = None) -> None:
        most = processes or os.cpu_count() or 2
        self._limiter: Final = anyio.CapacityLimiter(most)
        # Ours bounds the calls; this one keeps them from standing in line with the host's own workers.
        self._inner: Final = anyio.CapacityLimiter(most)
        self._ready = 0

    async def run(self, call: Call) -> Json:
        """Run the function in a worker. Once started, cancelling kills the worker."""
        function = call.function.function if isinstance(call.function, Process) else call.function
        assert function is not None
        async with self._limiter:
            await self._claim_worker(call)
            value, error = await self._ask(function, _info_of(call), call.input)
        if error is not None:
            raise error
        return value

    async def _claim_worker(self, call: Call) -> None:
        """Have a worker that is idle and nobody else's. Cancelling waits until it has started."""
        if self._ready:
            self._ready -= 1
        else:
            await self._start_worker()
        try:
            await anyio.lowlevel.checkpoint()
            if call.is_stopped():
                # Heard or not: the start may outlast the moments in which a cancellation is delivered.
                raise asyncio.CancelledError("the child was asked to stop")
        except asyncio.CancelledError:
            self._ready += 1
            raise

    async def _start_worker(self) -> None:
        patience = Patience()
        start = anyio.to_process.run_sync(_prepare, limiter=self._inner)
        try:
            await patience.wait(asyncio.ensure_future(start))
        except anyio.BrokenWorkerProcess as error:
            raise WorkerUnusable(
                f"no worker process could be started: {error.__cause__}"
            ) from error
        if patience.cancelled is not None:
            self._ready += 1
            raise patience.cancelled

    async def _ask(
        self, function: Callable[..., Any], info: TaskInfo, given: Json
    ) -> tuple[Json, BaseException | None]:
        try:
            answer = await anyio.to_process.run_sync(
                _work, function, info, given, cancellable=True, limiter=self._inner
            )
        except anyio.BrokenWorkerProcess as error:
            raise WorkerDied(_returncode_of(error)) from error
        except Exception as error:
            self._ready += 1
            raise WorkerUnusable(
                "the call or its answer cannot be carried between processes: "
                f"{type(error).__qualname__}: {error}"
            ) from error
        self._ready += 1
        return answer


def check_importable(function: object) -> None:
    """Make sure that another process finds a function by its name.

    Raises:
        TypeError: It is no plain function.
        ValueError: Its name does not lead to it: a lambda, a closure, a bound method, something decorated.
    """
    if not callable(function) or inspect.iscoroutinefunction(function):
        what = "an async function" if callable(function) else type(function).__qualname__
        raise TypeError(f"Process takes a plain function that runs in another process, not {what}.")
    if not is_importable(function):
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise ValueError(
            f"{name} cannot be found by another process: Process takes a function that stands under"
            " its own name at the top level of a module; no lambda, closure, partial or bound method."
        )


def is_importable(thing: object) -> bool:
    """Whether the module and the name that a function or class goes by lead to it."""
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    name = getattr(thing, "__qualname__", None)
    if module is None or not isinstance(name, str) or inspect.ismethod(thing):
        return False
    try:
        return functools.reduce(getattr, name.split("."), module) is thing
    except AttributeError:
        return False


def _info_of(call: Call) -> TaskInfo:
    context = call.context
    return TaskInfo(
        flow_id=context.flow_id,
        task_id=context.task_id,
        run_id=context.run_id,
        attempt=context.attempt,
        deadline=context.deadline,
    )


def _returncode_of(error: anyio.BrokenWorkerProcess) -> int | None:
    """How the worker ended, if it is to be had: anyio does not say, but its frames still hold the process."""
    for frame, _ in walk_tb(error.__traceback__):
        process = frame.f_locals.get("process")
        if isinstance(process, anyio.abc.Process):
            return process.returncode
    return None


# ---- in the worker --------------------------------------------------------------------------------


@functools.cache
def _prepare() -> None:
    """Settle in a fresh worker: Ctrl-C is for the host, and the host's death is the worker's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()


def _end_with_the_parent() -> None:
    """Wait until nobody holds the other end of our input, and end whatever runs here."""
    poll = select.poll()
    poll.register(0, 0)
    for _, event in poll.poll():
        if event & (select.POLLHUP | select.POLLERR):
            os._exit(1)


def _work(
    function: Callable[..., Any], info: TaskInfo, given: Json
) -> tuple[Json, BaseException | None]:
    """Call the function. Whatever it raises is an answer, `SystemExit` included, so that the worker goes on."""
    _prepare()
    try:
        return function(info, given), None
    except BaseException as error:
        return None, _carried(error)


def _carried(error: BaseException) -> BaseException:
    """The exception, if it can be taken apart and put together again, else what it says."""
    try:
        if is_importable(type(error)) and type(copy.deepcopy(error)) is type(error):
            return error
    except Exception:
        pass
    try:
        return RaisedInWorker(type(error).__qualname__, str(error))
    except Exception:
        return RaisedInWorker(type(error).__qualname__, "(its message could not be read)")
