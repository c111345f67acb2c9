"""A channel to the owners of flows: it is outside, so it outlives processes, and it cannot be relied on.

What it does with an update is drawn from a seed: it takes it, at once or after a while; refuses it, for now or for
ever; takes it and loses the answer; takes it twice; or never answers. Whoever receives keeps the idempotency keys,
so that he sees each update once.
"""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import TYPE_CHECKING, Any, Final

from flowstead import Fatal, Retry, Transient
from flowstead.model.update import Update
from flowstead.rules.digests import DigestTime

if TYPE_CHECKING:
    from tests.simulation.machine import World

DELIVERIES: Final = Retry(max_attempts=4, initial=1.0, factor=2.0, jitter=0.0)
DIGEST_MS: Final = 20_000
_ASKED_TO_WAIT: Final = 5.0
_WAYS: Final = (
    "take", "take", "take", "take", "slow", "slow", "refuse", "refuse", "drop", "drop", "double", "hang", "wait",
    "fatal",
)  # fmt: skip


class OftenDigest(DigestTime, frozen=True):
    """Days that last for some seconds."""

    def next_after(self, now_ms: int) -> int:
        return (now_ms // DIGEST_MS + 1) * DIGEST_MS


class Channel:
    """A notifier, and whoever receives what it brings."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._random = Random(seed + 3)
        self.is_well = False
        """Whether it takes everything from here on."""
        self.received: dict[str, Update] = {}
        """What has arrived, each once: the first of its key."""
        self._known_since: dict[str, int] = {}
        """How often the disk had lost its newest commits when an update arrived."""
        self._under_way: dict[tuple[str, str], str] = {}
        """The update that is being sent for a flow, by the present process."""
        self._not_before: dict[str, tuple[float, int]] = {}
        """When an update that was refused may come again, and which attempt that was."""

    def bury(self) -> None:
        """The process that was sending has ended."""
        self._under_way.clear()

    async def send(self, update: Update) -> None:
        """Take an update, or not."""
        world, process = self._world, self._world.process
        is_ours = process in world.processes and not world.overtaken
        named = (update.owner_key, update.flow_id)
        if is_ours:
            self._check(update)
            if update.kind != "digest":
                self._under_way[named] = update.idempotency_key
        try:
            await self._do(update)
        finally:
            if process in world.processes and self._under_way.get(named) == update.idempotency_key:
                del self._under_way[named]

    async def _do(self, update: Update) -> None:
        world = self._world
        self._not_before.pop(update.idempotency_key, None)
        way = "take" if self.is_well else self._random.choice(_WAYS)
        world.seen[f"channel {way}"] += 1
        match way:
            case "slow":
                await asyncio.sleep(self._random.choice((0.01, 0.5, 2.0)))
            case "refuse":
                raise ConnectionError("nobody is there")
            case "fatal":
                raise Fatal("no such address")
            case "wait":
                self._not_before[update.idempotency_key] = (
                    world.seconds + _ASKED_TO_WAIT,
                    update.attempt,
                )
                raise Transient("not now", retry_after=_ASKED_TO_WAIT)
            case "hang":
                await asyncio.sleep(1_000_000)
        self._receive(update)
        if way == "double":
            self._receive(update)
        if way == "drop":
            raise ConnectionResetError("the answer was lost")

    def _receive(self, update: Update) -> None:
        world, key = self._world, update.idempotency_key
        known = self._known_since.setdefault(key, world.seen["suffix lost"])
        if known != world.seen["suffix lost"]:
            # What was told of is lost, and has happened again, in another way perhaps.
            del self.received[key]
            self._known_since[key] = world.seen["suffix lost"]
        first = self.received.setdefault(key, update)
        if first is update:
            self._world.seen[f"received {update.kind}"] += 1
        else:
            self._world.seen["received again"] += 1
        if told(first) != told(update):
            self._world.violations.append(f"one key, two updates: {first}, {update}")

    def _check(self, update: Update) -> None:
        """Whatever goes out is on the disk, is due, and nothing of its flow is under way beside it."""
        world, key = self._world, update.idempotency_key
        named = (update.owner_key, update.flow_id)
        if update.kind != "digest" and (other := self._under_way.get(named)) is not None:
            world.violations.append(f"{other} is under way beside {update}")
        since, attempt = self._not_before.get(key, (0.0, 0))
        is_next = attempt + 1 == update.attempt
        if (
            is_next
            and world.seconds < since - 0.001
            and world.clock_set_at < since - _ASKED_TO_WAIT
            # One that was made by another clock waits no longer once a new process finds it.
            and update.created_at <= world.wall
        ):
            world.violations.append(f"it was to wait until {since}: {update}")
        if update.attempt > DELIVERIES.max_attempts:
            world.violations.append(f"it has been tried often enough: {update}")
        row = self.row_of(key)
        # A newer one may have taken its place since it was read.
        is_known = row is not None or update.kind == "progress"
        counts = row is None or (row["attempt"] + 1, row["status"]) == (update.attempt, "pending")
        if world.files is None and not (is_known and (counts or update.kind == "progress")):
            world.violations.append(f"the disk says {row}, and it goes out as {update}")
        if update.kind == "done":
            flow = world.model.flows.get(named)
            if flow is None or not flow.now.has_ended:
                world.violations.append(f"its flow has not ended: {update}")

    def row_of(self, key: str) -> dict[str, Any] | None:
        """The record of an update, on the simulated disk."""
        for row in self._world.disk.written.updates.values():
            doc: dict[str, Any] = json.loads(row.doc)
            if doc["idempotencyKey"] == key:
                return {"attempt": 0, **doc, "status": row.status}
        return None


def told(update: Update) -> tuple[Any, ...]:
    """What an update says, whatever has become of it."""
    return (
        update.kind, update.owner_key, update.flow_id, update.revision, update.flow_status, update.text,
        update.data, update.items, update.current_step,
    )  # fmt: skip
