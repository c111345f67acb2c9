"""Flows within one scope: reads and waits for ends, the same for an owner and for an operator.

The scope is part of every query, so a face bound to one owner cannot find anything else; the operator's face
is the same code with everybody in scope.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from typing import Final

from flowstead import arguments
from flowstead.answering import open_wait
from flowstead.core import Core
from flowstead.engine.feed import Watcher
from flowstead.model.code import TASK_NOT_FOUND, Code
from flowstead.model.event import Event
from flowstead.model.flow import Flow, FlowKey, FlowStatus, StoredFlow, has_ended
from flowstead.model.task import (
    Outcome,
    StoredTask,
    Task,
    TaskStatus,
    TaskSummary,
    is_active,
    outcome_of,
)
from flowstead.model.update import Update, UpdateStatus
from flowstead.results import OpenWait, error_for
from flowstead.settlement import flows_below
from flowstead.store import codec
from flowstead.store.port import FlowQuery, Scope
from flowstead.store.summary import add_up

_SHORTEST_PREFIX: Final = 4


class ScopedFlows:
    """Reads and waits within one scope."""

    def __init__(self, core: Core, scope: Scope, actor: str) -> None:
        self._core = core
        self._scope = scope
        self._actor = actor

    # ---- reading ----------------------------------------------------------------------------------

    async def get(self, flow_id: str) -> Flow | None:
        """The flow as committed, or None: no such flow, or another owner's. Cancelling only stops the reading."""
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        if wanted is None:
            return None
        if self._scope.owner_key is not None:
            doc = engine.doc_of(FlowKey(self._scope.owner_key, wanted))
            if doc is not None:
                return codec.read_flow(doc)
        return await engine.store.find_flow(self._scope, wanted)

    async def list(
        self,
        *,
        status: str | Iterable[str] | None = None,
        controller_id: str | None = None,
        correlation_id: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> builtins.list[Flow]:
        """Flows, newest first, at most `limit` of them. Cancelling only stops the reading.

        Args:
            status: One status or several.
            controller_id: Only flows of this controller.
            correlation_id: Only flows of this business process.
            limit: The size of a page.
            after: The last flow id of the page before.

        Raises:
            ValueError: A status that does not exist, or `after` names no flow.
        """
        engine = self._core.enter()
        statuses = arguments.choices(status, FlowStatus, "status")
        if status is not None and not statuses:
            return []
        query = FlowQuery(
            statuses=statuses,
            controller_id=arguments.optional_text(controller_id, "controller_id"),
            correlation_id=arguments.optional_text(correlation_id, "correlation_id"),
            before_key=None if after is None else await self._cursor(after),
        )
        return await engine.store.list_flows(self._scope, query, arguments.count(limit, "limit"))

    async def find_latest(self) -> Flow | None:
        """The newest flow, ended or not. Cancelling only stops the reading."""
        found = await self.list(limit=1)
        return found[0] if found else None

    async def resolve(self, token: str) -> Flow | None:
        """The flow a person means: by its id, the session's own key, a correlation id, or the start of an id.

        The session's key, and a correlation id several flows share, stand for the newest live flow, or the
        newest at all. The start of an id counts from four characters on and only if it fits one flow.
        Cancelling only stops the reading.
        """
        wanted = arguments.lookup(token, "token")
        wanted = wanted.strip() if wanted else None
        if not wanted:
            return None
        if (flow := await self.get(wanted)) is not None:
            return flow
        if wanted == self._scope.owner_key:
            return await self._newest(FlowQuery())
        if (flow := await self._newest(FlowQuery(correlation_id=wanted))) is not None:
            return flow
        if len(wanted) < _SHORTEST_PREFIX:
            return None
        store = self._core.enter().store
        found = await store.list_flows(self._scope, FlowQuery(id_prefix=wanted), 2)
        return found[0] if len(found) == 1 else None

    async def get_task_summary(self, flow_id: str, *, nested: bool = False) -> TaskSummary | None:
        """Counts of the flow's children, from an index. Cancelling only stops the reading.

        With `nested`, those of the flows below it are counted in, however deep they lie.
        """
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        if wanted is None:
            return None
        summary = await engine.store.summarize(self._scope, wanted)
        if summary is None or not nested:
            return summary
        key = await self._find(wanted)
        below = [] if key is None else await flows_below(engine.store, key)
        scope = Scope(None if key is None else key.owner_key)
        parts = [await engine.store.summarize(scope, each.flow_id) for each in below]
        return add_up([summary, *(part for part in parts if part is not None)])

    async def get_task(self, task_id: str) -> Task | None:
        """The child as committed, or None. Cancelling only stops the reading."""
        engine, wanted = self._core.enter(), arguments.lookup(task_id, "task_id")
        found = None if wanted is None else await engine.store.find_task(self._scope, wanted)
        return None if found is None else found[1]

    async def list_tasks(
        self, flow_id: str, *, status: str | Iterable[str] | None = None
    ) -> builtins.list[Task]:
        """The flow's children, oldest first; empty for a flow that is not there.

        Cancelling only stops the reading.
        """
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        statuses = arguments.choices(status, TaskStatus, "status")
        if wanted is None or (status is not None and not statuses):
            return []
        return await engine.store.list_tasks(self._scope, wanted, statuses=statuses)

    async def history(
        self, flow_id: str, *, after_seq: int = 0, limit: int = 1000
    ) -> builtins.list[Event]:
        """What happened to the flow, in order, from `seq` 1; empty for a flow that is not there.

        Cancelling only stops the reading.
        """
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        after = arguments.optional_sequence_number(after_seq, "after_seq") or 0
        most = arguments.count(limit, "limit")
        if wanted is None:
            return []
        return await engine.store.history(self._scope, wanted, after_seq=after, limit=most)

    async def list_waits(
        self, flow_id: str | None = None, *, limit: int = 100, after: int = 0
    ) -> builtins.list[OpenWait]:
        """What flows wait for, oldest first, with all that is needed to answer. Cancelling only stops the reading.

        Args:
            flow_id: Of one flow only.
            limit: The size of a page.
            after: The `number` of the last wait of the page before.
        """
        engine = self._core.enter()
        wanted = None if flow_id is None else arguments.lookup(flow_id, "flow_id")
        after_key = arguments.optional_sequence_number(after, "after") or 0
        most = arguments.count(limit, "limit")
        if flow_id is not None and wanted is None:
            return []
        rows = await engine.store.list_open_waits(
            self._scope, flow_id=wanted, after_key=after_key, limit=most
        )
        return [open_wait(await self._owner_of(row), row) for row in rows]

    async def list_updates(
        self,
        flow_id: str | None = None,
        *,
        status: str | Iterable[str] | None = None,
        limit: int = 100,
        after: int = 0,
    ) -> builtins.list[Update]:
        """What owners were told, or are to be, oldest first. Cancelling only stops the reading.

        Args:
            flow_id: Of one flow only.
            status: `pending`, `delivered`, `delivery_failed`, `superseded`, `digested`, or several of them.
            limit: The size of a page.
            after: The `number` of the last update of the page before.

        Raises:
            ValueError: A status that does not exist.
        """
        engine = self._core.enter()
        wanted = None if flow_id is None else arguments.lookup(flow_id, "flow_id")
        statuses = arguments.choices(status, UpdateStatus, "status")
        after_key = arguments.optional_sequence_number(after, "after") or 0
        most = arguments.count(limit, "limit")
        if (flow_id is not None and wanted is None) or (status is not None and not statuses):
            return []
        return await engine.store.list_updates(
            self._scope, flow_id=wanted, statuses=statuses, after_key=after_key, limit=most
        )

    def watch(
        self,
        flow_id: str | None = None,
        *,
        after_seq: int | None = None,
        after_position: int | None = None,
    ) -> Watcher:
        """Events as they are committed: `async with flows.watch(id) as events: async for event in events`.

        Without gaps, each once, in order. A watcher that falls behind reads on from the history; it holds
        nobody up.

        Args:
            flow_id: One flow; every flow of the session unless given.
            after_seq: For one flow: resume after this `seq`. 0 for the beginning, None for from now on.
            after_position: For all flows: resume after this `position`.

        Raises:
            FlowNotFound: On entering: no such flow.
        """
        engine = self._core.enter()
        if flow_id is None:
            if after_seq is not None:
                raise ValueError("after_seq counts inside one flow; use after_position for all.")
            after = arguments.optional_sequence_number(after_position, "after_position")
            return engine.feed.watch(self._scope, None, after)
        if after_position is not None:
            raise ValueError("after_position counts over all flows; use after_seq for one.")
        after = arguments.optional_sequence_number(after_seq, "after_seq")
        return engine.feed.watch(self._scope, arguments.lookup(flow_id, "flow_id") or "", after)

    # ---- waiting ----------------------------------------------------------------------------------

    async def result(self, flow_id: str) -> Flow:
        """Wait for the flow to end and return it as it ended. Cancelling only stops the waiting.

        Raises:
            FlowNotFound: No such flow.
            RuntimeClosed: The runtime was closed first; the flow goes on with the next one.
        """
        engine, wanted = self._core.enter(), arguments.lookup(flow_id, "flow_id")
        key = None if wanted is None else await self._find(wanted)
        if key is None:
            raise error_for(Code.NOT_FOUND, "Flow not found.")
        end = engine.flow_ends.register(key)
        try:
            flow = await engine.store.find_flow(Scope(key.owner_key), key.flow_id)
            if flow is not None and has_ended(flow):
                return flow
            return codec.read_flow(await end)
        finally:
            end.cancel()

    async def wait_task(self, task_id: str) -> Outcome:
        """Wait for the child to end and return its outcome. Cancelling only stops the waiting.

        Raises:
            FlowNotFound: No such child.
            RuntimeClosed: The runtime was closed first.
        """
        engine, wanted = self._core.enter(), arguments.lookup(task_id, "task_id")
        if wanted is None:
            raise error_for(Code.NOT_FOUND, TASK_NOT_FOUND.reason)
        end = engine.task_ends.register(wanted)
        try:
            found = await engine.store.find_task(self._scope, wanted)
            if found is None:
                raise error_for(Code.NOT_FOUND, TASK_NOT_FOUND.reason)
            if not is_active(found[1]):
                return outcome_of(found[1])
            return outcome_of(codec.read_task(await end))
        finally:
            end.cancel()

    # ---- finding ----------------------------------------------------------------------------------

    async def _owner_of(self, row: StoredFlow | StoredTask) -> str:
        """Whose flow it is, or belongs to; a child's row itself does not say."""
        if isinstance(row, StoredFlow):
            return row.owner_key
        if self._scope.owner_key is not None:
            return self._scope.owner_key
        found = await self._core.engine.store.find_task(self._scope, row.task_id)
        assert found is not None, "no child is ever taken out"
        return found[0].owner_key

    async def _find(self, flow_id: str) -> FlowKey | None:
        """The key of a flow in scope."""
        if self._scope.owner_key is not None:
            key = FlowKey(self._scope.owner_key, flow_id)
            if self._core.engine.doc_of(key) is not None:
                return key
        flow = await self._core.engine.store.find_flow(self._scope, flow_id)
        return None if flow is None else FlowKey(flow.owner_key, flow.flow_id)

    async def _newest(self, query: FlowQuery) -> Flow | None:
        store = self._core.enter().store
        live = FlowQuery(correlation_id=query.correlation_id, live=True)
        for asked in (live, query):
            if found := await store.list_flows(self._scope, asked, 1):
                return found[0]
        return None

    async def _cursor(self, after: str) -> int:
        wanted = arguments.lookup(after, "after")
        store = self._core.engine.store
        key = None if wanted is None else await store.key_of(self._scope, wanted)
        if key is None:
            raise ValueError(f"after={after!r:.80} names no flow; pass the last flow_id of a page.")
        return key
