"""W12: many flows that finish under a runtime with a notifier, each of which tells its owner so.

The notifier takes nothing before all flows have finished: so *finish* is the cost of the flows' ends with the rows
of the outbox, beside that of the same ends in a runtime without a notifier, and *delivered* the speed at which the
backlog goes out, each update taken over at once, until every delivery is on disk.

The ceiling writes the same rows: a finish for each of as many clients; then, as many at once as ours delivers, the
record of each delivery.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from bench.ceiling import Ceiling
from bench.measure import Pair, Pass, Row, Setup, Stopwatch, median_rate, take
from bench.recording import record, stamp
from bench.sample import OWNER
from bench.workloads.filling import fill, name
from flowstead import Applied, Limits, Runtime, SessionFlows, Update, open_runtime
from flowstead.store.codec import FlowWrite, UpdateRow

_CLIENTS: Final = 512
_FIRST_UPDATE: Final = 1_000_000_000
# The backlog is held back by a notifier that does not answer, which is nothing to give up for.
_LIMITS: Final = Limits(delivery_seconds=3600.0)


class Doorman:
    """A notifier that takes updates over at once, but none before it is opened."""

    def __init__(self) -> None:
        self.taken = 0
        self._wanted = -1
        self._opened = asyncio.Event()
        self._done = asyncio.Event()

    async def send(self, _update: Update) -> None:
        """Take an update over."""
        await self._opened.wait()
        self.taken += 1
        if self.taken == self._wanted:
            self._done.set()

    def open(self) -> None:
        """Take them from now on."""
        self._opened.set()

    async def all_taken(self, wanted: int) -> None:
        """Return once so many have been taken over, for the first time or again."""
        self._wanted = wanted
        if self.taken < wanted:
            await self._done.wait()


def run(setup: Setup) -> list[Row]:
    """Without a notifier and with one, each beside its ceiling."""
    count = setup.size(10_000, 500)
    silent, told, delivered = Pair([], []), Pair([], []), Pair([], [])
    writes = _record()
    for _ in range(setup.size(3, 1)):
        silent.ours.append(take(setup, _without(setup, count)))
        silent.ceiling.append(take(setup, _bare(setup, count, writes, None)))
        told.ours.append(take(setup, _with(setup, count, delivered.ours)))
        told.ceiling.append(take(setup, _bare(setup, count, writes, delivered.ceiling)))
    cost, least = (
        1e6 / median_rate(with_rows) - 1e6 / median_rate(without)
        for with_rows, without in ((told.ours, silent.ours), (told.ceiling, silent.ceiling))
    )
    outbox = f"the outbox costs {cost:.0f} µs a finish (ceiling {least:.0f} µs)"
    return [
        silent.row(f"W12 {count:,} finished, no notifier", setup.durability, least=None),
        told.row(f"W12 {count:,} finished, notifier", setup.durability, least=None, extra=outbox),
        _delivered(setup, count, delivered),
    ]


def _delivered(setup: Setup, count: int, pair: Pair) -> Row:
    row = pair.row(f"W12 {count:,} updates delivered", setup.durability, least=None)
    commits = f"commits {pair.ours[-1].commits} (ceiling {pair.ceiling[-1].commits})"
    return msgspec.structs.replace(row, extra=f"{commits}; {row.extra}".removesuffix("; "))


# ---- ours ---------------------------------------------------------------------------------------------


def _without(setup: Setup, count: int) -> Callable[[Path], Awaitable[Pass]]:
    async def ours(path: Path) -> Pass:
        async with open_runtime(path, durability=setup.durability) as runtime:
            return await _finish_all(runtime, count)

    return ours


def _with(setup: Setup, count: int, delivered: list[Pass]) -> Callable[[Path], Awaitable[Pass]]:
    async def ours(path: Path) -> Pass:
        doorman = Doorman()
        async with open_runtime(
            path, durability=setup.durability, notifier=doorman, limits=_LIMITS
        ) as runtime:
            finished = await _finish_all(runtime, count)
            before, watch = runtime.statistics().commits, Stopwatch()
            doorman.open()
            await doorman.all_taken(count)
            while runtime.statistics().delivered < count:  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0.001)
            commits = runtime.statistics().commits - before
            delivered.append(Pass(watch.rate(count), commits=commits))
            assert doorman.taken == count
            return finished

    return ours


async def _finish_all(runtime: Runtime, count: int) -> Pass:
    flows = runtime.task_flow.bind_session(session_key=OWNER)
    await fill(flows, 0, count, "running")

    async def finish(number: int) -> None:
        await _finish(flows, number)

    return await _clients(count, finish)


async def _finish(flows: SessionFlows, number: int) -> None:
    answer = await flows.finish(flow_id=name(number), expected_revision=0)
    assert isinstance(answer, Applied)


async def _clients(
    count: int, job: Callable[[int], Awaitable[None]], clients: int = _CLIENTS
) -> Pass:
    latencies, numbers = list[float](), iter(range(count))

    async def client() -> None:
        for number in numbers:
            start = time.perf_counter()
            await job(number)
            latencies.append(time.perf_counter() - start)

    watch = Stopwatch()
    await asyncio.gather(*(asyncio.create_task(client()) for _ in range(clients)))
    return Pass(watch.rate(count), latencies)


# ---- the ceiling --------------------------------------------------------------------------------------


def _record() -> list[FlowWrite]:
    """One flow made, finished, and its update delivered."""
    doorman = Doorman()
    doorman.open()

    async def play(runtime: Runtime) -> None:
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        await fill(flows, 0, 1, "running")
        await _finish(flows, 0)
        while not runtime.statistics().delivered:  # noqa: ASYNC110 - nobody is told of it
            await asyncio.sleep(0.001)

    writes = record(play, notifier=doorman)
    assert [len(write.updates) for write in writes] == [0, 1, 1], writes
    return writes


def _bare(
    setup: Setup, count: int, writes: list[FlowWrite], delivered: list[Pass] | None
) -> Callable[[Path], Awaitable[Pass]]:
    created, finished, recorded = writes

    async def ceiling(path: Path) -> Pass:
        async with Ceiling(path, setup.durability) as bare:

            async def create(number: int) -> None:
                await bare.submit(stamp(created, number + 1, name(number)))

            async def finish(number: int) -> None:
                write = stamp(finished, number + 1, name(number))
                if delivered is not None:
                    [row] = finished.updates
                    write = msgspec.structs.replace(write, updates=[_stamped(row, number)])
                await bare.submit(write)

            async def deliver(number: int) -> None:
                [row] = recorded.updates
                await bare.submit(FlowWrite(None, (), (), (), [_stamped(row, number)]))

            await _clients(count, create)
            ended = await _clients(count, finish)
            if delivered is not None:
                before = bare.commits
                sent = await _clients(count, deliver, _LIMITS.deliveries)
                delivered.append(msgspec.structs.replace(sent, commits=bare.commits - before))
            return ended

    return ceiling


def _stamped(row: UpdateRow, number: int) -> UpdateRow:
    """The row of another flow's update."""
    return row._replace(key=_FIRST_UPDATE + number, flow_key=number + 1)
