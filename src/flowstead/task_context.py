"""What the code of a child is given: its own name and number, and a way to say how far it is."""

from __future__ import annotations

from typing import Final

from flowstead import arguments
from flowstead.engine.engine import Engine
from flowstead.model.command import ProgressReport
from flowstead.model.flow import FlowKey
from flowstead.model.task import StoredTask
from flowstead.results import raise_refusal


class TaskContext:
    """What a task function is told about itself. It sees its input and this, and nothing of its flow's state."""

    def __init__(self, engine: Engine, key: FlowKey, task: StoredTask) -> None:
        self._engine = engine
        self._key = key
        self.flow_id: Final = key.flow_id
        self.task_id: Final = task.task_id
        self.run_id: Final = task.run_id
        self.attempt: Final = task.attempt
        self.deadline: Final = (
            None if task.timeout is None else engine.clock.now() + round(task.timeout * 1000)
        )
        """When this attempt is stopped, epoch milliseconds; None if never."""

    async def progress(self, summary: str) -> None:
        """Say how far the work is, durably and for people to read. Cancelling the caller does not take it back.

        Raises:
            CommitFailed: Certainly not written.
        """
        said = arguments.optional_text(summary, "summary")
        await self._report(ProgressReport(task_id=self.task_id, summary=said))

    async def heartbeat(self) -> None:
        """Say that the work is alive, durably. Cancelling the caller does not take it back.

        Raises:
            CommitFailed: Certainly not written.
        """
        await self._report(ProgressReport(task_id=self.task_id))

    async def _report(self, report: ProgressReport) -> None:
        self._engine.supervisor.touch(self.task_id, self.attempt)
        reply = await self._engine.report(self._key, report)
        if reply.refusal is not None:
            raise_refusal(reply.refusal)
