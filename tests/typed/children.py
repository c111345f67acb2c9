"""Children as users write them, of every sort: policies, executors, nested flows, reviews. Checked, never run."""

from __future__ import annotations

from typing import Any, assert_never, assert_type

import msgspec

from flowstead import (
    Applied,
    Cancelled,
    CancelReport,
    Category,
    Command,
    Created,
    Failed,
    Fatal,
    Flow,
    FlowContext,
    Limits,
    Lost,
    NeedsReview,
    Nested,
    Process,
    Registry,
    Rejected,
    Retry,
    SessionFlows,
    Settlement,
    Step,
    Succeeded,
    Task,
    TaskContext,
    TaskRetryReport,
    TaskSignal,
    TaskSummary,
    TimedOut,
    Transient,
)
from flowstead.executors import Call, Executor, SyncContext, TaskInfo
from flowstead.settlement import SettledAs

registry = Registry()


# ---- policies -------------------------------------------------------------------------------------


class RateLimited(Exception):
    """A user's own."""


POLICIES = [
    Retry(retry_on=ConnectionError),
    Retry(retry_on=(ConnectionError, RateLimited)),
    Retry(retry_on=[TimeoutError, "transient", "httpx.ReadTimeout"]),
    Retry(retry_on="transient"),
    Retry(retry_on=Category.TRANSIENT),
    Retry(retry_on=(Category.TRANSIENT, RateLimited)),
    Retry(retry_on=None),
    Retry(max_attempts=5, initial=0.5, factor=2, max_delay=30, jitter=0),
]


def sort_of(error: BaseException) -> Category | None:
    """By category, or not at all."""
    return Category.AUTH if isinstance(error, RateLimited) else None


def word_for(error: BaseException) -> str | None:
    """A word will do."""
    return "transient" if isinstance(error, RateLimited) else None


@registry.task(
    timeout=60,
    idle_timeout=5.5,
    queue_timeout=3600,
    retry=Retry(max_attempts=4, retry_on=ConnectionError),
    classify=sort_of,
    concurrency=2,
)
async def fetch(ctx: TaskContext, url: str) -> dict[str, Any]:
    """What a child says of its own failure."""
    if ctx.attempt == 1:
        raise Transient("busy", retry_after=1.5)
    if ctx.attempt == 2:
        raise Fatal("gone for good")
    if ctx.attempt == 3:
        raise NeedsReview("the amount is odd")
    await ctx.heartbeat()
    return {"url": url}


@registry.task(idempotent=False, classify=word_for)
async def charge(ctx: TaskContext, amount: int) -> int:
    """Not to be done twice."""
    return amount


@registry.task(name="crunch", executor="process")
def crunch(info: TaskInfo, numbers: list[int]) -> int:
    """In a process of its own."""
    assert_type(info.attempt, int)
    assert_type(info.deadline, int | None)
    return sum(numbers)


@registry.task
def scan(ctx: SyncContext, path: str) -> list[str]:
    """In a thread."""
    assert_type(ctx.cancel_requested, bool)
    ctx.check_cancelled()
    ctx.progress("half")
    ctx.heartbeat()
    return [path]


def told_by(signal: TaskSignal) -> float | None:
    """A signal says how long to wait."""
    assert_type(Transient(), Transient)
    assert_type(Fatal("never", retry_after=None), Fatal)
    return signal.retry_after


# ---- a spec and its executor ----------------------------------------------------------------------


class Query(msgspec.Struct, frozen=True):
    """What somebody's own executor takes."""

    sql: str


class Warehouse:
    """Somebody's own executor."""

    name = "warehouse"
    spec = Query
    external = True

    async def run(self, call: Call) -> Any:
        """One attempt."""
        assert_type(call.interrupted, bool)
        call.on_kill(lambda: None)
        call.touch()
        return call.spec


def register() -> Executor:
    """By its class or by its name."""
    warehouse: Executor = registry.executor(Warehouse())
    return warehouse


# ---- in a controller ------------------------------------------------------------------------------


@registry.controller("research/topic")
async def topic(flow: FlowContext) -> None:
    """A flow that other flows run."""
    await flow.finish(state_json={"found": 1})


@registry.controller("research")
async def research(flow: FlowContext) -> None:
    """Every sort of child, in every verb."""
    await flow.run(Nested("research/topic"), {"topic": "a"}, name="a")
    await flow.run(Nested("research/topic", goal="find out"), timeout=60, queue_timeout=5)
    await flow.run(Command(["git", "fetch"], cwd="/srv", ok_codes=(0, 1)), idle_timeout=9)
    await flow.run(Command(["wc", "-l"], stdin="text", result="lines"), "text")
    await flow.run(Process(crunch), [1, 2])
    await flow.run(scan, "/tmp", idempotent=False)
    await flow.run(Query("select 1"), fallback=[Nested("research/topic"), "fetch", fetch])
    step = await flow.start(Nested("research/topic"), {}, name="b", queue_timeout=60)
    assert_type(step, Step)
    other = await flow.start(fetch, "x", retry=Retry(retry_on=ConnectionError), idempotent=True)
    assert_type(await flow.gather(step, other, return_outcomes=True), list[Any])
    assert_type(await flow.map(Nested("research/topic"), [{}, {}], limit=2), list[Any])
    assert_type(await flow.map(Process(crunch), [[1], [2]]), list[Any])
    assert_type(flow.flow.parent_task_id, str | None)
    assert_type(flow.flow.cancel_started_at, int | None)
    assert_type(flow.flow.retry_of, str | None)
    match await step.outcome():
        case Succeeded(result=result):
            assert_type(result, Any)
        case Failed(failure=failure) | TimedOut(failure=failure):
            assert_type(failure.category, Category | None)
        case Cancelled(failure=failure) | Lost(failure=failure):
            assert_type(failure.message, str | None)


def told_of_an_end(outcome: Succeeded | Failed | TimedOut | Cancelled | Lost) -> str:
    """The five outcomes are all there are, abandoned and interrupted children included."""
    match outcome:
        case Succeeded():
            return "succeeded"
        case Failed(failure):
            return sort_in_words(failure.category)
        case TimedOut(failure):
            return failure.code or "late"
        case Cancelled(failure):
            return "abandoned" if failure.kind == "abandoned" else "cancelled"
        case Lost(failure):
            return failure.code or failure.kind
        case _:
            assert_never(outcome)


def sort_in_words(category: Category | None) -> str:
    """Every category, or the checker says so."""
    match category:
        case None | Category.OTHER:
            return "some failure"
        case Category.TRANSIENT | Category.TIMED_OUT:
            return "worth another attempt"
        case Category.AUTH | Category.FATAL:
            return "hopeless"
        case Category.VALIDATION:
            return "to be looked at"
        case _:
            assert_never(category)


# ---- in the ledger --------------------------------------------------------------------------------


async def everything_new(flows: SessionFlows, flow: Flow) -> None:
    """Every new method, and what it answers."""
    launched = await flows.run_task(
        flow_id=flow.flow_id,
        task="fetch",
        run=Command(["true"]),
        timeout=1,
        idle_timeout=1,
        queue_timeout=1.5,
        idempotent=False,
    )
    task = launched.unwrap()
    assert_type(task.queue_timeout, float | None)
    assert_type(task.child_flow_id, str | None)
    assert_type(task.review_requested_at, int | None)
    assert_type(task.kill_requested_at, int | None)
    for run in (Process(crunch), Nested("research"), scan, fetch, "fetch"):
        await flows.run_task(flow_id=flow.flow_id, task="any", run=run)
    spawned = await flows.spawn_detached(task="one thing", run=fetch, input_json="x", goal="do it")
    assert_type(spawned, Created)
    assert_type(spawned.flow, Flow)
    assert_type(spawned.unwrap(), Task)
    assert_type(await flows.spawn_detached(task="elsewhere", runtime="cron"), Created)
    retried = await flows.retry_task(task.task_id, input_json={"amount": 2})
    assert_type(retried, TaskRetryReport)
    assert_type(retried.retried, bool)
    assert_type(retried.task, Task | None)
    again = await flows.retry_flow(flow.flow_id)
    assert_type(again, Applied | Rejected)
    if again.applied:
        assert_type(again.flow.retry_of, str | None)
    assert_type(await flows.get_task_summary(flow.flow_id, nested=True), TaskSummary | None)
    report = await flows.cancel(flow.flow_id)
    assert_type(report, CancelReport)
    for line in report.descendants:
        assert_type(line, Settlement)
        assert_type(told_of_a_line(line), str)


def told_of_a_line(line: Settlement) -> str:
    """Every way a descendant can have ended, or not."""
    match line.state:
        case SettledAs.SETTLED:
            return "gone"
        case SettledAs.KILLED:
            return f"killed at {line.killed_at}"
        case SettledAs.ABANDONED:
            return line.why or "given up"
        case SettledAs.RUNNING:
            return f"asked at {line.asked_at}"
        case _:
            assert_never(line.state)


LIMITS = Limits(
    running_in_all=100,
    nested_depth=4,
    nested_flows=50,
    threads=8,
    processes=2,
    kill_after=1.5,
    abandon_after=2,
    stall_seconds=0.25,
)
