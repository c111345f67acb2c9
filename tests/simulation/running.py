"""The code that runs in a world: children that do what their input says, and controllers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import anyio

from flowstead import (
    Fatal,
    FlowContext,
    NeedsReview,
    Nested,
    Registry,
    Retry,
    Step,
    TaskContext,
    Transient,
)
from tests.simulation import judge
from tests.simulation import model as spec
from tests.simulation.outside import ProgramExecutor
from tests.simulation.waiting import Waiting

if TYPE_CHECKING:
    from tests.simulation.machine import World

RETRIES = {
    "flaky": Retry(max_attempts=3, initial=1.0, factor=3.0, jitter=0.5),
    "picky": Retry(max_attempts=3, initial=0.5, jitter=0.0, retry_on=("transient", "validation")),
}
"""The registered tasks that are tried again."""
ONCE = "fragile"
"""The registered task that must not be done twice."""
ASKED_TO_WAIT = 3.0
"""Seconds that those who refuse ask to be left alone for."""


class ValidationError(Exception):
    """What several libraries call an input that makes no sense."""


class Code:
    """The children and controllers of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.running: dict[str, int] = {}
        """The attempt of each child whose code runs, in the present process."""
        self.deaf: set[str] = set()
        """Children that do not stop when they are asked to, for a while or for ever."""
        self.tidied: set[str] = set()
        """Children whose code was begun in order to see to what an earlier process has left."""
        self.given_up: set[str] = set()
        """Children whose code runs on though their record has ended."""
        self.begun: dict[str, list[tuple[int, int]]] = {}
        """The process and the attempt of each time that a child's code began."""
        self.hanging: dict[str, asyncio.Event] = {}
        self.gates_open = False
        self.waiting = Waiting(world)

    def registry(self) -> Registry:
        """Everything that can be run here."""
        registry = Registry()
        registry.executor(ProgramExecutor(self._world))
        child = self._child
        registry.task(name="work")(child())
        registry.task(name="flaky", retry=RETRIES["flaky"])(child())
        registry.task(name="picky", retry=RETRIES["picky"])(child())
        registry.task(name="timed", timeout=spec.DEADLINE)(child())
        registry.task(name="quiet", idle_timeout=spec.DEADLINE)(child())
        registry.task(name=ONCE, idempotent=False)(child())
        registry.task(name="narrow", concurrency=spec.NARROW)(child())
        registry.task(name="tool", executor=ProgramExecutor.name)(child())
        for name, drive in (
            ("plan", self._plan),
            ("raise", self._raise),
            ("give up", self._give_up),
            ("patient", self._patient),
            ("bare", self._bare_steps),
            ("race", self._race),
            ("collect", self._collect),
            ("fall back", self._fall_back),
            ("root", self._root),
            ("branch", self._branch),
            ("leaf", self._leaf),
            ("asks", self._ask),
            ("deaf", self._do_not_listen),
            *self.waiting.all().items(),
        ):
            registry.controller(name)(drive)
        return registry

    def _child(self) -> Any:
        async def child(context: TaskContext, given: Any) -> Any:
            return await self.bare(context, given)

        return child

    async def bare(self, context: TaskContext, given: Any) -> Any:
        """Do what the input says; by itself, a function that no registry knows."""
        return await self.watched(context, self._do(context, (given or {}).get("do", "succeed")))

    async def watched(
        self, context: TaskContext, code: Awaitable[Any], *, counts: bool = True
    ) -> Any:
        """Run a child, and see that it should run at all; one that is only tidied up does not count."""
        world, task_id = self._world, context.task_id
        process = world.process
        self._check_start(process, context)
        self.running[task_id] = context.attempt
        if counts:
            self._check_limits(task_id)
        else:
            self.tidied.add(task_id)
        try:
            return await code
        finally:
            if process not in world.processes:
                world.orphans.discard(task_id)
            elif task_id in self.given_up:
                self.given_up.discard(task_id)
                world.seen["ended after it was given up"] += 1
            else:
                self.running.pop(task_id, None)

    def _check_start(self, process: int, context: TaskContext) -> None:
        world, task_id, attempt = self._world, context.task_id, context.attempt
        recorded = world.model.task(task_id)
        if recorded is None or recorded.attempt < attempt:
            world.violations.append(f"{task_id} runs as {attempt}, but the disk says {recorded}")
        if task_id in self.running and not world.overtaken:
            world.violations.append(f"{task_id} runs twice at the same time")
        begun = self.begun.setdefault(task_id, [])
        # Two runtimes may adopt the same attempt at the same time: the one that was overtaken does not know it yet.
        if (process, attempt) in begun and not world.overtaken:
            world.violations.append(f"attempt {attempt} of {task_id} is run twice")
        begun.append((process, attempt))
        world.seen["code begun"] += 1

    def _check_limits(self, task_id: str) -> None:
        """No more run at once than may: of this child's task, and of all."""
        world = self._world
        if world.overtaken:
            return
        counted = self.running.keys() - self.tidied
        named = [world.asked_of(one).function for one in counted]
        world.seen["full"] += len(named) == world.limits.running_in_all
        if len(named) > world.limits.running_in_all:
            world.violations.append(f"{task_id} is one too many, of all: {sorted(self.running)}")
        if world.asked_of(task_id).function == "narrow" and named.count("narrow") > spec.NARROW:
            world.violations.append(f"{task_id} is one too many of its task: {self.running}")

    def give_up(self, task_id: str) -> None:
        """The record of a child has ended without its code."""
        if self.running.pop(task_id, None) is not None:
            self.given_up.add(task_id)
            self._world.seen["given up"] += 1

    def bury(self) -> None:
        """The process has ended."""
        self.running.clear()
        self.given_up.clear()
        self.tidied.clear()
        self.hanging.clear()

    # ---- children ---------------------------------------------------------------------------------

    async def _do(self, context: TaskContext, what: str) -> Any:
        self._world.seen[f"code {what}"] += 1
        await self.fail(context, what)
        match what:
            case "nap":
                await asyncio.sleep(1.5)
            case "progress":
                await context.progress(f"at {context.attempt}")
                await context.heartbeat()
            case "murmur":
                for _ in range(5):
                    await asyncio.sleep(1.0)
                    await context.heartbeat()
            case "hang":
                await self._hang(context.task_id)
            case "swallow":
                for _ in range(3):
                    try:
                        await self._hang(context.task_id)
                    except asyncio.CancelledError:
                        continue
            case "stubborn":
                self.deaf.add(context.task_id)
                with anyio.CancelScope(shield=True):
                    await asyncio.sleep(3.0)
            case "deaf for a while":
                self.deaf.add(context.task_id)
                with anyio.CancelScope(shield=True):
                    await asyncio.sleep(12.0)
            case "deaf":
                await self._be_deaf(context.task_id)
            case "odd":
                return {"not": float("nan")}
        return {"by": context.task_id, "attempt": context.attempt}

    async def fail(self, context: TaskContext, what: str) -> None:
        """Raise what the input wants to be raised, if anything."""
        first = context.attempt == 1
        match what:
            case "fail":
                raise ValueError("as asked")
            case "fail once" if first:
                raise ValueError("the first time")
            case "fail late" | "fail late once":
                await asyncio.sleep(1.5)
                if what == "fail late" or first:
                    raise ValueError("in the end")
            case "transient":
                raise Transient("busy")
            case "transient once" if first:
                raise ConnectionError("gone")
            case "transient later" if first:
                raise Transient("not now", retry_after=ASKED_TO_WAIT)
            case "fatal":
                raise Fatal("hopeless")
            case "denied":
                raise PermissionError("not for you")
            case "invalid":
                raise ValidationError("no such thing")
            case "review":
                raise NeedsReview("look at this")
            case "review once" if context.attempt == 1:
                raise NeedsReview("look at this first")
            case "exit":
                raise SystemExit(1)

    async def _hang(self, name: str) -> None:
        if not self.gates_open:
            await self.hanging.setdefault(name, asyncio.Event()).wait()

    async def _be_deaf(self, name: str) -> None:
        """Hang, and take no notice of whoever wants it to stop."""
        self.deaf.add(name)
        while not self.gates_open:
            try:
                await self._hang(name)
            except asyncio.CancelledError:
                continue
            return

    def release(self, number: int) -> None:
        """Let one of those that hang go on."""
        waiting = sorted(self.hanging)
        if waiting:
            self.hanging.pop(waiting[number % len(waiting)]).set()

    def open_gates(self) -> None:
        """From here on nothing hangs."""
        self.gates_open = True
        for event in self.hanging.values():
            event.set()
        self.hanging.clear()
        self._world.outside.let_go_on()

    # ---- controllers ------------------------------------------------------------------------------

    async def _plan(self, flow: FlowContext) -> None:
        await flow.run("work", {"do": "nap"})
        await flow.update(current_step="planned", state_json={"planned": True})
        doing = ("succeed", "fail", "nap", "progress")
        inputs = [{"do": what} for what in doing]
        outcomes = await flow.map("work", inputs, name="many", limit=2, return_outcomes=True)
        await flow.once("post", self._post)
        await flow.finish(state_json={"outcomes": len(outcomes)})

    async def _post(self) -> Any:
        self._world.seen["once"] += 1
        return "posted"

    async def _raise(self, flow: FlowContext) -> None:
        await flow.run("flaky", {"do": "fail once"})
        raise RuntimeError("as planned")

    async def _give_up(self, flow: FlowContext) -> None:
        await flow.fail(blocked_summary="no way on")

    async def _patient(self, flow: FlowContext) -> None:
        await flow.run("work", {"do": "hang"}, name="long")

    async def _bare_steps(self, flow: FlowContext) -> None:
        await flow.run(self.bare, {"do": "nap"}, name="first")
        await flow.run(self.bare, {"do": "succeed"}, name="second")

    async def _race(self, flow: FlowContext) -> None:
        named = list(spec.RACERS)
        # Not all of them may run at once, so the order counts; it is another in another flow.
        turn = _turn(flow, len(named))
        racers = [
            await flow.start("work", {"do": spec.RACERS[name]}, name=name)
            for name in named[turn:] + named[:turn]
        ]
        [winner] = await flow.first(racers)
        await flow.update(state_json={"winner": winner.name})
        losers = [racer for racer in racers if racer != winner]
        ends = {loser.name: judge.status_of(await loser.outcome()) for loser in losers}
        await flow.finish(state_json={"winner": winner.name, "losers": ends})
        self._world.seen[f"race won by {winner.name}"] += 1
        self._world.seen.update(f"race lost by a child that {end}" for end in ends.values())

    async def _collect(self, flow: FlowContext) -> None:
        retry = Retry(max_attempts=spec.PART_ATTEMPTS, initial=2.0, jitter=0.0)
        steps = [
            await flow.start("work", {"do": what}, name=name, retry=retry)
            for name, what in spec.PARTS.items()
        ]
        if _turn(flow, 2):
            # Most of them have ended before anybody looks, in another order than they were begun.
            await asyncio.sleep(6.0)
        order: list[Any] = []
        async for step in flow.as_completed(steps):
            order.append(step.name)
            # Each place is one to crash at, and to be run again from the top.
            await flow.update(state_json={"order": order})
        outcomes = await flow.gather(*steps, return_outcomes=True)
        statuses: list[Any] = [judge.status_of(outcome) for outcome in outcomes]
        await flow.finish(state_json={"order": order, "outcomes": statuses})
        self._world.seen["collected"] += 1

    async def _fall_back(self, flow: FlowContext) -> None:
        main, *others = spec.CHAIN.values()
        found: Any = await flow.run(main, {"do": "fail late once"}, name="main", fallback=others)
        await flow.finish(state_json={"by": found["by"]})
        self._world.seen["fell back"] += 1

    async def _root(self, flow: FlowContext) -> None:
        """Flows below flows below this one, and a child of its own beside them."""
        steps: list[Step] = [
            await flow.start(Nested("branch"), {"for": flow.flow_id}, name="branch"),
            await flow.start("work", {"do": "nap"}, name="mine"),
            await flow.start(Nested("leaf"), {"for": flow.flow_id}, name="leaf"),
        ]
        outcomes = await flow.gather(*steps, return_outcomes=True)
        statuses: list[Any] = [judge.status_of(outcome) for outcome in outcomes]
        await flow.finish(state_json={"ended": statuses})
        self._world.seen["root finished"] += 1

    async def _branch(self, flow: FlowContext) -> None:
        await flow.run("work", {"do": "progress"}, name="before")
        found = await flow.run(Nested("leaf"), {"for": flow.flow_id}, name="below")
        await flow.finish(state_json={"found": found})
        self._world.seen["branch finished"] += 1

    async def _leaf(self, flow: FlowContext) -> None:
        """Done soon, or waiting, or failed beside a child that is slow to stop, or with one that will not."""
        turn = _turn(flow, 4)
        if turn == 2:
            await flow.start("work", {"do": "stubborn"}, name="slow leaf")
            await flow.run("work", {"do": "fail late"}, name="broken leaf")
        elif turn == 3:
            await flow.start("work", {"do": "deaf"}, name="deaf")
        await flow.run("work", {"do": "hang" if turn else "nap"}, name="at last")
        await flow.finish(state_json={"leaf": flow.flow_id})

    async def _ask(self, flow: FlowContext) -> None:
        """A child that a person has to look at, while the controller goes on."""
        asked = await flow.start("work", {"do": "review once"}, name="asked")
        again = await flow.start("work", {"do": "review once"}, name="asked again")
        await flow.update(current_step="asked")
        outcomes = await flow.gather(asked, again, return_outcomes=True)
        statuses: list[Any] = [judge.status_of(outcome) for outcome in outcomes]
        await flow.finish(state_json={"answered": statuses})
        self._world.seen["answered"] += 1

    async def _do_not_listen(self, flow: FlowContext) -> None:
        """A controller that will not stop."""
        await flow.run("work", {"do": "nap"})
        await self._be_deaf(flow.flow_id)
        await flow.run("work", {"do": "nap"}, name="in the end")


def _turn(flow: FlowContext, ways: int) -> int:
    """One of several ways, another in another flow."""
    return sum(map(ord, flow.flow_id)) % ways
