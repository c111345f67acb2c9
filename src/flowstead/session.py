"""The ledger face: one owner's flows, name for name as OpenClaw's users know it, answered with values."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from flowstead import arguments
from flowstead.engine.mailbox import Reply
from flowstead.model.code import NOT_FOUND, Code
from flowstead.model.command import (
    Command,
    Create,
    Defect,
    Fail,
    Finish,
    RequestCancel,
    Resume,
    SetWaiting,
    Update,
)
from flowstead.model.flow import (
    LIVE_FLOW_STATUSES,
    Failure,
    Flow,
    FlowKey,
    FlowStatus,
    Json,
    NotifyPolicy,
    StoredFlow,
    SyncMode,
)
from flowstead.own_wait import own_wait
from flowstead.results import Applied, Rejected, error_for, raise_refusal
from flowstead.rules.wait_keys import place_digest_of
from flowstead.session_tasks import SessionTasks, flow_in, present
from flowstead.store import codec

_CREATABLE: Final = tuple(status for status in FlowStatus if status in LIVE_FLOW_STATUSES)
_STANDING: Final = frozenset({FlowStatus.WAITING, FlowStatus.BLOCKED})
_RESUMABLE: Final = (FlowStatus.QUEUED, FlowStatus.RUNNING)


class SessionFlows(SessionTasks):
    """The flows of one session. No method takes an owner: other owners' flows cannot be found from here.

    Mutations answer `Applied` or `Rejected` and are durable before they do. Cancelling a call while it waits
    leaves its mutation applied or not, never half done; read the flow again to know.
    """

    @property
    def session_key(self) -> str:
        """The owner of every flow here."""
        return self._session_key

    @property
    def requester_origin(self) -> Json:
        """Where the request came from, and where updates go; copied into every flow made here."""
        return None if isinstance(self._origin, Defect) else codec.decode_json(self._origin)

    # ---- creating ---------------------------------------------------------------------------------

    async def create_managed(
        self,
        *,
        controller_id: str,
        goal: str,
        flow_id: str | None = None,
        correlation_id: str | None = None,
        idempotency_key: str | None = None,
        status: str = "queued",
        notify_policy: str = "done_only",
        current_step: str | None = None,
        state_json: Json | UnsetType = UNSET,
        wait_json: Json | UnsetType = UNSET,
        state_version: int = 1,
    ) -> Flow:
        """Make a flow, durably, at revision 0. A registered controller is started.

        Cancelling the caller after acceptance does not undo it; with an `idempotency_key`, calling again answers
        the flow, or makes it.

        Args:
            controller_id: Names the code that drives the flow, registered here or not.
            goal: What the flow is for, for people.
            flow_id: Your own id, unique among your flows; a telling one is made up unless given.
            correlation_id: The business process it belongs to; several flows may share it.
            idempotency_key: Calling again with the same key and the same arguments answers the first flow.
            status: `queued`, `running`, `waiting` or `blocked`.
            notify_policy: `done_only`, `state_changes` or `silent`.
            current_step: Where the work stands, for people and for the controller.
            state_json: The flow's one state bag, any JSON.
            wait_json: What is awaited, where the flow starts out waiting.
            state_version: The version of your state's own schema.

        Raises:
            FlowExists: Your flow of that id exists, or the key was used with other arguments.
            InvalidState, StateTooLarge: The state cannot be kept; the message has the path.
            CommitFailed: Certainly not written.
            ValueError, TypeError: An argument makes no sense.
        """
        engine = self._core.enter()
        now = engine.clock.now()
        controller = arguments.text(
            controller_id, "controller_id", missing="Managed flow controllerId is required."
        )
        given = None if flow_id is None else arguments.identifier(flow_id, "flow_id")
        standing = arguments.choice(status, FlowStatus, "status", _CREATABLE)
        waited_for = self._encode_wait(wait_json)
        key = FlowKey(self._session_key, given or engine.ids.flow_id(controller, now))
        wait = own_wait(engine, key, waited_for) if standing in _STANDING else None
        if isinstance(wait, Defect):
            raise error_for(Code(wait.code), wait.reason)
        draft = StoredFlow(
            key=engine.store.next_key(),
            flow_id=key.flow_id,
            sync_mode=SyncMode.MANAGED,
            owner_key=self._session_key,
            requester_origin=self._usable(self._origin),
            controller_id=controller,
            correlation_id=arguments.optional_text(correlation_id, "correlation_id"),
            revision=0,
            status=standing,
            notify_policy=arguments.choice(notify_policy, NotifyPolicy, "notify_policy"),
            goal=arguments.text(goal, "goal", missing="Managed flow goal is required."),
            current_step=arguments.optional_text(current_step, "current_step"),
            state_json=self._usable(self._encode(state_json, "state_json")),
            state_version=arguments.count(state_version, "state_version"),
            wait_json=self._usable(waited_for),
            wait=wait,
            wait_key=None if wait is None else wait.wait_key,
            wait_token=place_digest_of(wait),
            idempotency_key=arguments.optional_text(idempotency_key, "idempotency_key"),
            created_at=now,
            updated_at=now,
        )
        if draft.idempotency_key is None:
            reply = await self._create(draft, is_new=given is None)
        else:
            draft = msgspec.structs.replace(draft, request_digest=_digest(draft, given))
            reply = await self._create_once(Create(draft=draft), is_new=given is None)
        if reply.refusal is not None:
            raise_refusal(reply.refusal, flow_in(reply))
        return present(reply)

    async def _create(self, draft: StoredFlow, *, is_new: bool) -> Reply:
        key = FlowKey(draft.owner_key, draft.flow_id)
        return await self._core.engine.ask(key, Create(draft=draft), self._actor, is_new=is_new)

    # ---- mutating ---------------------------------------------------------------------------------

    async def set_waiting(
        self,
        *,
        flow_id: str,
        expected_revision: int,
        current_step: str | UnsetType | None = UNSET,
        state_json: Json | UnsetType = UNSET,
        wait_json: Json = None,
        blocked_task_id: str | None = None,
        blocked_summary: str | None = None,
    ) -> Applied | Rejected:
        """Park the flow until outside input arrives.

        live → waiting, or blocked if a blocker is named; revision + 1. Wait and blockers are replaced.
        A controller that stands in a wait is sent away; one that is running goes on, and what it comes to wait for
        itself takes the place of this wait.
        Cancelling the caller after acceptance does not undo the change.

        Args:
            flow_id: The flow.
            expected_revision: The revision you last saw.
            current_step, state_json: Set if given, cleared by None.
            wait_json: What is awaited. Its plain fields (`kind`, `channel`, `threadKey`, …) are what `signal` must
                name; `deadlineAt` or `wakeAt` (epoch ms), `onTimeout` (`fail`, `resume`, `block`), `remindAt`,
                `prompt` and `schema` say how to wait.
            blocked_task_id, blocked_summary: Who or what needs attention, and why, for people.
        """
        encoded = self._encoded_or_null(wait_json)
        named = FlowKey(self._session_key, arguments.lookup(flow_id, "flow_id") or "")
        wait = own_wait(self._core.enter(), named, encoded)
        command = SetWaiting(
            expected_revision=arguments.revision(expected_revision),
            patch=self._patch(current_step, state_json),
            wait_json=wait if isinstance(wait, Defect) else encoded,
            wait=None if isinstance(wait, Defect) else wait,
            blocked_task_id=arguments.optional_text(blocked_task_id, "blocked_task_id"),
            blocked_summary=arguments.optional_text(blocked_summary, "blocked_summary"),
        )
        return await self._mutate(flow_id, command)

    async def resume(
        self,
        *,
        flow_id: str,
        expected_revision: int,
        status: str = "queued",
        current_step: str | UnsetType | None = UNSET,
        state_json: Json | UnsetType = UNSET,
    ) -> Applied | Rejected:
        """Put the flow back to work: live → queued or running, revision + 1, wait and blockers cleared.

        Cancelling the caller after acceptance does not undo the change.
        """
        command = Resume(
            expected_revision=arguments.revision(expected_revision),
            patch=self._patch(current_step, state_json),
            status=arguments.choice(status, FlowStatus, "status", _RESUMABLE),
        )
        return await self._mutate(flow_id, command)

    async def update(
        self,
        *,
        flow_id: str,
        expected_revision: int,
        current_step: str | UnsetType | None = UNSET,
        state_json: Json | UnsetType = UNSET,
    ) -> Applied | Rejected:
        """Set fields and keep the status: revision + 1.

        Cancelling the caller after acceptance does not undo the change.
        """
        command = Update(
            expected_revision=arguments.revision(expected_revision),
            patch=self._patch(current_step, state_json),
        )
        return await self._mutate(flow_id, command)

    async def finish(
        self,
        *,
        flow_id: str,
        expected_revision: int,
        current_step: str | UnsetType | None = UNSET,
        state_json: Json | UnsetType = UNSET,
    ) -> Applied | Rejected:
        """End the flow: live → succeeded, revision + 1. Launched children still running are stopped.

        Cancelling the caller after acceptance does not undo the change.
        """
        command = Finish(
            expected_revision=arguments.revision(expected_revision),
            patch=self._patch(current_step, state_json),
        )
        return await self._mutate(flow_id, command)

    async def fail(
        self,
        *,
        flow_id: str,
        expected_revision: int,
        current_step: str | UnsetType | None = UNSET,
        state_json: Json | UnsetType = UNSET,
        blocked_task_id: str | None = None,
        blocked_summary: str | None = None,
    ) -> Applied | Rejected:
        """End the flow: live → failed, revision + 1. Launched children still running are stopped.

        Cancelling the caller after acceptance does not undo the change.
        """
        task_id = arguments.optional_text(blocked_task_id, "blocked_task_id")
        summary = arguments.optional_text(blocked_summary, "blocked_summary")
        command = Fail(
            expected_revision=arguments.revision(expected_revision),
            patch=self._patch(current_step, state_json),
            blocked_task_id=UNSET if task_id is None else task_id,
            blocked_summary=UNSET if summary is None else summary,
            failure=Failure(kind="failed", message=summary),
        )
        return await self._mutate(flow_id, command)

    async def request_cancel(self, *, flow_id: str, expected_revision: int) -> Applied | Rejected:
        """Let nothing new start: the intent is stamped, revision + 1, and never forgotten.

        Queued children end as cancelled, running ones go on; when the last has ended the flow becomes
        cancelled, unless its controller finishes or fails it. Cancelling the caller after acceptance does not
        take the intent back.
        """
        command = RequestCancel(expected_revision=arguments.revision(expected_revision))
        return await self._mutate(flow_id, command)

    async def _mutate(self, flow_id: str, command: Command) -> Applied | Rejected:
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        if wanted is None:
            return Rejected(NOT_FOUND.code, None, NOT_FOUND.reason)
        reply = await engine.ask(FlowKey(self._session_key, wanted), command, self._actor)
        if reply.refusal is None:
            return Applied(present(reply))
        return Rejected(reply.refusal.code, flow_in(reply), reply.refusal.reason)


def _digest(draft: StoredFlow, given_id: str | None) -> str:
    """What a create asked for, without what differs from call to call."""
    asked: dict[str, Any] = {
        "flowId": given_id,
        "controllerId": draft.controller_id,
        "goal": draft.goal,
        "correlationId": draft.correlation_id,
        "status": draft.status,
        "notifyPolicy": draft.notify_policy,
        "currentStep": draft.current_step,
        "stateVersion": draft.state_version,
        "stateJson": codec.decode_json(draft.state_json),
        "waitJson": codec.decode_json(draft.wait_json),
    }
    return hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()
