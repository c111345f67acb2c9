"""What children run: functions registered by name or handed over in memory for one child, and specs.

A registered function is found again by any process that registers it, and a spec is in the child's row. A bare
function is kept under its child's step name for as long as the child has not ended, and is gone with the process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container
from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET, Raw

from flowstead import arguments
from flowstead.engine.engine import Engine
from flowstead.executors import Executors, Process
from flowstead.model.command import TaskDraft
from flowstead.model.flow import FlowKey, Json
from flowstead.model.retry import Retry
from flowstead.model.task import Launch, OnRestart, StoredTask
from flowstead.nested import NESTED, Nested
from flowstead.registry import Registry, TaskDefinition

Function: TypeAlias = Callable[..., Awaitable[Json]]
Runnable: TypeAlias = "str | Callable[..., Any] | Process | msgspec.Struct"
"""What may be run: a registered task or its name, any function, or a spec such as `Command` or `Nested`."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What one child wants otherwise than its task; None for as the task says."""

    timeout: float | None = None
    idle_timeout: float | None = None
    queue_timeout: float | None = None
    retry: Retry | None = None
    idempotent: bool | None = None


class Functions:
    """What the children of one runtime can run."""

    def __init__(self, registry: Registry, executors: Executors) -> None:
        self._registry = registry
        self._executors = executors
        self._bound: dict[FlowKey, dict[str, TaskDefinition]] = {}

    # ---- defining ---------------------------------------------------------------------------------

    def define(self, run: Runnable, policy: Policy | None = None) -> TaskDefinition:
        """The definition of a registered task, or one made up for what nobody registered, under this policy.

        Raises:
            TypeError, ValueError: It is nothing that can be run, or the policy makes no sense for it.
        """
        definition = self._found(run)
        return definition if policy is None else _under(definition, policy)

    def _found(self, run: Runnable) -> TaskDefinition:
        if isinstance(run, msgspec.Struct):
            return self._of_spec(run)
        if isinstance(run, Process):
            function = run.function
            return TaskDefinition(name=_name_of(function), function=function, executor="process")
        if not isinstance(run, str) and not callable(run):
            raise TypeError(
                f"run= takes a task function, its name or a spec, not {type(run).__name__}."
            )
        definition = self._registry.definition_of(run)
        if definition is not None:
            return definition
        assert not isinstance(run, str), "an unknown name has been refused"
        return TaskDefinition(name=_name_of(run), function=run)

    def _of_spec(self, spec: msgspec.Struct) -> TaskDefinition:
        if isinstance(spec, Nested):
            return self._of_flow(spec)
        executor = self._executors.for_spec(spec)
        if executor is None:
            raise TypeError(f"no executor is registered that runs {type(spec).__name__}.")
        name = str(getattr(spec, "label", "") or executor.name)
        return TaskDefinition(name=name, executor=executor.name, spec=spec)

    def _of_flow(self, spec: Nested) -> TaskDefinition:
        if spec.controller_id not in self._registry.controllers:
            known = ", ".join(sorted(self._registry.controllers)) or "none"
            raise ValueError(
                f"no controller {spec.controller_id!r} is registered; registered are: {known}."
            )
        return TaskDefinition(name=spec.label, executor=NESTED, spec=spec)

    def launch(
        self, definition: TaskDefinition, *, group: str | None = None, limit: int | None = None
    ) -> Launch:
        """How a child of this definition is run."""
        registered = self._registry.tasks.get(definition.name)
        known = registered is not None and registered.function is definition.function
        spec = definition.spec
        is_nested = definition.executor == NESTED
        return Launch(
            executor=definition.executor,
            spec=UNSET if spec is None else Raw(msgspec.json.encode(spec)),
            external=is_nested or self._executors.named(definition.executor).external,
            holds_slot=not is_nested,
            function=definition.name if known and definition.function is not None else None,
            on_restart=OnRestart.RETRY if definition.idempotent else OnRestart.LOST,
            retry=definition.retry,
            group=group,
            limit=limit,
        )

    @staticmethod
    def child_flow_id(definition: TaskDefinition, engine: Engine) -> str | None:
        """The id of the flow that a nested child will stand for."""
        if not isinstance(definition.spec, Nested):
            return None
        return engine.ids.flow_id(definition.spec.controller_id, engine.clock.now())

    # ---- keeping ----------------------------------------------------------------------------------

    def bind(self, key: FlowKey, draft: TaskDraft, definition: TaskDefinition) -> bool:
        """Keep a bare function for the child that will run it; answers whether none was kept already.

        Kept by step name, so that a controller run again hands its function to the child of its earlier run.
        """
        launch = draft.launch
        if launch is None or launch.function is not None or launch.spec is not UNSET:
            return False
        bound = self._bound.setdefault(key, {})
        name = draft.run_id or draft.task_id
        is_new = name not in bound
        bound.setdefault(name, definition)
        return is_new

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose bare functions are kept."""
        return self._bound.get(key, ())

    def forget(self, key: FlowKey, task: StoredTask | TaskDraft) -> None:
        """The child has ended."""
        bound = self._bound.get(key)
        if bound is not None:
            bound.pop(task.run_id or task.task_id, None)
            if not bound:
                del self._bound[key]

    def definition_of(self, key: FlowKey, task: StoredTask) -> TaskDefinition | None:
        """What a launched child runs, or None if nobody here has it."""
        launch = task.launch
        assert launch is not None
        bound = self._bound.get(key, {}).get(task.run_id or task.task_id)
        if bound is not None:
            return bound
        return None if launch.function is None else self._registry.tasks.get(launch.function)


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _under(definition: TaskDefinition, policy: Policy) -> TaskDefinition:
    """The definition, with what the policy says otherwise."""
    idempotent = definition.idempotent if policy.idempotent is None else policy.idempotent
    changed: dict[str, Any] = {
        name: seconds
        for name in ("timeout", "idle_timeout", "queue_timeout")
        if (seconds := arguments.seconds(getattr(policy, name), name)) is not None
    }
    if policy.retry is not None:
        changed["retry"] = arguments.retry_once_or_more(policy.retry, idempotent=idempotent)
    elif not idempotent:
        changed["retry"] = None
    if definition.executor == NESTED and (changed.get("retry") or policy.idempotent is not None):
        raise ValueError("a nested flow is not retried as a whole; its own steps are.")
    if definition.executor == NESTED and "idle_timeout" in changed:
        raise ValueError("a nested flow gives no sign of life; use timeout.")
    changed["idempotent"] = idempotent
    return msgspec.structs.replace(definition, **changed)
