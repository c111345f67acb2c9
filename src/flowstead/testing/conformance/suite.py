"""The whole suite: every promise of `flowstead.store.port`, grouped by concern."""

from __future__ import annotations

from flowstead.testing.conformance.cancelled_callers import CancelledCallers
from flowstead.testing.conformance.children import Children
from flowstead.testing.conformance.commits import Commits
from flowstead.testing.conformance.conflicts import Conflicts
from flowstead.testing.conformance.history import History
from flowstead.testing.conformance.isolation import Isolation
from flowstead.testing.conformance.listing import Listing
from flowstead.testing.conformance.motion import Motion
from flowstead.testing.conformance.outbox import Outbox
from flowstead.testing.conformance.ownership import Ownership
from flowstead.testing.conformance.restart import Restart
from flowstead.testing.conformance.takeover import Takeover
from flowstead.testing.conformance.texts import Texts
from flowstead.testing.conformance.unreadable import UnreadableRows
from flowstead.testing.conformance.waits import Waits


# pytest runs the tests of the last base first: what everything else stands on comes at the end.
class StoreConformance(
    UnreadableRows,
    CancelledCallers,
    Restart,
    Takeover,
    Ownership,
    Outbox,
    Waits,
    Motion,
    Texts,
    Listing,
    Isolation,
    History,
    Children,
    Conflicts,
    Commits,
):
    """Subclass it in a test file and give it the fixture `make_store`; see `flowstead.testing.conformance`."""
