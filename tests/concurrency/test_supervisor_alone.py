"""The supervisor without an engine: what it makes of effects, and of a door and reports that misbehave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flowstead import Failed, Limits, RuntimeClosed, SnapshotUnreadable, Succeeded
from flowstead.engine.child_scope import ChildScope
from flowstead.engine.clock import SystemIds
from flowstead.engine.mailbox import Reply
from flowstead.engine.supervisor import Supervisor, Work
from flowstead.errors import StoreUnusable
from flowstead.model.code import CANCEL_REQUESTED, NOT_FOUND, Refusal
from flowstead.model.command import (
    Command,
    ControllerStopped,
    EndReport,
    EnterController,
    Fail,
)
from flowstead.model.effect import (
    AbandonController,
    AbandonTask,
    DrainTask,
    KillTask,
    StartController,
    StartTask,
    StopController,
    StopReason,
    StopTask,
)
from flowstead.model.flow import FlowKey
from flowstead.model.task import StoredTask
from flowstead.testing import ManualClock
from tests.faulty_store import settle
from tests.unit.given import a_launched

KEY = FlowKey("owner", "triage-1")

Code = Callable[[], Awaitable[Any]]


class Stage:
    """A door whose code the test brings, and the reports that came of it."""

    def __init__(self) -> None:
        self.code: dict[str, Code | Exception] = {}
        self.controller: Code | None = None
        self.reports: list[Command] = []
        self.refusal: Refusal | None = None
        self.clock = ManualClock()
        self.supervisor = Supervisor(
            report=self.report, door=self, clock=self.clock, ids=SystemIds(), limits=Limits()
        )

    async def report(self, key: FlowKey, command: Command) -> Reply:
        assert key == KEY
        self.reports.append(command)
        return Reply(b"{}", self.refusal if isinstance(command, EnterController) else None)

    def code_of(self, key: FlowKey, task: StoredTask, child: ChildScope) -> Work | None:
        code = self.code.get(task.task_id)
        if isinstance(code, Exception):
            raise code
        return None if code is None else Work(code)

    @property
    def executors(self) -> Container[str]:
        return ()

    def forget(self, key: FlowKey, task: StoredTask) -> None: ...

    def bound_of(self, key: FlowKey) -> Container[str]:
        return ()

    async def drive(self, key: FlowKey, controller_id: str, doc: bytes) -> None:
        assert self.controller is not None
        await self.controller()

    @property
    def ends(self) -> dict[str, Any]:
        """The outcome of each child that was reported to have ended."""
        return {end.task_id: end.outcome for end in self.reports if isinstance(end, EndReport)}


@asynccontextmanager
async def running(stage: Stage) -> AsyncIterator[Supervisor]:
    task = asyncio.create_task(stage.supervisor.run())
    await settle()
    yield stage.supervisor
    stage.supervisor.stop()
    await settle()
    assert task.done(), "the supervisor does not stop"


async def returns() -> str:
    return "done"


async def hangs() -> None:
    await asyncio.Event().wait()


async def test_one_stopped_before_it_ran_starts_nothing_and_puts_it_back():
    stage = Stage()

    stage.supervisor.stop()
    stage.supervisor.carry_out(KEY, [StartTask(a_launched("t")), StartController("c")])
    await settle()

    assert stage.supervisor.is_stopping
    assert stage.supervisor.interrupted == {KEY: {"t": False}}
    assert not stage.supervisor.has_code(KEY)
    assert stage.reports == []


async def test_stopping_what_does_not_run_stops_nothing_else():
    stage = Stage()
    stage.code["t"] = hangs
    async with running(stage) as supervisor:
        supervisor.carry_out(KEY, [StartTask(a_launched("t"))])
        await settle()

        supervisor.carry_out(
            KEY,
            [
                StopTask("another", StopReason.CANCELLED),
                KillTask("another"),
                DrainTask("another"),
                AbandonTask("another"),
                StopController(),
                AbandonController(),
                StartTask(a_launched("t")),
            ],
        )
        elsewhere = FlowKey("owner", "another")
        supervisor.carry_out(elsewhere, [StopController(), AbandonController()])
        supervisor.touch("another", 1)
        supervisor.touch("t", 7)
        await settle()

        assert dict(supervisor.running) == {"t": 1}
        assert stage.reports == []
        assert (supervisor.abandoned, supervisor.hint_of("another")) == (0, None)
        supervisor.carry_out(KEY, [StopTask("t", StopReason.CANCELLED)])
        await settle()
        assert stage.ends["t"].failure.message == "stopped on request"


async def test_a_child_nobody_has_code_for_has_failed():
    stage = Stage()
    async with running(stage) as supervisor:
        supervisor.carry_out(KEY, [StartTask(a_launched("t"))])
        await settle()

        assert isinstance(stage.ends["t"], Failed)
        assert "no code is registered for this child" in stage.ends["t"].failure.message
        assert not supervisor.has_code(KEY)


async def test_a_door_that_fails_is_told_of_and_takes_no_sibling_along(
    caplog: pytest.LogCaptureFixture,
):
    stage = Stage()
    stage.code = {"bad": ZeroDivisionError("a fault of ours"), "good": returns}
    async with running(stage) as supervisor:
        supervisor.carry_out(KEY, [StartTask(a_launched("bad")), StartTask(a_launched("good"))])
        await settle()

        assert stage.ends == {"good": Succeeded()}
        assert dict(supervisor.running) == {}
        assert not supervisor.has_code(KEY)
        [told] = [r for r in caplog.records if r.msg == "code.escaped_its_guard"]
        assert told.levelno == logging.ERROR
        assert told.__dict__["error"] == "ZeroDivisionError"


@pytest.mark.parametrize("refusal", [CANCEL_REQUESTED, NOT_FOUND], ids=lambda it: it.code)
async def test_a_controller_that_may_not_enter_is_not_run_and_not_failed(refusal: Refusal):
    stage = Stage()
    stage.refusal = refusal
    async with running(stage) as supervisor:
        # Its door has no controller: running it would fail the test.
        supervisor.carry_out(KEY, [StartController("c")])
        await settle()

        assert [type(report) for report in stage.reports] == [EnterController, ControllerStopped]
        assert not supervisor.has_code(KEY)


async def test_a_controller_that_was_refused_because_we_close_has_not_failed():
    stage = Stage()
    stop = asyncio.Event()

    async def asks_too_late() -> None:
        try:
            await stop.wait()
        finally:
            raise RuntimeClosed("closed a moment ago")

    stage.controller = asks_too_late
    async with running(stage) as supervisor:
        supervisor.carry_out(KEY, [StartController("c")])
        await settle()
        assert supervisor.is_driven(KEY)

        supervisor.stop()
        await settle()

        assert [type(report) for report in stage.reports] == [EnterController]
        assert not supervisor.has_code(KEY)


async def test_a_controller_that_says_closed_although_nobody_closes_has_failed():
    stage = Stage()

    async def confused() -> None:
        raise RuntimeClosed("another runtime's")

    stage.controller = confused
    async with running(stage) as supervisor:
        supervisor.carry_out(KEY, [StartController("c")])
        await settle()

        assert [type(report) for report in stage.reports] == [EnterController, Fail]


async def test_a_controller_whose_flow_is_damaged_is_let_go_and_not_entered_again():
    stage = Stage()

    async def reads() -> None:
        raise SnapshotUnreadable("flow triage-1", "its checksum does not fit")

    stage.controller = reads
    async with running(stage) as supervisor:
        supervisor.carry_out(KEY, [StartController("c")])
        for _ in range(5):
            await settle()
            stage.clock.advance(10)

        assert [type(report) for report in stage.reports] == [EnterController, ControllerStopped]
        assert not supervisor.is_driven(KEY)


async def test_a_controller_the_store_fails_is_entered_again_after_a_pause_until_we_stop():
    stage = Stage()

    async def reads() -> None:
        raise StoreUnusable("flows.db", "a read failed")

    stage.controller = reads
    async with running(stage) as supervisor:
        supervisor.carry_out(KEY, [StartController("c")])
        await settle()
        assert [type(report) for report in stage.reports] == [EnterController]
        stage.clock.advance(1)
        await settle()
        assert [type(report) for report in stage.reports] == [EnterController] * 2

        supervisor.stop()
        await settle()

        assert EnterController not in {type(report) for report in stage.reports[2:]}
        assert not any(isinstance(report, Fail) for report in stage.reports)
        assert not supervisor.has_code(KEY)
