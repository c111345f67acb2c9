"""What became of everything below a flow that was cancelled: one line for each descendant that was alive then."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from flowstead.model.flow import Flow, FlowKey
from flowstead.model.task import Task, TaskStatus, is_active
from flowstead.store.port import Scope, Store


class SettledAs(StrEnum):
    """How far the end of a descendant has come."""

    SETTLED = "settled"
    KILLED = "killed"
    ABANDONED = "abandoned"
    RUNNING = "running"


class Settlement(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One descendant of a cancelled flow. Instants in epoch milliseconds.

    `settled` ended by itself or when asked, `killed` by force, `abandoned` not at all: its record has ended, and
    its code may still run. `running` has not ended yet; `why` says what is known of it. `depth` is 0 for the
    flow's own children.
    """

    flow_id: str
    task_id: str
    run_id: str | None = None
    task: str
    depth: int = 0
    state: SettledAs
    status: TaskStatus
    why: str | None = None
    asked_at: int | None = None
    killed_at: int | None = None
    ended_at: int | None = None


async def settle(
    store: Store, key: FlowKey, hint_of: Callable[[str], str | None]
) -> list[Settlement]:
    """The lines of a flow and of all flows below it, parents before their children.

    `hint_of` knows what keeps a child's code from ending, where anybody does.
    """
    lines: list[Settlement] = []
    unseen = [(key, 0)]
    since: int | None = None
    while unseen:
        here, depth = unseen.pop(0)
        flow = await store.find_flow(Scope(here.owner_key), here.flow_id)
        if flow is None:
            continue
        asked_at = flow.cancel_requested_at
        since = asked_at if since is None else since
        for task in await store.list_tasks(Scope(here.owner_key), here.flow_id):
            if task.child_flow_id is not None:
                # Even if it has ended long ago: what others run for its flow may go on.
                unseen.append((FlowKey(here.owner_key, task.child_flow_id), depth + 1))
            if since is not None and _ended_before(task, since):
                continue
            lines.append(_line(flow, task, depth, hint_of))
    return lines


async def flows_below(store: Store, key: FlowKey) -> list[FlowKey]:
    """The flows nested in a flow, however deep, parents first."""
    found: list[FlowKey] = []
    unseen = [key]
    while unseen:
        here = unseen.pop(0)
        for task in await store.list_tasks(Scope(here.owner_key), here.flow_id):
            if task.child_flow_id is not None:
                below = FlowKey(here.owner_key, task.child_flow_id)
                found.append(below)
                unseen.append(below)
    return found


def _ended_before(task: Task, since: int) -> bool:
    """Whether the child was gone when the cancel began; in the same instant, only what was asked then was not."""
    if task.ended_at is None or task.ended_at > since:
        return False
    unasked = task.cancel_requested_at is None and task.status is not TaskStatus.CANCELLED
    return task.ended_at < since or unasked


def _line(flow: Flow, task: Task, depth: int, hint_of: Callable[[str], str | None]) -> Settlement:
    return Settlement(
        flow_id=flow.flow_id,
        task_id=task.task_id,
        run_id=task.run_id,
        task=task.task,
        depth=depth,
        state=_state_of(task),
        status=task.status,
        why=_why(task, hint_of),
        asked_at=task.cancel_requested_at or flow.cancel_requested_at,
        killed_at=task.kill_requested_at,
        ended_at=task.ended_at,
    )


def _state_of(task: Task) -> SettledAs:
    if is_active(task):
        return SettledAs.RUNNING
    if task.failure is not None and task.failure.kind == "abandoned":
        return SettledAs.ABANDONED
    return SettledAs.SETTLED if task.kill_requested_at is None else SettledAs.KILLED


def _why(task: Task, hint_of: Callable[[str], str | None]) -> str | None:
    if not is_active(task):
        return None if task.failure is None else task.failure.message
    hint = hint_of(task.task_id)
    if hint is not None:
        return hint
    if task.child_flow_id is not None:
        return "its flow has not ended yet"
    if task.cancel_requested_at is None:
        return "it has not been asked to stop, and goes on"
    return "it was asked to stop, and its code has not ended yet"
