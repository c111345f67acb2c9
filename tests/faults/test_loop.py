"""Children that hold up the event loop: what falls due meanwhile comes late by the stall at most, and once."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowstead import Limits, Retry, Succeeded, TaskContext, TimedOut
from flowstead.testing import ManualClock
from tests.faults.support import Stage, ends_of, launch, listening, passes, stage, task_of, types_of
from tests.faulty_store import new_flow, settle, soon, turns

STALL = 5


class Stall:
    """A child that holds up the event loop: the clock goes on, and nobody else gets a turn."""

    def __init__(self, it: Stage, clock: ManualClock) -> None:
        self.it, self.clock = it, clock
        self.go = asyncio.Event()

    async def __call__(self, ctx: TaskContext, given: object) -> str:
        await self.go.wait()
        self.clock.advance(STALL)
        self.it.fire()
        return "stalled"


async def forever(ctx: TaskContext, given: object) -> None:
    await asyncio.Event().wait()


async def test_deadlines_of_others_pass_late_by_the_stall_at_most_and_not_before_their_time(
    clock: ManualClock,
):
    async with stage(clock=clock) as it:
        stall = Stall(it, clock)
        staller = await it.launch(stall)
        began = clock.now()
        due = {}
        for timeout in (1, 3, STALL, STALL + 1):
            for flow_id in (it.flow_id, it.other_id):
                due[await launch(it.flows, flow_id, forever, timeout=timeout)] = timeout
        await settle()

        stall.go.set()
        await settle()

        assert await soon(it.flows.wait_task(staller)) == Succeeded("stalled")
        for task_id, timeout in due.items():
            task = await task_of(it.flows, task_id)
            if timeout <= STALL:
                assert task.status == "timed_out"
                assert task.ended_at
                assert 0 <= task.ended_at - (began + timeout * 1000) <= STALL * 1000
                assert await ends_of(it.flows, task.flow_id, task_id) == ["timed_out"]
            else:
                assert task.status == "running"
        clock.advance(1)
        await settle()
        assert {(await task_of(it.flows, task_id)).status for task_id in due} == {"timed_out"}
        await it.check_others()


async def test_a_retry_and_the_grace_of_a_cancel_that_fall_due_during_a_stall_come_once(
    clock: ManualClock,
):
    async with stage(clock=clock, limits=Limits(cancel_grace=3)) as it:
        stall, attempts = Stall(it, clock), list[int]()

        async def fails_once(ctx: TaskContext, given: object) -> str:
            attempts.append(ctx.attempt)
            if ctx.attempt == 1:
                raise ValueError("not yet")
            return "at last"

        await it.launch(stall)
        task_id = await launch(
            it.flows, it.other_id, fails_once, retry=Retry(max_attempts=3, initial=2.0, jitter=0)
        )
        asked = await new_flow(it.flows)
        requested = it.flows.request_cancel(flow_id=asked, expected_revision=0)
        assert (await soon(requested)).applied
        await settle()
        assert attempts == [1]

        stall.go.set()
        assert await soon(it.flows.wait_task(task_id)) == Succeeded("at last")

        assert attempts == [1, 2]
        assert (await soon(it.flows.result(asked))).status == "cancelled"
        assert (await types_of(it.flows, asked)).count("flow.cancelled") == 1
        await it.check_others()


async def test_a_cancel_whose_patience_ends_in_a_stall_is_answered_and_stops_the_child_once(
    clock: ManualClock,
):
    async with stage(clock=clock) as it:
        stall = Stall(it, clock)
        await it.launch(stall)
        flow_id = await new_flow(it.flows)
        task_id = await launch(it.flows, flow_id, forever)
        await settle()

        stall.go.set()
        cancelling = asyncio.create_task(it.flows.cancel(flow_id, grace=1))

        report = await soon(cancelling)
        ended = await soon(it.flows.result(flow_id))
        assert report.cancelled or report.code == "cancel_pending"
        assert ended.status == "cancelled"
        assert await ends_of(it.flows, flow_id, task_id) == ["cancelled"]
        await it.check_others()


async def test_sends_accepted_before_a_stall_are_applied_once_after_it_and_in_their_order(
    clock: ManualClock,
):
    async with stage(clock=clock) as it:
        stall = Stall(it, clock)
        staller = await it.launch(stall)
        await settle()

        calls = [
            asyncio.create_task(
                it.flows.run_task(flow_id=it.other_id, task="t", run=passes, input_json=n)
            )
            for n in range(50)
        ]
        stall.go.set()
        answers = await soon(asyncio.gather(*calls))
        await soon(it.flows.wait_task(staller))

        made = [answer.unwrap() for answer in answers]
        for n, task in enumerate(made):
            assert await soon(it.flows.wait_task(task.task_id)) == Succeeded(n)
            assert await ends_of(it.flows, it.other_id, task.task_id) == ["succeeded"]
        await it.check_others()


def bomb() -> object:
    """A pattern that takes the longer to fail the longer its text is, exponentially."""
    return re.match(r"(a+)+$", "a" * 20 + "b")


def count() -> object:
    return sum(range(1_000_000))


@pytest.mark.parametrize("block", [bomb, count])
async def test_code_that_really_holds_up_the_loop_loses_and_doubles_nothing(
    db: Path, block: Callable[[], object]
):
    async with stage(db) as it:
        began = asyncio.Event()

        async def blocks(ctx: TaskContext, given: object) -> None:
            await began.wait()
            it.fire()
            block()

        blocker = await it.launch(blocks)
        # Its time is up while nobody can tell it.
        hasty = await launch(it.flows, it.other_id, forever, timeout=0.001)
        began.set()
        calls: list[Any] = [
            it.flows.run_task(flow_id=it.other_id, task="t", run=passes, input_json=n)
            for n in range(20)
        ]
        made = [answer.unwrap() for answer in await soon(asyncio.gather(*calls))]

        for n, task in enumerate(made):
            assert await soon(it.flows.wait_task(task.task_id)) == Succeeded(n)
        await soon(it.flows.wait_task(blocker))
        await soon(it.flows.wait_task(hasty))
        assert await ends_of(it.flows, it.other_id, hasty) == ["timed_out"]
        await it.check_others()


# ---- who pays for it -------------------------------------------------------------------------------

CROWD = 100
DEADLINE = 0.5
BLOCKED = 1.2
"""Seconds, and real ones: how long the loop is held up is what the watch over it measures."""


def hold_up(until: Callable[[], object]) -> None:
    """Hold up the event loop, long past the deadlines of all others, and at least until something is so."""
    began = time.monotonic()
    while time.monotonic() - began < BLOCKED or not until():
        assert time.monotonic() - began < 20, "vacuous: it never came to be so"
        time.sleep(0.01)


def told_of(task_id: str, heard: list[str]) -> list[str]:
    """What was said of stalls in which a child was found at it."""
    return [line for line in heard if "loop.stalled" in line and f"child {task_id}" in line]


async def test_when_one_child_holds_up_the_loop_no_other_times_out_and_it_is_named_meanwhile() -> (
    None
):
    with listening() as heard:
        async with stage(limits=Limits(stall_seconds=0.1, running_children=CROWD + 10)) as it:
            begun, named = list[str](), list[str]()
            all_begun, go = asyncio.Event(), asyncio.Event()

            async def waits(ctx: TaskContext, given: object) -> str:
                begun.append(ctx.task_id)
                if len(begun) == CROWD:
                    all_begun.set()
                await go.wait()
                return "in time"

            async def blocks(ctx: TaskContext, given: object) -> str:
                await all_begun.wait()
                hold_up(until=lambda: told_of(ctx.task_id, heard))
                named.extend(told_of(ctx.task_id, heard))
                it.fire()
                return "blocked"

            culprit = await it.launch(blocks, timeout=DEADLINE)
            calls = (
                launch(it.flows, (it.flow_id, it.other_id)[n % 2], waits, timeout=DEADLINE)
                for n in range(CROWD)
            )
            crowd = await soon(asyncio.gather(*calls), 60)
            charged = await soon(it.flows.wait_task(culprit), 60)
            await turns()
            # What they wait for comes only now, after every timer that fell due meanwhile.
            go.set()
            ends = [await soon(it.flows.wait_task(task_id), 20) for task_id in crowd]

            assert [end for end in ends if end != Succeeded("in time")] == []
            # While it lasted, and not only afterwards: which child, and where it stands.
            [line] = named
            assert line.startswith("WARNING")
            assert "in hold_up" in line
            assert "blocks" in line
            assert it.flow_id in line
            # Who held everybody up is charged for it.
            assert isinstance(charged, TimedOut)
            statistics = it.runtime.statistics()
            assert statistics.loop_stalls >= 1
            assert statistics.stalled_seconds >= BLOCKED
            # And a deadline is still one.
            hangs = await it.launch(forever, timeout=0.05)
            assert isinstance(await soon(it.flows.wait_task(hangs), 20), TimedOut)
            await it.check_others()

    assert told_of(culprit, heard) == named, "once for each stall"


async def test_with_plain_time_outs_all_of_them_would_have_timed_out() -> None:
    go = asyncio.Event()
    crowd = [asyncio.ensure_future(asyncio.wait_for(go.wait(), DEADLINE)) for _ in range(CROWD)]
    await turns()

    hold_up(until=lambda: True)
    await turns()
    go.set()
    ends = await asyncio.gather(*crowd, return_exceptions=True)

    assert [type(end) for end in ends] == [TimeoutError] * CROWD
