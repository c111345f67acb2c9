"""A caller cancelled at any await: its mutation is there or not, never half, and the flow goes on."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from flowstead import FlowContext, Registry, Runtime, SessionFlows, open_runtime
from tests.runtime.support import PATIENCE, Where, bound, link, make, step

ROUNDS = (*range(14), 30, 80, 200, 500)
"""After how many rounds of the event loop to cancel: past the end of a call in memory and in a file."""

CHANGING: dict[str, Callable[[SessionFlows, str, str], Awaitable[Any]]] = {
    "create_managed": lambda flows, flow, task: make(flows),
    "create_managed own id": lambda flows, flow, task: make(flows, flow_id=f"own-{flow}"),
    "create_managed key": lambda flows, flow, task: make(flows, idempotency_key=f"key-{flow}"),
    "set_waiting": lambda flows, flow, task: flows.set_waiting(
        flow_id=flow, expected_revision=0, state_json=2, wait_json={"kind": "x"}
    ),
    "resume": lambda flows, flow, task: flows.resume(
        flow_id=flow, expected_revision=0, state_json=2
    ),
    "update": lambda flows, flow, task: flows.update(
        flow_id=flow, expected_revision=0, state_json=2
    ),
    "finish": lambda flows, flow, task: flows.finish(
        flow_id=flow, expected_revision=0, state_json=2
    ),
    "fail": lambda flows, flow, task: flows.fail(flow_id=flow, expected_revision=0, state_json=2),
    "request_cancel": lambda flows, flow, task: flows.request_cancel(
        flow_id=flow, expected_revision=0
    ),
    "cancel": lambda flows, flow, task: flows.cancel(flow),
    "run_task": lambda flows, flow, task: flows.run_task(
        flow_id=flow, runtime="acp", task="t", run_id="r"
    ),
    "run_task run=": lambda flows, flow, task: flows.run_task(
        flow_id=flow, task="t", run=quick, run_id="r"
    ),
    "start_task": lambda flows, flow, task: flows.start_task(task),
    "progress_task": lambda flows, flow, task: flows.progress_task(task, summary="half"),
    "complete_task": lambda flows, flow, task: flows.complete_task(task, result_json=1),
    "fail_task": lambda flows, flow, task: flows.fail_task(task, error="no"),
    "cancel_task": lambda flows, flow, task: flows.cancel_task(task),
}

LOOKING: dict[str, Callable[[SessionFlows, str, str], Awaitable[Any]]] = {
    "get": lambda flows, flow, task: flows.get(flow),
    "list": lambda flows, flow, task: flows.list(after=flow, status="queued"),
    "find_latest": lambda flows, flow, task: flows.find_latest(),
    "resolve": lambda flows, flow, task: flows.resolve(flow[:-1]),
    "get_task_summary": lambda flows, flow, task: flows.get_task_summary(flow),
    "get_task": lambda flows, flow, task: flows.get_task(task),
    "list_tasks": lambda flows, flow, task: flows.list_tasks(flow),
    "history": lambda flows, flow, task: flows.history(flow),
    "result": lambda flows, flow, task: flows.result(flow),
    "wait_task": lambda flows, flow, task: flows.wait_task(task),
}


async def quick(_: object, value: Any) -> Any:
    return value


async def _settled(runtime: Runtime, flows: SessionFlows) -> None:
    """Wait until whatever was accepted has become durable: one more write of every live flow has."""
    for flow in await flows.list(limit=1000):
        await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="probe")


async def _told_once_and_whole(flows: SessionFlows, flow_id: str) -> None:
    """The flow is what its history says, so nothing was half done."""
    for task in await flows.list_tasks(flow_id):
        if task.runtime == "task":
            # Launched: it goes on by itself while we look, so let it end first.
            await flows.wait_task(task.task_id)
    flow = await flows.get(flow_id)
    assert flow is not None
    events = await flows.history(flow_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    own = [event for event in events if event.task_id is None]
    assert [event.revision for event in own] == list(range(flow.revision + 1))
    state: dict[str, Any] = {}
    for event in own:
        state |= event.changed
    assert state["status"] == flow.status
    assert state.get("stateJson") == flow.state_json
    assert state.get("waitJson") == flow.wait_json
    summary = await flows.get_task_summary(flow_id)
    created = [event for event in events if event.type == "task.created"]
    ended = [event for event in events if event.type == "task.ended"]
    assert summary is not None
    assert (summary.total, summary.terminal) == (len(created), len(ended))


@pytest.mark.parametrize("name", CHANGING)
async def test_a_cancelled_mutation_is_applied_or_not_and_the_flow_goes_on(
    store: Where, name: str
) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        for rounds in ROUNDS:
            flow = await make(flows, state_json=1)
            task = await link(flows, flow.flow_id, status="queued")
            known = len(await flows.list(limit=1000))
            caller = asyncio.ensure_future(CHANGING[name](flows, flow.flow_id, task.task_id))

            await step(rounds)
            caller.cancel()
            await asyncio.wait({caller}, timeout=PATIENCE)

            assert caller.done()
            with anyio.fail_after(PATIENCE):
                await _settled(runtime, flows)
                await _told_once_and_whole(flows, flow.flow_id)
                now = await flows.get(flow.flow_id)
                assert now is not None
                again = await flows.update(
                    flow_id=flow.flow_id, expected_revision=now.revision, state_json="next"
                )
                assert again.applied or now.ended_at is not None
                assert len(await flows.list(limit=1000)) - known in {0, 1}
        assert runtime.statistics().waiting_mutations == 0
        assert runtime.statistics().failed_writes == 0

    async with open_runtime(store) as runtime:
        assert (await bound(runtime).list(limit=1))[0].owner_key


@pytest.mark.parametrize("name", CHANGING)
async def test_a_mutation_inside_a_scope_that_is_cancelled_is_applied_or_not(
    store: Where, name: str
) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        for rounds in ROUNDS:
            flow = await make(flows, state_json=1)
            task = await link(flows, flow.flow_id, status="queued")

            async with anyio.create_task_group() as group:

                async def call(flow_id: str, task_id: str) -> None:
                    await CHANGING[name](flows, flow_id, task_id)

                group.start_soon(call, flow.flow_id, task.task_id)
                await step(rounds)
                group.cancel_scope.cancel()

            with anyio.fail_after(PATIENCE):
                await _settled(runtime, flows)
                await _told_once_and_whole(flows, flow.flow_id)


@pytest.mark.parametrize("name", [*CHANGING, *LOOKING])
async def test_a_call_in_a_scope_cancelled_beforehand_leaves_no_trace_but_its_own(
    flows: SessionFlows, name: str
) -> None:
    flow = await make(flows, state_json=1)
    task = await link(flows, flow.flow_id, status="queued")
    call = (CHANGING | LOOKING)[name]

    with anyio.move_on_after(0):
        await call(flows, flow.flow_id, task.task_id)

    with anyio.fail_after(PATIENCE):
        await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="probe")
        await _told_once_and_whole(flows, flow.flow_id)


@pytest.mark.parametrize("name", LOOKING)
async def test_a_cancelled_read_leaves_the_reader_usable(store: Where, name: str) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows, state_json=1)
        task = await link(flows, flow.flow_id)
        for rounds in ROUNDS:
            caller = asyncio.ensure_future(LOOKING[name](flows, flow.flow_id, task.task_id))

            await step(rounds)
            caller.cancel()
            await asyncio.wait({caller}, timeout=PATIENCE)

            assert caller.done()
            with anyio.fail_after(PATIENCE):
                assert await flows.get_task(task.task_id) == task
                assert await flows.resolve(flow.flow_id) == flow

        # Whoever stopped waiting is not waited for.
        await flows.complete_task(task.task_id)
        assert (await flows.finish(flow_id=flow.flow_id, expected_revision=0)).applied


async def test_half_of_many_callers_cancelled_anywhere_lose_nothing_of_the_others(
    store: Where,
) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        for rounds in ROUNDS:
            flow = await make(flows)
            callers = [
                asyncio.create_task(
                    flows.run_task(
                        flow_id=flow.flow_id, runtime="acp", task="t", run_id=str(number)
                    )
                )
                for number in range(40)
            ]

            await step(rounds)
            for caller in callers[::2]:
                caller.cancel()
            answers = await asyncio.gather(*callers, return_exceptions=True)

            assert all(answer.created for answer in answers[1::2])  # type: ignore[union-attr]
            await _told_once_and_whole(flows, flow.flow_id)
            found = {task.run_id for task in await flows.list_tasks(flow.flow_id)}
            assert found >= {str(number) for number in range(1, 40, 2)}


async def test_a_cancelled_cancel_is_not_taken_back(store: Where) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        for rounds in ROUNDS[2:]:
            flow = await make(flows)
            await link(flows, flow.flow_id)
            caller = asyncio.create_task(flows.cancel(flow.flow_id))

            await step(rounds)
            accepted = caller.done() or (await flows.get(flow.flow_id)).cancel_requested_at  # type: ignore[union-attr]
            caller.cancel()
            await asyncio.wait({caller})

            if accepted:
                with anyio.fail_after(PATIENCE):
                    assert (await flows.result(flow.flow_id)).status == "cancelled"


async def test_a_controllers_flow_survives_the_cancelled_caller_that_made_it(
    store: Where,
) -> None:
    registry = Registry()

    @registry.controller("c")
    async def drive(flow: FlowContext) -> None:
        await flow.update(state_json="driven")

    async with open_runtime(store, registry=registry) as runtime:
        flows = bound(runtime)
        for rounds in ROUNDS:
            caller = asyncio.create_task(make(flows, controller_id="c", flow_id=f"f{rounds}"))
            await step(rounds)
            caller.cancel()
            await asyncio.wait({caller})

        with anyio.fail_after(PATIENCE):
            await make(flows, controller_id="c", flow_id="last")
            for flow in await flows.list(limit=100):
                end = await flows.result(flow.flow_id)
                assert (end.status, end.state_json) == ("succeeded", "driven")


async def test_opening_that_is_cancelled_leaves_the_store_free(store: Where) -> None:
    for rounds in ROUNDS:
        opening = asyncio.create_task(open_runtime(store).__aenter__())
        await step(rounds)
        opening.cancel()
        await asyncio.wait({opening}, timeout=PATIENCE)
        if not opening.cancelled():
            await opening.result().aclose()

        with anyio.fail_after(PATIENCE):
            async with open_runtime(store) as runtime:
                await make(bound(runtime), flow_id=f"f{rounds}")
    gc.collect()
