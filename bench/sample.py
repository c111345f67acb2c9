"""What the measured flows look like: one owner, and a state of about 600 bytes of JSON."""

from __future__ import annotations

from typing import Any, Final

OWNER: Final = "agent:main:mail"
CONTROLLER: Final = "mail/inbox-triage"
GOAL: Final = "Triage the inbox and answer what can be answered"
WAIT: Final[dict[str, Any]] = {
    "kind": "reply",
    "channel": "slack",
    "threadKey": "C042/1763791455.12",
}
REPLY: Final[dict[str, Any]] = {"text": "Yes, send it.", "from": "anna@example.com"}
RESULT: Final[dict[str, Any]] = {"category": "business", "confidence": 0.93, "urgent": False}


def state(turn: int = 0) -> dict[str, Any]:
    """A state bag as an agent would keep it; `turn` makes one differ from the next."""
    return {
        "turn": turn,
        "cursor": f"msg-{turn:08d}",
        "counts": {"business": 12, "personal": 7, "later": 31, "spam": 104},
        "threads": [
            {
                "id": f"thread-{turn + number:08d}",
                "from": f"person.{number}@example.com",
                "subject": "Re: the figures for the third quarter",
                "category": "business",
            }
            for number in range(4)
        ],
        "summary": "Four threads need an answer; one waits for a person to decide.",
    }
