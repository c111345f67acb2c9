"""A process is killed by its own disk, at each thing it asks of it: the file opens, whole, with every answer.

The load is the same each time, so that the kill can be put before the first, the second, ... write, sync,
truncate, open and delete of each file, or into the midst of a write: through the making of the schema,
commits, checkpoints, closing and opening again.

By default a spread of these is tried; with `FLOWSTEAD_EVERY_OPERATION=1` it is every one of them.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from flowstead import open_runtime
from flowstead.store.sqlite import SqliteStore
from tests import invariants
from tests.crash.harness import Zygote
from tests.disk.load import OWNER, SMALL, Ack, Rows, Run, content, live, shortfall
from tests.disk.vfs import Operation
from tests.disk.worker import DiskZygote

EVERY = os.environ.get("FLOWSTEAD_EVERY_OPERATION") == "1"
SEED = int(os.environ.get("FLOWSTEAD_SEED", "20261122"))
SPREAD = 50
ROUNDS = 4
WIDTH = 3
LANES = 2
CHANGING = ("open", "write", "truncate", "sync", "delete")

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if EVERY else 120)]


class Kill(NamedTuple):
    """Where the process dies: before the operation of this kind on this file with this number, or within it."""

    operation: int
    kind: str
    file: str
    at: int
    torn: int | None = None


def kills(operations: Sequence[Operation]) -> list[Kill]:
    """Every place in a run where it can be killed, in order."""
    places: list[Kill] = []
    counted: Counter[tuple[str, str]] = Counter()
    for index, operation in enumerate(operations):
        if operation.kind not in CHANGING:
            continue
        kind, file = operation.kind, operation.file
        counted[kind, file] += 1
        places.append(Kill(index, kind, file, counted[kind, file]))
        if kind == "write":
            places.append(places[-1]._replace(torn=operation.size // 2))
    return places


def spread(places: Sequence[Kill], number: int, rng: random.Random) -> list[Kill]:
    """Some of every sort, and of each sort its share."""
    sorts: defaultdict[tuple[str, str, bool], list[Kill]] = defaultdict(list)
    for place in places:
        sorts[place.kind, place.file, place.torn is not None].append(place)
    chosen = []
    for sort in sorts.values():
        share = max(1, round(number * len(sort) / len(places)))
        chosen += rng.sample(sort, min(share, len(sort)))
    return chosen


def test_killed_at_a_disk_operation_the_file_opens_whole_with_all_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    run = whole_run(tmp_path / "whole.db")
    places = kills(run.operations)
    chosen = places if EVERY else spread(places, SPREAD, random.Random(SEED))
    states = run.states()

    def lane(number: int) -> list[int]:
        with DiskZygote() as zygote:
            return [
                kill_and_look(zygote, tmp_path / f"{place.operation}-{place.torn}", place, states)
                for place in chosen[number::LANES]
            ]

    with ThreadPoolExecutor(LANES) as pool:
        acks = [count for counts in pool.map(lane, range(LANES)) for count in counts]

    print(f"killed at {len(chosen)} of {len(places)} places")  # noqa: T201
    assert len(chosen) >= SPREAD
    assert 0 in acks, "nobody was killed before the first answer"
    assert len(set(acks)) > 5, f"killed after so many answers: {acks}"
    killed = {(place.file, place.kind, place.torn is not None) for place in chosen}
    assert killed >= {
        ("journal", "write", False),
        ("journal", "delete", False),
        ("wal", "open", False),
        ("wal", "write", True),
        ("wal", "sync", False),
        ("wal", "truncate", False),
        ("wal", "delete", False),
        ("db", "write", True),
        ("db", "sync", False),
    }
    assert run.restarts > 0, "no checkpoint under load"


def whole_run(path: Path) -> Run:
    """What happens if nobody is killed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(f"flowstead.store.sqlite.{name}", value)
        return asyncio.run(live(path, SEED, rounds=ROUNDS, width=WIDTH))


def kill_and_look(zygote: Zygote, directory: Path, place: Kill, states: list[Rows]) -> int:
    """Kill a process there, and check what it left; answers how much had been acknowledged."""
    directory.mkdir()
    path = directory / "flows.db"
    fault = {"kind": place.kind, "file": place.file, "at": place.at, "torn": place.torn}
    child = zygote.fork(
        "small_load",
        directory / "journal",
        path=str(path),
        seed=SEED,
        rounds=ROUNDS,
        width=WIDTH,
        fault={**fault, "kill": "before"},
    )
    status = child.wait()
    acks = [Ack(*fact["ack"]) for fact in child.facts() if "ack" in fact]

    assert status == -9, f"{place}: ended with {status}, not killed: {child.facts()[-1:]}"
    rows, levels, commits = asyncio.run(recovered(path))
    assert rows == states[commits], f"{place}: not what was there after {commits} commits"
    missing = shortfall(levels, acks)
    assert not missing, f"{place}: acknowledged, and not there: {missing}"
    asyncio.run(works(path))
    invariants.check_all(path)
    return len(acks)


async def recovered(path: Path) -> tuple[Rows, dict[tuple[str, str], int], int]:
    """What the next owner finds."""
    store = SqliteStore(path)
    await store.open()
    await store.aclose()
    return content(path)


async def works(path: Path) -> None:
    """The next owner can go on."""
    async with open_runtime(path) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key=OWNER)
        flow = await flows.create_managed(controller_id="disk/after", goal="go on")
        assert await flows.get(flow.flow_id) == flow
