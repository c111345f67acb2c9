"""The end of a day: once a day, everywhere, also where clocks are set. Against a look at every minute."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from itertools import pairwise
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from flowstead.rules.digests import DigestTime, compose_text

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

MINUTE, DAY = 60_000, 86_400_000


def ms(text: str) -> int:
    """Epoch ms of an instant written with its offset."""
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def ends_after(at: str, zone: str, now: str, times: int = 1) -> list[str]:
    """The next so many ends of days, as the clocks of the zone show them."""
    digest, found = DigestTime(at=at, timezone=zone), [ms(now)]
    for _ in range(times):
        found.append(digest.next_after(found[-1]))
    tz = UTC if zone == "UTC" else ZoneInfo(zone)
    assert all(end % MINUTE == 0 for end in found[1:])
    return [
        datetime.fromtimestamp(end / 1000, tz).isoformat(timespec="minutes") for end in found[1:]
    ]


@pytest.mark.parametrize(
    ("at", "zone", "now", "then"),
    [
        ("18:00", "UTC", "2026-03-01T00:00Z", ["2026-03-01T18:00+00:00", "2026-03-02T18:00+00:00"]),
        ("18:00", "UTC", "2026-03-01T18:00Z", ["2026-03-02T18:00+00:00"]),
        ("00:00", "UTC", "2026-02-28T23:59Z", ["2026-03-01T00:00+00:00"]),
        ("23:59", "Asia/Kathmandu", "2026-01-01T18:13Z", ["2026-01-01T23:59+05:45"]),
        ("23:59", "Asia/Kathmandu", "2026-01-01T18:14Z", ["2026-01-02T23:59+05:45"]),
        # New York skips 02:00 to 03:00 on 8 March 2026, and shows 01:00 to 02:00 twice on 1 November.
        (
            "02:30",
            "America/New_York",
            "2026-03-07T08:00Z",
            ["2026-03-08T03:00-04:00", "2026-03-09T02:30-04:00"],
        ),
        ("02:17", "America/New_York", "2026-03-07T08:00Z", ["2026-03-08T03:00-04:00"]),
        ("02:00", "America/New_York", "2026-03-07T08:00Z", ["2026-03-08T03:00-04:00"]),
        ("03:00", "America/New_York", "2026-03-07T08:00Z", ["2026-03-08T03:00-04:00"]),
        (
            "01:30",
            "America/New_York",
            "2026-10-31T12:00Z",
            ["2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"],
        ),
        ("01:30", "America/New_York", "2026-11-01T05:59Z", ["2026-11-02T01:30-05:00"]),
        ("02:00", "America/New_York", "2026-10-31T12:00Z", ["2026-11-01T02:00-05:00"]),
        # Samoa left out 30 December 2011.
        (
            "18:00",
            "Pacific/Apia",
            "2011-12-29T00:00-10:00",
            ["2011-12-29T18:00-10:00", "2011-12-31T18:00+14:00"],
        ),
        ("00:00", "Pacific/Apia", "2011-12-29T12:00-10:00", ["2011-12-31T00:00+14:00"]),
        # São Paulo went from 24:00 to 01:00 in spring, and from 24:00 back to 23:00 in autumn.
        (
            "00:00",
            "America/Sao_Paulo",
            "2018-11-03T12:00-03:00",
            ["2018-11-04T01:00-02:00", "2018-11-05T00:00-02:00"],
        ),
        (
            "23:30",
            "America/Sao_Paulo",
            "2018-02-17T12:00-02:00",
            ["2018-02-17T23:30-02:00", "2018-02-18T23:30-03:00"],
        ),
        ("00:00", "America/Sao_Paulo", "2018-02-17T12:00-02:00", ["2018-02-18T00:00-03:00"]),
        # Lord Howe Island moves its clocks by half an hour.
        ("02:15", "Australia/Lord_Howe", "2026-10-03T12:00+10:30", ["2026-10-04T02:30+11:00"]),
        # Greenland skips the last hour of 28 March 2026: that day ends with what is left of it.
        (
            "23:30",
            "America/Nuuk",
            "2026-03-28T12:00-02:00",
            ["2026-03-29T00:00-01:00", "2026-03-29T23:30-01:00"],
        ),
    ],
)
def test_a_day_ends_at_its_time_also_where_clocks_are_set(
    at: str, zone: str, now: str, then: list[str]
) -> None:
    assert ends_after(at, zone, now, len(then)) == then


ZONES = (
    "America/New_York",
    "America/Sao_Paulo",
    "America/Nuuk",
    "Africa/Casablanca",
    "Asia/Kathmandu",
    "Asia/Gaza",
    "Australia/Lord_Howe",
    "Europe/Dublin",
    "Pacific/Apia",
    "Pacific/Kiritimati",
    "UTC",
)


@lru_cache
def set_clocks(zone: str) -> tuple[int, ...]:
    """The hours, epoch ms, in which the clocks of a zone were or will be set, from 1975 to 2045."""
    tz = ZoneInfo(zone)
    start, days = datetime(1975, 1, 1, tzinfo=UTC), 70 * 365
    offsets = [(start + timedelta(days=n)).astimezone(tz).utcoffset() for n in range(days)]
    return tuple(
        ms((start + timedelta(days=n)).isoformat())
        for n, (one, other) in enumerate(pairwise(offsets))
        if one != other
    )


def every_end(at: time, zone: str, now: int) -> list[int]:
    """The ends of all days about an instant: of each day that has any minute, the first minute not before `at`."""
    tz = ZoneInfo(zone)
    first = (now - 3 * DAY) // MINUTE
    minutes = range(first, first + 7 * DAY // MINUTE)
    shown = [datetime.fromtimestamp(m * 60, tz).replace(tzinfo=None) for m in minutes]
    days: set[date] = {clock.date() for clock in shown}
    ends = []
    for day in days:
        wanted = datetime.combine(day, at)
        index = next((n for n, clock in enumerate(shown) if clock >= wanted), 0)
        if index:
            ends.append(minutes[index] * MINUTE)
    return sorted(ends)


@st.composite
def moments(draw: st.DrawFn) -> tuple[str, time, int]:
    """A zone, a time, and an instant; mostly near a day on which clocks are set."""
    zone = draw(st.sampled_from(ZONES))
    at = draw(st.builds(time, st.sampled_from([0, 0, 1, 2, 2, 3, 18, 22, 23]), st.integers(0, 59)))
    near = set_clocks(zone)
    if near and draw(st.integers(0, 4)):
        return zone, at, draw(st.sampled_from(near)) + draw(st.integers(-2 * DAY, 2 * DAY))
    return zone, at, draw(st.integers(ms("1975-01-01T00:00Z"), ms("2200-01-01T00:00Z")))


@given(moments())
@example(("Pacific/Apia", time(12), ms("2011-12-30T10:00Z")))
@example(("Pacific/Kiritimati", time(0), ms("1994-12-31T10:00Z")))
@settings(PROFILE, max_examples=120)
def test_the_next_end_of_a_day_is_the_first_that_a_look_at_every_minute_finds(
    moment: tuple[str, time, int],
) -> None:
    zone, at, now = moment
    expected = next(end for end in every_end(at, zone, now) if end > now)

    found = DigestTime(at=at.isoformat("minutes"), timezone=zone).next_after(now)

    assert found == expected


def test_the_property_looks_at_days_on_which_clocks_are_set() -> None:
    assert all(set_clocks(zone) for zone in ZONES if zone not in {"UTC"})


@given(moments())
@settings(PROFILE, max_examples=200)
def test_an_end_of_a_day_lies_ahead_and_is_its_own_successor_to_nobody(
    moment: tuple[str, time, int],
) -> None:
    zone, at, now = moment
    digest = DigestTime(at=at.isoformat("minutes"), timezone=zone)

    end = digest.next_after(now)

    assert now < end <= now + 3 * DAY
    assert digest.next_after(end - 1) == end
    assert digest.next_after(now + (end - now) // 2) == end
    assert digest.next_after(end) > end


@pytest.mark.parametrize(
    "at",
    [
        "",
        "18",
        "6:00",
        "18:0",
        "1\u00b2:00",
        "18:60",
        "24:00",
        "-1:00",
        "18:00:00",
        "18.00",
        " 18:00",
        "18:00\n",
        "\u0661\u0668:00",
        "1a:00",
        "+8:00",
    ],
)
def test_a_time_that_no_clock_shows_is_misuse(at: str) -> None:
    with pytest.raises(ValueError, match=r"^at is .*must be a time from"):
        DigestTime(at=at)


@pytest.mark.parametrize(
    "zone",
    [
        "",
        "Mars/Olympus",
        "America",
        "../etc/passwd",
        "/etc/passwd",
        "utc ",
        "\0",
        "x" * 10_000,
        "Europe/Berlin\n",
    ],
)
def test_a_zone_that_is_not_known_is_misuse(zone: str) -> None:
    with pytest.raises(ValueError, match=r"^timezone is .*not known here") as raised:
        DigestTime(timezone=zone)

    assert len(str(raised.value)) < 200


def test_a_digest_time_is_checked_when_it_is_read_too() -> None:
    stored = msgspec.json.encode(DigestTime(at="07:30", timezone="Asia/Kathmandu"))

    assert msgspec.json.decode(stored, type=DigestTime) == DigestTime(
        at="07:30", timezone="Asia/Kathmandu"
    )
    with pytest.raises(msgspec.ValidationError, match="must be a time"):
        msgspec.json.decode(b'{"at":"25:00"}', type=DigestTime)


def test_utc_needs_no_data_about_zones(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_data(key: str) -> ZoneInfo:
        raise LookupError(key)

    monkeypatch.setattr("flowstead.rules.digests.ZoneInfo", no_data)

    assert DigestTime().next_after(0) == 18 * 3_600_000


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "daily: 1 update."), (2, "daily: 2 updates."), (100, "daily: 100 updates.")],
)
def test_a_digest_opens_with_how_much_there_is(count: int, text: str) -> None:
    assert compose_text("daily", count) == text
