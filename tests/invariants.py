"""What is true of every file a runtime has let go of, however it let go: nothing here trusts flowstead's own reads.

`check_all(path)` opens the closed file read-only with plain SQLite, so a log left behind by a killed process
stays there for the next owner, and raises an `AssertionError` that says what is wrong and where.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

FLOW_ENDS = {
    "flow.succeeded": "succeeded",
    "flow.failed": "failed",
    "flow.cancelled": "cancelled",
}
LIVE = frozenset({"queued", "running", "waiting", "blocked"})
ACTIVE = frozenset({"queued", "running"})
TOLD_OF_FLOWS = (
    "status",
    "currentStep",
    "stateJson",
    "waitJson",
    "blockedTaskId",
    "blockedSummary",
    "cancelRequestedAt",
    "failure",
    "endedAt",
    "controllerId",
    "goal",
)
TOLD_OF_TASKS = (
    "status",
    "attempt",
    "nextAttemptAt",
    "cancelRequestedAt",
    "progressSummary",
    "terminalSummary",
    "terminalOutcome",
    "failure",
    "endedAt",
    "cleanupAfter",
)
USUAL = {"attempt": 0}


@dataclass
class FlowRows:
    """One flow with all that belongs to it."""

    row: dict[str, Any]
    doc: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, TaskRows] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"flow {self.row['flow_id']}"


@dataclass
class TaskRows:
    """One child with the events that are about it."""

    row: dict[str, Any]
    doc: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"task {self.row['task_id']}"


@dataclass
class File:
    """The whole content of a file, decoded."""

    flows: dict[int, FlowRows]
    ownership: dict[str, Any]
    positions: list[int]
    crcs: list[tuple[str, int, int]]
    """Of each row: what it is, the checksum it has, and the one it should have."""

    @property
    def tasks(self) -> list[TaskRows]:
        return [task for flow in self.flows.values() for task in flow.tasks.values()]


def connect(path: Path | str) -> sqlite3.Connection:
    """A connection that reads a file nobody has open, its log included, and changes neither."""
    connection = sqlite3.connect(Path(path).absolute().as_uri() + "?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA query_only = ON")
    return connection


def dump(path: Path | str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of flows, tasks and events, for comparing."""
    with closing(connect(path)) as connection:
        return {
            table: [tuple(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1")]
            for table in ("flows", "tasks", "events")
        }


def read(path: Path | str) -> File:
    """The content of a closed file.

    Raises:
        AssertionError: SQLite finds the file damaged, or a row belongs to nothing.
    """
    with closing(connect(path)) as connection:
        return _read(connection)


def _read(connection: sqlite3.Connection) -> File:
    found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
    assert found == ["ok"], f"the file is damaged: {found}"
    flows = {
        row["key"]: FlowRows(dict(row), json.loads(row["doc"]))
        for row in connection.execute("SELECT * FROM flows ORDER BY key")
    }
    tasks: dict[str, TaskRows] = {}
    for row in connection.execute("SELECT * FROM tasks ORDER BY key"):
        task = tasks[row["task_id"]] = TaskRows(dict(row), json.loads(row["doc"]))
        assert row["flow_key"] in flows, f"{task.name} belongs to no flow"
        flows[row["flow_key"]].tasks[row["task_id"]] = task
    positions = []
    crcs = []
    for flow in flows.values():
        crcs.append((flow.name, flow.row["crc"], crc_of(flow.row)))
    for task in tasks.values():
        crcs.append((task.name, task.row["crc"], crc_of(task.row)))
    for row in connection.execute("SELECT * FROM events ORDER BY position"):
        where = f"event at position {row['position']}"
        assert row["flow_key"] in flows, f"{where} belongs to no flow"
        event = json.loads(row["doc"])
        assert event["seq"] == row["seq"], f"{where}: seq {event['seq']} beside {row['seq']}"
        event["position"] = row["position"]
        positions.append(row["position"])
        of_event = {name: row[name] for name in ("flow_key", "seq", "doc", "crc")}
        crcs.append((where, row["crc"], crc_of(of_event) ^ row["position"]))
        flow = flows[row["flow_key"]]
        flow.events.append(event)
        if task_id := event.get("taskId"):
            assert task_id in flow.tasks, f"{where} is about {task_id}, no child of {flow.name}"
            flow.tasks[task_id].events.append(event)
    [ownership] = connection.execute("SELECT * FROM ownership").fetchall()
    return File(flows, dict(ownership), positions, crcs)


def crc_of(row: dict[str, Any]) -> int:
    """The CRC-32 of a row's columns in MessagePack and of its record after them."""
    columns = [value for name, value in row.items() if name not in ("doc", "crc")]
    return zlib.crc32(row["doc"].encode(), zlib.crc32(msgspec.msgpack.encode(columns)))


# ---- a flow ---------------------------------------------------------------------------------------


def check_history_has_no_gap(flow: FlowRows) -> None:
    """seq counts from 1, in the order of positions, and all events are of this flow."""
    seqs = [event["seq"] for event in flow.events]
    assert seqs == list(range(1, len(seqs) + 1)), f"{flow.name}: seqs are {seqs}"
    assert flow.events, f"{flow.name} has no history"
    strangers = {event["flowId"] for event in flow.events} - {flow.row["flow_id"]}
    assert not strangers, f"{flow.name}: its history tells of {strangers}"


def check_revisions(flow: FlowRows) -> None:
    """0 at creation, one more with each event of the flow, the same with each of a child; none skipped."""
    first, *others = flow.events
    assert first["type"] == "flow.created", f"{flow.name} begins with {first['type']}"
    assert first["revision"] == 0, f"{flow.name} begins at revision {first['revision']}"
    revision = 0
    for event in others:
        assert event["type"] != "flow.created", f"{flow.name} is created again: {event}"
        revision += event["type"].startswith("flow.")
        assert event["revision"] == revision, (
            f"{flow.name}: {event['type']} at seq {event['seq']} is at revision"
            f" {event['revision']}, not {revision}"
        )
    stored = flow.doc["revision"]
    assert stored == revision, f"{flow.name}: stored revision {stored}, history says {revision}"


def check_history_tells_the_flow(flow: FlowRows) -> None:
    """What the events say changed, taken together, is the stored record."""
    told = replay(flow.events, of="flow.")
    for name in TOLD_OF_FLOWS:
        stored, said = flow.doc.get(name), told.get(name)
        assert stored == said, f"{flow.name}: {name} is stored as {stored!r}, told as {said!r}"


def check_end_is_final(flow: FlowRows) -> None:
    """Ended exactly if an event says so, with that status, and nothing of the flow or new work after it."""
    ends = [event for event in flow.events if event["type"] in FLOW_ENDS]
    assert len(ends) <= 1, f"{flow.name} ended {len(ends)} times"
    status, ended_at = flow.doc["status"], flow.doc.get("endedAt")
    if not ends:
        assert status in LIVE, f"{flow.name} is {status}, but no event says that it ended"
        assert ended_at is None, f"{flow.name} is {status}, but ended at {ended_at}"
        return
    [end] = ends
    assert status == FLOW_ENDS[end["type"]], f"{flow.name} is {status} after {end['type']}"
    assert ended_at is not None, f"{flow.name} is {status} without an end"
    for event in flow.events[end["seq"] :]:
        kind, where = event["type"], f"seq {event['seq']}, after the end at seq {end['seq']}"
        assert not kind.startswith("flow."), f"{flow.name}: {kind} at {where}"
        assert kind != "task.created", f"{flow.name}: {kind} at {where}"
        if kind == "task.started":
            launched = flow.tasks[event["taskId"]].row["launched"]
            assert not launched, f"{flow.name}: {kind} of {event['taskId']} at {where}"


def check_cancel_intent_is_kept(flow: FlowRows) -> None:
    """An intent once stamped stays as it was, and nothing starts after it."""
    stamps = [event for event in flow.events if event["type"] == "flow.cancel_requested"]
    assert len(stamps) <= 1, f"{flow.name}: the intent was stamped {len(stamps)} times"
    stored = flow.doc.get("cancelRequestedAt")
    if not stamps:
        assert stored is None, f"{flow.name} has a cancel intent that no event tells of"
        return
    [stamp] = stamps
    assert stored == stamp["changed"]["cancelRequestedAt"], f"{flow.name}: intent is now {stored}"
    for event in flow.events[stamp["seq"] :]:
        assert event["type"] not in (
            "task.created",
            "task.started",
            "task.retry_scheduled",
            "flow.waiting",
            "flow.blocked",
            "flow.resumed",
        ), f"{flow.name}: {event['type']} at seq {event['seq']}, after the cancel intent"


def check_flow_columns(flow: FlowRows) -> None:
    """The columns a flow is found by say the same as its record."""
    row, doc = flow.row, flow.doc
    for column, name in (
        ("key", "key"),
        ("owner_key", "ownerKey"),
        ("flow_id", "flowId"),
        ("controller_id", "controllerId"),
        ("correlation_id", "correlationId"),
        ("idempotency_key", "idempotencyKey"),
        ("status", "status"),
        ("ended_at", "endedAt"),
        ("revision", "revision"),
    ):
        assert row[column] == doc.get(name), (
            f"{flow.name}: column {column} is {row[column]!r}, the record has {doc.get(name)!r}"
        )
    awaited = doc.get("endedAt") is None and doc.get("cancelRequestedAt") is not None
    assert (row["due_at"] is not None) == awaited, f"{flow.name}: due_at is {row['due_at']}"
    if awaited:
        assert row["due_at"] >= doc["cancelRequestedAt"], f"{flow.name}: due before the intent"


def check_times_of_flow(flow: FlowRows) -> None:
    """A flow is not changed before it is created, nor ended before."""
    doc = flow.doc
    assert doc["updatedAt"] >= doc["createdAt"], f"{flow.name} was updated before it was created"
    if doc.get("endedAt") is not None:
        assert doc["endedAt"] >= doc["createdAt"], f"{flow.name} ended before it was created"


# ---- a child --------------------------------------------------------------------------------------


def check_child_ends_once(task: TaskRows) -> None:
    """One creation, at most one end, nothing after it, and a final status exactly if there is one."""
    kinds = [event["type"] for event in task.events]
    assert kinds.count("task.created") == 1, f"{task.name}: history is {kinds}"
    assert kinds[0] == "task.created", f"{task.name}: history is {kinds}"
    ends = kinds.count("task.ended")
    assert ends <= 1, f"{task.name} ended {ends} times"
    status = task.doc["status"]
    assert (status in ACTIVE) == (ends == 0), f"{task.name} is {status} with {ends} ends"
    assert (task.doc.get("endedAt") is None) == (ends == 0), f"{task.name}: endedAt does not fit"
    if ends:
        assert kinds[-1] == "task.ended", f"{task.name}: after its end came {kinds[-1]}"


def check_attempts(task: TaskRows) -> None:
    """The attempt in the row is the number of starts, less those taken back by a clean shutdown."""
    kinds = Counter(event["type"] for event in task.events)
    attempt = task.doc.get("attempt", 0)
    if task.row["launched"]:
        counted = kinds["task.started"] - kinds["task.released"]
        assert attempt == counted, f"{task.name}: attempt {attempt}, but started {counted} times"
        if task.doc["status"] == "running":
            assert attempt >= 1, f"{task.name} is running and was never started"
    else:
        assert attempt == 0, f"{task.name} is linked and has attempt {attempt}"
        assert kinds["task.started"] <= 1, f"{task.name} is linked and started more than once"


def check_history_tells_the_child(task: TaskRows) -> None:
    """What the events say changed, taken together, is the stored record."""
    told = replay(task.events, of="task.")
    for name in TOLD_OF_TASKS:
        stored, said = task.doc.get(name, USUAL.get(name)), told.get(name, USUAL.get(name))
        assert stored == said, f"{task.name}: {name} is stored as {stored!r}, told as {said!r}"


def check_task_columns(task: TaskRows, flow: FlowRows) -> None:
    """The columns a child is found by say the same as its record."""
    row, doc = task.row, task.doc
    for column, name in (
        ("key", "key"),
        ("task_id", "taskId"),
        ("flow_key", "flowKey"),
        ("run_id", "runId"),
        ("status", "status"),
        ("runtime", "runtime"),
        ("due_at", "nextAttemptAt"),
    ):
        assert row[column] == doc.get(name), (
            f"{task.name}: column {column} is {row[column]!r}, the record has {doc.get(name)!r}"
        )
    assert bool(row["launched"]) == ("launch" in doc), f"{task.name}: launched does not fit"
    assert doc["flowId"] == flow.row["flow_id"], f"{task.name} says it is of {doc['flowId']}"


# ---- the file -------------------------------------------------------------------------------------


def check_positions(file: File) -> None:
    """Positions grow over the whole file, and the ownership row knows the last one."""
    positions = file.positions
    assert all(a < b for a, b in pairwise(positions)), "positions go back"
    last = file.ownership["last_position"]
    newest = positions[-1] if positions else 0
    assert last == newest, f"last_position is {last}, the newest event is at {newest}"


def check_ownership(file: File) -> None:
    """Somebody owned it; every commit left at least one event, and no event came without a commit."""
    commits, events = file.ownership["commits"], len(file.positions)
    assert file.ownership["epoch"] >= 1, "nobody ever owned the file"
    assert commits <= events, f"{commits} commits left only {events} events"
    assert (commits > 0) == (events > 0), f"{commits} commits and {events} events"
    holder = json.loads(file.ownership["holder"])
    assert holder["pid"] > 0, f"the holder is {holder}"


def check_totals(file: File) -> None:
    """The ownership row knows how many rows there are, so that one that vanishes is missed."""
    counted = {"flows": len(file.flows), "tasks": len(file.tasks), "events": len(file.positions)}
    said = {name: file.ownership[name] for name in counted}
    assert said == counted, f"the totals are {said}, and there are {counted}"


def check_crcs(file: File) -> None:
    """Every row has the checksum of its record and its columns."""
    for what, stored, right in file.crcs:
        assert stored == right, f"{what}: its checksum is {stored}, and should be {right}"


def check_names(file: File) -> None:
    """Ids, idempotency keys and run ids name one thing each."""
    ids = Counter((f.row["owner_key"], f.row["flow_id"]) for f in file.flows.values())
    twice = [name for name, count in ids.items() if count > 1]
    assert not twice, f"several flows are called {twice}"
    for flow in file.flows.values():
        runs = Counter(t.row["run_id"] for t in flow.tasks.values() if t.row["run_id"] is not None)
        twice_run = [name for name, count in runs.items() if count > 1]
        assert not twice_run, f"{flow.name}: several children have the run ids {twice_run}"


def check_privacy(path: Path | str) -> None:
    """The file and what lies beside it are its user's alone."""
    base = Path(path)
    for beside in base.parent.glob(base.name + "*"):
        mode = os.stat(beside).st_mode & 0o777
        assert mode == 0o600, f"{beside.name} has mode {mode:o}"


OF_A_FLOW: tuple[Callable[[FlowRows], None], ...] = (
    check_history_has_no_gap,
    check_revisions,
    check_history_tells_the_flow,
    check_end_is_final,
    check_cancel_intent_is_kept,
    check_flow_columns,
    check_times_of_flow,
)
OF_A_TASK: tuple[Callable[[TaskRows], None], ...] = (
    check_child_ends_once,
    check_attempts,
    check_history_tells_the_child,
)
OF_A_FILE: tuple[Callable[[File], None], ...] = (check_positions, check_ownership, check_names)
OF_EVERY_ROW: tuple[Callable[[File], None], ...] = (check_totals, check_crcs)


def check_all(path: Path | str) -> File:
    """Check a closed file against everything above and answer its content.

    Raises:
        AssertionError: Something is not as it must be; the message says what, and of which row.
    """
    check_privacy(path)
    file = read(path)
    for check_file in OF_A_FILE:
        check_file(file)
    for flow in file.flows.values():
        for check_flow in OF_A_FLOW:
            check_flow(flow)
        for task in flow.tasks.values():
            for check_task in OF_A_TASK:
                check_task(task)
            check_task_columns(task, flow)
    # Last, because whatever else is wrong is said more plainly above.
    for check_rows in OF_EVERY_ROW:
        check_rows(file)
    return file


def replay(events: list[dict[str, Any]], *, of: str) -> dict[str, Any]:
    """The fields as the events leave them; only events whose type begins with `of` count."""
    told: dict[str, Any] = defaultdict(lambda: None)
    for event in events:
        if event["type"].startswith(of):
            told.update(event.get("changed", {}))
    return dict(told)
