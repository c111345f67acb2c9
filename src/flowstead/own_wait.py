"""The wait of a flow itself, as the ledger face gives it: a `wait_json` whose reserved fields say how to wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.engine.engine import Engine
from flowstead.model.code import Code
from flowstead.model.command import Defect, Encoded
from flowstead.model.flow import FlowKey, Json
from flowstead.model.wait import OnTimeout, Wait, WaitKind
from flowstead.rules import shapes, wait_keys
from flowstead.store import codec

_ON_TIMEOUT = ", ".join(OnTimeout)


def own_wait(engine: Engine, key: FlowKey, wait_json: Encoded | UnsetType) -> Wait | Defect | None:
    """How this wait is answered; None for no wait, a defect where a reserved field makes no sense."""
    if isinstance(wait_json, Defect):
        return wait_json
    # What is stored, not what was given: the key is that of the row.
    given = codec.decode_json(wait_json)
    if given is None:
        return None
    fields = given if isinstance(given, Mapping) else {}
    try:
        return _wait(engine, key, fields)
    except _Senseless as found:
        return Defect(Code.INVALID_STATE, f"wait_json{found} Nothing was written.")


class _Senseless(Exception):
    pass


def _wait(engine: Engine, key: FlowKey, fields: Mapping[Any, Json]) -> Wait:
    wake_at, deadline_at = _instant(fields, "wakeAt"), _instant(fields, "deadlineAt")
    if wake_at is not None and deadline_at is not None:
        raise _Senseless(' has both "wakeAt" and "deadlineAt".')
    on_timeout = fields.get("onTimeout", OnTimeout.FAIL if wake_at is None else OnTimeout.RESUME)
    if on_timeout not in tuple(OnTimeout):
        raise _Senseless(f'["onTimeout"] must be one of {_ON_TIMEOUT}.')
    prompt = fields.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise _Senseless('["prompt"] must be a string.')
    plain = wait_keys.plain_fields(fields)
    return Wait(
        kind=WaitKind.SIGNAL,
        wait_key=None if plain is None else wait_keys.wait_key(key.owner_key, plain),
        token=wait_keys.own_token(key.owner_key, key.flow_id, engine.ids.token()),
        prompt=prompt,
        schema=_schema(fields.get("schema")),
        deadline_at=deadline_at if wake_at is None else wake_at,
        on_timeout=OnTimeout(on_timeout),
        remind_at=_reminders(fields),
    )


def _instant(fields: Mapping[Any, Json], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and wait_keys.number_in(fields, name) is None:
        raise _Senseless(f'["{name}"] must be epoch milliseconds.')
    return value


def _reminders(fields: Mapping[Any, Json]) -> tuple[int, ...]:
    given = fields.get("remindAt", [])
    several = given if isinstance(given, (list, tuple)) else [given]
    for value in several:
        if wait_keys.number_in({"remindAt": value}, "remindAt") is None:
            raise _Senseless('["remindAt"] must be epoch milliseconds, or a list of them.')
    return tuple(sorted(set(several)))


def _schema(given: Json) -> Raw | UnsetType:
    if given is None:
        return UNSET
    try:
        return Raw(msgspec.json.encode(shapes.schema_of(given)))
    except (TypeError, ValueError) as error:
        raise _Senseless(f'["schema"]: {error}') from error
