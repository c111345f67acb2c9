"""What a power cut may leave behind: crash images, cut from the journal of a `Disk`.

What is assumed of the disk, each point as little as SQLite itself assumes:

- What was written to a file, or cut off it, before that file's last sync is there. Nothing else has to be.
- Of what is unsynced any part may be there, in any order: nothing, everything, a prefix, a random part, a part
  with one write torn at a 512-byte boundary, or only the last thing that was done.
- A torn write has a first part and lacks the rest; the bytes beside it are unharmed.
- Truncating is an operation like a write: unsynced, it may have happened or not.
- Names in the directory (creating, deleting) are kept by the file system's own journal: they reach the disk in
  their order, so that a prefix of them survives, and everything up to a sync of the directory is there. SQLite
  syncs the directory with the first sync of a new log or journal. A file whose name comes back after an
  unsynced delete has the content it had.
- The side file of the lock is not looked at: it has no content that matters.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.disk.vfs import Record

SECTOR = 512


class Case(NamedTuple):
    """One image: the journal is cut before this record, a model decides about what is unsynced there."""

    cut: int
    model: str
    seed: int


@dataclass
class Image:
    """Files as a power cut left them."""

    files: dict[str, bytes]
    lost: int
    """How many writes are missing from it, in whole or in part."""

    def write(self, path: Path) -> None:
        """Put the files where a store will look for them, in a new directory."""
        path.parent.mkdir(parents=True)
        suffixes = {"db": "", "wal": "-wal", "journal": "-journal"}
        for role, content in self.files.items():
            target = os.open(f"{path}{suffixes[role]}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(target, "wb") as file:
                file.write(content)


@dataclass
class Platter:
    """The disk at one moment: what is safe, and what is only promised."""

    safe: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    unsynced: list[Record] = field(default_factory=list)

    @classmethod
    def holding(cls, image: Image) -> Platter:
        """A disk that has come back after a power cut."""
        inodes = {role: -number for number, role in enumerate(image.files, 1)}
        return cls({inodes[role]: bytearray(data) for role, data in image.files.items()}, inodes)

    def take(self, record: Record) -> None:
        """Let one more operation reach the disk's cache, or pass through it."""
        if record.kind == "create" and record.data:
            self.safe[record.inode] = bytearray(record.data)
            self.names[record.file] = record.inode
        elif record.kind in ("create", "delete", "write", "truncate"):
            self.unsynced.append(record)
        if record.kind != "sync" and not record.directory:
            return
        rest = []
        for each in self.unsynced:
            if record.directory if is_name(each) else each.inode == record.inode:
                apply(each, self.safe, self.names)
            else:
                rest.append(each)
        self.unsynced = rest

    def crash(self, model: str, rng: random.Random) -> Image:
        """Cut the power."""
        kept = MODELS[model](self.unsynced, rng)
        names = [record for record in self.unsynced if is_name(record)]
        # Whatever the model does to the content of files, names go in their order.
        count = {"all": len(names), "none": 0}.get(model, rng.randint(0, len(names)))
        content = {inode: bytearray(data) for inode, data in self.safe.items()}
        table = dict(self.names)
        for record in [*names[:count], *(each for each in kept if not is_name(each))]:
            apply(record, content, table)
        whole = {id(record) for record in kept}
        return Image(
            {role: bytes(content.get(inode, b"")) for role, inode in table.items()},
            lost=sum(r.kind == "write" and id(r) not in whole for r in self.unsynced),
        )


def is_name(record: Record) -> bool:
    """Whether a record is about the directory."""
    return record.kind in ("create", "delete")


def apply(record: Record, content: dict[int, bytearray], names: dict[str, int]) -> None:
    """Do to files what a record says."""
    if record.kind == "create":
        names[record.file] = record.inode
        return
    if record.kind == "delete":
        names.pop(record.file, None)
        return
    file = content.setdefault(record.inode, bytearray())
    if record.kind == "truncate":
        del file[record.offset :]
        file.extend(bytes(record.offset - len(file)))
        return
    file.extend(bytes(max(0, record.offset - len(file))))
    file[record.offset : record.offset + len(record.data)] = record.data


Survivors = Sequence[Record]


def _none(unsynced: Survivors, rng: random.Random) -> Survivors:
    return []


def _all(unsynced: Survivors, rng: random.Random) -> Survivors:
    return unsynced


def _prefix(unsynced: Survivors, rng: random.Random) -> Survivors:
    return unsynced[: rng.randint(0, len(unsynced))]


def _subset(unsynced: Survivors, rng: random.Random) -> Survivors:
    share = rng.choice((0.1, 0.5, 0.9))
    return [record for record in unsynced if rng.random() < share]


def _torn(unsynced: Survivors, rng: random.Random) -> Survivors:
    kept = list(_subset(unsynced, rng))
    tearable = [record for record in unsynced if boundaries(record)]
    if not tearable:
        return kept
    victim = rng.choice(tearable)
    torn = tear(victim, rng.choice(boundaries(victim)))
    # In its old place, because later operations go over it.
    order = {id(record): index for index, record in enumerate(unsynced)}
    rest = [record for record in kept if record is not victim]
    earlier = [record for record in rest if order[id(record)] < order[id(victim)]]
    return [*earlier, torn, *rest[len(earlier) :]]


def _last(unsynced: Survivors, rng: random.Random) -> Survivors:
    return unsynced[-1:]


MODELS: dict[str, Callable[[Survivors, random.Random], Survivors]] = {
    "none": _none,
    "all": _all,
    "prefix": _prefix,
    "subset": _subset,
    "torn": _torn,
    "last": _last,
}


def boundaries(record: Record) -> list[int]:
    """Where a write may be torn: how many of its bytes come before each sector boundary inside of it."""
    if record.kind != "write":
        return []
    first = SECTOR - record.offset % SECTOR
    return list(range(first, len(record.data), SECTOR))


def tear(record: Record, size: int) -> Record:
    """Only the first so many bytes of a write."""
    return Record("write", record.file, record.inode, record.offset, record.data[:size])


def choose(journal: Sequence[Record], number: int, seed: int) -> list[Case]:
    """So many cases in the order of their cuts: beside acknowledgements, beside syncs, and anywhere."""
    rng = random.Random(seed)
    marks = [index for index, record in enumerate(journal) if record.kind == "mark"]
    syncs = [index for index, record in enumerate(journal) if record.kind == "sync"]
    anywhere = range(len(journal) + 1)
    models = list(MODELS)
    cases = []
    for index in range(number):
        # Just after an acknowledgement little is unsynced; it is in the midst of a commit that much can be lost.
        beside: Sequence[int] = rng.choice((marks, syncs, syncs, anywhere, anywhere))
        cut = rng.choice(beside or anywhere) + rng.choice((0, 0, 1))
        model = models[index % len(models)]
        cases.append(Case(min(cut, len(journal)), model, rng.getrandbits(32)))
    return sorted(cases)


def crash_images(
    journal: Sequence[Record], cases: Sequence[Case], before: Image | None = None
) -> Iterator[tuple[Case, Image]]:
    """The image of each case, on a disk that held `before`; cases come in the order of their cuts."""
    platter = Platter() if before is None else Platter.holding(before)
    done = 0
    for case in cases:
        for record in journal[done : case.cut]:
            platter.take(record)
        done = case.cut
        yield case, platter.crash(case.model, random.Random(case.seed))


def torn_pages(journal: Sequence[Record]) -> Iterator[tuple[Record, Case, Image]]:
    """Each page of each checkpoint, torn wherever it can be, when all the other pages are there."""
    platter, rng = Platter(), random.Random()
    for index, record in enumerate(journal):
        if (record.kind, record.file) == ("sync", "db"):
            waiting = platter.unsynced
            for place, page in enumerate(waiting):
                for size in boundaries(page) if page.file == "db" else ():
                    torn = [*waiting[:place], tear(page, size), *waiting[place + 1 :]]
                    image = Platter(platter.safe, platter.names, torn).crash("all", rng)
                    yield page, Case(index, f"page at {page.offset} torn after {size}", 0), image
        platter.take(record)
