"""The digest: when a day ends, for somebody somewhere, and what is said then, in how many messages. Pure: the
instant is given.

A day ends once, also on the days on which clocks are set: at a time that they skip, it ends as soon as they have
skipped it, and at one that they show twice, the first time. A day that a zone leaves out altogether has no end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from msgspec import UNSET, Raw

from flowstead.model.update import StoredUpdate

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)


class DigestTime(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """When a day ends: `at` this time, "HH:MM", on the clocks of `timezone`.

    Raises:
        TypeError: One of them is no string.
        ValueError: No such time, or no such zone.
    """

    at: str = "18:00"
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        for name, value in (("at", self.at), ("timezone", self.timezone)):
            if not isinstance(value, str):
                raise TypeError(f"DigestTime.{name} must be a string, not {value!r:.40}.")
        _time_of(self.at)
        _zone_of(self.timezone)

    def next_after(self, now_ms: int) -> int:
        """Answer the first end of a day strictly after an instant; both are epoch ms."""
        at, zone = _time_of(self.at), _zone_of(self.timezone)
        # The clocks of a zone are never further from UTC than a day.
        day = (_EPOCH + timedelta(milliseconds=now_ms)).date() - 2 * _DAY
        while True:
            ends = _end_of(day, at, zone)
            if (
                ends is not None
                and (ends_ms := (ends - _EPOCH) // timedelta(milliseconds=1)) > now_ms
            ):
                return ends_ms
            day += _DAY


def _end_of(day: date, at: time, zone: tzinfo) -> datetime | None:
    """The instant at which a day ends, in UTC; None for a day that the zone leaves out."""
    wanted = datetime.combine(day, at)
    ends = _utc(wanted, zone, fold=0)
    if _clock(ends, zone) == wanted:
        return ends
    # The clocks skip that time. They are put forward after `before`, and not later than at `ends`.
    before = _utc(wanted, zone, fold=1)
    while ends - before > _SECOND:
        middle = before + (ends - before) // _SECOND // 2 * _SECOND
        if _clock(middle, zone) < wanted:
            before = middle
        else:
            ends = middle
    is_left_out = _clock(before, zone).date() < day < _clock(ends, zone).date()
    return None if is_left_out else ends


def _utc(clock: datetime, zone: tzinfo, *, fold: int) -> datetime:
    return clock.replace(tzinfo=zone, fold=fold).astimezone(UTC)


def _clock(instant: datetime, zone: tzinfo) -> datetime:
    """What clocks of the zone show."""
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def _time_of(at: str) -> time:
    hours, colon, minutes = at[:2], at[2:3], at[3:]
    is_written_so = (
        at.isascii() and hours.isdigit() and minutes.isdigit() and colon == ":" and len(at) == 5
    )
    if not is_written_so or hours > "23" or minutes > "59":
        raise ValueError(f'at is {_shown(at)}; it must be a time from "00:00" to "23:59".')
    return time(int(hours), int(minutes))


def _zone_of(timezone: str) -> tzinfo:
    if timezone == "UTC":
        # The one zone that needs no data about zones on this machine.
        return UTC
    try:
        return ZoneInfo(timezone)
    except (LookupError, ValueError, OSError) as error:
        raise ValueError(
            f'timezone is {_shown(timezone)}, which is not known here; "Europe/Berlin" would be one.'
        ) from error


class Part(NamedTuple):
    """What goes out as one message: the items, and what it tells of them, a JSON array."""

    items: list[StoredUpdate]
    told: Raw


def parted(items: Iterable[StoredUpdate], *, most: int, most_bytes: int) -> Iterator[Part]:
    """Items in their order, so many to a message; one that is longer than a message may be is one by itself."""
    part, told, size = list[StoredUpdate](), list[bytes](), 0
    for item in items:
        shown = _shown_item(item)
        if part and (len(part) >= most or size + len(shown) > most_bytes):
            yield Part(part, _array(told))
            part, told, size = [], [], 0
        part.append(item)
        told.append(shown)
        size += len(shown)
    if part:
        yield Part(part, _array(told))


def _shown_item(item: StoredUpdate) -> bytes:
    data = Raw(b"null") if item.data is UNSET else item.data
    return msgspec.json.encode({"flowId": item.flow_id, "text": item.text, "data": data})


def _array(told: list[bytes]) -> Raw:
    return Raw(b"[" + b",".join(told) + b"]")


def compose_text(bucket: str, count: int) -> str:
    """Answer the sentence a digest opens with."""
    return f"{bucket}: {count} {'update' if count == 1 else 'updates'}."


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:37] + "...")
