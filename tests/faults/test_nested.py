"""Flows in flows that wait for one another, stop one another, or are stopped from everywhere at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from flowstead import (
    Cancelled,
    FlowContext,
    Limits,
    Nested,
    Registry,
    SessionFlows,
    TaskContext,
)
from tests.faults.support import STORM, types_of
from tests.faulty_store import flows_of, holds_nothing, new_flow, running, settle, soon, turns
from tests.invariants import check_all

LONG = 120.0
DEPTH = 5


async def flows_below(flows: SessionFlows, flow_id: str) -> list[str]:
    """A flow and all flows nested in it, parents first."""
    found, unseen = [], [flow_id]
    while unseen:
        found.append(here := unseen.pop(0))
        tasks = await flows.list_tasks(here)
        unseen += [task.child_flow_id for task in tasks if task.child_flow_id is not None]
    return found


# ---- waiting for one another -----------------------------------------------------------------------


async def test_nested_orchestrators_where_only_one_child_may_run_finish_and_never_run_two(db: Path):
    registry, at_once = Registry(), list[int]()
    running_now = 0

    @registry.task(concurrency=1)
    async def works(ctx: TaskContext, given: int) -> int:
        nonlocal running_now
        running_now += 1
        at_once.append(running_now)
        await asyncio.sleep(0)
        running_now -= 1
        return given

    @registry.controller("orchestrates")
    async def orchestrates(flow: FlowContext) -> None:
        depth = flow.state_json
        total = await flow.run("works", 1, name="before")
        if depth > 1:
            below = [await flow.start(Nested("orchestrates"), depth - 1, name=f"{n}") for n in "ab"]
            total += sum(await flow.gather(*below))
        total += sum(await flow.map("works", [1, 1], name="after", limit=1))
        await flow.finish(state_json=total)

    limits = Limits(running_in_all=1, running_children=1)
    async with running(db, registry=registry, limits=limits, durability="normal") as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "orchestrates", state_json=DEPTH)

        ended = await soon(flows.result(flow_id), LONG)

        assert (ended.status, ended.state_json) == ("succeeded", 3 * (2**DEPTH - 1))
        assert len(at_once) == ended.state_json
        assert set(at_once) == {1}
        await settle()
        assert holds_nothing(runtime)
    check_all(db)


async def test_a_nested_child_that_waits_for_the_outermost_flows_end_is_freed_by_a_cancel():
    registry, began = Registry(), asyncio.Event()
    outermost = ""

    @registry.task
    async def waits(ctx: TaskContext, given: object) -> None:
        began.set()
        await flows.result(outermost)

    @registry.controller("nests")
    async def nests(flow: FlowContext) -> None:
        depth = flow.state_json
        await flow.run(Nested("nests") if depth else "waits", depth - 1, name="below")

    async with running(registry=registry) as runtime:
        flows = flows_of(runtime)
        outermost = await new_flow(flows, "nests", state_json=DEPTH)
        await soon(began.wait())

        report = await soon(flows.cancel(outermost))

        assert report.cancelled
        assert len(report.descendants) == DEPTH + 1
        assert {line.status for line in report.descendants} == {"cancelled"}
        await settle()
        assert holds_nothing(runtime)


# ---- stopping one another --------------------------------------------------------------------------

Cancel = Callable[[SessionFlows, TaskContext, list[str]], Awaitable[Any]]
FROM_BELOW: dict[str, Cancel] = {
    "the outermost flow": lambda flows, ctx, chain: flows.cancel(chain[0]),
    "the flow above": lambda flows, ctx, chain: flows.cancel(chain[-2]),
    "its own flow": lambda flows, ctx, chain: flows.cancel(ctx.flow_id),
    "every flow there is at once": lambda flows, ctx, chain: asyncio.gather(
        *map(flows.cancel, chain)
    ),
}


@pytest.mark.parametrize("whom", FROM_BELOW)
async def test_a_child_deep_below_that_cancels_a_flow_above_it_is_no_deadlock_and_all_ends_once(
    db: Path, whom: str
):
    registry, began = Registry(), list[list[str]]()

    @registry.task
    async def cancels(ctx: TaskContext, given: object) -> None:
        began.append(chain := await flows_below(flows, outermost))
        await FROM_BELOW[whom](flows, ctx, chain)
        await asyncio.Event().wait()

    @registry.controller("nests")
    async def nests(flow: FlowContext) -> None:
        depth = flow.state_json
        await flow.run(Nested("nests") if depth else "cancels", depth - 1, name="below")

    async with running(db, registry=registry, durability="normal") as runtime:
        flows = flows_of(runtime)
        outermost = await new_flow(flows, "nests", state_json=DEPTH)

        ended = await soon(flows.result(outermost))

        assert len(began) == 1, "vacuous: nobody cancelled anything"
        # Whoever is above a cancelled flow has lost a step; its own controller does not catch that.
        wanted = "cancelled" if "flow above" not in whom and "own" not in whom else "failed"
        assert ended.status == wanted
        for flow_id in began[0]:
            types = Counter(await types_of(flows, flow_id))
            assert types["flow.cancelled"] + types["flow.failed"] == 1
            assert types["flow.cancel_requested"] <= 1
            assert types["task.ended"] == 1
        await settle()
        assert holds_nothing(runtime)
    check_all(db)


ROUNDS = 16


@pytest.mark.parametrize("rival", ["completes", "is cancelled below"])
async def test_of_a_nested_end_and_a_cancel_from_above_at_the_same_moment_each_flow_ends_once(
    rival: str,
):
    registry, gates, ends = Registry(), dict[str, asyncio.Event](), Counter[str]()

    @registry.task
    async def stands(ctx: TaskContext, given: str) -> str:
        await gates[given].wait()
        return given

    @registry.controller("inner")
    async def inner(flow: FlowContext) -> None:
        await flow.finish(state_json=await flow.run("stands", flow.state_json, name="stands"))

    @registry.controller("outer")
    async def outer(flow: FlowContext) -> None:
        await flow.finish(state_json=await flow.run(Nested("inner"), flow.state_json, name="inner"))

    async with running(registry=registry) as runtime:
        flows = flows_of(runtime)
        for lead in range(-ROUNDS, 3 * ROUNDS):
            name = f"round {lead}"
            gates[name] = asyncio.Event()
            above = await new_flow(flows, "outer", state_json=name)
            await settle_until(flows, above, 2)
            [_, below] = await flows_below(flows, above)

            async def end(name: str = name, below: str = below) -> None:
                if rival == "completes":
                    gates[name].set()
                else:
                    await flows.cancel(below)

            if lead >= 0:
                ending = asyncio.create_task(end())
                await turns(lead)
            cancelling = asyncio.create_task(flows.cancel(above))
            if lead < 0:
                await turns(-lead)
                ending = asyncio.create_task(end())
            report = await soon(cancelling)
            await soon(ending)
            inside, outside = await soon(flows.result(below)), await soon(flows.result(above))

            [task] = await flows.list_tasks(above)
            assert report.cancelled == (outside.status == "cancelled")
            if task.status == "succeeded":
                assert (inside.status, task.result_json) == ("succeeded", name)
            else:
                assert isinstance(await soon(flows.wait_task(task.task_id)), Cancelled)
                assert inside.status == "cancelled"
            for flow_id in (above, below):
                types = Counter(await types_of(flows, flow_id))
                assert types["task.ended"] == 1
                assert types["flow.cancelled"] + types["flow.succeeded"] + types["flow.failed"] == 1
            ends[f"{outside.status} over {inside.status}"] += 1
        await settle()
        assert holds_nothing(runtime)
    assert len(ends) > 1, f"vacuous: always the same: {ends}"


async def settle_until(flows: SessionFlows, flow_id: str, depth: int) -> None:
    """Wait until a flow has so many flows, and the innermost its child."""
    for _ in range(1000):
        found = await flows_below(flows, flow_id)
        if len(found) == depth and await flows.list_tasks(found[-1]):
            return
        await turns(10)
    raise AssertionError("vacuous: nothing was nested")


# ---- a storm ---------------------------------------------------------------------------------------


async def test_a_storm_of_cancels_over_nested_flows_stops_everybody_and_ends_every_flow_once(
    db: Path,
):
    count = max(5, STORM // 80)
    registry, stopped, standing = Registry(), list[str](), asyncio.Event()
    begun = 0

    @registry.task
    async def stands(ctx: TaskContext, given: object) -> None:
        nonlocal begun
        begun += 1
        if begun == count * 4:
            standing.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(ctx.task_id)
            raise

    @registry.controller("nests")
    async def nests(flow: FlowContext) -> None:
        depth = flow.state_json
        steps = [await flow.start(Nested("nests"), depth - 1, name=n) for n in "ab" if depth]
        await flow.gather(*steps, *([] if depth else [await flow.start("stands", name="stands")]))

    limits = Limits(mailbox=10_000)
    async with running(db, registry=registry, limits=limits, durability="normal") as runtime:
        flows = flows_of(runtime)
        roots = [await new_flow(flows, "nests", state_json=2) for _ in range(count)]
        await soon(standing.wait(), LONG)
        everywhere = [await flows_below(flows, root) for root in roots]
        assert {len(found) for found in everywhere} == {7}, "vacuous: nothing was nested"

        # Every root ten times, and every second flow in the middle as well.
        calls = [flows.cancel(root, grace=LONG) for root in roots for _ in range(10)]
        calls += [flows.cancel(found[1], grace=LONG) for found in everywhere[::2]]
        reports = await soon(asyncio.gather(*calls), LONG)

        for report in reports:
            assert report.cancelled or report.code == "terminal"
        assert len(set(stopped)) == len(stopped) == count * 4
        for flow_id in [flow_id for found in everywhere for flow_id in found]:
            types = Counter(await types_of(flows, flow_id))
            assert types["flow.cancelled"] == types["flow.cancel_requested"] == 1
        for root in roots:
            flow = await flows.get(root)
            assert flow
            assert flow.status == "cancelled"
        await settle()
        assert holds_nothing(runtime)
    check_all(db)
