"""Faults planted in the runtime, each of which the worlds have to find: one that finds nothing proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from flowstead import Step, Succeeded, controller
from flowstead.engine.actor import Actor
from flowstead.engine.engine import Engine
from flowstead.engine.feed import Watcher
from flowstead.engine.supervisor import Supervisor
from flowstead.engine.timers import Timers
from flowstead.model.effect import StartTask
from flowstead.rules import decide, decide_tasks, endings, follow, recovery
from flowstead.rules.turn import Turn
from flowstead.scoped import ScopedFlows
from flowstead.step import Completed
from flowstead.testing.disk import Disk, SimulatedStore
from tests.simulation import programs

MOST_SEEDS = 60

Plant = Callable[[pytest.MonkeyPatch], object]


def answer_before_the_commit(plant: pytest.MonkeyPatch) -> None:
    write = Actor._write

    def hasty(self: Actor, draft: Any) -> Any:
        for envelope, reply in draft.answers:
            envelope.answer(reply)
        return write(self, draft)

    plant.setattr(Actor, "_write", hasty)


def take_no_notice_of_revisions(plant: pytest.MonkeyPatch) -> None:
    admit = decide._admit
    plant.setattr(decide, "_admit", lambda view, operation, expected: admit(view, operation, None))


def answer_conflicts_with_a_flow_of_yesterday(plant: pytest.MonkeyPatch) -> None:
    settle = Actor._settle

    def stale(self: Actor, answers: Any, effects: Any) -> None:
        remembered = self._around.flow_ends.__dict__.setdefault("yesterday", {})
        before = remembered.get(self.key)
        for place, (envelope, reply) in enumerate(answers):
            if reply.refusal is not None and reply.refusal.code == "revision_conflict" and before:
                answers[place] = (envelope, msgspec.structs.replace(reply, doc=before))
        remembered.setdefault(self.key, self._doc)
        settle(self, answers, effects)

    plant.setattr(Actor, "_settle", stale)


def keep_the_draft_of_a_failed_commit(plant: pytest.MonkeyPatch) -> None:
    def failed(self: Actor, error: Any) -> None:
        draft = self._draft
        assert draft is not None
        self._flow, self._doc, self._seq = draft.flow, draft.doc, draft.seq
        self._draft = None
        for envelope, reply in draft.answers:
            envelope.answer(reply)
        self._go_on()

    plant.setattr(Actor, "failed", failed)


def forget_the_intent_when_work_is_resumed(plant: pytest.MonkeyPatch) -> None:
    changed = decide._changed

    def forgetful(flow: Any, now: int, event: Any, patch: Any, **fields: Any) -> Any:
        if event == "flow.updated":
            fields["cancel_requested_at"] = None
        return changed(flow, now, event, patch, **fields)

    plant.setattr(decide, "_changed", forgetful)


def start_children_after_a_cancel_was_requested(plant: pytest.MonkeyPatch) -> None:
    refusal = decide_tasks.lifecycle.refusal

    def lenient(flow: Any, operation: Any) -> Any:
        found = refusal(flow, operation)
        is_intent = found is not None and found.code == "cancel_requested"
        return None if is_intent and operation == "run_task" else found

    plant.setattr(decide_tasks.lifecycle, "refusal", lenient)


def start_code_twice(plant: pytest.MonkeyPatch) -> None:
    effects = Turn.effects

    def twice(self: Turn) -> Any:
        found = effects(self)
        return (*found, *(one for one in found if isinstance(one, StartTask)))

    start = Supervisor._start_task

    def always(self: Supervisor, key: Any, task: Any) -> None:
        self._children.pop(task.task_id, None)
        start(self, key, task)

    plant.setattr(Turn, "effects", twice)
    plant.setattr(Supervisor, "_start_task", always)


def start_code_before_the_commit(plant: pytest.MonkeyPatch) -> None:
    write = Actor._write

    def hasty(self: Actor, draft: Any) -> Any:
        self._around.code.carry_out(self.key, draft.effects)
        return write(self, draft)

    plant.setattr(Actor, "_write", hasty)


def let_a_late_report_speak_for_a_newer_attempt(plant: pytest.MonkeyPatch) -> None:
    def restart(task: Any, now: int) -> Any:
        return endings.change_task(task, now, endings.EventType.TASK_STARTED, attempt=task.attempt)

    plant.setattr(endings, "restart", restart)


def end_cancels_too_early(plant: pytest.MonkeyPatch) -> None:
    def conclude(view: Any, command: Any, *, child_ended: bool) -> Any:
        after, fact = follow.change_flow(
            view.flow, view.now, follow.EventType.FLOW_CANCELLED,
            status=follow.FlowStatus.CANCELLED, wait_json=UNSET, ended_at=view.now,
        )  # fmt: skip
        return follow.Decision(flow=after, facts=(fact,))

    plant.setattr(follow, "conclude_cancel", conclude)


def never_end_what_was_asked_to_cancel(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(follow, "conclude_cancel", lambda view, command, **_: follow.NOTHING)


def lose_wakeups_of_retries(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Timers, "_tick_due", lambda self: self._heap.clear())


def restart_nothing(plant: pytest.MonkeyPatch) -> None:
    fate = recovery.Fate.KEEP
    plant.setattr(recovery, "fate_of", lambda task, view: (fate, "planted"))


def recover_on_every_restart_what_has_ended(plant: pytest.MonkeyPatch) -> None:
    recover = recovery.recover

    def restless(view: Any, command: Any) -> Any:
        found = recover(view, command)
        if view.flow is None or view.flow.ended_at is None or found.flow is not None:
            return found
        after, fact = follow.change_flow(view.flow, view.now, follow.EventType.FLOW_UPDATED)
        return msgspec.structs.replace(found, flow=after, facts=(*found.facts, fact))

    plant.setitem(decide._DECIDERS, decide.c.Recover, restless)


def show_what_is_written_before_it_is_synced(plant: pytest.MonkeyPatch) -> None:
    commit = SimulatedStore._commit

    async def eager(self: SimulatedStore, writes: Any) -> Any:
        tell = self.disk.on_commit

        def note(stage: str, told: Any) -> None:
            if stage == "written":
                self.disk.reveal()
            tell(stage, told)

        self.disk.on_commit = note
        try:
            return await commit(self, writes)
        finally:
            self.disk.on_commit = tell

    plant.setattr(SimulatedStore, "_commit", eager)


def answer_before_the_sync(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Disk, "sync", lambda self: None)


def take_commits_from_those_overtaken(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(SimulatedStore, "_check", lambda self: None)


def find_flows_of_strangers(plant: pytest.MonkeyPatch) -> None:
    async def get(self: ScopedFlows, flow_id: str) -> Any:
        store = self._core.enter().store
        return await store.find_flow(msgspec.structs.replace(self._scope, owner_key=None), flow_id)

    plant.setattr(ScopedFlows, "get", get)


def drop_events_of_slow_watchers(plant: pytest.MonkeyPatch) -> None:
    def offer(self: Watcher, doc: bytes, position: int) -> None:
        if len(self._live) < 2:
            self._live.append((doc, position))
        self._news.set()

    plant.setattr(Watcher, "offer", offer)


def close_without_putting_children_back(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Supervisor, "_interrupt", lambda self, key, task: None)


def retry_without_end(plant: pytest.MonkeyPatch) -> None:
    def no_wait(task: Any, now: int, outcome: Any, chance: float) -> Any:
        change, fact = endings.change_task(
            task, now, endings.EventType.TASK_RETRY_SCHEDULED,
            status=endings.TaskStatus.QUEUED, next_attempt_at=None,
        )  # fmt: skip
        return change, fact

    plant.setattr(endings, "schedule_retry", no_wait)


def let_go_of_actors_that_are_writing(plant: pytest.MonkeyPatch) -> None:
    find = Engine._actor

    def careless(self: Engine, key: Any, is_new: bool) -> Actor:
        actor = self._actors.get(key)
        if actor is not None and actor._draft is not None:
            del self._actors[key]
        return find(self, key, is_new)

    plant.setattr(Engine, "_actor", careless)


def hand_out_steps_in_the_order_asked_for(plant: pytest.MonkeyPatch) -> None:
    def make_ready(self: Completed) -> None:
        ended = [step for step in self._left if step._is_known]
        self._left = [step for step in self._left if step not in ended]
        self._ready.extend(ended)

    plant.setattr(Completed, "_make_ready", make_ready)


def let_losers_run_on(plant: pytest.MonkeyPatch) -> None:
    async def race(steps: Any, count: int) -> list[Step]:
        async for step in Completed(steps):
            if isinstance(await step.outcome(), Succeeded):
                return [step]
        return []

    plant.setattr(controller, "first", race)


PLANTED: tuple[Plant, ...] = (
    answer_before_the_commit,
    take_no_notice_of_revisions,
    answer_conflicts_with_a_flow_of_yesterday,
    keep_the_draft_of_a_failed_commit,
    forget_the_intent_when_work_is_resumed,
    start_children_after_a_cancel_was_requested,
    start_code_twice,
    start_code_before_the_commit,
    let_a_late_report_speak_for_a_newer_attempt,
    end_cancels_too_early,
    never_end_what_was_asked_to_cancel,
    lose_wakeups_of_retries,
    restart_nothing,
    recover_on_every_restart_what_has_ended,
    show_what_is_written_before_it_is_synced,
    answer_before_the_sync,
    take_commits_from_those_overtaken,
    find_flows_of_strangers,
    drop_events_of_slow_watchers,
    close_without_putting_children_back,
    retry_without_end,
    let_go_of_actors_that_are_writing,
    hand_out_steps_in_the_order_asked_for,
    let_losers_run_on,
)


def play_all() -> None:
    for seed in range(MOST_SEEDS):
        programs.play(seed)


@pytest.mark.parametrize("plant", PLANTED, ids=[plant.__name__ for plant in PLANTED])
def test_a_planted_fault_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    with pytest.raises(programs.Failed) as found:
        play_all()

    assert not isinstance(found.value.__cause__, (AttributeError, TypeError))
