"""The real SQLite store in a simulated world: each process finds the files as the last one left them."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowstead.store.sqlite import Durability, SqliteStore
from flowstead.testing.process import SimulatedWorker


class SqliteFiles:
    """Pass it as `Simulation(store=...)`; `path` is the file of the newest process.

    A process that dies leaves its files as they are, log and all. Closing its connections would fold the log
    back, so the next process gets a copy taken before that.

    Args:
        directory: An empty directory of the simulation's own.
        connect: How connections are made, for failing disks.
    """

    def __init__(
        self,
        directory: Path,
        *,
        durability: Durability = "full",
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
    ) -> None:
        self._directory = directory
        self._durability = durability
        self._connect = connect
        self._connections: list[sqlite3.Connection] = []
        self._processes = 0

    @property
    def path(self) -> Path:
        return self._directory / str(self._processes) / "flows.db"

    def __call__(self) -> SqliteStore:
        """The store of the next process."""
        left = self.path
        self._processes += 1
        self.path.parent.mkdir()
        for name in ("flows.db", "flows.db-wal"):
            if (file := left.with_name(name)).exists():
                shutil.copyfile(file, self.path.with_name(name))
        self.close()
        return SqliteStore(
            self.path,
            durability=self._durability,
            connect=self._connect_noted,
            worker=SimulatedWorker,
        )

    def close(self) -> None:
        """Let go of what dead processes had open."""
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    def _connect_noted(self, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = self._connect(*args, **kwargs)
        self._connections.append(connection)
        return connection
