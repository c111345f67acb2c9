"""A notifier that outlives the process it serves, and is not always well: what it delivers stays in a file.

What becomes of an update is written in its idempotency key, so that whoever looks at the file afterwards can say
what had to become of it. A line is on the disk before the carrier says that it has the update.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, Final

from flowstead import Fatal, Retry, Transient
from flowstead.model.update import Update

DELIVERIES: Final = Retry(max_attempts=3, initial=0.02, factor=2.0, max_delay=0.05, jitter=0.0)
_MOODS: Final = {
    0: "late",  # it does not take the first one
    1: "forgetful",  # it takes the first one, and says that it did not
    2: "never",
    3: "hopeless",
    4: "slow",
    5: "slow",
}


def mood_of(key: str) -> str:
    """What becomes of an update with this idempotency key."""
    return _MOODS.get(int(key[-4:], 16) % 40, "well")


def is_deliverable(key: str) -> bool:
    """Whether an update with this idempotency key can arrive at all."""
    return mood_of(key) not in ("never", "hopeless")


class Carrier:
    """Takes updates to a file; if told one mood, all of them in that one."""

    def __init__(self, path: str, *, mood: str | None = None) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._mood = mood

    async def send(self, update: Update) -> None:
        """Take an update, or not, as its key says."""
        mood = self._mood or mood_of(update.idempotency_key)
        is_first = update.attempt == 1
        if mood == "hopeless":
            raise Fatal("nobody lives here")
        if mood == "never" or (mood == "late" and is_first):
            raise Transient("nobody is at home", retry_after=0.01)
        line = {
            "key": update.idempotency_key,
            "kind": update.kind,
            "flow": update.flow_id,
            "status": update.flow_status,
            "revision": update.revision,
            "text": update.text,
        }
        # What a kill has cut off must not spoil what comes after it.
        await asyncio.to_thread(self._write, b"\n" + json.dumps(line).encode() + b"\n")
        if mood == "slow":
            await asyncio.sleep(0.03)
        if mood == "forgetful" and is_first:
            raise ConnectionResetError("the line went dead")

    def _write(self, line: bytes) -> None:
        os.write(self._descriptor, line)
        os.fsync(self._descriptor)


def read_delivered(path: Path | str) -> list[dict[str, Any]]:
    """What has arrived, in order, as often as it did; a line cut off by a kill does not count."""
    try:
        told = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in told.split(b"\n") if line.endswith(b"}")]
