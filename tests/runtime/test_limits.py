"""Limits: how many children run at once, of a step, a flow, a task, a runtime; and what waiting costs."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from flowstead import FlowContext, Limits, Nested, Registry, Runtime, TaskContext
from flowstead.testing import Simulation
from tests.faulty_store import holds_nothing
from tests.runtime.support import Lives, bound, make


class Probe:
    """Children that count, from the inside, how many of them run at once: of each kind, and in all."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.begun: list[tuple[str, str | None]] = []

    async def work(self, context: TaskContext, seconds: Any) -> None:
        await self._during("work", context, seconds)

    async def other(self, context: TaskContext, seconds: Any) -> None:
        await self._during("other", context, seconds)

    async def _during(self, kind: str, context: TaskContext, seconds: Any) -> None:
        self.begun.append((context.flow_id, context.run_id))
        kinds = (kind, context.flow_id, "all")
        self.running.update(kinds)
        for name in kinds:
            self.most[name] = max(self.most[name], self.running[name])
        try:
            await asyncio.sleep(1.0 if seconds is None else seconds)
        finally:
            self.running.subtract(kinds)


@pytest.fixture
def probe() -> Probe:
    return Probe()


async def _fan_out(flow: FlowContext) -> None:
    """`state_json` says what to run, how many of them, and the limit."""
    assert isinstance(flow.state_json, dict)
    given = flow.state_json
    inputs = [given.get("seconds")] * given["count"]
    await flow.map(given["run"], inputs, name="s", limit=given.get("limit"))


def _run_all(lives: Lives, *states: dict[str, Any]) -> float:
    """The seconds it takes flows of these to end, all begun at once."""

    async def all_of_them() -> None:
        made = [
            await make(lives.flows, controller_id="fan out", state_json=state) for state in states
        ]
        for flow in made:
            ended = await lives.flows.result(flow.flow_id)
            assert ended.status == "succeeded", ended.failure

    lives.registry.controllers.setdefault("fan out", _fan_out)
    began = lives.now()
    lives.play(all_of_them())
    assert holds_nothing(lives.runtime)
    return (lives.now() - began) / 1000


# ---- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "limit", "least", "most"),
    [(100, 10, 10, 11), (10, 10, 1, 1.2), (10, None, 2, 2.2), (7, 1, 7, 7.5)],
)
def test_children_of_a_second_take_as_long_as_their_limit_makes_them(
    lives: Lives, probe: Probe, count: int, limit: int | None, least: float, most: float
) -> None:
    lives.registry.task(name="work")(probe.work)

    took = _run_all(lives, {"run": "work", "count": count, "limit": limit})

    assert least <= took <= most
    assert probe.most["all"] == min(count, limit or Limits().running_children)
    assert len(probe.begun) == count


# ---- of a task ------------------------------------------------------------------------------------


def test_a_task_s_own_limit_holds_over_all_flows(lives: Lives, probe: Probe) -> None:
    lives.registry.task(name="work", concurrency=3)(probe.work)
    lives.registry.task(name="other")(probe.other)

    took = _run_all(
        lives,
        *[{"run": "work", "count": 4}] * 3,
        {"run": "other", "count": 8, "seconds": 0.5},
    )

    assert probe.most["work"] == 3, "vacuous, or too many at once"
    assert probe.most["other"] == 8, "children of other tasks had to wait as well"
    assert 4 <= took <= 4.3


def test_a_task_s_limit_holds_for_children_added_by_hand_and_detached_ones(
    lives: Lives, probe: Probe
) -> None:
    lives.registry.task(name="work", concurrency=2)(probe.work)

    async def add() -> None:
        flow = await make(lives.flows)
        for _ in range(3):
            await lives.flows.run_task(flow_id=flow.flow_id, task="t", run="work")
            await lives.flows.run_task(flow_id=flow.flow_id, task="t", run=probe.work)
            await lives.flows.spawn_detached(task="t", run=probe.work)
        await asyncio.sleep(6)

    assert lives.runtime
    lives.play(add())

    assert (len(probe.begun), probe.most["work"]) == (9, 2)


@pytest.mark.parametrize("how", ["kill", "close"])
def test_limits_hold_in_the_next_process_too(lives: Lives, probe: Probe, how: str) -> None:
    lives.limits = Limits(running_in_all=5)
    lives.registry.task(name="work", concurrency=3)(probe.work)
    lives.registry.task(name="other")(probe.other)
    lives.registry.controller("fan out")(_fan_out)
    states = [{"run": "work", "count": 6}] * 2 + [{"run": "other", "count": 6}] * 2
    flows = [
        lives.play(make(lives.flows, controller_id="fan out", state_json=state)) for state in states
    ]
    lives.pass_time(1.5)

    for _ in range(2):
        lives.restart(how)
        probe.running.clear()
        lives.pass_time(0.5)

    for flow in flows:
        assert lives.result(flow.flow_id).status == "succeeded"
    assert (probe.most["work"], probe.most["all"]) == (3, 5)


# ---- in all ---------------------------------------------------------------------------------------


def test_no_more_than_the_runtime_s_limit_run_in_all(lives: Lives, probe: Probe) -> None:
    lives.limits = Limits(running_in_all=4)
    lives.registry.task(name="work")(probe.work)
    lives.registry.task(name="other", concurrency=2)(probe.other)

    took = _run_all(lives, *[{"run": "work", "count": 4}] * 3, {"run": "other", "count": 4})

    assert (probe.most["all"], probe.most["other"]) == (4, 2)
    assert 4 <= took <= 5.3


def test_flows_take_turns_where_slots_are_few(lives: Lives, probe: Probe) -> None:
    lives.limits = Limits(running_in_all=1)
    lives.registry.task(name="work")(probe.work)

    _run_all(lives, *[{"run": "work", "count": 3}] * 3)

    # Whoever comes first starts at once, and then stands in line before the others do.
    first, *turns = [flow_id for flow_id, _ in probe.begun]
    assert turns[0] == first
    assert [len(set(turns[at : at + 3])) for at in (0, 3)] == [3, 3]
    assert {*turns[6:]} == {*turns} - {first}


def test_children_of_one_flow_start_in_the_order_in_which_they_were_added(
    lives: Lives, probe: Probe
) -> None:
    lives.limits = Limits(running_in_all=2)
    lives.registry.task(name="work")(probe.work)

    _run_all(lives, {"run": "work", "count": 9})

    assert [name for _, name in probe.begun] == [f"s[{number}]" for number in range(9)]


def test_a_step_s_limit_holds_beside_the_flow_s(lives: Lives, probe: Probe) -> None:
    lives.limits = Limits(running_children=4)
    lives.registry.task(name="work")(probe.work)
    lives.registry.task(name="other")(probe.other)

    @lives.registry.controller("two steps")
    async def two_steps(flow: FlowContext) -> None:
        await asyncio.gather(
            flow.map("work", [None] * 6, limit=2), flow.map("other", [None] * 6, limit=3)
        )

    flow = lives.play(make(lives.flows, controller_id="two steps"))

    assert lives.result(flow.flow_id).status == "succeeded"
    assert (probe.most["work"], probe.most["other"], probe.most["all"]) == (2, 3, 5)


def test_a_slot_comes_free_however_a_child_ends(lives: Lives, probe: Probe) -> None:
    lives.limits = Limits(running_in_all=1, kill_after=1, abandon_after=1)
    lives.registry.task(name="work")(probe.work)
    release: list[bool] = []

    async def raises(_: TaskContext, __: Any) -> None:
        raise ValueError

    async def forever(_: TaskContext, __: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async def stubborn(_: TaskContext, __: Any) -> None:
        while not release:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue

    async def one_after_the_other() -> None:
        flow = await make(lives.flows)
        cases: list[tuple[Any, dict[str, Any]]] = [
            (raises, {}),
            (forever, {"timeout": 1}),
            (forever, {"idle_timeout": 1}),
            (forever, {}),
            (stubborn, {}),
        ]
        for run, given in cases:
            child = (
                await lives.flows.run_task(flow_id=flow.flow_id, task="t", run=run, **given)
            ).unwrap()
            if not given and run is not raises:
                await asyncio.sleep(0.5)
                await lives.flows.cancel_task(child.task_id)
            await lives.flows.wait_task(child.task_id)
        last = await lives.flows.run_task(flow_id=flow.flow_id, task="t", run="work")
        await lives.flows.wait_task(last.unwrap().task_id)
        release.append(True)
        await asyncio.sleep(2)

    assert lives.runtime
    lives.play(one_after_the_other())

    assert len(probe.begun) == 1
    assert lives.face(lambda runtime: runtime.statistics()).running_children == 0


# ---- nested ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("running_in_all", [1, 2])
def test_nested_orchestrators_finish_with_a_single_slot_and_a_limit_of_one(
    lives: Lives, probe: Probe, running_in_all: int
) -> None:
    lives.limits = Limits(running_in_all=running_in_all, running_children=1)
    lives.registry.task(name="work", concurrency=1)(probe.work)
    lives.registry.task(name="other")(probe.other)

    @lives.registry.controller("level")
    async def level(flow: FlowContext) -> None:
        assert isinstance(flow.state_json, int)
        below = flow.state_json - 1
        await flow.run("work", name="before")
        if below >= 0:
            await flow.map(Nested("level"), [below, below], limit=1)
        await flow.run("other", name="after")
        await flow.finish(state_json="done")

    flow = lives.play(make(lives.flows, controller_id="level", state_json=3))

    ended = lives.result(flow.flow_id)

    assert (ended.status, ended.state_json) == ("succeeded", "done")
    assert len(probe.begun) == 2 * (1 + 2 + 4 + 8)
    assert (probe.most["all"], probe.most["work"]) == (1, 1)


def test_only_a_flow_s_own_limit_counts_the_children_that_wait_for_a_nested_flow(
    lives: Lives, probe: Probe
) -> None:
    lives.limits = Limits(running_in_all=1)
    lives.registry.task(name="work")(probe.work)
    lives.registry.controller("leaf")(_leaf)
    alive: list[int] = []

    @lives.registry.controller("root")
    async def root(flow: FlowContext) -> None:
        await flow.map(Nested("leaf"), [None] * 6, limit=3)

    async def look() -> None:
        flow = await make(lives.flows, controller_id="root")
        end = asyncio.ensure_future(lives.flows.result(flow.flow_id))
        while not end.done():
            alive.append(len(await lives.flows.list_tasks(flow.flow_id, status="running")))
            await asyncio.sleep(0.1)

    assert lives.runtime
    lives.play(look())

    assert max(alive) == 3
    assert probe.most["all"] == 1


async def _leaf(flow: FlowContext) -> None:
    await flow.run("work")


# ---- what waiting costs ---------------------------------------------------------------------------


def test_ten_thousand_children_in_line_are_rows_and_no_tasks_and_no_timers() -> None:
    probe, registry = Probe(), Registry()
    registry.task(name="work")(probe.work)
    seen: list[tuple[int, int, int]] = []

    @registry.controller("crowd")
    async def crowd(flow: FlowContext) -> None:
        await flow.map("work", [3600] * 10_000, limit=5)

    async def host(runtime: Runtime) -> None:
        loop: Any = asyncio.get_running_loop()
        flows = bound(runtime)
        tasks, timers = len(asyncio.all_tasks()), len(loop._scheduled)
        flow = await make(flows, controller_id="crowd")
        await asyncio.sleep(600)
        summary = await flows.get_task_summary(flow.flow_id)
        assert summary is not None and summary.total == 10_000
        running = runtime.statistics().running_children
        seen.append((len(asyncio.all_tasks()) - tasks, len(loop._scheduled) - timers, running))
        assert summary.by_status["queued"] == 10_000 - 5
        report = await flows.cancel(flow.flow_id)
        assert report.cancelled and len(report.tasks) == 10_000
        assert holds_nothing(runtime)

    with Simulation() as world:
        world.run(host, registry=registry)

    [(more_tasks, more_timers, running)] = seen
    assert running == 5
    assert more_tasks < 50, "children in line have tasks"
    assert more_timers < 50, "children in line have timers"
    assert len(probe.begun) == 5
