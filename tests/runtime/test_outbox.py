"""The outbox, by its owner's eyes: who is told of what, once, and what becomes visible when nobody can be told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowstead import (
    Fatal,
    FlowContext,
    Limits,
    Nested,
    Registry,
    Retry,
    Runtime,
    SessionFlows,
    TaskContext,
    open_runtime,
)
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.testing import ManualClock, RecordingNotifier
from tests.faults.support import listening
from tests.faulty_store import (
    NOT_WRITTEN,
    UNKNOWN,
    FaultyStore,
    flows_of,
    new_flow,
    running,
    settle,
    soon,
)
from tests.invariants import check_all
from tests.runtime.support import OWNER, STRANGER, Where, bound, make

ONCE_A_SECOND = Retry(max_attempts=100, initial=1.0, factor=1.0, jitter=0.0)
ORIGIN = {"channel": "chat", "thread": 7}


class Scene:
    """A runtime, a channel, and every way in which a flow can end."""

    def __init__(self, runtime: Runtime, clock: ManualClock, policy: str) -> None:
        self.clock, self.policy = clock, policy
        self.flows: SessionFlows = bound(runtime, requester_origin=ORIGIN)

    async def make(self, **given: Any) -> str:
        return (await make(self.flows, notify_policy=self.policy, **given)).flow_id

    async def revision(self, flow_id: str) -> int:
        flow = await self.flows.get(flow_id)
        assert flow is not None
        return flow.revision

    async def finished(self) -> str:
        flow_id = await self.make()
        assert (await self.flows.finish(flow_id=flow_id, expected_revision=0)).applied
        return flow_id

    async def failed(self) -> str:
        flow_id = await self.make()
        said = self.flows.fail(flow_id=flow_id, expected_revision=0, blocked_summary="no luck")
        assert (await said).applied
        return flow_id

    async def cancelled(self) -> str:
        flow_id = await self.make()
        assert (await self.flows.cancel(flow_id=flow_id)).cancelled
        return flow_id

    async def cancelled_with_its_children(self) -> str:
        flow_id = await self.make(status="running")
        await self.flows.run_task(flow_id=flow_id, task="t", run=forever)
        await self.flows.run_task(flow_id=flow_id, task="t", run=forever)
        assert (await self.flows.cancel(flow_id=flow_id)).cancelled
        return flow_id

    async def asked_to_cancel(self) -> str:
        """Ends when the last child does."""
        flow_id = await self.make(status="running")
        made = await self.flows.run_task(flow_id=flow_id, task="t", runtime="acp", status="running")
        asked = self.flows.request_cancel(flow_id=flow_id, expected_revision=0)
        assert (await asked).applied
        await self.flows.complete_task(made.unwrap().task_id)
        return flow_id

    async def asked_to_cancel_and_left_alone(self) -> str:
        """Ends when its grace is over."""
        flow_id = await self.make()
        asked = self.flows.request_cancel(flow_id=flow_id, expected_revision=0)
        assert (await asked).applied
        await self.later(61)
        return flow_id

    async def controller_returned(self) -> str:
        return await self.make(controller_id="returns")

    async def controller_raised(self) -> str:
        return await self.make(controller_id="raises")

    async def controller_finished(self) -> str:
        return await self.make(controller_id="finishes")

    async def controller_failed(self) -> str:
        return await self.make(controller_id="fails")

    async def controller_cancelled(self) -> str:
        flow_id = await self.make(controller_id="sleeps")
        assert (await self.flows.cancel(flow_id=flow_id)).cancelled
        return flow_id

    async def wait_of_its_own_ran_out(self) -> str:
        flow_id = await self.make()
        wait = {"kind": "reply", "deadlineAt": self.clock.now() + 1000}
        said = self.flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json=wait)
        assert (await said).applied
        await self.later(2)
        return flow_id

    async def wait_of_its_controller_ran_out(self) -> str:
        flow_id = await self.make(controller_id="waits a second")
        await until(lambda: self.flows.list_waits(flow_id))
        await self.later(2)
        return flow_id

    async def mirrored_task_completed(self) -> str:
        made = await self._detached(runtime="acp", status="running")
        await self.flows.complete_task(made.task_id)
        return made.flow_id

    async def mirrored_task_timed_out(self) -> str:
        made = await self._detached(runtime="acp", status="running")
        await self.flows.fail_task(made.task_id, error="too late", status="timed_out")
        return made.flow_id

    async def detached_child_returned(self) -> str:
        return (await self._detached(run=works)).flow_id

    async def detached_child_raised(self) -> str:
        return (await self._detached(run=breaks)).flow_id

    async def flow_with_a_nested_one_ended(self) -> str:
        return await self.make(controller_id="nests")

    async def retried_flow_ended(self) -> str:
        first = await self.failed()
        again = (await self.flows.retry_flow(first)).unwrap()
        await self.flows.finish(flow_id=again.flow_id, expected_revision=again.revision)
        return again.flow_id

    async def _detached(self, **given: Any) -> Any:
        made = await self.flows.spawn_detached(task="t", notify_policy=self.policy, **given)
        return made.unwrap()

    async def later(self, seconds: float) -> None:
        """Let time pass a little at a time, as timers that are armed in another thread's wake need it."""
        for _ in range(round(seconds)):
            self.clock.advance(1)
            await self.flows.list_waits()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait for what the thread of a file has to bring about first."""
    with anyio.fail_after(60):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def was_tried(flows: SessionFlows) -> bool:
    return all(update.attempt for update in await flows.list_updates())


async def is_quiet(flows: SessionFlows) -> bool:
    return not await flows.list_updates(status="pending")


async def is_quiet_later(flows: SessionFlows, clock: ManualClock) -> bool:
    clock.advance(10)
    return await is_quiet(flows)


async def stands(flows: SessionFlows, runs: list[int], life: int) -> bool:
    """Whether the controller has been run in this life, and waits."""
    return len(runs) > life and bool(await flows.list_waits())


async def forever(_: TaskContext, __: Any) -> None:
    await asyncio.get_running_loop().create_future()


async def works(_: TaskContext, __: Any) -> int:
    return 1


async def breaks(_: TaskContext, __: Any) -> None:
    raise ValueError("broken")


def registry() -> Registry:
    registry = Registry()

    @registry.controller("returns")
    async def returns(flow: FlowContext) -> None:
        await flow.update(current_step="on its way")

    @registry.controller("raises")
    async def raises(flow: FlowContext) -> None:
        raise LookupError("nothing there")

    @registry.controller("finishes")
    async def finishes(flow: FlowContext) -> None:
        await flow.finish()

    @registry.controller("fails")
    async def fails(flow: FlowContext) -> None:
        await flow.fail(blocked_summary="gives up")

    @registry.controller("sleeps")
    async def sleeps(flow: FlowContext) -> None:
        await flow.sleep("long", 3600)

    @registry.controller("waits a second")
    async def waits(flow: FlowContext) -> None:
        await flow.wait("answer", timeout=1)

    @registry.controller("nests")
    async def nests(flow: FlowContext) -> None:
        await flow.run(Nested("returns"))

    return registry


ENDS: dict[str, tuple[Callable[[Scene], Awaitable[str]], str]] = {
    "finish": (Scene.finished, "succeeded"),
    "fail": (Scene.failed, "failed"),
    "cancel": (Scene.cancelled, "cancelled"),
    "cancel with children": (Scene.cancelled_with_its_children, "cancelled"),
    "request_cancel": (Scene.asked_to_cancel, "cancelled"),
    "request_cancel, left alone": (Scene.asked_to_cancel_and_left_alone, "cancelled"),
    "controller returns": (Scene.controller_returned, "succeeded"),
    "controller raises": (Scene.controller_raised, "failed"),
    "controller finishes": (Scene.controller_finished, "succeeded"),
    "controller fails": (Scene.controller_failed, "failed"),
    "controller is cancelled": (Scene.controller_cancelled, "cancelled"),
    "own wait runs out": (Scene.wait_of_its_own_ran_out, "failed"),
    "controller's wait runs out": (Scene.wait_of_its_controller_ran_out, "failed"),
    "mirrored task completes": (Scene.mirrored_task_completed, "succeeded"),
    "mirrored task times out": (Scene.mirrored_task_timed_out, "failed"),
    "detached child returns": (Scene.detached_child_returned, "succeeded"),
    "detached child raises": (Scene.detached_child_raised, "failed"),
    "nested flow": (Scene.flow_with_a_nested_one_ended, "succeeded"),
    "retried flow": (Scene.retried_flow_ended, "succeeded"),
}
"""Every way to end, and the status it ends with."""


class Watched(FaultyStore):
    """A store that looks at each commit on its way: what ends a flow has to tell of it."""

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.ends = 0
        self.silent = silent
        self._ended: set[int] = set()

    async def commit(self, writes: Sequence[FlowWrite]) -> int:
        position = await super().commit(writes)
        for write in writes:
            self._look_at(write)
        return position

    def _look_at(self, write: FlowWrite) -> None:
        done = [row for row in write.updates if row.fresh and row.slot == "done"]
        flow = None if write.flow is None else codec.read_stored_flow(write.flow.doc.encode())
        if flow is None or flow.ended_at is None or flow.key in self._ended:
            assert not done, "told of an end that is none"
            return
        self._ended.add(flow.key)
        self.ends += 1
        assert len(done) == (0 if self.silent or flow.notify_policy == "silent" else 1)


# ---- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["done_only", "state_changes", "silent"])
@pytest.mark.parametrize("way", ENDS)
async def test_a_flow_that_ends_tells_of_it_once_by_its_policy(
    clock: ManualClock, way: str, policy: str
):
    store, notifier = Watched(), RecordingNotifier()
    async with running(store, clock=clock, registry=registry(), notifier=notifier) as runtime:
        scene = Scene(runtime, clock, policy)
        end, status = ENDS[way]
        flow_id = await soon(end(scene))
        flow = await soon(scene.flows.result(flow_id))
        await settle()
        rows = await soon(scene.flows.list_updates(flow_id))

        assert flow.status == status
        assert store.ends, "vacuous: nothing ended"
        heard = [u for u in notifier.updates if u.flow_id == flow_id]
        if policy == "silent":
            assert not rows
            assert not notifier.updates
            return
        *before, done = heard
        assert done.kind == "done"
        assert [u.kind for u in before] == ["progress"] * len(before)
        assert policy == "state_changes" or not before
        assert [u.kind for u in rows].count("done") == 1
        assert len(rows) <= (2 if policy == "state_changes" else 1)
        assert (done.flow_status, done.goal, done.revision) == (status, flow.goal, flow.revision)
        assert (done.owner_key, done.requester_origin) == (OWNER, ORIGIN)
        assert flow.goal in done.text
        assert done.idempotency_key not in [u.idempotency_key for u in before]


@pytest.mark.parametrize("way", ENDS)
async def test_without_a_notifier_nothing_is_written_and_nobody_is_told_later(
    clock: ManualClock, way: str
):
    store, notifier = Watched(silent=True), RecordingNotifier()
    async with running(store, clock=clock, registry=registry()) as runtime:
        scene = Scene(runtime, clock, "state_changes")
        flow_id = await soon(ENDS[way][0](scene))
        await soon(scene.flows.result(flow_id))
        await settle()
        assert store.ends, "vacuous: nothing ended"
        assert await soon(scene.flows.list_updates()) == []

    async with running(store, clock=clock, notifier=notifier) as runtime:
        clock.advance(3600)
        await settle()

        assert await soon(bound(runtime).list_updates()) == []
        assert notifier.attempts == 0


async def test_a_nested_flow_tells_nobody_the_one_above_does(clock: ManualClock):
    notifier = RecordingNotifier()
    async with running(clock=clock, registry=registry(), notifier=notifier) as runtime:
        scene = Scene(runtime, clock, "state_changes")
        flow_id = await soon(scene.flow_with_a_nested_one_ended())
        await soon(scene.flows.result(flow_id))
        await settle()

        [child] = await soon(scene.flows.list_tasks(flow_id))
        assert child.child_flow_id is not None
        assert {update.flow_id for update in notifier.updates} == {flow_id}
        assert await soon(scene.flows.list_updates(child.child_flow_id)) == []


# ---- one transaction ------------------------------------------------------------------------------


async def test_a_disk_that_fails_the_end_leaves_neither_the_end_nor_word_of_it(clock: ManualClock):
    store, notifier = Watched(), RecordingNotifier()
    async with running(store, clock=clock, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.fail_commits(NOT_WRITTEN)

        refused = await soon(flows.finish(flow_id=flow_id, expected_revision=0))
        await settle()

        assert (refused.applied, refused.code) == (False, "persist_failed")
        assert await soon(flows.list_updates()) == []
        assert notifier.attempts == 0
        assert (await soon(flows.finish(flow_id=flow_id, expected_revision=0))).applied
        await settle()
        assert [update.kind for update in notifier.updates] == ["done"]


@pytest.mark.parametrize("written", [True, False])
async def test_an_end_that_nobody_could_vouch_for_is_told_of_exactly_if_it_was_written(
    clock: ManualClock, written: bool
):
    store, notifier = FaultyStore(), RecordingNotifier()
    async with running(store, clock=clock, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        store.fail_commits(UNKNOWN, written=written)

        unknown = await soon(flows.finish(flow_id=flow_id, expected_revision=0))
        for _ in range(3):
            clock.advance(1)
            await settle()

        assert unknown.code == "outcome_unknown"
        flow = await soon(flows.get(flow_id))
        assert flow is not None
        assert (flow.ended_at is not None) is written
        assert [update.kind for update in notifier.updates] == ["done"] * written


# ---- restarts -------------------------------------------------------------------------------------


async def test_what_is_pending_waits_for_a_process_that_has_a_notifier(
    store: Where, clock: ManualClock
):
    down, well = RecordingNotifier(), RecordingNotifier()
    down.go_down()
    async with open_runtime(store, clock=clock, notifier=down) as runtime:
        flow = await make(bound(runtime))
        await bound(runtime).finish(flow_id=flow.flow_id, expected_revision=0)
        await soon(down.wait_for_attempts(1))
        await until(lambda: was_tried(bound(runtime)))
        pending = await bound(runtime).list_updates()

    clock.advance(60)
    async with open_runtime(store, clock=clock) as runtime:
        assert await bound(runtime).list_updates() == pending
        clock.advance(60)
        assert await bound(runtime).list_updates() == pending
    async with open_runtime(store, clock=clock, notifier=well) as runtime:
        [arrived] = await soon(well.wait_for(1))
        await until(lambda: is_quiet(bound(runtime)))

        assert arrived.idempotency_key == pending[0].idempotency_key
        assert (pending[0].attempt, arrived.attempt) == (1, 2)
        assert arrived.text == "triage is done."
    async with open_runtime(store, clock=clock, notifier=well):
        clock.advance(3600)
        await settle()
    assert len(well.updates) == 1


async def test_an_update_that_is_due_later_goes_out_then_also_after_a_restart(
    store: Where, clock: ManualClock
):
    channel = RecordingNotifier()
    policy = Retry(max_attempts=5, initial=600.0, max_delay=600.0, jitter=0.0)
    channel.fail_next()
    async with open_runtime(store, clock=clock, notifier=channel, deliveries=policy) as runtime:
        flow = await make(bound(runtime))
        await bound(runtime).finish(flow_id=flow.flow_id, expected_revision=0)
        await until(lambda: was_tried(bound(runtime)))
    clock.advance(300)
    async with open_runtime(store, clock=clock, notifier=channel, deliveries=policy) as runtime:
        await settle()
        # Opening a file takes a thread's time, and looking for what is due after it.
        assert [u.status for u in await bound(runtime).list_updates()] == ["pending"]
        assert channel.attempts == 1
        # How far the postman has read is a matter of threads: let more time pass until it has seen it.
        await until(lambda: is_quiet_later(bound(runtime), clock))

        assert channel.attempts == 2


# ---- word from the controller ---------------------------------------------------------------------


async def test_what_a_controller_says_is_said_once_however_often_it_is_run(
    store: Where, clock: ManualClock
):
    notifier, runs = RecordingNotifier(), []
    registry = Registry()

    @registry.controller("talks")
    async def talks(flow: FlowContext) -> None:
        runs.append(1)
        await flow.notify(f"hello number {len(runs)}", {"n": 1})
        await flow.notify("again")
        await flow.notify("named", name="a name")
        await flow.wait("go on")

    flow_id = ""
    for life in range(3):
        async with open_runtime(
            store, clock=clock, registry=registry, notifier=notifier
        ) as runtime:
            flows = bound(runtime)
            if not flow_id:
                flow_id = (await make(flows, controller_id="talks")).flow_id
            # One that was cut off where it stood is entered again when it would have been parked.
            clock.advance(10)
            await until(partial(stands, flows, runs, life))
            if life == 2:
                await flows.signal(flow_id=flow_id, name="go on")
                await soon(flows.result(flow_id))
            await until(partial(is_quiet, flows))

    assert len(runs) == 3
    assert [(u.kind, u.text, u.data) for u in notifier.updates] == [
        ("notice", "hello number 1", {"n": 1}),
        ("notice", "again", None),
        ("notice", "named", None),
        ("done", "triage is done.", None),
    ]


@pytest.mark.parametrize("policy", ["done_only", "state_changes", "silent"])
async def test_notices_go_out_whatever_the_policy_unless_that_is_silent(
    clock: ManualClock, policy: str
):
    notifier, registry = RecordingNotifier(), Registry()

    @registry.controller("talks")
    async def talks(flow: FlowContext) -> None:
        await flow.notify("word")
        await flow.later("more")

    async with running(clock=clock, registry=registry, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "talks", notify_policy=policy)
        await soon(flows.result(flow_id))
        clock.advance(24 * 3600)
        await settle()

        told = [str(u.kind) for u in notifier.updates if u.kind in ("notice", "digest")]
        assert told == ([] if policy == "silent" else ["notice", "digest"])
        assert [t.status for t in await soon(flows.list_tasks(flow_id))] == ["succeeded"] * 2


async def test_a_notice_whose_commit_fails_is_said_once_when_the_controller_is_run_again(
    clock: ManualClock,
):
    store, notifier, registry = FaultyStore(), RecordingNotifier(), Registry()

    @registry.controller("talks")
    async def talks(flow: FlowContext) -> None:
        await flow.run(works)
        if not store.batches[10:] and not failed:
            failed.append(1)
            store.fail_commits(NOT_WRITTEN)
        await flow.notify("word")

    failed: list[int] = []
    async with running(store, clock=clock, registry=registry, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "talks")
        for _ in range(5):
            await settle()
            clock.advance(1)
        await soon(flows.result(flow_id))
        await settle()

        assert failed, "vacuous: nothing failed"
        assert [update.text for update in notifier.updates] == ["word", "test is done."]


async def test_word_that_cannot_be_kept_is_refused_and_nothing_is_said(clock: ManualClock):
    notifier, registry, raised = RecordingNotifier(), Registry(), []

    @registry.controller("talks")
    async def talks(flow: FlowContext) -> None:
        for text, data in (("", None), ("x" * 5000, None), ("odd", {1, 2}), ("nan", float("nan"))):
            try:
                await flow.notify(text, data)
            except (ValueError, TypeError, Exception) as error:
                raised.append(type(error).__name__)

    async with running(clock=clock, registry=registry, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows, "talks")
        await soon(flows.result(flow_id))
        await settle()

        assert raised == ["ValueError", "ValueError", "InvalidState", "InvalidState"]
        assert [update.kind for update in notifier.updates] == ["done"]
        assert await soon(flows.list_tasks(flow_id)) == []


# ---- giving up ------------------------------------------------------------------------------------


async def test_what_is_given_up_can_be_seen_everywhere_also_of_a_flow_long_out_of_memory(
    clock: ManualClock,
):
    notifier = RecordingNotifier()
    notifier.go_down()
    policy = Retry(max_attempts=4, initial=100.0, max_delay=100.0, jitter=0.0)
    options: dict[str, Any] = {"clock": clock, "notifier": notifier, "deliveries": policy}
    with listening() as log:
        async with running(limits=Limits(idle_seconds=1), **options) as runtime:
            flows = flows_of(runtime)
            flow = await soon(
                flows.create_managed(
                    controller_id="nobody", goal="SECRET goal", state_json="SECRET"
                )
            )
            await soon(flows.finish(flow_id=flow.flow_id, expected_revision=0))
            for _ in range(29):
                clock.advance(10)
                await settle()
            assert notifier.attempts == 3
            assert runtime.statistics().flows_in_memory == 0
            for _ in range(2):
                clock.advance(10)
                await settle()

            [failed] = await soon(flows.list_updates(status="delivery_failed"))
            assert (failed.flow_id, failed.kind, failed.attempt) == (flow.flow_id, "done", 4)
            assert failed.failure == "ConnectionError: The channel is down."
            assert await soon(flows.list_updates(flow.flow_id, status="pending")) == []
            assert runtime.statistics().deliveries_failed == 1
            last = (await soon(flows.history(flow.flow_id)))[-1]
            assert (last.type, last.revision) == ("update.failed", 1)
            assert last.changed == {"slot": "done", "reason": failed.failure}
            ended = await soon(flows.get(flow.flow_id))
            assert ended is not None
            assert (ended.status, ended.revision) == ("succeeded", 1)

    [line] = [line for line in log if "update.delivery_failed" in line]
    assert line.startswith("ERROR")
    assert flow.flow_id in line
    assert failed.idempotency_key in line
    assert not [line for line in log if "SECRET" in line]


async def test_what_was_given_up_stays_so_after_a_restart(clock: ManualClock):
    store, notifier = FaultyStore(), RecordingNotifier()
    notifier.fail_next(error=Fatal("no such user"))
    async with running(store, clock=clock, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        await soon(flows.finish(flow_id=flow_id, expected_revision=0))
        await settle()
        before = await soon(flows.list_updates()), await soon(flows.history(flow_id))
    async with running(store, clock=clock, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        clock.advance(3600)
        await settle()

        assert (await soon(flows.list_updates()), await soon(flows.history(flow_id))) == before
        assert [update.status for update in before[0]] == ["delivery_failed"]
        assert notifier.attempts == 1


# ---- looking --------------------------------------------------------------------------------------


async def test_an_owner_sees_his_own_updates_and_nobody_else_s(store: Where, clock: ManualClock):
    notifier = RecordingNotifier()
    async with open_runtime(store, clock=clock, notifier=notifier) as runtime:
        mine, other = bound(runtime), bound(runtime, STRANGER)
        ids = []
        for flows in (mine, mine, other):
            flow = await make(flows)
            await flows.finish(flow_id=flow.flow_id, expected_revision=0)
            ids.append(flow.flow_id)

        assert [u.flow_id for u in await mine.list_updates()] == ids[:2]
        assert [u.flow_id for u in await mine.list_updates(limit=1)] == ids[:1]
        assert [u.flow_id for u in await mine.list_updates(ids[1])] == [ids[1]]
        assert await mine.list_updates(ids[2]) == []
        assert await mine.list_updates("no such flow") == []
        assert [u.flow_id for u in await other.list_updates()] == [ids[2]]
        assert await mine.list_updates(status=["superseded", "digested"]) == []
        with pytest.raises(ValueError, match="status"):
            await mine.list_updates(status="lost")


# ---- reminders ------------------------------------------------------------------------------------


async def test_a_wait_that_is_set_again_with_the_same_reminder_harms_nobody(clock: ManualClock):
    store, notifier = FaultyStore(), RecordingNotifier()
    async with running(store, clock=clock, notifier=notifier) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        wait = {"kind": "reply", "remindAt": clock.now() + 1000}
        await soon(flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json=wait))
        clock.advance(2)
        await settle()
        assert [update.kind for update in notifier.updates] == ["reminder"]

        flow = await soon(flows.get(flow_id))
        assert flow is not None
        again = flows.set_waiting(flow_id=flow_id, expected_revision=flow.revision, wait_json=wait)
        assert (await soon(again)).applied
        for _ in range(3):
            clock.advance(2)
            await settle()

        assert runtime.statistics().failed_writes == 0


def asks(after: Callable[[FlowContext], Awaitable[None]]) -> Registry:
    registry = Registry()

    @registry.controller("asks")
    async def controller(flow: FlowContext) -> None:
        await flow.notify("first")
        await flow.wait("answer", timeout=100, remind=[90], prompt="Well?", kind="k")
        await after(flow)

    return registry


async def stay(flow: FlowContext) -> None:
    await flow.sleep("long", 10**6)


async def leave(flow: FlowContext) -> None: ...


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("after", [stay, leave])
async def test_a_reminder_put_off_by_the_channel_is_told_while_somebody_waits_and_no_longer(
    clock: ManualClock, after: Callable[[FlowContext], Awaitable[None]], restart: bool
):
    store, notifier = FaultyStore(), RecordingNotifier()
    given: dict[str, Any] = {"clock": clock, "notifier": notifier, "deliveries": ONCE_A_SECOND}
    async with running(store, registry=asks(after), **given) as runtime:
        flows = flows_of(runtime)
        answered = await new_flow(flows, "asks")
        clock.advance(1)
        await settle()
        open_one = await soon(flows.create_managed(controller_id="asks", goal="open"))
        await settle()
        assert [update.text for update in notifier.updates] == ["first"] * 2
        notifier.go_down()
        for _ in range(12):
            clock.advance(1)
            await settle()
        assert notifier.attempts > 3, "vacuous: nobody was reminded"
        report = await soon(flows.signal(flow_id=answered, name="answer"))
        assert report.matched == 1
        await settle()
        if not restart:
            notifier.come_up()
            clock.advance(1)
            await settle()
    notifier.come_up()
    async with running(store, registry=asks(after), **given) as runtime:
        clock.advance(1)
        await settle()

        told = {update.flow_id: update for update in notifier.updates if update.kind == "reminder"}
        assert list(told) == [open_one.flow_id]
        assert told[open_one.flow_id].text == "Reminder: Well?"
        rows = await soon(flows_of(runtime).list_updates(answered))
        status = {str(update.kind): update.status for update in rows}
        assert (status["notice"], status["reminder"]) == ("delivered", "superseded")
        assert ("done" in status) == (after is leave)
        assert not await soon(flows_of(runtime).list_updates(status="pending"))


@pytest.mark.parametrize("how", ["resumed", "set again", "ended"])
async def test_a_reminder_of_a_flow_s_own_wait_is_not_told_of_another(clock: ManualClock, how: str):
    notifier = RecordingNotifier()
    async with running(
        clock=clock, registry=registry(), notifier=notifier, deliveries=ONCE_A_SECOND
    ) as runtime:
        flows = flows_of(runtime)
        flow_id = await new_flow(flows)
        notifier.go_down()
        wait = {"kind": "k", "prompt": "Well?", "remindAt": clock.now() + 1000}
        await soon(flows.set_waiting(flow_id=flow_id, expected_revision=0, wait_json=wait))
        for _ in range(3):
            clock.advance(1)
            await settle()
        assert notifier.attempts > 1, "vacuous: nobody was reminded"
        flow = await soon(flows.get(flow_id))
        assert flow is not None
        seen = {"flow_id": flow_id, "expected_revision": flow.revision}
        if how == "ended":
            await soon(flows.finish(**seen))
        elif how == "resumed":
            await soon(flows.resume(**seen))
        else:
            await soon(flows.set_waiting(**seen, wait_json=wait | {"prompt": "And this?"}))
        notifier.come_up()
        for _ in range(3):
            clock.advance(1)
            await settle()

        texts = [update.text for update in notifier.updates]
        assert "Reminder: Well?" not in texts
        assert texts == {"ended": ["test is done."], "set again": ["Reminder: And this?"]}.get(
            how, []
        )


# ---- files ----------------------------------------------------------------------------------------


async def test_a_file_with_updates_in_all_standings_is_sound(db: Path, clock: ManualClock):
    notifier, registry = RecordingNotifier(), Registry()

    @registry.controller("talks")
    async def talks(flow: FlowContext) -> None:
        await flow.update(current_step="first")
        await flow.notify("word")
        await flow.later("more")

    notifier.fail_next(error=Fatal("no"))
    async with open_runtime(db, clock=clock, registry=registry, notifier=notifier) as runtime:
        flows = bound(runtime)
        for policy in ("done_only", "state_changes", "silent"):
            flow = await make(flows, controller_id="talks", notify_policy=policy)
            await soon(flows.result(flow.flow_id))
        await soon(notifier.wait_for(3))

    check_all(db)
