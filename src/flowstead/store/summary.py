"""Counts of children, the same from whatever store they are counted in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from flowstead.model.task import (
    ACTIVE_TASK_STATUSES,
    FAILED_TASK_STATUSES,
    TaskStatus,
    TaskSummary,
)

USUAL_RUNTIMES: Final = ("subagent", "acp", "cli", "cron")


def count_tasks(counted: Iterable[tuple[str, str, int]]) -> TaskSummary:
    """A summary from (status, runtime, count) triples."""
    by_status, by_runtime = Counter[str](), Counter[str]()
    for status, runtime, count in counted:
        by_status[status] += count
        by_runtime[runtime] += count
    return _summary(by_status, by_runtime)


def add_up(summaries: Iterable[TaskSummary]) -> TaskSummary:
    """The counts of several flows as one."""
    by_status, by_runtime = Counter[str](), Counter[str]()
    for summary in summaries:
        by_status.update(summary.by_status)
        by_runtime.update(summary.by_runtime)
    return _summary(by_status, by_runtime)


def _summary(by_status: Counter[str], by_runtime: Counter[str]) -> TaskSummary:
    total = by_status.total()
    active = sum(by_status[status] for status in ACTIVE_TASK_STATUSES)
    return TaskSummary(
        total=total,
        active=active,
        terminal=total - active,
        failures=sum(by_status[status] for status in FAILED_TASK_STATUSES),
        by_status={status.value: by_status[status] for status in TaskStatus},
        by_runtime=dict.fromkeys(USUAL_RUNTIMES, 0) | by_runtime,
    )
