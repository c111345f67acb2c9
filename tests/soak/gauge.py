"""What a process uses while it is under load, sample by sample, and whether that stays flat.

The first half of a run is for caches, pools and the allocator to find their size. In the second half a straight
line through the samples must stay level: a leak of a few bytes for each call is a slope, a garbage collection
or a reopening is noise around it.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

MIB = 1024 * 1024
BEAT_SECONDS = 0.02
WAL_BOUND = 80 * MIB
"""A busy log is folded back from 64 MiB on, between two transactions."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the process and its file."""

    second: float
    rss: int
    handles: int
    threads: int
    tasks: int
    objects: int
    wal: int
    file: int
    calls: int
    flow_writes: int
    commits: int
    live_flows: int
    longest_turn_ms: float


class Rest(msgspec.Struct, frozen=True, kw_only=True):
    """What is left open while no runtime is."""

    handles: int
    threads: int
    tasks: int


class Heartbeat:
    """A timer that ought to come every few milliseconds, and how late it came at worst."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worst = 0.0
        self._due = self._loop.time()
        self._beat()

    def _beat(self) -> None:
        now = self._loop.time()
        self._worst = max(self._worst, now - self._due)
        self._due = now + BEAT_SECONDS
        self._timer = self._loop.call_at(self._due, self._beat)

    def worst_ms(self) -> float:
        """The longest turn of the loop since it was last asked for."""
        worst, self._worst = self._worst, 0.0
        return round(worst * 1000, 1)

    def stop(self) -> None:
        self._timer.cancel()


def size_of(path: Path) -> int:
    """By stat: opening and closing the file in the owner's process would drop SQLite's locks."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def use_of_process() -> dict[str, int]:
    """Memory, handles and what lives in the interpreter, now."""
    process = psutil.Process()
    with process.oneshot():
        return {
            "rss": process.memory_info().rss,
            "handles": process.num_fds(),
            "threads": process.num_threads(),
            "tasks": len(asyncio.all_tasks()),
            "objects": len(gc.get_objects()),
        }


def peak_rss() -> int:
    """The most memory the process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth(samples: Sequence[Sample], name: str) -> float:
    """How much a figure rises over these samples, by the straight line through them."""
    seconds = [sample.second for sample in samples]
    line = statistics.linear_regression(seconds, [getattr(sample, name) for sample in samples])
    return line.slope * (seconds[-1] - seconds[0])


def second_half(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[len(samples) // 2 :]


def allowed_growth(samples: Sequence[Sample]) -> dict[str, float]:
    """How much each figure may rise in the second half and still count as flat."""
    half = second_half(samples)
    usual = {
        name: statistics.median(getattr(sample, name) for sample in half)
        for name in ("rss", "objects", "tasks")
    }
    return {
        "rss": 4 * MIB + usual["rss"] / 20,
        "objects": 10_000 + usual["objects"] / 20,
        "tasks": 20 + usual["tasks"] / 4,
    }


def not_flat(samples: Sequence[Sample], rests: Sequence[Rest]) -> list[str]:
    """What grows, as sentences; none if everything stays level."""
    found = []
    for name, allowed in allowed_growth(samples).items():
        grown = growth(second_half(samples), name)
        if grown > allowed:
            found.append(f"{name} rose by {grown:.0f} in the second half; {allowed:.0f} is flat")
    half = len(samples) // 2
    for name in ("handles", "threads"):
        before = max(getattr(sample, name) for sample in samples[:half])
        after = max(getattr(sample, name) for sample in samples[half:])
        if after > before:
            found.append(f"{name} rose from {before} in the first half to {after} in the second")
    largest = max(sample.wal for sample in samples)
    if largest > WAL_BOUND:
        found.append(f"the log grew to {largest} bytes; it is bounded by {WAL_BOUND}")
    for name in ("handles", "threads", "tasks"):
        # A thread that has just been told to end may still be seen once; one that stays is seen every time.
        least = min((getattr(rest, name) for rest in rests[len(rests) // 2 :]), default=0)
        if rests and least > getattr(rests[0], name):
            found.append(f"closing left {least} {name} in the second half, {rests[0]} at first")
    return found
