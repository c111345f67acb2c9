"""How long the runtime keeps the event loop to itself: every callback is timed, and those that are its own count.

A callback is the runtime's if its code lies in the package, or if it is a step of a task that the runtime has
made for itself and named. The steps of clients, controllers and children are not, and neither is anything asyncio
does between callbacks. Turns are measured by the wall clock, so a machine that is busy elsewhere lengthens them.
"""

from __future__ import annotations

import asyncio
import gc
import time
from asyncio import events
from functools import partial
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Final

import flowstead

_PACKAGE: Final = str(Path(flowstead.__file__).parent)
_FLOOR_SECONDS: Final = 0.001


class Turns:
    """Watch the longest turn inside a `with` block, and the longest without garbage collection.

    Timing slows the loop down: never watch a timed pass.
    """

    def __init__(self) -> None:
        self.longest = self.longest_working = 0.0
        self.name = self.working_name = "none"
        self._collected = 0.0
        self._began = 0.0
        self._original: Any = None

    def __enter__(self) -> Turns:
        self._original = original = getattr(events.Handle, "_run")  # noqa: B009
        clock = time.perf_counter

        def timed(handle: asyncio.Handle) -> None:
            callback, collected = handle._callback, self._collected  # type: ignore[attr-defined]
            start = clock()
            original(handle)
            took = clock() - start
            if took > _FLOOR_SECONDS and (name := _owner(callback)):
                if took > self.longest:
                    self.longest, self.name = took, name
                working = took - (self._collected - collected)
                if working > self.longest_working:
                    self.longest_working, self.working_name = working, name

        setattr(events.Handle, "_run", timed)  # noqa: B010 - asyncio has no hook for this
        gc.callbacks.append(self._on_collection)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.callbacks.remove(self._on_collection)
        setattr(events.Handle, "_run", self._original)  # noqa: B010

    def __str__(self) -> str:
        longest, working = self.longest * 1000, self.longest_working * 1000
        return (
            f"{self.name} {longest:.1f} ms; without collecting garbage"
            f" {self.working_name} {working:.1f} ms"
        )

    def _on_collection(self, phase: str, _facts: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self._collected += time.perf_counter() - self._began


def _owner(callback: Any) -> str | None:
    """The name of the runtime's callback; None for anybody else's."""
    while isinstance(callback, partial):
        callback = callback.func
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        name = task.get_name()
        code = getattr(task.get_coro(), "cr_code", None)
        return name if name.startswith("flowstead ") or _is_ours(code) else None
    code = getattr(callback, "__code__", None)
    return callback.__qualname__ if _is_ours(code) else None


def _is_ours(code: CodeType | None) -> bool:
    return code is not None and code.co_filename.startswith(_PACKAGE)
