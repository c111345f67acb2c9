"""The reads of a SQLite store: plain functions over a connection, run on the reader's worker thread.

Statements are put together from constants only; every value is a parameter. A scope of one owner becomes a
condition of the statement itself, never a filter afterwards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeVar

from flowstead.errors import SnapshotUnreadable
from flowstead.model.event import Event
from flowstead.model.flow import Flow, FlowKey
from flowstead.model.task import Task, TaskSummary
from flowstead.store import codec
from flowstead.store.port import Due, FlowQuery, Scope, Snapshot, Unreadable
from flowstead.store.sqlite_writes import roll_back
from flowstead.store.summary import count_tasks

T = TypeVar("T")

_PAGE: Final = 500
_LAST_SEQ: Final = "SELECT max(seq) FROM events WHERE flow_key = ? AND typeof(seq) = 'integer'"


def load(
    connection: sqlite3.Connection, keys: Sequence[FlowKey]
) -> list[Snapshot | Exception | None]:
    """Snapshots of several flows in one read transaction."""
    found: list[Snapshot | Exception | None] = []
    try:
        connection.execute("BEGIN")
        for key in keys:
            try:
                found.append(_load_one(connection, key))
            except SnapshotUnreadable as error:
                found.append(error)
        connection.execute("COMMIT")
    finally:
        roll_back(connection)
    return found


def _load_one(connection: sqlite3.Connection, key: FlowKey) -> Snapshot | None:
    row = connection.execute(
        "SELECT key, doc FROM flows WHERE owner_key = ? AND flow_id = ?",
        (key.owner_key, key.flow_id),
    ).fetchone()
    if row is None:
        return None
    flow_key, doc = row
    flow = codec.read_stored_flow(_text(doc))
    active = connection.execute(
        "SELECT doc FROM tasks WHERE flow_key = ? AND status IN ('queued', 'running') ORDER BY key",
        (flow_key,),
    ).fetchall()
    run_ids = connection.execute(
        "SELECT run_id, task_id FROM tasks WHERE flow_key = ? AND run_id IS NOT NULL", (flow_key,)
    ).fetchall()
    (last_seq,) = connection.execute(_LAST_SEQ, (flow_key,)).fetchone()
    return Snapshot(
        flow=flow,
        doc=doc,
        active=[codec.read_stored_task(_text(doc)) for (doc,) in active],
        run_ids=[(_id(run_id), _id(task_id)) for run_id, task_id in run_ids],
        last_seq=last_seq or 0,
    )


def find_flow(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> Flow | None:
    """One flow by its whole id."""
    where, values = _scoped(scope, ["f.flow_id = ?"], [flow_id])
    row = connection.execute(
        "SELECT f.doc FROM flows AS f" + where + " ORDER BY f.key DESC LIMIT 1", values
    ).fetchone()
    return None if row is None else codec.read_flow(_text(row[0]))


def key_of(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> int | None:
    """The number of a flow."""
    where, values = _scoped(scope, ["f.flow_id = ?"], [flow_id])
    row = connection.execute(
        "SELECT f.key FROM flows AS f" + where + " ORDER BY f.key DESC LIMIT 1", values
    ).fetchone()
    return None if row is None else int(row[0])


def find_by_idempotency_key(
    connection: sqlite3.Connection, owner_key: str, key: str
) -> FlowKey | None:
    """The flow an idempotency key was first used for."""
    row = connection.execute(
        "SELECT flow_id FROM flows WHERE owner_key = ? AND idempotency_key = ?", (owner_key, key)
    ).fetchone()
    return None if row is None else FlowKey(owner_key, _id(row[0]))


def list_flows(
    connection: sqlite3.Connection, scope: Scope, query: FlowQuery, limit: int
) -> list[Flow]:
    """Flows newest first, unreadable ones left out."""
    conditions, values = [], list[Any]()
    if query.statuses:
        conditions.append(_one_of("f.status", query.statuses))
        values.extend(query.statuses)
    if query.controller_id is not None:
        conditions.append("f.controller_id = ?")
        values.append(query.controller_id)
    if query.correlation_id is not None:
        conditions.append("f.correlation_id = ?")
        values.append(query.correlation_id)
    if query.id_prefix is not None:
        conditions.append("f.flow_id >= ?")
        values.append(query.id_prefix)
        if (beyond := _after_prefix(query.id_prefix)) is not None:
            conditions.append("f.flow_id < ?")
            values.append(beyond)
    if query.live:
        conditions.append("f.ended_at IS NULL")
    if query.before_key is not None:
        conditions.append("f.key < ?")
        values.append(query.before_key)
    where, values = _scoped(scope, conditions, values)
    rows = connection.execute(
        "SELECT f.doc FROM flows AS f" + where + " ORDER BY f.key DESC", values
    )
    return _readable(rows, lambda doc: codec.read_flow(_text(doc)), limit)


def _readable(rows: sqlite3.Cursor, read: Callable[..., T], limit: int) -> list[T]:
    """The first readable records of a query, as many as asked for; the others take no place in a page."""
    found: list[T] = []
    try:
        while len(found) < limit and (row := rows.fetchone()) is not None:
            try:
                found.append(read(*row))
            except SnapshotUnreadable:
                continue
    finally:
        # An open cursor is a read transaction, and would keep the log from being folded back.
        rows.close()
    return found


def _after_prefix(prefix: str) -> str | None:
    """The first text after all that begin with the prefix; None if there is none."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)


def find_task(
    connection: sqlite3.Connection, scope: Scope, task_id: str
) -> tuple[FlowKey, Task] | None:
    """One child and the flow it belongs to."""
    where, values = _scoped(scope, ["t.task_id = ?"], [task_id])
    row = connection.execute(
        "SELECT f.owner_key, f.flow_id, t.doc FROM tasks AS t JOIN flows AS f ON f.key = t.flow_key"
        + where,
        values,
    ).fetchone()
    if row is None:
        return None
    owner_key, flow_id, doc = row
    return FlowKey(_id(owner_key), _id(flow_id)), codec.read_task(_text(doc))


def list_tasks(
    connection: sqlite3.Connection,
    scope: Scope,
    flow_id: str,
    statuses: Collection[str],
    task_ids: Collection[str] | None,
) -> list[Task]:
    """A flow's children, oldest first."""
    flow_key = key_of(connection, scope, flow_id)
    if flow_key is None:
        return []
    wanted = [None] if task_ids is None else _pages(list(dict.fromkeys(task_ids)))
    found = [row for page in wanted for row in _tasks(connection, flow_key, statuses, page)]
    found.sort(key=lambda row: row[0])
    return [codec.read_task(_text(doc)) for _, doc in found]


def _pages(values: list[str]) -> list[list[str]]:
    return [values[start : start + _PAGE] for start in range(0, len(values), _PAGE)]


def _tasks(
    connection: sqlite3.Connection,
    flow_key: int,
    statuses: Collection[str],
    task_ids: Collection[str] | None,
) -> list[tuple[int, bytes]]:
    where, values = "flow_key = ?", [flow_key, *statuses]
    if statuses:
        where += " AND " + _one_of("status", statuses)
    if task_ids is not None:
        where += " AND " + _one_of("task_id", task_ids)
        values.extend(task_ids)
    return connection.execute("SELECT key, doc FROM tasks WHERE " + where, values).fetchall()


def summarize(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> TaskSummary | None:
    """Counts of a flow's children, from the index alone."""
    flow_key = key_of(connection, scope, flow_id)
    if flow_key is None:
        return None
    rows = connection.execute(
        "SELECT status, runtime, count(*) FROM tasks WHERE flow_key = ? GROUP BY status, runtime",
        (flow_key,),
    ).fetchall()
    counted = [(_id(status), _id(runtime), count) for status, runtime, count in rows]
    return count_tasks(counted)


def history(
    connection: sqlite3.Connection, scope: Scope, flow_id: str, after_seq: int, limit: int
) -> list[Event]:
    """A flow's events in order."""
    rows = connection.execute(
        "SELECT doc, position FROM events WHERE flow_key = ? AND seq > ? ORDER BY seq",
        (key_of(connection, scope, flow_id), after_seq),
    )
    return _readable(rows, _event, limit)


def _event(doc: object, position: int) -> Event:
    return codec.read_event(_text(doc), position)


def last_seq(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> int:
    """The number of a flow's newest event."""
    row = connection.execute(_LAST_SEQ, (key_of(connection, scope, flow_id),)).fetchone()
    return row[0] or 0


def events_after(
    connection: sqlite3.Connection, scope: Scope, position: int, limit: int
) -> list[Event]:
    """Events of all flows in scope, in commit order."""
    where, values = _scoped(scope, ["e.position > ?"], [position])
    rows = connection.execute(
        "SELECT e.doc, e.position FROM events AS e JOIN flows AS f ON f.key = e.flow_key"
        + where
        + " ORDER BY e.position",
        values,
    )
    return _readable(rows, _event, limit)


def last_position(connection: sqlite3.Connection) -> int:
    """The position of the newest event ever written."""
    return int(connection.execute("SELECT last_position FROM ownership").fetchone()[0])


def list_due(connection: sqlite3.Connection, after: int, until: int) -> list[Due]:
    """Ticks in (after, until]: cancels whose grace ends, children whose retry is due."""
    rows = connection.execute(
        "SELECT due_at, owner_key, flow_id FROM flows"
        " WHERE due_at > ?1 AND due_at <= ?2 AND typeof(due_at) = 'integer'"
        " UNION ALL SELECT t.due_at, f.owner_key, f.flow_id FROM tasks AS t"
        " JOIN flows AS f ON f.key = t.flow_key"
        " WHERE t.due_at > ?1 AND t.due_at <= ?2 AND typeof(t.due_at) = 'integer'",
        (after, until),
    ).fetchall()
    return [Due(at, FlowKey(_id(owner), _id(flow_id))) for at, owner, flow_id in rows]


def next_due(connection: sqlite3.Connection, after: int) -> int | None:
    """The first tick later than an instant."""
    rows = connection.execute(
        "SELECT min(due_at) FROM flows WHERE due_at > ?1 AND typeof(due_at) = 'integer'"
        " UNION ALL"
        " SELECT min(due_at) FROM tasks WHERE due_at > ?1 AND typeof(due_at) = 'integer'",
        (after,),
    ).fetchall()
    return min((at for (at,) in rows if at is not None), default=None)


def list_unfinished(
    connection: sqlite3.Connection, controllers: Collection[str], after_key: int, limit: int
) -> list[tuple[int, FlowKey]]:
    """Flows a new owner has to set in motion, oldest first."""
    rows = connection.execute(
        "SELECT key, owner_key, flow_id FROM flows WHERE key > ? AND ("
        + " key IN (SELECT flow_key FROM tasks"
        " WHERE launched = 1 AND status IN ('queued', 'running'))"
        " OR (ended_at IS NULL AND status IN ('queued', 'running') AND "
        + _one_of("controller_id", controllers)
        + ")) ORDER BY key LIMIT ?",
        (after_key, *controllers, limit),
    ).fetchall()
    return [(key, FlowKey(_id(owner), _id(flow_id))) for key, owner, flow_id in rows]


def count_by_controller(connection: sqlite3.Connection) -> dict[str, int]:
    """How many queued and running flows each controller has."""
    rows = connection.execute(
        "SELECT controller_id, count(*) FROM flows WHERE ended_at IS NULL"
        " AND status IN ('queued', 'running') AND controller_id IS NOT NULL GROUP BY controller_id"
    ).fetchall()
    return {_id(controller): count for controller, count in rows}


def list_unreadable(connection: sqlite3.Connection) -> list[Unreadable]:
    """Every row whose record cannot be read."""
    tables: list[tuple[str, str, Any]] = [
        ("flows", "SELECT key, doc FROM flows", codec.read_stored_flow),
        ("tasks", "SELECT key, doc FROM tasks", codec.read_stored_task),
        ("events", "SELECT position, doc FROM events", lambda doc: codec.read_event(doc, 0)),
    ]
    found = []
    for table, statement, read in tables:
        for key, doc in connection.execute(statement):
            try:
                read(_text(doc))
            except SnapshotUnreadable as error:
                found.append(Unreadable(table=table, key=key, problem=str(error)))
    return found


def _scoped(scope: Scope, conditions: list[str], values: list[Any]) -> tuple[str, list[Any]]:
    """The WHERE clause and its values, bound to one owner unless the scope is everybody."""
    if scope.owner_key is not None:
        conditions = ["f.owner_key = ?", *conditions]
        values = [scope.owner_key, *values]
    return (" WHERE " + " AND ".join(conditions) if conditions else ""), values


def _one_of(column: str, values: Collection[object]) -> str:
    return column + " IN (" + ", ".join("?" * len(values)) + ")"


def _id(value: object) -> str:
    """An identifier column; damaged bytes become a name that matches nothing rather than an error."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _text(doc: object) -> bytes:
    """A document as it came from a column whose declared type SQLite does not enforce."""
    if not isinstance(doc, bytes):
        raise SnapshotUnreadable("a row", f"its document is {type(doc).__name__}, not text")
    return doc
