"""Cancelled callers on a real event loop, with SQLite on its threads: the essence, on any machine's timing.

Every call at every await is the business of `test_cancel_contract`, which needs a loop of its own for that.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead import FlowContext, Registry, Runtime, SessionFlows, open_runtime
from tests.runtime.support import PATIENCE, bound, link, make, step

ROUNDS = (*range(14), 30, 80, 200, 500)
"""After how many rounds of the event loop to cancel: past the end of a call in memory and in a file."""

CHANGING: dict[str, Callable[[SessionFlows, str, str], Awaitable[Any]]] = {
    "create_managed key": lambda flows, flow, task: make(flows, idempotency_key=f"key-{flow}"),
    "set_waiting": lambda flows, flow, task: flows.set_waiting(
        flow_id=flow, expected_revision=0, state_json=2, wait_json={"kind": "x"}
    ),
    "cancel": lambda flows, flow, task: flows.cancel(flow),
    "run_task run=": lambda flows, flow, task: flows.run_task(
        flow_id=flow, task="t", run=quick, run_id="r"
    ),
    "complete_task": lambda flows, flow, task: flows.complete_task(task, result_json=1),
}

LOOKING: dict[str, Callable[[SessionFlows, str, str], Awaitable[Any]]] = {
    "list": lambda flows, flow, task: flows.list(after=flow, status="queued"),
    "history": lambda flows, flow, task: flows.history(flow),
    "result": lambda flows, flow, task: flows.result(flow),
}


async def quick(_: object, value: Any) -> Any:
    return value


async def _settled(runtime: Runtime, flows: SessionFlows) -> None:
    """Wait until whatever was accepted has become durable: one more write of every live flow has."""
    for flow in await flows.list(limit=1000):
        await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="probe")


async def told_once_and_whole(flows: SessionFlows, flow_id: str) -> None:
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
    db: Path, name: str
) -> None:
    async with open_runtime(db) as runtime:
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
                await told_once_and_whole(flows, flow.flow_id)
                now = await flows.get(flow.flow_id)
                assert now is not None
                again = await flows.update(
                    flow_id=flow.flow_id, expected_revision=now.revision, state_json="next"
                )
                assert again.applied or now.ended_at is not None
                assert len(await flows.list(limit=1000)) - known in {0, 1}
        assert runtime.statistics().waiting_mutations == 0
        assert runtime.statistics().failed_writes == 0

    async with open_runtime(db) as runtime:
        assert (await bound(runtime).list(limit=1))[0].owner_key


@pytest.mark.parametrize("name", LOOKING)
async def test_a_cancelled_read_leaves_the_reader_usable(db: Path, name: str) -> None:
    async with open_runtime(db) as runtime:
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

        # Whoever stopped waiting is not waited for.
        assert (await flows.finish(flow_id=flow.flow_id, expected_revision=0)).applied


async def test_half_of_many_callers_cancelled_anywhere_lose_nothing_of_the_others(
    db: Path,
) -> None:
    async with open_runtime(db) as runtime:
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
            await told_once_and_whole(flows, flow.flow_id)
            found = {task.run_id for task in await flows.list_tasks(flow.flow_id)}
            assert found >= {str(number) for number in range(1, 40, 2)}


async def test_a_controllers_flow_survives_the_cancelled_caller_that_made_it(
    db: Path,
) -> None:
    registry = Registry()

    @registry.controller("c")
    async def drive(flow: FlowContext) -> None:
        await flow.update(state_json="driven")

    async with open_runtime(db, registry=registry) as runtime:
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


async def test_opening_that_is_cancelled_leaves_the_store_free(db: Path) -> None:
    for rounds in ROUNDS:
        opening = asyncio.create_task(open_runtime(db).__aenter__())
        await step(rounds)
        opening.cancel()
        await asyncio.wait({opening}, timeout=PATIENCE)
        if not opening.cancelled():
            await opening.result().aclose()

        with anyio.fail_after(PATIENCE):
            async with open_runtime(db) as runtime:
                await make(bound(runtime), flow_id=f"f{rounds}")
    gc.collect()
