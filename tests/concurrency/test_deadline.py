"""The deadline of one attempt: never early, and what others took is given back, to the instant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest

from flowstead.engine.clock import SystemClock
from flowstead.engine.deadline import Deadline
from flowstead.testing import ManualClock, SimulatedLoop


class World:
    """A loop in virtual time that can be held up, and what has been lost to that so far."""

    def __init__(self) -> None:
        self.loop = SimulatedLoop(Random(0))
        self.lost = 0.0
        self.late: list[float] = []

    def deadline(self, seconds: float) -> Deadline:
        return Deadline(
            seconds, SystemClock(), lambda: self.lost, lambda: self.late.append(self.now)
        )

    @property
    def now(self) -> float:
        return round(self.loop.time(), 6)

    def stall(self, seconds: float, *, by_others: bool = True) -> None:
        """Hold up the loop, as code does that does not await."""
        self.loop._now += seconds
        if by_others:
            self.lost += seconds

    def play(self, code: Callable[[], Coroutine[Any, Any, None]]) -> list[float]:
        """Run to the end; answers the instants at which the deadline fired."""
        self.loop.run_until_complete(code())
        self.loop.close()
        return self.late


@pytest.fixture
def world() -> World:
    return World()


def waiting(clock: ManualClock) -> int:
    return sum(call.callback is not None for _, _, call in clock._calls)


async def test_it_fires_once_when_its_time_is_up_and_not_a_moment_earlier(clock: ManualClock):
    late: list[int] = []
    Deadline(2.5, clock, lambda: 0.0, lambda: late.append(clock.now()))
    began = clock.now()

    clock.advance(2.499)
    assert late == []
    clock.advance(3600)

    assert late == [began + 2500]
    assert waiting(clock) == 0


async def test_a_cancelled_one_never_fires(clock: ManualClock):
    late: list[bool] = []
    deadline = Deadline(1, clock, lambda: 0.0, lambda: late.append(True))

    deadline.cancel()
    deadline.cancel()
    clock.advance(3600)
    deadline.look()

    assert late == []
    assert waiting(clock) == 0


async def test_a_restarted_one_counts_from_there(clock: ManualClock):
    late: list[int] = []
    deadline = Deadline(1, clock, lambda: 0.0, lambda: late.append(clock.now()))
    began = clock.now()

    for _ in range(5):
        clock.advance(0.9)
        deadline.restart()
    assert late == []
    assert waiting(clock) == 1
    clock.advance(2)

    assert late == [began + 4500 + 1000]


async def test_what_was_lost_before_it_began_is_nothing_to_it(clock: ManualClock):
    late: list[int] = []
    Deadline(1, clock, lambda: 77.0, lambda: late.append(clock.now()))
    began = clock.now()

    clock.advance(5)

    assert late == [began + 1000]


async def test_time_that_was_lost_is_given_back_by_a_clock_moved_by_hand(clock: ManualClock):
    late: list[int] = []
    lost = 0.0
    Deadline(1, clock, lambda: lost, lambda: late.append(clock.now()))
    began = clock.now()
    clock.advance(0.5)
    lost = 2.0

    clock.advance(2.499)
    assert late == []
    clock.advance(0.001)

    assert late == [began + 3000]


async def test_time_lost_while_lost_time_is_given_back_is_given_back_too(clock: ManualClock):
    late: list[int] = []
    lost = 2.0
    deadline = Deadline(1, clock, lambda: lost, lambda: late.append(clock.now()))
    began = clock.now()
    lost += 1.0
    clock.advance(1.5)
    lost += 0.25
    clock.advance(0.5)
    assert late == []

    clock.advance(60)

    assert late == [began + 2250]
    deadline.cancel()


async def test_a_restart_forgets_what_was_lost_before(clock: ManualClock):
    late: list[int] = []
    lost = 0.0
    deadline = Deadline(1, clock, lambda: lost, lambda: late.append(clock.now()))
    lost = 100.0
    clock.advance(0.5)

    deadline.restart()
    began = clock.now()
    clock.advance(60)

    assert late == [began + 1000]


def test_a_stall_by_others_that_delays_the_timer_itself_is_given_back_and_no_more(world: World):
    async def play() -> None:
        world.deadline(1.0)
        await asyncio.sleep(0.5)
        world.stall(2.0)
        await asyncio.sleep(10)

    assert world.play(play) == [3.0]


def test_a_stall_of_its_own_is_not_given_back(world: World):
    async def play() -> None:
        world.deadline(1.0)
        await asyncio.sleep(0.5)
        world.stall(2.0, by_others=False)
        await asyncio.sleep(10)

    assert world.play(play) == [2.5]


def test_it_fires_when_its_own_seconds_are_used_up_whoever_held_up_the_loop_and_when():
    stalled = 0
    for seed in range(60):
        world, chance = World(), Random(seed)
        seconds = chance.choice([0.25, 1.0, 3.0])
        stalled += _is_stalled_at_random(world, chance, seconds)

        # What it has used is what it was given, in however many pieces.
        [fired] = world.late
        assert fired == pytest.approx(seconds + world.lost, abs=1e-5), f"seed {seed}"
    assert stalled > 20, "vacuous: hardly anything was held up"


def _is_stalled_at_random(world: World, chance: Random, seconds: float) -> bool:
    """Play until the deadline fires; answers whether the loop was held up meanwhile."""

    async def play() -> None:
        world.deadline(seconds)
        while not world.late:
            await asyncio.sleep(chance.choice([0.05, 0.3, 0.9]))
            if not world.late and chance.random() < 0.5:
                world.stall(chance.choice([0.2, 0.6, 2.0]))
                await asyncio.sleep(0)

    world.play(play)
    return world.lost > 0


def test_code_that_ends_past_its_time_is_late_although_the_loop_had_no_chance_to_say_so(
    world: World,
):
    async def play() -> None:
        deadline = world.deadline(1.0)
        world.stall(1.5, by_others=False)
        # The timer is due, but has had no turn: this is what code does that returns without an await.
        assert world.late == []
        deadline.look()
        assert world.late == [1.5]
        deadline.look()
        await asyncio.sleep(10)

    assert world.play(play) == [1.5]


def test_code_that_ends_in_its_time_is_not_late_because_others_held_up_the_loop(world: World):
    async def play() -> None:
        deadline = world.deadline(1.0)
        await asyncio.sleep(0.5)
        world.stall(2.0)
        deadline.look()
        deadline.cancel()
        await asyncio.sleep(10)

    assert world.play(play) == []


def test_looking_changes_nothing_about_when_it_fires(world: World):
    async def play() -> None:
        deadline = world.deadline(1.0)
        for _ in range(12):
            await asyncio.sleep(0.1)
            deadline.look()
        await asyncio.sleep(1)

    assert world.play(play) == [1.0]
