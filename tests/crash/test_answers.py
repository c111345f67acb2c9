"""What is held against a file after each kill can fail: an answer that is not there, or is another, is found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import invariants
from tests.crash.answers import Answers
from tests.crash.carrier import read_delivered
from tests.crash.harness import Zygote, until

pytestmark = pytest.mark.crash

SUBJECTS = ("key matched", "tell matched", "key kept", "vote counted", "found", "late", "delivered")
Facts = list[dict[str, Any]]


class Life:
    """A life that was killed: what it told, and what it left."""

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.facts = facts
        self.file = invariants.check_all(folder / "flows.db", tells=True)
        self.delivered = folder / "delivered"

    def check(self, facts: Facts) -> Answers:
        answers = Answers(self.delivered, Counter())
        answers.note(facts)
        answers.check(self.file, at_rest=False)
        return answers

    def copy(self) -> Facts:
        copy: Facts = json.loads(json.dumps(self.facts))
        return copy


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    folder = tmp_path_factory.mktemp("life")
    with Zygote() as zygote:
        child = zygote.fork(
            "load",
            folder / "journal",
            path=str(folder / "flows.db"),
            folder=str(folder),
            seed=1,
            unanswered=[],
        )

        def has_come_to_pass() -> bool:
            facts = child.facts()
            assert not any("crash" in fact for fact in facts), facts[-1]
            return len(read_delivered(folder / "delivered")) > 1 and all(
                subject == "delivered" or _acks(facts, subject) for subject in SUBJECTS
            )

        until(has_come_to_pass, f"each of {SUBJECTS}")
        child.kill()
        yield Life(folder, child.facts())


def _acks(facts: Facts, subject: str) -> Facts:
    """The answers of one sort."""
    if subject == "found":
        told = [fact for fact in facts if "found" in fact and "key" in fact["step"]]
        return [fact for fact in told if fact["found"] != "withdrawn"]
    if subject == "vote counted":
        return [fact for fact in facts if fact.get("ack") == "vote" and fact["code"] == "counted"]
    begun = {fact["begin"]: fact["spec"] for fact in facts if "spec" in fact}
    times = Counter(spec["payload"]["n"] for spec in begun.values())
    *forms, code = subject.split()
    return [
        fact
        for fact in facts
        if fact.get("ack") == "sent"
        and fact["code"] == code
        and begun[fact["done"]]["form"] in (forms or ("key", "step", "tell"))
        and times[begun[fact["done"]]["payload"]["n"]] == 1
    ]


def _spec_of(facts: Facts, ack: dict[str, Any]) -> dict[str, Any]:
    [spec] = [f["spec"] for f in facts if f.get("begin") == ack["done"]]
    assert isinstance(spec, dict)
    return spec


def _another_payload(facts: Facts, ack: dict[str, Any]) -> None:
    _spec_of(facts, ack)["payload"]["n"] = "never sent"
    _spec_of(facts, ack)["id"] = None


def _another_flow(facts: Facts, ack: dict[str, Any]) -> None:
    ack["flows"] = ["nobody"]


def _another_topic(facts: Facts, ack: dict[str, Any]) -> None:
    _spec_of(facts, ack)["topic"] = "something else"


def _taken_after_all(facts: Facts, ack: dict[str, Any]) -> None:
    ack["code"] = "late"


def _not_late_after_all(facts: Facts, ack: dict[str, Any]) -> None:
    ack |= {"code": "matched", "flows": ["nobody"]}


def _another_id(facts: Facts, ack: dict[str, Any]) -> None:
    _spec_of(facts, ack)["id"] = "never sent"


def _another_voter(facts: Facts, ack: dict[str, Any]) -> None:
    ack["approver"] = "nobody"


def _another_result(facts: Facts, ack: dict[str, Any]) -> None:
    ack["found"] = "something else"


def _told_otherwise_before(facts: Facts, ack: dict[str, Any]) -> None:
    facts.insert(0, ack | {"found": "something else"})


@pytest.mark.parametrize(
    ("subject", "alter", "complaint"),
    [
        ("key matched", _another_payload, "acknowledged, but lost"),
        ("key matched", _another_flow, "acknowledged, but lost"),
        ("key matched", _another_topic, "has answered"),
        ("key matched", _another_id, "its id is not on record"),
        ("key matched", _taken_after_all, "and has come out"),
        ("tell matched", _another_payload, "acknowledged, but lost"),
        ("key kept", _another_payload, "acknowledged, but lost"),
        ("late", _not_late_after_all, "acknowledged, but lost"),
        ("vote counted", _another_voter, "acknowledged, but lost"),
        ("found", _another_result, "and stored is|and then"),
        ("found", _told_otherwise_before, "a controller was told"),
    ],
)
def test_an_answer_that_the_file_does_not_bear_out_is_found(
    life: Life, subject: str, alter: Callable[[Facts, dict[str, Any]], None], complaint: str
) -> None:
    life.check(life.facts)
    facts = life.copy()

    alter(facts, _acks(facts, subject)[0])

    with pytest.raises(AssertionError, match=complaint):
        life.check(facts)


def test_what_was_not_answered_is_to_be_sent_again(life: Life) -> None:
    facts = life.copy()
    ack = next(ack for ack in _acks(facts, "key kept") if _spec_of(facts, ack)["id"] is not None)
    spec = _spec_of(facts, ack)

    facts.remove(ack)

    unanswered = life.check(facts).unanswered
    assert unanswered[spec["id"]] == spec


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('"key": "upd_', '"key": "upd_0', "recorded as delivered, and never came|came before its"),
        ('"flow": "', '"flow": "no-', "a flow that is not there"),
        ('"revision": ', '"revision": 9', "came before its record"),
    ],
)
def test_what_has_arrived_and_is_not_on_record_is_found(
    life: Life, tmp_path: Path, before: str, after: str, complaint: str
) -> None:
    altered = tmp_path / "delivered"
    altered.write_text(life.delivered.read_text().replace(before, after, 1))

    answers = Answers(altered, Counter())

    with pytest.raises(AssertionError, match=complaint):
        answers.check(life.file, at_rest=False)


def test_what_is_recorded_as_delivered_and_never_came_is_found(life: Life, tmp_path: Path) -> None:
    answers = Answers(tmp_path / "nothing", Counter())

    with pytest.raises(AssertionError, match="and never came"):
        answers.check(life.file, at_rest=False)
