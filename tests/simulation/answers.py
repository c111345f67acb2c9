"""Whether a signal, a message or a vote was answered rightly: what it was asked with, and what it may answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from flowstead import errors as e
from flowstead.model.approval import Rules
from flowstead.rules.approvals import shown_digest
from tests.simulation import judge
from tests.simulation import model as spec
from tests.simulation.linear import Seen
from tests.simulation.model import FlowLog, FlowState, TaskState, WaitState, Wrong, canonical
from tests.simulation.waiting import LAST, PROMPT, QUORUM, items_of, turn

if TYPE_CHECKING:
    from tests.simulation.machine import World
    from tests.simulation.operations import Call

OPERATIONS = frozenset({"signal", "answer", "tell", "ask", "vote", "list_waits", "list_updates"})
ANYBODY = "anybody"
"""Who has nothing but a token."""
_FIELDS: dict[str, dict[str, Any]] = {
    "A": {"thread": "A"},
    "B": {"thread": "B"},
    "C": LAST,
    "nearly": {"thread": "C", "n": 1.0},
    "nobody": {"nobody": True},
}

# ---- what a call is asked with --------------------------------------------------------------------


def resolve(
    world: World,
    op: str,
    given: dict[str, Any],
    token: str,
    state: FlowState | None,
    actor: str,
    flow_id: str,
) -> tuple[str, str, str | None, str | None, dict[str, Any]]:
    """The operation, who calls it, on which flow or child, and with which arguments."""
    args: dict[str, Any] = {}
    match op:
        case "signal" | "answer":
            args = {"payload": {"by": token}}
            flow_id = _add_target(given, state, args, flow_id)  # type: ignore[assignment]
            if given["lifetime"] != "usual" and "token" not in args:
                args["lifetime"] = given["lifetime"]
            actor = ANYBODY if op == "answer" else actor
        case "tell" | "ask":
            args = {"message": {"by": token}, "inbox": given["inbox"]}
        case "vote":
            args = _ballot(world, given, state, token, flow_id)
            flow_id = None if "token" in args else flow_id  # type: ignore[assignment]
        case _:
            flow_id = None  # type: ignore[assignment]
    if given.get("id") is not None:
        args["id"] = given["id"]
    return op, actor, flow_id, None, args


def _add_target(
    given: dict[str, Any], state: FlowState | None, args: dict[str, Any], flow_id: str
) -> str | None:
    """What is answered: a key, a step of a flow, its own wait, or whatever a token stands for."""
    match given["by"]:
        case "key":
            own = state.own.key if state is not None and state.own is not None else None
            fields = canonical(_FIELDS.get(given["key"], {"kind": "reply"}))
            args["fields"] = own if given["key"] == "own" and own is not None else fields
            return None
        case "token":
            tokens = [] if state is None else _tokens(state)
            args["token"] = tokens[given["which"] % len(tokens)] if tokens else "no such token"
            return None
        case "name":
            args["name"] = given["step"]
    return flow_id


def _tokens(state: FlowState) -> list[str]:
    """The tokens of a flow's waits, newest first."""
    waits = [task.wait for task in reversed(state.tasks.values()) if task.wait is not None]
    own = [] if state.own is None else [state.own]
    return [wait.token for wait in (*own, *waits) if wait.token is not None]


def _ballot(
    world: World, given: dict[str, Any], state: FlowState | None, token: str, flow_id: str
) -> dict[str, Any]:
    """A vote on what the flow asks, or will ask."""
    kind = given["decision"]
    items = {**items_of(flow_id), "edited": token}
    args: dict[str, Any] = {
        "decision": kind,
        "approver": given["approver"] or "dee",
        "comment": token,
        "digest": "0" * 64 if given["digest"] == "wrong" else _digest(flow_id),
    }
    task = None if state is None else state.run("approval")
    if given["digest"] == "right" and task is not None and task.is_active:
        args["digest"] = _digest_on_disk(world, task) or args["digest"]
    if kind == "edit":
        args["items"] = items
    if given["to"] == "token" and task is not None and task.wait is not None:
        args["token"] = task.wait.token
    else:
        args["name"] = "approval"
    return args


def _digest(flow_id: str) -> str:
    rules = Rules(quorum=QUORUM, veto=("*",) if turn(flow_id, 3) != 1 else ())
    items = msgspec.Raw(msgspec.json.encode(items_of(flow_id)))
    return shown_digest(items, rules, prompt=PROMPT, flow_id=flow_id, step="approval")


def _digest_on_disk(world: World, task: TaskState) -> str | None:
    """What voters are shown now: another digest after each edit."""
    tables = world.disk.written
    if task.task_id not in tables.task_keys:
        return None
    doc = json.loads(tables.tasks[tables.task_keys[task.task_id]].doc)
    found: str = doc["wait"]["approval"]["digest"]
    return found


# ---- judging --------------------------------------------------------------------------------------


def explain_full(world: World, call: Call) -> bool:
    """Refused because too much is waiting: then too much may have waited, and nothing has come of it."""
    call.verdict = "failed"
    if world.desk.has_come(call):
        raise Wrong(f"{call.name} has come, and was answered {call.error!r}")
    logs = world.flows_of(call.actor)
    if call.flow_id is not None:
        logs = [log for log in logs if log.now.flow_id == call.flow_id]
    most = max(
        (
            sum(task.letter is not None and task.is_active for task in state.tasks.values())
            for log in logs
            for state in log.states
            if state is not None
        ),
        default=0,
    )
    # Also a crowd around a flow of which nothing is on record: its creation may have died with the process.
    is_crowded = judge._crowd(world, call) > spec.MAILBOX or any(
        judge._crowd(world, replace(call, flow_id=log.now.flow_id)) > spec.MAILBOX for log in logs
    )
    if most < spec.MESSAGES and not is_crowded:
        raise Wrong(f"{call.name} was refused as overloaded without a crowd")
    return True


def _signal(world: World, call: Call) -> Seen:
    judge._no_error(call)
    report, taken = call.result, world.desk.taken.get(call.token, [])
    code = report.code.value
    world.seen[f"signal {code}"] += 1
    if (report.matched, report.kept) != (len(report.flow_ids), code == "kept"):
        raise Wrong("the report contradicts itself")
    if code == "matched":
        if sorted(report.flow_ids) != sorted(one.flow[1] for one in taken):
            raise Wrong(f"it woke {taken}")
        if call.args.get("fields") is not None:
            _check_all_were_woken(world, call, taken)
        return judge._made(world, call, min(one.position for one in taken))
    if code == "kept":
        return _kept(world, call)
    if world.desk.has_come(call):
        raise Wrong(f"it has come all the same: {taken}")
    if code == "duplicate":
        if not any(_may_have_come(world, other) for other in world.desk.same_id(call)):
            raise Wrong("nobody has sent this before")
        return _anywhere(world, call, "refused")
    return _expected(world, call, code, "refused")


def _kept(world: World, call: Call) -> Seen:
    if not (call.token in world.desk.kept or call.token in world.desk.letters):
        raise Wrong("it was not kept")
    return _expected(world, call, "kept", "kept")


def _may_have_come(world: World, call: Call) -> bool:
    is_unknown = call.invoked > 0 and call.verdict in ("open", "unknown", "failed")
    return world.desk.has_come(call) or is_unknown


def _anywhere(world: World, call: Call, verdict: str) -> Seen:
    assert call.returned is not None
    call.verdict = verdict
    return Seen(call.name, call.invoked, call.returned, [(0, world.order.last)])


def _expected(world: World, call: Call, code: str, verdict: str) -> Seen:
    """What was answered has to be what is to be answered, at some instant while the call was under way."""
    if call.flow_id is not None:
        allowed = _addressed if call.op == "signal" else _told
        return judge._seen(world, call, lambda state: code in allowed(call, state), verdict=verdict)
    seen = judge._whole(world, call, lambda at: code in _by_key_or_token(world, call, at))
    call.verdict = verdict
    return seen


def _by_key_or_token(world: World, call: Call, at: int) -> set[str]:
    if call.args.get("token") is not None:
        return _by_token(world, call, at)
    key = call.args["fields"]
    states = judge._states_at(world, call.actor, at)
    waits = [(state, wait) for state in states for wait in _answerable(state, key)]
    codes = set[str]()
    for state, wait in waits:
        codes |= _in_time(call, wait) if state.intent is None else {"late"}
    if codes == {"matched"}:
        return codes
    if call.args.get("lifetime", 1.0) is not None:
        # Whoever it is too late for, somebody else may wait for it yet.
        return (codes - {"late"}) | {"kept"}
    return codes | _nobody(world, call, at)


def _nobody(world: World, call: Call, at: int) -> set[str]:
    """What is answered where nobody waits, to what is not to be kept: late, if all that ever did have ended.

    Of its own waits a flow remembers the last, until its controller waits; what it knows of others is not promised.
    """
    key, logs = call.args["fields"], world.flows_of(call.actor)
    live, over, is_withdrawn = list[set[str]](), list[set[str]](), False
    for log in logs:
        if (state := log.at(at)) is not None and (ways := _ever_waited(log, key, at)):
            (over if state.has_ended else live).append(ways)
            is_withdrawn |= state.intent is not None
    # A wait that has just been withdrawn may be found still, and be over when the signal gets there.
    codes = {"late"} if is_withdrawn else set[str]()
    if over and not any("child" in ways for ways in live):
        codes.add("late")
    if live or not any("child" in ways for ways in over):
        codes.add("unawaited")
    return codes


def _answerable(state: FlowState, key: str) -> list[WaitState]:
    """The open waits of a flow on a key."""
    if state.has_ended:
        return []
    waits = [task.wait for task in state.open_waits]
    return [w for w in (*waits, state.own) if w is not None and w.key == key]


def _in_time(call: Call, wait: WaitState) -> set[str]:
    """What may be answered to a call that names a wait that is open."""
    if wait.kind not in ("signal", "message"):
        return {"unawaited"}
    first, last = call.walls
    codes = set[str]()
    if not wait.is_closed(first):
        codes.add("matched")
    if wait.is_closed(last):
        codes.add("late")
    return codes


def _ever_waited(log: FlowLog, key: str, at: int) -> set[str]:
    """Whether a flow has ever waited for this: itself, or a child for it."""
    states = [s for s, since in zip(log.states, log.positions, strict=True) if s and since <= at]
    ways = {"itself" for state in states if state.own is not None and state.own.key == key}
    tasks = states[-1].tasks.values() if states else ()
    return ways | {"child" for task in tasks if task.wait is not None and task.wait.key == key}


def _by_token(world: World, call: Call, at: int) -> set[str]:
    token = call.args["token"]
    owner = judge.ADMIN if call.actor == ANYBODY else call.actor
    for state in judge._states_at(world, owner, at):
        if state.own is not None and state.own.token == token:
            return _when_open(call, state, state.own)
        for task in state.tasks.values():
            if task.wait is not None and task.wait.token == token:
                if not task.is_active:
                    return {"late"}
                return _when_open(call, state, task.wait)
    was_one = any(
        state is not None and state.own is not None and state.own.token == token
        for log in world.flows_of(owner)
        for state, since in zip(log.states, log.positions, strict=True)
        if since <= at
    )
    return {"late"} if was_one else {"not_found"}


def _when_open(call: Call, state: FlowState, wait: WaitState) -> set[str]:
    if state.has_ended or state.intent is not None:
        return {"late"}
    return _in_time(call, wait)


def _addressed(call: Call, state: FlowState | None) -> set[str]:
    """What a signal to a step of a flow, or to its own wait, has to be answered with."""
    if state is None or state.mirrored:
        return {"not_found"}
    if state.has_ended or state.intent is not None:
        return {"late"}
    name, is_kept = call.args.get("name"), call.args.get("lifetime", 1.0) is not None
    if name is None:
        return {"unawaited"} if state.own is None else _in_time(call, state.own)
    waits = [
        task.wait for task in state.open_waits if task.wait and task.wait.inbox == f"signal:{name}"
    ]
    if waits:
        return _in_time(call, waits[0])
    if (task := state.run(name)) is not None:
        if task.is_active:
            return {"unawaited"}
        return {"late"} if is_kept else {"late", "unawaited"}
    return {"kept"} if is_kept else {"unawaited"}


def _told(call: Call, state: FlowState | None) -> set[str]:
    """What a message has to be answered with."""
    if state is None or state.mirrored:
        return {"not_found"}
    if state.has_ended or state.intent is not None:
        return {"late"}
    inbox = f"message:{call.args['inbox']}"
    waits = [task.wait for task in state.open_waits if task.wait and task.wait.inbox == inbox]
    # What is too late for one wait is for the flow all the same.
    codes = set[str]().union(*(_in_time(call, wait) for wait in waits)) or {"late"}
    return codes if "late" not in codes else (codes - {"late"}) | {"kept"}


def _check_all_were_woken(world: World, call: Call, taken: Iterable[Any]) -> None:
    """Whoever waited for the key all the time that the call took was woken with the others."""
    taken = list(taken)
    # Others may have been answered by somebody else in the same commit.
    after = world.desk.woken_at(taken[0].tick + 1)
    began = world.desk.woken_at(call.invoked)
    woken = {one.flow for one in taken}
    for log in world.flows_of(call.actor):
        first, then = log.at(began), log.at(after)
        if first is None or then is None or then.intent is not None:
            continue
        names = {_name(wait) for wait in _answerable(first, call.args["fields"])}
        left = [
            wait
            for wait in _answerable(then, call.args["fields"])
            if _name(wait) in names and not wait.is_over(call.walls[1])
        ]
        if left and (then.owner, then.flow_id) not in woken:
            raise Wrong(f"{then.flow_id} waited for it as well: {left}")


def _name(wait: WaitState) -> tuple[Any, ...]:
    return (wait.token, wait.key)


def _ask(world: World, call: Call) -> Seen:
    if isinstance(call.error, e.FlowNotFound | e.FlowNotManaged):
        return judge._seen(world, call, lambda s: s is None or s.mirrored, verdict="refused")
    if isinstance(call.error, e.NotAwaited | e.CancelPending | e.IllegalTransition):
        return judge._seen(world, call, lambda s: "late" in _told(call, s), verdict="refused")
    judge._no_error(call)
    status = judge.status_of(call.result)
    world.seen[f"ask {status}"] += 1
    found = world.desk.letters.get(call.token)
    task = None if found is None else world.model.task(found[1])
    if found is None or task is None or task.status != status:
        raise Wrong(f"its message is {task}")
    if status == "succeeded" and call.result.result != {"re": call.token}:
        is_linked = any(other.task_id == task.task_id for other in world.calls)
        if not is_linked:
            raise Wrong("this is no reply to what was asked")
    return judge._made(world, call, found[0])


def _vote(world: World, call: Call) -> Seen:
    judge._no_error(call)
    report = call.result
    world.seen[f"vote {'counted' if report.counted else 'kept' if report.kept else 'refused'}"] += 1
    if report.kept:
        if call.token not in world.desk.letters:
            raise Wrong("it was not kept")
        return _anywhere(world, call, "kept")
    if not report.counted:
        return _anywhere(world, call, "unknown" if report.verdict else "refused")
    for log in world.flows_of(judge.ADMIN):
        for place in range(1, len(log.states)):
            entry = world.model.entries[log.positions[place] - 1]
            if entry.type != "task.voted" or entry.changed["approver"] != call.args["approver"]:
                continue
            is_free = world.made_by.get(entry.position, call) is call
            if is_free and call.was_open_at(entry.tick) and call.actor == entry.owner:
                _check_told_verdict(world, log, entry.task_id or "", report.verdict)
                return judge._made(world, call, entry.position)
    raise Wrong("nothing in the history says so")


def _check_told_verdict(world: World, log: FlowLog, task_id: str, verdict: Any) -> None:
    if verdict is None:
        return
    told = json.loads(log.now.tasks[task_id].result or "null")
    if told is None or told["verdict"] != verdict.value:
        raise Wrong(f"the approval came out as {told}")


def _list_waits(world: World, call: Call) -> Seen:
    judge._no_error(call)
    told = sorted((w.flow_id, w.name or "", w.kind, w.token or "") for w in call.result)

    def waits_at(position: int) -> list[tuple[str, str, str, str]]:
        found = []
        for state in judge._states_at(world, call.actor, position):
            if not state.has_ended:
                found += _listed(state)
        return sorted(found)

    return judge._whole(world, call, lambda position: waits_at(position) == told)


def _listed(state: FlowState) -> list[tuple[str, str, str, str]]:
    found = [
        (state.flow_id, task.run_id or "", task.wait.kind, task.wait.token)
        for task in state.open_waits
        if task.wait is not None and task.wait.token is not None
    ]
    if (
        state.own is not None
        and state.own.token is not None
        and state.status in ("waiting", "blocked")
    ):
        found.append((state.flow_id, "", state.own.kind, state.own.token))
    return found


def _list_updates(world: World, call: Call) -> Seen | None:
    judge._no_error(call)
    call.verdict = "read"
    ends = [update.flow_id for update in call.result if update.kind == "done"]
    if len(set(ends)) != len(ends):
        raise Wrong("an end is told twice")
    for update in call.result:
        if update.owner_key != call.actor:
            raise Wrong(f"this is somebody else's: {update}")
    return None


JUDGES: dict[str, Callable[[Any, Call], Seen | None]] = {
    "signal": _signal,
    "answer": _signal,
    "tell": _signal,
    "ask": _ask,
    "vote": _vote,
    "list_waits": _list_waits,
    "list_updates": _list_updates,
}
