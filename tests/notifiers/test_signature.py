"""Webhooks that arrive: only what a holder of a secret sent just now, unchanged, is let in."""

from __future__ import annotations

import base64
import http.client
import io
import pickle
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from flowstead.notifiers import WebhookRefused, verify_webhook
from flowstead.notifiers.signature import read_secrets, sign, webhook_id
from tests.notifiers.stage import NOW, OLD_SECRET, SECRET

BODY = b'{"type":"flow.done"}'
SECONDS = NOW // 1000
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(32)).decode()


def headers(
    secrets: list[Any] | None = None,
    *,
    seconds: int = SECONDS,
    id: str = "flow-1:done",
    **changed: Any,
) -> dict[str, Any]:
    """What a sender with these secrets puts in front of BODY; then, what somebody made of it on the way."""
    signatures = sign(id, seconds, BODY, read_secrets(secrets or [SECRET]))
    made = {"id": id, "timestamp": str(seconds), "signature": " ".join(signatures), **changed}
    return {f"Webhook-{name}": value for name, value in made.items() if value is not None}


def refusal(given: Any, body: bytes = BODY, **asked: Any) -> str:
    with pytest.raises(WebhookRefused) as refused:
        verify_webhook(given, body, [SECRET], now=NOW, **asked)
    assert str(refused.value).endswith(".")
    return refused.value.code


def test_a_secret_that_was_read_as_bytes_is_not_taken_for_a_raw_one() -> None:
    with pytest.raises(ValueError, match="is given as a string") as refused:
        read_secrets([SECRET.encode()])

    assert SECRET not in str(refused.value)


def test_what_was_signed_is_let_in_and_answers_its_id() -> None:
    assert verify_webhook(headers(), BODY, [SECRET], now=NOW) == "flow-1:done"


def test_the_signature_is_the_one_that_was_published_with_the_specification() -> None:
    keys = read_secrets(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])

    made = sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', keys)

    assert made == ["v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="]


@given(
    body=st.text().map(str.encode),
    seconds=st.integers(0, 4_000_000_000),
    key=st.binary(min_size=24),
)
def test_the_library_of_the_specification_makes_the_same_signatures(
    body: bytes, seconds: int, key: bytes
) -> None:
    theirs = standardwebhooks.Webhook(key).sign(
        "evt_1", datetime.fromtimestamp(seconds, UTC), body.decode()
    )

    assert sign("evt_1", seconds, body, read_secrets([key])) == [theirs]


def test_a_secret_is_the_same_as_text_or_raw_and_with_or_without_padding() -> None:
    raw = bytes(range(32))
    text = "whsec_" + base64.b64encode(raw).decode()

    assert read_secrets([text, text.rstrip("="), raw]) == [raw, raw, raw]


@pytest.mark.parametrize("sender", [[SECRET], [OLD_SECRET], [SECRET, OLD_SECRET]])
@pytest.mark.parametrize("receiver", [[SECRET, OLD_SECRET], [OLD_SECRET, SECRET]])
def test_while_secrets_are_exchanged_either_of_them_is_enough(
    sender: list[Any], receiver: list[Any]
) -> None:
    assert verify_webhook(headers(sender), BODY, receiver, now=NOW)


def test_a_sender_that_signs_twice_is_understood_by_who_knows_one_of_the_secrets() -> None:
    both = headers([OTHER_SECRET, SECRET])

    assert verify_webhook(both, BODY, [SECRET], now=NOW)


class Headers:
    """As of frameworks whose headers are no mapping, and keep a name as often as it came."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self._pairs = pairs

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, _ in self._pairs])

    def items(self) -> Iterator[tuple[Any, Any]]:
        yield from self._pairs


def of_http_server(pairs: list[tuple[str, str]]) -> Any:
    raw = "".join(f"{name}: {value}\r\n" for name, value in pairs)
    return http.client.parse_headers(io.BytesIO(f"{raw}\r\n".encode("latin-1")))


SHAPES: dict[str, Callable[[list[tuple[str, str]]], Any]] = {
    "mapping": dict,
    "of http.server": of_http_server,
    "pairs": list,
    "pairs that come one by one": iter,
    "pairs of bytes": lambda pairs: [(n.lower().encode(), v.encode()) for n, v in pairs],
    "lists of two": lambda pairs: [list(pair) for pair in pairs],
    "items": Headers,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_headers_may_come_in_any_shape_that_has_pairs(shape: str) -> None:
    others = [("Host", "example.com"), ("X-Two", "1"), ("X-Two", "2"), ("Content-Length", "20")]

    given = SHAPES[shape]([*others, *headers().items()])

    assert verify_webhook(given, BODY, [SECRET], now=NOW) == "flow-1:done"


@pytest.mark.parametrize("shape", ["of http.server", "pairs", "items"])
def test_a_header_that_came_twice_is_refused_in_any_shape(shape: str) -> None:
    twice = [*headers().items(), ("webhook-id", "flow-2:done")]

    assert refusal(SHAPES[shape](twice)) == "malformed"


@pytest.mark.parametrize("given", [None, 5, ["Webhook-id"], [1, 2], [(1, "x")], object(), {1: "x"}])
def test_what_are_no_headers_is_told(given: Any) -> None:
    with pytest.raises(TypeError, match=r"^verify_webhook needs the headers as a mapping or as p"):
        verify_webhook(given, BODY, [SECRET], now=NOW)


@pytest.mark.parametrize("value", [["flow-1:done"], 5, True, ("a",), object()])
def test_a_header_whose_value_is_no_text_is_refused(value: object) -> None:
    assert refusal(headers() | {"Webhook-id": value}) == "malformed"


GENUINE = headers()["Webhook-signature"]

REFUSED = {
    "another secret": (headers([OTHER_SECRET]), "forged"),
    "made up": (headers(signature="v1," + base64.b64encode(bytes(32)).decode()), "forged"),
    "id changed": (headers() | {"Webhook-id": "flow-2:done"}, "forged"),
    "timestamp changed": (headers() | {"Webhook-timestamp": str(SECONDS + 1)}, "forged"),
    "another scheme": (headers(signature=GENUINE.replace("v1,", "v1a,")), "forged"),
    "signature without its version": (headers(signature=GENUINE.removeprefix("v1,")), "forged"),
    "signature cut short": (headers(signature=GENUINE[:-4]), "forged"),
    "signature with more behind": (headers(signature=GENUINE + "AAAA"), "forged"),
    "signatures by comma": (headers(signature=f"v1,AAAA,{GENUINE}"), "forged"),
    "only a version": (headers(signature="v1,"), "forged"),
    "no id": (headers(id="x") | {"Webhook-id": ""}, "missing"),
    "id left out": ({k: v for k, v in headers().items() if k != "Webhook-id"}, "missing"),
    "no timestamp": (headers(timestamp=None), "missing"),
    "empty timestamp": (headers(timestamp=""), "missing"),
    "no signature": (headers(signature=None), "missing"),
    "empty signature": (headers(signature=""), "missing"),
    "nothing at all": ({}, "missing"),
    "long id": (headers(id="x" * 257), "malformed"),
    "long timestamp": (headers(timestamp="1" * 5000), "malformed"),
    "long signature": (headers(signature="v1,A " * 1000 + GENUINE), "malformed"),
    "id with a full stop": (headers(id=f"flow-1.{SECONDS}"), "malformed"),
    "id with a line break": (headers(id="flow-1\r\nx: y"), "malformed"),
    "id not ASCII": (headers(id="flöw-1"), "malformed"),
    "id a lone surrogate": (headers() | {"Webhook-id": "\udcff"}, "malformed"),
    "timestamp in Arabic digits": (headers(timestamp="١٧٩٠٠٠٠٠٠٠"), "malformed"),
    "timestamp with a sign": (headers(timestamp=f"+{SECONDS}"), "malformed"),
    "timestamp with a fraction": (headers(timestamp=f"{SECONDS}.0"), "malformed"),
    "timestamp with a line break": (headers(timestamp=f"{SECONDS}\n"), "malformed"),
    "timestamp a word": (headers(timestamp="nan"), "malformed"),
    "signature not ASCII": (headers(signature="v1,ä"), "malformed"),
    "signature a lone surrogate": (headers(signature="v1,\udcff"), "malformed"),
}


@pytest.mark.parametrize(("given", "code"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_proven_is_refused(given: dict[str, str], code: str) -> None:
    assert refusal(given) == code


@pytest.mark.parametrize("name", ["webhook-id", "WEBHOOK-TIMESTAMP", "webhook-signature"])
def test_a_header_that_is_there_twice_is_refused_whichever_of_them_is_genuine(name: str) -> None:
    genuine = list(headers().items())
    again = [(name, value) for each, value in genuine if each.lower() == name.lower()]

    assert len(again) == 1
    assert refusal([*genuine, *again]) == "malformed"
    assert refusal([*again, *genuine]) == "malformed"


def test_one_bit_of_the_body_changed_anywhere_is_refused() -> None:
    for place in range(len(BODY)):
        changed = bytearray(BODY)
        changed[place] ^= 1
        assert refusal(headers(), bytes(changed)) == "forged"

    assert refusal(headers(), BODY + b" ") == "forged"
    assert refusal(headers(), b"") == "forged"


@pytest.mark.parametrize(
    ("away", "code"),
    [(-300_000, None), (-300_001, "too_new"), (300_000, None), (300_001, "too_old")],
)
def test_a_webhook_is_let_in_for_five_minutes_around_its_time(away: int, code: str | None) -> None:
    now = SECONDS * 1000 + away

    if code is None:
        assert verify_webhook(headers(), BODY, [SECRET], now=now)
    else:
        with pytest.raises(WebhookRefused) as refused:
            verify_webhook(headers(), BODY, [SECRET], now=now)
        assert refused.value.code == code


def test_the_tolerance_can_be_narrowed() -> None:
    assert refusal(headers(seconds=SECONDS - 11), tolerance=10) == "too_old"
    assert verify_webhook(headers(seconds=SECONDS - 9), BODY, [SECRET], now=NOW, tolerance=10)


def test_without_a_time_given_the_time_of_day_counts() -> None:
    with pytest.raises(WebhookRefused) as refused:
        verify_webhook(headers(seconds=1_000_000_000), BODY, [SECRET])

    assert refused.value.code == "too_old"


@pytest.mark.parametrize("tolerance", [0, -1, float("inf"), float("nan")])
def test_a_tolerance_that_would_let_everything_in_is_an_error(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        verify_webhook(headers(), BODY, [SECRET], now=NOW, tolerance=tolerance)


def test_a_body_that_was_decoded_already_is_an_error() -> None:
    with pytest.raises(TypeError, match="raw bytes"):
        verify_webhook(headers(), BODY.decode(), [SECRET], now=NOW)  # type: ignore[arg-type]


def test_a_refusal_survives_pickling() -> None:
    refused = pickle.loads(pickle.dumps(WebhookRefused("forged", "It is forged.")))

    assert (refused.code, str(refused)) == ("forged", "It is forged.")


UNUSABLE = {
    "none": ([], ValueError),
    "one instead of a list": (SECRET, TypeError),
    "raw one instead of a list": (OLD_SECRET, TypeError),
    "empty": ([""], ValueError),
    "empty raw": ([b""], ValueError),
    "only a prefix": (["whsec_"], ValueError),
    "no prefix": ([SECRET.removeprefix("whsec_")], ValueError),
    "not base64": (["whsec_hunter2-hunter2-hunter2-hunter2!"], ValueError),
    "not ASCII": (["whsec_hunter2ä"], ValueError),
    "of the other scheme": (["whsk_" + "hunter2A" * 8], ValueError),
    "short": ([b"hunter2"], ValueError),
    "a number": ([7], TypeError),
    "good and bad": ([SECRET, b"hunter2"], ValueError),
}


@pytest.mark.parametrize(("secrets", "error"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_secret_that_cannot_be_used_is_an_error_that_does_not_tell_it(
    secrets: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="webhook") as refused:
        verify_webhook(headers(), BODY, secrets, now=NOW)

    told = "".join(traceback.format_exception(refused.value))
    assert "hunter2" not in told
    assert SECRET.removeprefix("whsec_") not in told


def test_a_key_that_cannot_stand_in_a_header_is_sent_as_its_digest() -> None:
    odd = ["a.b", "zwei wörter", "a\r\nx: y", "", "x" * 257, "\udcff"]

    ids = [webhook_id(key) for key in odd]

    assert webhook_id("agent:main/flow-1:done") == "agent:main/flow-1:done"
    assert len(set(ids)) == len(odd)
    assert all(len(id) == 71 and id.startswith("sha256_") for id in ids)
    for id in ids:
        assert verify_webhook(headers(id=id), BODY, [SECRET], now=NOW) == id
