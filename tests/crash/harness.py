"""Real processes on demand: a parent that has imported everything and forks, and the journals its children write.

The parent is forked from before any event loop, thread or connection exists in it, so each child starts from
scratch in a few milliseconds. A child tells what it does in a journal, one line per fact, written by the
kernel before the child goes on; killing the child loses none of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


class Journal:
    """What a process says of itself. Each line is with the kernel when `write` returns."""

    def __init__(self, path: Path | str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)

    def write(self, **fact: Any) -> None:
        os.write(self._descriptor, json.dumps(fact).encode() + b"\n")


def read_journal(path: Path | str) -> list[dict[str, Any]]:
    """The facts of a journal; a last line cut off by a kill does not count."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def until(condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Wait for a condition to hold, and answer what it answered.

    Raises:
        AssertionError: It does not come to hold in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.002)
    return found


class Child:
    """One forked process."""

    def __init__(self, zygote: Zygote, pid: int, journal: Path) -> None:
        self.zygote = zygote
        self.pid = pid
        self.journal = journal
        self.status: int | None = None

    def says(self, key: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """The first fact with this key, as soon as it is told."""

        def told() -> dict[str, Any] | None:
            for fact in self.facts():
                assert "crash" not in fact, f"the process failed:\n{fact['crash']}"
                if key in fact:
                    return fact
            return None

        return until(told, f"{key!r} in {self.facts()}", seconds)

    def facts(self) -> list[dict[str, Any]]:
        return read_journal(self.journal)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, wherever it is, and wait until it is gone."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end: the exit code, or the negative number of the signal that ended it."""
        if self.status is None:
            answer = self.zygote.ask({"do": "wait", "pid": self.pid, "seconds": seconds})
            self.status = answer["status"]
        assert self.status is not None, f"process {self.pid} did not end within {seconds} s"
        return self.status


class Zygote:
    """The parent that forks. One for each thread that uses it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._children: list[Child] = []

    def fork(self, scene: str, journal: Path, **arguments: Any) -> Child:
        """Run a scene in a process of its own."""
        spec = {"do": "fork", "scene": scene, "journal": str(journal), "arguments": arguments}
        child = Child(self, self.ask(spec)["pid"], journal)
        self._children.append(child)
        return child

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        line = stdout.readline()
        assert line, "the parent of the processes is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._children:
            child.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(PATIENCE)


# ---- inside the parent ----------------------------------------------------------------------------


def serve(scenes: dict[str, Callable[..., None]]) -> None:
    """Fork and wait as told on stdin, until it is closed."""
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "fork":
            answer = {"pid": _fork(scenes[request["scene"]], request)}
        else:
            answer = {"status": _wait(request["pid"], request["seconds"])}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _fork(scene: Callable[..., None], request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        journal = Journal(request["journal"])
        with telling(journal):
            scene(journal, **request["arguments"])
        code = 0
    finally:
        os._exit(code)


@contextmanager
def telling(journal: Journal) -> Iterator[None]:
    """Whatever goes wrong inside is told in the journal."""
    try:
        yield
    except BaseException:
        import traceback

        journal.write(crash=traceback.format_exc())
        raise


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)
