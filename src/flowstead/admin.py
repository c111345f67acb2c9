"""The operator's face: every owner's flows. Give it to nobody who may see only his own."""

from __future__ import annotations

from flowstead.core import Core
from flowstead.store.port import EVERYONE, Unreadable
from flowstead.verbs import ScopedVerbs


class Admin(ScopedVerbs):
    """All that a session may read, its cancels and retries, over every owner's flows; and what only operators need.

    What only an owner does is done for him through `bind_session(session_key=flow.owner_key)`; an open wait is also
    answered by its token, through `Runtime.answer` and `Runtime.vote`. Where several owners use the same flow id, a
    flow id stands for the newest of them.
    """

    def __init__(self, core: Core) -> None:
        super().__init__(core, EVERYONE, "admin")

    async def list_unreadable(self) -> list[Unreadable]:
        """Every stored row that cannot be read, and why. Reads the whole store.

        Such rows are left as they are: other flows are unaffected, and nothing is started over them.
        Cancelling only stops the reading.
        """
        return await self._core.enter().store.list_unreadable()

    def unregistered_controllers(self) -> dict[str, int]:
        """Controllers of queued and running flows that this runtime has no code for, with their counts.

        As found when the runtime was opened; empty without a registry. Their flows stay as they are.
        """
        return dict(self._core.enter().unregistered)

    def unregistered_tasks(self) -> list[str]:
        """Task functions and executors that children wait for and this runtime has no code for, by name.

        As met so far; their children stay as they are.
        """
        return sorted(self._core.enter().unregistered_tasks)
