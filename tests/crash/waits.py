"""What waits under a loaded store, and who wakes it: flows that stand in waits of every kind, and those who answer.

Whatever is sent carries a payload of its own, so that the checker can tell where it has come out. What has an id is
told before it is sent, and sent again by the next life until somebody has answered it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any, Final, Protocol

import anyio
import msgspec

from flowstead import (
    ChildCancelled,
    FlowContext,
    FlowError,
    NotApproved,
    OpenWait,
    Registry,
    Runtime,
    SessionFlows,
    Succeeded,
)
from flowstead.model.approval import Rules
from flowstead.model.flow import Flow
from flowstead.rules.approvals import shown_digest
from tests.crash.harness import PATIENCE, Journal

WAITER: Final = "load/waiter"
VOTERS: Final = ("ann", "bob", "cyd")
PROMPT: Final = "shall it be paid?"
BOX: Final = "box"
MOST_TOPICS: Final = 24
COMMON: Final = "what everybody waits for"
LIVE: Final = ("queued", "running", "waiting", "blocked")
KINDS: Final = ("key", "key", "patient", "sleep", "select", "receive", "approve", "notify")
RULES: Final = Rules(quorum=2, approvers=VOTERS, veto=())


class Teller(Protocol):
    """How a load tells what it does."""

    journal: Journal
    seed: int

    @property
    def mine(self) -> SessionFlows: ...

    def begin(self, name: str, **fact: Any) -> int:
        """Tell of a call that is about to be made."""
        ...

    def done(self, number: int, **fact: Any) -> None:
        """Tell of its answer."""
        ...

    def wrong(self, what: str) -> None:
        """Tell of an answer that must not be."""
        ...


class Waiters:
    """The controller that waits, and the clients that answer."""

    def __init__(self, load: Teller, registry: Registry) -> None:
        self.load = load
        self.runtime: Runtime | None = None
        self.topics: list[str] = []
        self.open: list[OpenWait] = []
        self._early: deque[str] = deque(maxlen=MOST_TOPICS)
        self._sent = 0
        registry.controller(WAITER)(self.waiter)

    # ---- the controller ---------------------------------------------------------------------------

    async def waiter(self, flow: FlowContext) -> None:
        """Stands in one wait after another, as planned, and tells what each came to."""
        for number, kind in enumerate(flow.state_json["plan"]):
            step = f"{number}-{kind}"
            try:
                found = await self._stand(flow, kind, step)
            except ChildCancelled:
                found = "withdrawn"
            self.load.journal.write(found=found, flow=flow.flow_id, step=step, at=self.now())

    async def _stand(self, flow: FlowContext, kind: str, step: str) -> Any:
        topic = flow.state_json["topic"]
        match kind:
            case "key":
                return await flow.wait(step, topic=topic)
            case "patient":
                how = "block" if len(topic) % 2 else "resume"
                return await flow.wait(
                    step, timeout=0.15, on_timeout=how, remind=[0.1], topic=topic
                )
            case "sleep":
                await flow.sleep(step, 0.02 + (len(flow.flow_id) % 5) * 0.05)
                return "slept"
            case "select":
                return await self._select(flow, step, topic)
            case "receive":
                return await self._receive(flow, step)
            case "approve":
                return await self._approve(flow, step)
            case _:
                await flow.notify(f"{flow.flow_id} is at {step}", name=step)
                await flow.later(f"{flow.flow_id} was at {step}", name=f"{step}/later")
                return "told"

    async def _select(self, flow: FlowContext, step: str, topic: str) -> Any:
        answer = await flow.open_wait(f"{step}/answer", topic=topic)
        alarm = await flow.start_timer(f"{step}/alarm", 0.12)
        winner = await flow.select(answer, alarm)
        return [winner.name, msgspec.to_builtins(await winner.outcome())]

    async def _receive(self, flow: FlowContext, step: str) -> Any:
        message = await flow.receive(BOX, name=step)
        assert message is not None
        await flow.reply(message, {"re": message.body})
        return message.body

    async def _approve(self, flow: FlowContext, step: str) -> Any:
        decision = await flow.approve(
            PROMPT,
            items_of(flow.flow_id),
            name=step,
            approvers=VOTERS,
            quorum=RULES.quorum,
            veto=False,
        )
        if not decision.approved:
            return decision.verdict
        try:
            paid = await flow.run("quick", decision.items, name=f"{step}/paid", approval=decision)
        except NotApproved:
            return "not approved"
        assert paid["given"] == decision.items, paid
        return decision.verdict

    # ---- the clients ------------------------------------------------------------------------------

    def plan(self, rng: random.Random) -> dict[str, Any]:
        """What a new waiter is to stand in."""
        return {"plan": rng.choices(KINDS, k=rng.randrange(1, 4)), "topic": self.topic(rng)}

    def topic(self, rng: random.Random) -> str:
        """What to wait for: what others wait for as well, what was answered early, or something new."""
        if rng.random() < 0.25:
            return COMMON
        if self._early and rng.random() < 0.3:
            return self._early.popleft()
        if self.topics and (len(self.topics) >= MOST_TOPICS or rng.random() < 0.6):
            return rng.choice(self.topics)
        return self._new_topic()

    def _new_topic(self) -> str:
        self._sent += 1
        self.topics.append(f"topic-{self.load.seed}-{self._sent}")
        del self.topics[:-MOST_TOPICS]
        return self.topics[-1]

    def own_wait(self, rng: random.Random) -> dict[str, Any]:
        """The wait of a flow itself."""
        wait: dict[str, Any] = {"topic": self.topic(rng), "prompt": "well?"}
        if rng.random() < 0.5:
            now = self.now()
            how = rng.choice(("fail", "resume", "resume", "block"))
            wait |= {"deadlineAt": now + rng.randrange(20, 300), "onTimeout": how}
            wait |= {"remindAt": now + 10} if rng.random() < 0.3 else {}
        return wait

    async def look(self, rng: random.Random) -> None:
        """See what is open; others answer from that."""
        self.open = await self.load.mine.list_waits(limit=64)
        for wait in self.open[-MOST_TOPICS:]:
            topic = wait.key.get("topic")
            if isinstance(topic, str) and topic not in self.topics:
                self.topics.append(topic)

    async def signal(self, rng: random.Random) -> None:
        """Answer whoever waits for a topic; now and then before anybody does, or twice at once."""
        kind = rng.random()
        if kind < 0.1:
            topic = COMMON
        elif kind < 0.3:
            topic = f"early-{self.load.seed}-{self._sent}"
            self._early.append(topic)
        else:
            topic = rng.choice(self.topics or [COMMON])
        is_kept = topic in self._early or rng.random() < 0.7
        spec = self._spec(rng, "key", topic=topic, is_kept=is_kept)
        # One that is not kept may be turned away first, and wake somebody the next moment.
        if spec["id"] is not None and is_kept and rng.random() < 0.1:
            codes = await asyncio.gather(self.send(spec), self.send(spec))
            taken = [code for code in codes if code in ("matched", "kept")]
            if len(taken) > 1:
                self.load.wrong(f"{spec} was taken twice at once: {codes}")
        else:
            await self.send(spec)

    async def answer(self, rng: random.Random) -> None:
        """Answer one open wait by its token, or by its flow and name."""
        if not self.open:
            return
        wait = self.open.pop(rng.randrange(len(self.open)))
        if wait.kind == "approval":
            await self._vote(rng, wait)
        elif wait.kind == "message":
            await self._say(rng, wait.flow_id)
        elif wait.kind == "signal" and wait.token is not None:
            if wait.name is not None and rng.random() < 0.5:
                spec = self._spec(rng, "step", flow=wait.flow_id, step=wait.name)
            else:
                spec = self._spec(rng, "token", token=wait.token, flow=wait.flow_id)
            await self.send(spec)
        if wait.task_id is not None and rng.random() < 0.05:
            await self.load.mine.cancel_task(wait.task_id)

    async def early(self, rng: random.Random, flow: Flow) -> None:
        """Bring a flow what it may not have asked for yet: an answer, a vote, a message, a question."""
        plan = list(enumerate(flow.state_json["plan"]))
        number, kind = rng.choice(plan)
        step = f"{number}-{kind}"
        if kind == "approve":
            await self._cast(rng, flow.flow_id, step, shown(flow.flow_id, step))
        elif kind in ("key", "patient"):
            await self.send(self._spec(rng, "step", flow=flow.flow_id, step=step))
        else:
            await self._say(rng, flow.flow_id)

    async def _say(self, rng: random.Random, flow_id: str) -> None:
        await (self._tell if rng.random() < 0.6 else self._ask)(rng, flow_id)

    async def _tell(self, rng: random.Random, flow_id: str) -> None:
        await self.send(self._spec(rng, "tell", flow=flow_id))

    async def _ask(self, rng: random.Random, flow_id: str) -> None:
        spec = self._spec(rng, "ask", flow=flow_id) | {"id": None}
        number = self.load.begin("ask", spec=spec)
        fact: dict[str, Any] = {}
        with anyio.move_on_after(0.5):
            try:
                outcome = await self.load.mine.ask(flow_id, spec["payload"], inbox=BOX)
            except FlowError as error:
                fact = {"refused": type(error).__name__}
            else:
                if isinstance(outcome, Succeeded):
                    if outcome.result != {"re": spec["payload"]}:
                        self.load.wrong(f"{spec} was answered {outcome}")
                    fact = {"ack": "sent", "code": "replied"}
        self.load.done(number, **fact)

    async def _vote(self, rng: random.Random, wait: OpenWait) -> None:
        assert wait.approval is not None and wait.name is not None
        token = wait.token if rng.random() < 0.5 else None
        await self._cast(rng, wait.flow_id, wait.name, wait.approval.digest, token=token)

    async def _cast(
        self, rng: random.Random, flow_id: str, step: str, digest: str, token: str | None = None
    ) -> None:
        approver = rng.choice(VOTERS)
        decision = "approve" if rng.random() < 0.8 else "reject"
        await self.cast(flow_id, step, digest, approver, decision, token=token)

    async def cast(
        self,
        flow_id: str,
        step: str,
        digest: str,
        approver: str,
        decision: str,
        token: str | None = None,
    ) -> None:
        """Cast one vote, and tell what it came to."""
        number = self.load.begin("vote")
        if token is not None:
            assert self.runtime is not None
            report = await self.runtime.vote(token, decision, approver=approver, digest=digest)
        else:
            report = await self.load.mine.vote(
                decision, approver=approver, digest=digest, flow_id=flow_id, name=step
            )
        if not (report.counted or report.kept):
            self.load.done(number, refused=report.reason)
            return
        told = {"owner_of_vote": flow_id, "step": step, "approver": approver, "decision": decision}
        code = "counted" if report.counted else "kept"
        self.load.done(number, ack="vote", code=code, verdict=report.verdict, **told)

    def _spec(self, rng: random.Random, form: str, **fields: Any) -> dict[str, Any]:
        self._sent += 1
        name = f"sig-{self.load.seed}-{self._sent}"
        signal_id = name if rng.random() < 0.85 else None
        return {"form": form, "id": signal_id, "payload": {"n": name}, **fields}

    async def send(self, spec: dict[str, Any], *, again: bool = False) -> str:
        """Send what is said to be sent, and tell what became of it."""
        number = self.load.begin("send", spec=spec)
        mine, payload, signal_id = self.load.mine, spec["payload"], spec["id"]
        match spec["form"]:
            case "key":
                given: dict[str, Any] = {} if spec.get("is_kept", True) else {"lifetime": None}
                report = await mine.signal(
                    payload=payload, id=signal_id, topic=spec["topic"], **given
                )
            case "step":
                report = await mine.signal(
                    payload=payload, id=signal_id, flow_id=spec["flow"], name=spec["step"]
                )
            case "token":
                assert self.runtime is not None
                report = await self.runtime.answer(spec["token"], payload, id=signal_id)
            case _:
                report = await mine.tell(spec["flow"], payload, inbox=BOX, id=signal_id)
        told = {"flows": report.flow_ids, "again": again}
        self.load.done(number, ack="sent", code=report.code, **told)
        return report.code

    # ---- between lives ----------------------------------------------------------------------------

    def now(self) -> int:
        """What time the runtime believes it is."""
        assert self.runtime is not None
        return self.runtime.core.engine.clock.now()

    async def see_through(self) -> None:
        """Answer whatever is asked, until every controller that waited has come back and ended."""
        mine = self.load.mine
        async with asyncio.timeout(PATIENCE):
            while any(
                flow.controller_id == WAITER for flow in await mine.list(status=LIVE, limit=1000)
            ):
                for wait in await mine.list_waits(limit=1000):
                    await self._answer_last(wait)
                await asyncio.sleep(0.01)

    async def _answer_last(self, wait: OpenWait) -> None:
        assert self.runtime is not None
        rng = random.Random(wait.task_id or wait.flow_id)
        if wait.kind == "approval":
            assert wait.approval is not None and wait.name is not None
            for approver in VOTERS:
                digest, decision = wait.approval.digest, rng.choice(("approve", "reject"))
                await self.cast(wait.flow_id, wait.name, digest, approver, decision, wait.token)
        elif wait.kind == "message":
            await self._tell(rng, wait.flow_id)
        elif wait.kind == "signal" and wait.token is not None:
            await self.send(self._spec(rng, "token", token=wait.token, flow=wait.flow_id))


def items_of(flow_id: str) -> dict[str, Any]:
    """What is voted on in a flow."""
    return {"pay": flow_id}


def shown(flow_id: str, step: str) -> str:
    """The digest of what voters are shown, known before anybody is asked."""
    raw = msgspec.Raw(msgspec.json.encode(items_of(flow_id)))
    return shown_digest(raw, RULES, prompt=PROMPT, flow_id=flow_id, step=step)
