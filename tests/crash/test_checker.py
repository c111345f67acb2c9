"""The checks of a file can fail: each kind of damage is found, and said to be where it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests import invariants
from tests.crash.harness import Zygote

pytestmark = pytest.mark.crash

FLOW = "(SELECT key FROM flows WHERE flow_id = '{}')"
DAMAGE = {
    "an event is missing": (
        f"DELETE FROM events WHERE seq = 2 AND flow_key = {FLOW.format('queued')}",
        "flow queued: seqs are",
    ),
    "the last event is missing": (
        f"DELETE FROM events WHERE flow_key = {FLOW.format('waiting')} AND seq ="
        f" (SELECT max(seq) FROM events WHERE flow_key = {FLOW.format('waiting')})",
        "flow waiting: stored revision 1, history says 0",
    ),
    "a revision is skipped": (
        "UPDATE flows SET revision = revision + 1,"
        " doc = json_set(doc, '$.revision', revision + 1) WHERE flow_id = 'running'",
        "flow running: stored revision 1, history says 0",
    ),
    "a column differs": (
        "UPDATE flows SET status = 'queued' WHERE flow_id = 'waiting'",
        "flow waiting: column status is 'queued'",
    ),
    "the state is another": (
        "UPDATE flows SET doc = json_set(doc, '$.stateJson', json('{}')) WHERE flow_id = 'done'",
        "flow done: stateJson is stored as {}",
    ),
    "the intent is forgotten": (
        "UPDATE flows SET doc = json_remove(doc, '$.cancelRequestedAt'), due_at = NULL"
        " WHERE flow_id = 'asked'",
        "flow asked: cancelRequestedAt is stored as None",
    ),
    "the end is taken back": (
        "UPDATE flows SET status = 'queued', ended_at = NULL,"
        " doc = json_remove(json_set(doc, '$.status', 'queued'), '$.endedAt')"
        " WHERE flow_id = 'done'",
        "flow done: status is stored as 'queued'",
    ),
    "something happens after the end": (
        "INSERT INTO events SELECT (SELECT max(position) + 1 FROM events), flow_key, seq + 1,"
        " json_set(doc, '$.seq', seq + 1, '$.type', 'flow.updated', '$.changed', json('{}'),"
        " '$.revision', json_extract(doc, '$.revision') + 1), NULL FROM events"
        f" WHERE flow_key = {FLOW.format('failed')} ORDER BY seq DESC LIMIT 1;"
        "UPDATE ownership SET last_position = last_position + 1;"
        "UPDATE flows SET revision = 2, doc = json_set(doc, '$.revision', 2)"
        " WHERE flow_id = 'failed'",
        "flow failed: flow.updated at seq",
    ),
    "a child starts after the intent": (
        "INSERT INTO events SELECT (SELECT max(position) + 1 FROM events), e.flow_key,"
        " (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key),"
        " json_set(e.doc, '$.type', 'task.started', '$.changed', json('{}'), '$.revision', 1,"
        " '$.seq', (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key)), NULL"
        f" FROM events AS e WHERE e.flow_key = {FLOW.format('asked')}"
        " AND json_extract(e.doc, '$.type') = 'task.created'"
        " ORDER BY seq LIMIT 1 OFFSET 1;"
        "UPDATE ownership SET last_position = last_position + 1",
        "flow asked: task.started at seq",
    ),
    "a child ends twice": (
        "INSERT INTO events SELECT (SELECT max(position) + 1 FROM events), e.flow_key,"
        " (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key),"
        " json_set(e.doc, '$.seq', (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key)),"
        " NULL"
        f" FROM events AS e WHERE e.flow_key = {FLOW.format('queued')}"
        " AND json_extract(e.doc, '$.type') = 'task.ended' LIMIT 1;"
        "UPDATE ownership SET last_position = last_position + 1",
        "ended 2 times",
    ),
    "a child's end is taken back": (
        "UPDATE tasks SET status = 'running',"
        " doc = json_remove(json_set(doc, '$.status', 'running'), '$.endedAt')"
        f" WHERE run_id = 'ended' AND flow_key = {FLOW.format('queued')}",
        "is running with 1 ends",
    ),
    "an attempt is not counted": (
        "UPDATE tasks SET doc = json_set(doc, '$.attempt', 2) WHERE run_id = 'never'",
        "attempt 2, but started 1 times",
    ),
    "a child is of no flow": (
        "UPDATE tasks SET flow_key = 999999 WHERE run_id = 'never'",
        "belongs to no flow",
    ),
    "a position is forgotten": (
        "UPDATE ownership SET last_position = last_position - 1",
        "the newest event is at",
    ),
    "a digit flipped where no event tells": (
        "UPDATE flows SET doc = json_set(doc, '$.updatedAt', json_extract(doc, '$.updatedAt') + 1)"
        " WHERE flow_id = 'done'",
        "flow done: its checksum is",
    ),
    "a count is off": (
        "UPDATE ownership SET tasks = tasks + 1",
        "the totals are",
    ),
    "commits are made up": (
        "UPDATE ownership SET commits = 1000000",
        "1000000 commits left only",
    ),
}


@pytest.fixture
def furnished(db: Path, tmp_path: Path) -> Iterator[Path]:
    with Zygote() as zygote:
        go = tmp_path / "go"
        child = zygote.fork("furnish", tmp_path / "journal", path=str(db), go=str(go))
        go.touch()
        assert child.wait() == 0, child.facts()
        yield db


def test_each_damage_is_found(furnished: Path) -> None:
    invariants.check_all(furnished)
    whole = furnished.read_bytes()

    for name, (statements, complaint) in DAMAGE.items():
        with closing(sqlite3.connect(furnished)) as connection:
            before = connection.total_changes
            connection.executescript(statements)
            assert connection.total_changes > before, f"{name}: nothing was damaged"
        with pytest.raises(AssertionError) as found:
            invariants.check_all(furnished)
        assert complaint in str(found.value), (name, str(found.value))
        furnished.write_bytes(whole)

    invariants.check_all(furnished)


def test_a_file_others_may_read_is_found(furnished: Path) -> None:
    furnished.chmod(0o644)

    with pytest.raises(AssertionError, match="mode 644"):
        invariants.check_all(furnished)
