"""One batch, one transaction, one function: what the worker thread runs for a commit.

BEGIN, every row, COMMIT and the rollback are in here together, so nothing that happens on the event loop can
leave a transaction open. The first statement updates the ownership row under this owner's epoch: no row
touched means somebody has taken over, and the batch is not written. The same row counts commits and events,
so that positions follow from the file alone, and a commit whose answer was lost can be looked up afterwards;
and it counts all rows ever put in, so that rows that vanish are missed. Nothing is ever taken out.
Whether an update is a new row is known only once its slot has been looked at, so updates are counted last.

Checksums are of the row as it should be: an update leaves columns alone that never change, and if one of
those was damaged, the new checksum does not fit it either.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TypeAlias

from flowstead.errors import SnapshotUnreadable, WriteConflict
from flowstead.model.update import PROGRESS
from flowstead.store import codec
from flowstead.store.codec import FlowRow, FlowWrite, TaskRow, UpdateRow

_FENCE = (
    "UPDATE ownership SET commits = commits + 1, last_position = last_position + ?1,"
    " flows = flows + ?2, tasks = tasks + ?3, events = events + ?1, signals = signals + ?4"
    " WHERE id = 1 AND epoch = ?5"
)
_COUNTS = "SELECT commits, last_position FROM ownership"
# Of each, first the statement for a batch in which nothing waits: most are like that, and each value has its price.
_INSERT_FLOW = (
    "INSERT INTO flows (key, owner_key, flow_id, controller_id, correlation_id, idempotency_key,"
    " status, ended_at, due_at, revision, doc, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "INSERT INTO flows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
)
_UPDATE_FLOW = (
    "UPDATE flows SET status = ?, ended_at = ?, due_at = ?, revision = ?, doc = ?, crc = ?,"
    " wait_key = NULL, wait_token = NULL WHERE key = ? AND revision = ?",
    "UPDATE flows SET status = ?1, ended_at = ?2, due_at = ?3, revision = ?4, doc = ?5, crc = ?6,"
    " wait_key = ?9, wait_token = ?10 WHERE key = ?7 AND revision = ?8",
)
_INSERT_TASK = (
    "INSERT INTO tasks (key, task_id, flow_key, run_id, status, runtime, launched, due_at, doc, crc)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
)
_UPDATE_TASK = (
    "UPDATE tasks SET status = ?, due_at = ?, doc = ?, crc = ?, wait_key = NULL, wait_token = NULL"
    " WHERE key = ?",
    "UPDATE tasks SET status = ?1, due_at = ?2, doc = ?3, crc = ?4, wait_key = ?6, wait_token = ?7"
    " WHERE key = ?5",
)
_INSERT_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?, ?)"
_INSERT_SIGNAL = "INSERT INTO signals VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_TAKE_SIGNAL = (
    "UPDATE signals SET kept = ?, signal_id = ?, doc = ?, crc = ? WHERE key = ? AND kept = 1"
)
_INSERT_UPDATE = "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REPORT_UPDATE = (
    "UPDATE updates SET status = ?, due_at = ?, doc = ?, crc = ? WHERE key = ? AND version = ?"
)
_REPLACE_UPDATE = (
    "UPDATE updates SET status = ?, due_at = ?, version = ?, bucket = ?, doc = ?, crc = ?"
    " WHERE key = ?"
)
_PROGRESS = (
    "SELECT key, owner_key, flow_key, slot, status, due_at, version, bucket, doc, crc FROM updates"
    " WHERE flow_key = ? AND slot = 'progress'"
)
_OUT_OF_DATE = _PROGRESS + " AND status = 'pending'"
_COUNT_UPDATES = "UPDATE ownership SET updates = updates + ? WHERE id = 1"


_Values: TypeAlias = Sequence[tuple[object, ...]]


class Overtaken(Exception):
    """The epoch in the file is not ours any more."""


class CommitUnclear(Exception):
    """COMMIT itself failed on the disk: the batch with this number may be there or not."""

    def __init__(self, number: int, first_position: int) -> None:
        super().__init__(number, first_position)
        self.number = number
        self.first_position = first_position


class ConnectionSpoiled(Exception):
    """The batch was not written, and the connection could not even roll back: it must be replaced."""


def write_batch(connection: sqlite3.Connection, epoch: int, writes: Sequence[FlowWrite]) -> int:
    """Write the batch under the epoch and answer the position of its first event.

    Raises:
        Overtaken, WriteConflict, ConnectionSpoiled: Nothing was written.
        CommitUnclear: Unknown; look for its number.
        sqlite3.Error: Nothing was written.
    """
    rows = _Rows(writes)
    added = len(rows.new_events), len(rows.new_flows), len(rows.new_tasks), len(rows.new_signals)
    try:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute(_FENCE, (*added, epoch)).rowcount != 1:
            raise Overtaken
        # Read to the end, because an open statement would keep the transaction from committing.
        [(number, last)] = connection.execute(_COUNTS).fetchall()
        first = last - len(rows.new_events) + 1
        _write_rows(connection, rows)
        connection.executemany(_INSERT_EVENT, rows.numbered_from(first))
        if rows.updates:
            _write_updates(connection, rows.updates)
        for flow_key in rows.ended:
            _end_progress(connection, flow_key)
    except BaseException as error:
        if not roll_back(connection):
            raise ConnectionSpoiled(str(error)) from error
        raise
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        if roll_back(connection) and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
            # The page that says "committed" is written last, and did not fit: nothing unclear about it.
            raise
        raise CommitUnclear(number, first) from error
    return int(first)


class _Rows:
    """What a batch writes, in the order of the statements' columns; made before the transaction begins."""

    def __init__(self, writes: Sequence[FlowWrite]) -> None:
        flows = [write.flow for write in writes if write.flow is not None]
        new_flows = [row for row in flows if row.expected_revision is None]
        changed = [row for row in flows if row.expected_revision is not None]
        tasks = [row for write in writes for row in write.tasks]
        new_tasks = [row for row in tasks if row.fresh]
        changed_tasks = [row for row in tasks if not row.fresh]
        self.new_flows: _Values = [(*row[:11], codec.flow_crc(row)) for row in new_flows]
        self.flows: _Values = [
            (
                row.status,
                row.ended_at,
                row.due_at,
                row.revision,
                row.doc,
                codec.flow_crc(row),
                row.key,
                row.expected_revision,
            )
            for row in changed
        ]
        self.new_tasks: _Values = [(*row[:9], codec.task_crc(row)) for row in new_tasks]
        self.tasks: _Values = [
            (row.status, row.due_at, row.doc, codec.task_crc(row), row.key) for row in changed_tasks
        ]
        self.new_events = [(*row, codec.event_crc(row)) for write in writes for row in write.events]
        self.ended = [row.key for row in changed if row.ended_at is not None]
        self.has_waits = any(map(codec.has_wait, flows)) or any(map(codec.has_wait, tasks))
        if self.has_waits:
            self.new_flows = _with_waits(self.new_flows, new_flows)
            self.flows = _with_waits(self.flows, changed)
            self.new_tasks = _with_waits(self.new_tasks, new_tasks)
            self.tasks = _with_waits(self.tasks, changed_tasks)
        self.new_signals: _Values = ()
        self.signals: _Values = ()
        self.updates: Sequence[UpdateRow] = ()
        if beside := [write for write in writes if write.signals or write.updates]:
            self._add(beside)

    def _add(self, writes: Sequence[FlowWrite]) -> None:
        """The signals and updates, which few batches have."""
        signals = [row for write in writes for row in write.signals]
        self.new_signals = [(*row[:7], codec.signal_crc(row)) for row in signals if row.fresh]
        self.signals = [
            (row.kept, row.signal_id, row.doc, codec.signal_crc(row), row.key)
            for row in signals
            if not row.fresh
        ]
        self.updates = [row for write in writes for row in write.updates]

    def numbered_from(self, first: int) -> list[tuple[int, int, int, str, int]]:
        """The events with their positions."""
        return [
            (position, flow_key, seq, doc, codec.at_position(crc, position))
            for position, (flow_key, seq, doc, crc) in enumerate(self.new_events, first)
        ]


def _with_waits(values: _Values, rows: Sequence[FlowRow | TaskRow]) -> _Values:
    return [
        (*of_row, row.wait_key, row.wait_token) for of_row, row in zip(values, rows, strict=True)
    ]


def _write_rows(connection: sqlite3.Connection, rows: _Rows) -> None:
    if rows.new_flows:
        connection.executemany(_INSERT_FLOW[rows.has_waits], rows.new_flows)
    if rows.flows:
        written = connection.executemany(_UPDATE_FLOW[rows.has_waits], rows.flows).rowcount
        if written != len(rows.flows):
            raise WriteConflict("A stored flow is not at the revision it was read at.")
    if rows.new_tasks:
        connection.executemany(_INSERT_TASK[rows.has_waits], rows.new_tasks)
    if rows.tasks:
        written = connection.executemany(_UPDATE_TASK[rows.has_waits], rows.tasks).rowcount
        if written != len(rows.tasks):
            raise WriteConflict("A stored task is gone.")
    if rows.new_signals:
        connection.executemany(_INSERT_SIGNAL, rows.new_signals)
    if rows.signals:
        written = connection.executemany(_TAKE_SIGNAL, rows.signals).rowcount
        if written != len(rows.signals):
            raise WriteConflict("A kept signal was taken already.")


def _write_updates(connection: sqlite3.Connection, rows: Sequence[UpdateRow]) -> None:
    added = sum(_write_update(connection, row) for row in rows)
    if added:
        connection.execute(_COUNT_UPDATES, (added,))


def _write_update(connection: sqlite3.Connection, row: UpdateRow) -> bool:
    """Write one update, and answer whether that made a row."""
    if not row.fresh:
        values = row.status, row.due_at, row.doc, codec.update_crc(row), row.key, row.version
        connection.execute(_REPORT_UPDATE, values)
        return False
    if row.slot == PROGRESS:
        for stored in connection.execute(_PROGRESS, (row.flow_key,)).fetchall():
            key, version = stored[0], stored[6]
            _replace(connection, codec.replacing(row, key, version if type(version) is int else 0))
            return False
    connection.execute(_INSERT_UPDATE, (*row[:9], codec.update_crc(row)))
    return True


def _end_progress(connection: sqlite3.Connection, flow_key: int) -> None:
    """Progress that has not gone out is not told after the end of its flow."""
    for stored in connection.execute(_OUT_OF_DATE, (flow_key,)).fetchall():
        try:
            update = codec.read_stored_update(codec.update_doc(stored))
        except SnapshotUnreadable:
            # It does not go out either: what cannot be read is not due.
            continue
        _replace(connection, codec.superseded(codec.at_row(update, stored[0], stored[6])))


def _replace(connection: sqlite3.Connection, row: UpdateRow) -> None:
    values = row.status, row.due_at, row.version, row.bucket, row.doc, codec.update_crc(row)
    connection.execute(_REPLACE_UPDATE, (*values, row.key))


def roll_back(connection: sqlite3.Connection) -> bool:
    """Leave no transaction open; answers whether that worked."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        pass
    return not connection.in_transaction
