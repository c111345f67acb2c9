"""The operator's face: everybody's flows, read and cancelled, one flow for one id."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import anyio
import pytest

from flowstead import (
    Fatal,
    FlowContext,
    FlowNotFound,
    Registry,
    Runtime,
    SnapshotUnreadable,
    StoreUnusable,
    Update,
    open_runtime,
)
from tests.runtime.support import OWNER, PATIENCE, STRANGER, Where, bound, dump, link, make


async def test_the_operator_finds_everybodys_flows(runtime: Runtime) -> None:
    mine, theirs = bound(runtime), bound(runtime, STRANGER)
    one = await make(mine, flow_id="one-flow", correlation_id="crm:1")
    two = await make(theirs, flow_id="two-flow", status="running")
    task = await link(mine, "one-flow")
    admin = runtime.admin

    assert await admin.get("one-flow") == one
    assert await admin.list() == [two, one]
    assert await admin.list(status="running") == [two]
    assert await admin.list(limit=1, after="two-flow") == [one]
    assert await admin.find_latest() == two
    assert await admin.resolve("two-") == two
    assert await admin.resolve("crm:1") == one
    assert await admin.resolve("nobody") is None
    assert await admin.get_task(task.task_id) == task
    assert await admin.list_tasks("one-flow") == [task]
    assert await admin.history("one-flow") == await mine.history("one-flow")
    summary = await admin.get_task_summary("one-flow")
    assert summary is not None and summary.total == 1


async def test_the_operator_cancels_anybodys_flow_and_child(runtime: Runtime) -> None:
    theirs = bound(runtime, STRANGER)
    flow = await make(theirs)
    task, other = await link(theirs, flow.flow_id), await link(theirs, flow.flow_id)

    child = await runtime.admin.cancel_task(task.task_id)
    report = await runtime.admin.cancel(flow.flow_id)

    assert child.cancelled and report.cancelled
    assert await runtime.admin.result(flow.flow_id) == report.flow
    assert report.flow == await theirs.get(flow.flow_id)
    assert (await theirs.get_task(other.task_id)).status == "cancelled"  # type: ignore[union-attr]
    assert (await theirs.history(flow.flow_id))[-1].actor == "admin"


async def test_the_operator_is_told_what_is_not_there(store: Where, runtime: Runtime) -> None:
    before = dump(store)

    report = await runtime.admin.cancel("nobody")
    child = await runtime.admin.cancel_task("nobody")

    assert (report.found, report.code, child.found) == (False, "not_found", False)
    assert await runtime.admin.list_tasks("nobody") == []
    with pytest.raises(FlowNotFound):
        await runtime.admin.result("nobody")
    with pytest.raises(FlowNotFound):
        await runtime.admin.wait_task("nobody")
    with pytest.raises(FlowNotFound):
        await runtime.admin.watch("nobody").__aenter__()
    assert dump(store) == before


async def test_the_operator_finds_everybodys_waits_and_whose_they_are(store: Where) -> None:
    registry = Registry()

    @registry.controller("ask")
    async def ask(flow: FlowContext) -> None:
        await flow.wait("reply", kind="reply")

    async with open_runtime(store, registry=registry) as runtime:
        mine, theirs = bound(runtime), bound(runtime, STRANGER)
        await make(mine, controller_id="ask", flow_id="mine")
        await make(theirs, controller_id="ask", flow_id="theirs")
        await make(theirs, flow_id="by-hand", status="waiting", wait_json={"kind": "call"})
        with anyio.fail_after(PATIENCE):
            while len(await runtime.admin.list_waits()) < 3:
                await anyio.lowlevel.checkpoint()

        pages = []
        while page := await runtime.admin.list_waits(
            limit=2, after=pages[-1][-1].number if pages else 0
        ):
            pages.append(page)
        one = await runtime.admin.list_waits("theirs")

        assert [len(page) for page in pages] == [2, 1]
        found = [wait for page in pages for wait in page]
        assert {wait.flow_id: wait.owner_key for wait in found} == {
            "mine": OWNER,
            "theirs": STRANGER,
            "by-hand": STRANGER,
        }
        assert [wait for wait in found if wait.owner_key == STRANGER] == await theirs.list_waits()
        assert [wait.owner_key for wait in one] == [STRANGER]


class Broken:
    """A channel that takes nothing."""

    async def send(self, update: Update) -> None:
        raise Fatal("no such channel")


async def test_the_operator_finds_whose_updates_were_not_delivered(store: Where) -> None:
    async with open_runtime(store, notifier=Broken()) as runtime:
        faces = [bound(runtime), bound(runtime, STRANGER), bound(runtime)]
        for number, flows in enumerate(faces):
            await make(flows, flow_id=f"f{number}")
            await flows.finish(flow_id=f"f{number}", expected_revision=0)
        with anyio.fail_after(PATIENCE):
            while await runtime.admin.list_updates(status="pending"):
                await anyio.lowlevel.checkpoint()

        failed = []
        while page := await runtime.admin.list_updates(
            status="delivery_failed", limit=2, after=failed[-1].number if failed else 0
        ):
            failed += page

        assert [(u.flow_id, u.owner_key) for u in failed] == [
            ("f0", OWNER),
            ("f1", STRANGER),
            ("f2", OWNER),
        ]
        assert await runtime.admin.list_updates(status=[]) == []
        assert await runtime.admin.list_updates("f1") == await faces[1].list_updates()
        with pytest.raises(ValueError, match="after"):
            await runtime.admin.list_updates(after=-1)


async def test_an_id_used_by_two_owners_stands_for_the_newest_flow(store: Where) -> None:
    async with open_runtime(store) as runtime:
        first, second = bound(runtime), bound(runtime, STRANGER)
        await make(first, flow_id="f")
        await link(first, "f")
        await first.update(flow_id="f", expected_revision=0)
        newest = await make(second, flow_id="f")
        task = await link(second, "f", runtime="cli")
        admin = runtime.admin

        assert await admin.get("f") == newest
        assert await admin.resolve("f") == newest
        assert await admin.list_tasks("f") == [task]
        assert await admin.history("f") == await second.history("f")
        assert await admin.history("f", after_seq=1) == await second.history("f", after_seq=1)
        summary = await admin.get_task_summary("f")
        assert summary is not None and summary.by_runtime["cli"] == summary.total == 1
        report = await admin.cancel("f")
        assert report.flow is not None and report.flow.owner_key == STRANGER
        assert [task.runtime for task in report.tasks] == ["cli"]
        mine = await first.get("f")
        assert mine is not None and mine.ended_at is None


@pytest.mark.parametrize("owner", [OWNER, STRANGER])
async def test_the_operator_watches_one_flow_live(runtime: Runtime, owner: str) -> None:
    flows = bound(runtime, owner)
    flow = await make(flows)

    async with runtime.admin.watch(flow.flow_id, after_seq=0) as events:
        with anyio.fail_after(5):
            seen = [await anext(events)]
            await flows.update(flow_id=flow.flow_id, expected_revision=0)
            seen.append(await anext(events))

    assert [event.type for event in seen] == ["flow.created", "flow.updated"]


async def test_the_operator_watches_everything(runtime: Runtime) -> None:
    async with runtime.admin.watch(after_position=0) as events:
        await make(bound(runtime), flow_id="a")
        await make(bound(runtime, STRANGER), flow_id="b")
        with anyio.fail_after(PATIENCE):
            seen = [(await anext(events)).flow_id for _ in range(2)]

    assert seen == ["a", "b"]


async def test_controllers_without_code_are_counted(store: Where) -> None:
    async with open_runtime(store) as runtime:
        for controller in ("known", "unknown", "unknown"):
            await make(bound(runtime), controller_id=controller, status="waiting")
        await make(bound(runtime), controller_id="unknown")

    registry = Registry()

    @registry.controller("known")
    async def drive(flow: FlowContext) -> None: ...

    async with open_runtime(store, registry=registry) as runtime:
        with anyio.fail_after(PATIENCE):
            while not runtime.admin.unregistered_controllers():
                await anyio.lowlevel.checkpoint()
        counts = runtime.admin.unregistered_controllers()

    assert set(counts) == {"unknown"}


async def test_a_bad_row_is_listed_left_alone_and_harms_nobody(db: Path) -> None:
    async with open_runtime(db) as runtime:
        flows = bound(runtime)
        await make(flows, flow_id="bad", state_json="secret")
        good = await make(flows, flow_id="good")
    with sqlite3.connect(db) as connection:
        connection.execute(
            """UPDATE flows SET doc = json_set(doc, '$.revision', 'no') WHERE flow_id = 'bad'"""
        )
    connection.close()
    damaged = dump(db)["flows"]

    async with open_runtime(db) as runtime:
        flows = bound(runtime)
        [unreadable] = await runtime.admin.list_unreadable()
        assert unreadable.table == "flows"
        assert "bad" in unreadable.problem and "secret" not in unreadable.problem
        with pytest.raises(SnapshotUnreadable):
            await flows.get("bad")
        with pytest.raises(SnapshotUnreadable):
            await flows.update(flow_id="bad", expected_revision=0)
        assert await flows.list() == [good]
        assert await flows.get("good") == good
        assert dump(db)["flows"] == damaged


async def test_another_programs_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = path.read_bytes()

    with pytest.raises(StoreUnusable, match="another program"):
        async with open_runtime(path):
            pass  # pragma: no cover

    assert path.read_bytes() == before
