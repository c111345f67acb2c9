"""The ledger face as users write it, held to strict types. Checked, never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never, assert_type

import flowstead
from flowstead import (
    UNSET,
    Applied,
    Cancelled,
    CancelReport,
    Created,
    Event,
    Failed,
    Flow,
    FlowError,
    Limits,
    Lost,
    Refused,
    Rejected,
    Retry,
    RevisionConflict,
    Runtime,
    SessionFlows,
    Succeeded,
    Task,
    TaskCancelReport,
    TaskContext,
    TaskSummary,
    TimedOut,
    open_runtime,
)


async def classify(ctx: TaskContext, thread: dict[str, Any]) -> str:
    """A task function."""
    assert_type(ctx.flow_id, str)
    assert_type(ctx.task_id, str)
    assert_type(ctx.run_id, str | None)
    assert_type(ctx.attempt, int)
    assert_type(ctx.deadline, int | None)
    await ctx.progress("reading")
    await ctx.heartbeat()
    return str(thread["subject"])


async def inbox(now_ms: int) -> Flow:
    """The example, with every answer narrowed the way it is used."""
    async with open_runtime("flows.db") as runtime:
        assert_type(runtime, Runtime)
        flows = runtime.tasks.flow.bind_session(
            session_key="agent:main:main", requester_origin={"channel": "slack"}
        )
        assert_type(flows, SessionFlows)
        created = await flows.create_managed(
            controller_id="my-plugin/inbox-triage",
            goal="triage inbox",
            current_step="classify",
            state_json={"businessThreads": [], "personalItems": []},
        )
        assert_type(created, Flow)
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
        if not child.created:
            assert_type(child, Refused)
            raise RuntimeError(child.reason)
        assert_type(child, Created)
        assert_type(child.task, Task)
        waiting = await flows.set_waiting(
            flow_id=created.flow_id,
            expected_revision=created.revision,
            current_step="await_business_reply",
            state_json={"businessThreads": ["thread-1"]},
            wait_json={"kind": "reply", "threadKey": "slack:thread-1"},
        )
        if not waiting.applied:
            assert_type(waiting, Rejected)
            raise RuntimeError(waiting.code)
        assert_type(waiting, Applied)
        resumed = await flows.resume(
            flow_id=waiting.flow.flow_id,
            expected_revision=waiting.flow.revision,
            status="running",
            current_step="finalize",
            state_json=waiting.flow.state_json,
        )
        if isinstance(resumed, Rejected):
            resumed.unwrap()
        assert_type(resumed, Applied)
        done = await flows.finish(
            flow_id=resumed.flow.flow_id,
            expected_revision=resumed.flow.revision,
            state_json=UNSET,
        )
        return done.unwrap()


def told(answer: Applied | Rejected) -> str:
    """By match."""
    match answer:
        case Applied(flow=flow):
            return f"now at {flow.revision}"
        case Rejected(code="revision_conflict", current=current):
            return f"{current.revision if current else '?'}"
        case Rejected(code=code, reason=reason):
            return f"{code}: {reason}"
        case _:
            assert_never(answer)


def told_of_a_child(answer: Created | Refused) -> Task | None:
    """By match and by attribute."""
    if answer.created:
        assert_type(answer.task, Task)
        assert_type(answer.reason, None)
    else:
        assert_type(answer.task, Task | None)
        assert_type(answer.reason, str)
    match answer:
        case Created(task=task):
            return task
        case Refused(code="duplicate", task=task):
            return task
        case Refused():
            return None
        case _:
            assert_never(answer)


def told_of_an_end(outcome: Succeeded | Failed | TimedOut | Cancelled | Lost) -> str:
    """Every outcome, or the checker says so."""
    match outcome:
        case Succeeded(result=result):
            return str(result)
        case Failed(failure=failure) | TimedOut(failure=failure):
            return failure.message or failure.kind
        case Cancelled():
            return "cancelled"
        case Lost(failure):
            return failure.kind
        case _:
            assert_never(outcome)


async def everything(flows: SessionFlows, origin: Mapping[str, Any]) -> None:
    """Every method, and what it answers."""
    assert_type(flows.session_key, str)
    flow = await flows.create_managed(
        controller_id="c",
        goal="g",
        flow_id="order-17",
        correlation_id="crm:17",
        idempotency_key="once",
        status="waiting",
        notify_policy="silent",
        current_step=None,
        state_json=None,
        wait_json={"kind": "reply"},
        state_version=2,
    )
    assert_type(await flows.get(flow.flow_id), Flow | None)
    assert_type(await flows.find_latest(), Flow | None)
    assert_type(await flows.resolve("order"), Flow | None)
    assert_type(await flows.list(status=["queued", "running"], limit=5), list[Flow])
    assert_type(await flows.list(status="queued", after=flow.flow_id), list[Flow])
    assert_type(await flows.get_task_summary(flow.flow_id), TaskSummary | None)
    assert_type(await flows.list_tasks(flow.flow_id, status="running"), list[Task])
    launched = await flows.run_task(
        flow_id=flow.flow_id,
        task="classify",
        run=classify,
        input_json={"subject": "hello"},
        timeout=60,
        retry=Retry(max_attempts=4),
    )
    task = launched.unwrap()
    assert_type(task, Task)
    by_name = await flows.run_task(flow_id=flow.flow_id, task="classify", run="classify")
    assert_type(by_name, Created | Refused)
    assert_type(await flows.get_task(task.task_id), Task | None)
    assert_type(await flows.start_task(task.task_id), Task | None)
    assert_type(await flows.progress_task(task.task_id, summary="half"), Task | None)
    assert_type(await flows.complete_task(task.task_id, result_json=[1]), Task | None)
    assert_type(await flows.fail_task(task.task_id, error="no", status="timed_out"), Task | None)
    assert_type(await flows.cancel_task(task.task_id), TaskCancelReport)
    outcome = await flows.wait_task(task.task_id)
    assert_type(outcome, Succeeded | Failed | TimedOut | Cancelled | Lost)
    told_of_an_end(outcome)
    updated = await flows.update(
        flow_id=flow.flow_id, expected_revision=0, current_step=None, state_json={"n": 1}
    )
    assert_type(updated, Applied | Rejected)
    assert_type(updated.applied, bool)
    failed = await flows.fail(flow_id=flow.flow_id, expected_revision=1, blocked_summary="why")
    asked = await flows.request_cancel(flow_id=flow.flow_id, expected_revision=1)
    for answer in (updated, failed, asked):
        told(answer)
    report = await flows.cancel(flow.flow_id, expected_revision=2, grace=1.5)
    assert_type(report, CancelReport)
    assert_type(report.tasks, list[Task])
    assert_type(await flows.history(flow.flow_id, after_seq=3), list[Event])
    assert_type(await flows.result(flow.flow_id), Flow)
    async with flows.watch(flow.flow_id, after_seq=0) as events:
        async for event in events:
            assert_type(event, Event)


async def read_modify_write(flows: SessionFlows, flow_id: str) -> Flow:
    """The loop every user writes, with values and with exceptions."""
    while True:
        flow = await flows.get(flow_id)
        if flow is None:
            raise LookupError(flow_id)
        answer = await flows.update(
            flow_id=flow_id, expected_revision=flow.revision, state_json={"n": 1}
        )
        if answer.applied:
            return answer.flow
        try:
            answer.unwrap()
        except RevisionConflict as conflict:
            assert_type(conflict.current, Flow | None)
        except FlowError as error:
            raise RuntimeError from error


async def opened() -> None:
    """The ways in."""
    runtime = open_runtime(":memory:", durability="normal", limits=Limits(mailbox=10))
    async with runtime:
        same = runtime.task_flow.from_tool_context({"sessionKey": "agent:x"})
        assert_type(same, SessionFlows)
        assert_type(await runtime.admin.list(), list[Flow])
        assert_type(runtime.statistics().commits, int)
    await runtime.aclose()
    assert_type(flowstead.open_runtime(), Runtime)
