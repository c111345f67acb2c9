"""A world: one runtime after another on one simulated disk, callers who record what they saw, and code to run.

Whatever becomes durable is folded into the model at that very instant; whatever is answered is judged once the
world stands still. What a world does follows from its seed and from what it is told to do, so it can be told
again.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from flowstead import FlowError, Limits, Runtime
from flowstead.errors import StoreError
from flowstead.store.codec import FlowWrite
from flowstead.testing import CALM, Faults, Schedule, Simulation, SqliteFiles
from flowstead.testing.simulation import Crashed
from tests.simulation import judge, promises, waits
from tests.simulation import model as spec
from tests.simulation.linear import Order
from tests.simulation.mail import DELIVERIES, Channel, OftenDigest
from tests.simulation.model import Entry, FlowLog, Model, Wrong
from tests.simulation.operations import ADMIN, OPERATIONS, Call, Spec
from tests.simulation.outside import Outside
from tests.simulation.running import Code

LIMITS = Limits(
    state_bytes=spec.STATE_BYTES,
    state_warn_bytes=spec.STATE_BYTES,
    mailbox=spec.MAILBOX,
    running_children=spec.RUNNING_CHILDREN,
    active_children=spec.ACTIVE_CHILDREN,
    interruptions=spec.INTERRUPTIONS,
    nested_depth=spec.NESTED_DEPTH,
    nested_flows=spec.NESTED_FLOWS,
    cancel_grace=spec.CANCEL_GRACE,
    kill_after=spec.KILL_AFTER,
    abandon_after=spec.ABANDON_AFTER,
    shutdown_grace=2.0,
    idle_seconds=3.0,
    idle_flows=5,
    watcher_events=8,
    park_seconds=spec.PARK_SECONDS,
    signal_lifetime=spec.SIGNAL_LIFETIME,
    messages=spec.MESSAGES,
    delivery_seconds=spec.DELIVERY_SECONDS,
    deliveries=3,
)
HEALED_SECONDS = 240.0
"""In this much virtual time after the last fault everything must have come to rest."""
STOPPED_SECONDS = 30.0
"""In this much virtual time, in a calm world, code that is to stop has stopped, unless it hangs for ever."""

CLOCK_SECONDS = 60.0
"""In this much virtual time a runtime has noticed that the wall clock was put forward."""

_NEED_THE_RECORD = frozenset(
    {
        "flow.created", "flow.waiting", "flow.blocked", "flow.resumed", "flow.updated",
        "task.created", "task.ended",
    }
)  # fmt: skip

TAKEN = "took it over"
"""What an overtaken runtime says to whoever asks it for a change."""


class World:
    """One world, from its first process to its last. Use it in a `with` statement.

    Args:
        seed: The order of steps, delays and faults.
        shuffle: Ready tasks run in any order.
        durability: What the disk keeps when power fails.
        directory: Where the real SQLite store keeps its files, instead of a simulated disk.
    """

    def __init__(
        self,
        seed: int,
        *,
        shuffle: bool = False,
        durability: str = "full",
        directory: Path | None = None,
    ) -> None:
        self.files = None if directory is None else SqliteFiles(directory)
        self.channel = Channel(self, seed)
        self.simulation = Simulation(
            Schedule(seed=seed, shuffle=shuffle, durability=durability),
            store=None if self.files is None else self._tapped_store,
            notifier=self.channel,
            deliveries=DELIVERIES,
            digest_time=OftenDigest(),
        )
        self.disk = self.simulation.disk
        self.durability = durability
        self._told = self.disk.on_commit
        self.disk.on_commit = self._on_commit
        self.code = Code(self)
        self.outside = Outside(self)
        self.registry = self.code.registry()
        # Few slots for all: in some worlds they are what everybody waits for.
        self.limits = msgspec.structs.replace(LIMITS, running_in_all=(3, 5, 1000)[seed % 3])
        self.model = Model()
        self.order = Order()
        self.calls: list[Call] = []
        self.answered: list[Call] = []
        self.clients: dict[asyncio.Task[None], Call] = {}
        self.runtime: Any = None
        self.overtaken: list[Runtime] = []
        self.made_by: dict[int, Call] = {}
        """The call behind a position of the history, where the event names it."""
        self.desk = waits.Desk(self)
        self.violations: list[str] = []
        self.seen: Counter[str] = Counter()
        """How often each thing has happened: operations, codes, crashes."""
        self.stopped: list[str] = []
        """Children whose code the last orderly close has stopped."""
        self.process = 0
        self.processes: set[int] = set()
        """The numbers under which code of the present runtime was begun."""
        self.found_at_boot = 0
        """The last position that the present runtime found on the disk."""
        self.touched: set[int] = set()
        self.trouble_at = 0
        self.put_back_at = -1.0
        """The simulated second at which the wall clock was last put back."""
        self.clock_set_at = -1.0
        """The simulated second at which the wall clock was last put wrong, or right."""
        self.calm_since = 0.0
        """The simulated second of the last trouble."""
        self.overdue: dict[str, float] = {}
        """Since which simulated second what is due by the clock has been seen waiting."""
        self.met: dict[int, float] = {}
        """Since which simulated second a signal has been seen kept for somebody who waits."""
        self.orphans: set[str] = set()
        """Children whose code runs on in a runtime that was overtaken."""
        self._ticks = 0
        self._failing = False
        self._furthest_shift = 0
        self._committing = False
        self._commit_tick = 0
        self._reader: tuple[Path, sqlite3.Connection] | None = None

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.processes.clear()
        self._close_reader()
        self.simulation.close()
        if self.files is not None:
            self.files.close()

    def tick(self) -> int:
        """The next instant."""
        self._ticks += 1
        return self._ticks

    @property
    def is_up(self) -> bool:
        return self.runtime is not None

    @property
    def seconds(self) -> float:
        """Simulated seconds since the beginning, over all processes."""
        loop = self.simulation._loop
        return self.simulation._seconds if loop is None else loop.time()

    @property
    def wall(self) -> int:
        """What the wall clock of a process shows now, epoch ms."""
        clock = self.simulation.clock
        return clock._start + clock.shift_ms + round(self.seconds * 1000)

    @property
    def is_calm(self) -> bool:
        """Whether no disk fails, and nobody was overtaken."""
        return not self._failing and not self.overtaken

    # ---- processes --------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start a process, and again if it dies or cannot open its store on the way."""
        self._close_reader()
        for _ in range(100):
            self.process += 1
            self.processes = {self.process}
            self.found_at_boot = len(self.model.entries)
            try:
                self.runtime = self.simulation.boot(registry=self.registry, limits=self.limits)
            except Crashed:
                self._after_death("opening")
            except StoreError:
                self.seen["open failed"] += 1
            else:
                return
        raise Wrong("the store could not be opened in a hundred attempts")

    def play(self, code: Awaitable[Any], *, place: str = "calls") -> bool:
        """Let the process run until this is done; answers whether it lived to see it."""
        try:
            self.simulation.play(code)
        except Crashed:
            self._after_death(place)
            return False
        self.settle()
        return True

    def advance(self, seconds: float) -> bool:
        """Let virtual time pass."""
        return self.play(asyncio.sleep(seconds), place="time passing")

    def kill(self, *, power: bool = False) -> None:
        """The process dies between two steps."""
        self.simulation.kill(power=power)
        self._after_death("standing still", power=power)

    def crash_after(self, steps: int, *, power: bool = False) -> None:
        """The process dies that many steps into whatever it does next."""
        self.simulation.crash(after=steps, power=power)

    def close(self) -> bool:
        """Close in good order; answers whether it came to that."""
        self.note_trouble()
        self.stopped = []
        try:
            self.simulation.play(self._close_all())
            self.simulation.shut()
        except Crashed:
            self._after_death("closing")
            return False
        self.seen["closed"] += 1
        self._bury()
        self.settle()
        return True

    async def _close_all(self) -> None:
        stopped = [] if self._failing or self.overtaken else sorted(self.running)
        for runtime in (self.runtime, *self.overtaken):
            await runtime.aclose()
        # What will not stop in time is left behind, and counts as interrupted.
        gone = [task_id for task_id in stopped if task_id not in self.running]
        self.stopped = [task_id for task_id in gone if task_id not in self.code.deaf]
        if self.clients:
            # They are answered by now, but have not run yet to hear it.
            await asyncio.wait(tuple(self.clients), timeout=5.0)

    def take_over(self) -> bool:
        """A second runtime takes the store from the first, which goes on as if it had not."""
        self.note_trouble()
        # From the moment it owns the store the second one runs code, and what the first one runs is not its own.
        old, running, self.code.running = self.processes, self.running, {}
        self.orphans = set(running)
        self.process += 1
        self.processes = {self.process}
        self.overtaken.append(self.runtime)
        try:
            self.runtime = self.simulation.boot(
                registry=self.registry, limits=self.limits, takeover=True
            )
        except Crashed:
            self._after_death("opening")
            return False
        except StoreError:
            self.seen["open failed"] += 1
            self.overtaken.pop()
            self.processes |= old
            self.code.running |= {one: running[one] for one in self.orphans}
            self.orphans.clear()
            return False
        self.seen["takeover"] += 1
        for call in self.clients.values():
            call.overtaken = True
        self.settle()
        return True

    def jump_clock(self, seconds: int) -> None:
        """The wall clock is put wrong by so much, in either direction."""
        self.seen["clock jump"] += 1
        if seconds * 1000 < self.simulation.clock.shift_ms:
            self.put_back_at = self.seconds
        self.clock_set_at = self.seconds
        self.simulation.clock.shift_ms = seconds * 1000
        self._furthest_shift = max(self._furthest_shift, seconds * 1000)

    def set_faults(self, faults: Faults) -> None:
        """The disk begins to fail in this way, or ceases to."""
        self.note_trouble()
        self.disk.faults = faults
        self._failing = faults != CALM

    def note_trouble(self) -> None:
        """Calls under way may fail for no reason of their own."""
        self.trouble_at, self.calm_since = self.tick(), self.seconds
        for call in self.clients.values():
            call.troubled = True

    def _after_death(self, place: str, *, power: bool | None = None) -> None:
        power = self.simulation._power_fails if power is None else power
        self.seen["power cut" if power else "crash"] += 1
        self.seen[f"died while {place}"] += 1
        self._pull(self.tick())
        self._judge()
        self._bury()
        self._survive(power)

    def _bury(self) -> None:
        """Nobody answers any more."""
        died = self.tick()
        for call in self.clients.values():
            if call.returned is None:
                call.died, call.verdict = died, "unknown"
        self.clients.clear()
        self.runtime = None
        self.processes.clear()
        self.calm_since = self.seconds
        self.overtaken.clear()
        self.orphans.clear()
        self.code.bury()
        self.channel.bury()
        self._committing = False
        self._judge()

    def _survive(self, power: bool) -> None:
        """Compare what is left on the disk with what was known of it."""
        known, left = self.model.entries, self._rows(0)
        for entry, (_, _, doc) in zip(known, left, strict=False):
            if entry.event != msgspec.json.decode(doc):
                raise Wrong(f"the history has changed: {entry} is now {doc!r}")
        if len(left) >= len(known):
            self._pull(self.tick())
            return
        if not power:
            raise Wrong(f"{len(known) - len(left)} events are gone, and nobody cut the power")
        told = self.order.acknowledged(self.tick())
        if self.durability == "full" and told > len(left):
            raise Wrong(f"position {told} was acknowledged, but only {len(left)} are left")
        self.seen["suffix lost"] += 1
        for name in self.order.cut(len(left)):
            self.seen["acknowledged and lost"] += 1
            self.simulation.log.append(f"lost: {name}")
        self.model = Model()
        self.made_by = {at: call for at, call in self.made_by.items() if at <= len(left)}
        self.desk.cut(len(left))
        for entry in known[: len(left)]:
            self.model.absorb(entry)
        self.touched = {log.key for log in self.model.flows.values()}

    # ---- what becomes durable ---------------------------------------------------------------------

    def _on_commit(self, stage: str, writes: Sequence[FlowWrite]) -> None:
        self._told(stage, writes)
        if stage == "written":
            if self._committing:
                self.violations.append("two commits at the same time")
            self._committing = True
            self.desk.note(writes)
        if stage == ("synced" if self.durability == "full" else "written"):
            self._pull(self.tick())
        if stage == "visible":
            self._committing = False

    def _tapped_store(self) -> Any:
        assert self.files is not None
        store = self.files()
        commit = store.commit

        async def tapped(writes: Sequence[FlowWrite]) -> int:
            self._commit_tick = self.tick()
            if self._committing:
                self.violations.append("two commits at the same time")
            self._committing = True
            try:
                position = await commit(writes)
                self.desk.note(writes)
                return position
            finally:
                self._committing = False
                self._pull(self._commit_tick)

        store.commit = tapped  # type: ignore[method-assign]
        return store

    def _pull(self, tick: int) -> None:
        """Fold what is new on the disk into the model."""
        rows = self._rows(len(self.model.entries))
        for position, key, doc in rows:
            event = msgspec.json.decode(doc)
            row = self._row_of(key, event)
            entry = Entry(position, key, self._owner_of(key), event, tick, self.seconds, row)
            try:
                self.model.absorb(entry)
                judge.attribute(self, entry)
                promises.check(self, entry)
                self.desk.check(entry)
            except Wrong as wrong:
                self.violations.append(str(wrong))
                raise
            self.touched.add(key)
        if rows:
            self.order.commit(len(rows), tick)

    def _rows(self, after: int) -> list[tuple[int, int, str]]:
        if self.files is None:
            events = self.disk.written.events
            return [
                (at, events[at].flow_key, events[at].doc)
                for at in range(after + 1, len(events) + 1)
            ]
        found = self._read(
            "SELECT position, flow_key, doc FROM events WHERE position > ? ORDER BY position", after
        )
        return [(position, key, doc) for position, key, doc in found]

    def _row_of(self, key: int, event: dict[str, Any]) -> dict[str, Any] | None:
        """The record of what an event is about, where the event does not say it all."""
        task_id = event.get("taskId")
        if event["type"] not in _NEED_THE_RECORD:
            return None
        if self.files is None:
            tables = self.disk.written
            doc = (
                tables.flows[key].doc
                if task_id is None
                else tables.tasks[tables.task_keys[task_id]].doc
            )
        elif task_id is None:
            [(doc,)] = self._read("SELECT doc FROM flows WHERE key = ?", key)
        else:
            [(doc,)] = self._read("SELECT doc FROM tasks WHERE task_id = ?", task_id)
        found: dict[str, Any] = msgspec.json.decode(doc)
        return found

    def _owner_of(self, key: int) -> str:
        if self.files is None:
            return self.disk.written.flows[key].owner_key
        [(owner,)] = self._read("SELECT owner_key FROM flows WHERE key = ?", key)
        found: str = owner
        return found

    def _read(self, query: str, *given: Any) -> list[Any]:
        assert self.files is not None
        path = self.files.path
        if not path.exists():
            return []
        if self._reader is None or self._reader[0] != path:
            self._close_reader()
            self._reader = (path, sqlite3.connect(path, isolation_level=None))
        with closing(self._reader[1].execute(query, given)) as cursor:
            return cursor.fetchall()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader[1].close()
            self._reader = None

    # ---- calls ------------------------------------------------------------------------------------

    def begin(self, asked: Spec, *, zombie: bool = False) -> asyncio.Task[None]:
        """Start a call; it is resolved against what is known now."""
        loop = self.simulation._loop
        assert loop is not None
        call = Call(len(self.calls), *judge.resolve(self, asked, len(self.calls)), invoked=0)
        call.runtime = self.overtaken[-1] if zombie else self.runtime
        call.overtaken = call.of_zombie = zombie
        self.calls.append(call)
        task = loop.create_task(self._make(call), name=call.token)
        self.clients[task] = call
        task.add_done_callback(lambda done: self.clients.pop(done, None))
        return task

    def call(self, *asked: Spec, patience: float = 8.0, zombie: bool = False) -> bool:
        """Make calls at the same time and wait a while for their answers."""
        tasks = [self.begin(one, zombie=zombie) for one in asked]

        async def wait() -> None:
            await asyncio.wait(tasks, timeout=patience)

        return self.play(wait())

    def ask_the_overtaken(self, *asked: Spec) -> None:
        """Make calls to a runtime that was overtaken; once it knows, the code it runs has to stop."""
        self.seen["zombie asked"] += 1
        first, at_work = len(self.calls), bool(self.orphans)
        if not self.call(*asked, zombie=True) or not any(map(was_told, self.calls[first:])):
            return
        self.seen["zombie stopped"] += at_work
        if self.advance(STOPPED_SECONDS) and (left := self.orphans - self.code.deaf):
            raise Wrong(f"overtaken, and goes on: {sorted(left)}")

    async def perform(self, asked: Spec) -> None:
        """Make a call from inside the simulated process."""
        await self.begin(asked)

    async def _make(self, call: Call) -> None:
        call.invoked, call.began, began = self.tick(), self.seconds, self.wall
        call.troubled = self._failing or bool(self.overtaken)
        operation = OPERATIONS[call.op]
        try:
            if call.actor == ADMIN:
                flows: Any = call.runtime.admin
            else:
                flows = call.runtime.tasks.flow.bind_session(session_key=call.actor)
            call.result = await operation.run(self, call, flows)
        except (FlowError, ValueError, TypeError) as error:
            call.error = error
        except Exception as error:
            self.violations.append(f"{call.name} raised {error!r}")
            raise
        call.troubled |= self._failing or bool(self.overtaken)
        if call.op == "cancel":
            call.code_left = self._code_below(call)
        call.walls = (min(began, self.wall), max(began, self.wall))
        call.returned = self.tick()
        self.answered.append(call)

    def _code_below(self, call: Call) -> list[str]:
        """Children of the flow that a call names, and of those nested in it, whose code runs now."""
        named = [log for log in self.flows_of(call.actor) if log.now.flow_id == call.flow_id]
        below = [one.now.tasks for log in named for one, _ in self.model.below(log)]
        return [name for name in self.running if any(name in tasks for tasks in below)]

    def settle(self) -> None:
        """Judge what has been answered so far."""
        if self.files is not None:
            self._pull(max(self._commit_tick, 1))
        self._judge()

    def _judge(self) -> None:
        # What was wrong at its commit comes first: what callers were told in consequence says less.
        self._raise_violations()
        answered, self.answered = self.answered, []
        for call in answered:
            judge.judge(self, call)
            self.seen[f"op {call.op}"] += 1
            self.seen[f"verdict {call.verdict}"] += 1
        self._raise_violations()

    def _raise_violations(self) -> None:
        if self.violations:
            raise Wrong("\n".join(self.violations))

    def flows_of(self, owner: str) -> list[FlowLog]:
        """Flows that exist, newest first."""
        return self.model.owned_by("" if owner == ADMIN else owner)

    def events_for(self, call: Call) -> int:
        """How many events there are of what the call watches."""
        if call.args["one"]:
            # For operators the id may mean either of two flows.
            named = [log for log in self.flows_of(call.actor) if log.now.flow_id == call.flow_id]
            return min((len(log.positions) - 1 for log in named), default=0)
        return sum(call.actor in (ADMIN, entry.owner) for entry in self.model.entries)

    def durable(self, call: Call, seq: int) -> list[Entry]:
        """The durable events of this number in the flows that the caller may see."""
        found = [log for log in self.flows_of(call.actor) if seq < len(log.positions)]
        return [self.model.entries[log.positions[seq] - 1] for log in found]

    # ---- code that runs ---------------------------------------------------------------------------

    def asked_of(self, task_id: str) -> promises.Asked:
        """What a child was to do; nothing in particular if nobody knows it."""
        task = self.model.task(task_id)
        return (None if task is None else promises.asked_of(self, task)) or promises.LINKED

    @property
    def running(self) -> dict[str, int]:
        """The attempt of each child whose code runs in the present process."""
        return self.code.running

    def release(self, number: int) -> None:
        """Let one of the children that hang go on."""
        self.code.release(number)

    # ---- coming to rest ---------------------------------------------------------------------------

    def heal(self) -> None:
        """Stop all faults, let everything come to rest, and see that it has."""
        self.set_faults(CALM)
        self.channel.is_well = True
        self.simulation.heal()
        if self.is_up and self.overtaken:
            self.kill()
        if not self.is_up:
            self.boot()
        # What was stamped by a clock that ran ahead comes due when that clock is reached again.
        self.simulation.clock.shift_ms = self._furthest_shift
        self.clock_set_at = self.seconds
        assert self.advance(CLOCK_SECONDS + STOPPED_SECONDS), "nobody dies in a calm world"
        # Code that hangs goes on hanging until here, so that what has stopped has been stopped.
        self._check_code_is_wanted()
        self.code.open_gates()
        assert self.advance(HEALED_SECONDS), "nobody dies in a calm world"

    def _check_code_is_wanted(self) -> None:
        """No child runs on whose flow has ended, or whose controller has stopped it."""
        for task_id in self.running:
            flow, task = self.model.flows[self.model.home[task_id]].now, self.model.task(task_id)
            assert task is not None
            if flow.has_ended or spec.has_lost(flow, task):
                raise Wrong(f"its code runs on, though nobody wants it: {task} of {flow}")


def was_told(call: Call) -> bool:
    """Whether whoever answered knew by then that another runtime had the store."""
    reason = getattr(call.result, "reason", None) or str(call.error or "")
    return call.returned is not None and TAKEN in reason
