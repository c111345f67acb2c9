"""Programs that are sent a signal or run short of something: hosts as the library's users would write them."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import psutil

from flowstead import (
    FlowError,
    Limits,
    Registry,
    Retry,
    RuntimeClosed,
    SessionFlows,
    TaskContext,
    open_runtime,
)
from flowstead.store.sqlite import SqliteStore
from tests.crash.harness import Journal, until
from tests.crash.scenes import appears, bind, quiet

UPDATERS = 4
NOBODY = 65534


# ---- stopped by signals ---------------------------------------------------------------------------


async def with_anyio() -> None:
    """Return at the first signal. From then on signals do what they do in any Python program."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


async def with_asyncio() -> None:
    """Return at the first signal. The second one ends the process where it stands."""
    loop, first = asyncio.get_running_loop(), asyncio.Event()

    def told() -> None:
        if first.is_set():
            os._exit(130)
        first.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told)
    await first.wait()


STYLES = {"anyio": with_anyio, "asyncio": with_asyncio}


def host(journal: Journal, *, path: str, style: str, stubborn: bool = False) -> None:
    """Keep flows moving and children running, and close the runtime at the first signal.

    With `stubborn`, one of the children does not stop, and closing would wait for it for ten minutes.
    """

    async def main() -> None:
        limits = Limits(shutdown_grace=600.0 if stubborn else 5.0)
        async with open_runtime(path, registry=_children(journal), limits=limits) as runtime:
            flows = bind(runtime)
            flow = await flows.create_managed(controller_id="held", goal="g", flow_id="held")
            names = ["patient", "fragile", "unlucky", *(["stubborn"] if stubborn else [])]
            for name in names:
                await flows.run_task(flow_id=flow.flow_id, task=name, run=name, run_id=name)
            async with anyio.create_task_group() as group:
                for number in range(UPDATERS):
                    group.start_soon(_keep_updating, journal, flows, number)
                await STYLES[style]()
                journal.write(closing=True)
                await runtime.aclose()
        journal.write(closed=True)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        journal.write(interrupted=True)


def _children(journal: Journal) -> Registry:
    registry = Registry()

    async def waits(ctx: TaskContext, given: Any) -> Any:
        journal.write(ran=ctx.run_id, attempt=ctx.attempt)
        await asyncio.Event().wait()

    async def stubborn(ctx: TaskContext, given: Any) -> Any:
        journal.write(ran=ctx.run_id, attempt=ctx.attempt)
        with anyio.CancelScope(shield=True):
            await asyncio.Event().wait()

    async def unlucky(ctx: TaskContext, given: Any) -> Any:
        journal.write(ran=ctx.run_id, attempt=ctx.attempt)
        raise OSError("not today")

    registry.task(waits, name="patient")
    registry.task(name="fragile", idempotent=False)(partial(waits))
    registry.task(stubborn, name="stubborn")
    registry.task(
        unlucky, name="unlucky", retry=Retry(max_attempts=5, initial=3600.0, max_delay=3600.0)
    )
    return registry


async def _keep_updating(journal: Journal, flows: SessionFlows, number: int) -> None:
    """Change a flow over and over, telling each answer, until the runtime takes no more."""
    try:
        flow = await flows.create_managed(
            controller_id="held", goal="be changed", flow_id=f"busy-{number}"
        )
        while True:
            answer = await flows.update(
                flow_id=flow.flow_id,
                expected_revision=flow.revision,
                state_json={"n": flow.revision + 1},
            )
            flow = answer.unwrap()
            journal.write(ack=flow.revision, flow=flow.flow_id)
    except RuntimeClosed:
        journal.write(turned_away=number)
    except FlowError as error:
        journal.write(failed=type(error).__name__, reason=str(error))


def succeed(journal: Journal, *, path: str) -> None:
    """Own the file after a host: its children are here, and this time all of them end well."""

    async def main() -> None:
        registry = Registry()

        async def ends(ctx: TaskContext, given: Any) -> Any:
            journal.write(ran=ctx.run_id, attempt=ctx.attempt)
            return "done"

        for name in ("patient", "stubborn", "unlucky"):
            registry.task(name=name)(partial(ends))
        registry.task(name="fragile", idempotent=False)(partial(ends))
        async with open_runtime(path, registry=registry) as runtime:
            await quiet(runtime)
            tasks = await bind(runtime).list_tasks("held")
            journal.write(ready={str(task.run_id): [task.status, task.attempt] for task in tasks})

    asyncio.run(main())


# ---- frozen and thawed ----------------------------------------------------------------------------


def await_instants(journal: Journal, *, path: str, seconds: float, go: str) -> None:
    """Let a child wait for its retry and a flow for its cancel grace, tell when both are due, and see both end."""

    async def main() -> None:
        registry = Registry()

        async def flaky(ctx: TaskContext, given: Any) -> Any:
            journal.write(ran="flaky", attempt=ctx.attempt)
            if ctx.attempt == 1:
                raise OSError("not this time")
            return ctx.attempt

        retry = Retry(max_attempts=5, initial=seconds, factor=1.0, jitter=0.0)
        registry.task(flaky, retry=retry)
        limits = Limits(cancel_grace=seconds)
        async with open_runtime(path, registry=registry, limits=limits) as runtime:
            flows = bind(runtime)
            await flows.create_managed(controller_id="held", goal="g", flow_id="retrying")
            await flows.create_managed(controller_id="held", goal="g", flow_id="asked")
            asked = await flows.request_cancel(flow_id="asked", expected_revision=0)
            async with flows.watch("retrying", after_seq=0) as events:
                child = await flows.run_task(flow_id="retrying", task="t", run="flaky")
                async for event in events:
                    if event.type == "task.retry_scheduled":
                        break
            due = event.changed["nextAttemptAt"]
            assert asked.flow is not None
            asked_due = asked.flow.cancel_requested_at + round(seconds * 1000)
            journal.write(ready=True, due=max(due, asked_due))
            await flows.wait_task(child.unwrap().task_id)
            await flows.result("asked")
            await quiet(runtime)
            journal.write(ended=True)
            await appears(go)

    asyncio.run(main())


# ---- beside others, and short of things -----------------------------------------------------------


def hold_the_write_lock(journal: Journal, *, path: str, go: str) -> None:
    """Stand in the middle of a transaction on somebody else's file until told to go."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    journal.write(holding=True)
    until(Path(go).exists, "leave to go")
    connection.execute("ROLLBACK")
    connection.close()
    journal.write(released=True)


def open_unprivileged(journal: Journal, *, path: str) -> None:
    """Open the store as somebody whom file permissions stop."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    asyncio.run(_open_and_tell(journal, path))


async def _open_and_tell(journal: Journal, path: str | SqliteStore) -> None:
    try:
        async with open_runtime(path):
            journal.write(opened=True)
    except FlowError as error:
        journal.write(refused=type(error).__name__, reason=str(error))


@contextmanager
def no_more_handles() -> Iterator[None]:
    """The process may open nothing; what it has open goes on."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        assert not _works(lambda: os.close(os.dup(0))), "vacuous: there still are handles"
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def no_more_threads() -> Iterator[None]:
    """The process has no room for the stack of another thread."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    room = psutil.Process().memory_info().vms + 4 * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (room, before[1]))
    try:
        idle = threading.Thread(target=str)
        assert not _works(idle.start), "vacuous: there still are threads"
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except (OSError, RuntimeError):
        return False
    return True


SHORTAGES = {"handles": no_more_handles, "threads": no_more_threads}


def open_short_of(journal: Journal, *, path: str, what: str) -> None:
    """Try to open the store short of something, and again when there is enough."""

    async def main() -> None:
        with SHORTAGES[what]():
            await _open_and_tell(journal, path)
        await _open_and_tell(journal, path)

    asyncio.run(main())


def work_without_handles(journal: Journal, *, path: str) -> None:
    """Run out of handles while owning the store, need some for a new writer, and get them back."""
    from tests.disk.vfs import Disk

    async def main(disk: Disk) -> None:
        async with open_runtime(SqliteStore(path, connect=disk.connect)) as runtime:
            flows = bind(runtime)
            await flows.create_managed(controller_id="held", goal="g", flow_id="flow")
            with no_more_handles():
                await _update(journal, flows, "while short")
                fault = disk.fail("sync", "wal", at=1)
                await _update(journal, flows, "at a failing disk")
                await _update(journal, flows, "without a writer")
                found = await flows.get("flow")
                assert found is not None
                journal.write(fired=fault.fired, read=found.revision)
            await _update(journal, flows, "with enough again")
            history = await flows.history("flow")
            journal.write(told=[event.changed.get("stateJson") for event in history])

    with Disk() as disk:
        asyncio.run(main(disk))


def answer_on_a_failing_disk(
    journal: Journal, *, path: str, fault: dict[str, Any], laps: int
) -> None:
    """Change flows on a disk that fails as told, tell each answer, and die at once, without closing anything."""
    from tests.disk.vfs import Disk

    async def main(disk: Disk) -> None:
        async with open_runtime(SqliteStore(path, connect=disk.connect)) as runtime:
            flows = bind(runtime)
            ids = [f"flow-{number}" for number in range(6)]
            for flow_id in ids:
                await flows.create_managed(controller_id="held", goal="g", flow_id=flow_id)
            armed = disk.fail(**fault)

            async def change(flow_id: str, lap: int) -> None:
                flow = await flows.get(flow_id)
                assert flow is not None
                answer = await flows.update(
                    flow_id=flow_id, expected_revision=flow.revision, state_json={"lap": lap}
                )
                journal.write(
                    flow=flow_id, lap=lap, code=answer.code, reason=getattr(answer, "reason", "")
                )

            for lap in range(laps):
                async with anyio.create_task_group() as group:
                    for flow_id in ids:
                        group.start_soon(change, flow_id, lap)
            journal.write(fired=armed.fired)
            os.kill(os.getpid(), signal.SIGKILL)

    with Disk() as disk:
        asyncio.run(main(disk))


async def _update(journal: Journal, flows: SessionFlows, when: str) -> None:
    flow = await flows.get("flow")
    assert flow is not None
    answer = await flows.update(
        flow_id="flow", expected_revision=flow.revision, state_json={"when": when}
    )
    journal.write(when=when, code=answer.code, reason=getattr(answer, "reason", ""))


SCENES: dict[str, Callable[..., None]] = {
    scene.__name__: scene
    for scene in (
        host,
        succeed,
        await_instants,
        hold_the_write_lock,
        open_unprivileged,
        open_short_of,
        work_without_handles,
        answer_on_a_failing_disk,
    )
}
