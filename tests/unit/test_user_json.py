"""User JSON is kept byte for byte, or refused whole with the place of what is wrong with it."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from collections import OrderedDict, defaultdict
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, IntFlag, StrEnum
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from flowstead.model.code import Code
from flowstead.model.command import Defect
from flowstead.rules.user_json import encode_json, is_encodable

PROFILE = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MIB = 1024 * 1024


def encoded(value: Any, *, max_bytes: int = MIB, max_depth: int = 100) -> bytes:
    answer = encode_json(value, name="state_json", max_bytes=max_bytes, max_depth=max_depth)
    assert isinstance(answer, Raw), answer
    return bytes(answer)


def refused(value: Any, *, max_bytes: int = MIB, max_depth: int = 100) -> Defect:
    answer = encode_json(value, name="state_json", max_bytes=max_bytes, max_depth=max_depth)
    assert isinstance(answer, Defect), bytes(answer)[:200]
    assert Code(answer.code) in {Code.INVALID_STATE, Code.STATE_TOO_LARGE}
    assert answer.reason.startswith("state_json")
    assert answer.reason.endswith("Nothing was written.")
    assert is_encodable(answer.reason)
    assert len(answer.reason) < 6_000
    return answer


def nested(depth: int, inside: Any = None) -> Any:
    """A value under so many lists."""
    for _ in range(depth):
        inside = [inside]
    return inside


texts = st.text(st.characters(codec="utf-8"), max_size=12)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=25,
)


def same(one: Any, other: Any) -> bool:
    """Equal in value, type and sign of zero."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@given(json_values)
@settings(PROFILE, max_examples=400)
def test_any_json_value_comes_back_as_it_was_and_encodes_to_the_same_bytes_again(
    value: Any,
) -> None:
    kept = encoded(value)

    assert same(json.loads(kept), value)
    assert encoded(json.loads(kept)) == kept


@given(
    json_values,
    st.sampled_from(
        [math.nan, math.inf, -math.inf, b"raw", {1}, Decimal(1), "\ud800", object(), 1j]
    ),
    st.lists(st.one_of(st.integers(0, 3), texts), max_size=6),
)
@settings(PROFILE, max_examples=300)
def test_a_bad_value_is_found_wherever_it_is_and_named_with_its_path(
    other: Any, bad: Any, path: list[int | str]
) -> None:
    value, shown = bad, "state_json"
    for step in reversed(path):
        value = {step: value} if isinstance(step, str) else [*[other] * step, value]
    for step in path:
        shown += f"[{ascii(step) if isinstance(step, str) else step}]"

    defect = refused(value)

    assert defect.code == Code.INVALID_STATE
    assert defect.reason.startswith(f"{shown} ")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (b"raw", "bytes"),
        (bytearray(b"raw"), "bytearray"),
        (memoryview(b"raw"), "memoryview"),
        ({1, 2}, "set"),
        (frozenset(), "frozenset"),
        (datetime(2026, 1, 1, tzinfo=UTC), "datetime"),
        (date(2026, 1, 1), "date"),
        (time(12), "time"),
        (timedelta(1), "timedelta"),
        (Decimal("1.5"), "Decimal"),
        (Fraction(1, 2), "Fraction"),
        (UUID(int=1), "UUID"),
        (PurePosixPath("/x"), "PurePosixPath"),
        (1j, "complex"),
        (object(), "object"),
        (len, "builtin_function_or_method"),
        ((n for n in [1]), "generator"),
        (range(3), "range"),
        (UNSET, "UnsetType"),
        (Raw(b"1"), "Raw"),
        (Exception("x"), "Exception"),
        (int, "type"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_what_json_has_no_word_for_is_refused_by_name(value: Any, says: str) -> None:
    for inside in (value, [value], {"key": value}, ({"key": [value]},)):
        defect = refused(inside)

        assert defect.code == Code.INVALID_STATE
        assert says in defect.reason


class Record(msgspec.Struct):
    """A record is not a JSON value, though the encoder would take it for one."""

    a: int = 1


class Color(Enum):
    RED = "red"


@pytest.mark.parametrize("value", [Record(), Color.RED, {"c": Color.RED}, [Record()]])
def test_what_would_change_its_type_by_being_saved_is_refused(value: Any) -> None:
    assert refused(value).code == Code.INVALID_STATE


class Hostile:
    """A value whose every method fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class HostileDict(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("no items")


class HostileList(list[int]):
    def __len__(self) -> int:
        raise RuntimeError("no length")


class HostileText(str):
    def __len__(self) -> int:
        raise RuntimeError("no length")

    def encode(self, *args: Any) -> bytes:
        raise RuntimeError("no bytes")


class Posing:
    """A value that passes itself off as a dict, and is none."""

    @property
    def __class__(self) -> Any:
        return dict

    def __len__(self) -> int:
        return 0

    def items(self) -> Any:
        return ()


class Nameless(type):
    """A class that will not say what it is called."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "__qualname__":
            raise RuntimeError("no name")
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "value",
    [
        Hostile(),
        {Hostile(): 1},
        [Hostile()],
        {"a": {Hostile(): 1}},
        HostileDict(a=1),
        HostileList([1]),
        {"a": HostileDict(a=1)},
        {HostileText("k" * 50): math.nan},
        type("N" * 100_000, (), {})(),
        type("X", (), {"__qualname__": "lone \ud800 name"})(),
        {type("N" * 100_000, (), {})(): 1},
        Posing(),
        [Posing()],
    ],
    ids=[
        "value",
        "key",
        "in list",
        "deep key",
        "dict",
        "list",
        "deep dict",
        "text",
        "long class",
        "unnameable class",
        "key of long class",
        "no dict",
        "no dict in list",
    ],
)
def test_a_value_that_misbehaves_is_refused_like_any_other(value: Any) -> None:
    assert refused(value).code == Code.INVALID_STATE


def test_a_value_whose_class_will_not_say_its_name_is_refused_without_one() -> None:
    value = Nameless("Hidden", (), {})()

    assert "is of type an unnamed type, which is not a JSON value" in refused([value]).reason


@pytest.mark.parametrize(
    "key", [1, 1.5, None, True, (1, 2), b"k", b"k" * MIB, frozenset({1}), object()], ids=type
)
def test_a_key_that_is_no_string_is_refused_with_the_place_of_its_object(key: Any) -> None:
    shallow, deep = refused({key: 1}), refused({"a": [{"ok": 1}, {key: 1}]})

    assert shallow.code == deep.code == Code.INVALID_STATE
    assert "key" in shallow.reason
    assert deep.reason.startswith("state_json['a'][1] ")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("\ud800", "state_json "),
        (["ok", "\udfff"], "state_json[1] "),
        ({"a": {"b": ["x", "y\ud83d"]}}, "state_json['a']['b'][1] "),
        ({"\udc00": 1}, "state_json: the key '\\udc00' "),
        ({"a": {"b\udc00": 1}}, "state_json['a']: the key 'b\\udc00' "),
        ([{"fine": "fine"}, {"é": "\ud800"}], "state_json[1]['\\xe9'] "),
        (("ok", ("\ud800",)), "state_json[1][0] "),
    ],
)
def test_a_lone_surrogate_is_refused_with_its_path(value: Any, path: str) -> None:
    defect = refused(value)

    assert defect.code == Code.INVALID_STATE
    assert defect.reason.startswith(path)
    assert "surrogate" in defect.reason


class Word(str):
    __slots__ = ()


class Number(int):
    pass


class Real(float):
    pass


class Mood(StrEnum):
    GOOD = "good"
    BROKEN = "\ud800"


class Level(IntEnum):
    HIGH = 3


class Mask(IntFlag):
    A = 1
    B = 2


class Named(str, Enum):  # noqa: UP042 - the older spelling is what many callers have
    X = "x"


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (Word("text"), b'"text"'),
        ({Word("key"): Word("text")}, b'{"key":"text"}'),
        (Number(7), b"7"),
        (Number(2**70), str(2**70).encode()),
        ([Number(7), True], b"[7,true]"),
        (Real(1.5), b"1.5"),
        (Mood.GOOD, b'"good"'),
        ({Mood.GOOD: Mood.GOOD}, b'{"good":"good"}'),
        (Level.HIGH, b"3"),
        (Mask.A | Mask.B, b"3"),
        (Named.X, b'"x"'),
        ((1, (2, ())), b"[1,[2,[]]]"),
        (Point(1, 2), b"[1,2]"),
        (OrderedDict(b=1, a=2), b'{"b":1,"a":2}'),
        (defaultdict(list, a=[1]), b'{"a":[1]}'),
        (-0.0, b"-0.0"),
        (0.0, b"0.0"),
        (1e308, b"1e308"),
        (5e-324, b"5e-324"),
        (sys.float_info.max, b"1.7976931348623157e308"),
        (2**63, b"9223372036854775808"),
        (-(2**64), b"-18446744073709551616"),
        ([], b"[]"),
        ({}, b"{}"),
        ((), b"[]"),
        ("", b'""'),
        ({"": {"": []}}, b'{"":{"":[]}}'),
        (None, b"null"),
        (True, b"true"),
        ("\x00\x1f\u2028\U0001f600", '"\\u0000\\u001f\u2028\U0001f600"'.encode()),
    ],
)
def test_what_means_a_json_value_is_kept_as_that_value(value: Any, kept: bytes) -> None:
    assert encoded(value) == kept


def test_a_surrogate_inside_a_subclass_of_text_is_refused_too() -> None:
    for value in (Word("\ud800"), Mood.BROKEN, {Word("\ud800"): 1}, {"a": Mood.BROKEN}):
        assert "surrogate" in refused(value).reason


def test_a_number_that_is_not_finite_is_refused_in_a_subclass_too() -> None:
    assert refused([Real("nan")]).reason.startswith("state_json[0] ")


def test_an_integer_too_long_to_be_written_is_refused_with_its_path() -> None:
    defect = refused({"a": [1, 10**5_000]})

    assert defect.reason.startswith("state_json['a'][1] ")


def test_a_value_that_contains_itself_is_refused() -> None:
    in_list: list[Any] = []
    in_list.append(in_list)
    in_dict: dict[str, Any] = {}
    in_dict["again"] = [in_dict]
    in_tuple: list[Any] = []
    in_tuple.append((in_tuple, in_tuple))

    for value in (in_list, in_dict, in_tuple, {"a": in_list}):
        assert "contains itself" in refused(value).reason


@pytest.mark.parametrize("limit", [1, 2, 10, 100])
def test_a_value_may_be_as_deep_as_the_limit_and_not_deeper(limit: int) -> None:
    deepest, over = nested(limit), nested(limit + 1)

    assert encoded(deepest, max_depth=limit) == b"[" * limit + b"null" + b"]" * limit
    defect = refused(over, max_depth=limit)
    assert defect.code == Code.INVALID_STATE
    assert str(limit) in defect.reason


def test_objects_count_as_levels_like_lists() -> None:
    value: Any = 1
    for n in range(50):
        value = {"k": [value]} if n % 2 else {"k": value}

    assert encoded(value, max_depth=75)
    assert refused(value, max_depth=74)


def test_a_depth_limit_beyond_what_python_can_walk_still_refuses() -> None:
    assert refused(nested(20_000), max_depth=1_000_000).code == Code.INVALID_STATE


def test_the_text_of_a_deep_path_stays_short() -> None:
    value: Any = 1
    for n in range(150):
        value = {f"key number {n} with a rather long name, longer than is useful": value}

    assert len(refused(value).reason) < 300


@pytest.mark.parametrize("bad", [math.nan, b"x", "\ud800", {1: 2}])
def test_the_path_of_a_bad_value_at_the_bottom_is_told_and_bounded(bad: Any) -> None:
    value: Any = bad
    for n in range(90):
        value = {f"key {n} " + "x" * 10_000: value}

    assert refused(value, max_bytes=4 * MIB).code == Code.INVALID_STATE


@pytest.mark.parametrize(
    "grow",
    [
        lambda inner: [inner, inner],
        lambda inner: {"a": inner, "b": inner},
        lambda inner: (inner, inner),
        lambda inner: [inner] * 10,
    ],
)
def test_a_value_shared_a_billion_times_over_is_refused_as_too_large(grow: Any) -> None:
    value: Any = "x"
    for _ in range(60):
        value = grow(value)

    assert refused(value).code == Code.STATE_TOO_LARGE


@pytest.mark.parametrize(
    "value",
    [
        ["x" * MIB] * 64,
        {str(n): "x" * MIB for n in range(64)},
        [{"x" * MIB: n} for n in range(64)],
        ["\u20ac" * 350_000] * 64,
    ],
    ids=["texts", "values", "keys", "wide"],
)
def test_a_long_text_shared_many_times_is_refused_without_being_written_out(value: Any) -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        defect = refused(value)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()

    assert defect.code == Code.STATE_TOO_LARGE
    assert peak < 16 * MIB


@pytest.mark.parametrize(
    "value", ["x" * 98, ["x" * 96], {"k": "x" * 92}, [1] * 48 + [22], "é" * 49]
)
def test_the_limit_counts_bytes_of_the_encoded_value(value: Any) -> None:
    size = len(encoded(value))

    assert size <= 100
    assert encoded(value, max_bytes=size)
    defect = refused(value, max_bytes=size - 1)
    assert defect.code == Code.STATE_TOO_LARGE
    assert str(size - 1) in defect.reason


@given(json_values)
@settings(PROFILE, max_examples=200)
def test_a_value_fits_exactly_when_its_bytes_do(value: Any) -> None:
    size = len(encoded(value))

    assert len(encoded(value, max_bytes=size)) == size
    if size > 1:
        assert refused(value, max_bytes=size - 1).code == Code.STATE_TOO_LARGE


def test_the_value_given_is_never_changed_and_the_kept_one_shares_nothing_with_it() -> None:
    value = {"list": [1, {"deep": (2,)}]}

    kept = encode_json(value, name="state_json", max_bytes=100, max_depth=10)
    value["list"].append("later")

    assert isinstance(kept, Raw)
    assert bytes(kept) == b'{"list":[1,{"deep":[2]}]}'
