"""The kit itself: what is simulated is repeatable, complete, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowstead import FlowContext, Registry, Retry, Runtime, TaskContext
from flowstead.errors import CommitFailed
from flowstead.testing import (
    STORMY,
    Deadlock,
    Faults,
    Listener,
    Livelock,
    Schedule,
    Simulation,
    SqliteFiles,
    offline,
    replay,
)
from tests.testing_kit.planted import BY_SEEDS

ROOT: Final = Path(__file__).parents[2]
WEEK: Final = 7 * 24 * 3600
STORM: Final = Schedule(seed=11, shuffle=True, crashes=(40, 90), power_cuts=True, faults=STORMY)


def survey() -> Registry:
    registry = Registry()

    @registry.task(retry=Retry())
    async def ask(ctx: TaskContext, whom: str) -> str:
        await ctx.progress("asking")
        return f"{whom} says yes"

    @registry.controller("survey")
    async def survey(flow: FlowContext) -> None:
        await flow.update(state_json=await flow.map(ask, ["Ada", "Grace"]))

    return registry


def footprint() -> str:
    with Simulation(STORM) as sim:
        sim.run_flow(survey(), "survey")
        return f"{sim.trace} {sim.steps} {sim.crashed} {sim.log}"


# ---- repeatable -----------------------------------------------------------------------------------


def test_the_same_schedule_takes_the_same_steps_a_hundred_times() -> None:
    assert len({footprint() for _ in range(100)}) == 1


def test_the_same_schedule_takes_the_same_steps_in_processes_that_hash_differently() -> None:
    program = "from tests.testing_kit.test_kit import footprint; print(footprint())"

    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }

    assert told == {footprint() + "\n"}


def test_another_seed_takes_other_steps() -> None:
    def trace(seed: int) -> int:
        return replay(lambda sim: BY_SEEDS[0](sim, True), Schedule(seed=seed, shuffle=True)).trace

    assert len({trace(seed) for seed in range(5)}) > 1


chances = st.floats(0, 1).map(lambda value: float(f"{value:g}"))


@given(
    st.builds(
        Schedule,
        seed=st.integers(),
        shuffle=st.booleans(),
        crashes=st.lists(st.integers(0, 10_000), max_size=4).map(tuple),
        power_cuts=st.booleans(),
        faults=st.builds(Faults, **dict.fromkeys(Faults.__struct_fields__, chances)),
        durability=st.sampled_from(["full", "normal"]),
    )
)
def test_a_schedule_is_read_back_from_its_text(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("text", ["sed=1", "seed=one", "seed", "crashes=1,x", "slow=often", "slow"])
def test_a_text_that_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"nothing a schedule knows|invalid literal|could not"):
        Schedule.parse(text)


# ---- time -----------------------------------------------------------------------------------------


def a_week(sim: Simulation) -> Any:
    registry = Registry()
    day: Final = 24 * 3600

    @registry.task(timeout=3600, retry=Retry(max_attempts=8, initial=day, factor=1, max_delay=day))
    async def wait_for_reply(ctx: TaskContext, mail: int) -> str:
        if ctx.attempt < 8:
            await asyncio.sleep(2 * 3600)  # past the deadline
        return "at last"

    @registry.controller("inbox")
    async def inbox(flow: FlowContext) -> None:
        replies = await flow.map(wait_for_reply, list(range(30)), limit=30)
        await flow.update(state_json=replies)

    return sim.run_flow(registry, "inbox")


def test_a_week_of_timeouts_and_retries_passes_in_bounded_steps() -> None:
    with Simulation() as sim:
        flow = a_week(sim)

    assert flow.state_json == ["at last"] * 30
    assert flow.ended_at - flow.created_at > 0.9 * WEEK * 1000
    assert sim.steps < 500_000


# ---- standstill -----------------------------------------------------------------------------------


def test_a_deadlock_names_what_waits_for_ever() -> None:
    async def wait_for_nobody() -> None:
        await asyncio.Event().wait()

    async def host(runtime: Runtime) -> None:
        await asyncio.create_task(wait_for_nobody(), name="the waiting one")

    with Simulation() as sim, pytest.raises(Deadlock, match=r"the waiting one: .*wait_for_nobody"):
        sim.run(host)


def bounded(sim: Simulation, steps: int) -> None:
    """End a run that would not end by itself."""
    before = sim._before_step

    def counted() -> None:
        before()
        if sim.steps > steps:
            raise TimeoutError(f"still running after {steps} steps")

    sim._before_step = counted  # type: ignore[method-assign]


def test_a_flow_that_waits_for_ever_is_a_deadlock() -> None:
    registry = Registry()

    @registry.controller("stuck")
    async def stuck(flow: FlowContext) -> None:
        await asyncio.Event().wait()

    with Simulation() as sim:
        bounded(sim, 20_000)

        with pytest.raises(Deadlock, match="stuck"):
            sim.run_flow(registry, "stuck")


def test_spinning_without_letting_time_pass_is_a_livelock() -> None:
    registry = Registry()

    @registry.controller("spin")
    async def spin(flow: FlowContext) -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with Simulation() as sim, pytest.raises(Livelock, match="_run_controller"):
        sim.run_flow(registry, "spin")


# ---- death ----------------------------------------------------------------------------------------


def test_a_process_that_dies_runs_no_finally_before_the_checks() -> None:
    cleaned: list[str] = []

    async def host(runtime: Runtime) -> int:
        try:
            if not sim.crashed:
                sim.crash()
            await asyncio.sleep(0)
            return sim.crashed
        finally:
            cleaned.append(f"process {sim.crashed}")

    with Simulation() as sim:
        crashed = sim.run(host)

        assert crashed == 1
        assert cleaned == ["process 1"]


def test_nothing_is_left_open_and_nothing_warns_after_crashes() -> None:
    before = len(os.listdir("/dev/fd"))

    for seed in range(5):
        with Simulation(Schedule(seed=seed, crashes=(20, 60, 100), faults=STORMY)) as sim:
            sim.run_flow(survey(), "survey")
            left = [loop for loop, _ in sim._left]

        assert sim.crashed == 3
        assert len(left) >= 3
        assert all(loop.is_closed() for loop in left)
        coros = [task.get_coro() for loop in left for task in loop.pending_tasks()]
        assert not [coro for coro in coros if coro is not None and coro.cr_frame is not None]
        assert not sim._left

    assert len(os.listdir("/dev/fd")) == before


def test_the_chance_of_other_tests_is_left_alone() -> None:
    before = random.getstate()

    with Simulation() as sim:
        sim.run_flow(survey(), "survey")

    assert random.getstate() == before


# ---- the disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [name for name in Faults.__struct_fields__ if name != "delay"])
def test_each_fault_strikes_and_the_flow_ends_all_the_same(fault: str) -> None:
    struck = 0
    for seed in range(5):
        with Simulation(Schedule(seed=seed, faults=Faults(**{fault: 0.3}))) as sim:
            flow = sim.run_flow(offline(survey(), {"ask": "yes"}), "survey")

        assert flow.status == "succeeded"
        struck += sim.disk.fired[fault]

    assert struck > 0


def test_a_disk_with_delays_takes_time() -> None:
    with Simulation(Schedule(faults=Faults(delay=1.0))) as sim:
        sim.run_flow(survey(), "survey")

    assert sim._seconds > 1


def updates_before_a_power_cut(durability: str, seed: int) -> tuple[int, list[int]]:
    """The last revision that was answered before the power went, and the revisions found after it."""
    answered = 0

    async def host(runtime: Runtime) -> list[int]:
        nonlocal answered
        flows = runtime.tasks.flow.bind_session(session_key="me")
        flow = await flows.create_managed(controller_id="c", goal="g", idempotency_key="1")
        if sim.crashed:
            events = await flows.history(flow.flow_id)
            return sorted({event.revision for event in events})
        while True:
            applied = await flows.update(
                flow_id=flow.flow_id, expected_revision=flow.revision, state_json=flow.revision
            )
            flow = applied.unwrap()
            answered = flow.revision
            if answered == 8:
                sim.crash()

    with Simulation(Schedule(seed=seed, power_cuts=True, durability=durability)) as sim:
        return answered, sim.run(host)


def test_a_power_cut_takes_nothing_that_was_answered_with_full_durability() -> None:
    for seed in range(20):
        found = updates_before_a_power_cut("full", seed)[1]

        assert found == list(range(len(found)))
        assert len(found) > 8


def test_a_power_cut_takes_a_suffix_with_normal_durability() -> None:
    kept = []
    for seed in range(20):
        found = updates_before_a_power_cut("normal", seed)[1]
        kept.append(len(found))

        assert found == list(range(len(found)))

    assert min(kept) <= 8


def test_the_real_store_in_a_simulation_ends_with_the_same_flow(tmp_path: Path) -> None:
    def on_files(name: str, *crashes: int) -> Simulation:
        (tmp_path / name).mkdir()
        files = SqliteFiles(tmp_path / name)
        with Simulation(Schedule(crashes=crashes), store=files) as sim:
            flow = sim.run_flow(survey(), "survey")
        files.close()
        assert (flow.status, flow.state_json) == (expected.status, expected.state_json)
        return sim

    with Simulation() as sim:
        expected = sim.run_flow(survey(), "survey")

    plain = on_files("plain")

    for crash in range(0, plain.steps, 10):
        assert on_files(f"crash {crash}", crash).crashed == 1


# ---- the listener ---------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", range(10, 150, 10))
def test_a_listener_hears_each_event_once_over_a_crash(crash: int) -> None:
    listener = Listener()

    async def host(runtime: Runtime) -> str:
        flows = runtime.tasks.flow.bind_session(session_key="me")
        flow = await flows.create_managed(controller_id="survey", goal="g", idempotency_key="1")
        await flows.result(flow.flow_id)
        return flow.flow_id

    with Simulation(Schedule(crashes=(crash,))) as sim:
        flow_id = sim.run(listener.beside(host), registry=survey())
        recorded = sim.disk.visible.last_position

    assert sim.crashed == 1
    assert [event.position for event in listener.events] == list(range(1, recorded + 1))
    assert listener.ends == [(flow_id, "succeeded")]


def test_a_listener_beside_a_host_on_a_stormy_disk_starts_again_with_it() -> None:
    async def host(runtime: Runtime) -> None:
        flows = runtime.tasks.flow.bind_session(session_key="me")
        flow = await flows.create_managed(controller_id="survey", goal="g", idempotency_key="1")
        await flows.result(flow.flow_id)

    for seed in range(20):
        with Simulation(Schedule(seed=seed, faults=STORMY)) as sim:
            sim.run(Listener().beside(host), registry=survey())


# ---- stand-ins ------------------------------------------------------------------------------------


async def answer_slowly(whom: str) -> str:
    await asyncio.sleep(3600)
    return f"{whom}, after an hour"


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("yes", ["yes", "yes"]),
        (None, [None, None]),
        (lambda whom: whom.upper(), ["ADA", "GRACE"]),
        (answer_slowly, ["Ada, after an hour", "Grace, after an hour"]),
    ],
    ids=["a value", "none", "a function", "an async function"],
)
def test_a_stand_in_answers_in_the_place_of_a_task(answer: Any, state: list[Any]) -> None:
    with Simulation() as sim:
        flow = sim.run_flow(offline(survey(), {"ask": answer}), "survey")

    assert flow.state_json == state


@pytest.mark.parametrize("answer", [TimeoutError("no"), TimeoutError], ids=["instance", "class"])
def test_a_stand_in_raises_what_it_is_told_to_under_the_policy_of_the_task(answer: Any) -> None:
    with Simulation() as sim:
        flow = sim.run_flow(offline(survey(), {"ask": answer}), "survey")

        assert flow.status == "failed"
        assert "TimeoutError" in flow.failure.message
        assert sim._seconds > 2  # two retries were waited for


def test_a_task_without_an_answer_fails_and_names_itself() -> None:
    with Simulation() as sim:
        flow = sim.run_flow(offline(survey(), {}), "survey")

    assert "no answer for the task 'ask'" in flow.failure.message


def test_an_answer_for_a_task_nobody_registered_is_refused() -> None:
    with pytest.raises(ValueError, match="no task named aks is registered; registered are: ask"):
        offline(survey(), {"aks": "yes"})


def test_stand_ins_leave_the_registry_and_its_policies_as_they_were() -> None:
    registry = survey()
    before = registry.tasks["ask"]

    stood_in = offline(registry, {"ask": "yes"})

    assert registry.tasks["ask"] is before
    assert stood_in.tasks["ask"].retry == before.retry
    assert stood_in.tasks["ask"].function is not before.function


# ---- the plugin -----------------------------------------------------------------------------------

FLOW_TEST = """
import flowstead

def test_hello(flow_simulation):
    registry = flowstead.Registry()

    @registry.controller("hello")
    async def hello(flow):
        await flow.update(state_json="hello")

    flow = flow_simulation.run_flow(registry, "hello")

    assert flow.state_json == "hello"
    assert flow_simulation.crashed == EXPECTED
"""


@pytest.mark.parametrize(
    ("options", "crashed", "told"),
    [
        (["--flow-schedule", "seed=3 crashes=20,50"], 2, "1 passed"),
        (["--flow-schedule", "seed=3 crashs=20"], 0, "'crashs' is nothing a schedule knows"),
    ],
    ids=["scheduled", "misspelt"],
)
def test_the_fixture_gives_a_simulation_of_the_schedule_asked_for(
    tmp_path: Path, options: list[str], crashed: int, told: str
) -> None:
    test = tmp_path / "test_hello.py"
    test.write_text(FLOW_TEST.replace("EXPECTED", str(crashed)))

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:anyio", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert told in done.stdout + done.stderr


def test_a_failure_of_the_store_comes_out_where_the_disk_never_fails() -> None:
    async def host(runtime: Runtime) -> None:
        raise CommitFailed("of the host's own")

    with Simulation() as sim, pytest.raises(CommitFailed, match="of the host's own"):
        sim.run(host)
