"""History: what happened, in order, without gaps, told again and told live."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import anyio
import pytest

from flowstead import (
    Event,
    Flow,
    FlowContext,
    FlowNotFound,
    Limits,
    Registry,
    RuntimeClosed,
    SessionFlows,
    TaskContext,
    open_runtime,
)
from flowstead.testing import ManualClock
from tests.runtime.support import OWNER, PATIENCE, STRANGER, Where, bound, link, make, step

Events = list[Event]


async def a_life(flows: SessionFlows, **given: Any) -> Flow:
    """A flow that has seen everything, ended."""
    flow = await make(flows, state_json={"n": 0}, current_step="first", **given)
    named = {"flow_id": flow.flow_id}
    task = await link(flows, flow.flow_id, run_id="r", status="queued")
    await flows.start_task(task.task_id)
    await flows.progress_task(task.task_id, summary="half")
    flow = (
        await flows.set_waiting(
            **named, expected_revision=0, wait_json={"kind": "reply"}, blocked_summary="why"
        )
    ).unwrap()
    flow = (await flows.resume(**named, expected_revision=1, status="running")).unwrap()
    flow = (
        await flows.update(**named, expected_revision=2, state_json={"n": 1}, current_step=None)
    ).unwrap()
    await flows.complete_task(task.task_id, result_json="out")
    flow = (await flows.request_cancel(**named, expected_revision=3)).unwrap()
    return (
        await flows.fail(**named, expected_revision=4, blocked_task_id="t", state_json=None)
    ).unwrap()


LIFE = [
    ("flow.created", 0),
    ("task.created", 0),
    ("task.started", 0),
    ("task.progressed", 0),
    ("flow.blocked", 1),
    ("flow.resumed", 2),
    ("flow.updated", 3),
    ("task.ended", 3),
    ("flow.cancel_requested", 4),
    ("flow.failed", 5),
]


def replay(events: Events) -> dict[str, Any]:
    """The flow's fields as its own events tell them."""
    state: dict[str, Any] = {}
    for event in events:
        if event.task_id is None:
            state |= event.changed
    return state


def told_by(flow: Flow) -> dict[str, Any]:
    """The fields of a flow that can change, by their wire names."""
    failure = flow.failure
    return {
        "status": flow.status,
        "currentStep": flow.current_step,
        "stateJson": flow.state_json,
        "waitJson": flow.wait_json,
        "blockedTaskId": flow.blocked_task_id,
        "blockedSummary": flow.blocked_summary,
        "cancelRequestedAt": flow.cancel_requested_at,
        "endedAt": flow.ended_at,
        "failure": failure and {"kind": failure.kind},
    }


# ---- told again -----------------------------------------------------------------------------------


async def test_every_transition_has_a_line_with_actor_revision_and_time(
    store: Where, clock: ManualClock
) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await a_life(flows)

        events = await flows.history(flow.flow_id)

    assert [(event.type, event.revision) for event in events] == LIFE
    assert [event.seq for event in events] == list(range(1, len(LIFE) + 1))
    assert {event.actor for event in events} == {OWNER}
    assert {event.flow_id for event in events} == {flow.flow_id}
    assert {event.at for event in events} == {clock.now()}
    assert [event.position for event in events] == sorted(event.position for event in events)
    tasks = [event.task_id for event in events if event.type.startswith("task.")]
    assert len(set(tasks)) == 1 and tasks[0] is not None
    assert all(event.task_id is None for event in events if event.type.startswith("flow."))


async def test_a_line_tells_what_it_changed_and_nothing_else(flows: SessionFlows) -> None:
    flow = await a_life(flows)

    told = {event.type: event.changed for event in await flows.history(flow.flow_id)}

    assert told["flow.created"] == {
        "status": "queued",
        "controllerId": "shop/triage",
        "goal": "triage",
        "currentStep": "first",
        "stateJson": {"n": 0},
    } | {
        name: value
        for name, value in told["flow.created"].items()
        if name not in {"status", "controllerId", "goal", "currentStep", "stateJson"}
    }
    assert told["flow.blocked"] == {
        "status": "blocked",
        "waitJson": {"kind": "reply"},
        "blockedSummary": "why",
    }
    assert told["flow.resumed"] == {
        "status": "running",
        "waitJson": None,
        "blockedSummary": None,
    }
    assert told["flow.updated"] == {"currentStep": None, "stateJson": {"n": 1}}
    assert told["task.progressed"] == {"progressSummary": "half"}
    assert told["task.ended"]["status"] == "succeeded"
    assert told["flow.cancel_requested"].keys() == {"cancelRequestedAt"}


async def test_replaying_the_history_gives_the_flow_at_every_revision(
    flows: SessionFlows,
) -> None:
    flow = await make(flows, state_json=0)
    seen = [flow]
    for number in range(1, 30):
        step_of = {0: "a", 1: None, 2: "b"}[number % 3]
        state = [number, {"n": number}, None, "x"][number % 4]
        match number % 4:
            case 0:
                done = await flows.update(
                    flow_id=flow.flow_id, expected_revision=flow.revision, current_step=step_of
                )
            case 1:
                done = await flows.set_waiting(
                    flow_id=flow.flow_id,
                    expected_revision=flow.revision,
                    wait_json=state,
                    blocked_summary=step_of,
                )
            case 2:
                done = await flows.resume(
                    flow_id=flow.flow_id, expected_revision=flow.revision, state_json=state
                )
            case _:
                done = await flows.update(
                    flow_id=flow.flow_id, expected_revision=flow.revision, state_json=state
                )
        flow = done.unwrap()
        seen.append(flow)

    events = await flows.history(flow.flow_id)

    for flow in seen:
        state_then = replay([event for event in events if event.revision <= flow.revision])
        for name, value in told_by(flow).items():
            assert state_then.get(name) == value, (flow.revision, name)


async def test_replaying_the_history_gives_an_ended_flow(flows: SessionFlows) -> None:
    flow = await a_life(flows)

    state = replay(await flows.history(flow.flow_id))

    assert {name: state.get(name) for name in told_by(flow)} == told_by(flow)


async def test_the_first_line_tells_all_that_a_flow_was_made_with(flows: SessionFlows) -> None:
    flow = await make(
        flows,
        correlation_id="crm:1",
        notify_policy="silent",
        state_version=3,
        wait_json={"kind": "x"},
    )

    [made] = await flows.history(flow.flow_id)

    assert made.changed["waitJson"] == {"kind": "x"}
    assert made.changed.get("correlationId") == "crm:1"
    assert made.changed.get("notifyPolicy") == "silent"
    assert made.changed.get("stateVersion") == 3


async def test_who_did_what_is_told_apart(store: Where) -> None:
    registry = Registry()

    @registry.task
    async def work(ctx: TaskContext, value: Any) -> Any:
        return value

    @registry.controller("c")
    async def drive(flow: FlowContext) -> None:
        await flow.run(work, 1)
        await flow.update(state_json="driven")

    async with open_runtime(store, registry=registry) as runtime:
        flows = bound(runtime)
        flow = await make(flows, controller_id="c")
        with anyio.fail_after(PATIENCE):
            await flows.result(flow.flow_id)
        other = await make(flows)
        await runtime.admin.cancel(other.flow_id)

        actors = [(event.type, event.actor) for event in await flows.history(flow.flow_id)]
        assert ("flow.created", OWNER) in actors
        assert ("flow.updated", "controller") in actors
        assert {actor for kind, actor in actors if kind == "task.ended"} == {"runtime"}
        ended = (await flows.history(other.flow_id))[-1]
        assert (ended.type, ended.actor) == ("flow.cancelled", "admin")


async def test_history_is_read_in_pages_and_survives_a_restart(store: Where) -> None:
    async with open_runtime(store) as runtime:
        flow = await a_life(bound(runtime))
        whole = await bound(runtime).history(flow.flow_id)

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        pages, after = [], 0
        while page := await flows.history(flow.flow_id, after_seq=after, limit=3):
            pages.append(page)
            after = page[-1].seq

        assert [len(page) for page in pages] == [3, 3, 3, 1]
        assert [event for page in pages for event in page] == whole
        assert await flows.history(flow.flow_id, after_seq=10**6) == []


async def test_a_refused_mutation_leaves_no_line(flows: SessionFlows) -> None:
    flow = await a_life(flows)
    before = await flows.history(flow.flow_id)

    await flows.update(flow_id=flow.flow_id, expected_revision=0)
    await flows.update(flow_id=flow.flow_id, expected_revision=5)
    await flows.cancel(flow.flow_id)
    await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t")

    assert await flows.history(flow.flow_id) == before


async def test_events_are_numbered_without_gaps_over_the_whole_store(store: Where) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        await asyncio.gather(*(a_life(flows) for _ in range(10)))
        every = [
            event for flow in await flows.list() for event in await flows.history(flow.flow_id)
        ]

    assert sorted(event.position for event in every) == list(range(1, 101))


# ---- told live ------------------------------------------------------------------------------------


async def _take(watching: Any, count: int) -> Events:
    with anyio.fail_after(PATIENCE):
        return [await anext(watching) for _ in range(count)]


async def test_watching_from_the_beginning_tells_history_and_then_news(
    flows: SessionFlows,
) -> None:
    flow = await make(flows)
    await flows.update(flow_id=flow.flow_id, expected_revision=0)

    async with flows.watch(flow.flow_id, after_seq=0) as events:
        old = await _take(events, 2)
        await flows.update(flow_id=flow.flow_id, expected_revision=1)
        await flows.finish(flow_id=flow.flow_id, expected_revision=2)
        new = await _take(events, 2)

    assert old + new == await flows.history(flow.flow_id)


async def test_watching_from_a_number_and_from_now(flows: SessionFlows) -> None:
    flow = await make(flows)
    await link(flows, flow.flow_id)

    async with (
        flows.watch(flow.flow_id, after_seq=1) as later,
        flows.watch(flow.flow_id) as now,
        flows.watch() as every,
    ):
        await flows.update(flow_id=flow.flow_id, expected_revision=0)

        assert [event.seq for event in await _take(later, 2)] == [2, 3]
        assert [event.seq for event in await _take(now, 1)] == [3]
        assert [event.seq for event in await _take(every, 1)] == [3]


async def test_watching_all_flows_by_position(runtime: Any, flows: SessionFlows) -> None:
    first = await a_life(flows)
    await make(bound(runtime, STRANGER))

    async with flows.watch(after_position=0) as events:
        told = await _take(events, 10)
        second = await make(flows)
        told += await _take(events, 1)

    assert told[:10] == await flows.history(first.flow_id)
    assert (told[10].flow_id, told[10].type) == (second.flow_id, "flow.created")


@pytest.mark.parametrize("bound_of", [4, 1024])
async def test_watching_in_pieces_has_neither_gaps_nor_doubles(store: Where, bound_of: int) -> None:
    async with open_runtime(store, limits=Limits(watcher_events=bound_of)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        total = 300
        told: Events = []

        async def mutate() -> None:
            for number in range(total - 1):
                await flows.update(flow_id=flow.flow_id, expected_revision=number)

        async def watch() -> None:
            after = 0
            while len(told) < total:
                async with flows.watch(flow.flow_id, after_seq=after) as events:
                    for _ in range(min(7, total - len(told))):
                        told.append(await anext(events))
                after = told[-1].seq

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(mutate)
                group.start_soon(watch)

        assert [event.seq for event in told] == list(range(1, total + 1))
        assert told == await flows.history(flow.flow_id)


async def test_a_slow_watcher_loses_nothing_and_holds_nobody_up(store: Where) -> None:
    async with open_runtime(store, limits=Limits(watcher_events=4)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        async with flows.watch(after_position=0) as events:
            told = await _take(events, 1)
            for number in range(1200):
                await flows.run_task(
                    flow_id=flow.flow_id, runtime="acp", task="t", run_id=str(number)
                )
                if number % 100 == 99:
                    told += await _take(events, 3)
            told += await _take(events, 1201 - len(told))

        assert told == await flows.history(flow.flow_id, limit=2000)


async def test_cancelling_the_wait_for_the_next_event_loses_none(store: Where) -> None:
    async with open_runtime(store, limits=Limits(watcher_events=4)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        told: Events = []
        async with flows.watch(flow.flow_id, after_seq=0) as events:
            for number in range(60):
                await flows.update(flow_id=flow.flow_id, expected_revision=number)
                for rounds in range(number % 9):
                    waiting = asyncio.ensure_future(anext(events))
                    await step(rounds)
                    waiting.cancel()
                    await asyncio.wait({waiting})
                    if not waiting.cancelled():
                        told.append(waiting.result())
            told += await _take(events, 61 - len(told))

        assert [event.seq for event in told] == list(range(1, 62))


async def test_many_watchers_see_the_same(store: Where) -> None:
    async with open_runtime(store, limits=Limits(watcher_events=8)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        seen: list[Events] = []

        async def watch() -> None:
            async with flows.watch(flow.flow_id, after_seq=0) as events:
                seen.append([await anext(events) for _ in range(50)])

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(watch)
                for number in range(49):
                    await flows.update(flow_id=flow.flow_id, expected_revision=number)

        assert seen == [await flows.history(flow.flow_id)] * 10


async def test_a_watcher_ends_with_its_runtime_after_the_last_event(store: Where) -> None:
    told: Events = []
    ready = anyio.Event()

    async def watch(flows: SessionFlows) -> None:
        async with flows.watch(after_position=0) as events:
            ready.set()
            async for event in events:
                told.append(event)

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        watcher = asyncio.create_task(watch(flows))
        await ready.wait()
        flow = await a_life(flows)
        await step(20)
        expected = await flows.history(flow.flow_id)
        with anyio.fail_after(PATIENCE):
            await runtime.aclose()
            await watcher

    assert told == expected
    async with open_runtime(store) as runtime:
        async with bound(runtime).watch(after_position=told[-1].position) as events:
            await make(bound(runtime), flow_id="next")
            [event] = await _take(events, 1)
        assert (event.flow_id, event.position) == ("next", told[-1].position + 1)


async def test_a_watcher_behind_at_the_close_says_where_to_resume(store: Where) -> None:
    told: Events = []

    async def read_on(events: Any) -> None:
        async for event in events:
            told.append(event)

    async with open_runtime(store, limits=Limits(watcher_events=2)) as runtime:
        flows = bound(runtime)
        async with flows.watch(after_position=0) as events:
            flow = await a_life(flows)
            told += await _take(events, 3)
            for _ in range(5):
                await link(flows, (await make(flows)).flow_id)
            with anyio.fail_after(PATIENCE):
                await runtime.aclose()
                with pytest.raises(RuntimeClosed) as closed:
                    await read_on(events)
            assert f"Resume after {told[-1].position}" in str(closed.value)

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        async with flows.watch(after_position=told[-1].position) as events:
            told += await _take(events, 20 - len(told))
    assert [event.position for event in told] == list(range(1, 21))
    assert [event.flow_id for event in told[:10]] == [flow.flow_id] * 10


async def test_a_watcher_is_entered_before_it_is_read(flows: SessionFlows) -> None:
    flow = await make(flows)

    with pytest.raises(RuntimeError, match="async with"):
        await anext(flows.watch(flow.flow_id))


async def test_a_watcher_that_was_left_is_forgotten(flows: SessionFlows) -> None:
    flow = await make(flows)
    gone: list[weakref.ref[Any]] = []
    for rounds in range(12):
        for flow_id in (flow.flow_id, None):
            watcher = flows.watch(flow_id)
            gone.append(weakref.ref(watcher))
            entering = asyncio.ensure_future(watcher.__aenter__())
            await step(rounds)
            entering.cancel()
            await asyncio.wait({entering})
            if not entering.cancelled():
                await watcher.__aexit__(None, None, None)
            del watcher, entering
    with pytest.raises(FlowNotFound):
        await flows.watch("nobody").__aenter__()

    await flows.update(flow_id=flow.flow_id, expected_revision=0)
    await step(5)
    gc.collect()

    assert [ref() for ref in gone] == [None] * 24
