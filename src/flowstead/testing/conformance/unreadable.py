"""A row that cannot be read is an error for itself alone, and is told of."""

from __future__ import annotations

import pytest

from flowstead.errors import SnapshotUnreadable, WriteConflict
from flowstead.model.flow import FlowKey
from flowstead.model.task import TaskStatus
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.store.port import EVERYONE, Snapshot, Store
from flowstead.testing.conformance.fixtures import StoreFixtures
from flowstead.testing.conformance.reads import ids
from flowstead.testing.conformance.rows import (
    ALICE,
    BOB,
    children,
    creates,
    event_of,
    flow_of,
    put,
    put_task,
    task_of,
    tells,
    with_doc,
)


class UnreadableRows(StoreFixtures):
    """Rows are damaged by way of `commit_damaged`."""

    @pytest.mark.parametrize(
        "doc",
        ["{", "", "null", "[]", '{"flowId":"bad"}', '"text"', "[" * 100_000],
        ids=["cut", "empty", "null", "list", "fields missing", "text", "deep"],
    )
    async def test_an_unreadable_flow_is_refused_alone_and_listed(
        self, store: Store, doc: str
    ) -> None:
        """`load` answers the error in its place, `find_flow` raises it, listings leave the flow out."""
        await put(store, "good-1")
        bad = flow_of(store.next_key(), "bad")
        await self.commit_damaged(store, with_doc(creates(bad), doc))
        await put(store, "good-2")

        keys = [FlowKey("alice", name) for name in ("good-1", "bad", "good-2")]
        first, broken, second = await store.load(keys)

        assert isinstance(first, Snapshot) and isinstance(second, Snapshot)
        assert isinstance(broken, SnapshotUnreadable)
        with pytest.raises(SnapshotUnreadable):
            await store.find_flow(ALICE, "bad")
        assert await ids(store, ALICE) == ["good-2", "good-1"]
        [listed] = await store.list_unreadable()
        assert (listed.table, listed.key) == ("flows", bad.key)
        assert listed.problem

    async def test_an_unreadable_flow_takes_no_place_in_a_page(self, store: Store) -> None:
        """The limit counts flows that are answered."""
        await put(store, "good")
        bad = flow_of(store.next_key(), "bad")
        await self.commit_damaged(store, with_doc(creates(bad), "{"))

        assert await ids(store, ALICE, limit=1) == ["good"]

    async def test_an_unreadable_flow_still_guards_its_id(self, store: Store) -> None:
        """Nothing is ever written over a row because it could not be read."""
        bad = flow_of(store.next_key(), "bad")
        await self.commit_damaged(store, with_doc(creates(bad), "{"))

        with pytest.raises(WriteConflict):
            await put(store, "bad")

        assert isinstance((await store.load([FlowKey("alice", "bad")]))[0], SnapshotUnreadable)

    async def test_an_unreadable_active_child_takes_its_own_flow_down_only(
        self, store: Store
    ) -> None:
        """A flow is never loaded without a child it has."""
        hurt = await put(store, "hurt")
        fine = await put(store, "fine")
        await put_task(store, fine, "fine-task")
        task = task_of(store.next_key(), hurt, "bad-task")
        row = codec.task_row(task, due_at=task.next_attempt_at, fresh=True)._replace(doc="{}")
        await self.commit_damaged(store, FlowWrite(flow=None, tasks=[row], events=[]))

        broken, whole = await store.load([FlowKey("alice", "hurt"), FlowKey("alice", "fine")])

        assert isinstance(broken, SnapshotUnreadable)
        assert isinstance(whole, Snapshot)
        assert [t.task_id for t in await store.list_tasks(ALICE, "fine")] == ["fine-task"]
        [listed] = await store.list_unreadable()
        assert (listed.table, listed.key) == ("tasks", task.key)

    async def test_an_unreadable_ended_child_does_not_keep_its_flow_from_loading(
        self, store: Store
    ) -> None:
        """Of an ended child a snapshot needs the run id only, and that is there."""
        flow = await put(store)
        task = task_of(store.next_key(), flow, "bad-task", status=TaskStatus.FAILED, run_id="run")
        row = codec.task_row(task, due_at=task.next_attempt_at, fresh=True)._replace(doc="{}")
        await self.commit_damaged(store, FlowWrite(flow=None, tasks=[row], events=[]))

        [snapshot] = await store.load([FlowKey("alice", "flow")])

        assert isinstance(snapshot, Snapshot)
        assert (snapshot.active, snapshot.run_ids) == ([], [("run", "bad-task")])

    async def test_an_unreadable_child_is_an_error_where_it_is_asked_for(
        self, store: Store
    ) -> None:
        """It is not passed off as a child that does not exist."""
        flow = await put(store)
        task = task_of(store.next_key(), flow, "bad-task")
        await store.commit([children(task_of(store.next_key(), flow, "good-task"))])
        row = codec.task_row(task, due_at=task.next_attempt_at, fresh=True)._replace(doc="{}")
        await self.commit_damaged(store, FlowWrite(flow=None, tasks=[row], events=[]))

        with pytest.raises(SnapshotUnreadable):
            await store.find_task(ALICE, "bad-task")
        with pytest.raises(SnapshotUnreadable):
            await store.list_tasks(ALICE, "flow")

        assert await store.find_task(ALICE, "good-task") is not None

    async def test_an_unreadable_event_does_not_silence_other_flows(self, store: Store) -> None:
        """Readers of the store's history pass it by."""
        hurt = await put(store, "hurt")
        line = event_of(hurt, 2)._replace(doc="{")
        write = FlowWrite(flow=None, tasks=[], events=[line])
        position = await self.commit_damaged(store, write)
        await put(store, "fine", owner_key="bob")

        [listed] = await store.list_unreadable()

        assert (listed.table, listed.key) == ("events", position)
        assert [e.flow_id for e in await store.events_after(BOB, 0, 9)] == ["fine"]
        assert "fine" in [e.flow_id for e in await store.events_after(EVERYONE, 0, 9)]

    async def test_an_unreadable_event_keeps_its_number_and_takes_no_place_in_a_page(
        self, store: Store
    ) -> None:
        """The lines after it are read; its number and its position are not given again."""
        flow = await put(store)
        line = event_of(flow, 2)._replace(doc="{")
        await self.commit_damaged(store, FlowWrite(flow=None, tasks=[], events=[line]))
        await store.commit([tells(flow, 3)])

        history = await store.history(ALICE, "flow", after_seq=0, limit=2)
        events = await store.events_after(EVERYONE, 0, 2)

        assert [event.seq for event in history] == [1, 3]
        assert [event.position for event in events] == [1, 3]
        assert (await store.last_seq(ALICE, "flow"), await store.last_position()) == (3, 3)
