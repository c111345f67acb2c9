"""Time and ids come in through two small ports, so that tests can own them."""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Final, Protocol

if sys.version_info >= (3, 14):
    from uuid import uuid7  # pragma: no cover - one of the two, as the Python goes
else:
    from uuid_utils import uuid7  # pragma: no cover - one of the two, as the Python goes

_LONGEST_SECONDS: Final = 60.0


class Handle(Protocol):
    """A callback that has been put off."""

    def cancel(self) -> None:
        """Do not call it any more. Cancelling late is fine."""
        ...


class Clock(Protocol):
    """What time it is, and two ways to be called later. Inherit from it to have `call_at`."""

    def now(self) -> int:
        """Epoch milliseconds."""
        ...

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        """Call back on the event loop after so many seconds."""
        ...

    def call_at(self, at: int, callback: Callable[[], object]) -> Handle:
        """Call back on the event loop at this instant, epoch ms, or before: ask `now` what time it is.

        As it stands here within a minute: `now` may be put forward or back while `call_later` counts on.
        """
        delay = min(max(0, at - self.now()) / 1000, _LONGEST_SECONDS)
        return self.call_later(delay, callback)


class SystemClock(Clock):
    """Wall time for instants, the event loop's monotonic time for durations."""

    def now(self) -> int:
        return time.time_ns() // 1_000_000

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        return asyncio.get_running_loop().call_later(seconds, callback)


def monotonic() -> float:
    """Seconds that only grow, for what is measured in earnest and from several threads."""
    return time.monotonic()


class Ids(Protocol):
    """Names for new things, and chance."""

    def flow_id(self, controller_id: str, now: int) -> str:
        """A flow id that says what it is and that nobody has."""
        ...

    def task_id(self) -> str:
        """A task id that nobody has."""
        ...

    def chance(self) -> float:
        """A number in [0, 1)."""
        ...

    def token(self) -> str:
        """A secret that nobody can guess, fit for a URL."""
        ...


_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"


class SystemIds:
    """Random ids: `inbox-triage-20261122T031502123-k3v9q2p7` for flows, UUIDv7 for tasks."""

    def flow_id(self, controller_id: str, now: int) -> str:
        second, millisecond = divmod(now, 1000)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(second))
        bits = uuid7().int  # its low 62 bits are random
        suffix = "".join([_ALPHABET[bits >> shift & 31] for shift in range(0, 40, 5)])
        return f"{slug(controller_id)}-{stamp}{millisecond:03d}-{suffix}"

    def task_id(self) -> str:
        return str(uuid7())

    def chance(self) -> float:
        return random.random()

    def token(self) -> str:
        return secrets.token_urlsafe(32)


@lru_cache(maxsize=256)
def slug(controller_id: str) -> str:
    """The last part of a controller's name, fit for an id: `my-plugin/Inbox Triage` → `inbox-triage`."""
    last = controller_id.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40] or "flow"
