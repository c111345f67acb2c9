"""The stage of the fault tests: a fault, bystanders that must not notice it, and the proof that it happened.

`stage` opens a runtime, with one bystander in the flow that is to suffer and one in another flow. When the test
is through, both must end as if nothing had been, the runtime must take new work, the fault must have fired, and
the file, where there is one, must hold every invariant. Tests that count rounds of the event loop or move the
clock use no file, because its threads would have a say in what happens first.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from flowstead import Runtime, SessionFlows, Succeeded, Task, TaskContext
from tests.faulty_store import flows_of, new_flow, running, settle, soon
from tests.invariants import check_all

STORM = int(os.environ.get("FLOWSTEAD_STORM", "2000"))
"""The size of a storm; each test takes its share or a multiple of it."""

TREE = int(os.environ.get("FLOWSTEAD_TREE", "120"))
"""How many children the tree has that is cut down."""


class Stage:
    """A runtime with a flow that will suffer, another that must not, and a bystander in each."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.flows: SessionFlows = flows_of(runtime)
        self.fired: list[str] = []
        self.undo: list[Callable[[], object]] = []
        """What has to be done, however the test ends, so that the runtime can be closed."""
        self.flow_id = self.other_id = ""
        self._go = asyncio.Event()
        self._bystanders: list[tuple[str, str]] = []

    def fire(self, what: str = "fault") -> None:
        """The fault has happened."""
        self.fired.append(what)

    async def begin(self) -> None:
        """Make both flows and let the bystanders stand by."""
        self.flow_id = await new_flow(self.flows, status="running")
        self.other_id = await new_flow(self.flows, status="running")
        for flow_id in (self.flow_id, self.other_id):
            task_id = await launch(self.flows, flow_id, self._stands_by)
            self._bystanders.append((flow_id, task_id))
        await settle()

    async def launch(self, run: Any, **given: Any) -> str:
        """A child in the flow that will suffer."""
        return await launch(self.flows, self.flow_id, run, **given)

    async def check_others(self, *, is_flow_cancelled: bool = False) -> None:
        """Nobody was harmed: bystanders end well, once; both flows and the runtime take new work."""
        self._go.set()
        flows = self.flows
        for flow_id, task_id in self._bystanders:
            if is_flow_cancelled and flow_id == self.flow_id:
                continue
            assert await soon(flows.wait_task(task_id)) == Succeeded("unharmed")
            assert await ends_of(flows, flow_id, task_id) == ["succeeded"]
            after = await launch(flows, flow_id, passes, input_json="after")
            assert await soon(flows.wait_task(after)) == Succeeded("after")
            flow = await flows.get(flow_id)
            assert flow
            assert flow.status == "running"
            changed = flows.update(
                flow_id=flow_id, expected_revision=flow.revision, state_json={"after": True}
            )
            assert (await soon(changed)).applied
        fresh = await new_flow(flows)
        assert (await soon(flows.finish(flow_id=fresh, expected_revision=0))).applied

    async def _stands_by(self, ctx: TaskContext, given: object) -> str:
        await self._go.wait()
        return "unharmed"


@asynccontextmanager
async def stage(path: Path | None = None, **options: Any) -> AsyncIterator[Stage]:
    """A stage in a runtime that must close promptly; the file it leaves is checked to the last row."""
    options.setdefault("durability", "normal")
    async with running(path or ":memory:", **options) as runtime:
        it = Stage(runtime)
        try:
            await it.begin()
            yield it
            assert it.fired, "vacuous: the fault never happened"
        finally:
            for undo in it.undo:
                undo()
    if path is not None:
        check_all(path)


async def launch(flows: SessionFlows, flow_id: str, run: Any, **given: Any) -> str:
    """A launched child, by its id."""
    made = await soon(flows.run_task(flow_id=flow_id, task="t", run=run, **given))
    return made.unwrap().task_id


async def passes(ctx: TaskContext, given: Any) -> Any:
    return given


async def task_of(flows: SessionFlows, task_id: str) -> Task:
    task = await flows.get_task(task_id)
    assert task
    return task


async def ends_of(flows: SessionFlows, flow_id: str, task_id: str) -> list[str]:
    """The statuses a child was recorded to end with; one entry if all is well."""
    return [
        event.changed["status"]
        for event in await flows.history(flow_id)
        if event.task_id == task_id and event.type == "task.ended"
    ]


async def types_of(flows: SessionFlows, flow_id: str) -> list[str]:
    """The kinds of all events of a flow, in order."""
    return [str(event.type) for event in await flows.history(flow_id)]


@contextmanager
def listening() -> Iterator[list[str]]:
    """What the runtime logs meanwhile: one line for each record, with everything said in it."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(f"{record.levelname} {record.getMessage()} {vars(record)}")

    logger, ear, level = logging.getLogger("flowstead"), Ear(), logging.getLogger("flowstead").level
    logger.addHandler(ear)
    logger.setLevel(logging.DEBUG)
    try:
        yield heard
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
