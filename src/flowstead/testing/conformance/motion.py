"""What is due, and what has to move again after a restart."""

from __future__ import annotations

from msgspec.structs import replace

from flowstead.model.flow import FlowKey, FlowStatus
from flowstead.model.task import TaskStatus
from flowstead.store.port import Due, Store
from flowstead.testing.conformance.rows import NOW, changes, children, put, put_task


class Motion:
    """`list_due`, `next_due`, `list_unfinished` and `count_by_controller`."""

    async def test_what_is_due_is_found_after_one_instant_up_to_another(self, store: Store) -> None:
        """Flows and children alike, each by the flow that needs the tick; whose it is does not matter."""
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
        """Later than the instant, never at it."""
        flow = await put(store, due_at=30)
        await put_task(store, flow, "task", next_attempt_at=20)

        assert await store.next_due(after=0) == 20
        assert await store.next_due(after=19) == 20
        assert await store.next_due(after=20) == 30
        assert await store.next_due(after=30) is None

    async def test_a_tick_that_was_cleared_is_not_due(self, store: Store) -> None:
        """A change without an instant takes the old one away."""
        flow = await put(store, due_at=30)
        task = await put_task(store, flow, "task", next_attempt_at=20)

        await store.commit(
            [
                changes(replace(flow, revision=2), seqs=[2]),
                children(replace(task, next_attempt_at=None), fresh=False),
            ]
        )

        assert await store.next_due(after=0) is None
        assert await store.list_due(after=0, until=100) == []

    async def test_a_tick_that_was_moved_is_due_at_its_new_instant_only(self, store: Store) -> None:
        """A change with another instant replaces the old one."""
        flow = await put(store, due_at=30)
        task = await put_task(store, flow, "task", next_attempt_at=20)

        await store.commit(
            [
                changes(replace(flow, revision=2), due_at=50, seqs=[2]),
                children(replace(task, next_attempt_at=40), fresh=False),
            ]
        )

        assert sorted(one.at for one in await store.list_due(after=0, until=100)) == [40, 50]
        assert await store.next_due(after=0) == 40

    async def test_what_has_to_move_again_is_listed_in_pages(self, store: Store) -> None:
        """Queued and running flows of these controllers, and flows with active launched children; oldest first."""
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

        pages = [await store.list_unfinished(["mine", "other"], after_key=0, limit=3)]
        for _ in range(2):
            after = pages[-1][-1][0]
            pages.append(await store.list_unfinished(["mine", "other"], after_key=after, limit=3))

        assert [len(page) for page in pages] == [3, 1, 0]
        assert [entry for page in pages for entry in page] == expected

    async def test_a_flow_with_several_reasons_to_move_is_listed_once(self, store: Store) -> None:
        """A join with its children would list it for each of them."""
        flow = await put(store, controller_id="mine")
        for n in range(3):
            await put_task(store, flow, f"task-{n}", launched=True)
        last = await put(store, "last", controller_id="mine")

        found = await store.list_unfinished(["mine", "mine"], after_key=0, limit=2)

        assert [key for key, _ in found] == [flow.key, last.key]

    async def test_without_controllers_only_launched_children_set_a_flow_in_motion(
        self, store: Store
    ) -> None:
        """Children that still run are looked after even where their flow has ended."""
        await put(store, "driven", controller_id="mine")
        await put(store, "undriven")
        ended = await put(store, "ended", status=FlowStatus.SUCCEEDED)
        await put_task(store, ended, "still-runs", status=TaskStatus.RUNNING, launched=True)

        found = await store.list_unfinished([], after_key=0, limit=10)

        assert found == [(ended.key, FlowKey("alice", "ended"))]

    async def test_a_flow_whose_last_launched_child_ended_does_not_move_again(
        self, store: Store
    ) -> None:
        """What a child is now decides, not what it was."""
        flow = await put(store, status=FlowStatus.WAITING)
        task = await put_task(store, flow, "task", launched=True)

        await store.commit(
            [children(replace(task, status=TaskStatus.LOST, ended_at=NOW), fresh=False)]
        )

        assert await store.list_unfinished([], after_key=0, limit=10) == []

    async def test_many_controllers_are_asked_for_at_once(self, store: Store) -> None:
        """A limit on a statement's parameters must not show."""
        flow = await put(store, controller_id="controller-1199")
        names = [f"controller-{n}" for n in range(1_200)]

        found = await store.list_unfinished(names, after_key=0, limit=10)

        assert found == [(flow.key, FlowKey("alice", "flow"))]

    async def test_queued_and_running_flows_are_counted_by_controller(self, store: Store) -> None:
        """Controllers that have none are left out, and so are flows nobody drives."""
        for n, status in enumerate(FlowStatus):
            await put(store, f"one-{n}", controller_id="one", status=status)
        await put(store, "two", controller_id="two", status=FlowStatus.QUEUED)
        await put(store, "two", owner_key="bob", controller_id="two")
        await put(store, "three", controller_id="three", status=FlowStatus.WAITING)
        await put(store, "none")

        assert await store.count_by_controller() == {"one": 2, "two": 2}
