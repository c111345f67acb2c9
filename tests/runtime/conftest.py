"""A store in a file and one in memory, and a runtime on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from flowstead import Runtime, SessionFlows, open_runtime
from flowstead.store.memory import MemoryStore
from flowstead.testing import Simulation, SqliteFiles
from tests.invariants import check_all
from tests.runtime.support import Lives, Where, bound


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, db: Path) -> Where:
    """Where the flows of a test live; open it again to play a restart."""
    return db if request.param == "file" else MemoryStore()


@pytest.fixture
async def runtime(store: Where) -> AsyncIterator[Runtime]:
    async with open_runtime(store) as runtime:
        yield runtime


@pytest.fixture
async def flows(runtime: Runtime) -> SessionFlows:
    return bound(runtime)


@pytest.fixture(params=["file", "memory"])
def lives(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lives]:
    """Processes in virtual time, one after another, on one store; a file must be sound in the end."""
    files = SqliteFiles(tmp_path, durability="normal") if request.param == "file" else None
    with Simulation(store=files) as world:
        lives = Lives(world)
        yield lives
        lives.end()
        if files is not None:
            files.close()
            for copy in files.path.parent.iterdir():
                copy.chmod(0o600)
            check_all(files.path)
