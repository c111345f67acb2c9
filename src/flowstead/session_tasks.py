"""The ledger face of children: adding them to flows, reporting on linked ones, retrying, and detached runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead import arguments
from flowstead.core import Core
from flowstead.engine.mailbox import Reply
from flowstead.executors import Command
from flowstead.functions import Functions, Policy, Runnable
from flowstead.log import get_logger
from flowstead.model.code import NOT_FOUND, Code, Refusal
from flowstead.model.command import (
    AddTasks,
    Defect,
    Encoded,
    EndReport,
    Patch,
    ProgressReport,
    Spawn,
    StartReport,
    TaskDraft,
)
from flowstead.model.command import Command as FlowCommand
from flowstead.model.flow import (
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
    is_bare,
)
from flowstead.registry import TaskDefinition
from flowstead.results import Created, Refused, error_for, raise_refusal
from flowstead.rules.user_json import encode_json
from flowstead.session_signals import SessionSignals
from flowstead.store import codec
from flowstead.store.port import Scope

log = get_logger(__name__)

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


class SessionTasks(SessionSignals):
    """The children of one session's flows."""

    def __init__(
        self, core: Core, *, session_key: str, requester_origin: Encoded | UnsetType
    ) -> None:
        super().__init__(core, Scope(session_key), session_key)
        self._session_key = session_key
        self._origin = requester_origin

    # ---- children ---------------------------------------------------------------------------------

    async def run_task(
        self,
        *,
        flow_id: str,
        task: str,
        runtime: str | None = None,
        run: Runnable | None = None,
        input_json: Json | UnsetType = UNSET,
        run_id: str | None = None,
        child_session_key: str | None = None,
        label: str | None = None,
        status: str = "queued",
        started_at: int | None = None,
        last_event_at: int | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        queue_timeout: float | None = None,
        retry: Retry | None = None,
        idempotent: bool | None = None,
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
            run: A registered task, its name, any function of (ctx, input), or a spec such as `Command`. A function
                that is not registered cannot be found again: its child ends as lost if the process dies.
            input_json: Handed to the function.
            run_id: Names the child inside the flow; asking again answers the first one as a duplicate.
            child_session_key: Where a linked child runs.
            label: A short title.
            status, started_at, last_event_at: How far a linked child has come; the times count only for
                `running`.
            timeout, idle_timeout: Seconds an attempt of a launched child may take, or go without a sign of life.
            queue_timeout: Seconds a launched child may wait for its first start.
            retry: How failures of a launched child are tried again.
            idempotent: False for a launched child that must not be started twice by itself.

        Raises:
            ValueError, TypeError: An argument makes no sense, or `run` names no registered task.
        """
        self._core.enter()
        wanted = arguments.lookup(flow_id, "flow_id")
        begun = arguments.choice(status, TaskStatus, "status", _LINKABLE)
        policy = Policy(
            timeout=arguments.seconds(timeout, "timeout"),
            idle_timeout=arguments.seconds(idle_timeout, "idle_timeout"),
            queue_timeout=arguments.seconds(queue_timeout, "queue_timeout"),
            retry=arguments.retry(retry),
            idempotent=idempotent,
        )
        way = self._way(run, runtime, begun, policy)
        draft = self._draft(
            way,
            begun,
            task=task,
            input_json=input_json,
            run_id=run_id,
            child_session_key=child_session_key,
            label=label,
            started_at=started_at,
            last_event_at=last_event_at,
        )
        if wanted is None:
            return _refused(NOT_FOUND, None)
        key = FlowKey(self._session_key, wanted)
        return await self._add(key, draft, way.definition, AddTasks(drafts=(draft,)))

    def _way(
        self, run: Runnable | None, runtime: str | None, begun: TaskStatus, policy: Policy
    ) -> _Way:
        """Linked or launched, and under which policy."""
        who = None if runtime is None else arguments.text(runtime, "runtime")
        if run is None:
            if who is None:
                raise ValueError("A linked task needs a runtime; a launched one needs run=.")
            if policy != Policy():
                raise ValueError("time-outs and retry are for children launched with run=.")
            return _Way(runtime=who)
        if begun is not TaskStatus.QUEUED:
            raise ValueError("A child launched with run= starts as queued; leave status out.")
        functions = self._core.functions
        definition = functions.define(run, policy)
        launch = functions.launch(definition)
        if is_bare(launch):
            launch = msgspec.structs.replace(launch, on_restart=OnRestart.LOST)
        usual = "cli" if isinstance(run, Command) else LAUNCHED_RUNTIME
        return _Way(runtime=who or usual, definition=definition, launch=launch)

    def _draft(
        self,
        way: _Way,
        begun: TaskStatus,
        *,
        task: str,
        input_json: Json | UnsetType,
        run_id: str | None,
        child_session_key: str | None,
        label: str | None,
        started_at: int | None,
        last_event_at: int | None,
    ) -> TaskDraft:
        engine, definition = self._core.engine, way.definition
        policy = definition or TaskDefinition(name="")
        return TaskDraft(
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
            timeout=policy.timeout,
            idle_timeout=policy.idle_timeout,
            queue_timeout=policy.queue_timeout,
            child_flow_id=self._core.functions.child_flow_id(policy, engine),
            launch=way.launch,
        )

    async def _add(
        self,
        key: FlowKey,
        draft: TaskDraft,
        definition: TaskDefinition | None,
        command: AddTasks | Spawn,
        *,
        new: bool = False,
    ) -> Created | Refused:
        engine, functions = self._core.engine, self._core.functions
        is_bound = definition is not None and functions.bind(key, draft, definition)
        asked = engine.ask(key, command, self._actor, is_new=new)
        if is_bound:
            asked.add_done_callback(partial(_forget_refused, functions, key, draft))
            # Cancelling this caller must not hide from us whether the function is needed.
            reply = await asyncio.shield(asked)
        else:
            reply = await asked
        if reply.refusal is not None:
            return _refused(reply.refusal, flow_in(reply))
        [child] = reply.children
        found = codec.expose_task(child) if isinstance(child, StoredTask) else None
        if found is None:
            # It ended long ago, so nothing will run under its name any more.
            functions.forget(key, draft)
            found = await self.get_task(str(child))
        if found is None or found.task_id != draft.task_id:
            reason = f"Flow already has a task with run id {draft.run_id!r}."
            return Refused(Code.DUPLICATE, reason, True, present(reply), found)
        self._core.homes.remember(found.task_id, key)
        return Created(present(reply), found)

    async def spawn_detached(
        self,
        *,
        task: str,
        runtime: str | None = None,
        run: Runnable | None = None,
        goal: str | None = None,
        input_json: Json | UnsetType = UNSET,
        run_id: str | None = None,
        child_session_key: str | None = None,
        label: str | None = None,
        correlation_id: str | None = None,
        notify_policy: str = "done_only",
        status: str = "queued",
        started_at: int | None = None,
        last_event_at: int | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        queue_timeout: float | None = None,
        retry: Retry | None = None,
        idempotent: bool | None = None,
    ) -> Created:
        """Begin one piece of work that needs no coordination: a task, and a flow that does nothing but follow it.

        The flow has the status of its task, ends when it ends, and can be read, waited for, watched and cancelled
        like any other; whatever else would change it answers `not_managed`. Arguments as for `run_task`.
        Cancelling the caller after acceptance does not stop the work.

        Args:
            goal: What the flow is for; the label, or the task, unless given.

        Raises:
            InvalidState, StateTooLarge: The input cannot be kept. Nothing was made.
            CommitFailed: Certainly not written.
            ValueError, TypeError: An argument makes no sense.
        """
        engine = self._core.enter()
        begun = arguments.choice(status, TaskStatus, "status", _LINKABLE)
        policy = Policy(
            timeout=arguments.seconds(timeout, "timeout"),
            idle_timeout=arguments.seconds(idle_timeout, "idle_timeout"),
            queue_timeout=arguments.seconds(queue_timeout, "queue_timeout"),
            retry=arguments.retry(retry),
            idempotent=idempotent,
        )
        way = self._way(run, runtime, begun, policy)
        draft = self._draft(
            way,
            begun,
            task=task,
            input_json=input_json,
            run_id=run_id,
            child_session_key=child_session_key,
            label=label,
            started_at=started_at,
            last_event_at=last_event_at,
        )
        now = engine.clock.now()
        wanted = arguments.optional_text(goal, "goal") or draft.label or draft.task
        flow = StoredFlow(
            key=engine.store.next_key(),
            flow_id=engine.ids.flow_id(draft.runtime, now),
            sync_mode=SyncMode.TASK_MIRRORED,
            owner_key=self._session_key,
            requester_origin=self._usable(self._origin),
            correlation_id=arguments.optional_text(correlation_id, "correlation_id"),
            revision=0,
            status=FlowStatus.QUEUED,
            notify_policy=arguments.choice(notify_policy, NotifyPolicy, "notify_policy"),
            goal=wanted,
            state_version=1,
            created_at=now,
            updated_at=now,
        )
        key = FlowKey(self._session_key, flow.flow_id)
        made = await self._add(key, draft, way.definition, Spawn(draft=flow, task=draft), new=True)
        if isinstance(made, Refused):
            made.unwrap()
        return made

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

    async def _report(self, task_id: str, command: Callable[[str], FlowCommand]) -> Task | None:
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
            raise_refusal(reply.refusal, flow_in(reply))
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


def present(reply: Reply) -> Flow:
    """The flow as an applied command left it."""
    assert reply.doc is not None
    return codec.read_flow(reply.doc)


def flow_in(reply: Reply) -> Flow | None:
    """The flow as a refused command found it."""
    return None if reply.doc is None else codec.read_flow(reply.doc)


def _refused(refusal: Refusal, flow: Flow | None) -> Refused:
    return Refused(refusal.code, refusal.reason, refusal.code is not Code.NOT_FOUND, flow)


def _collapsed(summary: str | None) -> str | None:
    return None if summary is None else " ".join(summary.split())
