"""A whole runtime in a world of its own: virtual time, a seeded order of steps, a disk that can fail, crashes.

Theory of operation. `run` plays the supervisor of a process: it opens a runtime on the simulated disk and runs
the host's code in it. When the world ends, at a step of the schedule's choosing, nothing is cancelled and
nothing is cleaned up: the loop and everything in it are dropped, as `kill -9` would drop them. The next process
opens the same disk and runs the host's code from its top. Everything that happens follows from the `Schedule`,
so the same schedule plays the same run again, step by step.

What a dropped process left suspended is kept until `close`, because Python would run its `finally` blocks when
it forgets it, and a killed process runs nothing.
"""

from __future__ import annotations

import random as globally
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Any, Final, TypeVar

import msgspec

from flowstead.errors import StoreError
from flowstead.model.flow import Flow, Json
from flowstead.model.limits import Limits
from flowstead.registry import Registry
from flowstead.runtime import Runtime, open_runtime
from flowstead.store.port import Store
from flowstead.testing.disk import CALM, Disk, Faults, SimulatedStore
from flowstead.testing.loop import SimulatedLoop
from flowstead.testing.process import SimulatedClock, SimulatedIds

T = TypeVar("T")

_START: Final = 1_800_000_000_000
_DOWN_SECONDS: Final = 0.5
_MOST_PROCESSES: Final = 1_000


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run depends on.

    Attributes:
        seed: The order of steps, the disk's delays and faults, ids and chance.
        shuffle: Ready tasks run in any order, not in asyncio's.
        crashes: The process dies before these steps, counted over all processes.
        power_cuts: Whether the machine dies with it, and what was not synced is lost.
        faults: What the disk does wrong.
        durability: `full` or `normal`, as for `open_runtime`.
    """

    seed: int = 0
    shuffle: bool = False
    crashes: tuple[int, ...] = ()
    power_cuts: bool = False
    faults: Faults = CALM
    durability: str = "full"

    def __str__(self) -> str:
        shown = [f"seed={self.seed}"]
        shown += [name for name in ("shuffle", "power_cuts") if getattr(self, name)]
        if self.crashes:
            shown.append("crashes=" + ",".join(map(str, self.crashes)))
        for name in Faults.__struct_fields__:
            if value := getattr(self.faults, name):
                shown.append(f"{name}={value:g}")
        if self.durability != "full":
            shown.append(f"durability={self.durability}")
        return " ".join(shown)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """A schedule from what `str` made of one."""
        given: dict[str, Any] = {}
        faults: dict[str, float] = {}
        for word in text.split():
            name, is_value, value = word.partition("=")
            if name in Faults.__struct_fields__:
                faults[name] = float(value)
            elif name == "crashes":
                given[name] = tuple(int(step) for step in value.split(","))
            elif name == "seed":
                given[name] = int(value)
            elif name in cls.__struct_fields__:
                given[name] = value if is_value else True
            else:
                raise ValueError(f"{name!r} is nothing a schedule knows, in {text!r}.")
        return cls(**given, faults=Faults(**faults))


class _Crashed(BaseException):
    """The process ends here. Nothing catches it: it comes out of the loop, not out of a task."""


class Simulation:
    """One world, from its first process to its last. Close it, or use it in a `with` statement.

    Args:
        schedule: What happens in it; a seed alone means its order of steps with no faults and no crashes.
        store: Makes each process's store; one on `disk` unless given.
        clock_start: The first instant, epoch ms.
    """

    def __init__(
        self,
        schedule: Schedule | int = 0,
        *,
        store: Callable[[], Store] | None = None,
        clock_start: int = _START,
    ) -> None:
        if isinstance(schedule, int):
            schedule = Schedule(seed=schedule)
        self.schedule = schedule
        self.random = Random(schedule.seed)
        self.disk = Disk(
            Random(schedule.seed + 1), durability=schedule.durability, faults=schedule.faults
        )
        self.disk.on_commit = self._note_commit
        self.clock = SimulatedClock(clock_start)
        self.ids = SimulatedIds(Random(schedule.seed + 2))
        self.steps = 0
        self.trace = 0
        self.crashed = 0
        """How often the process has died so far."""
        self.log: list[str] = []
        """What happened, a line each: commits, crashes, restarts."""
        self._make_store = store or self._simulated_store
        self._seconds = 0.0
        self._crashes = sorted(set(schedule.crashes), reverse=True)
        self._loop: SimulatedLoop | None = None
        self._left: list[tuple[SimulatedLoop, Runtime | None]] = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- running ----------------------------------------------------------------------------------

    def run(
        self,
        host: Callable[[Runtime], Awaitable[T]],
        *,
        registry: Registry | None = None,
        limits: Limits | None = None,
    ) -> T:
        """Run the host's code in a runtime on this world's disk, again from its top after each crash.

        Returns what it returns, once the runtime has closed. Time goes on where the last `run` left it.

        Raises:
            Deadlock: The host waits for what cannot happen.
            Livelock: Something spins without letting time pass.
            BaseException: Whatever the host raises.
        """
        for _ in range(_MOST_PROCESSES):
            try:
                return self._live(host, registry, limits)
            except _Crashed:
                self._note(f"crash before step {self.steps}")
            except StoreError as error:
                # The host saw the disk fail. Whoever runs it starts it again, unless the disk never fails.
                if self._is_calm:
                    raise
                self._note(f"the host failed: {error}")
            self._seconds += _DOWN_SECONDS
        raise AssertionError(f"The host did not get to its end in {_MOST_PROCESSES} processes.")

    def run_flow(
        self,
        registry: Registry,
        controller_id: str,
        *,
        state_json: Json = None,
        goal: str = "simulated",
        owner: str = "agent:simulated",
        limits: Limits | None = None,
    ) -> Flow:
        """Create one flow of a registered controller and return it as it ended, crashes and all."""

        async def host(runtime: Runtime) -> Flow:
            flows = runtime.tasks.flow.bind_session(session_key=owner)
            flow = await flows.create_managed(
                controller_id=controller_id,
                goal=goal,
                state_json=state_json,
                idempotency_key=f"simulated {controller_id}",
            )
            return await flows.result(flow.flow_id)

        return self.run(host, registry=registry, limits=limits)

    def heal(self) -> None:
        """From here on nothing fails and nobody dies."""
        self.disk.faults = msgspec.structs.replace(CALM, delay=self.disk.faults.delay)
        self._crashes.clear()

    def crash(self) -> None:
        """End the process now; for the host's own code to call."""
        self._crashes.append(self.steps)

    def _live(
        self,
        host: Callable[[Runtime], Awaitable[T]],
        registry: Registry | None,
        limits: Limits | None,
    ) -> T:
        """One process, from its start to its end."""
        globally.seed(self.random.getrandbits(64))
        runtime = open_runtime(
            self._make_store(),
            registry=registry,
            clock=self.clock,
            ids=self.ids,
            limits=limits,
        )
        loop = SimulatedLoop(self.random, shuffle=self.schedule.shuffle, began=self._seconds)
        loop.trace = self.trace
        loop.on_step = self._before_step
        self._loop = loop

        async def process() -> T:
            async with runtime:
                return await host(runtime)

        try:
            result = loop.run_until_complete(process())
            loop.run_until_complete(loop.shutdown_asyncgens())
        except BaseException:
            self._left.append((loop, runtime))
            self._drop_disk()
            raise
        finally:
            self._seconds, self.trace = loop.time(), loop.trace
        loop.close()
        return result

    @property
    def _is_calm(self) -> bool:
        return msgspec.structs.replace(self.disk.faults, delay=0.0) == CALM

    def _drop_disk(self) -> None:
        if self.schedule.power_cuts:
            self.disk.cut_power()
        else:
            self.disk.kill()

    def _before_step(self) -> None:
        if self._crashes and self.steps >= self._crashes[-1]:
            self._crashes.pop()
            self.crashed += 1
            raise _Crashed
        self.steps += 1

    def _simulated_store(self) -> Store:
        return SimulatedStore(self.disk)

    # ---- telling ----------------------------------------------------------------------------------

    def _note_commit(self, stage: str) -> None:
        self._note(f"commit {self.disk.commits} {stage}")

    def _note(self, what: str) -> None:
        seconds = self._seconds if self._loop is None else self._loop.time()
        self.log.append(f"{seconds:10.3f} s  step {self.steps:5}  {what}")

    # ---- ending -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Forget what dead processes left suspended."""
        left, self._left = self._left, []
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            for loop, runtime in left:
                _bury(loop, runtime)
        finally:
            sys.unraisablehook = hook


def _bury(loop: SimulatedLoop, runtime: Runtime | None) -> None:
    """End suspended code without letting it complain: there is no loop for it any more."""
    if runtime is not None:
        runtime._core = None  # or it would warn that nobody closed it
    for task in loop.pending_tasks():
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        with suppress(BaseException):
            coro = task.get_coro()
            if coro is not None:
                coro.close()
    loop.close()
