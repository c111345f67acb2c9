"""One owner at a time: who may open a store, and what closing leaves."""

from __future__ import annotations

import pytest

from flowstead.errors import StoreError, StoreInUse
from flowstead.store.port import EVERYONE, Store
from flowstead.testing.conformance.fixtures import MakeStore
from flowstead.testing.conformance.reads import ids
from flowstead.testing.conformance.rows import ALICE, creates, flow_of, put


class Ownership:
    """`open` without a takeover, and `aclose`."""

    async def test_a_second_owner_is_refused_and_the_first_goes_on(
        self, store: Store, another: MakeStore
    ) -> None:
        """Two owners of the same data would each believe its memory to be the truth."""
        second = another()

        with pytest.raises(StoreInUse):
            await second.open()

        await put(store)
        assert await ids(store, ALICE) == ["flow"]

    async def test_a_refused_owner_writes_nothing(self, store: Store, another: MakeStore) -> None:
        """A store that was refused is closed, not half open."""
        second = another()
        with pytest.raises(StoreInUse):
            await second.open()

        with pytest.raises((StoreError, AssertionError)):
            await second.commit([creates(flow_of(store.next_key()))])

        assert await ids(store, EVERYONE) == []

    async def test_a_refused_owner_that_closes_leaves_the_first_alone(
        self, store: Store, another: MakeStore
    ) -> None:
        """It lets go of nothing, because it holds nothing."""
        second = another()
        with pytest.raises(StoreInUse):
            await second.open()

        await second.aclose()

        with pytest.raises(StoreInUse):
            await another().open()
        await put(store)
        assert await ids(store, ALICE) == ["flow"]

    async def test_a_refused_owner_opens_once_the_first_has_let_go(
        self, store: Store, another: MakeStore
    ) -> None:
        """A refusal is not for ever."""
        second = another()
        await put(store)
        with pytest.raises(StoreInUse):
            await second.open()
        await store.aclose()

        await second.open()

        assert await ids(second, ALICE) == ["flow"]

    async def test_a_store_is_not_opened_twice(self, store: Store) -> None:
        """The owner itself is somebody who owns it."""
        with pytest.raises(StoreInUse):
            await store.open()

        await put(store)
        assert await ids(store, ALICE) == ["flow"]

    async def test_a_store_is_closed_twice_without_harm(
        self, store: Store, another: MakeStore
    ) -> None:
        """Closing once more does not take the store from its next owner."""
        await store.aclose()
        await store.aclose()

        other = another()
        await other.open()
        await store.aclose()
        with pytest.raises(StoreInUse):
            await another().open()
        await put(other)
        assert await ids(other, ALICE) == ["flow"]

    async def test_a_store_that_was_never_opened_may_be_closed(self, unopened: Store) -> None:
        """And opened afterwards."""
        await unopened.aclose()

        await unopened.open()
        await put(unopened)
        assert await ids(unopened, ALICE) == ["flow"]

    async def test_a_closed_store_writes_nothing(self, store: Store, another: MakeStore) -> None:
        """Who has let go is an owner no longer."""
        await store.aclose()

        with pytest.raises((StoreError, AssertionError)):
            await store.commit([creates(flow_of(1))])

        other = another()
        await other.open()
        assert await ids(other, EVERYONE) == []

    async def test_a_store_that_was_never_opened_writes_nothing(
        self, unopened: Store, another: MakeStore
    ) -> None:
        """Writing takes ownership, and nothing but `open` gives it."""
        with pytest.raises((StoreError, AssertionError)):
            await unopened.commit([creates(flow_of(1))])

        other = another()
        await other.open()
        assert await ids(other, EVERYONE) == []
