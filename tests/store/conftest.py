"""What the tests of stores share: nothing a test opened outlives it, however it ended."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator

import anyio.to_thread
import pytest

from tests.store.disk import TendedStore


@pytest.fixture
async def stores_end() -> AsyncIterator[None]:
    """Close what was left open, and see worker threads end before the loop they answer to."""
    before = set(threading.enumerate())
    yield
    while TendedStore.made:
        await TendedStore.made.pop().aclose()
    for thread in set(threading.enumerate()) - before:
        if "_connection_worker_thread" in thread.name:
            await anyio.to_thread.run_sync(thread.join, 1)
