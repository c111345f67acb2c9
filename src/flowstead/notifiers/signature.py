"""Standard Webhooks signatures: who sent a webhook, when, and that nobody has changed it.

What is signed is `id.timestamp.body`, by HMAC-SHA256, once for each secret, so that secrets can be exchanged
without a pause. An id never holds a full stop here: with one, the same signature would also fit another id.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any, Final, Protocol, TypeAlias

from flowstead.engine.clock import SystemClock

ID: Final = "webhook-id"
TIMESTAMP: Final = "webhook-timestamp"
SIGNATURE: Final = "webhook-signature"


class HasItems(Protocol):
    """A mapping, or what looks like one and may have a name twice: each framework has headers of its own."""

    def items(self) -> Iterable[tuple[Any, Any]]:
        """The pairs of a name and a value."""
        ...


Headers: TypeAlias = HasItems | Iterable[tuple[str | bytes, str | bytes]]

_PREFIX: Final = "whsec_"
_SHORTEST_SECRET: Final = 24
_ID: Final = re.compile(r"[!-\-/-~]{1,256}")  # visible ASCII without the full stop
_SECONDS: Final = re.compile(r"[0-9]{1,12}")
_SIGNATURES: Final = re.compile(r"[ -~]{1,4096}")


class WebhookRefused(ValueError):
    """A webhook that must not be acted upon. `code` says in a word why.

    Attributes:
        code: `missing`, `malformed`, `too_old`, `too_new` or `forged`.
    """

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(code, problem)
        self.code = code
        self.problem = problem

    def __str__(self) -> str:
        return self.problem


def verify_webhook(
    headers: Headers,
    body: bytes,
    secrets: Sequence[str | bytes],
    *,
    now: int | None = None,
    tolerance: float = 300.0,
) -> str:
    """Answer the id of a webhook that one of the secrets' holders sent just now, unchanged.

    It proves nothing about how often it came: a webhook that was overheard verifies again within the tolerance.
    Keep the id for twice the tolerance at least, and act once for each; as the id of a signal, for instance.
    Parse the body only after this has returned.

    Args:
        headers: As they arrived: whatever has `items()`, as the headers of most frameworks, or pairs, as ASGI has
            them. The case of names does not matter.
        body: The raw bytes as they arrived. JSON that was parsed and written again has another signature.
        secrets: What signatures are made with, each `whsec_…` or raw bytes: the present one, and the one before.
        now: Epoch milliseconds; the time of day if left out.
        tolerance: How many seconds the sender's clock may be from `now`, both ways.

    Raises:
        WebhookRefused: It is not proven. Nothing of it may be used.
        TypeError: An argument is of the wrong type; among others, if the body is text.
        ValueError: There is no secret, or one is none.
    """
    if not isinstance(body, bytes | bytearray | memoryview):
        raise TypeError(
            f"verify_webhook needs the raw bytes of the body, not {type(body).__name__}."
        )
    if not isfinite(tolerance) or tolerance <= 0:
        raise ValueError(f"verify_webhook: tolerance must be positive, not {tolerance!r}.")
    keys = read_secrets(secrets)
    given = _webhook_headers(headers)
    webhook_id = _header(given, ID, _ID)
    timestamp = int(_header(given, TIMESTAMP, _SECONDS))
    signatures = _header(given, SIGNATURE, _SIGNATURES)
    _must_be_recent(timestamp, SystemClock().now() if now is None else now, tolerance)
    expected = [made.encode() for made in sign(webhook_id, timestamp, bytes(body), keys)]
    matches = [
        hmac.compare_digest(one, presented.encode())
        for presented in signatures.split(" ")
        for one in expected
    ]
    if not any(matches):
        raise WebhookRefused("forged", "No signature of the webhook was made with a known secret.")
    return webhook_id


def sign(webhook_id: str, timestamp: int, body: bytes, keys: Iterable[bytes]) -> list[str]:
    """The signatures of a webhook sent at `timestamp`, in epoch seconds: one for each key, in their order."""
    content = b"%s.%d.%s" % (webhook_id.encode(), timestamp, body)
    return [
        "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
        for key in keys
    ]


def webhook_id(idempotency_key: str) -> str:
    """The key as the id of a webhook: itself, or its digest if it could not stand in a header."""
    if _ID.fullmatch(idempotency_key):
        return idempotency_key
    digest = hashlib.sha256(idempotency_key.encode("utf-8", "surrogatepass")).hexdigest()
    return f"sha256_{digest}"


def read_secrets(secrets: Sequence[str | bytes]) -> list[bytes]:
    """The keys of the secrets. No message of an error contains any of a secret.

    Raises:
        TypeError: They are not a sequence of strings or bytes.
        ValueError: There are none, or one is not a secret.
    """
    if isinstance(secrets, str | bytes) or not isinstance(secrets, Sequence):
        raise TypeError("The secrets of a webhook must be a list, also if there is only one.")
    if not secrets:
        raise ValueError("A webhook needs a secret to be signed with.")
    return [_key(secret) for secret in secrets]


def _key(secret: str | bytes) -> bytes:
    if isinstance(secret, str):
        key = _decoded(secret)
    elif isinstance(secret, bytes):
        if secret.startswith(_PREFIX.encode()):
            raise ValueError(
                f"A webhook's secret that begins with {_PREFIX!r} is given as a string."
            )
        key = secret
    else:
        raise TypeError(
            f"A webhook's secret must be a string or bytes, not {type(secret).__name__}."
        )
    if len(key) < _SHORTEST_SECRET:
        raise ValueError(f"A webhook's secret must have {_SHORTEST_SECRET} bytes at least.")
    return key


def _decoded(secret: str) -> bytes:
    coded = secret.removeprefix(_PREFIX)
    if coded == secret:
        raise ValueError(
            f"A webhook's secret, as a string, is base64 after {_PREFIX!r}; give raw ones as bytes."
        )
    try:
        return base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)
    except ValueError:
        raise ValueError(f"A webhook's secret is not base64 after {_PREFIX!r}.") from None


def _webhook_headers(headers: Headers) -> list[tuple[str, str]]:
    try:
        given = headers.items() if hasattr(headers, "items") else headers
        pairs = [(_text(name).lower(), value) for name, value in given]
    except (TypeError, ValueError, AttributeError):
        raise TypeError(
            "verify_webhook needs the headers as a mapping or as pairs of a name and a value,"
            f" not {type(headers).__name__}."
        ) from None
    return [(name, _text(value)) for name, value in pairs if name in (ID, TIMESTAMP, SIGNATURE)]


def _text(part: Any) -> str:
    return part.decode("latin-1") if isinstance(part, bytes) else part


def _header(given: list[tuple[str, str]], name: str, pattern: re.Pattern[str]) -> str:
    values = [value for each, value in given if each == name]
    if not values or not values[0]:
        raise WebhookRefused("missing", f"The webhook has no {name}.")
    if len(values) > 1:
        raise WebhookRefused("malformed", f"The webhook has more than one {name}.")
    if not isinstance(values[0], str) or not pattern.fullmatch(values[0]):
        raise WebhookRefused("malformed", f"The webhook's {name} is not one.")
    return values[0]


def _must_be_recent(timestamp: int, now: int, tolerance: float) -> None:
    age = now - timestamp * 1000
    if age > tolerance * 1000:
        raise WebhookRefused("too_old", "The webhook was sent too long ago.")
    if -age > tolerance * 1000:
        raise WebhookRefused("too_new", "The webhook claims to come from the future.")
