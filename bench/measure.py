"""Measured values: one pass, a pair of passes run in turn, and the row that ends up in the table."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from flowstead.store.sqlite import Durability


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table. `is_met` is None where there is no target."""

    workload: str
    durability: Durability
    ours: str
    ceiling: str = "-"
    ratio: float | None = None
    target: str = "-"
    is_met: bool | None = None
    extra: str = ""


class Pass(msgspec.Struct, frozen=True):
    """One timed pass: operations per second, and the latency of each where it was taken."""

    rate: float
    latencies: list[float] = []
    commits: int = 0


Play: TypeAlias = Callable[[Path], Awaitable[Pass]]


class Setup(msgspec.Struct, frozen=True):
    """What a workload is given: where its files go, how durable they are, and how large it may be."""

    folder: Path
    durability: Durability
    quick: bool

    def size(self, full: int, quick: int) -> int:
        """The full size, or the small one of a quick run."""
        return quick if self.quick else full

    def fresh_path(self) -> Path:
        """A file nobody has used."""
        return self.folder / f"{next(_numbers)}.db"


class Pair(msgspec.Struct, frozen=True):
    """The passes of ours and of the ceiling, taken in turn."""

    ours: list[Pass]
    ceiling: list[Pass]

    def row(
        self, workload: str, durability: Durability, *, least: float | None, extra: str = ""
    ) -> Row:
        """Medians, their ratio, and its spread from pair to pair. `least` counts under `full` only."""
        least = least if durability == "full" else None
        mine, top = median_rate(self.ours), median_rate(self.ceiling)
        ratios = sorted(o.rate / c.rate for o, c in zip(self.ours, self.ceiling, strict=True))
        spread = f"ratios {ratios[0]:.2f}..{ratios[-1]:.2f}" if len(ratios) > 1 else ""
        return Row(
            workload=workload,
            durability=durability,
            ours=f"{mine:,.0f}/s",
            ceiling=f"{top:,.0f}/s",
            ratio=mine / top,
            target="-" if least is None else f"≥ {least:g}",
            is_met=None if least is None else mine / top >= least,
            extra="; ".join(part for part in (extra, spread) if part),
        )


def take_in_turn(setup: Setup, ours: Play, ceiling: Play) -> Pair:
    """Ours, ceiling, ours, ceiling …, each on a loop and a file of its own."""
    pair = Pair([], [])
    for _ in range(setup.size(3, 1)):
        pair.ours.append(take(setup, ours))
        pair.ceiling.append(take(setup, ceiling))
    return pair


def take(setup: Setup, play: Play) -> Pass:
    """One pass on a fresh loop and a fresh file, which is removed afterwards."""
    path = setup.fresh_path()
    gc.collect()

    async def run() -> Pass:
        return await play(path)

    try:
        return asyncio.run(run())
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Remove a database with everything that lies beside it."""
    for file in path.parent.glob(path.name + "*"):
        file.unlink()


def copy(origin: Path, path: Path) -> None:
    """Copy a database nobody has open, log and all, and see the copy on the disk."""
    for suffix in ("", "-wal"):
        original = origin.with_name(origin.name + suffix)
        if original.exists():
            twin = path.with_name(path.name + suffix)
            shutil.copyfile(original, twin)
            with twin.open("rb") as file:
                os.fsync(file.fileno())


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def rate(self, operations: int) -> float:
        """Operations per second so far."""
        return operations / self.seconds


def median_rate(passes: Sequence[Pass]) -> float:
    """The median of the passes."""
    return statistics.median(each.rate for each in passes)


def quantiles(passes: Sequence[Pass]) -> str:
    """p50 and p99 over all latencies of the passes, in milliseconds."""
    p50, p99 = (quantile(passes, share) * 1000 for share in (0.5, 0.99))
    return f"p50 {p50:.2f} p99 {p99:.2f} ms"


def quantile(passes: Sequence[Pass], share: float) -> float:
    """The latency, in seconds, that so large a share of all of them stays below; with 1.0 the longest."""
    latencies = sorted(itertools.chain.from_iterable(each.latencies for each in passes))
    return latencies[min(int(len(latencies) * share), len(latencies) - 1)]


_numbers = itertools.count(1)
