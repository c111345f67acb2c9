"""The feed: committed events, live, without gaps, and resumable from a number.

A watcher keeps a bounded queue of live events. One that falls behind loses the queue, not the events: it reads
on in the history from where it was and comes back to live events when it has caught up. The same road serves a
watcher that starts from an old number. A slow watcher therefore costs memory to nobody and delays no commit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from flowstead.errors import FlowNotFound, RuntimeClosed
from flowstead.model.code import NOT_FOUND
from flowstead.model.event import Event
from flowstead.model.flow import FlowKey
from flowstead.store import codec
from flowstead.store.codec import EventRow
from flowstead.store.port import Scope, Store

_PAGE: Final = 500


class Watcher:
    """One subscription: `async with … as events: async for event in events`.

    Of one flow, events are numbered by `seq`; of a whole scope, by `position`. Cancelling a wait for the next
    event loses none.
    """

    def __init__(
        self, feed: Feed, scope: Scope, flow_id: str | None, after: int | None, bound: int
    ) -> None:
        self._feed = feed
        self.scope = scope
        self.flow_id = flow_id
        self.key: FlowKey | None = None
        self._cursor = after
        self._bound = bound
        self._live: deque[tuple[bytes, int]] = deque()
        self._page: deque[Event] = deque()
        self._behind = True
        self._news = asyncio.Event()
        self._closed = False

    async def __aenter__(self) -> Watcher:
        """Start watching. Cancelling the caller leaves nothing that watches.

        Raises:
            FlowNotFound: No such flow.
            RuntimeClosed: Nothing more will happen to watch.
        """
        if self.flow_id is not None:
            self.key = await self._feed.find(self.scope, self.flow_id)
            self.scope = Scope(self.key.owner_key)
        self._feed.add(self)
        try:
            if self._cursor is None:
                self._cursor = await self._feed.newest(self.scope, self.flow_id)
        except BaseException:
            self._feed.discard(self)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching. Cancelling cannot come in between: nothing is waited for."""
        self._closed = True
        self._feed.discard(self)

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Event:
        """The next event. Ends when the runtime is closed, once everything committed has been seen.

        Cancelling the wait loses none.
        """
        if self._cursor is None:
            raise RuntimeError("watch is an async context manager: use `async with` around it.")
        while True:
            if self._page:
                return self._pass(self._page.popleft())
            if self._behind:
                await self._catch_up()
            elif self._live:
                event = codec.read_event(*self._live.popleft())
                if self._number(event) > self._cursor:
                    return self._pass(event)
            elif self._closed:
                raise StopAsyncIteration
            else:
                self._news.clear()
                await self._news.wait()

    def offer(self, doc: bytes, position: int) -> None:
        """A committed event. Never waits: what does not fit is left to the history."""
        if len(self._live) >= self._bound:
            self.fall_behind()
        if not self._behind:
            self._live.append((doc, position))
        self._news.set()

    def fall_behind(self) -> None:
        """There may be events that were never offered: read on in the history."""
        self._live.clear()
        self._behind = True
        self._news.set()

    def close(self) -> None:
        """No further events will come."""
        self._closed = True
        self._news.set()

    async def _catch_up(self) -> None:
        # What is committed while the page is read is offered live as well; the cursor drops doubles.
        assert self._cursor is not None
        if self._closed:
            raise RuntimeClosed(
                f"The runtime was closed before this watcher had seen all. Resume after {self._cursor}."
            )
        self._behind = False
        try:
            page = await self._feed.page(self.scope, self.flow_id, self._cursor, _PAGE)
        except BaseException:
            self._behind = True
            raise
        self._page.extend(page)
        if len(page) == _PAGE:
            self._behind = True

    def _pass(self, event: Event) -> Event:
        self._cursor = self._number(event)
        return event

    def _number(self, event: Event) -> int:
        return event.position if self.flow_id is None else event.seq


class Feed:
    """Hands committed events to whoever watches."""

    def __init__(self, store: Store, bound: int) -> None:
        self._store = store
        self._bound = bound
        self._of_flow: dict[FlowKey, set[Watcher]] = {}
        self._of_owner: dict[str | None, set[Watcher]] = {}
        self._closed = False

    def watch(self, scope: Scope, flow_id: str | None, after: int | None) -> Watcher:
        """A watcher, not yet entered."""
        return Watcher(self, scope, flow_id, after, self._bound)

    def announce(self, key: FlowKey, rows: Sequence[EventRow], first_position: int) -> None:
        """Events of one flow that have just been committed."""
        if not self._of_flow and not self._of_owner:
            return
        watchers = self._watchers_of(key)
        if not watchers:
            return
        for index, row in enumerate(rows):
            doc = row.doc.encode()
            for watcher in watchers:
                watcher.offer(doc, first_position + index)

    def doubt(self, key: FlowKey) -> None:
        """Events of this flow are on disk that were never announced."""
        for watcher in self._watchers_of(key):
            watcher.fall_behind()

    def close(self) -> None:
        """End every watcher once it has seen what is committed."""
        self._closed = True
        for watchers in (*self._of_flow.values(), *self._of_owner.values()):
            for watcher in tuple(watchers):
                watcher.close()

    def add(self, watcher: Watcher) -> None:
        """Start offering events to a watcher."""
        if self._closed:
            raise RuntimeClosed("This runtime is closed; nothing more will happen to watch.")
        self._place(watcher).add(watcher)

    def discard(self, watcher: Watcher) -> None:
        """Stop offering events to a watcher."""
        place = self._place(watcher)
        place.discard(watcher)
        if not place:
            if watcher.key is None:
                del self._of_owner[watcher.scope.owner_key]
            else:
                del self._of_flow[watcher.key]

    async def find(self, scope: Scope, flow_id: str) -> FlowKey:
        """The flow a watcher means."""
        flow = await self._store.find_flow(scope, flow_id)
        if flow is None:
            raise FlowNotFound(NOT_FOUND.reason)
        return FlowKey(flow.owner_key, flow.flow_id)

    async def newest(self, scope: Scope, flow_id: str | None) -> int:
        """The number of the newest event there is."""
        if flow_id is None:
            return await self._store.last_position()
        return await self._store.last_seq(scope, flow_id)

    async def page(self, scope: Scope, flow_id: str | None, after: int, limit: int) -> list[Event]:
        """Events from the history."""
        if flow_id is None:
            return await self._store.events_after(scope, after, limit)
        return await self._store.history(scope, flow_id, after_seq=after, limit=limit)

    def _place(self, watcher: Watcher) -> set[Watcher]:
        if watcher.key is None:
            return self._of_owner.setdefault(watcher.scope.owner_key, set())
        return self._of_flow.setdefault(watcher.key, set())

    def _watchers_of(self, key: FlowKey) -> list[Watcher]:
        return [
            *self._of_flow.get(key, ()),
            *self._of_owner.get(key.owner_key, ()),
            *self._of_owner.get(None, ()),
        ]
