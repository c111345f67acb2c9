"""Load at a fixed, moderate rate for as long as you like, in one process on one file; its memory has to stay flat.

    python -m tests.soak.load --minutes 60 [--report FILE] [--rate 200] [--directory DIRECTORY]

Everything a host does, mixed: flows made by hand and driven by controllers, children of every kind of end, waits
and resumes, cancels, reads, watchers that come and go, the runtime closed under load and opened again. The
number of live flows is bounded, so that memory has no reason to grow; the file grows, as nothing is ever
removed from it, and its size is reported. Exits with 1 and the reasons if anything grew or any call failed, or
if too little was done to say so.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec

from flowstead import (
    Applied,
    CancelPending,
    ChildTimedOut,
    Created,
    Flow,
    FlowContext,
    Limits,
    Registry,
    Retry,
    Runtime,
    RuntimeClosed,
    SessionFlows,
    TaskContext,
    open_runtime,
)
from tests import invariants
from tests.soak.gauge import (
    MIB,
    Heartbeat,
    Rest,
    Sample,
    allowed_growth,
    growth,
    not_flat,
    peak_rss,
    second_half,
    size_of,
    use_of_process,
)

CLIENTS = 16
WATCHERS = 6
CROWD = 200
DRIVEN = 16
TURNS_OF_A_FLOW = 24
LEDGER = "soak/ledger"
PIPELINE = "soak/pipeline"
OWNERS = ("agent:main:main", "agent:side:main")
LIVE = ("queued", "running", "waiting", "blocked")
LAUNCHED = ("quick", "quick", "slow", "flaky", "broken", "stuck")
FATAL_CODES = ("persist_failed", "outcome_unknown", "overloaded")
MUST_HAPPEN = (
    *("create", "drive", "update", "wait", "resume", "finish", "fail", "request_cancel", "cancel"),
    *(
        "launch",
        "link",
        "report",
        "await_task",
        "read",
        "applied",
        "refused",
        "watched",
        "reopened",
    ),
    *("flow succeeded", "flow failed", "flow cancelled", "driven to the end"),
    *(
        "child succeeded",
        "child failed",
        "child timed_out",
        "child cancelled",
        "retried",
        "released",
    ),
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how hard."""

    seconds: float
    rate: float = 200.0
    sample_seconds: float = 10.0
    reopen_seconds: float = 240.0
    seed: int = 20261122


class Report(msgspec.Struct, kw_only=True):
    """What was seen, and what is wrong with it."""

    plan: Plan
    seconds: float
    counts: dict[str, int]
    figures: dict[str, Any]
    wrong: list[str]
    samples: list[Sample]


class Host:
    """A program that uses the library, with many things going on at once."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.known: dict[str, Flow] = {}
        self.owners: dict[str, str] = {}
        self.linked: list[tuple[str, str]] = []
        self.flows: dict[str, SessionFlows] = {}
        self.runtime: Runtime | None = None
        self.closing = False
        self.registry = Registry()
        self.samples: list[Sample] = []
        self.rests: list[Rest] = []
        self._written = self._commits = 0
        self._names = 0
        self._register()

    # ---- the code that runs under flows -----------------------------------------------------------

    def _register(self) -> None:
        retry = Retry(max_attempts=4, initial=0.05, jitter=0.5)
        self.registry.task(name="quick")(self.quick)
        self.registry.task(name="slow", timeout=30.0)(self.slow)
        self.registry.task(name="flaky", retry=retry)(self.flaky)
        self.registry.task(name="broken")(self.broken)
        self.registry.task(name="stuck", timeout=0.3)(self.stuck)
        self.registry.controller(PIPELINE)(self.pipeline)

    async def quick(self, ctx: TaskContext, given: Any) -> Any:
        return {"given": given, "attempt": ctx.attempt}

    async def slow(self, ctx: TaskContext, given: Any) -> Any:
        await asyncio.sleep(0.2 + given % 10 / 10)
        await ctx.progress("half way")
        await asyncio.sleep(0.2)
        return given

    async def flaky(self, ctx: TaskContext, given: Any) -> Any:
        if ctx.attempt % 3:
            raise OSError("not this time")
        return given

    async def broken(self, ctx: TaskContext, given: Any) -> Any:
        raise ValueError(f"cannot do {given}")

    async def stuck(self, ctx: TaskContext, given: Any) -> Any:
        await asyncio.sleep(3600)

    async def pipeline(self, flow: FlowContext) -> None:
        """A controller with every kind of step."""

        async def effect() -> Any:
            return {"flow": flow.flow_id}

        await flow.once("open", effect)
        results = await flow.map("quick", [1, 2, 3, 4], name="work", limit=2)
        await flow.update(current_step="worked", state_json={"results": results})
        await flow.run("flaky", 5)
        try:
            await flow.run("stuck", 6)
        except ChildTimedOut:
            self.counts["controller saw a time-out"] += 1
        await flow.run("slow", 7)
        await flow.finish(current_step="done")

    # ---- one runtime after the other --------------------------------------------------------------

    async def run(self) -> None:
        """Load the store until the time is over, closing and opening it again on the way."""
        end = time.monotonic() + self.plan.seconds
        heart = Heartbeat()
        async with anyio.create_task_group() as group:
            group.start_soon(self._sample, heart)
            while (left := end - time.monotonic()) > 0:
                await self._one_runtime(min(left, self.plan.reopen_seconds))
                self.counts["reopened"] += 1
            group.cancel_scope.cancel()
        heart.stop()

    async def _one_runtime(self, seconds: float) -> None:
        runtime = open_runtime(
            self.path, registry=self.registry, limits=Limits(cancel_grace=3.0, interruptions=1000)
        )
        async with runtime:
            self.runtime, self.closing = runtime, False
            await self._learn_all(runtime)
            async with anyio.create_task_group() as group:
                for number in range(CLIENTS):
                    group.start_soon(self._client, self._chance(number))
                for number in range(WATCHERS):
                    group.start_soon(self._watcher, self._chance(100 + number))
                await asyncio.sleep(seconds)
                self._count(runtime)
                self.runtime, self.closing = None, True
                # Under load, as hosts are stopped: who is waiting is answered, who comes is refused.
                await runtime.aclose()
        use = use_of_process()
        self.rests.append(Rest(**{name: use[name] for name in ("handles", "threads", "tasks")}))

    def _chance(self, number: int) -> random.Random:
        return random.Random(self.plan.seed + 1000 * self.counts["reopened"] + number)

    async def _learn_all(self, runtime: Runtime) -> None:
        self.known.clear()
        self.linked.clear()
        for owner in OWNERS:
            flows = self.flows[owner] = runtime.tasks.flow.bind_session(session_key=owner)
            for flow in await flows.list(status=LIVE, limit=10 * CROWD):
                self.known[flow.flow_id] = flow
                self.owners[flow.flow_id] = owner
                for task in await flows.list_tasks(flow.flow_id, status=("queued", "running")):
                    if task.runtime == "acp":
                        self.linked.append((owner, task.task_id))
        self.owners = {flow_id: self.owners[flow_id] for flow_id in self.known}

    def _count(self, runtime: Runtime) -> None:
        numbers = runtime.statistics()
        self._written += numbers.flow_writes
        self._commits += numbers.commits
        if numbers.failed_writes:
            self.wrong.append(f"{numbers.failed_writes} writes failed")

    async def _sample(self, heart: Heartbeat) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(self.plan.sample_seconds)
            if self.runtime is None:
                continue
            numbers = self.runtime.statistics()
            sample = Sample(
                second=round(time.monotonic() - began, 2),
                wal=size_of(self.path.with_name(self.path.name + "-wal")),
                file=size_of(self.path),
                calls=self.counts["calls"],
                flow_writes=self._written + numbers.flow_writes,
                commits=self._commits + numbers.commits,
                live_flows=len(self.known),
                longest_turn_ms=heart.worst_ms(),
                **use_of_process(),
            )
            self.samples.append(sample)
            if len(self.samples) % 6 == 1:
                say(str(sample))

    # ---- the clients ------------------------------------------------------------------------------

    async def _client(self, rng: random.Random) -> None:
        calls = (
            *((24, self.update), (10, self.wait), (10, self.resume), (8, self.launch)),
            *((5, self.link), (8, self.report), (4, self.await_task), (16, self.read)),
            *((10, self.create), (2, self.drive), (3, self.finish), (1, self.fail)),
            *((1, self.request_cancel), (2, self.cancel)),
        )
        weights = [weight for weight, _ in calls]
        pause = CLIENTS / self.plan.rate
        while not self.closing:
            [(_, call)] = rng.choices(calls, weights)
            await asyncio.sleep(rng.uniform(0.5, 1.5) * pause)
            await self._try(call, rng)

    async def _try(
        self, call: Callable[[random.Random], Awaitable[None]], rng: random.Random
    ) -> None:
        self.counts["calls"] += 1
        try:
            await call(rng)
        except RuntimeClosed:
            if not self.closing:
                self._fail(call, "the runtime is closed")
        except Exception as error:
            self._fail(call, repr(error))
        else:
            self.counts[call.__name__] += 1

    def _fail(self, call: Callable[..., object], why: str) -> None:
        self.counts["failed calls"] += 1
        if len(self.wrong) < 20:
            self.wrong.append(f"{call.__name__}: {why}")

    def _pick(
        self, rng: random.Random, *, driven: bool = False
    ) -> tuple[SessionFlows, Flow] | None:
        controller = PIPELINE if driven else LEDGER
        live = [flow for flow in self.known.values() if flow.controller_id == controller]
        if not live:
            return None
        flow = rng.choice(live)
        return self.flows[self.owners[flow.flow_id]], flow

    async def create(self, rng: random.Random) -> None:
        if len(self.known) >= CROWD:
            return await self.finish(rng)
        return await self._make(rng, LEDGER)

    async def drive(self, rng: random.Random) -> None:
        if sum(flow.controller_id == PIPELINE for flow in self.known.values()) < DRIVEN:
            await self._make(rng, PIPELINE)

    async def _make(self, rng: random.Random, controller: str) -> None:
        owner = rng.choice(OWNERS)
        flow = await self.flows[owner].create_managed(
            controller_id=controller,
            goal="stay as large as you are",
            state_json=self._state(),
            correlation_id=f"case-{rng.randrange(50)}",
            idempotency_key=self._name("key") if rng.random() < 0.2 else None,
        )
        self.owners[flow.flow_id] = owner
        self.known[flow.flow_id] = flow

    async def update(self, rng: random.Random) -> None:
        await self._mutate(rng, "update", state_json=self._state())

    async def wait(self, rng: random.Random) -> None:
        waiting: dict[str, Any] = {"wait_json": {"kind": "reply", "thread": self._names}}
        if rng.random() < 0.3:
            waiting = {"blocked_summary": "nobody knows"}
        await self._mutate(rng, "set_waiting", **waiting)

    async def resume(self, rng: random.Random) -> None:
        await self._mutate(rng, "resume", status=rng.choice(("queued", "running")))

    async def finish(self, rng: random.Random) -> None:
        await self._mutate(rng, "finish", state_json=self._state())

    async def fail(self, rng: random.Random) -> None:
        await self._mutate(rng, "fail", blocked_summary="gave up")

    async def request_cancel(self, rng: random.Random) -> None:
        await self._mutate(rng, "request_cancel")

    async def _mutate(self, rng: random.Random, name: str, **arguments: Any) -> None:
        picked = self._pick(rng)
        if picked is None:
            return
        flows, flow = picked
        if flow.revision >= TURNS_OF_A_FLOW and name != "request_cancel":
            name, arguments = "finish", {}
        answer = await getattr(flows, name)(
            flow_id=flow.flow_id, expected_revision=flow.revision, **arguments
        )
        self._answered(answer.code)
        self._learn(answer.flow)
        if isinstance(answer, Applied) and answer.flow.revision != flow.revision + 1:
            self.wrong.append(f"{name} took {flow} to {answer.flow}")

    async def cancel(self, rng: random.Random) -> None:
        picked = self._pick(rng, driven=rng.random() < 0.2)
        if picked is None:
            return
        flows, flow = picked
        report = await flows.cancel(flow.flow_id, grace=2.0)
        self._answered(report.code)
        self._learn(report.flow)

    async def launch(self, rng: random.Random) -> None:
        await self._add(rng, run=rng.choice(LAUNCHED), input_json=self._names)

    async def link(self, rng: random.Random) -> None:
        added = await self._add(rng, runtime="acp", status=rng.choice(("queued", "running")))
        if added is not None:
            self.linked.append(added)

    async def await_task(self, rng: random.Random) -> None:
        added = await self._add(rng, run=rng.choice(LAUNCHED), input_json=self._names)
        if added is not None:
            owner, task_id = added
            with anyio.move_on_after(2.0):
                await self.flows[owner].wait_task(task_id)

    async def _add(self, rng: random.Random, **arguments: Any) -> tuple[str, str] | None:
        picked = self._pick(rng)
        if picked is None:
            return None
        flows, flow = picked
        answer = await flows.run_task(
            flow_id=flow.flow_id, task="do it", run_id=self._name("run"), **arguments
        )
        self._answered(answer.code)
        return (flows.session_key, answer.task.task_id) if isinstance(answer, Created) else None

    async def report(self, rng: random.Random) -> None:
        if not self.linked:
            return
        place = rng.randrange(len(self.linked))
        owner, task_id = self.linked[place]
        flows, kind = self.flows[owner], rng.random()
        try:
            if kind < 0.2:
                task = await flows.start_task(task_id)
            elif kind < 0.4:
                task = await flows.progress_task(task_id, summary="half way")
            elif kind < 0.8:
                task = await flows.complete_task(task_id, result_json={"n": self._names})
            else:
                task = await flows.fail_task(task_id, error="gave up")
        except CancelPending:
            task = None
        if (task is None or task.ended_at is not None) and (owner, task_id) in self.linked:
            self.linked.remove((owner, task_id))

    async def read(self, rng: random.Random) -> None:
        picked = self._pick(rng)
        if picked is None:
            return
        flows, flow = picked
        kind = rng.randrange(6)
        if kind == 0:
            found = await flows.get(flow.flow_id)
            if found is None or found.revision < flow.revision:
                self.wrong.append(f"{flow} was read as {found}")
        elif kind == 1:
            await flows.list(status=rng.choice(LIVE), limit=20)
        elif kind == 2:
            await flows.list_tasks(flow.flow_id)
        elif kind == 3:
            await flows.history(flow.flow_id)
        elif kind == 4:
            await flows.get_task_summary(flow.flow_id)
        else:
            await flows.list(correlation_id=f"case-{rng.randrange(50)}", limit=5)

    # ---- the watchers -----------------------------------------------------------------------------

    async def _watcher(self, rng: random.Random) -> None:
        while not self.closing:
            await asyncio.sleep(rng.uniform(0.05, 0.5))
            await self._try(self.watch, rng)

    async def watch(self, rng: random.Random) -> None:
        """Watch one flow from its beginning, or all of them from now on, for a while."""
        picked = self._pick(rng) if rng.random() < 0.5 else None
        seen = 0
        with anyio.move_on_after(rng.uniform(0.1, 4.0)):
            if picked is None:
                async with self.flows[rng.choice(OWNERS)].watch() as events:
                    async for event in events:
                        self.counts["watched"] += 1
                        if event.position <= seen:
                            self.wrong.append(f"position {event.position} after {seen}")
                        seen = event.position
            else:
                flows, flow = picked
                async with flows.watch(flow.flow_id, after_seq=0) as events:
                    async for event in events:
                        self.counts["watched"] += 1
                        if event.seq != seen + 1:
                            self.wrong.append(f"seq {event.seq} after {seen} of {flow.flow_id}")
                        seen = event.seq

    # ---- remembering ------------------------------------------------------------------------------

    def _answered(self, code: str | None) -> None:
        self.counts["applied" if code is None else "refused"] += 1
        if code is not None:
            self.counts[f"refused: {code}"] += 1
        if code in FATAL_CODES:
            self.counts["failed calls"] += 1
            self.wrong.append(f"a call was answered {code}")

    def _learn(self, flow: Flow | None) -> None:
        if flow is None or flow.flow_id not in self.known:
            return
        if flow.ended_at is not None:
            del self.known[flow.flow_id]
            self.owners.pop(flow.flow_id, None)
        elif flow.revision > self.known[flow.flow_id].revision:
            self.known[flow.flow_id] = flow

    def _name(self, word: str) -> str:
        self._names += 1
        return f"{word}-{self.plan.seed}-{self.counts['reopened']}-{self._names}"

    def _state(self) -> dict[str, Any]:
        self._names += 1
        return {"mark": self._names, "items": [{"id": n, "text": "x" * 20} for n in range(6)]}


# ---- the verdict ----------------------------------------------------------------------------------


async def soak(path: Path, plan: Plan) -> Report:
    """Run the load, close everything, check the file, and say what was seen."""
    host = Host(path, plan)
    began = time.monotonic()
    await host.run()
    seconds = time.monotonic() - began
    say(f"loaded for {seconds:.0f} s; checking the file of {size_of(path) / MIB:.0f} MiB")
    peak = peak_rss()
    checking = time.monotonic()
    try:
        _count_file(host.counts, invariants.check_all(path))
    except AssertionError as error:
        host.wrong.append(f"the file is not as it must be: {error}")
    samples = host.samples
    figures: dict[str, Any] = {
        "calls": host.counts["calls"],
        "flow_writes": host._written,
        "commits": host._commits,
        "file_mib": round(size_of(path) / MIB, 1),
        "peak_rss_mib": round(peak / MIB, 1),
        "seconds_to_check_the_file": round(time.monotonic() - checking, 1),
    }
    if enough := len(samples) >= 8:
        half = second_half(samples)
        figures |= {
            "largest_wal_mib": round(max(sample.wal for sample in samples) / MIB, 1),
            "rss_mib_first_middle_last": [
                round(samples[at].rss / MIB, 1) for at in (0, len(samples) // 2, -1)
            ],
            "growth_in_second_half": {
                name: round(growth(half, name)) for name in ("rss", "objects", "tasks")
            },
            "allowed_growth": {name: round(most) for name, most in allowed_growth(samples).items()},
            "handles": sorted({sample.handles for sample in samples}),
            "threads": sorted({sample.threads for sample in samples}),
            "handles_when_closed": sorted({rest.handles for rest in host.rests}),
            "longest_turn_ms": max(sample.longest_turn_ms for sample in samples),
        }
    wrong = host.wrong + _vacuous(host.counts, plan)
    wrong += not_flat(samples, host.rests) if enough else ["vacuous: fewer than 8 samples"]
    return Report(
        plan=plan,
        seconds=round(seconds, 1),
        counts=dict(sorted(host.counts.items())),
        figures=figures,
        wrong=wrong,
        samples=samples,
    )


def _count_file(counts: Counter[str], file: invariants.File) -> None:
    for flow in file.flows.values():
        counts[f"flow {flow.doc['status']}"] += 1
        counts["driven to the end"] += (
            flow.doc["status"] == "succeeded" and flow.doc["controllerId"] == PIPELINE
        )
        for event in flow.events:
            counts["retried"] += event["type"] == "task.retry_scheduled"
            counts["released"] += event["type"] == "task.released"
    for task in file.tasks:
        counts[f"child {task.doc['status']}"] += 1
    counts["events"] = len(file.positions)


def _vacuous(counts: Counter[str], plan: Plan) -> list[str]:
    """What has not happened, or too seldom to prove anything."""
    missing = [f"vacuous: nothing {what!r}" for what in MUST_HAPPEN if not counts[what]]
    least = plan.rate * plan.seconds / 4
    if counts["calls"] < least:
        missing.append(f"vacuous: {counts['calls']} calls, {least:.0f} is the least")
    return missing


def say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Load for a while; memory has to stay flat.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=200.0, help="calls in a second")
    parser.add_argument("--reopen", type=float, default=240.0, help="seconds between reopenings")
    parser.add_argument("--sample", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--report", type=Path, help="where to write everything as JSON")
    parser.add_argument("--directory", type=Path, help="where to put the file; kept if given")
    given = parser.parse_args()
    plan = Plan(
        seconds=given.minutes * 60,
        rate=given.rate,
        sample_seconds=given.sample,
        reopen_seconds=given.reopen,
        seed=given.seed,
    )
    with tempfile.TemporaryDirectory() as made:
        directory = given.directory or Path(made)
        directory.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(soak(directory / "flows.db", plan))
    if given.report is not None:
        given.report.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    for name, figure in (report.figures | {"counts": report.counts}).items():
        say(f"{name}: {figure}")
    for sentence in report.wrong:
        say(f"WRONG: {sentence}")
    say("flat" if not report.wrong else "not as it must be")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
