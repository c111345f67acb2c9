"""Records to rows and back, and files of every released version."""

from __future__ import annotations

import pickle
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from msgspec import UNSET, Raw

from flowstead.errors import SnapshotUnreadable
from flowstead.model.approval import Approval, Grant
from flowstead.model.flow import Failure, Flow, FlowKey, FlowStatus, StoredFlow
from flowstead.model.retry import Category, Retry
from flowstead.model.signal import StoredSignal
from flowstead.model.task import Launch, OnRestart, StoredTask, Task, TaskStatus
from flowstead.model.update import StoredUpdate
from flowstead.model.wait import Letter, OnTimeout, Wait, WaitKind
from flowstead.rules.wait_keys import token_digest, wait_key
from flowstead.store import codec, schema
from flowstead.store.port import FlowQuery, Scope, Snapshot, WaitLookup
from flowstead.store.sqlite import SqliteStore
from tests.store.rows import HOSTILE, NOW, event_of, flow_of, signal_of, task_of, update_of

SNAPSHOTS = Path(__file__).parents[1] / "snapshots"
MAIN = Scope("agent:main:main")


def full_flow() -> StoredFlow:
    """A flow with every field set."""
    return flow_of(
        7,
        status=FlowStatus.FAILED,
        requester_origin=Raw(b'{"channel":"slack"}'),
        controller_id="k",
        correlation_id="c",
        current_step="s",
        state_json=Raw(b"[1]"),
        wait_json=Raw(b"null"),
        blocked_task_id="t",
        blocked_summary="why",
        cancel_requested_at=NOW,
        cancel_started_at=NOW,
        parent_task_id="p",
        retry_of="f",
        failure=Failure(kind="exception", code="ValueError", message="no", category=Category.AUTH),
        idempotency_key="once",
        request_digest="d",
        depth=2,
        root_id="r",
        answer_json=Raw(b'{"at":1}'),
        wait=Wait(kind=WaitKind.SIGNAL, wait_key="w", token="secret"),
        wait_key="w",
        wait_token=token_digest("secret"),
        awaiting=(("t", "u"), ("v",)),
        park_at=NOW,
        content_revision=1,
        grants={"ask": Grant(items_digest="i", revision=1, expires_at=NOW, used_by="send")},
    )


def full_task() -> StoredTask:
    """A child with every field set."""
    launch = Launch(
        executor="command",
        spec=Raw(b'{"argv":["ls"]}'),
        external=True,
        holds_slot=False,
        depth=3,
        root_id="r",
        function="f",
        on_restart=OnRestart.LOST,
        retry=Retry(max_attempts=2, retry_on=(ConnectionError, "auth")),
        group="g",
        limit=3,
    )
    return msgspec.structs.replace(
        task_of(8, full_flow(), "task", status=TaskStatus.FAILED),
        run_id="r",
        child_session_key="s",
        label="l",
        input_json=Raw(b"{}"),
        attempt=2,
        max_attempts=3,
        next_attempt_at=NOW,
        timeout=1.5,
        idle_timeout=2.5,
        queue_timeout=3.5,
        child_flow_id="c",
        review_requested_at=NOW,
        cancel_requested_at=NOW,
        kill_requested_at=NOW,
        result_json=Raw(b"null"),
        failure=Failure(kind="timed_out"),
        progress_summary="p",
        terminal_summary="t",
        started_at=NOW,
        last_event_at=NOW,
        cleanup_after=NOW,
        launch=launch,
        interruptions=1,
        wait=Wait(
            kind=WaitKind.APPROVAL,
            key=Raw(b'{"n":1}'),
            wait_key="w",
            token="secret",
            inbox="i",
            prompt="p",
            schema=Raw(b"{}"),
            deadline_at=NOW,
            on_timeout=OnTimeout.BLOCK,
            remind_at=(NOW,),
            approval=Approval(items=Raw(b"[1]"), frame="f", digest="d", requested_by="r"),
        ),
        letter=Letter(inbox="i", wants_reply=True, expires_at=NOW, taken_by="t"),
    )


def full_signal() -> StoredSignal:
    """A signal with every field set."""
    return signal_of(9, wait_key="w", signal_id="id", payload=Raw(b"[1]"), taken_by="flow")


def full_update() -> StoredUpdate:
    """An update with every field set."""
    return update_of(
        10,
        full_flow(),
        "done",
        current_step="s",
        data=Raw(b"[1]"),
        items=Raw(b"[]"),
        bucket="daily",
        requester_origin=Raw(b"{}"),
        attempt=2,
        delivered_at=NOW,
        failure="why",
        version=3,
    )


def test_a_flow_comes_back_from_its_record() -> None:
    flow = full_flow()

    doc = codec.encode(flow)

    assert codec.encode(codec.read_stored_flow(doc)) == doc
    assert {name for name in flow.__struct_fields__ if getattr(flow, name) is None} == set()


def test_a_child_comes_back_from_its_record() -> None:
    task = full_task()

    doc = codec.encode(task)

    assert codec.encode(codec.read_stored_task(doc)) == doc


def test_a_signal_and_an_update_come_back_from_their_records() -> None:
    signal, update = full_signal(), full_update()

    assert codec.read_signal(codec.encode(signal)) == signal
    assert codec.read_stored_update(codec.encode(update)) == update
    for record in (signal, update):
        unset = {n for n in record.__struct_fields__ if getattr(record, n) in (None, msgspec.UNSET)}
        assert unset == set()


def test_the_columns_say_what_the_record_says() -> None:
    flow, task = full_flow(), full_task()

    row = codec.flow_row(flow, codec.encode(flow), due_at=5, expected_revision=0)
    child = codec.task_row(task, due_at=task.next_attempt_at, fresh=True)
    line = codec.event_row(7, codec.read_event(event_of(flow, 3).doc.encode(), 0))

    assert row[:10] == (7, "alice", "flow", "k", "c", "once", "failed", NOW, 5, 1)
    assert row[11:] == (0, "w", token_digest("secret"))
    assert child[:8] == (8, "task", 7, "r", "failed", "subagent", True, NOW)
    assert child[9:] == (True, "w", token_digest("secret"))
    assert (line.flow_key, line.seq) == (7, 3)


def test_the_columns_of_signals_and_updates_say_what_the_record_says() -> None:
    signal = codec.signal_row(full_signal(), fresh=True)
    update = codec.update_row(full_update(), fresh=False)

    assert signal[:6] == (9, "alice", "w", "id", False, NOW + 1000)
    assert update[:7] == (10, "alice", 7, "done", "pending", NOW, 3)
    assert (signal.fresh, update.fresh) == (True, False)


def test_what_is_put_by_waits_in_its_bucket_and_the_digest_that_is_made_of_it_does_not() -> None:
    digest, item = full_update(), msgspec.structs.replace(full_update(), items=UNSET)

    rows = [codec.update_row(update, fresh=True) for update in (digest, item)]

    assert (digest.bucket, item.bucket) == ("daily", "daily")
    assert [row.bucket for row in rows] == [None, "daily"]


@pytest.mark.parametrize(
    ("taken_by", "expires_at", "kept"),
    [(None, NOW, True), ("flow", NOW, False), (None, None, False), ("", NOW, False)],
)
def test_a_signal_is_kept_that_nobody_took_and_that_has_an_end(
    taken_by: str | None, expires_at: int | None, kept: bool
) -> None:
    signal = signal_of(1, wait_key="w", taken_by=taken_by, expires_at=expires_at)

    assert codec.signal_row(signal, fresh=True).kept is kept


def test_a_row_without_a_wait_has_the_checksum_it_always_had() -> None:
    flow, task = flow_of(7), task_of(8, flow_of(7), "task")
    row = codec.flow_row(flow, codec.encode(flow), due_at=5, expected_revision=0)
    child = codec.task_row(task, due_at=6, fresh=True)

    assert codec.flow_crc(row) == codec.crc_of(row[:10], row.doc.encode())
    assert codec.task_crc(child) == codec.crc_of(
        (8, "task", 7, None, "queued", "subagent", 0, 6), child.doc.encode()
    )


@pytest.mark.parametrize("column", ["wait_key", "wait_token"])
def test_the_columns_of_a_wait_are_part_of_the_checksum(column: str) -> None:
    flow, task = flow_of(7), task_of(8, flow_of(7), "task")
    row = codec.flow_row(flow, codec.encode(flow), due_at=5, expected_revision=0)
    child = codec.task_row(task, due_at=6, fresh=True)

    rows = [row, row._replace(**{column: "a"}), row._replace(**{column: "b"})]
    children = [child, child._replace(**{column: "a"}), child._replace(**{column: "b"})]

    both = row._replace(wait_key="a", wait_token=None), row._replace(wait_key=None, wait_token="a")
    assert len({codec.flow_crc(one) for one in rows}) == 3
    assert len({codec.task_crc(one) for one in children}) == 3
    assert len({codec.flow_crc(one) for one in both}) == 2


def test_the_token_of_a_wait_is_no_column() -> None:
    flow, task = full_flow(), full_task()
    row = codec.flow_row(flow, codec.encode(flow), due_at=5, expected_revision=0)
    child = codec.task_row(task, due_at=None, fresh=True)

    for columns in (row._replace(doc=""), child._replace(doc="")):
        assert "secret" not in columns


def test_what_is_handed_out_has_nothing_of_the_bookkeeping() -> None:
    flow, task = codec.expose_flow(full_flow()), codec.expose_task(full_task())

    assert type(flow) is Flow
    assert type(task) is Task
    assert (flow.state_json, flow.requester_origin) == ([1], {"channel": "slack"})
    assert (task.input_json, task.result_json) == ({}, None)


def test_json_null_and_nothing_stay_apart_in_what_is_kept() -> None:
    null = codec.read_stored_flow(codec.encode(flow_of(1, state_json=Raw(b"null"))))
    nothing = codec.read_stored_flow(codec.encode(flow_of(1)))

    assert bytes(null.state_json) == b"null"  # type: ignore[arg-type]
    assert nothing.state_json is msgspec.UNSET
    assert codec.decode_json(null.state_json) is None
    assert codec.decode_json(nothing.state_json) is None


def test_fields_of_a_later_version_are_tolerated() -> None:
    later = b',"invented":{"later":[1]},"anotherOne":null}'
    flow = codec.encode(full_flow())[:-1] + later
    task = codec.encode(full_task())[:-1] + later
    event = event_of(full_flow(), 1).doc.encode()[:-1] + later

    assert codec.read_stored_flow(flow).flow_id == "flow"
    assert codec.read_flow(flow).flow_id == "flow"
    assert codec.read_stored_task(task).task_id == "task"
    assert codec.read_task(task).task_id == "task"
    assert codec.read_event(event, 9).position == 9
    assert codec.read_signal(codec.encode(full_signal())[:-1] + later).signal_id == "id"
    assert codec.read_stored_update(codec.encode(full_update())[:-1] + later).slot == "done"
    assert codec.read_update(codec.encode(full_update())[:-1] + later).goal == "a goal"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_any_text_survives_its_record(text: str) -> None:
    flow = flow_of(1, text, owner_key=text, goal=text, state_json=Raw(codec.encode({text: text})))

    again = codec.read_flow(codec.encode(flow))

    assert (again.flow_id, again.owner_key, again.goal) == (text, text, text)
    assert again.state_json == {text: text}


def test_user_json_is_kept_byte_for_byte() -> None:
    state = b'{ "spaced" : [ 1.0 , 1e2 , 12345678901234567890123 ] , "\\u00e9" : "\\/" }'

    kept = codec.read_stored_flow(codec.encode(flow_of(1, state_json=Raw(state))))

    assert bytes(kept.state_json) == state  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "doc", [b"", b"{", b"null", b"[]", b"1", b'"flow"', b"{}", b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_no_record_is_refused_by_name(doc: bytes) -> None:
    readers = [
        codec.read_flow,
        codec.read_stored_flow,
        codec.read_task,
        codec.read_stored_task,
        lambda doc: codec.read_event(doc, 0),
        codec.read_signal,
        codec.read_update,
        codec.read_stored_update,
    ]
    for read in readers:
        with pytest.raises(SnapshotUnreadable) as refused:
            read(doc)
        assert "The row was left as it is." in str(refused.value)


def test_a_refused_record_is_named_where_its_name_can_be_read() -> None:
    flow = codec.encode(full_flow()).replace(b'"failed"', b'"hibernating"')
    task = codec.encode(full_task()).replace(b'"failed"', b'"hibernating"')
    signal = codec.encode(full_signal()).replace(b'"ownerKey"', b'"owner"')
    update = codec.encode(full_update()).replace(b'"notice"', b'"rumour"')

    with pytest.raises(SnapshotUnreadable, match="flow flow cannot be read"):
        codec.read_flow(flow)
    with pytest.raises(SnapshotUnreadable, match="task task cannot be read"):
        codec.read_task(task)
    with pytest.raises(SnapshotUnreadable, match="signal 9 cannot be read"):
        codec.read_signal(signal)
    with pytest.raises(SnapshotUnreadable, match="update 10 cannot be read"):
        codec.read_update(update)


def test_a_refusal_survives_pickling() -> None:
    with pytest.raises(SnapshotUnreadable) as refused:
        codec.read_flow(b"{")

    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


# ---- released versions ------------------------------------------------------------------------------


def file_of(snapshot: Path, db: Path) -> None:
    with closing(sqlite3.connect(db)) as connection:
        connection.executescript(snapshot.read_text())


def test_there_is_a_file_of_every_version() -> None:
    there = {path.name for path in SNAPSHOTS.glob("v*.sql")}

    assert there == {f"v{version}.sql" for version in range(1, schema.VERSION + 1)}


@pytest.mark.parametrize("snapshot", sorted(SNAPSHOTS.glob("v*.sql")), ids=lambda path: path.stem)
async def test_every_record_of_a_released_version_reads(snapshot: Path, db: Path) -> None:
    file_of(snapshot, db)
    store = SqliteStore(db)

    await store.open()

    assert await store.list_unreadable() == []
    assert len(await store.list_flows(MAIN, FlowQuery(), 10)) == 2
    await store.aclose()


@pytest.mark.parametrize("snapshot", sorted(SNAPSHOTS.glob("v*.sql")), ids=lambda path: path.stem)
async def test_a_released_version_is_brought_to_the_schema_of_today(
    snapshot: Path, db: Path, tmp_path: Path
) -> None:
    def shape(path: Path) -> list[tuple[str, str]]:
        with closing(sqlite3.connect(path)) as connection:
            return sorted(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql != ''"))

    file_of(snapshot, db)
    fresh = tmp_path / "fresh.db"
    for path in (db, fresh):
        store = SqliteStore(path)
        await store.open()
        await store.aclose()

    assert shape(db) == shape(fresh)


async def test_a_file_of_version_1_tells_all_it_knows(db: Path) -> None:
    file_of(SNAPSHOTS / "v1.sql", db)
    store = SqliteStore(db)
    await store.open()

    [found] = await store.load([FlowKey("agent:main:main", "triage-1")])
    digest = await store.find_flow(MAIN, "digest-1")
    children = await store.list_tasks(MAIN, "triage-1")
    lines = await store.history(MAIN, "triage-1", after_seq=0, limit=100)

    assert isinstance(found, Snapshot)
    assert (found.flow.status, found.flow.revision, found.last_seq) == ("waiting", 1, 7)
    assert codec.decode_json(found.flow.state_json) == {
        "businessThreads": [1, 2.5, None],
        "eodSummary": 'it\'s "done" 👩🏽‍🚀',
    }
    assert codec.decode_json(found.flow.wait_json)["threadKey"] == "slack:thread-1"
    assert found.flow.idempotency_key == "once"
    assert [task.run_id for task in found.active] == ["inbox-classify-1"]
    assert sorted(run for run, _ in found.run_ids) == ["inbox-classify-1", "step-1"]
    assert [(t.status, t.runtime, t.attempt) for t in children] == [
        ("running", "acp", 0),
        ("succeeded", "task", 1),
    ]
    assert children[1].result_json == {"label": "Re: hello", "é": None}
    assert digest is not None
    assert (digest.status, digest.state_json, digest.ended_at) == (
        "succeeded",
        {"sent": 4},
        1_800_000_003_000,
    )
    assert [line.seq for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert lines[-1].type == "flow.waiting"
    assert await store.last_position() == 10
    assert store.next_key() == 5
    await store.aclose()


async def test_a_file_of_version_3_tells_all_it_knows(db: Path) -> None:
    file_of(SNAPSHOTS / "v3.sql", db)
    owner, triage = MAIN.owner_key, FlowKey("agent:main:main", "triage-1")
    assert owner is not None
    at = 1_800_000_010_000
    keys = [
        wait_key(owner, {"kind": "reply", "channel": "slack", "threadKey": "slack:thread-1"}),
        wait_key(owner, {"ticket": 7}),
        wait_key(owner, {"ticket": 8}),
    ]
    store = SqliteStore(db)
    await store.open()

    reply, open_, kept = await store.look_up_waits(
        [WaitLookup(owner, key, f"evt-{n}", at) for n, key in enumerate(keys, 1)]
    )
    waits = await store.list_open_waits(MAIN, flow_id=None, after_key=0, limit=10)
    shown = await store.list_updates(MAIN, flow_id=None, statuses=(), after_key=0, limit=10)
    [alone] = await store.list_updates_due(until=at + 60_000, limit=10)
    [digest] = await store.list_digests_due(until=at + 86_400_000, limit=10)

    assert reply.waiting == open_.waiting == [triage]
    assert (reply.is_known, open_.is_known, kept.is_known) == (True, True, False)
    assert kept.kept is not None and kept.kept.signal_id == "evt-1"
    assert codec.decode_json(kept.kept.payload) == {"team": "billing"}
    assert (kept.waiting, kept.was_awaited) == ([], False)
    assert await store.find_token(token_digest("tok_flow")) == (triage, None)
    found = await store.find_token(token_digest("tok_open"))
    assert found is not None and found[0] == triage
    assert [type(wait) for wait in waits] == [StoredFlow, StoredTask]
    assert [(update.kind, update.status, update.attempt) for update in shown] == [
        ("progress", "superseded", 0),
        ("done", "delivered", 2),
        ("reminder", "pending", 0),
        ("progress", "pending", 0),
    ]
    assert (alone.slot, digest.slot, digest.bucket) == ("reminder:1", "progress", "daily")
    assert store.next_key() == 14
    await store.aclose()
