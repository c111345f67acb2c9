"""The history: numbered inside each flow, and in one row over the whole store."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from flowstead.errors import WriteConflict
from flowstead.store.codec import FlowWrite
from flowstead.store.port import EVERYONE, Store
from flowstead.testing.conformance.reads import positions
from flowstead.testing.conformance.rows import (
    ALICE,
    BOB,
    NOW,
    children,
    creates,
    event_of,
    flow_of,
    put,
    put_task,
    tells,
)


class History:
    """Positions follow the commits without a gap; a reader who keeps the last one it saw misses nothing."""

    async def test_positions_grow_over_commits_and_have_no_gap_inside_a_batch(
        self, store: Store
    ) -> None:
        """Inside a batch they follow the order of its writes, and of each write's events."""
        first = flow_of(store.next_key(), "first")
        second = flow_of(store.next_key(), "second")

        start = await store.commit([creates(first, seqs=[1, 2]), creates(second, seqs=[1])])
        after = await store.commit([tells(first, 3), tells(second, 2, 3)])

        events = await store.events_after(EVERYONE, 0, 100)
        assert [event.position for event in events] == [
            *range(start, start + 3),
            *range(after, after + 3),
        ]
        assert after == start + 3
        assert [(e.flow_id, e.seq) for e in events] == [
            ("first", 1),
            ("first", 2),
            ("second", 1),
            ("first", 3),
            ("second", 2),
            ("second", 3),
        ]
        assert await store.last_position() == after + 2

    async def test_the_first_position_is_one(self, store: Store) -> None:
        """0 is what a reader has seen who has seen nothing."""
        assert await store.commit([creates(flow_of(store.next_key()))]) == 1
        assert await positions(store) == [1]

    async def test_a_refused_batch_uses_no_position(self, store: Store) -> None:
        """A database sequence would leave a gap here."""
        await put(store)
        with pytest.raises(WriteConflict):
            await put(store)

        first = await store.commit([creates(flow_of(store.next_key(), "next"))])

        assert first == 2
        assert await positions(store) == [1, 2]

    async def test_a_batch_without_events_moves_no_position(self, store: Store) -> None:
        """Positions count events, not commits."""
        flow = await put(store)
        task = await put_task(store, flow, "task")

        await store.commit([children(replace(task, label="new"), fresh=False)])
        first = await store.commit([tells(flow, 2)])

        assert first == 2
        assert await store.last_position() == 2

    async def test_a_reader_that_pages_beside_a_writer_misses_nothing(self, store: Store) -> None:
        """An event must never appear below a position that could be read already."""
        flow = await put(store)
        seen: list[int] = []

        async def write() -> None:
            for seq in range(2, 40):
                await store.commit([tells(flow, seq)])
                await asyncio.sleep(0)

        writing = asyncio.ensure_future(write())
        over = False
        while not over:
            over = writing.done()
            while page := await store.events_after(ALICE, seen[-1] if seen else 0, 7):
                seen.extend(event.position for event in page)
                assert len(seen) < 40, f"39 events were written, and these are told: {seen}"
            await asyncio.sleep(0)
        await writing

        assert seen == list(range(1, 40))

    async def test_history_is_read_in_pages(self, store: Store) -> None:
        """Lines after a number, in order, at most `limit`; other flows' lines are not among them."""
        flow = await put(store)
        await put(store, "other")
        await store.commit([tells(flow, 2, 3, 4, 5)])

        pages = [
            [e.seq for e in await store.history(ALICE, "flow", after_seq=after, limit=2)]
            for after in (0, 2, 4, 5, 99)
        ]

        assert pages == [[1, 2], [3, 4], [5], [], []]
        assert await store.last_seq(ALICE, "flow") == 5
        assert await store.last_seq(ALICE, "other") == 1
        assert await store.history(ALICE, "flow", after_seq=0, limit=0) == []

    async def test_the_history_of_no_flow_is_empty(self, store: Store) -> None:
        """A flow that is not there has no lines and no newest one."""
        await put(store)

        assert await store.history(ALICE, "ghost", after_seq=0, limit=10) == []
        assert await store.last_seq(ALICE, "ghost") == 0

    async def test_an_event_comes_back_as_it_was_written(self, store: Store) -> None:
        """Its place in the store is added; everything else is as it was handed in."""
        flow = await put(store)
        line = event_of(
            flow, 2, actor="alice", cause="a call", task_id="t", changed={"stateJson": [1, None]}
        )

        position = await store.commit([FlowWrite(flow=None, tasks=[], events=[line])])

        for [event] in (
            await store.history(ALICE, "flow", after_seq=1, limit=10),
            await store.events_after(ALICE, 1, 10),
        ):
            assert (event.position, event.seq, event.at, event.revision) == (position, 2, NOW, 1)
            assert (event.actor, event.cause, event.task_id) == ("alice", "a call", "t")
            assert event.changed == {"stateJson": [1, None]}

    async def test_events_after_a_position_are_read_in_pages(self, store: Store) -> None:
        """After, not from: the position a reader has seen is not told again."""
        flow = await put(store)
        await store.commit([tells(flow, 2, 3, 4)])

        async def seqs(after: int, limit: int) -> list[int]:
            return [event.seq for event in await store.events_after(ALICE, after, limit)]

        assert await seqs(0, 3) == [1, 2, 3]
        assert await seqs(1, 2) == [2, 3]
        assert await seqs(3, 3) == [4]
        assert await seqs(4, 3) == []
        assert await seqs(99, 3) == []
        assert await seqs(0, 0) == []

    async def test_a_page_of_one_owners_events_is_full_whoever_else_writes(
        self, store: Store
    ) -> None:
        """Others' events take no place in it, and keep their positions."""
        hers = await put(store)
        his = await put(store, owner_key="bob")
        for seq in (2, 3):
            await store.commit([tells(hers, seq), tells(his, seq)])

        page = await store.events_after(BOB, 0, 2)
        rest = await store.events_after(BOB, page[-1].position, 2)

        assert [(event.position, event.seq) for event in page] == [(2, 1), (4, 2)]
        assert [(event.position, event.seq) for event in rest] == [(6, 3)]
