"""One wait, and everything that can befall it in every order: it is resolved once, by the first that may.

A signal for it, a new wait by hand, a cancel, the tick at its deadline, a restart: all sequences of them up to five
long, repetitions included, for a wait of the flow's own and for a step's, its controller in memory or parked, and
for a step that is selected against a rival. What must come of each is said by a few lines of plain Python that know
nothing of the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.code import Code
from flowstead.model.effect import ParkController, StartController, StopController
from flowstead.model.event import Event, EventType
from flowstead.model.flow import FlowStatus, StoredFlow, has_ended
from flowstead.model.task import StoredTask, TaskStatus, is_active
from flowstead.model.wait import OnTimeout
from flowstead.rules.children import Children
from flowstead.rules.turn import Turn
from flowstead.rules.view import View
from tests.unit.given import NOW, a_flow, a_view
from tests.unit.given_waits import (
    FITS,
    PARK_MS,
    SECOND,
    TOKEN,
    a_wait_draft,
    decoded,
    set_waiting,
    stand_in,
)

WORDS = ("signal", "set_waiting", "cancel", "timeout", "restart")
LENGTH = 5
ANSWERED, REPLACED, WITHDRAWN, TIMED_OUT = "answered", "replaced", "withdrawn", "timed out"
STEP_ENDS = {
    ANSWERED: TaskStatus.SUCCEEDED,
    WITHDRAWN: TaskStatus.CANCELLED,
    TIMED_OUT: TaskStatus.TIMED_OUT,
}


# ---- what must come of it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """A flow with one wait, as drawn on paper. `stands` says that it is what the flow waits for.

    `rival` says whether there is another, open, of which the first to end withdraws the other as long as it stands.
    """

    is_step: bool
    on_timeout: OnTimeout
    status: str = "waiting"
    stands: bool = True
    overdue: bool = False
    resolution: str | None = None
    rival: bool = False

    @property
    def ended(self) -> bool:
        return self.status in ("failed", "cancelled")

    def goes_on(self, how: str) -> Expected:
        """The wait is over. A flow whose own it was is queued; a controller runs, or is entered and runs."""
        status = self.status
        if self.stands:
            status = "running" if self.is_step else "queued"
        rival = self.rival and not self.stands
        return replace(self, resolution=how, status=status, stands=False, rival=rival)

    def after(self, word: str) -> tuple[Code | None, Expected]:
        """The code of the refusal, if it is one, and how it stands then."""
        is_open = self.resolution is None
        match word:
            case "signal":
                if self.ended:
                    return Code.LATE, self
                return (None, self.goes_on(ANSWERED)) if is_open else (Code.UNAWAITED, self)
            case "rival":
                if self.ended:
                    return Code.LATE, self
                if not self.rival:
                    return Code.UNAWAITED, self
                if self.stands:
                    return None, self.goes_on(WITHDRAWN)
                return None, replace(self, rival=False)
            case "set_waiting":
                if self.ended:
                    return Code.TERMINAL, self
                resolution = REPLACED if is_open and not self.is_step else self.resolution
                return None, replace(self, status="waiting", stands=False, resolution=resolution)
            case "cancel":
                if self.ended:
                    return Code.TERMINAL, self
                resolution = WITHDRAWN if is_open else self.resolution
                return None, replace(
                    self, status="cancelled", stands=False, resolution=resolution, rival=False
                )
            case "timeout":
                if self.ended or not is_open or self.overdue:
                    return None, self
                if self.on_timeout is OnTimeout.BLOCK:
                    status = "blocked" if self.stands else self.status
                    return None, replace(self, overdue=True, status=status)
                if self.on_timeout is OnTimeout.FAIL and not self.is_step:
                    return None, replace(self, status="failed", stands=False, resolution=TIMED_OUT)
                return None, self.goes_on(TIMED_OUT)
            case _:
                return None, self


# ---- what comes of it -----------------------------------------------------------------------------


@dataclass
class World:
    """The flow, its rows, and an engine that does what effects say."""

    flow: StoredFlow
    children: Children
    rows: dict[str, StoredTask]
    driven: bool
    now: int = NOW
    history: list[Event] = field(default_factory=list)
    deadline: int = 0
    stand: c.Await = field(default_factory=lambda: stand_in(a_wait_draft("a")))

    def copied(self) -> World:
        book = Children(
            active=dict(self.children.active),
            run_ids=dict(self.children.run_ids),
            waits=dict(self.children.waits),
        )
        return replace(self, children=book, rows=dict(self.rows), history=list(self.history))

    def view(self) -> View:
        view = a_view(self.flow, now=self.now, driven=self.driven, controllers={"triage"})
        view.children = self.children
        return view

    def turn(self, *commands: c.Command) -> list[Code | None]:
        """Take commands in one turn, see what a turn must always be, and carry out what it asks for."""
        view = self.view()
        turn = Turn(view, len(self.history))
        before = self.flow
        codes = []
        for command in commands:
            taken = turn.take(command, "someone")
            codes.append(None if taken.refusal is None else taken.refusal.code)
        assert view.flow is not None
        of_flow = [event for event in turn.events if event.type.startswith("flow.")]
        first = before.revision + 1
        assert [event.revision for event in of_flow] == list(range(first, first + len(of_flow)))
        assert view.flow.revision == before.revision + len(of_flow)
        assert view.flow.updated_at >= before.updated_at
        if all(code is not None for code in codes):
            assert view.flow is before
            assert not (turn.events or turn.tasks or turn.effects())
        for task_id, task in turn.tasks.items():
            row = self.rows.get(task_id)
            assert row is None or is_active(row), "an ended child has changed"
            self.rows[task_id] = task
        self.flow = view.flow
        self.history += turn.events
        for effect in turn.effects():
            self.carry_out(effect)
        return codes

    def carry_out(self, effect: Any) -> None:
        match effect:
            case StartController():
                if not self.driven:
                    self.driven = True
                    self.turn(c.EnterController())
                    self.turn(self.stand)
            case StopController():
                if self.driven:
                    self.driven = False
                    self.turn(c.ControllerStopped())
            case ParkController():
                self.driven = False
                self.turn(c.ControllerParked())
            case _:
                raise AssertionError(effect)

    def restart(self) -> None:
        self.driven = False
        self.children = Children.of(
            [task for task in self.rows.values() if is_active(task)],
            [(task.run_id, task.task_id) for task in self.rows.values() if task.run_id],
        )
        self.turn(c.Recover(), c.Tick())

    def befall(self, word: str) -> Code | None:
        match word:
            case "signal":
                return self.turn(c.Deliver(wait_key="k", payload=FITS))[0]
            case "rival":
                return self.turn(c.Deliver(wait_key="rival", payload=FITS))[0]
            case "set_waiting":
                return self.turn(set_waiting(self.view(), wait_key="by hand"))[0]
            case "cancel":
                return self.turn(c.Cancel())[0]
            case "timeout":
                self.now = max(self.now, self.deadline)
                return self.turn(c.Tick())[0]
            case _:
                self.restart()
                return None

    def resolution(self, *, is_step: bool) -> str | None:
        """How the wait came out, as the rows and the history tell it; and that they tell of one end only."""
        if is_step:
            ends = [e for e in self.history if e.type == "task.ended" and e.task_id == "A"]
            assert len(ends) <= 1
            row = self.rows["A"]
            assert is_active(row) is (ends == [])
            how = {status: name for name, status in STEP_ENDS.items()}
            return None if is_active(row) else how[row.status]
        told = [how for event in self.history if (how := _end_of_own(event)) is not None]
        return next(iter(told), None)


def _end_of_own(event: Event) -> str | None:
    """What one event says of the first own wait. `waitJson` is told when it is set and when it is cleared."""
    if event.type == EventType.FLOW_CANCELLED:
        return WITHDRAWN
    if event.type == EventType.FLOW_FAILED:
        return TIMED_OUT
    answer = event.changed.get("answerJson")
    if answer is not None:
        return TIMED_OUT if "timedOut" in decoded(answer) else ANSWERED  # type: ignore[arg-type]
    return REPLACED if event.type == EventType.FLOW_WAITING and event.seq > 1 else None


def a_flow_with_its_own_wait(on_timeout: OnTimeout) -> tuple[World, Expected]:
    world = World(a_flow(controller_id=None), Children(), {}, driven=False)
    world.deadline = NOW + 2 * SECOND
    wait = {"wait_key": "k", "deadline_at": world.deadline, "on_timeout": on_timeout}
    world.turn(set_waiting(world.view(), **wait))
    return world, Expected(is_step=False, on_timeout=on_timeout)


def a_flow_with_a_step(on_timeout: OnTimeout) -> tuple[World, Expected]:
    world = World(a_flow(), Children(), {}, driven=True)
    world.deadline = NOW + 2 * SECOND
    wait = {"wait_key": "k", "deadline_at": world.deadline, "on_timeout": on_timeout}
    world.turn(stand_in(a_wait_draft("a", **wait)))
    return world, Expected(is_step=True, on_timeout=on_timeout)


def a_flow_that_is_parked(on_timeout: OnTimeout) -> tuple[World, Expected]:
    world = World(a_flow(), Children(), {}, driven=True)
    world.deadline = NOW + 2 * PARK_MS
    wait = {"wait_key": "k", "deadline_at": world.deadline, "on_timeout": on_timeout}
    world.turn(stand_in(a_wait_draft("a", **wait)))
    world.now = NOW + PARK_MS
    world.turn(c.Tick())
    assert not world.driven
    return world, Expected(is_step=True, on_timeout=on_timeout)


def a_flow_that_selects(on_timeout: OnTimeout) -> tuple[World, Expected]:
    world = World(a_flow(), Children(), {}, driven=True)
    world.deadline = NOW + 2 * SECOND
    wait = {"wait_key": "k", "deadline_at": world.deadline, "on_timeout": on_timeout}
    drafts = (a_wait_draft("a", **wait), a_wait_draft("b", wait_key="rival"))
    world.stand = msgspec.structs.replace(stand_in(*drafts), withdraw=True)
    world.turn(world.stand)
    return world, Expected(is_step=True, on_timeout=on_timeout, rival=True)


MADE: dict[str, Callable[[OnTimeout], tuple[World, Expected]]] = {
    "its own wait": a_flow_with_its_own_wait,
    "a step": a_flow_with_a_step,
    "a step, parked": a_flow_that_is_parked,
}


def check(world: World, expected: Expected, done: tuple[str, ...]) -> None:
    flow, said = world.flow, " ".join(done)
    assert flow.status.value == expected.status, said
    assert world.resolution(is_step=expected.is_step) == expected.resolution, said
    assert has_ended(flow) is expected.ended, said
    waits = flow.status in (FlowStatus.WAITING, FlowStatus.BLOCKED)
    assert (flow.wait_json is not UNSET) is waits, said
    assert (flow.wait is not None) is (waits and not flow.awaiting), said
    group = ("A", "B") if "B" in world.rows else ("A",)
    assert (flow.awaiting == (group,)) is (expected.is_step and expected.stands), said
    if "B" in world.rows:
        assert is_active(world.rows["B"]) is expected.rival, said
    assert (flow.blocked_summary is not None) is (expected.status == "blocked"), said
    if waits:
        assert TOKEN.encode() not in bytes(flow.wait_json), said  # type: ignore[arg-type]
    if expected.resolution == ANSWERED and expected.is_step:
        assert decoded(world.rows["A"].result_json) == "fits", said
    elif expected.resolution == ANSWERED:
        assert decoded(flow.answer_json)["payload"] == "fits", said


@pytest.mark.parametrize("on_timeout", OnTimeout)
def test_of_two_that_are_selected_among_the_first_to_end_withdraws_the_other_in_every_order(
    on_timeout: OnTimeout,
) -> None:
    played: Counter[str] = Counter()

    def go_on(world: World, expected: Expected, done: tuple[str, ...]) -> None:
        for word in (*WORDS, "rival") if len(done) < LENGTH - 1 else ():
            then, course = world.copied(), (*done, word)

            code = then.befall(word)

            wanted, after = expected.after(word)
            assert code == wanted, " ".join(course)
            check(then, after, course)
            played[f"{after.resolution or 'open'}, {'rival' if after.rival else 'alone'}"] += 1
            go_on(then, after, course)

    world, expected = a_flow_that_selects(on_timeout)
    check(world, expected, ())
    go_on(world, expected, ())

    pairs = {"open, rival", "open, alone", "answered, alone", "answered, rival", "withdrawn, alone"}
    assert pairs <= played.keys(), "vacuous"


@pytest.mark.parametrize("on_timeout", OnTimeout)
@pytest.mark.parametrize("made", MADE)
def test_whatever_befalls_a_wait_it_is_resolved_once_and_by_the_first_that_may(
    made: str, on_timeout: OnTimeout
) -> None:
    played: Counter[str] = Counter()

    def go_on(world: World, expected: Expected, done: tuple[str, ...]) -> None:
        for word in WORDS if len(done) < LENGTH else ():
            then, course = world.copied(), (*done, word)
            before, told = then.flow, len(then.history)

            code = then.befall(word)

            wanted, after = expected.after(word)
            assert code == wanted, " ".join(course)
            if wanted is not None:
                assert then.flow is before, " ".join(course)
                assert len(then.history) == told, " ".join(course)
            if expected.resolution is not None:
                assert after.resolution == expected.resolution
            check(then, after, course)
            played[f"{len(course)}"] += 1
            played[after.resolution or "open"] += 1
            played[wanted or "taken"] += 1
            go_on(then, after, course)

    world, expected = MADE[made](on_timeout)
    check(world, expected, ())
    go_on(world, expected, ())

    assert [played[str(n + 1)] for n in range(LENGTH)] == [5 ** (n + 1) for n in range(LENGTH)]
    kinds = {ANSWERED, WITHDRAWN, "open", Code.LATE, Code.UNAWAITED, Code.TERMINAL, "taken"}
    kinds |= set() if expected.is_step else {REPLACED}
    kinds |= set() if on_timeout is OnTimeout.BLOCK else {TIMED_OUT}
    assert kinds <= played.keys(), "vacuous"


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("on_timeout", OnTimeout)
def test_it_makes_no_difference_whether_they_come_in_one_turn_or_each_in_its_own(
    made: str, on_timeout: OnTimeout
) -> None:
    for words in permutations(("signal", "set_waiting", "cancel", "timeout")):
        apart, _ = MADE[made](on_timeout)
        together, _ = MADE[made](on_timeout)
        # As if the loop had been held up: all of it is in the mailbox, and the deadline has passed.
        apart.now = together.now = apart.deadline
        apart.driven = together.driven = False
        apart.carry_out = together.carry_out = lambda effect: None  # type: ignore[method-assign]

        one_by_one = [apart.befall(word) for word in words]
        view = together.view()
        turn = Turn(view, 0)
        at_once = []
        for word in words:
            commands: dict[str, c.Command] = {
                "signal": c.Deliver(wait_key="k", payload=FITS),
                "cancel": c.Cancel(),
                "timeout": c.Tick(),
            }
            command = commands.get(word) or set_waiting(view, wait_key="by hand")
            refusal = turn.take(command, "someone").refusal
            at_once.append(None if refusal is None else refusal.code)

        assert at_once == one_by_one, words
        assert msgspec.json.encode(view.flow) == msgspec.json.encode(apart.flow), words
        assert dict(view.children.active) == dict(apart.children.active)
