"""Reviews: a failure that a person has to look at blocks the flow, until somebody answers in one of three ways."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flowstead import (
    CancelPending,
    Created,
    Flow,
    FlowContext,
    Limits,
    NeedsReview,
    Refused,
    Rejected,
    Retry,
    SessionFlows,
    Task,
    TaskContext,
    TaskRetryReport,
)
from tests.runtime.support import STRANGER, Lives, bound, link, make

Given = dict[str, Any]


class Clerk:
    """A task that asks to be looked at unless its input is in order. Keeps what it was given, by step."""

    def __init__(self, lives: Lives) -> None:
        self.given: list[tuple[str | None, Any]] = []
        lives.registry.task(name="file")(self.file)
        lives.registry.controller("office")(self.drive)

    async def file(self, context: TaskContext, paper: Any) -> Any:
        self.given.append((context.run_id, paper))
        await asyncio.sleep(1 + 0.1 * len(self.given))
        if paper != "in order":
            raise NeedsReview(f"{paper} is no paper")
        return "filed"

    async def drive(self, flow: FlowContext) -> None:
        assert isinstance(flow.state_json, list)
        steps = [
            await flow.start("file", paper, name=f"paper {number}")
            for number, paper in enumerate(flow.state_json)
        ]
        outcomes = await flow.gather(*steps, return_outcomes=True)
        await flow.finish(state_json=[type(outcome).__name__ for outcome in outcomes])


@pytest.fixture
def clerk(lives: Lives) -> Clerk:
    return Clerk(lives)


def _office(lives: Lives, *papers: str) -> Flow:
    """A flow of the clerk's, once all its papers have been looked at."""
    flow = lives.play(make(lives.flows, controller_id="office", state_json=list(papers)))
    lives.pass_time(2)
    return lives.flow(flow.flow_id)


def _by_hand(lives: Lives, run: Any = "file", paper: Any = "a fish", **given: Any) -> Task:
    """A child in review of a flow that nobody drives."""
    flow = lives.play(make(lives.flows, **given))
    added = lives.play(
        lives.flows.run_task(
            flow_id=flow.flow_id, task="file it", run=run, input_json=paper, run_id="r"
        )
    )
    assert isinstance(added, Created)
    lives.pass_time(2)
    task = lives.task(added.task.task_id)
    assert task.review_requested_at is not None
    return task


# ---- blocking -------------------------------------------------------------------------------------


def test_the_flow_is_blocked_and_says_by_whom_and_why(lives: Lives, clerk: Clerk) -> None:
    flow = _office(lives, "a fish")

    [task] = lives.children(flow.flow_id)
    assert (flow.status, flow.revision) == ("blocked", 2)
    assert flow.blocked_task_id == task.task_id
    assert flow.blocked_summary == "'paper 0' needs review: a fish is no paper"
    assert (task.status, task.attempt, task.ended_at) == ("queued", 1, None)
    assert task.review_requested_at is not None
    assert task.failure is not None
    assert (task.failure.kind, task.failure.code, task.failure.message, task.failure.category) == (
        "exception",
        "NeedsReview",
        "a fish is no paper",
        "validation",
    )
    assert lives.told(flow.flow_id)[-2:] == ["task.review_requested", "flow.blocked"]


def test_siblings_and_the_controller_go_on_while_a_child_is_in_review(
    lives: Lives, clerk: Clerk
) -> None:
    flow = _office(lives, "a fish", "in order")

    assert flow.status == "blocked"
    assert lives.child(flow.flow_id, "paper 1").result_json == "filed"


def test_nothing_is_tried_again_before_somebody_has_answered(lives: Lives, clerk: Clerk) -> None:
    flow = _office(lives, "a fish")

    lives.pass_time(30 * 24 * 3600)

    assert lives.flow(flow.flow_id) == flow
    assert len(clerk.given) == 1


# ---- the three answers ----------------------------------------------------------------------------


def test_resuming_lets_the_child_try_again_with_what_it_had(lives: Lives) -> None:
    seen: list[str] = []

    async def press(_: TaskContext, button: str) -> str:
        seen.append(button)
        if len(seen) == 1:
            raise NeedsReview("is it plugged in?")
        return "it works"

    task = _by_hand(lives, press, "start")
    blocked = lives.flow(task.flow_id)

    resumed = lives.play(
        lives.flows.resume(flow_id=task.flow_id, expected_revision=blocked.revision)
    ).unwrap()

    assert (resumed.status, resumed.revision) == ("queued", blocked.revision + 1)
    assert (resumed.blocked_task_id, resumed.blocked_summary) == (None, None)
    lives.pass_time(1)
    ended = lives.task(task.task_id)
    assert (ended.status, ended.attempt, ended.result_json) == ("succeeded", 2, "it works")
    assert (ended.review_requested_at, ended.failure) == (None, None)
    assert seen == ["start", "start"]


def test_retrying_the_child_gives_it_another_input_and_lets_the_flow_go_on(
    lives: Lives, clerk: Clerk
) -> None:
    flow = _office(lives, "a fish")
    [task] = lives.children(flow.flow_id)

    report = lives.play(lives.flows.retry_task(task.task_id, input_json="in order"))

    assert (report.found, report.retried, report.reason) == (True, True, None)
    assert report.task is not None and report.task.input_json == "in order"
    now = lives.flow(flow.flow_id)
    assert (now.status, now.revision) == ("running", flow.revision + 1)
    assert (now.blocked_task_id, now.blocked_summary) == (None, None)
    ended = lives.result(flow.flow_id)
    assert (ended.status, ended.state_json) == ("succeeded", ["Succeeded"])
    assert clerk.given == [("paper 0", "a fish"), ("paper 0", "in order")]


def test_giving_up_ends_the_child_as_cancelled_and_lets_the_flow_go_on(
    lives: Lives, clerk: Clerk
) -> None:
    flow = _office(lives, "a fish")
    [task] = lives.children(flow.flow_id)

    report = lives.play(lives.flows.cancel_task(task.task_id))

    assert report.cancelled and report.task is not None
    assert (report.task.status, report.task.review_requested_at) == ("cancelled", None)
    ended = lives.result(flow.flow_id)
    assert (ended.status, ended.state_json) == ("succeeded", ["Cancelled"])
    assert len(clerk.given) == 1


ANSWERS: dict[str, Callable[[SessionFlows, Flow], Awaitable[Any]]] = {
    "resume": lambda flows, flow: flows.resume(
        flow_id=flow.flow_id, expected_revision=flow.revision
    ),
    "retry": lambda flows, flow: flows.retry_task(str(flow.blocked_task_id), input_json="in order"),
    "give up": lambda flows, flow: flows.cancel_task(str(flow.blocked_task_id)),
}


@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_may_come_in_the_next_process(
    lives: Lives, clerk: Clerk, answer: str, how: str
) -> None:
    flow = _office(lives, "a fish", "in order")
    lives.restart(how)
    lives.pass_time(3600)
    assert lives.flow(flow.flow_id) == flow
    assert len(clerk.given) == 2

    lives.play(ANSWERS[answer](lives.flows, flow))
    lives.pass_time(5)

    first = {"resume": "", "retry": "Succeeded", "give up": "Cancelled"}[answer]
    if first:
        assert lives.result(flow.flow_id).state_json == [first, "Succeeded"]
    else:
        again = lives.flow(flow.flow_id)
        assert (again.status, again.blocked_task_id) == ("blocked", flow.blocked_task_id)
        assert lives.task(str(flow.blocked_task_id)).attempt == 2


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_outlives_a_crash_right_after_it(lives: Lives, clerk: Clerk, answer: str) -> None:
    flow = _office(lives, "a fish")
    lives.play(ANSWERS[answer](lives.flows, flow))

    lives.restart("kill")
    lives.pass_time(5)

    task = lives.task(str(flow.blocked_task_id))
    expected = {"resume": "queued", "retry": "succeeded", "give up": "cancelled"}[answer]
    assert task.status == expected
    assert (lives.flow(flow.flow_id).status == "blocked") is (answer == "resume")


@pytest.mark.parametrize("answer", ["resume", "retry", "give up"])
def test_an_answer_is_told_with_one_revision_and_in_order(
    lives: Lives, clerk: Clerk, answer: str
) -> None:
    flow = _office(lives, "a fish")
    before = len(lives.history(flow.flow_id))

    lives.play(ANSWERS[answer](lives.flows, flow))

    told = lives.history(flow.flow_id)[before:]
    assert {event.revision for event in told if event.type.startswith("task.")} <= {
        flow.revision + 1,
        flow.revision + 2,
    }
    revisions = [event.revision for event in told]
    assert revisions == sorted(revisions)
    [resumed] = [event for event in told if event.type == "flow.resumed"]
    assert resumed.revision == flow.revision + 1
    assert resumed.changed["blockedTaskId"] is None
    kinds = [event.type for event in told]
    assert ("task.retry_requested" in kinds) is (answer != "give up")


# ---- several, again, and others -------------------------------------------------------------------


def test_of_several_in_review_the_oldest_blocks_and_then_the_next(
    lives: Lives, clerk: Clerk
) -> None:
    flow = _office(lives, "a fish", "a stone", "in order", "a hat")
    children = {task.run_id: task.task_id for task in lives.children(flow.flow_id)}
    seen = []

    while (flow := lives.flow(flow.flow_id)).status == "blocked":
        seen.append(flow.blocked_task_id)
        lives.play(ANSWERS["retry"](lives.flows, flow))
        assert len(seen) <= 3
        lives.pass_time(0)

    assert seen == [children["paper 0"], children["paper 1"], children["paper 3"]]
    assert lives.result(flow.flow_id).state_json == ["Succeeded"] * 4


@pytest.mark.parametrize("how", ["not at all", "kill", "close"])
def test_the_next_to_block_is_the_oldest_review_also_after_a_restart(
    lives: Lives, how: str
) -> None:
    @lives.registry.task
    async def ask(_: TaskContext, after: float) -> None:
        await asyncio.sleep(after)
        raise NeedsReview("well?")

    async def ask_three() -> Flow:
        flow = await make(lives.flows)
        for after in (3, 2, 1):
            await lives.flows.run_task(
                flow_id=flow.flow_id, task="t", run=ask, input_json=after, run_id=f"after {after}"
            )
        return flow

    assert lives.runtime
    flow = lives.play(ask_three())
    lives.pass_time(4)
    named = {lives.child(flow.flow_id, f"after {after}").task_id: after for after in (1, 2, 3)}
    if how != "not at all":
        lives.restart(how)
    seen = []

    for _ in range(3):
        task_id = str(lives.flow(flow.flow_id).blocked_task_id)
        seen.append(named[task_id])
        lives.play(lives.flows.cancel_task(task_id))

    assert seen == [1, 2, 3]


def test_an_answer_for_another_child_in_review_leaves_the_block_where_it_is(
    lives: Lives, clerk: Clerk
) -> None:
    flow = _office(lives, "a fish", "a stone")
    second = lives.child(flow.flow_id, "paper 1")

    assert lives.play(lives.flows.retry_task(second.task_id, input_json="in order")).retried
    lives.pass_time(2)

    assert lives.task(second.task_id).status == "succeeded"
    now = lives.flow(flow.flow_id)
    assert (now.status, now.revision) == ("blocked", flow.revision)
    assert now.blocked_task_id == flow.blocked_task_id


def test_a_child_that_fails_its_review_again_blocks_again(lives: Lives, clerk: Clerk) -> None:
    flow = _office(lives, "a fish")

    lives.play(lives.flows.retry_task(str(flow.blocked_task_id), input_json="a shoe"))
    lives.pass_time(2)

    again = lives.flow(flow.flow_id)
    assert (again.status, again.blocked_task_id) == ("blocked", flow.blocked_task_id)
    assert again.blocked_summary == "'paper 0' needs review: a shoe is no paper"
    assert again.revision == flow.revision + 2


def test_a_flow_that_waited_goes_back_to_waiting(lives: Lives, clerk: Clerk) -> None:
    wait = {"kind": "reply"}
    task = _by_hand(lives, status="waiting", wait_json=wait)
    blocked = lives.flow(task.flow_id)
    assert (blocked.status, blocked.wait_json) == ("blocked", wait)

    lives.play(lives.flows.retry_task(task.task_id, input_json="in order"))

    now = lives.flow(task.flow_id)
    assert (now.status, now.wait_json, now.revision) == ("waiting", wait, blocked.revision + 1)


def test_an_owner_s_own_blocker_stays_and_the_review_comes_after_it(
    lives: Lives, clerk: Clerk
) -> None:
    flow = lives.play(make(lives.flows))
    lives.play(
        lives.flows.set_waiting(
            flow_id=flow.flow_id, expected_revision=0, blocked_summary="no budget"
        )
    )
    added = lives.play(
        lives.flows.run_task(flow_id=flow.flow_id, task="t", run="file", input_json="a fish")
    )
    lives.pass_time(2)
    blocked = lives.flow(flow.flow_id)
    assert (blocked.blocked_summary, blocked.blocked_task_id) == ("no budget", None)

    lives.play(lives.flows.resume(flow_id=flow.flow_id, expected_revision=blocked.revision))
    lives.pass_time(0)

    now = lives.flow(flow.flow_id)
    assert (now.status, now.blocked_task_id) == ("blocked", added.unwrap().task_id)
    assert len(clerk.given) == 1


def test_a_cancel_ends_the_flow_and_its_child_in_review(lives: Lives, clerk: Clerk) -> None:
    flow = _office(lives, "a fish")

    report = lives.play(lives.flows.cancel(flow.flow_id))

    assert report.cancelled
    [task] = report.tasks
    assert (task.status, task.review_requested_at) == ("cancelled", None)
    assert len(clerk.given) == 1


def test_an_intent_ends_a_child_in_review(lives: Lives, clerk: Clerk) -> None:
    task = _by_hand(lives)
    blocked = lives.flow(task.flow_id)

    asked = lives.play(
        lives.flows.request_cancel(flow_id=task.flow_id, expected_revision=blocked.revision)
    )

    assert asked.applied
    assert lives.result(task.flow_id).status == "cancelled"
    assert lives.task(task.task_id).status == "cancelled"
    late = lives.play(lives.flows.retry_task(task.task_id))
    assert (late.retried, late.reason) == (False, "Task is already cancelled.")


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_an_end_by_hand_ends_a_child_in_review(lives: Lives, clerk: Clerk, end: str) -> None:
    task = _by_hand(lives)
    blocked = lives.flow(task.flow_id)

    done = lives.play(
        getattr(lives.flows, end)(flow_id=task.flow_id, expected_revision=blocked.revision)
    )

    assert done.applied
    assert lives.task(task.task_id).status == "cancelled"


def test_a_controller_may_change_its_flow_while_a_review_blocks_and_unblocks_it(
    lives: Lives, clerk: Clerk
) -> None:
    @lives.registry.controller("busy")
    async def busy(flow: FlowContext) -> None:
        step = await flow.start("file", "a fish", name="paper")
        for number in range(5):
            await asyncio.sleep(1)
            await flow.update(state_json=number)
        await flow.finish(state_json=[flow.state_json, await step.result()])

    flow = lives.play(make(lives.flows, controller_id="busy"))
    lives.pass_time(2.5)
    blocked = lives.flow(flow.flow_id)
    assert blocked.status == "blocked" and blocked.state_json == 1

    lives.play(ANSWERS["retry"](lives.flows, blocked))

    ended = lives.result(flow.flow_id)
    assert (ended.status, ended.state_json) == ("succeeded", [4, "filed"])


# ---- retry_task where nobody has to look ----------------------------------------------------------


def test_a_retry_that_is_not_due_yet_can_be_had_now(lives: Lives) -> None:
    async def sleepy(context: TaskContext, word: str) -> str:
        if context.attempt == 1:
            raise ConnectionError("later")
        return word

    flow = lives.play(make(lives.flows))
    added = lives.play(
        lives.flows.run_task(
            flow_id=flow.flow_id,
            task="t",
            run=sleepy,
            input_json="first",
            retry=Retry(max_attempts=2, initial=3600, max_delay=3600),
        )
    )
    task_id = added.unwrap().task_id
    lives.pass_time(1)
    assert lives.task(task_id).next_attempt_at is not None
    began = lives.now()

    report = lives.play(lives.flows.retry_task(task_id, input_json="second"))
    lives.pass_time(0)

    assert report.retried
    ended = lives.task(task_id)
    assert (ended.status, ended.result_json, ended.attempt) == ("succeeded", "second", 2)
    assert lives.now() - began < 1000
    assert lives.flow(flow.flow_id).revision == 0


async def _linked(flows: SessionFlows, flow_id: str) -> str:
    return (await link(flows, flow_id)).task_id


async def _running(flows: SessionFlows, flow_id: str) -> str:
    async def forever(_: TaskContext, __: Any) -> None:
        await asyncio.get_running_loop().create_future()

    added = await flows.run_task(flow_id=flow_id, task="t", run=forever)
    await asyncio.sleep(1)
    return added.unwrap().task_id


async def _ended(flows: SessionFlows, flow_id: str) -> str:
    task_id = await _linked(flows, flow_id)
    await flows.complete_task(task_id)
    return task_id


async def _nobody(flows: SessionFlows, flow_id: str) -> str:
    return "nobody"


@pytest.mark.parametrize(
    ("child", "found", "reason"),
    [
        (_linked, True, "Task is run by somebody else."),
        (_running, True, "Task is running."),
        (_ended, True, "Task is already succeeded."),
        (_nobody, False, "Task not found."),
    ],
)
def test_a_child_that_cannot_be_retried_is_told_why_and_stays(
    lives: Lives,
    child: Callable[[SessionFlows, str], Awaitable[str]],
    found: bool,
    reason: str,
) -> None:
    flow = lives.play(make(lives.flows))
    task_id = lives.play(child(lives.flows, flow.flow_id))
    history = lives.history(flow.flow_id)

    report = lives.play(lives.flows.retry_task(task_id))

    task = lives.task(task_id) if found else None
    assert report == TaskRetryReport(found=found, retried=False, reason=reason, task=task)
    assert lives.history(flow.flow_id) == history


@pytest.mark.parametrize("was", ["never started", "answered"])
def test_a_child_that_stands_in_line_already_is_not_retried(lives: Lives, was: str) -> None:
    lives.limits = Limits(running_children=1)
    given: list[Any] = []

    async def ask(context: TaskContext, word: Any) -> None:
        given.append(word)
        if was == "answered" and context.attempt == 1:
            raise NeedsReview("well?")

    async def hold(_: TaskContext, __: Any) -> None:
        await asyncio.sleep(60)

    async def in_line() -> str:
        flow = await make(lives.flows)
        runs = (ask, hold) if was == "answered" else (hold, ask)
        tasks = {}
        for run in runs:
            added = await lives.flows.run_task(
                flow_id=flow.flow_id, task="t", run=run, input_json="first"
            )
            tasks[run] = added.unwrap().task_id
            await asyncio.sleep(1)
        if was == "answered":
            answer = await lives.flows.retry_task(tasks[ask], input_json="second")
            assert answer.retried
        return tasks[ask]

    assert lives.runtime
    task = lives.task(lives.play(in_line()))
    assert (task.status, task.review_requested_at) == ("queued", None)
    history = lives.history(task.flow_id)

    report = lives.play(lives.flows.retry_task(task.task_id, input_json="third"))

    assert (report.found, report.retried, report.task) == (True, False, task)
    assert lives.history(task.flow_id) == history
    lives.pass_time(100)
    assert given == (["first", "second"] if was == "answered" else ["first"])


def test_a_stranger_finds_no_child_to_answer_for(lives: Lives, clerk: Clerk) -> None:
    task = _by_hand(lives)
    stranger = lives.face(lambda runtime: bound(runtime, STRANGER))
    history = lives.history(task.flow_id)

    report = lives.play(stranger.retry_task(task.task_id, input_json="in order"))

    assert report == TaskRetryReport(found=False, retried=False, reason="Task not found.")
    assert lives.history(task.flow_id) == history
    assert lives.play(lives.admin.retry_task(task.task_id, input_json="in order")).retried


def test_an_input_that_is_not_json_leaves_the_review_open(lives: Lives, clerk: Clerk) -> None:
    task = _by_hand(lives)
    flow = lives.flow(task.flow_id)

    report = lives.play(lives.flows.retry_task(task.task_id, input_json={"at": object()}))

    assert (report.found, report.retried, report.task) == (True, False, task)
    assert report.reason is not None and report.reason.startswith("input_json['at'] ")
    assert lives.flow(task.flow_id) == flow


def test_two_people_who_answer_at_once_start_one_attempt(lives: Lives, clerk: Clerk) -> None:
    task = _by_hand(lives)

    async def both() -> list[TaskRetryReport]:
        return await asyncio.gather(
            lives.flows.retry_task(task.task_id, input_json="in order"),
            lives.flows.retry_task(task.task_id, input_json="in order"),
        )

    reports = lives.play(both())
    lives.pass_time(2)

    assert any(report.retried for report in reports)
    assert len(clerk.given) == 2
    assert lives.task(task.task_id).attempt == 2


def test_a_new_step_after_an_answer_comes_too_late_for_an_intent(
    lives: Lives, clerk: Clerk
) -> None:
    raised: list[BaseException] = []

    @lives.registry.controller("late")
    async def late(flow: FlowContext) -> None:
        await flow.gather(await flow.start("file", "a fish", name="paper"), return_outcomes=True)
        try:
            await flow.run("file", "in order", name="another")
        except CancelPending as error:
            raised.append(error)
            raise

    flow = lives.play(make(lives.flows, controller_id="late"))
    lives.pass_time(2)
    blocked = lives.flow(flow.flow_id)

    answer = lives.play(
        lives.flows.request_cancel(flow_id=flow.flow_id, expected_revision=blocked.revision)
    )

    assert not isinstance(answer, Rejected | Refused)
    assert lives.result(flow.flow_id).status == "cancelled"
    assert len(raised) == 1 and len(clerk.given) == 1
