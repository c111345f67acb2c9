"""What befalls a process: others at its file, no room, no handles, no threads, a wrong clock, a slow disk.

Elsewhere:

    killed at any moment                       tests/crash/test_kill.py
    killed, then started again                 tests/crash/test_restart.py
    signalled once or twice, frozen, thawed    tests/crash/test_signals.py
    a second runtime, frozen and overtaken     tests/crash/test_ownership.py, tests/store/test_sqlite_processes.py
    a newer, foreign or damaged file           tests/store/test_sqlite.py
    a disk that refuses, tears or lies         tests/faults/test_disk.py
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead import FlowContext, Limits, Registry, Retry, TaskContext
from flowstead.store import sqlite
from flowstead.store.memory import MemoryStore
from flowstead.store.sqlite import SqliteStore
from flowstead.testing import ManualClock
from tests import invariants
from tests.crash.harness import Zygote
from tests.disk.vfs import Disk
from tests.faults.support import launch, types_of
from tests.faulty_store import flows_of, new_flow, running, settle, soon, turns, until

DAY = 24 * 3600
PATIENCE = 30.0


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


# ---- another process at the file ------------------------------------------------------------------


@pytest.mark.crash
async def test_a_writer_beside_us_that_is_soon_gone_is_waited_for_while_reads_go_on(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with running(db) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        other = zygote.fork("hold_the_write_lock", tmp_path / "other", path=str(db), go=str(go))
        other.says("holding")

        update = asyncio.create_task(
            flows.update(flow_id=flow_id, expected_revision=0, current_step="waited")
        )
        await turns(1000)
        listed = await soon(flows.list())
        held_up = not update.done()
        go.touch()
        answer = await soon(update, PATIENCE)

        assert held_up, "vacuous: nobody was in the way"
        assert listed[0].revision == 0
        assert answer.applied
        assert runtime.statistics().failed_writes == 0
    assert other.wait() == 0
    invariants.check_all(db)


@pytest.mark.crash
async def test_a_writer_beside_us_that_stays_is_a_refusal_and_once_it_is_gone_all_is_well(
    zygote: Zygote, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT_SECONDS", 0.05)
    go = tmp_path / "go"
    async with running(db) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        other = zygote.fork("hold_the_write_lock", tmp_path / "other", path=str(db), go=str(go))
        other.says("holding")

        refused = [
            await soon(flows.update(flow_id=flow_id, expected_revision=0, current_step="no"))
            for _ in range(3)
        ]
        meanwhile = await soon(flows.get(flow_id))
        go.touch()
        assert other.wait() == 0
        applied = await soon(flows.update(flow_id=flow_id, expected_revision=0, current_step="yes"))

        assert [answer.code for answer in refused] == ["persist_failed"] * 3
        assert all("locked" in answer.reason for answer in refused)
        assert meanwhile is not None and (meanwhile.revision, meanwhile.current_step) == (0, None)
        assert applied.applied
        assert await types_of(flows, flow_id) == ["flow.created", "flow.updated"]
    invariants.check_all(db)


# ---- no leave to write ----------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize("what", ["file", "directory"])
async def test_what_may_only_be_read_is_refused_at_the_start_not_at_the_first_mutation(
    zygote: Zygote, tmp_path: Path, what: str
) -> None:
    # Not under tmp_path: its parents are closed to whomever root has to become to be stopped at all.
    with tempfile.TemporaryDirectory() as made:
        db = Path(made) / "flows.db"
        async with running(db) as runtime:
            await new_flow(flows_of(runtime))
        before = db.read_bytes()
        db.parent.chmod(0o777 if what == "file" else 0o555)
        for beside in db.parent.iterdir():
            beside.chmod(0o444 if what == "file" else 0o666)

        child = zygote.fork("open_unprivileged", tmp_path / "journal", path=str(db))
        assert child.wait() == 0, child.facts()

        [told] = child.facts()
        db.parent.chmod(0o700)
        assert told.get("refused") == "StoreUnusable", told
        assert db.read_bytes() == before


# ---- no handles, no threads -----------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize(
    "what",
    [
        "handles",
        pytest.param(
            "threads",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS"),
        ),
    ],
)
def test_short_of_handles_or_threads_opening_is_refused_and_works_when_there_are_some(
    zygote: Zygote, db: Path, tmp_path: Path, what: str
) -> None:
    child = zygote.fork("open_short_of", tmp_path / "journal", path=str(db), what=what)

    assert child.wait() == 0, child.facts()
    short, enough = child.facts()
    assert short.get("refused") == "StoreUnusable", short
    assert enough == {"opened": True}


@pytest.mark.crash
def test_out_of_handles_an_owner_answers_and_recovers_by_itself(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    child = zygote.fork("work_without_handles", tmp_path / "journal", path=str(db))

    assert child.wait() == 0, child.facts()
    codes = {fact["when"]: fact["code"] for fact in child.facts() if "when" in fact}
    [seen] = [fact for fact in child.facts() if "fired" in fact]
    [told] = [fact["told"] for fact in child.facts() if "told" in fact]
    assert seen["fired"] == 1, "vacuous: the disk did not fail"
    assert codes == {
        "while short": None,
        "at a failing disk": "outcome_unknown",
        "without a writer": "persist_failed",
        "with enough again": None,
    }
    # What nobody could say, the file says: a reader was shown in between what is there in the end.
    steps = [each["when"] for each in told if each is not None]
    maybe = ["at a failing disk"] if seen["read"] == 2 else []
    assert steps == ["while short", *maybe, "with enough again"]
    invariants.check_all(db)


async def test_without_a_thread_for_a_new_writer_nothing_is_lost_and_the_next_call_works(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Disk() as disk:
        async with running(SqliteStore(db, connect=disk.connect)) as runtime:
            flows = flows_of(runtime)
            flow_id = await new_flow(flows)
            fault = disk.fail("sync", "wal", at=1)
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", cannot_start)
                answer = await soon(flows.update(flow_id=flow_id, expected_revision=0))
            found = await soon(flows.get(flow_id))
            assert found is not None
            after = await soon(flows.finish(flow_id=flow_id, expected_revision=found.revision))

            assert fault.fired == 1
            assert answer.code == "outcome_unknown"
            assert after.applied
    invariants.check_all(db)


# ---- a clock that is wrong ------------------------------------------------------------------------

JUMPS = {"a year ahead": 365 * DAY, "a day back": -DAY, "not at all, it stands still": 0}
jumps = pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS.keys())


@jumps
async def test_when_the_clock_jumps_a_retry_starts_late_or_once_and_never_twice(
    clock: ManualClock, jump: int
) -> None:
    starts: list[int] = []

    async def flaky(ctx: TaskContext, given: Any) -> str:
        starts.append(ctx.attempt)
        if ctx.attempt == 1:
            raise OSError("not this time")
        return "done"

    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        retry = Retry(max_attempts=5, initial=60.0, jitter=0.0)
        await launch(flows, await new_flow(flows), flaky, retry=retry)
        await settle()
        began = list(starts)

        clock.set(clock.now() + jump * 1000)
        clock.advance(59.9)
        await settle()
        early = list(starts)
        clock.advance(0.1 + max(-jump, 0))
        await settle()
        due = list(starts)
        clock.set(clock.now() + 366 * DAY * 1000)
        clock.advance(120)
        await settle()

        assert began == [1]
        assert early == ([1, 2] if jump > 0 else [1])
        assert due == [1, 2]
        assert starts == [1, 2]


@jumps
async def test_when_the_clock_jumps_a_requested_cancel_ends_its_flow_once(
    clock: ManualClock, jump: int
) -> None:
    async with running(clock=clock, limits=Limits(cancel_grace=60.0)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await soon(flows.request_cancel(flow_id=flow_id, expected_revision=0))
        await settle()

        clock.set(clock.now() + jump * 1000)
        clock.advance(60 + max(-jump, 0))
        await settle()
        clock.set(clock.now() + 366 * DAY * 1000)
        clock.advance(120)
        await settle()

        assert await types_of(flows, flow_id) == [
            "flow.created",
            "flow.cancel_requested",
            "flow.cancelled",
        ]


async def test_however_the_clock_jumps_no_flow_and_no_child_grows_younger(
    clock: ManualClock,
) -> None:
    start = clock.now()
    flow_times: list[int] = []
    child_times: list[int] = []
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        child = await soon(flows.run_task(flow_id=flow_id, task="t", runtime="acp"))
        task_id = child.unwrap().task_id

        for revision, jump in enumerate((0, 365 * DAY, -DAY, -366 * DAY, 0, 10 * DAY)):
            clock.set(clock.now() + jump * 1000)
            updated = await soon(
                flows.update(flow_id=flow_id, expected_revision=revision, current_step=str(jump))
            )
            task = await soon(flows.progress_task(task_id, summary=str(jump)))
            assert task is not None and task.last_event_at is not None
            flow_times.append(updated.unwrap().updated_at)
            child_times.append(task.last_event_at)

    assert clock.now() < start + 365 * DAY * 1000, "vacuous: it never went back"
    assert flow_times == sorted(flow_times)
    assert child_times == sorted(child_times)


async def test_when_the_clock_went_back_a_flow_does_not_end_before_its_last_update(
    clock: ManualClock,
) -> None:
    async with running(clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        clock.set(clock.now() + DAY * 1000)
        updated = (await soon(flows.update(flow_id=flow_id, expected_revision=0))).unwrap()

        clock.set(clock.now() - DAY // 2 * 1000)
        ended = (await soon(flows.finish(flow_id=flow_id, expected_revision=1))).unwrap()

    assert ended.ended_at is not None
    assert ended.ended_at >= updated.updated_at


# ---- a slow disk ----------------------------------------------------------------------------------


async def test_while_the_disk_hangs_the_loop_turns_reads_answer_and_the_next_batch_grows(
    db: Path,
) -> None:
    reached, go = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        assert go.wait(PATIENCE)

    with Disk() as disk:
        limits = Limits(mailbox=4)
        async with running(SqliteStore(db, connect=disk.connect), limits=limits) as runtime:
            flows = flows_of(runtime)
            first, flooded, *others = [await new_flow(flows) for _ in range(60)]
            fault = disk.fail("sync", "wal", times=1, delay=hang)
            alone = asyncio.create_task(flows.update(flow_id=first, expected_revision=0))
            await until(reached.is_set)

            waiting = [
                asyncio.create_task(flows.update(flow_id=each, expected_revision=0))
                for each in others
            ]
            flood = [
                asyncio.create_task(flows.update(flow_id=flooded, expected_revision=0))
                for _ in range(200)
            ]
            await turns(2000)
            answered = Counter(
                str(task.result().code) for task in (alone, *waiting, *flood) if task.done()
            )
            read = [await soon(flows.get(first)), *await soon(flows.list(limit=60))]
            before = runtime.statistics()
            go.set()
            answers = [await soon(task) for task in (alone, *waiting, *flood)]
            after = runtime.statistics()

            assert fault.fired == 1
            # What does not fit is refused at once; of the rest nothing is answered before it is on disk.
            assert answered == {"overloaded": 196}
            assert {flow.revision for flow in read if flow is not None} == {0}
            assert before.waiting_mutations <= 4
            assert after.largest_batch >= len(others)
            assert after.commits - before.commits <= 3
            applied = [answer for answer in answers if answer.applied]
            assert len(applied) == 1 + len(others) + 1
            codes = Counter(str(answer.code) for answer in answers if not answer.applied)
            assert codes["revision_conflict"] + codes["overloaded"] == 199
    invariants.check_all(db)


async def test_closing_waits_for_a_disk_that_hangs_and_answers_whoever_waits(db: Path) -> None:
    reached, go = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        assert go.wait(PATIENCE)

    with Disk() as disk:
        async with running(SqliteStore(db, connect=disk.connect)) as runtime:
            flows = flows_of(runtime)
            flow_id = await new_flow(flows)
            fault = disk.fail("sync", "wal", times=1, delay=hang)
            update = asyncio.create_task(
                flows.update(flow_id=flow_id, expected_revision=0, current_step="last")
            )
            await until(reached.is_set)

            closing = asyncio.create_task(runtime.aclose())
            await turns(1000)
            closed_early = closing.done()
            go.set()
            await soon(closing)

            assert fault.fired == 1
            assert not closed_early
            with anyio.fail_after(PATIENCE):
                assert (await update).applied
    [flow] = invariants.check_all(db).flows.values()
    assert flow.doc["currentStep"] == "last"


# ---- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["controller", "child"])
async def test_closing_just_before_code_asks_for_something_is_no_failure_of_that_code(
    who: str,
) -> None:
    for rounds in range(10):
        await _close_and_let_it_ask(who, rounds)


async def _close_and_let_it_ask(who: str, rounds: int) -> None:
    """Begin to close, let code ask for something so many turns of the loop later, and look at what became of it."""
    go = asyncio.Event()
    asked: list[str] = []
    registry = Registry()

    @registry.controller("works")
    async def works(flow: FlowContext) -> None:
        if not asked:
            await go.wait()
            asked.append("controller")
            await flow.update(current_step="asked")

    @registry.task
    async def helps(ctx: TaskContext, given: Any) -> str:
        if not asked:
            await go.wait()
            asked.append("child")
            await flows_of(runtime).list()
        return "done"

    store = MemoryStore()
    async with running(store, registry=registry) as runtime:
        flow_id = await new_flow(flows_of(runtime), "works" if who == "controller" else "nobody")
        if who == "child":
            await launch(flows_of(runtime), flow_id, "helps")
        await settle()

        closing = asyncio.create_task(runtime.aclose())
        await turns(rounds)
        go.set()
        await soon(closing)

    asked.append("again")
    async with running(store, registry=registry) as runtime:
        await settle()
        flow = await soon(flows_of(runtime).get(flow_id))
        children = await soon(flows_of(runtime).list_tasks(flow_id))
        assert flow is not None
        assert flow.status == ("succeeded" if who == "controller" else "queued"), (rounds, flow)
        assert all(child.status == "succeeded" for child in children), (rounds, children)
