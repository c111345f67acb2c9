"""The actor of one flow: a mailbox drained in turns, and the flow's memory between them.

Theory of operation. An actor has no task. A call posts an envelope and schedules a turn on the event loop;
the turn takes what waits, folds the rules over it, encodes the draft and submits it to the committer. Until
the commit is answered no further turn is taken, so the draft never runs ahead of the disk by more than one
transaction, and nothing, not even a refusal that names a revision, is answered before what it speaks about is
durable. A turn that changes nothing is answered at once.

Memory follows disk. When a commit fails the actor forgets the flow, draft and all, and the next turn starts
from the stored snapshot. When it is idle for a while the engine lets go of it altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from flowstead.engine.clock import Clock
from flowstead.engine.committer import Committer, Writer
from flowstead.engine.feed import Feed
from flowstead.engine.loader import Loader
from flowstead.engine.mailbox import Envelope, Mailbox, Reply
from flowstead.engine.slots import Slots
from flowstead.engine.timers import Timers
from flowstead.engine.turns import TurnQueue
from flowstead.engine.unit import Unit
from flowstead.engine.waiters import Waiters
from flowstead.errors import OutcomeUnknown, SnapshotUnreadable, StoreError
from flowstead.log import get_logger
from flowstead.model.code import Code, Refusal
from flowstead.model.command import Recover, Tick
from flowstead.model.effect import AbandonTask, Effect, ParkController, StartTask
from flowstead.model.flow import FlowKey, StoredFlow, has_ended
from flowstead.model.limits import Limits
from flowstead.model.task import StoredTask, TaskStatus, is_active
from flowstead.rules.children import Children
from flowstead.rules.ladder import flow_due_at, task_due_at
from flowstead.rules.turn import Turn
from flowstead.rules.view import Shapes, View
from flowstead.store import codec
from flowstead.store.codec import EventRow, FlowWrite, TaskRow, UpdateRow
from flowstead.store.port import Snapshot

log = get_logger(__name__)

_TURN: Final = 256
_RUNTIME: Final = "runtime"
_LOOK_AGAIN_SECONDS: Final = 1.0
_NOT_NOTED: Final = 2**62


class RunningCode(Protocol):
    """What an actor needs from whoever runs children and controllers."""

    @property
    def running(self) -> Mapping[str, int]:
        """The attempt of each child whose code runs here."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether nothing may be started any more."""
        ...

    @property
    def executors(self) -> Container[str]:
        """Names of what can run children here."""
        ...

    @property
    def attended(self) -> Container[FlowKey]:
        """The nested flows for which somebody stands in the flow above."""
        ...

    def bound_of(self, key: FlowKey) -> Container[str]:
        """Names of the flow's children whose unregistered functions are in memory."""
        ...

    def ended(self, key: FlowKey, task: StoredTask) -> None:
        """A child's end is on disk."""
        ...

    def is_driven(self, key: FlowKey) -> bool:
        """Whether the flow's controller runs here."""
        ...

    def carry_out(self, key: FlowKey, effects: Sequence[Effect]) -> None:
        """Start and stop what has become due by a commit."""
        ...


class Outbox(Protocol):
    """Who sends the updates that turns write."""

    def note(self, at: int) -> None:
        """There is an update to send, from this instant on."""
        ...


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """All that the actors of one runtime share."""

    clock: Clock
    limits: Limits
    loader: Loader
    committer: Committer
    feed: Feed
    timers: Timers
    turns: TurnQueue
    slots: Slots
    code: RunningCode
    controllers: Container[str]
    functions: Container[str]
    flow_ends: Waiters[FlowKey]
    task_ends: Waiters[str]
    rested: Callable[[Actor], None]
    unregistered: Callable[[FlowKey, Collection[str]], object]
    look_again: Callable[[FlowKey], None]
    shapes: Shapes
    opened: Callable[[FlowKey, str], object]
    """A wait on a key has been opened."""
    outbox: Outbox | None
    new_key: Callable[[], int]


class Draft(msgspec.Struct, frozen=True, gc=False):
    """A turn on its way to the disk: what to adopt and whom to tell once it is there."""

    flow: StoredFlow
    doc: bytes
    seq: int
    tasks: dict[str, StoredTask]
    rows: tuple[TaskRow, ...]
    events: tuple[EventRow, ...]
    answers: tuple[tuple[Envelope, Reply], ...]
    effects: tuple[Effect, ...]
    updates: tuple[UpdateRow, ...] = ()
    units: tuple[Unit, ...] = ()


class Actor:
    """One flow in memory. `post` is all that callers need."""

    __slots__ = (
        "_around",
        "_children",
        "_doc",
        "_doubtful",
        "_draft",
        "_flow",
        "_is_loaded",
        "_is_loading",
        "_is_scheduled",
        "_seq",
        "_to_recover",
        "asked_at",
        "key",
        "mailbox",
        "ticked_at",
    )

    def __init__(self, key: FlowKey, around: Surroundings, *, is_new: bool) -> None:
        self.key = key
        self.asked_at = 0
        self.ticked_at = 0
        """What time it was when it was last said that something is due: the timers have let go of it."""
        self.mailbox = Mailbox(around.limits.mailbox)
        self._around = around
        self._draft: Draft | None = None
        self._doubtful: Draft | None = None
        self._flow: StoredFlow | None = None
        self._doc: bytes | None = None
        self._seq = 0
        self._children = Children()
        # A flow whose id has just been made up is not worth looking for.
        self._is_loaded = is_new
        self._is_loading = self._is_scheduled = self._to_recover = False

    @property
    def doc(self) -> bytes | None:
        """The flow's record as stored, if it is in memory and no newer one is on its way to the disk.

        Readers of the store may see that newer one already, and nobody's reads should go back.
        """
        return None if self._draft is not None else self._doc

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for this actor, so that it may be let go of."""
        return not (self.mailbox or self._is_loading or self._is_scheduled or self._draft)

    @property
    def is_doubtful(self) -> bool:
        """Whether there is a draft that nobody could vouch for, and that only a snapshot can settle."""
        return self._doubtful is not None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it worth keeping: no flow, and no doubt about one."""
        return self._flow is None and self._doubtful is None

    def post(self, envelope: Envelope, *, bounded: bool = True) -> None:
        """Accept an envelope; its reply will be settled whatever happens to the caller.

        Raises:
            anyio.WouldBlock: The mailbox is full. The envelope was not accepted.
        """
        self.mailbox.put_nowait(envelope, bounded=bounded)
        self._wake()

    def nudge(self) -> None:
        """Bring the flow back to memory, and with it in motion."""
        self._wake()

    # ---- loading ----------------------------------------------------------------------------------

    def loaded(self, snapshot: Snapshot | Exception | None) -> None:
        """The loader's answer."""
        self._is_loading = False
        if isinstance(snapshot, Exception):
            self._around.slots.turn_over(self.key)
            envelopes = self.mailbox.take(len(self.mailbox))
            self._leave(envelopes, veto=not isinstance(snapshot, SnapshotUnreadable))
            for envelope in envelopes:
                envelope.fail(snapshot)
            log.error("flow.unreadable", flow_id=self.key.flow_id, reason=str(snapshot))
            if not isinstance(snapshot, SnapshotUnreadable):
                self._look_again_later()
            elif self._doubtful is not None:
                # Nobody will ever say. What does not run here will not run.
                for task_id in self._doubtful.tasks.keys() - self._around.code.running.keys():
                    self._around.slots.give_back(task_id)
            self._around.rested(self)
            return
        self._is_loaded = True
        if snapshot is not None:
            self._flow, self._doc, self._seq = snapshot.flow, snapshot.doc, snapshot.last_seq
            self._children = Children.of(snapshot.active, snapshot.run_ids)
            self._to_recover = True
            self.ticked_at = _NOT_NOTED
        self._clear_doubt(snapshot)
        self._wake()

    def _forget(self) -> None:
        self._flow = self._doc = None
        self._seq = 0
        self._children = Children()
        self._is_loaded = self._to_recover = False

    def _wake(self) -> None:
        if self._is_scheduled or self._is_loading or self._draft is not None:
            return
        if self._is_loaded:
            self._is_scheduled = True
            self._around.turns.schedule(self.take_turn)
        else:
            self._is_loading = True
            self._around.loader.want(self)

    # ---- the turn ---------------------------------------------------------------------------------

    def take_turn(self) -> None:
        """Fold what waits, once; for the queue of turns to call."""
        self._is_scheduled = False
        if self._draft is not None or not self._is_loaded:
            # Woken by a slot while a turn was ending: the commit's answer, or the loader, goes on from here.
            self._wake()
            return
        envelopes = self.mailbox.take(_TURN)
        try:
            draft = self._fold(envelopes)
        except Exception as error:
            # A fault of ours must not leave callers waiting, nor half a draft in memory.
            log.exception("turn.crashed", flow_id=self.key.flow_id)
            self._forget()
            self._leave(envelopes, veto=True)
            for envelope in envelopes:
                envelope.fail(error)
            self._look_again_later()
            self._go_on()
            return
        finally:
            self._around.slots.turn_over(self.key)
        if draft is not None:
            self._draft = draft
            self._submit(draft)
        else:
            self._go_on()

    def _fold(self, envelopes: list[Envelope]) -> Draft | None:
        """Decide every envelope. What changed nothing is answered here, the rest is drafted."""
        around = self._around
        now = self.asked_at = around.clock.now()
        if now < self.ticked_at and self._flow is not None:
            # Just loaded, or the clock was put back since. What is overdue is seen to in this very turn; a timer
            # for it would fire at once, again and again.
            self._note_dues(self._flow, self._children.active.values(), after=now)
        self.ticked_at = 0
        is_held = self._is_held()
        view = View(
            self._flow,
            self._children,
            now=now,
            limits=around.limits,
            running=around.code.running,
            driven=around.code.is_driven(self.key),
            controllers=() if is_held else around.controllers,
            functions=around.functions,
            bound=around.code.bound_of(self.key),
            executors=around.code.executors,
            room=around.slots.room_for(self.key),
            closing=is_held or around.code.is_stopping,
            shapes=around.shapes,
            tells=around.outbox is not None,
            new_key=around.new_key,
        )
        turn = Turn(view, self._seq)
        docs = _Docs(self._flow, self._doc)
        answers = []
        for envelope in envelopes:
            taken = turn.take(envelope.command, envelope.actor)
            reply = Reply(docs.of(taken.flow), taken.refusal, taken.children)
            answers.append((envelope, reply))
        if self._to_recover:
            # Last, so that what was cut off is not started first and stopped by one of these.
            turn.take(Recover(), _RUNTIME)
            turn.take(Tick(), _RUNTIME)
        # As long as the flow is held nothing is set in motion: that is still to come.
        self._to_recover = is_held
        around.unregistered(self.key, turn.unregistered)
        flow = view.flow
        if flow is None or not (turn.events or turn.tasks or flow is not self._flow):
            self._leave(envelopes)
            self._settle(answers, turn.effects())
            return None
        doc = docs.of(flow)
        assert doc is not None
        return Draft(
            flow,
            doc,
            self._seq + len(turn.events),
            turn.tasks,
            tuple(
                [
                    codec.task_row(
                        t, due_at=task_due_at(t, around.limits), fresh=t.task_id in turn.created
                    )
                    for t in turn.tasks.values()
                ]
            ),
            tuple([codec.event_row(flow.key, event) for event in turn.events]),
            tuple(answers),
            turn.effects(),
            tuple([codec.update_row(update, fresh=True) for update in turn.updates()]),
            self._join(answers),
        )

    def _join(self, answers: list[tuple[Envelope, Reply]]) -> tuple[Unit, ...]:
        """The units that the draft is written with; those of refused envelopes are left."""
        asked = [(envelope, reply) for envelope, reply in answers if envelope.unit is not None]
        if not asked:
            return ()
        self._leave([envelope for envelope, reply in asked if reply.refusal is not None])
        units = [envelope.unit for envelope, reply in asked if reply.refusal is None]
        return tuple([unit for unit in units if unit is not None])

    def _submit(self, draft: Draft) -> None:
        """Hand the draft to the committer, with what is written in one transaction with it."""
        writes: list[tuple[FlowWrite, Writer]] = [(self._write(draft), self)]
        if not draft.units:
            return self._around.committer.submit_together(writes)
        # At most one of several has other members, which may keep us waiting: it comes last.
        for unit in sorted(draft.units, key=lambda unit: unit.members):
            [(write, _)] = writes
            writes = unit.join(write, self)
        return self._around.committer.submit_together(writes)

    def _leave(self, envelopes: Iterable[Envelope], *, veto: bool = False) -> None:
        """These change nothing: others in their units need not wait for this flow."""
        for envelope in envelopes:
            if (unit := envelope.unit) is not None:
                self._around.committer.submit_together(unit.veto() if veto else unit.leave())

    def _is_held(self) -> bool:
        """Whether nothing of the flow may start, because nobody stands for it in the flow above.

        An intent may stand up there that has not come down yet; whoever stands for it brings it along, and does
        not count until it is on record here.
        """
        flow = self._flow
        nested = flow is not None and flow.parent_task_id is not None and not has_ended(flow)
        return nested and self.key not in self._around.code.attended

    def _write(self, draft: Draft) -> FlowWrite:
        row = None
        if draft.flow is not self._flow:
            row = codec.flow_row(
                draft.flow,
                draft.doc,
                due_at=flow_due_at(draft.flow, self._around.limits),
                expected_revision=None if self._flow is None else self._flow.revision,
            )
        return FlowWrite(row, draft.rows, draft.events, (), draft.updates)

    # ---- the commit's answer ----------------------------------------------------------------------

    def committed(self, first_position: int) -> None:
        """The draft is durable: adopt it, answer, announce, and set in motion what it asks for."""
        draft, around = self._draft, self._around
        assert draft is not None
        ended_before = self._flow is not None and has_ended(self._flow)
        waited_before = None if self._flow is None else self._flow.wait
        self._draft = None
        self._flow, self._doc, self._seq = draft.flow, draft.doc, draft.seq
        for envelope, reply in draft.answers:
            envelope.answer(reply)
        around.feed.announce(self.key, draft.events, first_position)
        self._tell_ends(draft.tasks.values())
        if has_ended(draft.flow) and not ended_before:
            around.flow_ends.settle(self.key, draft.doc)
        self._note_dues(draft.flow, draft.tasks.values())
        if around.outbox is not None:
            for update in draft.updates:
                around.outbox.note(update.due_at or 0)
        self._tell_opened(
            draft.flow if draft.flow.wait is not waited_before else None, draft.tasks.values()
        )
        self._settle_slots(draft)
        around.code.carry_out(self.key, draft.effects)
        self._go_on()

    def failed(self, error: StoreError) -> None:
        """The draft is not on disk, or nobody knows: drop it, say so, start again from the snapshot."""
        draft = self._draft
        assert draft is not None
        self._draft = None
        unknown = isinstance(error, OutcomeUnknown)
        code = Code.OUTCOME_UNKNOWN if unknown else Code.PERSIST_FAILED
        reply = Reply(None if unknown else self._doc, Refusal(code, str(error)))
        self._forget()
        if unknown:
            self._doubtful = draft
            self._around.feed.doubt(self.key)
        else:
            # Not before it is forgotten: a slot that comes free may wake this very flow.
            for task_id in draft.tasks.keys() - self._around.code.running.keys():
                self._around.slots.give_back(task_id)
        for envelope, _ in draft.answers:
            envelope.answer(reply)
        self._look_again_later()
        self._go_on()

    def _look_again_later(self) -> None:
        """What could not be done now is still due; see to it also if nobody calls."""
        self._around.clock.call_later(_LOOK_AGAIN_SECONDS, self._look_again)

    def _look_again(self) -> None:
        if not self._is_loaded and not self._around.code.is_stopping:
            self._around.look_again(self.key)

    def _clear_doubt(self, snapshot: Snapshot | None) -> None:
        """The snapshot says whether a draft nobody could vouch for is on disk; if it is, tell its ends now."""
        doubtful, self._doubtful = self._doubtful, None
        if doubtful is not None:
            self._settle_doubtful_slots(doubtful)
        if doubtful is None or snapshot is None or snapshot.last_seq < doubtful.seq:
            return
        self._around.feed.doubt(self.key)
        left = (AbandonTask, ParkController)
        gone = [effect for effect in doubtful.effects if isinstance(effect, left)]
        self._around.code.carry_out(self.key, gone)
        self._tell_opened(snapshot.flow, snapshot.active)
        if self._around.outbox is not None:
            self._around.outbox.note(0)
        self._tell_ends(doubtful.tasks.values())
        if has_ended(snapshot.flow):
            self._around.flow_ends.settle(self.key, snapshot.doc)

    def _settle(self, answers: list[tuple[Envelope, Reply]], effects: Sequence[Effect]) -> None:
        for envelope, reply in answers:
            envelope.answer(reply)
        if effects:
            self._around.code.carry_out(self.key, effects)

    def _tell_ends(self, tasks: Iterable[StoredTask]) -> None:
        around = self._around
        for task in tasks:
            if not is_active(task):
                around.code.ended(self.key, task)
                if around.task_ends.wanted(task.task_id):
                    around.task_ends.settle(task.task_id, codec.encode(task))

    def _tell_opened(self, flow: StoredFlow | None, tasks: Iterable[StoredTask]) -> None:
        """A signal may have come early for one of these waits."""
        for task in tasks:
            if task.wait is not None and task.wait.wait_key is not None and is_active(task):
                self._around.opened(self.key, task.wait.wait_key)
        if flow is not None and flow.wait is not None and flow.wait.wait_key is not None:
            self._around.opened(self.key, flow.wait.wait_key)

    def _settle_slots(self, draft: Draft) -> None:
        """Count who runs from now on, and free the slots of those that do not run any more."""
        slots, running = self._around.slots, self._around.code.running
        begun = {e.task.task_id for e in draft.effects if isinstance(e, StartTask)}
        for task in draft.tasks.values():
            if task.launch is None:
                continue
            if task.status is not TaskStatus.RUNNING:
                slots.give_back(task.task_id)
            elif task.task_id in begun or task.task_id in running:
                # Not one that nobody runs: it was cut off, and waits for its controller to ask for it.
                slots.hold(self.key, task)

    def _settle_doubtful_slots(self, doubtful: Draft) -> None:
        """The snapshot knows who runs: the others of a draft nobody could vouch for keep no slot."""
        for task_id in doubtful.tasks:
            task = self._children.active.get(task_id)
            if task is None or task.status is not TaskStatus.RUNNING:
                self._around.slots.give_back(task_id)

    def _note_dues(self, flow: StoredFlow, tasks: Iterable[StoredTask], *, after: int = -1) -> None:
        """Have the timers know what becomes due later than an instant, epoch ms."""
        timers, limits = self._around.timers, self._around.limits
        for at in (flow_due_at(flow, limits), *(task_due_at(task, limits) for task in tasks)):
            if at is not None and at > after:
                timers.note(at, self.key)

    def _go_on(self) -> None:
        if self.mailbox:
            self._wake()
        else:
            self._around.rested(self)


class _Docs:
    """Encoded records of the flow as it passes through a turn, each made once and only if asked for."""

    def __init__(self, flow: StoredFlow | None, doc: bytes | None) -> None:
        self._flow, self._doc = flow, doc

    def of(self, flow: StoredFlow | None) -> bytes | None:
        if flow is not self._flow:
            self._flow = flow
            self._doc = None if flow is None else codec.encode(flow)
        return self._doc
