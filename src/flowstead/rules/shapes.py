"""Shapes: whether an answer fits the JSON Schema that was asked for, and where it does not.

Nothing is fetched: a schema is whole in itself. Patterns run in linear time, whatever text they meet, and `format`
is a note to readers that refuses nothing; what a type reads from a text has a keyword of its own. What is wrong is
said in one sentence with the path of the first value that does not fit; the value itself is never quoted, as it may
be long, or nobody's business.

The checking is done by jsonschema-rs, which is asked for only when somebody gives a schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.command import Defect
from flowstead.rules import type_schemas
from flowstead.rules.user_json import encode_json

if TYPE_CHECKING:
    from jsonschema_rs import ValidationError, Validator

_Path: TypeAlias = "Sequence[str | int]"
_Branch: TypeAlias = "Sequence[ValidationError]"

MISSING: Final = "schema= needs jsonschema-rs: pip install 'flowstead[schema]'."

NOT_A_SHAPE: Final = (
    "schema= must be a JSON Schema as a dict, or a type that msgspec can describe as one."
)

MAX_VALUE: Final = 80
"""Longest value of a schema, or name of a field, in a sentence."""
MAX_PATH: Final = 160
MAX_SENTENCE: Final = 300

MAX_SCHEMA_BYTES: Final = 1024 * 1024
MAX_SCHEMA_DEPTH: Final = 100

MAX_EXPLAINED: Final = 16 * 1024
"""Largest payload for which every branch of a union is gone through to say what is wrong with it."""


class Shapes:
    """Check answers, keeping the schemas used last ready.

    Made for one event loop: nothing here awaits, hence no lock.
    """

    def __init__(self, keep: int = 128) -> None:
        self._keep = keep
        self._ready: dict[bytes, _Shape] = {}

    def compile(self, schema: Raw) -> None:
        """Make a schema ready.

        Raises:
            ValueError: It is no schema, refers to another document, or has a pattern that cannot run in linear
                time; with the path.
            ImportError: jsonschema-rs is not installed.
        """
        self._shape(schema)

    def check(self, schema: Raw, payload: Raw | UnsetType) -> str | None:
        """Answer None if the payload fits, else one sentence that says where it does not.

        No payload counts as null. Raises as `compile` does.
        """
        return self._shape(schema).check(b"null" if payload is UNSET else payload)

    def _shape(self, schema: Raw) -> _Shape:
        key = bytes(schema)
        shape = self._ready.pop(key, None) or _compile(key)
        self._ready[key] = shape
        while len(self._ready) > self._keep:
            del self._ready[next(iter(self._ready))]
        return shape


def schema_of(shape: object) -> dict[str, Any]:
    """Answer the JSON Schema of a shape: of a type what msgspec makes of it, of a dict the dict.

    Raises:
        TypeError: It is neither.
        ValueError: The dict is no JSON Schema, or cannot be used; with the path.
        ImportError: jsonschema-rs is not installed.
    """
    schema = shape if isinstance(shape, dict) else _schema_of_type(shape)
    encoded = encode_json(
        schema, name="schema", max_bytes=MAX_SCHEMA_BYTES, max_depth=MAX_SCHEMA_DEPTH
    )
    if isinstance(encoded, Defect):
        raise ValueError(encoded.reason.removesuffix(" Nothing was written."))
    _compile(bytes(encoded))
    fresh: dict[str, Any] = msgspec.json.decode(encoded)
    return fresh


def _schema_of_type(shape: object) -> dict[str, Any]:
    if isinstance(shape, (str, bytes)) or shape is None:
        raise TypeError(NOT_A_SHAPE)
    try:
        return type_schemas.schema_of_type(shape)
    except TypeError as error:
        raise TypeError(NOT_A_SHAPE) from error


# Compiling


class _Shape:
    def __init__(self, validator: Validator, branches: bool) -> None:
        self._validator = validator
        self._branches = branches

    def check(self, payload: Raw | bytes) -> str | None:
        from jsonschema_rs import ValidationError

        try:
            value = msgspec.json.decode(payload)
            if self._validator.is_valid(value):
                return None
            if self._branches and len(bytes(payload)) > MAX_EXPLAINED:
                return "payload does not fit the schema; it is too large to say where."
            self._validator.validate(value)
        except ValidationError as error:
            return _sentence(error, "payload")
        except (ValueError, RecursionError):
            return "payload is not JSON, or nested too deep to be checked."
        return "payload does not fit the schema."


def _compile(schema: bytes) -> _Shape:
    """Make one schema ready, or raise with what is wrong with it."""
    try:
        import jsonschema_rs
    except ImportError as error:
        raise ImportError(MISSING, name="jsonschema_rs") from error
    wanted: list[str] = []

    def refuse(uri: str) -> Any:
        wanted.append(uri)
        raise LookupError("nothing is fetched")

    try:
        value = msgspec.json.decode(schema)
        validator = jsonschema_rs.validator_for(
            value,
            validate_formats=False,
            keywords={type_schemas.KEYWORD: type_schemas.Text},
            retriever=refuse,
            pattern_options=jsonschema_rs.RegexOptions(),
        )
    except jsonschema_rs.ValidationError as error:
        if wanted:
            problem = (
                f"schema refers to {_shown(wanted[0])}, which is not in it; nothing is fetched."
            )
        else:
            problem = _sentence(error, "schema")
        raise ValueError(problem) from None
    except (ValueError, RecursionError):
        raise ValueError("schema is not JSON, or nested too deep to be used.") from None
    plain = msgspec.json.encode(value)
    return _Shape(validator, b'"anyOf"' in plain or b'"oneOf"' in plain)


# Sentences


def _sentence(error: ValidationError, root: str) -> str:
    """What is wrong, and where: one line, of bounded length, the same for the same error."""
    path, problem = _explain(error)
    return f"{_path(path, root)} {_cut(problem, MAX_SENTENCE - MAX_PATH - 2)}."


def _explain(error: ValidationError) -> tuple[_Path, str]:
    """Of a value that fits no branch of a union, what is wrong with the branch that was meant."""
    base = len(error.instance_path)
    branches = [branch for branch in getattr(error.kind, "context", ()) if branch]
    if not branches:
        return error.instance_path, _problem(error)
    nearest = min(_distance(branch, base) for branch in branches)
    meant = [branch for branch in branches if _distance(branch, base) == nearest]
    if nearest == _OTHER_SORT:
        sorts = [error for branch in branches for error in branch if _is_sort(error, base)]
        return error.instance_path, _no_sort(sorts)
    if nearest == _OTHER_TAG:
        tags = [tag for branch in meant for tag in branch if _is_choice(tag, base + 1)]
        path = tags[0].instance_path
        return path, _one_of([o for tag in tags if tag.instance_path == path for o in _choice(tag)])
    return _explain(min(meant, key=_misfit)[0])


_SAME_TAG, _OTHER_TAG, _OTHER_SORT = range(3)


def _distance(branch: _Branch, base: int) -> int:
    """How far a value is from a branch: of another sort, with another tag, or meant for it and wrong within."""
    if any(_is_sort(error, base) for error in branch):
        return _OTHER_SORT
    return _OTHER_TAG if any(_is_choice(error, base + 1) for error in branch) else _SAME_TAG


def _misfit(branch: _Branch) -> tuple[int, int]:
    """Prefer the branch whose errors lie deepest, then the one with the fewest."""
    return -min(len(error.instance_path) for error in branch), len(branch)


def _no_sort(errors: Sequence[ValidationError]) -> str:
    """What a value must be that no branch is about."""
    types = [name for error in errors for name in _types(error)]
    options = [option for error in errors if _kind(error) in _CHOICES for option in _choice(error)]
    if not options:
        return _of_type(types) if types else _PLAIN["AnyOf"]
    return f"{_one_of(options)} or {_listed(types)}" if types else _one_of(options)


def _is_sort(error: ValidationError, depth: int) -> bool:
    return _kind(error) in _SORTS and len(error.instance_path) == depth


def _is_choice(error: ValidationError, depth: int) -> bool:
    return _kind(error) in _CHOICES and len(error.instance_path) == depth


def _kind(error: ValidationError) -> str:
    """What sort of error it is, by the class that the library has for it."""
    return type(error.kind).__name__.removeprefix("ValidationErrorKind_")


_CHOICES: Final = frozenset({"Enum", "Constant"})
_SORTS: Final = _CHOICES | {"Type", "FalseSchema"}


def _problem(error: ValidationError) -> str:
    kind = _kind(error)
    if kind in _CHOICES:
        return _one_of(_choice(error))
    if kind in _WITH_FACT:
        fact, sentence = _WITH_FACT[kind]
        return sentence(getattr(error.kind, fact))
    if kind == "FalseSchema" and error.schema_path and error.schema_path[-1] in _OF_FIELDS:
        return "must not have any fields"
    if kind in _PLAIN:
        return _PLAIN[kind]
    return f"does not fit {_shown(error.schema_path[-1]) if error.schema_path else 'the schema'}"


def _types(error: ValidationError) -> list[str]:
    names: list[str] = getattr(error.kind, "types", [])
    return names


def _choice(error: ValidationError) -> list[Any]:
    """What a value may be, of an `enum` or a `const`."""
    if _kind(error) == "Constant":
        return [getattr(error.kind, "expected_value", None)]
    options: list[Any] = getattr(error.kind, "options", [])
    return options


def _one_of(options: Sequence[Any]) -> str:
    shown = list(dict.fromkeys(_shown(option) for option in options[:_MOST_OPTIONS]))
    if len(shown) == 1 and len(options) <= _MOST_OPTIONS:
        return f"must be {shown[0]}"
    more = ", ..." if len(options) > _MOST_OPTIONS else ""
    return f"must be one of {', '.join(shown)}{more}"


def _of_type(names: Sequence[str]) -> str:
    return f"must be {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    """Types as people say them; null reads best at the end."""
    words = [_TYPES.get(name, name) for name in sorted(set(names), key=lambda n: (n == "null", n))]
    listed = ", ".join(words[:-1])
    return f"{listed} or {words[-1]}" if listed else words[-1]


_OF_FIELDS: Final = frozenset({"additionalProperties", "propertyNames", "unevaluatedProperties"})

_MOST_OPTIONS: Final = 10

_TYPES: Final = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}

_PLAIN: Final = {
    "AnyOf": "must fit one of the shapes that are allowed here",
    "Contains": "has too few or too many of the items that it must contain",
    "FalseSchema": "must not be there",
    "Not": "must not fit the shape that is excluded here",
    "OneOfMultipleValid": "must fit one shape only, and fits several",
    "OneOfNotValid": "must fit one of the shapes that are allowed here",
    "UnevaluatedItems": "must not have as many items",
    "UniqueItems": "must not have the same item twice",
}


def _at_least(what: str) -> Callable[[int], str]:
    return lambda limit: f"must have at least {limit} {what}{'' if limit == 1 else 's'}"


def _at_most(what: str) -> Callable[[int], str]:
    return lambda limit: f"must have at most {limit} {what}{'' if limit == 1 else 's'}"


def _no_field(names: Sequence[str]) -> str:
    return f"must not have the field {_shown(names[0])}"


def _of_format(name: str) -> str:
    if name == "regex":
        # Only a schema can be wrong about this one.
        return "must be a regular expression without look-around and back-references, and not too large"
    return f"must be of the format {_shown(name)}"


_WITH_FACT: Final[dict[str, tuple[str, Callable[[Any], str]]]] = {
    "AdditionalItems": ("limit", _at_most("item")),
    "AdditionalProperties": ("unexpected", _no_field),
    "ContentEncoding": ("content_encoding", lambda name: f"must be encoded in {_shown(name)}"),
    "ContentMediaType": ("content_media_type", lambda name: f"must be {_shown(name)}"),
    "Custom": ("message", str),
    "ExclusiveMaximum": ("limit", lambda limit: f"must be less than {_shown(limit)}"),
    "ExclusiveMinimum": ("limit", lambda limit: f"must be greater than {_shown(limit)}"),
    "Format": ("format", _of_format),
    "MaxItems": ("limit", _at_most("item")),
    "MaxLength": ("limit", _at_most("character")),
    "MaxProperties": ("limit", _at_most("field")),
    "Maximum": ("limit", lambda limit: f"must be at most {_shown(limit)}"),
    "MinItems": ("limit", _at_least("item")),
    "MinLength": ("limit", _at_least("character")),
    "MinProperties": ("limit", _at_least("field")),
    "Minimum": ("limit", lambda limit: f"must be at least {_shown(limit)}"),
    "MultipleOf": ("multiple_of", lambda factor: f"must be a multiple of {_shown(factor)}"),
    "Pattern": ("pattern", lambda pattern: f"must match the pattern {_shown(pattern)}"),
    "PropertyNames": ("error", lambda inner: f"has a field whose name {_problem(inner)}"),
    "Referencing": ("error", lambda inner: f"cannot be used: {_one_line(str(inner))}"),
    "Required": ("property", lambda name: f"must have the field {_shown(name)}"),
    "Type": ("types", _of_type),
    "UnevaluatedProperties": ("unexpected", _no_field),
}


def _path(parts: _Path, root: str) -> str:
    """Where a value is, as code would say it: `payload["items"][3]["total"]`. A long one lacks its middle."""
    path = root + "".join(f"[{_shown(part)}]" for part in parts)
    if len(path) <= MAX_PATH:
        return path
    half = (MAX_PATH - 3) // 2
    return f"{path[:half]}...{path[-half:]}"


def _shown(value: Any) -> str:
    """A part of a schema, or the name of a field, as JSON: short, and of characters that can be seen."""
    text = msgspec.json.encode(value, order="deterministic").decode()
    return _cut(_one_line(text[: MAX_VALUE + 1]), MAX_VALUE)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
