"""The port: what a notifier promises about one update.

returns             the channel has it, and it is not sent again
raises Fatal        it will never be delivered this way; nobody tries again
raises any other    it may work later, after `retry_after` seconds at least if the exception has them
"""

from __future__ import annotations

import inspect
from typing import Protocol

from flowstead.executors.code import is_async
from flowstead.model.update import Update


class Notifier(Protocol):
    """Takes updates to one channel. One notifier sends many at once, all on one event loop."""

    async def send(self, update: Update) -> None:
        """Give the update to the channel; return once the channel has it.

        It may be called again with the same `idempotency_key`: after an error, after a cancellation, and after a
        crash between this return and its record. So a channel that must not tell twice has to remember the key.

        Cancelling gives the attempt up, promptly. Whether the channel has the update is then unknown; it is sent
        again.

        Raises:
            Fatal: Never try this update again.
            Transient: Try again later, after `retry_after` seconds at least, a day at most.
            Exception: Anything else means the same, `retry_after` too if it has one.
        """
        ...


def must_send(notifier: Notifier, name: str) -> Notifier:
    """The notifier, if it can be one.

    Raises:
        TypeError: It has no `async def send(self, update)`.
    """
    send = None if isinstance(notifier, type) else getattr(notifier, "send", None)
    if callable(send) and (not inspect.isroutine(send) or is_async(inspect.unwrap(send))):
        return notifier
    told = f"{name} must have `async def send(self, update)`, not {notifier!r:.40}."
    if callable(notifier) and not isinstance(notifier, type):
        told += " A function is made one by flowstead.CallableNotifier."
    elif isinstance(notifier, type):
        told += " It is the class; give one made of it."
    raise TypeError(told)
