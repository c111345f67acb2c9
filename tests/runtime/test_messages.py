"""Messages to a flow: kept in order, taken once, answered once, over restarts and parking."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from flowstead import (
    Cancelled,
    FlowContext,
    FlowNotFound,
    InvalidState,
    Limits,
    MailboxFull,
    Message,
    NotAwaited,
    Registry,
    SignalReport,
    Succeeded,
)
from flowstead.model.task import Outcome
from flowstead.testing import ManualClock
from tests.faulty_store import NOT_WRITTEN, FaultyStore, flows_of, new_flow, running, settle, soon
from tests.runtime.support import STRANGER, Lives, bound, make

RESTARTS = pytest.mark.parametrize(
    ("lives", "between"),
    [("memory", None), ("memory", "close"), ("file", "kill")],
    indirect=["lives"],
)
"""What happens between two steps: nothing, or the end of the process, one way or the other."""
IN_MEMORY = pytest.mark.parametrize("lives", ["memory"], indirect=True)


class Clerk:
    """A controller that takes messages one after another until one says "end", and those who write to it."""

    def __init__(self, lives: Lives, between: str | None = None, **receive: Any) -> None:
        self.lives, self.between, self.receive = lives, between, receive
        self.runs = 0
        lives.registry.controller("clerk")(self.clerk)
        lives.registry.controller("idle")(self.idle)
        self.flow_id = lives.play(make(lives.flows, controller_id="clerk")).flow_id
        self.turn_over()

    async def clerk(self, flow: FlowContext) -> None:
        self.runs += 1
        got: list[Any] = []
        while not got or got[-1] != "end":
            message = await flow.receive(**self.receive)
            assert message is not None
            got.append(message.body)
            await self.answer(flow, message)
        await flow.finish(state_json=got)

    async def answer(self, flow: FlowContext, message: Message) -> None:
        await flow.reply(message, {"heard": message.body})

    async def idle(self, flow: FlowContext) -> None:
        """One that takes nothing until it is told to, by a signal."""
        await flow.wait("go on")
        await self.clerk(flow)

    def turn_over(self) -> None:
        self.lives.pass_time(0.5)
        if self.between is not None:
            self.lives.restart(self.between)
            # Who was cut off where he stood is entered again when he would have been parked.
            self.lives.pass_time(6)

    def be_idle(self) -> None:
        """Go on with a flow whose controller does not take anything yet."""
        self.flow_id = self.lives.play(make(self.lives.flows, controller_id="idle")).flow_id
        self.turn_over()

    def go_on(self) -> None:
        self.lives.play(self.lives.flows.signal(flow_id=self.flow_id, name="go on"))
        self.turn_over()

    def tell(self, message: Any, **given: Any) -> SignalReport:
        report = self.lives.play(self.lives.flows.tell(self.flow_id, message, **given))
        self.turn_over()
        return report

    def got(self) -> Any:
        return self.lives.result(self.flow_id).state_json

    def asking(self, message: Any) -> asyncio.Task[Outcome]:
        """Ask, in this process; the answer may come later."""

        async def ask() -> asyncio.Task[Outcome]:
            return asyncio.create_task(self.lives.flows.ask(self.flow_id, message))

        task = self.lives.play(ask())
        self.lives.pass_time(0.5)
        return task


# ---- in order, once -------------------------------------------------------------------------------


@RESTARTS
def test_messages_are_taken_in_the_order_in_which_they_came_each_once(
    lives: Lives, between: str | None
) -> None:
    clerk = Clerk(lives, between)

    for message in ("a", {"b": 1}, None, "a", "end"):
        assert clerk.tell(message).code in ("matched", "kept")

    assert clerk.got() == ["a", {"b": 1}, None, "a", "end"]
    letters = [t for t in lives.children(clerk.flow_id) if t.runtime == "message" and not t.run_id]
    assert [t.status for t in letters] == ["succeeded"] * 5
    assert (clerk.runs > 1) is (between is not None)


@RESTARTS
def test_what_is_told_before_anybody_takes_it_is_kept_in_order(
    lives: Lives, between: str | None
) -> None:
    clerk = Clerk(lives, between)
    clerk.be_idle()

    reports = [clerk.tell(message) for message in (1, 2, 3, "end")]
    clerk.go_on()

    assert {(r.code, r.kept, r.matched) for r in reports} == {("kept", True, 0)}
    assert clerk.got() == [1, 2, 3, "end"]


@IN_MEMORY
@pytest.mark.parametrize("ids", ["none", "some", "all", "twice"])
@pytest.mark.parametrize("is_idle", [False, True])
def test_many_who_write_at_once_are_heard_in_the_order_of_their_calls(
    lives: Lives, is_idle: bool, ids: str
) -> None:
    def id_of(n: int) -> dict[str, str]:
        named = {"none": False, "some": n % 3 == 0, "all": True, "twice": n % 2 == 0}[ids]
        return {"id": f"mail-{n}"} if named else {}

    clerk = Clerk(lives)
    if is_idle:
        clerk.be_idle()

    async def all_at_once() -> None:
        told = [
            lives.flows.tell(clerk.flow_id, n, **id_of(n))
            for n in range(60)
            for _ in range(2 if ids == "twice" and id_of(n) else 1)
        ]
        await asyncio.gather(*told)
        await lives.flows.tell(clerk.flow_id, "end")

    lives.play(all_at_once())
    if is_idle:
        clerk.go_on()

    assert clerk.got() == [*range(60), "end"]


def test_messages_wake_a_controller_that_was_parked_and_a_restart_does_not_take_them_again(
    lives: Lives,
) -> None:
    clerk = Clerk(lives)
    for number in range(4):
        lives.pass_time(20)
        assert "flow.parked" in lives.told(clerk.flow_id)
        clerk.tell(number)
        if number % 2:
            lives.restart("kill")

    clerk.tell("end")

    assert clerk.got() == [0, 1, 2, 3, "end"]
    # Once at first, and once for each time it was woken after it had left.
    assert clerk.runs >= 5


@IN_MEMORY
def test_each_inbox_is_a_line_of_its_own(lives: Lives) -> None:
    async def clerk(flow: FlowContext) -> None:
        await flow.wait("go on")
        taken = [await flow.receive(box) for box in ("bills", "inbox", "bills", "inbox")]
        await flow.finish(state_json=[message.body for message in taken if message])

    lives.registry.controller("two boxes")(clerk)
    flow_id = lives.play(make(lives.flows, controller_id="two boxes")).flow_id
    lives.pass_time(0.5)
    for message, box in (("i1", "inbox"), ("b1", "bills"), ("b2", "bills"), ("i2", "inbox")):
        lives.play(lives.flows.tell(flow_id, message, inbox=box))

    lives.play(lives.flows.signal(flow_id=flow_id, name="go on"))

    assert lives.result(flow_id).state_json == ["b1", "i1", "b2", "i2"]


@RESTARTS
def test_a_message_with_an_id_counts_once_for_ever(lives: Lives, between: str | None) -> None:
    clerk = Clerk(lives, between)
    clerk.be_idle()

    codes = [str(clerk.tell("x", id="mail-1").code) for _ in range(3)]
    codes += [str(clerk.tell("other", id="mail-2").code)]
    clerk.go_on()
    codes += [str(clerk.tell("late", id="mail-1").code)]
    clerk.tell("end")

    assert codes == ["kept", "duplicate", "duplicate", "kept", "duplicate"]
    assert clerk.got() == ["x", "other", "end"]


@IN_MEMORY
def test_of_many_with_one_id_at_once_one_is_taken(lives: Lives) -> None:
    clerk = Clerk(lives)

    async def all_at_once() -> list[SignalReport]:
        told = [lives.flows.tell(clerk.flow_id, n, id="mail") for n in range(20)]
        return await asyncio.gather(*told)

    codes = [str(report.code) for report in lives.play(all_at_once())]
    clerk.tell("end")

    assert sorted(codes) == ["duplicate"] * 19 + ["matched"]
    assert clerk.got() == [codes.index("matched"), "end"]


async def test_a_message_that_could_not_be_written_is_not_there_and_may_be_sent_again(
    clock: ManualClock,
):
    store, registry, got = FaultyStore(), Registry(), []

    @registry.controller("clerk")
    async def clerk(flow: FlowContext) -> None:
        message = await flow.receive()
        got.append(message and message.body)

    async with running(store, clock=clock, registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "clerk")
        await settle()
        store.fail_commits(NOT_WRITTEN)

        with pytest.raises(Exception, match="the disk said no"):
            await soon(flows.tell(flow_id, "x", id="mail"))
        assert got == []
        assert (await soon(flows.tell(flow_id, "x", id="mail"))).code == "matched"
        await soon(flows.result(flow_id))

        assert got == ["x"]


# ---- asking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parked", [False, True])
def test_who_asks_is_given_the_reply(lives: Lives, parked: bool) -> None:
    clerk = Clerk(lives)
    if parked:
        lives.pass_time(20)

    outcomes = lives.play(
        asyncio_gather(*(lives.flows.ask(clerk.flow_id, number) for number in range(3)))
    )
    clerk.tell("end")

    assert outcomes == [Succeeded({"heard": number}) for number in range(3)]
    assert clerk.got() == [0, 1, 2, "end"]


async def asyncio_gather(*awaited: Any) -> list[Any]:
    return list(await asyncio.gather(*awaited))


@pytest.mark.parametrize("how", ["kill", "close"])
def test_a_reply_finds_who_asked_in_an_earlier_process_by_the_child(lives: Lives, how: str) -> None:
    clerk = Clerk(lives)
    clerk.be_idle()
    clerk.asking("question")
    [asked] = [t for t in lives.children(clerk.flow_id) if t.runtime == "message"]
    lives.restart(how)
    lives.pass_time(6)

    clerk.go_on()

    outcome = lives.play(lives.flows.wait_task(asked.task_id))
    assert outcome == Succeeded({"heard": "question"})


ENDS = ["finish", "fail", "cancel", "request_cancel"]


class Mute(Clerk):
    """A clerk that takes what he is asked and never answers."""

    async def answer(self, flow: FlowContext, message: Message) -> None:
        return


@IN_MEMORY
@pytest.mark.parametrize(
    ("way", "is_taken"),
    [
        *((way, is_taken) for way in ENDS for is_taken in (True, False)),
        ("by itself", True),
    ],
)
def test_who_asks_a_flow_that_ends_without_a_reply_is_told_so(
    lives: Lives, way: str, is_taken: bool
) -> None:
    clerk = Mute(lives)
    if not is_taken:
        clerk.be_idle()
    asking = clerk.asking("end" if way == "by itself" else "question")
    flow = lives.flow(clerk.flow_id)
    given = {"flow_id": flow.flow_id, "expected_revision": flow.revision}
    if way == "cancel":
        lives.play(lives.flows.cancel(flow_id=flow.flow_id))
    elif way != "by itself":
        assert lives.play(getattr(lives.flows, way)(**given)).applied

    outcome = lives.play(asking)

    assert isinstance(outcome, Cancelled)
    assert lives.result(flow.flow_id).ended_at is not None
    assert {t.status for t in lives.children(flow.flow_id)} <= {"cancelled", "succeeded"}


@IN_MEMORY
def test_a_second_reply_changes_nothing_and_who_only_told_is_sent_none(lives: Lives) -> None:
    class Talkative(Clerk):
        async def answer(self, flow: FlowContext, message: Message) -> None:
            await flow.reply(message, "first")
            await flow.reply(message, "second")

    clerk = Talkative(lives)

    outcome = lives.play(lives.flows.ask(clerk.flow_id, "question"))
    report = clerk.tell("end")
    lives.result(clerk.flow_id)

    assert outcome == Succeeded("first")
    assert report.matched == 1
    [told] = [
        t for t in lives.children(clerk.flow_id) if t.runtime == "message" and t.input_json == "end"
    ]
    assert (told.status, told.result_json) == ("succeeded", None)


@IN_MEMORY
def test_a_caller_who_stops_waiting_for_a_reply_takes_nothing_back(lives: Lives) -> None:
    clerk = Clerk(lives)
    clerk.be_idle()
    asking = clerk.asking("question")

    asking.cancel()
    lives.pass_time(0.5)
    clerk.go_on()

    assert asking.cancelled()
    [asked] = [t for t in lives.children(clerk.flow_id) if t.runtime == "message" and not t.run_id]
    assert (asked.status, asked.result_json) == ("succeeded", {"heard": "question"})


# ---- refusals -------------------------------------------------------------------------------------


@IN_MEMORY
def test_who_writes_where_nobody_is_any_more_is_told(lives: Lives) -> None:
    clerk = Clerk(lives)
    clerk.tell("end")
    lives.result(clerk.flow_id)
    strange = lives.face(lambda runtime: bound(runtime, STRANGER))
    detached = lives.play(lives.flows.spawn_detached(task="t", runtime="acp")).flow
    before = lives.history(clerk.flow_id)

    reports = [
        lives.play(lives.flows.tell(clerk.flow_id, "too late")),
        lives.play(lives.flows.tell("no such flow", "hello")),
        lives.play(strange.tell(clerk.flow_id, "hello")),
        lives.play(lives.flows.tell(detached.flow_id, "hello")),
    ]

    assert [str(r.code) for r in reports] == ["late", "not_found", "not_found", "not_found"]
    assert {(r.matched, r.kept) for r in reports} == {(0, False)}
    with pytest.raises(NotAwaited):
        lives.play(lives.flows.ask(clerk.flow_id, "too late"))
    with pytest.raises(FlowNotFound):
        lives.play(lives.flows.ask("no such flow", "hello"))
    with pytest.raises(FlowNotFound):
        lives.play(strange.ask(clerk.flow_id, "hello"))
    assert lives.history(clerk.flow_id) == before


@pytest.mark.parametrize("how", [None, "kill"])
def test_no_more_is_kept_than_the_limit_allows_and_there_is_room_again_for_what_is_taken(
    lives: Lives, how: str | None
) -> None:
    lives.limits = Limits(messages=3, idle_seconds=60)
    clerk = Clerk(lives)
    clerk.be_idle()
    for number in range(3):
        clerk.tell(number)
    if how is not None:
        lives.restart(how)
        lives.pass_time(6)
    before = lives.history(clerk.flow_id)

    with pytest.raises(MailboxFull, match="3 messages"):
        clerk.tell("one too many", id="mail")
    with pytest.raises(MailboxFull, match="3 messages"):
        lives.play(lives.flows.ask(clerk.flow_id, "one too many"))
    assert lives.history(clerk.flow_id) == before
    clerk.go_on()
    # The refused one with an id was not taken in, so it may come again.
    assert clerk.tell("once more", id="mail").code == "matched"
    clerk.tell("end")

    assert clerk.got() == [0, 1, 2, "once more", "end"]


class Bill(msgspec.Struct):
    amount: int


@IN_MEMORY
def test_a_message_of_the_wrong_shape_is_refused_to_who_sends_it_and_the_wait_stays_open(
    lives: Lives,
) -> None:
    got: list[Any] = []

    async def clerk(flow: FlowContext) -> None:
        message = await flow.receive(schema=Bill)
        assert message is not None
        got.append(message.body)

    lives.registry.controller("typed")(clerk)
    flow_id = lives.play(make(lives.flows, controller_id="typed")).flow_id
    lives.pass_time(0.5)

    wrong = lives.play(lives.flows.tell(flow_id, {"amount": "a lot"}, id="mail"))
    with pytest.raises(NotAwaited, match="amount"):
        lives.play(lives.flows.ask(flow_id, {"amount": None}))
    right = lives.play(lives.flows.tell(flow_id, {"amount": 7}, id="mail"))
    lives.result(flow_id)

    assert (wrong.code, wrong.matched) == ("wrong_shape", 0)
    assert "amount" in wrong.reason
    assert right.code == "matched"
    assert got == [Bill(7)]


@RESTARTS
def test_what_came_early_and_does_not_fit_is_put_aside_and_the_next_is_taken(
    lives: Lives, between: str | None
) -> None:
    clerk = Clerk(lives, between, schema={"enum": ["right", "end"]})
    clerk.be_idle()
    for message in ("wrong", "right", 5, "end"):
        clerk.tell(message)

    clerk.go_on()

    assert clerk.got() == ["right", "end"]
    told = {
        t.input_json: (str(t.status), t.failure and t.failure.code)
        for t in lives.children(clerk.flow_id)
        if t.runtime == "message" and not t.run_id
    }
    refused = ("failed", "wrong_shape")
    assert told["wrong"] == told[5] == refused
    assert told["right"] == told["end"] == ("succeeded", None)


@IN_MEMORY
@pytest.mark.parametrize("message", [{1, 2}, float("nan"), {"k": object()}, "x" * 3_000_000])
def test_what_json_cannot_hold_is_refused_and_nothing_is_kept(lives: Lives, message: Any) -> None:
    clerk = Clerk(lives)
    before = lives.children(clerk.flow_id)

    for verb in (lives.flows.tell, lives.flows.ask):
        with pytest.raises(Exception, match="message") as raised:
            lives.play(verb(clerk.flow_id, message))
        assert type(raised.value).__name__ in (InvalidState.__name__, "StateTooLarge")

    assert lives.children(clerk.flow_id) == before


# ---- time -----------------------------------------------------------------------------------------


class Impatient(Clerk):
    """Waits a minute for his first message, and long for the second."""

    async def clerk(self, flow: FlowContext) -> None:
        first = await flow.receive(timeout=60, on_timeout="resume")
        second = await flow.receive(timeout=600)
        assert second is not None
        await self.answer(flow, second)
        await flow.finish(state_json=[first, second.body])


@RESTARTS
def test_a_clerk_whom_nobody_writes_in_time_goes_on_and_what_comes_later_is_for_his_next_turn(
    lives: Lives, between: str | None
) -> None:
    clerk = Impatient(lives, between)
    lives.pass_time(61)
    clerk.turn_over()
    clerk.tell("late")

    assert clerk.got() == [None, "late"]


@IN_MEMORY
@pytest.mark.parametrize("how", [None, "kill", "close"])
def test_what_is_told_after_a_clerks_patience_that_no_timer_has_ended_yet_is_for_his_next_turn(
    lives: Lives, how: str | None
) -> None:
    clerk = Impatient(lives)
    lives.world.clock.shift_ms += 61_000

    report = lives.play(lives.flows.tell(clerk.flow_id, "late"))
    if how is not None:
        lives.restart(how)

    assert (report.code, report.kept) == ("kept", True)
    assert clerk.got() == [None, "late"]


@IN_MEMORY
def test_who_asks_a_clerk_whose_patience_no_timer_has_ended_yet_is_answered_in_his_next_turn(
    lives: Lives,
) -> None:
    clerk = Impatient(lives)
    lives.world.clock.shift_ms += 61_000

    asking = clerk.asking("late")

    assert clerk.got() == [None, "late"]
    assert asking.result() == Succeeded({"heard": "late"})


@IN_MEMORY
def test_a_clerk_whose_patience_is_over_before_his_turn_leaves_the_messages_where_they_are(
    lives: Lives,
) -> None:
    class Hasty(Clerk):
        async def clerk(self, flow: FlowContext) -> None:
            await flow.wait("go")
            # No whole millisecond: the deadline has passed by the time of any turn.
            first = await flow.receive(timeout=0.0004, on_timeout="resume")
            messages = [await flow.receive(timeout=60) for _ in range(2)]
            await flow.finish(state_json=[first, *(m.body for m in messages if m)])

    clerk = Hasty(lives)
    for message in ("a", "b"):
        clerk.tell(message)
    lives.play(lives.flows.signal(flow_id=clerk.flow_id, name="go"))

    assert clerk.got() == [None, "a", "b"]


@IN_MEMORY
def test_a_clerk_may_fail_for_want_of_a_message(lives: Lives) -> None:
    clerk = Clerk(lives, timeout=60)
    lives.pass_time(61)

    ended = lives.result(clerk.flow_id)

    assert ended.failure is not None
    assert (ended.status, ended.failure.code) == ("failed", "ChildTimedOut")
