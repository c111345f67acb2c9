"""Stand-ins for tasks, so that a flow can be run where nothing it talks to exists."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from flowstead.model.flow import Json
from flowstead.registry import Registry, TaskDefinition


def offline(registry: Registry, answers: Mapping[str, Any]) -> Registry:
    """The registry with the same controllers and policies, whose tasks answer at once and touch nothing.

    Functions that are not registered, those of `flow.once` among them, still run in earnest.

    Args:
        registry: The one the flows use in earnest. It is left as it is.
        answers: For each task's name: a function of the input, async or not, an exception to raise, or the
            result itself. A task without an answer fails, saying so.

    Raises:
        ValueError: An answer for a task that is not registered; the message lists those that are.
    """
    unknown = sorted(set(answers) - set(registry.tasks))
    if unknown:
        known = ", ".join(sorted(registry.tasks)) or "none"
        raise ValueError(
            f"no task named {', '.join(unknown)} is registered; registered are: {known}."
        )
    return registry.replaced(lambda task: _stand_in(task, answers))


def _stand_in(task: TaskDefinition, answers: Mapping[str, Any]) -> TaskDefinition:
    if task.name in answers:
        answer = answers[task.name]
    else:
        answer = NotImplementedError(f"offline() was given no answer for the task {task.name!r}.")
    return msgspec.structs.replace(task, function=_answering(answer))


def _answering(answer: Any) -> Callable[..., Awaitable[Json]]:
    async def answer_with(_: object, given: Json) -> Json:
        if isinstance(answer, BaseException) or _is_exception_class(answer):
            raise answer
        found = answer(given) if callable(answer) else answer
        return await found if inspect.isawaitable(found) else found

    return answer_with


def _is_exception_class(answer: Any) -> bool:
    return isinstance(answer, type) and issubclass(answer, BaseException)
