"""What the tests of the ledger face share: handles, flows and children made short, and dumps of a store."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import anyio
import msgspec

from flowstead import (
    Created,
    Event,
    Flow,
    FlowError,
    Limits,
    Registry,
    Runtime,
    SessionFlows,
    Task,
)
from flowstead.admin import Admin
from flowstead.store.memory import MemoryStore
from flowstead.testing import Crashed, Simulation

Where: TypeAlias = Path | MemoryStore
T = TypeVar("T")

OWNER = "agent:main:main"
STRANGER = "agent:other:main"
PATIENCE = 30


def bound(runtime: Runtime, owner: str = OWNER, **more: Any) -> SessionFlows:
    """The flows of one owner."""
    return runtime.tasks.flow.bind_session(session_key=owner, **more)


async def make(flows: SessionFlows, **given: Any) -> Flow:
    """A flow like any other."""
    return await flows.create_managed(**{"controller_id": "shop/triage", "goal": "triage"} | given)


async def link(flows: SessionFlows, flow_id: str, **given: Any) -> Task:
    """A linked child, running unless said otherwise."""
    asked: dict[str, Any] = {"runtime": "acp", "task": "classify", "status": "running"} | given
    created = await flows.run_task(flow_id=flow_id, **asked)
    assert isinstance(created, Created), created
    return created.task


async def answer_of(call: Awaitable[Any]) -> str:
    """What a call answers or raises, spelled out to the last byte."""
    try:
        with anyio.fail_after(PATIENCE):
            answer = await call
    except (FlowError, ValueError, TypeError) as error:
        return f"{type(error).__name__}{error.args!r} {vars(error)!r} {error}"
    return f"{type(answer).__name__} {msgspec.json.encode(answer).decode()}"


async def step(times: int) -> None:
    """Let everybody else run for so many rounds of the event loop."""
    for _ in range(times):
        await anyio.lowlevel.cancel_shielded_checkpoint()


def dump(store: Where) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    if isinstance(store, MemoryStore):
        tables = store.tables
        return {
            name: [tuple(row) for row in getattr(tables, name).values()]
            for name in ("flows", "tasks", "events")
        }
    connection = sqlite3.connect(f"file:{store}?mode=ro", uri=True, isolation_level=None)
    try:
        return {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()
            for name in ("flows", "tasks", "events", "ownership")
        }
    finally:
        connection.close()


class Lives:
    """One process after another on one store, in virtual time: what `play` waits for costs none.

    `registry` and `limits` are those of the next process to be opened.
    """

    def __init__(self, world: Simulation) -> None:
        self.world = world
        self.registry = Registry()
        self.limits: Limits | None = None
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """The one that lives; opened when it is first asked for."""
        if self._runtime is None:
            self._runtime = self.world.boot(registry=self.registry, limits=self.limits)
        return self._runtime

    @property
    def flows(self) -> SessionFlows:
        """The owner's flows, in the process that lives."""
        return self.face(bound)

    @property
    def admin(self) -> Admin:
        """The operator's face, in the process that lives."""
        return self.face(lambda runtime: runtime.admin)

    def face(self, face: Callable[[Runtime], T]) -> T:
        """A face of the runtime; those are to be had on its loop only."""
        runtime = self.runtime

        async def on_the_loop() -> T:
            return face(runtime)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self.play(on_the_loop())
        return face(runtime)

    def now(self) -> int:
        """Epoch milliseconds of the world's clock."""
        return self.face(lambda _: self.world.clock.now())

    def play(self, code: Awaitable[T]) -> T:
        """Let the process run until this is done."""
        assert self._runtime is not None, "nothing lives"
        try:
            return self.world.play(code)
        except Crashed:
            self._runtime = None
            raise

    def pass_time(self, seconds: float = 0.0) -> None:
        """Let so much time pass, and all that comes with it."""
        assert self.runtime is not None
        self.play(asyncio.sleep(seconds))
        self.play(step(50))

    def restart(self, how: str = "kill") -> None:
        """End the process: `kill` it between two steps, or `close` it in good order. The next is not open yet."""
        assert self._runtime is not None, "nothing lives"
        if how == "kill":
            self.world.kill()
        else:
            self.world.shut()
        self._runtime = None

    def die(self) -> None:
        """See to it that the process is dead, if it has not crashed by itself, and that the next one lives."""
        self.world.heal()
        if self._runtime is not None:
            self.restart("kill")

    def end(self) -> None:
        """Close what still lives."""
        if self._runtime is not None:
            self.restart("close")

    # ---- looking ----------------------------------------------------------------------------------

    def flow(self, flow_id: str) -> Flow:
        """The flow as it stands."""
        found = self.play(self.flows.get(flow_id))
        assert found is not None, f"there is no flow {flow_id}"
        return found

    def task(self, task_id: str) -> Task:
        """The child as it stands."""
        found = self.play(self.flows.get_task(task_id))
        assert found is not None, f"there is no child {task_id}"
        return found

    def child(self, flow_id: str, run_id: str) -> Task:
        """The flow's child of that step."""
        [found] = [task for task in self.children(flow_id) if task.run_id == run_id]
        return found

    def children(self, flow_id: str) -> list[Task]:
        """The flow's children, oldest first."""
        return self.play(self.flows.list_tasks(flow_id))

    def history(self, flow_id: str) -> list[Event]:
        """What happened to the flow."""
        return self.play(self.flows.history(flow_id))

    def told(self, flow_id: str, prefix: str = "") -> list[str]:
        """What happened to the flow, by the types of its events."""
        return [event.type for event in self.history(flow_id) if event.type.startswith(prefix)]

    def result(self, flow_id: str) -> Flow:
        """The flow as it ends."""
        return self.play(self.flows.result(flow_id))
