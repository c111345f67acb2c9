"""The report of a cancel: one line for each descendant that was alive when it began, and what became of it."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from flowstead import (
    CancelReport,
    Flow,
    FlowContext,
    Limits,
    Nested,
    Settlement,
    TaskContext,
    open_runtime,
)
from flowstead.testing import ManualClock
from tests.runtime.support import Lives, Where, bound, link, make

SHORT = Limits(kill_after=5, abandon_after=25)


class Crew:
    """Children of every temper."""

    def __init__(self, lives: Lives) -> None:
        self.lives = lives
        self.may_end = asyncio.Event()
        lives.limits = SHORT
        for function in (self.obeys, self.lingers, self.endures, self.never, self.clumsy):
            lives.registry.task(function)
        lives.registry.controller("crew")(self.drive)
        lives.registry.controller("leader")(self.lead)

    async def obeys(self, _: TaskContext, __: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async def clumsy(self, _: TaskContext, __: Any) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            raise ValueError("dropped it")

    async def lingers(self, _: TaskContext, __: Any) -> None:
        """Takes two seconds to clean up: less than a kill takes."""
        await _stays(2)

    async def endures(self, _: TaskContext, __: Any) -> None:
        """Takes ten: more than a kill takes, less than it is given."""
        await _stays(10)

    async def never(self, _: TaskContext, __: Any) -> None:
        await _stays(10_000)

    async def drive(self, flow: FlowContext) -> None:
        assert isinstance(flow.state_json, list)
        for name in flow.state_json:
            await flow.start(name, name=name)
        await self.may_end.wait()

    async def lead(self, flow: FlowContext) -> None:
        assert isinstance(flow.state_json, list)
        mine, *others = flow.state_json
        await flow.start(mine, name=mine)
        if others:
            await flow.run(Nested("leader"), others, name="below")
        await self.may_end.wait()

    def begin(self, *names: str, controller_id: str = "crew") -> Flow:
        flow = self.lives.play(
            make(self.lives.flows, controller_id=controller_id, state_json=list(names))
        )
        self.lives.pass_time(1)
        return self.lives.flow(flow.flow_id)


async def _stays(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        await loop.create_future()
    except asyncio.CancelledError:
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                continue
        raise


@pytest.fixture
def crew(lives: Lives) -> Crew:
    return Crew(lives)


def _cancel(lives: Lives, flow: Flow, grace: float = 5) -> CancelReport:
    return lives.play(lives.flows.cancel(flow.flow_id, grace=grace))


def _by_name(report: CancelReport) -> dict[str | None, Settlement]:
    return {line.run_id: line for line in report.descendants}


def _seconds(line: Settlement, at: int | None) -> float | None:
    """After the cancel was asked for, to the tenth."""
    assert line.asked_at is not None
    return None if at is None else round((at - line.asked_at) / 1000, 1)


# ---- the states of a line -------------------------------------------------------------------------


def test_a_child_that_ends_when_asked_has_settled(lives: Lives, crew: Crew) -> None:
    flow = crew.begin("obeys", "clumsy")

    report = _cancel(lives, flow)

    assert (report.cancelled, report.code, report.reason) == (True, None, None)
    assert report.flow is not None and report.flow.cancel_requested_at is not None
    lines = _by_name(report)
    assert {line.state for line in report.descendants} == {"settled"}
    assert lines["obeys"].why == "stopped on request"
    assert lines["clumsy"].why == "stopped on request; then ValueError: dropped it"
    for line in report.descendants:
        task = lives.task(line.task_id)
        assert (line.flow_id, line.task, line.depth) == (flow.flow_id, task.task, 0)
        assert (line.status, line.ended_at) == ("cancelled", task.ended_at)
        assert line.asked_at == report.flow.cancel_requested_at
        assert line.killed_at is None


def test_a_child_that_takes_its_time_has_settled_if_it_was_not_killed(
    lives: Lives, crew: Crew
) -> None:
    report = _cancel(lives, crew.begin("lingers"))

    [line] = report.descendants
    assert report.cancelled
    assert (line.state, line.killed_at) == ("settled", None)
    assert _seconds(line, line.ended_at) == 2


def test_a_child_that_had_to_be_killed_says_when(lives: Lives, crew: Crew) -> None:
    report = _cancel(lives, crew.begin("endures", "obeys"), grace=60)

    assert (report.cancelled, report.code) == (True, None)
    lines = _by_name(report)
    assert (lines["endures"].state, lines["obeys"].state) == ("killed", "settled")
    assert _seconds(lines["endures"], lines["endures"].killed_at) == 5
    assert _seconds(lines["endures"], lines["endures"].ended_at) == 10


def test_a_child_that_was_given_up_is_told_and_nothing_is_called_cancelled(
    lives: Lives, crew: Crew
) -> None:
    report = _cancel(lives, crew.begin("never", "obeys"), grace=60)

    assert report.flow is not None
    assert (report.cancelled, report.code, report.flow.status) == (False, "abandoned", "cancelled")
    assert report.reason == (
        "Flow is cancelled, but code of it that would not stop was given up and may still run."
    )
    line = _by_name(report)["never"]
    assert (line.state, line.status) == ("abandoned", "cancelled")
    assert line.why == "would not stop and was given up; its code may still run"
    assert (_seconds(line, line.killed_at), _seconds(line, line.ended_at)) == (5, 30)
    assert _by_name(report)["obeys"].state == "settled"
    assert lives.face(lambda runtime: runtime.statistics()).abandoned == 1


def test_a_child_that_has_not_ended_yet_is_running_and_says_why(lives: Lives, crew: Crew) -> None:
    report = _cancel(lives, crew.begin("never", "obeys"), grace=3)

    assert (report.cancelled, report.code) == (False, "cancel_pending")
    assert report.reason == "One or more child tasks are still active."
    lines = _by_name(report)
    line = lines["never"]
    assert (line.state, line.status, line.ended_at) == ("running", "running", None)
    assert line.why == "it was asked to stop, and its code has not ended yet"
    assert [task.run_id for task in report.tasks] == ["never"]
    assert lines["obeys"].state == "settled"


def test_the_same_cancel_asked_again_tells_how_far_it_has_come(lives: Lives, crew: Crew) -> None:
    flow = crew.begin("never")
    seen = []

    for grace in (1, 10, 60):
        report = _cancel(lives, flow, grace)
        [line] = report.descendants
        seen.append((report.code, line.state, _seconds(line, line.killed_at)))

    assert seen == [
        ("cancel_pending", "running", None),
        ("cancel_pending", "running", 5),
        ("abandoned", "abandoned", 5),
    ]
    again = _cancel(lives, flow)
    assert (again.cancelled, again.code, again.descendants) == (False, "terminal", [])


@pytest.mark.parametrize("how", ["kill", "close"])
def test_the_report_of_the_next_process_goes_on_where_this_one_stopped(
    lives: Lives, crew: Crew, how: str
) -> None:
    flow = crew.begin("never", "lingers")
    first = _by_name(_cancel(lives, flow, grace=1))

    lives.restart(how)
    assert lives.flows
    ended = lives.result(flow.flow_id)

    assert ended.status == "cancelled"
    for line in first.values():
        task = lives.task(line.task_id)
        assert (task.status, task.cancel_requested_at) == ("cancelled", line.asked_at)


# ---- which lines there are ------------------------------------------------------------------------


def test_children_that_stood_in_line_are_told_and_those_that_had_ended_are_not(
    lives: Lives, crew: Crew
) -> None:
    lives.limits = Limits(running_children=2)

    async def add() -> str:
        flow = await make(lives.flows)
        done = await link(lives.flows, flow.flow_id, run_id="done")
        await lives.flows.complete_task(done.task_id)
        await asyncio.sleep(1)
        for number in range(4):
            await lives.flows.run_task(
                flow_id=flow.flow_id, task="t", run=crew.obeys, run_id=f"launched {number}"
            )
        await link(lives.flows, flow.flow_id, run_id="linked")
        await link(lives.flows, flow.flow_id, run_id="linked, queued", status="queued")
        await asyncio.sleep(1)
        return flow.flow_id

    assert lives.runtime
    flow_id = lives.play(add())

    report = lives.play(lives.flows.cancel(flow_id))

    assert report.cancelled and len(report.tasks) == 7
    lines = _by_name(report)
    assert list(lines) == [
        *(f"launched {number}" for number in range(4)),
        "linked",
        "linked, queued",
    ]
    whys = {line.why for line in report.descendants}
    assert whys == {"stopped on request", "flow cancelled"}
    assert lines["launched 3"].why == lines["linked"].why == "flow cancelled"
    assert all(line.ended_at is not None for line in report.descendants)


async def test_a_child_that_ended_in_the_same_instant_was_not_alive(
    store: Where, clock: ManualClock
) -> None:
    async with open_runtime(store, clock=clock) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        done = await link(flows, flow.flow_id, run_id="done")
        await link(flows, flow.flow_id, run_id="alive")
        await flows.complete_task(done.task_id)

        report = await flows.cancel(flow.flow_id)

        assert report.cancelled
        assert [line.run_id for line in report.descendants] == ["alive"]


def test_what_ended_between_the_request_and_the_cancel_is_told(lives: Lives, crew: Crew) -> None:
    async def begin() -> str:
        flow = await make(lives.flows)
        first = await link(lives.flows, flow.flow_id, run_id="first")
        await link(lives.flows, flow.flow_id, run_id="second")
        await asyncio.sleep(1)
        await lives.flows.request_cancel(flow_id=flow.flow_id, expected_revision=0)
        await asyncio.sleep(1)
        await lives.flows.complete_task(first.task_id)
        await asyncio.sleep(1)
        return flow.flow_id

    assert lives.runtime
    flow_id = lives.play(begin())
    report = lives.play(lives.flows.cancel(flow_id))

    lines = _by_name(report)
    assert (lines["first"].status, lines["second"].status) == ("succeeded", "cancelled")
    assert {line.state for line in report.descendants} == {"settled"}
    assert _seconds(lines["first"], lines["first"].ended_at) == 1
    assert _seconds(lines["second"], lines["second"].ended_at) == 2


def test_a_whole_tree_is_told_parents_before_their_children(lives: Lives, crew: Crew) -> None:
    flow = crew.begin("obeys", "lingers", "endures", "obeys", controller_id="leader")

    report = _cancel(lives, flow, grace=60)

    assert (report.cancelled, report.code) == (True, None)
    told = [(line.depth, line.run_id, line.state) for line in report.descendants]
    assert told == [
        (0, "obeys", "settled"),
        (0, "below", "settled"),
        (1, "lingers", "settled"),
        (1, "below", "settled"),
        (2, "endures", "killed"),
        (2, "below", "settled"),
        (3, "obeys", "settled"),
    ]
    flows = {line.flow_id for line in report.descendants}
    assert len(flows) == 4
    for line in report.descendants:
        task = lives.task(line.task_id)
        assert line.flow_id == task.flow_id and line.status == "cancelled"
        assert (line.ended_at, line.killed_at) == (task.ended_at, task.kill_requested_at)
        if task.child_flow_id is not None:
            deeper = [one for one in report.descendants if one.flow_id == task.child_flow_id]
            assert deeper and max(one.ended_at or 0 for one in deeper) <= (line.ended_at or 0)


def test_a_tree_that_is_still_ending_says_what_each_line_waits_for(
    lives: Lives, crew: Crew
) -> None:
    flow = crew.begin("obeys", "obeys", "never", controller_id="leader")

    report = _cancel(lives, flow, grace=1)

    assert report.code == "cancel_pending"
    told = [(line.depth, line.run_id, line.state, line.why) for line in report.descendants]
    assert told == [
        (0, "obeys", "settled", "stopped on request"),
        (0, "below", "running", "its flow has not ended yet"),
        (1, "obeys", "settled", "stopped on request"),
        (1, "below", "running", "its flow has not ended yet"),
        (2, "never", "running", "it was asked to stop, and its code has not ended yet"),
    ]


def test_code_that_was_given_up_deep_below_spoils_the_whole_report(
    lives: Lives, crew: Crew
) -> None:
    flow = crew.begin("obeys", "obeys", "never", controller_id="leader")

    report = _cancel(lives, flow, grace=60)

    assert (report.cancelled, report.code) == (False, "abandoned")
    states = [(line.depth, line.run_id, line.state) for line in report.descendants]
    assert [line for line in states if line[2] != "settled"] == [(2, "never", "abandoned")]


def test_an_operator_s_report_says_the_same(lives: Lives, crew: Crew) -> None:
    flow = crew.begin("obeys", "lingers", controller_id="leader")

    report = lives.play(lives.admin.cancel(flow.flow_id))

    assert report.cancelled
    assert [(line.depth, line.run_id) for line in report.descendants] == [
        (0, "obeys"),
        (0, "below"),
        (1, "lingers"),
    ]


def test_cancelling_one_nested_flow_reports_its_own_tree_only(lives: Lives, crew: Crew) -> None:
    flow = crew.begin("obeys", "obeys", "obeys", controller_id="leader")
    below = lives.child(flow.flow_id, "below").child_flow_id

    report = lives.play(lives.flows.cancel(str(below)))

    assert [(line.depth, line.run_id) for line in report.descendants] == [
        (0, "obeys"),
        (0, "below"),
        (1, "obeys"),
    ]
    assert _by_name(report).keys() == {"obeys", "below"}


def test_what_others_run_for_a_flow_below_that_had_ended_goes_on_and_is_told(
    lives: Lives, crew: Crew
) -> None:
    @lives.registry.controller("holder")
    async def holder(flow: FlowContext) -> None:
        await flow.run(Nested("crew"), [], name="below")
        await asyncio.get_running_loop().create_future()

    flow = crew.begin(controller_id="holder")
    below = str(lives.child(flow.flow_id, "below").child_flow_id)
    done, left = (lives.play(link(lives.flows, below)) for _ in range(2))
    lives.play(lives.flows.complete_task(done.task_id))
    crew.may_end.set()
    lives.pass_time(1)
    assert lives.flow(below).status == "succeeded", "vacuous: it has not ended"

    report = _cancel(lives, flow)

    assert (report.cancelled, report.code) == (True, None)
    [line] = report.descendants
    assert (line.flow_id, line.task_id, line.depth) == (below, left.task_id, 1)
    assert (line.state, line.status, line.asked_at) == ("running", "running", None)
    assert line.why == "it has not been asked to stop, and goes on"
    assert lives.task(left.task_id).ended_at is None


def test_a_flow_that_finishes_by_itself_in_the_face_of_a_cancel_says_so(lives: Lives) -> None:
    @lives.registry.controller("proud")
    async def proud(flow: FlowContext) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await flow.finish(state_json="done all the same")

    flow = lives.play(make(lives.flows, controller_id="proud"))
    lives.pass_time(1)

    report = _cancel(lives, flow)

    assert report.flow is not None
    assert (report.flow.status, report.flow.state_json) == ("succeeded", "done all the same")
    assert (report.cancelled, report.code) == (False, "terminal")
    assert report.reason == "Flow is already succeeded."
    assert report.descendants == []
