"""Rows for the tests of a store: small records, and the writes that carry them.

Build a record (`flow_of`, `task_of`, `event_of`, `wait_of`, `signal_of`, `update_of`), put it into a write
(`creates`, `changes`, `children`, `tells`, `signals`, `updates`), and commit a list of writes; or store one thing
at once, a flow with its first event (`put`, `put_task`, `put_signal`, `put_update`, `put_end`).

The writes keep to what the runtime writes: a flow's events are numbered from 1 without a gap, the newest one
carries the flow's revision, and a child's flow is there before the child or comes with it. A store may insist.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from flowstead.model.event import Event
from flowstead.model.flow import (
    LIVE_FLOW_STATUSES,
    FlowStatus,
    NotifyPolicy,
    StoredFlow,
    SyncMode,
)
from flowstead.model.signal import StoredSignal
from flowstead.model.task import (
    ACTIVE_TASK_STATUSES,
    DeliveryStatus,
    Launch,
    StoredTask,
    TaskStatus,
)
from flowstead.model.update import StoredUpdate, UpdateKind
from flowstead.model.wait import Wait, WaitKind
from flowstead.rules.wait_keys import wait_key
from flowstead.store import codec
from flowstead.store.codec import EventRow, FlowRow, FlowWrite, TaskRow
from flowstead.store.port import Scope, Store

ALICE = Scope("alice")
BOB = Scope("bob")
NOW = 1_800_000_000_000

_FINAL = frozenset(FlowStatus) - LIVE_FLOW_STATUSES

HOSTILE = {
    "quotes": 'it\'s "quoted" `twice`; \'\' ""',
    "nul": "before\x00after",
    "emoji": "👩🏽‍🚀 flags 🇨🇭",
    "right to left": "שלום \u202eevil\u202c مرحبا",
    "sql": "'; DROP TABLE flows; --",
    "wildcards": "100%_done*?[a-z]\\%",
    "controls": "\x01\x1b[31m\x7f\r\n\t",
    "not normalized": "e\u0301 \u00e9 \ufb01",
    "highest": "\U0010ffff\U0010ffff",
    "spaces": "  \u00a0 ",
}
"""Texts that a store must keep as they are, by what is nasty about them."""


def flow_of(
    key: int,
    flow_id: str = "flow",
    *,
    owner_key: str = "alice",
    status: FlowStatus = FlowStatus.RUNNING,
    revision: int = 1,
    **fields: Any,
) -> StoredFlow:
    """A flow's record; an ended status brings its end along."""
    if status in _FINAL:
        fields.setdefault("ended_at", NOW)
    fields.setdefault("goal", "a goal")
    return StoredFlow(
        key=key,
        flow_id=flow_id,
        owner_key=owner_key,
        sync_mode=SyncMode.MANAGED,
        notify_policy=NotifyPolicy.DONE_ONLY,
        status=status,
        revision=revision,
        state_version=1,
        created_at=NOW,
        updated_at=NOW,
        **fields,
    )


def task_of(
    key: int,
    flow: StoredFlow,
    task_id: str,
    *,
    status: TaskStatus = TaskStatus.QUEUED,
    launched: bool = False,
    **fields: Any,
) -> StoredTask:
    """A child's record."""
    if status not in ACTIVE_TASK_STATUSES:
        fields.setdefault("ended_at", NOW)
    fields.setdefault("runtime", "subagent")
    fields.setdefault("task", "do it")
    return StoredTask(
        key=key,
        task_id=task_id,
        flow_key=flow.key,
        flow_id=flow.flow_id,
        status=status,
        delivery_status=DeliveryStatus.PENDING,
        notify_policy=NotifyPolicy.DONE_ONLY,
        created_at=NOW,
        launch=Launch(function="work") if launched else None,
        **fields,
    )


def key_for(thread: str = "t-1", *, owner_key: str = "alice") -> str:
    """The key of a wait for a reply in a thread."""
    return wait_key(owner_key, {"kind": "reply", "thread": thread})


def wait_of(wait_key: str | None = None, /, *, token: str | None = None, **fields: Any) -> Wait:
    """A wait for a key, for one that a token answers, or both."""
    return Wait(kind=fields.pop("kind", WaitKind.SIGNAL), wait_key=wait_key, token=token, **fields)


def signal_of(
    key: int,
    *,
    wait_key: str,
    owner_key: str = "alice",
    signal_id: str | None = None,
    expires_at: int | None = NOW + 1000,
    **fields: Any,
) -> StoredSignal:
    """A signal's record; it is kept unless it has no end, or is taken."""
    return StoredSignal(
        key=key,
        owner_key=owner_key,
        wait_key=wait_key,
        signal_id=signal_id,
        received_at=NOW,
        expires_at=expires_at,
        **fields,
    )


def update_of(key: int, flow: StoredFlow, slot: str = "progress", **fields: Any) -> StoredUpdate:
    """An update's record: one that is pending, and due now."""
    fields.setdefault("due_at", NOW)
    fields.setdefault("kind", UpdateKind.NOTICE)
    return StoredUpdate(
        key=key,
        flow_key=flow.key,
        slot=slot,
        idempotency_key=f"{flow.flow_id}:{slot}:{key}",
        owner_key=flow.owner_key,
        flow_id=flow.flow_id,
        revision=flow.revision,
        flow_status=flow.status,
        goal=flow.goal,
        text=fields.pop("text", "It goes on."),
        created_at=NOW,
        **fields,
    )


def event_of(flow: StoredFlow, seq: int, **fields: Any) -> EventRow:
    """A line of a flow's history."""
    event = Event(
        flow_id=flow.flow_id,
        seq=seq,
        revision=flow.revision,
        at=NOW,
        type=fields.pop("type", "flow.updated"),
        actor=fields.pop("actor", "owner"),
        **fields,
    )
    return codec.event_row(flow.key, event)


def new(flow: StoredFlow, *, due_at: int | None = None) -> FlowRow:
    """The row that puts a flow in."""
    return codec.flow_row(flow, codec.encode(flow), due_at=due_at, expected_revision=None)


def changed(flow: StoredFlow, *, seen: int | None = None, due_at: int | None = None) -> FlowRow:
    """The row that writes a flow over the revision before it, or over the one `seen`."""
    expected = flow.revision - 1 if seen is None else seen
    return codec.flow_row(flow, codec.encode(flow), due_at=due_at, expected_revision=expected)


def creates(
    flow: StoredFlow,
    *tasks: StoredTask,
    due_at: int | None = None,
    seqs: Iterable[int] = (1,),
) -> FlowWrite:
    """A write of a new flow with its new children and its first events."""
    return FlowWrite(
        flow=new(flow, due_at=due_at),
        tasks=[codec.task_row(task, due_at=task.next_attempt_at, fresh=True) for task in tasks],
        events=[event_of(flow, seq) for seq in seqs],
    )


def changes(
    flow: StoredFlow,
    *,
    seen: int | None = None,
    due_at: int | None = None,
    tasks: Iterable[TaskRow] = (),
    seqs: Iterable[int] = (),
) -> FlowWrite:
    """A write over a stored flow, with the events of the turn that changed it."""
    return FlowWrite(
        flow=changed(flow, seen=seen, due_at=due_at),
        tasks=list(tasks),
        events=[event_of(flow, seq) for seq in seqs],
    )


def children(*tasks: StoredTask, fresh: bool = True) -> FlowWrite:
    """A write of children alone."""
    return FlowWrite(
        flow=None,
        tasks=[codec.task_row(task, due_at=task.next_attempt_at, fresh=fresh) for task in tasks],
        events=[],
    )


def tells(flow: StoredFlow, *seqs: int) -> FlowWrite:
    """A write of events alone."""
    return FlowWrite(flow=None, tasks=[], events=[event_of(flow, seq) for seq in seqs])


def signals(*signals: StoredSignal, fresh: bool = True) -> FlowWrite:
    """A write of signals alone."""
    rows = [codec.signal_row(signal, fresh=fresh) for signal in signals]
    return FlowWrite(flow=None, tasks=[], events=[], signals=rows)


def updates(*updates: StoredUpdate, fresh: bool = True) -> FlowWrite:
    """A write of updates alone."""
    rows = [codec.update_row(update, fresh=fresh) for update in updates]
    return FlowWrite(flow=None, tasks=[], events=[], updates=rows)


def with_doc(write: FlowWrite, doc: str) -> FlowWrite:
    """The same write with another text where the flow's record should be."""
    assert write.flow is not None
    return FlowWrite(flow=write.flow._replace(doc=doc), tasks=write.tasks, events=write.events)


async def put(store: Store, flow_id: str = "flow", **fields: Any) -> StoredFlow:
    """Store a flow with its first event."""
    due_at = fields.pop("due_at", None)
    flow = flow_of(store.next_key(), flow_id, **fields)
    await store.commit([creates(flow, due_at=due_at)])
    return flow


async def put_task(store: Store, flow: StoredFlow, task_id: str, **fields: Any) -> StoredTask:
    """Store a child."""
    task = task_of(store.next_key(), flow, task_id, **fields)
    await store.commit([children(task)])
    return task


async def put_signal(store: Store, **fields: Any) -> StoredSignal:
    """Store a signal."""
    signal = signal_of(store.next_key(), **fields)
    await store.commit([signals(signal)])
    return signal


def ended(flow: StoredFlow) -> StoredFlow:
    """The flow one revision on, at its end."""
    return replace(flow, status=FlowStatus.SUCCEEDED, revision=flow.revision + 1, ended_at=NOW)


def ends(flow: StoredFlow, *updates: StoredUpdate) -> FlowWrite:
    """A write that ends a flow of one event, and tells of it."""
    rows = [codec.update_row(update, fresh=True) for update in updates]
    write = changes(ended(flow), seqs=[2])
    return FlowWrite(write.flow, write.tasks, write.events, updates=rows)


async def put_end(store: Store, flow: StoredFlow, **fields: Any) -> StoredUpdate:
    """End a flow of one event, with the update that says so."""
    done = update_of(store.next_key(), ended(flow), "done", text="done", **fields)
    await store.commit([ends(flow, done)])
    return done


async def put_update(
    store: Store, flow: StoredFlow, slot: str = "progress", **fields: Any
) -> StoredUpdate:
    """Store an update."""
    update = update_of(store.next_key(), flow, slot, **fields)
    await store.commit([updates(update)])
    return update
