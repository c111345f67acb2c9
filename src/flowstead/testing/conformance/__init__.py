"""What every store must do, as tests that any store can run.

Whoever writes a store for flowstead puts this into a test file of their own::

    from flowstead.testing.conformance import StoreConformance

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda: MyStore(tmp_path / "data")

and runs pytest. The callable is asked for one store that is not open yet, over data that is empty when a test
begins; asked again in the same test, it answers another store over the same data: what a restarted process, or a
second one, would have in its hands. The rest is optional and described in `fixtures`.

Only pytest and the plugin that comes with anyio are needed, in whatever mode the plugin runs. The tests use nothing
but the port (`flowstead.store.port`); the rows they write are made by `rows`, for tests of your own as well.
"""

from __future__ import annotations

from typing import Final

import pytest

_CONCERNS: Final = (
    "cancelled_callers",
    "commits",
    "conflicts",
    "children",
    "history",
    "isolation",
    "listing",
    "motion",
    "outbox",
    "ownership",
    "restart",
    "takeover",
    "texts",
    "unreadable",
    "waits",
)

# Asked for before they are imported, so that a failing assertion shows both of its sides.
pytest.register_assert_rewrite(*(f"{__name__}.{concern}" for concern in ("reads", *_CONCERNS)))

from flowstead.testing.conformance import rows  # noqa: E402
from flowstead.testing.conformance.suite import StoreConformance  # noqa: E402

__all__ = ["StoreConformance", "rows"]
