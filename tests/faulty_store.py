"""What a test needs to play with a store that fails on request: its errors, patience, a runtime that ends clean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio

from flowstead import Runtime, SessionFlows, open_runtime
from flowstead.errors import CommitFailed, OutcomeUnknown, WriteConflict
from flowstead.testing import FaultyStore

__all__ = [
    "MISFIT",
    "NOT_WRITTEN",
    "UNKNOWN",
    "FaultyStore",
    "flows_of",
    "holds_nothing",
    "memory_of",
    "new_flow",
    "running",
    "settle",
    "soon",
    "turns",
    "until",
]

T = TypeVar("T")

NOT_WRITTEN = CommitFailed("the disk said no")
UNKNOWN = OutcomeUnknown("the disk said nothing")
MISFIT = WriteConflict("a row does not fit")

_PATIENCE_SECONDS = 30.0


@asynccontextmanager
async def running(store: Any = ":memory:", **options: Any) -> AsyncIterator[Runtime]:
    """A runtime that has to close promptly and leave no task behind; one that does not fails the test."""
    before = asyncio.all_tasks()
    runtime = open_runtime(store, **options)
    await runtime.__aenter__()
    try:
        yield runtime
    except BaseException:
        await _close(runtime, before)
        raise
    left = await _close(runtime, before)
    assert not left, f"left behind: {left}"


async def _close(runtime: Runtime, before: set[asyncio.Task[Any]]) -> list[str]:
    if isinstance(store := runtime._engine.store, FaultyStore):
        store.heal()
        store.release()
    closing = asyncio.create_task(runtime.aclose(), name="closing")
    await asyncio.wait({closing}, timeout=_PATIENCE_SECONDS)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_PATIENCE_SECONDS)
    return sorted(task.get_name() for task in left)


async def settle() -> None:
    """Let the event loop run until nothing is ready any more: all that can happen without time has happened."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    for _ in range(100_000):
        await asyncio.sleep(0)
        if not ready:
            return
    raise AssertionError("the event loop does not come to rest")


async def turns(count: int = 50) -> None:
    """Let the event loop go round a few times, where something keeps it busy."""
    for _ in range(count):
        await asyncio.sleep(0)


async def soon(awaitable: Awaitable[T], seconds: float = _PATIENCE_SECONDS) -> T:
    """Await what should come without waiting for time; a hang fails the test instead of stopping it."""
    with anyio.fail_after(seconds):
        return await awaitable


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread has to bring about first."""
    with anyio.fail_after(_PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def flows_of(runtime: Runtime, owner: str = "owner") -> SessionFlows:
    """One owner's flows."""
    return runtime.tasks.flow.bind_session(session_key=owner)


async def new_flow(flows: SessionFlows, controller_id: str = "nobody", **given: Any) -> str:
    """A flow, by its id; nobody drives it unless a registered controller is named."""
    flow = await soon(flows.create_managed(controller_id=controller_id, goal="test", **given))
    return flow.flow_id


def memory_of(runtime: Runtime) -> dict[str, int]:
    """How much a runtime still holds on to, by kind; all zero when nothing goes on."""
    engine, door = runtime._engine, runtime._code
    return {
        "flow ends awaited": len(engine.flow_ends._waiting),
        "task ends awaited": len(engine.task_ends._waiting),
        "functions": len(door.functions._bound),
        "crews": len(engine.supervisor._crews),
        "children": len(engine.supervisor._children),
        "watchers": len(engine.feed._of_flow) + len(engine.feed._of_owner),
        "writes": len(engine.committer._pending),
    }


def holds_nothing(runtime: Runtime) -> bool:
    """Whether a runtime holds on to nothing but the flows it keeps in memory."""
    held = {name: count for name, count in memory_of(runtime).items() if count}
    assert not held, f"still held: {held}"
    return True
