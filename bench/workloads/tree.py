"""W9: a thousand children that wait, cancelled at once: how long until their code has ended, and until all is told.

Once in a single flow, once in a tree of flows nested five levels deep, cancelled at its root. *Quiet* is the time
from the call of `cancel` to the end of each child's code, *report* until the call is answered: every end on disk.
The ceiling is an anyio task group of as many tasks that wait; there is nothing to record, so it has no report.
"""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from typing import Any, Final

import anyio

from bench.measure import Pass, Row, Setup, Stopwatch, quantiles, take
from bench.sample import GOAL, OWNER
from flowstead import FlowContext, Limits, Nested, Registry, TaskContext, open_runtime

_LEVELS: Final = 5
_BRANCHES: Final = 2
_MOST_P99: Final = 0.050
_NODE: Final = "node"

Plan = dict[str, Any]


def run(setup: Setup) -> list[Row]:
    """One flow, then the tree, each beside the task group."""
    count = setup.size(1_000, 100)
    return [
        *_cancelled(setup, f"W9 {count:,} children of one flow", _flat(count), _MOST_P99),
        *_cancelled(setup, f"W9 tree of {count:,}, {_LEVELS} levels", _tree(count), None),
    ]


def _cancelled(setup: Setup, name: str, plan: Plan, most: float | None) -> list[Row]:
    leaves, count = _leaves(plan), _children(plan)
    reports = list[float]()

    async def ours(path: Path) -> Pass:
        wood = Wood()
        limits = Limits(running_children=count)
        options: Any = {"registry": wood.registry, "durability": setup.durability}
        async with open_runtime(path, limits=limits, **options) as runtime:
            flows = runtime.task_flow.bind_session(session_key=OWNER)
            flow = await flows.create_managed(controller_id=_NODE, goal=GOAL, state_json=plan)
            await wood.grown(leaves)
            watch = wood.watch = Stopwatch()
            report = await flows.cancel(flow.flow_id, grace=60.0)
            reports.append(watch.seconds)
            assert report.cancelled, report
            assert len(report.descendants) == count
        assert len(wood.quiet) == leaves
        return Pass(0.0, latencies=wood.quiet)

    async def ceiling(_path: Path) -> Pass:
        wood = Wood()
        async with anyio.create_task_group() as group:
            for _ in range(leaves):
                group.start_soon(wood.stand)
            await wood.grown(leaves)
            wood.watch = Stopwatch()
            group.cancel_scope.cancel()
        return Pass(0.0, latencies=wood.quiet)

    mine, least = list[Pass](), list[Pass]()
    for _ in range(setup.size(7, 1)):
        mine.append(take(setup, ours))
        least.append(take(setup, ceiling))
    p99, best = _p99(mine), _p99(least)
    return [
        Row(
            workload=f"{name}, quiet",
            durability=setup.durability,
            ours=quantiles(mine),
            ceiling=quantiles(least),
            ratio=best / p99,
            target="-" if most is None else f"p99 < {most * 1000:.0f} ms",
            is_met=None if most is None else p99 < most,
        ),
        Row(
            workload=f"{name}, report",
            durability=setup.durability,
            ours=f"{statistics.median(reports) * 1000:.0f} ms",
            extra=f"{min(reports) * 1000:.0f}..{max(reports) * 1000:.0f} ms",
        ),
    ]


def _p99(passes: list[Pass]) -> float:
    latencies = sorted(latency for each in passes for latency in each.latencies)
    return latencies[int(len(latencies) * 0.99)]


class Wood:
    """The code of the children and of the controllers, and when each child's code has ended."""

    def __init__(self) -> None:
        self.quiet: list[float] = []
        self.watch = Stopwatch()
        self._standing = 0
        self._wanted = -1
        self._grown = asyncio.Event()
        self.registry = Registry()
        self.registry.task(name="stand")(self._child)
        self.registry.controller(_NODE)(self._drive)

    async def stand(self) -> None:
        """Wait to be cancelled."""
        self._standing += 1
        self._look()
        try:
            await asyncio.Event().wait()
        finally:
            self.quiet.append(self.watch.seconds)

    async def grown(self, wanted: int) -> None:
        """Return once so many children wait."""
        self._wanted = wanted
        self._look()
        await self._grown.wait()

    def _look(self) -> None:
        if self._standing == self._wanted:
            self._grown.set()

    async def _child(self, _context: TaskContext, _number: int) -> None:
        await self.stand()

    async def _drive(self, flow: FlowContext) -> None:
        plan = flow.state_json
        for place, below in enumerate(plan["below"]):
            await flow.start(Nested(_NODE), below, name=f"below-{place}")
        await flow.map("stand", range(plan["leaves"]), limit=max(1, plan["leaves"]))


def _flat(count: int) -> Plan:
    return {"leaves": count, "below": []}


def _tree(count: int) -> Plan:
    """A tree of so many children in all, the nested flows among them."""
    nodes: list[Plan] = []
    root = _branch(_LEVELS, nodes)
    each, more = divmod(count - (len(nodes) - 1), len(nodes))
    for number, node in enumerate(nodes):
        node["leaves"] = each + (number < more)
    return root


def _branch(levels: int, nodes: list[Plan]) -> Plan:
    plan: Plan = {}
    nodes.append(plan)
    plan["below"] = [_branch(levels - 1, nodes) for _ in range(_BRANCHES if levels > 1 else 0)]
    return plan


def _leaves(plan: Plan) -> int:
    leaves: int = plan["leaves"]
    return leaves + sum(_leaves(below) for below in plan["below"])


def _children(plan: Plan) -> int:
    """All children below, the nested flows among them."""
    leaves: int = plan["leaves"]
    return leaves + sum(1 + _children(below) for below in plan["below"])
