"""Children that stand for flows, as the rules see them: how deep they may lie, and what is passed on to them."""

from __future__ import annotations

from typing import Any

import pytest

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.effect import DrainTask, StartTask, StopReason, StopTask
from flowstead.model.flow import FlowStatus
from flowstead.model.limits import Limits
from flowstead.model.task import Launch, StoredTask, TaskStatus
from tests.unit.given import (
    ENDED,
    NOTHING_TO_PATCH,
    NOW,
    a_draft,
    a_flow,
    a_launched,
    a_nested,
    a_turn,
    a_view,
)

LIMITS = Limits(nested_depth=3, running_children=8)


def inner_draft(task_id: str = "n", **fields: Any) -> c.TaskDraft:
    return a_draft(task_id, **{"launch": a_nested(), "child_flow_id": f"inner-{task_id}"} | fields)


def a_nested_child(task_id: str = "n", **fields: Any) -> StoredTask:
    return a_launched(task_id, launch=a_nested(), child_flow_id=f"inner-{task_id}", **fields)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_nested_flow_knows_how_deep_it_lies_and_under_which_flow(depth: int) -> None:
    root = {"depth": depth, "root_id": "top" if depth else None}
    view = a_view(a_flow(**root), limits=LIMITS)
    turn = a_turn(view)

    taken = turn.take(c.AddTasks(drafts=(inner_draft(),)), "controller")

    [child] = taken.children
    assert isinstance(child, StoredTask)
    assert child.launch is not None
    assert child.child_flow_id == "inner-n"
    assert (child.launch.depth, child.launch.root_id) == (depth + 1, "top" if depth else "triage-1")
    assert turn.events[0].changed["childFlowId"] == "inner-n"


@pytest.mark.parametrize("depth", [3, 4, 100])
def test_a_flow_as_deep_as_flows_may_lie_begins_no_other_and_nothing_beside_it(depth: int) -> None:
    flow = a_flow(depth=depth, root_id="top")
    view = a_view(flow, limits=LIMITS)
    turn = a_turn(view)
    drafts = (a_draft("plain", launch=Launch(function="work")), inner_draft())

    taken = turn.take(c.AddTasks(drafts=drafts), "controller")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.LIMIT_REACHED
    assert taken.refusal.reason.endswith("Nothing was added.")
    assert str(depth) in taken.refusal.reason
    assert "3" in taken.refusal.reason
    assert not (turn.events or turn.tasks or view.children.active)


def test_the_deepest_flow_still_runs_children_of_other_sorts() -> None:
    view = a_view(a_flow(depth=3, root_id="top"), limits=LIMITS)

    plain = a_draft("plain", launch=Launch(function="work"))
    taken = a_turn(view).take(c.AddTasks(drafts=(plain,)), "controller")

    assert taken.refusal is None


def test_a_nested_child_that_is_there_already_is_answered_however_deep_its_flow_lies() -> None:
    known = a_nested_child(run_id="step")
    view = a_view(a_flow(depth=3, root_id="top"), known, running={"n"}, limits=LIMITS)

    taken = a_turn(view).take(
        c.AddTasks(drafts=(inner_draft("other", run_id="step"),)), "controller"
    )

    assert taken.refusal is None
    assert taken.children == (known,)


def test_it_counts_towards_the_limit_of_its_own_flow_and_no_other() -> None:
    class Full:
        def take(self, task: StoredTask) -> bool:
            assert task.launch is not None
            return not task.launch.holds_slot

    view = a_view(a_flow(), limits=Limits(running_children=2), room=Full())
    turn = a_turn(view)
    drafts = (
        a_draft("plain", launch=Launch(function="work"), key=1),
        *(inner_draft(f"n{n}", key=2 + n) for n in range(3)),
    )

    turn.take(c.AddTasks(drafts=drafts), "controller")

    started = [e.task.task_id for e in turn.effects() if isinstance(e, StartTask)]
    assert started == ["n0", "n1"]
    assert view.children.active["plain"].status is TaskStatus.QUEUED


@pytest.mark.parametrize("revision", [7, None], ids=["by its owner", "passed on from above"])
def test_an_intent_is_passed_on_and_the_flow_waits_for_the_one_below(revision: int | None) -> None:
    view = a_view(
        a_flow(),
        a_nested_child(),
        a_nested_child("waits", status=TaskStatus.QUEUED),
        a_launched("t"),
        running={"n", "t"},
        lined_up=["waits"],
    )
    turn = a_turn(view)

    taken = turn.take(c.RequestCancel(expected_revision=revision), "owner")

    assert taken.refusal is None
    assert list(turn.effects()) == [DrainTask("n")]
    assert turn.tasks.keys() == {"waits"}
    assert turn.tasks["waits"].status is TaskStatus.CANCELLED
    assert sorted(view.children.active) == ["n", "t"]
    assert view.flow is not None
    assert view.flow.status is FlowStatus.RUNNING


@pytest.mark.parametrize("status", ENDED)
def test_an_intent_passed_on_to_a_flow_that_has_ended_changes_nothing(status: FlowStatus) -> None:
    flow = a_flow(status)
    view = a_view(flow)

    taken = a_turn(view).take(c.RequestCancel(expected_revision=None), "runtime")

    assert taken.refusal is not None
    assert taken.refusal.code is Code.TERMINAL
    assert view.flow is flow


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (c.Cancel(), StopReason.CANCELLED),
        (c.CancelTask(task_id="n"), StopReason.CANCELLED),
        (c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH), StopReason.FLOW_ENDED),
        (c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH), StopReason.FLOW_ENDED),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
@pytest.mark.parametrize("when", ["runs", "starts in the same turn"])
def test_whatever_stops_the_child_stops_the_flow_below_and_waits_for_its_end(
    command: c.Command, reason: StopReason, when: str
) -> None:
    runs = when == "runs"
    view = a_view(a_flow(), *((a_nested_child(),) if runs else ()), running={"n"})
    turn = a_turn(view)
    if not runs:
        turn.take(c.AddTasks(drafts=(inner_draft(),)), "controller")

    turn.take(command, "owner")

    child = view.children.active["n"]
    assert (child.status, child.cancel_requested_at) == (TaskStatus.RUNNING, NOW)
    effects = list(turn.effects())
    assert effects[-1] == StopTask("n", reason)
    assert len(effects) == (1 if runs else 2)
