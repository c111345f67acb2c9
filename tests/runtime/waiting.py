"""What the tests of waits share: controllers that stand still, and ways to see where they stand."""

from __future__ import annotations

from typing import Any

from flowstead import Flow, FlowContext, Registry
from flowstead.results import OpenWait, SignalReport
from tests.runtime.support import Lives, make

KEPT_SECONDS = 7 * 24 * 3600.0
"""How long an early signal is kept unless somebody says otherwise."""

PARKED = 60.0
"""Seconds after which a controller that waits has left memory, and so has its flow."""


async def waits(flow: FlowContext) -> None:
    """Wait once, as the state says, and end with the answer."""
    answer = await flow.wait("answer", **flow.state_json)
    await flow.finish(state_json={"answered": answer})


async def waits_twice(flow: FlowContext) -> None:
    """Wait for the same two times."""
    answers = [await flow.wait(name, **flow.state_json) for name in ("first", "second")]
    await flow.finish(state_json={"answered": answers})


async def counts(flow: FlowContext) -> None:
    """Wait for one signal after another until told to end."""
    taken: list[Any] = []
    while (answer := await flow.wait(f"answer-{len(taken)}", **flow.state_json)) != "end":
        taken.append(answer)
    await flow.finish(state_json={"answered": taken})


def registry_of(**more: Any) -> Registry:
    """The controllers above, and more."""
    registry = Registry()
    for name, controller in (
        {"waits": waits, "twice": waits_twice, "counts": counts} | more
    ).items():
        registry.controller(name)(controller)
    return registry


def waiting(lives: Lives, controller: str = "waits", seconds: float = 0.1, **asked: Any) -> str:
    """A flow that stands in a wait, by its id."""
    given = {"key": {"kind": "reply", "thread": 1}} | asked
    return begun(lives, controller, seconds, state_json=given)


def begun(lives: Lives, controller: str, seconds: float = 0.1, **given: Any) -> str:
    """A flow that has been left to itself for a moment, by its id."""
    flow = lives.play(make(lives.flows, controller_id=controller, **given))
    lives.pass_time(seconds)
    return flow.flow_id


def reopened(lives: Lives, how: str, seconds: float = 0.1) -> None:
    """The next process, some time after it has opened."""
    lives.restart(how)
    lives.pass_time(seconds)


def signalled(lives: Lives, payload: Any = None, **given: Any) -> SignalReport:
    """What became of a signal; for the reply in thread 1 unless it says otherwise."""
    if not given.keys() & {"token", "flow_id", "key"}:
        given["key"] = {"kind": "reply", "thread": 1}
    report = lives.play(lives.flows.signal(payload=payload, **given))
    lives.pass_time(0.1)
    return report


def answer_in(lives: Lives, flow_id: str) -> Any:
    """What the controller was answered, once its flow has ended."""
    ended = lives.result(flow_id)
    assert ended.status == "succeeded", ended
    return ended.state_json["answered"]


def open_waits(lives: Lives, flow_id: str | None = None) -> list[OpenWait]:
    """What is waited for."""
    return lives.play(lives.flows.list_waits(flow_id))


def in_memory(lives: Lives) -> int:
    """How many flows are in memory."""
    return lives.face(lambda runtime: runtime.statistics().flows_in_memory)


def check_waits_on(flow: Flow, **fields: Any) -> None:
    """The flow says for what it waits."""
    assert flow.status == "waiting"
    assert isinstance(flow.wait_json, dict)
    assert fields.items() <= flow.wait_json.items()
