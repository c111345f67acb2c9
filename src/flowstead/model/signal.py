"""The signal: news from outside that a wait is answered by, and what became of it."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.values import Whole


class StoredSignal(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False
):
    """A signal as the runtime keeps it: one that nobody waited for yet, or one whose id must not count twice.

    `wait_key` says what it answers, `signal_id` is the sender's own id for it. `taken_by` names a flow that it was
    handed to, once it was; it is empty where a signal has expired, or was turned away: that one has lost its id, so
    that a better one may have it.
    """

    key: Whole
    owner_key: str
    wait_key: str
    signal_id: str | None = None
    payload: Raw | UnsetType = UNSET
    received_at: Whole
    expires_at: Whole | None = None
    taken_by: str | None = None


class SignalCode(StrEnum):
    """What became of a signal."""

    MATCHED = "matched"
    KEPT = "kept"
    LATE = "late"
    DUPLICATE = "duplicate"
    UNAWAITED = "unawaited"
    WRONG_SHAPE = "wrong_shape"
    NOT_FOUND = "not_found"
