"""What came of an approval, and a message as a controller receives it."""

from __future__ import annotations

import msgspec

from flowstead.model.approval import Verdict
from flowstead.model.flow import Json


class Ballot(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One vote as it was counted: who, in which role, what, and when (epoch ms)."""

    kind: str
    approver: str
    role: str | None = None
    comment: str | None = None
    at: int = 0


class Decision(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How an approval came out. Only `approved` allows anything; every other verdict is a refusal.

    `items` is what was decided on: after an edit, the edited ones. `reason` says in a sentence why it was refused:
    who rejected it and with which comment, or what made it void. Pass the decision as `approval=` to the step that
    does what was approved: it must have exactly these items as its input, and it can be done once.
    """

    name: str
    verdict: Verdict
    items: Json = None
    digest: str = ""
    votes: list[Ballot] = []
    reason: str = ""

    @property
    def grant(self) -> str:
        """What a step must name to use this decision: nothing that allows anything, unless it is approved."""
        return self.name if self.approved else ""

    @property
    def approved(self) -> bool:
        """Whether it may be done."""
        return self.verdict is Verdict.APPROVED


class Message(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A message that was told to the flow, or asked of it: then somebody waits for `flow.reply(message, …)`."""

    id: str | None
    body: Json = None
    wants_reply: bool = False
