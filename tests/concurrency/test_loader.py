"""The loader: flows come back into memory, many in one read, and one bad read fails only whom it concerns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from flowstead.engine.loader import Loader
from flowstead.errors import RuntimeClosed, StoreUnusable
from flowstead.model.flow import FlowKey
from flowstead.testing import ManualClock
from tests.faulty_store import FaultyStore, flows_of, new_flow, running, settle, soon


class Shelf:
    """A store that can only be read, and only when it is let."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def load(self, keys: Sequence[FlowKey]) -> list[Any]:
        self.reads.append(len(keys))
        await self.gate.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return [key.flow_id for key in keys]


class Reader:
    def __init__(self, name: str) -> None:
        self.key = FlowKey("owner", name)
        self.told: list[object] = []

    def loaded(self, snapshot: object) -> None:
        self.told.append(snapshot)


class Loading:
    """A loader at work."""

    def __init__(self) -> None:
        self.shelf = Shelf()
        self.loader = Loader(self.shelf)  # type: ignore[arg-type]

    async def __aenter__(self) -> Loading:
        self.job = asyncio.create_task(self.loader.run())
        await settle()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.job.cancel()
        await asyncio.wait({self.job})


async def test_a_reader_is_told_what_was_found_exactly_once():
    async with Loading() as loading:
        reader = Reader("a")

        loading.loader.want(reader)
        await soon(loading.loader.wait_idle())

        assert reader.told == ["a"]
        assert loading.shelf.reads == [1]


async def test_what_is_wanted_while_a_read_runs_goes_into_the_next_one():
    async with Loading() as loading:
        readers = [Reader(str(n)) for n in range(10)]
        loading.shelf.gate.clear()
        loading.loader.want(readers[0])
        await settle()
        for reader in readers[1:]:
            loading.loader.want(reader)

        loading.shelf.gate.set()
        await soon(loading.loader.wait_idle())

        assert loading.shelf.reads == [1, 9]
        assert [reader.told for reader in readers] == [[str(n)] for n in range(10)]


async def test_many_flows_are_read_in_few_reads():
    async with Loading() as loading:
        readers = [Reader(str(n)) for n in range(1000)]

        for reader in readers:
            loading.loader.want(reader)
        await soon(loading.loader.wait_idle())

        assert len(loading.shelf.reads) == 4
        assert all(len(reader.told) == 1 for reader in readers)


async def test_a_failing_read_is_told_to_its_readers_and_the_next_one_works():
    async with Loading() as loading:
        first, second, third = Reader("1"), Reader("2"), Reader("3")
        failure = loading.shelf.error = OSError("unreadable")
        loading.loader.want(first)
        loading.loader.want(second)
        await settle()

        loading.loader.want(third)
        await soon(loading.loader.wait_idle())

        assert first.told == second.told == [failure]
        assert third.told == ["3"]


async def test_waiting_for_idleness_waits_for_what_was_wanted_meanwhile():
    async with Loading() as loading:
        loading.shelf.gate.clear()
        loading.loader.want(Reader("a"))
        waiting = asyncio.create_task(loading.loader.wait_idle())
        await settle()
        assert not waiting.done()
        loading.loader.want(Reader("b"))

        loading.shelf.gate.set()
        await soon(waiting)

        assert loading.shelf.reads == [1, 1]


async def test_calls_for_a_flow_that_is_being_loaded_wait_for_the_one_read():
    store, clock = FaultyStore(), ManualClock()
    reads: list[int] = []
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        clock.advance(60)
        assert runtime.statistics().flows_in_memory == 0
        load = store.inner.load

        async def counted(keys: Sequence[FlowKey]) -> Any:
            reads.append(len(keys))
            await asyncio.sleep(0)
            return await load(keys)

        store.inner.load = counted

        answers = await soon(
            asyncio.gather(*(flows.update(flow_id=flow_id, expected_revision=n) for n in range(10)))
        )

        assert reads == [1]
        assert all(answer.applied for answer in answers)


async def test_thousands_of_idle_flows_wake_up_with_few_reads():
    store, clock, reads = FaultyStore(), ManualClock(), []
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        ids = await soon(asyncio.gather(*(new_flow(flows) for _ in range(1500))))
        clock.advance(60)
        await settle()
        clock.advance(60)
        assert runtime.statistics().flows_in_memory == 0
        load = store.inner.load

        async def counted(keys: Sequence[FlowKey]) -> Any:
            reads.append(len(keys))
            return await load(keys)

        store.inner.load = counted

        answers = await soon(
            asyncio.gather(*(flows.update(flow_id=i, expected_revision=0) for i in ids))
        )

        assert all(answer.applied for answer in answers)
        assert len(reads) < 10


async def test_a_caller_that_is_cancelled_while_its_flow_is_loaded_leaves_the_call_behind():
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        clock.advance(60)
        gate, load = asyncio.Event(), store.inner.load

        async def gated(keys: Sequence[FlowKey]) -> Any:
            await gate.wait()
            return await load(keys)

        store.inner.load = gated
        call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await settle()

        call.cancel()
        await settle()
        gate.set()
        await settle()

        assert call.cancelled()
        flow = await flows.get(flow_id)
        assert flow
        assert flow.revision == 1


async def test_closing_while_a_flow_is_loaded_answers_its_callers():
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        clock.advance(60)
        gate, load = asyncio.Event(), store.inner.load

        async def gated(keys: Sequence[FlowKey]) -> Any:
            await gate.wait()
            return await load(keys)

        store.inner.load = gated
        call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await settle()
        closing = asyncio.create_task(runtime.aclose())
        await settle()

        gate.set()
        await soon(closing)

        assert (await soon(call)).applied


async def test_a_failing_read_at_closing_time_does_not_keep_the_runtime_from_closing():
    store, clock = FaultyStore(), ManualClock()
    async with running(store, clock=clock) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        clock.advance(60)
        store.fail_reads("load", StoreUnusable("flows.db", "a read failed"))
        call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await asyncio.sleep(0)

        await soon(runtime.aclose())

        await asyncio.wait({call})
        assert isinstance(call.exception(), StoreUnusable)


async def test_a_loader_that_is_cancelled_leaves_nobody_waiting():
    loading = await Loading().__aenter__()
    readers = [Reader(str(n)) for n in range(3)]
    loading.shelf.gate.clear()
    loading.loader.want(readers[0])
    await settle()
    loading.loader.want(readers[1])

    await loading.__aexit__()
    loading.loader.want(readers[2])
    await settle()

    assert [[type(answer) for answer in reader.told] for reader in readers] == [[RuntimeClosed]] * 3
