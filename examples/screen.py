"""What the examples print and ask: colours and a progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unicodedata import east_asian_width

STYLES = {"business": "yellow", "personal": "magenta", "later": "dim"}


class Screen:
    """Lines for people. Plain when piped, when NO_COLOR is set, or where rich is not installed."""

    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._console = _console()

    def say(self, line: str = "", style: str = "") -> None:
        """One line. Mail may hold anything; nothing but printable characters reaches the terminal."""
        safe = "".join(letter if letter.isprintable() else " " for letter in line)
        if self._console is None:
            print(safe, flush=True)
            return
        from rich.text import Text

        self._console.print(Text(safe, style), overflow="ellipsis", no_wrap=True)

    def say_mail(self, done: int, total: int, route: str, about: str, why: str) -> None:
        """One message and where it went."""
        self.say(f"[{done:3}/{total}] {route:8} {_cell(about, 52)} {why}", STYLES.get(route, "red"))

    async def ask(self, question: str) -> str | None:
        """What a person types; None where nobody is there to be asked, or says Ctrl-D.

        Everything else goes on while the person thinks. Cancelling takes the question back.
        """
        if not sys.stdin.isatty():
            return None
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        self.say(f"? {question}", "bold yellow")
        answer = "\n"
        while answer.isspace():
            answer = await _line()
        return answer.strip() or None

    @contextmanager
    def counting(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar under the lines, moved by calling what this yields."""
        if self._console is None:
            yield lambda done: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = TextColumn("{task.description}"), BarColumn(40), MofNCompleteColumn()
        with Progress(*columns, console=self._console, transient=True) as progress:
            bar = progress.add_task(label, total=total)
            yield lambda done: progress.update(bar, completed=done)


async def _line() -> str:
    """The next line of the terminal, empty at its end. A thread in `readline` could not be called back."""
    loop, typed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, typed.set)
    try:
        await typed.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline()


def _cell(text: str, width: int) -> str:
    """The text cut or filled to a width in columns; some letters take two."""
    cut = ""
    for letter in text:
        columns = 2 if east_asian_width(letter) in "WF" else 1
        if columns > width:
            break
        cut, width = cut + letter, width - columns
    return cut + " " * width


def _console() -> Any:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)
