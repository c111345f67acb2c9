"""Faults of the engine's own, and callers that overtake each other: nobody is left without an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from flowstead import Limits, Registry, Retry, TaskContext
from flowstead.engine.actor import Actor
from flowstead.engine.committer import Committer
from flowstead.engine.mailbox import Reply
from flowstead.model.code import Code
from flowstead.model.command import Tick
from flowstead.model.flow import FlowKey
from flowstead.testing import ManualClock
from tests.faulty_store import FaultyStore, flows_of, holds_nothing, new_flow, running, settle, soon
from tests.store.rows import creates, flow_of


class BrokenClock(ManualClock):
    """A clock that, while it is broken, fails whoever asks it for the time."""

    is_broken = False

    def now(self) -> int:
        if self.is_broken:
            raise ZeroDivisionError("the clock has stopped")
        return super().now()


async def test_a_turn_that_crashes_fails_its_callers_and_nothing_of_it_is_kept():
    clock = BrokenClock()
    async with running(FaultyStore(), clock=clock) as runtime:
        flows = flows_of(runtime)
        bad, good = await new_flow(flows), await new_flow(flows)
        clock.is_broken = True

        answers = await soon(
            asyncio.gather(
                flows.update(flow_id=bad, expected_revision=0, state_json="lost"),
                flows.update(flow_id=bad, expected_revision=1, state_json="lost too"),
                return_exceptions=True,
            )
        )

        assert [type(answer) for answer in answers] == [ZeroDivisionError, ZeroDivisionError]
        clock.is_broken = False
        kept = await soon(flows.get(bad))
        assert kept is not None
        assert (kept.revision, kept.state_json) == (0, None)
        for flow_id in (bad, good):
            assert (await soon(flows.update(flow_id=flow_id, expected_revision=0))).applied
        assert holds_nothing(runtime)


async def test_what_was_due_in_a_turn_that_crashed_is_seen_to_a_moment_later():
    clock, registry = ManualClock(), Registry()
    attempts = []

    @registry.task(name="flaky", retry=Retry(initial=10.0, jitter=0))
    async def flaky(context: TaskContext, given: object) -> None:
        attempts.append(context.attempt)
        if context.attempt == 1:
            raise ValueError

    def crash(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    async with running(FaultyStore(), clock=clock, registry=registry) as runtime:
        flow_id = await new_flow(flows_of(runtime))
        await soon(flows_of(runtime).run_task(flow_id=flow_id, task="t", run="flaky"))
        await settle()
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(Actor, "_fold", crash)
            clock.advance(10)
            await settle()
        assert attempts == [1]

        clock.advance(1)
        await settle()

        assert attempts == [1, 2]


async def test_a_call_that_waits_behind_a_crashed_turn_is_answered_from_the_disk():
    clock, store = BrokenClock(), FaultyStore()
    async with running(store, clock=clock, limits=Limits(mailbox=1000)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        clock.is_broken = True
        # One more than a turn takes: the last one waits for the next.
        calls = [
            asyncio.ensure_future(flows.update(flow_id=flow_id, expected_revision=0))
            for _ in range(257)
        ]
        calls[0].add_done_callback(lambda _: setattr(clock, "is_broken", False))
        await soon(asyncio.wait(calls))

        assert {type(call.exception()) for call in calls[:256]} == {ZeroDivisionError}
        assert calls[256].result().applied


class Adopter:
    """A writer that remembers what it was told, and may trip over it."""

    def __init__(self, *, trips: bool = False) -> None:
        self.trips = trips
        self.told: list[object] = []

    def committed(self, first_position: int) -> None:
        self.told.append(first_position)
        if self.trips:
            raise ZeroDivisionError("a fault of ours")

    def failed(self, error: Exception) -> None:
        self.told.append(error)


async def test_a_writer_that_trips_over_its_answer_keeps_nobody_from_theirs(
    caplog: pytest.LogCaptureFixture,
):
    store = FaultyStore()
    await store.open()
    committer = Committer(store, 512, on_lost=lambda: None)
    adopters = [Adopter(), Adopter(trips=True), Adopter()]
    for name, adopter in zip("abc", adopters, strict=True):
        committer.submit(creates(flow_of(store.next_key(), name), seqs=[1, 2]), adopter)

    committer.stop()
    await soon(committer.run())

    assert store.batches == [3]
    assert [adopter.told for adopter in adopters] == [[1], [3], [5]]
    assert (committer.statistics.writes, committer.statistics.failed) == (3, 0)
    assert [record.msg for record in caplog.records] == ["commit.not_adopted"]


async def test_a_job_of_the_engine_that_fails_is_told_and_does_not_keep_it_from_closing(
    caplog: pytest.LogCaptureFixture,
):
    store = FaultyStore()
    store.fail_reads("list_due", ValueError("a fault of the store's own"))

    async with running(store) as runtime:
        await settle()
        flows = flows_of(runtime)
        assert (
            await soon(flows.update(flow_id=await new_flow(flows), expected_revision=0))
        ).applied

    [told] = [record for record in caplog.records if record.msg == "engine.job_failed"]
    assert told.levelno == logging.ERROR
    assert told.__dict__["job"] == "flowstead timers"
    assert "a fault of the store's own" in told.__dict__["error"]


async def test_a_memory_for_a_single_flow_serves_many():
    async with running(FaultyStore(), limits=Limits(idle_flows=1)) as runtime:
        flows = flows_of(runtime)

        ids = [await new_flow(flows, state_json=n) for n in range(5)]

        assert runtime.statistics().flows_in_memory == 1
        for flow_id in ids:
            assert (await soon(flows.update(flow_id=flow_id, expected_revision=0))).applied
            assert runtime.statistics().flows_in_memory == 1


class Prompted(FaultyStore):
    """A store that gives a cue when it has read for somebody."""

    cue: Callable[[], object] | None = None

    async def load(self, keys: Sequence[FlowKey]) -> Any:
        found = await super().load(keys)
        if self.cue is not None:
            cue, self.cue = self.cue, None
            cue()
        return found


async def test_who_was_let_into_a_mailbox_that_is_gone_stands_in_line_at_the_new_one():
    store = Prompted()
    async with running(store, limits=Limits(mailbox=1)) as runtime:
        engine, loop = runtime._engine, asyncio.get_running_loop()
        key = FlowKey("owner", "nowhere")
        tries: list[asyncio.Future[Reply]] = []
        overtaking: list[asyncio.Future[Reply]] = []

        def overtake() -> None:
            # The actor of a flow that is not there has answered and gone; its successor is filled at once.
            overtaking.append(engine.ask(key, Tick(), "somebody"))

        store.cue = lambda: loop.call_soon(loop.call_soon, overtake)
        first = engine.ask(key, Tick(), "somebody")
        patient = asyncio.create_task(
            engine.ask_patiently(key, Tick(), "patient", posted=tries.append)
        )
        reply = await soon(patient)

        codes = [refusal.code for asked in tries if (refusal := asked.result().refusal)]
        assert codes == [Code.OVERLOADED, Code.NOT_FOUND]
        assert [(await asked).refusal for asked in (first, *overtaking)] == [reply.refusal] * 2
