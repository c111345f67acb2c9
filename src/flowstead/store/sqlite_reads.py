"""The reads of a SQLite store: plain functions over a connection, run on the reader's worker thread.

Statements are put together from constants only; every value is a parameter. A scope of one owner becomes a
condition of the statement itself, never a filter afterwards.

A record is decoded only once its row's checksum fits. The checksum covers the columns a row is found by, so an
index that leads to the wrong row is found out by the row. What has no record to decode is compared between
index and table.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeVar

from flowstead.errors import SnapshotUnreadable
from flowstead.model.event import Event
from flowstead.model.flow import Flow, FlowKey, StoredFlow
from flowstead.model.task import (
    ACTIVE_TASK_STATUSES,
    StoredTask,
    Task,
    TaskStatus,
    TaskSummary,
)
from flowstead.store import codec
from flowstead.store.port import Due, FlowQuery, Scope, Snapshot
from flowstead.store.sqlite_writes import roll_back
from flowstead.store.summary import count_tasks

T = TypeVar("T")

_PAGE: Final = 500
FLOW: Final = (
    "f.key, f.owner_key, f.flow_id, f.controller_id, f.correlation_id, f.idempotency_key, f.status,"
    " f.ended_at, f.due_at, f.revision, f.wait_key, f.wait_token, f.doc, f.crc"
)
TASK: Final = (
    "t.key, t.task_id, t.flow_key, t.run_id, t.status, t.runtime, t.launched, t.due_at, t.wait_key,"
    " t.wait_token, t.doc, t.crc"
)
EVENT: Final = "e.position, e.flow_key, e.seq, e.doc, e.crc"
_ACTIVE: Final = frozenset(status.value.encode() for status in ACTIVE_TASK_STATUSES)
_STATUSES: Final = frozenset(status.value.encode() for status in TaskStatus)
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
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
                    raise
                # A broken page takes along those whose rows were in it, and nobody else.
                found.append(SnapshotUnreadable(f"flow {key.flow_id}", f"{error}"))
        connection.execute("COMMIT")
    finally:
        roll_back(connection)
    return found


def _load_one(connection: sqlite3.Connection, key: FlowKey) -> Snapshot | None:
    row = connection.execute(
        "SELECT " + FLOW + " FROM flows AS f WHERE f.owner_key = ? AND f.flow_id = ?",
        (key.owner_key, key.flow_id),
    ).fetchone()
    if row is None:
        return None
    doc = codec.flow_doc(row)
    flow = codec.read_stored_flow(doc)
    active, run_ids = _children(connection, flow)
    return Snapshot(
        flow=flow,
        doc=doc,
        active=active,
        run_ids=run_ids,
        last_seq=_whole_history(connection, flow),
    )


def _children(
    connection: sqlite3.Connection, flow: StoredFlow
) -> tuple[list[StoredTask], list[tuple[str, str]]]:
    """A flow's active children, and every run id it has used.

    All rows are checked: one that only seems to have ended, or whose run id is another, is work done twice.
    """
    rows = connection.execute(
        "SELECT " + TASK + " FROM tasks AS t INDEXED BY tasks_by_flow WHERE t.flow_key = ?",
        (flow.key,),
    )
    active: list[StoredTask] = []
    run_ids: list[tuple[str, str]] = []
    try:
        for row in rows:
            doc = codec.task_doc(row)
            if row[4] in _ACTIVE:
                active.append(codec.read_stored_task(doc))
            if row[3] is not None:
                run_ids.append((text_of(row[3]), text_of(row[1])))
    finally:
        rows.close()
    (named,) = connection.execute(
        "SELECT count(*) FROM tasks INDEXED BY tasks_by_run"
        " WHERE flow_key = ? AND run_id IS NOT NULL",
        (flow.key,),
    ).fetchone()
    if named != len(run_ids):
        raise SnapshotUnreadable(f"flow {flow.flow_id}", "some of its tasks are missing")
    active.sort(key=lambda task: task.key)
    return active, run_ids


def _whole_history(connection: sqlite3.Connection, flow: StoredFlow) -> int:
    """The number of a flow's newest event, once none is missing before it nor, as the revision tells, after."""
    count, last = connection.execute(
        "SELECT count(*), max(seq) FROM events WHERE flow_key = ?", (flow.key,)
    ).fetchone()
    if count == 0 or count != last:
        raise SnapshotUnreadable(f"flow {flow.flow_id}", "some of its history is missing")
    row = connection.execute(
        "SELECT " + EVENT + " FROM events AS e WHERE e.flow_key = ? AND e.seq = ?",
        (flow.key, last),
    ).fetchone()
    if row is None or codec.read_event(codec.event_doc(row), 0).revision != flow.revision:
        raise SnapshotUnreadable(f"flow {flow.flow_id}", "the end of its history is missing")
    return int(last)


def find_flow(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> Flow | None:
    """One flow by its whole id."""
    where, values = scoped(scope, ["f.flow_id = ?"], [flow_id])
    row = connection.execute(
        "SELECT " + FLOW + " FROM flows AS f" + where + " ORDER BY f.key DESC LIMIT 1", values
    ).fetchone()
    return None if row is None else _flow(*row)


def _flow(*row: object) -> Flow:
    return codec.read_flow(codec.flow_doc(row))


def _task(*row: object) -> Task:
    return codec.read_task(codec.task_doc(row))


def _event(*row: Any) -> Event:
    return codec.read_event(codec.event_doc(row), row[0])


def key_of(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> int | None:
    """The number of a flow."""
    where, values = scoped(scope, ["f.flow_id = ?"], [flow_id])
    row = connection.execute(
        "SELECT f.key FROM flows AS f" + where + " ORDER BY f.key DESC LIMIT 1", values
    ).fetchone()
    if row is None:
        return None
    # Found by the index; the row itself has to say the same, or another flow's children would be shown.
    named = connection.execute("SELECT owner_key, flow_id FROM flows WHERE key = ?", row).fetchone()
    if (
        named is None
        or text_of(named[1]) != flow_id
        or scope.owner_key not in (None, text_of(named[0]))
    ):
        raise SnapshotUnreadable(f"flow {flow_id}", "its index leads to another row")
    return int(row[0])


def find_by_idempotency_key(
    connection: sqlite3.Connection, owner_key: str, key: str
) -> FlowKey | None:
    """The flow an idempotency key was first used for."""
    row = connection.execute(
        "SELECT " + FLOW + " FROM flows AS f WHERE f.owner_key = ? AND f.idempotency_key = ?",
        (owner_key, key),
    ).fetchone()
    return None if row is None else FlowKey(owner_key, _flow(*row).flow_id)


def list_flows(
    connection: sqlite3.Connection, scope: Scope, query: FlowQuery, limit: int
) -> list[Flow]:
    """Flows newest first, unreadable ones left out."""
    conditions, values = [], list[Any]()
    if query.statuses:
        conditions.append(one_of("f.status", query.statuses))
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
    where, values = scoped(scope, conditions, values)
    rows = connection.execute(
        "SELECT " + FLOW + " FROM flows AS f" + where + " ORDER BY f.key DESC", values
    )
    return readable(rows, _flow, limit)


def readable(rows: sqlite3.Cursor, read: Callable[..., T], limit: int) -> list[T]:
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
    where, values = scoped(scope, ["t.task_id = ?"], [task_id])
    row = connection.execute(
        "SELECT f.owner_key, f.flow_id, " + TASK + " FROM tasks AS t"
        " JOIN flows AS f ON f.key = t.flow_key" + where,
        values,
    ).fetchone()
    if row is None:
        return None
    owner_key, flow_id, *columns = row
    task = _task(*columns)
    if key_of(connection, Scope(text_of(owner_key)), task.flow_id) != columns[2]:
        raise SnapshotUnreadable(f"task {task_id}", "the row of its flow is damaged")
    return FlowKey(text_of(owner_key), text_of(flow_id)), task


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
    return [_task(*row) for row in found]


def _pages(values: list[str]) -> list[list[str]]:
    return [values[start : start + _PAGE] for start in range(0, len(values), _PAGE)]


def _tasks(
    connection: sqlite3.Connection,
    flow_key: int,
    statuses: Collection[str],
    task_ids: Collection[str] | None,
) -> list[tuple[Any, ...]]:
    where, values = "t.flow_key = ?", [flow_key, *statuses]
    if statuses:
        where += " AND " + one_of("t.status", statuses)
    if task_ids is not None:
        where += " AND " + one_of("t.task_id", task_ids)
        values.extend(task_ids)
    return connection.execute(
        "SELECT " + TASK + " FROM tasks AS t WHERE " + where, values
    ).fetchall()


def summarize(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> TaskSummary | None:
    """Counts of a flow's children, from the index alone."""
    flow_key = key_of(connection, scope, flow_id)
    if flow_key is None:
        return None
    rows = connection.execute(
        "SELECT status, runtime, count(*) FROM tasks WHERE flow_key = ? GROUP BY status, runtime",
        (flow_key,),
    ).fetchall()
    if not _STATUSES.issuperset(status for status, _, _ in rows):
        raise SnapshotUnreadable(f"flow {flow_id}", "the row of one of its tasks is damaged")
    counted = [(text_of(status), text_of(runtime), count) for status, runtime, count in rows]
    return count_tasks(counted)


def history(
    connection: sqlite3.Connection, scope: Scope, flow_id: str, after_seq: int, limit: int
) -> list[Event]:
    """A flow's events in order."""
    rows = connection.execute(
        "SELECT " + EVENT + " FROM events AS e WHERE e.flow_key = ? AND e.seq > ? ORDER BY e.seq",
        (key_of(connection, scope, flow_id), after_seq),
    )
    return readable(rows, _event, limit)


def last_seq(connection: sqlite3.Connection, scope: Scope, flow_id: str) -> int:
    """The number of a flow's newest event."""
    row = connection.execute(_LAST_SEQ, (key_of(connection, scope, flow_id),)).fetchone()
    return row[0] or 0


def events_after(
    connection: sqlite3.Connection, scope: Scope, position: int, limit: int
) -> list[Event]:
    """Events of all flows in scope, in commit order."""
    where, values = scoped(scope, ["e.position > ?"], [position])
    rows = connection.execute(
        "SELECT f.flow_id, "
        + EVENT
        + " FROM events AS e JOIN flows AS f ON f.key = e.flow_key"
        + where
        + " ORDER BY e.position",
        values,
    )
    return readable(rows, _event_of, limit)


def _event_of(flow_id: object, *row: Any) -> Event:
    event = _event(*row)
    if event.flow_id != text_of(flow_id):
        raise SnapshotUnreadable(f"event {row[0]}", "it leads to another flow")
    return event


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
    return [Due(at, FlowKey(text_of(owner), text_of(flow_id))) for at, owner, flow_id in rows]


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
        + one_of("controller_id", controllers)
        + ")) ORDER BY key LIMIT ?",
        (after_key, *controllers, limit),
    ).fetchall()
    return [(key, FlowKey(text_of(owner), text_of(flow_id))) for key, owner, flow_id in rows]


def count_by_controller(connection: sqlite3.Connection) -> dict[str, int]:
    """How many queued and running flows each controller has."""
    rows = connection.execute(
        "SELECT controller_id, count(*) FROM flows WHERE ended_at IS NULL"
        " AND status IN ('queued', 'running') AND controller_id IS NOT NULL GROUP BY controller_id"
    ).fetchall()
    return {text_of(controller): count for controller, count in rows}


def scoped(
    scope: Scope, conditions: list[str], values: list[Any], of: str = "f"
) -> tuple[str, list[Any]]:
    """The WHERE clause and its values, bound to one owner unless the scope is everybody."""
    if scope.owner_key is not None:
        conditions = [of + ".owner_key = ?", *conditions]
        values = [scope.owner_key, *values]
    return (" WHERE " + " AND ".join(conditions) if conditions else ""), values


def one_of(column: str, values: Collection[object]) -> str:
    """The condition that a column has one of these values, each of them a parameter."""
    return column + " IN (" + ", ".join("?" * len(values)) + ")"


def text_of(value: object) -> str:
    """An identifier column; damaged bytes become a name that matches nothing rather than an error."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
