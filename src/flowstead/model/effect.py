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
    INTERRUPTED = "interrupted"


class StartTask(msgspec.Struct, frozen=True):
    """Run this attempt of a launched child; `adopted` if an earlier process has run part of it."""

    task: StoredTask
    adopted: bool = False


class StopTask(msgspec.Struct, frozen=True):
    """Cancel the scope of a running child."""

    task_id: str
    reason: StopReason


class KillTask(msgspec.Struct, frozen=True):
    """End what a stopped child still has running, by force where there is one."""

    task_id: str


class AbandonTask(msgspec.Struct, frozen=True):
    """Count a child that would not stop as running no more; its record has ended without it."""

    task_id: str


class DrainTask(msgspec.Struct, frozen=True):
    """Tell a child that stands for a nested flow that nothing new may start."""

    task_id: str


class StartController(msgspec.Struct, frozen=True):
    """Enter the flow's controller from the top."""

    controller_id: str


class StopController(msgspec.Struct, frozen=True):
    """Cancel the scope of the flow's controller."""


class ParkController(msgspec.Struct, frozen=True):
    """End the controller where it waits; it is entered again when the flow is woken."""


class AbandonController(msgspec.Struct, frozen=True):
    """Count a controller that would not stop as running no more."""


Effect: TypeAlias = (
    StartTask
    | StopTask
    | KillTask
    | AbandonTask
    | DrainTask
    | StartController
    | StopController
    | ParkController
    | AbandonController
)
