"""The mailbox of one flow: bounded, first in first out, with a reply slot in every envelope.

Nothing awaits between looking and taking, hence no lock. `put_nowait` holds the rule; `wait_for_room` is for
callers inside the process who would rather wait than be refused.
"""

from __future__ import annotations

import asyncio

import anyio
import msgspec

from flowstead.engine.unit import Unit
from flowstead.model.code import Refusal
from flowstead.model.command import Command
from flowstead.model.task import StoredTask


class Reply(msgspec.Struct, frozen=True, gc=False):
    """What became of a command, true on disk by the time anybody sees it.

    `doc` is the flow's record as the command left it (or found it, if refused), still encoded.
    """

    doc: bytes | None
    refusal: Refusal | None = None
    children: tuple[StoredTask | str, ...] = ()


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """A command on its way to an actor, who asked, and where the reply goes; `unit` is what is written with it."""

    command: Command
    actor: str
    reply: asyncio.Future[Reply]
    unit: Unit | None = None

    def answer(self, reply: Reply) -> None:
        """Settle the reply; settling one that nobody awaits any more does nothing."""
        if not self.reply.done():
            self.reply.set_result(reply)

    def fail(self, error: Exception) -> None:
        """Settle the reply with an exception."""
        if not self.reply.done():
            self.reply.set_exception(error)
            # The caller may be gone; its absence is no reason for a warning about the exception.
            self.reply.exception()


class Mailbox(msgspec.Struct, gc=False):
    """Envelopes waiting for their turn."""

    # Lists, though first in is first out: every live flow has one of these, and an empty deque takes 600 bytes.
    _bound: int
    _envelopes: list[Envelope] = []
    _room: list[asyncio.Future[None]] | None = None

    def __len__(self) -> int:
        return len(self._envelopes)

    def put_nowait(self, envelope: Envelope, *, bounded: bool = True) -> None:
        """Accept an envelope.

        The runtime's own reports are not bounded: each speaks for a child that was admitted under a limit.

        Raises:
            anyio.WouldBlock: The mailbox is full. The envelope was not accepted.
        """
        if bounded and len(self._envelopes) >= self._bound:
            raise anyio.WouldBlock
        self._envelopes.append(envelope)

    def holds(self, kind: type[Command]) -> bool:
        """Whether a command of this kind waits already, and will be decided by the clock as it is then."""
        return any(isinstance(envelope.command, kind) for envelope in self._envelopes)

    async def wait_for_room(self) -> None:
        """Return once an envelope may fit. Cancelling gives the place to the next in line."""
        place = -1
        while len(self._envelopes) >= self._bound:
            room = asyncio.get_running_loop().create_future()
            self._room = self._room or []
            # Let in, but overtaken by somebody who did not wait: back to the head of the line.
            self._room.insert(len(self._room) if place < 0 else place, room)
            place = 0
            try:
                await room
            except asyncio.CancelledError:
                if room.done() and not room.cancelled():
                    self._let_in(1)
                raise

    def take(self, most: int) -> list[Envelope]:
        """Take up to `most` envelopes in the order they came."""
        taken = self._envelopes[:most]
        del self._envelopes[:most]
        if self._room:
            self._let_in(len(taken))
        return taken

    def _let_in(self, count: int) -> None:
        while count and self._room:
            room = self._room.pop(0)
            if not room.done():
                room.set_result(None)
                count -= 1
