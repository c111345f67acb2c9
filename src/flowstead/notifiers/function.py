"""Updates as calls of the host's function."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import anyio

from flowstead.executors.code import is_async
from flowstead.executors.program import in_thread
from flowstead.model.update import Update


class CallableNotifier:
    """Calls a function with each update: an async one on the loop, a plain one in a thread.

    Cancelling an async function reaches it at its await. A plain one cannot be stopped: the attempt is given up
    and the function goes on, so that it may be called again for an update which it is still busy with. Its thread
    counts until it returns, and never keeps the process from ending.

    Args:
        function: Takes the update. Returning means delivered; raising means as in `Notifier.send`.
        threads: Most calls of a plain function at once; more wait for one to return.

    Raises:
        TypeError: It cannot be called.
    """

    def __init__(self, function: Callable[[Update], Any], *, threads: int = 8) -> None:
        if not callable(function):
            raise TypeError(
                f"CallableNotifier takes a function of one update, not {type(function).__name__}."
            )
        self._function: Final = function
        self._is_async: Final = is_async(function)
        self._limiter: Final = anyio.CapacityLimiter(threads)

    async def send(self, update: Update) -> None:
        """Call the function, and pass on what it raises.

        Cancelling stops an async function at its await; a plain one goes on in its thread, and keeps its place.
        """
        answer = self._function(update) if self._is_async else await self._in_thread(update)
        if inspect.isawaitable(answer):
            # A plain function may hand back what an async one left to do: `lambda update: tell(update)`.
            await answer

    async def _in_thread(self, update: Update) -> Any:
        call = object()
        await self._limiter.acquire_on_behalf_of(call)
        work = partial(contextvars.copy_context().run, _outcome, self._function, update)
        try:
            done = in_thread(work, "flowstead notifier")
        except RuntimeError:
            self._limiter.release_on_behalf_of(call)
            raise
        done.add_done_callback(lambda _: self._limiter.release_on_behalf_of(call))
        await asyncio.wait([done])
        answer, error = done.result()
        if error is not None:
            raise error
        return answer


def _outcome(function: Callable[[Update], Any], update: Update) -> tuple[Any, BaseException | None]:
    """Call the function. What it raises is an answer, so that nobody misses it when the attempt was given up."""
    try:
        return function(update), None
    except BaseException as error:
        return None, error
