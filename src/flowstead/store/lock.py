"""The side file that says who owns a store: locked for life, freed by the kernel at death.

The lock keeps two living runtimes apart; it cannot stop a process that was frozen, overtaken and thawed. That
is what the owner epoch inside the database is for.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from flowstead.errors import StoreInUse

# Whoever may put a link beside the database must not thereby choose what we write to.
_OPEN_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Holder(msgspec.Struct, frozen=True):
    """Who holds a store, as told to whoever is refused."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def this_process() -> Holder:
    """The holder this process would be."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Holder(os.getpid(), socket.gethostname(), since)


class OwnerLock:
    """The lock on `<database>.lock`. Not reentrant; one per store."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._name = database.name
        self._descriptor: int | None = None
        self._beside: Path | None = None

    def acquire(self, *, takeover: bool) -> None:
        """Take the lock at once or say who has it; `confirm` it once the database is taken as well.

        With `takeover`, a lock that is held is left to its holder, and another file is locked beside it.

        Raises:
            StoreInUse: Somebody holds it, and `takeover` was not asked for.
        """
        if self._try(self._path):
            return
        if not takeover:
            raise StoreInUse(self._name, self._holder())
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        if not self._try(beside):
            raise StoreInUse(self._name, "this process, which is taking it over already")
        self._beside = beside

    def confirm(self) -> None:
        """Say who holds the store, and let a takeover's file take the place of the holder's.

        Not before the database is taken: a takeover that fails must leave its owner's lock where others
        look for it.
        """
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, msgspec.json.encode(this_process()), 0)
        if self._beside is not None:
            os.replace(self._beside, self._path)
            self._beside = None

    def release(self) -> None:
        """Let go. Releasing twice is fine; the file stays, unlocked."""
        beside, self._beside = self._beside, None
        if beside is not None:
            beside.unlink(missing_ok=True)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _try(self, path: Path) -> bool:
        while True:
            descriptor = os.open(path, _OPEN_FLAGS, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            # Somebody may have put another file in place between our open and our lock.
            if _is_at(descriptor, path):
                self._descriptor = descriptor
                return True
            os.close(descriptor)

    def _holder(self) -> str:
        try:
            return str(msgspec.json.decode(self._path.read_bytes(), type=Holder))
        except (OSError, msgspec.MsgspecError):
            return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
