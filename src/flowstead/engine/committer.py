"""The committer: one task writes for everybody, a batch at a time.

Theory of operation. Whatever was submitted while the last transaction ran goes into the next one. There are no
timers and no waiting when idle: a lone write is committed at once, a thousand at the same moment share one
fsync. The task belongs to the runtime and is reached by no flow's cancel scope, so a batch that has begun is
always seen to its end.

A write that does not fit the stored rows would fail its whole batch; the batch is then written one by one, so
that only the misfit is refused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from flowstead.errors import CommitFailed, OutcomeUnknown, StoreError, StoreInUse, WriteConflict
from flowstead.log import get_logger
from flowstead.store.codec import FlowWrite
from flowstead.store.port import Store

log = get_logger(__name__)


_OVER: Final = "The event loop ended under the runtime: nothing is written any more."


class Writer(Protocol):
    """Whoever submitted a write: told exactly once what became of it."""

    def committed(self, first_position: int) -> None:
        """The write is durable; its first event got this position."""
        ...

    def failed(self, error: StoreError) -> None:
        """The write is not there, or, for `OutcomeUnknown`, nobody knows."""
        ...


class CommitStatistics:
    """Counters since the runtime was opened."""

    __slots__ = ("batches", "failed", "largest_batch", "writes")

    def __init__(self) -> None:
        self.batches = self.writes = self.failed = self.largest_batch = 0


class Committer:
    """Submit writes; `run` commits them until told to stop and nothing is left."""

    def __init__(self, store: Store, batch: int, on_lost: Callable[[], object]) -> None:
        self._store = store
        self._batch = batch
        self._on_lost = on_lost
        self._pending: deque[list[tuple[FlowWrite, Writer]]] = deque()
        self._wanted: asyncio.Event = asyncio.Event()
        self._stopping = self._is_over = False
        self.statistics = CommitStatistics()

    def submit(self, write: FlowWrite, writer: Writer) -> None:
        """Queue an encoded write for the next batch."""
        self.submit_together([(write, writer)])

    def submit_together(self, writes: list[tuple[FlowWrite, Writer]]) -> None:
        """Queue writes that share one fate: all of them are in one transaction, and none without the others."""
        if not writes:
            return
        if self._is_over:
            for _, writer in writes:
                asyncio.get_running_loop().call_soon(writer.failed, CommitFailed(_OVER))
            return
        self._pending.append(writes)
        self._wanted.set()

    def stop(self) -> None:
        """Let `run` return once everything submitted has been answered."""
        self._stopping = True
        self._wanted.set()

    async def run(self) -> None:
        """Commit until stopped. One caller, for the life of the runtime.

        Cancelled, as by an event loop that ends under a runtime nobody closed, it leaves nobody without an answer.
        """
        try:
            await self._run()
        finally:
            self._is_over = True
            if not self._stopping:
                self._on_lost()
            while self._pending:
                self._refuse(_flat(self._take()), CommitFailed(_OVER))

    async def _run(self) -> None:
        while True:
            if self._pending:
                await self._upkeep(idle=False)
                await self._commit(self._take())
                continue
            if self._stopping:
                return
            self._wanted.clear()
            await self._upkeep(idle=True)
            if not self._pending and not self._stopping:
                await self._wanted.wait()

    async def _upkeep(self, *, idle: bool) -> None:
        try:
            await self._store.upkeep(idle=idle)
        except Exception as error:
            # It can be done later; commits matter more.
            log.warning("upkeep.failed", error=repr(error))

    def _take(self) -> list[list[tuple[FlowWrite, Writer]]]:
        taken: list[list[tuple[FlowWrite, Writer]]] = []
        size = 0
        while self._pending and (not taken or size + len(self._pending[0]) <= self._batch):
            taken.append(self._pending.popleft())
            size += len(taken[-1])
        return taken

    async def _commit(self, units: list[list[tuple[FlowWrite, Writer]]]) -> None:
        batch = _flat(units)
        counts = self.statistics
        counts.batches += 1
        counts.largest_batch = max(counts.largest_batch, len(batch))
        try:
            position = await self._store.commit([write for write, _ in batch])
        except WriteConflict as conflict:
            if len(units) == 1:
                self._refuse(batch, conflict)
            else:
                await self._commit_singly(units)
        except (CommitFailed, OutcomeUnknown, StoreInUse) as error:
            if isinstance(error, StoreInUse):
                # Somebody else acts on these flows now: code that runs here must not go on.
                self._on_lost()
            self._refuse(batch, error)
        except asyncio.CancelledError:
            self._refuse(batch, OutcomeUnknown(f"{_OVER} It was in the midst of a commit."))
            raise
        except Exception as error:
            # A fault of the store's own: what it left behind is known only after reading.
            unknown = OutcomeUnknown(f"{self._store.name} failed unexpectedly: {error!r}.")
            unknown.__cause__ = error
            self._refuse(batch, unknown)
        else:
            counts.writes += len(batch)
            for write, writer in batch:
                try:
                    writer.committed(position)
                except Exception:
                    # A fault of ours in one flow must not keep the others from their answers.
                    log.exception("commit.not_adopted")
                position += len(write.events)

    async def _commit_singly(self, units: list[list[tuple[FlowWrite, Writer]]]) -> None:
        left = deque(units)
        try:
            while left:
                await self._commit([left.popleft()])
        finally:
            self._refuse(_flat(left), CommitFailed(_OVER))

    def _refuse(self, batch: list[tuple[FlowWrite, Writer]], error: StoreError) -> None:
        if not batch:
            return
        self.statistics.failed += len(batch)
        log.error("commit.failed", writes=len(batch), error=type(error).__name__, reason=str(error))
        for _, writer in batch:
            writer.failed(error)


def _flat(units: Iterable[list[tuple[FlowWrite, Writer]]]) -> list[tuple[FlowWrite, Writer]]:
    return [write for unit in units for write in unit]
