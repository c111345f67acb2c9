"""The children of one live flow: who is active, who may start, and which run ids are taken.

A book kept beside the flow for as long as it is in memory. It holds active children whole and ended ones
only by run id, so a flow that has run a million children is no heavier than one that has run ten. Every
change goes through `put`, which keeps the counts; so starting the next child costs the same whether ten or
ten thousand wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from flowstead.model.task import StoredTask, TaskStatus, is_active


class Group:
    """Children that share one limit: those waiting to start, in order, and how many run."""

    __slots__ = ("limit", "queue", "running")

    def __init__(self) -> None:
        self.limit: int | None = None
        self.queue: deque[str] = deque()
        self.running = 0


class Children(msgspec.Struct, gc=False):
    """The book. `active` maps task id to the child; read it freely, change it only by `put`."""

    active: dict[str, StoredTask] = {}
    run_ids: dict[str, str] = {}
    _groups: dict[str, Group] = {}
    _in_line: dict[str, None] = {}

    @classmethod
    def of(cls, active: Iterable[StoredTask], run_ids: Iterable[tuple[str, str]]) -> Children:
        """The book of a flow that has just been loaded."""
        book = cls(run_ids=dict(run_ids))
        for task in active:
            book.put(task)
        return book

    def put(self, task: StoredTask) -> None:
        """Take over a child as it is now."""
        before = self.active.get(task.task_id)
        if is_active(task):
            self.active[task.task_id] = task
        else:
            self.active.pop(task.task_id, None)
        if task.run_id is not None:
            self.run_ids[task.run_id] = task.task_id
        if task.launch is not None:
            group = self._group_of(task)
            group.running += _runs(task) - (before is not None and _runs(before))

    def line_up(self, task_id: str) -> None:
        """Put a queued child at the end of its group's line, unless it stands there already."""
        task = self.active.get(task_id)
        if task is not None and task_id not in self._in_line:
            self._in_line[task_id] = None
            self._group_of(task).queue.append(task_id)

    @property
    def has_line(self) -> bool:
        """Whether any child waits for its turn."""
        return bool(self._in_line)

    def next_startable(self, default_limit: int) -> Iterator[StoredTask]:
        """Take the children that may start now out of the line, group by group, oldest first.

        Each must be `put` back as running before the next is asked for.
        """
        for group in self._groups.values():
            limit = default_limit if group.limit is None else group.limit
            while group.queue and group.running < limit:
                task_id = group.queue.popleft()
                del self._in_line[task_id]
                task = self.active.get(task_id)
                if task is not None and task.status is TaskStatus.QUEUED:
                    yield task

    def launched(self) -> list[StoredTask]:
        """The active children this runtime runs, oldest first."""
        return [task for task in self.active.values() if task.launch is not None]

    def _group_of(self, task: StoredTask) -> Group:
        assert task.launch is not None
        group = self._groups.get(name := task.launch.group or "")
        if group is None:
            group = self._groups[name] = Group()
        group.limit = task.launch.limit
        return group


def _runs(task: StoredTask) -> bool:
    return task.status is TaskStatus.RUNNING
