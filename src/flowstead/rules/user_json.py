"""User JSON at the door: encoded once, or refused with the path of the first value that JSON cannot hold.

The encoder alone is not enough: it would store NaN as null, dates as text and sets as lists, so a value
would change by being saved. The walk refuses all of that, and counts what it visits, so that neither a
cycle nor a list shared a million times over can keep it busy.

Naming paths makes the walk slow, so a quick look comes first: it says yes to what nearly everybody passes, and
leaves everything else, good or bad, to the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

import msgspec

from flowstead.model.code import Code
from flowstead.model.command import Defect, Encoded
from flowstead.model.flow import Json


def plain(value: Any) -> Any:
    """A scalar of a subclass (`Markup`, `numpy.str_`, …) as the plain value it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return "".join(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise TypeError(type(value).__qualname__)


_encode = msgspec.json.Encoder(enc_hook=plain).encode
_PLAIN = frozenset({str, int, bool, type(None)})


class _NotJson(Exception):
    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem


def encode_json(value: Json, *, name: str, max_bytes: int, max_depth: int) -> Encoded:
    """Encode a value for the store, or say what is wrong with it and where.

    Args:
        value: What the caller gave.
        name: How the caller knows it, the root of the path in the reason: `state_json["report"][3]`.
        max_bytes: Largest encoded size accepted.
        max_depth: Deepest nesting accepted; a value that contains itself is deeper than any.
    """
    try:
        if _spare(value, max_bytes, max_depth) < 0:
            _Walk(max_bytes, max_depth).visit(value, name, 0)
        encoded = _encode(value)
    except _NotJson as found:
        return Defect(Code.INVALID_STATE, f"{found.path} {found.problem} Nothing was written.")
    except UnicodeEncodeError:
        path = _find(value, name, lambda part: isinstance(part, str) and not is_encodable(part))
        problem = f"{path} holds a lone surrogate, which UTF-8 cannot carry. Nothing was written."
        return Defect(Code.INVALID_STATE, problem)
    except ValueError:
        path = _find(value, name, lambda part: isinstance(part, int) and _is_too_long(part))
        return Defect(Code.INVALID_STATE, f"{path} has too many digits. Nothing was written.")
    except _TooLarge:
        return _too_large(name, f"more than {max_bytes}", max_bytes)
    except Exception as error:
        # A value whose own methods misbehave; whatever it is, it cannot be kept.
        problem = f"{name} cannot be encoded ({_named(error)}). Nothing was written."
        return Defect(Code.INVALID_STATE, problem)
    if len(encoded) > max_bytes:
        return _too_large(name, str(len(encoded)), max_bytes)
    return msgspec.Raw(encoded)


def _spare(value: Any, left: int, depth: int) -> int:
    """What is left of a size after a value of nothing but plain JSON; negative where the walk must say.

    Written out for speed: every state passes here, and a helper called for each part would double its price.
    """
    kind = type(value)
    if kind is dict and depth:
        left -= len(value) + 1
        for key, part in value.items():
            if type(key) is not str:
                return -1
            left -= len(key)
            kind = type(part)
            if kind is str:
                left -= len(part)
            elif kind is dict or kind is list:
                if (left := _spare(part, left, depth - 1)) < 0:
                    return -1
            elif kind not in _PLAIN and not (kind is float and isfinite(part)):
                return -1
    elif kind is list and depth:
        left -= len(value) + 1
        for part in value:
            kind = type(part)
            if kind is str:
                left -= len(part)
            elif kind is dict or kind is list:
                if (left := _spare(part, left, depth - 1)) < 0:
                    return -1
            elif kind not in _PLAIN and not (kind is float and isfinite(part)):
                return -1
    else:
        return -1
    return left


class _TooLarge(Exception):
    """More values than the byte limit has room for."""


class _Walk:
    """One pass over a value. Values take a byte at least, and texts their length, so the limit bounds it all."""

    def __init__(self, max_values: int, max_depth: int) -> None:
        self._left = max_values
        self._max_depth = max_depth

    def visit(self, value: Any, path: str, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN:
            return
        if kind is float or isinstance(value, float):
            if not isfinite(value):
                raise _NotJson(path, f"is {value}, which JSON would store as null.")
        elif kind is dict or isinstance(value, dict):
            self._enter(path, depth, len(value))
            for key, item in value.items():
                if type(key) is not str and not isinstance(key, str):
                    problem = f"has a key of type {_named(key)}; JSON keys are strings."
                    raise _NotJson(path, problem)
                self._left -= len(key)
                if type(item) is str:
                    self._left -= len(item)
                elif type(item) not in _PLAIN:
                    self.visit(item, f"{path}[{_shown(key)}]", depth + 1)
            self._check_size()
        elif isinstance(value, (list, tuple)):
            self._enter(path, depth, len(value))
            for index, item in enumerate(value):
                if type(item) is str:
                    self._left -= len(item)
                elif type(item) not in _PLAIN:
                    self.visit(item, f"{path}[{index}]", depth + 1)
            self._check_size()
        elif not isinstance(value, (str, int)):
            raise _NotJson(path, f"is of type {_named(value)}, which is not a JSON value.")

    def _enter(self, path: str, depth: int, length: int) -> None:
        if depth >= self._max_depth:
            where = path if len(path) < 80 else path[:77] + "..."
            raise _NotJson(
                where, f"is nested deeper than {self._max_depth} levels, or contains itself."
            )
        self._left -= length + 1
        self._check_size()

    def _check_size(self) -> None:
        if self._left < 0:
            raise _TooLarge


def _too_large(name: str, size: str, max_bytes: int) -> Defect:
    return Defect(
        Code.STATE_TOO_LARGE,
        f"{name} takes {size} bytes; the limit is {max_bytes}. Keep large objects elsewhere and store"
        " a reference. Nothing was written.",
    )


def _named(value: object) -> str:
    """The type of a value, fit for a sentence whatever its author called it."""
    try:
        name = str.__str__(type(value).__qualname__)
    except Exception:
        return "an unnamed type"
    return ascii(name)[1:-1][:80]


def _shown(key: str) -> str:
    return ascii(key if len(key) <= 40 else key[:37] + "...")


def _find(value: Any, path: str, is_bad: Callable[[Any], bool]) -> str:
    """The path of the first scalar that is bad; the value is known to be a finite tree."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        parts = value.items()
        for key in value:
            if is_bad(key):
                return f"{path}: the key {_shown(key)}"
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif is_bad(value):
        return path
    for key, part in parts:
        shown = _shown(key) if isinstance(key, str) else key
        if found := _find(part, f"{path}[{shown}]", is_bad):
            return found
    return ""


def _is_too_long(number: int) -> bool:
    try:
        str(number)
    except ValueError:
        return True
    return False


def is_encodable(text: str) -> bool:
    """Whether the text can be stored: it holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
