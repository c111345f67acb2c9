"""Records to rows and back, and files of every released version."""

from __future__ import annotations

import pickle
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from msgspec import Raw

from flowstead.errors import SnapshotUnreadable
from flowstead.model.flow import Failure, Flow, FlowKey, FlowStatus, StoredFlow
from flowstead.model.retry import Category, Retry
from flowstead.model.task import Launch, OnRestart, StoredTask, Task, TaskStatus
from flowstead.store import codec, schema
from flowstead.store.port import FlowQuery, Scope, Snapshot
from flowstead.store.sqlite import SqliteStore
from tests.store.rows import HOSTILE, NOW, event_of, flow_of, task_of

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


def test_the_columns_say_what_the_record_says() -> None:
    flow, task = full_flow(), full_task()

    row = codec.flow_row(flow, codec.encode(flow), due_at=5, expected_revision=0)
    child = codec.task_row(task, due_at=task.next_attempt_at, fresh=True)
    line = codec.event_row(7, codec.read_event(event_of(flow, 3).doc.encode(), 0))

    assert row[:-2] == (7, "alice", "flow", "k", "c", "once", "failed", NOW, 5, 1)
    assert row.expected_revision == 0
    assert child[:-2] == (8, "task", 7, "r", "failed", "subagent", True, NOW)
    assert (line.flow_key, line.seq) == (7, 3)


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
    ]
    for read in readers:
        with pytest.raises(SnapshotUnreadable) as refused:
            read(doc)
        assert "The row was left as it is." in str(refused.value)


def test_a_refused_record_is_named_where_its_name_can_be_read() -> None:
    flow = codec.encode(full_flow()).replace(b'"failed"', b'"hibernating"')
    task = codec.encode(full_task()).replace(b'"failed"', b'"hibernating"')

    with pytest.raises(SnapshotUnreadable, match="flow flow cannot be read"):
        codec.read_flow(flow)
    with pytest.raises(SnapshotUnreadable, match="task task cannot be read"):
        codec.read_task(task)


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
