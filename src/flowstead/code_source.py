"""Where the engine finds code: children and controllers, each ready to run with the context it is given."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Container
from typing import Any

import msgspec
from msgspec import UNSET

from flowstead.controller import FlowContext
from flowstead.engine.child_scope import ChildScope
from flowstead.engine.engine import Engine
from flowstead.engine.parked import Parked
from flowstead.engine.supervisor import Work
from flowstead.executors import Call, Executor, Executors
from flowstead.functions import Functions
from flowstead.model.flow import FlowKey
from flowstead.model.limits import Limits
from flowstead.model.task import CODE, StoredTask
from flowstead.nested import NESTED, Census, NestedRunner
from flowstead.registry import Registry, TaskDefinition
from flowstead.rules.digests import DigestTime
from flowstead.store import codec
from flowstead.task_context import TaskContext


class CodeSource:
    """The code of one runtime's children and controllers. The engine's only way to it."""

    def __init__(
        self, registry: Registry, limits: Limits, digest_time: DigestTime | None = None
    ) -> None:
        self._contexts: dict[FlowKey, FlowContext] = {}
        self._digest_time = digest_time or DigestTime()
        self._all_executors = Executors(
            registry.executors.values(), threads=limits.threads, processes=limits.processes
        )
        self.functions = Functions(registry, self._all_executors)
        self.executors: Container[str] = _Names(self._all_executors)
        self._registry = registry
        self._census = Census(limits.nested_flows)
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Tell which engine the contexts speak to."""
        self._engine = engine

    async def aclose(self) -> None:
        """Let go of what the executors hold, once nothing runs any more."""
        await self._all_executors.aclose()

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose bare functions are kept."""
        return self.functions.bound_of(key)

    def forget(self, key: FlowKey, task: StoredTask) -> None:
        """The child has ended."""
        self.functions.forget(key, task)

    def code_of(self, key: FlowKey, task: StoredTask, child: ChildScope) -> Work | None:
        """The child's code with its context and input, ready to run."""
        assert self._engine is not None and task.launch is not None
        if task.child_flow_id is not None:
            return Work(NestedRunner(self._engine, self._census, key, task, child).run)
        definition = self.functions.definition_of(key, task)
        function = None if definition is None else definition.function
        classify = None if definition is None else definition.classify
        context = TaskContext(self._engine, key, task)
        if task.launch.executor == CODE and inspect.iscoroutinefunction(function):
            run = function
            return Work(lambda: run(context, codec.decode_json(task.input_json)), classify)
        if function is None and task.launch.spec is UNSET:
            return None
        executor = self._all_executors.named(task.launch.executor)
        if task.launch.executor == CODE:
            child.hint = "its function runs in a thread, which cannot be stopped from outside"
        call = Call(
            context=context,
            input=codec.decode_json(task.input_json),
            function=function,
            spec=_spec_of(task, executor, definition),
            touch=child.touch,
            on_kill=child.on_kill,
            is_stopped=lambda: child.scope.cancel_called,
            interrupted=child.adopted or task.interruptions > 0,
        )
        return Work(lambda: executor.run(call), classify)

    async def drive(self, key: FlowKey, controller_id: str, doc: bytes) -> None:
        """Run a flow's controller from the top."""
        assert self._engine is not None
        flow = self._contexts[key] = FlowContext(
            self._engine, self.functions, key, doc, digest_time=self._digest_time
        )
        try:
            await self._registry.controllers[controller_id](flow)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if flow.is_parked:
                raise Parked from error
            raise
        finally:
            if flow.is_parked:
                flow.close()
            if self._contexts.get(key) is flow:
                del self._contexts[key]
        if flow.is_parked:
            # It took the signal for its own, and went on to its end.
            raise Parked

    def park(self, key: FlowKey) -> None:
        """End the flow's controller where it waits."""
        if (flow := self._contexts.get(key)) is not None:
            flow.park()


class _Names:
    """The names of the executors there are, asked one at a time: packages are looked at only when needed."""

    def __init__(self, executors: Executors) -> None:
        self._executors = executors

    def __contains__(self, name: object) -> bool:
        if name == NESTED:
            return True
        try:
            self._executors.named(str(name))
        except LookupError:
            return False
        return True


def _spec_of(task: StoredTask, executor: Executor, definition: TaskDefinition | None) -> Any:
    """What the child is to do, as an instance of its executor's own class."""
    assert task.launch is not None
    if task.launch.spec is UNSET or executor.spec is None:
        return None if definition is None else definition.spec
    return msgspec.json.decode(task.launch.spec, type=executor.spec)
