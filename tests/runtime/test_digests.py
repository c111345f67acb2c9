"""Digests: what was put by for an owner goes out as one message when his day ends, however the day went."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from flowstead import (
    DigestTime,
    Fatal,
    FlowContext,
    Limits,
    Registry,
    Retry,
    SessionFlows,
    Update,
    open_runtime,
)
from flowstead.model.update import StoredUpdate
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

HOUR = 3600.0
ALWAYS = Retry(max_attempts=100, initial=1.0, factor=1.0, jitter=0.0)


def puts_by(*, bucket: str = "digest") -> Registry:
    """A controller that puts by what its state says, item by item."""
    registry = Registry()

    @registry.controller("puts by")
    async def controller(flow: FlowContext) -> None:
        for item in flow.state_json:
            named, _, text = item.rpartition("/")
            await flow.later(text, {"of": text}, bucket=named or bucket)

    return registry


async def put_by(flows: SessionFlows, *items: str, wait: bool = True) -> str:
    """A flow that puts these by: `text`, or `bucket/text`."""
    flow_id = await new_flow(flows, "puts by", state_json=list(items))
    if wait:
        await soon(flows.result(flow_id))
        await settle()
    return flow_id


def at(clock: ManualClock, text: str, zone: str = "UTC") -> None:
    """Set the clock to what clocks of a zone show."""
    clock.set(instant(text, zone))


def instant(text: str, zone: str = "UTC") -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


async def pass_time(clock: ManualClock, seconds: float, *, step: float = HOUR / 4) -> None:
    for _ in range(round(seconds / step)):
        clock.advance(step)
        await settle()


def batched(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def digests(notifier: RecordingNotifier) -> list[Update]:
    return [update for update in notifier.updates if update.kind == "digest"]


def texts(update: Update) -> list[str]:
    return [item["text"] for item in update.items]


# ---- one message ----------------------------------------------------------------------------------


async def test_what_was_put_by_for_one_owner_and_bucket_is_one_message_at_the_digest_time(
    clock: ManualClock,
):
    notifier = RecordingNotifier()
    at(clock, "2027-01-15 08:00")
    async with running(clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        mine, other = flows_of(runtime, "mine"), flows_of(runtime, "other")
        first = await put_by(mine, "a", "bugs/b1")
        await pass_time(clock, HOUR)
        second = await put_by(mine, "b", "c", "bugs/b2")
        await put_by(other, "x")
        await pass_time(clock, 9 * HOUR - 60, step=60)
        assert not digests(notifier)

        await pass_time(clock, 60, step=60)

        told = {(u.owner_key, u.text.partition(":")[0]): u for u in digests(notifier)}
        assert len(digests(notifier)) == 3
        assert {key: texts(update) for key, update in told.items()} == {
            ("mine", "digest"): ["a", "b", "c"],
            ("mine", "bugs"): ["b1", "b2"],
            ("other", "digest"): ["x"],
        }
        assert all(update.bucket == name for (_, name), update in told.items())
        whole = told["mine", "digest"]
        assert [item["flowId"] for item in whole.items] == [first, second, second]
        assert [item["data"] for item in whole.items] == [{"of": text} for text in "abc"]
        assert clock.now() == instant("2027-01-15 18:00")
        assert len({u.idempotency_key for u in digests(notifier)}) == 3


async def test_what_went_into_a_digest_is_on_record_as_that_and_goes_into_no_other(
    clock: ManualClock,
):
    notifier = RecordingNotifier()
    async with running(clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await put_by(flows, "a", "b")
        await pass_time(clock, 24 * HOUR)
        await put_by(flows, "c")
        await pass_time(clock, 72 * HOUR)

        assert [texts(update) for update in digests(notifier)] == [["a", "b"], ["c"]]
        rows = await soon(flows.list_updates(flow_id))
        assert [(u.kind, u.status) for u in rows if not u.items and u.kind != "done"] == [
            ("digest", "digested")
        ] * 2
        assert [u.status for u in rows if u.items] == ["delivered"]
        assert not await soon(flows.list_updates(status="pending"))


async def test_a_digest_that_nothing_was_put_by_for_is_not_sent(clock: ManualClock):
    notifier = RecordingNotifier()
    async with running(clock=clock, registry=puts_by(), notifier=notifier):
        await pass_time(clock, 72 * HOUR, step=HOUR)

        assert notifier.attempts == 0


@pytest.mark.parametrize("count", [255, 256, 257, 700])
async def test_a_digest_of_many_items_is_as_few_messages_as_can_hold_them_in_order(
    clock: ManualClock, count: int
):
    notifier = RecordingNotifier()
    items = [f"{n:03}" for n in range(count)]
    async with running(clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        await put_by(flows_of(runtime, "a"), "first")
        await put_by(flows_of(runtime, "b"), *items)
        await put_by(flows_of(runtime, "c"), *(f"{b}/{n}" for b in "xy" for n in range(200)))
        await pass_time(clock, 12 * HOUR)

        told = {owner: [u for u in digests(notifier) if u.owner_key == owner] for owner in "abc"}
        assert [len(texts(update)) for update in told["a"]] == [1]
        assert [texts(update) for update in told["b"]] == batched(items, 256)
        assert [len(texts(update)) for update in told["c"]] == [200, 200]
        assert len({update.idempotency_key for update in told["b"]}) == len(told["b"])
        assert await soon(flows_of(runtime, "b").list_updates(status="pending")) == []


@pytest.mark.parametrize("most", [1, 2, 3, 100])
async def test_a_digest_has_no_more_items_than_the_limit(clock: ManualClock, most: int):
    notifier, limits = RecordingNotifier(), Limits(digest_items=most)
    async with running(
        clock=clock, registry=puts_by(), notifier=notifier, limits=limits
    ) as runtime:
        await put_by(flows_of(runtime), *"abcde")
        await pass_time(clock, 12 * HOUR)

        assert [texts(update) for update in digests(notifier)] == batched("abcde", most)


async def test_a_digest_is_no_longer_than_the_limit_but_for_one_item_that_is(clock: ManualClock):
    notifier, limits = RecordingNotifier(), Limits(digest_bytes=1000)
    items = ["a", "b", "c" * 2000, "d", "e" * 300, "f" * 300, "g"]
    async with running(
        clock=clock, registry=puts_by(), notifier=notifier, limits=limits
    ) as runtime:
        await put_by(flows_of(runtime), *items)
        await pass_time(clock, 12 * HOUR)

        told = [texts(update) for update in digests(notifier)]
        assert told == [["a", "b"], ["c" * 2000], ["d", "e" * 300], ["f" * 300, "g"]]


# ---- the day ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "ends"),
    [
        ("2027-03-27 12:00", "2027-03-28 03:00"),
        ("2027-10-30 12:00", "2027-10-31 02:30"),
        ("2027-06-01 02:30", "2027-06-02 02:30"),
    ],
    ids=["a time the clocks skip", "a time they show twice", "at the very instant"],
)
async def test_a_day_ends_once_also_on_the_days_on_which_clocks_are_set(
    clock: ManualClock, before: str, ends: str
):
    notifier, zone = RecordingNotifier(), "Europe/Berlin"
    at(clock, before, zone)
    day = DigestTime(at="02:30", timezone=zone)
    async with running(
        clock=clock, registry=puts_by(), notifier=notifier, digest_time=day
    ) as runtime:
        await put_by(flows_of(runtime), "a")
        while not digests(notifier):
            assert clock.now() <= instant(ends, zone), "the digest is late"
            await pass_time(clock, 60, step=60)
        arrived = clock.now()
        await pass_time(clock, 20 * HOUR, step=HOUR)

        assert instant(ends, zone) <= arrived <= instant(ends, zone) + 60_000
        assert [texts(update) for update in digests(notifier)] == [["a"]]


async def test_what_is_put_by_after_the_end_of_the_day_waits_for_the_next(clock: ManualClock):
    notifier = RecordingNotifier()
    at(clock, "2027-01-15 17:59")
    async with running(clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        flows = flows_of(runtime)
        await put_by(flows, "today")
        await pass_time(clock, 60, step=60)
        await put_by(flows, "tomorrow")
        await pass_time(clock, 23 * HOUR)
        assert [texts(update) for update in digests(notifier)] == [["today"]]
        await pass_time(clock, HOUR)

        assert [texts(update) for update in digests(notifier)] == [["today"], ["tomorrow"]]


async def test_a_straggler_that_reaches_the_disk_after_the_digest_is_a_digest_of_its_own(
    clock: ManualClock,
):
    store, notifier, go = FaultyStore(), RecordingNotifier(), asyncio.Event()
    registry = puts_by()

    @registry.controller("late")
    async def late(flow: FlowContext) -> None:
        await go.wait()
        await flow.later("late")
        await flow.sleep("for a while", 3600)

    at(clock, "2027-01-15 17:59")
    async with running(store, clock=clock, registry=registry, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        await put_by(flows, "in time")
        flow_id = await new_flow(flows, "late")
        await settle()
        flow = await soon(flows.get(flow_id))
        assert flow is not None
        store.hold()
        change = flows.update(flow_id=flow_id, expected_revision=flow.revision, current_step="x")
        changing = asyncio.create_task(change)
        await soon(store.wait_held())
        # Put by before the day ends, behind a change that the disk has not answered yet.
        go.set()
        await settle()
        clock.advance(61)
        await settle()
        store.release()
        assert (await soon(changing)).applied
        await pass_time(clock, 60, step=10)

        assert [texts(update) for update in digests(notifier)] == [["in time"], ["late"]]


# ---- restarts and faults --------------------------------------------------------------------------


@pytest.mark.parametrize("down_at_the_time", [True, False])
async def test_a_restart_before_the_digest_loses_nothing_and_doubles_nothing(
    db: Path, clock: ManualClock, down_at_the_time: bool
):
    notifier, ids = RecordingNotifier(), []
    at(clock, "2027-01-15 08:00")
    for item in ("a", "b"):
        async with open_runtime(db, clock=clock, registry=puts_by(), notifier=notifier) as runtime:
            flow_id = await new_flow(flows_of(runtime), "puts by", state_json=[item])
            await soon(flows_of(runtime).result(flow_id))
            ids.append(flow_id)
        clock.advance(HOUR)
    clock.advance((48 if down_at_the_time else 1) * HOUR)

    async with open_runtime(db, clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        if not down_at_the_time:
            await settle()
            assert not digests(notifier)
        while not digests(notifier):
            clock.advance(HOUR / 4)
            await soon(flows_of(runtime).list_updates())
            await settle()
        done = [u for u in notifier.delivered_once if u.kind == "done"]

    [digest] = {u.idempotency_key: u for u in digests(notifier)}.values()
    assert texts(digest) == ["a", "b"]
    assert [item["flowId"] for item in digest.items] == ids
    assert {update.flow_id for update in done} <= set(ids)


class LooksLong(MemoryStore):
    """A store in which time passes while one looks for digests."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock, self.seconds = clock, 0.0

    async def list_digests_due(self, *, until: int, limit: int) -> list[StoredUpdate]:
        found = await super().list_digests_due(until=until, limit=limit)
        self._clock.advance(self.seconds)
        self.seconds = 0.0
        return found


async def test_a_digest_whose_instant_comes_while_its_store_is_looked_at_goes_out(
    clock: ManualClock,
):
    notifier, store = RecordingNotifier(), LooksLong(clock)
    at(clock, "2027-01-15 17:59")
    async with running(store, clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        await put_by(flows_of(runtime), "a")
    store.seconds = 120.0

    async with running(store, clock=clock, registry=puts_by(), notifier=notifier):
        await settle()
        assert store.seconds == 0.0, "vacuous: nobody looked"
        await pass_time(clock, 1, step=1)

    assert [texts(digest) for digest in digests(notifier)] == [["a"]]


async def test_a_digest_that_fails_is_tried_again_under_its_key_and_others_are_not_put_into_it(
    clock: ManualClock,
):
    notifier = RecordingNotifier()
    async with running(
        clock=clock, registry=puts_by(), notifier=notifier, deliveries=ALWAYS
    ) as runtime:
        flows = flows_of(runtime)
        await put_by(flows, "a", "b")
        notifier.go_down()
        await pass_time(clock, 12 * HOUR)
        await put_by(flows, "c")
        notifier.drop_next()
        notifier.come_up()
        await pass_time(clock, 10, step=1)

        keys = {update.idempotency_key for update in digests(notifier)}
        assert len(digests(notifier)) == 2, "vacuous: no answer was lost"
        assert len(keys) == 1
        assert {tuple(texts(update)) for update in digests(notifier)} == {("a", "b")}


async def test_a_digest_that_is_given_up_can_be_seen(clock: ManualClock):
    notifier = RecordingNotifier()
    async with running(clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await put_by(flows, "a")
        notifier.fail_next(error=Fatal("no such user"))
        await pass_time(clock, 12 * HOUR)

        [failed] = await soon(flows.list_updates(status="delivery_failed"))
        assert (failed.kind, texts(failed)) == ("digest", ["a"])
        last = (await soon(flows.history(flow_id)))[-1]
        assert last.type == "update.failed"
        assert "a" not in str(last.changed["reason"]).split()


class Refuses(FaultyStore):
    """A store that cannot write the digests of one owner."""

    owner: str | None = None
    refused = 0

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        rows = [row for write in writes for row in write.updates]
        if any(row.owner_key == self.owner and row.slot.startswith("digest:") for row in rows):
            self.refused += 1
            raise NOT_WRITTEN
        return await super().commit(writes)


@pytest.mark.parametrize("count", [1, 256, 600])
async def test_a_digest_that_cannot_be_written_holds_up_nobody_else_and_is_written_when_it_can_be(
    clock: ManualClock, count: int
):
    store, notifier = Refuses(), RecordingNotifier()
    async with running(store, clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        await put_by(flows_of(runtime, "a"), "a")
        await put_by(flows_of(runtime, "b"), *(f"{n}" for n in range(count)))
        await put_by(flows_of(runtime, "c"), *(f"{n % 3}/{n}" for n in range(300)))
        store.owner = "b"
        at(clock, "2027-01-15 17:59")
        await pass_time(clock, 120, step=1)
        flow_id = await new_flow(flows_of(runtime, "b"))
        await soon(flows_of(runtime, "b").finish(flow_id=flow_id, expected_revision=0))
        await settle()

        assert store.refused > 1, "vacuous: nothing was refused, or it was not tried again"
        assert [update.owner_key for update in digests(notifier)].count("a") == 1
        assert sum(len(u.items) for u in digests(notifier) if u.owner_key == "c") == 300
        assert not [u for u in digests(notifier) if u.owner_key == "b"]
        assert notifier.updates[-1].flow_id == flow_id
        store.owner = None
        await pass_time(clock, 5, step=1)
        assert sum(len(u.items) for u in digests(notifier) if u.owner_key == "b") == count


async def test_a_disk_that_fails_when_a_digest_is_put_together_delays_it(clock: ManualClock):
    store, notifier = FaultyStore(), RecordingNotifier()
    async with running(store, clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        await put_by(flows_of(runtime), "a", "b")
        store.fail_commits(NOT_WRITTEN, times=3)
        at(clock, "2027-01-15 17:59")
        await pass_time(clock, 120, step=1)

        assert [texts(update) for update in digests(notifier)] == [["a", "b"]]
        assert not store._commit_faults, "vacuous: nothing failed"


@pytest.mark.parametrize(
    "written",
    [False, True],
)
async def test_a_digest_that_nobody_could_vouch_for_is_sent_once_and_holds_up_nobody(
    clock: ManualClock, written: bool
):
    store, notifier = FaultyStore(), RecordingNotifier()
    async with running(store, clock=clock, registry=puts_by(), notifier=notifier) as runtime:
        flows = flows_of(runtime)
        await put_by(flows, "a", "b")
        store.fail_commits(UNKNOWN, written=written)
        at(clock, "2027-01-15 17:59")
        await pass_time(clock, 120, step=1)
        flow_id = await new_flow(flows)
        await soon(flows.finish(flow_id=flow_id, expected_revision=0))
        await pass_time(clock, 5, step=1)

        assert [texts(update) for update in digests(notifier)] == [["a", "b"]]
        assert notifier.updates[-1].flow_id == flow_id
