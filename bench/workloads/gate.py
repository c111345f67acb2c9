"""A gate that children wait at: it knows when so many have come, and lets all of them through at once."""

from __future__ import annotations

import asyncio

from bench.sample import CONTROLLER, GOAL, OWNER
from flowstead import Flow, FlowContext, Registry, Runtime, TaskContext


class Gate:
    """`await gate.wait()` in a child; `await gate.full(n)` and `gate.open()` outside."""

    def __init__(self) -> None:
        self._came = 0
        self._wanted = 0
        self._full = asyncio.Event()
        self._opened = asyncio.Event()

    async def wait(self) -> None:
        """Wait until the gate is opened."""
        self._came += 1
        if self._came == self._wanted:
            self._full.set()
        await self._opened.wait()

    async def full(self, wanted: int) -> None:
        """Return once so many have come, all in all."""
        self._wanted = wanted
        self._full.clear()
        if self._came < wanted:
            await self._full.wait()
        assert self._came == wanted, f"{self._came} have come, not {wanted}"

    def open(self) -> None:
        """Let everybody through."""
        self._opened.set()


class Crowd:
    """Flows whose controller maps children that wait at the gate, so many at a time."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.registry = Registry()
        self.registry.task(self.stand)
        self.registry.controller(CONTROLLER)(self._drive)

    async def stand(self, _context: TaskContext, number: int) -> int:
        """What each child does."""
        await self.gate.wait()
        return number

    async def _drive(self, flow: FlowContext) -> None:
        if (task := asyncio.current_task()) is not None:
            task.set_name("controller")  # whose turns are told apart from its children's
        count, limit = flow.state_json["count"], flow.state_json["limit"]
        assert await flow.map(self.stand, range(count), limit=limit) == list(range(count))

    async def begin(self, runtime: Runtime, count: int, limit: int) -> Flow:
        """Begin a flow of so many children."""
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        state = {"count": count, "limit": limit}
        return await flows.create_managed(controller_id=CONTROLLER, goal=GOAL, state_json=state)

    async def end(self, runtime: Runtime, flow: Flow) -> None:
        """Wait for the flow's end."""
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        ended = await flows.result(flow.flow_id)
        assert ended.status == "succeeded", ended
