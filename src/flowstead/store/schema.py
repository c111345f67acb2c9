"""The tables of a flowstead file, and the way from every released version of them to this one.

Each table keeps the whole record as JSON text in `doc`; the other columns exist to find rows by. The views
spell the records out for people with a SQLite shell. A file is ours if it carries our application id; a file
of a later schema is refused, an earlier one is brought forward in a single transaction.

SQLite itself notices little of what can happen to a file. So a row has a checksum in `crc`, the ownership row
says how many rows there are and which file this is, and `inspect` compares before a file is used.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from typing import Any, Final

import msgspec

from flowstead.errors import SnapshotUnreadable, StoreUnusable
from flowstead.rules.wait_keys import wait_key_in
from flowstead.store import codec
from flowstead.store.codec import FlowRow

APPLICATION_ID: Final = 0x464C5354  # "FLST"

_V1: Final = """
CREATE TABLE ownership (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL,
    commits INTEGER NOT NULL,
    last_position INTEGER NOT NULL,
    holder TEXT NOT NULL
);
INSERT INTO ownership VALUES (1, 0, 0, 0, '');

CREATE TABLE flows (
    key INTEGER PRIMARY KEY,
    owner_key TEXT NOT NULL,
    flow_id TEXT NOT NULL,
    controller_id TEXT,
    correlation_id TEXT,
    idempotency_key TEXT,
    status TEXT NOT NULL,
    ended_at INTEGER,
    due_at INTEGER,
    revision INTEGER NOT NULL,
    doc TEXT NOT NULL
);
CREATE UNIQUE INDEX flows_by_id ON flows (owner_key, flow_id);
CREATE UNIQUE INDEX flows_by_idempotency_key ON flows (owner_key, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX flows_by_owner ON flows (owner_key, key);
CREATE INDEX flows_by_correlation ON flows (owner_key, correlation_id)
    WHERE correlation_id IS NOT NULL;
CREATE INDEX flows_live ON flows (controller_id) WHERE ended_at IS NULL;
CREATE INDEX flows_due ON flows (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE tasks (
    key INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    flow_key INTEGER NOT NULL,
    run_id TEXT,
    status TEXT NOT NULL,
    runtime TEXT NOT NULL,
    launched INTEGER NOT NULL,
    due_at INTEGER,
    doc TEXT NOT NULL
);
CREATE INDEX tasks_by_flow ON tasks (flow_key, status, runtime);
CREATE UNIQUE INDEX tasks_by_run ON tasks (flow_key, run_id) WHERE run_id IS NOT NULL;
CREATE INDEX tasks_launched ON tasks (flow_key)
    WHERE launched = 1 AND status IN ('queued', 'running');
CREATE INDEX tasks_due ON tasks (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    flow_key INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    doc TEXT NOT NULL
);
CREATE UNIQUE INDEX events_by_flow ON events (flow_key, seq);

CREATE VIEW v_flows AS SELECT
    flow_id, owner_key, status, revision, controller_id, correlation_id,
    json_extract(record, '$.goal') AS goal,
    json_extract(record, '$.currentStep') AS current_step,
    json_extract(record, '$.stateJson') AS state_json,
    json_extract(record, '$.waitJson') AS wait_json,
    json_extract(record, '$.blockedSummary') AS blocked_summary,
    datetime(json_extract(record, '$.createdAt') / 1000.0, 'unixepoch') AS created,
    datetime(json_extract(record, '$.updatedAt') / 1000.0, 'unixepoch') AS updated,
    datetime(ended_at / 1000.0, 'unixepoch') AS ended
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM flows);

CREATE VIEW v_tasks AS SELECT
    f.flow_id, f.owner_key, t.task_id, t.run_id, t.runtime, t.status,
    json_extract(t.record, '$.task') AS task,
    json_extract(t.record, '$.attempt') AS attempt,
    json_extract(t.record, '$.resultJson') AS result_json,
    json_extract(t.record, '$.failure.message') AS failure
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM tasks) AS t
JOIN flows AS f ON f.key = t.flow_key;

CREATE VIEW v_history AS SELECT
    f.flow_id, f.owner_key, e.seq, e.position,
    json_extract(e.record, '$.revision') AS revision,
    datetime(json_extract(e.record, '$.at') / 1000.0, 'unixepoch') AS at,
    json_extract(e.record, '$.type') AS type,
    json_extract(e.record, '$.actor') AS actor,
    json_extract(e.record, '$.changed') AS changed
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM events) AS e
JOIN flows AS f ON f.key = e.flow_key;
"""


def _create(connection: sqlite3.Connection) -> None:
    # executescript would commit the transaction this runs in, so the statements go one by one.
    for statement in _V1.split(";\n"):
        if statement.strip():
            connection.execute(statement)


_V2: Final = (
    "ALTER TABLE flows ADD COLUMN crc INTEGER",
    "ALTER TABLE tasks ADD COLUMN crc INTEGER",
    "ALTER TABLE events ADD COLUMN crc INTEGER",
    "ALTER TABLE ownership ADD COLUMN flows INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE ownership ADD COLUMN tasks INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE ownership ADD COLUMN events INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE ownership ADD COLUMN file TEXT NOT NULL DEFAULT ''",
    "UPDATE ownership SET flows = (SELECT count(*) FROM flows),"
    " tasks = (SELECT count(*) FROM tasks), events = (SELECT count(*) FROM events),"
    " last_position = max(last_position, (SELECT ifnull(max(position), 0) FROM events)),"
    " file = lower(hex(randomblob(16)))",
)

# Of each table: what to read in pages, where its checksum goes, and which field of the record each column
# repeats, from the first on; "-" for a column that repeats none.
_V2_ROWS: Final = (
    (
        "SELECT key, owner_key, flow_id, controller_id, correlation_id, idempotency_key, status,"
        " ended_at, due_at, revision, doc FROM flows WHERE key > ? ORDER BY key LIMIT 500",
        "UPDATE flows SET crc = ? WHERE key = ?",
        "key ownerKey flowId controllerId correlationId idempotencyKey status endedAt - revision",
    ),
    (
        "SELECT key, task_id, flow_key, run_id, status, runtime, launched, due_at, doc FROM tasks"
        " WHERE key > ? ORDER BY key LIMIT 500",
        "UPDATE tasks SET crc = ? WHERE key = ?",
        "key taskId flowKey runId status runtime - nextAttemptAt",
    ),
    (
        "SELECT position, flow_key, seq, doc FROM events"
        " WHERE position > ? ORDER BY position LIMIT 500",
        "UPDATE events SET crc = ? WHERE position = ?",
        "- - seq",
    ),
)


def _add_checks(connection: sqlite3.Connection) -> None:
    for statement in _V2:
        connection.execute(statement)
    for select, update, fields in _V2_ROWS:
        last = -(2**63)
        while page := connection.execute(select, (last,)).fetchall():
            last = page[-1][0]
            found = [(_first_crc(row, fields.split()), row[0]) for row in page]
            connection.executemany(update, found)


def _first_crc(row: tuple[Any, ...], fields: list[str]) -> int | None:
    """The checksum of a row that had none, or None: a row that contradicts itself is not vouched for."""
    *columns, doc = row
    try:
        record = msgspec.json.decode(doc)
        for field, column in zip(fields, columns, strict=False):
            stored = column.decode() if isinstance(column, bytes) else column
            if field != "-" and stored != record.get(field):
                return None
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, AttributeError, RecursionError):
        return None
    if fields[-1] != "seq":
        return codec.stored_crc(columns, doc)
    position, *columns = columns
    return codec.at_position(codec.stored_crc(columns, doc) or 0, position)


_V3: Final = (
    "ALTER TABLE flows ADD COLUMN wait_key TEXT",
    "ALTER TABLE flows ADD COLUMN wait_token TEXT",
    "ALTER TABLE tasks ADD COLUMN wait_key TEXT",
    "ALTER TABLE tasks ADD COLUMN wait_token TEXT",
    "CREATE INDEX flows_by_wait ON flows (wait_key, status) WHERE wait_key IS NOT NULL",
    "CREATE INDEX flows_by_token ON flows (wait_token) WHERE wait_token IS NOT NULL",
    """CREATE INDEX flows_waiting ON flows (owner_key, key)
    WHERE status IN ('waiting', 'blocked') AND (wait_key IS NOT NULL OR wait_token IS NOT NULL)""",
    "CREATE INDEX tasks_by_wait ON tasks (wait_key, status) WHERE wait_key IS NOT NULL",
    "CREATE INDEX tasks_by_token ON tasks (wait_token) WHERE wait_token IS NOT NULL",
    "CREATE INDEX tasks_waiting ON tasks (key) WHERE status = 'queued' AND wait_token IS NOT NULL",
    """CREATE TABLE signals (
    key INTEGER PRIMARY KEY,
    owner_key TEXT NOT NULL,
    wait_key TEXT NOT NULL,
    signal_id TEXT,
    kept INTEGER NOT NULL,
    expires_at INTEGER,
    doc TEXT NOT NULL,
    crc INTEGER
)""",
    # Of signals without an id there may be any number: to SQLite no two of them are the same.
    "CREATE UNIQUE INDEX signals_by_id ON signals (owner_key, signal_id)",
    "CREATE INDEX signals_kept ON signals (wait_key, key) WHERE kept = 1",
    "CREATE INDEX signals_expiring ON signals (expires_at) WHERE kept = 1",
    """CREATE TABLE updates (
    key INTEGER PRIMARY KEY,
    owner_key TEXT NOT NULL,
    flow_key INTEGER NOT NULL,
    slot TEXT NOT NULL,
    status TEXT NOT NULL,
    due_at INTEGER,
    version INTEGER NOT NULL,
    bucket TEXT,
    doc TEXT NOT NULL,
    crc INTEGER
)""",
    "CREATE UNIQUE INDEX updates_by_slot ON updates (flow_key, slot)",
    "CREATE INDEX updates_by_owner ON updates (owner_key, key)",
    "CREATE INDEX updates_due ON updates (due_at) WHERE status = 'pending' AND bucket IS NULL",
    "CREATE INDEX digests_due ON updates (due_at) WHERE status = 'pending' AND bucket IS NOT NULL",
    "ALTER TABLE ownership ADD COLUMN signals INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE ownership ADD COLUMN updates INTEGER NOT NULL DEFAULT 0",
    "DROP VIEW v_tasks",
    """CREATE VIEW v_tasks AS SELECT
    f.flow_id, f.owner_key, t.task_id, t.run_id, t.runtime, t.status,
    json_extract(t.record, '$.task') AS task,
    json_extract(t.record, '$.attempt') AS attempt,
    json_extract(t.record, '$.resultJson') AS result_json,
    json_extract(t.record, '$.failure.message') AS failure,
    json_extract(t.record, '$.wait.key') AS waits_for,
    json_extract(t.record, '$.wait.prompt') AS prompt,
    datetime(json_extract(t.record, '$.wait.deadlineAt') / 1000.0, 'unixepoch') AS deadline
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM tasks) AS t
JOIN flows AS f ON f.key = t.flow_key""",
    """CREATE VIEW v_updates AS SELECT
    f.flow_id, f.owner_key, u.slot, u.status,
    json_extract(u.record, '$.kind') AS kind,
    json_extract(u.record, '$.text') AS text,
    json_extract(u.record, '$.attempt') AS attempt,
    json_extract(u.record, '$.failure') AS failure,
    u.bucket,
    json_extract(u.record, '$.idempotencyKey') AS idempotency_key,
    datetime(json_extract(u.record, '$.createdAt') / 1000.0, 'unixepoch') AS created,
    datetime(u.due_at / 1000.0, 'unixepoch') AS due,
    datetime(json_extract(u.record, '$.deliveredAt') / 1000.0, 'unixepoch') AS delivered
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM updates) AS u
JOIN flows AS f ON f.key = u.flow_key""",
)


def _add_waits(connection: sqlite3.Connection) -> None:
    for statement in _V3:
        connection.execute(statement)
    last = -(2**63)
    while page := connection.execute(
        "SELECT key, owner_key, flow_id, controller_id, correlation_id, idempotency_key, status,"
        " ended_at, due_at, revision, wait_key, wait_token, doc, crc FROM flows WHERE key > ?"
        " AND status IN ('waiting', 'blocked') ORDER BY key LIMIT 500",
        (last,),
    ).fetchall():
        last = page[-1][0]
        found = [row for stored in page if (row := _with_wait_key(stored)) is not None]
        connection.executemany(
            "UPDATE flows SET wait_key = ?, doc = ?, crc = ? WHERE key = ?",
            [(row.wait_key, row.doc, codec.flow_crc(row), row.key) for row in found],
        )


def _with_wait_key(stored: tuple[Any, ...]) -> FlowRow | None:
    """A flow that waits for something, as a signal can find it; a row that cannot be read is left as it is."""
    try:
        flow = codec.read_stored_flow(codec.flow_doc(stored))
    except SnapshotUnreadable:
        return None
    wait_key = wait_key_in(flow.owner_key, flow.wait_json)
    if wait_key is None:
        return None
    flow = msgspec.structs.replace(flow, wait_key=wait_key)
    doc = codec.encode(flow)
    return codec.flow_row(flow, doc, due_at=stored[8], expected_revision=None)


MIGRATIONS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (
    _create,
    _add_checks,
    _add_waits,
)
"""One step from each version to the next; the n-th leads to version n + 1."""

VERSION: Final = len(MIGRATIONS)


def prepare(connection: sqlite3.Connection, name: str) -> bool:
    """Bring a file to this schema in one transaction, or refuse it and change nothing.

    Answers whether there was anything to do.

    Raises:
        StoreUnusable: The file is another program's, or was written by a later version.
    """
    if check(connection, name) == VERSION:
        return False
    connection.execute("BEGIN IMMEDIATE")
    try:
        for migrate in MIGRATIONS[check(connection, name) :]:
            migrate(connection)
        connection.execute("PRAGMA user_version = " + str(VERSION))
        connection.execute("PRAGMA application_id = " + str(APPLICATION_ID))
        if missing := find_missing(connection):
            told = ", ".join(missing)
            raise StoreUnusable(name, f"it is damaged ({told}). It was left as it is.")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return True


def check(connection: sqlite3.Connection, name: str) -> int:
    """The schema version of a file that is ours or empty; reads only.

    Raises:
        StoreUnusable: The file is another program's, or was written by a later version.
    """
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if application == 0 and version == 0 and tables == 0:
        return 0
    if application != APPLICATION_ID:
        raise StoreUnusable(name, "it is a database of another program. It was not changed.")
    if version > VERSION:
        raise StoreUnusable(
            name,
            f"it has schema version {version}, and this flowstead knows versions up to {VERSION}."
            " Install the newer release. The file was not changed.",
        )
    if version < 1:
        raise StoreUnusable(name, "its schema version is missing. It was not changed.")
    return version


# ---- is everything there? -------------------------------------------------------------------------

_NAMES: Final = frozenset(
    [
        "ownership",
        "flows",
        "tasks",
        "events",
        "signals",
        "updates",
        "flows_by_id",
        "flows_by_idempotency_key",
        "flows_by_owner",
        "flows_by_correlation",
        "flows_live",
        "flows_due",
        "flows_by_wait",
        "flows_by_token",
        "flows_waiting",
        "tasks_by_flow",
        "tasks_by_run",
        "tasks_launched",
        "tasks_due",
        "tasks_by_wait",
        "tasks_by_token",
        "tasks_waiting",
        "events_by_flow",
        "signals_by_id",
        "signals_kept",
        "signals_expiring",
        "updates_by_slot",
        "updates_by_owner",
        "updates_due",
        "digests_due",
        "v_flows",
        "v_tasks",
        "v_history",
        "v_updates",
    ]
)
_COUNTERS: Final = (
    "epoch",
    "commits",
    "last_position",
    "flows",
    "tasks",
    "events",
    "signals",
    "updates",
)
# None of these reads a record. SQLite counts a table by its smallest index, page by page.
_COUNTS: Final = (
    ("flows", "SELECT count(*) FROM flows"),
    ("tasks", "SELECT count(*) FROM tasks"),
    ("events", "SELECT count(*) FROM events"),
    ("signals", "SELECT count(*) FROM signals"),
    ("updates", "SELECT count(*) FROM updates"),
    # The other indexes that know every row: one that lost an entry would hide a row there is.
    ("flows", "SELECT count(flow_id) FROM flows INDEXED BY flows_by_id"),
    ("tasks", "SELECT count(status) FROM tasks INDEXED BY tasks_by_flow"),
    ("updates", "SELECT count(owner_key) FROM updates INDEXED BY updates_by_owner"),
)


def inspect(connection: sqlite3.Connection, name: str, *, whole: bool) -> None:
    """See that nothing is missing from a file that is ours; reads only. An older one knows of no totals.

    With `whole`, every page and every entry of every index is looked at: as slow as the file is long.

    Raises:
        StoreUnusable: Something is missing, or the file's structure is broken.
        sqlite3.DatabaseError: It is so broken that SQLite gave up.
    """
    if whole and (problems := find_faults(connection)):
        raise StoreUnusable(name, f"it is damaged ({problems[0]}). It was left as it is.")
    if check(connection, name) == VERSION and (missing := find_missing(connection)):
        told = ", ".join(missing)
        raise StoreUnusable(name, f"it is damaged ({told}). It was left as it is.")


def find_faults(connection: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong with pages and indexes, in its own words. Reads the whole file."""
    # A column with a value that does not belong there is one row's fault, and that row's checksum tells.
    return [
        text
        for (line,) in connection.execute("PRAGMA integrity_check").fetchall()
        if (text := codec.plain(line)) != "ok" and " value in " not in text
    ]


def find_missing(connection: sqlite3.Connection) -> list[str]:
    """What the ownership row says should be there and is not, in plain words. Reads no record."""
    found = {codec.plain(row[0]) for row in connection.execute("SELECT name FROM sqlite_master")}
    if gone := sorted(_NAMES - found):
        return [f"{gone[0]} is missing"]
    rows = connection.execute(
        "SELECT epoch, commits, last_position, flows, tasks, events, signals, updates"
        " FROM ownership"
    ).fetchall()
    if len(rows) != 1:
        return ["its ownership row is missing"]
    if not all(type(value) is int and value >= 0 for value in rows[0]):
        return ["its ownership row says no numbers"]
    said = dict(zip(_COUNTERS, rows[0], strict=True))
    missing = []
    for table, statement in _COUNTS:
        [(count,)] = connection.execute(statement).fetchall()
        if count < said[table]:
            missing.append(f"{said[table] - count} of {said[table]} {table} are missing")
        elif count > said[table]:
            missing.append(f"there are {count} {table}, and {said[table]} were written")
    missing = list(dict.fromkeys(missing))
    [(newest,)] = connection.execute("SELECT ifnull(max(position), 0) FROM events").fetchall()
    if newest != said["last_position"] and not missing:
        missing.append(f"the newest event is {newest}, and {said['last_position']} were written")
    return missing


def file_id(connection: sqlite3.Connection) -> bytes | None:
    """Which file this is; None where that cannot be said, as when power was cut while the page was written."""
    try:
        found = connection.execute("SELECT file FROM ownership").fetchall()
    except sqlite3.DatabaseError:
        return None
    name = found[0][0] if found else None
    # Read without its log a page may be torn: only what looks like an id is one.
    return name if isinstance(name, bytes) and re.fullmatch(b"[0-9a-f]{32}", name) else None
