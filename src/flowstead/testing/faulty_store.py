"""A store that fails on request.

`FaultyStore` passes everything on to a real store, and is one to the runtime: `open_runtime(FaultyStore())`. A test
may hold its commits at a gate, let the next ones fail, with or without having written, and let reads fail. It
counts what went through.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from typing import Final

from flowstead.model.event import Event
from flowstead.model.flow import Flow, FlowKey, StoredFlow
from flowstead.model.task import StoredTask, Task, TaskSummary
from flowstead.model.update import StoredUpdate, Update
from flowstead.store.codec import FlowWrite
from flowstead.store.memory import MemoryStore, MemoryTables
from flowstead.store.port import (
    Due,
    FlowQuery,
    Scope,
    Snapshot,
    Store,
    Unreadable,
    WaitLookup,
    WaitsFound,
)


class FaultyStore:
    """A store with a gate before its commits and faults waiting to happen. Reads pass unless told to fail.

    Args:
        inner: The store that does the work; one in memory unless given.
        tables: What a store in memory keeps its rows in, to play several owners of one database.
    """

    def __init__(self, inner: Store | None = None, *, tables: MemoryTables | None = None) -> None:
        self.inner: Store = MemoryStore(tables) if inner is None else inner
        self.batches: list[int] = []
        """How many writes each commit had that went through."""
        self.attempts = 0
        """How many commits were tried."""
        self.upkeeps = 0
        """How often upkeep was asked for."""
        self._commit_faults: deque[tuple[Exception, bool]] = deque()
        self._read_faults: defaultdict[str, deque[Exception]] = defaultdict(deque)
        self._gate = asyncio.Event()
        self._gate.set()
        self._reached = asyncio.Event()

    @property
    def tables(self) -> MemoryTables:
        """The rows, where the store that does the work is one in memory."""
        assert isinstance(self.inner, MemoryStore), f"{self.inner.name} is not a store in memory"
        return self.inner.tables

    # ---- what a test asks for ---------------------------------------------------------------------

    def hold(self) -> None:
        """Let commits wait, before anything is written, until `release`."""
        self._reached.clear()
        self._gate.clear()

    def release(self) -> None:
        """Let held commits go on."""
        self._gate.set()

    async def wait_held(self) -> None:
        """Return once a commit waits at the gate."""
        await self._reached.wait()

    def fail_commits(self, error: Exception, *, times: int = 1, written: bool = False) -> None:
        """Let the next commits raise.

        Args:
            error: What they raise: `CommitFailed`, `WriteConflict`, `OutcomeUnknown`, `StoreInUse`.
            times: How many of them.
            written: Whether their rows are kept all the same, as when a disk fails after COMMIT.
        """
        self._commit_faults.extend([(error, written)] * times)

    def fail_reads(self, name: str, error: Exception, *, times: int = 1) -> None:
        """Let the next calls of one verb raise, before anything is read.

        Args:
            name: Any verb of the port that is waited for, but `commit`: `load`, `history`, also `open` or `upkeep`.
            error: What they raise.
            times: How many of them.
        """
        if name not in _VERBS:
            raise ValueError(f"a store has no verb {name!r} that can fail; it has {sorted(_VERBS)}")
        self._read_faults[name].extend([error] * times)

    def heal(self) -> None:
        """Forget every fault that has not happened yet."""
        self._commit_faults.clear()
        self._read_faults.clear()

    def _fail_if_told(self, name: str) -> None:
        if faults := self._read_faults[name]:
            raise faults.popleft()

    # ---- the port ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.inner.name

    async def open(self, *, takeover: bool = False) -> None:
        self._fail_if_told("open")
        await self.inner.open(takeover=takeover)

    async def aclose(self) -> None:
        self._fail_if_told("aclose")
        await self.inner.aclose()

    def next_key(self) -> int:
        return self.inner.next_key()

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        self.attempts += 1
        if not self._gate.is_set():
            self._reached.set()
            await self._gate.wait()
        if self._commit_faults:
            error, written = self._commit_faults.popleft()
            if written:
                await self.inner.commit(writes)
            raise error
        position = await self.inner.commit(writes)
        self.batches.append(len(writes))
        return position

    async def upkeep(self, *, idle: bool) -> None:
        self.upkeeps += 1
        self._fail_if_told("upkeep")
        await self.inner.upkeep(idle=idle)

    async def load(self, keys: Sequence[FlowKey]) -> list[Snapshot | Exception | None]:
        self._fail_if_told("load")
        return await self.inner.load(keys)

    async def find_flow(self, scope: Scope, flow_id: str) -> Flow | None:
        self._fail_if_told("find_flow")
        return await self.inner.find_flow(scope, flow_id)

    async def find_by_idempotency_key(self, owner_key: str, key: str) -> FlowKey | None:
        self._fail_if_told("find_by_idempotency_key")
        return await self.inner.find_by_idempotency_key(owner_key, key)

    async def list_flows(self, scope: Scope, query: FlowQuery, limit: int) -> list[Flow]:
        self._fail_if_told("list_flows")
        return await self.inner.list_flows(scope, query, limit)

    async def key_of(self, scope: Scope, flow_id: str) -> int | None:
        self._fail_if_told("key_of")
        return await self.inner.key_of(scope, flow_id)

    async def find_task(self, scope: Scope, task_id: str) -> tuple[FlowKey, Task] | None:
        self._fail_if_told("find_task")
        return await self.inner.find_task(scope, task_id)

    async def list_tasks(
        self,
        scope: Scope,
        flow_id: str,
        *,
        statuses: Collection[str] = (),
        task_ids: Collection[str] | None = None,
    ) -> list[Task]:
        self._fail_if_told("list_tasks")
        return await self.inner.list_tasks(scope, flow_id, statuses=statuses, task_ids=task_ids)

    async def summarize(self, scope: Scope, flow_id: str) -> TaskSummary | None:
        self._fail_if_told("summarize")
        return await self.inner.summarize(scope, flow_id)

    async def history(
        self, scope: Scope, flow_id: str, *, after_seq: int, limit: int
    ) -> list[Event]:
        self._fail_if_told("history")
        return await self.inner.history(scope, flow_id, after_seq=after_seq, limit=limit)

    async def last_seq(self, scope: Scope, flow_id: str) -> int:
        self._fail_if_told("last_seq")
        return await self.inner.last_seq(scope, flow_id)

    async def events_after(self, scope: Scope, position: int, limit: int) -> list[Event]:
        self._fail_if_told("events_after")
        return await self.inner.events_after(scope, position, limit)

    async def last_position(self) -> int:
        self._fail_if_told("last_position")
        return await self.inner.last_position()

    async def list_due(self, *, after: int, until: int) -> list[Due]:
        self._fail_if_told("list_due")
        return await self.inner.list_due(after=after, until=until)

    async def next_due(self, *, after: int) -> int | None:
        self._fail_if_told("next_due")
        return await self.inner.next_due(after=after)

    async def list_unfinished(
        self, controllers: Collection[str], *, after_key: int, limit: int
    ) -> list[tuple[int, FlowKey]]:
        self._fail_if_told("list_unfinished")
        return await self.inner.list_unfinished(controllers, after_key=after_key, limit=limit)

    async def count_by_controller(self) -> dict[str, int]:
        self._fail_if_told("count_by_controller")
        return await self.inner.count_by_controller()

    async def look_up_waits(self, asked: Sequence[WaitLookup]) -> list[WaitsFound]:
        self._fail_if_told("look_up_waits")
        return await self.inner.look_up_waits(asked)

    async def list_kept(self, *, now: int) -> list[tuple[str, int]]:
        self._fail_if_told("list_kept")
        return await self.inner.list_kept(now=now)

    async def find_token(self, token: str) -> tuple[FlowKey, str | None] | None:
        self._fail_if_told("find_token")
        return await self.inner.find_token(token)

    async def list_met(
        self, *, after_key: int, limit: int, now: int
    ) -> list[tuple[int, FlowKey, str]]:
        self._fail_if_told("list_met")
        return await self.inner.list_met(after_key=after_key, limit=limit, now=now)

    async def list_open_waits(
        self, scope: Scope, *, flow_id: str | None, after_key: int, limit: int
    ) -> list[StoredFlow | StoredTask]:
        self._fail_if_told("list_open_waits")
        return await self.inner.list_open_waits(
            scope, flow_id=flow_id, after_key=after_key, limit=limit
        )

    async def list_updates_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        self._fail_if_told("list_updates_due")
        return await self.inner.list_updates_due(until=until, limit=limit)

    async def list_digests_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        self._fail_if_told("list_digests_due")
        return await self.inner.list_digests_due(until=until, limit=limit)

    async def next_update_due(self, *, after: int = -1) -> int | None:
        self._fail_if_told("next_update_due")
        return await self.inner.next_update_due(after=after)

    async def list_updates(
        self,
        scope: Scope,
        *,
        flow_id: str | None,
        statuses: Collection[str],
        after_key: int,
        limit: int,
    ) -> list[Update]:
        self._fail_if_told("list_updates")
        return await self.inner.list_updates(
            scope, flow_id=flow_id, statuses=statuses, after_key=after_key, limit=limit
        )

    async def list_unreadable(self) -> list[Unreadable]:
        self._fail_if_told("list_unreadable")
        return await self.inner.list_unreadable()


_VERBS: Final = frozenset(
    verb
    for verb, function in vars(Store).items()
    if inspect.iscoroutinefunction(function) and verb != "commit"
)
