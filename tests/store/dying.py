"""Die at every statement of opening a store and writing to it, and see that the file opens each time.

python -m tests.store.dying DIRECTORY
python -m tests.store.dying DIRECTORY SNAPSHOT.sql    bringing an old file forward instead
python -m tests.store.dying DIRECTORY aside           setting DIRECTORY/left aside instead, at every change
prints how many deaths were survived; ends with an error at the first that was not
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from flowstead.model.flow import Flow
from flowstead.store.port import EVERYONE, FlowQuery
from flowstead.store.quarantine import set_aside
from flowstead.store.sqlite import SqliteStore
from tests.store.rows import put

DEAD, WRONG = 9, 1


class MortalConnection(sqlite3.Connection):
    """A connection whose process ends at the n-th statement."""

    left = 0

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self._live()
        return super().execute(sql, *values)

    def executemany(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self._live()
        return super().executemany(sql, *values)

    @classmethod
    def _live(cls) -> None:
        cls.left -= 1
        if cls.left < 0:
            os._exit(DEAD)


def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
    return sqlite3.connect(*args, factory=MortalConnection, **kwargs)


async def live(path: Path, statements: int) -> None:
    MortalConnection.left = statements
    store = SqliteStore(path, connect=connect, durability="normal")
    await store.open()
    await put(store, "first")
    await put(store, "second")
    await store.aclose()


async def look(path: Path) -> None:
    store = SqliteStore(path, durability="normal")
    await store.open()
    flows: list[Flow] = await store.list_flows(EVERYONE, FlowQuery(), 10)
    names = [flow.flow_id for flow in flows]
    assert names in ([], ["first"], ["second", "first"]), names
    await put(store, "after")
    assert await store.last_position() == len(names) + 1
    assert await store.list_unreadable() == []
    await store.aclose()


def in_a_child(work: Any) -> int:
    child = os.fork()
    if child == 0:
        code = WRONG
        try:
            asyncio.run(work)
            code = 0
        finally:
            os._exit(code)
    work.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def bring_forward(path: Path, statements: int) -> None:
    MortalConnection.left = statements
    store = SqliteStore(path, connect=connect, durability="normal")
    await store.open()
    MortalConnection.left = 10_000
    await store.aclose()


async def look_at_old(path: Path, before: list[Any]) -> None:
    assert documents(path) == before
    store = SqliteStore(path, durability="normal")
    await store.open()
    assert await store.list_unreadable() == []
    await store.aclose()


def documents(path: Path) -> list[Any]:
    """Every record, but for the key of a wait, which an old file learns when it is brought forward."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [
            connection.execute(
                f"SELECT json_remove(doc, '$.waitKey') FROM {table} ORDER BY 1"
            ).fetchall()
            for table in ("flows", "tasks", "events")
        ]


async def put_aside(path: Path, changes: int) -> None:
    """Set a database aside, and die when the file system is about to be changed for the n-th time."""
    left = changes

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event in ("os.mkdir", "os.rename", "os.chmod", "open"):
            left -= 1
            if left < 0:
                os._exit(DEAD)

    sys.addaudithook(hook)
    set_aside(path, "it is damaged")
    left = 10_000


def die_in_writing(directory: Path, deaths: int) -> int:
    path = directory / f"{deaths}.db"
    ended = in_a_child(live(path, deaths))
    assert in_a_child(look(path)) == 0, f"dead at statement {deaths}, the file does not open"
    return ended


def die_in_migrating(directory: Path, deaths: int, snapshot: Path) -> int:
    path, old = directory / f"{deaths}.db", directory / "old.db"
    if not old.exists():
        with closing(sqlite3.connect(old)) as connection:
            connection.executescript(snapshot.read_text())
    shutil.copy(old, path)
    before = documents(old)
    ended = in_a_child(bring_forward(path, deaths))
    after = in_a_child(look_at_old(path, before))
    assert after == 0, f"dead at statement {deaths}, the file is another"
    return ended


def die_in_setting_aside(directory: Path, deaths: int) -> int:
    """What is left to find is for the caller to look at."""
    here = directory / str(deaths)
    shutil.copytree(directory / "left", here)
    return in_a_child(put_aside(here / "flows.db", deaths))


def main(die: Callable[[int], int]) -> int:
    for deaths in range(10_000):
        ended = die(deaths)
        assert ended in (0, DEAD), f"statement {deaths} ended with {ended}"
        if ended == 0:
            return deaths
    raise AssertionError("it never came to an end")


if __name__ == "__main__":
    where, *what = sys.argv[1:]
    if not what:
        way = partial(die_in_writing, Path(where))
    elif what == ["aside"]:
        way = partial(die_in_setting_aside, Path(where))
    else:
        way = partial(die_in_migrating, Path(where), snapshot=Path(what[0]))
    print(main(way))  # noqa: T201
