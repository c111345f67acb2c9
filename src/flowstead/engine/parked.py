"""The signal that ends a controller where it waits."""

from __future__ import annotations


class Parked(BaseException):
    """The controller leaves memory; it is entered again from the top when its flow is woken.

    No `Exception` and no cancellation: neither `except Exception` nor a cancel scope takes it for its own. Code
    that has to tidy up does so in `finally`, without asking the flow for anything.
    """
