"""Deadlines of waits: what they do to a controller and to a ledger flow, in time, late, and after restarts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flowstead import ChildCancelled, ChildTimedOut, FlowContext, NeedsReview, Runtime
from flowstead.testing import Schedule, Simulation
from tests.runtime.support import Lives, bound, make
from tests.runtime.waiting import (
    answer_in,
    begun,
    check_waits_on,
    open_waits,
    registry_of,
    reopened,
    signalled,
    waiting,
)

DEADLINE = 100.0
KEY = {"kind": "reply", "thread": 1}
LIVES = [
    pytest.param(None, 0.0, id="alive"),
    pytest.param("kill", 0.0, id="killed before"),
    pytest.param("close", 0.0, id="closed before"),
    pytest.param("kill", 3 * DEADLINE, id="dead at the time"),
]
"""How the process that opened the wait ends, and how long nobody lives after that."""


async def catches(flow: FlowContext) -> None:
    """Wait, and end with what came of it."""
    try:
        answer = await flow.wait("answer", **flow.state_json)
    except ChildTimedOut as error:
        failure = error.failure
        assert failure is not None
        answer = ["timed out", failure.kind, failure.code]
    except ChildCancelled:
        answer = ["withdrawn"]
    await flow.finish(state_json={"answered": answer})


@pytest.fixture(autouse=True)
def _controllers(request: pytest.FixtureRequest) -> None:
    if "lives" in request.fixturenames:
        request.getfixturevalue("lives").registry = registry_of(catches=catches)


def until_after(lives: Lives, how: str | None, down: float) -> None:
    """Let the deadline pass, with nobody living for part of it."""
    if how is not None:
        lives.restart(how)
        lives.world._seconds += down
    lives.pass_time(DEADLINE + 1)


def own_wait(lives: Lives, controller: str = "shop/triage", **wait_json: Any) -> str:
    flow = lives.play(make(lives.flows, controller_id=controller))
    told = lives.play(
        lives.flows.set_waiting(
            flow_id=flow.flow_id,
            expected_revision=flow.revision,
            wait_json={"thread": 1} | wait_json,
        )
    )
    assert told.applied, told
    return flow.flow_id


def soon_at(lives: Lives) -> int:
    return lives.now() + round(DEADLINE * 1000)


# ---- a controller's wait --------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "down"), LIVES)
def test_a_wait_that_is_to_fail_raises_at_its_deadline(
    lives: Lives, how: str | None, down: float
) -> None:
    flow_id = waiting(lives, "catches", timeout=DEADLINE)

    until_after(lives, how, down)

    assert answer_in(lives, flow_id) == ["timed out", "timed_out", "wait"]
    task = lives.child(flow_id, "answer")
    assert task.status == "timed_out"
    assert task.ended_at is not None and task.ended_at >= task.created_at + DEADLINE * 1000
    assert signalled(lives, "late", lifetime=None).code == "late"


def test_a_deadline_that_nobody_catches_fails_the_flow(lives: Lives) -> None:
    flow_id = waiting(lives, timeout=DEADLINE)

    lives.pass_time(DEADLINE + 1)

    ended = lives.flow(flow_id)
    assert ended.status == "failed" and ended.failure is not None
    assert ended.wait_json is None


@pytest.mark.parametrize(("how", "down"), LIVES)
def test_a_wait_that_is_to_go_on_answers_nothing_at_its_deadline(
    lives: Lives, how: str | None, down: float
) -> None:
    flow_id = waiting(lives, "catches", timeout=DEADLINE, on_timeout="resume")

    until_after(lives, how, down)

    assert answer_in(lives, flow_id) is None


@pytest.mark.parametrize(("how", "down"), LIVES)
def test_a_wait_that_is_open_beside_answers_nothing_at_its_deadline_too(
    lives: Lives, how: str | None, down: float
) -> None:
    async def beside(flow: FlowContext) -> None:
        step = await flow.open_wait("beside", timeout=DEADLINE, on_timeout="resume")
        answers = [await step.result(), await flow.gather(step)]
        await flow.finish(state_json={"answered": answers})

    lives.registry.controller("beside")(beside)
    flow_id = begun(lives, "beside")

    until_after(lives, how, down)

    assert answer_in(lives, flow_id) == [None, [None]]


@pytest.mark.parametrize(("how", "down"), LIVES)
@pytest.mark.parametrize("answer", ["signal", "token", "cancel_task"])
def test_a_wait_that_is_to_block_blocks_its_flow_at_its_deadline_until_somebody_answers(
    lives: Lives, how: str | None, down: float, answer: str
) -> None:
    flow_id = waiting(lives, "catches", timeout=DEADLINE, on_timeout="block")

    until_after(lives, how, down)

    task = lives.child(flow_id, "answer")
    blocked = lives.flow(flow_id)
    assert (blocked.status, blocked.blocked_task_id) == ("blocked", task.task_id)
    assert blocked.blocked_summary and "answer" in blocked.blocked_summary
    [wait] = open_waits(lives)
    assert wait.deadline_at is None
    match answer:
        case "signal":
            assert signalled(lives, "at last").flow_ids == [flow_id]
        case "token":
            assert signalled(lives, "at last", token=wait.token).flow_ids == [flow_id]
        case _:
            lives.play(lives.flows.cancel_task(task.task_id))
    wanted = ["withdrawn"] if answer == "cancel_task" else "at last"
    assert answer_in(lives, flow_id) == wanted
    assert lives.flow(flow_id).blocked_task_id is None


@pytest.mark.parametrize("how", ["kill", "close"])
def test_a_blocked_wait_stays_blocked_over_a_restart_and_no_second_deadline_comes(
    lives: Lives, how: str
) -> None:
    flow_id = waiting(lives, "catches", timeout=DEADLINE, on_timeout="block")
    lives.pass_time(2 * DEADLINE)
    before = lives.told(flow_id)

    reopened(lives, how, 10 * DEADLINE)

    assert lives.told(flow_id).count("flow.blocked") == 1
    assert lives.told(flow_id, "task.") == [one for one in before if one.startswith("task.")]
    assert lives.flow(flow_id).status == "blocked"
    signalled(lives, "at last")
    assert answer_in(lives, flow_id) == "at last"


def test_an_answer_in_time_leaves_no_deadline_behind(lives: Lives) -> None:
    flow_id = waiting(lives, "twice", timeout=DEADLINE)
    lives.pass_time(DEADLINE - 2)
    signalled(lives, 1)

    lives.pass_time(DEADLINE - 2)

    check_waits_on(lives.flow(flow_id), **KEY)
    assert lives.child(flow_id, "first").status == "succeeded"
    signalled(lives, 2)
    assert answer_in(lives, flow_id) == [1, 2]


@pytest.mark.parametrize("way", ["key", "token", "name"])
@pytest.mark.parametrize("on_timeout", ["fail", "resume"])
def test_a_signal_at_the_deadline_is_late_even_if_no_timer_has_come_yet(
    lives: Lives, way: str, on_timeout: str
) -> None:
    flow_id = waiting(lives, "catches", timeout=DEADLINE, on_timeout=on_timeout)
    [wait] = open_waits(lives)
    assert wait.deadline_at is not None
    # The wall clock is put right on the deadline, which no timer of the loop can know.
    lives.world.clock.shift_ms += wait.deadline_at - lives.now()
    given: dict[str, Any] = {
        "key": {"key": KEY, "lifetime": None},
        "token": {"token": wait.token},
        "name": {"flow_id": flow_id, "name": "answer"},
    }[way]

    report = lives.play(lives.flows.signal(payload="late", id="s-1", **given))

    assert (report.code, report.matched, report.kept) == ("late", 0, False)
    lives.pass_time(DEADLINE)
    assert answer_in(lives, flow_id) != "late"


@pytest.mark.parametrize("how", [None, "kill", "close"])
def test_a_signal_by_key_after_a_deadline_no_timer_has_come_for_is_kept_for_the_next_wait(
    lives: Lives, how: str | None
) -> None:
    async def insists(flow: FlowContext) -> None:
        first = await flow.wait("first", key=KEY, timeout=DEADLINE, on_timeout="resume")
        second = await flow.wait("second", key=KEY)
        await flow.finish(state_json={"answered": [first, second]})

    lives.registry = registry_of(insists=insists)
    flow_id = begun(lives, "insists")
    lives.world.clock.shift_ms += round(DEADLINE * 1000)

    report = lives.play(lives.flows.signal(payload="mine", key=KEY))
    if how is not None:
        reopened(lives, how)
    lives.pass_time(DEADLINE)

    assert (report.code, report.matched, report.kept) == ("kept", 0, True)
    assert answer_in(lives, flow_id) == [None, "mine"]


def test_a_signal_and_the_deadline_at_once_end_the_wait_once_in_every_order() -> None:
    async def host(runtime: Runtime) -> tuple[Any, str]:
        flows = bound(runtime)
        flow = await make(
            flows,
            controller_id="catches",
            state_json={"key": KEY, "timeout": 10.0, "on_timeout": "resume"},
        )
        random = asyncio.get_running_loop().random  # type: ignore[attr-defined]
        await asyncio.sleep(9.99 + random.random() * 0.03)
        report = await flows.signal(payload="in time", key=KEY)
        ended = await flows.result(flow.flow_id)
        ends = [event.type for event in await flows.history(flow.flow_id)].count("task.ended")
        assert ends == 1
        return ended.state_json["answered"], report.code.value

    seen = set()
    for seed in range(30):
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            seen.add(world.run(host, registry=lambda: registry_of(catches=catches)))

    assert seen == {("in time", "matched"), (None, "kept")}


# ---- the flow's own wait --------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "down"), LIVES)
@pytest.mark.parametrize("given", [{}, {"onTimeout": "fail"}])
def test_a_flows_own_wait_fails_it_at_the_deadline(
    lives: Lives, how: str | None, down: float, given: dict[str, Any]
) -> None:
    flow_id = own_wait(lives, deadlineAt=soon_at(lives), **given)

    until_after(lives, how, down)

    ended = lives.flow(flow_id)
    assert ended.status == "failed"
    assert ended.failure is not None
    assert (ended.failure.kind, ended.failure.code) == ("timed_out", "wait")
    assert (ended.wait_json, open_waits(lives)) == (None, [])
    assert signalled(lives, 1, key={"thread": 1}, lifetime=None).code == "late"


@pytest.mark.parametrize(("how", "down"), LIVES)
@pytest.mark.parametrize("field", ["wakeAt", "deadlineAt"])
def test_a_flows_own_wait_goes_on_at_the_deadline_and_says_so(
    lives: Lives, how: str | None, down: float, field: str
) -> None:
    at = soon_at(lives)
    given = {} if field == "wakeAt" else {"onTimeout": "resume"}
    flow_id = own_wait(lives, **{field: at}, **given)

    until_after(lives, how, down)

    flow = lives.flow(flow_id)
    assert (flow.status, flow.revision, flow.wait_json) == ("queued", 2, None)
    assert flow.answer_json == {"timedOut": True, "at": flow.updated_at}
    assert flow.updated_at >= at


@pytest.mark.parametrize(("how", "down"), LIVES)
def test_a_flows_own_wait_blocks_it_at_the_deadline_and_stays_open(
    lives: Lives, how: str | None, down: float
) -> None:
    flow_id = own_wait(lives, deadlineAt=soon_at(lives), onTimeout="block")

    until_after(lives, how, down)

    blocked = lives.flow(flow_id)
    assert (blocked.status, blocked.blocked_task_id) == ("blocked", None)
    assert blocked.blocked_summary
    [wait] = open_waits(lives)
    assert (wait.flow_id, wait.deadline_at) == (flow_id, None)
    lives.pass_time(10 * DEADLINE)
    assert lives.flow(flow_id) == blocked
    assert signalled(lives, 1, key={"thread": 1}).flow_ids == [flow_id]
    flow = lives.flow(flow_id)
    assert (flow.status, flow.blocked_summary) == ("queued", None)
    assert flow.answer_json["payload"] == 1


def test_a_flow_whose_own_wait_is_answered_or_over_enters_its_controller(lives: Lives) -> None:
    async def reads(flow: FlowContext) -> None:
        await flow.finish(state_json={"answered": flow.flow.answer_json})

    lives.registry = registry_of(reads=reads)
    flow_ids = []
    for fields in ({"thread": 1}, {"thread": 2, "wakeAt": lives.now() + 10_000}):
        made = lives.play(
            make(lives.flows, controller_id="later/reads", status="waiting", wait_json=fields)
        )
        flow_ids.append(made.flow_id)
    lives.registry.controller("later/reads")(reads)
    reopened(lives, "close")
    assert {lives.flow(flow_id).status for flow_id in flow_ids} == {"waiting"}

    signalled(lives, "word", key={"thread": 1})
    lives.pass_time(11)

    first, second = (answer_in(lives, flow_id) for flow_id in flow_ids)
    assert first["payload"] == "word"
    assert second["timedOut"] is True


@pytest.mark.parametrize(
    "given", [{"deadlineAt": 0}, {"wakeAt": 0}, {"deadlineAt": 0, "onTimeout": "block"}]
)
def test_a_deadline_that_has_passed_already_comes_at_once(
    lives: Lives, given: dict[str, Any]
) -> None:
    flow_id = own_wait(lives, **given)

    lives.pass_time(1)

    wanted = "queued" if "wakeAt" in given else "blocked" if "onTimeout" in given else "failed"
    assert lives.flow(flow_id).status == wanted


def test_what_closes_a_flows_own_wait_closes_its_deadline_too(lives: Lives) -> None:
    flows = lives.flows
    closed = {}
    for name in ("resume", "finish", "fail", "cancel", "set_waiting", "request_cancel"):
        flow_id = closed[name] = own_wait(lives, deadlineAt=soon_at(lives), name=name)
        revision = {"flow_id": flow_id, "expected_revision": 1}
        match name:
            case "cancel":
                lives.play(flows.cancel(flow_id))
            case "set_waiting":
                lives.play(flows.set_waiting(**revision, wait_json={"other": 1}))
            case _:
                lives.play(getattr(flows, name)(**revision))
    before = {name: lives.flow(flow_id) for name, flow_id in closed.items()}

    codes = {
        name: signalled(lives, 1, key={"thread": 1, "name": name}, lifetime=None).code
        for name in closed
    }
    lives.pass_time(2 * DEADLINE)

    del before["request_cancel"]
    assert {name: lives.flow(closed[name]) for name in before} == before
    assert lives.flow(closed["request_cancel"]).status == "cancelled"
    assert "matched" not in codes.values()
    assert {wait.flow_id for wait in open_waits(lives)} == {closed["set_waiting"]}
    assert open_waits(lives)[0].deadline_at is None


def test_a_flow_blocked_by_a_review_stays_blocked_when_its_own_wait_is_answered(
    lives: Lives,
) -> None:
    async def review(_context: Any, value: Any) -> Any:
        if value is None:
            raise NeedsReview("look")
        return value

    lives.registry = registry_of()
    lives.registry.task(review)
    flow = lives.play(make(lives.flows))
    child = lives.play(lives.flows.run_task(flow_id=flow.flow_id, task="review", run="review"))
    lives.pass_time(0.1)
    task_id = child.unwrap().task_id
    blocked = lives.flow(flow.flow_id)
    assert blocked.blocked_task_id == task_id
    told = lives.play(
        lives.flows.set_waiting(
            flow_id=flow.flow_id,
            expected_revision=blocked.revision,
            wait_json={"thread": 1},
            blocked_task_id=task_id,
        )
    )
    assert told.unwrap().status == "blocked"

    report = signalled(lives, "word", key={"thread": 1})

    after = lives.flow(flow.flow_id)
    assert report.flow_ids == [flow.flow_id]
    assert (after.status, after.blocked_task_id, after.wait_json) == ("blocked", task_id, None)
    assert after.answer_json["payload"] == "word"
    lives.play(lives.flows.retry_task(task_id, input_json=1))
    lives.pass_time(0.1)
    assert lives.flow(flow.flow_id).status == "queued"


# ---- reminders ------------------------------------------------------------------------------------


def test_reminders_are_told_in_the_history_and_several_missed_ones_are_one(lives: Lives) -> None:
    flow_id = waiting(lives, "catches", timeout=DEADLINE, remind=[80.0, 40.0, 20.0, 10.0])

    lives.pass_time(25)
    assert lives.told(flow_id, "task.rem") == ["task.reminded"]
    lives.restart("kill")
    lives.world._seconds += 60
    lives.pass_time(1)
    assert lives.told(flow_id, "task.rem") == ["task.reminded"] * 2
    lives.pass_time(8)

    assert lives.told(flow_id, "task.rem") == ["task.reminded"] * 3
    lives.pass_time(DEADLINE)
    assert answer_in(lives, flow_id) == ["timed out", "timed_out", "wait"]
    assert lives.told(flow_id, "task.rem") == ["task.reminded"] * 3


def test_reminders_of_a_flows_own_wait_are_told_as_well(lives: Lives) -> None:
    now = lives.now()
    flow_id = own_wait(
        lives, deadlineAt=now + 100_000, remindAt=[now + 50_000, now + 20_000], prompt="Well?"
    )

    lives.pass_time(99)
    assert lives.told(flow_id, "flow.rem") == ["flow.reminded"] * 2
    lives.pass_time(2)

    assert lives.flow(flow_id).status == "failed"
