"""The functions of children: registered by name, or handed over in memory for one child.

A registered function is found again by any process that registers it. A bare one is kept under its child's
step name for as long as the child has not ended, and is gone with the process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container
from typing import TypeAlias

from flowstead.model.command import TaskDraft
from flowstead.model.flow import FlowKey, Json
from flowstead.model.task import Launch, StoredTask
from flowstead.registry import Registry, TaskDefinition

Function: TypeAlias = Callable[..., Awaitable[Json]]


class Functions:
    """What the children of one runtime can run."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._bound: dict[FlowKey, dict[str, Function]] = {}

    def define(self, function: str | Function) -> TaskDefinition:
        """The definition of a registered task, or one made up for a bare function."""
        if not isinstance(function, str) and not callable(function):
            raise TypeError(
                f"run= takes a task function or its name, not {type(function).__name__}."
            )
        definition = self._registry.definition_of(function)
        if definition is not None:
            return definition
        assert not isinstance(function, str), "an unknown name has been refused"
        name = getattr(function, "__name__", type(function).__name__)
        return TaskDefinition(name=name, function=function)

    def launch(
        self, definition: TaskDefinition, *, group: str | None = None, limit: int | None = None
    ) -> Launch:
        """How a child of this definition is run."""
        registered = self._registry.tasks.get(definition.name)
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

    def function_of(self, key: FlowKey, task: StoredTask) -> Function | None:
        """The function a launched child runs, or None if nobody here has it."""
        assert task.launch is not None
        function = self._bound.get(key, {}).get(task.run_id or task.task_id)
        if function is None and task.launch.function is not None:
            definition = self._registry.tasks.get(task.launch.function)
            function = None if definition is None else definition.function
        return function
