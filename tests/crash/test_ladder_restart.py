"""Killed on a rung of a stop, in a wait, between an end and its record: the next process does the rest, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import invariants
from tests.crash.census import alive_programs, end_programs, marks_in
from tests.crash.harness import Child, Zygote, until
from tests.crash.ladder import LOW, MID, PROGRAMS, TOP

pytestmark = pytest.mark.crash


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


class Story:
    """One file, the life that is killed on it, and the one that goes on."""

    def __init__(self, zygote: Zygote, db: Path, tmp_path: Path) -> None:
        self.zygote = zygote
        self.db = db
        self.tmp_path = tmp_path
        self.folder = tmp_path / "folder"
        self.folder.mkdir()
        self.lives = 0

    def begin(self, *sorts: str, **arguments: Any) -> Child:
        """A life with a child of each of these sorts, all of them at it."""
        child = self._fork("climb", sorts=list(sorts), **arguments)
        child.says("ready")
        leaf = arguments.get("leaf", "patient")
        last = [leaf if sort == "nested" else sort for sort in sorts]
        programs = sum(sort in PROGRAMS for sort in last)
        codes = len(last) - programs
        until(lambda: len(ran(child)) >= codes, f"{codes} children to run")
        until(lambda: len(marks_in(self.folder)) >= programs, f"{programs} programs to begin")
        return child

    def tell(self, word: str) -> None:
        (self.folder / word).touch()

    def kill(self, child: Child) -> invariants.File:
        """Kill a life, and answer what is in its file."""
        child.kill()
        return invariants.check_all(self.db)

    def go_on(self, **arguments: Any) -> tuple[Child, dict[str, Any]]:
        """The next life to its end, and all the records there are then."""
        child = self._fork("go_on", **arguments)
        told: dict[str, Any] = child.says("ready")["records"]
        assert child.wait() == 0, child.facts()[-3:]
        file = invariants.check_all(self.db)
        ours = {task.row["task_id"] for task in file.tasks}
        alive = {pid: task for pid, task in alive_programs().items() if task in ours}
        assert not alive, f"processes live on: {alive}"
        assert all(mark.is_alone for mark in marks_in(self.folder)), marks_in(self.folder)
        return child, told

    def _fork(self, scene: str, **arguments: Any) -> Child:
        self.lives += 1
        return self.zygote.fork(
            scene,
            self.tmp_path / f"life-{self.lives}",
            path=str(self.db),
            folder=str(self.folder),
            **arguments,
        )


@pytest.fixture
def story(zygote: Zygote, db: Path, tmp_path: Path) -> Iterator[Story]:
    story = Story(zygote, db, tmp_path)
    yield story
    end_programs(story.folder)


def ran(child: Child) -> list[tuple[str, int]]:
    """Whose code began in a life, in order, with their attempts."""
    return [(fact["ran"], fact["attempt"]) for fact in child.facts() if "ran" in fact]


def happens(child: Child, event: str, times: int = 1) -> None:
    """Wait until an event is on disk so many times."""
    until(
        lambda: sum(fact.get("event") == event for fact in child.facts()) >= times,
        f"{event} {times} times in {child.facts()}",
    )


def only_child(told: dict[str, Any], flow_id: str = TOP) -> dict[str, Any]:
    [task] = told[flow_id]["tasks"]
    return dict(task)


def flow_of(told: dict[str, Any], controller_id: str) -> dict[str, Any]:
    """The one flow of a controller; there must not be a second."""
    [found] = [each for each in told.values() if each["flow"].get("controllerId") == controller_id]
    return dict(found)


def kinds(records: dict[str, Any]) -> Counter[str]:
    return Counter(event["type"] for event in records["history"])


def is_alive(pid: int, child: str) -> bool:
    return alive_programs().get(pid) == child


# ---- the rungs ------------------------------------------------------------------------------------

RUNGS = {
    "asked": ("task.cancel_requested", {}),
    "killed": ("task.kill_requested", {"kill_after": 0.02}),
    "about to be given up": (None, {"kill_after": 0.02, "abandon_after": 0.02}),
}


@pytest.mark.parametrize("rung", RUNGS)
def test_killed_on_a_rung_of_a_stop_the_child_ends_as_cancelled_and_never_runs_again(
    story: Story, rung: str
) -> None:
    event, limits = RUNGS[rung]
    hold = {"event": "task.ended"} if event is None else {}
    first = story.begin("deaf", limits=limits, hold=hold)
    story.tell("cancel")
    if event is None:
        first.says("held")
    else:
        happens(first, event)

    stored = story.kill(first)
    second, told = story.go_on()

    [task] = stored.tasks
    assert task.doc["status"] == "running"
    assert (task.doc.get("killRequestedAt") is None) == (rung == "asked")
    assert ran(second) == []
    child, flow = only_child(told), told[TOP]["flow"]
    assert (child["status"], child["attempt"]) == ("cancelled", 1)
    assert child["cancelRequestedAt"] == task.doc["cancelRequestedAt"]
    assert child["failure"]["kind"] == "cancelled"
    assert flow["status"] == "cancelled"
    assert kinds(told[TOP])["flow.cancel_requested"] == kinds(told[TOP])["task.started"] == 1


@pytest.mark.parametrize("sort", ["program", "deaf program", "family"])
def test_killed_while_a_program_is_asked_to_stop_the_next_process_ends_it_and_starts_nothing(
    story: Story, sort: str
) -> None:
    first = story.begin(sort, hold={"event": "task.ended"})
    [mark] = marks_in(story.folder)
    story.tell("cancel")
    happens(first, "task.cancel_requested")
    if sort == "program":
        first.says("held")  # it has obeyed, and its end is not on record

    story.kill(first)
    assert is_alive(mark.pid, mark.child) == (sort != "program")
    _, told = story.go_on()

    assert marks_in(story.folder) == [mark]
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("cancelled", 1)
    assert told[TOP]["flow"]["status"] == "cancelled"


def test_killed_after_a_program_was_killed_by_force_its_end_is_recorded_and_it_does_not_come_back(
    story: Story,
) -> None:
    first = story.begin("deaf program", hold={"event": "task.ended"}, limits={"kill_after": 0.02})
    [mark] = marks_in(story.folder)
    story.tell("cancel")
    first.says("held")

    stored = story.kill(first)
    assert not is_alive(mark.pid, mark.child)
    _, told = story.go_on()

    assert "task.kill_requested" in stored.tasks[0].kinds
    assert marks_in(story.folder) == [mark]
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("cancelled", 1)
    assert child["killRequestedAt"] >= stored.tasks[0].doc["killRequestedAt"]


@pytest.mark.parametrize("sort", ["deaf program", "family"])
@pytest.mark.parametrize("rung", ["task.cancel_requested", "task.kill_requested"])
def test_a_stop_whose_rungs_fell_due_while_nobody_lived_still_ends_the_program(
    story: Story, rung: str, sort: str
) -> None:
    limits = {"kill_after": 0.01} if rung == "task.kill_requested" else {}
    first = story.begin(sort, hold={"event": rung}, after=True, limits=limits)
    [mark] = marks_in(story.folder)
    story.tell("cancel")
    first.says("held")

    stored = story.kill(first)
    assert is_alive(mark.pid, mark.child), "vacuous"
    _, told = story.go_on(ahead=3600.0)

    assert stored.tasks[0].kinds[-1] == rung
    assert marks_in(story.folder) == [mark]
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("cancelled", 1)
    assert child["failure"]["kind"] == "cancelled", "given up, though nobody had looked"
    assert told[TOP]["flow"]["status"] == "cancelled"


# ---- waits ----------------------------------------------------------------------------------------


def test_killed_in_a_retry_wait_the_next_attempt_comes_when_it_is_due_and_not_before(
    story: Story,
) -> None:
    first = story.begin("unlucky")
    happens(first, "task.retry_scheduled")
    story.kill(first)

    second, waiting = story.go_on(until="rest")
    third, told = story.go_on(ahead=3601.0)

    assert ran(second) == []
    assert (only_child(waiting)["status"], only_child(waiting)["attempt"]) == ("queued", 1)
    assert ran(third) == [("unlucky-0", 2)]
    child = only_child(told)
    assert (child["status"], child["attempt"], child["resultJson"]) == ("succeeded", 2, 2)


def test_a_child_that_waited_for_its_retry_through_a_crash_can_be_cancelled_and_does_not_run(
    story: Story,
) -> None:
    first = story.begin("unlucky")
    happens(first, "task.retry_scheduled")
    story.kill(first)

    second, told = story.go_on(cancel=True)

    assert ran(second) == []
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("cancelled", 1)
    assert told[TOP]["flow"]["status"] == "cancelled"


@pytest.mark.parametrize("answer", ["resume", "retry_task"])
def test_killed_in_a_review_the_child_still_waits_for_its_answer_and_then_tries_again(
    story: Story, answer: str
) -> None:
    first = story.begin("picky")
    happens(first, "flow.blocked")
    stored = story.kill(first)

    second, told = story.go_on(until="rest", answer=answer)

    before = second.says("before")["before"]
    assert before[TOP]["flow"]["blockedTaskId"] == stored.tasks[0].row["task_id"]
    assert only_child(before)["attempt"] == 1
    assert ran(second) == [("picky-0", 2)]
    child = only_child(told)
    if answer == "resume":
        assert (child["status"], child["attempt"]) == ("queued", 2)
        assert told[TOP]["flow"]["status"] == "blocked"
    else:
        assert (child["status"], child["attempt"], child["resultJson"]) == ("succeeded", 2, 2)
        assert told[TOP]["flow"]["status"] == "queued"


def test_killed_between_a_failure_and_its_review_the_child_fails_again_and_is_looked_at_once(
    story: Story,
) -> None:
    first = story.begin("picky", hold={"event": "task.review_requested"})
    first.says("held")
    story.kill(first)

    second, told = story.go_on(until="rest")

    assert ran(second) == [("picky-0", 2)]
    child, flow = only_child(told), told[TOP]["flow"]
    assert (child["status"], child["attempt"]) == ("queued", 2)
    assert flow["status"] == "blocked"
    assert flow["blockedTaskId"] == child["taskId"]
    assert kinds(told[TOP])["task.review_requested"] == kinds(told[TOP])["flow.blocked"] == 1


# ---- between an end and its record ----------------------------------------------------------------


def test_killed_between_an_end_and_its_record_a_child_is_done_again(story: Story) -> None:
    first = story.begin("quick", hold={"event": "task.ended"})
    first.says("held")
    story.kill(first)

    second, told = story.go_on()

    assert ran(second) == [("quick-0", 2)]
    child = only_child(told)
    assert (child["status"], child["attempt"], child["resultJson"]) == ("succeeded", 2, 2)


def test_killed_between_an_end_and_its_record_what_must_not_be_done_twice_is_lost(
    story: Story,
) -> None:
    first = story.begin("fragile and quick", hold={"event": "task.ended"})
    first.says("held")
    story.kill(first)

    second, told = story.go_on()

    assert ran(second) == []
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("lost", 1)
    assert (child["failure"]["kind"], child["failure"]["code"]) == ("interrupted", "unknown")


def test_killed_between_the_end_of_a_program_and_its_record_it_is_done_again(story: Story) -> None:
    first = story.begin("brief program", hold={"event": "task.ended"})
    first.says("held")
    story.kill(first)

    _, told = story.go_on()

    child = only_child(told)
    assert [mark.attempt for mark in marks_in(story.folder)] == [1, 2]
    assert (child["status"], child["attempt"]) == ("succeeded", 2)
    assert child["resultJson"] == child["taskId"]


def test_killed_between_the_end_of_a_nested_flow_and_its_record_above_it_is_not_done_again(
    story: Story,
) -> None:
    first = story.begin("nested", leaf="quick", hold={"event": "task.ended", "task": "nested-0"})
    first.says("held")
    stored = story.kill(first)

    second, told = story.go_on()

    assert sum("parentTaskId" in flow.doc for flow in stored.flows.values()) == 2
    assert ran(second) == []
    assert not [fact for fact in second.facts() if "entered" in fact]
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("succeeded", 1)
    assert child["resultJson"] == {"low": {"leaf": 1}} == flow_of(told, MID)["flow"]["stateJson"]


# ---- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["program", "deaf program", "family"])
def test_a_program_that_outlives_us_is_ended_before_its_child_runs_again(
    story: Story, sort: str
) -> None:
    first = story.begin(sort)
    [old] = marks_in(story.folder)
    story.kill(first)
    assert is_alive(old.pid, old.child)

    _, told = story.go_on()

    # Each tells whether it could lock what the kernel lets go of only when the last of its child is dead.
    assert [(mark.attempt, mark.is_alone) for mark in marks_in(story.folder)] == [
        (1, True),
        (2, True),
    ]
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("succeeded", 2)


def test_a_program_that_must_not_be_run_twice_is_ended_and_its_child_is_lost(story: Story) -> None:
    first = story.begin("fragile program")
    [old] = marks_in(story.folder)
    story.kill(first)
    assert is_alive(old.pid, old.child)

    _, told = story.go_on()

    assert marks_in(story.folder) == [old]
    child = only_child(told)
    assert (child["status"], child["attempt"]) == ("lost", 1)
    assert (child["failure"]["kind"], child["failure"]["code"]) == ("interrupted", "unknown")


def test_programs_that_outlive_us_are_ended_though_there_is_no_room_for_all_of_them(
    story: Story,
) -> None:
    first = story.begin("program", "deaf program", "family")
    marks = marks_in(story.folder)
    story.kill(first)
    assert all(is_alive(mark.pid, mark.child) for mark in marks)

    _, told = story.go_on(cancel=True, limits={"running_in_all": 1, "kill_after": 0.1})

    for flow_id in (TOP, "flow-1", "flow-2"):
        assert told[flow_id]["flow"]["status"] == "cancelled"


def test_a_limit_holds_for_children_that_were_cut_off_as_well(story: Story) -> None:
    first = story.begin("narrow", "narrow", "narrow")
    story.kill(first)
    story.tell("end")

    second, told = story.go_on(concurrency=1)

    at_it = 0
    for fact in second.facts():
        at_it += ("ran" in fact) - ("over" in fact)
        assert at_it <= 1, second.facts()
    assert sorted(name for name, _ in ran(second)) == ["narrow-0", "narrow-1", "narrow-2"]
    for flow_id in (TOP, "flow-1", "flow-2"):
        child = only_child(told, flow_id)
        assert (child["status"], child["attempt"]) == ("succeeded", 2)


# ---- nested flows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["patient", "threaded", "program"])
def test_killed_two_floors_up_the_same_flows_go_on_and_only_the_leaf_runs_again(
    story: Story, leaf: str
) -> None:
    first = story.begin("nested", leaf=leaf)
    story.kill(first)
    story.tell("end")

    second, told = story.go_on()

    top, mid, low = only_child(told), flow_of(told, MID), flow_of(told, LOW)
    assert (top["status"], top["attempt"]) == ("succeeded", 1)
    [below], [bottom] = mid["tasks"], low["tasks"]
    assert (below["status"], below["attempt"]) == ("succeeded", 1)
    assert (bottom["status"], bottom["attempt"]) == ("succeeded", 2)
    result = bottom["taskId"] if leaf == "program" else 2
    assert top["resultJson"] == {"low": {"leaf": result}}
    assert ran(second) == ([] if leaf == "program" else [("leaf", 2)])
    assert Counter(f["entered"] for f in second.facts() if "entered" in f) == {MID: 1, LOW: 1}


@pytest.mark.parametrize(
    ("how", "floor", "leaf"),
    [
        *(("cancel", floor, leaf) for floor in (1, 2) for leaf in ("patient", "deaf program")),
        *(("request_cancel", floor, leaf) for floor in (1, 2) for leaf in ("patient", "program")),
        ("cancel", 2, "fragile"),
        ("request_cancel", 1, "fragile"),
        ("cancel", 1, "threaded"),
        ("request_cancel", 2, "threaded"),
    ],
)
def test_killed_before_a_cancel_has_come_down_nothing_below_it_starts_again(
    story: Story, leaf: str, how: str, floor: int
) -> None:
    controller = {1: MID, 2: LOW}[floor]
    first = story.begin(
        "nested", leaf=leaf, hold={"event": "flow.cancel_requested", "flow": controller}
    )
    marks = marks_in(story.folder)
    story.tell(how)
    first.says("held")
    stored = story.kill(first)

    second, told = story.go_on(limits={"kill_after": 0.1})

    by_controller = {flow.doc["controllerId"]: flow.doc for flow in stored.flows.values()}
    assert "cancelRequestedAt" in by_controller["nobody"], "vacuous"
    assert ("cancelRequestedAt" in by_controller[MID]) == (floor == 2), "vacuous"
    assert "cancelRequestedAt" not in by_controller[LOW], "vacuous"
    assert ran(second) == []
    assert marks_in(story.folder) == marks
    [bottom] = flow_of(told, LOW)["tasks"]
    # Of what must not be done twice nobody can say that it was stopped in time.
    assert bottom["status"] in ({"cancelled", "lost"} if leaf == "fragile" else {"cancelled"})
    assert bottom["attempt"] == 1
    for records in told.values():
        assert records["flow"]["cancelRequestedAt"] is not None
        assert kinds(records)["task.started"] == 1
    assert told[TOP]["flow"]["status"] == "cancelled"


def test_killed_while_a_leaf_two_floors_down_does_not_stop_the_whole_tree_ends_cancelled(
    story: Story,
) -> None:
    first = story.begin("nested", leaf="deaf")
    story.tell("cancel")
    happens(first, "task.cancel_requested", times=3)
    story.kill(first)

    second, told = story.go_on()

    assert ran(second) == []
    assert not [fact for fact in second.facts() if "entered" in fact]
    assert len(told) == 3
    for records in told.values():
        assert records["flow"]["status"] == "cancelled"
        [task] = records["tasks"]
        assert (task["status"], task["attempt"]) == ("cancelled", 1)
