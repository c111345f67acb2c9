"""The five outcomes of a child, the same wherever they are handed out: to be matched, and none left over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal, assert_never

import msgspec
import pytest

from flowstead import (
    Cancelled,
    ChildCancelled,
    ChildError,
    ChildFailed,
    ChildLost,
    ChildTimedOut,
    Failed,
    FlowContext,
    Lost,
    Step,
    Succeeded,
    TaskContext,
    TimedOut,
)
from tests.runtime.support import Lives, make

Outcome = Succeeded | Failed | TimedOut | Cancelled | Lost
Word = Literal["succeeded", "failed", "timed_out", "cancelled", "lost"]

WORDS: tuple[Word, ...] = ("succeeded", "failed", "timed_out", "cancelled", "lost")
RAISED: dict[Word, type[ChildError]] = {
    "failed": ChildFailed,
    "timed_out": ChildTimedOut,
    "cancelled": ChildCancelled,
    "lost": ChildLost,
}


def word_of(outcome: Outcome) -> Word:
    """The outcome as a word; mypy knows that this is all of them."""
    match outcome:
        case Succeeded(result):
            assert result == "here you are"
            return "succeeded"
        case Failed(failure):
            assert failure.kind == "exception" and failure.code == "ValueError"
            return "failed"
        case TimedOut(failure):
            assert failure.kind == "timed_out"
            return "timed_out"
        case Cancelled(failure):
            assert failure.kind == "cancelled"
            return "cancelled"
        case Lost(failure):
            assert failure.kind == "interrupted"
            return "lost"
        case _:
            assert_never(outcome)


class Fates:
    """A controller whose five steps end in the five ways, in two lives, and what it was handed."""

    def __init__(self, lives: Lives) -> None:
        self.lives = lives
        self.has_died = False
        self.handed: dict[str, list[Any]] = {}
        self.raised: dict[str, type[BaseException]] = {}
        lives.registry.task(name="fate", idempotent=True)(self.fate)
        lives.registry.task(name="hurry", timeout=1)(self.fate_in_a_hurry)
        lives.registry.task(name="once", idempotent=False)(self.fate_once)
        lives.registry.controller("fates")(self.drive)

    async def fate(self, _: TaskContext, word: Word) -> str:
        if word == "failed":
            raise ValueError("no")
        if word == "cancelled":
            await asyncio.get_running_loop().create_future()
        return "here you are"

    async def fate_in_a_hurry(self, _: TaskContext, __: Word) -> None:
        await asyncio.get_running_loop().create_future()

    async def fate_once(self, _: TaskContext, __: Word) -> None:
        await asyncio.get_running_loop().create_future()

    async def drive(self, flow: FlowContext) -> None:
        steps = [await self._start(flow, word) for word in WORDS]
        if not self.has_died:
            await asyncio.get_running_loop().create_future()
        await steps[3].cancel()
        self.handed["gather"] = await flow.gather(*steps, return_outcomes=True)
        self.handed["outcome"] = [await step.outcome() for step in steps]
        for step in steps:
            try:
                await step.result()
            except ChildError as error:
                self.raised[step.name] = type(error)

    async def _start(self, flow: FlowContext, word: Word) -> Step:
        run = {"timed_out": "hurry", "lost": "once"}.get(word, "fate")
        return await flow.start(run, word, name=word)


@pytest.fixture
def fates(lives: Lives) -> Fates:
    """The flow of the fates has ended."""
    fates = Fates(lives)
    flow = lives.play(make(lives.flows, controller_id="fates"))
    lives.pass_time(0.5)
    lives.restart("kill")
    fates.has_died = True
    assert lives.flows
    assert lives.result(flow.flow_id).status == "succeeded"
    fates.handed["wait_task"] = [
        lives.play(lives.flows.wait_task(lives.child(flow.flow_id, word).task_id)) for word in WORDS
    ]
    return fates


@pytest.mark.parametrize("way", ["gather", "outcome", "wait_task"])
def test_every_way_to_an_outcome_hands_out_one_of_five(fates: Fates, way: str) -> None:
    assert tuple(word_of(outcome) for outcome in fates.handed[way]) == WORDS


def test_all_ways_hand_out_the_same(fates: Fates) -> None:
    assert fates.handed["gather"] == fates.handed["outcome"] == fates.handed["wait_task"]


def test_asking_for_the_result_instead_raises_the_outcome_s_own_error(fates: Fates) -> None:
    assert fates.raised == RAISED


def test_a_map_hands_out_outcomes_in_the_order_of_its_inputs(lives: Lives) -> None:
    handed: list[Outcome] = []

    @lives.registry.task(timeout=2)
    async def fate(_: TaskContext, word: Word) -> str:
        if word == "failed":
            raise ValueError
        if word == "timed_out":
            await asyncio.get_running_loop().create_future()
        return "here you are"

    @lives.registry.controller("mapper")
    async def mapper(flow: FlowContext) -> None:
        words = ["timed_out", "failed", "succeeded", "failed"]
        handed.extend(await flow.map("fate", words, return_outcomes=True))

    flow = lives.play(make(lives.flows, controller_id="mapper"))

    assert lives.result(flow.flow_id).status == "succeeded"
    assert [word_of(one) for one in handed] == ["timed_out", "failed", "succeeded", "failed"]


@pytest.mark.parametrize("wire", [msgspec.json, msgspec.msgpack], ids=["json", "msgpack"])
def test_an_outcome_survives_the_wire_and_names_itself(fates: Fates, wire: Any) -> None:
    encode: Callable[[object], bytes] = wire.encode
    for word, outcome in zip(WORDS, fates.handed["wait_task"], strict=True):
        encoded = encode(outcome)

        assert wire.decode(encoded, type=Outcome) == outcome
        assert wire.decode(encoded)["status"] == word
