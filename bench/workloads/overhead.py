"""W7: what a child costs beside the plainer things it could have been: time each, and memory each while it waits.

The same trivial coroutine is awaited bare, run as a plain task, run in a task group, and run as a child of a flow
by a controller: one after the other, 8 and 100 at once, on a file and on `:memory:`.

The ceiling of a plain task is the bare coroutine; of a group, plain tasks; of a child on a file, the bare SQLite
thread that writes the same rows; of a child on `:memory:`, where nothing is kept, plain tasks as many at a time.

Memory is that of ten thousand of a kind, all waiting for one event, beside that of as many plain tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec

from bench.ceiling import Ceiling
from bench.measure import Pair, Pass, Row, Setup, Stopwatch, median_rate, quantiles, take_in_turn
from bench.recording import record, stamp_task
from bench.sample import CONTROLLER, GOAL, OWNER, state
from bench.workloads import waiting
from bench.workloads.children import Mapping, Rows
from flowstead import FlowContext, Registry, Runtime, TaskContext, open_runtime
from flowstead.engine.clock import SystemIds
from flowstead.store.codec import EventRow, FlowWrite

_LIMITS: Final = (8, 100)
_WHO: Final = {
    "plain": "plain task",
    "grouped": "group child",
    "live": "flow child, file",
    "live in memory": "flow child, :memory:",
}


def run(setup: Setup) -> list[Row]:
    """Time first, then memory."""
    return [
        *_tasks(setup, setup.size(20_000, 1_000)),
        _one_by_one(setup, setup.size(2_000, 100)),
        *(_mapped(setup, setup.size(5_000, 300), limit) for limit in _LIMITS),
        *(_in_memory(setup, setup.size(5_000, 300), limit) for limit in (1, *_LIMITS)),
        *_memory(setup, setup.size(10_000, 500)),
    ]


# ---- without a flow -----------------------------------------------------------------------------------


def _tasks(setup: Setup, count: int) -> list[Row]:
    async def bare(_path: Path) -> Pass:
        watch = Stopwatch()
        for number in range(count):
            await _double(None, number)
        return Pass(watch.rate(count))

    async def single(_path: Path) -> Pass:
        return await _plain(count, 1)

    async def at_once(_path: Path) -> Pass:
        return await _plain(count, 100)

    async def grouped(_path: Path) -> Pass:
        watch = Stopwatch()
        for _ in range(0, count, 100):
            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(_double, None, number)
        return Pass(watch.rate(count))

    return [
        _each(setup, "plain task, one by one", take_in_turn(setup, single, bare), "bare await"),
        _each(setup, "plain task, 100 at once", take_in_turn(setup, at_once, bare), "bare await"),
        _each(
            setup, "group child, 100 at once", take_in_turn(setup, grouped, at_once), "plain tasks"
        ),
    ]


async def _plain(count: int, limit: int) -> Pass:
    """The same work as plain tasks, at most `limit` of them at a time."""
    watch = Stopwatch()
    if limit == 1:
        for number in range(count):
            await asyncio.create_task(_double(None, number))
    else:
        for start in range(0, count, limit):
            numbers = range(start, min(start + limit, count))
            await asyncio.gather(*(asyncio.create_task(_double(None, n)) for n in numbers))
    return Pass(watch.rate(count))


async def _double(_context: TaskContext | None, number: int) -> int:
    return 2 * number


# ---- children of a flow -------------------------------------------------------------------------------


class Sequence:
    """A controller that runs one child after the other, and how long it took over all of them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.taken = Pass(0.0)
        self.registry = Registry()
        self.registry.task(_double)
        self.registry.controller(CONTROLLER)(self._drive)

    async def play(self, runtime: Runtime) -> None:
        """Lead one flow from its creation to its end."""
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        flow = await flows.create_managed(controller_id=CONTROLLER, goal=GOAL, state_json=state())
        ended = await flows.result(flow.flow_id)
        assert ended.status == "succeeded", ended

    async def _drive(self, flow: FlowContext) -> None:
        watch, latencies = Stopwatch(), []
        for number in range(self._count):
            one = Stopwatch()
            assert await flow.run(_double, number) == 2 * number
            latencies.append(one.seconds)
        self.taken = Pass(watch.rate(self._count), latencies)


def _one_by_one(setup: Setup, count: int) -> Row:
    small = Sequence(1)
    recorded = record(small.play, small.registry)
    begun = next(write for write in recorded if write.tasks and write.tasks[0].fresh)
    ended = next(write for write in recorded if write.tasks and not write.tasks[0].fresh)
    before = recorded[: recorded.index(begun)]

    async def ceiling(path: Path) -> Pass:
        new_id, seq = SystemIds().task_id, begun.events[0].seq
        async with Ceiling(path, setup.durability) as bare:
            for write in before:
                await bare.submit(write)
            watch, latencies = Stopwatch(), []
            for number in range(count):
                one, task_id = Stopwatch(), new_id()
                for write in (begun, ended):
                    await bare.submit(_again(write, number + 2, task_id, seq))
                    seq += len(write.events)
                latencies.append(one.seconds)
            return Pass(watch.rate(count), latencies)

    ours = partial(_ours, setup, lambda: Sequence(count))
    pair = take_in_turn(setup, ours, ceiling)
    told = f"bare SQLite; {quantiles(pair.ours)} (ceiling {quantiles(pair.ceiling)})"
    return _each(setup, "flow.run, one by one, file", pair, told)


def _again(write: FlowWrite, key: int, task_id: str, seq: int) -> FlowWrite:
    """The write of the next child of the same flow."""
    [task] = write.tasks
    return FlowWrite(
        None,
        [stamp_task(task, key, task_id, task.flow_key, f"_double#{key}")],
        [EventRow(event.flow_key, seq + n, event.doc) for n, event in enumerate(write.events)],
    )


def _mapped(setup: Setup, count: int, limit: int) -> Row:
    small = Mapping(2, 1)
    recorded = record(small.play, small.registry)

    async def ceiling(path: Path) -> Pass:
        rows = Rows(recorded, count, limit)
        async with Ceiling(path, setup.durability) as bare:
            for write in rows.before:
                await bare.submit(write)
            watch = Stopwatch()
            await rows.play(bare)
            return Pass(watch.rate(count))

    ours = partial(_ours, setup, lambda: Mapping(count, limit))
    pair = take_in_turn(setup, ours, ceiling)
    return _each(setup, f"flow.map, limit {limit}, file", pair, "bare SQLite")


def _in_memory(setup: Setup, count: int, limit: int) -> Row:
    async def ours(_path: Path) -> Pass:
        driven = Sequence(count) if limit == 1 else Mapping(count, limit)
        return await _ours(setup, lambda: driven, ":memory:")

    async def plain(_path: Path) -> Pass:
        return await _plain(count, limit)

    pair = take_in_turn(setup, ours, plain)
    what = "flow.run, one by one" if limit == 1 else f"flow.map, limit {limit}"
    return _each(setup, f"{what}, :memory:", pair, "plain tasks")


async def _ours(setup: Setup, make: Callable[[], Sequence | Mapping], path: Path | str) -> Pass:
    driven = make()
    options: Any = {"registry": driven.registry, "durability": setup.durability}
    async with open_runtime(path, **options) as runtime:
        await driven.play(runtime)
    return driven.taken


def _each(setup: Setup, what: str, pair: Pair, beside: str) -> Row:
    """Rates told as the time each one takes; the ratio stays ours divided by the ceiling."""
    row = pair.row(f"W7 {what}", setup.durability, least=None)
    return msgspec.structs.replace(
        row,
        ours=f"{1e6 / median_rate(pair.ours):.2f} µs",
        ceiling=f"{1e6 / median_rate(pair.ceiling):.2f} µs",
        extra=f"each, beside {beside}; {row.extra}".removesuffix("; "),
    )


# ---- memory -------------------------------------------------------------------------------------------


def _memory(setup: Setup, count: int) -> list[Row]:
    found = {who: waiting.measure(setup, who, count) for who in _WHO}
    return [
        waiting.row(setup, f"W7 {name}, memory each", count, found[who], found["plain"])
        for who, name in _WHO.items()
    ]
