"""The store in memory: for tests and for flows that need not outlive the process.

It passes the same conformance suite as SQLite, refusals and fencing included. A `MemoryStore` object outlives
the runtime that opened it, so a restart can be played with one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from flowstead.errors import CommitFailed, SnapshotUnreadable, StoreInUse, WriteConflict
from flowstead.model.event import Event
from flowstead.model.flow import Flow, FlowKey
from flowstead.model.task import Task, TaskSummary
from flowstead.store import codec
from flowstead.store.codec import EventRow, FlowRow, FlowWrite, TaskRow
from flowstead.store.memory_tables import MemoryTables, Transaction
from flowstead.store.memory_waits import MemoryWaits
from flowstead.store.port import Due, FlowQuery, Scope, Snapshot, Unreadable
from flowstead.store.summary import count_tasks

__all__ = ["MemoryStore", "MemoryTables"]

_ACTIVE: Final = frozenset({"queued", "running"})


class MemoryStore(MemoryWaits):
    """A store that lives as long as its tables."""

    def __init__(self, tables: MemoryTables | None = None) -> None:
        self.tables = tables or MemoryTables()
        self._epoch = 0

    @property
    def name(self) -> str:
        return ":memory:"

    async def open(self, *, takeover: bool = False) -> None:
        tables = self.tables
        if tables.owner is not None and not takeover:
            raise StoreInUse(self.name, "another runtime in this process")
        tables.epoch += 1
        tables.owner = self
        self._epoch = tables.epoch

    async def aclose(self) -> None:
        self._epoch = 0
        if self.tables.owner is self:
            self.tables.owner = None

    def next_key(self) -> int:
        self.tables.key += 1
        return self.tables.key

    # ---- writing ----------------------------------------------------------------------------------

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        return self.write(writes)

    def write(self, writes: Sequence[FlowWrite]) -> int:
        """What a commit does, in one step for everybody else."""
        tables = self.tables
        if self._epoch == 0:
            raise CommitFailed(f"{self.name} is closed. Nothing was written.")
        self._check_ownership()
        transaction, before = Transaction(self.name), tables.last_position
        try:
            for write in writes:
                self._write_flow(transaction, write.flow)
                for task in write.tasks:
                    self._write_task(transaction, task)
                for event in write.events:
                    self._write_event(transaction, event)
                for signal in write.signals:
                    self._write_signal(transaction, signal)
                for update in write.updates:
                    self._write_update(transaction, update)
            for write in writes:
                if write.flow is not None and write.flow.ended_at is not None:
                    self._end_progress(transaction, write.flow.key)
        except WriteConflict:
            transaction.roll_back()
            tables.last_position = before
            raise
        return before + 1

    def _check_ownership(self) -> None:
        if self._epoch not in (0, self.tables.epoch):
            raise StoreInUse(self.name, "another runtime, which took it over")

    def _write_flow(self, transaction: Transaction, row: FlowRow | None) -> None:
        tables = self.tables
        if row is None:
            return
        if row.expected_revision is not None:
            stored = tables.flows.get(row.key)
            if stored is None or stored.revision != row.expected_revision:
                raise WriteConflict("A stored flow is not at the revision it was read at.")
            transaction.put(tables.flows, row.key, row)
            self._note_flow_wait(transaction, row)
            return
        transaction.insert(tables.flows, row.key, row)
        self._note_flow_wait(transaction, row)
        transaction.insert(tables.flow_keys, FlowKey(row.owner_key, row.flow_id), row.key)
        if row.idempotency_key is not None:
            named = (row.owner_key, row.idempotency_key)
            transaction.insert(tables.idempotency_keys, named, row.key)

    def _write_task(self, transaction: Transaction, row: TaskRow) -> None:
        tables = self.tables
        if not row.fresh:
            if row.key not in tables.tasks:
                raise WriteConflict("A stored task is gone.")
            transaction.put(tables.tasks, row.key, row)
            self._note_task_wait(transaction, row)
            return
        transaction.insert(tables.tasks, row.key, row)
        self._note_task_wait(transaction, row)
        transaction.insert(tables.task_keys, row.task_id, row.key)
        transaction.insert(tables.children.setdefault(row.flow_key, {}), row.key, None)
        if row.run_id is not None:
            transaction.insert(tables.run_keys, (row.flow_key, row.run_id), row.key)

    def _write_event(self, transaction: Transaction, row: EventRow) -> None:
        tables = self.tables
        position = tables.last_position + 1
        transaction.insert(tables.lines.setdefault(row.flow_key, {}), row.seq, position)
        transaction.insert(tables.events, position, row)
        tables.last_position = position

    async def upkeep(self, *, idle: bool) -> None:
        return None

    # ---- reading ----------------------------------------------------------------------------------

    async def load(self, keys: Sequence[FlowKey]) -> list[Snapshot | Exception | None]:
        found: list[Snapshot | Exception | None] = []
        for key in keys:
            try:
                found.append(self._load_one(key))
            except SnapshotUnreadable as error:
                found.append(error)
        return found

    def _load_one(self, key: FlowKey) -> Snapshot | None:
        tables = self.tables
        flow_key = tables.flow_keys.get(key)
        if flow_key is None:
            return None
        doc = tables.flows[flow_key].doc.encode()
        children = self._children(flow_key)
        return Snapshot(
            flow=codec.read_stored_flow(doc),
            doc=doc,
            active=[
                codec.read_stored_task(row.doc.encode())
                for row in children
                if row.status in _ACTIVE
            ],
            run_ids=[(row.run_id, row.task_id) for row in children if row.run_id is not None],
            last_seq=max(tables.lines.get(flow_key, ()), default=0),
        )

    def _children(self, flow_key: int) -> list[TaskRow]:
        return [self.tables.tasks[key] for key in sorted(self.tables.children.get(flow_key, ()))]

    async def find_flow(self, scope: Scope, flow_id: str) -> Flow | None:
        row = self._row(scope, flow_id)
        return None if row is None else codec.read_flow(row.doc.encode())

    def _row(self, scope: Scope, flow_id: str) -> FlowRow | None:
        if scope.owner_key is not None:
            key = self.tables.flow_keys.get(FlowKey(scope.owner_key, flow_id))
            return None if key is None else self.tables.flows[key]
        return next((row for row in self._rows(scope) if row.flow_id == flow_id), None)

    def _rows(self, scope: Scope) -> Iterable[FlowRow]:
        """Flows in scope, newest first. They were committed in another order than their keys were given."""
        rows = [self.tables.flows[key] for key in sorted(self.tables.flows, reverse=True)]
        if scope.owner_key is None:
            return rows
        return (row for row in rows if row.owner_key == scope.owner_key)

    async def find_by_idempotency_key(self, owner_key: str, key: str) -> FlowKey | None:
        found = self.tables.idempotency_keys.get((owner_key, key))
        return None if found is None else FlowKey(owner_key, self.tables.flows[found].flow_id)

    async def list_flows(self, scope: Scope, query: FlowQuery, limit: int) -> list[Flow]:
        flows: list[Flow] = []
        for row in self._rows(scope):
            if len(flows) == limit:
                break
            if _matches(row, query):
                try:
                    flows.append(codec.read_flow(row.doc.encode()))
                except SnapshotUnreadable:
                    continue
        return flows

    async def key_of(self, scope: Scope, flow_id: str) -> int | None:
        row = self._row(scope, flow_id)
        return None if row is None else row.key

    async def find_task(self, scope: Scope, task_id: str) -> tuple[FlowKey, Task] | None:
        key = self.tables.task_keys.get(task_id)
        if key is None:
            return None
        row = self.tables.tasks[key]
        flow = self.tables.flows[row.flow_key]
        if scope.owner_key not in (None, flow.owner_key):
            return None
        return FlowKey(flow.owner_key, flow.flow_id), codec.read_task(row.doc.encode())

    async def list_tasks(
        self,
        scope: Scope,
        flow_id: str,
        *,
        statuses: Collection[str] = (),
        task_ids: Collection[str] | None = None,
    ) -> list[Task]:
        flow = self._row(scope, flow_id)
        if flow is None:
            return []
        wanted = None if task_ids is None else frozenset(task_ids)
        rows = self._children(flow.key)
        return [
            codec.read_task(row.doc.encode())
            for row in rows
            if (not statuses or row.status in statuses)
            and (wanted is None or row.task_id in wanted)
        ]

    async def summarize(self, scope: Scope, flow_id: str) -> TaskSummary | None:
        flow = self._row(scope, flow_id)
        if flow is None:
            return None
        rows = self._children(flow.key)
        return count_tasks([(row.status, row.runtime, 1) for row in rows])

    async def history(
        self, scope: Scope, flow_id: str, *, after_seq: int, limit: int
    ) -> list[Event]:
        flow = self._row(scope, flow_id)
        if flow is None:
            return []
        lines = sorted(self.tables.lines.get(flow.key, {}).items())
        return self._events((at for seq, at in lines if seq > after_seq), limit)

    async def last_seq(self, scope: Scope, flow_id: str) -> int:
        flow = self._row(scope, flow_id)
        return 0 if flow is None else max(self.tables.lines.get(flow.key, ()), default=0)

    async def events_after(self, scope: Scope, position: int, limit: int) -> list[Event]:
        tables = self.tables
        positions = (
            at
            for at in range(position + 1, tables.last_position + 1)
            if scope.owner_key in (None, tables.flows[tables.events[at].flow_key].owner_key)
        )
        return self._events(positions, limit)

    def _events(self, positions: Iterable[int], limit: int) -> list[Event]:
        """The first readable events at these positions, as many as asked for."""
        found: list[Event] = []
        for position in positions:
            if len(found) == limit:
                break
            try:
                found.append(codec.read_event(self.tables.events[position].doc.encode(), position))
            except SnapshotUnreadable:
                continue
        return found

    async def last_position(self) -> int:
        return self.tables.last_position

    async def list_due(self, *, after: int, until: int) -> list[Due]:
        return [due for due in self._dues() if after < due.at <= until]

    async def next_due(self, *, after: int) -> int | None:
        return min((due.at for due in self._dues() if due.at > after), default=None)

    def _dues(self) -> Iterable[Due]:
        tables = self.tables
        for flow in tables.flows.values():
            if flow.due_at is not None:
                yield Due(flow.due_at, FlowKey(flow.owner_key, flow.flow_id))
        for task in tables.tasks.values():
            if task.due_at is not None:
                flow = tables.flows[task.flow_key]
                yield Due(task.due_at, FlowKey(flow.owner_key, flow.flow_id))

    async def list_unfinished(
        self, controllers: Collection[str], *, after_key: int, limit: int
    ) -> list[tuple[int, FlowKey]]:
        tables = self.tables
        launched = {
            row.flow_key for row in tables.tasks.values() if row.launched and row.status in _ACTIVE
        }
        found = [
            (key, FlowKey(row.owner_key, row.flow_id))
            for key, row in tables.flows.items()
            if key > after_key
            and (key in launched or (row.status in _ACTIVE and row.controller_id in controllers))
        ]
        return sorted(found)[:limit]

    async def count_by_controller(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for row in self.tables.flows.values():
            if row.status in _ACTIVE and row.controller_id is not None:
                counts[row.controller_id] = counts.get(row.controller_id, 0) + 1
        return counts

    async def list_unreadable(self) -> list[Unreadable]:
        found = []
        for table, rows, read in (
            ("flows", self.tables.flows, codec.read_stored_flow),
            ("tasks", self.tables.tasks, codec.read_stored_task),
            ("events", self.tables.events, lambda doc: codec.read_event(doc, 0)),
            ("signals", self.tables.signals, codec.read_signal),
            ("updates", self.tables.updates, codec.read_stored_update),
        ):
            for key, row in rows.items():
                try:
                    read(row.doc.encode())
                except SnapshotUnreadable as error:
                    found.append(Unreadable(table=table, key=key, problem=str(error)))
        return found


def _matches(row: FlowRow, query: FlowQuery) -> bool:
    return (
        (not query.statuses or row.status in query.statuses)
        and query.controller_id in (None, row.controller_id)
        and query.correlation_id in (None, row.correlation_id)
        and (query.id_prefix is None or row.flow_id.startswith(query.id_prefix))
        and not (query.live and row.ended_at is not None)
        and (query.before_key is None or row.key < query.before_key)
    )
