"""Tokens: whoever has one may answer the one wait it stands for, once; nobody finds it where it does not belong."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flowstead import FlowContext, Runtime, SignalReport, open_runtime
from flowstead.flow_waits import WaitStep
from flowstead.model.flow import FlowKey
from flowstead.store.memory import MemoryStore
from tests.faulty_store import flows_of, new_flow, running, settle, soon
from tests.runtime.support import STRANGER, Lives, bound, dump, make
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

HOW = [None, "kill", "close"]
LATE = ("late", 0, False, [])
NOT_FOUND = ("not_found", 0, False, [])


@pytest.fixture(autouse=True)
def _controllers(request: pytest.FixtureRequest) -> None:
    if "lives" in request.fixturenames:
        request.getfixturevalue("lives").registry = registry_of()


def codes(report: SignalReport) -> tuple[str, int, bool, list[str]]:
    assert report.reason
    return report.code.value, report.matched, report.kept, report.flow_ids


def token_of(lives: Lives, flow_id: str) -> str:
    [wait] = open_waits(lives, flow_id)
    assert wait.token
    return wait.token


def answered(lives: Lives, token: str, payload: Any = None, **given: Any) -> SignalReport:
    report = lives.play(lives.runtime.answer(token, payload, **given))
    lives.pass_time(0.1)
    return report


def own_wait(lives: Lives, **wait_json: Any) -> str:
    """A flow of nobody's code that waits."""
    flow = lives.play(make(lives.flows))
    told = lives.play(
        lives.flows.set_waiting(flow_id=flow.flow_id, expected_revision=0, wait_json=wait_json)
    )
    assert told.applied
    return flow.flow_id


@pytest.mark.parametrize("how", HOW)
def test_a_token_answers_its_wait_once_and_is_late_ever_after(
    lives: Lives, how: str | None
) -> None:
    flow_id = waiting(lives, "twice", key={})
    token = token_of(lives, flow_id)
    if how is not None:
        reopened(lives, how)
        assert token_of(lives, flow_id) == token

    assert codes(answered(lives, token, 1)) == ("matched", 1, False, [flow_id])
    if how is not None:
        reopened(lives, how)
    replayed = [answered(lives, token, "again"), answered(lives, token, "again", id="s-1")]
    other = token_of(lives, flow_id)
    answered(lives, other, 2)

    assert other != token
    assert answer_in(lives, flow_id) == [1, 2]
    replayed += [answered(lives, one, "again") for one in (token, other)]
    assert [codes(report) for report in replayed] == [LATE] * 4


def test_a_token_with_an_id_may_be_sent_again_and_is_told_so(lives: Lives) -> None:
    flow_id = waiting(lives)
    token = token_of(lives, flow_id)

    reports = [answered(lives, token, 1, id="s-1") for _ in range(2)]

    assert [report.code for report in reports] == ["matched", "duplicate"]
    assert answer_in(lives, flow_id) == 1


@pytest.mark.parametrize("token", ["", "nothing", "token-9999", "\ud800", "x" * 10_000])
def test_a_token_that_nobody_gave_answers_nothing(lives: Lives, token: str) -> None:
    flow_id = waiting(lives)

    reports = [answered(lives, token, 1), signalled(lives, 1, token=token)]

    assert [codes(report) for report in reports] == [NOT_FOUND] * 2
    check_waits_on(lives.flow(flow_id))


def test_another_owners_handle_does_not_know_the_token_but_the_runtime_needs_no_owner(
    lives: Lives,
) -> None:
    flow_id = waiting(lives)
    token = token_of(lives, flow_id)
    theirs = lives.face(lambda runtime: bound(runtime, STRANGER))

    strange = lives.play(theirs.signal(payload=1, token=token, id="s-1"))
    seen = lives.play(theirs.list_waits())
    mine = answered(lives, token, 2)

    assert codes(strange) == NOT_FOUND
    assert seen == [] == lives.play(theirs.list_waits(flow_id))
    assert codes(mine) == ("matched", 1, False, [flow_id])
    assert answer_in(lives, flow_id) == 2


def test_a_token_is_late_once_its_wait_was_withdrawn_its_flow_has_ended_or_is_to_be_cancelled(
    lives: Lives,
) -> None:
    flow_ids = [waiting(lives) for _ in range(4)]
    tokens = [token_of(lives, flow_id) for flow_id in flow_ids]
    withdrawn, finished, cancelled, requested = flow_ids
    flows = lives.flows
    lives.play(flows.cancel_task(lives.child(withdrawn, "answer").task_id))
    lives.play(flows.finish(flow_id=finished, expected_revision=lives.flow(finished).revision))
    lives.play(flows.cancel(cancelled))
    lives.play(
        flows.request_cancel(flow_id=requested, expected_revision=lives.flow(requested).revision)
    )

    assert [codes(answered(lives, token, 1)) for token in tokens] == [LATE] * 4


def test_the_token_of_a_step_is_the_same_when_the_controller_is_run_again(lives: Lives) -> None:
    seen: list[str | None] = []

    async def opens(flow: FlowContext) -> None:
        step = await flow.open_wait("answer", thread=1)
        assert isinstance(step, WaitStep)
        seen.append(step.token)
        await flow.finish(state_json={"answered": await step.result()})

    lives.registry = registry_of(opens=opens)
    flow_id = begun(lives, "opens")
    lives.pass_time(60)

    answered(lives, token_of(lives, flow_id), 1)

    assert answer_in(lives, flow_id) == 1
    first, *later = seen
    assert first and later == [None], "a wait that is over has no token any more"


@pytest.mark.parametrize("how", HOW)
def test_the_token_of_an_open_approval_takes_votes_and_says_so_to_whoever_answers_it(
    lives: Lives, how: str | None
) -> None:
    async def asks(flow: FlowContext) -> None:
        decision = await flow.approve("Pay?", {"amount": 82})
        await flow.finish(state_json={"answered": decision.verdict})

    lives.registry = registry_of(asks=asks)
    flow_id = begun(lives, "asks")
    if how is not None:
        reopened(lives, how)
    [question] = open_waits(lives)
    assert question.token is not None and question.approval is not None

    reports = [answered(lives, question.token, True), signalled(lives, True, token=question.token)]

    assert [codes(report) for report in reports] == [("unawaited", 0, False, [])] * 2
    assert {report.reason for report in reports} == {"This wait is answered by a vote."}
    assert open_waits(lives) == [question]
    vote = {"approver": "ada", "digest": question.approval.digest, "token": question.token}
    assert lives.play(lives.flows.vote("approve", **vote)).counted
    assert answer_in(lives, flow_id) == "approved"
    assert codes(answered(lives, question.token, True)) == LATE


def test_a_timer_cannot_be_answered_by_anybody(lives: Lives) -> None:
    async def sleeps(flow: FlowContext) -> None:
        await flow.sleep("nap", 1000)

    lives.registry = registry_of(sleeps=sleeps)
    flow_id = begun(lives, "sleeps")

    assert [wait.token for wait in open_waits(lives)] in ([], [None])
    named = signalled(lives, 1, flow_id=flow_id, name="nap", lifetime=None)
    assert codes(named) == ("unawaited", 0, False, [])
    assert lives.flow(flow_id).status == "waiting"


# ---- the flow's own wait --------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_a_flows_own_wait_has_a_token_of_single_use_too(lives: Lives, how: str | None) -> None:
    flow_id = own_wait(lives, thread=1)
    token = token_of(lives, flow_id)
    if how is not None:
        reopened(lives, how)

    assert codes(answered(lives, token, {"n": 1})) == ("matched", 1, False, [flow_id])
    if how is not None:
        reopened(lives, how)

    assert codes(answered(lives, token, {"n": 2})) == LATE
    flow = lives.flow(flow_id)
    assert (flow.status, flow.wait_json, flow.revision) == ("queued", None, 2)
    assert flow.answer_json == {"payload": {"n": 1}, "at": flow.updated_at}


def test_each_wait_of_a_flow_has_another_token_and_the_old_one_never_answers_the_new_one(
    lives: Lives,
) -> None:
    flow_id = own_wait(lives, thread=1)
    old = token_of(lives, flow_id)
    lives.play(
        lives.flows.set_waiting(flow_id=flow_id, expected_revision=1, wait_json={"thread": 1})
    )
    new = token_of(lives, flow_id)

    report = answered(lives, old, 1)

    assert old != new
    assert codes(report) == LATE
    assert lives.flow(flow_id).status == "waiting"
    assert answered(lives, new, 2).matched == 1


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("next_json", [{"thread": 2}, None])
def test_a_token_that_was_used_with_an_id_is_known_when_the_flow_waits_for_the_next_thing(
    lives: Lives, how: str | None, next_json: Any
) -> None:
    flow_id = own_wait(lives, thread=1)
    used = token_of(lives, flow_id)
    first = answered(lives, used, 1, id="hook-1")
    lives.play(lives.flows.set_waiting(flow_id=flow_id, expected_revision=2, wait_json=next_json))
    if how is not None:
        reopened(lives, how)

    again = [answered(lives, used, 1, id="hook-1"), signalled(lives, 1, token=used, id="hook-1")]

    assert codes(first) == ("matched", 1, False, [flow_id])
    assert [codes(report) for report in again] == [("duplicate", 0, False, [])] * 2
    assert codes(answered(lives, used, 2, id="hook-2")) == codes(answered(lives, used, 2)) == LATE
    assert lives.flow(flow_id).revision == 3
    assert len(open_waits(lives)) == (next_json is not None)


def test_what_somebody_makes_of_a_token_answers_nothing(lives: Lives) -> None:
    flow_id = own_wait(lives, thread=1)
    token = token_of(lives, flow_id)
    place, _, secret = token.partition(".")

    made_up = [place, f"{place}.", f".{secret}", secret, f"{token}x", f"{place}.{secret}.x"]

    assert secret and all(answered(lives, one, 1).matched == 0 for one in made_up)
    check_waits_on(lives.flow(flow_id))
    assert codes(answered(lives, token, 1))[0] == "matched"


class LateLook(MemoryStore):
    """A store whose next look for a token comes back late."""

    late: asyncio.Event | None = None

    async def find_token(self, token: str) -> tuple[FlowKey, str | None] | None:
        found = await super().find_token(token)
        late, self.late = self.late, None
        if late is not None:
            await late.wait()
        return found


async def test_a_token_that_was_looked_up_for_one_wait_never_answers_the_next() -> None:
    store = LateLook()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json={"n": 1})
        [wait] = await flows.list_waits()
        assert wait.token
        store.late = go_on = asyncio.Event()
        sending = asyncio.create_task(runtime.answer(wait.token, "for the first"))
        await settle()
        await flows.signal(payload="first", flow_id=flow_id)
        await flows.set_waiting(flow_id=flow_id, expected_revision=2, wait_json={"n": 2})

        go_on.set()

        assert codes(await soon(sending)) == LATE
        flow = await flows.get(flow_id)
        assert flow is not None and (flow.status, flow.revision) == ("waiting", 3)


# ---- where it is not ------------------------------------------------------------------------------


async def test_a_token_is_in_no_event_no_wait_json_and_no_log(
    store: Path | MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_runtime(store, registry=registry_of()) as runtime:
        flows = bound(runtime)
        flow = await make(flows, controller_id="waits", state_json={"schema": {"type": "integer"}})
        await _until_waiting(runtime, flow.flow_id)
        other = await make(flows)
        await flows.set_waiting(
            flow_id=other.flow_id, expected_revision=0, wait_json={"kind": "reply"}
        )
        tokens = [wait.token or "" for wait in await flows.list_waits()]
        assert len(tokens) == 2 and all(len(token) >= 20 for token in tokens)

        wrong = await runtime.answer(tokens[0], "no number")
        right = [await runtime.answer(token, 1) for token in tokens]
        await soon(flows.result(flow.flow_id), 60)
        told = [
            await flows.get(flow.flow_id),
            *await flows.history(flow.flow_id),
            await flows.get(other.flow_id),
            *await flows.history(other.flow_id),
            *await flows.list_tasks(flow.flow_id),
        ]

    assert wrong.code == "wrong_shape" and [report.matched for report in right] == [1, 1]
    texts = [repr(told), caplog.text, repr(wrong), repr(right)]
    texts += [json.dumps([list(map(str, row)) for row in dump(store)["events"]])]
    for token in tokens:
        assert not any(token in text for text in texts)


async def _until_waiting(runtime: Runtime, flow_id: str) -> None:
    async with bound(runtime).watch(flow_id, after_seq=0) as events:
        async for event in events:
            if event.type == "flow.waiting":
                return


async def test_a_token_cannot_be_guessed_and_none_is_given_twice(store: Path | MemoryStore) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        for _ in range(20):
            flow = await make(flows)
            await flows.set_waiting(flow_id=flow.flow_id, expected_revision=0, wait_json={})

        tokens = [wait.token or "" for wait in await flows.list_waits()]

    assert len(set(tokens)) == 20
    assert min(map(len, tokens)) >= 22, "fewer than 128 bits"
