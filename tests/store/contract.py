"""What every store must do, whatever it keeps its rows in.

Subclass `StoreContract` and give it a fixture `make_store` that answers stores over the same rows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import pytest
from msgspec import Raw
from msgspec.structs import replace

from flowstead.errors import SnapshotUnreadable, StoreError, StoreInUse, WriteConflict
from flowstead.model.flow import FlowKey, FlowStatus
from flowstead.model.task import TaskStatus
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.store.port import EVERYONE, Due, FlowQuery, Scope, Snapshot, Store
from tests.store.rows import (
    ALICE,
    BOB,
    HOSTILE,
    NOW,
    changes,
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

MakeStore: TypeAlias = Callable[[], Store]

hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())


async def loaded(store: Store, flow_id: str = "flow", owner_key: str = "alice") -> Snapshot:
    [found] = await store.load([FlowKey(owner_key, flow_id)])
    assert isinstance(found, Snapshot)
    return found


async def ids(store: Store, scope: Scope, limit: int = 100, **conditions: object) -> list[str]:
    query = FlowQuery(**conditions)  # type: ignore[arg-type]
    return [flow.flow_id for flow in await store.list_flows(scope, query, limit)]


class StoreContract:
    @pytest.fixture
    async def store(self, make_store: MakeStore) -> AsyncIterator[Store]:
        store = make_store()
        await store.open()
        yield store
        await store.aclose()

    # ---- writing ----------------------------------------------------------------------------------

    async def test_a_flow_comes_back_as_it_was_written(self, store: Store) -> None:
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
        await put(store, state_json=Raw(b'{"n":[1,null]}'))

        flow = await store.find_flow(ALICE, "flow")

        assert flow is not None
        assert flow.state_json == {"n": [1, None]}
        assert flow.wait_json is None

    async def test_what_is_handed_out_is_not_shared(self, store: Store) -> None:
        await put(store, state_json=Raw(b'{"n":[1]}'))
        first = await store.find_flow(ALICE, "flow")
        assert first is not None

        first.state_json["n"].append(2)

        second = await store.find_flow(ALICE, "flow")
        assert second is not None and second.state_json == {"n": [1]}

    async def test_a_write_over_the_revision_it_saw_replaces_the_flow(self, store: Store) -> None:
        flow = await put(store)

        await store.commit(
            [changes(replace(flow, revision=2, current_step="next", status=FlowStatus.WAITING))]
        )

        snapshot = await loaded(store)
        assert snapshot.flow.revision == 2
        assert snapshot.flow.current_step == "next"
        assert await ids(store, ALICE, statuses=["waiting"]) == ["flow"]
        assert await ids(store, ALICE, statuses=["running"]) == []

    async def test_a_stale_write_is_refused_and_nothing_changes(self, store: Store) -> None:
        flow = await put(store)
        await store.commit([changes(replace(flow, revision=2, goal="second"))])

        with pytest.raises(WriteConflict):
            await store.commit([changes(replace(flow, revision=2, goal="stale"), seqs=[2])])

        snapshot = await loaded(store)
        assert (snapshot.flow.revision, snapshot.flow.goal) == (2, "second")
        assert snapshot.last_seq == 1

    async def test_a_write_from_the_future_is_refused(self, store: Store) -> None:
        flow = await put(store)

        with pytest.raises(WriteConflict):
            await store.commit([changes(replace(flow, revision=4), seen=3)])

        assert (await loaded(store)).flow.revision == 1

    async def test_a_change_of_a_flow_that_is_not_there_is_refused(self, store: Store) -> None:
        ghost = flow_of(store.next_key(), revision=2)

        with pytest.raises(WriteConflict):
            await store.commit([changes(ghost)])

        assert await store.load([FlowKey("alice", "flow")]) == [None]

    async def test_the_same_id_of_the_same_owner_is_refused(self, store: Store) -> None:
        await put(store, goal="first")

        with pytest.raises(WriteConflict):
            await put(store, goal="second")

        assert (await loaded(store)).flow.goal == "first"
        assert await ids(store, ALICE) == ["flow"]

    async def test_the_same_id_of_two_owners_names_two_flows(self, store: Store) -> None:
        await put(store, goal="hers")

        await put(store, owner_key="bob", goal="his")

        assert (await loaded(store)).flow.goal == "hers"
        assert (await loaded(store, owner_key="bob")).flow.goal == "his"

    async def test_a_key_that_is_taken_is_refused(self, store: Store) -> None:
        flow = await put(store, "first")

        with pytest.raises(WriteConflict):
            await store.commit([creates(flow_of(flow.key, "second"))])

        assert await ids(store, EVERYONE) == ["first"]

    async def test_an_idempotency_key_is_used_once_per_owner(self, store: Store) -> None:
        await put(store, "first", idempotency_key="once")

        with pytest.raises(WriteConflict):
            await put(store, "second", idempotency_key="once")
        await put(store, "other", owner_key="bob", idempotency_key="once")

        assert await ids(store, ALICE) == ["first"]
        assert await store.find_by_idempotency_key("alice", "once") == FlowKey("alice", "first")
        assert await store.find_by_idempotency_key("bob", "once") == FlowKey("bob", "other")

    async def test_flows_without_an_idempotency_key_do_not_collide(self, store: Store) -> None:
        await put(store, "first")
        await put(store, "second")

        assert await ids(store, ALICE) == ["second", "first"]

    async def test_one_misfit_refuses_the_whole_batch(self, store: Store) -> None:
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
                    changes(replace(old, revision=9), seen=8),
                ]
            )

        assert await store.load([FlowKey("alice", "fresh")]) == [None]
        snapshot = await loaded(store, "old")
        assert snapshot.flow.revision == 1
        assert snapshot.run_ids == []
        assert [found.status for found in snapshot.active] == ["queued"]
        assert await store.last_position() == position
        assert await store.find_task(ALICE, "child") is None

    async def test_a_batch_after_a_refused_one_is_written(self, store: Store) -> None:
        await put(store)
        with pytest.raises(WriteConflict):
            await put(store)

        await put(store, "next")

        assert await ids(store, ALICE) == ["next", "flow"]

    async def test_a_batch_that_makes_the_same_flow_twice_is_refused_whole(
        self, store: Store
    ) -> None:
        first, second = flow_of(store.next_key()), flow_of(store.next_key())

        with pytest.raises(WriteConflict):
            await store.commit([creates(first), creates(second)])

        assert await ids(store, EVERYONE) == []

    async def test_a_batch_that_uses_one_idempotency_key_twice_is_refused_whole(
        self, store: Store
    ) -> None:
        first = flow_of(store.next_key(), "first", idempotency_key="once")
        second = flow_of(store.next_key(), "second", idempotency_key="once")

        with pytest.raises(WriteConflict):
            await store.commit([creates(first), creates(second)])

        assert await ids(store, EVERYONE) == []

    async def test_a_batch_that_makes_the_same_run_twice_is_refused_whole(
        self, store: Store
    ) -> None:
        flow = await put(store)
        first = task_of(store.next_key(), flow, "first", run_id="run")
        second = task_of(store.next_key(), flow, "second", run_id="run")

        with pytest.raises(WriteConflict):
            await store.commit([children(first, second)])

        assert await store.list_tasks(ALICE, "flow") == []

    async def test_an_empty_batch_is_fine(self, store: Store) -> None:
        await store.commit([])

        assert await store.last_position() == 0

    async def test_many_writes_go_into_one_batch(self, store: Store) -> None:
        writes = [creates(flow_of(store.next_key(), f"flow-{n:04}")) for n in range(1_200)]

        first = await store.commit(writes)

        assert first == 1
        assert await store.last_position() == 1_200
        assert len(await store.list_flows(EVERYONE, FlowQuery(), 5_000)) == 1_200

    # ---- children ---------------------------------------------------------------------------------

    async def test_a_child_comes_back_as_it_was_written(self, store: Store) -> None:
        flow = await put(store)

        task = await put_task(
            store, flow, "task", launched=True, run_id="r", input_json=Raw(b'[{"a":1}]')
        )

        [active] = (await loaded(store)).active
        assert codec.encode(active) == codec.encode(task)

    async def test_a_child_is_changed_in_place(self, store: Store) -> None:
        flow = await put(store)
        task = await put_task(store, flow, "task")

        ended = replace(
            task, status=TaskStatus.SUCCEEDED, ended_at=NOW, result_json=Raw(b'{"ok":true}')
        )
        await store.commit([children(ended, fresh=False)])

        found = await store.find_task(ALICE, "task")
        assert found is not None
        key, stored = found
        assert key == FlowKey("alice", "flow")
        assert (stored.status, stored.result_json) == ("succeeded", {"ok": True})
        assert (await loaded(store)).active == []

    async def test_a_change_of_a_child_that_is_not_there_is_refused(self, store: Store) -> None:
        flow = await put(store)
        ghost = task_of(store.next_key(), flow, "ghost")

        with pytest.raises(WriteConflict):
            await store.commit([children(ghost, fresh=False)])

        assert await store.find_task(ALICE, "ghost") is None

    async def test_a_task_id_is_used_once(self, store: Store) -> None:
        flow = await put(store)
        await put_task(store, flow, "task", label="first")

        with pytest.raises(WriteConflict):
            await put_task(store, flow, "task", label="second")

        assert [task.label for task in await store.list_tasks(ALICE, "flow")] == ["first"]

    async def test_a_run_id_is_used_once_in_a_flow(self, store: Store) -> None:
        flow = await put(store, "flow")
        other = await put(store, "other")
        await put_task(store, flow, "first", run_id="run")

        with pytest.raises(WriteConflict):
            await put_task(store, flow, "second", run_id="run")
        await put_task(store, other, "third", run_id="run")

        assert (await loaded(store, "flow")).run_ids == [("run", "first")]
        assert (await loaded(store, "other")).run_ids == [("run", "third")]

    async def test_children_without_a_run_id_do_not_collide(self, store: Store) -> None:
        flow = await put(store)
        await put_task(store, flow, "first")
        await put_task(store, flow, "second")

        assert [t.task_id for t in await store.list_tasks(ALICE, "flow")] == ["first", "second"]

    async def test_loading_brings_active_children_whole_and_the_run_ids_of_all(
        self, store: Store
    ) -> None:
        flow = await put(store)
        for status in TaskStatus:
            await put_task(store, flow, status.value, status=status, run_id=f"run-{status.value}")
        await put_task(store, flow, "without-run", status=TaskStatus.RUNNING)
        await store.commit([tells(flow, 2, 3, 4)])

        snapshot = await loaded(store)

        assert [t.task_id for t in snapshot.active] == ["queued", "running", "without-run"]
        assert sorted(snapshot.run_ids) == sorted((f"run-{s.value}", s.value) for s in TaskStatus)
        assert snapshot.last_seq == 4

    async def test_loading_answers_in_the_order_asked(self, store: Store) -> None:
        for name in ("a", "b"):
            await put(store, name)
        wanted = [FlowKey("alice", name) for name in ("b", "ghost", "a", "b")]

        found = await store.load(wanted)

        assert [s.flow.flow_id if isinstance(s, Snapshot) else s for s in found] == [
            "b",
            None,
            "a",
            "b",
        ]
        assert await store.load([]) == []

    async def test_children_are_listed_by_status_and_by_id_oldest_first(self, store: Store) -> None:
        flow = await put(store)
        for task_id, status in (
            ("a", TaskStatus.FAILED),
            ("b", TaskStatus.RUNNING),
            ("c", TaskStatus.FAILED),
        ):
            await put_task(store, flow, task_id, status=status)

        async def listed(**conditions: list[str]) -> list[str]:
            return [t.task_id for t in await store.list_tasks(ALICE, "flow", **conditions)]  # type: ignore[arg-type]

        assert await listed() == ["a", "b", "c"]
        assert await listed(statuses=["failed"]) == ["a", "c"]
        assert await listed(statuses=["running", "lost"]) == ["b"]
        assert await listed(task_ids=["c", "a", "ghost"]) == ["a", "c"]
        assert await listed(statuses=["running"], task_ids=["a", "b"]) == ["b"]
        assert await listed(task_ids=[]) == []
        assert await store.list_tasks(ALICE, "ghost") == []

    async def test_more_children_are_asked_for_than_one_statement_takes(self, store: Store) -> None:
        flow = await put(store)
        names = [f"task-{n:05}" for n in range(1_300)]
        await store.commit([children(*(task_of(store.next_key(), flow, name) for name in names))])

        found = await store.list_tasks(ALICE, "flow", task_ids=list(reversed(names)))

        assert [task.task_id for task in found] == names

    async def test_a_child_asked_for_twice_is_answered_once(self, store: Store) -> None:
        flow = await put(store)
        await put_task(store, flow, "task")
        asked = ["task", *(f"ghost-{n}" for n in range(700)), "task"]

        found = await store.list_tasks(ALICE, "flow", task_ids=asked)

        assert [task.task_id for task in found] == ["task"]

    async def test_children_are_listed_in_the_order_of_their_keys(self, store: Store) -> None:
        flow = await put(store)
        early, late = store.next_key(), store.next_key()
        await store.commit([children(task_of(late, flow, "late"))])
        await store.commit([children(task_of(early, flow, "early"))])

        listed = [task.task_id for task in await store.list_tasks(ALICE, "flow")]

        assert listed == ["early", "late"]
        assert [t.task_id for t in (await loaded(store)).active] == ["early", "late"]

    async def test_a_summary_counts_every_status_and_runtime(self, store: Store) -> None:
        flow = await put(store)
        other = await put(store, "other")
        await put_task(store, other, "elsewhere")
        wanted = {
            TaskStatus.QUEUED: 1,
            TaskStatus.RUNNING: 2,
            TaskStatus.SUCCEEDED: 3,
            TaskStatus.FAILED: 1,
            TaskStatus.TIMED_OUT: 2,
            TaskStatus.CANCELLED: 4,
            TaskStatus.LOST: 1,
        }
        for status, count in wanted.items():
            for n in range(count):
                runtime = "acp" if n % 2 else "custom"
                await put_task(store, flow, f"{status}-{n}", status=status, runtime=runtime)

        summary = await store.summarize(ALICE, "flow")

        assert summary is not None
        assert (summary.total, summary.active, summary.terminal) == (14, 3, 11)
        assert summary.failures == 4
        assert summary.by_status == {status.value: n for status, n in wanted.items()}
        assert summary.by_runtime == {"subagent": 0, "acp": 5, "cli": 0, "cron": 0, "custom": 9}

    async def test_a_summary_of_no_children_is_all_zeros(self, store: Store) -> None:
        await put(store)

        summary = await store.summarize(ALICE, "flow")

        assert summary is not None
        assert (summary.total, summary.active, summary.terminal, summary.failures) == (0, 0, 0, 0)
        assert summary.by_status == dict.fromkeys((s.value for s in TaskStatus), 0)
        assert summary.by_runtime == {"subagent": 0, "acp": 0, "cli": 0, "cron": 0}
        assert await store.summarize(ALICE, "ghost") is None

    # ---- history ----------------------------------------------------------------------------------

    async def test_positions_grow_over_commits_and_have_no_gap_inside_a_batch(
        self, store: Store
    ) -> None:
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

    async def test_a_refused_batch_uses_no_position(self, store: Store) -> None:
        await put(store)
        with pytest.raises(WriteConflict):
            await put(store)

        first = await store.commit([creates(flow_of(store.next_key(), "next"))])

        assert first == 2

    async def test_a_batch_without_events_moves_no_position(self, store: Store) -> None:
        flow = await put(store)

        await store.commit([changes(replace(flow, revision=2))])
        first = await store.commit([tells(flow, 2)])

        assert first == 2
        assert await store.last_position() == 2

    async def test_history_is_read_in_pages(self, store: Store) -> None:
        flow = await put(store)
        await put(store, "other")
        await store.commit([tells(flow, 2, 3, 4, 5)])

        pages = [
            [e.seq for e in await store.history(ALICE, "flow", after_seq=after, limit=2)]
            for after in (0, 2, 4, 5, 99)
        ]

        assert pages == [[1, 2], [3, 4], [5], [], []]
        assert await store.last_seq(ALICE, "flow") == 5
        assert await store.history(ALICE, "flow", after_seq=0, limit=0) == []

    async def test_an_event_comes_back_as_it_was_written(self, store: Store) -> None:
        flow = await put(store)
        line = event_of(
            flow, 2, actor="alice", cause="a call", task_id="t", changed={"stateJson": [1, None]}
        )

        position = await store.commit([FlowWrite(flow=None, tasks=[], events=[line])])

        [event] = await store.history(ALICE, "flow", after_seq=1, limit=10)
        assert (event.position, event.seq, event.at, event.revision) == (position, 2, NOW, 1)
        assert (event.actor, event.cause, event.task_id) == ("alice", "a call", "t")
        assert event.changed == {"stateJson": [1, None]}

    async def test_events_after_a_position_are_read_in_pages(self, store: Store) -> None:
        flow = await put(store)
        await store.commit([tells(flow, 2, 3, 4)])

        async def seqs(after: int, limit: int) -> list[int]:
            return [event.seq for event in await store.events_after(ALICE, after, limit)]

        assert await seqs(0, 3) == [1, 2, 3]
        assert await seqs(3, 3) == [4]
        assert await seqs(4, 3) == []
        assert await seqs(0, 0) == []

    async def test_a_sequence_number_is_used_once_in_a_flow(self, store: Store) -> None:
        flow = await put(store)

        with pytest.raises(WriteConflict):
            await store.commit([tells(flow, 1)])

        assert await store.last_seq(ALICE, "flow") == 1
        assert await store.last_position() == 1

    async def test_a_new_store_has_nothing(self, store: Store) -> None:
        assert await store.last_position() == 0
        assert await store.last_seq(EVERYONE, "flow") == 0
        assert await store.events_after(EVERYONE, 0, 10) == []
        assert await ids(store, EVERYONE) == []
        assert await store.next_due(after=0) is None
        assert await store.count_by_controller() == {}
        assert await store.list_unreadable() == []

    # ---- isolation --------------------------------------------------------------------------------

    async def test_another_owner_finds_nothing_by_any_verb(self, store: Store) -> None:
        flow = await put(
            store, "secret-1", correlation_id="c", controller_id="k", idempotency_key="once"
        )
        await put_task(store, flow, "task", run_id="run")
        await store.commit([tells(flow, 2)])

        for stranger in (
            BOB,
            Scope(""),
            Scope("alice "),
            Scope("Alice"),
            Scope("alic_"),
            Scope("%"),
        ):
            assert await store.find_flow(stranger, "secret-1") is None
            assert await store.key_of(stranger, "secret-1") is None
            assert await ids(store, stranger) == []
            assert await ids(store, stranger, id_prefix="secret") == []
            assert await ids(store, stranger, id_prefix="") == []
            assert await ids(store, stranger, correlation_id="c") == []
            assert await ids(store, stranger, controller_id="k") == []
            assert await ids(store, stranger, statuses=["running"]) == []
            assert await ids(store, stranger, live=True, before_key=10**6) == []
            assert await store.find_task(stranger, "task") is None
            assert await store.list_tasks(stranger, "secret-1") == []
            assert await store.list_tasks(stranger, "secret-1", task_ids=["task"]) == []
            assert await store.summarize(stranger, "secret-1") is None
            assert await store.history(stranger, "secret-1", after_seq=0, limit=10) == []
            assert await store.last_seq(stranger, "secret-1") == 0
            assert await store.events_after(stranger, 0, 10) == []
            owner = stranger.owner_key
            assert owner is not None
            assert await store.load([FlowKey(owner, "secret-1")]) == [None]
            assert await store.find_by_idempotency_key(owner, "once") is None

    async def test_an_owner_finds_only_its_own_where_ids_are_the_same(self, store: Store) -> None:
        hers = await put(store, goal="hers", correlation_id="c")
        his = await put(store, owner_key="bob", goal="his", correlation_id="c")
        await put_task(store, hers, "her-task", run_id="run")
        await put_task(store, his, "his-task-1", run_id="run")
        await put_task(store, his, "his-task-2", status=TaskStatus.LOST)
        await store.commit([tells(his, 2, 3)])

        for scope, goal, tasks, seqs in (
            (ALICE, "hers", ["her-task"], [1]),
            (BOB, "his", ["his-task-1", "his-task-2"], [1, 2, 3]),
        ):
            flow = await store.find_flow(scope, "flow")
            summary = await store.summarize(scope, "flow")
            events = await store.history(scope, "flow", after_seq=0, limit=10)
            listed = await store.list_flows(scope, FlowQuery(correlation_id="c"), 10)

            assert flow is not None and flow.goal == goal
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
        await put(store, "hers")
        his = await put(store, "his", owner_key="bob")
        await put_task(store, his, "task")

        found = await store.find_task(EVERYONE, "task")

        assert await ids(store, EVERYONE) == ["his", "hers"]
        assert found is not None and found[0] == FlowKey("bob", "his")
        assert [e.flow_id for e in await store.events_after(EVERYONE, 0, 9)] == ["hers", "his"]

    # ---- listing ----------------------------------------------------------------------------------

    async def test_flows_are_listed_newest_first_in_pages(self, store: Store) -> None:
        for n in range(7):
            await put(store, f"flow-{n}")
            await put(store, f"other-{n}", owner_key="bob")

        pages, before = [], None
        while page := await ids(store, ALICE, limit=3, before_key=before):
            pages.append(page)
            before = await store.key_of(ALICE, page[-1])

        assert pages == [
            ["flow-6", "flow-5", "flow-4"],
            ["flow-3", "flow-2", "flow-1"],
            ["flow-0"],
        ]
        assert await ids(store, ALICE, limit=0) == []

    async def test_a_changed_flow_keeps_its_place_in_a_listing(self, store: Store) -> None:
        first = await put(store, "first")
        await put(store, "second")

        await store.commit([changes(replace(first, revision=2))])

        assert await ids(store, ALICE) == ["second", "first"]

    async def test_flows_are_listed_by_their_keys_in_whatever_order_they_were_written(
        self, store: Store
    ) -> None:
        keys = [store.next_key() for _ in range(3)]
        for n in (1, 2, 0):
            await store.commit([creates(flow_of(keys[n], f"flow-{n}"))])

        assert await ids(store, ALICE) == ["flow-2", "flow-1", "flow-0"]
        assert await ids(store, ALICE, limit=1, before_key=keys[2]) == ["flow-1"]
        assert [key for key, _ in await store.list_unfinished([], after_key=0, limit=9)] == []

    async def test_every_condition_narrows_a_listing(self, store: Store) -> None:
        a = await put(store, "a-1", controller_id="k1", correlation_id="c1")
        await put(store, "a-2", controller_id="k2", correlation_id="c1", status=FlowStatus.WAITING)
        await put(store, "b-1", controller_id="k1", status=FlowStatus.FAILED)
        b = await put(store, "b-2", status=FlowStatus.LOST, correlation_id="c2")

        assert await ids(store, ALICE, statuses=["running"]) == ["a-1"]
        assert await ids(store, ALICE, statuses=["failed", "lost"]) == ["b-2", "b-1"]
        assert await ids(store, ALICE, statuses=["queued"]) == []
        assert await ids(store, ALICE, controller_id="k1") == ["b-1", "a-1"]
        assert await ids(store, ALICE, correlation_id="c1") == ["a-2", "a-1"]
        assert await ids(store, ALICE, id_prefix="a-") == ["a-2", "a-1"]
        assert await ids(store, ALICE, id_prefix="a-1") == ["a-1"]
        assert await ids(store, ALICE, id_prefix="a-11") == []
        assert await ids(store, ALICE, live=True) == ["a-2", "a-1"]
        assert await ids(store, ALICE, before_key=b.key) == ["b-1", "a-2", "a-1"]
        assert await ids(store, ALICE, before_key=a.key) == []

    async def test_conditions_are_joined_by_and(self, store: Store) -> None:
        await put(store, "a-1", controller_id="k", correlation_id="c")
        await put(store, "a-2", controller_id="k", correlation_id="c", status=FlowStatus.FAILED)
        await put(store, "a-3", controller_id="k", correlation_id="other")
        await put(store, "b-1", controller_id="k", correlation_id="c")
        await put(store, "a-4", owner_key="bob", controller_id="k", correlation_id="c")
        last = await put(store, "a-5", controller_id="k", correlation_id="c")

        found = await ids(
            store,
            ALICE,
            statuses=["running", "failed"],
            controller_id="k",
            correlation_id="c",
            id_prefix="a",
            live=True,
            before_key=last.key,
        )

        assert found == ["a-1"]

    async def test_an_empty_condition_is_not_no_condition(self, store: Store) -> None:
        await put(store, "without")
        await put(store, "with", controller_id="", correlation_id="")

        assert await ids(store, ALICE, controller_id="") == ["with"]
        assert await ids(store, ALICE, correlation_id="") == ["with"]
        assert await ids(store, ALICE, id_prefix="") == ["with", "without"]

    @pytest.mark.parametrize(
        ("prefix", "inside", "outside"),
        [
            ("a%", "a%b", "axb"),
            ("a_", "a_b", "axb"),
            ("a*", "a*b", "axb"),
            ("a'", "a'b", 'a"b'),
            ('a"', 'a"b', "a'b"),
            ("a\\", "a\\b", "ab"),
            ("é", "éa", "e\u0301a"),
            ("👩", "👩🏽", "🇨🇭"),
            ("a", "a", "A"),
            ("a\x00", "a\x00b", "ab"),
            ("שלום", "שלום-1", "שלו"),
            ("a", "a\U0010ffffz", "b"),
        ],
    )
    async def test_a_prefix_is_text_and_nothing_else(
        self, store: Store, prefix: str, inside: str, outside: str
    ) -> None:
        await put(store, inside)
        await put(store, outside)

        assert await ids(store, ALICE, id_prefix=prefix) == [inside]
        assert await ids(store, EVERYONE, id_prefix=prefix) == [inside]

    @hostile
    async def test_any_text_is_kept_byte_for_byte(self, store: Store, text: str) -> None:
        flow = await put(
            store,
            text,
            owner_key=text,
            controller_id=text,
            correlation_id=text,
            idempotency_key=text,
            goal=text,
            current_step=text,
            state_json=Raw(codec.encode({text: [text]})),
        )
        await put_task(store, flow, text, run_id=text, runtime=text, label=text, task=text)
        scope = Scope(text)

        [snapshot] = await store.load([FlowKey(text, text)])
        found = await store.find_flow(scope, text)
        child = await store.find_task(scope, text)
        summary = await store.summarize(scope, text)

        assert isinstance(snapshot, Snapshot)
        assert codec.encode(snapshot.flow) == codec.encode(flow)
        assert snapshot.run_ids == [(text, text)]
        assert found is not None
        assert (found.flow_id, found.owner_key, found.goal) == (text, text, text)
        assert found.state_json == {text: [text]}
        assert await ids(store, scope, controller_id=text, correlation_id=text) == [text]
        assert await ids(store, scope, id_prefix=text) == [text]
        assert await store.find_by_idempotency_key(text, text) == FlowKey(text, text)
        assert child is not None
        assert child[0] == FlowKey(text, text)
        assert (child[1].task_id, child[1].label, child[1].runtime) == (text, text, text)
        assert [t.run_id for t in await store.list_tasks(scope, text, task_ids=[text])] == [text]
        assert summary is not None and summary.by_runtime[text] == 1
        assert await store.count_by_controller() == {text: 1}

    # ---- motion -----------------------------------------------------------------------------------

    async def test_what_is_due_is_found_after_one_instant_up_to_another(self, store: Store) -> None:
        await put(store, "at-10", due_at=10)
        quiet = await put(store, "quiet", owner_key="bob")
        await put_task(store, quiet, "at-20", next_attempt_at=20)
        await put(store, "at-30", due_at=30)

        async def due(after: int, until: int) -> list[tuple[int, str]]:
            found = await store.list_due(after=after, until=until)
            assert all(isinstance(one, Due) for one in found)
            return sorted((one.at, one.key.flow_id) for one in found)

        assert await due(0, 100) == [(10, "at-10"), (20, "quiet"), (30, "at-30")]
        assert await due(10, 20) == [(20, "quiet")]
        assert await due(9, 10) == [(10, "at-10")]
        assert await due(20, 29) == []
        assert await due(30, 100) == []
        assert [one.key for one in await store.list_due(after=10, until=20)] == [
            FlowKey("bob", "quiet")
        ]

    async def test_the_next_tick_is_the_first_one_later(self, store: Store) -> None:
        flow = await put(store, due_at=30)
        await put_task(store, flow, "task", next_attempt_at=20)

        assert await store.next_due(after=0) == 20
        assert await store.next_due(after=19) == 20
        assert await store.next_due(after=20) == 30
        assert await store.next_due(after=30) is None

    async def test_a_tick_that_was_cleared_is_not_due(self, store: Store) -> None:
        flow = await put(store, due_at=30)
        task = await put_task(store, flow, "task", next_attempt_at=20)

        await store.commit(
            [
                changes(replace(flow, revision=2)),
                children(replace(task, next_attempt_at=None), fresh=False),
            ]
        )

        assert await store.next_due(after=0) is None
        assert await store.list_due(after=0, until=100) == []

    async def test_what_has_to_move_again_is_listed_in_pages(self, store: Store) -> None:
        expected = []
        for n, status in enumerate(FlowStatus):
            driven = await put(store, f"driven-{n}", controller_id="mine", status=status)
            if status in (FlowStatus.QUEUED, FlowStatus.RUNNING):
                expected.append((driven.key, FlowKey("alice", driven.flow_id)))
            await put(store, f"foreign-{n}", controller_id="not mine", status=status)
        for task_status in TaskStatus:
            parked = await put(
                store, f"parked-{task_status}", owner_key="bob", status=FlowStatus.WAITING
            )
            await put_task(store, parked, f"l-{task_status}", status=task_status, launched=True)
            if task_status in (TaskStatus.QUEUED, TaskStatus.RUNNING):
                expected.append((parked.key, FlowKey("bob", parked.flow_id)))
        linked = await put(store, "linked", status=FlowStatus.WAITING)
        await put_task(store, linked, "linked-task", status=TaskStatus.RUNNING)

        pages, after = [], 0
        while page := await store.list_unfinished(["mine", "other"], after_key=after, limit=3):
            pages.append(page)
            after = page[-1][0]

        assert [len(page) for page in pages] == [3, 1]
        assert [entry for page in pages for entry in page] == expected

    async def test_without_controllers_only_launched_children_set_a_flow_in_motion(
        self, store: Store
    ) -> None:
        await put(store, "driven", controller_id="mine")
        ended = await put(store, "ended", status=FlowStatus.SUCCEEDED)
        await put_task(store, ended, "still-runs", status=TaskStatus.RUNNING, launched=True)

        found = await store.list_unfinished([], after_key=0, limit=10)

        assert found == [(ended.key, FlowKey("alice", "ended"))]

    async def test_queued_and_running_flows_are_counted_by_controller(self, store: Store) -> None:
        for n, status in enumerate(FlowStatus):
            await put(store, f"one-{n}", controller_id="one", status=status)
        await put(store, "two", controller_id="two", status=FlowStatus.QUEUED)
        await put(store, "three", controller_id="three", status=FlowStatus.WAITING)
        await put(store, "none")

        assert await store.count_by_controller() == {"one": 2, "two": 1}

    # ---- unreadable rows --------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "doc",
        [
            "{",
            "",
            "null",
            "[]",
            '{"flowId":"bad"}',
            '"text"',
            "[" * 100_000,
        ],
        ids=["cut", "empty", "null", "list", "fields missing", "text", "deep"],
    )
    async def test_an_unreadable_flow_is_refused_alone_and_listed(
        self, store: Store, doc: str
    ) -> None:
        await put(store, "good-1")
        bad = flow_of(store.next_key(), "bad")
        await store.commit([with_doc(creates(bad), doc)])
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
        await put(store, "good")
        await store.commit([with_doc(creates(flow_of(store.next_key(), "bad")), "{")])

        assert await ids(store, ALICE, limit=1) == ["good"]

    async def test_an_unreadable_active_child_takes_its_own_flow_down_only(
        self, store: Store
    ) -> None:
        hurt = await put(store, "hurt")
        fine = await put(store, "fine")
        await put_task(store, fine, "fine-task")
        task = task_of(store.next_key(), hurt, "bad-task")
        row = codec.task_row(task, fresh=True)._replace(doc="{}")
        await store.commit([FlowWrite(flow=None, tasks=[row], events=[])])

        broken, whole = await store.load([FlowKey("alice", "hurt"), FlowKey("alice", "fine")])

        assert isinstance(broken, SnapshotUnreadable)
        assert isinstance(whole, Snapshot)
        assert [t.task_id for t in await store.list_tasks(ALICE, "fine")] == ["fine-task"]
        [listed] = await store.list_unreadable()
        assert (listed.table, listed.key) == ("tasks", task.key)

    async def test_an_unreadable_event_does_not_silence_other_flows(self, store: Store) -> None:
        hurt = await put(store, "hurt")
        line = event_of(hurt, 2)._replace(doc="{")
        position = await store.commit([FlowWrite(flow=None, tasks=[], events=[line])])
        await put(store, "fine", owner_key="bob")

        [listed] = await store.list_unreadable()

        assert (listed.table, listed.key) == ("events", position)
        assert [e.flow_id for e in await store.events_after(BOB, 0, 9)] == ["fine"]
        assert "fine" in [e.flow_id for e in await store.events_after(EVERYONE, 0, 9)]

    async def test_an_unreadable_flow_still_guards_its_id(self, store: Store) -> None:
        bad = flow_of(store.next_key(), "bad")
        await store.commit([with_doc(creates(bad), "{")])

        with pytest.raises(WriteConflict):
            await put(store, "bad")

        assert isinstance((await store.load([FlowKey("alice", "bad")]))[0], SnapshotUnreadable)

    # ---- ownership --------------------------------------------------------------------------------

    async def test_a_second_owner_is_refused_and_the_first_goes_on(
        self, store: Store, make_store: MakeStore
    ) -> None:
        second = make_store()

        with pytest.raises(StoreInUse):
            await second.open()

        await put(store)
        assert await ids(store, ALICE) == ["flow"]

    async def test_a_store_is_not_opened_twice(self, store: Store) -> None:
        with pytest.raises(StoreInUse):
            await store.open()

        await put(store)
        assert await ids(store, ALICE) == ["flow"]

    async def test_a_takeover_stops_the_overtaken_from_writing(
        self, store: Store, make_store: MakeStore
    ) -> None:
        flow = await put(store)
        second = make_store()
        await second.open(takeover=True)
        try:
            for _ in range(2):
                with pytest.raises(StoreInUse):
                    await store.commit([changes(replace(flow, revision=2), seqs=[2])])
            await put(second, "later")

            assert (await loaded(second)).flow.revision == 1
            assert await ids(second, ALICE) == ["later", "flow"]
            assert await second.last_seq(ALICE, "flow") == 1
        finally:
            await second.aclose()

    async def test_an_overtaken_store_goes_on_reading(
        self, store: Store, make_store: MakeStore
    ) -> None:
        second = make_store()
        await second.open(takeover=True)
        try:
            await put(second, "later")

            assert await ids(store, ALICE) == ["later"]
        finally:
            await second.aclose()

    async def test_an_overtaken_store_that_closes_leaves_the_new_owner_alone(
        self, store: Store, make_store: MakeStore
    ) -> None:
        second, third = make_store(), make_store()
        await second.open(takeover=True)
        try:
            await store.aclose()

            with pytest.raises(StoreInUse):
                await third.open()
            await put(second)
            assert await ids(second, ALICE) == ["flow"]
        finally:
            await second.aclose()

    async def test_an_overtaken_store_that_is_opened_anew_writes_again(
        self, store: Store, make_store: MakeStore
    ) -> None:
        second = make_store()
        await second.open(takeover=True)
        with pytest.raises(StoreInUse):
            await put(store)
        await store.aclose()
        await second.aclose()

        await store.open()

        await put(store)
        assert await ids(store, ALICE) == ["flow"]

    async def test_a_takeover_of_a_free_store_is_an_open(self, make_store: MakeStore) -> None:
        store = make_store()
        await store.open(takeover=True)

        await put(store)

        assert await ids(store, ALICE) == ["flow"]
        await store.aclose()

    async def test_a_store_is_closed_twice_without_harm(self, make_store: MakeStore) -> None:
        store = make_store()
        await store.open()

        await store.aclose()
        await store.aclose()

        other = make_store()
        await other.open()
        await store.aclose()
        await put(other)
        assert await ids(other, ALICE) == ["flow"]
        await other.aclose()

    async def test_a_store_that_was_never_opened_may_be_closed(self, make_store: MakeStore) -> None:
        await make_store().aclose()

    async def test_a_closed_store_writes_nothing(self, make_store: MakeStore) -> None:
        store = make_store()
        await store.open()
        await store.aclose()

        with pytest.raises((StoreError, AssertionError)):
            await store.commit([creates(flow_of(1))])

        other = make_store()
        await other.open()
        assert await ids(other, EVERYONE) == []
        await other.aclose()

    async def test_a_store_that_was_never_opened_writes_nothing(
        self, make_store: MakeStore
    ) -> None:
        with pytest.raises((StoreError, AssertionError)):
            await make_store().commit([creates(flow_of(1))])

        other = make_store()
        await other.open()
        assert await ids(other, EVERYONE) == []
        await other.aclose()

    async def test_reopening_sees_everything(self, store: Store, make_store: MakeStore) -> None:
        flow = await put(store, idempotency_key="once", due_at=10)
        await put_task(store, flow, "task", run_id="run", launched=True)
        await store.commit([tells(flow, 2)])
        before = await loaded(store)
        await store.aclose()

        again = make_store()
        await again.open()
        after = await loaded(again)

        assert codec.encode(after.flow) == codec.encode(before.flow)
        assert [codec.encode(t) for t in after.active] == [codec.encode(t) for t in before.active]
        assert (after.run_ids, after.last_seq) == ([("run", "task")], 2)
        assert await again.last_position() == 2
        assert await again.next_due(after=0) == 10
        assert await again.find_by_idempotency_key("alice", "once") == FlowKey("alice", "flow")
        assert await again.commit([tells(flow, 3)]) == 3
        await again.aclose()

    async def test_keys_never_repeat_and_grow(self, store: Store, make_store: MakeStore) -> None:
        keys = [store.next_key() for _ in range(100)]
        flow = flow_of(keys[-2], "flow")
        await store.commit([creates(flow, task_of(keys[-1], flow, "task"))])
        await store.aclose()

        again = make_store()
        await again.open()
        keys += [again.next_key() for _ in range(100)]

        assert keys == sorted(set(keys))
        await again.aclose()

    async def test_upkeep_changes_nothing_anybody_reads(self, store: Store) -> None:
        await put(store)

        await store.upkeep(idle=True)
        await store.upkeep(idle=False)

        assert await ids(store, ALICE) == ["flow"]
