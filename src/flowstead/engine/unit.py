"""A unit: turns of several flows that are written together or not at all, with rows that belong to none of them.

A signal that several flows wait for wakes all of them in one transaction, the one that records it. Each flow
decides in a turn of its own; whoever has something to write joins the unit, whoever has not leaves it, and the last
of them makes it whole. One that cannot be asked vetoes it: then nothing is written for anybody. At most one unit
with several members is under way at a time, so that no two wait for each other.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from flowstead.errors import CommitFailed
from flowstead.store.codec import FlowWrite, SignalRow, UpdateRow

if TYPE_CHECKING:
    from flowstead.engine.committer import Writer


class Unit:
    """`join`, `leave` or `veto` once for each member; the last call answers what there is to write."""

    __slots__ = ("_is_vetoed", "_joined", "_left", "_signals", "_updates", "members")

    def __init__(
        self,
        members: int,
        signals: tuple[SignalRow, ...] = (),
        updates: tuple[UpdateRow, ...] = (),
    ) -> None:
        self.members = self._left = members
        self._signals, self._updates = signals, updates
        self._is_vetoed = False
        self._joined: list[tuple[FlowWrite, Writer]] = []

    def join(self, write: FlowWrite, writer: Writer) -> list[tuple[FlowWrite, Writer]]:
        """A member has something to write."""
        self._joined.append((write, writer))
        return self.leave()

    def veto(self) -> list[tuple[FlowWrite, Writer]]:
        """A member could not be asked: without it there is nothing to be written for the others."""
        self._is_vetoed = True
        return self.leave()

    def leave(self) -> list[tuple[FlowWrite, Writer]]:
        """A member has nothing to write. Nothing is due as long as others have not said."""
        self._left -= 1
        if self._left or not self._joined:
            return []
        if self._is_vetoed:
            error = CommitFailed("One of the flows could not be asked. Nothing was written.")
            for _, writer in self._joined:
                asyncio.get_running_loop().call_soon(writer.failed, error)
            return []
        (write, writer), *others = self._joined
        return [(self._with_rows(write), writer), *others]

    def _with_rows(self, write: FlowWrite) -> FlowWrite:
        if not self._signals and not self._updates:
            return write
        return msgspec.structs.replace(
            write,
            signals=(*write.signals, *self._signals),
            updates=(*write.updates, *self._updates),
        )
