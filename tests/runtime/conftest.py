"""A store in a file and one in memory, and a runtime on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flowstead import Runtime, SessionFlows, open_runtime
from flowstead.store.memory import MemoryStore
from tests.runtime.support import Where, bound


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
