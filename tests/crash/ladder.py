"""Small programs killed on a certain rung of a stop, or between two commits, and those that go on after them.

A life tells each event once it is on disk (`event`), each child whose code begins (`ran`), each controller that is
entered (`entered`), and the commit it stands before, if it was told to hold one (`held`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from flowstead import (
    FlowContext,
    Limits,
    NeedsReview,
    Nested,
    Registry,
    Retry,
    SessionFlows,
    TaskContext,
    open_runtime,
)
from flowstead.engine.clock import SystemClock
from flowstead.store.codec import FlowWrite
from flowstead.store.sqlite import SqliteStore
from tests.crash.census import program
from tests.crash.harness import PATIENCE, Journal
from tests.crash.scenes import appears, bind, quiet, records

TOP: Final = "top"
MID: Final = "ladder/mid"
LOW: Final = "ladder/low"
PROGRAMS: Final = {
    "program": ("later",),
    "fragile program": ("later",),
    "deaf program": ("later", "stubborn"),
    "family": ("later", "stubborn", "family"),
    "brief program": ("brief",),
}


class HeldStore(SqliteStore):
    """A store that stands still, for ever, at the first commit that writes what it is told to wait for.

    `words` names kinds of rows (`flow`, `task`, `event`, `signal`, `update`) and what has to occur in one of that
    kind, all of them among what is written of one flow. It stands before that commit, or, if `after`, when it is
    on disk and nobody knows.
    """

    def __init__(self, path: str, journal: Journal, words: dict[str, str], *, after: bool) -> None:
        super().__init__(path)
        self._journal = journal
        self._words = words
        self._after = after

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        is_meant = self._words and any(self._is_meant(write) for write in writes)
        if is_meant and not self._after:
            await self._stand_still()
        position = await super().commit(writes)
        if is_meant:
            await self._stand_still()
        return position

    async def _stand_still(self) -> None:
        self._journal.write(held=self._words)
        await asyncio.Event().wait()

    def _is_meant(self, write: FlowWrite) -> bool:
        rows = {
            "flow": [] if write.flow is None else [write.flow.doc],
            "task": [task.doc for task in write.tasks],
            "event": [event.doc for event in write.events],
            "signal": [signal.doc for signal in write.signals],
            "update": [update.doc for update in write.updates],
        }
        return all(any(word in row for row in rows[kind]) for kind, word in self._words.items())


class AheadClock(SystemClock):
    """A clock that shows a later time."""

    def __init__(self, seconds: float) -> None:
        self._ahead = round(seconds * 1000)

    def now(self) -> int:
        return super().now() + self._ahead


class Play:
    """The code of one life."""

    def __init__(self, journal: Journal, folder: str, concurrency: int | None) -> None:
        self.journal = journal
        self.folder = folder
        self.end = Path(folder, "end")
        self.registry = Registry()
        often = Retry(max_attempts=2, initial=3600.0, max_delay=3600.0, jitter=0.0)
        task = self.registry.task
        task(self.patient, name="patient")
        task(self.deaf, name="deaf")
        task(self.quick, name="quick")
        task(self.patient_once, name="fragile", idempotent=False)
        task(self.quick_once, name="fragile and quick", idempotent=False)
        task(self.unlucky, name="unlucky", retry=often)
        task(self.picky, name="picky")
        task(self.threaded, name="threaded")
        task(self.patient_in_line, name="narrow", concurrency=concurrency)
        self.registry.controller(MID)(self.mid)
        self.registry.controller(LOW)(self.low)

    def runnable(self, sort: str) -> Any:
        """What a sort of child runs."""
        if sort in PROGRAMS:
            words = PROGRAMS[sort]
            return program(self.folder, 0.0 if "brief" in words else 60.0, *words)
        return Nested(MID) if sort == "nested" else sort

    def _tell(self, ctx: Any) -> None:
        self.journal.write(ran=ctx.run_id, attempt=ctx.attempt)

    # ---- children ---------------------------------------------------------------------------------

    async def patient(self, ctx: TaskContext, given: Any) -> Any:
        self._tell(ctx)
        await appears(str(self.end))
        return ctx.attempt

    async def deaf(self, ctx: TaskContext, given: Any) -> Any:
        self._tell(ctx)
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.journal.write(deaf=ctx.run_id)

    async def quick(self, ctx: TaskContext, given: Any) -> Any:
        self._tell(ctx)
        return ctx.attempt

    async def patient_once(self, ctx: TaskContext, given: Any) -> Any:
        return await self.patient(ctx, given)

    async def quick_once(self, ctx: TaskContext, given: Any) -> Any:
        return await self.quick(ctx, given)

    async def patient_in_line(self, ctx: TaskContext, given: Any) -> Any:
        try:
            return await self.patient(ctx, given)
        finally:
            self.journal.write(over=ctx.run_id)

    async def unlucky(self, ctx: TaskContext, given: Any) -> Any:
        self._tell(ctx)
        if ctx.attempt == 1:
            raise OSError("not this time")
        return ctx.attempt

    async def picky(self, ctx: TaskContext, given: Any) -> Any:
        self._tell(ctx)
        if given != "what it likes":
            raise NeedsReview("is this right?")
        return ctx.attempt

    def threaded(self, ctx: Any, given: Any) -> Any:
        self._tell(ctx)
        pause = threading.Event()
        while not self.end.exists():
            ctx.check_cancelled()
            pause.wait(0.002)
        return ctx.attempt

    # ---- controllers ------------------------------------------------------------------------------

    async def mid(self, flow: FlowContext) -> None:
        self.journal.write(entered=MID)
        below = await flow.run(Nested(LOW), flow.state_json, name="low")
        await flow.finish(state_json={"low": below})

    async def low(self, flow: FlowContext) -> None:
        self.journal.write(entered=LOW)
        leaf = await flow.run(self.runnable(flow.state_json["leaf"]), name="leaf")
        await flow.finish(state_json={"leaf": leaf})


def retry(journal: Journal, *, path: str, folder: str) -> None:
    """Let a flow fail after a child has succeeded, go on from it, and run a child that has a flow to itself."""

    async def main() -> None:
        play = Play(journal, folder, None)
        async with open_runtime(path, registry=play.registry) as runtime:
            flows = bind(runtime)
            await flows.create_managed(controller_id="nobody", goal="g", flow_id=TOP)
            made = await flows.run_task(flow_id=TOP, task="t", run="quick", run_id="quick")
            await flows.wait_task(made.unwrap().task_id)
            (await flows.fail(flow_id=TOP, expected_revision=0)).unwrap()
            (await flows.retry_flow(TOP)).unwrap()
            alone = await flows.spawn_detached(task="t", run="quick")
            await flows.result(alone.flow.flow_id)
        journal.write(closed=True)

    asyncio.run(main())


async def _tell_events(journal: Journal, flows: SessionFlows) -> None:
    async with flows.watch() as events:
        journal.write(watching=True)
        async for event in events:
            journal.write(event=event.type, flow=event.flow_id, task=event.task_id)


def climb(
    journal: Journal,
    *,
    path: str,
    folder: str,
    sorts: list[str],
    leaf: str = "patient",
    hold: dict[str, str] | None = None,
    after: bool = False,
    limits: dict[str, float] | None = None,
) -> None:
    """Run children of these sorts, each in a flow of its own, do as files tell, and wait to be killed.

    The flow of the first is called `top`. A file `cancel` or `request_cancel` in the folder is what to do to it.
    """

    async def main() -> None:
        play = Play(journal, folder, None)
        store = HeldStore(path, journal, hold or {}, after=after)
        bounds = Limits(**{"kill_after": 3600.0, "abandon_after": 3600.0, **(limits or {})})
        async with open_runtime(store, registry=play.registry, limits=bounds) as runtime:
            flows = bind(runtime)
            telling = asyncio.create_task(_tell_events(journal, flows))
            for number, sort in enumerate(sorts):
                flow_id = f"flow-{number}" if number else TOP
                await flows.create_managed(controller_id="nobody", goal="g", flow_id=flow_id)
                await flows.run_task(
                    flow_id=flow_id,
                    task=sort,
                    run=play.runnable(sort),
                    run_id=f"{sort}-{number}",
                    input_json={"leaf": leaf},
                    idempotent=None if "fragile" not in sort else False,
                )
            journal.write(ready=True)
            await _do_as_told(flows, Path(folder))
            await telling

    asyncio.run(main())


async def _do_as_told(flows: SessionFlows, folder: Path) -> None:
    told = [folder / "cancel", folder / "request_cancel"]
    while not any(file.exists() for file in told):  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    if told[0].exists():
        await flows.cancel(TOP, grace=3600.0)
    else:
        flow = await flows.get(TOP)
        assert flow is not None
        (await flows.request_cancel(flow_id=TOP, expected_revision=flow.revision)).unwrap()


def go_on(
    journal: Journal,
    *,
    path: str,
    folder: str,
    until: str = "ended",
    ahead: float = 0.0,
    answer: str | None = None,
    cancel: bool = False,
    limits: dict[str, float] | None = None,
    concurrency: int | None = None,
) -> None:
    """Own the file after a life that was killed, see it to an end, tell, and close.

    Args:
        until: What to wait for: every launched child has `ended`, or nothing moves any more (`rest`).
        ahead: How many seconds later it is than the system says.
        answer: What to tell a child that a person has to look at: `resume` its flow, or `retry_task` it.
        cancel: Whether every flow is cancelled at once.
        limits, concurrency: Bounds, in all and of the task `narrow`.
    """

    async def main() -> None:
        play = Play(journal, folder, concurrency)
        bounds = Limits(**(limits or {}))
        clock = AheadClock(ahead)
        async with open_runtime(
            path, registry=play.registry, limits=bounds, clock=clock
        ) as runtime:
            flows = bind(runtime)
            if cancel:
                for flow in await flows.list():
                    await flows.cancel(flow.flow_id, grace=PATIENCE)
            if answer is not None:
                await quiet(runtime)
                journal.write(before=await records(runtime))
                await _answer(flows, answer)
            if until == "ended":
                await _all_ended(flows)
            await quiet(runtime)
            journal.write(ready=True, records=await records(runtime))
        journal.write(closed=True)

    asyncio.run(main())


async def _answer(flows: SessionFlows, how: str) -> None:
    flow = await flows.get(TOP)
    assert flow is not None and flow.blocked_task_id is not None, flow
    if how == "resume":
        answer = await flows.resume(flow_id=TOP, expected_revision=flow.revision)
        answer.unwrap()
    else:
        report = await flows.retry_task(flow.blocked_task_id, input_json="what it likes")
        assert report.retried, report


async def _all_ended(flows: SessionFlows) -> None:
    async with asyncio.timeout(PATIENCE):
        for flow in await flows.list(limit=1000):
            for task in await flows.list_tasks(flow.flow_id):
                await flows.wait_task(task.task_id)
            if flow.cancel_requested_at is not None:
                await flows.result(flow.flow_id)


SCENES: dict[str, Callable[..., None]] = {scene.__name__: scene for scene in (climb, go_on, retry)}
