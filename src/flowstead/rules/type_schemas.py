"""The JSON Schema of a type, exact also about texts: what is no date, no UUID, no base64 is refused by the schema.

msgspec describes a type by `format`, which refuses nothing, or not at all. So each text that the type reads, key or
value, is named by a keyword of ours beside what msgspec says of it, and checked by reading it. The schema alone
says so: whoever checks an answer may be another process, that has never seen the type.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, inspect

KEYWORD: Final = "x-flowstead-text"

_AWARE, _NAIVE = Meta(tz=True), Meta(tz=False)

_READ_AS: Final[dict[str, tuple[Any, str]]] = {
    "base64": (bytes, "text in base64"),
    "date": (datetime.date, 'a date, as "2030-12-31"'),
    "datetime": (datetime.datetime, 'a date and time, as "2030-12-31T23:59:59"'),
    "datetime-aware": (
        Annotated[datetime.datetime, _AWARE],
        'a date and time with its zone, as "2030-12-31T23:59:59Z"',
    ),
    "datetime-naive": (
        Annotated[datetime.datetime, _NAIVE],
        'a date and time without a zone, as "2030-12-31T23:59:59"',
    ),
    "decimal": (decimal.Decimal, "a decimal number as text"),
    "duration": (datetime.timedelta, 'a duration up to days, as "P1DT12H"'),
    "float": (dict[float, None], "a number as text"),
    "int": (dict[int, None], "an integer as text"),
    "time": (datetime.time, 'a time, as "23:59:59"'),
    "time-aware": (Annotated[datetime.time, _AWARE], 'a time with its zone, as "23:59:59Z"'),
    "time-naive": (Annotated[datetime.time, _NAIVE], 'a time without a zone, as "23:59:59"'),
    "uuid": (uuid.UUID, "a UUID"),
}
_KEYS: Final = frozenset({"float", "int"})
"""What only the name of a field is read as."""


class Text:
    """The keyword, as jsonschema-rs asks for it: a text that must be readable as what it is for."""

    def __init__(self, _schema: Any, value: Any, _path: Any) -> None:
        self._name = value if isinstance(value, str) else ""

    def validate(self, text: Any) -> None:
        """Refuse a text that cannot be read.

        Raises:
            ValueError: With what it must be.
        """
        if not isinstance(text, str) or self._name not in _READ_AS:
            return
        kind, told = _READ_AS[self._name]
        try:
            msgspec.convert({text: None} if self._name in _KEYS else text, kind, str_keys=True)
        except msgspec.ValidationError:
            raise ValueError(f"must be {told}") from None


def schema_of_type(shape: Any) -> dict[str, Any]:
    """Answer the JSON Schema of a type.

    Raises:
        TypeError: It is no type, or one that JSON Schema cannot describe.
    """
    schema = msgspec.json.schema(shape)
    _Texts(schema.get("$defs", {})).name_in(inspect.type_info(shape), schema)
    return schema


class _Texts:
    """A walk over a type and its schema, side by side."""

    def __init__(self, named: dict[str, dict[str, Any]]) -> None:
        self._named = named
        self._seen: set[str] = set()

    def name_in(self, node: inspect.Type, schema: dict[str, Any]) -> None:
        """Name the texts that this part of the type reads."""
        node = _bare(node)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name in self._seen:
                return
            self._seen.add(name)
            schema = self._named[name]
        if (text := _text(node)) and schema.get("type") == "string":
            schema[KEYWORD] = text
        if key := _key(node):
            schema["propertyNames"] = {**schema.get("propertyNames", {}), KEYWORD: key}
        for part, described in _parts(node, schema):
            self.name_in(part, described)


def _parts(node: Any, schema: dict[str, Any]) -> Iterator[tuple[inspect.Type, dict[str, Any]]]:
    """What a type is made of, each beside its schema."""
    if isinstance(node, inspect.UnionType):
        yield from _options(node, schema)
    elif isinstance(node, inspect.TupleType):
        yield from zip(node.item_types, schema.get("prefixItems", ()), strict=False)
    elif hasattr(node, "item_type") and isinstance(schema.get("items"), dict):
        yield node.item_type, schema["items"]
    elif hasattr(node, "value_type") and isinstance(schema.get("additionalProperties"), dict):
        yield node.value_type, schema["additionalProperties"]
    elif hasattr(node, "fields"):
        named, placed = schema.get("properties", {}), schema.get("prefixItems", ())
        for field, place in zip(reversed(node.fields), range(1, len(node.fields) + 1), strict=True):
            yield field.type, named[field.encode_name] if named else placed[-place]


def _options(
    union: inspect.UnionType, schema: dict[str, Any]
) -> Iterator[tuple[inspect.Type, dict[str, Any]]]:
    """The types of a union: those that a tag tells apart come after the others, and null is the last."""
    members = [_bare(member) for member in union.types]
    tagged = [m for m in members if isinstance(m, inspect.StructType) and not m.array_like]
    others = [m for m in members if m not in tagged and not isinstance(m, inspect.NoneType)]
    described: list[dict[str, Any]] = []
    for option in schema.get("anyOf", ()):
        described += option["anyOf"] if "discriminator" in option else [option]
    yield from zip([*others, *tagged], described, strict=False)


def _bare(node: inspect.Type) -> inspect.Type:
    while isinstance(node, inspect.Metadata):
        node = node.type
    return node


def _text(node: inspect.Type) -> str | None:
    """What a text is read as, if it is not taken as it is."""
    match node:
        case inspect.DateTimeType(tz=tz):
            return "datetime" + _zone(tz)
        case inspect.TimeType(tz=tz):
            return "time" + _zone(tz)
        case inspect.DateType():
            return "date"
        case inspect.TimeDeltaType():
            return "duration"
        case inspect.UUIDType():
            return "uuid"
        case inspect.DecimalType():
            return "decimal"
        case inspect.BytesType() | inspect.ByteArrayType() | inspect.MemoryViewType():
            return "base64"
    return None


def _zone(tz: bool | None) -> str:
    return "" if tz is None else "-aware" if tz else "-naive"


def _key(node: Any) -> str | None:
    """What the names of the fields of a mapping are read as, if they are not taken as they are."""
    if not hasattr(node, "key_type"):
        return None
    key = _bare(node.key_type)
    if isinstance(key, inspect.IntType):
        return "int"
    return "float" if isinstance(key, inspect.FloatType) else _text(key)
