"""The scope of one attempt: how it is stopped, killed, drained and timed out, whatever comes first."""

from __future__ import annotations

import asyncio
import logging

import anyio
import pytest

from flowstead.engine.child_scope import ChildScope
from flowstead.model.effect import StopReason
from flowstead.testing import ManualClock
from tests.faulty_store import settle


def no_loss() -> float:
    return 0.0


def waiting(clock: ManualClock) -> int:
    return sum(call.callback is not None for _, _, call in clock._calls)


async def inside(child: ChildScope) -> str:
    """A child that waits for ever; says whether it was stopped."""
    with child.scope:
        await asyncio.Event().wait()
    return "stopped"


# ---- stopping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", list(StopReason))
@pytest.mark.parametrize("second", list(StopReason))
async def test_the_first_reason_counts(first: StopReason, second: StopReason):
    child = ChildScope(1)

    child.stop(first)
    child.stop(second)

    assert child.reason is first
    assert child.scope.cancel_called


async def test_a_stopped_child_ends_and_leaves_nothing_with_the_clock(clock: ManualClock):
    child = ChildScope(1, clock)
    child.limit(clock, no_loss, wall=10, idle=5)
    task = asyncio.create_task(inside(child))
    await settle()

    child.stop(StopReason.CANCELLED)
    await settle()
    child.close()

    assert task.result() == "stopped"
    assert waiting(clock) == 0


async def test_a_kill_asks_once_more_and_gives_no_reason_of_its_own(clock: ManualClock):
    child, go = ChildScope(1, clock), asyncio.Event()

    async def hides() -> str:
        with child.scope:
            with anyio.CancelScope(shield=True):
                await go.wait()
            await asyncio.Event().wait()
        return "stopped"

    task = asyncio.create_task(hides())
    await settle()
    child.stop(StopReason.CANCELLED)
    await settle()
    go.set()
    await settle()
    assert not task.done()

    child.kill()
    await settle()

    assert task.result() == "stopped"
    assert child.reason is StopReason.CANCELLED


async def test_what_is_to_be_killed_is_killed_each_time_it_is_asked_for():
    child, killed = ChildScope(1), []
    assert not child.kill(), "there is nothing to be ended by force"
    child.on_kill(lambda: killed.append("at once"))
    killed.clear()

    assert child.kill()
    assert child.kill()

    assert killed == ["at once", "at once"]


async def test_what_is_named_after_the_kill_is_killed_at_once():
    child, killed = ChildScope(1), []
    child.kill()

    child.on_kill(lambda: killed.append("late"))
    child.on_kill(lambda: killed.append("later"))

    assert killed == ["late", "later"]


async def test_only_what_was_named_last_is_killed():
    child, killed = ChildScope(1), []
    child.on_kill(lambda: killed.append("first process"))
    child.on_kill(lambda: killed.append("second process"))

    child.kill()

    assert killed == ["second process"]


async def test_a_stop_alone_kills_and_drains_nobody():
    child, called = ChildScope(1), []
    child.on_kill(lambda: called.append("kill"))
    child.on_drain(lambda: called.append("drain"))

    child.stop(StopReason.CANCELLED)

    assert called == []


async def test_a_drain_is_told_whether_it_comes_before_or_after_somebody_listens():
    early, late, told = ChildScope(1), ChildScope(2), []
    early.drain()
    early.on_drain(lambda: told.append("early"))
    late.on_drain(lambda: told.append("late"))
    assert told == ["early"]
    late.drain()

    assert told == ["early", "late"]
    # Draining is no stop.
    assert not early.scope.cancel_called
    assert early.reason is None


@pytest.mark.parametrize("before", [False, True])
async def test_a_kill_that_fails_is_told_and_the_child_is_asked_to_stop_all_the_same(
    before: bool, caplog: pytest.LogCaptureFixture
):
    child = ChildScope(1)

    def fails() -> None:
        raise ProcessLookupError("gone")

    if before:
        child.on_kill(fails)
        child.kill()
    else:
        child.kill()
        child.on_kill(fails)

    assert child.scope.cancel_called
    [told] = [record for record in caplog.records if record.msg == "child.not_killed"]
    assert told.levelno == logging.ERROR
    assert told.__dict__["error"] == "ProcessLookupError"


# ---- deadlines --------------------------------------------------------------------------------------


async def test_a_child_without_limits_is_never_late(clock: ManualClock):
    child = ChildScope(1, clock)
    child.limit(clock, no_loss, wall=None, idle=None)

    child.touch()
    clock.advance(10_000_000)
    child.look()

    assert child.reason is None
    assert waiting(clock) == 0


async def test_the_wall_stops_it_however_alive_it_is(clock: ManualClock):
    child = ChildScope(1, clock)
    child.limit(clock, no_loss, wall=10, idle=3)

    for _ in range(9):
        clock.advance(1)
        child.touch()
    assert child.reason is None
    clock.advance(1)

    assert child.reason is StopReason.TIMED_OUT
    assert not child.idled


async def test_signs_of_life_keep_it_from_being_idle_and_their_absence_stops_it(
    clock: ManualClock,
):
    child = ChildScope(1, clock)
    child.limit(clock, no_loss, wall=None, idle=3)

    for _ in range(20):
        clock.advance(2.9)
        child.touch()
    assert child.reason is None
    clock.advance(3)

    assert child.reason is StopReason.TIMED_OUT
    assert child.idled


async def test_a_child_that_was_stopped_before_is_neither_idle_nor_timed_out(clock: ManualClock):
    child = ChildScope(1, clock)
    child.limit(clock, no_loss, wall=10, idle=3)

    child.stop(StopReason.CANCELLED)
    child.touch()
    clock.advance(100)
    child.look()

    assert child.reason is StopReason.CANCELLED
    assert not child.idled


async def test_a_child_that_ran_into_its_wall_is_not_called_idle_afterwards(clock: ManualClock):
    child = ChildScope(1, clock)
    child.limit(clock, no_loss, wall=2, idle=3)

    clock.advance(100)

    assert child.reason is StopReason.TIMED_OUT
    assert not child.idled


@pytest.mark.parametrize(("wall", "idle"), [(2, None), (None, 2), (2, 2), (2, 3), (3, 2)])
async def test_being_late_is_told_once_whichever_deadline_it_was(
    wall: float | None, idle: float | None, clock: ManualClock
):
    child, told = ChildScope(1, clock), []
    began = clock.now()
    child.limit(clock, no_loss, wall=wall, idle=idle, late=lambda: told.append(clock.now()))

    clock.advance(100)
    child.look()

    assert told == [began + 2000]


async def test_a_child_that_was_stopped_for_another_reason_is_not_told_of_as_late(
    clock: ManualClock,
):
    child, told = ChildScope(1, clock), []
    child.limit(clock, no_loss, wall=2, idle=1, late=lambda: told.append(True))

    child.stop(StopReason.FLOW_ENDED)
    clock.advance(100)

    assert told == []
    assert child.reason is StopReason.FLOW_ENDED


async def test_what_others_took_is_given_back_to_both_deadlines(clock: ManualClock):
    lost = 0.0
    walled, idler = ChildScope(1, clock), ChildScope(2, clock)
    walled.limit(clock, lambda: lost, wall=10, idle=None)
    idler.limit(clock, lambda: lost, wall=None, idle=10)
    clock.advance(5)
    lost = 4.0

    clock.advance(8.9)
    assert (walled.reason, idler.reason) == (None, None)
    clock.advance(0.1)

    assert (walled.reason, idler.reason) == (StopReason.TIMED_OUT, StopReason.TIMED_OUT)
    assert (walled.idled, idler.idled) == (False, True)


async def test_a_closed_one_is_asked_no_more_and_has_no_deadline(clock: ManualClock):
    child, climbed = ChildScope(1, clock), []
    child.limit(clock, no_loss, wall=10, idle=3)
    child.climb = clock.call_later(5, lambda: climbed.append(True))

    child.close()
    child.close()
    clock.advance(100)

    assert child.reason is None
    assert climbed == []
    assert waiting(clock) == 0
