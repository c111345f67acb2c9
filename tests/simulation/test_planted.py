"""Faults planted in the runtime, each of which the worlds have to find: one that finds nothing proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from flowstead import Step, Succeeded, code_source, controller, verbs
from flowstead.engine import supervisor
from flowstead.engine.actor import Actor
from flowstead.engine.child_scope import ChildScope
from flowstead.engine.desk import Desk, Lanes
from flowstead.engine.engine import Engine
from flowstead.engine.feed import Watcher
from flowstead.engine.slots import Slots
from flowstead.engine.supervisor import Supervisor
from flowstead.engine.timers import Timers
from flowstead.executors import Call
from flowstead.model.command import Cancel, Create
from flowstead.model.effect import StartTask
from flowstead.model.flow import has_ended
from flowstead.model.task import TaskStatus
from flowstead.model.update import DONE
from flowstead.nested import NestedRunner
from flowstead.rules import (
    answers,
    approvals,
    classify,
    decide,
    decide_tasks,
    due_waits,
    endings,
    follow,
    ladder,
    mirror,
    news,
    recovery,
    review,
    stops,
    waits,
)
from flowstead.rules.children import Children
from flowstead.rules.turn import Turn
from flowstead.rules.view import NOTHING
from flowstead.scoped import ScopedFlows
from flowstead.step import Completed
from flowstead.store import codec, memory_waits
from flowstead.store.codec import FlowWrite
from flowstead.store.memory_waits import MemoryWaits
from flowstead.testing.disk import Disk, SimulatedStore
from tests.simulation import programs, scenes

MOST_SEEDS = 60

Plant = Callable[[pytest.MonkeyPatch], object]
Scene = Callable[..., int]


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

    def always(self: Supervisor, key: Any, task: Any, **how: Any) -> None:
        self._children.pop(task.task_id, None)
        start(self, key, task, **how)

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
    plant.setattr(Supervisor, "_interrupt", lambda self, key, task, begun: None)


def retry_without_end(plant: pytest.MonkeyPatch) -> None:
    def no_wait(task: Any, now: int, outcome: Any, chance: float, after: float | None) -> Any:
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
    def take(self: Completed, _ended: list[Step]) -> bool:
        ended = [step for step in self._left if step._is_known]
        self._left = [step for step in self._left if step not in ended]
        self._ready.extend(ended)
        return bool(ended)

    plant.setattr(Completed, "_take", take)


def let_losers_run_on(plant: pytest.MonkeyPatch) -> None:
    async def race(steps: Any, count: int) -> list[Step]:
        async for step in Completed(steps):
            if isinstance(await step.outcome(), Succeeded):
                return [step]
        return []

    plant.setattr(controller, "first", race)


def tell_nobody_of_a_review(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(review, "block_on_review", lambda view: NOTHING)


def try_what_needs_a_review_after_a_restart(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(recovery, "_fate_of_queued", lambda task, view: (recovery.Fate.LINE_UP, ""))


def try_the_hopeless_again(plant: pytest.MonkeyPatch) -> None:
    def hopeful(error: BaseException, retry: Any, classify: Any = None) -> Any:
        return msgspec.structs.replace(judge(error, retry, classify), again=True, review=False)

    judge = supervisor.judge
    plant.setattr(supervisor, "judge", hopeful)


def take_no_notice_of_who_wants_to_be_left_alone(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(classify, "retry_after_of", lambda error: None)


def do_again_what_must_not_be_done_twice(plant: pytest.MonkeyPatch) -> None:
    fate_of = recovery.fate_of

    def careless(task: Any, view: Any) -> Any:
        fate, why = fate_of(task, view)
        is_lost = fate is recovery.Fate.LOSE and view.has_function(task)
        return (recovery.Fate.RESTART, why) if is_lost else (fate, why)

    plant.setattr(recovery, "fate_of", careless)


def put_back_in_line_what_had_begun(plant: pytest.MonkeyPatch) -> None:
    release = stops._release
    plant.setattr(stops, "_release", lambda task, now, *, begun: release(task, now, begun=False))


def let_everybody_run(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Slots, "take", lambda self, key, task: self.hold(key, task) or True)


def keep_the_slots_of_those_that_have_ended(plant: pytest.MonkeyPatch) -> None:
    give_back = Slots.give_back

    def forgetful(self: Slots, task_id: str) -> None:
        if len(self._held) != 2:
            give_back(self, task_id)

    plant.setattr(Slots, "give_back", forgetful)


def never_climb(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(stops, "task_due_at", _only_of(TaskStatus.QUEUED, stops.task_due_at))


def kill_at_once(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(ladder, "kill_at", lambda task, limits: task.cancel_requested_at)


def never_start_too_late(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(ladder, "queue_deadline", lambda task: None)


def start_what_has_waited_too_long(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(follow, "is_late", lambda task, now: False)


def _only_of(status: TaskStatus, due_at: Any) -> Any:
    return lambda task, limits: due_at(task, limits) if task.status is status else None


def hear_no_sign_of_life(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(ChildScope, "touch", lambda self: None)


def say_nothing_of_an_interruption(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(code_source, "Call", lambda **given: Call(**{**given, "interrupted": False}))


def look_for_nothing_that_was_left_outside(plant: pytest.MonkeyPatch) -> None:
    fate_of = recovery.fate_of

    def careless(task: Any, view: Any) -> Any:
        fate, why = fate_of(task, view)
        to_stop = fate is recovery.Fate.ADOPT_TO_STOP and task.child_flow_id is None
        return (recovery.Fate.CANCEL, why) if to_stop else (fate, why)

    plant.setattr(recovery, "fate_of", careless)


def end_before_the_flow_below(plant: pytest.MonkeyPatch) -> None:
    async def hasty(self: NestedRunner, end: Any) -> Any:
        await self._tell(Cancel())

    plant.setattr(NestedRunner, "_cancel", hasty)


def end_before_what_the_flow_below_has_left(plant: pytest.MonkeyPatch) -> None:
    async def hasty(self: NestedRunner) -> None:
        """Take no notice."""

    plant.setattr(NestedRunner, "_until_quiet", hasty)


def pass_no_intent_on(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(ChildScope, "drain", lambda self: None)


def adopt_no_flow(plant: pytest.MonkeyPatch) -> None:
    fate_of = recovery.fate_of

    def careless(task: Any, view: Any) -> Any:
        fate, why = fate_of(task, view)
        return (recovery.Fate.KEEP, why) if fate is recovery.Fate.ADOPT else (fate, why)

    plant.setattr(recovery, "fate_of", careless)


def begin_again_with_nothing(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(verbs, "Create", lambda *, draft, carried: Create(draft=draft))


def follow_no_task(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(mirror, "follow", lambda flow, decision, now: NOTHING)


def report_on_children_only(plant: pytest.MonkeyPatch) -> None:
    async def shallow(*given: Any) -> Any:
        return [line for line in await settle(*given) if line.depth == 0]

    settle = verbs.settle
    plant.setattr(verbs, "settle", shallow)


def report_that_all_is_well(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(verbs, "_refusal_of", lambda flow, *given, **more: None)


def look_up_without_keeping_order(plant: pytest.MonkeyPatch) -> None:
    put = Lanes.put
    plant.setattr(Lanes, "put", lambda self, key, job: put(self, object(), job))


def open_waits_without_looking_what_is_kept(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Desk, "opened", lambda self, key, wait_key: None)


def hand_over_the_newest(plant: pytest.MonkeyPatch) -> None:
    oldest = MemoryWaits._oldest_kept

    def newest(self: MemoryWaits, *given: Any) -> Any:
        kept, expired = oldest(self, *given)
        rows = self._kept(*given)
        return kept and memory_waits._signal(rows[-1]), expired

    plant.setattr(MemoryWaits, "_oldest_kept", newest)


def wake_one_of_those_who_wait(plant: pytest.MonkeyPatch) -> None:
    wake = Desk._wake
    plant.setattr(Desk, "_wake", lambda self, signal, flows: wake(self, signal, flows[:1]))


def count_an_id_twice(plant: pytest.MonkeyPatch) -> None:
    take_in = Desk.take_in

    async def forgetful(self: Desk, signal: Any) -> Any:
        return await take_in(self, msgspec.structs.replace(signal, signal_id=None))

    plant.setattr(Desk, "take_in", forgetful)


def take_what_comes_too_late(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(answers, "_is_over", lambda wait, now: False)


def fire_timers_twice(plant: pytest.MonkeyPatch) -> None:
    see_to = due_waits.see_to

    def twice(view: Any, flow: Any, overdue: Any) -> Any:
        found = see_to(view, flow, overdue)
        fired = [fact for fact in found.facts if fact.type == "task.ended"]
        return msgspec.structs.replace(found, facts=(*found.facts, *fired))

    plant.setattr(due_waits, "see_to", twice)


def fire_timers_early(plant: pytest.MonkeyPatch) -> None:
    due_at = ladder.wait_due_at

    def hasty(wait: Any) -> Any:
        at = due_at(wait)
        return None if at is None else at - 500

    plant.setattr(ladder, "wait_due_at", hasty)
    plant.setattr(
        due_waits,
        "_is_over",
        lambda wait, now: wait.deadline_at is not None and wait.deadline_at <= now + 500,
    )


def wake_without_entering_again(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(waits, "enter_controller", lambda view, flow: ())


def wake_nobody(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(waits, "wake", lambda view: NOTHING)


def tell_the_end_afterwards(plant: pytest.MonkeyPatch) -> None:
    """In a transaction of its own."""

    class Nobody:
        def committed(self, first_position: int) -> None:
            """Take no notice."""

        failed = committed

    updates, committed = Turn.updates, Actor.committed

    def silent(self: Turn) -> Any:
        return [update for update in updates(self) if update.slot != DONE]

    def late(self: Actor, first_position: int) -> None:
        before, around = self._flow, self._around
        committed(self, first_position)
        flow = self._flow
        if flow is None or not has_ended(flow) or (before is not None and has_ended(before)):
            return
        [told] = news.of_change(before, flow)
        done = news.addressed(told, flow, key=around.new_key(), now=around.clock.now())
        rows = (codec.update_row(done, fresh=True),)
        around.committer.submit(FlowWrite(None, (), (), (), rows), Nobody())

    plant.setattr(Turn, "updates", silent)
    plant.setattr(Actor, "committed", late)


def allow_what_was_approved_for_ever(plant: pytest.MonkeyPatch) -> None:
    use_grant = decide_tasks.use_grant

    def lavish(grant: Any, **given: Any) -> Any:
        unused = None if grant is None else msgspec.structs.replace(grant, used_by=None)
        return use_grant(unused, **given)

    plant.setattr(decide_tasks, "use_grant", lavish)


def allow_something_else(plant: pytest.MonkeyPatch) -> None:
    use_grant = decide_tasks.use_grant

    def careless(grant: Any, *, items_digest: str, **given: Any) -> Any:
        items_digest = items_digest if grant is None else grant.items_digest
        return use_grant(grant, items_digest=items_digest, **given)

    plant.setattr(decide_tasks, "use_grant", careless)


def count_whoever_votes_again(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(approvals, "_who_is_wrong", lambda approval, vote: None)


def take_the_newest_letter(plant: pytest.MonkeyPatch) -> None:
    letters_in = Children.letters_in
    plant.setattr(Children, "letters_in", lambda self, inbox: letters_in(self, inbox)[::-1])


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
    let_go_of_actors_that_are_writing,
    hand_out_steps_in_the_order_asked_for,
    let_losers_run_on,
)
IN_A_SCENE: tuple[tuple[Plant, Scene], ...] = (
    (tell_nobody_of_a_review, scenes.review),
    (try_what_needs_a_review_after_a_restart, scenes.review),
    (try_the_hopeless_again, scenes.fail),
    (take_no_notice_of_who_wants_to_be_left_alone, scenes.fail),
    (hear_no_sign_of_life, scenes.fail),
    (retry_without_end, scenes.fail),
    (do_again_what_must_not_be_done_twice, scenes.rush_for_slots),
    (put_back_in_line_what_had_begun, scenes.rush_for_slots),
    (let_everybody_run, scenes.rush_for_slots),
    (keep_the_slots_of_those_that_have_ended, scenes.rush_for_slots),
    (never_start_too_late, scenes.rush_for_slots),
    (start_what_has_waited_too_long, scenes.oversleep),
    (never_climb, scenes.ladder),
    (kill_at_once, scenes.ladder),
    (report_that_all_is_well, scenes.ladder),
    (say_nothing_of_an_interruption, scenes.programs),
    (look_for_nothing_that_was_left_outside, scenes.programs),
    (end_before_the_flow_below, scenes.tree),
    (end_before_what_the_flow_below_has_left, scenes.tree),
    (pass_no_intent_on, scenes.tree),
    (adopt_no_flow, scenes.tree),
    (report_on_children_only, scenes.tree),
    (begin_again_with_nothing, scenes.again),
    (follow_no_task, scenes.detached),
    (look_up_without_keeping_order, scenes.signals),
    (open_waits_without_looking_what_is_kept, scenes.meet),
    (hand_over_the_newest, scenes.signals),
    (wake_one_of_those_who_wait, scenes.stand),
    (count_an_id_twice, scenes.signals),
    (take_what_comes_too_late, scenes.too_late),
    (fire_timers_twice, scenes.stand),
    (fire_timers_early, scenes.stand),
    (wake_without_entering_again, scenes.stand),
    (wake_nobody, scenes.stand),
    (tell_the_end_afterwards, scenes.again),
    (allow_what_was_approved_for_ever, scenes.approve),
    (allow_something_else, scenes.approve),
    (count_whoever_votes_again, scenes.approve),
    (take_the_newest_letter, scenes.mail),
)
"""Faults with the play in which they show, as chance alone would stage it too seldom."""


def play_all(scene: Scene | None = None) -> None:
    for seed in range(MOST_SEEDS):
        programs.play(seed, scene=scene)


def check_found(found: pytest.ExceptionInfo[programs.Failed]) -> None:
    """It was what was planted, and not how."""
    assert not isinstance(found.value.__cause__, (AttributeError, TypeError))
    assert "TypeError" not in str(found.value)


@pytest.mark.parametrize("plant", PLANTED, ids=[plant.__name__ for plant in PLANTED])
def test_a_planted_fault_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    with pytest.raises(programs.Failed) as found:
        play_all()

    check_found(found)


@pytest.mark.parametrize(
    ("plant", "scene"), IN_A_SCENE, ids=[plant.__name__ for plant, _ in IN_A_SCENE]
)
def test_a_fault_planted_in_a_scene_is_found(
    plant: Plant, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    with pytest.raises(programs.Failed) as found:
        play_all(scene)

    check_found(found)
