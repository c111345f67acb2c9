"""A few calls at every distance from each other: for bugs that need one exact moment, which chance seldom hits."""

from __future__ import annotations

import anyio
import pytest

from flowstead import OutcomeUnknown, Registry, Retry, Runtime, Succeeded, TaskContext
from flowstead.model.flow import Json
from flowstead.testing import CALM, Faults, Schedule, Simulation

STEPS = 24
TURNS = 16
SEEDS = 12
DELAY = 0.01
LONG = 60.0


def flows_of(runtime: Runtime):
    return runtime.tasks.flow.bind_session(session_key="agent:a")


async def let_others_run(steps: int) -> None:
    for _ in range(steps):
        await anyio.lowlevel.checkpoint()


def slow_world(seed: int) -> Simulation:
    """A world whose disk takes its time, another for each read and write."""
    return Simulation(Schedule(seed=seed, faults=Faults(delay=DELAY)))


@pytest.mark.parametrize("turn", range(TURNS))
def test_whoever_waits_for_the_end_of_a_flow_is_told_whenever_it_comes(turn: int) -> None:
    async def host(runtime: Runtime) -> list[str]:
        flows, told = flows_of(runtime), []
        flow = await flows.create_managed(controller_id="shop/triage", goal="end")

        async def wait() -> None:
            await anyio.sleep(turn * DELAY / 4)
            told.append((await flows.result(flow.flow_id)).status)

        with anyio.move_on_after(LONG):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await flows.finish(flow_id=flow.flow_id, expected_revision=0)
        return told

    for seed in range(SEEDS):
        with slow_world(seed) as world:
            assert world.run(host) == ["succeeded"], f"seed {seed}"


@pytest.mark.parametrize("turn", range(TURNS))
def test_whoever_waits_for_the_end_of_a_child_is_told_whenever_it_comes(turn: int) -> None:
    async def host(runtime: Runtime) -> list[object]:
        flows, told = flows_of(runtime), []
        flow = await flows.create_managed(controller_id="shop/triage", goal="end")
        made = await flows.run_task(flow_id=flow.flow_id, task="elsewhere", runtime="cli")

        async def wait() -> None:
            await anyio.sleep(turn * DELAY / 4)
            told.append(await flows.wait_task(made.task.task_id))

        with anyio.move_on_after(LONG):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await flows.complete_task(made.task.task_id)
        return told

    for seed in range(SEEDS):
        with slow_world(seed) as world:
            assert world.run(host) == [Succeeded()], f"seed {seed}"


def test_whoever_waits_for_ends_is_told_of_those_whose_commit_was_in_doubt() -> None:
    async def host(runtime: Runtime) -> list[object]:
        flows, told = flows_of(runtime), []
        flow = await flows.create_managed(controller_id="shop/triage", goal="end")
        made = await flows.run_task(flow_id=flow.flow_id, task="elsewhere", runtime="cli")

        async def wait_for_both() -> None:
            told.append(await flows.wait_task(made.task.task_id))
            told.append((await flows.result(flow.flow_id)).status)

        async def end_both() -> None:
            world.disk.faults = Faults(fail_after=1.0)
            with pytest.raises(OutcomeUnknown):
                await flows.complete_task(made.task.task_id)
            await let_others_run(STEPS)
            ended = await flows.finish(flow_id=flow.flow_id, expected_revision=0)
            assert ended.code == "outcome_unknown"
            world.disk.faults = CALM

        with anyio.move_on_after(LONG):
            async with anyio.create_task_group() as group:
                group.start_soon(wait_for_both)
                await let_others_run(STEPS)
                await end_both()
        return told

    with Simulation(1) as world:
        assert world.run(host) == [Succeeded(), "succeeded"]
        assert world.disk.fired["fail_after"] == 2


def test_the_late_report_of_an_earlier_attempt_is_not_taken_for_the_present_ones_end() -> None:
    registry = Registry()

    @registry.task(name="flaky", retry=Retry(max_attempts=2, initial=0.3, jitter=0.0))
    async def flaky(context: TaskContext, given: Json) -> Json:
        if context.attempt == 1:
            # Its end is on disk, but nobody knows: it will be reported again, and the retry is due before.
            world.disk.faults = Faults(fail_after=1.0)
            raise ValueError("the first time")
        await anyio.sleep(5.0)
        return context.attempt

    async def host(runtime: Runtime) -> object:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="retry")
        made = await flows.run_task(flow_id=flow.flow_id, task="try", run="flaky")
        await anyio.sleep(0.2)
        world.disk.faults = CALM
        return await flows.wait_task(made.task.task_id)

    with Simulation(1) as world:
        assert world.run(host, registry=registry) == Succeeded(2)
        assert world.disk.fired["fail_after"] == 1


def test_a_child_whose_start_was_in_doubt_is_run_although_nobody_calls() -> None:
    registry, ran = Registry(), []

    @registry.task(name="work")
    async def work(context: TaskContext, given: Json) -> None:
        ran.append(context.task_id)

    async def host(runtime: Runtime) -> list[str]:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="start")
        world.disk.faults = Faults(fail_after=1.0)
        made = await flows.run_task(flow_id=flow.flow_id, task="do it", run="work")
        assert made.code == "outcome_unknown"
        world.disk.faults = CALM
        await anyio.sleep(LONG)
        return [task.status for task in await flows.list_tasks(flow.flow_id)]

    with Simulation(1) as world:
        assert world.run(host, registry=registry) == ["succeeded"]
        assert world.disk.fired["fail_after"] == 1
        assert len(ran) == 1


def test_a_child_that_could_not_be_added_can_be_added_again() -> None:
    async def host(runtime: Runtime) -> list[bool]:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="add")
        child = {"flow_id": flow.flow_id, "task": "do it", "runtime": "cli", "run_id": "r1"}
        world.disk.faults = Faults(fail_before=1.0)
        refused = await flows.run_task(**child)
        assert refused.code == "persist_failed"
        world.disk.faults = CALM
        made = await flows.run_task(**child)
        assert made.created
        return [task.task_id == made.task.task_id for task in await flows.list_tasks(flow.flow_id)]

    with Simulation(1) as world:
        assert world.run(host) == [True]
        assert world.disk.fired["fail_before"] == 1
