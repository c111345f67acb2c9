"""What sort of failure it was and what is worth doing about it, written out as a table and asked of everything."""

from __future__ import annotations

import asyncio
import http
import math
import socket
import urllib.error
from collections.abc import Callable
from email.message import Message
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstead.errors import Fatal, NeedsReview, TaskSignal, Transient
from flowstead.model.flow import Failure
from flowstead.model.retry import RETRIED, Category, Retry, name_of
from flowstead.model.task import Failed, Lost, TimedOut
from flowstead.rules.classify import Verdict, category_of, judge, judge_outcome, retry_after_of
from tests.unit.test_guard import HOSTILE

PROFILE = settings(deadline=None, derandomize=True, database=None)
WEEK = 7 * 24 * 3600.0


class ValidationError(Exception):
    """Of nobody's library, but called as in all of them."""


class Worse(ValidationError):
    """Called otherwise, and of the same kind."""


class Puzzled(TaskSignal):
    """A user's own signal, of no sort that we know."""


class Status(Exception):
    """An HTTP error as libraries make it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__("http")
        vars(self).update(attributes)


class Answer:
    """The answer an HTTP error carries."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Limited(ConnectionError):
    """Says how long it wants to be left alone."""

    def __init__(self, retry_after: Any) -> None:
        super().__init__("limited")
        self.retry_after = retry_after


class Sore(Exception):
    """Raises whatever it was given when somebody looks at it."""

    def __init__(self, pain: type[BaseException]) -> None:
        super().__init__("sore")
        self.pain = pain

    def _hurt(self) -> Any:
        raise self.pain("do not touch")

    response = property(_hurt)
    status = property(_hurt)
    status_code = property(_hurt)
    retry_after = property(_hurt)


class Transparent(Exception):
    """Has every attribute there is, and each is another of its kind."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Transparent()


class FalseFace(Exception):
    """Minds being asked what it is."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("nobody's business")


class BlankMeta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__module__", "__qualname__"}:
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class Blank(ConnectionError, metaclass=BlankMeta):
    """A connection error whose class has no name to compare."""


class BlankFatal(Fatal, metaclass=BlankMeta):
    """Fatal, whatever it is called."""


def http_error(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://x", code, "no", Message(), None)


def decoding() -> Exception:
    try:
        msgspec.json.decode(b'"x"', type=int)
    except msgspec.ValidationError as error:
        return error
    raise AssertionError("vacuous")


def within(error: Exception, depth: int) -> ExceptionGroup[Exception]:
    group = ExceptionGroup("bottom", [error])
    for n in range(depth):
        group = ExceptionGroup(f"level {n}", [group])
    return group


def several(*errors: BaseException) -> BaseException:
    return BaseExceptionGroup("several", errors)


# ---- the table ------------------------------------------------------------------------------------

TABLE: dict[str, tuple[Callable[[], BaseException], Category]] = {
    # what the child says of itself
    "Transient": (Transient, Category.TRANSIENT),
    "Transient, with a word": (lambda: Transient("busy", retry_after=3), Category.TRANSIENT),
    "Fatal": (Fatal, Category.FATAL),
    "NeedsReview": (lambda: NeedsReview("look"), Category.VALIDATION),
    "a signal of somebody's own": (Puzzled, Category.OTHER),
    # its class
    "ConnectionError": (ConnectionError, Category.TRANSIENT),
    "ConnectionResetError": (ConnectionResetError, Category.TRANSIENT),
    "ConnectionRefusedError": (ConnectionRefusedError, Category.TRANSIENT),
    "BrokenPipeError": (BrokenPipeError, Category.TRANSIENT),
    "TimeoutError": (TimeoutError, Category.TRANSIENT),
    "asyncio.TimeoutError": (asyncio.TimeoutError, Category.TRANSIENT),
    "InterruptedError": (InterruptedError, Category.TRANSIENT),
    "BlockingIOError": (BlockingIOError, Category.TRANSIENT),
    "socket.gaierror": (socket.gaierror, Category.TRANSIENT),
    "PermissionError": (PermissionError, Category.AUTH),
    "msgspec's ValidationError": (decoding, Category.VALIDATION),
    "anybody's ValidationError": (ValidationError, Category.VALIDATION),
    "a kind of ValidationError": (Worse, Category.VALIDATION),
    "ValueError": (ValueError, Category.OTHER),
    "OSError": (OSError, Category.OTHER),
    "FileNotFoundError": (FileNotFoundError, Category.OTHER),
    "AssertionError": (AssertionError, Category.OTHER),
    "KeyboardInterrupt": (KeyboardInterrupt, Category.OTHER),
    "SystemExit": (SystemExit, Category.OTHER),
    "GeneratorExit": (GeneratorExit, Category.OTHER),
    "CancelledError": (asyncio.CancelledError, Category.OTHER),
    "anyio.EndOfStream": (anyio.EndOfStream, Category.OTHER),
    # groups: what the child itself called hopeless, or wants looked at, counts for all; else of a sort if all are
    "a group of one": (lambda: several(ConnectionError()), Category.TRANSIENT),
    "a group of a kind": (lambda: several(ConnectionError(), Transient()), Category.TRANSIENT),
    "a mixed group": (lambda: several(ConnectionError(), ValueError()), Category.OTHER),
    "a group of groups": (
        lambda: several(several(PermissionError()), several(several(PermissionError()))),
        Category.AUTH,
    ),
    "a group of groups that differ": (
        lambda: several(several(PermissionError()), several(KeyError())),
        Category.OTHER,
    ),
    "a group with something hopeless": (
        lambda: several(several(ConnectionError()), several(Fatal()), NeedsReview()),
        Category.FATAL,
    ),
    "a group with something to look at": (
        lambda: several(several(ConnectionError()), several(NeedsReview()), Transient()),
        Category.VALIDATION,
    ),
    "a group where one says try again": (
        lambda: several(Transient(), PermissionError()),
        Category.OTHER,
    ),
    "a group that needs review": (lambda: several(NeedsReview()), Category.VALIDATION),
    "500 groups deep": (lambda: within(PermissionError(), 500), Category.AUTH),
    "5,000 groups deep": (lambda: within(Fatal(), 5_000), Category.FATAL),
    # what HTTP says, where the status speaks
    "urllib's 503": (lambda: http_error(503), Category.TRANSIENT),
    "urllib's 404": (lambda: http_error(404), Category.OTHER),
    "a status comes before the class": (
        lambda: type("Refused", (ConnectionError,), {"status": 401})(),
        Category.AUTH,
    ),
    "a status nobody knows leaves it to the class": (
        lambda: type("Refused", (ConnectionError,), {"status": 418})(),
        Category.TRANSIENT,
    ),
    "its own status comes before its answer's": (
        lambda: Status(status=401, response=Answer(status_code=503)),
        Category.AUTH,
    ),
    "a status in a group": (lambda: several(Status(status=429)), Category.TRANSIENT),
    "status as a text": (lambda: Status(status="503"), Category.OTHER),
    "status as a truth": (lambda: Status(status=True), Category.OTHER),
    "status as a float": (lambda: Status(status=503.0), Category.OTHER),
    "an answer of nothing": (lambda: Status(response=None), Category.OTHER),
    "an answer that is a number": (lambda: Status(response=503), Category.OTHER),
    # hostile
    "hurts when looked at": (lambda: Sore(RuntimeError), Category.OTHER),
    "says yes to everything": (Transparent, Category.OTHER),
    "has no face": (FalseFace, Category.OTHER),
    "fatal without a name": (BlankFatal, Category.FATAL),
}
STATUSES: dict[int, Category] = {
    400: Category.VALIDATION,
    401: Category.AUTH,
    403: Category.AUTH,
    407: Category.AUTH,
    408: Category.TRANSIENT,
    422: Category.VALIDATION,
    425: Category.TRANSIENT,
    429: Category.TRANSIENT,
    500: Category.TRANSIENT,
    502: Category.TRANSIENT,
    503: Category.TRANSIENT,
    504: Category.TRANSIENT,
}


@pytest.mark.parametrize("name", TABLE)
def test_a_failure_is_of_the_sort_the_table_says(name: str) -> None:
    make, category = TABLE[name]

    assert judge(make(), None).category is category


@pytest.mark.parametrize("name", TABLE)
def test_without_a_policy_of_its_own_a_sort_is_tried_again_or_reviewed_or_neither(
    name: str,
) -> None:
    make, category = TABLE[name]

    verdicts = [judge(make(), retry) for retry in (None, Retry(), Retry(max_attempts=1))]

    for verdict in verdicts:
        assert verdict.again == (category in RETRIED)
        assert verdict.review == (category is Category.VALIDATION)


def test_every_category_is_either_tried_again_or_reviewed_or_final_by_itself() -> None:
    again = {category for category in Category if category in RETRIED}

    assert again == {Category.TRANSIENT, Category.TIMED_OUT, Category.OTHER}
    assert set(Category) - again == {Category.AUTH, Category.VALIDATION, Category.FATAL}


@pytest.mark.parametrize(
    "carry",
    [
        lambda n: Status(status_code=n),
        lambda n: Status(status=n),
        lambda n: Status(response=Answer(status_code=n)),
        lambda n: Status(response=Answer(status=n)),
    ],
    ids=["status_code", "status", "response.status_code", "response.status"],
)
def test_an_http_status_says_what_it_says_wherever_the_exception_carries_it(
    carry: Callable[[int], BaseException],
) -> None:
    for status in range(-1, 600):
        assert category_of(carry(status)) is STATUSES.get(status, Category.OTHER), status


def test_a_status_may_be_one_of_pythons_own_words_for_it() -> None:
    assert category_of(Status(status_code=http.HTTPStatus.UNAUTHORIZED)) is Category.AUTH


def test_what_a_child_called_hopeless_is_not_tried_again_because_something_else_failed_too() -> (
    None
):
    assert not judge(several(Fatal("never"), ConnectionError()), Retry()).again


# ---- who is asked first ---------------------------------------------------------------------------


@pytest.mark.parametrize("word", Category)
@pytest.mark.parametrize("as_text", [False, True])
def test_the_tasks_own_word_comes_before_status_and_class(word: Category, as_text: bool) -> None:
    said = word.value if as_text else word

    for error in (Status(status=401), ConnectionError(), ValueError(), several(ValueError())):
        assert category_of(error, lambda _: said) is word


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (Transient(), Category.TRANSIENT),
        (Fatal(), Category.FATAL),
        (NeedsReview(), Category.VALIDATION),
    ],
)
def test_what_the_child_says_of_itself_comes_before_the_tasks_word(
    error: BaseException, category: Category
) -> None:
    asked: list[BaseException] = []

    assert category_of(error, lambda e: asked.append(e) or "auth") is category  # type: ignore[func-returns-value]
    assert asked == []


NONSENSE: dict[str, Callable[[BaseException], Any]] = {
    "None": lambda _: None,
    "an unknown word": lambda _: "perhaps",
    "capitals": lambda _: "AUTH",
    "a number": lambda _: 7,
    "a list": lambda _: ["auth"],
    "a dict": lambda _: {},
    "an object": lambda _: object(),
    "raises": lambda _: 1 / 0,
    "raises what it was given": lambda error: (_ for _ in ()).throw(error),
    "takes nothing": lambda: "auth",  # type: ignore[misc,dict-item]
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_classifier_that_knows_nothing_or_fails_leaves_it_to_the_usual_rules(name: str) -> None:
    assert category_of(PermissionError(), NONSENSE[name]) is Category.AUTH
    assert category_of(ConnectionError(), NONSENSE[name]) is Category.TRANSIENT
    assert category_of(several(PermissionError()), NONSENSE[name]) is Category.AUTH


def test_what_a_child_says_in_any_branch_comes_before_the_tasks_word_for_the_group() -> None:
    assert category_of(several(KeyError(), Fatal()), lambda _: "transient") is Category.FATAL
    assert category_of(several(KeyError(), NeedsReview()), lambda _: "auth") is Category.VALIDATION
    assert category_of(several(KeyError(), Transient()), lambda _: "auth") is Category.AUTH


def test_a_group_is_shown_to_the_classifier_whole_and_then_leaf_by_leaf() -> None:
    seen: list[BaseException] = []
    first, second = ValueError(), KeyError()
    group = several(first, several(second))

    def only_values(error: BaseException) -> str | None:
        seen.append(error)
        return "auth" if isinstance(error, (ValueError, KeyError)) else None

    assert category_of(group, only_values) is Category.AUTH
    assert seen[0] is group
    assert set(seen[1:]) == {first, second}


# ---- a policy with a mind of its own --------------------------------------------------------------


class Base(Exception):
    """A user's own."""


class Derived(Base):
    """A kind of it."""


RETRY_ON: list[tuple[Any, BaseException, bool]] = [
    # by class, subclass, dotted name, bare name
    (ConnectionError, ConnectionError(), True),
    (ConnectionError, ConnectionResetError(), True),
    (ConnectionResetError, ConnectionError(), False),
    (ConnectionError, ValueError(), False),
    ("builtins.ConnectionError", ConnectionResetError(), True),
    ("ConnectionError", ConnectionResetError(), True),
    (Base, Derived(), True),
    (Derived, Base(), False),
    (name_of(Base), Derived(), True),
    ((ValueError, KeyError), KeyError(), True),
    ([ValueError, "KeyError"], KeyError(), True),
    ((ValueError, KeyError), TypeError(), False),
    (BaseException, KeyboardInterrupt(), True),
    (Exception, KeyboardInterrupt(), False),
    ("nowhere.Nobody", ValueError(), False),
    ((), ConnectionError(), False),
    # by category
    ("transient", ConnectionResetError(), True),
    ("transient", ValueError(), False),
    (Category.TRANSIENT, TimeoutError(), True),
    ("auth", PermissionError(), True),
    ("auth", Status(status=401), True),
    ("other", ValueError(), True),
    ("other", ConnectionError(), False),
    (("transient", "auth"), PermissionError(), True),
    (("transient", ValueError), ValueError(), True),
    ("transient", several(ConnectionError(), TimeoutError()), True),
    ("transient", several(ConnectionError(), ValueError()), False),
    # in groups: every one of them has to be worth it
    (ConnectionError, several(ConnectionResetError()), True),
    (ConnectionError, several(ConnectionError(), several(BrokenPipeError())), True),
    (ConnectionError, several(ConnectionError(), ValueError()), False),
    ((ConnectionError, ValueError), several(ConnectionError(), ValueError()), True),
    (BaseException, several(ConnectionError(), Fatal()), False),
    (BaseException, several(ConnectionError(), NeedsReview()), False),
    # what the child says of itself is not overruled
    ("auth", Transient(), True),
    ((), Transient(), True),
    ("fatal", Fatal(), False),
    (Fatal, Fatal(), False),
    (BaseException, Fatal(), False),
    (BaseException, NeedsReview(), False),
    ("validation", NeedsReview(), False),
]


@pytest.mark.parametrize(("retry_on", "error", "again"), RETRY_ON)
def test_a_policy_says_by_class_name_or_category_what_is_worth_another_attempt(
    retry_on: Any, error: BaseException, again: bool
) -> None:
    kept = Retry(retry_on=retry_on)
    reread = msgspec.json.decode(msgspec.json.encode(kept), type=Retry)

    assert judge(error, kept).again == again
    assert judge(error, reread).again == again


def test_a_policy_by_class_knows_its_exception_in_the_group_a_task_group_makes_of_it() -> None:
    error = several(ConnectionResetError())

    assert judge(error, Retry(retry_on="transient")).again
    assert judge(error, Retry(retry_on=ConnectionError)).again


def test_a_validation_failure_that_a_policy_tries_again_needs_nobody_to_look_at_it() -> None:
    for reason in ("validation", ValidationError):
        verdict = judge(Worse(), Retry(retry_on=reason))
        assert (verdict.again, verdict.review) == (True, False)
    assert judge(Worse(), Retry(retry_on="transient")).review
    assert judge(NeedsReview(), Retry(retry_on="validation")).review


@pytest.mark.parametrize("retry", [None, Retry(), Retry(retry_on=("timed_out", "other"))])
def test_past_a_deadline_or_with_a_result_nobody_can_keep_it_is_tried_again(
    retry: Retry | None,
) -> None:
    late = judge_outcome(TimedOut(Failure(kind="timed_out")), retry)
    broken = judge_outcome(Failed(Failure(kind="bad_result")), retry)

    assert (late.category, late.again, late.review) == (Category.TIMED_OUT, True, False)
    assert (broken.category, broken.again, broken.review) == (Category.OTHER, True, False)


def test_a_policy_that_names_other_reasons_leaves_time_outs_and_bad_results_alone() -> None:
    retry = Retry(retry_on="transient")

    assert not judge_outcome(TimedOut(Failure(kind="timed_out")), retry).again
    assert not judge_outcome(Failed(Failure(kind="bad_result")), retry).again
    assert not judge_outcome(Lost(Failure(kind="lost")), retry).again
    assert judge_outcome(TimedOut(Failure(kind="t")), Retry(retry_on="timed_out")).again


# ---- how long it asks for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "seconds"),
    [
        (0, 0.0),
        (30, 30.0),
        (0.5, 0.5),
        (WEEK + 1, WEEK),
        (math.inf, WEEK),
        (10**400, WEEK),
        (-1, None),
        (-math.inf, None),
        (math.nan, None),
        ("30", None),
        (True, None),
        (None, None),
        ([30], None),
    ],
)
def test_how_long_whoever_refused_wants_to_be_left_alone_is_bounded_or_not_heard(
    given_as: Any, seconds: float | None
) -> None:
    assert retry_after_of(Limited(given_as)) == seconds
    assert judge(Limited(given_as), Retry()).retry_after == seconds
    assert judge(Transient(retry_after=given_as), None).retry_after == seconds


def test_the_longest_delay_asked_for_in_a_group_is_heard() -> None:
    error = several(Transient(retry_after=3), several(Limited(40)), Transient())

    assert judge(error, None).retry_after == 40.0


def test_one_branch_that_may_work_next_time_does_not_speak_for_one_that_the_policy_leaves_alone() -> (
    None
):
    error = several(Transient(), PermissionError(), ValueError())

    assert not judge(error, Retry(retry_on="transient")).again


# ---- whatever it raises ---------------------------------------------------------------------------

PAINS = [
    RuntimeError,
    RecursionError,
    MemoryError,
    StopIteration,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
]


@pytest.mark.parametrize("pain", PAINS)
def test_an_exception_that_raises_when_looked_at_is_judged_all_the_same_whatever_it_raises(
    pain: type[BaseException],
) -> None:
    assert judge(Sore(pain), Retry()) == Verdict(Category.OTHER, again=True)


@pytest.mark.parametrize("pain", PAINS)
def test_a_classifier_that_fails_hides_nothing_whatever_it_raises(
    pain: type[BaseException],
) -> None:
    def classify(_: BaseException) -> str:
        raise pain("in the classifier")

    assert judge(PermissionError(), None, classify).category is Category.AUTH


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("retry", [None, Retry(), Retry(retry_on=ConnectionError)])
def test_whatever_a_child_raises_gets_a_verdict(
    make: Callable[[], BaseException], retry: Retry | None
) -> None:
    verdict = judge(make(), retry)

    assert isinstance(verdict.category, Category)
    assert not (verdict.again and verdict.review)
    msgspec.json.encode(verdict)


def test_what_cannot_be_compared_by_name_is_other_also_to_a_policy_that_names_others() -> None:
    assert judge(Blank(), Retry(retry_on="other")) == Verdict(Category.OTHER, again=True)


leaves = st.sampled_from(
    [Transient, Fatal, NeedsReview, PermissionError, ConnectionError, ValidationError, KeyError]
).map(lambda kind: kind())
errors = st.recursive(
    leaves, lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda e: several(*e))
)
policies = st.one_of(
    st.none(),
    st.builds(
        Retry,
        retry_on=st.one_of(
            st.none(),
            st.lists(
                st.sampled_from([*Category, ConnectionError, "builtins.KeyError", Exception]),
                max_size=3,
            ),
        ),
    ),
)
words = st.sampled_from([None, *Category, "auth", "nonsense", 7])


def leaves_of(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in leaves_of(inner)]


def sort_of(leaves: list[BaseException]) -> Category:
    for kind, category in ((Fatal, Category.FATAL), (NeedsReview, Category.VALIDATION)):
        if any(isinstance(leaf, kind) for leaf in leaves):
            return category
    sorts = {category_of(leaf) for leaf in leaves}
    return sorts.pop() if len(sorts) == 1 else Category.OTHER


@given(error=errors, retry=policies, word=words)
@settings(PROFILE, max_examples=400)
def test_verdicts_hang_together_for_every_exception_policy_and_classifier(
    error: BaseException, retry: Retry | None, word: Any
) -> None:
    verdict = judge(error, retry, lambda _: word)

    assert not (verdict.again and verdict.review)
    assert verdict.review <= (verdict.category is Category.VALIDATION)
    if isinstance(error, TaskSignal) or retry is None or retry.reasons is None:
        assert verdict.again == (verdict.category in RETRIED)
    said = any(isinstance(leaf, (Fatal, NeedsReview)) for leaf in leaves_of(error))
    if said or word in [None, "nonsense", 7] or isinstance(error, TaskSignal):
        assert verdict.category is sort_of(leaves_of(error))
    else:
        assert verdict.category is Category(word)


# ---- the policy's own words -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry_on", "names"),
    [
        (None, None),
        ("transient", ("transient",)),
        (Category.AUTH, ("auth",)),
        (ConnectionError, ("builtins.ConnectionError",)),
        ("ConnectionError", ("builtins.ConnectionError",)),
        ("socket.gaierror", ("socket.gaierror",)),
        (Derived, ("tests.unit.test_classify.Derived",)),
        (("auth", ValueError), ("auth", "builtins.ValueError")),
        (["auth"], ("auth",)),
        ({"auth"}, ("auth",)),
        ((), ()),
        ((name for name in ("auth", "other")), ("auth", "other")),
    ],
)
def test_a_policy_keeps_its_reasons_by_name_and_survives_its_record(
    retry_on: Any, names: tuple[str, ...] | None
) -> None:
    policy = Retry(retry_on=retry_on)

    kept = msgspec.json.encode(policy)
    again = msgspec.json.decode(kept, type=Retry)

    assert policy.retry_on == names
    assert policy.reasons == (None if names is None else set(names))
    assert again == policy
    assert again.reasons == policy.reasons
    assert hash(again) == hash(policy)
    assert msgspec.json.encode(again) == kept


WRONG: list[tuple[Any, type[Exception], str]] = [
    ("", ValueError, "Retry.retry_on: '' is neither an exception nor one of transient, "),
    ("perhaps", ValueError, "'perhaps' is neither an exception nor one of transient, "),
    ("Transient", ValueError, "name a class as 'module.Class'."),
    ("print", ValueError, "'print' is neither an exception nor one of"),
    ("int", ValueError, "'int' is neither an exception nor one of"),
    (int, TypeError, "Retry.retry_on takes categories and exception classes, not <class 'int'>."),
    (7, TypeError, "Retry.retry_on takes categories and exception classes, not 7."),
    (b"auth", TypeError, "Retry.retry_on takes categories and exception classes, not 97."),
    (("auth", None), TypeError, "takes categories and exception classes, not None."),
    (("auth", ("other",)), TypeError, "takes categories and exception classes, not ('other',)."),
    (ValueError(), TypeError, "takes categories and exception classes, not ValueError()."),
    (True, TypeError, "takes categories and exception classes, not True."),
]


@pytest.mark.parametrize(("retry_on", "kind", "sentence"), WRONG)
def test_a_policy_that_names_nothing_is_refused_with_a_sentence(
    retry_on: Any, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        Retry(retry_on=retry_on)

    assert type(caught.value) is kind
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("Retry.retry_on")


def test_the_sentence_of_a_refusal_stays_short() -> None:
    with pytest.raises(ValueError, match="neither") as caught:
        Retry(retry_on="x" * 10_000)

    assert len(str(caught.value)) < 400
