# ruff: noqa: S608 - statements are joined from constants; values are bound
"""The reads of a SQLite store that find updates: those that are due, and those of an owner or a flow.

An update that took another's place keeps that one's row: key and version are the row's, whatever the record says.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from typing import Any, Final

from flowstead.errors import SnapshotUnreadable
from flowstead.model.update import StoredUpdate, Update
from flowstead.store import codec
from flowstead.store.port import Scope
from flowstead.store.sqlite_reads import key_of, one_of, readable, scoped

UPDATE: Final = (
    "u.key, u.owner_key, u.flow_key, u.slot, u.status, u.due_at, u.version, u.bucket, u.doc, u.crc"
)
_PENDING: Final = " WHERE u.status = 'pending' AND u.due_at >= 0 AND typeof(u.due_at) = 'integer'"
_ALONE: Final = " FROM updates AS u INDEXED BY updates_due" + _PENDING + " AND u.bucket IS NULL"
_TOGETHER: Final = (
    " FROM updates AS u INDEXED BY digests_due" + _PENDING + " AND u.bucket IS NOT NULL"
)
_DUE: Final = "SELECT " + UPDATE + _ALONE + " AND u.due_at <= ? ORDER BY u.due_at, u.key"
_DIGESTS_DUE: Final = (
    "SELECT u.key" + _TOGETHER + " AND u.due_at <= ? ORDER BY u.owner_key, u.bucket, u.key"
)
_NEXT: Final = tuple(
    "SELECT " + UPDATE + kind + " AND u.due_at > ? ORDER BY u.due_at, u.key"
    for kind in (_ALONE, _TOGETHER)
)
_BY_KEY: Final = "SELECT " + UPDATE + " FROM updates AS u WHERE u.key = ?"


def stored_update(*row: Any) -> StoredUpdate:
    """An update to keep, from all its columns."""
    return codec.at_row(codec.read_stored_update(codec.update_doc(row)), row[0], row[6])


def _update(*row: Any) -> Update:
    return codec.read_update(codec.update_doc(row), row[0])


def list_updates_due(connection: sqlite3.Connection, until: int, limit: int) -> list[StoredUpdate]:
    """Pending updates that go out alone, longest due first."""
    return readable(connection.execute(_DUE, (until,)), stored_update, limit)


def list_digests_due(connection: sqlite3.Connection, until: int, limit: int) -> list[StoredUpdate]:
    """Pending updates that go out together, by owner and bucket."""
    # Sorted without their records, which may be long.
    keys = connection.execute(_DIGESTS_DUE, (until,))

    def by_key(key: int) -> StoredUpdate:
        row = connection.execute(_BY_KEY, (key,)).fetchone()
        if row is None:
            raise SnapshotUnreadable(f"update {key}", "its index leads to nothing")
        return stored_update(*row)

    return readable(keys, by_key, limit)


def next_update_due(connection: sqlite3.Connection, after: int) -> int | None:
    """When the first readable pending update is due that is due later than an instant."""
    firsts = [
        update.due_at
        for statement in _NEXT
        for update in readable(connection.execute(statement, (after,)), stored_update, 1)
    ]
    return min((at for at in firsts if at is not None), default=None)


def list_updates(
    connection: sqlite3.Connection,
    scope: Scope,
    flow_id: str | None,
    statuses: Collection[str],
    after_key: int,
    limit: int,
) -> list[Update]:
    """Updates, oldest first."""
    source, conditions, values = " FROM updates AS u", ["u.key > ?"], list[Any]([after_key])
    if flow_id is not None:
        # Else SQLite might go through all of the owner's.
        source += " INDEXED BY updates_by_slot"
        conditions.append("u.flow_key = ?")
        values.append(key_of(connection, scope, flow_id))
    if statuses:
        conditions.append(one_of("u.status", statuses))
        values.extend(statuses)
    where, values = scoped(scope, conditions, values, of="u")
    rows = connection.execute("SELECT " + UPDATE + source + where + " ORDER BY u.key", values)
    return readable(rows, _update, limit)
