"""The desk: where signals by key come in, and are handed to the flows that wait for them, or kept.

Theory of operation. A signal does not know its flow, so nobody's mailbox can put it in order. The desk does: each
key has a lane, worked off one job at a time. A job looks up, by an index, who waits on the key and what is kept for
it; then it hands the signal to those flows' actors, which decide, and is written with what they write; or it
writes the signal down to be kept. A flow that has opened a wait puts a job into the lane as well, to be handed what
is kept. Since every job reads what the jobs before it have committed, a signal and a wait cannot miss each other,
whichever comes first; and after a crash the same index tells which have met.

A signal with an id passes a lane of that id first, so that of two with the same id the second finds the first.
What is addressed to one flow is posted in the order in which it came, so that none with an id, which is looked up
first, is overtaken by one without. Each waits for earlier ones only, so these lines and the lanes cannot lock up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final, Protocol

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.engine.clock import Clock
from flowstead.engine.committer import Committer
from flowstead.engine.kept import Kept
from flowstead.engine.lanes import Lanes
from flowstead.engine.mailbox import Reply
from flowstead.engine.unit import Unit
from flowstead.errors import (
    CommitFailed,
    MailboxFull,
    OutcomeUnknown,
    RuntimeClosed,
    SnapshotUnreadable,
    StoreError,
)
from flowstead.log import get_logger
from flowstead.model.code import Code, Refusal
from flowstead.model.command import Command, Deliver
from flowstead.model.flow import FlowKey
from flowstead.model.signal import SignalCode, StoredSignal
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.store.port import Store, WaitLookup, WaitsFound

log = get_logger(__name__)

_PAGE: Final = 256
_AGAIN_SECONDS: Final = 1.0
_GONE: Final = frozenset({Code.UNAWAITED, Code.NOT_FOUND, Code.NOT_MANAGED})
_LATE: Final = frozenset({Code.LATE, Code.CANCEL_REQUESTED, Code.TERMINAL})


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a signal: who was woken, or why nobody was."""

    code: SignalCode
    reason: str
    flow_ids: tuple[str, ...] = ()
    expires_at: int | None = None


class Post(Protocol):
    """The way to a flow's mailbox."""

    def __call__(
        self,
        key: FlowKey,
        command: Command,
        actor: str,
        *,
        unit: Unit | None = None,
        bounded: bool = True,
    ) -> asyncio.Future[Reply]:
        """Post a command; the future is settled once what it says is durable."""
        ...


class Signal(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A signal as it comes in. Without a lifetime (seconds) it is not kept."""

    owner_key: str
    wait_key: str
    payload: Raw | UnsetType = UNSET
    signal_id: str | None = None
    lifetime: float | None = None
    actor: str = "session"


class _Written:
    """Told when a row that belongs to no flow is written."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def committed(self, first_position: int) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, error: StoreError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def write_alone(committer: Committer, write: FlowWrite) -> None:
    """Have a write committed that belongs to no flow's turn."""
    written = _Written()
    committer.submit(write, written)
    await written.done


class Desk:
    """Takes signals in; see above."""

    def __init__(
        self, store: Store, committer: Committer, clock: Clock, post: Post, *, most_kept: int
    ) -> None:
        self._store = store
        self._committer = committer
        self._clock = clock
        self._post = post
        self._lanes = Lanes()
        self._kept = Kept(store, clock, most_kept)
        # Of each flow the last that came and is not posted yet.
        self._unposted: dict[FlowKey, asyncio.Future[None]] = {}
        self._lookups: list[tuple[WaitLookup, asyncio.Future[WaitsFound]]] = []
        self._reading: asyncio.Task[None] | None = None
        self._to_see_to: set[tuple[str, str]] = set()
        # Whether there can be anything to hand over: usually not, and then opening a wait costs nothing here.
        self._may_be_kept = True
        self._has_come = False
        self._is_closed = False
        # Held by the one signal that is being written for several flows.
        self._together = asyncio.Lock()

    # ---- signals ----------------------------------------------------------------------------------

    async def take_in(self, signal: Signal) -> Receipt:
        """Wake who waits for the signal, or keep it.

        Cancelling the caller takes nothing back.

        Raises:
            MailboxFull: As many are kept for its owner as may be. Nothing changed.
            CommitFailed: Certainly not written; safe to send again.
            OutcomeUnknown: Nobody knows; with an id it is safe to send again.
        """
        # Before anything is looked up: whoever opens a wait from now on asks whether this one was kept.
        self._may_be_kept = self._has_come = True
        arrive = partial(self._in_lane, signal)
        if signal.signal_id is None:
            return await asyncio.shield(arrive())
        named = ("id", signal.owner_key, signal.signal_id)
        return await asyncio.shield(self._lanes.put(named, arrive))

    def _in_lane(self, signal: Signal) -> asyncio.Future[Receipt]:
        key = (signal.owner_key, signal.wait_key)
        return self._lanes.put(key, partial(self._arrive, signal))

    async def _arrive(self, signal: Signal) -> Receipt:
        while True:
            found = await self._find(signal.owner_key, signal.wait_key, signal.signal_id)
            if found.is_known:
                return Receipt(
                    code=SignalCode.DUPLICATE, reason="A signal with this id was taken in already."
                )
            if found.waiting and found.kept is not None:
                # It was here first.
                if await self._hand_over(found.kept, found.waiting):
                    continue
            elif found.waiting:
                receipt = await self._wake(signal, found.waiting)
                if receipt is not None and not _may_be_early(signal, receipt):
                    return receipt
            return await self._keep(signal, found)

    async def _wake(self, signal: Signal, flows: Sequence[FlowKey]) -> Receipt | None:
        """Hand the signal to these flows; None if none of them waits any more."""
        command = Deliver(
            wait_key=signal.wait_key, payload=signal.payload, signal_id=signal.signal_id
        )
        rows = () if signal.signal_id is None else (self._row(signal, taken_by=flows[0].flow_id),)
        replies = await self._deliver(flows, command, signal.actor, rows)
        return _receipt(flows, replies)

    async def _keep(self, signal: Signal, found: WaitsFound) -> Receipt:
        if signal.lifetime is None:
            if found.was_awaited and not found.is_live:
                reason = "Every flow that waited for this has ended."
                return Receipt(code=SignalCode.LATE, reason=reason)
            return Receipt(code=SignalCode.UNAWAITED, reason="Nobody waits for this.")
        expires_at = self._clock.now() + round(signal.lifetime * 1000)
        await self._kept.read()
        self._kept.add(signal.owner_key, expires_at)
        row = codec.signal_row(self._stored(signal, expires_at=expires_at), fresh=True)
        try:
            await write_alone(self._committer, FlowWrite(None, (), (), (row,)))
        except CommitFailed:
            self._kept.remove(signal.owner_key, expires_at)
            raise
        reason = "Nobody waits for this yet; it is kept."
        return Receipt(code=SignalCode.KEPT, reason=reason, expires_at=expires_at)

    def _row(self, signal: Signal, *, taken_by: str) -> codec.SignalRow:
        # The payload is in what it answered.
        stored = msgspec.structs.replace(self._stored(signal), payload=UNSET, taken_by=taken_by)
        return codec.signal_row(stored, fresh=True)

    def _stored(self, signal: Signal, *, expires_at: int | None = None) -> StoredSignal:
        return StoredSignal(
            key=self._store.next_key(),
            owner_key=signal.owner_key,
            wait_key=signal.wait_key,
            signal_id=signal.signal_id,
            payload=signal.payload,
            received_at=self._clock.now(),
            expires_at=expires_at,
        )

    # ---- waits that were opened -------------------------------------------------------------------

    def opened(self, key: FlowKey, wait_key: str) -> None:
        """A wait on a key is on disk: hand over what has been kept for it."""
        named = (key.owner_key, wait_key)
        if self._may_be_kept and not self._is_closed and named not in self._to_see_to:
            self._to_see_to.add(named)
            self._lanes.put(named, partial(self._see_to, *named))

    async def _see_to(self, owner_key: str, wait_key: str) -> None:
        # Waits that are opened from now on may be missed by what is read below.
        self._to_see_to.discard((owner_key, wait_key))
        try:
            found = await self._find(owner_key, wait_key, None, only_kept=True)
            while found.waiting and found.kept is not None:
                if not await self._hand_over(found.kept, found.waiting):
                    return
                found = await self._find(owner_key, wait_key, None, only_kept=True)
        except Exception as error:
            log.warning("signal.not_handed_over", reason=str(error))
            again = partial(self.opened, FlowKey(owner_key, ""), wait_key)
            self._clock.call_later(_AGAIN_SECONDS, again)

    async def _hand_over(self, kept: StoredSignal, flows: Sequence[FlowKey]) -> bool:
        """Give a kept signal to these flows; answers whether it is kept no more."""
        await self._kept.read()
        taken = msgspec.structs.replace(kept, taken_by=flows[0].flow_id)
        command = Deliver(wait_key=kept.wait_key, payload=kept.payload, signal_id=kept.signal_id)
        rows = (codec.signal_row(taken, fresh=False),)
        receipt = _receipt(flows, await self._deliver(flows, command, "signal", rows))
        if receipt is None or receipt.code is SignalCode.LATE:
            return False
        if receipt.code is SignalCode.WRONG_SHAPE:
            # Whoever sent it has gone; it must not stand in the way of a better one, nor keep its id from it.
            log.warning(
                "signal.turned_away",
                flow_id=flows[0].flow_id,
                signal_id=kept.signal_id,
                reason=receipt.reason,
            )
            await self._put_aside([msgspec.structs.replace(kept, signal_id=None)])
        self._kept.remove(kept.owner_key, kept.expires_at or 0)
        return True

    async def _put_aside(self, kept: Sequence[StoredSignal]) -> None:
        """Write that these are kept no more, and that nobody has taken them."""
        gone = [msgspec.structs.replace(signal, taken_by="") for signal in kept]
        rows = tuple(codec.signal_row(signal, fresh=False) for signal in gone)
        await write_alone(self._committer, FlowWrite(None, (), (), rows))

    async def recover(self) -> None:
        """Hand over what a crash has left unmatched."""
        kept = await self._kept.read()
        self._may_be_kept = kept or self._has_come
        if not kept:
            return
        after, now = 0, self._clock.now()
        while page := await self._store.list_met(after_key=after, limit=_PAGE, now=now):
            for _, key, wait_key in page:
                self.opened(key, wait_key)
            after = page[-1][0]

    # ---- flows ------------------------------------------------------------------------------------

    async def send(
        self,
        key: FlowKey,
        command: Command,
        actor: str,
        *,
        signal_id: str | None,
        wait_key: str,
    ) -> Reply | None:
        """Post an answer to one flow, once for each id and in the order of the calls; None if the id is known.

        Cancelling the caller takes nothing back.
        """
        before = self._unposted.get(key)
        if signal_id is None and before is None:
            return await asyncio.shield(self._post(key, command, actor))
        posted = self._unposted[key] = asyncio.get_running_loop().create_future()
        named = posted if signal_id is None else ("id", key.owner_key, signal_id)
        signal = Signal(owner_key=key.owner_key, wait_key=wait_key, signal_id=signal_id)
        job = partial(self._send_in_turn, key, command, actor, signal, before, posted)
        return await asyncio.shield(self._lanes.put(named, job))

    async def _send_in_turn(
        self,
        key: FlowKey,
        command: Command,
        actor: str,
        signal: Signal,
        before: asyncio.Future[None] | None,
        posted: asyncio.Future[None],
    ) -> Reply | None:
        unit, found = None, None
        if signal.signal_id is not None:
            found = self._look_up(key.owner_key, signal.wait_key, signal.signal_id)
        try:
            if before is not None:
                await before
            if found is not None:
                if (await found).is_known:
                    return None
                unit = Unit(1, (self._row(signal, taken_by=key.flow_id),))
            asked = self._post(key, command, actor, unit=unit)
        finally:
            posted.set_result(None)
            if self._unposted[key] is posted:
                del self._unposted[key]
        return await asked

    async def _deliver(
        self,
        flows: Sequence[FlowKey],
        command: Command,
        actor: str,
        rows: tuple[codec.SignalRow, ...],
    ) -> list[Reply]:
        # Past the bounds of mailboxes: of one key there is never more than one on its way to a flow.
        if len(flows) == 1:
            unit = Unit(1, rows) if rows else None
            try:
                return [await self._post(flows[0], command, actor, unit=unit, bounded=False)]
            except SnapshotUnreadable as error:
                return [_as_reply(error)]
        async with self._together:
            unit = Unit(len(flows), rows)
            asked = [self._try(key, command, actor, unit) for key in flows]
            replies = await asyncio.gather(*asked, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, RuntimeClosed):
                raise reply  # and nothing was written: the others were in one unit with it
        return [_as_reply(reply) for reply in replies]

    def _try(self, key: FlowKey, command: Command, actor: str, unit: Unit) -> asyncio.Future[Reply]:
        """Post to one of several; that one cannot be asked must not keep the others waiting."""
        try:
            return self._post(key, command, actor, unit=unit, bounded=False)
        except RuntimeClosed as error:
            refused: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            refused.set_exception(error)
            return refused

    # ---- looking up -------------------------------------------------------------------------------

    async def _find(
        self, owner_key: str, wait_key: str, signal_id: str | None, *, only_kept: bool = False
    ) -> WaitsFound:
        """Who waits and what is kept, once what has expired is out of the way of this look and of all to come."""
        while True:
            found = await self._look_up(owner_key, wait_key, signal_id, only_kept=only_kept)
            if not found.expired:
                return found
            await self._put_aside(found.expired)

    def _look_up(
        self, owner_key: str, wait_key: str, signal_id: str | None, *, only_kept: bool = False
    ) -> asyncio.Future[WaitsFound]:
        """Who waits and what is kept; many are asked in one read."""
        found: asyncio.Future[WaitsFound] = asyncio.get_running_loop().create_future()
        asked = WaitLookup(
            owner_key=owner_key,
            wait_key=wait_key,
            signal_id=signal_id,
            now=self._clock.now(),
            only_kept=only_kept,
        )
        self._lookups.append((asked, found))
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name="flowstead desk")
        return found

    async def _read(self) -> None:
        try:
            while self._lookups:
                asked, self._lookups = self._lookups[:_PAGE], self._lookups[_PAGE:]
                await self._read_page(asked)
        finally:
            self._reading = None

    async def _read_page(self, page: list[tuple[WaitLookup, asyncio.Future[WaitsFound]]]) -> None:
        try:
            answers = await self._store.look_up_waits([lookup for lookup, _ in page])
        except BaseException as error:
            failed = error if isinstance(error, Exception) else RuntimeClosed("closing")
            for _, future in page:
                if not future.done():
                    future.set_exception(failed)
                    future.exception()
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), answer in zip(page, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    async def aclose(self) -> None:
        """Answer who waits; flows take nothing more, so nothing new begins. What is kept the next runtime finds."""
        self._is_closed = True
        await self._lanes.drain()


def _may_be_early(signal: Signal, receipt: Receipt) -> bool:
    """Whether what comes too late for those who wait is kept: a key names no flow, and the next may wait for it."""
    return receipt.code is SignalCode.LATE and signal.lifetime is not None


def _as_reply(found: Reply | BaseException) -> Reply:
    if isinstance(found, Reply):
        return found
    if isinstance(found, SnapshotUnreadable):
        # A flow that cannot be read is nobody who waits.
        return Reply(None, Refusal(Code.NOT_FOUND, str(found)))
    if not isinstance(found, StoreError):
        raise found
    return Reply(None, Refusal(Code.PERSIST_FAILED, str(found)))


def _receipt(flows: Sequence[FlowKey], replies: Sequence[Reply]) -> Receipt | None:
    """What the flows say, taken together; None if none of them waits any more.

    Raises:
        CommitFailed, OutcomeUnknown, MailboxFull: What kept the signal from being taken.
    """
    woken = tuple(
        key.flow_id for key, reply in zip(flows, replies, strict=True) if reply.refusal is None
    )
    if woken:
        return Receipt(code=SignalCode.MATCHED, reason="Taken.", flow_ids=woken)
    refusals = [reply.refusal for reply in replies if reply.refusal is not None]
    for refusal in refusals:
        if refusal.code is Code.WRONG_SHAPE:
            return Receipt(code=SignalCode.WRONG_SHAPE, reason=refusal.reason)
    for refusal in refusals:
        if refusal.code not in _GONE and refusal.code not in _LATE:
            raise unsettled(refusal)
    for refusal in refusals:
        if refusal.code in _LATE:
            return Receipt(code=SignalCode.LATE, reason=refusal.reason)
    return None


def unsettled(refusal: Refusal) -> Exception:
    """Why an answer was not decided, as an exception."""
    if refusal.code is Code.OUTCOME_UNKNOWN:
        return OutcomeUnknown(refusal.reason)
    if refusal.code is Code.OVERLOADED:
        return MailboxFull(refusal.reason)
    return CommitFailed(refusal.reason)
