"""The executors of one runtime: those built in, those the host brings, and those that packages offer.

A package offers one by an entry point of the group `flowstead.executors`, under the executor's name, that leads to
an executor or to a class that makes one without arguments. Packages are looked at only when a name or a spec asks
for something nobody else has, and a package that cannot be loaded spoils nothing but itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import msgspec

from flowstead.executors.code import CodeExecutor
from flowstead.executors.command import CommandExecutor
from flowstead.executors.port import Executor
from flowstead.executors.process import ProcessExecutor
from flowstead.log import get_logger

log = get_logger(__name__)

GROUP: Final = "flowstead.executors"


class ExecutorUnusable(LookupError):
    """A package offers an executor of that name, but it cannot be used."""


class Executors:
    """Finds executors by their name and by the spec they take.

    Args:
        extra: Executors of the host, beside those built in or in the place of one of the same name.
        threads: Most plain functions in threads at once.
        processes: Most worker processes at once; the number of processors if None.

    Raises:
        TypeError: One of `extra` is no executor.
        ValueError: Two have the same name, or take the same spec.
    """

    def __init__(
        self, extra: Iterable[Executor] = (), threads: int = 40, processes: int | None = None
    ) -> None:
        self._known: dict[str, Executor] = {}
        self._by_spec: dict[type[msgspec.Struct], Executor] = {}
        self._unusable: dict[str, str] = {}
        self._has_looked = False
        for executor in extra:
            if (problem := _problem_of(executor)) is not None:
                raise TypeError(f"{executor!r} is no executor: {problem}.")
            self._add(executor)
        self._add_built_in(CodeExecutor(threads))
        self._add_built_in(ProcessExecutor(processes))
        self._add_built_in(CommandExecutor())

    def named(self, name: str) -> Executor:
        """The executor of that name; packages are asked last.

        Raises:
            ExecutorUnusable: A package offers it, but it cannot be used.
            LookupError: Nobody has it.
        """
        if name not in self._known and name not in self._unusable:
            self._load(name, list(entry_points(group=GROUP, name=name)))
        if name in self._known:
            return self._known[name]
        if name in self._unusable:
            raise ExecutorUnusable(self._unusable[name])
        offered = {point.name for point in entry_points(group=GROUP)}
        names = ", ".join(sorted({*self._known, *offered}))
        raise LookupError(f"there is no executor {name!r}; there are: {names}.")

    def for_spec(self, spec: object) -> Executor | None:
        """The executor that takes specs of this very class, or None; packages are asked last."""
        kind: Any = type(spec)
        if kind not in self._by_spec and isinstance(spec, msgspec.Struct) and not self._has_looked:
            self._has_looked = True
            for name in sorted({point.name for point in entry_points(group=GROUP)}):
                if name not in self._known and name not in self._unusable:
                    self._load(name, list(entry_points(group=GROUP, name=name)))
        return self._by_spec.get(kind)

    async def aclose(self) -> None:
        """Close those that can be closed. One that fails is logged, and does not keep the others open."""
        for executor in self._known.values():
            aclose = getattr(executor, "aclose", None)
            if aclose is not None:
                try:
                    await aclose()
                except Exception as error:
                    log.warning(
                        "executor.not_closed", executor=executor.name, error=type(error).__name__
                    )

    def _add_built_in(self, executor: Executor) -> None:
        if executor.name not in self._known:
            self._add(executor)

    def _add(self, executor: Executor) -> None:
        if executor.name in self._known:
            raise ValueError(f"there are two executors named {executor.name!r}.")
        kind = executor.spec
        if kind is not None and kind in self._by_spec:
            other = self._by_spec[kind].name
            raise ValueError(f"{kind.__qualname__} is taken by {other!r} and by {executor.name!r}.")
        self._known[executor.name] = executor
        if kind is not None:
            self._by_spec[kind] = executor

    def _load(self, name: str, points: list[EntryPoint]) -> None:
        """Load what packages offer under a name; what is wrong with it is kept, and told."""
        if not points:
            return
        offers = " and ".join(sorted({_package_of(point) for point in points}))
        try:
            if len({point.value for point in points}) > 1:
                raise ValueError("more than one package offers it")
            self._add(_made_from(points[0]))
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__qualname__}: {error}"
            self._unusable[name] = f"the executor {name!r} of {offers} cannot be used: {problem}"
            log.warning(
                "executor.unusable", executor=name, package=offers, error=type(error).__name__
            )


def _made_from(point: EntryPoint) -> Executor:
    loaded = point.load()
    executor: Executor = loaded() if isinstance(loaded, type) else loaded
    if (problem := _problem_of(executor)) is not None:
        raise TypeError(problem)
    if executor.name != point.name:
        raise ValueError(f"it calls itself {executor.name!r}")
    return executor


def _problem_of(executor: object) -> str | None:
    """What keeps an object from being an executor."""
    if isinstance(executor, type):
        return "it is a class"
    name = getattr(executor, "name", None)
    if not isinstance(name, str) or not name.strip():
        return "its `name` is not a text"
    spec = getattr(executor, "spec", executor)
    if spec is not None and not (isinstance(spec, type) and issubclass(spec, msgspec.Struct)):
        return "its `spec` is neither None nor a class of msgspec.Struct"
    if not isinstance(getattr(executor, "external", None), bool):
        return "its `external` is neither True nor False"
    if not inspect.iscoroutinefunction(getattr(executor, "run", None)):
        return "its `run` is not an async method"
    return None


def _package_of(point: EntryPoint) -> str:
    return "an unnamed package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
