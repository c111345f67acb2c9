"""Notifiers without a network: the log, a function, and the choice among several."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import threading
from typing import Any

import pytest

from flowstead.errors import Fatal, Transient
from flowstead.model.update import Update
from flowstead.notifiers import CallableNotifier, LogNotifier, Notifier, RoutedNotifier
from flowstead.testing import RecordingNotifier
from tests.notifiers.stage import an_update

# ---- the log --------------------------------------------------------------------------------------


async def test_the_log_says_which_flow_and_never_what_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "flowstead")

    await LogNotifier().send(
        an_update(items=[{"Miller": 1}], bucket="Miller", current_step="Miller", failure="Miller")
    )

    (record,) = caplog.records
    assert (record.levelname, record.message) == ("INFO", "update.announced")
    facts = {"kind", "flow_id", "flow_status", "idempotency_key"}
    plain = vars(logging.makeLogRecord({})).keys()
    assert vars(record).keys() - plain - {"message", "asctime"} == facts
    assert [vars(record)[fact] for fact in sorted(facts)] == [
        "flow-1",
        "succeeded",
        "flow-1:done",
        "done",
    ]
    assert "Miller" not in str(vars(record))


async def test_a_host_whose_log_is_broken_is_told_all_the_same() -> None:
    class Broken(logging.Handler):
        tried = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.tried += 1
            raise OSError("the disk is full")

    broken, logger = Broken(), logging.getLogger("flowstead.notifiers.log")
    logger.addHandler(broken)
    logger.setLevel(logging.INFO)
    try:
        await LogNotifier().send(an_update())
    finally:
        logger.removeHandler(broken)
        logger.setLevel(logging.NOTSET)

    assert broken.tried == 1


# ---- a function -----------------------------------------------------------------------------------


class Told:
    """Functions of each sort, which remember what they were told and in which thread."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.threads: list[threading.Thread] = []

    def plain(self, update: Update) -> None:
        self.updates.append(update)
        self.threads.append(threading.current_thread())

    async def on_the_loop(self, update: Update) -> None:
        await asyncio.sleep(0)
        self.plain(update)

    def partly(self, update: Update) -> Any:
        return self.on_the_loop(update)

    async def __call__(self, update: Update) -> None:
        await self.on_the_loop(update)


@pytest.mark.parametrize("sort", ["on_the_loop", "partly", "__call__", "partial", "object"])
async def test_what_is_async_of_a_function_runs_on_the_loop(sort: str) -> None:
    told = Told()
    sorts: dict[str, Any] = {"partial": functools.partial(told.on_the_loop), "object": told}

    await CallableNotifier(sorts.get(sort) or getattr(told, sort)).send(an_update())

    assert told.updates == [an_update()]
    assert told.threads == [threading.current_thread()]


async def test_a_plain_function_runs_beside_the_loop_and_sees_its_context() -> None:
    answered, seen = threading.Event(), []
    tenant = contextvars.ContextVar("tenant", default="nobody")

    def blocks(update: Update) -> None:
        assert answered.wait(30)
        seen.append((update.flow_id, tenant.get(), threading.current_thread()))

    tenant.set("Acme")
    sending = asyncio.create_task(CallableNotifier(blocks).send(an_update()))
    await asyncio.sleep(0)
    assert not sending.done()

    answered.set()
    await sending

    ((flow_id, name, thread),) = seen
    assert (flow_id, name) == ("flow-1", "Acme")
    assert thread is not threading.current_thread()


@pytest.mark.parametrize(
    "error", [Fatal("no such user"), Transient("busy", retry_after=7), KeyError()]
)
async def test_what_a_function_raises_is_passed_on(error: Exception) -> None:
    def plain(update: Update) -> None:
        raise error

    async def on_the_loop(update: Update) -> None:
        raise error

    for function in (plain, on_the_loop):
        with pytest.raises(type(error)) as raised:
            await CallableNotifier(function).send(an_update())
        assert raised.value is error


async def test_a_function_that_hangs_is_given_up_and_counts_until_it_returns() -> None:
    released, begun, calls = threading.Event(), asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def hangs(update: Update) -> None:
        calls.append(update.idempotency_key)
        loop.call_soon_threadsafe(begun.set)
        assert released.wait(30)
        raise KeyError("nobody is left to hear this")

    notifier = CallableNotifier(hangs, threads=1)
    given_up = asyncio.create_task(notifier.send(an_update(idempotency_key="1")))
    await begun.wait()

    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    waiting = asyncio.create_task(notifier.send(an_update(idempotency_key="2")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert calls == ["1"]

    released.set()
    with pytest.raises(KeyError):
        await waiting
    assert calls == ["1", "2"]


async def test_a_send_that_is_cancelled_in_the_line_leaves_its_place() -> None:
    released, begun, calls = threading.Event(), asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def holds(update: Update) -> None:
        calls.append(update.idempotency_key)
        loop.call_soon_threadsafe(begun.set)
        assert released.wait(30)

    notifier = CallableNotifier(holds, threads=1)
    first, second, third = (
        asyncio.create_task(notifier.send(an_update(idempotency_key=key))) for key in "123"
    )
    await begun.wait()
    second.cancel()
    released.set()

    await asyncio.gather(first, third)

    assert second.cancelled()
    assert calls == ["1", "3"]


async def test_cancelling_reaches_an_async_function_at_its_await() -> None:
    reached = asyncio.Event()

    async def waits(update: Update) -> None:
        reached.set()
        await asyncio.get_running_loop().create_future()

    sending = asyncio.create_task(CallableNotifier(waits).send(an_update()))
    await reached.wait()
    sending.cancel()

    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_when_there_are_no_more_threads_it_says_so_and_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told()
    notifier = CallableNotifier(told.plain, threads=1)

    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError):
            await notifier.send(an_update())

    await notifier.send(an_update())
    assert told.updates == [an_update()]


def test_what_cannot_be_called_is_an_error_at_once() -> None:
    with pytest.raises(TypeError, match="function of one update, not str"):
        CallableNotifier("print")  # type: ignore[arg-type]


# ---- several channels -----------------------------------------------------------------------------

ODD_ORIGINS = [None, "slack", ["slack"], {}, {"channel": None}, {"channel": 7}, {"to": "slack"}]


@pytest.mark.parametrize("channel", ["slack", "mail"])
async def test_an_update_goes_back_by_the_channel_its_flow_was_asked_for(channel: str) -> None:
    channels = {"slack": RecordingNotifier(), "mail": RecordingNotifier()}
    update = an_update(requester_origin={"channel": channel})

    await RoutedNotifier(channels).send(update)

    told = {name: notifier.updates for name, notifier in channels.items()}
    assert told == {"slack": [], "mail": [], channel: [update]}


@pytest.mark.parametrize("origin", [*ODD_ORIGINS, {"channel": "sms"}, {"channel": ""}], ids=str)
async def test_what_no_channel_serves_goes_to_the_default(origin: Any) -> None:
    slack, rest = RecordingNotifier(), RecordingNotifier()

    await RoutedNotifier({"slack": slack}, default=rest).send(an_update(requester_origin=origin))

    assert (len(slack.updates), len(rest.updates)) == (0, 1)


@pytest.mark.parametrize("origin", ODD_ORIGINS, ids=str)
async def test_without_a_default_an_update_of_no_channel_is_given_up(origin: Any) -> None:
    slack = RecordingNotifier()

    with pytest.raises(Fatal, match="names no channel, and there is no default notifier"):
        await RoutedNotifier({"slack": slack}).send(an_update(requester_origin=origin))

    assert slack.attempts == 0


@pytest.mark.parametrize(
    ("channel", "named"), [("sms", "'sms'"), ("s\nms", r"'s\nms'"), ("s" * 90, f"'{'s' * 79}…'")]
)
async def test_without_a_default_a_channel_that_nobody_serves_is_named(
    channel: str, named: str
) -> None:
    with pytest.raises(Fatal) as raised:
        await RoutedNotifier({}).send(an_update(requester_origin={"channel": channel}))

    assert str(raised.value) == (
        f"Nobody serves the channel {named}, and there is no default notifier."
    )


async def test_what_the_channel_raises_is_passed_on() -> None:
    slack = RecordingNotifier()
    slack.fail_next(error=Transient("busy", retry_after=7))

    with pytest.raises(Transient, match="busy"):
        await RoutedNotifier({"slack": slack}).send(an_update())


async def test_the_channels_are_those_it_was_made_with() -> None:
    slack, channels = RecordingNotifier(), {}
    channels["slack"] = slack
    notifier: Notifier = RoutedNotifier(channels)

    channels.clear()
    await notifier.send(an_update())

    assert len(slack.updates) == 1


@pytest.mark.parametrize(
    ("channels", "default"), [({7: LogNotifier()}, None), ({"a": print}, None), ({}, print)]
)
def test_what_is_no_notifier_is_an_error_at_once(channels: Any, default: Any) -> None:
    with pytest.raises(TypeError, match=r"named by a string|must have `async def send"):
        RoutedNotifier(channels, default=default)
