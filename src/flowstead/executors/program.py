"""A started program: its pipes, its signals and its end.

Theory of operation. Everything here is a callback of the loop; there is no task that a cancellation could reach.
The leader's end is noticed without reaping it: for as long as it is a zombie, the kernel gives its number to
nobody, and a signal to its group cannot strike a stranger. `reap` comes last, once the group is empty.

Because of that, and so that it works on loops in any thread, asyncio's own subprocesses and child watchers are not
used. A program is started in a thread, since an exec may have to wait for a disk.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any, Final, NamedTuple, TypeVar

import anyio

from flowstead.executors.leftovers import Seen, look_at, open_handle, reap, signal_group

T = TypeVar("T")

_CHUNK: Final = 64 * 1024
_MOST_CHUNKS_LEFT: Final = 64


class Started(NamedTuple):
    """A program that runs, and when the kernel says it started, where it does."""

    process: subprocess.Popen[bytes]
    leader: Seen | None


def start(
    argv: Sequence[bytes], *, cwd: str | None, env: dict[bytes, bytes], has_input: bool
) -> Started:
    """Start a program as the leader of its own session. Blocks: call it in a thread.

    Raises:
        OSError: It could not be started, and nothing runs.
    """
    process = subprocess.Popen(
        argv,
        bufsize=0,
        stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=env,
        start_new_session=True,
    )
    return Started(process, look_at(process.pid))


class Program:
    """A started program, attached to the running loop.

    Args:
        started: What `start` answered.
        given: What it is to read; whether it does is its own affair.
        on_output: Called with each piece of its standard output.
        on_errors: Called with each piece of its standard error.
    """

    def __init__(
        self,
        started: Started,
        *,
        given: bytes,
        on_output: Callable[[bytes], object],
        on_errors: Callable[[bytes], object],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = started.process
        self._given = memoryview(given)
        self._outputs: dict[int, Callable[[bytes], object]] = {}
        self._is_reaped = False
        self.leader: Final = started.leader
        self.pid: Final = started.process.pid
        self.ended: Final[asyncio.Future[None]] = self._loop.create_future()
        """Done once the leader has gone; what it leaves behind may still run."""
        try:
            self._attach(on_output, on_errors)
        except BaseException:
            self._abort()
            raise

    def ask_to_end(self) -> None:
        """SIGTERM to the group; who is stopped is woken to hear it."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the group. Harmless at any time, also long after the end."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Take what is left in the pipes and close our ends, whoever holds the others."""
        for fd in list(self._outputs):
            for _ in range(_MOST_CHUNKS_LEFT):
                if not self._read(fd):
                    break
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            self._close(pipe)

    def reap(self) -> int | None:
        """The leader's exit status, negative for a signal; None if someone else in our process took it."""
        self._is_reaped = True
        status = reap(self.pid)
        # So that Popen does not look for a process that is not there any more.
        self._process.returncode = -1 if status is None else status
        return status

    def _signal(self, number: int) -> None:
        if not self._is_reaped:
            signal_group(self.pid, number)

    # ---- pipes ------------------------------------------------------------------------------------

    def _attach(
        self, on_output: Callable[[bytes], object], on_errors: Callable[[bytes], object]
    ) -> None:
        process = self._process
        self._notice_end()
        assert process.stdout is not None and process.stderr is not None
        for pipe, take in ((process.stdout, on_output), (process.stderr, on_errors)):
            os.set_blocking(pipe.fileno(), False)
            self._outputs[pipe.fileno()] = take
            self._loop.add_reader(pipe.fileno(), self._read, pipe.fileno())
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            self._loop.add_writer(process.stdin.fileno(), self._write)

    def _read(self, fd: int) -> bool:
        """Take a piece of output; answers whether there may be more."""
        try:
            piece = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        if piece:
            self._outputs[fd](piece)
        else:
            self._loop.remove_reader(fd)
            del self._outputs[fd]
        return bool(piece)

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            written = os.write(pipe.fileno(), self._given[:_CHUNK])
        except BlockingIOError:
            return
        except OSError:
            # It does not want to read, which is no failure.
            written = len(self._given)
        self._given = self._given[written:]
        if not self._given:
            self._close(pipe)

    def _close(self, pipe: IO[bytes] | None) -> None:
        if pipe is not None and not pipe.closed:
            fd = pipe.fileno()
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            self._outputs.pop(fd, None)
            pipe.close()

    # ---- the end ----------------------------------------------------------------------------------

    def _notice_end(self) -> None:
        handle = open_handle(self.pid)
        if handle is None:
            wait = in_thread(partial(_wait_without_reaping, self.pid))
            wait.add_done_callback(lambda _: self._has_ended())
        else:
            self._loop.add_reader(handle, self._handle_is_ready, handle)

    def _handle_is_ready(self, handle: int) -> None:
        self._loop.remove_reader(handle)
        os.close(handle)
        self._has_ended()

    def _has_ended(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _abort(self) -> None:
        """End what could not be attached; the caller learns why."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            self._close(pipe)
        self._process.wait()
        self._is_reaped = True


def how_it_ended(returncode: int | None) -> str:
    """The end of a process as words for a sentence."""
    if returncode is None:
        return "ended"
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"


def in_thread(work: Callable[[], T], name: str = "flowstead command") -> asyncio.Future[T]:
    """Begin blocking work in a thread of its own, which no pool can keep waiting and no exit waits for.

    Raises:
        RuntimeError: There are no more threads, and nothing has begun.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            settle = partial(_settle, future, work(), None)
        except BaseException as error:
            settle = partial(_settle, future, None, error)
        try:
            loop.call_soon_threadsafe(settle)
        except RuntimeError:
            # The loop has been closed, and nobody is left to be told.
            pass

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


class Patience:
    """Waits to the end through any number of cancellations, and remembers the first."""

    def __init__(self) -> None:
        self.cancelled: asyncio.CancelledError | None = None
        self.insisted: Callable[[], object] = lambda: None
        """Called when a cancellation comes that no shield keeps out, as those of `asyncio.run` at its end."""

    async def wait(self, future: asyncio.Future[T]) -> T:
        """Wait until it is done. Cancelling is remembered, and does not cancel what is awaited."""
        while not future.done():
            try:
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([future])
            except asyncio.CancelledError as error:
                self.cancelled = self.cancelled or error
                self.insisted()
        return future.result()


def _wait_without_reaping(pid: int) -> None:
    """Block until a child of ours has ended, and leave it as it is. For systems without process handles."""
    try:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        elif sys.platform == "darwin":  # pragma: no cover - macOS before Python 3.13
            queue = select.kqueue()
            event = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            queue.control([event], 1)
            queue.close()
    except (ChildProcessError, ProcessLookupError):
        pass
