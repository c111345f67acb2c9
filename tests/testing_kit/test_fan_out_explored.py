"""Fan-outs explored: a crash before every step, and seeds that shuffle, slow down, fail and cut the power.

What a flow wrote down of its children is held against the children's own records.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

from flowstead import Flow, FlowContext, Registry, Retry, Runtime, Task, TaskContext
from flowstead.testing import Exploration, Simulation, explore

SEEDS: Final = 1000 if os.environ.get("FLOWSTEAD_EXPLORE") == "long" else 40


class World:
    """The outside world of one flow: how often each child's work was begun, and when it was done."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.told: list[Any] = []
        """What the controller was told, once for every time it got that far."""

    def registry(self, controller: Callable[[World, FlowContext], Awaitable[Any]]) -> Registry:
        registry = Registry()

        @registry.task(retry=Retry(max_attempts=2, initial=0.1, jitter=0))
        async def work(ctx: TaskContext, given: dict[str, Any]) -> Any:
            self.begun[ctx.run_id or ""] += 1
            await asyncio.sleep(given["seconds"])
            if given.get("fails"):
                raise ValueError(ctx.run_id)
            return ctx.run_id

        @registry.controller("c")
        async def drive(flow: FlowContext) -> None:
            told = await controller(self, flow)
            self.told.append(told)
            await flow.update(state_json=told)

        return registry


async def start(flow: FlowContext, name: str, seconds: float, **given: Any) -> Any:
    return await flow.start("work", {"seconds": seconds, **given}, name=name)


Children = dict[str | None, Task]


def play(
    sim: Simulation, controller: Callable[[World, FlowContext], Awaitable[Any]]
) -> tuple[World, Flow, Children, list[str | None]]:
    """Play one flow to its end; answer its world, itself, its children, and whose end came in which order."""
    world = World()

    async def host(runtime: Runtime) -> tuple[Flow, Children, list[str | None]]:
        flows = runtime.tasks.flow.bind_session(session_key="me")
        made = await flows.create_managed(controller_id="c", goal="play", idempotency_key="one")
        flow = await flows.result(made.flow_id)
        for task in await flows.list_tasks(flow.flow_id):
            await flows.wait_task(task.task_id)
        tasks = {task.task_id: task for task in await flows.list_tasks(flow.flow_id)}
        events = await flows.history(flow.flow_id)
        ends = [tasks[e.task_id].run_id for e in events if e.type == "task.ended" and e.task_id]
        return flow, {task.run_id: task for task in tasks.values()}, ends

    flow, children, ends = sim.run(host, registry=world.registry(controller))
    assert flow.status == "succeeded", flow.failure
    assert len(ends) == len(set(ends)) == len(children), "a child has not ended exactly once"
    # However often it was run, the controller was told the same.
    assert world.told, "vacuous: the controller told nothing"
    assert all(told == flow.state_json for told in world.told), world.told
    return world, flow, children, ends


# ---- the scenarios --------------------------------------------------------------------------------

Scenario = Callable[[Simulation], None]
SCENARIOS: list[Scenario] = []


def scenario(play: Scenario) -> Scenario:
    SCENARIOS.append(play)
    return play


async def racing(world: World, flow: FlowContext) -> Any:
    steps = [
        await start(flow, "broken", 0.0, fails=True),
        await start(flow, "slow", 500.0),
        await start(flow, "quick", 0.1),
        await start(flow, "close", 0.1),
    ]
    [winner] = await flow.first(steps)
    return [winner.name, await winner.result()]


@scenario
def a_race_has_one_winner_however_often_it_is_run(sim: Simulation) -> None:
    _, flow, children, ends = play(sim, racing)

    name, result = flow.state_json
    succeeded = [run_id for run_id in ends if children[run_id].status == "succeeded"]
    assert name == result == succeeded[0]
    assert children[name].result_json == result
    assert children["slow"].status == "cancelled"
    assert children["broken"].status in ("failed", "cancelled")


async def first_two(world: World, flow: FlowContext) -> Any:
    steps = [
        await start(flow, "a", 0.1),
        await start(flow, "broken", 0.0, fails=True),
        await start(flow, "b", 0.1),
        await start(flow, "never", 500.0),
    ]
    winners = await flow.first(steps, count=2)
    return await flow.gather(*winners)


@scenario
def the_first_two_are_the_first_two_on_record(sim: Simulation) -> None:
    _, flow, children, ends = play(sim, first_two)

    succeeded = [run_id for run_id in ends if children[run_id].status == "succeeded"]
    assert flow.state_json == succeeded[:2]
    assert children["never"].status == "cancelled"


async def in_order(world: World, flow: FlowContext) -> Any:
    async def bare(ctx: TaskContext, given: float) -> None:
        await asyncio.sleep(given)

    steps = [
        await start(flow, "a", 0.1),
        await flow.start(bare, 0.1, name="b"),
        await start(flow, "c", 0.0),
        await start(flow, "d", 0.1),
    ]
    await steps[-1].result()  # others have ended before it
    told: list[str] = []
    async for step in flow.as_completed(steps):
        told.append(step.name)
        await flow.update(state_json=told)
    return told


@scenario
def the_order_written_to_the_state_is_that_of_the_history(sim: Simulation) -> None:
    _, flow, children, ends = play(sim, in_order)

    assert flow.state_json == ends
    assert {task.status.value for task in children.values()} == {"succeeded"}


async def falling_back(world: World, flow: FlowContext) -> Any:
    async def second(ctx: TaskContext, given: dict[str, Any]) -> Any:
        world.begun[ctx.run_id or ""] += 1
        raise ValueError(ctx.run_id)

    async def third(ctx: TaskContext, given: dict[str, Any]) -> Any:
        world.begun[ctx.run_id or ""] += 1
        return ctx.run_id

    beside = await start(flow, "beside", 0.3)
    given = {"seconds": 0.05, "fails": True}
    edited = await flow.run("work", given, name="edit", fallback=[second, third])
    return [edited, *await flow.gather(beside)]


@scenario
def a_chain_of_fallbacks_is_gone_through_in_order_beside_a_started_step(sim: Simulation) -> None:
    world, flow, children, ends = play(sim, falling_back)

    assert flow.state_json == ["edit/fallback-2", "beside"]
    chain = [run_id for run_id in ends if run_id != "beside"]
    assert chain == ["edit", "edit/fallback-1", "edit/fallback-2"]
    statuses = [children[run_id].status.value for run_id in chain]
    assert statuses == ["failed", "failed", "succeeded"]
    # A crash may begin an attempt again, never one that is on record.
    assert all(world.begun[name or ""] >= 1 for name in ends)
    assert world.begun.total() <= 2 + 2 + 1 + 2 * (sim.crashed + sim.disk.fired.total())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_what_a_fan_out_tells_is_what_its_children_s_records_say(scenario: Scenario) -> None:
    gone: Exploration = explore(scenario, seeds=SEEDS)

    assert gone.crashes > gone.steps_crashed_at, "vacuous: it died too seldom"
