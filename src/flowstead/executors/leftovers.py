"""What a program leaves behind: processes that still run when their leader has gone, or when we ourselves had.

A program is started as the leader of a session of its own, with a mark in its environment that its descendants
inherit. What stays in the session is found by the session's number, which the kernel gives to nobody else while
the leader is not reaped. What leaves the session (a daemon) is found by the mark, on Linux. Only a process that
does both, leaves the session and clears its environment, gets away.

Where there is no /proc in the manner of Linux, the process group is all that can be reached.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Final, NamedTuple

TASK_MARK: Final = "FLOWSTEAD_TASK_ID"
ATTEMPT_MARK: Final = "FLOWSTEAD_ATTEMPT"

_PROC: Final = "/proc"
_KERNEL_THREAD: Final = 0x00200000
_PAUSES: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.03, 0.1, 0.1, 0.1, 0.1)
_DOUBTS: Final = 3


class Seen(NamedTuple):
    """One process as it was seen; `started` tells it from a later one of the same number."""

    pid: int
    started: int
    parent: int
    session: int
    is_zombie: bool


def find_leftovers(task_id: str) -> list[int]:
    """The processes that any attempt of a child has left behind on this machine; [] where there is no telling."""
    return sorted(seen.pid for seen in Hunt(task_id).find())


def end_leftovers(task_id: str) -> list[int]:
    """Kill the processes that any attempt of a child has left behind, and answer which they were.

    Blocks until they are gone, or until it is clear that some will not go: call it in a thread.
    """
    hunt = Hunt(task_id)
    for _ in range(10):
        if hunt.pursue():
            break
    return sorted(hunt.ended)


class Hunt:
    """The search for what is left, and its end. One thread at a time.

    Args:
        task_id: The child whose processes are sought.
        attempt: Only those of this attempt; None for any.
        leader: The leader of the program, gone but not reaped, which keeps its number from being used again.

    Attributes:
        ended: The processes killed, and when each had started.
        refused: Those that may not be killed by us; they are given up.
    """

    def __init__(
        self, task_id: str, *, attempt: int | None = None, leader: Seen | None = None
    ) -> None:
        self._marks = [_mark(TASK_MARK, task_id)]
        if attempt is not None:
            self._marks.append(_mark(ATTEMPT_MARK, str(attempt)))
        self._leader = leader
        self._may_sweep = leader is not None
        self._doubts = 0
        self.ended: dict[int, int] = {}
        self.refused: set[int] = set()

    def linger(self) -> None:
        """Give those who have been asked to end a tenth of a second to do so."""
        for pause in _PAUSES[:7]:
            if not self.find():
                return
            threading.Event().wait(pause)

    def pursue(self) -> bool:
        """Kill what is left until nothing is, for half a second at most; answers whether nothing is."""
        for pause in _PAUSES:
            if self.round():
                return True
            threading.Event().wait(pause)
        return False

    def is_group_gone(self) -> bool:
        """Whether the group is empty, once the leader is reaped; nobody in it can fork any more.

        It has had its signal, and will not be sent another: an empty group's number can be given to others.
        """
        assert self._leader is not None
        self._may_sweep = False
        return not signal_group(self._leader.pid, 0)

    def round(self) -> bool:
        """Kill what is left, once; answers whether nothing was."""
        seen = list(_processes())
        found, is_sure = self._sort(seen)
        for process in found:
            self._kill(process)
        if self._leader is not None and self._may_sweep:
            # Seen or not: one signal reaches the whole group, and no member can fork its way past it.
            signal_group(self._leader.pid, signal.SIGKILL)
        self._reap(seen)
        if any(process.pid not in self.refused for process in found):
            return False
        # A process in the middle of an exec shows no environment for a moment.
        self._doubts += not is_sure
        return is_sure or self._doubts > _DOUBTS

    def find(self) -> list[Seen]:
        """What is left and alive."""
        return self._sort(list(_processes()))[0]

    def _sort(self, seen: list[Seen]) -> tuple[list[Seen], bool]:
        """Those of the processes that are ours and alive, and whether we could tell of all."""
        ours, doubtful = {}, False
        me = os.getpid()
        for process in seen:
            if process.is_zombie or process.pid == me:
                continue
            verdict = self._is_ours(process)
            doubtful |= verdict is None
            if verdict:
                ours[process.pid] = process
        if self._leader is None:
            # A leader that is ours vouches for its session, also for those who cleared their environment.
            for process in seen:
                if process.session in ours and not process.is_zombie and process.pid != me:
                    ours[process.pid] = process
        return list(ours.values()), not doubtful

    def _is_ours(self, process: Seen) -> bool | None:
        """Whether a process belongs to the program; None if it cannot be told just now."""
        if self.ended.get(process.pid) == process.started:
            # Killed, but not gone yet: on its way out it has no environment any more.
            return True
        if self._leader is not None:
            if process.session == self._leader.pid:
                return True
            if process.started < self._leader.started:
                return False
        environment = _environment(process.pid)
        if environment == b"":
            return None
        return environment is not None and all(mark in environment for mark in self._marks)

    def _kill(self, process: Seen) -> None:
        try:
            if kill_exactly(process):
                self.ended[process.pid] = process.started
        except PermissionError:
            self.refused.add(process.pid)

    def _reap(self, seen: list[Seen]) -> None:
        """Reap those that became our own children when their parents died, as under an init or subreaper."""
        me = os.getpid()
        for process in seen:
            if not process.is_zombie or process.parent != me:
                continue
            is_leader = self._leader is not None and process.pid == self._leader.pid
            in_session = self._leader is not None and process.session == self._leader.pid
            if not is_leader and (in_session or self.ended.get(process.pid) == process.started):
                reap(process.pid)


def look_at(pid: int) -> Seen | None:
    """A process as it is now; None if there is none, or no telling."""
    if sys.platform != "linux":
        return None
    try:
        with open(f"{_PROC}/{pid}/stat", "rb", buffering=0) as file:
            line = file.read()
    except OSError:
        return None
    # The name of the program comes first, in brackets, and may itself hold brackets and blanks.
    fields = line[line.rindex(b")") + 2 :].split()
    if int(fields[6]) & _KERNEL_THREAD:
        return None
    return Seen(
        pid=pid,
        started=int(fields[19]),
        parent=int(fields[1]),
        session=int(fields[3]),
        is_zombie=fields[0] in (b"Z", b"X"),
    )


def kill_exactly(process: Seen) -> bool:
    """Kill this process and no later one of its number; answers whether it was there.

    Raises:
        PermissionError: It is not ours to kill.
    """
    handle = open_handle(process.pid)
    try:
        # Looked at after the handle was opened: if it is the one now, the handle is its.
        now = look_at(process.pid)
        if now is None or now.started != process.started:
            return False
        if handle is None or sys.platform != "linux":
            os.kill(process.pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


def open_handle(pid: int) -> int | None:
    """A file descriptor that stands for a process and is readable once it has ended; None if there are none."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def signal_group(group: int, number: int) -> bool:
    """Signal a process group; answers whether anybody is in it who may be signalled by us."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def wait_until_gone(group: int) -> None:
    """Wait until nobody is left in a killed group whose leader is reaped, half a second at most.

    No longer, since it cannot be told whether who is left only waits for somebody else to reap it.
    """
    for pause in _PAUSES:
        try:
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if not signal_group(group, 0):
            return
        threading.Event().wait(pause)


def reap(pid: int) -> int | None:
    """Take note of the end of a child of ours and answer its status; None if it is not to be had."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if ended == pid else None


def _mark(name: str, value: str) -> bytes:
    return b"\0" + f"{name}={value}".encode() + b"\0"


def _processes() -> Iterator[Seen]:
    if sys.platform != "linux":
        return
    try:
        names = os.listdir(_PROC)
    except OSError:
        return
    for name in names:
        if name.isdecimal() and (seen := look_at(int(name))) is not None:
            yield seen


def _environment(pid: int) -> bytes | None:
    """A process's environment as it was when its program began; None if it is not for us to see."""
    try:
        with open(f"{_PROC}/{pid}/environ", "rb", buffering=0) as file:
            parts = list(iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return None
    return b"\0" + b"".join(parts) + b"\0" if parts else b""
