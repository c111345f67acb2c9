"""The port of a store: few verbs, each a promise. SQLite keeps it today; another database could tomorrow.

One runtime owns a store at a time. `open` takes ownership, `commit` proves it in every transaction, and a
runtime that was overtaken can read, except for what there is to send, but never write. Reads say on whose behalf
they are made: a `Scope` of one owner finds that owner's rows only, by the query itself.

Keys are the store's own numbers for rows, growing in the order of creation. Positions number the history in
the order of commits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, Protocol

import msgspec

from flowstead.model.event import Event
from flowstead.model.flow import Flow, FlowKey, StoredFlow
from flowstead.model.signal import StoredSignal
from flowstead.model.task import StoredTask, Task, TaskSummary
from flowstead.model.update import StoredUpdate, Update
from flowstead.store.codec import FlowWrite


class Scope(msgspec.Struct, frozen=True):
    """Whose rows a read may find. Without an owner: everybody's, for operators only."""

    owner_key: str | None


EVERYONE = Scope(None)
MOST_EXPIRED: Final = 256
"""How many expired signals a look at a key answers."""


class FlowQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which flows to list. Unset conditions do not restrict; `live` asks for flows that have not ended."""

    statuses: Collection[str] = ()
    controller_id: str | None = None
    correlation_id: str | None = None
    id_prefix: str | None = None
    live: bool = False
    before_key: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that a flow needs to be live again: itself, its active children, the run ids it has used."""

    flow: StoredFlow
    doc: bytes
    active: list[StoredTask]
    run_ids: list[tuple[str, str]]
    last_seq: int


class Unreadable(msgspec.Struct, frozen=True, kw_only=True):
    """One row that could not be read, and why. The row itself is left as it is.

    What is wrong with a file as a whole (rows that are gone, a broken index) has `table="file"` and key 0.
    """

    table: str
    key: int
    problem: str


class Due(msgspec.Struct, frozen=True):
    """A flow that needs a tick at an instant, epoch ms."""

    at: int
    key: FlowKey


class WaitLookup(msgspec.Struct, frozen=True, gc=False):
    """What is asked about a signal at an instant, epoch ms: its owner, the key it names, the sender's id for it.

    With `only_kept`, who waits matters only if a signal is kept, and is not looked for otherwise.
    """

    owner_key: str
    wait_key: str
    signal_id: str | None
    now: int
    only_kept: bool = False


class WaitsFound(msgspec.Struct, frozen=True, kw_only=True):
    """What is on record for a signal. Only rows of its owner count.

    `is_known` says that a signal with this id is on record. `waiting` names the flows with an open wait on the key,
    each once, oldest first: those that wait or are blocked by it themselves, and those with a queued child that
    does. `kept` is the oldest signal on the key that nobody took and that has not expired; of older ones that have,
    `expired` has the first, and where those are many `kept` is None. `was_awaited` says that
    the key was ever waited for, `is_live` that a flow which did so has not ended.
    """

    is_known: bool
    waiting: list[FlowKey]
    kept: StoredSignal | None
    was_awaited: bool
    is_live: bool
    expired: Sequence[StoredSignal] = ()


class Store(Protocol):
    """Where flows live. Every coroutine may be cancelled while waiting; an accepted commit goes on."""

    @property
    def name(self) -> str:
        """How messages call this store."""
        ...

    async def open(self, *, takeover: bool = False) -> None:
        """Take ownership, creating or migrating what is needed.

        Raises:
            StoreInUse: Somebody owns it. `takeover=True` takes it from an owner that cannot let go.
            StoreUnusable: Damaged, foreign, too new or not writable. Nothing was changed.
        """
        ...

    async def aclose(self) -> None:
        """Let go. Closing twice is fine."""
        ...

    def next_key(self) -> int:
        """A key no row has, without waiting."""
        ...

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        """Write all or nothing, durably, and answer the position of the batch's first event.

        A write that raises a flow's revision brings the event that tells of it; nothing is ever taken out.

        A signal that is not fresh is one that was kept, and still is. A fresh update takes a slot that is free;
        that of `progress` it takes from whatever update is in it, which it replaces under its key, with a higher
        version. An update that is not fresh is written over the row of its key and version; if that has moved on
        meanwhile, nothing happens. A flow that ends supersedes its pending progress, that of the batch included.

        Raises:
            WriteConflict: One of the writes does not fit the stored rows. Nothing was written.
            CommitFailed: Nothing was written.
            OutcomeUnknown: The disk failed and could not be asked again.
            StoreInUse: Another runtime has taken over. Nothing was written, nor ever will be.
        """
        ...

    async def load(self, keys: Sequence[FlowKey]) -> list[Snapshot | Exception | None]:
        """Each flow's snapshot, None where there is none, or why that one cannot be read.

        A snapshot is whole or refused: a store that can lose rows or damage them checks for it here.
        """
        ...

    async def find_flow(self, scope: Scope, flow_id: str) -> Flow | None:
        """One flow. Where everybody is in scope and several owners use the id: the newest."""
        ...

    async def find_by_idempotency_key(self, owner_key: str, key: str) -> FlowKey | None:
        """The flow the key was first used for."""
        ...

    async def list_flows(self, scope: Scope, query: FlowQuery, limit: int) -> list[Flow]:
        """Flows newest first; unreadable ones are left out (`list_unreadable` has them)."""
        ...

    async def key_of(self, scope: Scope, flow_id: str) -> int | None:
        """The store's number for a flow: the cursor of a listing."""
        ...

    async def find_task(self, scope: Scope, task_id: str) -> tuple[FlowKey, Task] | None:
        """One child and the flow it belongs to."""
        ...

    async def list_tasks(
        self,
        scope: Scope,
        flow_id: str,
        *,
        statuses: Collection[str] = (),
        task_ids: Collection[str] | None = None,
    ) -> list[Task]:
        """A flow's children, oldest first."""
        ...

    async def summarize(self, scope: Scope, flow_id: str) -> TaskSummary | None:
        """Counts of a flow's children, from an index."""
        ...

    async def history(
        self, scope: Scope, flow_id: str, *, after_seq: int, limit: int
    ) -> list[Event]:
        """A flow's events in order."""
        ...

    async def last_seq(self, scope: Scope, flow_id: str) -> int:
        """The number of a flow's newest event, 0 if there is none."""
        ...

    async def events_after(self, scope: Scope, position: int, limit: int) -> list[Event]:
        """Events of all flows in scope, in commit order."""
        ...

    async def last_position(self) -> int:
        """The position of the newest event, 0 if there is none."""
        ...

    async def list_due(self, *, after: int, until: int) -> list[Due]:
        """Flows whose tick falls in (after, until], epoch ms."""
        ...

    async def next_due(self, *, after: int) -> int | None:
        """The first tick later than `after`, epoch ms."""
        ...

    async def list_unfinished(
        self, controllers: Collection[str], *, after_key: int, limit: int
    ) -> list[tuple[int, FlowKey]]:
        """Queued and running flows driven by these controllers, and flows with active launched children,
        oldest first, each with its number: what a new owner has to set in motion again."""
        ...

    async def count_by_controller(self) -> dict[str, int]:
        """How many queued and running flows each controller has."""
        ...

    async def look_up_waits(self, asked: Sequence[WaitLookup]) -> list[WaitsFound]:
        """What is on record for each signal; an unreadable kept signal is passed by."""
        ...

    async def list_kept(self, *, now: int) -> list[tuple[str, int]]:
        """The owner of each signal that is kept and has not expired, and until when it is; soonest first."""
        ...

    async def find_token(self, token: str) -> tuple[FlowKey, str | None] | None:
        """The flow with the wait that a token answers, open or not, and the child that stands for the wait, if any.

        The token is named by its digest (`rules.wait_keys.token_digest`), one of a flow's own wait by that of its
        beginning (`place_digest`).
        """
        ...

    async def list_met(
        self, *, after_key: int, limit: int, now: int
    ) -> list[tuple[int, FlowKey, str]]:
        """Open waits for whose key an unexpired signal is kept: what a crash left unmatched.

        Each is the number of its flow, the flow, and the key waited for. They come by flow, oldest first; the
        limit counts flows, so that none is answered in part.
        """
        ...

    async def list_open_waits(
        self, scope: Scope, *, flow_id: str | None, after_key: int, limit: int
    ) -> list[StoredFlow | StoredTask]:
        """What is waited for: flows that wait or are blocked by a wait of their own, and queued children that wait.

        Oldest first by their own keys. Unreadable ones are left out.
        """
        ...

    async def list_updates_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        """Pending updates that go out alone and are due, longest due first; unreadable ones are left out.

        Raises:
            StoreInUse: Another runtime has taken over: sending them is its business now.
        """
        ...

    async def list_digests_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        """Pending updates that go out in a digest and are due, by owner and bucket, oldest first in each.

        The limit counts updates, so that the last bucket of a full page may go on. Unreadable ones are left out.

        Raises:
            StoreInUse: Another runtime has taken over.
        """
        ...

    async def next_update_due(self, *, after: int = -1) -> int | None:
        """When the first pending update that is due later than `after` is, epoch ms; an unreadable one never is."""
        ...

    async def list_updates(
        self,
        scope: Scope,
        *,
        flow_id: str | None,
        statuses: Collection[str],
        after_key: int,
        limit: int,
    ) -> list[Update]:
        """Updates, oldest first; `number` is the key. No statuses: any. Unreadable ones are left out."""
        ...

    async def list_unreadable(self) -> list[Unreadable]:
        """Every row that cannot be read, and what else is wrong. Reads the whole store: for operators."""
        ...

    async def upkeep(self, *, idle: bool) -> None:
        """Do what the store puts off while it is busy, if it is worth it now; `idle` says nobody waits."""
        ...
