"""`python -m tests.faults.worker`: forks processes in which a child takes everybody down with it."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
from collections.abc import Callable

import anyio._backends._asyncio  # noqa: F401

from flowstead import Limits, Registry, TaskContext, open_runtime
from tests.crash.harness import Journal, serve
from tests.faulty_store import flows_of

DEATHS: dict[str, Callable[[], object]] = {
    "os._exit": lambda: os._exit(7),
    "SIGSEGV": lambda: ctypes.string_at(0),
    "abort": os.abort,
}

LIMITS = Limits(interruptions=2)


def registry_for(journal: Journal, death: str) -> Registry:
    """A task that ends the process in its own way, one that must not be done twice, and one that waits."""
    registry = Registry()

    async def deadly(ctx: TaskContext, given: object) -> None:
        journal.write(deadly=ctx.attempt)
        DEATHS[death]()

    async def waits(ctx: TaskContext, given: object) -> None:
        journal.write(waits=ctx.attempt)
        await asyncio.Event().wait()

    registry.task(deadly, name="deadly")
    registry.task(deadly, name="deadly_once", idempotent=False)
    registry.task(waits, name="waits")
    return registry


def die(journal: Journal, *, path: str, death: str, name: str) -> None:
    """Two flows with a bystander each; in one of them a child that is the end of the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    async def main() -> None:
        async with open_runtime(path, registry=registry_for(journal, death)) as runtime:
            flows = flows_of(runtime)
            for flow_id in ("suffers", "other"):
                await flows.create_managed(controller_id="nobody", goal="g", flow_id=flow_id)
                await flows.run_task(flow_id=flow_id, task="t", run="waits", run_id="waits")
            await flows.update(flow_id="other", expected_revision=0, state_json={"kept": True})
            await flows.run_task(flow_id="suffers", task="t", run=name, run_id="deadly")
            await asyncio.Event().wait()

    asyncio.run(main())


def die_again(journal: Journal, *, path: str, death: str) -> None:
    """Open what is there, and go down with it once more, or tell that nothing happened any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    async def main() -> None:
        registry = registry_for(journal, death)
        async with open_runtime(path, registry=registry, limits=LIMITS) as runtime:
            flows = flows_of(runtime)
            [deadly] = [t for t in await flows.list_tasks("suffers") if t.run_id == "deadly"]
            await flows.wait_task(deadly.task_id)
            journal.write(survived=True)

    asyncio.run(main())


if __name__ == "__main__":
    logging.getLogger("flowstead").addHandler(logging.NullHandler())
    serve({"die": die, "die_again": die_again})
