"""Killed around a wait, wherever something is on disk and not yet done: the next process does the rest, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import invariants
from tests.crash.carrier import read_delivered
from tests.crash.harness import Child, Zygote, until
from tests.crash.ladder import TOP
from tests.crash.stands import ITEMS, LONG

pytestmark = pytest.mark.crash

SIGNAL = {"do": "signal", "given": {"topic": 1, "payload": {"n": 1}, "id": "sig"}}
TOO_LATE = LONG + 60.0


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


class Story:
    """One file, the lives that are killed on it, and the one that sees it to the end."""

    def __init__(self, zygote: Zygote, db: Path, tmp_path: Path) -> None:
        self.zygote = zygote
        self.db = db
        self.tmp_path = tmp_path
        self.lives = 0

    def live(self, *calls: dict[str, Any], **arguments: Any) -> Child:
        self.lives += 1
        return self.zygote.fork(
            "stand",
            self.tmp_path / f"life-{self.lives}",
            path=str(self.db),
            folder=str(self.tmp_path),
            calls=list(calls),
            **arguments,
        )

    def kill(self, child: Child) -> invariants.File:
        child.kill()
        return invariants.check_all(self.db, tells=True)

    def kill_held(self, child: Child) -> invariants.File:
        """Kill a life that stands still at a commit."""
        child.says("held")
        return self.kill(child)

    def go_on(
        self, *calls: dict[str, Any], end: str = "ended", **arguments: Any
    ) -> tuple[Child, dict[str, Any]]:
        """The next life to its end, and all that there is to see then."""
        child = self.live(*calls, until=end, **arguments)
        told = child.says("ready")
        assert child.wait() == 0, child.facts()[-3:]
        invariants.check_all(self.db, tells=True)
        return child, told

    @property
    def delivered(self) -> list[dict[str, Any]]:
        return read_delivered(self.tmp_path / "delivered")


@pytest.fixture
def story(zygote: Zygote, db: Path, tmp_path: Path) -> Story:
    return Story(zygote, db, tmp_path)


def create(how: str) -> dict[str, Any]:
    return {"do": "create", "given": {"how": how}}


def vote(approver: str, on: str | None = None) -> dict[str, Any]:
    return {"do": "vote", "given": {"approver": approver}, "on": on}


def happens(child: Child, event: str) -> None:
    """Wait until an event is on disk."""
    until(lambda: event in told(child, "event"), f"{event} in {child.facts()}")


def told(child: Child, key: str) -> list[Any]:
    return [fact[key] for fact in child.facts() if key in fact]


def codes(child: Child) -> list[str]:
    """What came of each signal and message."""
    return [report["code"] for report in told(child, "report") if report and "code" in report]


def found(there: dict[str, Any]) -> Any:
    """What the controller made of its wait, once the flow has ended well."""
    flow = there["records"][TOP]["flow"]
    assert flow["status"] == "succeeded", flow
    return flow["stateJson"]["found"]


def step(there: dict[str, Any], name: str = "ask") -> dict[str, Any]:
    """The one child of this name."""
    [task] = [t for t in there["records"][TOP]["tasks"] if t.get("runId") == name]
    return dict(task)


def kinds(there: dict[str, Any]) -> Counter[str]:
    return Counter(event["type"] for event in there["records"][TOP]["history"])


# ---- a wait and its signal ------------------------------------------------------------------------


def test_killed_after_the_wait_was_opened_the_next_process_stands_in_the_same_wait(
    story: Story,
) -> None:
    first = story.live(create("waits"))
    happens(first, "flow.waiting")

    stored = story.kill(first)
    second, there = story.go_on(SIGNAL)

    [task] = stored.tasks
    assert told(second, "entered") == [TOP]
    assert codes(second) == ["matched"]
    assert found(there) == {"n": 1}
    assert step(there)["taskId"] == task.row["task_id"]
    assert kinds(there)["task.created"] == kinds(there)["task.ended"] == 1


def test_killed_after_a_signal_was_kept_it_answers_the_wait_that_the_next_process_opens(
    story: Story,
) -> None:
    first = story.live(SIGNAL)
    first.says("called")

    stored = story.kill(first)
    second, there = story.go_on(create("waits"), SIGNAL)

    assert codes(first) == ["kept"]
    assert [signal.row["kept"] for signal in stored.signals] == [1]
    assert found(there) == {"n": 1}
    assert codes(second) == ["duplicate"]
    [signal] = invariants.read(story.db).signals
    assert (signal.row["kept"], signal.doc["takenBy"]) == (0, TOP)


def test_killed_before_a_kept_signal_met_its_wait_they_meet_in_the_next_process(
    story: Story,
) -> None:
    first = story.live(SIGNAL, create("waits"), hold={"event": "task.ended"})

    stored = story.kill_held(first)
    _, there = story.go_on()

    assert [signal.row["kept"] for signal in stored.signals] == [1]
    assert [task.doc["status"] for task in stored.tasks] == ["queued"]
    assert found(there) == {"n": 1}
    assert kinds(there)["task.ended"] == 1


def test_killed_between_the_commit_of_a_signal_and_the_waking_its_flow_goes_on_in_the_next_process(
    story: Story,
) -> None:
    first = story.live(
        create("waits"), SIGNAL | {"on": "flow.waiting"}, hold={"event": "flow.resumed"}, after=True
    )

    stored = story.kill_held(first)
    second, there = story.go_on(SIGNAL)

    assert codes(first) == []
    assert [task.doc["status"] for task in stored.tasks] == ["succeeded"]
    assert told(second, "entered") == [TOP]
    assert codes(second) == ["duplicate"]
    assert found(there) == {"n": 1}


def test_killed_before_the_commit_of_a_signal_nothing_has_come_in_and_it_can_be_sent_again(
    story: Story,
) -> None:
    first = story.live(
        create("waits"), SIGNAL | {"on": "flow.waiting"}, hold={"event": "flow.resumed"}
    )

    stored = story.kill_held(first)
    second, there = story.go_on(SIGNAL)

    assert stored.signals == []
    assert [task.doc["status"] for task in stored.tasks] == ["queued"]
    assert codes(second) == ["matched"]
    assert found(there) == {"n": 1}


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_commit_of_a_message_it_is_received_once(
    story: Story, after: bool
) -> None:
    message = {"do": "tell", "given": {"message": "hello", "id": "msg"}}
    first = story.live(
        create("receives"),
        message | {"on": "flow.waiting"},
        hold={"event": "flow.resumed"},
        after=after,
    )

    story.kill_held(first)
    second, there = story.go_on(message)

    assert codes(second) == ["duplicate" if after else "matched"]
    assert found(there) == "hello"
    letters = [t for t in there["records"][TOP]["tasks"] if t["runtime"] == "message"]
    assert len(letters) == 2  # the wait, and what it took


# ---- parked ---------------------------------------------------------------------------------------


def test_killed_while_a_flow_is_parked_it_stays_so_and_no_row_changes_until_it_is_woken(
    story: Story,
) -> None:
    first = story.live(create("waits"), park_seconds=0.01)
    happens(first, "flow.parked")
    story.kill(first)
    before = invariants.dump(story.db)

    second, _ = story.go_on(end="rest")
    unchanged = invariants.dump(story.db)
    third, there = story.go_on(SIGNAL)

    assert told(second, "entered") == []
    assert unchanged == before
    assert told(third, "entered") == [TOP]
    assert found(there) == {"n": 1}


def test_killed_before_parking_is_on_record_the_controller_stands_in_the_next_process(
    story: Story,
) -> None:
    first = story.live(create("waits"), park_seconds=0.01, hold={"event": "flow.parked"})

    story.kill_held(first)
    second, there = story.go_on(SIGNAL)

    assert told(second, "entered") == [TOP]
    assert kinds(there)["flow.parked"] == 0
    assert found(there) == {"n": 1}


def test_killed_after_a_parked_flow_was_answered_its_controller_is_entered_in_the_next_process(
    story: Story,
) -> None:
    first = story.live(
        create("waits"),
        SIGNAL | {"on": "flow.parked"},
        park_seconds=0.01,
        hold={"event": "flow.resumed"},
        after=True,
    )

    story.kill_held(first)
    second, there = story.go_on()

    assert told(second, "entered") == [TOP]
    assert found(there) == {"n": 1}


# ---- at the deadline ------------------------------------------------------------------------------

IN_TIME = {
    "waits_or_fails": "too late",
    "waits_or_goes_on": None,
    "sleeps": "slept",
}


@pytest.mark.parametrize("park_seconds", [0.01, 3600.0])
@pytest.mark.parametrize("how", IN_TIME)
def test_what_came_due_while_nobody_lived_happens_in_the_next_process_once(
    story: Story, how: str, park_seconds: float
) -> None:
    first = story.live(create(how), park_seconds=park_seconds)
    happens(first, "flow.parked" if park_seconds < 1 else "flow.waiting")
    story.kill(first)

    early, _ = story.go_on(end="rest", park_seconds=park_seconds)
    late, there = story.go_on(SIGNAL, ahead=TOO_LATE, park_seconds=park_seconds)

    assert "flow.resumed" not in told(early, "event")
    assert codes(late) in (["late"], ["kept"])
    assert found(there) == IN_TIME[how]
    assert kinds(there)["task.ended"] == 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", IN_TIME)
def test_killed_around_the_commit_of_a_deadline_it_has_come_once(
    story: Story, how: str, after: bool
) -> None:
    story.kill(opened(story, how))

    held = story.live(ahead=TOO_LATE, hold={"event": "task.ended"}, after=after)
    stored = story.kill_held(held)
    _, there = story.go_on(ahead=TOO_LATE)

    [task] = stored.tasks
    assert task.is_active != after
    assert found(there) == IN_TIME[how]
    assert kinds(there)["task.ended"] == 1


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_commit_of_a_deadline_that_blocks_the_wait_stays_open(
    story: Story, after: bool
) -> None:
    story.kill(opened(story, "waits_or_blocks"))

    held = story.live(ahead=TOO_LATE, hold={"event": "flow.blocked"}, after=after)
    story.kill_held(held)
    second, there = story.go_on(SIGNAL | ({} if after else {"on": "flow.blocked"}), ahead=TOO_LATE)

    assert codes(second) == ["matched"]
    assert kinds(there)["flow.blocked"] == 1
    assert found(there) == {"n": 1}


def opened(story: Story, how: str) -> Child:
    child = story.live(create(how))
    happens(child, "flow.waiting")
    return child


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("on_timeout", "event", "status"),
    [
        ("fail", "flow.failed", "failed"),
        ("resume", "flow.resumed", "queued"),
        ("block", "flow.blocked", "blocked"),
    ],
)
def test_killed_around_the_deadline_of_a_flows_own_wait_it_has_come_once(
    story: Story, on_timeout: str, event: str, status: str, after: bool
) -> None:
    wait = {"topic": 1, "deadlineAt": round(LONG * 1000), "onTimeout": on_timeout}
    first = story.live(
        {"do": "create", "given": {"controller": "nobody"}}, {"do": "wait", "given": wait}
    )
    happens(first, "flow.waiting")
    story.kill(first)

    story.kill_held(story.live(ahead=TOO_LATE, hold={"event": event}, after=after))
    _, there = story.go_on(end="rest", ahead=TOO_LATE)

    assert kinds(there)[event] == 1
    assert there["records"][TOP]["flow"]["status"] == status
    assert len(there["waits"]) == (on_timeout == "block")


# ---- a choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_commit_of_a_choice_it_is_made_once_and_leaves_no_loser_open(
    story: Story, after: bool
) -> None:
    other = {"do": "signal", "given": {"topic": 2, "payload": {"n": 2}, "id": "other"}}
    first = story.live(
        create("selects"),
        other | {"on": "flow.waiting"},
        hold={"event": '"status":"cancelled"'},
        after=after,
    )

    stored = story.kill_held(first)
    second, there = story.go_on(SIGNAL)

    assert {t.row["run_id"]: t.doc["status"] for t in stored.tasks} == {
        "first": "cancelled" if after else "queued",
        "second": "succeeded" if after else "queued",
    }
    assert codes(second)[0] in (["late", "kept"] if after else ["matched"])
    assert found(there) == (["second", {"n": 2}] if after else ["first", {"n": 1}])
    assert kinds(there)["task.ended"] == 2


# ---- a decision -----------------------------------------------------------------------------------


def test_killed_between_a_vote_and_the_verdict_the_vote_counts_in_the_next_process(
    story: Story,
) -> None:
    first = story.live(create("approves"), vote("ann", on="flow.waiting"))
    first.says("called")

    story.kill(first)
    second, there = story.go_on(vote("ann"), vote("bob"))

    again, decisive = [report for report in told(second, "report") if report is not None]
    assert (again["counted"], decisive["counted"]) == (False, True)
    assert decisive["verdict"] == "approved"
    assert found(there) == ITEMS
    assert told(second, "ran") == ["paid"]


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_commit_of_the_decisive_vote_it_counts_once(
    story: Story, after: bool
) -> None:
    first = story.live(
        create("approves"),
        vote("ann", on="flow.waiting"),
        vote("bob"),
        hold={"event": "flow.resumed"},
        after=after,
    )

    story.kill_held(first)
    second, there = story.go_on(*([] if after else [vote("bob")]))

    votes = step(there)["resultJson"]["votes"]
    assert [each["approver"] for each in votes] == ["ann", "bob"]
    assert found(there) == ITEMS
    assert told(second, "ran") == ["paid"]


@pytest.mark.parametrize("after", [False, True])
def test_killed_between_the_grant_and_its_use_it_is_used_once(story: Story, after: bool) -> None:
    first = story.live(
        create("approves"),
        vote("ann", on="flow.waiting"),
        vote("bob"),
        hold={"event": "task.created", "task": '"runId":"paid"'},
        after=after,
    )

    stored = story.kill_held(first)
    second, there = story.go_on()

    [flow] = stored.flows.values()
    assert (flow.doc["grants"]["ask"].get("usedBy") is not None) == after
    assert told(first, "ran") == []
    assert told(second, "ran") == ["paid"]
    assert found(there) == ITEMS
    assert kinds(there)["task.created"] == 2


# ---- what the owner is told -----------------------------------------------------------------------


def test_killed_between_sending_an_update_and_its_record_it_is_sent_again_under_the_same_name(
    story: Story,
) -> None:
    first = story.live(
        create("waits"), SIGNAL | {"on": "flow.waiting"}, hold={"update": '"status":"delivered"'}
    )

    stored = story.kill_held(first)
    sent = story.delivered
    _, there = story.go_on()

    assert [update.row["status"] for update in stored.updates] == ["pending"]
    assert len(sent) == 1
    again = story.delivered
    assert [line["key"] for line in again] == [sent[0]["key"]] * 2
    [update] = there["updates"]
    assert (update["kind"], update["status"]) == ("done", "delivered")


def test_killed_after_an_update_was_recorded_as_delivered_it_is_not_sent_again(
    story: Story,
) -> None:
    first = story.live(
        create("waits"),
        SIGNAL | {"on": "flow.waiting"},
        hold={"update": '"status":"delivered"'},
        after=True,
    )

    story.kill_held(first)
    story.go_on()

    assert len(story.delivered) == 1


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_giving_up_of_an_update_row_and_history_say_so_together(
    story: Story, after: bool
) -> None:
    first = story.live(
        create("waits"),
        SIGNAL | {"on": "flow.waiting"},
        hold={"event": "update.failed"},
        after=after,
        mood="hopeless",
    )

    stored = story.kill_held(first)
    _, there = story.go_on(mood="hopeless")

    given_up = ["delivery_failed"]
    assert [u.row["status"] for u in stored.updates] == (given_up if after else ["pending"])
    assert [update["status"] for update in there["updates"]] == given_up
    assert kinds(there)["update.failed"] == 1
    assert story.delivered == []


def test_killed_between_the_end_of_a_flow_and_its_telling_the_next_process_tells(
    story: Story,
) -> None:
    first = story.live(
        create("waits"),
        SIGNAL | {"on": "flow.waiting"},
        hold={"event": "flow.succeeded", "update": '"slot":"done"'},
        after=True,
    )

    stored = story.kill_held(first)
    story.go_on()

    assert [update.row["status"] for update in stored.updates] == ["pending"]
    [line] = story.delivered
    assert (line["kind"], line["flow"], line["status"]) == ("done", TOP, "succeeded")
