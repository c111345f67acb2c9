"""What a new process finds and does after the old one was killed, was closed, or just went away."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import invariants
from tests.crash.harness import ROOT, Child, Zygote, until

pytestmark = pytest.mark.crash


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


def ran(child: Child) -> list[tuple[str, int]]:
    """Which tasks began, in order, with their attempts."""
    return [(fact["ran"], fact["attempt"]) for fact in child.facts() if "ran" in fact]


def have_run(child: Child, *names: str) -> None:
    """Wait until the code of all these has begun."""
    until(lambda: {name for name, _ in ran(child)} >= set(names), f"{names} to run")


def tasks_of(records: dict[str, Any], flow_id: str) -> dict[str, dict[str, Any]]:
    return {task["runId"]: task for task in records[flow_id]["tasks"]}


# ---- what was written -----------------------------------------------------------------------------


def test_after_kill_9_every_flow_child_and_intent_is_as_it_was(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    first = zygote.fork("furnish", tmp_path / "first", path=str(db), go="/nonexistent")
    before = first.says("ready")["records"]
    first.kill()

    second = zygote.fork("look", tmp_path / "second", path=str(db))
    after = second.says("ready")["records"]

    assert second.wait() == 0
    assert after == before
    assert after["asked"]["flow"]["cancelRequestedAt"] is not None
    assert after["cancelled"]["flow"]["status"] == "cancelled"
    assert after["waiting"]["flow"]["waitJson"] == {"kind": "reply"}
    assert tasks_of(after, "queued")["ended"]["resultJson"] == {"found": [1, 2]}
    assert tasks_of(after, "queued")["never"]["attempt"] == 1
    invariants.check_all(db)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_an_idle_restart_changes_no_row(
    zygote: Zygote, db: Path, tmp_path: Path, killed: bool, registered: bool
) -> None:
    go = tmp_path / "go"
    first = zygote.fork("furnish", tmp_path / "first", path=str(db), go=str(go))
    first.says("ready")
    before = invariants.dump(db)
    if killed:
        first.kill()
    else:
        go.touch()
        assert first.wait() == 0
    assert invariants.dump(db) == before

    for lap in range(3):
        again = zygote.fork("look", tmp_path / f"again-{lap}", path=str(db), registered=registered)
        again.says("ready")
        assert again.wait() == 0, again.facts()
        assert invariants.dump(db) == before

    assert all(before[table] for table in ("flows", "tasks", "events"))
    invariants.check_all(db)


# ---- children -------------------------------------------------------------------------------------


def test_after_kill_9_a_launched_child_runs_again_or_is_lost_as_its_policy_says(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = zygote.fork("launch", tmp_path / "first", path=str(db), go=str(go))
    have_run(first, "again", "fragile", "bare")
    first.kill()

    go.touch()
    second = zygote.fork("finish", tmp_path / "second", path=str(db), go=str(go))
    tasks = tasks_of(second.says("ready")["records"], "launching")

    assert second.wait() == 0
    assert ran(second) == [("again", 2)]
    assert tasks["again"]["status"] == "succeeded"
    assert tasks["again"]["attempt"] == 2
    assert tasks["again"]["resultJson"]["attempt"] == 2
    for name in ("fragile", "bare"):
        assert tasks[name]["status"] == "lost", tasks[name]
        assert tasks[name]["attempt"] == 1
        assert tasks[name]["failure"]["kind"] == "interrupted"
        assert "process ended" in tasks[name]["failure"]["message"]
    assert "not registered" in tasks["bare"]["failure"]["message"]
    invariants.check_all(db)


@pytest.mark.parametrize("how", ["close", "terminate"])
def test_children_stopped_by_a_clean_shutdown_run_again_unless_they_must_not_be_done_twice(
    zygote: Zygote, db: Path, tmp_path: Path, how: str
) -> None:
    go = tmp_path / "go"
    first = zygote.fork("launch", tmp_path / "first", path=str(db), go=str(go))
    have_run(first, "again", "fragile", "bare")

    if how == "close":
        Path(f"{go}.close").touch()
    else:
        first.signal(signal.SIGTERM)
    assert first.wait() == 0, first.facts()

    told = {key for fact in first.facts() for key in fact}
    assert "closed" in told if how == "close" else "cancelled" in told
    assert sorted(fact["stopped"] for fact in first.facts() if "stopped" in fact) == [
        "again",
        "bare",
        "fragile",
    ]
    children = {task.row["run_id"]: task for task in invariants.check_all(db).tasks}
    for name in ("again", "bare"):
        task = children[name]
        assert task.doc["status"] == "queued", task.doc
        assert task.doc.get("attempt", 0) == 0
        assert [event["type"] for event in task.events][-1] == "task.released"
    assert children["fragile"].doc["status"] == "lost"
    assert children["fragile"].doc["failure"]["kind"] == "interrupted"

    go.touch()
    second = zygote.fork("finish", tmp_path / "second", path=str(db), go=str(go))
    tasks = tasks_of(second.says("ready")["records"], "launching")
    assert second.wait() == 0
    assert ran(second) == [("again", 1)]
    assert tasks["again"]["status"] == "succeeded"
    assert tasks["fragile"]["status"] == tasks["bare"]["status"] == "lost"
    assert tasks["fragile"]["attempt"] == 1
    invariants.check_all(db)


# ---- controllers ----------------------------------------------------------------------------------


def test_after_kill_9_a_controller_goes_on_where_its_record_ends(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    steps = ["crash/steps"]
    first = zygote.fork("drive", tmp_path / "first", path=str(db), go=str(go), controllers=steps)
    have_run(first, "second")
    assert ran(first) == [("first", 1)] * 3 + [("second", 1)]
    first.kill()

    second = zygote.fork("finish", tmp_path / "second", path=str(db), go=str(go))
    have_run(second, "second")
    second.says("entered")  # the child is restarted beside its controller, in either order
    second.kill()
    go.touch()
    third = zygote.fork("finish", tmp_path / "third", path=str(db), go=str(go))
    records = third.says("ready")["records"]

    assert third.wait() == 0
    effects = [
        fact for child in (first, second, third) for fact in child.facts() if "effect" in fact
    ]
    assert effects == [{"effect": "paid"}]
    assert ran(second) == [("second", 2)]
    assert ran(third) == [("second", 3), ("bare", 1)]
    assert all("entered" in {key for f in c.facts() for key in f} for c in (first, second, third))
    flow = records["crash-steps"]["flow"]
    assert flow["status"] == "succeeded"
    receipt, one, several, two, inline = flow["stateJson"]["all"]
    assert receipt == "receipt"
    assert one == {"name": "first", "given": 1, "attempt": 1}
    assert [each["given"] for each in several] == [1, 2]
    assert two == {"name": "second", "given": 2, "attempt": 3}
    assert inline == {"name": "bare", "given": 3, "attempt": 1}
    started = [e for e in records["crash-steps"]["history"] if e["type"] == "flow.started"]
    assert len(started) == 1
    invariants.check_all(db)


def test_after_kill_9_a_step_with_a_function_of_its_own_runs_again_under_its_controller(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    inline = ["crash/inline"]
    first = zygote.fork("drive", tmp_path / "first", path=str(db), go=str(go), controllers=inline)
    first.says("effect")
    first.kill()

    go.touch()
    second = zygote.fork("finish", tmp_path / "second", path=str(db), go=str(go))
    records = second.says("ready")["records"]

    assert second.wait() == 0
    assert records["crash-inline"]["flow"]["stateJson"] == {"done": "done"}
    [task] = records["crash-inline"]["tasks"]
    assert (task["status"], task["attempt"]) == ("succeeded", 2)
    invariants.check_all(db)


def test_a_flow_whose_controller_is_not_registered_stays_as_it_is_and_is_reported(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = zygote.fork(
        "drive",
        tmp_path / "first",
        path=str(db),
        go=str(go),
        controllers=["crash/steps", "crash/inline"],
    )
    have_run(first, "second")
    first.says("effect")
    first.kill()
    before = _rows_of(db, "crash-steps")

    go.touch()
    second = zygote.fork(
        "finish", tmp_path / "second", path=str(db), go=str(go), only=["crash/inline"]
    )
    records = second.says("ready")["records"]

    assert second.wait() == 0
    assert second.says("unregistered")["unregistered"] == {"crash/steps": 1}
    assert records["crash-inline"]["flow"]["status"] == "succeeded"
    assert _rows_of(db, "crash-steps") == before
    third = zygote.fork("finish", tmp_path / "third", path=str(db), go=str(go))
    assert third.says("ready")["records"]["crash-steps"]["flow"]["status"] == "succeeded"
    assert third.wait() == 0
    invariants.check_all(db)


def test_a_step_under_way_survives_a_runtime_that_does_not_know_its_controller(
    zygote: Zygote, db: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    inline = ["crash/inline"]
    first = zygote.fork("drive", tmp_path / "first", path=str(db), go=str(go), controllers=inline)
    until(lambda: [f for f in first.facts() if f.get("effect") == "slow"], "the step to begin")
    first.kill()
    before = invariants.dump(db)

    second = zygote.fork("look", tmp_path / "second", path=str(db), registered=False)
    assert second.wait() == 0, second.facts()

    assert invariants.dump(db) == before
    go.touch()
    third = zygote.fork("finish", tmp_path / "third", path=str(db), go=str(go))
    assert third.says("ready")["records"]["crash-inline"]["flow"]["status"] == "succeeded"


def _rows_of(path: Path, flow_id: str) -> list[Any]:
    file = invariants.read(path)
    [flow] = [flow for flow in file.flows.values() if flow.row["flow_id"] == flow_id]
    return [flow.row, flow.events, [task.row for task in flow.tasks.values()]]


# ---- going away -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["leave_open", "close_loop"])
def test_a_process_that_never_closed_its_runtime_ends_within_seconds(
    zygote: Zygote, db: Path, tmp_path: Path, scene: str
) -> None:
    program = f"from tests.crash.scenes import {scene}; {scene}({str(db)!r})"
    began = time.monotonic()

    ended = subprocess.run(
        [sys.executable, "-W", "default", "-c", program],
        cwd=ROOT,
        timeout=30,
        capture_output=True,
        text=True,
        check=False,
    )

    assert time.monotonic() - began < 5.0
    assert ended.returncode == 0, ended.stderr
    file = invariants.check_all(db)
    assert "left" in {flow.row["flow_id"] for flow in file.flows.values()}
    after = zygote.fork("look", tmp_path / "after", path=str(db))
    assert "left" in after.says("ready")["records"]
    assert after.wait() == 0
    invariants.check_all(db)
