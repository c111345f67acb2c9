"""Where the engine finds code: functions and controllers, each ready to run with the context it is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container

from flowstead.controller import FlowContext
from flowstead.engine.engine import Engine
from flowstead.functions import Functions
from flowstead.model.flow import FlowKey, Json
from flowstead.model.task import StoredTask
from flowstead.registry import Registry
from flowstead.store import codec
from flowstead.task_context import TaskContext


class CodeSource:
    """The code of one runtime's children and controllers. The engine's only way to it."""

    def __init__(self, registry: Registry) -> None:
        self.functions = Functions(registry)
        self._registry = registry
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Tell which engine the contexts speak to."""
        self._engine = engine

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose bare functions are kept."""
        return self.functions.bound_of(key)

    def forget(self, key: FlowKey, task: StoredTask) -> None:
        """The child has ended."""
        self.functions.forget(key, task)

    def code_of(self, key: FlowKey, task: StoredTask) -> Callable[[], Awaitable[Json]] | None:
        """The child's code with its context and input, ready to run."""
        assert self._engine is not None
        function = self.functions.function_of(key, task)
        if function is None:
            return None
        context = TaskContext(self._engine, key, task)
        return lambda: function(context, codec.decode_json(task.input_json))

    async def drive(self, key: FlowKey, controller_id: str, doc: bytes) -> None:
        """Run a flow's controller from the top."""
        assert self._engine is not None
        flow = FlowContext(self._engine, self.functions, key, doc)
        await self._registry.controllers[controller_id](flow)
