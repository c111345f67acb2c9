"""The schema of a type takes what the type takes and nothing else, as far as JSON Schema can say it."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

import msgspec
import pytest
from msgspec import Meta, Raw

from flowstead.rules.shapes import Shapes, schema_of
from flowstead.rules.type_schemas import KEYWORD

DATE, DATETIME, TIME = datetime.date, datetime.datetime, datetime.time
DURATION = datetime.timedelta
TEXTS = [
    "", "x", "1", "1.5", "-3", "1e3", "nan", "YQ==", "YQ", "!!", "2030-12-31", "2030-02-30", "2030-1-1",
    "0000-01-01", "2030-12-31T23:59:59", "2030-12-31T23:59:59Z", "2030-12-31 23:59:59Z", "2030-12-31T23:59:60Z",
    "2030-12-31T23:59", "23:59:59", "23:59:59Z", "24:00:00", "P1D", "PT1.5S", "-P1D", "P1Y", "P1W", "PT",
    "P99999999999D", "f47ac10b-58cc-4372-a567-0e02b2c3d479", "f47ac10b58cc4372a5670e02b2c3d479", "red", "get",
]  # fmt: skip
"""What is read as one thing, as another, or as nothing at all."""


class Colour(Enum):
    RED = "red"


class Get(msgspec.Struct, tag="get"):
    at: DATETIME


class Put(msgspec.Struct, tag="put", array_like=False):
    by: UUID | None = None
    below: list[Get | Put] = []


class Row(msgspec.Struct, array_like=True):
    day: DATE
    id: UUID


class Tagged(msgspec.Struct, array_like=True, tag="row"):
    day: DATE


class Pair(NamedTuple):
    day: DATE
    took: DURATION


class Plan(TypedDict):
    day: DATE


@dataclass
class Note:
    day: DATE
    text: str = ""


class Renamed(msgspec.Struct, rename="camel"):
    due_date: DATE


def takes(kind: Any, value: Any) -> bool:
    try:
        msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError:
        return False
    return True


def says(kind: Any, value: Any) -> str | None:
    return Shapes().check(
        Raw(json.dumps(schema_of(kind)).encode()), Raw(json.dumps(value).encode())
    )


@pytest.mark.parametrize(
    "kind",
    [
        str, bytes, bytearray, memoryview, DATE, DATETIME, TIME, DURATION, UUID, Decimal,
        Annotated[DATETIME, Meta(tz=True)], Annotated[DATETIME, Meta(tz=False)],
        Annotated[TIME, Meta(tz=True)], Annotated[TIME, Meta(tz=False)], Colour,
        DATE | None, UUID | int | None, int | DATETIME, Annotated[DATE, Meta(title="a day")] | None,
    ],
    ids=str,
)  # fmt: skip
def test_a_text_fits_exactly_when_the_type_reads_it_wherever_it_stands(kind: Any) -> None:
    places: list[tuple[Any, Any]] = [
        (kind, lambda text: text),
        (list[kind], lambda text: [text]),
        (tuple[int, kind], lambda text: [1, text]),
        (tuple[kind, ...], lambda text: [text, text]),
        (dict[str, kind], lambda text: {"a": text}),
        (dict[str, list[kind]] | None, lambda text: {"a": [text]}),
        (msgspec.defstruct("Mine", [("part", kind)]), lambda text: {"part": text}),
    ]
    took = 0

    for whole, put in places:
        for text in TEXTS:
            taken = takes(whole, put(text))
            took += taken
            assert (says(whole, put(text)) is None) is taken, (whole, text)

    assert took >= len(places), "vacuous"


@pytest.mark.parametrize("kind", [str, int, float, DATE, DATETIME, UUID, Decimal, Colour], ids=str)
def test_the_name_of_a_field_fits_exactly_when_the_type_reads_it(kind: Any) -> None:
    took = 0

    for text in TEXTS:
        taken = takes(dict[kind, int], {text: 1})
        took += taken
        # What msgspec says of an enumeration as a key is nothing.
        assert kind is Colour or (says(dict[kind, int], {text: 1}) is None) is taken, text

    assert took


WHEN, ID, DAY = "2030-12-31T23:59:59Z", "f47ac10b-58cc-4372-a567-0e02b2c3d479", "2030-12-31"


@pytest.mark.parametrize(
    ("kind", "good", "bad", "where"),
    [
        (Get, {"type": "get", "at": WHEN}, {"type": "get", "at": "soon"}, '["at"]'),
        (Get | Put, {"type": "put", "by": ID}, {"type": "put", "by": "me"}, '["by"]'),
        (Get | Put, {"type": "get", "at": WHEN}, {"type": "get", "at": ID}, '["at"]'),
        (Get | Put | None | DATE, DAY, "soon", ""),
        (
            Put,
            {"type": "put", "below": [{"type": "put", "below": [{"type": "get", "at": WHEN}]}]},
            {"type": "put", "below": [{"type": "put", "below": [{"type": "get", "at": DAY}]}]},
            '["below"][0]["below"][0]["at"]',
        ),
        (Row, [DAY, ID], [DAY, "me"], "[1]"),
        (Tagged, ["row", DAY], ["row", "soon"], "[1]"),
        (Pair, [DAY, "P1D"], [DAY, "long"], "[1]"),
        (Plan, {"day": DAY}, {"day": "soon"}, '["day"]'),
        (Note, {"day": DAY}, {"day": "soon"}, '["day"]'),
        (Renamed, {"dueDate": DAY}, {"dueDate": "soon"}, '["dueDate"]'),
        (dict[UUID, list[DATE]], {ID: [DAY]}, {ID: [ID]}, f'["{ID}"][0]'),
        (Row | Literal["none"] | None, [DAY, ID], ["soon", ID], "[0]"),
    ],
)
def test_what_does_not_fit_is_told_with_its_path_in_every_sort_of_type(
    kind: Any, good: Any, bad: Any, where: str
) -> None:
    assert takes(kind, good) and not takes(kind, bad)
    assert says(kind, good) is None
    told = says(kind, bad)
    assert told is not None and told.startswith(f"payload{where} must be "), told


@pytest.mark.parametrize(
    ("kind", "wrong", "told"),
    [
        (DATE, "soon", 'payload must be a date, as "2030-12-31".'),
        (UUID, "me", "payload must be a UUID."),
        (bytes, "!!", "payload must be text in base64."),
        (DURATION, "P1Y", 'payload must be a duration up to days, as "P1DT12H".'),
        (dict[int, str], {"a": "b"}, "payload has a field whose name must be an integer as text."),
        (Annotated[DATETIME, Meta(tz=True)], DAY, "payload must be a date and time with its zone"),
    ],
)
def test_the_sentence_says_what_it_must_be_and_never_quotes_it(
    kind: Any, wrong: Any, told: str
) -> None:
    sentence = says(kind, wrong)

    assert sentence is not None and sentence.startswith(told)


def test_what_is_known_of_a_text_stands_beside_what_msgspec_says() -> None:
    assert schema_of(DATE) == msgspec.json.schema(DATE) | {KEYWORD: "date"}
    assert schema_of(bytes) == msgspec.json.schema(bytes) | {KEYWORD: "base64"}


def test_the_keyword_means_nothing_where_it_makes_no_sense() -> None:
    for value in (5, None, "made up", ["date"]):
        schema = Raw(json.dumps({KEYWORD: value}).encode())
        assert Shapes().check(schema, Raw(b'"soon"')) is None
