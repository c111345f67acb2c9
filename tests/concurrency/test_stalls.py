"""The watch over the loop: what blocks it is measured and named while it lasts; nobody else pays for it.

Real loops and the real thread. Where seconds have to come out exactly, the clock is turned by hand: then only
the code that "blocks" makes time pass, and it goes on once the thread has been seen to look.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from flowstead.engine.stalls import Culprit, StallWatch, child_task_name

THRESHOLD = 0.02
LONG = 0.1
PATIENCE = 30.0
"""After so many seconds a test that waits for the thread has failed; none is expected to."""


class Hand:
    """A clock that only the test turns, and that knows how often another thread has read it."""

    def __init__(self, loop_thread: int) -> None:
        self._seconds = 1000.0
        self._loop_thread = loop_thread
        self._read = threading.Semaphore(0)

    def __call__(self) -> float:
        if threading.get_ident() != self._loop_thread:
            self._read.release()
        return self._seconds

    def turn(self, seconds: float) -> None:
        self._seconds += seconds

    def block(self, seconds: float) -> None:
        """Let time pass, and come back once the thread has done a whole look since."""
        self.turn(seconds)
        while self._read.acquire(blocking=False):
            pass
        # A look begins by reading the clock; the second reading from here on tells that the first look is done.
        for _ in range(2):
            assert self._read.acquire(timeout=PATIENCE), "the thread does not look any more"


class Loop(asyncio.SelectorEventLoop):
    """A loop that counts the beats it is sent, and can be made to get them late."""

    posted = beats = 0
    is_late = False

    def __init__(self) -> None:
        self._late: list[tuple[Any, ...]] = []
        self.after_beat: Callable[[], object] = lambda: None
        super().__init__()

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:
        self.posted += 1
        if self.is_late:
            self._late.append(args)
            return None
        handle = super().call_soon_threadsafe(*args, **kwargs)
        super().call_soon_threadsafe(self._count)
        return handle

    def _count(self) -> None:
        self.beats += 1
        self.after_beat()

    def deliver(self) -> None:
        self.is_late = False
        while self._late:
            self.call_soon_threadsafe(*self._late.pop(0))


class Ear(logging.Handler):
    """Hears what the watch says; `stalled` is set as soon as it has named a stall."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.stalled = threading.Event()
        self.on_record: Callable[[logging.LogRecord], object] = lambda _: None

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        if record.getMessage() == "loop.stalled":
            self.stalled.set()
        self.on_record(record)

    def named(self, event: str) -> list[dict[str, Any]]:
        return [vars(record) for record in self.records if record.getMessage() == event]

    def wait(self) -> None:
        """Block until a stall has been named: this one, if none was before."""
        assert self.stalled.wait(PATIENCE), "the stall was not named while it lasted"


@pytest.fixture
def ear() -> Iterator[Ear]:
    handler, logger = Ear(), logging.getLogger("flowstead.engine.stalls")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


class Play:
    """A watch over the loop that runs this, the children it knows, and the clock it goes by."""

    def __init__(self, *, hand: bool = True, linger: float = 100 * PATIENCE) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self.loop = loop
        self.clock = Hand(threading.get_ident())
        self.children: dict[str, Culprit] = {}
        self.watch = StallWatch(
            THRESHOLD,
            now=self.clock if hand else time.monotonic,
            child_of=self.children.get,
            linger=linger,
        )

    def child(self, task_id: str, code: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.children[task_id] = Culprit(flow_id=f"flow of {task_id}", task_id=task_id)
        return asyncio.create_task(code, name=child_task_name(task_id))

    async def beats(self, count: int) -> None:
        """Wait for so many more beats to have been run."""
        until = self.loop.beats + count
        await wait_for(lambda: self.loop.beats >= until)


async def wait_for(is_so: Callable[[], bool]) -> None:
    """Keep the loop turning until something has come about."""
    async with asyncio.timeout(PATIENCE):
        while not is_so():  # noqa: ASYNC110 - a turning loop is the point
            await asyncio.sleep(0)


def sleep_on_the_loop() -> None:
    """Block as real code does: here this is the fault itself."""
    time.sleep(LONG)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "flowstead stall watch"]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    assert threads() == []
    yield
    for thread in threads():
        thread.join(PATIENCE)
    assert threads() == []


# ---- measuring -----------------------------------------------------------------------------------------


def test_a_stall_counts_for_at_least_as_long_as_it_lasted() -> None:
    async def main() -> None:
        play = Play(hand=False)
        play.watch.enter()
        await play.beats(2)

        began = time.monotonic()
        sleep_on_the_loop()
        lasted = time.monotonic() - began
        at_once = play.watch.stalled
        await play.beats(2)

        assert at_once >= lasted
        assert play.watch.stalled >= lasted
        assert play.watch.stalls >= 1
        play.watch.close()

    run(main)


def test_a_loop_that_keeps_running_has_not_stalled(ear: Ear) -> None:
    async def main() -> None:
        play = Play()
        play.loop.after_beat = lambda: play.clock.turn(THRESHOLD * 0.9)
        play.watch.enter()

        await play.beats(10)

        assert (play.watch.stalls, play.watch.stalled) == (0, 0.0)
        assert ear.records == []
        play.watch.close()

    run(main)


def test_a_gap_over_the_threshold_counts_whole_and_once(ear: Ear) -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()

        play.clock.turn(3.0)
        while_open = (play.watch.stalls, play.watch.stalled)
        await play.beats(3)

        assert while_open == (1, 3.0)
        assert (play.watch.stalls, play.watch.stalled) == (1, 3.0)
        assert [told["seconds"] for told in ear.named("loop.stall_over")] == [3.0]
        play.watch.close()

    run(main)


def test_asking_often_does_not_chop_a_stall_into_nothing() -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()
        await play.beats(1)

        answers = []
        for _ in range(5):
            play.clock.turn(THRESHOLD / 2)
            answers.append(play.watch.stalled)

        assert answers == pytest.approx([0, 0, *(THRESHOLD / 2 * n for n in (3, 4, 5))])
        play.watch.close()

    run(main)


@pytest.mark.parametrize("is_late", [False, True], ids=["beat in the queue", "no beat at all"])
def test_a_deadline_that_fires_after_a_stall_sees_it(is_late: bool) -> None:
    async def main() -> None:
        play = Play(hand=False)
        play.watch.enter()
        await play.beats(2)
        seen: list[float] = []

        play.loop.is_late = is_late
        began = time.monotonic()
        play.loop.call_later(THRESHOLD / 2, lambda: seen.append(play.watch.stalled))
        sleep_on_the_loop()
        lasted = time.monotonic() - began
        await wait_for(lambda: bool(seen))

        assert seen[0] >= lasted
        play.loop.deliver()
        play.watch.close()

    run(main)


def test_a_stall_by_the_last_code_to_run_is_counted_when_it_leaves() -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()
        play.watch.enter()
        play.watch.leave()

        play.clock.turn(2.0)
        play.watch.leave()
        play.clock.turn(100.0)

        assert (play.watch.stalls, play.watch.stalled) == (1, 2.0)
        play.watch.close()

    run(main)


def test_nothing_is_measured_before_code_runs_or_after_the_close() -> None:
    async def main() -> None:
        play = Play()
        play.clock.turn(100.0)
        play.watch.enter()
        play.clock.turn(2.0)
        play.watch.close()

        play.clock.turn(100.0)
        play.watch.enter()
        play.clock.turn(100.0)
        play.watch.leave()
        play.watch.close()

        assert (play.watch.stalls, play.watch.stalled) == (1, 2.0)

    run(main)


def test_a_threshold_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold"):
        StallWatch(0.0, now=time.monotonic, child_of=lambda _: None)


# ---- naming --------------------------------------------------------------------------------------------


def test_the_culprit_is_named_with_task_and_line_while_it_still_blocks(ear: Ear) -> None:
    async def main() -> None:
        play = Play(hand=False)
        play.watch.enter()
        lines = []

        async def hog() -> None:
            lines.append(sys._getframe().f_lineno + 1)
            ear.wait()

        await play.child("t-1", hog())
        await wait_for(lambda: bool(ear.named("loop.stall_over")))

        told = ear.named("loop.stalled")[0]
        assert told["task"] == "flowstead child t-1"
        assert (told["flow_id"], told["task_id"]) == ("flow of t-1", "t-1")
        assert told["seconds"] >= THRESHOLD
        assert any(
            place.startswith(f"{__file__}:{lines[0]} in ") and place.endswith("hog")
            for place in told["stack"]
        )
        assert len(told["stack"]) <= 12
        assert ear.named("loop.stall_over")[0]["task"] == "flowstead child t-1"
        play.watch.close()

    run(main)


def test_one_stall_is_told_of_once_however_long_it_lasts(ear: Ear) -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()

        async def hog() -> None:
            before = play.loop.posted
            for _ in range(5):
                play.clock.block(1.0)
            posted.append(play.loop.posted - before)

        posted: list[int] = []
        await play.child("t-1", hog())
        await play.beats(2)

        assert posted[0] <= 1, "beats pile up in a loop that cannot run them"
        assert len(ear.named("loop.stalled")) == 1
        over = ear.named("loop.stall_over")
        assert [(told["seconds"], told["levelno"]) for told in over] == [(5.0, logging.INFO)]
        play.watch.close()

    run(main)


def test_a_stall_that_only_its_end_could_tell_of_is_a_warning(ear: Ear) -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()

        play.clock.turn(2.0)
        play.watch.leave()

        assert [told["levelno"] for told in ear.named("loop.stall_over")] == [logging.WARNING]
        play.watch.close()

    run(main)


def test_a_callback_that_is_no_task_is_told_of_by_its_place(ear: Ear) -> None:
    async def main() -> None:
        play = Play(hand=False)
        play.watch.enter()

        play.loop.call_soon(ear.wait)
        await wait_for(lambda: bool(ear.named("loop.stall_over")))

        told = ear.named("loop.stalled")[0]
        assert told["task"] is None
        assert "task_id" not in told
        assert any(place.endswith("Ear.wait") for place in told["stack"])
        play.watch.close()

    run(main)


def test_a_child_that_is_not_ours_is_neither_introduced_nor_blamed(ear: Ear) -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()

        async def hog() -> None:
            play.clock.block(1.0)

        await asyncio.create_task(hog(), name=child_task_name("stranger"))
        await play.beats(1)

        assert "flow_id" not in ear.named("loop.stalled")[0]
        assert play.watch.stalled == 1.0
        assert play.watch.blamed("stranger") == 0.0
        play.watch.close()

    run(main)


def test_a_task_that_will_not_say_its_name_is_told_of_all_the_same(ear: Ear) -> None:
    class Nameless(asyncio.Task[None]):
        def get_name(self) -> str:
            raise RuntimeError("no name")

    async def main() -> None:
        play = Play()
        play.watch.enter()

        async def hog() -> None:
            play.clock.block(1.0)

        await Nameless(hog())
        await play.beats(1)

        assert [told["task"] for told in ear.named("loop.stalled")] == [None]
        play.watch.close()

    run(main)


def test_whoever_is_found_after_the_stall_is_over_is_not_named(ear: Ear) -> None:
    found, gone_on = threading.Event(), threading.Event()

    class Slow(asyncio.Task[None]):
        def get_name(self) -> str:
            # Asked by the thread in the middle of its look: let the loop go on before it is answered.
            found.set()
            assert gone_on.wait(PATIENCE)
            return super().get_name()

    async def main() -> None:
        play = Play()
        play.watch.enter()

        async def hog() -> None:
            play.clock.turn(1.0)
            assert found.wait(PATIENCE)
            play.watch.leave()
            play.watch.enter()
            gone_on.set()

        await Slow(hog(), name=child_task_name("t-1"))
        await play.beats(2)

        assert play.watch.stalled == 1.0
        assert ear.named("loop.stalled") == []
        play.watch.close()

    run(main)


# ---- blaming -------------------------------------------------------------------------------------------


def test_a_stall_is_blamed_on_its_culprit_alone_and_forgotten_with_it() -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()
        at_once = []

        async def hog() -> None:
            play.clock.block(3.0)
            at_once.append((play.watch.blamed("hog"), play.watch.lost_to("hog")))

        async def innocent() -> None:
            pass

        await asyncio.gather(play.child("hog", hog()), play.child("innocent", innocent()))
        await play.beats(2)

        assert at_once == [(3.0, 0.0)]
        assert play.watch.stalled == 3.0
        assert (play.watch.blamed("hog"), play.watch.lost_to("hog")) == (3.0, 0.0)
        assert (play.watch.blamed("innocent"), play.watch.lost_to("innocent")) == (0.0, 3.0)

        play.watch.forget("hog")

        assert (play.watch.blamed("hog"), play.watch.lost_to("hog")) == (0.0, 3.0)
        assert play.watch.stalled == 3.0
        play.watch.close()

    run(main)


def test_two_stalls_of_one_child_add_up() -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()

        async def hog() -> None:
            play.clock.block(3.0)
            await play.beats(2)
            play.clock.block(2.0)
            await play.beats(2)

        await play.child("hog", hog())

        assert play.watch.blamed("hog") == pytest.approx(5.0)
        assert play.watch.stalls == 2
        play.watch.close()

    run(main)


def test_the_next_attempt_of_a_child_is_blamed_for_itself() -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()

        async def hog(seconds: float) -> None:
            play.clock.block(seconds)

        await play.child("hog", hog(3.0))
        play.watch.forget("hog")
        await play.beats(2)
        await play.child("hog", hog(2.0))
        await play.beats(2)

        assert play.watch.stalled == 5.0
        assert play.watch.blamed("hog") == 2.0
        play.watch.close()

    run(main)


def test_children_that_block_in_turn_share_the_stall_as_they_were_found() -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()
        play.loop.is_late = True

        async def hog(seconds: float) -> None:
            play.clock.block(seconds)

        await asyncio.gather(play.child("long", hog(3.0)), play.child("short", hog(1.0)))
        while_open = (play.watch.blamed("long"), play.watch.blamed("short"))
        lost = (play.watch.lost_to("long"), play.watch.lost_to("short"))
        play.loop.deliver()
        await play.beats(1)

        assert (while_open, lost) == ((3.0, 1.0), (1.0, 3.0))
        assert (play.watch.blamed("long"), play.watch.blamed("short")) == (3.0, 1.0)
        assert (play.watch.stalls, play.watch.stalled) == (1, 4.0)
        play.watch.close()

    run(main)


@pytest.mark.parametrize("known", [True, False], ids=["still known", "known no more"])
def test_a_child_that_has_ended_within_its_stall_leaves_no_blame_behind(known: bool) -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()
        play.loop.is_late = True

        async def hog() -> None:
            play.clock.block(3.0)

        await play.child("hog", hog())
        play.watch.forget("hog")
        if not known:
            del play.children["hog"]
        play.loop.deliver()
        await play.beats(1)

        assert play.watch.stalled == 3.0
        assert play.watch.blamed("hog") == 0.0

        play.watch.leave()
        play.watch.forget("hog")
        play.watch.close()

    run(main)


# ---- the thread ----------------------------------------------------------------------------------------


def is_parked() -> bool:
    """Whether the thread waits for code to run."""
    for thread in threads():
        frame = sys._current_frames().get(thread.ident or 0)
        while frame is not None:
            if frame.f_code.co_name == "_park":
                return True
            frame = frame.f_back
    return False


def test_without_code_the_thread_is_parked_and_wakes_nobody() -> None:
    async def main() -> None:
        play = Play()
        assert threads() == []
        play.watch.enter()
        await play.beats(2)
        play.watch.leave()
        await wait_for(is_parked)
        await wait_for(lambda: play.loop.beats == play.loop.posted)
        posted = play.loop.posted

        until = time.monotonic() + 10 * THRESHOLD
        await wait_for(lambda: not is_parked() or time.monotonic() > until)

        assert is_parked()
        assert play.loop.posted == posted

        play.watch.enter()
        await play.beats(2)
        play.watch.close()

    run(main)


def test_a_thread_that_nobody_needs_for_long_ends_and_the_next_code_brings_another() -> None:
    async def main() -> None:
        play = Play(linger=0.001)
        play.watch.enter()
        await play.beats(1)
        play.watch.leave()
        await wait_for(lambda: not threads())

        play.watch.enter()
        await play.beats(2)

        await wait_for(lambda: len(threads()) == 1)
        play.watch.close()

    run(main)


@pytest.mark.parametrize("parked", [False, True], ids=["at work", "parked"])
def test_close_ends_the_thread(parked: bool) -> None:
    async def main() -> None:
        play = Play()
        play.watch.enter()
        await play.beats(1)
        if parked:
            play.watch.leave()
            await wait_for(is_parked)
        (thread,) = threads()

        play.watch.close()
        thread.join(PATIENCE)

        assert not thread.is_alive()

    run(main)


def test_a_watch_that_never_watched_can_be_closed() -> None:
    watch = StallWatch(THRESHOLD, now=time.monotonic, child_of=lambda _: None)

    watch.close()

    assert (watch.stalls, watch.stalled, watch.blamed("t-1")) == (0, 0.0, 0.0)


@pytest.mark.parametrize("parked", [False, True], ids=["at work", "parked"])
def test_a_loop_that_is_closed_under_the_thread_ends_it_quietly(parked: bool, ear: Ear) -> None:
    started: list[threading.Thread] = []

    async def main() -> None:
        play = Play(linger=THRESHOLD)
        play.watch.enter()
        await play.beats(1)
        started.extend(threads())
        if parked:
            play.watch.leave()
            await wait_for(lambda: is_parked() or not threads())

    run(main)
    for thread in started:
        thread.join(PATIENCE)

    assert started
    assert threads() == []
    assert ear.records == []


def test_a_loop_that_stops_and_goes_on_is_watched_again(ear: Ear) -> None:
    loop = Loop()
    plays: list[Play] = []

    async def before() -> None:
        plays.append(Play())
        plays[0].watch.enter()
        await plays[0].beats(1)

    async def after() -> None:
        (play,) = plays
        await play.beats(2)
        assert len(threads()) == 1

        async def hog() -> None:
            play.clock.block(3.0)

        await play.child("t-1", hog())
        await play.beats(2)
        play.watch.close()

    loop.run_until_complete(before())
    (thread,) = threads()
    thread.join(PATIENCE)
    ended = not thread.is_alive()
    plays[0].clock.turn(7.0)
    loop.run_until_complete(after())
    loop.close()

    assert ended
    assert [told["task"] for told in ear.named("loop.stalled")] == ["flowstead child t-1"]
    assert plays[0].watch.stalled == 10.0
    assert plays[0].watch.blamed("t-1") == 3.0


def test_without_a_thread_to_be_had_code_runs_and_no_time_counts_as_a_stall(ear: Ear) -> None:
    async def main() -> None:
        play = Play()
        size = threading.stack_size(1 << 62)
        try:
            play.watch.enter()
        finally:
            threading.stack_size(size)
        play.clock.turn(100.0)
        without = (play.watch.stalls, play.watch.stalled, play.watch.blamed("t-1"))

        play.watch.enter()
        play.clock.turn(2.0)
        await play.beats(1)

        assert without == (0, 0.0, 0.0)
        assert len(ear.named("loop.not_watched")) == 1
        assert play.watch.stalled == 2.0
        play.watch.close()

    run(main)


# ---- hosts that listen with a fault --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [OSError, SystemExit], ids=["an error", "an exit"])
def test_a_handler_that_raises_in_the_thread_does_not_end_the_watch(
    ear: Ear, fault: type[BaseException]
) -> None:
    def refuse(record: logging.LogRecord) -> None:
        if record.getMessage() == "loop.stalled" or fault is OSError:
            raise fault("the log is full")

    async def main() -> None:
        play = Play()
        ear.on_record = refuse
        play.watch.enter()

        async def hog() -> None:
            play.clock.turn(1.0)
            ear.wait()
            ear.stalled.clear()

        for name in ("first", "second"):
            await play.child(name, hog())
            await play.beats(3)

        told = [record["task_id"] for record in ear.named("loop.stalled")]
        assert told == ["first", "second"]
        assert play.watch.stalled == 2.0
        play.watch.close()

    run(main)


def test_a_slow_handler_is_counted_but_does_not_keep_the_watch_talking(ear: Ear) -> None:
    async def main() -> None:
        play = Play()

        def dawdle(record: logging.LogRecord) -> None:
            if record.getMessage() == "loop.stall_over":
                play.clock.turn(5.0)

        ear.on_record = dawdle
        play.watch.enter()

        play.clock.turn(1.0)
        await play.beats(5)

        assert len(ear.named("loop.stall_over")) == 1
        assert (play.watch.stalls, play.watch.stalled) == (2, 6.0)
        play.watch.close()

    run(main)
