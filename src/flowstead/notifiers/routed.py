"""Several channels behind one notifier, chosen by where the flow's request came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from flowstead.errors import Fatal
from flowstead.model.update import Update
from flowstead.notifiers.port import Notifier, must_send

_LONGEST_NAME: Final = 80


class RoutedNotifier:
    """Sends each update back to where its flow was asked for: by `requester_origin["channel"]`.

    Args:
        channels: A notifier for each name of a channel.
        default: The notifier of everything else: origins that name no channel, or one that nobody serves.

    Raises:
        TypeError: A channel is not named by a string, or has no `send`.
    """

    def __init__(
        self, channels: Mapping[str, Notifier], *, default: Notifier | None = None
    ) -> None:
        for channel, notifier in channels.items():
            if not isinstance(channel, str):
                raise TypeError(f"A channel is named by a string, not {channel!r}.")
            must_send(notifier, f"The notifier of {channel!r}")
        if default is not None:
            must_send(default, "The default notifier")
        self._channels: Final = dict(channels)
        self._default: Final = default

    async def send(self, update: Update) -> None:
        """Send it by the notifier of its channel. Cancelling is that notifier's affair.

        Raises:
            Fatal: Nobody serves its channel. Trying again would not change that.
        """
        channel = _channel_of(update)
        notifier = self._default if channel is None else self._channels.get(channel, self._default)
        if notifier is None:
            raise Fatal(_nobody_serves(channel))
        await notifier.send(update)


def _channel_of(update: Update) -> str | None:
    origin = update.requester_origin
    channel = origin.get("channel") if isinstance(origin, dict) else None
    return channel if isinstance(channel, str) else None


def _nobody_serves(channel: str | None) -> str:
    if channel is None:
        return "The update's requester_origin names no channel, and there is no default notifier."
    if len(channel) > _LONGEST_NAME:
        channel = channel[: _LONGEST_NAME - 1] + "…"
    return f"Nobody serves the channel {channel!r}, and there is no default notifier."
