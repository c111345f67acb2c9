"""The final table: drawn for a terminal, plain columns for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.measure import Row

_COLUMNS: Final = ("workload", "durability", "ours", "ceiling", "ratio", "target", "", "extra")
_RIGHT: Final = frozenset({"ours", "ceiling", "ratio", "target"})
_VERDICTS: Final = {True: "ok", False: "BELOW", None: ""}


def print_table(rows: Sequence[Row]) -> None:
    """Print every row."""
    cells = [_cells(row) for row in rows]
    if sys.stdout.isatty():
        table = Table()
        for name in _COLUMNS:
            table.add_column(name, justify="right" if name in _RIGHT else "left")
        for line in cells:
            table.add_row(*line)
        Console().print(table)
        return
    lines = [_COLUMNS, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    for line in lines:
        padded = [
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, line, widths, strict=True)
        ]
        print("  ".join(padded).rstrip())


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.workload,
        row.durability,
        row.ours,
        row.ceiling,
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        row.target,
        _VERDICTS[row.is_met],
        row.extra,
    )
