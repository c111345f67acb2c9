"""Slots that all flows share: never more than there are, none idle while somebody waits, and nobody overtakes."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from flowstead.engine.slots import Slots
from flowstead.model import command as c
from flowstead.model.effect import StartTask
from flowstead.model.flow import Failure, FlowKey
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.model.task import Failed, Launch, StoredTask, Succeeded, TaskStatus, is_active
from flowstead.rules.children import Children
from flowstead.rules.turn import Turn
from flowstead.rules.view import View
from tests.unit.given import NOW, a_flow, a_launched, a_nested

LIMITS_OF = {"one": 1, "two": 2}


class Desk:
    """Slots, and who was woken for one."""

    def __init__(self, most: int, limits: dict[str, int] | None = None) -> None:
        self.limits = LIMITS_OF if limits is None else limits
        self.woken: list[str] = []
        self.slots = Slots(most, self.limits.get, lambda key: self.woken.append(key.flow_id))

    def take(self, flow: str, task_id: str, function: str | None = "any") -> bool:
        return self.slots.room_for(key(flow)).take(child(task_id, function))

    def over(self, *flows: str) -> None:
        for flow in flows:
            self.slots.turn_over(key(flow))

    def heard(self) -> list[str]:
        woken, self.woken[:] = list(self.woken), []
        return woken


def key(flow: str) -> FlowKey:
    return FlowKey("agent:main", flow)


def child(task_id: str, function: str | None = "any") -> StoredTask:
    return a_launched(task_id, launch=Launch(function=function))


# ---- one limit ------------------------------------------------------------------------------------


def test_there_are_as_many_slots_as_there_are_and_no_more() -> None:
    desk = Desk(3)

    assert [desk.take("f", f"t{n}") for n in range(5)] == [True, True, True, False, False]
    desk.slots.give_back("t1")
    assert [desk.take("f", f"t{n}") for n in (5, 6)] == [True, False]


def test_a_child_that_holds_its_slot_takes_no_second_one() -> None:
    desk = Desk(2)

    assert [desk.take("f", "t") for _ in range(5)] == [True] * 5
    assert [desk.take("f", "u"), desk.take("f", "v")] == [True, False]


def test_giving_back_what_one_does_not_have_frees_nothing() -> None:
    desk = Desk(1)
    desk.take("f", "t")

    desk.slots.give_back("stranger")
    assert not desk.take("f", "u")
    desk.slots.give_back("t")
    desk.slots.give_back("t")

    assert [desk.take("f", "u"), desk.take("f", "v")] == [True, False]


def test_a_slot_that_comes_free_is_kept_for_the_flow_that_has_waited_longest() -> None:
    desk = Desk(1)
    desk.take("holder", "h")
    for flow in "abc":
        assert not desk.take(flow, flow)
        desk.over(flow)
    order = []
    holder = "h"

    for _ in range(3):
        desk.slots.give_back(holder)
        [flow] = desk.heard()
        for other in set("abc") - {flow}:
            assert not desk.take(other, f"{other}, pushing in")
            desk.over(other)
        holder = f"{flow} {len(order)}"
        assert desk.take(flow, holder)
        desk.over(flow)
        order.append(flow)

    assert order == ["a", "b", "c"]


def test_a_flow_that_comes_by_while_others_wait_does_not_overtake_them() -> None:
    desk = Desk(2)
    desk.take("holder", "h")
    desk.take("holder", "i")
    desk.take("waits", "w")
    desk.over("waits")

    desk.slots.give_back("h")

    assert not desk.take("comes by", "x")
    assert desk.take("waits", "w")


def test_what_was_kept_and_is_not_wanted_any_more_goes_to_the_next_in_line() -> None:
    desk = Desk(1)
    desk.take("holder", "h")
    for flow in "abc":
        desk.take(flow, flow)
        desk.over(flow)
    desk.slots.give_back("h")
    heard = [desk.heard()]

    for flow in "abc":
        desk.over(flow)
        heard.append(desk.heard())

    assert heard == [["a"], ["b"], ["c"], []]
    assert desk.take("d", "anybody may have it now")


def test_a_flow_that_wants_several_is_given_one_each_time_it_is_its_turn() -> None:
    desk = Desk(1)
    desk.take("holder", "h")
    desk.take("a", "a1")
    desk.over("a")
    desk.take("b", "b1")
    desk.over("b")
    desk.slots.give_back("h")

    assert desk.take("a", "a1")
    assert not desk.take("a", "a2")
    desk.over("a")
    desk.slots.give_back("a1")

    assert desk.heard() == ["a", "b"]
    assert desk.take("b", "b1")


def test_several_slots_that_come_free_at_once_wake_several_flows_once_each() -> None:
    desk = Desk(3)
    for n in range(3):
        desk.take("holder", f"h{n}")
    for flow in "abcd":
        desk.take(flow, flow)
        desk.over(flow)

    for n in range(3):
        desk.slots.give_back(f"h{n}")

    assert desk.heard() == ["a", "b", "c"]


def test_the_end_of_a_turn_of_a_flow_for_which_nothing_is_kept_changes_nothing() -> None:
    desk = Desk(1)
    desk.take("holder", "h")
    desk.take("a", "a")
    desk.over("a", "b", "stranger", "a")
    desk.slots.give_back("h")

    desk.over("b", "stranger")

    assert desk.heard() == ["a"]
    assert desk.take("a", "a")


def test_a_child_that_ran_before_this_runtime_counts_even_where_there_is_no_room() -> None:
    desk = Desk(1)
    desk.slots.hold(key("f"), child("t"))
    desk.slots.hold(key("f"), child("u"))
    desk.slots.hold(key("f"), child("u"))
    desk.take("a", "a")
    desk.over("a")

    desk.slots.give_back("t")
    assert desk.heard() == []
    desk.slots.give_back("u")

    assert desk.heard() == ["a"]


def test_a_child_that_only_waits_for_others_takes_no_slot() -> None:
    desk = Desk(1)
    desk.take("f", "t")
    nested = a_launched("n", launch=a_nested(), child_flow_id="inner-1")

    room = desk.slots.room_for(key("g"))

    assert [room.take(nested) for _ in range(3)] == [True] * 3
    desk.slots.give_back("n")
    assert not desk.take("g", "u"), "it gave back what it never had"


# ---- two limits -----------------------------------------------------------------------------------


def test_a_function_has_a_limit_of_its_own_over_all_flows() -> None:
    desk = Desk(10)

    assert [desk.take(flow, flow, "two") for flow in "abc"] == [True, True, False]
    assert desk.take("c", "other", "any")
    assert desk.take("d", "bare", None)
    desk.slots.give_back("a")
    assert desk.heard() == ["c"]


def test_a_child_that_lacks_one_of_its_slots_takes_neither() -> None:
    desk = Desk(2)
    desk.take("a", "a", "one")

    assert not desk.take("b", "b", "one")
    assert desk.take("c", "c")

    desk.slots.give_back("a")
    assert desk.take("b", "b", "one")


def test_a_flow_is_woken_only_when_all_its_child_needs_is_free_and_blocks_nobody_until_then() -> (
    None
):
    desk = Desk(3)
    desk.take("x", "x", "one")
    desk.take("y", "y")
    desk.take("z", "z")
    for flow, function in (("a", "one"), ("b", "any"), ("c", "one")):
        assert not desk.take(flow, flow, function)
        desk.over(flow)

    desk.slots.give_back("y")
    assert desk.heard() == ["b"], "room alone does not help a, which came first"
    assert desk.take("b", "b")
    desk.over("b")
    desk.slots.give_back("z")
    assert desk.heard() == [], "neither a nor c can be helped"
    assert desk.take("d", "d"), "so whoever can use it may have it"
    desk.over("d")
    desk.slots.give_back("x")
    assert desk.heard() == ["a"]
    assert not desk.take("c", "c", "one")
    assert desk.take("a", "a", "one")
    desk.over("c", "a")
    desk.slots.give_back("a")

    assert desk.heard() == ["c"]
    assert desk.take("c", "c", "one")


def test_between_lines_with_different_needs_the_one_that_has_waited_longest_comes_first() -> None:
    desk = Desk(1)
    desk.take("x", "x", "one")
    for flow, function in (("a", "one"), ("b", "any"), ("c", "two"), ("d", "one")):
        desk.take(flow, flow, function)
        desk.over(flow)
    order, holder = [], "x"

    for function in ("one", "any", "two", "one"):
        desk.slots.give_back(holder)
        [holder] = desk.heard()
        assert desk.take(holder, holder, function)
        desk.over(holder)
        order.append(holder)

    assert order == ["a", "b", "c", "d"]


def test_asking_again_costs_nobody_his_place_in_line() -> None:
    desk = Desk(1)
    desk.take("x", "x", "one")
    for flow, function in (("a", "one"), ("b", "any"), ("a", "one")):
        assert not desk.take(flow, flow, function)
        desk.over(flow)

    desk.slots.give_back("x")

    assert desk.heard() == ["a"]


def test_what_was_kept_may_be_used_for_another_child_and_the_rest_is_passed_on() -> None:
    desk = Desk(1)
    desk.take("x", "x", "one")
    for flow in "ab":
        desk.take(flow, flow, "one")
        desk.over(flow)
    desk.slots.give_back("x")

    assert desk.take("a", "an older child", "any")
    assert not desk.take("a", "a", "one")
    desk.over("a")
    desk.slots.give_back("an older child")

    assert desk.heard() == ["a", "b"], "a has had its turn"


def test_a_limit_that_is_taken_away_is_none() -> None:
    limits = {"f": 1}
    desk = Desk(4, limits)
    desk.take("a", "a", "f")
    for flow in "bcd":
        assert not desk.take(flow, flow, "f")
        desk.over(flow)

    del limits["f"]
    desk.slots.give_back("a")

    assert desk.heard() == ["b", "c", "d"]
    assert [desk.take(flow, flow, "f") for flow in "bcd"] == [True] * 3


# ---- many flows in motion -------------------------------------------------------------------------

MOST = 3
LIMITS = Limits(running_children=3, running_in_all=MOST, active_children=60)
FUNCTIONS = frozenset({"any", "one", "two", "again"})
LAUNCHES = [
    Launch(function="any"),
    Launch(function="one"),
    Launch(function="two"),
    Launch(function="two", group="map", limit=1),
    Launch(function="again", retry=Retry(max_attempts=2, initial=0.0, jitter=0.0)),
    Launch(function="one", retry=Retry(max_attempts=2, initial=0.0, jitter=0.0)),
]


class Home:
    """One flow as its actor keeps it: memory, disk, a draft on its way, mail, and code that runs."""

    def __init__(self, name: str) -> None:
        self.key = key(name)
        self.children = Children()
        self.stored: dict[str, StoredTask] = {}
        self.code: dict[str, int] = {}
        self.mail: deque[c.Command] = deque()
        self.draft: tuple[Turn, list[c.Command]] | None = None
        self.to_recover = False

    @property
    def is_due(self) -> bool:
        return self.draft is None and bool(self.mail)

    def forget(self) -> None:
        active = [task for task in self.stored.values() if is_active(task)]
        self.children = Children.of(active, [])
        self.to_recover = True


class Engine:
    """As much of the engine as slots have to do with."""

    def __init__(self) -> None:
        self.slots = Slots(MOST, LIMITS_OF.get, self.wake)
        self.homes = {name: Home(name) for name in "pqrst"}
        self.made = 0
        self.taken = 0

    def wake(self, flow: FlowKey) -> None:
        self.homes[flow.flow_id].mail.append(c.Wake())

    def add(self, home: Home, launches: list[Launch]) -> None:
        drafts = []
        for launch in launches:
            self.made += 1
            drafts.append(
                c.TaskDraft(
                    key=self.made, task_id=f"t{self.made}", runtime="task", task="w", launch=launch
                )
            )
        home.mail.append(c.AddTasks(drafts=tuple(drafts)))

    def turn(self, home: Home) -> None:
        commands = list(home.mail)
        home.mail.clear()
        view = View(
            a_flow(flow_id=home.key.flow_id),
            home.children,
            now=NOW,
            limits=LIMITS,
            running=home.code,
            functions=FUNCTIONS,
            room=self.slots.room_for(home.key),
        )
        turn = Turn(view, 0)
        if home.to_recover:
            turn.take(c.Recover(), "runtime")
            home.to_recover = False
        for command in commands:
            turn.take(command, "someone")
        self.slots.turn_over(home.key)
        self.taken += 1
        if turn.tasks:
            home.draft = turn, commands

    def commit(self, home: Home) -> None:
        assert home.draft is not None
        turn, _ = home.draft
        home.draft = None
        home.stored |= turn.tasks
        for task in turn.tasks.values():
            if task.status is TaskStatus.RUNNING:
                self.slots.hold(home.key, task)
            else:
                self.slots.give_back(task.task_id)
                home.code.pop(task.task_id, None)
        for effect in turn.effects():
            if isinstance(effect, StartTask):
                home.code[effect.task.task_id] = effect.task.attempt

    def fail(self, home: Home) -> None:
        assert home.draft is not None
        turn, commands = home.draft
        home.draft = None
        for task_id in turn.tasks.keys() - home.code.keys():
            self.slots.give_back(task_id)
        home.forget()
        # Ends are reported again until they are on disk, and what is due is looked at again.
        home.mail.extend(one for one in commands if isinstance(one, c.EndReport))
        home.mail.append(c.Tick())

    def settle(self) -> None:
        """Take turns and commit them until there is nothing left to do."""
        for _ in range(3_000):
            for home in self.homes.values():
                if home.draft is not None:
                    self.commit(home)
            due = [home for home in self.homes.values() if home.is_due]
            if not due:
                return
            self.turn(due[0])
        raise AssertionError("it never comes to rest")

    # ---- what is seen

    def running(self) -> Counter[str]:
        names: Counter[str] = Counter()
        for home in self.homes.values():
            for task_id in home.code:
                launch = home.stored[task_id].launch
                assert launch is not None
                names["all"] += 1
                names[str(launch.function)] += 1
        return names

    def could_start(self) -> list[str]:
        """Children that wait although everything they need is free."""
        used, found = self.running(), []
        for home in self.homes.values():
            groups = Counter(
                task.launch.group
                for task in home.children.active.values()
                if task.launch is not None and task.status is TaskStatus.RUNNING
            )
            for task in home.children.active.values():
                launch = task.launch
                assert launch is not None
                name = str(launch.function)
                waits = task.status is TaskStatus.QUEUED and task.next_attempt_at is None
                free = (
                    used["all"] < MOST
                    and used[name] < LIMITS_OF.get(name, MOST)
                    and groups[launch.group] < (launch.limit or LIMITS.running_children)
                )
                if waits and free:
                    found.append(task.task_id)
        return found


class SlotMachine(RuleBasedStateMachine):
    """Flows that begin children, end them, fail to write, and are forgotten, in every order."""

    @initialize()
    def begin(self) -> None:
        self.engine = Engine()

    def home(self, n: int, of: list[Home] | None = None) -> Home:
        homes = list(self.engine.homes.values()) if of is None else of
        return homes[n % len(homes)]

    def with_drafts(self) -> list[Home]:
        return [home for home in self.engine.homes.values() if home.draft is not None]

    def due(self) -> list[Home]:
        return [home for home in self.engine.homes.values() if home.is_due]

    @rule(n=st.integers(0, 4), launches=st.lists(st.sampled_from(LAUNCHES), min_size=1, max_size=4))
    def children_are_added(self, n: int, launches: list[Launch]) -> None:
        self.engine.add(self.home(n), launches)

    @rule(n=st.integers(0, 40), outcome=st.sampled_from(["succeeds", "fails"]))
    def code_ends(self, n: int, outcome: str) -> None:
        running = [
            (home, task_id)
            for home in self.engine.homes.values()
            for task_id in home.code
            if not any(isinstance(m, c.EndReport) and m.task_id == task_id for m in home.mail)
            and not (home.draft and any(
                isinstance(m, c.EndReport) and m.task_id == task_id for m in home.draft[1]
            ))
        ]  # fmt: skip
        if not running:
            return
        home, task_id = running[n % len(running)]
        ends: dict[str, Any] = {"succeeds": Succeeded(), "fails": Failed(Failure(kind="x"))}
        home.mail.append(
            c.EndReport(task_id=task_id, attempt=home.code[task_id], outcome=ends[outcome])
        )
        if outcome == "fails":
            home.mail.append(c.Tick())

    @rule(n=st.integers(0, 4), m=st.integers(0, 20))
    def a_waiting_child_is_cancelled(self, n: int, m: int) -> None:
        home = self.home(n)
        waiting = [i for i, t in home.stored.items() if t.status is TaskStatus.QUEUED]
        if waiting:
            home.mail.append(c.CancelTask(task_id=waiting[m % len(waiting)]))

    @precondition(lambda self: self.due())
    @rule(n=st.integers(0, 4))
    def a_turn_is_taken(self, n: int) -> None:
        self.engine.turn(self.home(n, self.due()))

    @precondition(lambda self: self.with_drafts())
    @rule(n=st.integers(0, 4))
    def a_commit_succeeds(self, n: int) -> None:
        self.engine.commit(self.home(n, self.with_drafts()))

    @precondition(lambda self: self.with_drafts())
    @rule(n=st.integers(0, 4))
    def a_commit_fails(self, n: int) -> None:
        self.engine.fail(self.home(n, self.with_drafts()))

    @rule(n=st.integers(0, 4))
    def a_flow_is_forgotten(self, n: int) -> None:
        home = self.home(n)
        # Only what has nothing to do is let go of.
        if home.draft is None and not home.mail:
            home.forget()

    @rule()
    def everything_comes_to_rest(self) -> None:
        self.engine.settle()

        assert self.engine.could_start() == []

    @invariant()
    def no_limit_is_ever_exceeded(self) -> None:
        running = self.engine.running()
        assert running["all"] <= MOST
        for name, limit in LIMITS_OF.items():
            assert running[name] <= limit

    def teardown(self) -> None:
        """Whatever happened: all children run, and then every slot is free."""
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for home in engine.homes.values():
            home.mail.append(c.Tick())
        for _ in range(500):
            engine.settle()
            assert engine.could_start() == []
            running = [(home, i) for home in engine.homes.values() for i in home.code]
            if not running:
                break
            home, task_id = running[0]
            home.mail.append(
                c.EndReport(task_id=task_id, attempt=home.code[task_id], outcome=Succeeded())
            )
        for home in engine.homes.values():
            assert not home.children.active
            assert all(not is_active(task) for task in home.stored.values())
        assert [engine.slots.take(key("p"), child(f"last {n}")) for n in range(MOST + 1)] == [
            *[True] * MOST,
            False,
        ]
        for n in range(MOST):
            engine.slots.give_back(f"last {n}")
        taken = [engine.slots.take(key("q"), child(f"two {n}", "two")) for n in range(3)]
        assert taken == [True, True, False]


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    max_examples=120,
    stateful_step_count=40,
)


@pytest.mark.parametrize("flows", [2, 5, 20])
def test_flows_that_all_want_everything_take_turns(flows: int) -> None:
    desk = Desk(1)
    wants = dict.fromkeys([f"f{n}" for n in range(flows)], 5)
    served: list[str] = []
    desk.take("holder", "h")
    for flow in wants:
        desk.take(flow, f"{flow} waits")
        desk.over(flow)
    holder = "h"

    for _ in range(5 * flows):
        desk.slots.give_back(holder)
        [flow] = desk.heard()
        holder = f"{flow} {wants[flow]}"
        assert desk.take(flow, holder)
        wants[flow] -= 1
        if wants[flow]:
            assert not desk.take(flow, f"{flow} wants more")
        desk.over(flow)
        served.append(flow)

    assert served == [f"f{n}" for n in range(flows)] * 5
