"""What callers may pass: checked at the door, before anything is queued. Misuse raises, and changes nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from math import isfinite
from typing import Final, TypeVar

from msgspec import UNSET, UnsetType

from flowstead.model.retry import Retry
from flowstead.model.wait import RESERVED
from flowstead.rules.user_json import is_encodable, plain

E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")

_TEN_YEARS: Final = 10 * 365 * 24 * 3600
_LARGEST: Final = 2**63 - 1
_LONGEST_ID: Final = 256
_LONGEST_OWNER_BYTES: Final = 512
_LONGEST_TEXT_BYTES: Final = 4096
_LONGEST_INSTRUCTION_BYTES: Final = 256 * 1024


def text(
    value: object,
    name: str,
    *,
    missing: str | None = None,
    longest: int = _LONGEST_TEXT_BYTES,
) -> str:
    """A text that is not blank, trimmed, and can be stored.

    Raises:
        TypeError: It is not a string.
        ValueError: It is blank (with the sentence `missing`), too long, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {_kind(value)}.")
    trimmed = value.strip()
    if not trimmed:
        raise ValueError(missing or f"{name} must not be blank.")
    if not is_encodable(trimmed):
        raise ValueError(f"{name} holds a lone surrogate, which cannot be stored.")
    if len(trimmed.encode()) > longest:
        raise ValueError(f"{name} is longer than {longest} bytes.")
    return trimmed


def instruction(value: object, name: str) -> str:
    """What a child is told to do: a text with room for a whole prompt."""
    return text(value, name, longest=_LONGEST_INSTRUCTION_BYTES)


def optional_text(value: object, name: str) -> str | None:
    """A text, or None for None and for blank."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text(value, name)


def patched_text(value: object, name: str) -> str | UnsetType | None:
    """A text to set, None to clear, UNSET to leave alone."""
    return UNSET if value is UNSET else optional_text(value, name)


def identifier(value: object, name: str) -> str:
    """A caller's own id: printable, without spaces at its ends, not too long."""
    found = text(value, name)
    if len(found) > _LONGEST_ID or not found.isprintable():
        raise ValueError(f"{name} must be printable and at most {_LONGEST_ID} characters long.")
    return found


def lookup(value: object, name: str) -> str | None:
    """An id to look for. None if no stored id can be equal to it."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {_kind(value)}.")
    return value if value and is_encodable(value) else None


def owner_key(value: object, missing: str) -> str:
    """An owner: compared byte by byte, so it must have one spelling only."""
    found = text(value, "session_key", missing=missing)
    if len(found.encode()) > _LONGEST_OWNER_BYTES:
        raise ValueError(f"session_key is longer than {_LONGEST_OWNER_BYTES} bytes.")
    return _of_one_spelling(found, "session_key")


def identity(value: object, name: str) -> str:
    """Somebody, or a role: compared byte by byte, so it must have one spelling only."""
    return _of_one_spelling(text(value, name), name)


def optional_identity(value: object, name: str) -> str | None:
    """Somebody, or a role; None for None and for blank."""
    found = optional_text(value, name)
    return None if found is None else _of_one_spelling(found, name)


def _of_one_spelling(found: str, name: str) -> str:
    if not found.isprintable() or unicodedata.normalize("NFC", found) != found:
        raise ValueError(f"{name} must be printable and in Unicode normal form C.")
    return found


def revision(value: object) -> int:
    """An expected revision: a whole number, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected_revision must be an int, not {_kind(value)}.")
    if value < 0:
        raise ValueError("expected_revision must be 0 or more.")
    return value


def optional_revision(value: object) -> int | None:
    """An expected revision, or None to take the flow as it is."""
    return None if value is None else revision(value)


def instant(value: object, name: str) -> int | None:
    """Epoch milliseconds, or None."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise TypeError(f"{name} must be epoch milliseconds as an int, not {value!r:.40}.")
    return value


def seconds(value: object, name: str) -> float | None:
    """A positive duration in seconds, or None."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not {_kind(value)}.")
    if not 0 < value <= _TEN_YEARS:
        raise ValueError(f"{name} must be a positive number of seconds, ten years at most.")
    return float(value)


def duration(value: object, name: str) -> float:
    """A positive duration in seconds."""
    found = seconds(value, name)
    if found is None:
        raise TypeError(f"{name} must be a number of seconds, not None.")
    return found


def given(value: object, kind: type[T], name: str) -> T | None:
    """One of a class of ours, or None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} must be a flowstead.{kind.__name__}, not {value!r:.40}.")
    return value


def retry(value: object) -> Retry | None:
    """A retry policy, or None."""
    if value is not None and not isinstance(value, Retry):
        raise TypeError(f"retry must be a flowstead.Retry, not {_kind(value)}.")
    return value


def retry_once_or_more(value: object, *, idempotent: bool) -> Retry | None:
    """A retry policy, or None; no second attempt for what must not be done twice."""
    found = retry(value)
    if found is not None and found.max_attempts > 1 and not idempotent:
        raise ValueError("idempotent=False allows no second attempt; leave retry out.")
    return found


def flag(value: object, name: str) -> bool:
    """True or False: nothing that only counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {_kind(value)}.")
    return value


def optional_count(value: object, name: str) -> int | None:
    """A whole number, 1 or more, or None."""
    return None if value is None else count(value, name)


def count(value: object, name: str) -> int:
    """A whole number, 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {_kind(value)}.")
    if not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be 1 or more, and fit 63 bits.")
    return value


def optional_sequence_number(value: object, name: str) -> int | None:
    """A number to resume after, 0 for the very beginning, None for now."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {_kind(value)}.")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{name} must be 0 or more, and fit 63 bits.")
    return value


def choice(value: object, kind: type[E], name: str, allowed: Collection[E] | None = None) -> E:
    """One of the words of an enumeration.

    Raises:
        ValueError: It is none of them; the message lists them.
    """
    found = None
    if isinstance(value, str):
        try:
            found = kind(value)
        except ValueError:
            pass
    if found is not None and (allowed is None or found in allowed):
        return found
    listed = ", ".join(word.value for word in (kind if allowed is None else allowed))
    raise ValueError(f"{name} must be one of {listed}; got {value!r:.80}.")


def choices(value: object, kind: type[E], name: str) -> tuple[E, ...]:
    """None, one word or several words of an enumeration."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (choice(value, kind, name),)
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a string or several, not {_kind(value)}.")
    return tuple(choice(word, kind, name) for word in value)


def wait_fields(key: object, more: Mapping[str, object]) -> dict[str, object] | None:
    """What a signal must name, or None for nothing: plain values, because they are compared as a whole."""
    fields = {**(mapping_or_none(key, "key") or {}), **more}
    for name, value in fields.items():
        if not isinstance(name, str) or not is_encodable(name):
            raise TypeError(f"a wait's field must be named by a string, not {_kind(name)}.")
        if name in RESERVED:
            raise ValueError(
                f"{name!r} says how to wait, not for what; it cannot be part of a key."
            )
        if not isinstance(value, (str, int, float)):
            raise TypeError(f"{name} must be a string, a number or a boolean, not {_kind(value)}.")
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{name} must be finite.")
        if isinstance(value, str) and not is_encodable(value):
            raise ValueError(f"{name} holds a lone surrogate, which cannot be stored.")
    return {plain(name): plain(value) for name, value in fields.items()} or None


def names(value: object, name: str) -> tuple[str, ...]:
    """Several names of people or roles, none of them blank."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be several strings, not {_kind(value)}.")
    return tuple(identity(each, name) for each in value)


def quorums(value: object, name: str) -> dict[str, int]:
    """How many of each name are needed, where a mapping says so."""
    if not isinstance(value, Mapping):
        return {}
    return dict(zip(names(value, name), (count(n, name) for n in value.values()), strict=True))


def reminders(value: object, deadline: int | None, now: int) -> tuple[int, ...]:
    """Seconds before a deadline as instants, epoch ms, in order; those already past are left out."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"remind must be several numbers of seconds, not {_kind(value)}.")
    before = [duration(each, "remind") for each in value]
    if before and deadline is None:
        raise ValueError("remind counts back from a deadline; give one.")
    instants = {(deadline or 0) - round(seconds * 1000) for seconds in before}
    return tuple(sorted(at for at in instants if at > now))


def mapping_or_none(value: object, name: str) -> Mapping[str, object] | None:
    """A mapping, or None."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, not {_kind(value)}.")
    return value


def _kind(value: object) -> str:
    return type(value).__qualname__
