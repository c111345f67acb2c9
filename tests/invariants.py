"""What is true of every file a runtime has let go of, however it let go: nothing here trusts flowstead's own reads.

`check_all(path)` opens the closed file read-only with plain SQLite, so a log left behind by a killed process
stays there for the next owner, and raises an `AssertionError` that says what is wrong and where.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

FLOW_ENDS = {
    "flow.succeeded": "succeeded",
    "flow.failed": "failed",
    "flow.cancelled": "cancelled",
    "flow.lost": "lost",
}
MIRRORED = {
    "queued": "queued",
    "running": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "timed_out": "failed",
    "cancelled": "cancelled",
    "lost": "lost",
}
"""The status of a flow that follows a task, by the task's."""
TURNS = {
    "queued": {
        "task.started": "running",
        "task.retry_requested": "queued",
        "task.ended": "ended",
    },
    "running": {
        "task.started": "running",
        "task.released": "queued",
        "task.interrupted": "queued",
        "task.retry_scheduled": "queued",
        "task.review_requested": "in review",
        "task.cancel_requested": "asked",
        "task.ended": "ended",
    },
    "in review": {"task.retry_requested": "queued", "task.ended": "ended"},
    "asked": {"task.kill_requested": "killed", "task.ended": "ended"},
    "killed": {"task.kill_requested": "killed", "task.ended": "ended"},
    "ended": {},
}
"""How a launched child may go on from where it stands. It may show progress wherever it has not ended."""
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
    "cancelStartedAt",
    "failure",
    "endedAt",
    "controllerId",
    "goal",
    "parentTaskId",
    "retryOf",
    "rootId",
    "depth",
)
TOLD_OF_TASKS = (
    "status",
    "attempt",
    "nextAttemptAt",
    "reviewRequestedAt",
    "cancelRequestedAt",
    "killRequestedAt",
    "progressSummary",
    "terminalSummary",
    "terminalOutcome",
    "failure",
    "endedAt",
    "cleanupAfter",
)
USUAL = {"attempt": 0, "depth": 0}
RESERVED = frozenset({"deadlineAt", "onTimeout", "prompt", "remindAt", "schema", "wakeAt"})
TURNS_OF_A_WAIT = {
    *("task.created", "task.progressed", "task.reminded", "task.voted", "task.overdue"),
    "task.ended",
}
TURNS_OF_A_LETTER = {"task.created", "task.taken", "task.ended"}
CARRIED = ["task.created", "task.ended"]
_canonical = msgspec.json.Encoder(order="deterministic").encode


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
    carried_from: TaskRows | None = None
    """The child of an ended flow that this one repeats, where its flow goes on from that one."""

    @property
    def name(self) -> str:
        return f"task {self.row['task_id']}"

    @property
    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]

    @property
    def is_active(self) -> bool:
        return self.doc.get("endedAt") is None

    @property
    def wait(self) -> dict[str, Any] | None:
        return self.doc.get("wait")

    @property
    def letter(self) -> dict[str, Any] | None:
        return self.doc.get("letter")


@dataclass
class Row:
    """A row that is no part of a history: a signal, or an update."""

    what: str
    row: dict[str, Any]
    doc: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.what} {self.row['key']}"


@dataclass
class File:
    """The whole content of a file, decoded."""

    flows: dict[int, FlowRows]
    ownership: dict[str, Any]
    positions: list[int]
    crcs: list[tuple[str, int, int]]
    """Of each row: what it is, the checksum it has, and the one it should have."""
    signals: list[Row]
    updates: list[Row]

    @property
    def tasks(self) -> list[TaskRows]:
        return [task for flow in self.flows.values() for task in flow.tasks.values()]

    def find(self, flow: FlowRows, flow_id: str) -> FlowRows | None:
        """Another flow of the same owner."""
        wanted = (flow.row["owner_key"], flow_id)
        return self._by_id.get(wanted)

    def is_flow(self, owner_key: str, flow_id: str) -> bool:
        """Whether an owner has such a flow."""
        return (owner_key, flow_id) in self._by_id

    @cached_property
    def parents(self) -> dict[str, tuple[FlowRows, TaskRows]]:
        """Each child, with the flow above it, by its id."""
        return {
            task_id: (flow, task)
            for flow in self.flows.values()
            for task_id, task in flow.tasks.items()
        }

    @cached_property
    def _by_id(self) -> dict[tuple[str, str], FlowRows]:
        return {(f.row["owner_key"], f.row["flow_id"]): f for f in self.flows.values()}


def connect(path: Path | str) -> sqlite3.Connection:
    """A connection that reads a file nobody has open, its log included, and changes neither."""
    connection = sqlite3.connect(Path(path).absolute().as_uri() + "?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA query_only = ON")
    return connection


def dump(path: Path | str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row but the one that says who owns the file, for comparing."""
    with closing(connect(path)) as connection:
        return {
            table: [tuple(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1")]
            for table in ("flows", "tasks", "events", "signals", "updates")
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
        row["key"]: FlowRows(dict(row), msgspec.json.decode(row["doc"]))
        for row in connection.execute("SELECT * FROM flows ORDER BY key")
    }
    tasks: dict[str, TaskRows] = {}
    for row in connection.execute("SELECT * FROM tasks ORDER BY key"):
        task = tasks[row["task_id"]] = TaskRows(dict(row), msgspec.json.decode(row["doc"]))
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
        event = msgspec.json.decode(row["doc"])
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
    others: dict[str, list[Row]] = {}
    for what in ("signal", "update"):
        rows = connection.execute(f"SELECT * FROM {what}s ORDER BY key")
        others[what] = [Row(what, dict(row), msgspec.json.decode(row["doc"])) for row in rows]
        crcs += [(each.name, each.row["crc"], plain_crc_of(each.row)) for each in others[what]]
    [ownership] = connection.execute("SELECT * FROM ownership").fetchall()
    file = File(flows, dict(ownership), positions, crcs, others["signal"], others["update"])
    for flow in flows.values():
        _find_carried(file, flow)
    return file


def _find_carried(file: File, flow: FlowRows) -> None:
    """Tell the children that a retried flow was made with by what they repeat."""
    origin = file.find(flow, flow.doc.get("retryOf", ""))
    if origin is None:
        return
    succeeded = {_origin(t): t for t in origin.tasks.values() if t.doc["status"] == "succeeded"}
    for task in flow.tasks.values():
        task.carried_from = succeeded.get(_origin(task))


def _origin(task: TaskRows) -> tuple[Any, ...]:
    return tuple(task.doc.get(name) for name in ("runId", "task", "createdAt", "endedAt"))


def crc_of(row: dict[str, Any]) -> int:
    """The checksum of a row; the columns of a wait come last, and only where there is one."""
    others = {name: value for name, value in row.items() if name not in ("wait_key", "wait_token")}
    if (waited := (row.get("wait_key"), row.get("wait_token"))) != (None, None):
        others |= dict(zip(("wait_key", "wait_token"), waited, strict=True))
    return plain_crc_of(others)


def plain_crc_of(row: dict[str, Any]) -> int:
    """The CRC-32 of a row's columns in MessagePack and of its record after them."""
    columns = [value for name, value in row.items() if name not in ("doc", "crc")]
    return zlib.crc32(row["doc"].encode(), zlib.crc32(msgspec.msgpack.encode(columns)))


def wait_key_of(owner_key: str, fields: Any) -> str | None:
    """The digest under which a wait is found: of its owner and its plain fields."""
    if not isinstance(fields, dict):
        return None
    plain = {
        name: value
        for name, value in fields.items()
        if name not in RESERVED and isinstance(value, (str, int, float))
    }
    return hashlib.sha256(_canonical([owner_key, plain])).hexdigest() if plain else None


def token_digest_of(token: str | None) -> str | None:
    """What is stored of a token where it can be found by."""
    return None if token is None else hashlib.sha256(token.encode()).hexdigest()


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
        stored, said = flow.doc.get(name, USUAL.get(name)), told.get(name, USUAL.get(name))
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
        if _is_let_go(flow, event):
            continue
        assert event["type"] not in (
            "task.created",
            "task.started",
            "task.retry_scheduled",
            "task.retry_requested",
            "task.review_requested",
            "flow.waiting",
            "flow.parked",
            "flow.blocked",
            "flow.resumed",
        ), f"{flow.name}: {event['type']} at seq {event['seq']}, after the cancel intent"


def _is_let_go(flow: FlowRows, event: dict[str, Any]) -> bool:
    """Whether the flow goes on because the wait that its controller stood in was taken away by the intent."""
    if event["type"] != "flow.resumed":
        return False
    for before in reversed(flow.events[: event["seq"] - 1]):
        if before["type"] == "task.cancel_requested":
            continue  # of another child, which still runs
        if before["type"] != "task.ended":
            return False
        if flow.tasks[before["taskId"]].wait is not None:
            return True
    return False


def check_cancel_goes_by_rungs(flow: FlowRows) -> None:
    """First the intent, then the demand, which reaches all that lives; nobody stands in line any more."""
    doc = flow.doc
    asked, started = doc.get("cancelRequestedAt"), doc.get("cancelStartedAt")
    stamps = [e for e in flow.events if "cancelStartedAt" in e.get("changed", {})]
    assert len(stamps) <= 1, f"{flow.name}: its cancel was started {len(stamps)} times"
    assert (started is None) == (not stamps), f"{flow.name}: cancelStartedAt does not fit"
    if started is not None:
        assert asked is not None, f"{flow.name}: its cancel was started, but never requested"
        assert started >= asked, f"{flow.name}: its cancel was started before it was requested"
    final = doc.get("endedAt") is not None
    for task in flow.tasks.values():
        if task.doc.get("endedAt") is not None:
            continue
        stopped = task.doc.get("cancelRequestedAt") is not None
        if started is not None or (final and task.row["launched"]):
            assert stopped, f"{flow.name}: {task.name} lives on, and nobody has asked it to stop"
        if asked is not None and task.kinds[-1] != "task.released":
            assert task.doc["status"] == "running", (
                f"{flow.name}: {task.name} is {task.doc['status']} after the cancel intent"
            )


def check_review_blocks(flow: FlowRows) -> None:
    """A child that a person has to look at holds up its flow, and says so; it runs no code meanwhile."""
    waiting = []
    for task in flow.tasks.values():
        told = task.kinds
        turns = [kind for kind in told if kind != "task.progressed"]
        in_review = task.doc.get("reviewRequestedAt") is not None
        assert in_review == (turns[-1] == "task.review_requested"), (
            f"{task.name}: reviewRequestedAt does not fit; its history is {told}"
        )
        if in_review:
            waiting.append(task.row["task_id"])
            assert task.doc["status"] == "queued", f"{task.name} is in review and runs"
            assert task.doc.get("failure"), f"{task.name} is in review and did not fail"
    if not waiting:
        return
    doc = flow.doc
    assert doc["status"] == "blocked", (
        f"{flow.name} is {doc['status']}, and {waiting} need a person's eyes"
    )


def check_retry_carries_all(file: File, flow: FlowRows) -> None:
    """A flow that goes on from an ended one begins with all that had succeeded there, each once and as it was."""
    wanted = flow.doc.get("retryOf")
    if wanted is None:
        return
    origin = file.find(flow, wanted)
    assert origin is not None, f"{flow.name} goes on from {wanted}, which is not there"
    assert origin.doc["status"] in ("failed", "cancelled", "lost"), (
        f"{flow.name} goes on from {wanted}, which is {origin.doc['status']}"
    )
    first = flow.events[0]
    assert first["changed"].get("stateJson") == origin.doc.get("stateJson"), (
        f"{flow.name} does not begin with the state {wanted} ended with"
    )
    carried = [task for task in flow.tasks.values() if task.carried_from is not None]
    sources = Counter(t.carried_from.row["task_id"] for t in carried if t.carried_from is not None)
    assert not sources or max(sources.values()) == 1, f"{flow.name} carries a child twice"
    [end] = [event for event in origin.events if event["type"] in FLOW_ENDS]
    for task in origin.tasks.values():
        # Its own code has stopped before anything goes on from it; others may report for ever.
        settled = task.row["launched"] or task.events[-1]["seq"] < end["seq"]
        if task.doc["status"] == "succeeded" and settled:
            assert sources[task.row["task_id"]] == 1, f"{flow.name} lacks {task.name} of {wanted}"
    block = flow.events[1 : 1 + 2 * len(carried)]
    told = {event["seq"] for task in carried for event in task.events}
    assert {event["seq"] for event in block} == told, f"{flow.name}: carried children come first"
    for task in carried:
        assert task.kinds == ["task.created", "task.ended"], f"{task.name}: {task.kinds}"
        assert task.carried_from is not None
        for name in ("status", "inputJson", "resultJson", "label", "terminalSummary"):
            here, there = task.doc.get(name), task.carried_from.doc.get(name)
            assert here == there, f"{task.name}: {name} is {here!r}, and was {there!r}"


def check_nested(file: File, flow: FlowRows) -> None:
    """A nested flow has its child above it, which outlives it, and ends as it ended."""
    parent_id = flow.doc.get("parentTaskId")
    if parent_id is None:
        return
    assert parent_id in file.parents, f"{flow.name} stands under {parent_id}, which is not there"
    above, parent = file.parents[parent_id]
    assert above.row["owner_key"] == flow.row["owner_key"], f"{flow.name} stands under a stranger"
    assert parent.doc.get("childFlowId") == flow.row["flow_id"], (
        f"{flow.name}: the child above it stands for {parent.doc.get('childFlowId')}"
    )
    depth, root = above.doc.get("depth", 0) + 1, above.doc.get("rootId") or above.row["flow_id"]
    assert flow.doc.get("depth", 0) == depth, f"{flow.name}: depth is {flow.doc.get('depth')}"
    assert flow.doc.get("rootId") == root, f"{flow.name}: its root is {flow.doc.get('rootId')}"
    ended, status = flow.doc.get("endedAt") is not None, parent.doc["status"]
    if not ended:
        assert status == "running", f"{flow.name} lives, and the child above it is {status}"
        return
    if status not in ACTIVE:
        _check_nothing_lives_below(flow, parent)
    if status == "succeeded":
        assert flow.doc["status"] == "succeeded", (
            f"{flow.name} is {flow.doc['status']}, and the child above it succeeded"
        )
        assert parent.doc.get("resultJson") == flow.doc.get("stateJson"), (
            f"{flow.name}: the result above it is not its state"
        )


def _check_nothing_lives_below(flow: FlowRows, parent: TaskRows) -> None:
    """What ran in a nested flow had come to its end before the child that stands for the flow."""
    end = parent.events[-1]["position"]
    for task in flow.tasks.values():
        if task.row["launched"]:
            ended = task.doc.get("endedAt") is not None
            assert ended, f"{parent.name} has ended, and {task.name} lives on below it"
            assert task.events[-1]["position"] < end, (
                f"{task.name} ended after {parent.name} above it"
            )


def check_mirrored(flow: FlowRows) -> None:
    """A flow made with its task has that one, and goes as it goes."""
    if flow.doc["syncMode"] != "task_mirrored":
        return
    assert len(flow.tasks) == 1, f"{flow.name} follows one task, and has {len(flow.tasks)}"
    [task] = flow.tasks.values()
    allowed = {MIRRORED[task.doc["status"]]}
    if task.doc.get("reviewRequestedAt") is not None:
        allowed = {"blocked"}
    elif task.doc.get("terminalOutcome") == "blocked":
        allowed = {"blocked", "cancelled"}
    status = flow.doc["status"]
    assert status in allowed, f"{flow.name} is {status}, and its task {task.doc['status']}"


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
    if doc.get("endedAt") is not None or doc.get("cancelRequestedAt") is None:
        due_at = None if doc.get("endedAt") is not None else _flow_due(doc)
        assert row["due_at"] == due_at, f"{flow.name}: due_at is {row['due_at']}, not {due_at}"
        return
    assert row["due_at"] is not None, f"{flow.name}: due_at is None"
    stamp = doc.get("cancelStartedAt") or doc["cancelRequestedAt"]
    assert row["due_at"] >= stamp, f"{flow.name}: due before the intent"


def _flow_due(doc: dict[str, Any]) -> int | None:
    """When the flow's own wait needs a tick, or its controller has stood long enough."""
    own = doc.get("wait")
    instants = [doc.get("parkAt"), None if own is None else _wait_due(own)]
    return min((at for at in instants if at is not None), default=None)


def _wait_due(wait: dict[str, Any]) -> int | None:
    instants = [*wait.get("remindAt", [])[:1], wait.get("deadlineAt")]
    return min((at for at in instants if at is not None), default=None)


def check_stands(flow: FlowRows) -> None:
    """A flow that waits says for what: for itself, by its key and token, or in children that are open."""
    doc, status = flow.doc, flow.doc["status"]
    own, awaiting = doc.get("wait"), doc.get("awaiting", [])
    for column, name in (("wait_key", "waitKey"), ("wait_token", "waitToken")):
        assert flow.row[column] == doc.get(name), f"{flow.name}: column {column} does not fit"
    if own is not None:
        # One from before the tokens of a flow began alike has no beginning.
        digest = token_digest_of(own["token"].partition(".")[0])
        assert doc.get("waitToken") == digest, f"{flow.name}: the digest of its token does not fit"
        assert status in ("waiting", "blocked"), f"{flow.name} is {status}, and has a wait"
        assert not awaiting, f"{flow.name} stands in two waits"
        digest = wait_key_of(flow.row["owner_key"], doc.get("waitJson"))
        assert own.get("waitKey") == doc.get("waitKey") == digest, (
            f"{flow.name}: the digest of what it waits for does not fit"
        )
    if doc.get("parkAt") is not None:
        assert awaiting, f"{flow.name} is to be parked, and its controller stands nowhere"
    selecting = doc.get("selecting", [])
    assert all(group in awaiting for group in selecting), f"{flow.name} selects among nothing"
    if not awaiting:
        return
    assert status in ("waiting", "blocked"), f"{flow.name} is {status}, and its controller stands"
    assert doc.get("waitJson") is not None, f"{flow.name} does not say what it waits for"
    assert doc.get("controllerId") is not None, f"{flow.name} stands without a controller"
    for group in awaiting:
        named = [flow.tasks.get(task_id) for task_id in group]
        assert named and all(named), f"{flow.name} waits for {group}, not all of them its children"
        ended = [task.name for task in named if task is not None and not task.is_active]
        assert not ended, f"{flow.name} waits for {ended}, which have ended"
        waits = [task for task in named if task is not None and task.wait is not None]
        assert waits, f"{flow.name} waits for {group}, none of them a wait"


def check_nothing_is_open_at_the_end(flow: FlowRows) -> None:
    """No wait and no message outlives its flow, or the wish to cancel it."""
    doc = flow.doc
    if doc.get("endedAt") is None and doc.get("cancelRequestedAt") is None:
        return
    for task in flow.tasks.values():
        is_owned = task.wait is not None or task.letter is not None
        assert not (is_owned and task.is_active), f"{flow.name} is over, and {task.name} is open"


def check_each_answer_counts_once(flow: FlowRows) -> None:
    """No two events of a flow are the doing of one signal."""
    causes = Counter(event["cause"] for event in flow.events if event.get("cause") is not None)
    twice = [cause for cause, times in causes.items() if times > 1]
    assert not twice, f"{flow.name}: {twice} counted more than once"


def check_messages(flow: FlowRows) -> None:
    """Each message is taken by one wait of its inbox at most, and they are taken in the order they came in."""
    taken: dict[str, list[tuple[int, int]]] = defaultdict(list)
    seen: set[str] = set()
    for task in flow.tasks.values():
        if task.wait is None or task.doc["status"] != "succeeded" or task.carried_from is not None:
            continue
        if task.wait["kind"] != "message" or (named := task.doc["resultJson"]["id"]) is None:
            continue
        letter = flow.tasks.get(named)
        assert letter is not None, f"{task.name} took {named}, which is no message of its flow"
        assert letter.letter is not None, f"{task.name} took {letter.name}, which is no message"
        assert named not in seen, f"{letter.name} was taken twice"
        seen.add(named)
        inbox = task.wait["inbox"]
        assert letter.letter["inbox"] == inbox, f"{task.name} took {letter.name} of another inbox"
        assert letter.doc.get("inputJson") == task.doc["resultJson"].get("body"), (
            f"{task.name} took {letter.name}, and brought something else"
        )
        taken[inbox].append((task.events[-1]["seq"], letter.events[0]["seq"]))
    for inbox, pairs in taken.items():
        came = [created for _, created in sorted(pairs)]
        assert came == sorted(came), f"{flow.name}: {inbox} was taken out of order: {came}"


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


def check_goes_by_the_table(task: TaskRows) -> None:
    """A launched child is started, tried again, looked at and stopped in no other order than there is."""
    if not task.row["launched"]:
        return
    stands, interruptions = "queued", 0
    for event in task.events[1:]:
        kind = event["type"]
        if kind == "task.progressed" and stands != "ended":
            continue
        cut_off = stands == "running" and kind == "task.started"
        interruptions += cut_off or kind == "task.interrupted"
        after = TURNS[stands].get(kind)
        assert after is not None, f"{task.name} was {stands}, and then came {kind}: {task.kinds}"
        stands = after
    doc = task.doc
    assert doc.get("interruptions", 0) == interruptions, (
        f"{task.name}: interrupted {interruptions} times, stored is {doc.get('interruptions', 0)}"
    )
    asked, killed = doc.get("cancelRequestedAt"), doc.get("killRequestedAt")
    if killed is not None:
        assert asked is not None, f"{task.name} was to be killed, but never asked to stop"
        assert killed >= asked, f"{task.name} was to be killed before it was asked to stop"
    failure = doc.get("failure") or {}
    if (
        failure.get("kind") == "abandoned" and doc["status"] != "timed_out"
    ):  # at its deadline: in memory
        assert doc["status"] == "cancelled", f"{task.name} is abandoned and {doc['status']}"
        assert killed is not None, f"{task.name} was abandoned and never to be killed"


def check_wait(task: TaskRows) -> None:
    """A wait stands in line until it ends, a message until it is taken; neither runs, nor ends before its time."""
    wait, letter, doc = task.wait, task.letter, task.doc
    if wait is None and letter is None:
        return
    assert wait is None or letter is None, f"{task.name} is a wait and a message"
    assert not task.row["launched"], f"{task.name} is a wait or a message, and is launched"
    if task.kinds == CARRIED and task.carried_from is not None:
        return
    known = TURNS_OF_A_WAIT if wait is not None else TURNS_OF_A_LETTER
    odd = [kind for kind in task.kinds if kind not in known]
    assert not odd, f"{task.name} is a wait or a message, and had {odd}"
    if letter is not None:
        taken = task.kinds.count("task.taken")
        assert taken <= 1, f"{task.name} was taken {taken} times"
        running = doc["status"] == "running"
        assert running == (taken == 1 and task.is_active), f"{task.name} is {doc['status']}"
        return
    assert wait is not None
    assert doc["status"] != "running", f"{task.name} is a wait, and runs"
    deadline = wait.get("deadlineAt")
    if deadline is None or task.is_active:
        return
    by_the_clock = doc["status"] == "timed_out" or (
        wait["kind"] == "timer" and doc["status"] == "succeeded"
    )
    if by_the_clock:
        assert doc["endedAt"] >= deadline, f"{task.name} was over before its time"


def check_wait_columns(task: TaskRows, flow: FlowRows) -> None:
    """The columns a wait is found by say the same as its record, and as what it waits for."""
    wait = task.wait or {}
    assert task.row["wait_key"] == wait.get("waitKey"), f"{task.name}: wait_key does not fit"
    token = token_digest_of(wait.get("token"))
    assert task.row["wait_token"] == token, f"{task.name}: wait_token does not fit"
    digest = wait_key_of(flow.row["owner_key"], wait.get("key"))
    assert wait.get("waitKey") == digest, f"{task.name}: its digest does not fit what it waits for"


def check_done_once(task: TaskRows) -> None:
    """What must not be done twice is begun a second time only where a person wants it, or it had not begun."""
    launch = task.doc.get("launch", {})
    registered = launch.get("function") is not None or "spec" in launch
    if launch.get("onRestart") != "lost":
        return
    assert not task.doc.get("interruptions", 0), f"{task.name} was started again after a crash"
    if registered:
        assert "task.retry_scheduled" not in task.kinds, f"{task.name} was tried again by itself"


def check_deadlines(task: TaskRows) -> None:
    """A child that was never started in time was never started, nor given up before its time."""
    failure = task.doc.get("failure") or {}
    if task.doc["status"] != "timed_out" or failure.get("code") != "queue":
        return
    assert "task.started" not in task.kinds, f"{task.name} waited too long, but was started"
    waited = task.doc["endedAt"] - task.doc["createdAt"]
    assert waited >= task.doc["queueTimeout"] * 1000 - 1, f"{task.name} waited {waited} ms only"


def check_attempts(task: TaskRows) -> None:
    """The attempt in the row is the number of starts, less those taken back by a clean shutdown.

    Without a person's word there are no more than were granted; those that a crash cut off do not count.
    """
    kinds = Counter(event["type"] for event in task.events)
    attempt = task.doc.get("attempt", 0)
    if task.row["launched"]:
        spent = attempt - task.doc.get("interruptions", 0)
        granted = task.doc.get("maxAttempts", 1) + kinds["task.retry_requested"]
        assert spent <= granted, f"{task.name}: {spent} attempts, where {granted} were granted"
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
    names = ("status", "endedAt") if task.carried_from is not None else TOLD_OF_TASKS
    for name in names:
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
    ):
        assert row[column] == doc.get(name), (
            f"{task.name}: column {column} is {row[column]!r}, the record has {doc.get(name)!r}"
        )
    due_at, (earliest, latest) = row["due_at"], _due_between(task)
    assert (due_at is not None) == (earliest is not None), f"{task.name}: due_at is {due_at}"
    if due_at is not None:
        assert earliest <= due_at <= latest, f"{task.name}: due_at is {due_at}, not {earliest}"
    assert bool(row["launched"]) == ("launch" in doc), f"{task.name}: launched does not fit"
    assert doc["flowId"] == flow.row["flow_id"], f"{task.name} says it is of {doc['flowId']}"


def _due_between(task: TaskRows) -> tuple[Any, Any]:
    """Between which instants the child's next tick lies; how long rungs take is the runtime's secret."""
    doc, never = task.doc, (None, None)
    if doc["status"] not in ACTIVE or "reviewRequestedAt" in doc:
        return never
    if task.wait is not None:
        return _wait_due(task.wait), _wait_due(task.wait)
    if task.letter is not None and doc["status"] == "queued":
        return task.letter.get("expiresAt"), task.letter.get("expiresAt")
    if "launch" not in doc:
        return never
    if doc["status"] == "queued":
        if (at := doc.get("nextAttemptAt")) is not None:
            return at, at
        if doc.get("queueTimeout") is None or doc.get("startedAt") is not None:
            return never
        at = doc["createdAt"] + round(doc["queueTimeout"] * 1000)
        return at, at
    if doc.get("cancelRequestedAt") is None or doc.get("childFlowId") is not None:
        return never
    return doc.get("killRequestedAt") or doc["cancelRequestedAt"], 2**63


# ---- the file -------------------------------------------------------------------------------------


def check_positions(file: File) -> None:
    """Positions grow over the whole file, and the ownership row knows the last one."""
    positions = file.positions
    assert all(a < b for a, b in pairwise(positions)), "positions go back"
    last = file.ownership["last_position"]
    newest = positions[-1] if positions else 0
    assert last == newest, f"last_position is {last}, the newest event is at {newest}"


def check_ownership(file: File) -> None:
    """Somebody owned it; every commit left something, and no event came without a commit."""
    commits, events = file.ownership["commits"], len(file.positions)
    others = file.ownership["signals"] + file.ownership["updates"]
    assert file.ownership["epoch"] >= 1, "nobody ever owned the file"
    # An update is written once, and once more for each attempt to deliver it.
    assert others or commits <= events, f"{commits} commits left only {events} events"
    assert (commits > 0) == (events + others > 0), f"{commits} commits and {events} events"
    holder = json.loads(file.ownership["holder"])
    assert holder["pid"] > 0, f"the holder is {holder}"


def check_totals(file: File) -> None:
    """The ownership row knows how many rows there are, so that one that vanishes is missed."""
    counted = {
        "flows": len(file.flows),
        "tasks": len(file.tasks),
        "events": len(file.positions),
        "signals": len(file.signals),
        "updates": len(file.updates),
    }
    said = {name: file.ownership[name] for name in counted}
    assert said == counted, f"the totals are {said}, and there are {counted}"


def check_signals(file: File) -> None:
    """A signal waits or was taken, never both; no id counts twice; and what caused something is on record."""
    ids = Counter((s.row["owner_key"], s.row["signal_id"]) for s in file.signals)
    twice = [name for name, times in ids.items() if name[1] is not None and times > 1]
    assert not twice, f"several signals are called {twice}"
    for signal in file.signals:
        row, doc = signal.row, signal.doc
        for column, name in (
            ("key", "key"),
            ("owner_key", "ownerKey"),
            ("wait_key", "waitKey"),
            ("signal_id", "signalId"),
            ("expires_at", "expiresAt"),
        ):
            assert row[column] == doc.get(name), f"{signal.name}: column {column} does not fit"
        taken_by = doc.get("takenBy")
        kept = taken_by is None and doc.get("expiresAt") is not None
        assert bool(row["kept"]) == kept, (
            f"{signal.name}: kept is {row['kept']}, taken by {taken_by}"
        )
        if taken_by:
            owned = (row["owner_key"], taken_by)
            assert file.is_flow(*owned), f"{signal.name} went to {taken_by}, which is not there"
    for flow in file.flows.values():
        for event in flow.events:
            if (cause := event.get("cause")) is not None:
                assert (flow.row["owner_key"], cause) in ids, (
                    f"{flow.name}: {event['type']} is the doing of {cause!r}, which is not on record"
                )


def check_updates(file: File) -> None:
    """An owner hears of the end of a flow once, and by it; of a silent flow nothing; and pending has an instant."""
    slots = Counter((u.row["flow_key"], u.row["slot"]) for u in file.updates)
    assert not slots or max(slots.values()) == 1, "a slot of a flow is taken twice"
    keys = Counter(u.doc["idempotencyKey"] for u in file.updates)
    assert not keys or max(keys.values()) == 1, "two updates have the same idempotency key"
    for update in file.updates:
        row, doc = update.row, update.doc
        flow = file.flows.get(row["flow_key"])
        assert flow is not None, f"{update.name} is of no flow"
        for column, said in (
            ("owner_key", doc["ownerKey"]),
            ("flow_key", doc["flowKey"]),
            ("slot", doc["slot"]),
            ("status", doc.get("status", "pending")),
            ("due_at", doc.get("dueAt")),
            ("bucket", None if "items" in doc else doc.get("bucket")),
        ):
            assert row[column] == said, f"{update.name}: column {column} is {row[column]!r}"
        pending = row["status"] == "pending"
        assert pending == (row["due_at"] is not None), f"{update.name}: due_at does not fit"
        assert flow.doc["notifyPolicy"] != "silent", f"{update.name} tells of a silent {flow.name}"
        has_ended = flow.doc.get("endedAt") is not None
        if row["slot"] == "progress":
            assert not (pending and has_ended), f"{update.name} is out of date: {flow.name} ended"
        if row["slot"] == "done":
            said = (doc["flowStatus"], doc["revision"])
            assert has_ended, f"{update.name} tells of an end of {flow.name}"
            assert said == (flow.doc["status"], flow.doc["revision"]), (
                f"{update.name} says that {flow.name} is {said}"
            )


def check_everybody_is_told(file: File) -> None:
    """Where there always was a notifier, each end of a flow that is not silent has its update."""
    told = {u.row["flow_key"] for u in file.updates if u.row["slot"] == "done"}
    for key, flow in file.flows.items():
        if flow.doc.get("endedAt") is not None and flow.doc["notifyPolicy"] != "silent":
            assert key in told, f"{flow.name} has ended, and there is no update that says so"


def check_crcs(file: File) -> None:
    """Every row has the checksum of its record and its columns."""
    for what, stored, right in file.crcs:
        assert stored == right, f"{what}: its checksum is {stored}, and should be {right}"


def check_names(file: File) -> None:
    """Ids, idempotency keys and run ids name one thing each."""
    for column in ("flow_id", "idempotency_key"):
        ids = Counter(
            (f.row["owner_key"], f.row[column])
            for f in file.flows.values()
            if f.row[column] is not None
        )
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
    check_cancel_goes_by_rungs,
    check_review_blocks,
    check_mirrored,
    check_stands,
    check_nothing_is_open_at_the_end,
    check_each_answer_counts_once,
    check_messages,
    check_flow_columns,
    check_times_of_flow,
)
OF_A_TASK: tuple[Callable[[TaskRows], None], ...] = (
    check_child_ends_once,
    check_goes_by_the_table,
    check_wait,
    check_done_once,
    check_deadlines,
    check_attempts,
    check_history_tells_the_child,
)
OF_A_FILE: tuple[Callable[[File], None], ...] = (
    check_positions,
    check_ownership,
    check_names,
    check_signals,
    check_updates,
)
OF_FLOWS_TOGETHER: tuple[Callable[[File, FlowRows], None], ...] = (
    check_retry_carries_all,
    check_nested,
)
OF_EVERY_ROW: tuple[Callable[[File], None], ...] = (check_totals, check_crcs)


def check_all(path: Path | str, *, tells: bool = False) -> File:
    """Check a closed file against everything above and answer its content.

    Args:
        path: The file.
        tells: Whether every runtime that had it had a notifier.

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
            check_wait_columns(task, flow)
    for flow in file.flows.values():
        for check_together in OF_FLOWS_TOGETHER:
            check_together(file, flow)
    if tells:
        check_everybody_is_told(file)
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
