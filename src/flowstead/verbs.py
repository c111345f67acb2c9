"""What an owner or an operator may do to any flow in scope: cancel it or one child, retry a step or all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead import arguments
from flowstead.engine.engine import Engine
from flowstead.engine.mailbox import Reply
from flowstead.log import get_logger
from flowstead.model.code import (
    ABANDONED,
    CANCEL_PENDING,
    NOT_FOUND,
    NOT_MANAGED,
    TASK_NOT_FOUND,
    Code,
    Refusal,
)
from flowstead.model.command import Cancel, CancelTask, Create, Encoded, RetryTask
from flowstead.model.flow import Flow, FlowKey, FlowStatus, Json, StoredFlow, SyncMode, has_ended
from flowstead.model.task import (
    StoredTask,
    Task,
    TaskStatus,
    is_active,
)
from flowstead.model.wait import WaitKind
from flowstead.results import (
    Applied,
    CancelReport,
    Rejected,
    TaskCancelReport,
    TaskRetryReport,
)
from flowstead.rules.user_json import encode_json
from flowstead.scoped import ScopedFlows
from flowstead.settlement import SettledAs, Settlement, settle
from flowstead.store import codec
from flowstead.store.port import Scope

log = get_logger(__name__)

_RETRY_KEY: Final = "flowstead:retry:"


class ScopedVerbs(ScopedFlows):
    """Cancels and retries within one scope."""

    async def cancel(
        self, flow_id: str, *, expected_revision: int | None = None, grace: float = 5.0
    ) -> CancelReport:
        """End the flow as cancelled: stamp the intent, stop its code, and wait up to `grace` seconds for it.

        live → intent, revision + 1 → every child stopped → cancelled, revision + 1. `cancelled=True` is
        answered only when no code of the flow runs any more; otherwise `code="cancel_pending"`, and the flow
        ends when its code does. Cancelling the caller does not take the intent back.
        """
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        expected = arguments.optional_revision(expected_revision)
        patience = arguments.duration(grace, "grace")
        key = None if wanted is None else await self._find(wanted)
        if key is None:
            return CancelReport(
                found=False, cancelled=False, code=Code.NOT_FOUND, reason="Flow not found."
            )
        end = engine.flow_ends.register(key)
        try:
            reply = await engine.ask(key, Cancel(expected_revision=expected), self._actor)
            if reply.refusal is not None:
                return await self._cancel_refused(key, reply)
            await _wait_at_most(engine, end, patience)
            return await self._cancel_report(key)
        finally:
            end.cancel()

    async def _cancel_refused(self, key: FlowKey, reply: Reply) -> CancelReport:
        assert reply.refusal is not None
        found = reply.refusal.code is not Code.NOT_FOUND
        return CancelReport(
            found=found,
            cancelled=False,
            code=reply.refusal.code,
            reason=reply.refusal.reason,
            flow=None if reply.doc is None else codec.read_flow(reply.doc),
            tasks=await self._tasks_of(key) if found else [],
        )

    async def _cancel_report(self, key: FlowKey) -> CancelReport:
        engine = self._core.engine
        flow = await engine.store.find_flow(Scope(key.owner_key), key.flow_id)
        assert flow is not None
        lines = await settle(engine.store, key, engine.supervisor.hint_of)
        flows = {key, *(FlowKey(key.owner_key, line.flow_id) for line in lines)}
        given_up = any(map(engine.supervisor.has_given_up, flows))
        refusal = _refusal_of(flow, lines, given_up=given_up)
        tasks = await self._tasks_of(key)
        if not has_ended(flow):
            tasks = [task for task in tasks if is_active(task)]
            log.warning(
                "cancel.pending", flow_id=key.flow_id, task_ids=[task.task_id for task in tasks]
            )
        return CancelReport(
            found=True,
            cancelled=refusal is None,
            code=None if refusal is None else refusal.code,
            reason=None if refusal is None else refusal.reason,
            flow=flow,
            tasks=tasks,
            descendants=lines,
        )

    async def cancel_task(self, task_id: str, *, grace: float = 5.0) -> TaskCancelReport:
        """Stop one child and wait up to `grace` seconds for its end. The flow goes on without it.

        Cancelling the caller after acceptance does not take the stop back.
        """
        engine, wanted = self._core.enter(), arguments.lookup(task_id, "task_id")
        patience = arguments.duration(grace, "grace")
        missing = TaskCancelReport(found=False, cancelled=False, reason=TASK_NOT_FOUND.reason)
        found = None if wanted is None else await engine.store.find_task(self._scope, wanted)
        if found is None or wanted is None:
            return missing
        key, task = found
        if is_active(task):
            end = engine.task_ends.register(wanted)
            try:
                reply = await engine.ask(key, CancelTask(task_id=wanted), self._actor)
                # Not found any more: it ended between our look and its turn.
                if reply.refusal is None:
                    await _wait_at_most(engine, end, patience)
                elif reply.refusal.code is not Code.NOT_FOUND:
                    return TaskCancelReport(
                        found=True, cancelled=False, reason=reply.refusal.reason, task=task
                    )
            finally:
                end.cancel()
            found = await engine.store.find_task(self._scope, wanted)
            if found is None:
                return missing
            task = found[1]
            if task.status is TaskStatus.CANCELLED:
                return TaskCancelReport(found=True, cancelled=True, task=task)
            if is_active(task):
                reason = "Task has not stopped yet; it ends when its code does."
                return TaskCancelReport(found=True, cancelled=False, reason=reason, task=task)
        reason = f"Task is already {task.status.value}."
        return TaskCancelReport(found=True, cancelled=False, reason=reason, task=task)

    # ---- retrying ---------------------------------------------------------------------------------

    async def retry_task(
        self, task_id: str, *, input_json: Json | UnsetType = UNSET
    ) -> TaskRetryReport:
        """Start a child's next attempt now: one that a person had to look at, or that waits for its retry.

        If the child was what blocked its flow, the flow goes on. Giving up on it instead is `cancel_task`. A child
        that has ended stays ended: `retry_flow` goes on from there once its flow has ended too. Cancelling the
        caller after acceptance does not take it back.

        Args:
            input_json: Another input than the one it failed with. A child that was begun under an approval takes
                no other than what was approved.
        """
        engine, wanted = self._core.enter(), arguments.lookup(task_id, "task_id")
        encoded = UNSET if input_json is UNSET else self._encode_any(input_json, "input_json")
        found = None if wanted is None else await engine.store.find_task(self._scope, wanted)
        if found is None or wanted is None:
            return TaskRetryReport(found=False, retried=False, reason=TASK_NOT_FOUND.reason)
        key, task = found
        if not is_active(task):
            reason = f"Task is already {task.status.value}."
            return TaskRetryReport(found=True, retried=False, reason=reason, task=task)
        command = RetryTask(task_id=wanted, input_json=encoded)
        reply = await engine.ask(key, command, self._actor)
        found = await engine.store.find_task(self._scope, wanted)
        task = task if found is None else found[1]
        refused = None if reply.refusal is None else reply.refusal.reason
        return TaskRetryReport(found=True, retried=refused is None, reason=refused, task=task)

    async def retry_flow(self, flow_id: str) -> Applied | Rejected:
        """Go on where an ended flow stopped: a new flow in which what succeeded answers from the record.

        The ended flow stays as it is; the new one names it as `retry_of`, begins with its last state, and has its
        finished children. Approvals are asked for again: they were given to the ended flow. Asking again answers
        the same new flow. Cancelling the caller after acceptance does not undo it; calling again answers the flow,
        or makes it.

        Answers `Rejected` if there is nothing to retry: `not_found`, `not_managed` for a detached run, or
        `not_retryable` for a flow that has succeeded or has not ended.
        """
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        found = None if wanted is None else await engine.store.find_flow(self._scope, wanted)
        if found is None:
            return Rejected(NOT_FOUND.code, None, NOT_FOUND.reason)
        if (refused := _not_retryable(found)) is not None:
            return refused
        if await self._is_stopping(found):
            reason = (
                "Code of the flow has not stopped yet. Nothing was made; try again when it has."
            )
            return Rejected(Code.NOT_RETRYABLE, found, reason)
        draft = self._successor(found, _RETRY_KEY + found.flow_id)
        everything = await self._tasks_of(FlowKey(found.owner_key, found.flow_id))
        tasks = [
            task
            for task in everything
            if task.status is TaskStatus.SUCCEEDED and task.runtime != WaitKind.APPROVAL
        ]
        carried = tuple(
            self._carried(task, draft)
            for task in sorted(tasks, key=lambda task: task.ended_at or 0)
        )
        reply = await self._create_once(Create(draft=draft, carried=carried), is_new=True)
        if reply.refusal is not None:
            return Rejected(reply.refusal.code, found, reply.refusal.reason)
        assert reply.doc is not None
        return Applied(codec.read_flow(reply.doc))

    async def _is_stopping(self, flow: Flow) -> bool:
        """Whether children of an ended flow are still being stopped; linked ones report for themselves."""
        key = FlowKey(flow.owner_key, flow.flow_id)
        [snapshot] = await self._core.engine.store.load([key])
        if isinstance(snapshot, Exception):
            raise snapshot
        active = () if snapshot is None else snapshot.active
        return any(task.launch is not None for task in active)

    async def _create_once(self, command: Create, *, is_new: bool) -> Reply:
        """Create under an idempotency key: one caller at a time for each key, the first one's flow for all."""
        engine, creating = self._core.engine, self._core.creating
        draft = command.draft
        assert draft.idempotency_key is not None
        named = (draft.owner_key, draft.idempotency_key)
        while (earlier := creating.get(named)) is not None:
            await asyncio.wait({earlier})
        # In line before the look: a create that came and went during it would be missed.
        turn = creating[named] = asyncio.get_running_loop().create_future()

        def leave(_: object = None) -> None:
            del creating[named]
            turn.cancel()

        try:
            first = await engine.store.find_by_idempotency_key(*named)
            key = first or FlowKey(draft.owner_key, draft.flow_id)
            reply = engine.ask(key, command, self._actor, is_new=first is None and is_new)
        except BaseException:
            leave()
            raise
        reply.add_done_callback(leave)
        # Cancelling this caller must not free the key before the flow is on disk.
        return await asyncio.shield(reply)

    def _successor(self, flow: Flow, name: str) -> StoredFlow:
        engine, now = self._core.engine, self._core.engine.clock.now()
        origin, state = flow.requester_origin, flow.state_json
        controller = flow.controller_id or "flow"
        return StoredFlow(
            key=engine.store.next_key(),
            flow_id=engine.ids.flow_id(controller, now),
            sync_mode=SyncMode.MANAGED,
            owner_key=flow.owner_key,
            requester_origin=_kept(origin),
            controller_id=flow.controller_id,
            correlation_id=flow.correlation_id,
            revision=0,
            status=FlowStatus.QUEUED,
            notify_policy=flow.notify_policy,
            goal=flow.goal,
            current_step=flow.current_step,
            state_json=_kept(state),
            state_version=flow.state_version,
            retry_of=flow.flow_id,
            idempotency_key=name,
            request_digest=flow.flow_id,
            created_at=now,
            updated_at=now,
        )

    def _carried(self, task: Task, flow: StoredFlow) -> StoredTask:
        """A succeeded child as the new flow begins with it: the same in all but its name."""
        engine = self._core.engine
        fields = {name: getattr(task, name) for name in task.__struct_fields__}
        for name in ("input_json", "result_json"):
            fields[name] = _kept(fields[name])
        # It has not been started here, and the flow it may have stood for belongs to the ended one.
        fields |= {"task_id": engine.ids.task_id(), "flow_id": flow.flow_id, "attempt": 0}
        fields["child_flow_id"] = None
        return StoredTask(key=engine.store.next_key(), flow_key=flow.key, **fields)

    def _encode_any(self, value: Json, name: str) -> Encoded:
        limits = self._core.engine.limits
        return encode_json(
            value, name=name, max_bytes=limits.state_bytes, max_depth=limits.json_depth
        )

    async def _tasks_of(self, key: FlowKey, statuses: Iterable[str] = ()) -> list[Task]:
        store = self._core.engine.store
        return await store.list_tasks(Scope(key.owner_key), key.flow_id, statuses=tuple(statuses))


def _refusal_of(flow: Flow, lines: Sequence[Settlement], *, given_up: bool) -> Refusal | None:
    """What keeps a cancel from having achieved what it was asked for."""
    if not has_ended(flow):
        return CANCEL_PENDING
    if flow.status is not FlowStatus.CANCELLED:
        return Refusal(Code.TERMINAL, f"Flow is already {flow.status.value}.")
    given_up = given_up or any(line.state is SettledAs.ABANDONED for line in lines)
    return ABANDONED if given_up else None


def _not_retryable(flow: Flow) -> Rejected | None:
    if flow.sync_mode is not SyncMode.MANAGED:
        return Rejected(NOT_MANAGED.code, flow, NOT_MANAGED.reason)
    if not has_ended(flow):
        reason = "Flow has not ended; its children can be retried one by one."
        return Rejected(Code.NOT_RETRYABLE, flow, reason)
    if flow.status is FlowStatus.SUCCEEDED:
        return Rejected(Code.NOT_RETRYABLE, flow, "Flow has succeeded; there is nothing to retry.")
    return None


def _kept(value: Json) -> Raw | UnsetType:
    """A value that was read from the store, as it is kept there."""
    return UNSET if value is None else Raw(msgspec.json.encode(value))


async def _wait_at_most(engine: Engine, end: asyncio.Future[bytes], seconds: float) -> None:
    """Wait for an end, by the runtime's clock, and no longer than this."""
    late = asyncio.get_running_loop().create_future()
    timer = engine.clock.call_later(seconds, late.cancel)
    try:
        await asyncio.wait({end, late}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
        late.cancel()
