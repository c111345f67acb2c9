"""The exploration finds known bugs, passes their mended selves, and tells what it found."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from functools import partial
from itertools import count, pairwise
from typing import Final

import pytest

from flowstead import FlowContext, Registry, TaskContext
from flowstead.testing import (
    CALM,
    STORMY,
    ExplorationFailed,
    Schedule,
    Simulation,
    explore,
    replay,
)
from flowstead.testing.explore import _simpler, schedule_of
from tests.testing_kit.planted import BY_CRASHES, BY_SEEDS, Bank, Bug

LONG: Final = os.environ.get("FLOWSTEAD_EXPLORE") == "long"
"""Whether every mended flow goes through the whole exploration too: minutes instead of seconds."""

SEEDS: Final = 200
SEEDS_FOR_THE_MENDED: Final = 5


def broken(bug: Bug, sim: Simulation) -> None:
    bug(sim, False)


def mended(bug: Bug, sim: Simulation) -> None:
    bug(sim, True)


def named(bug: Bug) -> str:
    return bug.__name__


@pytest.mark.parametrize("bug", BY_CRASHES + BY_SEEDS, ids=named)
def test_a_planted_bug_is_found_and_its_mended_self_passes(bug: Bug) -> None:
    replay(partial(broken, bug), Schedule())  # the plain run shows nothing

    with pytest.raises(ExplorationFailed) as failed:
        explore(partial(broken, bug), seeds=SEEDS, every_step=LONG or bug in BY_CRASHES)

    found = failed.value
    told = f"{bug.__name__.replace('_', ' ')} | {found.found_in_run} | {found.schedule}"
    sys.stdout.write(f"\n| {told} |")
    assert found.found_in_run > 1
    with pytest.raises(type(found.__cause__)):
        replay(partial(broken, bug), found.schedule)
    replay(partial(mended, bug), found.schedule)
    if LONG:
        explore(partial(mended, bug), seeds=SEEDS)
    else:
        explore(partial(mended, bug), seeds=SEEDS_FOR_THE_MENDED, every_step=False)


def ticking(sim: Simulation) -> None:
    """Pass always, in few steps."""
    registry = Registry()

    @registry.controller("clock")
    async def clock(flow: FlowContext) -> None:
        await flow.update(current_step="tick")

    assert sim.run_flow(registry, "clock").status == "succeeded"


def sleeping(seconds: float, sim: Simulation) -> None:
    """Sleep in a controller, under a deadline of a wait that nobody answers, and in a child."""
    registry = Registry()

    @registry.task
    async def rest(ctx: TaskContext, given: float) -> None:
        await asyncio.sleep(given)

    @registry.controller("sleeper")
    async def sleeper(flow: FlowContext) -> None:
        await flow.sleep("a while", seconds)
        await flow.wait("reply", kind="reply", timeout=seconds, on_timeout="resume")
        await flow.run(rest, seconds)

    flow = sim.run_flow(registry, "sleeper")
    assert flow.status == "succeeded"
    assert flow.ended_at is not None
    assert flow.ended_at - flow.created_at >= 3000 * seconds


def test_ten_days_of_sleep_take_no_more_steps_than_an_hour() -> None:
    hour = replay(partial(sleeping, 3600), Schedule())
    ten_days = replay(partial(sleeping, 10 * 24 * 3600), Schedule())

    gone = explore(partial(sleeping, 10 * 24 * 3600), seeds=5, every_step=False)

    assert ten_days.steps == hour.steps
    assert gone.crashes > 0
    assert gone.steps < 5 * gone.runs * hour.steps


def charging(sim: Simulation, *, key: bool = False) -> None:
    """Pass when nothing goes wrong; charge twice when the process dies between the charge and its record."""
    bank, registry = Bank(), Registry()

    @registry.task
    async def charge(ctx: TaskContext, order: str) -> str:
        return await bank.charge(order if key else None)

    @registry.controller("shop/order")
    async def order(flow: FlowContext) -> None:
        await flow.run(charge, "o-1")

    sim.run_flow(registry, "shop/order")

    assert len(bank.charges) == 1, f"charged {len(bank.charges)} times"


def test_a_failure_says_what_when_and_how_to_see_it_again() -> None:
    with pytest.raises(ExplorationFailed) as failed:
        explore(charging)

    told = str(failed.value)
    step = failed.value.schedule.crashes[0]
    assert told.startswith("AssertionError: charged 2 times\n")
    assert f"Run {failed.value.found_in_run} of the exploration" in told
    assert f"the process dies before step {step}" in told
    assert f"crash before step {step}" in told
    assert told.endswith(f'replay(scenario, "seed=0 crashes={step}")')
    assert isinstance(failed.value.__cause__, AssertionError)
    again = pickle.loads(pickle.dumps(failed.value))  # as pytest-xdist does
    assert again.schedule == failed.value.schedule


def test_a_failing_schedule_played_again_from_its_text_takes_the_same_steps_to_the_same_error() -> (
    None
):
    with pytest.raises(ExplorationFailed) as failed:
        explore(charging, every_step=False)
    traces = []

    def noting(sim: Simulation) -> None:
        try:
            charging(sim)
        finally:
            traces.append((sim.trace, sim.steps, tuple(sim.log)))

    for _ in range(3):
        with pytest.raises(AssertionError, match="charged 2 times"):
            replay(noting, str(failed.value.schedule))

    assert len(set(traces)) == 1
    assert traces[0][2] == tuple(failed.value.log)


def test_what_a_schedule_does_not_need_to_fail_is_left_out_and_what_it_needs_is_not() -> None:
    def fails_when_it_dies_twice(sim: Simulation) -> None:
        charging(sim, key=True)
        assert sim.crashed < 2, "died twice"

    with pytest.raises(ExplorationFailed, match="died twice") as failed:
        explore(fails_when_it_dies_twice, every_step=False)

    schedule = failed.value.schedule
    assert len(schedule.crashes) == 2
    for simpler in _simpler(schedule):
        replay(fails_when_it_dies_twice, simpler)


def test_a_disk_that_has_to_fail_in_one_way_is_told_to_fail_in_that_way_only() -> None:
    def fails_when_the_disk_was_slow(sim: Simulation) -> None:
        charging(sim, key=True)
        assert not sim.disk.fired["slow"], "it was slow"

    with pytest.raises(ExplorationFailed, match="it was slow") as failed:
        explore(fails_when_the_disk_was_slow, every_step=False)

    schedule = failed.value.schedule
    shown = [word.partition("=")[0] for word in str(schedule).split()]
    assert shown == ["seed", "slow"]


def test_an_exploration_counts_what_it_went_through() -> None:
    plain = replay(ticking, Schedule())

    gone = explore(ticking, seeds=30)

    assert gone.runs == 1 + plain.steps + 30
    assert gone.steps_crashed_at == plain.steps
    assert gone.crashes > plain.steps
    assert gone.commits >= gone.runs * plain.disk.commits
    assert sum(gone.faults.values()) > 0


def test_seeds_can_be_named_and_a_calm_disk_asked_for() -> None:
    gone = explore(ticking, seeds=[3, 5], every_step=False, faults=CALM)

    assert gone.runs == 3
    assert gone.faults.get("fail_before", 0) == 0


def test_seeds_stand_for_schedules_of_every_kind() -> None:
    schedules = [schedule_of(seed, steps=100) for seed in range(1, 101)]

    assert {len(schedule.crashes) for schedule in schedules} == {0, 1, 2, 3}
    assert {schedule.shuffle for schedule in schedules} == {False, True}
    assert {schedule.power_cuts for schedule in schedules} == {False, True}
    assert {schedule.faults == STORMY for schedule in schedules} == {False, True}
    assert schedules == [schedule_of(seed, steps=100) for seed in range(1, 101)]


def test_a_scenario_that_commits_nothing_is_refused_as_vacuous() -> None:
    with pytest.raises(ValueError, match="commits nothing"):
        explore(lambda sim: None)


def test_a_scenario_whose_world_is_made_outside_of_it_is_refused() -> None:
    bank = Bank()

    def scenario(sim: Simulation) -> None:
        sim.run_flow(registry, "shop/order")
        assert len(bank.charges) == 1

    registry = Registry()

    @registry.controller("shop/order")
    async def order(flow: FlowContext) -> None:
        await flow.once("charge", bank.charge)

    with pytest.raises(ValueError, match="not made in it: a world"):
        explore(scenario)


def test_a_scenario_that_takes_another_course_each_time_is_refused() -> None:
    numbers = count(1)

    def scenario(sim: Simulation) -> None:
        registry = Registry()

        @registry.task
        async def work(ctx: TaskContext, given: int) -> None:
            return None

        @registry.controller("job")
        async def job(flow: FlowContext) -> None:
            await flow.map(work, list(range(next(numbers))))

        sim.run_flow(registry, "job")

    with pytest.raises(ValueError, match="takes another course"):
        explore(scenario)


async def test_exploring_inside_a_running_loop_says_how_to_write_the_test() -> None:
    with pytest.raises(RuntimeError, match="plain `def test_"):
        explore(charging)
    with pytest.raises(RuntimeError, match="plain `def test_"):
        replay(charging, "seed=1")


def test_a_failure_by_pytest_itself_is_told_with_its_schedule() -> None:
    def scenario(sim: Simulation) -> None:
        charging(sim, key=True)
        if sim.crashed:
            pytest.fail("it died")

    with pytest.raises(ExplorationFailed, match=r"(?s)Failed: it died.*crashes=0"):
        explore(scenario)


def test_a_skip_and_an_interrupt_are_no_failures() -> None:
    def skips(sim: Simulation) -> None:
        pytest.skip("not here")

    def interrupted(sim: Simulation) -> None:
        raise KeyboardInterrupt

    with pytest.raises(pytest.skip.Exception):
        explore(skips)
    with pytest.raises(KeyboardInterrupt):
        explore(interrupted)


def test_a_crash_before_each_step_covers_every_stage_of_every_commit() -> None:
    after: set[str] = set()

    def scenario(sim: Simulation) -> None:
        ticking(sim)
        lines = [line.split("  ")[-1] for line in sim.log]
        after.update(before for before, line in pairwise(lines) if "crash" in line)

    explore(scenario, seeds=0)

    for stage in ("written", "synced", "visible"):
        for event in ("flow.created", "flow.started", "flow.succeeded"):
            assert f"commit {stage}: {event}" in after
