"""What holds for every flow and every sequence of commands, whatever the engine does in between.

A small world stands in for the engine: it carries out effects, lets code end when it likes, shuts down and
crashes. After every turn the promises are checked over the whole history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, get_args

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
from flowstead.model.approval import VoteKind
from flowstead.model.code import Code, Refusal
from flowstead.model.effect import (
    AbandonController,
    AbandonTask,
    DrainTask,
    Effect,
    KillTask,
    ParkController,
    StartController,
    StartTask,
    StopController,
    StopReason,
    StopTask,
)
from flowstead.model.event import Event, EventType
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
    TerminalOutcome,
    TimedOut,
    is_active,
    is_bare,
)
from flowstead.model.update import DONE, StoredUpdate
from flowstead.model.wait import OnTimeout, Wait, WaitKind
from flowstead.rules.children import Children
from flowstead.rules.decide import decide
from flowstead.rules.turn import Taken, Turn
from flowstead.rules.view import View
from tests.unit.given import (
    CREATED_AT,
    ENDED,
    LIVE,
    NOW,
    a_command,
    a_flow,
    a_launched,
    a_linked,
    a_nested,
    a_view,
)
from tests.unit.given_waits import (
    TOKEN,
    a_letter,
    a_vote,
    a_wait_draft,
    addressed,
    an_approval_draft,
    an_old_wait,
    cast,
    told,
)

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
LIMITS = Limits(
    running_children=2,
    active_children=12,
    interruptions=2,
    cancel_grace=60.0,
    kill_after=5.0,
    abandon_after=25.0,
    messages=4,
)
GROUP_LIMITS = {"": 2, "map": 1}
FUNCTIONS = frozenset({"work"})
EXECUTORS = frozenset({"command", "flow"})

BROKEN = c.Defect(Code.INVALID_STATE, "state_json is nan. Nothing was written.")
OUTCOMES = {
    "succeeded": Succeeded(),
    "failed": Failed(Failure(kind="exception")),
    "timed_out": TimedOut(Failure(kind="timed_out")),
    "cancelled": Cancelled(Failure(kind="cancelled")),
    "lost": Lost(Failure(kind="lost")),
    "odd": Failed(Failure(kind="exception", message="NeedsReview: odd")),
    "hopeless": Failed(Failure(kind="exception", message="Fatal: never")),
}

small = st.integers(0, 5)
json_values = st.sampled_from([Raw(b"1"), Raw(b"null"), Raw(b'{"a":[2]}')])
states = st.one_of(st.just(UNSET), json_values, json_values, st.just(BROKEN))
steps = st.sampled_from([UNSET, None, "classify", "send"])
patches = st.builds(c.Patch, current_step=steps, state_json=states)
blockers = st.sampled_from([None, None, "t-9"])
POLICIES: list[Retry | None] = [
    None,
    Retry(max_attempts=2, initial=0.0),
    Retry(max_attempts=3, jitter=0.0),
]
# What must not be done twice has no policy.
careful = st.one_of(
    st.fixed_dictionaries(
        {"on_restart": st.just(OnRestart.RETRY), "retry": st.sampled_from(POLICIES)}
    ),
    st.just({"on_restart": OnRestart.LOST}),
)
launched = st.one_of(
    st.builds(
        lambda function, fields: Launch(function=function, **fields),
        st.sampled_from(["work", "work", None]),
        careful,
    ),
    st.builds(
        Launch,
        function=st.just("work"),
        retry=st.just(Retry(max_attempts=2, initial=1.0)),
        group=st.just("map"),
        limit=st.just(1),
    ),
    st.builds(lambda fields: a_command(**fields), careful),
    st.builds(a_nested),
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
    st.just("code_ends"),
    small,
    st.sampled_from(["succeeded", "failed", "failed", "timed_out", "odd", "odd", "hopeless"]),
)
patience = st.lists(st.sampled_from([4, 5, 6, 24, 25, 31, 61]), max_size=4)
additions = st.tuples(
    st.just("add"),
    st.lists(
        st.tuples(
            launches,
            st.sampled_from([None, None, "r1", "r2", "r3"]),
            st.sampled_from([None, None, 30.0]),
        ),
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
    st.tuples(st.just("dead_end"), small, st.sampled_from(sorted(OUTCOMES))),
    st.tuples(st.just("cancel_task"), small),
    st.tuples(st.just("retry_task"), small, st.sampled_from([UNSET, UNSET, Raw(b"2"), BROKEN])),
    st.tuples(st.just("answer"), small),
    code_ends,
    code_ends,
    st.tuples(st.just("wake")),
    st.tuples(st.just("tick")),
    st.tuples(st.just("enter")),
    st.tuples(st.just("release"), small),
)
wait_names = st.sampled_from(["w1", "w2", "w3"])
# How long a wait may last, and what happens then.
manners = st.tuples(st.sampled_from([None, None, 1, 3, 70]), st.sampled_from(OnTimeout))
some_waits = st.lists(
    st.one_of(
        st.tuples(st.just("signal"), wait_names, manners),
        st.tuples(st.just("timer"), st.sampled_from(["n1", "n2", "n3"]), manners),
        st.tuples(st.just("message"), st.sampled_from(["m1", "m2"]), manners),
        st.tuples(st.just("approval"), st.just("ok"), manners),
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda one: one[1],
)
stands = st.tuples(st.just("stand"), some_waits, st.booleans())
wait_specs = st.one_of(
    stands,
    stands,
    st.tuples(st.just("open"), some_waits),
    st.tuples(st.just("stop_awaiting"), small),
    st.tuples(st.just("wait_by_hand"), st.sampled_from([1, 3, 70]), st.sampled_from(OnTimeout)),
    st.tuples(st.just("signal"), st.sampled_from(["w1", "w2", "w3", "", "m1", "k"])),
    st.tuples(st.just("signal"), st.sampled_from(["w1", "w2", "w3", "", "m1", "k"])),
    st.tuples(st.just("answer_one"), small),
    st.tuples(st.just("answer_one"), small),
    st.tuples(st.just("letter"), wait_names, st.sampled_from([1, 70])),
    st.tuples(st.just("tell"), st.booleans()),
    st.tuples(st.just("reply"), small),
    st.tuples(st.just("vote"), st.sampled_from(VoteKind), st.sampled_from(["ann", "bob"])),
    st.tuples(st.just("notify"), st.sampled_from(["s1", "s2"])),
    st.tuples(st.just("note_delivery")),
)
specs = st.one_of(flow_specs, child_specs, child_specs, wait_specs)

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


PLAYED: Counter[str] = Counter()
"""What has happened in all worlds together: a machine that plays nothing proves nothing."""


class Gate:
    """Slots of the whole runtime, as one flow sees them: there is room, or there is none."""

    open = True

    def take(self, task: StoredTask) -> bool:
        assert task.launch is not None
        return self.open or not task.launch.holds_slot


class World:
    """One flow, and an engine that does what effects say and nothing else."""

    def __init__(self, flow: StoredFlow | None, *, controllers: frozenset[str]) -> None:
        self.flow = flow
        self.children = Children()
        self.controllers = controllers
        self.now = NOW
        self.code: dict[str, int] = {}  # task id to the attempt whose code runs
        self.asked_to_stop: dict[str, StopReason] = {}
        self.killed: set[str] = set()
        self.drained: set[str] = set()
        self.given_up: dict[str, int] = {}  # task id to the attempt whose code nobody waits for
        self.begun: Counter[str] = Counter()  # how often code of a child has begun
        self.last: dict[str, int] = {}  # task id to the attempt that began last
        self.room = Gate()
        self.bound: set[str] = set()
        self.driven = False
        self.closing = False
        self.leaving = False  # the controller has been parked, and is on its way out
        self.gave_way = False  # the controller has left a flow that goes on without it
        self.told: list[StoredUpdate] = []
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
                outcome = self.came_to(task_id, rest[1])
                return c.EndReport(
                    task_id=task_id,
                    outcome=OUTCOMES[outcome],
                    attempt=self.code[task_id],
                    result=Raw(b"7") if outcome == "succeeded" else UNSET,
                    again=outcome not in {"odd", "hopeless"},
                    review=outcome == "odd",
                    retry_after=2.5 if outcome == "failed" else None,
                )
            case "dead_end":
                task_id = self.someone(rest[0])
                attempt = self.given_up.get(task_id, -1)
                return c.EndReport(task_id=task_id, outcome=OUTCOMES[rest[1]], attempt=attempt)
            case "retry_task":
                return c.RetryTask(task_id=self.someone(rest[0]), input_json=rest[1])
            case "answer":
                waiting = list(self.children.in_review)
                chosen = waiting[rest[0] % len(waiting)] if waiting else "nobody"
                return c.RetryTask(task_id=chosen)
            case "wake":
                return c.Wake()
            case "enter":
                return c.EnterController()
            case "release":
                return c.ReleaseTasks(task_ids=("nobody",))
            case _:
                return self.about_waits(kind, rest)

    def about_waits(self, kind: str, rest: Spec) -> c.Command:
        self._next += 1
        match kind:
            case "stand" if self.driven:
                drafts = tuple(self.wait(*one) for one in rest[0])
                steps = tuple(draft.run_id or "" for draft in drafts)
                return c.Await(drafts=drafts, steps=steps, may_park=rest[1])
            case "open":
                return c.AddTasks(drafts=tuple(self.wait(*one) for one in rest[0]))
            case "stop_awaiting" if self.driven and self.flow is not None and self.flow.awaiting:
                groups = self.flow.awaiting
                return c.StopAwaiting(steps=groups[rest[0] % len(groups)])
            case "wait_by_hand":
                return c.SetWaiting(
                    expected_revision=0 if self.flow is None else self.flow.revision,
                    patch=c.Patch(),
                    wait_json=Raw(b'{"kind":"reply"}'),
                    wait=Wait(
                        kind=WaitKind.SIGNAL,
                        wait_key="k",
                        token=TOKEN,
                        deadline_at=self.now + rest[0] * 1000,
                        on_timeout=rest[1],
                        remind_at=(self.now + 2000,),
                    ),
                )
            case "signal":
                by_key = rest[0] == "k"
                return c.Deliver(
                    wait_key="k" if by_key else None,
                    task_id=None if by_key else rest[0],
                    payload=Raw(b"1"),
                    signal_id=f"s{self._next}",
                )
            case "answer_one":
                names = [t.run_id or "" for t in self.children.open_waits()] or [""]
                return c.Deliver(task_id=names[rest[0] % len(names)], payload=Raw(b"1"))
            case "letter":
                return addressed(
                    rest[0], Raw(b"1"), self._next, expires_at=self.now + rest[1] * 1000
                )
            case "tell":
                return told(Raw(b"1"), self._next, wants_reply=rest[0])
            case "reply":
                taken = [t.task_id for t in self.every.values() if t.letter and t.letter.taken_by]
                chosen = taken[rest[0] % len(taken)] if taken else "nobody"
                return c.EndReport(task_id=chosen, outcome=Succeeded(), result=Raw(b"7"))
            case "vote":
                items = Raw(b'{"eur":6}') if rest[0] is VoteKind.EDIT else UNSET
                vote = a_vote(rest[0], rest[1], items=items, rules={"quorum": 2})
                return cast(vote, n=self._next, expires_at=self.now + 70_000)
            case "notify":
                draft = c.TaskDraft(
                    key=self._next,
                    task_id=f"t{self._next}",
                    runtime="notice",
                    task="notice",
                    run_id=rest[0],
                )
                return c.Notify(draft=draft, text="Half done.")
            case "note_delivery":
                return c.NoteDelivery(slot="done", reason="410 Gone")
            case _:
                return c.Tick()

    def wait(self, kind: str, name: str, manner: tuple[int | None, OnTimeout]) -> c.TaskDraft:
        seconds, on_timeout = manner
        at = None if seconds is None else self.now + seconds * 1000
        fields: dict[str, Any] = {"deadline_at": at, "on_timeout": on_timeout}
        self._next += 1
        match kind:
            case "timer":
                draft = a_wait_draft(name, WaitKind.TIMER, deadline_at=at or self.now + 5000)
            case "message":
                draft = a_wait_draft(name, WaitKind.MESSAGE, inbox="in", **fields)
            case "approval":
                draft = an_approval_draft(name, rules={"quorum": 2}, deadline_at=at)
            case _:
                reminders = (self.now + 500, self.now + 2000)
                draft = a_wait_draft(name, wait_key="k", remind_at=reminders, **fields)
        return msgspec.structs.replace(draft, key=self._next, task_id=f"t{self._next}")

    def someone(self, n: int) -> str:
        known = sorted(self.every)
        return known[n * 7 % len(known)] if known else "nobody"

    def came_to(self, task_id: str, outcome: str) -> str:
        """How code ends that may have been asked to stop, and may have heard of it."""
        reason = self.asked_to_stop.get(task_id)
        if reason is None or (outcome == "succeeded" and reason is not StopReason.INTERRUPTED):
            return outcome
        return "lost" if reason is StopReason.INTERRUPTED else "cancelled"

    def draft(
        self, launch: Launch | None, run_id: str | None, queue_timeout: float | None
    ) -> c.TaskDraft:
        self._next += 1
        return c.TaskDraft(
            key=self._next,
            task_id=f"t{self._next}",
            runtime="subagent",
            task="work",
            run_id=run_id,
            status=TaskStatus.QUEUED,
            queue_timeout=queue_timeout,
            child_flow_id=f"inner-{self._next}" if launch and launch.executor == "flow" else None,
            launch=launch,
        )

    # ---- moving

    def view(self) -> View:
        return View(
            self.flow,
            self.children,
            now=self.now,
            tells=True,
            new_key=self.new_key,
            limits=LIMITS,
            running=dict(self.code),
            driven=self.driven,
            controllers=self.controllers,
            closing=self.closing,
            functions=FUNCTIONS,
            bound=self.bound,
            executors=EXECUTORS,
            room=self.room,
        )

    def new_key(self) -> int:
        self._next += 1
        return self._next

    def turn(self, made: list[Spec | c.Command]) -> list[tuple[c.Command, Taken]]:
        """Fold commands as the engine would, check each, then carry out what they ask for."""
        for command in made:
            if isinstance(command, c.AddTasks):
                bare = [d for d in command.drafts if d.launch and is_bare(d.launch)]
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
            # Only what may have left something outside is begun, so that it can be seen to and stopped.
            for effect in effects:
                if isinstance(effect, StartTask):
                    assert effect.task.launch is not None
                    assert effect.task.launch.external
                    assert effect.adopted or not intended
        if self.closing:
            assert not any(isinstance(effect, StartTask) for effect in effects)
        self.history += turn.events
        self.told += turn.updates()
        PLAYED.update(event.type for event in turn.events)
        PLAYED.update(type(effect).__name__ for effect in effects)
        PLAYED.update(
            f"adopted {effect.task.launch.executor}"
            for effect in effects
            if isinstance(effect, StartTask) and effect.adopted and effect.task.launch
        )
        for task_id in reported:
            del self.code[task_id]
            self.asked_to_stop.pop(task_id, None)
        was_leaving = self.leaving
        self._carry_out(effects)
        if was_leaving and self.leaving:
            # It takes its time: one more turn has passed.
            self.driven = self.leaving = False
            self.turn([c.ControllerParked()])
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
                assert after.cancel_requested_at == before.cancel_requested_at
            if before.kill_requested_at is not None:
                assert after.kill_requested_at is not None
            if is_active(after) and after.kill_requested_at is not None:
                assert after.cancel_requested_at is not None
        if after.review_requested_at is not None:
            assert after.status is TaskStatus.QUEUED
            assert after.next_attempt_at is None
            assert after.launch is not None
        assert (after.ended_at is None) == (after.status in {TaskStatus.QUEUED, TaskStatus.RUNNING})
        self.every[task_id] = after

    def _carry_out(self, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case StartTask(task, adopted):
                    assert not self.closing
                    if self.code.get(task.task_id) != task.attempt:
                        # What is adopted under its old attempt is only seen to, not done again.
                        seen_to = adopted and self.last.get(task.task_id) == task.attempt
                        self.begun[task.task_id] += not seen_to
                        self.last[task.task_id] = task.attempt
                        self.code[task.task_id] = task.attempt
                        self.asked_to_stop.pop(task.task_id, None)
                        self.drained.discard(task.task_id)
                case StopTask(task_id, reason):
                    if task_id in self.code:
                        self.asked_to_stop.setdefault(task_id, reason)
                case KillTask(task_id):
                    if task_id in self.code:
                        assert task_id in self.asked_to_stop, "killed without having been asked"
                        self.killed.add(task_id)
                case AbandonTask(task_id):
                    if task_id in self.code:
                        assert task_id in self.killed, "given up without having been killed"
                        self.given_up[task_id] = self.code.pop(task_id)
                case DrainTask(task_id):
                    assert self.every[task_id].child_flow_id is not None
                    self.drained.add(task_id)
                case AbandonController():
                    # Once for each command of the turn that finds it still there; the first one counts.
                    if self.driven:
                        self.driven = self.leaving = False
                        self.turn([c.ControllerStopped()])
                case StartController():
                    self.driven = self.driven or not self.closing
                case ParkController():
                    self.leaving = self.driven
                case StopController():
                    assert self.driven

    def reload(self, mail: Sequence[Spec] = ()) -> None:
        """Begin again from what is stored, as after a restart; what brought it back to memory comes first."""
        self.code.clear()
        self.bound.clear()
        self.asked_to_stop.clear()
        self.killed.clear()
        self.drained.clear()
        self.driven = self.leaving = self.closing = self.gave_way = False
        self.children = Children.of(
            [task for task in self.every.values() if is_active(task)],
            [(t.run_id, t.task_id) for t in self.every.values() if t.run_id is not None],
        )
        self.turn([*mail, c.Recover()])


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
    kept_beside = (
        "wait",
        "waitKey",
        "waitToken",
        "awaiting",
        "selecting",
        "parkAt",
        "contentRevision",
        "grants",
    )
    for name in (*counted, *kept_beside):
        del fields[name]
    return {
        name: value for name, value in fields.items() if value is not None and value is not UNSET
    }


def a_carried(n: int) -> StoredTask:
    return a_linked(
        f"carried{n}",
        TaskStatus.SUCCEEDED,
        run_id=f"r{n}",
        ended_at=CREATED_AT,
        terminal_outcome=TerminalOutcome.SUCCEEDED,
    )


def fresh_flow(status: FlowStatus = FlowStatus.QUEUED) -> StoredFlow:
    return a_flow(status, revision=0, created_at=NOW, updated_at=NOW)


class FlowMachine(RuleBasedStateMachine):
    """Every order of commands, ends, restarts and crashes a flow may live through."""

    @initialize(
        registered=st.booleans(),
        status=st.sampled_from([FlowStatus.QUEUED, FlowStatus.WAITING]),
        first=additions,
        carried=st.integers(0, 2),
    )
    def create(self, registered: bool, status: FlowStatus, first: Spec, carried: int) -> None:
        controllers = frozenset({"triage"}) if registered else frozenset[str]()
        self.turns = 0
        self.world = World(None, controllers=controllers)
        begins_with = tuple(a_carried(n) for n in range(carried))
        self.world.turn([c.Create(draft=fresh_flow(status), carried=begins_with), first])

    @rule(made=st.lists(specs, min_size=1, max_size=4))
    def turn(self, made: list[Spec]) -> None:
        self.turns += 1
        self.world.turn(list(made))

    @rule(made=additions)
    def more_children(self, made: Spec) -> None:
        self.turns += 1
        self.world.turn([made])

    @rule(made=stands, seconds=st.sampled_from([0, 1, 6, 80]))
    def a_controller_stands_still(self, made: Spec, seconds: int) -> None:
        self.world.turn([made])
        self.world.now += seconds * 1000
        self.world.turn([c.Tick()])

    @rule(made=st.lists(wait_specs, min_size=1, max_size=3))
    def waits_are_opened_and_answered(self, made: list[Spec]) -> None:
        self.turns += 1
        self.world.turn(list(made))

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

    def wait(self, seconds: list[int]) -> None:
        for some in seconds:
            self.world.now += some * 1000
            self.world.turn([c.Tick()])

    @precondition(lambda self: self.world.code)
    @rule(n=small, patience=patience)
    def a_child_is_asked_to_stop_and_takes_its_time(self, n: int, patience: list[int]) -> None:
        running = sorted(self.world.code)
        self.world.turn([c.CancelTask(task_id=running[n % len(running)])])
        self.wait(patience)

    @precondition(lambda self: self.turns > 2 and (self.world.code or self.world.driven))
    @rule(
        end=st.sampled_from(["cancel", "request_cancel", "request_cancel", "finish", "fail"]),
        patience=patience,
    )
    def an_end_is_asked_for_and_code_takes_its_time(self, end: str, patience: list[int]) -> None:
        self.world.turn([(end, False, c.Patch(), None, None)])
        self.wait(patience)

    def has_flows_below(self) -> bool:
        return any(self.world.every[task_id].child_flow_id for task_id in self.world.code)

    @precondition(lambda self: self.turns > 4 and self.has_flows_below())
    @rule(patience=patience)
    def an_intent_reaches_the_flows_below(self, patience: list[int]) -> None:
        self.world.turn([("request_cancel", False, None, None, None)])
        self.wait(patience)

    @rule(is_open=st.booleans())
    def room_in_the_runtime_comes_and_goes(self, is_open: bool) -> None:
        self.world.room.open = is_open
        if is_open:
            self.world.turn([c.Wake()])

    @rule()
    def clock_is_set_back(self) -> None:
        self.world.now -= 10_000

    @precondition(lambda self: self.world.driven and self.turns > 3)
    @rule(end=st.sampled_from(["returns", "raises", "gives way"]))
    def controller_ends(self, end: str) -> None:
        self.world.driven = self.world.leaving = False
        self.world.gave_way = end == "gives way"
        commands: dict[str, c.Command] = {
            "returns": c.Finish(expected_revision=None, patch=c.Patch()),
            "raises": c.Fail(
                expected_revision=None, patch=c.Patch(), failure=Failure(kind="exception")
            ),
            "gives way": c.ControllerStopped(),
        }
        self.world.turn([commands[end]])

    @rule(mail=st.lists(specs, max_size=2))
    def crash(self, mail: list[Spec]) -> None:
        self.world.reload(mail)

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
        world.turn([c.ReleaseTasks(task_ids=tuple(world.code), begun=frozenset(world.code))])
        for task_id in world.code:
            released = world.every[task_id]
            assert released.launch is not None
            if released.child_flow_id is not None:
                assert released.status is TaskStatus.RUNNING, "its flow goes on"
                continue
            if released.cancel_requested_at is not None:
                assert released.status is TaskStatus.CANCELLED
                continue
            if released.launch.on_restart is OnRestart.LOST and not is_bare(released.launch):
                assert released.status is TaskStatus.LOST, "it must not be done twice"
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
    def a_flow_with_a_review_is_blocked_by_one_that_nobody_has_answered(self) -> None:
        world, flow = self.world, self.world.flow
        assert flow is not None
        in_review = {i for i, t in world.every.items() if t.review_requested_at is not None}
        assert set(world.children.in_review) == in_review
        if has_ended(flow) or flow.cancel_requested_at is not None:
            assert not in_review
        elif in_review:
            assert flow.status is FlowStatus.BLOCKED
        if flow.status is FlowStatus.BLOCKED and not flow.cancel_requested_at:
            named = flow.blocked_task_id
            wait = flow.wait if named is None else getattr(world.every.get(named), "wait", None)
            overdue = wait is not None and wait.is_overdue
            assert named == "t-9" or named in in_review or overdue

    @invariant()
    def nothing_is_tried_more_often_than_its_policy_and_people_allow(self) -> None:
        asked = Counter(
            event.task_id for event in self.world.history if event.type == "task.retry_requested"
        )
        for task_id, task in self.world.every.items():
            assert task.attempt >= task.interruptions or task.launch is None
            assert task.attempt - task.interruptions <= task.max_attempts + asked[task_id]
            launch = task.launch
            if launch and launch.on_restart is OnRestart.LOST and not is_bare(launch):
                assert self.world.begun[task_id] <= 1 + asked[task_id], "done twice"

    @invariant()
    def the_rungs_of_a_stop_only_climb(self) -> None:
        rungs = ("task.cancel_requested", "task.kill_requested", "task.ended")
        climbed: dict[str | None, int] = {}
        for event in self.world.history:
            if event.type in rungs:
                rung, before = rungs.index(event.type), climbed.get(event.task_id, -1)
                # The last rung begins anew when the next process takes over what it finds there.
                assert rung > before or event.type == "task.kill_requested"
                assert event.type != "task.kill_requested" or before in (0, 1)
                climbed[event.task_id] = rung

    @invariant()
    def an_intent_is_passed_on_to_the_flows_below(self) -> None:
        world, flow = self.world, self.world.flow
        assert flow is not None
        if has_ended(flow) or flow.cancel_requested_at is None:
            return
        for task_id in world.code:
            if world.every[task_id].child_flow_id is not None:
                assert task_id in world.drained or task_id in world.asked_to_stop

    @invariant()
    def what_is_asked_to_stop_is_on_record_and_the_other_way_round(self) -> None:
        for task_id in self.world.code:
            asked = self.world.asked_to_stop.get(task_id)
            stamped = self.world.every[task_id].cancel_requested_at is not None
            # What is only seen to after a crash is stopped on nobody's wish; somebody may wish it later.
            if asked is not StopReason.INTERRUPTED:
                assert stamped == (asked is not None)

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
    def what_a_flow_waits_for_is_open(self) -> None:
        world, flow = self.world, self.world.flow
        assert flow is not None
        stood_in = {task_id for group in flow.awaiting for task_id in group}
        assert stood_in <= world.children.active.keys()
        standing = flow.status in {FlowStatus.WAITING, FlowStatus.BLOCKED}
        if flow.wait is not None:
            assert standing
            assert not flow.awaiting
        if flow.status is FlowStatus.WAITING and flow.cancel_requested_at is None:
            assert flow.wait_json is not UNSET
        if has_ended(flow) or flow.cancel_requested_at is not None:
            assert not world.children.waits
            assert not world.children.letters

    @invariant()
    def nobody_is_forgotten(self) -> None:
        """A controller that has something to do is in memory."""
        world, flow = self.world, self.world.flow
        assert flow is not None
        if not world.controllers or world.gave_way or flow.cancel_requested_at is not None:
            return
        if not has_ended(flow) and flow.status in {FlowStatus.QUEUED, FlowStatus.RUNNING}:
            assert world.driven

    @invariant()
    def the_end_is_told_exactly_once(self) -> None:
        assert self.world.flow is not None
        done = [update for update in self.world.told if update.slot == DONE]
        assert len(done) == has_ended(self.world.flow)
        slots = [update.slot for update in self.world.told]
        assert len(slots) == len(set(slots)), "one slot, told twice"

    @invariant()
    def the_book_agrees_with_the_rows(self) -> None:
        active = {i: task for i, task in self.world.every.items() if is_active(task)}
        assert dict(self.world.children.active) == active

    def teardown(self) -> None:
        """However it stands: a cancel ends it, once its code has gone or been given up."""
        if not hasattr(self, "world"):
            return
        world = self.world
        over = world.flow is not None and has_ended(world.flow)
        world.turn([c.Cancel()])
        if self.turns % 2:
            # An hour for each rung, whatever was done to the clock.
            self.wait([3600, 3600, 3600])
            nested = {i for i in world.code if world.every[i].child_flow_id is not None}
            assert nested == world.code.keys(), "it should have been given up"
            assert not world.driven or nested or over
        for _ in range(30):
            if not (world.code or world.driven):
                break
            if world.driven:
                world.driven = world.leaving = False
                world.turn([c.ControllerStopped()])
            if world.code:
                world.turn([("code_ends", 0, "cancelled")])
        assert world.flow is not None
        assert has_ended(world.flow)
        assert not world.children.launched()
        self.every_child_ends_at_most_once_and_is_silent_then()
        self.history_tells_the_whole_flow()
        self.the_end_is_told_exactly_once()
        assert TOKEN.encode() not in msgspec.json.encode(world.history)


class TestFlow(FlowMachine.TestCase):
    def runTest(self) -> None:
        super().runTest()
        # The one only befalls flows that follow a task, the other needs a crash while there is no room.
        elsewhere = {"flow.lost", "task.interrupted"}
        effects = {kind.__name__ for kind in get_args(Effect)}
        adopted = {f"adopted {executor}" for executor in ("code", "command", "flow")}
        assert PLAYED.keys() >= (set(EventType) - elsewhere) | effects | adopted, "vacuous"


TestFlow.settings = settings(PROFILE, max_examples=300, stateful_step_count=25)


# ---- a flow that mostly waits ----------------------------------------------------------------------

WAITED: Counter[str] = Counter()
KEPT = (
    FlowMachine.history_has_no_gap,
    FlowMachine.history_tells_the_whole_flow,
    FlowMachine.every_child_ends_at_most_once_and_is_silent_then,
    FlowMachine.a_flow_with_a_review_is_blocked_by_one_that_nobody_has_answered,
    FlowMachine.what_a_flow_waits_for_is_open,
    FlowMachine.nobody_is_forgotten,
    FlowMachine.the_end_is_told_exactly_once,
    FlowMachine.the_book_agrees_with_the_rows,
)
moments = st.one_of(
    st.tuples(st.just("turn"), st.lists(wait_specs, min_size=1, max_size=2)),
    st.tuples(st.just("turn"), st.lists(wait_specs, min_size=1, max_size=2)),
    st.tuples(st.just("turn"), st.lists(flow_specs, min_size=1, max_size=1)),
    st.tuples(st.just("stand"), some_waits),
    st.tuples(st.just("stand"), some_waits),
    st.tuples(st.just("stand and leave"), some_waits),
    st.tuples(st.just("stand and leave"), some_waits),
    st.tuples(st.just("answer"), small),
    st.tuples(st.just("answer"), small),
    st.tuples(st.just("code"), st.lists(code_ends, min_size=1, max_size=1)),
    st.tuples(st.just("work"), additions),
    st.tuples(st.just("odd"), small),
    st.tuples(st.just("ask"), st.sampled_from(["m1", "m2"])),
    st.tuples(st.just("review"), small),
    st.tuples(st.just("time"), st.sampled_from([1, 6, 80])),
    st.tuples(st.just("back"), st.just(10)),
    st.tuples(st.just("crash"), st.just(0)),
)


def befall(world: World, moment: Spec) -> None:
    """One moment in the life of a flow that mostly waits."""
    what, given_to = moment
    before, parked = world.flow, len(world.history)
    match what:
        case "turn" | "code":
            world.turn(list(given_to))
        case "work":
            world.turn([given_to])
        case "stand":
            world.turn([("stand", given_to, True)])
        case "stand and leave":
            world.turn([("stand", given_to, True)])
            world.now += 6_000
            world.turn([c.Tick()])
            world.turn([c.Wake()])
        case "answer":
            world.turn([("answer_one", given_to)])
        case "odd":
            world.turn([("add", [(Launch(function="work"), None, None)])])
            world.turn([("code_ends", given_to, "odd")])
        case "ask":
            world.turn([("tell", True)])
            world.turn([("stand", [("message", given_to, (None, OnTimeout.FAIL))], True)])
        case "review":
            world.turn([("answer", given_to)])
        case "time":
            world.now += given_to * 1000
            world.turn([c.Tick()])
        case "back":
            world.now -= given_to * 1000
        case _:
            world.reload()
            world.turn([c.Tick()])
    assert before is not None
    for event in world.history[parked:]:
        standing = "parked" if before.awaiting and before.park_at is None else "in memory"
        WAITED[f"{event.type} {standing}" if before.awaiting else event.type] += 1


@given(
    registered=st.sampled_from([True, True, True, False]),
    course=st.lists(moments, min_size=5, max_size=25),
    end=ending_specs,
)
@settings(PROFILE, max_examples=400)
def every_course_of_waits(registered: bool, course: list[Spec], end: Spec) -> None:
    machine = FlowMachine()
    controllers = frozenset({"triage"}) if registered else frozenset[str]()
    world = machine.world = World(None, controllers=controllers)
    world.turn([c.Create(draft=fresh_flow())])
    for moment in course:
        befall(world, moment)
        for check in KEPT:
            check(machine)
    machine.turns = 1
    world.turn([end])
    for check in KEPT:
        check(machine)
    FlowMachine.teardown(machine)


def test_whatever_befalls_a_flow_that_mostly_waits_nobody_is_forgotten_or_told_twice() -> None:
    every_course_of_waits()

    seen = {f"flow.resumed {how}" for how in ("parked", "in memory")}
    seen |= {"flow.parked", "flow.updated parked", "flow.blocked in memory", "task.overdue"}
    seen |= {"task.voted", "task.taken", "task.reminded", "task.started", "task.review_requested"}
    assert seen <= WAITED.keys(), "vacuous"


# ---- totality -------------------------------------------------------------------------------------

flows = st.one_of(
    st.none(),
    st.builds(
        lambda status, intent, mode: a_flow(status, intent=intent, sync_mode=mode),
        st.sampled_from(FlowStatus),
        st.booleans(),
        st.sampled_from(SyncMode),
    ),
    st.builds(
        lambda status, groups, park_at: a_flow(status, awaiting=groups, park_at=park_at),
        st.sampled_from(LIVE),
        st.sampled_from([(("W0",),), (("W1", "W2"), ("W0",)), (("gone",),)]),
        st.sampled_from([None, 1, NOW, NOW + 1]),
    ),
    st.builds(
        lambda status, at, on_timeout: a_flow(
            status,
            wait_key="k",
            wait=Wait(kind=WaitKind.SIGNAL, wait_key="k", deadline_at=at, on_timeout=on_timeout),
        ),
        st.sampled_from([FlowStatus.WAITING, FlowStatus.BLOCKED]),
        st.sampled_from([None, NOW - 1, NOW, NOW + 1]),
        st.sampled_from(OnTimeout),
    ),
)
instants = st.sampled_from([None, NOW - 1, NOW, NOW + 1])
open_waits = st.one_of(
    st.builds(
        lambda at, on_timeout, overdue: a_wait_draft(
            "w0",
            wait_key="k",
            deadline_at=at,
            on_timeout=on_timeout,
            is_overdue=overdue,
            remind_at=(NOW - 9, NOW + 9),
        ),
        instants,
        st.sampled_from(OnTimeout),
        st.booleans(),
    ),
    st.builds(lambda at: a_wait_draft("w1", WaitKind.TIMER, deadline_at=at or NOW), instants),
    st.builds(lambda at: a_wait_draft("in", WaitKind.MESSAGE, deadline_at=at), instants),
    st.builds(lambda at: an_approval_draft("w2", deadline_at=at), instants),
)
letters = st.one_of(
    st.builds(lambda n, at: addressed("w0", Raw(b"1"), n, expires_at=at).draft, small, instants),
    st.builds(lambda n, asks: told(Raw(b"1"), n, wants_reply=asks).draft, small, st.booleans()),
    st.builds(
        lambda n, by: cast(a_vote(approver=by, step="w2"), "w2", n).early,
        small,
        st.sampled_from(["ann", "bob"]),
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
        st.builds(
            lambda n, launch: a_launched(
                f"c{n}", TaskStatus.QUEUED, launch=launch, attempt=1, review_requested_at=NOW - 1
            ),
            small,
            launched,
        ),
        st.builds(
            lambda n, launch, killed: a_launched(
                f"c{n}",
                launch=launch,
                child_flow_id="inner" if launch.executor == "flow" else None,
                cancel_requested_at=NOW - 90_000,
                kill_requested_at=NOW - 80_000 if killed else None,
            ),
            small,
            launched,
            st.booleans(),
        ),
        st.builds(
            lambda n: a_launched(f"c{n}", TaskStatus.QUEUED, queue_timeout=1.0),
            small,
        ),
        st.builds(lambda n, draft: an_old_wait(f"w{n}", wait=draft.wait, key=n), small, open_waits),
        st.builds(
            lambda n, draft, taken: a_linked(
                f"l{n}",
                TaskStatus.RUNNING if taken else TaskStatus.QUEUED,
                letter=draft.letter,
                input_json=draft.input_json,
            ),
            small,
            letters,
            st.booleans(),
        ),
    ),
    max_size=6,
    unique_by=lambda task: task.task_id,
)
task_ids = st.sampled_from([f"{kind}{n}" for kind in "lcW" for n in range(6)])
revisions = st.sampled_from([0, 6, 7, 8])
drafts = st.builds(
    lambda n, launch, run_id, value: c.TaskDraft(
        child_flow_id="inner" if launch and launch.executor == "flow" else None,
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
step_names = st.sampled_from(["w0", "w1", "w2", "in", "W0", "W3", ""])
about_waits: st.SearchStrategy[c.Command] = st.one_of(
    st.builds(
        lambda made, more, may_park, withdraw: c.Await(
            drafts=tuple(made),
            steps=(*more, *(draft.run_id or "" for draft in made)),
            may_park=may_park,
            withdraw=withdraw,
        ),
        st.lists(open_waits, max_size=2, unique_by=lambda draft: draft.task_id),
        st.lists(step_names, min_size=1, max_size=2),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(c.StopAwaiting, steps=st.lists(step_names, max_size=2).map(tuple)),
    st.just(c.ControllerParked()),
    st.builds(
        c.Deliver,
        wait_key=st.sampled_from([None, "k"]),
        task_id=st.one_of(st.none(), step_names, task_ids),
        token=st.sampled_from([None, "another"]),
        payload=st.sampled_from([UNSET, Raw(b"1")]),
        signal_id=st.sampled_from([None, "s1"]),
    ),
    st.builds(lambda n, step: addressed(step or "w0", Raw(b"1"), n), small, step_names),
    st.builds(lambda n, asks: told(UNSET, n, wants_reply=asks), small, st.booleans()),
    st.builds(
        lambda n: c.Tell(draft=msgspec.structs.replace(a_letter("in", n=n), input_json=BROKEN)),
        small,
    ),
    st.builds(
        lambda kind, step, n, late: cast(a_vote(kind, step="w2"), step, n, expires_at=late),
        st.sampled_from(VoteKind),
        st.sampled_from(["w2", "W2", "w0", "none yet"]),
        small,
        instants,
    ),
    st.builds(
        lambda n, name, data: c.Notify(
            draft=c.TaskDraft(
                key=n, task_id=f"new{n}", runtime="notice", task="notice", run_id=name
            ),
            text="Half done.",
            data=data,
        ),
        small,
        st.sampled_from(["s1", "w0", "r"]),
        states,
    ),
    st.just(c.NoteDelivery(slot="done", reason="410 Gone")),
    st.builds(
        c.SetWaiting,
        expected_revision=revisions,
        patch=patches,
        wait_json=json_values,
        wait=open_waits.map(lambda draft: draft.wait),
    ),
)
any_command: st.SearchStrategy[c.Command] = st.one_of(
    about_waits,
    about_waits,
    st.builds(
        c.Create,
        draft=st.just(fresh_flow()),
        defect=st.sampled_from([None, BROKEN]),
        carried=st.sampled_from([(), (a_carried(1),), (a_carried(1), a_carried(2))]),
    ),
    st.builds(
        c.Spawn,
        draft=st.just(a_flow(FlowStatus.QUEUED, revision=0, sync_mode=SyncMode.TASK_MIRRORED)),
        task=drafts,
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
    st.builds(c.RequestCancel, expected_revision=st.one_of(st.none(), revisions)),
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
        again=st.booleans(),
        review=st.booleans(),
        retry_after=st.sampled_from([None, 0.0, 7.5]),
        terminal_outcome=st.sampled_from([None, *TerminalOutcome]),
    ),
    st.builds(c.RetryTask, task_id=task_ids, input_json=states),
    st.builds(c.CancelTask, task_id=task_ids),
    st.builds(
        c.ReleaseTasks,
        task_ids=st.lists(task_ids, max_size=3).map(tuple),
        begun=st.frozensets(task_ids, max_size=3),
    ),
    st.just(c.Tick()),
    st.just(c.Wake()),
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
        "executors": st.sampled_from([EXECUTORS, EXECUTORS, frozenset()]),
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
        for effect in turn.effects():
            assert not isinstance(effect, StartTask) or effect.adopted
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
