"""The registry: which functions are tasks and which are controllers, by name. Make your own; there is no global."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import msgspec

from flowstead import arguments
from flowstead.model.flow import Json
from flowstead.model.retry import Retry
from flowstead.model.task import CODE
from flowstead.rules.classify import Classify

if TYPE_CHECKING:
    from flowstead.controller import FlowContext
    from flowstead.executors.port import Executor
    from flowstead.task_context import TaskContext

    TaskFunction: TypeAlias = Callable[[TaskContext, Any], Awaitable[Json]]
    ControllerFunction: TypeAlias = Callable[[FlowContext], Awaitable[object]]

F = TypeVar("F", bound=Callable[..., Any])


class TaskDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """What a child runs, and the policy it runs under: a function, or a `spec` that its executor understands."""

    name: str
    function: Callable[..., Any] | None = None
    executor: str = CODE
    spec: msgspec.Struct | None = None
    timeout: float | None = None
    idle_timeout: float | None = None
    queue_timeout: float | None = None
    retry: Retry | None = None
    classify: Classify | None = None
    idempotent: bool = True
    concurrency: int | None = None


class Registry:
    """Names for functions, so that work can be found again by another process.

    A registry may serve several runtimes, and may be filled while they run.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, TaskDefinition] = {}
        self.controllers: dict[str, ControllerFunction] = {}
        self.executors: dict[str, Executor] = {}
        self._by_function: dict[Callable[..., Any], TaskDefinition] = {}

    @overload
    def task(self, function: F) -> F: ...

    @overload
    def task(
        self,
        *,
        name: str | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        queue_timeout: float | None = None,
        retry: Retry | None = None,
        classify: Classify | None = None,
        idempotent: bool = True,
        concurrency: int | None = None,
        executor: str = CODE,
    ) -> Callable[[F], F]: ...

    def task(
        self,
        function: F | None = None,
        *,
        name: str | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        queue_timeout: float | None = None,
        retry: Retry | None = None,
        classify: Classify | None = None,
        idempotent: bool = True,
        concurrency: int | None = None,
        executor: str = CODE,
    ) -> F | Callable[[F], F]:
        """Register `async def fn(ctx: TaskContext, input) -> Json` as a task. Use as a decorator.

        Args:
            function: The function, where the decorator is used without arguments. A plain `def` runs in a thread.
            name: What it is called in records; the function's own name unless given. Keep it stable.
            timeout: Seconds an attempt may take before it is stopped and counts as timed out.
            idle_timeout: Seconds an attempt may go without `ctx.progress` or `ctx.heartbeat`.
            queue_timeout: Seconds a child may wait for its first start; then it ends as timed out.
            retry: How failures and time-outs are tried again; not at all unless given.
            classify: Answers the category of an exception, or None to leave it to the usual rules.
            idempotent: False for work that must not be done twice: never a second attempt by itself, and `lost`
                as the outcome where a crash leaves it unknown.
            concurrency: Most children of this task running at once in the whole runtime.
            executor: What runs the function: `code`, `process`, or the name of one that was registered.

        Raises:
            ValueError: The name is taken, or an argument makes no sense.
        """

        def register(function: F) -> F:
            given = function.__name__ if name is None else name
            definition = TaskDefinition(
                name=arguments.text(given, "name"),
                function=function,
                executor=arguments.text(executor, "executor"),
                timeout=arguments.seconds(timeout, "timeout"),
                idle_timeout=arguments.seconds(idle_timeout, "idle_timeout"),
                queue_timeout=arguments.seconds(queue_timeout, "queue_timeout"),
                retry=arguments.retry_once_or_more(retry, idempotent=idempotent),
                classify=classify,
                idempotent=idempotent,
                concurrency=arguments.optional_count(concurrency, "concurrency"),
            )
            if definition.name in self.tasks:
                raise ValueError(f"a task named {definition.name!r} is already registered.")
            self.tasks[definition.name] = definition
            self._by_function[function] = definition
            return function

        return register if function is None else register(function)

    def controller(self, controller_id: str) -> Callable[[F], F]:
        """Register `async def fn(flow: FlowContext)` as the code that drives flows of this controller id.

        Raises:
            TypeError: It is no `async def`; a plain one could not wait for anything.
            ValueError: The id is taken, or blank.
        """
        given = arguments.text(controller_id, "controller_id")

        def register(function: F) -> F:
            if not _is_async(function):
                raise TypeError(f"the controller {given!r} must be an async def of (flow).")
            if given in self.controllers:
                raise ValueError(f"a controller {given!r} is already registered.")
            self.controllers[given] = function
            return function

        return register

    def executor(self, executor: Executor) -> Executor:
        """Register something that runs children: by its name in `task(executor=…)`, or by the spec it takes.

        Raises:
            ValueError: The name is taken.
        """
        if executor.name in self.executors:
            raise ValueError(f"an executor named {executor.name!r} is already registered.")
        self.executors[executor.name] = executor
        return executor

    def replaced(self, replace: Callable[[TaskDefinition], TaskDefinition]) -> Registry:
        """A registry with the same controllers whose tasks are what `replace` makes of them, for tests.

        The functions registered here stand for the replaced tasks there.
        """
        registry = Registry()
        registry.controllers = dict(self.controllers)
        registry.executors = dict(self.executors)
        registry.tasks = {name: replace(task) for name, task in self.tasks.items()}
        registry._by_function = {
            function: registry.tasks[task.name] for function, task in self._by_function.items()
        }
        return registry

    def concurrency_of(self, name: str) -> int | None:
        """Most children of a task running at once, if it has a limit of its own."""
        task = self.tasks.get(name)
        return None if task is None else task.concurrency

    def definition_of(self, run: str | Callable[..., Any]) -> TaskDefinition | None:
        """The definition behind a name or a registered function; None for a function nobody registered.

        Raises:
            ValueError: A name nobody registered; the message lists those that are.
        """
        if not isinstance(run, str):
            return self._by_function.get(run) if isinstance(run, Hashable) else None
        if run not in self.tasks:
            known = ", ".join(sorted(self.tasks)) or "none"
            raise ValueError(f"no task named {run!r} is registered; registered are: {known}.")
        return self.tasks[run]


def _is_async(function: object) -> bool:
    """Whether calling it makes a coroutine: an `async def`, or an object whose `__call__` is one."""
    return iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)
