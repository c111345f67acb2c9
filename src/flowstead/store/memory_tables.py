"""The rows of a store in memory, and changes to them that can be taken back."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, TypeVar

from flowstead.errors import WriteConflict
from flowstead.model.flow import FlowKey
from flowstead.store.codec import EventRow, FlowRow, SignalRow, TaskRow, UpdateRow

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_ABSENT: Final = object()


class MemoryTables:
    """The rows. Share them between stores to play several owners of one database."""

    def __init__(self) -> None:
        self.flows: dict[int, FlowRow] = {}
        self.tasks: dict[int, TaskRow] = {}
        self.events: dict[int, EventRow] = {}
        self.flow_keys: dict[FlowKey, int] = {}
        self.idempotency_keys: dict[tuple[str, str], int] = {}
        self.task_keys: dict[str, int] = {}
        self.run_keys: dict[tuple[int, str], int] = {}
        self.children: dict[int, dict[int, None]] = {}
        self.lines: dict[int, dict[int, int]] = {}
        self.signals: dict[int, SignalRow] = {}
        self.signal_ids: dict[tuple[str, str], int] = {}
        self.kept: dict[str, dict[int, None]] = {}
        self.updates: dict[int, UpdateRow] = {}
        self.slots: dict[tuple[int, str], int] = {}
        self.pending: dict[int, None] = {}
        # By what a wait has or once had: only the row says whether it has it now.
        self.flow_waits: dict[str, dict[int, None]] = {}
        self.task_waits: dict[str, dict[int, None]] = {}
        self.flow_tokens: dict[str, int] = {}
        self.task_tokens: dict[str, int] = {}
        self.epoch = 0
        self.owner: object | None = None
        self.last_position = 0
        self.key = 0


class Transaction:
    """Changes to tables that can be taken back."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: list[tuple[dict[Any, Any], Any, Any]] = []

    def put(self, table: dict[K, V], key: K, value: V) -> None:
        self._before.append((table, key, table.get(key, _ABSENT)))
        table[key] = value

    def insert(self, table: dict[K, V], key: K, value: V) -> None:
        if key in table:
            raise WriteConflict(f"{self._name} refused a row: {key!r} exists.")
        self.put(table, key, value)

    def drop(self, table: dict[K, V], key: K) -> None:
        """Take out what may be there."""
        if key in table:
            self._before.append((table, key, table.pop(key)))

    def roll_back(self) -> None:
        for table, key, value in reversed(self._before):
            if value is _ABSENT:
                del table[key]
            else:
                table[key] = value
