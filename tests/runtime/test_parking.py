"""Parking: a controller that waits leaves memory, and is run from the top when it is woken, as if it had stayed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead import (
    ChildCancelled,
    FlowContext,
    Limits,
    NeedsReview,
    RevisionConflict,
    TaskContext,
    open_runtime,
)
from flowstead.engine.parked import Parked
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock
from tests.faulty_store import FaultyStore, flows_of, new_flow, running, settle, soon, turns
from tests.runtime.support import Lives, bound, dump, make
from tests.runtime.waiting import (
    answer_in,
    begun,
    check_waits_on,
    in_memory,
    open_waits,
    registry_of,
    reopened,
    signalled,
    waiting,
)

KEY = {"kind": "reply", "thread": 1}
HOW = [None, "kill", "close"]
LONG = 300.0
"""Seconds after which whatever can be parked is, and has been forgotten."""


class Local:
    """Something that lives as long as the coroutine that holds it."""


class Seen:
    """A controller that waits, and what it sees of itself."""

    def __init__(self) -> None:
        self.runs = 0
        self.tidied = 0
        self.caught: list[str] = []
        self.local: weakref.ref[Local] | None = None
        self.worked = 0

    async def work(self, _context: TaskContext, _input: Any) -> int:
        self.worked += 1
        return self.worked

    async def drive(self, flow: FlowContext) -> None:
        self.runs += 1
        local = Local()
        self.local = weakref.ref(local)
        before = await flow.run("work")
        await flow.update(current_step="waiting", state_json={"before": before})
        try:
            answer = await flow.wait("answer", key=KEY)
        except Exception as error:
            self.caught.append(type(error).__name__)
            raise
        finally:
            self.tidied += 1
        await flow.update(current_step="answered")
        await flow.finish(state_json={"answered": [before, answer]})

    def registry(self, **more: Any) -> Any:
        registry = registry_of(seen=self.drive, **more)
        registry.task(name="work")(self.work)
        return registry


@pytest.fixture
def seen(lives: Lives) -> Seen:
    seen = Seen()
    lives.registry = seen.registry()
    return seen


# ---- leaving and coming back ----------------------------------------------------------------------


def test_a_controller_that_waits_leaves_memory_and_so_does_its_flow(
    lives: Lives, seen: Seen
) -> None:
    flow_id = begun(lives, "seen")
    assert in_memory(lives) == 1 and seen.local is not None and seen.local() is not None
    lives.pass_time(4)
    assert lives.told(flow_id, "flow.parked") == []

    lives.pass_time(LONG)

    gc.collect()
    assert lives.told(flow_id, "flow.parked") == ["flow.parked"]
    assert in_memory(lives) == 0
    assert seen.local() is None
    assert (seen.runs, seen.tidied, seen.caught) == (1, 1, [])
    check_waits_on(lives.flow(flow_id), name="answer", **KEY)
    assert lives.face(lambda runtime: runtime.statistics().running_children) == 0
    tasks = lives.world._loop.pending_tasks()  # type: ignore[union-attr]
    assert not [task for task in tasks if flow_id in task.get_name()]


def test_how_long_a_controller_stays_is_a_limit_of_the_runtime(lives: Lives, seen: Seen) -> None:
    lives.limits = Limits(park_seconds=50.0, idle_seconds=10.0)
    flow_id = begun(lives, "seen", 49)
    assert lives.told(flow_id, "flow.parked") == []

    lives.pass_time(2)

    assert lives.told(flow_id, "flow.parked") == ["flow.parked"]


@pytest.mark.parametrize("how", HOW)
def test_a_parked_controller_is_woken_by_its_signal_and_sees_what_it_would_have_seen(
    lives: Lives, seen: Seen, how: str | None
) -> None:
    flow_id = begun(lives, "seen", LONG)
    if how is not None:
        reopened(lives, how, LONG)
        assert (in_memory(lives), seen.runs) == (0, 1), "nothing is loaded for a parked flow"

    assert signalled(lives, "word").flow_ids == [flow_id]

    assert answer_in(lives, flow_id) == [1, "word"]
    assert (seen.runs, seen.worked, seen.tidied) == (2, 1, 2)
    assert lives.flow(flow_id).current_step == "answered"
    assert lives.told(flow_id, "flow.")[-5:] == [
        "flow.parked",
        "flow.resumed",
        "flow.updated",
        "flow.updated",
        "flow.succeeded",
    ]


@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("seconds", [0.1, 4.0])
def test_a_crash_before_parking_enters_the_controller_again_and_then_it_is_parked(
    lives: Lives, seen: Seen, how: str, seconds: float
) -> None:
    flow_id = begun(lives, "seen", seconds)

    reopened(lives, how, LONG)

    assert seen.runs == 2 and seen.worked == 1
    assert lives.told(flow_id, "flow.parked") == ["flow.parked"]
    assert in_memory(lives) == 0
    assert len(open_waits(lives)) == 1
    signalled(lives, "word")
    assert answer_in(lives, flow_id) == [1, "word"]


def test_a_flow_may_be_parked_again_and_again(lives: Lives) -> None:
    lives.registry = registry_of()
    flow_id = waiting(lives, "counts", LONG)

    for number in range(5):
        signalled(lives, number)
        lives.pass_time(LONG)
        assert in_memory(lives) == 0
    signalled(lives, "end")

    assert answer_in(lives, flow_id) == list(range(5))
    assert lives.told(flow_id).count("flow.parked") == 6


def test_a_parked_flow_whose_controller_is_not_known_any_more_is_queued_until_it_is(
    lives: Lives, seen: Seen
) -> None:
    flow_id = begun(lives, "seen", LONG)
    known = lives.registry
    lives.registry = type(known)()
    reopened(lives, "close")

    assert signalled(lives, "word").flow_ids == [flow_id]
    assert lives.flow(flow_id).status == "queued"
    lives.registry = known
    reopened(lives, "kill", 1)

    assert answer_in(lives, flow_id) == [1, "word"]


# ---- what user code sees of it --------------------------------------------------------------------


def parked_in(lives: Lives, controller: Any, seconds: float = LONG) -> str:
    """A flow of this controller that has been left alone for long."""
    lives.registry = registry_of(it=controller)
    return begun(lives, "it", seconds)


def test_finally_blocks_run_and_may_not_ask_the_flow_for_anything(lives: Lives) -> None:
    told: list[str] = []

    async def tidies(flow: FlowContext) -> None:
        try:
            try:
                await flow.wait("answer", key=KEY)
            finally:
                await asyncio.sleep(0.5)
                told.append("tidied")
                await flow.update(state_json="from the finally block")
        except BaseException as error:
            told.append(type(error).__name__)
            raise
        told.append("went on")

    flow_id = parked_in(lives, tidies)

    assert told == ["tidied", "Parked"]
    assert lives.flow(flow_id).state_json is None
    assert "flow.parked" in lives.told(flow_id) and in_memory(lives) == 0
    signalled(lives, 1)
    assert lives.result(flow_id).state_json == "from the finally block"


@pytest.mark.parametrize("then", ["returns", "raises", "asks", "waits again", "begins", "finishes"])
def test_a_controller_that_swallows_the_signal_is_parked_all_the_same(
    lives: Lives, then: str
) -> None:
    runs = 0

    async def swallows(flow: FlowContext) -> None:
        nonlocal runs
        runs += 1
        try:
            await flow.wait("answer", key=KEY)
            return
        except Parked:
            pass
        match then:
            case "raises":
                raise ValueError("something else")
            case "asks":
                await flow.update(state_json="swallowed")
            case "waits again":
                await flow.wait("other")
            case "begins":
                await flow.once("effect", lambda: asyncio.sleep(0))
            case "finishes":
                await flow.finish()

    flow_id = parked_in(lives, swallows)

    assert runs == 1
    flow = lives.flow(flow_id)
    check_waits_on(flow, **KEY)
    assert flow.state_json is None
    assert [task.run_id for task in lives.children(flow_id)] == ["answer"]
    assert in_memory(lives) == 0
    signalled(lives, 1)
    assert lives.result(flow_id).status == "succeeded"
    assert runs == 2


def test_a_controller_may_be_parked_inside_scopes_without_a_deadline(lives: Lives) -> None:
    async def scoped(flow: FlowContext) -> None:
        with anyio.CancelScope(), anyio.move_on_after(None):
            await flow.wait("answer", key=KEY)

    flow_id = parked_in(lives, scoped)

    assert "flow.parked" in lives.told(flow_id) and in_memory(lives) == 0
    signalled(lives, 1)
    assert lives.result(flow_id).status == "succeeded"


# ---- where it stays -------------------------------------------------------------------------------


async def in_move_on_after(flow: FlowContext) -> Any:
    with anyio.move_on_after(1e6):
        return await flow.wait("answer", key=KEY)


async def in_fail_after(flow: FlowContext) -> Any:
    with anyio.fail_after(1e6):
        return await flow.wait("answer", key=KEY)


async def in_a_task(flow: FlowContext) -> Any:
    return await asyncio.create_task(flow.wait("answer", key=KEY))


async def in_a_gather(flow: FlowContext) -> Any:
    [answer] = await asyncio.gather(flow.wait("answer", key=KEY))
    return answer


async def in_a_task_group(flow: FlowContext) -> Any:
    answers = []

    async def wait() -> None:
        answers.append(await flow.wait("answer", key=KEY))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
    return answers[0]


async def in_wait_for(flow: FlowContext) -> Any:
    return await asyncio.wait_for(flow.wait("answer", key=KEY), 1e6)


STAYS = [in_move_on_after, in_fail_after, in_a_task, in_a_gather, in_a_task_group, in_wait_for]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("code", STAYS, ids=lambda code: code.__name__)
def test_a_controller_stays_where_a_deadline_or_another_task_of_its_own_would_be_forgotten(
    lives: Lives, code: Any, how: str | None
) -> None:
    runs = 0

    async def it(flow: FlowContext) -> None:
        nonlocal runs
        runs += 1
        await flow.finish(state_json={"answered": await code(flow)})

    flow_id = parked_in(lives, it)
    check_waits_on(lives.flow(flow_id), **KEY)
    if how is not None:
        reopened(lives, how, LONG)

    assert lives.told(flow_id, "flow.parked") == []
    assert in_memory(lives) == 1
    signalled(lives, "word")
    assert answer_in(lives, flow_id) == "word"
    assert runs == (1 if how is None else 2)


@pytest.mark.parametrize("code", STAYS, ids=lambda code: code.__name__)
def test_a_controller_that_stays_is_not_sent_away_when_its_flow_is_resumed_by_hand(
    lives: Lives, code: Any
) -> None:
    runs = 0

    async def it(flow: FlowContext) -> None:
        nonlocal runs
        runs += 1
        await flow.finish(state_json={"answered": await code(flow)})

    flow_id = parked_in(lives, it, 1)
    revision = lives.flow(flow_id).revision

    lives.play(lives.flows.resume(flow_id=flow_id, expected_revision=revision)).unwrap()
    lives.pass_time(1)

    assert len(open_waits(lives)) == 1
    signalled(lives, "word")
    assert answer_in(lives, flow_id) == "word"
    assert runs == 1


def test_a_deadline_of_its_own_lets_the_flow_go_on_and_leaves_the_wait_open(lives: Lives) -> None:
    async def impatient(flow: FlowContext) -> None:
        with anyio.move_on_after(50):
            await flow.wait("answer", key=KEY)
        await flow.update(state_json="gone on")
        await asyncio.sleep(50)
        await flow.finish(state_json={"answered": await flow.wait("answer", key=KEY)})

    flow_id = parked_in(lives, impatient, 40)
    assert lives.flow(flow_id).status == "waiting"

    lives.pass_time(20)
    flow = lives.flow(flow_id)
    assert (flow.status, flow.wait_json, flow.state_json) == ("running", None, "gone on")
    assert [wait.name for wait in open_waits(lives)] == ["answer"]
    assert signalled(lives, "word").flow_ids == [flow_id]
    assert lives.flow(flow_id).status == "running"

    lives.pass_time(100)
    assert answer_in(lives, flow_id) == "word"


def test_what_a_controller_runs_beside_its_wait_is_cut_off_by_parking_and_begun_again(
    lives: Lives,
) -> None:
    worked: list[str] = []

    async def beside(flow: FlowContext) -> None:
        async def other() -> None:
            await asyncio.sleep(50)
            await flow.once("effect", effect)

        async def effect() -> None:
            worked.append("beside")

        async with anyio.create_task_group() as group:
            group.start_soon(other)
            await flow.wait("answer", key=KEY)

    flow_id = parked_in(lives, beside)
    assert worked == []

    signalled(lives, "word", key=KEY)
    lives.pass_time(60)

    assert worked == ["beside"]
    assert lives.flow(flow_id).status == "succeeded"


@pytest.mark.parametrize("answered", ["first", "second"])
def test_of_two_waits_at_once_the_first_answer_lets_the_flow_go_on(
    lives: Lives, answered: str
) -> None:
    async def both(flow: FlowContext) -> None:
        answers = await asyncio.gather(flow.wait("first"), flow.wait("second"))
        await flow.finish(state_json={"answered": answers})

    flow_id = parked_in(lives, both, 1)
    assert len(lives.flow(flow_id).wait_json["anyOf"]) == 2
    other = "second" if answered == "first" else "first"

    signalled(lives, answered, flow_id=flow_id, name=answered)
    lives.pass_time(LONG)
    assert [wait.name for wait in open_waits(lives)] == [other]
    signalled(lives, other, flow_id=flow_id, name=other)

    assert answer_in(lives, flow_id) == ["first", "second"]


# ---- changed from outside while it waits ----------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seconds", [0.1, LONG], ids=["standing", "parked"])
@pytest.mark.parametrize("call", ["cancel", "request_cancel"])
def test_a_waiting_flow_that_is_cancelled_ends_at_once_and_its_waits_with_it(
    lives: Lives, seen: Seen, call: str, seconds: float, how: str | None
) -> None:
    flow_id = begun(lives, "seen", seconds)
    if how is not None:
        reopened(lives, how)
    runs = seen.runs

    if call == "cancel":
        assert lives.play(lives.flows.cancel(flow_id)).cancelled
    else:
        revision = lives.flow(flow_id).revision
        lives.play(lives.flows.request_cancel(flow_id=flow_id, expected_revision=revision))
        lives.pass_time(0.1)

    ended = lives.flow(flow_id)
    assert (ended.status, ended.wait_json) == ("cancelled", None)
    assert lives.child(flow_id, "answer").status == "cancelled"
    assert open_waits(lives) == []
    if seconds == LONG:
        assert seen.runs == runs, "nobody enters a controller to have it cancelled"
    assert signalled(lives, 1, lifetime=None).code == "late"
    lives.pass_time(LONG)
    assert lives.flow(flow_id) == ended and in_memory(lives) == 0


def test_a_parked_flow_with_an_intent_ends_when_its_last_child_does(lives: Lives) -> None:
    async def slow(_context: TaskContext, _input: Any) -> None:
        await asyncio.sleep(LONG + 20)

    async def it(flow: FlowContext) -> None:
        await flow.start("slow")
        await flow.wait("answer", key=KEY)

    lives.registry = registry_of(it=it)
    lives.registry.task(slow)
    flow_id = begun(lives, "it", LONG)
    assert "flow.parked" in lives.told(flow_id)

    revision = lives.flow(flow_id).revision
    lives.play(lives.flows.request_cancel(flow_id=flow_id, expected_revision=revision))
    lives.pass_time(10)
    assert lives.flow(flow_id).ended_at is None
    lives.pass_time(20)

    assert lives.flow(flow_id).status == "cancelled"
    assert lives.child(flow_id, "slow").status == "succeeded"


@pytest.mark.parametrize("call", ["finish", "fail"])
def test_a_parked_flow_may_be_ended_from_outside(lives: Lives, seen: Seen, call: str) -> None:
    flow_id = begun(lives, "seen", LONG)

    revision = lives.flow(flow_id).revision
    lives.play(getattr(lives.flows, call)(flow_id=flow_id, expected_revision=revision)).unwrap()

    assert lives.flow(flow_id).status == {"finish": "succeeded", "fail": "failed"}[call]
    assert lives.child(flow_id, "answer").status == "cancelled"
    lives.pass_time(LONG)
    assert (seen.runs, in_memory(lives)) == (1, 0)


@pytest.mark.parametrize("seconds", [0.1, LONG], ids=["standing", "parked"])
def test_a_waiting_flow_that_is_resumed_by_hand_waits_again(
    lives: Lives, seen: Seen, seconds: float
) -> None:
    flow_id = begun(lives, "seen", seconds)

    revision = lives.flow(flow_id).revision
    lives.play(lives.flows.resume(flow_id=flow_id, expected_revision=revision)).unwrap()
    lives.pass_time(LONG)

    check_waits_on(lives.flow(flow_id), **KEY)
    assert in_memory(lives) == 0
    assert len(open_waits(lives)) == 1
    signalled(lives, "word")
    assert answer_in(lives, flow_id) == [1, "word"]


@pytest.mark.parametrize("seconds", [0.1, LONG], ids=["standing", "parked"])
def test_a_wait_that_is_withdrawn_raises_in_its_controller(lives: Lives, seconds: float) -> None:
    raised: list[ChildCancelled] = []

    async def it(flow: FlowContext) -> None:
        try:
            await flow.wait("answer", key=KEY)
        except ChildCancelled as error:
            raised.append(error)

    flow_id = parked_in(lives, it, seconds)

    lives.play(lives.flows.cancel_task(lives.child(flow_id, "answer").task_id))
    lives.pass_time(1)

    assert lives.result(flow_id).status == "succeeded"
    assert len(raised) == 1


def test_somebody_elses_wait_on_a_flow_is_a_conflict_for_its_running_controller(
    lives: Lives,
) -> None:
    raised: list[str] = []

    async def it(flow: FlowContext) -> None:
        await asyncio.sleep(10)
        try:
            await flow.update(state_json="the controller's")
        except RevisionConflict:
            raised.append("conflict")

    flow_id = parked_in(lives, it, 1)
    lives.play(_set_waiting(lives, flow_id))

    lives.pass_time(10)

    assert raised == ["conflict"]
    assert lives.result(flow_id).state_json is None


async def _set_waiting(lives: Lives, flow_id: str) -> None:
    flow = await lives.flows.get(flow_id)
    assert flow is not None
    told = await lives.flows.set_waiting(
        flow_id=flow_id, expected_revision=flow.revision, wait_json={"thread": 2}
    )
    assert told.applied


@pytest.mark.parametrize("answered_first", ["own", "step"])
@pytest.mark.parametrize("seconds", [0.1, LONG], ids=["standing", "parked"])
def test_somebody_elses_wait_on_a_waiting_flow_keeps_its_controller_out_until_it_is_answered(
    lives: Lives, seen: Seen, seconds: float, answered_first: str
) -> None:
    flow_id = begun(lives, "seen", seconds)
    lives.play(_set_waiting(lives, flow_id))
    lives.pass_time(1)
    gc.collect()
    assert seen.local is not None and seen.local() is None
    assert {wait.name for wait in open_waits(lives)} == {None, "answer"}

    for which in ("own", "step") if answered_first == "own" else ("step", "own"):
        assert lives.flow(flow_id).status == "waiting"
        key = {"thread": 2} if which == "own" else KEY
        assert signalled(lives, which, key=key).flow_ids == [flow_id]

    assert answer_in(lives, flow_id) == [1, "step"]
    assert lives.flow(flow_id).answer_json["payload"] == "own"


@pytest.mark.parametrize("seconds", [0.1, LONG], ids=["standing", "parked"])
def test_a_person_s_change_while_the_controller_waits_is_there_when_it_is_woken(
    lives: Lives, seen: Seen, seconds: float
) -> None:
    flow_id = begun(lives, "seen", seconds)
    written_by_a_person(lives, flow_id)

    signalled(lives, "word")

    assert answer_in(lives, flow_id) == [1, "word"]
    assert (seen.runs, seen.caught, seen.worked) == (2, [], 1)
    changed = [event.changed for event in lives.play(lives.flows.history(flow_id))]
    assert "a person's" in [of.get("stateJson") for of in changed]


def written_by_a_person(lives: Lives, flow_id: str) -> None:
    revision = lives.flow(flow_id).revision
    lives.play(
        lives.flows.update(flow_id=flow_id, expected_revision=revision, state_json="a person's")
    ).unwrap()


@pytest.mark.parametrize("seconds", [0.1, LONG], ids=["standing", "later"])
def test_a_person_s_change_is_a_conflict_for_a_controller_that_stays(
    lives: Lives, seconds: float
) -> None:
    async def it(flow: FlowContext) -> None:
        with anyio.move_on_after(1e6):
            await flow.wait("answer", key=KEY)
        await flow.update(state_json="the controller's")

    lives.registry = registry_of(it=it)
    flow_id = begun(lives, "it", seconds)
    written_by_a_person(lives, flow_id)

    signalled(lives, "word")

    ended = lives.result(flow_id)
    assert (ended.status, ended.state_json) == ("failed", "a person's")


# ---- a review meanwhile ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["signal", "review"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seconds", [0.1, LONG], ids=["standing", "parked"])
def test_a_review_of_a_child_and_the_answer_come_in_any_order(
    lives: Lives, seconds: float, how: str | None, first: str
) -> None:
    async def look(_context: TaskContext, value: Any) -> Any:
        if value is None:
            await asyncio.sleep(LONG + 50)
            raise NeedsReview("look")
        return value

    async def it(flow: FlowContext) -> None:
        child = await flow.start("look", name="look")
        answer = await flow.wait("answer", key=KEY)
        await flow.finish(state_json={"answered": [answer, await child.result()]})

    lives.registry = registry_of(it=it)
    lives.registry.task(look)
    lives.limits = Limits(park_seconds=LONG + 200 if seconds < LONG else 5.0)
    flow_id = begun(lives, "it", LONG + 60)
    blocked = lives.flow(flow_id)
    task = lives.child(flow_id, "look")
    assert (blocked.status, blocked.blocked_task_id) == ("blocked", task.task_id)
    assert ("flow.parked" in lives.told(flow_id)) == (seconds == LONG)
    if how is not None:
        reopened(lives, how, 1)

    for answer in ("signal", "review") if first == "signal" else ("review", "signal"):
        if answer == "signal":
            assert signalled(lives, "word").flow_ids == [flow_id]
        else:
            lives.play(lives.flows.retry_task(task.task_id, input_json=1))
        lives.pass_time(1)

    assert answer_in(lives, flow_id) == ["word", 1]


# ---- idle restarts, and many ----------------------------------------------------------------------


async def test_an_idle_restart_of_parked_flows_changes_no_row(
    store: Path | MemoryStore, clock: ManualClock
) -> None:
    seen = Seen()
    async with open_runtime(store, registry=seen.registry(), clock=clock) as runtime:
        flows = bound(runtime)
        for _ in range(5):
            await make(flows, controller_id="seen")
        await parked(store, clock, 5)
    before = dump(store)
    before.pop("ownership", None)

    for _ in range(3):
        clock.advance(3600)
        async with open_runtime(store, registry=seen.registry(), clock=clock) as runtime:
            await make_sure_it_is_up(runtime)
            for _ in range(30):
                clock.advance(10)
                await asyncio.sleep(0)
            assert runtime.statistics().flows_in_memory == 0
            after = dump(store)

    after.pop("ownership", None)
    assert after == before
    assert seen.runs == 5


async def make_sure_it_is_up(runtime: Any) -> None:
    """Wait until recovery has gone through the store."""
    [recovery] = [task for task in runtime._engine._tasks if "recovery" in task.get_name()]
    await soon(recovery)


async def parked(store: Path | MemoryStore, clock: ManualClock, count: int) -> None:
    """Wait until so many flows are on record as parked."""
    async with asyncio.timeout(20):
        while True:
            clock.advance(1)
            told = [row for row in dump(store)["events"] if "flow.parked" in str(row)]
            if len(told) == count:
                return
            await asyncio.sleep(0.001)


MANY = 1000


async def test_a_thousand_parked_flows_are_rows_and_neither_tasks_nor_timers(
    clock: ManualClock,
) -> None:
    async def stands(flow: FlowContext) -> None:
        if flow.state_json % 2:
            await flow.wait("answer", number=flow.state_json, timeout=1e7)
        else:
            await flow.sleep("nap", 1e7)

    def footprint() -> tuple[int, ...]:
        loop: Any = asyncio.get_running_loop()
        timers = [call for call in clock._calls if call[2].callback is not None]
        handles = [handle for handle in loop._scheduled if not handle._cancelled]
        return len(asyncio.all_tasks()), len(timers), len(handles)

    async with running(registry=registry_of(stands=stands), clock=clock) as runtime:
        flows = flows_of(runtime)
        before = None
        for numbers in (range(2), range(2, MANY)):
            await asyncio.gather(*(new_flow(flows, "stands", state_json=n) for n in numbers))
            await settle()
            for _ in range(30):
                clock.advance(1)
                await settle()
            assert runtime.statistics().flows_in_memory == 0
            before = before or footprint()

        assert footprint() == before
        assert len(runtime._engine._timers._heap) == 0
        assert (await flows.signal(number=MANY - 1)).matched == 1
        clock.set(clock.now() + round(1e7 * 1000))
        clock.advance(61)
        await settle()
        left = Counter(flow.status for flow in await flows.list(limit=MANY))
        assert left == {"succeeded": MANY // 2 + 1, "failed": MANY // 2 - 1}


def test_a_flow_parked_again_and_again_beside_open_steps_leaves_nothing_in_memory(
    lives: Lives,
) -> None:
    entered: list[int] = []

    async def it(flow: FlowContext) -> None:
        entered.append(flow.revision)
        open_ones = [await flow.open_wait("stop"), await flow.start_timer("end", 1e7)]
        open_ones.append(await flow.start("work", name="beside"))
        for number in range(5):
            await flow.sleep(f"nap {number}", LONG)
        await flow.select(*open_ones)

    async def work(_context: TaskContext, _input: Any) -> None:
        await asyncio.sleep(1e6)

    lives.registry = registry_of(it=it)
    lives.registry.task(name="work")(work)
    flow_id = begun(lives, "it", LONG / 2)

    held = []
    for _ in range(8):
        waiters = lives.runtime._engine.task_ends._waiting
        held.append(sum(map(len, waiters.values())))
        lives.pass_time(LONG)

    assert lives.told(flow_id).count("flow.parked") == len(entered) == 6
    assert held == [0] * 8


# ---- faults ---------------------------------------------------------------------------------------


async def test_a_mailbox_that_is_full_when_a_wait_is_given_up_does_not_leave_the_flow_waiting() -> (
    None
):
    store, go_on = FaultyStore(), asyncio.Event()

    async def gives_up(flow: FlowContext) -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cancel() -> None:
                    await go_on.wait()
                    scope.cancel()

                group.start_soon(cancel)
                await flow.wait("answer")
        await asyncio.get_running_loop().create_future()

    limits = Limits(mailbox=1)
    async with running(store, registry=registry_of(it=gives_up), limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "it")
        await settle()
        store.hold()
        pushing = []
        for number in range(2):
            pushing.append(
                asyncio.create_task(
                    flows.run_task(flow_id=flow_id, runtime="acp", task="t", run_id=f"r{number}")
                )
            )
            await settle()

        go_on.set()
        await turns()
        store.release()
        await asyncio.gather(*pushing)
        await settle()

        flow = await flows.get(flow_id)
        assert flow is not None and flow.status == "running"
