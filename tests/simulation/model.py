"""The specification: what flows and children are, in plain Python, and what every call on them must do.

Nothing here knows flowstead's rules. A flow's history is folded event by event, and each event must have been
allowed where it stands; what a call must answer is said beside it, from the state of the flow it met.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

LIVE = frozenset({"queued", "running", "waiting", "blocked"})
ACTIVE = frozenset({"queued", "running"})
FINAL_TASKS = frozenset({"succeeded", "failed", "timed_out", "cancelled", "lost"})
FLOW_ENDS = {
    "flow.succeeded": "succeeded",
    "flow.failed": "failed",
    "flow.cancelled": "cancelled",
    "flow.lost": "lost",
}
MIRRORED = {
    "queued": "queued",
    "running": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "timed_out": "failed",
    "cancelled": "cancelled",
    "lost": "lost",
}
"""The status of a flow that follows one task, by the status of that task."""
CONTROLLERS = (
    "plan", "raise", "give up", "patient", "bare", "race", "collect", "fall back", "root", "branch", "leaf",
    "asks", "deaf", "awaits", "selects", "approves", "mailbox", "tells", "lingers",
)  # fmt: skip
"""Those that the runtimes of a world have code for."""
NESTED = ("branch", "leaf")
"""Those that are run as children of other flows."""
LAUNCHED = "task"
"""The `runtime` of children that are launched; the worlds link theirs under other names."""
STATE_BYTES = 400
ACTIVE_CHILDREN = 6
RUNNING_CHILDREN = 2
MAILBOX = 6
INTERRUPTIONS = 3
NESTED_DEPTH = 2
NESTED_FLOWS = 3
CANCEL_GRACE = 20.0
KILL_AFTER = 2.0
DEADLINE = 2.0
"""Of the tasks `timed` and `quiet`: for an attempt, and for a sign of life."""
ABANDON_AFTER = 3.0
NARROW = 2
"""Most children of the task `narrow` that may run at once."""
RACERS = {"stuck": "hang", "napping": "nap", "quick": "progress"}
"""The steps the controller `race` lets run against each other, and what they do."""
PARTS = {"long": "nap", "broken": "fail late", "quick": "succeed", "talking": "progress"}
"""The steps the controller `collect` takes as they come, and what they do."""
PART_ATTEMPTS = 2
PARK_SECONDS = 1.0
SIGNAL_LIFETIME = 25.0
MESSAGES = 4
DELIVERY_SECONDS = 3.0
CONTENDERS = ("reply", "timer", "work")
"""The steps the controller `selects` lets run against each other."""
CHAIN = {"main": "work", "main/fallback-1": "fragile", "main/fallback-2": "flaky"}
"""The steps of the controller `fall back`, in the order in which they may be needed."""

Answer = tuple[Any, ...]


class Wrong(AssertionError):
    """The runtime did what the specification forbids."""


def canonical(value: Any) -> str:
    """JSON with one spelling, so that it can be compared and hashed."""
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class WaitState:
    """What a child, or a flow, waits for, and how long: as it was asked for, less what has come due since."""

    kind: str
    key: str | None = None
    """The plain fields that a signal has to name."""
    token: str | None = None
    inbox: str | None = None
    deadline: int | None = None
    on_timeout: str = "fail"
    reminders: tuple[int, ...] = ()
    approval: Answer | None = None
    """The quorum, the items that were asked about, the revision of the flow then, and whether one may forbid it."""

    def is_over(self, at: int) -> bool:
        """Whether its deadline has passed at an instant."""
        return self.deadline is not None and self.deadline <= at

    def is_closed(self, at: int) -> bool:
        """Whether an answer comes too late at an instant; not for one that blocks its flow and stays open."""
        return self.is_over(at) and self.on_timeout != "block"


@dataclass(frozen=True)
class LetterState:
    """A message that lies in an inbox until somebody takes it."""

    inbox: str
    payload: str
    wants_reply: bool = False
    expires_at: int | None = None


@dataclass(frozen=True)
class TaskState:
    """One child after one event."""

    task_id: str
    run_id: str | None
    text: str
    launched: bool
    status: str
    attempt: int = 0
    progress: str | None = None
    summary: str | None = None
    failure: Answer | None = None
    """Its kind, code and category."""
    ended_at: int | None = None
    due: int | None = None
    """The instant before which its next attempt may not start."""
    due_since: float = 0.0
    """The simulated second at which that was settled."""
    asked_to_stop_at: int | None = None
    asked_since: float = 0.0
    """The simulated second at which it was asked to stop."""
    killed_at: int | None = None
    review: int | None = None
    outcome: str | None = None
    """What a succeeded child says of its result."""
    child_flow: str | None = None
    """The flow that it stands for."""
    created_at: int = 0
    created_since: float = 0.0
    """The simulated second at which it was made."""
    has_started: bool = False
    started_since: float = 0.0
    """The simulated second at which its present attempt was started."""
    carried: bool = False
    """Whether it ended in the flow that this one goes on from."""
    retries: int = 0
    answers: int = 0
    """How often somebody wanted its next attempt."""
    interruptions: int = 0
    """How often it was cut off by a crash, and started again at once or put back in line."""
    wait: WaitState | None = None
    letter: LetterState | None = None
    given: str = "null"
    """Its input."""
    result: str | None = None
    """What a wait that was answered was answered with."""
    votes: tuple[tuple[str, str], ...] = ()
    """Who has voted how on an approval, since it was last edited."""

    @property
    def is_active(self) -> bool:
        return self.ended_at is None

    def view(self) -> Answer:
        """What anybody who reads the child must see."""
        return (
            self.task_id, self.run_id, self.text, self.status, self.attempt, self.progress, self.summary,
            self.failure, self.child_flow, self.due, self.review, self.asked_to_stop_at, self.killed_at,
            self.ended_at,
        )  # fmt: skip


@dataclass(frozen=True)
class FlowState:
    """One flow after one event."""

    key: int
    owner: str
    flow_id: str
    controller: str | None
    goal: str
    correlation: str | None
    revision: int
    status: str
    mirrored: bool = False
    """Whether it follows one task, and is not changed by hand."""
    parent_task: str | None = None
    retry_of: str | None = None
    depth: int = 0
    step: str | None = None
    state: str = "null"
    wait: str = "null"
    blocked_task: str | None = None
    blocked_summary: str | None = None
    intent: int | None = None
    stopping: int | None = None
    """Since when what runs is being stopped."""
    failure: str | None = None
    ended_at: int | None = None
    tasks: dict[str, TaskState] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    """The children that have ended, in the order in which they did."""
    answer: str = "null"
    """What its last own wait was answered with."""
    own: WaitState | None = None
    """The wait that was set from outside."""
    awaits: bool = False
    """Whether its controller stands in a wait."""
    content: int = 0
    """The revision at which somebody else than the controller last changed what it holds."""
    policy: str = "done_only"
    given_up: tuple[str, ...] = ()
    """What could not be delivered to its owner."""

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None

    @property
    def active(self) -> list[TaskState]:
        return [task for task in self.tasks.values() if task.is_active]

    @property
    def open_waits(self) -> list[TaskState]:
        """The children that wait for an answer, oldest first."""
        return [task for task in self.active if task.wait is not None and not task.carried]

    def letters_in(self, inbox: str | None) -> list[TaskState]:
        """The messages in an inbox that nobody has taken, oldest first."""
        return [
            t for t in self.active if t.letter and t.letter.inbox == inbox and t.status == "queued"
        ]

    def run(self, run_id: str | None) -> TaskState | None:
        """The child of that run id."""
        if run_id is None:
            return None
        return next((task for task in self.tasks.values() if task.run_id == run_id), None)

    def view(self) -> Answer:
        """What anybody who reads the flow must see."""
        return (*self.shape(), self.intent, self.stopping, self.ended_at)

    def shape(self) -> Answer:
        """The view without instants, which a specification cannot foretell."""
        return (
            self.flow_id, self.owner, self.controller, self.goal, self.correlation, self.revision,
            self.status, self.step, self.state, self.wait, self.blocked_task, self.blocked_summary,
            self.failure, self.intent is not None, self.stopping is not None, self.has_ended, self.mirrored,
            self.parent_task, self.retry_of, self.answer,
        )  # fmt: skip


# ---- the history ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of the store's history: an event, where it stands, and when it was written."""

    position: int
    key: int
    owner: str
    event: dict[str, Any]
    tick: int
    """The instant of its commit, by the world's count of instants."""
    seconds: float = 0.0
    """The same by the simulated clock, which is never put wrong."""
    row: dict[str, Any] | None = None
    """The record of what it is about, as it lay on the disk right after."""

    @property
    def type(self) -> str:
        found: str = self.event["type"]
        return found

    @property
    def changed(self) -> dict[str, Any]:
        return self.event.get("changed") or {}

    @property
    def actor(self) -> str:
        found: str = self.event["actor"]
        return found

    @property
    def task_id(self) -> str | None:
        return self.event.get("taskId")

    def __str__(self) -> str:
        about = f" {self.task_id}" if self.task_id else ""
        return (
            f"{self.position:4} {self.event['flowId']} seq {self.event['seq']} rev"
            f" {self.event['revision']} {self.type}{about} by {self.actor} {self.changed}"
        )


class FlowLog:
    """All states of one flow, one after each of its events."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.states: list[FlowState | None] = [None]
        self.positions: list[int] = [0]
        """The position in the store from which on the state of the same index held."""

    @property
    def now(self) -> FlowState:
        state = self.states[-1]
        assert state is not None
        return state

    def at(self, position: int) -> FlowState | None:
        """The flow as it was at a position of the store's history."""
        for state, since in zip(reversed(self.states), reversed(self.positions), strict=True):
            if since <= position:
                return state
        raise AssertionError("the first state holds from the beginning")

    def first_position(self, is_so: Callable[[FlowState], bool]) -> int | None:
        """The position from which on something was first so."""
        places = zip(self.positions, self.states, strict=True)
        return next((at for at, state in places if state is not None and is_so(state)), None)


class Model:
    """Every flow there is, by the history alone."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.flows: dict[tuple[str, str], FlowLog] = {}
        self.home: dict[str, tuple[str, str]] = {}
        """The flow each child belongs to."""
        self.kinds: Counter[str] = Counter()

    def absorb(self, entry: Entry) -> None:
        """Take over the next event, which must be one that may follow."""
        expected = len(self.entries) + 1
        if entry.position != expected:
            raise Wrong(f"position {entry.position} comes where {expected} is due: {entry}")
        named = (entry.owner, entry.event["flowId"])
        if entry.type == "flow.created" and named in self.flows:
            raise Wrong(f"created twice: {entry}")
        log = self.flows.get(named)
        if log is None:
            log = self.flows[named] = FlowLog(entry.key)
        if entry.event["seq"] != len(log.states):
            raise Wrong(f"seq {len(log.states)} is due: {entry}")
        log.states.append(follow(log.states[-1], entry, self))
        log.positions.append(entry.position)
        self.entries.append(entry)
        self.kinds[entry.type] += 1
        if entry.type == "task.created":
            assert entry.task_id is not None
            if entry.task_id in self.home:
                raise Wrong(f"the id of a child is used twice: {entry}")
            self.home[entry.task_id] = named

    def owned_by(self, owner: str) -> list[FlowLog]:
        """An owner's flows, newest first; everybody's for the empty string."""
        found = [log for (whose, _), log in self.flows.items() if owner in ("", whose)]
        return sorted(found, key=lambda log: -log.key)

    def task(self, task_id: str) -> TaskState | None:
        """A child as it is now."""
        named = self.home.get(task_id)
        return None if named is None else self.flows[named].now.tasks[task_id]

    def child_flow(self, owner: str, task: TaskState) -> FlowLog | None:
        """The flow that a child stands for, if it has been made."""
        return None if task.child_flow is None else self.flows.get((owner, task.child_flow))

    def below(self, log: FlowLog) -> Iterator[tuple[FlowLog, int]]:
        """A flow and those nested in it, however deep, each with its depth below this one."""
        unseen = [(log, 0)]
        while unseen:
            one, depth = unseen.pop(0)
            yield one, depth
            for task in one.now.tasks.values():
                found = self.child_flow(one.now.owner, task)
                if found is not None and not task.carried:
                    unseen.append((found, depth + 1))

    def above(self, log: FlowLog) -> Iterator[FlowLog]:
        """The flows that a nested one is a child of, the nearest first."""
        while (task_id := log.now.parent_task) is not None:
            log = self.flows[self.home[task_id]]
            yield log


def follow(before: FlowState | None, entry: Entry, model: Model) -> FlowState:
    """The flow after an event.

    Raises:
        Wrong: The event may not follow on this state.
    """
    kind, revision = entry.type, entry.event["revision"]
    if kind == "flow.created":
        return _created(entry)
    if before is None:
        raise Wrong(f"a flow begins with {entry}")
    if kind == "update.failed":
        if revision != before.revision:
            raise Wrong(f"news of a channel moved the revision: {entry}")
        return replace(before, given_up=(*before.given_up, entry.changed["slot"]))
    if kind.startswith("task."):
        if revision != before.revision:
            raise Wrong(f"a child moved the revision: {entry}")
        return _with_task(before, entry, model)
    if revision != before.revision + 1:
        raise Wrong(f"revision {before.revision + 1} is due: {entry}")
    if before.has_ended:
        raise Wrong(f"the flow has ended: {entry}")
    after = _patched(before, entry)
    _check_flow_step(before, after, entry)
    _check_failure(before, entry)
    say = _CONTROLLERS_SAY.get(before.controller or "")
    if entry.actor in ("runtime", "controller") and say is not None:
        say(after, entry)
    return after


def _created(entry: Entry) -> FlowState:
    told = entry.changed
    if entry.event["revision"] != 0 or entry.event["seq"] != 1:
        raise Wrong(f"a flow begins at revision 0 and seq 1: {entry}")
    if told["ownerKey"] != entry.owner or told["status"] not in LIVE:
        raise Wrong(f"no flow begins like that: {entry}")
    return FlowState(
        key=entry.key,
        owner=entry.owner,
        flow_id=entry.event["flowId"],
        controller=told.get("controllerId"),
        goal=told["goal"],
        correlation=told.get("correlationId"),
        revision=0,
        status=told["status"],
        mirrored=told["syncMode"] == "task_mirrored",
        parent_task=told.get("parentTaskId"),
        retry_of=told.get("retryOf"),
        depth=told.get("depth", 0),
        step=told.get("currentStep"),
        state=canonical(told.get("stateJson")),
        wait=canonical(told.get("waitJson")),
        own=_own_wait(told.get("waitJson"), entry),
        policy=told["notifyPolicy"],
    )


RESERVED = frozenset({"deadlineAt", "onTimeout", "prompt", "remindAt", "schema", "wakeAt"})


def plain_fields(wait: Any) -> str | None:
    """What a signal has to name to answer a wait that was set from outside."""
    fields = wait if isinstance(wait, dict) else {}
    plain = {
        n: v for n, v in fields.items() if n not in RESERVED and isinstance(v, (str, int, float))
    }
    return canonical(plain) if plain else None


def _own_wait(wait: Any, entry: Entry) -> WaitState | None:
    """The wait that was set from outside; None for no wait, or one of the controller's."""
    if wait is None or entry.actor == "controller":
        return None
    fields = wait if isinstance(wait, dict) else {}
    wakes = fields.get("wakeAt")
    remind = fields.get("remindAt", [])
    stored = (entry.row or {}).get("wait") or {}
    return WaitState(
        kind="signal",
        key=plain_fields(wait),
        token=stored.get("token"),
        deadline=fields.get("deadlineAt") if wakes is None else wakes,
        on_timeout=fields.get("onTimeout", "fail" if wakes is None else "resume"),
        reminders=tuple(sorted(remind if isinstance(remind, list) else [remind])),
    )


def _patched(before: FlowState, entry: Entry) -> FlowState:
    told = entry.changed
    fields: dict[str, Any] = {"revision": entry.event["revision"]}
    for wire, name in (
        ("status", "status"),
        ("currentStep", "step"),
        ("blockedTaskId", "blocked_task"),
        ("blockedSummary", "blocked_summary"),
        ("cancelRequestedAt", "intent"),
        ("cancelStartedAt", "stopping"),
        ("endedAt", "ended_at"),
    ):
        if wire in told:
            fields[name] = told[wire]
    for wire, name in (("stateJson", "state"), ("waitJson", "wait"), ("answerJson", "answer")):
        if wire in told:
            fields[name] = canonical(told[wire])
    if "waitJson" in told:
        fields["own"] = _own_wait(told["waitJson"], entry)
        fields["awaits"] = told["waitJson"] is not None and entry.actor == "controller"
    elif before.own is not None and entry.type in ("flow.blocked", "flow.reminded"):
        fields["own"] = _seen_to(before.own, entry)
    if entry.actor == before.owner and _is_content(told, entry):
        fields["content"] = entry.event["revision"]
    if "failure" in told:
        fields["failure"] = None if told["failure"] is None else told["failure"]["kind"]
    return replace(before, **fields)


def _is_content(told: dict[str, Any], entry: Entry) -> bool:
    """Whether an event of the owner's has changed what the flow holds."""
    if not told and entry.type == "flow.updated":
        # Set to nothing new, or a note of what an approval allows: the history does not say.
        return (entry.row or {}).get("contentRevision") == entry.event["revision"]
    is_set = "waitJson" in told and entry.type in ("flow.waiting", "flow.blocked")
    return is_set or bool({"stateJson", "currentStep"} & told.keys())


def _seen_to(wait: WaitState, entry: Entry) -> WaitState:
    """A wait after its clock has struck: blocked on, or reminded of."""
    if entry.type == "flow.blocked":
        return (
            replace(wait, deadline=None, reminders=()) if wait.is_over(entry.event["at"]) else wait
        )
    return replace(wait, reminders=tuple(at for at in wait.reminders if at > entry.event["at"]))


def _check_flow_step(before: FlowState, after: FlowState, entry: Entry) -> None:
    kind = entry.type
    if kind not in _FLOW_STEPS:
        raise Wrong(f"nobody knows such an event: {entry}")
    # What a controller waits for ends with the wish to cancel, and lets it go on to hear of that.
    if (
        before.intent is not None
        and kind in ("flow.waiting", "flow.blocked", "flow.resumed")
        and not (kind == "flow.resumed" and before.awaits)
    ):
        raise Wrong(f"a cancel was requested before: {entry}")
    if kind != "flow.cancel_requested" and before.intent != after.intent:
        raise Wrong(f"the intent changed: {entry}")
    if before.stopping != after.stopping and not (
        before.stopping is None and kind in ("flow.cancel_requested", "flow.cancel_started")
    ):
        raise Wrong(f"since when it is being stopped has changed: {entry}")
    if (kind in FLOW_ENDS) != after.has_ended or (after.status in LIVE) == after.has_ended:
        raise Wrong(f"ended and not ended: {entry}")
    if before.mirrored:
        _check_mirrored_step(before, after, entry)
        return
    if kind == "flow.started" and (
        entry.actor != "runtime" or before.controller not in CONTROLLERS
    ):
        raise Wrong(f"only the runtime enters a registered controller: {entry}")
    if not _FLOW_STEPS[kind](before, after):
        raise Wrong(f"this may not follow on {before.status}: {entry}")
    if kind == "flow.resumed" and before.awaits and before.controller == "selects":
        _check_losers_are_over(before, entry)
    _check_own_wait(before, entry)


def _check_losers_are_over(flow: FlowState, entry: Entry) -> None:
    """What lets a flow go on that selects has decided it: nothing answers a loser any more."""
    left = [task for task in flow.open_waits if task.run_id in CONTENDERS]
    if left and _ended_among(flow, CONTENDERS):
        raise Wrong(f"a loser can still be answered: {left}, {entry}")


def _check_own_wait(before: FlowState, entry: Entry) -> None:
    """The clock does to a wait that was set from outside what it was told to, and not before its time."""
    kind, at, own = entry.type, entry.event["at"], before.own
    failure = entry.changed.get("failure") or {}
    if kind == "flow.failed" and (failure.get("kind"), failure.get("code")) == (
        "timed_out",
        "wait",
    ):
        allowed = own is not None and own.is_over(at) and own.on_timeout == "fail"
    elif kind == "flow.resumed" and (entry.changed.get("answerJson") or {}).get("timedOut"):
        allowed = own is not None and own.is_over(at) and own.on_timeout == "resume"
    elif kind == "flow.resumed" and "answerJson" in entry.changed:
        allowed = own is not None and not own.is_closed(at)
    elif kind == "flow.reminded":
        allowed = own is not None and bool(own.reminders) and own.reminders[0] <= at
    else:
        return
    if not allowed:
        raise Wrong(f"its wait is {own}: {entry}")


_FLOW_STEPS: dict[str, Callable[[FlowState, FlowState], bool]] = {
    "flow.started": lambda b, a: (
        (b.status, a.status) == ("queued", "running")
        # Its process ended while it stood in a wait: it is on its way there again.
        or (b.awaits and (b.status, a.status) in (("waiting", "running"), ("blocked", "blocked")))
    ),
    "flow.waiting": lambda b, a: a.status == "waiting",
    "flow.blocked": lambda b, a: a.status == "blocked",
    "flow.resumed": lambda b, a: a.status in ("queued", "running"),
    "flow.parked": lambda b, a: (
        b.awaits and b.status == a.status and a.status in ("waiting", "blocked")
    ),
    "flow.reminded": lambda b, a: b.status == a.status,
    "flow.updated": lambda b, a: b.status == a.status,
    "flow.cancel_requested": lambda b, a: b.status == a.status and b.intent is None,
    "flow.cancel_started": lambda b, a: b.status == a.status and None not in (b.intent, a.stopping),
    "flow.succeeded": lambda b, a: a.status == "succeeded",
    "flow.failed": lambda b, a: a.status == "failed",
    "flow.cancelled": lambda b, a: (
        a.status == "cancelled" and b.intent is not None and not b.active
    ),
    "flow.lost": lambda b, a: False,
}


def _check_mirrored_step(before: FlowState, after: FlowState, entry: Entry) -> None:
    """A flow that follows a task goes where the task has gone; else it is only blocked, and let go on."""
    kind, [task] = entry.type, before.tasks.values()
    if kind in ("flow.cancel_requested", "flow.cancel_started"):
        allowed = _FLOW_STEPS[kind](before, after)
    elif kind == "flow.blocked":
        blocks = task.review is not None or task.outcome == "blocked"
        allowed = after.status == "blocked" and after.blocked_task == task.task_id and blocks
    elif kind == "flow.resumed":
        allowed = (before.status, after.status) == ("blocked", "queued")
    elif kind == "flow.cancelled" and task.outcome == "blocked":
        allowed = before.intent is not None and after.status == "cancelled"
    else:
        allowed = after.status == MIRRORED[task.status] and (kind in FLOW_ENDS) != task.is_active
        allowed = allowed and kind in (*FLOW_ENDS, "flow.started", "flow.updated")
    if not allowed:
        raise Wrong(f"its task is {task}: {entry}")


def _check_failure(before: FlowState, entry: Entry) -> None:
    code = (entry.changed.get("failure") or {}).get("code")
    if entry.type == "flow.failed" and not before.mirrored and code in _FAILURES_OF_THE_STORE:
        raise Wrong(f"a flow does not fail because its disk did: {entry}")


def _with_task(flow: FlowState, entry: Entry, model: Model) -> FlowState:
    task_id = entry.task_id
    assert task_id is not None
    if entry.type == "task.created":
        task = _new_task(flow, entry, model)
    else:
        before = flow.tasks.get(task_id)
        if before is None or not before.is_active:
            raise Wrong(f"the child has ended, or never was: {entry}")
        if before.carried:
            task = replace(before, ended_at=entry.changed["endedAt"])
        else:
            task = _task_after(before, entry)
            _check_task_step(flow, before, task, entry)
    ends = flow.ends if task.is_active else (*flow.ends, task_id)
    return replace(flow, tasks={**flow.tasks, task_id: task}, ends=ends)


def _new_task(flow: FlowState, entry: Entry, model: Model) -> TaskState:
    task_id, told = entry.task_id, entry.changed
    assert task_id is not None
    if flow.has_ended or flow.intent is not None or (flow.mirrored and flow.tasks):
        raise Wrong(f"a child of a flow that takes none: {entry}")
    if told.get("runId") is not None and flow.run(told["runId"]):
        raise Wrong(f"two children of one run id: {entry}")
    if told["status"] in FINAL_TASKS:
        return _carried_task(flow, entry, model)
    row = entry.row or {}
    wait, letter = _wait_in(row), _letter_in(row)
    if letter is None and len(flow.active) >= ACTIVE_CHILDREN:
        raise Wrong(f"more active children than allowed: {entry}")
    if told.get("childFlowId") is not None and flow.depth >= NESTED_DEPTH:
        raise Wrong(f"nested deeper than allowed: {entry}")
    task = TaskState(
        task_id,
        told.get("runId"),
        told["task"],
        told["runtime"] == LAUNCHED,
        told["status"],
        child_flow=told.get("childFlowId"),
        created_at=entry.event["at"],
        created_since=entry.seconds,
        has_started=told["status"] == "running",
        wait=wait,
        letter=letter,
        given=canonical(row.get("inputJson")),
    )
    if flow.controller == "fall back" and entry.actor == "controller":
        _check_fallback_is_needed(flow, task, entry)
    return task


def _wait_in(row: dict[str, Any]) -> WaitState | None:
    """What a child waits for, by its record."""
    wait = row.get("wait")
    if wait is None:
        return None
    approval = wait.get("approval")
    return WaitState(
        kind=wait["kind"],
        key=canonical(wait["key"]) if "key" in wait else None,
        token=wait.get("token"),
        inbox=wait.get("inbox"),
        deadline=wait.get("deadlineAt"),
        on_timeout=wait.get("onTimeout", "fail"),
        reminders=tuple(wait.get("remindAt", ())),
        approval=None
        if approval is None
        else (
            approval.get("quorum", 1),
            canonical(approval.get("asked", approval["items"])),
            approval.get("revision", 0),
            bool(approval.get("veto", ["*"])),
        ),
    )


def _letter_in(row: dict[str, Any]) -> LetterState | None:
    """The message that a child brings, by its record."""
    letter = row.get("letter")
    if letter is None:
        return None
    return LetterState(
        inbox=letter["inbox"],
        payload=canonical(row.get("inputJson")),
        wants_reply=letter.get("wantsReply", False),
        expires_at=letter.get("expiresAt"),
    )


def _carried_task(flow: FlowState, entry: Entry, model: Model) -> TaskState:
    """A succeeded child of the flow that this one goes on from: the same in all but its name."""
    first = model.flows.get((flow.owner, flow.retry_of or ""))
    told, others = entry.changed, [task for task in flow.tasks.values() if not task.carried]
    named = (told.get("runId"), told["task"], told["status"])
    for task in () if first is None else first.now.tasks.values():
        if (task.run_id, task.text, task.status) == named and not others:
            assert entry.task_id is not None
            # Nobody has run it here, and nobody will.
            return replace(
                task,
                task_id=entry.task_id,
                carried=True,
                launched=False,
                attempt=0,
                child_flow=None,
                ended_at=None,
                wait=None,
                letter=None,
            )
    raise Wrong(f"it never ended like that: {entry}")


def _task_after(before: TaskState, entry: Entry) -> TaskState:
    told, fields = entry.changed, dict[str, Any]()
    for wire, name in (
        ("status", "status"),
        ("attempt", "attempt"),
        ("progressSummary", "progress"),
        ("terminalSummary", "summary"),
        ("terminalOutcome", "outcome"),
        ("cancelRequestedAt", "asked_to_stop_at"),
        ("killRequestedAt", "killed_at"),
        ("reviewRequestedAt", "review"),
        ("endedAt", "ended_at"),
        ("nextAttemptAt", "due"),
    ):
        if wire in told:
            fields[name] = told[wire]
    if "failure" in told:
        fields["failure"] = failure_in(told["failure"])
    if before.wait is not None:
        fields |= _waited(before, before.wait, entry)
    if entry.type == "task.retry_scheduled":
        fields.update(retries=before.retries + 1, due_since=entry.seconds)
    if entry.type == "task.retry_requested":
        fields["answers"] = before.answers + 1
    if entry.type == "task.cancel_requested":
        fields["asked_since"] = entry.seconds
    if entry.type == "task.interrupted":
        fields["interruptions"] = before.interruptions + 1
    if entry.type == "task.started":
        fields.update(has_started=True, started_since=entry.seconds)
        if before.status == "running":
            fields["interruptions"] = before.interruptions + 1
    return replace(before, **fields)


def _waited(before: TaskState, wait: WaitState, entry: Entry) -> dict[str, Any]:
    """What an event has done to a wait."""
    match entry.type:
        case "task.overdue":
            return {"wait": replace(wait, deadline=None, reminders=())}
        case "task.reminded":
            left = tuple(at for at in wait.reminders if at > entry.event["at"])
            return {"wait": replace(wait, reminders=left)}
        case "task.voted":
            vote = (entry.changed["approver"], entry.changed["vote"])
            return {"votes": (vote,) if vote[1] == "edit" else (*before.votes, vote)}
        case "task.ended" if entry.changed["status"] == "succeeded":
            return {"result": canonical((entry.row or {}).get("resultJson"))}
        case _:
            return {}


def failure_in(told: dict[str, Any] | None) -> Answer | None:
    """A failure as the specification knows it: without the words for people."""
    return None if told is None else (told["kind"], told.get("code"), told.get("category"))


def _check_task_step(flow: FlowState, before: TaskState, after: TaskState, entry: Entry) -> None:
    kind, status = entry.type, (before.status, after.status)
    if before.wait is not None:
        _check_wait_step(flow, before, before.wait, after, entry)
        return
    halted = flow.has_ended or flow.intent is not None
    gained = after.attempt - before.attempt
    if kind == "task.started":
        if before.launched:
            allowed = after.status == "running" and gained == 1 and not halted
            allowed = allowed and entry.actor != "linked" and before.review is None
            # One that stands for another flow waits for it, whatever happens to those who wait.
            allowed = allowed and (before.child_flow is None or after.attempt == 1)
        else:
            allowed = status == ("queued", "running") and gained == 0 and flow.intent is None
    elif kind == "task.ended":
        allowed = after.status in FINAL_TASKS and not after.is_active
    elif kind == "task.taken":
        wants_reply = before.letter is not None and before.letter.wants_reply
        allowed = wants_reply and status == ("queued", "running") and not halted
    elif kind == "task.progressed":
        allowed = before.status == after.status and gained == 0
    elif kind in _STEPS_OF_LAUNCHED:
        allowed = before.launched and status == _STEPS_OF_LAUNCHED[kind]
        allowed = allowed and gained == (-1 if kind == "task.released" else 0)
        allowed = allowed and not (halted and kind in _NOT_WHEN_HALTED)
        allowed = allowed and _MEANING.get(kind, lambda _: True)(after)
    else:
        raise Wrong(f"nobody knows such an event: {entry}")
    if not allowed:
        raise Wrong(f"this may not follow on {before.status} of attempt {before.attempt}: {entry}")
    if (kind == "task.ended") != (not after.is_active):
        raise Wrong(f"ended and not ended: {entry}")
    _check_rungs(before, after, entry)
    if after.interruptions > INTERRUPTIONS:
        raise Wrong(f"cut off {after.interruptions} times, and started all the same: {entry}")


def _check_wait_step(
    flow: FlowState, before: TaskState, wait: WaitState, after: TaskState, entry: Entry
) -> None:
    """A wait stands still until it is over, and what the clock does to it is not done before its time."""
    kind, at = entry.type, entry.event["at"]
    halted = flow.has_ended or flow.intent is not None
    if kind == "task.ended":
        allowed = not after.is_active and _may_end_so(wait, after, at, halted=halted)
    elif kind == "task.reminded":
        allowed = bool(wait.reminders) and wait.reminders[0] <= at and not wait.is_over(at)
    elif kind == "task.overdue":
        allowed = (
            wait.is_over(at) and wait.on_timeout == "block" and wait.kind in ("signal", "message")
        )
    elif kind == "task.voted":
        allowed = wait.kind == "approval" and not wait.is_over(at) and not halted
        allowed = allowed and not _has_changed_since(flow, wait)
    else:
        allowed = False
    if not allowed or (kind != "task.ended" and after.status != "queued"):
        raise Wrong(f"this may not follow on {before}: {entry}")
    if kind == "task.ended" and wait.kind == "approval" and after.status == "succeeded":
        _check_verdict(flow, before, after, entry)
    if kind == "task.ended" and wait.inbox and after.status == "succeeded":
        _check_letter_is_oldest(flow, wait, after, entry)


def _has_changed_since(flow: FlowState, wait: WaitState) -> bool:
    """Whether somebody else than the controller has changed the flow since an approval was asked for."""
    return wait.approval is not None and flow.content > wait.approval[2]


def _may_end_so(wait: WaitState, after: TaskState, at: int, *, halted: bool) -> bool:
    """Answered in time, or over when its time was, or withdrawn."""
    match after.status:
        case "cancelled":
            return True
        case "succeeded" if wait.kind == "timer":
            return wait.is_over(at) and not halted
        case "succeeded" if wait.kind == "approval":
            return not halted
        case "succeeded":
            return not wait.is_closed(at) and not halted
        case "timed_out":
            ends = wait.kind in ("signal", "message") and wait.on_timeout != "block"
            return ends and wait.is_over(at) and not halted
        case _:
            return False


def _check_verdict(flow: FlowState, before: TaskState, after: TaskState, entry: Entry) -> None:
    """An approval comes out as its votes say, unless its time is over or the flow is not what it was."""
    assert before.wait is not None and before.wait.approval is not None
    told = json.loads(after.result or "null")
    quorum, asked, _, has_veto = before.wait.approval
    votes = [kind for _, kind in before.votes]
    against = votes.count("reject")
    over, changed = before.wait.is_over(entry.event["at"]), _has_changed_since(flow, before.wait)
    if against and (has_veto or against >= quorum):
        expected = "rejected"
    elif len(votes) - against >= quorum:
        expected = "approved"
    else:
        expected = "expired" if over else "stale"
    if told["verdict"] != expected or (expected == "stale" and not changed):
        raise Wrong(f"it is {expected}, by {before}, of {flow}: {entry}, {told}")
    if expected == "approved" and len({who for who, _ in before.votes}) < quorum:
        raise Wrong(f"somebody has voted twice: {before}, {entry}")
    if "edit" not in votes and canonical(told["items"]) != asked:
        raise Wrong(f"it was asked about {asked}: {told}")


def _check_letter_is_oldest(
    flow: FlowState, wait: WaitState, after: TaskState, entry: Entry
) -> None:
    """Of the messages in an inbox the oldest is taken first."""
    if wait.kind != "message":
        return
    told = json.loads(after.result or "null")
    if told["id"] is None:
        return  # somebody had its token
    taken = flow.tasks[told["id"]]
    # It has been recorded as taken right before. Of two that came at the same time either may be first.
    order = list(flow.tasks)
    earlier = [
        task
        for task in flow.letters_in(wait.inbox)
        if order.index(task.task_id) < order.index(taken.task_id)
        and int(task.task_id[5:]) < int(taken.task_id[5:])
    ]
    if (lying := earlier) and taken.task_id != lying[0].task_id:
        raise Wrong(f"{lying} came before it: {entry}, {told}")


_STEPS_OF_LAUNCHED = {
    "task.cancel_requested": ("running", "running"),
    "task.kill_requested": ("running", "running"),
    "task.retry_scheduled": ("running", "queued"),
    "task.review_requested": ("running", "queued"),
    "task.retry_requested": ("queued", "queued"),
    "task.released": ("running", "queued"),
    "task.interrupted": ("running", "queued"),
}
_NOT_WHEN_HALTED = frozenset(
    {"task.retry_scheduled", "task.review_requested", "task.retry_requested", "task.interrupted"}
)
_MEANING: dict[str, Callable[[TaskState], bool]] = {
    "task.review_requested": lambda task: task.review is not None,
    "task.retry_requested": lambda task: task.review is None and task.due is None,
    "task.retry_scheduled": lambda task: task.due is not None,
    # A flow below climbs by itself.
    "task.kill_requested": lambda task: task.child_flow is None,
}
_AFTER_A_STOP = frozenset({"task.progressed", "task.kill_requested", "task.ended"})


def _check_rungs(before: TaskState, after: TaskState, entry: Entry) -> None:
    """A stop only climbs: asked to stop, killed, given up."""
    if before.asked_to_stop_at != after.asked_to_stop_at and entry.type != "task.cancel_requested":
        raise Wrong(f"that it was asked to stop has changed: {entry}")
    if before.killed_at != after.killed_at and entry.type != "task.kill_requested":
        raise Wrong(f"that it was killed has changed: {entry}")
    if before.asked_to_stop_at is not None and entry.type not in _AFTER_A_STOP:
        raise Wrong(f"it was asked to stop before: {entry}")
    if entry.type == "task.kill_requested" and before.asked_to_stop_at is None:
        raise Wrong(f"it was not asked to stop before: {entry}")
    is_given_up = not after.is_active and after.failure == ("abandoned", None, None)
    # What ignores its deadline is killed and given up without a record of each rung: no crash leaves any of it.
    if is_given_up and before.killed_at is None and after.status != "timed_out":
        raise Wrong(f"given up before it was killed: {entry}")


# ---- what controllers make of their steps ---------------------------------------------------------

_FAILURES_OF_THE_STORE = frozenset({"CommitFailed", "OutcomeUnknown", "StoreUnusable"})
_WITHOUT_RESULT = frozenset({"failed", "timed_out", "lost"})
_CHILD_ERRORS = frozenset({"ChildFailed", "ChildTimedOut", "ChildLost"})


def _said(entry: Entry) -> dict[str, Any]:
    """What the controller wrote into the state with this event."""
    found: dict[str, Any] = entry.changed.get("stateJson") or {}
    return found if entry.actor == "controller" else {}


def _was_raised(entry: Entry, codes: frozenset[str]) -> bool:
    """Whether the flow failed because its controller let one of these errors pass."""
    return (entry.changed.get("failure") or {}).get("code") in codes


def _ended_among(flow: FlowState, names: Iterable[str]) -> list[TaskState]:
    """The children of these run ids that have ended, in the order in which they did."""
    wanted = frozenset(names)
    return [task for task in map(flow.tasks.__getitem__, flow.ends) if task.run_id in wanted]


def _check_race(flow: FlowState, entry: Entry) -> None:
    """The winner was the first to succeed; of the losers the controller knows how they ended."""
    said, ended = _said(entry), _ended_among(flow, RACERS)
    succeeded = [task.run_id for task in ended if task.status == "succeeded"]
    if "winner" in said and succeeded[:1] != [said["winner"]]:
        raise Wrong(f"those that succeeded are {succeeded}: {entry}")
    left = [task for task in flow.active if task.run_id in RACERS and task.asked_to_stop_at is None]
    if "winner" in said and left:
        raise Wrong(f"not every loser was stopped: {left}, {entry}")
    known = {task.run_id: task.status for task in ended if task.run_id != said.get("winner")}
    if "losers" in said and said["losers"] != known:
        raise Wrong(f"the losers ended as {known}: {entry}")
    if succeeded and _was_raised(entry, _CHILD_ERRORS | {"ChildCancelled"}):
        raise Wrong(f"{succeeded} succeeded, and nobody won: {entry}")


def _check_collection(flow: FlowState, entry: Entry) -> None:
    """Steps were handed out in the order of their ends, and gathered in the order asked for."""
    said, ended = _said(entry), _ended_among(flow, PARTS)
    order = said.get("order", [])
    if order != [task.run_id for task in ended[: len(order)]]:
        raise Wrong(f"they ended as {[task.run_id for task in ended]}: {entry}")
    statuses = {task.run_id: task.status for task in ended}
    if "outcomes" in said and said["outcomes"] != [statuses.get(name) for name in PARTS]:
        raise Wrong(f"they ended as {statuses}: {entry}")


def _check_fallback_is_needed(flow: FlowState, task: TaskState, entry: Entry) -> None:
    """A fallback begins only after the step before it has ended without a result."""
    names = list(CHAIN)
    for name in names[: names.index(task.run_id or "")]:
        before = flow.run(name)
        if before is None or before.status not in _WITHOUT_RESULT:
            raise Wrong(f"nobody needs it after {before}: {entry}")


def _check_fallback(flow: FlowState, entry: Entry) -> None:
    """The result is that of the last step begun; it is given up only after the last there is."""
    if flow.retry_of is not None:
        return  # what it goes on from may have come further
    said, begun = _said(entry), [task for name in CHAIN if (task := flow.run(name))]
    if "by" in said and (begun[-1].task_id, begun[-1].status) != (said["by"], "succeeded"):
        raise Wrong(f"the steps are {begun}: {entry}")
    if _was_raised(entry, _CHILD_ERRORS) and len(begun) < len(CHAIN):
        raise Wrong(f"there are fallbacks left after {begun}: {entry}")


def _check_selection(flow: FlowState, entry: Entry) -> None:
    """The first to end has won, however it ended; the others are withdrawn, or have ended since."""
    said, ended = _said(entry), _ended_among(flow, CONTENDERS)
    if "winner" in said and [said["winner"]] != [task.run_id for task in ended[:1]]:
        raise Wrong(f"they ended as {[task.run_id for task in ended]}: {entry}")
    left = [t for t in flow.active if t.run_id in CONTENDERS and t.asked_to_stop_at is None]
    if "winner" in said and left:
        raise Wrong(f"not every loser was withdrawn: {left}, {entry}")


_CONTROLLERS_SAY: dict[str, Callable[[FlowState, Entry], None]] = {
    "race": _check_race,
    "collect": _check_collection,
    "fall back": _check_fallback,
    "selects": _check_selection,
}


def has_lost(flow: FlowState, task: TaskState) -> bool:
    """Whether a child is a loser of a race that is decided, so that its controller has stopped it."""
    is_driven = flow.controller == "race" and flow.status == "running" and flow.intent is None
    return is_driven and task.run_id in RACERS and '"winner"' in flow.state


# ---- what a call must answer ----------------------------------------------------------------------

REFUSED, APPLIED = "refused", "applied"
_PARKING = frozenset({"set_waiting", "resume", "request_cancel"})


def expect_mutation(state: FlowState | None, op: str, args: dict[str, Any]) -> Answer:
    """What a mutation must answer that meets the flow in this state: the code, or the flow's shape after it."""
    if state is None:
        return (REFUSED, "not_found", None)
    if state.mirrored and op != "cancel":
        return (REFUSED, "not_managed", state.view())
    revision = args.get("expected_revision")
    if revision is not None and revision != state.revision:
        return (REFUSED, "revision_conflict", state.view())
    if state.has_ended:
        return (REFUSED, "terminal", state.view())
    if state.intent is not None and op in _PARKING:
        return (REFUSED, "cancel_requested", state.view())
    if "defect" in args:
        return (REFUSED, args["defect"], state.view())
    return (APPLIED, _mutated(state, op, args).shape())


def _mutated(state: FlowState, op: str, args: dict[str, Any]) -> FlowState:
    after = replace(state, revision=state.revision + 1)
    if "current_step" in args:
        after = replace(after, step=args["current_step"])
    if "state_json" in args:
        after = replace(after, state=canonical(args["state_json"]))
    task, summary = args.get("blocked_task_id"), args.get("blocked_summary")
    match op:
        case "set_waiting":
            status = "blocked" if task or summary else "waiting"
            wait = canonical(args.get("wait_json"))
            return replace(
                after, status=status, wait=wait, blocked_task=task, blocked_summary=summary
            )
        case "resume":
            return _unparked(after, args.get("status", "queued"))
        case "finish":
            return _unparked(replace(after, ended_at=0), "succeeded")
        case "fail":
            after = replace(after, status="failed", wait="null", failure="failed", ended_at=0)
            return replace(
                after,
                blocked_task=task or after.blocked_task,
                blocked_summary=summary or after.blocked_summary,
            )
        case "request_cancel" | "cancel":
            return replace(after, intent=0)
        case _:
            return after


def _unparked(state: FlowState, status: str) -> FlowState:
    return replace(state, status=status, wait="null", blocked_task=None, blocked_summary=None)


def expect_run_task(state: FlowState | None, args: dict[str, Any]) -> Answer:
    """What `run_task` must answer: a new child, the one of that run id, or why there is none."""
    if state is None:
        return (REFUSED, "not_found", None)
    if state.mirrored:
        return (REFUSED, "not_managed", state.view())
    if known := state.run(args.get("run_id")):
        return ("duplicate", known.task_id, state.view())
    if state.has_ended:
        return (REFUSED, "terminal", state.view())
    if state.intent is not None:
        return (REFUSED, "cancel_requested", state.view())
    if "defect" in args:
        return (REFUSED, args["defect"], state.view())
    if args.get("run") == "nested" and state.depth >= NESTED_DEPTH:
        return (REFUSED, "limit_reached", state.view())
    if len(state.active) >= ACTIVE_CHILDREN:
        return (REFUSED, "overloaded", state.view())
    return ("created", state.view())


def expect_report(state: FlowState | None, op: str, task_id: str, args: dict[str, Any]) -> Answer:
    """What a report on a child must answer: the child as it is or becomes, or a refusal."""
    task = None if state is None else state.tasks.get(task_id)
    if state is None or task is None:
        return ("nothing",)
    if not task.is_active:
        return ("seen", task.view())
    if task.wait is not None or (task.letter is not None and task.status == "queued"):
        return (REFUSED, "not_linked")
    if op == "progress_task" and task.letter is not None:
        return (REFUSED, "not_linked")
    if op == "progress_task":
        return ("changed", replace(task, progress=args.get("summary") or task.progress).view())
    if task.launched:
        return (REFUSED, "not_linked")
    if op == "start_task":
        if task.status == "running":
            return ("seen", task.view())
        if state.intent is not None:
            return (REFUSED, "cancel_requested")
        return ("changed", replace(task, status="running").view())
    if "defect" in args:
        return (REFUSED, args["defect"])
    if op == "complete_task":
        after = replace(task, status="succeeded", summary=args.get("terminal_summary"))
        return ("ended", after.view()[:-1])
    status = args.get("status", "failed")
    after = replace(task, status=status, summary=None, failure=(status, None, None))
    return ("ended", after.view()[:-1])


def expect_retry(state: FlowState | None, task_id: str, args: dict[str, Any]) -> str | None:
    """Why `retry_task` must be refused by a child that was active when it was looked for; None if it applies."""
    task = None if state is None else state.tasks.get(task_id)
    if state is None or task is None or not task.is_active:
        return "not_found"
    if state.has_ended:
        return "terminal"
    if state.intent is not None:
        return "cancel_requested"
    if not task.launched or task.status == "running" or (task.review, task.due) == (None, None):
        return "not_retryable"
    found: str | None = args.get("defect")
    return found


def expect_retry_flow(state: FlowState | None) -> str | None:
    """Why `retry_flow` must be refused; None if it applies."""
    if state is None:
        return "not_found"
    if state.mirrored:
        return "not_managed"
    stopping = any(task.launched for task in state.active)
    ended = state.has_ended and state.status != "succeeded"
    return None if ended and not stopping else "not_retryable"


def summary_of(state: FlowState) -> Answer:
    """The counts of a flow's children."""
    statuses = Counter(task.status for task in state.tasks.values())
    active = sum(statuses[one] for one in ACTIVE)
    failures = statuses["failed"] + statuses["timed_out"] + statuses["lost"]
    shown = tuple(sorted((name, count) for name, count in statuses.items() if count))
    return (statuses.total(), active, failures, shown)
