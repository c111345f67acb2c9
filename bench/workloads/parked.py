"""W5: what a waiting flow costs while nobody asks for it: bytes of memory, and CPU time of the whole runtime.

In a process of its own: a first few thousand flows fill every cache, and the memory is read. Then the many are
made and let go of, the allocator is asked to give back what is free, and the memory is read again.

Idle flows are let go of at once, so that what is seen is the flows and not the crowd that was in memory while
they were made. A second process keeps the usual `idle_seconds` and shows what such a burst leaves behind.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Final, cast

from bench import process
from bench.measure import Row, Setup, remove
from bench.sample import OWNER
from bench.workloads.filling import fill
from flowstead import Limits, Runtime, open_runtime
from flowstead.store.sqlite import Durability

_THIS: Final = "bench.workloads.parked"
_WARM_UP: Final = 5_000
_IDLE_SECONDS: Final = 0.5
_MOST_BYTES: Final = 200.0
_MOST_CPU_SECONDS: Final = 0.01


def run(setup: Setup) -> list[Row]:
    """Measure memory and CPU of an idle runtime."""
    count, seconds = setup.size(100_000, 1_000), setup.size(5, 1)
    parked = _measure(setup, count, seconds, _IDLE_SECONDS)
    rows = [
        # Memory is counted in pages; over a few flows that says nothing.
        _memory(setup, parked, count, _IDLE_SECONDS, None if setup.quick else _MOST_BYTES),
        Row(
            workload=f"W5 {count:,} parked, CPU in {seconds} s",
            durability=setup.durability,
            ours=f"{parked['cpu'] * 1000:.1f} ms",
            target="none",
            is_met=parked["cpu"] <= _MOST_CPU_SECONDS,
            extra="user and system time of the whole process",
        ),
    ]
    if not setup.quick:
        usual = Limits().idle_seconds
        rows.append(_memory(setup, _measure(setup, count, 0, usual), count, usual, None))
    return rows


def _measure(setup: Setup, count: int, seconds: float, idle_seconds: float) -> dict[str, float]:
    path = setup.fresh_path()
    with process.start(_THIS, path, setup.durability, count, seconds, idle_seconds) as parked:
        found: dict[str, float] = process.answer_of(parked)
    remove(path)
    return found


def _memory(
    setup: Setup, found: dict[str, float], count: int, idle_seconds: float, most: float | None
) -> Row:
    before, after, per_flow = (found[what] for what in ("before", "after", "bytes"))
    return Row(
        workload=f"W5 {count:,} parked, memory each",
        durability=setup.durability,
        ours=f"{per_flow:.0f} B",
        target="-" if most is None else f"≤ {most:g} B",
        is_met=None if most is None else per_flow <= most,
        extra=f"idle_seconds {idle_seconds:g}; resident {before / 1e6:.1f} → {after / 1e6:.1f} MB",
    )


# ---- in a process of its own --------------------------------------------------------------------------


async def _park(
    path: Path, durability: Durability, count: int, seconds: float, idle_seconds: float
) -> None:
    limits = Limits(idle_seconds=idle_seconds)
    async with open_runtime(path, durability=durability, limits=limits) as runtime:
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        await fill(flows, 0, _WARM_UP, "waiting")
        before = await _resident(runtime)
        await fill(flows, _WARM_UP, count, "waiting")
        after = await _resident(runtime)
        start = time.process_time()
        await asyncio.sleep(seconds)
        cpu = time.process_time() - start
        process.say(
            {"bytes": (after - before) / count, "cpu": cpu, "before": before, "after": after}
        )


async def _resident(runtime: Runtime) -> int:
    """Resident bytes once every flow has been let go of and free memory has been given back."""
    while runtime.statistics().flows_in_memory:  # noqa: ASYNC110 - nobody is told of it
        await asyncio.sleep(0.1)
    return process.resident_bytes()


if __name__ == "__main__":
    where, how, many, window, idle = sys.argv[1:]
    asyncio.run(_park(Path(where), cast(Durability, how), int(many), float(window), float(idle)))
