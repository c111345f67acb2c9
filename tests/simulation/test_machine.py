"""A machine that drives a world: hypothesis decides what happens, the world's seed decides when.

`FLOWSTEAD_EXAMPLES=10` plays ten times as many worlds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flowstead.testing import CALM
from tests.simulation import checks, programs, scenes
from tests.simulation.machine import World
from tests.simulation.operations import OPERATIONS, WEIGHTED

MANY = int(os.environ.get("FLOWSTEAD_EXAMPLES", "1"))


def profile(examples: int) -> settings:
    return settings(
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=examples * MANY,
        stateful_step_count=40,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def asked_of(names: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Any of these operations with any of its arguments."""

    def spec(name: str) -> st.SearchStrategy[Any]:
        choices = OPERATIONS[name].choices
        drawn = {argument: st.sampled_from(given) for argument, given in choices.items()}
        return st.tuples(st.just(name), st.fixed_dictionaries(drawn))

    return st.sampled_from(names).flatmap(spec)


anything = asked_of(WEIGHTED)
creations = asked_of(("create_managed",))
mutations = asked_of(tuple(name for name, one in OPERATIONS.items() if one.mutates))
reads = asked_of(tuple(name for name, one in OPERATIONS.items() if not one.mutates))
up = precondition(lambda self: self.world.is_up)


class FlowsMachine(RuleBasedStateMachine):
    """Every operation, at every time, in a world that may end at any step."""

    directory: Path | None = None

    @initialize(
        seed=st.integers(0, 10_000),
        shuffle=st.booleans(),
        durability=st.sampled_from(["full", "full", "normal"]),
    )
    def begin(self, seed: int, shuffle: bool, durability: str) -> None:
        self.world = self.make(seed, shuffle, durability)
        self.world.boot()

    def make(self, seed: int, shuffle: bool, durability: str) -> World:
        return World(seed, shuffle=shuffle, durability=durability)

    def ready(self) -> World:
        if not self.world.is_up:
            self.world.boot()
        return self.world

    # ---- calls ------------------------------------------------------------------------------------

    @rule(asked=creations)
    def create(self, asked: Any) -> None:
        self.ready().call(asked)

    @rule(asked=anything)
    def call(self, asked: Any) -> None:
        self.ready().call(asked)

    @rule(asked=reads)
    def read(self, asked: Any) -> None:
        self.ready().call(asked)

    @rule(asked=st.lists(anything, min_size=2, max_size=5))
    def call_together(self, asked: list[Any]) -> None:
        self.ready().call(*asked)

    @rule(asked=st.lists(mutations, min_size=8, max_size=12))
    def crowd_one_flow(self, asked: list[Any]) -> None:
        for _, given in asked:
            given.update({name: 0 for name in ("flow", "task") if name in given})
        self.ready().call(*asked)

    @rule(asked=st.lists(anything, min_size=1, max_size=4), steps=st.integers(1, 80))
    def crash_in_the_middle_of_calls(self, asked: list[Any], steps: int) -> None:
        self.ready().crash_after(steps)
        self.world.call(*asked)

    @rule(asked=st.lists(mutations, min_size=1, max_size=4), steps=st.integers(1, 80))
    def cut_the_power_in_the_middle_of_calls(self, asked: list[Any], steps: int) -> None:
        self.ready().crash_after(steps, power=True)
        self.world.call(*asked)

    @rule(scene=st.sampled_from(scenes.SCENES), seed=st.integers(0, 1_000))
    def stage(self, scene: Any, seed: int) -> None:
        scene(self.ready(), Random(seed))

    # ---- the world --------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.1, 3.5, 8.0, 25.0, 120.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.ready().advance(seconds)

    @rule(seconds=st.sampled_from([-3600, -30, 0, 5, 3600]))
    def put_the_wall_clock_wrong(self, seconds: int) -> None:
        self.ready().jump_clock(seconds)

    @rule(number=st.integers(0, 5))
    def let_a_child_go_on(self, number: int) -> None:
        self.ready().release(number)

    @rule(kind=st.sampled_from(sorted(programs.FAULTS)))
    def begin_faults(self, kind: str) -> None:
        self.world.set_faults(programs.FAULTS[kind])

    @rule()
    def end_faults(self) -> None:
        self.world.set_faults(CALM)

    @up
    @rule()
    def kill(self) -> None:
        self.world.kill()

    @up
    @rule()
    def cut_the_power(self) -> None:
        self.world.kill(power=True)

    @up
    @rule()
    def close_and_open(self) -> None:
        self.world.close()
        checks.check_i10_closing_leaves_nobody_waiting(self.world)
        self.world.boot()

    @up
    @rule(steps=st.integers(1, 60))
    def crash_while_closing(self, steps: int) -> None:
        self.world.crash_after(steps)
        self.world.close()

    @up
    @precondition(lambda self: not self.world.overtaken and self.directory is None)
    @rule()
    def take_over(self) -> None:
        self.world.take_over()

    @up
    @precondition(lambda self: bool(self.world.overtaken))
    @rule(asked=st.lists(mutations, min_size=1, max_size=3))
    def call_a_runtime_that_was_overtaken(self, asked: list[Any]) -> None:
        self.world.ask_the_overtaken(*asked)

    # ---- what holds -------------------------------------------------------------------------------

    @invariant()
    def everything_holds(self) -> None:
        checks.check_standing_still(self.world)

    @up
    @rule()
    def strangers_see_nothing(self) -> None:
        checks.check_i12_strangers_see_nothing(self.world)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        with self.world:
            programs.finish(self.world)


class SqliteMachine(FlowsMachine):
    """The same over the real SQLite store, whose files are checked whenever a process is gone."""

    def make(self, seed: int, shuffle: bool, durability: str) -> World:
        self.directory = Path(tempfile.mkdtemp(prefix="flowstead-"))
        return World(seed, shuffle=shuffle, directory=self.directory)

    @invariant()
    def the_file_is_sound(self) -> None:
        assert self.directory is not None
        if not self.world.is_up:
            checks.check_file(self.world, self.directory)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if self.directory is not None:
                shutil.rmtree(self.directory)


@pytest.mark.timeout(3600)
def test_flows_do_what_the_specification_says_whatever_happens_to_their_world() -> None:
    run_state_machine_as_test(FlowsMachine, settings=profile(20))


@pytest.mark.timeout(3600)
def test_flows_in_sqlite_do_what_the_specification_says() -> None:
    run_state_machine_as_test(SqliteMachine, settings=profile(5))
