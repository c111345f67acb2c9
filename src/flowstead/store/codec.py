"""Records to rows and back. Every row carries its whole record as JSON text beside the columns it is found by.

Encoding happens before a write is queued, so a value that cannot be encoded never reaches a batch. Decoding
checks every type: a row that does not fit raises `SnapshotUnreadable` for itself alone. Unknown fields are
tolerated, so a file written by a later minor version can still be read.

A row in a file also carries a checksum of its record and of all its other columns: a digit that flipped still
decodes, and a column that says something else than its record still finds it. Nothing is decoded before the
checksum fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

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
_pack = msgspec.msgpack.Encoder().encode


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


def task_row(task: StoredTask, *, due_at: int | None, fresh: bool) -> TaskRow:
    """The row of a child."""
    return TaskRow(
        task.key,
        task.task_id,
        task.flow_key,
        task.run_id,
        task.status,
        task.runtime,
        task.launch is not None,
        due_at,
        encode(task).decode(),
        fresh,
    )


def event_row(flow_key: int, event: Event) -> EventRow:
    """The row of an event that has no position yet."""
    return EventRow(flow_key, event.seq, encode(event).decode())


# ---- checksums ------------------------------------------------------------------------------------


def crc_of(columns: Sequence[object], doc: bytes) -> int:
    """The checksum of a record and the columns beside it.

    MessagePack says where each column ends and of what type it is, so no two rows read alike.
    """
    return crc32(doc, crc32(_pack(columns)))


def flow_crc(row: FlowRow) -> int:
    """The checksum of a flow's row, `expected_revision` left out."""
    return crc_of(row[:10], row.doc.encode())


def task_crc(row: TaskRow) -> int:
    """The checksum of a child's row, `fresh` left out."""
    return crc_of((*row[:6], int(row.launched), row.due_at), row.doc.encode())


def event_crc(row: EventRow) -> int:
    """The checksum of a line of history; its position is mixed in where it is given, see `at_position`."""
    return crc_of(row[:2], row.doc.encode())


def at_position(crc: int, position: int) -> int:
    """The checksum of an event once it has a position; the same both ways."""
    return crc ^ position


def flow_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored flow, given all its columns in order, once its checksum fits."""
    *columns, doc, crc = row
    return _vouched("flow", columns[2], columns, doc, crc)


def task_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored child, given all its columns in order, once its checksum fits."""
    *columns, doc, crc = row
    return _vouched("task", columns[1], columns, doc, crc)


def event_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored event, given all its columns in order, once its checksum fits."""
    position, flow_key, seq, doc, crc = row
    crc = at_position(crc, position) if isinstance(crc, int) else crc
    return _vouched("event", position, (flow_key, seq), doc, crc)


def stored_crc(columns: Sequence[object], doc: bytes) -> int | None:
    """The checksum of columns as a connection without text hands them out; None if some are no text."""
    try:
        return crc_of([c.decode() if type(c) is bytes else c for c in columns], doc)
    except UnicodeDecodeError:
        return None


def _vouched(kind: str, name: object, columns: Sequence[object], doc: object, crc: object) -> bytes:
    if not isinstance(doc, bytes):
        told = f"its document is {type(doc).__name__}, not text"
        raise SnapshotUnreadable(f"{kind} {plain(name)}", told)
    if crc is None or stored_crc(columns, doc) != crc:
        told = "its checksum does not fit; the row was damaged, or changed by hand"
        raise SnapshotUnreadable(f"{kind} {plain(name)}", told)
    return doc


def plain(name: object) -> str:
    """A text as a connection hands it out, for people."""
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


# ---- records --------------------------------------------------------------------------------------


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
