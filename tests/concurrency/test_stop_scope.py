"""The stop scope: it asks, it asks again, and code that will not listen costs next to nothing meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from random import Random
from typing import Any

import anyio
import pytest

from flowstead.engine.clock import SystemClock
from flowstead.engine.stop_scope import StopScope
from flowstead.testing import ManualClock, SimulatedLoop
from tests.faulty_store import settle, turns

A_PULSE = 12
"""The most steps of the loop for which one request may be insisted on, with what brings it about."""

Code = Callable[[], Awaitable[Any]]


class Deaf:
    """Code that swallows every cancellation until it is told to go, and counts them."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.swallowed = 0

    async def __call__(self) -> str:
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self.swallowed += 1
        return "when it liked"


@pytest.fixture
async def deaf() -> AsyncIterator[Deaf]:
    """Deaf code, and a loop that can be closed however the test ends."""
    code = Deaf()
    yield code
    code.let_go.set()
    await settle()


async def inside(scope: StopScope, code: Code) -> Any:
    """Run code in the scope; None if it was stopped. Whoever comes after it must not feel the cancellation."""
    answer = None
    with scope:
        answer = await code()
    await turns(3 * A_PULSE)
    task = asyncio.current_task()
    assert task
    assert task.cancelling() == 0
    return answer


def armed(clock: ManualClock) -> int:
    """How many callbacks wait for their time."""
    return sum(call.callback is not None for _, _, call in clock._calls)


# ---- code that stops --------------------------------------------------------------------------------


async def test_code_that_awaits_is_stopped_within_the_first_steps(clock: ManualClock):
    scope = StopScope(clock)
    task = asyncio.create_task(inside(scope, asyncio.Event().wait))
    await settle()

    scope.cancel()
    await turns(3)

    assert scope.cancel_called
    await settle()
    assert task.done()
    assert task.result() is None
    assert armed(clock) == 0


async def test_code_that_was_to_stop_before_its_first_line_runs_to_its_first_await(
    clock: ManualClock,
):
    scope, reached = StopScope(clock), []

    async def code() -> None:
        reached.append("first line")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        reached.append("second await")

    scope.cancel()
    assert await inside(scope, code) is None

    assert reached == ["first line"]
    assert armed(clock) == 0


async def test_code_that_ends_before_its_first_await_has_ended_although_it_was_to_stop(
    clock: ManualClock,
):
    scope = StopScope(clock)

    async def code() -> str:
        return "done"

    scope.cancel()

    assert await inside(scope, code) == "done"
    assert armed(clock) == 0


async def test_code_may_stop_itself(clock: ManualClock):
    scope, reached = StopScope(clock), []

    async def code() -> None:
        scope.cancel()
        reached.append("here")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        reached.append("and here")

    assert await inside(scope, code) is None

    assert reached == ["here"]


@pytest.mark.parametrize("apart", [0, 1, 4, 8, 9, 10, 30])
async def test_code_that_is_asked_twice_stops_once(apart: int, clock: ManualClock):
    scope, stopped = StopScope(clock), []

    async def code() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    task = asyncio.create_task(inside(scope, code))
    await settle()
    scope.cancel()
    await turns(apart)
    scope.cancel()
    await settle()

    assert task.done()
    assert task.result() is None
    assert stopped == [True]
    scope.cancel()
    await settle()
    assert armed(clock) == 0


async def test_a_request_after_the_end_reaches_nobody(clock: ManualClock):
    scope = StopScope(clock)

    async def code() -> str:
        return "done"

    async def host() -> str:
        answer = await inside(scope, code)
        scope.cancel()
        await turns(3 * A_PULSE)
        return str(answer)

    task = asyncio.create_task(host())
    await settle()

    assert task.result() == "done"
    assert armed(clock) == 0


# ---- code that does not -----------------------------------------------------------------------------


async def test_code_that_swallows_every_cancellation_is_asked_for_a_few_steps_and_left_alone(
    deaf: Deaf, clock: ManualClock
):
    scope = StopScope(clock)
    task = asyncio.create_task(inside(scope, deaf))
    await settle()

    scope.cancel()
    # A loop that comes to rest is the point: under a bare cancel scope this never returns.
    await settle()
    heard = deaf.swallowed
    await turns(1000)

    assert 1 <= heard <= A_PULSE
    assert deaf.swallowed == heard
    deaf.let_go.set()
    await settle()
    assert task.result() == "when it liked"
    assert armed(clock) == 0


def test_code_that_never_stops_costs_a_bounded_number_of_steps():
    loop = SimulatedLoop(Random(0))

    async def play() -> tuple[int, int]:
        scope, deaf = StopScope(SystemClock()), Deaf()
        task = asyncio.create_task(inside(scope, deaf))
        await asyncio.sleep(1)
        scope.cancel()
        before = loop.steps
        await asyncio.sleep(600)
        deaf.let_go.set()
        used = loop.steps - before
        assert await task == "when it liked"
        return used, deaf.swallowed

    used, swallowed = loop.run_until_complete(play())
    loop.close()

    # Two requests in a second, each insisted on for a few steps.
    assert 600 <= swallowed <= 2.2 * 600 * A_PULSE
    assert used <= 4 * 2.2 * 600 * A_PULSE


async def test_requests_come_soon_at_first_and_never_more_than_half_a_second_apart(
    deaf: Deaf, clock: ManualClock
):
    scope, began = StopScope(clock), clock.now()
    task = asyncio.create_task(inside(scope, deaf))
    await settle()
    scope.cancel()
    await settle()

    asked = [began]
    while asked[-1] < began + 20_000:
        heard = deaf.swallowed
        clock.advance(0.005)
        await settle()
        if deaf.swallowed > heard:
            assert deaf.swallowed <= heard + A_PULSE
            asked.append(clock.now())

    pauses = [after - before for before, after in pairwise(asked)]
    # The clock is looked at every 5 ms only.
    assert all(later >= sooner - 5 for sooner, later in pairwise(pauses))
    assert pauses[0] <= 50
    assert 400 <= max(pauses) <= 505
    deaf.let_go.set()
    await settle()
    assert task.done()


async def test_it_is_told_once_that_code_does_not_stop_and_not_before_a_second(
    deaf: Deaf, clock: ManualClock
):
    scope, told = StopScope(clock), []
    scope.ignored = lambda: told.append(clock.now() - began)
    task = asyncio.create_task(inside(scope, deaf))
    await settle()
    began = clock.now()
    scope.cancel()

    for _ in range(600):
        await settle()
        clock.advance(0.1)

    assert len(told) == 1
    assert 1000 <= told[0] <= 2000
    deaf.let_go.set()
    await settle()
    assert task.done()


async def test_nobody_is_told_of_code_that_takes_its_time_but_stops(clock: ManualClock):
    scope, tidy, told = StopScope(clock), asyncio.Event(), []
    scope.ignored = lambda: told.append(True)

    async def code() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await tidy.wait()

    task = asyncio.create_task(inside(scope, code))
    await settle()
    scope.cancel()
    for _ in range(10):
        await settle()
        clock.advance(0.1)
    tidy.set()
    await settle()
    clock.advance(3600)

    assert task.done()
    assert told == []


async def test_given_up_code_is_asked_no_more(deaf: Deaf, clock: ManualClock):
    scope = StopScope(clock)
    task = asyncio.create_task(inside(scope, deaf))
    await settle()
    scope.cancel()
    await settle()
    heard = deaf.swallowed

    scope.give_up()
    for _ in range(100):
        clock.advance(1)
        await settle()

    assert deaf.swallowed == heard
    assert armed(clock) == 0
    deaf.let_go.set()
    await settle()
    assert task.result() == "when it liked"


async def test_code_that_was_given_up_can_be_asked_again(deaf: Deaf, clock: ManualClock):
    scope = StopScope(clock)
    task = asyncio.create_task(inside(scope, deaf))
    await settle()
    scope.cancel()
    await settle()
    scope.give_up()
    heard = deaf.swallowed

    scope.cancel()
    await settle()

    assert heard < deaf.swallowed <= heard + A_PULSE
    deaf.let_go.set()
    await settle()
    assert task.done()


@pytest.mark.parametrize("times", [2, 50])
async def test_many_requests_at_once_are_insisted_on_no_longer_than_one(
    deaf: Deaf, times: int, clock: ManualClock
):
    scope = StopScope(clock)
    task = asyncio.create_task(inside(scope, deaf))
    await settle()

    for _ in range(times):
        scope.cancel()
    await settle()

    assert 1 <= deaf.swallowed <= A_PULSE
    assert armed(clock) == 1
    deaf.let_go.set()
    await settle()
    assert task.done()


async def test_without_a_clock_it_asks_once_and_leaves_it_at_that(deaf: Deaf):
    scope = StopScope()
    task = asyncio.create_task(inside(scope, deaf))
    await settle()

    scope.cancel()
    await settle()

    assert 1 <= deaf.swallowed <= A_PULSE
    deaf.let_go.set()
    await settle()
    assert task.result() == "when it liked"


# ---- sections that are shielded ---------------------------------------------------------------------


async def test_a_shielded_section_stays_whole_however_often_it_is_asked(clock: ManualClock):
    scope, steps, go = StopScope(clock), [], asyncio.Event()

    async def code() -> None:
        with anyio.CancelScope(shield=True):
            for step in range(5):
                await asyncio.sleep(0)
                steps.append(step)
            await go.wait()
            steps.append("whole")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        steps.append("too far")

    task = asyncio.create_task(inside(scope, code))
    scope.cancel()
    for _ in range(100):
        await settle()
        scope.cancel()
        clock.advance(0.7)
    assert steps == [0, 1, 2, 3, 4]

    go.set()
    await settle()
    clock.advance(5)
    await settle()

    assert steps == [0, 1, 2, 3, 4, "whole"]
    assert task.result() is None
    assert armed(clock) == 0


async def test_code_that_leaves_its_shield_while_it_is_asked_stops_there_and_then(
    clock: ManualClock,
):
    scope, after = StopScope(clock), []

    async def code() -> None:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.Event().wait()
        after.append(True)

    task = asyncio.create_task(inside(scope, code))
    await asyncio.sleep(0)
    scope.cancel()
    await settle()

    # The clock has not moved.
    assert task.result() is None
    assert after == []


async def test_code_that_leaves_its_shield_between_two_requests_stops_at_the_next(
    clock: ManualClock,
):
    scope, go = StopScope(clock), asyncio.Event()

    async def code() -> None:
        with anyio.CancelScope(shield=True):
            await go.wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(inside(scope, code))
    await settle()
    scope.cancel()
    await settle()
    go.set()
    await settle()
    assert not task.done()

    clock.advance(0.1)
    await settle()

    assert task.result() is None


# ---- leaving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(14))
async def test_a_scope_left_in_the_middle_of_a_request_leaves_nothing_behind(
    steps: int, clock: ManualClock
):
    scope, felt = StopScope(clock), []

    async def code() -> str:
        while True:
            try:
                for _ in range(steps):
                    await asyncio.sleep(0)
                return "left"
            except asyncio.CancelledError:
                felt.append(True)
                # Counting steps as somebody who does not want to hear.
                with anyio.CancelScope(shield=True):
                    for _ in range(steps):
                        await asyncio.sleep(0)
                return "left"

    task = asyncio.create_task(inside(scope, code))
    await asyncio.sleep(0)
    scope.cancel()
    await settle()

    # `inside` has looked: nothing is delivered to whoever comes after.
    assert task.result() == "left"
    assert armed(clock) == 0


@pytest.mark.parametrize("seed", range(40))
def test_in_whatever_order_the_loop_takes_its_steps_nothing_leaks_out_of_the_scope(seed: int):
    loop = SimulatedLoop(Random(seed), shuffle=True)
    chance = Random(seed)

    async def code() -> None:
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
        with anyio.CancelScope(shield=chance.random() < 0.5):
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
        await asyncio.sleep(chance.choice([0, 0.05, 0.1, 0.3, 3600]))
        await asyncio.Event().wait()

    async def play() -> Any:
        scope = StopScope(SystemClock())
        task = asyncio.create_task(inside(scope, code))
        for _ in range(1 + chance.randrange(3)):
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            scope.cancel()
        return await task

    assert loop.run_until_complete(play()) is None
    loop.close()


# ---- what code has inside ---------------------------------------------------------------------------


async def test_task_groups_inside_are_stopped_to_the_last_task(clock: ManualClock):
    scope, stopped = StopScope(clock), []

    async def leaf(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(name)

    async def branch(name: str) -> None:
        async with anyio.create_task_group() as group:
            for n in range(3):
                group.start_soon(leaf, f"{name}{n}")

    async def code() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(branch, "a")
            group.start_soon(branch, "b")
            await leaf("trunk")

    task = asyncio.create_task(inside(scope, code))
    await settle()
    scope.cancel()
    await settle()

    assert task.result() is None
    assert sorted(stopped) == ["a0", "a1", "a2", "b0", "b1", "b2", "trunk"]
    assert armed(clock) == 0


async def test_a_deaf_task_in_a_group_inside_keeps_the_group_and_its_siblings_are_stopped(
    deaf: Deaf, clock: ManualClock
):
    scope, stopped = StopScope(clock), []

    async def leaf() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    async def code() -> None:
        # Not anyio's: that one insists at every step by itself, however quiet we are.
        async with asyncio.TaskGroup() as group:
            group.create_task(deaf())
            group.create_task(leaf())

    task = asyncio.create_task(inside(scope, code))
    await settle()
    scope.cancel()
    for _ in range(20):
        heard = deaf.swallowed
        await settle()
        clock.advance(1)
        assert deaf.swallowed <= heard + A_PULSE

    assert stopped == [True]
    assert not task.done()
    assert deaf.swallowed >= 1
    deaf.let_go.set()
    await settle()
    assert task.result() is None


async def test_a_group_inside_that_cancels_itself_is_no_stop(clock: ManualClock):
    scope = StopScope(clock)

    async def code() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(asyncio.Event().wait)
            group.cancel_scope.cancel()
        return "went on"

    assert await inside(scope, code) == "went on"
    assert not scope.cancel_called


async def test_an_error_made_while_stopping_comes_out_as_it_is(clock: ManualClock):
    scope = StopScope(clock)

    async def code() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ZeroDivisionError("while tidying up")

    task = asyncio.create_task(inside(scope, code))
    await settle()
    scope.cancel()
    await settle()

    assert isinstance(task.exception(), ZeroDivisionError)
    assert armed(clock) == 0


async def test_a_cancellation_from_outside_is_not_taken_for_ours(clock: ManualClock):
    scope = StopScope(clock)
    task = asyncio.create_task(inside(scope, asyncio.Event().wait))
    await settle()

    task.cancel()
    await settle()

    assert task.cancelled()
    assert not scope.cancel_called
    assert armed(clock) == 0


@pytest.mark.parametrize("is_asked", [False, True])
async def test_code_that_leaves_a_scope_open_spoils_its_task_and_nothing_goes_on_behind_it(
    is_asked: bool, clock: ManualClock
):
    scope, bystander = StopScope(clock), Deaf()

    async def code() -> None:
        anyio.CancelScope().__enter__()
        if is_asked:
            scope.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    task = asyncio.create_task(inside(scope, code))
    other = asyncio.create_task(bystander())
    await settle()

    assert isinstance(task.exception(), RuntimeError)
    assert armed(clock) == 0
    scope.cancel()
    for _ in range(10):
        clock.advance(5)
        await settle()
    assert bystander.swallowed == 0
    bystander.let_go.set()
    assert await other == "when it liked"
