"""W3: one flow whose controller maps a trivial function over many inputs, so many at a time.

The ceiling inserts the same children in the same chunks and keeps as many workers busy. Each worker writes,
again and again, the end of one child together with the start of the next, and awaits it, as ours does.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any, Final

from bench.ceiling import Ceiling
from bench.measure import Pass, Row, Setup, Stopwatch, take_in_turn
from bench.recording import record, stamp_task
from bench.sample import CONTROLLER, GOAL, OWNER, state
from flowstead import FlowContext, Registry, Runtime, TaskContext, open_runtime
from flowstead.engine.clock import SystemIds
from flowstead.store.codec import EventRow, FlowWrite, TaskRow

_CHUNK: Final = 256
_LEAST: Final = {10: 0.5, 100: 0.2}


def run(setup: Setup) -> list[Row]:
    """Measure ours and the ceiling at both limits."""
    return [_children(setup, setup.size(10_000, 500), limit) for limit in _LEAST]


def _children(setup: Setup, count: int, limit: int) -> Row:
    small = Mapping(2, 1)
    recorded = record(small.play, small.registry)

    async def ours(path: Path) -> Pass:
        mapping = Mapping(count, limit)
        options: Any = {"registry": mapping.registry, "durability": setup.durability}
        async with open_runtime(path, **options) as runtime:
            await mapping.play(runtime)
        return mapping.taken

    async def ceiling(path: Path) -> Pass:
        rows = Rows(recorded, count, limit)
        async with Ceiling(path, setup.durability) as bare:
            for write in rows.before:
                await bare.submit(write)
            before, watch = bare.commits, Stopwatch()
            await rows.play(bare)
            return Pass(watch.rate(count), commits=bare.commits - before)

    pair = take_in_turn(setup, ours, ceiling)
    extra = f"commits {pair.ours[-1].commits} (ceiling {pair.ceiling[-1].commits})"
    name = f"W3 {count:,} children, limit {limit}"
    return pair.row(name, setup.durability, least=_LEAST[limit], extra=extra)


class Mapping:
    """A controller that maps, and how long its map took."""

    def __init__(self, count: int, limit: int) -> None:
        self._count, self._limit = count, limit
        self._runtime: Runtime | None = None
        self.taken = Pass(0.0)
        self.registry = Registry()
        self.registry.task(_double)
        self.registry.controller(CONTROLLER)(self._drive)

    async def play(self, runtime: Runtime) -> None:
        """Lead one flow from its creation to its end."""
        self._runtime = runtime
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        flow = await flows.create_managed(controller_id=CONTROLLER, goal=GOAL, state_json=state())
        ended = await flows.result(flow.flow_id)
        assert ended.status == "succeeded", ended

    async def _drive(self, flow: FlowContext) -> None:
        assert self._runtime is not None
        before, watch = self._runtime.statistics().commits, Stopwatch()
        results = await flow.map(_double, range(self._count), limit=self._limit)
        rate = watch.rate(self._count)
        self.taken = Pass(rate, commits=self._runtime.statistics().commits - before)
        assert results[-1] == 2 * (self._count - 1)


class Rows:
    """The rows of such a map, made from those of a map over two inputs, one at a time."""

    def __init__(self, writes: list[FlowWrite], count: int, limit: int) -> None:
        added = next(write for write in writes if len(write.tasks) == 2 and write.tasks[0].fresh)
        ended = next(write for write in writes if write.tasks and not write.tasks[0].fresh)
        self.before = writes[: writes.index(added)]
        self._started, self._queued = added.tasks
        self._ended, self._begun = ended.tasks
        # created, created, started; then ended, started.
        self._created_doc, self._started_doc = added.events[0].doc, added.events[-1].doc
        self._ended_doc = ended.events[0].doc
        self._count, self._limit = count, limit
        self._flow_key = self._started.flow_key
        self._next = itertools.count(limit)
        self._seq = itertools.count(added.events[0].seq)
        new_id = SystemIds().task_id
        self._names = [(number + 2, new_id(), f"_double[{number}]") for number in range(count)]

    async def play(self, bare: Ceiling) -> None:
        """Insert the children chunk by chunk; the first chunk starts as many as the limit allows."""
        workers = []
        for start in range(0, self._count, _CHUNK):
            await bare.submit(self._chunk(start))
            if start == 0:
                workers = [asyncio.create_task(self._work(bare, i)) for i in range(self._limit)]
        await asyncio.gather(*workers)

    async def _work(self, bare: Ceiling, number: int) -> None:
        while number < self._count:
            following = next(self._next)
            tasks, events = [self._task(self._ended, number)], [self._event(self._ended_doc)]
            if following < self._count:
                tasks.append(self._task(self._begun, following))
                events.append(self._event(self._started_doc))
            await bare.submit(FlowWrite(None, tasks, events))
            number = following

    def _chunk(self, start: int) -> FlowWrite:
        tasks, events = [], []
        started = range(min(self._limit, self._count)) if start == 0 else range(0)
        for number in range(start, min(start + _CHUNK, self._count)):
            tasks.append(self._task(self._started if number in started else self._queued, number))
            events.append(self._event(self._created_doc))
        events.extend(self._event(self._started_doc) for _ in started)
        return FlowWrite(None, tasks, events)

    def _task(self, row: TaskRow, number: int) -> TaskRow:
        key, task_id, run_id = self._names[number]
        return stamp_task(row, key, task_id, self._flow_key, run_id)

    def _event(self, doc: str) -> EventRow:
        return EventRow(self._flow_key, next(self._seq), doc)


async def _double(_context: TaskContext, number: int) -> int:
    return 2 * number
