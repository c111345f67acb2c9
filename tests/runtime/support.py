"""What the tests of the ledger face share: handles, flows and children made short, and dumps of a store."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import msgspec

from flowstead import Created, Flow, FlowError, Runtime, SessionFlows, Task
from flowstead.store.memory import MemoryStore

Where: TypeAlias = Path | MemoryStore

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
