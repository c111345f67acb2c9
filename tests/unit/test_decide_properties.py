"""What holds for every flow and every sequence of commands, whatever the engine does in between.

A small world stands in for the engine: it carries out effects, lets code end when it likes, shuts down and
crashes. After every turn the promises are checked over the whole history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from msgspec import UNSET, Raw

from flowstead.model import command as c
from flowstead.model.code import Code, Refusal
from flowstead.model.effect import StartController, StartTask, StopController, StopTask
from flowstead.model.event import Event
from flowstead.model.flow import Failure, FlowStatus, StoredFlow, SyncMode, has_ended
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.model.task import (
    Cancelled,
    Failed,
    Launch,
    Lost,
    OnRestart,
    StoredTask,
    Succeeded,
    TaskStatus,
    TimedOut,
    is_active,
)
from flowstead.rules.children import Children
from flowstead.rules.decide import decide
from flowstead.rules.turn import Taken, Turn
from flowstead.rules.view import View
from tests.unit.given import ENDED, LIVE, NOW, a_flow, a_launched, a_linked, a_view

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
LIMITS = Limits(running_children=2, active_children=12, interruptions=2, cancel_grace=60.0)
GROUP_LIMITS = {"": 2, "map": 1}
FUNCTIONS = frozenset({"work"})

BROKEN = c.Defect(Code.INVALID_STATE, "state_json is nan. Nothing was written.")
OUTCOMES = {
    "succeeded": Succeeded(),
    "failed": Failed(Failure(kind="exception")),
    "timed_out": TimedOut(Failure(kind="timed_out")),
    "cancelled": Cancelled(Failure(kind="cancelled")),
    "lost": Lost(Failure(kind="lost")),
}

small = st.integers(0, 5)
json_values = st.sampled_from([Raw(b"1"), Raw(b"null"), Raw(b'{"a":[2]}')])
states = st.one_of(st.just(UNSET), json_values, json_values, st.just(BROKEN))
steps = st.sampled_from([UNSET, None, "classify", "send"])
patches = st.builds(c.Patch, current_step=steps, state_json=states)
blockers = st.sampled_from([None, None, "t-9"])
launched = st.one_of(
    st.builds(
        Launch,
        function=st.sampled_from(["work", "work", None]),
        on_restart=st.sampled_from(OnRestart),
        retry=st.sampled_from(
            [None, Retry(max_attempts=2, initial=0.0), Retry(max_attempts=3, jitter=0.0)]
        ),
        group=st.none(),
    ),
    st.builds(
        Launch,
        function=st.just("work"),
        retry=st.just(Retry(max_attempts=2, initial=1.0)),
        group=st.just("map"),
        limit=st.just(1),
    ),
)
launches = st.one_of(launched, launched, st.none())

Spec = tuple[Any, ...]

# A command before it is known whom it is about: resolved when its turn comes.
stale = st.sampled_from([False, False, False, True])
flow_specs = st.one_of(
    st.tuples(st.just("set_waiting"), stale, patches, json_values, blockers),
    st.tuples(st.just("resume"), stale, patches, st.sampled_from([LIVE[0], LIVE[1]]), st.none()),
    st.tuples(st.just("update"), stale, patches, st.none(), st.none()),
)
ending_specs = st.one_of(
    st.tuples(st.just("finish"), stale, patches, st.none(), st.none()),
    st.tuples(st.just("fail"), stale, patches, st.none(), blockers),
    st.tuples(st.just("cancel"), stale, st.none(), st.none(), st.none()),
    st.tuples(st.just("request_cancel"), stale, st.none(), st.none(), st.none()),
)
code_ends = st.tuples(
    st.just("code_ends"), small, st.sampled_from(["succeeded", "failed", "failed", "timed_out"])
)
additions = st.tuples(
    st.just("add"),
    st.lists(
        st.tuples(launches, st.sampled_from([None, None, "r1", "r2", "r3"])),
        min_size=1,
        max_size=4,
    ),
)
child_specs = st.one_of(
    additions,
    st.tuples(st.just("start_report"), small),
    st.tuples(st.just("progress"), small, st.sampled_from([UNSET, None, "half"])),
    st.tuples(st.just("linked_end"), small, st.sampled_from(sorted(OUTCOMES))),
    st.tuples(st.just("late_end"), small, st.integers(0, 4), st.sampled_from(sorted(OUTCOMES))),
    st.tuples(st.just("cancel_task"), small),
    code_ends,
    code_ends,
    st.tuples(st.just("tick")),
    st.tuples(st.just("enter")),
    st.tuples(st.just("release"), small),
)
specs = st.one_of(flow_specs, child_specs, child_specs)

FLOW_OPERATIONS: dict[str, Callable[..., c.Command]] = {
    "set_waiting": lambda r, patch, wait, blocker: c.SetWaiting(
        expected_revision=r, patch=patch, wait_json=wait, blocked_task_id=blocker
    ),
    "resume": lambda r, patch, status, _: c.Resume(expected_revision=r, patch=patch, status=status),
    "update": lambda r, patch, *_: c.Update(expected_revision=r, patch=patch),
    "request_cancel": lambda r, *_: c.RequestCancel(expected_revision=r),
    "finish": lambda r, patch, *_: c.Finish(expected_revision=r, patch=patch),
    "fail": lambda r, patch, _, blocker: c.Fail(
        expected_revision=r, patch=patch, blocked_task_id=blocker or UNSET
    ),
    "cancel": lambda r, *_: c.Cancel(expected_revision=r),
}


class World:
    """One flow, and an engine that does what effects say and nothing else."""

    def __init__(self, flow: StoredFlow | None, *, controllers: frozenset[str]) -> None:
        self.flow = flow
        self.children = Children()
        self.controllers = controllers
        self.now = NOW
        self.code: dict[str, int] = {}  # task id to the attempt whose code runs
        self.asked_to_stop: set[str] = set()
        self.bound: set[str] = set()
        self.driven = False
        self.closing = False
        self.history: list[Event] = []
        self.every: dict[str, StoredTask] = {}
        self._next = 0

    # ---- resolving

    def command(self, spec: Spec, reported: set[str]) -> c.Command:
        kind, rest = spec[0], spec[1:]
        if kind in FLOW_OPERATIONS:
            stale, *values = rest
            revision = 0 if self.flow is None else self.flow.revision
            return FLOW_OPERATIONS[kind](revision - stale, *values)
        match kind:
            case "add":
                return c.AddTasks(drafts=tuple(self.draft(*one) for one in rest[0]))
            case "start_report":
                return c.StartReport(task_id=self.someone(rest[0]))
            case "progress":
                return c.ProgressReport(task_id=self.someone(rest[0]), summary=rest[1])
            case "linked_end":
                return c.EndReport(task_id=self.someone(rest[0]), outcome=OUTCOMES[rest[1]])
            case "late_end":
                task_id = self.someone(rest[0])
                attempt = min(rest[1], self.code.get(task_id, 9) - 1)
                return c.EndReport(task_id=task_id, outcome=OUTCOMES[rest[2]], attempt=attempt)
            case "cancel_task":
                return c.CancelTask(task_id=self.someone(rest[0]))
            case "code_ends":
                running = [task_id for task_id in self.code if task_id not in reported]
                if not running:
                    return c.Tick()
                task_id = running[rest[0] % len(running)]
                reported.add(task_id)
                outcome = "cancelled" if task_id in self.asked_to_stop else rest[1]
                return c.EndReport(
                    task_id=task_id,
                    outcome=OUTCOMES[outcome],
                    attempt=self.code[task_id],
                    result=Raw(b"7") if outcome == "succeeded" else UNSET,
                )
            case "enter":
                return c.EnterController()
            case "release":
                return c.ReleaseTasks(task_ids=("nobody",))
            case _:
                return c.Tick()

    def someone(self, n: int) -> str:
        known = sorted(self.every)
        return known[n * 7 % len(known)] if known else "nobody"

    def draft(self, launch: Launch | None, run_id: str | None) -> c.TaskDraft:
        self._next += 1
        return c.TaskDraft(
            key=self._next,
            task_id=f"t{self._next}",
            runtime="subagent",
            task="work",
            run_id=run_id,
            status=TaskStatus.QUEUED,
            launch=launch,
        )

    # ---- moving

    def view(self) -> View:
        return View(
            self.flow,
            self.children,
            now=self.now,
            limits=LIMITS,
            running=dict(self.code),
            driven=self.driven,
            controllers=self.controllers,
            closing=self.closing,
            functions=FUNCTIONS,
            bound=self.bound,
        )

    def turn(self, made: list[Spec | c.Command]) -> list[tuple[c.Command, Taken]]:
        """Fold commands as the engine would, check each, then carry out what they ask for."""
        for command in made:
            if isinstance(command, c.AddTasks):
                bare = [d for d in command.drafts if d.launch and d.launch.function is None]
                self.bound.update(draft.run_id or draft.task_id for draft in bare)
        view = self.view()
        turn = Turn(view, len(self.history))
        intended = self.flow is not None and self.flow.cancel_requested_at is not None
        reported: set[str] = set()
        answers = []
        for one in made:
            command = one if not isinstance(one, tuple) else self.command(one, reported)
            answers.append((command, self._take(turn, view, command)))
        effects = turn.effects()
        if intended or (view.flow is not None and has_ended(view.flow)):
            assert not any(isinstance(effect, StartTask) for effect in effects)
        if self.closing:
            assert not any(isinstance(effect, StartTask) for effect in effects)
        self.history += turn.events
        for task_id in reported:
            del self.code[task_id]
            self.asked_to_stop.discard(task_id)
        self._carry_out(effects)
        return answers

    def _take(self, turn: Turn, view: View, command: c.Command) -> Taken:
        before, active = view.flow, dict(view.children.active)
        told, tasks = len(turn.events), dict(turn.tasks)
        lined_up = turn.effects()
        foreseen = decide(view, command)
        assert view.flow is before
        assert dict(view.children.active) == active

        taken = turn.take(command, "someone")

        events = turn.events[told:]
        assert (taken.refusal is None) == (not isinstance(foreseen, Refusal))
        if taken.refusal is not None:
            assert view.flow is before
            assert taken.flow is before
            assert dict(view.children.active) == active
            assert not events
            assert turn.tasks == tasks
            assert turn.effects() == lined_up
        self._check_flow(before, view.flow, events)
        if any(event.type == "flow.cancelled" for event in events):
            assert not view.children.active, "cancelled although a child is active"
        for task_id, task in turn.tasks.items():
            if tasks.get(task_id) is not task:
                self._check_child(task_id, task)
        self.flow = view.flow
        return taken

    def _check_flow(
        self, before: StoredFlow | None, after: StoredFlow | None, events: list[Event]
    ) -> None:
        of_flow = [event for event in events if event.type.startswith("flow.")]
        if after is None:
            assert before is None
            assert not events
            return
        at = after.revision if before is None else before.revision
        for event in events:
            if event.type.startswith("flow.") and event.type != "flow.created":
                at += 1
            assert event.revision == at
        assert after.revision == at
        assert (after is before) == (not of_flow)
        assert (after.ended_at is not None) == (after.status in ENDED)
        if before is None:
            return
        assert after.updated_at >= before.updated_at
        if has_ended(before):
            assert after is before
        if before.cancel_requested_at is not None:
            assert after.cancel_requested_at == before.cancel_requested_at

    def _check_child(self, task_id: str, after: StoredTask) -> None:
        before = self.every.get(task_id)
        if before is not None:
            assert is_active(before), "a child that has ended has changed"
            assert after.attempt >= before.attempt - 1
            assert after.interruptions >= before.interruptions
            if before.cancel_requested_at is not None:
                assert after.attempt == before.attempt, "started again although asked to stop"
                assert after.status is not TaskStatus.QUEUED
        assert (after.ended_at is None) == (after.status in {TaskStatus.QUEUED, TaskStatus.RUNNING})
        self.every[task_id] = after

    def _carry_out(self, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case StartTask(task):
                    if not self.closing:
                        self.code[task.task_id] = task.attempt
                        self.asked_to_stop.discard(task.task_id)
                case StopTask(task_id):
                    if task_id in self.code:
                        self.asked_to_stop.add(task_id)
                case StartController():
                    self.driven = self.driven or not self.closing
                case StopController():
                    assert self.driven

    def reload(self) -> None:
        """Begin again from what is stored, as after a restart."""
        self.code.clear()
        self.bound.clear()
        self.asked_to_stop.clear()
        self.driven = self.closing = False
        self.children = Children.of(
            [task for task in self.every.values() if is_active(task)],
            [(t.run_id, t.task_id) for t in self.every.values() if t.run_id is not None],
        )
        self.turn([c.Recover()])


def replayed(history: list[Event]) -> dict[str, Any]:
    """What the history alone says of the flow."""
    told: dict[str, Any] = {}
    for event in history:
        if event.type.startswith("flow."):
            told |= event.changed
    return {name: value for name, value in told.items() if value is not None}


def stored(flow: StoredFlow) -> dict[str, Any]:
    """What the flow's row says, but for what the store and the events themselves keep count of."""
    fields = {f.encode_name: getattr(flow, f.name) for f in msgspec.structs.fields(StoredFlow)}
    counted = ("key", "flowId", "revision", "updatedAt", "idempotencyKey", "requestDigest")
    for name in counted:
        del fields[name]
    return {
        name: value for name, value in fields.items() if value is not None and value is not UNSET
    }


def fresh_flow(status: FlowStatus = FlowStatus.QUEUED) -> StoredFlow:
    return a_flow(status, revision=0, created_at=NOW, updated_at=NOW)


class FlowMachine(RuleBasedStateMachine):
    """Every order of commands, ends, restarts and crashes a flow may live through."""

    @initialize(
        registered=st.booleans(),
        status=st.sampled_from([FlowStatus.QUEUED, FlowStatus.WAITING]),
        first=additions,
    )
    def create(self, registered: bool, status: FlowStatus, first: Spec) -> None:
        controllers = frozenset({"triage"}) if registered else frozenset[str]()
        self.turns = 0
        self.world = World(None, controllers=controllers)
        self.world.turn([c.Create(draft=fresh_flow(status)), first])

    @rule(made=st.lists(specs, min_size=1, max_size=4))
    def turn(self, made: list[Spec]) -> None:
        self.turns += 1
        self.world.turn(list(made))

    @rule(made=additions)
    def more_children(self, made: Spec) -> None:
        self.turns += 1
        self.world.turn([made])

    @precondition(lambda self: self.world.code)
    @rule(made=st.lists(code_ends, min_size=1, max_size=3))
    def code_comes_to_its_end(self, made: list[Spec]) -> None:
        self.turns += 1
        self.world.turn(list(made))

    @precondition(lambda self: self.turns > 3)
    @rule(
        before=st.lists(code_ends, max_size=2), end=ending_specs, after=st.lists(specs, max_size=2)
    )
    def an_end_comes_in_sight(self, before: list[Spec], end: Spec, after: list[Spec]) -> None:
        self.world.turn([*before, end, *after])

    @rule(seconds=st.sampled_from([1, 61]))
    def time_passes(self, seconds: int) -> None:
        self.world.now += seconds * 1000
        self.world.turn([c.Tick()])

    @rule()
    def clock_is_set_back(self) -> None:
        self.world.now -= 10_000

    @precondition(lambda self: self.world.driven and self.turns > 3)
    @rule(end=st.sampled_from(["returns", "raises", "gives way"]))
    def controller_ends(self, end: str) -> None:
        self.world.driven = False
        commands: dict[str, c.Command] = {
            "returns": c.Finish(expected_revision=None, patch=c.Patch()),
            "raises": c.Fail(
                expected_revision=None, patch=c.Patch(), failure=Failure(kind="exception")
            ),
            "gives way": c.ControllerStopped(),
        }
        self.world.turn([commands[end]])

    @rule()
    def crash(self) -> None:
        self.world.reload()

    @rule()
    def loading_an_idle_flow_again_changes_nothing(self) -> None:
        world = self.world
        world.reload()
        if world.code:
            return
        flow, rows, told = world.flow, dict(world.every), len(world.history)

        world.reload()

        assert world.flow is flow
        assert world.every == rows
        assert len(world.history) == told

    @rule(made=st.lists(specs, max_size=3))
    def shut_down_and_open_again(self, made: list[Spec]) -> None:
        world = self.world
        interruptions = {task_id: task.interruptions for task_id, task in world.every.items()}
        cut_off = {
            task_id
            for task_id, task in world.every.items()
            if task.launch and task.status is TaskStatus.RUNNING and task_id not in world.code
        }
        running = {task_id: world.every[task_id] for task_id in world.code}
        world.closing = True
        world.turn([*made])
        world.turn([c.ReleaseTasks(task_ids=tuple(world.code))])
        for task_id in world.code:
            released = world.every[task_id]
            if released.cancel_requested_at is not None:
                assert released.status is TaskStatus.CANCELLED
                continue
            assert released.status is TaskStatus.QUEUED
            assert released.attempt == running[task_id].attempt - 1
        world.reload()
        for task_id, before in interruptions.items():
            if task_id not in cut_off:
                assert world.every[task_id].interruptions == before

    @invariant()
    def history_has_no_gap(self) -> None:
        assert [event.seq for event in self.world.history] == list(
            range(1, len(self.world.history) + 1)
        )

    @invariant()
    def history_tells_the_whole_flow(self) -> None:
        assert self.world.flow is not None
        assert replayed(self.world.history) == stored(self.world.flow)

    @invariant()
    def every_child_ends_at_most_once_and_is_silent_then(self) -> None:
        over = set[str]()
        for event in self.world.history:
            if event.task_id is not None:
                assert event.task_id not in over
                if event.type == "task.ended":
                    over.add(event.task_id)
        ended = {i for i, task in self.world.every.items() if not is_active(task)}
        assert over == ended

    @invariant()
    def nothing_starts_after_the_intent_or_the_end(self) -> None:
        over = False
        for event in self.world.history:
            if event.type in {"flow.cancel_requested", "flow.succeeded", "flow.failed"}:
                over = over or event.type == "flow.cancel_requested"
            elif event.type == "task.started":
                task = self.world.every[event.task_id or ""]
                assert not (over and task.launch is not None)

    @invariant()
    def no_group_runs_more_than_its_limit(self) -> None:
        running = Counter(
            task.launch.group or ""
            for task in self.world.children.active.values()
            if task.launch is not None and task.status is TaskStatus.RUNNING
        )
        assert all(count <= GROUP_LIMITS[group] for group, count in running.items())

    @invariant()
    def code_runs_for_running_children_only(self) -> None:
        for task_id, attempt in self.world.code.items():
            task = self.world.children.active[task_id]
            assert task.launch is not None
            assert (task.status, task.attempt) == (TaskStatus.RUNNING, attempt)

    @invariant()
    def a_flow_that_ends_leaves_no_launched_child_without_code(self) -> None:
        flow = self.world.flow
        assert flow is not None
        if has_ended(flow) or flow.cancel_requested_at is not None:
            for task in self.world.children.active.values():
                if task.launch is not None and task.status is TaskStatus.QUEUED:
                    raise AssertionError(f"{task.task_id} waits in a flow that starts nothing")
        if has_ended(flow):
            left = {t.task_id for t in self.world.children.launched()}
            assert left <= self.world.code.keys()

    @invariant()
    def the_book_agrees_with_the_rows(self) -> None:
        active = {i: task for i, task in self.world.every.items() if is_active(task)}
        assert dict(self.world.children.active) == active

    def teardown(self) -> None:
        """However it stands: a cancel ends it, once its code has gone."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.turn([c.Cancel()])
        for _ in range(30):
            if not (world.code or world.driven):
                break
            if world.driven:
                world.driven = False
                world.turn([c.ControllerStopped()])
            if world.code:
                world.turn([("code_ends", 0, "cancelled")])
        assert world.flow is not None
        assert has_ended(world.flow)
        assert not world.children.launched()
        self.every_child_ends_at_most_once_and_is_silent_then()
        self.history_tells_the_whole_flow()


TestFlow = FlowMachine.TestCase
TestFlow.settings = settings(PROFILE, max_examples=300, stateful_step_count=25)


# ---- totality -------------------------------------------------------------------------------------

flows = st.one_of(
    st.none(),
    st.builds(
        lambda status, intent, mode: a_flow(status, intent=intent, sync_mode=mode),
        st.sampled_from(FlowStatus),
        st.booleans(),
        st.sampled_from(SyncMode),
    ),
)
children = st.lists(
    st.one_of(
        st.builds(
            lambda status, n: a_linked(f"l{n}", status),
            st.sampled_from([TaskStatus.QUEUED, TaskStatus.RUNNING]),
            small,
        ),
        st.builds(
            lambda status, n, launch, pending: a_launched(
                f"c{n}",
                status,
                launch=launch,
                next_attempt_at=NOW if pending and status is TaskStatus.QUEUED else None,
            ),
            st.sampled_from([TaskStatus.QUEUED, TaskStatus.RUNNING]),
            small,
            launched,
            st.booleans(),
        ),
    ),
    max_size=6,
    unique_by=lambda task: task.task_id,
)
task_ids = st.sampled_from([f"{kind}{n}" for kind in "lc" for n in range(6)])
revisions = st.sampled_from([0, 6, 7, 8])
drafts = st.builds(
    lambda n, launch, run_id, value: c.TaskDraft(
        key=n,
        task_id=f"new{n}",
        runtime="cli",
        task="work",
        launch=launch,
        run_id=run_id,
        input_json=value,
    ),
    small,
    launches,
    st.sampled_from([None, "r"]),
    states,
)
any_command: st.SearchStrategy[c.Command] = st.one_of(
    st.builds(
        c.Create,
        draft=st.just(fresh_flow()),
        defect=st.sampled_from([None, BROKEN]),
    ),
    st.builds(
        c.SetWaiting,
        expected_revision=revisions,
        patch=patches,
        wait_json=json_values,
        blocked_task_id=blockers,
    ),
    st.builds(
        c.Resume, expected_revision=revisions, patch=patches, status=st.sampled_from(LIVE[:2])
    ),
    st.builds(c.Update, expected_revision=revisions, patch=patches),
    st.builds(c.Finish, expected_revision=st.one_of(st.none(), revisions), patch=patches),
    st.builds(c.Fail, expected_revision=st.one_of(st.none(), revisions), patch=patches),
    st.builds(c.RequestCancel, expected_revision=revisions),
    st.builds(c.Cancel, expected_revision=st.one_of(st.none(), revisions)),
    st.just(c.EnterController()),
    st.just(c.ControllerStopped()),
    st.builds(
        c.AddTasks,
        drafts=st.lists(drafts, max_size=4, unique_by=lambda d: d.task_id).map(tuple),
    ),
    st.builds(c.StartReport, task_id=task_ids),
    st.builds(c.ProgressReport, task_id=task_ids),
    st.builds(
        c.EndReport,
        task_id=task_ids,
        outcome=st.sampled_from(sorted(OUTCOMES.values(), key=repr)),
        attempt=st.sampled_from([None, 0, 1]),
        result=states,
        chance=st.sampled_from([0.0, 0.5, 0.999]),
    ),
    st.builds(c.CancelTask, task_id=task_ids),
    st.builds(c.ReleaseTasks, task_ids=st.lists(task_ids, max_size=3).map(tuple)),
    st.just(c.Tick()),
    st.just(c.Recover()),
)
facts = st.fixed_dictionaries(
    {
        "running": st.sets(task_ids.filter(lambda i: i.startswith("c")), max_size=4),
        "driven": st.booleans(),
        "controllers": st.sampled_from([frozenset(), frozenset({"triage"})]),
        "closing": st.booleans(),
        "functions": st.sampled_from([frozenset(), FUNCTIONS]),
        "bound": st.sampled_from([frozenset(), frozenset({"c1", "c2"})]),
    }
)


@given(flow=flows, tasks=children, given_facts=facts, command=any_command)
@settings(PROFILE, max_examples=1_200)
def test_every_command_on_every_flow_is_decided_or_refused_and_a_refusal_changes_nothing(
    flow: StoredFlow | None, tasks: list[StoredTask], given_facts: Any, command: c.Command
) -> None:
    view = a_view(flow, *([] if flow is None else tasks), limits=LIMITS, **given_facts)
    before = dict(view.children.active)
    turn = Turn(view, 5)

    taken = turn.take(command, "someone")

    if taken.refusal is not None:
        assert view.flow is flow
        assert dict(view.children.active) == before
        assert not (turn.events or turn.tasks or turn.created or turn.effects())
        assert taken.refusal.reason
    if flow is not None and has_ended(flow):
        assert view.flow is flow
        assert not any(isinstance(effect, StartTask) for effect in turn.effects())
    assert [event.seq for event in turn.events] == [6 + n for n in range(len(turn.events))]


@given(
    flow=flows,
    tasks=children,
    given_facts=facts,
    commands=st.lists(any_command, min_size=2, max_size=8),
    cut=st.integers(0, 8),
)
@settings(PROFILE, max_examples=500)
def test_one_turn_and_two_turns_with_the_same_commands_come_to_the_same(
    flow: StoredFlow | None,
    tasks: list[StoredTask],
    given_facts: Any,
    commands: list[c.Command],
    cut: int,
) -> None:
    mine = [] if flow is None else tasks
    one = a_view(flow, *mine, limits=LIMITS, **given_facts)
    two = a_view(flow, *mine, limits=LIMITS, **given_facts)

    whole = Turn(one, 0)
    answers = [whole.take(command, "someone") for command in commands]
    first = Turn(two, 0)
    again = [first.take(command, "someone") for command in commands[:cut]]
    second = Turn(two, len(first.events))
    again += [second.take(command, "someone") for command in commands[cut:]]

    assert one.flow == two.flow
    assert dict(one.children.active) == dict(two.children.active)
    assert one.children.run_ids == two.children.run_ids
    assert whole.tasks == first.tasks | second.tasks
    assert whole.events == first.events + second.events
    assert [taken.refusal for taken in answers] == [taken.refusal for taken in again]
