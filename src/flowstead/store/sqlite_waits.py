# ruff: noqa: S608 - statements are joined from constants; values are bound
"""The reads of a SQLite store that find waits: by the key of a signal, by a token, and all that are open.

Whether a flow waits for a key is asked of the columns alone, with its owner among them; the flow itself is checked
when it is loaded. What is handed out of a row is decoded once its checksum fits.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Final

from flowstead.errors import SnapshotUnreadable
from flowstead.model.flow import FlowKey, StoredFlow, waits_itself
from flowstead.model.signal import StoredSignal
from flowstead.model.task import StoredTask
from flowstead.store import codec
from flowstead.store.port import MOST_EXPIRED, Scope, WaitLookup, WaitsFound
from flowstead.store.sqlite_reads import FLOW, TASK, key_of, text_of
from flowstead.store.sqlite_writes import roll_back

SIGNAL: Final = "s.key, s.owner_key, s.wait_key, s.signal_id, s.kept, s.expires_at, s.doc, s.crc"
_WAITS: Final = frozenset({b"waiting", b"blocked"})
_KNOWN: Final = "SELECT 1 FROM signals WHERE owner_key = ? AND signal_id = ?"
_WAITING: Final = (
    "SELECT f.key, f.flow_id FROM flows AS f INDEXED BY flows_by_wait"
    " WHERE f.wait_key = ?1 AND f.owner_key = ?2 AND f.status IN ('waiting', 'blocked')"
    " UNION SELECT f.key, f.flow_id FROM tasks AS t INDEXED BY tasks_by_wait"
    " CROSS JOIN flows AS f ON f.key = t.flow_key"
    " WHERE t.wait_key = ?1 AND f.owner_key = ?2 AND t.status = 'queued' ORDER BY 1"
)
_KEPT: Final = (
    "SELECT " + SIGNAL + " FROM signals AS s INDEXED BY signals_kept"
    " WHERE s.wait_key = ? AND s.kept = 1 AND s.owner_key = ? ORDER BY s.key"
)
_OF_FLOWS: Final = (
    "EXISTS (SELECT 1 FROM flows AS f INDEXED BY flows_by_wait"
    " WHERE f.wait_key = ?1 AND f.owner_key = ?2"
)
_OF_TASKS: Final = (
    "EXISTS (SELECT 1 FROM tasks AS t INDEXED BY tasks_by_wait"
    " CROSS JOIN flows AS f ON f.key = t.flow_key WHERE t.wait_key = ?1 AND f.owner_key = ?2"
)
_AWAITED: Final = (
    "SELECT " + _OF_FLOWS + ") OR " + _OF_TASKS + "), "
    + _OF_FLOWS + " AND f.ended_at IS NULL) OR " + _OF_TASKS + " AND f.ended_at IS NULL)"
)  # fmt: skip
# Joined in the order in which they are written: kept signals are few, what they might meet is not.
_MET: Final = (
    "SELECT f.key, f.owner_key, f.flow_id, s.wait_key FROM signals AS s INDEXED BY signals_expiring"
    " CROSS JOIN flows AS f INDEXED BY flows_by_wait"
    " ON f.wait_key = s.wait_key AND f.owner_key = s.owner_key"
    " WHERE s.kept = 1 AND s.expires_at > ?1 AND f.status IN ('waiting', 'blocked') AND f.key > ?2"
    " UNION SELECT f.key, f.owner_key, f.flow_id, s.wait_key"
    " FROM signals AS s INDEXED BY signals_expiring"
    " CROSS JOIN tasks AS t INDEXED BY tasks_by_wait ON t.wait_key = s.wait_key"
    " CROSS JOIN flows AS f ON f.key = t.flow_key AND f.owner_key = s.owner_key"
    " WHERE s.kept = 1 AND s.expires_at > ?1 AND t.status = 'queued' AND f.key > ?2 ORDER BY 1, 4"
)
_FLOW_BY_KEY: Final = "SELECT " + FLOW + " FROM flows AS f WHERE f.key = ?"
_TASK_BY_KEY: Final = "SELECT " + TASK + " FROM tasks AS t WHERE t.key = ?"
_HAS_WAIT: Final = (
    "f.status IN ('waiting', 'blocked') AND (f.wait_key IS NOT NULL OR f.wait_token IS NOT NULL)"
)
_FLOWS_WAITING: Final = (
    "SELECT f.key, 0 FROM flows AS f INDEXED BY flows_waiting"
    " WHERE " + _HAS_WAIT + " AND f.key > ?1"
)
_TASKS_WAITING: Final = (
    " FROM tasks AS t INDEXED BY tasks_waiting"
    " WHERE t.status = 'queued' AND t.wait_token IS NOT NULL AND t.key > ?1"
)
_OPEN: Final = _FLOWS_WAITING + " UNION ALL SELECT t.key, 1" + _TASKS_WAITING + " ORDER BY 1"
_OPEN_OF_OWNER: Final = (
    _FLOWS_WAITING + " AND f.owner_key = ?2 UNION ALL SELECT t.key, 1" + _TASKS_WAITING
    + " AND EXISTS (SELECT 1 FROM flows AS f WHERE f.key = t.flow_key AND f.owner_key = ?2)"
    " ORDER BY 1"
)  # fmt: skip
_OPEN_OF_FLOW: Final = (
    "SELECT f.key, 0 FROM flows AS f WHERE " + _HAS_WAIT + " AND f.key = ?2 AND f.key > ?1"
    " UNION ALL SELECT t.key, 1 FROM tasks AS t INDEXED BY tasks_by_flow WHERE t.flow_key = ?2"
    " AND t.status = 'queued' AND t.wait_token IS NOT NULL AND t.key > ?1 ORDER BY 1"
)


def stored_flow(*row: object) -> StoredFlow:
    """A flow to keep, from all its columns."""
    return codec.read_stored_flow(codec.flow_doc(row))


def stored_task(*row: object) -> StoredTask:
    """A child to keep, from all its columns."""
    return codec.read_stored_task(codec.task_doc(row))


def stored_signal(*row: object) -> StoredSignal:
    """A signal, from all its columns."""
    return codec.read_signal(codec.signal_doc(row))


# ---- by the key of a signal -----------------------------------------------------------------------


def look_up_waits(connection: sqlite3.Connection, asked: Sequence[WaitLookup]) -> list[WaitsFound]:
    """What is on record for several signals, in one read transaction."""
    try:
        connection.execute("BEGIN")
        found = [_look_up(connection, one) for one in asked]
        connection.execute("COMMIT")
    finally:
        roll_back(connection)
    return found


def _look_up(connection: sqlite3.Connection, asked: WaitLookup) -> WaitsFound:
    is_known = False
    if asked.signal_id is not None:
        known = connection.execute(_KNOWN, (asked.owner_key, asked.signal_id)).fetchone()
        is_known = known is not None
    named = asked.wait_key, asked.owner_key
    kept, expired = _kept(connection, named, asked.now)
    if asked.only_kept and kept is None:
        return WaitsFound(
            is_known=is_known,
            waiting=[],
            kept=None,
            was_awaited=False,
            is_live=False,
            expired=expired,
        )
    rows = connection.execute(_WAITING, named).fetchall()
    was_awaited = is_live = bool(rows)
    if not rows:
        was_awaited, is_live = map(bool, connection.execute(_AWAITED, named).fetchone())
    return WaitsFound(
        is_known=is_known,
        waiting=[FlowKey(asked.owner_key, text_of(flow_id)) for _, flow_id in rows],
        kept=kept,
        was_awaited=was_awaited,
        is_live=is_live,
        expired=expired,
    )


def _kept(
    connection: sqlite3.Connection, named: tuple[str, str], now: int
) -> tuple[StoredSignal | None, list[StoredSignal]]:
    """The oldest signal on a key that has not expired, and those before it that have, so many at a time."""
    expired: list[StoredSignal] = []
    rows = connection.execute(_KEPT, named)
    try:
        while len(expired) < MOST_EXPIRED and (row := rows.fetchone()) is not None:
            try:
                signal = stored_signal(*row)
            except SnapshotUnreadable:
                continue
            if signal.expires_at is not None and signal.expires_at > now:
                return signal, expired
            expired.append(signal)
    finally:
        rows.close()
    return None, expired


def list_kept(connection: sqlite3.Connection, now: int) -> list[tuple[str, int]]:
    """Whose signals are kept, and until when; what a damaged row says is not counted."""
    rows = connection.execute(
        "SELECT owner_key, expires_at FROM signals INDEXED BY signals_expiring"
        " WHERE kept = 1 AND expires_at > ? AND typeof(expires_at) = 'integer' ORDER BY expires_at",
        (now,),
    )
    return [(text_of(owner_key), at) for owner_key, at in rows.fetchall()]


def list_met(
    connection: sqlite3.Connection, after_key: int, limit: int, now: int
) -> list[tuple[int, FlowKey, str]]:
    """Open waits for whose key an unexpired signal is kept, those of the first flows."""
    rows = connection.execute(_MET, (now, after_key)).fetchall()
    flows = list(dict.fromkeys(key for key, *_ in rows))[:limit]
    last = flows[-1] if flows else 0
    return [
        (key, FlowKey(text_of(owner_key), text_of(flow_id)), text_of(wait_key))
        for key, owner_key, flow_id, wait_key in rows
        if key <= last
    ]


# ---- by a token -----------------------------------------------------------------------------------


def find_token(connection: sqlite3.Connection, token: str) -> tuple[FlowKey, str | None] | None:
    """The flow with the wait that a token answers, and the child that stands for it; both rows are checked."""
    task_id: str | None = None
    row = connection.execute(
        "SELECT " + FLOW + " FROM flows AS f WHERE f.wait_token = ?", (token,)
    ).fetchone()
    if row is None:
        row = connection.execute(
            "SELECT " + TASK + " FROM tasks AS t WHERE t.wait_token = ?", (token,)
        ).fetchone()
        if row is None:
            return None
        task = stored_task(*row)
        task_id = task.task_id
        row = _row(connection, _FLOW_BY_KEY, task.flow_key)
    flow = stored_flow(*row)
    return FlowKey(flow.owner_key, flow.flow_id), task_id


# ---- all that are open ----------------------------------------------------------------------------


def list_open_waits(
    connection: sqlite3.Connection, scope: Scope, flow_id: str | None, after_key: int, limit: int
) -> list[StoredFlow | StoredTask]:
    """Flows that wait by themselves and children that wait for one, oldest first, unreadable ones left out."""
    if flow_id is not None:
        named = after_key, key_of(connection, scope, flow_id)
        keys = connection.execute(_OPEN_OF_FLOW, named)
    elif scope.owner_key is not None:
        keys = connection.execute(_OPEN_OF_OWNER, (after_key, scope.owner_key))
    else:
        keys = connection.execute(_OPEN, (after_key,))
    found: list[StoredFlow | StoredTask] = []
    try:
        while len(found) < limit and (row := keys.fetchone()) is not None:
            key, is_task = row
            try:
                one = _open_task(connection, scope, key) if is_task else _open_flow(connection, key)
            except SnapshotUnreadable:
                continue
            if one is not None:
                found.append(one)
    finally:
        keys.close()
    return found


def _open_flow(connection: sqlite3.Connection, key: int) -> StoredFlow | None:
    """The flow, unless it is its children that it waits for."""
    row = _row(connection, _FLOW_BY_KEY, key)
    if row[6] not in _WAITS or row[10:12] == (None, None):
        raise SnapshotUnreadable(f"row {key}", "its index leads to another row")
    flow = stored_flow(*row)
    return flow if waits_itself(flow) else None


def _open_task(connection: sqlite3.Connection, scope: Scope, key: int) -> StoredTask:
    """The child, once its flow's row has said as well whose it is."""
    row = _row(connection, _TASK_BY_KEY, key)
    if row[4] != b"queued" or row[9] is None:
        raise SnapshotUnreadable(f"row {key}", "its index leads to another row")
    task = stored_task(*row)
    if scope.owner_key is not None and key_of(connection, scope, task.flow_id) != task.flow_key:
        raise SnapshotUnreadable(f"task {task.task_id}", "the row of its flow is damaged")
    return task


def _row(connection: sqlite3.Connection, statement: str, key: int) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(statement, (key,)).fetchone()
    if row is None:
        raise SnapshotUnreadable(f"row {key}", "its index leads to nothing")
    return row
