"""A store under load: many clients at once, each doing what a host might do, seeded, and telling what was answered.

Every call is told before it is made (`begin`) and after its answer (`done`); an answer that says something is
durable is told with it (`ack`). A child tells when its code begins (`ran`), an effect when it happens (`effect`).
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from flowstead import (
    Applied,
    CancelPending,
    Created,
    Failed,
    FlowContext,
    Limits,
    Registry,
    Retry,
    RuntimeClosed,
    SessionFlows,
    Succeeded,
    TaskContext,
    open_runtime,
)
from flowstead.model.flow import Flow, has_ended
from flowstead.store.codec import FlowWrite
from flowstead.store.sqlite import SqliteStore
from tests.crash.harness import Journal

CLIENTS = 14
CROWD = 48
LEDGER = "load/ledger"
PIPELINE = "load/pipeline"
LIVE = ("queued", "running", "waiting", "blocked")
LAUNCHABLE = (
    *("quick", "quick", "slow", "slow", "broken"),
    *("flaky", "patient", "stuck", "fragile", "bare"),
)


class EarlyStore(SqliteStore):
    """A store that lies: it says that a batch is written and writes it a little later."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._promised: int | None = None
        self._unwritten: list[list[FlowWrite]] = []
        self._writing: asyncio.Task[None] | None = None

    async def commit(self, writes: Any) -> int:
        if self._promised is None:
            self._promised = await self.last_position()
            self._writing = asyncio.create_task(self._write())
        first = self._promised + 1
        self._promised += sum(len(write.events) for write in writes)
        self._unwritten.append(list(writes))
        return first

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            while self._unwritten:
                await super().commit(self._unwritten.pop(0))


class Load:
    """One runtime's worth of clients."""

    def __init__(self, journal: Journal, seed: int, *, strict: bool) -> None:
        self.journal = journal
        self.seed = seed
        self.strict = strict
        self.flows: SessionFlows | None = None
        self.known: dict[str, Flow] = {}
        self.linked: list[str] = []
        self.inside: Counter[str] = Counter()
        self.calls = 0
        self.marks = 0
        self.registry = Registry()
        self._register()

    # ---- the code that runs under flows -----------------------------------------------------------

    def _register(self) -> None:
        task = self.registry.task
        for function, name, options in (
            (self.quick, "quick", {}),
            (self.slow, "slow", {"timeout": 30.0}),
            (self.broken, "broken", {}),
            (self.flaky, "flaky", {"retry": Retry(max_attempts=3, initial=0.01, jitter=0.5)}),
            (self.patient, "patient", {"retry": Retry(max_attempts=9, initial=0.25, factor=1.5)}),
            (self.stuck, "stuck", {"timeout": 0.06, "retry": Retry(max_attempts=2, initial=0.05)}),
            (self.fragile, "fragile", {"on_restart": "lost"}),
        ):
            task(self._told(function), name=name, **options)
        self.registry.controller(PIPELINE)(self.pipeline)

    def _told(
        self, function: Callable[[TaskContext, Any], Awaitable[Any]]
    ) -> Callable[[TaskContext, Any], Awaitable[Any]]:
        async def run(ctx: TaskContext, given: Any) -> Any:
            self.journal.write(ran=ctx.task_id, flow=ctx.flow_id, attempt=ctx.attempt)
            self.inside[ctx.flow_id] += 1
            try:
                return await function(ctx, given)
            finally:
                self.inside[ctx.flow_id] -= 1

        return run

    async def quick(self, ctx: TaskContext, given: Any) -> Any:
        return {"given": given, "by": ctx.attempt}

    async def slow(self, ctx: TaskContext, given: Any) -> Any:
        await asyncio.sleep(0.02 + (given % 7) * 0.02)
        await ctx.progress("half way")
        await asyncio.sleep(0.03)
        return given

    async def broken(self, ctx: TaskContext, given: Any) -> Any:
        await asyncio.sleep(0.005)
        raise ValueError(f"cannot do {given}")

    async def flaky(self, ctx: TaskContext, given: Any) -> Any:
        if ctx.attempt % 3:
            raise OSError("not this time")
        return given

    async def patient(self, ctx: TaskContext, given: Any) -> Any:
        """Fails often enough to be waiting for its next attempt when the process is killed."""
        if ctx.attempt < 5:
            raise OSError("not yet")
        return given

    async def stuck(self, ctx: TaskContext, given: Any) -> Any:
        await asyncio.Event().wait()

    async def fragile(self, ctx: TaskContext, given: Any) -> Any:
        await asyncio.sleep(0.05 + (given % 5) * 0.08)
        return given

    async def pipeline(self, flow: FlowContext) -> None:
        """A controller with every kind of step, each result checked against what it must be."""
        opened = await flow.once("open", self._effect(flow, "open"))
        assert opened == {"flow": flow.flow_id, "name": "open"}, opened
        await self._set(flow, "opened")
        inputs = [0, 1, 7, 8]
        results = await flow.map("slow", inputs, name="work", limit=3)
        assert results == inputs, results
        await self._set(flow, "worked")
        first = await flow.run("quick", 7)
        second = await flow.run("quick", 8)
        assert (first["given"], second["given"]) == (7, 8), (first, second)
        [outcome] = await flow.map("broken", [9], return_outcomes=True)
        assert isinstance(outcome, Failed), outcome
        assert "cannot do 9" in str(outcome.failure.message), outcome
        await flow.once("close", self._effect(flow, "close"))
        await self._set(flow, "closed")

    def _effect(self, flow: FlowContext, name: str) -> Callable[[], Awaitable[Any]]:
        async def effect() -> Any:
            self.journal.write(effect=name, flow=flow.flow_id)
            await asyncio.sleep(0.01)
            return {"flow": flow.flow_id, "name": name}

        return effect

    async def _set(self, flow: FlowContext, step: str) -> None:
        state = self._mark(step)
        number = self._begin("update")
        await flow.update(current_step=step, state_json=state)
        self._done(number, ack="update", **_facts(flow.flow), state=state)

    # ---- the clients ------------------------------------------------------------------------------

    @property
    def mine(self) -> SessionFlows:
        assert self.flows is not None
        return self.flows

    async def run(self, flows: SessionFlows) -> None:
        """Load the store until it is closed."""
        self.flows = flows
        try:
            await self._learn_all(flows)
        except RuntimeClosed:
            return
        async with anyio.create_task_group() as group:
            for number in range(CLIENTS):
                group.start_soon(self.client, random.Random(self.seed * 1000 + number))

    async def _learn_all(self, flows: SessionFlows) -> None:
        for flow in await flows.list(status=LIVE, limit=CROWD):
            self.known[flow.flow_id] = flow
            for task in await flows.list_tasks(flow.flow_id, status=("queued", "running")):
                if task.runtime == "acp":
                    self.linked.append(task.task_id)

    async def client(self, rng: random.Random) -> None:
        calls = (
            (18, self.create),
            (40, self.update),
            (10, self.wait),
            (12, self.resume),
            (3, self.request_cancel),
            (3, self.cancel),
            (6, self.finish),
            (3, self.fail),
            (14, self.link),
            (20, self.report),
            (16, self.launch),
            (3, self.launch_and_wait),
            (8, self.drive),
        )
        weights = [weight for weight, _ in calls]
        while True:
            [(_, call)] = rng.choices(calls, weights)
            try:
                await call(rng)
            except RuntimeClosed:
                return
            except Exception as error:
                if self.strict:
                    raise
                self.journal.write(failed=type(error).__name__, reason=str(error))
            await asyncio.sleep(0)

    def pick(self, rng: random.Random, controller: str = LEDGER) -> Flow | None:
        live = [flow for flow in self.known.values() if flow.controller_id == controller]
        return rng.choice(live) if live else None

    async def create(self, rng: random.Random) -> None:
        if len(self.known) >= CROWD:
            return await self.finish(rng)
        state = self._mark("created")
        key = f"once-{self.seed}-{self.marks}" if rng.random() < 0.3 else None
        number = self._begin("create")
        flow = await self.mine.create_managed(
            controller_id=LEDGER, goal="be there", state_json=state, idempotency_key=key
        )
        self._done(number, ack="create", **_facts(flow), state=state)
        self.known[flow.flow_id] = flow
        return None

    async def drive(self, rng: random.Random) -> None:
        if sum(flow.controller_id == PIPELINE for flow in self.known.values()) > CROWD // 4:
            return
        state = self._mark("created")
        number = self._begin("create")
        flow = await self.mine.create_managed(
            controller_id=PIPELINE, goal="be driven", state_json=state
        )
        self._done(number, ack="create", **_facts(flow), state=state)
        self.known[flow.flow_id] = flow

    async def update(self, rng: random.Random) -> None:
        await self._mutate(rng, "update", self.mine.update, state_json=self._mark("updated"))

    async def wait(self, rng: random.Random) -> None:
        state, wait = self._mark("waiting"), {"kind": "reply", "n": self.marks}
        if rng.random() < 0.3:
            await self._mutate(
                rng, "block", self.mine.set_waiting, state_json=state, blocked_summary="who knows"
            )
        else:
            await self._mutate(rng, "wait", self.mine.set_waiting, state_json=state, wait_json=wait)

    async def resume(self, rng: random.Random) -> None:
        status = rng.choice(("queued", "running"))
        await self._mutate(
            rng, "resume", self.mine.resume, status=status, state_json=self._mark("resumed")
        )

    async def request_cancel(self, rng: random.Random) -> None:
        controller = PIPELINE if rng.random() < 0.1 else LEDGER
        await self._mutate(rng, "request_cancel", self.mine.request_cancel, controller=controller)

    async def finish(self, rng: random.Random) -> None:
        await self._mutate(rng, "finish", self.mine.finish, state_json=self._mark("finished"))

    async def fail(self, rng: random.Random) -> None:
        await self._mutate(rng, "fail", self.mine.fail, state_json=self._mark("failed"))

    async def cancel(self, rng: random.Random) -> None:
        flow = self.pick(rng, PIPELINE if rng.random() < 0.1 else LEDGER)
        if flow is None:
            return
        number = self._begin("cancel")
        report = await self.mine.cancel(flow.flow_id, grace=2.0)
        if report.flow is None or report.flow.cancel_requested_at is None:
            self._done(number)
        elif report.cancelled:
            if running := self.inside[flow.flow_id]:
                self._wrong(f"{flow.flow_id} is cancelled, and {running} of its children run")
            self._done(number, ack="cancelled", **_facts(report.flow))
        else:
            self._done(number, ack="intent", **_facts(report.flow))
        self._learn(report.flow)

    async def _mutate(
        self,
        rng: random.Random,
        name: str,
        method: Callable[..., Awaitable[Any]],
        *,
        controller: str = LEDGER,
        **arguments: Any,
    ) -> None:
        flow = self.pick(rng, controller)
        if flow is None:
            return
        number = self._begin(name)
        answer = await method(flow_id=flow.flow_id, expected_revision=flow.revision, **arguments)
        self._learn(answer.flow)
        if not isinstance(answer, Applied):
            self._done(number, refused=answer.code)
            return
        after = answer.flow
        told = {"state": arguments["state_json"]} if "state_json" in arguments else {}
        self._done(number, ack=name, **_facts(after), **told)
        if after.revision != flow.revision + 1:
            self._wrong(f"{name} took {flow.flow_id} from {flow.revision} to {after.revision}")
        if told and after.state_json != told["state"]:
            self._wrong(f"{name} of {flow.flow_id} answered {after.state_json}, not {told}")
        if rng.random() < 0.1:
            found = await self.mine.get(flow.flow_id)
            if found is None or found.revision < after.revision:
                self._wrong(f"{flow.flow_id} was read at {found} after {after.revision}")

    async def link(self, rng: random.Random) -> None:
        flow = self.pick(rng)
        if flow is None:
            return
        number = self._begin("link")
        answer = await self.mine.run_task(
            flow_id=flow.flow_id,
            task="look into it",
            runtime="acp",
            run_id=f"linked-{self.seed}-{number}",
            status=rng.choice(("queued", "running")),
        )
        if isinstance(answer, Created):
            self._done(number, ack="child", flow=flow.flow_id, task=answer.task.task_id)
            self.linked.append(answer.task.task_id)
        else:
            self._done(number, refused=answer.code)

    async def report(self, rng: random.Random) -> None:
        if not self.linked:
            return
        task_id = rng.choice(self.linked)
        number, kind = self._begin("report"), rng.random()
        try:
            if kind < 0.2:
                task = await self.mine.start_task(task_id)
            elif kind < 0.4:
                task = await self.mine.progress_task(task_id, summary=f"report {number}")
            elif kind < 0.8:
                task = await self.mine.complete_task(task_id, result_json={"n": number})
            else:
                task = await self.mine.fail_task(task_id, error="gave up")
        except CancelPending:
            self._done(number)
            return
        if task is not None and task.ended_at is not None:
            self._done(number, ack="ended", task=task_id, status=task.status)
            if task_id in self.linked:
                self.linked.remove(task_id)
        else:
            self._done(number)

    async def launch(self, rng: random.Random) -> str | None:
        flow = self.pick(rng)
        if flow is None:
            return None
        name = rng.choice(LAUNCHABLE)
        number = self._begin("launch")
        answer = await self.mine.run_task(
            flow_id=flow.flow_id,
            task=f"do {name}",
            run=self._told(self.slow) if name == "bare" else name,
            run_id=f"launched-{self.seed}-{number}",
            input_json=number,
        )
        if isinstance(answer, Created):
            self._done(number, ack="child", flow=flow.flow_id, task=answer.task.task_id)
            return answer.task.task_id
        self._done(number, refused=answer.code)
        return None

    async def launch_and_wait(self, rng: random.Random) -> None:
        task_id = await self.launch(rng)
        if task_id is None:
            return
        number = self._begin("outcome")
        with anyio.move_on_after(0.5):
            outcome = await self.mine.wait_task(task_id)
            status = "succeeded" if isinstance(outcome, Succeeded) else type(outcome).__name__
            status = {"TimedOut": "timed_out"}.get(status, status.lower())
            self._done(number, ack="ended", task=task_id, status=status)
            return
        self._done(number)

    # ---- telling ----------------------------------------------------------------------------------

    def _begin(self, name: str) -> int:
        self.calls += 1
        self.journal.write(begin=self.calls, name=name)
        return self.calls

    def _done(self, number: int, **fact: Any) -> None:
        self.journal.write(done=number, **fact)

    def _wrong(self, what: str) -> None:
        if self.strict:
            self.journal.write(wrong=what)

    def _mark(self, word: str) -> dict[str, Any]:
        self.marks += 1
        return {"word": word, "mark": f"{self.seed}.{self.marks}", "items": list(range(5))}

    def _learn(self, flow: Flow | None) -> None:
        if flow is None:
            return
        if has_ended(flow):
            self.known.pop(flow.flow_id, None)
        elif flow.flow_id in self.known and flow.revision > self.known[flow.flow_id].revision:
            self.known[flow.flow_id] = flow


def _facts(flow: Flow) -> dict[str, Any]:
    return {
        "flow": flow.flow_id,
        "revision": flow.revision,
        "status": flow.status,
        "intent": flow.cancel_requested_at,
    }


def load(
    journal: Journal,
    *,
    path: str,
    seed: int,
    full: bool = True,
    early: bool = False,
    strict: bool = True,
) -> None:
    """Load the store until the process is killed, or asked to end: then it closes, with every call under way.

    Args:
        journal: Where to tell everything.
        path: The file.
        seed: What the clients do.
        full: Whether each commit waits for the disk.
        early: Whether the store lies about commits.
        strict: Whether an error of the runtime's is a failure; not where the store lies or is taken over.
    """

    async def main() -> None:
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
        load = Load(journal, seed, strict=strict)
        began = time.perf_counter()
        async with open_runtime(
            EarlyStore(path) if early else path,
            registry=load.registry,
            durability="full" if full else "normal",
            limits=Limits(cancel_grace=0.3, interruptions=1000),
        ) as runtime:
            journal.write(ready=time.perf_counter() - began)
            flows = runtime.tasks.flow.bind_session(session_key="agent:main:main")
            async with anyio.create_task_group() as group:
                group.start_soon(load.run, flows)
                await asked.wait()
                await runtime.aclose()
        journal.write(closed=True)

    asyncio.run(main())
