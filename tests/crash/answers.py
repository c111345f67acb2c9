"""What must have become of all that was sent to flows, and of all that flows had to tell: held against the file.

Each payload occurs once in everything that was ever sent, so where it comes out says who was answered by what.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from tests import invariants
from tests.crash.carrier import is_deliverable, read_delivered
from tests.crash.waits import WAITER

OWNER = "agent:main:main"
NOT_TAKEN = frozenset({"late", "unawaited", "not_found"})


class Answer(NamedTuple):
    """Where a payload has come out: in a wait that is a child, or in that of the flow itself."""

    flow_id: str
    task: invariants.TaskRows | None
    event: dict[str, Any]


class Found:
    """A file, by what has come in."""

    def __init__(self, file: invariants.File) -> None:
        self.flows = {flow.row["flow_id"]: flow for flow in file.flows.values()}
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self.letters: dict[str, list[invariants.TaskRows]] = defaultdict(list)
        self.by_id = {s.row["signal_id"]: s for s in file.signals}
        self.by_payload: dict[str, list[invariants.Row]] = defaultdict(list)
        for signal in file.signals:
            if (number := _number(signal.doc.get("payload"))) is not None:
                self.by_payload[number].append(signal)
        for flow in file.flows.values():
            self._read(flow)

    def _read(self, flow: invariants.FlowRows) -> None:
        flow_id = flow.row["flow_id"]
        for task in flow.tasks.values():
            if task.carried_from is not None:
                continue
            if task.letter is not None and (n := _number(task.doc.get("inputJson"))) is not None:
                self.letters[n].append(task)
            if task.wait is None or task.doc["status"] != "succeeded":
                continue
            result = task.doc.get("resultJson")
            payload = result["body"] if task.wait["kind"] == "message" else result
            if (n := _number(payload)) is not None:
                self.answers[n].append(Answer(flow_id, task, task.events[-1]))
        for event in flow.events:
            told = event.get("changed", {}).get("answerJson")
            if isinstance(told, dict) and (n := _number(told.get("payload"))) is not None:
                self.answers[n].append(Answer(flow_id, None, event))

    def step(self, flow_id: str, name: str) -> invariants.TaskRows | None:
        """The step of this name."""
        tasks = self.flows[flow_id].tasks.values()
        return next((task for task in tasks if task.row["run_id"] == name), None)


def _number(payload: Any) -> str | None:
    return payload.get("n") if isinstance(payload, dict) else None


class Answers:
    """All that was sent to the flows of one file, and all that was told of them."""

    def __init__(self, delivered: Path, counts: Counter[str]) -> None:
        self.delivered = delivered
        self.counts = counts
        self.unanswered: dict[str, dict[str, Any]] = {}
        self._specs: dict[str, dict[str, Any]] = {}
        self._acks: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._votes: list[dict[str, Any]] = []
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        self._parked: set[str] = set()

    def note(self, facts: list[dict[str, Any]]) -> None:
        """Learn what a life has told.

        Raises:
            AssertionError: A controller was told something else than before.
        """
        begun: dict[int, dict[str, Any]] = {}
        for fact in facts:
            if "spec" in fact:
                spec = begun[fact["begin"]] = fact["spec"]
                self._specs[spec["payload"]["n"]] = spec
                if spec["id"] is not None:
                    self.unanswered[spec["id"]] = spec
            elif fact.get("ack") == "sent":
                spec = begun[fact["done"]]
                self._acks.append((spec, fact))
                self.unanswered.pop(spec["id"], None)
                self._count(spec, fact)
            elif fact.get("ack") == "vote":
                self._votes.append(fact)
                self.counts[f"vote {fact['code']}"] += 1
            elif "found" in fact:
                self._note_found(fact)

    def _count(self, spec: dict[str, Any], ack: dict[str, Any]) -> None:
        self.counts[f"{spec['form']} {ack['code']}"] += 1
        self.counts["woke several"] += len(ack.get("flows", ())) > 1
        if ack.get("again"):
            self.counts["sent again"] += 1
            self.counts["sent again and known"] += ack["code"] == "duplicate"

    def _note_found(self, fact: dict[str, Any]) -> None:
        before = self._found.setdefault((fact["flow"], fact["step"]), fact)
        if before is not fact:
            self.counts["told again"] += 1
        assert before["found"] == fact["found"], f"a controller was told {before}, and then {fact}"

    # ---- the file ---------------------------------------------------------------------------------

    def check(self, file: invariants.File, *, at_rest: bool) -> None:
        """Hold everything against the file.

        Raises:
            AssertionError: Something that was sent counts twice, has come out elsewhere, or is lost.
        """
        found = Found(file)
        for spec in self._specs.values():
            _check_sent(found, spec)
        for spec, ack in self._acks:
            _check_ack(found, spec, ack)
        for ack in self._votes:
            _check_vote(found, ack)
        for fact in self._found.values():
            _check_found(found, fact)
        for flow in file.flows.values():
            _check_grants(flow)
            self._check_waiter(flow, at_rest=at_rest)
        self._check_told(file, at_rest=at_rest)

    def _check_waiter(self, flow: invariants.FlowRows, *, at_rest: bool) -> None:
        if flow.doc.get("controllerId") != WAITER:
            return
        doc = flow.doc
        asked = doc.get("cancelRequestedAt") is not None
        assert doc["status"] != "failed" or asked, f"a controller failed: {doc}"
        if at_rest:
            assert asked or doc["status"] == "succeeded", f"{flow.name} never came back: {doc}"
            return
        if doc["status"] == "waiting" and doc.get("parkAt") is None and doc.get("awaiting"):
            self._parked.add(flow.row["flow_id"])

    def _check_told(self, file: invariants.File, *, at_rest: bool) -> None:
        """What has arrived was on record before, each end once; what is recorded as arrived has."""
        lines = read_delivered(self.delivered)
        arrived = {line["key"] for line in lines}
        rows = {update.doc["idempotencyKey"]: update for update in file.updates}
        flows = {flow.row["flow_id"]: flow for flow in file.flows.values()}
        ends: dict[str, str] = {}
        for line in lines:
            flow = flows.get(line["flow"])
            assert flow is not None, f"{line} tells of a flow that is not there"
            assert line["revision"] <= flow.doc["revision"], f"{line} came before its record"
            if line["kind"] == "progress":
                # A newer one may have taken its place.
                assert line["flow"] not in ends, f"{line} came after the end"
                continue
            assert line["key"] in rows, f"{line} came before its record"
            if line["kind"] == "done":
                key = ends.setdefault(line["flow"], line["key"])
                assert key == line["key"], f"the end of {line['flow']} was told under two names"
                said = (line["status"], line["revision"])
                assert said == (flow.doc["status"], flow.doc["revision"]), f"{line}, but {flow.doc}"
        for key, update in rows.items():
            status = update.row["status"]
            if status == "delivered":
                assert key in arrived, f"{update.name} is recorded as delivered, and never came"
            if status == "delivery_failed":
                assert not is_deliverable(key), f"{update.name} was given up: {update.doc}"
                slots = [
                    event["changed"]["slot"]
                    for event in file.flows[update.row["flow_key"]].events
                    if event["type"] == "update.failed"
                ]
                assert update.row["slot"] in slots, f"{update.name} failed in silence"
            if at_rest and update.row["bucket"] is None:
                assert status != "pending", f"{update.name} never went out: {update.doc}"

    def close(self, file: invariants.File) -> None:
        """Count what has happened in a file all in all."""
        counts = self.counts
        for flow in file.flows.values():
            self._count_flow(flow)
        for signal in file.signals:
            was_kept = signal.doc.get("expiresAt") is not None
            counts["kept, and taken later"] += was_kept and bool(signal.doc.get("takenBy"))
        for update in file.updates:
            counts[f"update {update.row['slot'].split(':')[0]}"] += 1
            counts[f"update {update.row['status']}"] += 1
            counts["delivered after a failure"] += (
                update.row["status"] == "delivered" and update.doc["attempt"] > 1
            )
        lines = read_delivered(self.delivered)
        counts["delivered twice"] += sum(
            times > 1 for times in Counter(line["key"] for line in lines).values()
        )
        counts["delivered digests"] += sum(line["kind"] == "digest" for line in lines)

    def _count_flow(self, flow: invariants.FlowRows) -> None:
        counts = self.counts
        kinds = [event["type"] for event in flow.events]
        counts["parked"] += kinds.count("flow.parked")
        if "flow.parked" in kinds and flow.doc["status"] == "succeeded":
            counts["came back"] += 1
            counts["came back from a kill"] += flow.row["flow_id"] in self._parked
        for task in flow.tasks.values():
            if task.wait is not None and task.carried_from is None:
                counts[f"{task.wait['kind']} {task.doc['status']}"] += 1
                for kind in ("task.reminded", "task.overdue", "task.voted"):
                    counts[kind] += task.kinds.count(kind)
            counts["taken"] += "task.taken" in task.kinds
            counts["paid"] += (task.row["run_id"] or "").endswith("/paid")
        counts["own wait timed out"] += any(
            (event.get("changed", {}).get("answerJson") or {}).get("timedOut")
            for event in flow.events
        )


def _check_sent(found: Found, spec: dict[str, Any]) -> None:
    """Whatever was answered or not: nothing counts twice, and what has an id is where its row says."""
    number, form = spec["payload"]["n"], spec["form"]
    answers, letters = found.answers[number], found.letters[number]
    flows = Counter(answer.flow_id for answer in answers)
    assert not flows or max(flows.values()) == 1, f"{spec} has answered twice: {answers}"
    assert form == "key" or len(answers) <= 1, f"{spec} has answered several: {answers}"
    assert len(letters) <= 1, f"{spec} came twice: {[letter.name for letter in letters]}"
    for answer in answers:
        _check_fits(found, spec, answer)
    if spec["id"] is None:
        return
    row = found.by_id.get(spec["id"])
    if row is None:
        assert not answers and not letters, f"{spec} has come out, and its id is not on record"
    elif row.row["kept"]:
        assert not answers, f"{spec} is kept, and has come out: {answers}"
    elif form in ("key", "token"):
        assert answers, f"{spec} was taken by {row.doc['takenBy']}, and has come out nowhere"
    else:
        assert letters, f"{spec} was taken in, and is not there"


def _check_fits(found: Found, spec: dict[str, Any], answer: Answer) -> None:
    task, form = answer.task, spec["form"]
    if form != "key":
        assert answer.flow_id == spec["flow"], f"{spec} has answered another flow: {answer}"
    if task is None:
        flow = found.flows[answer.flow_id]
        waits = [
            event["changed"]["waitJson"]
            for event in flow.events[: answer.event["seq"] - 1]
            if event.get("changed", {}).get("waitJson") is not None
        ]
        if form == "key":
            assert waits[-1].get("topic") == spec["topic"], f"{spec} has answered {waits[-1]}"
        return
    assert task.wait is not None
    if form == "key":
        digest = invariants.wait_key_of(OWNER, {"topic": spec["topic"]})
        assert task.wait.get("waitKey") == digest, f"{spec} has answered {task.doc}"
    elif form == "token":
        assert task.wait["token"] == spec["token"], f"{spec} has answered {task.doc}"
    elif form == "step":
        assert task.row["run_id"] == spec["step"], f"{spec} has answered {task.doc}"
    deadline = task.wait.get("deadlineAt")
    # One that only blocks its flow stays open, and is answered late.
    in_time = (
        deadline is None or task.wait.get("onTimeout") == "block" or answer.event["at"] < deadline
    )
    assert in_time, f"{spec} has answered {task.name} after its deadline"


def _check_ack(found: Found, spec: dict[str, Any], ack: dict[str, Any]) -> None:
    number, code = spec["payload"]["n"], ack["code"]
    answers, letters = found.answers[number], found.letters[number]
    if code == "matched":
        told, woken = set(ack["flows"]), {answer.flow_id for answer in answers}
        assert woken == told, f"acknowledged, but lost: {spec} woke {told}, and stored is {woken}"
    elif code == "kept":
        is_there = letters or found.by_payload[number]
        assert is_there, f"acknowledged, but lost: {spec} was kept"
    elif code == "duplicate":
        assert spec["id"] in found.by_id, f"{spec} is a duplicate of nothing"
    elif code == "replied":
        [letter] = letters
        said = (letter.doc["status"], letter.doc.get("resultJson"))
        right = ("succeeded", {"re": spec["payload"]})
        assert said == right, f"acknowledged, but lost: {spec} was answered, now {letter.doc}"
    else:
        assert code in NOT_TAKEN, f"{spec} was answered {code}"
        assert not answers and not letters, f"{spec} was turned away as {code}, and has come out"


def _check_vote(found: Found, ack: dict[str, Any]) -> None:
    flow_id, step, approver = ack["owner_of_vote"], ack["step"], ack["approver"]
    task = found.step(flow_id, step)
    early = [
        letter
        for letter in found.flows[flow_id].tasks.values()
        if (letter.letter or {}).get("inbox") == f"approval:{step}"
        and letter.doc["inputJson"]["approver"] == approver
    ]
    if ack["code"] == "kept":
        assert early, f"acknowledged, but lost: {ack}"
        return
    assert task is not None and task.wait is not None, f"acknowledged, but lost: {ack}"
    votes = task.wait["approval"]["votes"]
    counted = [(vote["approver"], vote["kind"]) for vote in votes]
    assert counted.count((approver, ack["decision"])) == 1, f"acknowledged, but lost: {ack}"
    voters = [vote["approver"] for vote in votes]
    assert len(set(voters)) == len(voters), f"{task.name}: somebody counts twice: {votes}"
    if ack["verdict"] is not None:
        verdict = task.doc["resultJson"]["verdict"]
        assert verdict == ack["verdict"], f"acknowledged, but lost: {ack}, now {verdict}"


def _check_found(found: Found, fact: dict[str, Any]) -> None:
    """What a controller was told was on record before."""
    flow = found.flows[fact["flow"]]
    kind = fact["step"].split("-")[1]
    name = f"{fact['step']}/answer" if kind == "select" else fact["step"]
    task = found.step(fact["flow"], name)
    assert task is not None, f"{fact}, and there is no such step"
    assert not task.is_active, f"{fact}, and {task.name} is open"
    if kind == "sleep" and fact["found"] == "slept" and task.carried_from is None:
        assert fact["at"] >= task.doc["wait"]["deadlineAt"], f"{fact} is before {task.doc['wait']}"
    if kind in ("key", "patient") and task.doc["status"] == "succeeded":
        assert fact["found"] == task.doc["resultJson"], f"{fact}, and stored is {task.doc}"
    # What was decided about an ended flow is stale in the one that goes on from it.
    is_decided = task.carried_from is None and "verdict" in (task.doc.get("resultJson") or {})
    if kind == "approve" and is_decided:
        verdict = task.doc["resultJson"]["verdict"]
        assert fact["found"] in (verdict, "not approved"), f"{fact}, and stored is {task.doc}"
    if kind == "select" and fact["found"] != "withdrawn":
        winner = found.step(fact["flow"], fact["found"][0])
        assert winner is not None and not winner.is_active, f"{fact} of {flow.name}"


def _check_grants(flow: invariants.FlowRows) -> None:
    """What was approved is done once, and on record as used if it was."""
    for name, grant in flow.doc.get("grants", {}).items():
        paid = [t for t in flow.tasks.values() if t.row["run_id"] == f"{name}/paid"]
        used = grant.get("usedBy")
        assert (used is not None) == bool(paid), f"{flow.name}: {name} is used by {used}: {paid}"
    for task in flow.tasks.values():
        name = task.row["run_id"] or ""
        if name.endswith("/paid") and task.carried_from is None:
            granted = name.removesuffix("/paid") in flow.doc.get("grants", {})
            assert granted, f"{task.name} was done without a grant"
