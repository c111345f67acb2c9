"""The watch over the event loop: how long it was blocked, and who is blocking it, told while it still lasts.

Theory of operation. While code runs, one daemon thread posts a *beat* to the loop four times within the
threshold; the loop notes when it ran it. What lies between two beats is a *gap*, and a gap over the threshold
is a *stall*. It counts whole, so rather a little more than the loop was blocked than less: seconds of stalls are
added to deadlines, and nobody is to pay for what another did.

While a gap grows old, the thread looks at the loop from outside: which task is current, and once the threshold
is passed, on which lines the loop's thread stands. That is logged at once, and once for each stall. A stall is
shared out among those who were found at it, in proportion to the time they were found with.

Whoever asks on the loop is told up to now: a gap that is still open is counted as though it ended here. A
deadline that fires right after a stall sees it therefore, whether or not a beat stood in the queue before it.
Asking does not end a gap, else somebody who asks often while blocking would chop a stall into nothing.

No lock is needed. The loop alone makes and ends gaps, by one assignment; the thread alone writes `looked`,
`seen`, `told` and `task` of a gap, replacing what is there. A look that outlasts its gap is thrown away, or at
worst written where nobody reads any more; so a word about a stall that ends this very moment may come after the
word that it is over. The thread starts with the first code to run, is parked while none runs, and ends when
nothing has run for long or the loop has stopped. Whichever way it ends, it says so *before* it leaves a last
beat behind: should the loop go on, that beat finds no thread and starts another.

What cannot be told: code that keeps the interpreter's lock for the whole of a stall (a regular expression that
explodes) keeps this thread out as well; it is counted, and as a rule still named, but only as it returns. A
process that was stopped or starved looks like a stall of whatever ran. A child's own tasks are not the child.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from flowstead.engine.guard import one_line
from flowstead.log import get_logger

log = get_logger(__name__)

_BEATS_IN_THRESHOLD: Final = 4
_INNERMOST_FRAMES: Final = 12
_LINGER_SECONDS: Final = 60.0
_CHILD: Final = "flowstead child "


def child_task_name(task_id: str) -> str:
    """What the asyncio task of a child must be called for the watch to know the child by it."""
    return _CHILD + task_id


class Culprit(msgspec.Struct, frozen=True, kw_only=True):
    """The child that was found blocking the loop."""

    flow_id: str
    task_id: str


class _Gap:
    """The time since the loop last ran a beat, and whom the thread found current in it."""

    __slots__ = ("looked", "seen", "since", "task", "thread", "told")

    def __init__(self, since: float) -> None:
        self.since = since
        self.thread = threading.get_ident()
        self.looked = since
        self.seen: Mapping[str | None, float] = {}  # seconds by child; None is all that is no child
        self.told = False
        self.task: str | None = None

    def share(self, child: str, seconds: float) -> float:
        """How much of so many seconds falls to one child."""
        seen = self.seen
        found = sum(seen.values())
        return seconds * seen.get(child, 0.0) / found if found else 0.0


class StallWatch:
    """Measure and name what blocks the loop. Everything here is called on the loop, and on one loop only.

    Args:
        threshold: How many seconds make a stall.
        now: Monotonic seconds; asked from both threads.
        child_of: The child of that id, if it runs here. Asked from both threads, so it must be a mere look-up.
        linger: After how many seconds without any code the thread ends.
    """

    def __init__(
        self,
        threshold: float,
        *,
        now: Callable[[], float],
        child_of: Callable[[str], Culprit | None],
        linger: float = _LINGER_SECONDS,
    ) -> None:
        if not threshold > 0:
            raise ValueError("The threshold of a stall must be more than no seconds.")
        self._threshold = threshold
        self._now = now
        self._child_of = child_of
        self._linger = linger
        self._running = 0
        self._gap: _Gap | None = None  # None while nothing runs, or nobody watches
        self._stalls = 0
        self._stalled = 0.0
        self._blamed: dict[str, float] = {}
        self._gone: set[str] = set()  # ended within the open gap, so not to be blamed at its end
        self._thread: threading.Thread | None = None
        self._is_posted = False
        self._work = threading.Event()
        self._closed = threading.Event()

    # ---- asked and told on the loop ------------------------------------------------------------------

    def enter(self) -> None:
        """One more piece of code runs."""
        self._running += 1
        if self._gap is None:
            self._begin()

    def leave(self) -> None:
        """One piece of code less runs. The last one leaves nothing to watch."""
        assert self._running > 0
        self._running -= 1
        if self._running == 0:
            self._end()

    def forget(self, task_id: str) -> None:
        """The child has ended: what it was blamed for is needed no more."""
        self._blamed.pop(task_id, None)
        if self._gap is not None:
            self._gone.add(task_id)

    def close(self) -> None:
        """End the thread and measure nothing more; what was measured can still be asked. Does not wait."""
        self._closed.set()
        self._work.set()
        self._end()

    @property
    def stalls(self) -> int:
        """How many times the loop was blocked for longer than the threshold."""
        return self._stalls + (self._open_seconds() > 0)

    @property
    def stalled(self) -> float:
        """How many seconds these took together, up to now."""
        return self._stalled + self._open_seconds()

    def blamed(self, task_id: str) -> float:
        """How many of the stalled seconds fall to one child, up to now; 0 for a child nobody has found."""
        return self._blamed_of(task_id, self._open_seconds())

    def lost_to(self, task_id: str) -> float:
        """How many of the stalled seconds fall to others than this child, up to now."""
        seconds = self._open_seconds()
        return max(0.0, self._stalled + seconds - self._blamed_of(task_id, seconds))

    # ---- gaps, on the loop ---------------------------------------------------------------------------

    def _begin(self) -> None:
        """Measure from here on, provided that there is a thread to post beats; else all time were a stall."""
        if self._closed.is_set() or not self._has_thread():
            self._gap = None
            return
        self._gap = _Gap(self._now())
        self._work.set()

    def _end(self) -> None:
        self._end_gap()
        self._gap = None

    def _beat(self) -> None:
        """The loop runs."""
        self._is_posted = False
        self._end_gap()
        if self._thread is None and self._running:
            self._begin()

    def _end_gap(self) -> None:
        """End the gap and begin the next; tell of it if it was a stall."""
        if (stall := self._count_gap()) is None:
            return
        gap, seconds = stall
        # A stall the thread could not tell of has only this word.
        tell = log.info if gap.told else log.warning
        tell("loop.stall_over", seconds=round(seconds, 3), task=gap.task)
        # A slow handler of the host's blocks the loop too. That counts, but telling of it would never end.
        self._count_gap()

    def _count_gap(self) -> tuple[_Gap, float] | None:
        """End the gap and begin the next; answers the ended one and its seconds if it was a stall."""
        if (gap := self._gap) is None:
            return None
        now = self._now()
        self._gap = _Gap(now)
        seconds = now - gap.since
        is_stall = seconds > self._threshold
        if is_stall:
            self._stalls += 1
            self._stalled += seconds
            self._blame(gap, seconds)
        self._gone.clear()
        return (gap, seconds) if is_stall else None

    def _blame(self, gap: _Gap, seconds: float) -> None:
        for child in gap.seen:
            if child is None or child in self._gone or self._child_of(child) is None:
                continue
            self._blamed[child] = self._blamed.get(child, 0.0) + gap.share(child, seconds)

    def _blamed_of(self, child: str, seconds: float) -> float:
        """What a child is blamed for, when so many seconds of the open gap are a stall."""
        blamed = self._blamed.get(child, 0.0)
        return blamed if self._gap is None else blamed + self._gap.share(child, seconds)

    def _open_seconds(self) -> float:
        """How long the open gap has lasted, if that makes it a stall already; else 0."""
        if self._gap is None:
            return 0.0
        seconds = self._now() - self._gap.since
        return seconds if seconds > self._threshold else 0.0

    def _has_thread(self) -> bool:
        """Start the thread unless it is there; False if the system gives none."""
        if self._thread is not None:
            return True
        self._thread = threading.Thread(
            target=self._watch,
            args=(asyncio.get_running_loop(),),
            name="flowstead stall watch",
            daemon=True,
        )
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            log.warning("loop.not_watched", reason=str(error))
        return self._thread is not None

    # ---- the thread ----------------------------------------------------------------------------------

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while not self._closed.wait(self._threshold / _BEATS_IN_THRESHOLD):
                gap = self._gap
                if not (self._tick(loop, gap) if gap is not None else self._park()):
                    break
        finally:
            # In this order: the beat must not find a thread that is about to end.
            self._thread = None
            if not self._closed.is_set():
                self._post(loop)

    def _park(self) -> bool:
        """Wait for code to run; False if none has come for long."""
        self._work.clear()
        # Looked at after clearing, so that whoever sets both is not missed.
        is_idle = self._gap is None and not self._closed.is_set()
        return not is_idle or self._work.wait(self._linger)

    def _tick(self, loop: asyncio.AbstractEventLoop, gap: _Gap) -> bool:
        """Look at the loop if it has been silent for long, ask it for a beat; False if it runs no more."""
        if not loop.is_running():
            return False
        now = self._now()
        if now - gap.since > self._threshold / 2:
            self._look(loop, gap, now)
        return self._is_posted or self._post(loop)

    def _post(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Ask the loop for a beat; False if it is closed."""
        self._is_posted = True
        try:
            loop.call_soon_threadsafe(self._beat)
        except RuntimeError:
            return False
        return True

    def _look(self, loop: asyncio.AbstractEventLoop, gap: _Gap, now: float) -> None:
        """Note which task is current; the first time past the threshold, tell of it."""
        seconds = now - gap.since
        is_news = seconds > self._threshold and not gap.told
        task = _current_task_name(loop)
        stack = _stack_of(gap.thread) if is_news else []
        if self._gap is not gap:
            # The loop went on meanwhile: whoever was found is not to blame.
            return
        child = _child_in(task)
        gap.seen = {**gap.seen, child: gap.seen.get(child, 0.0) + now - gap.looked}
        gap.looked = now
        if is_news:
            gap.told, gap.task = True, None if task is None else one_line(task)
            culprit = None if child is None else self._child_of(child)
            known = {} if culprit is None else msgspec.structs.asdict(culprit)
            told = round(seconds, 3)
            log.warning("loop.stalled", seconds=told, task=gap.task, stack=stack, **known)


def _child_in(task: str | None) -> str | None:
    if task is None or not task.startswith(_CHILD):
        return None
    return task.removeprefix(_CHILD)


def _current_task_name(loop: asyncio.AbstractEventLoop) -> str | None:
    """The name of the task that a loop in another thread is running; None if it is none, or will not say."""
    try:
        task = asyncio.current_task(loop)
        return None if task is None else str(task.get_name())
    except Exception:
        # Tasks may be of the host's making.
        return None


def _stack_of(thread: int) -> list[str]:
    """Where a thread stands, innermost first: places only, nothing of what it works on."""
    frame = sys._current_frames().get(thread)
    places: list[str] = []
    while frame is not None and len(places) < _INNERMOST_FRAMES:
        code = frame.f_code
        places.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}")
        frame = frame.f_back
    return places
