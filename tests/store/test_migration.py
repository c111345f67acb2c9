# ruff: noqa: ASYNC240 - a test may wait for a file
"""The way from a file of schema version 1 to this one: all or nothing, and nothing is blessed on the way."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead.errors import SnapshotUnreadable, StoreUnusable
from flowstead.model.flow import FlowKey
from flowstead.store import schema
from flowstead.store.port import EVERYONE, FlowQuery
from tests.store.disk import TendedStore

pytestmark = pytest.mark.usefixtures("stores_end")

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "snapshots" / "v1.sql"
TRIAGE = FlowKey("agent:main:main", "triage-1")


@pytest.fixture
def old(db: Path) -> Path:
    with closing(sqlite3.connect(db)) as connection:
        connection.executescript(SNAPSHOT.read_text())
    return db


def change(db: Path, statement: str) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        assert connection.execute(statement).rowcount == 1, f"{statement} changed nothing"


def rows(db: Path) -> dict[str, list[Any]]:
    """All that a version 1 knew."""
    with closing(sqlite3.connect(db)) as connection:
        return {
            table: [
                row[: len(row) - 1] if has_crc else row
                for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1")
            ]
            for table in ("flows", "tasks", "events")
            for has_crc in [_version(connection) > 1]
        }


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


async def test_a_file_brought_forward_keeps_every_value_and_can_be_checked(old: Path) -> None:
    before = rows(old)
    store = TendedStore(old)

    await store.open()

    assert await store.list_unreadable() == []
    await store.aclose()
    assert rows(old) == before
    with closing(sqlite3.connect(old)) as connection:
        totals = connection.execute("SELECT flows, tasks, events, length(file) FROM ownership")
        assert totals.fetchone() == (2, 2, 10, 32)
        assert _version(connection) == schema.VERSION == 2


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("UPDATE flows SET status = 'running' WHERE flow_id = 'triage-1'", "flows"),
        ("UPDATE flows SET revision = 7 WHERE flow_id = 'triage-1'", "flows"),
        ("UPDATE flows SET owner_key = x'ff' WHERE flow_id = 'triage-1'", "flows"),
        ("UPDATE flows SET doc = '[]' WHERE flow_id = 'triage-1'", "flows"),
        ("UPDATE flows SET doc = x'00' WHERE flow_id = 'triage-1'", "flows"),
        ("UPDATE tasks SET run_id = 'other' WHERE key = 2", "tasks"),
        ("UPDATE tasks SET doc = 5 WHERE key = 2", "tasks"),
        ("UPDATE events SET seq = 9 WHERE position = 3", "events"),
    ],
)
async def test_a_row_that_contradicts_itself_is_not_vouched_for(
    old: Path, statement: str, table: str
) -> None:
    change(old, statement)
    store = TendedStore(old)
    await store.open()

    told = await store.list_unreadable()
    [loaded] = await store.load([TRIAGE])

    assert [row.table for row in told] == [table]
    assert loaded is None or isinstance(loaded, SnapshotUnreadable)
    flows = await store.list_flows(EVERYONE, FlowQuery(), 10)
    assert "digest-1" in [flow.flow_id for flow in flows]
    await store.aclose()


async def test_a_broken_file_of_version_1_is_refused_and_stays_one(old: Path) -> None:
    content = bytearray(old.read_bytes())
    content[3 * 4096 : 4 * 4096] = bytes(4096)
    old.write_bytes(content)

    with pytest.raises(StoreUnusable, match="damaged"):
        await TendedStore(old).open()

    assert old.read_bytes() == content


async def test_a_file_of_more_rows_than_a_page_is_brought_forward(db: Path) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.executescript(SNAPSHOT.read_text())
        connection.execute(
            "WITH RECURSIVE more(n) AS (SELECT 11 UNION ALL SELECT n + 1 FROM more WHERE n < 1300)"
            " INSERT INTO events SELECT n, 1, n - 3, json_set(doc, '$.seq', n - 3)"
            " FROM more, events WHERE position = 7"
        )
        connection.text_factory = bytes

        assert schema.prepare(connection, "flows.db")

        unvouched = connection.execute("SELECT count(*) FROM events WHERE crc IS NULL").fetchall()
        assert unvouched == [(0,)]
        assert connection.execute("SELECT events FROM ownership").fetchall() == [(1300,)]


@pytest.mark.crash
async def test_a_process_killed_in_the_midst_leaves_the_old_file_or_the_new_one(
    tmp_path: Path,
) -> None:
    """A real process ends at each of its statements in turn."""
    command = [sys.executable, "-m", "tests.store.dying", str(tmp_path), str(SNAPSHOT)]

    done = await anyio.run_process(command, cwd=ROOT, check=False)

    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) > 20, "it died nowhere"
