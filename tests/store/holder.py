"""A process that owns a store and does what it is told, a line at a time.

python -m tests.store.holder PATH
open          opens the store            -> "opened" or the name of the error
put ID        commits a new flow         -> "written" or the name of the error
close         closes the store           -> "closed"
"""

from __future__ import annotations

import asyncio
import sys

from flowstead.errors import FlowError
from flowstead.store.sqlite import SqliteStore
from tests.store.rows import put


async def main(path: str) -> None:
    store = SqliteStore(path, durability="normal")
    for line in sys.stdin:
        verb, *words = line.split()
        try:
            if verb == "open":
                await store.open()
                answer = "opened"
            elif verb == "put":
                await put(store, words[0])
                answer = "written"
            else:
                await store.aclose()
                answer = "closed"
        except FlowError as error:
            answer = f"{type(error).__name__}: {error}"
        print(answer, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
