"""Owners: what belongs to another cannot be told apart from what is not there, by any method."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from flowstead import FlowNotFound, Runtime, SessionFlows, open_runtime
from tests.runtime.support import (
    OWNER,
    PATIENCE,
    STRANGER,
    Where,
    answer_of,
    bound,
    dump,
    link,
    make,
    step,
)

Call = Callable[[SessionFlows, str, str], Awaitable[Any]]

UNKNOWN_FLOW = "nothing-20260101T000000000-00000000"
UNKNOWN_TASK = "00000000-0000-7000-8000-000000000000"


async def _entered(flows: SessionFlows, flow_id: str, **given: Any) -> str:
    async with flows.watch(flow_id, **given):
        return "entered"


CALLS: dict[str, list[Call]] = {
    "create_managed": [],
    "find_latest": [lambda flows, flow, task: flows.find_latest()],
    "list": [
        lambda flows, flow, task: flows.list(),
        lambda flows, flow, task: flows.list(after=flow),
        lambda flows, flow, task: flows.list(correlation_id="crm:1"),
        lambda flows, flow, task: flows.list(controller_id="shop/triage"),
    ],
    "get": [lambda flows, flow, task: flows.get(flow)],
    "resolve": [
        lambda flows, flow, task: flows.resolve(flow),
        lambda flows, flow, task: flows.resolve(flow[:-2]),
        lambda flows, flow, task: flows.resolve(flow[:4]),
        lambda flows, flow, task: flows.resolve("crm:1"),
        lambda flows, flow, task: flows.resolve(STRANGER),
    ],
    "get_task_summary": [
        lambda flows, flow, task: flows.get_task_summary(flow),
        lambda flows, flow, task: flows.get_task_summary(flow, nested=True),
    ],
    "run_task": [
        lambda flows, flow, task: flows.run_task(flow_id=flow, runtime="acp", task="t"),
        lambda flows, flow, task: flows.run_task(flow_id=flow, runtime="acp", task="t", run_id="r"),
        lambda flows, flow, task: flows.run_task(
            flow_id=flow, runtime="acp", task="t", input_json=float("nan")
        ),
        lambda flows, flow, task: flows.run_task(flow_id=flow, task="t", run=quick),
    ],
    "get_task": [lambda flows, flow, task: flows.get_task(task)],
    "list_tasks": [
        lambda flows, flow, task: flows.list_tasks(flow),
        lambda flows, flow, task: flows.list_tasks(flow, status="running"),
    ],
    "wait_task": [lambda flows, flow, task: flows.wait_task(task)],
    "start_task": [lambda flows, flow, task: flows.start_task(task)],
    "progress_task": [lambda flows, flow, task: flows.progress_task(task, summary="x")],
    "complete_task": [
        lambda flows, flow, task: flows.complete_task(task, result_json=1),
        lambda flows, flow, task: flows.complete_task(task, result_json=float("nan")),
    ],
    "fail_task": [lambda flows, flow, task: flows.fail_task(task, error="x")],
    "cancel_task": [lambda flows, flow, task: flows.cancel_task(task)],
    "retry_task": [
        lambda flows, flow, task: flows.retry_task(task),
        lambda flows, flow, task: flows.retry_task(task, input_json=float("nan")),
    ],
    "retry_flow": [lambda flows, flow, task: flows.retry_flow(flow)],
    "spawn_detached": [],
    "set_waiting": [
        lambda flows, flow, task: flows.set_waiting(flow_id=flow, expected_revision=0),
        lambda flows, flow, task: flows.set_waiting(flow_id=flow, expected_revision=7),
    ],
    "resume": [
        lambda flows, flow, task: flows.resume(flow_id=flow, expected_revision=0),
        lambda flows, flow, task: flows.resume(flow_id=flow, expected_revision=7),
    ],
    "update": [
        lambda flows, flow, task: flows.update(flow_id=flow, expected_revision=0),
        lambda flows, flow, task: flows.update(
            flow_id=flow, expected_revision=0, state_json=float("nan")
        ),
    ],
    "finish": [lambda flows, flow, task: flows.finish(flow_id=flow, expected_revision=0)],
    "fail": [lambda flows, flow, task: flows.fail(flow_id=flow, expected_revision=0)],
    "request_cancel": [
        lambda flows, flow, task: flows.request_cancel(flow_id=flow, expected_revision=0)
    ],
    "cancel": [
        lambda flows, flow, task: flows.cancel(flow),
        lambda flows, flow, task: flows.cancel(flow, expected_revision=0),
    ],
    "history": [
        lambda flows, flow, task: flows.history(flow),
        lambda flows, flow, task: flows.history(flow, after_seq=1),
    ],
    "result": [lambda flows, flow, task: flows.result(flow)],
    "signal": [
        lambda flows, flow, task: flows.signal(flow_id=flow),
        lambda flows, flow, task: flows.signal(flow_id=flow, id="s-1"),
        lambda flows, flow, task: flows.signal(flow_id=flow, name="answer"),
        lambda flows, flow, task: flows.signal(flow_id=flow, name="answer", id="s-1"),
        lambda flows, flow, task: flows.signal(flow_id=flow, payload=float("nan")),
        lambda flows, flow, task: flows.signal(token=flow),
        lambda flows, flow, task: flows.signal(thread=1, lifetime=None),
    ],
    "tell": [
        lambda flows, flow, task: flows.tell(flow, "x"),
        lambda flows, flow, task: flows.tell(flow, "x", id="s-1"),
        lambda flows, flow, task: flows.tell(flow, float("nan")),
    ],
    "ask": [
        lambda flows, flow, task: flows.ask(flow, "x"),
        lambda flows, flow, task: flows.ask(flow, "x", inbox="other"),
    ],
    "vote": [
        lambda flows, flow, task: flows.vote(
            "approve", approver="me", digest="d", flow_id=flow, name="approval"
        ),
        lambda flows, flow, task: flows.vote("reject", approver="me", digest="d", token=flow),
    ],
    "list_waits": [
        lambda flows, flow, task: flows.list_waits(),
        lambda flows, flow, task: flows.list_waits(flow),
    ],
    "list_updates": [
        lambda flows, flow, task: flows.list_updates(),
        lambda flows, flow, task: flows.list_updates(flow),
    ],
    "watch": [
        lambda flows, flow, task: _entered(flows, flow),
        lambda flows, flow, task: _entered(flows, flow, after_seq=0),
        lambda flows, flow, task: _entered(flows, flow, after_seq=5),
    ],
}
"""Every method of a handle, with what a stranger might try on it."""


async def quick(_: object, value: Any) -> Any:
    return value


def test_every_method_of_a_handle_is_tried() -> None:
    public = {
        name
        for name, member in inspect.getmembers(SessionFlows, inspect.isfunction)
        if not name.startswith("_")
    }

    assert public == CALLS.keys()


class Stage:
    """A runtime on which another owner has a flow with a child."""

    def __init__(self, runtime: Runtime, flow_id: str, task_id: str) -> None:
        self.runtime = runtime
        self.flow_id = flow_id
        self.task_id = task_id


async def _settle_in(runtime: Runtime) -> tuple[str, str]:
    flows = bound(runtime, STRANGER, requester_origin={"channel": "secret"})
    flow = await make(flows, correlation_id="crm:1", state_json={"secret": 1})
    task = await link(flows, flow.flow_id, run_id="r")
    await make(flows, status="waiting", wait_json={"thread": 1, "prompt": "secret"})
    return flow.flow_id, task.task_id


@pytest.fixture(params=["in memory", "on disk"])
async def stage(request: pytest.FixtureRequest, store: Where) -> AsyncIterator[Stage]:
    if request.param == "on disk":
        async with open_runtime(store) as earlier:
            ids = await _settle_in(earlier)
        async with open_runtime(store) as runtime:
            yield Stage(runtime, *ids)
    else:
        async with open_runtime(store) as runtime:
            yield Stage(runtime, *(await _settle_in(runtime)))


async def test_anothers_ids_are_answered_to_the_byte_like_ids_of_nothing(
    store: Where, stage: Stage
) -> None:
    mine = bound(stage.runtime)
    before = dump(store)

    for name, calls in CALLS.items():
        for number, call in enumerate(calls):
            foreign = await answer_of(call(mine, stage.flow_id, stage.task_id))
            unknown = await answer_of(call(mine, UNKNOWN_FLOW, UNKNOWN_TASK))

            told = foreign.replace(stage.flow_id, "?")
            assert (name, number, told) == (name, number, unknown.replace(UNKNOWN_FLOW, "?"))
            assert "secret" not in foreign and stage.task_id not in foreign
        assert dump(store) == before, name


async def test_a_strangers_mutations_never_reach_the_owners_waiters(
    stage: Stage,
) -> None:
    owner, mine = bound(stage.runtime, STRANGER), bound(stage.runtime)
    waiters = [
        asyncio.create_task(owner.result(stage.flow_id)),
        asyncio.create_task(owner.wait_task(stage.task_id)),
    ]
    await step(20)

    for calls in CALLS.values():
        for call in calls:
            await answer_of(call(mine, stage.flow_id, stage.task_id))

    assert not any(waiter.done() for waiter in waiters)
    await owner.complete_task(stage.task_id)
    await owner.finish(flow_id=stage.flow_id, expected_revision=0)
    async with asyncio.timeout(PATIENCE):
        assert (await waiters[0]).status == "succeeded"
        await waiters[1]


async def test_two_owners_may_use_the_same_id(store: Where) -> None:
    async with open_runtime(store) as runtime:
        mine, theirs = bound(runtime), bound(runtime, STRANGER)
        my_flow = await make(mine, flow_id="order-17", state_json="mine")
        their_flow = await make(theirs, flow_id="order-17", state_json="theirs")
        my_task = await link(mine, "order-17", run_id="r")
        their_task = await link(theirs, "order-17", run_id="r")

        done = await mine.finish(flow_id="order-17", expected_revision=0)

        assert my_task.task_id != their_task.task_id
        assert await theirs.get("order-17") == their_flow
        assert await theirs.list_tasks("order-17") == [their_task]
        assert await mine.list_tasks("order-17") == [my_task]
        assert [event.actor for event in await theirs.history("order-17")] == [STRANGER] * 2
        assert [event.actor for event in await mine.history("order-17")] == [OWNER] * 3
        assert done.unwrap().state_json == my_flow.state_json

    async with open_runtime(store) as runtime:
        assert await bound(runtime, STRANGER).get("order-17") == their_flow
        assert await bound(runtime).get("order-17") == done.flow


async def test_watching_everything_shows_only_ones_own(runtime: Runtime) -> None:
    mine, theirs = bound(runtime), bound(runtime, STRANGER)
    await make(theirs, flow_id="f")
    seen = []

    async with mine.watch(after_position=0) as events:
        await make(theirs, flow_id="g")
        await make(mine, flow_id="f")
        await theirs.update(flow_id="f", expected_revision=0)
        await mine.update(flow_id="f", expected_revision=0)
        with anyio.fail_after(PATIENCE):
            async for event in events:
                seen.append((event.flow_id, event.actor, event.type))
                if len(seen) == 2:
                    break

    assert seen == [("f", OWNER, "flow.created"), ("f", OWNER, "flow.updated")]


@pytest.mark.parametrize("owner", [OWNER, STRANGER])
@pytest.mark.parametrize("after_seq", [None, 0, 3])
async def test_watching_anothers_flow_is_refused_on_entering(
    runtime: Runtime, owner: str, after_seq: int | None
) -> None:
    await make(bound(runtime, "agent:third"), flow_id="theirs")

    with pytest.raises(FlowNotFound, match=r"^Flow not found\.$"):
        async with bound(runtime, owner).watch("theirs", after_seq=after_seq):
            pass  # pragma: no cover


@pytest.mark.parametrize(
    "variant",
    [
        "AGENT:MAIN",
        "agent:main ü",
        "agent:m\u0430in",
        "agent:main\u0301",
        "agent:main/",
        "agent%",
        "agent_main",
        "agent:main' OR '1'='1",
        "agent:main--",
        "*",
    ],
)
async def test_owners_that_look_alike_are_different_owners(runtime: Runtime, variant: str) -> None:
    flow = await make(bound(runtime, "agent:main"))
    try:
        other = bound(runtime, variant)
    except ValueError:
        return

    assert await other.get(flow.flow_id) is None
    assert await other.list() == []
    assert await other.resolve("agent:main") is None


@pytest.mark.parametrize("spelling", [" agent:main", "agent:main\n", "\tagent:main \u3000"])
async def test_whitespace_around_an_owner_is_not_part_of_it(
    runtime: Runtime, spelling: str
) -> None:
    flow = await make(bound(runtime, "agent:main"))

    assert await bound(runtime, spelling).get(flow.flow_id) == flow


@pytest.mark.parametrize(
    "key",
    [
        "agent:u\u0308",
        "agent:\u200bmain",
        "agent:\x00main",
        "agent\nmain",
        "agent:\u202emain",
        "agent:\ud800",
        "\u212b",
        "x" * 513,
        "ü" * 257,
    ],
    ids=ascii,
)
async def test_an_owner_with_more_than_one_spelling_is_refused(runtime: Runtime, key: str) -> None:
    with pytest.raises(ValueError, match="session_key"):
        bound(runtime, key)


@pytest.mark.parametrize("key", ["über:größe", "日本", "\U0001f600", "x" * 512, "a b", "null", "0"])
async def test_any_printable_owner_has_flows_of_its_own(store: Where, key: str) -> None:
    async with open_runtime(store) as runtime:
        flow = await make(bound(runtime, key))

    async with open_runtime(store) as runtime:
        flows = bound(runtime, key)
        assert await flows.list() == [flow]
        assert await flows.resolve(key) == flow
