"""Detached work: one task, and a flow that does nothing but follow it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from flowstead import (
    Created,
    Flow,
    FlowContext,
    InvalidState,
    Limits,
    NeedsReview,
    Nested,
    Retry,
    SessionFlows,
    TaskContext,
    Transient,
)
from flowstead.testing import Crashed, Simulation
from tests.runtime.support import OWNER, STRANGER, Lives, bound


def _spawn(lives: Lives, **given: Any) -> Created:
    made = lives.play(lives.flows.spawn_detached(**{"task": "report"} | given))
    assert made.created
    return made


async def double(_: TaskContext, number: int) -> int:
    await asyncio.sleep(1)
    return 2 * number


async def forever(_: TaskContext, __: Any) -> None:
    await asyncio.get_running_loop().create_future()


# ---- following ------------------------------------------------------------------------------------


def test_a_launched_task_has_a_flow_that_ends_with_it(lives: Lives) -> None:
    made = _spawn(lives, run=double, input_json=21)
    assert (made.flow.status, made.flow.revision, made.flow.sync_mode) == (
        "queued",
        0,
        "task_mirrored",
    )
    lives.pass_time(0.5)
    assert lives.flow(made.flow.flow_id).status == "running"

    ended = lives.result(made.flow.flow_id)

    task = lives.task(made.task.task_id)
    assert (task.status, task.result_json) == ("succeeded", 42)
    assert (ended.status, ended.revision, ended.failure) == ("succeeded", 2, None)
    assert ended.ended_at == task.ended_at
    assert lives.told(made.flow.flow_id) == [
        "flow.created",
        "task.created",
        "task.started",
        "flow.started",
        "task.ended",
        "flow.succeeded",
    ]


async def _complete(flows: SessionFlows, task_id: str) -> None:
    await flows.complete_task(task_id, result_json=1)


def _fail(status: str) -> Callable[[SessionFlows, str], Awaitable[Any]]:
    return lambda flows, task_id: flows.fail_task(task_id, error="no luck", status=status)


async def _cancel_task(flows: SessionFlows, task_id: str) -> None:
    assert (await flows.cancel_task(task_id)).cancelled


ENDS: dict[str, tuple[Callable[[SessionFlows, str], Awaitable[Any]], str, str, str | None]] = {
    "completed": (_complete, "succeeded", "succeeded", None),
    "failed": (_fail("failed"), "failed", "failed", "no luck"),
    "timed out": (_fail("timed_out"), "timed_out", "failed", "no luck"),
    "cancelled elsewhere": (_fail("cancelled"), "cancelled", "cancelled", "no luck"),
    "cancelled here": (_cancel_task, "cancelled", "cancelled", "task cancelled"),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("begun", ["queued", "running"])
def test_a_linked_task_s_end_is_its_flow_s_end(lives: Lives, how: str, begun: str) -> None:
    end, task_status, flow_status, message = ENDS[how]
    made = _spawn(lives, runtime="acp", status=begun)
    assert made.flow.status == begun

    lives.play(end(lives.flows, made.task.task_id))

    ended = lives.result(made.flow.flow_id)
    assert lives.task(made.task.task_id).status == task_status
    assert (ended.status, ended.revision) == (flow_status, 1)
    assert (ended.failure.message if ended.failure else None) == message


def test_a_linked_task_that_is_reported_as_started_runs_its_flow(lives: Lives) -> None:
    made = _spawn(lives, runtime="subagent", child_session_key="agent:sub")

    lives.play(lives.flows.start_task(made.task.task_id))

    assert (lives.flow(made.flow.flow_id).status, lives.flow(made.flow.flow_id).revision) == (
        "running",
        1,
    )
    lives.play(lives.flows.progress_task(made.task.task_id, summary="half"))
    assert lives.flow(made.flow.flow_id).revision == 1
    assert lives.task(made.task.task_id).child_session_key == "agent:sub"


def test_a_task_that_ends_without_what_it_was_for_blocks_its_flow_until_it_is_cancelled(
    lives: Lives,
) -> None:
    made = _spawn(lives, runtime="acp", status="running")

    lives.play(
        lives.flows.complete_task(
            made.task.task_id, terminal_outcome="blocked", terminal_summary="needs a\n  key"
        )
    )

    flow = lives.flow(made.flow.flow_id)
    assert (flow.status, flow.ended_at) == ("blocked", None)
    assert (flow.blocked_task_id, flow.blocked_summary) == (made.task.task_id, "needs a key")
    report = lives.play(lives.flows.cancel(flow.flow_id))
    assert report.cancelled and report.flow is not None
    assert report.flow.status == "cancelled"


def test_a_flow_is_what_its_task_says_through_retries_and_reviews(lives: Lives) -> None:
    @lives.registry.task(retry=Retry(max_attempts=3, initial=10, jitter=0))
    async def moody(context: TaskContext, mood: str) -> str:
        if context.attempt == 1:
            raise Transient("not yet")
        if mood == "bad":
            raise NeedsReview("cheer me up")
        return mood

    made = _spawn(lives, run="moody", input_json="bad")
    flow_id, task_id = made.flow.flow_id, made.task.task_id
    lives.pass_time(5)
    assert lives.flow(flow_id).status == "queued"
    lives.pass_time(6)

    blocked = lives.flow(flow_id)
    assert (blocked.status, blocked.blocked_task_id) == ("blocked", task_id)
    assert blocked.blocked_summary == "'report' needs review: cheer me up"
    refused = lives.play(lives.flows.resume(flow_id=flow_id, expected_revision=blocked.revision))
    assert refused.code == "not_managed"

    report = lives.play(lives.flows.retry_task(task_id, input_json="good"))

    assert report.retried
    ended = lives.result(flow_id)
    assert (ended.status, ended.blocked_task_id, ended.blocked_summary) == ("succeeded", None, None)
    assert lives.task(task_id).result_json == "good"


def test_giving_up_on_a_task_in_review_ends_its_flow_as_cancelled(lives: Lives) -> None:
    async def hopeless(_: TaskContext, __: Any) -> None:
        raise NeedsReview("what now?")

    made = _spawn(lives, run=hopeless)
    lives.pass_time(1)
    assert lives.flow(made.flow.flow_id).status == "blocked"

    assert lives.play(lives.flows.cancel_task(made.task.task_id)).cancelled

    assert lives.result(made.flow.flow_id).status == "cancelled"


# ---- making ---------------------------------------------------------------------------------------


def test_the_flow_is_found_like_any_other(lives: Lives) -> None:
    flows = lives.face(
        lambda runtime: runtime.tasks.flow.bind_session(
            session_key=OWNER, requester_origin={"channel": "chat"}
        )
    )
    made = lives.play(
        flows.spawn_detached(
            task="report",
            runtime="acp",
            correlation_id="crm:1",
            notify_policy="silent",
            run_id="r",
            label="the report",
        )
    )
    flow = made.flow

    assert (flow.goal, flow.controller_id, flow.correlation_id) == ("the report", None, "crm:1")
    assert (flow.requester_origin, flow.notify_policy) == ({"channel": "chat"}, "silent")
    assert made.task.delivery_status == "not_applicable"
    assert lives.play(flows.list()) == [flow]
    assert lives.play(flows.resolve("crm:1")) == flow
    assert lives.children(flow.flow_id) == [made.task]
    stranger = lives.face(lambda runtime: bound(runtime, STRANGER))
    assert lives.play(stranger.list()) == []
    assert lives.play(stranger.get_task(made.task.task_id)) is None


@pytest.mark.parametrize(
    ("given", "goal"),
    [
        ({}, "report"),
        ({"label": "a label"}, "a label"),
        ({"label": "a label", "goal": "a goal"}, "a goal"),
        ({"goal": "  "}, "report"),
    ],
)
def test_what_it_is_for_is_the_goal_or_the_label_or_the_task(
    lives: Lives, given: dict[str, str], goal: str
) -> None:
    assert _spawn(lives, runtime="acp", **given).flow.goal == goal


def test_an_input_that_is_not_json_makes_nothing(lives: Lives) -> None:
    assert lives.runtime

    with pytest.raises(InvalidState, match=r"^input_json\[1\] "):
        lives.play(lives.flows.spawn_detached(task="t", run=double, input_json=[1, object()]))

    assert lives.play(lives.flows.list()) == []
    assert not lives.runtime._code.functions._bound


def test_the_same_call_twice_is_twice_the_work(lives: Lives) -> None:
    first, second = (_spawn(lives, run=double, input_json=1, run_id="r") for _ in range(2))

    assert first.flow.flow_id != second.flow.flow_id
    assert lives.result(first.flow.flow_id).status == "succeeded"
    assert lives.result(second.flow.flow_id).status == "succeeded"


def test_a_nested_flow_can_be_detached(lives: Lives) -> None:
    @lives.registry.controller("part")
    async def part(flow: FlowContext) -> None:
        await flow.finish(state_json=[flow.state_json])

    made = _spawn(lives, run=Nested("part"), input_json="x")

    assert lives.result(made.flow.flow_id).status == "succeeded"
    assert lives.task(made.task.task_id).result_json == ["x"]


def test_detached_tasks_share_the_runtime_s_slots(lives: Lives) -> None:
    lives.limits = Limits(running_in_all=2)
    at_once: list[int] = []
    running: set[str] = set()

    async def probe(context: TaskContext, _: Any) -> None:
        running.add(context.task_id)
        at_once.append(len(running))
        await asyncio.sleep(1)
        running.discard(context.task_id)

    made = [_spawn(lives, run=probe) for _ in range(6)]
    began = lives.now()

    for one in made:
        assert lives.result(one.flow.flow_id).status == "succeeded"

    assert max(at_once) == 2
    assert 2900 <= lives.now() - began <= 3200


# ---- nobody else changes it -----------------------------------------------------------------------

MUTATIONS: dict[str, Callable[[SessionFlows, Flow], Awaitable[Any]]] = {
    name: (
        lambda flows, flow, name=name: getattr(flows, name)(
            flow_id=flow.flow_id, expected_revision=flow.revision
        )
    )
    for name in ("set_waiting", "resume", "update", "finish", "fail", "request_cancel")
} | {
    "run_task": lambda flows, flow: flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t"),
    "run_task, launched": lambda flows, flow: flows.run_task(
        flow_id=flow.flow_id, run=double, task="t"
    ),
    "retry_flow": lambda flows, flow: flows.retry_flow(flow.flow_id),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("standing", ["running", "blocked", "ended"])
def test_nothing_else_changes_it(lives: Lives, name: str, standing: str) -> None:
    made = _spawn(lives, runtime="acp", status="running")
    if standing != "running":
        outcome = "blocked" if standing == "blocked" else None
        lives.play(lives.flows.complete_task(made.task.task_id, terminal_outcome=outcome))
    flow, history = lives.flow(made.flow.flow_id), lives.history(made.flow.flow_id)

    answer = lives.play(MUTATIONS[name](lives.flows, flow))

    assert answer.code == "not_managed"
    assert answer.reason in (
        "Flow is not managed by its owner.",
        "Flow does not accept managed child tasks.",
    )
    assert lives.flow(flow.flow_id) == flow and lives.history(flow.flow_id) == history
    assert not lives.runtime._code.functions._bound


@pytest.mark.parametrize("kind", ["launched", "linked", "queued"])
def test_cancelling_the_flow_cancels_the_task(lives: Lives, kind: str) -> None:
    given: dict[str, Any] = {
        "launched": {"run": forever},
        "linked": {"runtime": "acp", "status": "running"},
        "queued": {"runtime": "acp"},
    }[kind]
    made = _spawn(lives, **given)
    lives.pass_time(1)

    report = lives.play(lives.flows.cancel(made.flow.flow_id))

    assert (report.cancelled, report.code) == (True, None)
    assert report.flow is not None and report.flow.status == "cancelled"
    assert [(line.task_id, line.state, line.status) for line in report.descendants] == [
        (made.task.task_id, "settled", "cancelled")
    ]
    again = lives.play(lives.flows.cancel(made.flow.flow_id))
    assert (again.cancelled, again.code) == (False, "terminal")


# ---- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "close"])
def test_a_registered_task_goes_on_in_the_next_process(lives: Lives, how: str) -> None:
    ran: Counter[int] = Counter()

    @lives.registry.task
    async def work(context: TaskContext, _: Any) -> str:
        ran[context.attempt] += 1
        await asyncio.sleep(1)
        return "done"

    made = _spawn(lives, run="work")
    lives.pass_time(0.5)

    lives.restart(how)

    assert lives.flows and lives.result(made.flow.flow_id).status == "succeeded"
    assert lives.task(made.task.task_id).result_json == "done"
    assert ran == ({1: 1, 2: 1} if how == "kill" else {1: 2})


@pytest.mark.parametrize("what", ["not registered", "not idempotent"])
def test_a_task_that_cannot_go_on_leaves_its_flow_lost(lives: Lives, what: str) -> None:
    lives.registry.task(name="once", idempotent=False)(forever)
    made = _spawn(lives, run="once" if what == "not idempotent" else double, input_json=1)
    lives.pass_time(0.5)

    lives.restart("kill")

    assert lives.flows
    ended = lives.result(made.flow.flow_id)
    assert (ended.status, lives.task(made.task.task_id).status) == ("lost", "lost")
    assert ended.failure is not None and ended.failure.kind == "interrupted"
    assert ended.failure == lives.task(made.task.task_id).failure


def test_a_crash_at_any_step_leaves_the_flow_with_its_task_or_neither() -> None:
    left: Counter[int] = Counter()
    for after in range(30):
        with Simulation() as world:
            lives = Lives(world)
            lives.registry.task(name="double")(double)
            assert lives.flows
            world.crash(after=after)
            with suppress(Crashed):
                lives.play(lives.flows.spawn_detached(task="t", run="double", input_json=2))
            lives.die()
            found = lives.play(lives.flows.list())
            left[len(found)] += 1
            for flow in found:
                assert lives.result(flow.flow_id).status == "succeeded"
                [task] = lives.children(flow.flow_id)
                assert task.result_json == 4
            lives.end()
    assert left[0] and left[1], "vacuous: the crashes all came on one side of the commit"
