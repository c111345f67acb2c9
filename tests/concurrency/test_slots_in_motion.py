"""The slots that flows share, while commits fail and flows come and go: none is lost, and none is lent twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any

import pytest

from flowstead import (
    Limits,
    Registry,
    Retry,
    Runtime,
    SessionFlows,
    StoreUnusable,
    Task,
    TaskContext,
)
from flowstead.model.command import ProgressReport
from flowstead.model.flow import FlowKey
from flowstead.store.memory import MemoryStore, MemoryTables
from flowstead.testing import ManualClock
from tests.faulty_store import (
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    new_flow,
    running,
    settle,
    soon,
)

TROUBLES = {
    "not written": (NOT_WRITTEN, False),
    "unknown and not written": (UNKNOWN, False),
    "unknown and written": (UNKNOWN, True),
}
A_RETRY = Retry(max_attempts=5, initial=0.5, jitter=0)


class Yard:
    """Children that end when they are told, and a count of those whose code runs."""

    def __init__(self, *, concurrency: int | None = None) -> None:
        self.registry = Registry()
        self.registry.task(self.work, name="work", retry=A_RETRY)
        self.registry.task(self.work_apart, name="apart", retry=A_RETRY, concurrency=concurrency)
        self.gates: dict[str, asyncio.Event] = {}
        self.inside: list[tuple[str, str]] = []
        self.begun: list[str] = []
        self.most: Counter[str] = Counter()

    async def work(self, ctx: TaskContext, given: Any) -> str:
        return await self._run("work", ctx, given)

    async def work_apart(self, ctx: TaskContext, given: Any) -> str:
        return await self._run("apart", ctx, given)

    async def _run(self, kind: str, ctx: TaskContext, given: Any) -> str:
        name = str(ctx.run_id)
        self.begun.append(name)
        self.inside.append((kind, name))
        for some in ("work", "apart"):
            self.most[some] = max(self.most[some], sum(k == some for k, _ in self.inside))
        self.most["all"] = max(self.most["all"], len(self.inside))
        try:
            await self.gate(name).wait()
            if ctx.attempt <= (given or 0):
                raise ConnectionError("not yet")
            return name
        finally:
            self.inside.remove((kind, name))

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    @property
    def now(self) -> list[str]:
        """Whose code runs, oldest first."""
        return [name for _, name in self.inside]

    async def end(self, *names: str) -> None:
        for name in names:
            self.gate(name).set()
        await settle()


async def launch(flows: SessionFlows, flow_id: str, name: str, **given: Any) -> str:
    given.setdefault("run", "work")
    made = await soon(flows.run_task(flow_id=flow_id, task=name, run_id=name, **given))
    return made.unwrap().task_id


async def task_of(flows: SessionFlows, task_id: str) -> Task:
    task = await flows.get_task(task_id)
    assert task
    return task


async def pass_time(clock: ManualClock, seconds: float) -> None:
    for _ in range(round(seconds * 10)):
        clock.advance(0.1)
        await settle()


def all_are_free(runtime: Runtime) -> bool:
    """Whether nobody holds a slot, is kept one, or stands in line for one."""
    slots = runtime._engine._slots
    used = {name: count for name, count in slots._used.items() if count}
    left = {"held": slots._held, "used": used, "lines": slots._lines, "kept": slots._kept}
    assert not any(left.values()), f"not free: {left}"
    return True


# ---- one commit fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
@pytest.mark.parametrize("moment", ["end", "retry", "start of the next", "cancel", "progress"])
async def test_whatever_commit_fails_no_slot_is_lost_and_none_is_lent_twice(
    moment: str, trouble: tuple[Exception, bool], clock: ManualClock
):
    error, written = trouble
    yard, store = Yard(), FaultyStore()
    limits = Limits(running_in_all=1)
    async with running(store, clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows) for _ in range(3)]
        first = await launch(flows, ids[0], "first", input_json=1 if moment == "retry" else 0)
        for flow_id, name in zip(ids, ("second", "third", "fourth"), strict=True):
            await launch(flows, flow_id, name)
        await settle()
        assert yard.now == ["first"]

        if moment == "start of the next":
            # The commit after the one that ends the first.
            store.hold()
            yard.gate("first").set()
            await store.wait_held()
            store.release()
            await asyncio.sleep(0)
            store.fail_commits(error, written=written)
            await settle()
        else:
            store.fail_commits(error, written=written)
            if moment == "cancel":
                await soon(flows.cancel_task(first, grace=0.01))
            elif moment == "progress":
                report = asyncio.create_task(_touch(runtime, ids[0], first))
                await settle()
                assert report.done()
            else:
                await yard.end("first")
        assert not store._commit_faults, "vacuous: nothing failed"

        for name in ("first", "second", "third", "fourth"):
            yard.gate(name).set()
        await pass_time(clock, 10)

        statuses = [(await flows.list_tasks(i))[-1].status for i in ids]
        assert statuses == ["succeeded"] * 3
        assert (await task_of(flows, first)).ended_at
        assert yard.most["all"] == 1
        assert all_are_free(runtime)


async def _touch(runtime: Runtime, flow_id: str, task_id: str) -> None:
    """A sign of life, as the child itself gives it."""
    await runtime._engine.report(FlowKey("owner", flow_id), ProgressReport(task_id=task_id))


async def test_a_child_whose_retry_is_in_doubt_holds_no_slot_while_it_waits(clock: ManualClock):
    yard, store = Yard(), FaultyStore()
    limits = Limits(running_in_all=1)
    async with running(store, clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        a, b = [await new_flow(flows) for _ in range(2)]
        patient = Retry(max_attempts=5, initial=3600, max_delay=3600, jitter=0)
        await launch(flows, a, "fails", input_json=1, retry=patient)
        waits = await launch(flows, b, "waits")
        await settle()
        store.fail_commits(UNKNOWN, written=True)
        yard.gate("waits").set()

        await yard.end("fails")
        await pass_time(clock, 3)

        assert (await task_of(flows, waits)).status == "succeeded"
        assert all_are_free(runtime)


# ---- many commits fail ------------------------------------------------------------------------------


async def storm(seed: int) -> int:
    """Children of several flows and kinds, while commits fail at random; answers how many failed."""
    chance, clock, store = Random(seed), ManualClock(), FaultyStore()
    yard = Yard(concurrency=chance.choice([1, 2]))
    limits = Limits(
        running_in_all=chance.choice([1, 2, 3]), running_children=chance.choice([1, 2, 8])
    )
    async with running(store, clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        names: list[str] = []
        ids = [await new_flow(flows) for _ in range(chance.randrange(2, 5))]
        for flow_id in ids:
            for n in range(chance.randrange(1, 5)):
                names.append(f"{flow_id[-4:]}-{n}")
                kind = chance.choice(["work", "apart"])
                failures = chance.choice([0, 0, 1, 2])
                await launch(flows, flow_id, names[-1], run=kind, input_json=failures)
        await settle()
        for _ in range(60):
            match chance.randrange(4):
                case 0 if not store._commit_faults:
                    error, written = chance.choice(list(TROUBLES.values()))
                    store.fail_commits(error, written=written, times=chance.choice([1, 1, 2]))
                case 1:
                    yard.gate(chance.choice(names)).set()
                case 2:
                    for _ in range(chance.randrange(12)):
                        await asyncio.sleep(0)
                case _:
                    clock.advance(chance.choice([0.1, 0.5, 1.0]))
                    await settle()
        failed = runtime.statistics().failed_writes
        store.heal()
        for name in names:
            yard.gate(name).set()
        await pass_time(clock, 40)

        for flow_id in ids:
            for task in await flows.list_tasks(flow_id):
                assert task.status == "succeeded", f"seed {seed}: {task}"
        assert set(yard.begun) == set(names)
        assert yard.most["all"] <= limits.running_in_all, f"seed {seed}: {yard.most}"
        most_apart = yard.registry.concurrency_of("apart")
        assert most_apart
        assert yard.most["apart"] <= most_apart, f"seed {seed}: {yard.most}"
        assert all_are_free(runtime)
        return failed


async def test_after_a_storm_of_failing_commits_all_children_have_run_and_all_slots_are_free():
    failed = [await storm(seed) for seed in range(40)]

    assert sum(failed) > 100, "vacuous: hardly anything failed"


# ---- flows that come and go -------------------------------------------------------------------------


async def test_a_flow_that_left_memory_while_it_waited_is_brought_back_for_its_slot(
    clock: ManualClock,
):
    yard = Yard()
    limits = Limits(running_in_all=1, idle_seconds=1)
    async with running(clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        busy, *waiting = [await new_flow(flows) for _ in range(4)]
        await launch(flows, busy, "first")
        for n, flow_id in enumerate(waiting):
            await launch(flows, flow_id, f"later-{n}")
        await pass_time(clock, 10)
        assert runtime.statistics().flows_in_memory == 1, "vacuous: nobody left"

        for name in ("first", "later-0", "later-1", "later-2"):
            assert yard.now == [name]
            await yard.end(name)

        assert yard.begun == ["first", "later-0", "later-1", "later-2"]
        assert all_are_free(runtime)


async def test_an_unreadable_flow_that_is_offered_a_slot_passes_it_on(clock: ManualClock):
    yard, tables = Yard(), MemoryTables()
    limits = Limits(running_in_all=1, idle_seconds=1)
    store = MemoryStore(tables)
    async with running(store, clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        busy, damaged, good = [await new_flow(flows) for _ in range(3)]
        for flow_id, name in ((busy, "first"), (damaged, "never"), (good, "second")):
            await launch(flows, flow_id, name)
        await pass_time(clock, 10)
        key = tables.flow_keys[FlowKey("owner", damaged)]
        tables.flows[key] = tables.flows[key]._replace(doc="{")

        await yard.end("first")

        assert yard.now == ["second"]
        await yard.end("second")
        await pass_time(clock, 5)
        assert yard.begun == ["first", "second"]
        assert all_are_free(runtime)


async def test_a_flow_that_is_unreadable_after_a_start_in_doubt_keeps_no_slot(clock: ManualClock):
    yard, store = Yard(), FaultyStore()
    limits = Limits(running_in_all=1)
    async with running(store, clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        damaged, good = [await new_flow(flows) for _ in range(2)]
        store.fail_commits(UNKNOWN, written=True)
        await soon(flows.run_task(flow_id=damaged, task="t", run="work", run_id="never"))
        key = store.tables.flow_keys[FlowKey("owner", damaged)]
        store.tables.flows[key] = store.tables.flows[key]._replace(doc="{")
        await launch(flows, good, "second")

        await pass_time(clock, 5)

        assert yard.now == ["second"]
        await yard.end("second")
        assert all_are_free(runtime)


async def test_a_flow_that_cannot_be_read_for_a_moment_gets_its_slot_later(clock: ManualClock):
    yard, store = Yard(), FaultyStore()
    limits = Limits(running_in_all=1, idle_seconds=1)
    async with running(store, clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        busy, unlucky, good = [await new_flow(flows) for _ in range(3)]
        for flow_id, name in ((busy, "first"), (unlucky, "third"), (good, "second")):
            await launch(flows, flow_id, name)
        await pass_time(clock, 10)
        store.fail_reads("load", StoreUnusable("flows.db", "a read failed"))

        await yard.end("first")
        assert yard.now == ["second"]
        await pass_time(clock, 2)
        await yard.end("second")

        assert yard.now == ["third"]
        await yard.end("third")
        assert all_are_free(runtime)


@pytest.mark.parametrize("how", ["finish", "cancel", "cancel its child", "request"])
async def test_a_flow_that_needs_its_slot_no_more_does_not_keep_it_from_the_next(
    how: str, clock: ManualClock
):
    yard = Yard()
    limits = Limits(running_in_all=1)
    async with running(clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        busy, leaves, good = [await new_flow(flows) for _ in range(3)]
        await launch(flows, busy, "first")
        unwanted = await launch(flows, leaves, "never")
        await launch(flows, good, "second")
        await settle()

        match how:
            case "finish":
                await soon(flows.finish(flow_id=leaves, expected_revision=0))
            case "cancel":
                assert (await soon(flows.cancel(leaves))).cancelled
            case "request":
                await soon(flows.request_cancel(flow_id=leaves, expected_revision=0))
            case _:
                assert (await soon(flows.cancel_task(unwanted))).cancelled
        await yard.end("first")

        assert yard.now == ["second"]
        await yard.end("second")
        assert yard.begun == ["first", "second"]
        assert all_are_free(runtime)


async def test_those_who_wait_longest_come_first_flow_by_flow(clock: ManualClock):
    yard = Yard()
    limits = Limits(running_in_all=1)
    async with running(clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        a, b, c = [await new_flow(flows) for _ in range(3)]
        for flow_id, name in ((a, "a1"), (a, "a2"), (b, "b1"), (b, "b2"), (c, "c1")):
            await launch(flows, flow_id, name)
            await settle()

        while yard.now:
            [name] = yard.now
            await yard.end(name)

        # Each flow has one turn before any has its second.
        assert yard.begun == ["a1", "a2", "b1", "c1", "b2"]
        assert all_are_free(runtime)


async def test_children_of_another_function_do_not_stand_behind_a_function_that_is_full(
    clock: ManualClock,
):
    yard = Yard(concurrency=1)
    limits = Limits(running_in_all=3, running_children=3)
    async with running(clock=clock, registry=yard.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        a, b = [await new_flow(flows) for _ in range(2)]
        for flow_id, name, run in (
            (a, "apart-a", "apart"),
            (b, "apart-b", "apart"),
            (b, "apart-c", "apart"),
            (b, "work-b", "work"),
            (a, "work-a", "work"),
        ):
            await launch(flows, flow_id, name, run=run)
        await settle()
        assert yard.now == ["apart-a", "work-b", "work-a"]

        await yard.end("apart-a")
        assert yard.now == ["work-b", "work-a", "apart-b"]
        await yard.end("work-a", "work-b", "apart-b", "apart-c")

        assert yard.begun[-1] == "apart-c"
        assert yard.most["apart"] == 1
        assert all_are_free(runtime)


async def test_a_flow_that_waits_for_two_slots_keeps_neither_from_those_who_need_but_one(
    clock: ManualClock,
):
    yard = Yard(concurrency=1)
    async with running(
        clock=clock, registry=yard.registry, limits=Limits(running_in_all=2)
    ) as runtime:
        flows = flows_of(runtime)
        a, b, c, d = [await new_flow(flows) for _ in range(4)]
        await launch(flows, a, "apart-a", run="apart")
        await launch(flows, a, "work-a")
        await launch(flows, b, "apart-b", run="apart")
        await launch(flows, c, "work-c")
        await launch(flows, d, "apart-d", run="apart")
        await settle()
        assert yard.now == ["apart-a", "work-a"]

        await yard.end("work-a")
        assert yard.now == ["apart-a", "work-c"]
        await yard.end("apart-a")
        assert yard.now == ["work-c", "apart-b"]
        await yard.end("apart-b", "work-c", "apart-d")

        assert sorted(yard.begun) == ["apart-a", "apart-b", "apart-d", "work-a", "work-c"]
        assert all_are_free(runtime)


async def test_what_was_cut_off_stands_in_line_where_there_is_less_room_than_before(
    clock: ManualClock,
):
    tables, yard = MemoryTables(), Yard()
    async with running(
        MemoryStore(tables), clock=clock, registry=yard.registry, limits=Limits(running_in_all=3)
    ) as runtime:
        flow_id = await new_flow(flows_of(runtime), flow_id="mine")
        for name in ("a", "b", "c", "d"):
            await launch(flows_of(runtime), flow_id, name)
        await settle()
        thief = MemoryStore(tables)
        await thief.open(takeover=True)
        await thief.aclose()
    assert yard.begun == ["a", "b", "c"]
    yard.most.clear()

    async with running(
        MemoryStore(tables), clock=clock, registry=yard.registry, limits=Limits(running_in_all=1)
    ) as runtime:
        await settle()
        for name in ("a", "b", "c", "d"):
            assert yard.now == [name]
            await yard.end(name)

        tasks = await flows_of(runtime).list_tasks("mine")
        assert [(task.status, task.attempt) for task in tasks] == [
            ("succeeded", 2),
            ("succeeded", 2),
            ("succeeded", 2),
            ("succeeded", 1),
        ]
        assert yard.most["all"] == 1
        assert all_are_free(runtime)
