"""The store in a SQLite file keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.contract import MakeStore, StoreContract
from tests.store.disk import TendedStore


@pytest.mark.usefixtures("stores_end")
class TestSqliteStore(StoreContract):
    @pytest.fixture
    def make_store(self, db: Path) -> MakeStore:
        return lambda: TendedStore(db, durability="normal")
