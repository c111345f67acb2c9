"""The flow: one piece of durable work with one owner, one state bag and one revision.

User JSON (`state_json`, `wait_json`, `requester_origin`) has two shapes. Inside the runtime it travels
as `msgspec.Raw`: validated once at the door, never decoded, never shared. What is handed out is decoded
afresh each time, so no caller can reach the runtime's memory through a record.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.approval import Grant
from flowstead.model.retry import Category
from flowstead.model.values import Json as Json
from flowstead.model.values import Whole as Whole
from flowstead.model.wait import Wait


class SyncMode(StrEnum):
    """Who may change a flow: its owner (`managed`), or only the one task it follows."""

    MANAGED = "managed"
    TASK_MIRRORED = "task_mirrored"


class FlowStatus(StrEnum):
    """Where a flow stands. The last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    BLOCKED = "blocked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


LIVE_FLOW_STATUSES: Final = frozenset(
    {FlowStatus.QUEUED, FlowStatus.RUNNING, FlowStatus.WAITING, FlowStatus.BLOCKED}
)


class NotifyPolicy(StrEnum):
    """Which changes of a flow its owner wants to hear of."""

    DONE_ONLY = "done_only"
    STATE_CHANGES = "state_changes"
    SILENT = "silent"


class Failure(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False
):
    """Why something failed: `kind` for programs, `message` for people.

    `kind` is a short snake_case word (`exception`, `timed_out`, `bad_result`, …), `code` the exception's
    class name or a caller's own code, `message` one capped line without control characters. `category` is set
    where the sort of failure is known.
    """

    kind: str
    code: str | None = None
    message: str | None = None
    category: Category | None = None


class Flow(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """A flow as its owner sees it: a snapshot that never changes and shares nothing.

    Instants are integer epoch milliseconds. `ended_at` is set exactly when the flow is final. `cancel_started_at`
    is set once what runs is being stopped, `parent_task_id` where the flow is the child of another one, and
    `retry_of` names the ended flow that this one goes on from. `answer_json` is what the last wait of the flow's
    own (`set_waiting`) was answered with: `{"payload", "signalId", "at"}`, or `{"timedOut": true, "at"}`.
    """

    flow_id: str
    sync_mode: SyncMode
    owner_key: str
    requester_origin: Json = None
    controller_id: str | None = None
    correlation_id: str | None = None
    revision: Whole
    status: FlowStatus
    notify_policy: NotifyPolicy
    goal: str
    current_step: str | None = None
    state_json: Json = None
    state_version: Whole
    wait_json: Json = None
    blocked_task_id: str | None = None
    blocked_summary: str | None = None
    cancel_requested_at: Whole | None = None
    cancel_started_at: Whole | None = None
    parent_task_id: str | None = None
    retry_of: str | None = None
    answer_json: Json = None
    failure: Failure | None = None
    created_at: Whole
    updated_at: Whole
    ended_at: Whole | None = None


class StoredFlow(Flow, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """A flow as the runtime keeps it: user JSON stays encoded, and bookkeeping rides along.

    `key` is the store's number for the flow; ids are unique only per owner. `depth` counts the flows above a
    nested one, and `root_id` is the id of the topmost.

    `wait` is how the flow's own wait is answered, `wait_key` the digest of that or of the last one, and
    `wait_token` that of what the tokens of its own waits begin with. `awaiting` is what its controller stands in:
    groups of children, of which the first to end wakes it; in those that are `selecting` as well it withdraws the
    others. Until `park_at` is cleared the controller may still be in memory, and has to be entered again if it is
    not. `content_revision` is the revision at which somebody else than the controller last changed the content, and
    `grants` are what approvals allow.
    """

    key: Whole
    requester_origin: Raw | UnsetType = UNSET
    state_json: Raw | UnsetType = UNSET
    wait_json: Raw | UnsetType = UNSET
    idempotency_key: str | None = None
    request_digest: str | None = None
    depth: Whole = 0
    root_id: str | None = None
    answer_json: Raw | UnsetType = UNSET
    wait: Wait | None = None
    wait_key: str | None = None
    wait_token: str | None = None
    awaiting: tuple[tuple[str, ...], ...] = ()
    selecting: tuple[tuple[str, ...], ...] = ()
    park_at: Whole | None = None
    content_revision: Whole = 0
    grants: dict[str, Grant] = {}


def has_ended(flow: Flow) -> bool:
    """Whether the flow is final. The one predicate for it."""
    return flow.ended_at is not None


def waits_itself(flow: StoredFlow) -> bool:
    """Whether a flow that stands still waits for something by itself: not in its children, nor for nothing."""
    if flow.awaiting or flow.wait_json is msgspec.UNSET:
        return False
    return flow.wait is not None or flow.wait_key is not None


class FlowKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """A flow's name inside a store: ids are unique per owner, so a stranger's id names nothing."""

    owner_key: str
    flow_id: str
