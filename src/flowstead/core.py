"""The core of an open runtime: what all its faces share, and the check every call passes first."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from typing import Final

from flowstead import errors
from flowstead.engine.engine import Engine
from flowstead.functions import Functions
from flowstead.model.flow import FlowKey
from flowstead.store.port import Scope

_REMEMBERED_TASKS: Final = 16_384


class TaskHomes:
    """Which flow a child belongs to, for the children asked about lately. A child never moves."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, FlowKey] = OrderedDict()

    def remember(self, task_id: str, key: FlowKey) -> None:
        """Keep a child's flow; the oldest is forgotten beyond a bound."""
        self._homes[task_id] = key
        if len(self._homes) > _REMEMBERED_TASKS:
            self._homes.popitem(last=False)

    def find(self, task_id: str, scope: Scope) -> FlowKey | None:
        """The child's flow, if it is remembered and in scope."""
        key = self._homes.get(task_id)
        return key if key is not None and scope.owner_key in (None, key.owner_key) else None


class Core:
    """One open runtime, as its faces see it."""

    def __init__(self, engine: Engine, functions: Functions) -> None:
        self.engine = engine
        self.functions = functions
        self.homes = TaskHomes()
        self.creating: dict[tuple[str, str], asyncio.Future[None]] = {}
        """Creates under way, by owner and idempotency key."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._closed: str | None = None

    def close(self, reason: str) -> None:
        """Refuse every further call with this sentence."""
        self._closed = reason

    def enter(self) -> Engine:
        """The engine, for a call made in the right place and at the right time.

        Raises:
            RuntimeClosed: The runtime is closed.
            RuntimeError: The call comes from another event loop.
        """
        if self._closed is not None:
            raise errors.RuntimeClosed(self._closed)
        self.check_loop()
        return self.engine

    def check_loop(self) -> None:
        """Refuse calls from another event loop.

        Raises:
            RuntimeError: The call comes from another event loop.
        """
        # Asked for every call, so not of asyncio, which would ask the kernel for our process id each time.
        if threading.get_ident() != self._thread or not self._loop.is_running():
            raise RuntimeError(
                "This runtime belongs to another event loop. Open one in this loop, or send the call"
                " there with asyncio.run_coroutine_threadsafe."
            )
