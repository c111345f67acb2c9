"""What a decision may look at: the flow, its children, and the facts only the engine knows."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, Final, Protocol, TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.code import Code, Refusal
from flowstead.model.command import Defect
from flowstead.model.effect import Effect, StartController
from flowstead.model.event import EventType
from flowstead.model.flow import Json, StoredFlow
from flowstead.model.limits import Limits
from flowstead.model.task import CODE, StoredTask, Task, TaskStatus
from flowstead.model.update import UpdateKind
from flowstead.rules.children import Children


class Room(Protocol):
    """The slots for running children that all flows of a runtime share."""

    def take(self, task: StoredTask) -> bool:
        """Keep a slot for the child, or answer that there is none and have its flow told when there is."""
        ...


class Boundless:
    """Room for everybody."""

    def take(self, task: StoredTask) -> bool:
        """There is always room."""
        return True


class Shapes(Protocol):
    """What checks an answer against the shape that was asked for."""

    def check(self, schema: Raw, payload: Raw | UnsetType) -> str | None:
        """What is wrong with the answer, and where; None if it fits."""
        ...


class AnyShape:
    """Takes every answer."""

    def check(self, schema: Raw, payload: Raw | UnsetType) -> str | None:
        """Nothing is ever wrong."""
        return None


def _no_key() -> int:
    raise LookupError("this view can make no rows of its own")


class View(msgspec.Struct, gc=False):
    """The ground a decision stands on.

    `running` holds the attempt of each child whose code runs in this process, `driven` says whether the flow's
    controller does, and `controllers` which controllers could. `functions` are the registered ones, `bound`
    names the flow's children (by run id, or task id without one) whose unregistered function is in this
    process, `executors` what runs children that need no function. `closing` says that nothing may be started
    any more. A child that is `running` by its record, but whose attempt is not in `running`, was cut off by a
    crash. `started` names those that this very turn starts, `starting` the external ones among them: nobody can
    know what of those is left outside, so they end by their code, never by their record alone. `tells` says whether
    there is anybody to tell of changes, and `new_key` answers a key for a row of the store.
    """

    flow: StoredFlow | None
    children: Children
    now: int
    limits: Limits
    running: Mapping[str, int] = {}
    driven: bool = False
    controllers: Container[str] = ()
    functions: Container[str] = ()
    bound: Container[str] = ()
    executors: Container[str] = ()
    room: Room = Boundless()
    starting: dict[str, int] = {}
    started: dict[str, int] = {}
    closing: bool = False
    shapes: Shapes = AnyShape()
    tells: bool = False
    new_key: Callable[[], int] = _no_key

    def has_function(self, task: StoredTask) -> bool:
        """Whether the launched child's function can be found in this process."""
        launch = task.launch
        assert launch is not None
        if launch.executor not in self.executors and launch.executor != CODE:
            return False
        if launch.function is not None:
            return launch.function in self.functions
        return launch.spec is not UNSET or (task.run_id or task.task_id) in self.bound

    def has_code(self, task: StoredTask) -> bool:
        """Whether code of the child's present attempt runs here. One that waits for a retry has none."""
        if task.status is not TaskStatus.RUNNING:
            return False
        return task.attempt in (self.running.get(task.task_id), self.starting.get(task.task_id))


class Fact(msgspec.Struct, frozen=True, gc=False):
    """An event before it has a number: what happened, and the fields it changed by wire name."""

    type: EventType
    changed: dict[str, Json]
    task_id: str | None = None
    cause: str | None = None


class News(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Something the owner is to be told: an update before it is addressed."""

    kind: UpdateKind
    slot: str
    text: str
    data: Raw | UnsetType = UNSET
    bucket: str | None = None
    due_at: int | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a command does: the new records, the facts to tell, the effects to carry out once durable.

    `flow` is None where the flow itself stays as it is. `lined_up` names queued children that may start as
    soon as there is room, `answered` the children the answer is about, and `unregistered` functions and executors
    that nobody here has, `news` what the owner is to be told beside the changes of the flow itself.
    """

    flow: StoredFlow | None = None
    tasks: tuple[StoredTask, ...] = ()
    facts: tuple[Fact, ...] = ()
    effects: tuple[Effect, ...] = ()
    lined_up: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    unregistered: tuple[str, ...] = ()
    news: tuple[News, ...] = ()


NOTHING: Final = Decision()

Answer: TypeAlias = Decision | Refusal

_FLOW_WIRE: Final = {f.name: f.encode_name for f in msgspec.structs.fields(StoredFlow)}
_TASK_WIRE: Final = {f.name: f.encode_name for f in msgspec.structs.fields(StoredTask)}
_BOOKKEEPING: Final = frozenset(
    {
        "wait",
        "wait_key",
        "wait_token",
        "awaiting",
        "selecting",
        "park_at",
        "content_revision",
        "grants",
        "letter",
    }
)
_NEVER_TOLD: Final = _BOOKKEEPING | {
    "key",
    "flow_id",
    "revision",
    "updated_at",
    "idempotency_key",
    "request_digest",
}

NO_WAIT: Final[dict[str, Any]] = {
    "wait_json": UNSET,
    "wait": None,
    "awaiting": (),
    "selecting": (),
    "park_at": None,
}
"""What a flow that does not wait any more looks like."""


def change_flow(
    flow: StoredFlow, now: int, event: EventType, **fields: object
) -> tuple[StoredFlow, Fact]:
    """The flow one revision on, and the fact that tells what changed."""
    changed = _changed(flow, fields, _FLOW_WIRE)
    after = msgspec.structs.replace(
        flow, revision=flow.revision + 1, updated_at=max(now, flow.updated_at), **fields
    )
    return after, Fact(event, changed)


def start_cancel(flow: StoredFlow, now: int) -> tuple[StoredFlow, Fact]:
    """The flow from whose children and controller an end is demanded, and the fact that tells of it."""
    if flow.cancel_requested_at is not None:
        # Not before it was requested, wherever the wall clock has gone meanwhile.
        started_at = max(now, flow.cancel_requested_at)
        return change_flow(flow, now, EventType.FLOW_CANCEL_STARTED, cancel_started_at=started_at)
    return change_flow(
        flow,
        now,
        EventType.FLOW_CANCEL_REQUESTED,
        cancel_requested_at=now,
        cancel_started_at=now,
    )


def change_task(
    task: StoredTask, now: int, event: EventType, **fields: object
) -> tuple[StoredTask, Fact]:
    """The child with the fields set and its last event stamped, and the fact that tells what changed."""
    changed = _changed(task, fields, _TASK_WIRE)
    # A result lives in the child's row once; the history says that there is one.
    changed.pop("resultJson", None)
    changed.pop("interruptions", None)
    last = max(now, task.last_event_at or task.created_at)
    after = msgspec.structs.replace(task, last_event_at=last, **fields)
    return after, Fact(event, changed, task.task_id)


def all_fields(flow: StoredFlow) -> dict[str, Json]:
    """Everything a flow begins with, by wire name: where its history starts from."""
    fields = {name: getattr(flow, name) for name in _FLOW_WIRE if name not in _NEVER_TOLD}
    return {
        _FLOW_WIRE[name]: value
        for name, value in fields.items()
        if value is not None and value is not UNSET
    }


def told_of(task: StoredTask) -> dict[str, Json]:
    """What there is to tell of an ended child, by wire name; its result lives in its row once."""
    fields = {name: getattr(task, name) for name in Task.__struct_fields__}
    silent = {"task_id", "flow_id", "input_json", "result_json"}
    return {
        _TASK_WIRE[name]: value
        for name, value in fields.items()
        if name not in silent and value is not None and value is not UNSET
    }


def _changed(
    before: StoredFlow | StoredTask, fields: Mapping[str, object], wire: Mapping[str, str]
) -> dict[str, Json]:
    return {
        wire[name]: None if value is UNSET else value
        for name, value in fields.items()
        if name not in _BOOKKEEPING and _differs(getattr(before, name), value)
    }


def _differs(old: object, new: object) -> bool:
    """Whether a field was changed. User JSON that is set again counts as changed: it is not looked into."""
    return new is not old and (isinstance(new, Raw) or new != old)


def enter_controller(view: View, flow: StoredFlow) -> tuple[StartController, ...]:
    """The effect that starts the flow's controller, where one is registered and none runs."""
    controller = flow.controller_id
    if controller is None or controller not in view.controllers or view.driven:
        return ()
    return (StartController(controller),)


def defect_refusal(defect: Defect) -> Refusal:
    """User JSON that cannot be kept, as a refusal."""
    return Refusal(Code(defect.code), defect.reason)
