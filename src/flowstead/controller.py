"""The controller face: what a flow's own code is given.

Theory of operation. A controller is plain Python, run from the top; after a crash it is run from the top again.
What makes that safe is steps: `run`, `map` and `once` give each piece of work a name inside the flow, and the
name is the `run_id` of a child. A step whose outcome is recorded answers from the record without running; one
that was cut off is started again as a new attempt; only a step never seen before begins. So the only promise a
controller has to keep is that the same step has the same name when it is run again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from flowstead import arguments
from flowstead.decision import Decision
from flowstead.engine.engine import Engine
from flowstead.engine.mailbox import Reply
from flowstead.flow_approvals import FlowApprovals
from flowstead.flow_messages import FlowMessages
from flowstead.functions import Functions, Policy, Runnable
from flowstead.model.code import Code
from flowstead.model.command import (
    Command,
    Fail,
    Finish,
    Patch,
    Update,
)
from flowstead.model.flow import Failure, Flow, FlowKey, Json
from flowstead.model.retry import Retry
from flowstead.model.task import (
    Cancelled,
    Succeeded,
    outcome_of,
)
from flowstead.registry import TaskDefinition
from flowstead.results import raise_refusal
from flowstead.rules.digests import DigestTime
from flowstead.standing import Standing
from flowstead.step import Completed, Step, distinct, first, result_of
from flowstead.steps import Steps
from flowstead.store import codec

if TYPE_CHECKING:
    from flowstead.task_context import TaskContext


class FlowContext(FlowApprovals, FlowMessages):
    """What a controller works with: its flow, carried forward, and the steps it can take.

    Every method raises what stopped it (`errors.RefusedError` and its kin) rather than answering with it.
    Once a cancel is requested, a step that would start something new raises `CancelPending`; letting that
    exception pass ends the flow as cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        functions: Functions,
        key: FlowKey,
        doc: bytes,
        *,
        digest_time: DigestTime,
    ) -> None:
        self._know(doc)
        self._steps = Steps(engine, functions, key)
        self._standing = Standing(self._steps)
        self._digest_time = digest_time
        self._questions = defaultdict(deque)
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

    @property
    def is_parked(self) -> bool:
        """Whether this run of the controller is over: the flow waits without it."""
        return self._steps.is_parked

    def park(self) -> None:
        """End the controller where it waits; the runtime's own affair."""
        self._standing.park()

    def close(self) -> None:
        """Let go of what a parked controller has begun to wait for; the runtime's own affair."""
        self._steps.close()

    # ---- steps ------------------------------------------------------------------------------------

    async def run(
        self,
        function: Runnable,
        input: Json = None,
        *,
        name: str | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        queue_timeout: float | None = None,
        retry: Retry | None = None,
        idempotent: bool | None = None,
        approval: Decision | None = None,
        fallback: Sequence[Runnable] = (),
    ) -> Json:
        """Run one child and return its result; answer from the record if it has run before.

        Args:
            function: A registered task, its name, any function of (ctx, input), or a spec: `Command`, `Process`,
                `Nested`, or what a registered executor takes.
            input: JSON handed to the function. A recorded step ignores it.
            name: The step's name in this flow. Unless given: the function's name, with `#2` and so on for
                later calls; give one where the order of calls may differ from run to run.
            timeout, idle_timeout, queue_timeout: Seconds an attempt may take, or go without a sign of life, or
                the child may wait for its first start, instead of the task's own.
            retry: How failures are tried again, instead of the task's own.
            idempotent: False for what must not be done twice, instead of what the task says.
            approval: The decision of `approve` that this step needs, and uses up: nothing is done unless the input
                is exactly what was approved, nobody else has used it, it has not expired, and nobody has changed
                the flow from outside since the controller that asked for it read it.
            fallback: What to run with the same input instead, one after another, once the one before has failed,
                timed out or got lost for good; each under its own policy, as the step `name/fallback-1` and so
                on. A child that somebody cancelled is not replaced.

        Raises:
            ChildError: The child, and every fallback, ended without a result; this is the last of them.
            NotApproved: The approval does not allow this. Nothing was begun.
            CancelPending: A cancel is requested, and the step has not begun.

        Cancelling the wait leaves the child running; it ends with the flow at the latest.
        """
        if isinstance(fallback, str) or not isinstance(fallback, Sequence):
            raise TypeError("fallback must be a sequence of functions or names, not one of them.")
        policy = Policy(
            timeout=timeout,
            idle_timeout=idle_timeout,
            queue_timeout=queue_timeout,
            retry=retry,
            idempotent=idempotent,
        )
        if approval is not None and fallback:
            raise ValueError("approval is for one step; a fallback would be another one.")
        definitions = [self._steps.define(function, policy)]
        definitions += [self._steps.define(other) for other in fallback]
        step = self._steps.name(name, definitions[0].name)
        for place, definition in enumerate(definitions):
            named = f"{step}/fallback-{place}" if place else step
            needed = _grant_in(approval)
            drafts = [self._steps.draft(definition, named, input, approval=needed)]
            [task] = await self._steps.ended(drafts, definition)
            if isinstance(outcome_of(task), Succeeded | Cancelled):
                break
        return result_of(task)

    async def start(
        self,
        function: Runnable,
        input: Json = None,
        *,
        name: str | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        queue_timeout: float | None = None,
        retry: Retry | None = None,
        idempotent: bool | None = None,
        approval: Decision | None = None,
    ) -> Step:
        """Begin one child and go on beside it; the same step again is the same child.

        The child is on record when this returns. Arguments as for `run`.

        Raises:
            NotApproved: The approval does not allow this. Nothing was begun.
            CancelPending: A cancel is requested, and the step has not begun.

        Cancelling the caller after acceptance leaves the child running; it ends with the flow at the latest.
        """
        policy = Policy(
            timeout=timeout,
            idle_timeout=idle_timeout,
            queue_timeout=queue_timeout,
            retry=retry,
            idempotent=idempotent,
        )
        definition = self._steps.define(function, policy)
        named = self._steps.name(name, definition.name)
        needed = _grant_in(approval)
        drafts = [self._steps.draft(definition, named, input, approval=needed)]
        [begun] = await self._steps.begin(drafts, definition)
        return Step(self._steps, named, begun)

    async def gather(self, *steps: Step, return_outcomes: bool = False) -> list[Any]:
        """The results of steps begun by `start`, in the order given.

        All of them are seen to their end, whatever becomes of the others.

        Args:
            steps: The steps.
            return_outcomes: Answer `Succeeded | Failed | TimedOut | Cancelled | Lost` for each instead of
                raising, so that partial results can be had.

        Raises:
            ChildError: The first child, in the order given, that ended without a result.

        Cancelling only stops the waiting.
        """
        for step in distinct(steps):
            await step.ended()
        return [await (step.outcome() if return_outcomes else step.result()) for step in steps]

    def as_completed(self, steps: Iterable[Step]) -> AsyncIterator[Step]:
        """The steps in the order in which their children end: `async for step in flow.as_completed(steps)`.

        A controller that is run again is given them in the same order. Cancelling only stops the waiting; whoever
        goes on with the same iterator is given the next.
        """
        return Completed(steps)

    async def first(self, steps: Iterable[Step], count: int = 1) -> list[Step]:
        """The first `count` steps to succeed, in the order in which they did; the others are stopped.

        `[winner] = await flow.first(steps)` is a race. A controller that is run again is given the same winners.

        Raises:
            ChildError: So many ended without a result that fewer than `count` can succeed: the last of them.
                The others are stopped.
            ValueError: `count` is less than 1, or more than there are steps.

        Cancelling only stops the waiting; as long as it waits, nothing is stopped.
        """
        among = distinct(steps)
        wanted = arguments.count(count, "count")
        if not 1 <= wanted <= len(among):
            raise ValueError(
                f"count must be from 1 to {len(among)}, the number of steps, not {wanted}."
            )
        return await first(among, wanted)

    async def map(
        self,
        function: Runnable,
        inputs: Iterable[Json],
        *,
        name: str | None = None,
        limit: int | None = None,
        return_outcomes: bool = False,
    ) -> list[Any]:
        """Run one child for each input, at most `limit` at once, and return the results in input order.

        All children are seen to their end, whatever becomes of their siblings.

        Args:
            function: What to run, as for `run`.
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
        definition = self._steps.define(function)
        step = self._steps.name(name, definition.name)
        most = None if limit is None else arguments.count(limit, "limit")
        drafts = [
            self._steps.draft(definition, f"{step}[{index}]", value, group=step, limit=most)
            for index, value in enumerate(inputs)
        ]
        tasks = await self._steps.ended(drafts, definition)
        return [outcome_of(task) if return_outcomes else result_of(task) for task in tasks]

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
        drafts = [self._steps.draft(definition, step, UNSET)]
        [task] = await self._steps.ended(drafts, definition)
        return result_of(task)

    # ---- the flow itself --------------------------------------------------------------------------

    async def update(
        self, *, current_step: str | UnsetType | None = UNSET, state_json: Json | UnsetType = UNSET
    ) -> None:
        """Set fields, durably. UNSET leaves alone, None clears.

        live → the same status, revision + 1. Doing it again after a crash is harmless. Cancelling the caller
        after acceptance does not undo the change.

        Raises:
            RevisionConflict: Somebody else has changed the flow. Nothing was written. A change while the controller
                stands in a wait is no conflict: it is run again from the top when it is woken, and reads what was
                written; unless it cannot be parked there.
        """
        patch = self._patch(current_step, state_json)
        await self._mutate(
            lambda revision: Update(expected_revision=revision, patch=patch, by_controller=True)
        )

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
            reply = await self._steps.ask(command(self._flow.revision), self._note)
            self._asked = None
            if reply.refusal is None:
                assert reply.doc is not None
                self._know(reply.doc)
                return
            current = None if reply.doc is None else codec.read_flow(reply.doc)
            if (
                reply.refusal.code is not Code.REVISION_CONFLICT
                or reply.doc is None
                or not _differ_by_standing_only(self._doc, reply.doc)
            ):
                raise_refusal(reply.refusal, current)
            # What this controller knows of its flow still holds.
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

    def _patch(self, current_step: str | UnsetType | None, state_json: Json | UnsetType) -> Patch:
        return Patch(
            current_step=arguments.patched_text(current_step, "current_step"),
            state_json=UNSET
            if state_json is UNSET
            else self._steps.encode(state_json, "state_json"),
        )


def _grant_in(approval: object) -> str | None:
    """What a step must name to use a decision; None where it needs none."""
    if approval is None:
        return None
    if isinstance(approval, Decision):
        return approval.grant
    what = type(approval).__qualname__
    raise TypeError(f"approval must be the Decision that flow.approve answered, not {what}.")


def _differ_by_standing_only(mine: bytes, current: bytes) -> bool:
    """Whether all that has happened to the flow is what the runtime or its owner do to any flow.

    It was asked to cancel, or blocked by a child a person had to look at, or it waited, and let go on. What the
    controller itself has written stands.
    """
    known, now = codec.read_flow(mine), codec.read_flow(current)
    before, after = codec.read_stored_flow(mine), codec.read_stored_flow(current)
    if after.wait is not None or after.content_revision != before.content_revision:
        return False  # somebody else has written, if only to set a wait
    return now == msgspec.structs.replace(
        known,
        revision=now.revision,
        status=now.status,
        blocked_task_id=now.blocked_task_id,
        blocked_summary=now.blocked_summary,
        updated_at=now.updated_at,
        wait_json=now.wait_json,
        answer_json=now.answer_json,
        cancel_requested_at=now.cancel_requested_at,
        cancel_started_at=now.cancel_started_at,
    )
