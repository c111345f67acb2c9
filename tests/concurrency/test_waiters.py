"""Waiters for an end: told once, whatever became of those who waited beside them."""

from __future__ import annotations

import pytest

from flowstead.engine.waiters import Waiters
from flowstead.errors import RuntimeClosed
from tests.faulty_store import settle


async def test_an_end_that_comes_as_one_waiter_gives_up_still_reaches_the_other():
    ends: Waiters[str] = Waiters()
    gone, there = ends.register("task"), ends.register("task")

    gone.cancel()
    ends.settle("task", b"end")

    assert gone.cancelled()
    assert there.result() == b"end"
    await settle()
    assert not ends.wanted("task")


async def test_one_who_gave_up_is_forgotten_and_the_other_still_waits():
    ends: Waiters[str] = Waiters()
    gone, there = ends.register("task"), ends.register("task")

    gone.cancel()
    await settle()

    assert ends.wanted("task")
    there.cancel()
    await settle()
    assert not ends.wanted("task")


async def test_who_asks_again_in_the_moment_an_end_is_told_waits_for_the_next_one():
    ends: Waiters[str] = Waiters()
    first = ends.register("task")

    ends.settle("task", b"end")
    second = ends.register("task")
    await settle()

    assert first.result() == b"end"
    assert not second.done()
    ends.settle("task", b"another end")
    assert second.result() == b"another end"


async def test_closing_fails_those_who_wait_and_leaves_those_who_gave_up_alone():
    ends: Waiters[str] = Waiters()
    gone, there = ends.register("task"), ends.register("task")
    gone.cancel()

    ends.fail_all(RuntimeClosed("closed"))

    assert gone.cancelled()
    with pytest.raises(RuntimeClosed):
        await there
    await settle()
    assert not ends.wanted("task")
