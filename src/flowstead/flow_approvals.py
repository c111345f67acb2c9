"""The part of a controller's face that asks people to decide, about exactly what they are shown."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from flowstead import arguments
from flowstead.decision import Ballot, Decision
from flowstead.flow_waits import FlowWaits, WaitStep
from flowstead.model.approval import Rules, Verdict, VoteKind
from flowstead.model.command import TaskDraft
from flowstead.model.flow import Json
from flowstead.model.task import Cancelled, Task, outcome_of
from flowstead.model.wait import WaitKind, inbox_of
from flowstead.rules import approvals
from flowstead.step import result_of

_REASONS: Final = 10
"""Rejections that the reason of a decision names; all are in its votes."""


class FlowApprovals(FlowWaits):
    """What a controller can ask people for."""

    _questions: defaultdict[str, deque[str]]
    """The steps of questions that were asked beside, by what they ask, until `approve` waits for them."""

    async def approve(
        self,
        prompt: str,
        items: Json = None,
        *,
        name: str | None = None,
        roles: Sequence[str] | Mapping[str, int] = (),
        approvers: Sequence[str] = (),
        quorum: int | None = None,
        veto: bool | Sequence[str] = True,
        requested_by: str | None = None,
        four_eyes: bool = False,
        expires: float | None = None,
        remind: Sequence[float] = (),
        schema: Any = None,
    ) -> Decision:
        """Ask people to decide about exactly these items, and return what they decided. A refusal is a value.

        The votes (`flows.vote`) are bound to a hash of what was shown, to this step, and to this flow as this
        controller knows it: once somebody else changes the flow, or if he has already, the answer is `stale`. What
        was approved is used by passing the decision on: `flow.run(pay, decision.items, approval=decision)`.

        A vote may be an edit: then its items are what is decided about, it counts as an approval of them, and the
        others have to vote again. So where two people must agree on what is done, say `quorum=2` or `four_eyes`.

        Args:
            prompt: The question, for people.
            items: What is decided about, as JSON: best the very input of the step that will do it.
            name: The step's name in this flow; `approval` with `#2` and so on for later calls unless given.
            roles: Who may vote, in any mixture: two of one role are two. As a mapping, how many approvals of each
                role are needed.
            approvers: The closed list of those who may vote, where there is one.
            quorum: How many must approve; unless given, as many as `roles` ask for, or one.
            veto: Whose rejection ends it: everybody's, nobody's, or that of these roles.
            requested_by: Who wants it done; may not vote where `four_eyes`.
            four_eyes: Nobody approves what he has asked for himself: `requested_by` has no vote, and an edit is no
                approval; its items need the `quorum` of others, and their editor has no other vote on them.
            expires: Seconds until the question, and an approval that was not used, are void.
            remind: Seconds before that at which the owner is reminded.
            schema: What edited items must fit, as for `wait`.

        Raises:
            ValueError, TypeError: Rules that can never be met, or make no sense, or a name that is not printable or
                not in Unicode normal form C.
            CancelPending: A cancel is requested.

        Cancelling the caller leaves the question open: the same step finds it again.
        """
        draft = self._approval_draft(
            prompt, items, name, roles, approvers, quorum, veto, requested_by, four_eyes,
            expires, remind, schema, beside=False,
        )  # fmt: skip
        return _decision(await self._stand_in(draft), draft)

    async def ask_approval(
        self,
        prompt: str,
        items: Json = None,
        *,
        name: str | None = None,
        roles: Sequence[str] | Mapping[str, int] = (),
        approvers: Sequence[str] = (),
        quorum: int | None = None,
        veto: bool | Sequence[str] = True,
        requested_by: str | None = None,
        four_eyes: bool = False,
        expires: float | None = None,
        remind: Sequence[float] = (),
        schema: Any = None,
    ) -> WaitStep:
        """Ask for an approval and go on: to send its `token` and `digest` to the voters.

        Arguments as for `approve`. `result()` of the step answers what they decided, as does `approve`, called
        with the same.

        Cancelling the caller after acceptance leaves the question open.
        """
        draft = self._approval_draft(
            prompt, items, name, roles, approvers, quorum, veto, requested_by, four_eyes,
            expires, remind, schema, beside=True,
        )  # fmt: skip
        return await self._open(draft, partial(_decision, draft=draft))

    def _approval_draft(
        self,
        prompt: str,
        items: Json,
        name: str | None,
        roles: Sequence[str] | Mapping[str, int],
        approvers: Sequence[str],
        quorum: int | None,
        veto: bool | Sequence[str],
        requested_by: str | None,
        four_eyes: bool,
        expires: float | None,
        remind: Sequence[float],
        schema: Any,
        *,
        beside: bool,
    ) -> TaskDraft:
        wait = self._wait(WaitKind.APPROVAL, expires, "fail", remind, prompt, schema)
        rules = Rules(
            quorum=_quorum(quorum, roles),
            roles=arguments.names(roles, "roles"),
            role_quorum=arguments.quorums(roles, "roles"),
            approvers=arguments.names(approvers, "approvers"),
            veto=_veto(veto),
            requested_by=arguments.optional_identity(requested_by, "requested_by"),
            four_eyes=arguments.flag(four_eyes, "four_eyes"),
        )
        encoded = self._steps.encode_or_raise(items, "items")
        shown = arguments.text(prompt, "prompt")
        flow_id = self._steps.key.flow_id
        question = approvals.shown_digest(encoded, rules, prompt=shown, flow_id=flow_id, step="")
        step = self._question_step(name, question, beside=beside)
        approval = approvals.open_approval(
            encoded,
            rules,
            prompt=shown,
            flow_id=flow_id,
            step=step,
            revision=self.flow.revision,
        )
        wait = msgspec.structs.replace(
            wait, inbox=inbox_of(WaitKind.APPROVAL, step), approval=approval
        )
        return self._steps.plain_draft(WaitKind.APPROVAL, step, wait=wait)

    def _question_step(self, name: str | None, question: str, *, beside: bool) -> str:
        """The step's name; without one, `approve` waits for what was asked beside already."""
        asked = self._questions[question]
        if name is None and asked and not beside:
            return asked.popleft()
        step = self._steps.name(name, "approval")
        if name is None and beside:
            asked.append(step)
        return step


def _quorum(quorum: int | None, roles: Sequence[str] | Mapping[str, int]) -> int:
    needed = arguments.optional_count(quorum, "quorum")
    return needed or sum(arguments.quorums(roles, "roles").values()) or 1


def _veto(veto: bool | Sequence[str]) -> tuple[str, ...]:
    if isinstance(veto, bool):
        return (approvals.EVERYBODY,) if veto else ()
    return arguments.names(veto, "veto")


def _decision(task: Task, draft: TaskDraft) -> Decision:
    """What is on record, if it is about what is asked now."""
    name = task.run_id or task.task_id
    outcome = outcome_of(task)
    if isinstance(outcome, Cancelled):
        return Decision(name=name, verdict=Verdict.WITHDRAWN, reason="The question was withdrawn.")
    told = result_of(task)
    assert draft.wait is not None and draft.wait.approval is not None
    verdict = Verdict(told["verdict"])
    votes = msgspec.convert(told["votes"], type=list[Ballot])
    reason = _why(verdict, votes)
    if told["asked"] != draft.wait.approval.digest:
        verdict = Verdict.STALE
        reason = "What is asked now is not what was decided on."
    return Decision(
        name=name,
        verdict=verdict,
        items=told["items"],
        digest=told["digest"],
        votes=votes,
        reason=reason,
    )


def _why(verdict: Verdict, votes: Sequence[Ballot]) -> str:
    """Why an approval was not given, as it is on record."""
    match verdict:
        case Verdict.APPROVED:
            return ""
        case Verdict.EXPIRED:
            return "Its time was over before it was decided."
        case Verdict.STALE:
            return "The flow was changed after it was asked."
    against = [vote for vote in votes if vote.kind == VoteKind.REJECT]
    if not against:
        return "It cannot be approved any more."
    said = [
        f"{vote.approver}: {vote.comment}" if vote.comment else vote.approver for vote in against
    ]
    return f"Rejected by {'; '.join(said[:_REASONS])}."
