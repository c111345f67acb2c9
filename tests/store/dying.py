"""Die at every statement of opening a store and writing to it, and see that the file opens each time.

python -m tests.store.dying DIRECTORY
prints how many deaths were survived; ends with an error at the first that was not
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

from flowstead.model.flow import Flow
from flowstead.store.port import EVERYONE, FlowQuery
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


def main(directory: Path) -> int:
    for deaths in range(10_000):
        path = directory / f"{deaths}.db"
        ended = in_a_child(live(path, deaths))
        assert ended in (0, DEAD), f"statement {deaths} ended with {ended}"
        assert in_a_child(look(path)) == 0, f"dead at statement {deaths}, the file does not open"
        if ended == 0:
            return deaths
    raise AssertionError("it never came to an end")


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))  # noqa: T201
