"""What runs under the flows of a loaded store: children of every sort, and controllers that drive them.

A child tells when its code begins (`ran`), an effect when it happens (`effect`). What each sort may end as is for
the checker to know, by the name its function is registered under.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from flowstead import (
    ChildCancelled,
    Failed,
    Fatal,
    FlowContext,
    NeedsReview,
    Nested,
    Registry,
    Retry,
    TaskContext,
    Transient,
)
from tests.crash.harness import Journal

PIPELINE: Final = "load/pipeline"
TREE: Final = "load/tree"
DEEPEST: Final = 2
NARROW: Final = 2
RETRY_AFTER: Final = 0.05

USUAL: Final = (
    *("quick", "quick", "slow", "slow", "broken"),
    *("flaky", "patient", "stuck", "fragile", "bare"),
)
UNUSUAL: Final = (
    *("picky", "picky", "picky", "busy", "busy", "locked", "hopeless", "idle"),
    *("narrow", "narrow", "narrow", "threaded", "threaded", "blind", "stubborn", "stubborn"),
)
ONCE: Final = frozenset({"fragile", "blind"})
"""What must not be begun twice."""


class Locked(Exception):
    """As an HTTP client would say that it is not let in."""

    status_code = 401


class Children:
    """The children of one process, and which of them are at it."""

    def __init__(
        self,
        journal: Journal,
        *,
        tell_wrong: Callable[[str], None],
        set_step: Callable[[FlowContext, str], Awaitable[None]],
    ) -> None:
        self.journal = journal
        self.registry = Registry()
        self.inside: Counter[str] = Counter()
        self.in_review: list[str] = []
        self._tell_wrong = tell_wrong
        self._set = set_step
        self._at_it: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._register()

    def _register(self) -> None:
        often = Retry(max_attempts=5, initial=0.001)
        for function, name, options in (
            (self.quick, "quick", {}),
            (self.slow, "slow", {"timeout": 30.0}),
            (self.broken, "broken", {}),
            (self.flaky, "flaky", {"retry": Retry(max_attempts=3, initial=0.01, jitter=0.5)}),
            (self.patient, "patient", {"retry": Retry(max_attempts=9, initial=0.25, factor=1.5)}),
            (self.stuck, "stuck", {"timeout": 0.06, "retry": Retry(max_attempts=2, initial=0.05)}),
            (self.fragile, "fragile", {"idempotent": False}),
            (self.picky, "picky", {"retry": often}),
            (self.busy, "busy", {"retry": often}),
            (self.locked, "locked", {"retry": often}),
            (self.hopeless, "hopeless", {"retry": often}),
            (self.idle, "idle", {"idle_timeout": 0.04}),
            (self.narrow, "narrow", {"concurrency": NARROW, "queue_timeout": 0.03}),
            (self.stubborn, "stubborn", {}),
        ):
            self.registry.task(self.told(function, name), name=name, **options)
        self.registry.task(self._told_in_a_thread(self.threaded, "threaded"), name="threaded")
        blind = self._told_in_a_thread(self.blind, "blind")
        self.registry.task(blind, name="blind", idempotent=False)
        self.registry.controller(PIPELINE)(self.pipeline)
        self.registry.controller(TREE)(self.tree)

    # ---- telling ----------------------------------------------------------------------------------

    def told(
        self, function: Callable[[TaskContext, Any], Awaitable[Any]], sort: str
    ) -> Callable[[TaskContext, Any], Awaitable[Any]]:
        async def run(ctx: TaskContext, given: Any) -> Any:
            self._enter(ctx, sort)
            try:
                return await function(ctx, given)
            finally:
                self._leave(ctx, sort)

        return run

    def _told_in_a_thread(self, function: Callable[[Any, Any], Any], sort: str) -> Any:
        def run(ctx: Any, given: Any) -> Any:
            self._enter(ctx, sort)
            try:
                return function(ctx, given)
            finally:
                self._leave(ctx, sort)

        return run

    def _enter(self, ctx: Any, sort: str) -> None:
        with self._lock:
            self.journal.write(ran=ctx.task_id, flow=ctx.flow_id, attempt=ctx.attempt, sort=sort)
            self.inside[ctx.flow_id] += 1
            self._at_it[sort] += 1
            if self._at_it["narrow"] > NARROW:
                self._tell_wrong(f"{self._at_it['narrow']} run of what has room for {NARROW}")

    def _leave(self, ctx: Any, sort: str) -> None:
        with self._lock:
            self.inside[ctx.flow_id] -= 1
            self._at_it[sort] -= 1

    # ---- children ---------------------------------------------------------------------------------

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

    async def picky(self, ctx: TaskContext, given: Any) -> Any:
        """Wants to be looked at before its second attempt, unless it is given what it likes."""
        if ctx.attempt > 1 or given == "what it likes":
            return given
        self.in_review.append(ctx.task_id)
        raise NeedsReview("is this right?")

    async def busy(self, ctx: TaskContext, given: Any) -> Any:
        if ctx.attempt < 3:
            raise Transient("too much to do", retry_after=RETRY_AFTER)
        return given

    async def locked(self, ctx: TaskContext, given: Any) -> Any:
        raise Locked("who are you?")

    async def hopeless(self, ctx: TaskContext, given: Any) -> Any:
        raise Fatal("this can never be")

    async def idle(self, ctx: TaskContext, given: Any) -> Any:
        await ctx.heartbeat()
        await asyncio.Event().wait()

    async def narrow(self, ctx: TaskContext, given: Any) -> Any:
        await asyncio.sleep(0.06)
        return given

    async def stubborn(self, ctx: TaskContext, given: Any) -> Any:
        """Does not hear that it is to stop, for longer than anybody waits for it."""
        over = asyncio.get_running_loop().time() + 0.3
        while (left := over - asyncio.get_running_loop().time()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                continue
        return given

    def threaded(self, ctx: Any, given: Any) -> Any:
        never = threading.Event()
        for lap in range(4):
            never.wait(0.01 + (given % 3) * 0.01)
            ctx.check_cancelled()
            if lap == 1:
                ctx.progress("half way")
        return given

    def blind(self, ctx: Any, given: Any) -> Any:
        threading.Event().wait(0.02 + (given % 4) * 0.03)
        return given

    # ---- controllers ------------------------------------------------------------------------------

    async def pipeline(self, flow: FlowContext) -> None:
        """A controller with every kind of step, each result checked against what it must be."""
        opened = await flow.once("open", self._effect(flow, "open"))
        # In a flow that goes on from an ended one it was that one's effect.
        assert flow.flow.retry_of or opened == {"flow": flow.flow_id, "name": "open"}, opened
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

    async def tree(self, flow: FlowContext) -> None:
        """A controller that has its like below it, a few floors deep, and work on each floor."""
        deep = flow.state_json["deep"]
        below = None
        if deep < DEEPEST:
            step = await flow.start(Nested(TREE), {"deep": deep + 1}, name="below")
            results = await flow.map("slow", [deep, 3], name="beside", limit=1)
            assert results == [deep, 3], results
            try:
                below = await step.result()
            except ChildCancelled:
                pass  # somebody has cancelled the flow itself
            assert below is None or below["deep"] == deep + 1, below
        else:
            await flow.run("threaded", deep, name="ground")
            await flow.run("slow", 6, name="rest")
        await flow.finish(state_json={"deep": deep, "below": below}, current_step="closed")

    def _effect(self, flow: FlowContext, name: str) -> Callable[[], Awaitable[Any]]:
        async def effect() -> Any:
            self.journal.write(effect=name, flow=flow.flow_id)
            await asyncio.sleep(0.01)
            return {"flow": flow.flow_id, "name": name}

        return effect
