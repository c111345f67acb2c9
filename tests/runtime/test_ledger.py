"""The ledger face: its example, how flows are made, and how they are found again."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from flowstead import (
    Applied,
    Created,
    Flow,
    FlowExists,
    FlowNotFound,
    InvalidState,
    Runtime,
    SessionFlows,
    TaskSummary,
    open_runtime,
)
from flowstead.testing import ManualClock
from tests.runtime.support import OWNER, STRANGER, Where, bound, dump, link, make, step

# ---- the example ----------------------------------------------------------------------------------


async def test_the_example_ends_succeeded_at_revision_three(
    store: Where, clock: ManualClock
) -> None:
    now_ms = clock.now()

    async with open_runtime(store, clock=clock) as runtime:
        flows = runtime.tasks.flow.bind_session(
            session_key="agent:main:main", requester_origin={"channel": "slack"}
        )
        created = await flows.create_managed(
            controller_id="my-plugin/inbox-triage",
            goal="triage inbox",
            current_step="classify",
            state_json={"businessThreads": [], "personalItems": [], "eodSummary": []},
        )
        child = await flows.run_task(
            flow_id=created.flow_id,
            runtime="acp",
            child_session_key="agent:main:subagent:classifier",
            run_id="inbox-classify-1",
            task="Classify inbox messages",
            status="running",
            started_at=now_ms,
            last_event_at=now_ms,
        )
        assert child.created, child.reason
        waiting = await flows.set_waiting(
            flow_id=created.flow_id,
            expected_revision=created.revision,
            current_step="await_business_reply",
            state_json={"businessThreads": ["thread-1"], "personalItems": [], "eodSummary": []},
            wait_json={"kind": "reply", "channel": "slack", "threadKey": "slack:thread-1"},
        )
        assert waiting.applied, waiting.code
        resumed = await flows.resume(
            flow_id=waiting.flow.flow_id,
            expected_revision=waiting.flow.revision,
            status="running",
            current_step="finalize",
            state_json=waiting.flow.state_json,
        )
        assert resumed.applied, resumed.code
        done = await flows.finish(
            flow_id=resumed.flow.flow_id,
            expected_revision=resumed.flow.revision,
            state_json=resumed.flow.state_json,
        )

    assert done.applied
    assert [created.revision, waiting.flow.revision, resumed.flow.revision] == [0, 1, 2]
    assert done.flow == Flow(
        flow_id=created.flow_id,
        sync_mode=created.sync_mode,
        owner_key="agent:main:main",
        requester_origin={"channel": "slack"},
        controller_id="my-plugin/inbox-triage",
        revision=3,
        status=done.flow.status,
        notify_policy=created.notify_policy,
        goal="triage inbox",
        current_step="finalize",
        state_json={"businessThreads": ["thread-1"], "personalItems": [], "eodSummary": []},
        state_version=1,
        created_at=now_ms,
        updated_at=now_ms,
        ended_at=now_ms,
    )
    assert (created.sync_mode, created.notify_policy) == ("managed", "done_only")
    assert (created.status, waiting.flow.status) == ("queued", "waiting")
    assert (resumed.flow.status, done.flow.status) == ("running", "succeeded")
    assert waiting.flow.wait_json["threadKey"] == "slack:thread-1"
    assert resumed.flow.wait_json is None


async def test_what_was_made_is_the_same_after_a_restart(store: Where) -> None:
    state = {"ünï": ["✓", {"n": 1.5, "none": None, "deep": [[[True]]]}], "text": "line\nline\t\x00"}
    async with open_runtime(store) as runtime:
        flows = bound(runtime, requester_origin={"channel": "slack", "to": "#général"})
        flow = await make(flows, goal="  zeile eins\nzeile zwei ☃ ", state_json=state)
        task = await link(flows, flow.flow_id, run_id="r1", input_json={"x": [1]})

    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        found = await flows.get(flow.flow_id)
        children = await flows.list_tasks(flow.flow_id)

    assert found == flow
    assert found.state_json == state
    assert found.goal == "zeile eins\nzeile zwei ☃"
    assert found.requester_origin == {"channel": "slack", "to": "#général"}
    assert children == [task]


# ---- binding --------------------------------------------------------------------------------------


async def test_both_entry_names_reach_the_same_thing(runtime: Runtime) -> None:
    made = await make(runtime.task_flow.bind_session(session_key=OWNER))

    found = await runtime.tasks.flow.bind_session(session_key=OWNER).get(made.flow_id)

    assert runtime.tasks.flow is runtime.task_flow
    assert found == made


@pytest.mark.parametrize(
    "context",
    [
        {"session_key": " agent:x ", "delivery_context": {"channel": "slack"}},
        {"sessionKey": "agent:x", "deliveryContext": {"channel": "slack"}},
        SimpleNamespace(session_key="agent:x", delivery_context={"channel": "slack"}),
        SimpleNamespace(sessionKey="agent:x", deliveryContext={"channel": "slack"}),
    ],
    ids=["snake mapping", "camel mapping", "snake object", "camel object"],
)
async def test_a_tool_context_names_the_owner_and_the_origin(
    runtime: Runtime, context: object
) -> None:
    flows = runtime.tasks.flow.from_tool_context(context)

    made = await make(flows)

    assert flows.session_key == made.owner_key == "agent:x"
    assert flows.requester_origin == made.requester_origin == {"channel": "slack"}


@pytest.mark.parametrize("context", [{}, {"sessionKey": None}, {"session_key": " \t"}, object()])
async def test_a_tool_context_without_a_session_is_refused(
    runtime: Runtime, context: object
) -> None:
    with pytest.raises(ValueError, match=r"^TaskFlow runtime requires tool context with a sessio"):
        runtime.tasks.flow.from_tool_context(context)


@pytest.mark.parametrize("key", ["", " ", "\n\t", "\u3000"])
async def test_binding_a_blank_session_is_refused(runtime: Runtime, key: str) -> None:
    with pytest.raises(ValueError, match=r"^TaskFlow runtime requires a bound sessionKey\.$"):
        runtime.tasks.flow.bind_session(session_key=key)


async def test_a_context_without_a_delivery_address_has_no_origin(runtime: Runtime) -> None:
    flows = runtime.tasks.flow.from_tool_context({"sessionKey": "agent:x"})

    made = await make(flows)

    assert flows.requester_origin is None
    assert made.requester_origin is None


# ---- creating -------------------------------------------------------------------------------------


async def test_a_made_up_id_says_what_it_is(store: Where, clock: ManualClock) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flow = await make(bound(runtime), controller_id="my-plugin/Inbox Triage!")

    parsed = re.fullmatch(r"(inbox-triage)-(\d{8}T\d{9})-([0-9a-z]{8})", flow.flow_id)
    assert parsed is not None
    instant = datetime.strptime(parsed[2] + "000", "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
    assert round(instant.timestamp() * 1000) == clock.now() == flow.created_at


@pytest.mark.parametrize("controller", ["☃", "///", "日本語/テスト", "x" * 4000, "a/b/", "-"])
async def test_any_controller_gets_an_id_that_can_be_looked_up(
    flows: SessionFlows, controller: str
) -> None:
    flow = await make(flows, controller_id=controller)

    assert re.fullmatch(r"[a-z0-9-]{1,40}-\d{8}T\d{9}-[0-9a-z]{8}", flow.flow_id)
    assert await flows.get(flow.flow_id) == flow
    assert await flows.list(controller_id=controller) == [flow]


async def test_a_thousand_creates_at_once_have_a_thousand_ids(flows: SessionFlows) -> None:
    made = await asyncio.gather(*(make(flows) for _ in range(1000)))

    assert len({flow.flow_id for flow in made}) == 1000
    assert len(await flows.list(limit=2000)) == 1000


async def test_create_keeps_every_field_it_is_given(flows: SessionFlows) -> None:
    flow = await flows.create_managed(
        controller_id="c",
        goal="g",
        flow_id="order-17",
        correlation_id="crm:17",
        idempotency_key="once",
        status="waiting",
        notify_policy="state_changes",
        current_step="first",
        state_json={"a": 1},
        wait_json={"kind": "reply"},
        state_version=4,
    )

    assert (flow.flow_id, flow.correlation_id, flow.status) == ("order-17", "crm:17", "waiting")
    assert (flow.notify_policy, flow.current_step) == ("state_changes", "first")
    assert (flow.state_json, flow.wait_json) == ({"a": 1}, {"kind": "reply"})
    assert (flow.state_version, flow.revision) == (4, 0)
    assert await flows.get("order-17") == flow


@pytest.mark.parametrize("status", ["queued", "running", "waiting", "blocked"])
async def test_a_flow_may_start_out_in_any_live_status(flows: SessionFlows, status: str) -> None:
    assert (await make(flows, status=status)).status == status


async def test_taking_ones_own_id_again_is_refused_and_shows_the_first(
    store: Where, runtime: Runtime, flows: SessionFlows
) -> None:
    first = await make(flows, flow_id="mine")
    before = dump(store)

    with pytest.raises(FlowExists) as caught:
        await make(flows, flow_id="mine", goal="another")

    assert caught.value.current == first
    assert dump(store) == before


async def test_one_id_taken_by_many_at_once_goes_to_one(flows: SessionFlows) -> None:
    answers = await asyncio.gather(
        *(make(flows, flow_id="mine", goal=f"goal {n}") for n in range(50)), return_exceptions=True
    )

    made = [answer for answer in answers if isinstance(answer, Flow)]
    refused = [answer for answer in answers if isinstance(answer, FlowExists)]
    assert (len(made), len(refused)) == (1, 49)
    assert all(error.current == made[0] for error in refused)


async def test_an_id_that_was_refused_once_for_its_state_is_free(flows: SessionFlows) -> None:
    with pytest.raises(InvalidState):
        await make(flows, flow_id="mine", state_json=float("nan"))

    assert (await make(flows, flow_id="mine")).revision == 0


# ---- idempotency keys -----------------------------------------------------------------------------


async def test_the_same_key_answers_the_first_flow_as_it_is_now(flows: SessionFlows) -> None:
    first = await make(flows, idempotency_key="k", state_json={"b": 1, "a": [2]})
    moved = (await flows.update(flow_id=first.flow_id, expected_revision=0, state_json=7)).unwrap()

    again = await make(flows, idempotency_key="k", state_json={"a": [2], "b": 1})

    assert again == moved
    assert len(await flows.list()) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"goal": "other"},
        {"controller_id": "other"},
        {"state_json": {"a": 2}},
        {"state_json": None},
        {"correlation_id": "x"},
        {"status": "running"},
        {"current_step": "x"},
        {"wait_json": {}},
        {"state_version": 2},
        {"notify_policy": "silent"},
        {"flow_id": "mine"},
    ],
    ids=lambda other: "-".join(other),
)
async def test_a_key_used_for_something_else_is_refused(
    store: Where, flows: SessionFlows, other: dict[str, Any]
) -> None:
    first = await make(flows, idempotency_key="k", state_json={"a": 1})
    before = dump(store)

    with pytest.raises(FlowExists) as caught:
        await make(flows, **{"idempotency_key": "k", "state_json": {"a": 1}} | other)

    assert caught.value.current == first
    assert dump(store) == before


@pytest.mark.parametrize("flow_id", [None, "mine"])
async def test_a_hundred_creates_with_one_key_make_one_flow(
    flows: SessionFlows, flow_id: str | None
) -> None:
    made = await asyncio.gather(
        *(make(flows, idempotency_key="k", flow_id=flow_id) for _ in range(100))
    )

    assert len({flow.flow_id for flow in made}) == 1
    assert await flows.list() == [made[0]]


async def test_two_payloads_under_one_key_at_once_make_one_flow(flows: SessionFlows) -> None:
    answers = await asyncio.gather(
        *(make(flows, idempotency_key="k", goal=f"goal {n % 2}") for n in range(60)),
        return_exceptions=True,
    )

    made = [answer for answer in answers if isinstance(answer, Flow)]
    assert len(made) == 30
    assert sum(isinstance(answer, FlowExists) for answer in answers) == 30
    assert await flows.list() == [made[0]]


async def test_a_key_is_kept_after_a_restart(store: Where) -> None:
    async with open_runtime(store) as runtime:
        first = await make(bound(runtime), idempotency_key="k")

    async with open_runtime(store) as runtime:
        again = await make(bound(runtime), idempotency_key="k")
        with pytest.raises(FlowExists):
            await make(bound(runtime), idempotency_key="k", goal="other")

    assert again == first


async def test_a_key_belongs_to_its_owner(runtime: Runtime) -> None:
    mine = await make(bound(runtime), idempotency_key="k")

    theirs = await make(bound(runtime, STRANGER), idempotency_key="k", goal="other")

    assert theirs.owner_key == STRANGER
    assert mine.flow_id != theirs.flow_id


async def test_cancelling_one_of_many_creates_with_one_key_leaves_one_flow(
    flows: SessionFlows,
) -> None:
    for rounds in range(12):
        key = f"k{rounds}"
        callers = [asyncio.create_task(make(flows, idempotency_key=key)) for _ in range(10)]

        await step(rounds)
        callers[0].cancel()
        callers[5].cancel()
        answers = await asyncio.gather(*callers, return_exceptions=True)

        made = {answer.flow_id for answer in answers if isinstance(answer, Flow)}
        assert len(made) == 1
        assert len(await flows.list(limit=1000)) == rounds + 1


# ---- reading --------------------------------------------------------------------------------------


async def test_flows_are_listed_newest_first_page_by_page(flows: SessionFlows) -> None:
    made = [await make(flows, goal=f"goal {n}") for n in range(7)]
    pages: list[list[Flow]] = []
    after = None

    while page := await flows.list(limit=3, after=after):
        pages.append(page)
        after = page[-1].flow_id

    assert [len(page) for page in pages] == [3, 3, 1]
    assert [flow for page in pages for flow in page] == made[::-1]


async def test_pages_show_every_flow_once_however_creates_overlapped(flows: SessionFlows) -> None:
    names = [f"mine-{n}" if n % 2 else None for n in range(20)]
    made = await asyncio.gather(*(make(flows, flow_id=name) for name in names))
    seen: list[str] = []
    after = None

    while page := await flows.list(limit=1, after=after):
        after = page[0].flow_id
        seen.append(after)

    assert sorted(seen) == sorted(flow.flow_id for flow in made)


async def test_a_page_continues_where_it_stopped_while_flows_are_made(flows: SessionFlows) -> None:
    made = [await make(flows) for _ in range(4)]
    first = await flows.list(limit=2)
    await make(flows)

    rest = await flows.list(limit=10, after=first[-1].flow_id)

    assert [*first, *rest] == made[::-1]


async def test_a_listing_can_be_restricted(flows: SessionFlows) -> None:
    plain = await make(flows)
    other = await make(flows, controller_id="other", status="running")
    crm = await make(flows, correlation_id="crm:1", status="waiting")
    ended = (await flows.finish(flow_id=(await make(flows)).flow_id, expected_revision=0)).unwrap()

    assert await flows.list(status="queued") == [plain]
    assert await flows.list(status=["waiting", "running"]) == [crm, other]
    assert await flows.list(status={"succeeded"}) == [ended]
    assert await flows.list(controller_id="other") == [other]
    assert await flows.list(correlation_id="crm:1") == [crm]
    assert await flows.list(correlation_id="crm:1", status="queued") == []
    assert await flows.list(controller_id="other", correlation_id="crm:1") == []


async def test_a_cursor_of_nobody_is_refused(flows: SessionFlows) -> None:
    await make(flows)

    with pytest.raises(ValueError, match="names no flow"):
        await flows.list(after="nobody")


async def test_the_latest_flow_is_the_newest_ended_or_not(flows: SessionFlows) -> None:
    assert await flows.find_latest() is None

    await make(flows)
    second = await make(flows)
    ended = (await flows.finish(flow_id=second.flow_id, expected_revision=0)).unwrap()

    assert await flows.find_latest() == ended


async def test_a_token_is_resolved_by_id_and_unique_start(flows: SessionFlows) -> None:
    a = await make(flows, flow_id="report-2026-a")
    b = await make(flows, flow_id="report-2026-b")
    c = await make(flows, flow_id="report-2026")

    assert await flows.resolve(" report-2026-a\n") == a
    assert await flows.resolve("report-2026-b") == b
    assert await flows.resolve("report-2026") == c
    assert await flows.resolve("report-2026-") is None
    assert await flows.resolve("repo") is None
    assert await flows.resolve("report-2027") is None
    for wild in ("report%", "report_2026-a", "%%%%", "____", "REPORT-2026-A", "*", "?????"):
        assert await flows.resolve(wild) is None


async def test_a_unique_start_finds_an_id_beyond_ascii(flows: SessionFlows) -> None:
    flow = await make(flows, flow_id="übung-\U0001f600-1")

    assert await flows.resolve("übung") == flow
    assert await flows.resolve("übung-\U0001f600") == flow


async def test_a_token_is_resolved_by_correlation_the_live_flow_first(flows: SessionFlows) -> None:
    live = await make(flows, correlation_id="crm:17")
    newer = await make(flows, correlation_id="crm:17")
    ended = (await flows.finish(flow_id=newer.flow_id, expected_revision=0)).unwrap()

    assert await flows.resolve("crm:17") == live

    await flows.finish(flow_id=live.flow_id, expected_revision=0)
    assert await flows.resolve("crm:17") == ended


async def test_an_id_goes_before_a_correlation(flows: SessionFlows) -> None:
    named = await make(flows, flow_id="crm-17")
    await make(flows, correlation_id="crm-17")

    assert await flows.resolve("crm-17") == named


async def test_ones_own_key_stands_for_the_newest_live_flow(flows: SessionFlows) -> None:
    assert await flows.resolve(OWNER) is None

    live = await make(flows)
    newer = await make(flows)
    ended = (await flows.finish(flow_id=newer.flow_id, expected_revision=0)).unwrap()
    assert await flows.resolve(f" {OWNER} ") == live

    await flows.finish(flow_id=live.flow_id, expected_revision=0)
    assert await flows.resolve(OWNER) == ended


@pytest.mark.parametrize("token", ["", " ", "\n\t", "\ud800"])
async def test_a_blank_token_stands_for_nothing(flows: SessionFlows, token: str) -> None:
    await make(flows)

    assert await flows.resolve(token) is None


async def test_a_summary_is_filled_with_zeros(flows: SessionFlows) -> None:
    flow = await make(flows)

    summary = await flows.get_task_summary(flow.flow_id)

    statuses = ("queued", "running", "succeeded", "failed", "timed_out", "cancelled", "lost")
    assert isinstance(summary, TaskSummary)
    assert summary.by_status == dict.fromkeys(statuses, 0)
    assert {"subagent", "acp", "cli", "cron"} <= summary.by_runtime.keys()
    assert set(summary.by_runtime.values()) == {0}
    assert (summary.total, summary.active, summary.terminal, summary.failures) == (0, 0, 0, 0)


async def test_a_summary_counts_a_thousand_children_in_mixed_states(flows: SessionFlows) -> None:
    flow = await make(flows)
    ends = ["run", "queue", "complete", "failed", "timed_out", "cancelled"]

    async def child(number: int) -> None:
        end = ends[number % len(ends)]
        runtime = "acp" if number % 2 else "homegrown"
        status = "queued" if end == "queue" else "running"
        task = await link(flows, flow.flow_id, runtime=runtime, status=status)
        if end == "complete":
            await flows.complete_task(task.task_id)
        elif end not in {"run", "queue"}:
            await flows.fail_task(task.task_id, error="no", status=end)

    async with anyio.create_task_group() as group:
        for number in range(1002):
            group.start_soon(child, number)
    summary = await flows.get_task_summary(flow.flow_id)

    assert summary is not None
    assert (summary.total, summary.active, summary.terminal) == (1002, 334, 668)
    assert summary.failures == 334
    assert summary.by_status == {
        "queued": 167,
        "running": 167,
        "succeeded": 167,
        "failed": 167,
        "timed_out": 167,
        "cancelled": 167,
        "lost": 0,
    }
    assert (summary.by_runtime["acp"], summary.by_runtime["homegrown"]) == (501, 501)


# ---- nothing is shared ----------------------------------------------------------------------------


async def test_changing_what_was_handed_out_changes_nothing(
    store: Where, runtime: Runtime, flows: SessionFlows
) -> None:
    origin = {"channel": ["slack"]}
    flows = bound(runtime, requester_origin=origin)
    state = {"items": [1]}
    flow = await make(flows, flow_id="f", state_json=state, wait_json={"kind": ["reply"]})
    task = await link(flows, "f", input_json={"items": [1]})
    before = dump(store)

    origin["channel"].append("x")
    state["items"].append("x")
    created = await flows.run_task(flow_id="f", task="t", runtime="acp", run_id="r")
    seen = [flow, created.flow, await flows.get("f"), await flows.find_latest()]
    seen += await flows.list()
    for record in seen:
        assert record is not None
        record.state_json["items"].append("x")
        record.requester_origin["channel"].append("x")
        record.wait_json["kind"].append("x")
    flows.requester_origin["channel"].append("x")
    for child in (task, await flows.get_task(task.task_id), *await flows.list_tasks("f")):
        assert child is not None
        if child.input_json is not None:
            child.input_json["items"].append("x")
    for event in await flows.history("f"):
        event.changed["stateJson"] = "x"
    now = await flows.get("f")

    assert now is not None
    assert now.state_json == {"items": [1]}
    assert now.requester_origin == flows.requester_origin == {"channel": ["slack"]}
    assert now.wait_json == {"kind": ["reply"]}
    assert dump(store)["flows"] == before["flows"]
    updated = await flows.update(flow_id="f", expected_revision=0, current_step="next")
    assert updated.unwrap().state_json == {"items": [1]}


async def test_a_result_is_not_shared_either(flows: SessionFlows) -> None:
    flow = await make(flows)
    task = await link(flows, flow.flow_id)

    done = await flows.complete_task(task.task_id, result_json={"items": [1]})
    assert done is not None
    done.result_json["items"].append("x")
    outcome = await flows.wait_task(task.task_id)
    outcome.result["items"].append("x")  # type: ignore[union-attr]

    again = await flows.get_task(task.task_id)
    assert again is not None and again.result_json == {"items": [1]}


# ---- waiting for the end --------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [OWNER, STRANGER])
async def test_the_result_of_an_unknown_flow_is_refused(runtime: Runtime, owner: str) -> None:
    await make(bound(runtime, STRANGER), flow_id="theirs")
    wanted = "theirs" if owner == OWNER else "nobody"

    with pytest.raises(FlowNotFound, match=r"^Flow not found\.$"):
        await bound(runtime, owner).result(wanted)


async def test_a_result_is_answered_before_and_after_the_end(flows: SessionFlows) -> None:
    flow = await make(flows)
    early = [asyncio.create_task(flows.result(flow.flow_id)) for _ in range(3)]
    await step(20)
    assert not any(waiter.done() for waiter in early)

    done = await flows.finish(flow_id=flow.flow_id, expected_revision=0, state_json={"out": 1})

    assert isinstance(done, Applied)
    assert [await waiter for waiter in early] == [done.flow] * 3
    assert await flows.result(flow.flow_id) == done.flow


async def test_cancelling_a_wait_for_a_result_only_stops_the_waiting(flows: SessionFlows) -> None:
    flow = await make(flows)

    for rounds in range(8):
        waiter = asyncio.create_task(flows.result(flow.flow_id))
        await step(rounds)
        waiter.cancel()
        await asyncio.wait({waiter})

    done = await flows.finish(flow_id=flow.flow_id, expected_revision=0)
    assert await flows.result(flow.flow_id) == done.flow


async def test_a_result_waits_across_a_failed_and_a_cancelled_flow(flows: SessionFlows) -> None:
    failed, cancelled = await make(flows), await make(flows)
    waiters = [
        asyncio.create_task(flows.result(failed.flow_id)),
        asyncio.create_task(flows.result(cancelled.flow_id)),
    ]
    await step(10)

    await flows.fail(flow_id=failed.flow_id, expected_revision=0, blocked_summary="no luck")
    await flows.cancel(cancelled.flow_id)
    ends = [await waiter for waiter in waiters]

    assert [flow.status for flow in ends] == ["failed", "cancelled"]
    assert ends[0].failure is not None and ends[0].failure.message == "no luck"


async def test_a_created_child_is_answered_with_its_flow_untouched(flows: SessionFlows) -> None:
    flow = await make(flows)

    created = await flows.run_task(flow_id=flow.flow_id, runtime="acp", task="t")

    assert isinstance(created, Created)
    assert created.flow == flow == await flows.get(flow.flow_id)
