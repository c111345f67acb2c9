"""The postman: sends the updates that turns have written, until each is delivered or visibly given up.

Theory of operation. An update is a row before anybody is told. The postman reads what is due, hands each to the
notifier, and writes down what became of it. If the process dies between the two, the next one sends the update
again, under the same idempotency key: a receiver that keeps the keys sees it once. Of one flow only one update is
on its way at a time, oldest first. One that failed and waits for its next attempt holds up nobody, not even the
end of its own flow. A reminder goes out only while the wait is open.

A digest is made of what was put by for one owner until an instant: its items are sealed into one update in a single
transaction, and that is sent like any other. What is too long for one is sealed into several. One that cannot be
written holds up nobody else's, nor any other update.

How long to wait for the next attempt is a duration, kept as an instant: if the clock is put back, it moves along.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Final

import msgspec
from msgspec import UNSET

from flowstead.engine.clock import Clock, Handle, Ids
from flowstead.engine.committer import Committer
from flowstead.engine.desk import Post, write_alone
from flowstead.engine.guard import describe
from flowstead.engine.unit import Unit
from flowstead.errors import Fatal, RuntimeClosed, SnapshotUnreadable, StoreError, StoreInUse
from flowstead.log import get_logger
from flowstead.model.command import NoteDelivery
from flowstead.model.flow import FlowKey
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.model.update import PROGRESS, StoredUpdate, Update, UpdateKind, UpdateStatus
from flowstead.rules import due_waits, news
from flowstead.rules.classify import retry_after_of
from flowstead.rules.digests import Part, compose_text, parted
from flowstead.store import codec
from flowstead.store.codec import FlowWrite, UpdateRow
from flowstead.store.port import Scope, Store

log = get_logger(__name__)

_PAGE: Final = 256
_ALL: Final = 2**31 - 1
_AGAIN_SECONDS: Final = 1.0
_LONGEST_REASON: Final = 200
_LONGEST_WAIT: Final = 24 * 3600.0
_PUT_BACK_MS: Final = 1000
_EVER: Final = 2**53

Send = Callable[[Update], Awaitable[None]]


class Postman:
    """Sends what is due; `note` tells of new updates."""

    def __init__(
        self,
        store: Store,
        committer: Committer,
        clock: Clock,
        ids: Ids,
        *,
        send: Send,
        retry: Retry,
        limits: Limits,
        post: Post,
    ) -> None:
        self._store = store
        self._committer = committer
        self._clock = clock
        self._ids = ids
        self._send = send
        self._retry = retry
        self._limits = limits
        self._post = post
        self._look = asyncio.Event()
        self._is_told = asyncio.Event()
        self._armed: tuple[int, Handle] | None = None
        self._under_way: dict[int, asyncio.Task[None]] = {}
        # Updates on their way, and those that came back while a page was read: what it says of them is old.
        self._sent: set[int] = set()
        self._came_meanwhile: set[int] = set()
        # What flows have to tell after what they are being told, if no other flow stands in line.
        self._next: dict[int, deque[StoredUpdate]] = {}
        self._looked_at: int | None = None
        self._is_closed = False
        self.delivered = self.failed = 0

    def note(self, at: int) -> None:
        """There is an update to send, from this instant on, epoch ms."""
        if at <= self._clock.now():
            self._look.set()
        else:
            self._arm(at)

    async def run(self) -> None:
        """Send what is due, until stopped or overtaken; cancelled at shutdown."""
        while True:
            self._look.clear()
            is_read = True
            # One instant for all of them: what comes due meanwhile is still to come for each.
            now = self._clock.now()
            for job in (self._see_to_clock, self._seal_digests, self._send_due):
                try:
                    await job(now)
                except StoreInUse as error:
                    log.error("updates.lost", reason=str(error))
                    return self.stop()
                except StoreError as error:
                    log.error("updates.not_read", reason=str(error))
                    self._look_again()
                    is_read = False
            if is_read and not self._under_way and not self._look.is_set():
                self._is_told.set()
            await self._look.wait()

    async def wait_told(self) -> None:
        """Return once nothing is due: all was delivered, given up, or put off. Cancelling only stops the waiting.

        Raises:
            RuntimeClosed: Closing has begun, or another runtime has taken the store over.
        """
        self._is_told.clear()
        self._look.set()
        if not self._is_closed:
            await self._is_told.wait()
        if self._is_closed:
            raise RuntimeClosed("This runtime sends nothing any more: it is closing, or overtaken.")

    def stop(self) -> None:
        """Send nothing any more; what is on its way is cut off, and sent again by who owns the store next."""
        self._is_closed = True
        self._is_told.set()
        if self._armed is not None:
            self._armed[1].cancel()
        for task in self._under_way.values():
            task.cancel()

    async def aclose(self) -> None:
        """Stop, and see what was cut off to its end."""
        self.stop()
        if self._under_way:
            await asyncio.wait(self._under_way.values(), timeout=_AGAIN_SECONDS)

    # ---- the clock --------------------------------------------------------------------------------

    async def _see_to_clock(self, now: int) -> None:
        """What waits for its next attempt does not wait longer because the clock was put back."""
        last = self._looked_at
        if last is None:
            # How far it was put back while nobody lived, nobody knows.
            if await self._store.next_update_due(after=now) is not None:
                await self._bring_forward(partial(self._earlier, now=now))
        elif last - now >= _PUT_BACK_MS:
            await self._bring_forward(lambda update, at: max(now, at - (last - now)))
        self._looked_at = now

    async def _bring_forward(self, instant: Callable[[StoredUpdate, int], int]) -> None:
        self._next.clear()
        if self._under_way:
            # Else this might be written over what became of them.
            await asyncio.wait(self._under_way.values())
        waiting = await self._store.list_updates_due(until=_EVER, limit=_ALL)
        moved = [
            msgspec.structs.replace(update, due_at=at)
            for update in waiting
            if update.due_at is not None and (at := instant(update, update.due_at)) < update.due_at
        ]
        if moved:
            rows = [codec.update_row(update, fresh=False) for update in moved]
            await write_alone(self._committer, FlowWrite(None, (), (), (), rows))

    def _earlier(self, update: StoredUpdate, at: int, *, now: int) -> int:
        """When an update is due that an earlier process left, if it went by another clock."""
        longest = round(max(self._retry.max_delay, _LONGEST_WAIT) * 1000)
        return now if update.created_at > now or at > now + longest else at

    # ---- what is due ------------------------------------------------------------------------------

    async def _send_due(self, now: int) -> None:
        limit = self._limits.deliveries
        while self._has_room:
            self._came_meanwhile.clear()
            page = await self._store.list_updates_due(until=now, limit=limit)
            self._next.clear()
            for update in page:
                self._consider(update)
            if len(page) < limit:
                break
            # All of these may be of flows that are being told something right now.
            limit *= 4
        if not self._has_room:
            self._next.clear()
            return  # whoever comes back looks again
        if (at := await self._store.next_update_due(after=now)) is not None:
            self._arm(at)

    @property
    def _has_room(self) -> bool:
        return len(self._under_way) < self._limits.deliveries and not self._is_closed

    def _consider(self, update: StoredUpdate) -> None:
        if update.key in self._sent or update.key in self._came_meanwhile:
            return
        if update.flow_key in self._under_way:
            self._next.setdefault(update.flow_key, deque()).append(update)
        elif self._has_room:
            self._set_out(update)

    def _following(self, update: StoredUpdate) -> StoredUpdate | None:
        """What its flow has to tell next, as far as that is known for certain."""
        waiting = self._next.get(update.flow_key)
        if not waiting:
            return None
        following = waiting.popleft()
        # Progress may have been replaced since it was read, or be out of date.
        return None if following.slot == PROGRESS else following

    def _arm(self, at: int) -> None:
        if self._armed is not None:
            if self._armed[0] <= at:
                return
            self._armed[1].cancel()
        self._armed = (at, self._clock.call_at(at, self._fire))

    def _fire(self) -> None:
        self._armed = None
        self._look.set()

    def _look_again(self) -> None:
        self._clock.call_later(_AGAIN_SECONDS, self._look.set)

    # ---- one update -------------------------------------------------------------------------------

    def _set_out(self, update: StoredUpdate) -> None:
        task = asyncio.create_task(self._deliver(update), name="flowstead delivery")
        self._under_way[update.flow_key] = task
        self._sent.add(update.key)
        task.add_done_callback(partial(self._came_back, update))

    def _came_back(self, update: StoredUpdate, task: asyncio.Task[None]) -> None:
        del self._under_way[update.flow_key]
        self._sent.discard(update.key)
        self._came_meanwhile.add(update.key)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("delivery.crashed", error=repr(error))
            self._look_again()
        elif not self._is_closed:
            following = self._following(update)
            if following is None:
                self._look.set()
            else:
                self._set_out(following)

    async def _deliver(self, update: StoredUpdate) -> None:
        if update.kind is UpdateKind.REMINDER and await self._is_over(update):
            gone = msgspec.structs.replace(update, status=UpdateStatus.SUPERSEDED, due_at=None)
            return await self._write([codec.update_row(gone, fresh=False)])
        trying = msgspec.structs.replace(update, attempt=update.attempt + 1)
        error = await self._try(trying)
        now = self._clock.now()
        if error is None:
            done = msgspec.structs.replace(
                trying, status=UpdateStatus.DELIVERED, due_at=None, delivered_at=now, failure=None
            )
            await self._write([codec.update_row(done, fresh=False)])
            self.delivered += 1
            return None
        failed = msgspec.structs.replace(trying, failure=_told(error))
        if isinstance(error, Fatal) or failed.attempt >= self._retry.max_attempts:
            return await self._give_up(failed)
        wait = self._retry.delay_after(failed.attempt, self._ids.chance())
        wait = max(wait, min(retry_after_of(error) or 0.0, _LONGEST_WAIT))
        later = msgspec.structs.replace(failed, due_at=now + round(wait * 1000))
        log.warning("update.put_off", flow_id=update.flow_id, attempt=failed.attempt, seconds=wait)
        await self._write([codec.update_row(later, fresh=False)])
        self.note(now + round(wait * 1000))
        return None

    async def _is_over(self, reminder: StoredUpdate) -> bool:
        """Whether the wait that a reminder is of has been answered, or has ended with its flow."""
        waits = await self._store.list_open_waits(
            Scope(reminder.owner_key), flow_id=reminder.flow_id, after_key=0, limit=_ALL
        )
        return not any(due_waits.is_reminder_of(reminder, wait) for wait in waits)

    async def _try(self, update: StoredUpdate) -> Exception | None:
        """Hand it to the notifier, for so long and no longer; answers what went wrong."""
        over = asyncio.Event()
        sending = asyncio.create_task(_handed_over(self._send, update), name="flowstead notifier")
        sending.add_done_callback(lambda _: over.set())
        timer = self._clock.call_later(self._limits.delivery_seconds, over.set)
        try:
            await over.wait()
            if sending.done():
                return sending.result()
            return TimeoutError(f"not taken over within {self._limits.delivery_seconds:g} s")
        finally:
            # One that does not hear of it is left to itself; what it still does goes by the same key.
            timer.cancel()
            sending.cancel()

    async def _give_up(self, update: StoredUpdate) -> None:
        """No more attempts: the row says so, and so does the flow's history."""
        if await self._is_replaced(update):
            return None
        log.error(
            "update.delivery_failed",
            flow_id=update.flow_id,
            idempotency_key=update.idempotency_key,
            attempts=update.attempt,
        )
        self.failed += 1
        key = FlowKey(update.owner_key, update.flow_id)
        note = NoteDelivery(slot=update.slot, reason=update.failure or "")
        given_up = msgspec.structs.replace(update, status=UpdateStatus.DELIVERY_FAILED, due_at=None)
        row = codec.update_row(given_up, fresh=False)
        while not self._is_closed:
            # In the transaction that puts it into the flow's history.
            try:
                reply = await self._post(key, note, "runtime", unit=Unit(1, (), (row,)))
            except SnapshotUnreadable:
                return await self._write([row])
            except RuntimeClosed:
                return None  # still pending: the next runtime gives it up
            except StoreError as error:
                reason = str(error)
            else:
                if reply.refusal is None:
                    return None
                reason = reply.refusal.reason
            log.warning("update.not_recorded", reason=reason)
            await self._pause()
        return None

    async def _is_replaced(self, update: StoredUpdate) -> bool:
        """Whether a newer update has taken the place of one that was on its way."""
        if update.slot != PROGRESS:
            return False
        pending = await self._store.list_updates(
            Scope(update.owner_key),
            flow_id=update.flow_id,
            statuses=(UpdateStatus.PENDING,),
            after_key=0,
            # All of them: one that is not found here would be taken for replaced, and sent for ever.
            limit=_ALL,
        )
        return all(other.idempotency_key != update.idempotency_key for other in pending)

    async def _write(self, rows: Sequence[UpdateRow]) -> None:
        """Write until it is written: sending it again because of our own disk would be a pity."""
        while True:
            try:
                return await write_alone(self._committer, FlowWrite(None, (), (), (), rows))
            except StoreError as error:
                log.warning("update.not_recorded", reason=str(error))
            await self._pause()

    async def _pause(self) -> None:
        again = asyncio.Event()
        self._clock.call_later(_AGAIN_SECONDS, again.set)
        await again.wait()

    # ---- digests ----------------------------------------------------------------------------------

    async def _seal_digests(self, now: int) -> None:
        page = limit = max(_PAGE, self._limits.digest_items)
        failed: set[tuple[str, str | None]] = set()
        while items := await self._store.list_digests_due(until=now, limit=limit):
            groups = [(of, list(group)) for of, group in groupby(items, key=_digest_of)]
            is_all = len(items) < limit
            # The last group of a full page may go on. One that fills it is more than one digest anyway.
            whole = groups if is_all or len(groups) == 1 else groups[:-1]
            tried = [(of, group) for of, group in whole if of not in failed]
            failed |= {of for of, group in tried if not await self._seal_all(group, now)}
            if is_all:
                break
            # If those that cannot be written fill the page, the others are behind them.
            limit = limit * 2 if failed.issuperset(of for of, _ in whole) else page
        if failed:
            self._look_again()

    async def _seal_all(self, items: list[StoredUpdate], now: int) -> bool:
        """Seal what was put by for one owner and bucket, and answer whether that worked."""
        limits = self._limits
        try:
            for part in parted(items, most=limits.digest_items, most_bytes=limits.digest_bytes):
                await self._seal(part, now)
        except StoreError as error:
            # Once only: if nobody knows what became of it, the next look at the store tells.
            log.error("digest.not_sealed", items=len(items), reason=str(error))
            return False
        return True

    async def _seal(self, part: Part, now: int) -> None:
        first, last = part.items[0], part.items[-1]
        slot = f"digest:{first.bucket}:{last.key}"
        digest = msgspec.structs.replace(
            first,
            key=self._store.next_key(),
            slot=slot,
            kind=UpdateKind.DIGEST,
            idempotency_key=news.named_key(first.owner_key, first.flow_id, slot, 0),
            text=compose_text(first.bucket or "", len(part.items)),
            data=UNSET,
            items=part.told,
            created_at=now,
            due_at=now,
        )
        sealed = [
            codec.update_row(
                msgspec.structs.replace(item, status=UpdateStatus.DIGESTED, due_at=None),
                fresh=False,
            )
            for item in part.items
        ]
        rows = [codec.update_row(digest, fresh=True), *sealed]
        await write_alone(self._committer, FlowWrite(None, (), (), (), rows))


async def _handed_over(send: Send, update: StoredUpdate) -> Exception | None:
    """Answer what went wrong, whatever that is: the notifier is the host's code, and must not take us along."""
    try:
        await send(codec.read_update(codec.encode(update)))
    except Exception as error:
        return error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return RuntimeError(f"the notifier raised {type(error).__name__}")
    return None


def _digest_of(item: StoredUpdate) -> tuple[str, str | None]:
    return item.owner_key, item.bucket


def _told(error: Exception) -> str:
    """Why it did not go, in one line, for the record."""
    line = describe(error).message or type(error).__name__
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"
