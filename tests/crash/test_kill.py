"""Killed or asked to end at any moment: whatever was acknowledged is there, and the file is whole, every time."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flowstead.store.schema import VERSION
from tests import invariants
from tests.crash.harness import Zygote, read_journal
from tests.crash.load import LIVE, PIPELINE

CYCLES = int(os.environ.get("FLOWSTEAD_KILL_CYCLES", "60"))
SEED = int(os.environ.get("FLOWSTEAD_KILL_SEED", "20261122"))
LANES = 2
CYCLES_PER_FILE = 25
EVENT_OF = {
    "create": "flow.created",
    "update": "flow.updated",
    "wait": "flow.waiting",
    "block": "flow.blocked",
    "resume": "flow.resumed",
    "request_cancel": "flow.cancel_requested",
    "finish": "flow.succeeded",
    "fail": "flow.failed",
    "cancelled": "flow.cancelled",
}

TURNS_OF_A_CHILD = ("task.started", "task.released")
MUST_HAPPEN = (
    *("restarted", "released", "child lost", "child timed_out", "child cancelled"),
    *("intents", "flow cancelled", "driven to the end", "flow.waiting", "flow.blocked"),
    *("flow.resumed", "task.retry_scheduled", "retry outlived a process"),
    *("cancelled while it ran", "retried after a time-out"),
)

pytestmark = pytest.mark.crash


@dataclass
class Totals:
    """What a run has exercised. One that has exercised nothing proves nothing."""

    cycles: int = 0
    acks: int = 0
    refusals: int = 0
    in_flight: int = 0
    kills_in_flight: int = 0
    kills_before_ready: int = 0
    clean_ends: int = 0
    slowest_open: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Totals) -> None:
        self.cycles += other.cycles
        self.acks += other.acks
        self.refusals += other.refusals
        self.in_flight += other.in_flight
        self.kills_in_flight += other.kills_in_flight
        self.kills_before_ready += other.kills_before_ready
        self.clean_ends += other.clean_ends
        self.slowest_open = max(self.slowest_open, other.slowest_open)
        self.counts += other.counts


class Checker:
    """All that has been told about one file, held against what is in it."""

    def __init__(self, path: Path, totals: Totals) -> None:
        self.path = path
        self.totals = totals
        self.acks: list[dict[str, Any]] = []
        self.ran: set[tuple[str, int]] = set()
        self.intents: set[str] = set()
        self.done_effects: set[tuple[str, str]] = set()
        self.ended: dict[str, str] = {}
        self.events_before = (0, "")

    def check(self, facts: list[dict[str, Any]]) -> None:
        """Check the file after a kill, given what the killed process told.

        Raises:
            AssertionError: Something acknowledged is not there, or an invariant does not hold.
        """
        totals = self.totals
        totals.cycles += 1
        for fact in facts:
            assert "crash" not in fact, f"the worker failed:\n{fact['crash']}"
            assert "wrong" not in fact, f"the worker was told something wrong: {fact['wrong']}"
        self._count(facts)
        self._check_what_ran(facts)
        if not self.path.exists():
            assert not [fact for fact in facts if "ready" in fact], "the file is gone"
            return
        if not self._has_a_schema():
            assert not [fact for fact in facts if "ready" in fact], "the schema is gone"
            return
        file = invariants.check_all(self.path)
        self.acks += (news := [fact for fact in facts if "ack" in fact])
        flows = {flow.row["flow_id"]: flow for flow in file.flows.values()}
        tasks = {task.row["task_id"]: task for task in file.tasks}
        for ack in news:
            if "revision" in ack:
                self._check_mutation(flows, ack)
        for ack in self.acks:
            self._check_kept(flows, tasks, ack)
        self._check_history_grew(file)
        self._check_starts(tasks)
        self._check_pipelines(flows)
        if any("closed" in fact for fact in facts):
            self._check_clean_end(tasks, {fact["ran"] for fact in facts if "ran" in fact})
        self._remember(flows, tasks)

    def _has_a_schema(self) -> bool:
        """Not if the process was killed in the middle of making the file, when its log did not exist yet."""
        if self.path.with_name(self.path.name + "-journal").exists():
            return False
        connection = sqlite3.connect(self.path.as_uri() + "?mode=ro", uri=True)
        try:
            return connection.execute("PRAGMA user_version").fetchone()[0] == VERSION
        finally:
            connection.close()

    # ---- what the process told --------------------------------------------------------------------

    def _count(self, facts: list[dict[str, Any]]) -> None:
        totals = self.totals
        begun = {fact["begin"] for fact in facts if "begin" in fact}
        open_calls = begun - {fact["done"] for fact in facts if "done" in fact}
        totals.acks += sum("ack" in fact for fact in facts)
        totals.refusals += sum("refused" in fact for fact in facts)
        totals.in_flight += len(open_calls)
        totals.kills_in_flight += bool(open_calls)
        ready = [fact["ready"] for fact in facts if "ready" in fact]
        totals.kills_before_ready += not ready
        for seconds in ready:
            totals.slowest_open = max(totals.slowest_open, seconds)
            assert seconds < 1.0, f"opening took {seconds:.3f} s"

    def _check_what_ran(self, facts: list[dict[str, Any]]) -> None:
        for fact in facts:
            if "ran" in fact:
                attempt = (fact["ran"], fact["attempt"])
                assert attempt not in self.ran, f"attempt {attempt} ran twice"
                assert fact["ran"] not in self.ended, f"{attempt} ran after the child had ended"
                assert fact["flow"] not in self.intents, (
                    f"{attempt} of {fact['flow']} ran although a cancel had been requested"
                )
                self.ran.add(attempt)
            elif "effect" in fact:
                effect = (fact["flow"], fact["effect"])
                assert effect not in self.done_effects, f"{effect} was done again after its record"

    # ---- what the file holds ----------------------------------------------------------------------

    def _check_mutation(self, flows: dict[str, invariants.FlowRows], ack: dict[str, Any]) -> None:
        flow = flows.get(ack["flow"])
        assert flow is not None, f"acknowledged, but lost: {ack}"
        stored = flow.doc["revision"]
        assert stored >= ack["revision"], f"acknowledged, but lost (now at {stored}): {ack}"
        if ack["ack"] not in EVENT_OF:
            return
        [event] = [
            event
            for event in flow.events
            if event["revision"] == ack["revision"] and event["type"].startswith("flow.")
        ]
        assert event["type"] == EVENT_OF[ack["ack"]], f"{ack} is told as {event}"
        if "state" in ack:
            assert event["changed"]["stateJson"] == ack["state"], f"{ack} is told as {event}"

    def _check_kept(
        self,
        flows: dict[str, invariants.FlowRows],
        tasks: dict[str, invariants.TaskRows],
        ack: dict[str, Any],
    ) -> None:
        if "task" in ack:
            task = tasks.get(ack["task"])
            assert task is not None, f"acknowledged, but lost: {ack}"
            if ack["ack"] == "ended":
                assert task.doc["status"] == ack["status"], f"{ack}, now {task.doc['status']}"
            return
        flow = flows.get(ack["flow"])
        assert flow is not None, f"acknowledged, but lost: {ack}"
        doc = flow.doc
        assert doc["revision"] >= ack["revision"], f"acknowledged, but lost: {ack}"
        if ack["intent"] is not None:
            assert doc.get("cancelRequestedAt") == ack["intent"], f"the intent is lost: {ack}"
        if ack["status"] not in LIVE:
            assert (doc["status"], doc["revision"]) == (ack["status"], ack["revision"]), (
                f"the end is not final: {ack}, now {doc}"
            )

    def _check_history_grew(self, file: invariants.File) -> None:
        """What was history before is history still, byte for byte."""
        count, digest = self.events_before
        events = invariants.dump(self.path)["events"]
        assert len(events) >= count, f"{count} events before, {len(events)} now"
        assert _digest(events[:count]) == digest or not count, "the history was rewritten"
        self.events_before = (len(events), _digest(events))

    def _check_starts(self, tasks: dict[str, invariants.TaskRows]) -> None:
        """No code ran before its start was in the file."""
        for task_id, attempt in self.ran:
            task = tasks.get(task_id)
            assert task is not None, f"attempt {attempt} of {task_id} ran, but was never recorded"
            starts = {
                event["changed"].get("attempt")
                for event in task.events
                if event["type"] == "task.started"
            }
            assert attempt in starts, f"{task.name} ran attempt {attempt}; recorded are {starts}"

    def _check_clean_end(self, tasks: dict[str, invariants.TaskRows], ran: set[str]) -> None:
        """What ran in the process that closed has ended or is back in line."""
        self.totals.clean_ends += 1
        for task in (tasks[task_id] for task_id in ran):
            assert task.doc["status"] != "running", f"{task.name} is left running by a clean end"
            self.totals.counts["released"] += task.events[-1]["type"] == "task.released"

    def _check_pipelines(self, flows: dict[str, invariants.FlowRows]) -> None:
        for flow in flows.values():
            if flow.doc.get("controllerId") != PIPELINE:
                continue
            asked = flow.doc.get("cancelRequestedAt") is not None
            failed = flow.doc["status"] == "failed" and not asked
            assert not failed, f"a controller failed: {flow.doc}"
            if flow.doc["status"] == "succeeded":
                assert flow.doc["currentStep"] == "closed", f"a controller ended early: {flow.doc}"

    def _remember(
        self, flows: dict[str, invariants.FlowRows], tasks: dict[str, invariants.TaskRows]
    ) -> None:
        for flow in flows.values():
            if flow.doc.get("cancelRequestedAt") is not None:
                self.intents.add(flow.row["flow_id"])
        for task in tasks.values():
            turns = [e["type"] for e in task.events if e["type"] in TURNS_OF_A_CHILD]
            if turns[-1:] == ["task.released"]:
                # The attempt was taken back, so the next one has its number.
                self.ran.discard((task.row["task_id"], task.doc.get("attempt", 0) + 1))
            self.totals.counts["retry outlived a process"] += task.row["due_at"] is not None
            if task.doc.get("endedAt") is None:
                continue
            self.ended[task.row["task_id"]] = task.doc["status"]
            if task.row["run_id"] in ("open", "close") and task.doc["status"] == "succeeded":
                self.done_effects.add((task.doc["flowId"], task.row["run_id"]))

    def close(self) -> None:
        """Count what has happened in this file all in all."""
        if not self.path.exists() or not self._has_a_schema():
            return
        file, counts = invariants.read(self.path), self.totals.counts
        for flow in file.flows.values():
            counts["flows"] += 1
            for event in flow.events:
                if event["type"] in MUST_HAPPEN:
                    counts[event["type"]] += event["type"].startswith("flow.")
            counts[f"flow {flow.doc['status']}"] += 1
            counts["intents"] += flow.doc.get("cancelRequestedAt") is not None
            counts["driven to the end"] += (
                flow.doc["status"] == "succeeded" and flow.doc["controllerId"] == PIPELINE
            )
        for task in file.tasks:
            counts["children"] += 1
            counts[f"child {task.doc['status']}"] += 1
            counts["restarted"] += task.doc.get("interruptions", 0)
            kinds = [event["type"] for event in task.events]
            counts["task.retry_scheduled"] += kinds.count("task.retry_scheduled")
            counts["cancelled while it ran"] += task.doc["status"] == "cancelled" and kinds[
                -2:
            ] == ["task.started", "task.ended"]
            counts["retried after a time-out"] += (
                task.doc["status"] == "timed_out" and "task.retry_scheduled" in kinds
            )
        counts["events"] += len(file.positions)


def _digest(rows: list[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def run_lane(directory: Path, lane: int, cycles: int, *, early: bool = False) -> Totals:
    """Kill and check so many times, on files that change hands every now and then.

    Raises:
        AssertionError: With the seed and the cycle in front.
    """
    totals = Totals()
    with Zygote() as zygote:
        checker: Checker | None = None
        for cycle in range(cycles):
            if cycle % CYCLES_PER_FILE == 0:
                if checker is not None:
                    checker.close()
                checker = Checker(directory / f"flows-{lane}-{cycle}.db", totals)
            assert checker is not None
            seed = SEED + lane * 1_000_000 + cycle
            rng = random.Random(seed)
            journal = directory / f"journal-{lane}-{cycle}.jsonl"
            child = zygote.fork(
                "load",
                journal,
                path=str(checker.path),
                seed=seed,
                early=early,
                strict=not early,
                full=rng.random() < 0.5,
            )
            # One in five while the file is being opened or its flows are being recovered.
            is_opening = rng.random() < 0.2
            after = rng.uniform(0.0, 0.03) if is_opening else rng.uniform(0.02, 0.25)
            # One in six is asked to end, in the midst of its calls, and has to do so well.
            is_asked = not early and rng.random() < 1 / 6
            if not is_opening:
                child.says("ready")
            time.sleep(after)
            if is_asked:
                child.signal(signal.SIGTERM)
                assert child.wait() in (0, -signal.SIGTERM), child.facts()[-3:]
            else:
                child.kill()
            try:
                checker.check(read_journal(journal))
            except AssertionError as error:
                raise AssertionError(
                    f"lane {lane}, cycle {cycle}, seed {seed}, killed after {after:.4f} s,"
                    f" file {checker.path}: {error}"
                ) from error
        if checker is not None:
            checker.close()
    return totals


@pytest.mark.timeout(600 + 5 * CYCLES)
def test_killed_at_any_moment_nothing_acknowledged_is_lost_and_the_file_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    share = [CYCLES // LANES + (lane < CYCLES % LANES) for lane in range(LANES)]

    with ThreadPoolExecutor(LANES) as lanes:
        jobs = [lanes.submit(run_lane, tmp_path, lane, share[lane]) for lane in range(LANES)]
        totals = Totals()
        for job in jobs:
            totals.add(job.result())

    with capsys.disabled():
        print(f"\n  {totals} in {time.monotonic() - began:.1f} s")  # noqa: T201
    counts = totals.counts
    assert totals.cycles == CYCLES
    assert totals.acks > 10 * CYCLES, totals
    assert totals.kills_in_flight > CYCLES // 3, totals
    assert totals.kills_before_ready > 0, totals
    assert totals.clean_ends > CYCLES // 20, totals
    for what in MUST_HAPPEN:
        assert counts[what] > 0, (what, totals)


def test_a_store_that_acknowledges_before_it_writes_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="acknowledged, but lost"):
        run_lane(tmp_path, 7, 20, early=True)
