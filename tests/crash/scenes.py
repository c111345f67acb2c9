"""What processes do that are killed, frozen or left alone: small programs that tell what they see."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from flowstead import (
    FlowContext,
    FlowError,
    Limits,
    Registry,
    Retry,
    Runtime,
    SessionFlows,
    StoreError,
    StoreInUse,
    TaskContext,
    open_runtime,
)
from flowstead.store.sqlite import SqliteStore
from tests.crash.harness import PATIENCE, Journal

OWNER = "agent:main:main"


def bind(runtime: Runtime) -> SessionFlows:
    return runtime.tasks.flow.bind_session(session_key=OWNER)


def plain(value: Any) -> Any:
    """A record as the JSON it is told as."""
    return msgspec.to_builtins(value)


async def appears(path: str) -> None:
    """Wait for a file, by which the test says that it is time."""
    async with asyncio.timeout(PATIENCE):
        while not Path(path).exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.002)


async def quiet(runtime: Runtime) -> None:
    """Wait until the runtime has nothing to do: nothing waits and nothing has been written for a while."""
    before, calm = -1, 0
    async with asyncio.timeout(PATIENCE):
        while calm < 10:
            await asyncio.sleep(0.005)
            now = runtime.statistics()
            calm = calm + 1 if now.commits == before and not now.waiting_mutations else 0
            before = now.commits


async def records(runtime: Runtime) -> dict[str, Any]:
    """Everything an owner can see, oldest first."""
    flows = bind(runtime)
    told: dict[str, Any] = {}
    for flow in reversed(await flows.list(limit=1000)):
        told[flow.flow_id] = {
            "flow": plain(flow),
            "tasks": plain(await flows.list_tasks(flow.flow_id)),
            "history": plain(await flows.history(flow.flow_id)),
        }
    return told


def code(
    journal: Journal, go: str, *, only: tuple[str, ...] | None = None
) -> tuple[Registry, Callable[..., Awaitable[Any]]]:
    """The tasks and controllers of these programs, and a function that nobody registers.

    Tasks tell when they begin, and end once the file `go` is there.
    """
    registry = Registry()

    def told(name: str) -> Callable[[TaskContext, Any], Awaitable[Any]]:
        async def run(ctx: TaskContext, given: Any) -> Any:
            journal.write(ran=name, attempt=ctx.attempt, run_id=ctx.run_id)
            try:
                if name != "first":
                    await appears(go)
                return {"name": name, "given": given, "attempt": ctx.attempt}
            except asyncio.CancelledError:
                journal.write(stopped=name)
                raise

        return run

    bare = told("bare")

    async def effect() -> Any:
        journal.write(effect="paid")
        return "receipt"

    async def slow_effect() -> Any:
        journal.write(effect="slow")
        await appears(go)
        return "done"

    async def steps(flow: FlowContext) -> None:
        journal.write(entered=flow.flow_id, status=flow.flow.status)
        receipt = await flow.once("pay", effect)
        first = await flow.run("first", 1)
        several = await flow.map("first", [1, 2], name="several")
        second = await flow.run("second", 2)
        inline = await flow.run(bare, 3, name="inline")
        await flow.finish(
            state_json={"all": [receipt, first, several, second, inline]}, current_step="done"
        )

    async def waits_inline(flow: FlowContext) -> None:
        journal.write(entered=flow.flow_id, status=flow.flow.status)
        done = await flow.once("slow", slow_effect)
        await flow.finish(state_json={"done": done})

    tasks: dict[str, dict[str, Any]] = {
        "again": {},
        "fragile": {"idempotent": False},
        "first": {},
        "second": {},
        "never": {"retry": Retry(max_attempts=5, initial=3600.0)},
    }
    for name, options in tasks.items():
        if only is None or name in only:
            registry.task(told(name) if name != "never" else _never, name=name, **options)
    for name, controller in (("crash/steps", steps), ("crash/inline", waits_inline)):
        if only is None or name in only:
            registry.controller(name)(controller)
    return registry, bare


async def _never(ctx: TaskContext, given: Any) -> Any:
    raise OSError("not today")


# ---- owning ---------------------------------------------------------------------------------------


def hold(journal: Journal, *, path: str, go: str, stop: str) -> None:
    """Own the store with a child running, try every mutation when told to, and close when told to."""

    async def main() -> None:
        registry, _ = code(journal, stop)
        began = time.perf_counter()
        async with open_runtime(path, registry=registry) as runtime:
            flows = bind(runtime)
            flow = await flows.create_managed(
                controller_id="held", goal="be held", state_json={"by": "the first"}
            )
            await flows.run_task(flow_id=flow.flow_id, task="wait", run="again", run_id="child")
            linked = await flows.run_task(flow_id=flow.flow_id, task="wait", runtime="acp")
            journal.write(ready=time.perf_counter() - began, flow=flow.flow_id)
            await appears(go)
            journal.write(answers=await _try_everything(flows, flow.flow_id, linked.task.task_id))
            await appears(stop)
        journal.write(closed=True)

    asyncio.run(main())


async def _try_everything(flows: SessionFlows, flow_id: str, task_id: str) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    named: tuple[tuple[str, dict[str, Any]], ...] = (
        ("update", {"state_json": {"by": "the one who came back"}}),
        ("set_waiting", {"wait_json": {"kind": "reply"}}),
        ("resume", {}),
        ("request_cancel", {}),
        ("fail", {}),
        ("finish", {}),
    )
    for name, arguments in named:
        flow = await flows.get(flow_id)
        assert flow is not None
        answer = await getattr(flows, name)(
            flow_id=flow_id, expected_revision=flow.revision, **arguments
        )
        answers[name] = [answer.code, getattr(answer, "reason", "")]
    answer = await flows.run_task(flow_id=flow_id, task="more", runtime="acp")
    answers["run_task"] = [answer.code, answer.reason]
    report = await flows.cancel(flow_id, grace=0.5)
    answers["cancel"] = [report.code, report.reason]
    for name, call in (
        ("create_managed", lambda: flows.create_managed(controller_id="held", goal="be new")),
        ("complete_task", lambda: flows.complete_task(task_id)),
    ):
        try:
            await call()
            answers[name] = [None, ""]
        except FlowError as error:
            answers[name] = [type(error).__name__, str(error)]
    return answers


def update_when_told(journal: Journal, *, path: str, go: str) -> None:
    """Own the store, make a flow, and change it when told to."""

    async def main() -> None:
        async with open_runtime(path) as runtime:
            flows = bind(runtime)
            flow = await flows.create_managed(controller_id="held", goal="be held")
            journal.write(ready=True)
            await appears(go)
            answer = await flows.update(
                flow_id=flow.flow_id, expected_revision=0, state_json={"unharmed": True}
            )
            journal.write(applied=answer.applied)

    asyncio.run(main())


def try_open(journal: Journal, *, path: str) -> None:
    """Open the store, or tell why not."""

    async def main() -> None:
        began = time.perf_counter()
        try:
            async with open_runtime(path) as runtime:
                journal.write(ready=time.perf_counter() - began, records=await records(runtime))
        except StoreInUse as error:
            journal.write(refused=str(error), seconds=time.perf_counter() - began)

    asyncio.run(main())


def take_over(journal: Journal, *, path: str, go: str, stop: str) -> None:
    """Take the store from its owner, change a flow, then stay until told to close."""

    async def main() -> None:
        registry, _ = code(journal, go)
        async with open_runtime(path, registry=registry, takeover=True) as runtime:
            flows = bind(runtime)
            [flow] = await flows.list()
            answer = await flows.update(
                flow_id=flow.flow_id,
                expected_revision=flow.revision,
                state_json={"by": "the second"},
            )
            await quiet(runtime)
            journal.write(ready=answer.applied)
            await appears(go)
            answer = await flows.update(
                flow_id=flow.flow_id,
                expected_revision=flow.revision + 1,
                state_json={"by": "the second, again"},
            )
            for child in await flows.list_tasks(flow.flow_id):
                if child.run_id is not None:
                    await flows.wait_task(child.task_id)
            journal.write(again=answer.applied)
            await appears(stop)
        journal.write(closed=True)

    asyncio.run(main())


def fail_to_take_over(journal: Journal, *, path: str) -> None:
    """Try to take the store from its owner on a disk that refuses."""

    def connect(*_args: Any, **_options: Any) -> sqlite3.Connection:
        raise sqlite3.OperationalError("disk I/O error")

    async def main() -> None:
        try:
            async with open_runtime(SqliteStore(path, connect=connect), takeover=True):
                journal.write(ready=True)
        except StoreError as error:
            journal.write(refused=str(error))

    asyncio.run(main())


def visit(journal: Journal, *, path: str) -> None:
    """Take the store from its owner if that can be done, let recovery come to rest, and close."""

    async def main() -> None:
        try:
            async with open_runtime(SqliteStore(path), takeover=True) as runtime:
                await quiet(runtime)
            journal.write(visited=True)
        except StoreInUse as error:
            journal.write(visited=False, reason=str(error))

    asyncio.run(main())


# ---- stopping and starting again ------------------------------------------------------------------


def furnish(journal: Journal, *, path: str, go: str) -> None:
    """Make flows and children of every kind that rests, tell them, and wait to be killed or told to close."""

    async def main() -> None:
        registry, _ = code(journal, go)
        limits = Limits(cancel_grace=3600.0)
        async with open_runtime(path, registry=registry, limits=limits) as runtime:
            await _furnish(bind(runtime))
            await quiet(runtime)
            journal.write(ready=True, records=await records(runtime))
            await appears(go)
        journal.write(closed=True)

    asyncio.run(main())


async def _furnish(flows: SessionFlows) -> None:
    made = {}
    for name in ("queued", "running", "waiting", "blocked", "asked", "done", "failed", "cancelled"):
        flow = await flows.create_managed(
            controller_id="nobody",
            goal=f"be {name}",
            flow_id=name,
            correlation_id="all",
            idempotency_key=f"key-{name}",
            status="running" if name == "running" else "queued",
            state_json={"name": name, "text": "ä\u2028\n", "deep": [[{"n": 1.5}]], "none": None},
        )
        made[name] = flow
        for status in ("queued", "running"):
            await flows.run_task(
                flow_id=name, task=f"be {status}", runtime="acp", run_id=status, status=status
            )
        ended = await flows.run_task(flow_id=name, task="end", runtime="cli", run_id="ended")
        await flows.complete_task(ended.task.task_id, result_json={"found": [1, 2]})
        failed = await flows.run_task(flow_id=name, task="fail", runtime="cli", run_id="failed")
        await flows.fail_task(failed.task.task_id, error="it broke", status="timed_out")
    await flows.set_waiting(flow_id="waiting", expected_revision=0, wait_json={"kind": "reply"})
    await flows.set_waiting(flow_id="blocked", expected_revision=0, blocked_summary="needs a word")
    await flows.request_cancel(flow_id="asked", expected_revision=0)
    await flows.finish(flow_id="done", expected_revision=0, state_json={"answer": 42})
    await flows.fail(flow_id="failed", expected_revision=0, blocked_summary="no way")
    await flows.cancel("cancelled")
    child = await flows.run_task(flow_id="queued", task="never", run="never", run_id="never")
    async with asyncio.timeout(PATIENCE):
        while (found := await flows.get_task(child.task.task_id)) is not None:
            if found.failure:
                break


def look(journal: Journal, *, path: str, registered: bool = True) -> None:
    """Open the store, let it come to rest, tell what is in it, close."""

    async def main() -> None:
        registry, _ = code(journal, "/nonexistent")
        limits = Limits(cancel_grace=3600.0)
        async with open_runtime(
            path, registry=registry if registered else None, limits=limits
        ) as runtime:
            await quiet(runtime)
            journal.write(ready=True, records=await records(runtime))
            journal.write(unregistered=runtime.admin.unregistered_controllers())
        journal.write(closed=True)

    asyncio.run(main())


def launch(journal: Journal, *, path: str, go: str) -> None:
    """Launch children that wait, and stay until killed, told or asked to terminate."""

    async def main() -> None:
        registry, bare = code(journal, go)
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with open_runtime(path, registry=registry) as runtime:
            flows = bind(runtime)
            flow = await flows.create_managed(controller_id="held", goal="g", flow_id="launching")
            for name in ("again", "fragile"):
                await flows.run_task(flow_id=flow.flow_id, task="wait", run=name, run_id=name)
            await flows.run_task(flow_id=flow.flow_id, task="wait", run=bare, run_id="bare")
            journal.write(ready=True)
            await appears(go + ".close")
        journal.write(closed=True)

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        journal.write(cancelled=True)


def finish(journal: Journal, *, path: str, go: str, only: list[str] | None = None) -> None:
    """Open the store, see all launched children and driven flows to their end, tell, close."""

    async def main() -> None:
        registry, _ = code(journal, go, only=None if only is None else tuple(only))
        async with open_runtime(path, registry=registry) as runtime:
            flows = bind(runtime)
            for flow in await flows.list(status=("queued", "running")):
                if flow.controller_id in registry.controllers:
                    await flows.result(flow.flow_id)
                for child in await flows.list_tasks(flow.flow_id, status=("queued", "running")):
                    if child.task_id and child.runtime == "task" and only is None:
                        await flows.wait_task(child.task_id)
            await quiet(runtime)
            journal.write(unregistered=runtime.admin.unregistered_controllers())
            journal.write(ready=True, records=await records(runtime))
        journal.write(closed=True)

    asyncio.run(main())


def drive(journal: Journal, *, path: str, go: str, controllers: list[str]) -> None:
    """Start flows that are driven, and stay until killed or told to close."""

    async def main() -> None:
        registry, _ = code(journal, go)
        async with open_runtime(path, registry=registry) as runtime:
            flows = bind(runtime)
            for name in controllers:
                await flows.create_managed(
                    controller_id=name, goal="be driven", flow_id=name.replace("/", "-")
                )
            journal.write(ready=True)
            await appears(go + ".close")
        journal.write(closed=True)

    asyncio.run(main())


# ---- ending without closing; run by an interpreter of its own ------------------------------------


def leave_open(path: str) -> None:
    """Open a runtime with work under way and return without closing it."""

    async def main() -> None:
        runtime = await open_runtime(path).__aenter__()
        flows = bind(runtime)
        flow = await flows.create_managed(controller_id="left", goal="be left", flow_id="left")

        async def sleeper(ctx: TaskContext, given: Any) -> Any:
            await asyncio.sleep(3600)

        await flows.run_task(flow_id=flow.flow_id, task="sleep", run=sleeper, run_id="sleeper")

    asyncio.run(main())


def close_loop(path: str) -> None:
    """Close the event loop under a runtime with calls under way."""
    loop = asyncio.new_event_loop()
    runtime = loop.run_until_complete(open_runtime(path).__aenter__())

    async def main() -> None:
        flows = bind(runtime)
        await flows.create_managed(controller_id="left", goal="be left", flow_id="left")
        calls = [
            loop.create_task(
                flows.create_managed(controller_id="left", goal="g", flow_id=f"left-{number}")
            )
            for number in range(50)
        ]
        # Every call has been made, and the first transaction is on its way.
        await asyncio.wait(calls, timeout=0.001)

    loop.run_until_complete(main())
    loop.close()


SCENES: dict[str, Callable[..., None]] = {
    scene.__name__: scene
    for scene in (
        hold,
        update_when_told,
        try_open,
        take_over,
        fail_to_take_over,
        visit,
        furnish,
        look,
        launch,
        finish,
        drive,
    )
}
