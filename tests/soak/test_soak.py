"""The long run can fail: each kind of growth is found, level noise is not, and a short run of it works."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.crash.harness import ROOT
from tests.soak.gauge import MIB, Rest, Sample, not_flat
from tests.soak.load import Plan, Report, _vacuous

LENGTH = 360
RESTS = [Rest(handles=9, threads=1, tasks=2)] * 15


def samples(**grows: float) -> list[Sample]:
    """An hour's worth of samples, noisy but level, but for what grows by so much in each."""
    rng = random.Random(7)
    level = {"rss": 60 * MIB, "handles": 15, "threads": 3, "tasks": 45, "objects": 40_000}
    noise = {"rss": MIB, "tasks": 20, "objects": 1500}
    return [
        Sample(
            second=10.0 * number,
            wal=4 * MIB + rng.randrange(12 * MIB) + int(grows.get("wal", 0) * number),
            file=number * MIB,
            calls=2000 * number,
            flow_writes=2200 * number,
            commits=1900 * number,
            live_flows=200,
            longest_turn_ms=2.0,
            **{
                name: usual + rng.randrange(noise.get(name, 1)) + int(grows.get(name, 0) * number)
                for name, usual in level.items()
            },
        )
        for number in range(LENGTH)
    ]


def test_noise_around_a_level_is_flat() -> None:
    assert not_flat(samples(), RESTS) == []


@pytest.mark.parametrize(
    ("name", "each"),
    [
        # Forty bytes for each of two thousand calls between two samples.
        ("rss", 80_000),
        ("objects", 100),
        ("tasks", 0.5),
        ("handles", 0.01),
        ("threads", 0.01),
        ("wal", 0.5 * MIB),
    ],
)
def test_what_grows_slowly_is_found_and_named(name: str, each: float) -> None:
    [found] = not_flat(samples(**{name: each}), RESTS)

    assert ("log" if name == "wal" else name) in found


def test_what_closing_leaves_behind_is_found() -> None:
    leak = [Rest(handles=9 + number // 4, threads=1, tasks=2) for number in range(15)]

    [found] = not_flat(samples(), leak)

    assert "closing left 10 handles" in found


def test_a_thread_that_is_just_ending_is_no_leak() -> None:
    ending = [*RESTS[:12], Rest(handles=9, threads=2, tasks=2), *RESTS[:2]]

    assert not_flat(samples(), ending) == []


def test_a_run_that_did_nothing_says_so() -> None:
    found = _vacuous(Counter(), Plan(seconds=60.0))

    assert any("calls" in each for each in found)
    assert len(found) > 20


@pytest.mark.crash
def test_a_few_seconds_of_it_run_without_a_failed_call_and_leave_a_whole_file(
    tmp_path: Path,
) -> None:
    report = tmp_path / "report.json"
    arguments: dict[str, Any] = {"minutes": 0.05, "sample": 0.2, "reopen": 1.4, "report": report}
    command = [sys.executable, "-m", "tests.soak.load"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]

    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    told = msgspec.json.decode(report.read_bytes(), type=Report)
    # A few seconds are too short for all that must happen in an hour; whatever happens has to be right.
    wrong = [each for each in told.wrong if not each.startswith("vacuous")]
    assert wrong == [], ended.stdout
    assert ended.returncode == (1 if told.wrong else 0), ended.stderr
    for what in ("create", "update", "launch", "watched", "applied", "reopened", "child succeeded"):
        assert told.counts[what] > 0, (what, told.counts)
