"""Controllers that stand still: for signals, for the clock, for people, for messages; and tell their owners."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio

from flowstead import ChildCancelled, ChildTimedOut, FlowContext, NotApproved
from tests.simulation import judge
from tests.simulation.waits import ITEMS

if TYPE_CHECKING:
    from tests.simulation.machine import World

Drive = Callable[[FlowContext], Awaitable[None]]
QUORUM = 2
PROMPT = "May it be paid?"
EXPIRES = (None, 6.0, 30.0)
LETTERS = 3


def turn(name: str, ways: int) -> int:
    """One of several ways, another in another flow."""
    return sum(map(ord, name)) % ways


def thread_of(flow_id: str) -> dict[str, Any]:
    """What a flow waits for first: the same as some others do."""
    return {"thread": "AB"[turn(flow_id, 2)]}


LAST: dict[str, Any] = {"thread": "C", "n": 1}
"""What all of them wait for in the end."""


def items_of(flow_id: str) -> dict[str, Any]:
    """What a flow wants to have approved."""
    return {"do": "succeed", "pay": flow_id}


class Waiting:
    """The controllers of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._driven: dict[tuple[str, str], int] = {}

    def all(self) -> dict[str, Drive]:
        """Each by its name."""
        named: dict[str, Drive] = {
            "awaits": self._awaits,
            "selects": self._selects,
            "approves": self._approves,
            "mailbox": self._mailbox,
            "tells": self._tells,
            "lingers": self._lingers,
        }
        return {name: self._alone(drive) for name, drive in named.items()}

    def _alone(self, drive: Drive) -> Drive:
        """Run a controller, and see that it does not run twice at the same time."""

        async def alone(flow: FlowContext) -> None:
            world, process = self._world, self._world.process
            named = (flow.flow.owner_key, flow.flow_id)
            if self._driven.get(named) == process and not world.overtaken:
                world.violations.append(f"{named} is driven twice at the same time")
            self._driven[named] = process
            try:
                await drive(flow)
            finally:
                if process in world.processes and self._driven.get(named) == process:
                    del self._driven[named]

        return alone

    def note(self, what: str) -> None:
        """It has happened."""
        self._world.seen[what] += 1

    async def _awaits(self, flow: FlowContext) -> None:
        """Wait for an answer, sleep, and wait for another one."""
        way = turn(flow.flow_id, 4)
        on_timeout = ("fail", "fail", "resume", "block")[way]
        timeout = (None, 4.0, 4.0, 4.0)[way]
        remind = [3.0, 2.0] if way else []
        try:
            told = await flow.wait(
                "answer",
                timeout=timeout,
                on_timeout=on_timeout,
                remind=remind,
                **thread_of(flow.flow_id),
            )
        except (ChildTimedOut, ChildCancelled) as error:
            told = type(error).__name__
        self.note("answered a wait" if isinstance(told, dict) else f"not answered: {told}")
        await flow.update(current_step="answered", state_json={"answer": told})
        await flow.sleep("nap", 2.5)
        self.note("woke up")
        again = await flow.wait("again", timeout=20.0, on_timeout="resume", key=LAST)
        await flow.finish(state_json={"answers": [told, again]})

    async def _selects(self, flow: FlowContext) -> None:
        """A signal, a timer and a child, whatever comes first."""
        way = turn(flow.flow_id, 3)
        reply = await flow.open_wait("reply", **thread_of(flow.flow_id))
        timer = await flow.start_timer("timer", (1.2, 3.0, 6.0)[way])
        work = await flow.start("work", {"do": ("hang", "nap", "fail late")[way]}, name="work")
        winner = await flow.select(reply, timer, work)
        await flow.update(state_json={"winner": winner.name})
        self.note(f"selected {winner.name}")
        how = judge.status_of(await winner.outcome())
        if way:
            await flow.sleep("after", 1.5)
        await flow.finish(state_json={"winner": winner.name, "how": how})

    async def _approves(self, flow: FlowContext) -> None:
        """Ask for an approval, do what was approved, and try to do more."""
        items, way = items_of(flow.flow_id), turn(flow.flow_id, 3)
        decision = await flow.approve(
            PROMPT, items, quorum=QUORUM, veto=way != 1, expires=EXPIRES[way]
        )
        self.note(f"decided {decision.verdict.value}")
        if not decision.approved:
            await flow.finish(state_json={"verdict": decision.verdict.value})
            return
        if way:
            await self._is_refused(flow, "something else", {"do": "succeed"}, decision)
        try:
            await flow.run("work", decision.items, name=ITEMS, approval=decision)
        except NotApproved:
            self.note("not approved any more")
            await flow.finish(state_json={"verdict": "void"})
            return
        self.note("done as approved")
        await self._is_refused(flow, "once more", decision.items, decision)
        await flow.finish(state_json={"verdict": "done"})

    async def _is_refused(self, flow: FlowContext, name: str, items: Any, decision: Any) -> None:
        try:
            await flow.run("work", items, name=name, approval=decision)
        except NotApproved:
            return
        self._world.violations.append(f"{flow.flow_id} has done {name} without an approval")

    async def _mailbox(self, flow: FlowContext) -> None:
        """Take some messages, and answer those that want one."""
        taken: list[Any] = []
        for _ in range(LETTERS):
            message = await flow.receive(timeout=12.0, on_timeout="resume")
            if message is None:
                taken.append(None)
                continue
            taken.append(message.body["by"])
            if turn(message.body["by"], 3) == 0:
                await flow.sleep(f"think about {message.body['by']}", 1.3)
            await flow.reply(message, {"re": message.body["by"]})
            self.note("took a message")
        await flow.finish(state_json={"taken": taken})

    async def _tells(self, flow: FlowContext) -> None:
        """Tell the owner this and that."""
        await flow.notify("it has begun", {"flow": flow.flow_id})
        await flow.later(f"first of {flow.flow_id}")
        await flow.sleep("a while", 1.6)
        await flow.later(f"second of {flow.flow_id}", bucket="other")
        await flow.notify("it goes on")
        await flow.update(current_step="told")
        if turn(flow.flow_id, 2):
            await flow.wait("go on", timeout=3.0, on_timeout="resume", **thread_of(flow.flow_id))

    async def _lingers(self, flow: FlowContext) -> None:
        """Wait where nobody can leave: under a deadline, and beside something else."""
        found: list[Any] = []
        with anyio.move_on_after(2.0):
            found.append(await flow.wait("maybe", **thread_of(flow.flow_id)))
        await flow.update(state_json={"found": len(found)})

        async def wait() -> None:
            found.append(await flow.wait("beside", timeout=5.0, on_timeout="resume", key=LAST))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await asyncio.sleep(0.5)
        self.note("lingered")
        await flow.finish(state_json={"found": len(found)})
