"""The store in memory keeps the contract."""

from __future__ import annotations

import pytest

from flowstead.store.memory import MemoryStore, MemoryTables
from tests.store.contract import MakeStore, StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        tables = MemoryTables()
        return lambda: MemoryStore(tables)
