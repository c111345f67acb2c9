"""Whether what callers saw can be put in one order that agrees with time.

The general question is hard; here it is easy, because the store's history is that order already. Each position
of the history was written at an instant, and for each call the specification says at which positions its answer
is right. So a call is in order if one of these positions is no older than what had been acknowledged before the
call began, and no younger than what was durable when it returned. The smallest such position is what the call
proves to have been, and no later call may fall behind it.

Instants are ticks: one count of calls begun, calls answered and commits written, over the whole world.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.simulation.model import Wrong


class NotLinear(Wrong):
    """No order of the calls explains what their callers saw."""


@dataclass(frozen=True)
class Seen:
    """One answered call.

    `true_at` are the ranges of positions, both ends included, at which its answer is right. A call that changed
    something has `made`, the position of its own first event. `is_read` calls see whole commits only.
    """

    name: str
    invoked: int
    returned: int
    true_at: Sequence[tuple[int, int]] = ()
    made: int | None = None
    is_read: bool = False


class Order:
    """The history's side: feed it commits as they are written and calls as they are answered."""

    def __init__(self) -> None:
        self.ticks: list[int] = [0]
        """When each position became durable; position 0 is before everything."""
        self.ends: list[int] = [0]
        """The last position of each commit."""
        self._proofs: list[tuple[int, int]] = [(0, 0)]
        self._made: dict[int, str] = {}

    @property
    def last(self) -> int:
        return len(self.ticks) - 1

    def commit(self, events: int, tick: int) -> None:
        """So many events were written at this instant."""
        self.ticks.extend([tick] * events)
        self.ends.append(self.last)

    def cut(self, last: int) -> list[str]:
        """The store has lost what came after a position; answers whose calls lost their mutation."""
        del self.ticks[last + 1 :]
        self.ends = [end for end in self.ends if end < last] + [last]
        self._proofs = [(tick, min(position, last)) for tick, position in self._proofs]
        return [self._made.pop(position) for position in sorted(self._made) if position > last]

    def acknowledged(self, tick: int) -> int:
        """The newest position that anybody had been told of before an instant."""
        return self._proofs[bisect_left(self._proofs, (tick, -1)) - 1][1]

    def take(self, call: Seen) -> int:
        """Put a call in its place; calls come in the order in which they returned.

        Returns:
            The position the call proves to have been.

        Raises:
            NotLinear: There is no place for it.
        """
        floor = self.acknowledged(call.invoked)
        proven = self._place_of_change(call, floor) if call.made else self._place(call, floor)
        newest = max(proven, self._proofs[-1][1])
        self._proofs.append((max(call.returned, self._proofs[-1][0]), newest))
        return proven

    def _place_of_change(self, call: Seen, floor: int) -> int:
        made = call.made
        assert made is not None
        if made > self.last:
            raise NotLinear(f"{call.name}: lost update: no position {made} in the history")
        if made in self._made:
            raise NotLinear(f"{call.name}: {self._made[made]} made position {made} as well")
        if made <= floor:
            raise NotLinear(
                f"{call.name}: made {made}, but {floor} was acknowledged before it began"
            )
        if not call.invoked < self.ticks[made] <= call.returned:
            raise NotLinear(
                f"{call.name}: {made} was written at {self.ticks[made]}, not between"
                f" {call.invoked} and {call.returned}"
            )
        self._made[made] = call.name
        return made

    def _place(self, call: Seen, floor: int) -> int:
        if not call.true_at:
            raise NotLinear(f"{call.name}: its answer was never true")
        for first, last in sorted(call.true_at):
            place = self._next_whole(max(first, floor)) if call.is_read else max(first, floor)
            if place <= min(last, self.last):
                if self.ticks[place] <= call.returned:
                    return place
                raise NotLinear(
                    f"{call.name}: true at {place} only, which was durable at {self.ticks[place]},"
                    f" after the answer at {call.returned}"
                )
        raise NotLinear(
            f"{call.name}: stale: true at {list(call.true_at)}, but {floor} was acknowledged before"
            f" it began at {call.invoked}"
        )

    def _next_whole(self, position: int) -> int:
        """The first position from here on at which a commit is complete."""
        place = bisect_left(self.ends, position)
        return self.ends[place] if place < len(self.ends) else self.last + 1


def check(commits: Iterable[tuple[int, int]], calls: Iterable[Seen]) -> None:
    """Check a whole history: commits as (events, tick), and all answered calls.

    Raises:
        NotLinear: No order explains it.
    """
    order = Order()
    for events, tick in commits:
        order.commit(events, tick)
    for call in sorted(calls, key=lambda call: call.returned):
        order.take(call)
