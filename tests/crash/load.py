"""A store under load: many clients at once, each doing what a host might do, seeded, and telling what was answered.

Every call is told before it is made (`begin`) and after its answer (`done`); an answer that says something is
durable is told with it (`ack`). A child tells when its code begins (`ran`), an effect when it happens (`effect`).
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from flowstead import (
    Applied,
    CancelPending,
    CancelReport,
    Created,
    FlowContext,
    Limits,
    Nested,
    Runtime,
    RuntimeClosed,
    SessionFlows,
    Succeeded,
    open_runtime,
)
from flowstead.model.flow import Flow, has_ended
from flowstead.store.codec import FlowWrite
from flowstead.store.sqlite import SqliteStore
from tests.crash.carrier import DELIVERIES, Carrier
from tests.crash.census import alive_programs, program
from tests.crash.children import PIPELINE, TREE, UNUSUAL, USUAL, Children
from tests.crash.harness import PATIENCE, Journal
from tests.crash.ladder import AheadClock
from tests.crash.waits import WAITER, Waiters

CLIENTS = 32
CROWD = 48
LEDGER = "load/ledger"
LIVE = ("queued", "running", "waiting", "blocked")
PROGRAMS = ((), (), ("family",), ("stubborn",), ("stubborn", "family"))
POLICIES = ("done_only", "done_only", "done_only", "state_changes", "silent")
LIMITS = Limits(
    cancel_grace=0.3,
    interruptions=1000,
    kill_after=0.04,
    abandon_after=0.08,
    park_seconds=0.05,
)
A_DAY = 24 * 3600


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

    def __init__(self, journal: Journal, seed: int, folder: str, *, strict: bool) -> None:
        self.journal = journal
        self.seed = seed
        self.folder = folder
        self.strict = strict
        self.flows: SessionFlows | None = None
        self.known: dict[str, Flow] = {}
        self.linked: list[str] = []
        self.launched: list[str] = []
        self.ended: list[str] = []
        self.with_programs: set[str] = set()
        self.calls = 0
        self.marks = 0
        self.children = Children(journal, tell_wrong=self.wrong, set_step=self._set)
        self.waiters = Waiters(self, self.children.registry)

    async def _set(self, flow: FlowContext, step: str) -> None:
        state = self._mark(step)
        number = self.begin("update")
        await flow.update(current_step=step, state_json=state)
        self.done(number, ack="update", **_facts(flow.flow), state=state)

    # ---- the clients ------------------------------------------------------------------------------

    @property
    def mine(self) -> SessionFlows:
        assert self.flows is not None
        return self.flows

    async def run(
        self, flows: SessionFlows, runtime: Runtime, unanswered: list[dict[str, Any]]
    ) -> None:
        """Load the store until it is closed."""
        self.flows, self.waiters.runtime = flows, runtime
        try:
            await self._learn_all(flows)
        except RuntimeClosed:
            return
        async with anyio.create_task_group() as group:
            group.start_soon(self._send_again, unanswered)
            for number in range(CLIENTS):
                group.start_soon(self.client, random.Random(self.seed * 1000 + number))

    async def _send_again(self, unanswered: list[dict[str, Any]]) -> None:
        for spec in unanswered:
            try:
                await self.waiters.send(spec, again=True)
            except RuntimeClosed:
                return
            except Exception as error:
                self._told_of(error)

    async def settle(
        self, flows: SessionFlows, runtime: Runtime, unanswered: list[dict[str, Any]]
    ) -> None:
        """Bring everything to its end: whoever waits is answered, and whoever is left then is cancelled."""
        self.flows, self.waiters.runtime = flows, runtime
        await self._send_again(unanswered)
        await self.waiters.see_through()
        while live := await flows.list(status=LIVE, limit=1000):
            async with asyncio.timeout(PATIENCE), anyio.create_task_group() as group:
                for flow in live:
                    if flow.parent_task_id is None:
                        group.start_soon(self._cancel, flow, PATIENCE)
                    else:
                        group.start_soon(flows.result, flow.flow_id)
        await self.see_out(flows)
        self.journal.write(settled=True)

    async def see_out(self, flows: SessionFlows) -> None:
        """Wait until nothing is left to tell anybody, but what is put by for another day."""
        now = self.waiters.now()
        async with asyncio.timeout(PATIENCE):
            while any(  # noqa: ASYNC110
                update.bucket is None or update.items or (update.due_at or 0) <= now
                for update in await flows.list_updates(status="pending", limit=1000)
            ):
                await asyncio.sleep(0.005)

    async def _learn_all(self, flows: SessionFlows) -> None:
        for flow in await flows.list(status=LIVE, limit=CROWD):
            self.known[flow.flow_id] = flow
            for task in await flows.list_tasks(flow.flow_id, status=("queued", "running")):
                if task.runtime == "acp":
                    self.linked.append(task.task_id)
                if task.review_requested_at is not None:
                    self.children.in_review.append(task.task_id)
        for flow in await flows.list(status=("failed", "cancelled", "lost"), limit=CROWD):
            if flow.controller_id is not None and flow.parent_task_id is None:
                self.ended.append(flow.flow_id)

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
            (24, self.launch_unusual),
            (3, self.launch_program),
            (3, self.launch_nested),
            (3, self.branch),
            (4, self.detach),
            (10, self.answer),
            (6, self.cancel_one),
            (8, self.retry_flow),
            (14, self.stand),
            (6, self.touch),
            (8, self.bring),
            (16, self.waiters.signal),
            (12, self.waiters.answer),
            (6, self.waiters.look),
        )
        weights = [weight for weight, _ in calls]
        while True:
            [(_, call)] = rng.choices(calls, weights)
            try:
                await call(rng)
            except RuntimeClosed:
                return
            except Exception as error:
                self._told_of(error)
            await asyncio.sleep(0)

    def _told_of(self, error: Exception) -> None:
        if self.strict:
            raise error
        self.journal.write(failed=type(error).__name__, reason=str(error))

    def pick(self, rng: random.Random, controller: str = LEDGER) -> Flow | None:
        live = [flow for flow in self.known.values() if flow.controller_id == controller]
        return rng.choice(live) if live else None

    async def create(self, rng: random.Random) -> None:
        if len(self.known) >= CROWD:
            return await self.finish(rng)
        state = self._mark("created")
        key = f"once-{self.seed}-{self.marks}" if rng.random() < 0.3 else None
        number = self.begin("create")
        flow = await self.mine.create_managed(
            controller_id=LEDGER,
            goal="be there",
            state_json=state,
            idempotency_key=key,
            notify_policy=rng.choice(POLICIES),
        )
        self.done(number, ack="create", **_facts(flow), state=state)
        self.known[flow.flow_id] = flow
        return None

    async def drive(self, rng: random.Random) -> None:
        await self._drive(PIPELINE, CROWD // 4, {})

    async def branch(self, rng: random.Random) -> None:
        await self._drive(TREE, CROWD // 8, {"deep": 0})

    async def stand(self, rng: random.Random) -> None:
        await self._drive(WAITER, CROWD // 2, self.waiters.plan(rng), rng.choice(POLICIES))

    async def touch(self, rng: random.Random) -> None:
        """Do to a flow that waits what its owner may do at any time."""
        flow = await self._fresh(rng)
        if flow is None:
            return
        kind = rng.random()
        if kind < 0.3:
            await self._apply(rng, "update", self.mine.update, flow, current_step="touched")
        elif kind < 0.7:
            await self._apply(rng, "resume", self.mine.resume, flow)
        elif kind < 0.85:
            await self._apply(rng, "request_cancel", self.mine.request_cancel, flow)
        else:
            await self._cancel(flow)

    async def bring(self, rng: random.Random) -> None:
        flow = await self._fresh(rng) if rng.random() < 0.5 else self.pick(rng, WAITER)
        if flow is not None:
            await self.waiters.early(rng, flow)

    async def _fresh(self, rng: random.Random) -> Flow | None:
        """A flow that waits, or did when last seen, as it is now."""
        known = self.pick(rng, WAITER)
        if known is None:
            return None
        flow = await self.mine.get(known.flow_id)
        self._learn(flow)
        return flow

    async def _drive(
        self, controller: str, most: int, given: dict[str, Any], policy: str = "done_only"
    ) -> None:
        if sum(flow.controller_id == controller for flow in self.known.values()) > most:
            return
        state = self._mark("created") | given
        number = self.begin("create")
        flow = await self.mine.create_managed(
            controller_id=controller, goal="be driven", state_json=state, notify_policy=policy
        )
        self.done(number, ack="create", **_facts(flow), state=state)
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
            if rng.random() < 0.7:
                wait = self.waiters.own_wait(rng)
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
        flow = self.pick(rng, rng.choice((LEDGER, LEDGER, LEDGER, PIPELINE, TREE, WAITER)))
        if flow is not None:
            await self._cancel(flow)

    async def _cancel(self, flow: Flow, grace: float = 2.0) -> None:
        number = self.begin("cancel")
        report = await self.mine.cancel(flow.flow_id, grace=grace)
        if report.flow is None or report.flow.cancel_requested_at is None:
            self.done(number)
        elif report.cancelled:
            self._check_quiet(flow, report)
            self.done(number, ack="cancelled", **_facts(report.flow))
        else:
            self.done(number, ack="intent", **_facts(report.flow))
        self._learn(report.flow)

    def _check_quiet(self, flow: Flow, report: CancelReport) -> None:
        """Nothing of a flow that is cancelled runs any more, nor of the flows below it."""
        below = {flow.flow_id} | {line.flow_id for line in report.descendants}
        for flow_id in below:
            if running := self.children.inside[flow_id]:
                self.wrong(f"{flow.flow_id} is cancelled, and {running} children of {flow_id} run")
        if odd := [line for line in report.descendants if line.state not in ("settled", "killed")]:
            self.wrong(f"{flow.flow_id} is cancelled, and the report has {odd}")
        if below & self.with_programs:
            children = {line.task_id for line in report.descendants}
            if alive := {p: c for p, c in alive_programs().items() if c in children}:
                self.wrong(f"{flow.flow_id} is cancelled, and programs of it live: {alive}")

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
        if flow is not None:
            await self._apply(rng, name, method, flow, **arguments)

    async def _apply(
        self,
        rng: random.Random,
        name: str,
        method: Callable[..., Awaitable[Any]],
        flow: Flow,
        **arguments: Any,
    ) -> None:
        number = self.begin(name)
        answer = await method(flow_id=flow.flow_id, expected_revision=flow.revision, **arguments)
        self._learn(answer.flow)
        if not isinstance(answer, Applied):
            self.done(number, refused=answer.code)
            return
        after = answer.flow
        told = {"state": arguments["state_json"]} if "state_json" in arguments else {}
        self.done(number, ack=name, **_facts(after), **told)
        if after.revision != flow.revision + 1:
            self.wrong(f"{name} took {flow.flow_id} from {flow.revision} to {after.revision}")
        if told and after.state_json != told["state"]:
            self.wrong(f"{name} of {flow.flow_id} answered {after.state_json}, not {told}")
        if rng.random() < 0.1:
            found = await self.mine.get(flow.flow_id)
            if found is None or found.revision < after.revision:
                self.wrong(f"{flow.flow_id} was read at {found} after {after.revision}")

    async def link(self, rng: random.Random) -> None:
        flow = self.pick(rng)
        if flow is None:
            return
        number = self.begin("link")
        answer = await self.mine.run_task(
            flow_id=flow.flow_id,
            task="look into it",
            runtime="acp",
            run_id=f"linked-{self.seed}-{number}",
            status=rng.choice(("queued", "running")),
        )
        if isinstance(answer, Created):
            self.done(number, ack="child", flow=flow.flow_id, task=answer.task.task_id)
            self.linked.append(answer.task.task_id)
        else:
            self.done(number, refused=answer.code)

    async def report(self, rng: random.Random) -> None:
        if not self.linked:
            return
        task_id = rng.choice(self.linked)
        number, kind = self.begin("report"), rng.random()
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
            self.done(number)
            return
        if task is not None and task.ended_at is not None:
            self.done(number, ack="ended", task=task_id, status=task.status)
            if task_id in self.linked:
                self.linked.remove(task_id)
        else:
            self.done(number)

    async def launch(self, rng: random.Random) -> str | None:
        name = rng.choice(USUAL)
        return await self._launch(self.pick(rng), f"do {name}", self._runnable(name))

    async def launch_unusual(self, rng: random.Random) -> None:
        name = rng.choice(UNUSUAL)
        await self._launch(self.pick(rng), f"do {name}", name)

    async def launch_program(self, rng: random.Random) -> None:
        flow = self.pick(rng)
        if flow is None or len(self.with_programs) > CROWD // 4:
            return
        self.with_programs.add(flow.flow_id)
        spec = program(self.folder, rng.choice((0.0, 0.05, 0.4)), *rng.choice(PROGRAMS))
        await self._launch(flow, "run a program", spec, idempotent=rng.random() < 0.6)

    async def launch_nested(self, rng: random.Random) -> None:
        await self._launch(self.pick(rng), "branch", Nested(TREE), given={"deep": 1})

    async def _launch(
        self, flow: Flow | None, task: str, run: Any, *, given: Any = None, **policy: Any
    ) -> str | None:
        if flow is None:
            return None
        number = self.begin("launch")
        answer = await self.mine.run_task(
            flow_id=flow.flow_id,
            task=task,
            run=run,
            run_id=f"launched-{self.seed}-{number}",
            input_json=number if given is None else given,
            **policy,
        )
        if isinstance(answer, Created):
            self.done(number, ack="child", flow=flow.flow_id, task=answer.task.task_id)
            self.launched.append(answer.task.task_id)
            return answer.task.task_id
        self.done(number, refused=answer.code)
        return None

    def _runnable(self, name: str) -> Any:
        return self.children.told(self.children.slow, name) if name == "bare" else name

    async def detach(self, rng: random.Random) -> None:
        name = rng.choice((*USUAL, *UNUSUAL))
        number = self.begin("detach")
        made = await self.mine.spawn_detached(
            task=f"do {name}", run=self._runnable(name), input_json=number
        )
        self.done(number, ack="child", flow=made.flow.flow_id, task=made.task.task_id)
        self.launched.append(made.task.task_id)

    async def answer(self, rng: random.Random) -> None:
        """Answer for a child that a person has to look at: with another input, with the same, or not at all."""
        if not self.children.in_review:
            return
        task_id = self.children.in_review.pop(rng.randrange(len(self.children.in_review)))
        if rng.random() < 0.25:
            await self._cancel_one(task_id)
            return
        given = {"input_json": "what it likes"} if rng.random() < 0.5 else {}
        number = self.begin("retry_task")
        report = await self.mine.retry_task(task_id, **given)
        if report.retried:
            self.done(number, ack="told to retry", task=task_id)
        else:
            self.done(number, refused=report.reason)

    async def cancel_one(self, rng: random.Random) -> None:
        if self.launched:
            await self._cancel_one(self.launched.pop(rng.randrange(len(self.launched))))

    async def _cancel_one(self, task_id: str) -> None:
        number = self.begin("cancel_task")
        report = await self.mine.cancel_task(task_id, grace=0.2)
        if report.cancelled:
            self.done(number, ack="ended", task=task_id, status="cancelled")
        else:
            self.done(number, refused=report.reason)

    async def retry_flow(self, rng: random.Random) -> None:
        """Go on from a flow that has ended, perhaps twice: it is the same flow that goes on."""
        if not self.ended or len(self.known) >= CROWD:
            return
        origin = rng.choice(self.ended)
        number = self.begin("retry_flow")
        answers = [await self.mine.retry_flow(origin) for _ in range(rng.choice((1, 2)))]
        if len({answer.flow.flow_id for answer in answers if isinstance(answer, Applied)}) > 1:
            self.wrong(f"{origin} is gone on from twice: {answers}")
        for answer in answers:
            # Its code may be on its way out still.
            if not isinstance(answer, Applied) and answer.code != "not_retryable":
                self.wrong(f"{origin} has ended, and cannot be gone on from: {answer}")
        if isinstance(answers[0], Applied):
            flow = answers[0].flow
            self.done(number, ack="retry_flow", **_facts(flow), origin=origin)
            if flow.revision == 0:
                self.known[flow.flow_id] = flow
        else:
            self.done(number, refused=answers[0].code)

    async def launch_and_wait(self, rng: random.Random) -> None:
        task_id = await self.launch(rng)
        if task_id is None:
            return
        number = self.begin("outcome")
        with anyio.move_on_after(0.5):
            outcome = await self.mine.wait_task(task_id)
            status = "succeeded" if isinstance(outcome, Succeeded) else type(outcome).__name__
            status = {"TimedOut": "timed_out"}.get(status, status.lower())
            self.done(number, ack="ended", task=task_id, status=status)
            return
        self.done(number)

    # ---- telling ----------------------------------------------------------------------------------

    def begin(self, name: str, **fact: Any) -> int:
        """Tell of a call that is about to be made."""
        self.calls += 1
        self.journal.write(begin=self.calls, name=name, **fact)
        return self.calls

    def done(self, number: int, **fact: Any) -> None:
        """Tell of its answer."""
        self.journal.write(done=number, **fact)

    def wrong(self, what: str) -> None:
        """Tell of an answer that must not be."""
        if self.strict:
            self.journal.write(wrong=what)

    def _mark(self, word: str) -> dict[str, Any]:
        self.marks += 1
        return {"word": word, "mark": f"{self.seed}.{self.marks}", "items": list(range(5))}

    def _learn(self, flow: Flow | None) -> None:
        if flow is None:
            return
        if has_ended(flow):
            if flow.flow_id in self.known and flow.status != "succeeded":
                self.ended.append(flow.flow_id)
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
    folder: str,
    full: bool = True,
    early: bool = False,
    strict: bool = True,
    last: bool = False,
    unanswered: list[dict[str, Any]] | None = None,
    ahead: float = 0.0,
) -> None:
    """Load the store until the process is killed, or asked to end: then it closes, with every call under way.

    Args:
        journal: Where to tell everything.
        path: The file.
        seed: What the clients do.
        folder: Where programs tell that they live.
        full: Whether each commit waits for the disk.
        early: Whether the store lies about commits.
        strict: Whether an error of the runtime's is a failure; not where the store lies or is taken over.
        last: Whether to bring everything to its end instead, and close.
        unanswered: What earlier lives have sent, and were not answered for.
        ahead: How many seconds later it is than the system says.
    """

    async def main() -> None:
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
        load = Load(journal, seed, folder, strict=strict)
        began = time.perf_counter()
        async with open_runtime(
            EarlyStore(path) if early else path,
            registry=load.children.registry,
            durability="full" if full else "normal",
            limits=LIMITS,
            clock=AheadClock(ahead),
            notifier=Carrier(f"{folder}/delivered"),
            deliveries=DELIVERIES,
        ) as runtime:
            journal.write(ready=time.perf_counter() - began)
            flows = runtime.tasks.flow.bind_session(session_key="agent:main:main")
            if last:
                await load.settle(flows, runtime, unanswered or [])
            else:
                async with anyio.create_task_group() as group:
                    group.start_soon(load.run, flows, runtime, unanswered or [])
                    await asked.wait()
                    await runtime.aclose()
            abandoned = 0 if not last else runtime.statistics().abandoned
        journal.write(closed=True, abandoned=abandoned)

    asyncio.run(main())
