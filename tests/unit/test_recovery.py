"""What becomes of each child when its flow is loaded again: every combination of facts that matter."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest

from flowstead.model import command as c
from flowstead.model.effect import StartController, StartTask
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.model.task import Launch, OnRestart, StoredTask, TaskStatus
from flowstead.rules.decide import decide
from flowstead.rules.recovery import Fate, fate_of
from flowstead.rules.view import Decision, View
from tests.unit.given import (
    ENDED,
    LIVE,
    NOW,
    a_flow,
    a_launched,
    a_linked,
    a_turn,
    a_view,
    book,
    with_fields,
)

LIMITS = Limits(interruptions=3)


class Facts(NamedTuple):
    """All that the fate of a launched child may depend on."""

    here: bool  # code of its attempt is running in this process, or about to report
    standing: str  # of the flow: live, intent, ended
    function: str  # registered; unknown here; bare and in memory; bare and gone with its process
    controller: bool  # the flow's controller is registered here
    on_restart: str
    status: str  # queued, pending (a retry not due), due (a retry due), running
    at_limit: bool  # of interruptions


ANY = None
QUEUED = frozenset({"queued", "due"})
NOT_ENDED = frozenset({"live", "intent"})
WAITING = frozenset({"queued", "pending", "due"})
AT_HAND = frozenset({"registered", "in memory"})

# One row, and only one, speaks of each child.
ROWS: list[tuple[tuple[Any, ...], Fate]] = [
    # here  standing  function    controller on_restart status    at_limit
    ((True, "ended", ANY, ANY, ANY, ANY, ANY), Fate.STOP),
    ((True, NOT_ENDED, ANY, ANY, ANY, ANY, ANY), Fate.KEEP),
    ((False, "intent", ANY, ANY, ANY, ANY, ANY), Fate.CANCEL),
    ((False, "ended", ANY, ANY, ANY, ANY, ANY), Fate.CANCEL),
    ((False, "live", "unknown", ANY, ANY, ANY, ANY), Fate.KEEP),
    ((False, "live", "gone", ANY, "lost", ANY, ANY), Fate.LOSE),
    ((False, "live", "gone", ANY, "retry", WAITING, ANY), Fate.KEEP),
    ((False, "live", "gone", ANY, "retry", "running", False), Fate.KEEP),
    ((False, "live", "gone", ANY, "retry", "running", True), Fate.LOSE),
    ((False, "live", AT_HAND, ANY, ANY, "pending", ANY), Fate.KEEP),
    ((False, "live", AT_HAND, ANY, ANY, QUEUED, ANY), Fate.LINE_UP),
    ((False, "live", AT_HAND, ANY, "lost", "running", ANY), Fate.LOSE),
    ((False, "live", AT_HAND, ANY, "retry", "running", True), Fate.LOSE),
    ((False, "live", AT_HAND, ANY, "retry", "running", False), Fate.RESTART),
]

EVERY = [
    Facts(*facts)
    for facts in product(
        (False, True),
        ("live", "intent", "ended"),
        ("registered", "unknown", "in memory", "gone"),
        (False, True),
        ("retry", "lost"),
        ("queued", "pending", "due", "running"),
        (False, True),
    )
]
NEXT_ATTEMPT_AT = {"queued": None, "pending": NOW + 1, "due": NOW, "running": None}


def fits(row: tuple[Any, ...], facts: Facts) -> bool:
    return all(
        cell is ANY or cell == fact or (isinstance(cell, frozenset) and fact in cell)
        for cell, fact in zip(row, facts, strict=True)
    )


def fate_by_the_table(facts: Facts) -> Fate:
    # Of a child that waits for its turn, or for a retry, only the end of an earlier attempt can be under way.
    facts = facts._replace(here=facts.here and facts.status == "running")
    return next(fate for row, fate in ROWS if fits(row, facts))


def named(facts: Facts) -> str:
    return "-".join(
        [
            facts.standing,
            facts.function,
            facts.on_restart,
            facts.status,
            "here" * facts.here,
            "driven_here" * facts.controller,
            "worn" * facts.at_limit,
        ]
    )


def ground(facts: Facts, **more: Any) -> tuple[View, StoredTask, c.Recover]:
    functions = {"registered": "work", "unknown": "elsewhere"}
    flow = a_flow(
        FlowStatus.FAILED if facts.standing == "ended" else FlowStatus.RUNNING,
        intent=facts.standing == "intent",
    )
    task = a_launched(
        "t",
        TaskStatus.RUNNING if facts.status == "running" else TaskStatus.QUEUED,
        launch=Launch(
            function=functions.get(facts.function),
            on_restart=OnRestart(facts.on_restart),
            retry=Retry(max_attempts=9),
        ),
        attempt=4,
        interruptions=3 if facts.at_limit else 2,
        run_id="step",
        next_attempt_at=NEXT_ATTEMPT_AT[facts.status],
    )
    view = a_view(
        flow,
        task,
        limits=LIMITS,
        running={"t"} if facts.here else set(),
        controllers={"triage"} if facts.controller else set(),
        bound={"step"} if facts.function == "in memory" else set(),
        **more,
    )
    return view, task, c.Recover()


def test_each_row_of_the_table_speaks_of_some_child_and_the_rows_do_not_overlap() -> None:
    for facts in EVERY:
        assert sum(fits(row, facts) for row, _ in ROWS) == 1, facts
    for row, _ in ROWS:
        assert any(fits(row, facts) for facts in EVERY), row


@pytest.mark.parametrize("facts", EVERY, ids=named)
def test_a_child_that_was_asked_to_stop_is_never_started_again(facts: Facts) -> None:
    view, task, _ = ground(facts)
    asked = with_fields(task, cancel_requested_at=NOW)

    fate, _ = fate_of(asked, view)

    assert fate is (Fate.STOP if facts.here and facts.status == "running" else Fate.CANCEL)


@pytest.mark.parametrize("facts", EVERY, ids=named)
def test_while_the_runtime_closes_nothing_is_started_and_nobody_is_given_up(facts: Facts) -> None:
    view, task, _ = ground(facts)
    view.closing = True

    fate, _ = fate_of(task, view)

    assert fate in (Fate.KEEP, Fate.CANCEL, Fate.STOP)
    assert (fate is Fate.CANCEL) == (fate_by_the_table(facts) is Fate.CANCEL)


@pytest.mark.parametrize("facts", EVERY, ids=named)
def test_the_fate_of_a_child_is_what_the_table_says(facts: Facts) -> None:
    view, task, _ = ground(facts)

    fate, why = fate_of(task, view)

    assert fate is fate_by_the_table(facts)
    assert why


@pytest.mark.parametrize("facts", EVERY, ids=named)
def test_recovery_does_what_the_fate_says_and_nothing_else(facts: Facts) -> None:
    view, task, recover = ground(facts)
    before = book(view)

    decision = decide(view, recover)

    assert isinstance(decision, Decision)
    assert book(view) == before
    assert decision.flow is None
    starts = [effect for effect in decision.effects if isinstance(effect, StartTask)]
    match fate_by_the_table(facts):
        case Fate.KEEP:
            assert not (decision.tasks or decision.facts or decision.lined_up or starts)
        case Fate.LINE_UP:
            assert decision.lined_up == ("t",)
            assert not (decision.tasks or decision.facts or starts)
        case Fate.RESTART:
            (after,) = decision.tasks
            assert after.status is TaskStatus.RUNNING
            assert after.attempt == task.attempt + 1
            assert after.interruptions == task.interruptions + 1
            assert after.started_at == task.started_at
            assert starts == [StartTask(after)]
            assert [fact.type for fact in decision.facts] == [EventType.TASK_STARTED]
        case Fate.CANCEL | Fate.LOSE as fate:
            (after,) = decision.tasks
            lost = fate is Fate.LOSE
            assert after.status is (TaskStatus.LOST if lost else TaskStatus.CANCELLED)
            assert after.ended_at == NOW
            assert after.next_attempt_at is None
            assert after.failure is not None
            assert after.failure.message
            assert after.failure.kind == ("interrupted" if lost else "cancelled")
            assert not (starts or decision.lined_up)
            assert [fact.type for fact in decision.facts] == [EventType.TASK_ENDED]


@pytest.mark.parametrize("standing", ["live", "intent", "ended"])
@pytest.mark.parametrize("status", [TaskStatus.QUEUED, TaskStatus.RUNNING])
def test_linked_children_run_elsewhere_and_recovery_leaves_them_alone(
    standing: str, status: TaskStatus
) -> None:
    flow = a_flow(
        FlowStatus.SUCCEEDED if standing == "ended" else FlowStatus.RUNNING,
        intent=standing == "intent",
    )
    view = a_view(flow, a_linked("l", status))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert view.flow is flow
    assert not (turn.events or turn.tasks or turn.effects())


@pytest.mark.parametrize("status", [*LIVE, *ENDED])
@pytest.mark.parametrize("controllers", [set[str](), {"triage"}], ids=["unknown", "registered"])
@pytest.mark.parametrize("driven", [False, True])
def test_an_idle_restart_changes_no_row_and_tells_nothing(
    status: FlowStatus, controllers: set[str], driven: bool
) -> None:
    flow = a_flow(status)
    kept = [
        a_launched("pending", TaskStatus.QUEUED, next_attempt_at=NOW + 1),
        a_launched("unknown", TaskStatus.QUEUED, launch=Launch(function="elsewhere")),
        a_launched("alive"),
        a_linked("linked"),
    ]
    tasks = kept if status in LIVE else kept[3:]
    view = a_view(flow, *tasks, running={"alive"}, controllers=controllers, driven=driven)
    turn = a_turn(view, last_seq=12)
    before = book(view)

    taken = turn.take(c.Recover(), "runtime")

    assert taken.refusal is None
    assert view.flow is flow
    assert book(view) == before
    assert not (turn.events or turn.tasks or turn.created)


@pytest.mark.parametrize("status", [*LIVE, *ENDED])
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("driven", [False, True])
def test_recovery_enters_the_controller_of_a_flow_that_was_on_its_way(
    status: FlowStatus, registered: bool, driven: bool
) -> None:
    view = a_view(
        a_flow(status), driven=driven, controllers={"triage"} if registered else set[str]()
    )
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    on_its_way = status in {FlowStatus.QUEUED, FlowStatus.RUNNING}
    enters = on_its_way and registered and not driven
    assert list(turn.effects()) == ([StartController("triage")] if enters else [])


def test_recovering_a_flow_that_is_not_there_is_refused() -> None:
    view = a_view(None)

    taken = a_turn(view).take(c.Recover(), "runtime")

    assert taken.refusal is not None
    assert view.flow is None


def test_a_cancel_cut_off_by_a_crash_is_concluded_on_loading() -> None:
    view = a_view(a_flow(intent=True), a_launched("cut off"), a_launched("q", TaskStatus.QUEUED))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED
    assert {task.status for task in turn.tasks.values()} == {TaskStatus.CANCELLED}
    assert list(turn.effects()) == []


def test_what_was_queued_starts_again_within_its_limit() -> None:
    waiting = [a_launched(f"t{n}", TaskStatus.QUEUED) for n in range(5)]
    view = a_view(a_flow(), *waiting, limits=Limits(running_children=2))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    started = [effect.task.task_id for effect in turn.effects() if isinstance(effect, StartTask)]
    assert started == ["t0", "t1"]


def test_children_cut_off_count_against_the_limit_before_queued_ones_start() -> None:
    view = a_view(
        a_flow(),
        a_launched("cut off"),
        a_launched("next", TaskStatus.QUEUED),
        a_launched("last", TaskStatus.QUEUED),
        limits=Limits(running_children=2),
    )
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    started = [effect.task.task_id for effect in turn.effects() if isinstance(effect, StartTask)]
    assert sorted(started) == ["cut off", "next"]


def test_an_interruption_spends_no_attempt_and_the_retries_go_on_where_they_were() -> None:
    launch = Launch(function="work", retry=Retry(max_attempts=2, initial=0.0, jitter=0.0))
    view = a_view(a_flow(), a_launched("t", launch=launch))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    restarted = view.children.active["t"]
    assert restarted.attempt - restarted.interruptions == 1


def test_a_child_restarted_once_too_often_is_lost_and_says_how_often() -> None:
    view = a_view(a_flow(), a_launched("t", interruptions=2), limits=Limits(interruptions=2))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    failure = turn.tasks["t"].failure
    assert failure is not None
    assert failure.message is not None
    assert "3 times" in failure.message


def test_a_retry_that_falls_due_where_its_function_is_not_registered_is_kept_for_another_runtime() -> (
    None
):
    launch = Launch(function="elsewhere", retry=Retry(max_attempts=3))
    pending = a_launched("t", TaskStatus.QUEUED, launch=launch, attempt=1, next_attempt_at=NOW)
    view = a_view(a_flow(), pending)
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")
    turn.take(c.Tick(), "runtime")

    assert list(turn.effects()) == []
    assert view.children.active["t"] == pending


def test_a_child_asked_for_again_by_its_controller_runs_under_a_new_attempt() -> None:
    bare = Launch()
    view = a_view(a_flow(), a_launched("t", launch=bare, run_id="step"), controllers={"triage"})
    turn = a_turn(view)
    again = c.TaskDraft(
        key=8, task_id="other", runtime="subagent", task="work", run_id="step", launch=bare
    )

    turn.take(c.Recover(), "runtime")
    taken = turn.take(c.AddTasks(drafts=(again, again)), "controller")

    (effect,) = [effect for effect in turn.effects() if isinstance(effect, StartTask)]
    assert effect.task.task_id == "t"
    assert effect.task.attempt == 2
    assert effect.task.interruptions == 1
    assert taken.children == (effect.task, effect.task)
