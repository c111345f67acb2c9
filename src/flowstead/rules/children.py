"""The children of one live flow: who is active, who may start, and which run ids are taken.

A book kept beside the flow for as long as it is in memory. It holds active children whole and ended ones
only by run id, so a flow that has run a million children is no heavier than one that has run ten. Every
change goes through `put`, which keeps the counts; so starting the next child costs the same whether ten or
ten thousand wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import msgspec

from flowstead.model.task import StoredTask, TaskStatus, is_active, is_owned


class Group:
    """Children that share one limit: how many run, and those waiting to start, in a line for each function.

    The lines are apart because a function may have no room left in the whole runtime; children of the others
    must not stand behind it.
    """

    __slots__ = ("limit", "lines", "running")

    def __init__(self) -> None:
        self.limit: int | None = None
        self.lines: dict[str, deque[str]] = {}
        self.running = 0


class Children(msgspec.Struct, gc=False):
    """The book. `active` maps task id to the child, `in_review` names those a person has to look at, oldest
    first, `waits` those that stand still for the flow, and `letters`, inbox by inbox, the messages nobody has taken
    yet, oldest first. Read them freely, change them only by `put`."""

    active: dict[str, StoredTask] = {}
    run_ids: dict[str, str] = {}
    in_review: dict[str, None] = {}
    waits: dict[str, None] = {}
    letters: dict[str, dict[str, None]] = {}
    _groups: dict[str, Group] = {}
    _in_line: dict[str, None] = {}

    @classmethod
    def of(cls, active: Iterable[StoredTask], run_ids: Iterable[tuple[str, str]]) -> Children:
        """The book of a flow that has just been loaded."""
        book = cls(run_ids=dict(run_ids))
        for task in active:
            book.put(task)
        if book.in_review:
            oldest_first = sorted(book.in_review, key=book._asked_at)
            book.in_review = dict.fromkeys(oldest_first)
        return book

    def _asked_at(self, task_id: str) -> tuple[int, int]:
        task = self.active[task_id]
        return task.review_requested_at or 0, task.key

    def put(self, task: StoredTask) -> None:
        """Take over a child as it is now."""
        before = self.active.get(task.task_id)
        if is_active(task):
            self.active[task.task_id] = task
        else:
            self.active.pop(task.task_id, None)
        if task.review_requested_at is not None:
            self.in_review[task.task_id] = None
        elif self.in_review:
            self.in_review.pop(task.task_id, None)
        if task.run_id is not None:
            self.run_ids[task.run_id] = task.task_id
        if task.wait is not None:
            _note(self.waits, task.task_id, is_in=is_active(task))
        elif task.letter is not None:
            inbox = self.letters.setdefault(task.letter.inbox, {})
            _note(inbox, task.task_id, is_in=task.status is TaskStatus.QUEUED)
            if not inbox:
                del self.letters[task.letter.inbox]
        if task.launch is not None:
            group = self._group_of(task)
            group.running += _runs(task) - (before is not None and _runs(before))

    def line_up(self, task_id: str) -> None:
        """Put a queued child at the end of its line, unless it stands there already."""
        task = self.active.get(task_id)
        if task is not None and task_id not in self._in_line:
            assert task.launch is not None
            self._in_line[task_id] = None
            lines = self._group_of(task).lines
            lines.setdefault(task.launch.function or "", deque()).append(task_id)

    @property
    def has_line(self) -> bool:
        """Whether any child waits for its turn."""
        return bool(self._in_line)

    def next_startable(
        self, default_limit: int, has_room: Callable[[StoredTask], bool]
    ) -> Iterator[StoredTask]:
        """Take the children that may start now out of their lines, group by group, oldest first.

        `has_room` is asked for each before it is taken, and keeps the room. Each must be `put` back as running
        before the next is asked for.
        """
        for group in self._groups.values():
            limit = default_limit if group.limit is None else group.limit
            full: set[str] = set()
            while group.running < limit and (task := self._head(group, full)) is not None:
                assert task.launch is not None
                name = task.launch.function or ""
                if has_room(task):
                    self._step_out(group, name)
                    yield task
                else:
                    full.add(name)

    def _head(self, group: Group, full: set[str]) -> StoredTask | None:
        """The oldest child at the head of a line that has room."""
        oldest: StoredTask | None = None
        for name in [name for name in group.lines if name not in full]:
            task = self._first_in(group, name)
            if task is not None and (oldest is None or task.key < oldest.key):
                oldest = task
        return oldest

    def _first_in(self, group: Group, name: str) -> StoredTask | None:
        """The head of a line, once those that have ended meanwhile, or run, have left it."""
        while (line := group.lines.get(name)) is not None:
            task = self.active.get(line[0])
            if task is not None and task.status is TaskStatus.QUEUED:
                return task
            self._step_out(group, name)
        return None

    def _step_out(self, group: Group, name: str) -> None:
        line = group.lines[name]
        del self._in_line[line.popleft()]
        if not line:
            del group.lines[name]

    def launched(self) -> list[StoredTask]:
        """The active children this runtime runs, oldest first."""
        return [task for task in self.active.values() if task.launch is not None]

    def owned(self) -> list[StoredTask]:
        """The active children that are the runtime's own affair, oldest first."""
        return [task for task in self.active.values() if is_owned(task)]

    def open_waits(self) -> list[StoredTask]:
        """The children that wait for an answer, oldest first."""
        return [self.active[task_id] for task_id in self.waits]

    def letters_in(self, inbox: str) -> list[StoredTask]:
        """The messages that nobody has taken yet, oldest first."""
        return [self.active[task_id] for task_id in self.letters.get(inbox, ())]

    @property
    def untaken(self) -> int:
        """How many messages nobody has taken yet."""
        return sum(map(len, self.letters.values()))

    def _group_of(self, task: StoredTask) -> Group:
        assert task.launch is not None
        group = self._groups.get(name := task.launch.group or "")
        if group is None:
            group = self._groups[name] = Group()
        group.limit = task.launch.limit
        return group


def _note(names: dict[str, None], name: str, *, is_in: bool) -> None:
    if is_in:
        names[name] = None
    else:
        names.pop(name, None)


def _runs(task: StoredTask) -> bool:
    return task.status is TaskStatus.RUNNING
