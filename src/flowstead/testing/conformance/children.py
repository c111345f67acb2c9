"""Children are kept under their flow, oldest first, and counted."""

from __future__ import annotations

from msgspec import Raw
from msgspec.structs import replace

from flowstead.model.flow import FlowKey
from flowstead.model.task import TaskStatus
from flowstead.store import codec
from flowstead.store.port import Store
from flowstead.testing.conformance.reads import loaded
from flowstead.testing.conformance.rows import (
    ALICE,
    NOW,
    children,
    put,
    put_task,
    task_of,
    tells,
)


class Children:
    """`load`, `find_task`, `list_tasks` and `summarize` agree on a flow's children."""

    async def test_a_child_comes_back_as_it_was_written(self, store: Store) -> None:
        """The stored record is the one handed in."""
        flow = await put(store)

        task = await put_task(
            store, flow, "task", launched=True, run_id="r", input_json=Raw(b'[{"a":1}]')
        )

        [active] = (await loaded(store)).active
        assert codec.encode(active) == codec.encode(task)

    async def test_a_child_is_changed_in_place(self, store: Store) -> None:
        """What it is now replaces what it was, wherever it is found."""
        flow = await put(store)
        task = await put_task(store, flow, "task", run_id="run")

        ended = replace(
            task, status=TaskStatus.SUCCEEDED, ended_at=NOW, result_json=Raw(b'{"ok":true}')
        )
        await store.commit([children(ended, fresh=False)])

        found = await store.find_task(ALICE, "task")
        assert found is not None
        key, stored = found
        assert key == FlowKey("alice", "flow")
        assert (stored.status, stored.result_json) == ("succeeded", {"ok": True})
        snapshot = await loaded(store)
        assert snapshot.active == []
        assert snapshot.run_ids == [("run", "task")], "an ended child keeps its run id"

    async def test_loading_brings_active_children_whole_and_the_run_ids_of_all(
        self, store: Store
    ) -> None:
        """Queued and running children are active; a run id that was ever used is told."""
        flow = await put(store)
        for status in TaskStatus:
            await put_task(store, flow, status.value, status=status, run_id=f"run-{status.value}")
        await put_task(store, flow, "without-run", status=TaskStatus.RUNNING)
        await store.commit([tells(flow, 2, 3, 4)])

        snapshot = await loaded(store)

        assert [t.task_id for t in snapshot.active] == ["queued", "running", "without-run"]
        assert sorted(snapshot.run_ids) == sorted((f"run-{s.value}", s.value) for s in TaskStatus)
        assert snapshot.last_seq == 4

    async def test_children_are_listed_by_status_and_by_id_oldest_first(self, store: Store) -> None:
        """No statuses: any. No ids given: any. An empty list of ids: none."""
        flow = await put(store)
        for task_id, status in (
            ("a", TaskStatus.FAILED),
            ("b", TaskStatus.RUNNING),
            ("c", TaskStatus.FAILED),
        ):
            await put_task(store, flow, task_id, status=status)

        async def listed(
            statuses: tuple[str, ...] = (), task_ids: list[str] | None = None
        ) -> list[str]:
            found = await store.list_tasks(ALICE, "flow", statuses=statuses, task_ids=task_ids)
            return [task.task_id for task in found]

        assert await listed() == ["a", "b", "c"]
        assert await listed(statuses=("failed",)) == ["a", "c"]
        assert await listed(statuses=("running", "lost")) == ["b"]
        assert await listed(statuses=("queued",)) == []
        assert await listed(task_ids=["c", "a", "ghost"]) == ["a", "c"]
        assert await listed(statuses=("running",), task_ids=["a", "b"]) == ["b"]
        assert await listed(task_ids=[]) == []
        assert await store.list_tasks(ALICE, "ghost") == []

    async def test_children_are_listed_in_the_order_of_their_keys(self, store: Store) -> None:
        """Oldest is whose key is smallest, in whatever order they were committed."""
        flow = await put(store)
        early, late = store.next_key(), store.next_key()
        await store.commit([children(task_of(late, flow, "late"))])
        await store.commit([children(task_of(early, flow, "early"))])

        listed = [task.task_id for task in await store.list_tasks(ALICE, "flow")]

        assert listed == ["early", "late"]
        assert [t.task_id for t in (await loaded(store)).active] == ["early", "late"]

    async def test_the_children_of_another_flow_are_not_listed(self, store: Store) -> None:
        """Not even when they are asked for by id, with the same owner."""
        flow = await put(store, "flow")
        other = await put(store, "other")
        await put_task(store, flow, "mine", run_id="mine")
        await put_task(store, other, "elsewhere", run_id="elsewhere")

        listed = await store.list_tasks(ALICE, "flow", task_ids=["elsewhere", "mine"])

        assert [task.task_id for task in listed] == ["mine"]
        snapshot = await loaded(store)
        assert [task.task_id for task in snapshot.active] == ["mine"]
        assert snapshot.run_ids == [("mine", "mine")]

    async def test_more_children_are_asked_for_than_one_statement_takes(self, store: Store) -> None:
        """A limit on a statement's parameters must not show."""
        flow = await put(store)
        names = [f"task-{n:05}" for n in range(1_300)]
        await store.commit([children(*(task_of(store.next_key(), flow, name) for name in names))])

        found = await store.list_tasks(ALICE, "flow", task_ids=list(reversed(names)))

        assert [task.task_id for task in found] == names

    async def test_a_child_asked_for_twice_is_answered_once(self, store: Store) -> None:
        """Also where a long list of ids is asked for in parts."""
        flow = await put(store)
        await put_task(store, flow, "task")
        asked = ["task", *(f"ghost-{n}" for n in range(700)), "task"]

        found = await store.list_tasks(ALICE, "flow", task_ids=asked)

        assert [task.task_id for task in found] == ["task"]

    async def test_a_summary_counts_every_status_and_runtime(self, store: Store) -> None:
        """Failures are failed, timed-out and lost children; other flows are not counted."""
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
        """Every status and every usual runtime is present; without a flow there is no summary."""
        await put(store)

        summary = await store.summarize(ALICE, "flow")

        assert summary is not None
        assert (summary.total, summary.active, summary.terminal, summary.failures) == (0, 0, 0, 0)
        assert summary.by_status == dict.fromkeys((s.value for s in TaskStatus), 0)
        assert summary.by_runtime == {"subagent": 0, "acp": 0, "cli": 0, "cron": 0}
        assert await store.summarize(ALICE, "ghost") is None

    async def test_a_summary_follows_its_children(self, store: Store) -> None:
        """A child that ended is counted where it is now, and nowhere else."""
        flow = await put(store)
        task = await put_task(store, flow, "task", status=TaskStatus.RUNNING)

        await store.commit(
            [children(replace(task, status=TaskStatus.TIMED_OUT, ended_at=NOW), fresh=False)]
        )

        summary = await store.summarize(ALICE, "flow")
        assert summary is not None
        assert (summary.total, summary.active, summary.failures) == (1, 0, 1)
        assert (summary.by_status["running"], summary.by_status["timed_out"]) == (0, 1)

    async def test_a_child_nobody_made_is_not_found(self, store: Store) -> None:
        """Neither the flow's id nor a part of a child's id finds a child."""
        flow = await put(store)
        await put_task(store, flow, "task", run_id="run")

        for name in ("flow", "run", "tas", "task ", "TASK", "%", ""):
            assert await store.find_task(ALICE, name) is None, name
