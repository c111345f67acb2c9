"""The registry: which functions are tasks and which are controllers, by name. Make your own; there is no global."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import msgspec

from flowstead import arguments
from flowstead.model.flow import Json
from flowstead.model.retry import Retry
from flowstead.model.task import OnRestart

if TYPE_CHECKING:
    from flowstead.controller import FlowContext
    from flowstead.task_context import TaskContext

    TaskFunction: TypeAlias = Callable[[TaskContext, Any], Awaitable[Json]]
    ControllerFunction: TypeAlias = Callable[[FlowContext], Awaitable[object]]

F = TypeVar("F", bound=Callable[..., Any])


class TaskDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A task function with the policy it runs under."""

    name: str
    function: Callable[..., Awaitable[Json]]
    timeout: float | None = None
    retry: Retry | None = None
    on_restart: OnRestart = OnRestart.RETRY


class Registry:
    """Names for functions, so that work can be found again by another process.

    A registry may serve several runtimes, and may be filled while they run.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, TaskDefinition] = {}
        self.controllers: dict[str, ControllerFunction] = {}
        self._by_function: dict[Callable[..., Any], TaskDefinition] = {}

    @overload
    def task(self, function: F) -> F: ...

    @overload
    def task(
        self,
        *,
        name: str | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        on_restart: str = "retry",
    ) -> Callable[[F], F]: ...

    def task(
        self,
        function: F | None = None,
        *,
        name: str | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        on_restart: str = "retry",
    ) -> F | Callable[[F], F]:
        """Register `async def fn(ctx: TaskContext, input) -> Json` as a task. Use as a decorator.

        Args:
            function: The function, where the decorator is used without arguments.
            name: What it is called in records; the function's own name unless given. Keep it stable.
            timeout: Seconds an attempt may take before it is stopped and counts as timed out.
            retry: How failures and time-outs are tried again; not at all unless given.
            on_restart: `retry` starts a child again whose process died before its outcome was recorded;
                `lost` ends it as lost instead, for work that must not be done twice.

        Raises:
            ValueError: The name is taken, or an argument makes no sense.
        """

        def register(function: F) -> F:
            given = function.__name__ if name is None else name
            definition = TaskDefinition(
                name=arguments.text(given, "name"),
                function=function,
                timeout=arguments.seconds(timeout, "timeout"),
                retry=arguments.retry(retry),
                on_restart=arguments.choice(on_restart, OnRestart, "on_restart"),
            )
            if definition.name in self.tasks:
                raise ValueError(f"a task named {definition.name!r} is already registered.")
            self.tasks[definition.name] = definition
            self._by_function[function] = definition
            return function

        return register if function is None else register(function)

    def controller(self, controller_id: str) -> Callable[[F], F]:
        """Register `async def fn(flow: FlowContext)` as the code that drives flows of this controller id."""
        given = arguments.text(controller_id, "controller_id")

        def register(function: F) -> F:
            if given in self.controllers:
                raise ValueError(f"a controller {given!r} is already registered.")
            self.controllers[given] = function
            return function

        return register

    def replaced(self, replace: Callable[[TaskDefinition], TaskDefinition]) -> Registry:
        """A registry with the same controllers whose tasks are what `replace` makes of them, for tests.

        The functions registered here stand for the replaced tasks there.
        """
        registry = Registry()
        registry.controllers = dict(self.controllers)
        registry.tasks = {name: replace(task) for name, task in self.tasks.items()}
        registry._by_function = {
            function: registry.tasks[task.name] for function, task in self._by_function.items()
        }
        return registry

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
