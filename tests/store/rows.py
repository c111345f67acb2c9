"""Rows for the tests of a store: those of the conformance suite."""

from __future__ import annotations

from flowstead.testing.conformance.rows import (
    ALICE,
    BOB,
    HOSTILE,
    NOW,
    changes,
    children,
    creates,
    event_of,
    flow_of,
    put,
    put_task,
    task_of,
    tells,
)

__all__ = [
    "ALICE",
    "BOB",
    "HOSTILE",
    "NOW",
    "changes",
    "children",
    "creates",
    "event_of",
    "flow_of",
    "put",
    "put_task",
    "task_of",
    "tells",
]
