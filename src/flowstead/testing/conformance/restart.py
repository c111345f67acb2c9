"""What a restart finds: everything that was answered, and numbers that go on."""

from __future__ import annotations

from msgspec import Raw
from msgspec.structs import replace

from flowstead.model.flow import FlowKey
from flowstead.store import codec
from flowstead.store.port import EVERYONE, Store
from flowstead.testing.conformance.fixtures import MakeStore
from flowstead.testing.conformance.reads import ids, loaded, positions
from flowstead.testing.conformance.rows import (
    ALICE,
    changes,
    children,
    creates,
    flow_of,
    put,
    put_task,
    task_of,
    tells,
)


class Restart:
    """Closing and opening the same data, `next_key`, and `upkeep`."""

    async def test_reopening_sees_everything(self, store: Store, another: MakeStore) -> None:
        """Flows, children, history, ticks and keys."""
        flow = await put(store, idempotency_key="once", due_at=10)
        await put_task(store, flow, "task", run_id="run", launched=True)
        await store.commit([tells(flow, 2)])
        before = await loaded(store)
        await store.aclose()

        again = another()
        await again.open()
        after = await loaded(again)

        assert codec.encode(after.flow) == codec.encode(before.flow)
        assert [codec.encode(t) for t in after.active] == [codec.encode(t) for t in before.active]
        assert (after.run_ids, after.last_seq) == ([("run", "task")], 2)
        assert await again.last_position() == 2
        assert await again.next_due(after=0) == 10
        assert await again.find_by_idempotency_key("alice", "once") == FlowKey("alice", "flow")
        assert await again.list_unfinished([], after_key=0, limit=9) == [
            (flow.key, FlowKey("alice", "flow"))
        ]

    async def test_the_same_store_opens_again(self, store: Store) -> None:
        """A store outlives its runtime: whoever made it may close and open it."""
        await put(store)
        await store.aclose()

        await store.open()

        await put(store, "next")
        assert await ids(store, ALICE) == ["next", "flow"]

    async def test_changes_are_there_after_a_restart(
        self, store: Store, another: MakeStore
    ) -> None:
        """The newest revision of each, not the first that was written."""
        flow = await put(store)
        task = await put_task(store, flow, "task")
        await store.commit(
            [
                changes(replace(flow, revision=2, state_json=Raw(b"[2]")), seqs=[2]),
                children(replace(task, progress_summary="half way"), fresh=False),
            ]
        )
        await store.aclose()

        again = another()
        await again.open()

        snapshot = await loaded(again)
        assert (snapshot.flow.revision, snapshot.flow.state_json) == (2, Raw(b"[2]"))
        assert [child.progress_summary for child in snapshot.active] == ["half way"]
        assert await again.commit([changes(replace(flow, revision=3), seqs=[3])]) == 3

    async def test_positions_go_on_after_a_restart(self, store: Store, another: MakeStore) -> None:
        """Neither begun anew nor with a gap, however often."""
        flow = await put(store)
        await store.aclose()

        for seq in (2, 3, 4):
            again = another()
            await again.open()
            assert await again.commit([tells(flow, seq)]) == seq
            assert await positions(again) == list(range(1, seq + 1))
            await again.aclose()

    async def test_keys_never_repeat_and_grow(self, store: Store, another: MakeStore) -> None:
        """No row that is stored has a key that is given later; 0 is where paging begins, so none is 0."""
        keys = [store.next_key() for _ in range(100)]
        flow = flow_of(keys[-2], "flow")
        await store.commit([creates(flow, task_of(keys[-1], flow, "task"))])
        await store.aclose()

        again = another()
        await again.open()
        keys += [again.next_key() for _ in range(100)]

        assert keys == sorted(set(keys))
        assert keys[0] > 0
        assert keys[-1] < 2**63

    async def test_upkeep_changes_nothing_anybody_reads(self, store: Store) -> None:
        """Idle or busy, with or without anything to do."""
        await store.upkeep(idle=True)
        flow = await put(store)
        await put_task(store, flow, "task")
        before = await loaded(store)

        await store.upkeep(idle=True)
        await store.upkeep(idle=False)

        after = await loaded(store)
        assert (after.doc, after.last_seq) == (before.doc, before.last_seq)
        assert [codec.encode(t) for t in after.active] == [codec.encode(t) for t in before.active]
        assert await ids(store, EVERYONE) == ["flow"]
        assert await positions(store) == [1]

    async def test_writing_goes_on_after_upkeep(self, store: Store, another: MakeStore) -> None:
        """And what is written then is there after a restart."""
        await put(store, "before")
        await store.upkeep(idle=True)

        await put(store, "after")
        await store.aclose()

        again = another()
        await again.open()
        assert await ids(again, ALICE) == ["after", "before"]
