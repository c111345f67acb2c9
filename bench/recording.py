"""Rows for the ceiling: what the runtime writes for one flow is recorded once and stamped with other keys.

So the ceiling writes exactly the rows ours writes, with documents of the same size, and makes none of them.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from flowstead import Limits, Registry, Runtime, open_runtime
from flowstead.notifiers.port import Notifier
from flowstead.store.codec import EventRow, FlowRow, FlowWrite, TaskRow
from flowstead.store.sqlite import SqliteStore


class RecordingStore(SqliteStore):
    """A store that keeps every write it has committed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, durability="normal")
        self.writes: list[FlowWrite] = []

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        self.writes.extend(writes)
        return await super().commit(writes)


def record(
    play: Callable[[Runtime], Awaitable[object]],
    registry: Registry | None = None,
    *,
    limits: Limits | None = None,
    notifier: Notifier | None = None,
) -> list[FlowWrite]:
    """The writes of a small play, in order."""

    async def run(path: Path) -> list[FlowWrite]:
        store = RecordingStore(path)
        async with open_runtime(
            store, registry=registry, limits=limits, notifier=notifier
        ) as runtime:
            await play(runtime)
        return store.writes

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder, "record.db")))


def stamp(
    write: FlowWrite, flow_key: int, flow_id: str, task_key: int = 0, task_id: str = ""
) -> FlowWrite:
    """The write of another flow, and of its one child."""
    flow = write.flow
    return FlowWrite(
        None if flow is None else stamp_flow(flow, flow_key, flow_id),
        [stamp_task(row, task_key, task_id, flow_key, row.run_id) for row in write.tasks],
        [EventRow(flow_key, row.seq, row.doc) for row in write.events],
    )


def stamp_flow(row: FlowRow, key: int, flow_id: str) -> FlowRow:
    """The row of another flow."""
    return FlowRow(key, row.owner_key, flow_id, *row[3:])


def stamp_task(row: TaskRow, key: int, task_id: str, flow_key: int, run_id: str | None) -> TaskRow:
    """The row of another child."""
    return TaskRow(key, task_id, flow_key, run_id, *row[4:])
