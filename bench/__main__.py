"""`python -m bench`: run the workloads and print one table."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bench import machine
from bench.measure import Row, Setup, Stopwatch
from bench.table import print_table
from bench.workloads import (
    asleep,
    children,
    crowd,
    lifecycles,
    mutations,
    outbox,
    overhead,
    parked,
    reopening,
    signals,
    tree,
    waking,
)
from flowstead.store.sqlite import Durability

_WORKLOADS: Final[dict[str, Callable[[Setup], list[Row]]]] = {
    "w1": mutations.run,
    "w2": lifecycles.run,
    "w3": children.run,
    "w4": reopening.run,
    "w5": parked.run,
    "w6": waking.run,
    "w7": overhead.run,
    "w8": crowd.run,
    "w9": tree.run,
    "w10": signals.run,
    "w11": asleep.run,
    "w12": outbox.run,
}
_DURABILITIES: Final[dict[str, tuple[Durability, ...]]] = {
    "full": ("full",),
    "normal": ("normal",),
    "both": ("full", "normal"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for."""
    asked = _parser().parse_args(arguments)
    watch, rows = Stopwatch(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="flowstead-bench-", dir=asked.dir) as folder:
        print(machine.facts(Path(folder)), flush=True)
        for name in asked.only:
            for durability in _DURABILITIES[asked.durability]:
                print(f"… {name} {durability}", flush=True)
                rows += _WORKLOADS[name](Setup(Path(folder), durability, asked.quick))
    print()
    print_table(rows)
    print(f"\n{watch.seconds:.0f} s in all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", type=_names, default=list(_WORKLOADS), help="w1,w2,…; all unless given"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--durability", choices=list(_DURABILITIES), default="both")
    parser.add_argument("--dir", help="where the files go; the system's place for temporary files")
    return parser


def _names(given: str) -> list[str]:
    names = [name.strip().lower() for name in given.split(",")]
    for name in names:
        if name not in _WORKLOADS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(_WORKLOADS)}")
    return names


if __name__ == "__main__":
    main()
