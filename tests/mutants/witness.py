"""A pytest plugin that sees to it that the code under test is the copy that was meant, or runs nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

import flowstead

VARIABLE: Final = "FLOWSTEAD_HUNTED_SRC"


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test any other tree."""
    meant, found = Path(os.environ[VARIABLE]).resolve(), Path(flowstead.__file__).resolve()
    if meant not in found.parents:
        raise pytest.UsageError(f"flowstead comes from {found}, and {meant} was meant")
