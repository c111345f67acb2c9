"""What is tried again, when, and what is not, told from outside and across restarts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from flowstead import (
    ChildFailed,
    ChildLost,
    Fatal,
    FlowContext,
    NeedsReview,
    Retry,
    Task,
    TaskContext,
    Transient,
)
from tests.runtime.support import Lives, make

HOW = pytest.mark.parametrize("how", ["not at all", "kill", "close"])
EAGER = Retry(max_attempts=5, initial=1, factor=1, jitter=0)


class HttpError(Exception):
    """What HTTP clients raise."""

    def __init__(self, status_code: int, retry_after: float | None = None) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code
        self.retry_after = retry_after


class ValidationError(ValueError):
    """What validators raise."""


class Service:
    """A task that answers each attempt as the script says: an exception to raise, or a result."""

    def __init__(self, lives: Lives, retry: Retry | None = EAGER, **policy: Any) -> None:
        self.lives = lives
        self.script: list[Any] = []
        self.asked: list[tuple[float, Any]] = []
        lives.registry.task(name="ask", retry=retry, **policy)(self.ask)
        lives.registry.controller("story")(self.drive)

    async def ask(self, _: TaskContext, question: Any) -> Any:
        self.asked.append((asyncio.get_running_loop().time(), question))
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def drive(self, flow: FlowContext) -> None:
        await flow.finish(state_json=await flow.run("ask", "first", name="ask"))

    def tell(self, *script: Any) -> str:
        """The id of a flow that asks, after its first attempt."""
        self.script.extend(script)
        flow = self.lives.play(make(self.lives.flows, controller_id="story"))
        self.lives.pass_time(0.1)
        return flow.flow_id

    def gaps(self) -> list[float]:
        """Seconds between the attempts."""
        times = [at for at, _ in self.asked]
        return [round(b - a, 2) for a, b in itertools.pairwise(times)]

    def child(self, flow_id: str) -> Task:
        return self.lives.child(flow_id, "ask")


def _restarted(lives: Lives, how: str) -> None:
    if how != "not at all":
        lives.restart(how)
    assert lives.flows


@HOW
@pytest.mark.parametrize(
    ("error", "category"),
    [
        (HttpError(401), "auth"),
        (HttpError(403), "auth"),
        (PermissionError("no"), "auth"),
        (Fatal("never"), "fatal"),
    ],
    ids=repr,
)
def test_what_another_attempt_cannot_help_has_exactly_one(
    lives: Lives, how: str, error: Exception, category: str
) -> None:
    service = Service(lives)
    flow_id = service.tell(error, "never asked")
    _restarted(lives, how)
    lives.pass_time(3600)

    ended = lives.result(flow_id)

    assert (ended.status, len(service.asked)) == ("failed", 1)
    child = service.child(flow_id)
    assert (child.status, child.attempt) == ("failed", 1)
    assert child.failure is not None and child.failure.category == category


@HOW
def test_whoever_asks_to_be_left_alone_is_for_as_long(lives: Lives, how: str) -> None:
    service = Service(lives)
    flow_id = service.tell(HttpError(503, retry_after=120), "at last")
    child = service.child(flow_id)
    assert child.next_attempt_at is not None and child.last_event_at is not None
    assert child.next_attempt_at - child.last_event_at == 120_000
    lives.pass_time(60)
    _restarted(lives, how)

    ended = lives.result(flow_id)

    assert (ended.status, ended.state_json) == ("succeeded", "at last")
    [gap] = service.gaps()
    assert 120 <= gap <= 120.1


def test_a_policy_s_own_delay_stands_where_it_is_longer(lives: Lives) -> None:
    service = Service(lives, Retry(max_attempts=2, initial=30, jitter=0))

    ended = lives.result(service.tell(Transient("busy", retry_after=5), "done"))

    assert ended.status == "succeeded"
    assert 30 <= service.gaps()[0] <= 30.1


def test_an_absurd_wish_to_be_left_alone_is_bounded(lives: Lives) -> None:
    service = Service(lives)

    flow_id = service.tell(HttpError(429, retry_after=1e12), "done")

    child = service.child(flow_id)
    assert child.next_attempt_at is not None and child.last_event_at is not None
    assert child.next_attempt_at - child.last_event_at == 7 * 24 * 3600 * 1000


@HOW
@pytest.mark.parametrize(
    "error",
    [HttpError(422), ValidationError("amount is no number"), NeedsReview("which invoice?")],
    ids=repr,
)
def test_what_a_person_has_to_see_blocks_with_a_summary_and_goes_on_with_the_answer(
    lives: Lives, how: str, error: Exception
) -> None:
    service = Service(lives)
    flow_id = service.tell(error, "thank you")
    blocked = lives.flow(flow_id)
    said = str(error) if isinstance(error, NeedsReview) else f"{type(error).__name__}: {error}"
    assert blocked.status == "blocked"
    assert blocked.blocked_summary == f"'ask' needs review: {said}"
    lives.pass_time(24 * 3600)
    _restarted(lives, how)
    lives.pass_time(24 * 3600)
    assert lives.flow(flow_id) == blocked and len(service.asked) == 1

    report = lives.play(
        lives.flows.retry_task(str(blocked.blocked_task_id), input_json="second, with invoice")
    )

    assert report.retried
    ended = lives.result(flow_id)
    assert (ended.status, ended.state_json) == ("succeeded", "thank you")
    assert [question for _, question in service.asked] == ["first", "second, with invoice"]


@HOW
def test_the_whole_story_in_one_child(lives: Lives, how: str) -> None:
    service = Service(lives)
    flow_id = service.tell(
        ConnectionError("reset"),
        HttpError(503, retry_after=10),
        TimeoutError(),
        NeedsReview("well?"),
        HttpError(401),
    )
    lives.pass_time(5)
    _restarted(lives, how)
    lives.pass_time(20)
    _restarted(lives, how)
    blocked = lives.flow(flow_id)
    assert (blocked.status, len(service.asked)) == ("blocked", 4)

    lives.play(lives.flows.resume(flow_id=flow_id, expected_revision=blocked.revision))

    ended = lives.result(flow_id)
    child = service.child(flow_id)
    assert (ended.status, child.status, child.attempt) == ("failed", "failed", 5)
    assert lives.told(flow_id, "task.retry") == ["task.retry_scheduled"] * 3 + [
        "task.retry_requested"
    ]


@HOW
def test_attempts_are_counted_over_restarts_and_end_when_spent(lives: Lives, how: str) -> None:
    service = Service(lives, Retry(max_attempts=3, initial=10, factor=1, jitter=0))
    flow_id = service.tell(*(ConnectionError(n) for n in range(9)))
    for _ in range(2):
        lives.pass_time(3)
        _restarted(lives, how)

    ended = lives.result(flow_id)

    assert (ended.status, len(service.asked), service.child(flow_id).attempt) == ("failed", 3, 3)
    assert all(10 <= gap <= 10.1 for gap in service.gaps())


@pytest.mark.parametrize(
    ("retry_on", "error", "attempts"),
    [
        (ConnectionError, ConnectionRefusedError(), 3),
        ("builtins.OSError", ConnectionRefusedError(), 3),
        ("transient", ConnectionRefusedError(), 3),
        ("transient", ValueError(), 1),
        (ValueError, ValidationError("again, please"), 3),
        ("auth", HttpError(401), 3),
        ("validation", HttpError(422), 3),
        ("auth", Fatal("no"), 1),
        ([], Transient("in vain"), 3),
    ],
    ids=repr,
)
def test_a_policy_says_what_is_worth_it_but_the_child_has_the_first_word(
    lives: Lives, retry_on: Any, error: Exception, attempts: int
) -> None:
    service = Service(lives, Retry(max_attempts=3, initial=1, retry_on=retry_on))

    ended = lives.result(service.tell(*[error] * 3))

    assert (ended.status, len(service.asked)) == ("failed", attempts)


CLASSIFIERS: dict[str, tuple[Callable[[BaseException], Any], int, str | None]] = {
    "says it is worth it": (lambda error: "transient", 2, None),
    "says it is hopeless": (lambda error: "fatal", 1, "fatal"),
    "has no opinion": (lambda error: None, 1, "auth"),
    "talks nonsense": (lambda error: "nonsense", 1, "auth"),
    "fails itself": (lambda error: 1 / 0, 1, "auth"),
}


@pytest.mark.parametrize("how", CLASSIFIERS)
def test_a_task_s_own_classifier_is_asked_before_the_usual_rules(lives: Lives, how: str) -> None:
    classify, attempts, category = CLASSIFIERS[how]
    service = Service(lives, classify=classify)

    flow_id = service.tell(HttpError(401), "done")
    ended = lives.result(flow_id)

    assert len(service.asked) == attempts
    assert ended.status == ("succeeded" if category is None else "failed")
    failure = service.child(flow_id).failure
    assert (failure.category if failure else None) == category


# ---- what must not be done twice ------------------------------------------------------------------


class Payment:
    """A step that must not be done twice, and what its controller was told."""

    def __init__(self, lives: Lives, seconds: float = 10) -> None:
        self.begun = 0
        self.raised: list[BaseException] = []
        self.seconds = seconds
        lives.registry.task(name="pay", idempotent=False)(self.pay)
        lives.registry.controller("checkout")(self.drive)

    async def pay(self, _: TaskContext, amount: int) -> str:
        self.begun += 1
        await asyncio.sleep(self.seconds)
        if amount < 0:
            raise ConnectionError("no line")
        return "paid"

    async def drive(self, flow: FlowContext) -> None:
        assert isinstance(flow.state_json, int)
        try:
            await flow.finish(state_json=await flow.run("pay", flow.state_json, name="pay"))
        except (ChildLost, ChildFailed) as error:
            self.raised.append(error)
            raise


@pytest.mark.parametrize("how", ["kill", "close"])
def test_what_must_not_be_done_twice_is_lost_when_it_is_cut_off(lives: Lives, how: str) -> None:
    payment = Payment(lives)
    flow = lives.play(make(lives.flows, controller_id="checkout", state_json=100))
    lives.pass_time(5)

    lives.restart(how)
    assert lives.flows
    ended = lives.result(flow.flow_id)

    child = lives.child(flow.flow_id, "pay")
    assert (payment.begun, child.status, child.attempt) == (1, "lost", 1)
    assert child.failure is not None
    assert (child.failure.kind, child.failure.code) == ("interrupted", "unknown")
    assert child.failure.message is not None
    assert child.failure.message.startswith("interrupted, unknown: ")
    assert [type(error) for error in payment.raised] == [ChildLost]
    assert ended.status == "failed"


@pytest.mark.parametrize("how", ["kill", "close"])
def test_what_stood_in_line_when_the_process_ended_is_done_once(lives: Lives, how: str) -> None:
    payment = Payment(lives, seconds=1)
    flow = lives.play(make(lives.flows, controller_id="checkout", state_json=100))
    lives.pass_time(10)
    assert lives.result(flow.flow_id).status == "succeeded"

    lives.restart(how)
    lives.pass_time(10)

    assert payment.begun == 1
    assert lives.child(flow.flow_id, "pay").status == "succeeded"


@pytest.mark.parametrize("how", ["kill", "close"])
def test_a_step_s_own_function_that_must_not_be_done_twice_is_lost_too(
    lives: Lives, how: str
) -> None:
    begun: list[int] = []

    @lives.registry.controller("bare")
    async def bare(flow: FlowContext) -> None:
        async def pay(context: TaskContext, _: Any) -> None:
            begun.append(context.attempt)
            await asyncio.sleep(10)

        await flow.run(pay, idempotent=False)

    flow = lives.play(make(lives.flows, controller_id="bare"))
    lives.pass_time(5)

    lives.restart(how)
    assert lives.flows

    assert lives.result(flow.flow_id).status == "failed"
    assert lives.child(flow.flow_id, "pay").status == "lost"
    assert begun == [1]


def test_what_must_not_be_done_twice_is_not_tried_again_by_itself(lives: Lives) -> None:
    payment = Payment(lives)
    flow = lives.play(make(lives.flows, controller_id="checkout", state_json=-1))

    assert lives.result(flow.flow_id).status == "failed"

    assert payment.begun == 1
    assert [type(error) for error in payment.raised] == [ChildFailed]


def test_a_lost_payment_is_a_person_s_to_take_up_again(lives: Lives) -> None:
    payment = Payment(lives)
    flow = lives.play(make(lives.flows, controller_id="checkout", state_json=100))
    lives.pass_time(5)
    lives.restart("kill")
    assert lives.flows and lives.result(flow.flow_id).status == "failed"

    new = lives.play(lives.flows.retry_flow(flow.flow_id)).unwrap()

    assert lives.result(new.flow_id).state_json == "paid"
    assert payment.begun == 2
