"""What the owner of a flow is told, and when: derived from what a turn has changed, by the flow's policy.

`done_only` hears of the end, `state_changes` of each change of status or step as well, `silent` of nothing. A
notice is what the controller says by itself; it goes out whatever the policy, unless that is `silent`.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

import msgspec
from msgspec import UNSET

from flowstead.model import command as c
from flowstead.model.code import NOT_FOUND, Refusal
from flowstead.model.event import EventType
from flowstead.model.flow import FlowStatus, NotifyPolicy, StoredFlow, has_ended
from flowstead.model.update import DONE, PROGRESS, StoredUpdate, UpdateKind
from flowstead.rules import decide_tasks, endings
from flowstead.rules.endings import NULL
from flowstead.rules.view import Answer, Decision, Fact, News, View, defect_refusal

_ENDED: Final = {
    FlowStatus.SUCCEEDED: "is done",
    FlowStatus.FAILED: "has failed",
    FlowStatus.CANCELLED: "was cancelled",
    FlowStatus.LOST: "was lost",
}


def notify(view: View, command: c.Notify) -> Answer:
    """Say something to the owner, as a step: once for each name, on record with the child that says it."""
    if isinstance(command.data, c.Defect):
        return defect_refusal(command.data)
    added = decide_tasks.add_tasks(view, c.AddTasks(drafts=(command.draft,)))
    is_new = not isinstance(added, Refusal) and [t.task_id for t in added.tasks] == [
        command.draft.task_id
    ]
    if isinstance(added, Refusal) or not is_new:
        return added
    said, fact = endings.answer(added.tasks[0], view.now, NULL)
    is_digest = command.bucket is not None
    news = News(
        kind=UpdateKind.DIGEST if is_digest else UpdateKind.NOTICE,
        slot=f"notice:{said.run_id}",
        text=command.text,
        data=command.data,
        bucket=command.bucket,
        due_at=command.due_at,
    )
    return msgspec.structs.replace(added, tasks=(said,), facts=(*added.facts, fact), news=(news,))


def note_delivery(view: View, command: c.NoteDelivery) -> Answer:
    """An update was given up: the history says so, whether the flow has ended or not."""
    if view.flow is None:
        return NOT_FOUND
    told = {"slot": command.slot, "reason": command.reason}
    return Decision(facts=(Fact(EventType.UPDATE_FAILED, told),))


def of_change(before: StoredFlow | None, flow: StoredFlow) -> list[News]:
    """What a turn has to tell of the flow itself."""
    if has_ended(flow):
        if before is not None and has_ended(before):
            return []
        return [News(kind=UpdateKind.DONE, slot=DONE, text=_told_of_end(flow))]
    if flow.notify_policy is not NotifyPolicy.STATE_CHANGES or before is None:
        return []
    if _seen(before) == _seen(flow):
        return []
    return [News(kind=UpdateKind.PROGRESS, slot=PROGRESS, text=_told_of_progress(flow))]


def addressed(news: News, flow: StoredFlow, *, key: int, now: int) -> StoredUpdate:
    """An update, with the address of its flow and the name that makes it count once."""
    version = flow.revision if news.slot == PROGRESS else 0
    return StoredUpdate(
        key=key,
        flow_key=flow.key,
        slot=news.slot,
        version=version,
        idempotency_key=named_key(flow.owner_key, flow.flow_id, news.slot, version),
        kind=news.kind,
        owner_key=flow.owner_key,
        flow_id=flow.flow_id,
        revision=flow.revision,
        flow_status=flow.status,
        goal=flow.goal,
        current_step=flow.current_step,
        text=news.text,
        data=news.data,
        bucket=news.bucket,
        requester_origin=flow.requester_origin,
        created_at=now,
        due_at=now if news.due_at is None else news.due_at,
    )


def named_key(owner_key: str, flow_id: str, slot: str, version: int) -> str:
    """The idempotency key of an update: the same for every attempt, and for nothing else."""
    named = msgspec.json.encode([owner_key, flow_id, slot, version])
    return f"upd_{sha256(named).hexdigest()[:32]}"


def _seen(flow: StoredFlow) -> tuple[FlowStatus, str | None]:
    """What an owner sees of a flow. One that is queued to go on is as good as running."""
    is_queued = flow.status is FlowStatus.QUEUED
    return FlowStatus.RUNNING if is_queued else flow.status, flow.current_step


def _told_of_end(flow: StoredFlow) -> str:
    told = f"{flow.goal} {_ENDED[flow.status]}"
    why = None if flow.failure is None else flow.failure.message or flow.failure.code
    return f"{told}: {why}" if why else f"{told}."


def _told_of_progress(flow: StoredFlow) -> str:
    step = "" if flow.current_step is None else f", at {flow.current_step}"
    if flow.status is FlowStatus.BLOCKED and flow.blocked_summary:
        return f"{flow.goal} is blocked{step}: {flow.blocked_summary}"
    prompt = _prompt_of(flow)
    asked = f": {prompt}" if prompt else "."
    return f"{flow.goal} is {_seen(flow)[0].value}{step}{asked}"


def _prompt_of(flow: StoredFlow) -> str | None:
    if flow.status is not FlowStatus.WAITING or flow.wait_json is UNSET:
        return None
    wait = msgspec.json.decode(flow.wait_json)
    prompt = wait.get("prompt") if isinstance(wait, dict) else None
    return prompt if isinstance(prompt, str) else None
