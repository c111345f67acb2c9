"""What a wait is known by: the same owner and the same fields with the same values, told apart as JSON does."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from flowstead.model.wait import RESERVED
from flowstead.rules.wait_keys import (
    number_in,
    own_token,
    place_digest,
    plain_fields,
    token_digest,
    wait_key,
    wait_key_in,
)

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

# Values that are easily taken for one another, and texts that would break a key made by gluing.
tricky: list[Any] = [
    0, 0.0, -0.0, False, "0", "", "0.0", 1, 1.0, True, "1", "true", "True", "null", 2**53, 2.0**53,
    2**53 + 1, -1, -1.0, 1e300, 5e-324, "é", "e\u0301", "É", "a", "A", " a", "a ", '"', '","', "a\":1,\"b",
    "\\", "\x00", "😀", "[]", "{}", 10**15, 1e15, 0.1, 0.1 + 0.2, 0.3,
]  # fmt: skip
plain = st.one_of(
    st.sampled_from(tricky),
    st.sampled_from(tricky),
    st.text(max_size=5),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
names = st.sampled_from(["kind", "channel", "threadKey", "a", "b", 'a":1', "", "é", "e\u0301"])
keys = st.dictionaries(names, plain, min_size=1, max_size=4)
owners = st.sampled_from(["agent:main:main", "agent:main", "agent:other", '"', "a", 'a",'])


def as_told_apart(owner: str, fields: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The oracle: each value by its own JSON text, as the standard library writes it."""
    return owner, {
        name: f"{type(value).__name__} {json.dumps(value)}" for name, value in fields.items()
    }


@given(owner=owners, fields=keys, other_owner=owners, other=keys)
@example(owner="a", fields={"n": 1}, other_owner="a", other={"n": 1.0})
@example(owner="a", fields={"n": 1}, other_owner="a", other={"n": True})
@example(owner="a", fields={"n": 1}, other_owner="b", other={"n": 1})
@example(owner="a", fields={"n": 0.0}, other_owner="a", other={"n": -0.0})
@example(owner="a", fields={"n": "é"}, other_owner="a", other={"n": "e\u0301"})
@settings(PROFILE, max_examples=800)
def test_keys_are_the_same_exactly_for_the_same_owner_and_the_same_fields(
    owner: str, fields: dict[str, Any], other_owner: str, other: dict[str, Any]
) -> None:
    same = as_told_apart(owner, fields) == as_told_apart(other_owner, other)

    assert (wait_key(owner, fields) == wait_key(other_owner, other)) is same


@given(owner=owners, fields=keys, name=names, value=plain)
@settings(PROFILE, max_examples=400)
def test_one_field_more_less_or_different_is_another_key(
    owner: str, fields: dict[str, Any], name: str, value: Any
) -> None:
    changed = {**fields, name: value}

    same = as_told_apart(owner, fields) == as_told_apart(owner, changed)

    assert (wait_key(owner, fields) == wait_key(owner, changed)) is same


@given(owner=owners, fields=keys, data=st.data())
@settings(PROFILE, max_examples=300)
def test_the_order_of_fields_makes_no_difference_nor_does_the_way_through_the_store(
    owner: str, fields: dict[str, Any], data: st.DataObject
) -> None:
    shuffled = {name: fields[name] for name in data.draw(st.permutations(list(fields)))}
    stored = msgspec.json.decode(msgspec.json.encode(shuffled))

    assert wait_key(owner, shuffled) == wait_key(owner, fields)
    assert wait_key(owner, stored) == wait_key(owner, fields)


@given(owner=owners, fields=keys, more=st.dictionaries(st.text(max_size=3), plain, max_size=2))
@settings(PROFILE, max_examples=200)
def test_how_to_wait_and_what_is_not_plain_is_no_part_of_the_key(
    owner: str, fields: dict[str, Any], more: dict[str, Any]
) -> None:
    how = dict.fromkeys(sorted(RESERVED), "anything")
    shapes: dict[str, Any] = {"list": [1], "object": {"a": 1}, "nothing": None}

    stored = Raw(msgspec.json.encode({**how, **fields, **shapes}))

    assert wait_key_in(owner, stored) == wait_key(owner, fields)
    if clashing := more.keys() - fields.keys():
        widened = {**fields, **{name: more[name] for name in clashing}}
        assert wait_key(owner, widened) != wait_key(owner, fields)


@pytest.mark.parametrize(
    "wait_json",
    [None, True, 7, "reply", [], [{"kind": "reply"}], {}, {"deadlineAt": 5}, {"a": None, "b": []}],
    ids=str,
)
def test_a_wait_without_plain_fields_is_answered_by_no_key(wait_json: Any) -> None:
    assert plain_fields(wait_json) is None
    assert wait_key_in("agent:main:main", Raw(msgspec.json.encode(wait_json))) is None


def test_no_wait_has_no_key() -> None:
    assert wait_key_in("agent:main:main", UNSET) is None


def test_every_reserved_field_is_left_out_and_nothing_else() -> None:
    given_fields = dict.fromkeys(RESERVED, 1)

    assert plain_fields({**given_fields, "kind": "reply", "deadlineat": 1}) == {
        "kind": "reply",
        "deadlineat": 1,
    }


def test_a_key_is_a_digest_that_does_not_show_what_it_is_of() -> None:
    key = wait_key("agent:main:main", {"secret": "hunter2"})

    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")
    assert wait_key("agent:main:main", {"secret": "hunter2"}) == key


def test_a_token_is_found_by_its_digest_and_the_digest_is_not_the_token() -> None:
    assert token_digest("a") != token_digest("b")
    assert token_digest("a") == token_digest("a")
    assert "token" not in token_digest("token")
    assert len(token_digest("")) == 64


def test_the_tokens_of_a_flow_lead_to_it_and_those_of_others_to_others() -> None:
    one, next_one = (own_token("alice", "flow", secret) for secret in ("secret", "se.cret"))
    others = [own_token(*of, "secret") for of in (("bob", "flow"), ("alice", "flo"), ("a", "b"))]

    assert place_digest(one) == place_digest(next_one)
    assert token_digest(one) != token_digest(next_one)
    assert len({place_digest(token) for token in (one, *others)}) == 4
    assert place_digest("from before") == token_digest("from before")


@pytest.mark.parametrize("value", [0, 1, 2**53 - 1])
def test_an_instant_is_a_whole_number_of_milliseconds(value: int) -> None:
    assert number_in({"deadlineAt": value}, "deadlineAt") == value


@pytest.mark.parametrize("value", [-1, 2**53, True, False, 1.0, "1", None, [1]], ids=repr)
def test_what_is_no_instant_is_none(value: Any) -> None:
    assert number_in({"deadlineAt": value}, "deadlineAt") is None
    assert number_in({}, "deadlineAt") is None
