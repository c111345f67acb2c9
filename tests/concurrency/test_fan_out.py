"""Steps beside their controller: started, gathered, taken as they end, raced, and replaced when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from flowstead import (
    Cancelled,
    CancelPending,
    ChildCancelled,
    ChildFailed,
    ChildTimedOut,
    Failed,
    FlowContext,
    InvalidState,
    Limits,
    Lost,
    Registry,
    Retry,
    RuntimeClosed,
    SessionFlows,
    Step,
    Succeeded,
    TaskContext,
    TimedOut,
)
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock
from tests.faulty_store import (
    NOT_WRITTEN,
    FaultyStore,
    flows_of,
    holds_nothing,
    new_flow,
    running,
    settle,
    soon,
)

Controller = Callable[[FlowContext], Awaitable[Any]]


class Hands:
    """Children that end when, and how, the test says; and who was begun, and who was stopped."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.begun: list[str] = []
        self.stopped: list[str] = []
        self.registry = Registry()
        self.registry.task(name="work")(self.work)

    async def work(self, ctx: TaskContext, given: Any) -> Any:
        name = ctx.run_id or ""
        self.begun.append(name)
        try:
            await self.gate(name).wait()
        except asyncio.CancelledError:
            self.stopped.append(name)
            raise
        if given == "bad":
            raise ValueError(name)
        return name

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def end(self, *names: str) -> None:
        """Let children end, one after another, each end in a commit of its own."""
        for name in names:
            self.gate(name).set()
            await settle()

    def drive(self, controller: Controller) -> Registry:
        """The registry with this controller."""
        self.registry.controller("c")(controller)
        return self.registry


@pytest.fixture
def hands() -> Hands:
    return Hands()


async def start_all(flow: FlowContext, *names: str, bad: str = "") -> list[Step]:
    """One step for each name; those whose name is in `bad` will fail."""
    return [
        await flow.start("work", "bad" if name in bad.split() else None, name=name)
        for name in names
    ]


async def statuses(flows: SessionFlows, flow_id: str) -> dict[str | None, str]:
    return {task.run_id: task.status.value for task in await flows.list_tasks(flow_id)}


# ---- start, gather --------------------------------------------------------------------------------


async def test_steps_run_side_by_side_and_are_gathered_in_the_order_given(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        a, b, c = await start_all(flow, "a", "b", "c")
        await flow.update(state_json=await flow.gather(c, a, b))

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        assert hands.begun == ["a", "b", "c"]

        await hands.end("b", "c", "a")

        assert (await soon(flows.result(flow_id))).state_json == ["c", "a", "b"]
        await settle()
        assert holds_nothing(runtime)


async def test_a_started_step_is_on_record_and_collected_whenever_the_controller_likes(
    hands: Hands,
):
    async def controller(flow: FlowContext) -> None:
        [early] = await start_all(flow, "early")
        other = await flow.run("work", name="other")
        await flow.update(state_json=[other, await early.result(), await early.result()])
        assert await early.outcome() == Succeeded("early")

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        assert await statuses(flows, flow_id) == {"early": "running", "other": "running"}

        await hands.end("early", "other")

        assert (await soon(flows.result(flow_id))).state_json == ["other", "early", "early"]


async def test_a_step_started_twice_is_the_same_child(hands: Hands):
    seen: list[bool] = []

    async def controller(flow: FlowContext) -> None:
        [running_already] = await start_all(flow, "a")
        [again] = await start_all(flow, "a")
        result = await again.result()
        [ended_already] = await start_all(flow, "a")
        seen.append(running_already == again == ended_already)
        seen.append(len({running_already, again, ended_already}) == 1)
        seen.append(running_already != "a")
        assert "'a'" in repr(again)
        assert again.task_id in repr(again)
        order = [step async for step in flow.as_completed([again, ended_already])]
        await flow.update(state_json=[result, await ended_already.result(), len(order)])

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("a")

        assert (await soon(flows.result(flow_id))).state_json == ["a", "a", 1]
        assert (hands.begun, seen) == (["a"], [True, True, True])


async def test_the_same_child_counts_once_among_the_winners(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "a", "b")
        with pytest.raises(ValueError, match="from 1 to 2"):
            await flow.first(steps, count=3)
        await flow.update(state_json=[step.name for step in await flow.first(steps, count=2)])

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("a", "b")

        assert (await soon(flows.result(flow_id))).state_json == ["a", "b"]


async def test_unnamed_steps_are_named_after_their_function_and_a_counter(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        steps = [await flow.start(hands.work), await flow.start("work"), await flow.start(bare, 3)]
        await flow.update(state_json=[step.name for step in steps])
        await flow.gather(*steps)

    async def bare(ctx: TaskContext, given: int) -> int:
        return given

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("work", "work#2")

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", ["work", "work#2", "bare"])
        await settle()
        assert holds_nothing(runtime)


async def test_partial_results_are_had_as_outcomes_and_the_first_failure_in_order_is_raised(
    hands: Hands, clock: ManualClock
):
    async def controller(flow: FlowContext) -> None:
        good, bad, stopped, late = (
            *(await start_all(flow, "good", "bad", "stopped", bad="bad")),
            await flow.start("work", name="late", timeout=5),
        )
        await stopped.cancel()
        outcomes = await flow.gather(good, bad, stopped, late, return_outcomes=True)
        assert outcomes[0] == Succeeded("good")
        assert [type(outcome) for outcome in outcomes[1:]] == [Failed, Cancelled, TimedOut]
        with pytest.raises(ChildTimedOut):
            await flow.gather(good, late, bad)
        with pytest.raises(ChildFailed, match="bad"):
            await bad.result()
        with pytest.raises(ChildCancelled):
            await stopped.result()
        await bad.cancel()
        assert isinstance(await bad.outcome(), Failed)
        await flow.update(state_json=await flow.gather())

    async with running(registry=hands.drive(controller), clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("good", "bad")
        clock.advance(5)

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", []), ended.failure
        assert hands.stopped == ["stopped", "late"]
        await settle()
        assert holds_nothing(runtime)


async def test_an_input_json_cannot_hold_is_refused_and_nothing_begins(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        with pytest.raises(InvalidState):
            await flow.start("work", object())
        with pytest.raises(ValueError, match="nobody"):
            await flow.start("nobody")
        with pytest.raises(ValueError, match="nobody"):
            await flow.run("work", fallback=["nobody"])

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert await flows.list_tasks(flow_id) == []


async def test_steps_nobody_collects_end_with_the_flow(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        await start_all(flow, "a", "b")

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        await settle()

        assert await statuses(flows, flow_id) == {"a": "cancelled", "b": "cancelled"}
        assert holds_nothing(runtime)


# ---- as they complete ------------------------------------------------------------------------------


async def told_in_order(flow: FlowContext, *names: str) -> list[str]:
    """Start the steps in this order, and name them as they end."""
    steps = await start_all(flow, *names)
    return [step.name async for step in flow.as_completed(steps)]


async def test_steps_are_given_as_soon_as_they_end_in_the_order_of_their_ends(hands: Hands):
    told: list[str] = []

    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b", "c")
        async for step in flow.as_completed(steps):
            told.append(step.name)

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        for number, name in enumerate(["c", "a", "b"], start=1):
            await hands.end(name)
            assert told == ["c", "a", "b"][:number]

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        await settle()
        assert holds_nothing(runtime)


async def test_no_steps_are_completed_at_once(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        await flow.update(state_json=[step.name async for step in flow.as_completed([])])

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert (ended.status, ended.state_json) == ("succeeded", [])


class Twice:
    """A controller that is run, dies with its process, and is run again; what it was told each time."""

    def __init__(self, hands: Hands, ordered: Callable[[FlowContext], Awaitable[Any]]) -> None:
        self.hands = hands
        self.told: list[Any] = []
        self._ordered = ordered

    async def controller(self, flow: FlowContext) -> None:
        self.told.append(await self._ordered(flow))
        await self.hands.gate("over").wait()

    async def play(self, clock: ManualClock, during: Callable[[], Awaitable[None]]) -> list[Any]:
        """Let `during` happen to the first run; answer what both runs were told."""
        store, registry = MemoryStore(), self.hands.drive(self.controller)
        async with running(store, registry=registry, clock=clock) as first:
            flow_id = await new_flow(flows_of(first), "c")
            await settle()
            await during()
            await settle()
        async with running(MemoryStore(store.tables), registry=registry, clock=clock) as second:
            await settle()
            await self.hands.end("over")
            assert (await soon(flows_of(second).result(flow_id))).status == "succeeded"
            await settle()
            assert holds_nothing(second)
        assert len(self.told) == 2, "vacuous: it did not run twice"
        return self.told


@pytest.mark.parametrize("pause", [0, 0.001], ids=["in one millisecond", "apart"])
async def test_the_order_of_ends_is_the_same_when_the_controller_is_run_again(
    hands: Hands, clock: ManualClock, pause: float
):
    twice = Twice(hands, lambda flow: told_in_order(flow, "a", "b", "c", "d"))

    async def in_an_order_of_their_own() -> None:
        for name in ["c", "a", "d", "b"]:
            await hands.end(name)
            clock.advance(pause)

    assert await twice.play(clock, in_an_order_of_their_own) == [["c", "a", "d", "b"]] * 2


async def test_the_order_is_the_same_though_the_clock_was_set_back_between_two_ends(
    hands: Hands, clock: ManualClock
):
    twice = Twice(hands, lambda flow: told_in_order(flow, "a", "b"))

    async def with_a_clock_set_back() -> None:
        clock.advance(100)
        await hands.end("b")
        clock.set(clock.now() - 50_000)
        await hands.end("a")

    assert await twice.play(clock, with_a_clock_set_back) == [["b", "a"]] * 2


async def test_the_order_is_the_same_when_several_have_ended_in_one_commit(
    hands: Hands, clock: ManualClock
):
    twice = Twice(hands, lambda flow: told_in_order(flow, "a", "b", "c"))

    async def at_once() -> None:
        for name in ["b", "c", "a"]:
            hands.gate(name).set()

    first, second = await twice.play(clock, at_once)

    assert first == second
    assert sorted(first) == ["a", "b", "c"]


async def test_one_that_ended_while_others_were_being_started_keeps_its_place(
    hands: Hands, clock: ManualClock
):
    async def ordered(flow: FlowContext) -> list[str]:
        [a] = await start_all(flow, "a")
        [b] = await start_all(flow, "b")
        await flow.run("work", name="meanwhile")
        [b_again] = await start_all(flow, "b")  # has ended by now, and is known by its record
        assert b == b_again
        return [step.name async for step in flow.as_completed([b_again, a])]

    async def a_before_b() -> None:
        await hands.end("a", "b", "meanwhile")

    assert await Twice(hands, ordered).play(clock, a_before_b) == [["a", "b"]] * 2


async def test_one_whose_result_was_asked_for_before_keeps_its_place(
    hands: Hands, clock: ManualClock
):
    async def ordered(flow: FlowContext) -> list[str]:
        a, b = await start_all(flow, "a", "b")
        await b.result()
        return [step.name async for step in flow.as_completed([b, a])]

    async def a_before_b() -> None:
        await hands.end("a", "b")

    assert await Twice(hands, ordered).play(clock, a_before_b) == [["a", "b"]] * 2


async def test_a_wait_for_the_next_that_is_cancelled_loses_none(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        completed = flow.as_completed(await start_all(flow, "a", "b"))
        with anyio.CancelScope() as scope:
            async with asyncio.TaskGroup() as group:
                group.create_task(cancel_when(hands.gate("now"), scope))
                await anext(completed)
        assert scope.cancelled_caught
        hands.gate("cancelled").set()
        await flow.update(state_json=[step.name async for step in completed])

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("now")
        assert hands.gate("cancelled").is_set()
        assert (hands.stopped, hands.begun) == ([], ["a", "b"])
        await hands.end("b", "a")

        assert (await soon(flows.result(flow_id))).state_json == ["b", "a"]


async def cancel_when(event: asyncio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def test_two_who_share_the_steps_are_given_each_once(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        completed = flow.as_completed(await start_all(flow, "a", "b", "c"))

        async def take() -> list[str]:
            return [step.name async for step in completed]

        ones, others = await asyncio.gather(take(), take())
        await flow.update(state_json=sorted(ones + others))

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("b", "a", "c")

        assert (await soon(flows.result(flow_id))).state_json == ["a", "b", "c"]


# ---- races ----------------------------------------------------------------------------------------


async def test_the_first_to_succeed_wins_and_the_losers_are_stopped_and_recorded_as_cancelled(
    hands: Hands,
):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "slow", "broken", "quick", "slower", bad="broken")
        [winner] = await flow.first(steps)
        await flow.update(state_json=await winner.result())
        await flow.gather(*steps, return_outcomes=True)

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("broken", "quick")

        assert (await soon(flows.result(flow_id))).state_json == "quick"
        assert sorted(hands.stopped) == ["slow", "slower"]
        assert await statuses(flows, flow_id) == {
            "slow": "cancelled",
            "broken": "failed",
            "quick": "succeeded",
            "slower": "cancelled",
        }
        await settle()
        assert holds_nothing(runtime)


async def test_losers_that_stand_in_line_are_never_begun(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b", "c", "d", "e", "f")
        [winner] = await flow.first(steps)
        await flow.gather(*steps, return_outcomes=True)
        await flow.update(state_json=winner.name)

    limits = Limits(running_children=2)
    async with running(registry=hands.drive(controller), limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        assert hands.begun == ["a", "b"]

        await hands.end("b")

        assert (await soon(flows.result(flow_id))).state_json == "b"
        # One took the winner's place before anybody knew; nobody took that of a loser.
        assert hands.begun == ["a", "b", "c"]
        assert set((await statuses(flows, flow_id)).values()) == {"succeeded", "cancelled"}


async def test_the_first_k_of_n_come_in_the_order_of_their_ends(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b", "c", "d", bad="b")
        winners = await flow.first(steps, count=2)
        await flow.update(state_json=await flow.gather(*winners))

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("d", "b")
        assert hands.stopped == []
        await hands.end("a")

        assert (await soon(flows.result(flow_id))).state_json == ["d", "a"]
        assert hands.stopped == ["c"]


async def test_when_fewer_can_succeed_than_wanted_the_last_failure_is_raised_and_the_rest_stopped(
    hands: Hands,
):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b", "c", "d", bad="b c")
        with pytest.raises(ChildFailed, match="c") as failed:
            await flow.first(steps, count=3)
        await flow.update(state_json=failed.value.run_id)
        await flow.gather(*steps, return_outcomes=True)

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("a", "b")
        assert hands.stopped == []
        await hands.end("c")

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", "c"), ended.failure
        assert hands.stopped == ["d"]


@pytest.mark.parametrize("count", [0, -1, 3])
async def test_a_count_that_makes_no_sense_is_a_value_error_and_nobody_is_stopped(
    hands: Hands, count: int
):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b")
        with pytest.raises(ValueError, match="count"):
            await flow.first(steps, count=count)
        with pytest.raises(ValueError, match="count"):
            await flow.first([])
        with pytest.raises(TypeError, match="count"):
            await flow.first(steps, count="1")  # type: ignore[arg-type]
        await flow.update(state_json=await flow.gather(*steps))

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("a", "b")

        assert (await soon(flows.result(flow_id))).state_json == ["a", "b"]


async def test_the_winners_are_the_same_when_the_controller_is_run_again(
    hands: Hands, clock: ManualClock
):
    async def raced(flow: FlowContext) -> list[str]:
        steps = await start_all(flow, "a", "b", "c", "d")
        return [step.name for step in await flow.first(steps, count=2)]

    async def in_one_millisecond() -> None:
        await hands.end("c", "b", "a")

    assert await Twice(hands, raced).play(clock, in_one_millisecond) == [["c", "b"]] * 2
    assert hands.stopped == ["d", "a"]
    assert "d" not in hands.begun[4:]


async def test_cancelling_the_wait_for_winners_stops_nobody(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b")
        with anyio.CancelScope() as scope:
            async with asyncio.TaskGroup() as group:
                group.create_task(cancel_when(hands.gate("now"), scope))
                await flow.first(steps)
        assert scope.cancelled_caught
        await flow.update(state_json=await flow.gather(*steps))

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("now")
        assert hands.stopped == []
        await hands.end("b", "a")

        assert (await soon(flows.result(flow_id))).state_json == ["a", "b"]


async def test_runners_stopped_by_shutdown_are_not_cancelled_and_race_on_in_the_next_process(
    hands: Hands,
):
    store = MemoryStore()

    async def controller(flow: FlowContext) -> None:
        [winner] = await flow.first(await start_all(flow, "a", "b"))
        await flow.update(state_json=await winner.result())

    registry = hands.drive(controller)
    async with running(store, registry=registry) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()
    assert sorted(hands.stopped) == ["a", "b"]

    async with running(MemoryStore(store.tables), registry=registry) as second:
        flows = flows_of(second)
        await settle()
        assert await statuses(flows, flow_id) == {"a": "running", "b": "running"}

        await hands.end("b")

        assert (await soon(flows.result(flow_id))).state_json == "b"
        await settle()
        assert await statuses(flows, flow_id) == {"a": "cancelled", "b": "succeeded"}
        assert [task.attempt for task in await flows.list_tasks(flow_id)] == [1, 1]


async def test_a_store_that_cannot_say_whether_a_loser_is_stopped_is_asked_again(
    hands: Hands, clock: ManualClock
):
    store = FaultyStore()

    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b", "c")
        await steps[0].result()
        if hands.gate("fails").is_set():
            hands.gate("fails").clear()
            store.fail_commits(NOT_WRITTEN)
        [winner] = await flow.first(steps)
        await flow.update(state_json=winner.name)

    limits = Limits(running_children=1)
    registry = hands.drive(controller)
    async with running(store, registry=registry, clock=clock, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        hands.gate("fails").set()

        await hands.end("a")
        for _ in range(3):
            await settle()
            clock.advance(2)

        assert (await soon(flows.result(flow_id))).state_json == "a"
        assert set((await statuses(flows, flow_id)).values()) == {"succeeded", "cancelled"}
        assert not hands.gate("fails").is_set(), "vacuous: nothing failed"


async def test_a_loser_that_fails_while_its_stop_waits_for_the_disk_is_not_tried_again(
    hands: Hands, clock: ManualClock
):
    store = FaultyStore()

    async def controller(flow: FlowContext) -> None:
        step = await flow.start("work", "bad", name="a", retry=Retry(max_attempts=2, initial=1))
        await hands.gate("now").wait()
        # In one turn, so that the stop is carried out when the change is on disk.
        await asyncio.gather(flow.update(state_json="changed"), step.cancel())
        await step.outcome()

    async with running(store, registry=hands.drive(controller), clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        store.hold()
        hands.gate("now").set()
        await soon(store.wait_held())

        await hands.end("a")
        store.release()
        await settle()
        clock.advance(2)

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert hands.begun == ["a"]


# ---- fallbacks ------------------------------------------------------------------------------------


class Chain:
    """A primary that ends as it is told to, and fallbacks; and what ran, in order."""

    def __init__(self, primary: Callable[[], Awaitable[Any]], **policy: Any) -> None:
        self.ran: list[str] = []
        self.registry = Registry()

        @self.registry.task(**policy)
        async def primary_task(ctx: TaskContext, given: Any) -> Any:
            self.ran.append(f"primary {ctx.attempt}")
            return await primary()

        @self.registry.task
        async def broken(ctx: TaskContext, given: Any) -> Any:
            self.ran.append("broken")
            raise ValueError("broken too")

        @self.registry.task
        async def spare(ctx: TaskContext, given: Any) -> Any:
            self.ran.append("spare")
            return f"spare of {given}"

    def drive(self, *fallback: str) -> Registry:
        @self.registry.controller("c")
        async def drive(flow: FlowContext) -> None:
            result = await flow.run("primary_task", "x", name="edit", fallback=fallback)
            await flow.update(state_json=result)

        return self.registry


async def fail() -> None:
    raise ValueError("no")


async def hang() -> None:
    await asyncio.Event().wait()


async def test_a_primary_that_fails_for_good_is_replaced_and_both_are_in_the_history(
    clock: ManualClock,
):
    chain = Chain(fail, retry=Retry(max_attempts=2, initial=1))
    async with running(registry=chain.drive("broken", "spare"), clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        assert chain.ran == ["primary 1"]

        clock.advance(2)

        assert (await soon(flows.result(flow_id))).state_json == "spare of x"
        assert chain.ran == ["primary 1", "primary 2", "broken", "spare"]
        assert await statuses(flows, flow_id) == {
            "edit": "failed",
            "edit/fallback-1": "failed",
            "edit/fallback-2": "succeeded",
        }
        ends = [e.changed["status"] for e in await flows.history(flow_id) if e.type == "task.ended"]
        assert ends == ["failed", "failed", "succeeded"]
        await settle()
        assert holds_nothing(runtime)


async def test_a_primary_that_succeeds_is_not_replaced():
    async def well() -> str:
        return "primary"

    chain = Chain(well)
    async with running(registry=chain.drive("spare")) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert (ended.state_json, chain.ran) == ("primary", ["primary 1"])


async def test_a_primary_that_times_out_is_replaced(clock: ManualClock):
    chain = Chain(hang, timeout=5)
    async with running(registry=chain.drive("spare"), clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        clock.advance(5)

        assert (await soon(flows.result(flow_id))).state_json == "spare of x"
        assert (await statuses(flows, flow_id))["edit"] == "timed_out"


async def test_a_primary_that_was_lost_with_its_process_is_replaced():
    store, chain = MemoryStore(), Chain(hang, idempotent=False)
    registry = chain.drive("spare")
    async with running(store, registry=registry) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()
        assert chain.ran == ["primary 1"]

        crashed = MemoryStore(store.tables)
        async with running(crashed, registry=registry, takeover=True) as second:
            flows = flows_of(second)

            assert (await soon(flows.result(flow_id))).state_json == "spare of x"
            assert chain.ran == ["primary 1", "spare"]
            assert (await statuses(flows, flow_id))["edit"] == "lost"
            [lost, _] = await flows.list_tasks(flow_id)
            assert isinstance(await flows.wait_task(lost.task_id), Lost)


async def test_a_primary_that_somebody_cancelled_is_not_replaced():
    chain = Chain(hang)
    async with running(registry=chain.drive("spare")) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        [task] = await flows.list_tasks(flow_id)

        await soon(flows.cancel_task(task.task_id))

        ended = await soon(flows.result(flow_id))
        assert (ended.status, chain.ran) == ("failed", ["primary 1"])
        assert ended.failure
        assert ended.failure.code == "ChildCancelled"


async def test_when_every_fallback_fails_the_last_failure_is_raised():
    chain = Chain(fail)
    async with running(registry=chain.drive("broken")) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert ended.status == "failed"
        assert ended.failure
        assert "broken too" in (ended.failure.message or "")


async def test_a_cancel_requested_while_the_primary_ran_keeps_its_fallback_from_beginning():
    go = asyncio.Event()

    async def fail_later() -> None:
        await go.wait()
        raise ValueError("no")

    chain = Chain(fail_later)
    async with running(registry=chain.drive("spare")) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await flows.request_cancel(flow_id=flow_id, expected_revision=1)
        go.set()

        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert chain.ran == ["primary 1"]


async def test_a_recorded_fallback_answers_after_a_restart_without_the_primary_being_tried_again():
    store, chain, over, told = MemoryStore(), Chain(fail), asyncio.Event(), []

    @chain.registry.controller("c")
    async def drive(flow: FlowContext) -> None:
        told.append(await flow.run("primary_task", "x", fallback=["spare"]))
        await over.wait()

    async with running(store, registry=chain.registry) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()
    over.set()
    async with running(MemoryStore(store.tables), registry=chain.registry) as second:
        assert (await soon(flows_of(second).result(flow_id))).status == "succeeded"

    assert told == ["spare of x"] * 2
    assert chain.ran == ["primary 1", "spare"]


# ---- cancels and closing --------------------------------------------------------------------------


async def test_after_a_cancel_was_requested_nothing_is_started_and_what_runs_can_be_had(
    hands: Hands,
):
    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b")
        await hands.gate("asked").wait()
        with pytest.raises(CancelPending):
            await flow.start("work", name="new")
        [again, _] = await start_all(flow, "a", "b")
        [winner] = await flow.first([*steps, again])
        await flow.finish(state_json=winner.name)

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        await flows.request_cancel(flow_id=flow_id, expected_revision=1)

        await hands.end("asked", "b")

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", "b"), ended.failure
        await settle()
        assert await statuses(flows, flow_id) == {"a": "cancelled", "b": "succeeded"}


async def test_a_cancel_pending_that_is_let_pass_ends_the_flow_as_cancelled(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        await hands.gate("asked").wait()
        await flow.start("work", name="new")

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        await flows.request_cancel(flow_id=flow_id, expected_revision=1)

        await hands.end("asked")

        ended = await soon(flows.result(flow_id))
        assert (ended.status, hands.begun) == ("cancelled", [])


WAITS: dict[str, Callable[[FlowContext, list[Step]], Awaitable[Any]]] = {
    "result": lambda flow, steps: steps[0].result(),
    "outcome": lambda flow, steps: steps[0].outcome(),
    "gather": lambda flow, steps: flow.gather(*steps, return_outcomes=True),
    "first": lambda flow, steps: flow.first(steps),
    "as_completed": lambda flow, steps: anext(aiter(flow.as_completed(steps))),
}


@pytest.mark.parametrize("wait", WAITS)
async def test_a_runtime_that_closes_while_steps_are_waited_for_leaves_the_flow_to_the_next(
    hands: Hands, wait: str
):
    store, entered = MemoryStore(), []

    async def controller(flow: FlowContext) -> None:
        entered.append(wait)
        await WAITS[wait](flow, await start_all(flow, "a", "b"))

    registry = hands.drive(controller)
    async with running(store, registry=registry) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()
        await soon(first.aclose())

    await hands.end("a", "b")
    async with running(MemoryStore(store.tables), registry=registry) as second:
        assert (await soon(flows_of(second).result(flow_id))).status == "succeeded"
        await settle()
        assert holds_nothing(second)
    assert entered == [wait] * 2


@pytest.mark.parametrize("wait", WAITS)
async def test_a_wait_in_a_task_that_outlives_its_controller_is_told_of_the_end_or_of_the_closing(
    hands: Hands, wait: str
):
    strays: list[asyncio.Task[Any]] = []

    async def controller(flow: FlowContext) -> None:
        steps = await start_all(flow, "a", "b")
        strays.append(asyncio.ensure_future(WAITS[wait](flow, steps)))
        await asyncio.Event().wait()

    async with running(registry=hands.drive(controller)) as runtime:
        await new_flow(flows_of(runtime), "c")
        await settle()
        await soon(runtime.aclose())
        await soon(asyncio.wait(strays))

    [stray] = strays
    error = stray.exception()
    assert isinstance(error, RuntimeClosed), error


async def test_leaving_the_steps_half_way_leaves_nothing_behind(hands: Hands):
    async def controller(flow: FlowContext) -> None:
        async for step in flow.as_completed(await start_all(flow, "a", "b")):
            await flow.update(state_json=step.name)
            break

    async with running(registry=hands.drive(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await hands.end("b")

        assert (await soon(flows.result(flow_id))).state_json == "b"
        await settle()
        assert holds_nothing(runtime)


async def test_a_single_name_as_fallback_is_misuse_and_says_so():
    async def drive(flow: FlowContext) -> None:
        await flow.run("work", fallback="other")

    registry = Registry()
    registry.controller("c")(drive)
    async with running(registry=registry) as runtime:
        flows = flows_of(runtime)

        end = await soon(flows.result(await new_flow(flows, "c")))

        assert end.status == "failed"
        assert end.failure
        assert "fallback must be a sequence" in str(end.failure.message)
