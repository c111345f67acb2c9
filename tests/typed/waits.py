"""Waits, approvals, messages and updates as users write them. Checked, never run."""

from __future__ import annotations

from typing import Any, assert_type

import msgspec

from flowstead import (
    CallableNotifier,
    Decision,
    DigestTime,
    FlowContext,
    LogNotifier,
    Message,
    Notifier,
    OpenWait,
    Registry,
    Retry,
    RoutedNotifier,
    Runtime,
    SessionFlows,
    SignalReport,
    Step,
    Update,
    VoteReport,
    WaitStep,
    WebhookNotifier,
    open_runtime,
)

registry = Registry()


class Reply(msgspec.Struct):
    """An answer with a shape."""

    text: str


@registry.controller("typed/waits")
async def waits(flow: FlowContext) -> None:
    """Every way to stand still."""
    assert_type(await flow.wait("reply", kind="reply", thread=7, schema=Reply), Any)
    opened = await flow.open_wait("other", key={"id": "x"}, timeout=60, on_timeout="resume")
    assert_type(opened, WaitStep)
    assert_type(opened.token, str | None)
    timer = await flow.start_timer("patience", 60)
    assert_type(await flow.select(opened, timer), Step)
    assert_type(await flow.sleep("nap", wake_at=1_800_000_000_000), None)
    decision = await flow.approve("Pay?", {"amount": 82}, roles={"lead": 1}, expires=3600)
    assert_type(decision, Decision)
    await flow.run("pay", decision.items, approval=decision)
    message = await flow.receive("orders", on_timeout="resume", timeout=5)
    assert_type(message, Message | None)
    if message is not None:
        await flow.reply(message, {"seen": True})
    await flow.notify("told", {"n": 1})
    await flow.later("put by", bucket="daily")


async def outside(runtime: Runtime, flows: SessionFlows) -> None:
    """Every way to answer."""
    assert_type(await flows.signal(kind="reply", thread=7, payload=[1], id="s-1"), SignalReport)
    assert_type(await flows.tell("f", 1), SignalReport)
    assert_type(await flows.list_waits(), list[OpenWait])
    assert_type(await flows.list_updates(status="delivery_failed"), list[Update])
    assert_type(await runtime.answer("token", {"ok": True}), SignalReport)
    vote = await flows.vote("approve", approver="ada", digest="d", token="t")
    assert_type(vote, VoteReport)


class Mine:
    """A notifier of the host's own."""

    async def send(self, update: Update) -> None:
        """Take one update over."""


def channels() -> list[Notifier]:
    """Everything that can be a notifier."""
    web = WebhookNotifier("https://example.org/hook", secrets=["whsec_" + "a" * 32])
    routed = RoutedNotifier({"slack": Mine()}, default=LogNotifier())
    return [Mine(), LogNotifier(), CallableNotifier(print), routed, web]


def opened() -> Runtime:
    """A runtime that tells."""
    return open_runtime(
        registry=registry,
        notifier=Mine(),
        deliveries=Retry(max_attempts=3),
        digest_time=DigestTime(at="17:30", timezone="Europe/Berlin"),
    )
