"""What a store answers, as short as a test wants to ask for it."""

from __future__ import annotations

from typing import Any

from flowstead.model.flow import FlowKey
from flowstead.store.port import (
    EVERYONE,
    FlowQuery,
    Scope,
    Snapshot,
    Store,
    WaitLookup,
    WaitsFound,
)
from flowstead.testing.conformance.rows import NOW


async def loaded(store: Store, flow_id: str = "flow", owner_key: str = "alice") -> Snapshot:
    """The snapshot of one flow, which has to be there."""
    [found] = await store.load([FlowKey(owner_key, flow_id)])
    assert isinstance(found, Snapshot), f"load({flow_id!r}) answered {found!r}, not a Snapshot"
    return found


async def ids(store: Store, scope: Scope, limit: int = 100, **conditions: Any) -> list[str]:
    """The ids of a listing."""
    query = FlowQuery(**conditions)
    return [flow.flow_id for flow in await store.list_flows(scope, query, limit)]


async def positions(store: Store) -> list[int]:
    """The positions of the whole history."""
    return [event.position for event in await store.events_after(EVERYONE, 0, 10_000)]


async def found(
    store: Store,
    wait_key: str,
    *,
    owner_key: str = "alice",
    signal_id: str | None = None,
    now: int = NOW,
) -> WaitsFound:
    """What is on record for one signal."""
    [answer] = await store.look_up_waits([WaitLookup(owner_key, wait_key, signal_id, now)])
    return answer
