"""What the worlds have found, each as the smallest run that shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import anyio
import pytest

from flowstead import Created, FlowContext, Limits, Nested, Registry, Retry, Runtime, TaskContext
from flowstead.engine.slots import Slots
from flowstead.model.command import Cancel, Recover, ReleaseTasks
from flowstead.model.flow import FlowKey
from flowstead.model.task import Launch, OnRestart
from flowstead.rules.decide import decide
from flowstead.rules.view import Decision
from flowstead.store.codec import FlowWrite
from flowstead.testing import CALM, Faults, Schedule, Simulation
from flowstead.testing.simulation import Crashed
from tests.unit.given import a_flow, a_launched, a_view


def test_a_retry_whose_start_nobody_can_vouch_for_is_started_all_the_same() -> None:
    registry = Registry()

    @registry.task(retry=Retry(initial=0.5, jitter=0.0))
    async def flaky(context: TaskContext, _: Any) -> Any:
        if context.attempt == 1:
            raise ValueError("the first time")
        return "done"

    with Simulation(1) as simulation:
        tell = simulation.disk.on_commit

        def lie(stage: str, writes: Sequence[FlowWrite]) -> None:
            tell(stage, writes)
            # From the failure of the first attempt on, commits are durable, but nobody knows.
            if any(
                "task.retry_scheduled" in event.doc for write in writes for event in write.events
            ):
                simulation.disk.faults = Faults(fail_after=1.0)

        simulation.disk.on_commit = lie

        async def host(runtime: Runtime) -> str:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            made = await flows.run_task(flow_id=flow.flow_id, task="work", run="flaky")
            assert isinstance(made, Created)
            await asyncio.sleep(0.2)
            # Any call brings the flow back to memory, and with it the instant of its retry.
            await flows.update(flow_id=flow.flow_id, expected_revision=7)
            await asyncio.sleep(0.7)
            simulation.disk.faults = CALM
            await asyncio.sleep(60.0)
            task = await flows.get_task(made.task.task_id)
            assert task is not None
            return task.status

        assert simulation.run(host, registry=registry) == "succeeded"
        assert simulation.disk.fired["fail_after"] == 2, "vacuous"


@pytest.mark.parametrize("way", ["finish", "fail", "cancel_task"])
def test_a_stop_nobody_can_vouch_for_is_carried_out_all_the_same(way: str) -> None:
    registry = Registry()

    @registry.task()
    async def endless(context: TaskContext, _: Any) -> Any:
        await asyncio.Event().wait()

    with Simulation(1) as simulation:

        async def host(runtime: Runtime) -> str:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            made = await flows.run_task(flow_id=flow.flow_id, task="work", run="endless")
            assert isinstance(made, Created)
            await asyncio.sleep(0.2)
            simulation.disk.faults = Faults(fail_after=1.0)
            if way == "cancel_task":
                await flows.cancel_task(made.task.task_id, grace=0.1)
            else:
                await getattr(flows, way)(flow_id=flow.flow_id, expected_revision=0)
            simulation.disk.faults = CALM
            await asyncio.sleep(60.0)
            task = await flows.get_task(made.task.task_id)
            assert task is not None
            return task.status

        assert simulation.run(host, registry=registry) == "cancelled"
        assert simulation.disk.fired["fail_after"] == 1, "vacuous"


def test_a_read_never_falls_behind_an_earlier_read() -> None:
    with Simulation(Schedule(seed=1, faults=Faults(delay=0.05))) as simulation:

        async def host(runtime: Runtime) -> list[tuple[int, int]]:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            seen = []
            for revision in range(50):
                update = flows.update(flow_id=flow.flow_id, expected_revision=revision)
                writing = asyncio.ensure_future(update)
                while not writing.done():
                    [listed] = await flows.list()
                    got = await flows.get(flow.flow_id)
                    assert got is not None
                    seen.append((listed.revision, got.revision))
            return seen

        seen = simulation.run(host)

        assert len(seen) > 50, "vacuous"
        assert [pair for pair in seen if pair[1] < pair[0]] == []


def test_a_child_stopped_and_started_again_while_closing_is_released_once() -> None:
    stopped = a_launched("t-1", attempt=2)
    view = a_view(a_flow(), stopped, closing=True)

    answer = decide(view, ReleaseTasks(task_ids=("t-1", "t-1")))

    assert isinstance(answer, Decision)
    assert [(task.status, task.attempt) for task in answer.tasks] == [("queued", 1)]
    assert len(answer.facts) == 1


def test_a_child_stopped_by_a_close_is_not_lost_when_its_flow_is_loaded_again_meanwhile() -> None:
    stopped = a_launched("t-1", launch=Launch(function="work", on_restart=OnRestart.LOST))
    view = a_view(a_flow(), stopped, closing=True)

    answer = decide(view, Recover())

    assert isinstance(answer, Decision)
    assert answer.tasks == ()


def test_a_child_that_has_waited_too_long_while_nobody_lived_is_not_started() -> None:
    registry, limits = Registry(), Limits(running_children=1)

    @registry.task(idempotent=False)
    async def work(context: TaskContext, given: Any) -> Any:
        await asyncio.sleep(given)

    with Simulation(1) as simulation:
        runtime = simulation.boot(registry=registry, limits=limits)

        async def begin() -> str:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            named: dict[str, Any] = {"flow_id": flow.flow_id, "task": "work", "run": "work"}
            await flows.run_task(**named, input_json=0.2)
            made = await flows.run_task(**named, input_json=0.0, queue_timeout=10.0)
            assert isinstance(made, Created)
            return made.task.task_id

        waiting = simulation.play(begin())
        simulation.kill()
        simulation.clock.shift_ms = 20_000
        again = simulation.boot(registry=registry, limits=limits)

        async def look() -> tuple[str, int]:
            await asyncio.sleep(5.0)
            flows = again.tasks.flow.bind_session(session_key="agent:a")
            task = await flows.get_task(waiting)
            assert task is not None
            return task.status, task.attempt

        assert simulation.play(look()) == ("timed_out", 0)
        simulation.shut()


def test_a_flow_is_not_cancelled_while_code_of_a_flow_below_it_that_failed_still_runs() -> None:
    registry, running = Registry(), list[str]()

    @registry.task()
    async def slow(context: TaskContext, _: Any) -> Any:
        running.append(context.task_id)
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(3.0)
        running.remove(context.task_id)

    @registry.controller("outer")
    async def outer(flow: FlowContext) -> None:
        await flow.start(Nested("inner"))
        await asyncio.sleep(60.0)

    @registry.controller("inner")
    async def inner(flow: FlowContext) -> None:
        await flow.start(slow)
        await asyncio.sleep(0.5)
        raise RuntimeError("as planned")

    with Simulation(1) as simulation:

        async def host(runtime: Runtime) -> tuple[bool, list[str]]:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="outer", goal="triage")
            await asyncio.sleep(1.0)
            report = await flows.cancel(flow.flow_id, grace=0.1)
            return report.cancelled, list(running)

        cancelled, left = simulation.run(host, registry=registry)

        assert not (cancelled and left), f"cancelled, and {left} still run"


def test_a_cancel_two_flows_deep_goes_on_in_the_next_process() -> None:
    registry = Registry()

    @registry.controller("outer")
    async def outer(flow: FlowContext) -> None:
        await flow.run(Nested("middle"))

    @registry.controller("middle")
    async def middle(flow: FlowContext) -> None:
        await flow.run(Nested("inner"))

    @registry.controller("inner")
    async def inner(flow: FlowContext) -> None:
        await asyncio.Event().wait()

    def crash_after(steps: int) -> str:
        with Simulation(1) as simulation:
            runtime = simulation.boot(registry=registry)

            async def begin() -> str:
                flows = runtime.tasks.flow.bind_session(session_key="agent:a")
                flow = await flows.create_managed(controller_id="outer", goal="triage")
                await asyncio.sleep(1.0)
                return flow.flow_id

            flow_id = simulation.play(begin())

            async def cancel() -> None:
                flows = runtime.tasks.flow.bind_session(session_key="agent:a")
                await flows.cancel(flow_id)

            simulation.crash(after=steps)
            with suppress(Crashed):
                simulation.play(cancel())
                simulation.kill()
            simulation.heal()
            again = simulation.boot(registry=registry)

            async def look() -> str:
                await asyncio.sleep(30.0)
                flows = again.tasks.flow.bind_session(session_key="agent:a")
                flow = await flows.get(flow_id)
                assert flow is not None
                return flow.status if flow.cancel_requested_at else "never asked"

            found = simulation.play(look())
            simulation.shut()
            return found

    ends = [crash_after(steps) for steps in range(1, 120, 2)]

    assert set(ends) == {"never asked", "cancelled"}


@pytest.mark.parametrize("seed", range(20))
def test_slots_that_come_free_together_are_not_passed_round_for_ever(seed: int) -> None:
    random, woken = Random(seed), list[FlowKey]()
    slots = Slots(2, lambda name: 1 if name == "narrow" else None, woken.append)
    flows = [FlowKey("agent:a", f"triage-{number}") for number in range(6)]
    wanted = {key: random.choices(("narrow", "work"), k=2) for key in flows}
    running: list[str] = []

    def turn(key: FlowKey) -> None:
        for place, function in reversed(list(enumerate(wanted[key]))):
            task = a_launched(f"t-{key.flow_id}-{place}", launch=Launch(function=function))
            if slots.take(key, task):
                del wanted[key][place]
                running.append(task.task_id)
        slots.turn_over(key)

    for key in flows:
        turn(key)
    while running:
        slots.give_back(running.pop(random.randrange(len(running))))
        for _ in range(100):
            if woken:
                turn(woken.pop(0))
        assert not woken, "nobody gets what all are offered"

    assert not any(wanted.values()), "some never ran"


def test_a_function_asked_for_twice_in_one_turn_is_started_once() -> None:
    with Simulation(1) as simulation:

        async def host(runtime: Runtime) -> int:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")

            async def bare(context: TaskContext, _: Any) -> Any:
                return "done"

            def ask() -> Coroutine[Any, Any, Any]:
                return flows.run_task(flow_id=flow.flow_id, task="work", run=bare, run_id="once")

            made, again = await asyncio.gather(ask(), ask())
            assert (made.created, again.created) == (True, False)
            await flows.wait_task(made.task.task_id)
            task = await flows.get_task(made.task.task_id)
            assert task is not None
            return task.attempt

        assert simulation.run(host) == 1


def test_a_disk_that_refuses_what_is_overdue_is_not_asked_without_a_pause() -> None:
    registry = Registry()

    @registry.task(retry=Retry(initial=0.5, jitter=0.0))
    async def flaky(context: TaskContext, _: Any) -> Any:
        if context.attempt == 1:
            raise ValueError("the first time")
        return "done"

    with Simulation(1) as simulation:

        async def host(runtime: Runtime) -> int:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            await flows.run_task(flow_id=flow.flow_id, task="work", run="flaky")
            await asyncio.sleep(0.2)
            simulation.disk.faults = Faults(fail_before=1.0)
            await asyncio.sleep(20.0)
            return runtime.statistics().failed_writes

        failed = simulation.run(host, registry=registry)

        assert 5 < failed < 50


def test_a_flow_that_gives_a_slot_back_to_itself_is_not_taken_for_one_that_never_was() -> None:
    registry = Registry()

    @registry.task()
    async def nap(context: TaskContext, _: Any) -> Any:
        await asyncio.sleep(0.2)

    with Simulation(1) as simulation:
        tell = simulation.disk.on_commit

        def fail_after_the_first(stage: str, writes: Sequence[FlowWrite]) -> None:
            tell(stage, writes)
            if any("task.ended" in event.doc for write in writes for event in write.events):
                simulation.disk.faults = Faults(busy=1.0)

        simulation.disk.on_commit = fail_after_the_first

        async def host(runtime: Runtime) -> str | None:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            for _ in range(3):
                await flows.run_task(flow_id=flow.flow_id, task="work", run="nap")
            await asyncio.sleep(0.5)
            # The second child has taken the slot that the third one waits for, and the disk is not done with it.
            answer = await flows.update(flow_id=flow.flow_id, expected_revision=0)
            simulation.disk.faults = CALM
            return answer.code

        code = simulation.run(host, registry=registry, limits=Limits(running_in_all=1))

        assert simulation.disk.fired["busy"], "vacuous"
        assert code in (None, "persist_failed")


def test_a_step_that_was_cut_off_waits_for_room_like_anybody_else() -> None:
    registry, running, most = Registry(), list[str](), list[int]()

    @registry.task()
    async def work(context: TaskContext, _: Any) -> Any:
        running.append(context.task_id)
        most.append(len(running))
        await asyncio.sleep(1.0)
        running.remove(context.task_id)

    @registry.controller("plan")
    async def plan(flow: FlowContext) -> None:
        async def step(context: TaskContext, given: Any) -> Any:
            return await work(context, given)

        await flow.run(step)

    with Simulation(1) as simulation:
        limits = Limits(running_in_all=1)
        runtime = simulation.boot(registry=registry, limits=limits)

        async def begin() -> None:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            await flows.create_managed(controller_id="plan", goal="plan")
            await asyncio.sleep(0.2)
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            await flows.run_task(flow_id=flow.flow_id, task="work", run="work")

        simulation.play(begin())
        simulation.kill()
        running.clear()
        simulation.boot(registry=registry, limits=limits)
        simulation.play(asyncio.sleep(10.0))
        simulation.shut()

    assert len(most) == 3, "vacuous"
    assert max(most) == 1


def test_a_retry_is_not_forgotten_when_its_flow_is_loaded_after_the_clock_was_put_back() -> None:
    registry = Registry()

    @registry.task(retry=Retry(initial=1.0, jitter=0.0))
    async def flaky(context: TaskContext, _: Any) -> Any:
        if context.attempt == 1:
            raise ValueError("the first time")
        return "done"

    with Simulation(1) as simulation:

        async def host(runtime: Runtime) -> str:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            made = await flows.run_task(flow_id=flow.flow_id, task="work", run="flaky")
            assert isinstance(made, Created)
            await asyncio.sleep(0.2)
            # The retry comes due, and its start is refused after a while, in which the clock goes back.
            simulation.disk.faults = Faults(busy=1.0)
            await asyncio.sleep(2.0)
            simulation.clock.shift_ms = -3_600_000
            # Somebody waits for the flow meanwhile, so that it is loaded again at once.
            await flows.update(flow_id=flow.flow_id, expected_revision=7)
            simulation.disk.faults = CALM
            await asyncio.sleep(1.0)
            simulation.clock.shift_ms = 0
            await asyncio.sleep(120.0)
            task = await flows.get_task(made.task.task_id)
            assert task is not None
            return task.status

        assert simulation.run(host, registry=registry) == "succeeded"
        assert simulation.disk.fired["busy"], "vacuous"


def test_a_cancel_is_not_started_before_it_was_requested() -> None:
    view = a_view(a_flow(cancel_requested_at=2_000), a_launched("t-1", attempt=1), now=1_000)

    answer = decide(view, Cancel())

    assert isinstance(answer, Decision)
    assert answer.flow is not None
    assert answer.flow.cancel_started_at == 2_000
