"""What a wait is known by: its plain fields, and the digest of them that an index can hold.

Two waits are for the same thing if they have the same fields with the same values, compared as JSON: 1 is not 1.0,
and no text is normalised. The owner is part of the digest, so a stranger's key is another key.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.flow import Json
from flowstead.model.wait import RESERVED, Wait

_canonical = msgspec.json.Encoder(order="deterministic").encode
_PLAIN = (str, int, float)  # bool is an int


def plain_fields(wait_json: Json) -> dict[str, Json] | None:
    """The fields a signal must name to answer this wait; None if it has none."""
    if not isinstance(wait_json, Mapping):
        return None
    fields = {
        name: value
        for name, value in wait_json.items()
        if name not in RESERVED and isinstance(value, _PLAIN)
    }
    return fields or None


def wait_key(owner_key: str, fields: Mapping[str, Json]) -> str:
    """The digest under which a wait of this owner is found."""
    return sha256(_canonical([owner_key, dict(fields)])).hexdigest()


def wait_key_in(owner_key: str, wait_json: Raw | UnsetType) -> str | None:
    """The digest of a stored `wait_json`; None where it has no plain fields."""
    if wait_json is UNSET:
        return None
    fields = plain_fields(msgspec.json.decode(wait_json))
    return None if fields is None else wait_key(owner_key, fields)


def own_token(owner_key: str, flow_id: str, secret: str) -> str:
    """A token for a wait of the flow itself. All of one flow begin alike, so that each leads to it for good."""
    place = sha256(_canonical([owner_key, flow_id])).hexdigest()[:32]
    return f"{place}.{secret}"


def place_digest(token: str) -> str:
    """What an index holds of a token of the flow itself; one from before they began alike is all of it."""
    return token_digest(token.partition(".")[0])


def place_digest_of(wait: Wait | None) -> str | None:
    """What an index holds of the token of a flow's own wait, if it has one."""
    return None if wait is None or wait.token is None else place_digest(wait.token)


def token_digest(token: str) -> str:
    """What is kept in an index of a token, so that the index alone does not give it away."""
    return sha256(token.encode()).hexdigest()


def token_digest_of(wait: Wait | None) -> str | None:
    """The digest of a wait's token, if it has one."""
    return None if wait is None or wait.token is None else token_digest(wait.token)


def number_in(wait: Mapping[str, Any], name: str) -> int | None:
    """An instant in a `wait_json`, epoch ms, if it is one."""
    value = wait.get(name)
    is_instant = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if is_instant else None
