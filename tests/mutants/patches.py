"""Reads and applies the seeded bugs: unified diffs against `src/`, each headed by what it breaks and who hunts it.

A hunk is found by its text, not by its line numbers, and has to be there exactly once. So a patch goes on
applying while the code around it moves, and stops applying when the code it breaks is no longer that code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "patches"
ROOT: Final = Path(__file__).parents[2]

_NAME: Final = re.compile(r"(\d{2,3})-[a-z0-9-]+\.patch")


class Misfit(Exception):
    """The patch is not a patch, or does not fit the code."""


@dataclass(frozen=True)
class Hunk:
    """A piece of one file, before and after."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One deliberate bug: in words, as hunks, and the tests that have to notice."""

    number: int
    name: str
    bug: str
    hunters: tuple[str, ...]
    hunks: tuple[Hunk, ...]


def all_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """Every bug there is, by number."""
    return sorted(map(read, folder.glob("*.patch")), key=lambda mutant: mutant.number)


def read(path: Path) -> Mutant:
    """One patch file.

    Raises:
        Misfit: Its name, its header or its hunks are not as they should be.
    """
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise Misfit(f"{path.name} is not named like 07-what-it-is.patch")
    header, start, diff = path.read_text(encoding="utf-8").partition("\n--- ")
    told = _header(path, header)
    hunks = tuple(_hunks(path, ("--- " + diff).splitlines(keepends=True))) if start else ()
    if not hunks:
        raise Misfit(f"{path.name} changes nothing")
    return Mutant(
        number=int(named[1]),
        name=path.stem,
        bug=told["Bug"],
        hunters=tuple(told["Hunters"].split()),
        hunks=hunks,
    )


def planted(mutant: Mutant, root: Path) -> dict[Path, str]:
    """The files of a tree that has `src/` at its top, as they would be with the bug.

    Raises:
        Misfit: A hunk is not found there exactly once.
    """
    texts: dict[Path, str] = {}
    for hunk in mutant.hunks:
        path = root / hunk.file
        text = texts[path] if path in texts else _text(mutant, path)
        if (found := text.count(hunk.old)) != 1:
            raise Misfit(f"{mutant.name} fits {hunk.file} {found} times:\n{hunk.old}")
        texts[path] = text.replace(hunk.old, hunk.new)
    return texts


def plant(mutant: Mutant, root: Path) -> None:
    """Put the bug into such a tree.

    Raises:
        Misfit: It does not fit. Nothing was changed.
    """
    for path, text in planted(mutant, root).items():
        path.write_text(text, encoding="utf-8")


def _text(mutant: Mutant, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Misfit(f"{mutant.name} changes {path.name}, which is not there") from error


def _header(path: Path, header: str) -> dict[str, str]:
    told = dict(line.partition(": ")[::2] for line in header.splitlines())
    if told.keys() != {"Bug", "Hunters"} or not all(value.strip() for value in told.values()):
        raise Misfit(f"{path.name} does not begin with the lines 'Bug: …' and 'Hunters: …' alone")
    return told


def _hunks(path: Path, lines: list[str]) -> Iterable[Hunk]:
    file, old, new = "", list[str](), list[str]()
    for line in [*lines, "@@"]:
        if line.startswith(("@@", "--- ")):
            if old != new:
                yield Hunk(file, "".join(old), "".join(new))
            old, new = [], []
        elif line.startswith("+++ b/src/"):
            file = line.removeprefix("+++ b/").split("\t")[0].strip()
        elif not file or line[0] not in " -+":
            raise Misfit(f"{path.name} has a line that is no diff against src/: {line!r}")
        else:
            if line[0] in " -":
                old.append(line[1:])
            if line[0] in " +":
                new.append(line[1:])
