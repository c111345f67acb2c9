"""Misuse is told apart at the door: the right exception, naming the argument, before anything is queued."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from flowstead import arguments
from flowstead.model.flow import FlowStatus, NotifyPolicy
from flowstead.model.retry import Retry
from flowstead.model.task import TaskStatus, TerminalOutcome

PROFILE = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
NOT_TEXT = [None, 7, 1.5, True, b"bytes", ["list"], {"a": 1}, object(), UNSET]
BLANK = ["", " ", "\t\n", "\u2003\u00a0"]


class Nothing:
    """No kind of argument."""

    def __repr__(self) -> str:
        return "x" * 10_000_000


# ---- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NOT_TEXT, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "check", [arguments.text, arguments.identifier, arguments.instruction, arguments.lookup]
)
def test_what_is_no_string_is_a_type_error_that_names_argument_and_type(
    check: Callable[[Any, str], Any], value: Any
) -> None:
    with pytest.raises(TypeError, match=r"^goal must be a string, not \w+\.$"):
        check(value, "goal")


@pytest.mark.parametrize("value", BLANK, ids=ascii)
@pytest.mark.parametrize("check", [arguments.text, arguments.identifier, arguments.instruction])
def test_a_blank_text_is_refused(check: Callable[[Any, str], Any], value: str) -> None:
    with pytest.raises(ValueError, match=r"^goal must not be blank\.$"):
        check(value, "goal")


def test_a_blank_text_is_refused_with_the_callers_own_sentence() -> None:
    with pytest.raises(ValueError, match=r"^Managed flow controllerId is required\.$"):
        arguments.text(" ", "controller_id", missing="Managed flow controllerId is required.")


@pytest.mark.parametrize("value", ["  goal ", "goal\n", "goal"])
def test_a_text_is_trimmed(value: str) -> None:
    assert arguments.text(value, "goal") == "goal"


@pytest.mark.parametrize("value", ["\ud800", "fine \udfff", "\ud83d half an emoji"])
@pytest.mark.parametrize("check", [arguments.text, arguments.identifier, arguments.instruction])
def test_a_text_with_a_lone_surrogate_is_refused(
    check: Callable[[Any, str], Any], value: str
) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        check(value, "goal")


@pytest.mark.parametrize(
    ("check", "longest"), [(arguments.text, 4096), (arguments.instruction, 256 * 1024)]
)
def test_the_length_of_a_text_is_counted_in_bytes(
    check: Callable[[Any, str], Any], longest: int
) -> None:
    assert check("x" * longest, "goal")
    assert check("é" * (longest // 2), "goal")
    with pytest.raises(ValueError, match=f"goal is longer than {longest} bytes"):
        check("x" * (longest + 1), "goal")
    with pytest.raises(ValueError, match=f"goal is longer than {longest} bytes"):
        check("é" * (longest // 2 + 1), "goal")


def test_an_optional_text_may_be_none_or_blank_and_is_then_none() -> None:
    for value in (None, *BLANK):
        assert arguments.optional_text(value, "label") is None
    assert arguments.optional_text(" a ", "label") == "a"
    for wrong in (7, False, b"", [], UNSET):
        with pytest.raises(TypeError, match="label"):
            arguments.optional_text(wrong, "label")


def test_a_patched_text_tells_leaving_alone_from_clearing() -> None:
    assert arguments.patched_text(UNSET, "current_step") is UNSET
    assert arguments.patched_text(None, "current_step") is None
    assert arguments.patched_text("", "current_step") is None
    assert arguments.patched_text("send", "current_step") == "send"


@pytest.mark.parametrize("value", ["a\nb", "a\x00b", "a\x1bb", "x" * 257, "a\u202eb"], ids=ascii)
def test_an_identifier_is_printable_and_short(value: str) -> None:
    with pytest.raises(ValueError, match="flow_id must be printable and at most 256"):
        arguments.identifier(value, "flow_id")


def test_an_identifier_may_hold_any_printable_text() -> None:
    for value in ("x" * 256, "é漢字", "a b", "my-plugin/inbox-triage:1", "😀"):
        assert arguments.identifier(value, "flow_id") == value


def test_an_id_no_store_could_hold_is_looked_for_nowhere() -> None:
    assert arguments.lookup("", "flow_id") is None
    assert arguments.lookup("\ud800", "flow_id") is None
    assert arguments.lookup(" a ", "flow_id") == " a "


@pytest.mark.parametrize(
    "value", ["a\u0301", "\u212b", "agent\n:main", "x" * 513, "é" * 257, "a\x00"], ids=ascii
)
def test_an_owner_has_one_spelling_only(value: str) -> None:
    with pytest.raises(ValueError, match="session_key"):
        arguments.owner_key(value, "TaskFlow runtime requires a bound sessionKey.")


def test_a_blank_owner_is_refused_with_its_own_sentence() -> None:
    with pytest.raises(ValueError, match=r"^TaskFlow runtime requires a bound sessionKey\.$"):
        arguments.owner_key("  ", "TaskFlow runtime requires a bound sessionKey.")


# ---- numbers --------------------------------------------------------------------------------------

INTEGERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "revision": (arguments.revision, 0),
    "optional_revision": (arguments.optional_revision, 0),
    "count": (lambda value: arguments.count(value, "limit"), 1),
    "sequence": (lambda value: arguments.optional_sequence_number(value, "after_seq"), 0),
}


@pytest.mark.parametrize("check", INTEGERS)
@pytest.mark.parametrize("value", [True, False, 1.0, "1", b"1", [1], 1j, math.nan], ids=repr)
def test_a_number_that_is_no_int_is_a_type_error(check: str, value: Any) -> None:
    with pytest.raises(TypeError, match="must be an int, not"):
        INTEGERS[check][0](value)


@pytest.mark.parametrize("check", INTEGERS)
@pytest.mark.parametrize("below", [1, 2, 10**30, 10**5_000], ids=["1", "2", "big", "huge"])
def test_a_number_below_the_least_is_a_value_error(check: str, below: int) -> None:
    function, least = INTEGERS[check]

    assert function(least) == least
    with pytest.raises(ValueError, match=rf"(must be {least} or more|expected_revision)"):
        function(least - below)


def test_no_revision_means_take_it_as_it_is_only_where_it_is_optional() -> None:
    assert arguments.optional_revision(None) is None
    assert arguments.optional_sequence_number(None, "after_seq") is None
    with pytest.raises(TypeError, match="expected_revision must be an int, not NoneType"):
        arguments.revision(None)
    with pytest.raises(TypeError, match="limit must be an int, not NoneType"):
        arguments.count(None, "limit")


@pytest.mark.parametrize("value", [2**63, 2**64, 10**30, 10**5_000], ids=["63", "64", "x", "y"])
def test_a_number_no_store_can_compare_with_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        arguments.count(value, "limit")
    with pytest.raises(ValueError, match="after_seq"):
        arguments.optional_sequence_number(value, "after_seq")


@pytest.mark.parametrize(
    "value",
    [True, 1.5, "now", -1, 2**53, 10**5_000, math.nan],
    ids=lambda v: repr(v)[:9] if not isinstance(v, int) else str(v % 97),
)
def test_an_instant_is_epoch_milliseconds(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        arguments.instant(value, "started_at")


def test_instants_from_the_epoch_on_are_taken_as_they_are() -> None:
    for value in (None, 0, 1_700_000_000_000, 2**53 - 1):
        assert arguments.instant(value, "started_at") == value


@pytest.mark.parametrize("value", [0, -1, -0.5, 0.0, math.nan, math.inf, -math.inf])
def test_a_duration_that_is_not_positive_and_finite_is_a_value_error(value: float) -> None:
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
        arguments.seconds(value, "timeout")


@pytest.mark.parametrize("value", ["1", True, b"1", [1], 1j], ids=repr)
def test_a_duration_that_is_no_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="timeout must be a number of seconds, not"):
        arguments.seconds(value, "timeout")


@pytest.mark.parametrize("value", [10**400, 10**5_000], ids=["400 digits", "5000 digits"])
def test_a_duration_too_long_for_a_float_is_misuse_like_any_other(value: int) -> None:
    with pytest.raises(ValueError, match="timeout"):
        arguments.seconds(value, "timeout")


def test_a_duration_comes_back_as_a_float() -> None:
    assert arguments.seconds(None, "timeout") is None
    assert type(arguments.seconds(3, "timeout")) is float
    assert arguments.duration(0.5, "seconds") == 0.5
    with pytest.raises(TypeError, match="seconds"):
        arguments.duration(None, "seconds")


# ---- words ----------------------------------------------------------------------------------------

KINDS = [FlowStatus, TaskStatus, NotifyPolicy, TerminalOutcome]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["runing", "RUNNING", "", " running", 7, None, True, b"running"])
def test_a_misspelt_word_is_refused_with_all_that_would_do(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^status must be one of ") as caught:
        arguments.choice(value, kind, "status")

    assert all(word.value in str(caught.value) for word in kind)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_taken_as_text_and_as_itself(kind: Any) -> None:
    for word in kind:
        assert arguments.choice(word.value, kind, "status") is word
        assert arguments.choice(word, kind, "status") is word


def test_a_word_that_exists_but_is_not_allowed_here_is_refused_with_those_that_are() -> None:
    allowed = (FlowStatus.QUEUED, FlowStatus.RUNNING)

    with pytest.raises(ValueError, match=r"^status must be one of queued, running; got 'lost'\.$"):
        arguments.choice("lost", FlowStatus, "status", allowed)


def test_a_long_wrong_value_makes_no_long_message() -> None:
    for value in ("x" * 10_000_000, Nothing()):
        with pytest.raises(ValueError, match="status") as caught:
            arguments.choice(value, FlowStatus, "status")
        assert len(str(caught.value)) < 400


def test_several_words_may_be_given_in_any_iterable() -> None:
    both = (FlowStatus.QUEUED, FlowStatus.LOST)

    assert arguments.choices(None, FlowStatus, "status") == ()
    assert arguments.choices("queued", FlowStatus, "status") == both[:1]
    for value in (["queued", "lost"], ("queued", FlowStatus.LOST), iter(["queued", "lost"])):
        assert arguments.choices(value, FlowStatus, "status") == both


@pytest.mark.parametrize(
    "value", [["queued", "losst"], ("lost", 7), b"queued", {"losst"}], ids=repr
)
def test_one_wrong_word_among_several_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="status must be one of"):
        arguments.choices(value, FlowStatus, "status")


@pytest.mark.parametrize("value", [7, object(), 1.5], ids=type)
def test_what_holds_no_words_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="status must be a string or several"):
        arguments.choices(value, FlowStatus, "status")


def test_a_mapping_or_none_is_taken_and_nothing_else() -> None:
    origin = {"channel": "slack"}

    assert arguments.mapping_or_none(None, "requester_origin") is None
    assert arguments.mapping_or_none(origin, "requester_origin") is origin
    for value in ([], "text", 7, ()):
        with pytest.raises(TypeError, match="requester_origin must be a mapping"):
            arguments.mapping_or_none(value, "requester_origin")


def test_a_retry_policy_or_none_is_taken_and_nothing_else() -> None:
    policy = Retry()

    assert arguments.retry(None) is None
    assert arguments.retry(policy) is policy
    for value in (3, {"max_attempts": 3}, Retry, "3"):
        with pytest.raises(TypeError, match="retry"):
            arguments.retry(value)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.binary(max_size=4),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
CHECKS: list[Callable[[Any], Any]] = [
    lambda value: arguments.text(value, "goal"),
    lambda value: arguments.optional_text(value, "goal"),
    lambda value: arguments.patched_text(value, "goal"),
    lambda value: arguments.instruction(value, "goal"),
    lambda value: arguments.identifier(value, "goal"),
    lambda value: arguments.lookup(value, "goal"),
    lambda value: arguments.owner_key(value, "missing"),
    arguments.revision,
    arguments.optional_revision,
    lambda value: arguments.instant(value, "at"),
    lambda value: arguments.seconds(value, "timeout"),
    lambda value: arguments.count(value, "limit"),
    lambda value: arguments.optional_sequence_number(value, "after"),
    lambda value: arguments.choice(value, FlowStatus, "status"),
    lambda value: arguments.choices(value, FlowStatus, "status"),
    lambda value: arguments.mapping_or_none(value, "origin"),
]


@given(value=anything, check=st.sampled_from(CHECKS))
@settings(PROFILE, max_examples=600)
def test_whatever_is_passed_is_taken_or_is_misuse_and_never_anything_else(
    value: Any, check: Callable[[Any], Any]
) -> None:
    misuse: Exception | None = None

    try:
        check(value)
    except (TypeError, ValueError) as error:
        misuse = error

    assert misuse is None or str(misuse)
    assert not isinstance(misuse, UnicodeError)
