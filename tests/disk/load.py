"""A small load that is the same each time: what is asked, in what order, and every name, follows from one number.

Calls are made in rounds of several at once, so that commits carry several writes. Each acknowledged answer is
told when the call has returned, as an `Ack`. With `InlineConnection` in the place of worker threads the bytes that
reach the disk are the same each time, too.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from flowstead import Applied, CancelPending, Created, SessionFlows, open_runtime
from flowstead.model.flow import Flow, has_ended
from flowstead.store.codec import FlowWrite
from flowstead.store.sqlite import SqliteStore
from flowstead.testing import ManualClock
from tests import invariants
from tests.disk.vfs import Disk, Operation, Record

OWNER = "agent:main:main"
SESSIONS = 3
_DISK_TURNS = 6

Rows: TypeAlias = dict[tuple[str, int], str]
Levels: TypeAlias = dict[tuple[str, str], int]


class Ack(NamedTuple):
    """Something a caller was told: a flow's revision, or a child and whether it has ended."""

    what: str
    name: str
    number: int


class CountedIds:
    """Names in a fixed order, scattered like random ones, so that they fall into different pages."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._count = count(1)

    def flow_id(self, controller_id: str, now: int) -> str:
        return self.task_id()

    def task_id(self) -> str:
        return f"{self._rng.getrandbits(64):016x}-{next(self._count)}"

    def chance(self) -> float:
        return 0.5

    def token(self) -> str:
        return self.task_id()


class InlineConnection:
    """A store's connection without a thread: a commit takes a fixed number of the event loop's turns."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, connector: Callable[[], sqlite3.Connection]) -> InlineConnection:
        return cls(connector())

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        for _ in range(_DISK_TURNS):
            await asyncio.sleep(0)
        return function(self._connection, *args)

    async def close(self) -> None:
        self._connection.close()


class NotedStore(SqliteStore):
    """A real store that keeps in memory, too, what each of its commits wrote."""

    commits: list[list[FlowWrite]]

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        position = await super().commit(writes)
        self.commits.append(list(writes))
        return position


class Load:
    """The clients of one file; what they know outlives the runtimes they talk to."""

    def __init__(self, seed: int, tell: Callable[[Ack], object]) -> None:
        self.rng = random.Random(seed)
        self.ids = CountedIds(seed)
        self.tell = tell
        self.flows: dict[str, Flow] = {}
        self.tasks: dict[str, str] = {}
        self.runs = count(1)

    async def rounds(self, flows: SessionFlows, number: int, width: int) -> None:
        """Let so many calls at once go, so many times."""
        for _ in range(number):
            await asyncio.gather(*(self._call(flows) for _ in range(self.rng.randint(1, width))))

    async def _call(self, flows: SessionFlows) -> None:
        calls = (
            (3 if len(self.flows) < 12 else 0, self._create),
            (8, self._update),
            (3, self._run_task),
            (3 if self.tasks else 0, self._complete_task),
            (1, self._request_cancel),
            (1, self._cancel),
            (1, self._finish),
        )
        [(_, call)] = self.rng.choices(calls, [weight for weight, _ in calls])
        await (call if self.flows else self._create)(flows)

    def _pick(self) -> Flow:
        return self.rng.choice(list(self.flows.values()))

    def _state(self) -> dict[str, Any]:
        return {"n": self.rng.getrandbits(32), "text": "state " * self.rng.choice((1, 40, 900))}

    async def _create(self, flows: SessionFlows) -> None:
        self._learn(
            await flows.create_managed(
                controller_id="disk/load",
                goal="be on the disk",
                idempotency_key=f"key-{next(self.runs)}" if self.rng.random() < 0.3 else None,
                state_json=self._state(),
            )
        )

    async def _update(self, flows: SessionFlows) -> None:
        await self._mutate(flows.update, state_json=self._state())

    async def _finish(self, flows: SessionFlows) -> None:
        await self._mutate(flows.finish)

    async def _request_cancel(self, flows: SessionFlows) -> None:
        await self._mutate(flows.request_cancel)

    async def _mutate(self, method: Callable[..., Awaitable[Any]], **arguments: Any) -> None:
        flow = self._pick()
        answer = await method(flow_id=flow.flow_id, expected_revision=flow.revision, **arguments)
        if isinstance(answer, Applied):
            self._learn(answer.flow)

    async def _cancel(self, flows: SessionFlows) -> None:
        report = await flows.cancel(self._pick().flow_id)
        if report.cancelled and report.flow is not None:
            self._learn(report.flow)

    async def _run_task(self, flows: SessionFlows) -> None:
        answer = await flows.run_task(
            flow_id=self._pick().flow_id,
            task="look into it",
            runtime="acp",
            run_id=f"run-{next(self.runs)}",
        )
        if isinstance(answer, Created):
            self.tasks[answer.task.task_id] = answer.task.task_id
            self.tell(Ack("task", answer.task.task_id, 0))

    async def _complete_task(self, flows: SessionFlows) -> None:
        task_id = self.tasks.pop(self.rng.choice(list(self.tasks)))
        try:
            task = await flows.complete_task(task_id, result_json=self._state())
        except CancelPending:
            return
        if task is not None and task.ended_at is not None:
            self.tell(Ack("task", task_id, 1))

    def _learn(self, flow: Flow) -> None:
        """Take note of an answer, and tell it."""
        self.tell(Ack("flow", flow.flow_id, flow.revision))
        known = self.flows.get(flow.flow_id)
        if has_ended(flow):
            self.flows.pop(flow.flow_id, None)
        elif flow.revision == 0 or (known is not None and flow.revision > known.revision):
            self.flows[flow.flow_id] = flow


SMALL: dict[str, Any] = {
    "WorkerConnection": InlineConnection,
    "_WAL_IDLE": 100_000,
    "_WAL_BUSY": 200_000,
    "_WAL_KEPT": 50_000,
}
"""What `flowstead.store.sqlite` is given instead of its own: no threads, and a log that is soon full."""

Prepare: TypeAlias = Callable[[Disk, NotedStore], object]


@dataclass
class Run:
    """A file's life under load: what reached the disk in which order, and what it was to mean."""

    journal: list[Record] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    commits: list[list[FlowWrite]] = field(default_factory=list)

    def acks(self, cut: int | None = None) -> list[Ack]:
        """What callers had been told before a place in the journal."""
        return [record.note for record in self.journal[:cut] if record.kind == "mark"]

    @property
    def restarts(self) -> int:
        """How often a log was begun again from its start, which is what a checkpoint under load leads to."""
        begun = Counter(
            r.inode for r in self.journal if (r.file, r.kind, r.offset) == ("wal", "write", 0)
        )
        return sum(begun.values()) - len(begun)

    def states(self) -> list[Rows]:
        """What the file says after each number of commits."""
        states: list[Rows] = [{}]
        position = 0
        for writes in self.commits:
            rows = dict(states[-1])
            for write in writes:
                if write.flow is not None:
                    rows["flow", write.flow.key] = write.flow.doc
                rows.update({("task", task.key): task.doc for task in write.tasks})
                for event in write.events:
                    position += 1
                    rows["event", position] = event.doc
            states.append(rows)
        return states


def untouched(disk: Disk, store: NotedStore) -> None:
    """Leave the store as it is meant to be."""


async def live(
    path: Path,
    seed: int,
    durability: Any = "full",
    *,
    rounds: int = 14,
    width: int = 8,
    prepare: Prepare = untouched,
    tell: Callable[[Ack], object] = lambda ack: None,
) -> Run:
    """Put a store on a noting disk under load, and close and reopen it in the midst.

    Args:
        path: The file.
        seed: What the clients do.
        durability: The store's.
        rounds, width: How often how many calls are made at once, at most.
        prepare: Called with the disk and each store before it is opened.
        tell: Called with everything that was acknowledged.
    """
    run = Run()

    def acknowledge(ack: Ack) -> None:
        disk.mark(ack)
        tell(ack)

    with Disk() as disk:
        disk.recording = True
        load = Load(seed, acknowledge)
        clock = ManualClock()
        for _ in range(SESSIONS):
            store = NotedStore(path, durability=durability, connect=disk.connect)
            store.commits = run.commits
            prepare(disk, store)
            async with open_runtime(store, ids=load.ids, clock=clock) as runtime:
                flows = runtime.tasks.flow.bind_session(session_key=OWNER)
                await load.rounds(flows, rounds, width)
                clock.advance(10)
        run.journal, run.operations = disk.journal, disk.operations
    return run


def content(path: Path) -> tuple[Rows, Levels, int]:
    """The records in a file, how far each flow and child has come, and the number of commits."""
    rows: Rows = {}
    levels: Levels = {}
    with closing(invariants.connect(path)) as connection:
        damage = [row[0] for row in connection.execute("PRAGMA integrity_check")]
        assert damage == ["ok"], f"the file is damaged: {damage}"
        for key, flow_id, revision, doc in connection.execute(
            "SELECT key, flow_id, revision, doc FROM flows"
        ):
            rows["flow", key], levels["flow", flow_id] = doc, revision
        for key, task_id, ended, doc in connection.execute(
            "SELECT key, task_id, status NOT IN ('queued', 'running'), doc FROM tasks"
        ):
            rows["task", key], levels["task", task_id] = doc, ended
        for position, doc in connection.execute("SELECT position, doc FROM events"):
            rows["event", position] = doc
        [(commits,)] = connection.execute("SELECT commits FROM ownership").fetchall()
    return rows, levels, commits


def shortfall(levels: Levels, acks: Iterable[Ack]) -> list[Ack]:
    """What was acknowledged and is not there."""
    return [ack for ack in acks if levels.get(ack[:2], -1) < ack.number]
