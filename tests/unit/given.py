"""What unit tests start from: a flow, a child, and the ground a decision stands on."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import msgspec
from msgspec import Raw

from flowstead.model import command as c
from flowstead.model.flow import Failure, FlowStatus, NotifyPolicy, StoredFlow, SyncMode
from flowstead.model.limits import Limits
from flowstead.model.retry import Category, Retry
from flowstead.model.task import DeliveryStatus, Launch, StoredTask, TaskStatus
from flowstead.rules.children import Children
from flowstead.rules.turn import Turn
from flowstead.rules.view import Boundless, Room, View

NOW = 1_700_000_000_000
CREATED_AT = NOW - 60_000
LIVE = (FlowStatus.QUEUED, FlowStatus.RUNNING, FlowStatus.WAITING, FlowStatus.BLOCKED)
ENDED = (FlowStatus.SUCCEEDED, FlowStatus.FAILED, FlowStatus.CANCELLED, FlowStatus.LOST)
NOTHING_TO_PATCH = c.Patch()


def a_flow(
    status: FlowStatus = FlowStatus.RUNNING, *, intent: bool = False, **fields: Any
) -> StoredFlow:
    given: dict[str, Any] = {
        "key": 1,
        "flow_id": "triage-1",
        "sync_mode": SyncMode.MANAGED,
        "owner_key": "agent:main:main",
        "controller_id": "triage",
        "revision": 7,
        "status": status,
        "notify_policy": NotifyPolicy.DONE_ONLY,
        "goal": "triage inbox",
        "current_step": "classify",
        "state_json": Raw(b'{"threads":[]}'),
        "state_version": 1,
        "cancel_requested_at": NOW - 1_000 if intent else None,
        "created_at": CREATED_AT,
        "updated_at": NOW - 500,
        "ended_at": NOW - 500 if status in ENDED else None,
    }
    if status in {FlowStatus.WAITING, FlowStatus.BLOCKED}:
        given["wait_json"] = Raw(b'{"kind":"reply"}')
    if status is FlowStatus.BLOCKED:
        given |= {"blocked_task_id": "t-0", "blocked_summary": "needs a person"}
    return StoredFlow(**given | fields)


def a_linked(
    task_id: str = "linked", status: TaskStatus = TaskStatus.RUNNING, **fields: Any
) -> StoredTask:
    given: dict[str, Any] = {
        "key": 1,
        "flow_key": 1,
        "task_id": task_id,
        "flow_id": "triage-1",
        "runtime": "subagent",
        "task": "classify",
        "status": status,
        "delivery_status": DeliveryStatus.PENDING,
        "notify_policy": NotifyPolicy.DONE_ONLY,
        "created_at": CREATED_AT,
        "started_at": CREATED_AT if status is TaskStatus.RUNNING else None,
    }
    return StoredTask(**given | fields)


def a_launched(
    task_id: str = "launched",
    status: TaskStatus = TaskStatus.RUNNING,
    *,
    launch: Launch | None = None,
    **fields: Any,
) -> StoredTask:
    launch = Launch(function="work") if launch is None else launch
    given: dict[str, Any] = {
        "attempt": 1 if status is TaskStatus.RUNNING else 0,
        "max_attempts": launch.retry.max_attempts if launch.retry else 1,
        "launch": launch,
    }
    return a_linked(task_id, status, **given | fields)


def a_draft(task_id: str = "new", **fields: Any) -> c.TaskDraft:
    given: dict[str, Any] = {"key": 9, "task_id": task_id, "runtime": "subagent", "task": "work"}
    return c.TaskDraft(**given | fields)


def a_view(
    flow: StoredFlow | None,
    *tasks: StoredTask,
    now: int = NOW,
    limits: Limits | None = None,
    running: Container[str] = (),
    driven: bool = False,
    controllers: Container[str] = (),
    closing: bool = False,
    functions: Container[str] = frozenset({"work"}),
    bound: Container[str] = (),
    executors: Container[str] = frozenset({"command", "flow"}),
    room: Room | None = None,
    lined_up: Iterable[str] = (),
) -> View:
    children = Children()
    for task in tasks:
        children.put(task)
    for task_id in lined_up:
        children.line_up(task_id)
    return View(
        flow,
        children,
        now=now,
        limits=Limits() if limits is None else limits,
        running={task.task_id: task.attempt for task in tasks if task.task_id in running},
        driven=driven,
        controllers=controllers,
        closing=closing,
        functions=functions,
        bound=bound,
        executors=executors,
        room=Boundless() if room is None else room,
    )


def a_turn(view: View, last_seq: int = 0) -> Turn:
    return Turn(view, last_seq)


def retrying(max_attempts: int = 3, **fields: Any) -> Launch:
    return Launch(function="work", retry=Retry(max_attempts=max_attempts, jitter=0.0), **fields)


def a_command(**fields: Any) -> Launch:
    """How a child that is a program is run: something of it may outlive our process."""
    spec = Raw(b'{"argv":["ls"]}')
    return Launch(**{"executor": "command", "spec": spec, "external": True} | fields)


def a_nested(**fields: Any) -> Launch:
    """How a child that stands for a flow is run."""
    spec = Raw(b'{"controllerId":"inner"}')
    given = {"executor": "flow", "spec": spec, "external": True, "holds_slot": False}
    return Launch(**given | fields)


def in_review(task_id: str = "reviewed", **fields: Any) -> StoredTask:
    """A child that waits for a person's eyes."""
    given: dict[str, Any] = {
        "attempt": 1,
        "started_at": CREATED_AT,
        "run_id": "step",
        "failure": Failure(
            kind="exception", message="NeedsReview: odd", category=Category.VALIDATION
        ),
        "review_requested_at": NOW - 100,
    }
    return a_launched(task_id, TaskStatus.QUEUED, **given | fields)


def book(view: View) -> dict[str, StoredTask]:
    """The active children as they are now, to compare with later."""
    return dict(view.children.active)


def with_fields(task: StoredTask, **fields: Any) -> StoredTask:
    return msgspec.structs.replace(task, **fields)
