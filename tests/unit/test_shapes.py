"""Answers against schemas: what fits, what does not and where, and what a schema may not ask for."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema_rs
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from flowstead.rules import shapes
from flowstead.rules.shapes import Shapes, schema_of

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_4 = "http://json-schema.org/draft-04/schema#"


def raw(value: Any) -> Raw:
    return Raw(json.dumps(value).encode())


def check(schema: Any, payload: Any) -> str | None:
    return Shapes().check(raw(schema), raw(payload))


INVOICE = {
    "type": "object",
    "required": ["items"],
    "properties": {
        "items": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["total"],
                "properties": {"total": {"type": "number", "minimum": 0}, "note": {"maxLength": 3}},
                "additionalProperties": False,
            },
        }
    },
}


@pytest.mark.parametrize(
    "payload",
    [
        {"items": [{"total": 1}]},
        {"items": [{"total": 0.5, "note": "abc"}], "more": [1]},
        {"items": [{"total": 10**30}]},
    ],
)
def test_what_fits_is_answered_with_nothing(payload: Any) -> None:
    assert check(INVOICE, payload) is None


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (
            {"items": [{"total": 1}] * 3 + [{"total": "x"}]},
            'payload["items"][3]["total"] must be a number.',
        ),
        ({"items": [{"total": -1}]}, 'payload["items"][0]["total"] must be at least 0.'),
        ({"items": [{}]}, 'payload["items"][0] must have the field "total".'),
        ({"items": [{"total": 1, "x": 1}]}, 'payload["items"][0] must not have the field "x".'),
        (
            {"items": [{"total": 1, "note": "long"}]},
            'payload["items"][0]["note"] must have at most 3 characters.',
        ),
        ({"items": []}, 'payload["items"] must have at least 1 item.'),
        ({}, 'payload must have the field "items".'),
        ([], "payload must be an object."),
        (None, "payload must be an object."),
    ],
)
def test_what_does_not_fit_is_told_with_its_path(payload: Any, says: str) -> None:
    assert check(INVOICE, payload) == says


SENTENCES: list[tuple[Any, Any, str]] = [
    ({"type": "integer"}, 1.5, "must be an integer."),
    ({"type": ["null", "string"]}, 1, "must be a string or null."),
    ({"type": ["array", "boolean", "object"]}, 1, "must be a list, true or false or an object."),
    ({"enum": ["a", 1, None]}, 2, 'must be one of "a", 1, null.'),
    ({"enum": ["a"]}, 2, 'must be "a".'),
    ({"enum": list(range(30))}, "a", "must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...."),
    ({"const": {"b": 1, "a": [2]}}, 2, 'must be {"a":[2],"b":1}.'),
    ({"maximum": 2}, 3, "must be at most 2."),
    ({"exclusiveMinimum": 2.5}, 2, "must be greater than 2.5."),
    ({"exclusiveMaximum": 2}, 2, "must be less than 2."),
    ({"$schema": DRAFT_4, "minimum": 2, "exclusiveMinimum": True}, 2, "must be greater than 2."),
    ({"multipleOf": 2}, 3, "must be a multiple of 2."),
    ({"minLength": 2}, "a", "must have at least 2 characters."),
    ({"minLength": 1}, "", "must have at least 1 character."),
    ({"pattern": '^"\\d+"$'}, "a", 'must match the pattern "^\\"\\\\d+\\"$".'),
    ({"maxItems": 1}, [1, 2], "must have at most 1 item."),
    ({"uniqueItems": True}, [1, 2, 1], "must not have the same item twice."),
    (
        {"contains": {"type": "string"}},
        [1],
        "has too few or too many of the items that it must contain.",
    ),
    (
        {"$schema": DRAFT_7, "items": [{}], "additionalItems": False},
        [1, 2],
        "must have at most 1 item.",
    ),
    ({"prefixItems": [{}], "unevaluatedItems": False}, [1, 2], "must not have as many items."),
    ({"minProperties": 2}, {"a": 1}, "must have at least 2 fields."),
    ({"maxProperties": 1}, {"a": 1, "b": 2}, "must have at most 1 field."),
    (
        {"propertyNames": {"maxLength": 1}},
        {"ab": 1},
        "has a field whose name must have at most 1 character.",
    ),
    (
        {"unevaluatedProperties": False, "properties": {"b": {}}},
        {"a": 1},
        'must not have the field "a".',
    ),
    ({"additionalProperties": False}, {"a": 1}, "must not have any fields."),
    ({"dependentRequired": {"a": ["b"]}}, {"a": 1}, 'must have the field "b".'),
    ({"not": {"type": "string"}}, "a", "must not fit the shape that is excluded here."),
    ({"oneOf": [{"minimum": 1}, {"minimum": 2}]}, 3, "must fit one shape only, and fits several."),
    ({"if": {"type": "string"}, "then": {"maxLength": 1}}, "ab", "must have at most 1 character."),
    (False, 1, "must not be there."),
    ({"$schema": DRAFT_7, "contentEncoding": "base64"}, "%", 'must be encoded in "base64".'),
    (
        {"$schema": DRAFT_7, "contentMediaType": "application/json"},
        "{",
        'must be "application/json".',
    ),
]


@pytest.mark.parametrize(("schema", "payload", "says"), SENTENCES, ids=lambda v: None)
def test_each_sort_of_misfit_has_a_sentence(schema: Any, payload: Any, says: str) -> None:
    assert check(schema, payload) == f"payload {says}"


def test_no_answer_is_checked_as_null() -> None:
    keeper = Shapes()

    assert keeper.check(raw({"type": "null"}), UNSET) is None
    assert keeper.check(raw({"type": "string"}), UNSET) == "payload must be a string."


@pytest.mark.parametrize(
    "payload", [b"", b"{", b'{"a":1}x', b"nan", b"1e999", b'"\\ud800"', b"\xff"]
)
def test_what_is_no_json_does_not_fit(payload: bytes) -> None:
    assert Shapes().check(raw(True), Raw(payload)) is not None


def test_a_payload_deeper_than_can_be_checked_does_not_fit() -> None:
    deep = Raw(b"[" * 50_000 + b"]" * 50_000)

    assert Shapes().check(raw({"items": {"$ref": "#"}}), deep) is not None


def test_a_payload_as_deep_as_flows_may_hold_is_checked_to_the_bottom() -> None:
    schema = {"type": ["array", "string"], "items": {"$ref": "#"}}
    fits, misfit = Raw(b"[" * 99 + b'"x"' + b"]" * 99), Raw(b"[" * 99 + b"1" + b"]" * 99)

    keeper = Shapes()

    assert keeper.check(raw(schema), fits) is None
    says = keeper.check(raw(schema), misfit)
    assert says is not None and says.endswith("[0] must be a list or a string.")


# Unions


class Get(msgspec.Struct, tag=True):
    key: str


class Put(msgspec.Struct, tag=True):
    key: str
    value: int | None


class Tree(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    children: list[Tree] = []
    color: Literal["red", "green"] | None = None


class Answer(msgspec.Struct):
    op: Get | Put
    tree: Tree | None = None


GET = {"type": "Get", "key": "k"}


@pytest.mark.parametrize(
    "payload",
    [
        {"op": GET},
        {"op": {"type": "Put", "key": "k", "value": None}, "tree": {"name": "a"}},
        {"op": GET, "tree": {"name": "a", "children": [{"name": "b", "color": "red"}]}},
    ],
)
def test_the_schema_of_a_type_takes_what_the_type_takes(payload: Any) -> None:
    assert check(schema_of(Answer), payload) is None
    assert msgspec.convert(payload, Answer)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"op": GET | {"key": 1}}, 'payload["op"]["key"] must be a string.'),
        (
            {"op": {"type": "Put", "key": "k", "value": "v"}},
            'payload["op"]["value"] must be an integer or null.',
        ),
        ({"op": {"type": "Del", "key": "k"}}, 'payload["op"]["type"] must be one of "Get", "Put".'),
        ({"op": {"key": "k"}}, 'payload["op"] must have the field "type".'),
        ({"op": 1}, 'payload["op"] must be an object.'),
        ({"op": GET, "tree": 1}, 'payload["tree"] must be an object or null.'),
        ({"op": GET, "tree": {}}, 'payload["tree"] must have the field "name".'),
        (
            {"op": GET, "tree": {"name": "a", "x": 1}},
            'payload["tree"] must not have the field "x".',
        ),
        (
            {"op": GET, "tree": {"name": "a", "children": [{"name": "b"}, {"name": 2}]}},
            'payload["tree"]["children"][1]["name"] must be a string.',
        ),
        (
            {"op": GET, "tree": {"name": "a", "color": "blue"}},
            'payload["tree"]["color"] must be one of "green", "red" or null.',
        ),
    ],
)
def test_of_a_union_the_branch_that_was_meant_says_what_is_wrong(payload: Any, says: str) -> None:
    assert check(schema_of(Answer), payload) == says
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(payload, Answer)


@pytest.mark.parametrize("turned", [False, True])
def test_without_a_tag_the_branch_that_fits_deepest_and_then_best_is_the_one_meant(
    turned: bool,
) -> None:
    file = {"required": ["path"], "properties": {"path": {"type": "string"}}}
    link = {"required": ["url", "title"], "properties": {"url": {"type": "string"}}}
    schema = {"anyOf": [link, file] if turned else [file, link]}

    assert check(schema, {"path": 1}) == 'payload["path"] must be a string.'
    assert check(schema, {"other": 1}) == 'payload must have the field "path".'


def test_a_large_misfit_of_a_union_is_not_gone_through_branch_by_branch() -> None:
    schema = {"properties": {"a": {"anyOf": [{"items": {"type": "string"}}, {"type": "null"}]}}}
    small, large = {"a": [1] * 100}, {"a": [1] * shapes.MAX_EXPLAINED}

    assert check(schema, small) == 'payload["a"][0] must be a string.'
    assert check(schema, large) == "payload does not fit the schema; it is too large to say where."
    assert check(schema, {"a": ["x"] * shapes.MAX_EXPLAINED}) is None


# What is said is bounded, and always the same


def test_a_long_value_or_path_or_name_never_makes_a_long_sentence() -> None:
    long, deep = "x" * 100_000, {"a": 1}
    for _ in range(60):
        deep = {"key \n\u202e" + "k" * 50: deep}
    nested: Any = {"additionalProperties": {"$ref": "#"}, "not": {"required": ["a"]}}
    cases = [
        ({"type": "integer"}, long),
        ({"enum": [long, long + "y"] * 20}, 1),
        ({"const": [long]}, 1),
        ({"required": [long]}, {}),
        ({"properties": {"a": {}}, "additionalProperties": False}, {long: 1}),
        ({"pattern": "a" * 1_000}, long),
        ({"properties": {long: {"type": "string"}}}, {long: 1}),
        (nested, deep),
    ]

    for schema, payload in cases:
        says = check(schema, payload)

        assert says is not None
        assert len(says) <= 300
        assert says.isprintable()
        assert "x" * 90 not in says


def test_a_value_is_never_quoted() -> None:
    for schema, _, _ in SENTENCES:
        for payload in ("s3cret", 53263, ["s3cret"], {"k": "s3cret"}, {"k": 53263}):
            says = check(schema, payload) or ""
            assert "s3cret" not in says and "53263" not in says


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)


def schemas(inner: st.SearchStrategy[Any] | None) -> st.SearchStrategy[Any]:
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(["object", "array", "string", "integer", ["null", "number"]]),
        "enum": st.lists(json_values, min_size=1, max_size=2),
        "minimum": st.integers(-2, 2),
        "required": st.lists(st.sampled_from("abc"), unique=True, max_size=2),
        "minItems": st.integers(0, 2),
        "additionalProperties": st.booleans(),
    }
    if inner is not None:
        keywords |= {
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            "items": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
        }
    chosen = st.lists(st.sampled_from(sorted(keywords)), unique=True, min_size=1, max_size=3)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({n: keywords[n] for n in names}))


def test_a_payload_fits_exactly_when_the_library_says_so_and_the_sentence_is_always_the_same() -> (
    None
):
    fitted, sentences = 0, set()

    @given(schemas(schemas(schemas(None))), json_values)
    @settings(PROFILE, max_examples=300)
    def run(schema: Any, payload: Any) -> None:
        nonlocal fitted
        says = check(schema, payload)

        assert (says is None) == jsonschema_rs.is_valid(schema, payload)
        assert check(schema, payload) == says
        fitted += says is None
        if says is not None:
            assert says.startswith("payload") and says.endswith(".") and len(says) <= 300
            sentences.add(says)

    run()

    assert fitted > 30
    assert len(sentences) > 30


# What a schema may not ask for


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that would notice anybody who came to fetch something."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        yield server


@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef", "$schema"])
def test_a_reference_to_another_document_is_refused_and_nothing_is_fetched(
    keyword: str, listener: socket.socket
) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/shape.json"

    with pytest.raises(ValueError, match="schema") as raised:
        Shapes().compile(raw({keyword: url}))

    assert url in str(raised.value)
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_the_sentence_about_a_reference_says_that_nothing_is_fetched() -> None:
    schema = {"properties": {"a": {"$ref": "http://example.com/shape.json"}}}

    with pytest.raises(ValueError, match="schema") as raised:
        Shapes().compile(raw(schema))

    assert str(raised.value) == (
        'schema refers to "http://example.com/shape.json", which is not in it; nothing is fetched.'
    )


def test_a_reference_to_a_file_is_refused(tmp_path: Any) -> None:
    there = tmp_path / "shape.json"
    there.write_text("{}")

    with pytest.raises(ValueError, match="nothing is fetched"):
        Shapes().compile(raw({"$ref": there.as_uri()}))
    with pytest.raises(ValueError, match="nothing is fetched"):
        Shapes().compile(raw({"$ref": "shape.json"}))


def test_the_published_schemas_of_json_schema_may_be_referred_to() -> None:
    schema = {"$ref": "https://json-schema.org/draft/2020-12/schema"}

    assert check(schema, {"minimum": 1}) is None
    assert check(schema, {"minimum": "x"}) == 'payload["minimum"] must be a number.'


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "text"}, 'schema["type"] must be one of'),
        (
            {"properties": {"a": {"minimum": "1"}}},
            'schema["properties"]["a"]["minimum"] must be a number.',
        ),
        ({"required": "a"}, 'schema["required"] must be a list.'),
        (3, "schema must be true or false or an object."),
        ([], "schema must be true or false or an object."),
        ({"$ref": "#/$defs/none"}, "schema cannot be used: "),
        ({"pattern": "("}, 'schema["pattern"] must be a regular expression'),
        (
            {"pattern": "(?=a)"},
            'schema["pattern"] must be a regular expression without look-around',
        ),
        (
            {"pattern": r"(a)\1"},
            'schema["pattern"] must be a regular expression without look-around',
        ),
        ({"pattern": "((a{1000}){1000}){1000}"}, 'schema["pattern"] must be a regular expression'),
        ({"patternProperties": {"(?<!a)": {}}}, 'schema["patternProperties"]["(?<!a)"] must be a'),
    ],
)
def test_what_is_no_schema_is_refused_with_its_path(schema: Any, says: str) -> None:
    with pytest.raises(ValueError, match="schema") as raised:
        Shapes().compile(raw(schema))

    assert str(raised.value).startswith(says)
    assert len(str(raised.value)) <= 300
    with pytest.raises(ValueError, match="schema"):
        Shapes().check(raw(schema), raw(1))


@pytest.mark.parametrize(
    "schema", [b"", b"{", b"[" * 50_000, b'{"items":' * 300 + b"{}" + b"}" * 300]
)
def test_what_cannot_even_be_read_as_a_schema_is_refused(schema: bytes) -> None:
    with pytest.raises(ValueError, match="schema is not JSON, or nested too deep to be used"):
        Shapes().compile(Raw(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"not": {"$ref": "#"}},
        {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
        {"$dynamicRef": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_schema_that_refers_to_itself_without_end_comes_to_an_end(schema: Any) -> None:
    says = check(schema, [[1]])

    assert says is None or says.startswith("payload ")


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "^(a|aa)+$", "(x+x+)+y"])
def test_a_pattern_that_traps_other_engines_runs_over_a_long_text(pattern: str) -> None:
    # An engine that backtracks would not come back from these within anybody's life.
    assert check({"pattern": pattern}, "a" * 100_000 + "!") is not None


@pytest.mark.parametrize("draft", [None, DRAFT_7, DRAFT_4])
def test_a_format_refuses_nothing(draft: str | None) -> None:
    given = {} if draft is None else {"$schema": draft}

    for name in ("email", "date-time", "uuid", "regex", "uri", "made-up"):
        assert check(given | {"format": name}, "((( none of these") is None


# Keeping


def test_a_schema_is_made_ready_once_and_the_ones_used_last_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[bytes] = []
    compile_ = shapes._compile

    def counting(schema: bytes) -> Any:
        made.append(schema)
        return compile_(schema)

    monkeypatch.setattr(shapes, "_compile", counting)
    keeper = Shapes(keep=2)
    a, b, c = (raw({"minimum": n}) for n in range(3))

    for schema in (a, b, a, c, a):
        keeper.check(schema, raw(5))

    assert made == [bytes(a), bytes(b), bytes(c)]
    keeper.check(b, raw(5))
    assert made == [bytes(a), bytes(b), bytes(c), bytes(b)]
    assert len(keeper._ready) == 2


def test_a_schema_that_is_refused_is_not_kept() -> None:
    keeper = Shapes()
    for _ in range(2):
        with pytest.raises(ValueError, match="schema"):
            keeper.compile(raw({"type": "text"}))

    assert keeper._ready == {}


# Shapes as they are given


def test_a_dict_is_taken_as_json_schema_and_shares_nothing_with_what_is_answered() -> None:
    schema = {"type": "object", "required": ["a"]}

    taken = schema_of(schema)

    assert taken == schema
    taken["required"].append("b")
    assert schema["required"] == ["a"]


@pytest.mark.parametrize(
    "shape",
    [int, str, list[int], int | None, Literal["a", "b"], dict[str, Get], Answer, Any],
)
def test_a_type_is_taken_as_the_schema_that_msgspec_makes_of_it(shape: Any) -> None:
    assert schema_of(shape) == json.loads(json.dumps(msgspec.json.schema(shape)))


@pytest.mark.parametrize(
    "shape", [None, 3, "int", b"{}", object(), len, complex, object, [int], Get("a"), lambda: 1]
)
def test_anything_else_is_no_shape(shape: Any) -> None:
    with pytest.raises(TypeError, match="schema= must be a JSON Schema as a dict, or a type that"):
        schema_of(shape)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"type": "text"}, 'schema["type"] must be one of'),
        ({"enum": {1, 2}}, "schema['enum'] is of type set, which is not a JSON value."),
        ({1: 2}, "schema has a key of type int"),
        ({"const": float("nan")}, "schema['const'] is nan"),
    ],
)
def test_a_dict_that_is_no_schema_is_refused_with_its_path(shape: Any, says: str) -> None:
    with pytest.raises(ValueError, match="schema") as raised:
        schema_of(shape)

    assert str(raised.value).startswith(says)
    assert "written" not in str(raised.value)


def test_without_the_library_a_schema_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)

    for ask in (lambda: Shapes().compile(raw({})), lambda: schema_of({}), lambda: schema_of(int)):
        with pytest.raises(ImportError) as raised:
            ask()
        assert str(raised.value) == (
            "schema= needs jsonschema-rs: pip install 'flowstead[schema]'."
        )
