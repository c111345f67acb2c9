"""What a simulated run depends on, as a record that can be written down and played again."""

from __future__ import annotations

from typing import Any

import msgspec

from flowstead.testing.disk import CALM, Faults


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run depends on.

    Attributes:
        seed: The order of steps, the disk's delays and faults, ids and chance.
        shuffle: Ready tasks run in any order, not in asyncio's.
        crashes: The process dies before these steps, counted over all processes.
        power_cuts: Whether the machine dies with it, and what was not synced is lost.
        faults: What the disk does wrong.
        durability: `full` or `normal`, as for `open_runtime`.
    """

    seed: int = 0
    shuffle: bool = False
    crashes: tuple[int, ...] = ()
    power_cuts: bool = False
    faults: Faults = CALM
    durability: str = "full"

    def __str__(self) -> str:
        shown = [f"seed={self.seed}"]
        shown += [name for name in ("shuffle", "power_cuts") if getattr(self, name)]
        if self.crashes:
            shown.append("crashes=" + ",".join(map(str, self.crashes)))
        for name in Faults.__struct_fields__:
            if value := getattr(self.faults, name):
                shown.append(f"{name}={value:g}")
        if self.durability != "full":
            shown.append(f"durability={self.durability}")
        return " ".join(shown)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """A schedule from what `str` made of one."""
        given: dict[str, Any] = {}
        faults: dict[str, float] = {}
        for word in text.split():
            name, is_value, value = word.partition("=")
            if name in Faults.__struct_fields__:
                faults[name] = float(value)
            elif name == "crashes":
                given[name] = tuple(int(step) for step in value.split(","))
            elif name == "seed":
                given[name] = int(value)
            elif name in cls.__struct_fields__:
                given[name] = value if is_value else True
            else:
                raise ValueError(f"{name!r} is nothing a schedule knows, in {text!r}.")
        return cls(**given, faults=Faults(**faults))
