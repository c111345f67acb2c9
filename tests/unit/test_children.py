"""The book of children: its counts agree with the children in it, whatever happens to them."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from flowstead.model.flow import Failure
from flowstead.model.task import Cancelled, Launch, TaskStatus, is_active
from flowstead.rules import endings
from flowstead.rules.children import Children
from flowstead.rules.view import Boundless
from tests.unit.given import NOW, a_launched, a_linked, with_fields

GROUPS = {"": None, "map": 2, "one": 1}
ROOM = Boundless().take


def child(task_id: str, group: str, status: TaskStatus = TaskStatus.QUEUED):
    launch = Launch(function="work", group=group or None, limit=GROUPS[group])
    return a_launched(task_id, status, launch=launch)


def test_a_loaded_book_holds_active_children_whole_and_ended_ones_by_run_id() -> None:
    active = a_linked("a", run_id="ra")
    gone, _ = endings.end(a_linked("b", run_id="rb"), NOW, Cancelled(Failure(kind="cancelled")))
    book = Children()

    book.put(active)
    book.put(gone)

    assert book.active == {"a": active}
    assert book.run_ids == {"ra": "a", "rb": "b"}


def test_books_share_nothing() -> None:
    one, other = Children(), Children()

    one.put(child("a", "map"))
    one.line_up("a")

    assert not (other.active or other.run_ids)
    assert list(other.next_startable(5, ROOM)) == []


def test_lining_up_twice_or_lining_up_a_stranger_changes_nothing() -> None:
    book = Children()
    book.put(child("a", ""))

    book.line_up("a")
    book.line_up("a")
    book.line_up("nobody")

    assert [task.task_id for task in started(book, 5)] == ["a"]
    assert started(book, 5) == []


def test_a_child_no_longer_queued_when_its_turn_comes_is_passed_over() -> None:
    book = Children()
    for task_id in ("ended", "running", "queued"):
        book.put(child(task_id, ""))
        book.line_up(task_id)
    book.put(
        endings.end(book.active["ended"], NOW, Cancelled(Failure(kind="cancelled")))[0],
    )
    book.put(endings.start(book.active["running"], NOW)[0])

    assert [task.task_id for task in started(book, 5)] == ["queued"]


def test_a_child_that_left_the_line_may_stand_in_it_again() -> None:
    book = Children()
    book.put(child("a", ""))
    book.line_up("a")
    (first,) = started(book, 1)

    book.put(endings.release(first, NOW)[0])
    book.line_up("a")

    assert [task.task_id for task in started(book, 1)] == ["a"]


def test_launched_children_come_oldest_first_and_linked_ones_not_at_all() -> None:
    book = Children()
    book.put(child("b", ""))
    book.put(a_linked("l"))
    book.put(child("a", "map"))

    assert [task.task_id for task in book.launched()] == ["b", "a"]


def started(book: Children, limit: int):
    found = []
    for task in book.next_startable(limit, ROOM):
        running, _ = endings.start(task, NOW)
        book.put(running)
        found.append(running)
    return found


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "line up", "start", "end", "release", "touch"]),
        st.integers(0, 9),
        st.sampled_from(sorted(GROUPS)),
    ),
    max_size=60,
)


@given(STEPS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_no_group_ever_runs_more_than_its_limit_and_room_is_never_left_unused(steps) -> None:
    book, waiting = Children(), list[str]()
    default = 3
    for step, n, group in steps:
        task_id = f"t{n}"
        task = book.active.get(task_id)
        if step == "add" and task is None:
            book.put(child(task_id, group))
        elif step == "line up" and task is not None and task.status is TaskStatus.QUEUED:
            book.line_up(task_id)
            if task_id not in waiting:
                waiting.append(task_id)
        elif step == "end" and task is not None:
            book.put(endings.end(task, NOW, Cancelled(Failure(kind="cancelled")))[0])
            waiting = [other for other in waiting if other != task_id]
        elif step == "release" and task is not None and task.status is TaskStatus.RUNNING:
            book.put(endings.release(task, NOW)[0])
        elif step == "touch" and task is not None:
            book.put(with_fields(task, label=f"{n}"))
        elif step == "start":
            for one in started(book, default):
                waiting.remove(one.task_id)

        running = Counter(
            (task.launch.group or "")
            for task in book.active.values()
            if task.launch is not None and task.status is TaskStatus.RUNNING
        )
        for name, count in running.items():
            assert count <= (GROUPS[name] or default)
        assert all(is_active(task) for task in book.active.values())

    started(book, default)
    left = Counter(
        (task.launch.group or "")
        for task_id, task in book.active.items()
        if task.launch is not None and task.status is TaskStatus.QUEUED and task_id in waiting
    )
    running = Counter(
        (task.launch.group or "")
        for task in book.active.values()
        if task.launch is not None and task.status is TaskStatus.RUNNING
    )
    for name in left:
        waiting_in_group = [
            t
            for t in waiting
            if t in book.active
            and book.active[t].status is TaskStatus.QUEUED
            and (book.active[t].launch.group or "") == name
        ]
        if waiting_in_group and running[name] < (GROUPS[name] or default):
            raise AssertionError(f"{waiting_in_group} wait although {name!r} has room")
