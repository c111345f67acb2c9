"""Killed or asked to end at any moment: whatever was acknowledged is there, and the file is whole, every time."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flowstead.store.schema import VERSION
from tests import invariants
from tests.crash.answers import Answers
from tests.crash.census import alive_programs, end_programs, marks_in
from tests.crash.children import ONCE, PIPELINE, RETRY_AFTER, TREE
from tests.crash.harness import Child, Zygote, read_journal
from tests.crash.load import A_DAY, LIVE

CYCLES = int(os.environ.get("FLOWSTEAD_KILL_CYCLES", "60"))
SEED = int(os.environ.get("FLOWSTEAD_KILL_SEED", "20261122"))
LANES = 2
CYCLES_PER_FILE = 25
LONGEST_JOURNAL = 40_000
LONGEST_LIFE = 3.0
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
    *("task.review_requested", "task.retry_requested", "cancelled in review", "told to wait"),
    *("sent away at the door", "idle", "never started", "killed", "abandoned", "interrupted"),
    *("in a thread", "nested", "cancelled from above", "three floors", "mirrored"),
    *("gone on from", "carried", "restarted program", "programs outlived us", "programs alone"),
    *("key matched", "key kept", "key late", "key duplicate", "kept, and taken later"),
    *("woke several", "step matched", "token matched", "tell matched", "tell kept"),
    *("sent again", "sent again and known", "told again", "taken"),
    *("parked", "came back", "came back from a kill", "signal succeeded", "signal timed_out"),
    *("signal cancelled", "timer succeeded", "timer cancelled", "message succeeded"),
    *("vote counted", "task.voted", "approval succeeded", "paid", "task.reminded"),
    *("task.overdue", "own wait timed out", "update done", "update notice", "update reminder"),
    *("update progress", "update superseded", "update delivered", "update delivery_failed"),
    *("update digested", "delivered twice", "delivered after a failure", "delivered digests"),
)
MAY_END_AS = {
    "quick": {"succeeded"},
    "slow": {"succeeded"},
    "broken": {"failed"},
    "flaky": {"succeeded", "failed"},
    "patient": {"succeeded"},
    "stuck": {"timed_out"},
    "fragile": {"succeeded", "lost"},
    "picky": {"succeeded"},
    "busy": {"succeeded"},
    "locked": {"failed"},
    "hopeless": {"failed"},
    "idle": {"timed_out"},
    "narrow": {"succeeded", "timed_out"},
    "stubborn": {"succeeded"},
    "threaded": {"succeeded"},
    "blind": {"succeeded", "lost"},
}
"""How a child of each sort may end, but for being cancelled."""
EXACTLY = {"quick": 1, "slow": 1, "broken": 1, "flaky": 3, "patient": 5, "stuck": 2, "busy": 3}
"""How many attempts a child of each sort takes if no crash cuts it off."""

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

    def __init__(self, path: Path, totals: Totals, *, tells: bool = True) -> None:
        self.path = path
        self.tells = tells
        self.folder = path.with_suffix(".programs")
        self.folder.mkdir()
        self.totals = totals
        self.acks: list[dict[str, Any]] = []
        self.ran: set[tuple[str, int]] = set()
        self.begun: Counter[str] = Counter()
        self.intents: set[str] = set()
        self.above: dict[str, str] = {}
        self.done_effects: set[tuple[str, str]] = set()
        self.ended: dict[str, str] = {}
        self.answers = Answers(self.folder / "delivered", totals.counts)
        self.events_before = (0, "")

    def check(self, facts: list[dict[str, Any]], pid: int) -> None:
        """Check the file after a kill, given what the killed process told, and its number.

        Raises:
            AssertionError: Something acknowledged is not there, or an invariant does not hold.
        """
        for fact in facts:
            assert "crash" not in fact, f"the worker failed:\n{fact['crash']}"
            assert "wrong" not in fact, f"the worker was told something wrong: {fact['wrong']}"
        self._count(facts)
        self.answers.note(facts)
        self._check_what_ran(facts)
        if not self.path.exists():
            assert not [fact for fact in facts if "ready" in fact], "the file is gone"
            return
        if not self._has_a_schema():
            assert not [fact for fact in facts if "ready" in fact], "the schema is gone"
            return
        file = invariants.check_all(self.path, tells=self.tells)
        news = [fact for fact in facts if "ack" in fact and fact["ack"] not in ("sent", "vote")]
        self.acks += news
        flows = {flow.row["flow_id"]: flow for flow in file.flows.values()}
        tasks = {task.row["task_id"]: task for task in file.tasks}
        for ack in news:
            if "revision" in ack:
                self._check_mutation(flows, ack)
        for ack in self.acks:
            self._check_kept(flows, tasks, ack)
        self._check_history_grew(file)
        self.above = {
            flow.row["flow_id"]: tasks[flow.doc["parentTaskId"]].doc["flowId"]
            for flow in flows.values()
            if "parentTaskId" in flow.doc
        }
        self._check_nothing_runs_below(facts)
        self._check_starts(tasks)
        self._check_controllers(flows)
        self._check_sorts(flows, tasks)
        self._check_programs(tasks)
        at_rest = any("settled" in fact for fact in facts)
        self.answers.check(file, at_rest=at_rest)
        if any("closed" in fact for fact in facts):
            self._check_clean_end(tasks, {fact["ran"] for fact in facts if "ran" in fact}, pid)
        if at_rest:
            self._check_rest(flows, tasks)
        self._remember(flows, tasks)

    def _has_a_schema(self) -> bool:
        """Not if the process was killed in the middle of making the file, or before anybody owned it."""
        if self.path.with_name(self.path.name + "-journal").exists():
            return False
        connection = sqlite3.connect(self.path.as_uri() + "?mode=ro", uri=True)
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                return False
            return connection.execute("SELECT epoch FROM ownership").fetchone()[0] > 0
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
                self.begun[fact["ran"]] += 1
                if fact["sort"] in ONCE:
                    assert self.begun[fact["ran"]] == 1, f"{fact} was begun twice"
                self.totals.counts["in a thread"] += fact["sort"] in ("threaded", "blind")
            elif "effect" in fact:
                effect = (fact["flow"], fact["effect"])
                assert effect not in self.done_effects, f"{effect} was done again after its record"

    def _check_nothing_runs_below(self, facts: list[dict[str, Any]]) -> None:
        """Once a flow is known to be cancelled, no code begins in it, nor in any flow below it."""
        cancelled: set[str] = set()
        for fact in facts:
            if fact.get("ack") == "cancelled":
                cancelled.add(fact["flow"])
            elif "ran" in fact:
                above = set(self._upwards(fact["flow"])) & cancelled
                assert not above, f"{fact} ran, and {above} were cancelled"

    def _upwards(self, flow_id: str) -> Iterator[str]:
        """A flow and those it is nested in, from the bottom to the top."""
        here: str | None = flow_id
        while here is not None:
            yield here
            here = self.above.get(here)

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
            if ack["ack"] == "told to retry":
                assert "task.retry_requested" in task.kinds, f"acknowledged, but lost: {ack}"
            assert ack.get("flow") is None or ack["flow"] in flows, f"acknowledged, but lost: {ack}"
            return
        flow = flows.get(ack["flow"])
        assert flow is not None, f"acknowledged, but lost: {ack}"
        doc = flow.doc
        assert doc["revision"] >= ack["revision"], f"acknowledged, but lost: {ack}"
        if "origin" in ack:
            assert doc["retryOf"] == ack["origin"], f"acknowledged, but lost: {ack}"
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

    def _check_sorts(
        self, flows: dict[str, invariants.FlowRows], tasks: dict[str, invariants.TaskRows]
    ) -> None:
        """Each child that has ended did so as it had to, after as many attempts as it had to have."""
        for task in tasks.values():
            sort = task.doc.get("launch", {}).get("function")
            if sort == "busy":
                self._check_waits(task)
            ended = task.doc.get("endedAt") is not None
            if sort is None or not ended or task.doc["status"] == "cancelled":
                continue
            if _is_hampered(task, flows[task.doc["flowId"]]):
                continue
            _check_end(sort, task)

    def _check_waits(self, task: invariants.TaskRows) -> None:
        for event in task.events:
            if event["type"] == "task.retry_scheduled":
                delay = event["changed"]["nextAttemptAt"] - event["at"]
                assert delay >= RETRY_AFTER * 1000, f"{task.name} waits {delay} ms only"

    def _check_programs(self, tasks: dict[str, invariants.TaskRows]) -> None:
        """No program was begun without a record, beside another of its child, or twice where that must not be."""
        seen: Counter[str] = Counter()
        attempts: Counter[tuple[str, int]] = Counter()
        for mark in marks_in(self.folder):
            task = tasks.get(mark.child)
            assert task is not None, f"a program of {mark} was begun, but never recorded"
            assert mark.is_alone, f"{mark} was begun while another program of {task.name} lived"
            seen[mark.child] += 1
            attempts[mark.child, mark.attempt, mark.parent] += 1
            if task.doc["launch"].get("onRestart") == "lost":
                assert seen[mark.child] == 1, f"{task.name} was begun twice, and must not be"
        twice = [which for which, times in attempts.items() if times > 1]
        assert not twice, f"the same attempt was begun twice: {twice}"
        self.totals.counts["restarted program"] += sum(times > 1 for times in seen.values())

    def _check_clean_end(
        self, tasks: dict[str, invariants.TaskRows], ran: set[str], pid: int
    ) -> None:
        """What ran in the process that closed has ended or is back in line, and nothing it started lives."""
        self.totals.clean_ends += 1
        for task in (tasks[task_id] for task_id in ran):
            assert task.doc["status"] != "running", f"{task.name} is left running by a clean end"
            self.totals.counts["released"] += task.events[-1]["type"] == "task.released"
        alive = alive_programs()
        left = [m for m in marks_in(self.folder) if m.parent == pid and alive.get(m.pid) == m.child]
        assert not left, f"programs live on after a clean end: {left}"

    def _check_rest(
        self, flows: dict[str, invariants.FlowRows], tasks: dict[str, invariants.TaskRows]
    ) -> None:
        """After the last life nothing is left to do, and nothing alive."""
        for flow in flows.values():
            assert flow.doc["status"] not in LIVE, f"{flow.name} is left {flow.doc['status']}"
        for task in tasks.values():
            is_ours = task.row["launched"] or task.wait is not None or task.letter is not None
            ended = task.doc.get("endedAt") is not None or not is_ours
            assert ended, f"{task.name} is left {task.doc['status']}"
        alive = {pid: child for pid, child in alive_programs().items() if child in tasks}
        assert not alive, f"processes live on after the last life: {alive}"

    def _check_controllers(self, flows: dict[str, invariants.FlowRows]) -> None:
        for flow in flows.values():
            if flow.doc.get("controllerId") not in (PIPELINE, TREE):
                continue
            asked = flow.doc.get("cancelRequestedAt") is not None
            failed = flow.doc["status"] == "failed" and not asked
            assert not failed, f"a controller failed: {flow.doc}"
            if flow.doc["status"] == "succeeded":
                assert flow.doc["currentStep"] == "closed", f"a controller ended early: {flow.doc}"

    def _remember(
        self, flows: dict[str, invariants.FlowRows], tasks: dict[str, invariants.TaskRows]
    ) -> None:
        for flow_id in flows:
            if any("cancelRequestedAt" in flows[above].doc for above in self._upwards(flow_id)):
                self.intents.add(flow_id)
        alive = alive_programs()
        self.totals.counts["programs outlived us"] += sum(c in tasks for c in alive.values())
        for task in tasks.values():
            turns = [e["type"] for e in task.events if e["type"] in TURNS_OF_A_CHILD]
            if turns[-1:] == ["task.released"]:
                # The attempt was taken back, so the next one has its number.
                self.ran.discard((task.row["task_id"], task.doc.get("attempt", 0) + 1))
            waits = task.doc.get("nextAttemptAt") is not None
            self.totals.counts["retry outlived a process"] += waits
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
        self.answers.close(file)
        for flow in file.flows.values():
            counts["flows"] += 1
            for event in flow.events:
                if event["type"] in MUST_HAPPEN:
                    counts[event["type"]] += event["type"].startswith("flow.")
            counts[f"flow {flow.doc['status']}"] += 1
            counts["intents"] += flow.doc.get("cancelRequestedAt") is not None
            counts["driven to the end"] += (
                flow.doc["status"] == "succeeded" and flow.doc.get("controllerId") == PIPELINE
            )
        for task in file.tasks:
            counts["children"] += 1
            counts[f"child {task.doc['status']}"] += 1
            counts["restarted"] += task.doc.get("interruptions", 0)
            self._count_child(task)
        marks = marks_in(self.folder)
        counts["programs alone"] += sum(mark.is_alone for mark in marks)
        counts["nested"] += sum("parentTaskId" in flow.doc for flow in file.flows.values())
        counts["three floors"] += sum(flow.doc.get("depth", 0) == 2 for flow in file.flows.values())
        counts["gone on from"] += sum("retryOf" in flow.doc for flow in file.flows.values())
        counts["cancelled from above"] += sum(
            "parentTaskId" in flow.doc and flow.doc["status"] == "cancelled"
            for flow in file.flows.values()
        )
        counts["mirrored"] += sum(
            flow.doc["syncMode"] == "task_mirrored" for flow in file.flows.values()
        )
        counts["events"] += len(file.positions)

    def _count_child(self, task: invariants.TaskRows) -> None:
        counts, kinds = self.totals.counts, task.kinds
        failure, status = task.doc.get("failure") or {}, task.doc["status"]
        for kind in ("task.retry_scheduled", "task.review_requested", "task.retry_requested"):
            counts[kind] += kinds.count(kind)
        asked = status == "cancelled" and "task.cancel_requested" in kinds
        counts["cancelled while it ran"] += asked
        timed_out = status == "timed_out"
        counts["retried after a time-out"] += timed_out and "task.retry_scheduled" in kinds
        counts["cancelled in review"] += kinds[-2:] == ["task.review_requested", "task.ended"]
        counts["sent away at the door"] += failure.get("category") == "auth"
        counts["idle"] += failure.get("code") == "idle"
        sort = task.doc.get("launch", {}).get("function")
        counts["told to wait"] += sort == "busy" and "task.retry_scheduled" in kinds
        counts["never started"] += failure.get("code") == "queue"
        counts["killed"] += "task.kill_requested" in kinds
        counts["abandoned"] += failure.get("kind") == "abandoned"
        counts["interrupted"] += failure.get("code") == "unknown"
        counts["carried"] += task.carried_from is not None


def _is_hampered(task: invariants.TaskRows, flow: invariants.FlowRows) -> bool:
    """Whether the child ended while nothing new might start any more, so that it was not tried again."""
    if task.doc.get("cancelRequestedAt") is not None:
        return True
    stops = [
        event["seq"]
        for event in flow.events
        if event["type"] in (*invariants.FLOW_ENDS, "flow.cancel_requested")
    ]
    return bool(stops) and min(stops) < task.events[-1]["seq"]


def _check_end(sort: str, task: invariants.TaskRows) -> None:
    doc, failure, status = task.doc, task.doc.get("failure") or {}, task.doc["status"]
    interruptions = doc.get("interruptions", 0)
    attempts = doc.get("attempt", 0) - interruptions
    assert status in MAY_END_AS[sort], f"{task.name}, {sort}, is {status}: {doc}"
    if sort in ("locked", "hopeless"):
        assert attempts == 1, f"{task.name}, {sort}, has had {attempts} attempts"
        assert failure["category"] == {"locked": "auth"}.get(sort, "fatal"), doc
    elif sort == "idle":
        assert failure["code"] == "idle", doc
    elif status == "lost":
        assert (failure["kind"], failure["code"]) == ("interrupted", "unknown"), doc
    elif sort in EXACTLY and not interruptions:
        assert attempts == EXACTLY[sort], f"{task.name}, {sort}, took {attempts} attempts"


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
    try:
        return _run_lane(directory, lane, cycles, early=early)
    finally:
        for folder in directory.glob(f"flows-{lane}-*.programs"):
            end_programs(folder)


def _run_lane(directory: Path, lane: int, cycles: int, *, early: bool) -> Totals:
    totals = Totals()
    with Zygote() as zygote:
        checker: Checker | None = None
        for cycle in range(cycles):
            if cycle % CYCLES_PER_FILE == 0:
                if checker is not None:
                    end_file(zygote, checker, directory / f"last-{lane}-{cycle}.jsonl")
                checker = Checker(directory / f"flows-{lane}-{cycle}.db", totals)
            assert checker is not None
            seed = SEED + lane * 1_000_000 + cycle
            rng = random.Random(seed)
            journal = directory / f"journal-{lane}-{cycle}.jsonl"
            child = zygote.fork(
                "load",
                journal,
                path=str(checker.path),
                folder=str(checker.folder),
                seed=seed,
                early=early,
                strict=not early,
                full=rng.random() < 0.5,
                unanswered=list(checker.answers.unanswered.values()),
            )
            # One in five while the file is being opened or its flows are being recovered.
            is_opening = rng.random() < 0.2
            after = rng.uniform(0.0, 0.03)
            told = 0 if is_opening else rng.randrange(LONGEST_JOURNAL)
            # One in six is asked to end, in the midst of its calls, and has to do so well.
            is_asked = not early and rng.random() < 1 / 6
            if not is_opening:
                child.says("ready")
                _has_told(child, told)
            time.sleep(after)
            if is_asked:
                child.signal(signal.SIGTERM)
                assert child.wait() in (0, -signal.SIGTERM), child.facts()[-3:]
            else:
                child.kill()
            try:
                checker.check(read_journal(journal), child.pid)
            except AssertionError as error:
                raise AssertionError(
                    f"lane {lane}, cycle {cycle}, seed {seed}, killed {after:.4f} s after {told}"
                    f" bytes, file {checker.path}: {error}"
                ) from error
            totals.cycles += 1
        if checker is not None and not early:
            end_file(zygote, checker, directory / f"last-{lane}.jsonl")
    return totals


def _has_told(child: Child, size: int) -> None:
    """Wait until a life has got so far, by the size of its journal; a slow machine lets it live longer."""
    deadline = time.monotonic() + LONGEST_LIFE
    while child.journal.stat().st_size < size and time.monotonic() < deadline:
        time.sleep(0.001)


def end_file(zygote: Zygote, checker: Checker, journal: Path) -> None:
    """Give a file one last owner, who brings everything to its end, and look whether anything is left.

    And another one when the day is over, who sends the digests.
    """
    for day in (0, 1):
        last = zygote.fork(
            "load",
            journal.with_suffix(f".{day}.jsonl"),
            path=str(checker.path),
            folder=str(checker.folder),
            seed=-day,
            last=True,
            ahead=2 * day * A_DAY,
            unanswered=list(checker.answers.unanswered.values()),
        )
        assert last.wait() == 0, last.facts()[-3:]
        facts = last.facts()
        assert any("settled" in fact for fact in facts), facts[-3:]
        checker.check(facts, last.pid)
    checker.close()


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
