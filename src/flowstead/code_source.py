"""Where the engine finds code: registered by name, or handed over in memory for one child."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container

from flowstead.controller import FlowContext
from flowstead.engine.engine import Engine
from flowstead.model.command import TaskDraft
from flowstead.model.flow import FlowKey, Json
from flowstead.model.task import Launch, StoredTask
from flowstead.registry import Registry, TaskDefinition
from flowstead.store import codec
from flowstead.task_context import TaskContext


class CodeSource:
    """The code of one runtime's children and controllers. The engine's only way to it."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._bound: dict[FlowKey, dict[str, Callable[..., Awaitable[Json]]]] = {}
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Tell the engine whose code this is."""
        self._engine = engine

    def define(self, function: str | Callable[..., Awaitable[Json]]) -> TaskDefinition:
        """The definition of a registered task, or one made up for a bare function."""
        if not isinstance(function, str) and not callable(function):
            raise TypeError(
                f"run= takes a task function or its name, not {type(function).__name__}."
            )
        definition = self.registry.definition_of(function)
        if definition is not None:
            return definition
        assert not isinstance(function, str), "an unknown name has been refused"
        name = getattr(function, "__name__", type(function).__name__)
        return TaskDefinition(name=name, function=function)

    def launch(
        self, definition: TaskDefinition, *, group: str | None = None, limit: int | None = None
    ) -> Launch:
        """How a child of this definition is run."""
        registered = self.registry.tasks.get(definition.name)
        known = registered is not None and registered.function is definition.function
        return Launch(
            function=definition.name if known else None,
            on_restart=definition.on_restart,
            retry=definition.retry,
            group=group,
            limit=limit,
        )

    def bind(self, key: FlowKey, draft: TaskDraft, definition: TaskDefinition) -> bool:
        """Keep a bare function for the child that will run it; answers whether none was kept already.

        Kept by step name, so that a controller run again hands its function to the child of its earlier run.
        """
        if draft.launch is None or draft.launch.function is not None:
            return False
        functions = self._bound.setdefault(key, {})
        name = draft.run_id or draft.task_id
        is_new = name not in functions
        functions.setdefault(name, definition.function)
        return is_new

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose bare functions are kept."""
        return self._bound.get(key, ())

    def forget(self, key: FlowKey, task: StoredTask | TaskDraft) -> None:
        """The child has ended."""
        functions = self._bound.get(key)
        if functions is not None:
            functions.pop(task.run_id or task.task_id, None)
            if not functions:
                del self._bound[key]

    def code_of(self, key: FlowKey, task: StoredTask) -> Callable[[], Awaitable[Json]] | None:
        """The child's code with its context and input, ready to run."""
        assert self._engine is not None and task.launch is not None
        function = self._bound.get(key, {}).get(task.run_id or task.task_id)
        if function is None and task.launch.function is not None:
            definition = self.registry.tasks.get(task.launch.function)
            function = None if definition is None else definition.function
        if function is None:
            return None
        context = TaskContext(self._engine, key, task)
        found = function
        return lambda: found(context, codec.decode_json(task.input_json))

    async def drive(self, key: FlowKey, controller_id: str, doc: bytes) -> None:
        """Run a flow's controller from the top."""
        assert self._engine is not None
        flow = FlowContext(self._engine, self, key, doc)
        await self.registry.controllers[controller_id](flow)
