"""What is promised of waits, signals, messages and updates: held against each commit at its instant.

The history says which waits were answered, and with what; each payload names the call that brought it. Signals
that are kept, and updates, have no place in the history: of these the rows of each commit are looked at.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flowstead.store.codec import FlowWrite, SignalRow
from tests.simulation.model import (
    FLOW_ENDS,
    Entry,
    FlowState,
    TaskState,
    WaitState,
    Wrong,
)

if TYPE_CHECKING:
    from tests.simulation.machine import World
    from tests.simulation.operations import Call

ITEMS = "pay"
"""The step that does what was approved."""


class Taken(NamedTuple):
    """A wait that was answered by a call."""

    position: int
    tick: int
    flow: tuple[str, str]
    task_id: str | None


def token_in(payload: Any) -> str | None:
    """The call that a payload comes from."""
    if not isinstance(payload, dict):
        return None
    found = payload.get("by") or payload.get("comment")
    return found if isinstance(found, str) and found[:1] == "t" and found[1:].isdigit() else None


class Desk:
    """What has become of the calls that brought something to a flow."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.taken: dict[str, list[Taken]] = {}
        """By the call's token, the waits that it has answered."""
        self.letters: dict[str, tuple[int, str]] = {}
        """The position and the child of a message that came to a flow."""
        self.kept: dict[str, tuple[int, int]] = {}
        """The instant at which a signal was put by, and its row."""

    # ---- rows -------------------------------------------------------------------------------------

    def note(self, writes: Sequence[FlowWrite]) -> None:
        """Rows have been written."""
        try:
            for write in writes:
                for row in write.signals:
                    self._note_signal(row)
                _check_updates(self._world, write)
        except Wrong as wrong:
            self._world.violations.append(str(wrong))

    def _note_signal(self, row: SignalRow) -> None:
        doc = json.loads(row.doc)
        token = token_in(doc.get("payload"))
        if row.fresh and row.kept:
            if token is None:
                raise Wrong(f"nobody sent it: {row}")
            self.kept[token] = (self._world.tick(), row.key)
            self._world.seen["signal put by"] += 1
            self._check_id(self._world.calls[int(token[1:])])
        if not row.fresh and doc.get("takenBy"):
            self._world.seen["kept signal handed over"] += 1
            self._check_it_was_next(row)

    def _check_it_was_next(self, row: SignalRow) -> None:
        """Of the signals that are kept for a wait the oldest goes first, and none that has expired."""
        world = self._world
        if world.files is not None:
            return
        before = [
            other
            for other in world.disk.written.signals.values()
            if (other.owner_key, other.wait_key) == (row.owner_key, row.wait_key)
            and other.kept
            and other.key < row.key
            and (other.expires_at or 0) > world.wall
        ]
        if before:
            raise Wrong(f"these came before it: {before}, {row}")

    def cut(self, last: int) -> None:
        """What came after a position is lost."""
        kept = {
            t: [one for one in taken if one.position <= last] for t, taken in self.taken.items()
        }
        self.taken = {token: taken for token, taken in kept.items() if taken}
        self.letters = {t: found for t, found in self.letters.items() if found[0] <= last}
        rows = self._world.disk.written.signals
        self.kept = {t: found for t, found in self.kept.items() if found[1] in rows}

    # ---- events -----------------------------------------------------------------------------------

    def check(self, entry: Entry) -> None:
        """Hold an event against what is promised of waits.

        Raises:
            Wrong: It breaks a promise.
        """
        flow = self._world.model.flows[(entry.owner, entry.event["flowId"])]
        now, before = flow.now, flow.states[-2]
        if entry.type == "task.created":
            self._note_child(now, entry)
        if entry.type == "task.ended" and entry.changed["status"] == "succeeded":
            task = now.tasks[entry.task_id or ""]
            if task.wait is not None and task.wait.kind in ("signal", "message"):
                told = json.loads(task.result or "null")
                body = told["body"] if task.wait.kind == "message" else told
                self._note_taken(now, task.wait, task, body, entry)
        answer = entry.changed.get("answerJson")
        if answer is not None and entry.type != "flow.created" and not answer.get("timedOut"):
            assert before is not None
            if before.own is None:
                raise Wrong(f"it did not wait: {before}, {entry}")
            self._note_taken(now, before.own, None, answer["payload"], entry)

    def _note_child(self, flow: FlowState, entry: Entry) -> None:
        task = flow.tasks[entry.task_id or ""]
        if task.letter is not None and (token := token_in(json.loads(task.letter.payload))):
            if token in self.letters:
                raise Wrong(f"it lies there already: {entry}")
            self.letters[token] = (entry.position, task.task_id)
            self._world.seen["letter"] += 1
            self._check_id(self._world.calls[int(token[1:])])
        if task.run_id == ITEMS and not task.carried:
            _check_it_is_approved(flow, task, entry)

    def _note_taken(
        self, flow: FlowState, wait: WaitState, task: TaskState | None, payload: Any, entry: Entry
    ) -> None:
        world, token = self._world, token_in(payload)
        if token is None:
            raise Wrong(f"nobody sent {payload}: {entry}")
        call = world.calls[int(token[1:])]
        if not _names(call, flow, wait):
            raise Wrong(f"{call.name} does not answer {wait}: {entry}")
        if call.verdict in ("refused", "failed", "read") or call.of_zombie:
            raise Wrong(f"{call.name} was answered with {call.verdict}, and now: {entry}")
        taken = self.taken.setdefault(token, [])
        named = (flow.owner, flow.flow_id)
        if any(one.flow == named for one in taken):
            raise Wrong(f"{call.name} has answered a wait of this flow before: {entry}")
        if any(one.tick != entry.tick for one in taken):
            raise Wrong(f"{call.name} wakes its flows in more than one commit: {entry}")
        was_put_by = token in self.kept or token in self.letters
        if not was_put_by and not call.was_open_at(entry.tick):
            raise Wrong(f"{call.name} is over, and was not kept: {entry}")
        taken.append(Taken(entry.position, entry.tick, named, task and task.task_id))
        world.seen[f"woken by {call.op}"] += 1
        if len(taken) > 1:
            world.seen["woke several"] += 1
        self._check_id(call)

    def has_come(self, call: Call) -> bool:
        """Whether what a call brought has arrived: it was taken, or put by."""
        return any(call.token in where for where in (self.taken, self.letters, self.kept))

    def _check_id(self, call: Call) -> None:
        """Of all calls with one id one counts."""
        for other in self.same_id(call):
            if self.has_come(other):
                raise Wrong(f"{other.name} has come before {call.name}")

    def same_id(self, call: Call) -> list[Call]:
        """The other calls that have the id of this one."""
        given = call.args.get("id")
        if given is None:
            return []
        owner = owner_of(self._world, call)
        return [
            other
            for other in self._world.calls
            if other is not call
            and other.args.get("id") == given
            and owner_of(self._world, other) == owner
        ]

    def woken_at(self, tick: int) -> int:
        """The last position that was written before an instant."""
        return bisect_right(self._world.order.ticks, tick - 1) - 1


def owner_of(world: World, call: Call) -> str | None:
    """Whose flows a call is about; that of the wait where only its token is known."""
    if call.args.get("token") is not None and call.op == "answer":
        return owner_of_token(world, call.args["token"])
    return call.actor


def owner_of_token(world: World, token: str) -> str | None:
    """Whose wait a token answers."""
    for (owner, _), log in world.model.flows.items():
        for state in log.states[1:]:
            assert state is not None
            waits = [task.wait for task in state.tasks.values()]
            if any(wait is not None and wait.token == token for wait in (*waits, state.own)):
                return owner
    return None


def _names(call: Call, flow: FlowState, wait: WaitState) -> bool:
    """Whether what a call names is this wait."""
    args = call.args
    if call.op in ("tell", "ask"):
        inbox = f"message:{args['inbox']}"
        return (call.actor, call.flow_id, inbox) == (flow.owner, flow.flow_id, wait.inbox)
    if args.get("token") is not None:
        return bool(args["token"] == wait.token) and call.actor in (flow.owner, "anybody")
    if call.actor != flow.owner:
        return False
    if args.get("fields") is not None:
        return bool(args["fields"] == wait.key)
    if args.get("name") is not None:
        return call.flow_id == flow.flow_id and f"signal:{args['name']}" == wait.inbox
    return call.flow_id == flow.flow_id and wait is not None and wait.inbox is None


def _check_it_is_approved(flow: FlowState, task: TaskState, entry: Entry) -> None:
    """What needs an approval is done once, with what was approved, in time, and of the flow as it was."""
    decided = flow.run("approval")
    if decided is None or decided.wait is None or decided.result is None:
        raise Wrong(f"nobody has approved it: {entry}, {decided}")
    told = json.loads(decided.result)
    if told["verdict"] != "approved" or json.loads(task.given) != told["items"]:
        raise Wrong(f"{told} was decided, and this is done with {task.given}: {entry}")
    if decided.wait.is_over(entry.event["at"]):
        raise Wrong(f"the approval has expired: {entry}, {decided}")
    assert decided.wait.approval is not None
    if flow.content > decided.wait.approval[2]:
        raise Wrong(f"somebody has changed the flow since: {entry}, {flow}")


def _check_updates(world: World, write: FlowWrite) -> None:
    """The end of a flow is told once, in the transaction that ended it, unless it is silent."""
    ends = [row for row in write.events if json.loads(row.doc)["type"] in FLOW_ENDS]
    dones = [row for row in write.updates if row.fresh and row.slot == "done"]
    if ends:
        assert write.flow is not None
        policy = json.loads(write.flow.doc).get("notifyPolicy", "done_only")
        if len(dones) != (policy != "silent"):
            raise Wrong(f"{len(dones)} updates tell of the end of a {policy} flow: {ends}")
    elif dones:
        raise Wrong(f"nothing has ended: {dones}")
    for row in write.updates:
        doc = json.loads(row.doc)
        if row.status == "delivered" and doc["idempotencyKey"] not in world.channel.received:
            raise Wrong(f"it has not arrived: {doc}")
