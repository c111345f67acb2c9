"""The store in a SQLite file keeps the contract."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import anyio.to_thread
import pytest

from flowstead.testing.conformance import StoreConformance
from flowstead.testing.conformance.fixtures import MakeStore
from tests.store.disk import TendedStore


@pytest.mark.usefixtures("stores_end")
class TestSqliteStore(StoreConformance):
    @pytest.fixture
    def make_store(self, db: Path) -> MakeStore:
        return lambda: TendedStore(db, durability="normal")


async def test_a_close_that_is_cancelled_leaves_no_thread_and_no_log(db: Path) -> None:
    before = set(threading.enumerate())
    store = TendedStore(db)
    await store.open()
    threads = set(threading.enumerate()) - before

    closing = asyncio.ensure_future(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await store.aclose()

    assert len(threads) == 2
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join, 0.5)
    assert [thread.name for thread in threads if thread.is_alive()] == []
    assert not db.with_name("flows.db-wal").exists()
