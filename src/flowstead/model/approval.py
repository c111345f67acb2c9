"""The approval: a decision of several people about exactly what they were shown."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.values import Whole


class VoteKind(StrEnum):
    """What a voter says. An edit approves something else than was shown."""

    APPROVE = "approve"
    REJECT = "reject"
    EDIT = "edit"


class Verdict(StrEnum):
    """How an approval came out. Only `approved` allows anything."""

    APPROVED = "approved"
    REJECTED = "rejected"
    EXPIRED = "expired"
    STALE = "stale"
    WITHDRAWN = "withdrawn"


class VoteCode(StrEnum):
    """What became of a vote: it counts, it is kept for a question yet to come, or why it does not count."""

    COUNTED = "counted"
    KEPT = "kept"
    LATE = "late"
    NOT_FOUND = "not_found"
    WRONG_SHAPE = "wrong_shape"
    DECIDED = "decided"
    EXPIRED = "expired"
    STALE = "stale"
    NO_APPROVER = "no_approver"
    NOT_AN_APPROVER = "not_an_approver"
    FOUR_EYES = "four_eyes"
    ALREADY_VOTED = "already_voted"
    WRONG_ROLE = "wrong_role"
    CHANGED = "changed"
    WRONG_ITEMS = "wrong_items"
    TOO_MANY = "too_many"


class GrantCode(StrEnum):
    """Why what was approved may not be done."""

    NOT_APPROVED = "not_approved"
    CHANGED = "changed"
    USED = "used"
    EXPIRED = "expired"
    STALE = "stale"


class Vote(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """One person's word, as it arrived. `digest` is the hash of what that person was shown."""

    kind: VoteKind
    approver: str
    role: str | None = None
    digest: str
    items: Raw | UnsetType = UNSET
    comment: str | None = None
    at: Whole = 0


class Rules(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Who decides, and when it is decided.

    `quorum` approvals are needed, of them as many of each role as `role_quorum` says. `roles` and `approvers`
    bound who may vote, where they are given. `veto` names the roles whose rejection ends it, `"*"` for everybody.
    If `four_eyes`, `requested_by` may not vote, and who edits the items has not approved them by that.
    """

    quorum: Whole = 1
    roles: tuple[str, ...] = ()
    role_quorum: dict[str, int] = {}
    approvers: tuple[str, ...] = ()
    veto: tuple[str, ...] = ("*",)
    requested_by: str | None = None
    four_eyes: bool = False


class Approval(Rules, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What is asked, of whom, and what has been said so far.

    `items` is what voters are shown, `frame` the hash of all that stands around it (prompt, rules, flow and step),
    and `digest` the hash of both and of the `edition`. `revision` is that of the flow as its controller knew it.
    An edit changes the items, which makes another edition: the votes until then are `voided`, and `asked` keeps the
    items that were there first.
    """

    items: Raw
    frame: str
    digest: str
    revision: Whole = 0
    edition: Whole = 0
    votes: tuple[Vote, ...] = ()
    voided: tuple[Vote, ...] = ()
    asked: Raw | UnsetType = UNSET


class Grant(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False
):
    """What an approval allows: one use, of exactly these items, before it expires, and of the flow as it was.

    `items_digest` is the hash of the approved items alone; `used_by` names the step that used it.
    """

    items_digest: str
    revision: Whole
    expires_at: Whole | None = None
    used_by: str | None = None
