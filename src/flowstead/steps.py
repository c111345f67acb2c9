"""The steps of one controller: how they are named, begun, found again, and seen to their end.

A step is a child whose `run_id` is the step's name. Asking for a step that is on record answers the child of
that name, ended or not; only a name never seen before makes a new one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from msgspec import UNSET, Raw, UnsetType

from flowstead import arguments
from flowstead.engine.engine import Engine
from flowstead.engine.mailbox import Reply
from flowstead.engine.parked import Parked
from flowstead.functions import Functions, Policy, Runnable
from flowstead.model.code import Code
from flowstead.model.command import AddTasks, Command, Defect, Encoded, TaskDraft
from flowstead.model.flow import FlowKey, Json
from flowstead.model.task import LAUNCHED_RUNTIME, Task, is_active
from flowstead.model.wait import Wait
from flowstead.registry import TaskDefinition
from flowstead.results import error_for, raise_refusal
from flowstead.rules.user_json import encode_json
from flowstead.store import codec
from flowstead.store.port import Scope

CONTROLLER: Final = "controller"
_CHUNK: Final = 256
_PAGE: Final = 1000


class Begun(NamedTuple):
    """The child of a step, and the future of its end; none if it had ended before it was asked for.

    `wait` is what the child waits for, while it does.
    """

    task_id: str
    end: asyncio.Future[bytes] | None
    wait: Wait | None = None


class Steps:
    """What a controller needs to take steps."""

    def __init__(self, engine: Engine, functions: Functions, key: FlowKey) -> None:
        self.engine = engine
        self.key = key
        self._functions = functions
        self._named: Counter[str] = Counter()
        self._ends: set[asyncio.Future[bytes]] = set()
        self.told_ends: dict[str, int] = {}
        """The place of each child's end in the flow's history, as far as that has been read."""
        self._read_to = 0
        self.is_parked = False
        """Whether the controller has been ended where it waited: it may tidy up, and no more."""

    async def ask(
        self,
        command: Command,
        posted: Callable[[asyncio.Future[Reply]], object] = lambda _: None,
    ) -> Reply:
        """Ask the flow for something, patiently."""
        if self.is_parked:
            raise Parked
        return await self.engine.ask_patiently(self.key, command, CONTROLLER, posted=posted)

    def close(self) -> None:
        """Have nothing kept for this run of the controller, whose steps go on without it."""
        for end in tuple(self._ends):
            end.cancel()

    def end_of(self, task_id: str) -> asyncio.Future[bytes]:
        """A future for the record of a child's end, until `close`."""
        end = self.engine.task_ends.register(task_id)
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)
        return end

    # ---- making them ------------------------------------------------------------------------------

    def define(self, run: Runnable, policy: Policy | None = None) -> TaskDefinition:
        """The definition behind what is to be run, with what this step wants otherwise."""
        return self._functions.define(run, policy)

    def name(self, name: str | None, usual: str) -> str:
        """A step's name: as given, or the usual one with `#2` and so on for later calls."""
        if name is not None:
            return arguments.text(name, "name")
        self._named[usual] += 1
        turn = self._named[usual]
        return usual if turn == 1 else f"{usual}#{turn}"

    def draft(
        self,
        definition: TaskDefinition,
        step: str,
        input: Json,
        *,
        group: str | None = None,
        limit: int | None = None,
        approval: str | None = None,
    ) -> TaskDraft:
        """A step as a child to be.

        Raises:
            InvalidState, StateTooLarge: The input is nothing JSON can hold, or too much of it.
        """
        encoded = UNSET if input is UNSET else self.encode_or_raise(input, "input")
        launch = self._functions.launch(
            definition, group=None if limit is None else group, limit=limit
        )
        return TaskDraft(
            key=self.engine.store.next_key(),
            task_id=self.engine.ids.task_id(),
            runtime=LAUNCHED_RUNTIME,
            task=definition.name,
            run_id=step,
            input_json=encoded,
            timeout=definition.timeout,
            idle_timeout=definition.idle_timeout,
            queue_timeout=definition.queue_timeout,
            child_flow_id=self._functions.child_flow_id(definition, self.engine),
            launch=launch,
            approval=approval,
        )

    def plain_draft(self, kind: str, step: str, **fields: Any) -> TaskDraft:
        """A step that runs nothing, as a child to be."""
        return TaskDraft(
            key=self.engine.store.next_key(),
            task_id=self.engine.ids.task_id(),
            runtime=kind,
            task=step,
            run_id=step,
            **fields,
        )

    def encode_or_raise(self, value: Json, name: str, *, max_bytes: int | None = None) -> Raw:
        """User JSON as stored, bounded like a state unless said otherwise.

        Raises:
            InvalidState, StateTooLarge: It is nothing JSON can hold, or too much of it.
        """
        encoded = self.encode(value, name, max_bytes=max_bytes)
        if isinstance(encoded, Defect):
            raise error_for(Code(encoded.code), encoded.reason)
        assert encoded is not UNSET
        return encoded

    # ---- taking them ------------------------------------------------------------------------------

    async def ended(self, drafts: Sequence[TaskDraft], definition: TaskDefinition) -> list[Task]:
        """The ended child of each draft's step, in order, however it comes to have ended."""
        begun: list[Begun] = []
        for start in range(0, len(drafts), _CHUNK):
            begun.extend(await self.begin(drafts[start : start + _CHUNK], definition))
        recorded = await self.recorded([task_id for task_id, end, _ in begun if end is None])
        return [
            recorded[task_id] if end is None else codec.read_task(await end)
            for task_id, end, _ in begun
        ]

    async def begin(
        self, drafts: Sequence[TaskDraft], definition: TaskDefinition | None = None
    ) -> list[Begun]:
        """Add the children of steps that are new, and answer the child of each.

        Raises:
            CancelPending: A cancel is requested, and one of the steps is new.
        """
        waiting = {draft.task_id: self.end_of(draft.task_id) for draft in drafts}
        bound = [
            draft
            for draft in drafts
            if definition is not None and self._functions.bind(self.key, draft, definition)
        ]
        asked: list[asyncio.Future[Reply]] = []
        try:
            reply = await self.ask(AddTasks(drafts=tuple(drafts)), asked.append)
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
        begun: list[Begun] = []
        for draft, child in zip(drafts, reply.children, strict=True):
            if isinstance(child, str):
                begun.append(Begun(child, None))
                self._forget({draft.task_id: waiting[draft.task_id]}, [draft])
            elif child.task_id in waiting:
                begun.append(Begun(child.task_id, waiting[child.task_id], child.wait))
            else:
                waiting[draft.task_id].cancel()
                begun.append(Begun(child.task_id, await self.join(child.task_id), child.wait))
        return begun

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

    async def join(self, task_id: str) -> asyncio.Future[bytes] | None:
        """The end of a step that is under way already, begun by an earlier run of this controller."""
        end = self.end_of(task_id)
        try:
            task = (await self.recorded([task_id]))[task_id]
        except BaseException:
            end.cancel()
            raise
        if is_active(task):
            return end
        end.cancel()
        return None

    async def read_history(self) -> None:
        """Go on reading the flow's history, for the order in which its children have ended."""
        scope = Scope(self.key.owner_key)
        while page := await self.engine.store.history(
            scope, self.key.flow_id, after_seq=self._read_to, limit=_PAGE
        ):
            self._read_to = max(self._read_to, page[-1].seq)
            self.told_ends |= {
                e.task_id: e.seq for e in page if e.type == "task.ended" and e.task_id
            }

    def _forget(
        self, waiting: dict[str, asyncio.Future[bytes]], bound: Sequence[TaskDraft]
    ) -> None:
        for future in waiting.values():
            future.cancel()
        for draft in bound:
            self._functions.forget(self.key, draft)

    async def recorded(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The children as committed, by id."""
        if not task_ids:
            return {}
        scope = Scope(self.key.owner_key)
        tasks = await self.engine.store.list_tasks(scope, self.key.flow_id, task_ids=task_ids)
        return {task.task_id: task for task in tasks}

    def encode(
        self, value: Json | UnsetType, name: str, *, max_bytes: int | None = None
    ) -> Encoded | UnsetType:
        """User JSON as stored, or the defect it has."""
        if value is UNSET:
            return UNSET
        limits = self.engine.limits
        encoded: Encoded = encode_json(
            value, name=name, max_bytes=max_bytes or limits.state_bytes, max_depth=limits.json_depth
        )
        return encoded
