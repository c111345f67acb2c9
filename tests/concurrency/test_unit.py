"""Units: turns of several flows that are written together, by the last of them, or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flowstead.engine.unit import Unit
from flowstead.errors import CommitFailed, StoreError
from flowstead.store.codec import FlowWrite


class Member:
    """A writer that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[StoreError] = []

    def committed(self, first_position: int) -> None:
        raise AssertionError("a unit commits nothing itself")

    def failed(self, error: StoreError) -> None:
        self.told.append(error)


def write(*signals: Any) -> FlowWrite:
    return FlowWrite(None, (), (), signals)


ROWS: Any = ("row", "other row")
"""Rows are passed on as they are."""


def test_a_unit_of_one_is_due_at_once_with_its_rows_behind_its_own() -> None:
    unit, member = Unit(1, ROWS), Member()

    [(written, writer)] = unit.join(write("own"), member)

    assert writer is member
    assert tuple(written.signals) == ("own", *ROWS)


def test_nothing_is_due_before_the_last_has_said_and_then_all_of_it_in_order() -> None:
    unit, members = Unit(3, ROWS), [Member() for _ in range(3)]

    assert unit.join(write(), members[0]) == []
    assert unit.join(write(), members[1]) == []
    due = unit.join(write(), members[2])

    assert [writer for _, writer in due] == members
    assert [tuple(written.signals) for written, _ in due] == [ROWS, (), ()]


@pytest.mark.parametrize("leaver", range(3))
def test_who_leaves_is_not_waited_for_and_writes_nothing(leaver: int) -> None:
    unit, members = Unit(3, ROWS), [Member() for _ in range(3)]

    due: list[Any] = []
    for number, member in enumerate(members):
        due += unit.leave() if number == leaver else unit.join(write(), member)

    assert [writer for _, writer in due] == [m for n, m in enumerate(members) if n != leaver]
    assert tuple(due[0][0].signals) == ROWS


def test_rows_are_not_written_for_nobody() -> None:
    unit = Unit(2, ROWS)

    assert unit.leave() == unit.leave() == []


@pytest.mark.parametrize("when", range(3))
async def test_a_veto_fails_everybody_once_and_nothing_is_written(when: int) -> None:
    unit, members = Unit(3, ROWS), [Member() for _ in range(3)]

    due: list[Any] = []
    for number, member in enumerate(members):
        due += unit.veto() if number == when else unit.join(write(), member)
    await asyncio.sleep(0)

    assert due == []
    told = [len(member.told) for member in members]
    assert told == [0 if number == when else 1 for number in range(3)]
    assert all(isinstance(e, CommitFailed) for member in members for e in member.told)


def test_a_veto_without_anybody_to_fail_is_nothing() -> None:
    unit = Unit(2, ROWS)

    assert unit.veto() == unit.leave() == []
