"""Where updates go: a log, a function, a webhook, or whatever else has `send`. One port for all.

A notifier is given one update and returns once its channel has it. It need not remember anything, try again or
keep an order: the update is a row, and whoever sends it does all that.
"""

from __future__ import annotations

from flowstead.notifiers.function import CallableNotifier
from flowstead.notifiers.log import LogNotifier
from flowstead.notifiers.port import Notifier
from flowstead.notifiers.routed import RoutedNotifier
from flowstead.notifiers.signature import WebhookRefused, verify_webhook
from flowstead.notifiers.webhook import WebhookNotifier

__all__ = [
    "CallableNotifier",
    "LogNotifier",
    "Notifier",
    "RoutedNotifier",
    "WebhookNotifier",
    "WebhookRefused",
    "verify_webhook",
]
