"""A few calls at every distance from each other: for bugs that need one exact moment, which chance seldom hits."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from flowstead import (
    Command,
    CommitFailed,
    Limits,
    OutcomeUnknown,
    Registry,
    Retry,
    Runtime,
    Succeeded,
    TaskContext,
)
from flowstead.engine.slots import Slots
from flowstead.executors.command import CommandExecutor
from flowstead.model.flow import FlowKey, Json
from flowstead.model.task import Launch
from flowstead.model.update import StoredUpdate
from flowstead.testing import CALM, Faults, ManualClock, RecordingNotifier, Schedule, Simulation
from tests.executors.stage import Attempt
from tests.faulty_store import NOT_WRITTEN, UNKNOWN, FaultyStore, new_flow, running, settle, soon
from tests.runtime.waiting import registry_of
from tests.unit.given import a_launched

STEPS = 24
TURNS = 16
SEEDS = 12
DELAY = 0.01
LONG = 60.0
KEY = {"thread": 1}


def flows_of(runtime: Runtime):
    return runtime.tasks.flow.bind_session(session_key="agent:a")


async def let_others_run(steps: int) -> None:
    for _ in range(steps):
        await anyio.lowlevel.checkpoint()


def slow_world(seed: int) -> Simulation:
    """A world whose disk takes its time, another for each read and write."""
    return Simulation(Schedule(seed=seed, faults=Faults(delay=DELAY)))


@pytest.mark.parametrize("turn", range(TURNS))
def test_whoever_waits_for_the_end_of_a_flow_is_told_whenever_it_comes(turn: int) -> None:
    async def host(runtime: Runtime) -> list[str]:
        flows, told = flows_of(runtime), []
        flow = await flows.create_managed(controller_id="shop/triage", goal="end")

        async def wait() -> None:
            await anyio.sleep(turn * DELAY / 4)
            told.append((await flows.result(flow.flow_id)).status)

        with anyio.move_on_after(LONG):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await flows.finish(flow_id=flow.flow_id, expected_revision=0)
        return told

    for seed in range(SEEDS):
        with slow_world(seed) as world:
            assert world.run(host) == ["succeeded"], f"seed {seed}"


@pytest.mark.parametrize("turn", range(TURNS))
def test_whoever_waits_for_the_end_of_a_child_is_told_whenever_it_comes(turn: int) -> None:
    async def host(runtime: Runtime) -> list[object]:
        flows, told = flows_of(runtime), []
        flow = await flows.create_managed(controller_id="shop/triage", goal="end")
        made = await flows.run_task(flow_id=flow.flow_id, task="elsewhere", runtime="cli")

        async def wait() -> None:
            await anyio.sleep(turn * DELAY / 4)
            told.append(await flows.wait_task(made.task.task_id))

        with anyio.move_on_after(LONG):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await flows.complete_task(made.task.task_id)
        return told

    for seed in range(SEEDS):
        with slow_world(seed) as world:
            assert world.run(host) == [Succeeded()], f"seed {seed}"


def test_whoever_waits_for_ends_is_told_of_those_whose_commit_was_in_doubt() -> None:
    async def host(runtime: Runtime) -> list[object]:
        flows, told = flows_of(runtime), []
        flow = await flows.create_managed(controller_id="shop/triage", goal="end")
        made = await flows.run_task(flow_id=flow.flow_id, task="elsewhere", runtime="cli")

        async def wait_for_both() -> None:
            told.append(await flows.wait_task(made.task.task_id))
            told.append((await flows.result(flow.flow_id)).status)

        async def end_both() -> None:
            world.disk.faults = Faults(fail_after=1.0)
            with pytest.raises(OutcomeUnknown):
                await flows.complete_task(made.task.task_id)
            await let_others_run(STEPS)
            ended = await flows.finish(flow_id=flow.flow_id, expected_revision=0)
            assert ended.code == "outcome_unknown"
            world.disk.faults = CALM

        with anyio.move_on_after(LONG):
            async with anyio.create_task_group() as group:
                group.start_soon(wait_for_both)
                await let_others_run(STEPS)
                await end_both()
        return told

    with Simulation(1) as world:
        assert world.run(host) == [Succeeded(), "succeeded"]
        assert world.disk.fired["fail_after"] == 2


def test_the_late_report_of_an_earlier_attempt_is_not_taken_for_the_present_ones_end() -> None:
    registry = Registry()

    @registry.task(name="flaky", retry=Retry(max_attempts=2, initial=0.3, jitter=0.0))
    async def flaky(context: TaskContext, given: Json) -> Json:
        if context.attempt == 1:
            # Its end is on disk, but nobody knows: it will be reported again, and the retry is due before.
            world.disk.faults = Faults(fail_after=1.0)
            raise ValueError("the first time")
        await anyio.sleep(5.0)
        return context.attempt

    async def host(runtime: Runtime) -> object:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="retry")
        made = await flows.run_task(flow_id=flow.flow_id, task="try", run="flaky")
        await anyio.sleep(0.2)
        world.disk.faults = CALM
        await anyio.sleep(0.2)
        # Somebody else's call brings the flow back before the end is reported again, and the retry is due.
        await flows.update(flow_id=flow.flow_id, expected_revision=0, current_step="on")
        return await flows.wait_task(made.task.task_id)

    with Simulation(1) as world:
        assert world.run(host, registry=registry) == Succeeded(2)
        assert world.disk.fired["fail_after"] == 1


def test_a_child_whose_start_was_in_doubt_is_run_although_nobody_calls() -> None:
    registry, ran = Registry(), []

    @registry.task(name="work")
    async def work(context: TaskContext, given: Json) -> None:
        ran.append(context.task_id)

    async def host(runtime: Runtime) -> list[str]:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="start")
        world.disk.faults = Faults(fail_after=1.0)
        made = await flows.run_task(flow_id=flow.flow_id, task="do it", run="work")
        assert made.code == "outcome_unknown"
        world.disk.faults = CALM
        await anyio.sleep(LONG)
        return [task.status for task in await flows.list_tasks(flow.flow_id)]

    with Simulation(1) as world:
        assert world.run(host, registry=registry) == ["succeeded"]
        assert world.disk.fired["fail_after"] == 1
        assert len(ran) == 1


def test_a_child_that_could_not_be_added_can_be_added_again() -> None:
    async def host(runtime: Runtime) -> list[bool]:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="add")
        child = {"flow_id": flow.flow_id, "task": "do it", "runtime": "cli", "run_id": "r1"}
        world.disk.faults = Faults(fail_before=1.0)
        refused = await flows.run_task(**child)
        assert refused.code == "persist_failed"
        world.disk.faults = CALM
        made = await flows.run_task(**child)
        assert made.created
        return [task.task_id == made.task.task_id for task in await flows.list_tasks(flow.flow_id)]

    with Simulation(1) as world:
        assert world.run(host) == [True]
        assert world.disk.fired["fail_before"] == 1


def test_a_child_that_could_not_be_added_keeps_no_slot_from_others() -> None:
    registry, ran = Registry(), list[str]()

    @registry.task(name="work")
    async def work(context: TaskContext, given: Json) -> None:
        ran.append(context.task_id)

    async def host(runtime: Runtime) -> None:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="add")
        world.disk.faults = Faults(fail_before=1.0)
        refused = await flows.run_task(flow_id=flow.flow_id, task="never", run="work")
        assert refused.code == "persist_failed"
        world.disk.faults = CALM
        await flows.run_task(flow_id=flow.flow_id, task="do it", run="work")
        await anyio.sleep(LONG)

    with Simulation(1) as world:
        world.run(host, registry=registry, limits=Limits(running_in_all=1))
        assert world.disk.fired["fail_before"] == 1
        assert len(ran) == 1


def test_a_flow_in_doubt_stays_in_memory_until_its_slots_are_settled() -> None:
    registry, ran = Registry(), list[Json]()

    @registry.task(name="work")
    async def work(context: TaskContext, given: Json) -> None:
        ran.append(given)

    async def host(runtime: Runtime) -> None:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="add")
        world.disk.faults = Faults(fail_unknown=1.0)
        made = await flows.run_task(flow_id=flow.flow_id, task="perhaps", run="work")
        assert made.code == "outcome_unknown"
        world.disk.faults = CALM
        await anyio.sleep(LONG)
        await flows.run_task(flow_id=flow.flow_id, task="do it", run="work", input_json="this")
        await anyio.sleep(LONG)

    for seed in range(SEEDS):
        with Simulation(seed) as world:
            limits = Limits(running_in_all=1, idle_seconds=0.2)
            world.run(host, registry=registry, limits=limits)
            assert world.disk.fired["fail_unknown"] == 1
            assert ran[-1:] == ["this"], f"seed {seed}"
            ran.clear()


def test_a_late_child_whose_end_cannot_be_recorded_at_once_is_not_started_beside_itself() -> None:
    registry, begun = Registry(), list[int]()

    @registry.task(name="deaf", retry=Retry(max_attempts=3, jitter=0.0), timeout=1.0)
    async def deaf(context: TaskContext, given: Json) -> None:
        begun.append(context.attempt)
        until = asyncio.get_running_loop().time() + LONG / 2
        while asyncio.get_running_loop().time() < until:
            try:
                await anyio.sleep(1.0)
            except asyncio.CancelledError:
                continue

    async def host(runtime: Runtime) -> list[str | None]:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="give up")
        made = await flows.run_task(flow_id=flow.flow_id, task="never stop", run="deaf")
        await anyio.sleep(2.9)
        world.disk.faults = Faults(fail_before=1.0)
        await anyio.sleep(0.5)
        world.disk.faults = CALM
        # Somebody else's call brings the flow back before the end is reported again.
        await flows.update(flow_id=flow.flow_id, expected_revision=0, current_step="on")
        await anyio.sleep(LONG)
        [task] = await flows.list_tasks(flow.flow_id)
        assert task.task_id == made.task.task_id
        return [task.status, task.failure and task.failure.kind]

    with Simulation(1) as world:
        limits = Limits(kill_after=1.0, abandon_after=1.0)
        assert world.run(host, registry=registry, limits=limits) == ["timed_out", "abandoned"]
        assert world.disk.fired["fail_before"] >= 1
        assert begun == [1]


def test_a_retry_that_somebody_wants_now_does_not_wait_for_its_instant_after_a_restart() -> None:
    registry, begun = Registry(), list[int]()

    @registry.task(name="flaky", retry=Retry(initial=3600.0, max_delay=3600.0, jitter=0.0))
    async def flaky(context: TaskContext, given: Json) -> None:
        begun.append(context.attempt)
        if context.attempt == 1:
            raise ConnectionError("the first time")

    @registry.task(name="long")
    async def long(context: TaskContext, given: Json) -> None:
        await anyio.sleep(LONG)

    async def hurry(runtime: Runtime) -> None:
        flows = flows_of(runtime)
        flow = await flows.create_managed(controller_id="shop/triage", goal="hurry")
        made = await flows.run_task(flow_id=flow.flow_id, task="try", run="flaky")
        await anyio.sleep(1.0)
        await flows.run_task(flow_id=flow.flow_id, task="take the place", run="long")
        hurried = await flows.retry_task(made.task.task_id)
        assert hurried.retried
        assert begun == [1], "vacuous: there was room for it at once"

    async def look(runtime: Runtime) -> None:
        await anyio.sleep(2 * LONG)

    with Simulation(1) as world:
        for host in (hurry, look):
            world.run(host, registry=registry, limits=Limits(running_children=1))
        assert begun == [1, 2]


@pytest.mark.parametrize("interrupted", [False, True])
async def test_a_program_whose_stop_has_passed_unheard_is_not_begun(interrupted: bool) -> None:
    attempt = Attempt(
        interrupted=interrupted, is_stopped=lambda: True, spec=Command(["true"], stdin=None)
    )

    with pytest.raises(asyncio.CancelledError):
        await CommandExecutor().run(attempt.call)

    assert attempt.kills == [], "there was something to kill"


def test_of_two_slots_that_are_kept_for_a_flow_nobody_who_comes_by_takes_one() -> None:
    woken = list[FlowKey]()
    slots = Slots(2, {"narrow": 1}.get, woken.append)
    holder, waits, comes_by = (FlowKey("agent:a", flow) for flow in ("holder", "waits", "by"))

    def take(key: FlowKey, task_id: str) -> bool:
        return slots.take(key, a_launched(task_id, launch=Launch(function="narrow")))

    assert take(holder, "held")
    assert not take(waits, "patient")
    slots.turn_over(waits)
    slots.give_back("held")

    assert woken == [waits]
    assert not take(comes_by, "quick")
    assert take(waits, "patient")


async def pass_time(clock: ManualClock, *, seconds: int) -> None:
    for _ in range(seconds):
        clock.advance(1)
        await settle()


@pytest.mark.parametrize("unread", [0, 1])
async def test_a_signal_for_two_flows_of_which_one_cannot_be_loaded_just_now_wakes_neither(
    clock: ManualClock, unread: int
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), clock=clock) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows, "waits", state_json={"key": KEY}) for _ in range(2)]
        await pass_time(clock, seconds=30)
        assert runtime.statistics().flows_in_memory == 0
        [loaded] = [flow_id for flow_id in ids if flow_id != ids[unread]]
        flow = await flows.get(loaded)
        assert flow is not None and flow.status == "waiting"
        await flows.update(flow_id=loaded, expected_revision=flow.revision, current_step="on")
        store.fail_reads("load", NOT_WRITTEN)

        with pytest.raises(CommitFailed):
            await soon(flows.signal(payload=1, id="s-1", key=KEY))

        again = await soon(flows.signal(payload=2, id="s-1", key=KEY))
        assert sorted(again.flow_ids) == sorted(ids)
        for flow_id in ids:
            assert (await soon(flows.result(flow_id))).state_json == {"answered": 2}


async def test_a_controller_leaves_memory_also_where_nobody_could_say_that_it_is_parked(
    clock: ManualClock,
) -> None:
    store = FaultyStore()
    limits = Limits(park_seconds=5, idle_seconds=1)
    async with running(store, registry=registry_of(), clock=clock, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "waits", state_json={"key": KEY})
        await settle()
        before = store.attempts
        store.fail_commits(UNKNOWN, written=True)

        await pass_time(clock, seconds=30)

        assert store.attempts == before + 1
        assert [event.type for event in await flows.history(flow_id)].count("flow.parked") == 1
        assert runtime.statistics().flows_in_memory == 0
        await soon(flows.signal(payload=1, key=KEY))
        assert (await soon(flows.result(flow_id))).state_json == {"answered": 1}


async def test_a_wait_that_was_opened_although_nobody_knew_is_answered_by_what_was_kept_for_it(
    clock: ManualClock,
) -> None:
    store = FaultyStore()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        assert (await soon(flows.signal(payload=1, key=KEY))).kept
        flow_id = await new_flow(flows)
        store.fail_commits(UNKNOWN, written=True)
        waiting = flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json=KEY)
        assert (await soon(waiting)).code == "outcome_unknown"

        await pass_time(clock, seconds=3)

        flow = await flows.get(flow_id)
        assert flow is not None
        assert (flow.status, flow.revision) == ("queued", 2)


class FailingClock(ManualClock):
    """A clock that fails whoever asks it for the time when it has been asked so often."""

    left = 0

    def now(self) -> int:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError("the clock has stopped")
        return super().now()


async def test_a_signal_for_two_flows_of_which_one_cannot_decide_is_answered_and_may_come_again() -> (
    None
):
    refused = 0
    for moment in range(1, STEPS // 2):
        clock = FailingClock()
        async with running(FaultyStore(), registry=registry_of(), clock=clock) as runtime:
            flows = flows_of(runtime)
            ids = [await new_flow(flows, "waits", state_json={"key": KEY}) for _ in range(2)]
            await settle()
            clock.left = moment
            try:
                matched = (await soon(flows.signal(payload=1, id="s-1", key=KEY))).matched
            except ZeroDivisionError:
                refused += 1
                matched = 0
            clock.left = 0
            again = await soon(flows.signal(payload=2, id="s-1", key=KEY))

            assert (matched, again.matched) in [(2, 0), (0, 2)], moment
            assert set(again.flow_ids) <= set(ids)
    assert refused > 3, "vacuous: hardly anything failed"


class SlowPages(FaultyStore):
    """A store that hands out what is due when it is told to, as it was when it was asked for."""

    gate: asyncio.Event | None = None

    async def list_updates_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        page = await super().list_updates_due(until=until, limit=limit)
        if self.gate is not None:
            await self.gate.wait()
        return page


async def test_an_update_whose_delivery_comes_back_while_a_page_is_read_is_not_sent_again(
    clock: ManualClock,
) -> None:
    store, channel = SlowPages(), RecordingNotifier()
    channel.hold()
    async with running(store, clock=clock, notifier=channel) as runtime:
        flows = flows_of(runtime)
        first, second = await new_flow(flows), await new_flow(flows)
        await flows.finish(flow_id=first, expected_revision=0)
        await settle()
        assert [update.flow_id for update in channel.updates] == [first]
        gate = store.gate = asyncio.Event()
        await flows.finish(flow_id=second, expected_revision=0)
        await settle()

        channel.release()
        await settle()
        gate.set()
        await settle()

        assert [update.flow_id for update in channel.updates] == [first, second]


async def test_a_flow_that_takes_a_signal_for_two_and_a_message_in_one_turn_is_written_with_both() -> (
    None
):
    store = FaultyStore()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows, "waits", state_json={"key": KEY}) for _ in range(2)]
        await settle()
        flow = await flows.get(ids[0])
        assert flow is not None
        store.hold()
        changing = flows.update(flow_id=ids[0], expected_revision=flow.revision, current_step="on")
        busy = asyncio.create_task(changing)
        await settle()
        telling = asyncio.create_task(flows.tell(ids[0], "word", id="m-1"))
        sending = asyncio.create_task(flows.signal(payload=1, id="s-1", key=KEY))
        await settle()
        store.release()

        assert (await soon(sending)).matched == 2
        assert (await soon(telling)).kept
        assert (await soon(busy)).applied
        for again in (flows.tell(ids[0], "word", id="m-1"), flows.signal(id="s-1", key=KEY)):
            assert (await soon(again)).code == "duplicate"
