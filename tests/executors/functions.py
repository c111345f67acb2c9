"""Functions for worker processes, which find them here by their names."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

from flowstead.executors import TaskInfo


class Told(Exception):
    """An exception that can be taken apart and put together again."""


class Stubborn(Exception):
    """An exception that cannot: it is made of more than it keeps."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def echo(info: TaskInfo, given: Any) -> Any:
    return [info.flow_id, info.task_id, info.run_id, info.attempt, info.deadline, given]


def pid(info: TaskInfo, given: Any) -> int:
    return os.getpid()


def raises(info: TaskInfo, kind: str) -> None:
    made: dict[str, Any] = {
        "Told": lambda: Told("so", 7),
        "Stubborn": lambda: Stubborn(1, 2),
        "SystemExit": lambda: SystemExit(3),
        "KeyboardInterrupt": KeyboardInterrupt,
        "local": lambda: type("Local", (Exception,), {})("only here"),
    }
    raise made[kind]()


def dies(info: TaskInfo, how: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if how == "exit":
        os._exit(7)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)


def answers_with_a_lock(info: TaskInfo, given: Any) -> Any:
    return threading.Lock()


def spins(info: TaskInfo, path: str) -> None:
    """Say who we are in a file, and be busy for ever."""
    said = Path(path + ".new")
    said.write_text(str(os.getpid()))
    said.rename(path)
    while True:
        pass


def interrupts_itself(info: TaskInfo, given: Any) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    return "went on"


class Holder:
    def method(self, info: TaskInfo, given: Any) -> None: ...


async def is_async(info: TaskInfo, given: Any) -> None: ...


def decorated(info: TaskInfo, given: Any) -> None: ...


original = decorated


def decorated(info: TaskInfo, given: Any) -> None:  # type: ignore[no-redef]
    original(info, given)
