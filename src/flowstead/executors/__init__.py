"""Where the code of children runs: in the loop, in a thread, in another process, as a program. One port for all.

An executor is given one attempt (`Call`) and answers with its result, or raises. It returns only once its work is
really gone, however often it is cancelled; that is the whole of what the runtime builds upon.
"""

from __future__ import annotations

from flowstead.executors.code import CodeExecutor, SyncContext
from flowstead.executors.command import (
    BadOutput,
    Command,
    CommandError,
    CommandExecutor,
    CommandFailed,
    CommandNotStarted,
    OutputTooLarge,
)
from flowstead.executors.leftovers import end_leftovers, find_leftovers
from flowstead.executors.plugins import Executors, ExecutorUnusable
from flowstead.executors.port import Call, Executor
from flowstead.executors.process import (
    Process,
    ProcessExecutor,
    RaisedInWorker,
    TaskInfo,
    WorkerDied,
    WorkerUnusable,
)

__all__ = [
    "BadOutput",
    "Call",
    "CodeExecutor",
    "Command",
    "CommandError",
    "CommandExecutor",
    "CommandFailed",
    "CommandNotStarted",
    "Executor",
    "ExecutorUnusable",
    "Executors",
    "OutputTooLarge",
    "Process",
    "ProcessExecutor",
    "RaisedInWorker",
    "SyncContext",
    "TaskInfo",
    "WorkerDied",
    "WorkerUnusable",
    "end_leftovers",
    "find_leftovers",
]
