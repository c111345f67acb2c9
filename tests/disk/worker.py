"""`python -m tests.disk.worker`: the parent of processes that are killed by their own disk."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported by anyio on first use, which would be in each process anew.
import anyio._backends._asyncio  # noqa: F401

from flowstead.store import sqlite
from tests.crash.harness import ROOT, Child, Journal, Zygote, serve
from tests.disk.load import SMALL, Ack, NotedStore, live
from tests.disk.vfs import Disk


class DiskZygote(Zygote):
    """The parent that forks the scenes below."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.disk.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._children: list[Child] = []


def one_insert(journal: Journal, *, path: str, fault: dict[str, Any]) -> None:
    """Commit one row, in plain SQLite, on a disk with a fault in its log."""
    with Disk() as disk:
        connection = disk.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE t (x)")
        journal.write(size=Path(path + "-wal").stat().st_size)
        disk.fail(fault.pop("kind"), "wal", **fault)
        connection.execute("INSERT INTO t VALUES (1)")


def small_load(
    journal: Journal, *, path: str, seed: int, rounds: int, width: int, fault: dict[str, Any]
) -> None:
    """Put a store under a small load, on a disk with a fault; tell what was acknowledged."""
    for name, value in SMALL.items():
        setattr(sqlite, name, value)

    def arm(disk: Disk, store: NotedStore) -> None:
        if not disk.operations:
            disk.fail(**fault)
            # The page cache outlives the process, so its death can be studied without waiting for the platter.
            disk.fail("sync", lie=True)

    def tell(ack: Ack) -> None:
        journal.write(ack=ack)

    asyncio.run(live(Path(path), seed, rounds=rounds, width=width, prepare=arm, tell=tell))


SCENES: dict[str, Callable[..., None]] = {"one_insert": one_insert, "small_load": small_load}

if __name__ == "__main__":
    logging.getLogger("flowstead").addHandler(logging.NullHandler())
    serve(SCENES)
