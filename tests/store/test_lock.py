"""The lock beside a database: who gets it when several reach for it in the same moment."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flowstead.errors import StoreInUse
from flowstead.store.lock import OwnerLock


@pytest.fixture
def lock_of(db: Path) -> Iterator[Callable[[], OwnerLock]]:
    """Makes locks on the test's database; each is released in the end."""
    with ExitStack() as stack:

        def make() -> OwnerLock:
            lock = OwnerLock(db)
            stack.callback(lock.release)
            return lock

        yield make


def lock_files(db: Path) -> list[str]:
    return sorted(path.name for path in db.parent.glob(f"{db.name}.lock*"))


def test_a_second_takeover_while_one_is_under_way_is_refused(
    db: Path, lock_of: Callable[[], OwnerLock]
) -> None:
    lock_of().acquire(takeover=False)
    first = lock_of()
    first.acquire(takeover=True)

    with pytest.raises(StoreInUse, match="this process, which is taking it over already"):
        lock_of().acquire(takeover=True)

    first.confirm()
    assert lock_files(db) == ["flows.db.lock"]


def test_a_takeover_given_up_leaves_the_owners_lock_where_others_look_for_it(
    db: Path, lock_of: Callable[[], OwnerLock]
) -> None:
    owner = lock_of()
    owner.acquire(takeover=False)
    owner.confirm()
    said = db.with_name("flows.db.lock").read_bytes()
    taker = lock_of()
    taker.acquire(takeover=True)

    taker.release()

    assert lock_files(db) == ["flows.db.lock"]
    assert db.with_name("flows.db.lock").read_bytes() == said
    with pytest.raises(StoreInUse, match=f"process {os.getpid()} "):
        lock_of().acquire(takeover=False)


@pytest.mark.parametrize("becomes", ["gone", "another"])
def test_a_file_that_changed_between_its_opening_and_its_locking_is_no_lock(
    db: Path, lock_of: Callable[[], OwnerLock], monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    lock_file, flock = db.with_name("flows.db.lock"), fcntl.flock
    tries: list[int] = []

    def flock_too_late(descriptor: int, operation: int) -> None:
        if not tries:
            lock_file.unlink()
            if becomes == "another":
                lock_file.touch()
        tries.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    lock_of().acquire(takeover=False)

    assert len(tries) == 2
    with pytest.raises(StoreInUse):
        lock_of().acquire(takeover=False)
