"""Hosts that listen with a fault: a logging handler that raises must not stop what it is told about."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from flowstead import CommitFailed, FlowContext, Registry, Runtime, TaskContext, open_runtime
from flowstead.store.memory import MemoryStore
from flowstead.testing import ManualClock
from tests.faulty_store import NOT_WRITTEN, FaultyStore, flows_of, settle

T = TypeVar("T")


class Deaf(logging.Handler):
    """A handler that raises at every record it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.raised = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.raised += 1
        raise OSError("the log is full")


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    handler, logger = Deaf(), logging.getLogger("flowstead")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@asynccontextmanager
async def hard_of_hearing(store: Any, **options: Any) -> AsyncIterator[Runtime]:
    """A runtime that is closed if it can be, and taken apart if it cannot; no test waits for time."""
    before = asyncio.all_tasks()
    runtime = open_runtime(store, **options)
    await runtime.__aenter__()
    try:
        yield runtime
    finally:
        closing = asyncio.create_task(runtime.aclose())
        await settle()
        closed = closing.done()
        for task in asyncio.all_tasks() - before:
            task.cancel()
        await settle()
    assert closed, "the runtime could not be closed"


async def answered(call: Coroutine[Any, Any, T]) -> T:
    """What a call answers once everything that can happen without time has happened."""
    asking = asyncio.create_task(call)
    await settle()
    assert asking.done(), "nobody answered"
    return await asking


async def test_a_commit_that_fails_is_answered_although_the_log_raises(deaf: Deaf):
    store = FaultyStore()
    async with hard_of_hearing(store) as runtime:
        flows = flows_of(runtime)
        flow_id = (await flows.create_managed(controller_id="c", goal="g")).flow_id
        store.fail_commits(NOT_WRITTEN)

        answer = await answered(flows.update(flow_id=flow_id, expected_revision=0))

        assert deaf.raised
        assert answer.code == "persist_failed"
        assert (await answered(flows.update(flow_id=flow_id, expected_revision=0))).applied


async def test_a_controller_that_fails_has_failed_its_flow_although_the_log_raises(deaf: Deaf):
    registry = Registry()

    @registry.controller("bad")
    async def bad(flow: FlowContext) -> None:
        raise ValueError("no")

    async with hard_of_hearing(":memory:", registry=registry) as runtime:
        flows = flows_of(runtime)
        flow_id = (await flows.create_managed(controller_id="bad", goal="g")).flow_id

        assert (await answered(flows.result(flow_id))).status == "failed"
        assert deaf.raised


async def test_an_end_that_could_not_be_written_is_reported_again_although_the_log_raises(
    deaf: Deaf, clock: ManualClock
):
    store = FaultyStore()
    async with hard_of_hearing(store, clock=clock) as runtime:
        flows, go = flows_of(runtime), asyncio.Event()

        async def child(ctx: TaskContext, given: object) -> str:
            await go.wait()
            return "done"

        flow_id = (await flows.create_managed(controller_id="c", goal="g")).flow_id
        made = await flows.run_task(flow_id=flow_id, task="t", run=child)
        await settle()
        store.fail_commits(NOT_WRITTEN)
        go.set()
        await settle()
        clock.advance(2)
        await settle()

        task = await flows.get_task(made.unwrap().task_id)
        assert deaf.raised
        assert task
        assert task.status == "succeeded"


async def test_a_flow_that_cannot_be_read_is_answered_although_the_log_raises(deaf: Deaf):
    inner = MemoryStore()
    async with hard_of_hearing(inner) as runtime:
        made = await flows_of(runtime).create_managed(controller_id="c", goal="g")
    store = FaultyStore(MemoryStore(inner.tables))
    async with hard_of_hearing(store) as runtime:
        flows = flows_of(runtime)
        store.fail_reads("load", NOT_WRITTEN)

        with pytest.raises(CommitFailed):
            await answered(flows.update(flow_id=made.flow_id, expected_revision=0))

        assert deaf.raised
        assert (await answered(flows.update(flow_id=made.flow_id, expected_revision=0))).applied
