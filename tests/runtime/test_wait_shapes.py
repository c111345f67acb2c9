"""What a wait asks for: schemas that an answer must fit, reserved fields, and how a wait is listed."""

from __future__ import annotations

import asyncio
import datetime
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from flowstead import CommitFailed, FlowContext, InvalidState, Registry, Rejected, WrongShape
from flowstead.model.code import Code
from tests.runtime.support import Lives, make
from tests.runtime.waiting import (
    answer_in,
    begun,
    check_waits_on,
    open_waits,
    registry_of,
    reopened,
    signalled,
    waiting,
)

ORDER = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"type": "integer", "minimum": 1}}},
    "required": ["items"],
}
GOOD = {"items": [1, 2]}
WRONG: dict[str, tuple[Any, str]] = {
    "no object": ([], ""),
    "nothing": (None, ""),
    "a field missing": ({}, "items"),
    "deep inside": ({"items": [1, 0]}, '["items"][1]'),
}


@pytest.fixture(autouse=True)
def _controllers(request: pytest.FixtureRequest) -> None:
    if "lives" in request.fixturenames:
        request.getfixturevalue("lives").registry = registry_of()


def own_wait(lives: Lives, **wait_json: Any) -> Any:
    flow = lives.play(make(lives.flows))
    return lives.play(
        lives.flows.set_waiting(flow_id=flow.flow_id, expected_revision=0, wait_json=wait_json)
    )


# ---- answers of the wrong shape -------------------------------------------------------------------


@pytest.mark.parametrize("how", [None, "kill"])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_answer_of_the_wrong_shape_is_refused_with_the_path_and_the_wait_stays_open(
    lives: Lives, wrong: str, how: str | None
) -> None:
    flow_id = waiting(lives, schema=ORDER)
    if how is not None:
        reopened(lives, how)
    [wait] = open_waits(lives)
    payload, path = WRONG[wrong]
    before = lives.flow(flow_id).wait_json

    reports = [
        signalled(lives, payload, id="s-1"),
        signalled(lives, payload, token=wait.token, id="s-1"),
        signalled(lives, payload, flow_id=flow_id, name="answer", id="s-1"),
    ]

    for report in reports:
        assert (report.code, report.matched, report.kept) == ("wrong_shape", 0, False)
        assert path in report.reason
    assert (lives.flow(flow_id).status, lives.flow(flow_id).wait_json) == ("waiting", before)
    assert open_waits(lives) == [wait]
    assert signalled(lives, GOOD, id="s-1").matched == 1, "a refused signal spends no id"
    assert answer_in(lives, flow_id) == GOOD


def test_the_reason_does_not_repeat_the_answer(lives: Lives) -> None:
    waiting(lives, schema=ORDER)

    report = signalled(lives, {"items": ["secret" * 3]})

    assert report.code == "wrong_shape"
    assert "secret" not in report.reason


def test_an_early_signal_of_the_wrong_shape_is_put_aside_and_the_next_is_tried(
    lives: Lives, caplog: pytest.LogCaptureFixture
) -> None:
    for payload in ("wrong", {"items": [0]}, GOOD, {"items": [9]}):
        assert signalled(lives, payload).kept

    flow_id = waiting(lives, schema=ORDER)

    assert answer_in(lives, flow_id) == GOOD
    warned = [record.message for record in caplog.records if "turned_away" in record.message]
    assert len(warned) == 2
    next_one = waiting(lives, schema=ORDER)
    assert answer_in(lives, next_one) == {"items": [9]}


def test_an_early_signal_that_was_turned_away_may_be_sent_again_as_it_should_be(
    lives: Lives,
) -> None:
    assert signalled(lives, "wrong", id="mail-1").kept
    assert signalled(lives, GOOD, id="mail-1").code == "duplicate"

    flow_id = waiting(lives, schema=ORDER)

    assert signalled(lives, GOOD, id="mail-1").code == "matched"
    assert signalled(lives, GOOD, id="mail-1").code == "duplicate"
    assert answer_in(lives, flow_id) == GOOD


def test_an_early_addressed_signal_of_the_wrong_shape_is_put_aside_as_failed(lives: Lives) -> None:
    async def later(flow: FlowContext) -> None:
        await flow.wait("first")
        answer = await flow.wait("second", schema=ORDER)
        await flow.finish(state_json={"answered": answer})

    lives.registry = registry_of(later=later)
    flow_id = begun(lives, "later")
    for payload in ("wrong", GOOD):
        assert signalled(lives, payload, flow_id=flow_id, name="second").kept

    signalled(lives, 1, flow_id=flow_id, name="first")

    assert answer_in(lives, flow_id) == GOOD
    letters = [task.status for task in lives.children(flow_id) if task.run_id is None]
    assert sorted(letters) == ["failed", "succeeded", "succeeded"]


@pytest.mark.parametrize("by", ["key", "name"])
def test_an_answer_whose_shape_cannot_be_checked_here_is_refused_to_its_sender_alone(
    lives: Lives, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    flow_id = waiting(lives, schema=ORDER)
    flow = lives.flow(flow_id)
    registry, lives.registry = lives.registry, Registry()
    lives.restart("close")
    lives.pass_time(0.1)

    async def both() -> list[Any]:
        addresses: dict[str, dict[str, Any]] = {
            "key": {"key": {"kind": "reply", "thread": 1}},
            "name": {"flow_id": flow_id, "name": "answer"},
        }
        return await asyncio.gather(
            lives.flows.signal(payload=GOOD, **addresses[by]),
            lives.flows.update(flow_id=flow_id, expected_revision=flow.revision, current_step="b"),
            return_exceptions=True,
        )

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "jsonschema_rs", None)
        refused, updated = lives.play(both())

    assert isinstance(refused, CommitFailed)
    assert "flowstead[schema]" in str(refused)
    assert updated.applied
    assert "turn.crashed" not in caplog.text
    lives.registry = registry
    reopened(lives, "close")
    assert signalled(lives, GOOD).matched
    assert answer_in(lives, flow_id) == GOOD


def test_of_several_flows_only_those_that_the_answer_fits_are_woken(lives: Lives) -> None:
    fussy = waiting(lives, schema=ORDER)
    easy = waiting(lives)

    report = signalled(lives, "text", id="s-1")

    assert report.flow_ids == [easy]
    assert answer_in(lives, easy) == "text"
    check_waits_on(lives.flow(fussy))


class Order(msgspec.Struct):
    items: list[int]


@pytest.mark.parametrize("how", [None, "kill"])
def test_of_a_type_that_was_asked_for_an_instance_is_returned(
    lives: Lives, how: str | None
) -> None:
    seen: list[Any] = []

    async def typed(flow: FlowContext) -> None:
        seen.append(await flow.wait("order", schema=Order, thread=1))
        seen.append(await flow.wait("count", schema=int, thread=2))
        beside = await flow.open_wait("beside", schema=Order, thread=3)
        seen.append(await (await flow.select(beside)).result())
        seen.extend(await flow.gather(beside))

    lives.registry = registry_of(typed=typed)
    flow_id = begun(lives, "typed")
    if how is not None:
        reopened(lives, how)
    assert signalled(lives, {"items": ["1"]}, key={"thread": 1}).code == "wrong_shape"
    signalled(lives, {"items": [1]}, key={"thread": 1})
    assert signalled(lives, True, key={"thread": 2}).code == "wrong_shape"
    signalled(lives, 7, key={"thread": 2})
    signalled(lives, {"items": [2]}, key={"thread": 3})

    assert lives.result(flow_id).status == "succeeded"
    assert seen[-4:] == [Order(items=[1]), 7, Order(items=[2]), Order(items=[2])]


class Booking(msgspec.Struct):
    """What only its own code can judge: not even the schema of its type."""

    day: datetime.date
    nights: int
    seats: dict[int, str] = {}

    def __post_init__(self) -> None:
        if self.nights < 1:
            raise ValueError("too short")


@pytest.mark.parametrize("how", [None, "kill"])
def test_a_text_that_the_type_does_not_read_is_refused_and_the_wait_stays_open(
    lives: Lives, how: str | None
) -> None:
    seen: list[Any] = []

    async def books(flow: FlowContext) -> None:
        seen.append(await flow.wait("booking", schema=Booking, thread=1))

    lives.registry = registry_of(books=books)
    flow_id = begun(lives, "books")
    if how is not None:
        # The process that takes the answer has not seen the type, and knows no controller.
        lives.registry = registry_of()
        reopened(lives, how)
    wrong = {
        '["day"]': {"day": "tomorrow", "nights": 1},
        '["seats"]': {"day": "2030-12-31", "nights": 1, "seats": {"a": "b"}},
        '["nights"]': {"day": "2030-12-31", "nights": 1.5},
    }
    for path, payload in wrong.items():
        report = signalled(lives, payload, key={"thread": 1})
        assert (report.code, path in report.reason) == ("wrong_shape", True), report
    good = {"day": "2030-12-31", "nights": 2.0, "seats": {"1": "window"}}
    assert signalled(lives, good, key={"thread": 1}).code == "matched"
    if how is not None:
        lives.registry = registry_of(books=books)
        reopened(lives, how, 10)

    assert lives.result(flow_id).status == "succeeded"
    day = datetime.date(2030, 12, 31)
    assert seen[-1] == Booking(day=day, nights=2, seats={1: "window"})
    assert type(seen[-1].nights) is int


async def _asks_beside(flow: FlowContext) -> Any:
    return await (await flow.open_wait("booking", schema=list[Booking])).result()


ASK: dict[str, Callable[[FlowContext], Awaitable[Any]]] = {
    "wait": lambda flow: flow.wait("booking", schema=list[Booking]),
    "open_wait": _asks_beside,
    "receive": lambda flow: flow.receive(schema=list[Booking]),
}


@pytest.mark.parametrize("verb", ASK)
def test_what_only_the_type_itself_can_refuse_is_raised_with_the_path(
    lives: Lives, verb: str
) -> None:
    raised: list[WrongShape] = []

    async def books(flow: FlowContext) -> None:
        with pytest.raises(WrongShape) as caught:
            await ASK[verb](flow)
        raised.append(caught.value)

    lives.registry = registry_of(books=books)
    flow_id = begun(lives, "books")
    payload = [{"day": "2030-12-31", "nights": 0}]
    if verb == "receive":
        lives.play(lives.flows.tell(flow_id, payload))
    else:
        signalled(lives, payload, flow_id=flow_id, name="booking")

    assert lives.result(flow_id).status == "succeeded"
    [error] = raised
    assert str(error).endswith(
        "was answered with what its type does not take: too short - at `$[0]`"
    )


def test_a_schema_that_makes_no_sense_is_refused_before_the_wait_is_opened(lives: Lives) -> None:
    raised: list[Exception] = []

    async def senseless(flow: FlowContext) -> None:
        for schema in ({"type": "nonsense"}, object(), 5):
            try:
                await flow.wait("answer", schema=schema)
            except (TypeError, ValueError) as error:
                raised.append(error)

    lives.registry = registry_of(senseless=senseless)
    flow_id = begun(lives, "senseless")

    assert lives.result(flow_id).status == "succeeded"
    assert len(raised) == 3
    assert lives.children(flow_id) == []


# ---- the flow's own wait --------------------------------------------------------------------------


def test_an_answer_to_a_flows_own_wait_must_fit_too(lives: Lives) -> None:
    flow_id = own_wait(lives, thread=1, schema=ORDER).unwrap().flow_id
    before = lives.flow(flow_id)

    for payload, path in WRONG.values():
        report = signalled(lives, payload, key={"thread": 1}, id="s-1")
        assert report.code == "wrong_shape" and path in report.reason

    assert lives.flow(flow_id) == before
    report = signalled(lives, GOOD, key={"thread": 1}, id="s-1")
    flow = lives.flow(flow_id)
    assert report.flow_ids == [flow_id]
    assert (flow.status, flow.revision, flow.wait_json) == ("queued", 2, None)
    assert flow.answer_json == {"payload": GOOD, "at": flow.updated_at, "signalId": "s-1"}


SENSELESS: dict[str, tuple[dict[str, Any], str]] = {
    "both instants": ({"wakeAt": 1, "deadlineAt": 2}, "wakeAt"),
    "an instant in words": ({"deadlineAt": "tomorrow"}, '["deadlineAt"]'),
    "an instant that is a boolean": ({"wakeAt": True}, '["wakeAt"]'),
    "an instant with a fraction": ({"wakeAt": 1.5}, '["wakeAt"]'),
    "an instant before time": ({"deadlineAt": -1}, '["deadlineAt"]'),
    "an instant past all JSON": ({"deadlineAt": 2**53}, '["deadlineAt"]'),
    "another end": ({"deadlineAt": 1, "onTimeout": "explode"}, '["onTimeout"]'),
    "an end that is no word": ({"deadlineAt": 1, "onTimeout": [1]}, '["onTimeout"]'),
    "a prompt that is no text": ({"prompt": 5}, '["prompt"]'),
    "reminders in words": ({"remindAt": ["soon"]}, '["remindAt"]'),
    "a reminder that is nothing": ({"remindAt": None}, '["remindAt"]'),
    "a schema that is none": ({"schema": {"type": "nonsense"}}, '["schema"]'),
    "a schema that is a number": ({"schema": 5}, '["schema"]'),
}


@pytest.mark.parametrize("senseless", SENSELESS)
def test_a_reserved_field_that_makes_no_sense_is_refused_with_its_path_and_nothing_changes(
    lives: Lives, senseless: str
) -> None:
    wait_json, path = SENSELESS[senseless]

    refused = own_wait(lives, thread=1, **wait_json)

    assert isinstance(refused, Rejected)
    assert refused.code is Code.INVALID_STATE
    assert refused.reason.startswith("wait_json") and path in refused.reason
    assert refused.current is not None
    flow = lives.flow(refused.current.flow_id)
    assert (flow.status, flow.revision, flow.wait_json) == ("queued", 0, None)
    assert open_waits(lives) == []


@pytest.mark.parametrize(
    ("wait_json", "says"),
    [
        ({"kind": "\ud800"}, "wait_json['kind'] holds a lone surrogate"),
        ({"n": 10**5_000}, "wait_json['n'] has too many digits."),
        ({1: "a"}, "wait_json has a key of type int"),
        ({"n": float("nan")}, "wait_json['n'] is nan"),
        ({"deadlineAt": "soon"}, 'wait_json["deadlineAt"] must be epoch milliseconds.'),
    ],
)
def test_what_a_flow_can_not_wait_for_is_refused_the_same_however_it_is_given(
    lives: Lives, wait_json: Any, says: str
) -> None:
    with pytest.raises(InvalidState) as raised:
        lives.play(make(lives.flows, status="waiting", wait_json=wait_json))
    flow = lives.play(make(lives.flows))
    refused = lives.play(
        lives.flows.set_waiting(flow_id=flow.flow_id, expected_revision=0, wait_json=wait_json)
    )

    assert isinstance(refused, Rejected)
    assert refused.reason == str(raised.value)
    assert refused.reason.startswith(says)
    assert [flow.status for flow in lives.play(lives.flows.list())] == ["queued"]


@pytest.mark.parametrize("plain", [{}, {"nested": {"a": 1}, "list": [1]}, "words", [1, 2]])
def test_a_wait_without_plain_fields_has_no_key_and_is_answered_by_flow_and_token_only(
    lives: Lives, plain: Any
) -> None:
    flow = lives.play(make(lives.flows))
    lives.play(lives.flows.set_waiting(flow_id=flow.flow_id, expected_revision=0, wait_json=plain))

    keyed = signalled(lives, 1, key={"a": 1}, lifetime=None)
    report = signalled(lives, 2, flow_id=flow.flow_id)

    assert keyed.code == "unawaited"
    assert report.matched == 1
    now = lives.flow(flow.flow_id)
    assert (now.status, now.wait_json) == ("queued", None)
    assert now.answer_json["payload"] == 2


@pytest.mark.parametrize("given", [{}, {"wait_json": None}])
def test_a_flow_that_says_not_what_it_waits_for_is_answered_by_nobody(
    lives: Lives, given: dict[str, Any]
) -> None:
    flow = lives.play(make(lives.flows))
    lives.play(lives.flows.set_waiting(flow_id=flow.flow_id, expected_revision=0, **given))

    report = signalled(lives, 1, flow_id=flow.flow_id)

    assert (report.code, report.matched) == ("unawaited", 0)
    assert lives.flow(flow.flow_id).status == "waiting"
    assert open_waits(lives) == []


def test_a_flow_that_is_made_waiting_waits_like_any_other(lives: Lives) -> None:
    flow = lives.play(
        make(lives.flows, status="waiting", wait_json={"thread": 1, "prompt": "Well?"})
    )

    [wait] = open_waits(lives)
    report = signalled(lives, 1, key={"thread": 1})

    assert (wait.flow_id, wait.name, wait.key, wait.prompt) == (
        flow.flow_id,
        None,
        {"thread": 1},
        "Well?",
    )
    assert report.flow_ids == [flow.flow_id]


# ---- how waits are listed -------------------------------------------------------------------------


def test_open_waits_are_listed_oldest_first_with_all_that_is_needed_to_answer(
    lives: Lives,
) -> None:
    own = own_wait(lives, thread=2, prompt="Own?", deadlineAt=lives.now() + 10_000).unwrap()
    by_step = waiting(lives, prompt="Step?", schema=ORDER, timeout=100.0)

    first, second = sorted(open_waits(lives), key=lambda wait: wait.opened_at or 0)

    assert (first.flow_id, first.name, first.task_id) == (own.flow_id, None, None)
    assert (first.kind, first.key, first.prompt) == ("signal", {"thread": 2}, "Own?")
    assert first.deadline_at is not None
    assert (second.flow_id, second.name) == (by_step, "answer")
    assert second.task_id == lives.child(by_step, "answer").task_id
    assert (second.key, second.prompt, second.schema) == (
        {"kind": "reply", "thread": 1},
        "Step?",
        ORDER,
    )
    assert first.token and second.token
    assert open_waits(lives, by_step) == [second]
    assert open_waits(lives, own.flow_id) == [first]
    assert lives.play(lives.flows.list_waits(limit=1)) in ([first], [second])
    assert open_waits(lives, "nobody's") == []


def test_a_controllers_wait_is_described_in_wait_json_without_its_token(lives: Lives) -> None:
    flow_id = waiting(
        lives, prompt="Well?", schema=ORDER, timeout=100.0, on_timeout="resume", remind=[10.0]
    )

    [wait] = open_waits(lives)
    told = lives.flow(flow_id).wait_json

    assert told == {
        "kind": "reply",
        "thread": 1,
        "name": "answer",
        "prompt": "Well?",
        "schema": ORDER,
        "deadlineAt": wait.deadline_at,
        "onTimeout": "resume",
    }
