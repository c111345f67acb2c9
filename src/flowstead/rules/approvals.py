"""Who may vote on an approval, when it is decided, and what it then allows. Pure, from the record alone.

A vote names the digest of what its voter was shown, so nobody approves what he has not seen. Everything that
counts is in the votes on record: the verdict is computed from them, never kept beside them, and a vote after it
is refused. What an approval allows is a *grant*, which one step may use once; the same step may ask again, because
after a crash it does.

Identities are compared exactly, but for white space around them: the door takes only what is printable and in
Unicode normal form C, and telling that two such spellings mean one person is for whoever knows the persons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw

from flowstead.model.approval import (
    Approval,
    Grant,
    GrantCode,
    Rules,
    Verdict,
    Vote,
    VoteCode,
    VoteKind,
)
from flowstead.model.flow import Json

EVERYBODY: Final = "*"

MAX_VOTES: Final = 1_000
"""Votes that can be cast on one edition of the items."""
MAX_EDITS: Final = 8
"""Edits one approval takes: each keeps its items in the record."""

_canonical = msgspec.json.Encoder(order="deterministic").encode


class Counted(msgspec.Struct, frozen=True):
    """A vote that counts: the approval with it, and how that came out, if it did."""

    approval: Approval
    verdict: Verdict | None


class VoteRefusal(msgspec.Struct, frozen=True):
    """A vote that does not count, and why. With a `verdict`, the approval is over all the same."""

    code: VoteCode
    reason: str
    verdict: Verdict | None = None


class GrantRefusal(msgspec.Struct, frozen=True):
    """What was asked for is not allowed, and why."""

    code: GrantCode
    reason: str


# What people are shown


def digest_of(value: Json) -> str:
    """Answer the SHA-256 of a value: the same for every order of keys, another for 1, 1.0 and true."""
    return sha256(_canonical(value)).hexdigest()


def digest_of_raw(raw: Raw) -> str:
    """Answer the digest of a value that is encoded already, however it is spelt."""
    return digest_of(msgspec.json.decode(raw))


def shown_digest(
    items: Raw, rules: Rules, *, prompt: str, flow_id: str, step: str, edition: int = 0
) -> str:
    """Answer the digest of everything a voter is shown.

    It is another one for each edition, also where an edit brings back items of an earlier one: a vote that is
    delivered twice, or late, counts for the showing it was cast on or not at all.
    """
    frame = _frame(rules, prompt=prompt, flow_id=flow_id, step=step)
    return _framed(frame, digest_of_raw(items), edition)


def _frame(rules: Rules, *, prompt: str, flow_id: str, step: str) -> str:
    """The digest of what stands around the items, which no edit changes."""
    return digest_of({"flow_id": flow_id, "prompt": prompt, "rules": _fields(rules), "step": step})


def _fields(rules: Rules) -> dict[str, Any]:
    return {name: getattr(rules, name) for name in Rules.__struct_fields__}


def _framed(frame: str, items_digest: str, edition: int) -> str:
    return digest_of([frame, items_digest, edition])


def asked_digest(approval: Approval) -> str:
    """Answer the digest of what was asked to begin with, whatever an edit has put in its place."""
    items = approval.items if approval.asked is UNSET else approval.asked
    return _framed(approval.frame, digest_of_raw(items), 0)


# Opening


def open_approval(
    items: Raw, rules: Rules, *, prompt: str, flow_id: str, step: str, revision: int
) -> Approval:
    """Ask: make the approval that votes are counted on.

    Args:
        items: What is to be decided.
        rules: Who decides.
        prompt: What the voters are asked.
        flow_id: The flow that asks.
        step: The step of it that asks.
        revision: That of the flow as its controller knew it when it made the items: a later change by anybody else
            makes the approval stale.

    Raises:
        ValueError: Such rules can never be met, or name what is not there.
    """
    check_rules(rules, prompt=prompt)
    frame = _frame(rules, prompt=prompt, flow_id=flow_id, step=step)
    digest = _framed(frame, digest_of_raw(items), 0)
    return Approval(items=items, frame=frame, digest=digest, revision=revision, **_fields(rules))


def check_rules(rules: Rules, *, prompt: str) -> None:
    """Refuse rules that can never be met, or name what is not there.

    Raises:
        ValueError: With a sentence that says what is wrong.
    """
    if not prompt.strip():
        raise ValueError("prompt is empty; say what is to be decided.")
    _check_names("approvers", rules.approvers)
    _check_names("roles", rules.roles)
    if EVERYBODY in rules.roles:
        raise ValueError(
            'roles has "*", which stands for everybody in veto; no role has that name.'
        )
    if rules.four_eyes and not (rules.requested_by or "").strip():
        raise ValueError("four_eyes needs requested_by: nobody could be kept from voting.")
    _check_quorum(rules)
    for role in rules.veto:
        if role != EVERYBODY and role not in rules.roles:
            raise ValueError(f"veto names the role {_shown(role)}, which is not in roles.")


def _check_names(field: str, names: Sequence[str]) -> None:
    stripped = [name.strip() for name in names]
    if not all(stripped):
        raise ValueError(f"{field} has an empty name.")
    for name, times in Counter(stripped).items():
        if times > 1:
            raise ValueError(f"{field} names {_shown(name)} twice.")


def _check_quorum(rules: Rules) -> None:
    if rules.quorum < 1:
        raise ValueError(f"quorum is {rules.quorum}; nothing is approved by fewer than one.")
    if rules.quorum > MAX_VOTES:
        raise ValueError(f"quorum is {rules.quorum}; an approval takes {MAX_VOTES} votes at most.")
    for role, needed in rules.role_quorum.items():
        if role not in rules.roles:
            raise ValueError(f"role_quorum names the role {_shown(role)}, which is not in roles.")
        if needed < 1:
            raise ValueError(f"roles asks for {needed} of {_shown(role)}; leave it out.")
    in_roles = sum(rules.role_quorum.values())
    if in_roles > rules.quorum:
        raise ValueError(
            f"roles asks for {in_roles} approvals altogether, quorum for {rules.quorum} only."
        )
    voters = len(_voters(rules))
    if rules.approvers and rules.quorum > voters:
        raise ValueError(
            f"quorum is {rules.quorum}, but approvers has {voters} who may vote; it cannot be reached."
        )


# Voting


def count_vote(
    approval: Approval,
    vote: Vote,
    *,
    flow_content_revision: int,
    now: int,
    deadline_at: int | None,
) -> Counted | VoteRefusal:
    """Count one vote, or say why it does not count.

    The first vote of each approver stands. An edit puts other items in place of those shown: what was said
    about these is void, and the edit counts as an approval of the new ones; under four eyes as none, because it
    asks for them.

    Args:
        approval: What is asked, and what has been said so far.
        vote: As it arrived.
        flow_content_revision: The flow's, now.
        now: Epoch ms; the vote is stamped with it.
        deadline_at: When the approval expires, epoch ms, if ever.
    """
    if verdict_of(approval) is not None:
        return _refuse(VoteCode.DECIDED)
    if deadline_at is not None and deadline_at <= now:
        return _refuse(VoteCode.EXPIRED, Verdict.EXPIRED)
    if flow_content_revision > approval.revision:
        return _refuse(VoteCode.STALE, Verdict.STALE)
    vote = msgspec.structs.replace(vote, approver=vote.approver.strip(), at=now)
    code = _who_is_wrong(approval, vote) or _what_is_wrong(approval, vote)
    if code is not None:
        return _refuse(code)
    counted = _with(approval, vote)
    return Counted(counted, verdict_of(counted))


def verdict_of(approval: Approval) -> Verdict | None:
    """Answer how the votes on record decide; None while they do not.

    A veto rejects at once. Otherwise it is rejected when the approvals that are missing cannot come any more; where
    anybody may vote, also when as many have rejected as were needed to approve.
    """
    approvals = _approvals(approval)
    rejections = [vote for vote in approval.votes if vote.kind is VoteKind.REJECT]
    if any(_is_veto(approval, vote) for vote in rejections):
        return Verdict.REJECTED
    missing = _missing(approval, approvals)
    if missing == 0:
        return Verdict.APPROVED
    is_outvoted = not approval.approvers and len(rejections) >= approval.quorum
    return Verdict.REJECTED if is_outvoted or _to_come(approval) < missing else None


def _approvals(approval: Approval) -> list[Vote]:
    """The votes that approve. The edit that made this edition stands first; under four eyes it only asks."""
    asking = 1 if approval.four_eyes and approval.edition else 0
    return [vote for vote in approval.votes[asking:] if vote.kind is not VoteKind.REJECT]


def _missing(approval: Approval, approvals: Collection[Vote]) -> int:
    """How many approvals are needed still, if those who come vote in the roles that are short."""
    by_role = Counter(vote.role for vote in approvals)
    short = sum(max(needed - by_role[role], 0) for role, needed in approval.role_quorum.items())
    return max(approval.quorum - len(approvals), short, 0 if approvals else 1)


def _to_come(approval: Approval) -> int:
    """How many can vote still."""
    places = MAX_VOTES - len(approval.votes)
    if not approval.approvers:
        return places
    return min(places, len(_voters(approval) - {vote.approver for vote in approval.votes}))


def _is_veto(approval: Approval, vote: Vote) -> bool:
    return EVERYBODY in approval.veto or vote.role in approval.veto


def _voters(rules: Rules) -> set[str]:
    """Who may vote, of a closed list."""
    return {name.strip() for name in rules.approvers} - {_kept_out(rules)}


def _kept_out(rules: Rules) -> str | None:
    """Who asked, where that means he may not vote."""
    if not rules.four_eyes or rules.requested_by is None:
        return None
    return rules.requested_by.strip()


def _who_is_wrong(approval: Approval, vote: Vote) -> VoteCode | None:
    if not vote.approver:
        return VoteCode.NO_APPROVER
    if vote.approver == _kept_out(approval):
        return VoteCode.FOUR_EYES
    if approval.approvers and vote.approver not in _voters(approval):
        return VoteCode.NOT_AN_APPROVER
    if any(vote.approver == earlier.approver for earlier in approval.votes):
        return VoteCode.ALREADY_VOTED
    if approval.roles and vote.role not in approval.roles:
        return VoteCode.WRONG_ROLE
    return None


def _what_is_wrong(approval: Approval, vote: Vote) -> VoteCode | None:
    if vote.digest != approval.digest:
        return VoteCode.CHANGED
    is_edit = vote.kind is VoteKind.EDIT
    if is_edit is (vote.items is UNSET):
        return VoteCode.WRONG_ITEMS
    edits = sum(earlier.kind is VoteKind.EDIT for earlier in approval.voided + approval.votes)
    return VoteCode.TOO_MANY if is_edit and edits >= MAX_EDITS else None


def _with(approval: Approval, vote: Vote) -> Approval:
    if vote.items is UNSET or (edited := digest_of_raw(vote.items)) == digest_of_raw(
        approval.items
    ):
        return msgspec.structs.replace(approval, votes=(*approval.votes, vote))
    return msgspec.structs.replace(
        approval,
        items=vote.items,
        digest=_framed(approval.frame, edited, approval.edition + 1),
        edition=approval.edition + 1,
        votes=(vote,),
        voided=approval.voided + approval.votes,
        asked=approval.items if approval.asked is UNSET else approval.asked,
    )


_WHY_NO_VOTE: Final = {
    VoteCode.DECIDED: "The approval is decided.",
    VoteCode.EXPIRED: "The approval has expired.",
    VoteCode.STALE: "The flow has changed since the approval was asked for.",
    VoteCode.NO_APPROVER: "A vote needs an approver.",
    VoteCode.NOT_AN_APPROVER: "The approver is not among those who are asked.",
    VoteCode.FOUR_EYES: "Who asked for the approval may not vote on it.",
    VoteCode.ALREADY_VOTED: "The approver has voted; the first vote stands.",
    VoteCode.WRONG_ROLE: "The vote is not in a role that is asked.",
    VoteCode.CHANGED: "What the approver was shown is not what is asked now.",
    VoteCode.WRONG_ITEMS: "An edit brings the items it approves, and no other vote brings any.",
    VoteCode.TOO_MANY: "The approval has taken as many edits as it keeps.",
}


def _refuse(code: VoteCode, verdict: Verdict | None = None) -> VoteRefusal:
    return VoteRefusal(code, f"{_WHY_NO_VOTE[code]} Nothing was counted.", verdict)


# What is allowed then


def grant_of(approval: Approval, deadline_at: int | None) -> Grant:
    """Answer what an approval allows: one use of exactly its items, until `deadline_at`.

    Raises:
        ValueError: It is not approved.
    """
    if verdict_of(approval) is not Verdict.APPROVED:
        raise ValueError("An approval that is not approved grants nothing.")
    return Grant(
        items_digest=digest_of_raw(approval.items),
        revision=approval.revision,
        expires_at=deadline_at,
    )


def use_grant(
    grant: Grant | None, *, items_digest: str, step: str, content_revision: int, now: int
) -> Grant | GrantRefusal:
    """Use a grant for a step, or say why it may not be used.

    A step that has used it gets it again, however late and whatever it has changed in the flow since: it was cut
    off, and is run once more. Only the items must be the same still.

    Args:
        grant: What an approval allowed; None if there is none.
        items_digest: Of the items that are to be used.
        step: Who uses them.
        content_revision: The flow's, now.
        now: Epoch ms.
    """
    if grant is None:
        return _deny(GrantCode.NOT_APPROVED)
    if items_digest != grant.items_digest:
        return _deny(GrantCode.CHANGED)
    if grant.used_by is not None:
        return grant if grant.used_by == step else _deny(GrantCode.USED)
    if grant.expires_at is not None and grant.expires_at <= now:
        return _deny(GrantCode.EXPIRED)
    if content_revision > grant.revision:
        return _deny(GrantCode.STALE)
    return msgspec.structs.replace(grant, used_by=step)


_WHY_NO_GRANT: Final = {
    GrantCode.NOT_APPROVED: "Nobody has approved this.",
    GrantCode.CHANGED: "What was approved is not what is to be done.",
    GrantCode.USED: "The approval was used by another step already.",
    GrantCode.EXPIRED: "The approval has expired.",
    GrantCode.STALE: "The flow has changed since the approval was asked for.",
}


def _deny(code: GrantCode) -> GrantRefusal:
    return GrantRefusal(code, _WHY_NO_GRANT[code])


def _shown(name: str) -> str:
    """A name in a sentence: quoted, of one line, and short."""
    return ascii(name if len(name) <= 40 else name[:37] + "...")
