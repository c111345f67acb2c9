"""Timers: once each, never early, late rather than never, through restarts and clocks that jump."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from flowstead import FlowContext, Limits, Registry
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock
from tests.faulty_store import flows_of, new_flow, running, settle
from tests.runtime.support import Lives
from tests.runtime.waiting import begun, in_memory, open_waits, registry_of, reopened

HOUR = 3600.0
DAY = 24 * HOUR
YEAR = 365 * DAY
START = 1_800_000_000_000


async def naps(flow: FlowContext) -> None:
    """Sleep as the state says."""
    await flow.sleep("nap", **flow.state_json)


@pytest.fixture(autouse=True)
def _controllers(request: pytest.FixtureRequest) -> None:
    if "lives" in request.fixturenames:
        request.getfixturevalue("lives").registry = registry_of(naps=naps)


def ended_at(lives: Lives, flow_id: str) -> int:
    task = lives.child(flow_id, "nap")
    assert task.status == "succeeded" and task.ended_at is not None
    assert lives.told(flow_id).count("task.ended") == 1
    return task.ended_at


# ---- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [None, "kill", "close"])
@pytest.mark.parametrize("parked", [False, True])
def test_a_sleep_ends_at_its_instant_whoever_lives_then(
    lives: Lives, how: str | None, parked: bool
) -> None:
    began = lives.now()
    flow_id = begun(lives, "naps", 60 if parked else 0.1, state_json={"seconds": HOUR})
    if how is not None:
        reopened(lives, how)

    lives.pass_time((began - lives.now()) / 1000 + HOUR - 1)
    assert lives.flow(flow_id).status == "waiting"
    lives.pass_time(2)

    assert lives.result(flow_id).status == "succeeded"
    assert 0 <= ended_at(lives, flow_id) - began - HOUR * 1000 < 1000


@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("parked", [False, True])
def test_a_sleep_that_ended_while_nobody_lived_ends_as_soon_as_somebody_does(
    lives: Lives, how: str, parked: bool
) -> None:
    flow_id = begun(lives, "naps", 60 if parked else 0.1, state_json={"seconds": HOUR})
    lives.restart(how)
    lives.world._seconds += DAY

    lives.pass_time(1)

    assert lives.result(flow_id).status == "succeeded"
    assert ended_at(lives, flow_id) >= START + DAY * 1000


def test_a_sleep_until_an_instant_that_has_passed_is_over_at_once(lives: Lives) -> None:
    flow_id = begun(lives, "naps", state_json={"wake_at": START - 1})

    lives.pass_time(1)

    assert lives.result(flow_id).status == "succeeded"


def test_a_sleep_until_an_instant_ends_then(lives: Lives) -> None:
    at = lives.now() + 100_000
    flow_id = begun(lives, "naps", state_json={"wake_at": at})
    assert lives.flow(flow_id).wait_json == {"kind": "timer", "name": "nap", "wakeAt": at}

    lives.pass_time(101)

    assert 0 <= ended_at(lives, flow_id) - at < 1000


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, ValueError),
        ({"seconds": 1, "wake_at": 1}, ValueError),
        ({"seconds": 0}, ValueError),
        ({"seconds": -1}, ValueError),
        ({"seconds": "1"}, TypeError),
        ({"seconds": 11 * YEAR}, ValueError),
        ({"wake_at": 1.5}, TypeError),
        ({"wake_at": -1}, TypeError),
    ],
    ids=str,
)
async def test_a_sleep_that_makes_no_sense_is_refused_and_nothing_is_recorded(
    given: dict[str, Any], error: type[Exception]
) -> None:
    raised: list[Exception] = []

    async def bad(flow: FlowContext) -> None:
        for call in (flow.sleep, flow.start_timer):
            try:
                await call("nap", **given)
            except Exception as caught:
                raised.append(caught)

    async with running(registry=registry_of(bad=bad)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "bad")
        await flows.result(flow_id)
        assert [type(one) for one in raised] == [error] * 2
        assert await flows.list_tasks(flow_id) == []


# ---- clocks that jump -----------------------------------------------------------------------------


@pytest.mark.parametrize("parked", [False, True])
async def test_a_clock_that_is_put_back_a_day_makes_no_timer_early(
    parked: bool, clock: ManualClock
) -> None:
    async with running(registry=registry_of(naps=naps), clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "naps", state_json={"seconds": 100.0})
        await pass_time(clock, 20 if parked else 1)
        due = START + 100_000

        clock.set(clock.now() - round(DAY * 1000))
        await pass_time(clock, 3600, by=60)
        assert (await flows.get(flow_id)).status == "waiting"  # type: ignore[union-attr]
        await pass_time(clock, DAY - 3600 + 101, by=600)

        ended = await flows.result(flow_id)
        [task] = await flows.list_tasks(flow_id)
        assert ended.status == "succeeded"
        assert task.ended_at is not None and task.ended_at >= due


@pytest.mark.parametrize("parked", [False, True])
async def test_a_clock_that_is_put_forward_a_year_fires_what_is_overdue_within_a_minute(
    parked: bool, clock: ManualClock
) -> None:
    async with running(registry=registry_of(naps=naps), clock=clock) as runtime:
        flows = flows_of(runtime)
        ids = [
            await new_flow(flows, "naps", state_json={"seconds": seconds})
            for seconds in (100.0, 10 * DAY, 2 * YEAR)
        ]
        await pass_time(clock, 20 if parked else 1)

        jump(clock, YEAR)
        await pass_time(clock, 61)

        standing = [(await flows.get(flow_id)).status for flow_id in ids]  # type: ignore[union-attr]
        assert standing == ["succeeded", "succeeded", "waiting"]


async def test_a_clock_that_is_put_back_while_nobody_lives_makes_no_timer_early() -> None:
    store, clock = MemoryStore(), ManualClock()
    async with running(store, registry=registry_of(naps=naps), clock=clock) as runtime:
        flow_id = await new_flow(flows_of(runtime), "naps", state_json={"seconds": 100.0})
        await pass_time(clock, 20)
    clock = ManualClock(START - round(DAY * 1000))

    async with running(store, registry=registry_of(naps=naps), clock=clock) as runtime:
        flows = flows_of(runtime)
        await pass_time(clock, DAY, by=600)
        assert (await flows.get(flow_id)).status == "waiting"  # type: ignore[union-attr]
        await pass_time(clock, 101)

        assert (await flows.result(flow_id)).status == "succeeded"


async def pass_time(clock: ManualClock, seconds: float, by: float = 1.0) -> None:
    """Let time pass, a little at a time, with all that comes of it."""
    left = seconds
    while left > 0:
        clock.advance(min(by, left))
        left -= by
        await settle()


def jump(clock: ManualClock, seconds: float) -> None:
    """Put the wall clock forward: the loop's timers, which go by their own time, do not notice."""
    shifted = [(at + seconds * 1000, order, call) for at, order, call in clock._calls]
    clock.set(clock.now() + round(seconds * 1000))
    clock._calls[:] = shifted


# ---- many of them ---------------------------------------------------------------------------------


DAYS = 10
TIMERS = 300


async def test_in_ten_days_with_a_restart_each_hour_every_timer_fires_once_and_none_early() -> None:
    chance = random.Random(5)
    store, clock = MemoryStore(), ManualClock()
    fired: list[tuple[str, int]] = []

    async def keeps_time(flow: FlowContext) -> None:
        for number, seconds in enumerate(flow.state_json):
            await flow.sleep(f"nap-{number}", seconds)

            async def note(name: str = f"{flow.flow_id}/{number}") -> None:
                fired.append((name, clock.now()))

            await flow.once(f"note-{number}", note)

    registry = Registry()
    registry.controller("keeps_time")(keeps_time)
    left = [(chance.uniform(0, (DAYS - 2) * DAY), n) for n in range(TIMERS // 3)]
    plan = {n: [chance.uniform(1, 0.3 * DAYS * DAY / 2) for _ in range(3)] for _, n in left}
    left.sort(reverse=True)
    limits = Limits(idle_seconds=60.0, park_seconds=5.0)
    while clock.now() < START + 2 * DAYS * DAY * 1000 and (left or len(fired) < TIMERS):
        async with running(store, registry=registry, clock=clock, limits=limits) as runtime:
            flows = flows_of(runtime)
            await settle()
            while left and START + left[-1][0] * 1000 <= clock.now():
                _, n = left.pop()
                await new_flow(flows, "keeps_time", flow_id=f"f-{n}", state_json=plan[n])
            await pass_time(clock, HOUR, by=HOUR / 3)

    naps = [json.loads(row.doc) for row in store.tables.tasks.values()]
    naps = [doc for doc in naps if doc["runId"].startswith("nap-")]
    assert len(naps) == TIMERS
    for doc in naps:
        assert doc["status"] == "succeeded"
        late = doc["endedAt"] - doc["wait"]["deadlineAt"]
        assert 0 <= late <= HOUR * 1000, doc
    counts = Counter(name for name, _ in fired)
    assert len(counts) == TIMERS, f"{len(counts)} of {TIMERS} have fired"
    assert set(counts.values()) == {1}


def test_sleeping_flows_leave_memory_and_are_listed_as_waits(lives: Lives) -> None:
    for _ in range(3):
        begun(lives, "naps", state_json={"seconds": DAY})

    lives.pass_time(300)

    assert in_memory(lives) == 0
    assert {wait.kind for wait in open_waits(lives)} <= {"timer"}


@pytest.mark.parametrize(
    ("given", "says"),
    [((5,), "name must be a string, not int."), (("nap",), "give either seconds or wake_at.")],
)
def test_a_sleep_says_what_it_lacks(lives: Lives, given: tuple[Any, ...], says: str) -> None:
    raised: list[str] = []

    async def odd(flow: FlowContext) -> None:
        for sleep in (flow.sleep, flow.start_timer):
            with pytest.raises((TypeError, ValueError)) as caught:
                await sleep(*given)
            raised.append(str(caught.value))

    lives.registry = registry_of(odd=odd)
    flow_id = begun(lives, "odd")

    assert lives.result(flow_id).status == "succeeded"
    assert raised == [says, says]
