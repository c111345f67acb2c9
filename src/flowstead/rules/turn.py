"""A turn: several commands folded over one snapshot, to be written in one transaction.

The turn drafts. It changes the view and the book of children as it goes, so that each command sees what
those before it did; nothing of it is true until its write is committed, and if the commit fails the whole
draft, the book included, is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flowstead.model.code import Refusal
from flowstead.model.command import Command
from flowstead.model.effect import Effect, StartController, StartTask
from flowstead.model.event import Event, EventType
from flowstead.model.flow import NotifyPolicy, StoredFlow, SyncMode, has_ended
from flowstead.model.task import StoredTask, TaskStatus, is_active
from flowstead.model.update import StoredUpdate
from flowstead.rules import follow, mirror, news, review, waits
from flowstead.rules.decide import decide
from flowstead.rules.view import NOTHING, Decision, Fact, News, View


class Taken(msgspec.Struct, frozen=True, gc=False):
    """One command's answer inside a turn: the flow as the command left it, and its refusal, if any.

    `children` are the tasks the answer is about: whole, or the id alone of one that ended before the turn.
    """

    flow: StoredFlow | None
    refusal: Refusal | None
    children: tuple[StoredTask | str, ...] = ()


class Turn:
    """Fold commands; then read `tasks`, `created`, `events` and `effects()`, and the view's flow."""

    __slots__ = (
        "_before",
        "_effects",
        "_news",
        "_seq",
        "created",
        "events",
        "tasks",
        "unregistered",
        "view",
    )

    def __init__(self, view: View, last_seq: int) -> None:
        self.view = view
        self.tasks: dict[str, StoredTask] = {}
        self.created: set[str | None] = set()
        self.events: list[Event] = []
        self._effects: list[Effect] = []
        self._news: list[News] = []
        self._before = view.flow
        self.unregistered: set[str] = set()
        self._seq = last_seq

    def take(self, command: Command, actor: str) -> Taken:
        """Decide one command and everything that follows from it."""
        before = self.view.flow
        blocker = review.blocker_in_review(self.view)
        decision = decide(self.view, command)
        if isinstance(decision, Refusal):
            return Taken(before, decision)
        self._apply(decision, actor)
        # The answer shows what the command itself did; what follows is told by events.
        flow = self.view.flow
        if blocker is not None:
            self._apply(review.let_go_on(self.view, blocker), actor)
        self._follow(command, actor, before, decision)
        return Taken(flow, None, self._children(decision) if decision.answered else ())

    def _children(self, decision: Decision) -> tuple[StoredTask | str, ...]:
        """The children an answer is about; one that ended before the turn by its id alone."""
        active = self.view.children.active
        return tuple([self.tasks.get(i) or active.get(i) or i for i in decision.answered])

    def effects(self) -> tuple[Effect, ...]:
        """What to carry out after the commit, without what the turn itself has overtaken."""
        flow = self.view.flow
        if not self._effects:
            return ()
        return tuple(
            effect
            for effect in self._effects
            if not (isinstance(effect, StartTask) and not self._still_starts(effect.task))
            and not (isinstance(effect, StartController) and flow is not None and _is_over(flow))
        )

    def updates(self) -> Sequence[StoredUpdate]:
        """What the owner is to be told of it all."""
        view, flow = self.view, self.view.flow
        if not view.tells or flow is None or flow.notify_policy is NotifyPolicy.SILENT:
            return ()
        told = [*self._news, *news.of_change(self._before, flow)]
        return [news.addressed(n, flow, key=view.new_key(), now=view.now) for n in told]

    def _still_starts(self, task: StoredTask) -> bool:
        now = self.view.children.active.get(task.task_id)
        return now is not None and now.status is TaskStatus.RUNNING and now.attempt == task.attempt

    def _follow(
        self, command: Command, actor: str, before: StoredFlow | None, decision: Decision
    ) -> None:
        flow = self.view.flow
        if flow is None:
            return
        if flow.sync_mode is SyncMode.TASK_MIRRORED:
            self._apply(mirror.follow(flow, decision, self.view.now), actor)
            flow = self.view.flow
            assert flow is not None
        if not has_ended(flow) and flow.cancel_requested_at is not None:
            child_ended = any(not is_active(task) for task in decision.tasks)
            self._apply(follow.conclude_cancel(self.view, command, child_ended=child_ended), actor)
            self._wake(actor)
            flow = self.view.flow
        elif not has_ended(flow):
            self._wake(actor)
            if self.view.children.has_line and not self.view.closing:
                self._start_children(actor)
            if self.view.children.in_review:
                self._apply(review.block_on_review(self.view), actor)
            flow = self.view.flow
        if flow is not None and has_ended(flow) and not (before is not None and has_ended(before)):
            self._apply(follow.end_code(self.view, command), actor)

    def _wake(self, actor: str) -> None:
        # What one selection withdraws another wait may have stood in.
        while (flow := self.view.flow) is not None and flow.awaiting and not has_ended(flow):
            if (woken := waits.wake(self.view)) is NOTHING:
                return
            self._apply(woken, actor)

    def _note_start(self, task: StoredTask) -> None:
        self.view.started[task.task_id] = task.attempt
        if task.launch is not None and task.launch.external:
            self.view.starting[task.task_id] = task.attempt

    def _start_children(self, actor: str) -> None:
        started = follow.start_children(self.view)
        self._apply(started, actor)
        flow = self.view.flow
        if flow is not None and flow.sync_mode is SyncMode.TASK_MIRRORED:
            self._apply(mirror.follow(flow, started, self.view.now), actor)

    def _apply(self, decision: Decision, actor: str) -> None:
        view = self.view
        if decision.flow is not None:
            view.flow = decision.flow
        for task in decision.tasks:
            view.children.put(task)
            self.tasks[task.task_id] = task
        for task_id in decision.lined_up:
            view.children.line_up(task_id)
        for effect in decision.effects:
            if isinstance(effect, StartTask):
                self._note_start(effect.task)
        self._effects.extend(decision.effects)
        self._news.extend(decision.news)
        self.unregistered.update(decision.unregistered)
        if not decision.facts:
            return
        flow = view.flow
        assert flow is not None
        # One fact is the usual case, and about the flow as it is afterwards, whatever it tells of.
        is_one = len(decision.facts) == 1
        revision = flow.revision - (0 if is_one else sum(map(_is_of_flow, decision.facts)))
        for fact in decision.facts:
            self._seq += 1
            revision += not is_one and _is_of_flow(fact)
            if fact.type is EventType.TASK_CREATED:
                self.created.add(fact.task_id)
            self.events.append(
                Event(
                    flow_id=flow.flow_id,
                    seq=self._seq,
                    revision=revision,
                    at=view.now,
                    type=fact.type,
                    actor=actor,
                    task_id=fact.task_id,
                    cause=fact.cause,
                    changed=fact.changed,
                )
            )


_OF_FLOW = frozenset(kind for kind in EventType if kind.startswith("flow.")) - {
    EventType.FLOW_CREATED
}


def _is_of_flow(fact: Fact) -> bool:
    """Whether the fact tells of a change of the flow itself, which is one revision."""
    return fact.type in _OF_FLOW


def _is_over(flow: StoredFlow) -> bool:
    """Whether no controller is to be entered any more."""
    return has_ended(flow) or flow.cancel_started_at is not None
