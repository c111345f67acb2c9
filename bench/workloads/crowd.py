"""W8: one flow with ten thousand children at once, all waiting for one event, then all released; and queued ones.

*Start* is the time from creating the flow until every child waits; *finish*, from the event until the flow has
ended. The ceiling keeps a plain task for each child and has the bare SQLite thread write the same rows: the start
of all children in the same chunks, the end of each as it comes.

A pass of its own, not timed, looks for the longest turn the runtime takes on the event loop, and for the longest
that anything else had to wait for its turn: between a bulk of children that are all ready, that is far more.

Memory is taken in processes of their own, for children that run and for children that stand in line.
"""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.ceiling import Ceiling
from bench.measure import Pair, Pass, Row, Setup, Stopwatch, median_rate, take
from bench.recording import record, stamp_task
from bench.turns import Turns
from bench.workloads import waiting
from bench.workloads.gate import Crowd, Gate
from flowstead import Runtime, open_runtime
from flowstead.engine.clock import SystemIds
from flowstead.store.codec import EventRow, FlowWrite, TaskRow

_CHUNK: Final = 256


def run(setup: Setup) -> list[Row]:
    """Time, then turns, then memory."""
    count = setup.size(10_000, 500)
    return [*_times(setup, count), *_turns(setup, count), *_memory(setup, count)]


# ---- time ---------------------------------------------------------------------------------------------


def _times(setup: Setup, count: int) -> list[Row]:
    recorded = _record()
    starts, finishes = Pair([], []), Pair([], [])

    async def ours(path: Path) -> Pass:
        crowd = Crowd()
        options: Any = {"registry": crowd.registry, "durability": setup.durability}
        async with open_runtime(path, **options) as runtime:
            watch = Stopwatch()
            flow = await crowd.begin(runtime, count, count)
            await crowd.gate.full(count)
            starts.ours.append(Pass(watch.rate(count)))
            watch = Stopwatch()
            crowd.gate.open()
            await crowd.end(runtime, flow)
            finishes.ours.append(Pass(watch.rate(count)))
        return finishes.ours[-1]

    async def ceiling(path: Path) -> Pass:
        rows = Rows(recorded, count)
        async with Ceiling(path, setup.durability) as bare:
            watch = Stopwatch()
            tasks = await rows.start(bare)
            starts.ceiling.append(Pass(watch.rate(count)))
            watch = Stopwatch()
            rows.gate.open()
            await asyncio.gather(*tasks)
            finishes.ceiling.append(Pass(watch.rate(count)))
        return finishes.ceiling[-1]

    for _ in range(setup.size(3, 1)):
        take(setup, ours)
        take(setup, ceiling)
    return [
        _seconds(setup, f"W8 {count:,} children at once, {what}", pair, count)
        for what, pair in (("start", starts), ("finish", finishes))
    ]


def _seconds(setup: Setup, name: str, pair: Pair, count: int) -> Row:
    row = pair.row(name, setup.durability, least=None)
    return msgspec.structs.replace(
        row,
        ours=f"{count / median_rate(pair.ours):.2f} s",
        ceiling=f"{count / median_rate(pair.ceiling):.2f} s",
        extra="; ".join(part for part in (f"{row.ours} and {row.ceiling}", row.extra) if part),
    )


def _record() -> list[FlowWrite]:
    small = Crowd()

    async def play(runtime: Runtime) -> None:
        flow = await small.begin(runtime, 2, 2)
        await small.gate.full(2)
        small.gate.open()
        await small.end(runtime, flow)

    return record(play, small.registry)


class Rows:
    """The rows of such a crowd, made from those of a crowd of two."""

    def __init__(self, writes: list[FlowWrite], count: int) -> None:
        added = next(write for write in writes if write.tasks and write.tasks[0].fresh)
        ended = next(write for write in writes if write.tasks and not write.tasks[0].fresh)
        self.gate = Gate()
        self._before = writes[: writes.index(added)]
        self._begun, self._ended = added.tasks[0], ended.tasks[0]
        self._docs = [added.events[0].doc, added.events[-1].doc]
        self._ended_doc = ended.events[0].doc
        self._flow_key, self._seq = self._begun.flow_key, added.events[0].seq
        new_id = SystemIds().task_id
        self._ids = [new_id() for _ in range(count)]

    async def start(self, bare: Ceiling) -> list[asyncio.Task[None]]:
        """Insert the children chunk by chunk, and have a plain task wait for each."""
        for write in self._before:
            await bare.submit(write)
        tasks = []
        for start in range(0, len(self._ids), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(self._ids)))
            events = [self._event(doc) for doc in self._docs for _ in numbers]
            await bare.submit(FlowWrite(None, [self._row(self._begun, n) for n in numbers], events))
            tasks += [asyncio.create_task(self._wait(bare, number)) for number in numbers]
        await self.gate.full(len(self._ids))
        return tasks

    async def _wait(self, bare: Ceiling, number: int) -> None:
        await self.gate.wait()
        ended = self._row(self._ended, number)
        await bare.submit(FlowWrite(None, [ended], [self._event(self._ended_doc)]))

    def _row(self, row: TaskRow, number: int) -> TaskRow:
        run_id = f"stand[{number}]"
        return stamp_task(row, number + 2, self._ids[number], self._flow_key, run_id)

    def _event(self, doc: str) -> EventRow:
        self._seq += 1
        return EventRow(self._flow_key, self._seq - 1, doc)


# ---- turns --------------------------------------------------------------------------------------------


def _turns(setup: Setup, count: int) -> list[Row]:
    starting, finishing = Turns(), Turns()
    waits: list[float] = []

    async def ours(path: Path) -> Pass:
        crowd, watch = Crowd(), Stopwatch()
        options: Any = {"registry": crowd.registry, "durability": setup.durability}
        async with open_runtime(path, **options) as runtime:
            with starting:
                async with Waits() as probe:
                    flow = await crowd.begin(runtime, count, count)
                    await crowd.gate.full(count)
            waits.append(probe.longest)
            with finishing:
                async with Waits() as probe:
                    crowd.gate.open()
                    await crowd.end(runtime, flow)
            waits.append(probe.longest)
        return Pass(watch.rate(count))

    take(setup, ours)
    return [
        _longest(setup, f"W8 {count:,} at once, longest turn, {what}", turns, wait)
        for what, turns, wait in zip(("start", "finish"), (starting, finishing), waits, strict=True)
    ]


def _longest(setup: Setup, name: str, turns: Turns, wait: float) -> Row:
    told = re.sub(r"Task-\d+", "a child", str(turns))
    return Row(
        workload=name,
        durability=setup.durability,
        ours=f"{turns.longest * 1000:.1f} ms",
        extra=f"{told}; another task waited at most {wait * 1000:.0f} ms",
    )


class Waits:
    """How long a task that is ready all the time waits for its turn, at most."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def __aenter__(self) -> Waits:
        self._probe = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._probe.cancel()
        await asyncio.wait({self._probe})

    async def _look(self) -> None:
        clock = time.perf_counter
        while True:
            before = clock()
            await asyncio.sleep(0)
            self.longest = max(self.longest, clock() - before)


# ---- memory -------------------------------------------------------------------------------------------


def _memory(setup: Setup, count: int) -> list[Row]:
    plain, live, queued = (
        waiting.measure(setup, who, count) for who in ("plain", "live", "queued")
    )
    line = f"queued, limit {waiting.QUEUE_LIMIT}"
    return [
        waiting.row(setup, f"W8 {count:,} children at once, memory each", count, live, plain),
        waiting.row(setup, f"W8 {count:,} {line}, memory each", count, queued, plain),
    ]
