"""How answers from outside reach a flow, and what is said of them: the way of every face's signals and votes."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead import arguments
from flowstead.core import Core
from flowstead.decision import Ballot
from flowstead.engine.desk import Receipt, unsettled
from flowstead.engine.mailbox import Reply
from flowstead.model.approval import Verdict, Vote, VoteCode, VoteKind
from flowstead.model.code import Code, Refusal
from flowstead.model.command import CastVote, Command, Defect, Deliver, TaskDraft
from flowstead.model.flow import FlowKey, Json, StoredFlow
from flowstead.model.signal import SignalCode
from flowstead.model.task import StoredTask
from flowstead.model.wait import Letter, Wait, WaitKind, inbox_of
from flowstead.results import OpenApproval, OpenWait, SignalReport, VoteReport, error_for
from flowstead.rules import wait_keys
from flowstead.rules.user_json import encode_json
from flowstead.store import codec

_LATE: Final = frozenset({Code.LATE, Code.CANCEL_REQUESTED, Code.TERMINAL})
_NOWHERE: Final = frozenset({Code.NOT_FOUND, Code.NOT_MANAGED})
_VOID: Final = frozenset({Verdict.STALE, Verdict.EXPIRED})


def _woke_nobody(code: SignalCode, reason: str) -> SignalReport:
    return SignalReport(matched=0, kept=False, code=code, reason=reason)


VOTED_NOWHERE: Final = VoteReport(counted=False, code=VoteCode.NOT_FOUND, reason="Flow not found.")
NOT_FOUND_REPORT: Final = _woke_nobody(SignalCode.NOT_FOUND, "Flow not found.")
_NO_TOKEN: Final = _woke_nobody(SignalCode.NOT_FOUND, "This token answers nothing.")
_DUPLICATE: Final = _woke_nobody(
    SignalCode.DUPLICATE, "A signal with this id was taken in already."
)


# ---- signals --------------------------------------------------------------------------------------


async def send(
    core: Core, key: FlowKey, command: Command, signal_id: str | None, actor: str
) -> SignalReport:
    """Bring an answer to one flow, once for each id. Cancelling the caller does not take it back."""
    reply = await core.engine.desk.send(key, command, actor, signal_id=signal_id, wait_key="")
    return _DUPLICATE if reply is None else _report_of(key, reply)


async def answer_token(
    core: Core, token: str, payload: Raw, signal_id: str | None, *, owner: str | None = None
) -> SignalReport:
    """Answer the wait that a token stands for; of one owner only, if there is one.

    Cancelling the caller does not take the answer back.
    """
    found = await _find_token(core, token, owner)
    if found is None:
        return _NO_TOKEN
    key, task_id = found
    command = Deliver(
        task_id=task_id or "",
        token=wait_keys.token_digest(token),
        payload=payload,
        signal_id=signal_id,
    )
    return await send(core, key, command, signal_id, "token")


async def _find_token(
    core: Core, token: str, owner: str | None
) -> tuple[FlowKey, str | None] | None:
    wanted = arguments.lookup(token, "token")
    if wanted is None:
        return None
    found = None
    if "." in wanted:
        found = await core.engine.store.find_token(wait_keys.place_digest(wanted))
    if found is None or found[1] is not None:
        found = await core.engine.store.find_token(wait_keys.token_digest(wanted))
    if found is None or owner not in (None, found[0].owner_key):
        return None
    return found


def report_of_receipt(receipt: Receipt) -> SignalReport:
    """What the desk says of a signal."""
    return SignalReport(
        matched=len(receipt.flow_ids),
        kept=receipt.code is SignalCode.KEPT,
        code=receipt.code,
        reason=receipt.reason,
        flow_ids=list(receipt.flow_ids),
        expires_at=receipt.expires_at,
    )


def _report_of(key: FlowKey, reply: Reply) -> SignalReport:
    """What a flow says of an answer that was brought to it."""
    if reply.refusal is not None:
        return _refused(reply.refusal)
    letter = _letter_kept(reply)
    if letter is not None:
        return SignalReport(
            matched=0,
            kept=True,
            code=SignalCode.KEPT,
            reason="Nobody takes it yet; it is kept.",
            expires_at=letter.expires_at,
        )
    return SignalReport(
        matched=1, kept=False, code=SignalCode.MATCHED, reason="Taken.", flow_ids=[key.flow_id]
    )


def _letter_kept(reply: Reply) -> Letter | None:
    """The message that nobody has taken, if that is what became of it."""
    if len(reply.children) != 1 or not isinstance(reply.children[0], StoredTask):
        return None
    return reply.children[0].letter


def _refused(refusal: Refusal) -> SignalReport:
    if refusal.code in _NOWHERE:
        return _woke_nobody(SignalCode.NOT_FOUND, refusal.reason)
    if refusal.code in _LATE:
        return _woke_nobody(SignalCode.LATE, refusal.reason)
    if refusal.code is Code.UNAWAITED:
        return _woke_nobody(SignalCode.UNAWAITED, refusal.reason)
    if refusal.code is Code.WRONG_SHAPE:
        return _woke_nobody(SignalCode.WRONG_SHAPE, refusal.reason)
    raise unsettled(refusal)


# ---- votes ----------------------------------------------------------------------------------------


def vote_of(
    core: Core,
    decision: str,
    approver: str,
    digest: str,
    role: str | None,
    items: Json | UnsetType,
    comment: str | None,
) -> Vote:
    """A vote as it is recorded, checked as far as that can be without the approval."""
    kind = arguments.choice(decision, VoteKind, "decision")
    if (kind is VoteKind.EDIT) != (items is not UNSET):
        raise ValueError("items go with the decision 'edit', and with no other.")
    return Vote(
        kind=kind,
        approver=arguments.identity(approver, "approver"),
        role=arguments.optional_identity(role, "role"),
        digest=arguments.text(digest, "digest"),
        items=UNSET if items is UNSET else encoded_or_raise(core, items, "items"),
        comment=arguments.optional_text(comment, "comment"),
    )


async def vote_by_token(
    core: Core, token: str, vote: Vote, *, owner: str | None = None
) -> VoteReport:
    """Vote on the approval that a token stands for. Cancelling the caller does not take the vote back."""
    found = await _find_token(core, token, owner)
    if found is None or found[1] is None:
        return _not_counted(VoteCode.NOT_FOUND, _NO_TOKEN.reason)
    return await _cast(core, found[0], CastVote(step=found[1], vote=vote), "token")


async def cast(core: Core, key: FlowKey, step: str, vote: Vote, actor: str) -> VoteReport:
    """Bring a vote to a flow's approval, by the step. Cancelling the caller does not take it back."""
    expires_at = core.engine.clock.now() + round(core.engine.limits.signal_lifetime * 1000)
    letter = Letter(inbox=inbox_of(WaitKind.APPROVAL, step), expires_at=expires_at)
    early = letter_draft(core, letter, Raw(msgspec.json.encode(vote)), "vote")
    return await _cast(core, key, CastVote(step=step, vote=vote, early=early), actor)


async def _cast(core: Core, key: FlowKey, command: CastVote, actor: str) -> VoteReport:
    reply = await core.engine.desk.send(key, command, actor, signal_id=None, wait_key="")
    assert reply is not None
    if reply.refusal is not None:
        if reply.refusal.code in (Code.OVERLOADED, Code.PERSIST_FAILED, Code.OUTCOME_UNKNOWN):
            raise unsettled(reply.refusal)
        return _not_counted(_vote_code(reply.refusal), reply.refusal.reason)
    return _vote_report(reply)


def _vote_code(refusal: Refusal) -> VoteCode:
    if refusal.detail is not None:
        return VoteCode(refusal.detail)
    if refusal.code in _NOWHERE:
        return VoteCode.NOT_FOUND
    return VoteCode.WRONG_SHAPE if refusal.code is Code.WRONG_SHAPE else VoteCode.LATE


def _not_counted(code: VoteCode, reason: str, verdict: Verdict | None = None) -> VoteReport:
    return VoteReport(counted=False, code=code, reason=reason, verdict=verdict)


def _vote_report(reply: Reply) -> VoteReport:
    task = reply.children[-1]
    assert isinstance(task, StoredTask)
    if task.letter is not None:
        reason = "It is kept until the question is asked."
        return VoteReport(counted=False, kept=True, code=VoteCode.KEPT, reason=reason)
    if task.result_json is UNSET:
        return VoteReport(counted=True, code=VoteCode.COUNTED)
    verdict = Verdict(msgspec.json.decode(task.result_json)["verdict"])
    if verdict in _VOID:
        reason = f"The approval is {verdict.value}. Nothing was counted."
        return _not_counted(VoteCode(verdict.value), reason, verdict)
    return VoteReport(counted=True, code=VoteCode.COUNTED, verdict=verdict)


# ---- what both need -------------------------------------------------------------------------------


def letter_draft(core: Core, letter: Letter, payload: Raw, kind: str) -> TaskDraft:
    """A message as a child to be."""
    engine = core.engine
    return TaskDraft(
        key=engine.store.next_key(),
        task_id=engine.ids.task_id(),
        runtime=kind,
        task=letter.inbox,
        input_json=payload,
        letter=letter,
    )


def encoded_or_raise(core: Core, value: Json, name: str, *, max_bytes: int | None = None) -> Raw:
    """User JSON as stored, bounded like a state unless said otherwise.

    Raises:
        InvalidState, StateTooLarge: It is nothing JSON can hold, or too much of it.
    """
    limits = core.engine.limits
    encoded = encode_json(
        value, name=name, max_bytes=max_bytes or limits.state_bytes, max_depth=limits.json_depth
    )
    if isinstance(encoded, Defect):
        raise error_for(Code(encoded.code), encoded.reason)
    return encoded


def open_wait(owner_key: str, row: StoredFlow | StoredTask) -> OpenWait:
    """A wait as whoever may answer it sees it."""
    wait = row.wait or Wait(kind=WaitKind.SIGNAL)
    if isinstance(row, StoredTask):
        key = codec.decode_json(wait.key) or {}
    else:
        key = wait_keys.plain_fields(codec.decode_json(row.wait_json)) or {}
    return OpenWait(
        number=row.key,
        owner_key=owner_key,
        flow_id=row.flow_id,
        task_id=row.task_id if isinstance(row, StoredTask) else None,
        name=row.run_id if isinstance(row, StoredTask) else None,
        kind=wait.kind,
        key=key,
        token=wait.token,
        prompt=wait.prompt,
        schema=codec.decode_json(wait.schema),
        deadline_at=wait.deadline_at,
        opened_at=row.created_at if isinstance(row, StoredTask) else row.updated_at,
        approval=_open_approval(wait),
    )


def _open_approval(wait: Wait) -> OpenApproval | None:
    approval = wait.approval
    if approval is None:
        return None
    return OpenApproval(
        items=codec.decode_json(approval.items),
        digest=approval.digest,
        quorum=approval.quorum,
        roles=list(approval.roles),
        approvers=list(approval.approvers),
        votes=[
            Ballot(kind=v.kind, approver=v.approver, role=v.role, comment=v.comment, at=v.at)
            for v in approval.votes
        ],
    )
