"""Approvals, by the public API: who decides, about what exactly, and what may be done then, over restarts."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from flowstead import (
    Decision,
    FlowContext,
    NeedsReview,
    NotApproved,
    OpenWait,
    Task,
    TaskContext,
    TaskRetryReport,
    VoteReport,
)
from flowstead.model.approval import Rules
from flowstead.rules import approvals
from tests.runtime.support import OWNER, STRANGER, Lives, bound, make

ITEMS: dict[str, Any] = {"to": "alice", "amount": 100}
PROMPT = "Pay alice?"
RESTARTS = pytest.mark.parametrize(
    ("lives", "between"),
    [("memory", None), ("memory", "close"), ("file", "kill")],
    indirect=["lives"],
)
"""What happens between two steps: nothing, or the end of the process, one way or the other."""
IN_MEMORY = pytest.mark.parametrize("lives", ["memory"], indirect=True)


class Till:
    """A controller that pays what is approved, and the people who vote; `between` every two of their steps
    the process may end."""

    def __init__(self, lives: Lives, between: str | None = None, **rules: Any) -> None:
        self.lives, self.between, self.rules = lives, between, rules
        self.items: Any = ITEMS
        self.decisions: list[Decision] = []
        self.paid: list[Any] = []
        self.raised: list[Exception] = []
        lives.registry.task(name="pay")(self.pay)
        lives.registry.controller("till")(self.till)
        flow = lives.play(make(lives.flows, controller_id="till"))
        self.flow_id = flow.flow_id
        self.turn_over()

    async def till(self, flow: FlowContext) -> None:
        decision = await flow.approve(PROMPT, self.items, name="may pay", **self.rules)
        self.decisions.append(decision)
        await self.act(flow, decision)

    async def act(self, flow: FlowContext, decision: Decision) -> None:
        """Pay whatever was decided: it is not the controller that keeps what was declined from being done."""
        try:
            await flow.run("pay", decision.items, approval=decision)
        except NotApproved as error:
            self.raised.append(error)
            raise

    async def pay(self, _: TaskContext, given: Any) -> str:
        self.paid.append(given)
        return "paid"

    # ---- people -----------------------------------------------------------------------------------

    def turn_over(self) -> None:
        """Let everything happen, and the process end if it is to."""
        self.lives.pass_time(0.5)
        if self.between is not None:
            self.lives.restart(self.between)
            # Who was cut off where he stood is entered again when he would have been parked.
            self.lives.pass_time(6)

    def question(self) -> OpenWait:
        [wait] = self.lives.play(self.lives.flows.list_waits(self.flow_id))
        assert wait.approval is not None
        return wait

    def vote(self, decision: str, approver: str, **given: Any) -> VoteReport:
        if "digest" not in given:
            approval = self.question().approval
            assert approval is not None
            given["digest"] = approval.digest
        asked = {"flow_id": self.flow_id, "name": "may pay"} | given
        report = self.lives.play(self.lives.flows.vote(decision, approver=approver, **asked))
        self.turn_over()
        return report

    # ---- looking ----------------------------------------------------------------------------------

    @property
    def verdict(self) -> str:
        """What the controller was told, each time it was."""
        told = {str(decision.verdict) for decision in self.decisions}
        assert len(told) == 1, told
        return told.pop()

    def payments(self) -> list[Task]:
        return [t for t in self.lives.children(self.flow_id) if t.task == "pay"]

    def check_paid(self, items: Any = None) -> None:
        assert self.verdict == "approved"
        assert self.lives.result(self.flow_id).status == "succeeded"
        [payment] = self.payments()
        assert payment.input_json == (ITEMS if items is None else items)
        assert set(map(str, self.paid)) == {str(payment.input_json)}

    def check_nothing_begun(self, verdict: str | None) -> None:
        """The flow has failed because nothing was allowed, and no child was made."""
        if verdict is not None:
            assert self.verdict == verdict
        ended = self.lives.result(self.flow_id)
        assert ended.status == "failed"
        assert ended.failure is not None
        assert ended.failure.code == "NotApproved"
        assert self.payments() == []
        assert self.paid == []


def digest_for(till: Till, items: Any = ITEMS, rules: Rules | None = None) -> str:
    """What a voter would be shown, before it is."""
    return approvals.shown_digest(
        msgspec.Raw(msgspec.json.encode(items)),
        rules or Rules(),
        prompt=PROMPT,
        flow_id=till.flow_id,
        step="may pay",
    )


# ---- deciding -------------------------------------------------------------------------------------


@RESTARTS
def test_what_one_approves_is_done_once_and_the_ballot_is_on_record(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between)

    report = till.vote("approve", "ann", comment="fine", role="boss")

    assert (report.counted, report.verdict) == (True, "approved")
    till.check_paid()
    [ballot] = till.decisions[0].votes
    told = (ballot.kind, ballot.approver, ballot.role, ballot.comment)
    assert told == ("approve", "ann", "boss", "fine")
    assert ballot.at > 0
    assert till.decisions[0].items == ITEMS


@RESTARTS
def test_what_one_rejects_is_a_value_and_nothing_is_begun(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between)

    report = till.vote("reject", "ann", comment="too much")

    assert (report.counted, report.code, report.verdict) == (True, "counted", "rejected")
    till.check_nothing_begun("rejected")
    assert not till.decisions[0].approved
    assert {decision.reason for decision in till.decisions} == {"Rejected by ann: too much."}


@IN_MEMORY
def test_what_nobody_rejects_and_cannot_be_approved_any_more_says_so(lives: Lives) -> None:
    two = ["ann", "bob"]
    till = Till(lives, quorum=2, approvers=two, requested_by="eve", four_eyes=True)

    # Under four eyes the edit is no approval, and one person more is not enough.
    assert till.vote("edit", "ann", items="less").verdict == "rejected"

    assert till.verdict == "rejected"
    assert till.decisions[0].reason == "It cannot be approved any more."


@IN_MEMORY
def test_of_several_who_reject_each_is_named(lives: Lives) -> None:
    till = Till(lives, quorum=2, veto=False)
    till.vote("reject", "ann", comment="too much")
    till.vote("approve", "eve")
    till.vote("reject", "bob")

    till.check_nothing_begun("rejected")
    assert till.decisions[0].reason == "Rejected by ann: too much; bob."


@RESTARTS
def test_an_edit_puts_other_items_in_place_and_voids_what_was_said_before(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between, quorum=2)
    assert till.vote("approve", "ann").verdict is None
    shown = till.question().approval
    less = {"to": "alice", "amount": 1}

    edited = till.vote("edit", "bob", items=less)
    late = till.vote("approve", "ann", digest=shown.digest if shown else "")
    asked = till.question().approval
    assert asked is not None
    again = till.vote("approve", "ann")

    assert (edited.counted, edited.verdict) == (True, None)
    assert not late.counted
    assert asked.items == less
    assert [ballot.approver for ballot in asked.votes] == ["bob"]
    assert (again.counted, again.verdict) == (True, "approved")
    till.check_paid(less)


@IN_MEMORY
def test_an_edit_that_does_not_fit_is_refused_and_the_question_stays_open(lives: Lives) -> None:
    amount = {"type": "object", "properties": {"amount": {"type": "integer", "maximum": 100}}}
    till = Till(lives, schema=amount)

    refused = till.vote("edit", "ann", items={"to": "alice", "amount": "all"})

    assert not refused.counted
    assert "amount" in (refused.reason or "")
    assert till.question().approval is not None
    assert till.vote("edit", "ann", items={"to": "alice", "amount": 7}).verdict == "approved"
    till.check_paid({"to": "alice", "amount": 7})


@RESTARTS
def test_so_many_must_approve_as_are_asked_and_of_each_role_as_many(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between, roles={"legal": 1, "finance": 1}, quorum=3)

    reports = [
        till.vote("approve", "ann", role="legal"),
        till.vote("approve", "bob", role="sales"),
        till.vote("approve", "bob"),
        till.vote("approve", "bob", role="legal"),
        till.vote("approve", "cid", role="legal"),
        till.vote("approve", "dan", role="finance"),
    ]

    assert [report.counted for report in reports] == [True, False, False, True, True, True]
    assert [report.verdict for report in reports] == [None] * 5 + ["approved"]
    till.check_paid()


@IN_MEMORY
def test_as_many_must_approve_as_the_roles_ask_for_unless_it_is_said_otherwise(
    lives: Lives,
) -> None:
    till = Till(lives, roles={"legal": 2, "finance": 1})

    reports = [
        till.vote("approve", "ann", role="legal"),
        till.vote("approve", "bob", role="finance"),
        till.vote("approve", "cid", role="legal"),
    ]

    assert [(r.counted, r.verdict) for r in reports] == [
        (True, None), (True, None), (True, "approved"),
    ]  # fmt: skip
    till.check_paid()


@IN_MEMORY
@pytest.mark.parametrize(
    "where",
    [
        {},
        {"name": "may pay"},
        {"flow_id": "triage-1"},
        {"token": "t", "flow_id": "triage-1", "name": "may pay"},
        {"token": "t", "flow_id": "triage-1"},
        {"token": "t", "name": "may pay"},
    ],
    ids=lambda where: " ".join(where),
)
def test_a_vote_says_in_one_way_which_approval_it_is_for(
    lives: Lives, where: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="say which approval: flow_id and name, or token"):
        lives.play(lives.flows.vote("approve", approver="ann", digest="d", **where))


@RESTARTS
def test_two_of_three_named_approvers_decide_and_nobody_else_has_a_say(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between, approvers=["ann", "bob", "cid"], quorum=2, veto=False)

    stranger = till.vote("approve", "eve")
    one = till.vote("reject", "ann")
    twice = till.vote("approve", "ann")
    two = till.vote("approve", "bob")
    three = till.vote("approve", " cid ")

    assert [r.counted for r in (stranger, one, twice, two, three)] == [
        False, True, False, True, True,
    ]  # fmt: skip
    assert three.verdict == "approved"
    till.check_paid()


@IN_MEMORY
def test_named_approvers_reject_as_soon_as_enough_cannot_come_any_more(lives: Lives) -> None:
    till = Till(lives, approvers=["ann", "bob", "cid"], quorum=2, veto=False)

    assert till.vote("reject", "ann").verdict is None
    assert till.vote("reject", "bob").verdict == "rejected"

    till.check_nothing_begun("rejected")


@IN_MEMORY
@pytest.mark.parametrize(
    ("veto", "role", "verdict"),
    [(True, "sales", "rejected"), (False, "legal", None), (["legal"], "sales", None),
     (["legal"], "legal", "rejected")],
)  # fmt: skip
def test_whose_rejection_ends_it_is_said_by_the_veto(
    lives: Lives, veto: Any, role: str, verdict: str | None
) -> None:
    till = Till(lives, roles=["legal", "sales"], quorum=2, veto=veto)

    assert till.vote("approve", "bob", role="sales").counted
    report = till.vote("reject", "ann", role=role)

    assert (report.counted, report.verdict) == (True, verdict)
    if verdict is None:
        assert till.vote("approve", "cid", role="legal").verdict == "approved"
        till.check_paid()
    else:
        till.check_nothing_begun("rejected")


@IN_MEMORY
def test_who_asked_does_not_decide_where_four_eyes_are_needed(lives: Lives) -> None:
    till = Till(lives, requested_by="ann", four_eyes=True)

    for spelling in ("ann", " ann\t"):
        assert not till.vote("approve", spelling).counted
    assert not till.vote("edit", "ann", items={"to": "ann"}).counted

    assert till.vote("approve", "bob").verdict == "approved"
    till.check_paid()


@RESTARTS
def test_who_edits_the_items_does_not_approve_them_alone_where_four_eyes_are_needed(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between, requested_by="ann", four_eyes=True)
    more = {"to": "eve", "amount": 820_000}

    edited = till.vote("edit", "eve", items=more)
    alone = till.vote("approve", "eve")
    asker = till.vote("approve", "ann")
    assert till.payments() == []
    seconded = till.vote("approve", "bob")

    assert [(r.counted, r.verdict) for r in (edited, alone, asker, seconded)] == [
        (True, None), (False, None), (False, None), (True, "approved"),
    ]  # fmt: skip
    till.check_paid(more)


@IN_MEMORY
@pytest.mark.parametrize(
    "given",
    [{"digest": "0" * 64, "code": "changed"}, {"approver": "ann", "code": "already_voted"},
     {"flow_id": "no such flow", "code": "not_found"}, {"name": "other", "code": "kept"},
     {"token": "no such token", "code": "not_found"}, {"role": "guest", "code": "wrong_role"},
     {"flow_id": "\ud800", "code": "not_found"}, {"approver": "asks", "code": "four_eyes"}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_a_vote_that_does_not_count_leaves_everything_as_it_was(
    lives: Lives, given: dict[str, Any]
) -> None:
    code = given.pop("code")
    rules = {"requested_by": "asks", "four_eyes": True, "roles": ["lead"]}
    till = Till(lives, quorum=2, **rules)
    till.vote("approve", "ann", role="lead")
    before = till.question(), lives.history(till.flow_id)
    asked = {"approver": "bob", "role": "lead", "flow_id": till.flow_id, "name": "may pay"} | given
    asked = {"digest": before[0].approval.digest if before[0].approval else ""} | asked
    if "token" in given:
        del asked["flow_id"], asked["name"]

    report = lives.play(lives.flows.vote("approve", **asked))

    assert (report.counted, report.code, report.kept) == (False, code, code == "kept")
    assert report.reason
    if not report.kept:  # one on another step waits for its question
        assert (till.question(), lives.history(till.flow_id)) == before
    last = till.vote("approve", "bob", role="lead")
    assert (last.counted, last.code, last.verdict) == (True, "counted", "approved")


TWO_SPELLINGS = pytest.mark.parametrize(
    "spelt", ["ann\u200b", "a\u00adnn", "an\x00n", "ann\u00a0bell", "Ame\u0301lie"]
)
"""Names that look like another one."""


@IN_MEMORY
@TWO_SPELLINGS
@pytest.mark.parametrize("field", ["approver", "role"])
def test_a_vote_in_a_name_that_may_look_like_another_is_refused(
    lives: Lives, spelt: str, field: str
) -> None:
    till = Till(lives, quorum=2)
    till.vote("approve", "ann")
    before = till.question(), lives.history(till.flow_id)

    with pytest.raises(ValueError, match=f"{field} must be printable and in Unicode normal form C"):
        till.vote("approve", **{"approver": "bob", field: spelt})

    assert (till.question(), lives.history(till.flow_id)) == before
    assert till.vote("approve", "Am\u00e9lie", role="J\u00fcrist").verdict == "approved"


@IN_MEMORY
@TWO_SPELLINGS
@pytest.mark.parametrize(
    ("field", "rules"),
    [
        ("approvers", lambda name: {"approvers": ["bob", name]}),
        ("requested_by", lambda name: {"requested_by": name, "four_eyes": True}),
        ("roles", lambda name: {"roles": [name]}),
        ("roles", lambda name: {"roles": {name: 1}}),
        ("veto", lambda name: {"roles": ["lead"], "veto": [name]}),
    ],
)
def test_a_name_in_the_rules_that_may_look_like_another_is_refused_before_anybody_is_asked(
    lives: Lives, spelt: str, field: str, rules: Any
) -> None:
    till = Till(lives, **rules(spelt))

    ended = lives.result(till.flow_id)

    assert ended.failure is not None
    assert ended.failure.message == (
        f"ValueError: {field} must be printable and in Unicode normal form C."
    )
    assert lives.children(till.flow_id) == []


@IN_MEMORY
def test_another_owner_has_no_vote_here(lives: Lives) -> None:
    till = Till(lives)
    question = till.question()
    assert question.approval is not None
    strange = lives.face(lambda runtime: bound(runtime, STRANGER))
    vote = {"approver": "eve", "digest": question.approval.digest}

    for where in ({"flow_id": till.flow_id, "name": "may pay"}, {"token": question.token}):
        assert not lives.play(strange.vote("approve", **vote, **where)).counted

    assert till.question() == question


@IN_MEMORY
@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"quorum": 0}, "quorum"),
        ({"quorum": 2, "approvers": ["ann"]}, "quorum"),
        ({"four_eyes": True}, "requested_by"),
        ({"roles": {"legal": 1, "sales": 1}, "quorum": 1}, "roles asks for 2 approvals altogether"),
        ({"roles": {"legal": 600, "sales": 600}}, "quorum"),
        ({"veto": ["legal"]}, "veto"),
        ({"roles": ["*"]}, "roles"),
        ({"quorum": 1_001}, "quorum"),
    ],
)
def test_rules_that_can_never_be_met_are_refused_before_anybody_is_asked(
    lives: Lives, rules: dict[str, Any], says: str
) -> None:
    till = Till(lives, **rules)

    ended = lives.result(till.flow_id)

    assert ended.failure is not None
    assert (ended.failure.code, says in (ended.failure.message or "")) == ("ValueError", True)
    assert lives.children(till.flow_id) == []


@IN_MEMORY
@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"four_eyes": 1, "requested_by": "bob"}, "four_eyes must be True or False, not int."),
        ({"four_eyes": "yes", "requested_by": "bob"}, "four_eyes must be True or False, not str."),
        ({"roles": {"lead": 1.5}, "quorum": 2}, "roles must be an int, not float."),
        ({"roles": {"lead": True}}, "roles must be an int, not bool."),
        ({"roles": {"lead": "2"}, "quorum": 2}, "roles must be an int, not str."),
        ({"roles": {1: 1}}, "roles must be a string, not int."),
        ({"roles": "lead"}, "roles must be several strings, not str."),
        ({"veto": "lead", "roles": ["lead"]}, "veto must be several strings, not str."),
        ({"veto": None}, "veto must be several strings, not NoneType."),
        ({"quorum": 1.0}, "quorum must be an int, not float."),
        ({"approvers": [None]}, "approvers must be a string, not NoneType."),
        ({"requested_by": 7}, "requested_by must be a string, not int."),
    ],
)
def test_rules_of_the_wrong_type_are_refused_before_anybody_is_asked(
    lives: Lives, rules: dict[str, Any], says: str
) -> None:
    till = Till(lives, **rules)

    ended = lives.result(till.flow_id)

    assert ended.failure is not None
    assert (ended.failure.code, ended.failure.message) == ("TypeError", f"TypeError: {says}")
    assert lives.children(till.flow_id) == []


@IN_MEMORY
def test_a_role_is_known_without_the_white_space_around_it(lives: Lives) -> None:
    till = Till(lives, roles={" lead ": 1})

    assert till.vote("approve", "ann", role="lead").verdict == "approved"


@IN_MEMORY
@pytest.mark.parametrize("given", [True, "may pay", {"verdict": "approved"}])
def test_only_a_decision_is_an_approval(lives: Lives, given: Any) -> None:
    class Careless(Till):
        async def act(self, flow: FlowContext, decision: Decision) -> None:
            for begin in (flow.run, flow.start):
                with pytest.raises(
                    TypeError, match=r"approval must be the Decision that flow\.app"
                ):
                    await begin("pay", decision.items, approval=given)

    till = Careless(lives)

    till.vote("approve", "ann")

    assert lives.result(till.flow_id).status == "succeeded"
    assert till.payments() == []


# ---- time -----------------------------------------------------------------------------------------


@RESTARTS
def test_a_question_that_nobody_decides_in_time_is_expired_and_late_votes_are_told(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between, expires=100)
    digest = digest_for(till)
    lives.pass_time(101)

    late = till.vote("approve", "ann", digest=digest)

    assert (late.counted, late.kept, late.code) == (False, False, "late")
    till.check_nothing_begun("expired")
    assert till.decisions[0].reason == "Its time was over before it was decided."


# ---- early, by token, at once ---------------------------------------------------------------------


class Later(Till):
    """A till that asks only once it is told to."""

    async def till(self, flow: FlowContext) -> None:
        await flow.wait("go on")
        await super().till(flow)

    def go_on(self) -> None:
        assert self.lives.play(self.lives.flows.signal(flow_id=self.flow_id, name="go on")).matched
        self.turn_over()


@RESTARTS
def test_votes_that_come_before_the_question_are_counted_when_it_is_asked(
    lives: Lives, between: str | None
) -> None:
    till = Later(lives, between, quorum=2)
    digest = digest_for(till, rules=Rules(quorum=2))

    early = [
        till.vote("approve", "eve", digest="something else"),
        till.vote("approve", "ann", digest=digest),
        till.vote("approve", "ann", digest=digest),
    ]
    assert [(r.counted, r.kept, r.code) for r in early] == [(False, True, "kept")] * 3
    till.go_on()
    asked = till.question().approval
    assert asked is not None
    assert [ballot.approver for ballot in asked.votes] == ["ann"]
    till.vote("approve", "bob")

    till.check_paid()
    ends = [(t.status, t.runtime) for t in lives.children(till.flow_id) if t.runtime == "vote"]
    assert sorted(status for status, _ in ends) == ["failed", "failed", "succeeded"]


@RESTARTS
def test_an_early_vote_may_decide_the_question_as_it_is_asked(
    lives: Lives, between: str | None
) -> None:
    till = Later(lives, between)
    till.vote("approve", "ann", digest=digest_for(till))

    till.go_on()

    till.check_paid()


class AsksFirst(Later):
    """A till that opens the question, goes on, and reads the answer afterwards."""

    async def till(self, flow: FlowContext) -> None:
        await flow.wait("go on")
        await flow.ask_approval(PROMPT, self.items, name="may pay", **self.rules)
        decision = await flow.approve(PROMPT, self.items, name="may pay", **self.rules)
        self.decisions.append(decision)
        await self.act(flow, decision)


@RESTARTS
def test_a_question_asked_beside_is_the_one_that_is_answered_afterwards(
    lives: Lives, between: str | None
) -> None:
    till = AsksFirst(lives, between)
    till.go_on()

    assert till.vote("approve", "ann").verdict == "approved"

    till.check_paid()


class AsksWithoutAName(Later):
    """A till that asks twice beside, the same and something else, and reads the answers afterwards."""

    async def till(self, flow: FlowContext) -> None:
        await flow.wait("go on")
        first = await flow.ask_approval(PROMPT, self.items)
        await flow.ask_approval("And now?", self.items)
        other = await flow.approve("And now?", self.items)
        same = await flow.approve(PROMPT, self.items)
        again = await flow.approve(PROMPT, self.items, expires=60)
        self.decisions.append(same)
        assert await first.result() == same
        await flow.finish(state_json=[d.name for d in (same, other, again)])


@RESTARTS
def test_a_question_asked_beside_needs_no_name_to_be_answered_afterwards(
    lives: Lives, between: str | None
) -> None:
    till = AsksWithoutAName(lives, between)
    till.go_on()
    questions = lives.play(lives.flows.list_waits(till.flow_id))
    assert [question.name for question in questions] == ["approval", "approval#2"]

    for question in questions:
        assert question.approval is not None
        till.vote("approve", "ann", digest=question.approval.digest, name=question.name)
    till.lives.pass_time(61)

    # The question that was asked beside is waited for once; asking again is another one.
    assert lives.result(till.flow_id).state_json == ["approval", "approval#2", "approval#3"]
    assert till.verdict == "approved"


@IN_MEMORY
@pytest.mark.parametrize("way", ["approve", "expire", "withdraw"])
def test_a_question_asked_beside_answers_the_decision_like_one_that_is_waited_for(
    lives: Lives, way: str
) -> None:
    class Asks(Later):
        async def till(self, flow: FlowContext) -> None:
            step = await flow.ask_approval(PROMPT, self.items, name="may pay", expires=60)
            await flow.wait("go on")
            decision = await step.result()
            [gathered] = await flow.gather(step)
            self.decisions += [decision, gathered]
            assert decision == await flow.approve(PROMPT, self.items, name="may pay", expires=60)
            await self.act(flow, decision)

    till = Asks(lives)
    if way == "approve":
        till.vote("approve", "ann", digest=digest_for(till))
    elif way == "expire":
        lives.pass_time(61)
    else:
        [question] = [t for t in lives.children(till.flow_id) if t.run_id == "may pay"]
        lives.play(lives.flows.cancel_task(question.task_id))
    till.go_on()

    if way == "approve":
        till.check_paid()
    else:
        till.check_nothing_begun({"expire": "expired", "withdraw": "withdrawn"}[way])


@IN_MEMORY
def test_an_early_vote_is_counted_also_where_the_question_is_asked_beside(lives: Lives) -> None:
    till = AsksFirst(lives)
    till.vote("approve", "ann", digest=digest_for(till))

    till.go_on()

    assert lives.play(lives.flows.list_waits(till.flow_id)) == []
    till.check_paid()


@RESTARTS
def test_whoever_has_the_token_may_vote_without_knowing_flow_or_owner(
    lives: Lives, between: str | None
) -> None:
    till = Till(lives, between, quorum=2)
    question = till.question()
    assert question.token is not None
    assert question.approval is not None
    token, digest = question.token, question.approval.digest

    first = lives.play(lives.runtime.vote(token, "approve", approver="ann", digest=digest))
    till.turn_over()
    again = lives.play(lives.runtime.vote(token, "approve", approver="ann", digest=digest))
    second = lives.play(lives.flows.vote("approve", approver="bob", digest=digest, token=token))
    till.turn_over()

    assert (first.counted, first.verdict) == (True, None)
    assert not again.counted
    assert (second.counted, second.verdict) == (True, "approved")
    till.check_paid()
    events = [str(event.changed) for event in lives.history(till.flow_id)]
    assert not [text for text in events if token in text]


@IN_MEMORY
def test_a_token_whose_question_is_decided_takes_no_vote_any_more(lives: Lives) -> None:
    class Lingers(Till):
        async def act(self, flow: FlowContext, decision: Decision) -> None:
            await flow.wait("for ever")

    till = Lingers(lives)
    question = till.question()
    assert question.token is not None
    assert question.approval is not None
    vote = {"approver": "bob", "digest": question.approval.digest}
    till.vote("approve", "ann")
    before = lives.children(till.flow_id)

    late = lives.play(lives.runtime.vote(question.token, "approve", **vote))

    assert (late.counted, late.kept) == (False, False)
    assert lives.children(till.flow_id) == before


@IN_MEMORY
@pytest.mark.parametrize("order", [("approve", "reject"), ("reject", "approve")])
def test_of_two_who_vote_at_once_one_decides(lives: Lives, order: tuple[str, str]) -> None:
    till = Till(lives)
    question = till.question()
    assert question.approval is not None
    digest = question.approval.digest
    handles = [lives.face(lambda runtime: bound(runtime, OWNER)) for _ in order]

    async def both() -> list[VoteReport]:
        votes = [
            flows.vote(
                decision, approver=decision, digest=digest, flow_id=till.flow_id, name="may pay"
            )
            for flows, decision in zip(handles, order, strict=True)
        ]
        return await asyncio.gather(*votes)

    reports = lives.play(both())
    lives.result(till.flow_id)

    assert [report.counted for report in reports] == [True, False]
    verdict = {"approve": "approved", "reject": "rejected"}[order[0]]
    assert [str(report.verdict) for report in reports if report.counted] == [verdict]
    assert till.verdict == verdict
    assert len(till.paid) == (verdict == "approved")
    [asked] = [t for t in lives.children(till.flow_id) if t.runtime == "approval"]
    ends = [e for e in lives.history(till.flow_id) if e.task_id == asked.task_id]
    assert [e.type for e in ends].count("task.ended") == 1


@IN_MEMORY
def test_a_hundred_votes_of_one_person_at_once_are_one(lives: Lives) -> None:
    till = Till(lives, quorum=2)
    question = till.question()
    assert question.approval is not None
    where = {"flow_id": till.flow_id, "name": "may pay", "digest": question.approval.digest}

    async def stampede() -> list[VoteReport]:
        return await asyncio.gather(
            *(lives.flows.vote("approve", approver="ann", **where) for _ in range(100))
        )

    reports = lives.play(stampede())

    assert [report.counted for report in reports].count(True) == 1
    assert till.payments() == []


# ---- a flow that moves on -------------------------------------------------------------------------


def change_from_outside(lives: Lives, flow_id: str, way: str) -> None:
    flow = lives.flow(flow_id)
    given = {"flow_id": flow_id, "expected_revision": flow.revision}
    if way == "state":
        done = lives.play(lives.flows.update(**given, state_json={"amount": 7}))
    elif way == "step":
        done = lives.play(lives.flows.update(**given, current_step="elsewhere"))
    else:
        done = lives.play(lives.flows.resume(**given, state_json="other"))
    assert done.applied


@RESTARTS
@pytest.mark.parametrize("way", ["state", "step", "resume"])
def test_a_flow_that_somebody_else_has_changed_makes_the_question_stale(
    lives: Lives, between: str | None, way: str
) -> None:
    till = Till(lives, between)
    digest = digest_for(till)
    change_from_outside(lives, till.flow_id, way)
    till.turn_over()

    report = till.vote("approve", "ann", digest=digest)

    assert (report.counted, report.code, report.verdict) == (False, "stale", "stale")
    till.check_nothing_begun("stale")


class ReadsFirst(Till):
    """A till that makes the items of what it has read, and asks only after a step that takes its time."""

    async def till(self, flow: FlowContext) -> None:
        self.items = {**ITEMS, "stock": flow.state_json}
        await flow.run(self.looks_up, name="look up")
        await super().till(flow)

    async def looks_up(self, _: TaskContext, __: Any) -> None:
        self.looked_up = asyncio.get_running_loop().create_future()
        await self.looked_up


@IN_MEMORY
@pytest.mark.parametrize("way", ["state", "step"])
def test_what_was_made_of_a_flow_that_somebody_else_has_changed_since_is_stale_when_it_is_asked(
    lives: Lives, way: str
) -> None:
    till = ReadsFirst(lives)
    change_from_outside(lives, till.flow_id, way)

    till.looked_up.set_result(None)
    till.turn_over()
    report = till.vote("approve", "ann")

    assert (report.counted, report.verdict) == (False, "stale")
    till.check_nothing_begun("stale")


@IN_MEMORY
def test_a_controller_that_is_entered_again_asks_about_the_flow_as_it_has_become(
    lives: Lives,
) -> None:
    till = ReadsFirst(lives)
    change_from_outside(lives, till.flow_id, "state")
    lives.restart("kill")
    lives.pass_time(6)

    till.looked_up.set_result(None)
    till.turn_over()

    assert till.vote("approve", "ann").verdict == "approved"
    till.check_paid({**ITEMS, "stock": {"amount": 7}})


@IN_MEMORY
def test_a_flow_that_its_own_controller_changes_leaves_the_question_as_it_is(lives: Lives) -> None:
    class Busy(Till):
        async def till(self, flow: FlowContext) -> None:
            await flow.ask_approval(PROMPT, ITEMS, name="may pay")
            await flow.update(state_json="busy", current_step="on and on")
            await super().till(flow)

    till = Busy(lives)
    lives.pass_time(10)

    assert till.vote("approve", "ann").verdict == "approved"

    till.check_paid()


@IN_MEMORY
@pytest.mark.parametrize("way", ["cancel_task", "request_cancel", "cancel"])
def test_a_question_that_is_withdrawn_allows_nothing(lives: Lives, way: str) -> None:
    till = Till(lives)
    question = till.question()
    assert question.task_id is not None
    flow = lives.flow(till.flow_id)
    if way == "cancel_task":
        lives.play(lives.flows.cancel_task(question.task_id))
    elif way == "cancel":
        lives.play(lives.flows.cancel(flow_id=till.flow_id))
    else:
        asked = {"flow_id": till.flow_id, "expected_revision": flow.revision}
        lives.play(lives.flows.request_cancel(**asked))
    ended = lives.result(till.flow_id)

    assert ended.status == ("failed" if way == "cancel_task" else "cancelled")
    assert {str(decision.verdict) for decision in till.decisions} <= {"withdrawn"}
    assert till.payments() == []
    late = till.vote("approve", "ann", digest=digest_for(till))
    assert (late.counted, late.kept) == (False, False)


# ---- what is allowed then -------------------------------------------------------------------------


class Misuses(Till):
    """A till that has its approval, and does something else with it, first of all."""

    def __init__(self, lives: Lives, misuse: str, between: str | None = None) -> None:
        self.misuse = misuse
        super().__init__(lives, between, expires=1000)

    async def act(self, flow: FlowContext, decision: Decision) -> None:
        await flow.wait("go on")
        given: Any = decision.items
        if self.misuse == "other arguments":
            given = {**ITEMS, "amount": 101}
        elif self.misuse == "more arguments":
            given = {**ITEMS, "note": None}
        elif self.misuse == "another type":
            given = {**ITEMS, "amount": 100.0}
        elif self.misuse == "a second use":
            await flow.run(self.allowed, decision.items, name="first", approval=decision)
        elif self.misuse == "an invented decision":
            decision = Decision(name="may pay too", verdict=decision.verdict, items=given)
        try:
            await flow.run("pay", given, approval=decision)
        except NotApproved as error:
            self.raised.append(error)
            raise

    async def allowed(self, _: TaskContext, given: Any) -> None:
        assert given == ITEMS

    def go_on(self) -> None:
        self.lives.play(self.lives.flows.signal(flow_id=self.flow_id, name="go on"))
        self.turn_over()


MISUSES = [
    "other arguments",
    "more arguments",
    "another type",
    "a second use",
    "an invented decision",
    "an expired one",
    "a changed flow",
]


@RESTARTS
@pytest.mark.parametrize("misuse", MISUSES)
def test_whatever_is_not_exactly_what_was_approved_is_refused_and_nothing_is_begun(
    lives: Lives, misuse: str, between: str | None
) -> None:
    till = Misuses(lives, misuse, between)
    assert till.vote("approve", "ann").verdict == "approved"
    if misuse == "an expired one":
        lives.pass_time(1001)
    elif misuse == "a changed flow":
        change_from_outside(lives, till.flow_id, "state")

    till.go_on()

    till.check_nothing_begun("approved")
    assert till.raised, "vacuous: nothing was refused"


@IN_MEMORY
def test_the_right_use_of_an_approval_passes_after_a_wrong_one_was_refused(lives: Lives) -> None:
    class Learns(Till):
        async def act(self, flow: FlowContext, decision: Decision) -> None:
            for name, given in (("a", {}), ("b", ITEMS), ("c", ITEMS)):
                try:
                    await flow.run("pay", given, name=name, approval=decision)
                except NotApproved:
                    self.raised.append(NotApproved(name))

    till = Learns(lives)
    till.vote("approve", "ann")

    till.check_paid()
    assert [str(error) for error in till.raised] == ["a", "c"]


@IN_MEMORY
@pytest.mark.parametrize("verb", ["run", "start"])
def test_a_decision_of_one_flow_allows_nothing_in_another(lives: Lives, verb: str) -> None:
    till = Till(lives)
    till.vote("approve", "ann")
    till.check_paid()
    [stolen] = till.decisions

    async def thief(flow: FlowContext) -> None:
        await getattr(flow, verb)("pay", stolen.items, approval=stolen)

    lives.registry.controller("thief")(thief)
    lives.restart("close")
    flow = lives.play(make(lives.flows, controller_id="thief"))

    ended = lives.result(flow.flow_id)

    assert ended.failure is not None
    assert ended.failure.code == "NotApproved"
    assert lives.children(flow.flow_id) == []
    assert len(till.paid) == 1


@IN_MEMORY
@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("after", ["at once", "expired", "changed"])
def test_the_step_that_was_allowed_goes_on_after_a_crash_also_if_that_takes_long(
    lives: Lives, how: str, after: str
) -> None:
    class Hangs(Till):
        hangs = True

        async def pay(self, context: TaskContext, given: Any) -> str:
            self.paid.append(given)
            if self.hangs:
                await asyncio.get_running_loop().create_future()
            return "paid"

    till = Hangs(lives, expires=1000)
    till.vote("approve", "ann")
    assert till.paid == [ITEMS]
    if after == "changed":
        change_from_outside(lives, till.flow_id, "state")
    elif after == "expired":
        lives.pass_time(1001)
    lives.restart(how)
    till.hangs = False
    lives.pass_time(10)

    assert lives.result(till.flow_id).status == "succeeded"
    [payment] = till.payments()
    assert (payment.status, payment.input_json) == ("succeeded", ITEMS)
    assert not till.raised


@IN_MEMORY
def test_an_allowed_step_that_fails_is_not_allowed_to_another_step(lives: Lives) -> None:
    class Stubborn(Till):
        async def act(self, flow: FlowContext, decision: Decision) -> None:
            try:
                await flow.run(self.breaks, decision.items, name="breaks", approval=decision)
            except Exception as error:
                self.raised.append(error)
            await super().act(flow, decision)

        async def breaks(self, _: TaskContext, __: Any) -> None:
            raise ValueError("no money")

    till = Stubborn(lives)
    till.vote("approve", "ann")

    till.check_nothing_begun("approved")
    assert [type(error).__name__ for error in till.raised] == ["ChildFailed", "NotApproved"]


@RESTARTS
def test_an_allowed_step_that_needs_review_is_tried_again_with_what_was_approved_and_nothing_else(
    lives: Lives, between: str | None
) -> None:
    class Wary(Till):
        async def pay(self, ctx: TaskContext, given: Any) -> str:
            if ctx.attempt == 1:
                raise NeedsReview("the bank asks for a person")
            return await super().pay(ctx, given)

    till = Wary(lives, between)
    till.vote("approve", "ann")
    [payment] = till.payments()

    def retry(items: Any) -> TaskRetryReport:
        return lives.play(lives.flows.retry_task(payment.task_id, input_json=items))

    refused = [retry(items) for items in ({**ITEMS, "amount": 820_000}, None, {}, [ITEMS])]
    till.turn_over()
    before = list(till.paid)
    granted = retry(dict(reversed(ITEMS.items())))
    till.turn_over()

    assert [(report.found, report.retried) for report in refused] == [(True, False)] * 4
    assert {report.reason for report in refused} == {
        "The child was begun under an approval, and what was approved is not this input."
        " Nothing changed."
    }
    assert before == []
    assert granted.retried
    till.check_paid()


# ---- asked otherwise after a restart --------------------------------------------------------------


class Changes(Till):
    """A till whose code asks otherwise after the next deployment."""

    async def act(self, flow: FlowContext, decision: Decision) -> None:
        await flow.wait("go on")
        await super().act(flow, decision)


CHANGES: dict[str, dict[str, Any]] = {
    "items": {"items": {"to": "mallory", "amount": 100}},
    "rules": {"rules": {"quorum": 2}},
    "roles": {"rules": {"roles": ["boss"]}},
}


@IN_MEMORY
@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_decided_about_another_question_is_stale(
    lives: Lives, how: str, change: str
) -> None:
    till = Changes(lives)
    till.vote("approve", "ann")
    assert till.verdict == "approved"
    till.decisions.clear()
    lives.restart(how)
    for name, value in CHANGES[change].items():
        setattr(till, name, value)

    lives.pass_time(10)

    assert till.verdict == "stale"
    assert not till.decisions[0].approved


@IN_MEMORY
@pytest.mark.parametrize("change", CHANGES)
def test_a_decision_that_is_stale_now_allows_nothing_any_more(lives: Lives, change: str) -> None:
    till = Changes(lives)
    till.vote("approve", "ann")
    lives.restart("close")
    till.decisions.clear()
    for name, value in CHANGES[change].items():
        setattr(till, name, value)
    lives.pass_time(10)

    lives.play(lives.flows.signal(flow_id=till.flow_id, name="go on"))

    till.check_nothing_begun("stale")
