"""`python -m tests.executors.host SCENE ARGS`: a process with an executor at work, for somebody to kill."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import psutil

from flowstead.executors import Command, CommandExecutor, ProcessExecutor
from tests.executors import functions
from tests.executors.stage import Attempt, python, zombies

LIVES_ON = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    pass                                        # the leader
elif not os.fork():
    os.setsid()                                 # a daemon
    if os.fork():
        os._exit(0)
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
signal.pause()
"""
"""A leader, a child in its group and a daemon, each of which writes down its number and stays."""

DAEMONS = """
import os, signal
heard, said = os.pipe()
def stay():
    print(os.getpid(), flush=True)
    os.write(said, b"x")
    while True: signal.pause()
for _ in range(3):
    if not os.fork():
        os.setsid()
        if not os.fork(): stay()
        os._exit(0)
    os.wait()
if not os.fork():
    if not os.fork(): os._exit(0)               # dead before anybody waits for it
    stay()
for _ in range(4): os.read(heard, 1)
"""


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


async def command(task_id: str, path: str) -> None:
    """Run a program that leaves more than itself behind."""
    attempt = Attempt(task_id=task_id, spec=Command(python(LIVES_ON, path)))
    await CommandExecutor().run(attempt.call)


async def workers(busy: str) -> None:
    """Have one worker that is idle and one that is busy."""
    executor = ProcessExecutor(2)
    idle = Attempt(function=functions.pid)
    working = Attempt(function=functions.spins, input=busy)
    task = asyncio.create_task(executor.run(working.call))
    say(await executor.run(idle.call))
    await task


async def inherits() -> None:
    """Be the one who inherits orphans, as the first process of a container is, and look who is left."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    attempt = Attempt(spec=Command(python(DAEMONS), stdin=None, result="lines"))
    pids = await CommandExecutor().run(attempt.call)
    say(len(pids), [pid for pid in pids if psutil.pid_exists(int(pid))], zombies())


SCENES: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "command": command,
    "workers": workers,
    "inherits": inherits,
}

if __name__ == "__main__":
    asyncio.run(SCENES[sys.argv[1]](*sys.argv[2:]))
