"""The checks of a file can fail: each kind of damage is found, and said to be where it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import invariants
from tests.crash.harness import Child, Zygote, until

pytestmark = pytest.mark.crash

FLOW = "(SELECT key FROM flows WHERE flow_id = '{}')"
DAMAGE = {
    "an event is missing": (
        f"DELETE FROM events WHERE seq = 2 AND flow_key = {FLOW.format('queued')}",
        "flow queued: seqs are",
    ),
    "the last event is missing": (
        f"DELETE FROM events WHERE flow_key = {FLOW.format('waiting')} AND seq ="
        f" (SELECT max(seq) FROM events WHERE flow_key = {FLOW.format('waiting')})",
        "flow waiting: stored revision 1, history says 0",
    ),
    "a revision is skipped": (
        "UPDATE flows SET revision = revision + 1,"
        " doc = json_set(doc, '$.revision', revision + 1) WHERE flow_id = 'running'",
        "flow running: stored revision 1, history says 0",
    ),
    "a column differs": (
        "UPDATE flows SET status = 'queued' WHERE flow_id = 'waiting'",
        "flow waiting: column status is 'queued'",
    ),
    "the state is another": (
        "UPDATE flows SET doc = json_set(doc, '$.stateJson', json('{}')) WHERE flow_id = 'done'",
        "flow done: stateJson is stored as {}",
    ),
    "the intent is forgotten": (
        "UPDATE flows SET doc = json_remove(doc, '$.cancelRequestedAt'), due_at = NULL"
        " WHERE flow_id = 'asked'",
        "flow asked: cancelRequestedAt is stored as None",
    ),
    "the end is taken back": (
        "UPDATE flows SET status = 'queued', ended_at = NULL,"
        " doc = json_remove(json_set(doc, '$.status', 'queued'), '$.endedAt')"
        " WHERE flow_id = 'done'",
        "flow done: status is stored as 'queued'",
    ),
    "something happens after the end": (
        "INSERT INTO events SELECT (SELECT max(position) + 1 FROM events), flow_key, seq + 1,"
        " json_set(doc, '$.seq', seq + 1, '$.type', 'flow.updated', '$.changed', json('{}'),"
        " '$.revision', json_extract(doc, '$.revision') + 1), NULL FROM events"
        f" WHERE flow_key = {FLOW.format('failed')} ORDER BY seq DESC LIMIT 1;"
        "UPDATE ownership SET last_position = last_position + 1;"
        "UPDATE flows SET revision = 2, doc = json_set(doc, '$.revision', 2)"
        " WHERE flow_id = 'failed'",
        "flow failed: flow.updated at seq",
    ),
    "a child starts after the intent": (
        "INSERT INTO events SELECT (SELECT max(position) + 1 FROM events), e.flow_key,"
        " (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key),"
        " json_set(e.doc, '$.type', 'task.started', '$.changed', json('{}'), '$.revision', 1,"
        " '$.seq', (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key)), NULL"
        f" FROM events AS e WHERE e.flow_key = {FLOW.format('asked')}"
        " AND json_extract(e.doc, '$.type') = 'task.created'"
        " ORDER BY seq LIMIT 1 OFFSET 1;"
        "UPDATE ownership SET last_position = last_position + 1",
        "flow asked: task.started at seq",
    ),
    "a child ends twice": (
        "INSERT INTO events SELECT (SELECT max(position) + 1 FROM events), e.flow_key,"
        " (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key),"
        " json_set(e.doc, '$.seq', (SELECT max(seq) + 1 FROM events WHERE flow_key = e.flow_key)),"
        " NULL"
        f" FROM events AS e WHERE e.flow_key = {FLOW.format('queued')}"
        " AND json_extract(e.doc, '$.type') = 'task.ended' LIMIT 1;"
        "UPDATE ownership SET last_position = last_position + 1",
        "ended 2 times",
    ),
    "a child's end is taken back": (
        "UPDATE tasks SET status = 'running',"
        " doc = json_remove(json_set(doc, '$.status', 'running'), '$.endedAt')"
        f" WHERE run_id = 'ended' AND flow_key = {FLOW.format('queued')}",
        "is running with 1 ends",
    ),
    "an attempt is not counted": (
        "UPDATE tasks SET doc = json_set(doc, '$.attempt', 2) WHERE run_id = 'never'",
        "attempt 2, but started 1 times",
    ),
    "a child is of no flow": (
        "UPDATE tasks SET flow_key = 999999 WHERE run_id = 'never'",
        "belongs to no flow",
    ),
    "a position is forgotten": (
        "UPDATE ownership SET last_position = last_position - 1",
        "the newest event is at",
    ),
    "a digit flipped where no event tells": (
        "UPDATE flows SET doc = json_set(doc, '$.updatedAt', json_extract(doc, '$.updatedAt') + 1)"
        " WHERE flow_id = 'done'",
        "flow done: its checksum is",
    ),
    "a count is off": (
        "UPDATE ownership SET tasks = tasks + 1",
        "the totals are",
    ),
    "commits are made up": (
        "UPDATE ownership SET commits = 1000000",
        "1000000 commits left only",
    ),
}

RUN = "(SELECT task_id FROM tasks WHERE run_id = '{}')"
EVENT = "json_extract(doc, '$.type') = '{}' AND json_extract(doc, '$.taskId') = {}"
DAMAGE_UNDER_WAY = {
    "nobody was asked to stop": (
        "UPDATE tasks SET doc = json_remove(doc, '$.cancelRequestedAt') WHERE run_id = 'deaf-0'",
        "lives on, and nobody has asked it to stop",
    ),
    "a rung is taken too early": (
        "UPDATE tasks SET doc = json_set(doc, '$.killRequestedAt', 1) WHERE run_id = 'deaf-0'",
        "was to be killed before it was asked to stop",
    ),
    "a rung is skipped": (
        "UPDATE events SET doc = json_set(doc, '$.type', 'task.progressed')"
        f" WHERE {EVENT.format('task.cancel_requested', RUN.format('deaf-0'))}",
        "was running, and then came task.kill_requested",
    ),
    "a cancel is started before it is requested": (
        "UPDATE flows SET doc = json_set(doc, '$.cancelStartedAt', 1) WHERE flow_id = 'top'",
        "flow top: cancelStartedAt is stored as 1",
    ),
    "a tick is due at another time": (
        "UPDATE tasks SET due_at = due_at + 1 WHERE run_id = 'unlucky-1'",
        "due_at is",
    ),
    "a tick is forgotten": (
        "UPDATE tasks SET due_at = NULL WHERE run_id = 'deaf-0'",
        "due_at is None",
    ),
    "what must not be done twice was tried again": (
        "UPDATE tasks SET doc = json_set(doc, '$.launch.onRestart', 'lost')"
        " WHERE run_id = 'unlucky-1'",
        "was tried again by itself",
    ),
    "there were more attempts than granted": (
        "UPDATE tasks SET doc = json_set(doc, '$.maxAttempts', 0) WHERE run_id = 'unlucky-1'",
        "1 attempts, where 0 were granted",
    ),
    "an interruption is made up": (
        "UPDATE tasks SET doc = json_set(doc, '$.interruptions', 1) WHERE run_id = 'unlucky-1'",
        "interrupted 0 times, stored is 1",
    ),
    "a review is forgotten": (
        "UPDATE tasks SET doc = json_remove(doc, '$.reviewRequestedAt') WHERE run_id = 'picky-2'",
        "reviewRequestedAt does not fit",
    ),
    "a review holds up nobody": (
        "UPDATE events SET doc = json_set(doc, '$.changed.status', 'waiting')"
        " WHERE json_extract(doc, '$.type') = 'flow.blocked';"
        "UPDATE flows SET status = 'waiting', doc = json_set(doc, '$.status', 'waiting')"
        " WHERE status = 'blocked'",
        "need a person's eyes",
    ),
    "a nested flow lives on under nothing": (
        "UPDATE events SET doc = json_set(doc, '$.type', 'task.ended', '$.changed',"
        """ json('{"status": "cancelled", "endedAt": 1}'))"""
        f" WHERE {EVENT.format('task.started', RUN.format('nested-3'))};"
        "UPDATE tasks SET status = 'cancelled', doc = json_remove("
        "json_set(doc, '$.status', 'cancelled', '$.endedAt', 1), '$.attempt')"
        " WHERE run_id = 'nested-3'",
        "lives, and the child above it is cancelled",
    ),
    "a nested flow stands under another child": (
        "UPDATE tasks SET doc = json_set(doc, '$.childFlowId', 'top') WHERE run_id = 'nested-3'",
        "the child above it stands for top",
    ),
    "a nested flow is deeper than it is": (
        "UPDATE events SET doc = json_set(doc, '$.changed.depth', 7)"
        " WHERE json_extract(doc, '$.changed.depth') = 2;"
        "UPDATE flows SET doc = json_set(doc, '$.depth', 7) WHERE json_extract(doc, '$.depth') = 2",
        "depth is 7",
    ),
}
RETRIED = "(SELECT key FROM flows WHERE json_extract(doc, '$.retryOf') = 'top')"
ALONE = "(SELECT key FROM flows WHERE json_extract(doc, '$.syncMode') = 'task_mirrored')"
DAMAGE_DONE = {
    "a child is not carried over": (
        f"UPDATE tasks SET doc = json_set(doc, '$.task', 'other') WHERE flow_key = {RETRIED}",
        "lacks task",
    ),
    "a child is carried over with another result": (
        f"UPDATE tasks SET doc = json_set(doc, '$.resultJson', 7) WHERE flow_key = {RETRIED}",
        "resultJson is 7, and was 1",
    ),
    "a flow goes on from one that is not there": (
        "UPDATE flows SET flow_id = 'bottom', doc = json_set(doc, '$.flowId', 'bottom')"
        " WHERE flow_id = 'top';"
        "UPDATE events SET doc = json_set(doc, '$.flowId', 'bottom')"
        " WHERE json_extract(doc, '$.flowId') = 'top';"
        "UPDATE tasks SET doc = json_set(doc, '$.flowId', 'bottom')"
        " WHERE json_extract(doc, '$.flowId') = 'top'",
        "goes on from top, which is not there",
    ),
    "a flow does not follow its task": (
        "UPDATE events SET doc = json_set(doc, '$.type', 'flow.failed', '$.changed.status', 'failed')"
        f" WHERE flow_key = {ALONE} AND json_extract(doc, '$.type') = 'flow.succeeded';"
        "UPDATE flows SET status = 'failed', doc = json_set(doc, '$.status', 'failed')"
        f" WHERE key = {ALONE}",
        "is failed, and its task succeeded",
    ),
}
TAKEN = "run_id = 'ask' AND flow_key = " + FLOW.format("done")
DAMAGE_TO_WAITS = {
    "a wait is found by another key": (
        "UPDATE tasks SET wait_key = '0' WHERE run_id = 'first'",
        "wait_key does not fit",
    ),
    "a wait is for something else than its key": (
        "UPDATE tasks SET doc = json_set(doc, '$.wait.key', json('{\"topic\": 8}'))"
        " WHERE run_id = 'first'",
        "its digest does not fit",
    ),
    "a wait has another token": (
        "UPDATE tasks SET doc = json_set(doc, '$.wait.token', 'mine') WHERE run_id = 'first'",
        "wait_token does not fit",
    ),
    "the own wait of a flow is for something else": (
        "UPDATE events SET doc = json_set(doc, '$.changed.waitJson.topic', 8)"
        " WHERE json_extract(doc, '$.changed.waitJson.topic') = 7;"
        "UPDATE flows SET doc = json_set(doc, '$.waitJson.topic', 8) WHERE flow_id = 'own'",
        "the digest of what it waits for does not fit",
    ),
    "the own wait of a flow has another token": (
        "UPDATE flows SET doc = json_set(doc, '$.wait.token', 'mine') WHERE flow_id = 'own'",
        "the digest of its token does not fit",
    ),
    "a deadline is forgotten": (
        "UPDATE flows SET due_at = NULL WHERE flow_id = 'own'",
        "due_at is None",
    ),
    "a flow waits for a stranger": (
        "UPDATE flows SET doc = json_set(json_remove(doc, '$.selecting'), '$.awaiting',"
        " json('[[\"nobody\"]]')) WHERE flow_id = 'top'",
        "not all of them its children",
    ),
    "a flow selects among what it does not wait for": (
        "UPDATE flows SET doc = json_set(doc, '$.selecting', json('[[\"nobody\"]]'))"
        " WHERE flow_id = 'top'",
        "selects among nothing",
    ),
    "a flow waits for what has ended": (
        "UPDATE tasks SET doc = json_set(doc, '$.endedAt', 1) WHERE run_id = 'first'",
        "which have ended",
    ),
    "a controller is to be parked that stands nowhere": (
        "UPDATE flows SET due_at = 1, doc = json_remove(json_set(doc, '$.parkAt', 1), '$.awaiting')"
        " WHERE flow_id = 'top'",
        "its controller stands nowhere",
    ),
    "a wait outlives its flow": (
        f"UPDATE tasks SET doc = json_remove(doc, '$.endedAt') WHERE {TAKEN}",
        "flow done is over, and",
    ),
    "a timer goes off before its time": (
        "UPDATE tasks SET doc = json_set(doc, '$.wait.kind', 'timer', '$.wait.deadlineAt',"
        f" json_extract(doc, '$.endedAt') + 1) WHERE {TAKEN}",
        "was over before its time",
    ),
    "a message is another one when it is taken": (
        f"UPDATE tasks SET doc = json_set(doc, '$.resultJson.body', 'other') WHERE {TAKEN}",
        "and brought something else",
    ),
    "a message of nobody is taken": (
        f"UPDATE tasks SET doc = json_set(doc, '$.resultJson.id', 'nobody') WHERE {TAKEN}",
        "which is no message of its flow",
    ),
    "an answer counts twice": (
        "UPDATE events SET doc = json_set(doc, '$.cause', 'early')"
        f" WHERE flow_key = {FLOW.format('done')} AND seq > 2",
        "['early'] counted more than once",
    ),
    "what caused something is not on record": (
        "UPDATE events SET doc = json_set(doc, '$.cause', 'nobody')"
        f" WHERE flow_key = {FLOW.format('done')} AND seq = 2",
        "is the doing of 'nobody', which is not on record",
    ),
    "a signal is kept and was taken": (
        "UPDATE signals SET doc = json_set(doc, '$.takenBy', 'top') WHERE signal_id = 'early'",
        "kept is 1, taken by top",
    ),
    "a signal went to a stranger": (
        "UPDATE signals SET kept = 0, doc = json_set(doc, '$.takenBy', 'nobody')"
        " WHERE signal_id = 'early'",
        "went to nobody, which is not there",
    ),
    "the payload of a signal is another": (
        "UPDATE signals SET doc = json_set(doc, '$.payload', 8) WHERE signal_id = 'early'",
        "its checksum is",
    ),
    "a signal is missing": (
        "DELETE FROM signals WHERE signal_id = 'early'",
        "the totals are",
    ),
    "an end is not told": (
        "DELETE FROM updates WHERE slot = 'done'",
        "flow done has ended, and there is no update that says so",
    ),
    "the end of a silent flow is told": (
        "UPDATE flows SET doc = json_set(doc, '$.notifyPolicy', 'silent') WHERE flow_id = 'done'",
        "tells of a silent flow done",
    ),
    "an end is told otherwise than it was": (
        "UPDATE updates SET doc = json_set(doc, '$.flowStatus', 'failed') WHERE slot = 'done'",
        "says that flow done is ('failed'",
    ),
    "an end is told before it has come": (
        f"UPDATE updates SET flow_key = {FLOW.format('top')},"
        f" doc = json_set(doc, '$.flowKey', {FLOW.format('top')}) WHERE slot = 'done'",
        "tells of an end of flow top",
    ),
    "an update is to go out at no time": (
        "UPDATE updates SET status = 'pending', doc = json_set(doc, '$.status', 'pending')"
        " WHERE slot = 'done'",
        "due_at does not fit",
    ),
    "an update is of nobody": (
        "UPDATE updates SET flow_key = 999999 WHERE slot = 'done'",
        "is of no flow",
    ),
}


@pytest.fixture
def furnished(db: Path, tmp_path: Path) -> Iterator[Path]:
    with Zygote() as zygote:
        go = tmp_path / "go"
        child = zygote.fork("furnish", tmp_path / "journal", path=str(db), go=str(go))
        go.touch()
        assert child.wait() == 0, child.facts()
        yield db


@pytest.fixture
def under_way(db: Path, tmp_path: Path) -> Iterator[Path]:
    """A file with a stop on its second rung, a retry and a review that wait, and flows on three floors."""
    with Zygote() as zygote:
        sorts = ["deaf", "unlucky", "picky", "nested"]
        child = zygote.fork(
            "climb",
            tmp_path / "journal",
            path=str(db),
            folder=str(tmp_path),
            sorts=sorts,
            limits={"kill_after": 0.01},
        )
        child.says("ready")
        (tmp_path / "cancel").touch()
        for what in ("task.kill_requested", "task.retry_scheduled", "flow.blocked"):
            until(lambda what=what: what in told(child, "event"), what)
        until(lambda: "leaf" in told(child, "ran"), "the leaf to run")
        child.kill()
        with closing(sqlite3.connect(db)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        yield db


@pytest.fixture
def done(db: Path, tmp_path: Path) -> Iterator[Path]:
    """A file with a flow that goes on from another, and one that follows its task."""
    with Zygote() as zygote:
        child = zygote.fork("retry", tmp_path / "journal", path=str(db), folder=str(tmp_path))
        assert child.wait() == 0, child.facts()
        yield db


@pytest.fixture
def waiting(db: Path, tmp_path: Path) -> Iterator[Path]:
    """A file with a flow that is parked, one that waits for itself, one that took a message, and a kept signal."""
    calls: list[dict[str, Any]] = [
        {"do": "create", "given": {"how": "selects"}},
        {"do": "signal", "given": {"topic": 9, "id": "early"}, "on": "flow.parked"},
        {"do": "create", "given": {"controller": "nobody"}, "flow": "own"},
        {"do": "wait", "given": {"topic": 7, "deadlineAt": 3_600_000}, "flow": "own"},
        {"do": "create", "given": {"how": "receives"}, "flow": "done"},
        {"do": "tell", "given": {"message": "hello", "id": "msg"}, "flow": "done"},
    ]
    with Zygote() as zygote:
        journal = tmp_path / "journal"
        child = zygote.fork(
            "stand",
            journal,
            path=str(db),
            folder=str(tmp_path),
            calls=calls,
            park_seconds=0.01,
        )
        until(lambda: "flow.succeeded" in told(child, "event"), "an end")
        child.kill()
        last = zygote.fork(
            "stand", journal, path=str(db), folder=str(tmp_path), calls=[], until="rest"
        )
        assert last.wait() == 0, last.facts()
        yield db


def told(child: Child, key: str) -> list[str]:
    return [fact[key] for fact in child.facts() if key in fact]


def test_each_damage_is_found(furnished: Path) -> None:
    check_found(furnished, DAMAGE)


def test_each_damage_to_what_is_under_way_is_found(under_way: Path) -> None:
    check_found(under_way, DAMAGE_UNDER_WAY)


def test_each_damage_to_what_goes_on_from_or_follows_another_is_found(done: Path) -> None:
    check_found(done, DAMAGE_DONE)


def test_each_damage_to_what_waits_or_is_to_be_told_is_found(waiting: Path) -> None:
    check_found(waiting, DAMAGE_TO_WAITS, tells=True)


def check_found(path: Path, damage: dict[str, tuple[str, str]], *, tells: bool = False) -> None:
    """Do each damage to a whole file, one after another; each must be found for what it is."""
    invariants.check_all(path, tells=tells)
    whole = path.read_bytes()

    for name, (statements, complaint) in damage.items():
        with closing(sqlite3.connect(path)) as connection:
            before = connection.total_changes
            connection.executescript(statements)
            assert connection.total_changes > before, f"{name}: nothing was damaged"
        with pytest.raises(AssertionError) as found:
            invariants.check_all(path, tells=tells)
        assert complaint in str(found.value), (name, str(found.value))
        path.write_bytes(whole)

    invariants.check_all(path, tells=tells)


def test_a_file_others_may_read_is_found(furnished: Path) -> None:
    furnished.chmod(0o644)

    with pytest.raises(AssertionError, match="mode 644"):
        invariants.check_all(furnished)
