"""Opening and closing a runtime, and the way from it to its faces."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import anyio
from msgspec import UNSET, UnsetType

from flowstead import arguments
from flowstead.admin import Admin
from flowstead.answering import answer_token, encoded_or_raise, vote_by_token, vote_of
from flowstead.code_source import CodeSource
from flowstead.core import Core
from flowstead.engine.clock import Clock, Ids, SystemClock, SystemIds
from flowstead.engine.engine import DELIVERIES, Engine, Statistics
from flowstead.errors import RuntimeClosed
from flowstead.model.code import Code
from flowstead.model.command import Defect
from flowstead.model.flow import Json
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.notifiers.port import Notifier, must_send
from flowstead.registry import Registry
from flowstead.results import SignalReport, VoteReport, error_for
from flowstead.rules.digests import DigestTime
from flowstead.rules.user_json import encode_json
from flowstead.session import SessionFlows
from flowstead.store.memory import MemoryStore
from flowstead.store.port import Store
from flowstead.store.sqlite import Durability, SqliteStore


def open_runtime(
    store: str | os.PathLike[str] | Store = "flows.db",
    *,
    registry: Registry | None = None,
    durability: Durability = "full",
    clock: Clock | None = None,
    ids: Ids | None = None,
    limits: Limits | None = None,
    takeover: bool = False,
    notifier: Notifier | None = None,
    deliveries: Retry = DELIVERIES,
    digest_time: DigestTime | None = None,
) -> Runtime:
    """A runtime on a store: `async with open_runtime("flows.db") as runtime`.

    Ready at once, however many flows the store holds; unfinished ones whose controllers and tasks are in the
    registry are set in motion beside.

    Args:
        store: A path, `:memory:`, a `Store`, or a URL: `sqlite:///relative/path`, `sqlite:////absolute/path`.
        registry: The tasks and controllers this process can run. Without one flows are only kept.
        durability: `full` survives a power cut; `normal` survives the death of the process, is quicker, and
            may lose the newest mutations in a power cut.
        clock, ids: Where time and names come from; the system's unless given.
        limits: Bounds and grace periods.
        takeover: Take the store from a runtime that is frozen; it will not be able to write any more.
        notifier: Who takes updates to the owners of flows. Without one none are written. `Runtime.deliver` waits
            until what is due was sent.
        deliveries: How often, and how far apart, an update is offered to the notifier before it is given up; by
            default over more than three days.
        digest_time: When what was put by for a digest goes out; 18:00 UTC unless given.

    Raises:
        TypeError, ValueError: An argument could never be used; the message says which, and what is wanted.
        StoreInUse: On entering: another runtime owns the store; the message says which.
        StoreUnusable: On entering: the store is damaged, foreign, too new or not writable. Not changed.
    """
    given = arguments.given
    return Runtime(
        _store_for(store, durability),
        registry=given(registry, Registry, "registry") or Registry(),
        clock=clock or SystemClock(),
        ids=ids or SystemIds(),
        limits=given(limits, Limits, "limits") or Limits(),
        takeover=takeover,
        notifier=None if notifier is None else must_send(notifier, "notifier"),
        deliveries=given(deliveries, Retry, "deliveries") or DELIVERIES,
        digest_time=given(digest_time, DigestTime, "digest_time") or DigestTime(),
    )


class Tasks:
    """The namespace `runtime.tasks`."""

    def __init__(self, flow: TaskFlow) -> None:
        self.flow = flow


class TaskFlow:
    """The way to a session's flows."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def bind_session(
        self, *, session_key: str, requester_origin: Mapping[str, Json] | None = None
    ) -> SessionFlows:
        """The flows of one owner.

        Args:
            session_key: The owner, trimmed; compared byte by byte.
            requester_origin: Where its requests come from, JSON; the address of updates.

        Raises:
            ValueError, TypeError: A blank key, or one with more than one spelling.
            InvalidState: An origin that is not JSON.
        """
        missing = "TaskFlow runtime requires a bound sessionKey."
        return self._bind(session_key, requester_origin, missing)

    def from_tool_context(self, ctx: object) -> SessionFlows:
        """The flows of the owner a trusted context names.

        Takes any mapping or object with `session_key` (or `sessionKey`), and optionally
        `delivery_context` (or `deliveryContext`).
        """
        missing = "TaskFlow runtime requires tool context with a sessionKey."
        session_key = _from_context(ctx, "session_key", "sessionKey")
        if session_key is None:
            raise ValueError(missing)
        origin = _from_context(ctx, "delivery_context", "deliveryContext")
        return self._bind(session_key, origin, missing)

    def _bind(self, session_key: object, origin: object, missing: str) -> SessionFlows:
        core = self._runtime.core
        limits = core.engine.limits
        given = arguments.mapping_or_none(origin, "requester_origin")
        encoded = (
            UNSET
            if given is None
            else encode_json(
                dict(given),
                name="requester_origin",
                max_bytes=limits.wait_bytes,
                max_depth=limits.json_depth,
            )
        )
        if isinstance(encoded, Defect):
            raise error_for(Code(encoded.code), encoded.reason)
        owner = arguments.owner_key(session_key, missing)
        return SessionFlows(core, session_key=owner, requester_origin=encoded)


class Runtime:
    """Durable flows on one store, inside one event loop. Made by `open_runtime`; use with `async with`."""

    def __init__(
        self,
        store: Store,
        *,
        registry: Registry,
        clock: Clock,
        ids: Ids,
        limits: Limits,
        takeover: bool,
        notifier: Notifier | None = None,
        deliveries: Retry = DELIVERIES,
        digest_time: DigestTime,
    ) -> None:
        self._core: Core | None = None
        self._closing: asyncio.Task[None] | None = None
        self._is_spent = False
        self._name = store.name
        self._takeover = takeover
        self._code = CodeSource(registry, limits, digest_time)
        self._engine = Engine(
            store,
            clock=clock,
            ids=ids,
            limits=limits,
            door=self._code,
            controllers=registry.controllers,
            functions=registry.tasks,
            most_of=registry.concurrency_of,
            # Where time is not the system's, what holds up the loop does not take any.
            watch_loop=isinstance(clock, SystemClock),
            send=None if notifier is None else notifier.send,
            deliveries=deliveries,
        )
        self._code.attach(self._engine)
        self._opened_at = _caller()
        self.task_flow = TaskFlow(self)
        self.tasks = Tasks(self.task_flow)

    @property
    def core(self) -> Core:
        """What the faces share.

        Raises:
            RuntimeClosed: The runtime has not been entered, or is closed.
        """
        if self._core is None:
            raise RuntimeClosed(
                f"The runtime on {self._name} is not open yet: use `async with open_runtime(...)`."
            )
        self._core.enter()
        return self._core

    @property
    def admin(self) -> Admin:
        """The operator's face: every owner's flows."""
        return Admin(self.core)

    async def answer(
        self, token: str, payload: Json = None, *, id: str | None = None
    ) -> SignalReport:
        """Answer the wait that a token stands for, without knowing its flow or owner: whoever has the token may.

        For webhooks and links in mail. A token answers once, and is `late` ever after; one with an `id` may be sent
        again, and is told that it is a `duplicate`, whatever its flow waits for by then.
        Cancelling the caller does not take the answer back.

        Raises:
            InvalidState, StateTooLarge, MailboxFull, CommitFailed, OutcomeUnknown: As for `flows.signal`.
        """
        encoded = encoded_or_raise(self.core, payload, "payload")
        signal_id = None if id is None else arguments.identifier(id, "id")
        return await answer_token(self.core, token, encoded, signal_id)

    async def vote(
        self,
        token: str,
        decision: str,
        *,
        approver: str,
        digest: str,
        role: str | None = None,
        items: Json | UnsetType = UNSET,
        comment: str | None = None,
    ) -> VoteReport:
        """Vote on the approval that a token stands for. Arguments as for `flows.vote`.

        Cancelling the caller does not take the vote back.
        """
        vote = vote_of(self.core, decision, approver, digest, role, items, comment)
        return await vote_by_token(self.core, token, vote)

    async def deliver(self) -> None:
        """Wait until no update is due any more: each was delivered, put off to a later attempt, or given up.

        For a process that ends soon: closing does not wait for the notifier, and what is unsent then is sent by the
        next runtime on the store. What is due later, such as a digest or a next attempt, is not waited for, and
        without a notifier nothing is. A notifier that hangs is cut off after `Limits.delivery_seconds`. Cancelling
        only stops the waiting.

        Raises:
            RuntimeClosed: The runtime is closed, or was meanwhile, or another has taken its store over.
        """
        postman = self.core.engine.postman
        if postman is not None:
            await postman.wait_told()

    def statistics(self) -> Statistics:
        """What the runtime is doing, without waiting."""
        return self.core.engine.statistics()

    async def __aenter__(self) -> Runtime:
        """Take the store and start. Cancelling the caller lets go of the store before it is passed on."""
        if self._core is not None or self._is_spent:
            raise RuntimeError("A runtime is opened once. Call open_runtime again for another one.")
        opening = asyncio.create_task(
            self._engine.open(takeover=self._takeover), name="flowstead opening"
        )
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            # Half an opening would keep the store: see it through, and let go, however often we are cancelled.
            undoing = asyncio.create_task(self._undo(opening), name="flowstead closing")
            with anyio.CancelScope(shield=True):
                while not undoing.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait({undoing})
            undoing.result()
            raise
        self._core = Core(self._engine, self._code.functions)
        return self

    async def _undo(self, opening: asyncio.Task[None]) -> None:
        """Let go of a store that nobody wants opened any more."""
        await asyncio.wait({opening})
        if not opening.cancelled() and opening.exception() is None:
            self._is_spent = True
            await self._engine.aclose()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close, as `aclose` does. Cancelling the caller does not stop the closing."""
        await self.aclose()

    async def aclose(self) -> None:
        """Stop code, answer everybody, flush, and let go of the store. Closing twice is fine.

        Children that are stopped by this have no outcome; the next runtime starts them again. Cancelling the
        caller does not stop the closing: a cancel scope waits for it, `Task.cancel` leaves it to go on alone.
        """
        if self._core is None:
            return
        self._core.check_loop()
        if self._closing is None:
            self._core.close(f"The runtime on {self._name} is closed. Open another one.")
            self._engine.begin_closing()
            self._closing = asyncio.create_task(self._close(), name="flowstead closing")
        with anyio.CancelScope(shield=True):
            await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._engine.aclose()
        finally:
            await self._code.aclose()

    def __del__(self) -> None:
        if self._core is not None and self._closing is None:
            warnings.warn(
                f"A runtime on {self._name} was never closed (made at {self._opened_at}). Use"
                " `async with open_runtime(...)`, or await runtime.aclose().",
                ResourceWarning,
                stacklevel=1,
            )


def _store_for(store: str | os.PathLike[str] | Store, durability: Durability) -> Store:
    if durability not in ("full", "normal"):
        raise ValueError(f"durability must be 'full' or 'normal', not {durability!r:.40}.")
    if isinstance(store, str):
        if not store.strip():
            raise ValueError("store must be a path, 'sqlite:///path', ':memory:' or a Store.")
        if store == ":memory:":
            return MemoryStore()
        scheme, separator, path = store.partition("://")
        if not separator:
            return SqliteStore(store, durability=durability)
        if scheme != "sqlite" or not path.startswith("/") or path == "/":
            raise ValueError(f"store {store!r} is not supported; use 'sqlite:///path' or a path.")
        return SqliteStore(path[1:], durability=durability)
    if isinstance(store, os.PathLike):
        return SqliteStore(store, durability=durability)
    if not hasattr(store, "commit"):
        raise TypeError(f"store must be a path, a URL or a Store, not {type(store).__name__}.")
    return store


def _from_context(ctx: object, *names: str) -> Any:
    for name in names:
        found = ctx.get(name) if isinstance(ctx, Mapping) else getattr(ctx, name, None)
        if found is not None:
            return found
    return None


def _caller() -> str:
    """Where the runtime was made, for the message about one that was never closed."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("flowstead."):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
