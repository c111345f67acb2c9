"""A disk that can lose power: what is written, what is synced, and what readers see, kept apart.

A commit passes four instants, and the world may end between any two of them: written to the page cache (from
here on it survives the death of the process), synced to the platter (from here on it survives a power cut),
visible to readers, answered. With `durability="normal"` syncing is put off until the next upkeep.

`SimulatedStore` is a store on such a disk, with the delays and the faults of a real one, drawn from a seed.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from random import Random
from typing import Any, Final, TypeVar

import msgspec

from flowstead.errors import CommitFailed, OutcomeUnknown, StoreInUse, StoreUnusable
from flowstead.store.codec import FlowWrite
from flowstead.store.memory import MemoryStore, MemoryTables

T = TypeVar("T")

_BUSY_SECONDS: Final = 5.0
_SLOW_SECONDS: Final = 2.0
_READS: Final = (
    "load",
    "find_flow",
    "find_by_idempotency_key",
    "list_flows",
    "key_of",
    "find_task",
    "list_tasks",
    "summarize",
    "history",
    "last_seq",
    "events_after",
    "last_position",
    "list_due",
    "next_due",
    "list_unfinished",
    "count_by_controller",
    "look_up_waits",
    "find_token",
    "list_met",
    "list_open_waits",
    "list_updates_due",
    "list_digests_due",
    "list_kept",
    "next_update_due",
    "list_updates",
    "list_unreadable",
)


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """How likely each fault of the disk is, from 0 to 1, each time it could happen.

    Attributes:
        delay: Most seconds an ordinary read or write takes.
        slow: A write takes two seconds.
        busy: A commit waits five seconds for a lock and fails; nothing is written.
        fail_before: A commit fails; nothing is written.
        fail_after: A commit is durable, but its answer says that nobody knows.
        fail_unknown: A commit is not there, and its answer says that nobody knows.
        fail_read: A read fails.
        fail_open: The store cannot be opened.
    """

    delay: float = 0.0
    slow: float = 0.0
    busy: float = 0.0
    fail_before: float = 0.0
    fail_after: float = 0.0
    fail_unknown: float = 0.0
    fail_read: float = 0.0
    fail_open: float = 0.0


CALM: Final = Faults()
STORMY: Final = Faults(
    delay=0.01, slow=0.02, busy=0.01, fail_before=0.03, fail_after=0.03, fail_unknown=0.02,
    fail_read=0.02, fail_open=0.1,
)  # fmt: skip


class Disk:
    """What outlives a process. Give it to one `SimulatedStore` after another.

    Args:
        random: Where faults and delays come from.
        durability: `full` syncs before it answers, `normal` at the next upkeep.
    """

    def __init__(self, random: Random, *, durability: str = "full", faults: Faults = CALM) -> None:
        self.random = random
        self.durability = durability
        self.faults = faults
        self.platter = MemoryTables()
        self.written = MemoryTables()
        self.visible = MemoryTables()
        self.unsynced: list[Sequence[FlowWrite]] = []
        self.hidden: list[Sequence[FlowWrite]] = []
        self.is_committing = False
        self.fired: Counter[str] = Counter()
        """How often each fault has happened."""
        self.commits = 0
        self.on_commit: Callable[[str, Sequence[FlowWrite]], object] = lambda stage, writes: None
        """Told of every stage of every commit: written, synced, visible."""

    def strikes(self, name: str) -> bool:
        """Whether a fault happens now."""
        likely: float = getattr(self.faults, name)
        # Nothing is drawn for what cannot happen, so that a calm disk leaves the seed alone.
        if likely and self.random.random() < likely:
            self.fired[name] += 1
            return True
        return False

    def kill(self) -> None:
        """The process dies: what is in the page cache is still there."""
        self.reveal()
        self.free()

    def cut_power(self) -> None:
        """The machine dies: of what was not synced a prefix survives, perhaps none of it."""
        kept = self.random.randint(0, len(self.unsynced))
        self.fired["commits lost"] += len(self.unsynced) - kept
        for writes in self.unsynced[:kept]:
            _apply(self.platter, writes)
        self.unsynced.clear()
        self.hidden.clear()
        self.written, self.visible = _copy(self.platter), _copy(self.platter)
        self.free()

    def free(self) -> None:
        """Nobody owns the disk any more, nor is writing to it."""
        self.is_committing = False
        for tables in (self.platter, self.written, self.visible):
            tables.owner = None

    def sync(self) -> None:
        """What was written reaches the platter."""
        for writes in self.unsynced:
            _apply(self.platter, writes)
        self.unsynced.clear()

    def reveal(self) -> None:
        """What was written becomes visible."""
        for writes in self.hidden:
            _apply(self.visible, writes)
        self.hidden.clear()

    def take(self, *, takeover: bool, owner: object) -> int:
        """Make somebody the owner, durably, and answer the epoch."""
        if self.written.owner is not None and not takeover:
            raise StoreInUse("simulated disk", "another simulated runtime")
        self.sync()
        for tables in (self.platter, self.written, self.visible):
            tables.epoch += 1
            tables.owner = owner
        return self.written.epoch


class SimulatedStore(MemoryStore):
    """A store on a simulated disk, for one simulated process."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk.visible)
        self.disk = disk

    @property
    def name(self) -> str:
        return "simulated disk"

    async def open(self, *, takeover: bool = False) -> None:
        await self._pause()
        if self.disk.strikes("fail_open"):
            raise StoreUnusable(self.name, "it could not be opened just now.")
        while self.disk.is_committing and takeover:
            await self._pause()
        self._epoch = self.disk.take(takeover=takeover, owner=self)
        written = self.disk.written
        rows = (written.flows, written.tasks, written.signals, written.updates)
        self._key = max(max(table, default=0) for table in rows)
        try:
            await self._pause()
        except asyncio.CancelledError:
            # Whoever was cancelled holds nothing, and could not let go.
            await self.aclose()
            raise

    async def aclose(self) -> None:
        self._epoch = 0
        if self.disk.written.owner is self:
            self.disk.sync()
            self.disk.free()

    def next_key(self) -> int:
        self._key += 1
        return self._key

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        """Accepted commits go on when the caller is cancelled, as they do on a worker's thread."""
        committing = asyncio.ensure_future(self._commit(writes))
        return await asyncio.shield(committing)

    async def _commit(self, writes: Sequence[FlowWrite]) -> int:
        disk = self.disk
        await self._pause()
        if disk.strikes("slow"):
            await asyncio.sleep(_SLOW_SECONDS)
        if disk.strikes("busy"):
            await asyncio.sleep(_BUSY_SECONDS)
            raise CommitFailed(f"{self.name} is locked. Nothing was written.")
        if disk.strikes("fail_before"):
            raise CommitFailed(f"{self.name} is full. Nothing was written.")
        if disk.strikes("fail_unknown"):
            raise OutcomeUnknown(f"{self.name} failed during a commit and cannot be asked.")
        self._check()
        position = _apply(disk.written, writes)
        disk.is_committing = True
        disk.unsynced.append(writes)
        disk.hidden.append(writes)
        disk.on_commit("written", writes)
        if disk.durability == "full":
            await self._pause()
            disk.sync()
            disk.on_commit("synced", writes)
        await self._pause()
        disk.reveal()
        disk.is_committing = False
        disk.commits += 1
        disk.on_commit("visible", writes)
        await self._pause()
        if disk.strikes("fail_after"):
            raise OutcomeUnknown(f"{self.name} failed during a commit and cannot be asked.")
        return position

    def _check(self) -> None:
        if self._epoch == 0:
            raise CommitFailed(f"{self.name} is closed. Nothing was written.")
        if self.disk.written.epoch != self._epoch:
            raise StoreInUse(self.name, "another runtime, which took it over")

    async def upkeep(self, *, idle: bool) -> None:
        if self.disk.unsynced and (idle or self.disk.random.random() < 0.1):
            await self._pause()
            if self._epoch == self.disk.written.epoch:
                self.disk.sync()

    async def _pause(self) -> None:
        """One round trip to the disk."""
        delay = self.disk.faults.delay
        await asyncio.sleep(self.disk.random.uniform(0, delay) if delay else 0)


def _delayed(read: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    @functools.wraps(read)
    async def delayed(self: SimulatedStore, *args: Any, **kwargs: Any) -> T:
        await self._pause()
        if self.disk.strikes("fail_read"):
            raise StoreUnusable(self.name, "a read failed.")
        found = await read(self, *args, **kwargs)
        await self._pause()
        return found

    return delayed


for _name in _READS:
    setattr(SimulatedStore, _name, _delayed(getattr(MemoryStore, _name)))


def _apply(tables: MemoryTables, writes: Sequence[FlowWrite]) -> int:
    """Write a batch to one set of tables, whole or not at all."""
    store = MemoryStore(tables)
    store._epoch = tables.epoch
    return store.write(writes)


def _copy(tables: MemoryTables) -> MemoryTables:
    copied = copy(tables)
    for name, value in vars(tables).items():
        if isinstance(value, dict):
            setattr(copied, name, {key: _own(row) for key, row in value.items()})
    return copied


def _own(row: object) -> object:
    return row.copy() if isinstance(row, dict) else row
