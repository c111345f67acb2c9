"""An owner that was overtaken can read, but never write again, nor find what there is to send."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from flowstead.errors import StoreInUse
from flowstead.store.port import EVERYONE, Store
from flowstead.testing.conformance.fixtures import MakeStore
from flowstead.testing.conformance.reads import ids, loaded, positions
from flowstead.testing.conformance.rows import (
    ALICE,
    NOW,
    changes,
    creates,
    flow_of,
    put,
    put_update,
    tells,
)


class Takeover:
    """`open(takeover=True)` fences the owner before; every commit proves that it owns the store."""

    async def test_a_takeover_of_a_free_store_is_an_open(self, unopened: Store) -> None:
        """Nobody has to be there to be overtaken."""
        await unopened.open(takeover=True)

        await put(unopened)

        assert await ids(unopened, ALICE) == ["flow"]

    async def test_a_takeover_sees_what_the_overtaken_wrote(
        self, store: Store, another: MakeStore
    ) -> None:
        """Nothing that was answered is lost by it."""
        flow = await put(store)
        second = another()

        await second.open(takeover=True)

        assert (await loaded(second)).flow.revision == 1
        assert await second.commit([changes(replace(flow, revision=2), seqs=[2])]) == 2

    async def test_a_takeover_stops_the_overtaken_from_writing(
        self, store: Store, another: MakeStore
    ) -> None:
        """Its commits raise StoreInUse, every time, and write nothing."""
        flow = await put(store)
        second = another()
        await second.open(takeover=True)

        for _ in range(2):
            with pytest.raises(StoreInUse):
                await store.commit([changes(replace(flow, revision=2), seqs=[2])])
        await put(second, "later")

        assert (await loaded(second)).flow.revision == 1
        assert await ids(second, ALICE) == ["later", "flow"]
        assert await positions(second) == [1, 2]

    async def test_a_takeover_stops_the_overtaken_from_sending(
        self, store: Store, another: MakeStore
    ) -> None:
        """What there is to tell, its own as well, the new owner finds, and nobody else."""
        flow = await put(store)
        await put_update(store, flow, "done")
        second = another()
        await second.open(takeover=True)
        await put_update(second, flow, "digested", bucket="evening")

        for _ in range(2):
            with pytest.raises(StoreInUse):
                await store.list_updates_due(until=NOW, limit=9)
            with pytest.raises(StoreInUse):
                await store.list_digests_due(until=NOW, limit=9)

        assert len(await second.list_updates_due(until=NOW, limit=9)) == 1
        assert len(await second.list_digests_due(until=NOW, limit=9)) == 1

    async def test_an_overtaken_store_is_refused_what_would_not_fit_either(
        self, store: Store, another: MakeStore
    ) -> None:
        """That it was overtaken comes first: a conflict would send its runtime on."""
        await put(store)
        second = another()
        await second.open(takeover=True)

        with pytest.raises(StoreInUse):
            await put(store)

        assert await ids(second, ALICE) == ["flow"]

    async def test_an_overtaken_store_stays_so_after_the_new_owner_has_gone(
        self, store: Store, another: MakeStore
    ) -> None:
        """A free store is not the overtaken one's again: others may have written in between."""
        second = another()
        await second.open(takeover=True)
        await second.aclose()

        with pytest.raises(StoreInUse):
            await put(store)

        third = another()
        await third.open(takeover=True)
        assert await ids(third, EVERYONE) == []

    async def test_the_last_of_several_takers_owns_the_store(
        self, store: Store, another: MakeStore
    ) -> None:
        """Each takeover fences all before it."""
        second, third = another(), another()
        await second.open(takeover=True)

        await third.open(takeover=True)

        for fenced in (store, second):
            with pytest.raises(StoreInUse):
                await put(fenced, "fenced")
        await put(third)
        assert await ids(third, EVERYONE) == ["flow"]

    async def test_an_overtaken_store_goes_on_reading(
        self, store: Store, another: MakeStore
    ) -> None:
        """It sees what the new owner writes, before and after it has found out."""
        second = another()
        await second.open(takeover=True)
        await put(second, "later")

        assert await ids(store, ALICE) == ["later"]
        with pytest.raises(StoreInUse):
            await put(store)
        await put(second, "last")
        assert await ids(store, ALICE) == ["last", "later"]

    async def test_the_upkeep_of_an_overtaken_store_does_no_harm(
        self, store: Store, another: MakeStore
    ) -> None:
        """Its runtime may come to it before it has found out."""
        await put(store)
        second = another()
        await second.open(takeover=True)

        await store.upkeep(idle=True)

        await put(second, "later")
        assert await ids(second, ALICE) == ["later", "flow"]

    async def test_an_overtaken_store_that_closes_leaves_the_new_owner_alone(
        self, store: Store, another: MakeStore
    ) -> None:
        """It lets go of what it has no more: neither the lock nor the data of the new owner."""
        second = another()
        await second.open(takeover=True)

        await store.aclose()

        with pytest.raises(StoreInUse):
            await another().open()
        await put(second)
        assert await ids(second, ALICE) == ["flow"]

    async def test_an_overtaken_store_that_is_opened_anew_writes_again(
        self, store: Store, another: MakeStore
    ) -> None:
        """It is the ownership that was lost, not the store."""
        second = another()
        await second.open(takeover=True)
        with pytest.raises(StoreInUse):
            await put(store)
        await store.aclose()
        await second.aclose()

        await store.open()

        await put(store)
        assert await ids(store, ALICE) == ["flow"]

    async def test_a_new_owner_gives_keys_that_no_row_has(
        self, store: Store, another: MakeStore
    ) -> None:
        """Also where the overtaken one had given keys of its own."""
        flows = [await put(store, f"flow-{n}") for n in range(3)]
        second = another()
        await second.open(takeover=True)

        fresh = [await put(second, f"fresh-{n}") for n in range(3)]

        keys = [flow.key for flow in (*flows, *fresh)]
        assert keys == sorted(set(keys))

    async def test_a_commit_that_meets_a_takeover_is_written_before_it_or_never(
        self, store: Store, another: MakeStore
    ) -> None:
        """What the new owner finds when it has opened is final: nothing of the old one comes after."""
        for pauses in range(6):
            first = flow_of(store.next_key(), f"first-{pauses}")
            second = flow_of(store.next_key(), f"second-{pauses}")
            writing = asyncio.ensure_future(store.commit([creates(first), creates(second)]))
            for _ in range(pauses):
                await asyncio.sleep(0)

            taker = another()
            await taker.open(takeover=True)
            found = await ids(taker, ALICE, limit=2, id_prefix="")
            [outcome] = await asyncio.gather(writing, return_exceptions=True)

            written = found == [second.flow_id, first.flow_id]
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, StoreInUse), repr(outcome)
            assert written is not isinstance(outcome, StoreInUse)
            assert written or not {first.flow_id, second.flow_id} & set(await ids(taker, ALICE))
            assert await positions(taker) == list(range(1, len(await ids(taker, ALICE)) + 1))
            with pytest.raises(StoreInUse):
                await store.commit([tells(first, 2)])
            store = taker
