"""What a wait that nobody has answered in time, and that stays open, does to its flow: it blocks it.

Only as long as the flow stands in that wait. A controller that is elsewhere finds itself blocked when it comes to
stand there; a flow that a child in review blocks first is blocked by the wait when that is answered.
"""

from __future__ import annotations

from typing import NamedTuple

from flowstead.model.flow import StoredFlow
from flowstead.model.task import StoredTask
from flowstead.rules.children import Children


class Blocker(NamedTuple):
    """The child that blocks a flow, None for its own wait, and why, for people."""

    task_id: str | None
    summary: str


def blocker_of(flow: StoredFlow, children: Children) -> Blocker | None:
    """What blocks a flow that would only be waiting otherwise."""
    if flow.wait is not None:
        return Blocker(None, "no answer in time") if flow.wait.is_overdue else None
    stood_in = [children.active.get(task_id) for group in flow.awaiting for task_id in group]
    return first_overdue([task for task in stood_in if task is not None])


def first_overdue(tasks: list[StoredTask]) -> Blocker | None:
    """The first of these waits that is overdue."""
    for task in tasks:
        if task.wait is not None and task.wait.is_overdue:
            return Blocker(task.task_id, f"no answer to {task.run_id!r} in time")
    return None
