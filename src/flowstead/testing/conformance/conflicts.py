"""A write that does not fit the stored rows is refused, and nothing changes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from flowstead.errors import WriteConflict
from flowstead.model.flow import FlowKey, FlowStatus
from flowstead.store.port import EVERYONE, Store
from flowstead.testing.conformance.reads import ids, loaded
from flowstead.testing.conformance.rows import (
    ALICE,
    NOW,
    changes,
    children,
    creates,
    flow_of,
    put,
    put_task,
    task_of,
    tells,
)


class Conflicts:
    """Revisions are compared, and what must be unique is, inside a batch as well as with what is stored."""

    async def test_a_stale_write_is_refused_and_nothing_changes(self, store: Store) -> None:
        """`expected_revision` is compared with the stored revision in the transaction itself."""
        flow = await put(store)
        await store.commit([changes(replace(flow, revision=2, goal="second"), seqs=[2])])

        with pytest.raises(WriteConflict):
            await store.commit([changes(replace(flow, revision=2, goal="stale"), seqs=[3])])

        snapshot = await loaded(store)
        assert (snapshot.flow.revision, snapshot.flow.goal) == (2, "second")
        assert snapshot.last_seq == 2

    async def test_a_write_from_the_future_is_refused(self, store: Store) -> None:
        """A revision that has not been reached does not fit either."""
        flow = await put(store)

        with pytest.raises(WriteConflict):
            await store.commit([changes(replace(flow, revision=4), seen=3, seqs=[2])])

        assert (await loaded(store)).flow.revision == 1

    async def test_of_two_writers_who_saw_the_same_revision_one_is_refused(
        self, store: Store
    ) -> None:
        """Two changes over one revision never both succeed, not even in one batch."""
        flow = await put(store)
        first = changes(replace(flow, revision=2, goal="first"), seqs=[2])
        second = changes(replace(flow, revision=2, goal="second"), seqs=[3])

        with pytest.raises(WriteConflict):
            await store.commit([first, second])

        assert (await loaded(store)).flow.revision == 1
        await store.commit([first])
        with pytest.raises(WriteConflict):
            await store.commit([second])
        assert (await loaded(store)).flow.goal == "first"

    async def test_a_change_of_a_flow_that_is_not_there_is_refused(self, store: Store) -> None:
        """A change never makes a flow."""
        ghost = flow_of(store.next_key(), revision=2)

        with pytest.raises(WriteConflict):
            await store.commit([changes(ghost, seqs=[1])])

        assert await store.load([FlowKey("alice", "flow")]) == [None]

    async def test_the_same_id_of_the_same_owner_is_refused(self, store: Store) -> None:
        """Creating is not replacing."""
        await put(store, goal="first")

        with pytest.raises(WriteConflict):
            await put(store, goal="second")

        assert (await loaded(store)).flow.goal == "first"
        assert await ids(store, ALICE) == ["flow"]

    async def test_the_id_of_an_ended_flow_is_not_free_again(self, store: Store) -> None:
        """An ended flow keeps its id, and is not written over."""
        await put(store, goal="first", status=FlowStatus.SUCCEEDED)

        with pytest.raises(WriteConflict):
            await put(store, goal="second")

        assert (await loaded(store)).flow.goal == "first"

    async def test_a_key_that_is_taken_is_refused(self, store: Store) -> None:
        """Two flows never share a key of the store, whatever they are called."""
        flow = await put(store, "first")

        with pytest.raises(WriteConflict):
            await store.commit([creates(flow_of(flow.key, "second"))])

        assert await ids(store, EVERYONE) == ["first"]

    async def test_a_batch_that_makes_the_same_flow_twice_is_refused_whole(
        self, store: Store
    ) -> None:
        """Uniqueness holds inside a batch, too."""
        first, second = flow_of(store.next_key()), flow_of(store.next_key())

        with pytest.raises(WriteConflict):
            await store.commit([creates(first), creates(second)])

        assert await ids(store, EVERYONE) == []

    # ---- idempotency keys -------------------------------------------------------------------------

    async def test_an_idempotency_key_is_used_once_per_owner(self, store: Store) -> None:
        """A second flow of the owner with the key is refused; another owner has keys of its own."""
        await put(store, "first", idempotency_key="once")

        with pytest.raises(WriteConflict):
            await put(store, "second", idempotency_key="once")
        await put(store, "other", owner_key="bob", idempotency_key="once")

        assert await ids(store, ALICE) == ["first"]
        assert await store.find_by_idempotency_key("alice", "once") == FlowKey("alice", "first")
        assert await store.find_by_idempotency_key("bob", "once") == FlowKey("bob", "other")

    async def test_flows_without_an_idempotency_key_do_not_collide(self, store: Store) -> None:
        """No key is not a key; a database that counts NULL as a value would refuse the second."""
        await put(store, "first")
        await put(store, "second")

        assert await ids(store, ALICE) == ["second", "first"]

    async def test_an_empty_idempotency_key_is_a_key(self, store: Store) -> None:
        """Empty text is not the absence of text."""
        await put(store, "first", idempotency_key="")
        await put(store, "without")

        with pytest.raises(WriteConflict):
            await put(store, "second", idempotency_key="")

        assert await store.find_by_idempotency_key("alice", "") == FlowKey("alice", "first")

    async def test_an_idempotency_key_names_its_flow_for_ever(self, store: Store) -> None:
        """The flow it was first used for, changed or ended."""
        flow = await put(store, idempotency_key="once")

        ended = replace(flow, revision=2, status=FlowStatus.FAILED, ended_at=NOW)
        await store.commit([changes(ended, seqs=[2])])

        assert await store.find_by_idempotency_key("alice", "once") == FlowKey("alice", "flow")
        with pytest.raises(WriteConflict):
            await put(store, "second", idempotency_key="once")

    async def test_an_idempotency_key_nobody_used_names_nothing(self, store: Store) -> None:
        """Neither a flow's id nor a part of a key finds anything."""
        await put(store, idempotency_key="once")

        for key in ("flow", "onc", "once ", "ONCE", "%", ""):
            assert await store.find_by_idempotency_key("alice", key) is None, key

    async def test_a_batch_that_uses_one_idempotency_key_twice_is_refused_whole(
        self, store: Store
    ) -> None:
        """Two creations with one key may meet in one batch; then neither is written."""
        first = flow_of(store.next_key(), "first", idempotency_key="once")
        second = flow_of(store.next_key(), "second", idempotency_key="once")

        with pytest.raises(WriteConflict):
            await store.commit([creates(first), creates(second)])

        assert await ids(store, EVERYONE) == []

    # ---- children and history ---------------------------------------------------------------------

    async def test_a_change_of_a_child_that_is_not_there_is_refused(self, store: Store) -> None:
        """A change never makes a child."""
        flow = await put(store)
        ghost = task_of(store.next_key(), flow, "ghost")

        with pytest.raises(WriteConflict):
            await store.commit([children(ghost, fresh=False)])

        assert await store.find_task(ALICE, "ghost") is None

    async def test_a_task_id_is_used_once(self, store: Store) -> None:
        """Whoever comes second with the id of a child is refused, in another flow and of another owner, too."""
        flow = await put(store)
        other = await put(store, owner_key="bob")
        await put_task(store, flow, "task", label="first")

        for wanted in (flow, other):
            with pytest.raises(WriteConflict):
                await put_task(store, wanted, "task", label="second")

        found = await store.find_task(EVERYONE, "task")
        assert found is not None and found[1].label == "first"
        assert [task.label for task in await store.list_tasks(ALICE, "flow")] == ["first"]

    async def test_a_run_id_is_used_once_in_a_flow(self, store: Store) -> None:
        """Another flow may use it again: run ids are names inside a flow."""
        flow = await put(store, "flow")
        other = await put(store, "other")
        await put_task(store, flow, "first", run_id="run")

        with pytest.raises(WriteConflict):
            await put_task(store, flow, "second", run_id="run")
        await put_task(store, other, "third", run_id="run")

        assert (await loaded(store, "flow")).run_ids == [("run", "first")]
        assert (await loaded(store, "other")).run_ids == [("run", "third")]

    async def test_children_without_a_run_id_do_not_collide(self, store: Store) -> None:
        """No run id is not a run id."""
        flow = await put(store)
        await put_task(store, flow, "first")
        await put_task(store, flow, "second")

        assert [t.task_id for t in await store.list_tasks(ALICE, "flow")] == ["first", "second"]

    async def test_a_batch_that_makes_the_same_run_twice_is_refused_whole(
        self, store: Store
    ) -> None:
        """A step must never be begun twice, whoever else is in the batch."""
        flow = await put(store)
        first = task_of(store.next_key(), flow, "first", run_id="run")
        second = task_of(store.next_key(), flow, "second", run_id="run")

        with pytest.raises(WriteConflict):
            await store.commit([children(first, second)])

        assert await store.list_tasks(ALICE, "flow") == []

    async def test_a_sequence_number_is_used_once_in_a_flow(self, store: Store) -> None:
        """A flow's history has one line for each number."""
        flow = await put(store)

        with pytest.raises(WriteConflict):
            await store.commit([tells(flow, 1)])

        assert await store.last_seq(ALICE, "flow") == 1
        assert await store.last_position() == 1
