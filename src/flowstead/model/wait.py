"""The wait: what a flow stands still for, as a child that no code runs.

A wait of a controller is a step like any other: a child whose `run_id` is the step's name. It stays queued until
it is answered, its deadline comes, or it is withdrawn; its result is the answer. A timer is a wait that nothing but
the clock answers, an approval one that takes several answers.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model.approval import Approval
from flowstead.model.values import Whole


class WaitKind(StrEnum):
    """What answers a wait; also the `runtime` of the child that stands for it."""

    SIGNAL = "signal"
    TIMER = "timer"
    APPROVAL = "approval"
    MESSAGE = "message"


class OnTimeout(StrEnum):
    """What the deadline of a wait does: end the wait as timed out, answer it with nothing, or block the flow."""

    FAIL = "fail"
    RESUME = "resume"
    BLOCK = "block"


RESERVED: Final = frozenset(
    {
        "deadlineAt",
        "onTimeout",
        "prompt",
        "remindAt",
        "schema",
        "wakeAt",
    }
)
"""Fields of a `wait_json` that say how to wait, not for what."""


class Wait(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a child waits for, and how long.

    `key` is the JSON object of plain fields that a signal must name, `wait_key` its digest; a wait without one is
    answered by name or by `token` only. `inbox` names the messages that answer it. `deadline_at` and `remind_at`
    are epoch milliseconds; reminders that have gone out are taken off, as is the deadline of a wait that
    `is_overdue` and still open.
    """

    kind: WaitKind
    key: Raw | UnsetType = UNSET
    wait_key: str | None = None
    token: str | None = None
    inbox: str | None = None
    prompt: str | None = None
    schema: Raw | UnsetType = UNSET
    deadline_at: Whole | None = None
    on_timeout: OnTimeout = OnTimeout.FAIL
    remind_at: tuple[Whole, ...] = ()
    is_overdue: bool = False
    approval: Approval | None = None


def inbox_of(kind: WaitKind, name: str) -> str:
    """Where the messages of one kind lie that a wait of that kind takes: no signal passes for a vote."""
    return f"{kind}:{name}"


class Letter(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a child brings that is a message to its flow: the inbox it lies in, until somebody takes it.

    A letter that is `answered` by taking it wants no reply; one with `expires_at` is taken away again then.
    """

    inbox: str
    wants_reply: bool = False
    expires_at: Whole | None = None
    taken_by: str | None = None
