"""Power is cut at any moment, and the disk keeps of the unsynced what it likes: what was acknowledged is there.

A store is put under load on a disk that writes everything down. From what it wrote down crash images are cut,
each is opened by a real store, and what is found in it is held against what the commits wrote and what callers
were told.

The same is done to stores that do not wait for the disk. There the images must be found wanting, or the test
would be blind.

`FLOWSTEAD_IMAGES` says how many images to cut, `FLOWSTEAD_SEED` which; the same two numbers give the same images.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from flowstead import FlowError
from flowstead.store.sqlite import SqliteStore
from tests import invariants
from tests.disk.images import MODELS, Case, choose, crash_images, torn_pages
from tests.disk.load import SMALL, NotedStore, Prepare, Run, content, live, shortfall, untouched
from tests.disk.vfs import Disk, Record

IMAGES = int(os.environ.get("FLOWSTEAD_IMAGES", "300"))
SEED = int(os.environ.get("FLOWSTEAD_SEED", "20261122"))
IMAGES_PER_RUN = 500
SAMPLE = 10
SHOWN = 10
OWNERSHIP_PAGE = 4096
CONTROL_IMAGES = 90

Verdict = Literal["whole", "lost", "corrupt"]

pytestmark = pytest.mark.timeout(max(120, IMAGES))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(f"flowstead.store.sqlite.{name}", value)


@dataclass
class Found:
    """What became of the images of one kind of store."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    with_losses: int = 0
    """How many images lacked a write that had been made."""
    acks: int = 0
    several: int = 0
    """How many commits had several writes."""
    restarts: int = 0
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counted = f"{sum(self.verdicts.values())} images {dict(self.verdicts)} of {self.acks} acks"
        again = f"again with FLOWSTEAD_SEED={SEED} FLOWSTEAD_IMAGES={IMAGES}"
        return "\n".join([counted, again, *self.bad[:SHOWN]])

    def assert_not_vacuous(self) -> None:
        """A run that has exercised nothing proves nothing."""
        assert self.acks > 50, str(self)
        assert self.several > 10, str(self)
        assert self.restarts > 0, str(self)
        assert self.with_losses > 0, str(self)
        assert set(self.models) == set(MODELS), self.models


class Judge:
    """Opens images of one run with a real store, and says what is in them."""

    def __init__(self, run: Run, disk: Disk) -> None:
        self.run = run
        self.disk = disk
        self.states = run.states()

    async def judge(self, path: Path, case: Case, *, thorough: bool) -> tuple[Verdict, str]:
        """Look at one image."""
        try:
            await recover(path, self.disk)
            rows, levels, commits = content(path)
            if thorough:
                invariants.check_all(path)
        except (AssertionError, FlowError, sqlite3.Error, OSError) as error:
            return "corrupt", f"{type(error).__name__}: {error}"
        if commits >= len(self.states) or rows != self.states[commits]:
            return "corrupt", f"it is not what was there after {commits} commits"
        if missing := shortfall(levels, self.run.acks(case.cut)):
            return "lost", f"{missing[0]} and {len(missing) - 1} more are not there"
        return "whole", ""


async def recover(path: Path, disk: Disk) -> None:
    """Open and close a file as the next owner would."""
    disk.operations.clear()
    store = SqliteStore(path, connect=disk.connect)
    await store.open()
    await store.aclose()


async def examine(
    directory: Path, durability: Any, number: int, prepare: Prepare = untouched
) -> Found:
    """Cut so many images from runs of such a store and judge them."""
    found = Found()
    with Disk("image") as disk:
        # Nobody cuts the power while an image is looked at, so its syncs can be saved.
        disk.fail("sync", lie=True)
        for first in range(0, number, IMAGES_PER_RUN):
            seed = SEED + first // IMAGES_PER_RUN
            run = await live(directory / f"run-{seed}.db", seed, durability, prepare=prepare)
            found.acks += len(run.acks())
            found.restarts += run.restarts
            found.several += sum(len(writes) > 1 for writes in run.commits)
            judge = Judge(run, disk)
            cases = choose(run.journal, min(IMAGES_PER_RUN, number - first), seed)
            for index, (case, image) in enumerate(crash_images(run.journal, cases)):
                path = directory / f"{seed}-{index}" / "flows.db"
                image.write(path)
                verdict, reason = await judge.judge(path, case, thorough=index % SAMPLE == 0)
                found.verdicts[verdict] += 1
                found.models[case.model] += 1
                found.with_losses += image.lost > 0
                if reason:
                    found.bad.append(
                        f"{verdict}: {reason} ({path.parent.name}, {durability}, {case})"
                    )
                if not reason or len(found.bad) > SHOWN:
                    shutil.rmtree(path.parent)
    return found


# ---- what is promised -----------------------------------------------------------------------------


async def test_with_full_durability_power_loss_takes_nothing_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    found = await examine(tmp_path, "full", (IMAGES + 1) // 2)

    assert not found.bad, str(found)
    assert found.verdicts["whole"] == (IMAGES + 1) // 2
    found.assert_not_vacuous()


async def test_with_normal_durability_power_loss_takes_the_newest_commits_and_nothing_else(
    tmp_path: Path,
) -> None:
    found = await examine(tmp_path, "normal", IMAGES // 2)

    assert found.verdicts["corrupt"] == 0, str(found)
    assert found.verdicts["lost"] > 0, f"nothing was ever lost, so losses go unseen: {found}"
    found.assert_not_vacuous()


async def test_power_that_fails_again_while_the_file_is_opened_takes_nothing_either(
    tmp_path: Path,
) -> None:
    run = await live(tmp_path / "run.db", SEED)
    cases = choose(run.journal, IMAGES // 10, SEED)
    judged = writes_lost = 0

    with Disk("image") as lazy:
        lazy.fail("sync", lie=True)
        judge = Judge(run, lazy)
        for number, (case, image) in enumerate(crash_images(run.journal, cases)):
            image.write(first := tmp_path / f"{number}" / "flows.db")
            with Disk() as disk:
                disk.recording = True
                await recover(first, disk)
            again = choose(disk.journal, 3, case.seed)
            for index, (second, left) in enumerate(crash_images(disk.journal, again, image)):
                left.write(path := tmp_path / f"{number}-{index}" / "flows.db")
                verdict, reason = await judge.judge(path, case, thorough=False)
                assert not reason, f"{verdict}: {reason} (seed {SEED}, {case}, then {second})"
                shutil.rmtree(path.parent)
                judged += 1
                writes_lost += left.lost
            shutil.rmtree(first.parent)

    assert judged == len(cases) * 3 > 0
    assert writes_lost > 0


async def test_a_page_torn_in_the_midst_of_a_checkpoint_is_mended_from_the_log(
    tmp_path: Path,
) -> None:
    run = await live(tmp_path / "run.db", SEED)
    rng, judged, bad = random.Random(SEED), 0, []

    with Disk("image") as lazy:
        lazy.fail("sync", lie=True)
        judge = Judge(run, lazy)
        for page, case, image in torn_pages(run.journal):
            # Every commit changes the page of the ownership row; of the others some are enough.
            if page.offset != OWNERSHIP_PAGE and rng.random() > IMAGES / 12_000:
                continue
            image.write(path := tmp_path / f"{judged}" / "flows.db")
            verdict, reason = await judge.judge(path, case, thorough=False)
            judged += 1
            shutil.rmtree(path.parent)
            if reason:
                bad.append(f"{verdict}: {reason} (seed {SEED}, {case})")

    assert not bad, "\n".join([f"{len(bad)} of {judged} images:", *bad[:SHOWN]])
    assert judged > 50


# ---- that it would be seen ------------------------------------------------------------------------


def never_sync(disk: Disk, store: NotedStore) -> None:
    store._synchronous = "OFF"


def lie_about_syncs(disk: Disk, store: NotedStore) -> None:
    disk.fail("sync", lie=True)


def lie_about_the_log(disk: Disk, store: NotedStore) -> None:
    disk.fail("sync", "wal", lie=True)


@pytest.mark.parametrize("prepare", [never_sync, lie_about_syncs, lie_about_the_log])
async def test_a_store_that_does_not_wait_for_the_disk_is_found_wanting(
    tmp_path: Path, prepare: Prepare
) -> None:
    found = await examine(tmp_path, "full", CONTROL_IMAGES, prepare)

    assert found.verdicts["lost"] > 0, str(found)
    assert found.verdicts["corrupt"] > 0, str(found)


async def test_the_same_seed_gives_the_same_bytes_on_the_disk(tmp_path: Path) -> None:
    one = await live(tmp_path / "one.db", SEED)
    other = await live(tmp_path / "other.db", SEED)

    assert [_shape(record) for record in one.journal] == [
        _shape(record) for record in other.journal
    ]
    assert one.commits == other.commits


def _shape(record: Record) -> tuple[Any, ...]:
    return record.kind, record.file, record.offset, len(record.data), record.note
