"""Select: the first of several steps to end, of whatever kind; the others are withdrawn; the same in each run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flowstead import (
    Cancelled,
    CancelPending,
    ChildError,
    Event,
    FlowContext,
    Registry,
    Runtime,
    Step,
    Succeeded,
    TaskContext,
    TimedOut,
)
from flowstead.store.memory import MemoryStore
from flowstead.testing import Schedule, Simulation
from tests.faulty_store import flows_of, new_flow, running, until
from tests.runtime.support import Lives, bound, make
from tests.runtime.waiting import begun, in_memory, open_waits, registry_of, reopened, signalled

KEY = {"thread": 1}


class Race:
    """A signal, a timer and a child, of which the first to end is taken."""

    def __init__(self, *, timer: float = 100.0, works: float = 1e6, fails: bool = False) -> None:
        self.timer = timer
        self.works = works
        self.fails = fails
        self.won: list[str] = []
        """The winner of each run of the controller that got to know it."""
        self.worked = 0

    def registry(self) -> Registry:
        registry = registry_of(race=self.race)
        registry.task(name="work")(self.work)
        return registry

    async def work(self, _context: TaskContext, _input: Any) -> str:
        self.worked += 1
        await asyncio.sleep(self.works)
        if self.fails:
            raise ValueError("no work")
        return "worked"

    async def steps(self, flow: FlowContext) -> list[Step]:
        return [
            await flow.open_wait("signal", key=KEY),
            await flow.start_timer("timer", self.timer),
            await flow.start("work", name="child"),
        ]

    async def race(self, flow: FlowContext) -> None:
        winner = await flow.select(*await self.steps(flow))
        self.won.append(winner.name)
        outcome = await winner.outcome()
        told = outcome.result if isinstance(outcome, Succeeded) else type(outcome).__name__
        await flow.sleep("afterwards", 1000)
        await flow.finish(state_json={"answered": [winner.name, told]})


WINNERS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "signal": ({}, "word", "cancelled"),
    "timer": ({"timer": 30.0}, None, "cancelled"),
    "child": ({"works": 30.0}, "worked", "succeeded"),
    "child that fails": ({"works": 30.0, "fails": True}, "Failed", "failed"),
}


def played(lives: Lives, winner: str, *, parked: bool = False) -> tuple[Race, str]:
    """A race that has its winner."""
    given, _, _ = WINNERS[winner]
    race = Race(**given)
    lives.registry = race.registry()
    flow_id = begun(lives, "race", 20 if parked else 0.1)
    assert lives.flow(flow_id).status == "waiting"
    assert len(lives.flow(flow_id).wait_json["anyOf"]) == 2
    if winner == "signal":
        signalled(lives, "word", key=KEY)
    lives.pass_time(35)
    return race, flow_id


@pytest.mark.parametrize("how", [None, "kill", "close"])
@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("winner", WINNERS)
def test_the_first_to_end_wins_the_others_are_withdrawn_and_every_run_sees_the_same(
    lives: Lives, winner: str, parked: bool, how: str | None
) -> None:
    race, flow_id = played(lives, winner, parked=parked)
    _, told, child_status = WINNERS[winner]
    name = winner.partition(" ")[0]
    if how is not None:
        reopened(lives, how)

    lives.pass_time(1100)

    assert lives.result(flow_id).state_json == {"answered": [name, told]}
    assert set(race.won) == {name}
    assert len(race.won) > 1, "vacuous: the controller was never run again"
    ends = {task.run_id: task.status for task in lives.children(flow_id)}
    assert ends.pop("afterwards") == "succeeded"
    assert ends.pop("child") == child_status
    assert ends == {"signal": "cancelled", "timer": "cancelled"} | (
        {name: "succeeded"} if name in ends else {}
    )
    assert open_waits(lives) == []


@pytest.mark.parametrize("parked", [False, True])
def test_a_child_that_runs_and_has_lost_is_stopped_long_before_its_flow_ends(
    lives: Lives, parked: bool
) -> None:
    _, flow_id = played(lives, "signal", parked=parked)

    assert lives.flow(flow_id).status == "waiting"
    ends = {task.run_id: task.status for task in lives.children(flow_id)}
    assert ends == {
        "signal": "succeeded",
        "timer": "cancelled",
        "child": "cancelled",
        "afterwards": "queued",
    }


def test_a_loser_can_not_be_answered_any_more(lives: Lives) -> None:
    _, _ = played(lives, "timer")

    report = signalled(lives, "too late", key=KEY, lifetime=None)

    assert report.matched == 0


@pytest.mark.parametrize("between", ["live", "without its controller"])
def test_a_signal_after_the_win_is_for_the_next_wait_and_not_for_a_loser(
    lives: Lives, between: str
) -> None:
    async def rounds(flow: FlowContext) -> None:
        got = []
        for number in range(2):
            reply = await flow.open_wait(f"reply {number}", key=KEY)
            timer = await flow.start_timer(f"timer {number}", 60)
            got.append(await (await flow.select(reply, timer)).result())
        await flow.finish(state_json=got)

    lives.registry = registry_of(rounds=rounds)
    flow_id = begun(lives, "rounds", 30)
    if between == "live":
        lives.play(_until_resumed(lives, flow_id))
    else:
        known, lives.registry = lives.registry, Registry()
        reopened(lives, "kill", 60)

    # In the same steps of the loop in which the timer has won, or days before anybody withdraws what has lost.
    report = lives.play(lives.flows.signal(key=KEY, payload="word"))

    assert report.code in ("kept", "matched")
    if between != "live":
        assert report.kept
        lives.registry = known
        reopened(lives, "close")
    assert lives.result(flow_id).state_json == [None, "word"]


async def _until_resumed(lives: Lives, flow_id: str) -> None:
    async with lives.flows.watch(flow_id) as events:
        async for event in events:
            if event.type == "flow.resumed":
                return


def test_a_wait_that_times_out_wins_too(lives: Lives) -> None:
    async def brief(flow: FlowContext) -> None:
        steps = [await flow.open_wait("a", timeout=10.0), await flow.open_wait("b", key=KEY)]
        winner = await flow.select(*steps)
        assert isinstance(await winner.outcome(), TimedOut)
        await flow.finish(state_json=winner.name)

    lives.registry = registry_of(brief=brief)
    flow_id = begun(lives, "brief", 11)

    assert lives.result(flow_id).state_json == "a"


@pytest.mark.parametrize("down", [None, "kill", "close"])
@pytest.mark.parametrize("soon", ["timer", "wait", "reminded"])
def test_of_what_came_due_while_nobody_lived_the_earliest_wins_as_if_somebody_had(
    lives: Lives, soon: str, down: str | None
) -> None:
    async def patient(flow: FlowContext) -> None:
        remind = [3590.0] if soon == "reminded" else ()
        steps = [await flow.open_wait("late", timeout=3600.0, remind=remind)]
        if soon == "wait":
            steps.append(await flow.open_wait("soon", timeout=60.0))
        else:
            steps.append(await flow.start_timer("soon", 60.0))
        winner = await flow.select(*steps)
        await flow.finish(state_json=winner.name)

    lives.registry = registry_of(patient=patient)
    flow_id = begun(lives, "patient", 5)
    if down is not None:
        lives.restart(down)
        lives.world._seconds += 2 * 3600.0

    lives.pass_time(2 * 3600.0)

    assert lives.result(flow_id).state_json == "soon"


def test_of_two_that_ended_before_anybody_looked_the_first_in_the_history_wins(
    lives: Lives,
) -> None:
    async def two(flow: FlowContext) -> None:
        steps = [await flow.open_wait(name) for name in ("a", "b", "c")]
        await flow.sleep("look away", 50)
        winner = await flow.select(*steps)
        await flow.finish(state_json=winner.name)

    lives.registry = registry_of(two=two)
    flow_id = begun(lives, "two")
    for name in ("c", "a"):
        signalled(lives, name, flow_id=flow_id, name=name)

    lives.pass_time(51)

    assert lives.result(flow_id).state_json == "c"
    statuses = {task.run_id: task.status for task in lives.children(flow_id) if task.run_id}
    assert statuses["a"] == statuses["c"] == "succeeded" and statuses["b"] == "cancelled"


def test_a_crash_at_any_step_between_the_win_and_the_withdrawal_changes_no_winner() -> None:
    runs = crashes = 0
    for winner in ("signal", "timer"):
        with Simulation() as world:
            first, steps, *_ = world.run(_raced(winner), registry=_race().registry), world.steps
        for at in range(8, steps, max(1, steps // 25)):
            race = _race()
            with Simulation(Schedule(seed=at, crashes=(at,))) as world:
                ended = world.run(_raced(winner), registry=race.registry)
                crashes += world.crashed
            assert ended in (first, [winner, first[1]]), (winner, at)
            assert len(set(race.won)) == 1, (at, race.won)
            runs += len(race.won) > 1
    assert crashes > 30 and runs > 5, "vacuous: the controller was hardly ever run twice"


def _race() -> Race:
    return Race(timer=30.0)


def _raced(winner: str) -> Any:
    async def host(runtime: Runtime) -> list[Any]:
        flows = bound(runtime)
        flow = await flows.get("f") or await make(flows, controller_id="race", flow_id="f")
        if winner == "signal":
            await asyncio.sleep(0.1)
            await flows.signal(payload="word", key=KEY, id="s-1")
        ended = await flows.result(flow.flow_id)
        answered: list[Any] = ended.state_json["answered"]
        return answered

    return host


# ---- its edges ------------------------------------------------------------------------------------


def test_nothing_to_select_from_is_an_error_and_one_step_twice_is_one(lives: Lives) -> None:
    async def odd(flow: FlowContext) -> None:
        with pytest.raises(ValueError, match="at least one"):
            await flow.select()
        timer = await flow.start_timer("timer", 5)
        assert await flow.select(timer, timer) is timer
        assert (await timer.ended()).status == "succeeded"
        assert await flow.select(timer) is timer

    lives.registry = registry_of(odd=odd)
    flow_id = begun(lives, "odd", 10)

    assert lives.result(flow_id).status == "succeeded"


class CountingStore(MemoryStore):
    """Counts the events that are read from it."""

    read = 0

    async def history(self, *args: Any, **kwargs: Any) -> list[Event]:
        page = await super().history(*args, **kwargs)
        self.read += len(page)
        return page


async def test_a_run_of_a_controller_reads_its_history_once_however_often_it_selects() -> None:
    async def work(_context: TaskContext, given: Any) -> Any:
        return given

    async def many(flow: FlowContext) -> None:
        for number in range(20):
            signal = await flow.open_wait(f"signal {number}")
            child = await flow.start(work, number, name=f"child {number}")
            assert await flow.select(signal, child) == child
        runs.append(flow.revision)
        await asyncio.Event().wait()

    runs: list[int] = []
    store, flow_id = CountingStore(), ""
    for run in range(2):
        store = CountingStore(store.tables)
        async with running(store, registry=registry_of(many=many)) as runtime:
            flows = flows_of(runtime)
            flow_id = flow_id or await new_flow(flows, "many")
            await until(lambda run=run: len(runs) > run)
            read = store.read

            events = await flows.history(flow_id, limit=1000)
            assert 20 <= read <= len(events)


GIVEN: dict[str, Callable[..., Awaitable[Any]]] = {
    "select": lambda flow, *steps: flow.select(*steps),
    "gather": lambda flow, *steps: flow.gather(*steps),
    "first": lambda flow, *steps: flow.first(steps),
    "as_completed": lambda flow, *steps: anext(flow.as_completed(steps)),
}


@pytest.mark.parametrize("how", GIVEN)
def test_what_is_no_step_is_misuse_whoever_is_given_it(lives: Lives, how: str) -> None:
    give = GIVEN[how]

    async def odd(flow: FlowContext) -> None:
        step = await flow.start_timer("timer", 5)
        for wrong in (flow.sleep("nap", 5), await flow.sleep("other nap", 1), "timer", [step]):
            with pytest.raises(TypeError, match="a step is needed"):
                await give(flow, step, wrong)
        assert await flow.select(step) is step

    lives.registry = registry_of(odd=odd)
    flow_id = begun(lives, "odd", 20)

    assert lives.result(flow_id).status == "succeeded", lives.result(flow_id).failure
    assert {task.run_id for task in lives.children(flow_id)} == {"timer", "other nap"}


def test_a_select_over_children_alone_waits_like_their_results(lives: Lives) -> None:
    async def works(_context: TaskContext, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def children(flow: FlowContext) -> None:
        steps = [await flow.start("works", s, name=f"s-{s}") for s in (50.0, 20.0, 80.0)]
        winner = await flow.select(*steps)
        await flow.finish(state_json=await winner.result())

    lives.registry = registry_of(children=children)
    lives.registry.task(works)
    flow_id = begun(lives, "children", 15)
    assert lives.flow(flow_id).status == "running"

    lives.pass_time(10)

    assert lives.result(flow_id).state_json == 20.0


def test_a_child_that_is_selected_over_goes_on_while_its_controller_is_parked(
    lives: Lives,
) -> None:
    race, flow_id = Race(works=200.0, timer=1e6), None
    lives.registry = race.registry()
    flow_id = begun(lives, "race", 30)
    assert "flow.parked" in lives.told(flow_id)
    assert in_memory(lives) == 1, "its child runs here"

    lives.pass_time(200)

    assert race.won == ["child"]
    assert race.worked == 1


@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("parked", [False, True])
def test_a_bare_child_that_was_cut_off_runs_again_though_its_controller_stands_or_is_parked(
    lives: Lives, parked: bool, how: str
) -> None:
    begins = 0

    async def bare(_context: TaskContext, _input: Any) -> str:
        nonlocal begins
        begins += 1
        await asyncio.sleep(50)
        return "worked"

    async def either(flow: FlowContext) -> None:
        steps = [await flow.start(bare, name="bare"), await flow.open_wait("signal", key=KEY)]
        winner = await flow.select(*steps)
        await flow.finish(state_json=[winner.name, await winner.result()])

    lives.registry = registry_of(either=either)
    flow_id = begun(lives, "either", 20 if parked else 0.1)
    reopened(lives, how)

    lives.pass_time(100)

    assert begins == 2
    assert lives.result(flow_id).state_json == ["bare", "worked"]


def test_an_intent_while_selecting_withdraws_everything_and_ends_the_flow(lives: Lives) -> None:
    raised: list[BaseException] = []

    async def selects(flow: FlowContext) -> None:
        steps = [await flow.open_wait("a"), await flow.start_timer("b", 100)]
        try:
            winner = await flow.select(*steps)
            outcome = await winner.outcome()
            assert isinstance(outcome, Cancelled)
            await flow.wait("new one")
        except (CancelPending, ChildError) as error:
            raised.append(error)
            raise

    lives.registry = registry_of(selects=selects)
    flow_id = begun(lives, "selects")
    revision = lives.flow(flow_id).revision

    lives.play(lives.flows.request_cancel(flow_id=flow_id, expected_revision=revision))
    lives.pass_time(1)

    assert lives.flow(flow_id).status == "cancelled"
    assert [type(error) for error in raised] == [CancelPending]
    assert open_waits(lives) == []


def test_a_cancelled_select_withdraws_nothing_and_lets_the_flow_go_on(lives: Lives) -> None:
    seen: list[Any] = []

    async def impatient(flow: FlowContext) -> None:
        steps = [await flow.open_wait("a"), await flow.start_timer("b", 100)]
        selecting = asyncio.create_task(flow.select(*steps))
        await asyncio.sleep(1)
        selecting.cancel()
        await asyncio.wait({selecting})
        await asyncio.sleep(1)
        now = await lives.flows.get(flow.flow_id)
        assert now is not None
        left = [task.status for task in await lives.flows.list_tasks(flow.flow_id)]
        seen.append((now.status, now.wait_json, left))
        winner = await flow.select(*steps)
        seen.append(winner.name)

    lives.registry = registry_of(impatient=impatient)
    flow_id = begun(lives, "impatient", 0.5)
    assert lives.flow(flow_id).status == "waiting"
    lives.pass_time(3)
    assert lives.flow(flow_id).status == "waiting"

    signalled(lives, flow_id=flow_id, name="a")

    assert lives.result(flow_id).status == "succeeded"
    assert seen == [("running", None, ["queued", "queued"]), "a"]
