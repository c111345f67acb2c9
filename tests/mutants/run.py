"""Lets the hunting tests loose on each seeded bug: `python -m tests.mutants.run [number or part of a name …]`.

Each bug is planted in a copy of `src/` of its own, and the hunters its patch names run against that copy, in
order, until one fails. A bug that no hunter notices, a patch that does not fit, a hunter that does not run at all:
each of them ends this with 1. So does a hunter that fails on a copy without any bug, for it would have
"caught" everything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mutants.patches import ROOT, Misfit, Mutant, all_mutants, plant
from tests.mutants.witness import VARIABLE

SIMULATION: Final = "tests/simulation"
LEAST_BY_SIMULATION: Final = 15
AT_ONCE: Final = int(os.environ.get("FLOWSTEAD_HUNTS_AT_ONCE", "2"))
LIMIT_SECONDS: Final = float(os.environ.get("FLOWSTEAD_HUNT_SECONDS", "300"))

_FAILED: Final = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - (.*))?$", re.MULTILINE)
_TAIL: Final = 15
_SHOWN: Final = 240


@dataclass(frozen=True)
class Hunt:
    """What became of one hunter in one copy: `code` is pytest's, None where the time was over."""

    hunter: str
    code: int | None
    output: str

    @property
    def caught(self) -> str | None:
        """The first test that failed, and why."""
        if self.code != 1:
            return None
        found = _FAILED.search(self.output)
        return ": ".join(filter(None, found.groups()))[:_SHOWN] if found else self.hunter


@dataclass(frozen=True)
class Result:
    """What became of one bug."""

    name: str
    seconds: float
    caught: str | None = None
    problem: str = ""

    @property
    def by_simulation(self) -> bool:
        return self.caught is not None and self.caught.startswith(SIMULATION)


def hunt(src: Path, hunter: str, scratch: Path) -> Hunt:
    """Run one hunter against a copy of the source."""
    environment = os.environ | {
        "PYTHONPATH": str(src),
        "COLUMNS": str(_SHOWN),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
        VARIABLE: str(src),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "--timeout=60"]
    command += ["-p", "tests.mutants.witness", "-p", "no:cacheprovider"]
    command += [f"--basetemp={scratch / 'tmp'}", hunter]
    with open(scratch / "output", "w+", encoding="utf-8") as output:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = running.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
        output.seek(0)
        return Hunt(hunter, code, output.read())


def copied(scratch: Path) -> Path:
    """A copy of the source to plant a bug in."""
    shutil.copytree(ROOT / "src", scratch / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return scratch / "src"


def control(hunter: str) -> Result:
    """A hunter on a copy without a bug: it has to find nothing."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flowstead-control-") as scratch:
        found = hunt(copied(Path(scratch)), hunter, Path(scratch))
    problem = "" if found.code == 0 else f"fails without any bug: {_why(found)}"
    return Result(f"no bug, {hunter}", time.monotonic() - began, problem=problem)


def pursue(mutant: Mutant) -> Result:
    """Plant one bug and hunt it until it is caught."""
    began = time.monotonic()

    def result(caught: str | None = None, problem: str = "") -> Result:
        return Result(mutant.name, time.monotonic() - began, caught, problem)

    with tempfile.TemporaryDirectory(prefix="flowstead-mutant-") as scratch:
        src = copied(Path(scratch))
        try:
            plant(mutant, Path(scratch))
        except Misfit as misfit:
            return result(problem=f"does not apply: {misfit}")
        for hunter in mutant.hunters:
            found = hunt(src, hunter, Path(scratch))
            if found.caught:
                return result(found.caught)
            if found.code != 0:
                return result(problem=f"cannot be hunted: {_why(found)}")
    return result(problem="survives: " + mutant.bug)


def _why(found: Hunt) -> str:
    if found.code is None:
        return f"{found.hunter} was not done after {LIMIT_SECONDS:g} s"
    tail = "\n".join(found.output.splitlines()[-_TAIL:])
    return f"{found.hunter} ended with {found.code}\n{tail}"


# ---- telling --------------------------------------------------------------------------------------


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _row(name: str, seconds: str, simulation: str, caught: str) -> str:
    return f"{name:44} {seconds:>7}  {simulation:10}  {caught}"


def _tell(result: Result) -> None:
    simulation = "yes" if result.by_simulation else "no"
    _say(_row(result.name, f"{result.seconds:.0f} s", simulation, result.caught or result.problem))


def _chosen(words: Sequence[str]) -> list[Mutant]:
    mutants = all_mutants()
    if not words:
        return mutants
    return [m for m in mutants if any(w == f"{m.number:02}" or w in m.name for w in words)]


def _hunters(mutants: Iterable[Mutant]) -> list[str]:
    return list(dict.fromkeys(hunter for mutant in mutants for hunter in mutant.hunters))


def main(words: Sequence[str], *, with_control: bool) -> int:
    """Hunt the chosen bugs, all unless some are named, and answer the exit code."""
    mutants = _chosen(words)
    if not mutants:
        _say("There is no such mutant.")
        return 1
    _say(_row("mutant", "took", "simulation", "caught by"))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        controls = list(pool.map(control, _hunters(mutants))) if with_control else []
        if failed := [result for result in controls if result.problem]:
            for result in failed:
                _say(f"{result.name}: {result.problem}")
            return 1
        results = []
        for result in pool.map(pursue, mutants):
            _tell(result)
            results.append(result)
    return _verdict(results, everything=not words)


def _verdict(results: Sequence[Result], *, everything: bool) -> int:
    bad = [result.name for result in results if result.problem]
    seen = sum(result.by_simulation for result in results)
    _say(f"{len(results) - len(bad)} of {len(results)} caught, {seen} of them by the simulation.")
    if bad:
        _say("Not caught: " + ", ".join(bad))
    if everything and seen < LEAST_BY_SIMULATION:
        _say(f"The simulation alone has to catch {LEAST_BY_SIMULATION}: it has gone blind.")
        return 1
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hunt the seeded bugs.")
    parser.add_argument("mutants", nargs="*", help="numbers, or parts of names; all unless given")
    parser.add_argument("--no-control", action="store_true", help="trust the hunters")
    given = parser.parse_args()
    sys.exit(main(given.mutants, with_control=not given.no_control))
