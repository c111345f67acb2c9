"""Flows as children of flows: `Nested` says which, and a runner stands for the flow in its parent's book.

Theory of operation. The child's row names the flow it stands for before that flow exists, so that it can be found
again: after a crash the runner is started once more under the same attempt, and finds the flow or makes it. It
ends when the flow has ended, never before; so a parent cannot be final while anything lives below it. A stop of
the child cancels the flow, an intent above is passed on as an intent, and shutdown leaves the flow alone. From
the moment at which either is to be passed on nothing starts in the flow, however long its disk refuses the record.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any, Final

import anyio
import msgspec
from msgspec import UNSET, Raw

from flowstead.engine.child_scope import ChildScope
from flowstead.engine.engine import Engine
from flowstead.engine.guard import EndsAs, Unfinished
from flowstead.engine.mailbox import Reply
from flowstead.errors import RuntimeClosed, SnapshotUnreadable, StoreError
from flowstead.model.code import Code
from flowstead.model.command import Cancel, Command, Create, Defect, RequestCancel
from flowstead.model.flow import (
    Failure,
    Flow,
    FlowKey,
    FlowStatus,
    Json,
    NotifyPolicy,
    StoredFlow,
    SyncMode,
    has_ended,
)
from flowstead.model.task import Cancelled, Failed, Lost, Outcome, StoredTask
from flowstead.rules.user_json import encode_json
from flowstead.store import codec
from flowstead.store.port import Scope, Snapshot

NESTED: Final = "flow"
_UNSETTLED: Final = frozenset({Code.PERSIST_FAILED, Code.OUTCOME_UNKNOWN})
_PREFIX: Final = "flowstead:task:"


class Nested(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A flow to run as a child: `await flow.run(Nested("research/topic"), state)`.

    Its controller must be registered. The input becomes the flow's `state_json`, and what that is in the end is
    the child's result. It belongs to the same owner, who is told of the outermost flow only.
    """

    controller_id: str
    goal: str | None = None

    @property
    def label(self) -> str:
        """The usual name of its step."""
        return self.controller_id


class Census:
    """How many nested flows are alive under each outermost one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._alive: Counter[tuple[str, str]] = Counter()

    def enter(self, owner_key: str, root_id: str) -> int:
        """One more; answers how many there are now."""
        self._alive[owner_key, root_id] += 1
        return self._alive[owner_key, root_id]

    def leave(self, owner_key: str, root_id: str) -> None:
        """One less."""
        self._alive[owner_key, root_id] -= 1
        if not self._alive[owner_key, root_id]:
            del self._alive[owner_key, root_id]


class NestedRunner:
    """Stands for a nested flow until it has ended."""

    def __init__(
        self,
        engine: Engine,
        census: Census,
        parent: FlowKey,
        task: StoredTask,
        child: ChildScope,
    ) -> None:
        assert task.child_flow_id is not None and task.launch is not None
        self._engine = engine
        self._census = census
        self._parent = parent
        self._task = task
        self._launch = task.launch
        self._child = child
        self._key = FlowKey(parent.owner_key, task.child_flow_id)

    async def run(self) -> Json:
        """The state the flow ends with.

        Raises:
            EndsAs: It did not succeed.
            Unfinished: The runtime is closing, and the flow has not ended.
        """
        root_id = self._launch.root_id or self._parent.flow_id
        alive = self._census.enter(self._parent.owner_key, root_id)
        end = self._engine.flow_ends.register(self._key)
        drained = asyncio.Event()
        flow: Flow | None
        self._engine.supervisor.attended.add(self._key)
        self._child.on_drain(partial(self._drain, drained))
        try:
            if self._child.scope.cancel_called:
                raise asyncio.CancelledError
            if alive > self._census.most and not self._child.adopted:
                self._refuse(alive)
            flow = await self._see_to_its_end(end, drained)
            await self._until_quiet()
        except asyncio.CancelledError:
            if self._child.reason is None:
                raise  # the runtime is closing; the flow goes on with the next one
            with anyio.CancelScope(shield=True):
                flow = await self._cancel(end)
            await self._until_quiet()
            if flow is None or flow.status is FlowStatus.CANCELLED:
                raise
        finally:
            end.cancel()
            self._engine.supervisor.attended.discard(self._key)
            self._census.leave(self._parent.owner_key, root_id)
        return _result_of(flow)

    def _refuse(self, alive: int) -> None:
        message = f"{alive - 1} flows are alive under one already; the limit is {self._census.most}"
        raise EndsAs(Failed(Failure(kind="limit_reached", message=message)))

    def _drain(self, drained: asyncio.Event) -> None:
        """An intent stands above. It may be told again, long after it has been passed on."""
        if not drained.is_set():
            self._hold()
            drained.set()

    def _hold(self) -> None:
        """Let nothing start in the flow until it knows what is to be passed on to it."""
        self._engine.supervisor.attended.discard(self._key)

    async def _pass_on(self, stop: RequestCancel | Cancel) -> Reply:
        """Have the flow be stopped, and let it move again once that is on record."""
        self._hold()
        reply = await self._tell(stop)
        self._engine.supervisor.attended.add(self._key)
        self._engine.wake(self._key)
        return reply

    async def _see_to_its_end(self, end: asyncio.Future[bytes], drained: asyncio.Event) -> Flow:
        if drained.is_set():
            # An intent stands above: it has to be there before anything moves again.
            asked = await self._pass_on(RequestCancel(expected_revision=None))
            if asked.refusal is not None and asked.refusal.code is Code.NOT_FOUND:
                raise EndsAs(
                    Cancelled(Failure(kind="cancelled", message="the flow was never made"))
                )
        made = await self._tell(Create(draft=await self._draft()))
        if made.refusal is not None:
            raise EndsAs(Failed(Failure(kind="not_created", message=made.refusal.reason)))
        assert made.doc is not None
        flow = codec.read_flow(made.doc)
        if has_ended(flow):
            return flow
        draining = asyncio.create_task(drained.wait())
        try:
            await _first_of(end, draining)
            if draining.done() and not end.done():
                await self._pass_on(RequestCancel(expected_revision=None))
            await asyncio.wait({end})
        finally:
            draining.cancel()
        return codec.read_flow(end.result())

    async def _cancel(self, end: asyncio.Future[bytes]) -> Flow | None:
        """Cancel the flow, and wait until it has ended; None if it was never made."""
        reply = await self._pass_on(Cancel())
        if reply.refusal is not None and reply.refusal.code is Code.NOT_FOUND:
            return None
        if reply.doc is not None and has_ended(flow := codec.read_flow(reply.doc)):
            return flow
        closing = asyncio.create_task(self._engine.supervisor.stopping.wait())
        try:
            await _first_of(end, closing)
        finally:
            closing.cancel()
        if not end.done():
            raise Unfinished
        return codec.read_flow(end.result())

    async def _until_quiet(self) -> None:
        """Wait for the children that the flow's end has only asked to stop. A stop of ours changes nothing."""
        with anyio.CancelScope(shield=True):
            while left := await self._still_running():
                ends = [self._engine.task_ends.register(task_id) for task_id in left]
                closing = asyncio.create_task(self._engine.supervisor.stopping.wait())
                try:
                    # Looked at once more: one that ended before we listened tells nobody.
                    if set(left) <= set(await self._still_running()):
                        await _first_of(closing, *ends)
                finally:
                    closing.cancel()
                    for each in ends:
                        each.cancel()
                if self._engine.supervisor.is_stopping:
                    raise Unfinished

    async def _still_running(self) -> list[str]:
        """The ids of the flow's own children that have not ended; linked ones report for themselves."""
        while True:
            try:
                [snapshot] = await self._engine.store.load([self._key])
            except StoreError:
                await self._pause()
                continue
            if not isinstance(snapshot, Snapshot):
                return []
            return [task.task_id for task in snapshot.active if task.launch is not None]

    async def _tell(self, command: Command) -> Reply:
        """Have the nested flow take a command, as often as it takes."""
        while True:
            try:
                reply = await self._engine.report(self._key, command)
            except RuntimeClosed as error:
                raise Unfinished from error
            except SnapshotUnreadable as error:
                raise EndsAs(Lost(Failure(kind="unreadable", message=str(error)))) from error
            except StoreError:
                await self._pause()
                continue
            if reply.refusal is None or reply.refusal.code not in _UNSETTLED:
                return reply
            await self._pause()

    async def _pause(self) -> None:
        """Give a failing disk time, but do not hold up a shutdown."""
        await self._engine.supervisor.pause()
        if self._engine.supervisor.is_stopping:
            raise Unfinished

    async def _find_parent(self) -> Flow | None:
        """The flow above; a store that fails is asked again, for that is no end of a flow."""
        scope = Scope(self._parent.owner_key)
        while True:
            try:
                return await self._engine.store.find_flow(scope, self._parent.flow_id)
            except StoreError:
                await self._pause()

    async def _draft(self) -> StoredFlow:
        engine, task = self._engine, self._task
        assert isinstance(self._launch.spec, Raw)
        spec = msgspec.json.decode(self._launch.spec, type=Nested)
        parent = await self._find_parent()
        origin = None if parent is None else parent.requester_origin
        now = engine.clock.now()
        return StoredFlow(
            key=engine.store.next_key(),
            flow_id=self._key.flow_id,
            sync_mode=SyncMode.MANAGED,
            owner_key=self._key.owner_key,
            requester_origin=UNSET if origin is None else self._encoded(origin),
            controller_id=spec.controller_id,
            correlation_id=None if parent is None else parent.correlation_id,
            revision=0,
            status=FlowStatus.QUEUED,
            notify_policy=NotifyPolicy.SILENT,
            goal=spec.goal or task.task,
            state_json=task.input_json,
            state_version=1,
            parent_task_id=task.task_id,
            depth=self._launch.depth,
            root_id=self._launch.root_id,
            idempotency_key=_PREFIX + task.task_id,
            request_digest=task.task_id,
            created_at=now,
            updated_at=now,
        )

    def _encoded(self, value: Json) -> Raw:
        limits = self._engine.limits
        encoded = encode_json(
            value, name="requester_origin", max_bytes=limits.wait_bytes, max_depth=limits.json_depth
        )
        assert not isinstance(encoded, Defect), "it has been stored once"
        return encoded


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    """Return once one of them is done. Cancelling leaves them all as they are."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _result_of(flow: Flow) -> Json:
    if flow.status is FlowStatus.SUCCEEDED:
        return flow.state_json
    raise EndsAs(_outcome_of(flow))


def _outcome_of(flow: Flow) -> Outcome:
    said = None if flow.failure is None else flow.failure.message
    message = f"flow {flow.flow_id} {flow.status.value}" + (f": {said}" if said else "")
    match flow.status:
        case FlowStatus.CANCELLED:
            return Cancelled(Failure(kind="cancelled", message=message))
        case FlowStatus.LOST:
            return Lost(Failure(kind="lost", message=message))
    code = None if flow.failure is None else flow.failure.code or flow.failure.kind
    return Failed(Failure(kind="flow_failed", code=code, message=message))
