"""An event loop that is repeatable: virtual time, and an order of steps that follows from a seed.

Theory of operation. One handle runs per round. When nothing is ready, time jumps to the next timer that may
make something happen, so a week passes at once. With `shuffle`, any ready task may be next, while the callbacks
of one task stay in order; that is wider than what asyncio does, and finds what depends on asyncio's order by
accident. Without it the order is asyncio's own. There are no threads, no sockets and no wall clock, so the same
seed takes the same steps.

Sets of tasks and futures are iterated by hash, which is an address as a rule: ours hash by number. anyio also
iterates sets of cancel scopes, which cannot be numbered; tasks woken by one cancellation are therefore put in
the order of their numbers.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import zlib
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from itertools import count
from random import Random
from typing import Any, Final, NoReturn

_STEPS_WITHOUT_TIME: Final = 100_000
_REMEMBERED: Final = 64


class Deadlock(AssertionError):
    """Nothing can run any more, and no timer will change that."""


class Livelock(AssertionError):
    """Something runs again and again while no time passes."""


class SimulatedTask(asyncio.Task[Any]):
    """A task with a number that does not depend on where it lies in memory."""

    number: int

    def __init__(self, coro: Coroutine[Any, Any, Any], *, number: int, **options: Any) -> None:
        self.number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number


class SimulatedFuture(asyncio.Future[Any]):
    """A future with a number."""

    number: int = 0

    def __hash__(self) -> int:
        return self.number


class SimulatedLoop(asyncio.BaseEventLoop):
    """A loop for simulations.

    Args:
        random: Where the order of steps comes from, if they are shuffled.
        shuffle: Take ready tasks in any order rather than in asyncio's.
        began: The loop's first instant, seconds.
    """

    def __init__(self, random: Random, *, shuffle: bool = False, began: float = 0.0) -> None:
        super().__init__()
        # BaseEventLoop's own, which call_soon and call_at fill.
        self._ready: deque[Any]
        self._stopping: bool
        self._scheduled: list[Any]
        self.random = random
        self.steps = 0
        self.trace = 0
        """A checksum of all steps so far: equal for equal runs."""
        self.on_step: Callable[[], object] | None = None
        """Called before each step; what it raises comes out of the loop."""
        self._now = began
        self._shuffle = shuffle
        self._numbers = count(1)
        self._still = 0
        self._lately: deque[str] = deque(maxlen=_REMEMBERED)
        self._tasks: dict[SimulatedTask, None] = {}
        self.set_task_factory(self._make_task)

    # ---- what asyncio asks of a loop --------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def create_future(self) -> asyncio.Future[Any]:
        future = SimulatedFuture(loop=self)
        future.number = next(self._numbers)
        return future

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
    ) -> asyncio.Task[Any]:
        task = SimulatedTask(coro, loop=self, number=next(self._numbers), **options)
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: Any) -> None:
        self._tasks.pop(task, None)

    def run_in_executor(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        raise RuntimeError(
            "A simulation has no threads: give it stand-ins for code that uses them."
        )

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector, so nobody need be woken."""

    def _process_events(self, event_list: Any) -> None:
        """There are no sockets."""

    # ---- a round ----------------------------------------------------------------------------------

    def _run_once(self) -> None:
        self._release_due()
        if not self._ready:
            if self._stopping:
                return
            self._pass_time()
        if self.on_step is not None:
            self.on_step()
        handle = self._choose()
        if handle is None:
            return
        self.steps += 1
        self._still += 1
        label = _label(handle)
        self.trace = zlib.crc32(f"{self._now:.6f} {label}".encode(), self.trace)
        self._lately.append(label)
        if self._still > _STEPS_WITHOUT_TIME:
            raise Livelock(f"No time passes while this runs: {self._busiest()}.")
        woken = len(self._ready)
        handle._run()
        if len(self._ready) - woken > 1:
            self._order_cancelled(woken)

    def _release_due(self) -> None:
        """Make ready what is due; forget what was cancelled."""
        scheduled = self._scheduled
        while scheduled and (scheduled[0]._cancelled or scheduled[0]._when <= self._now):
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                self._ready.append(handle)

    def _pass_time(self) -> None:
        at = self._next_work()
        if at is None:
            raise Deadlock(
                "Nothing can run any more. Waiting:\n" + "\n".join(self._waiting())
                + "\n(Threads, sockets and subprocesses are not simulated.)"
            )  # fmt: skip
        self._now = at
        self._still = 0
        self._release_due()

    def _next_work(self) -> float | None:
        """When the first timer is due that may make something happen; what comes before it is late then."""
        if self._scheduled and _is_work(self._scheduled[0]):
            return float(self._scheduled[0]._when)
        return min((h._when for h in self._scheduled if _is_work(h)), default=None)

    def _choose(self) -> Any:
        ready = self._ready
        while ready and ready[0]._cancelled:
            ready.popleft()
        if not ready:
            return None
        if not self._shuffle or len(ready) == 1:
            return ready.popleft()
        wanted = _subject(ready[self.random.randrange(len(ready))])
        for place, handle in enumerate(ready):  # pragma: no branch -- the wanted one is there
            if _subject(handle) is wanted:
                del ready[place]
                return None if handle._cancelled else handle
        raise AssertionError("unreachable")

    def _order_cancelled(self, start: int) -> None:
        """Put tasks that one step has cancelled in the order of their numbers, in the places they have."""
        ready = self._ready
        places = [place for place in range(start, len(ready)) if _is_cancelled_wakeup(ready[place])]
        if len(places) > 1:
            handles = sorted((ready[place] for place in places), key=_number)
            for place, handle in zip(places, handles, strict=True):
                ready[place] = handle

    # ---- for reports ------------------------------------------------------------------------------

    def pending_tasks(self) -> list[SimulatedTask]:
        """Tasks that have not ended, oldest first."""
        return [task for task in self._tasks if not task.done()]

    def flow_code(self) -> list[str]:
        """Where the code that uses the library is suspended, oldest task first."""
        tasks = [task for task in self.pending_tasks() if is_of_a_flow(task)]
        codes = [suspended(task) for task in tasks]
        return [
            f"{code.cr_code.co_qualname.rpartition('<locals>.')[2]} at {_where(code)}"
            for code in codes
        ]

    def _waiting(self) -> Iterator[str]:
        for task in self.pending_tasks():
            if (code := suspended(task)) is not None:
                yield f"  {task.get_name()}: {code.cr_code.co_qualname} at {_where(code)}"

    def _busiest(self) -> str:
        return ", ".join(f"{name} ({n})" for name, n in Counter(self._lately).most_common(3))


def _subject(handle: Any) -> object:
    """Whose callback it is: callbacks of one subject are never reordered."""
    callback: Any = handle._callback
    while hasattr(callback, "func"):
        callback = callback.func
    return getattr(callback, "__self__", None) or callback


def _label(handle: Any) -> str:
    subject = _subject(handle)
    if isinstance(subject, SimulatedTask):
        return f"{subject.number} {_name_of(subject.get_coro())}"
    callback = handle._callback
    name = getattr(callback, "__qualname__", type(callback).__qualname__)
    return f"- {name}"


def _is_cancelled_wakeup(handle: Any) -> bool:
    args = handle._args
    return (
        isinstance(_subject(handle), SimulatedTask)
        and bool(args)
        and isinstance(args[0], asyncio.Future)
        and args[0].cancelled()
    )


def _number(handle: Any) -> int:
    subject = _subject(handle)
    assert isinstance(subject, SimulatedTask)
    return subject.number


def _name_of(coro: object) -> str:
    return getattr(coro, "__qualname__", type(coro).__qualname__)


def suspended(task: asyncio.Task[Any]) -> Any:
    """The innermost coroutine a task is suspended in, the code that is not the library's own if there is any."""
    found: Any = None
    coro: Any = task.get_coro()
    while getattr(coro, "cr_frame", None) is not None:
        if found is None or not _is_ours(coro) or _is_ours(found):
            found = coro
        coro = coro.cr_await
    return found


def _is_ours(coro: Any) -> bool:
    name: str = coro.cr_frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in ("flowstead", "anyio", "asyncio")


def is_of_a_flow(task: asyncio.Task[Any]) -> bool:
    """Whether a task is suspended in code that uses the library."""
    code = suspended(task)
    return code is not None and not _is_ours(code)


def _where(coro: Any) -> str:
    frame = coro.cr_frame
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _is_work(handle: Any) -> bool:
    """Whether a timer may make something happen: the engine's sweep for idle flows never does."""
    name = getattr(handle._callback, "__qualname__", "")
    # anyio.sleep_forever is a timer too, for an instant that never comes.
    return not handle._cancelled and handle._when < math.inf and name != "Engine._let_go"
