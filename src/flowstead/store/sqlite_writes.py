"""One batch, one transaction, one function: what the worker thread runs for a commit.

BEGIN, every row, COMMIT and the rollback are in here together, so nothing that happens on the event loop can
leave a transaction open. The first statement updates the ownership row under this owner's epoch: no row
touched means somebody has taken over, and the batch is not written. The same row counts commits and events,
so that positions follow from the file alone, and a commit whose answer was lost can be looked up afterwards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from flowstead.errors import WriteConflict
from flowstead.store.codec import FlowWrite

_FENCE = (
    "UPDATE ownership SET commits = commits + 1, last_position = last_position + ?"
    " WHERE id = 1 AND epoch = ?"
)
_COUNTS = "SELECT commits, last_position FROM ownership"
_INSERT_FLOW = "INSERT INTO flows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE_FLOW = (
    "UPDATE flows SET status = ?, ended_at = ?, due_at = ?, revision = ?, doc = ?"
    " WHERE key = ? AND revision = ?"
)
_INSERT_TASK = "INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE_TASK = "UPDATE tasks SET status = ?, due_at = ?, doc = ? WHERE key = ?"
_INSERT_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?)"


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
    events = [row for write in writes for row in write.events]
    try:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute(_FENCE, (len(events), epoch)).rowcount != 1:
            raise Overtaken
        # Read to the end, because an open statement would keep the transaction from committing.
        [(number, last)] = connection.execute(_COUNTS).fetchall()
        first = last - len(events) + 1
        _write_flows(connection, writes)
        _write_tasks(connection, writes)
        numbered = [(first + index, *event) for index, event in enumerate(events)]
        connection.executemany(_INSERT_EVENT, numbered)
    except BaseException as error:
        if not roll_back(connection):
            raise ConnectionSpoiled(str(error)) from error
        raise
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        roll_back(connection)
        raise CommitUnclear(number, first) from error
    return int(first)


def _write_flows(connection: sqlite3.Connection, writes: Sequence[FlowWrite]) -> None:
    rows = [write.flow for write in writes if write.flow is not None]
    created = [row[:11] for row in rows if row.expected_revision is None]
    changed = [
        (r.status, r.ended_at, r.due_at, r.revision, r.doc, r.key, r.expected_revision)
        for r in rows
        if r.expected_revision is not None
    ]
    if created:
        connection.executemany(_INSERT_FLOW, created)
    if changed:
        written = connection.executemany(_UPDATE_FLOW, changed).rowcount
        if written != len(changed):
            raise WriteConflict("A stored flow is not at the revision it was read at.")


def _write_tasks(connection: sqlite3.Connection, writes: Sequence[FlowWrite]) -> None:
    rows = [row for write in writes for row in write.tasks]
    created = [row[:9] for row in rows if row.fresh]
    changed = [(row.status, row.due_at, row.doc, row.key) for row in rows if not row.fresh]
    if created:
        connection.executemany(_INSERT_TASK, created)
    if changed:
        written = connection.executemany(_UPDATE_TASK, changed).rowcount
        if written != len(changed):
            raise WriteConflict("A stored task is gone.")


def roll_back(connection: sqlite3.Connection) -> bool:
    """Leave no transaction open; answers whether that worked."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        pass
    return not connection.in_transaction
