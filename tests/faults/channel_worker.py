"""`python -m tests.faults.channel_worker`: forks processes that end flows and tell of it over a bad channel, and
that kill themselves at a named point on the way."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import anyio
import anyio._backends._asyncio

from flowstead import Fatal, FlowContext, Limits, Registry, Retry, SessionFlows, Update
from flowstead import open_runtime as open_flows
from flowstead.store.codec import FlowWrite, UpdateRow
from flowstead.store.sqlite import SqliteStore
from flowstead.testing import FaultyStore
from tests.crash.harness import Journal, serve

OWNER = "owner"
WINDOWS = (
    "before the end's commit",
    "after the end's commit",
    "before the send",
    "between send and record",
    "before the record's commit",
    "after the record",
)
MISDEEDS = ("drops", "loses the answer", "doubles", "delays", "answers late", "refuses for ever")
"""What the channel does beside doing what it should."""

AT_ONCE = 4
"""Flows that are on their way from their end to its delivery at once."""
LIMITS = Limits(delivery_seconds=0.05, interruptions=1000)
DELIVERIES = Retry(max_attempts=8, initial=0.005, factor=1.5, max_delay=0.05)


class Fate:
    """Ends this process at one of the windows, when it is come to for the given time."""

    def __init__(self, journal: Journal, window: str | None, after: int) -> None:
        self._journal, self._window, self._left = journal, window, after

    def meet(self, window: str) -> None:
        if window != self._window:
            return
        self._left -= 1
        if self._left <= 0:
            self._journal.write(killed=window)
            os.kill(os.getpid(), signal.SIGKILL)


class MortalStore(FaultyStore):
    """A file, and a process that may die around each of its commits."""

    def __init__(self, path: str, fate: Fate) -> None:
        super().__init__(SqliteStore(path, durability="normal"))
        self._fate = fate

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        rows = [row for write in writes for row in write.updates]
        ends, records = any(map(_is_end, rows)), any(map(_is_record, rows))
        if ends:
            self._fate.meet(WINDOWS[0])
        if records:
            self._fate.meet(WINDOWS[4])
        position = await super().commit(writes)
        if ends:
            self._fate.meet(WINDOWS[1])
        if records:
            self._fate.meet(WINDOWS[5])
        return position


def _is_end(row: UpdateRow) -> bool:
    return row.fresh and row.slot == "done"


def _is_record(row: UpdateRow) -> bool:
    return not row.fresh and row.status == "delivered"


class BadChannel:
    """Appends what arrives to a file, and behaves badly, the same for each attempt in each life."""

    def __init__(self, path: str, journal: Journal, fate: Fate) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._descriptor = os.open(path, flags, 0o600)
        self._journal, self._fate = journal, fate

    async def send(self, update: Update) -> None:
        self._fate.meet(WINDOWS[2])
        lot = sha256(f"{update.idempotency_key} {update.attempt}".encode()).digest()
        misdeed = MISDEEDS[lot[1] % 5] if lot[0] < 128 else None
        if lot[2] < 8:
            misdeed = MISDEEDS[5]
        if misdeed is not None:
            self._journal.write(misdeed=misdeed)
        if misdeed == "drops":
            raise ConnectionError("dropped")
        if misdeed == "refuses for ever":
            raise Fatal("no such user")
        if misdeed == "delays":
            await asyncio.sleep(0.002)
        self._arrive(update)
        if misdeed == "doubles":
            self._arrive(update)
        self._fate.meet(WINDOWS[3])
        if misdeed == "loses the answer":
            raise ConnectionResetError("the answer was lost")
        if misdeed == "answers late":
            await asyncio.sleep(60)

    def _arrive(self, update: Update) -> None:
        told = {
            "key": update.idempotency_key,
            "flow": update.flow_id,
            "kind": update.kind,
            "status": update.flow_status,
        }
        os.write(self._descriptor, json.dumps(told).encode() + b"\n")
        os.fdatasync(self._descriptor)


def registry() -> Registry:
    registry = Registry()

    @registry.controller("returns")
    async def returns(flow: FlowContext) -> None:
        await flow.update(current_step="on the way")

    @registry.controller("raises")
    async def raises(flow: FlowContext) -> None:
        raise ValueError("no luck")

    return registry


async def end_one(flows: SessionFlows, number: int) -> None:
    """See one flow to its end, in one of several ways, and to that being told, whatever was done of it before."""
    way = ("finish", "fail", "cancel", "returns", "raises")[number % 5]
    flow = await flows.create_managed(
        controller_id=way,
        goal="told once",
        flow_id=f"flow-{number}",
        idempotency_key=str(number),
        notify_policy=("done_only", "state_changes")[number % 2],
    )
    if way in ("returns", "raises"):
        await flows.result(flow.flow_id)
    elif way == "cancel":
        await flows.cancel(flow_id=flow.flow_id)
    else:
        # Refused where an earlier life has done it.
        await getattr(flows, way)(flow_id=flow.flow_id, expected_revision=0)
    while await flows.list_updates(flow.flow_id, status="pending"):  # noqa: ASYNC110
        await asyncio.sleep(0.002)


def live(
    journal: Journal,
    *,
    path: str,
    channel: str,
    numbers: list[int],
    window: str | None,
    after: int,
) -> None:
    """See these flows to their end until all have been told of, or die at the window."""

    async def main() -> None:
        fate = Fate(journal, window, after)
        options: dict[str, Any] = {
            "registry": registry(),
            "notifier": BadChannel(channel, journal, fate),
            "limits": LIMITS,
            "deliveries": DELIVERIES,
        }
        async with open_flows(MortalStore(path, fate), **options) as runtime:
            mine = runtime.tasks.flow.bind_session(session_key=OWNER)
            room = anyio.CapacityLimiter(AT_ONCE)

            async def one(number: int) -> None:
                async with room:
                    await end_one(mine, number)
                journal.write(told=number)

            async with anyio.create_task_group() as group:
                for number in numbers:
                    group.start_soon(one, number)
        journal.write(quiet=True)

    asyncio.run(main())


if __name__ == "__main__":
    logging.getLogger("flowstead").addHandler(logging.NullHandler())
    serve({"live": live})
