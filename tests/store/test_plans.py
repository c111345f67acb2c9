"""No read of the port looks through a table that grows: each finds its rows by an index, or by their keys.

The statements are those the store really runs. SQLite is asked for its plan of each.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import pytest
from msgspec.structs import replace

from flowstead.model.flow import FlowKey, FlowStatus
from flowstead.model.update import UpdateStatus
from flowstead.store.port import EVERYONE, Scope, Store, WaitLookup
from tests.store.disk import Disk, TendedStore
from tests.store.rows import (
    ALICE,
    NOW,
    creates,
    flow_of,
    key_for,
    put,
    put_signal,
    put_task,
    put_update,
    signal_of,
    signals,
    task_of,
    update_of,
    updates,
    wait_of,
)

pytestmark = pytest.mark.usefixtures("stores_end")

Ask: TypeAlias = Callable[[Store], Awaitable[object]]

KEY = key_for()
ASKED = [WaitLookup("alice", KEY, "id", NOW), WaitLookup("alice", key_for("none"), "id", NOW)]

READS: dict[str, Ask] = {
    "load": lambda store: store.load([FlowKey("alice", "flow")]),
    "find_task": lambda store: store.find_task(ALICE, "task"),
    "find_by_idempotency_key": lambda store: store.find_by_idempotency_key("alice", "once"),
    "list_due": lambda store: store.list_due(after=0, until=NOW),
    "next_due": lambda store: store.next_due(after=0),
    "look_up_waits": lambda store: store.look_up_waits(ASKED),
    "find_token": lambda store: store.find_token("token"),
    "list_met": lambda store: store.list_met(after_key=0, limit=10, now=NOW),
    "list_open_waits of an owner": lambda store: _open(store, ALICE),
    "list_open_waits of a flow": lambda store: _open(store, ALICE, "flow"),
    "list_updates_due": lambda store: store.list_updates_due(until=NOW, limit=10),
    "list_digests_due": lambda store: store.list_digests_due(until=NOW, limit=10),
    "next_update_due": lambda store: store.next_update_due(),
    "list_updates of an owner": lambda store: _updates(store, ALICE),
    "list_updates of a flow": lambda store: _updates(store, ALICE, "flow"),
    "list_updates": lambda store: _updates(store, EVERYONE),
}
"""Reads that cost what they find."""

OF_ALL_OPEN: dict[str, Ask] = {"list_open_waits": lambda store: _open(store, EVERYONE)}
"""Reads that may look at everything that waits, in an index that has nothing else."""


async def _open(store: Store, scope: Scope, flow_id: str | None = None) -> object:
    return await store.list_open_waits(scope, flow_id=flow_id, after_key=0, limit=10)


async def _updates(store: Store, scope: Scope, flow_id: str | None = None) -> object:
    return await store.list_updates(
        scope, flow_id=flow_id, statuses=["pending"], after_key=0, limit=10
    )


async def fill(store: Store) -> None:
    """Something to find for every statement."""
    own = await put(store, "own", status=FlowStatus.WAITING, wait_key=KEY, idempotency_key="once")
    flow = await put(store, "flow")
    await put_task(store, flow, "task", wait=wait_of(KEY, token="t"))
    signal = await put_signal(store, wait_key=KEY, signal_id="id")
    await put_signal(store, wait_key=KEY)
    await store.commit([signals(replace(signal, taken_by="own"), fresh=False)])
    await put_update(store, flow)
    progress = update_of(store.next_key(), flow)
    await store.commit([updates(progress)])
    [stored] = await store.list_updates_due(until=NOW, limit=1)
    failed = replace(stored, status=UpdateStatus.DELIVERY_FAILED, due_at=None)
    await store.commit([updates(failed, fresh=False)])
    await put_update(store, own)
    await put_update(store, own, "done")
    await put_update(store, own, "digest", bucket="daily")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
async def store(db: Path, disk: Disk) -> TendedStore:
    store = TendedStore(db, durability="normal", connect=disk.connect)
    await store.open()
    return store


def plan_of(db: Path, statement: str) -> list[str]:
    """What SQLite would do for a statement, a line each."""
    numbered = re.findall(r"\?(\d+)", statement)
    count = max(map(int, numbered)) if numbered else statement.count("?")
    with closing(sqlite3.connect(db)) as connection:
        rows = connection.execute("EXPLAIN QUERY PLAN " + statement, [None] * count)
        return [str(detail) for *_, detail in rows]


def looks(db: Path, statements: list[str]) -> dict[str, list[str]]:
    """The plan of each statement that looks at rows."""
    wanted = ("SELECT", "UPDATE")
    return {one: plan_of(db, one) for one in statements if one.startswith(wanted)}


def scans(plan: list[str]) -> list[str]:
    """Where a plan goes through all of something that is no result of its own, nor the row of the owner."""
    own = ("SCAN ownership", "SCAN CONSTANT ROW", "SCAN (subquery")
    return [line for line in plan if line.startswith("SCAN") and not line.startswith(own)]


@pytest.mark.parametrize("ask", READS.values(), ids=READS.keys())
async def test_a_read_finds_its_rows_by_an_index(
    store: TendedStore, disk: Disk, db: Path, ask: Ask
) -> None:
    await fill(store)
    disk.statements.clear()

    await ask(store)

    plans = looks(db, disk.statements)
    assert plans, "nothing was asked"
    for statement, plan in plans.items():
        assert any(line.startswith("SEARCH") for line in plan), statement
        assert scans(plan) == [], statement


@pytest.mark.parametrize("ask", OF_ALL_OPEN.values(), ids=OF_ALL_OPEN.keys())
async def test_an_operators_read_goes_through_an_index_of_what_is_open(
    store: TendedStore, disk: Disk, db: Path, ask: Ask
) -> None:
    await fill(store)
    disk.statements.clear()

    await ask(store)

    found = [line for plan in looks(db, disk.statements).values() for line in scans(plan)]
    assert found
    assert all("USING INDEX flows_waiting" in line for line in found), found


async def test_a_commit_finds_its_rows_by_their_keys(
    store: TendedStore, disk: Disk, db: Path
) -> None:
    disk.statements.clear()

    await fill(store)

    plans = looks(db, [one for one in disk.statements if "ownership" not in one])
    assert sum(one.startswith("UPDATE") for one in plans) >= 3
    for statement, plan in plans.items():
        assert scans(plan) == [], statement


async def crowd(store: Store, numbers: range) -> None:
    """Much that has nothing to do with what is asked for: waits, signals and updates for other keys and times."""
    writes = []
    for n in numbers:
        key = key_for(f"other-{n}")
        flow = flow_of(
            store.next_key(), f"o-{n}", status=FlowStatus.WAITING, wait_key=key, wait=wait_of(key)
        )
        wait = wait_of(key, token=f"t-{n}")
        task = task_of(store.next_key(), flow, f"o-{n}", wait=wait, next_attempt_at=NOW + 5)
        writes.append(creates(flow, task, due_at=NOW + 5))
        writes.append(signals(signal_of(store.next_key(), wait_key=key, expires_at=NOW)))
        for slot in ("progress", "reminder"):
            later = update_of(store.next_key(), flow, slot, due_at=NOW + 5)
            writes.append(updates(later))
        sent = update_of(store.next_key(), flow, "done", status=UpdateStatus.DELIVERED)
        writes.append(updates(sent))
    await store.commit(writes)


@pytest.mark.parametrize("ask", READS.values(), ids=READS.keys())
async def test_a_read_costs_the_same_in_a_crowd(store: TendedStore, disk: Disk, ask: Ask) -> None:
    """Counted in the steps of SQLite's machine. A page that the crowd belongs to is full either way."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    await fill(store)
    disk.readers[0].set_progress_handler(step, 1)
    costs = []
    for numbers in (range(20), range(20, 420)):
        await crowd(store, numbers)
        steps = 0
        await ask(store)
        costs.append(steps)

    assert costs[0] > 10, "nothing was asked"
    assert costs[1] <= 1.5 * costs[0], costs


async def test_a_lookup_of_many_signals_is_one_transaction_of_few_statements(
    store: TendedStore, disk: Disk
) -> None:
    await fill(store)
    disk.statements.clear()

    await store.look_up_waits([WaitLookup("alice", KEY, f"{n}", NOW) for n in range(100)])

    assert (disk.ran("BEGIN"), disk.ran("COMMIT")) == (1, 1)
    assert len(disk.statements) <= 2 + 3 * 100


async def test_a_batch_without_signals_and_updates_says_nothing_of_them(
    store: TendedStore, disk: Disk
) -> None:
    flow = await put(store)
    disk.statements.clear()

    await put_task(store, flow, "task")

    assert [one.split("(")[0].split(" VALUES")[0][:22].strip() for one in disk.statements] == [
        "BEGIN IMMEDIATE",
        "UPDATE ownership SET c",
        "SELECT commits, last_p",
        "INSERT INTO tasks",
        "INSERT INTO events",
        "COMMIT",
    ]
