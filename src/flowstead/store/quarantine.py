"""Setting a damaged database aside, whole, on somebody's word: the runtime itself never moves or mends a file.

The assumption that keeps it crash-safe: a database file that is missing beside a log with something in it is
refused, so the log goes last. Cut off in the midst, there is nothing a runtime would start empty over, and the
next call takes the rest to where the beginning went.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

import msgspec

from flowstead.store.lock import OwnerLock, this_process

MANIFEST: Final = "manifest.json"
# In the order they are moved; SQLite makes the memory of the log anew.
_SUFFIXES: Final = ("", "-journal", "-shm", "-wal")
_BLOCK: Final = 1024 * 1024


class SetAside(msgspec.Struct, frozen=True):
    """One file that was set aside."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What lies in a directory of a database that was set aside."""

    database: str
    when: str
    why: str | None
    files: list[SetAside]


def set_aside(path: str | os.PathLike[str], why: str | None = None) -> Path:
    """Move a database with its log into a new directory beside it, so that a new one can be begun.

    The files are moved, not copied, and nothing in them is changed; the directory is its user's alone. Its
    `manifest.json` has their names, sizes and SHA-256, when it was done, and why. Nothing is ever overwritten.
    A call that was cut off is finished by calling again. Afterwards a runtime opens the path as a new, empty store.

    Args:
        path: The database file. What belongs to it goes along: `-wal`, `-shm`, `-journal`.
        why: For whoever finds the directory later.

    Returns:
        The directory.

    Raises:
        StoreInUse: A runtime owns the database. Nothing was moved.
        FileNotFoundError: There is nothing to set aside.
    """
    database = Path(path).absolute()
    if not any(_beside(database).values()):
        raise FileNotFoundError(f"There is no {database.name} to set aside.")
    lock = OwnerLock(database)
    lock.acquire(takeover=False)
    try:
        lock.confirm()
        there = _beside(database)
        directory = _unfinished(database, there) or _begin(database, there, why)
        for name, is_there in there.items():
            if is_there:
                _move(database.with_name(name), directory / name)
    finally:
        lock.release()
    return directory


def _beside(database: Path) -> dict[str, bool]:
    """The files a database may consist of, in the order they are moved, and whether they are there."""
    names = [database.name + suffix for suffix in _SUFFIXES]
    return {name: database.with_name(name).is_file() for name in names}


def _begin(database: Path, there: dict[str, bool], why: str | None) -> Path:
    """A new directory with its manifest, before anything is moved."""
    when = this_process().since
    manifest = Manifest(
        database=database.name,
        when=when,
        why=why,
        files=[
            _described(database.with_name(name)) for name, is_there in there.items() if is_there
        ],
    )
    directory = _new_directory(database, when.replace("-", "").replace(":", ""))
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    descriptor = os.open(directory / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(directory)
    _sync(database.parent)
    return directory


def _new_directory(database: Path, when: str) -> Path:
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        directory = database.with_name(f"{database.name}.set-aside-{when}{suffix}")
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
            continue
        return directory


def _unfinished(database: Path, there: dict[str, bool]) -> Path | None:
    """The directory of a call that was cut off after it had moved the database; the rest belongs there."""
    if there[database.name]:
        return None
    left = {name for name, is_there in there.items() if is_there}
    for directory in sorted(database.parent.glob(f"{_escaped(database.name)}.set-aside-*")):
        try:
            manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError):
            continue
        missing = {file for file in manifest.files if not (directory / file.name).exists()}
        if {file.name for file in missing} == left and all(
            _described(database.with_name(file.name)) == file for file in missing
        ):
            return directory
    return None


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _described(file: Path) -> SetAside:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return SetAside(file.name, size, digest.hexdigest())


def _move(file: Path, to: Path) -> None:
    # One instant, in which it is at one of both places; the directory is ours, so nothing is there.
    file.chmod(0o600)
    file.rename(to)
    _sync(to.parent)
    _sync(file.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
