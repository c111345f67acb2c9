"""The channel for tests: it does what it is told, no more often than it is told, and takes no time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flowstead.errors import Fatal
from flowstead.testing import RecordingNotifier
from tests.notifiers.stage import an_update

ONE, TWO, THREE = (an_update(idempotency_key=key) for key in ("1", "2", "3"))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_it_takes_everything_in_order_until_told_otherwise() -> None:
    notifier = RecordingNotifier()

    for update in (ONE, TWO, ONE):
        await notifier.send(update)

    assert notifier.updates == [ONE, TWO, ONE]
    assert notifier.delivered_once == [ONE, TWO]
    assert notifier.attempts == 3


async def test_a_receiver_that_knows_its_keys_keeps_the_first_of_each() -> None:
    notifier = RecordingNotifier()
    changed = an_update(idempotency_key="1", text="Changed.")

    await notifier.send(ONE)
    await notifier.send(changed)

    assert notifier.delivered_once == [ONE]


async def test_the_next_sends_fail_and_nothing_of_them_arrives() -> None:
    notifier = RecordingNotifier()
    notifier.fail_next(2)

    for update in (ONE, TWO):
        with pytest.raises(ConnectionError):
            await notifier.send(update)
    await notifier.send(THREE)

    assert (notifier.updates, notifier.attempts) == ([THREE], 3)


async def test_a_send_fails_with_the_error_that_was_asked_for() -> None:
    notifier, error = RecordingNotifier(), Fatal("no such user")
    notifier.fail_next(error=error)

    with pytest.raises(Fatal) as raised:
        await notifier.send(ONE)

    assert raised.value is error


async def test_a_dropped_answer_leaves_the_update_there() -> None:
    notifier = RecordingNotifier()
    notifier.drop_next()

    with pytest.raises(ConnectionResetError):
        await notifier.send(ONE)
    await notifier.send(ONE)

    assert (notifier.updates, notifier.delivered_once) == ([ONE, ONE], [ONE])


async def test_a_doubled_update_arrives_twice_and_is_one() -> None:
    notifier = RecordingNotifier()
    notifier.double_next()

    await notifier.send(ONE)
    await notifier.send(TWO)

    assert (notifier.updates, notifier.delivered_once) == ([ONE, ONE, TWO], [ONE, TWO])


async def test_a_channel_that_is_down_takes_nothing_until_it_comes_up() -> None:
    notifier = RecordingNotifier()
    notifier.go_down()

    for _ in range(3):
        with pytest.raises(ConnectionError):
            await notifier.send(ONE)
    notifier.come_up()
    await notifier.send(ONE)

    assert (notifier.updates, notifier.attempts) == ([ONE], 4)


async def test_while_a_channel_is_down_nothing_else_is_used_up() -> None:
    notifier = RecordingNotifier()
    notifier.go_down()
    notifier.fail_next(error=Fatal("later"))
    notifier.double_next()
    notifier.drop_next()

    with pytest.raises(ConnectionError):
        await notifier.send(ONE)
    notifier.come_up()
    with pytest.raises(Fatal):
        await notifier.send(ONE)
    with pytest.raises(ConnectionResetError):
        await notifier.send(ONE)

    assert notifier.updates == [ONE, ONE]


async def test_a_held_answer_comes_when_it_is_released() -> None:
    notifier = RecordingNotifier()
    notifier.hold()
    sends = [asyncio.create_task(notifier.send(update)) for update in (ONE, TWO)]

    assert await notifier.wait_for(2) == [ONE, TWO]
    await settle()
    assert not any(send.done() for send in sends)

    notifier.release()
    await asyncio.gather(*sends)
    await notifier.send(THREE)


async def test_who_was_released_is_not_held_again_by_what_comes_after() -> None:
    notifier = RecordingNotifier()
    notifier.hold()
    first = asyncio.create_task(notifier.send(ONE))
    await notifier.wait_for(1)

    notifier.release()
    notifier.hold()
    second = asyncio.create_task(notifier.send(TWO))
    await first
    await settle()

    assert not second.done()
    notifier.release()
    await second


async def test_an_answer_that_was_held_can_be_lost() -> None:
    notifier = RecordingNotifier()
    notifier.hold()
    notifier.drop_next()
    send = asyncio.create_task(notifier.send(ONE))
    await notifier.wait_for(1)

    notifier.release()

    with pytest.raises(ConnectionResetError):
        await send


async def test_cancelling_a_held_send_leaves_the_update_there() -> None:
    notifier = RecordingNotifier()
    notifier.hold()
    send = asyncio.create_task(notifier.send(ONE))
    await notifier.wait_for(1)

    send.cancel()
    with pytest.raises(asyncio.CancelledError):
        await send
    notifier.release()

    assert notifier.updates == [ONE]


async def test_several_may_wait_for_what_arrives_and_for_what_is_tried() -> None:
    notifier = RecordingNotifier()
    notifier.fail_next()
    first, both = (asyncio.create_task(notifier.wait_for(count)) for count in (1, 2))
    tried = asyncio.create_task(notifier.wait_for_attempts(1))
    given_up = asyncio.create_task(notifier.wait_for(1))
    await settle()
    given_up.cancel()

    with pytest.raises(ConnectionError):
        await notifier.send(ONE)
    await tried
    assert not first.done()
    await notifier.send(ONE)
    assert await first == [ONE]
    assert not both.done()
    await notifier.send(TWO)

    assert await both == [ONE, TWO]
    assert await notifier.wait_for(0) == []


def test_it_outlives_the_loop_of_a_process_that_crashed() -> None:
    notifier = RecordingNotifier()
    notifier.hold()

    async def crashes() -> list[Any]:
        sends = [asyncio.ensure_future(notifier.send(ONE))]
        await notifier.wait_for(1)
        return sends

    loop = asyncio.new_event_loop()
    left_behind = loop.run_until_complete(crashes())
    loop.close()

    async def comes_back() -> None:
        notifier.release()
        await notifier.send(ONE)
        await notifier.wait_for(2)

    asyncio.run(comes_back())

    assert notifier.updates == [ONE, ONE]
    for send in left_behind:
        send._log_destroy_pending = False


@pytest.mark.parametrize("ask", ["fail_next", "drop_next", "double_next"])
@pytest.mark.parametrize("count", [0, -1])
def test_none_of_the_next_sends_is_an_error(ask: str, count: int) -> None:
    with pytest.raises(ValueError, match="next"):
        getattr(RecordingNotifier(), ask)(count)
