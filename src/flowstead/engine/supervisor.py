"""The supervisor: runs children and controllers, one task group per flow, one cancel scope per child.

Theory of operation. Commits hand over effects; the supervisor starts and stops code accordingly and reports
ends as commands, through the same mailboxes as any caller. It does not know the actor: it is given `report`.
A flow's crew (its task group) comes with the first code to run and goes with the last. An end that cannot be
recorded is reported again until it can, because a child has to end exactly once; until then it counts as
running.

At shutdown the crews are cancelled. A child stopped that way has no outcome: its id is kept in `interrupted`,
so that it can be put back in the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import anyio
from anyio.abc import TaskGroup

from flowstead.engine.clock import Clock, Ids
from flowstead.engine.guard import (
    ChildScope,
    absorb_own_cancel,
    consists_of,
    describe,
    run_guarded,
)
from flowstead.engine.mailbox import Reply
from flowstead.errors import (
    CancelPending,
    CommitFailed,
    RuntimeClosed,
    SnapshotUnreadable,
    StoreError,
)
from flowstead.log import get_logger
from flowstead.model.code import Code
from flowstead.model.command import (
    Command,
    ControllerStopped,
    EndReport,
    EnterController,
    Fail,
    Finish,
    Patch,
)
from flowstead.model.effect import (
    Effect,
    StartController,
    StartTask,
    StopController,
    StopReason,
    StopTask,
)
from flowstead.model.flow import Flow, FlowKey, Json
from flowstead.model.limits import Limits
from flowstead.model.task import StoredTask
from flowstead.rules.user_json import encode_json

log = get_logger(__name__)

_UNSETTLED: Final = frozenset({Code.PERSIST_FAILED, Code.OUTCOME_UNKNOWN})
_REPORT_AGAIN_SECONDS: Final = 1.0


Run: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
Stop: TypeAlias = Callable[[], object]


class Door(Protocol):
    """Where the code comes from: the door knows registries and contexts, the engine does not."""

    def code_of(self, key: FlowKey, task: StoredTask) -> Callable[[], Awaitable[Json]] | None:
        """The child's code, ready to run, or None if nobody has it."""
        ...

    def forget(self, key: FlowKey, task: StoredTask) -> None:
        """The child has ended; its code is not needed any more."""
        ...

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose unregistered functions are in memory."""
        ...

    async def drive(self, key: FlowKey, controller_id: str, doc: bytes) -> None:
        """Run the flow's controller from the top; `doc` is the flow as it enters."""
        ...


class Crew:
    """The code of one flow: its task group and the scopes inside it."""

    def __init__(self) -> None:
        self.controller: anyio.CancelScope | None = None
        self.members = 0
        self.group: TaskGroup | None = None
        self._waiting: list[tuple[Run, Stop]] = []
        self._empty = asyncio.Event()

    async def host(self) -> None:
        """Hold the task group for as long as it has members."""
        async with anyio.create_task_group() as self.group:
            waiting, self._waiting = self._waiting, []
            for run, stop in waiting:
                self.group.start_soon(_in_a_cell, run, stop)
            await self._empty.wait()

    def start(self, run: Run, stop: Stop) -> None:
        """Run a member, at once or as soon as the group stands; `stop` is how shutdown stops it."""
        self.members += 1
        if self.group is None:
            self._waiting.append((run, stop))
        else:
            self.group.start_soon(_in_a_cell, run, stop)

    def leave(self) -> bool:
        """A member has ended; answers whether it was the last."""
        self.members -= 1
        if self.members == 0:
            self._empty.set()
        return self.members == 0


class Supervisor:
    """Starts, stops and reports running code."""

    def __init__(
        self,
        *,
        report: Callable[[FlowKey, Command], Awaitable[Reply]],
        door: Door,
        clock: Clock,
        ids: Ids,
        limits: Limits,
    ) -> None:
        self._report = report
        self._door = door
        self._clock = clock
        self._ids = ids
        self._limits = limits
        self._group: TaskGroup | None = None
        self._children: dict[str, ChildScope] = {}
        self._attempts: dict[str, int] = {}
        self._crews: dict[FlowKey, Crew] = {}
        self._ready = asyncio.Event()
        self._pauses: set[asyncio.Event] = set()
        self._stopping = False
        self.interrupted: dict[FlowKey, list[str]] = {}

    @property
    def running(self) -> Mapping[str, int]:
        """The attempt of each child whose code runs here, or whose end is not recorded yet."""
        return self._attempts

    @property
    def is_stopping(self) -> bool:
        """Whether nothing may be started any more."""
        return self._stopping

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose unregistered functions are in memory."""
        return self._door.bound_of(key)

    def ended(self, key: FlowKey, task: StoredTask) -> None:
        """A child's end is on disk: its function is not needed any more."""
        self._door.forget(key, task)

    @property
    def running_count(self) -> int:
        """How many children run."""
        return len(self._children)

    def is_driven(self, key: FlowKey) -> bool:
        """Whether the flow's controller runs here."""
        crew = self._crews.get(key)
        return crew is not None and crew.controller is not None

    def has_code(self, key: FlowKey) -> bool:
        """Whether any code of the flow runs here."""
        return key in self._crews

    async def wait_ready(self) -> None:
        """Return once code can be started."""
        await self._ready.wait()

    async def run(self) -> None:
        """Hold the crews until `stop`."""
        async with anyio.create_task_group() as self._group:
            self._ready.set()
            await anyio.sleep_forever()

    def stop(self) -> None:
        """Cancel all code. Nothing is started any more, and ends without an outcome are not reported."""
        self._stopping = True
        for pause in self._pauses:
            pause.set()
        if self._group is not None:
            self._group.cancel_scope.cancel()

    # ---- effects ----------------------------------------------------------------------------------

    def carry_out(self, key: FlowKey, effects: Sequence[Effect]) -> None:
        """Start and stop what a commit has made due."""
        for effect in effects:
            match effect:
                case StartTask(task):
                    self._start_task(key, task)
                case StopTask(task_id, reason):
                    if child := self._children.get(task_id):
                        child.stop(reason)
                case StartController(controller_id):
                    self._start_controller(key, controller_id)
                case StopController():  # pragma: no branch - there is no fifth effect
                    crew = self._crews.get(key)
                    if crew is not None and crew.controller is not None:
                        crew.controller.cancel()

    def _start_task(self, key: FlowKey, task: StoredTask) -> None:
        current = self._children.get(task.task_id)
        if current is not None and current.attempt == task.attempt:
            return
        if self._stopping:
            self._interrupt(key, task)
            return
        child = self._children[task.task_id] = ChildScope(task.attempt)
        self._attempts[task.task_id] = task.attempt
        self._crew(key).start(partial(self._run_task, key, task, child), child.scope.cancel)

    def _start_controller(self, key: FlowKey, controller_id: str) -> None:
        if self._stopping or self.is_driven(key):
            return
        crew = self._crew(key)
        scope = crew.controller = anyio.CancelScope()
        crew.start(partial(self._run_controller, key, controller_id, crew), scope.cancel)

    def _crew(self, key: FlowKey) -> Crew:
        crew = self._crews.get(key)
        if crew is None:
            assert self._group is not None
            crew = self._crews[key] = Crew()
            self._group.start_soon(crew.host, name=f"flow {key.flow_id}")
        return crew

    def _leave(self, key: FlowKey) -> None:
        if self._crews[key].leave():
            del self._crews[key]

    # ---- children ---------------------------------------------------------------------------------

    async def _run_task(self, key: FlowKey, task: StoredTask, child: ChildScope) -> None:
        timer = None
        if task.timeout is not None:
            timer = self._clock.call_later(task.timeout, partial(child.stop, StopReason.TIMED_OUT))
        try:
            await self._record(key, await self._run_to_end(key, task, child))
        finally:
            if self._children.get(task.task_id) is child:
                del self._children[task.task_id]
                del self._attempts[task.task_id]
            if timer is not None:
                timer.cancel()
            self._leave(key)

    async def _run_to_end(self, key: FlowKey, task: StoredTask, child: ChildScope) -> EndReport:
        try:
            if self._stopping:
                raise asyncio.CancelledError
            code = self._door.code_of(key, task)
            if code is None:
                code = _no_code
            outcome, result = await run_guarded(
                child,
                code,
                encode_result=self._encode_result,
                is_shutdown=lambda: self._stopping,
            )
        except asyncio.CancelledError:
            self._interrupt(key, task)
            raise
        return EndReport(
            task_id=task.task_id,
            attempt=task.attempt,
            outcome=outcome,
            result=result,
            chance=self._ids.chance(),
        )

    def _interrupt(self, key: FlowKey, task: StoredTask) -> None:
        self.interrupted.setdefault(key, []).append(task.task_id)

    def _encode_result(self, value: Json) -> Any:
        limits = self._limits
        return encode_json(
            value, name="result", max_bytes=limits.state_bytes, max_depth=limits.json_depth
        )

    async def _record(self, key: FlowKey, end: Command) -> None:
        """Report an end until it is on disk. Cancelling does not take back a report."""
        while True:
            try:
                reply = await self._report(key, end)
            except RuntimeClosed:
                return
            except Exception as error:
                # The flow cannot be read just now. The end must not get lost, nor take its siblings along.
                reason = str(error)
            else:
                if reply.refusal is None or reply.refusal.code not in _UNSETTLED:
                    return
                reason = reply.refusal.reason
            log.warning("end.not_recorded", flow_id=key.flow_id, reason=reason)
            if self._stopping:
                return
            await self._pause()

    async def _pause(self) -> None:
        """Give a failing disk time, by the runtime's clock, but do not hold up a shutdown."""
        over = asyncio.Event()
        self._pauses.add(over)
        timer = self._clock.call_later(_REPORT_AGAIN_SECONDS, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()
            self._pauses.discard(over)

    # ---- controllers ------------------------------------------------------------------------------

    async def _run_controller(self, key: FlowKey, controller_id: str, crew: Crew) -> None:
        scope = crew.controller
        assert scope is not None
        try:
            end = await self._end_of_controller(key, controller_id, scope)
            # From here on the flow is not driven any more, so that its end can be concluded.
            crew.controller = None
            await self._record(key, end)
        finally:
            if crew.controller is scope:
                crew.controller = None
            self._leave(key)

    async def _end_of_controller(
        self, key: FlowKey, controller_id: str, scope: anyio.CancelScope
    ) -> Command:
        """Run the controller and say how it ended, as a command.

        Raises:
            asyncio.CancelledError: The runtime is shutting down; the next one enters the controller again.
        """
        end: Command | None = None
        try:
            with scope:
                end = await self._drive_to_end(key, controller_id)
                if not scope.cancel_called:
                    await absorb_own_cancel()
        except asyncio.CancelledError as error:
            await absorb_own_cancel()
            return _controller_failed(error)
        except CancelPending as error:
            if error.current is not None and _is(error.current, key):
                return ControllerStopped()
            return _controller_failed(error)
        except BaseException as error:
            if self._stopping and consists_of(error, RuntimeClosed):
                # It asked for something a moment before it was stopped; the next runtime enters it again.
                raise asyncio.CancelledError from error
            log.warning("controller.failed", flow_id=key.flow_id, error=type(error).__name__)
            return _controller_failed(error)
        if end is None and self._stopping:
            raise asyncio.CancelledError
        return end or ControllerStopped()

    async def _drive_to_end(self, key: FlowKey, controller_id: str) -> Command:
        """Run the controller; from the top again each time the store fails it, for that is no end of a flow."""
        while not self._stopping:
            try:
                return await self._drive(key, controller_id)
            except BaseException as error:
                if not consists_of(error, StoreError):
                    raise
                log.warning("controller.interrupted", flow_id=key.flow_id, reason=str(error))
                if isinstance(error, SnapshotUnreadable):
                    break
            await self._pause()
        return ControllerStopped()

    async def _drive(self, key: FlowKey, controller_id: str) -> Command:
        entered = await self._report(key, EnterController())
        if entered.refusal is not None and entered.refusal.code in _UNSETTLED:
            raise CommitFailed(entered.refusal.reason)
        if entered.refusal is not None or entered.doc is None:
            return ControllerStopped()
        await self._door.drive(key, controller_id, entered.doc)
        return Finish(expected_revision=None, patch=Patch())


def _is(flow: Flow, key: FlowKey) -> bool:
    return (flow.owner_key, flow.flow_id) == (key.owner_key, key.flow_id)


def _controller_failed(error: BaseException) -> Command:
    return Fail(expected_revision=None, patch=Patch(), failure=describe(error))


async def _in_a_cell(run: Run, stop: Stop) -> None:
    """Run a member in a bare task inside its place in the group.

    Code that leaves a cancel scope open, as an async generator that is not read to its end easily does, spoils
    the task it ran in, and anyio would take the whole group down with it. So that task is one of its own.
    """
    cell = asyncio.create_task(run())
    ended = asyncio.Event()
    cell.add_done_callback(lambda _: ended.set())
    try:
        await ended.wait()
    finally:
        if not cell.done():
            # By its scope, not by Task.cancel: what the code shields from cancellation stays shielded.
            stop()
            with anyio.CancelScope(shield=True):
                await ended.wait()
        if not cell.cancelled() and (error := cell.exception()) is not None:
            log.error("code.escaped_its_guard", error=type(error).__name__)


async def _no_code() -> Json:
    raise LookupError("no code is registered for this child")
