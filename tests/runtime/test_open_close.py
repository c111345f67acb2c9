"""Opening and closing: too early, too late, twice, never, in the middle; and what is said meanwhile."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog

import flowstead
from flowstead import (
    Applied,
    Created,
    Flow,
    FlowError,
    Limits,
    Registry,
    Rejected,
    RuntimeClosed,
    SessionFlows,
    StoreUnusable,
    TaskContext,
    open_runtime,
)
from flowstead.store.memory import MemoryStore
from flowstead.store.sqlite import SqliteStore
from tests.runtime.support import PATIENCE, Where, bound, dump, link, make, step

# ---- too early, too late, twice -------------------------------------------------------------------


async def test_a_runtime_is_used_only_once_it_is_entered(store: Where) -> None:
    runtime = open_runtime(store)

    for use in (
        lambda: bound(runtime),
        lambda: runtime.tasks.flow.from_tool_context({"sessionKey": "x"}),
        lambda: runtime.admin,
        runtime.statistics,
    ):
        with pytest.raises(RuntimeClosed, match="is not open yet: use `async with open_runtime"):
            use()
    await runtime.aclose()


CALLS: dict[str, Callable[[SessionFlows, str, str], Awaitable[Any]]] = {
    "create": lambda flows, flow, task: make(flows),
    "create own id": lambda flows, flow, task: make(flows, flow_id="own"),
    "create key": lambda flows, flow, task: make(flows, idempotency_key="key"),
    "get": lambda flows, flow, task: flows.get(flow),
    "list": lambda flows, flow, task: flows.list(after=flow),
    "find_latest": lambda flows, flow, task: flows.find_latest(),
    "resolve": lambda flows, flow, task: flows.resolve(flow[:-1]),
    "get_task_summary": lambda flows, flow, task: flows.get_task_summary(flow),
    "get_task": lambda flows, flow, task: flows.get_task(task),
    "list_tasks": lambda flows, flow, task: flows.list_tasks(flow),
    "history": lambda flows, flow, task: flows.history(flow),
    "run_task": lambda flows, flow, task: flows.run_task(
        flow_id=flow, runtime="acp", task="t", run_id="r"
    ),
    "run_task again": lambda flows, flow, task: flows.run_task(
        flow_id=flow, runtime="acp", task="t", run_id="first"
    ),
    "start_task": lambda flows, flow, task: flows.start_task(task),
    "progress_task": lambda flows, flow, task: flows.progress_task(task),
    "complete_task": lambda flows, flow, task: flows.complete_task(task),
    "fail_task": lambda flows, flow, task: flows.fail_task(task, error="e"),
    "cancel_task": lambda flows, flow, task: flows.cancel_task(task),
    "wait_task": lambda flows, flow, task: flows.wait_task(task),
    "update": lambda flows, flow, task: flows.update(flow_id=flow, expected_revision=0),
    "set_waiting": lambda flows, flow, task: flows.set_waiting(flow_id=flow, expected_revision=0),
    "resume": lambda flows, flow, task: flows.resume(flow_id=flow, expected_revision=0),
    "finish": lambda flows, flow, task: flows.finish(flow_id=flow, expected_revision=0),
    "fail": lambda flows, flow, task: flows.fail(flow_id=flow, expected_revision=0),
    "request_cancel": lambda flows, flow, task: flows.request_cancel(
        flow_id=flow, expected_revision=0
    ),
    "cancel": lambda flows, flow, task: flows.cancel(flow),
    "result": lambda flows, flow, task: flows.result(flow),
}


async def test_a_closed_runtime_refuses_every_call(store: Where) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
    before = dump(store)

    for name, call in CALLS.items():
        with pytest.raises(RuntimeClosed, match=r"is closed\. Open another one"):
            await call(flows, "flow", "task")
        assert dump(store) == before, name
    for use in (lambda: bound(runtime), lambda: runtime.admin, runtime.statistics, flows.watch):
        with pytest.raises(RuntimeClosed):
            use()


async def test_closing_twice_and_from_many_sides_is_fine(store: Where) -> None:
    async with open_runtime(store) as runtime:
        await make(bound(runtime))
        await asyncio.gather(*(runtime.aclose() for _ in range(5)))
        await runtime.aclose()

    async with open_runtime(store) as again:
        assert await bound(again).find_latest() is not None


async def test_a_runtime_is_opened_once(store: Where) -> None:
    runtime = open_runtime(store)

    async with runtime:
        with pytest.raises(RuntimeError, match="opened once"):
            await runtime.__aenter__()
        await make(bound(runtime))
    with pytest.raises(RuntimeError, match="opened once"):
        await runtime.__aenter__()


async def test_cancelling_whoever_closes_does_not_stop_the_closing(store: Where) -> None:
    for rounds in range(8):
        runtime = open_runtime(store)
        await runtime.__aenter__()
        flow = await make(bound(runtime))
        closing = asyncio.create_task(runtime.aclose())
        await step(rounds)
        closing.cancel()
        await asyncio.wait({closing})
        with anyio.fail_after(PATIENCE):
            await runtime.aclose()

        async with open_runtime(store) as again:
            assert await bound(again).get(flow.flow_id) == flow


async def test_an_exception_inside_the_block_closes_and_passes(store: Where) -> None:
    async def host() -> None:
        async with open_runtime(store) as runtime:
            await make(bound(runtime), flow_id="f")
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await host()

    async with open_runtime(store) as again:
        assert await bound(again).get("f") is not None


# ---- never closed ---------------------------------------------------------------------------------


async def test_a_runtime_that_was_never_closed_is_named_with_the_line_that_made_it(
    db: Path,
) -> None:
    runtime = open_runtime(db)
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    await runtime.__aenter__()
    engine = runtime.core.engine

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del runtime
        gc.collect()

    [told] = [str(w.message) for w in caught if "never closed" in str(w.message)]
    assert "A runtime on flows.db was never closed" in told
    assert f"(made at {Path(__file__).name}:{line})" in told
    await engine.aclose()


def test_a_runtime_that_was_never_entered_needs_no_closing(db: Path) -> None:
    open_runtime(db)
    gc.collect()

    assert not db.exists()


def test_a_process_that_never_closes_ends_all_the_same(db: Path) -> None:
    program = """
        import asyncio, sys
        import flowstead

        async def main():
            runtime = await flowstead.open_runtime(sys.argv[1]).__aenter__()
            flows = runtime.tasks.flow.bind_session(session_key="x")
            await flows.create_managed(controller_id="c", goal="g")

        asyncio.run(main())
    """

    done = _run(program, db, flags=("-W", "always"))

    assert done.returncode == 0
    assert "ResourceWarning: A runtime on flows.db was never closed" in done.stderr


# ---- closed in the middle -------------------------------------------------------------------------


async def test_every_one_of_a_thousand_calls_in_flight_is_answered_by_closing(
    store: Where,
) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        made = [await make(flows) for _ in range(10)]
        callers = [
            asyncio.create_task(
                flows.run_task(
                    flow_id=made[number % 10].flow_id, runtime="acp", task="t", run_id=str(number)
                )
                if number % 2
                else make(flows, flow_id=f"flow-{number}")
            )
            for number in range(1000)
        ]
        await step(3)
        with anyio.fail_after(PATIENCE):
            await runtime.aclose()
            answers = await asyncio.gather(*callers, return_exceptions=True)

    made_flows = {answer.flow_id for answer in answers if isinstance(answer, Flow)}
    made_tasks = {answer.task.run_id for answer in answers if isinstance(answer, Created)}
    closed = [answer for answer in answers if isinstance(answer, RuntimeClosed)]
    assert len(made_flows) + len(made_tasks) + len(closed) == 1000, answers
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        kept = {flow.flow_id for flow in await flows.list(limit=5000)}
        assert kept == made_flows | {flow.flow_id for flow in made}
        run_ids = [task.run_id for flow in made for task in await flows.list_tasks(flow.flow_id)]
        assert set(run_ids) == made_tasks


@pytest.mark.parametrize("rounds", [*range(8), 20, 60, 200])
async def test_closing_answers_a_call_wherever_it_is(store: Where, rounds: int) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        task = await link(flows, flow.flow_id, run_id="first")
        await flows.complete_task((await link(flows, flow.flow_id)).task_id)

    for name, call in CALLS.items():
        # Opened anew, so that every call has to go to the store first.
        async with open_runtime(store) as runtime:
            caller = asyncio.ensure_future(call(bound(runtime), flow.flow_id, task.task_id))
            await step(rounds)
            with anyio.fail_after(PATIENCE):
                await runtime.aclose()
            await asyncio.wait({caller}, timeout=5)
            assert caller.done(), name
            error = caller.exception()
            assert error is None or isinstance(error, FlowError | ValueError), (name, error)


@pytest.mark.parametrize("rounds", range(0, 30, 5))
async def test_what_was_answered_as_applied_is_on_disk(store: Where, rounds: int) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        callers = [
            asyncio.create_task(flows.update(flow_id=flow.flow_id, expected_revision=number))
            for number in range(300)
        ]
        await step(rounds)
        with anyio.fail_after(PATIENCE):
            await runtime.aclose()
            answers = await asyncio.gather(*callers, return_exceptions=True)

    applied = [answer for answer in answers if isinstance(answer, Applied)]
    others = [answer for answer in answers if not isinstance(answer, Applied)]
    assert all(isinstance(answer, RuntimeClosed | Rejected) for answer in others), others
    async with open_runtime(store) as runtime:
        now = await bound(runtime).get(flow.flow_id)
        assert now is not None and now.revision == len(applied)


async def test_closing_ends_every_wait(store: Where) -> None:
    async with open_runtime(store) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        task = await link(flows, flow.flow_id)
        waiters = [
            asyncio.create_task(flows.result(flow.flow_id)),
            asyncio.create_task(flows.wait_task(task.task_id)),
            asyncio.create_task(runtime.admin.result(flow.flow_id)),
        ]

        entered = anyio.Event()

        async def watch() -> list[str]:
            async with flows.watch(flow.flow_id, after_seq=0) as events:
                entered.set()
                return [event.type async for event in events]

        watcher = asyncio.create_task(watch())
        await entered.wait()
        await step(50)
        with anyio.fail_after(PATIENCE):
            await runtime.aclose()
            answers = await asyncio.gather(*waiters, return_exceptions=True)
            seen = await watcher

    assert [type(answer) for answer in answers] == [RuntimeClosed] * 3
    assert "closed while" in str(answers[0])
    assert seen == ["flow.created", "task.created"]


async def test_a_cancel_that_waits_for_stubborn_code_is_answered_by_closing(
    store: Where,
) -> None:
    release = anyio.Event()

    async def stubborn(_: TaskContext, __: Any) -> None:
        with anyio.CancelScope(shield=True):
            await release.wait()

    async with open_runtime(store, limits=Limits(shutdown_grace=0.05)) as runtime:
        flows = bound(runtime)
        flow = await make(flows)
        task = (await flows.run_task(flow_id=flow.flow_id, task="t", run=stubborn)).unwrap()
        await step(10)
        callers = [
            asyncio.create_task(flows.cancel(flow.flow_id, grace=600)),
            asyncio.create_task(flows.cancel_task(task.task_id, grace=600)),
        ]
        await step(30)
        with anyio.fail_after(PATIENCE):
            await runtime.aclose()
            answers = await asyncio.gather(*callers, return_exceptions=True)
        release.set()
        await step(10)

    assert all(
        isinstance(answer, RuntimeClosed) or not getattr(answer, "cancelled", True)
        for answer in answers
    ), answers


# ---- where flows are kept -------------------------------------------------------------------------


async def test_a_store_is_a_name_a_path_a_url_or_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    specs: list[Any] = [
        "flows.db",
        Path("flows.db"),
        tmp_path / "flows.db",
        str(tmp_path / "flows.db"),
        f"sqlite:///{tmp_path}/flows.db",
        SqliteStore(tmp_path / "flows.db"),
    ]

    for number, spec in enumerate(specs):
        async with open_runtime(spec) as runtime:
            await make(bound(runtime))
            assert len(await bound(runtime).list()) == number + 1

    assert (tmp_path / "flows.db").stat().st_mode & 0o777 == 0o600
    assert {name for name in os.listdir(tmp_path) if not name.startswith("flows.db")} == set()


async def test_the_default_store_is_flows_db_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async with open_runtime() as runtime:
        await make(bound(runtime))

    assert (tmp_path / "flows.db").exists()


async def test_memory_is_new_every_time_and_a_memory_store_is_kept() -> None:
    kept = MemoryStore()
    for spec in (":memory:", kept):
        async with open_runtime(spec) as runtime:
            await make(bound(runtime), flow_id="f")

    async with open_runtime(":memory:") as runtime:
        assert await bound(runtime).list() == []
    async with open_runtime(kept) as runtime:
        assert await bound(runtime).get("f") is not None


@pytest.mark.parametrize(
    "spec",
    ["", " ", "postgresql://host/db", "sqlite://flows.db", "sqlite://", "sqlite:///", "http://x/y"],
)
def test_a_store_nobody_knows_is_refused_with_its_sentence(spec: str) -> None:
    with pytest.raises(ValueError, match=r"^store "):
        open_runtime(spec)


@pytest.mark.parametrize("spec", [None, 5, b"flows.db", object(), ["flows.db"]])
def test_a_store_that_is_none_is_refused_with_its_sentence(spec: Any) -> None:
    with pytest.raises(TypeError, match=r"^store must be a path, a URL or a Store, not "):
        open_runtime(spec)


@pytest.mark.parametrize("durability", ["", "FULL", "off", None, 1])
def test_a_durability_nobody_knows_is_refused(db: Path, durability: Any) -> None:
    with pytest.raises(ValueError, match=r"^durability must be 'full' or 'normal'"):
        open_runtime(db, durability=durability)


@pytest.mark.parametrize("durability", ["full", "normal"])
async def test_both_durabilities_keep_flows(db: Path, durability: Any) -> None:
    async with open_runtime(db, durability=durability) as runtime:
        flow = await make(bound(runtime))
    async with open_runtime(db, durability=durability) as runtime:
        assert await bound(runtime).get(flow.flow_id) == flow


async def test_a_store_that_cannot_be_opened_leaves_nothing_running(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    for path in (tmp_path / "no" / "flows.db", tmp_path):
        runtime = open_runtime(path)
        with pytest.raises(StoreUnusable):
            await runtime.__aenter__()
        with pytest.raises(RuntimeClosed):
            bound(runtime)
        await runtime.aclose()

    assert asyncio.all_tasks() == before
    with anyio.fail_after(PATIENCE):
        while any("connection_worker" in thread.name for thread in threading.enumerate()):
            await step(1)


def test_a_refused_open_says_nothing_on_stderr(db: Path) -> None:
    program = """
        import asyncio, os, sys
        import flowstead

        async def refused(path):
            try:
                async with flowstead.open_runtime(path):
                    sys.exit("opened")
            except flowstead.StoreError:
                pass

        async def twice(path):
            async with flowstead.open_runtime(path):
                await refused(path)

        for _ in range(30):
            asyncio.run(refused(os.path.dirname(sys.argv[1])))
            asyncio.run(twice(sys.argv[1]))
    """

    done = _run(program, db)

    assert (done.returncode, done.stdout, done.stderr[:2000]) == (0, "", "")


# ---- what is said meanwhile -----------------------------------------------------------------------

SECRET = "hunter2-c0ffee"


async def _tell_secrets(store: Where) -> None:
    """A day in the life of a runtime, with a secret wherever a user may have put one."""
    registry = Registry()

    @registry.task
    async def leak(_: TaskContext, value: Any) -> Any:
        raise RuntimeError(f"{SECRET} {value}")

    @registry.task
    async def echo(_: TaskContext, value: Any) -> Any:
        return value

    @registry.controller("driven")
    async def drive(flow: Any) -> None:
        await flow.update(state_json={"s": SECRET})
        await flow.run(echo, SECRET)
        raise RuntimeError(SECRET)

    secret = {"s": SECRET, "large": "x" * 400}
    limits = Limits(state_bytes=1000, state_warn_bytes=100, mailbox=5)
    for _ in range(2):
        async with open_runtime(store, registry=registry, limits=limits) as runtime:
            flows = bound(runtime, requester_origin={"to": SECRET})
            flow = await make(flows, state_json=secret, wait_json=secret, goal=SECRET)
            await make(flows, controller_id="driven", state_json=secret)
            flow_id = flow.flow_id
            await flows.set_waiting(
                flow_id=flow_id, expected_revision=0, wait_json=secret, blocked_summary=SECRET
            )
            await flows.update(
                flow_id=flow_id, expected_revision=1, state_json={SECRET: float("nan")}
            )
            await flows.update(flow_id=flow_id, expected_revision=1, state_json=SECRET * 500)
            for run in ("leak", "echo"):
                asked = await flows.run_task(
                    flow_id=flow_id, task=SECRET, run=run, input_json=secret
                )
                await flows.wait_task(asked.unwrap().task_id)
            task = await link(flows, flow_id, input_json=secret, label=SECRET)
            await flows.progress_task(task.task_id, summary=SECRET)
            await flows.complete_task(task.task_id, result_json=secret, terminal_summary=SECRET)
            other = await link(flows, flow_id)
            await flows.fail_task(other.task_id, error=SECRET)
            await asyncio.gather(
                *(flows.run_task(flow_id=flow_id, runtime="acp", task=SECRET) for _ in range(20))
            )
            await flows.history(flow_id)
            await flows.fail(flow_id=flow_id, expected_revision=1, blocked_summary=SECRET)
            await step(50)


async def test_what_users_keep_never_reaches_a_log(
    store: Where, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)

    await _tell_secrets(store)

    said = [
        f"{record.name} {record.getMessage()} {record.__dict__!r} {record.exc_text or ''}"
        for record in caplog.records
    ]
    assert said, "nothing was logged at all, so this test shows nothing"
    told = {
        record.name for record, line in zip(caplog.records, said, strict=True) if SECRET in line
    }
    assert told == set()
    assert capfd.readouterr() == ("", "")


async def test_a_large_value_is_logged_by_its_size(
    flows: SessionFlows, caplog: pytest.LogCaptureFixture
) -> None:
    flow = await make(flows, state_json="x" * (300 * 1024))

    assert flow.state_json == "x" * (300 * 1024)
    [record] = [r for r in caplog.records if "large" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert "307202" in repr(record.__dict__)


def test_a_host_that_configures_nothing_sees_nothing(db: Path) -> None:
    program = """
        import asyncio, sys
        import flowstead

        registry = flowstead.Registry()

        @registry.controller("c")
        async def drive(flow):
            raise RuntimeError("no")

        async def main():
            async with flowstead.open_runtime(sys.argv[1], registry=registry) as runtime:
                flows = runtime.tasks.flow.bind_session(session_key="x")
                flow = await flows.create_managed(
                    controller_id="c", goal="g", state_json="x" * 300_000
                )
                assert (await flows.result(flow.flow_id)).status == "failed"

        asyncio.run(main())
    """

    done = _run(program, db)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_structlog_and_logging_are_never_configured(db: Path) -> None:
    configured, handlers = structlog.is_configured(), list(logging.getLogger().handlers)
    level = logging.getLogger().level

    await _tell_secrets(db)

    assert structlog.is_configured() is configured is False
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger().level == level


def _run(program: str, db: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(program), str(db)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


# ---- arguments that could never be used -----------------------------------------------------------


class Sends:
    def send(self, update: flowstead.Update) -> None: ...


class SendsNothing:
    send = None


@pytest.mark.parametrize("where", [":memory:", "flows.db"])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"notifier": print}, r"notifier must have `async def send.*CallableNotifier"),
        ({"notifier": lambda update: None}, r"notifier must have `async def send.*CallableNoti"),
        ({"notifier": flowstead.LogNotifier}, r"notifier must have `async def send.*the class"),
        ({"notifier": object()}, r"notifier must have `async def send\(self, update\)`, not <obj"),
        ({"notifier": "http://x"}, r"notifier must have `async def send.*'http://x'"),
        ({"notifier": Sends()}, r"notifier must have `async def send"),
        ({"notifier": SendsNothing()}, r"notifier must have `async def send"),
        ({"deliveries": 5}, r"deliveries must be a flowstead\.Retry, not 5\."),
        ({"digest_time": "18:00"}, r"digest_time must be a flowstead\.DigestTime, not '18:00'\."),
        ({"limits": {}}, r"limits must be a flowstead\.Limits, not \{\}\."),
        ({"limits": flowstead.Limits}, r"limits must be a flowstead\.Limits, not <class"),
        ({"registry": {}}, r"registry must be a flowstead\.Registry, not \{\}\."),
        ({"durability": "ful"}, r"durability must be 'full' or 'normal', not 'ful'\."),
        ({"durability": None}, r"durability must be 'full' or 'normal', not None\."),
    ],
)
def test_an_argument_that_could_never_be_used_is_refused_when_it_is_given(
    given: dict[str, object], told: str, where: str, tmp_path: Path
) -> None:
    kind = ValueError if "durability" in given else TypeError
    store = where if where == ":memory:" else tmp_path / where

    with pytest.raises(kind, match=f"^{told}"):
        flowstead.open_runtime(store, **given)  # type: ignore[arg-type]

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{"at": 1800}, {"timezone": None}, {"at": None, "timezone": 5}])
def test_a_digest_time_that_is_no_text_is_told(given: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=r"^DigestTime\.(at|timezone) must be a string, not "):
        flowstead.DigestTime(**given)  # type: ignore[arg-type]


async def test_what_can_send_in_any_way_that_is_awaited_is_a_notifier() -> None:
    class Plain:
        async def send(self, update: flowstead.Update) -> None: ...

    class Wrapped:
        def __init__(self) -> None:
            self.send = functools.partial(Plain().send)

    class Decorated:
        @functools.wraps(Plain.send)
        def send(self, *args: flowstead.Update) -> object:
            return Plain().send(*args)

    class Callable:
        class send:
            async def __call__(self, update: flowstead.Update) -> None: ...

        send = send()  # type: ignore[assignment, misc]

    for notifier in (Plain(), Wrapped(), Decorated(), Callable()):
        async with flowstead.open_runtime(":memory:", notifier=notifier):  # type: ignore[arg-type]
            pass
