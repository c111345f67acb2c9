"""A child that takes the process down with it: what the next process finds, and how often it is tried again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowstead import Lost, Registry, Succeeded, TaskContext
from tests.crash import harness
from tests.crash.harness import PATIENCE, ROOT
from tests.faults.support import ends_of
from tests.faults.worker import DEATHS, LIMITS
from tests.faulty_store import flows_of, running, soon
from tests.invariants import check_all

pytestmark = pytest.mark.crash

STATUS = {"os._exit": 7, "SIGSEGV": -signal.SIGSEGV, "abort": -signal.SIGABRT}


class Zygote(harness.Zygote):
    """The parent that forks this package's processes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
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


def healthy() -> Registry:
    """The same names, for code that does its work."""
    registry = Registry()

    async def works(ctx: TaskContext, given: object) -> int:
        return ctx.attempt

    for name in ("deadly", "deadly_once", "waits"):
        registry.task(works, name=name)
    return registry


@pytest.mark.parametrize("name", ["deadly", "deadly_once"])
@pytest.mark.parametrize("death", DEATHS)
async def test_a_child_that_ends_the_process_is_run_again_or_lost_as_it_said_and_others_go_on(
    zygote: Zygote, db: Path, tmp_path: Path, death: str, name: str
):
    victim = zygote.fork("die", tmp_path / "journal", path=str(db), death=death, name=name)

    assert victim.wait() == STATUS[death]
    assert victim.says("deadly") == {"deadly": 1}
    before = check_all(db)
    assert {task.doc["status"] for task in before.tasks} == {"running"}

    async with running(db, registry=healthy()) as runtime:
        flows = flows_of(runtime)
        for flow_id in ("suffers", "other"):
            for task in await flows.list_tasks(flow_id):
                outcome = await soon(flows.wait_task(task.task_id), PATIENCE)
                assert len(await ends_of(flows, flow_id, task.task_id)) == 1
                if task.run_id == "deadly" and name == "deadly_once":
                    assert isinstance(outcome, Lost)
                    assert outcome.failure.kind == "interrupted"
                else:
                    assert outcome == Succeeded(2)
        other = await flows.get("other")
        assert other
        assert (other.revision, other.state_json) == (1, {"kept": True})
        assert (await soon(flows.finish(flow_id="suffers", expected_revision=0))).applied
    check_all(db)


async def test_what_ran_in_every_process_that_ended_is_given_up_and_the_flows_go_on(
    zygote: Zygote, db: Path, tmp_path: Path
):
    death = "os._exit"
    deaths: list[int] = []
    first = zygote.fork("die", tmp_path / "0", path=str(db), death=death, name="deadly")
    deaths.append(first.wait())
    while deaths[-1] != 0:
        assert len(deaths) <= LIMITS.interruptions + 1, deaths
        again = zygote.fork("die_again", tmp_path / str(len(deaths)), path=str(db), death=death)
        deaths.append(again.wait())

    assert deaths == [STATUS[death]] * (LIMITS.interruptions + 1) + [0]
    assert again.says("survived")
    # Nobody can tell which of them it was: the bystanders were cut off just as often.
    assert {task.doc["status"] for task in check_all(db).tasks} == {"lost"}
    async with running(db, registry=healthy()) as runtime:
        flows = flows_of(runtime)
        for flow_id, revision in (("suffers", 0), ("other", 1)):
            made = await flows.run_task(flow_id=flow_id, task="t", run="waits", run_id="after")
            assert await soon(flows.wait_task(made.unwrap().task_id)) == Succeeded(1)
            done = flows.finish(flow_id=flow_id, expected_revision=revision)
            assert (await soon(done)).applied
