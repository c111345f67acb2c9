"""W4: the time to ready, and to the first durable mutation, on a file full of unfinished flows.

A process fills the file, goes on changing flows, and is killed with SIGKILL in the middle of it. Copies of what
it leaves behind, log and all, are opened by fresh processes: ours with no controller registered, ours with the
flows' controller registered (so that recovery runs beside), and a bare connection. The page cache is warm.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import process
from bench.ceiling import connect
from bench.measure import Row, Setup, Stopwatch, copy, remove
from bench.sample import CONTROLLER, OWNER, state
from bench.workloads.filling import fill, name
from flowstead import Applied, FlowContext, Registry, open_runtime
from flowstead.store.codec import EventRow, FlowRow, FlowWrite
from flowstead.store.sqlite import Durability
from flowstead.store.sqlite_writes import write_batch

_THIS: Final = "bench.workloads.reopening"
_READY_SECONDS: Final = 0.5
_MUTATION_SECONDS: Final = 0.6
_VARIANTS: Final = ("idle", "recovering", "bare")
_WHO: Final = {"idle": "no controllers", "recovering": "recovery beside"}


def run(setup: Setup) -> list[Row]:
    """Fill, kill, then open copies in turn."""
    count = setup.size(100_000, 2_000)
    origin = setup.fresh_path()
    _fill_and_kill(origin, count)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in _VARIANTS}
    for _ in range(setup.size(3, 1)):
        for variant in _VARIANTS:
            found[variant].append(_open_copy(setup, origin, variant, count))
    sizes = {suffix: _megabytes(origin, suffix) for suffix in ("", "-wal")}
    remove(origin)

    def row(variant: str, what: str, most: float) -> Row:
        mine, bare = (statistics.median(each[what] for each in found[v]) for v in (variant, "bare"))
        return Row(
            workload=f"W4 {count:,} flows, {what}",
            durability=setup.durability,
            ours=f"{mine:.3f} s",
            ceiling=f"{bare:.3f} s",
            ratio=bare / mine,
            target=f"< {most:g} s",
            is_met=mine < most,
            extra=f"{_WHO[variant]}; file {sizes['']:.0f} MB, log {sizes['-wal']:.0f} MB",
        )

    return [
        row(variant, what, most)
        for variant in _WHO
        for what, most in (("ready", _READY_SECONDS), ("first mutation", _MUTATION_SECONDS))
    ]


def _megabytes(path: Path, suffix: str) -> float:
    return path.with_name(path.name + suffix).stat().st_size / 1e6


def _fill_and_kill(path: Path, count: int) -> None:
    with process.start(_THIS, "fill", path, "normal", count) as filler:
        process.answer_of(filler)
        time.sleep(0.5)
        filler.kill()


def _open_copy(setup: Setup, origin: Path, variant: str, count: int) -> dict[str, float]:
    path = setup.fresh_path()
    copy(origin, path)
    with process.start(_THIS, variant, path, setup.durability, count) as opener:
        found: dict[str, float] = process.answer_of(opener)
        opener.kill()
    remove(path)
    return found


# ---- in a process of its own --------------------------------------------------------------------------


async def _fill(path: Path, durability: Durability, count: int) -> None:
    async with open_runtime(path, durability=durability) as runtime:
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        await fill(flows, 0, count, "running")
        process.say({"filled": count})
        for revision in range(1_000_000):
            changes = (
                flows.update(flow_id=name(n), expected_revision=revision, state_json=state(n))
                for n in range(100)
            )
            await asyncio.gather(*changes)


async def _open(
    path: Path, durability: Durability, count: int, registry: Registry | None = None
) -> None:
    watch = Stopwatch()
    runtime = open_runtime(path, registry=registry, durability=durability)
    async with runtime:
        ready = watch.seconds
        flows = runtime.task_flow.bind_session(session_key=OWNER)
        flow = await flows.get(name(count // 2))
        assert flow is not None
        answer = await flows.update(
            flow_id=flow.flow_id, expected_revision=flow.revision, state_json=state(1)
        )
        assert isinstance(answer, Applied)
        await _answer_and_wait(ready, watch.seconds)


async def _open_recovering(path: Path, durability: Durability, count: int) -> None:
    registry = Registry()

    @registry.controller(CONTROLLER)
    async def park(flow: FlowContext) -> None:
        await asyncio.Event().wait()

    await _open(path, durability, count, registry)


async def _open_bare(path: Path, durability: Durability, count: int) -> None:
    watch = Stopwatch()
    connection = connect(path, durability)
    (epoch,) = connection.execute("SELECT epoch FROM ownership").fetchone()
    ready = watch.seconds
    flow_id = name(count // 2)
    key, revision, doc = connection.execute(
        "SELECT key, revision, doc FROM flows WHERE owner_key = ? AND flow_id = ?", (OWNER, flow_id)
    ).fetchone()
    text = doc.decode()
    columns = (None, None, None, "running", None, None, revision + 1, text, revision)
    flow, event = FlowRow(key, OWNER, flow_id, *columns), EventRow(key, revision + 2, text)
    write_batch(connection, epoch, [FlowWrite(flow, [], [event])])
    await _answer_and_wait(ready, watch.seconds)


async def _answer_and_wait(ready: float, mutation: float) -> None:
    """Say what was found, and keep everything open until killed."""
    process.say({"ready": ready, "first mutation": mutation})
    await asyncio.Event().wait()


_PARTS: Final[dict[str, Callable[..., Coroutine[Any, Any, None]]]] = {
    "fill": _fill,
    "idle": _open,
    "recovering": _open_recovering,
    "bare": _open_bare,
}

if __name__ == "__main__":
    part, where, how, many = sys.argv[1:]
    asyncio.run(partial(_PARTS[part], Path(where), how, int(many))())
