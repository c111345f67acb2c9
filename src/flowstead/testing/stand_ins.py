"""Stand-ins for tasks, so that a flow can be run where nothing it talks to exists."""

from __future__ import annotations

import inspect
import posixpath
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from flowstead.executors import Call, Command
from flowstead.model.flow import Json
from flowstead.model.task import CODE
from flowstead.registry import Registry, TaskDefinition


def offline(
    registry: Registry, answers: Mapping[str, Any], *, programs: Mapping[str, Any] | None = None
) -> Registry:
    """The registry with the same controllers and policies, whose tasks answer at once and touch nothing.

    Functions that are not registered, those of `flow.once` among them, still run in earnest.

    Args:
        registry: The one the flows use in earnest. It is left as it is.
        answers: For each task's name: a function of the input, async or not, an exception to raise, or the
            result itself. A task without an answer fails, saying so.
        programs: The same for each program that a `Command` names, without its folder. None is started.

    Raises:
        ValueError: An answer for a task that is not registered; the message lists those that are.
    """
    unknown = sorted(set(answers) - set(registry.tasks))
    if unknown:
        known = ", ".join(sorted(registry.tasks)) or "none"
        raise ValueError(
            f"no task named {', '.join(unknown)} is registered; registered are: {known}."
        )
    stood_in = registry.replaced(lambda task: _stand_in(task, answers))
    stood_in.executors["command"] = _OfflinePrograms(programs or {})
    return stood_in


class _OfflinePrograms:
    """Answers for programs that are not started."""

    name = "command"
    spec = Command
    external = False

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers

    async def run(self, call: Call) -> Json:
        """The answer for the program, instead of the program."""
        program = posixpath.basename(call.spec.argv[0])
        return await _answering(_answer_for("the program", program, self._answers))(
            call.context, call.input
        )


def _stand_in(task: TaskDefinition, answers: Mapping[str, Any]) -> TaskDefinition:
    function = _answering(_answer_for("the task", task.name, answers))
    return msgspec.structs.replace(task, function=function, executor=CODE)


def _answer_for(what: str, name: str, answers: Mapping[str, Any]) -> Any:
    if name in answers:
        return answers[name]
    return NotImplementedError(f"offline() was given no answer for {what} {name!r}.")


def _answering(answer: Any) -> Callable[..., Awaitable[Json]]:
    async def answer_with(_: object, given: Json) -> Json:
        if isinstance(answer, BaseException) or _is_exception_class(answer):
            raise answer
        found = answer(given) if callable(answer) else answer
        return await found if inspect.isawaitable(found) else found

    return answer_with


def _is_exception_class(answer: Any) -> bool:
    return isinstance(answer, type) and issubclass(answer, BaseException)
