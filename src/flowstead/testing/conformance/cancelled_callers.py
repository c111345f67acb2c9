"""Every coroutine may be cancelled while it waits, and the store is none the worse."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from flowstead.errors import StoreInUse, WriteConflict
from flowstead.model.flow import FlowKey
from flowstead.store.port import EVERYONE, FlowQuery, Store, WaitLookup
from flowstead.testing.conformance.fixtures import MakeStore
from flowstead.testing.conformance.reads import ids, positions
from flowstead.testing.conformance.rows import ALICE, creates, flow_of, put, put_task, task_of

PAUSES = (0, 1, 2, 4, 8)
"""How often the event loop goes round before a caller is cancelled: from before the first step to well after."""


async def cancel_after(pauses: int, work: Coroutine[Any, Any, object]) -> bool:
    """Begin the work and cancel it; answers whether it was cut off."""
    caller = asyncio.ensure_future(work)
    for _ in range(pauses):
        await asyncio.sleep(0)
    caller.cancel()
    [outcome] = await asyncio.gather(caller, return_exceptions=True)
    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
    return isinstance(outcome, asyncio.CancelledError)


class CancelledCallers:
    """Cancelled before their first step, in the middle, and too late."""

    @pytest.mark.parametrize("pauses", PAUSES)
    async def test_a_batch_whose_caller_was_cancelled_is_there_whole_or_not_at_all(
        self, store: Store, another: MakeStore, pauses: int
    ) -> None:
        """And by the time the next batch is written it is settled which."""
        first, second = flow_of(store.next_key(), "first"), flow_of(store.next_key(), "second")
        child = task_of(store.next_key(), second, "child")

        cut = await cancel_after(pauses, store.commit([creates(first), creates(second, child)]))
        await put(store, "next")

        found = await ids(store, ALICE)
        whole = found == ["next", "second", "first"]
        assert whole or found == ["next"]
        assert whole or cut, "the commit answered, but its rows are not there"
        assert (await store.find_task(ALICE, "child") is not None) is whole
        assert await positions(store) == ([1, 2, 3] if whole else [1])
        await store.aclose()
        again = another()
        await again.open()
        assert await ids(again, ALICE) == found

    @pytest.mark.parametrize("pauses", PAUSES)
    async def test_a_batch_that_is_written_again_after_a_cancel_is_there_once(
        self, store: Store, pauses: int
    ) -> None:
        """Whoever was cut off asks again: written now, or refused because it is there."""
        batch = [creates(flow_of(store.next_key(), "flow", idempotency_key="once"))]
        cut = await cancel_after(pauses, store.commit(batch))

        try:
            await store.commit(batch)
        except WriteConflict:
            pass
        else:
            assert cut, "the commit answered, and its rows could be written once more"

        assert await ids(store, ALICE) == ["flow"]
        assert await positions(store) == [1]

    @pytest.mark.parametrize("pauses", PAUSES)
    async def test_reads_and_writes_go_on_after_a_read_was_cancelled(
        self, store: Store, pauses: int
    ) -> None:
        """Nobody else gets its answer, and nothing stays locked."""
        flow = await put(store)
        await put_task(store, flow, "task")
        reads: list[Coroutine[Any, Any, object]] = [
            store.load([FlowKey("alice", "flow")]),
            store.find_flow(ALICE, "flow"),
            store.find_by_idempotency_key("alice", "once"),
            store.list_flows(ALICE, FlowQuery(), 10),
            store.key_of(ALICE, "flow"),
            store.find_task(ALICE, "task"),
            store.list_tasks(ALICE, "flow"),
            store.summarize(ALICE, "flow"),
            store.history(ALICE, "flow", after_seq=0, limit=10),
            store.last_seq(ALICE, "flow"),
            store.events_after(EVERYONE, 0, 10),
            store.last_position(),
            store.list_due(after=0, until=10),
            store.next_due(after=0),
            store.list_unfinished([], after_key=0, limit=10),
            store.count_by_controller(),
            store.look_up_waits([WaitLookup("alice", "key", "id", 0)]),
            store.find_token("token"),
            store.list_met(after_key=0, limit=10, now=0),
            store.list_open_waits(ALICE, flow_id=None, after_key=0, limit=10),
            store.list_updates_due(until=0, limit=10),
            store.list_digests_due(until=0, limit=10),
            store.next_update_due(),
            store.list_updates(ALICE, flow_id=None, statuses=(), after_key=0, limit=10),
            store.list_unreadable(),
            store.upkeep(idle=True),
        ]

        for read in reads:
            await cancel_after(pauses, read)

        assert await ids(store, ALICE) == ["flow"]
        await put(store, "next")
        assert await store.last_position() == 2
        assert await ids(store, ALICE) == ["next", "flow"]

    @pytest.mark.parametrize("takeover", [False, True], ids=["open", "takeover"])
    @pytest.mark.parametrize("pauses", PAUSES)
    async def test_a_cancelled_open_leaves_the_store_to_nobody(
        self, unopened: Store, another: MakeStore, pauses: int, takeover: bool
    ) -> None:
        """The caller holds nothing, so nobody could ever let go; it may try again."""
        cut = await cancel_after(pauses, unopened.open(takeover=takeover))
        if not cut:
            with pytest.raises(StoreInUse):
                await another().open()
            return

        other = another()
        await other.open()
        await put(other)
        await other.aclose()

        await unopened.open()
        await put(unopened, "next")
        assert await ids(unopened, ALICE) == ["next", "flow"]

    @pytest.mark.parametrize("pauses", PAUSES)
    async def test_a_store_whose_closing_was_cancelled_is_closed_by_closing_it_again(
        self, store: Store, another: MakeStore, pauses: int
    ) -> None:
        """Closing twice is fine, and the second time finishes what the first began."""
        await put(store)

        await cancel_after(pauses, store.aclose())
        await store.aclose()

        other = another()
        await other.open()
        await put(other, "next")
        assert await ids(other, ALICE) == ["next", "flow"]
