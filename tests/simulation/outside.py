"""What children have running outside their process: programs, which live on when the process dies."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from flowstead.executors import Call

if TYPE_CHECKING:
    from tests.simulation.machine import World

_LOOK_SECONDS = 0.25
_TIDY_SECONDS = 0.3
"""How long a program takes to end that heeds who asks it to."""
_NAP_SECONDS = 1.5
_ENDLESS = ("hang", "swallow", "stubborn", "deaf")


@dataclass(eq=False)
class Program:
    """One program, which knows nothing of loops and crashes."""

    task_id: str
    attempt: int
    heeds: bool
    """Whether it ends when it is asked to; else it has to be killed."""
    ends_at: float
    process: int
    """The process of ours that started it."""
    was_ended: bool = False


class Outside:
    """Everything that runs outside the simulated process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._programs: list[Program] = []
        self.started = Counter[str]()
        """How many programs each child has had."""

    def alive(self, task_id: str | None = None) -> list[Program]:
        """What runs now, of one child or of all; not what a runtime started that had been overtaken."""
        now = self._world.seconds
        self._programs = [one for one in self._programs if one.ends_at > now]
        return [one for one in self._programs if task_id in (None, one.task_id)]

    def start(self, call: Call, what: str) -> Program:
        """Start a program, which must be the child's only one."""
        world, task_id = self._world, call.context.task_id
        self.started[task_id] += 1
        if self.alive(task_id) and not world.overtaken:
            world.violations.append(f"two programs of {task_id} run at the same time")
        task = world.model.task(task_id)
        answers = 0 if task is None else task.answers
        if world.asked_of(task_id).once and self.started[task_id] > 1 + answers:
            world.violations.append(f"{task_id} is done again, and must not be")
        lasts = math.inf if what in _ENDLESS and not world.code.gates_open else _NAP_SECONDS
        program = Program(
            task_id,
            call.context.attempt,
            heeds=what not in ("stubborn", "deaf"),
            ends_at=world.seconds + lasts,
            process=world.process,
        )
        self._programs.append(program)
        world.seen["program started"] += 1
        return program

    def is_alive(self, program: Program) -> bool:
        """Whether it runs."""
        return program.ends_at > self._world.seconds

    def ask_to_end(self, program: Program) -> None:
        """It ends in a moment, if it heeds."""
        if program.heeds:
            self._end_at(program, self._world.seconds + _TIDY_SECONDS)

    def kill(self, program: Program) -> None:
        """It is gone, whatever it heeds."""
        if self.is_alive(program):
            self._world.seen["program killed"] += 1
        self._end_at(program, self._world.seconds)

    def let_go_on(self) -> None:
        """From here on no program lasts for ever."""
        for program in self._programs:
            program.ends_at = min(program.ends_at, self._world.seconds + _NAP_SECONDS)

    def _end_at(self, program: Program, seconds: float) -> None:
        if seconds < program.ends_at:
            program.ends_at, program.was_ended = seconds, True


class ProgramExecutor:
    """Runs children as programs outside. What an attempt cut off by a crash has left is ended first."""

    name = "outside"
    spec = None
    external = True

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(self, call: Call) -> Any:
        """Run the program to its end; once this returns or raises, none of the child's is left."""
        # One that was cut off takes its place again at once: what it has left out there cannot wait.
        counts = not call.is_stopped() and not call.interrupted
        return await self._world.code.watched(call.context, self._run(call), counts=counts)

    async def _run(self, call: Call) -> Any:
        outside, what = self._world.outside, (call.input or {}).get("do", "succeed")
        if call.interrupted:
            await self._clear(call.context.task_id)
        if call.is_stopped():
            raise asyncio.CancelledError("it was stopped before it began")
        program = outside.start(call, what)
        call.on_kill(lambda: outside.kill(program))
        try:
            await self._wait(program)
        except asyncio.CancelledError:
            outside.ask_to_end(program)
            with anyio.CancelScope(shield=True):
                await self._wait(program)
            raise
        if program.was_ended:
            raise RuntimeError("somebody has ended the program")
        await self._world.code.fail(call.context, what)
        return {"by": call.context.task_id, "attempt": call.context.attempt}

    async def _wait(self, program: Program) -> None:
        # An event would be of one loop, and programs outlive loops.
        while self._world.outside.is_alive(program):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)

    async def _clear(self, task_id: str) -> None:
        """End what an earlier attempt has left, though it takes a moment, and whoever is cancelled meanwhile."""
        outside = self._world.outside
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(_LOOK_SECONDS)
            for program in outside.alive(task_id):
                self._world.seen["program left behind"] += 1
                outside.kill(program)
