"""Files full of flows that wait for one answer each: controllers that are parked, or waits of the ledger's face.

Each flow waits under a key of its own, until a deadline that is far away. A file is made once and copied.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bench.measure import Setup
from bench.sample import CONTROLLER, OWNER
from bench.workloads.filling import fill, name
from flowstead import FlowContext, Limits, Registry, Runtime, open_runtime
from flowstead.store.sqlite import Durability

PARKED: Final = "parked"
LEDGER: Final = "ledger"
SOON: Final = Limits(park_seconds=0.01, idle_seconds=0.1)
_WEEK_SECONDS: Final = 7 * 24 * 3600.0
_FAR: Final = 4_102_444_800_000


class Parking:
    """A controller that waits for an answer, records a step, and ends."""

    def __init__(self) -> None:
        self.stepped: dict[str, float] = {}
        self._wanted = -1
        self._done = asyncio.Event()
        self.registry = Registry()
        self.registry.controller(CONTROLLER)(self._drive)

    async def _drive(self, flow: FlowContext) -> None:
        await flow.wait(
            "answer", timeout=_WEEK_SECONDS, prompt="Send this answer?", key=_key(flow.flow_id)
        )
        await flow.update(current_step="answered")
        self.stepped[flow.flow_id] = time.perf_counter()
        self._look()

    async def all_stepped(self, wanted: int) -> None:
        """Return once so many have recorded their step."""
        self._wanted = wanted
        self._look()
        await self._done.wait()

    def _look(self) -> None:
        if len(self.stepped) == self._wanted:
            self._done.set()


def key(number: int) -> dict[str, Any]:
    """What a flow waits for."""
    return _key(name(number))


def _key(flow_id: str) -> dict[str, Any]:
    return {"channel": "slack", "thread": flow_id}


def _wait(number: int) -> Mapping[str, Any]:
    return {**key(number), "deadlineAt": _FAR, "onTimeout": "fail", "prompt": "Send this answer?"}


async def stand(runtime: Runtime, kind: str, count: int) -> None:
    """Make flows that wait, and return once none of them is in memory."""
    flows = runtime.task_flow.bind_session(session_key=OWNER)
    if kind == PARKED:
        await fill(flows, 0, count, "queued")
    else:
        await fill(flows, 0, count, "waiting", _wait)
    while runtime.statistics().flows_in_memory:  # noqa: ASYNC110 - nobody is told of it
        await asyncio.sleep(0.05)


def filled(setup: Setup, kind: str, count: int) -> Path:
    """A file of so many, to copy; made once in a run of the bench."""
    path = setup.folder / f"{kind}-{count}.origin"
    if not path.exists():
        asyncio.run(_fill(path, "normal", kind, count))
    return path


async def _fill(path: Path, durability: Durability, kind: str, count: int) -> None:
    registry = Parking().registry if kind == PARKED else None
    async with open_runtime(path, registry=registry, durability=durability, limits=SOON) as runtime:
        await stand(runtime, kind, count)
