"""What tests of waits start from: drafts of waits, letters and votes, and commands folded on one view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model import command as c
from flowstead.model.approval import Approval, Rules, Vote, VoteKind
from flowstead.model.code import Code
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, StoredFlow
from flowstead.model.task import StoredTask, TaskStatus
from flowstead.model.wait import Letter, Wait, WaitKind, inbox_of
from flowstead.rules import approvals
from flowstead.rules.turn import Taken, Turn
from flowstead.rules.view import View
from tests.unit.given import CREATED_AT, NOTHING_TO_PATCH, NOW, a_flow, a_turn, a_view

TOKEN = "the-token-that-answers"
SECOND = 1000
DAY = 24 * 3600 * SECOND
PARK_MS = 5 * SECOND
"""`park_seconds` of the limits that tests start from."""


def a_wait(kind: WaitKind = WaitKind.SIGNAL, **fields: Any) -> Wait:
    given: dict[str, Any] = {"token": TOKEN} if kind is not WaitKind.TIMER else {}
    return Wait(kind=kind, **given | fields)


def a_wait_draft(name: str, kind: WaitKind = WaitKind.SIGNAL, **fields: Any) -> c.TaskDraft:
    """A wait that a controller opens; its child's id is the step's name in capitals."""
    if kind is not WaitKind.TIMER:
        fields = {**fields, "inbox": inbox_of(kind, fields.get("inbox", name))}
    return c.TaskDraft(
        key=10,
        task_id=name.upper(),
        runtime=kind,
        task=kind,
        run_id=name,
        wait=a_wait(kind, **fields),
    )


def a_timer_draft(name: str, at: int) -> c.TaskDraft:
    return a_wait_draft(name, WaitKind.TIMER, deadline_at=at)


def an_approval(step: str = "ok", **rules: Any) -> Approval:
    return approvals.open_approval(
        Raw(b'{"eur":5}'),
        Rules(**rules),
        prompt="Pay?",
        flow_id="triage-1",
        step=step,
        revision=7,
    )


def an_approval_draft(step: str = "ok", rules: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"approval": an_approval(step, **(rules or {})), **fields}
    return a_wait_draft(step, WaitKind.APPROVAL, **fields)


def a_vote(
    kind: VoteKind = VoteKind.APPROVE, approver: str = "ann", *, step: str = "ok", **fields: Any
) -> Vote:
    rules = fields.pop("rules", {})
    return Vote(
        **{"kind": kind, "approver": approver, "digest": an_approval(step, **rules).digest} | fields
    )


def cast(vote: Vote, step: str = "ok", n: int = 0, **letter: Any) -> c.CastVote:
    inbox = inbox_of(WaitKind.APPROVAL, step)
    early = a_letter(inbox, Raw(msgspec.json.encode(vote)), n, runtime="vote", **letter)
    return c.CastVote(step=step, vote=vote, early=early)


def a_letter(
    inbox: str,
    payload: Raw | UnsetType = UNSET,
    n: int = 0,
    *,
    runtime: str = "signal",
    **fields: Any,
) -> c.TaskDraft:
    """A message that comes in. The n-th letter has the n-th id."""
    letter = Letter(inbox=inbox, **fields)
    return c.TaskDraft(
        key=100 + n,
        task_id=f"letter-{n}",
        runtime=runtime,
        task=inbox,
        input_json=payload,
        letter=letter,
    )


def addressed(step: str, payload: Raw | UnsetType = UNSET, n: int = 0, **fields: Any) -> c.Tell:
    """A signal for a step of this flow, as the door makes it."""
    given = {"expires_at": NOW + DAY, **fields}
    inbox = inbox_of(WaitKind.SIGNAL, step)
    return c.Tell(draft=a_letter(inbox, payload, n, **given), step=step)


def told(payload: Raw | UnsetType = UNSET, n: int = 0, inbox: str = "in", **fields: Any) -> c.Tell:
    """A message, as the door makes it."""
    return c.Tell(
        draft=a_letter(inbox_of(WaitKind.MESSAGE, inbox), payload, n, runtime="message", **fields)
    )


def stand_in(*drafts: c.TaskDraft, steps: tuple[str, ...] = (), may_park: bool = True) -> c.Await:
    """The controller stands still in these waits, and in steps that are there already."""
    named = (*steps, *(draft.run_id or draft.task_id for draft in drafts))
    return c.Await(drafts=drafts, steps=named, may_park=may_park)


def set_waiting(
    view: View,
    wait_json: bytes = b'{"kind":"reply"}',
    *,
    patch: c.Patch = NOTHING_TO_PATCH,
    **wait: Any,
) -> c.SetWaiting:
    """The ledger face's wait of the flow's own, at the revision it has now."""
    assert view.flow is not None
    return c.SetWaiting(
        expected_revision=view.flow.revision,
        patch=patch,
        wait_json=Raw(wait_json),
        wait=a_wait(**{"wait_key": "reply", **wait}),
    )


def play(view: View, *commands: c.Command, at: int | None = None) -> Turn:
    """Take these in one turn, each of them applied, as at an instant."""
    if at is not None:
        view.now = at
    turn = a_turn(view)
    for command in commands:
        taken = turn.take(command, "someone")
        assert taken.refusal is None, taken.refusal
    return turn


def tick(view: View, at: int) -> Turn:
    return play(view, c.Tick(), at=at)


def taken(view: View, command: c.Command) -> Taken:
    """What becomes of one command in a turn of its own."""
    return a_turn(view).take(command, "someone")


def refused(view: View, command: c.Command, code: Code) -> str:
    """Assert that the command is refused so and changes nothing; answer the reason."""
    flow, active = view.flow, dict(view.children.active)
    turn = a_turn(view)
    answer = turn.take(command, "someone")
    assert answer.refusal is not None, "it was taken"
    assert answer.refusal.code is code
    assert view.flow is flow
    assert dict(view.children.active) == active
    assert not (turn.tasks or turn.events or turn.effects())
    return answer.refusal.reason


def ignored(view: View, command: c.Command) -> None:
    """Assert that the command is no error and changes nothing."""
    flow, active = view.flow, dict(view.children.active)
    turn = a_turn(view)
    assert turn.take(command, "someone").refusal is None
    assert view.flow is flow
    assert dict(view.children.active) == active
    assert not (turn.tasks or turn.events or turn.effects())


def types(turn: Turn) -> list[EventType]:
    return [event.type for event in turn.events]  # type: ignore[misc]


def flow_of(view: View) -> StoredFlow:
    assert view.flow is not None
    return view.flow


def decoded(raw: Raw | UnsetType) -> Any:
    assert raw is not UNSET
    return msgspec.json.decode(raw)


def waited_for(view: View) -> Any:
    """The flow's `wait_json`."""
    return decoded(flow_of(view).wait_json)


def a_telling_view(*args: Any, **fields: Any) -> View:
    """A view where there is somebody to tell: updates get the keys 1, 2, …"""
    view = a_view(*args, **fields)
    keys = iter(range(1, 1_000_000))
    view.tells, view.new_key = True, lambda: next(keys)
    return view


class Checked:
    """Shapes that are known by their name, and what is wrong with everything else."""

    def __init__(self, fits: Callable[[Any], bool] = lambda value: value == "fits") -> None:
        self._fits = fits
        self.asked: list[tuple[bytes, bytes | None]] = []

    def check(self, schema: Raw, payload: Raw | UnsetType) -> str | None:
        self.asked.append((bytes(schema), None if payload is UNSET else bytes(payload)))
        value = None if payload is UNSET else msgspec.json.decode(payload)
        return None if self._fits(value) else "$ is of the wrong shape."


SCHEMA = Raw(b'{"const":"fits"}')
FITS, MISFIT = Raw(b'"fits"'), Raw(b'"misfit"')


def standing_in(
    *drafts: c.TaskDraft, may_park: bool = True, view: View | None = None, **fields: Any
) -> View:
    """A flow whose controller stands in these waits, all in one group."""
    view = a_telling_view(a_flow(), driven=True, **fields) if view is None else view
    play(view, stand_in(*drafts, may_park=may_park))
    assert flow_of(view).status is FlowStatus.WAITING
    return view


def an_old_wait(name: str = "old", **fields: Any) -> StoredTask:
    """A wait as the store has it."""
    wait = fields.pop("wait", None) or a_wait(inbox=name)
    return StoredTask(
        **{
            "key": 2,
            "flow_key": 1,
            "task_id": name.upper(),
            "flow_id": "triage-1",
            "runtime": wait.kind,
            "run_id": name,
            "task": wait.kind,
            "status": TaskStatus.QUEUED,
            "delivery_status": "pending",
            "notify_policy": "done_only",
            "created_at": CREATED_AT,
            "wait": wait,
        }
        | fields
    )
