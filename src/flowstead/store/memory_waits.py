"""Waits, signals and updates of a store in memory: how they are written and found.

Dictionaries lead from a key or a token to the rows that have or had it; what a row says now is asked of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, TypeVar

from flowstead.errors import SnapshotUnreadable, WriteConflict
from flowstead.model.flow import FlowKey, StoredFlow, waits_itself
from flowstead.model.signal import StoredSignal
from flowstead.model.task import StoredTask
from flowstead.model.update import PROGRESS, StoredUpdate, Update, UpdateStatus
from flowstead.store import codec
from flowstead.store.codec import FlowRow, SignalRow, TaskRow, UpdateRow
from flowstead.store.memory_tables import MemoryTables, Transaction
from flowstead.store.port import MOST_EXPIRED, Scope, WaitLookup, WaitsFound

R = TypeVar("R")
T = TypeVar("T")

_WAITING: Final = frozenset({"waiting", "blocked"})


class MemoryWaits:
    """The part of a store in memory that knows of waits, signals and updates."""

    tables: MemoryTables

    def _check_ownership(self) -> None:
        """Refuse an owner that was overtaken."""
        raise NotImplementedError

    # ---- writing ----------------------------------------------------------------------------------

    def _note_flow_wait(self, transaction: Transaction, row: FlowRow) -> None:
        tables = self.tables
        if row.wait_key is not None:
            transaction.put(tables.flow_waits.setdefault(row.wait_key, {}), row.key, None)
        if row.wait_token is not None:
            transaction.put(tables.flow_tokens, row.wait_token, row.key)

    def _note_task_wait(self, transaction: Transaction, row: TaskRow) -> None:
        tables = self.tables
        if row.wait_key is not None:
            transaction.put(tables.task_waits.setdefault(row.wait_key, {}), row.key, None)
        if row.wait_token is not None:
            transaction.put(tables.task_tokens, row.wait_token, row.key)

    def _write_signal(self, transaction: Transaction, row: SignalRow) -> None:
        tables = self.tables
        kept = tables.kept.setdefault(row.wait_key, {})
        if row.fresh:
            transaction.insert(tables.signals, row.key, row)
            if row.signal_id is not None:
                transaction.insert(tables.signal_ids, (row.owner_key, row.signal_id), row.key)
        else:
            stored = tables.signals.get(row.key)
            if stored is None or not stored.kept:
                raise WriteConflict("A kept signal was taken already.")
            if stored.signal_id is not None and row.signal_id is None:
                transaction.drop(tables.signal_ids, (row.owner_key, stored.signal_id))
            transaction.put(tables.signals, row.key, row)
        if row.kept:
            transaction.put(kept, row.key, None)
        else:
            transaction.drop(kept, row.key)

    def _write_update(self, transaction: Transaction, row: UpdateRow) -> None:
        tables = self.tables
        if not row.fresh:
            stored = tables.updates.get(row.key)
            if stored is not None and stored.version == row.version:
                self._put_update(transaction, row)
            return
        progress = tables.slots.get((row.flow_key, PROGRESS))
        if progress is not None and row.slot == PROGRESS:
            version = tables.updates[progress].version
            self._put_update(transaction, codec.replacing(row, progress, version))
            return
        if row.key in tables.updates:
            raise WriteConflict(f"An update has the key {row.key} already.")
        transaction.insert(tables.slots, (row.flow_key, row.slot), row.key)
        self._put_update(transaction, row)

    def _end_progress(self, transaction: Transaction, flow_key: int) -> None:
        """Progress that has not gone out is not told after the end of its flow."""
        progress = self.tables.slots.get((flow_key, PROGRESS))
        if progress is None or progress not in self.tables.pending:
            return
        try:
            update = _stored_update(self.tables.updates[progress])
        except SnapshotUnreadable:
            # It does not go out either: what cannot be read is not due.
            return
        self._put_update(transaction, codec.superseded(update))

    def _put_update(self, transaction: Transaction, row: UpdateRow) -> None:
        tables = self.tables
        transaction.put(tables.updates, row.key, row)
        if row.status == UpdateStatus.PENDING:
            transaction.put(tables.pending, row.key, None)
        else:
            transaction.drop(tables.pending, row.key)

    # ---- waits ------------------------------------------------------------------------------------

    async def look_up_waits(self, asked: Sequence[WaitLookup]) -> list[WaitsFound]:
        return [self._look_up(one) for one in asked]

    def _look_up(self, asked: WaitLookup) -> WaitsFound:
        is_known = (asked.owner_key, asked.signal_id) in self.tables.signal_ids
        kept, expired = self._oldest_kept(asked.owner_key, asked.wait_key, asked.now)
        if asked.only_kept and kept is None:
            return WaitsFound(
                is_known=is_known,
                waiting=[],
                kept=None,
                was_awaited=False,
                is_live=False,
                expired=expired,
            )
        rows = self._of_key(asked.owner_key, asked.wait_key)
        waiting = self._waiting(asked.owner_key, asked.wait_key)
        return WaitsFound(
            is_known=is_known,
            waiting=[FlowKey(row.owner_key, row.flow_id) for row in waiting],
            kept=kept,
            was_awaited=bool(rows),
            is_live=any(row.ended_at is None for row in rows),
            expired=expired,
        )

    def _oldest_kept(
        self, owner_key: str, wait_key: str, now: int
    ) -> tuple[StoredSignal | None, list[StoredSignal]]:
        """The oldest signal on a key that has not expired, and those before it that have."""
        expired: list[StoredSignal] = []
        for key in sorted(self.tables.kept.get(wait_key, ())):
            row = self.tables.signals[key]
            if row.owner_key != owner_key or len(expired) == MOST_EXPIRED:
                continue
            for signal in _readable([row], _signal, 1):
                if signal.expires_at is not None and signal.expires_at > now:
                    return signal, expired
                expired.append(signal)
        return None, expired

    def _of_key(self, owner_key: str, wait_key: str) -> list[FlowRow]:
        """The flows of an owner that have ever waited for a key, or have a child that did."""
        tables = self.tables
        own = (tables.flows[key] for key in tables.flow_waits.get(wait_key, ()))
        children = (tables.tasks[key] for key in tables.task_waits.get(wait_key, ()))
        flows = [row for row in own if row.wait_key == wait_key]
        flows += [tables.flows[row.flow_key] for row in children if row.wait_key == wait_key]
        return [row for row in flows if row.owner_key == owner_key]

    def _waiting(self, owner_key: str, wait_key: str) -> list[FlowRow]:
        """The flows of an owner that wait for a key now, oldest first."""
        tables = self.tables
        own = (tables.flows[key] for key in tables.flow_waits.get(wait_key, ()))
        children = (tables.tasks[key] for key in tables.task_waits.get(wait_key, ()))
        keys = {row.key for row in own if row.wait_key == wait_key and row.status in _WAITING}
        keys |= {
            row.flow_key for row in children if row.wait_key == wait_key and row.status == "queued"
        }
        flows = [tables.flows[key] for key in sorted(keys)]
        return [row for row in flows if row.owner_key == owner_key]

    def _kept(self, owner_key: str, wait_key: str, now: int) -> list[SignalRow]:
        tables = self.tables
        rows = [tables.signals[key] for key in sorted(tables.kept.get(wait_key, ()))]
        return [
            row
            for row in rows
            if row.owner_key == owner_key and row.expires_at is not None and row.expires_at > now
        ]

    async def list_kept(self, *, now: int) -> list[tuple[str, int]]:
        rows = (self.tables.signals[key] for keys in self.tables.kept.values() for key in keys)
        kept = [(row.expires_at, row.owner_key) for row in rows if row.expires_at is not None]
        return [(owner_key, at) for at, owner_key in sorted(kept) if at > now]

    async def find_token(self, token: str) -> tuple[FlowKey, str | None] | None:
        tables = self.tables
        flow = tables.flows.get(tables.flow_tokens.get(token, 0))
        if flow is not None and flow.wait_token == token:
            codec.read_stored_flow(flow.doc.encode())
            return FlowKey(flow.owner_key, flow.flow_id), None
        task = tables.tasks.get(tables.task_tokens.get(token, 0))
        if task is None or task.wait_token != token:
            return None
        codec.read_stored_task(task.doc.encode())
        flow = tables.flows[task.flow_key]
        return FlowKey(flow.owner_key, flow.flow_id), task.task_id

    async def list_met(
        self, *, after_key: int, limit: int, now: int
    ) -> list[tuple[int, FlowKey, str]]:
        owners = {
            (wait_key, self.tables.signals[key].owner_key)
            for wait_key, keys in self.tables.kept.items()
            for key in keys
        }
        found = sorted(
            (row.key, FlowKey(row.owner_key, row.flow_id), wait_key)
            for wait_key, owner_key in owners
            if self._kept(owner_key, wait_key, now)
            for row in self._waiting(owner_key, wait_key)
            if row.key > after_key
        )
        flows = list(dict.fromkeys(key for key, *_ in found))[:limit]
        return [met for met in found if flows and met[0] <= flows[-1]]

    async def list_open_waits(
        self, scope: Scope, *, flow_id: str | None, after_key: int, limit: int
    ) -> list[StoredFlow | StoredTask]:
        flows: list[tuple[int, FlowRow | TaskRow]] = [
            (row.key, row)
            for row in self.tables.flows.values()
            if row.status in _WAITING and (row.wait_key is not None or row.wait_token is not None)
        ]
        tasks: list[tuple[int, FlowRow | TaskRow]] = [
            (row.key, row)
            for row in self.tables.tasks.values()
            if row.status == "queued" and row.wait_token is not None
        ]
        within = self._flow_keys(scope, flow_id)
        found = sorted([*flows, *tasks], key=lambda one: one[0])
        rows = [row for key, row in found if key > after_key and _flow_key(row) in within]
        waits = _readable(rows, _open_wait, len(rows))
        return [wait for wait in waits if wait is not None][:limit]

    def _flow_keys(self, scope: Scope, flow_id: str | None) -> Collection[int]:
        """The flows in scope, or the one of this id: where several owners use it, the newest."""
        keys = [
            key
            for key, row in self.tables.flows.items()
            if scope.owner_key in (None, row.owner_key) and flow_id in (None, row.flow_id)
        ]
        return frozenset(keys if flow_id is None else sorted(keys)[-1:])

    # ---- updates ----------------------------------------------------------------------------------

    async def list_updates_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        self._check_ownership()
        rows = [row for due, row in self._pending() if due <= until and row.bucket is None]
        return _readable(sorted(rows, key=lambda row: (row.due_at, row.key)), _stored_update, limit)

    async def list_digests_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        self._check_ownership()
        rows = [row for due, row in self._pending() if due <= until and row.bucket is not None]
        rows.sort(key=lambda row: (row.owner_key, row.bucket, row.key))
        return _readable(rows, _stored_update, limit)

    async def next_update_due(self, *, after: int = -1) -> int | None:
        pending = (one for one in self._pending() if one[0] > after)
        rows = [row for _, row in sorted(pending, key=lambda one: one[0])]
        return next((update.due_at for update in _readable(rows, _stored_update, 1)), None)

    def _pending(self) -> Iterable[tuple[int, UpdateRow]]:
        rows = (self.tables.updates[key] for key in self.tables.pending)
        return ((row.due_at, row) for row in rows if row.due_at is not None)

    async def list_updates(
        self,
        scope: Scope,
        *,
        flow_id: str | None,
        statuses: Collection[str],
        after_key: int,
        limit: int,
    ) -> list[Update]:
        within = None if flow_id is None else self._flow_keys(scope, flow_id)
        rows = [
            row
            for key, row in sorted(self.tables.updates.items())
            if key > after_key
            and scope.owner_key in (None, row.owner_key)
            and (within is None or row.flow_key in within)
            and (not statuses or row.status in statuses)
        ]
        return _readable(rows, lambda row: codec.read_update(row.doc.encode(), row.key), limit)


def _signal(row: SignalRow) -> StoredSignal:
    return codec.read_signal(row.doc.encode())


def _stored_update(row: UpdateRow) -> StoredUpdate:
    return codec.at_row(codec.read_stored_update(row.doc.encode()), row.key, row.version)


def _flow_key(row: FlowRow | TaskRow) -> int:
    return row.key if isinstance(row, FlowRow) else row.flow_key


def _open_wait(row: FlowRow | TaskRow) -> StoredFlow | StoredTask | None:
    """What waits; None for a flow that waits for its children."""
    if isinstance(row, TaskRow):
        return codec.read_stored_task(row.doc.encode())
    flow = codec.read_stored_flow(row.doc.encode())
    return flow if waits_itself(flow) else None


def _readable(rows: Iterable[R], read: Callable[[R], T], limit: int) -> list[T]:
    """The first readable records, as many as asked for."""
    found: list[T] = []
    for row in rows:
        if len(found) == limit:
            break
        try:
            found.append(read(row))
        except SnapshotUnreadable:
            continue
    return found
