"""Nested flows: a flow run as a child of another one, by its owner's eyes."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from flowstead import (
    CancelPending,
    ChildCancelled,
    ChildFailed,
    Fatal,
    Flow,
    FlowContext,
    LimitReached,
    Limits,
    NeedsReview,
    Nested,
    Retry,
    Task,
    TaskContext,
)
from flowstead.testing import Schedule, Simulation
from tests.faulty_store import holds_nothing
from tests.runtime.support import OWNER, STRANGER, Lives, bound, make


class Research:
    """A controller that runs topics as nested flows, and one for topics that does what their state says."""

    def __init__(self, lives: Lives) -> None:
        self.entered: Counter[str] = Counter()
        self.raised: list[BaseException] = []
        self.stopped: list[str] = []
        self.lives = lives
        registry = lives.registry
        registry.task(name="read")(self.read)
        registry.controller("research")(self.research)
        registry.controller("research/topic")(self.topic)

    async def research(self, flow: FlowContext) -> None:
        self.entered["research"] += 1
        try:
            answer = await flow.run(Nested("research/topic", goal="dig"), flow.state_json)
        except Exception as error:
            self.raised.append(error)
            raise
        await flow.finish(state_json={"answer": answer})

    async def topic(self, flow: FlowContext) -> None:
        self.entered["topic"] += 1
        state = flow.state_json
        match state:
            case {"read": seconds}:
                read = await flow.run("read", seconds)
                await flow.finish(state_json=[read])
            case "fails":
                raise ValueError("no such topic")
            case "fails by hand":
                await flow.fail(blocked_summary="nothing to be found")
            case _:
                await flow.update(state_json=[state, "found"])

    async def read(self, context: TaskContext, seconds: float) -> str:
        self.entered["read"] += 1
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.stopped.append(context.flow_id)
            raise
        return "read"

    def begin(self, state: Any, **given: Any) -> Flow:
        lives = self.lives
        return lives.play(make(lives.flows, controller_id="research", state_json=state, **given))

    def below(self, flow: Flow) -> Flow:
        """The flow that the one child of a flow stands for."""
        [task] = self.lives.children(flow.flow_id)
        assert task.child_flow_id is not None
        return self.lives.flow(task.child_flow_id)


@pytest.fixture
def research(lives: Lives) -> Research:
    return Research(lives)


# ---- how it ends ----------------------------------------------------------------------------------


def test_its_result_is_the_state_it_ends_with(lives: Lives, research: Research) -> None:
    flow = research.begin("moss")

    ended = lives.result(flow.flow_id)

    assert (ended.status, ended.state_json) == ("succeeded", {"answer": ["moss", "found"]})
    [task] = lives.children(flow.flow_id)
    assert (task.status, task.result_json, task.attempt) == ("succeeded", ["moss", "found"], 1)
    assert research.entered == {"research": 1, "topic": 1}
    assert holds_nothing(lives.runtime)


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ("fails", "ValueError", "ValueError: no such topic"),
        ("fails by hand", "failed", "nothing to be found"),
    ],
)
def test_its_failure_is_its_child_s(
    lives: Lives, research: Research, state: str, code: str, said: str
) -> None:
    flow = research.begin(state)

    ended = lives.result(flow.flow_id)

    [task] = lives.children(flow.flow_id)
    assert (ended.status, task.status) == ("failed", "failed")
    assert task.failure is not None
    below = research.below(flow)
    assert (task.failure.kind, task.failure.code) == ("flow_failed", code)
    assert task.failure.message == f"flow {below.flow_id} failed: {said}"
    [raised] = research.raised
    assert isinstance(raised, ChildFailed) and raised.task_id == task.task_id


def test_a_cancel_from_below_cancels_the_child_and_nothing_else(
    lives: Lives, research: Research
) -> None:
    flow = research.begin({"read": 60})
    lives.pass_time(1)
    below = research.below(flow)

    report = lives.play(lives.flows.cancel(below.flow_id))

    assert report.cancelled
    ended = lives.result(flow.flow_id)
    [task] = lives.children(flow.flow_id)
    assert (task.status, ended.status, ended.cancel_requested_at) == ("cancelled", "failed", None)
    assert task.failure is not None
    assert task.failure.message == f"flow {below.flow_id} cancelled"
    assert [type(error) for error in research.raised] == [ChildCancelled]
    assert research.stopped == [below.flow_id]


def test_the_parent_s_cancel_ends_everything_below_before_it_ends_itself(
    lives: Lives, research: Research
) -> None:
    flow = research.begin({"read": 60})
    lives.pass_time(1)

    report = lives.play(lives.flows.cancel(flow.flow_id))

    assert report.cancelled and report.flow is not None
    below = research.below(flow)
    [task], [deepest] = lives.children(flow.flow_id), lives.children(below.flow_id)
    assert {below.status, task.status, deepest.status} == {"cancelled"}
    ends = [deepest.ended_at, below.ended_at, task.ended_at, report.flow.ended_at]
    assert ends == sorted(ends, key=lambda at: at or 0)
    assert [(line.depth, line.task_id, line.state) for line in report.descendants] == [
        (0, task.task_id, "settled"),
        (1, deepest.task_id, "settled"),
    ]
    assert research.stopped == [below.flow_id]
    assert holds_nothing(lives.runtime)


@pytest.mark.parametrize("how", ["cancel_task", "step", "finish", "fail"])
def test_whatever_stops_the_child_cancels_its_flow(
    lives: Lives, research: Research, how: str
) -> None:
    @lives.registry.controller("impatient")
    async def impatient(flow: FlowContext) -> None:
        step = await flow.start(Nested("research/topic"), {"read": 60})
        await asyncio.sleep(1)
        if how == "step":
            await step.cancel()
            await step.outcome()
        elif how == "finish":
            await flow.finish()
        elif how == "fail":
            await flow.fail()
        else:
            await step.outcome()

    flow = lives.play(make(lives.flows, controller_id="impatient"))
    lives.pass_time(2)
    [task] = lives.children(flow.flow_id)
    if how == "cancel_task":
        assert lives.play(lives.flows.cancel_task(task.task_id)).cancelled

    lives.pass_time(1)

    assert lives.task(task.task_id).status == "cancelled"
    assert research.below(flow).status == "cancelled"
    assert lives.result(flow.flow_id).status == ("failed" if how == "fail" else "succeeded")
    assert len(research.stopped) == 1


def test_an_intent_is_passed_on_and_what_runs_may_finish(lives: Lives, research: Research) -> None:
    flow = research.begin({"read": 10})
    lives.pass_time(1)
    now = lives.flow(flow.flow_id)

    lives.play(lives.flows.request_cancel(flow_id=flow.flow_id, expected_revision=now.revision))
    lives.pass_time(1)

    below = research.below(flow)
    assert (below.status, below.cancel_started_at) == ("running", None)
    assert below.cancel_requested_at is not None
    assert lives.result(flow.flow_id).status == "succeeded"
    assert research.below(flow).status == "succeeded"
    assert research.stopped == []


def test_an_intent_lets_no_nested_flow_start_anything_new(lives: Lives, research: Research) -> None:
    raised: list[BaseException] = []

    @lives.registry.controller("two steps")
    async def two_steps(flow: FlowContext) -> None:
        await flow.run("read", 5, name="first")
        try:
            await flow.run("read", 5, name="second")
        except CancelPending as error:
            raised.append(error)
            raise

    @lives.registry.controller("top")
    async def top(flow: FlowContext) -> None:
        await flow.run(Nested("two steps"))

    flow = lives.play(make(lives.flows, controller_id="top"))
    lives.pass_time(1)
    now = lives.flow(flow.flow_id)

    lives.play(lives.flows.request_cancel(flow_id=flow.flow_id, expected_revision=now.revision))

    assert lives.result(flow.flow_id).status in ("cancelled", "failed")
    assert research.below(flow).status == "cancelled"
    assert research.entered["read"] == 1
    assert len(raised) == 1


# ---- what it is -----------------------------------------------------------------------------------


def test_it_is_a_flow_of_the_same_owner_whom_only_the_outermost_tells(
    lives: Lives, research: Research
) -> None:
    flows = lives.face(
        lambda runtime: runtime.tasks.flow.bind_session(
            session_key=OWNER, requester_origin={"channel": "chat"}
        )
    )
    flow = lives.play(
        make(
            flows,
            controller_id="research",
            state_json={"read": 5},
            correlation_id="crm:1",
            notify_policy="state_changes",
        )
    )
    lives.pass_time(1)

    below = research.below(flow)

    [task] = lives.children(flow.flow_id)
    assert (below.owner_key, below.requester_origin) == (OWNER, {"channel": "chat"})
    assert (below.correlation_id, below.notify_policy) == ("crm:1", "silent")
    assert (below.goal, below.controller_id) == ("dig", "research/topic")
    assert (below.parent_task_id, below.sync_mode) == (task.task_id, "managed")
    assert (task.run_id, task.task) == ("research/topic", "research/topic")
    [deepest] = lives.children(below.flow_id)
    assert deepest.delivery_status == "not_applicable"
    created = lives.history(flow.flow_id)[2]
    assert created.changed["childFlowId"] == below.flow_id


def test_a_stranger_sees_neither_the_flow_nor_what_is_below(
    lives: Lives, research: Research
) -> None:
    flow = research.begin({"read": 5})
    lives.pass_time(1)
    below = research.below(flow)
    stranger = lives.face(lambda runtime: bound(runtime, STRANGER))

    assert lives.play(stranger.list()) == []
    for flow_id in (flow.flow_id, below.flow_id):
        assert lives.play(stranger.get(flow_id)) is None
        assert lives.play(stranger.get_task_summary(flow_id, nested=True)) is None
        assert lives.play(stranger.cancel(flow_id)).code == "not_found"
    assert len(lives.play(lives.flows.list())) == 2


def test_counts_of_the_whole_tree_are_to_be_had(lives: Lives, research: Research) -> None:
    @lives.registry.controller("top")
    async def top(flow: FlowContext) -> None:
        await flow.map(Nested("research"), [{"read": 5}, "moss"], name="n")

    flow = lives.play(make(lives.flows, controller_id="top"))
    lives.pass_time(1)

    own = lives.play(lives.flows.get_task_summary(flow.flow_id))
    tree = lives.play(lives.flows.get_task_summary(flow.flow_id, nested=True))

    assert own is not None and tree is not None
    assert (own.total, own.active, own.terminal) == (2, 1, 1)
    assert (tree.total, tree.active, tree.terminal, tree.failures) == (5, 3, 2, 0)
    assert (tree.by_status["running"], tree.by_status["succeeded"]) == (3, 2)
    assert tree.by_runtime["task"] == 5
    assert set(tree.by_status) == set(own.by_status)
    assert lives.play(lives.admin.get_task_summary(flow.flow_id, nested=True)) == tree


def test_all_ways_to_take_a_step_take_nested_ones(lives: Lives, research: Research) -> None:
    @lives.registry.controller("all ways")
    async def all_ways(flow: FlowContext) -> None:
        topic = Nested("research/topic")
        begun = [await flow.start(topic, word, name=word) for word in ("a", "b")]
        await flow.finish(
            state_json={
                "run": await flow.run(topic, "c"),
                "map": await flow.map(topic, ["d", "e"], name="m", limit=1),
                "gather": await flow.gather(*begun),
                "fallback": await flow.run(topic, "fails", name="f", fallback=["answer"]),
                "outcomes": [
                    type(outcome).__name__
                    for outcome in await flow.map(
                        topic, ["fails", "g"], name="o", return_outcomes=True
                    )
                ],
            }
        )

    @lives.registry.task
    async def answer(_: TaskContext, given: Any) -> str:
        return f"instead of {given}"

    flow = lives.play(make(lives.flows, controller_id="all ways"))

    assert lives.result(flow.flow_id).state_json == {
        "run": ["c", "found"],
        "map": [["d", "found"], ["e", "found"]],
        "gather": [["a", "found"], ["b", "found"]],
        "fallback": "instead of fails",
        "outcomes": ["Failed", "Succeeded"],
    }


def test_it_can_be_run_by_hand_and_the_same_run_id_is_the_same_flow(
    lives: Lives, research: Research
) -> None:
    flow = lives.play(make(lives.flows))

    async def run() -> Any:
        return await lives.flows.run_task(
            flow_id=flow.flow_id, task="dig", run=Nested("research/topic"), input_json=1, run_id="r"
        )

    first, again = lives.play(run()), lives.play(run())

    assert (first.created, again.code) == (True, "duplicate")
    assert again.task.child_flow_id == first.task.child_flow_id
    lives.pass_time(1)
    assert lives.task(first.task.task_id).result_json == [1, "found"]
    assert lives.flow(str(first.task.child_flow_id)).goal == "dig"
    assert research.entered == {"topic": 1}


# ---- bounds ---------------------------------------------------------------------------------------


def test_flows_nest_as_deep_as_the_limit_and_no_deeper(lives: Lives) -> None:
    lives.limits = Limits(nested_depth=4)
    refused: list[tuple[int, LimitReached]] = []

    @lives.registry.controller("deeper")
    async def deeper(flow: FlowContext) -> None:
        assert isinstance(flow.state_json, int)
        try:
            await flow.run(Nested("deeper"), flow.state_json + 1)
        except LimitReached as error:
            refused.append((flow.state_json, error))

    flow = lives.play(make(lives.flows, controller_id="deeper", state_json=0))

    assert lives.result(flow.flow_id).status == "succeeded"
    [(depth, error)] = refused
    assert depth == 4
    assert error.reason == "Flow is nested 4 deep already; the limit is 4. Nothing was added."
    assert len(lives.play(lives.flows.list())) == 5


def test_the_depth_counts_also_for_children_added_by_hand(lives: Lives, research: Research) -> None:
    lives.limits = Limits(nested_depth=1)
    flow = research.begin({"read": 60})
    lives.pass_time(1)
    below = research.below(flow)

    refused = lives.play(
        lives.flows.run_task(flow_id=below.flow_id, task="t", run=Nested("research/topic"))
    )

    assert (refused.created, refused.code, refused.found) == (False, "limit_reached", True)
    with pytest.raises(LimitReached):
        refused.unwrap()


def test_no_more_flows_live_under_one_than_the_limit(lives: Lives, research: Research) -> None:
    lives.limits = Limits(nested_flows=3, running_children=100)

    @lives.registry.controller("top")
    async def top(flow: FlowContext) -> None:
        outcomes = await flow.map(
            Nested("research"), [{"read": 5}] * 4, name="n", return_outcomes=True
        )
        await flow.finish(state_json=[type(outcome).__name__ for outcome in outcomes])

    flow = lives.play(make(lives.flows, controller_id="top"))

    ended = lives.result(flow.flow_id)

    assert isinstance(ended.state_json, list)
    assert "Failed" in ended.state_json
    failed = [
        task.failure
        for one in lives.play(lives.flows.list())
        for task in lives.children(one.flow_id)
        if task.status == "failed" and task.failure and task.failure.kind == "limit_reached"
    ]
    assert failed
    message = "3 flows are alive under one already; the limit is 3"
    assert {failure.message for failure in failed} == {message}


def test_the_limit_counts_the_living_and_each_tree_for_itself(
    lives: Lives, research: Research
) -> None:
    lives.limits = Limits(nested_flows=2)

    @lives.registry.controller("top")
    async def top(flow: FlowContext) -> None:
        await flow.map(Nested("research/topic"), [{"read": 1}] * 6, limit=2)

    flows = [lives.play(make(lives.flows, controller_id="top")) for _ in range(3)]

    for flow in flows:
        assert lives.result(flow.flow_id).status == "succeeded"
    assert not lives.runtime._code._census._alive


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"retry": Retry()}, "a nested flow is not retried as a whole; its own steps are."),
        ({"idempotent": False}, "a nested flow is not retried as a whole; its own steps are."),
        ({"idle_timeout": 5}, "a nested flow gives no sign of life; use timeout."),
    ],
)
def test_a_policy_that_makes_no_sense_for_a_flow_is_misuse(
    lives: Lives, research: Research, given: dict[str, Any], sentence: str
) -> None:
    flow = lives.play(make(lives.flows))

    with pytest.raises(ValueError, match=sentence):
        lives.play(
            lives.flows.run_task(
                flow_id=flow.flow_id, task="t", run=Nested("research/topic"), **given
            )
        )

    assert lives.children(flow.flow_id) == []


def test_a_controller_that_nobody_registered_fails_the_one_that_asks(lives: Lives) -> None:
    @lives.registry.controller("lonely")
    async def lonely(flow: FlowContext) -> None:
        await flow.run(Nested("nobody"))

    flow = lives.play(make(lives.flows, controller_id="lonely"))

    ended = lives.result(flow.flow_id)
    assert ended.failure is not None and ended.failure.message is not None
    assert "no controller 'nobody' is registered; registered are: lonely." in ended.failure.message


# ---- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "close"])
def test_the_next_process_goes_on_with_the_same_nested_flow(
    lives: Lives, research: Research, how: str
) -> None:
    flow = research.begin({"read": 5})
    lives.pass_time(1)
    below = research.below(flow)

    for _ in range(3):
        lives.restart(how)
        lives.pass_time(1)

    ended = lives.result(flow.flow_id)
    assert ended.state_json == {"answer": ["read"]}
    assert research.below(flow).flow_id == below.flow_id
    assert len(lives.play(lives.flows.list())) == 2
    [task] = lives.children(flow.flow_id)
    assert (task.status, task.attempt) == ("succeeded", 1)
    [deepest] = lives.children(below.flow_id)
    assert deepest.attempt == (4 if how == "kill" else 1)


def test_a_crash_at_any_step_makes_no_second_nested_flow() -> None:
    crashed = 0
    for after in range(0, 120, 2):
        with Simulation(Schedule(seed=after, crashes=(after,))) as world:
            lives = Lives(world)
            research = Research(lives)
            ended = world.run_flow(lives.registry, "research", state_json={"read": 0.2})

            assert (ended.status, ended.state_json) == ("succeeded", {"answer": ["read"]})
            assert research.entered["topic"] >= 1
            flows = world.run(lambda runtime: bound(runtime, "agent:simulated").list())
            assert len(flows) == 2
            crashed += world.crashed
    assert crashed > 50, "vacuous: the flow had ended before the crash"


@pytest.mark.parametrize("how", ["kill", "close"])
def test_a_nested_flow_that_ended_while_nobody_stood_for_it_ends_its_child(
    lives: Lives, research: Research, how: str
) -> None:
    known = lives.registry
    flow = research.begin({"read": 60})
    lives.pass_time(1)
    below = research.below(flow)
    lives.restart(how)
    lives.registry = type(known)()
    stopped = lives.play(lives.flows.cancel(below.flow_id))
    assert stopped.found
    lives.restart("close")

    lives.registry = known
    lives.pass_time(1)

    ended = lives.result(flow.flow_id)
    assert ended.status == "failed"
    [task] = lives.children(flow.flow_id)
    assert task.status == "cancelled"


@pytest.mark.parametrize("how", ["kill", "close"])
def test_a_parent_cancelled_just_before_the_process_ends_takes_what_is_below_along(
    lives: Lives, research: Research, how: str
) -> None:
    release: list[bool] = []

    @lives.registry.task(name="slow to stop")
    async def slow_to_stop(_: TaskContext, __: Any) -> None:
        while not release:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue

    @lives.registry.controller("inner")
    async def inner(flow: FlowContext) -> None:
        await flow.run("slow to stop")

    @lives.registry.controller("outer")
    async def outer(flow: FlowContext) -> None:
        await flow.run(Nested("inner"))

    flow = lives.play(make(lives.flows, controller_id="outer"))
    lives.pass_time(1)
    report = lives.play(lives.flows.cancel(flow.flow_id, grace=0.5))
    assert report.code == "cancel_pending"
    assert [(line.depth, line.state) for line in report.descendants] == [
        (0, "running"),
        (1, "running"),
    ]
    release.append(True)

    lives.restart(how)
    assert lives.flows

    assert lives.result(flow.flow_id).status == "cancelled"
    below = research.below(flow)
    assert below.status == "cancelled"
    [deepest] = lives.children(below.flow_id)
    # Closing waits for code, and what it returns in the end is kept.
    assert deepest.status == ("cancelled" if how == "kill" else "succeeded")


def test_a_review_below_blocks_only_the_flow_it_is_in(lives: Lives) -> None:
    @lives.registry.task
    async def ask(_: TaskContext, given: Any) -> Any:
        if given is None:
            raise NeedsReview("what is it about?")
        return given

    @lives.registry.controller("inner")
    async def inner(flow: FlowContext) -> None:
        await flow.finish(state_json=await flow.run("ask"))

    @lives.registry.controller("outer")
    async def outer(flow: FlowContext) -> None:
        await flow.finish(state_json=await flow.run(Nested("inner")))

    flow = lives.play(make(lives.flows, controller_id="outer"))
    lives.pass_time(1)
    [task] = lives.children(flow.flow_id)
    below = lives.flow(str(task.child_flow_id))
    assert (below.status, lives.flow(flow.flow_id).status) == ("blocked", "running")

    lives.play(lives.flows.retry_task(str(below.blocked_task_id), input_json="moss"))

    assert lives.result(flow.flow_id).state_json == "moss"


def test_a_fatal_failure_below_keeps_its_word(lives: Lives) -> None:
    """The nested flow's own code decides about retries; its child above has one attempt."""
    tried: list[int] = []

    @lives.registry.task(retry=Retry(max_attempts=3, initial=1))
    async def attempt(context: TaskContext, last: int) -> None:
        tried.append(context.attempt)
        if context.attempt == last:
            raise Fatal("that was it")
        raise ConnectionError

    @lives.registry.controller("inner")
    async def inner(flow: FlowContext) -> None:
        await flow.run("attempt", 2)

    @lives.registry.controller("outer")
    async def outer(flow: FlowContext) -> None:
        await flow.run(Nested("inner"))

    flow = lives.play(make(lives.flows, controller_id="outer"))

    assert lives.result(flow.flow_id).status == "failed"
    assert tried == [1, 2]
    [task] = lives.children(flow.flow_id)
    assert isinstance(task, Task) and task.attempt == 1
