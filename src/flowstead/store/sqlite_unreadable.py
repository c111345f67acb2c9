# ruff: noqa: S608 - statements are joined from constants; values are bound
"""What is wrong with a SQLite file, row by row and as a whole: it reads everything, for operators."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from flowstead.errors import SnapshotUnreadable
from flowstead.store import codec, schema
from flowstead.store.port import Unreadable
from flowstead.store.sqlite_outbox import UPDATE, stored_update
from flowstead.store.sqlite_reads import EVENT, FLOW, TASK, text_of
from flowstead.store.sqlite_waits import SIGNAL, stored_flow, stored_signal, stored_task

_CHILDREN_OF_NOBODY: Final = (
    "SELECT t.key, t.task_id FROM tasks AS t LEFT JOIN flows AS f ON f.key = t.flow_key"
    " WHERE f.key IS NULL"
)
_UPDATES_OF_NOBODY: Final = (
    "SELECT u.key, u.key FROM updates AS u LEFT JOIN flows AS f ON f.key = u.flow_key"
    " WHERE f.key IS NULL"
)


def list_unreadable(connection: sqlite3.Connection) -> list[Unreadable]:
    """Every row whose record cannot be read, and what is wrong with the file as a whole, under key 0."""
    found = []
    for table, statement, read in (
        ("flows", "SELECT " + FLOW + " FROM flows AS f", stored_flow),
        ("tasks", "SELECT " + TASK + " FROM tasks AS t", stored_task),
        ("events", "SELECT " + EVENT + " FROM events AS e", _event),
        ("signals", "SELECT " + SIGNAL + " FROM signals AS s", stored_signal),
        ("updates", "SELECT " + UPDATE + " FROM updates AS u", stored_update),
    ):
        try:
            for row in connection.execute(statement):
                try:
                    read(*row)
                except SnapshotUnreadable as error:
                    found.append(Unreadable(table=table, key=row[0], problem=str(error)))
        except sqlite3.DatabaseError as error:
            told = f"{table} cannot be read to the end: {error}"
            found.append(Unreadable(table="file", key=0, problem=told))
    found += _orphans(connection)
    return found + [Unreadable(table="file", key=0, problem=told) for told in _ails(connection)]


def _orphans(connection: sqlite3.Connection) -> list[Unreadable]:
    """Children and updates whose flow is not there: nobody finds them, so nobody would miss them."""
    found = []
    for table, kind, statement in (
        ("tasks", "task", _CHILDREN_OF_NOBODY),
        ("updates", "update", _UPDATES_OF_NOBODY),
    ):
        try:
            rows = connection.execute(statement).fetchall()
        except sqlite3.DatabaseError:
            # A table that cannot be read to its end is told of already.
            continue
        for key, name in rows:
            told = f"{kind} {text_of(name)} belongs to no flow"
            found.append(Unreadable(table=table, key=key, problem=told))
    return found


def _ails(connection: sqlite3.Connection) -> list[str]:
    """What is wrong with the file beyond single rows. SQLite may give up in the midst of looking."""
    told = []
    for look in (schema.find_missing, schema.find_faults):
        try:
            told += look(connection)
        except sqlite3.DatabaseError as error:
            told.append(str(error))
    return told


def _event(*row: Any) -> object:
    return codec.read_event(codec.event_doc(row), row[0])
