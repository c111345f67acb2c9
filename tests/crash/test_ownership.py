"""One process owns a file: a second one is turned away, and one that was overtaken cannot write a row."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import invariants
from tests.crash.census import end_programs
from tests.crash.harness import Child, Zygote, until
from tests.crash.test_kill import Checker, Totals

pytestmark = pytest.mark.crash


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


def content(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, the row that says who owns the file included."""
    with closing(sqlite3.connect(path.as_uri() + "?mode=ro", uri=True)) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in ("ownership", "flows", "tasks", "events")
        }


def freeze(child: Child) -> None:
    child.signal(signal.SIGSTOP)
    process = psutil.Process(child.pid)
    until(lambda: process.status() == psutil.STATUS_STOPPED, "the process to stand still")


def is_in_a_transaction(path: Path) -> bool:
    """Whether somebody holds the file's write lock."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
        return False


def test_a_second_runtime_is_refused_at_once_and_told_who_holds_the_file(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = zygote.fork("update_when_told", tmp_path / "first", path=str(db), go=str(go))
    first.says("ready")

    second = zygote.fork("try_open", tmp_path / "second", path=str(db))
    refused = second.says("refused")

    assert refused["seconds"] < 1.0
    assert f"process {first.pid} " in refused["refused"]
    assert second.wait() == 0
    go.touch()
    assert first.says("applied")["applied"], "the first was harmed"
    assert first.wait() == 0
    [flow] = invariants.check_all(db).flows.values()
    assert flow.doc["stateJson"] == {"unharmed": True}


def test_after_kill_9_the_next_runtime_opens_at_once(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    first = zygote.fork("update_when_told", tmp_path / "first", path=str(db), go="/nonexistent")
    first.says("ready")

    first.kill()
    second = zygote.fork("try_open", tmp_path / "second", path=str(db))

    ready = second.says("ready")
    assert ready["ready"] < 1.0
    assert len(ready["records"]) == 1
    assert second.wait() == 0
    invariants.check_all(db)


def test_of_many_that_open_at_once_one_gets_the_file(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    for lap in range(5):
        path = db.with_name(f"flows-{lap}.db")
        racers = [
            zygote.fork(
                "update_when_told", tmp_path / f"racer-{lap}-{n}", path=str(path), go="/nonexistent"
            )
            for n in range(6)
        ]
        until(
            lambda racers=racers: sum(bool(racer.facts()) for racer in racers) == 6,
            "all to be ready or refused",
        )
        told = [racer.facts()[0] for racer in racers]
        ready = [racer.pid for racer, fact in zip(racers, told, strict=True) if "ready" in fact]
        refusals = [fact["crash"] for fact in told if "crash" in fact]
        assert len(ready) == 1, told
        assert all("StoreInUse" in refusal for refusal in refusals), refusals
        for racer in racers:
            racer.kill()
        [flow] = invariants.check_all(path).flows.values()
        assert flow.doc["revision"] == 0


def test_a_frozen_process_that_was_overtaken_cannot_write_a_row(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go, again, stop = tmp_path / "go", tmp_path / "again", tmp_path / "stop"
    first = zygote.fork("hold", tmp_path / "first", path=str(db), go=str(go), stop=str(stop))
    first.says("ready")
    first.says("ran")
    freeze(first)

    second = zygote.fork(
        "take_over", tmp_path / "second", path=str(db), go=str(again), stop=str(stop)
    )
    assert second.says("ready")["ready"], "the taker cannot write"
    assert second.says("ran")["attempt"] == 2
    before = content(db)
    go.touch()
    first.signal(signal.SIGCONT)
    answers = first.says("answers")["answers"]
    stopped = first.says("stopped")

    for name, (code, reason) in answers.items():
        refused = (
            "CommitFailed" if name in ("create_managed", "complete_task") else "persist_failed"
        )
        assert code == refused, (name, code, reason)
        assert f"process {second.pid}" in reason, (name, reason)
        assert "took it over" in reason, (name, reason)
    assert stopped["stopped"] == "again"
    assert content(db) == before
    again.touch()
    assert second.says("again")["again"], "the taker was harmed"
    stop.touch()
    assert first.wait() == 0, first.facts()
    assert second.wait() == 0, second.facts()
    [flow] = invariants.check_all(db).flows.values()
    assert flow.doc["stateJson"] == {"by": "the second, again"}
    [launched] = [task for task in flow.tasks.values() if task.row["launched"]]
    assert (launched.doc["status"], launched.doc["attempt"]) == ("succeeded", 2)


def test_once_the_frozen_owner_has_stepped_down_the_taker_still_keeps_others_out(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go, stop = tmp_path / "go", tmp_path / "stop"
    first = zygote.fork("hold", tmp_path / "first", path=str(db), go=str(go), stop=str(go))
    first.says("ready")
    freeze(first)
    second = zygote.fork(
        "take_over", tmp_path / "second", path=str(db), go=str(stop), stop=str(stop)
    )
    second.says("ready")

    go.touch()
    first.signal(signal.SIGCONT)
    assert first.wait() == 0, first.facts()
    third = zygote.fork("try_open", tmp_path / "third", path=str(db))

    assert f"process {second.pid} " in third.says("refused")["refused"]
    stop.touch()
    assert second.wait() == 0, second.facts()
    invariants.check_all(db)


def test_a_takeover_that_fails_leaves_the_owner_its_file(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = zygote.fork("update_when_told", tmp_path / "first", path=str(db), go=str(go))
    first.says("ready")

    second = zygote.fork("fail_to_take_over", tmp_path / "second", path=str(db))
    assert "disk I/O error" in second.says("refused")["refused"]
    assert second.wait() == 0
    third = zygote.fork("try_open", tmp_path / "third", path=str(db))
    assert third.wait() == 0

    assert f"process {first.pid} " in third.says("refused", 0.1)["refused"]
    go.touch()
    assert first.says("applied")["applied"], "the owner was harmed"
    assert first.wait() == 0
    invariants.check_all(db)


@pytest.mark.parametrize("seed", range(8))
def test_overtaken_under_load_it_acknowledges_nothing_that_is_not_there(
    zygote: Zygote, db: Path, tmp_path: Path, seed: int
) -> None:
    rng, totals = random.Random(seed), Totals()
    # Whoever takes over tells nobody anything.
    checker = Checker(db, totals, tells=False)
    first = zygote.fork(
        "load",
        tmp_path / "first",
        path=str(db),
        folder=str(checker.folder),
        seed=seed,
        strict=False,
    )
    first.says("ack")

    def stands_between_transactions() -> bool:
        time.sleep(rng.uniform(0.0, 0.03))
        freeze(first)
        if not is_in_a_transaction(db):
            return True
        first.signal(signal.SIGCONT)
        return False

    until(stands_between_transactions, "it to stand still outside a transaction")
    second = zygote.fork("visit", tmp_path / "second", path=str(db))
    assert second.says("visited")["visited"]
    assert second.wait() == 0
    before = content(db)
    first.signal(signal.SIGCONT)
    until(
        lambda: [f for f in first.facts() if f.get("refused") == "persist_failed"],
        "a mutation that is refused",
    )
    first.kill()

    assert content(db) == before
    end_programs(checker.folder)
    checker.check(first.facts(), first.pid)
    assert totals.acks > 0
