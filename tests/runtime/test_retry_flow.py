"""`retry_flow`: an ended flow goes on as a new one, in which what has succeeded answers from the record."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from flowstead import (
    Applied,
    Flow,
    FlowContext,
    FlowNotFound,
    Nested,
    Rejected,
    SessionFlows,
    TaskContext,
    TaskNotRetryable,
    open_runtime,
)
from flowstead.testing import Crashed, FaultyStore, Simulation
from tests.faulty_store import NOT_WRITTEN
from tests.runtime.support import OWNER, STRANGER, Lives, bound, link, make

NEW_WITH_EACH = ("flow_id", "revision", "retry_of", "created_at", "updated_at", "ended_at")


class Kitchen:
    """A controller of three steps, the last of which fails until it is mended. Counts what is run."""

    def __init__(self, lives: Lives) -> None:
        self.ran: Counter[str] = Counter()
        self.is_broken = True
        registry = lives.registry
        registry.task(name="cook")(self.cook)
        registry.controller("kitchen")(self.drive)

    async def cook(self, context: TaskContext, dish: str) -> str:
        self.ran[dish] += 1
        await asyncio.sleep(1)
        if dish == "cake" and self.is_broken:
            raise ValueError("the oven is cold")
        return f"{dish} is ready"

    async def drive(self, flow: FlowContext) -> None:
        soup = await flow.run("cook", "soup", name="soup")
        await flow.update(current_step="main course", state_json={"soup": soup})
        roast = await flow.once("roast", self.roast)
        cake = await flow.run("cook", "cake", name="cake")
        await flow.finish(state_json=[soup, roast, cake])

    async def roast(self) -> str:
        self.ran["roast"] += 1
        return "roast is ready"


def _failed(lives: Lives, **given: Any) -> Flow:
    """A flow of the kitchen's, failed at its last step."""
    flow = lives.play(make(lives.flows, controller_id="kitchen", **given))
    ended = lives.result(flow.flow_id)
    assert ended.status == "failed" and ended.failure is not None
    return ended


def _retry(lives: Lives, flow: Flow) -> Flow:
    answer = lives.play(lives.flows.retry_flow(flow.flow_id))
    assert isinstance(answer, Applied), answer
    return answer.flow


@pytest.fixture
def kitchen(lives: Lives) -> Kitchen:
    return Kitchen(lives)


def test_only_what_has_not_succeeded_is_run_again(lives: Lives, kitchen: Kitchen) -> None:
    failed = _failed(lives)
    kitchen.is_broken = False

    new = _retry(lives, failed)
    ended = lives.result(new.flow_id)

    assert ended.status == "succeeded"
    assert ended.state_json == ["soup is ready", "roast is ready", "cake is ready"]
    assert kitchen.ran == {"soup": 1, "roast": 1, "cake": 2}


def test_the_new_flow_begins_where_the_old_one_stopped(lives: Lives, kitchen: Kitchen) -> None:
    failed = _failed(
        lives,
        correlation_id="crm:1",
        goal="dinner",
        notify_policy="state_changes",
        state_version=3,
        idempotency_key="tonight",
    )

    new = _retry(lives, failed)

    assert new.retry_of == failed.flow_id
    assert new.flow_id != failed.flow_id and new.flow_id.startswith("kitchen-")
    assert (new.revision, new.status, new.failure) == (0, "queued", None)
    assert new.state_json == {"soup": "soup is ready"}
    kept = set(Flow.__struct_fields__) - {*NEW_WITH_EACH, "status", "failure"}
    assert {name: getattr(new, name) for name in kept} == {
        name: getattr(failed, name) for name in kept
    }


def test_the_old_flow_stays_as_it_is(lives: Lives, kitchen: Kitchen) -> None:
    failed = _failed(lives)
    before = (lives.children(failed.flow_id), lives.history(failed.flow_id))
    kitchen.is_broken = False

    lives.result(_retry(lives, failed).flow_id)

    assert lives.flow(failed.flow_id) == failed
    assert (lives.children(failed.flow_id), lives.history(failed.flow_id)) == before


def test_a_new_flow_has_the_finished_children_under_their_step_names(
    lives: Lives, kitchen: Kitchen
) -> None:
    failed = _failed(lives)
    old = lives.children(failed.flow_id)

    new = _retry(lives, failed)

    carried = lives.children(new.flow_id)[:2]
    assert [task.run_id for task in carried] == ["soup", "roast"]
    for task, before in zip(carried, old[:2], strict=True):
        assert task.task_id != before.task_id
        assert task.attempt == 0, "it was never started here"
        renamed = {"task_id": before.task_id, "flow_id": failed.flow_id, "attempt": before.attempt}
        assert msgspec.structs.replace(task, **renamed) == before
        assert lives.task(task.task_id) == task
    told = lives.history(new.flow_id)[:5]
    assert [event.type for event in told] == [
        "flow.created",
        "task.created",
        "task.ended",
        "task.created",
        "task.ended",
    ]
    assert {event.revision for event in told} == {0}
    assert told[0].changed["retryOf"] == failed.flow_id


@pytest.mark.parametrize("how", ["kill", "close"])
def test_asking_again_answers_the_same_new_flow_also_after_a_restart_and_after_its_end(
    lives: Lives, kitchen: Kitchen, how: str
) -> None:
    failed = _failed(lives)
    first = _retry(lives, failed)
    assert _retry(lives, failed).flow_id == first.flow_id

    lives.restart(how)

    assert _retry(lives, failed).flow_id == first.flow_id
    ended = lives.result(first.flow_id)
    assert _retry(lives, failed) == ended
    lives.restart(how)
    assert _retry(lives, failed) == ended
    assert len(lives.play(lives.flows.list())) == 2


def test_many_who_ask_at_once_are_answered_the_same_new_flow(
    lives: Lives, kitchen: Kitchen
) -> None:
    failed = _failed(lives)

    async def all_at_once() -> list[Applied | Rejected]:
        return await asyncio.gather(*(lives.flows.retry_flow(failed.flow_id) for _ in range(8)))

    answers = lives.play(all_at_once())

    assert {answer.code for answer in answers} == {None}
    assert len({answer.unwrap().flow_id for answer in answers}) == 1
    lives.pass_time(10)
    assert len(lives.play(lives.flows.list())) == 2
    assert kitchen.ran == {"soup": 1, "roast": 1, "cake": 2}


def test_a_retry_that_fails_too_is_retried_from_there(lives: Lives, kitchen: Kitchen) -> None:
    first = _failed(lives)
    second = lives.result(_retry(lives, first).flow_id)
    assert second.status == "failed"
    kitchen.is_broken = False

    third = _retry(lives, second)

    assert third.retry_of == second.flow_id
    assert lives.result(third.flow_id).status == "succeeded"
    assert kitchen.ran == {"soup": 1, "roast": 1, "cake": 3}
    assert _retry(lives, first) == second


def test_a_cancelled_flow_can_be_taken_up_again_without_its_intent(
    lives: Lives, kitchen: Kitchen
) -> None:
    flow = lives.play(make(lives.flows, controller_id="kitchen"))
    lives.pass_time(1.5)
    report = lives.play(lives.flows.cancel(flow.flow_id))
    assert report.cancelled and report.flow is not None
    kitchen.is_broken = False

    new = _retry(lives, report.flow)

    assert (new.cancel_requested_at, new.cancel_started_at) == (None, None)
    assert lives.result(new.flow_id).status == "succeeded"
    assert kitchen.ran == {"soup": 1, "roast": 1, "cake": 2}


def test_a_flow_that_fails_by_hand_begins_again_without_what_blocked_it(lives: Lives) -> None:
    flow = lives.play(make(lives.flows, controller_id="nobody", state_json=[1], wait_json={"x": 1}))
    failed = lives.play(
        lives.flows.fail(
            flow_id=flow.flow_id,
            expected_revision=0,
            state_json=[2],
            blocked_task_id="t",
            blocked_summary="no budget",
        )
    ).unwrap()

    new = _retry(lives, failed)

    assert (new.blocked_task_id, new.blocked_summary, new.wait_json) == (None, None, None)
    assert (new.status, new.state_json, new.revision) == ("queued", [2], 0)
    lives.pass_time(100)
    assert lives.flow(new.flow_id) == new


def test_linked_children_that_succeeded_are_carried_and_answer_under_their_run_ids(
    lives: Lives,
) -> None:
    flow = lives.play(make(lives.flows))
    done = lives.play(link(lives.flows, flow.flow_id, run_id="done", label="a label"))
    lives.play(lives.flows.complete_task(done.task_id, result_json={"a": [1]}))
    lost = lives.play(link(lives.flows, flow.flow_id, run_id="failed"))
    lives.play(lives.flows.fail_task(lost.task_id, error="no"))
    failed = lives.play(lives.flows.fail(flow_id=flow.flow_id, expected_revision=0)).unwrap()

    new = _retry(lives, failed)

    [carried] = lives.children(new.flow_id)
    assert (carried.run_id, carried.result_json, carried.label) == ("done", {"a": [1]}, "a label")
    again = lives.play(
        lives.flows.run_task(flow_id=new.flow_id, runtime="acp", task="t", run_id="done")
    )
    assert (again.code, again.task) == ("duplicate", carried)
    fresh = lives.play(link(lives.flows, new.flow_id, run_id="failed"))
    assert fresh.status == "running"


def test_a_map_runs_again_only_for_the_inputs_that_failed(lives: Lives) -> None:
    ran: Counter[int] = Counter()
    bad = {2, 5}

    @lives.registry.task
    async def weigh(_: TaskContext, number: int) -> int:
        ran[number] += 1
        if number in bad:
            raise ValueError(number)
        return number * 10

    @lives.registry.controller("scales")
    async def scales(flow: FlowContext) -> None:
        await flow.finish(state_json=await flow.map("weigh", range(8), limit=3))

    flow = lives.play(make(lives.flows, controller_id="scales"))
    failed = lives.result(flow.flow_id)
    assert failed.status == "failed"
    bad.clear()

    ended = lives.result(_retry(lives, failed).flow_id)

    assert ended.state_json == [number * 10 for number in range(8)]
    assert {number for number, times in ran.items() if times == 2} == {2, 5}
    assert ran.total() == 10


def test_carried_steps_complete_in_the_order_in_which_they_did(lives: Lives) -> None:
    seen: list[list[str]] = []

    @lives.registry.task
    async def nap(_: TaskContext, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @lives.registry.controller("naps")
    async def naps(flow: FlowContext) -> None:
        steps = [await flow.start(nap, float(n), name=f"nap {n}") for n in (3, 1, 2)]
        seen.append([step.name async for step in flow.as_completed(steps)])
        if len(seen) == 1:
            raise ValueError("once more")

    flow = lives.play(make(lives.flows, controller_id="naps"))
    failed = lives.result(flow.flow_id)

    assert lives.result(_retry(lives, failed).flow_id).status == "succeeded"
    assert seen == [["nap 1", "nap 2", "nap 3"]] * 2


def test_a_nested_flow_that_succeeded_is_not_run_again(lives: Lives) -> None:
    ran: Counter[str] = Counter()

    @lives.registry.controller("part")
    async def part(flow: FlowContext) -> None:
        ran["part"] += 1
        await flow.finish(state_json=[flow.state_json])

    @lives.registry.controller("whole")
    async def whole(flow: FlowContext) -> None:
        ran["whole"] += 1
        answer = await flow.run(Nested("part"), "x")
        if ran["whole"] == 1:
            raise ValueError("the step after it failed")
        await flow.finish(state_json=answer)

    flow = lives.play(make(lives.flows, controller_id="whole"))
    failed = lives.result(flow.flow_id)
    assert failed.status == "failed"

    ended = lives.result(_retry(lives, failed).flow_id)

    assert (ended.status, ended.state_json) == ("succeeded", ["x"])
    assert ran == {"whole": 2, "part": 1}
    assert len(lives.play(lives.flows.list())) == 3


@pytest.mark.parametrize(
    "standing", ["live", "waiting", "succeeded", "detached", "detached, ended"]
)
def test_a_flow_that_cannot_be_retried_is_refused_and_nothing_changes(
    lives: Lives, standing: str
) -> None:
    async def given() -> str:
        flows = lives.flows
        if standing.startswith("detached"):
            made = await flows.spawn_detached(runtime="acp", task="t")
            if standing == "detached, ended":
                await flows.fail_task(made.task.task_id, error="no")
            return made.flow.flow_id
        flow = await make(flows)
        if standing == "waiting":
            await flows.set_waiting(flow_id=flow.flow_id, expected_revision=0)
        if standing == "succeeded":
            await flows.finish(flow_id=flow.flow_id, expected_revision=0)
        return flow.flow_id

    assert lives.runtime
    flow_id = lives.play(given())
    flow, history = lives.flow(flow_id), lives.history(flow_id)

    answer = lives.play(lives.flows.retry_flow(flow_id))

    assert isinstance(answer, Rejected)
    assert answer.current == flow
    code, reason = {
        "live": ("not_retryable", "Flow has not ended; its children can be retried one by one."),
        "waiting": ("not_retryable", "Flow has not ended; its children can be retried one by one."),
        "succeeded": ("not_retryable", "Flow has succeeded; there is nothing to retry."),
        "detached": ("not_managed", "Flow is not managed by its owner."),
        "detached, ended": ("not_managed", "Flow is not managed by its owner."),
    }[standing]
    assert (answer.code, answer.reason) == (code, reason)
    if code == "not_retryable":
        with pytest.raises(TaskNotRetryable, match=reason):
            answer.unwrap()
    assert (lives.play(lives.flows.list()), lives.history(flow_id)) == ([flow], history)


def test_a_flow_that_is_not_there_is_not_found(lives: Lives, kitchen: Kitchen) -> None:
    failed = _failed(lives)
    stranger = lives.face(lambda runtime: bound(runtime, STRANGER))

    for flows, flow_id in (
        (lives.flows, "nobody"),
        (stranger, failed.flow_id),
    ):
        answer = lives.play(flows.retry_flow(flow_id))

        assert (answer.code, answer.flow) == ("not_found", None)
        with pytest.raises(FlowNotFound):
            answer.unwrap()
    assert lives.play(lives.flows.list()) == [failed]


def test_an_operator_s_retry_belongs_to_the_flow_s_owner(lives: Lives, kitchen: Kitchen) -> None:
    failed = _failed(lives)

    new = lives.play(lives.admin.retry_flow(failed.flow_id)).unwrap()

    assert new.owner_key == OWNER
    assert lives.history(new.flow_id)[0].actor == "admin"
    assert _retry(lives, failed).flow_id == new.flow_id


def test_the_first_flow_s_idempotency_key_still_stands_for_the_first_flow(
    lives: Lives, kitchen: Kitchen
) -> None:
    failed = _failed(lives, idempotency_key="tonight")
    _retry(lives, failed)

    again = lives.play(make(lives.flows, controller_id="kitchen", idempotency_key="tonight"))

    assert again == failed


def test_the_retry_of_a_flow_that_nobody_here_can_run_waits_for_who_can(
    lives: Lives, kitchen: Kitchen
) -> None:
    failed = _failed(lives)
    known, lives.registry = lives.registry, type(lives.registry)()
    lives.restart("close")
    kitchen.is_broken = False

    new = _retry(lives, failed)
    lives.pass_time(100)
    assert lives.flow(new.flow_id) == new

    lives.registry = known
    lives.restart("close")
    assert lives.flows and lives.result(new.flow_id).status == "succeeded"
    assert kitchen.ran["soup"] == 1


async def test_a_retry_that_cannot_be_written_is_refused_and_made_by_the_next() -> None:
    store = FaultyStore()
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        await link(flows, flow.flow_id, run_id="r")
        failed = (await flows.fail(flow_id=flow.flow_id, expected_revision=0)).unwrap()
        store.fail_commits(NOT_WRITTEN)

        refused = await flows.retry_flow(flow.flow_id)

        assert (refused.code, refused.current) == ("persist_failed", failed)
        assert await flows.list() == [failed]
        assert (await flows.retry_flow(flow.flow_id)).unwrap().retry_of == flow.flow_id
        assert len(await flows.list()) == 2


def test_a_crash_at_any_step_leaves_one_new_flow_or_none_and_asking_again_makes_it() -> None:
    left: Counter[int] = Counter()
    for after in range(40):
        with Simulation() as world:
            lives = Lives(world)
            failed = lives.play(_failed_by_hand(lives.flows))
            world.crash(after=after)
            with suppress(Crashed):
                lives.play(lives.flows.retry_flow(failed.flow_id))
            lives.die()
            left[len(lives.play(lives.flows.list()))] += 1

            new = _retry(lives, failed)

            assert [task.run_id for task in lives.children(new.flow_id)] == ["0", "1", "2"]
            assert len(lives.play(lives.flows.list())) == 2
            lives.end()
    assert left[1] and left[2], "vacuous: the crashes all came on one side of the commit"


async def _failed_by_hand(flows: SessionFlows) -> Flow:
    flow = await make(flows)
    for number in range(3):
        task = await link(flows, flow.flow_id, run_id=str(number))
        await flows.complete_task(task.task_id, result_json=number)
    return (await flows.fail(flow_id=flow.flow_id, expected_revision=0)).unwrap()
