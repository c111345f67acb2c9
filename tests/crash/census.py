"""Who is alive: the processes that carry the mark of a child, asked of the kernel and of nobody else."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from flowstead import Command

_MARK = "FLOWSTEAD_TASK_ID"
_PROGRAM = str(Path(__file__).with_name("program.py"))


class Mark(NamedTuple):
    """What a program told when it began."""

    child: str
    attempt: int
    pid: int
    parent: int
    is_alone: bool


def program(folder: Path | str, seconds: float, *words: str) -> Command:
    """A Command that runs `program.py` for so long, as quickly as an interpreter can be started."""
    return Command([sys.executable, "-I", "-S", _PROGRAM, str(folder), str(seconds), *words])


def marks_in(folder: Path | str) -> list[Mark]:
    """What the programs have told in this folder, in the order in which they began."""
    try:
        told = Path(folder, "marks").read_text()
    except FileNotFoundError:
        return []
    found = []
    for line in told.splitlines():
        child, attempt, pid, parent, alone = line.split()
        found.append(Mark(child, int(attempt), int(pid), int(parent), alone == "alone"))
    return found


def end_programs(folder: Path | str) -> None:
    """End whatever a test that went wrong has left alive of the programs of this folder."""
    ours = {mark.child for mark in marks_in(folder)}
    for pid, child in alive_programs().items():
        if child in ours:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def alive_programs() -> dict[int, str]:
    """The number of each living process that carries a child's mark, and the child."""
    alive: dict[int, str] = {}
    for process in psutil.process_iter():
        try:
            child = process.environ().get(_MARK)
            if child is not None and process.status() != psutil.STATUS_ZOMBIE:
                alive[process.pid] = child
        except (psutil.Error, OSError):
            # It has gone meanwhile, or is none of ours.
            continue
    return alive
