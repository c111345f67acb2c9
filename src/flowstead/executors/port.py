"""The port: what an executor is given for one attempt of a child, and what it promises in return.

The stop ladder, as an executor sees it:

    cancel   CancelledError at its await, perhaps several times. It returns or raises only when its work is gone.
    kill     the callback it gave to `Call.on_kill` is called, on the loop, perhaps several times.
    abandon  the runtime records the end without it. Whatever it answers later is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from flowstead.model.flow import Json

if TYPE_CHECKING:
    from flowstead.task_context import TaskContext


class Call:
    """One attempt of a child, given to an executor.

    Attributes:
        context: What the child's code is told about itself.
        input: The child's input, decoded; a copy of its own.
        function: What to run, for executors that run functions.
        spec: What to run, for executors that take a spec, as an instance of its class.
        touch: Say that the work is alive, for the idle deadline. Not durable; to be called on the loop only.
        on_kill: Tell how the work is killed. The callback is called on the loop, and may be called again.
        is_stopped: Whether the child has been asked to stop; to be asked from any thread.
        interrupted: An earlier attempt was cut off by the death of the process; something of it may be left.
    """

    __slots__ = (
        "context",
        "function",
        "input",
        "interrupted",
        "is_stopped",
        "on_kill",
        "spec",
        "touch",
    )

    def __init__(
        self,
        *,
        context: TaskContext,
        input: Json,
        function: Callable[..., Any] | None = None,
        spec: Any = None,
        touch: Callable[[], object],
        on_kill: Callable[[Callable[[], object]], object],
        is_stopped: Callable[[], bool] = lambda: False,
        interrupted: bool = False,
    ) -> None:
        self.context: Final = context
        self.input: Final = input
        self.function: Final = function
        self.spec: Final = spec
        self.touch: Final = touch
        self.on_kill: Final = on_kill
        self.is_stopped: Final = is_stopped
        self.interrupted: Final = interrupted


class Executor(Protocol):
    """Runs attempts of one kind. One executor runs many at once, all on one event loop.

    It may have an `async def aclose(self)`; the runtime calls it once nothing runs any more.
    """

    @property
    def name(self) -> str:
        """How it is known in a child's record; it never changes."""
        ...

    @property
    def spec(self) -> type[msgspec.Struct] | None:
        """The class of the specs it takes, which must survive JSON; None if it runs functions."""
        ...

    @property
    def external(self) -> bool:
        """Whether something of its work may outlive our process."""
        ...

    async def run(self, call: Call) -> Json:
        """Run one attempt to its end. Cancelling ends the work; this returns or raises once it is gone."""
        ...
