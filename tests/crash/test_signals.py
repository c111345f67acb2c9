"""Signals: a host asked to stop answers everybody, one told twice ends at once, and neither loses anything."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import invariants
from tests.crash.harness import Child, Zygote, until

pytestmark = pytest.mark.crash

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
STYLES = pytest.mark.parametrize("style", ["anyio", "asyncio"])


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


def told(child: Child, key: str) -> list[Any]:
    return [fact[key] for fact in child.facts() if key in fact]


def under_way(child: Child, *names: str) -> None:
    """Wait until these children run, and every flow has been changed a few times."""
    until(lambda: set(told(child, "ran")) >= set(names), f"{names} to run")
    until(
        lambda: len({fact["flow"] for fact in child.facts() if fact.get("ack", 0) >= 3}) == 4,
        "all flows to be changed",
    )


def check_acknowledged(child: Child, file: invariants.File) -> None:
    """Everything the host was told is in the file."""
    stored = {flow.row["flow_id"]: flow.doc["revision"] for flow in file.flows.values()}
    acks = [fact for fact in child.facts() if "ack" in fact]
    assert len(acks) >= 12, "vacuous"
    for ack in acks:
        assert stored[ack["flow"]] >= ack["ack"], f"acknowledged, but lost: {ack}"
    assert not told(child, "failed"), child.facts()[-5:]


def children_of(file: invariants.File) -> dict[str, invariants.TaskRows]:
    return {task.row["run_id"]: task for task in file.tasks}


@STYLES
@SIGNALS
def test_asked_to_stop_once_a_host_answers_all_and_puts_back_the_children_that_may_run_twice(
    zygote: Zygote, db: Path, tmp_path: Path, number: int, style: str
) -> None:
    first = zygote.fork("host", tmp_path / "first", path=str(db), style=style)
    under_way(first, "patient", "fragile", "unlucky")

    first.signal(number)

    assert first.wait() == 0, first.facts()[-5:]
    assert told(first, "closed") == [True]
    assert sorted(told(first, "turned_away")) == [0, 1, 2, 3]
    file = invariants.check_all(db)
    check_acknowledged(first, file)
    children = children_of(file)
    doc = children["patient"].doc
    assert (doc["status"], doc.get("attempt", 0)) == ("queued", 0), doc
    assert doc.get("interruptions", 0) == 0
    assert children["patient"].events[-1]["type"] == "task.released"
    doc = children["fragile"].doc
    assert (doc["status"], doc["attempt"]) == ("lost", 1), doc
    assert (doc["failure"]["kind"], doc["failure"]["code"]) == ("interrupted", "unknown")
    waiting = children["unlucky"].doc
    assert (waiting["status"], waiting["attempt"]) == ("queued", 1)
    assert waiting["nextAttemptAt"] > waiting["createdAt"] + 3_000_000
    second = zygote.fork("succeed", tmp_path / "second", path=str(db))
    ended = second.says("ready")["ready"]
    assert second.wait() == 0
    assert ended["patient"] == ["succeeded", 1]
    assert ended["fragile"] == ["lost", 1]
    assert ended["unlucky"] == ["queued", 1]
    assert told(second, "ran") == ["patient"]
    invariants.check_all(db)


@STYLES
@SIGNALS
def test_told_to_stop_twice_a_host_ends_at_once_and_has_lost_nothing(
    zygote: Zygote, db: Path, tmp_path: Path, number: int, style: str
) -> None:
    first = zygote.fork("host", tmp_path / "first", path=str(db), style=style, stubborn=True)
    under_way(first, "patient", "fragile", "unlucky", "stubborn")

    first.signal(number)
    first.says("closing")
    first.signal(number)

    # Closing alone would have waited ten minutes for the child that does not stop.
    status = first.wait()
    assert not told(first, "closed")
    if style == "asyncio":
        assert status == 130
    elif number == signal.SIGTERM:
        assert status == -signal.SIGTERM
    else:
        assert (status, told(first, "interrupted")) == (0, [True]), first.facts()[-5:]
    check_acknowledged(first, invariants.check_all(db))
    second = zygote.fork("succeed", tmp_path / "second", path=str(db))
    ended = second.says("ready")["ready"]
    assert second.wait() == 0
    assert ended["patient"][0] == ended["stubborn"][0] == "succeeded"
    assert ended["fragile"] == ["lost", 1]
    assert ended["unlucky"] == ["queued", 1]
    invariants.check_all(db)


def test_what_came_due_while_the_process_stood_still_happens_late_and_once(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    child = zygote.fork(
        "await_instants", tmp_path / "journal", path=str(db), seconds=0.6, go=str(go)
    )
    due = child.says("ready")["due"]
    child.signal(signal.SIGSTOP)
    process = psutil.Process(child.pid)
    until(lambda: process.status() == psutil.STATUS_STOPPED, "the process to stand still")
    assert time.time() * 1000 < due, "vacuous: it was due before the process stood still"

    until(lambda: time.time() * 1000 > due + 300, "both instants to pass")
    assert told(child, "attempt") == [1]
    child.signal(signal.SIGCONT)
    child.says("ended")
    go.touch()

    assert child.wait() == 0, child.facts()
    assert told(child, "attempt") == [1, 2]
    flows = {flow.row["flow_id"]: flow for flow in invariants.check_all(db).flows.values()}
    kinds = [event["type"] for event in flows["retrying"].events]
    assert kinds.count("task.started") == 2
    assert kinds.count("task.retry_scheduled") == kinds.count("task.ended") == 1
    started = [e for e in flows["retrying"].events if e["type"] == "task.started"][-1]
    assert started["at"] >= due
    kinds = [event["type"] for event in flows["asked"].events]
    assert kinds.count("flow.cancelled") == 1
    assert flows["asked"].doc["endedAt"] >= due
