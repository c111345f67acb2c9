"""Votes, verdicts and grants: against a table, and against a voter who counts in another way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from itertools import combinations, product
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
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
from flowstead.rules import approvals
from flowstead.rules.approvals import (
    Counted,
    GrantRefusal,
    VoteRefusal,
    asked_digest,
    check_rules,
    count_vote,
    digest_of,
    digest_of_raw,
    grant_of,
    open_approval,
    shown_digest,
    use_grant,
    verdict_of,
)
from tests.unit.given import NOW

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

DRAFT = Raw(b'{"to":"bob","text":"hi"}')
BETTER = Raw(b'{"to":"bob","text":"hello"}')
REVISION = 7


def asked(items: Raw = DRAFT, **rules: Any) -> Approval:
    return open_approval(
        items,
        Rules(**rules),
        prompt="Send this?",
        flow_id="triage-1",
        step="send",
        revision=REVISION,
    )


def vote(
    approval: Approval, word: str, approver: str = "anna", role: str | None = None, **fields: Any
) -> Vote:
    given: dict[str, Any] = {
        "kind": VoteKind(word),
        "approver": approver,
        "role": role,
        "digest": approval.digest,
    }
    if word == "edit":
        given["items"] = BETTER
    return Vote(**given | fields)


def count(
    approval: Approval, ballot: Vote, *, revision: int = REVISION, now: int = NOW, **fields: Any
) -> Counted | VoteRefusal:
    deadline_at = fields.pop("deadline_at", None)
    return count_vote(
        approval, ballot, flow_content_revision=revision, now=now, deadline_at=deadline_at
    )


def after(approval: Approval, *words: str) -> Counted:
    """The approval after votes written `approver:word` or `approver/role:word`, all of which count."""
    counted = Counted(approval, None)
    for word in words:
        who, _, kind = word.partition(":")
        approver, _, role = who.partition("/")
        ballot = vote(counted.approval, kind, approver, role or None)
        answer = count(counted.approval, ballot)
        assert isinstance(answer, Counted), (word, answer)
        counted = answer
    return counted


def refused(answer: Counted | VoteRefusal) -> VoteRefusal:
    assert isinstance(answer, VoteRefusal)
    return answer


# Digests


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1),
        ({"a": 1, "b": {"c": 2, "d": [3]}}, {"b": {"d": [3], "c": 2}, "a": 1}),
        ("\u00e9", "\u00e9"),
        (None, None),
    ],
)
def test_the_same_value_has_the_same_digest_in_whatever_order_its_keys_are(
    one: Any, other: Any
) -> None:
    assert digest_of(one) == digest_of(other)


@pytest.mark.parametrize(
    "pair", list(combinations([1, 1.0, True, "1", [1], {"1": 1}, None, "", []], 2))
)
def test_values_that_json_tells_apart_have_digests_that_differ(pair: tuple[Any, Any]) -> None:
    assert digest_of(pair[0]) != digest_of(pair[1])


def test_a_digest_is_sha_256_of_the_value_without_spaces_and_with_sorted_keys() -> None:
    written = b'{"a":[1.0,true],"b":null}'

    digest = digest_of({"b": None, "a": [1.0, True]})

    assert digest == sha256(written).hexdigest()


def test_the_digest_of_encoded_json_does_not_depend_on_how_it_is_spelt() -> None:
    spaced = Raw(b'{ "b" : [ 1 , 2.50 ] , "a" : "\\u00e9" }')

    assert digest_of_raw(spaced) == digest_of({"a": "\u00e9", "b": [1, 2.5]})


def test_everything_a_voter_is_shown_is_in_the_digest() -> None:
    rules = Rules(quorum=2, roles=("dev", "ops"), requested_by="carl")
    given: dict[str, Any] = {"prompt": "Send?", "flow_id": "f", "step": "s"}
    others = [
        shown_digest(BETTER, rules, **given),
        shown_digest(DRAFT, rules, **given, edition=1),
        *(shown_digest(DRAFT, rules, **given | {name: "other"}) for name in given),
        *(
            shown_digest(DRAFT, msgspec.structs.replace(rules, **changed), **given)
            for changed in (
                {"quorum": 3},
                {"roles": ("dev",)},
                {"role_quorum": {"dev": 1}},
                {"approvers": ("anna", "bert")},
                {"veto": ()},
                {"requested_by": "dora"},
                {"four_eyes": True},
            )
        ),
    ]

    digests = {shown_digest(DRAFT, rules, **given), *others}

    assert len(digests) == 1 + len(others)


def test_an_approval_is_opened_with_the_digest_of_what_voters_are_shown() -> None:
    approval = asked(quorum=2)

    assert approval.digest == shown_digest(
        DRAFT, Rules(quorum=2), prompt="Send this?", flow_id="triage-1", step="send"
    )
    assert asked_digest(approval) == approval.digest
    assert (approval.quorum, approval.revision, approval.votes) == (2, REVISION, ())


def test_an_approval_survives_being_stored() -> None:
    approval = after(asked(quorum=3, veto=()), "anna:approve", "bert:edit", "carl:reject").approval

    read = msgspec.json.decode(msgspec.json.encode(approval), type=Approval)

    assert msgspec.json.encode(read) == msgspec.json.encode(approval)
    assert read.digest == digest_of([read.frame, digest_of_raw(read.items), 1])


# Verdicts


class Course(NamedTuple):
    name: str
    rules: dict[str, Any]
    votes: str
    verdict: Verdict | None


YES, NO, OPEN = Verdict.APPROVED, Verdict.REJECTED, None
FOUR_EYES = {"four_eyes": True, "requested_by": "me"}
TWO_ROLES = {"roles": ("dev", "legal"), "role_quorum": {"dev": 1, "legal": 1}, "quorum": 2}

COURSES = [
    Course("one is enough by default", {}, "anna:approve", YES),
    Course("one no ends it by default", {}, "anna:reject", NO),
    Course("one of two", {"quorum": 2}, "anna:approve", OPEN),
    Course("two of two", {"quorum": 2}, "anna:approve bert:approve", YES),
    Course("a veto after a yes", {"quorum": 2}, "anna:approve bert:reject", NO),
    Course("no veto, a no, a yes", {"veto": (), "quorum": 2}, "a:reject b:approve", OPEN),
    Course("no veto, as many noes", {"veto": (), "quorum": 2}, "a:reject b:approve c:reject", NO),
    Course("no veto, enough yes", {"veto": (), "quorum": 2}, "a:reject b:approve c:approve", YES),
    Course(
        "a closed list that still can",
        {"veto": (), "quorum": 2, "approvers": ("a", "b", "c")},
        "a:reject b:approve",
        OPEN,
    ),
    Course(
        "a closed list that cannot any more",
        {"veto": (), "quorum": 2, "approvers": ("a", "b", "c")},
        "a:reject b:approve c:reject",
        NO,
    ),
    Course(
        "a closed list ends as soon as it cannot",
        {"veto": (), "quorum": 3, "approvers": ("a", "b", "c")},
        "a:reject",
        NO,
    ),
    Course(
        "a long closed list takes as many noes as the quorum and goes on",
        {"veto": (), "quorum": 2, "approvers": ("a", "b", "c", "d")},
        "a:reject b:reject",
        OPEN,
    ),
    Course(
        "who asked is not waited for",
        {
            "veto": (),
            "quorum": 2,
            "approvers": ("a", "b", "me", "c"),
            "four_eyes": True,
            "requested_by": "me",
        },
        "a:reject b:reject",
        NO,
    ),
    Course("both roles", TWO_ROLES, "a/dev:approve b/legal:approve", YES),
    Course("one role twice", TWO_ROLES, "a/dev:approve b/dev:approve", OPEN),
    Course(
        "one role twice, then the other",
        TWO_ROLES,
        "a/dev:approve b/dev:approve c/legal:approve",
        YES,
    ),
    Course(
        "a closed list without a voter for the role that is short",
        TWO_ROLES | {"approvers": ("a", "b")},
        "a/dev:approve b/dev:approve",
        NO,
    ),
    Course("the role with the veto", TWO_ROLES | {"veto": ("legal",)}, "a/legal:reject", NO),
    Course("a role without the veto", TWO_ROLES | {"veto": ("legal",)}, "a/dev:reject", OPEN),
    Course(
        "noes without a veto add up",
        TWO_ROLES | {"veto": ("legal",)},
        "a/dev:reject b/dev:reject",
        NO,
    ),
    Course("an edit is a yes", {}, "anna:edit", YES),
    Course("an edit voids a yes", {"quorum": 2}, "anna:approve bert:edit", OPEN),
    Course("who was voided votes again", {"quorum": 2}, "anna:approve bert:edit anna:approve", YES),
    Course(
        "an edit voids a no", {"quorum": 2, "veto": ()}, "anna:reject bert:edit carl:reject", OPEN
    ),
    Course(
        "an edit frees a closed list",
        {"quorum": 3, "veto": (), "approvers": ("a", "b", "c", "d")},
        "a:reject b:edit c:approve a:approve",
        YES,
    ),
    Course("an edit under four eyes is no yes", FOUR_EYES, "a:edit", OPEN),
    Course("under four eyes somebody else approves the edit", FOUR_EYES, "a:edit b:approve", YES),
    Course(
        "under four eyes who voted before approves the edit",
        FOUR_EYES | {"quorum": 2},
        "a:approve b:edit a:approve c:approve",
        YES,
    ),
    Course(
        "under four eyes the editor is none of the quorum",
        FOUR_EYES | {"quorum": 2},
        "a:edit b:approve",
        OPEN,
    ),
    Course(
        "under four eyes an edit that changes nothing is a yes", FOUR_EYES, "a:edit b:edit", YES
    ),
    Course(
        "under four eyes an edit is for nobody's role",
        FOUR_EYES | TWO_ROLES,
        "a/dev:edit b/legal:approve c/legal:approve",
        OPEN,
    ),
    Course(
        "an edit under four eyes that too few are left to approve",
        FOUR_EYES | {"quorum": 2, "approvers": ("a", "b")},
        "a:edit",
        NO,
    ),
]


@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.name)
def test_the_votes_decide_as_the_rules_say_and_not_before_the_last(course: Course) -> None:
    approval = asked(**course.rules)
    words = course.votes.split()

    for n in range(len(words)):
        assert after(approval, *words[:n]).verdict is None

    assert after(approval, *words).verdict is course.verdict


@pytest.mark.parametrize("word", list(VoteKind))
def test_a_decided_approval_takes_no_vote(word: str) -> None:
    approval = after(asked(), "anna:approve").approval

    refusal = refused(count(approval, vote(approval, word, "bert")))

    assert (refusal.code, refusal.verdict) == (VoteCode.DECIDED, None)
    assert verdict_of(approval) is Verdict.APPROVED


def test_an_approval_that_would_need_nobody_is_not_approved_by_nobody() -> None:
    approval = msgspec.structs.replace(asked(), quorum=0)

    assert verdict_of(approval) is not Verdict.APPROVED


# Who may vote


@pytest.mark.parametrize(
    ("rules", "changed", "code"),
    [
        ({}, {"approver": ""}, VoteCode.NO_APPROVER),
        ({}, {"approver": " \t\n"}, VoteCode.NO_APPROVER),
        ({"approvers": ("bert",)}, {}, VoteCode.NOT_AN_APPROVER),
        ({"approvers": ("Anna",)}, {}, VoteCode.NOT_AN_APPROVER),
        ({"approvers": ("\u00e9",)}, {"approver": "e\u0301"}, VoteCode.NOT_AN_APPROVER),
        ({"four_eyes": True, "requested_by": "anna"}, {}, VoteCode.FOUR_EYES),
        ({"four_eyes": True, "requested_by": " anna "}, {"approver": "anna\n"}, VoteCode.FOUR_EYES),
        (
            {"four_eyes": True, "requested_by": "anna", "approvers": ("anna", "bert")},
            {},
            VoteCode.FOUR_EYES,
        ),
        ({"roles": ("dev",)}, {}, VoteCode.WRONG_ROLE),
        ({"roles": ("dev",)}, {"role": "ops"}, VoteCode.WRONG_ROLE),
        ({"roles": ("dev",)}, {"role": "Dev"}, VoteCode.WRONG_ROLE),
        ({"roles": ("dev",)}, {"role": "*"}, VoteCode.WRONG_ROLE),
        ({}, {"digest": ""}, VoteCode.CHANGED),
        ({}, {"digest": "0" * 64}, VoteCode.CHANGED),
        ({}, {"kind": VoteKind.EDIT}, VoteCode.WRONG_ITEMS),
        ({}, {"items": BETTER}, VoteCode.WRONG_ITEMS),
        ({}, {"kind": VoteKind.REJECT, "items": DRAFT}, VoteCode.WRONG_ITEMS),
    ],
)
def test_a_vote_that_may_not_be_cast_is_refused_and_changes_nothing(
    rules: dict[str, Any], changed: dict[str, Any], code: VoteCode
) -> None:
    approval = asked(**rules)
    before = msgspec.json.encode(approval)

    refusal = refused(count(approval, vote(approval, "approve", **changed)))

    assert (refusal.code, refusal.verdict) == (code, None)
    assert refusal.reason.endswith("Nothing was counted.")
    assert msgspec.json.encode(approval) == before


def test_white_space_around_a_name_makes_no_other_person() -> None:
    approval = after(asked(quorum=2, approvers=(" anna", "bert ")), " anna\n:approve").approval

    refusal = refused(count(approval, vote(approval, "approve", "anna")))

    assert refusal.code is VoteCode.ALREADY_VOTED
    assert approval.votes[0].approver == "anna"


@pytest.mark.parametrize("first", ["approve", "reject", "edit"])
@pytest.mark.parametrize("second", ["approve", "reject", "edit"])
def test_the_first_vote_of_an_approver_stands(first: str, second: str) -> None:
    approval = after(asked(quorum=2, veto=()), f"anna:{first}").approval

    refusal = refused(count(approval, vote(approval, second, "anna", comment="no, wait")))

    assert refusal.code is VoteCode.ALREADY_VOTED
    assert [v.kind for v in approval.votes] == [first]


def test_who_asked_may_vote_where_four_eyes_are_not_asked_for() -> None:
    assert after(asked(requested_by="anna"), "anna:approve").verdict is Verdict.APPROVED


def test_a_role_is_only_noted_where_no_roles_are_asked_for() -> None:
    counted = after(asked(), "anna/dev:approve")

    assert counted.verdict is Verdict.APPROVED
    assert counted.approval.votes[0].role == "dev"


def test_a_vote_is_stamped_with_the_instant_at_which_it_is_counted() -> None:
    approval = asked()

    answer = count(approval, vote(approval, "approve", at=1), now=NOW + 5)

    assert isinstance(answer, Counted)
    assert answer.approval.votes[0].at == NOW + 5


@pytest.mark.parametrize(("late_by", "is_late"), [(-1, False), (0, True), (1, True)])
def test_a_vote_at_the_deadline_or_after_it_is_refused_and_the_approval_expired(
    late_by: int, is_late: bool
) -> None:
    approval = asked()

    answer = count(approval, vote(approval, "approve"), now=NOW + late_by, deadline_at=NOW)

    if is_late:
        refusal = refused(answer)
        assert (refusal.code, refusal.verdict) == (VoteCode.EXPIRED, Verdict.EXPIRED)
    else:
        assert isinstance(answer, Counted)


@pytest.mark.parametrize("newer_by", [-1, 0, 1])
def test_a_vote_on_a_flow_that_has_changed_is_refused_and_the_approval_stale(newer_by: int) -> None:
    approval = asked()

    answer = count(approval, vote(approval, "approve"), revision=REVISION + newer_by)

    if newer_by > 0:
        refusal = refused(answer)
        assert (refusal.code, refusal.verdict) == (VoteCode.STALE, Verdict.STALE)
    else:
        assert isinstance(answer, Counted)


# Edits


def test_an_edit_replaces_the_items_and_voids_what_was_said_about_the_old_ones() -> None:
    approval = after(asked(quorum=3), "anna:approve").approval

    edited = after(approval, "bert:edit").approval

    assert bytes(edited.items) == bytes(BETTER)
    assert edited.digest != approval.digest
    assert edited.digest == shown_digest(
        BETTER, Rules(quorum=3), prompt="Send this?", flow_id="triage-1", step="send", edition=1
    )
    assert [v.approver for v in edited.votes] == ["bert"]
    assert [v.approver for v in edited.voided] == ["anna"]
    assert edited.asked is not UNSET and bytes(edited.asked) == bytes(DRAFT)


def test_a_vote_on_what_was_shown_before_an_edit_is_refused_as_changed() -> None:
    approval = asked(quorum=2)
    late = vote(approval, "approve", "anna")

    edited = after(approval, "bert:edit").approval

    assert refused(count(edited, late)).code is VoteCode.CHANGED


def test_a_vote_delivered_again_does_not_count_when_an_edit_brings_the_old_items_back() -> None:
    approval = asked(quorum=3)
    voted = vote(approval, "approve", "anna")
    edited = after(approval, "anna:approve", "bert:edit").approval

    restored = count(edited, vote(edited, "edit", "carl", items=DRAFT))

    assert isinstance(restored, Counted)
    assert bytes(restored.approval.items) == bytes(DRAFT)
    assert refused(count(restored.approval, voted)).code is VoteCode.CHANGED
    assert isinstance(count(restored.approval, vote(restored.approval, "approve")), Counted)


def test_an_edit_that_changes_nothing_is_an_approval_and_voids_nothing() -> None:
    approval = after(asked(quorum=2), "anna:approve").approval
    same = Raw(b'{ "text": "hi", "to": "bob" }')

    answer = count(approval, vote(approval, "edit", "bert", items=same))

    assert isinstance(answer, Counted)
    assert answer.verdict is Verdict.APPROVED
    assert (answer.approval.voided, answer.approval.digest) == ((), approval.digest)


def test_under_four_eyes_an_editor_votes_on_the_edition_of_another_but_not_on_his_own() -> None:
    own = after(asked(**FOUR_EYES), "anna:edit").approval
    assert refused(count(own, vote(own, "approve", "anna"))).code is VoteCode.ALREADY_VOTED

    answer = count(own, vote(own, "edit", "bert", items=Raw(b'"something else"')))

    assert isinstance(answer, Counted)
    others = answer.approval
    assert answer.verdict is None
    assert refused(count(others, vote(others, "approve", "bert"))).code is VoteCode.ALREADY_VOTED
    assert after(others, "anna:approve").verdict is Verdict.APPROVED


def test_the_items_that_were_asked_first_stay_on_record_through_all_edits() -> None:
    approval = after(asked(quorum=2), "anna:edit").approval
    third = Raw(b'"something else"')

    answer = count(approval, vote(approval, "edit", "bert", items=third))

    assert isinstance(answer, Counted)
    assert answer.approval.asked is not UNSET
    assert bytes(answer.approval.asked) == bytes(DRAFT)
    assert asked_digest(answer.approval) == asked(quorum=2).digest
    assert [bytes(v.items) for v in answer.approval.voided if v.items is not UNSET] == [
        bytes(BETTER)
    ]


def test_edits_are_bounded_and_then_it_can_still_be_approved() -> None:
    approval = asked(quorum=2)
    for n in range(approvals.MAX_EDITS):
        answer = count(approval, vote(approval, "edit", f"v{n}", items=Raw(str(n).encode())))
        assert isinstance(answer, Counted)
        approval = answer.approval

    refusal = refused(count(approval, vote(approval, "edit", "one more", items=Raw(b"-1"))))

    assert refusal.code is VoteCode.TOO_MANY
    assert after(approval, "one more:approve").verdict is Verdict.APPROVED


@pytest.mark.parametrize(
    ("rules", "votes", "verdict"),
    [
        ({"quorum": 3}, "a:approve b:approve c:approve", YES),
        ({"quorum": 3, "veto": ()}, "a:reject", NO),
        ({"quorum": 2, "veto": ()}, "a:reject b:approve c:approve", YES),
        (TWO_ROLES, "a/dev:approve b/dev:approve c/legal:approve", YES),
        (TWO_ROLES, "a/dev:approve b/dev:approve c/dev:approve", NO),
        ({"quorum": 3, "veto": (), "approvers": ("a", "b", "c", "d")}, "a:reject", NO),
    ],
)
def test_votes_are_bounded_and_the_last_that_can_be_cast_decides(
    rules: dict[str, Any], votes: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "MAX_VOTES", 3)
    words = votes.split()

    assert after(asked(**rules), *words[:-1]).verdict is OPEN
    assert after(asked(**rules), *words).verdict is verdict


def test_votes_that_an_edit_made_void_take_no_place_from_those_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(approvals, "MAX_VOTES", 3)

    edited = after(asked(quorum=3), "a:approve", "b:approve", "c:edit")

    assert edited.verdict is OPEN
    assert after(edited.approval, "a:approve", "b:approve").verdict is YES


# Misuse


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"quorum": 0}, "quorum is 0; nothing is approved by fewer than one."),
        ({"quorum": -1}, "quorum is -1;"),
        ({"quorum": 1_001}, "quorum is 1001; an approval takes 1000 votes at most."),
        ({"quorum": 3, "approvers": ("a", "b")}, "quorum is 3, but approvers has 2 who may vote;"),
        (
            {"quorum": 2, "approvers": ("a", "b"), "four_eyes": True, "requested_by": " b"},
            "quorum is 2, but approvers has 1 who may vote;",
        ),
        ({"role_quorum": {"dev": 1}}, "role_quorum names the role 'dev', which is not in roles."),
        ({"role_quorum": {"dev": 0}, "roles": ("dev",)}, "roles asks for 0 of 'dev';"),
        (
            {"role_quorum": {"a": 1, "b": 1}, "roles": ("a", "b")},
            "roles asks for 2 approvals altogether, quorum for 1 only.",
        ),
        ({"veto": ("dev",)}, "veto names the role 'dev', which is not in roles."),
        ({"veto": ("*", "dev")}, "veto names the role 'dev',"),
        ({"roles": ("dev", "*")}, 'roles has "*"'),
        ({"roles": ("dev", "dev")}, "roles names 'dev' twice."),
        ({"roles": ("",)}, "roles has an empty name."),
        ({"approvers": ("a", " a")}, "approvers names 'a' twice."),
        ({"approvers": ("a", " ")}, "approvers has an empty name."),
        ({"four_eyes": True}, "four_eyes needs requested_by"),
        ({"four_eyes": True, "requested_by": " "}, "four_eyes needs requested_by"),
    ],
)
def test_rules_that_can_never_be_met_are_misuse(rules: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        asked(**rules)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_approval_without_a_prompt_is_misuse(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        check_rules(Rules(), prompt=prompt)


def test_the_sentence_about_a_misused_name_stays_short_and_on_one_line() -> None:
    with pytest.raises(ValueError, match="veto names the role") as raised:
        check_rules(Rules(veto=("x\n" * 10_000,)), prompt="Send?")

    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


# Grants

LATER = NOW + 1_000


def a_grant(**fields: Any) -> Grant:
    granted = grant_of(after(asked(), "anna:approve").approval, LATER)
    return msgspec.structs.replace(granted, **fields)


def use(grant: Grant | None, **changed: Any) -> Grant | GrantRefusal:
    given: dict[str, Any] = {
        "items_digest": digest_of_raw(DRAFT),
        "step": "send",
        "content_revision": REVISION,
        "now": NOW,
    }
    return use_grant(grant, **given | changed)


def test_an_approval_grants_one_use_of_the_approved_items() -> None:
    used = use(a_grant())

    assert used == a_grant(used_by="send")


def test_an_edited_approval_grants_the_edited_items_only() -> None:
    grant = grant_of(after(asked(), "anna:edit").approval, None)

    denied = use(grant)

    assert isinstance(denied, GrantRefusal) and denied.code is GrantCode.CHANGED
    assert isinstance(use(grant, items_digest=digest_of_raw(BETTER)), Grant)


@pytest.mark.parametrize(
    ("grant", "changed", "code"),
    [
        (None, {}, GrantCode.NOT_APPROVED),
        (a_grant(), {"items_digest": digest_of_raw(BETTER)}, GrantCode.CHANGED),
        (a_grant(), {"items_digest": ""}, GrantCode.CHANGED),
        (a_grant(used_by="other"), {}, GrantCode.USED),
        (a_grant(used_by=""), {}, GrantCode.USED),
        (a_grant(), {"now": LATER}, GrantCode.EXPIRED),
        (a_grant(), {"now": LATER + 1}, GrantCode.EXPIRED),
        (a_grant(), {"content_revision": REVISION + 1}, GrantCode.STALE),
        (a_grant(used_by="send"), {"items_digest": digest_of_raw(BETTER)}, GrantCode.CHANGED),
    ],
)
def test_what_was_not_approved_so_is_refused(
    grant: Grant | None, changed: dict[str, Any], code: GrantCode
) -> None:
    denied = use(grant, **changed)

    assert isinstance(denied, GrantRefusal)
    assert denied.code is code
    assert denied.reason.endswith(".")


@pytest.mark.parametrize(
    "changed", [{}, {"now": LATER + 10_000}, {"content_revision": REVISION + 9}]
)
def test_a_step_that_has_used_a_grant_gets_it_again_however_late(changed: dict[str, Any]) -> None:
    used = use(a_grant())
    assert isinstance(used, Grant)

    assert use(used, **changed) == used


def test_a_grant_without_a_deadline_does_not_expire_and_may_be_used_until_the_last_moment() -> None:
    assert isinstance(use(a_grant(expires_at=None), now=2**62), Grant)
    assert isinstance(use(a_grant(), now=LATER - 1), Grant)


def test_nothing_but_an_approval_that_is_approved_grants_anything() -> None:
    for undecided in (asked(), asked(quorum=2), after(asked(), "anna:reject").approval):
        with pytest.raises(ValueError, match="grants nothing"):
            grant_of(undecided, None)


# The same again, by a voter who knows nothing of the rules' code

ROLES = ("dev", "ops", "legal")
PEOPLE = ("anna", "bert", "carl", "dora")
CONTENTS = (DRAFT, BETTER, Raw(b"[]"))


class Act(NamedTuple):
    """One vote to come: who says what, having seen which edition (-1: the present one), and what happens before."""

    kind: VoteKind
    approver: str
    role: str | None
    seen: int
    edit: int | None
    wait: int
    flow_changes: bool


class ReferenceVoter:
    """Counts on fingers: who has said what about the present content, and whether all that may come could help."""

    def __init__(self, rules: Rules, deadline: int | None) -> None:
        self.rules = rules
        self.deadline = deadline
        self.content = self.edition = 0
        self.said: dict[str, tuple[VoteKind, str | None]] = {}
        self.edits = 0
        self.editor = ""
        self.verdict: Verdict | None = None

    def hear(self, act: Act, now: int, flow_changed: bool) -> VoteCode | None:
        rules, who = self.rules, act.approver.strip()
        if self.verdict is not None:
            return VoteCode.DECIDED
        if self.deadline is not None and now >= self.deadline:
            return VoteCode.EXPIRED
        if flow_changed:
            return VoteCode.STALE
        if who == "":
            return VoteCode.NO_APPROVER
        if rules.four_eyes and who == rules.requested_by:
            return VoteCode.FOUR_EYES
        if rules.approvers and who not in rules.approvers:
            return VoteCode.NOT_AN_APPROVER
        if who in self.said:
            return VoteCode.ALREADY_VOTED
        if rules.roles and act.role not in rules.roles:
            return VoteCode.WRONG_ROLE
        if act.seen not in (-1, self.edition):
            return VoteCode.CHANGED
        if (act.kind == "edit") != (act.edit is not None):
            return VoteCode.WRONG_ITEMS
        if act.kind == "edit":
            if self.edits == approvals.MAX_EDITS:
                return VoteCode.TOO_MANY
            self.edits += 1
        if act.edit is not None and act.edit != self.content:
            self.content, self.said, self.editor = act.edit, {}, who
            self.edition += 1
        self.said[who] = (act.kind, act.role)
        self.verdict = self._decide()
        return None

    def _decide(self) -> Verdict | None:
        asks = {self.editor} if self.rules.four_eyes else set()
        yes = [r for who, (kind, r) in self.said.items() if kind != "reject" and who not in asks]
        no = [role for kind, role in self.said.values() if kind == "reject"]
        if no and "*" in self.rules.veto:
            return Verdict.REJECTED
        if set(no) & set(self.rules.veto):
            return Verdict.REJECTED
        if self._is_enough(yes):
            return Verdict.APPROVED
        if self.rules.approvers:
            return None if self._could_be_enough(yes) else Verdict.REJECTED
        return Verdict.REJECTED if len(no) >= self.rules.quorum else None

    def _is_enough(self, yes: Sequence[str | None]) -> bool:
        if len(yes) < self.rules.quorum:
            return False
        return all(yes.count(role) >= n for role, n in self.rules.role_quorum.items())

    def _could_be_enough(self, yes: list[str | None]) -> bool:
        """Try every way in which everybody who is left could approve."""
        left = [who for who in self.rules.approvers if who not in self.said]
        if self.rules.four_eyes and self.rules.requested_by in left:
            left.remove(self.rules.requested_by)
        roles: Sequence[str | None] = self.rules.roles or (None,)
        return any(self._is_enough([*yes, *more]) for more in product(roles, repeat=len(left)))


@st.composite
def rule_sets(draw: st.DrawFn) -> Rules:
    roles = draw(st.sampled_from([(), ROLES[:1], ROLES[:2], ROLES]))
    quorum = draw(st.integers(1, 3))
    four_eyes = draw(st.booleans())
    rules = Rules(
        quorum=quorum,
        roles=roles,
        role_quorum=draw(st.dictionaries(st.sampled_from(roles), st.integers(1, 2)))
        if roles
        else {},
        approvers=draw(st.sampled_from([(), (), PEOPLE[:2], PEOPLE[:3], PEOPLE])),
        veto=draw(st.sampled_from([(), (), ("*",), roles[:1], roles[1:]])),
        requested_by=draw(st.sampled_from(PEOPLE)) if four_eyes else None,
        four_eyes=four_eyes,
    )
    try:
        check_rules(rules, prompt="Send this?")
    except ValueError:
        reject()
    return rules


def acts(roles: Sequence[str]) -> st.SearchStrategy[Act]:
    """Mostly votes that may well count: a run in which everything is refused shows little."""
    likely = st.sampled_from(roles) if roles else st.none()
    kinds = st.sampled_from([VoteKind.APPROVE] * 4 + [VoteKind.REJECT] * 2 + [VoteKind.EDIT])
    edits = {VoteKind.EDIT: st.sampled_from([0, 1, 2, 2, None])}
    nothing = st.sampled_from([None] * 12 + [1])
    return kinds.flatmap(
        lambda kind: st.builds(
            Act,
            st.just(kind),
            st.sampled_from([*PEOPLE * 3, "erik", "frida", " anna ", "", " "]),
            st.one_of(likely, likely, likely, st.sampled_from([*ROLES, None])),
            st.sampled_from([-1] * 8 + [0, 1, 2]),
            edits.get(kind, nothing),
            st.sampled_from([0] * 6 + [1]),
            st.sampled_from([False] * 14 + [True]),
        )
    )


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Rules, int | None, list[Act]]:
    rules = draw(rule_sets())
    deadline = draw(st.sampled_from([None, None, 2]))
    return rules, deadline, draw(st.lists(acts(rules.roles), min_size=1, max_size=14))


def ballot_of(act: Act, shown: Sequence[str]) -> Vote:
    """The vote, if editions were shown with these digests."""
    return Vote(
        kind=act.kind,
        approver=act.approver,
        role=act.role,
        digest=shown[act.seen] if act.seen < len(shown) else "not shown yet",
        items=UNSET if act.edit is None else CONTENTS[act.edit],
    )


def test_every_sequence_of_votes_comes_out_as_a_voter_who_counts_on_fingers_says() -> None:
    seen: Counter[str] = Counter()

    @given(sessions())
    @settings(PROFILE, max_examples=300)
    def run(session: tuple[Rules, int | None, list[Act]]) -> None:
        rules, deadline, to_come = session
        approval = asked(**approvals._fields(rules))
        shown = [approval.digest]
        reference = ReferenceVoter(rules, deadline)
        verdicts: list[Verdict] = []
        now, revision = 0, REVISION
        for act in to_come:
            now, revision = now + act.wait, revision + act.flow_changes
            before, heard_before = approval, len(reference.said)
            code = reference.hear(act, now, revision > REVISION)
            answer = count_vote(
                approval,
                ballot_of(act, shown),
                flow_content_revision=revision,
                now=now,
                deadline_at=deadline,
            )
            if isinstance(answer, VoteRefusal):
                assert answer.code == code
                assert len(reference.said) == heard_before
                ends = {VoteCode.EXPIRED: Verdict.EXPIRED, VoteCode.STALE: Verdict.STALE}
                assert answer.verdict is ends.get(answer.code)
                seen[answer.code] += 1
                if answer.verdict is not None:
                    # The caller closes the wait: nothing is counted any more.
                    verdicts.append(answer.verdict)
                    break
            else:
                assert code is None
                approval = answer.approval
                assert answer.verdict is reference.verdict
                assert {v.approver: (v.kind, v.role) for v in approval.votes} == reference.said
                assert bytes(approval.items) == bytes(CONTENTS[reference.content])
                if reference.edition == len(shown):
                    shown.append(approval.digest)
                assert approval.digest == shown[reference.edition]
                assert len({*shown}) == len(shown)
                total = len(before.votes) + len(before.voided)
                assert len(approval.votes) + len(approval.voided) == total + 1
                if answer.verdict is not None:
                    verdicts.append(answer.verdict)
        seen.update(verdicts)
        assert len(verdicts) <= 1
        if verdicts == [Verdict.APPROVED]:
            digest = digest_of_raw(CONTENTS[reference.content])
            assert grant_of(approval, deadline).items_digest == digest
        else:
            with pytest.raises(ValueError, match="grants nothing"):
                grant_of(approval, deadline)

    run()

    unseen = {*approvals._WHY_NO_VOTE, *Verdict} - seen.keys()
    assert unseen == {VoteCode.TOO_MANY, Verdict.WITHDRAWN}, "the sessions show too little"


def test_votes_that_come_twice_or_too_late_change_nothing_wherever_they_come() -> None:
    repeated = 0

    @given(sessions(), st.randoms(use_true_random=False))
    @settings(PROFILE, max_examples=80)
    def run(session: tuple[Rules, int | None, list[Act]], chance: Any) -> None:
        nonlocal repeated
        rules, _, to_come = session
        once = noisy = asked(**approvals._fields(rules))
        shown = [once.digest]
        cast: list[Vote] = []
        for act in to_come:
            ballot = ballot_of(act, shown)
            answer, again = count(once, ballot), count(noisy, ballot)
            if isinstance(answer, Counted):
                assert isinstance(again, Counted)
                once, noisy = answer.approval, again.approval
                cast.append(ballot)
                if once.digest != shown[-1]:
                    shown.append(once.digest)
            else:
                assert again == answer
            for late in chance.sample(cast, chance.randint(0, len(cast))):
                repeated += 1
                answer = count(noisy, late)
                noisy = answer.approval if isinstance(answer, Counted) else noisy
        assert msgspec.json.encode(noisy) == msgspec.json.encode(once)

    run()

    assert repeated > 100
