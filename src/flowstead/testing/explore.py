"""Look for the run in which a flow breaks: a crash at every step, then seeds with everything at once.

A scenario is a plain function that is given a `Simulation`, makes its own fresh world, runs a flow in it, and
asserts what should be true in the end:

    def orders_are_charged_once(sim: Simulation) -> None:
        charged: list[str] = []
        registry = shop(charged)
        flow = sim.run_flow(registry, "shop/order", state_json={"order": "o-1"})
        assert flow.status == "succeeded"
        assert charged == ["o-1"]

    def test_orders() -> None:
        explore(orders_are_charged_once)

Everything that changes from run to run has to come from inside the scenario: make the world and the registry in
it, and take time from the loop and ids from the flow (the time of day and `uuid4` are not simulated). What the
scenario makes outlives crashes, as the world outside does: a list it makes is a stand-in for a bank, not for
the memory of a process.

A step is one turn of the event loop: every await of every task, and every stage of every commit, lies between
two of them. So a crash before each step is a crash at each await and around each commit.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Final, TypeAlias

import msgspec

from flowstead.testing.disk import CALM, STORMY, Faults
from flowstead.testing.schedule import Schedule
from flowstead.testing.simulation import Simulation

Scenario: TypeAlias = Callable[[Simulation], object]

_MOST_CRASHES: Final = 3
_MOST_ATTEMPTS_TO_SHRINK: Final = 200
_SEEDS_FOR_ONE_FAULT: Final = 8
_OFTEN: Final = 0.2
_SHOWN_LINES: Final = 40
_GENTLE: Final = Faults(delay=0.01)


class Exploration(msgspec.Struct, frozen=True, kw_only=True):
    """What an exploration went through without finding anything.

    Attributes:
        runs: How often the scenario was played.
        steps: Loop steps in all.
        crashes: Processes that died.
        steps_crashed_at: Different steps of the plain run that a crash was put before.
        commits: Commits that became visible.
        faults: How often each fault of the disk struck.
    """

    runs: int
    steps: int
    crashes: int
    steps_crashed_at: int
    commits: int
    faults: dict[str, int]


class ExplorationFailed(AssertionError):
    """The scenario fails under some schedule; its own error is the cause.

    Attributes:
        schedule: The first failing schedule that was found, without what it does not need to fail.
        found_in_run: How many runs it took to find it, the plain one included.
        log: What happened in it, a line each.
    """

    def __init__(self, schedule: Schedule, found_in_run: int, log: list[str]) -> None:
        super().__init__(schedule, found_in_run, log)
        self.schedule = schedule
        self.found_in_run = found_in_run
        self.log = log

    def __str__(self) -> str:
        left_out = len(self.log) - _SHOWN_LINES
        told = [f"  ... {left_out} lines before, in `.log`"] if left_out > 0 else []
        told += [f"  {line}" for line in self.log[-_SHOWN_LINES:]]
        return (
            f"{_told(self.__cause__)}\n\n"
            f"Run {self.found_in_run} of the exploration found this. It fails under the schedule\n\n"
            f"  {self.schedule}\n\n{_meaning(self.schedule)} What happened in it:\n\n"
            + "\n".join(told)
            + f'\n\nPlay it again, in a debugger if you like: replay(scenario, "{self.schedule}")'
        )


def explore(
    scenario: Scenario,
    *,
    seeds: int | Iterable[int] = 200,
    every_step: bool = True,
    faults: Faults = STORMY,
) -> Exploration:
    """Play a scenario plainly, with a crash before each step, and under seeds; stop at the first run that fails.

    That is one run for each step of the plain run, and one for each seed. A step is something that happens, so a
    flow that sleeps for a week takes no more of them than one that sleeps for a minute; a run that takes a million
    ends as a `Livelock`. The time of all runs goes by the square of the plain run's steps: keep the scenario small,
    a few things at once and no thousand, or give `every_step=False`.

    Under a seed steps may be shuffled, the disk may fail in the ways of `faults`, the process may die up to
    three times, and the machine may lose power.

    Args:
        scenario: Makes a fresh world, runs flows in the simulation it is given, asserts.
        seeds: How many seeds, or which.
        every_step: Whether to crash before each step of the plain run.
        faults: How likely the disk fails under a seed; `CALM` for never.

    Returns:
        What was gone through.

    Raises:
        ExplorationFailed: With the failing schedule; the scenario's own error is its cause.
        ValueError: The scenario commits nothing, so there is nothing to explore; or it takes another course
            when it is played again, so what is found could not be found again.
        RuntimeError: Called where an event loop runs: make the test a plain `def`.
    """
    search = _Search(scenario)
    plain = search.play(Schedule())
    _check_repeatable(scenario, plain)
    if every_step:
        for step in range(plain.steps):
            search.play(Schedule(crashes=(step,)))
        search.steps_crashed_at = plain.steps
    for seed in range(1, seeds + 1) if isinstance(seeds, int) else seeds:
        search.play(schedule_of(seed, steps=plain.steps, faults=faults))
    return search.report()


def replay(scenario: Scenario, schedule: Schedule | str) -> Simulation:
    """Play one schedule, as an `ExplorationFailed` shows it; what the scenario raises comes out as it is."""
    _check_no_loop_runs()
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule)
    with Simulation(schedule) as simulation:
        scenario(simulation)
    return simulation


def schedule_of(seed: int, *, steps: int, faults: Faults = STORMY) -> Schedule:
    """The schedule a seed stands for, in a scenario that takes so many steps when nothing goes wrong."""
    random = Random(seed)
    crashes = random.randint(0, _MOST_CRASHES)
    return Schedule(
        seed=seed,
        shuffle=random.random() < 0.5,
        crashes=tuple(sorted(random.randrange(2 * steps) for _ in range(crashes))),
        power_cuts=random.random() < 0.3,
        faults=random.choice((CALM, _GENTLE, faults)),
    )


class _Search:
    """Runs of one scenario, until one fails."""

    def __init__(self, scenario: Scenario) -> None:
        _check_no_loop_runs()
        self._scenario = scenario
        self.steps_crashed_at = 0
        self._runs = self._steps = self._crashes = self._commits = 0
        self._faults: Counter[str] = Counter()

    def play(self, schedule: Schedule) -> Simulation:
        """Play once; if that fails, play on with less and less and raise the least that fails."""
        simulation, error = _played(self._scenario, schedule)
        self._runs += 1
        self._steps += simulation.steps
        self._crashes += simulation.crashed
        self._commits += simulation.disk.commits
        self._faults.update(simulation.disk.fired)
        if error is not None:
            schedule, simulation, error = self._shrunk(schedule, simulation, error)
            raise ExplorationFailed(schedule, self._runs, simulation.log) from error
        return simulation

    def _shrunk(
        self, schedule: Schedule, simulation: Simulation, error: BaseException
    ) -> tuple[Schedule, Simulation, BaseException]:
        """The failure, without whatever its schedule does not need to fail."""
        attempts = 0
        for_less = True
        while for_less and isinstance(error, Exception):
            for_less = False
            for simpler in _simpler(schedule):
                attempts += 1
                if attempts > _MOST_ATTEMPTS_TO_SHRINK:
                    break
                tried, still = _played(self._scenario, simpler)
                if still is not None:
                    schedule, simulation, error = simpler, tried, still
                    for_less = True
                    break
        return schedule, simulation, error

    def report(self) -> Exploration:
        return Exploration(
            runs=self._runs,
            steps=self._steps,
            crashes=self._crashes,
            steps_crashed_at=self.steps_crashed_at,
            commits=self._commits,
            faults=dict(self._faults),
        )


def _played(scenario: Scenario, schedule: Schedule) -> tuple[Simulation, BaseException | None]:
    """One run, and what it failed with."""
    with Simulation(schedule) as simulation:
        try:
            scenario(simulation)
        except Exception as error:
            return simulation, error
        except BaseException as error:
            # pytest.fail, a pytest.raises that saw nothing, and a time limit are no Exceptions.
            if type(error).__name__ != "Failed":
                raise
            return simulation, error
    return simulation, None


def _check_repeatable(scenario: Scenario, plain: Simulation) -> None:
    if plain.disk.commits == 0:
        raise ValueError(
            "The scenario commits nothing on the simulation's disk, so there is nothing to explore: run its"
            " flows in the simulation it is given, and let it use that one's own store."
        )
    again, error = _played(scenario, Schedule())
    if error is not None or again.trace != plain.trace:
        raise ValueError(
            "The scenario takes another course when it is played a second time. It uses something that is not"
            " made in it: a world, a registry or a global from outside, the time of day, the order of a set."
        ) from error


def _check_no_loop_runs() -> None:
    if asyncio._get_running_loop() is not None:
        raise RuntimeError(
            "A simulation has an event loop of its own: explore from a plain `def test_...`, not from"
            " `async def`."
        )


def _told(error: BaseException | None) -> str:
    """What the scenario raised, short: the whole of it is shown as the cause."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _meaning(schedule: Schedule) -> str:
    """A schedule in words."""
    told = []
    if schedule.crashes:
        steps = ", ".join(map(str, schedule.crashes))
        what = "the machine loses power" if schedule.power_cuts else "the process dies"
        told.append(f"{what} before step {steps}")
    if schedule.shuffle:
        told.append("ready tasks run in any order")
    if schedule.faults != CALM:
        told.append("the disk is slow or fails")
    return f"That is: {' and '.join(told) or 'nothing goes wrong'}."


def _simpler(schedule: Schedule) -> Iterator[Schedule]:
    """Schedules with less in them, those with much less first."""
    change = msgspec.structs.replace
    likely = {name: getattr(schedule.faults, name) for name in Faults.__struct_fields__}
    likely = {name: chance for name, chance in likely.items() if chance}
    if likely:
        yield change(schedule, faults=CALM)
    for crash in schedule.crashes:
        yield change(schedule, crashes=tuple(c for c in schedule.crashes if c != crash))
    for name in ("shuffle", "power_cuts"):
        if getattr(schedule, name):
            yield change(schedule, **{name: False})
    if len(likely) > 1:
        # A fault left out changes all that is drawn after it, so each is tried alone, often, under a few seeds.
        for seed in range(_SEEDS_FOR_ONE_FAULT):
            for name, chance in likely.items():
                often = chance if name == "delay" else max(chance, _OFTEN)
                yield change(schedule, seed=seed, faults=Faults(**{name: often}))
        for name in likely:
            yield change(schedule, faults=change(schedule.faults, **{name: 0.0}))
