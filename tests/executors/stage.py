"""The stage of the executor tests: a context that only listens, a call, and a look at the machine's processes."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import anyio
import psutil

from flowstead import TaskContext
from flowstead.executors import Call

_numbers = itertools.count()


class Context:
    """What an executor needs of a `TaskContext`; what is said to it is kept."""

    def __init__(self, task_id: str | None = None, attempt: int = 1) -> None:
        self.flow_id = "flow"
        self.task_id = task_id or f"task-{os.getpid()}-{next(_numbers)}"
        self.run_id = "step"
        self.attempt = attempt
        self.deadline = 12345
        self.said: list[str | None] = []

    async def progress(self, summary: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.said.append(summary)

    async def heartbeat(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.said.append(None)


class Attempt:
    """One call, with everything its executor does through it."""

    def __init__(
        self, *, task_id: str | None = None, attempt: int = 1, touch: Any = None, **given: Any
    ) -> None:
        self.context = Context(task_id, attempt)
        self.alive = asyncio.Event()
        self.touches = 0
        self.kills: list[Callable[[], object]] = []
        self.call = Call(
            context=cast(TaskContext, self.context),
            touch=self._touch,
            on_kill=self.kills.append,
            **{"input": None, **given},
        )

    def _touch(self) -> None:
        self.touches += 1
        self.alive.set()

    def kill(self) -> None:
        """What the kill rung does."""
        assert self.kills, "vacuous: there was nothing to kill"
        for kill in self.kills:
            kill()


def python(code: str, *args: str) -> list[str]:
    """The arguments of a program in Python."""
    return [sys.executable, "-S", "-c", code, *args]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def zombies() -> list[int]:
    """Our own children that nobody has reaped."""
    found = psutil.Process().children()
    return [child.pid for child in found if not is_alive(child.pid)]


async def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait for another process to get there."""
    with anyio.fail_after(60):
        while not is_so():  # noqa: ASYNC110 - another process gives no event
            await anyio.sleep(0.005)
    assert is_so(), what


async def outcome(work: Awaitable[Any]) -> Any:
    """What comes of it: its value, or what it raised, whatever that is."""
    try:
        return await work
    except BaseException as error:
        return error


class Host:
    """A process of its own that runs `tests.executors.host`, to be killed."""

    def __init__(self, scene: str, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.executors.host", scene, *args],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        """The next line it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "vacuous: the host ended without a word"
        return line.strip()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
