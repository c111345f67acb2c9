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

import logging
import random as globally
import sys
import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Final, TypeVar

import msgspec
from anyio._backends import _asyncio

from flowstead.engine.engine import DELIVERIES
from flowstead.engine.guard import consists_of
from flowstead.errors import StoreError
from flowstead.model.flow import Flow, Json
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.notifiers.port import Notifier
from flowstead.registry import Registry
from flowstead.rules.digests import DigestTime
from flowstead.runtime import Runtime, open_runtime
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.store.port import Store
from flowstead.testing.disk import CALM, Disk, SimulatedStore
from flowstead.testing.loop import Livelock, SimulatedLoop
from flowstead.testing.process import SimulatedClock, SimulatedIds
from flowstead.testing.schedule import Schedule

T = TypeVar("T")

_START: Final = 1_800_000_000_000
_DOWN_SECONDS: Final = 0.5
_MOST_PROCESSES: Final = 1_000
_MOST_STEPS: Final = 1_000_000
# Sweeping idle flows out every few seconds would be most of what happens in a simulated week.
_LIMITS: Final = Limits(idle_seconds=60.0)


class Crashed(BaseException):
    """The process ends here. Nothing catches it: it comes out of the loop, not out of a task."""


class Simulation:
    """One world, from its first process to its last. Close it, or use it in a `with` statement.

    Args:
        schedule: What happens in it; a seed alone means its order of steps with no faults and no crashes.
        store: Makes each process's store; one on `disk` unless given.
        clock_start: The first instant, epoch ms.
        notifier: Takes the updates of every process. It stands for what is outside, so it outlives them.
        deliveries, digest_time: As for `open_runtime`.
    """

    def __init__(
        self,
        schedule: Schedule | int = 0,
        *,
        store: Callable[[], Store] | None = None,
        clock_start: int = _START,
        notifier: Notifier | None = None,
        deliveries: Retry = DELIVERIES,
        digest_time: DigestTime | None = None,
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
        self._chance_before = globally.getstate()
        self._make_store = store or self._simulated_store
        self._notifier, self._deliveries, self._digest_time = notifier, deliveries, digest_time
        self._seconds = 0.0
        self._crashes = sorted(set(schedule.crashes), reverse=True)
        self._loop: SimulatedLoop | None = None
        self._runtimes: list[Runtime] = []
        self._power_fails = schedule.power_cuts
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
        registry: Registry | Callable[[], Registry] | None = None,
        limits: Limits | None = None,
    ) -> T:
        """Run the host's code in a runtime on this world's disk, again from its top after each crash.

        Returns what it returns, once the runtime has closed. Time goes on where the last `run` left it.

        Args:
            host: What the process does once its runtime is open.
            registry: What the runtime can run. Give a function that makes one, and each process makes its own:
                what its tasks and controllers keep in memory then dies with the process, as it would.
            limits: As for `open_runtime`; idle flows stay in memory for a minute unless given.

        Raises:
            Deadlock: The host waits for what cannot happen.
            Livelock: Something spins without letting time pass.
            BaseException: Whatever the host raises.
        """
        for _ in range(_MOST_PROCESSES):
            try:
                return self._live(host, registry, limits)
            except Crashed:
                where = "" if self._loop is None else "; ".join(self._loop.flow_code())
                self._note(f"crash before step {self.steps}" + (f", in {where}" if where else ""))
            except (StoreError, BaseExceptionGroup) as error:
                # The host saw the disk fail. Whoever runs it starts it again, unless the disk never fails.
                if self._is_calm or not consists_of(error, StoreError):
                    raise
                self._note(f"the host failed: {error}")
            finally:
                self._loop = None
            self._seconds += _DOWN_SECONDS
        raise AssertionError(f"The host did not get to its end in {_MOST_PROCESSES} processes.")

    def run_flow(
        self,
        registry: Registry | Callable[[], Registry],
        controller_id: str,
        *,
        state_json: Json = None,
        goal: str = "simulated",
        owner: str = "agent:simulated",
        idempotency_key: str | None = None,
        limits: Limits | None = None,
    ) -> Flow:
        """Create one flow of a registered controller and return it as it ended, crashes and all.

        Its idempotency key is the controller's name unless given; give one for each of several flows.
        """

        async def host(runtime: Runtime) -> Flow:
            flows = runtime.tasks.flow.bind_session(session_key=owner)
            flow = await flows.create_managed(
                controller_id=controller_id,
                goal=goal,
                state_json=state_json,
                idempotency_key=idempotency_key or controller_id,
            )
            return await flows.result(flow.flow_id)

        return self.run(host, registry=registry, limits=limits)

    def heal(self) -> None:
        """From here on nothing fails and nobody dies."""
        self.disk.faults = msgspec.structs.replace(CALM, delay=self.disk.faults.delay)
        self._crashes.clear()

    def crash(self, *, after: int = 0, power: bool | None = None) -> None:
        """End the process so many steps from now; for code that runs in it, or before it plays on.

        Args:
            after: How many steps it still takes.
            power: Whether the machine dies with it; as the schedule says unless given.
        """
        self._crashes.append(self.steps + after)
        self._crashes.sort(reverse=True)
        self._power_fails = self.schedule.power_cuts if power is None else power

    # ---- running piece by piece -------------------------------------------------------------------

    def boot(
        self,
        *,
        registry: Registry | Callable[[], Registry] | None = None,
        limits: Limits | None = None,
        takeover: bool = False,
    ) -> Runtime:
        """Start a process and answer its runtime, open; one that lives already gets a second runtime.

        The process stands still except while it plays.

        Raises:
            Crashed: The process died on the way.
            StoreError: The store could not be opened. The process lives on.
        """
        if self._loop is None:
            self._loop = self._new_loop()
        runtime = self._open(registry, limits, takeover=takeover)
        self._runtimes.append(runtime)
        try:
            self.play(runtime.__aenter__())
        except StoreError:
            self._runtimes.remove(runtime)
            raise
        return runtime

    def play(self, code: Awaitable[T]) -> T:
        """Let the living process run until this is done, and answer its result.

        Raises:
            Crashed: The process died on the way.
        """
        loop = self._loop
        assert loop is not None, "nothing lives: boot first"
        try:
            return loop.run_until_complete(code)
        except Crashed:
            self._die(loop)
            raise
        finally:
            self._seconds, self.trace = loop.time(), loop.trace

    def kill(self, *, power: bool = False) -> None:
        """End the living process between two steps, and with `power` the machine with it."""
        assert self._loop is not None, "nothing lives: boot first"
        self._power_fails = power
        self.crashed += 1
        self._die(self._loop)

    def shut(self) -> None:
        """Close the runtimes of the living process, newest last, and end it in good order.

        Raises:
            Crashed: The process died on the way.
        """
        loop = self._loop
        assert loop is not None, "nothing lives: boot first"
        for runtime in self._runtimes:
            self.play(runtime.aclose())
        self.play(loop.shutdown_asyncgens())
        self._runtimes.clear()
        self._loop = None
        loop.close()

    def _die(self, loop: SimulatedLoop) -> None:
        self._note(f"crash before step {self.steps}")
        self._left.append((loop, None))
        self._left.extend((loop, runtime) for runtime in self._runtimes)
        self._runtimes.clear()
        self._loop = None
        self._drop_disk()
        self._seconds += _DOWN_SECONDS

    def _live(
        self,
        host: Callable[[Runtime], Awaitable[T]],
        registry: Registry | Callable[[], Registry] | None,
        limits: Limits | None,
    ) -> T:
        """One process, from its start to its end."""
        loop = self._loop = self._new_loop()
        runtime = self._open(registry, limits)

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

    def _new_loop(self) -> SimulatedLoop:
        globally.seed(self.random.getrandbits(64))
        loop = SimulatedLoop(self.random, shuffle=self.schedule.shuffle, began=self._seconds)
        loop.trace = self.trace
        loop.on_step = self._before_step
        return loop

    def _open(
        self,
        registry: Registry | Callable[[], Registry] | None,
        limits: Limits | None,
        *,
        takeover: bool = False,
    ) -> Runtime:
        return open_runtime(
            self._make_store(),
            registry=registry() if callable(registry) else registry,
            clock=self.clock,
            ids=self.ids,
            limits=limits or _LIMITS,
            takeover=takeover,
            notifier=self._notifier,
            deliveries=self._deliveries,
            digest_time=self._digest_time,
        )

    @property
    def _is_calm(self) -> bool:
        return msgspec.structs.replace(self.disk.faults, delay=0.0) == CALM

    def _drop_disk(self) -> None:
        if self._power_fails:
            self.disk.cut_power()
        else:
            self.disk.kill()

    def _before_step(self) -> None:
        if self._crashes and self.steps >= self._crashes[-1]:
            self._crashes.pop()
            self.crashed += 1
            raise Crashed
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise Livelock(f"No end after {self.steps} steps: something asks again and again.")

    def _simulated_store(self) -> Store:
        return SimulatedStore(self.disk)

    # ---- telling ----------------------------------------------------------------------------------

    def _note_commit(self, stage: str, writes: Sequence[FlowWrite]) -> None:
        told = [codec.read_event(row.doc.encode(), 0) for write in writes for row in write.events]
        names = ", ".join(event.type for event in told)
        self._note(f"commit {stage}: {names}")

    def _note(self, what: str) -> None:
        seconds = self._seconds if self._loop is None else self._loop.time()
        self.log.append(f"{seconds:10.3f} s  step {self.steps:5}  {what}")

    # ---- ending -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Forget what dead processes left suspended."""
        left, self._left = self._left, []
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # the dead would still say how they ended
        try:
            with warnings.catch_warnings():
                # Their `finally` blocks may try to start what has no loop to run in.
                warnings.simplefilter("ignore", RuntimeWarning)
                for loop, runtime in left:
                    _bury(loop, runtime)
        finally:
            sys.unraisablehook = hook
            logging.disable(level)
            globally.setstate(self._chance_before)


def _bury(loop: SimulatedLoop, runtime: Runtime | None) -> None:
    """End suspended code without letting it complain: there is no loop for it any more."""
    if runtime is not None:
        runtime._core = None  # or it would warn that nobody closed it
    loop.set_exception_handler(lambda *_: None)
    tasks = loop.pending_tasks()
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        with suppress(BaseException):
            coro = task.get_coro()
            if coro is not None:
                coro.close()
    loop.close()
    # What a task waits for holds the task, and anyio keeps by task what holds it until its scopes are left.
    states = getattr(_asyncio, "_task_states", {})
    for task in tasks:
        states.pop(task, None)
