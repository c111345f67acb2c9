"""Parking while something else happens: whatever comes first, a controller sees its answer, once; nothing hangs."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from flowstead import ChildCancelled, FlowContext, Limits, Registry, Runtime
from flowstead.testing import Schedule, Simulation
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
from tests.runtime.support import bound, make
from tests.runtime.waiting import registry_of

KEY = {"thread": 1}
PARK = 5.0
LIMITS = Limits(park_seconds=PARK, idle_seconds=1.0)


def random_of_the_loop() -> Any:
    return asyncio.get_running_loop().random  # type: ignore[attr-defined]


class Steps:
    """A controller of a few steps, with what each run of it has seen."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []
        self.worked: Counter[str] = Counter()

    def registry(self) -> Registry:
        registry = registry_of(steps=self.drive)
        registry.task(name="work")(self.work)
        return registry

    async def work(self, context: Any, value: Any) -> Any:
        self.worked[context.run_id] += 1
        await asyncio.sleep(0.01)
        return value

    async def drive(self, flow: FlowContext) -> None:
        run: list[Any] = []
        self.seen.append(run)
        run.append(await flow.run("work", "a", name="a"))
        run.append(await flow.wait("first", key=KEY))
        run.append(await flow.run("work", "b", name="b"))
        await flow.sleep("nap", 20)
        run.append(await flow.wait("second", key=KEY))
        await flow.finish(state_json=run)

    def check(self, ended: Any) -> None:
        assert ended.status == "succeeded", ended
        assert ended.state_json == ["a", 1, "b", 2]
        longest = max(self.seen, key=len)
        assert all(run == longest[: len(run)] for run in self.seen), "a run saw something else"


# ---- races ----------------------------------------------------------------------------------------


def test_a_signal_in_the_moment_of_parking_is_taken_once_in_every_order() -> None:
    runs: Counter[tuple[int, int]] = Counter()
    for seed in range(30):
        steps = Steps()

        async def host(runtime: Runtime, steps: Steps = steps) -> tuple[int, int]:
            flows = bound(runtime)
            flow = await make(flows, controller_id="steps")
            await asyncio.sleep(PARK + 0.005 + random_of_the_loop().random() * 0.03)
            assert (await flows.signal(payload=1, key=KEY)).matched == 1
            await flows.signal(payload=2, key=KEY)
            ended = await flows.result(flow.flow_id)
            steps.check(ended)
            told = [event.type for event in await flows.history(flow.flow_id)]
            return told.index("flow.resumed") > told.index("flow.parked"), len(steps.seen)

        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            runs[world.run(host, registry=steps.registry, limits=LIMITS)] += 1

    before = sum(count for (parked_first, _), count in runs.items() if not parked_first)
    assert 2 < before < 28, f"vacuous: always the same order, {runs}"


@pytest.mark.parametrize("call", ["cancel", "request_cancel", "resume", "cancel_task", "finish"])
def test_whatever_is_done_to_a_flow_in_the_moment_of_parking_is_done(call: str) -> None:
    orders: Counter[bool] = Counter()

    async def waits(flow: FlowContext) -> None:
        try:
            await flow.wait("answer", key=KEY)
        except ChildCancelled:
            await flow.finish(state_json="withdrawn")

    def registry() -> Registry:
        return registry_of(it=waits)

    async def host(runtime: Runtime) -> bool:
        flows = bound(runtime)
        flow = await make(flows, controller_id="it")
        await asyncio.sleep(PARK - 0.002 + random_of_the_loop().random() * 0.012)
        given: dict[str, Any] = {"flow_id": flow.flow_id}
        match call:
            case "cancel":
                await flows.cancel(flow.flow_id)
            case "cancel_task":
                [task] = await flows.list_tasks(flow.flow_id)
                await flows.cancel_task(task.task_id)
            case _:
                while True:
                    current = await flows.get(flow.flow_id)
                    assert current is not None
                    report = await getattr(flows, call)(**given, expected_revision=current.revision)
                    if report.applied:
                        break
        await asyncio.sleep(60)
        # The sweep that lets go of flows may be as late as this.
        await asyncio.sleep(1)
        now = await flows.get(flow.flow_id)
        assert now is not None
        told = [event.type for event in await flows.history(flow.flow_id)]
        # A controller that is there to see the intent may end its flow honestly.
        there = "succeeded" if "flow.parked" not in told else "cancelled"
        wanted = {"cancel": "cancelled", "request_cancel": there, "resume": "waiting"}
        assert now.status == wanted.get(call, "succeeded")
        assert runtime.statistics().flows_in_memory == 0
        if call == "resume":
            assert (await flows.signal(payload=1, key=KEY)).matched == 1
            assert (await flows.result(flow.flow_id)).status == "succeeded"
        return "flow.parked" in told

    for seed in range(16):
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            orders[world.run(host, registry=registry, limits=LIMITS)] += 1

    assert call == "resume" or set(orders) == {True, False}, f"vacuous: always the same: {orders}"


# ---- crashes --------------------------------------------------------------------------------------

CRASHES = 40


def test_a_crash_at_any_step_of_waiting_parking_and_waking_changes_nothing_a_controller_sees() -> (
    None
):
    with Simulation() as world:
        world.run(_woken_twice(Steps()), registry=Steps().registry, limits=LIMITS)
        length = world.steps
    crashes, again = 0, 0
    for at in range(10, length, max(1, length // CRASHES)):
        steps = Steps()
        with Simulation(Schedule(seed=at, crashes=(at,))) as world:
            ended = world.run(_woken_twice(steps), registry=steps.registry, limits=LIMITS)
            crashes += world.crashed
        steps.check(ended)
        again += len(steps.seen) > 3
    assert crashes > CRASHES // 2 and again > 5, "vacuous: hardly ever a crash that mattered"


def test_many_crashes_and_every_order_change_nothing_a_controller_sees() -> None:
    crashes = 0
    for seed in range(12):
        steps = Steps()
        chosen = tuple(range(40 + seed * 3, 900, 130))
        with Simulation(Schedule(seed=seed, shuffle=True, crashes=chosen)) as world:
            ended = world.run(_woken_twice(steps), registry=steps.registry, limits=LIMITS)
            crashes += world.crashed
        steps.check(ended)
    assert crashes > 24, "vacuous: hardly ever a crash"


def _woken_twice(steps: Steps) -> Any:
    async def host(runtime: Runtime) -> Any:
        flows = bound(runtime)
        flow = await flows.get("f") or await make(flows, controller_id="steps", flow_id="f")
        assert steps.seen is not None
        await asyncio.sleep(10)
        await flows.signal(payload=1, id="s-1", key=KEY)
        await asyncio.sleep(10)
        await flows.signal(payload=2, id="s-2", key=KEY)
        return await flows.result(flow.flow_id)

    return host


# ---- a disk that fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("moment", ["standing", "parking", "waking", "entering"])
async def test_a_commit_that_fails_while_a_controller_stands_or_leaves_is_made_good(
    clock: Any, moment: str, written: bool
) -> None:
    fault = UNKNOWN if written else NOT_WRITTEN
    store, runs = FaultyStore(), []

    async def it(flow: FlowContext) -> None:
        runs.append(1)
        await flow.finish(state_json=await flow.wait("answer", key=KEY))

    async def pass_time(seconds: int) -> None:
        for _ in range(seconds):
            clock.advance(1)
            await settle()

    async with running(store, registry=registry_of(it=it), clock=clock, limits=LIMITS) as runtime:
        flows = flows_of(runtime)
        if moment == "standing":
            store.hold()
            making = asyncio.create_task(new_flow(flows, "it"))
            for _ in range(2):  # created, entered
                await soon(store.wait_held())
                store.release()
                store.hold()
                await settle()
            store.fail_commits(fault, written=written)
            store.release()
            flow_id = await making
        else:
            flow_id = await new_flow(flows, "it")
        await settle()
        if moment == "parking":
            store.fail_commits(fault, written=written)
        await pass_time(20)
        assert store.attempts > 3
        assert (await flows.get(flow_id)).status == "waiting"  # type: ignore[union-attr]
        if moment == "waking":
            store.fail_commits(fault, written=written)
        if moment == "entering":
            store.hold()
            sending = asyncio.create_task(flows.signal(payload=1, id="s-1", key=KEY))
            await soon(store.wait_held())
            store.release()
            store.hold()
            await soon(store.wait_held())
            store.fail_commits(fault, written=written)
            store.release()
            await soon(sending)
        await pass_time(3)
        for _ in range(3):
            try:
                await soon(flows.signal(payload=1, id="s-1", key=KEY))
            except type(fault):
                continue
        await pass_time(20)

        assert (await soon(flows.result(flow_id))).state_json == 1
        assert [e.type for e in await flows.history(flow_id)].count("flow.succeeded") == 1


# ---- closing --------------------------------------------------------------------------------------


def test_closing_in_the_moment_of_parking_leaves_a_flow_that_waits_on() -> None:
    orders: Counter[bool] = Counter()
    for seed in range(16):
        steps = Steps()
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:

            async def host(runtime: Runtime) -> bool:
                flows = bound(runtime)
                flow = await make(flows, controller_id="steps", flow_id="f")
                await asyncio.sleep(PARK + random_of_the_loop().random() * 0.03)
                told = [event.type for event in await flows.history(flow.flow_id)]
                return "flow.parked" in told

            orders[world.run(host, registry=steps.registry, limits=LIMITS)] += 1
            ended = world.run(_woken_twice(steps), registry=steps.registry, limits=LIMITS)
        steps.check(ended)

    assert set(orders) == {True, False}, f"vacuous: always the same: {orders}"
