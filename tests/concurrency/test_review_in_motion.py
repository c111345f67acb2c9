"""Reviews while things move: controllers that go on, several at once, commits that fail, restarts in the middle."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from flowstead import (
    Flow,
    FlowContext,
    Limits,
    NeedsReview,
    Registry,
    Retry,
    RevisionConflict,
    SessionFlows,
    Succeeded,
    Task,
    TaskContext,
)
from flowstead.controller import _differ_by_standing_only
from flowstead.model.flow import Failure, FlowStatus
from flowstead.model.wait import Wait, WaitKind
from flowstead.store import codec
from flowstead.store.memory import MemoryStore, MemoryTables
from flowstead.testing import ManualClock
from tests.faulty_store import (
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    holds_nothing,
    new_flow,
    running,
    settle,
    soon,
    turns,
)
from tests.unit.given import NOW, a_flow

TROUBLES = {
    "not written": (NOT_WRITTEN, False),
    "unknown and not written": (UNKNOWN, False),
    "unknown and written": (UNKNOWN, True),
}


class Desk:
    """Children that need a person's eyes until their input is right, or somebody has looked; a gate for each."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.registry.task(self.check, name="check")
        self.registry.task(self.waits, name="waits")
        self.gates: dict[str, asyncio.Event] = {}
        self.runs: list[tuple[str, int, Any]] = []
        self.entered = 0

    async def check(self, ctx: TaskContext, given: Any) -> Any:
        name = str(ctx.run_id)
        self.runs.append((name, ctx.attempt, given))
        await self.gate(name).wait()
        if given == "bad" and ctx.attempt == 1:
            raise NeedsReview(f"{name} does not look right")
        return given

    async def waits(self, ctx: TaskContext, given: Any) -> Any:
        await self.gate(str(ctx.run_id)).wait()
        return given

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def end(self, *names: str) -> None:
        """Let children come to their ends, one after another."""
        for name in names:
            self.gate(name).set()
            await settle()


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def launch(flows: SessionFlows, flow_id: str, name: str, given: Any = "bad") -> str:
    made = await soon(
        flows.run_task(flow_id=flow_id, task=name, run="check", run_id=name, input_json=given)
    )
    return made.unwrap().task_id


async def flow_of(flows: SessionFlows, flow_id: str) -> Flow:
    flow = await flows.get(flow_id)
    assert flow
    return flow


async def task_of(flows: SessionFlows, task_id: str) -> Task:
    task = await flows.get_task(task_id)
    assert task
    return task


async def resume(flows: SessionFlows, flow_id: str, **given: Any) -> Any:
    revision = (await flow_of(flows, flow_id)).revision
    return await soon(flows.resume(flow_id=flow_id, expected_revision=revision, **given))


async def pass_time(clock: ManualClock, seconds: float) -> None:
    for _ in range(round(seconds * 10)):
        clock.advance(0.1)
        await settle()


async def types_of(flows: SessionFlows, flow_id: str) -> list[str]:
    return [str(event.type) for event in await flows.history(flow_id)]


# ---- the controller ---------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["resume", "retry", "retry with input", "give up"])
async def test_a_controller_goes_on_across_a_block_and_its_answer(
    answer: str, desk: Desk, clock: ManualClock
):
    @desk.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        desk.entered += 1
        doubtful = await flow.start("check", "bad", name="doubtful")
        await flow.update(state_json=["begun"])
        await flow.run("waits", name="beside")
        # The flow has been blocked meanwhile, which is nothing this controller need know of.
        await flow.update(state_json=["begun", "beside"], current_step="blocked")
        await flow.run("waits", name="later")
        await flow.update(state_json=["begun", "beside", "later"])
        [outcome] = await flow.gather(doubtful, return_outcomes=True)
        await flow.update(state_json=type(outcome).__name__, current_step=None)

    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await desk.end("doubtful")
        blocked = await flow_of(flows, flow_id)
        [doubtful] = [task for task in await flows.list_tasks(flow_id) if task.run_id == "doubtful"]
        assert (blocked.status, blocked.blocked_task_id) == ("blocked", doubtful.task_id)
        assert blocked.blocked_summary == "'doubtful' needs review: doubtful does not look right"

        await desk.end("beside")
        assert (await flow_of(flows, flow_id)).status == "blocked"
        assert (await flow_of(flows, flow_id)).state_json == ["begun", "beside"]
        match answer:
            case "resume":
                assert (await resume(flows, flow_id, status="running")).applied
            case "retry":
                assert (await soon(flows.retry_task(doubtful.task_id))).retried
            case "retry with input":
                assert (await soon(flows.retry_task(doubtful.task_id, input_json="good"))).retried
            case _:
                assert (await soon(flows.cancel_task(doubtful.task_id))).cancelled
        await settle()
        assert (await flow_of(flows, flow_id)).status == "running"
        assert (await flow_of(flows, flow_id)).blocked_task_id is None
        await desk.end("later")

        ended = await soon(flows.result(flow_id))
        gives_up = answer == "give up"
        assert (ended.status, ended.state_json) == (
            "succeeded",
            "Cancelled" if gives_up else "Succeeded",
        )
        assert desk.entered == 1
        again = ("doubtful", 2, "good" if answer == "retry with input" else "bad")
        assert desk.runs == [("doubtful", 1, "bad"), *([] if gives_up else [again])]
        await settle()
        assert holds_nothing(runtime)


async def test_a_controller_may_end_its_flow_while_a_child_waits_for_a_person(
    desk: Desk, clock: ManualClock
):
    @desk.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await flow.start("check", "bad", name="doubtful")
        await flow.run("waits", name="beside")
        await flow.finish(state_json="without it")

    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c")
        await desk.end("doubtful")
        assert (await flow_of(flows, flow_id)).status == "blocked"

        await desk.end("beside")

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", "without it")
        assert (ended.blocked_task_id, ended.blocked_summary) == (None, None)
        [doubtful] = [task for task in await flows.list_tasks(flow_id) if task.run_id == "doubtful"]
        assert doubtful.status == "cancelled"
        assert not (await soon(flows.retry_task(doubtful.task_id))).retried
        await settle()
        assert holds_nothing(runtime)


async def test_a_controllers_updates_hold_wherever_blocks_and_answers_come_between(
    clock: ManualClock,
):
    met = set()
    for steps in range(0, 60, 2):
        desk = Desk()

        @desk.registry.controller("c")
        async def controller(flow: FlowContext) -> None:
            for name in ("x", "y"):
                await flow.start("check", "bad", name=name)
            for n in range(12):
                await flow.update(state_json=n)
                met.add(flow.flow.status.value)
            await flow.run("waits", name="last")

        async with running(clock=clock, registry=desk.registry) as runtime:
            flows = flows_of(runtime)
            flow_id = await new_flow(flows, "c")
            await turns(steps)
            desk.gate("x").set()
            await turns(steps % 7)
            desk.gate("y").set()
            for _ in range(4):
                await turns(5)
                flow = await flow_of(flows, flow_id)
                if flow.status == "blocked":
                    # Its controller may be faster; then we ask again.
                    await soon(
                        flows.resume(
                            flow_id=flow_id, expected_revision=flow.revision, status="running"
                        )
                    )
            await settle()
            while (await flow_of(flows, flow_id)).status == "blocked":
                assert (await resume(flows, flow_id, status="running")).applied
                await settle()
            assert (await flow_of(flows, flow_id)).state_json == 11
            await desk.end("last")
            assert (await soon(flows.result(flow_id))).status == "succeeded"
            revisions = [event.revision for event in await flows.history(flow_id)]
            assert sorted(set(revisions)) == list(range(revisions[-1] + 1))
            assert revisions == sorted(revisions)
    assert {"running", "blocked"} <= met, "vacuous: nothing ever came between"


@pytest.mark.parametrize("change", ["update", "resume", "wait"])
async def test_a_person_who_changes_the_flow_itself_is_not_overwritten(
    change: str, desk: Desk, clock: ManualClock
):
    seen: list[Any] = []

    @desk.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        await flow.start("check", "bad", name="doubtful")
        await flow.run("waits", name="beside")
        with pytest.raises(RevisionConflict) as caught:
            await flow.update(state_json="the controller's")
        seen.append(caught.value.current and caught.value.current.state_json)

    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "c", state_json="first")
        await desk.end("doubtful")
        revision = (await flow_of(flows, flow_id)).revision

        match change:
            case "update":
                call = flows.update(
                    flow_id=flow_id, expected_revision=revision, state_json="a person's"
                )
            case "resume":
                call = flows.resume(
                    flow_id=flow_id,
                    expected_revision=revision,
                    status="running",
                    state_json="a person's",
                )
            case _:
                call = flows.set_waiting(
                    flow_id=flow_id,
                    expected_revision=revision,
                    wait_json={"for": "a person"},
                    state_json="a person's",
                )
        assert (await call).applied
        await desk.end("beside")

        assert seen == ["a person's"]


STANDING = {
    "nothing": {},
    "blocked": {
        "status": FlowStatus.BLOCKED,
        "blocked_task_id": "t-1",
        "blocked_summary": "look at it",
    },
    "went on": {"status": FlowStatus.QUEUED, "blocked_task_id": None, "blocked_summary": None},
    "requested": {"cancel_requested_at": NOW},
    "cancel began": {"cancel_requested_at": NOW, "cancel_started_at": NOW},
    "waits": {
        "status": FlowStatus.WAITING,
        "wait_json": Raw(b'{"kind":"word"}'),
        "awaiting": (("t-1",),),
        "park_at": NOW,
    },
}
SUBSTANCE = {
    "state": {"state_json": Raw(b'{"threads":[1]}')},
    "step": {"current_step": "answer"},
    "wait": {
        "status": FlowStatus.WAITING,
        "wait_json": Raw(b'{"kind":"word"}'),
        "wait": Wait(kind=WaitKind.SIGNAL, token="t"),
        "awaiting": (),
        "park_at": None,
    },
    "end": {"status": FlowStatus.SUCCEEDED, "ended_at": NOW},
    "failure": {
        "status": FlowStatus.FAILED,
        "failure": Failure(kind="failed"),
        "ended_at": NOW,
    },
}


def differ_by_standing_only(**changed: Any) -> bool:
    mine = a_flow()
    current = msgspec.structs.replace(
        mine, revision=mine.revision + 3, updated_at=mine.updated_at + 9, **changed
    )
    return _differ_by_standing_only(codec.encode(mine), codec.encode(current))


@pytest.mark.parametrize("changed", STANDING.values(), ids=list(STANDING))
def test_what_the_runtime_does_to_any_flow_is_no_conflict_for_its_controller(
    changed: dict[str, Any],
):
    assert differ_by_standing_only(**changed)


@pytest.mark.parametrize("changed", SUBSTANCE.values(), ids=list(SUBSTANCE))
@pytest.mark.parametrize("standing", STANDING.values(), ids=list(STANDING))
def test_what_somebody_has_written_into_a_flow_is_a_conflict_whatever_its_standing(
    changed: dict[str, Any], standing: dict[str, Any]
):
    assert not differ_by_standing_only(**(standing | changed))


# ---- several at once --------------------------------------------------------------------------------


async def test_of_several_reviews_the_oldest_blocks_the_flow_and_the_next_takes_its_place(
    desk: Desk, clock: ManualClock
):
    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        ids = {name: await launch(flows, flow_id, name) for name in ("a", "b", "c")}
        # In another order than they were made.
        for name in ("c", "a", "b"):
            await desk.end(name)
            clock.advance(1)
        blockers = []
        while (flow := await flow_of(flows, flow_id)).status == "blocked":
            blockers.append(flow.blocked_task_id)
            assert (await resume(flows, flow_id)).applied
            await settle()

        assert blockers == [ids["c"], ids["a"], ids["b"]]
        assert [task.status for task in await flows.list_tasks(flow_id)] == ["succeeded"] * 3
        assert sorted(desk.runs) == [(name, n, "bad") for name in "abc" for n in (1, 2)]
        assert holds_nothing(runtime)


async def test_of_several_reviews_the_oldest_comes_first_also_after_a_restart(
    desk: Desk, clock: ManualClock
):
    tables = MemoryTables()
    async with running(MemoryStore(tables), clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        ids = {name: await launch(flows, flow_id, name) for name in ("a", "b", "c")}
        for name in ("c", "b", "a"):
            await desk.end(name)
            clock.advance(1)

    async with running(MemoryStore(tables), clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        blockers = []
        while (flow := await flow_of(flows, flow_id)).status == "blocked":
            blockers.append(flow.blocked_task_id)
            assert (await resume(flows, flow_id)).applied
            await settle()

        assert blockers == [ids["c"], ids["b"], ids["a"]]


async def test_an_answer_to_a_review_that_does_not_block_leaves_the_block_as_it_is(
    desk: Desk, clock: ManualClock
):
    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        ids = {name: await launch(flows, flow_id, name) for name in ("a", "b", "c")}
        await desk.end("a", "b", "c")
        blocked = await flow_of(flows, flow_id)

        assert (await soon(flows.retry_task(ids["b"]))).retried
        assert (await soon(flows.cancel_task(ids["c"]))).cancelled
        await settle()

        assert await flow_of(flows, flow_id) == blocked
        assert [task.status for task in await flows.list_tasks(flow_id)] == [
            "queued",
            "succeeded",
            "cancelled",
        ]
        assert (await resume(flows, flow_id)).applied
        await settle()
        assert (await flow_of(flows, flow_id)).status == "queued"
        assert (await task_of(flows, ids["a"])).status == "succeeded"


async def test_answers_given_at_the_same_moment_start_one_attempt(desk: Desk, clock: ManualClock):
    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "a")
        await desk.end("a")
        revision = (await flow_of(flows, flow_id)).revision

        answers = await soon(
            asyncio.gather(
                *(flows.retry_task(task_id) for _ in range(5)),
                flows.resume(flow_id=flow_id, expected_revision=revision),
            )
        )
        await settle()

        assert answers[0].retried
        assert (await flow_of(flows, flow_id)).status == "queued"
        assert await soon(flows.wait_task(task_id)) == Succeeded("bad")
        assert desk.runs == [("a", 1, "bad"), ("a", 2, "bad")]


async def test_a_child_under_review_takes_no_room_from_the_others(desk: Desk, clock: ManualClock):
    limits = Limits(running_in_all=1, running_children=1)
    async with running(clock=clock, registry=desk.registry, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id, other = [await new_flow(flows) for _ in range(2)]
        doubtful = await launch(flows, flow_id, "a")
        await launch(flows, flow_id, "b", "good")
        await launch(flows, other, "c", "good")

        await desk.end("a", "b", "c")
        await settle()

        assert [task.status for task in await flows.list_tasks(flow_id)] == ["queued", "succeeded"]
        assert [task.status for task in await flows.list_tasks(other)] == ["succeeded"]
        assert (await soon(flows.retry_task(doubtful))).retried
        assert await soon(flows.wait_task(doubtful)) == Succeeded("bad")


# ---- other things that happen to the flow -----------------------------------------------------------


@pytest.mark.parametrize("answer", ["retry", "give up"])
async def test_a_flow_that_waited_when_it_was_blocked_waits_again(
    answer: str, desk: Desk, clock: ManualClock
):
    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "a")
        await flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json={"kind": "word"})
        await desk.end("a")
        blocked = await flow_of(flows, flow_id)
        assert (blocked.status, blocked.wait_json) == ("blocked", {"kind": "word"})

        if answer == "retry":
            assert (await soon(flows.retry_task(task_id))).retried
        else:
            assert (await soon(flows.cancel_task(task_id))).cancelled
        await settle()

        flow = await flow_of(flows, flow_id)
        assert (flow.status, flow.wait_json) == ("waiting", {"kind": "word"})
        assert (flow.blocked_task_id, flow.blocked_summary) == (None, None)
        assert (await task_of(flows, task_id)).ended_at


@pytest.mark.parametrize("how", ["request", "cancel"])
async def test_a_stop_does_not_wait_for_the_person(how: str, desk: Desk, clock: ManualClock):
    async with running(clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "a")
        await desk.end("a")
        revision = (await flow_of(flows, flow_id)).revision

        if how == "cancel":
            assert (await soon(flows.cancel(flow_id))).cancelled
        else:
            answer = await flows.request_cancel(flow_id=flow_id, expected_revision=revision)
            assert answer.applied

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.blocked_task_id) == ("cancelled", None)
        assert (await task_of(flows, task_id)).status == "cancelled"
        assert not (await soon(flows.retry_task(task_id))).retried
        assert desk.runs == [("a", 1, "bad")]


async def test_a_child_that_was_to_stop_asks_no_person(clock: ManualClock):
    go = asyncio.Event()

    async def objects(ctx: TaskContext, given: Any) -> None:
        try:
            await go.wait()
        finally:
            raise NeedsReview("not now")

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        made = await flows.run_task(
            flow_id=flow_id, task="t", run=objects, retry=Retry(max_attempts=3)
        )
        await settle()

        assert (await soon(flows.cancel_task(made.unwrap().task_id))).cancelled

        assert (await flow_of(flows, flow_id)).status == "queued"
        assert "task.review_requested" not in await types_of(flows, flow_id)


# ---- the disk and the process -----------------------------------------------------------------------


async def give(answer: str, flows: SessionFlows, flow_id: str, task_id: str) -> None:
    """A person's answer, which the disk may swallow."""
    match answer:
        case "retry":
            await soon(flows.retry_task(task_id))
        case "give up":
            await soon(flows.cancel_task(task_id, grace=0.01))
        case _:
            await resume(flows, flow_id)


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
@pytest.mark.parametrize("moment", ["review", "resume", "retry", "give up"])
async def test_a_commit_that_fails_around_a_review_makes_it_neither_twice_nor_never(
    moment: str, trouble: tuple[Exception, bool], desk: Desk, clock: ManualClock
):
    error, written = trouble
    store = FaultyStore()
    async with running(store, clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "a")
        await settle()
        if moment == "review":
            store.fail_commits(error, written=written)
        await desk.end("a")
        await pass_time(clock, 3)
        assert (await flow_of(flows, flow_id)).status == "blocked"
        assert (await task_of(flows, task_id)).review_requested_at

        if moment != "review":
            store.fail_commits(error, written=written)
        await give(moment, flows, flow_id, task_id)
        await pass_time(clock, 3)
        if (await flow_of(flows, flow_id)).status == "blocked":
            await give(moment, flows, flow_id, task_id)
            await pass_time(clock, 3)

        assert store.attempts > len(store.batches), "vacuous: nothing failed"
        flow, task = await flow_of(flows, flow_id), await task_of(flows, task_id)
        assert (flow.status, flow.blocked_task_id) == ("queued", None)
        gives_up = moment == "give up"
        assert task.status == ("cancelled" if gives_up else "succeeded")
        # An attempt whose start was in doubt may have been counted, but it has not run.
        assert len(desk.runs) == (1 if gives_up else 2)
        types = await types_of(flows, flow_id)
        assert types.count("task.review_requested") == types.count("flow.blocked") == 1
        assert types.count("task.ended") == 1
        assert holds_nothing(runtime)


async def test_a_restart_in_the_middle_leaves_the_flow_blocked_and_runs_nothing(
    desk: Desk, clock: ManualClock
):
    tables = MemoryTables()

    @desk.registry.controller("c")
    async def controller(flow: FlowContext) -> None:
        desk.entered += 1
        before = await flow.run("check", "good", name="before")
        after = await flow.run("check", "bad", name="after")
        await flow.update(state_json=[before, after])

    async with running(MemoryStore(tables), clock=clock, registry=desk.registry) as runtime:
        flow_id = await new_flow(flows_of(runtime), "c")
        await desk.end("before", "after")
        blocked = await flow_of(flows_of(runtime), flow_id)
        assert blocked.status == "blocked"

    for _ in range(2):
        store = FaultyStore(tables=tables)
        async with running(store, clock=clock, registry=desk.registry) as runtime:
            await pass_time(clock, 100)
            assert await flow_of(flows_of(runtime), flow_id) == blocked
        assert (store.attempts, desk.entered, len(desk.runs)) == (0, 1, 2)

    async with running(MemoryStore(tables), clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        assert (await resume(flows, flow_id)).applied

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.state_json) == ("succeeded", ["good", "bad"])
        assert desk.entered == 2
        assert desk.runs == [("before", 1, "good"), ("after", 1, "bad"), ("after", 2, "bad")]


async def test_an_answer_is_kept_across_a_restart_that_cuts_it_off(desk: Desk, clock: ManualClock):
    tables = MemoryTables()
    async with running(MemoryStore(tables), clock=clock, registry=desk.registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        task_id = await launch(flows, flow_id, "a")
        await desk.end("a")
        desk.gate("a").clear()
        assert (await soon(flows.retry_task(task_id, input_json="good"))).retried
        await settle()
        assert desk.runs[-1] == ("a", 2, "good")
        thief = MemoryStore(tables)
        await thief.open(takeover=True)
        await thief.aclose()
    desk.gate("a").set()

    async with running(MemoryStore(tables), clock=clock, registry=desk.registry) as runtime:
        assert await soon(flows_of(runtime).wait_task(task_id)) == Succeeded("good")
        assert desk.runs == [("a", 1, "bad"), ("a", 2, "good"), ("a", 3, "good")]
        assert (await flow_of(flows_of(runtime), flow_id)).blocked_task_id is None
