"""Nested flows in motion: commits and reads that fail, stops that cross an end, runtimes that come and go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flowstead import (
    ChildError,
    Flow,
    FlowContext,
    Limits,
    Nested,
    Registry,
    Runtime,
    SessionFlows,
    StoreUnusable,
    TaskContext,
)
from flowstead.model.flow import FlowKey
from flowstead.store.codec import FlowWrite
from flowstead.store.memory import MemoryStore, MemoryTables
from flowstead.testing import ManualClock
from tests.faulty_store import (
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    holds_nothing,
    new_flow,
    running,
    settle,
    soon,
    turns,
)

TROUBLES = {
    "not written": (NOT_WRITTEN, False),
    "unknown and not written": (UNKNOWN, False),
    "unknown and written": (UNKNOWN, True),
}
LIMITS = Limits(cancel_grace=60, kill_after=5, abandon_after=25)


class Picky(FaultyStore):
    """A store that fails the commits, and the reads, that the test picks."""

    def __init__(self, *, tables: MemoryTables | None = None) -> None:
        super().__init__(tables=tables)
        self._pick: Callable[[FlowWrite], bool] | None = None
        self._trouble: tuple[Exception, bool] = (NOT_WRITTEN, False)
        self._times = 0
        self.unreadable: set[FlowKey] = set()
        self.failed = 0

    def fail_events(
        self, flow: str, event: str, trouble: tuple[Exception, bool], *, times: int = 1
    ) -> None:
        """Fail the next commits that write such an event of a flow whose id begins so."""

        def picks(write: FlowWrite) -> bool:
            return any(f'"{event}"' in row.doc and f'"{flow}-' in row.doc for row in write.events)

        self._pick, self._trouble, self._times = picks, trouble, times

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        if self._times and self._pick is not None and any(map(self._pick, writes)):
            self._times -= 1
            self.failed += 1
            error, written = self._trouble
            self.fail_commits(error, written=written)
        return await super().commit(writes)

    async def load(self, keys: Sequence[FlowKey]) -> Any:
        if self.unreadable & set(keys):
            self.failed += 1
            raise StoreUnusable("flows.db", "a read failed")
        return await super().load(keys)


class Tree:
    """An outer flow that runs an inner one, which runs two children, one after another."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.let_go = asyncio.Event()
        self.started: list[str] = []
        self.entered: list[str] = []
        self.registry = Registry()
        self.registry.task(self.work, name="work")
        self.registry.task(self.deaf, name="deaf")
        self.registry.controller("inner")(self.inner)
        self.registry.controller("outer")(self.outer)

    async def work(self, ctx: TaskContext, given: Any) -> str:
        self.started.append(str(ctx.run_id))
        await self.go.wait()
        return str(ctx.run_id)

    async def deaf(self, ctx: TaskContext, given: Any) -> None:
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                pass

    async def inner(self, flow: FlowContext) -> None:
        self.entered.append("inner")
        if flow.state_json == "deaf":
            await flow.run("deaf")
            return
        results = [await flow.run("work", name=name) for name in ("a", "b")]
        await flow.update(state_json=results)

    async def outer(self, flow: FlowContext) -> None:
        self.entered.append("outer")
        result = await flow.run(Nested("inner"), flow.state_json, name="nested")
        await flow.update(state_json={"nested": result})


@pytest.fixture
def tree() -> Tree:
    return Tree()


@asynccontextmanager
async def staged(
    tree: Tree, clock: ManualClock, store: Any = ":memory:", limits: Limits = LIMITS
) -> AsyncIterator[Runtime]:
    """A runtime in which deaf code is let go before it has to close."""
    async with running(store, clock=clock, registry=tree.registry, limits=limits) as runtime:
        try:
            yield runtime
        finally:
            tree.let_go.set()
            await settle()


async def pass_time(clock: ManualClock, seconds: float) -> None:
    for _ in range(round(seconds * 10)):
        clock.advance(0.1)
        await settle()


async def flow_of(flows: SessionFlows, flow_id: str) -> Flow:
    flow = await flows.get(flow_id)
    assert flow
    return flow


async def inner_of(flows: SessionFlows) -> Flow:
    """The one nested flow there is."""
    [found] = await flows.list(controller_id="inner")
    return found


async def check_whole(flows: SessionFlows, outer_id: str) -> None:
    """Parent, child and nested flow tell the same story, and each of them ended once."""
    outer, inner = await flow_of(flows, outer_id), await inner_of(flows)
    [child] = await flows.list_tasks(outer_id)
    assert outer.ended_at
    assert inner.ended_at
    assert child.ended_at
    assert child.child_flow_id == inner.flow_id
    assert inner.ended_at <= child.ended_at <= outer.ended_at
    assert child.status.value == inner.status.value
    for flow_id in (outer_id, inner.flow_id):
        history = await flows.history(flow_id)
        ends = [event.task_id for event in history if event.type == "task.ended"]
        assert len(ends) == len(set(ends)) == len(await flows.list_tasks(flow_id))


# ---- making it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
@pytest.mark.parametrize("times", [1, 3])
async def test_a_nested_flow_whose_making_fails_is_made_once_in_the_end(
    times: int, trouble: tuple[Exception, bool], tree: Tree, clock: ManualClock
):
    store = Picky()
    times = 1 if trouble[1] else times
    store.fail_events("inner", "flow.created", trouble, times=times)
    tree.go.set()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")

        await pass_time(clock, 5)

        assert store.failed == times, "vacuous: nothing failed"
        assert (await flow_of(flows, outer)).state_json == {"nested": ["a", "b"]}
        assert tree.started == ["a", "b"]
        await check_whole(flows, outer)
        assert holds_nothing(runtime)


async def test_a_read_that_fails_while_a_nested_flow_is_made_is_no_failure_of_the_child(
    tree: Tree, clock: ManualClock
):
    store = FaultyStore()
    tree.go.set()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        store.fail_reads("find_flow", StoreUnusable("flows.db", "a read failed"), times=2)
        outer = await new_flow(flows, "outer")

        await pass_time(clock, 5)

        assert not store._read_faults["find_flow"], "vacuous: nothing failed"
        assert (await flow_of(flows, outer)).status == "succeeded"
        await check_whole(flows, outer)


@pytest.mark.parametrize("verb", ["find_flow", "load"])
async def test_a_read_that_fails_after_a_restart_does_not_part_a_child_from_its_flow(
    verb: str, tree: Tree, clock: ManualClock
):
    tables = MemoryTables()
    async with staged(tree, clock, MemoryStore(tables)) as runtime:
        outer = await new_flow(flows_of(runtime), "outer")
        await settle()
        assert tree.started == ["a"]
    store = FaultyStore(tables=tables)
    store.fail_reads(verb, StoreUnusable("flows.db", "a read failed"), times=2)

    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        await pass_time(clock, 5)
        assert not store._read_faults[verb], "vacuous: nothing failed"
        assert (await flow_of(flows, outer)).status == "running"
        tree.go.set()
        await pass_time(clock, 5)

        assert (await flow_of(flows, outer)).state_json == {"nested": ["a", "b"]}
        await check_whole(flows, outer)


@pytest.mark.parametrize("is_clean", [True, False], ids=["closed", "crashed"])
async def test_a_runtime_that_ends_in_any_step_leaves_one_nested_flow_and_the_next_finishes_it(
    is_clean: bool, clock: ManualClock
):
    outcomes = set()
    for steps in range(70):
        tree, tables = Tree(), MemoryTables()
        tree.go.set()
        async with running(MemoryStore(tables), clock=clock, registry=tree.registry) as runtime:
            outer = await new_flow(flows_of(runtime), "outer")
            await turns(steps)
            if not is_clean:
                thief = MemoryStore(tables)
                await thief.open(takeover=True)
                await thief.aclose()
        left = {key.flow_id.partition("-")[0] for key in tables.flow_keys}
        async with staged(tree, clock, MemoryStore(tables)) as runtime:
            flows = flows_of(runtime)
            assert (await soon(flows.result(outer))).state_json == {"nested": ["a", "b"]}
            await check_whole(flows, outer)
            tasks = [task.attempt for task in await flows.list_tasks(outer)]
            assert tasks == [1], "a nested flow is taken up again, not tried again"
            await settle()
            assert holds_nothing(runtime)
        outcomes.add((len(left), len(tree.entered)))
    assert {count for count, _ in outcomes} == {1, 2}, "vacuous: always in the same place"
    assert len(outcomes) >= 4


# ---- ending it --------------------------------------------------------------------------------------


async def test_a_stop_from_above_that_crosses_the_end_below_leaves_one_story(clock: ManualClock):
    stories = set()
    for steps in range(60):
        tree = Tree()
        async with staged(tree, clock) as runtime:
            flows = flows_of(runtime)
            outer = await new_flow(flows, "outer")
            await settle()
            tree.go.set()
            await turns(steps)

            report = await soon(flows.cancel(outer))

            await settle()
            await check_whole(flows, outer)
            ended, inner = await flow_of(flows, outer), await inner_of(flows)
            assert report.cancelled == (ended.status == "cancelled")
            stories.add((ended.status.value, inner.status.value))
            assert holds_nothing(runtime)
    assert stories == {
        ("cancelled", "cancelled"),
        ("cancelled", "succeeded"),
        ("succeeded", "succeeded"),
    }


async def test_a_stop_and_an_end_in_one_commit_leave_one_story(tree: Tree, clock: ManualClock):
    store = FaultyStore()

    @tree.registry.controller("outer/quick")
    async def quick(flow: FlowContext) -> None:
        await flow.run(Nested("inner/quick"), name="nested")

    @tree.registry.controller("inner/quick")
    async def inner_quick(flow: FlowContext) -> None:
        await tree.go.wait()

    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer/quick")
        await settle()
        # Something else is being written; what comes meanwhile goes into one commit.
        other = await new_flow(flows)
        store.hold()
        holding = asyncio.create_task(flows.update(flow_id=other, expected_revision=0))
        await store.wait_held()
        tree.go.set()
        await settle()
        cancelling = asyncio.create_task(flows.cancel(outer))
        await settle()
        store.release()

        assert (await soon(holding)).applied
        report = await soon(cancelling)
        await settle()

        assert store.batches[-1] >= 1
        [inner] = await flows.list(controller_id="inner/quick")
        [child] = await flows.list_tasks(outer)
        assert (inner.status.value, child.status.value) == ("succeeded", "succeeded")
        assert report.cancelled
        assert (await flow_of(flows, outer)).status == "cancelled"


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
@pytest.mark.parametrize("below", ["succeeds", "is cancelled"])
async def test_an_end_below_reaches_the_parent_although_the_disk_fails_in_between(
    below: str, trouble: tuple[Exception, bool], tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("outer", "task.ended", trouble, times=1 if trouble[1] else 2)

        if below == "succeeds":
            tree.go.set()
        else:
            assert (await soon(flows.cancel((await inner_of(flows)).flow_id))).cancelled
        await pass_time(clock, 6)

        assert store.failed, "vacuous: nothing failed"
        await check_whole(flows, outer)
        ended = await flow_of(flows, outer)
        assert ended.status == ("succeeded" if below == "succeeds" else "failed")
        assert holds_nothing(runtime)


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
@pytest.mark.parametrize("event", ["flow.cancel_requested", "task.cancel_requested"])
async def test_a_stop_from_above_reaches_the_bottom_although_the_disk_fails_there(
    event: str, trouble: tuple[Exception, bool], tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("inner", event, trouble, times=1 if trouble[1] else 3)

        cancelling = asyncio.create_task(flows.cancel(outer, grace=3600))
        await pass_time(clock, 10)

        assert store.failed, "vacuous: nothing failed"
        assert (await soon(cancelling)).cancelled
        assert tree.started == ["a"]
        await check_whole(flows, outer)
        assert (await inner_of(flows)).status == "cancelled"


async def test_a_nested_flow_that_cannot_be_read_when_it_is_to_stop_is_stopped_later(
    tree: Tree, clock: ManualClock
):
    tables = MemoryTables()
    async with staged(tree, clock, MemoryStore(tables)) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        inner = await inner_of(flows)
        await soon(
            flows.set_waiting(
                flow_id=inner.flow_id, expected_revision=inner.revision, wait_json={"kind": "word"}
            )
        )
    # Its controller is not entered again, so that it can leave memory.
    tree.go.set()
    store = Picky(tables=tables)
    limits = Limits(cancel_grace=60, kill_after=5, abandon_after=25, idle_seconds=1)
    async with staged(tree, clock, store, limits) as runtime:
        flows = flows_of(runtime)
        await pass_time(clock, 10)
        key = FlowKey("owner", inner.flow_id)
        assert key not in runtime._engine._actors, "vacuous: it is in memory"
        store.unreadable.add(key)
        cancelling = asyncio.create_task(flows.cancel(outer, grace=3600))
        await pass_time(clock, 10)
        assert store.failed
        assert not cancelling.done()
        assert not (await flow_of(flows, outer)).ended_at

        store.unreadable.clear()
        await pass_time(clock, 10)

        assert (await soon(cancelling)).cancelled
        assert (await inner_of(flows)).status == "cancelled"
        assert (await flow_of(flows, outer)).status == "cancelled"


# ---- an intent --------------------------------------------------------------------------------------


async def request(flows: SessionFlows, flow_id: str) -> Any:
    revision = (await flow_of(flows, flow_id)).revision
    return await soon(flows.request_cancel(flow_id=flow_id, expected_revision=revision))


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
async def test_an_intent_is_passed_on_although_the_disk_fails_below(
    trouble: tuple[Exception, bool], tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("inner", "flow.cancel_requested", trouble, times=1 if trouble[1] else 3)

        assert (await request(flows, outer)).applied
        await pass_time(clock, 6)

        assert store.failed, "vacuous: nothing failed"
        assert (await inner_of(flows)).cancel_requested_at
        assert not (await inner_of(flows)).ended_at, "what runs goes on"
        tree.go.set()
        await pass_time(clock, 3)
        assert tree.started == ["a"]
        assert (await flow_of(flows, outer)).status == "cancelled"
        await check_whole(flows, outer)


async def test_an_intent_that_was_written_although_nobody_knew_is_passed_on(
    tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("outer", "flow.cancel_requested", (UNKNOWN, True))

        assert (await request(flows, outer)).code == "outcome_unknown"
        await pass_time(clock, 3)

        assert (await inner_of(flows)).cancel_requested_at
        tree.go.set()
        await pass_time(clock, 3)
        assert tree.started == ["a"]
        assert (await flow_of(flows, outer)).status == "cancelled"


@pytest.mark.parametrize("is_clean", [True, False], ids=["closed", "crashed"])
async def test_an_intent_that_was_not_passed_on_in_time_is_passed_on_after_the_restart(
    is_clean: bool, tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("inner", "flow.cancel_requested", (NOT_WRITTEN, False), times=1000)
        assert (await request(flows, outer)).applied
        await pass_time(clock, 3)
        assert store.failed >= 2
        assert (await inner_of(flows)).cancel_requested_at is None
        if not is_clean:
            thief = MemoryStore(store.tables)
            await thief.open(takeover=True)
            await thief.aclose()
    tree.started.clear()

    async with staged(tree, clock, MemoryStore(store.tables)) as runtime:
        flows = flows_of(runtime)
        await settle()
        assert (await inner_of(flows)).cancel_requested_at
        tree.go.set()
        await pass_time(clock, 100)

        assert "b" not in tree.started
        assert (await flow_of(flows, outer)).status == "cancelled"
        await check_whole(flows, outer)


@pytest.mark.parametrize("event", ["flow.cancel_requested", "task.cancel_requested"])
@pytest.mark.parametrize("is_clean", [True, False], ids=["closed", "crashed"])
async def test_nothing_starts_below_a_stop_that_the_disk_keeps_from_coming_down_after_a_restart(
    is_clean: bool, event: str, tree: Tree, clock: ManualClock
):
    tables = MemoryTables()
    store = Picky(tables=tables)
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("inner", "flow.cancel_requested", (NOT_WRITTEN, False), times=1000)
        await stop_from_above(flows, outer, event, clock)
        if not is_clean:
            thief = MemoryStore(tables)
            await thief.open(takeover=True)
            await thief.aclose()
    assert tree.started == ["a"]
    tree.go.set()

    store = Picky(tables=tables)
    store.fail_events("inner", "flow.cancel_requested", (NOT_WRITTEN, False), times=1000)
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        # Between two tries somebody else has the flow below be loaded and written.
        await pass_time(clock, 1.5)
        inner = await inner_of(flows)
        updating = flows.update(flow_id=inner.flow_id, expected_revision=inner.revision)
        assert (await soon(updating)).applied
        await pass_time(clock, 30)
        assert store.failed >= 2, "vacuous: it came down"
        assert tree.started == ["a"]

        store._times = 0
        await pass_time(clock, 100)

        assert tree.started == ["a"]
        assert (await flow_of(flows, outer)).status == "cancelled"
        await check_whole(flows, outer)
        assert holds_nothing(runtime)


@pytest.mark.parametrize("event", ["flow.cancel_requested", "task.cancel_requested"])
async def test_nothing_starts_below_a_stop_that_the_disk_keeps_from_coming_down(
    event: str, tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("inner", "flow.cancel_requested", (NOT_WRITTEN, False), times=1000)
        await stop_from_above(flows, outer, event, clock)
        # The first child ends, and the controller below wants its next one.
        tree.go.set()
        await pass_time(clock, 30)
        assert store.failed >= 2, "vacuous: it came down"
        inner = await inner_of(flows)
        assert [task.status for task in await flows.list_tasks(inner.flow_id)] == [
            "succeeded",
            "queued",
        ]

        store._times = 0
        await pass_time(clock, 5)

        assert tree.started == ["a"]
        assert (await flow_of(flows, outer)).status == "cancelled"
        await check_whole(flows, outer)
        assert holds_nothing(runtime)


async def test_a_flow_that_is_woken_while_an_intent_comes_down_goes_on_once_it_has(
    clock: ManualClock,
):
    ends = Counter[str]()
    for steps in range(40):
        tree = Tree()

        @tree.registry.controller("above")
        async def above(flow: FlowContext) -> None:
            await flow.run(Nested("patient"), name="nested")

        @tree.registry.controller("patient")
        async def patient(flow: FlowContext) -> None:
            await flow.finish(state_json=await flow.wait("word", about="it"))

        limits = Limits(cancel_grace=60, park_seconds=1)
        async with staged(tree, clock, limits=limits) as runtime:
            flows = flows_of(runtime)
            outer = await new_flow(flows, "above")
            await pass_time(clock, 2)
            [inner] = await flows.list(controller_id="patient")
            key = FlowKey("owner", inner.flow_id)
            assert not runtime._engine.supervisor.is_driven(key), "vacuous: it is not parked"

            asking = asyncio.create_task(request_at_once(flows, outer))
            await turns(steps)
            told = await soon(flows.signal(about="it", payload="the word"))
            await soon(asking)
            await pass_time(clock, 3)

            inner = await flow_of(flows, inner.flow_id)
            if told.code == "matched":
                assert (inner.status, inner.state_json) == ("succeeded", "the word")
            ends[f"{told.code} {inner.status}"] += 1
    assert ends["matched succeeded"] and len(ends) > 1, f"vacuous: always the same: {ends}"


async def test_an_intent_that_is_told_again_once_it_has_come_down_holds_nothing_up(
    tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        assert (await request(flows, outer)).applied
        await settle()
        inner = await inner_of(flows)
        assert inner.cancel_requested_at, "vacuous: it has not come down"

        # What its commit did is not known, so the flow above is loaded again, and tells of its intent again.
        store.fail_events("outer", "flow.updated", (UNKNOWN, True))
        revision = (await flow_of(flows, outer)).revision
        answer = await soon(flows.update(flow_id=outer, expected_revision=revision))
        assert answer.code == "outcome_unknown"
        await pass_time(clock, 3)

        assert FlowKey("owner", inner.flow_id) in runtime._engine.supervisor.attended
        tree.go.set()
        await pass_time(clock, 3)
        assert (await inner_of(flows)).status == "cancelled"
        await check_whole(flows, outer)


async def stop_from_above(
    flows: SessionFlows, outer_id: str, event: str, clock: ManualClock
) -> None:
    """Have such an event be written above, and see that it is: an intent alone, or the stop of the child."""
    if event == "flow.cancel_requested":
        assert (await request(flows, outer_id)).applied
    else:
        cancelling = asyncio.create_task(flows.cancel(outer_id, grace=1))
        await pass_time(clock, 1.1)
        assert (await soon(cancelling)).code == "cancel_pending"
    assert event in [each.type for each in await flows.history(outer_id)]
    await settle()


async def test_wherever_an_intent_finds_a_nested_flow_nothing_starts_below_once_it_has_it(
    clock: ManualClock,
):
    found = set()
    for steps in range(60):
        tree = Tree()
        async with staged(tree, clock) as runtime:
            flows = flows_of(runtime)
            outer = await new_flow(flows, "outer")
            await turns(steps)

            answer = await request_at_once(flows, outer)

            found.add((answer, len(tree.started)))
            tree.go.set()
            await pass_time(clock, 1)
            assert (await flow_of(flows, outer)).status == "cancelled", f"after {steps} steps"
            for inner in await flows.list(controller_id="inner"):
                assert inner.status == "cancelled"
                types = [str(event.type) for event in await flows.history(inner.flow_id)]
                asked = types.index("flow.cancel_requested")
                assert "task.started" not in types[asked:]
                assert "task.created" not in types[asked:]
            assert "b" not in tree.started
            assert holds_nothing(runtime)
    assert {started for _, started in found} == {0, 1}, "vacuous: always in the same place"


async def request_at_once(flows: SessionFlows, flow_id: str) -> bool:
    """Request a cancel, whatever the flow's revision is by then."""
    while not (answer := await request(flows, flow_id)).applied:
        assert answer.code == "revision_conflict"
    return True


# ---- what does not stop -----------------------------------------------------------------------------


async def test_a_deaf_child_at_the_bottom_is_given_up_there_and_everything_above_ends(
    tree: Tree, clock: ManualClock
):
    async with staged(tree, clock) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer", state_json="deaf")
        await settle()
        began = clock.now()
        cancelling = asyncio.create_task(flows.cancel(outer, grace=3600))
        await settle()
        await pass_time(clock, 29.8)
        assert not (await inner_of(flows)).ended_at
        assert not (await flow_of(flows, outer)).ended_at

        await pass_time(clock, 0.3)

        report = await soon(cancelling)
        assert (report.cancelled, report.code) == (False, "abandoned")
        assert [(line.depth, line.state) for line in report.descendants] == [
            (0, "settled"),
            (1, "abandoned"),
        ]
        await check_whole(flows, outer)
        assert began + 30_000 <= (await flow_of(flows, outer)).ended_at <= began + 30_200  # type: ignore[operator]
        counts = runtime.statistics()
        assert (counts.abandoned, counts.running_children) == (1, 0)


async def test_a_child_that_stands_for_a_nested_flow_is_never_given_up_itself(
    tree: Tree, clock: ManualClock
):
    store = Picky()
    async with staged(tree, clock, store) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "outer")
        await settle()
        store.fail_events("inner", "flow.cancel_requested", (NOT_WRITTEN, False), times=1000)
        cancelling = asyncio.create_task(flows.cancel(outer, grace=3600))

        await pass_time(clock, 120)

        # Else it would be final while its flow lives on below.
        assert not cancelling.done()
        assert not (await inner_of(flows)).ended_at
        [child] = await flows.list_tasks(outer)
        assert (child.status, child.kill_requested_at) == ("running", None)
        store._times = 0
        await pass_time(clock, 5)
        assert (await soon(cancelling)).cancelled
        await check_whole(flows, outer)


async def test_a_parent_learns_of_a_failure_below_whoever_is_cancelled(
    tree: Tree, clock: ManualClock
):
    seen: list[str] = []

    @tree.registry.controller("careful")
    async def careful(flow: FlowContext) -> None:
        for name in ("first", "second"):
            try:
                await flow.run(Nested("inner"), name=name)
            except ChildError as error:
                seen.append(type(error).__name__)

    async with staged(tree, clock) as runtime:
        flows = flows_of(runtime)
        outer = await new_flow(flows, "careful")
        await settle()
        [first] = await flows.list(controller_id="inner")
        assert (await soon(flows.cancel(first.flow_id))).cancelled
        await settle()
        [second] = [
            flow
            for flow in await flows.list(controller_id="inner")
            if flow.flow_id != first.flow_id
        ]
        [child] = [task for task in await flows.list_tasks(outer) if not task.ended_at]
        assert (await soon(flows.cancel_task(child.task_id))).cancelled

        assert (await soon(flows.result(outer))).status == "succeeded"
        assert (await flow_of(flows, second.flow_id)).status == "cancelled"
        assert seen == ["ChildCancelled", "ChildCancelled"]
        assert [task.status for task in await flows.list_tasks(outer)] == ["cancelled"] * 2
