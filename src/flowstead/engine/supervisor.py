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
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import anyio
from anyio.abc import TaskGroup

from flowstead.engine.child_scope import ChildScope
from flowstead.engine.clock import Clock, Ids, monotonic
from flowstead.engine.crew import Crew
from flowstead.engine.guard import (
    absorb_own_cancel,
    consists_of,
    describe,
    run_guarded,
)
from flowstead.engine.mailbox import Reply
from flowstead.engine.parked import Parked
from flowstead.engine.stalls import Culprit, StallWatch, child_task_name
from flowstead.engine.stop_scope import StopScope
from flowstead.errors import (
    CancelPending,
    ChildCancelled,
    CommitFailed,
    RuntimeClosed,
    SnapshotUnreadable,
    StoreError,
)
from flowstead.log import get_logger
from flowstead.model.code import Code
from flowstead.model.command import (
    Command,
    ControllerParked,
    ControllerStopped,
    EndReport,
    EnterController,
    Fail,
    Finish,
    Patch,
)
from flowstead.model.effect import (
    AbandonController,
    AbandonTask,
    DrainTask,
    Effect,
    KillTask,
    ParkController,
    StartController,
    StartTask,
    StopController,
    StopTask,
)
from flowstead.model.flow import Failure, Flow, FlowKey, Json
from flowstead.model.limits import Limits
from flowstead.model.task import StoredTask, TimedOut
from flowstead.rules.classify import Classify, judge, judge_outcome
from flowstead.rules.user_json import encode_json

log = get_logger(__name__)

_UNSETTLED: Final = frozenset({Code.PERSIST_FAILED, Code.OUTCOME_UNKNOWN})
_REPORT_AGAIN_SECONDS: Final = 1.0


class Work(NamedTuple):
    """A child's code with everything it needs, and what its task says of the exceptions it may raise."""

    run: Callable[[], Awaitable[Json]]
    classify: Classify | None = None


class Door(Protocol):
    """Where the code comes from: the door knows registries and contexts, the engine does not."""

    def code_of(self, key: FlowKey, task: StoredTask, child: ChildScope) -> Work | None:
        """The child's code, ready to run, or None if nobody has it. `child` tells its executor of stops."""
        ...

    @property
    def executors(self) -> Container[str]:
        """Names of what can run children here."""
        ...

    def forget(self, key: FlowKey, task: StoredTask) -> None:
        """The child has ended; its code is not needed any more."""
        ...

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose unregistered functions are in memory."""
        ...

    def park(self, key: FlowKey) -> None:
        """End the flow's controller where it waits, by `Parked`, if that is where it is."""
        ...

    async def drive(self, key: FlowKey, controller_id: str, doc: bytes) -> None:
        """Run the flow's controller from the top; `doc` is the flow as it enters."""
        ...


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
        watch_loop: bool = False,
    ) -> None:
        self._report = report
        self._door = door
        self.stalls = (
            StallWatch(limits.stall_seconds, now=monotonic, child_of=self._culprit)
            if watch_loop
            else None
        )
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
        self.stopping = asyncio.Event()
        """Set once nothing may be started any more."""
        self.ignored_stops = self.abandoned = 0
        self._given_up: Counter[FlowKey] = Counter()
        self.attended: set[FlowKey] = set()
        """The nested flows for which a child of the flow above stands, with nothing left to pass on to them."""
        self.interrupted: dict[FlowKey, dict[str, bool]] = {}
        """Children without an outcome, and whether their code had begun."""

    @property
    def running(self) -> Mapping[str, int]:
        """The attempt of each child whose code runs here, or whose end is not recorded yet."""
        return self._attempts

    @property
    def is_stopping(self) -> bool:
        """Whether nothing may be started any more."""
        return self._stopping

    @property
    def executors(self) -> Container[str]:
        """Names of what can run children here."""
        return self._door.executors

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
        self.stopping.set()
        for pause in self._pauses:
            pause.set()
        if self._group is not None:
            self._group.cancel_scope.cancel()

    def kill_all(self) -> bool:
        """End by force what children have outside this process; answers whether there was anything."""
        killed = [child.kill() for child in list(self._children.values())]
        return any(killed)

    @property
    def waits_for_somebody(self) -> bool:
        """Whether code runs that has not been given up."""
        return bool(self._children) or any(crew.controller for crew in self._crews.values())

    # ---- effects ----------------------------------------------------------------------------------

    def carry_out(self, key: FlowKey, effects: Sequence[Effect]) -> None:
        """Start and stop what a commit has made due."""
        stops: list[Callable[[], object]] = []
        for effect in effects:
            match effect:
                case StartTask(task, adopted):
                    self._start_task(key, task, adopted=adopted)
                case StopTask(task_id, reason):
                    if child := self._children.get(task_id):
                        stops.append(partial(child.stop, reason))
                case KillTask(task_id):
                    if child := self._children.get(task_id):
                        stops.append(child.kill)
                case DrainTask(task_id):
                    if child := self._children.get(task_id):
                        child.drain()
                case AbandonTask(task_id):
                    self._abandon_task(key, task_id)
                case StartController(controller_id):
                    self._start_controller(key, controller_id)
                case StopController():
                    crew = self._crews.get(key)
                    if crew is not None and crew.controller is not None:
                        crew.controller.cancel()
                case ParkController():
                    self._door.park(key)
                case AbandonController():  # pragma: no branch - there is no other effect
                    self._abandon_controller(key)
        if stops:
            # In no task: anyio writes down who cancels, and for a task that is a third of the cost of a stop.
            asyncio.get_running_loop().call_soon(_call_all, stops)

    def touch(self, task_id: str, attempt: int) -> None:
        """A child has given a sign of life."""
        child = self._children.get(task_id)
        if child is not None and child.attempt == attempt:
            child.touch()

    def _culprit(self, task_id: str) -> Culprit | None:
        child = self._children.get(task_id)
        return None if child is None else Culprit(flow_id=child.flow_id, task_id=task_id)

    def has_given_up(self, key: FlowKey) -> bool:
        """Whether a controller of the flow was given up and still runs."""
        return self._given_up[key] > 0

    def hint_of(self, task_id: str) -> str | None:
        """What keeps a running child from ending, where its executor has said."""
        child = self._children.get(task_id)
        return None if child is None else child.hint

    def _is_late(self, key: FlowKey, task: StoredTask, child: ChildScope) -> None:
        """A child past its deadline has been asked to stop; if it does not, it is killed, and then given up.

        In memory, unlike the climb of a cancel: after a crash the attempt is cut off anyway.
        """
        if task.child_flow_id is None:  # a nested flow climbs by itself, and ends
            kill = partial(self._kill_late, key, task, child)
            child.climb = self._clock.call_later(self._limits.kill_after, kill)

    def _kill_late(self, key: FlowKey, task: StoredTask, child: ChildScope) -> None:
        child.kill()
        abandon = partial(self._abandon_late, key, task, child)
        child.climb = self._clock.call_later(self._limits.abandon_after, abandon)

    def _abandon_late(self, key: FlowKey, task: StoredTask, child: ChildScope) -> None:
        if self._children.get(task.task_id) is not child or self._group is None:
            return
        message = "would not stop at its deadline and was given up; its code may still run"
        outcome = TimedOut(Failure(kind="abandoned", message=message))
        # Never a second attempt beside the first.
        end = EndReport(task_id=task.task_id, attempt=task.attempt, outcome=outcome, again=False)
        self._group.start_soon(self._give_up_late, key, task, child, end)

    async def _give_up_late(
        self, key: FlowKey, task: StoredTask, child: ChildScope, end: EndReport
    ) -> None:
        # As long as that is not on record the child counts as running, so that nobody starts it beside itself.
        await self._record(key, end)
        if self._children.get(task.task_id) is child:
            self._abandon_task(key, task.task_id)

    def _abandon_task(self, key: FlowKey, task_id: str) -> None:
        """The child's record has ended without it; whatever its code still does, it counts no more."""
        child = self._children.pop(task_id, None)
        if child is None:
            return
        del self._attempts[task_id]
        child.close()
        self.abandoned += 1
        log.error("child.abandoned", flow_id=key.flow_id, task_id=task_id)

    def _abandon_controller(self, key: FlowKey) -> None:
        crew = self._crews.get(key)
        if crew is None or crew.controller is None:
            return
        crew.controller.give_up()
        crew.controller = None
        self._given_up[key] += 1
        self.abandoned += 1
        log.error("controller.abandoned", flow_id=key.flow_id)
        assert self._group is not None
        self._group.start_soon(self._record, key, ControllerStopped())

    def _start_task(self, key: FlowKey, task: StoredTask, *, adopted: bool) -> None:
        current = self._children.get(task.task_id)
        if current is not None and current.attempt == task.attempt:
            return
        if self._stopping:
            if not _is_adopted_external(task, adopted=adopted):
                self._interrupt(key, task, begun=False)
            return
        child = ChildScope(task.attempt, self._clock, flow_id=key.flow_id, adopted=adopted)
        self._children[task.task_id] = child
        child.scope.ignored = partial(self._ignores_stop, key, task)
        self._attempts[task.task_id] = task.attempt
        self._crew(key).start(
            partial(self._run_task, key, task, child),
            child.scope.cancel,
            name=child_task_name(task.task_id),
        )

    def _ignores_stop(self, key: FlowKey, task: StoredTask) -> None:
        self.ignored_stops += 1
        log.warning("child.ignores_stop", flow_id=key.flow_id, task_id=task.task_id, task=task.task)

    def _start_controller(self, key: FlowKey, controller_id: str) -> None:
        if self._stopping or self.is_driven(key):
            return
        crew = self._crew(key)
        scope = crew.controller = StopScope(self._clock)
        crew.start(
            partial(self._run_controller, key, controller_id, crew),
            scope.cancel,
            name=f"flowstead controller {key.flow_id}",
        )

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
        stalls, task_id = self.stalls, task.task_id
        if stalls is not None:
            stalls.enter()
        lost = _nothing if stalls is None else partial(stalls.lost_to, task_id)
        late = partial(self._is_late, key, task, child)
        child.limit(self._clock, lost, late, wall=task.timeout, idle=task.idle_timeout)
        try:
            end = await self._run_to_end(key, task, child)
            if self._children.get(task_id) is child:
                await self._record(key, end)
            else:
                log.info("end.too_late", flow_id=key.flow_id, task_id=task_id)
        finally:
            if self._children.get(task_id) is child:
                del self._children[task_id]
                del self._attempts[task_id]
            child.close()
            if stalls is not None:
                stalls.leave()
                stalls.forget(task_id)
            self._leave(key)

    async def _run_to_end(self, key: FlowKey, task: StoredTask, child: ChildScope) -> EndReport:
        retry = None if task.launch is None else task.launch.retry
        try:
            if self._stopping:
                raise asyncio.CancelledError
            code = self._door.code_of(key, task, child) or Work(_no_code)
            outcome, result = await run_guarded(
                child,
                code.run,
                encode_result=self._encode_result,
                is_shutdown=lambda: self._stopping,
                judge=partial(judge, retry=retry, classify=code.classify),
            )
        except asyncio.CancelledError:
            is_ours = self._children.get(task.task_id) is child
            unseen = not child.begun and _is_adopted_external(task, adopted=child.adopted)
            if is_ours and not unseen:
                self._interrupt(key, task, begun=child.begun)
            raise
        verdict = child.verdict or judge_outcome(outcome, retry)
        return EndReport(
            task_id=task.task_id,
            attempt=task.attempt,
            outcome=outcome,
            result=result,
            chance=self._ids.chance(),
            again=verdict.again,
            review=verdict.review,
            retry_after=verdict.retry_after,
        )

    def _interrupt(self, key: FlowKey, task: StoredTask, *, begun: bool) -> None:
        self.interrupted.setdefault(key, {})[task.task_id] = begun

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
            await self.pause()

    async def pause(self) -> None:
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
            if crew.controller is not scope:
                return  # given up long ago
            # From here on the flow is not driven any more, so that its end can be concluded.
            crew.controller = None
            await self._record(key, end)
        finally:
            if crew.controller is scope:
                crew.controller = None
            elif scope.is_given_up:
                self._given_up[key] -= 1
            self._leave(key)

    async def _end_of_controller(
        self, key: FlowKey, controller_id: str, scope: StopScope
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
            if consists_of(error, Parked):
                await absorb_own_cancel()
                return ControllerParked()
            if self._stopping and consists_of(error, RuntimeClosed):
                # It asked for something a moment before it was stopped; the next runtime enters it again.
                raise asyncio.CancelledError from error
            log.warning("controller.failed", flow_id=key.flow_id, error=type(error).__name__)
            if consists_of(error, ChildCancelled):
                return ControllerStopped(failure=describe(error))
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
            await self.pause()
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


def _call_all(callbacks: Sequence[Callable[[], object]]) -> None:
    for callback in callbacks:
        callback()


def _is_adopted_external(task: StoredTask, *, adopted: bool) -> bool:
    """Whether only the child's code can see to what an earlier process may have left of it.

    As long as that has not run, the record stays as it is, and the next runtime adopts the child again.
    """
    return adopted and task.launch is not None and task.launch.external


def _nothing() -> float:
    return 0.0


async def _no_code() -> Json:
    raise LookupError("no code is registered for this child")
