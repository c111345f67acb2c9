"""A read on behalf of one owner finds that owner's rows only."""

from __future__ import annotations

from flowstead.model.flow import FlowKey
from flowstead.model.task import TaskStatus
from flowstead.store.port import EVERYONE, FlowQuery, Scope, Store
from flowstead.testing.conformance.reads import ids
from flowstead.testing.conformance.rows import ALICE, BOB, put, put_task, tells

STRANGERS = ("bob", "", "alice ", "Alice", "alic_", "%", "alice\x00", "lice")


class Isolation:
    """No verb tells one owner of another; an operator's scope finds everybody."""

    async def test_another_owner_finds_no_flow(self, store: Store) -> None:
        """Not by its id, its cursor, its snapshot or its idempotency key."""
        await put(store, "secret", idempotency_key="once")

        for owner in STRANGERS:
            stranger = Scope(owner)
            assert await store.find_flow(stranger, "secret") is None, owner
            assert await store.key_of(stranger, "secret") is None, owner
            assert await store.load([FlowKey(owner, "secret")]) == [None], owner
            assert await store.find_by_idempotency_key(owner, "once") is None, owner

    async def test_another_owner_lists_no_flow(self, store: Store) -> None:
        """Whatever condition the listing has: the owner is one more, never one instead."""
        await put(store, "secret", correlation_id="c", controller_id="k")

        for owner in STRANGERS:
            stranger = Scope(owner)
            assert await ids(store, stranger) == [], owner
            assert await ids(store, stranger, id_prefix="secret") == [], owner
            assert await ids(store, stranger, id_prefix="") == [], owner
            assert await ids(store, stranger, correlation_id="c") == [], owner
            assert await ids(store, stranger, controller_id="k") == [], owner
            assert await ids(store, stranger, statuses=["running"]) == [], owner
            assert await ids(store, stranger, live=True, before_key=10**6) == [], owner

    async def test_another_owner_finds_no_child(self, store: Store) -> None:
        """Not by its id, and not as one of its flow's."""
        flow = await put(store, "secret")
        await put_task(store, flow, "task", run_id="run")

        for owner in STRANGERS:
            stranger = Scope(owner)
            assert await store.find_task(stranger, "task") is None, owner
            assert await store.list_tasks(stranger, "secret") == [], owner
            assert await store.list_tasks(stranger, "secret", task_ids=["task"]) == [], owner
            assert await store.list_tasks(stranger, "secret", statuses=["queued"]) == [], owner
            assert await store.summarize(stranger, "secret") is None, owner

    async def test_another_owner_reads_no_history(self, store: Store) -> None:
        """Neither the flow's own, nor the store's."""
        flow = await put(store, "secret")
        await store.commit([tells(flow, 2)])

        for owner in STRANGERS:
            stranger = Scope(owner)
            assert await store.history(stranger, "secret", after_seq=0, limit=10) == [], owner
            assert await store.last_seq(stranger, "secret") == 0, owner
            assert await store.events_after(stranger, 0, 10) == [], owner

    async def test_an_owner_finds_only_its_own_where_ids_are_the_same(self, store: Store) -> None:
        """The same flow id, run id and correlation id of two owners never meet."""
        hers = await put(store, goal="hers", correlation_id="c")
        his = await put(store, owner_key="bob", goal="his", correlation_id="c")
        await put_task(store, hers, "her-task", run_id="run")
        await put_task(store, his, "his-task-1", run_id="run")
        await put_task(store, his, "his-task-2", status=TaskStatus.LOST)
        await store.commit([tells(his, 2, 3)])

        for scope, goal, key, tasks, seqs in (
            (ALICE, "hers", hers.key, ["her-task"], [1]),
            (BOB, "his", his.key, ["his-task-1", "his-task-2"], [1, 2, 3]),
        ):
            flow = await store.find_flow(scope, "flow")
            summary = await store.summarize(scope, "flow")
            events = await store.history(scope, "flow", after_seq=0, limit=10)
            listed = await store.list_flows(scope, FlowQuery(correlation_id="c"), 10)

            assert flow is not None and flow.goal == goal
            assert await store.key_of(scope, "flow") == key
            assert [found.goal for found in listed] == [goal]
            assert [t.task_id for t in await store.list_tasks(scope, "flow")] == tasks
            assert summary is not None and summary.total == len(tasks)
            assert [event.seq for event in events] == seqs
            assert await store.last_seq(scope, "flow") == len(seqs)
            assert len(await store.events_after(scope, 0, 10)) == len(seqs)
        assert await store.find_task(ALICE, "his-task-1") is None
        assert await store.list_tasks(ALICE, "flow", task_ids=["his-task-1"]) == []

    async def test_an_operator_asking_for_a_shared_id_hears_of_the_newest_flow_from_every_verb(
        self, store: Store
    ) -> None:
        """All verbs must mean the same flow, or an operator sees one flow with another's children."""
        older = await put(store, goal="older")
        newer = await put(store, owner_key="bob", goal="newer")
        await put_task(store, older, "older-task")
        await put_task(store, newer, "newer-task")
        await store.commit([tells(older, 2, 3)])

        flow = await store.find_flow(EVERYONE, "flow")
        summary = await store.summarize(EVERYONE, "flow")
        events = await store.history(EVERYONE, "flow", after_seq=0, limit=10)

        assert flow is not None and flow.goal == "newer"
        assert await store.key_of(EVERYONE, "flow") == newer.key
        assert summary is not None and summary.total == 1
        assert [t.task_id for t in await store.list_tasks(EVERYONE, "flow")] == ["newer-task"]
        assert [event.seq for event in events] == [1]
        assert await store.last_seq(EVERYONE, "flow") == 1

    async def test_an_operator_sees_everybody(self, store: Store) -> None:
        """`Scope(None)` restricts nothing."""
        await put(store, "hers")
        his = await put(store, "his", owner_key="bob")
        await put_task(store, his, "task")

        found = await store.find_task(EVERYONE, "task")
        flow = await store.find_flow(EVERYONE, "his")

        assert await ids(store, EVERYONE) == ["his", "hers"]
        assert flow is not None and flow.owner_key == "bob"
        assert found is not None and found[0] == FlowKey("bob", "his")
        assert [e.flow_id for e in await store.events_after(EVERYONE, 0, 9)] == ["hers", "his"]

    async def test_an_owner_without_a_name_is_not_everybody(self, store: Store) -> None:
        """An empty owner key is an owner like any other."""
        await put(store, "nameless", owner_key="")
        await put(store, "hers")

        assert await ids(store, Scope("")) == ["nameless"]
        assert [e.flow_id for e in await store.events_after(Scope(""), 0, 9)] == ["nameless"]
