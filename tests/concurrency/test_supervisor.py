"""The supervisor: children that run, fail, hang and misbehave, each with exactly one outcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from flowstead import (
    Failed,
    Limits,
    Registry,
    Retry,
    SessionFlows,
    StoreUnusable,
    Succeeded,
    Task,
    TaskContext,
    TimedOut,
)
from flowstead.model.command import EndReport
from flowstead.model.flow import FlowKey
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
    turns,
)

Child = Callable[[TaskContext, Any], Awaitable[Any]]


async def launch(flows: SessionFlows, flow_id: str, run: Any, **given: Any) -> str:
    """A launched child, by its id."""
    made = await soon(flows.run_task(flow_id=flow_id, task="t", run=run, **given))
    return made.unwrap().task_id


async def task_of(flows: SessionFlows, task_id: str) -> Task:
    task = await flows.get_task(task_id)
    assert task is not None
    return task


async def ends_of(flows: SessionFlows, flow_id: str, task_id: str) -> list[str]:
    """The statuses a child was recorded to end with; one entry if all is well."""
    return [
        event.changed["status"]
        for event in await flows.history(flow_id)
        if event.task_id == task_id and event.type == "task.ended"
    ]


async def passes(ctx: TaskContext, given: Any) -> Any:
    return given


# ---- running ---------------------------------------------------------------------------------------


async def test_registered_named_and_bare_functions_run_and_their_results_are_kept():
    registry = Registry()
    registry.task(passes, name="registered")

    async def bare(ctx: TaskContext, given: dict[str, int]) -> int:
        return given["n"] + 1

    async with running(registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        tasks = [
            await launch(flows, flow_id, passes, input_json=[1]),
            await launch(flows, flow_id, "registered", input_json={"a": None}),
            await launch(flows, flow_id, bare, input_json={"n": 41}),
        ]

        outcomes = [await soon(flows.wait_task(task_id)) for task_id in tasks]
        assert outcomes == [Succeeded([1]), Succeeded({"a": None}), Succeeded(42)]
        stored = await task_of(flows, tasks[2])
        assert (stored.status, stored.attempt, stored.result_json) == ("succeeded", 1, 42)
        assert stored.ended_at
        await settle()
        assert holds_nothing(runtime)


async def test_a_child_without_input_is_given_none_and_may_return_nothing():
    got: list[object] = []

    async def child(ctx: TaskContext, given: object) -> None:
        got.append(given)

    async with running() as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), child)

        assert await soon(flows.wait_task(task_id)) == Succeeded(None)
        assert got == [None]


async def test_each_child_is_given_its_own_copy_of_its_own_input():
    seen: dict[str, Any] = {}

    async def child(ctx: TaskContext, given: dict[str, Any]) -> None:
        seen[ctx.run_id or ""] = dict(given)
        given["mine"] = ctx.run_id

    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        given = {"shared": True}
        tasks = [
            await launch(flows, flow_id, child, input_json=given, run_id=name) for name in "ab"
        ]
        for task_id in tasks:
            await soon(flows.wait_task(task_id))

        assert seen == {"a": {"shared": True}, "b": {"shared": True}}
        assert given == {"shared": True}
        assert [(await task_of(flows, i)).input_json for i in tasks] == [given, given]


async def test_a_context_says_which_child_it_is_and_when_its_time_is_up():
    clock, seen = ManualClock(), []

    async def child(ctx: TaskContext, given: object) -> None:
        seen.append((ctx.flow_id, ctx.task_id, ctx.run_id, ctx.attempt, ctx.deadline))

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        timed = await launch(flows, flow_id, child, run_id="r", timeout=2.5)
        untimed = await launch(flows, flow_id, child)
        await settle()

        now = clock.now()
        assert seen == [(flow_id, timed, "r", 1, now + 2500), (flow_id, untimed, None, 1, None)]


async def test_progress_and_heartbeat_are_durable_before_they_return():
    store, clock, said = FaultyStore(), ManualClock(), asyncio.Event()

    async def child(ctx: TaskContext, given: object) -> None:
        await ctx.progress("half way")
        said.set()
        await ctx.heartbeat()
        await asyncio.Event().wait()

    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child)
        store.hold()
        await store.wait_held()
        await settle()
        assert not said.is_set()
        clock.advance(1)

        store.release()
        await settle()

        task = await task_of(flows, task_id)
        assert (task.progress_summary, task.last_event_at) == ("half way", clock.now())
        flow = await flows.get(flow_id)
        assert flow
        assert flow.revision == 0


async def test_progress_that_could_not_be_written_is_not_passed_off_as_durable():
    store = FaultyStore()

    async def child(ctx: TaskContext, given: object) -> str:
        store.fail_commits(NOT_WRITTEN)
        await ctx.progress("lost")
        return "believed it"

    async with running(store, clock=ManualClock()) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), child)

        outcome = await soon(flows.wait_task(task_id))

        assert isinstance(outcome, Failed)
        assert outcome.failure.code == "CommitFailed"


# ---- misbehaving -----------------------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Hostile:
    """A value whose every method is a trap."""

    def __repr__(self) -> str:
        raise RuntimeError("trap")

    def __hash__(self) -> int:
        return 1

    def __len__(self) -> int:
        raise RuntimeError("trap")

    def __iter__(self) -> Any:
        raise SystemExit("trap")


class HostileDict(dict[str, Any]):
    def items(self) -> Any:
        raise KeyboardInterrupt

    def __len__(self) -> int:
        raise GeneratorExit


def nested_group(depth: int) -> BaseException:
    error: Exception = ValueError("inmost")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


RAISED = {
    "an exception": ValueError("bad"),
    "an exception without a message": KeyError(),
    "system exit": SystemExit(3),
    "keyboard interrupt": KeyboardInterrupt(),
    "generator exit": GeneratorExit(),
    "base exception": BaseException("base"),
    "stop iteration": StopIteration(1),
    "stop async iteration": StopAsyncIteration(),
    "cancelled error": asyncio.CancelledError("own"),
    "memory error": MemoryError(),
    "recursion error": RecursionError(),
    "timeout error": TimeoutError(),
    "unspeakable": Unspeakable(),
    "ten megabytes": ValueError("x" * 10_000_000),
    "control characters": ValueError("a\x00b\x1b[31m\ud800\n"),
    "a deep group": nested_group(200),
    "a base group": BaseExceptionGroup("group", [SystemExit(), KeyboardInterrupt()]),
    "end of stream": anyio.EndOfStream(),
}


@pytest.mark.parametrize("raised", RAISED.values(), ids=list(RAISED))
async def test_whatever_a_child_raises_is_one_failed_outcome_and_its_siblings_live(
    raised: BaseException,
):
    go = asyncio.Event()

    async def bad(ctx: TaskContext, given: object) -> None:
        raise raised

    async def good(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "unharmed"

    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id, other = await new_flow(flows), await new_flow(flows)
        siblings = [await launch(flows, i, good) for i in (flow_id, other)]
        bad_one = await launch(flows, flow_id, bad)

        outcome = await soon(flows.wait_task(bad_one))
        go.set()

        assert isinstance(outcome, Failed)
        assert len(outcome.failure.message or "") <= 500
        assert await ends_of(flows, flow_id, bad_one) == ["failed"]
        for sibling in siblings:
            assert await soon(flows.wait_task(sibling)) == Succeeded("unharmed")
        assert (await soon(flows.finish(flow_id=flow_id, expected_revision=0))).applied


async def returns_cyclic(ctx: TaskContext, given: object) -> object:
    cycle: list[object] = []
    cycle.append(cycle)
    return cycle


async def returns_deep(ctx: TaskContext, given: object) -> object:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    return deep


GARBAGE: dict[str, object] = {
    "an object": object(),
    "nan": float("nan"),
    "infinity": [float("inf")],
    "bytes": b"bytes",
    "a set": {1, 2},
    "keys that are no strings": {1: 2},
    "a lone surrogate": "\ud800",
    "a hidden surrogate": {"a": [{"\udfff": 1}]},
    "a hostile value": Hostile(),
    "a hostile key": {Hostile(): 1},
    "a hostile dict": HostileDict(a=1),
    "too much": "x" * 2_000_000,
    "too many": [0] * 2_000_000,
    "a coroutine function": passes,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
async def test_a_result_that_cannot_be_kept_is_a_failed_outcome(garbage: object):
    async def bad(ctx: TaskContext, given: object) -> object:
        return garbage

    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        bad_one = await launch(flows, flow_id, bad)
        good_one = await launch(flows, flow_id, passes, input_json=1)

        outcome = await soon(flows.wait_task(bad_one))

        assert isinstance(outcome, Failed)
        assert await soon(flows.wait_task(good_one)) == Succeeded(1)
        task = await task_of(flows, bad_one)
        assert (task.result_json, task.status) == (None, "failed")
        assert await soon(flows.wait_task(await launch(flows, flow_id, passes))) == Succeeded(None)


@pytest.mark.parametrize("child", [returns_cyclic, returns_deep])
async def test_a_result_that_does_not_end_is_a_failed_outcome(child: Child):
    async with running() as runtime:
        flows = flows_of(runtime)

        outcome = await soon(flows.wait_task(await launch(flows, await new_flow(flows), child)))

        assert isinstance(outcome, Failed)
        assert outcome.failure.kind == "bad_result"


async def test_a_text_of_a_subclass_is_kept_as_text_or_refused_but_never_harms_the_runtime():
    class Markup(str):
        pass

    async def child(ctx: TaskContext, given: object) -> object:
        return {"html": Markup("<b>")}

    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        outcome = await soon(flows.wait_task(await launch(flows, flow_id, child)))

        assert outcome == Succeeded({"html": "<b>"}) or isinstance(outcome, Failed)
        assert await soon(flows.wait_task(await launch(flows, flow_id, passes))) == Succeeded(None)


async def leaves_a_scope_open(ctx: TaskContext, given: object) -> str:
    anyio.CancelScope().__enter__()
    return "returned"


async def leaves_a_group_open(ctx: TaskContext, given: object) -> str:
    async def stream() -> AsyncIterator[int]:
        with anyio.CancelScope():
            yield 1
            yield 2

    KEPT.append(events := stream())
    return str(await events.__anext__())


KEPT: list[AsyncIterator[int]] = []


async def cancels_its_own_task(ctx: TaskContext, given: object) -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()
    await asyncio.sleep(0)


async def cancels_its_own_task_and_returns(ctx: TaskContext, given: object) -> str:
    task = asyncio.current_task()
    assert task
    task.cancel()
    return "returned"


async def cancels_its_own_task_and_swallows_it(ctx: TaskContext, given: object) -> str:
    try:
        await cancels_its_own_task(ctx, given)
    except asyncio.CancelledError:
        pass
    return "returned"


async def is_no_coroutine(ctx: TaskContext) -> None:
    """Takes too few arguments."""


def returns_without_awaiting(ctx: TaskContext, given: object) -> str:
    return "not awaitable"


MISBEHAVING = [
    leaves_a_scope_open,
    leaves_a_group_open,
    cancels_its_own_task,
    cancels_its_own_task_and_returns,
    cancels_its_own_task_and_swallows_it,
    is_no_coroutine,
    returns_without_awaiting,
]


@pytest.mark.parametrize("child", MISBEHAVING, ids=lambda child: child.__name__)
async def test_a_misbehaving_child_has_one_outcome_and_harms_nobody(child: Child):
    go = asyncio.Event()

    async def good(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "unharmed"

    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id, other = await new_flow(flows), await new_flow(flows)
        siblings = [await launch(flows, i, good) for i in (flow_id, other)]
        bad_one = await launch(flows, flow_id, child)

        await soon(flows.wait_task(bad_one))
        go.set()

        assert len(await ends_of(flows, flow_id, bad_one)) == 1
        for sibling in siblings:
            assert await soon(flows.wait_task(sibling)) == Succeeded("unharmed")
        after = await launch(flows, flow_id, passes, input_json="after")
        assert await soon(flows.wait_task(after)) == Succeeded("after")
        await settle()
        assert holds_nothing(runtime)


async def test_a_child_cancelled_by_a_stranger_fails_and_is_not_forgotten():
    seen: list[asyncio.Task[Any]] = []

    async def child(ctx: TaskContext, given: object) -> None:
        task = asyncio.current_task()
        assert task
        seen.append(task)
        await asyncio.Event().wait()

    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child)
        await settle()

        seen[0].cancel()

        assert isinstance(await soon(flows.wait_task(task_id)), Failed)
        assert await soon(flows.wait_task(await launch(flows, flow_id, passes))) == Succeeded(None)


async def test_a_hundred_bad_children_of_a_hundred_kinds_leave_a_runtime_that_works():
    kinds = list(RAISED.values())

    async def bad(ctx: TaskContext, given: int) -> None:
        await asyncio.sleep(0)
        raise kinds[given % len(kinds)]

    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        tasks = [await launch(flows, flow_id, bad, input_json=n) for n in range(100)]

        outcomes = [await soon(flows.wait_task(task_id)) for task_id in tasks]

        assert all(isinstance(outcome, Failed) for outcome in outcomes)
        summary = await flows.get_task_summary(flow_id)
        assert summary
        assert (summary.total, summary.active, summary.failures) == (100, 0, 100)
        await settle()
        assert holds_nothing(runtime)


# ---- time-outs -------------------------------------------------------------------------------------


async def test_a_child_is_stopped_at_its_deadline_and_not_before():
    clock, cleaned = ManualClock(), []

    async def child(ctx: TaskContext, given: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child, timeout=10)
        await settle()

        clock.advance(9.9)
        await settle()
        assert (await task_of(flows, task_id)).status == "running"
        clock.advance(0.1)

        outcome = await soon(flows.wait_task(task_id))
        assert isinstance(outcome, TimedOut)
        assert cleaned == [True]
        assert await ends_of(flows, flow_id, task_id) == ["timed_out"]


async def test_a_child_that_returns_after_its_deadline_has_timed_out_all_the_same():
    clock, let_go = ManualClock(), asyncio.Event()

    async def child(ctx: TaskContext, given: object) -> str:
        with anyio.CancelScope(shield=True):
            await let_go.wait()
        return "too late"

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child, timeout=1)
        await settle()
        clock.advance(1)
        await turns()
        assert (await task_of(flows, task_id)).status == "running"

        let_go.set()

        assert isinstance(await soon(flows.wait_task(task_id)), TimedOut)
        assert (await task_of(flows, task_id)).result_json is None


async def test_a_deadline_that_passes_while_the_result_is_being_written_changes_nothing():
    store, clock, go = FaultyStore(), ManualClock(), asyncio.Event()

    async def child(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "in time"

    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child, timeout=5)
        await settle()
        store.hold()
        go.set()
        await store.wait_held()

        clock.advance(10)
        await settle()
        store.release()

        assert await soon(flows.wait_task(task_id)) == Succeeded("in time")
        assert await ends_of(flows, flow_id, task_id) == ["succeeded"]


async def test_the_time_out_of_a_registered_task_holds_unless_another_is_given():
    clock, registry = ManualClock(), Registry()

    @registry.task(timeout=5)
    async def waits(ctx: TaskContext, given: object) -> None:
        await asyncio.Event().wait()

    async with running(clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        usual = await launch(flows, flow_id, waits)
        longer = await launch(flows, flow_id, waits, timeout=50)
        await settle()

        clock.advance(6)
        await settle()

        assert (await task_of(flows, usual)).status == "timed_out"
        assert (await task_of(flows, longer)).status == "running"


# ---- retries ---------------------------------------------------------------------------------------


class Flaky:
    """A child that fails a few times and then succeeds."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.attempts: list[int] = []

    async def run(self, ctx: TaskContext, given: object) -> str:
        self.attempts.append(ctx.attempt)
        if len(self.attempts) <= self.failures:
            raise ConnectionError(f"failure {len(self.attempts)}")
        return "at last"


async def test_a_failed_child_is_tried_again_after_growing_delays_kept_in_its_row():
    clock, flaky = ManualClock(), Flaky(3)
    retry = Retry(max_attempts=4, initial=1, factor=3, max_delay=5, jitter=0)

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, flaky.run, retry=retry)

        for attempt, delay in ((1, 1.0), (2, 3.0), (3, 5.0)):
            await settle()
            task = await task_of(flows, task_id)
            assert (task.status, task.attempt, task.max_attempts) == ("queued", attempt, 4)
            assert task.next_attempt_at == clock.now() + round(delay * 1000)
            assert task.failure
            assert task.failure.message == f"ConnectionError: failure {attempt}"
            clock.advance(delay - 0.001)
            await settle()
            assert len(flaky.attempts) == attempt
            clock.advance(0.001)

        assert await soon(flows.wait_task(task_id)) == Succeeded("at last")
        task = await task_of(flows, task_id)
        assert (task.attempt, task.next_attempt_at, task.failure) == (4, None, None)
        assert flaky.attempts == [1, 2, 3, 4]
        await settle()
        assert holds_nothing(runtime)


async def test_a_child_that_uses_up_its_attempts_fails_with_the_last_failure():
    clock, flaky = ManualClock(), Flaky(99)

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, flaky.run, retry=Retry(max_attempts=3))
        for _ in range(10):
            await settle()
            clock.advance(10)

        outcome = await soon(flows.wait_task(task_id))

        assert isinstance(outcome, Failed)
        assert outcome.failure.message == "ConnectionError: failure 3"
        assert flaky.attempts == [1, 2, 3]
        assert await ends_of(flows, flow_id, task_id) == ["failed"]


async def test_a_time_out_is_tried_again_as_well():
    clock, attempts = ManualClock(), []

    async def child(ctx: TaskContext, given: object) -> str:
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return "second time"

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child, timeout=2, retry=Retry(initial=1, jitter=0))
        await settle()
        clock.advance(2)
        await settle()
        assert (await task_of(flows, task_id)).status == "queued"

        clock.advance(1)

        assert await soon(flows.wait_task(task_id)) == Succeeded("second time")
        assert attempts == [1, 2]


async def test_a_retry_without_delay_follows_at_once():
    clock, flaky = ManualClock(), Flaky(2)

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        retry = Retry(initial=0, max_attempts=5)
        task_id = await launch(flows, await new_flow(flows), flaky.run, retry=retry)
        for _ in range(3):
            await settle()
            clock.advance(0)

        assert await soon(flows.wait_task(task_id)) == Succeeded("at last")
        assert flaky.attempts == [1, 2, 3]


async def test_a_retry_survives_a_restart_and_comes_due_when_it_should():
    store, clock = MemoryStore(), ManualClock()
    registry, flaky = Registry(), Flaky(1)
    registry.task(flaky.run, name="flaky", retry=Retry(initial=60, jitter=0))
    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "flaky")
        await settle()
        before = await task_of(flows, task_id)

    clock.advance(30)
    async with running(MemoryStore(store.tables), clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        await settle()
        assert await task_of(flows, task_id) == before
        clock.advance(29.9)
        await settle()
        assert flaky.attempts == [1]
        clock.advance(0.1)

        assert await soon(flows.wait_task(task_id)) == Succeeded("at last")
        assert flaky.attempts == [1, 2]


async def test_a_retry_that_fell_due_while_nothing_ran_starts_with_the_next_runtime():
    store, clock = MemoryStore(), ManualClock()
    registry, flaky = Registry(), Flaky(1)
    registry.task(flaky.run, name="flaky", retry=Retry(initial=60, jitter=0))
    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), "flaky")
        await settle()

    clock.advance(7 * 24 * 3600)
    async with running(MemoryStore(store.tables), clock=clock, registry=registry) as runtime:
        assert await soon(flows_of(runtime).wait_task(task_id)) == Succeeded("at last")
        assert flaky.attempts == [1, 2]


@pytest.mark.parametrize("intent", ["request_cancel", "cancel"])
async def test_an_intent_stops_retries(intent: str):
    clock, flaky = ManualClock(), Flaky(1)

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, flaky.run, retry=Retry(initial=10))
        await settle()

        if intent == "cancel":
            assert (await soon(flows.cancel(flow_id))).cancelled
        else:
            answer = await soon(flows.request_cancel(flow_id=flow_id, expected_revision=0))
            assert answer.applied
        clock.advance(100)
        await settle()

        assert flaky.attempts == [1]
        assert await ends_of(flows, flow_id, task_id) == ["cancelled"]
        await settle()
        assert holds_nothing(runtime)


@pytest.mark.parametrize("action", ["cancel", "request_cancel", "cancel_task", "finish"])
async def test_a_child_that_is_stopped_as_its_failure_is_recorded_is_not_tried_again(action: str):
    store, clock, go, attempts = FaultyStore(), ManualClock(), asyncio.Event(), []

    async def child(ctx: TaskContext, given: object) -> None:
        attempts.append(ctx.attempt)
        await go.wait()
        raise ValueError("failed")

    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child, retry=Retry(initial=1))
        await settle()
        store.hold()
        earlier = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        go.set()
        await settle()
        acts = {
            "cancel": lambda: flows.cancel(flow_id),
            "request_cancel": lambda: flows.request_cancel(flow_id=flow_id, expected_revision=1),
            "cancel_task": lambda: flows.cancel_task(task_id),
            "finish": lambda: flows.finish(flow_id=flow_id, expected_revision=1),
        }
        acting = asyncio.create_task(acts[action]())  # type: ignore[arg-type]
        await settle()

        store.release()
        await settle()
        clock.advance(100)
        await settle()

        assert (await soon(earlier)).applied
        assert attempts == [1]
        assert len(await ends_of(flows, flow_id, task_id)) == 1
        await soon(acting)
        flow = await flows.get(flow_id)
        assert flow
        assert (flow.ended_at is not None) == (action != "cancel_task")


@pytest.mark.parametrize("trouble", ["commit", "load"])
async def test_a_retry_whose_start_fails_for_a_moment_still_starts(trouble: str):
    store, clock, flaky = FaultyStore(), ManualClock(), Flaky(1)
    registry = Registry()
    registry.task(flaky.run, name="flaky", retry=Retry(initial=30, jitter=0))

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), "flaky")
        await settle()
        clock.advance(20)
        await settle()
        assert runtime.statistics().flows_in_memory == 0
        if trouble == "commit":
            store.fail_commits(NOT_WRITTEN)
        else:
            store.fail_reads("load", StoreUnusable("flows.db", "a read failed"))

        for _ in range(10):
            clock.advance(5)
            await settle()

        assert flaky.attempts == [1, 2]
        assert (await task_of(flows, task_id)).status == "succeeded"


# ---- limits ----------------------------------------------------------------------------------------


class Probe:
    """Counts how many of its children run at the same time."""

    def __init__(self) -> None:
        self.now = self.most = self.total = 0

    async def run(self, ctx: TaskContext, given: int) -> int:
        self.now += 1
        self.total += 1
        self.most = max(self.most, self.now)
        for _ in range(3):
            await asyncio.sleep(0)
        self.now -= 1
        return given


async def test_no_more_children_of_a_flow_run_at_once_than_the_usual_limit():
    probe = Probe()
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        tasks = await asyncio.gather(
            *(launch(flows, flow_id, probe.run, input_json=n) for n in range(40))
        )

        for task_id in tasks:
            await soon(flows.wait_task(task_id))

        assert (probe.most, probe.total) == (8, 40)


async def test_the_limit_counts_for_each_flow_by_itself():
    probe = Probe()
    async with running(limits=Limits(running_children=2)) as runtime:
        flows = flows_of(runtime)
        ids = [await new_flow(flows) for _ in range(3)]
        made = await asyncio.gather(
            *(launch(flows, i, probe.run, input_json=n) for n in range(5) for i in ids)
        )
        for task_id in made:
            await soon(flows.wait_task(task_id))

        assert (probe.most, probe.total) == (6, 15)


async def test_children_start_in_the_order_they_were_added():
    started: list[int] = []

    async def child(ctx: TaskContext, given: int) -> None:
        started.append(given)

    async with running(limits=Limits(running_children=1)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        tasks = [await launch(flows, flow_id, child, input_json=n) for n in range(20)]
        for task_id in tasks:
            await soon(flows.wait_task(task_id))

        assert started == list(range(20))


async def test_two_thousand_children_complete():
    probe = Probe()
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)

        async def add(n: int) -> str:
            return await launch(flows, flow_id, probe.run, input_json=n)

        tasks = []
        for start in range(0, 2000, 500):
            tasks += await asyncio.gather(*(add(n) for n in range(start, start + 500)))
        await soon(asyncio.gather(*(flows.wait_task(task_id) for task_id in tasks)), 60)

        assert (probe.most, probe.total) == (8, 2000)
        summary = await flows.get_task_summary(flow_id)
        assert summary
        assert (summary.total, summary.by_status["succeeded"]) == (2000, 2000)
        await settle()
        assert holds_nothing(runtime)


async def test_more_active_children_than_a_flow_may_have_are_refused():
    async with running(limits=Limits(active_children=3)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        for _ in range(3):
            await flows.run_task(flow_id=flow_id, task="t", runtime="cli")

        refused = await flows.run_task(flow_id=flow_id, task="t", run=passes)

        assert (refused.created, refused.code) == (False, "overloaded")
        assert holds_nothing(runtime)


# ---- recording -------------------------------------------------------------------------------------


async def test_an_end_that_cannot_be_written_is_reported_again_until_it_is():
    store, clock, runs = FaultyStore(), ManualClock(), []

    async def child(ctx: TaskContext, given: object) -> str:
        runs.append(ctx.attempt)
        store.fail_commits(NOT_WRITTEN, times=3)
        return "done once"

    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child)
        await settle()
        assert (await task_of(flows, task_id)).status == "running"
        assert runtime.statistics().running_children == 1

        for _ in range(6):
            clock.advance(1)
            await settle()

        task = await task_of(flows, task_id)
        assert (task.status, task.result_json, task.attempt) == ("succeeded", "done once", 1)
        assert runs == [1]
        assert await ends_of(flows, flow_id, task_id) == ["succeeded"]
        assert holds_nothing(runtime)


async def test_a_disk_that_stays_broken_is_not_asked_without_a_pause():
    store, clock, registry, go = FaultyStore(), ManualClock(), Registry(), asyncio.Event()

    @registry.controller("c")
    async def controller(flow: Any) -> None:
        await go.wait()

    async def child(ctx: TaskContext, given: object) -> None:
        await go.wait()

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        await launch(flows, await new_flow(flows), child)
        store.hold()
        creating = asyncio.create_task(new_flow(flows, "c"))
        await store.wait_held()
        store.release()
        await soon(creating)
        store.fail_commits(NOT_WRITTEN, times=10_000)
        before = store.attempts

        go.set()
        await turns(500)

        assert store.attempts - before < 20


async def test_a_late_result_of_an_earlier_attempt_is_dropped():
    clock, go = ManualClock(), asyncio.Event()

    async def child(ctx: TaskContext, given: object) -> str:
        if ctx.attempt == 1:
            raise ValueError("first")
        await go.wait()
        return "second"

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, child, retry=Retry(initial=1, jitter=0))
        await settle()
        clock.advance(1)
        await settle()
        assert (await task_of(flows, task_id)).attempt == 2

        late = EndReport(task_id=task_id, outcome=Succeeded(), attempt=1)
        reply = await soon(runtime._engine.report(FlowKey("owner", flow_id), late))
        await settle()

        assert reply.refusal is None
        assert (await task_of(flows, task_id)).status == "running"
        go.set()
        assert await soon(flows.wait_task(task_id)) == Succeeded("second")
        late = EndReport(task_id=task_id, outcome=Failed(None), attempt=2)  # type: ignore[arg-type]
        await soon(runtime._engine.report(FlowKey("owner", flow_id), late))
        assert await ends_of(flows, flow_id, task_id) == ["succeeded"]


async def test_the_owner_cannot_report_on_a_child_that_runs_here():
    go = asyncio.Event()

    async def child(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "mine"

    async with running() as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), child)

        for report in (
            flows.complete_task(task_id, result_json="forged"),
            flows.fail_task(task_id, error="forged"),
        ):
            with pytest.raises(Exception, match="run by this runtime"):
                await report

        go.set()
        assert await soon(flows.wait_task(task_id)) == Succeeded("mine")


async def test_a_repeated_launch_answers_the_first_child_and_does_not_exchange_its_function():
    go = asyncio.Event()

    async def blocks(ctx: TaskContext, given: object) -> None:
        await go.wait()

    async def first(ctx: TaskContext, given: object) -> str:
        return "first"

    async def second(ctx: TaskContext, given: object) -> str:
        return "second"

    async with running(limits=Limits(running_children=1)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, blocks)
        task_id = await launch(flows, flow_id, first, run_id="same")

        again = await flows.run_task(flow_id=flow_id, task="t", run=second, run_id="same")
        go.set()

        assert (again.created, again.code) == (False, "duplicate")
        assert again.task
        assert again.task.task_id == task_id
        assert await soon(flows.wait_task(task_id)) == Succeeded("first")
        late = await flows.run_task(flow_id=flow_id, task="t", run=second, run_id="same")
        assert late.code == "duplicate"
        await settle()
        assert holds_nothing(runtime)


async def test_a_refused_repetition_does_not_take_the_first_childs_function_away():
    store, go = FaultyStore(), asyncio.Event()

    async def blocks(ctx: TaskContext, given: object) -> None:
        await go.wait()

    async def first(ctx: TaskContext, given: object) -> str:
        return "first"

    async with running(store, limits=Limits(running_children=1, mailbox=1)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await launch(flows, flow_id, blocks)
        task_id = await launch(flows, flow_id, first, run_id="same")
        store.hold()
        calls = [asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))]
        await store.wait_held()
        calls.append(asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0)))
        await settle()

        refused = await flows.run_task(flow_id=flow_id, task="t", run=first, run_id="same")
        assert refused.code == "overloaded"
        store.release()
        await soon(asyncio.gather(*calls))
        go.set()

        assert await soon(flows.wait_task(task_id)) == Succeeded("first")


async def test_functions_of_children_that_never_ran_are_let_go():
    async def waits(ctx: TaskContext, given: object) -> None:
        await asyncio.Event().wait()

    async with running(limits=Limits(running_children=1)) as runtime:
        flows = flows_of(runtime)
        cancelled, finished = await new_flow(flows), await new_flow(flows)
        for flow_id in (cancelled, finished):
            for _ in range(3):
                await launch(flows, flow_id, waits)
        await settle()

        assert (await soon(flows.cancel(cancelled))).cancelled
        assert (await soon(flows.finish(flow_id=finished, expected_revision=0))).applied
        await settle()

        assert holds_nothing(runtime)


# ---- the end of a flow ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finish", "fail"])
async def test_a_flow_that_ends_takes_its_launched_children_along_and_leaves_linked_ones(how: str):
    stopped: list[str] = []

    async def child(ctx: TaskContext, given: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(ctx.task_id)

    async with running(limits=Limits(running_children=1)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        ran, queued = [await launch(flows, flow_id, child) for _ in range(2)]
        linked = (await flows.run_task(flow_id=flow_id, task="t", runtime="acp")).unwrap()
        await settle()

        answer = await soon(getattr(flows, how)(flow_id=flow_id, expected_revision=0))
        await settle()

        assert answer.applied
        assert stopped == [ran]
        assert (await task_of(flows, ran)).status == "cancelled"
        assert (await task_of(flows, queued)).status == "cancelled"
        assert (await task_of(flows, linked.task_id)).status == "queued"
        assert len(await ends_of(flows, flow_id, ran)) == 1
        assert holds_nothing(runtime)


async def test_a_clean_shutdown_spends_no_attempt_and_starts_nothing_in_its_last_moments():
    store, registry, runs = MemoryStore(), Registry(), []
    go = asyncio.Event()

    @registry.task
    async def plain(ctx: TaskContext, given: object) -> object:
        runs.append((given, ctx.attempt))
        await go.wait()
        return given

    limits = Limits(running_children=2)
    async with running(store, registry=registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        for n in range(6):
            await launch(flows, flow_id, plain, input_json=n)
        await settle()
        assert runs == [(0, 1), (1, 1)]

    go.set()
    async with running(MemoryStore(store.tables), registry=registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        await settle()

        tasks = await flows.list_tasks(flow_id)
        assert [(task.status, task.attempt) for task in tasks] == [("succeeded", 1)] * 6
        assert sorted(runs[2:]) == [(n, 1) for n in range(6)]


async def test_a_clean_shutdown_loses_what_must_not_be_done_twice_only_if_it_had_begun():
    store, registry, runs = MemoryStore(), Registry(), []
    go = asyncio.Event()

    @registry.task(idempotent=False)
    async def precious(ctx: TaskContext, given: object) -> object:
        runs.append((given, ctx.attempt))
        await go.wait()
        return given

    limits = Limits(running_children=2)
    async with running(store, registry=registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        for n in range(4):
            await launch(flows, flow_id, precious, input_json=n)
        await settle()
        assert runs == [(0, 1), (1, 1)]

    go.set()
    async with running(MemoryStore(store.tables), registry=registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        await settle()

        tasks = await flows.list_tasks(flow_id)
        assert [task.status for task in tasks] == ["lost"] * 2 + ["succeeded"] * 2
        for task in tasks[:2]:
            assert task.failure
            assert (task.failure.kind, task.failure.code) == ("interrupted", "unknown")
        # The others had not begun, so nothing is unknown about them.
        assert runs[2:] == [(2, 1), (3, 1)]


async def test_a_child_whose_start_is_being_written_when_the_runtime_closes_is_not_counted_as_run():
    tables, registry, runs = FaultyStore(), Registry(), []

    @registry.task(idempotent=False)
    async def precious(ctx: TaskContext, given: object) -> str:
        runs.append(ctx.attempt)
        return "kept"

    async with running(tables, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        tables.hold()
        call = asyncio.create_task(launch(flows, flow_id, precious))
        await tables.wait_held()
        closing = asyncio.create_task(runtime.aclose())
        await settle()
        tables.release()
        await soon(closing)
        task_id = await soon(call)
        assert runs == []

    async with running(MemoryStore(tables.tables), registry=registry) as runtime:
        assert await soon(flows_of(runtime).wait_task(task_id)) == Succeeded("kept")
        assert runs == [1]


async def test_a_child_that_ends_while_the_runtime_closes_keeps_its_outcome():
    store, registry = MemoryStore(), Registry()

    @registry.task
    async def hurries(ctx: TaskContext, given: object) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "just in time"
        return ""

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)
        task_id = await launch(flows, await new_flow(flows), hurries)
        await settle()

    async with running(MemoryStore(store.tables), registry=registry) as runtime:
        task = await task_of(flows_of(runtime), task_id)
        assert (task.status, task.result_json) == ("succeeded", "just in time")
