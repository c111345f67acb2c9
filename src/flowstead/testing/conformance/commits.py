"""What is written comes back as it was, all of a batch or nothing of it."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import Raw
from msgspec.structs import replace

from flowstead.errors import WriteConflict
from flowstead.model.flow import FlowKey, FlowStatus
from flowstead.model.task import TaskStatus
from flowstead.store import codec
from flowstead.store.port import EVERYONE, FlowQuery, Store
from flowstead.testing.conformance.reads import ids, loaded, positions
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


class Commits:
    """`commit` keeps whole batches, and `load` and `find_flow` answer what was kept."""

    async def test_a_store_has_a_name_for_messages(self, unopened: Store) -> None:
        """`name` goes into messages for people, also before the store is open."""
        assert isinstance(unopened.name, str)
        assert unopened.name

    async def test_a_new_store_has_nothing(self, store: Store) -> None:
        """Every read of an empty store answers, with nothing."""
        assert await store.last_position() == 0
        assert await store.last_seq(EVERYONE, "flow") == 0
        assert await store.events_after(EVERYONE, 0, 10) == []
        assert await store.load([FlowKey("alice", "flow")]) == [None]
        assert await store.find_flow(EVERYONE, "flow") is None
        assert await store.find_by_idempotency_key("alice", "once") is None
        assert await ids(store, EVERYONE) == []
        assert await store.key_of(EVERYONE, "flow") is None
        assert await store.find_task(EVERYONE, "task") is None
        assert await store.list_tasks(EVERYONE, "flow") == []
        assert await store.summarize(EVERYONE, "flow") is None
        assert await store.history(EVERYONE, "flow", after_seq=0, limit=10) == []
        assert await store.list_due(after=0, until=NOW) == []
        assert await store.next_due(after=0) is None
        assert await store.list_unfinished(["mine"], after_key=0, limit=10) == []
        assert await store.count_by_controller() == {}
        assert await store.list_unreadable() == []

    async def test_a_flow_comes_back_as_it_was_written(self, store: Store) -> None:
        """The stored record is the one handed in, down to the bytes of the user's JSON."""
        flow = flow_of(
            store.next_key(),
            controller_id="plugin/triage",
            correlation_id="thread-1",
            idempotency_key="once",
            request_digest="abc",
            current_step="classify",
            state_json=Raw(b'{"threads":[1,2.5,null,"\\u00e9"]}'),
            wait_json=Raw(b"null"),
            cancel_requested_at=NOW,
        )

        await store.commit([creates(flow)])

        snapshot = await loaded(store)
        assert codec.encode(snapshot.flow) == codec.encode(flow)
        assert snapshot.doc == codec.encode(flow)

    async def test_a_flow_handed_out_has_its_json_decoded(self, store: Store) -> None:
        """`find_flow` answers a `Flow` with values; only `load` answers encoded JSON."""
        await put(store, state_json=Raw(b'{"n":[1,null]}'))

        flow = await store.find_flow(ALICE, "flow")

        assert flow is not None
        assert flow.state_json == {"n": [1, None]}
        assert flow.wait_json is None

    async def test_what_is_handed_out_is_not_shared(self, store: Store) -> None:
        """Changing a record that was handed out changes nothing that is handed out later."""
        flow = await put(store, state_json=Raw(b'{"n":[1]}'))
        await put_task(store, flow, "task", input_json=Raw(b'{"n":[1]}'))

        for _ in range(2):
            found = await store.find_flow(ALICE, "flow")
            [listed] = await store.list_flows(ALICE, FlowQuery(), 10)
            [child] = await store.list_tasks(ALICE, "flow")

            assert found is not None
            assert [one.state_json for one in (found, listed)] == [{"n": [1]}] * 2
            assert child.input_json == {"n": [1]}
            for json in (found.state_json, listed.state_json, child.input_json):
                json["n"].append(2)

    async def test_a_large_record_comes_back_whole(self, store: Store) -> None:
        """A megabyte of state is nothing unusual."""
        text = "é🙂" * 250_000
        flow = await put(store, state_json=Raw(codec.encode({"text": text})))

        assert codec.encode((await loaded(store)).flow) == codec.encode(flow)

    async def test_a_flow_goes_in_with_its_children_and_its_history(self, store: Store) -> None:
        """One write carries all three; none of them has to be there before."""
        flow = flow_of(store.next_key())
        child = task_of(store.next_key(), flow, "child", run_id="run")

        position = await store.commit([creates(flow, child, seqs=[1, 2])])

        snapshot = await loaded(store)
        assert position == 1
        assert [task.task_id for task in snapshot.active] == ["child"]
        assert (snapshot.run_ids, snapshot.last_seq) == ([("run", "child")], 2)
        assert await positions(store) == [1, 2]

    async def test_a_write_over_the_revision_it_saw_replaces_the_flow(self, store: Store) -> None:
        """A flow is found by what it is now, and no longer by what it was."""
        flow = await put(store)

        changed = replace(flow, revision=2, current_step="next", status=FlowStatus.WAITING)
        await store.commit([changes(changed, seqs=[2])])

        snapshot = await loaded(store)
        assert snapshot.flow.revision == 2
        assert snapshot.flow.current_step == "next"
        assert await ids(store, ALICE, statuses=["waiting"]) == ["flow"]
        assert await ids(store, ALICE, statuses=["running"]) == []

    async def test_an_ended_flow_is_no_longer_live(self, store: Store) -> None:
        """The end that a change brings is found by `live` and by the status."""
        flow = await put(store, controller_id="mine")

        ended = replace(flow, revision=2, status=FlowStatus.SUCCEEDED, ended_at=NOW)
        await store.commit([changes(ended, seqs=[2])])

        assert await ids(store, ALICE, live=True) == []
        assert await ids(store, ALICE, statuses=["succeeded"]) == ["flow"]
        assert await store.list_unfinished(["mine"], after_key=0, limit=10) == []
        assert await store.count_by_controller() == {}

    async def test_the_same_id_of_two_owners_names_two_flows(self, store: Store) -> None:
        """Ids are unique for each owner, not in the whole store."""
        await put(store, goal="hers")

        await put(store, owner_key="bob", goal="his")

        assert (await loaded(store)).flow.goal == "hers"
        assert (await loaded(store, owner_key="bob")).flow.goal == "his"

    async def test_loading_answers_in_the_order_asked(self, store: Store) -> None:
        """One answer for each key, in place: None for what is not there, the same again for a double."""
        for name in ("a", "b"):
            await put(store, name)
        wanted = [FlowKey("alice", name) for name in ("b", "ghost", "a", "b")]

        found = await store.load(wanted)

        names = [getattr(getattr(one, "flow", None), "flow_id", one) for one in found]
        assert names == ["b", None, "a", "b"]
        assert await store.load([]) == []

    async def test_many_writes_go_into_one_batch(self, store: Store) -> None:
        """A batch has as many writes as came together: a limit on a statement's parameters must not show."""
        names = [f"flow-{n:04}" for n in range(1_200)]

        first = await store.commit([creates(flow_of(store.next_key(), name)) for name in names])

        assert first == 1
        assert await store.last_position() == 1_200
        assert await ids(store, EVERYONE, limit=5_000) == names[::-1]
        found = await store.load([FlowKey("alice", name) for name in names])
        assert [getattr(one, "last_seq", one) for one in found] == [1] * 1_200

    async def test_an_empty_batch_is_fine(self, store: Store) -> None:
        """Writing nothing succeeds and leaves nothing."""
        await store.commit([])

        assert await store.last_position() == 0
        await put(store)
        assert await positions(store) == [1]

    async def test_a_read_sees_a_batch_whole_or_not_at_all(self, store: Store) -> None:
        """Reads go on beside a commit, and never see a part of it."""
        batch = [creates(flow_of(store.next_key(), f"flow-{n}")) for n in range(200)]
        seen = []

        writing = asyncio.ensure_future(store.commit(batch))
        while not writing.done():
            seen.append(len(await store.list_flows(EVERYONE, FlowQuery(), 1_000)))
            await asyncio.sleep(0)
        await writing
        seen.append(len(await store.list_flows(EVERYONE, FlowQuery(), 1_000)))

        assert set(seen) <= {0, 200}, f"a read saw a part of a batch of 200 flows: {seen}"
        assert seen[-1] == 200, "a commit answered before its rows could be read"

    async def test_one_misfit_refuses_the_whole_batch(self, store: Store) -> None:
        """Whatever stands before the misfit is taken back: flows, changes, children, history."""
        old = await put(store, "old")
        task = await put_task(store, old, "task")
        position = await store.last_position()

        fresh = flow_of(store.next_key(), "fresh")
        child = task_of(store.next_key(), old, "child", run_id="run")
        with pytest.raises(WriteConflict):
            await store.commit(
                [
                    creates(fresh),
                    changes(replace(old, revision=2), seqs=[2]),
                    children(child),
                    children(replace(task, status=TaskStatus.RUNNING), fresh=False),
                    changes(replace(old, revision=9), seen=8, seqs=[3]),
                ]
            )

        assert await store.load([FlowKey("alice", "fresh")]) == [None]
        snapshot = await loaded(store, "old")
        assert snapshot.flow.revision == 1
        assert snapshot.run_ids == []
        assert [found.status for found in snapshot.active] == ["queued"]
        assert await store.last_position() == position
        assert await store.find_task(ALICE, "child") is None
        assert await store.last_seq(ALICE, "old") == 1

    async def test_a_batch_after_a_refused_one_is_written(self, store: Store) -> None:
        """A refusal leaves no transaction open."""
        await put(store)
        with pytest.raises(WriteConflict):
            await put(store)

        await put(store, "next")

        assert await ids(store, ALICE) == ["next", "flow"]

    async def test_a_refused_batch_uses_up_nothing(self, store: Store) -> None:
        """Every id, key and number it named is free for the next batch."""
        old = await put(store, "old")
        fresh = flow_of(store.next_key(), "fresh", idempotency_key="once")
        child = task_of(store.next_key(), fresh, "child", run_id="run")
        batch = [creates(fresh, child), tells(old, 2)]
        with pytest.raises(WriteConflict):
            await store.commit([*batch, creates(flow_of(store.next_key(), "old"))])

        position = await store.commit(batch)

        assert position == 2
        assert await positions(store) == [1, 2, 3]
        assert await store.find_by_idempotency_key("alice", "once") == FlowKey("alice", "fresh")
        assert (await loaded(store, "fresh")).run_ids == [("run", "child")]
