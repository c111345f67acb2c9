"""Whatever happens to a file, nothing wrong is ever read from it, and nothing that is gone is gone unsaid.

Each damage is done to a real file with known content. Either the file is refused and left as it is, or each read
answers as before, is refused, or leaves out what `list_unreadable` tells of. SQLite itself notices few of these.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from flowstead.errors import SnapshotUnreadable, StoreError, StoreUnusable
from flowstead.model.flow import FlowKey
from flowstead.store import sqlite
from flowstead.store.port import Snapshot, Unreadable
from flowstead.store.sqlite import SqliteStore
from tests.store import damage
from tests.store.damage import Kind, Reads, Whole, copy_of, read_all
from tests.store.disk import TendedStore
from tests.store.rows import ALICE, changes, put

pytestmark = pytest.mark.usefixtures("stores_end")

SEEDS = range(int(os.environ.get("FLOWSTEAD_DAMAGE_SEEDS", "3")))

REFUSED_AT_ONCE: tuple[Kind, ...] = (
    damage.cut_at_a_page,
    damage.cut_at_an_odd_size,
    damage.row_deleted,
    damage.rows_put_in,
    damage.table_dropped,
    damage.index_dropped,
    damage.event_missing_in_the_midst,
    damage.event_missing_at_the_end,
    damage.newest_event_missing,
    damage.totals_differ,
    damage.ownership_missing,
    damage.mark_of_another_program,
    damage.version_of_a_later_release,
)
"""However long the file is."""

OF_A_ROW: tuple[Kind, ...] = (
    damage.digit_in_a_record,
    damage.bit_in_a_record,
    damage.column_differs,
    damage.column_of_a_child_differs,
    damage.column_of_an_event_differs,
    damage.column_of_a_signal_differs,
    damage.column_of_an_update_differs,
    damage.text_where_a_number_belongs,
)
"""The file opens, and the row is told of."""

OF_THE_FILE: tuple[Kind, ...] = (
    damage.zeroed_page,
    damage.random_bytes_in_a_page,
    damage.bit_in_an_interior_page,
    damage.bit_in_a_leaf,
    damage.pages_swapped,
    damage.page_over_another_of_its_type,
    damage.index_emptied,
    damage.index_over_another,
)
"""A file of moderate size is refused; in a long one that was only counted, what is hurt is told of.

Counts, ids and times that come from an index alone can be wrong there: `list_unreadable` says that it is broken.
"""

HARMLESS_AT_TIMES = {
    damage.bit_in_the_header,
    damage.bit_in_an_interior_page,
    damage.bit_in_a_leaf,
    damage.random_bytes_in_a_page,
}
"""Not every byte of a file means something: some are counters, some are free space, some only part two keys."""

PART_OF_THE_LOG: tuple[Kind, ...] = (
    damage.log_cut,
    damage.bit_in_the_log,
    damage.log_zeroed,
    damage.log_removed,
)
"""SQLite takes a log to its first broken frame, as after a power cut, and nobody can tell the two apart."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Whole, Whole]:
    return asyncio.run(damage.make(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def whole(files: tuple[Whole, Whole]) -> Whole:
    return files[0]


@pytest.fixture
def with_log(files: tuple[Whole, Whole]) -> Whole:
    return files[1]


@pytest.fixture(params=["checked whole", "counted"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of moderate size, and one treated as if it were long."""
    if request.param == "counted":
        monkeypatch.setattr(sqlite, "_CHECKED_WHOLE", 0)
    return str(request.param)


def named(kinds: Any) -> Any:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


def content(directory: Path) -> dict[str, bytes]:
    """What must stay as it is; SQLite's shared memory and the lock are nobody's data."""
    paths = (damage.db_of(directory), damage.wal_of(directory))
    return {path.name: path.read_bytes() for path in paths if path.exists()}


async def opened(directory: Path) -> SqliteStore | StoreUnusable:
    """The store, or why it was refused; that the file was left alone is seen here."""
    before = content(directory)
    store = TendedStore(damage.db_of(directory), durability="normal")
    refused = None
    try:
        await store.open()
    except StoreUnusable as error:
        refused = error
    if refused is None:
        return store
    assert content(directory) == before, f"{refused} - and the file was changed"
    return refused


async def survey(store: SqliteStore, right: Reads) -> tuple[Reads, list[Unreadable]]:
    """All that is read now, and all that is told of; then a write, that must not fail in a strange way."""
    keys = [FlowKey(owner, flow_id) for kind, owner, flow_id in named_reads(right, "flow")]
    reads = await read_all(store, keys)
    told = await store.list_unreadable()
    with suppress(StoreError):
        await put(store, "after")
        await store.find_flow(ALICE, "after")
    await store.aclose()
    return reads, told


def named_reads(reads: Reads, kind: str) -> Iterator[tuple[str, str, str]]:
    return (name for name in reads if name[0] == kind)  # type: ignore[misc]


LISTS = {
    "flows",
    "live",
    "events",
    "tasks",
    "history",
    "waits",
    "updates",
    "updates due",
    "digests due",
}


def judge(reads: Reads, right: Reads, told: list[Unreadable]) -> int:
    """See that nothing wrong was read and nothing left out unsaid; answers how many reads were refused."""
    assert reads.keys() == right.keys()
    refused = 0
    for name, answer in reads.items():
        if isinstance(answer, StoreError):
            assert isinstance(answer, SnapshotUnreadable | StoreUnusable), (name, answer)
            refused += 1
        elif answer != right[name]:
            assert told, (
                f"{name} answered {answer!r} instead of {right[name]!r}, and nothing is told of"
            )
            if name[0] in LISTS:
                strange = [item for item in answer if item not in right[name]]
                assert not strange, f"{name} answered {strange!r}"
            elif name[0] in ("flow", "snapshot", "task", "once", "token"):
                assert answer is None, f"{name} answered {answer!r}"
    if refused:
        assert told, "reads are refused, and nothing is told of"
    return refused


async def test_the_file_is_worth_damaging(whole: Whole, with_log: Whole, tmp_path: Path) -> None:
    for number, one in enumerate((whole, with_log)):
        store = await opened(copy_of(one, tmp_path / str(number)))
        assert isinstance(store, SqliteStore)

        reads, told = await survey(store, one.states[-1])

        assert reads == one.states[-1]
        assert told == []
        assert len(reads["flows", "None"]) >= 30
        assert not [answer for answer in reads.values() if isinstance(answer, Exception)]
        assert {name[0] for name, answer in reads.items() if name[0] in LISTS and answer} == LISTS
        assert reads["met",]
        looked_up = [reads[name][0] for name in reads if name[0] == "lookup"]
        assert sum(one.kept is not None and bool(one.waiting) for one in looked_up) > 5
        assert sum(reads[name] is not None for name in reads if name[0] == "token") > 10
    types = {whole.db[page * damage.PAGE] for page in range(1, len(whole.db) // damage.PAGE)}
    assert {damage.TABLE_LEAF, damage.TABLE_INTERIOR, damage.INDEX_LEAF} <= types
    assert len(with_log.wal) > 10 * damage.PAGE
    assert len({str(state) for state in with_log.states}) == len(with_log.states)


@named(REFUSED_AT_ONCE)
@pytest.mark.usefixtures("size")
async def test_a_file_that_something_is_missing_from_is_refused_with_the_reason(
    whole: Whole, kind: Kind, tmp_path: Path
) -> None:
    for seed in SEEDS:
        directory = copy_of(whole, tmp_path / "damaged")
        kind(directory, Random(seed))

        refused = await opened(directory)

        assert isinstance(refused, StoreUnusable), f"seed {seed} was opened"
        assert refused.problem.endswith(".")


@pytest.mark.usefixtures("size")
async def test_a_file_that_lost_only_the_end_of_its_last_page_is_refused(
    whole: Whole, tmp_path: Path
) -> None:
    directory = copy_of(whole, tmp_path / "damaged")
    damage.db_of(directory).write_bytes(whole.db[:-100])

    refused = await opened(directory)

    assert isinstance(refused, StoreUnusable)
    assert "damaged" in refused.problem


@named(OF_A_ROW)
@pytest.mark.usefixtures("size")
async def test_a_damaged_row_is_refused_alone_and_told_of(
    whole: Whole, kind: Kind, tmp_path: Path
) -> None:
    right = whole.states[-1]
    for seed in SEEDS:
        directory = copy_of(whole, tmp_path / "damaged")
        kind(directory, Random(seed))
        store = await opened(directory)
        if isinstance(store, StoreUnusable):
            assert kind is damage.column_of_an_event_differs, f"seed {seed}: {store}"
            continue

        reads, told = await survey(store, right)

        judge(reads, right, told)
        assert {row.table for row in told} <= set(damage.TABLES), told
        assert 1 <= len(told) <= 4, told
        hurt = [name for name in named_reads(right, "flow") if reads[name] != right[name]]
        assert len(hurt) <= 1, hurt


@named((*OF_THE_FILE, damage.bit_in_the_header))
async def test_a_damaged_page_is_refused_or_told_of(
    whole: Whole, kind: Kind, tmp_path: Path, size: str
) -> None:
    right = whole.states[-1]
    noticed = 0
    for seed in SEEDS:
        directory = copy_of(whole, tmp_path / "damaged")
        kind(directory, Random(seed))
        store = await opened(directory)
        if isinstance(store, StoreUnusable):
            noticed += 1
            continue

        reads, told = await survey(store, right)

        judge(reads, right, told)
        noticed += bool(told)
        assert told or kind in HARMLESS_AT_TIMES, f"seed {seed} went unnoticed"
    assert noticed or kind in HARMLESS_AT_TIMES


@named(PART_OF_THE_LOG)
@pytest.mark.usefixtures("size")
async def test_what_a_broken_log_leaves_is_an_earlier_state_whole_and_sqlite_cannot_tell_it_is_earlier(
    with_log: Whole, kind: Kind, tmp_path: Path
) -> None:
    left = set()
    for seed in SEEDS:
        directory = copy_of(with_log, tmp_path / "damaged")
        kind(directory, Random(seed))
        store = await opened(directory)
        if isinstance(store, StoreUnusable):
            continue

        reads = await read_all(store)
        told = await store.list_unreadable()
        await store.aclose()

        assert told == []
        assert reads in with_log.states, f"seed {seed} made a state that never was"
        left.add(with_log.states.index(reads))
    assert left, "every seed was refused"


@pytest.mark.usefixtures("size")
async def test_an_emptied_database_beside_its_log_is_refused(
    with_log: Whole, tmp_path: Path
) -> None:
    directory = copy_of(with_log, tmp_path / "damaged")
    damage.database_emptied_beside_its_log(directory, Random(0))

    refused = await opened(directory)

    assert isinstance(refused, StoreUnusable)
    assert "flows.db-wal" in refused.problem


@pytest.mark.usefixtures("size")
async def test_the_log_of_another_file_is_refused(
    with_log: Whole, whole: Whole, tmp_path: Path
) -> None:
    log = await log_of_a_file(tmp_path / "theirs.db")
    for number, one in enumerate((with_log, whole)):
        directory = copy_of(one, tmp_path / str(number))
        damage.wal_of(directory).write_bytes(log)

        assert isinstance(await opened(directory), StoreUnusable)


@pytest.mark.usefixtures("size")
async def test_the_log_of_a_file_that_looks_alike_is_refused(tmp_path: Path) -> None:
    log = await log_of_a_file(tmp_path / "theirs.db")
    await log_of_a_file(tmp_path / "flows.db")
    damage.wal_of(tmp_path).write_bytes(log)

    refused = await opened(tmp_path)

    assert isinstance(refused, StoreUnusable)
    assert "flows.db-wal belongs to another file" in refused.problem


async def log_of_a_file(db: Path) -> bytes:
    """Make a small file, close it, and answer the log it had before."""
    store = TendedStore(db, durability="normal")
    await store.open()
    await put(store, "theirs")
    log = db.with_name(db.name + "-wal").read_bytes()
    await store.aclose()
    return log


async def test_a_file_that_lost_its_first_log_is_no_new_file(tmp_path: Path) -> None:
    db = tmp_path / "flows.db"
    store = TendedStore(db, durability="normal")
    await store.open()
    await put(store)
    (tmp_path / "copy").mkdir()
    shutil.copy(db, tmp_path / "copy" / "flows.db")

    tables = damage.root_of(tmp_path / "copy" / "flows.db", "flows")

    assert tables > 0


async def test_the_reason_says_how_many_rows_are_missing(whole: Whole, tmp_path: Path) -> None:
    directory = copy_of(whole, tmp_path / "damaged")
    total = len(whole.states[-1]["flows", "None"])
    damage.sql(directory, "DELETE FROM flows WHERE key IN (SELECT key FROM flows LIMIT 3)")

    refused = await opened(directory)

    assert isinstance(refused, StoreUnusable)
    assert f"3 of {total} flows are missing" in refused.problem


async def test_rows_that_vanish_while_the_store_is_open_are_told_of(
    whole: Whole, tmp_path: Path
) -> None:
    directory = copy_of(whole, tmp_path / "damaged")
    store = await opened(directory)
    assert isinstance(store, SqliteStore)
    right = whole.states[-1]
    key = FlowKey("alice", "flow-2")
    damage.event_missing_at_the_end(directory, Random(1))
    damage.sql(
        directory,
        "DELETE FROM events WHERE seq = 2 AND flow_key ="
        " (SELECT key FROM flows WHERE flow_id = 'flow-2')",
    )

    [loaded] = await store.load([key])
    told = await store.list_unreadable()

    assert isinstance(loaded, SnapshotUnreadable)
    assert [(row.table, row.key) for row in told] == [("file", 0)]
    assert f"2 of {len(right['events', 'None'])} events are missing" in told[0].problem


async def test_an_update_does_not_vouch_for_a_column_it_leaves_alone(
    whole: Whole, tmp_path: Path
) -> None:
    directory = copy_of(whole, tmp_path / "damaged")
    store = await opened(directory)
    assert isinstance(store, SqliteStore)
    key = FlowKey("alice", "flow-2")
    [found] = await store.load([key])
    assert isinstance(found, Snapshot)
    damage.sql(directory, "UPDATE flows SET correlation_id = 'other' WHERE flow_id = 'flow-2'")

    flow = replace(found.flow, revision=found.flow.revision + 1)
    await store.commit([changes(flow, seqs=[found.last_seq + 1])])

    [loaded] = await store.load([key])
    assert isinstance(loaded, SnapshotUnreadable)
    assert "checksum" in loaded.problem
