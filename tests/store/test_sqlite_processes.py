"""A SQLite store and other processes: refused, killed, frozen, overtaken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
import pytest

from flowstead.errors import StoreInUse
from flowstead.store.port import EVERYONE, FlowQuery
from flowstead.store.sqlite import SqliteStore
from tests.store.disk import TendedStore
from tests.store.rows import put

pytestmark = [pytest.mark.crash, pytest.mark.usefixtures("stores_end")]

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0


class Holder:
    """Another process with a store of its own."""

    def __init__(self, db: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.holder", str(db)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    async def ask(self, line: str) -> str:
        with anyio.fail_after(PATIENCE):
            return await anyio.to_thread.run_sync(self._ask, line, abandon_on_cancel=True)

    def _ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    async def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        frozen = psutil.Process(self.pid)
        with anyio.fail_after(PATIENCE):
            while frozen.status() != psutil.STATUS_STOPPED:
                await anyio.lowlevel.checkpoint()

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def clean_up(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass


@pytest.fixture
def holder(db: Path) -> Iterator[Holder]:
    holder = Holder(db)
    yield holder
    holder.clean_up()


async def flow_ids(store: SqliteStore) -> list[str]:
    return [flow.flow_id for flow in await store.list_flows(EVERYONE, FlowQuery(), 100)]


async def test_a_second_process_is_refused_at_once_and_the_first_unharmed(
    holder: Holder, db: Path
) -> None:
    assert await holder.ask("open") == "opened"
    begun = time.monotonic()

    with pytest.raises(StoreInUse) as refused:
        await TendedStore(db).open()

    assert time.monotonic() - begun < 1
    assert f"process {holder.pid} " in str(refused.value)
    assert await holder.ask("put flow") == "written"
    assert await holder.ask("close") == "closed"


async def test_a_killed_holder_leaves_the_store_free(holder: Holder, db: Path) -> None:
    assert await holder.ask("open") == "opened"
    assert await holder.ask("put acknowledged") == "written"

    holder.kill()
    store = TendedStore(db)
    await store.open()

    assert await flow_ids(store) == ["acknowledged"]
    await put(store, "after")
    assert await flow_ids(store) == ["after", "acknowledged"]
    await store.aclose()


async def test_a_store_taken_from_a_frozen_process_is_never_written_by_it_again(
    holder: Holder, db: Path
) -> None:
    assert await holder.ask("open") == "opened"
    assert await holder.ask("put first") == "written"
    await holder.freeze()
    with pytest.raises(StoreInUse):
        await TendedStore(db).open()

    store = TendedStore(db)
    await store.open(takeover=True)
    await put(store, "ours")
    holder.tell("put theirs")
    holder.thaw()
    answer = await anyio.to_thread.run_sync(holder.answer, abandon_on_cancel=True)
    again = await holder.ask("put again")

    assert answer.startswith("StoreInUse")
    assert again.startswith("StoreInUse")
    assert await flow_ids(store) == ["ours", "first"]
    assert [e.flow_id for e in await store.events_after(EVERYONE, 0, 9)] == ["first", "ours"]
    assert await holder.ask("close") == "closed"
    await put(store, "later")
    await store.aclose()
    await store.open()
    assert await flow_ids(store) == ["later", "ours", "first"]
    await store.aclose()


async def test_the_new_owner_is_named_after_a_takeover(holder: Holder, db: Path) -> None:
    assert await holder.ask("open") == "opened"
    await holder.freeze()
    store = TendedStore(db)
    await store.open(takeover=True)
    other = Holder(db)
    try:
        refused = await other.ask("open")
    finally:
        other.clean_up()
    holder.thaw()
    overtaken = await holder.ask("put flow")

    assert f"process {os.getpid()} " in refused
    assert f"process {os.getpid()}, which took it over" in overtaken
    await store.aclose()


async def test_an_overtaken_process_that_dies_does_not_free_the_store(
    holder: Holder, db: Path
) -> None:
    assert await holder.ask("open") == "opened"
    await holder.freeze()
    store = TendedStore(db)
    await store.open(takeover=True)

    holder.kill()

    with pytest.raises(StoreInUse):
        await TendedStore(db).open()
    await put(store)
    assert await flow_ids(store) == ["flow"]
    await store.aclose()


async def test_death_at_any_statement_leaves_a_file_that_opens(tmp_path: Path) -> None:
    died = await anyio.run_process(
        [sys.executable, "-m", "tests.store.dying", str(tmp_path)], cwd=ROOT, check=False
    )

    assert died.returncode == 0, died.stderr.decode()
    assert int(died.stdout) > 30
