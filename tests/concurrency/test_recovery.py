"""Recovery: what an earlier runtime left unfinished is set in motion again, and an idle restart writes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flowstead import (
    Failed,
    FlowContext,
    Limits,
    Lost,
    Registry,
    Retry,
    StoreInUse,
    StoreUnusable,
    Succeeded,
    TaskContext,
)
from flowstead.model.flow import FlowKey
from flowstead.store.memory import MemoryStore, MemoryTables
from flowstead.testing import ManualClock
from tests.faulty_store import (
    FaultyStore,
    flows_of,
    holds_nothing,
    new_flow,
    running,
    settle,
    soon,
)


class Work:
    """A registry whose task waits for a word, and what was run of it."""

    def __init__(self, **policy: Any) -> None:
        self.go = asyncio.Event()
        self.runs: list[tuple[object, int]] = []
        self.registry = Registry()
        self.registry.task(self.work, name="work", **policy)

    async def work(self, ctx: TaskContext, given: object) -> object:
        self.runs.append((given, ctx.attempt))
        await self.go.wait()
        return given


async def crashed(tables: MemoryTables, registry: Registry, play: Any, **options: Any) -> None:
    """Let a runtime play, and then die: whatever it still does after that does not reach the tables."""
    async with running(MemoryStore(tables), registry=registry, **options) as runtime:
        await play(runtime)
        await settle()
        # Somebody else takes the store over, so that this runtime cannot even close in an orderly way.
        thief = MemoryStore(tables)
        await thief.open(takeover=True)
        await thief.aclose()


async def test_an_idle_restart_writes_nothing_and_changes_no_row():
    tables, work, clock = MemoryTables(), Work(), ManualClock()

    @work.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await flow.run("work", 1)
        await asyncio.Event().wait()

    work.go.set()
    async with running(MemoryStore(tables), registry=work.registry, clock=clock) as runtime:
        flows = flows_of(runtime)
        driven, parked, ended = (
            await new_flow(flows, "c"),
            await new_flow(flows),
            await new_flow(flows),
        )
        await flows.set_waiting(flow_id=parked, expected_revision=0, wait_json={"kind": "x"})
        await flows.finish(flow_id=ended, expected_revision=0)
        await flows.run_task(flow_id=parked, task="t", runtime="acp", status="running")
        await settle()
    rows = (dict(tables.flows), dict(tables.tasks), dict(tables.events))

    for _ in range(3):
        store = FaultyStore(tables=tables)
        async with running(store, registry=work.registry, clock=clock) as runtime:
            await settle()
            clock.advance(3600)
            await settle()
            assert await flows_of(runtime).get(driven)
        assert store.attempts == 0
        assert (tables.flows, tables.tasks, tables.events) == rows


async def test_a_child_cut_off_by_a_crash_is_started_again_as_a_new_attempt():
    tables, work = MemoryTables(), Work()

    async def play(runtime: Any) -> None:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, flow_id="mine")
        await flows.run_task(flow_id=flow_id, task="t", run="work", input_json="in")

    await crashed(tables, work.registry, play)
    work.go.set()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        flows = flows_of(runtime)
        [task] = await flows.list_tasks("mine")
        assert await soon(flows.wait_task(task.task_id)) == Succeeded("in")
        assert work.runs == [("in", 1), ("in", 2)]
        [task] = await flows.list_tasks("mine")
        assert task.attempt == 2


async def test_a_crash_spends_no_attempt_of_the_retry_policy():
    tables, clock, registry, runs = MemoryTables(), ManualClock(), Registry(), []
    hang = True

    @registry.task(retry=Retry(max_attempts=2, initial=1, jitter=0))
    async def flaky(ctx: TaskContext, given: object) -> None:
        runs.append(ctx.attempt)
        if hang:
            await asyncio.Event().wait()
        raise ValueError("fails")

    async def play(runtime: Any) -> None:
        flows = flows_of(runtime)
        if not await flows.get("mine"):
            await new_flow(flows, flow_id="mine")
            await flows.run_task(flow_id="mine", task="t", run="flaky")

    for _ in range(3):
        await crashed(tables, registry, play, clock=clock)
    hang = False
    async with running(MemoryStore(tables), registry=registry, clock=clock) as runtime:
        flows = flows_of(runtime)
        for _ in range(4):
            await settle()
            clock.advance(1)
        [task] = await flows.list_tasks("mine")

        assert isinstance(await soon(flows.wait_task(task.task_id)), Failed)
        assert runs == [1, 2, 3, 4, 5]


async def test_a_child_that_must_not_be_done_twice_is_lost_by_a_crash():
    tables, work = MemoryTables(), Work(idempotent=False)

    async def play(runtime: Any) -> None:
        flows = flows_of(runtime)
        await new_flow(flows, flow_id="mine")
        for n in range(3):
            await flows.run_task(flow_id="mine", task="t", run="work", input_json=n)

    limits = Limits(running_children=2)
    await crashed(tables, work.registry, play, limits=limits)
    work.go.set()

    async with running(MemoryStore(tables), registry=work.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        await settle()
        tasks = await flows.list_tasks("mine")

        # The third had not begun.
        assert [task.status for task in tasks] == ["lost", "lost", "succeeded"]
        assert isinstance(await soon(flows.wait_task(tasks[0].task_id)), Lost)
        assert work.runs == [(0, 1), (1, 1), (2, 1)]


async def test_a_bare_function_cannot_be_found_again_after_a_crash():
    tables, registry = MemoryTables(), Registry()

    async def bare(ctx: TaskContext, given: object) -> None:
        await asyncio.Event().wait()

    async def play(runtime: Any) -> None:
        await new_flow(flows_of(runtime), flow_id="mine")
        await flows_of(runtime).run_task(flow_id="mine", task="t", run=bare)

    await crashed(tables, registry, play)

    async with running(MemoryStore(tables), registry=registry) as runtime:
        await settle()
        [task] = await flows_of(runtime).list_tasks("mine")
        assert task.status == "lost"
        assert task.failure
        assert task.failure.kind == "interrupted"
        assert holds_nothing(runtime)


async def test_a_child_that_takes_the_process_down_again_and_again_is_given_up():
    tables, work = MemoryTables(), Work()

    async def play(runtime: Any) -> None:
        flows = flows_of(runtime)
        if not await flows.get("mine"):
            await new_flow(flows, flow_id="mine")
            await flows.run_task(flow_id="mine", task="t", run="work")

    for _ in range(4):
        await crashed(tables, work.registry, play, limits=Limits(interruptions=2))
    async with running(
        MemoryStore(tables), registry=work.registry, limits=Limits(interruptions=2)
    ) as runtime:
        await settle()
        [task] = await flows_of(runtime).list_tasks("mine")

        assert task.status == "lost"
        assert work.runs == [(None, 1), (None, 2), (None, 3)]


async def test_a_child_whose_function_nobody_knows_here_is_kept_for_a_runtime_that_does():
    tables, work = MemoryTables(), Work()

    async def play(runtime: Any) -> None:
        await new_flow(flows_of(runtime), flow_id="mine")
        await flows_of(runtime).run_task(flow_id="mine", task="t", run="work")

    await crashed(tables, work.registry, play)
    ignorant = FaultyStore(tables=tables)
    async with running(ignorant, registry=Registry()) as runtime:
        await settle()
        [task] = await flows_of(runtime).list_tasks("mine")
        assert (task.status, task.attempt) == ("running", 1)
    assert ignorant.attempts == 0
    work.go.set()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        assert await soon(flows_of(runtime).wait_task(task.task_id)) == Succeeded(None)


async def test_controllers_nobody_registered_are_reported_and_their_flows_left_alone():
    tables, registry = MemoryTables(), Registry()

    @registry.controller("known")
    async def known(flow: FlowContext) -> None:
        await asyncio.Event().wait()

    async with running(MemoryStore(tables), registry=registry) as runtime:
        flows = flows_of(runtime)
        for controller in ("known", "gone", "gone", "lost/too"):
            await new_flow(flows, controller)
        ended = await new_flow(flows, "finished")
        await flows.finish(flow_id=ended, expected_revision=0)
        await settle()

    store = FaultyStore(tables=tables)
    async with running(store, registry=registry) as runtime:
        await settle()
        assert runtime.admin.unregistered_controllers() == {"gone": 2, "lost/too": 1}
        assert [flow.status for flow in await flows_of(runtime).list(controller_id="gone")] == [
            "queued"
        ] * 2
    assert store.attempts == 0


async def test_more_flows_than_a_page_are_all_set_in_motion_again():
    tables, work = MemoryTables(), Work()
    entered: list[str] = []

    @work.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        entered.append(flow.flow_id)
        await work.go.wait()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        ids = await asyncio.gather(*(new_flow(flows_of(runtime), "c") for _ in range(700)))
        await settle()
    entered.clear()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        await settle()
        assert sorted(entered) == sorted(ids)
        work.go.set()
        await settle()
        assert {flow.status for i in ids if (flow := await flows_of(runtime).get(i))} == {
            "succeeded"
        }
        assert holds_nothing(runtime)


async def test_a_runtime_answers_while_it_recovers():
    tables, work = MemoryTables(), Work()

    @work.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await work.go.wait()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        ids = await asyncio.gather(*(new_flow(flows_of(runtime), "c") for _ in range(300)))
        await settle()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        flows = flows_of(runtime)
        assert (await soon(flows.update(flow_id=ids[-1], expected_revision=1))).applied
        assert (await soon(flows.cancel(ids[0]))).cancelled
        work.go.set()
        assert (await soon(flows.result(ids[-1]))).status == "succeeded"


async def test_closing_in_the_middle_of_the_recovery_loses_nothing():
    tables, work = MemoryTables(), Work()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        flows = flows_of(runtime)
        ids = await asyncio.gather(*(new_flow(flows) for _ in range(300)))
        for flow_id in ids:
            await flows.run_task(flow_id=flow_id, task="t", run="work")

    for steps in range(12):
        async with running(MemoryStore(tables), registry=work.registry):
            for _ in range(steps):
                await asyncio.sleep(0)
    work.go.set()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        await settle()
        counts = [await flows_of(runtime).get_task_summary(i) for i in ids]
        assert sum(count.by_status["succeeded"] for count in counts if count) == 300
        tasks = await flows_of(runtime).list_tasks(ids[0])
        assert [task.attempt for task in tasks] == [1]


async def test_an_unreadable_flow_does_not_hold_up_the_recovery_of_the_others():
    tables, work = MemoryTables(), Work()

    @work.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await work.go.wait()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        bad, good = [await new_flow(flows_of(runtime), "c") for _ in range(2)]
        await settle()
    key = tables.flow_keys[FlowKey("owner", bad)]
    tables.flows[key] = tables.flows[key]._replace(doc="{")
    work.go.set()

    async with running(MemoryStore(tables), registry=work.registry) as runtime:
        assert (await soon(flows_of(runtime).result(good))).status == "succeeded"
        [unreadable] = await runtime.admin.list_unreadable()
        assert (unreadable.table, unreadable.key) == ("flows", key)


@pytest.mark.parametrize("read", ["list_unfinished", "count_by_controller", "load", "list_due"])
async def test_a_read_that_fails_during_the_recovery_is_made_again(read: str):
    tables, work, clock = MemoryTables(), Work(retry=Retry(initial=1, jitter=0)), ManualClock()

    @work.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await flow.run("work", 1)

    async with running(MemoryStore(tables), registry=work.registry, clock=clock) as runtime:
        flow_id = await new_flow(flows_of(runtime), "c")
        await settle()
    work.go.set()
    store = FaultyStore(tables=tables)
    store.fail_reads(read, StoreUnusable("flows.db", "a read failed"))

    async with running(store, registry=work.registry, clock=clock) as runtime:
        for _ in range(5):
            await settle()
            clock.advance(1)

        flow = await flows_of(runtime).get(flow_id)
        assert flow
        assert flow.status == "succeeded"


async def test_a_second_runtime_is_refused_while_the_first_one_lives():
    tables = MemoryTables()
    async with running(MemoryStore(tables)) as first:
        flow_id = await new_flow(flows_of(first))

        with pytest.raises(StoreInUse):
            async with running(MemoryStore(tables)):
                pass

        assert (await flows_of(first).update(flow_id=flow_id, expected_revision=0)).applied
