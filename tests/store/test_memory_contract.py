"""The store in memory keeps the contract, and so do those made of it that fail on request, or lose power."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from flowstead.errors import CommitFailed, StoreUnusable
from flowstead.store.memory import MemoryStore, MemoryTables
from flowstead.store.port import Store
from flowstead.testing import FaultyStore
from flowstead.testing.conformance import StoreConformance
from flowstead.testing.conformance.fixtures import MakeStore
from flowstead.testing.conformance.reads import ids
from flowstead.testing.conformance.rows import ALICE, creates, flow_of, put
from flowstead.testing.disk import Disk, SimulatedStore


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        tables = MemoryTables()

        def make() -> Store:
            return MemoryStore(tables)

        return make


class TestFaultyStore(StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        tables = MemoryTables()

        def make() -> Store:
            return FaultyStore(tables=tables)

        return make


class TestSimulatedStore(StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        disk = Disk(Random(0))

        def make() -> Store:
            return SimulatedStore(disk)

        return make


async def test_a_commit_fails_as_often_as_it_is_told_to_with_or_without_its_rows() -> None:
    store = FaultyStore()
    await store.open()
    store.fail_commits(CommitFailed("no"), times=2)
    store.fail_commits(CommitFailed("perhaps"), written=True)

    for name in ("first", "second", "third"):
        with pytest.raises(CommitFailed):
            await put(store, name)
    await put(store, "fourth")

    assert await ids(store, ALICE) == ["fourth", "third"]
    assert (store.attempts, store.batches) == (4, [1])


async def test_a_commit_that_is_held_writes_nothing_until_it_is_released() -> None:
    store = FaultyStore()
    await store.open()
    store.hold()

    writing = asyncio.ensure_future(store.commit([creates(flow_of(store.next_key()))]))
    await store.wait_held()
    held = await ids(store, ALICE)
    store.release()
    await writing

    assert held == []
    assert await ids(store, ALICE) == ["flow"]


async def test_a_read_fails_as_often_as_it_is_told_to_and_a_healed_store_does_not() -> None:
    store = FaultyStore()
    await store.open()
    store.fail_reads("last_position", StoreUnusable("here", "no"), times=2)

    with pytest.raises(StoreUnusable):
        await store.last_position()
    assert await store.last_seq(ALICE, "flow") == 0
    store.heal()

    assert await store.last_position() == 0


@pytest.mark.parametrize("name", ["lode", "commit", "next_key", "name"])
def test_what_is_no_verb_that_can_fail_cannot_be_told_to(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FaultyStore().fail_reads(name, StoreUnusable("here", "no"))
