"""What every test may use: the asyncio backend, a store in a file of its own, a clock that stands still."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flowstead.testing import ManualClock

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Begun in the background of a shell, which has us ignore it, and every process we start as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a test may keep its flows."""
    return tmp_path / "flows.db"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
