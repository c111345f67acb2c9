"""Every public coroutine, its caller cancelled at every await: what its docstring says holds.

The loop is simulated and counts its steps. A call is first made uncancelled, to learn what it changes and at
which lines it waits; then once for every step it takes, with its caller cancelled before that step.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

import anyio
import pytest

import flowstead
from flowstead import (
    Flow,
    FlowContext,
    FlowExists,
    Limits,
    NeedsReview,
    Registry,
    Runtime,
    SessionFlows,
    Task,
    TaskContext,
    open_runtime,
)
from flowstead.admin import Admin
from flowstead.engine.feed import Watcher
from flowstead.model.flow import FlowKey
from flowstead.step import Completed
from flowstead.store.memory import MemoryStore
from flowstead.store.port import EVERYONE
from flowstead.store.sqlite import SqliteStore
from flowstead.testing.disk import Disk, SimulatedStore
from flowstead.testing.loop import SimulatedLoop
from flowstead.testing.process import SimulatedClock, SimulatedWorker
from flowstead.testing.schedule import Schedule
from flowstead.testing.simulation import Simulation
from flowstead.testing.sqlite_files import SqliteFiles
from tests.faulty_store import holds_nothing, settle
from tests.invariants import check_all
from tests.runtime.support import bound, link, make
from tests.runtime.test_cancelled_callers import told_once_and_whole

SEEDS = int(os.environ.get("FLOWSTEAD_CANCEL_SEEDS", "1"))
"""Shuffled runs of every call, besides one in asyncio's own order."""

SCHEDULES = [Schedule(), *(Schedule(seed=seed, shuffle=True) for seed in range(1, SEEDS + 1))]
BY_TASK = (False,)
WAYS = (False, True)
"""By `Task.cancel`, and by a cancel scope around the call."""


def ways_of(schedule: Schedule) -> tuple[bool, ...]:
    """Both ways in asyncio's own order; a shuffled run takes them in turn."""
    return (schedule.seed % 2 == 0,) if schedule.shuffle else WAYS


REST = 3.0
"""Seconds of the loop's time, which cost nothing: all that was set in motion has come to its end by then."""

PARK = 1.0
"""Seconds after which a controller that waits has left memory."""

SPARE = 2
"""Steps beyond those of the uncancelled call, to see that there are no more."""

PASSES = 3
"""How often the steps are gone through at most: upkeep, which comes by chance, shifts those of a single call."""

UNDISTURBED = 1e6
"""Seconds idle flows stay in memory, so that no tidying comes in between and shifts the steps."""

Line = tuple[str, int]

# ---- the instrument -------------------------------------------------------------------------------


class Probe:
    """Runs calls in tasks of their own, and cancels them before a chosen step of the loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        self.steps = 0
        """Steps of the loop since the last call began."""
        self.waited: set[tuple[Line, ...]] = set()
        """Where calls that were not cancelled have waited: the lines from the call down to its await."""
        self.landed: set[tuple[Line, ...]] = set()
        """Where a cancellation has come out."""
        self._caller: asyncio.Task[Any] | None = None
        self._scope = anyio.CancelScope()
        self._cancel: tuple[int, bool] | None = None
        self._again: int | None = None
        self._then = loop.on_step
        loop.on_step = self._before_step

    async def call(
        self,
        call: Callable[[], Awaitable[Any]],
        cancel: tuple[int, bool] | None = None,
        again: int | None = None,
    ) -> asyncio.Task[Any]:
        """Make a call and wait until its task is done.

        Args:
            call: The call.
            cancel: Before which step to cancel it, and whether by scope.
            again: Before which step to cancel its task once more.
        """
        self.steps, self._cancel, self._again = 0, cancel, again
        self._scope = anyio.CancelScope()
        caller = self._caller = asyncio.create_task(self._called(call, self._scope))
        try:
            await asyncio.wait({caller})
        finally:
            self._caller = None
            caller.cancel()
        return caller

    async def _called(self, call: Callable[[], Awaitable[Any]], scope: anyio.CancelScope) -> Any:
        with scope:
            try:
                return await call()
            except asyncio.CancelledError as error:
                self.landed.add(_raised_at(error.__traceback__))
                raise

    def _before_step(self) -> None:
        if self._then is not None:
            self._then()
        caller = self._caller
        if caller is None or caller.done():
            return
        if self._cancel is None:
            self.waited.add(_suspended_at(caller.get_coro()))
        elif self._cancel[0] == self.steps:
            if self._cancel[1]:
                self._scope.cancel()
            else:
                caller.cancel()
        elif self._again == self.steps:
            caller.cancel()
        self.steps += 1

    @property
    def missed(self) -> set[tuple[Line, ...]]:
        """Where the call waits, and no cancellation has come out."""
        return self.waited - {()} - self.landed

    def check_nothing_was_missed(self) -> None:
        """Every await of the call has been cancelled, or these rounds have shown too little."""
        assert self.waited - {()}, "vacuous: the call never waited"
        assert not self.missed, f"never cancelled at: {self.missed}"


def _suspended_at(coro: Any) -> tuple[Line, ...]:
    lines = []
    while coro is not None:
        if (frame := getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None)) is None:
            break
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None)
    return _ours(lines)


def _raised_at(traceback: TracebackType | None) -> tuple[Line, ...]:
    lines = []
    while traceback is not None:
        lines.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return _ours(lines)


def _ours(lines: list[Line]) -> tuple[Line, ...]:
    package = os.path.dirname(flowstead.__file__)
    return tuple(
        (os.path.relpath(name, package), n) for name, n in lines if name.startswith(package)
    )


# ---- calls of those who hold flows ----------------------------------------------------------------


@dataclass
class Scene:
    """A fresh flow with one linked child, for one call."""

    face: Any
    flows: SessionFlows
    flow: Flow
    task: Task
    number: int
    token: str = ""
    digest: str = ""

    @property
    def flow_id(self) -> str:
        return self.flow.flow_id

    @property
    def task_id(self) -> str:
        return self.task.task_id


Act = Callable[[Scene], Awaitable[Any]]
Face = Callable[[Runtime], Any]

WHOLE = "applied whole or not at all"
NOTHING = "nothing but the call itself is stopped"


@dataclass(frozen=True)
class Entry:
    """One way to call a public coroutine, and what must hold wherever its caller is cancelled.

    Attributes:
        call: The call.
        promise: `WHOLE`: the events of an uncancelled call are there, or none. `NOTHING`: what others do
            meanwhile is all there is.
        prepare: What must be there before.
        meanwhile: What others do while the call waits.
        repeats: Whether the same call does its work again, so that asking again is no way to make sure.
    """

    call: Act
    promise: str = WHOLE
    prepare: Act | None = None
    meanwhile: Act | None = None
    repeats: bool = False


async def forever(_context: object, _input: object) -> None:
    await asyncio.get_running_loop().create_future()


async def stubborn(_context: object, _input: object) -> None:
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(2)


async def quick(_context: object, value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def _run_child(scene: Scene, code: Callable[..., Awaitable[Any]]) -> None:
    added = await scene.flows.run_task(flow_id=scene.flow_id, task="t", run=code, run_id="child")
    scene.task = added.unwrap()


async def _forget_homes(scene: Scene) -> None:
    """As after a restart: nobody remembers which flow the child belongs to."""
    scene.flows._core.homes._homes.clear()


async def _let_go(scene: Scene) -> None:
    """Forget the flow, as happens to idle ones."""
    engine = scene.flows._core.engine
    while engine.doc_of(FlowKey(scene.flows.session_key, scene.flow_id)):
        engine._let_go_oldest()


async def needs_review(_context: object, value: Any) -> Any:
    if value is None:
        raise NeedsReview("no input")
    return value


async def _await_review(scene: Scene) -> None:
    await _run_child(scene, needs_review)
    await asyncio.sleep(0.1)
    flow = await scene.flows.get(scene.flow_id)
    assert flow is not None and flow.blocked_task_id == scene.task_id


async def _end_in_failure(scene: Scene) -> None:
    await _end_child(scene)
    await scene.flows.fail(flow_id=scene.flow_id, expected_revision=0)


async def _retry_once(scene: Scene) -> None:
    await _end_in_failure(scene)
    await scene.flows.retry_flow(scene.flow_id)


async def _end_child(scene: Scene) -> None:
    await scene.flows.complete_task(scene.task_id)


async def _end_flow(scene: Scene) -> None:
    await scene.flows.finish(flow_id=scene.flow_id, expected_revision=0)


async def _create_meanwhile(scene: Scene) -> None:
    await make(scene.flows, idempotency_key=f"key-{scene.number}")


async def _add_named_child(scene: Scene) -> None:
    child = await link(scene.flows, scene.flow_id, run_id="r")
    await scene.flows.complete_task(child.task_id)


async def _await_word(scene: Scene) -> None:
    """The flow waits for a signal."""
    fields = {"thread": scene.number}
    await scene.flows.set_waiting(flow_id=scene.flow_id, expected_revision=0, wait_json=fields)
    [wait] = await scene.flows.list_waits(scene.flow_id)
    assert wait.token
    scene.token = wait.token


async def _await_word_twice(scene: Scene) -> None:
    """The flow and another one wait for the same signal."""
    await _await_word(scene)
    await make(scene.flows, status="waiting", wait_json={"thread": scene.number})


async def _await_vote(scene: Scene) -> None:
    """The flow is one that asks for an approval."""
    scene.flow = await make(scene.flows, controller_id="asks")
    await asyncio.sleep(REST)
    [wait] = await scene.flows.list_waits(scene.flow_id)
    assert wait.token and wait.approval
    scene.token, scene.digest = wait.token, wait.approval.digest


async def _await_question(scene: Scene) -> None:
    """The flow is one that answers what it is asked."""
    scene.flow = await make(scene.flows, controller_id="replies")
    await asyncio.sleep(REST)


async def asks(flow: FlowContext) -> None:
    await flow.approve("Well?", 1)


async def replies(flow: FlowContext) -> None:
    message = await flow.receive()
    assert message is not None
    await flow.reply(message, message.body)


async def _ask(scene: Scene) -> None:
    """Ask the flow, which answers one question and is done."""
    with suppress(flowstead.NotAwaited):
        await scene.flows.ask(scene.flow_id, 1)


def _mutation(name: str, **given: Any) -> Entry:
    return Entry(
        lambda it: getattr(it.flows, name)(
            flow_id=it.flow_id, expected_revision=0, state_json="new", **given
        )
    )


SCOPED: dict[str, Entry] = {
    "get": Entry(lambda it: it.face.get(it.flow_id), NOTHING, prepare=_let_go),
    "list": Entry(lambda it: it.face.list(after=it.flow_id), NOTHING),
    "find_latest": Entry(lambda it: it.face.find_latest(), NOTHING),
    "resolve": Entry(lambda it: it.face.resolve(f"{it.flow_id[:-1]}"), NOTHING),
    "resolve, a session": Entry(lambda it: it.face.resolve(it.flows.session_key), NOTHING),
    "get_task_summary": Entry(lambda it: it.face.get_task_summary(it.flow_id), NOTHING),
    "get_task": Entry(lambda it: it.face.get_task(it.task_id), NOTHING),
    "list_tasks": Entry(lambda it: it.face.list_tasks(it.flow_id), NOTHING),
    "history": Entry(lambda it: it.face.history(it.flow_id), NOTHING),
    "result": Entry(lambda it: it.face.result(it.flow_id), NOTHING, meanwhile=_end_flow),
    "result, ended": Entry(lambda it: it.face.result(it.flow_id), NOTHING, prepare=_end_flow),
    "wait_task": Entry(lambda it: it.face.wait_task(it.task_id), NOTHING, meanwhile=_end_child),
    "cancel": Entry(lambda it: it.face.cancel(it.flow_id)),
    "cancel, ended": Entry(lambda it: it.face.cancel(it.flow_id), NOTHING, prepare=_end_flow),
    "cancel, code runs": Entry(
        lambda it: it.face.cancel(it.flow_id), prepare=lambda it: _run_child(it, forever)
    ),
    "cancel, code stays": Entry(
        lambda it: it.face.cancel(it.flow_id, grace=1.0),
        prepare=lambda it: _run_child(it, stubborn),
    ),
    "cancel_task": Entry(lambda it: it.face.cancel_task(it.task_id)),
    "cancel_task, code runs": Entry(
        lambda it: it.face.cancel_task(it.task_id), prepare=lambda it: _run_child(it, forever)
    ),
    "retry_task": Entry(
        lambda it: it.face.retry_task(it.task_id, input_json=1), prepare=_await_review
    ),
    "retry_task, ended": Entry(
        lambda it: it.face.retry_task(it.task_id), NOTHING, prepare=_end_child
    ),
    "retry_flow": Entry(lambda it: it.face.retry_flow(it.flow_id), prepare=_end_in_failure),
    "retry_flow, done already": Entry(
        lambda it: it.face.retry_flow(it.flow_id), NOTHING, prepare=_retry_once
    ),
    "list_waits": Entry(lambda it: it.face.list_waits(), NOTHING, prepare=_await_word),
    "list_updates": Entry(lambda it: it.face.list_updates(), NOTHING),
}

OWNED: dict[str, Entry] = SCOPED | {
    "create_managed": Entry(lambda it: make(it.flows), repeats=True),
    "create_managed, own id": Entry(lambda it: make(it.flows, flow_id=f"own-{it.number}")),
    "create_managed, key": Entry(lambda it: make(it.flows, idempotency_key=f"key-{it.number}")),
    "create_managed, key in use": Entry(
        lambda it: make(it.flows, idempotency_key=f"key-{it.number}"),
        NOTHING,
        meanwhile=_create_meanwhile,
    ),
    "set_waiting": _mutation("set_waiting", wait_json={"kind": "reply"}),
    "resume": _mutation("resume"),
    "update": _mutation("update"),
    "update, not in memory": replace(_mutation("update"), prepare=_let_go),
    "finish": _mutation("finish"),
    "fail": _mutation("fail"),
    "request_cancel": Entry(
        lambda it: it.flows.request_cancel(flow_id=it.flow_id, expected_revision=0)
    ),
    "run_task": Entry(
        lambda it: it.flows.run_task(flow_id=it.flow_id, runtime="acp", task="t", run_id="r")
    ),
    "run_task, launched": Entry(
        lambda it: it.flows.run_task(flow_id=it.flow_id, task="t", run=quick, run_id="r")
    ),
    "run_task, done already": Entry(
        lambda it: it.flows.run_task(flow_id=it.flow_id, runtime="acp", task="t", run_id="r"),
        NOTHING,
        prepare=_add_named_child,
    ),
    "run_task, refused": Entry(
        lambda it: it.flows.run_task(flow_id=it.flow_id, task="t", run=quick, run_id="r"),
        NOTHING,
        prepare=_end_flow,
    ),
    "spawn_detached": Entry(
        lambda it: it.flows.spawn_detached(runtime="acp", task="t"), repeats=True
    ),
    "spawn_detached, launched": Entry(
        lambda it: it.flows.spawn_detached(task="t", run=quick), repeats=True
    ),
    "start_task": Entry(lambda it: it.flows.start_task(it.task_id)),
    "start_task, after a restart": Entry(
        lambda it: it.flows.start_task(it.task_id), prepare=_forget_homes
    ),
    "progress_task": Entry(lambda it: it.flows.progress_task(it.task_id), repeats=True),
    "complete_task": Entry(lambda it: it.flows.complete_task(it.task_id, result_json=1)),
    "complete_task, done already": Entry(
        lambda it: it.flows.complete_task(it.task_id, result_json=1), NOTHING, prepare=_end_child
    ),
    "fail_task": Entry(lambda it: it.flows.fail_task(it.task_id, error="no")),
    "signal": Entry(
        lambda it: it.flows.signal(payload=1, id=f"s-{it.number}", thread=it.number),
        prepare=_await_word,
    ),
    "signal, for two": Entry(
        lambda it: it.flows.signal(payload=1, id=f"s-{it.number}", thread=it.number),
        prepare=_await_word_twice,
    ),
    "signal, no id": Entry(
        lambda it: it.flows.signal(payload=1, thread=it.number), prepare=_await_word
    ),
    "signal, early": Entry(
        lambda it: it.flows.signal(payload=1, id=f"s-{it.number}", thread=it.number), NOTHING
    ),
    "signal, to a flow": Entry(
        lambda it: it.flows.signal(payload=1, id=f"s-{it.number}", flow_id=it.flow_id),
        prepare=_await_word,
    ),
    "signal, to a step": Entry(
        lambda it: it.flows.signal(id=f"s-{it.number}", flow_id=it.flow_id, name="step")
    ),
    "signal, by token": Entry(
        lambda it: it.flows.signal(payload=1, token=it.token), prepare=_await_word
    ),
    "tell": Entry(lambda it: it.flows.tell(it.flow_id, 1, id=f"s-{it.number}")),
    "tell, no id": Entry(lambda it: it.flows.tell(it.flow_id, 1), repeats=True),
    "vote": Entry(
        lambda it: it.flows.vote(
            "approve", approver="me", digest=it.digest, flow_id=it.flow_id, name="approval"
        ),
        prepare=_await_vote,
    ),
    "vote, early": Entry(
        lambda it: it.flows.vote(
            "approve", approver="me", digest="d", flow_id=it.flow_id, name="approval"
        ),
        repeats=True,
    ),
}

ASKING: dict[str, Entry] = {"ask": Entry(_ask, prepare=_await_question)}
"""What cannot be asked again while the first is on its way: it would be another question."""

TOKENS: dict[str, Entry] = {
    "answer": Entry(
        lambda it: it.face.answer(it.token, 1, id=f"s-{it.number}"), prepare=_await_word
    ),
    "answer, no id": Entry(lambda it: it.face.answer(it.token, 1), prepare=_await_word),
    "vote": Entry(
        lambda it: it.face.vote(it.token, "approve", approver="me", digest=it.digest),
        prepare=_await_vote,
    ),
}

OPERATED: dict[str, Entry] = SCOPED | {
    "list_unreadable": Entry(lambda it: it.face.list_unreadable(), NOTHING),
}

# ---- a world for each of them ---------------------------------------------------------------------

Told = Counter[tuple[Any, ...]]
_TOLD_IN_FULL = ("status", "stateJson", "waitJson", "progressSummary", "failure")


class Rounds:
    """Calls of one entry, each on a scene of its own, in one runtime."""

    def __init__(self, runtime: Runtime, face: Face, entry: Entry) -> None:
        self.probe = Probe()
        self._runtime = runtime
        self._flows = bound(runtime)
        self._face = face(runtime)
        self._entry = entry
        self._number = 0

    async def play(self, schedule: Schedule, ways: tuple[bool, ...]) -> None:
        """Once for every step, for each of these ways of cancelling."""
        await self._uncancelled()
        expected = await self._uncancelled()
        steps = self.probe.steps
        for by_scope in ways:
            self.probe.landed.clear()
            for _ in range(PASSES):
                for step in range(steps + SPARE):
                    await self._cancelled((step, by_scope), expected)
                if not self.probe.missed:
                    break
            if not schedule.shuffle:
                self.probe.check_nothing_was_missed()
        assert await self._uncancelled() == expected
        tasks: set[str] = set()
        for flow in await self._runtime.admin.list(limit=1000):
            await told_once_and_whole(self._flows, flow.flow_id)
            tasks |= {task.task_id for task in await self._flows.list_tasks(flow.flow_id)}
        assert set(self._runtime.core.homes._homes) <= tasks

    async def _uncancelled(self) -> Told:
        scene, before = await self._scene()
        await self._call(scene, None)
        await asyncio.sleep(REST)
        return await told_since(self._runtime, before)

    async def _cancelled(self, cancel: tuple[int, bool], expected: Told) -> None:
        entry = self._entry
        scene, before = await self._scene()

        await self._call(scene, cancel)
        if cancel[1]:
            # Asked again at once, while what was cancelled may still be on its way.
            told = [Told(), expected]
        else:
            await asyncio.sleep(REST)
            told = [await told_since(self._runtime, before)]
            assert told[0] in ([expected] if entry.promise is NOTHING else [Told(), expected])

        with suppress(FlowExists):
            await entry.call(scene)

        await asyncio.sleep(REST)
        again = await told_since(self._runtime, before)
        assert again in ([one + expected for one in told] if entry.repeats else [expected]), cancel
        await self._check_nothing_is_held()

    async def _call(self, scene: Scene, cancel: tuple[int, bool] | None) -> None:
        others = []
        if self._entry.meanwhile is not None:
            others.append(asyncio.ensure_future(self._entry.meanwhile(scene)))
        caller = await self.probe.call(lambda: self._entry.call(scene), cancel)
        await asyncio.gather(*others)
        assert caller.cancelled() or caller.exception() is None

    async def _check_nothing_is_held(self) -> None:
        engine, core = self._runtime._engine, self._runtime.core
        assert holds_nothing(self._runtime)
        assert not core.creating
        assert not engine.committer._pending and engine._is_quiet()

    async def _scene(self) -> tuple[Scene, int]:
        self._number += 1
        flow = await make(self._flows, state_json=1)
        task = await link(self._flows, flow.flow_id, status="queued")
        scene = Scene(self._face, self._flows, flow, task, self._number)
        if self._entry.prepare is not None:
            await self._entry.prepare(scene)
            await asyncio.sleep(0.1)
        return scene, await self._runtime._engine.store.last_position()


async def told_since(runtime: Runtime, position: int) -> Told:
    """Everybody's events after a position, without what differs from call to call."""
    events = await runtime._engine.store.events_after(EVERYONE, position, 1000)
    return Told(
        (
            event.type,
            event.actor,
            *(f"{k}={event.changed.get(k)}" for k in _TOLD_IN_FULL),
            *sorted(event.changed),
        )
        for event in events
    )


def _play(
    schedule: Schedule,
    entry: Entry,
    *,
    face: Face = bound,
    ways: tuple[bool, ...] | None = None,
    **options: Any,
) -> None:
    async def host(runtime: Runtime) -> None:
        rounds = Rounds(runtime, face, entry)
        await rounds.play(schedule, ways_of(schedule) if ways is None else ways)

    with Simulation(schedule, **options) as world:
        limits = Limits(idle_seconds=UNDISTURBED, park_seconds=PARK)
        world.run(host, registry=_controllers, limits=limits)


def _controllers() -> Registry:
    registry = Registry()
    registry.controller("asks")(asks)
    registry.controller("replies")(replies)
    return registry


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", OWNED)
def test_a_session_keeps_its_word_wherever_its_caller_is_cancelled(
    name: str, schedule: Schedule
) -> None:
    _play(schedule, OWNED[name])


@pytest.mark.parametrize("schedule", SCHEDULES[:1], ids=str)
@pytest.mark.parametrize("name", OPERATED)
def test_an_operator_s_calls_keep_their_word_wherever_they_are_cancelled(
    name: str, schedule: Schedule
) -> None:
    _play(schedule, OPERATED[name], face=lambda runtime: runtime.admin, ways=BY_TASK)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", ASKING)
def test_a_question_is_asked_or_not_wherever_its_caller_is_cancelled(
    name: str, schedule: Schedule
) -> None:
    _play(schedule, ASKING[name], ways=BY_TASK)


@pytest.mark.parametrize("schedule", SCHEDULES[:1], ids=str)
@pytest.mark.parametrize("name", TOKENS)
def test_who_has_but_a_token_is_told_the_truth_wherever_his_call_is_cancelled(
    name: str, schedule: Schedule
) -> None:
    _play(schedule, TOKENS[name], face=lambda runtime: runtime, ways=BY_TASK)


MUTATIONS = [name for name, entry in OWNED.items() if entry.promise is WHOLE]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_in_a_file_is_whole_or_absent_wherever_its_caller_is_cancelled(
    name: str, tmp_path: Path
) -> None:
    files = SqliteFiles(tmp_path, durability="normal")

    _play(Schedule(), OWNED[name], ways=BY_TASK, store=files)

    files.close()
    check_all(files.path)


# ---- calls of a flow's own code -------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A call a controller makes, cancels, and goes on after.

    Attributes:
        call: The call; cancelled it may have been made or not.
        again: What the controller does next; the same call unless given.
        ends: How the flow may end.
        works: How often its step functions run in all, where the call is made again.
        crowd: How many others push into the flow's mailbox, which holds one, at the same time.
        asked: Whether somebody asks the flow something meanwhile.
    """

    call: Callable[[FlowContext], Awaitable[Any]]
    again: Callable[[FlowContext], Awaitable[Any]] | None = None
    ends: tuple[str, ...] = ("succeeded",)
    works: int = 0
    crowd: int = 0
    asked: bool = False


class Work:
    """A step's function that notices being run twice at once."""

    def __init__(self) -> None:
        self.begun: Counter[Any] = Counter()
        self._running: set[Any] = set()

    async def step(self, context: TaskContext, value: Any) -> Any:
        assert context.run_id not in self._running, "run twice at the same time"
        self._running.add(context.run_id)
        self.begun[context.run_id] += 1
        try:
            await asyncio.sleep(0.01)
        finally:
            self._running.discard(context.run_id)
        return value

    async def bare(self, context: TaskContext, value: Any) -> Any:
        """The same, not registered."""
        return await self.step(context, value)


async def nothing(_flow: FlowContext) -> None:
    """The step is not asked for again."""


def _steps(work: Work) -> dict[str, Step]:
    async def inline() -> Any:
        work.begun["inline"] += 1
        await asyncio.sleep(0.01)
        return 1

    async def finish(flow: FlowContext) -> None:
        await flow.finish(state_json="last")

    return {
        "run": Step(lambda flow: flow.run("work", 1, name="s"), works=1),
        "run, not registered": Step(lambda flow: flow.run(work.bare, 1, name="s"), works=1),
        "run, not again": Step(lambda flow: flow.run(work.bare, 1, name="s"), nothing),
        "run, in a crowd": Step(lambda flow: flow.run(work.bare, 1, name="s"), works=1, crowd=3),
        "run, in a crowd, not again": Step(
            lambda flow: flow.run(work.bare, 1, name="s"), nothing, crowd=3
        ),
        "map": Step(lambda flow: flow.map("work", [1, 2], name="s", limit=1), works=2),
        "map, not registered": Step(lambda flow: flow.map(work.bare, [1, 2], name="s"), works=2),
        "map, not again": Step(lambda flow: flow.map(work.bare, [1, 2], name="s"), nothing),
        "once": Step(lambda flow: flow.once("s", inline), works=1),
        "once, not again": Step(lambda flow: flow.once("s", inline), nothing),
        "update": Step(lambda flow: flow.update(state_json="first"), nothing),
        "update, again": Step(lambda flow: flow.update(state_json="first")),
        "update, in a crowd": Step(lambda flow: flow.update(state_json="x"), nothing, crowd=3),
        "update, then finish": Step(lambda flow: flow.update(state_json="first"), finish),
        "finish": Step(finish, nothing),
        "fail": Step(lambda flow: flow.fail(), nothing, ends=("failed", "succeeded")),
    } | _fan_outs(work) | _standing_still()  # fmt: skip


LAST: dict[str, Any] = {"timeout": 0.5, "on_timeout": "resume"}


def _standing_still() -> dict[str, Step]:
    async def two(flow: FlowContext) -> list[flowstead.Step]:
        return [await flow.open_wait("a"), await flow.start_timer("b", 0.5)]

    async def select(flow: FlowContext) -> None:
        winner = await flow.select(*await two(flow))
        assert winner.name == "b"
        assert isinstance(await winner.outcome(), flowstead.Succeeded)

    async def open_wait(flow: FlowContext) -> None:
        step = await flow.open_wait("a", **LAST)
        assert isinstance(await step.outcome(), flowstead.TimedOut)

    async def timer(flow: FlowContext) -> None:
        await (await flow.start_timer("b", 0.5)).result()

    async def ask_approval(flow: FlowContext) -> None:
        step = await flow.ask_approval("Well?", 1, name="a", expires=0.5)
        assert (await step.result()).verdict == "expired"

    async def approve(flow: FlowContext) -> None:
        assert (await flow.approve("Well?", 1, name="a", expires=0.5)).verdict == "expired"

    async def reply(flow: FlowContext) -> None:
        message = await flow.receive(name="m")
        assert message is not None
        await flow.reply(message, message.body)

    async def wait(flow: FlowContext) -> None:
        assert await flow.wait("s", thread=1, **LAST) is None

    async def receive(flow: FlowContext) -> None:
        assert await flow.receive(name="m", **LAST) is None

    async def ended(flow: FlowContext) -> None:
        assert (await (await two(flow))[1].ended()).status == "succeeded"

    async def outcome(flow: FlowContext) -> None:
        assert isinstance(await (await two(flow))[1].outcome(), flowstead.Succeeded)

    async def cancel(flow: FlowContext) -> None:
        await (await two(flow))[0].cancel()

    return {
        "wait": Step(wait),
        "wait, not again": Step(wait, nothing),
        "open_wait": Step(open_wait),
        "open_wait, not again": Step(lambda flow: flow.open_wait("a"), nothing),
        "sleep": Step(lambda flow: flow.sleep("s", 0.5)),
        "sleep, in a crowd": Step(lambda flow: flow.sleep("s", 0.5), crowd=3),
        "start_timer": Step(timer),
        "select": Step(select),
        "select, not again": Step(select, nothing),
        "approve": Step(approve),
        "ask_approval": Step(ask_approval),
        "receive": Step(receive),
        "reply": Step(reply, asked=True),
        "notify": Step(lambda flow: flow.notify("Well.", name="n")),
        "later": Step(lambda flow: flow.later("Well.", name="n")),
        "ended, of a wait": Step(ended),
        "outcome, of a wait": Step(outcome),
        "result, of a wait": Step(timer),
        "cancel, of a wait": Step(cancel),
    }


def _fan_outs(work: Work) -> dict[str, Step]:
    async def two(flow: FlowContext) -> list[flowstead.Step]:
        return [
            await flow.start(work.bare, 1, name="a"),
            await flow.start("work", 2, name="b"),
        ]

    async def run(flow: FlowContext) -> None:
        assert await flow.run(work.bare, 1, name="s") == 1

    async def gather(flow: FlowContext) -> None:
        assert await flow.gather(*await two(flow)) == [1, 2]

    async def race(flow: FlowContext) -> None:
        loser = await flow.start(forever, name="loser")
        winner = await flow.start("work", 1, name="winner")
        assert await flow.first([loser, winner]) == [winner]
        assert isinstance(await loser.outcome(), flowstead.Cancelled)

    async def fall_back(flow: FlowContext) -> None:
        assert await flow.run(fails, 1, name="s", fallback=["work"]) == 1

    async def fails(_context: TaskContext, _value: Any) -> None:
        raise ValueError

    return {
        "start": Step(lambda flow: flow.start("work", 1, name="s"), run),
        "start, not registered": Step(lambda flow: flow.start(work.bare, 1, name="s"), run),
        "start, not again": Step(lambda flow: flow.start(work.bare, 1, name="s"), nothing),
        "start, in a crowd": Step(lambda flow: flow.start(work.bare, name="s"), nothing, crowd=3),
        "gather": Step(gather, works=2),
        "gather, not again": Step(gather, nothing),
        "first": Step(race, works=1),
        "first, not again": Step(race, nothing),
        "run, with a fallback": Step(fall_back, works=1),
    }


def _waits(work: Work) -> dict[str, Step]:
    """Calls of what `start` and `as_completed` answer with."""

    async def begun(flow: FlowContext) -> flowstead.Step:
        return await flow.start(work.bare, 1, name="s")

    async def result(flow: FlowContext) -> None:
        assert await (await begun(flow)).result() == 1

    async def outcome(flow: FlowContext) -> None:
        assert await (await begun(flow)).outcome() == flowstead.Succeeded(1)

    async def ended(flow: FlowContext) -> None:
        assert (await (await begun(flow)).ended()).status == "succeeded"

    async def cancel(flow: FlowContext) -> None:
        step = await flow.start(forever, name="s")
        await step.cancel()

    async def completed(flow: FlowContext) -> None:
        steps = [await begun(flow), await flow.start("work", 2, name="t")]
        assert len([step async for step in flow.as_completed(steps)]) == 2

    return {
        "result": Step(result, works=1),
        "outcome": Step(outcome, works=1),
        "ended": Step(ended, works=1),
        "cancel": Step(cancel),
        "__anext__": Step(completed, works=2),
    }


CONTROLLED = {name: step for name, step in _steps(Work()).items() if "of a wait" not in name}
STEPPED = _waits(Work())
AWAITED = [name for name in _standing_still() if "of a wait" in name]


class Drives:
    """Flows of one controller, each cancelling one of its own calls before another step of the loop."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.work = Work()
        self.step = (_steps(self.work) | _waits(self.work))[name]
        self.schedule = schedule
        self.probe: Probe | None = None
        self.answers: list[flowstead.Outcome] = []
        self._cancel: tuple[int, bool] | None = None

    def play(self) -> None:
        registry = Registry()
        registry.task(name="work")(self.work.step)
        registry.controller("driver")(self._drive)
        limits = Limits(mailbox=1 if self.step.crowd else 1024, idle_seconds=UNDISTURBED)
        with Simulation(self.schedule) as world:
            world.run(self._host, registry=registry, limits=limits)

    async def _drive(self, flow: FlowContext) -> None:
        assert self.probe is not None
        crowd = [self._push(flow.flow_id, number) for number in range(self.step.crowd)]
        if self.step.asked:
            crowd.append(self._ask(flow.flow_id))
        pushing = asyncio.gather(*crowd)
        await self.probe.call(lambda: self.step.call(flow), self._cancel)
        if not self.step.asked:
            await pushing
        await (self.step.again or self.step.call)(flow)
        await pushing

    async def _push(self, flow_id: str, number: int) -> None:
        await self.flows.run_task(flow_id=flow_id, runtime="acp", task="t", run_id=f"p{number}")

    async def _ask(self, flow_id: str) -> None:
        self.answers.append(await self.flows.ask(flow_id, 1))

    async def _host(self, runtime: Runtime) -> None:
        self.flows = bound(runtime)
        self.probe = probe = Probe()
        for _ in range(2):
            await self._round(runtime, None)
        steps = probe.steps
        for by_scope in ways_of(self.schedule):
            probe.landed.clear()
            for step in range(steps + SPARE):
                await self._round(runtime, (step, by_scope))
            if not self.schedule.shuffle:
                probe.check_nothing_was_missed()

    async def _round(self, runtime: Runtime, cancel: tuple[int, bool] | None) -> None:
        self._cancel = cancel
        self.work.begun.clear()
        self.answers.clear()

        flow = await make(self.flows, controller_id="driver")
        end = await self.flows.result(flow.flow_id)
        await asyncio.sleep(REST)

        assert end.status in self.step.ends, (cancel, end.failure)
        assert all(times == 1 for times in self.work.begun.values()), (cancel, self.work.begun)
        if self.step.again is None:
            assert self.work.begun.total() == self.step.works
            assert self.answers == [flowstead.Succeeded(1)] * self.step.asked
        assert holds_nothing(runtime)
        await told_once_and_whole(self.flows, flow.flow_id)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", [*CONTROLLED, *STEPPED, *AWAITED])
def test_a_controller_that_cancels_its_own_call_anywhere_goes_on_and_its_flow_ends(
    name: str, schedule: Schedule
) -> None:
    Drives(schedule, name).play()


class LateLook(MemoryStore):
    """A store whose next look for an idempotency key comes back late."""

    late: asyncio.Event | None = None

    async def find_by_idempotency_key(self, owner_key: str, idempotency_key: str) -> Any:
        found = await super().find_by_idempotency_key(owner_key, idempotency_key)
        late, self.late = self.late, None
        if late is not None:
            await late.wait()
        return found


async def test_a_create_that_overtakes_another_under_its_key_answers_both() -> None:
    store = LateLook()
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        store.late = looked = asyncio.Event()
        late = asyncio.create_task(make(flows, idempotency_key="key"))
        await settle()
        early = asyncio.create_task(make(flows, idempotency_key="key"))
        await settle()

        looked.set()

        assert (await late).flow_id == (await early).flow_id


REPORTED: dict[str, Callable[[TaskContext], Awaitable[Any]]] = {
    "progress": lambda context: context.progress("half"),
    "heartbeat": lambda context: context.heartbeat(),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", REPORTED)
def test_a_task_that_cancels_its_own_report_anywhere_is_told_once_or_not_and_goes_on(
    name: str, schedule: Schedule
) -> None:
    async def host(runtime: Runtime) -> None:
        flows, probe = bound(runtime), Probe()
        cancel: tuple[int, bool] | None = None
        expected = None

        async def child(context: TaskContext, _input: Any) -> str:
            await probe.call(lambda: REPORTED[name](context), cancel)
            await asyncio.sleep(1)
            return "done"

        async def one() -> list[str]:
            flow = await make(flows)
            added = await flows.run_task(flow_id=flow.flow_id, task="t", run=child)
            outcome = await flows.wait_task(added.unwrap().task_id)
            assert outcome == flowstead.Succeeded("done")
            await asyncio.sleep(REST)
            assert holds_nothing(runtime)
            await told_once_and_whole(flows, flow.flow_id)
            events = await flows.history(flow.flow_id)
            return [event.type for event in events if event.type == "task.progressed"]

        await one()
        expected = await one()
        assert len(expected) == 1, "vacuous: no report was made"
        steps = probe.steps
        for by_scope in ways_of(schedule):
            probe.landed.clear()
            for step in range(steps + SPARE):
                cancel = (step, by_scope)
                assert await one() in ([], expected)
            if not schedule.shuffle:
                probe.check_nothing_was_missed()

    with Simulation(schedule) as world:
        world.run(host)


# ---- opening, closing, watching -------------------------------------------------------------------


class Place:
    """A simulated loop, and a store in it that runtimes can be opened on, one after another."""

    def __init__(self, schedule: Schedule, path: Path | None) -> None:
        self.schedule = schedule
        self._disk = Disk(Random(schedule.seed))
        self._path = path

    def runtime(self, **options: Any) -> Runtime:
        """The next runtime, not entered."""
        store: Any = SimulatedStore(self._disk)
        if self._path is not None:
            store = SqliteStore(self._path, durability="normal", worker=SimulatedWorker)
        return open_runtime(store, clock=SimulatedClock(0), **options)

    async def is_free(self) -> bool:
        """Whether the store can be opened, written to and closed."""
        async with self.runtime() as runtime:
            await make(bound(runtime))
        return True

    def run(self, host: Callable[[Probe], Coroutine[Any, Any, None]]) -> None:
        """Run the host's code on the loop."""

        async def main() -> None:
            await host(Probe())

        loop = SimulatedLoop(Random(self.schedule.seed), shuffle=self.schedule.shuffle)
        try:
            loop.run_until_complete(main())
            assert not loop.pending_tasks()
        finally:
            loop.close()


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    found: Schedule = request.param
    return found


@pytest.fixture(params=[*SCHEDULES, "a file"], ids=str)
def place(request: pytest.FixtureRequest, db: Path) -> Place:
    return Place(Schedule(), db) if request.param == "a file" else Place(request.param, None)


def test_opening_that_is_cancelled_anywhere_leaves_the_store_free(place: Place) -> None:
    async def opened(probe: Probe, cancel: tuple[int, bool] | None) -> None:
        runtime = place.runtime()
        caller = await probe.call(runtime.__aenter__, cancel)
        if runtime._core is not None:
            await runtime.aclose()
        assert caller.cancelled() or caller.exception() is None

    async def play(probe: Probe) -> None:
        await opened(probe, None)
        steps = probe.steps
        for by_scope in ways_of(place.schedule):
            probe.landed.clear()
            for step in range(steps + SPARE):
                await opened(probe, (step, by_scope))
                assert await place.is_free()
            if not place.schedule.shuffle:
                probe.check_nothing_was_missed()

    place.run(play)


def test_opening_that_is_cancelled_twice_leaves_the_store_free(schedule: Schedule) -> None:
    place = Place(schedule, None)

    async def play(probe: Probe) -> None:
        await place.is_free()
        landed = 0
        for step in range(1, 12):
            for again in range(step + 1, step + 20):
                runtime = place.runtime()
                await probe.call(runtime.__aenter__, (step, False), again)
                landed += probe.steps >= again
                if runtime._core is not None:
                    await runtime.aclose()
                assert await place.is_free(), (step, again)
        assert landed, "vacuous: the second cancellation always came too late"

    place.run(play)


def test_a_runtime_whose_opening_was_cancelled_is_not_opened_half(place: Place) -> None:
    async def play(probe: Probe) -> None:
        for step in range(1, 12):
            runtime = place.runtime()
            await probe.call(runtime.__aenter__, (step, False))
            if runtime._core is not None:
                await runtime.aclose()
                continue
            with suppress(RuntimeError):
                async with runtime:
                    await make(bound(runtime))
            assert await place.is_free()

    place.run(play)


def test_closing_goes_on_wherever_its_caller_is_cancelled(schedule: Schedule) -> None:
    place = Place(schedule, None)

    async def closed(probe: Probe, cancel: tuple[int, bool] | None) -> None:
        runtime = await place.runtime().__aenter__()
        flow = await make(bound(runtime))
        await bound(runtime).run_task(flow_id=flow.flow_id, task="t", run=stubborn)
        await asyncio.sleep(0.1)
        caller = await probe.call(runtime.aclose, cancel)
        assert caller.cancelled() or caller.exception() is None
        await runtime.aclose()
        await asyncio.sleep(0)

    async def play(probe: Probe) -> None:
        await closed(probe, None)
        steps = probe.steps
        for by_scope in ways_of(schedule):
            probe.landed.clear()
            for step in range(steps + SPARE):
                await closed(probe, (step, by_scope))
                assert await place.is_free()
            # A scope cannot interrupt it: whoever leaves that way has seen it closed.
            if not (place.schedule.shuffle or by_scope):
                probe.check_nothing_was_missed()

    place.run(play)


def test_entering_a_watch_that_is_cancelled_anywhere_leaves_no_watcher(schedule: Schedule) -> None:
    _play(schedule, Entry(_watch_a_moment, NOTHING))


async def _watch_a_moment(scene: Scene) -> None:
    async with scene.flows.watch(scene.flow_id):
        pass
    async with scene.flows.watch():
        pass


def test_waiting_for_the_next_event_cancelled_anywhere_loses_none(schedule: Schedule) -> None:
    async def host(runtime: Runtime) -> None:
        flows, probe = bound(runtime), Probe()

        async def watched(cancel: tuple[int, bool] | None) -> None:
            flow = await make(flows)
            async with flows.watch(flow.flow_id, after_seq=0) as events:
                seen = []

                async def see() -> None:
                    # Nothing awaits between the event and its being kept.
                    seen.append((await anext(events)).seq)
                    seen.append((await anext(events)).seq)
                    seen.append((await anext(events)).seq)

                working = asyncio.ensure_future(_update_twice(flows, flow.flow_id))
                await probe.call(see, cancel)
                await working
                while len(seen) < 3:
                    seen.append((await anext(events)).seq)
            assert seen == [1, 2, 3]
            assert holds_nothing(runtime)

        await watched(None)
        steps = probe.steps
        for by_scope in ways_of(schedule):
            probe.landed.clear()
            for step in range(steps + SPARE):
                await watched((step, by_scope))
            if not schedule.shuffle:
                probe.check_nothing_was_missed()

    with Simulation(schedule) as world:
        world.run(host)


async def _update_twice(flows: SessionFlows, flow_id: str) -> None:
    for revision in range(2):
        await asyncio.sleep(0.1)
        await flows.update(flow_id=flow_id, expected_revision=revision, state_json=revision)


# ---- nothing is forgotten, and everything is written down -----------------------------------------

TABLES: dict[type[Any], Iterable[str]] = {
    SessionFlows: OWNED | ASKING,
    Admin: OPERATED,
    FlowContext: CONTROLLED,
    flowstead.Step: [name for name in STEPPED if name != "__anext__"],
    flowstead.WaitStep: AWAITED,
    Completed: ("__anext__",),
    TaskContext: REPORTED,
    # `deliver` is cancelled in tests/concurrency/test_postman.py, where there is a channel.
    Runtime: ("__aenter__", "__aexit__", "aclose", "deliver", *TOKENS),
    Watcher: ("__aenter__", "__aexit__", "__anext__"),
}
"""What the tests above call, by the class it belongs to."""


def coroutines_of(cls: type[Any]) -> set[str]:
    """The public coroutines of a class, inherited ones and those of `async` statements too."""
    return {
        name
        for name in dir(cls)
        if not re.match("_[^_]", name) and inspect.iscoroutinefunction(getattr(cls, name))
    }


# What the public names lead to without being public names themselves.
PUBLIC = [*(getattr(flowstead, name) for name in flowstead.__all__), Admin, Watcher, Completed]
CLASSES = [cls for cls in PUBLIC if inspect.isclass(cls) and coroutines_of(cls)]
SENDING = {cls for cls in CLASSES if cls.__module__.startswith("flowstead.notifiers")}
"""Called by the runtime itself, which cancels a notifier only where it hangs or the runtime closes."""
CALLS = [(cls, name) for cls in CLASSES for name in sorted(coroutines_of(cls))]

SAYS: dict[str, str] = {
    WHOLE: r"does not (undo|take|stop)|is not taken back",
    NOTHING: r"only stops the (waiting|reading)|loses none|watched any more",
}


def test_every_public_coroutine_has_been_cancelled_here() -> None:
    assert set(CLASSES) - SENDING == set(TABLES)
    for cls, table in TABLES.items():
        assert {name.partition(",")[0] for name in table} == coroutines_of(cls), cls


@pytest.mark.parametrize(("cls", "name"), CALLS)
def test_a_coroutine_says_in_its_docstring_what_cancelling_its_caller_does(
    cls: type[Any], name: str
) -> None:
    sentences = re.split(r"(?<=[.;:])\s+", inspect.getdoc(getattr(cls, name)) or "")

    said = [sentence for sentence in sentences if re.search(r"\bCancelling\b", sentence)]

    assert len(said) == 1, said


@pytest.mark.parametrize("name", sorted({name for name in OWNED | OPERATED if "," not in name}))
def test_what_a_docstring_says_of_cancelling_is_what_was_seen(name: str) -> None:
    cls, entry = (SessionFlows, OWNED[name]) if name in OWNED else (Admin, OPERATED[name])

    said = " ".join((inspect.getdoc(getattr(cls, name)) or "").split())

    assert re.search(f"Cancelling[^.]* ({SAYS[entry.promise]})", said)
