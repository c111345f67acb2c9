"""The slots that all flows of a runtime share: how many children may run at once, in all and of each function.

Theory of operation. A turn that starts a child takes all the slots it needs before anything is written. Where one
is missing, the child stays in its flow's line, and the flow stands in the line of those who need the same. Slots
that come free are kept, all that are needed together, for the flow that has waited longest of those that can be
helped; it is woken, and what it has no use for any more at the end of its turn is offered on. So no slot lies
idle while somebody could use it, and nobody keeps a part of what he needs from others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, TypeAlias

from flowstead.model.flow import FlowKey
from flowstead.model.task import StoredTask

_ANY: Final = ""
_Names: TypeAlias = tuple[str, ...]


class Slots:
    """Who holds slots, and who waits for some. `limit_of` knows the functions that have a limit of their own."""

    def __init__(
        self, most: int, limit_of: Callable[[str], int | None], wake: Callable[[FlowKey], object]
    ) -> None:
        self._most = most
        self._limit_of = limit_of
        self._wake = wake
        self._held: dict[str, _Names] = {}
        self._used: Counter[str] = Counter()
        self._arrivals = 0
        self._lines: dict[_Names, dict[FlowKey, int]] = {}
        self._kept: dict[FlowKey, Counter[str]] = {}
        self._kept_in_all: Counter[str] = Counter()

    def room_for(self, key: FlowKey) -> FlowRoom:
        """The slots as one flow's turn sees them."""
        return FlowRoom(self, key)

    def take(self, key: FlowKey, task: StoredTask) -> bool:
        """Take the child's slots, all or none; without one, its flow stands in line."""
        if task.task_id in self._held:
            return True
        names = self._names(task)
        if not all(self._is_free(name, key) for name in names):
            self._arrivals += 1
            self._lines.setdefault(names, {}).setdefault(key, self._arrivals)
            return False
        self._hold(key, task, names)
        return True

    def hold(self, key: FlowKey, task: StoredTask) -> None:
        """Count a child that runs whether there is room or not: something of it runs already."""
        if task.task_id not in self._held:
            self._hold(key, task, self._names(task))

    def give_back(self, task_id: str) -> None:
        """The child does not run any more."""
        names = self._held.pop(task_id, ())
        for name in names:
            self._used[name] -= 1
        if names and self._lines:
            self._offer()

    def turn_over(self, key: FlowKey) -> None:
        """The flow's turn has ended; what was kept for it and not taken is offered to others."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._kept_in_all.subtract(kept)
            self._offer()

    def _names(self, task: StoredTask) -> _Names:
        assert task.launch is not None
        if not task.launch.holds_slot:
            return ()
        function = task.launch.function
        if function is None or self._limit_of(function) is None:
            return (_ANY,)
        return (_ANY, function)

    def _limit(self, name: str) -> int:
        return self._most if name == _ANY else self._limit_of(name) or self._most

    def _is_free(self, name: str, key: FlowKey) -> bool:
        kept = self._kept.get(key)
        return (kept is not None and kept[name] > 0) or self._spare(name) > 0

    def _spare(self, name: str) -> int:
        return self._limit(name) - self._used[name] - self._kept_in_all[name]

    def _hold(self, key: FlowKey, task: StoredTask, names: _Names) -> None:
        self._held[task.task_id] = names
        kept = self._kept.get(key)
        for name in names:
            self._used[name] += 1
            if kept is not None and kept[name] > 0:
                kept[name] -= 1
                self._kept_in_all[name] -= 1

    def _offer(self) -> None:
        """Keep what is free for those who have waited longest and can be helped with it, and wake them."""
        while (names := self._next_line()) is not None:
            line = self._lines[names]
            key = next(iter(line))
            del line[key]
            if not line:
                del self._lines[names]
            self._kept.setdefault(key, Counter()).update(names)
            self._kept_in_all.update(names)
            self._wake(key)

    def _next_line(self) -> _Names | None:
        """Of the lines whose needs are all free, the one whose head has waited longest."""
        free = [names for names in self._lines if all(self._spare(name) > 0 for name in names)]
        return min(free, key=lambda names: next(iter(self._lines[names].values())), default=None)


class FlowRoom:
    """The slots, asked for by one flow."""

    __slots__ = ("_key", "_slots")

    def __init__(self, slots: Slots, key: FlowKey) -> None:
        self._slots = slots
        self._key = key

    def take(self, task: StoredTask) -> bool:
        """Keep slots for the child, or have its flow woken when there are some."""
        return self._slots.take(self._key, task)
