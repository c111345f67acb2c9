"""What the worlds have found, each as the smallest run that shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from flowstead import Created, Registry, Retry, Runtime, TaskContext
from flowstead.model.command import Recover, ReleaseTasks
from flowstead.model.task import Launch, OnRestart
from flowstead.rules.decide import decide
from flowstead.rules.view import Decision
from flowstead.store.codec import FlowWrite
from flowstead.testing import CALM, Faults, Schedule, Simulation
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
