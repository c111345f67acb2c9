"""Functions of the host: async ones on the loop, all others in threads of our own.

Which is which is decided before the call: what `async def` made, however wrapped in `functools.partial` or given
as an object with an `async def __call__`, runs on the loop; every other callable runs in a thread. A plain function
that hands back something to await is refused, after its call, because no loop was there when it ran.

The threads are daemons of our own, not the loop's or anyio's: one that never returns must not keep the process from
ending. A function in one reaches the loop through its context, not by `anyio.from_thread`.

A thread cannot be stopped from outside. Cancelling a child that runs in one waits until the function returns;
functions that take long look at `SyncContext.cancel_requested` or call `check_cancelled` now and then.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel

from flowstead.executors.port import Call
from flowstead.executors.program import in_thread
from flowstead.model.flow import Json

if TYPE_CHECKING:
    from flowstead.task_context import TaskContext


class SyncContext:
    """What a function that runs in a thread is told about itself: a `TaskContext` of plain calls.

    All of it is for the thread the function was called in. Threads it starts itself pass on what they find to it.
    """

    def __init__(self, context: TaskContext, is_stopped: Callable[[], bool]) -> None:
        self._context = context
        self._is_stopped = is_stopped
        self._loop = asyncio.get_running_loop()
        self.flow_id: Final = context.flow_id
        self.task_id: Final = context.task_id
        self.run_id: Final = context.run_id
        self.attempt: Final = context.attempt
        self.deadline: Final = context.deadline

    def progress(self, summary: str) -> None:
        """Say how far the work is, durably and for people to read.

        Raises:
            CommitFailed: Certainly not written.
            asyncio.CancelledError: The function is asked to stop.
        """
        self.check_cancelled()
        self._on_the_loop(self._context.progress(summary))

    def heartbeat(self) -> None:
        """Say that the work is alive, durably.

        Raises:
            CommitFailed: Certainly not written.
            asyncio.CancelledError: The function is asked to stop.
        """
        self.check_cancelled()
        self._on_the_loop(self._context.heartbeat())

    @property
    def cancel_requested(self) -> bool:
        """Whether the function is asked to stop. Nothing stops it but itself."""
        return self._is_stopped()

    def check_cancelled(self) -> None:
        """Stop here if the function is asked to.

        Raises:
            asyncio.CancelledError: It is. Let it pass, through `finally` as ever.
        """
        if self._is_stopped():
            raise asyncio.CancelledError("the child was asked to stop")

    def _on_the_loop(self, telling: Coroutine[Any, Any, None]) -> None:
        try:
            asyncio.run_coroutine_threadsafe(telling, self._loop).result()
        except concurrent.futures.CancelledError as error:
            raise asyncio.CancelledError(*error.args) from None


class CodeExecutor:
    """Runs functions. The threads are its own, so that the host's are not used up, and are made as needed.

    Args:
        threads: Most functions in threads at once; more wait for one to return.
    """

    name: Final = "code"
    spec: Final = None
    external: Final = False

    def __init__(self, threads: int = 40) -> None:
        self._limiter: Final = anyio.CapacityLimiter(threads)

    async def run(self, call: Call) -> Json:
        """Run the function. Cancelling one that runs in a thread waits until it returns."""
        function = call.function
        assert function is not None
        if is_async(function):
            return await function(call.context, call.input)
        context = SyncContext(call.context, call.is_stopped)
        inherited = contextvars.copy_context()
        work = functools.partial(inherited.run, _work, function, context, call.input)
        async with self._limiter:
            answer = in_thread(work, "flowstead child")
            # Only a native cancellation comes through, as of `asyncio.run` at its end: then the answer is nobody's.
            with anyio.CancelScope(shield=True):
                await asyncio.wait([answer])
        value, error = answer.result()
        if isinstance(error, asyncio.CancelledError):
            # Where it was asked for, the loop's own cancellation takes the place of the thread's.
            await anyio.lowlevel.checkpoint()
        if error is not None:
            raise error
        return value


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function only makes something to await: `async def`, bound, wrapped or as an object."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function):
        return True
    return inspect.iscoroutinefunction(getattr(type(function), "__call__", None))  # noqa: B004


def _work(
    function: Callable[..., Any], context: SyncContext, given: Json
) -> tuple[Json, BaseException | None]:
    """Call the function in its thread. Whatever it raises is an answer, so that nothing passes it any other way."""
    try:
        value = function(context, given)
        _refuse_awaitable(function, value)
    except BaseException as error:
        return None, error
    return value, None


def _refuse_awaitable(function: Callable[..., Any], value: object) -> None:
    if not inspect.isawaitable(value):
        return
    if inspect.iscoroutine(value):
        value.close()
    name = getattr(function, "__qualname__", type(function).__qualname__)
    raise TypeError(
        f"{name} ran in a thread and returned something to await ({type(value).__qualname__});"
        " make it an `async def` function, or a functools.partial of one, to run on the loop."
    )
