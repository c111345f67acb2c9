"""Controllers: plain code whose steps are children, run again from the top and answered from the record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest

from flowstead import (
    Cancelled,
    CancelPending,
    ChildCancelled,
    ChildError,
    ChildFailed,
    ChildTimedOut,
    Failed,
    FlowContext,
    IllegalTransition,
    InvalidState,
    Limits,
    Registry,
    Retry,
    RevisionConflict,
    Succeeded,
    TaskContext,
    TimedOut,
)
from flowstead.model.flow import FlowKey
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock
from tests.faulty_store import (
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    holds_nothing,
    new_flow,
    running,
    settle,
    soon,
    until,
)


async def double(ctx: TaskContext, given: int) -> int:
    return 2 * given


def one(controller: Callable[..., Any]) -> Registry:
    """A registry with one controller, `c`, and one task, `double`."""
    registry = Registry()
    registry.task(double)
    registry.controller("c")(controller)
    return registry


# ---- beginning and ending --------------------------------------------------------------------------


async def test_creating_a_flow_starts_its_controller_and_returning_finishes_the_flow():
    seen: list[Any] = []

    async def controller(flow: FlowContext) -> str:
        seen.append((flow.flow_id, flow.revision, flow.state_json, flow.current_step))
        return "what a controller returns means nothing"

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c", state_json={"n": 1}, current_step="first")

        ended = await soon(flows.result(flow_id))

        assert seen == [(flow_id, 1, {"n": 1}, "first")]
        assert (ended.status, ended.revision, ended.state_json) == ("succeeded", 2, {"n": 1})
        types = [event.type for event in await flows.history(flow_id)]
        assert types == ["flow.created", "flow.started", "flow.succeeded"]
        await settle()
        assert holds_nothing(runtime)


@pytest.mark.parametrize("status", ["waiting", "blocked"])
async def test_the_status_a_flow_is_created_with_does_not_keep_its_controller_from_starting(
    status: str,
):
    async def controller(flow: FlowContext) -> None:
        return None

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c", status=status)

        assert (await soon(flows.result(flow_id))).status == "succeeded"


RAISED = [
    ValueError("bad"),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError("own"),
    BaseExceptionGroup("group", [SystemExit()]),
]


@pytest.mark.parametrize("raised", RAISED, ids=lambda raised: type(raised).__name__)
async def test_raising_fails_the_flow_with_the_failure_recorded_and_harms_no_other(
    raised: BaseException,
):
    async def controller(flow: FlowContext) -> None:
        if flow.state_json == "bad":
            raise raised
        await flow.run(double, 1)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        bad, good = [await new_flow(flows, "c", state_json=state) for state in ("bad", "good")]

        ended = await soon(flows.result(bad))

        assert ended.status == "failed"
        assert ended.failure
        assert ended.failure.code == type(raised).__name__
        assert (await soon(flows.result(good))).status == "succeeded"
        assert (await soon(flows.result(await new_flow(flows, "c")))).status == "succeeded"


async def leaves_a_scope_open(flow: FlowContext) -> None:
    anyio.CancelScope().__enter__()


async def cancels_its_own_task(flow: FlowContext) -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()
    await asyncio.sleep(0)


async def cancels_its_own_task_and_returns(flow: FlowContext) -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()


@pytest.mark.parametrize(
    "bad",
    [leaves_a_scope_open, cancels_its_own_task, cancels_its_own_task_and_returns],
    ids=lambda bad: bad.__name__,
)
async def test_a_misbehaving_controller_ends_its_own_flow_and_harms_nobody(bad: Any):
    go = asyncio.Event()

    async def waits(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "unharmed"

    async def controller(flow: FlowContext) -> None:
        if flow.state_json == "bad":
            await bad(flow)
        else:
            assert await flow.run(waits) == "unharmed"

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        good = await new_flow(flows, "c")
        await settle()

        ended = await soon(flows.result(await new_flow(flows, "c", state_json="bad")))
        go.set()

        assert ended.status in ("failed", "succeeded")
        assert (await soon(flows.result(good))).status == "succeeded"
        assert (await soon(flows.result(await new_flow(flows, "c")))).status == "succeeded"


async def test_finish_and_fail_end_the_flow_with_what_they_are_given():
    async def controller(flow: FlowContext) -> None:
        if flow.state_json == "finish":
            await flow.finish(current_step="end", state_json={"done": True})
        else:
            await flow.fail(state_json={"done": False}, blocked_summary="no luck")
        with pytest.raises(IllegalTransition):
            await flow.update(current_step="too late")

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        finished = await soon(flows.result(await new_flow(flows, "c", state_json="finish")))
        failed = await soon(flows.result(await new_flow(flows, "c", state_json="fail")))
        await settle()

        assert (finished.status, finished.current_step, finished.state_json) == (
            "succeeded",
            "end",
            {"done": True},
        )
        assert (failed.status, failed.state_json) == ("failed", {"done": False})
        assert failed.failure
        assert (failed.failure.message, failed.blocked_summary) == ("no luck", "no luck")
        assert (await flows.get(finished.flow_id)) == finished


async def test_a_flow_finished_from_outside_lets_its_controller_go():
    stopped: list[str] = []

    async def controller(flow: FlowContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(flow.flow_id)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        assert (await soon(flows.finish(flow_id=flow_id, expected_revision=1))).applied
        await settle()

        assert stopped == [flow_id]
        assert holds_nothing(runtime)


async def test_a_controller_that_ends_leaves_no_launched_child_running():
    stopped: list[str] = []

    async def waits(ctx: TaskContext, given: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(ctx.run_id or "")

    async def controller(flow: FlowContext) -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(flow.run, waits)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        await settle()

        assert stopped == ["waits"]
        assert [task.status for task in await flows.list_tasks(flow_id)] == ["cancelled"]
        assert holds_nothing(runtime)


# ---- steps -----------------------------------------------------------------------------------------


async def test_steps_are_named_after_their_function_and_a_counter_unless_named():
    async def controller(flow: FlowContext) -> None:
        await flow.run(double, 1)
        await flow.run(double, 2)
        await flow.run(double, 3, name="given")
        await flow.run("double", 4)
        await flow.map(double, [5, 6], name="many")
        await flow.map(double, [7])
        await flow.once("inline", lambda: double(None, 8))  # type: ignore[arg-type]

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        assert (await soon(flows.result(flow_id))).status == "succeeded"

        tasks = await flows.list_tasks(flow_id)

        assert [(task.run_id, task.result_json) for task in tasks] == [
            ("double", 2),
            ("double#2", 4),
            ("given", 6),
            ("double#3", 8),
            ("many[0]", 10),
            ("many[1]", 12),
            ("double#4[0]", 14),
            ("inline", 16),
        ]


async def test_map_answers_in_input_order_whatever_the_order_of_ends():
    gates = [asyncio.Event() for _ in range(5)]
    results: list[Any] = []

    async def waits(ctx: TaskContext, given: int) -> int:
        await gates[given].wait()
        return given

    async def controller(flow: FlowContext) -> None:
        results.extend(await flow.map(waits, range(5)))

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        for gate in reversed(gates):
            gate.set()
            await settle()

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert results == [0, 1, 2, 3, 4]


async def test_map_of_nothing_is_nothing():
    results: list[Any] = ["untouched"]

    async def controller(flow: FlowContext) -> None:
        results[:] = await flow.map(double, [])

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert results == []


class Probe:
    """Counts how many of its children run at the same time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def probe(self, ctx: TaskContext, given: int) -> int:
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(3):
            await asyncio.sleep(0)
        self.now -= 1
        return given


@pytest.mark.parametrize(("limit", "most"), [(3, 3), (1, 1), (20, 20), (None, 8)])
async def test_map_never_runs_more_children_at_once_than_its_limit(limit: int | None, most: int):
    probe = Probe()

    async def controller(flow: FlowContext) -> None:
        assert await flow.map(probe.probe, range(50), limit=limit) == list(range(50))

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert probe.most == most


async def test_the_limits_of_two_maps_at_once_count_each_by_itself():
    first, second = Probe(), Probe()

    async def controller(flow: FlowContext) -> None:
        async with anyio.create_task_group() as group:
            for name, probe, limit in (("first", first, 2), ("second", second, 5)):
                group.start_soon(
                    lambda n=name, p=probe, m=limit: flow.map(p.probe, range(20), name=n, limit=m)
                )

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert (first.most, second.most) == (2, 5)


async def test_a_map_of_two_thousand_completes():
    async def controller(flow: FlowContext) -> None:
        assert await flow.map(double, range(2000)) == [2 * n for n in range(2000)]

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id), 20)).status == "succeeded"
        await settle()
        assert holds_nothing(runtime)


async def odd_ones_fail(ctx: TaskContext, given: int) -> int:
    if given % 2:
        raise ValueError(f"odd {given}")
    return given


async def test_map_raises_the_first_failure_in_input_order_once_all_have_ended():
    caught: list[ChildFailed] = []

    async def controller(flow: FlowContext) -> None:
        try:
            await flow.map(odd_ones_fail, range(6))
        except ChildFailed as error:
            caught.append(error)
        summary = await flows.get_task_summary(flow.flow_id)
        assert summary
        assert summary.active == 0

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        [error] = caught
        assert (error.run_id, error.failure.message) == ("odd_ones_fail[1]", "ValueError: odd 1")
        tasks = {task.run_id: task.task_id for task in await flows.list_tasks(flow_id)}
        assert error.task_id == tasks["odd_ones_fail[1]"]


async def test_map_can_answer_with_outcomes_of_every_kind():
    outcomes: list[Any] = []
    clock, begun = ManualClock(), asyncio.Event()
    registry = Registry()

    @registry.task(timeout=5)
    async def mixed(ctx: TaskContext, given: str) -> str:
        if given == "fails":
            raise ValueError("bad")
        if given == "hangs":
            await asyncio.Event().wait()
        if given == "is cancelled":
            begun.set()
            await asyncio.Event().wait()
        return given

    @registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        inputs = ["works", "fails", "hangs", "is cancelled"]
        outcomes.extend(await flow.map(mixed, inputs, return_outcomes=True))

    async with running(registry=registry, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await soon(begun.wait())
        fourth = (await flows.list_tasks(flow_id))[3]
        assert (await soon(flows.cancel_task(fourth.task_id))).cancelled
        clock.advance(5)

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert [type(outcome) for outcome in outcomes] == [Succeeded, Failed, TimedOut, Cancelled]
        assert outcomes[0] == Succeeded("works")


async def test_run_raises_what_became_of_its_child():
    caught: list[type] = []
    clock = ManualClock()

    async def fails(ctx: TaskContext, given: object) -> None:
        raise ValueError

    async def hangs(ctx: TaskContext, given: object) -> None:
        await asyncio.Event().wait()

    async def controller(flow: FlowContext) -> None:
        for step in (
            flow.run(fails),
            flow.run(hangs, timeout=1),
            flow.run(hangs),
            flow.once("inline", lambda: fails(None, None)),  # type: ignore[arg-type]
        ):
            try:
                await step
            except ChildError as error:
                caught.append(type(error))

    async with running(registry=one(controller), clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        clock.advance(1)
        await settle()
        [hanging] = await flows.list_tasks(flow_id, status="running")
        assert (await soon(flows.cancel_task(hanging.task_id))).cancelled

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert caught == [ChildFailed, ChildTimedOut, ChildCancelled, ChildFailed]


async def test_a_childs_failure_that_is_not_caught_fails_the_flow():
    async def controller(flow: FlowContext) -> None:
        await flow.run(odd_ones_fail, 1)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert ended.status == "failed"
        assert ended.failure
        assert ended.failure.code == "ChildFailed"
        assert "odd 1" in (ended.failure.message or "")


async def test_a_step_is_tried_again_as_its_policy_says():
    clock, attempts = ManualClock(), []

    async def flaky(ctx: TaskContext, given: object) -> str:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ConnectionError
        return "at last"

    async def controller(flow: FlowContext) -> None:
        assert await flow.run(flaky, retry=Retry(initial=1, jitter=0)) == "at last"

    async with running(registry=one(controller), clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        for _ in range(4):
            await settle()
            clock.advance(1)

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert attempts == [1, 2, 3]


async def test_an_input_that_is_not_json_starts_nothing():
    async def controller(flow: FlowContext) -> None:
        with pytest.raises(InvalidState, match=r"input"):
            await flow.run(double, object())
        with pytest.raises(InvalidState):
            await flow.map(double, [1, {2}])
        with pytest.raises(InvalidState):
            await flow.update(state_json={"x": float("nan")})

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        ended = await soon(flows.result(flow_id))

        assert (ended.status, ended.failure) == ("succeeded", None)
        assert await flows.list_tasks(flow_id) == []
        assert holds_nothing(runtime)


async def test_the_same_step_asked_for_twice_at_once_runs_once():
    runs: list[int] = []

    async def counts(ctx: TaskContext, given: object) -> int:
        runs.append(1)
        await asyncio.sleep(0)
        return len(runs)

    async def controller(flow: FlowContext) -> None:
        answers = await asyncio.gather(*(flow.run(counts, name="same") for _ in range(5)))
        assert answers == [1] * 5

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        assert (await soon(flows.result(await new_flow(flows, "c")))).status == "succeeded"
        assert runs == [1]
        await settle()
        assert holds_nothing(runtime)


@pytest.mark.parametrize("end_first", [True, False])
async def test_joining_a_step_in_the_very_moment_it_ends_answers_its_result(end_first: bool):
    store, go, again = FaultyStore(), asyncio.Event(), asyncio.Event()

    async def waits(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "result"

    async def controller(flow: FlowContext) -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: flow.run(waits, name="step"))
                await begun.wait()
                scope.cancel()
        await again.wait()
        assert await flow.run(waits, name="step") == "result"

    begun = asyncio.Event()
    async with running(store, registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        begun.set()
        await settle()
        store.hold()
        linked = asyncio.create_task(flows.run_task(flow_id=flow_id, task="t", runtime="cli"))
        await store.wait_held()
        for event in (go, again) if end_first else (again, go):
            event.set()
            await settle()

        store.release()

        assert (await soon(linked)).created
        assert (await soon(flows.result(flow_id))).status == "succeeded"
        await settle()
        assert holds_nothing(runtime)


async def test_a_step_whose_wait_was_given_up_can_be_joined_again():
    go = asyncio.Event()

    async def waits(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "result"

    async def controller(flow: FlowContext) -> None:
        waiting = asyncio.ensure_future(flow.run(waits, name="step"))
        await settle()
        waiting.cancel()
        await settle()
        go.set()
        assert await flow.run(waits, name="step") == "result"
        assert await flow.run(waits, name="step") == "result"

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert [task.attempt for task in await flows.list_tasks(flow_id)] == [1]


# ---- the flow itself -------------------------------------------------------------------------------


async def test_updates_carry_the_revision_forward():
    async def controller(flow: FlowContext) -> None:
        for n in range(5):
            await flow.update(state_json={"n": n}, current_step=f"step {n}")
            assert (flow.revision, flow.state_json) == (n + 2, {"n": n})
        await flow.update(state_json=None, current_step=None)
        assert (flow.state_json, flow.current_step) == (None, None)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert (ended.status, ended.revision) == ("succeeded", 8)


@pytest.mark.parametrize("touches_its_state", [False, True])
async def test_a_cancel_requested_from_outside_does_not_break_an_update(touches_its_state: bool):
    asked, go = asyncio.Event(), asyncio.Event()

    async def controller(flow: FlowContext) -> None:
        asked.set()
        await go.wait()
        state = flow.state_json
        if touches_its_state:
            state["n"] += 1
        await flow.update(state_json=state)
        await flow.finish(current_step="honestly done")

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c", state_json={"n": 1})
        await soon(asked.wait())

        assert (await flows.request_cancel(flow_id=flow_id, expected_revision=1)).applied
        go.set()

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.revision) == ("succeeded", 4)
        assert ended.state_json == {"n": 1 + touches_its_state}


async def test_a_change_by_somebody_else_raises_a_conflict_and_nothing_is_written():
    asked, go, caught = asyncio.Event(), asyncio.Event(), []

    async def controller(flow: FlowContext) -> None:
        asked.set()
        await go.wait()
        try:
            await flow.update(state_json="mine")
        except RevisionConflict as error:
            caught.append(error)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await soon(asked.wait())

        assert (
            await flows.update(flow_id=flow_id, expected_revision=1, state_json="yours")
        ).applied
        go.set()

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", "yours")
        assert caught[0].current
        assert caught[0].current.state_json == "yours"


async def test_a_conflict_that_is_not_caught_fails_the_flow():
    asked, go = asyncio.Event(), asyncio.Event()

    async def controller(flow: FlowContext) -> None:
        asked.set()
        await go.wait()
        await flow.update(state_json="mine")

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await soon(asked.wait())
        await flows.update(flow_id=flow_id, expected_revision=1, state_json="yours")
        await flows.request_cancel(flow_id=flow_id, expected_revision=2)
        go.set()

        ended = await soon(flows.result(flow_id))

        assert (ended.status, ended.state_json) == ("failed", "yours")
        assert ended.failure
        assert ended.failure.code == "RevisionConflict"


async def test_an_update_that_could_not_be_written_raises_and_can_be_made_again():
    store = FaultyStore()

    async def controller(flow: FlowContext) -> None:
        store.fail_commits(NOT_WRITTEN)
        with pytest.raises(type(NOT_WRITTEN)):
            await flow.update(state_json="lost")
        assert flow.state_json is None
        await flow.update(state_json="kept")

    async with running(store, registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert (ended.status, ended.state_json, ended.failure) == ("succeeded", "kept", None)


async def test_changing_what_the_context_hands_out_changes_nothing():
    async def controller(flow: FlowContext) -> None:
        flow.state_json["n"] = 99
        await flow.update(current_step="next")

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c", state_json={"n": 1})))

        assert ended.state_json == {"n": 1}


# ---- giving way to a cancel ------------------------------------------------------------------------


async def test_letting_the_refusal_of_a_new_step_pass_ends_the_flow_as_cancelled():
    asked, go, ran = asyncio.Event(), asyncio.Event(), []

    async def never(ctx: TaskContext, given: object) -> None:
        ran.append(True)

    async def controller(flow: FlowContext) -> None:
        asked.set()
        await go.wait()
        await flow.run(never)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await soon(asked.wait())
        await flows.request_cancel(flow_id=flow_id, expected_revision=1)

        go.set()

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.failure, ran) == ("cancelled", None, [])
        assert await flows.list_tasks(flow_id) == []
        await settle()
        assert holds_nothing(runtime)


async def test_a_step_that_is_under_way_still_answers_after_a_cancel_was_requested():
    go, got = asyncio.Event(), []

    async def waits(ctx: TaskContext, given: object) -> str:
        await go.wait()
        return "finished work"

    async def controller(flow: FlowContext) -> None:
        got.append(await flow.run(waits))
        got.append(await flow.run(waits, name="waits"))
        with pytest.raises(CancelPending):
            await flow.run(double, 1)
        await flow.finish(state_json=got[0])

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        await flows.request_cancel(flow_id=flow_id, expected_revision=1)
        go.set()

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", "finished work")
        assert got == ["finished work"] * 2


async def test_the_pending_cancel_of_another_flow_is_an_ordinary_failure():
    async def controller(flow: FlowContext) -> None:
        other = await flows.create_managed(controller_id="nobody", goal="other")
        (await flows.request_cancel(flow_id=other.flow_id, expected_revision=0)).unwrap()
        (await flows.resume(flow_id=other.flow_id, expected_revision=1)).unwrap()

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        await settle()

        flow = await flows.get(flow_id)
        assert flow
        assert flow.status == "failed"


async def test_a_controller_may_cancel_its_own_flow():
    went_on: list[bool] = []

    async def controller(flow: FlowContext) -> None:
        await flows.cancel(flow.flow_id)
        went_on.append(True)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert (ended.status, went_on) == ("cancelled", [])


async def test_a_child_may_cancel_the_flow_it_belongs_to():
    async def child(ctx: TaskContext, given: object) -> None:
        await flows.cancel(ctx.flow_id)

    async def controller(flow: FlowContext) -> None:
        await flow.run(child)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")

        assert (await soon(flows.result(flow_id))).status == "cancelled"
        assert [task.status for task in await flows.list_tasks(flow_id)] == ["cancelled"]


@pytest.mark.parametrize("by", ["closing", "cancelling"])
async def test_awaiting_the_end_of_its_own_flow_locks_nothing_up(by: str):
    async def child(ctx: TaskContext, given: object) -> None:
        await flows.result(ctx.flow_id)

    async def controller(flow: FlowContext) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(flow.run, child)
            await flows.result(flow.flow_id)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        if by == "closing":
            await soon(runtime.aclose())
        else:
            assert (await soon(flows.cancel(flow_id))).cancelled


async def test_a_controller_may_create_flows_and_await_their_ends():
    async def controller(flow: FlowContext) -> None:
        if flow.state_json == "sub":
            await flow.update(state_json={"answer": await flow.run(double, 21)})
            return
        sub = await flows.create_managed(controller_id="c", goal="sub", state_json="sub")
        ended = await flows.result(sub.flow_id)
        await flow.finish(state_json=ended.state_json)

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)

        ended = await soon(flows.result(await new_flow(flows, "c")))

        assert (ended.status, ended.state_json) == ("succeeded", {"answer": 42})
        assert len(await flows.list()) == 2


# ---- run again from the top --------------------------------------------------------------------------


class Recording:
    """A registry for a controller of three steps, and what was really run of them."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.entered = 0
        self.go = asyncio.Event()
        self.registry = Registry()
        self.registry.task(self.first, name="first")
        self.registry.controller("c")(self.controller)

    async def first(self, ctx: TaskContext, given: object) -> str:
        self.runs.append("first")
        return "one"

    async def bare(self, ctx: TaskContext, given: object) -> object:
        self.runs.append(f"bare {given}")
        return given

    async def inline(self) -> str:
        self.runs.append("inline")
        return "three"

    async def last(self, ctx: TaskContext, given: object) -> str:
        self.runs.append("last")
        await self.go.wait()
        return "four"

    async def controller(self, flow: FlowContext) -> None:
        self.entered += 1
        results: list[Any] = [await flow.run("first", self.entered)]
        results += await flow.map(self.bare, [1, 2])
        results.append(await flow.once("inline", self.inline))
        try:
            await flow.run(odd_ones_fail, 1)
        except ChildFailed as error:
            results.append(error.failure.message)
        results.append(await flow.run(self.last))
        await flow.update(state_json=results)


ALL = ["one", 1, 2, "three", "ValueError: odd 1", "four"]
BEFORE = ["first", "bare 1", "bare 2", "inline", "last"]


@pytest.mark.parametrize("how", ["close", "crash"])
async def test_recorded_steps_answer_from_the_record_and_only_the_open_one_runs_again(how: str):
    play, store = Recording(), MemoryStore()
    async with running(store, registry=play.registry) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()
        assert play.runs == BEFORE
        before = await flows_of(first).get(flow_id)
        if how == "close":
            await soon(first.aclose())

        async with running(
            MemoryStore(store.tables), registry=play.registry, takeover=True
        ) as second:
            flows = flows_of(second)
            await settle()
            play.go.set()

            ended = await soon(flows.result(flow_id))

            assert before
            assert (ended.status, ended.state_json) == ("succeeded", ALL)
            assert play.runs == [*BEFORE, "last"]
            assert play.entered == 2
            attempts = {task.run_id: task.attempt for task in await flows.list_tasks(flow_id)}
            assert attempts == {
                "first": 1,
                "bare[0]": 1,
                "bare[1]": 1,
                "inline": 1,
                "odd_ones_fail": 1,
                "last": 1 if how == "close" else 2,
            }
            await settle()
            assert holds_nothing(second)


async def test_a_restart_on_a_file_answers_recorded_steps_from_the_record(db: Any):
    play = Recording()
    async with running(db, registry=play.registry) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await until(lambda: play.runs == BEFORE)

    play.go.set()
    async with running(db, registry=play.registry) as second:
        ended = await soon(flows_of(second).result(flow_id))

        assert (ended.status, ended.state_json) == ("succeeded", ALL)
        assert play.runs == [*BEFORE, "last"]


async def test_bare_children_waiting_in_line_are_given_their_function_again_after_a_restart():
    store, go, runs = MemoryStore(), asyncio.Event(), []

    async def work(ctx: TaskContext, given: int) -> int:
        await go.wait()
        runs.append(given)
        return given

    async def controller(flow: FlowContext) -> None:
        await flow.update(state_json=await flow.map(work, range(7), limit=2))

    async with running(store, registry=one(controller)) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()

    go.set()
    async with running(MemoryStore(store.tables), registry=one(controller)) as second:
        flows = flows_of(second)

        ended = await soon(flows.result(flow_id))

        assert (ended.status, ended.state_json) == ("succeeded", list(range(7)))
        assert sorted(runs) == list(range(7))
        assert [task.attempt for task in await flows.list_tasks(flow_id)] == [1] * 7


async def test_a_recorded_failure_names_the_child_that_failed_also_when_run_again():
    store, go, named = MemoryStore(), asyncio.Event(), []

    async def controller(flow: FlowContext) -> None:
        try:
            await flow.run(odd_ones_fail, 1)
        except ChildFailed as error:
            named.append(error.task_id)
        await go.wait()

    async with running(store, registry=one(controller)) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()
    async with running(MemoryStore(store.tables), registry=one(controller)) as second:
        await settle()
        [task] = await flows_of(second).list_tasks(flow_id)

        assert named == [task.task_id] * 2


async def test_a_flow_that_waits_is_not_entered_again_until_it_is_resumed():
    store, entered = MemoryStore(), []

    async def controller(flow: FlowContext) -> None:
        entered.append(flow.flow.status)
        if len(entered) == 1:
            await flows_of(first).set_waiting(
                flow_id=flow.flow_id, expected_revision=flow.revision, wait_json={"kind": "reply"}
            )
            await asyncio.Event().wait()

    async with running(store, registry=one(controller)) as first:
        flow_id = await new_flow(flows_of(first), "c")
        await settle()

    async with running(MemoryStore(store.tables), registry=one(controller)) as second:
        flows = flows_of(second)
        await settle()
        assert entered == ["running"]

        resumed = (await flows.resume(flow_id=flow_id, expected_revision=2)).unwrap()

        assert resumed.status == "queued"
        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert entered == ["running", "running"]


async def test_resuming_a_flow_whose_controller_runs_does_not_enter_it_twice():
    entered, go = [], asyncio.Event()

    async def controller(flow: FlowContext) -> None:
        entered.append(flow.revision)
        await go.wait()

    async with running(registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()

        assert (await flows.resume(flow_id=flow_id, expected_revision=1)).applied
        await settle()
        go.set()

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert entered == [1]


async def test_a_controller_that_keeps_failing_to_enter_gets_in_once_the_disk_is_well():
    store, clock, entered = FaultyStore(), ManualClock(), []

    async def controller(flow: FlowContext) -> None:
        entered.append(flow.revision)

    async with running(store, clock=clock, registry=one(controller)) as runtime:
        flows = flows_of(runtime)
        store.hold()
        creating = asyncio.create_task(new_flow(flows, "c"))
        await store.wait_held()
        store.release()
        flow_id = await soon(creating)
        store.fail_commits(NOT_WRITTEN, times=2)

        for _ in range(5):
            await settle()
            clock.advance(2)

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert len(entered) == 1


async def test_many_flows_with_controllers_run_side_by_side():
    async def controller(flow: FlowContext) -> None:
        total = sum(await flow.map(double, range(4)))
        await flow.update(state_json=total)

    async with running(registry=one(controller), limits=Limits(batch=64)) as runtime:
        flows = flows_of(runtime)
        ids = await asyncio.gather(*(new_flow(flows, "c") for _ in range(200)))

        ended = await soon(asyncio.gather(*(flows.result(i) for i in ids)), 60)

        assert {(flow.status, flow.state_json) for flow in ended} == {("succeeded", 12)}
        await settle()
        assert holds_nothing(runtime)
        assert runtime._engine.doc_of(FlowKey("owner", ids[0]))


# ---- a store that fails the controller ------------------------------------------------------------


@pytest.mark.parametrize("error", [NOT_WRITTEN, UNKNOWN], ids=["not written", "unknown"])
async def test_a_store_that_fails_a_step_does_not_end_the_flow(
    clock: ManualClock, error: Exception
) -> None:
    store, registry, entered = FaultyStore(), Registry(), []

    @registry.controller("c")
    async def drive(flow: FlowContext) -> None:
        entered.append(flow.flow_id)
        if len(entered) == 1:
            store.fail_commits(error)
        await flow.update(state_json="told")

    async with running(store, registry=registry, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        assert len(entered) == 1

        clock.advance(1)
        end = await soon(flows.result(flow_id))

        assert (end.status, end.state_json, len(entered)) == ("succeeded", "told", 2)


async def test_a_store_that_fails_in_a_task_group_of_the_controller_does_not_end_the_flow(
    clock: ManualClock,
) -> None:
    store, registry, entered = FaultyStore(), Registry(), []

    @registry.controller("c")
    async def drive(flow: FlowContext) -> None:
        entered.append(flow.flow_id)
        if len(entered) == 1:
            store.fail_commits(NOT_WRITTEN)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(flow.update, state_json="told"))

    async with running(store, registry=registry, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await settle()
        clock.advance(1)

        assert (await soon(flows.result(flow_id))).status == "succeeded"
        assert len(entered) == 2


async def test_an_error_beside_the_stores_still_fails_the_flow() -> None:
    store, registry = FaultyStore(), Registry()

    @registry.controller("c")
    async def drive(flow: FlowContext) -> None:
        raise ExceptionGroup("both", [NOT_WRITTEN, ValueError("mine")])

    async with running(store, registry=registry) as runtime:
        flows = flows_of(runtime)

        end = await soon(flows.result(await new_flow(flows, "c")))

        assert end.status == "failed"
