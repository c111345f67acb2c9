"""The ledger face: one owner's flows, name for name as OpenClaw's users know it, answered with values."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead import arguments
from flowstead.core import Core
from flowstead.engine.mailbox import Reply
from flowstead.functions import Functions
from flowstead.log import get_logger
from flowstead.model.code import NOT_FOUND, Code, Refusal
from flowstead.model.command import (
    AddTasks,
    Command,
    Create,
    Defect,
    Encoded,
    EndReport,
    Fail,
    Finish,
    Patch,
    ProgressReport,
    RequestCancel,
    Resume,
    SetWaiting,
    StartReport,
    TaskDraft,
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
from flowstead.model.retry import Retry
from flowstead.model.task import (
    LAUNCHED_RUNTIME,
    Cancelled,
    Failed,
    Launch,
    OnRestart,
    Outcome,
    StoredTask,
    Succeeded,
    Task,
    TaskStatus,
    TerminalOutcome,
    TimedOut,
)
from flowstead.registry import TaskDefinition
from flowstead.results import Applied, Created, Refused, Rejected, error_for, raise_refusal
from flowstead.rules.user_json import encode_json
from flowstead.scoped import ScopedFlows
from flowstead.store import codec
from flowstead.store.port import Scope

log = get_logger(__name__)

_CREATABLE: Final = tuple(status for status in FlowStatus if status in LIVE_FLOW_STATUSES)
_RESUMABLE: Final = (FlowStatus.QUEUED, FlowStatus.RUNNING)
_LINKABLE: Final = (TaskStatus.QUEUED, TaskStatus.RUNNING)
_REPORTABLE: Final = (TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED)
_FAILURES: Final[dict[TaskStatus, Callable[[Failure], Outcome]]] = {
    TaskStatus.FAILED: Failed,
    TaskStatus.TIMED_OUT: TimedOut,
    TaskStatus.CANCELLED: Cancelled,
}


class _Way(msgspec.Struct, frozen=True, kw_only=True):
    """How a child is to be run: by somebody else, or here under a definition."""

    runtime: str
    definition: TaskDefinition | None = None
    launch: Launch | None = None
    timeout: float | None = None


class SessionFlows(ScopedFlows):
    """The flows of one session. No method takes an owner: other owners' flows cannot be found from here.

    Mutations answer `Applied` or `Rejected` and are durable before they do. Cancelling a call while it waits
    leaves its mutation applied or not, never half done; read the flow again to know.
    """

    def __init__(
        self, core: Core, *, session_key: str, requester_origin: Encoded | UnsetType
    ) -> None:
        super().__init__(core, Scope(session_key), session_key)
        self._session_key = session_key
        self._origin = requester_origin

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
        draft = StoredFlow(
            key=engine.store.next_key(),
            flow_id=given or engine.ids.flow_id(controller, now),
            sync_mode=SyncMode.MANAGED,
            owner_key=self._session_key,
            requester_origin=self._usable(self._origin),
            controller_id=controller,
            correlation_id=arguments.optional_text(correlation_id, "correlation_id"),
            revision=0,
            status=arguments.choice(status, FlowStatus, "status", _CREATABLE),
            notify_policy=arguments.choice(notify_policy, NotifyPolicy, "notify_policy"),
            goal=arguments.text(goal, "goal", missing="Managed flow goal is required."),
            current_step=arguments.optional_text(current_step, "current_step"),
            state_json=self._usable(self._encode(state_json, "state_json")),
            state_version=arguments.count(state_version, "state_version"),
            wait_json=self._usable(self._encode_wait(wait_json)),
            idempotency_key=arguments.optional_text(idempotency_key, "idempotency_key"),
            created_at=now,
            updated_at=now,
        )
        if draft.idempotency_key is None:
            return await self._create(draft, is_new=given is None)
        return await self._create_once(draft, given)

    async def _create(self, draft: StoredFlow, *, is_new: bool) -> Flow:
        engine = self._core.engine
        key = FlowKey(draft.owner_key, draft.flow_id)
        reply = await engine.ask(key, Create(draft=draft), self._actor, is_new=is_new)
        if reply.refusal is not None:
            raise_refusal(reply.refusal, _flow_in(reply))
        return _present(reply)

    async def _create_once(self, draft: StoredFlow, given_id: str | None) -> Flow:
        """Create under an idempotency key: one caller at a time for each key, the first one's flow for all."""
        engine, creating = self._core.engine, self._core.creating
        assert draft.idempotency_key is not None
        named = (draft.owner_key, draft.idempotency_key)
        draft = msgspec.structs.replace(draft, request_digest=_digest(draft, given_id))
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
            reply = engine.ask(
                key, Create(draft=draft), self._actor, is_new=first is None and given_id is None
            )
        except BaseException:
            leave()
            raise
        reply.add_done_callback(leave)
        # Cancelling this caller must not free the key before the flow is on disk.
        answered = await asyncio.shield(reply)
        if answered.refusal is not None:
            raise_refusal(answered.refusal, _flow_in(answered))
        return _present(answered)

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
        Cancelling the caller after acceptance does not undo the change.

        Args:
            flow_id: The flow.
            expected_revision: The revision you last saw.
            current_step, state_json: Set if given, cleared by None.
            wait_json: What is awaited (`kind`, `channel`, `threadKey`, …).
            blocked_task_id, blocked_summary: Who or what needs attention, and why, for people.
        """
        command = SetWaiting(
            expected_revision=arguments.revision(expected_revision),
            patch=self._patch(current_step, state_json),
            wait_json=self._encoded_or_null(wait_json),
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
            return Applied(_present(reply))
        return Rejected(reply.refusal.code, _flow_in(reply), reply.refusal.reason)

    # ---- children ---------------------------------------------------------------------------------

    async def run_task(
        self,
        *,
        flow_id: str,
        task: str,
        runtime: str | None = None,
        run: str | Callable[..., Awaitable[Json]] | None = None,
        input_json: Json | UnsetType = UNSET,
        run_id: str | None = None,
        child_session_key: str | None = None,
        label: str | None = None,
        status: str = "queued",
        started_at: int | None = None,
        last_event_at: int | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> Created | Refused:
        """Add a child to the flow, durably; the flow's revision and status stay as they are.

        Without `run` the child is **linked**: somebody else runs it and reports by `start_task`,
        `progress_task`, `complete_task`, `fail_task`. With `run` it is **launched**: the runtime runs it,
        supervised, under the flow. Cancelling the caller after acceptance does not stop the child.

        Args:
            flow_id: The flow.
            task: What the child is told to do.
            runtime: Who runs it: `subagent`, `acp`, `cli`, `cron` or a word of your own. Linked children
                need one.
            run: A registered task, its name, or any `async def fn(ctx, input) -> Json`. A function that is
                not registered cannot be found again: its child ends as lost if the process dies.
            input_json: Handed to the function.
            run_id: Names the child inside the flow; asking again answers the first one as a duplicate.
            child_session_key: Where a linked child runs.
            label: A short title.
            status, started_at, last_event_at: How far a linked child has come; the times count only for
                `running`.
            timeout: Seconds an attempt of a launched child may take.
            retry: How failures of a launched child are tried again.

        Raises:
            ValueError, TypeError: An argument makes no sense, or `run` names no registered task.
        """
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        begun = arguments.choice(status, TaskStatus, "status", _LINKABLE)
        way = self._way(run, runtime, begun, timeout, retry)
        draft = TaskDraft(
            key=engine.store.next_key(),
            task_id=engine.ids.task_id(),
            runtime=way.runtime,
            task=arguments.instruction(task, "task"),
            run_id=arguments.optional_text(run_id, "run_id"),
            child_session_key=arguments.optional_text(child_session_key, "child_session_key"),
            label=arguments.optional_text(label, "label"),
            input_json=self._encode(input_json, "input_json"),
            status=begun,
            started_at=arguments.instant(started_at, "started_at"),
            last_event_at=arguments.instant(last_event_at, "last_event_at"),
            timeout=way.timeout,
            launch=way.launch,
        )
        if wanted is None:
            return _refused(NOT_FOUND, None)
        return await self._add_task(FlowKey(self._session_key, wanted), draft, way.definition)

    def _way(
        self,
        run: str | Callable[..., Awaitable[Json]] | None,
        runtime: str | None,
        begun: TaskStatus,
        timeout: float | None,
        retry: Retry | None,
    ) -> _Way:
        """Linked or launched, and under which policy."""
        limit, policy = arguments.seconds(timeout, "timeout"), arguments.retry(retry)
        who = None if runtime is None else arguments.text(runtime, "runtime")
        if run is None:
            if who is None:
                raise ValueError("A linked task needs a runtime; a launched one needs run=.")
            if limit is not None or policy is not None:
                raise ValueError("timeout and retry are for children launched with run=.")
            return _Way(runtime=who)
        if begun is not TaskStatus.QUEUED:
            raise ValueError("A child launched with run= starts as queued; leave status out.")
        functions = self._core.functions
        definition = functions.define(run)
        launch = functions.launch(definition)
        launch = msgspec.structs.replace(
            launch,
            retry=policy or launch.retry,
            on_restart=OnRestart.LOST if launch.function is None else launch.on_restart,
        )
        return _Way(
            runtime=who or LAUNCHED_RUNTIME,
            definition=definition,
            launch=launch,
            timeout=definition.timeout if limit is None else limit,
        )

    async def _add_task(
        self, key: FlowKey, draft: TaskDraft, definition: TaskDefinition | None
    ) -> Created | Refused:
        engine, functions = self._core.engine, self._core.functions
        is_bound = definition is not None and functions.bind(key, draft, definition)
        asked = engine.ask(key, AddTasks(drafts=(draft,)), self._actor)
        if is_bound:
            asked.add_done_callback(partial(_forget_refused, functions, key, draft))
            # Cancelling this caller must not hide from us whether the function is needed.
            reply = await asyncio.shield(asked)
        else:
            reply = await asked
        if reply.refusal is not None:
            return _refused(reply.refusal, _flow_in(reply))
        [child] = reply.children
        found = codec.expose_task(child) if isinstance(child, StoredTask) else None
        if found is None:
            # It ended long ago, so nothing will run under its name any more.
            functions.forget(key, draft)
            found = await self.get_task(str(child))
        if found is None or found.task_id != draft.task_id:
            reason = f"Flow already has a task with run id {draft.run_id!r}."
            return Refused(Code.DUPLICATE, reason, True, _present(reply), found)
        self._core.homes.remember(found.task_id, key)
        return Created(_present(reply), found)

    async def start_task(self, task_id: str) -> Task | None:
        """Report that a linked child has started: queued → running. None if there is no such child.

        Cancelling the caller after acceptance does not take the report back.
        """
        return await self._report(task_id, lambda found: StartReport(task_id=found))

    async def progress_task(self, task_id: str, *, summary: str | None = None) -> Task | None:
        """Report how far a linked child is, or with no summary only that it lives.

        Cancelling the caller after acceptance does not take the report back.
        """
        said = arguments.optional_text(summary, "summary")
        return await self._report(
            task_id,
            lambda found: ProgressReport(task_id=found, summary=UNSET if said is None else said),
        )

    async def complete_task(
        self,
        task_id: str,
        *,
        result_json: Json | UnsetType = UNSET,
        terminal_summary: str | None = None,
        terminal_outcome: str | None = None,
    ) -> Task | None:
        """Report that a linked child has succeeded. A child that has ended already is answered as it is.

        Cancelling the caller after acceptance does not take the report back.

        Raises:
            InvalidState, StateTooLarge: The result cannot be kept. The child goes on.
            TaskNotLinked: The child is run by this runtime.
        """
        result = self._encode(result_json, "result_json")
        summary = _collapsed(arguments.optional_text(terminal_summary, "terminal_summary"))
        outcome = (
            None
            if terminal_outcome is None
            else arguments.choice(terminal_outcome, TerminalOutcome, "terminal_outcome")
        )
        return await self._report(
            task_id,
            lambda found: EndReport(
                task_id=found,
                outcome=Succeeded(),
                result=result,
                terminal_summary=summary,
                terminal_outcome=outcome,
            ),
        )

    async def fail_task(self, task_id: str, *, error: str, status: str = "failed") -> Task | None:
        """Report that a linked child has failed, timed out or was cancelled. An ended one stays as it is.

        Cancelling the caller after acceptance does not take the report back.

        Raises:
            TaskNotLinked: The child is run by this runtime.
        """
        ended = arguments.choice(status, TaskStatus, "status", _REPORTABLE)
        failure = Failure(kind=ended.value, message=arguments.text(error, "error"))
        outcome = _FAILURES[ended](failure)
        return await self._report(task_id, lambda found: EndReport(task_id=found, outcome=outcome))

    async def _report(self, task_id: str, command: Callable[[str], Command]) -> Task | None:
        engine, wanted = self._core.enter(), arguments.lookup(task_id, "task_id")
        if wanted is None:
            return None
        key = self._core.homes.find(wanted, self._scope)
        if key is None:
            found = await engine.store.find_task(self._scope, wanted)
            if found is None:
                return None
            key = found[0]
        report = command(wanted)
        reply = await engine.ask(key, report, self._actor)
        if reply.refusal is not None:
            raise_refusal(reply.refusal, _flow_in(reply))
        [child] = reply.children
        if isinstance(child, StoredTask):
            return codec.expose_task(child)
        if isinstance(report, EndReport):
            log.info("end.too_late", flow_id=key.flow_id, task_id=child)
        return await self.get_task(child)

    # ---- user JSON --------------------------------------------------------------------------------

    def _patch(self, current_step: str | UnsetType | None, state_json: Json | UnsetType) -> Patch:
        return Patch(
            current_step=arguments.patched_text(current_step, "current_step"),
            state_json=self._encode(state_json, "state_json"),
        )

    def _encode(self, value: Json | UnsetType, name: str) -> Encoded | UnsetType:
        if value is UNSET:
            return UNSET
        limits = self._core.engine.limits
        encoded = encode_json(
            value, name=name, max_bytes=limits.state_bytes, max_depth=limits.json_depth
        )
        if isinstance(encoded, Raw) and len(memoryview(encoded)) > limits.state_warn_bytes:
            log.warning("value.large", field=name, bytes=len(memoryview(encoded)))
        return encoded

    def _encode_wait(self, value: Json | UnsetType) -> Encoded | UnsetType:
        return UNSET if value is UNSET else self._encoded_or_null(value)

    def _encoded_or_null(self, value: Json) -> Encoded:
        limits = self._core.engine.limits
        return encode_json(
            value, name="wait_json", max_bytes=limits.wait_bytes, max_depth=limits.json_depth
        )

    @staticmethod
    def _usable(encoded: Encoded | UnsetType) -> Raw | UnsetType:
        if isinstance(encoded, Defect):
            raise error_for(Code(encoded.code), encoded.reason)
        return encoded


def _forget_refused(
    functions: Functions, key: FlowKey, draft: TaskDraft, asked: asyncio.Future[Reply]
) -> None:
    """Let go of the function of a child that will not be."""
    if asked.exception() is not None or asked.result().refusal is not None:
        functions.forget(key, draft)


def _present(reply: Reply) -> Flow:
    assert reply.doc is not None
    return codec.read_flow(reply.doc)


def _flow_in(reply: Reply) -> Flow | None:
    return None if reply.doc is None else codec.read_flow(reply.doc)


def _refused(refusal: Refusal, flow: Flow | None) -> Refused:
    return Refused(refusal.code, refusal.reason, refusal.code is not Code.NOT_FOUND, flow)


def _collapsed(summary: str | None) -> str | None:
    return None if summary is None else " ".join(summary.split())


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
