"""Work done in a process of its own: a module is run, and says what it found as one line of JSON."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec


def start(module: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a module; its first line of output is read by `answer_of`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def answer_of(process: subprocess.Popen[bytes]) -> Any:
    """The line of JSON, as soon as it is there.

    Raises:
        RuntimeError: The process ended without one; what it complained of is on stderr.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a measuring process ended early, with status {process.wait()}")
    return msgspec.json.decode(line)


def say(found: dict[str, float]) -> None:
    """Answer the process that waits."""
    print(msgspec.json.encode(found).decode(), flush=True)


def resident_bytes() -> int:
    """Resident memory of this process, once what is free has been given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
