"""The controller face: what a flow's own code is given.

Theory of operation. A controller is plain Python, run from the top; after a crash it is run from the top again.
What makes that safe is steps: `run`, `map` and `once` give each piece of work a name inside the flow, and the
name is the `run_id` of a child. A step whose outcome is recorded answers from the record without running; one
that was cut off is started again as a new attempt; only a step never seen before begins. So the only promise a
controller has to keep is that the same step has the same name when it is run again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from flowstead import arguments, errors
from flowstead.engine.engine import Engine
from flowstead.engine.mailbox import Reply
from flowstead.functions import Functions
from flowstead.model.code import Code
from flowstead.model.command import (
    AddTasks,
    Command,
    Defect,
    Encoded,
    Fail,
    Finish,
    Patch,
    TaskDraft,
    Update,
)
from flowstead.model.flow import Failure, Flow, FlowKey, Json
from flowstead.model.retry import Retry
from flowstead.model.task import (
    LAUNCHED_RUNTIME,
    Cancelled,
    Failed,
    Lost,
    Succeeded,
    Task,
    TimedOut,
    is_active,
    outcome_of,
)
from flowstead.registry import TaskDefinition
from flowstead.results import error_for, raise_refusal
from flowstead.rules.user_json import encode_json
from flowstead.store import codec
from flowstead.store.port import Scope

if TYPE_CHECKING:
    from flowstead.task_context import TaskContext

_CONTROLLER: Final = "controller"
_MAP_CHUNK: Final = 256


class FlowContext:
    """What a controller works with: its flow, carried forward, and the steps it can take.

    Every method raises what stopped it (`errors.RefusedError` and its kin) rather than answering with it.
    Once a cancel is requested, a step that would start something new raises `CancelPending`; letting that
    exception pass ends the flow as cancelled.
    """

    def __init__(self, engine: Engine, functions: Functions, key: FlowKey, doc: bytes) -> None:
        self._engine = engine
        self._functions = functions
        self._key = key
        self._know(doc)
        self._named: Counter[str] = Counter()
        self._asked: asyncio.Future[Reply] | None = None

    def _know(self, doc: bytes) -> None:
        # The record too: what was decoded from it is the controller's own, to change as it likes.
        self._doc = doc
        self._flow = codec.read_flow(doc)

    @property
    def flow(self) -> Flow:
        """The flow as this controller last knew it."""
        return self._flow

    @property
    def flow_id(self) -> str:
        return self._flow.flow_id

    @property
    def revision(self) -> int:
        return self._flow.revision

    @property
    def state_json(self) -> Json:
        return self._flow.state_json

    @property
    def current_step(self) -> str | None:
        return self._flow.current_step

    # ---- steps ------------------------------------------------------------------------------------

    async def run(
        self,
        function: str | Callable[..., Awaitable[Json]],
        input: Json = None,
        *,
        name: str | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> Json:
        """Run one child and return its result; answer from the record if it has run before.

        Args:
            function: A registered task, its name, or any `async def fn(ctx, input)`.
            input: JSON handed to the function. A recorded step ignores it.
            name: The step's name in this flow. Unless given: the function's name, with `#2` and so on for
                later calls; give one where the order of calls may differ from run to run.
            timeout: Seconds an attempt may take, instead of the task's own.
            retry: How failures are tried again, instead of the task's own.

        Raises:
            ChildError: The child ended without a result.
            CancelPending: A cancel is requested, and the step has not begun.

        Cancelling the wait leaves the child running; it ends with the flow at the latest.
        """
        definition = self._define(function, timeout=timeout, retry=retry)
        step = self._name(name, definition.name)
        drafts = [self._draft(definition, step, input)]
        [task] = await self._ended(drafts, definition)
        return _result(task)

    async def map(
        self,
        function: str | Callable[..., Awaitable[Json]],
        inputs: Iterable[Json],
        *,
        name: str | None = None,
        limit: int | None = None,
        return_outcomes: bool = False,
    ) -> list[Any]:
        """Run one child for each input, at most `limit` at once, and return the results in input order.

        All children are seen to their end, whatever becomes of their siblings.

        Args:
            function: A registered task, its name, or any `async def fn(ctx, input)`.
            inputs: One JSON value for each child; the child's step is `name[index]`.
            name: The step's name in this flow, by default the function's.
            limit: Most children of this step running at once; the runtime's usual limit unless given.
            return_outcomes: Answer `Succeeded | Failed | TimedOut | Cancelled | Lost` for each input instead
                of raising.

        Raises:
            ChildError: The first child, in input order, that ended without a result.
            CancelPending: A cancel is requested, and part of the step has not begun.

        Cancelling the wait leaves the children running; they end with the flow at the latest.
        """
        definition = self._define(function)
        step = self._name(name, definition.name)
        most = None if limit is None else arguments.count(limit, "limit")
        drafts = [
            self._draft(definition, f"{step}[{index}]", value, group=step, limit=most)
            for index, value in enumerate(inputs)
        ]
        tasks = await self._ended(drafts, definition)
        return [outcome_of(task) if return_outcomes else _result(task) for task in tasks]

    async def once(self, name: str, function: Callable[[], Awaitable[Json]]) -> Json:
        """Run `function()` as a step and return its result; answer from the record if it has run before.

        For effects written inline: `await flow.once("post", lambda: post(message))`. If the process dies
        between the effect and its record, the function runs again as a new attempt.

        Raises:
            ChildFailed: The function raised.
            CancelPending: A cancel is requested, and the step has not begun.

        Cancelling the wait leaves the function running; it ends with the flow at the latest.
        """

        async def call(_context: TaskContext, _input: Json) -> Json:
            return await function()

        step = arguments.text(name, "name")
        definition = TaskDefinition(name=step, function=call)
        drafts = [self._draft(definition, step, UNSET)]
        [task] = await self._ended(drafts, definition)
        return _result(task)

    # ---- the flow itself --------------------------------------------------------------------------

    async def update(
        self, *, current_step: str | UnsetType | None = UNSET, state_json: Json | UnsetType = UNSET
    ) -> None:
        """Set fields, durably. UNSET leaves alone, None clears.

        live → the same status, revision + 1. Doing it again after a crash is harmless. Cancelling the caller
        after acceptance does not undo the change.

        Raises:
            RevisionConflict: Somebody else has changed the flow. Nothing was written.
        """
        patch = self._patch(current_step, state_json)
        await self._mutate(lambda revision: Update(expected_revision=revision, patch=patch))

    async def finish(
        self, *, current_step: str | UnsetType | None = UNSET, state_json: Json | UnsetType = UNSET
    ) -> None:
        """End the flow as succeeded; children still running are stopped. Returning does the same.

        Cancelling the caller after acceptance does not undo the end.
        """
        patch = self._patch(current_step, state_json)
        await self._mutate(
            lambda revision: Finish(expected_revision=revision, patch=patch, by_controller=True)
        )

    async def fail(
        self,
        *,
        current_step: str | UnsetType | None = UNSET,
        state_json: Json | UnsetType = UNSET,
        blocked_task_id: str | None = None,
        blocked_summary: str | None = None,
    ) -> None:
        """End the flow as failed; children still running are stopped. Raising does the same.

        Cancelling the caller after acceptance does not undo the end.
        """
        patch = self._patch(current_step, state_json)
        summary = arguments.optional_text(blocked_summary, "blocked_summary")
        await self._mutate(
            lambda revision: Fail(
                expected_revision=revision,
                patch=patch,
                blocked_task_id=UNSET if blocked_task_id is None else blocked_task_id,
                blocked_summary=UNSET if summary is None else summary,
                failure=Failure(kind="failed", message=summary),
                by_controller=True,
            )
        )

    async def _mutate(self, command: Callable[[int], Command]) -> None:
        while True:
            await self._hear()
            reply = await self._engine.ask_patiently(
                self._key, command(self._flow.revision), _CONTROLLER, posted=self._note
            )
            self._asked = None
            if reply.refusal is None:
                assert reply.doc is not None
                self._know(reply.doc)
                return
            current = None if reply.doc is None else codec.read_flow(reply.doc)
            if (
                reply.refusal.code is not Code.REVISION_CONFLICT
                or reply.doc is None
                or not _differ_by_intent_only(self._doc, reply.doc)
            ):
                raise_refusal(reply.refusal, current)
            # Somebody asked for a cancel meanwhile; what this controller knows of its flow still holds.
            self._know(reply.doc)

    def _note(self, asked: asyncio.Future[Reply]) -> None:
        self._asked = asked

    async def _hear(self) -> None:
        """Learn what became of a change whose wait was cancelled: it is this controller's own doing."""
        while (asked := self._asked) is not None:
            await asyncio.wait({asked})
            if self._asked is asked:
                self._asked = None
                reply = None if asked.exception() else asked.result()
                if reply is not None and reply.refusal is None and reply.doc is not None:
                    self._know(reply.doc)

    # ---- making steps -----------------------------------------------------------------------------

    def _define(
        self,
        function: str | Callable[..., Awaitable[Json]],
        *,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> TaskDefinition:
        definition = self._functions.define(function)
        if timeout is not None:
            given = arguments.seconds(timeout, "timeout")
            definition = msgspec.structs.replace(definition, timeout=given)
        if retry is not None:
            definition = msgspec.structs.replace(definition, retry=arguments.retry(retry))
        return definition

    def _name(self, name: str | None, usual: str) -> str:
        if name is not None:
            return arguments.text(name, "name")
        self._named[usual] += 1
        turn = self._named[usual]
        return usual if turn == 1 else f"{usual}#{turn}"

    def _draft(
        self,
        definition: TaskDefinition,
        step: str,
        input: Json,
        *,
        group: str | None = None,
        limit: int | None = None,
    ) -> TaskDraft:
        encoded = self._encode(input, "input")
        if isinstance(encoded, Defect):
            raise error_for(Code(encoded.code), encoded.reason)
        launch = self._functions.launch(
            definition, group=None if limit is None else group, limit=limit
        )
        return TaskDraft(
            key=self._engine.store.next_key(),
            task_id=self._engine.ids.task_id(),
            runtime=LAUNCHED_RUNTIME,
            task=definition.name,
            run_id=step,
            input_json=encoded,
            timeout=definition.timeout,
            launch=launch,
        )

    async def _ended(self, drafts: Sequence[TaskDraft], definition: TaskDefinition) -> list[Task]:
        """The ended child of each draft's step, in order, however it comes to have ended."""
        ends: list[asyncio.Future[bytes] | str] = []
        for start in range(0, len(drafts), _MAP_CHUNK):
            ends.extend(await self._begin(drafts[start : start + _MAP_CHUNK], definition))
        recorded = await self._recorded([end for end in ends if isinstance(end, str)])
        return [
            recorded[end] if isinstance(end, str) else codec.read_task(await end) for end in ends
        ]

    async def _begin(
        self, drafts: Sequence[TaskDraft], definition: TaskDefinition
    ) -> list[asyncio.Future[bytes] | str]:
        """Add the children; answer for each the future of its end, or its id if it ended long ago."""
        engine = self._engine
        waiting = {draft.task_id: engine.task_ends.register(draft.task_id) for draft in drafts}
        bound = [draft for draft in drafts if self._functions.bind(self._key, draft, definition)]
        asked: list[asyncio.Future[Reply]] = []
        try:
            reply = await engine.ask_patiently(
                self._key, AddTasks(drafts=tuple(drafts)), _CONTROLLER, posted=asked.append
            )
        except BaseException:
            self._forget(waiting, ())
            if asked:
                # Accepted, or not: whoever comes to know says whether the functions are needed.
                asked[-1].add_done_callback(partial(self._abandon, drafts, bound))
            else:
                self._forget({}, bound)
            raise
        if reply.refusal is not None:
            self._forget(waiting, bound)
            raise_refusal(reply.refusal, None if reply.doc is None else codec.read_flow(reply.doc))
        ends: list[asyncio.Future[bytes] | str] = []
        for draft, child in zip(drafts, reply.children, strict=True):
            if isinstance(child, str):
                ends.append(child)
                self._forget({draft.task_id: waiting[draft.task_id]}, [draft])
            elif child.task_id in waiting:
                ends.append(waiting[child.task_id])
            else:
                waiting[draft.task_id].cancel()
                ends.append(await self._join(child.task_id))
        return ends

    def _abandon(
        self,
        drafts: Sequence[TaskDraft],
        bound: Sequence[TaskDraft],
        asked: asyncio.Future[Reply],
    ) -> None:
        """The answer to steps nobody waits for any more: keep the functions only of those that run."""
        if asked.exception() is not None or asked.result().refusal is not None:
            self._forget({}, bound)
            return
        for draft, child in zip(drafts, asked.result().children, strict=True):
            if isinstance(child, str):
                self._forget({}, [draft])

    async def _join(self, task_id: str) -> asyncio.Future[bytes] | str:
        """The end of a step that is under way already, begun by an earlier run of this controller."""
        end = self._engine.task_ends.register(task_id)
        try:
            task = (await self._recorded([task_id]))[task_id]
        except BaseException:
            end.cancel()
            raise
        if is_active(task):
            return end
        end.cancel()
        return task_id

    def _forget(
        self, waiting: dict[str, asyncio.Future[bytes]], bound: Sequence[TaskDraft]
    ) -> None:
        for future in waiting.values():
            future.cancel()
        for draft in bound:
            self._functions.forget(self._key, draft)

    async def _recorded(self, task_ids: list[str]) -> dict[str, Task]:
        if not task_ids:
            return {}
        scope = Scope(self._key.owner_key)
        tasks = await self._engine.store.list_tasks(scope, self.flow_id, task_ids=task_ids)
        return {task.task_id: task for task in tasks}

    def _patch(self, current_step: str | UnsetType | None, state_json: Json | UnsetType) -> Patch:
        return Patch(
            current_step=arguments.patched_text(current_step, "current_step"),
            state_json=UNSET if state_json is UNSET else self._encode(state_json, "state_json"),
        )

    def _encode(self, value: Json | UnsetType, name: str) -> Encoded | UnsetType:
        if value is UNSET:
            return UNSET
        limits = self._engine.limits
        encoded: Encoded = encode_json(
            value, name=name, max_bytes=limits.state_bytes, max_depth=limits.json_depth
        )
        return encoded


def _result(task: Task) -> Json:
    match outcome_of(task):
        case Succeeded(result):
            return result
        case Failed(failure):
            raise errors.ChildFailed(task.task_id, task.run_id, failure)
        case TimedOut(failure):
            raise errors.ChildTimedOut(task.task_id, task.run_id, failure)
        case Cancelled(failure):
            raise errors.ChildCancelled(task.task_id, task.run_id, failure)
        case Lost(failure):
            raise errors.ChildLost(task.task_id, task.run_id, failure)


def _differ_by_intent_only(mine: bytes, current: bytes) -> bool:
    known, now = codec.read_flow(mine), codec.read_flow(current)
    return now == msgspec.structs.replace(
        known,
        revision=now.revision,
        updated_at=now.updated_at,
        cancel_requested_at=now.cancel_requested_at,
    )
