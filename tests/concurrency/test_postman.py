"""The postman: what is due goes out, once if the channel is well, and again and again, to a limit, if it is not."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from flowstead import (
    CommitFailed,
    Fatal,
    FlowContext,
    Limits,
    Registry,
    Retry,
    Runtime,
    RuntimeClosed,
    SessionFlows,
    SnapshotUnreadable,
    StoreError,
    Transient,
    Update,
)
from flowstead.model.update import StoredUpdate
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock, RecordingNotifier
from tests.faulty_store import (
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    new_flow,
    running,
    settle,
    soon,
)

ALWAYS = Retry(max_attempts=100, initial=1.0, factor=1.0, jitter=0.0)
"""One attempt a second."""
DAY_MS = 24 * 3600 * 1000


class Slow:
    """A channel that answers each send when it is told to, by its place among those that wait."""

    def __init__(self) -> None:
        self.began: list[Update] = []
        self.given_up: list[Update] = []
        self._open: deque[asyncio.Future[None]] = deque()

    async def send(self, update: Update) -> None:
        self.began.append(update)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open.append(answer)
        try:
            await answer
        except asyncio.CancelledError:
            self._open.remove(answer)
            self.given_up.append(update)
            raise

    @property
    def waiting(self) -> int:
        return len(self._open)

    async def answer(self, *, place: int = 0, error: BaseException | None = None) -> None:
        answer = self._open[place]
        del self._open[place]
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)
        await settle()


class ByGoal:
    """A channel that sends each flow's updates another way, by the flow's goal."""

    def __init__(self, **ways: Any) -> None:
        self._ways = ways

    async def send(self, update: Update) -> None:
        await self._ways[update.goal].send(update)


async def end_a_flow(flows: SessionFlows, goal: str = "test", **given: Any) -> str:
    """A flow that has something to tell of: its end."""
    flow = await soon(flows.create_managed(controller_id="nobody", goal=goal, **given))
    assert (await soon(flows.finish(flow_id=flow.flow_id, expected_revision=0))).applied
    await settle()
    return flow.flow_id


async def move(flows: SessionFlows, flow_id: str, step: str) -> None:
    """Change the step of a flow, which those hear of who want to know of changes."""
    flow = await soon(flows.get(flow_id))
    assert flow is not None
    changed = flows.update(flow_id=flow_id, expected_revision=flow.revision, current_step=step)
    assert (await soon(changed)).applied
    await settle()


async def finish(flows: SessionFlows, flow_id: str) -> None:
    flow = await soon(flows.get(flow_id))
    assert flow is not None
    assert (await soon(flows.finish(flow_id=flow_id, expected_revision=flow.revision))).applied
    await settle()


async def pass_time(clock: ManualClock, seconds: float, *, step: float = 1.0) -> None:
    """Let time pass in steps, and let happen what comes of each."""
    for _ in range(round(seconds / step)):
        clock.advance(step)
        await settle()


async def the_update(flows: SessionFlows) -> Update:
    [update] = await soon(flows.list_updates())
    return update


def told(updates: Sequence[Update]) -> list[str]:
    return [update.text for update in updates]


def says(*texts: str) -> Registry:
    """A controller that says so much, one after another, and is done."""
    registry = Registry()

    @registry.controller("says")
    async def controller(flow: FlowContext) -> None:
        for text in texts:
            await flow.notify(text)

    return registry


# ---- again ----------------------------------------------------------------------------------------


async def test_what_fails_is_tried_again_at_growing_intervals_under_one_key_until_it_is_given_up(
    clock: ManualClock,
):
    channel = RecordingNotifier()
    channel.go_down()
    policy = Retry(max_attempts=5, initial=2.0, factor=3.0, max_delay=10.0, jitter=0.0)
    async with running(clock=clock, notifier=channel, deliveries=policy) as runtime:
        flows = flows_of(runtime)
        await end_a_flow(flows)
        first = await the_update(flows)

        for attempt, wait in enumerate((2.0, 6.0, 10.0, 10.0), start=1):
            update = await the_update(flows)
            assert (update.status, update.attempt) == ("pending", attempt)
            assert update.due_at == clock.now() + round(wait * 1000)
            assert update.failure == "ConnectionError: The channel is down."
            clock.advance(wait - 0.001)
            await settle()
            assert channel.attempts == attempt
            clock.advance(0.001)
            await settle()
            assert channel.attempts == attempt + 1
        given_up = await the_update(flows)
        await pass_time(clock, 7200, step=600)

        assert (given_up.status, given_up.attempt, given_up.due_at) == ("delivery_failed", 5, None)
        assert given_up.idempotency_key == first.idempotency_key
        assert channel.attempts == 5
        assert runtime.statistics().deliveries_failed == 1
        assert runtime.statistics().delivered == 0


async def test_a_channel_that_is_down_for_three_days_loses_nothing_unless_the_host_says_otherwise(
    clock: ManualClock,
):
    channel = RecordingNotifier()
    channel.go_down()
    async with running(clock=clock, notifier=channel) as runtime:
        await end_a_flow(flows_of(runtime))
        await pass_time(clock, 68 * 3600, step=600)
        assert channel.attempts > 60
        channel.come_up()
        await pass_time(clock, 3600, step=600)

        assert told(channel.updates) == ["test is done."]


async def test_every_attempt_carries_the_same_key_and_its_own_number(clock: ManualClock):
    channel = Slow()
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await end_a_flow(flows_of(runtime))
        for _ in range(3):
            await channel.answer(error=ConnectionError("down"))
            await pass_time(clock, 1)
        await channel.answer()

        assert [update.attempt for update in channel.began] == [1, 2, 3, 4]
        assert len({update.idempotency_key for update in channel.began}) == 1
        delivered = await the_update(flows_of(runtime))
        assert (delivered.status, delivered.attempt) == ("delivered", 4)
        assert (delivered.delivered_at, delivered.due_at) == (clock.now(), None)
        assert delivered.failure is None
        assert runtime.statistics().delivered == 1


class RateLimited(Exception):
    """As the libraries of channels have it."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("slow down")
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (Transient("busy", retry_after=45.0), 45.0),
        (Transient("busy", retry_after=0.5), 4.0),
        (Transient("busy", retry_after=None), 4.0),
        (Transient("busy", retry_after=0.0), 4.0),
        (RateLimited(45.0), 45.0),
    ],
)
async def test_a_channel_that_names_a_time_is_left_alone_until_then_and_no_shorter_than_usual(
    clock: ManualClock, error: Exception, waits: float
):
    channel = RecordingNotifier()
    channel.fail_next(error=error)
    policy = Retry(max_attempts=3, initial=4.0, jitter=0.0)
    async with running(clock=clock, notifier=channel, deliveries=policy) as runtime:
        await end_a_flow(flows_of(runtime))

        update = await the_update(flows_of(runtime))
        assert update.due_at == clock.now() + round(waits * 1000)
        await pass_time(clock, waits)
        assert told(channel.updates) == ["test is done."]


class Unasked(Transient):
    """Says of itself that it may work later, and never when."""

    def __init__(self) -> None:
        Exception.__init__(self, "later")


class Evasive(Exception):
    @property
    def retry_after(self) -> float:
        raise ZeroDivisionError("no time")


@pytest.mark.parametrize(
    "error",
    [
        *(
            Transient("busy", retry_after=asked)  # type: ignore[arg-type]
            for asked in (-5.0, float("nan"), float("inf"), -float("inf"), 1e300, 1e10)
        ),
        *(
            Transient("busy", retry_after=asked)  # type: ignore[arg-type]
            for asked in (10**400, -(10**400), True, "30", [], Decimal("sNaN"), timedelta(hours=1))
        ),
        Unasked(),
        Evasive(),
    ],
    ids=lambda error: f"{type(error).__name__} {vars(error).get('retry_after')!r:.12}",
)
async def test_a_time_that_makes_no_sense_is_kept_within_a_day(
    clock: ManualClock, error: Exception
):
    channel = RecordingNotifier()
    channel.fail_next(error=error)
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await end_a_flow(flows_of(runtime))

        update = await the_update(flows_of(runtime))
        assert (update.attempt, update.status) == (1, "pending")
        assert update.due_at is not None
        assert clock.now() + 1000 <= update.due_at <= clock.now() + DAY_MS
        await pass_time(clock, 24 * 3600, step=3600)
        assert told(channel.updates) == ["test is done."]


async def test_fatal_is_given_up_at_once(clock: ManualClock):
    channel = RecordingNotifier()
    channel.fail_next(error=Fatal("no such user", retry_after=5))
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await end_a_flow(flows_of(runtime))

        update = await the_update(flows_of(runtime))
        await pass_time(clock, 10)

        assert (update.status, update.attempt) == ("delivery_failed", 1)
        assert "no such user" in (update.failure or "")
        assert channel.attempts == 1


async def test_a_jump_of_the_clock_is_noticed_within_a_minute(clock: ManualClock):
    channel = RecordingNotifier()
    channel.fail_next(error=Transient("busy", retry_after=6 * 3600))
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await end_a_flow(flows_of(runtime))
        clock.advance(0)

        clock.set(clock.now() + 6 * 3600 * 1000 + 1)
        await settle()
        assert channel.attempts == 1
        await pass_time(clock, 60)

        assert told(channel.updates) == ["test is done."]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("back", [2.0, 3600.0, 24 * 3600.0, 400 * 24 * 3600.0])
async def test_a_clock_that_is_put_back_makes_nobody_wait_longer_for_the_next_attempt(
    clock: ManualClock, back: float, restart: bool
):
    channel, store = RecordingNotifier(), FaultyStore()
    policy = Retry(max_attempts=9, initial=120.0, factor=1.0, max_delay=120.0, jitter=0.0)
    channel.go_down()
    async with running(store, clock=clock, notifier=channel, deliveries=policy) as runtime:
        await end_a_flow(flows_of(runtime))
        assert channel.attempts == 1
        if not restart:
            clock.set(clock.now() - round(back * 1000))
            await pass_time(clock, 115)
            assert channel.attempts == 1
            await pass_time(clock, 65)
            assert channel.attempts == 2

    if restart:
        clock.set(clock.now() - round(back * 1000))
    channel.come_up()
    async with running(store, clock=clock, notifier=channel, deliveries=policy) as runtime:
        await pass_time(clock, 180)

        assert told(channel.updates) == ["test is done."]
        update = await the_update(flows_of(runtime))
        assert (update.status, update.attempt) == ("delivered", 2 if restart else 3)


async def test_what_is_on_its_way_while_the_clock_is_put_back_is_not_sent_twice(clock: ManualClock):
    slow, channel = Slow(), RecordingNotifier()
    ways = ByGoal(slow=slow, plain=channel)
    limits = Limits(delivery_seconds=1000)
    async with running(
        clock=clock, notifier=ways, deliveries=ALWAYS, limits=limits, registry=says("a", "b")
    ) as runtime:
        made = flows_of(runtime).create_managed(controller_id="says", goal="slow")
        flow_id = (await soon(made)).flow_id
        await settle()
        assert (slow.waiting, told(slow.began)) == (1, ["a"])

        clock.set(clock.now() - DAY_MS)
        await end_a_flow(flows_of(runtime), "plain")
        while slow.waiting:
            await slow.answer()
            await pass_time(clock, 5)

        assert told(slow.began) == ["a", "b", "slow is done."]
        assert told(channel.updates) == ["plain is done."]
        rows = await soon(flows_of(runtime).list_updates(flow_id))
        assert {update.status for update in rows} == {"delivered"}


async def test_a_file_whose_next_attempt_is_years_off_is_seen_to_by_the_next_process(
    clock: ManualClock,
):
    channel, store = RecordingNotifier(), FaultyStore()
    async with running(store, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        channel.go_down()
        flow_id = await end_a_flow(flows_of(runtime))
        clock.set(clock.now() + 400 * DAY_MS)
        await pass_time(clock, 61)
        assert channel.attempts > 1

    clock.set(clock.now() - 399 * DAY_MS)
    channel.come_up()
    async with running(store, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await settle()

        [update] = await soon(flows_of(runtime).list_updates(flow_id))
        assert update.status == "delivered"


# ---- notifiers that misbehave ---------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError("no words")


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError("of its own accord"),
        SystemExit(3),
        StopAsyncIteration(),
        TimeoutError(),
        Exception(),
        ValueError("several\nlines and " + "more " * 500),
        GeneratorExit(),
        BaseExceptionGroup("several", [SystemExit(1)]),
        ValueError("nothing \x00 to print"),
        ValueError("half a letter \ud800"),
        Unspeakable(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_a_notifier_raises_is_an_attempt_that_failed_and_nothing_more(
    clock: ManualClock, error: BaseException
):
    channel, healthy = Slow(), RecordingNotifier()
    ways = ByGoal(odd=channel, plain=healthy)
    async with running(clock=clock, notifier=ways, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        flow_id = await end_a_flow(flows, "odd")
        assert channel.waiting == 1

        await channel.answer(error=error)
        [update] = await soon(flows.list_updates(flow_id))
        assert (update.status, update.attempt) == ("pending", 1)
        assert update.due_at == clock.now() + 1000
        assert update.failure
        assert len(update.failure) <= 200
        assert update.failure.isprintable()
        await end_a_flow(flows, "plain")
        await pass_time(clock, 1)
        await channel.answer()

        assert told(healthy.updates) == ["plain is done."]
        [update] = await soon(flows.list_updates(flow_id))
        assert (update.status, update.attempt) == ("delivered", 2)


@pytest.mark.parametrize("garbage", [None, False, 0, "no", object(), NotImplementedError()])
async def test_whatever_a_notifier_returns_means_delivered(clock: ManualClock, garbage: object):
    class Odd:
        async def send(self, update: Update) -> Any:
            return garbage

    async with running(clock=clock, notifier=Odd(), deliveries=ALWAYS) as runtime:
        await end_a_flow(flows_of(runtime))

        assert (await the_update(flows_of(runtime))).status == "delivered"


async def test_a_notifier_that_hangs_is_cut_off_and_asked_again(clock: ManualClock):
    channel = Slow()
    limits = Limits(delivery_seconds=7)
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS, limits=limits) as runtime:
        await end_a_flow(flows_of(runtime))
        await pass_time(clock, 6)
        assert not channel.given_up

        await pass_time(clock, 1)
        assert len(channel.given_up) == 1
        update = await the_update(flows_of(runtime))
        assert (update.status, update.attempt) == ("pending", 1)
        assert "7 s" in (update.failure or "")
        await pass_time(clock, 1)
        await channel.answer()

        assert [each.attempt for each in channel.began] == [1, 2]
        assert (await the_update(flows_of(runtime))).status == "delivered"


async def test_a_notifier_that_does_not_hear_that_it_is_cut_off_keeps_nobody_waiting(
    clock: ManualClock,
):
    let_go = asyncio.Event()

    class Deaf:
        async def send(self, update: Update) -> None:
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

    channel = RecordingNotifier()
    ways, limits = ByGoal(deaf=Deaf(), plain=channel), Limits(delivery_seconds=5, deliveries=1)
    policy = Retry(max_attempts=2, initial=1.0, jitter=0.0)
    async with running(clock=clock, notifier=ways, deliveries=policy, limits=limits) as runtime:
        flows = flows_of(runtime)
        flow_id = await end_a_flow(flows, "deaf")
        await end_a_flow(flows, "plain")
        assert not channel.updates

        await pass_time(clock, 12)
        [update] = await soon(flows.list_updates(flow_id))
        let_go.set()
        await settle()

        assert told(channel.updates) == ["plain is done."]
        assert (update.status, update.attempt) == ("delivery_failed", 2)


async def test_an_update_that_cannot_even_be_handed_over_is_given_up_like_any_other(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    channel, read = RecordingNotifier(), codec.read_update

    def unreadable(doc: bytes) -> Update:
        if b'"goal":"odd"' in doc:
            raise SnapshotUnreadable("an update", "its data is nested too deeply")
        return read(doc)

    policy = Retry(max_attempts=3, initial=1.0, factor=1.0, jitter=0.0)
    async with running(clock=clock, notifier=channel, deliveries=policy) as runtime:
        with monkeypatch.context() as patched:
            patched.setattr(codec, "read_update", unreadable)
            await end_a_flow(flows_of(runtime), "odd")
            await end_a_flow(flows_of(runtime), "plain")
            await pass_time(clock, 5)

        odd, plain = await soon(flows_of(runtime).list_updates())
        assert (odd.status, odd.attempt) == ("delivery_failed", 3)
        assert plain.status == "delivered"


# ---- several at once ------------------------------------------------------------------------------


async def test_no_more_are_on_their_way_at_once_than_the_limit_allows(clock: ManualClock):
    channel = Slow()
    async with running(clock=clock, notifier=channel, limits=Limits(deliveries=3)) as runtime:
        flows = flows_of(runtime)
        for _ in range(8):
            await end_a_flow(flows)

        most, seen = 0, 0
        while channel.waiting:
            most, seen = max(most, channel.waiting), seen + 1
            await channel.answer(place=seen % channel.waiting)

        assert (most, seen) == (3, 8)
        assert len({update.flow_id for update in channel.began}) == 8
        assert {u.status for u in await soon(flows.list_updates())} == {"delivered"}


async def test_a_slow_one_holds_up_no_other_flow(clock: ManualClock):
    slow, channel = Slow(), RecordingNotifier()
    async with running(clock=clock, notifier=ByGoal(slow=slow, plain=channel)) as runtime:
        flows = flows_of(runtime)
        await end_a_flow(flows, "slow")

        for _ in range(40):
            await end_a_flow(flows, "plain")

        assert slow.waiting == 1
        assert len(channel.updates) == 40
        await slow.answer()
        assert runtime.statistics().delivered == 41


async def test_a_slow_one_holds_up_no_other_flow_s_next_attempt(clock: ManualClock):
    slow, channel = Slow(), RecordingNotifier()
    ways = ByGoal(slow=slow, plain=channel)
    async with running(clock=clock, notifier=ways, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        await end_a_flow(flows, "slow")
        channel.fail_next()
        await end_a_flow(flows, "plain")
        assert (slow.waiting, channel.attempts) == (1, 1)

        await pass_time(clock, 5)

        assert slow.waiting == 1
        assert told(channel.updates) == ["plain is done."]


async def test_a_flow_with_much_to_tell_over_a_slow_channel_holds_up_no_other_flow(
    clock: ManualClock,
):
    slow, channel = Slow(), RecordingNotifier()
    registry = says(*(f"number {n}" for n in range(300)))
    ways = ByGoal(test=slow, plain=channel)
    async with running(clock=clock, notifier=ways, registry=registry) as runtime:
        flows = flows_of(runtime)
        await new_flow(flows, "says")
        await settle()
        assert slow.waiting == 1
        clock.advance(0.001)

        await end_a_flow(flows, "plain")

        assert told(channel.updates) == ["plain is done."]


async def test_of_one_flow_one_is_on_its_way_at_a_time_and_the_oldest_is_first(clock: ManualClock):
    channel = Slow()
    async with running(clock=clock, notifier=channel, registry=says("a", "b", "c")) as runtime:
        await new_flow(flows_of(runtime), "says")
        await settle()

        for _ in range(4):
            assert channel.waiting == 1
            await channel.answer()

        assert told(channel.began) == ["a", "b", "c", "test is done."]
        assert channel.waiting == 0


class CountingReads(FaultyStore):
    """A store that counts the updates it hands out as due."""

    rows = 0

    async def list_updates_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        page = await super().list_updates_due(until=until, limit=limit)
        self.rows += len(page)
        return page


@pytest.mark.parametrize("flows_of_it", [1, 3])
async def test_a_backlog_of_few_flows_is_not_read_again_for_each_delivery(
    clock: ManualClock, flows_of_it: int
):
    store, channel = CountingReads(), RecordingNotifier()
    texts = [f"number {n}" for n in range(600 // flows_of_it)]
    channel.go_down()
    given: dict[str, Any] = {"clock": clock, "notifier": channel, "deliveries": ALWAYS}
    async with running(store, registry=says(*texts), **given) as runtime:
        for _ in range(flows_of_it):
            flow_id = await new_flow(flows_of(runtime), "says", notify_policy="state_changes")
            await soon(flows_of(runtime).result(flow_id))
        await settle()

    channel.come_up()
    clock.advance(1)
    store.rows = 0
    async with running(store, **given) as runtime:
        while runtime.statistics().delivered < len(texts) * flows_of_it + flows_of_it:
            await settle()

        assert len(channel.updates) == len(texts) * flows_of_it + flows_of_it
        assert store.rows < 20 * len(channel.updates)
        if flows_of_it == 1:
            assert told(channel.updates) == [*texts, "test is done."]


async def test_what_is_tried_again_holds_up_nobody_not_even_the_end_of_its_flow(
    clock: ManualClock,
):
    channel = RecordingNotifier()
    channel.fail_next()
    async with running(
        clock=clock, notifier=channel, registry=says("a", "b"), deliveries=ALWAYS
    ) as runtime:
        await new_flow(flows_of(runtime), "says")
        await settle()
        await pass_time(clock, 5)

        assert told(channel.updates) == ["b", "test is done.", "a"]


# ---- progress -------------------------------------------------------------------------------------


async def test_ten_changes_while_the_channel_is_down_are_one_message_with_the_newest(
    clock: ManualClock,
):
    channel = RecordingNotifier()
    channel.go_down()
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, notify_policy="state_changes")
        for number in range(10):
            await move(flows, flow_id, f"step {number}")
        channel.come_up()
        await pass_time(clock, 3)

        assert told(channel.updates) == ["test is running, at step 9."]
        [update] = await soon(flows.list_updates(flow_id))
        assert (update.status, update.current_step, update.revision) == ("delivered", "step 9", 10)


async def test_a_channel_that_is_down_for_three_days_loses_nothing_unless_the_host_wants_it_so(
    clock: ManualClock,
):
    channel = RecordingNotifier()
    channel.go_down()
    async with running(clock=clock, notifier=channel) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await finish(flows, flow_id)
        for _ in range(3 * 24):
            clock.advance(3600)
            await settle()

        channel.come_up()
        clock.advance(3600)
        await settle()

        assert told(channel.updates) == ["test is done."]
        [update] = await soon(flows.list_updates(flow_id))
        assert update.status == "delivered"


async def test_progress_that_has_not_gone_out_is_superseded_by_the_end(clock: ManualClock):
    channel = RecordingNotifier()
    channel.go_down()
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, notify_policy="state_changes")
        await move(flows, flow_id, "half way")
        await finish(flows, flow_id)
        channel.come_up()
        await pass_time(clock, 10)

        assert told(channel.updates) == ["test is done."]
        progress, done = await soon(flows.list_updates(flow_id))
        assert (progress.kind, progress.status, progress.due_at) == ("progress", "superseded", None)
        assert (done.kind, done.status) == ("done", "delivered")


@pytest.mark.parametrize("error", [None, ConnectionError("down"), Fatal("no")], ids=str)
async def test_progress_replaced_while_it_is_on_its_way_goes_out_again_with_the_newest(
    clock: ManualClock, error: Exception | None
):
    channel = Slow()
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, notify_policy="state_changes")
        await move(flows, flow_id, "old")
        await move(flows, flow_id, "newer")
        await move(flows, flow_id, "newest")
        assert channel.waiting == 1

        await channel.answer(error=error)
        assert channel.waiting == 1
        await channel.answer()
        await pass_time(clock, 3)

        assert [update.current_step for update in channel.began] == ["old", "newest"]
        assert [update.attempt for update in channel.began] == [1, 1]
        assert len({update.idempotency_key for update in channel.began}) == 2
        [update] = await soon(flows.list_updates(flow_id))
        assert (update.status, update.current_step) == ("delivered", "newest")


async def test_progress_is_superseded_when_a_runtime_without_a_notifier_ends_the_flow(
    clock: ManualClock, db: Path
):
    channel = RecordingNotifier()
    channel.go_down()
    async with running(db, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flow_id = await new_flow(flows_of(runtime), notify_policy="state_changes")
        await move(flows_of(runtime), flow_id, "half way")

    async with running(db, clock=clock) as silent:
        await finish(flows_of(silent), flow_id)
    channel.come_up()
    async with running(db, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await pass_time(clock, 10)
        [progress] = await soon(flows_of(runtime).list_updates(flow_id))

    assert progress.status == "superseded"
    assert channel.updates == []


@pytest.mark.parametrize("error", [None, ConnectionError("down"), Fatal("no")], ids=str)
async def test_progress_on_its_way_when_the_flow_ends_never_goes_out_after_the_end(
    clock: ManualClock, error: Exception | None
):
    channel = Slow()
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, notify_policy="state_changes")
        await move(flows, flow_id, "half way")
        await finish(flows, flow_id)
        assert channel.waiting == 1

        await channel.answer(error=error)
        assert channel.waiting == 1
        await channel.answer()
        await pass_time(clock, 5)

        assert [update.kind for update in channel.began] == ["progress", "done"]
        progress, done = await soon(flows.list_updates(flow_id))
        assert (progress.status, done.status) == ("superseded", "delivered")


async def test_progress_that_is_given_up_after_a_newer_one_took_its_place_is_not_a_failure(
    clock: ManualClock,
):
    channel = Slow()
    async with running(clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, notify_policy="state_changes")
        await move(flows, flow_id, "old")
        await move(flows, flow_id, "new")

        await channel.answer(error=Fatal("no"))
        await channel.answer()

        assert [u.status for u in await soon(flows.list_updates(flow_id))] == ["delivered"]
        assert runtime.statistics().deliveries_failed == 0
        kinds = [str(event.type) for event in await soon(flows.history(flow_id))]
        assert "update.failed" not in kinds


# ---- our own disk ---------------------------------------------------------------------------------


class Refuses(FaultyStore):
    """A store that fails commits by what is in them."""

    refuses: Callable[[FlowWrite], bool] | None = None
    refused = 0

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        if self.refuses is not None and any(map(self.refuses, writes)):
            self.refused += 1
            raise NOT_WRITTEN
        return await super().commit(writes)


def records_a_delivery(write: FlowWrite) -> bool:
    return any(not row.fresh for row in write.updates)


@pytest.mark.parametrize("fault", [NOT_WRITTEN, UNKNOWN], ids=["not written", "unknown"])
@pytest.mark.parametrize("written", [False, True])
async def test_a_delivery_that_could_not_be_recorded_is_recorded_later_and_not_sent_again(
    clock: ManualClock, fault: StoreError, written: bool
):
    store, channel = FaultyStore(), Slow()
    async with running(store, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await end_a_flow(flows_of(runtime))
        store.fail_commits(fault, times=3, written=written)

        await channel.answer()
        await pass_time(clock, 10)

        assert len(channel.began) == 1
        assert (await the_update(flows_of(runtime))).status == "delivered"
        assert runtime.statistics().delivered == 1
        assert not store._commit_faults, "vacuous: nothing failed"


async def test_a_delivery_that_could_not_be_recorded_before_the_end_is_sent_again_under_its_key(
    clock: ManualClock,
):
    store, first, second = Refuses(), RecordingNotifier(), RecordingNotifier()
    store.refuses = records_a_delivery
    async with running(store, clock=clock, notifier=first, deliveries=ALWAYS) as runtime:
        await end_a_flow(flows_of(runtime))
        await pass_time(clock, 3)
        assert store.refused >= 3
    store.refuses = None
    async with running(store, clock=clock, notifier=second, deliveries=ALWAYS) as runtime:
        await settle()

        assert first.attempts == second.attempts == 1
        assert first.updates == second.updates
        assert (await the_update(flows_of(runtime))).status == "delivered"


@pytest.mark.parametrize("verb", ["list_updates_due", "list_digests_due", "next_update_due"])
async def test_a_store_that_cannot_say_what_is_due_is_asked_again(clock: ManualClock, verb: str):
    store, channel = FaultyStore(), RecordingNotifier()
    async with running(store, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await settle()
        channel.fail_next()
        store.fail_reads(verb, NOT_WRITTEN, times=2)
        await end_a_flow(flows_of(runtime))
        await pass_time(clock, 5)

        assert told(channel.updates) == ["test is done."]
        assert not store._read_faults[verb], "vacuous: nothing failed"


async def test_the_history_tells_of_what_was_given_up_though_the_disk_failed_at_that_moment(
    clock: ManualClock,
):
    store, channel = Refuses(), RecordingNotifier()
    channel.fail_next(error=Fatal("no"))
    store.refuses = lambda write: any('"update.failed"' in row.doc for row in write.events)
    async with running(store, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flow_id = await end_a_flow(flows_of(runtime))
        assert store.refused
        store.refuses = None
        await pass_time(clock, 5)

        assert (await the_update(flows_of(runtime))).status == "delivery_failed"
        kinds = [str(event.type) for event in await soon(flows_of(runtime).history(flow_id))]
        assert kinds.count("update.failed") == 1


# ---- closing --------------------------------------------------------------------------------------


async def close_while_sending(runtime: Runtime) -> None:
    await end_a_flow(flows_of(runtime))
    await soon(runtime.aclose())


async def test_closing_cuts_off_what_is_on_its_way_and_the_next_process_sends_it_again(
    clock: ManualClock,
):
    store, channel, later = FaultyStore(), Slow(), RecordingNotifier()
    async with running(store, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        await close_while_sending(runtime)
    assert len(channel.given_up) == 1

    async with running(store, clock=clock, notifier=later, deliveries=ALWAYS) as runtime:
        await settle()

        # An attempt that we cut off ourselves is none.
        assert [update.attempt for update in later.updates] == [1]
        assert later.updates == channel.began
        assert (await the_update(flows_of(runtime))).status == "delivered"


async def test_who_waits_for_delivery_waits_for_all_that_is_due_and_for_no_later_attempt(
    clock: ManualClock,
):
    store, channel = FaultyStore(), Slow()
    async with running(store, clock=clock, notifier=channel, deliveries=ALWAYS) as runtime:
        flows = flows_of(runtime)
        await soon(runtime.deliver())
        for goal in ("taken", "put off"):
            await end_a_flow(flows, goal)
        delivering = asyncio.create_task(runtime.deliver())
        await settle()
        await channel.answer()
        assert not delivering.done()

        await channel.answer(error=ConnectionError("down"))
        await soon(delivering)

        updates = await soon(flows.list_updates())
        assert {(u.goal, str(u.status), u.attempt) for u in updates} == {
            ("taken", "delivered", 1),
            ("put off", "pending", 1),
        }


async def test_who_does_not_wait_for_delivery_any_more_takes_nothing_back(clock: ManualClock):
    channel = Slow()
    async with running(FaultyStore(), clock=clock, notifier=channel) as runtime:
        await end_a_flow(flows_of(runtime))
        left, stays = (asyncio.create_task(runtime.deliver()) for _ in range(2))
        await settle()

        left.cancel()
        await settle()
        await channel.answer()
        await soon(stays)

        assert left.cancelled() and not channel.given_up
        assert (await the_update(flows_of(runtime))).status == "delivered"


async def test_who_waits_for_delivery_hears_of_the_closing(clock: ManualClock):
    channel = Slow()
    async with running(FaultyStore(), clock=clock, notifier=channel) as runtime:
        await end_a_flow(flows_of(runtime))
        delivering = asyncio.create_task(runtime.deliver())
        await settle()

        await soon(runtime.aclose())

        with pytest.raises(RuntimeClosed):
            await soon(delivering)


async def test_without_a_notifier_there_is_no_delivery_to_wait_for(clock: ManualClock):
    async with running(FaultyStore(), clock=clock) as runtime:
        await end_a_flow(flows_of(runtime))

        await soon(runtime.deliver())


async def test_an_answer_that_comes_while_closing_leaves_nobody_waiting(clock: ManualClock):
    store, channel = FaultyStore(), Slow()
    async with running(store, clock=clock, notifier=channel) as runtime:
        await end_a_flow(flows_of(runtime))
        store.hold()
        await channel.answer()
        await soon(store.wait_held())

        closing = asyncio.create_task(runtime.aclose())
        await settle()
        store.release()
        await soon(closing)

    async with running(store, clock=clock) as runtime:
        assert (await the_update(flows_of(runtime))).status == "delivered"


async def test_nothing_is_sent_any_more_once_closing_has_begun(clock: ManualClock):
    store, channel, later = FaultyStore(), Slow(), RecordingNotifier()
    async with running(store, clock=clock, notifier=channel) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        finishing = asyncio.create_task(flows.finish(flow_id=flow_id, expected_revision=0))
        await soon(store.wait_held())

        closing = asyncio.create_task(runtime.aclose())
        await settle()
        store.release()
        await soon(closing)

        assert (await finishing).applied
        assert not channel.began
    async with running(store, clock=clock, notifier=later):
        await settle()
        assert told(later.updates) == ["test is done."]


# ---- an owner that was overtaken ------------------------------------------------------------------


async def test_an_owner_that_was_overtaken_sends_nothing_neither_its_own_nor_the_new_owners(
    clock: ManualClock,
):
    store, old, new = MemoryStore(), RecordingNotifier(), Slow()
    async with running(store, clock=clock, notifier=old, deliveries=ALWAYS) as first:
        old.go_down()
        await end_a_flow(flows_of(first))
        assert old.attempts == 1
        old.come_up()

        taken = MemoryStore(store.tables)
        async with running(taken, clock=clock, notifier=new, takeover=True) as second:
            for _ in range(3):
                await end_a_flow(flows_of(second))
            await pass_time(clock, 20)

            assert old.attempts == 1
            assert new.waiting == 4
            with pytest.raises(RuntimeClosed):
                await soon(first.deliver())


async def test_a_delivery_is_cut_off_when_its_owner_finds_out_that_it_was_overtaken(
    clock: ManualClock,
):
    store, old, new = MemoryStore(), Slow(), RecordingNotifier()
    async with running(store, clock=clock, notifier=old) as first:
        await end_a_flow(flows_of(first))
        assert old.waiting == 1

        async with running(MemoryStore(store.tables), clock=clock, notifier=new, takeover=True):
            with pytest.raises(CommitFailed):
                await new_flow(flows_of(first))
            await settle()

            assert (old.waiting, len(old.given_up)) == (0, 1)
            assert told(new.updates) == ["test is done."]
