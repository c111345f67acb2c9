"""Children on the ledger face: linked, reported on, launched, waited for, cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from flowstead import (
    Cancelled,
    CancelPending,
    Created,
    Failed,
    FlowExists,
    FlowNotFound,
    IllegalTransition,
    InvalidState,
    Limits,
    Refused,
    Retry,
    SessionFlows,
    StateTooLarge,
    Succeeded,
    TaskContext,
    TaskNotLinked,
    TimedOut,
    open_runtime,
)
from flowstead.testing import ManualClock
from tests.runtime.support import Where, bound, dump, link, make, step

# ---- linking --------------------------------------------------------------------------------------


async def test_a_linked_child_keeps_every_field(store: Where, clock: ManualClock) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await make(flows, notify_policy="silent")

        created = await flows.run_task(
            flow_id=flow.flow_id,
            runtime="acp",
            child_session_key="agent:main:subagent:classifier",
            run_id="r-1",
            task="Classify inbox messages",
            label="classify",
            input_json={"mail": [1, 2]},
            status="running",
            started_at=clock.now() - 500,
            last_event_at=clock.now() - 100,
        )

        assert isinstance(created, Created)
        assert created.flow == flow
        task = created.task
        assert (task.flow_id, task.runtime, task.run_id) == (flow.flow_id, "acp", "r-1")
        assert task.child_session_key == "agent:main:subagent:classifier"
        assert (task.task, task.label) == ("Classify inbox messages", "classify")
        assert task.input_json == {"mail": [1, 2]}
        assert (task.status, task.attempt, task.max_attempts) == ("running", 0, 1)
        assert (task.started_at, task.last_event_at) == (clock.now() - 500, clock.now() - 100)
        assert task.created_at == clock.now() - 500
        assert (task.notify_policy, task.delivery_status) == ("silent", "not_applicable")
        assert (task.ended_at, task.result_json, task.failure, task.timeout) == (None,) * 4
        assert await flows.get_task(task.task_id) == task
        assert await flows.list_tasks(flow.flow_id) == [task]


async def test_a_linked_child_has_defaults(store: Where, clock: ManualClock) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await make(flows)

        created = await flows.run_task(flow_id=flow.flow_id, runtime="cli", task=" t ")

        task = created.unwrap()
        assert (task.task, task.status, task.runtime) == ("t", "queued", "cli")
        assert (task.run_id, task.label, task.child_session_key, task.input_json) == (None,) * 4
        assert (task.started_at, task.last_event_at) == (None, None)
        assert task.created_at == clock.now()
        assert (task.delivery_status, task.notify_policy) == ("pending", "done_only")


async def test_times_are_ignored_unless_the_child_runs(flows: SessionFlows) -> None:
    flow = await make(flows)

    created = await flows.run_task(
        flow_id=flow.flow_id, runtime="acp", task="t", started_at=5, last_event_at=6
    )

    task = created.unwrap()
    assert (task.status, task.started_at, task.last_event_at) == ("queued", None, None)
    assert task.created_at == flow.created_at or task.created_at > 6


async def test_a_running_child_without_times_has_started_now(
    store: Where, clock: ManualClock
) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await make(flows)

        task = await link(flows, flow.flow_id)

        assert (task.started_at, task.last_event_at) == (clock.now(), clock.now())


async def test_a_run_id_asked_for_again_answers_the_first_child(
    store: Where, flows: SessionFlows
) -> None:
    flow = await make(flows)
    first = await link(flows, flow.flow_id, run_id="r")
    before = dump(store)

    again = await flows.run_task(flow_id=flow.flow_id, runtime="cli", task="other", run_id=" r ")

    assert isinstance(again, Refused)
    assert (again.created, again.code, again.found, again.task) == (False, "duplicate", True, first)
    assert again.flow == flow
    assert dump(store) == before
    with pytest.raises(FlowExists):
        again.unwrap()


async def test_a_run_id_stays_taken_after_its_child_ended_and_after_a_restart(
    store: Where,
) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        first = await link(flows, flow.flow_id, run_id="r")
        ended = await flows.complete_task(first.task_id, result_json="out")
        again = await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t", run_id="r")
        assert isinstance(again, Refused) and again.task == ended

    async with open_runtime(store) as runtime:
        again = await bound(runtime).run_task(
            flow_id=flow.flow_id, runtime="acp", task="t", run_id="r"
        )

    assert isinstance(again, Refused)
    assert (again.code, again.task) == ("duplicate", ended)


async def test_a_run_id_is_answered_even_when_nothing_new_may_start(flows: SessionFlows) -> None:
    flow = await make(flows)
    first = await link(flows, flow.flow_id, run_id="r")
    await flows.request_cancel(flow_id=flow.flow_id, expected_revision=0)

    again = await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t", run_id="r")

    assert isinstance(again, Refused)
    assert (again.code, again.task) == ("duplicate", first)


async def test_the_same_run_id_in_two_flows_names_two_children(flows: SessionFlows) -> None:
    one, two = await make(flows), await make(flows)

    first = await link(flows, one.flow_id, run_id="r")
    second = await link(flows, two.flow_id, run_id="r")

    assert first.task_id != second.task_id


async def test_one_run_id_asked_for_a_hundred_times_at_once_makes_one_child(
    flows: SessionFlows,
) -> None:
    flow = await make(flows)

    answers = await asyncio.gather(
        *(
            flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t", run_id="r")
            for _ in range(100)
        )
    )

    created = [answer for answer in answers if isinstance(answer, Created)]
    assert len(created) == 1
    assert {answer.task.task_id for answer in answers if answer.task} == {created[0].task.task_id}
    assert await flows.list_tasks(flow.flow_id) == [created[0].task]


# ---- refusals -------------------------------------------------------------------------------------


async def test_an_unknown_flow_takes_no_child(store: Where, flows: SessionFlows) -> None:
    before = dump(store)

    refused = await flows.run_task(flow_id="nobody", runtime="acp", task="t")

    assert refused == Refused("not_found", "Flow not found.", False)  # type: ignore[arg-type]
    assert dump(store) == before
    with pytest.raises(FlowNotFound):
        refused.unwrap()


async def test_a_flow_with_a_cancel_intent_takes_no_child(
    store: Where, flows: SessionFlows
) -> None:
    flow = await make(flows)
    asked = await flows.request_cancel(flow_id=flow.flow_id, expected_revision=0)
    before = dump(store)

    refused = await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t")

    assert isinstance(refused, Refused)
    assert (refused.code, refused.found) == ("cancel_requested", True)
    assert refused.reason == "Flow cancellation has already been requested."
    assert (refused.flow, refused.task) == (asked.flow, None)
    assert dump(store) == before
    with pytest.raises(CancelPending):
        refused.unwrap()


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
async def test_an_ended_flow_takes_no_child(store: Where, flows: SessionFlows, end: str) -> None:
    flow = await make(flows)
    await _end(flows, flow.flow_id, end)
    before = dump(store)

    refused = await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t")

    assert isinstance(refused, Refused)
    assert (refused.code, refused.found) == ("terminal", True)
    assert refused.reason == f"Flow is already {end}."
    assert refused.flow == await flows.get(flow.flow_id)
    assert dump(store) == before
    with pytest.raises(IllegalTransition):
        refused.unwrap()


async def test_input_that_is_not_json_is_refused_with_its_code(
    store: Where, flows: SessionFlows
) -> None:
    flow = await make(flows)
    before = dump(store)

    refused = await flows.run_task(
        flow_id=flow.flow_id, runtime="acp", task="t", input_json={"a": [float("nan")]}
    )

    assert isinstance(refused, Refused)
    assert (refused.code, refused.found, refused.flow) == ("invalid_state", True, flow)
    assert "input_json" in refused.reason and "['a'][0]" in refused.reason
    assert dump(store) == before


async def test_children_beyond_the_limit_are_refused_and_room_is_made_by_an_end(
    store: Where,
) -> None:
    async with open_runtime(store, limits=Limits(active_children=3)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        tasks = [await link(flows, flow.flow_id) for _ in range(3)]

        refused = await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t")
        await flows.complete_task(tasks[0].task_id)
        created = await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t")

    assert (refused.created, refused.code, refused.found) == (False, "overloaded", True)
    assert created.created


# ---- reports --------------------------------------------------------------------------------------


async def test_reports_move_a_linked_child_to_its_end(store: Where, clock: ManualClock) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        task = await link(flows, flow.flow_id, status="queued")

        clock.advance(1)
        started = await flows.start_task(task.task_id)
        clock.advance(1)
        progressed = await flows.progress_task(task.task_id, summary="half")
        clock.advance(1)
        alive = await flows.progress_task(task.task_id)
        clock.advance(1)
        ended = await flows.complete_task(
            task.task_id,
            result_json={"routes": [1]},
            terminal_summary="all\n  done ",
            terminal_outcome="blocked",
        )

        assert started and progressed and alive and ended
        at = task.created_at
        assert (started.status, started.started_at) == ("running", at + 1000)
        assert (progressed.progress_summary, progressed.last_event_at) == ("half", at + 2000)
        assert (alive.progress_summary, alive.last_event_at) == ("half", at + 3000)
        assert (ended.status, ended.ended_at, ended.last_event_at) == (
            "succeeded",
            at + 4000,
            at + 4000,
        )
        assert ended.result_json == {"routes": [1]}
        assert (ended.terminal_summary, ended.terminal_outcome) == ("all done", "blocked")
        assert ended.cleanup_after == at + 4000 + 7 * 24 * 3600 * 1000
        assert await flows.get_task(task.task_id) == ended
        assert await flows.get(flow.flow_id) == flow


async def test_a_completed_child_says_succeeded_unless_told_otherwise(flows: SessionFlows) -> None:
    task = await link(flows, (await make(flows)).flow_id)

    ended = await flows.complete_task(task.task_id)

    assert ended is not None
    assert (ended.terminal_outcome, ended.result_json) == ("succeeded", None)
    assert await flows.wait_task(task.task_id) == Succeeded(None)


@pytest.mark.parametrize(
    ("status", "outcome"), [("failed", Failed), ("timed_out", TimedOut), ("cancelled", Cancelled)]
)
async def test_a_failure_report_ends_the_child_and_keeps_the_error(
    flows: SessionFlows, status: str, outcome: type[Any]
) -> None:
    task = await link(flows, (await make(flows)).flow_id)

    ended = await flows.fail_task(task.task_id, error="it broke", status=status)
    told = await flows.wait_task(task.task_id)

    assert ended is not None and ended.failure is not None
    assert (ended.status, ended.failure.kind) == (status, status)
    assert (ended.failure.message, ended.result_json) == ("it broke", None)
    assert type(told) is outcome
    assert told == outcome(ended.failure)


async def test_a_report_on_an_ended_child_changes_nothing(
    store: Where, flows: SessionFlows
) -> None:
    task = await link(flows, (await make(flows)).flow_id)
    ended = await flows.complete_task(task.task_id, result_json=1)
    before = dump(store)

    answers = [
        await flows.start_task(task.task_id),
        await flows.progress_task(task.task_id, summary="late"),
        await flows.complete_task(task.task_id, result_json=2),
        await flows.fail_task(task.task_id, error="late"),
    ]

    assert answers == [ended] * 4
    assert dump(store) == before


async def test_a_child_ends_once_whoever_reports_first(flows: SessionFlows) -> None:
    flow = await make(flows)
    task = await link(flows, flow.flow_id)

    answers = await asyncio.gather(
        *(flows.complete_task(task.task_id, result_json=n) for n in range(20)),
        *(flows.fail_task(task.task_id, error=str(n)) for n in range(20)),
    )

    assert all(answer == answers[0] for answer in answers)
    ends = [event for event in await flows.history(flow.flow_id) if event.type == "task.ended"]
    assert len(ends) == 1


async def test_a_child_outlives_its_flow_and_is_still_reported_on(store: Where) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        task = await link(flows, flow.flow_id)
        done = (await flows.finish(flow_id=flow.flow_id, expected_revision=0)).unwrap()

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        ended = await flows.complete_task(task.task_id, result_json="late but true")
        assert ended is not None and ended.status == "succeeded"
        assert await flows.get(flow.flow_id) == done


async def test_a_queued_child_is_not_started_once_a_cancel_is_asked_for(
    flows: SessionFlows,
) -> None:
    flow = await make(flows)
    queued = await link(flows, flow.flow_id, status="queued")
    running = await link(flows, flow.flow_id)
    await flows.request_cancel(flow_id=flow.flow_id, expected_revision=0)

    answer = await flows.start_task(queued.task_id)
    goes_on = await flows.progress_task(running.task_id, summary="still here")

    assert answer is not None and answer.status == "cancelled"
    assert goes_on is not None and goes_on.status == "running"


async def test_a_result_that_is_not_json_leaves_the_child_running(
    store: Where, flows: SessionFlows
) -> None:
    task = await link(flows, (await make(flows)).flow_id)
    before = dump(store)

    with pytest.raises(InvalidState, match=r"^result_json\['a'\] is nan"):
        await flows.complete_task(task.task_id, result_json={"a": float("nan")})
    with pytest.raises(StateTooLarge):
        await flows.complete_task(task.task_id, result_json="x" * (1024 * 1024))

    assert dump(store) == before
    assert await flows.complete_task(task.task_id) is not None


async def test_a_launched_child_is_not_reported_on_by_hand(store: Where) -> None:
    going = anyio.Event()

    async def work(_: TaskContext, value: int) -> int:
        await going.wait()
        return value + 1

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        task = (
            await flows.run_task(flow_id=flow.flow_id, task="add", run=work, input_json=1)
        ).unwrap()
        for call in (
            flows.start_task(task.task_id),
            flows.complete_task(task.task_id, result_json=5),
            flows.fail_task(task.task_id, error="no"),
        ):
            with pytest.raises(TaskNotLinked):
                await call
        going.set()

        assert await flows.wait_task(task.task_id) == Succeeded(2)


# ---- launching ------------------------------------------------------------------------------------


async def test_a_launched_child_runs_and_is_waited_for(flows: SessionFlows) -> None:
    async def work(ctx: TaskContext, value: Any) -> Any:
        await ctx.progress("under way")
        return {"flow": ctx.flow_id, "attempt": ctx.attempt, "got": value}

    flow = await make(flows)
    task = (
        await flows.run_task(
            flow_id=flow.flow_id, task="t", run=work, input_json=[1], label="l", run_id="r"
        )
    ).unwrap()

    outcome = await flows.wait_task(task.task_id)

    assert outcome == Succeeded({"flow": flow.flow_id, "attempt": 1, "got": [1]})
    ended = await flows.get_task(task.task_id)
    assert ended is not None
    assert (ended.attempt, ended.progress_summary, ended.label) == (1, "under way", "l")


async def test_a_second_launch_of_a_run_id_does_not_replace_the_first_ones_function(
    store: Where,
) -> None:
    gate = anyio.Event()

    async def first_in_line(_: TaskContext, __: Any) -> str:
        await gate.wait()
        return "in line"

    async def mine(_: TaskContext, __: Any) -> str:
        return "mine"

    async def another(_: TaskContext, __: Any) -> str:
        return "another"

    async with open_runtime(store, limits=Limits(running_children=1)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        await flows.run_task(flow_id=flow.flow_id, task="t", run=first_in_line)
        queued = await flows.run_task(flow_id=flow.flow_id, task="t", run=mine, run_id="r")

        again = await flows.run_task(flow_id=flow.flow_id, task="t", run=another, run_id="r")
        gate.set()
        outcome = await flows.wait_task(queued.unwrap().task_id)

    assert again.code == "duplicate"
    assert outcome == Succeeded("mine")


async def test_an_overloaded_second_launch_does_not_take_the_first_ones_function_away(
    store: Where,
) -> None:
    gate = anyio.Event()

    async def first_in_line(_: TaskContext, __: Any) -> str:
        await gate.wait()
        return "in line"

    async def mine(_: TaskContext, __: Any) -> str:
        return "mine"

    async with open_runtime(store, limits=Limits(running_children=1, mailbox=2)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        await flows.run_task(flow_id=flow.flow_id, task="t", run=first_in_line)
        queued = await flows.run_task(flow_id=flow.flow_id, task="t", run=mine, run_id="r")

        answers = await asyncio.gather(
            *(
                flows.run_task(flow_id=flow.flow_id, task="t", run=mine, run_id="r")
                for _ in range(20)
            )
        )
        gate.set()
        outcome = await flows.wait_task(queued.unwrap().task_id)

    assert {answer.code for answer in answers} == {"duplicate", "overloaded"}
    assert outcome == Succeeded("mine")


async def test_a_retry_that_never_waits_less_than_for_ever_survives_a_restart(
    store: Where,
) -> None:
    async def work(_: TaskContext, __: Any) -> None:
        raise RuntimeError("no")

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        try:
            unbounded = Retry(max_attempts=2, initial=3600, max_delay=float("inf"))
        except ValueError:
            return
        await flows.run_task(flow_id=flow.flow_id, task="t", run=work, retry=unbounded)
        await step(20)

    async with open_runtime(store) as runtime:
        updated = await bound(runtime).update(flow_id=flow.flow_id, expected_revision=0)
        assert updated.applied


@pytest.mark.parametrize("attempts", [2.5, "3", None])
def test_a_retry_counts_whole_attempts(attempts: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Retry(max_attempts=attempts)


# ---- waiting and cancelling -----------------------------------------------------------------------


async def test_many_wait_for_one_child(flows: SessionFlows) -> None:
    task = await link(flows, (await make(flows)).flow_id)
    waiters = [asyncio.create_task(flows.wait_task(task.task_id)) for _ in range(20)]
    await step(20)
    waiters[3].cancel()

    await flows.complete_task(task.task_id, result_json=[1])
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)

    assert isinstance(outcomes.pop(3), asyncio.CancelledError)
    assert outcomes == [Succeeded([1])] * 19


@pytest.mark.parametrize("task_id", ["nobody", "", "\x00", "\ud800", "x" * 10_000])
async def test_an_unknown_child_is_found_by_nobody(flows: SessionFlows, task_id: str) -> None:
    assert await flows.get_task(task_id) is None
    assert await flows.start_task(task_id) is None
    assert await flows.progress_task(task_id) is None
    assert await flows.complete_task(task_id) is None
    assert await flows.fail_task(task_id, error="no") is None
    report = await flows.cancel_task(task_id)
    assert (report.found, report.cancelled, report.reason) == (False, False, "Task not found.")
    with pytest.raises(FlowNotFound, match=r"^Task not found\.$"):
        await flows.wait_task(task_id)


async def test_cancelling_a_linked_child_ends_it_alone(flows: SessionFlows) -> None:
    flow = await make(flows)
    task, other = await link(flows, flow.flow_id), await link(flows, flow.flow_id)

    report = await flows.cancel_task(task.task_id)
    again = await flows.cancel_task(task.task_id)

    assert (report.found, report.cancelled, report.reason) == (True, True, None)
    assert report.task == await flows.get_task(task.task_id)
    assert report.task is not None and report.task.status == "cancelled"
    assert (again.found, again.cancelled) == (True, False)
    assert again.reason == "Task is already cancelled."
    assert await flows.get_task(other.task_id) == other
    assert await flows.get(flow.flow_id) == flow


async def test_cancelling_a_launched_child_waits_for_its_end(flows: SessionFlows) -> None:
    cleaned = False

    async def work(_: TaskContext, __: Any) -> None:
        nonlocal cleaned
        try:
            await anyio.sleep_forever()
        finally:
            await step(10)
            cleaned = True

    flow = await make(flows)
    task = (await flows.run_task(flow_id=flow.flow_id, task="t", run=work)).unwrap()
    await step(5)

    report = await flows.cancel_task(task.task_id)

    assert (report.found, report.cancelled) == (True, True)
    assert cleaned or (report.task is not None and report.task.started_at is None)


async def test_a_listing_of_children_can_be_restricted(flows: SessionFlows) -> None:
    flow = await make(flows)
    running = await link(flows, flow.flow_id)
    queued = await link(flows, flow.flow_id, status="queued")
    ended = await flows.complete_task((await link(flows, flow.flow_id)).task_id)

    assert await flows.list_tasks(flow.flow_id) == [running, queued, ended]
    assert await flows.list_tasks(flow.flow_id, status="queued") == [queued]
    assert await flows.list_tasks(flow.flow_id, status=["running", "succeeded"]) == [running, ended]
    assert await flows.list_tasks("nobody") == []


async def _end(flows: SessionFlows, flow_id: str, end: str) -> None:
    if end == "succeeded":
        await flows.finish(flow_id=flow_id, expected_revision=0)
    elif end == "failed":
        await flows.fail(flow_id=flow_id, expected_revision=0)
    else:
        await flows.cancel(flow_id)
