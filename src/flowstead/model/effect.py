"""Effects: what the engine must do once a decision is durable. Data, so that recovery can derive them too."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

from flowstead.model.task import StoredTask


class StopReason(StrEnum):
    """Why running code is stopped; decides the outcome it is recorded with."""

    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    FLOW_ENDED = "flow_ended"


class StartTask(msgspec.Struct, frozen=True):
    """Run this attempt of a launched child."""

    task: StoredTask


class StopTask(msgspec.Struct, frozen=True):
    """Cancel the scope of a running child."""

    task_id: str
    reason: StopReason


class StartController(msgspec.Struct, frozen=True):
    """Enter the flow's controller from the top."""

    controller_id: str


class StopController(msgspec.Struct, frozen=True):
    """Cancel the scope of the flow's controller."""


Effect: TypeAlias = StartTask | StopTask | StartController | StopController
