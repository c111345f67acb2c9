"""The update: what the owner of a flow is told, once, through a channel that may fail.

An update is a row, written in the transaction that caused it. Of a flow there is one for each *slot*: the end of
the flow is told in the slot `done`, so it is told once; changes of state share the slot `progress`, so the newest
replaces one that has not gone out yet.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.values import Json, Whole

DONE: Final = "done"
PROGRESS: Final = "progress"


class UpdateKind(StrEnum):
    """What an update tells of."""

    DONE = "done"
    PROGRESS = "progress"
    REMINDER = "reminder"
    NOTICE = "notice"
    DIGEST = "digest"


class UpdateStatus(StrEnum):
    """How far an update has come. `pending` may still go out, the rest is final."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DELIVERY_FAILED = "delivery_failed"
    SUPERSEDED = "superseded"
    DIGESTED = "digested"


class Update(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False
):
    """One message to the owner of a flow.

    `idempotency_key` is the same for every attempt: a receiver that has seen it has seen the update. `text` is a
    sentence for people, `data` JSON for programs, `items` what a digest has collected in its `bucket`.
    `requester_origin` is the address: where the flow's request came from. A digest belongs to an owner, not to one
    flow: its `flow_id` is that of the first item. `attempt` counts deliveries tried, from 1. Instants are epoch
    milliseconds. `number` is its place in a list of updates: that of the last one of a page is the next page's
    `after`.
    """

    idempotency_key: str
    kind: UpdateKind
    owner_key: str
    flow_id: str
    revision: Whole
    flow_status: str
    goal: str
    current_step: str | None = None
    text: str
    data: Json = None
    items: list[Json] = []
    bucket: str | None = None
    requester_origin: Json = None
    status: UpdateStatus = UpdateStatus.PENDING
    attempt: Whole = 0
    created_at: Whole
    due_at: Whole | None = None
    delivered_at: Whole | None = None
    failure: str | None = None
    number: Whole = 0


class StoredUpdate(Update, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """An update as the runtime keeps it. `version` is raised when a newer one takes its slot."""

    key: Whole
    flow_key: Whole
    slot: str
    version: Whole = 0
    data: Raw | UnsetType = UNSET
    items: Raw | UnsetType = UNSET  # type: ignore[assignment]
    requester_origin: Raw | UnsetType = UNSET
