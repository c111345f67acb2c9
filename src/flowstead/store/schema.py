"""The tables of a flowstead file, and the way from every released version of them to this one.

Each table keeps the whole record as JSON text in `doc`; the other columns exist to find rows by. The views
spell the records out for people with a SQLite shell. A file is ours if it carries our application id; a file
of a later schema is refused, an earlier one is brought forward in a single transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

from flowstead.errors import StoreUnusable

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


MIGRATIONS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (_create,)
"""One step from each version to the next; the n-th leads to version n + 1."""

VERSION: Final = len(MIGRATIONS)


def prepare(connection: sqlite3.Connection, name: str) -> None:
    """Bring a file to this schema in one transaction, or refuse it and change nothing.

    Raises:
        StoreUnusable: The file is another program's, or was written by a later version.
    """
    if check(connection, name) == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for migrate in MIGRATIONS[check(connection, name) :]:
            migrate(connection)
        connection.execute("PRAGMA user_version = " + str(VERSION))
        connection.execute("PRAGMA application_id = " + str(APPLICATION_ID))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


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
