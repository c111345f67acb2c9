"""The engine: the actors of one store, and everything they share, from opening to closing.

It routes commands to actors by flow key, brings flows into memory when they are asked for and lets go of them
when they are idle, and sets in motion again what an earlier process left unfinished.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

import anyio
import msgspec

from flowstead.engine.actor import Actor, Surroundings
from flowstead.engine.clock import Clock, Handle, Ids
from flowstead.engine.committer import Committer
from flowstead.engine.desk import Desk
from flowstead.engine.feed import Feed
from flowstead.engine.loader import Loader
from flowstead.engine.mailbox import Envelope, Reply
from flowstead.engine.postman import Postman, Send
from flowstead.engine.slots import Slots
from flowstead.engine.supervisor import Door, Supervisor
from flowstead.engine.timers import Timers
from flowstead.engine.turns import TurnQueue
from flowstead.engine.unit import Unit
from flowstead.engine.waiters import Waiters
from flowstead.errors import RuntimeClosed, StoreError
from flowstead.log import get_logger
from flowstead.model.code import MAILBOX_FULL
from flowstead.model.command import Command, ReleaseTasks, Tick, Wake
from flowstead.model.flow import FlowKey
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.rules.shapes import Shapes
from flowstead.store.port import Store

log = get_logger(__name__)

_RECOVERY_PAGE: Final = 256
_RECOVER_AGAIN_SECONDS: Final = 1.0
_KILL_SECONDS: Final = 2.0
_GIVEN_UP_SECONDS: Final = 0.2
_LET_GO_AT_ONCE: Final = 2_000
DELIVERIES: Final = Retry(max_attempts=96, initial=1.0, factor=2.0, max_delay=3600.0)
"""How often, and how far apart, an update is offered to the notifier, unless the host says otherwise: for more than
three days, so that a channel that is down over a weekend loses nothing."""
_RUNTIME: Final = "runtime"


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime is doing right now, and has done since it was opened.

    `flows_in_memory` counts actors, `running_children` children whose code runs, `waiting_mutations` envelopes
    in mailboxes. `commits` counts transactions, `flow_writes` the flow turns in them. `ignored_stops` counts
    children that were asked to stop and did not soon, `abandoned` code that was given up. `loop_stalls` counts how
    often the event loop was held up while children ran, `stalled_seconds` for how long in all. `delivered` counts
    updates that the notifier took over, `deliveries_failed` those that were given up.
    """

    flows_in_memory: int
    running_children: int
    waiting_mutations: int
    commits: int
    flow_writes: int
    failed_writes: int
    largest_batch: int
    ignored_stops: int
    abandoned: int
    loop_stalls: int
    stalled_seconds: float
    delivered: int = 0
    deliveries_failed: int = 0


class Engine:
    """Actors over a store. Opened once, closed once."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Clock,
        ids: Ids,
        limits: Limits,
        door: Door,
        controllers: Collection[str],
        functions: Collection[str],
        most_of: Callable[[str], int | None] = lambda _: None,
        watch_loop: bool = False,
        send: Send | None = None,
        deliveries: Retry = DELIVERIES,
    ) -> None:
        self.store = store
        self.clock = clock
        self.ids = ids
        self.limits = limits
        self._controllers = controllers
        self.flow_ends: Waiters[FlowKey] = Waiters()
        self.task_ends: Waiters[str] = Waiters()
        self.feed = Feed(store, limits.watcher_events)
        self.supervisor = Supervisor(
            report=self.report,
            door=door,
            clock=clock,
            ids=ids,
            limits=limits,
            watch_loop=watch_loop,
        )
        self.committer = Committer(store, limits.batch, on_lost=self._lost)
        self._loader = Loader(store)
        self._timers = Timers(store, clock, self._tick, self._wait_room)
        self.desk = Desk(store, self.committer, clock, self.ask, most_kept=limits.kept_signals)
        self.postman = (
            None
            if send is None
            else Postman(
                store,
                self.committer,
                clock,
                ids,
                send=send,
                retry=deliveries,
                limits=limits,
                post=self.ask,
            )
        )
        self._slots = Slots(limits.running_in_all, most_of, self.wake)
        self._around = Surroundings(
            clock=clock,
            limits=limits,
            loader=self._loader,
            committer=self.committer,
            feed=self.feed,
            timers=self._timers,
            code=self.supervisor,
            controllers=controllers,
            functions=functions,
            flow_ends=self.flow_ends,
            task_ends=self.task_ends,
            turns=TurnQueue(),
            slots=self._slots,
            rested=self._rested,
            look_again=self._look_again,
            unregistered=self._tell_unregistered,
            shapes=Shapes(),
            opened=self.desk.opened,
            outbox=self.postman,
            new_key=store.next_key,
        )
        # Least recently asked first; an actor that goes is only memory, its flow is in the store.
        self._actors: OrderedDict[FlowKey, Actor] = OrderedDict()
        self._sweep: Handle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._quiet: asyncio.Event | None = None
        self._is_closed = self._is_shut = False
        self.unregistered: dict[str, int] = {}
        self.unregistered_tasks: set[str] = set()

    def _lost(self) -> None:
        """Somebody else acts on these flows now: code that runs here must not go on, nor may anybody be told."""
        self.supervisor.stop()
        if self.postman is not None:
            self.postman.stop()

    # ---- asking -----------------------------------------------------------------------------------

    def ask(
        self,
        key: FlowKey,
        command: Command,
        actor: str,
        *,
        is_new: bool = False,
        unit: Unit | None = None,
        bounded: bool = True,
    ) -> asyncio.Future[Reply]:
        """Post a command; the future is settled once what it says is durable.

        Cancelling the future changes nothing about the command. A full mailbox answers `overloaded` at once, where
        it is `bounded`. A `unit` is left by a command that changes nothing.

        Raises:
            RuntimeClosed: Closing has begun.
        """
        if self._is_closed:
            if unit is not None:
                self.committer.submit_together(unit.veto())
            raise RuntimeClosed("This runtime is closing. Nothing was changed.")
        reply: asyncio.Future[Reply] = self._loop.create_future()
        try:
            self._actor(key, is_new).post(Envelope(command, actor, reply, unit), bounded=bounded)
        except anyio.WouldBlock:
            if unit is not None:
                self.committer.submit_together(unit.veto())
            reply.set_result(Reply(None, MAILBOX_FULL))
        return reply

    async def ask_patiently(
        self,
        key: FlowKey,
        command: Command,
        actor: str,
        *,
        posted: Callable[[asyncio.Future[Reply]], object] = lambda _: None,
    ) -> Reply:
        """Post a command as soon as the mailbox has room for it.

        `posted` is given the future of each try, so that the answer is heard though the caller is cancelled.
        """
        while True:
            await self._actor(key, False).mailbox.wait_for_room()
            asked = self.ask(key, command, actor)
            posted(asked)
            reply = await asyncio.shield(asked)
            if reply.refusal is not MAILBOX_FULL:
                return reply

    async def report(self, key: FlowKey, command: Command) -> Reply:
        """A command of the runtime itself: always accepted, also while closing.

        Raises:
            RuntimeClosed: The runtime is closed; only code that would not stop can get here.
        """
        if self._is_shut:
            raise RuntimeClosed("This runtime is closed.")
        reply: asyncio.Future[Reply] = self._loop.create_future()
        self._actor(key, False).post(Envelope(command, _RUNTIME, reply), bounded=False)
        return await reply

    def doc_of(self, key: FlowKey) -> bytes | None:
        """The stored record of a flow that is in memory."""
        actor = self._actors.get(key)
        return None if actor is None else actor.doc

    def statistics(self) -> Statistics:
        """Counts, without waiting."""
        counts, stalls = self.committer.statistics, self.supervisor.stalls
        return Statistics(
            flows_in_memory=len(self._actors),
            running_children=self.supervisor.running_count,
            waiting_mutations=sum(len(actor.mailbox) for actor in self._actors.values()),
            commits=counts.batches,
            flow_writes=counts.writes,
            failed_writes=counts.failed,
            largest_batch=counts.largest_batch,
            ignored_stops=self.supervisor.ignored_stops,
            abandoned=self.supervisor.abandoned,
            loop_stalls=0 if stalls is None else stalls.stalls,
            stalled_seconds=0.0 if stalls is None else stalls.stalled,
            delivered=0 if self.postman is None else self.postman.delivered,
            deliveries_failed=0 if self.postman is None else self.postman.failed,
        )

    # ---- actors -----------------------------------------------------------------------------------

    def _actor(self, key: FlowKey, is_new: bool) -> Actor:
        actor = self._actors.get(key)
        if actor is None:
            if len(self._actors) >= self.limits.idle_flows:
                # Two go for one that comes, so that a bound passed in a rush is reached again.
                self._let_go_oldest()
                self._let_go_oldest()
            actor = self._actors[key] = Actor(key, self._around, is_new=is_new)
            actor.asked_at = self.clock.now()
        else:
            self._actors.move_to_end(key)
        if self._sweep is None and not self._is_closed:
            self._sweep = self.clock.call_later(self.limits.idle_seconds, self._let_go)
        return actor

    def _rested(self, actor: Actor) -> None:
        """An actor has nothing left to do. An empty one is not worth keeping."""
        if actor.is_empty and self._actors.get(actor.key) is actor:
            del self._actors[actor.key]
        if self._quiet is not None and self._is_quiet():
            self._quiet.set()

    def _is_quiet(self) -> bool:
        return all(actor.is_idle for actor in self._actors.values())

    def _let_go(self) -> None:
        """Forget flows nobody has asked for lately; a few at a time, so that the loop never waits long."""
        self._sweep = None
        stale = self.clock.now() - round(self.limits.idle_seconds * 1000)
        for _ in range(min(len(self._actors), _LET_GO_AT_ONCE)):
            if next(iter(self._actors.values())).asked_at > stale:
                break
            self._let_go_oldest()
        if not self._actors or self._is_closed:
            return
        oldest = next(iter(self._actors.values()))
        wait = max(0.01, (oldest.asked_at - stale) / 1000)
        self._sweep = self.clock.call_later(wait, self._let_go)

    def _let_go_oldest(self) -> None:
        """Forget the flow asked for longest ago, unless something of it is under way."""
        if not self._actors:
            return
        key, actor = next(iter(self._actors.items()))
        if actor.is_idle and not actor.is_doubtful and not self.supervisor.has_code(key):
            del self._actors[key]
        else:
            actor.asked_at = self.clock.now()
            self._actors.move_to_end(key)

    def _tell_unregistered(self, key: FlowKey, names: Collection[str]) -> None:
        """Children stay as they are for want of code; say so once for each name."""
        for name in sorted(set(names) - self.unregistered_tasks):
            self.unregistered_tasks.add(name)
            log.warning("child.unregistered", function=name, flow_id=key.flow_id)

    def _look_again(self, key: FlowKey) -> None:
        """A flow whose last draft was dropped: see what its snapshot says is due."""
        self._actor(key, False).nudge()

    def _tick(self, key: FlowKey) -> None:
        if self._is_closed:
            return
        actor = self._actor(key, False)
        actor.ticked_at = max(actor.ticked_at, self.clock.now())
        # While a disk is slow instants go on coming due; their ticks must not crowd callers out of the mailbox.
        if not actor.mailbox.holds(Tick):
            self._post(key, Tick())

    async def _wait_room(self) -> None:
        """Return when those who were just woken are in memory, and others have had their turn."""
        await asyncio.sleep(0)
        await self._loader.wait_idle()

    def wake(self, key: FlowKey) -> None:
        """Have a flow look at what may start or go on."""
        self._post(key, Wake())

    def _post(self, key: FlowKey, command: Command) -> None:
        if not self._is_closed:
            reply = self._loop.create_future()
            self._actor(key, False).post(Envelope(command, _RUNTIME, reply), bounded=False)

    # ---- opening and closing ----------------------------------------------------------------------

    async def open(self, *, takeover: bool) -> None:
        """Take the store and start moving. Ready at once: what is unfinished is recovered beside.

        Raises:
            StoreInUse, StoreUnusable: Nothing was started.
        """
        # Kept, because asking asyncio for it asks the kernel for our process id each time.
        self._loop = asyncio.get_running_loop()
        await self.store.open(takeover=takeover)
        for name, job in (
            ("committer", self.committer.run),
            ("loader", self._loader.run),
            ("supervisor", self.supervisor.run),
            ("timers", self._timers.run),
            *(() if self.postman is None else (("postman", self.postman.run),)),
        ):
            self._begin(name, job)
        # Nothing can be started before the supervisor's task group stands.
        await self.supervisor.wait_ready()
        self._begin("recovery", self._recover)

    def _begin(self, name: str, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(job(), name=f"flowstead {name}")
        task.add_done_callback(_log_failure)
        self._tasks.append(task)

    def begin_closing(self) -> None:
        """Take nothing more and stop code, in one step: code that is refused from here on has not failed."""
        self._is_closed = True
        self.supervisor.stop()

    async def aclose(self) -> None:
        """Stop code, answer everybody, flush, let go of the store.

        Children stopped by this have no outcome and go back to the queue, their attempt unspent. Code that
        does not stop within the grace is left behind and counts as interrupted.
        """
        committer, loader, supervisor, *others = self._tasks
        self.begin_closing()
        self._timers.close()
        await self.desk.aclose()
        if self.postman is not None:
            await self.postman.aclose()
        if self._sweep is not None:
            self._sweep.cancel()
        has_somebody = self.supervisor.waits_for_somebody
        patience = self.limits.shutdown_grace if has_somebody else _GIVEN_UP_SECONDS
        await asyncio.wait({supervisor}, timeout=patience)
        if not supervisor.done() and self.supervisor.kill_all():
            await asyncio.wait({supervisor}, timeout=_KILL_SECONDS)
        if not supervisor.done() and self.supervisor.waits_for_somebody:
            log.error("children.abandoned", running=self.supervisor.running_count)
        if self.supervisor.stalls is not None:
            self.supervisor.stalls.close()
        await self._settle()
        self._is_shut = True
        self.committer.stop()
        await asyncio.wait({committer})
        for task in (loader, *others):
            task.cancel()
        await asyncio.wait({loader, *others})
        self.feed.close()
        closed = RuntimeClosed("This runtime was closed while the call was waiting for an end.")
        self.flow_ends.fail_all(closed)
        self.task_ends.fail_all(closed)
        await self.store.aclose()

    async def _settle(self) -> None:
        """Let every actor answer its mail, and put stopped children back in the queue, until both are done."""
        while True:
            self._quiet = asyncio.Event()
            if not self._is_quiet():
                await self._quiet.wait()
            interrupted = dict(self.supervisor.interrupted)
            self.supervisor.interrupted.clear()
            if not interrupted:
                return
            releases = [
                self.report(
                    key,
                    ReleaseTasks(
                        task_ids=tuple(children),
                        begun=frozenset(task_id for task_id, begun in children.items() if begun),
                    ),
                )
                for key, children in interrupted.items()
            ]
            await asyncio.gather(*releases, return_exceptions=True)

    async def _recover(self) -> None:
        """Set in motion again what the last owner left unfinished; a store that fails is asked again."""
        while True:
            try:
                return await self._recover_all()
            except StoreError as error:
                log.error("recovery.failed", reason=str(error))
                again = asyncio.Event()
                self.clock.call_later(_RECOVER_AGAIN_SECONDS, again.set)
                await again.wait()

    async def _recover_all(self) -> None:
        """Oldest first, page by page."""
        if self._controllers:
            counts = await self.store.count_by_controller()
            self.unregistered = {
                name: count for name, count in counts.items() if name not in self._controllers
            }
            for controller_id, flows in self.unregistered.items():
                log.warning("controller.unregistered", controller_id=controller_id, flows=flows)
        await self.desk.recover()
        after = 0
        while page := await self.store.list_unfinished(
            self._controllers, after_key=after, limit=_RECOVERY_PAGE
        ):
            for _, key in page:
                self._actor(key, False).nudge()
            after = page[-1][0]
            await self._loader.wait_idle()


def _log_failure(task: asyncio.Task[None]) -> None:
    """A job of the engine's own should not end by an exception; if it does, somebody must hear of it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("engine.job_failed", job=task.get_name(), error=repr(error))
