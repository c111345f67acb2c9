"""One batch, one transaction, one function: what the worker thread runs for a commit.

BEGIN, every row, COMMIT and the rollback are in here together, so nothing that happens on the event loop can
leave a transaction open. The first statement updates the ownership row under this owner's epoch: no row
touched means somebody has taken over, and the batch is not written. The same row counts commits and events,
so that positions follow from the file alone, and a commit whose answer was lost can be looked up afterwards;
and it counts all rows ever put in, so that rows that vanish are missed. Nothing is ever taken out.

Checksums are of the row as it should be: an update leaves columns alone that never change, and if one of
those was damaged, the new checksum does not fit it either.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from flowstead.errors import WriteConflict
from flowstead.store import codec
from flowstead.store.codec import FlowWrite

_FENCE = (
    "UPDATE ownership SET commits = commits + 1, last_position = last_position + ?1,"
    " flows = flows + ?2, tasks = tasks + ?3, events = events + ?1 WHERE id = 1 AND epoch = ?4"
)
_COUNTS = "SELECT commits, last_position FROM ownership"
_INSERT_FLOW = "INSERT INTO flows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE_FLOW = (
    "UPDATE flows SET status = ?, ended_at = ?, due_at = ?, revision = ?, doc = ?, crc = ?"
    " WHERE key = ? AND revision = ?"
)
_INSERT_TASK = "INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE_TASK = "UPDATE tasks SET status = ?, due_at = ?, doc = ?, crc = ? WHERE key = ?"
_INSERT_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?, ?)"


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
    added = len(rows.new_events), len(rows.new_flows), len(rows.new_tasks)
    try:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute(_FENCE, (*added, epoch)).rowcount != 1:
            raise Overtaken
        # Read to the end, because an open statement would keep the transaction from committing.
        [(number, last)] = connection.execute(_COUNTS).fetchall()
        first = last - len(rows.new_events) + 1
        _write_rows(connection, rows)
        connection.executemany(_INSERT_EVENT, rows.numbered_from(first))
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
        tasks = [row for write in writes for row in write.tasks]
        self.new_flows = [
            (*row[:11], codec.flow_crc(row)) for row in flows if row.expected_revision is None
        ]
        self.flows = [
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
            for row in flows
            if row.expected_revision is not None
        ]
        self.new_tasks = [(*row[:9], codec.task_crc(row)) for row in tasks if row.fresh]
        self.tasks = [
            (row.status, row.due_at, row.doc, codec.task_crc(row), row.key)
            for row in tasks
            if not row.fresh
        ]
        self.new_events = [(*row, codec.event_crc(row)) for write in writes for row in write.events]

    def numbered_from(self, first: int) -> list[tuple[int, int, int, str, int]]:
        """The events with their positions."""
        return [
            (position, flow_key, seq, doc, codec.at_position(crc, position))
            for position, (flow_key, seq, doc, crc) in enumerate(self.new_events, first)
        ]


def _write_rows(connection: sqlite3.Connection, rows: _Rows) -> None:
    if rows.new_flows:
        connection.executemany(_INSERT_FLOW, rows.new_flows)
    if rows.flows:
        written = connection.executemany(_UPDATE_FLOW, rows.flows).rowcount
        if written != len(rows.flows):
            raise WriteConflict("A stored flow is not at the revision it was read at.")
    if rows.new_tasks:
        connection.executemany(_INSERT_TASK, rows.new_tasks)
    if rows.tasks:
        written = connection.executemany(_UPDATE_TASK, rows.tasks).rowcount
        if written != len(rows.tasks):
            raise WriteConflict("A stored task is gone.")


def roll_back(connection: sqlite3.Connection) -> bool:
    """Leave no transaction open; answers whether that worked."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        pass
    return not connection.in_transaction
