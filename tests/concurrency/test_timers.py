"""Timers: what is due is ticked at its instant and not before, however far off and however the clock jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from flowstead import Limits, Registry, Retry, Runtime, StoreUnusable, TaskContext
from flowstead.engine.actor import Actor
from flowstead.engine.timers import Timers
from flowstead.model.flow import FlowKey
from flowstead.store.memory import MemoryStore
from flowstead.store.port import Due, Snapshot
from flowstead.testing import ManualClock
from tests.faulty_store import FaultyStore, flows_of, new_flow, running, settle, soon

DAY = 24 * 3600.0


class Rows:
    """Due instants on disk, and a count of how often they were asked for."""

    def __init__(self) -> None:
        self.dues: list[Due] = []
        self.asked = 0
        self.error: Exception | None = None

    async def list_due(self, *, after: int, until: int) -> list[Due]:
        self.asked += 1
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        await asyncio.sleep(0)
        return [due for due in self.dues if after < due.at <= until]

    async def next_due(self, *, after: int) -> int | None:
        await asyncio.sleep(0)
        return min((due.at for due in self.dues if due.at > after), default=None)


class CountingClock(ManualClock):
    """A clock that knows how many calls are put off."""

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Any:
        assert seconds >= 0
        return super().call_later(seconds, callback)

    @property
    def armed(self) -> int:
        return sum(call.callback is not None for _, _, call in self._calls)


class Play:
    """Timers at work over rows, and what they ticked: names with the seconds since the start."""

    def __init__(self) -> None:
        self.clock = CountingClock()
        self.start = self.clock.now()
        self.rows = Rows()
        self.ticks: list[tuple[str, float]] = []
        self.rounds: list[int] = []
        """How much had been ticked each time there was no room for more."""
        self.timers = Timers(self.rows, self.clock, self._tick, self._room)  # type: ignore[arg-type]

    async def __aenter__(self) -> Play:
        self.job = asyncio.create_task(self.timers.run())
        await settle()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.timers.close()
        self.job.cancel()
        await asyncio.wait({self.job})

    def _tick(self, key: FlowKey) -> None:
        self.ticks.append((key.flow_id, (self.clock.now() - self.start) / 1000))
        # Ticked, its flow takes the instant off its row.
        self.rows.dues = [
            due for due in self.rows.dues if due.key != key or due.at > self.clock.now()
        ]

    async def _room(self) -> None:
        self.rounds.append(len(self.ticks))
        await asyncio.sleep(0)

    def write(self, name: str, seconds: float) -> None:
        """A row that is there before anybody was told."""
        at = self.start + round(seconds * 1000)
        self.rows.dues.append(Due(at, FlowKey("owner", name)))

    def commit(self, name: str, seconds: float) -> None:
        """A row that has just been committed."""
        self.write(name, seconds)
        self.timers.note(self.start + round(seconds * 1000), FlowKey("owner", name))

    async def advance(self, seconds: float, *, steps: int = 1) -> None:
        for _ in range(steps):
            self.clock.advance(seconds)
            await settle()


async def test_nothing_due_arms_nothing():
    async with Play() as play:
        assert play.clock.armed == 0
        assert play.rows.asked == 1

        await play.advance(10 * DAY)

        assert play.ticks == []
        assert play.rows.asked == 1


async def test_a_near_instant_is_ticked_when_it_comes_and_not_before():
    async with Play() as play:
        play.commit("a", 10)

        await play.advance(9.999)
        assert play.ticks == []
        await play.advance(0.001)

        assert play.ticks == [("a", 10)]
        await play.advance(1)
        assert play.clock.armed == 0


async def test_an_instant_beyond_the_horizon_is_ticked_when_it_comes():
    async with Play() as play:
        play.commit("a", 90)

        await play.advance(89.999)
        assert play.ticks == []
        await play.advance(0.001)

        assert play.ticks == [("a", 90)]


async def test_an_instant_ten_days_off_is_ticked_when_it_comes():
    async with Play() as play:
        play.commit("a", 10 * DAY)

        await play.advance(3600, steps=239)
        assert play.ticks == []
        await play.advance(3600)

        assert play.ticks == [("a", 10 * DAY)]
        assert play.clock.armed == 0


async def test_rows_of_an_earlier_process_are_found_near_and_far():
    play = Play()
    for name, seconds in (("far", 5 * DAY), ("near", 30.0), ("overdue", -DAY), ("beyond", 61.0)):
        play.write(name, seconds)

    async with play:
        assert play.ticks == [("overdue", 0)]
        await play.advance(1, steps=100)
        assert play.ticks == [("overdue", 0), ("near", 30), ("beyond", 61)]
        await play.advance(3600, steps=120)

        assert play.ticks[3][0] == "far"
        assert 5 * DAY <= play.ticks[3][1] <= 5 * DAY + 3600


async def test_many_instants_are_ticked_in_order_with_one_timer():
    async with Play() as play:
        instants = [(n * 37) % 500 + 0.5 for n in range(500)]
        for n, seconds in enumerate(instants):
            play.commit(str(n), seconds)
            assert play.clock.armed <= 2

        await play.advance(0.5, steps=1100)

        assert [at for _, at in play.ticks] == sorted(instants)
        assert len(play.ticks) == 500
        assert play.clock.armed == 0


@pytest.mark.parametrize("seconds", [-DAY, 30.0])
async def test_what_comes_due_at_once_is_ticked_in_portions_with_room_between(seconds: float):
    play = Play()
    for n in range(1500):
        play.write(str(n), seconds)

    async with play:
        await play.advance(30)

        assert sorted(int(name) for name, _ in play.ticks) == list(range(1500))
        assert all(later - earlier <= 256 for earlier, later in pairwise(play.rounds))
        assert play.rounds[0] <= 512
        assert play.rounds[-1] >= 1500 - 256
        assert play.clock.armed == 0


async def test_an_instant_that_comes_between_two_portions_is_ticked_too():
    play = Play()
    for n in range(600):
        play.write(str(n), -DAY)
    room = play._room

    async def meanwhile() -> None:
        if not play.rounds:
            play.commit("past", -5)
            play.commit("soon", 5)
            play.commit("far", 500)
        play.clock.advance(1)
        await room()

    play.timers._wait_room = meanwhile
    async with play:
        assert len(play.ticks) == 601
        await play.advance(1, steps=500)

        assert {"past", "soon", "far"} <= {name for name, _ in play.ticks}


async def test_a_steady_stream_of_near_instants_does_not_hide_the_far_ones():
    async with Play() as play:
        play.commit("far", 200)
        for second in range(300):
            play.commit(f"near {second}", second + 5)
            await play.advance(1)

        assert ("far", 200) in play.ticks


async def test_an_earlier_instant_overtakes_a_later_one_that_is_armed():
    async with Play() as play:
        play.commit("late", 50)
        play.commit("early", 5)
        play.commit("far", 5000)

        await play.advance(5)

        assert play.ticks == [("early", 5)]
        await play.advance(45)
        assert play.ticks == [("early", 5), ("late", 50)]


async def test_an_instant_in_the_past_is_ticked_at_once():
    async with Play() as play:
        play.commit("a", -10)

        await play.advance(0)

        assert play.ticks == [("a", 0)]


async def test_an_instant_noted_while_the_rows_are_read_is_not_missed():
    play = Play()
    play.write("stored", 30)
    async with play:
        play.timers._look.set()
        await asyncio.sleep(0)
        play.commit("noted", 20)
        play.commit("noted far", 100)
        await settle()

        await play.advance(1, steps=110)

        assert {name for name, _ in play.ticks} == {"stored", "noted", "noted far"}


async def test_a_clock_that_jumps_back_delays_but_loses_nothing():
    async with Play() as play:
        play.commit("a", 10)
        await play.advance(5)

        play.clock.set(play.start - 100_000)
        await settle()
        play.commit("b", -50)
        await play.advance(1, steps=125)

        assert [name for name, _ in play.ticks] == ["b", "a"]


async def test_a_clock_that_jumps_far_ahead_and_back_loses_nothing():
    async with Play() as play:
        play.commit("near", 10)
        play.commit("far", 300)

        play.clock.set(play.start + round(400 * DAY * 1000))
        await play.advance(1, steps=20)
        play.clock.set(play.start + 20_000)
        play.commit("after", 30)
        play.commit("much later", 1000)
        await play.advance(1, steps=1100)

        assert {name for name, _ in play.ticks} == {"near", "far", "after", "much later"}


async def test_a_read_that_fails_is_made_again():
    play = Play()
    play.write("a", 30)
    play.rows.error = StoreUnusable("flows.db", "a read failed")

    async with play:
        await play.advance(1, steps=31)

        assert play.ticks == [("a", 30)]


async def test_closing_disarms():
    async with Play() as play:
        play.commit("a", 10)
        play.commit("b", 20)

        play.timers.close()
        await play.advance(100)

        assert play.ticks == []
        assert play.clock.armed == 0


# ---- through the door ------------------------------------------------------------------------------


def flaky(registry: Registry, seconds: float) -> list[int]:
    """Register a task that fails once and is tried again after so long; answers its attempts."""
    attempts: list[int] = []

    @registry.task(name="flaky", retry=Retry(initial=seconds, max_delay=seconds, jitter=0))
    async def _flaky(ctx: TaskContext, given: object) -> None:
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            raise ValueError

    return attempts


class Watched(MemoryStore):
    """A store that sees how many flows are in memory when it is read."""

    runtime: Runtime | None = None
    peak = 0

    async def load(self, keys: Sequence[FlowKey]) -> list[Snapshot | Exception | None]:
        await asyncio.sleep(0)
        if self.runtime is not None:
            self.peak = max(self.peak, self.runtime.statistics().flows_in_memory)
        return await super().load(keys)


async def test_a_crowd_that_is_due_at_opening_does_not_come_into_memory_at_once():
    store, clock, limits = MemoryStore(), ManualClock(), Limits(idle_flows=300)
    async with running(store, clock=clock, limits=limits) as runtime:
        flows = flows_of(runtime)
        for _ in range(20):
            many = [new_flow(flows) for _ in range(100)]
            for flow_id in await soon(asyncio.gather(*many)):
                wait_json = {"wakeAt": clock.now() + 3600_000}
                asked = flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json=wait_json)
                assert (await soon(asked)).applied

    clock.advance(7200)
    watched = Watched(store.tables)
    async with running(watched, clock=clock, limits=limits) as runtime:
        watched.runtime = runtime
        while await soon(flows_of(runtime).list(status="waiting", limit=1)):
            await settle()

    assert 300 <= watched.peak < 1000


async def test_an_idle_runtime_arms_nothing():
    clock = CountingClock()
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.set_waiting(flow_id=flow_id, expected_revision=0)
        clock.advance(60)
        await settle()
        clock.advance(60)
        await settle()

        assert runtime.statistics().flows_in_memory == 0
        assert clock.armed == 0


async def test_a_thousand_parked_children_cost_one_timer():
    clock, registry = CountingClock(), Registry()
    attempts = flaky(registry, 10 * DAY)
    async with running(clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        ids = await asyncio.gather(*(new_flow(flows) for _ in range(1000)))
        await asyncio.gather(*(flows.run_task(flow_id=i, task="t", run="flaky") for i in ids))
        await settle()
        clock.advance(30)
        await settle()
        clock.advance(30)
        await settle()

        assert (len(attempts), clock.armed) == (1000, 1)
        assert runtime.statistics().flows_in_memory == 0
        assert len(runtime._engine._timers._heap) == 0
        for _ in range(9):
            clock.advance(DAY)
            await settle()
        assert len(attempts) == 1000
        clock.advance(DAY - 60)
        await settle()

        assert attempts.count(2) == 1000


async def test_a_retry_ten_days_off_starts_on_its_day():
    clock, registry = ManualClock(), Registry()
    attempts = flaky(registry, 10 * DAY)
    async with running(clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        await flows.run_task(flow_id=await new_flow(flows), task="t", run="flaky")
        await settle()

        for _ in range(9):
            clock.advance(DAY)
            await settle()
        assert attempts == [1]
        clock.advance(DAY - 1)
        await settle()
        assert attempts == [1]
        clock.advance(1)
        await settle()

        assert attempts == [1, 2]


async def test_a_retry_beyond_the_horizon_starts_when_it_is_due():
    clock, registry = ManualClock(), Registry()
    attempts = flaky(registry, 90)
    async with running(clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        await flows.run_task(flow_id=await new_flow(flows), task="t", run="flaky")
        for _ in range(89):
            await settle()
            clock.advance(1)
        await settle()
        assert attempts == [1]

        clock.advance(1)
        await settle()

        assert attempts == [1, 2]


async def test_a_retry_far_off_survives_restarts_on_the_way():
    store, clock, registry = MemoryStore(), ManualClock(), Registry()
    attempts = flaky(registry, 10 * DAY)
    async with running(store, clock=clock, registry=registry) as runtime:
        flow_id = await new_flow(flows_of(runtime))
        await flows_of(runtime).run_task(flow_id=flow_id, task="t", run="flaky")
        await settle()

    for _ in range(9):
        clock.advance(DAY)
        async with running(MemoryStore(store.tables), clock=clock, registry=registry):
            await settle()
    assert attempts == [1]
    async with running(MemoryStore(store.tables), clock=clock, registry=registry) as runtime:
        await settle()
        clock.advance(DAY)
        await settle()

        assert attempts == [1, 2]
        assert [task.status for task in await flows_of(runtime).list_tasks(flow_id)] == [
            "succeeded"
        ]


async def test_a_retry_starts_once_although_its_instant_is_ticked_more_than_once():
    clock, registry = ManualClock(), Registry()
    attempts = flaky(registry, 10)
    async with running(clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.run_task(flow_id=flow_id, task="t", run="flaky")
        await settle()
        clock.advance(10)
        for _ in range(3):
            runtime._engine._tick(FlowKey("owner", flow_id))
        await settle()

        assert attempts == [1, 2]


async def test_a_tick_for_a_flow_that_is_not_there_harms_nobody():
    store = FaultyStore()
    async with running(store) as runtime:
        runtime._engine._tick(FlowKey("owner", "nowhere"))
        await settle()

        assert runtime.statistics().flows_in_memory == 0
        assert store.attempts == 0
        assert await soon(new_flow(flows_of(runtime)))


@pytest.mark.parametrize("how", ["in memory", "just loaded"])
async def test_a_clock_that_is_put_back_between_an_instant_and_its_turn_loses_nothing(
    how: str, monkeypatch: pytest.MonkeyPatch
):
    store, clock, registry = MemoryStore(), ManualClock(), Registry()
    attempts = flaky(registry, 3)
    put_back: list[int] = []

    def back() -> None:
        put_back.append(clock.now())
        clock.set(clock.now() - 2_000)

    async with running(store, clock=clock, registry=registry) as runtime:
        flow_id = await new_flow(flows_of(runtime))
        await flows_of(runtime).run_task(flow_id=flow_id, task="t", run="flaky")
        await settle()
        loaded = Actor.loaded
        monkeypatch.setattr(Actor, "loaded", lambda *args: (loaded(*args), back()))
        if how == "just loaded":
            runtime._engine._actors.clear()

        clock.advance(3)
        if how == "in memory":
            back()
        await settle()
        assert len(put_back) == 1
        assert attempts == [1]
        for _ in range(4):
            clock.advance(1)
            await settle()

        assert attempts == [1, 2]
