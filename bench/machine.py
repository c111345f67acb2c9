"""The facts a reader needs to compare these numbers with others."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path


def facts(folder: Path) -> str:
    """Interpreter, SQLite, cores, and what one durable append costs where the files are."""
    p50 = durable_append_seconds(folder) * 1000
    return (
        f"Python {platform.python_version()} · SQLite {sqlite3.sqlite_version} ·"
        f" {len(os.sched_getaffinity(0))} cores · {platform.system()} {platform.machine()} ·"
        f" load {os.getloadavg()[0]:.1f}\n"
        f"append 4 KiB + fdatasync: p50 {p50:.3f} ms, so at most {1000 / p50:,.0f} lone commits/s"
    )


def durable_append_seconds(folder: Path, times: int = 300) -> float:
    """The median of appending 4 KiB to a plain file and flushing it to the disk."""
    block, taken = b"x" * 4096, []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(times):
            start = time.perf_counter()
            file.write(block)
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)
