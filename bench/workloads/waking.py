"""W6: many waiting flows, none of them in memory, resumed all at once.

The ceiling reads each flow's record by its id and then updates it, in batches both ways.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from bench.ceiling import Ceiling
from bench.measure import Pass, Row, Setup, Stopwatch, quantiles, take_in_turn
from bench.recording import record, stamp
from bench.sample import OWNER
from bench.workloads.filling import fill, name
from flowstead import Applied, Runtime, SessionFlows, open_runtime


def run(setup: Setup) -> list[Row]:
    """Measure ours and the ceiling."""
    count = setup.size(10_000, 500)
    _, resumed = record(_resume_one)

    async def ours(path: Path) -> Pass:
        await _fill(setup, path, count)
        async with open_runtime(path, durability=setup.durability) as runtime:
            flows = runtime.task_flow.bind_session(session_key=OWNER)
            before = runtime.statistics().commits
            taken = await _at_once(count, lambda number: _resume(flows, number))
            return Pass(taken.rate, taken.latencies, runtime.statistics().commits - before)

    async def ceiling(path: Path) -> Pass:
        await _fill(setup, path, count)
        async with Ceiling(path, setup.durability) as bare:

            async def resume(number: int) -> None:
                key, revision, _ = await bare.find(OWNER, name(number))
                assert revision == 0
                await bare.submit(stamp(resumed, key, name(number)))

            before = bare.commits
            taken = await _at_once(count, resume)
            return Pass(taken.rate, taken.latencies, bare.commits - before)

    pair = take_in_turn(setup, ours, ceiling)
    extra = (
        f"{quantiles(pair.ours)} (ceiling {quantiles(pair.ceiling)});"
        f" commits {pair.ours[-1].commits} (ceiling {pair.ceiling[-1].commits})"
    )
    return [pair.row(f"W6 {count:,} resumed", setup.durability, least=None, extra=extra)]


async def _fill(setup: Setup, path: Path, count: int) -> None:
    async with open_runtime(path, durability=setup.durability) as runtime:
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        await fill(flows, 0, count, "waiting")


async def _resume_one(runtime: Runtime) -> None:
    flows = runtime.task_flow.bind_session(session_key=OWNER)
    await fill(flows, 0, 1, "waiting")
    await _resume(flows, 0)


async def _resume(flows: SessionFlows, number: int) -> None:
    answer = await flows.resume(flow_id=name(number), expected_revision=0, status="running")
    assert isinstance(answer, Applied)


async def _at_once(count: int, resume: Callable[[int], Coroutine[Any, Any, None]]) -> Pass:
    latencies = []

    async def client(number: int) -> None:
        start = time.perf_counter()
        await resume(number)
        latencies.append(time.perf_counter() - start)

    watch = Stopwatch()
    await asyncio.gather(*(asyncio.create_task(client(number)) for number in range(count)))
    return Pass(watch.rate(count), latencies)
