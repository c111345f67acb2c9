"""W2: many flows at once, each led through six durable writes by a client that awaits every one.

created → linked child added → waiting → resumed → child completed → finished. Every client is one task.
A second pass of ours, not timed, looks for the longest turn the runtime takes on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from bench.ceiling import Ceiling
from bench.measure import Pass, Row, Setup, Stopwatch, take, take_in_turn
from bench.recording import record, stamp
from bench.sample import CONTROLLER, GOAL, OWNER, RESULT, WAIT, state
from bench.turns import Turns
from flowstead import Applied, Created, Runtime, SessionFlows, open_runtime
from flowstead.engine.clock import SystemIds
from flowstead.store.codec import FlowWrite

_LONGEST_TURN_MS: Final = 20.0


def run(setup: Setup) -> list[Row]:
    """Measure ours and the ceiling at two sizes, and the longest turn at the larger one."""
    small, large = setup.size(1_000, 100), setup.size(10_000, 500)
    return [_throughput(setup, small), _throughput(setup, large), _longest_turn(setup, large)]


def _throughput(setup: Setup, count: int) -> Row:
    writes = record(lambda runtime: _lead_all(runtime, 1))
    ids = SystemIds()
    names = [(ids.flow_id(CONTROLLER, number), ids.task_id()) for number in range(count)]

    async def ours(path: Path) -> Pass:
        async with open_runtime(path, durability=setup.durability) as runtime:
            return await _lead_all(runtime, count)

    async def ceiling(path: Path) -> Pass:
        async with Ceiling(path, setup.durability) as bare:
            before, watch = bare.commits, Stopwatch()
            await _at_once(
                _lead_rows(bare, writes, number, *name) for number, name in enumerate(names)
            )
            return Pass(watch.rate(count), commits=bare.commits - before)

    pair = take_in_turn(setup, ours, ceiling)
    extra = f"commits {pair.ours[-1].commits} (ceiling {pair.ceiling[-1].commits})"
    return pair.row(f"W2 {count:,} flows", setup.durability, least=0.3, extra=extra)


def _longest_turn(setup: Setup, count: int) -> Row:
    turns = Turns()

    async def ours(path: Path) -> Pass:
        async with open_runtime(path, durability=setup.durability) as runtime:
            with turns:
                return await _lead_all(runtime, count)

    take(setup, ours)
    longest = turns.longest * 1000
    return Row(
        workload=f"W2 {count:,} longest turn",
        durability=setup.durability,
        ours=f"{longest:.1f} ms",
        target=f"< {_LONGEST_TURN_MS:g} ms",
        is_met=longest < _LONGEST_TURN_MS,
        extra=str(turns),
    )


async def _lead_all(runtime: Runtime, count: int) -> Pass:
    flows = runtime.task_flow.bind_session(session_key=OWNER)
    before, watch = runtime.statistics().commits, Stopwatch()
    await _at_once(_lead(flows) for _ in range(count))
    return Pass(watch.rate(count), commits=runtime.statistics().commits - before)


async def _lead(flows: SessionFlows) -> None:
    flow = await flows.create_managed(controller_id=CONTROLLER, goal=GOAL, state_json=state())
    flow_id = flow.flow_id
    child = await flows.run_task(
        flow_id=flow_id, task="Classify the newest message", runtime="subagent", status="running"
    )
    assert isinstance(child, Created)
    waiting = await flows.set_waiting(
        flow_id=flow_id, expected_revision=flow.revision, current_step="await", wait_json=WAIT
    )
    assert isinstance(waiting, Applied)
    resumed = await flows.resume(
        flow_id=flow_id, expected_revision=waiting.flow.revision, status="running"
    )
    assert isinstance(resumed, Applied)
    await flows.complete_task(child.task.task_id, result_json=RESULT)
    finished = await flows.finish(flow_id=flow_id, expected_revision=resumed.flow.revision)
    assert isinstance(finished, Applied)


async def _lead_rows(
    bare: Ceiling, writes: list[FlowWrite], number: int, flow_id: str, task_id: str
) -> None:
    key = 2 * number + 1
    for write in writes:
        await bare.submit(stamp(write, key, flow_id, key + 1, task_id))


async def _at_once(clients: Iterable[Any]) -> None:
    await asyncio.gather(*(asyncio.create_task(client) for client in clients))
