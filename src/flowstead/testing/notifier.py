"""A channel for tests: it keeps what arrives, and misbehaves on request."""

from __future__ import annotations

import asyncio
from collections import deque

from flowstead.model.update import Update


class RecordingNotifier:
    """Stands where a mailbox or a chat would be. It takes every update at once until told otherwise.

    What goes wrong is told in advance, and happens in this order: a send fails while the channel is down, or
    if it is one of the next to fail; what is left arrives; the answer is held back; and is lost if it is one of the
    next to be dropped. Nothing here takes time, and one notifier may serve runtimes on several event loops, one
    after another, as a channel outlives the process that uses it.

    Attributes:
        updates: What has arrived, in order, each as often as it came.
        attempts: How many sends were tried, whatever became of them.
    """

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.attempts = 0
        self._failures: deque[Exception] = deque()
        self._drops = 0
        self._doubles = 0
        self._is_down = False
        self._gate: object | None = None
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def delivered_once(self) -> list[Update]:
        """What a receiver that knows its idempotency keys makes of it: the first of each."""
        firsts: dict[str, Update] = {}
        for update in self.updates:
            firsts.setdefault(update.idempotency_key, update)
        return list(firsts.values())

    async def send(self, update: Update) -> None:
        """Take the update, unless told otherwise. Cancelling does not take back what has arrived."""
        self.attempts += 1
        try:
            self._raise_if_unreachable()
            self._take(update)
        finally:
            self._moved()
        is_dropped = self._spend_drop()
        gate = self._gate
        while gate is not None and gate is self._gate:
            await self._change()
        if is_dropped:
            raise ConnectionResetError("The channel took it, but its answer was lost.")

    def fail_next(self, count: int = 1, error: Exception | None = None) -> None:
        """Let the next sends raise, and nothing of them arrive: `error`, or one that says to try again."""
        for _ in range(_positive(count)):
            self._failures.append(error or ConnectionError("The channel did not take it."))

    def drop_next(self, count: int = 1) -> None:
        """Let the next updates arrive, and their sender not know."""
        self._drops += _positive(count)

    def double_next(self, count: int = 1) -> None:
        """Let the next updates arrive twice."""
        self._doubles += _positive(count)

    def hold(self) -> None:
        """From now on let updates arrive, but answer only when released."""
        self._gate = object()

    def release(self) -> None:
        """Answer whoever is held, and do not hold any more."""
        self._gate = None
        self._moved()

    def go_down(self) -> None:
        """From now on let nothing arrive, and every send raise."""
        self._is_down = True

    def come_up(self) -> None:
        """Be there again."""
        self._is_down = False

    async def wait_for(self, count: int) -> list[Update]:
        """Wait until so many updates have arrived, doubles included, and answer the first `count` of them."""
        while len(self.updates) < count:
            await self._change()
        return self.updates[:count]

    async def wait_for_attempts(self, count: int) -> None:
        """Wait until so many sends have been tried, whatever became of them."""
        while self.attempts < count:
            await self._change()

    def _raise_if_unreachable(self) -> None:
        if self._is_down:
            raise ConnectionError("The channel is down.")
        if self._failures:
            raise self._failures.popleft()

    def _take(self, update: Update) -> None:
        self.updates.append(update)
        if self._doubles:
            self._doubles -= 1
            self.updates.append(update)

    def _spend_drop(self) -> bool:
        if not self._drops:
            return False
        self._drops -= 1
        return True

    async def _change(self) -> None:
        """Wait for anything to happen to the channel."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(change)
        await change

    def _moved(self) -> None:
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            # A future of a loop that has ended was left behind by a process that crashed.
            if not change.done() and not change.get_loop().is_closed():
                change.set_result(None)


def _positive(count: int) -> int:
    if count < 1:
        raise ValueError(f"The next {count} sends are none.")
    return count
