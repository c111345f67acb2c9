"""W11: a file of controllers that are parked, opened: what each of them costs while nobody answers.

Each waits for an answer, with a deadline a week away. The file is opened by a process of its own, with the
controller registered. What each of the many costs is taken from a second process that opens a file of a few
thousand: memory once recovery is over, asyncio tasks, and timer handles of the event loop. Then the process idles.
The ceiling is a bare connection.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from bench import process
from bench.ceiling import connect
from bench.measure import Row, Setup, Stopwatch, copy, remove
from bench.sample import CONTROLLER, OWNER
from bench.workloads.parking import PARKED, Parking, filled
from flowstead import open_runtime
from flowstead.store.sqlite import Durability

_THIS: Final = "bench.workloads.asleep"
_READY_SECONDS: Final = 0.5
_MOST_BYTES: Final = 200.0
_MOST_CPU_SECONDS: Final = 0.01


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a process saw that opened a file."""

    ready: float
    recovered: float = 0.0
    resident: int = 0
    flows: int = 0
    tasks: int = 0
    timers: int = 0
    cpu: float = 0.0


def run(setup: Setup) -> list[Row]:
    """Open the file of many and the file of few in turn."""
    few, many = setup.size(5_000, 100), setup.size(100_000, 500)
    seconds = setup.size(5, 1)
    times = setup.size(3, 1)
    small = [_open(setup, few, "ours", seconds=0) for _ in range(times)]
    large = [_open(setup, many, "ours", seconds=seconds) for _ in range(times)]
    bare = [_open(setup, many, "bare", seconds=0) for _ in range(times)]
    disk = (_bytes(filled(setup, PARKED, many)) - _bytes(filled(setup, PARKED, few))) / (many - few)
    return [
        _ready(setup, many, large, bare),
        _memory(setup, few, many, small, large),
        _idle(setup, many, seconds, large),
        _handles(setup, many, small, large),
        Row(
            workload=f"W11 {many:,} parked controllers, disk each",
            durability=setup.durability,
            ours=f"{disk:,.0f} B",
            extra="four commits each: made, entered, waiting, parked",
        ),
    ]


def _open(setup: Setup, count: int, who: str, *, seconds: float) -> Found:
    path = setup.fresh_path()
    copy(filled(setup, PARKED, count), path)
    with process.start(_THIS, who, path, setup.durability, seconds) as opened:
        found = msgspec.convert(process.answer_of(opened), Found)
    remove(path)
    return found


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


# ---- rows ---------------------------------------------------------------------------------------------


def _ready(setup: Setup, many: int, large: list[Found], bare: list[Found]) -> Row:
    mine, least = (statistics.median(each.ready for each in found) for found in (large, bare))
    recovered = statistics.median(each.recovered for each in large)
    return Row(
        workload=f"W11 {many:,} parked controllers, ready",
        durability=setup.durability,
        ours=f"{mine:.3f} s",
        ceiling=f"{least:.3f} s",
        ratio=least / mine,
        target=f"< {_READY_SECONDS:g} s",
        is_met=mine < _READY_SECONDS,
        extra=f"nothing left to recover after {recovered:.3f} s",
    )


def _memory(setup: Setup, few: int, many: int, small: list[Found], large: list[Found]) -> Row:
    before, after = (statistics.median(each.resident for each in found) for found in (small, large))
    each = (after - before) / (many - few)
    return Row(
        workload=f"W11 {many:,} parked controllers, memory each",
        durability=setup.durability,
        ours=f"{each:.0f} B",
        # Memory is counted in pages; over a few flows that says nothing.
        target="-" if setup.quick else f"≤ {_MOST_BYTES:g} B",
        is_met=None if setup.quick else each <= _MOST_BYTES,
        extra=f"resident {before / 1e6:.1f} MB with {few:,}, {after / 1e6:.1f} MB with {many:,}",
    )


def _idle(setup: Setup, many: int, seconds: float, large: list[Found]) -> Row:
    cpu = statistics.median(each.cpu for each in large)
    return Row(
        workload=f"W11 {many:,} parked controllers, CPU in {seconds} s",
        durability=setup.durability,
        ours=f"{cpu * 1000:.1f} ms",
        target="none",
        is_met=cpu <= _MOST_CPU_SECONDS,
        extra="user and system time of the whole process",
    )


def _handles(setup: Setup, many: int, small: list[Found], large: list[Found]) -> Row:
    few, most = small[-1], large[-1]
    return Row(
        workload=f"W11 {many:,} parked controllers, tasks and timers",
        durability=setup.durability,
        ours=f"{most.tasks} and {most.timers}",
        target=f"{few.tasks} and {few.timers}",
        is_met=all(
            (each.flows, each.tasks, each.timers) == (0, few.tasks, few.timers) for each in large
        ),
        extra=f"asyncio tasks and timer handles in all; flows in memory {most.flows}",
    )


# ---- in a process of its own --------------------------------------------------------------------------


async def _ours(path: Path, durability: Durability, seconds: float) -> None:
    watch = Stopwatch()
    registry = Parking().registry
    async with open_runtime(path, registry=registry, durability=durability) as runtime:
        ready = watch.seconds
        await _recovered()
        recovered = watch.seconds
        resident = process.resident_bytes()
        start = time.process_time()
        await asyncio.sleep(seconds)
        found = Found(
            ready=ready,
            recovered=recovered,
            resident=resident,
            cpu=time.process_time() - start,
            flows=runtime.statistics().flows_in_memory,
            tasks=len(asyncio.all_tasks()),
            timers=_timers(),
        )
        process.say(msgspec.structs.asdict(found))


async def _recovered() -> None:
    """Return once the runtime has looked for what is unfinished."""
    jobs = [task for task in asyncio.all_tasks() if task.get_name() == "flowstead recovery"]
    if jobs:
        await asyncio.wait(jobs)


def _timers() -> int:
    """Timer handles of the loop that are still to fire."""
    scheduled: list[Any] = getattr(asyncio.get_running_loop(), "_scheduled")  # noqa: B009
    return sum(not handle.cancelled() for handle in scheduled)


async def _bare(path: Path, durability: Durability, _seconds: float) -> None:
    watch = Stopwatch()
    connection = connect(path, durability)
    # What ours asks as well: whose file it is, and whether a flow of this controller is to be entered.
    connection.execute("SELECT epoch FROM ownership").fetchone()
    connection.execute(
        "SELECT 1 FROM flows WHERE owner_key = ? AND controller_id = ? LIMIT 1", (OWNER, CONTROLLER)
    ).fetchone()
    process.say(msgspec.structs.asdict(Found(ready=watch.seconds)))


if __name__ == "__main__":
    part, where, how, window = sys.argv[1:]
    play = _ours if part == "ours" else _bare
    asyncio.run(play(Path(where), cast(Durability, how), float(window)))
