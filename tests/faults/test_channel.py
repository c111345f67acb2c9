"""A channel that drops, doubles, delays and answers late, and a process that is killed on the way: told once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowstead import open_runtime
from tests.crash import harness
from tests.crash.harness import ROOT
from tests.faults.channel_worker import AT_ONCE, MISDEEDS, OWNER, WINDOWS
from tests.invariants import check_all

pytestmark = pytest.mark.crash

FLOWS = int(os.environ.get("FLOWSTEAD_CHANNEL_FLOWS", "60"))
"""How many flows there are to tell of."""
MOST_SECONDS = 20 + FLOWS / 10


class Zygote(harness.Zygote):
    """The parent that forks this harness's processes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.channel_worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._children = []


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


def live_until_quiet(
    zygote: Zygote, path: Path, channel: Path, journals: Path
) -> tuple[list[str], Counter[str]]:
    """One life after another, each killed in the next window, until there is nothing left to tell.

    Answers where they were killed, and what the channel did wrong.
    """
    chance, killed, misdeeds = random.Random(FLOWS), list[str](), Counter[str]()
    left = list(range(FLOWS))
    while True:
        life = len(killed)
        # Each window has its turn while there is enough to do; later lives are longer, to come to an end.
        most = 2 if life < len(WINDOWS) else 12 + FLOWS // 100
        child = zygote.fork(
            "live",
            journals / str(life),
            path=str(path),
            channel=str(channel),
            numbers=left,
            window=WINDOWS[life % len(WINDOWS)],
            after=chance.randint(1, most),
        )
        status = child.wait(MOST_SECONDS)
        facts = child.facts()
        misdeeds.update(fact["misdeed"] for fact in facts if "misdeed" in fact)
        assert not [fact for fact in facts if "crash" in fact], facts
        told = {fact["told"] for fact in facts if "told" in fact}
        left = [number for number in left if number not in told]
        if status == 0:
            assert not left
            assert facts[-1] == {"quiet": True}
            return killed, misdeeds
        assert status == -signal.SIGKILL, facts
        killed.append(facts[-1]["killed"])
        assert len(killed) < 20 + FLOWS, "it does not come to an end"


def arrived(channel: Path) -> dict[str, list[dict[str, Any]]]:
    """What the receiver has, by flow: of each key the first."""
    firsts: dict[str, dict[str, Any]] = {}
    for line in channel.read_text().splitlines():
        told = json.loads(line)
        first = firsts.setdefault(told["key"], told)
        assert first == told, "one key, and two things told"
    of_flow: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for told in firsts.values():
        of_flow[told["flow"]].append(told)
    return of_flow


@pytest.mark.timeout(60 + FLOWS)
async def test_each_end_is_told_once_over_a_bad_channel_however_often_the_process_is_killed(
    zygote: Zygote, db: Path, tmp_path: Path
):
    channel = tmp_path / "channel"

    killed, misdeeds = live_until_quiet(zygote, db, channel, tmp_path)

    assert set(killed) == set(WINDOWS), f"vacuous: killed {Counter(killed)} only"
    assert set(misdeeds) >= set(MISDEEDS) - {MISDEEDS[5]}, f"vacuous: {misdeeds} only"
    lines = len(channel.read_text().splitlines())
    of_flow = arrived(channel)
    assert lines > sum(map(len, of_flow.values())), "vacuous: nothing came twice"
    async with open_runtime(db) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key=OWNER)
        failed = await flows.list_updates(status="delivery_failed", limit=10 * FLOWS)
        rows = await flows.list_updates(limit=10 * FLOWS)
        ended = {f.flow_id: f.status for f in await flows.list(limit=FLOWS + 1)}
        told_of_failure = {
            update.flow_id: [
                event.changed["slot"]
                for event in await flows.history(update.flow_id)
                if event.type == "update.failed"
            ]
            for update in failed
        }
    check_all(db)

    assert len(ended) == FLOWS
    assert {update.status for update in rows} <= {"delivered", "delivery_failed", "superseded"}
    given_up = {update.flow_id for update in failed if update.kind == "done"}
    for flow_id, status in ended.items():
        done = [told for told in of_flow[flow_id] if told["kind"] == "done"]
        # What was given up may have arrived all the same: nobody heard the answer.
        assert len(done) == 1 or (not done and flow_id in given_up), flow_id
        assert [told["status"] for told in done] in ([], [status])
        assert len([u for u in rows if u.flow_id == flow_id and u.kind == "done"]) == 1
    assert all("done" in told_of_failure[flow_id] for flow_id in given_up)
    print(  # noqa: T201 - what a long run has done
        f"{FLOWS} flows, {len(killed)} kills, {lines} arrivals, {sum(misdeeds.values())} misdeeds,"
        f" {len(given_up)} given up, {AT_ONCE} at once"
    )
