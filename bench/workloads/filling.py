"""Filling a runtime with many flows, a few hundred clients at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from bench.sample import CONTROLLER, GOAL, WAIT, state
from flowstead import SessionFlows

_CLIENTS = 512


def _same(_number: int) -> Mapping[str, Any]:
    return WAIT


async def fill(
    flows: SessionFlows,
    first: int,
    count: int,
    status: str,
    wait: Callable[[int], Mapping[str, Any]] = _same,
) -> None:
    """Make flows `flow-<first>` and on, unfinished; the waiting ones say what they wait for."""
    numbers = itertools.count(first)

    async def client() -> None:
        while (number := next(numbers)) < first + count:
            await flows.create_managed(
                controller_id=CONTROLLER,
                goal=GOAL,
                flow_id=name(number),
                status=status,
                state_json=state(number),
                wait_json=wait(number) if status == "waiting" else None,
            )

    await asyncio.gather(*(client() for _ in range(_CLIENTS)))


def name(number: int) -> str:
    """The id of a flow."""
    return f"inbox-triage-{number:08d}"
