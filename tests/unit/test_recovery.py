"""What becomes of each child when its flow is loaded again: every combination of facts that matter."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest

from flowstead.model import command as c
from flowstead.model.effect import (
    DrainTask,
    Effect,
    KillTask,
    StartController,
    StartTask,
    StopReason,
    StopTask,
)
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.model.task import Cancelled, Launch, OnRestart, StoredTask, TaskStatus
from flowstead.rules.decide import decide
from flowstead.rules.recovery import Fate, fate_of
from flowstead.rules.view import Boundless, Decision, View
from tests.unit.given import (
    ENDED,
    LIVE,
    NOTHING_TO_PATCH,
    NOW,
    a_command,
    a_draft,
    a_flow,
    a_launched,
    a_linked,
    a_nested,
    a_turn,
    a_view,
    book,
    in_review,
    retrying,
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
    status: str  # queued, pending (a retry not due), due (a retry due), review, running
    at_limit: bool  # of interruptions


ANY = None
QUEUED = frozenset({"queued", "due"})
NOT_ENDED = frozenset({"live", "intent"})
HELD = frozenset({"pending", "review"})
WAITING = QUEUED | HELD
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
    ((False, "live", AT_HAND, ANY, ANY, HELD, ANY), Fate.KEEP),
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
        ("queued", "pending", "due", "review", "running"),
        (False, True),
    )
]
NEXT_ATTEMPT_AT = {"pending": NOW + 1, "due": NOW}


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
        next_attempt_at=NEXT_ATTEMPT_AT.get(facts.status),
        review_requested_at=NOW - 9 if facts.status == "review" else None,
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
            assert starts == [StartTask(after, adopted=True)]
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


class Full:
    """A runtime without room for another child."""

    def take(self, task: StoredTask) -> bool:
        return False


def test_a_child_that_was_cut_off_stands_in_line_again_where_others_have_taken_the_room() -> None:
    view = a_view(a_flow(), a_launched("t", attempt=4, interruptions=1), room=Full())
    turn, later = a_turn(view), a_turn(view)

    turn.take(c.Recover(), "runtime")
    waits = view.children.active["t"]
    view.room = Boundless()
    later.take(c.Wake(), "runtime")

    assert (waits.status, waits.attempt, waits.interruptions) == (TaskStatus.QUEUED, 4, 2)
    assert [event.type for event in turn.events] == [EventType.TASK_INTERRUPTED]
    assert list(turn.effects()) == []
    after = view.children.active["t"]
    assert (after.status, after.attempt, after.interruptions) == (TaskStatus.RUNNING, 5, 2)
    assert list(later.effects()) == [StartTask(after)]


def test_what_a_crash_left_of_a_program_takes_its_room_whether_there_is_any_or_not() -> None:
    view = a_view(a_flow(), a_launched("t", launch=a_command()), room=Full())
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    after = view.children.active["t"]
    assert (after.status, after.attempt) == (TaskStatus.RUNNING, 2)
    assert list(turn.effects()) == [StartTask(after, adopted=True)]


def test_a_child_started_by_what_brought_its_flow_back_is_not_taken_for_one_that_was_cut_off() -> (
    None
):
    view = a_view(a_flow(), a_launched("cut off"), a_launched("t", TaskStatus.QUEUED))
    turn = a_turn(view)

    turn.take(c.AddTasks(drafts=(a_draft("new", launch=Launch(function="work")),)), "owner")
    turn.take(c.Recover(), "runtime")

    assert turn.tasks["new"].attempt == 1
    assert sorted(e.task.task_id for e in turn.effects() if isinstance(e, StartTask)) == [
        "cut off",
        "new",
        "t",
    ]


@pytest.mark.parametrize(
    ("launch", "missing"),
    [
        (Launch(function="elsewhere"), {"elsewhere"}),
        (Launch(), set()),
        (a_command(executor="warehouse"), {"warehouse"}),
        (Launch(function="work"), set()),
    ],
    ids=["function", "bare", "executor", "registered"],
)
@pytest.mark.parametrize("status", [TaskStatus.QUEUED, TaskStatus.RUNNING])
def test_what_a_kept_child_lacks_here_is_named_once(
    launch: Launch, missing: set[str], status: TaskStatus
) -> None:
    children = [a_launched(name, status, launch=launch) for name in "ab"]
    view = a_view(a_flow(), *children)
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert turn.unregistered == missing


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


# ---- children of which something may be left outside ----------------------------------------------


class Outside(NamedTuple):
    """All that the fate of an external child may depend on."""

    here: bool  # code of its attempt is running in this process
    closing: bool
    standing: str  # of the flow: live, intent, demanded (a cancel was begun), ended
    at_hand: bool  # its executor is here
    asked: bool  # the child itself was asked to stop
    nested: bool  # it stands for a flow
    on_restart: str
    worn: bool
    status: str


STILL_WANTED = frozenset({"live", "intent"})
UNWANTED = frozenset({"demanded", "ended"})
NOT_LIVE = frozenset({"intent", "demanded", "ended"})
NOT_OVER = frozenset({"live", "intent", "demanded"})

# Here too one row, and only one, speaks of each child.
OUTSIDE_ROWS: list[tuple[tuple[Any, ...], Fate]] = [
    # here  closing standing at_hand asked nested on_restart worn  status
    ((True, ANY, "ended", ANY, ANY, ANY, ANY, ANY, "running"), Fate.STOP),
    (
        (
            True,
            ANY,
            NOT_OVER,
            ANY,
            True,
            ANY,
            ANY,
            ANY,
            "running",
        ),
        Fate.STOP,
    ),
    (
        (
            True,
            ANY,
            NOT_OVER,
            ANY,
            False,
            ANY,
            ANY,
            ANY,
            "running",
        ),
        Fate.KEEP,
    ),
    ((False, True, ANY, ANY, ANY, ANY, ANY, ANY, "running"), Fate.KEEP),
    ((False, False, ANY, False, ANY, ANY, ANY, ANY, "running"), Fate.KEEP),
    ((False, False, UNWANTED, True, ANY, ANY, ANY, ANY, "running"), Fate.ADOPT_TO_STOP),
    ((False, False, STILL_WANTED, True, True, ANY, ANY, ANY, "running"), Fate.ADOPT_TO_STOP),
    ((False, False, STILL_WANTED, True, False, True, ANY, ANY, "running"), Fate.ADOPT),
    ((False, False, "intent", True, False, False, ANY, ANY, "running"), Fate.ADOPT_TO_STOP),
    ((False, False, "live", True, False, False, "lost", ANY, "running"), Fate.ADOPT_TO_LOSE),
    ((False, False, "live", True, False, False, "retry", True, "running"), Fate.ADOPT_TO_LOSE),
    ((False, False, "live", True, False, False, "retry", False, "running"), Fate.RESTART),
    # What waits has nothing outside yet, or not any more.
    ((ANY, ANY, NOT_LIVE, ANY, ANY, ANY, ANY, ANY, WAITING), Fate.CANCEL),
    ((ANY, ANY, "live", ANY, True, ANY, ANY, ANY, WAITING), Fate.CANCEL),
    ((ANY, True, "live", ANY, False, ANY, ANY, ANY, WAITING), Fate.KEEP),
    ((ANY, False, "live", False, False, ANY, ANY, ANY, WAITING), Fate.KEEP),
    ((ANY, False, "live", True, False, ANY, ANY, ANY, HELD), Fate.KEEP),
    ((ANY, False, "live", True, False, ANY, ANY, ANY, QUEUED), Fate.LINE_UP),
]
EVERY_OUTSIDE = [
    Outside(*facts)
    for facts in product(
        (False, True),
        (False, True),
        ("live", "intent", "demanded", "ended"),
        (False, True),
        (False, True),
        (False, True),
        ("retry", "lost"),
        (False, True),
        ("queued", "pending", "due", "review", "running"),
    )
]


def outside_fate_by_the_table(facts: Outside) -> Fate:
    return next(fate for row, fate in OUTSIDE_ROWS if fits(row, facts))


def outside_ground(facts: Outside, *, killed: bool = False) -> tuple[View, StoredTask]:
    ended, demanded = facts.standing == "ended", facts.standing == "demanded"
    flow = a_flow(
        FlowStatus.FAILED if ended else FlowStatus.RUNNING,
        intent=facts.standing in {"intent", "demanded"},
        cancel_started_at=NOW - 900 if demanded else None,
    )
    launch = (a_nested if facts.nested else a_command)(on_restart=OnRestart(facts.on_restart))
    task = a_launched(
        "t",
        TaskStatus.RUNNING if facts.status == "running" else TaskStatus.QUEUED,
        launch=launch,
        attempt=4,
        interruptions=3 if facts.worn else 2,
        run_id="step",
        child_flow_id="inner-1" if facts.nested else None,
        next_attempt_at=NEXT_ATTEMPT_AT.get(facts.status),
        review_requested_at=NOW - 9 if facts.status == "review" else None,
        cancel_requested_at=NOW - 800 if facts.asked else None,
        kill_requested_at=NOW - 700 if killed else None,
    )
    view = a_view(
        flow,
        task,
        limits=LIMITS,
        running={"t"} if facts.here else set(),
        executors=frozenset({"command", "flow"}) if facts.at_hand else frozenset(),
        closing=facts.closing,
    )
    return view, task


def test_each_row_of_the_outer_table_speaks_of_some_child_and_the_rows_do_not_overlap() -> None:
    for facts in EVERY_OUTSIDE:
        assert sum(fits(row, facts) for row, _ in OUTSIDE_ROWS) == 1, facts
    for row, _ in OUTSIDE_ROWS:
        assert any(fits(row, facts) for facts in EVERY_OUTSIDE), row


@pytest.mark.parametrize("standing", ["live", "intent", "demanded", "ended"])
@pytest.mark.parametrize("nested", [False, True], ids=["command", "nested"])
def test_the_fate_of_an_external_child_is_what_its_table_says(standing: str, nested: bool) -> None:
    for facts in EVERY_OUTSIDE:
        if (facts.standing, facts.nested) == (standing, nested):
            view, task = outside_ground(facts)

            fate, why = fate_of(task, view)

            assert fate is outside_fate_by_the_table(facts), facts
            assert why


@pytest.mark.parametrize("fate", sorted({fate for _, fate in OUTSIDE_ROWS}))
@pytest.mark.parametrize("killed", [False, True])
def test_recovery_does_to_an_external_child_what_its_fate_says(fate: Fate, killed: bool) -> None:
    seen = 0
    for facts in EVERY_OUTSIDE:
        if outside_fate_by_the_table(facts) is not fate:
            continue
        if killed and not (facts.asked and facts.status == "running"):
            continue  # nobody is killed before it was asked to stop
        seen += 1
        view, task = outside_ground(facts, killed=killed)

        decision = decide(view, c.Recover())

        assert isinstance(decision, Decision)
        assert decision.flow is None
        check_external(facts, fate, task, decision, killed=killed)
    assert seen or (killed and fate not in (Fate.STOP, Fate.KEEP, Fate.ADOPT_TO_STOP)), "vacuous"


def check_external(
    facts: Outside, fate: Fate, task: StoredTask, decision: Decision, *, killed: bool
) -> None:
    told = [fact.type for fact in decision.facts]
    reason = StopReason.FLOW_ENDED if facts.standing == "ended" else StopReason.CANCELLED
    stop: list[Effect] = [StopTask("t", reason), *([KillTask("t")] if killed else [])]
    effects = list(decision.effects)
    match fate:
        case Fate.KEEP | Fate.LINE_UP:
            # A commit nobody could vouch for may have left an intent that its code has not heard of.
            unheard = facts.here and facts.nested and facts.standing in {"intent", "demanded"}
            assert not (decision.tasks or told)
            assert effects == ([DrainTask("t")] if unheard and fate is Fate.KEEP else [])
            assert decision.lined_up == (("t",) if fate is Fate.LINE_UP else ())
        case Fate.CANCEL:
            assert told == [EventType.TASK_ENDED]
            assert not effects
        case Fate.STOP:
            assert not (decision.tasks or told)
            assert effects == stop
        case Fate.ADOPT:
            drain = [DrainTask("t")] if facts.standing == "intent" else []
            assert not (decision.tasks or told)
            assert effects == [StartTask(task, adopted=True), *drain]
        case Fate.ADOPT_TO_LOSE:
            assert not (decision.tasks or told)
            assert effects == [
                StartTask(task, adopted=True),
                StopTask("t", StopReason.INTERRUPTED),
            ]
        case Fate.ADOPT_TO_STOP:
            (after,) = decision.tasks or (task,)
            # The last rung begins anew: nobody has had the time of it.
            again = [EventType.TASK_KILL_REQUESTED] if killed else []
            assert told == (again if facts.asked else [EventType.TASK_CANCEL_REQUESTED])
            assert after.kill_requested_at == (NOW if killed else None)
            assert after.cancel_requested_at == (NOW - 800 if facts.asked else NOW)
            assert (after.attempt, after.interruptions) == (task.attempt, task.interruptions)
            assert effects == [StartTask(after, adopted=True), *stop]
        case Fate.RESTART:
            (after,) = decision.tasks
            assert (after.attempt, after.interruptions) == (5, task.interruptions + 1)
            assert effects == [StartTask(after, adopted=True)]
        case _:
            raise AssertionError(f"no external child is to be dealt with by {fate}")


def test_an_external_child_never_ends_by_its_record_alone_whatever_is_asked_of_its_flow() -> None:
    commands: list[c.Command] = [
        c.Cancel(),
        c.RequestCancel(expected_revision=7),
        c.CancelTask(task_id="t"),
        c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH),
        c.Fail(expected_revision=7, patch=NOTHING_TO_PATCH),
    ]
    for launch, command in product((a_command(), a_nested()), commands):
        inner = "inner-1" if launch.executor == "flow" else None
        view = a_view(a_flow(), a_launched("t", launch=launch, child_flow_id=inner))
        turn = a_turn(view)

        turn.take(c.Recover(), "runtime")
        turn.take(command, "owner")

        assert "t" in view.children.active
        assert any(isinstance(effect, StartTask) for effect in turn.effects())
        if isinstance(command, c.RequestCancel):
            assert any(isinstance(effect, DrainTask) for effect in turn.effects()) == bool(inner)
        else:
            assert view.children.active["t"].cancel_requested_at == NOW
            assert any(isinstance(effect, StopTask) for effect in turn.effects())


@pytest.mark.parametrize(
    "command",
    [
        c.Cancel(),
        c.RequestCancel(expected_revision=7),
        c.CancelTask(task_id="t"),
        c.Finish(expected_revision=7, patch=NOTHING_TO_PATCH),
    ],
    ids=lambda command: type(command).__name__,
)
@pytest.mark.parametrize("kept", ["closing", "no executor"])
def test_an_external_child_that_nobody_here_can_see_to_does_not_end_by_its_record_either(
    command: c.Command, kept: str
) -> None:
    view = a_view(
        a_flow(),
        a_launched("t", launch=a_nested(), child_flow_id="inner-1"),
        closing=kept == "closing",
        executors=frozenset({"flow"}) if kept == "closing" else frozenset(),
    )
    turn = a_turn(view)
    turn.take(c.Recover(), "runtime")

    turn.take(command, "owner")

    assert "t" in view.children.active


def test_a_flow_whose_cancel_was_begun_before_a_crash_does_not_enter_its_controller_again() -> None:
    for status in (FlowStatus.QUEUED, FlowStatus.RUNNING):
        flow = a_flow(status, intent=True, cancel_started_at=NOW - 900)
        left = a_launched("t", launch=a_command())
        view = a_view(flow, left, controllers={"triage"})
        turn = a_turn(view)

        turn.take(c.Recover(), "runtime")
        assert not any(isinstance(effect, StartController) for effect in turn.effects())
        assert view.flow is flow
        gone = c.EndReport(task_id="t", attempt=1, outcome=Cancelled(Failure(kind="cancelled")))
        turn.take(gone, "runtime")

        assert view.flow is not None
        assert view.flow.status is FlowStatus.CANCELLED
        assert not any(isinstance(effect, StartController) for effect in turn.effects())


def test_a_flow_with_an_intent_alone_enters_its_controller_again_so_that_it_may_end_honestly() -> (
    None
):
    view = a_view(a_flow(intent=True), controllers={"triage"})
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert list(turn.effects()) == [StartController("triage")]


def test_a_cancel_begun_before_a_crash_ends_the_flow_at_once_where_nothing_is_left() -> None:
    view = a_view(a_flow(intent=True, cancel_started_at=NOW - 900), controllers={"triage"})
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert view.flow is not None
    assert view.flow.status is FlowStatus.CANCELLED
    assert list(turn.effects()) == []


@pytest.mark.parametrize(
    ("launch", "code"),
    [
        (Launch(function="work", on_restart=OnRestart.LOST), "unknown"),
        (Launch(on_restart=OnRestart.LOST), None),
    ],
    ids=["not to be done twice", "bare"],
)
def test_a_child_that_must_not_be_done_twice_is_lost_and_says_that_nobody_knows(
    launch: Launch, code: str | None
) -> None:
    view = a_view(a_flow(), a_launched("t", launch=launch))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    lost = turn.tasks["t"]
    assert lost.status is TaskStatus.LOST
    assert lost.failure is not None
    assert (lost.failure.kind, lost.failure.code) == ("interrupted", code)
    assert lost.failure.message


def test_a_review_survives_a_restart_without_a_word_and_its_flow_stays_blocked() -> None:
    flow = a_flow(
        FlowStatus.BLOCKED, blocked_task_id="t", blocked_summary="'step' needs review: odd"
    )
    view = a_view(flow, in_review("t", launch=retrying()), controllers={"triage"})
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")
    turn.take(c.Tick(), "runtime")

    assert view.flow is flow
    assert not (turn.events or turn.tasks or turn.effects())


def test_a_flow_that_lost_its_block_in_a_crash_is_blocked_again_when_it_is_loaded() -> None:
    view = a_view(a_flow(), in_review("t"))
    turn = a_turn(view)

    turn.take(c.Recover(), "runtime")

    assert view.flow is not None
    assert (view.flow.status, view.flow.blocked_task_id) == (FlowStatus.BLOCKED, "t")
