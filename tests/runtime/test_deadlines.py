"""Deadlines: how long an attempt may take, how long it may be silent, how long a child may stand in line."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flowstead import (
    ChildTimedOut,
    Flow,
    FlowContext,
    Limits,
    Nested,
    Retry,
    Task,
    TaskContext,
)
from tests.faulty_store import holds_nothing
from tests.runtime.support import Lives, make

Code = Callable[[TaskContext, Any], Awaitable[Any]]


class Log:
    """Code that keeps when each of its attempts began and was stopped, in seconds after the first."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.stopped: list[float] = []
        self._zero: float | None = None

    def now(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._zero is None:
            self._zero = now
        return round(now - self._zero, 2)

    async def for_ever(self, _: TaskContext, __: Any) -> None:
        self.began.append(self.now())
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.stopped.append(self.now())


@pytest.fixture
def log() -> Log:
    return Log()


def _launch(lives: Lives, run: Any, **given: Any) -> Task:
    """A child of a flow of its own."""
    flow = lives.play(make(lives.flows))
    added = lives.play(lives.flows.run_task(flow_id=flow.flow_id, task="t", run=run, **given))
    return added.unwrap()


def _ended(lives: Lives, task: Task) -> Task:
    lives.play(lives.flows.wait_task(task.task_id))
    return lives.task(task.task_id)


def _told(task: Task) -> tuple[str, str | None, str | None, str | None]:
    failure = task.failure
    assert failure is not None
    return task.status.value, failure.kind, failure.code, failure.message


# ---- each attempt ---------------------------------------------------------------------------------


def test_an_attempt_is_stopped_at_its_deadline_and_really_gone(lives: Lives, log: Log) -> None:
    task = _launch(lives, log.for_ever, timeout=5)

    ended = _ended(lives, task)

    assert _told(ended) == ("timed_out", "timed_out", None, "stopped at its deadline")
    assert (log.began, log.stopped) == ([0], [5])
    assert (ended.timeout, ended.attempt) == (5, 1)
    lives.pass_time(0)
    assert holds_nothing(lives.runtime)


def test_signs_of_life_do_not_move_the_deadline_itself(lives: Lives, log: Log) -> None:
    async def lively(context: TaskContext, _: Any) -> None:
        log.began.append(log.now())
        try:
            while True:
                await asyncio.sleep(1)
                await context.heartbeat()
        finally:
            log.stopped.append(log.now())

    ended = _ended(lives, _launch(lives, lively, timeout=5, idle_timeout=2))

    assert _told(ended)[2:] == (None, "stopped at its deadline")
    assert 4.99 <= log.stopped[0] <= 5.1


def test_a_deadline_is_told_to_the_child(lives: Lives) -> None:
    seen: list[int | None] = []

    async def look(context: TaskContext, _: Any) -> None:
        seen.append(context.deadline)

    first = _ended(lives, _launch(lives, look, timeout=5))
    _ended(lives, _launch(lives, look))

    assert first.started_at is not None
    assert seen[0] is not None and 0 <= seen[0] - first.started_at - 5000 <= 20
    assert seen[1] is None


def test_what_is_returned_in_time_counts_and_what_is_returned_late_does_not(lives: Lives) -> None:
    async def returns_when_stopped(_: TaskContext, after: float) -> str:
        try:
            await asyncio.sleep(after)
        except asyncio.CancelledError:
            return "too late"
        return "in time"

    in_time = _ended(lives, _launch(lives, returns_when_stopped, input_json=4.9, timeout=5))
    late = _ended(lives, _launch(lives, returns_when_stopped, input_json=5.1, timeout=5))

    assert (in_time.status, in_time.result_json) == ("succeeded", "in time")
    assert (late.status, late.result_json) == ("timed_out", None)


@pytest.mark.parametrize("way", ["progress", "heartbeat"])
def test_a_sign_of_life_restarts_the_idle_deadline(lives: Lives, log: Log, way: str) -> None:
    async def lively_for_a_while(context: TaskContext, _: Any) -> None:
        log.began.append(log.now())
        try:
            for _number in range(4):
                await asyncio.sleep(2)
                await (context.progress("on") if way == "progress" else context.heartbeat())
            await asyncio.get_running_loop().create_future()
        finally:
            log.stopped.append(log.now())

    ended = _ended(lives, _launch(lives, lively_for_a_while, idle_timeout=3))

    assert _told(ended) == ("timed_out", "timed_out", "idle", "stopped without a sign of life")
    assert 11 <= log.stopped[0] <= 11.2
    assert (ended.progress_summary == "on") is (way == "progress")


def test_a_silent_child_is_stopped_after_its_idle_deadline(lives: Lives, log: Log) -> None:
    ended = _ended(lives, _launch(lives, log.for_ever, idle_timeout=3))

    assert _told(ended)[2] == "idle"
    assert log.stopped == [3]
    assert ended.idle_timeout == 3


def test_a_time_out_names_what_cleaning_up_did(lives: Lives) -> None:
    async def untidy(_: TaskContext, __: Any) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            raise ValueError("the mop is gone")

    ended = _ended(lives, _launch(lives, untidy, timeout=1))

    assert _told(ended)[3] == "stopped at its deadline; then ValueError: the mop is gone"


def test_a_child_that_will_not_stop_keeps_its_siblings_unharmed(lives: Lives, log: Log) -> None:
    lives.limits = Limits(kill_after=10, abandon_after=20)

    async def stubborn(_: TaskContext, __: Any) -> str:
        for _ in range(3):
            try:
                await asyncio.sleep(3)
            except asyncio.CancelledError:
                continue
        return "at last"

    flow = lives.play(make(lives.flows))
    task = lives.play(
        lives.flows.run_task(flow_id=flow.flow_id, task="t", run=stubborn, timeout=1)
    ).unwrap()
    sibling = lives.play(lives.flows.run_task(flow_id=flow.flow_id, task="t", run=log.for_ever))

    ended = _ended(lives, task)

    assert (ended.status, ended.result_json) == ("timed_out", None)
    assert lives.task(sibling.unwrap().task_id).status == "running"


# ---- the policy decides ---------------------------------------------------------------------------


def test_a_time_out_is_tried_again_as_the_policy_says(lives: Lives, log: Log) -> None:
    retry = Retry(max_attempts=3, initial=10, factor=2, jitter=0)

    ended = _ended(lives, _launch(lives, log.for_ever, timeout=5, retry=retry))

    assert (ended.status, ended.attempt) == ("timed_out", 3)
    assert [round(at) for at in log.began] == [0, 15, 40]
    assert [round(at) for at in log.stopped] == [5, 20, 45]
    assert lives.told(ended.flow_id, "task.retry") == ["task.retry_scheduled"] * 2


@pytest.mark.parametrize(
    ("retry_on", "attempts"),
    [(None, 3), ("timed_out", 3), (["transient", "timed_out"], 3), ("transient", 1), ([], 1)],
    ids=str,
)
@pytest.mark.parametrize("deadline", ["timeout", "idle_timeout"])
def test_what_is_worth_another_attempt_holds_for_time_outs_too(
    lives: Lives, log: Log, retry_on: Any, attempts: int, deadline: str
) -> None:
    retry = Retry(max_attempts=3, retry_on=retry_on)

    ended = _ended(lives, _launch(lives, log.for_ever, retry=retry, **{deadline: 5}))

    assert (ended.status, len(log.began)) == ("timed_out", attempts)


def test_the_task_s_own_deadlines_stand_unless_the_child_has_others(lives: Lives, log: Log) -> None:
    lives.registry.task(name="slow", timeout=5, idle_timeout=4, queue_timeout=3)(log.for_ever)

    own = _ended(lives, _launch(lives, "slow"))
    other = _ended(lives, _launch(lives, "slow", idle_timeout=50, timeout=7, queue_timeout=9))

    assert (own.timeout, own.idle_timeout, own.queue_timeout) == (5, 4, 3)
    assert (other.timeout, other.idle_timeout, other.queue_timeout) == (7, 50, 9)
    assert [round(stop - start) for start, stop in zip(log.began, log.stopped, strict=True)] == [
        4,
        7,
    ]


def test_a_controller_is_told_of_the_time_out(lives: Lives, log: Log) -> None:
    raised: list[ChildTimedOut] = []

    @lives.registry.controller("patient")
    async def patient(flow: FlowContext) -> None:
        try:
            await flow.run(log.for_ever, timeout=5)
        except ChildTimedOut as error:
            raised.append(error)
            raise

    flow = lives.play(make(lives.flows, controller_id="patient"))
    ended = lives.result(flow.flow_id)

    assert ended.status == "failed"
    assert str(raised[0]) == "child 'for_ever' timed out: stopped at its deadline"


def test_a_nested_flow_past_its_deadline_is_cancelled_before_its_child_times_out(
    lives: Lives, log: Log
) -> None:
    @lives.registry.controller("inner")
    async def inner(flow: FlowContext) -> None:
        await flow.run(log.for_ever)

    task = _launch(lives, Nested("inner"), timeout=5)
    ended = _ended(lives, task)

    assert (ended.status, ended.child_flow_id is not None) == ("timed_out", True)
    below = lives.flow(str(ended.child_flow_id))
    assert below.status == "cancelled"
    assert below.ended_at is not None and ended.ended_at is not None
    assert below.ended_at <= ended.ended_at
    assert 4.9 <= log.stopped[0] <= 5


# ---- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", ["timeout", "idle_timeout"])
def test_the_next_attempt_after_a_crash_has_its_own_time(
    lives: Lives, log: Log, deadline: str
) -> None:
    policy: dict[str, Any] = {deadline: 5}
    lives.registry.task(name="slow", **policy)(log.for_ever)
    task = _launch(lives, "slow")
    lives.pass_time(3)

    lives.restart("kill")
    assert lives.flows
    ended = _ended(lives, task)

    assert (ended.status, ended.attempt) == ("timed_out", 2)
    assert [round(at, 1) for at in log.began] == [0, 3.5]
    assert [round(at, 1) for at in log.stopped] == [8.5]


def _crowded(lives: Lives) -> Flow:
    """A flow whose one place is taken for an hour."""

    @lives.registry.task
    async def hold(_: TaskContext, seconds: float) -> None:
        await asyncio.sleep(seconds)

    lives.limits = Limits(running_children=1)
    flow = lives.play(make(lives.flows))
    lives.play(
        lives.flows.run_task(flow_id=flow.flow_id, task="t", run="hold", input_json=3600)
    ).unwrap()
    return flow


@pytest.mark.parametrize("how", ["not at all", "kill", "close"])
def test_a_child_that_is_never_started_times_out_in_the_queue(
    lives: Lives, log: Log, how: str
) -> None:
    lives.registry.task(name="slow", retry=Retry(max_attempts=5))(log.for_ever)
    flow = _crowded(lives)
    task = lives.play(
        lives.flows.run_task(flow_id=flow.flow_id, task="t", run="slow", queue_timeout=10)
    ).unwrap()
    lives.pass_time(6)
    assert lives.task(task.task_id).status == "queued"
    if how != "not at all":
        lives.restart(how)
        assert lives.flows

    ended = _ended(lives, task)

    assert _told(ended) == ("timed_out", "timed_out", "queue", "not started within 10 s")
    assert (ended.attempt, ended.started_at, log.began) == (0, None, [])
    assert ended.ended_at is not None
    assert 10_000 <= ended.ended_at - ended.created_at <= 10_100


def test_a_queue_deadline_that_passed_while_no_process_lived_is_kept(
    lives: Lives, log: Log
) -> None:
    lives.registry.task(name="slow")(log.for_ever)
    flow = _crowded(lives)
    task = lives.play(
        lives.flows.run_task(flow_id=flow.flow_id, task="t", run="slow", queue_timeout=0.2)
    ).unwrap()

    lives.restart("kill")
    lives.pass_time(0.1)

    ended = lives.task(task.task_id)
    assert _told(ended)[2] == "queue"
    assert log.began == []


def test_a_child_that_was_started_once_has_no_queue_deadline_any_more(lives: Lives) -> None:
    ran: Counter[int] = Counter()

    async def moody(context: TaskContext, _: Any) -> str:
        ran[context.attempt] += 1
        if context.attempt == 1:
            raise ConnectionError
        return "done"

    retry = Retry(max_attempts=2, initial=60, max_delay=60, jitter=0)

    ended = _ended(lives, _launch(lives, moody, queue_timeout=10, retry=retry))

    assert (ended.status, ran) == ("succeeded", {1: 1, 2: 1})


def test_a_queue_deadline_frees_no_place_and_takes_none(lives: Lives) -> None:
    order: list[str | None] = []

    async def note(context: TaskContext, _: Any) -> None:
        order.append(context.run_id)

    flow = _crowded(lives)

    async def add_three() -> None:
        for name, queue_timeout in (("first", 10.0), ("second", None), ("third", None)):
            await lives.flows.run_task(
                flow_id=flow.flow_id, task="t", run=note, run_id=name, queue_timeout=queue_timeout
            )

    lives.play(add_three())
    lives.pass_time(3700)

    assert order == ["second", "third"]
    assert lives.child(flow.flow_id, "first").status == "timed_out"
