"""What answers a wait: a signal, a message, a vote. Each is decided by the flow it is for, in its turn.

Another part of `decide`, under the same rules: nothing is changed here, and a refused command has no effect. An
answer that does not fit leaves its wait open.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from flowstead.model import command as c
from flowstead.model.approval import Grant, Verdict, Vote
from flowstead.model.code import CANCEL_REQUESTED, NOT_FOUND, NOT_MANAGED, Code, Refusal
from flowstead.model.event import EventType
from flowstead.model.flow import Failure, FlowStatus, StoredFlow, SyncMode, has_ended
from flowstead.model.task import Failed, StoredTask, TaskStatus
from flowstead.model.wait import OnTimeout, Wait, WaitKind
from flowstead.rules import approvals, decide_tasks, endings, wait_keys
from flowstead.rules.decide_tasks import make_task
from flowstead.rules.endings import NULL
from flowstead.rules.view import (
    NO_WAIT,
    Answer,
    Decision,
    Fact,
    View,
    change_flow,
    change_task,
    defect_refusal,
    enter_controller,
)

_UNAWAITED = Refusal(Code.UNAWAITED, "Nobody waits for this.")
_TOKEN_IS_SPENT = Refusal(Code.LATE, "This token was used already, or its wait is over.")
_PLAIN = frozenset({WaitKind.SIGNAL, WaitKind.MESSAGE})


def deliver(view: View, command: c.Deliver) -> Answer:
    """Answer the wait on a key, or one wait by its child's id."""
    flow = _receiver(view)
    if isinstance(flow, Refusal):
        return flow
    task = _child_for(view, flow, command)
    wait = (_own_wait(flow) if _is_own(flow, command) else None) if task is None else task.wait
    if wait is None:
        if command.token is not None:
            return _TOKEN_IS_SPENT
        is_known = command.task_id in view.children.run_ids
        return Refusal(Code.LATE, "This step is over.") if is_known else _UNAWAITED
    if refused := _unfit(view, wait, command.payload):
        return refused
    if task is None:
        return _answer_flow(view, flow, command)
    change = endings.answer(
        task, view.now, _received(task, command.payload, None), command.signal_id
    )
    return _one(change)


def _receiver(view: View) -> StoredFlow | Refusal:
    """The flow, if anything can still reach it."""
    flow = view.flow
    if flow is None:
        return NOT_FOUND
    if flow.sync_mode is not SyncMode.MANAGED:
        return NOT_MANAGED
    if has_ended(flow):
        return Refusal(Code.LATE, f"Flow is already {flow.status.value}.")
    return CANCEL_REQUESTED if flow.cancel_requested_at is not None else flow


def _child_for(view: View, flow: StoredFlow, command: c.Deliver) -> StoredTask | None:
    if command.task_id is not None:
        named = view.children.run_ids.get(command.task_id, command.task_id)
        task = view.children.active.get(named)
        return task if task is not None and task.wait is not None else None
    if _is_own(flow, command):
        return None
    matching = [
        task
        for task in view.children.open_waits()
        if task.wait is not None and task.wait.wait_key == command.wait_key
    ]
    in_time = [t for t in matching if t.wait is not None and not _is_over(t.wait, view.now)]
    return next(iter(in_time or matching), None)


def _is_own(flow: StoredFlow, command: c.Deliver) -> bool:
    """Whether the answer is for the wait of the flow itself."""
    wait = _own_wait(flow)
    if wait is None:
        return False
    if command.task_id == "":
        return command.token is None or command.token == wait_keys.token_digest(wait.token or "")
    return command.wait_key is not None and wait.wait_key == command.wait_key


def _own_wait(flow: StoredFlow) -> Wait | None:
    """The wait of the flow itself. One from before waits woke anybody has nothing but its key."""
    if flow.wait is not None or flow.awaiting or flow.wait_json in (UNSET, NULL):
        return flow.wait
    key = wait_keys.wait_key_in(flow.owner_key, flow.wait_json)
    return Wait(kind=WaitKind.SIGNAL, wait_key=key)


def _unfit(view: View, wait: Wait, payload: Raw | UnsetType) -> Refusal | None:
    """Why this answer cannot be taken. What has come too late is so whether the deadline was seen to or not."""
    if wait.kind not in _PLAIN:
        told = "a vote" if wait.kind is WaitKind.APPROVAL else "the clock"
        return Refusal(Code.UNAWAITED, f"This wait is answered by {told}.")
    if _is_over(wait, view.now):
        return Refusal(Code.LATE, "The deadline of this wait has passed.")
    return _misfit(view, wait.schema, payload, "The wait stays open.")


def _misfit(
    view: View, schema: Raw | UnsetType, payload: Raw | UnsetType, afterwards: str
) -> Refusal | None:
    """What is wrong with the shape of an answer. One that cannot be checked here may come again."""
    if schema is UNSET:
        return None
    try:
        problem = view.shapes.check(schema, payload)
    except (ImportError, ValueError) as error:
        # Where the wait was opened this could be done.
        told = f"The shape of the answer cannot be checked here: {error} {afterwards}"
        return Refusal(Code.PERSIST_FAILED, told)
    return None if problem is None else Refusal(Code.WRONG_SHAPE, f"{problem} {afterwards}")


def _is_over(wait: Wait, now: int) -> bool:
    """Whether it is too late, whether the deadline was seen to or not. A wait that only blocks stays open."""
    if wait.deadline_at is None or wait.on_timeout is OnTimeout.BLOCK:
        return False
    return wait.deadline_at <= now


def _answer_flow(view: View, flow: StoredFlow, command: c.Deliver) -> Decision:
    told = {"payload": NULL if command.payload is UNSET else command.payload, "at": view.now}
    if command.signal_id is not None:
        told["signalId"] = command.signal_id
    return resume_own(view, flow, Raw(msgspec.json.encode(told)), command.signal_id)


def resume_own(
    view: View, flow: StoredFlow, answer_json: Raw, cause: str | None = None
) -> Decision:
    """The flow's own wait is over: it goes on, unless a person has to look at one of its children first."""
    fields: dict[str, Any] = {**NO_WAIT, "answer_json": answer_json}
    if flow.status is FlowStatus.BLOCKED and flow.blocked_task_id in view.children.in_review:
        after, fact = change_flow(flow, view.now, EventType.FLOW_UPDATED, **fields)
        return Decision(flow=after, facts=(msgspec.structs.replace(fact, cause=cause),))
    after, fact = change_flow(
        flow,
        view.now,
        EventType.FLOW_RESUMED,
        status=FlowStatus.RUNNING if view.driven else FlowStatus.QUEUED,
        blocked_task_id=None,
        blocked_summary=None,
        **fields,
    )
    told = msgspec.structs.replace(fact, cause=cause)
    return Decision(flow=after, facts=(told,), effects=enter_controller(view, flow))


def _received(task: StoredTask, payload: Raw | UnsetType, letter: StoredTask | None) -> Raw:
    """What a wait is answered with: the payload, for one that takes messages with its envelope."""
    assert task.wait is not None
    body = NULL if payload is UNSET else payload
    if task.wait.kind is not WaitKind.MESSAGE:
        return body
    is_asked = letter is not None and letter.letter is not None and letter.letter.wants_reply
    told = {"id": None if letter is None else letter.task_id, "body": body, "wantsReply": is_asked}
    return Raw(msgspec.json.encode(told))


# ---- messages -------------------------------------------------------------------------------------


def tell(view: View, command: c.Tell) -> Answer:
    """Hand a message to who waits for it, or keep it."""
    flow = _receiver(view)
    if isinstance(flow, Refusal):
        return flow
    draft = command.draft
    assert draft.letter is not None
    if isinstance(draft.input_json, c.Defect):
        return defect_refusal(draft.input_json)
    letter, fact = make_task(flow, draft, view.now)
    inbox = draft.letter.inbox
    for task in view.children.open_waits():
        if task.wait is None or task.wait.inbox != inbox:
            continue
        if command.step is None and _is_over(task.wait, view.now):
            continue  # a message is for the flow: what comes too late for this wait is for the next
        if refused := _unfit(view, task.wait, letter.input_json):
            return refused
        return _hand_over(view, letter, task, (fact,), cause=draft.run_id)
    return _keep(view, letter, fact, step=command.step)


def _keep(view: View, letter: StoredTask, fact: Fact, *, step: str | None) -> Answer:
    if step is not None and (known := view.children.run_ids.get(step)) is not None:
        if known in view.children.active:
            return Refusal(Code.UNAWAITED, f"The step {step!r} of this flow takes no such answer.")
        return Refusal(Code.LATE, f"The step {step!r} of this flow is over.")
    if view.children.untaken >= view.limits.messages:
        told = f"Flow has {view.limits.messages} messages that nobody has taken. Nothing was added."
        return Refusal(Code.OVERLOADED, told)
    return Decision(tasks=(letter,), facts=(fact,), answered=(letter.task_id,))


def _hand_over(
    view: View, letter: StoredTask, wait: StoredTask, told: tuple[Fact, ...], cause: str | None
) -> Decision:
    """The message has found its wait: one that wants no reply is done with."""
    changed, fact = _taken(letter, wait, view.now)
    answered = endings.answer(wait, view.now, _received(wait, letter.input_json, letter), cause)
    return Decision(
        tasks=(changed, answered[0]),
        facts=(*told, fact, answered[1]),
        answered=(letter.task_id, wait.task_id),
    )


def _taken(letter: StoredTask, wait: StoredTask, now: int) -> endings.Change:
    assert letter.letter is not None
    if not letter.letter.wants_reply:
        return endings.answer(letter, now, NULL)
    taken = msgspec.structs.replace(letter.letter, taken_by=wait.run_id, expires_at=None)
    return change_task(
        letter, now, EventType.TASK_TAKEN, status=TaskStatus.RUNNING, started_at=now, letter=taken
    )


def add_tasks(view: View, command: c.AddTasks) -> Answer:
    """Make the children that are new; the waits among them take what has come early for them."""
    added = decide_tasks.add_tasks(view, command)
    return added if isinstance(added, Refusal) else open_waits(view, added)


def open_waits(view: View, added: Decision) -> Decision:
    """Let the waits among new children take what has come early for them."""
    flow = view.flow
    assert flow is not None
    waits = [task for task in added.tasks if task.wait is not None]
    if not waits:
        return added
    for task in waits:
        if task.wait is not None and task.wait.inbox is not None:
            added = _take_early(view, added, task)
    return _with_grants(view, added.flow or flow, added)


def _take_early(view: View, added: Decision, task: StoredTask) -> Decision:
    assert task.wait is not None and task.wait.inbox is not None
    if task.wait.approval is None and _is_over(task.wait, view.now):
        return added  # its turn has come too late; what is there is for who comes next
    tasks = {t.task_id: t for t in added.tasks} | {task.task_id: task}
    facts = list(added.facts)
    for letter in view.children.letters_in(task.wait.inbox):
        current = tasks[task.task_id]
        if current.ended_at is not None:
            break
        if letter.task_id in tasks or _is_expired(letter, view.now):
            continue  # taken by another wait of this very command, or taken away by the next tick
        if task.wait.approval is not None:
            taken, counted = _count_early(view, current, letter)
        else:
            taken, counted = _try_early(view, current, letter)
        for changed, fact in (taken, *counted):
            tasks[changed.task_id] = changed
            facts.append(fact)
    return msgspec.structs.replace(added, tasks=tuple(tasks.values()), facts=tuple(facts))


def _is_expired(letter: StoredTask, now: int) -> bool:
    assert letter.letter is not None
    return letter.letter.expires_at is not None and letter.letter.expires_at <= now


def _try_early(
    view: View, wait: StoredTask, letter: StoredTask
) -> tuple[endings.Change, list[endings.Change]]:
    assert wait.wait is not None
    if refused := _unfit(view, wait.wait, letter.input_json):
        failure = Failure(kind="refused", code=refused.code.value, message=refused.reason[:200])
        return endings.end(letter, view.now, Failed(failure)), []
    answered = endings.answer(wait, view.now, _received(wait, letter.input_json, letter))
    return _taken(letter, wait, view.now), [answered]


# ---- votes ----------------------------------------------------------------------------------------


def cast_vote(view: View, command: c.CastVote) -> Answer:
    """Count a vote on an open approval; one that comes before the question is kept for it."""
    flow = _receiver(view)
    if isinstance(flow, Refusal):
        return flow
    task_id = view.children.run_ids.get(command.step, command.step)
    task = view.children.active.get(task_id)
    if task is None or task.wait is None or task.wait.approval is None:
        if task is not None or task_id != command.step or command.early is None:
            return Refusal(Code.LATE, "This approval is decided, or was never asked for.")
        letter, fact = make_task(flow, command.early, view.now)
        return _keep(view, letter, fact, step=command.step)
    counted = _count(view, flow, task, command.vote)
    if isinstance(counted, Refusal):
        return counted
    ended = counted[-1][0]
    answer = Decision(
        tasks=(ended,), facts=tuple(fact for _, fact in counted), answered=(ended.task_id,)
    )
    return _with_grants(view, flow, answer)


def _count(
    view: View, flow: StoredFlow, task: StoredTask, vote: Vote
) -> list[endings.Change] | Refusal:
    """The approval with the vote in it, ended if that decides it."""
    wait = task.wait
    assert wait is not None and wait.approval is not None
    if vote.items is not UNSET and (
        refused := _misfit(view, wait.schema, vote.items, "The approval stays open.")
    ):
        return refused
    counted = approvals.count_vote(
        wait.approval,
        vote,
        flow_content_revision=flow.content_revision,
        now=view.now,
        deadline_at=wait.deadline_at,
    )
    if isinstance(counted, approvals.VoteRefusal):
        if counted.verdict is not None:
            return [decided(task, view.now, counted.verdict)]
        return Refusal(Code.NOT_APPROVED, counted.reason, counted.code)
    after, fact = change_task(
        task,
        view.now,
        EventType.TASK_VOTED,
        wait=msgspec.structs.replace(wait, approval=counted.approval),
    )
    fact.changed.update({"approver": vote.approver, "vote": vote.kind, "role": vote.role})
    changes: list[endings.Change] = [(after, fact)]
    if counted.verdict is not None:
        changes.append(decided(after, view.now, counted.verdict))
    return changes


def _count_early(
    view: View, wait: StoredTask, letter: StoredTask
) -> tuple[endings.Change, list[endings.Change]]:
    flow = view.flow
    assert flow is not None and letter.input_json is not UNSET
    vote = msgspec.json.decode(letter.input_json, type=Vote)
    counted = _count(view, flow, wait, vote)
    if isinstance(counted, Refusal):
        failure = Failure(kind="refused", code=counted.code.value, message=counted.reason[:200])
        return endings.end(letter, view.now, Failed(failure)), []
    return endings.answer(letter, view.now, NULL), counted


def decided(task: StoredTask, now: int, verdict: Verdict) -> endings.Change:
    """The approval is over; its result says how it came out."""
    assert task.wait is not None and task.wait.approval is not None
    approval = task.wait.approval
    told = {
        "verdict": verdict,
        "asked": approvals.asked_digest(approval),
        "items": approval.items,
        "digest": approval.digest,
        "votes": approval.votes,
    }
    return endings.answer(task, now, Raw(msgspec.json.encode(told)))


def _with_grants(view: View, flow: StoredFlow, answer: Decision) -> Decision:
    """An approval that was given is kept as what may be used once."""
    grants = flow.grants | {
        task.run_id: grant
        for task in answer.tasks
        if task.run_id is not None and (grant := _grant_in(task)) is not None
    }
    if grants == flow.grants:
        return answer
    after, fact = change_flow(flow, view.now, EventType.FLOW_UPDATED, grants=grants)
    return msgspec.structs.replace(answer, flow=after, facts=(*answer.facts, fact))


def _grant_in(task: StoredTask) -> Grant | None:
    """What an ended approval allows; nothing, unless it was given."""
    if task.wait is None or task.wait.approval is None or task.result_json is UNSET:
        return None
    if msgspec.json.decode(task.result_json)["verdict"] != Verdict.APPROVED:
        return None
    return approvals.grant_of(task.wait.approval, task.wait.deadline_at)


def _one(change: endings.Change) -> Decision:
    task, fact = change
    return Decision(tasks=(task,), facts=(fact,), answered=(task.task_id,))
