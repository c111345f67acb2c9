"""W10: many flows that wait, none of them in memory, and a signal with an id for each.

Controllers that are parked, and waits of the ledger's face. The signals come from so many callers at once, each of
whom awaits its report before it sends the next; or so many a second, whatever becomes of those before: then a
latency counts from the instant the signal was due, so that a runtime that falls behind does not slow its own
measurement down. *Report* is the time until `flows.signal` has answered, which is when the flow's resuming is on
disk; *step*, until its controller, entered from the top, has the next thing it did on disk as well.

The ceiling finds the one who waits by the index of keys and writes the rows of the signal's transaction; after the
report it goes on, beside, with the other rows that ours writes for the flow until its end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from bench.ceiling import Ceiling
from bench.measure import (
    Pair,
    Pass,
    Row,
    Setup,
    copy,
    quantile,
    quantiles,
    take_in_turn,
)
from bench.recording import record, stamp
from bench.sample import OWNER, REPLY
from bench.workloads.filling import name
from bench.workloads.parking import LEDGER, PARKED, SOON, Parking, filled, key, stand
from flowstead import Runtime, SessionFlows, open_runtime
from flowstead.rules.wait_keys import wait_key
from flowstead.store.codec import FlowWrite, SignalRow

_RATE: Final = 1_000
_FIRST_SIGNAL: Final = 1_000_000_000
_FIND: Final = {
    PARKED: (
        "SELECT f.key, t.key, t.task_id, t.wait_token, f.doc, t.doc"
        " FROM tasks AS t INDEXED BY tasks_by_wait CROSS JOIN flows AS f ON f.key = t.flow_key"
        " WHERE t.wait_key = ? AND f.owner_key = ? AND t.status = 'queued'"
    ),
    LEDGER: (
        "SELECT f.key, 0, x'', f.wait_token, f.doc, x''"
        " FROM flows AS f INDEXED BY flows_by_wait"
        " WHERE f.wait_key = ? AND f.owner_key = ? AND f.status IN ('waiting', 'blocked')"
    ),
}
# Of the writes that a signal brings about: the one that is a step of the controller's own.
_STEP: Final = 1
_WRITES: Final = {PARKED: 3, LEDGER: 1}

Answer = Callable[[int], Awaitable[None]]
Drive = Callable[[int, Answer], Awaitable["Told"]]


class Told(NamedTuple):
    """When each signal was due, and when its report was there; by the number of its flow."""

    due: list[float]
    reported: list[float]

    def report(self) -> Pass:
        """The reports."""
        return _pass(self.due, self.reported)

    def step(self, stepped: list[float]) -> Pass:
        """The next steps."""
        return _pass(self.due, stepped)


def run(setup: Setup) -> list[Row]:
    """Both kinds of flows, in crowds of two sizes and at a steady rate."""
    rows, count = [], setup.size(10_000, 200)
    for kind in (PARKED, LEDGER):
        for callers in (32, setup.size(1_000, 100)):
            rows += _signalled(setup, kind, count, _callers(callers), f"{callers:,} callers")
        rows += _signalled(setup, kind, count, _at_rate, f"{_RATE:,}/s")
    return rows


def _signalled(setup: Setup, kind: str, count: int, drive: Drive, how: str) -> list[Row]:
    origin = filled(setup, kind, count)
    recorded = _record(kind)
    steps = Pair([], [])

    async def ours(path: Path) -> Pass:
        copy(origin, path)
        parking = Parking()
        registry = parking.registry if kind == PARKED else None
        async with open_runtime(path, registry=registry, durability=setup.durability) as runtime:
            flows = runtime.task_flow.bind_session(session_key=OWNER)
            told = await drive(count, lambda number: _signal(flows, number))
            if kind == PARKED:
                await parking.all_stepped(count)
                stepped = parking.stepped
                steps.ours.append(told.step([stepped[name(n)] for n in range(count)]))
        return told.report()

    async def ceiling(path: Path) -> Pass:
        copy(origin, path)
        async with Ceiling(path, setup.durability) as bare:
            rows = Rows(bare, kind, recorded, count)
            told = await drive(count, rows.answer)
            await asyncio.gather(*rows.following)
        if kind == PARKED:
            steps.ceiling.append(told.step(rows.stepped))
        return told.report()

    reports = take_in_turn(setup, ours, ceiling)
    title = f"W10 {count:,} {kind}, {how}"
    rows = [_row(setup, f"{title}: report", reports, is_steady=drive is _at_rate)]
    if kind == PARKED:
        rows.append(_row(setup, f"{title}: step", steps, is_steady=drive is _at_rate))
    return rows


def _row(setup: Setup, title: str, pair: Pair, *, is_steady: bool) -> Row:
    row = pair.row(title, setup.durability, least=None)
    mine, top = _tails(pair.ours), _tails(pair.ceiling)
    if not is_steady:
        extra = f"{mine} (ceiling {top}); {row.extra}".removesuffix("; ")
        return msgspec.structs.replace(row, extra=extra)
    # The rate is given; what differs is how long each one takes.
    return msgspec.structs.replace(
        row,
        ours=mine,
        ceiling=top,
        ratio=quantile(pair.ceiling, 0.5) / quantile(pair.ours, 0.5),
        extra="ratio of the p50s",
    )


def _tails(passes: list[Pass]) -> str:
    longest = quantile(passes, 1.0) * 1000
    return f"{quantiles(passes).removesuffix(' ms')} max {longest:.2f} ms"


def _pass(due: list[float], done: list[float]) -> Pass:
    latencies = [end - start for start, end in zip(due, done, strict=True)]
    return Pass(len(done) / (max(done) - min(due)), latencies)


# ---- who sends ----------------------------------------------------------------------------------------


def _callers(callers: int) -> Drive:
    """So many callers, each with one signal on its way."""

    async def drive(count: int, answer: Answer) -> Told:
        told = Told([0.0] * count, [0.0] * count)
        numbers = iter(range(count))

        async def caller() -> None:
            for number in numbers:
                told.due[number] = time.perf_counter()
                await answer(number)
                told.reported[number] = time.perf_counter()

        await asyncio.gather(*(asyncio.create_task(caller()) for _ in range(callers)))
        return told

    return drive


async def _at_rate(count: int, answer: Answer) -> Told:
    """One signal after another at even intervals, whether the ones before are answered or not."""
    start = time.perf_counter()
    told = Told([start + number / _RATE for number in range(count)], [0.0] * count)

    async def sender(number: int) -> None:
        await answer(number)
        told.reported[number] = time.perf_counter()

    sending = []
    for number, due in enumerate(told.due):
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        sending.append(asyncio.create_task(sender(number)))
    await asyncio.gather(*sending)
    return told


async def _signal(flows: SessionFlows, number: int) -> None:
    report = await flows.signal(payload=REPLY, id=_signal_id(number), key=key(number))
    assert report.flow_ids == [name(number)], report


def _signal_id(number: int) -> str:
    return f"evt-{number:08d}"


# ---- the ceiling --------------------------------------------------------------------------------------


def _record(kind: str) -> list[FlowWrite]:
    """What one signal makes the runtime write for one flow: its own transaction, then those that follow from it."""
    small = Parking()

    async def play(runtime: Runtime) -> None:
        await stand(runtime, kind, 1)
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        await _signal(flows, 0)
        if kind == PARKED:
            await flows.result(name(0))

    writes = record(play, small.registry if kind == PARKED else None, limits=SOON)
    first = next(number for number, write in enumerate(writes) if write.signals)
    following = writes[first:]
    assert len(following) == _WRITES[kind], following
    return following


class Rows:
    """The rows of each flow's signal and of what follows from it, made from those of one."""

    def __init__(self, bare: Ceiling, kind: str, writes: list[FlowWrite], count: int) -> None:
        self.stepped = [0.0] * count
        self.following: list[asyncio.Task[None]] = []
        self._bare = bare
        self._find = _FIND[kind]
        self._writes = writes
        self._keys = [wait_key(OWNER, key(number)) for number in range(count)]

    async def answer(self, number: int) -> None:
        """Find the flow by its key and write the rows of the signal; the others follow beside."""
        found = await self._bare.read(self._find, self._keys[number], OWNER)
        signal, *others = (self._stamped(write, number, found) for write in self._writes)
        await self._bare.submit(signal)
        if others:
            self.following.append(asyncio.create_task(self._follow(number, others)))

    async def _follow(self, number: int, writes: list[FlowWrite]) -> None:
        for place, write in enumerate(writes, 1):
            await self._bare.submit(write)
            if place == _STEP:
                self.stepped[number] = time.perf_counter()

    def _stamped(self, write: FlowWrite, number: int, found: tuple[Any, ...]) -> FlowWrite:
        flow_key, task_key, task_id, token, *_ = found
        named = {"wait_key": self._keys[number], "wait_token": token.decode()}
        stamped = stamp(write, flow_key, name(number), task_key, task_id.decode())
        flow = stamped.flow
        return msgspec.structs.replace(
            stamped,
            flow=flow if flow is None or flow.wait_key is None else flow._replace(**named),
            tasks=[row._replace(**named) for row in stamped.tasks],
            signals=[self._signal(row, number) for row in write.signals],
        )

    def _signal(self, row: SignalRow, number: int) -> SignalRow:
        return row._replace(
            key=_FIRST_SIGNAL + number,
            wait_key=self._keys[number],
            signal_id=_signal_id(number),
        )
