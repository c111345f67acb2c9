"""W1: mutations of one flow, one after the other, each awaited until it is durable.

Nothing can be batched here, so this is the cost of one commit, and of what the runtime adds to it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from bench.ceiling import Ceiling
from bench.measure import Pass, Row, Setup, quantiles, take_in_turn
from bench.recording import record
from bench.sample import CONTROLLER, GOAL, OWNER, state
from flowstead import Applied, Runtime, open_runtime
from flowstead.store.codec import EventRow, FlowWrite

_WARM_UP: Final = 50


def run(setup: Setup) -> list[Row]:
    """Measure ours and the ceiling."""
    count = setup.size(3_000, 200)
    created, _, changed = record(lambda runtime: _mutate(runtime, 2))
    assert created.flow is not None and changed.flow is not None

    async def ours(path: Path) -> Pass:
        async with open_runtime(path, durability=setup.durability) as runtime:
            return await _mutate(runtime, count)

    async def ceiling(path: Path) -> Pass:
        async with Ceiling(path, setup.durability) as bare:
            await bare.submit(created)
            latencies = []
            for number in range(_WARM_UP + count):
                start = time.perf_counter()
                await bare.submit(_at_revision(changed, number))
                latencies.append(time.perf_counter() - start)
            return _pass(latencies[_WARM_UP:])

    pair = take_in_turn(setup, ours, ceiling)
    extra = f"{quantiles(pair.ours)} (ceiling {quantiles(pair.ceiling)})"
    return [pair.row(f"W1 {count:,} mutations", setup.durability, least=0.6, extra=extra)]


async def _mutate(runtime: Runtime, count: int) -> Pass:
    flows = runtime.task_flow.bind_session(session_key=OWNER)
    flow = await flows.create_managed(controller_id=CONTROLLER, goal=GOAL, state_json=state())
    latencies = []
    warm_up = _WARM_UP if count > _WARM_UP else 0
    for number in range(warm_up + count):
        start = time.perf_counter()
        answer = await flows.update(
            flow_id=flow.flow_id, expected_revision=flow.revision, state_json=state(number)
        )
        latencies.append(time.perf_counter() - start)
        assert isinstance(answer, Applied)
        flow = answer.flow
    return _pass(latencies[warm_up:])


def _pass(latencies: list[float]) -> Pass:
    return Pass(len(latencies) / sum(latencies), latencies)


def _at_revision(write: FlowWrite, revision: int) -> FlowWrite:
    """The recorded mutation, made of the flow at this revision."""
    row = write.flow
    assert row is not None
    return FlowWrite(
        row._replace(revision=revision + 1, expected_revision=revision),
        [],
        [EventRow(event.flow_key, revision + 2, event.doc) for event in write.events],
    )
