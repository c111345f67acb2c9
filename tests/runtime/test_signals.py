"""Signals: before, after and while somebody waits for them; never lost, never twice, whatever fails."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from flowstead import FlowContext, Limits, Runtime, SessionFlows, SignalReport, open_runtime
from flowstead.errors import CommitFailed, InvalidState, MailboxFull, OutcomeUnknown, StateTooLarge
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock, Schedule, Simulation
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
from tests.runtime.support import STRANGER, Lives, bound, make, step
from tests.runtime.waiting import (
    KEPT_SECONDS,
    PARKED,
    answer_in,
    begun,
    check_waits_on,
    in_memory,
    open_waits,
    registry_of,
    reopened,
    signalled,
    waiting,
)

KEY: dict[str, Any] = {"kind": "reply", "thread": 1}
HOW = ["kill", "close"]


@pytest.fixture(autouse=True)
def _controllers(request: pytest.FixtureRequest) -> None:
    if "lives" in request.fixturenames:
        request.getfixturevalue("lives").registry = registry_of()


def codes(report: SignalReport) -> tuple[str, int, bool, list[str]]:
    assert report.reason
    return report.code.value, report.matched, report.kept, report.flow_ids


# ---- before, after, at the same time ---------------------------------------------------------------


def test_a_signal_wakes_the_flow_that_waits_for_exactly_its_fields(lives: Lives) -> None:
    flow_id = waiting(lives)
    check_waits_on(lives.flow(flow_id), kind="reply", thread=1)

    report = signalled(lives, {"text": "yes"})

    assert codes(report) == ("matched", 1, False, [flow_id])
    assert answer_in(lives, flow_id) == {"text": "yes"}
    assert lives.told(flow_id, "flow.") == [
        "flow.created",
        "flow.started",
        "flow.waiting",
        "flow.resumed",
        "flow.succeeded",
    ]


@pytest.mark.parametrize("how", [None, *HOW])
@pytest.mark.parametrize("lifetime", [{}, {"lifetime": 10.0}])
def test_a_signal_before_anybody_waits_answers_the_wait_the_moment_it_is_opened(
    lives: Lives, how: str | None, lifetime: dict[str, float]
) -> None:
    early = signalled(lives, "early", **lifetime)
    if how is not None:
        reopened(lives, how)

    flow_id = waiting(lives)

    assert codes(early) == ("kept", 0, True, [])
    assert early.expires_at is not None
    assert answer_in(lives, flow_id) == "early"


def test_a_kept_signal_expires_and_then_answers_nothing(lives: Lives) -> None:
    kept = lives.play(lives.flows.signal(payload="early", key=KEY))
    brief = lives.play(lives.flows.signal(payload="brief", lifetime=30.0, kind="brief"))
    told = lives.now()
    assert kept.expires_at is not None and abs(kept.expires_at - told - KEPT_SECONDS * 1000) < 100
    assert brief.expires_at is not None and abs(brief.expires_at - told - 30_000) < 100

    lives.pass_time(29.0)
    in_time = waiting(lives, key={"kind": "brief"})
    lives.play(lives.flows.signal(payload="brief", lifetime=30.0, key={"kind": "brief2"}))
    lives.pass_time(30.0)
    too_late = waiting(lives, key={"kind": "brief2"})

    assert answer_in(lives, in_time) == "brief"
    check_waits_on(lives.flow(too_late), kind="brief2")


async def test_signals_that_have_expired_are_put_aside_by_the_next_look_at_their_key() -> None:
    store, clock = MemoryStore(), ManualClock()
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        for number in range(300):
            await flows.signal(payload=number, key=KEY, lifetime=30.0, id=f"s-{number}")
        clock.advance(30)

        now = await flows.signal(key=KEY, lifetime=None)
        again = await flows.signal(key=KEY, id="s-0")
        kept = await flows.signal(key=KEY)

    assert [report.code for report in (now, again, kept)] == ["unawaited", "duplicate", "kept"]
    assert [row.kept for row in store.tables.signals.values()] == [False] * 300 + [True]


async def test_no_more_signals_are_kept_for_an_owner_than_the_limit_allows(
    store: Path | MemoryStore,
) -> None:
    clock, limits = ManualClock(), Limits(kept_signals=10)
    async with open_runtime(store, clock=clock, limits=limits) as runtime:
        flows = bound(runtime)
        sent = await asyncio.gather(
            *(flows.signal(n=n, lifetime=30.0 + n) for n in range(30)), return_exceptions=True
        )
        with pytest.raises(MailboxFull, match="10 signals"):
            await flows.signal(n=0)
        assert (await bound(runtime, STRANGER).signal(n=0)).kept
        assert (await flows.signal(n=0, lifetime=None)).code == "unawaited"
        clock.advance(30)
        assert (await flows.signal(n=0)).kept

    async with open_runtime(store, clock=clock, limits=limits, registry=registry_of()) as runtime:
        flows = bound(runtime)
        with pytest.raises(MailboxFull):
            await flows.signal(n=0)
        flow = await make(flows, controller_id="waits", state_json={"key": {"n": 1}})
        await soon(flows.result(flow.flow_id))
        assert (await flows.signal(n=0)).kept

    refused = [one for one in sent if isinstance(one, MailboxFull)]
    assert [one.code for one in sent if isinstance(one, SignalReport)] == ["kept"] * 10
    assert len(refused) == 20


def test_the_lifetime_of_early_signals_is_a_limit_of_the_runtime(lives: Lives) -> None:
    lives.limits = Limits(signal_lifetime=60.0)

    report = lives.play(lives.flows.signal(payload=1, key=KEY))

    assert report.expires_at is not None and abs(report.expires_at - lives.now() - 60_000) < 100


@pytest.mark.parametrize("how", [None, *HOW])
def test_early_signals_are_taken_one_for_each_wait_oldest_first(
    lives: Lives, how: str | None
) -> None:
    for number in range(4):
        signalled(lives, number, id=f"s-{number}")
    if how is not None:
        reopened(lives, how)

    flow_id = waiting(lives, "counts")
    late = signalled(lives, "end")

    assert codes(late) == ("matched", 1, False, [flow_id])
    assert answer_in(lives, flow_id) == [0, 1, 2, 3]


def test_a_signal_that_is_not_to_be_kept_is_unawaited(lives: Lives) -> None:
    report = signalled(lives, "now or never", lifetime=None, id="s-1")

    assert codes(report) == ("unawaited", 0, False, [])
    flow_id = waiting(lives)
    check_waits_on(lives.flow(flow_id))
    assert codes(signalled(lives, "again", lifetime=None, id="s-1"))[0] == "matched"
    assert answer_in(lives, flow_id) == "again"


def test_a_signal_that_is_not_to_be_kept_is_late_once_everybody_who_waited_for_it_has_ended(
    lives: Lives,
) -> None:
    flow_id = waiting(lives)
    signalled(lives, 1)
    assert answer_in(lives, flow_id) == 1

    late = signalled(lives, 2, id="s-2", lifetime=None)
    again = signalled(lives, 2, id="s-2", lifetime=None)

    assert codes(late) == codes(again) == ("late", 0, False, [])


@pytest.mark.parametrize("how", [None, *HOW])
@pytest.mark.parametrize("is_made", [False, True], ids=["before its flow", "before its wait"])
@pytest.mark.parametrize("lifetime", [{}, {"lifetime": 3600.0}])
def test_an_early_signal_is_kept_however_often_its_key_has_been_waited_for(
    lives: Lives, how: str | None, is_made: bool, lifetime: dict[str, float]
) -> None:
    async def asks(flow: FlowContext) -> None:
        await flow.sleep("sends", 1.0)
        await flow.finish(state_json={"answered": await flow.wait("answer", key=KEY)})

    lives.registry = registry_of(asks=asks)
    for day in range(3):
        flow_id = begun(lives, "asks") if is_made else None

        early = signalled(lives, day, id=f"s-{day}", **lifetime)
        if how is not None:
            reopened(lives, how)

        flow_id = flow_id or begun(lives, "asks")
        assert codes(early) == ("kept", 0, True, [])
        assert answer_in(lives, flow_id) == day


@pytest.mark.parametrize("how", [None, *HOW])
def test_a_signal_that_only_a_flow_on_its_way_out_waits_for_is_kept_for_the_next(
    lives: Lives, how: str | None
) -> None:
    async def lingers(flow: FlowContext) -> None:
        await flow.start("stays", name="child")
        await flow.wait("answer", key=KEY)

    async def stays(_context: Any, _input: Any) -> None:
        await asyncio.Event().wait()

    lives.registry = registry_of(lingers=lingers)
    lives.registry.task(stays)
    leaving = begun(lives, "lingers")
    revision = lives.flow(leaving).revision
    lives.play(lives.flows.request_cancel(flow_id=leaving, expected_revision=revision))

    report = signalled(lives, "for the next")
    if how is not None:
        reopened(lives, how)

    assert codes(report) == ("kept", 0, True, [])
    assert answer_in(lives, waiting(lives)) == "for the next"


def test_a_signal_is_kept_while_one_of_those_who_waited_for_it_lives(lives: Lives) -> None:
    flow_id = waiting(lives, "counts")
    lives.play(_two(lives, "a", "b"))
    lives.pass_time(0.1)

    signalled(lives, "end")

    assert answer_in(lives, flow_id) == ["a", "b"]


async def _two(lives: Lives, *payloads: Any) -> None:
    await asyncio.gather(*(lives.flows.signal(payload=one, key=KEY) for one in payloads))


INTERLEAVINGS = 30


def test_a_signal_and_the_wait_it_is_for_never_miss_each_other_whichever_comes_first() -> None:
    codes_seen: Counter[str] = Counter()
    for seed in range(INTERLEAVINGS):
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            codes_seen[world.run(_at_the_same_time, registry=registry_of)] += 1

    assert codes_seen.keys() == {"matched", "kept"}, "vacuous: the two never met both ways"
    assert min(codes_seen.values()) > 1


async def _at_the_same_time(runtime: Runtime) -> str:
    flows = bound(runtime)
    making = asyncio.create_task(
        make(flows, controller_id="twice", state_json={"key": {"kind": "reply"}})
    )
    await step(int(asyncio.get_running_loop().random.random() * 60))  # type: ignore[attr-defined]
    first, second = await asyncio.gather(
        flows.signal(payload=1, id="s-1", kind="reply"),
        flows.signal(payload=2, id="s-2", kind="reply"),
    )
    flow = await making
    ended = await flows.result(flow.flow_id)
    assert sorted(ended.state_json["answered"]) == [1, 2]
    assert {first.code, second.code} <= {"matched", "kept"}
    return first.code.value


def test_a_ledger_wait_and_its_signal_never_miss_each_other_whichever_comes_first() -> None:
    codes_seen: Counter[str] = Counter()
    for seed in range(INTERLEAVINGS):
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            codes_seen[world.run(_ledger_at_the_same_time)] += 1

    assert codes_seen.keys() == {"matched", "kept"}, "vacuous: the two never met both ways"


async def _ledger_at_the_same_time(runtime: Runtime) -> str:
    flows = bound(runtime)
    flow = await make(flows)
    report, waiting = await asyncio.gather(
        flows.signal(payload=1, kind="reply"),
        flows.set_waiting(flow_id=flow.flow_id, expected_revision=0, wait_json={"kind": "reply"}),
    )
    await asyncio.sleep(1)
    now = await flows.get(flow.flow_id)
    assert waiting.applied and now is not None
    assert (now.status, now.revision, now.wait_json) == ("queued", 2, None)
    assert now.answer_json["payload"] == 1
    return report.code.value


# ---- the key --------------------------------------------------------------------------------------

UNLIKE: list[Any] = [1, 1.5, True, "1", "1 ", "ä", "a\u0308", 0, False, "", 2**53]


def test_fields_are_compared_exactly(lives: Lives) -> None:
    flow_ids = [waiting(lives, key={"value": value}, seconds=0) for value in UNLIKE]
    lives.pass_time(1)

    for value, flow_id in zip(UNLIKE, flow_ids, strict=True):
        report = signalled(lives, json.dumps(value), key={"value": value})
        assert codes(report) == ("matched", 1, False, [flow_id]), value

    assert [answer_in(lives, flow_id) for flow_id in flow_ids] == [json.dumps(v) for v in UNLIKE]


def test_a_whole_float_is_another_value_than_the_integer(lives: Lives) -> None:
    flow_id = waiting(lives, key={"value": 1})

    report = signalled(lives, key={"value": 1.0})

    assert report.kept
    check_waits_on(lives.flow(flow_id), value=1)


@pytest.mark.parametrize(
    "other", [{"kind": "reply"}, KEY | {"more": 1}, {"kind": "reply", "thread": 2}]
)
def test_a_signal_that_names_fewer_more_or_other_fields_wakes_nobody(
    lives: Lives, other: dict[str, Any]
) -> None:
    flow_id = waiting(lives)

    assert codes(signalled(lives, key=other))[0] == "kept"

    check_waits_on(lives.flow(flow_id), **KEY)


def test_the_order_of_the_fields_does_not_matter(lives: Lives) -> None:
    flow_id = waiting(lives)

    assert signalled(lives, key=dict(reversed(KEY.items()))).flow_ids == [flow_id]


def test_another_owners_signal_wakes_nobody_and_is_his_own(lives: Lives) -> None:
    mine = waiting(lives)
    theirs = lives.face(lambda runtime: bound(runtime, STRANGER))

    report = lives.play(theirs.signal(payload="theirs", id="s-1", key=KEY))

    assert codes(report) == ("kept", 0, True, [])
    check_waits_on(lives.flow(mine))
    assert signalled(lives, "mine", id="s-1").flow_ids == [mine]
    their_flow = lives.play(
        make(theirs, controller_id="waits", state_json={"key": KEY}, flow_id="theirs")
    )
    ended = lives.play(theirs.result(their_flow.flow_id))
    assert ended.state_json == {"answered": "theirs"}


def test_a_signal_answers_only_the_oldest_wait_of_one_flow(lives: Lives) -> None:
    async def both(flow: FlowContext) -> None:
        older = await flow.open_wait("older", key=KEY)
        newer = await flow.open_wait("newer", key=KEY)
        await flow.finish(state_json={"answered": [await older.result(), await newer.result()]})

    lives.registry = registry_of(both=both)
    flow_id = begun(lives, "both")

    signalled(lives, 1)
    assert [wait.name for wait in open_waits(lives)] == ["newer"]
    signalled(lives, 2)

    assert answer_in(lives, flow_id) == [1, 2]


async def test_keys_that_are_no_plain_fields_are_refused_before_anything_happens() -> None:
    async with running() as runtime:
        flows = flows_of(runtime)
        bad: list[tuple[type[Exception], dict[str, Any]]] = [
            (ValueError, {}),
            (ValueError, {"key": {}}),
            (ValueError, {"kind": "x", "flow_id": "f"}),
            (ValueError, {"kind": "x", "token": "t"}),
            (ValueError, {"flow_id": "f", "token": "t"}),
            (ValueError, {"kind": "x", "name": "bob"}),
            (ValueError, {"token": "t", "name": "bob"}),
            (ValueError, {"token": "t", "lifetime": 60}),
            (TypeError, {"key": "kind"}),
            (TypeError, {"key": [("kind", "x")]}),
            (InvalidState, {"key": {"value": 10**5_000}}),
            (StateTooLarge, {"key": {"value": "x" * 65_536}}),
            (ValueError, {"key": {"prompt": "reserved"}}),
            (ValueError, {"key": {"value": float("nan")}}),
            (ValueError, {"key": {"value": "\ud800"}}),
            (TypeError, {"key": {"value": None}}),
            (TypeError, {"key": {"value": [1]}}),
            (TypeError, {"key": {1: 1}}),
            (ValueError, {"kind": "x", "lifetime": 0}),
            (ValueError, {"kind": "x", "lifetime": -1}),
            (TypeError, {"kind": "x", "lifetime": "long"}),
            (ValueError, {"kind": "x", "id": ""}),
        ]
        for error, given in bad:
            with pytest.raises(error):
                await flows.signal(**given)

        assert runtime.statistics().commits == 0


class Colour(StrEnum):
    """A choice of the host's own."""

    RED = "red"


class Text(str):
    """A text of a class of the host's own."""


@pytest.mark.parametrize("given", [Text("reply"), Colour.RED, True, 3.5])
def test_a_field_of_a_class_of_its_own_is_the_plain_value_it_is(lives: Lives, given: Any) -> None:
    plain = str(given) if isinstance(given, str) else given
    ledger = lives.play(make(lives.flows, status="waiting", wait_json={"thread": 1, "v": given}))
    named = waiting(lives, key={"thread": 1, "v": plain})

    assert signalled(lives, 1, key={"thread": 1, Text("v"): given}).matched == 2

    assert answer_in(lives, named) == 1
    assert lives.flow(ledger.flow_id).answer_json["payload"] == 1


@pytest.mark.parametrize(
    "asked", [{"key": {"v": "x" * 65_536}}, {"schema": {"enum": ["x" * 65_536]}}]
)
def test_a_wait_is_no_larger_than_its_limit(lives: Lives, asked: dict[str, Any]) -> None:
    flow_id = waiting(lives, **asked)

    ended = lives.flow(flow_id)

    assert ended.failure is not None
    assert (ended.failure.code, lives.children(flow_id)) == ("StateTooLarge", [])


# ---- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [None, *HOW])
@pytest.mark.parametrize("first", ["matched", "kept"])
def test_an_id_counts_once_for_ever(lives: Lives, first: str, how: str | None) -> None:
    flow_id = waiting(lives, "counts") if first == "matched" else None
    assert codes(signalled(lives, "once", id="s-1"))[0] == first
    if how is not None:
        reopened(lives, how)

    again = [signalled(lives, "twice", id="s-1"), signalled(lives, "other", id="s-1", key={"k": 1})]

    assert [codes(report) for report in again] == [("duplicate", 0, False, [])] * 2
    flow_id = flow_id or waiting(lives, "counts")
    signalled(lives, "end")
    assert answer_in(lives, flow_id) == ["once"]
    assert codes(signalled(lives, "thrice", id="s-1"))[0] == "duplicate"


def test_of_two_callers_with_one_id_at_once_one_is_taken_whatever_the_order() -> None:
    async def host(runtime: Runtime) -> int:
        flows = bound(runtime)
        flow = await make(flows, controller_id="counts", state_json={"key": {"kind": "reply"}})
        await step(int(asyncio.get_running_loop().random.random() * 60))  # type: ignore[attr-defined]
        reports = await asyncio.gather(
            flows.signal(payload="a", id="s-1", kind="reply"),
            flows.signal(payload="a", id="s-1", kind="reply"),
            flows.signal(payload="a", id="s-1", kind="other"),
            flows.signal(payload="a", id="s-1", flow_id=flow.flow_id, name="answer-1"),
            flows.tell(flow.flow_id, "a", id="s-1"),
        )
        told = sorted(report.code.value for report in reports)
        assert told[:4] == ["duplicate"] * 4
        assert told[4] in ("kept", "matched")
        return next(n for n, report in enumerate(reports) if report.code != "duplicate")

    won = set()
    for seed in range(30):
        with Simulation(Schedule(seed=seed, shuffle=True)) as world:
            won.add(world.run(host, registry=registry_of))

    assert len(won) > 2, "vacuous: the same caller always came first"


async def test_many_callers_with_one_id_are_all_answered_and_one_payload_is_taken(
    db: Path,
) -> None:
    async with open_runtime(db, registry=registry_of()) as runtime:
        flows = bound(runtime)
        flow = await make(flows, controller_id="waits", state_json={"key": KEY})

        reports = await asyncio.gather(
            *(flows.signal(payload=number, id="s-1", key=KEY) for number in range(50))
        )

        told = Counter(report.code.value for report in reports)
        assert told["duplicate"] == 49
        [winner] = [n for n, report in enumerate(reports) if report.code != "duplicate"]
        ended = await soon(flows.result(flow.flow_id), 60)
        assert ended.state_json == {"answered": winner}


# ---- many flows on one key ------------------------------------------------------------------------

MANY = 50


async def many_waiting(runtime: Runtime, count: int = MANY) -> list[str]:
    flows = flows_of(runtime)
    made = await asyncio.gather(
        *(new_flow(flows, "waits", state_json={"key": KEY}) for _ in range(count))
    )
    await settle()
    assert {flow.status for flow in await flows.list(limit=count)} == {"waiting"}
    return sorted(made)


async def test_one_signal_wakes_every_flow_that_waits_in_one_transaction() -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        ids = await many_waiting(runtime)
        store.batches.clear()

        report = await soon(flows.signal(payload="all", id="s-1", key=KEY))

        assert sorted(report.flow_ids) == ids and report.matched == MANY
        assert store.batches[0] == MANY
        ended = [await soon(flows.result(flow_id)) for flow_id in ids]
        assert {json.dumps(flow.state_json) for flow in ended} == {'{"answered": "all"}'}


@pytest.mark.parametrize("fault", [NOT_WRITTEN, UNKNOWN], ids=["not written", "unknown"])
async def test_a_signal_whose_commit_fails_wakes_none_of_many_is_not_recorded_and_may_come_again(
    fault: Exception,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        ids = await many_waiting(runtime)
        store.fail_commits(fault)

        with pytest.raises(type(fault)):
            await soon(flows.signal(payload="lost", id="s-1", key=KEY))

        await settle()
        assert {flow.status for flow in await flows.list(limit=MANY)} == {"waiting"}
        assert len(await flows.list_waits()) == MANY
        again = await soon(flows.signal(payload="came", id="s-1", key=KEY))
        assert sorted(again.flow_ids) == ids
        for flow_id in ids:
            assert (await soon(flows.result(flow_id))).state_json == {"answered": "came"}


async def test_a_signal_that_was_written_although_the_disk_said_nothing_is_a_duplicate_afterwards(
    clock: ManualClock,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), clock=clock) as runtime:
        flows = flows_of(runtime)
        ids = await many_waiting(runtime, 3)
        store.fail_commits(UNKNOWN, written=True)

        with pytest.raises(OutcomeUnknown):
            await soon(flows.signal(payload="came", id="s-1", key=KEY))
        again = await soon(flows.signal(payload="twice", id="s-1", key=KEY))

        assert codes(again) == ("duplicate", 0, False, [])
        clock.advance(2)
        for flow_id in ids:
            assert (await soon(flows.result(flow_id))).state_json == {"answered": "came"}


@pytest.mark.parametrize("is_kept", [False, True], ids=["awaited", "early"])
async def test_a_single_signal_whose_commit_fails_says_so_and_may_come_again(
    is_kept: bool,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        if not is_kept:
            [flow_id] = await many_waiting(runtime, 1)
        for fault in (NOT_WRITTEN, UNKNOWN):
            store.fail_commits(fault)
            with pytest.raises(type(fault)):
                await soon(flows.signal(payload="lost", id="s-1", key=KEY))
            await settle()

        report = await soon(flows.signal(payload="came", id="s-1", key=KEY))

        assert report.code == ("kept" if is_kept else "matched")
        if is_kept:
            [flow_id] = [await new_flow(flows, "waits", state_json={"key": KEY})]
        assert (await soon(flows.result(flow_id))).state_json == {"answered": "came"}


async def test_a_kept_signal_whose_handing_over_fails_is_handed_over_later(
    clock: ManualClock,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), clock=clock) as runtime:
        flows = flows_of(runtime)
        await soon(flows.signal(payload="early", key=KEY))
        store.fail_reads("look_up_waits", NOT_WRITTEN)
        flow_id = await new_flow(flows, "waits", state_json={"key": KEY})
        await settle()
        assert (await flows.get(flow_id)).status == "waiting"  # type: ignore[union-attr]

        clock.advance(2)

        assert (await soon(flows.result(flow_id))).state_json == {"answered": "early"}


async def test_a_signal_that_cannot_be_looked_up_says_so() -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        [flow_id] = await many_waiting(runtime, 1)
        store.fail_reads("look_up_waits", NOT_WRITTEN)

        with pytest.raises(CommitFailed):
            await soon(flows.signal(payload=1, id="s-1", key=KEY))

        assert (await soon(flows.signal(payload=2, id="s-1", key=KEY))).flow_ids == [flow_id]


# ---- mailboxes ------------------------------------------------------------------------------------


async def stuffed(store: FaultyStore, runtime: Runtime, flow_id: str) -> list[asyncio.Task[Any]]:
    """Fill the one place in a flow's mailbox, while the disk takes its time over another change."""
    flows = flows_of(runtime)
    store.hold()
    pushing = []
    for number in range(2):
        pushing.append(
            asyncio.create_task(
                flows.run_task(flow_id=flow_id, runtime="acp", task="t", run_id=f"r{number}")
            )
        )
        await settle()
    await store.wait_held()
    return pushing


ADDRESSED: dict[str, Callable[[SessionFlows, str], Awaitable[SignalReport]]] = {
    "signal": lambda flows, flow_id: flows.signal(
        payload=1, id="s-1", flow_id=flow_id, name="answer"
    ),
    "tell": lambda flows, flow_id: flows.tell(flow_id, 1, id="s-1"),
}


@pytest.mark.parametrize("call", ADDRESSED)
async def test_a_full_mailbox_refuses_what_is_addressed_to_the_flow_and_nothing_changes(
    call: str,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), limits=Limits(mailbox=1)) as runtime:
        flows = flows_of(runtime)
        [flow_id] = await many_waiting(runtime, 1)
        pushing = await stuffed(store, runtime, flow_id)

        with pytest.raises(MailboxFull):
            await soon(ADDRESSED[call](flows, flow_id))

        store.release()
        await asyncio.gather(*pushing)
        assert len(await flows.list_waits()) == 1
        again = await soon(flows.signal(payload=2, id="s-1", flow_id=flow_id, name="answer"))
        assert again.flow_ids == [flow_id]


@pytest.mark.parametrize("count", [1, 3])
async def test_a_signal_by_key_reaches_everybody_who_waits_however_full_a_mailbox_is(
    count: int,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), limits=Limits(mailbox=1)) as runtime:
        flows = flows_of(runtime)
        ids = await many_waiting(runtime, count)
        pushing = await stuffed(store, runtime, ids[0])

        sending = asyncio.create_task(flows.signal(payload=1, id="s-1", key=KEY))
        await settle()
        store.release()

        assert sorted((await soon(sending)).flow_ids) == ids
        await asyncio.gather(*pushing)
        for flow_id in ids:
            assert (await soon(flows.result(flow_id))).state_json == {"answered": 1}


async def test_a_signal_for_flows_that_cannot_be_loaded_just_now_is_not_lost(
    clock: ManualClock,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), clock=clock) as runtime:
        flows = flows_of(runtime)
        ids = await many_waiting(runtime, 2)
        await out_of_memory(runtime, clock)
        store.fail_reads("load", NOT_WRITTEN)

        with pytest.raises(CommitFailed):
            await soon(flows.signal(payload=1, id="s-1", key=KEY))

        again = await soon(flows.signal(payload=2, id="s-1", key=KEY))
        assert sorted(again.flow_ids) == ids


async def out_of_memory(runtime: Runtime, clock: ManualClock) -> None:
    """Let time pass until every flow is parked and forgotten."""
    for _ in range(30):
        clock.advance(1)
        await settle()
    assert runtime.statistics().flows_in_memory == 0


async def test_a_signal_for_one_flow_that_cannot_be_loaded_just_now_says_so(
    clock: ManualClock,
) -> None:
    store = FaultyStore()
    async with running(store, registry=registry_of(), clock=clock) as runtime:
        flows = flows_of(runtime)
        [flow_id] = await many_waiting(runtime, 1)
        await out_of_memory(runtime, clock)
        store.fail_reads("load", NOT_WRITTEN)

        with pytest.raises(CommitFailed):
            await soon(flows.signal(payload=1, id="s-1", key=KEY))

        again = await soon(flows.signal(payload=2, id="s-1", key=KEY))
        assert again.flow_ids == [flow_id]


# ---- crashes --------------------------------------------------------------------------------------


def test_a_crash_at_any_step_neither_loses_nor_doubles_a_signal_that_is_sent_again_with_its_id() -> (
    None
):
    crashes = 0
    steps = _steps_of_a_calm_run()
    for at in range(5, steps, max(1, steps // 40)):
        with Simulation(Schedule(seed=at, crashes=(at,))) as world:
            assert world.run(_until_taken, registry=registry_of) == ["a", "b"], at
            crashes += world.crashed

    assert crashes > 30, "vacuous: hardly ever a crash"


def _steps_of_a_calm_run() -> int:
    with Simulation() as world:
        assert world.run(_until_taken, registry=registry_of) == ["a", "b"]
        return world.steps


async def _until_taken(runtime: Runtime) -> list[Any]:
    flows = bound(runtime)
    sent = [await flows.signal(payload="a", id="s-1", key=KEY)]
    flow = (
        await make(flows, controller_id="counts", flow_id="f", state_json={"key": KEY})
        if (await flows.get("f") is None)
        else await flows.get("f")
    )
    assert flow is not None
    sent.append(await flows.signal(payload="b", id="s-2", key=KEY))
    sent.append(await flows.signal(payload="end", id="s-3", key=KEY))
    assert {report.code for report in sent} <= {"matched", "kept", "duplicate", "late"}
    ended = await flows.result("f")
    answered: list[Any] = ended.state_json["answered"]
    return answered


# ---- addressed ------------------------------------------------------------------------------------


def test_a_signal_to_a_flow_and_a_name_answers_that_step(lives: Lives) -> None:
    flow_id = waiting(lives, "twice", key={})

    report = signalled(lives, 1, flow_id=flow_id, name="first")

    assert codes(report) == ("matched", 1, False, [flow_id])
    [wait] = open_waits(lives)
    assert (wait.name, wait.key) == ("second", {})


@pytest.mark.parametrize("how", [None, *HOW])
def test_an_addressed_signal_that_comes_early_is_kept_for_its_step(
    lives: Lives, how: str | None
) -> None:
    flow_id = waiting(lives, "twice", key={})
    early = signalled(lives, 2, flow_id=flow_id, name="second", id="s-2")
    assert codes(early) == ("kept", 0, True, [])
    assert early.expires_at is not None
    if how is not None:
        reopened(lives, how)
        assert (
            codes(signalled(lives, 2, flow_id=flow_id, name="second", id="s-2"))[0] == "duplicate"
        )

    signalled(lives, 1, flow_id=flow_id, name="first")

    assert answer_in(lives, flow_id) == [1, 2]


@pytest.mark.parametrize("how", [None, *HOW])
def test_an_addressed_signal_that_comes_early_expires(lives: Lives, how: str | None) -> None:
    flow_id = waiting(lives, "twice", key={})
    signalled(lives, "old", flow_id=flow_id, name="second", lifetime=30.0)
    if how is not None:
        lives.restart(how)
    lives.pass_time(31.0)

    signalled(lives, 1, flow_id=flow_id, name="first")

    assert [wait.name for wait in open_waits(lives)] == ["second"]
    letters = [task for task in lives.children(flow_id) if not task.run_id]
    assert [letter.status for letter in letters] == ["cancelled", "succeeded"]


def test_an_addressed_signal_that_has_expired_answers_nothing_though_no_timer_came(
    lives: Lives,
) -> None:
    flow_id = waiting(lives, "twice", key={})
    signalled(lives, "old", flow_id=flow_id, name="second", lifetime=30.0)
    lives.world.clock.shift_ms += 31_000

    signalled(lives, 1, flow_id=flow_id, name="first")

    assert [wait.name for wait in open_waits(lives)] == ["second"]


def test_an_addressed_signal_is_late_once_its_step_or_its_flow_is_over(lives: Lives) -> None:
    flow_id = waiting(lives, "twice", key={})
    signalled(lives, 1, flow_id=flow_id, name="first")

    step_over = signalled(lives, "again", flow_id=flow_id, name="first")
    signalled(lives, 2, flow_id=flow_id, name="second")
    flow_over = [signalled(lives, "x", flow_id=flow_id, name=name) for name in ("second", "third")]
    alone = signalled(lives, "x", flow_id=flow_id)

    assert [codes(r) for r in (step_over, *flow_over, alone)] == [("late", 0, False, [])] * 4
    assert answer_in(lives, flow_id) == [1, 2]


def test_an_addressed_signal_that_is_not_to_be_kept_is_late_as_well_once_its_step_is_over(
    lives: Lives,
) -> None:
    flow_id = waiting(lives, "twice", key={})
    signalled(lives, 1, flow_id=flow_id, name="first")

    over = signalled(lives, "again", flow_id=flow_id, name="first", lifetime=None)

    assert codes(over)[0] == "late"


def test_an_addressed_signal_that_is_not_to_be_kept_answers_what_is_open_and_nothing_else(
    lives: Lives,
) -> None:
    flow_id = waiting(lives, "twice", key={})

    not_yet = signalled(lives, 2, flow_id=flow_id, name="second", lifetime=None)
    now = signalled(lives, 1, flow_id=flow_id, name="first", lifetime=None)

    assert codes(not_yet) == ("unawaited", 0, False, [])
    assert codes(now) == ("matched", 1, False, [flow_id])
    assert [wait.name for wait in open_waits(lives)] == ["second"]


def test_a_signal_to_a_flow_alone_never_answers_a_step(lives: Lives) -> None:
    flow_id = waiting(lives)

    report = signalled(lives, 1, flow_id=flow_id)

    assert codes(report) == ("unawaited", 0, False, [])
    check_waits_on(lives.flow(flow_id))


def test_a_flow_that_is_not_there_and_one_of_another_owner_cannot_be_told_apart(
    lives: Lives,
) -> None:
    theirs = lives.face(lambda runtime: bound(runtime, STRANGER))
    flow = lives.play(make(theirs, controller_id="waits", state_json={}, flow_id="theirs"))
    lives.pass_time(0.1)

    reports = [
        signalled(lives, 1, flow_id=wanted, **named)
        for named in ({}, {"name": "answer"}, {"name": "answer", "id": "s-1"})
        for wanted in (flow.flow_id, "nobody's", "\ud800")
    ]

    assert len(set(map(repr, reports))) == 1
    assert codes(reports[0]) == ("not_found", 0, False, [])
    assert lives.play(theirs.get(flow.flow_id)).status == "waiting"  # type: ignore[union-attr]


# ---- an intent ------------------------------------------------------------------------------------


def test_a_signal_to_a_flow_that_is_to_be_cancelled_is_late(lives: Lives) -> None:
    hold = asyncio.Event

    async def stays(flow: FlowContext) -> None:
        await flow.start("forever", name="child")
        await flow.wait("answer", key=KEY)

    async def forever(_context: Any, _input: Any) -> None:
        await hold().wait()

    lives.registry = registry_of(stays=stays)
    lives.registry.task(forever)
    flow_id = begun(lives, "stays")
    revision = lives.flow(flow_id).revision
    lives.play(lives.flows.request_cancel(flow_id=flow_id, expected_revision=revision))

    assert codes(signalled(lives, 1, flow_id=flow_id, name="answer"))[0] == "late"
    assert codes(signalled(lives, 1, flow_id=flow_id, name="other"))[0] == "late"
    assert codes(signalled(lives, 1, flow_id=flow_id))[0] == "late"
    assert open_waits(lives) == []


# ---- what is left behind --------------------------------------------------------------------------


def test_waiting_and_being_answered_leaves_nothing_in_memory(lives: Lives) -> None:
    flow_id = waiting(lives)
    signalled(lives, 1)
    assert answer_in(lives, flow_id) == 1

    lives.pass_time(2 * PARKED)

    assert in_memory(lives) == 0
    desk = lives.runtime._engine.desk
    assert not desk._lanes._lanes and not desk._lanes._tasks and not desk._lookups


async def test_nobody_who_sends_a_signal_is_left_waiting_when_the_runtime_closes() -> None:
    store = FaultyStore(MemoryStore())
    async with open_runtime(store, registry=registry_of()) as runtime:
        flows = flows_of(runtime)
        await many_waiting(runtime, 2)
        store.hold()
        sending = [
            asyncio.create_task(flows.signal(payload=n, key=KEY, **named))
            for n, named in enumerate([{}, {"id": "a"}, {"id": "a"}, {}, {"id": "b"}])
        ]
        await store.wait_held()
        closing = asyncio.create_task(runtime.aclose())
        await settle()
        store.release()
        await soon(closing)

        done, pending = await asyncio.wait(sending, timeout=30)

        for task in pending:
            task.cancel()
        assert not pending
        assert done
