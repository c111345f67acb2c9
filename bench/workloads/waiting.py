"""What waiting things cost in memory, each kind in a process of its own.

A first crowd fills every cache, and the resident memory is read; many more join it, and it is read again. Nothing
is let go of in between, so what is found is what each of the many keeps: its task, its scope, its futures, its
record, and whatever the one who waits for it keeps of it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

import anyio
import msgspec

from bench import process
from bench.measure import Row, Setup, remove
from bench.sample import OWNER
from bench.workloads.gate import Crowd, Gate
from flowstead import Runtime, open_runtime
from flowstead.store.sqlite import Durability

_THIS: Final = "bench.workloads.waiting"
_WARM_UP: Final = 2_000
QUEUE_LIMIT: Final = 8


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Resident bytes and asyncio tasks before and after the many joined."""

    before: int
    after: int
    tasks_before: int
    tasks_after: int


def measure(setup: Setup, who: str, count: int) -> Found:
    """Have so many of one kind wait in a process of their own."""
    path = setup.fresh_path()
    with process.start(_THIS, who, path, setup.durability, count) as waiting:
        found = msgspec.convert(process.answer_of(waiting), Found)
    remove(path)
    return found


def row(setup: Setup, name: str, count: int, found: Found, plain: Found) -> Row:
    """Memory of each, beside that of a plain task."""
    mine, least = ((each.after - each.before) / count for each in (found, plain))
    return Row(
        workload=name,
        durability=setup.durability,
        ours=f"{mine:,.0f} B",
        ceiling=f"{least:,.0f} B",
        # Memory is counted in pages; over a few that says nothing.
        ratio=least / mine if mine > 0 and not setup.quick else None,
        extra=(
            f"beside a plain task; resident {found.before / 1e6:.1f} → {found.after / 1e6:.1f} MB,"
            f" asyncio tasks {found.tasks_before:,} → {found.tasks_after:,}"
        ),
    )


# ---- in a process of its own --------------------------------------------------------------------------


class _Growth:
    """What there is before a crowd grows, and after it."""

    def __init__(self) -> None:
        self._tasks = len(asyncio.all_tasks())
        self._before = process.resident_bytes()

    def say(self) -> None:
        """Answer the process that waits."""
        found = Found(
            before=self._before,
            after=process.resident_bytes(),
            tasks_before=self._tasks,
            tasks_after=len(asyncio.all_tasks()),
        )
        process.say(msgspec.structs.asdict(found))


async def _plain(_path: str, _durability: Durability, count: int) -> None:
    gate = Gate()
    tasks = [asyncio.create_task(gate.wait()) for _ in range(_WARM_UP)]
    await gate.full(_WARM_UP)
    growth = _Growth()
    tasks += [asyncio.create_task(gate.wait()) for _ in range(count)]
    await gate.full(_WARM_UP + count)
    growth.say()
    gate.open()
    await asyncio.gather(*tasks)


async def _grouped(_path: str, _durability: Durability, count: int) -> None:
    gate = Gate()
    async with anyio.create_task_group() as group:
        for _ in range(_WARM_UP):
            group.start_soon(gate.wait)
        await gate.full(_WARM_UP)
        growth = _Growth()
        for _ in range(count):
            group.start_soon(gate.wait)
        await gate.full(_WARM_UP + count)
        growth.say()
        gate.open()


async def _live(path: str, durability: Durability, count: int) -> None:
    crowd = Crowd()
    async with open_runtime(path, registry=crowd.registry, durability=durability) as runtime:
        first = await crowd.begin(runtime, _WARM_UP, _WARM_UP)
        await crowd.gate.full(_WARM_UP)
        growth = _Growth()
        second = await crowd.begin(runtime, count, count)
        await crowd.gate.full(_WARM_UP + count)
        growth.say()
        crowd.gate.open()
        await crowd.end(runtime, first)
        await crowd.end(runtime, second)


async def _live_in_memory(_path: str, durability: Durability, count: int) -> None:
    await _live(":memory:", durability, count)


async def _queued(path: str, durability: Durability, count: int) -> None:
    crowd = Crowd()
    async with open_runtime(path, registry=crowd.registry, durability=durability) as runtime:
        first = await crowd.begin(runtime, _WARM_UP, QUEUE_LIMIT)
        await _on_record(runtime, first.flow_id, _WARM_UP)
        growth = _Growth()
        second = await crowd.begin(runtime, count, QUEUE_LIMIT)
        await _on_record(runtime, second.flow_id, count)
        growth.say()
        crowd.gate.open()
        await crowd.end(runtime, first)
        await crowd.end(runtime, second)


async def _on_record(runtime: Runtime, flow_id: str, count: int) -> None:
    """Return once the flow has so many children, of which all but the first few stand in line."""
    flows = runtime.task_flow.bind_session(session_key=OWNER)
    while True:
        summary = await flows.get_task_summary(flow_id)
        if summary is not None and summary.total == count:
            break
        await asyncio.sleep(0.05)
    assert summary.by_status["queued"] == count - QUEUE_LIMIT, summary


_KINDS: Final[dict[str, Callable[[str, Durability, int], Coroutine[Any, Any, None]]]] = {
    "plain": _plain,
    "grouped": _grouped,
    "live": _live,
    "live in memory": _live_in_memory,
    "queued": _queued,
}

if __name__ == "__main__":
    kind, where, how, many = sys.argv[1:]
    asyncio.run(_KINDS[kind](where, cast(Durability, how), int(many)))
