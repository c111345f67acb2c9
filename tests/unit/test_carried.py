"""A flow that goes on from an ended one begins with the children that had succeeded: told, counted, and not run."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.effect import StartController, StartTask
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow
from flowstead.model.limits import Limits
from flowstead.model.task import Launch, StoredTask, Task, TaskStatus, TerminalOutcome
from tests.unit.given import CREATED_AT, NOW, a_draft, a_flow, a_linked, a_turn, a_view

PROFILE = settings(deadline=None, derandomize=True, database=None)


def successor(**fields: Any) -> StoredFlow:
    given_fields = {"revision": 0, "retry_of": "triage-0", "created_at": NOW, "updated_at": NOW}
    return a_flow(FlowStatus.QUEUED, **given_fields | fields)


def carried(n: int, **fields: Any) -> StoredTask:
    given_fields = {
        "key": n,
        "run_id": f"step-{n}",
        "result_json": Raw(b"7"),
        "attempt": 2,
        "started_at": CREATED_AT + n,
        "ended_at": CREATED_AT + n + 1,
        "terminal_outcome": TerminalOutcome.SUCCEEDED,
    }
    return a_linked(f"t{n}", TaskStatus.SUCCEEDED, **given_fields | fields)


def test_each_child_it_begins_with_is_told_as_made_and_as_ended_and_its_name_is_taken() -> None:
    children = tuple(carried(n) for n in (1, 2))
    view = a_view(None, controllers={"triage"})
    turn = a_turn(view)

    taken = turn.take(c.Create(draft=successor(), carried=children), "owner")

    assert taken.refusal is None
    assert taken.flow is view.flow
    assert [(e.seq, e.revision, e.type, e.task_id) for e in turn.events] == [
        (1, 0, EventType.FLOW_CREATED, None),
        (2, 0, EventType.TASK_CREATED, "t1"),
        (3, 0, EventType.TASK_ENDED, "t1"),
        (4, 0, EventType.TASK_CREATED, "t2"),
        (5, 0, EventType.TASK_ENDED, "t2"),
    ]
    assert turn.events[0].changed["retryOf"] == "triage-0"
    assert turn.events[1].changed["runId"] == "step-1"
    assert turn.events[2].changed["endedAt"] == children[0].ended_at
    assert all("resultJson" not in event.changed for event in turn.events)
    assert turn.tasks == {"t1": children[0], "t2": children[1]}
    assert turn.created == {"t1", "t2"}
    assert not view.children.active
    assert view.children.run_ids == {"step-1": "t1", "step-2": "t2"}
    assert list(turn.effects()) == [StartController("triage")]


def test_together_the_two_facts_tell_the_whole_child_but_for_its_input_and_its_result() -> None:
    child = carried(1, label="first", input_json=Raw(b"1"), progress_summary="done")
    view = a_view(None)
    turn = a_turn(view)

    turn.take(c.Create(draft=successor(), carried=(child,)), "owner")

    wire = {f.name: f.encode_name for f in msgspec.structs.fields(Task)}
    silent = {"task_id", "flow_id", "input_json", "result_json"}
    held = {name: getattr(child, name) for name in wire.keys() - silent}
    assert turn.events[1].changed | turn.events[2].changed == {
        wire[name]: value for name, value in held.items() if value is not None
    }


def test_the_end_of_a_child_it_begins_with_says_how_it_ended_as_every_end_does() -> None:
    view = a_view(None)
    turn = a_turn(view)

    turn.take(c.Create(draft=successor(), carried=(carried(1),)), "owner")

    assert turn.events[2].changed["status"] == "succeeded"


@pytest.mark.parametrize("same_turn", [True, False])
def test_a_step_that_is_asked_for_again_is_answered_by_the_child_it_began_with(
    same_turn: bool,
) -> None:
    view = a_view(None)
    turn = a_turn(view)
    turn.take(c.Create(draft=successor(), carried=(carried(1),)), "owner")
    asked = turn if same_turn else a_turn(view, last_seq=3)
    told = len(turn.events)
    drafts = (
        a_draft("again", run_id="step-1", launch=Launch(function="work")),
        a_draft("new", run_id="step-2", launch=Launch(function="work")),
    )

    taken = asked.take(c.AddTasks(drafts=drafts), "controller")

    first, second = taken.children
    assert first == (carried(1) if same_turn else "t1")
    assert isinstance(second, StoredTask)
    assert second.task_id == "new"
    assert list(view.children.active) == ["new"]
    assert [effect.task.task_id for effect in asked.effects() if isinstance(effect, StartTask)] == [
        "new"
    ]
    assert len(asked.events) == (told if same_turn else 0) + 2


def test_what_it_begins_with_takes_no_place_of_those_that_run() -> None:
    launched = tuple(carried(n, launch=Launch(function="work")) for n in range(1, 9))
    limits = Limits(running_children=1, active_children=1)
    view = a_view(None, limits=limits)
    turn = a_turn(view)
    turn.take(c.Create(draft=successor(), carried=launched), "owner")

    taken = turn.take(c.AddTasks(drafts=(a_draft("new", launch=Launch(function="work")),)), "owner")

    assert taken.refusal is None
    assert view.children.active["new"].status is TaskStatus.RUNNING


def test_a_child_without_a_name_is_carried_all_the_same() -> None:
    view = a_view(None)
    turn = a_turn(view)

    turn.take(c.Create(draft=successor(), carried=(carried(1, run_id=None),)), "owner")

    assert turn.tasks.keys() == {"t1"}
    assert not view.children.run_ids


@pytest.mark.parametrize("same", [True, False])
def test_asking_twice_makes_one_flow_and_carries_its_children_once(same: bool) -> None:
    first = successor(idempotency_key="retry of triage-0", request_digest="triage-0")
    view = a_view(first)
    turn = a_turn(view)
    again = successor(
        idempotency_key="retry of triage-0", request_digest="triage-0" if same else "else"
    )

    taken = turn.take(c.Create(draft=again, carried=(carried(1),)), "owner")

    assert (taken.refusal is None) == same
    assert view.flow is first
    assert not (turn.events or turn.tasks or view.children.run_ids)


def test_a_flow_that_cannot_be_kept_carries_nobody() -> None:
    broken = c.Defect(Code.INVALID_STATE, "state_json is nan. Nothing was written.")
    view = a_view(None)
    turn = a_turn(view)

    taken = turn.take(c.Create(draft=successor(), defect=broken, carried=(carried(1),)), "owner")

    assert taken.refusal is not None
    assert view.flow is None
    assert not (turn.events or turn.tasks or turn.created or view.children.run_ids)


@given(
    names=st.lists(st.sampled_from([None, *"abcdef"]), max_size=12),
    last_seq=st.integers(0, 5),
)
@settings(PROFILE, max_examples=200)
def test_however_many_are_carried_the_history_has_no_gap_and_every_end_follows_its_beginning(
    names: list[str | None], last_seq: int
) -> None:
    children = tuple(carried(n, run_id=name) for n, name in enumerate(names))
    view = a_view(None)
    turn = a_turn(view, last_seq=last_seq)

    turn.take(c.Create(draft=successor(), carried=children), "owner")

    assert [event.seq for event in turn.events] == list(
        range(last_seq + 1, last_seq + 2 + 2 * len(children))
    )
    assert {event.revision for event in turn.events} == {0}
    begun = set[str | None]()
    for event in turn.events[1:]:
        assert (event.task_id in begun) == (event.type == EventType.TASK_ENDED)
        begun.add(event.task_id)
    assert view.children.run_ids.keys() == {name for name in names if name is not None}
