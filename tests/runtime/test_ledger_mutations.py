"""Mutations on the ledger face: what each sets, clears and leaves alone, and what it answers."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from flowstead import (
    UNSET,
    Applied,
    CancelPending,
    Flow,
    FlowNotFound,
    IllegalTransition,
    Rejected,
    RevisionConflict,
    SessionFlows,
    StateTooLarge,
    open_runtime,
)
from flowstead.testing import ManualClock
from tests.runtime.support import Where, bound, dump, link, make, step

MUTATIONS = ["set_waiting", "resume", "update", "finish", "fail", "request_cancel"]
PATCHING = ["set_waiting", "resume", "update", "finish", "fail"]
AFTER = {
    "set_waiting": "waiting",
    "resume": "queued",
    "update": "running",
    "finish": "succeeded",
    "fail": "failed",
    "request_cancel": "running",
}


async def mutate(flows: SessionFlows, name: str, flow: Flow, **given: Any) -> Any:
    """Call one of the six by its name, from the flow's revision unless told another."""
    asked = {"flow_id": flow.flow_id, "expected_revision": flow.revision} | given
    return await getattr(flows, name)(**asked)


async def standing(flows: SessionFlows, where: str) -> Flow:
    """A flow in one of the places the life cycle knows."""
    flow = await make(
        flows, status="running", state_json={"n": 1}, wait_json={"kind": "x"}, current_step="s"
    )
    if where == "intent":
        await link(flows, flow.flow_id)
        return (await mutate(flows, "request_cancel", flow)).unwrap()
    if where in {"succeeded", "failed"}:
        return (await mutate(flows, "finish" if where == "succeeded" else "fail", flow)).unwrap()
    if where == "cancelled":
        report = await flows.cancel(flow.flow_id)
        assert report.flow is not None
        return report.flow
    return flow


# ---- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTATIONS)
async def test_an_applied_mutation_raises_the_revision_by_one_and_is_found_again(
    store: Where, clock: ManualClock, name: str
) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await standing(flows, "live")
        clock.advance(2)

        done = await mutate(flows, name, flow)

        assert isinstance(done, Applied)
        assert (done.applied, done.code) == (True, None)
        assert done.flow is done.unwrap()
        assert (done.flow.revision, done.flow.status) == (1, AFTER[name])
        assert done.flow.updated_at == flow.updated_at + 2000
        assert await flows.get(flow.flow_id) == done.flow

    async with open_runtime(store) as runtime:
        assert await bound(runtime).get(flow.flow_id) == done.flow


@pytest.mark.parametrize("name", PATCHING)
@pytest.mark.parametrize(
    ("given", "step_after", "state_after"),
    [
        ({}, "s", {"n": 1}),
        ({"current_step": UNSET, "state_json": UNSET}, "s", {"n": 1}),
        ({"current_step": None, "state_json": None}, None, None),
        ({"current_step": " ", "state_json": {}}, None, {}),
        ({"current_step": " next ", "state_json": [0]}, "next", [0]),
        ({"state_json": False}, "s", False),
        ({"state_json": 0}, "s", 0),
        ({"state_json": ""}, "s", ""),
    ],
)
async def test_unset_leaves_alone_and_none_clears(
    flows: SessionFlows, name: str, given: dict[str, Any], step_after: Any, state_after: Any
) -> None:
    flow = await standing(flows, "live")

    done = (await mutate(flows, name, flow, **given)).unwrap()

    assert (done.current_step, done.state_json) == (step_after, state_after)
    assert type(done.state_json) is type(state_after)


async def test_waiting_replaces_wait_and_blockers(flows: SessionFlows) -> None:
    flow = await standing(flows, "live")

    blocked = (
        await mutate(
            flows,
            "set_waiting",
            flow,
            wait_json={"kind": "approval"},
            blocked_task_id="t-1",
            blocked_summary="needs a person",
        )
    ).unwrap()
    waiting = (await mutate(flows, "set_waiting", blocked)).unwrap()

    assert (blocked.status, blocked.wait_json) == ("blocked", {"kind": "approval"})
    assert (blocked.blocked_task_id, blocked.blocked_summary) == ("t-1", "needs a person")
    assert (waiting.status, waiting.wait_json) == ("waiting", None)
    assert (waiting.blocked_task_id, waiting.blocked_summary) == (None, None)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"blocked_task_id": "t"}, "blocked"),
        ({"blocked_summary": "why"}, "blocked"),
        ({"blocked_task_id": " ", "blocked_summary": ""}, "waiting"),
        ({"blocked_task_id": None, "blocked_summary": None}, "waiting"),
    ],
)
async def test_only_a_named_blocker_blocks(
    flows: SessionFlows, given: dict[str, Any], status: str
) -> None:
    flow = await standing(flows, "live")

    assert (await mutate(flows, "set_waiting", flow, **given)).unwrap().status == status


@pytest.mark.parametrize("status", ["queued", "running"])
async def test_resuming_clears_wait_and_blockers(flows: SessionFlows, status: str) -> None:
    flow = await standing(flows, "live")
    blocked = (
        await mutate(flows, "set_waiting", flow, wait_json={"k": 1}, blocked_summary="why")
    ).unwrap()

    resumed = (await mutate(flows, "resume", blocked, status=status)).unwrap()

    assert (resumed.status, resumed.wait_json) == (status, None)
    assert (resumed.blocked_task_id, resumed.blocked_summary) == (None, None)
    assert (resumed.state_json, resumed.current_step) == ({"n": 1}, "s")


async def test_updating_keeps_status_wait_and_blockers(flows: SessionFlows) -> None:
    flow = await standing(flows, "live")
    blocked = (
        await mutate(flows, "set_waiting", flow, wait_json={"k": 1}, blocked_summary="why")
    ).unwrap()

    updated = (await mutate(flows, "update", blocked, state_json=2)).unwrap()

    assert updated == msgspec.structs.replace(
        blocked, revision=2, state_json=2, updated_at=updated.updated_at
    )


@pytest.mark.parametrize("name", ["finish", "fail"])
async def test_an_end_clears_the_wait_and_is_stamped(
    store: Where, clock: ManualClock, name: str
) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await standing(flows, "live")
        clock.advance(3)

        ended = (await mutate(flows, name, flow)).unwrap()

    assert (ended.wait_json, ended.ended_at) == (None, flow.created_at + 3000)
    assert (ended.failure is None) is (name == "finish")


async def test_finishing_clears_the_blockers(flows: SessionFlows) -> None:
    flow = await standing(flows, "live")
    blocked = (await mutate(flows, "set_waiting", flow, blocked_summary="why")).unwrap()

    ended = (await mutate(flows, "finish", blocked)).unwrap()

    assert (ended.blocked_task_id, ended.blocked_summary) == (None, None)


async def test_failing_keeps_the_reason_and_the_named_blocker(flows: SessionFlows) -> None:
    flow = await standing(flows, "live")
    blocked = (
        await mutate(flows, "set_waiting", flow, blocked_task_id="t", blocked_summary="why")
    ).unwrap()

    left = (await mutate(flows, "fail", blocked)).unwrap()
    named = (
        await mutate(flows, "fail", await standing(flows, "live"), blocked_summary="no money")
    ).unwrap()

    assert (left.blocked_task_id, left.blocked_summary) == ("t", "why")
    assert (named.blocked_task_id, named.blocked_summary) == (None, "no money")
    assert named.failure is not None and named.failure.message == "no money"


async def test_the_clock_going_back_never_makes_a_record_older(
    store: Where, clock: ManualClock
) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        clock.set(flow.created_at - 100_000)

        updated = (await mutate(flows, "update", flow)).unwrap()
        ended = (await mutate(flows, "finish", updated)).unwrap()

    assert updated.updated_at >= flow.updated_at
    assert ended.ended_at is not None and ended.ended_at >= flow.created_at


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTATIONS)
async def test_an_unknown_flow_is_not_found(store: Where, flows: SessionFlows, name: str) -> None:
    before = dump(store)

    refused = await getattr(flows, name)(flow_id="nobody", expected_revision=0)

    assert isinstance(refused, Rejected)
    assert (refused.applied, refused.code, refused.current) == (False, "not_found", None)
    assert (refused.flow, refused.reason) == (None, "Flow not found.")
    assert dump(store) == before
    with pytest.raises(FlowNotFound):
        refused.unwrap()


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("revision", [0, 2, 99, 2**63, 2**200])
async def test_a_stale_revision_is_refused_and_nothing_changes(
    store: Where, flows: SessionFlows, name: str, revision: int
) -> None:
    flow = await standing(flows, "live")
    now = (await mutate(flows, "update", flow)).unwrap()
    before = dump(store)

    refused = await mutate(flows, name, flow, expected_revision=revision)

    assert isinstance(refused, Rejected)
    assert (refused.code, refused.current, refused.flow) == ("revision_conflict", now, now)
    assert dump(store) == before
    with pytest.raises(RevisionConflict) as caught:
        refused.unwrap()
    assert caught.value.current == now
    assert str(caught.value) == refused.reason


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("where", ["succeeded", "failed", "cancelled"])
async def test_ended_is_final(store: Where, flows: SessionFlows, name: str, where: str) -> None:
    flow = await standing(flows, where)
    before = dump(store)

    refused = await mutate(flows, name, flow)

    assert isinstance(refused, Rejected)
    assert (refused.code, refused.current) == ("terminal", flow)
    assert refused.reason == f"Flow is already {where}."
    assert dump(store) == before
    with pytest.raises(IllegalTransition):
        refused.unwrap()


@pytest.mark.parametrize("name", MUTATIONS)
async def test_after_a_cancel_intent_only_an_end_and_values_are_accepted(
    store: Where, flows: SessionFlows, name: str
) -> None:
    flow = await standing(flows, "intent")
    before = dump(store)

    answer = await mutate(flows, name, flow)

    if name in {"update", "finish", "fail"}:
        assert isinstance(answer, Applied)
        assert answer.flow.cancel_requested_at == flow.cancel_requested_at
    else:
        assert isinstance(answer, Rejected)
        assert (answer.code, answer.current) == ("cancel_requested", flow)
        assert answer.reason == "Flow cancellation has already been requested."
        assert dump(store) == before
        with pytest.raises(CancelPending):
            answer.unwrap()


async def test_the_revision_is_checked_before_the_life_cycle_and_that_before_the_value(
    flows: SessionFlows,
) -> None:
    ended = await standing(flows, "succeeded")
    bad = float("nan")

    stale = await mutate(flows, "update", ended, expected_revision=0, state_json=bad)
    late = await mutate(flows, "update", ended, state_json=bad)
    wrong = await mutate(flows, "update", await standing(flows, "live"), state_json=bad)

    assert (stale.code, late.code, wrong.code) == (
        "revision_conflict",
        "terminal",
        "invalid_state",
    )


async def test_a_state_over_the_limit_is_refused_with_the_flow_as_it_is(
    store: Where, flows: SessionFlows
) -> None:
    flow = await standing(flows, "live")
    before = dump(store)

    refused = await mutate(flows, "update", flow, state_json="x" * (1024 * 1024))
    fits = await mutate(flows, "update", flow, state_json="x" * (1024 * 1024 - 2))

    assert (refused.code, refused.current) == ("state_too_large", flow)
    assert fits.applied
    assert len(dump(store)["events"]) == len(before["events"]) + 1
    with pytest.raises(StateTooLarge):
        refused.unwrap()


# ---- cancelling -----------------------------------------------------------------------------------


async def test_a_requested_cancel_ends_the_flow_with_its_last_child(flows: SessionFlows) -> None:
    flow = await make(flows, status="running")
    first, second = await link(flows, flow.flow_id), await link(flows, flow.flow_id)
    queued = await link(flows, flow.flow_id, status="queued")

    asked = (await mutate(flows, "request_cancel", flow)).unwrap()
    assert (asked.status, asked.revision) == ("running", 1)
    assert asked.cancel_requested_at is not None
    assert (await flows.get_task(queued.task_id)).status == "cancelled"  # type: ignore[union-attr]
    await flows.complete_task(first.task_id, result_json="kept")
    assert await flows.get(flow.flow_id) == asked
    await flows.fail_task(second.task_id, error="no")

    ended = await flows.result(flow.flow_id)
    assert (ended.status, ended.revision) == ("cancelled", 2)
    assert ended.cancel_requested_at == asked.cancel_requested_at
    assert (await flows.get_task(first.task_id)).result_json == "kept"  # type: ignore[union-attr]


async def test_the_intent_alone_ends_a_childless_flow_only_after_the_grace(
    store: Where, clock: ManualClock
) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        asked = (await mutate(flows, "request_cancel", flow)).unwrap()
        await step(50)
        assert await flows.get(flow.flow_id) == asked

    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        waiter = asyncio.create_task(flows.result(flow.flow_id))
        while not waiter.done():
            clock.advance(61)
            await step(20)
        ended = await waiter

    assert (ended.status, ended.revision) == ("cancelled", 2)


async def test_an_intent_does_not_stop_an_honest_finish(flows: SessionFlows) -> None:
    flow = await make(flows)
    asked = (await mutate(flows, "request_cancel", flow)).unwrap()

    done = (await mutate(flows, "finish", asked, state_json="done all the same")).unwrap()

    assert (done.status, done.revision) == ("succeeded", 2)
    assert done.cancel_requested_at == asked.cancel_requested_at


async def test_cancelling_marks_linked_children_and_ends_the_flow(flows: SessionFlows) -> None:
    flow = await standing(flows, "live")
    done = await flows.complete_task((await link(flows, flow.flow_id)).task_id, result_json=1)
    await link(flows, flow.flow_id)
    await link(flows, flow.flow_id, status="queued")

    report = await flows.cancel(flow.flow_id)

    assert (report.found, report.cancelled, report.code, report.reason) == (True, True, None, None)
    assert report.flow == await flows.get(flow.flow_id)
    assert report.flow is not None
    assert (report.flow.status, report.flow.revision) == ("cancelled", 2)
    assert report.flow.cancel_requested_at is not None
    assert (report.flow.wait_json, report.flow.ended_at is not None) == (None, True)
    assert [task.status for task in report.tasks] == ["succeeded", "cancelled", "cancelled"]
    assert report.tasks[0] == done
    assert report.tasks == await flows.list_tasks(flow.flow_id)


async def test_cancelling_goes_on_after_an_intent_without_a_second_stamp(
    flows: SessionFlows,
) -> None:
    flow = await standing(flows, "intent")

    report = await flows.cancel(flow.flow_id)

    assert report.cancelled and report.flow is not None
    assert report.flow.cancel_requested_at == flow.cancel_requested_at
    assert flow.cancel_started_at is None and report.flow.cancel_started_at is not None
    assert report.flow.revision == flow.revision + 2
    told = [event.type for event in await flows.history(flow.flow_id)]
    assert [what for what in told if what.startswith("flow.cancel")] == [
        "flow.cancel_requested",
        "flow.cancel_started",
        "flow.cancelled",
    ]


async def test_cancelling_an_unknown_flow_is_not_found(store: Where, flows: SessionFlows) -> None:
    before = dump(store)

    report = await flows.cancel("nobody")

    assert (report.found, report.cancelled, report.code) == (False, False, "not_found")
    assert (report.reason, report.flow, report.tasks) == ("Flow not found.", None, [])
    assert dump(store) == before


@pytest.mark.parametrize("where", ["succeeded", "failed", "cancelled"])
async def test_cancelling_an_ended_flow_changes_nothing(
    store: Where, flows: SessionFlows, where: str
) -> None:
    flow = await standing(flows, where)
    before = dump(store)

    report = await flows.cancel(flow.flow_id)

    assert (report.found, report.cancelled, report.code) == (True, False, "terminal")
    assert report.reason == f"Flow is already {where}."
    assert report.flow == flow
    assert dump(store) == before


async def test_cancelling_takes_a_revision_only_if_given(store: Where, flows: SessionFlows) -> None:
    flow = await standing(flows, "live")
    now = (await mutate(flows, "update", flow)).unwrap()
    before = dump(store)

    refused = await flows.cancel(flow.flow_id, expected_revision=0)

    assert (refused.found, refused.cancelled, refused.code, refused.flow) == (
        True,
        False,
        "revision_conflict",
        now,
    )
    assert dump(store) == before
    assert (await flows.cancel(flow.flow_id, expected_revision=1)).cancelled


async def test_many_cancels_at_once_end_the_flow_once(flows: SessionFlows) -> None:
    flow = await make(flows)
    for _ in range(5):
        await link(flows, flow.flow_id)

    reports = await asyncio.gather(*(flows.cancel(flow.flow_id) for _ in range(30)))

    assert any(report.cancelled for report in reports)
    assert {(report.cancelled, report.code) for report in reports} <= {
        (True, None),
        (False, "terminal"),
    }
    ends = [e for e in await flows.history(flow.flow_id) if e.type == "flow.cancelled"]
    assert len(ends) == 1


@pytest.mark.parametrize("grace", [None, "5", True, 0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["cancel", "cancel_task"])
async def test_a_grace_that_is_no_duration_is_misuse(
    store: Where, flows: SessionFlows, name: str, grace: Any
) -> None:
    flow = await make(flows)
    task = await link(flows, flow.flow_id)
    before = dump(store)

    with pytest.raises((TypeError, ValueError), match=r"^grace must be "):
        await getattr(flows, name)(flow.flow_id if name == "cancel" else task.task_id, grace=grace)

    assert dump(store) == before
