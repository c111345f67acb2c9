"""Rows that say something else than their record does: found out when they are read, and only they are lost."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from flowstead.errors import SnapshotUnreadable
from flowstead.model.flow import FlowKey, FlowStatus
from flowstead.model.update import UpdateStatus
from flowstead.rules.wait_keys import token_digest
from flowstead.store.port import EVERYONE, Scope, Snapshot, WaitLookup
from flowstead.store.sqlite import SqliteStore
from tests.store.disk import TendedStore
from tests.store.rows import (
    ALICE,
    NOW,
    changes,
    creates,
    flow_of,
    put,
    put_signal,
    put_task,
    put_update,
    signals,
    task_of,
    wait_of,
)

pytestmark = pytest.mark.usefixtures("stores_end")

HURT, FINE = FlowKey("alice", "hurt"), FlowKey("alice", "fine")


@pytest.fixture
async def store(db: Path) -> AsyncIterator[SqliteStore]:
    """Two flows, one child each, an event for each, and a second one for the flow that gets hurt."""
    store = TendedStore(db, durability="normal")
    await store.open()
    hurt, fine = await put(store, "hurt"), await put(store, "fine")
    await put_task(store, hurt, "task-of-hurt")
    await put_task(store, fine, "task-of-fine")
    await store.commit([changes(replace(hurt, revision=hurt.revision + 1), seqs=[2])])
    yield store
    await store.aclose()


def hurt(db: Path, statement: str) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        assert connection.execute(statement).rowcount == 1, f"{statement} changed nothing"


async def test_a_column_that_is_no_text_any_more_is_damage(store: SqliteStore, db: Path) -> None:
    hurt(db, "UPDATE flows SET status = CAST(x'ff' AS TEXT) WHERE flow_id = 'hurt'")

    broken, whole = await store.load([HURT, FINE])

    assert isinstance(broken, SnapshotUnreadable)
    assert "its checksum does not fit" in broken.problem
    assert isinstance(whole, Snapshot)


async def test_a_history_that_lost_its_end_is_damage(store: SqliteStore, db: Path) -> None:
    hurt(
        db,
        "DELETE FROM events WHERE position ="
        " (SELECT max(position) FROM events JOIN flows ON key = flow_key WHERE flow_id = 'hurt')",
    )

    broken, whole = await store.load([HURT, FINE])

    assert isinstance(broken, SnapshotUnreadable)
    assert "the end of its history is missing" in broken.problem
    assert isinstance(whole, Snapshot)


async def test_a_child_is_not_shown_under_a_flow_it_does_not_belong_to(
    store: SqliteStore, db: Path
) -> None:
    hurt(db, "UPDATE flows SET flow_id = 'other' WHERE flow_id = 'hurt'")

    with pytest.raises(SnapshotUnreadable, match="the row of its flow is damaged"):
        await store.find_task(ALICE, "task-of-hurt")

    found = await store.find_task(ALICE, "task-of-fine")
    assert found is not None
    assert found[0] == FINE


async def test_an_event_is_not_told_of_a_flow_it_does_not_belong_to(
    store: SqliteStore, db: Path
) -> None:
    before = await store.events_after(EVERYONE, 0, 100)
    hurt(db, "UPDATE flows SET flow_id = 'other' WHERE flow_id = 'hurt'")

    after = await store.events_after(EVERYONE, 0, 100)

    assert {event.flow_id for event in before} == {"hurt", "fine"}
    assert after == [event for event in before if event.flow_id == "fine"]


async def test_a_signal_whose_owner_was_changed_is_given_to_nobody(
    store: SqliteStore, db: Path
) -> None:
    await put_signal(store, wait_key="k", signal_id="id")
    before = await store.look_up_waits([WaitLookup("alice", "k", None, NOW)])
    hurt(db, "UPDATE signals SET owner_key = 'mallory'")

    after = await store.look_up_waits(
        [WaitLookup(owner, "k", None, NOW) for owner in ("alice", "mallory")]
    )

    assert [found.kept is None for found in before] == [False]
    assert [found.kept for found in after] == [None, None]


async def test_a_signal_that_was_taken_is_not_kept_again_by_its_column(
    store: SqliteStore, db: Path
) -> None:
    signal = await put_signal(store, wait_key="k")
    await store.commit([signals(replace(signal, taken_by="fine"), fresh=False)])
    hurt(db, "UPDATE signals SET kept = 1")

    [found] = await store.look_up_waits([WaitLookup("alice", "k", None, NOW)])

    assert found.kept is None
    assert [row.table for row in await store.list_unreadable()] == ["signals"]


@pytest.mark.parametrize(
    "change",
    ["status = 'pending'", "due_at = 5", "owner_key = 'mallory'", "bucket = 'b'", "flow_key = 1"],
)
async def test_an_update_is_not_sent_by_its_columns(
    store: SqliteStore, db: Path, change: str
) -> None:
    key = await store.key_of(ALICE, "fine")
    assert key is not None
    flow = flow_of(key + 10, "told")
    await store.commit([creates(flow)])
    await put_update(store, flow, "sent", status=UpdateStatus.DELIVERED, due_at=None)
    await put_update(store, flow, "waits", due_at=NOW + 5)
    hurt(db, f"UPDATE updates SET {change}, due_at = 5 WHERE slot = 'sent'")
    hurt(db, f"UPDATE updates SET {change} WHERE slot = 'waits'")

    due = await store.list_updates_due(until=NOW, limit=9)
    digests = await store.list_digests_due(until=NOW, limit=9)
    shown = await store.list_updates(
        Scope("mallory"), flow_id=None, statuses=(), after_key=0, limit=9
    )

    assert (due, digests, shown) == ([], [], [])


async def test_a_token_is_not_moved_to_another_wait(store: SqliteStore, db: Path) -> None:
    for table in ("flows", "tasks"):
        hurt(db, f"UPDATE {table} SET wait_token = '{table}' WHERE key = {_first(db, table)}")

        with pytest.raises(SnapshotUnreadable, match="checksum"):
            await store.find_token(table)


async def test_a_wait_is_not_shown_to_an_owner_its_flow_was_moved_to(
    store: SqliteStore, db: Path
) -> None:
    fields: Any = {"status": FlowStatus.WAITING, "wait_key": "k", "wait_json": Raw(b"{}")}
    flow = flow_of(store.next_key(), "waits", **fields)
    task = task_of(store.next_key(), flow, "wait", wait=wait_of("k", token="t"))
    await store.commit([creates(flow, task)])
    page: Any = {"flow_id": None, "after_key": 0, "limit": 9}
    before = await store.list_open_waits(ALICE, **page)
    hurt(db, "UPDATE flows SET flow_id = 'other' WHERE flow_id = 'waits'")

    after = await store.list_open_waits(ALICE, **page)

    assert [wait.key for wait in before] == [flow.key, task.key]
    assert after == []
    with pytest.raises(SnapshotUnreadable):
        await store.find_token(token_digest("t"))


@pytest.mark.parametrize(
    "change", ["wait_key = 'k'", "wait_key = 'k', wait_token = 't'", "status = 'waiting'"]
)
async def test_a_flow_that_only_seems_to_wait_is_not_loaded(
    store: SqliteStore, db: Path, change: str
) -> None:
    hurt(db, f"UPDATE flows SET {change} WHERE flow_id = 'hurt'")

    broken, whole = await store.load([HURT, FINE])

    assert isinstance(broken, SnapshotUnreadable)
    assert isinstance(whole, Snapshot)


def _first(db: Path, table: str) -> int:
    with closing(sqlite3.connect(db)) as connection:
        return int(connection.execute(f"SELECT min(key) FROM {table}").fetchone()[0])
