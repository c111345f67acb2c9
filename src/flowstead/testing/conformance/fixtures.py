"""What a store's own test class gives the suite, and what the suite makes of it.

`make_store` must be given, in the class. Two more things may be: `make_again`, if opening the same data another
time is not the same as making a store; and `commit_damaged`, if a row cannot be damaged by way of `commit`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import pytest

from flowstead.store.codec import FlowWrite
from flowstead.store.port import Store

MakeStore: TypeAlias = Callable[[], Store]
"""Makes a store that is not open yet."""


@pytest.mark.anyio
class StoreFixtures:
    """Stores for a test, each closed when the test ends, however it ends."""

    @pytest.fixture(scope="session")
    @classmethod
    def anyio_backend(cls) -> str:
        """Run under asyncio, as the runtime does."""
        return "asyncio"

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """Give this: what makes a store, not open yet, over this test's data, which is empty at first."""
        raise NotImplementedError(
            "Give your subclass of StoreConformance a fixture `make_store`: it answers a callable"
            " that makes a store which is not open yet, over data that is empty at first."
        )

    @pytest.fixture
    def make_again(self, make_store: MakeStore) -> MakeStore:
        """Override if need be: what makes another store, not open yet, over the same data."""
        return make_store

    async def commit_damaged(self, store: Store, write: FlowWrite) -> int:
        """Override if need be: bring rows into the store whose `doc` is not a record, and answer as `commit` does.

        A store that looks at records on their way in has to be gone around; if nothing can spoil a row once it is
        stored, call `pytest.skip`.
        """
        return await store.commit([write])

    @pytest.fixture
    async def unopened(self, make_store: MakeStore) -> AsyncIterator[Store]:
        """The store under test, before it is opened."""
        store = make_store()
        yield store
        await store.aclose()

    @pytest.fixture
    async def store(self, unopened: Store) -> Store:
        """The store under test, open and empty."""
        await unopened.open()
        return unopened

    @pytest.fixture
    async def another(self, unopened: Store, make_again: MakeStore) -> AsyncIterator[MakeStore]:
        """Make more stores, not open yet, over the data of the store under test."""
        made: list[Store] = []

        def make() -> Store:
            made.append(make_again())
            return made[-1]

        yield make
        for store in reversed(made):
            await store.aclose()
