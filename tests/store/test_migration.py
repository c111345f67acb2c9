# ruff: noqa: ASYNC240 - a test may wait for a file
"""The way from a file of an earlier schema to this one: all or nothing, and nothing is blessed on the way."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead.errors import SnapshotUnreadable, StoreUnusable
from flowstead.model.flow import FlowKey, StoredFlow
from flowstead.rules.wait_keys import wait_key
from flowstead.store import codec, schema
from flowstead.store.port import EVERYONE, FlowQuery, Snapshot, WaitLookup
from tests.store.disk import TendedStore

pytestmark = pytest.mark.usefixtures("stores_end")

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "snapshots" / "v1.sql"
SNAPSHOT_2 = ROOT / "tests" / "snapshots" / "v2.sql"
OWNER = "agent:main:main"
TRIAGE = FlowKey(OWNER, "triage-1")
REPLY = wait_key(OWNER, {"kind": "reply", "channel": "slack", "threadKey": "slack:thread-1"})

FIRST: Any = {"flow_id": None, "after_key": 0, "limit": 10}


@pytest.fixture
def old(db: Path) -> Path:
    with closing(sqlite3.connect(db)) as connection:
        connection.executescript(SNAPSHOT.read_text())
    return db


@pytest.fixture
def second(db: Path) -> Path:
    """A file of version 2."""
    with closing(sqlite3.connect(db)) as connection:
        connection.executescript(SNAPSHOT_2.read_text())
    return db


def change(db: Path, statement: str) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        assert connection.execute(statement).rowcount == 1, f"{statement} changed nothing"


def rows(db: Path) -> dict[str, list[Any]]:
    """All that a version 1 knew; a record does not say there what its flow waits for."""
    columns = {
        "flows": "key, owner_key, flow_id, controller_id, correlation_id, idempotency_key, status,"
        " ended_at, due_at, revision",
        "tasks": "key, task_id, flow_key, run_id, status, runtime, launched, due_at",
        "events": "position, flow_key, seq",
    }
    with closing(sqlite3.connect(db)) as connection:
        return {
            table: connection.execute(
                f"SELECT {known}, json_remove(doc, '$.waitKey') FROM {table} ORDER BY 1"
            ).fetchall()
            for table, known in columns.items()
        }


def plain(db: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(db)) as connection:
        return connection.execute(statement).fetchall()


async def test_a_file_brought_forward_keeps_every_value_and_can_be_checked(old: Path) -> None:
    before = rows(old)
    store = TendedStore(old)

    await store.open()

    assert await store.list_unreadable() == []
    await store.aclose()
    assert rows(old) == before
    totals = plain(
        old, "SELECT flows, tasks, events, signals, updates, length(file) FROM ownership"
    )
    assert totals == [(2, 2, 10, 0, 0, 32)]
    assert plain(old, "PRAGMA user_version") == [(schema.VERSION,)] == [(3,)]


async def test_what_a_flow_waited_for_answers_a_signal_after_the_file_was_brought_forward(
    old: Path,
) -> None:
    """The column is found by, and the record is what the engine reads; nobody has a token for it."""
    store = TendedStore(old)
    await store.open()

    [found] = await store.look_up_waits([WaitLookup(OWNER, REPLY, None, 0)])
    [loaded] = await store.load([TRIAGE])

    assert found.waiting == [TRIAGE]
    assert isinstance(loaded, Snapshot)
    assert (loaded.flow.wait_key, loaded.flow.wait) == (REPLY, None)
    assert [type(wait) for wait in await store.list_open_waits(EVERYONE, **FIRST)] == [StoredFlow]
    await store.aclose()
    assert plain(old, "SELECT flow_id, wait_key, wait_token FROM flows ORDER BY key") == [
        ("triage-1", REPLY, None),
        ("digest-1", None, None),
    ]


async def test_rows_that_do_not_wait_are_not_rewritten(second: Path) -> None:
    kept = "SELECT key, doc, crc FROM {} WHERE key > 1 ORDER BY key"
    before = [plain(second, kept.format(table)) for table in ("flows", "tasks")]
    events = plain(second, "SELECT * FROM events")
    store = TendedStore(second)

    await store.open()

    await store.aclose()
    assert [plain(second, kept.format(table)) for table in ("flows", "tasks")] == before
    assert plain(second, "SELECT * FROM events") == events
    assert [len(found) for found in before] == [1, 2]


FLOW = (
    "INSERT INTO flows SELECT {key}, owner_key, 'f{key}', NULL, NULL, NULL, {status}, NULL, NULL, 1,"
    " json_set({doc}, '$.key', {key}, '$.flowId', 'f{key}', '$.status', {status}), 0"
    " FROM flows WHERE key = 1"
)


def add_flows(db: Path, keys: Iterable[int], status: str, wait_json: str | None) -> None:
    """Flows of version 2 as they are written: with the checksums of their rows. `KEY` is the number of each."""
    doc = "json_remove(doc, '$.controllerId', '$.correlationId', '$.idempotencyKey'"
    doc += ")" if wait_json else ", '$.waitJson')"
    if wait_json:
        doc = f"json_set({doc}, '$.waitJson', json('{wait_json}'))"
    with closing(sqlite3.connect(db)) as connection:
        for key in keys:
            statement = FLOW.format(key=key, status=f"'{status}'", doc=doc)
            connection.execute(statement.replace("KEY", str(key)))
            connection.execute("UPDATE ownership SET flows = flows + 1")
            select = connection.execute("SELECT * FROM flows WHERE key = ?", (key,))
            (*columns, text, _) = select.fetchone()
            crc = codec.crc_of(columns, text.encode())
            connection.execute("UPDATE flows SET crc = ? WHERE key = ?", (crc, key))
        connection.commit()


@pytest.mark.parametrize(
    ("status", "wait_json", "fields"),
    [
        ("waiting", '{"n":1}', {"n": 1}),
        ("blocked", '{"n":1}', {"n": 1}),
        ("running", '{"n":1}', None),
        ("queued", '{"n":1}', None),
        ("waiting", '{"n":1.5,"on":true,"deadlineAt":5,"deep":{"n":2},"no":null}', "n on"),
        ("waiting", '{"prompt":"why?"}', None),
        ("waiting", "{}", None),
        ("waiting", "[1]", None),
        ("waiting", '"reply"', None),
        ("waiting", "null", None),
        ("waiting", None, None),
    ],
)
async def test_only_what_waits_for_plain_fields_gets_a_key(
    second: Path, status: str, wait_json: str | None, fields: Any
) -> None:
    add_flows(second, [50], status, wait_json)
    store = TendedStore(second)
    await store.open()

    assert await store.list_unreadable() == []
    [(stored, doc)] = plain(second, "SELECT wait_key, doc FROM flows WHERE key = 50")

    fields = {"n": 1.5, "on": True} if fields == "n on" else fields
    assert stored == (None if fields is None else wait_key(OWNER, fields))
    assert codec.read_stored_flow(doc.encode()).wait_key == stored
    await store.aclose()


async def test_more_waiting_flows_than_a_page_are_brought_forward(second: Path) -> None:
    add_flows(second, range(100, 1301), "waiting", '{"n":KEY}')
    store = TendedStore(second)

    await store.open()

    keys = [wait_key(OWNER, {"n": key}) for key in range(100, 1301)]
    found = await store.look_up_waits([WaitLookup(OWNER, key, None, 0) for key in keys])
    assert [one.waiting[0].flow_id for one in found] == [f"f{key}" for key in range(100, 1301)]
    await store.aclose()


@pytest.mark.parametrize(
    "change_to", ["due_at = 5", "doc = '{'", "doc = replace(doc, 'triage', 'mirage')", "crc = 5"]
)
async def test_a_waiting_flow_that_is_damaged_is_left_as_it_is_and_not_vouched_for(
    second: Path, change_to: str
) -> None:
    change(second, f"UPDATE flows SET {change_to} WHERE key = 1")
    before = plain(second, "SELECT doc, crc FROM flows WHERE key = 1")
    store = TendedStore(second)
    await store.open()

    [told] = await store.list_unreadable()

    assert (told.table, told.key) == ("flows", 1)
    await store.aclose()
    assert plain(second, "SELECT doc, crc FROM flows WHERE key = 1") == before
    assert plain(second, "SELECT wait_key FROM flows WHERE key = 1") == [(None,)]


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
    """A real process ends at each of its statements in turn, on the way over every version between."""
    command = [sys.executable, "-m", "tests.store.dying", str(tmp_path), str(SNAPSHOT)]

    done = await anyio.run_process(command, cwd=ROOT, check=False)

    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) > 20, "it died nowhere"
