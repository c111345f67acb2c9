"""Ways a file is damaged, and a file worth damaging.

A kind takes the directory with `flows.db` (and perhaps its log) and a seeded `Random`, and changes bytes or
rows. `Whole` is the file with what it is known to hold.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from msgspec import Raw
from msgspec.structs import replace

from flowstead.errors import StoreError
from flowstead.model.flow import FlowKey, FlowStatus, StoredFlow
from flowstead.model.task import TaskStatus
from flowstead.rules.wait_keys import token_digest
from flowstead.store import schema
from flowstead.store.port import EVERYONE, FlowQuery, Scope, Snapshot, WaitLookup
from flowstead.store.sqlite import SqliteStore
from tests.store.rows import (
    HOSTILE,
    NOW,
    changes,
    creates,
    flow_of,
    key_for,
    put,
    put_signal,
    put_update,
    signals,
    task_of,
    wait_of,
)

PAGE = 4096
TABLE_LEAF, TABLE_INTERIOR, INDEX_LEAF, INDEX_INTERIOR = 13, 5, 10, 2
Reads = dict[tuple[str, ...], Any]
Kind = Callable[[Path, Random], None]

# ---- a file -------------------------------------------------------------------------------------------


@dataclass
class Whole:
    """The bytes of a file and its log, and what could be read after each commit, the last one's at the end."""

    db: bytes
    wal: bytes
    states: list[Reads]

    def copy_to(self, directory: Path) -> None:
        (directory / "flows.db").write_bytes(self.db)
        if self.wal:
            (directory / "flows.db-wal").write_bytes(self.wal)


async def make(directory: Path) -> tuple[Whole, Whole]:
    """A file that was closed, and one whose newest commits are in its log only."""
    db = directory / "flows.db"
    store = SqliteStore(db, durability="normal")
    await store.open()
    await _fill(store, 30)
    for round in range(3):
        await _change(store, round)
        await put(store, f"late-{round}", owner_key="alice")
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    states = [await read_all(store)]
    for round in range(3, 6):
        await _change(store, round)
        states.append(await read_all(store))
        await put(store, f"late-{round}", owner_key="alice")
        states.append(await read_all(store))
    with_log = Whole(db.read_bytes(), wal_of(directory).read_bytes(), states)
    await store.aclose()
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        # A page nobody uses can be damaged as much as one likes.
        connection.execute("VACUUM")
    return Whole(db.read_bytes(), b"", states[-1:]), with_log


async def _fill(store: SqliteStore, count: int) -> None:
    texts = list(HOSTILE.values())
    for n in range(count):
        flow = flow_of(
            store.next_key(),
            f"flow-{n}",
            owner_key=("alice", "bob")[n % 2],
            controller_id=("triage", None)[n % 3 == 0],
            correlation_id=f"thread-{n % 5}",
            idempotency_key=f"once-{n}",
            goal=texts[n % len(texts)],
            state_json=Raw(b'{"count":%d,"text":"%s"}' % (1000 + n, b"s" * (n * 300))),
            wait_key=_key(n) if n % 2 == 0 else None,
            wait_token=token_digest(f"own-{n}") if n % 2 == 0 else None,
            wait_json=Raw(b'{"kind":"reply"}'),
        )
        tasks = [
            task_of(
                store.next_key(),
                flow,
                f"task-{n}-{m}",
                run_id=f"run-{m}",
                status=(TaskStatus.SUCCEEDED, TaskStatus.QUEUED)[m % 2],
                launched=m == 1,
                next_attempt_at=NOW + n if m == 1 else None,
                input_json=Raw(b'{"page":%d}' % (7000 + m)),
            )
            for m in range(3)
        ]
        if n % 4 == 0:
            tasks.append(
                task_of(
                    store.next_key(),
                    flow,
                    f"wait-{n}",
                    wait=wait_of(_key(n, "child"), token=f"child-{n}"),
                )
            )
        due_at = NOW + 1000 + n if n % 4 == 0 else None
        await store.commit([creates(flow, *tasks, due_at=due_at, seqs=range(1, 7))])
        await _tell(store, flow, n)


async def _tell(store: SqliteStore, flow: StoredFlow, n: int) -> None:
    """Signals that are kept, taken and turned away, and updates that have come differently far."""
    keys = {"wait_key": _key(n), "owner_key": flow.owner_key}
    taken = await put_signal(store, signal_id=f"first-{n}", **keys)
    payload = Raw(b'{"reply":%d}' % (3000 + n))
    await put_signal(store, signal_id=f"second-{n}", payload=payload, **keys)
    await put_signal(store, expires_at=None, **keys)
    await store.commit([signals(replace(taken, taken_by=flow.flow_id), fresh=False)])
    await put_update(store, flow, text="first", due_at=NOW + n)
    await put_update(store, flow, text="second", due_at=NOW + n)
    if n % 3 == 0:
        await put_update(store, flow, "done", due_at=NOW + 100 + n)
    elif n % 3 == 1:
        await put_update(store, flow, "digest", bucket=f"daily-{n % 2}", due_at=NOW + 200 + n)


def _key(n: int, of: str = "own") -> str:
    return key_for(f"{of}-{n}", owner_key=("alice", "bob")[n % 2])


async def _change(store: SqliteStore, round: int) -> None:
    writes = []
    for n in range(round, 30, 6):
        key = FlowKey(("alice", "bob")[n % 2], f"flow-{n}")
        [found] = await store.load([key])
        assert isinstance(found, Snapshot)
        flow = replace(
            found.flow,
            revision=found.flow.revision + 1,
            current_step=f"step {round}",
            status=FlowStatus.WAITING,
        )
        writes.append(changes(flow, seqs=[found.last_seq + 1]))
    await store.commit(writes)


# ---- what it holds ------------------------------------------------------------------------------------


async def read_all(store: SqliteStore, keys: list[FlowKey] | None = None) -> Reads:
    """Every answer the store gives, with what it refuses in the place of the answer.

    An error that is not one of ours goes through: there must be none.
    """
    reads: Reads = {}

    async def ask(name: tuple[str, ...], answer: Any) -> Any:
        try:
            reads[name] = await answer
        except StoreError as error:
            reads[name] = error
        return reads[name]

    if keys is None:
        flows = await store.list_flows(EVERYONE, FlowQuery(), 1000)
        keys = [FlowKey(flow.owner_key, flow.flow_id) for flow in flows]
    for scope in (EVERYONE, Scope("alice"), Scope("bob")):
        owner = str(scope.owner_key)
        await ask(("flows", owner), store.list_flows(scope, FlowQuery(), 1000))
        await ask(("live", owner), store.list_flows(scope, FlowQuery(live=True), 1000))
        await ask(("events", owner), store.events_after(scope, 0, 10_000))
    for key, loaded in zip(keys, await _load(store, keys), strict=True):
        name, scope = (key.owner_key, key.flow_id), Scope(key.owner_key)
        reads["snapshot", *name] = loaded
        await ask(("flow", *name), store.find_flow(scope, key.flow_id))
        await ask(("tasks", *name), store.list_tasks(scope, key.flow_id))
        await ask(("summary", *name), store.summarize(scope, key.flow_id))
        history = store.history(scope, key.flow_id, after_seq=0, limit=1000)
        await ask(("history", *name), history)
        if key.flow_id.startswith("flow-"):
            number = key.flow_id.removeprefix("flow-")
            again = store.find_by_idempotency_key(key.owner_key, f"once-{number}")
            await ask(("once", *name), again)
            await ask(("task", *name), store.find_task(scope, f"task-{number}-1"))
    await ask(("due",), store.list_due(after=0, until=2 * NOW))
    await ask(("unfinished",), store.list_unfinished(["triage"], after_key=0, limit=1000))
    await ask(("controllers",), store.count_by_controller())
    await ask(("last position",), store.last_position())
    await _ask_of_waits(store, ask)
    return reads


async def _ask_of_waits(store: SqliteStore, ask: Any) -> None:
    for n in range(30):
        owner = ("alice", "bob")[n % 2]
        for of in ("own", "child"):
            lookup = WaitLookup(owner, _key(n, of), f"first-{n}", NOW)
            await ask(("lookup", of, str(n)), store.look_up_waits([lookup]))
            token = store.find_token(token_digest(f"{of}-{n}"))
            await ask(("token", of, str(n)), token)
    await ask(("met",), store.list_met(after_key=0, limit=1000, now=NOW))
    for scope in (EVERYONE, Scope("alice"), Scope("bob")):
        owner = str(scope.owner_key)
        page: Any = {"flow_id": None, "after_key": 0, "limit": 1000}
        await ask(("waits", owner), store.list_open_waits(scope, **page))
        await ask(("updates", owner), store.list_updates(scope, statuses=(), **page))
    await ask(("updates due",), store.list_updates_due(until=2 * NOW, limit=1000))
    await ask(("digests due",), store.list_digests_due(until=2 * NOW, limit=1000))
    await ask(("next update",), store.next_update_due())


async def _load(store: SqliteStore, keys: list[FlowKey]) -> list[Any]:
    try:
        return await store.load(keys)
    except StoreError as error:
        return [error] * len(keys)


# ---- bytes --------------------------------------------------------------------------------------------


def db_of(directory: Path) -> Path:
    return directory / "flows.db"


def wal_of(directory: Path) -> Path:
    return directory / "flows.db-wal"


def _pages(content: bytes, *types: int) -> list[int]:
    """Numbers, from 0, of the pages of such a type; the first page is left alone."""
    count = len(content) // PAGE
    return [n for n in range(1, count) if not types or content[n * PAGE] in types]


def _write(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        assert file.read(len(data)) != data, "nothing was damaged"
        file.seek(at)
        file.write(data)


def _flip(path: Path, at: int, random: Random) -> None:
    byte = path.read_bytes()[at]
    _write(path, at, bytes([byte ^ 1 << random.randrange(8)]))


def zeroed_page(directory: Path, random: Random) -> None:
    db = db_of(directory)
    _write(db, random.choice(_pages(db.read_bytes())) * PAGE, b"\0" * PAGE)


def random_bytes_in_a_page(directory: Path, random: Random) -> None:
    db = db_of(directory)
    page = random.choice(_pages(db.read_bytes()))
    length = random.choice((16, 200, PAGE))
    _write(db, page * PAGE + random.randrange(PAGE - length + 1), random.randbytes(length))


def bit_in_the_header(directory: Path, random: Random) -> None:
    _flip(db_of(directory), random.randrange(100), random)


def bit_in_an_interior_page(directory: Path, random: Random) -> None:
    db = db_of(directory)
    page = random.choice(_pages(db.read_bytes(), TABLE_INTERIOR, INDEX_INTERIOR))
    # Where its header and its cells are, not in the gap between.
    at = random.choice((random.randrange(20), PAGE - 1 - random.randrange(40)))
    _flip(db, page * PAGE + at, random)


def bit_in_a_leaf(directory: Path, random: Random) -> None:
    db = db_of(directory)
    page = random.choice(_pages(db.read_bytes(), TABLE_LEAF, INDEX_LEAF))
    _flip(db, page * PAGE + random.randrange(PAGE), random)


def bit_in_a_record(directory: Path, random: Random) -> None:
    db = db_of(directory)
    _flip(db, _in_records(db.read_bytes(), random), random)


def digit_in_a_record(directory: Path, random: Random) -> None:
    db = db_of(directory)
    content = db.read_bytes()
    at = _in_records(content, random)
    while not chr(content[at]).isdigit() or not content[at - 1 : at].isdigit():
        at = _in_records(content, random)
    _write(db, at, b"%d" % ((int(chr(content[at])) + random.randrange(1, 10)) % 10))


def _in_records(content: bytes, random: Random) -> int:
    """A byte of some document, even of the shortest; documents begin with these names."""
    name = random.choice(
        (b'{"flowId":"flow-', b'{"taskId":"task-', b'{"idempotencyKey":"flow-', b'{"key":1')
    )
    starts = [found.start() for found in re.finditer(re.escape(name), content)]
    return random.choice(starts) + random.randrange(len(name), 85)


def cut_at_a_page(directory: Path, random: Random) -> None:
    _cut(db_of(directory), PAGE * random.choice(_pages(db_of(directory).read_bytes())))


def cut_at_an_odd_size(directory: Path, random: Random) -> None:
    db = db_of(directory)
    _cut(db, random.randrange(1, db.stat().st_size // PAGE) * PAGE + random.randrange(1, PAGE))


def _cut(path: Path, size: int) -> None:
    assert path.stat().st_size > size
    path.write_bytes(path.read_bytes()[:size])


def pages_swapped(directory: Path, random: Random) -> None:
    db = db_of(directory)
    content = db.read_bytes()
    one, other = random.sample(_pages(content), 2)
    _write(db, one * PAGE, content[other * PAGE :][:PAGE])
    _write(db, other * PAGE, content[one * PAGE :][:PAGE])


def page_over_another_of_its_type(directory: Path, random: Random) -> None:
    db = db_of(directory)
    content = db.read_bytes()
    type_ = random.choice((TABLE_LEAF, INDEX_LEAF))
    one, other = random.sample(_pages(content, type_), 2)
    _write(db, one * PAGE, content[other * PAGE :][:PAGE])


def root_of(db: Path, name: str) -> int:
    with closing(sqlite3.connect(db)) as connection:
        statement = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        [(root,)] = connection.execute(statement, (name,)).fetchall()
    return int(root) - 1


INDEXES = (
    "flows_by_id",
    "flows_by_owner",
    "flows_by_wait",
    "tasks_by_flow",
    "tasks_by_run",
    "tasks_by_wait",
    "tasks_waiting",
    "events_by_flow",
    "signals_by_id",
    "signals_kept",
    "updates_by_slot",
    "updates_by_owner",
    "updates_due",
    "digests_due",
)


def index_emptied(directory: Path, random: Random) -> None:
    db = db_of(directory)
    root = root_of(db, random.choice(INDEXES))
    _write(db, root * PAGE, bytes([INDEX_LEAF, 0, 0, 0, 0, 0x10, 0, 0]))


def index_over_another(directory: Path, random: Random) -> None:
    db = db_of(directory)
    one, other = random.sample(INDEXES, 2)
    at = root_of(db, other) * PAGE
    _write(db, root_of(db, one) * PAGE, db.read_bytes()[at : at + PAGE])


# ---- the log ------------------------------------------------------------------------------------------


def log_cut(directory: Path, random: Random) -> None:
    wal = wal_of(directory)
    _cut(wal, random.randrange(32, wal.stat().st_size))


def bit_in_the_log(directory: Path, random: Random) -> None:
    wal = wal_of(directory)
    _flip(wal, random.randrange(wal.stat().st_size), random)


def log_zeroed(directory: Path, random: Random) -> None:
    wal = wal_of(directory)
    start = random.randrange(wal.stat().st_size // 2)
    _write(wal, start, b"\0" * random.randrange(PAGE, wal.stat().st_size - start))


def log_removed(directory: Path, random: Random) -> None:
    wal_of(directory).unlink()


def database_emptied_beside_its_log(directory: Path, random: Random) -> None:
    db_of(directory).write_bytes(b"")


# ---- rows ---------------------------------------------------------------------------------------------


def sql(directory: Path, *statements: str) -> None:
    """What somebody else does with a SQLite shell; each statement has to change something."""
    with closing(sqlite3.connect(db_of(directory), isolation_level=None)) as connection:
        for statement in statements:
            before = connection.total_changes
            connection.execute(statement)
            if not statement.startswith(("DROP", "PRAGMA")):
                assert connection.total_changes > before, f"{statement} changed nothing"


TABLES = ("flows", "tasks", "events", "signals", "updates")


def row_deleted(directory: Path, random: Random) -> None:
    table = random.choice(TABLES)
    key = "position" if table == "events" else "key"
    at = random.randrange(30)
    sql(
        directory,
        f"DELETE FROM {table} WHERE {key} ="
        f" (SELECT {key} FROM {table} ORDER BY {key} LIMIT 1 OFFSET {at})",
    )


def rows_put_in(directory: Path, random: Random) -> None:
    sql(
        directory,
        "INSERT INTO flows SELECT max(key) + 1, owner_key, flow_id || '-copy', controller_id,"
        " correlation_id, NULL, status, ended_at, due_at, revision, doc, crc, wait_key, wait_token"
        " FROM flows",
    )


def table_dropped(directory: Path, random: Random) -> None:
    sql(directory, "DROP TABLE " + random.choice((*TABLES, "ownership")))


def index_dropped(directory: Path, random: Random) -> None:
    sql(directory, "DROP INDEX " + random.choice(INDEXES))


def event_missing_in_the_midst(directory: Path, random: Random) -> None:
    sql(directory, f"DELETE FROM events WHERE seq = 3 AND flow_key = {_some_flow(random)}")


def event_missing_at_the_end(directory: Path, random: Random) -> None:
    flow = _some_flow(random)
    sql(
        directory,
        f"DELETE FROM events WHERE flow_key = {flow}"
        f" AND seq = (SELECT max(seq) FROM events WHERE flow_key = {flow})",
    )


def newest_event_missing(directory: Path, random: Random) -> None:
    sql(directory, "DELETE FROM events WHERE position = (SELECT max(position) FROM events)")


def column_differs(directory: Path, random: Random) -> None:
    change = random.choice(
        (
            "flows SET status = 'queued' WHERE status != 'queued' AND",
            "flows SET owner_key = 'mallory' WHERE",
            "flows SET flow_id = flow_id || '-' WHERE",
            "flows SET revision = revision + 1 WHERE",
            "flows SET due_at = ifnull(due_at, 0) + 5 WHERE",
            "flows SET controller_id = 'another' WHERE",
            "flows SET ended_at = 5 WHERE",
            "flows SET wait_key = 'another' WHERE",
            "flows SET wait_token = 'another' WHERE",
        )
    )
    sql(directory, f"UPDATE {change} key = {_some_flow(random)}")


def column_of_a_child_differs(directory: Path, random: Random) -> None:
    change = random.choice(
        (
            "status = 'lost'",
            "status = 'runnjng'",
            "run_id = run_id || '-'",
            "due_at = 5",
            "runtime = 'acp'",
            "launched = 1 - launched",
            "task_id = task_id || '-'",
            "wait_key = 'another'",
            "wait_token = 'another'",
        )
    )
    sql(
        directory,
        f"UPDATE tasks SET {change} WHERE run_id = 'run-1' AND flow_key = {_some_flow(random)}",
    )


def column_of_an_event_differs(directory: Path, random: Random) -> None:
    change = random.choice(("seq = 99", "flow_key = 100000", "position = position + 100000"))
    sql(
        directory,
        f"UPDATE events SET {change} WHERE seq = 6 AND flow_key = {_some_flow(random)}",
    )


def column_of_a_signal_differs(directory: Path, random: Random) -> None:
    change = random.choice(
        (
            "owner_key = 'mallory'",
            "wait_key = 'another'",
            "signal_id = signal_id || '-'",
            "kept = 0",
            "expires_at = expires_at + 5",
            "key = key + 100000",
        )
    )
    sql(
        directory,
        f"UPDATE signals SET {change} WHERE signal_id = 'second-{random.randrange(30)}'",
    )


def column_of_an_update_differs(directory: Path, random: Random) -> None:
    change = random.choice(
        (
            "owner_key = 'mallory'",
            "flow_key = 100000",
            "slot = 'another'",
            "status = 'delivered'",
            "due_at = ifnull(due_at, 0) + 5",
            "version = version + 1",
            "bucket = 'another'",
            "key = key + 100000",
        )
    )
    flow = _some_flow(random)
    sql(directory, f"UPDATE updates SET {change} WHERE slot = 'progress' AND flow_key = {flow}")


def text_where_a_number_belongs(directory: Path, random: Random) -> None:
    change = random.choice(
        (
            "flows SET revision = 'two' WHERE key",
            "flows SET due_at = 'soon' WHERE key",
            "flows SET ended_at = x'00' WHERE key",
            "tasks SET due_at = 'soon' WHERE flow_key",
            "tasks SET launched = 'yes' WHERE flow_key",
            "events SET seq = 'three' WHERE seq = 3 AND flow_key",
            "flows SET crc = 'right' WHERE key",
            "flows SET crc = NULL WHERE key",
            "tasks SET crc = 1.5 WHERE flow_key",
            "updates SET due_at = 'soon' WHERE slot = 'progress' AND flow_key",
            "updates SET version = 'two' WHERE slot = 'progress' AND flow_key",
            "updates SET crc = NULL WHERE slot = 'progress' AND flow_key",
        )
    )
    sql(directory, f"UPDATE {change} = {_some_flow(random)}")


def totals_differ(directory: Path, random: Random) -> None:
    column = random.choice((*TABLES, "last_position"))
    change = random.choice((f"{column} - 1", f"{column} + 1", "'many'", "-1", "1.5"))
    sql(directory, f"UPDATE ownership SET {column} = {change}")


def ownership_missing(directory: Path, random: Random) -> None:
    sql(directory, "DELETE FROM ownership")


def mark_of_another_program(directory: Path, random: Random) -> None:
    sql(directory, f"PRAGMA application_id = {random.randrange(1, 2**31)}")


def version_of_a_later_release(directory: Path, random: Random) -> None:
    sql(directory, f"PRAGMA user_version = {random.randrange(schema.VERSION + 1, 100)}")


def _some_flow(random: Random) -> str:
    return f"(SELECT key FROM flows WHERE flow_id = 'flow-{random.randrange(30)}')"


def copy_of(whole: Whole, directory: Path) -> Path:
    """A fresh directory with the file."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    whole.copy_to(directory)
    return directory
