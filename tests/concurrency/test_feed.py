"""The feed: every committed event, once, in order, live or from the history, and at nobody else's cost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flowstead import (
    Event,
    FlowNotFound,
    Limits,
    Runtime,
    RuntimeClosed,
    StoreUnusable,
    TaskContext,
)
from flowstead.engine.feed import Watcher
from tests.faulty_store import (
    UNKNOWN,
    FaultyStore,
    flows_of,
    holds_nothing,
    new_flow,
    running,
    settle,
    soon,
)


class Audience:
    """Somebody who watches in a task of its own and keeps what it saw."""

    def __init__(self, watcher: Watcher) -> None:
        self.seen: list[Event] = []
        self.task = asyncio.create_task(self._watch(watcher))

    async def _watch(self, watcher: Watcher) -> None:
        async with watcher as events:
            async for event in events:
                self.seen.append(event)

    @property
    def seqs(self) -> list[int]:
        return [event.seq for event in self.seen]

    @property
    def positions(self) -> list[int]:
        return [event.position for event in self.seen]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


async def update(runtime: Runtime, flow_id: str, first: int, count: int) -> None:
    flows = flows_of(runtime)
    for revision in range(first, first + count):
        assert (await soon(flows.update(flow_id=flow_id, expected_revision=revision))).applied


async def test_a_watcher_of_a_flow_sees_what_happens_from_now_on():
    async with running() as runtime:
        flows = flows_of(runtime)
        watched, other = await new_flow(flows), await new_flow(flows)
        await update(runtime, watched, 0, 2)
        audience = Audience(flows.watch(watched))
        await settle()

        await update(runtime, watched, 2, 2)
        await update(runtime, other, 0, 1)
        await flows.finish(flow_id=watched, expected_revision=4)
        await settle()

        assert audience.seqs == [4, 5, 6]
        assert [event.type for event in audience.seen] == [
            "flow.updated",
            "flow.updated",
            "flow.succeeded",
        ]
        assert audience.seen == await flows.history(watched, after_seq=3)
        await audience.leave()
        assert holds_nothing(runtime)


async def test_a_watcher_can_resume_from_any_number_without_a_gap():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await update(runtime, flow_id, 0, 5)

        audiences = [Audience(flows.watch(flow_id, after_seq=after)) for after in (0, 3, 6, 99)]
        await settle()
        await update(runtime, flow_id, 5, 3)
        await settle()

        assert [audience.seqs for audience in audiences] == [
            [1, 2, 3, 4, 5, 6, 7, 8, 9],
            [4, 5, 6, 7, 8, 9],
            [7, 8, 9],
            [],
        ]
        for audience in audiences:
            await audience.leave()


async def test_a_watcher_of_a_session_sees_its_flows_in_the_order_of_the_commits():
    async with running() as runtime:
        mine, strangers = flows_of(runtime), flows_of(runtime, "stranger")
        first = await new_flow(mine)
        audience = Audience(mine.watch())
        everybody = Audience(runtime.admin.watch())
        await settle()

        hidden = await new_flow(strangers)
        second = await new_flow(mine)
        await mine.finish(flow_id=first, expected_revision=0)
        await strangers.finish(flow_id=hidden, expected_revision=0)
        await mine.finish(flow_id=second, expected_revision=0)
        await settle()

        assert [event.flow_id for event in audience.seen] == [second, first, second]
        assert audience.positions == [3, 4, 6]
        assert everybody.positions == [2, 3, 4, 5, 6]
        await audience.leave()
        await everybody.leave()
        assert holds_nothing(runtime)


async def test_a_watcher_of_a_session_can_resume_from_a_position():
    async with running() as runtime:
        flows = flows_of(runtime)
        for _ in range(4):
            await new_flow(flows)

        audience = Audience(flows.watch(after_position=2))
        await settle()
        await new_flow(flows)
        await settle()

        assert audience.positions == [3, 4, 5]
        await audience.leave()


async def test_an_operator_can_watch_one_flow_live():
    async with running() as runtime:
        flow_id = await new_flow(flows_of(runtime))
        audience = Audience(runtime.admin.watch(flow_id))
        await settle()

        await update(runtime, flow_id, 0, 3)
        await settle()

        assert audience.seqs == [2, 3, 4]
        await audience.leave()


async def test_watching_a_flow_that_is_not_there_or_a_strangers_is_refused_on_entering():
    async with running() as runtime:
        flow_id = await new_flow(flows_of(runtime))

        for watcher in (
            flows_of(runtime).watch("nowhere"),
            flows_of(runtime, "stranger").watch(flow_id),
        ):
            with pytest.raises(FlowNotFound):
                await watcher.__aenter__()
        assert holds_nothing(runtime)


async def test_a_watcher_that_is_not_entered_says_how_to_use_it():
    async with running() as runtime:
        watcher = flows_of(runtime).watch()

        with pytest.raises(RuntimeError, match="async with"):
            await anext(watcher)


async def test_events_of_one_commit_come_in_the_order_they_happened():
    go = asyncio.Event()

    async def child(ctx: TaskContext, given: object) -> None:
        await go.wait()

    async with running(FaultyStore()) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        audience = Audience(flows.watch(flow_id))
        await settle()

        await asyncio.gather(
            flows.run_task(flow_id=flow_id, task="t", run=child),
            flows.update(flow_id=flow_id, expected_revision=0),
            flows.update(flow_id=flow_id, expected_revision=1),
        )
        go.set()
        await settle()

        assert [event.type for event in audience.seen] == [
            "task.created",
            "task.started",
            "flow.updated",
            "flow.updated",
            "task.ended",
        ]
        assert audience.seqs == [2, 3, 4, 5, 6]
        await audience.leave()


@pytest.mark.parametrize("bound", [1, 3, 10])
async def test_a_watcher_that_falls_behind_reads_on_in_the_history_and_comes_back(bound: int):
    store = FaultyStore()
    async with running(store, limits=Limits(watcher_events=bound)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        async with flows.watch(flow_id, after_seq=0) as events:
            assert (await soon(anext(events))).seq == 1
            await update(runtime, flow_id, 0, 25)
            assert len(events._live) <= bound

            seen = [(await soon(anext(events))).seq for _ in range(20)]
            await update(runtime, flow_id, 25, 10)
            seen += [(await soon(anext(events))).seq for _ in range(15)]
            await update(runtime, flow_id, 35, 1)
            seen.append((await soon(anext(events))).seq)

            assert seen == list(range(2, 38))


async def test_a_watcher_pages_through_a_long_history_while_it_grows():
    async with running(limits=Limits(watcher_events=8)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await soon(
            asyncio.gather(
                *(flows.update(flow_id=flow_id, expected_revision=r) for r in range(1000))
            )
        )
        seen: list[int] = []
        async with flows.watch(flow_id, after_seq=0) as events:
            for n in range(1050):
                if n < 1000 and n % 20 == 0:
                    await update(runtime, flow_id, 1000 + n // 20, 1)
                seen.append((await soon(anext(events))).seq)

        assert seen == list(range(1, 1051))


async def test_a_slow_watcher_delays_no_commit_and_no_other_watcher():
    async with running(limits=Limits(watcher_events=4)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        async with flows.watch(flow_id) as slow:
            quick = Audience(flows.watch(flow_id))
            await settle()

            await update(runtime, flow_id, 0, 50)
            await settle()

            assert quick.seqs == list(range(2, 52))
            assert len(slow._live) <= 4
            await quick.leave()


async def test_cancelling_the_wait_for_an_event_loses_none():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        async with flows.watch(flow_id) as events:
            for _ in range(3):
                waiting = asyncio.ensure_future(anext(events))
                await settle()
                waiting.cancel()
                await asyncio.wait({waiting})
            waiting = asyncio.ensure_future(anext(events))
            await settle()

            await update(runtime, flow_id, 0, 2)

            assert (await soon(waiting)).seq == 2
            assert (await soon(anext(events))).seq == 3


async def test_cancelling_in_the_moment_an_event_comes_loses_none():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        async with flows.watch(flow_id) as events:
            waiting = asyncio.ensure_future(anext(events))
            await settle()
            call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
            await asyncio.wait({call})
            waiting.cancel()
            await asyncio.wait({waiting})

            seen = [] if waiting.cancelled() else [waiting.result().seq]
            await update(runtime, flow_id, 1, 1)
            seen += [(await soon(anext(events))).seq for _ in range(2 - len(seen))]

            assert seen == [2, 3]


class Gated:
    """A read of a store that waits until it is let."""

    def __init__(self, store: FaultyStore, name: str) -> None:
        self.gate = asyncio.Event()
        read = getattr(store.inner, name)

        async def gated(*args: Any, **kwargs: Any) -> Any:
            found = await read(*args, **kwargs)
            await self.gate.wait()
            return found

        setattr(store.inner, name, gated)


async def test_cancelling_while_the_history_is_read_loses_none():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await update(runtime, flow_id, 0, 2)
        async with flows.watch(flow_id, after_seq=0) as events:
            read = Gated(store, "history")
            waiting = asyncio.ensure_future(anext(events))
            await settle()
            await update(runtime, flow_id, 2, 1)
            waiting.cancel()
            await asyncio.wait({waiting})
            read.gate.set()

            assert [(await soon(anext(events))).seq for _ in range(4)] == [1, 2, 3, 4]


async def test_what_is_committed_while_the_history_is_read_comes_once_and_in_order():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await update(runtime, flow_id, 0, 2)
        read = Gated(store, "history")
        audience = Audience(flows.watch(flow_id, after_seq=0))
        await settle()

        await update(runtime, flow_id, 2, 3)
        read.gate.set()
        await settle()

        assert audience.seqs == [1, 2, 3, 4, 5, 6]
        await audience.leave()


@pytest.mark.parametrize("whole_session", [True, False])
async def test_a_watcher_that_is_cancelled_on_entering_is_not_kept(whole_session: bool):
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        Gated(store, "last_position" if whole_session else "last_seq")
        audience = Audience(flows.watch() if whole_session else flows.watch(flow_id))
        await settle()

        await audience.leave()

        assert audience.task.cancelled()
        assert holds_nothing(runtime)


async def test_a_watcher_whose_entering_fails_is_not_kept():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.fail_reads("last_seq", StoreUnusable("flows.db", "a read failed"))

        with pytest.raises(StoreUnusable):
            await flows.watch(flow_id).__aenter__()

        assert holds_nothing(runtime)


async def test_a_watcher_whose_read_failed_can_go_on():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        async with flows.watch(flow_id, after_seq=0) as events:
            store.fail_reads("history", StoreUnusable("flows.db", "a read failed"))
            with pytest.raises(StoreUnusable):
                await soon(anext(events))

            assert (await soon(anext(events))).seq == 1


async def test_closing_the_runtime_ends_a_watcher_once_it_has_seen_everything():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        audience = Audience(flows.watch(flow_id, after_seq=0))
        await settle()
        store.hold()
        call = asyncio.create_task(flows.update(flow_id=flow_id, expected_revision=0))
        await store.wait_held()
        closing = asyncio.create_task(runtime.aclose())
        await settle()
        store.release()
        await soon(closing)

        await soon(asyncio.wait({audience.task}))

        assert (await call).applied
        assert audience.task.exception() is None
        assert audience.seqs == [1, 2]


async def test_closing_the_runtime_tells_a_watcher_that_is_behind_where_to_resume():
    async with running(limits=Limits(watcher_events=2)) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        async with flows.watch(flow_id, after_seq=0) as events:
            assert (await soon(anext(events))).seq == 1
            await update(runtime, flow_id, 0, 10)
            await runtime.aclose()

            with pytest.raises(RuntimeClosed, match="Resume after 1"):
                await soon(anext(events))


async def test_a_closed_runtime_gives_no_watcher():
    async with running() as runtime:
        flows = flows_of(runtime)
        made_before = flows.watch()
        await runtime.aclose()

        with pytest.raises(RuntimeClosed):
            flows.watch()
        with pytest.raises(RuntimeClosed):
            await made_before.__aenter__()


async def test_a_watcher_that_was_left_sees_nothing_more():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        async with flows.watch(flow_id, after_seq=0) as events:
            assert (await soon(anext(events))).seq == 1
        await update(runtime, flow_id, 0, 3)

        with pytest.raises(StopAsyncIteration):
            await soon(anext(events))
        assert holds_nothing(runtime)


async def test_events_written_by_a_commit_of_unknown_outcome_are_not_missed_by_a_session_watcher():
    store = FaultyStore()
    async with running(store) as runtime:
        flows = flows_of(runtime)
        doubtful, other = await new_flow(flows), await new_flow(flows)
        audience = Audience(flows.watch(after_position=0))
        await settle()
        store.fail_commits(UNKNOWN, written=True)

        unknown = await soon(flows.update(flow_id=doubtful, expected_revision=0))
        await update(runtime, other, 0, 1)
        await settle()
        assert unknown.code == "outcome_unknown"
        await update(runtime, doubtful, 1, 1)
        await settle()

        assert audience.positions == [1, 2, 3, 4, 5]
        await audience.leave()


async def test_many_watchers_see_the_same():
    async with running() as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        audiences = [Audience(flows.watch(flow_id)) for _ in range(100)]
        await settle()

        await update(runtime, flow_id, 0, 5)
        await settle()

        assert all(audience.seqs == [2, 3, 4, 5, 6] for audience in audiences)
        for audience in audiences:
            await audience.leave()
        assert holds_nothing(runtime)
