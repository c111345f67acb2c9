"""One flow that stands in a wait, and lives that are killed around it; the last of them sees it to its end.

A life tells each event once it is on disk (`event`), each time the controller is entered (`entered`), each child
whose code begins (`ran`), what came of each call (`answered`), and the commit it stands before (`held`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from flowstead import (
    ChildTimedOut,
    FlowContext,
    Limits,
    NotApproved,
    Registry,
    Runtime,
    SessionFlows,
    TaskContext,
    open_runtime,
)
from tests.crash.carrier import DELIVERIES, Carrier
from tests.crash.harness import PATIENCE, Journal
from tests.crash.ladder import TOP, AheadClock, HeldStore
from tests.crash.scenes import bind, plain, quiet, records

CONTROLLER: Final = "stands"
VOTERS: Final = ("ann", "bob", "cyd")
ITEMS: Final = {"pay": 7}
LONG: Final = 600.0


class Play:
    """The code of one life, and what it does from outside."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.registry = Registry()
        self.registry.task(self.pay, name="pay")
        self.registry.controller(CONTROLLER)(self.stands)
        self._seen: Counter[str] = Counter()
        self._changed = asyncio.Event()

    # ---- code -------------------------------------------------------------------------------------

    async def pay(self, ctx: TaskContext, given: Any) -> Any:
        self.journal.write(ran=ctx.run_id, attempt=ctx.attempt)
        return given

    async def stands(self, flow: FlowContext) -> None:
        self.journal.write(entered=flow.flow_id)
        how: Callable[[FlowContext], Awaitable[Any]] = getattr(self, flow.state_json["how"])
        found = await how(flow)
        await flow.finish(state_json={"found": found})

    async def waits(self, flow: FlowContext) -> Any:
        return await flow.wait("ask", topic=1)

    async def waits_or_fails(self, flow: FlowContext) -> Any:
        try:
            return await flow.wait("ask", timeout=LONG, topic=1)
        except ChildTimedOut:
            return "too late"

    async def waits_or_goes_on(self, flow: FlowContext) -> Any:
        return await flow.wait("ask", timeout=LONG, on_timeout="resume", topic=1)

    async def waits_or_blocks(self, flow: FlowContext) -> Any:
        return await flow.wait("ask", timeout=LONG, on_timeout="block", topic=1)

    async def sleeps(self, flow: FlowContext) -> Any:
        await flow.sleep("ask", LONG)
        return "slept"

    async def selects(self, flow: FlowContext) -> Any:
        first = await flow.open_wait("first", topic=1)
        second = await flow.open_wait("second", topic=2)
        winner = await flow.select(first, second)
        return [winner.name, await winner.result()]

    async def receives(self, flow: FlowContext) -> Any:
        message = await flow.receive("box", name="ask")
        assert message is not None
        return message.body

    async def approves(self, flow: FlowContext) -> Any:
        decision = await flow.approve(
            "shall it be paid?", ITEMS, name="ask", approvers=VOTERS, quorum=2, veto=False
        )
        if not decision.approved:
            return decision.verdict
        paid = await flow.run("pay", decision.items, name="paid", approval=decision)
        try:
            await flow.run("pay", decision.items, name="paid twice", approval=decision)
        except NotApproved:
            return paid
        return "paid twice"

    # ---- from outside -----------------------------------------------------------------------------

    async def tell_events(self, flows: SessionFlows) -> None:
        async with flows.watch() as events:
            self.journal.write(watching=True)
            async for event in events:
                self._seen[event.type] += 1
                self._changed.set()
                self.journal.write(event=event.type)

    async def call(self, flows: SessionFlows, runtime: Runtime, call: dict[str, Any]) -> None:
        """Do one thing, once an event has been seen."""
        while call.get("on") is not None and not self._seen[call["on"]]:
            self._changed.clear()
            await self._changed.wait()
        given, answer = call.get("given", {}), None
        flow_id = call.get("flow", TOP)
        match call["do"]:
            case "create":
                await flows.create_managed(
                    controller_id=given.get("controller", CONTROLLER),
                    goal="stand",
                    flow_id=flow_id,
                    state_json={"how": given.get("how")},
                )
            case "wait":
                wait = dict(given)
                for name in ("deadlineAt", "wakeAt"):
                    if name in wait:
                        wait[name] += runtime.core.engine.clock.now()
                await flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json=wait)
            case "vote":
                [asked] = await flows.list_waits(flow_id)
                assert asked.approval is not None
                answer = await flows.vote(
                    "approve",
                    approver=given["approver"],
                    digest=asked.approval.digest,
                    flow_id=flow_id,
                    name="ask",
                )
            case "tell":
                answer = await flows.tell(flow_id, given["message"], inbox="box", id=given["id"])
            case "signal":  # pragma: no branch
                answer = await flows.signal(**given)
        self.journal.write(answered=call["do"], report=plain(answer))


def stand(
    journal: Journal,
    *,
    path: str,
    folder: str,
    calls: list[dict[str, Any]],
    until: str = "killed",
    hold: dict[str, str] | None = None,
    after: bool = False,
    ahead: float = 0.0,
    park_seconds: float = 3600.0,
    mood: str = "well",
) -> None:
    """Live with the file, do what is to be done in order, and wait to be killed, or for the end.

    Args:
        calls: What to do: `do` with what is `given`, each once its event (`on`) has been seen in this life; to
            the flow `top`, unless it names another one.
        until: How long to live: until it is `killed`, the flow has `ended`, or everything is at `rest`. Then all
            records are told.
        hold, after: The commit to stand still at, before or after it, if any.
        ahead: How many seconds later it is than the system says.
        park_seconds: How long a controller stands before it is parked.
        mood: How the notifier is.
    """

    async def main() -> None:
        play = Play(journal)
        async with open_runtime(
            HeldStore(path, journal, hold or {}, after=after),
            registry=play.registry,
            limits=Limits(park_seconds=park_seconds),
            clock=AheadClock(ahead),
            notifier=Carrier(f"{folder}/delivered", mood=mood),
            deliveries=DELIVERIES,
        ) as runtime:
            flows = bind(runtime)
            telling = asyncio.create_task(play.tell_events(flows))
            for call in calls:
                await play.call(flows, runtime, call)
            journal.write(called=True)
            if until == "killed":
                await telling
            async with asyncio.timeout(PATIENCE):
                if until == "ended":
                    await flows.result(TOP)
                    while await flows.list_updates(status="pending"):  # noqa: ASYNC110
                        await asyncio.sleep(0.002)
            await quiet(runtime)
            told = {"records": await records(runtime), "waits": plain(await flows.list_waits())}
            journal.write(ready=True, updates=plain(await flows.list_updates()), **told)
            telling.cancel()
        journal.write(closed=True)

    asyncio.run(main())


SCENES: dict[str, Callable[..., None]] = {stand.__name__: stand}
