"""Rows that say something else than their record does: found out when they are read, and only they are lost."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from flowstead.errors import SnapshotUnreadable
from flowstead.model.flow import FlowKey
from flowstead.store.port import EVERYONE, Snapshot
from flowstead.store.sqlite import SqliteStore
from tests.store.disk import TendedStore
from tests.store.rows import ALICE, changes, put, put_task

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
