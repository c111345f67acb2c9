"""Executors as callers meet them: threads, worker processes, programs, and executors of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from flowstead import (
    ChildFailed,
    Command,
    FlowContext,
    Limits,
    Process,
    Registry,
    Retry,
    SessionFlows,
    Task,
    open_runtime,
)
from flowstead.executors import Call, SyncContext, TaskInfo
from flowstead.testing import ManualClock
from tests.executors import functions
from tests.executors.stage import is_alive, until
from tests.runtime.support import PATIENCE, Lives, Where, bound, make, step

# ---- functions in threads -------------------------------------------------------------------------


async def _launched(flows: SessionFlows, run: Any, **given: Any) -> Task:
    flow = await make(flows)
    return (await flows.run_task(flow_id=flow.flow_id, task="t", run=run, **given)).unwrap()


async def _ended(flows: SessionFlows, task: Task) -> Task:
    with anyio.fail_after(PATIENCE):
        await flows.wait_task(task.task_id)
    found = await flows.get_task(task.task_id)
    assert found is not None
    return found


class Thread:
    """A plain function that says it has begun, and waits for leave to go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self.context: SyncContext | None = None
        self.asked: list[bool] = []

    def __call__(self, context: SyncContext, _: Any) -> str:
        self.context = context
        self.begun.set()
        assert self.may_go_on.wait(PATIENCE)
        return "done"

    async def has_begun(self) -> None:
        await until(self.begun.is_set, "the function began")


async def test_a_plain_function_runs_in_a_thread_and_is_told_what_it_is(
    flows: SessionFlows,
) -> None:
    told: list[Any] = []

    def sums(context: SyncContext, numbers: list[int]) -> dict[str, Any]:
        told.extend((context.flow_id, context.task_id, context.run_id, context.attempt))
        told.append(context.deadline)
        return {"sum": sum(numbers), "thread": threading.get_ident()}

    task = await _launched(flows, sums, input_json=[1, 2, 3], run_id="r", timeout=60)
    ended = await _ended(flows, task)

    assert (ended.status, ended.runtime) == ("succeeded", "task")
    assert ended.result_json["sum"] == 6
    assert ended.result_json["thread"] != threading.get_ident()
    assert told[:4] == [task.flow_id, task.task_id, "r", 1]
    assert told[4] is not None and ended.started_at is not None and told[4] > ended.started_at


async def test_a_thread_s_progress_and_heartbeats_are_durable(
    store: Where, flows: SessionFlows
) -> None:
    def work(context: SyncContext, _: Any) -> None:
        context.progress("half way")
        context.heartbeat()

    task = await _launched(flows, work)
    ended = await _ended(flows, task)

    assert ended.progress_summary == "half way"
    told = [event for event in await flows.history(task.flow_id) if event.type == "task.progressed"]
    assert [event.changed.get("progressSummary") for event in told] == ["half way", None]


async def test_a_thread_s_sign_of_life_restarts_its_idle_deadline(
    store: Where, clock: ManualClock
) -> None:
    said, may_say = threading.Event(), threading.Semaphore(0)

    def work(context: SyncContext, rounds: int) -> str:
        for number in range(rounds):
            assert may_say.acquire(timeout=PATIENCE)
            context.progress(str(number))
            said.set()
        return "alive to the end"

    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        task = await _launched(flows, work, input_json=5, idle_timeout=10)
        for _ in range(5):
            may_say.release()
            await until(said.is_set, "it gave a sign")
            said.clear()
            clock.advance(8)
        ended = await _ended(flows, task)

    assert (ended.status, ended.result_json) == ("succeeded", "alive to the end")


async def test_a_thread_that_looks_is_stopped(flows: SessionFlows) -> None:
    looked = threading.Event()
    asked: list[bool] = []

    def work(context: SyncContext, _: Any) -> None:
        asked.append(context.cancel_requested)
        while True:
            context.check_cancelled()
            looked.set()

    task = await _launched(flows, work)
    await until(looked.is_set, "it runs")

    report = await flows.cancel_task(task.task_id, grace=PATIENCE)

    assert report.cancelled and report.task is not None
    assert (report.task.status, report.task.attempt) == ("cancelled", 1)
    assert asked == [False]


async def test_a_thread_that_sees_the_request_may_still_return(flows: SessionFlows) -> None:
    looked = threading.Event()

    def work(context: SyncContext, _: Any) -> str:
        while not context.cancel_requested:
            looked.set()
        return "stopped early"

    task = await _launched(flows, work)
    await until(looked.is_set, "it runs")

    await flows.cancel_task(task.task_id, grace=PATIENCE)

    ended = await _ended(flows, task)
    assert (ended.status, ended.result_json) == ("succeeded", "stopped early")
    assert ended.cancel_requested_at is not None


async def test_a_thread_that_does_not_look_is_reported_as_what_it_is(
    store: Where, clock: ManualClock
) -> None:
    thread = Thread()
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        task = await _launched(flows, thread)
        await thread.has_begun()

        pending = asyncio.create_task(flows.cancel(task.flow_id, grace=2))
        async with flows.watch(task.flow_id, after_seq=0) as events:
            async for event in events:
                if event.type == "task.cancel_requested":
                    break
        await step(50)
        clock.advance(3)
        report = await pending

        assert report.code == "cancel_pending"
        [line] = report.descendants
        assert (line.state, line.status) == ("running", "running")
        assert line.why == "its function runs in a thread, which cannot be stopped from outside"
        thread.may_go_on.set()
        ended = await _ended(flows, task)
        assert (ended.status, ended.result_json) == ("succeeded", "done")
        assert (await flows.result(task.flow_id)).status == "cancelled"


async def test_what_a_thread_raises_is_its_failure_and_is_tried_again(flows: SessionFlows) -> None:
    def moody(context: SyncContext, _: Any) -> int:
        if context.attempt < 3:
            raise ConnectionError(f"attempt {context.attempt}")
        return context.attempt

    retry = Retry(max_attempts=3, initial=0)
    again = await _ended(flows, await _launched(flows, moody, retry=retry))
    once = await _ended(flows, await _launched(flows, moody))

    assert (again.status, again.result_json) == ("succeeded", 3)
    assert once.failure is not None
    assert (once.failure.code, once.failure.message, once.failure.category) == (
        "ConnectionError",
        "ConnectionError: attempt 1",
        "transient",
    )


async def test_threads_and_loop_functions_are_steps_alike(store: Where) -> None:
    registry = Registry()

    @registry.task
    def twice(_: SyncContext, number: int) -> int:
        return 2 * number

    @registry.controller("mixed")
    async def mixed(flow: FlowContext) -> None:
        doubled = await flow.map("twice", [1, 2, 3], limit=2)
        bare = await flow.run(lambda _, number: number + 1, doubled[-1], name="bare")
        await flow.finish(state_json=[*doubled, bare])

    async with open_runtime(store, registry=registry) as runtime:
        flows = bound(runtime)
        flow = await make(flows, controller_id="mixed")
        with anyio.fail_after(PATIENCE):
            ended = await flows.result(flow.flow_id)

    assert ended.state_json == [2, 4, 6, 7]


async def test_no_more_threads_than_the_limit_run_at_once(db: Path) -> None:
    lock, most, running = threading.Lock(), [0], [0]
    two = threading.Barrier(2, timeout=PATIENCE)

    def work(_: SyncContext, __: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        two.wait()
        with lock:
            running[0] -= 1

    async with open_runtime(db, limits=Limits(threads=2)) as runtime:
        flows = bound(runtime)
        tasks = [await _launched(flows, work) for _ in range(6)]
        for task in tasks:
            assert (await _ended(flows, task)).status == "succeeded"

    assert most == [2]


# ---- worker processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["spec", "registered"])
async def test_a_function_runs_in_a_process_of_its_own(db: Path, way: str) -> None:
    registry = Registry()
    registry.task(name="echo", executor="process")(functions.echo)
    async with open_runtime(db, registry=registry) as runtime:
        flows = bound(runtime)
        run = Process(functions.echo) if way == "spec" else "echo"
        task = await _launched(flows, run, input_json={"a": [1]}, run_id="r", timeout=60)
        ended = await _ended(flows, task)
        pid = await _ended(flows, await _launched(flows, Process(functions.pid)))

    assert ended.status == "succeeded", ended.failure
    assert ended.result_json[:4] == [task.flow_id, task.task_id, "r", 1]
    assert ended.result_json[5] == {"a": [1]}
    assert pid.result_json != os.getpid()


async def test_a_worker_that_raises_or_dies_fails_its_child_and_no_other(db: Path) -> None:
    async with open_runtime(db, limits=Limits(processes=1)) as runtime:
        flows = bound(runtime)
        raised = await _ended(
            flows, await _launched(flows, Process(functions.raises), input_json="Told")
        )
        died = await _ended(
            flows, await _launched(flows, Process(functions.dies), input_json="exit")
        )
        after = await _ended(flows, await _launched(flows, Process(functions.echo)))

    assert raised.failure is not None and died.failure is not None
    assert raised.failure.code == "Told"
    assert died.failure.code == "WorkerDied"
    assert after.status == "succeeded"


async def test_a_worker_past_its_deadline_is_really_gone(
    db: Path, clock: ManualClock, tmp_path: Path
) -> None:
    said = tmp_path / "pid"
    async with open_runtime(db, clock=clock) as runtime:
        flows = bound(runtime)
        task = await _launched(flows, Process(functions.spins), input_json=str(said), timeout=5)
        await until(said.exists, "it spins")
        clock.advance(6)
        ended = await _ended(flows, task)

        assert ended.status == "timed_out"
        assert not is_alive(int(said.read_text()))


def test_a_function_that_no_worker_could_find_is_misuse() -> None:
    def local(_: TaskInfo, __: Any) -> None: ...

    with pytest.raises((TypeError, ValueError)):
        Process(local)


# ---- programs -------------------------------------------------------------------------------------


def _python(code: str, *args: str, **given: Any) -> Command:
    return Command([sys.executable, "-S", "-c", code, *args], **given)


async def test_a_program_is_a_child_of_runtime_cli(flows: SessionFlows) -> None:
    double = "import json, sys; print(json.dumps(2 * json.load(sys.stdin)))"

    task = await _launched(flows, _python(double, result="json"), input_json=21, label="double")
    ended = await _ended(flows, task)

    assert (ended.status, ended.runtime, ended.result_json) == ("succeeded", "cli", 42)
    summary = await flows.get_task_summary(task.flow_id)
    assert summary is not None and summary.by_runtime["cli"] == 1


async def test_programs_are_steps_with_a_policy_like_any(db: Path, tmp_path: Path) -> None:
    registry, marks = Registry(), tmp_path / "marks"
    third_time = (
        "import os, sys; marks = open(sys.argv[1], 'a+'); marks.write('x'); marks.flush();"
        " marks.seek(0); n = len(marks.read()); print(n, os.environ['FLOWSTEAD_ATTEMPT']);"
        " sys.exit(0 if n == 3 else 9)"
    )

    @registry.controller("shell")
    async def shell(flow: FlowContext) -> None:
        command = _python(third_time, str(marks))
        said = await flow.run(command, name="thrice", retry=Retry(max_attempts=3, initial=0))
        lines = await flow.map(
            _python("import sys; print(sys.stdin.read())", result="lines"), ["a", "b"], name="m"
        )
        try:
            await flow.run(_python("raise SystemExit(7)"), name="fails")
        except ChildFailed as error:
            await flow.finish(state_json=[said, lines, error.failure.code, error.failure.message])

    async with open_runtime(db, registry=registry) as runtime:
        flows = bound(runtime)
        flow = await make(flows, controller_id="shell")
        with anyio.fail_after(PATIENCE):
            ended = await flows.result(flow.flow_id)
        [thrice] = [t for t in await flows.list_tasks(flow.flow_id) if t.run_id == "thrice"]

    assert ended.status == "succeeded", ended.failure
    said, lines, code, message = ended.state_json
    assert said.split() == ["3", "3"] and thrice.attempt == 3
    assert [line[0] for line in lines] == ['"a"', '"b"']
    assert code == "CommandFailed" and "7" in message


async def test_a_program_that_is_cancelled_is_gone(flows: SessionFlows, tmp_path: Path) -> None:
    said = tmp_path / "pid"
    code = (
        "import os, sys, time; open(sys.argv[1] + '.new', 'w').write(str(os.getpid()));"
        " os.rename(sys.argv[1] + '.new', sys.argv[1]); time.sleep(600)"
    )
    task = await _launched(flows, _python(code, str(said)))
    await until(said.exists, "it runs")

    report = await flows.cancel(task.flow_id, grace=PATIENCE)

    assert report.cancelled
    assert [(line.state, line.status) for line in report.descendants] == [("settled", "cancelled")]
    assert not is_alive(int(said.read_text()))


# ---- executors of one's own -----------------------------------------------------------------------


class Bake(msgspec.Struct, frozen=True):
    """What the oven takes."""

    degrees: int

    @property
    def label(self) -> str:
        return f"bake at {self.degrees}"


class Oven:
    """An executor that keeps each call, and answers when it is told to, or at once."""

    def __init__(self, *, external: bool = False, spec: type[msgspec.Struct] | None = Bake) -> None:
        self.name = "oven"
        self.spec = spec
        self.external = external
        self.calls: list[Call] = []
        self.interrupted: list[bool] = []
        self.stopped: list[int] = []
        self.killed = 0
        self.closed = 0
        self.seconds = 0.0
        self.touches_each: float | None = None

    async def run(self, call: Call) -> Any:
        self.calls.append(call)
        self.interrupted.append(call.interrupted)
        call.on_kill(self._kill)
        try:
            await self._bake(call)
        except asyncio.CancelledError:
            self.stopped.append(call.context.attempt)
            raise
        if call.function is not None:
            return call.function(call.input)
        return {"degrees": call.spec.degrees, "input": call.input}

    async def _bake(self, call: Call) -> None:
        left = self.seconds
        while left > 0:
            part = min(left, self.touches_each or left)
            await asyncio.sleep(part)
            left -= part
            call.touch()

    def _kill(self) -> None:
        self.killed += 1

    async def aclose(self) -> None:
        self.closed += 1


def _with_oven(lives: Lives, **given: Any) -> Oven:
    oven = Oven(**given)
    lives.registry.executor(oven)
    return oven


def _bake(lives: Lives, run: Any = None, **given: Any) -> Task:
    flow = lives.play(make(lives.flows))
    added = lives.play(
        lives.flows.run_task(flow_id=flow.flow_id, task="bake it", run=run or Bake(180), **given)
    )
    return added.unwrap()


def test_a_registered_executor_runs_the_specs_it_takes(lives: Lives) -> None:
    oven = _with_oven(lives)

    @lives.registry.controller("bakery")
    async def bakery(flow: FlowContext) -> None:
        await flow.finish(state_json=await flow.map(Bake(200), ["bread", "cake"]))

    task = _bake(lives, input_json="pie", timeout=60)
    flow = lives.play(make(lives.flows, controller_id="bakery"))

    ended = lives.result(flow.flow_id)

    assert lives.task(task.task_id).result_json == {"degrees": 180, "input": "pie"}
    assert ended.state_json == [
        {"degrees": 200, "input": "bread"},
        {"degrees": 200, "input": "cake"},
    ]
    assert [child.run_id for child in lives.children(flow.flow_id)] == [
        "bake at 200[0]",
        "bake at 200[1]",
    ]
    first = oven.calls[0]
    assert first.spec == Bake(180) and first.function is None
    assert (first.context.task_id, first.context.attempt) == (task.task_id, 1)
    assert first.context.deadline is not None
    assert oven.interrupted == [False] * 3


def test_a_registered_executor_runs_functions_registered_for_it(lives: Lives) -> None:
    oven = _with_oven(lives, spec=None)
    lives.registry.task(name="knead", executor="oven")(lambda given: [given, "kneaded"])

    task = _bake(lives, "knead", input_json="dough")
    lives.pass_time(1)

    assert lives.task(task.task_id).result_json == ["dough", "kneaded"]
    assert oven.calls[0].spec is None


def test_executors_are_closed_with_the_runtime(lives: Lives) -> None:
    oven = _with_oven(lives)
    _bake(lives)

    lives.restart("close")

    assert oven.closed == 1


def test_a_touch_restarts_the_idle_deadline_and_writes_nothing(lives: Lives) -> None:
    oven = _with_oven(lives)
    oven.seconds, oven.touches_each = 20, 4
    alive = _bake(lives, idle_timeout=5)
    lives.pass_time(21)
    oven.touches_each = 6
    silent = _bake(lives, idle_timeout=5)
    lives.pass_time(21)

    assert lives.task(alive.task_id).status == "succeeded"
    assert lives.told(alive.flow_id, "task.") == ["task.created", "task.started", "task.ended"]
    idled = lives.task(silent.task_id)
    assert idled.failure is not None
    assert (idled.status, idled.failure.code) == ("timed_out", "idle")


def test_the_kill_rung_calls_what_the_executor_gave(lives: Lives) -> None:
    lives.limits = Limits(kill_after=5, abandon_after=25)
    ended = asyncio.Event()

    class Stuck(Oven):
        async def _bake(self, call: Call) -> None:
            while not ended.is_set():
                try:
                    await ended.wait()
                except asyncio.CancelledError:
                    continue

        def _kill(self) -> None:
            super()._kill()
            ended.set()

    oven = Stuck()
    lives.registry.executor(oven)
    task = _bake(lives)
    lives.pass_time(1)

    report = lives.play(lives.flows.cancel(task.flow_id, grace=60))

    assert oven.killed == 1
    [line] = report.descendants
    assert line.asked_at is not None
    assert line.killed_at == line.asked_at + 5000


@pytest.mark.parametrize("external", [False, True])
def test_an_attempt_after_a_crash_knows_that_something_may_be_left(
    lives: Lives, external: bool
) -> None:
    oven = _with_oven(lives, external=external)
    oven.seconds = 10
    task = _bake(lives)
    lives.pass_time(1)

    lives.restart("kill")
    lives.pass_time(11)

    assert oven.interrupted == [False, True]
    ended = lives.task(task.task_id)
    assert (ended.status, ended.attempt) == ("succeeded", 2)


def test_something_external_that_is_not_wanted_any_more_is_seen_to_before_its_record_ends(
    lives: Lives,
) -> None:
    oven = _with_oven(lives, external=True)
    oven.seconds = 3600
    task = _bake(lives)
    lives.pass_time(1)
    world = lives.world
    lives.play(_request_cancel(lives.flows, task))
    lives.restart("kill")

    assert lives.flows
    ended = lives.result(task.flow_id)

    assert ended.status == "cancelled"
    assert oven.interrupted == [False, True]
    assert oven.stopped == [1], "the leftovers were not seen to"
    assert lives.task(task.task_id).status == "cancelled"
    assert world.crashed == 1


async def _request_cancel(flows: SessionFlows, task: Task) -> None:
    await flows.request_cancel(flow_id=task.flow_id, expected_revision=0)


@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("external", [False, True])
def test_children_whose_executor_is_gone_are_kept_until_it_comes_back(
    lives: Lives, how: str, external: bool
) -> None:
    oven = _with_oven(lives, external=external)
    oven.seconds = 10
    known = lives.registry
    running = _bake(lives)
    lives.pass_time(1)
    lives.restart(how)
    lives.registry = Registry()
    lives.pass_time(3600)
    kept = lives.task(running.task_id)
    assert kept.status == ("running" if how == "kill" else "queued")
    lives.restart(how)
    lives.pass_time(3600)
    assert lives.task(running.task_id) == kept
    lives.restart(how)

    lives.registry = known
    lives.pass_time(11)

    ended = lives.task(running.task_id)
    assert (ended.status, ended.result_json) == ("succeeded", {"degrees": 180, "input": None})
    assert ended.attempt == (2 if how == "kill" else 1)
    assert len(oven.calls) == 2


@pytest.mark.parametrize("external", [False, True])
def test_a_flow_whose_executor_is_gone_can_still_be_asked_to_cancel(
    lives: Lives, external: bool
) -> None:
    oven = _with_oven(lives, external=external)
    oven.seconds = 10
    known = lives.registry
    task = _bake(lives)
    lives.pass_time(1)
    lives.restart("kill")
    lives.registry = Registry()
    lives.pass_time(1)

    report = lives.play(lives.flows.cancel(task.flow_id))

    # Of something external nobody here can say what is left of it; whoever can does, later.
    assert report.code == ("cancel_pending" if external else None)
    assert report.cancelled is not external
    lives.restart("kill")
    lives.registry = known
    assert lives.flows
    assert lives.result(task.flow_id).status == "cancelled"
    assert lives.task(task.task_id).status == "cancelled"
    assert oven.interrupted == ([False, True] if external else [False])
    assert oven.stopped == ([1] if external else [])


def test_a_name_nobody_has_is_told_where_it_is_asked_for(lives: Lives) -> None:
    lives.registry.task(name="knead", executor="nobody")(lambda given: given)
    flow = lives.play(make(lives.flows))

    with pytest.raises(LookupError, match="there is no executor 'nobody'; there are: code"):
        lives.play(lives.flows.run_task(flow_id=flow.flow_id, task="t", run="knead"))

    assert lives.children(flow.flow_id) == []


def test_a_spec_nobody_runs_fails_the_controller_that_asks_for_it(lives: Lives) -> None:
    @lives.registry.controller("bakery")
    async def bakery(flow: FlowContext) -> None:
        await flow.run(Bake(180))

    flow = lives.play(make(lives.flows, controller_id="bakery"))

    ended = lives.result(flow.flow_id)
    assert ended.failure is not None
    assert ended.failure.message == "TypeError: no executor is registered that runs Bake."
    assert lives.children(flow.flow_id) == []


def test_an_executor_of_the_host_s_may_stand_in_for_one_that_is_built_in(lives: Lives) -> None:
    class Stage(Oven):
        async def run(self, call: Call) -> Any:
            return f"would have run {call.spec.argv[0]}"

    stage = Stage(spec=Command)
    stage.name = "command"
    lives.registry.executor(stage)

    task = _bake(lives, Command(["launch-missiles"]))
    lives.pass_time(1)

    assert lives.task(task.task_id).result_json == "would have run launch-missiles"


def _two(name: str, spec: type[msgspec.Struct] | None) -> Callable[[], Any]:
    def make_two() -> Any:
        registry = Registry()
        registry.executor(Oven())
        second = Oven(spec=spec)
        second.name = name
        registry.executor(second)
        return open_runtime(":memory:", registry=registry)

    return make_two


@pytest.mark.parametrize(
    ("two", "sentence"),
    [
        (_two("oven", None), "an executor named 'oven' is already registered"),
        (_two("stove", Bake), "Bake is taken by 'oven' and by 'stove'"),
    ],
)
def test_two_of_a_name_or_for_a_spec_are_misuse(two: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        two()
