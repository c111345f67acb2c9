"""Records to rows and back. Every row carries its whole record as JSON text beside the columns it is found by.

Encoding happens before a write is queued, so a value that cannot be encoded never reaches a batch. Decoding
checks every type: a row that does not fit raises `SnapshotUnreadable` for itself alone. Unknown fields are
tolerated, so a file written by a later minor version can still be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET

from flowstead.errors import SnapshotUnreadable
from flowstead.model.event import Event
from flowstead.model.flow import Flow, StoredFlow
from flowstead.model.task import StoredTask, Task

T = TypeVar("T")

encode = msgspec.json.Encoder().encode
_flow = msgspec.json.Decoder(Flow)
_stored_flow = msgspec.json.Decoder(StoredFlow)
_task = msgspec.json.Decoder(Task)
_stored_task = msgspec.json.Decoder(StoredTask)
_event = msgspec.json.Decoder(Event)
_any = msgspec.json.Decoder()


class FlowRow(NamedTuple):
    """One flow, in column order. `expected_revision` is None for a new flow."""

    key: int
    owner_key: str
    flow_id: str
    controller_id: str | None
    correlation_id: str | None
    idempotency_key: str | None
    status: str
    ended_at: int | None
    due_at: int | None
    revision: int
    doc: str
    expected_revision: int | None


class TaskRow(NamedTuple):
    """One child, in column order. `fresh` tells an insert from an update."""

    key: int
    task_id: str
    flow_key: int
    run_id: str | None
    status: str
    runtime: str
    launched: bool
    due_at: int | None
    doc: str
    fresh: bool


class EventRow(NamedTuple):
    """One line of history; the store gives it its position."""

    flow_key: int
    seq: int
    doc: str


class FlowWrite(msgspec.Struct, frozen=True, gc=False):
    """Everything one flow's turn writes. A batch is a list of these, committed whole or not at all."""

    flow: FlowRow | None
    tasks: Sequence[TaskRow]
    events: Sequence[EventRow]


def flow_row(
    flow: StoredFlow, doc: bytes, *, due_at: int | None, expected_revision: int | None
) -> FlowRow:
    """The row of a flow whose record is already encoded as `doc`."""
    return FlowRow(
        flow.key,
        flow.owner_key,
        flow.flow_id,
        flow.controller_id,
        flow.correlation_id,
        flow.idempotency_key,
        flow.status,
        flow.ended_at,
        due_at,
        flow.revision,
        doc.decode(),
        expected_revision,
    )


def task_row(task: StoredTask, *, fresh: bool) -> TaskRow:
    """The row of a child."""
    return TaskRow(
        task.key,
        task.task_id,
        task.flow_key,
        task.run_id,
        task.status,
        task.runtime,
        task.launch is not None,
        task.next_attempt_at,
        encode(task).decode(),
        fresh,
    )


def event_row(flow_key: int, event: Event) -> EventRow:
    """The row of an event that has no position yet."""
    return EventRow(flow_key, event.seq, encode(event).decode())


def read_flow(doc: bytes) -> Flow:
    """A flow to hand out; it shares nothing with the runtime."""
    return _read(_flow, doc, "flow")


def read_stored_flow(doc: bytes) -> StoredFlow:
    """A flow to keep."""
    return _read(_stored_flow, doc, "flow")


def read_task(doc: bytes) -> Task:
    """A child to hand out."""
    return _read(_task, doc, "task")


def read_stored_task(doc: bytes) -> StoredTask:
    """A child to keep."""
    return _read(_stored_task, doc, "task")


def read_event(doc: bytes, position: int) -> Event:
    """An event to hand out, with its place in the store."""
    return msgspec.structs.replace(_read(_event, doc, "event"), position=position)


def expose_flow(flow: StoredFlow) -> Flow:
    """A kept flow as its owner may see it."""
    return _flow.decode(encode(flow))


def expose_task(task: StoredTask) -> Task:
    """A kept child as its flow's owner may see it."""
    return _task.decode(encode(task))


def decode_json(raw: msgspec.Raw | msgspec.UnsetType) -> Any:
    """User JSON, decoded afresh; None where there is none."""
    return None if raw is UNSET else _any.decode(raw)


def _read(decoder: msgspec.json.Decoder[T], doc: bytes, kind: str) -> T:
    try:
        return decoder.decode(doc)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise SnapshotUnreadable(_name_of(doc, kind), str(error)) from error


def _name_of(doc: object, kind: str) -> str:
    """What can still be said of an unreadable row without showing what is in it."""
    try:
        found = _any.decode(doc)  # type: ignore[arg-type]
        return f"{kind} {found['taskId' if kind == 'task' else 'flowId']}"
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, KeyError, RecursionError):
        return f"a {kind}"
