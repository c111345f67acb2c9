# ruff: noqa: ASYNC240 - a test may wait for a file
"""Setting a damaged database aside: whole, private, described, and never while somebody owns it."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import sys
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from flowstead.errors import StoreInUse, StoreUnusable
from flowstead.store.port import EVERYONE, FlowQuery
from flowstead.store.quarantine import set_aside
from tests.store.disk import TendedStore
from tests.store.rows import put

pytestmark = pytest.mark.usefixtures("stores_end")

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def left(db: Path, tmp_path: Path) -> dict[str, bytes]:
    """What a killed owner leaves: the database and a log with something in it."""
    source = tmp_path / "source"
    source.mkdir()
    store = TendedStore(source / db.name)
    await store.open()
    await put(store, "kept")
    files = {p.name: p.read_bytes() for p in source.iterdir() if not p.name.endswith(".lock")}
    await store.aclose()
    for name, content in files.items():
        db.with_name(name).write_bytes(content)
    return files


def found(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "manifest.json"}


def beside(db: Path) -> list[str]:
    return sorted(p.name for p in db.parent.glob(f"{db.name}*") if p.is_file())


async def test_everything_goes_into_one_directory_unchanged(
    db: Path, left: dict[str, bytes]
) -> None:
    assert sorted(left) == ["flows.db", "flows.db-shm", "flows.db-wal"]

    directory = set_aside(db, "a page is broken")

    assert found(directory) == left
    assert beside(db) == ["flows.db.lock"]
    assert directory.parent == db.parent


async def test_only_the_user_can_read_what_was_set_aside(db: Path, left: dict[str, bytes]) -> None:
    for name in left:
        db.with_name(name).chmod(0o644)

    directory = set_aside(db)

    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


async def test_the_manifest_describes_every_file(db: Path, left: dict[str, bytes]) -> None:
    directory = set_aside(db, "the disk was replaced")

    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["database"] == "flows.db"
    assert manifest["why"] == "the disk was replaced"
    assert manifest["when"].endswith("Z")
    assert manifest["files"] == [
        {"name": name, "size": len(left[name]), "sha256": hashlib.sha256(left[name]).hexdigest()}
        for name in ("flows.db", "flows.db-shm", "flows.db-wal")
    ]


async def test_afterwards_the_path_is_a_new_store(db: Path, left: dict[str, bytes]) -> None:
    set_aside(db)
    store = TendedStore(db)

    await store.open()

    assert await store.list_flows(EVERYONE, FlowQuery(), 10) == []
    await store.aclose()


async def test_what_was_set_aside_can_still_be_opened(db: Path, left: dict[str, bytes]) -> None:
    directory = set_aside(db)
    store = TendedStore(directory / "flows.db")

    await store.open()

    assert [flow.flow_id for flow in await store.list_flows(EVERYONE, FlowQuery(), 10)] == ["kept"]
    await store.aclose()


async def test_nothing_is_moved_while_a_runtime_owns_the_file(db: Path) -> None:
    store = TendedStore(db)
    await store.open()
    await put(store)
    before = beside(db)

    with pytest.raises(StoreInUse, match=f"process {os.getpid()} "):
        set_aside(db)

    assert beside(db) == before
    assert [path for path in db.parent.iterdir() if path.is_dir()] == []
    await store.aclose()


async def test_no_runtime_gets_in_afterwards_by_a_lock_left_held(
    db: Path, left: dict[str, bytes]
) -> None:
    set_aside(db)

    store = TendedStore(db)
    await store.open()
    await store.aclose()


async def test_where_there_is_nothing_nothing_is_made(db: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"flows\.db"):
        set_aside(db)

    assert list(db.parent.iterdir()) == []


async def test_a_second_one_in_the_same_second_gets_a_directory_of_its_own(db: Path) -> None:
    directories = []
    for content in (b"first", b"second", b"third"):
        db.write_bytes(content)
        directories.append(set_aside(db))

    assert [found(directory) for directory in directories] == [
        {"flows.db": b"first"},
        {"flows.db": b"second"},
        {"flows.db": b"third"},
    ]


@pytest.mark.crash
async def test_cut_off_anywhere_nothing_starts_empty_over_it_and_calling_again_ends_it(
    tmp_path: Path, db: Path, left: dict[str, bytes]
) -> None:
    (tmp_path / "left").mkdir()
    for name in left:
        db.with_name(name).rename(tmp_path / "left" / name)
    command = [sys.executable, "-m", "tests.store.dying", str(tmp_path), "aside"]
    done = await anyio.run_process(command, cwd=ROOT)
    deaths = int(done.stdout)

    in_the_midst = 0
    for death in range(deaths):
        db = tmp_path / str(death) / "flows.db"
        if db.exists():
            directory = set_aside(db)
        elif db.with_name("flows.db-wal").exists():
            in_the_midst += 1
            with pytest.raises(StoreUnusable, match=r"flows\.db-wal"):
                await TendedStore(db).open()
            directory = set_aside(db)
        else:
            [directory] = [path for path in db.parent.iterdir() if path.is_dir()]

        assert found(directory) == left
        assert beside(db) == ["flows.db.lock"]
        assert {file["name"] for file in _manifest(directory)["files"]} == set(left)
    assert in_the_midst >= 2, f"of {deaths} deaths none was in the midst"


def _manifest(directory: Path) -> dict[str, list[dict[str, object]]]:
    manifest: dict[str, list[dict[str, object]]] = json.loads(
        (directory / "manifest.json").read_text()
    )
    return manifest


async def test_a_database_put_back_meanwhile_is_not_mixed_with_what_was_set_aside(
    db: Path, left: dict[str, bytes]
) -> None:
    first = set_aside(db)
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE mine (x)")
    restored = db.read_bytes()

    second = set_aside(db)

    assert found(first) == left
    assert found(second) == {"flows.db": restored}


async def test_a_log_left_behind_joins_no_directory_it_was_not_taken_from(
    db: Path, left: dict[str, bytes]
) -> None:
    # Another database was set aside whole; of a third attempt nothing is known but its directory.
    whole = set_aside(db)
    nameless = db.with_name("flows.db.set-aside-00000000T000000Z")
    nameless.mkdir()
    db.with_name("flows.db-wal").write_bytes(b"the log of something else")

    directory = set_aside(db)

    assert directory not in (whole, nameless)
    assert found(directory) == {"flows.db-wal": b"the log of something else"}
    assert found(whole) == left
    assert list(nameless.iterdir()) == []


async def test_a_call_cut_off_after_the_database_was_moved_is_ended_in_the_same_directory(
    db: Path, left: dict[str, bytes]
) -> None:
    first = set_aside(db, "the first time")
    manifest = (first / "manifest.json").read_bytes()
    for name in ("flows.db-wal", "flows.db-shm"):
        (first / name).rename(db.with_name(name))

    second = set_aside(db, "the second time")

    assert second == first
    assert found(first) == left
    assert (first / "manifest.json").read_bytes() == manifest
    assert beside(db) == ["flows.db.lock"]
