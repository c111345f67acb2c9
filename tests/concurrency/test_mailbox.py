"""The mailbox: first in first out, bounded, and deaf to callers who have gone."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from flowstead import Applied, FlowContext, Limits, Registry, Rejected
from flowstead.engine.mailbox import Envelope, Mailbox, Reply
from flowstead.model.command import Recover, Tick
from tests.faulty_store import FaultyStore, flows_of, new_flow, running, settle, soon


def envelope(name: str = "") -> Envelope:
    return Envelope(Tick(), name, asyncio.get_running_loop().create_future())


def filled(bound: int) -> Mailbox:
    mailbox = Mailbox(bound)
    for number in range(bound):
        mailbox.put_nowait(envelope(str(number)))
    return mailbox


def names(mailbox: Mailbox, most: int = 100) -> list[str]:
    return [taken.actor for taken in mailbox.take(most)]


async def test_first_in_is_first_out():
    mailbox = Mailbox(10)

    for name in "abc":
        mailbox.put_nowait(envelope(name))

    assert names(mailbox) == ["a", "b", "c"]
    assert len(mailbox) == 0


async def test_taking_takes_no_more_than_asked_and_leaves_the_rest_in_order():
    mailbox = filled(5)

    assert names(mailbox, 2) == ["0", "1"]
    assert len(mailbox) == 3
    assert names(mailbox, 100) == ["2", "3", "4"]
    assert names(mailbox, 1) == []


async def test_a_full_mailbox_refuses_and_keeps_what_it_has():
    mailbox = filled(2)

    with pytest.raises(anyio.WouldBlock):
        mailbox.put_nowait(envelope("late"))

    assert names(mailbox) == ["0", "1"]


async def test_reports_of_the_runtime_pass_the_bound_in_their_turn():
    mailbox = filled(2)

    mailbox.put_nowait(envelope("report"), bounded=False)

    assert names(mailbox) == ["0", "1", "report"]


async def test_waiting_for_room_where_there_is_room_returns_at_once():
    mailbox = Mailbox(1)

    await soon(mailbox.wait_for_room())

    assert len(mailbox) == 0


class Queue:
    """Callers who wait for room and put an envelope in as soon as they may."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox

    def line_up(self, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._put(name))

    async def _put(self, name: str) -> None:
        await self.mailbox.wait_for_room()
        self.mailbox.put_nowait(envelope(name))


async def test_waiters_come_in_by_the_order_they_stood_in_line():
    mailbox = filled(1)
    queue = Queue(mailbox)
    waiters = [queue.line_up(name) for name in "abc"]
    await settle()
    entered: list[str] = []

    for _ in range(4):
        entered += names(mailbox, 1)
        await settle()

    assert entered == ["0", "a", "b", "c"]
    assert all(waiter.done() for waiter in waiters)


async def test_as_many_waiters_come_in_as_places_were_freed():
    mailbox = filled(4)
    queue = Queue(mailbox)
    waiters = [queue.line_up(name) for name in "abc"]
    await settle()

    mailbox.take(2)
    await settle()

    assert [waiter.done() for waiter in waiters] == [True, True, False]
    waiters[2].cancel()


async def test_a_waiter_cancelled_in_line_is_passed_over():
    mailbox = filled(1)
    queue = Queue(mailbox)
    first, second = queue.line_up("a"), queue.line_up("b")
    await settle()

    first.cancel()
    mailbox.take(1)
    await settle()

    assert first.cancelled()
    assert second.done()
    assert names(mailbox) == ["b"]


async def test_a_waiter_cancelled_after_it_was_let_in_passes_its_place_on():
    mailbox = filled(1)
    queue = Queue(mailbox)
    first, second = queue.line_up("a"), queue.line_up("b")
    await settle()

    mailbox.take(1)
    first.cancel()
    await settle()

    assert first.cancelled()
    assert second.done()
    assert names(mailbox) == ["b"]


async def test_a_waiter_whose_room_was_taken_waits_for_the_next():
    mailbox = filled(1)
    waiter = Queue(mailbox).line_up("a")
    await settle()

    mailbox.take(1)
    mailbox.put_nowait(envelope("quick"))
    await settle()

    assert not waiter.done()
    assert names(mailbox) == ["quick"]
    await settle()
    assert names(mailbox) == ["a"]


async def test_a_waiter_whose_room_was_taken_keeps_its_place_before_later_ones():
    mailbox = filled(1)
    queue = Queue(mailbox)
    first, second = queue.line_up("a"), queue.line_up("b")
    await settle()

    mailbox.take(1)
    mailbox.put_nowait(envelope("quick"))
    await settle()
    mailbox.take(1)
    await settle()

    assert names(mailbox) == ["a"]
    await settle()
    assert first.done()
    assert second.done()


async def test_settling_a_reply_nobody_waits_for_any_more_does_nothing():
    abandoned = envelope()
    abandoned.reply.cancel()

    abandoned.answer(Reply(None))
    abandoned.fail(RuntimeError("late"))

    assert abandoned.reply.cancelled()


async def test_the_first_answer_stands():
    answered = envelope()

    answered.answer(Reply(b"first"))
    answered.answer(Reply(b"second"))
    answered.fail(RuntimeError("third"))

    assert answered.reply.result().doc == b"first"


async def test_a_full_mailbox_answers_overloaded_at_once_and_nothing_changes():
    store = FaultyStore()
    async with running(store, limits=Limits(mailbox=3)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.hold()
        calls = [
            asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0, state_json=0))
        ]
        await store.wait_held()
        calls += [
            asyncio.create_task(
                flows.update(flow_id=flow_id, expected_revision=number, state_json=number)
            )
            for number in (1, 2, 3)
        ]
        await settle()

        refused = await soon(flows.update(flow_id=flow_id, expected_revision=4, state_json="late"))

        assert isinstance(refused, Rejected)
        assert (refused.code, refused.current) == ("overloaded", None)
        assert not any(call.done() for call in calls)
        store.release()
        answers = await soon(asyncio.gather(*calls))
        assert all(isinstance(answer, Applied) for answer in answers)
        flow = await flows.get(flow_id)
        assert flow and (flow.revision, flow.state_json) == (4, 3)


async def test_a_flow_with_a_full_mailbox_does_not_slow_another_one():
    store = FaultyStore()
    async with running(store, limits=Limits(mailbox=2)) as runtime:
        flows = flows_of(runtime)
        busy, calm = await new_flow(flows), await new_flow(flows)
        store.hold()
        flood = [
            asyncio.create_task(flows.update(flow_id=busy, expected_revision=0)) for _ in range(20)
        ]
        await store.wait_held()
        before = len(store.batches)

        calmly = asyncio.create_task(flows.update(flow_id=calm, expected_revision=0))
        await settle()
        store.release()

        assert (await soon(calmly)).applied
        assert len(store.batches) <= before + 2
        codes = [answer.code for answer in await soon(asyncio.gather(*flood))]
        assert codes.count(None) == 1
        assert set(codes) == {None, "revision_conflict", "overloaded"}


async def test_a_controller_waits_for_room_rather_than_being_refused():
    store, registry = FaultyStore(), Registry()
    go = asyncio.Event()

    @registry.controller("writer")
    async def writer(flow: FlowContext) -> None:
        await go.wait()
        await flow.update(current_step="written")

    async with running(store, registry=registry, limits=Limits(mailbox=1)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "writer")
        await settle()
        store.hold()
        # Refused ones fill the mailbox just as well, and leave the flow as its controller knows it.
        linked = asyncio.create_task(flows.run_task(flow_id=flow_id, task="t", runtime="cli"))
        await store.wait_held()
        refused = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=99))
        await settle()
        go.set()
        await settle()
        assert runtime.statistics().waiting_mutations == 1

        store.release()

        ended = await soon(flows.result(flow_id))
        assert (ended.status, ended.current_step) == ("succeeded", "written")
        assert (await soon(linked)).created
        assert (await soon(refused)).code == "revision_conflict"


async def test_the_end_of_a_child_is_accepted_by_a_full_mailbox():
    store = FaultyStore()
    go = asyncio.Event()

    async def child(ctx: object, given: object) -> str:
        await go.wait()
        return "done"

    async with running(store, limits=Limits(mailbox=1)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        made = await flows.run_task(flow_id=flow_id, task="t", run=child)
        await settle()
        store.hold()
        calls = [asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))]
        await store.wait_held()
        calls.append(asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=1)))
        await settle()

        go.set()
        await settle()
        store.release()

        assert (await soon(flows.wait_task(made.unwrap().task_id))).result == "done"
        assert all(answer.applied for answer in await soon(asyncio.gather(*calls)))


async def test_a_mailbox_knows_what_kind_of_command_waits_in_it() -> None:
    mailbox = Mailbox(4)
    assert not mailbox.holds(Tick)

    mailbox.put_nowait(Envelope(Recover(), "runtime", asyncio.get_running_loop().create_future()))
    assert not mailbox.holds(Tick)

    mailbox.put_nowait(Envelope(Tick(), "runtime", asyncio.get_running_loop().create_future()))
    assert mailbox.holds(Tick)

    mailbox.take(2)
    assert not mailbox.holds(Tick)
