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
from typing import Any, Final, NamedTuple, TypeVar
from zlib import crc32

import msgspec
from msgspec import UNSET

from flowstead.errors import SnapshotUnreadable
from flowstead.model.event import Event
from flowstead.model.flow import Flow, StoredFlow
from flowstead.model.signal import StoredSignal
from flowstead.model.task import StoredTask, Task
from flowstead.model.update import StoredUpdate, Update, UpdateStatus
from flowstead.rules.wait_keys import token_digest_of

T = TypeVar("T")

encode = msgspec.json.Encoder().encode
_flow = msgspec.json.Decoder(Flow)
_stored_flow = msgspec.json.Decoder(StoredFlow)
_task = msgspec.json.Decoder(Task)
_stored_task = msgspec.json.Decoder(StoredTask)
_event = msgspec.json.Decoder(Event)
_signal = msgspec.json.Decoder(StoredSignal)
_update = msgspec.json.Decoder(Update)
_stored_update = msgspec.json.Decoder(StoredUpdate)
_any = msgspec.json.Decoder()
_NAMES: Final = {
    "flow": "flowId",
    "task": "taskId",
    "event": "flowId",
    "signal": "key",
    "update": "key",
}
_pack = msgspec.msgpack.Encoder().encode


class FlowRow(NamedTuple):
    """One flow, in column order. `expected_revision` is None for a new flow, `wait_token` is a digest."""

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
    wait_key: str | None = None
    wait_token: str | None = None


class TaskRow(NamedTuple):
    """One child, in column order. `fresh` tells an insert from an update, `wait_token` is a digest."""

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
    wait_key: str | None = None
    wait_token: str | None = None


class EventRow(NamedTuple):
    """One line of history; the store gives it its position."""

    flow_key: int
    seq: int
    doc: str


class SignalRow(NamedTuple):
    """One signal, in column order. `kept` says that it waits for somebody to take it."""

    key: int
    owner_key: str
    wait_key: str
    signal_id: str | None
    kept: bool
    expires_at: int | None
    doc: str
    fresh: bool


class UpdateRow(NamedTuple):
    """One update, in column order. The store may give it another key and version than its record has.

    `bucket` says that it waits to go out together with others.
    """

    key: int
    owner_key: str
    flow_key: int
    slot: str
    status: str
    due_at: int | None
    version: int
    bucket: str | None
    doc: str
    fresh: bool


class FlowWrite(msgspec.Struct, frozen=True, gc=False):
    """Everything one flow's turn writes. A batch is a list of these, committed whole or not at all.

    Signals and updates have no place in the history; a write may consist of them alone.
    """

    flow: FlowRow | None
    tasks: Sequence[TaskRow]
    events: Sequence[EventRow]
    signals: Sequence[SignalRow] = ()
    updates: Sequence[UpdateRow] = ()


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
        flow.wait_key,
        flow.wait_token,
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
        None if task.wait is None else task.wait.wait_key,
        token_digest_of(task.wait),
    )


def event_row(flow_key: int, event: Event) -> EventRow:
    """The row of an event that has no position yet."""
    return EventRow(flow_key, event.seq, encode(event).decode())


def signal_row(signal: StoredSignal, *, fresh: bool) -> SignalRow:
    """The row of a signal; it is kept if nobody took it and it has an end."""
    return SignalRow(
        signal.key,
        signal.owner_key,
        signal.wait_key,
        signal.signal_id,
        signal.taken_by is None and signal.expires_at is not None,
        signal.expires_at,
        encode(signal).decode(),
        fresh,
    )


def update_row(update: StoredUpdate, *, fresh: bool) -> UpdateRow:
    """The row of an update."""
    return UpdateRow(
        update.key,
        update.owner_key,
        update.flow_key,
        update.slot,
        update.status,
        update.due_at,
        update.version,
        # A digest names the bucket it came of, and goes out alone.
        update.bucket if update.items is UNSET else None,
        encode(update).decode(),
        fresh,
    )


def replacing(row: UpdateRow, key: int, version: int) -> UpdateRow:
    """The row in the place of an older one, whose key it takes; whoever read that one finds it moved on."""
    return row._replace(key=key, version=max(row.version, version + 1))


def superseded(update: StoredUpdate) -> UpdateRow:
    """The row of an update that is not to go out any more; an attempt under way changes nothing about it."""
    final = msgspec.structs.replace(
        update, status=UpdateStatus.SUPERSEDED, due_at=None, version=update.version + 1
    )
    return update_row(final, fresh=False)


# ---- checksums ------------------------------------------------------------------------------------


def crc_of(columns: Sequence[object], doc: bytes) -> int:
    """The checksum of a record and the columns beside it.

    MessagePack says where each column ends and of what type it is, so no two rows read alike.
    """
    return crc32(doc, crc32(_pack(columns)))


def flow_crc(row: FlowRow) -> int:
    """The checksum of a flow's row, `expected_revision` left out."""
    columns: tuple[object, ...] = row[:10]
    return crc_of(columns + row[12:] if has_wait(row) else columns, row.doc.encode())


def task_crc(row: TaskRow) -> int:
    """The checksum of a child's row, `fresh` left out."""
    columns: tuple[object, ...] = (*row[:6], int(row.launched), row.due_at)
    return crc_of(columns + row[10:] if has_wait(row) else columns, row.doc.encode())


def has_wait(row: FlowRow | TaskRow) -> bool:
    """Whether the last columns of a row say anything. Where they do not, the checksum is of the others alone: rows
    from before there were waits keep theirs."""
    return row.wait_key is not None or row.wait_token is not None


def event_crc(row: EventRow) -> int:
    """The checksum of a line of history; its position is mixed in where it is given, see `at_position`."""
    return crc_of(row[:2], row.doc.encode())


def signal_crc(row: SignalRow) -> int:
    """The checksum of a signal's row, `fresh` left out."""
    return crc_of((*row[:4], int(row.kept), row.expires_at), row.doc.encode())


def update_crc(row: UpdateRow) -> int:
    """The checksum of an update's row, `fresh` left out."""
    return crc_of(row[:8], row.doc.encode())


def at_position(crc: int, position: int) -> int:
    """The checksum of an event once it has a position; the same both ways."""
    return crc ^ position


def flow_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored flow, given all its columns in order, once its checksum fits."""
    *columns, wait_key, wait_token, doc, crc = row
    if wait_key is not None or wait_token is not None:
        columns += wait_key, wait_token
    return _vouched("flow", columns[2], columns, doc, crc)


def task_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored child, given all its columns in order, once its checksum fits."""
    *columns, wait_key, wait_token, doc, crc = row
    if wait_key is not None or wait_token is not None:
        columns += wait_key, wait_token
    return _vouched("task", columns[1], columns, doc, crc)


def event_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored event, given all its columns in order, once its checksum fits."""
    position, flow_key, seq, doc, crc = row
    crc = at_position(crc, position) if isinstance(crc, int) else crc
    return _vouched("event", position, (flow_key, seq), doc, crc)


def signal_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored signal, given all its columns in order, once its checksum fits."""
    *columns, doc, crc = row
    return _vouched("signal", columns[0], columns, doc, crc)


def update_doc(row: Sequence[Any]) -> bytes:
    """The document of a stored update, given all its columns in order, once its checksum fits."""
    *columns, doc, crc = row
    return _vouched("update", columns[0], columns, doc, crc)


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


def read_signal(doc: bytes) -> StoredSignal:
    """A signal to keep."""
    return _read(_signal, doc, "signal")


def read_update(doc: bytes, number: int = 0) -> Update:
    """An update to hand out, with its place in a list if it is listed."""
    return msgspec.structs.replace(_read(_update, doc, "update"), number=number)


def read_stored_update(doc: bytes) -> StoredUpdate:
    """An update to keep, as its writer knew it; see `at_row`."""
    return _read(_stored_update, doc, "update")


def at_row(update: StoredUpdate, key: int, version: int) -> StoredUpdate:
    """An update as the store keeps it: in the place of another one it has that one's key, and a later version."""
    return msgspec.structs.replace(update, key=key, version=version)


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
        return f"{kind} {found[_NAMES[kind]]}"
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, KeyError, RecursionError):
        return f"a {kind}"
