"""One batch, one transaction, one function: what the worker thread runs for a commit.

BEGIN, every row, COMMIT and the rollback are in here together, so nothing that happens on the event loop can
leave a transaction open. The first statement updates the ownership row under this owner's epoch: no row
touched means somebody has taken over, and the batch is not written. The same row counts commits, which is
how a commit whose answer was lost can be looked up afterwards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from flowstead.errors import WriteConflict
from flowstead.store.codec import FlowWrite

_FENCE = "UPDATE ownership SET commits = ?, last_position = ? WHERE id = 1 AND epoch = ?"
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
    """COMMIT itself failed on the disk: the batch may be there or not."""


def write_batch(
    connection: sqlite3.Connection,
    epoch: int,
    commit_number: int,
    first_position: int,
    writes: Sequence[FlowWrite],
) -> int:
    """Write the batch under the epoch and answer the last position used.

    Raises:
        Overtaken, WriteConflict: Nothing was written.
        CommitUnclear: Unknown; look for `commit_number`.
        sqlite3.Error: Nothing was written.
    """
    events = [row for write in writes for row in write.events]
    last_position = first_position + len(events) - 1
    connection.execute("BEGIN IMMEDIATE")
    try:
        fenced = connection.execute(_FENCE, (commit_number, last_position, epoch))
        if fenced.rowcount != 1:
            raise Overtaken
        _write_flows(connection, writes)
        _write_tasks(connection, writes)
        connection.executemany(
            _INSERT_EVENT,
            [(first_position + index, *event) for index, event in enumerate(events)],
        )
    except BaseException:
        _roll_back(connection)
        raise
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        _roll_back(connection)
        raise CommitUnclear from error
    return last_position


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


def _roll_back(connection: sqlite3.Connection) -> None:
    """Leave no transaction open; a connection that cannot even do that is replaced by its owner."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        pass
