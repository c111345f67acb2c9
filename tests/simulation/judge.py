"""Whether a call was answered rightly: what it was asked with, what it may answer, and where that was true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flowstead import (
    Applied,
    Created,
    Flow,
    Retry,
    RuntimeClosed,
    StoreError,
    Task,
)
from flowstead import errors as e
from flowstead.model.task import Outcome
from tests.simulation import answers
from tests.simulation import model as spec
from tests.simulation.linear import Seen
from tests.simulation.model import (
    APPLIED,
    REFUSED,
    Answer,
    Entry,
    FlowLog,
    FlowState,
    TaskState,
    Wrong,
    canonical,
)
from tests.simulation.operations import ADMIN, OWNERS, Call, Spec, told_as

if TYPE_CHECKING:
    from tests.simulation.machine import World

NOBODY = "nobody-0000"
_LARGE = "x" * (2 * spec.STATE_BYTES)
_CODES: dict[type[Exception], str] = {
    e.CancelPending: "cancel_requested",
    e.TaskNotLinked: "not_linked",
    e.InvalidState: "invalid_state",
    e.StateTooLarge: "state_too_large",
}
_MUTATIONS = frozenset({"set_waiting", "resume", "update", "finish", "fail", "request_cancel"})
_REPORTS = frozenset({"start_task", "progress_task", "complete_task", "fail_task"})
_LOOKS_AFTERWARDS = frozenset(
    {"cancel", "cancel_task", "run_task", "retry_task", "spawn_detached", "ask", *_REPORTS}
)
"""Operations that read after they have changed something; if that read fails, nobody knows."""

# ---- what a call is asked with --------------------------------------------------------------------


def resolve(
    world: World, asked: Spec, number: int
) -> tuple[str, str, str | None, str | None, dict[str, Any]]:
    """The operation, who calls it, on which flow or child, and with which arguments."""
    op, given = asked
    token = f"t{number}"
    if op == "create_managed":
        args = _creation(given, token)
        return op, given["owner"], args.get("flow_id"), None, args
    if op == "spawn_detached":
        return op, given["owner"], None, None, _new_task({**given, "run_id": None}, token)
    if "task" in given:
        owner, task_id = _some_task(world, given["task"])
        actor, task_id = _actor(owner, given["whose"], task_id)
        return op, actor, None, task_id, _task_args(op, given, token)
    owner, flow_id = _some_flow(world, given["flow"])
    actor, flow_id = _actor(owner, given["whose"], flow_id)
    state = _state_now(world, actor, flow_id)
    if op in answers.OPERATIONS:
        about = _state_now(world, owner, flow_id)
        return answers.resolve(world, op, given, token, about, actor, flow_id)
    return op, actor, flow_id, None, _flow_args(world, op, given, token, state, actor, flow_id)


def _some_flow(world: World, index: int | str) -> tuple[str, str]:
    """The flow of that id, or so many before the newest."""
    logs = world.flows_of(ADMIN)
    if isinstance(index, str):
        named = [log.now for log in logs if log.now.flow_id == index]
        return (named[0].owner, index) if named else (OWNERS[0], index)
    if not logs:
        return OWNERS[0], NOBODY
    state = logs[index % len(logs)].now
    return state.owner, state.flow_id


def _some_task(world: World, index: int | str) -> tuple[str, str]:
    """The child of that id, or so many before the newest."""
    tasks = list(world.model.home)
    if isinstance(index, str):
        return world.model.home.get(index, (OWNERS[0],))[0], index
    if not tasks:
        return OWNERS[0], NOBODY
    task_id = tasks[-1 - index % len(tasks)]
    return world.model.home[task_id][0], task_id


def _actor(owner: str, whose: str, name: str) -> tuple[str, str]:
    match whose:
        case "foreign":
            return OWNERS[1] if owner == OWNERS[0] else OWNERS[0], name
        case "unknown":
            return owner, NOBODY
        case "admin":
            return ADMIN, name
        case _:
            return owner, name


def _state_now(world: World, actor: str, flow_id: str) -> FlowState | None:
    found = [log.now for log in world.flows_of(actor) if log.now.flow_id == flow_id]
    return found[0] if found else None


def _creation(given: dict[str, Any], token: str) -> dict[str, Any]:
    key = given["key"]
    args: dict[str, Any] = {
        "controller_id": given["controller"],
        "goal": f"goal {token}" if key is None else f"{key} {given['variant']}",
        "status": given["status"],
        "state_json": {"made": 1},
        "notify_policy": "done_only" if key is not None else given["policy"],
    }
    if key is not None:
        # The same key must come with the same arguments.
        args.update(controller_id="shop/triage", status="queued", idempotency_key=key)
        return args
    for name, value in (("flow_id", given["given"]), ("correlation_id", given["correlation"])):
        if value is not None:
            args[name] = value
    if given["status"] in ("waiting", "blocked"):
        is_shared = given["wait"] == "thread"
        args["wait_json"] = {"thread": "A"} if is_shared else {"kind": "reply"}
    return args


def _task_args(op: str, given: dict[str, Any], token: str) -> dict[str, Any]:
    match op:
        case "progress_task":
            return {"summary": token if given["summary"] else None}
        case "complete_task":
            args: dict[str, Any] = {"terminal_summary": token, "result_json": {"token": token}}
            if given["outcome"] is not None:
                args["terminal_outcome"] = given["outcome"]
            return _with_defect(args, given["result"])
        case "fail_task":
            return {"error": token, "status": given["status"]}
        case "cancel_task":
            return {"grace": given["grace"]}
        case "retry_task":
            args = {"input_json": {"do": "succeed", "by": token}} if given["input"] == "new" else {}
            return _with_defect(args, given["input"])
        case _:
            return {}


def _with_defect(args: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "nan":
        args.update(defect="invalid_state", bad={"value": float("nan")})
    elif kind == "large":
        args.update(defect="state_too_large", bad=_LARGE)
    return args


def _flow_args(
    world: World,
    op: str,
    given: dict[str, Any],
    token: str,
    state: FlowState | None,
    actor: str,
    flow_id: str,
) -> dict[str, Any]:
    if op == "run_task":
        return _new_task(given, token)
    if op == "list":
        return _query(world, given, actor)
    if op == "resolve":
        return {"token": _spoken(given["by"], state, actor, flow_id)}
    args: dict[str, Any] = {}
    for name in ("status", "after_seq", "limit", "one", "grace", "nested"):
        if given.get(name) is not None:
            args[name] = given[name]
    revision = _revision(given.get("revision", "none"), state)
    if revision is not None:
        args["expected_revision"] = revision
    if given.get("step", "unset") != "unset":
        args["current_step"] = token if given["step"] == "token" else None
    match given.get("state", "unset"):
        case "small":
            args["state_json"] = {"by": token}
        case "none":
            args["state_json"] = None
        case "nan" | "large" as kind:
            _with_defect(args, kind)
    if op == "set_waiting":
        _add_wait(world, given, token, args)
    match given.get("blocked", "no"):
        case "task":
            args["blocked_task_id"] = f"{token} blocks"
        case "summary":
            args["blocked_summary"] = f"{token} is in the way"
    return args


def _add_wait(world: World, given: dict[str, Any], token: str, args: dict[str, Any]) -> None:
    """What to wait for, and how long."""
    kind = given["wait"]
    wait = {"thread": "A"} if kind == "thread" else {"kind": "reply", "by": token}
    soon = world.wall + 3000
    if kind == "deadline":
        wait |= {"deadlineAt": soon, "onTimeout": given["on_timeout"]}
    elif kind == "wake":
        wait |= {"wakeAt": soon}
    elif kind == "remind":
        wait |= {"deadlineAt": soon + 2000, "remindAt": [soon, soon - 1000], "onTimeout": "resume"}
    elif kind == "bad":
        wait |= {"deadlineAt": "soon"}
        args.pop("bad", None)
        args.pop("state_json", None)
        args["defect"] = "invalid_state"
    args["wait_json"] = wait


def _revision(kind: str, state: FlowState | None) -> int | None:
    now = 0 if state is None else state.revision
    if kind == "none":
        return None
    return {"right": now, "stale": max(now - 1, 0), "future": now + 3, "negative": -1}[kind]


def _new_task(given: dict[str, Any], token: str) -> dict[str, Any]:
    args: dict[str, Any] = {"task": token}
    if given["run_id"] is not None:
        args["run_id"] = given["run_id"]
    if given["kind"] == "linked":
        args.update(runtime="acp", status=given["begun"])
        return _with_defect(args, given["input"])
    # A step of a controller goes by the same name, so the names of children of other kinds differ.
    doing = "fail once" if given["kind"] == "flaky" and given["doing"] == "fail" else given["doing"]
    args.update(run=given["kind"], input_json={"do": doing})
    if given["kind"] == "nested":
        args["nested"] = given["nested"]
    elif given["once"]:
        args["idempotent"] = False
    elif given["retry"] and given["kind"] in ("work", "tool", "narrow", "timed", "quiet"):
        args["retry"] = Retry(max_attempts=2, initial=2.0, jitter=0.0)
    if given["queue_timeout"] is not None:
        args["queue_timeout"] = given["queue_timeout"]
    return _with_defect(args, given["input"])


def _query(world: World, given: dict[str, Any], actor: str) -> dict[str, Any]:
    names = {"status": "status", "controller": "controller_id", "correlation": "correlation_id"}
    args = {name: given[short] for short, name in names.items() if given[short] is not None}
    args["limit"] = given["limit"]
    if given["after"] == "unknown":
        args["after"] = NOBODY
    elif given["after"] is not None:
        logs = world.flows_of(actor)
        args["after"] = logs[given["after"] % len(logs)].now.flow_id if logs else NOBODY
    return args


def _spoken(by: str, state: FlowState | None, actor: str, flow_id: str) -> str:
    match by:
        case "owner":
            return actor
        case "prefix":
            return flow_id[:4]
        case "long prefix":
            return flow_id[:-1]
        case "id":
            return f"  {flow_id} "
        case _:
            return by


# ---- who is behind an event -----------------------------------------------------------------------


def attribute(world: World, entry: Entry) -> None:
    """Find the call behind an event; an event of a caller's must lie within a call of his.

    Raises:
        Wrong: Nobody asked for it, it was refused before, or it happened twice.
    """
    if entry.actor in ("runtime", "controller", "signal", "token"):
        return
    flow_id = entry.event["flowId"]
    token = _token_of(entry)
    if token is not None:
        call = world.calls[int(token[1:])]
        if call.verdict in ("refused", "failed", "read"):
            raise Wrong(f"{call.name} was answered with {call.verdict}, and now: {entry}")
        if call.of_zombie:
            raise Wrong(f"{call.name} was made to a runtime that had been overtaken: {entry}")
        if call in world.made_by.values():
            raise Wrong(f"{call.name} was applied twice: {entry}")
        if call.actor != entry.actor or call.actor != entry.owner:
            raise Wrong(f"{call.name} changed somebody else's flow: {entry}")
        world.made_by[entry.position] = call
    for call in reversed(world.calls):
        about = call.flow_id
        if call.op == "retry_flow":
            made = world.model.flows[(entry.owner, flow_id)].now.retry_of
            about = flow_id if made == call.flow_id else about
        if call.op == "spawn_detached" or (call.op == "signal" and about is None):
            about = flow_id
        if call.task_id is not None:
            about = world.model.home.get(call.task_id, ("", None))[1]
        if call.op == "create_managed" and about is None:
            about = flow_id
        if call.actor == entry.actor and about == flow_id and call.was_open_at(entry.tick):
            return
    raise Wrong(f"nobody asked for {entry}")


def _token_of(entry: Entry) -> str | None:
    """The token of the call whose own event this is, if the event carries it."""
    changed = entry.changed
    is_carried = entry.type == "task.created" and changed["status"] in spec.FINAL_TASKS
    if is_carried or "retryOf" in changed:
        return None  # it repeats what was said in the flow that this one goes on from
    match entry.type:
        case "flow.created":
            found = str(changed["goal"]).removeprefix("goal ")
        case "task.created":
            found = changed["task"]
        case "task.progressed":
            found = changed.get("progressSummary")
        case "task.ended":
            found = changed.get("terminalSummary") or (changed.get("failure") or {}).get("message")
        case "flow.waiting" | "flow.blocked" | "flow.resumed" | "flow.updated":
            found = changed.get("currentStep")
        case "flow.succeeded" | "flow.failed":
            found = changed.get("currentStep")
        case _:
            return None
    is_token = isinstance(found, str) and found[:1] == "t" and found[1:].isdigit()
    return found if is_token else None


# ---- judging --------------------------------------------------------------------------------------


def judge(world: World, call: Call) -> None:
    """Say what became of an answered call, and put it in its place in the order of all calls.

    Raises:
        Wrong: It cannot have been answered like that.
    """
    if call.overtaken:
        # What a runtime that was overtaken still remembers is nobody's truth; what it changes is nothing.
        call.verdict = "unknown"
        # Going on with a flow again answers what is remembered, and changes nothing.
        changed = isinstance(call.result, (Applied, Created)) and call.op != "retry_flow"
        if call.of_zombie and changed:
            raise Wrong(f"{call.name}: a runtime that was overtaken answered {call.result}")
        return
    if _explain_failure(world, call):
        return
    try:
        seen = _JUDGES[call.op](world, call)
    except Wrong as wrong:
        raise Wrong(f"{wrong}\n{call.name}\nanswered {call.result or call.error!r}") from None
    if seen is not None:
        assert call.returned is not None
        try:
            world.order.take(seen)
        except Wrong as wrong:
            told = call.result if call.error is None else repr(call.error)
            raise Wrong(f"{wrong}\nanswered {told}") from None


def _explain_failure(world: World, call: Call) -> bool:
    """Whether the call failed for a reason of the world's, which must have been there."""
    error, code = call.error, getattr(call.result, "code", None)
    world.seen[f"code {code or (type(error).__name__ if error else None)}"] += 1
    if code in ("persist_failed", "outcome_unknown") or isinstance(
        error, (StoreError, RuntimeClosed)
    ):
        if not call.troubled:
            raise Wrong(f"{call.name} failed in a calm world: {call.result or error!r}")
        unknown = code == "outcome_unknown" or isinstance(error, e.OutcomeUnknown)
        looked = (
            isinstance(error, (e.StoreUnusable, RuntimeClosed)) and call.op in _LOOKS_AFTERWARDS
        )
        call.verdict = "unknown" if unknown or looked else "failed"
        if call.verdict == "failed" and call in world.made_by.values():
            raise Wrong(f"{call.name} was applied, but answered {call.result or error!r}")
        return True
    if isinstance(error, e.MailboxFull) and call.op in answers.OPERATIONS:
        return answers.explain_full(world, call)
    if code == "overloaded" and "mutations waiting" in call.result.reason:
        return _is_crowded(world, call)
    if isinstance(error, e.MailboxFull):
        return _is_crowded(world, call)
    if isinstance(error, ValueError) and call.args.get("expected_revision", 0) < 0:
        call.verdict = "refused"
        return True
    return False


def _is_crowded(world: World, call: Call) -> bool:
    call.verdict = "failed"
    if _crowd(world, call) <= spec.MAILBOX:
        raise Wrong(f"{call.name} was refused as overloaded without a crowd")
    return True


def _crowd(world: World, call: Call) -> int:
    """How much mail there may have been beside this call: other calls, and reports on the flow's children."""
    assert call.returned is not None
    logs = [*_logs_named(world, call.actor, call.flow_id), *_logs_of_task(world, call)]
    reports = max((len(log.now.tasks) + 1 for log in logs), default=0)
    return reports + sum(
        0 < one.invoked < call.returned
        and (one.returned or one.died or call.returned) > call.invoked
        for one in world.calls
    )


def _ranges(
    world: World, call: Call, logs: Iterable[FlowLog], is_right: Callable[[FlowState | None], bool]
) -> list[tuple[int, int]]:
    """The positions at which something is right of a flow: of the newest of those given that is there."""
    ordered = sorted(logs, key=lambda log: -log.key)
    floor, last = world.order.acknowledged(call.invoked), world.order.last
    since = {position for log in ordered for position in log.positions} | {0}
    starts = sorted({max(position, floor) for position in since})
    found: list[tuple[int, int]] = []
    for start, end in zip(starts, [*(start - 1 for start in starts[1:]), last], strict=True):
        states = (log.at(start) for log in ordered)
        state = next((state for state in states if state is not None), None)
        if start <= end and is_right(state):
            found.append((start, end))
    return found


def _logs_named(world: World, actor: str, flow_id: str | None) -> list[FlowLog]:
    return [log for log in world.flows_of(actor) if log.now.flow_id == flow_id]


def _logs_meant(world: World, call: Call, flow: Flow) -> list[FlowLog]:
    """The flow a call settled on when it began; for operators an id may mean another one later."""
    logs = _logs_named(world, call.actor, flow.flow_id)
    return [log for log in logs if log.now.owner == flow.owner_key]


def _logs_of_task(world: World, call: Call) -> list[FlowLog]:
    named = world.model.home.get(call.task_id or "")
    if named is None or call.actor not in (ADMIN, named[0]):
        return []
    return [world.model.flows[named]]


def _seen(
    world: World,
    call: Call,
    is_right: Callable[[FlowState | None], bool],
    *,
    logs: list[FlowLog] | None = None,
    is_read: bool = False,
    verdict: str = "read",
) -> Seen:
    """A call that changed nothing, with the positions at which it was answered rightly."""
    about = _logs_named(world, call.actor, call.flow_id) if logs is None else logs
    assert call.returned is not None
    call.verdict = verdict
    if call in world.made_by.values():
        raise Wrong(f"{call.name} was applied, but answered {call.result or call.error!r}")
    ranges = _ranges(world, call, about, is_right)
    return Seen(call.name, call.invoked, call.returned, ranges, is_read=is_read)


def _made(world: World, call: Call, position: int) -> Seen:
    assert call.returned is not None
    call.verdict = "applied"
    known = world.made_by.setdefault(position, call)
    if known is not call:
        raise Wrong(f"{known.name} made position {position} as well")
    return Seen(call.name, call.invoked, call.returned, made=position)


def view_of(flow: Flow) -> Answer:
    """A flow as it was handed out, in the terms of the specification."""
    failure = None if flow.failure is None else flow.failure.kind
    shape = (
        flow.flow_id, flow.owner_key, flow.controller_id, flow.goal, flow.correlation_id,
        flow.revision, flow.status.value, flow.current_step, canonical(flow.state_json),
        canonical(flow.wait_json), flow.blocked_task_id, flow.blocked_summary, failure,
        flow.cancel_requested_at is not None, flow.cancel_started_at is not None, flow.ended_at is not None,
        flow.sync_mode == "task_mirrored", flow.parent_task_id, flow.retry_of, canonical(flow.answer_json),
    )  # fmt: skip
    return (*shape, flow.cancel_requested_at, flow.cancel_started_at, flow.ended_at)


def task_view(task: Task) -> Answer:
    """A child as it was handed out, in the terms of the specification."""
    failure = task.failure
    told = None if failure is None else (failure.kind, failure.code, failure.category)
    return (
        task.task_id, task.run_id, task.task, task.status.value, task.attempt, task.progress_summary,
        task.terminal_summary, told, task.child_flow_id, task.next_attempt_at, task.review_requested_at,
        task.cancel_requested_at, task.kill_requested_at, task.ended_at,
    )  # fmt: skip


def status_of(outcome: Outcome) -> str:
    """The status of a child that ended like that."""
    name = type(outcome).__name__.lower()
    return {"timedout": "timed_out"}.get(name, name)


def _view_or_none(flow: Flow | None) -> Answer | None:
    return None if flow is None else view_of(flow)


def _state_view(state: FlowState | None) -> Answer | None:
    return None if state is None else state.view()


# ---- mutations ------------------------------------------------------------------------------------


def _create(world: World, call: Call) -> Seen | None:
    args, key = call.args, call.args.get("idempotency_key")
    if isinstance(call.error, e.FlowExists):
        if key is not None:
            named = [
                log
                for log in world.flows_of(call.actor)
                if log.now.goal.startswith(f"{key} ") and log.now.retry_of is None
            ]
            others = [log for log in named if log.now.goal != args["goal"]]
            return _seen(
                world, call, lambda state: state is not None, logs=others, verdict="refused"
            )
        return _seen(world, call, lambda state: state is not None, verdict="refused")
    _no_error(call)
    view = view_of(call.result)
    [log] = _logs_named(world, call.actor, call.result.flow_id)
    first = log.states[1]
    assert first is not None
    if first.goal != args["goal"] or first.controller != args["controller_id"]:
        raise Wrong(f"another flow was answered: {first}")
    if args.get("flow_id") not in (None, first.flow_id):
        raise Wrong(f"the flow has another id: {first.flow_id}")
    created = log.positions[1]
    known = world.made_by.get(created)
    fresh = call.was_open_at(world.model.entries[created - 1].tick)
    if key is None or (known is None and fresh and view == first.view()):
        expected = (args["status"], canonical(args["state_json"]), canonical(args.get("wait_json")))
        if view != first.view() or (first.status, first.state, first.wait) != expected:
            raise Wrong(f"the flow began as {first}")
        return _made(world, call, created)
    return _seen(world, call, lambda state: _state_view(state) == view, logs=[log])


def _mutation(world: World, call: Call) -> Seen:
    _no_error(call)
    args, result = call.args, call.result
    if not isinstance(result, Applied):
        answer = (REFUSED, result.code.value, _view_or_none(result.current))
        return _seen(
            world,
            call,
            lambda state: spec.expect_mutation(state, call.op, args) == answer,
            verdict="refused",
        )
    [log] = _logs_named(world, call.actor, call.flow_id)
    place = next(
        (i for i, s in enumerate(log.states) if s and s.revision == result.flow.revision), 0
    )
    after = log.states[place]
    if after is None or after.view() != view_of(result.flow):
        raise Wrong(f"lost update: the history has {after}")
    expected = spec.expect_mutation(log.states[place - 1], call.op, args)
    if expected != (APPLIED, after.shape()):
        raise Wrong(f"expected {expected}, the history has {after}")
    return _made(world, call, log.positions[place])


def _run_task(world: World, call: Call) -> Seen:
    _no_error(call)
    args, result = call.args, call.result
    if isinstance(result, Created):
        [log] = _logs_named(world, call.actor, call.flow_id)
        place = next(
            (i for i, s in enumerate(log.states) if s and result.task.task_id in s.tasks), 0
        )
        before = log.states[place - 1]
        expected = spec.expect_run_task(before, args)
        if not place or expected != ("created", view_of(result.flow)):
            raise Wrong(f"expected {expected}, the history has {before}")
        view = task_view(result.task)
        later = [s.tasks[result.task.task_id] for s in log.states[place:] if s is not None]
        if view not in [task.view() for task in later]:
            raise Wrong(f"the child was never like that: {later}")
        _check_new_task(call, later[0])
        return _made(world, call, log.positions[place])
    view = _view_or_none(result.flow)
    if result.code == "duplicate":
        answer: Answer = ("duplicate", result.task.task_id, view)
        [log] = _logs_named(world, call.actor, call.flow_id)
        seen = {
            s.tasks[result.task.task_id].view() for s in log.states if s and s.run(args["run_id"])
        }
        if task_view(result.task) not in seen:
            raise Wrong(f"the child was never like that: {seen}")
    else:
        answer = (REFUSED, result.code.value, view)
    return _seen(
        world, call, lambda state: spec.expect_run_task(state, args) == answer, verdict="refused"
    )


def _check_new_task(call: Call, task: TaskState) -> None:
    launched = "run" in call.args
    status = "queued" if launched else call.args["status"]
    expected = (call.args.get("run_id"), call.args["task"], launched, status)
    if (task.run_id, task.text, task.launched, task.status) != expected:
        raise Wrong(f"the child began as {task}")


def _spawn(world: World, call: Call) -> Seen:
    args, result = call.args, call.result
    assert call.returned is not None
    if call.error is not None:
        if "defect" not in args or _CODES.get(type(call.error)) != args["defect"]:
            raise Wrong("there was nothing to refuse")
        call.verdict = "refused"
        return Seen(call.name, call.invoked, call.returned, [(0, world.order.last)])
    [log] = _logs_named(world, call.actor, result.flow.flow_id)
    _, first, second = log.states[:3]
    assert first is not None and second is not None
    if not first.mirrored or view_of(result.flow) != first.view():
        raise Wrong(f"the flow began as {first}")
    _check_new_task(call, second.tasks[result.task.task_id])
    _check_child_was(log, result.task)
    return _made(world, call, log.positions[2])


def _check_child_was(log: FlowLog, task: Task) -> None:
    later = [s.tasks[task.task_id].view() for s in log.states if s and task.task_id in s.tasks]
    if task_view(task) not in later:
        raise Wrong(f"the child was never like that: {later}")


_WHY_NOT_RETRIED = {
    "Task is running.": "not_retryable",
    "Task stands in line already.": "not_retryable",
    "Task is run by somebody else.": "not_retryable",
    "Flow cancellation has already been requested.": "cancel_requested",
    "Task not found.": "not_found",
}


def _retry_task(world: World, call: Call) -> Seen:
    _no_error(call)
    report, task_id, logs = call.result, call.task_id or "", _logs_of_task(world, call)
    if not report.found:
        return _seen(
            world,
            call,
            lambda state: state is None or task_id not in state.tasks,
            logs=logs,
            verdict="refused",
        )
    [log] = logs
    _check_child_was(log, report.task)
    if report.retried:
        _check_input(world, call)
        return _made(world, call, log.positions[_place_of_retry(world, call, log)])
    reason = report.reason
    if reason.startswith("Task is already"):
        view = task_view(report.task)
        return _seen(
            world,
            call,
            lambda state: (
                state is not None and task_id in state.tasks and state.tasks[task_id].view() == view
            ),
            logs=logs,
            is_read=True,
            verdict="refused",
        )
    code = _WHY_NOT_RETRIED.get(reason, call.args.get("defect"))
    code = "terminal" if reason.startswith("Flow is already") else code
    is_crowded = "mutations waiting" in reason
    if code is None or is_crowded or (call.troubled and "defect" in call.args):
        return _failed(world, call)
    return _seen(
        world,
        call,
        lambda state: spec.expect_retry(state, task_id, call.args) == code,
        logs=logs,
        verdict="refused",
    )


def _check_input(world: World, call: Call) -> None:
    """The child has the input it was given with its next attempt, unless somebody gave it another meanwhile."""
    given = [
        one.args["input_json"]
        for one in world.calls
        if one.op == "retry_task" and one.task_id == call.task_id and "input_json" in one.args
    ]
    wanted = call.args.get("input_json")
    found = call.result.task.input_json
    if wanted is not None and (found not in given or (found != wanted and len(given) == 1)):
        raise Wrong(f"its input is {found}, not {wanted}")


def _place_of_retry(world: World, call: Call, log: FlowLog) -> int:
    """Where in the flow's history the child's next attempt was asked for."""
    for place in range(1, len(log.states)):
        entry = world.model.entries[log.positions[place] - 1]
        if (entry.type, entry.task_id) != ("task.retry_requested", call.task_id):
            continue
        is_open = entry.actor == call.actor and call.was_open_at(entry.tick)
        if is_open and world.made_by.get(entry.position, call) is call:
            refused = spec.expect_retry(log.states[place - 1], call.task_id or "", call.args)
            if refused is not None:
                raise Wrong(f"it had to be refused: {refused}")
            return place
    raise Wrong("nothing in the history says so")


def _failed(world: World, call: Call) -> Seen:
    """Nothing changed, for no reason of the call's own: the world must have had one."""
    if not (call.troubled or _crowd(world, call) > spec.MAILBOX):
        raise Wrong("failed in a calm world")
    call.verdict = "failed"
    return Seen(call.name, call.invoked, call.returned or 0, [(0, world.order.last)])


def _retry_flow(world: World, call: Call) -> Seen:
    _no_error(call)
    result = call.result
    if not isinstance(result, Applied):
        code, view = result.code.value, _view_or_none(result.current)

        def is_right(state: FlowState | None) -> bool:
            return (code, view) == (spec.expect_retry_flow(state), _state_view(state))

        return _seen(world, call, is_right, verdict="refused")
    view = view_of(result.flow)
    found = _logs_named(world, call.actor, result.flow.flow_id)
    log = next(log for log in found if log.now.owner == result.flow.owner_key)
    first, created = log.states[1], log.positions[1]
    assert first is not None
    if first.retry_of != call.flow_id:
        raise Wrong(f"it goes on from another flow: {first}")
    is_fresh = call.was_open_at(world.model.entries[created - 1].tick)
    if is_fresh and view == first.view() and world.made_by.get(created, call) is call:
        _check_successor(world, call, log)
        return _made(world, call, created)
    return _seen(world, call, lambda state: _state_view(state) == view, logs=[log])


def _check_successor(world: World, call: Call, log: FlowLog) -> None:
    """The new flow begins with the last state of the old one, and with everything that had succeeded in it."""
    first = log.states[1]
    assert first is not None
    old = world.model.flows[(first.owner, first.retry_of or "")]
    before = old.at(world.order.acknowledged(call.invoked))
    if spec.expect_retry_flow(old.now) is not None:
        raise Wrong(f"there was nothing to retry: {old.now}")
    if (first.state, first.step, first.goal) != (old.now.state, old.now.step, old.now.goal):
        raise Wrong(f"it begins otherwise than that ended: {first}, {old.now}")
    ended = () if before is None else before.tasks.values()
    # What was approved was approved for the flow that asked.
    kept = [task for task in ended if task.wait is None or task.wait.kind != "approval"]
    named = {(task.run_id, task.text) for task in kept if task.status == "succeeded"}
    carried = {(task.run_id, task.text) for task in log.now.tasks.values() if task.carried}
    if any(task.run_id == "approval" and task.carried for task in log.now.tasks.values()):
        raise Wrong(f"an approval of another flow: {log.now}")
    if not named <= carried:
        raise Wrong(f"done before, and not carried over: {named - carried}")


def _report(world: World, call: Call) -> Seen:
    args, task_id = call.args, call.task_id or ""
    logs = _logs_of_task(world, call)
    if call.error is not None:
        code = _CODES.get(type(call.error))
        if code is None:
            raise Wrong("this is no answer to a report")
        return _seen(
            world,
            call,
            lambda state: spec.expect_report(state, call.op, task_id, args) == (REFUSED, code),
            logs=logs,
            verdict="refused",
        )
    if call.result is None:
        expected = ("nothing",)
        return _seen(
            world,
            call,
            lambda state: spec.expect_report(state, call.op, task_id, args) == expected,
            logs=logs,
        )
    view = task_view(call.result)
    for log in logs:
        place = _place_of_report(world, call, log, view)
        if place:
            return _made(world, call, log.positions[place])
    return _seen(
        world,
        call,
        lambda state: spec.expect_report(state, call.op, task_id, args) == ("seen", view),
        logs=logs,
    )


def _place_of_report(world: World, call: Call, log: FlowLog, view: Answer) -> int:
    """Where in the flow's history the report was recorded; 0 if it changed nothing."""
    task_id = call.task_id or ""
    kind = {"start_task": "task.started", "progress_task": "task.progressed"}.get(
        call.op, "task.ended"
    )
    for place in range(1, len(log.states)):
        entry = world.model.entries[log.positions[place] - 1]
        state = log.states[place]
        if entry.type != kind or entry.task_id != task_id or not call.was_open_at(entry.tick):
            continue
        if entry.actor != call.actor or world.made_by.get(entry.position, call) is not call:
            continue
        assert state is not None
        expected = spec.expect_report(log.states[place - 1], call.op, task_id, call.args)
        told = view[:-1] if expected[0] == "ended" else view
        if state.tasks[task_id].view() == view and expected[1:] == (told,):
            return place
    return 0


# ---- cancelling -----------------------------------------------------------------------------------


def _cancel(world: World, call: Call) -> Seen:
    _no_error(call)
    report, args = call.result, call.args
    if not report.found:
        return _seen(world, call, lambda state: state is None, verdict="refused")
    view, logs = view_of(report.flow), _logs_meant(world, call, report.flow)
    _check_descendants(world, call, report, logs[0])
    if report.cancelled or report.code == "abandoned":
        _check_cancelled(world, call, report)
        return _seen(
            world,
            call,
            lambda state: (
                state is not None and state.view() == view and state.status == "cancelled"
            ),
            logs=logs,
            is_read=True,
            verdict="applied",
        )
    if report.code == "cancel_pending":
        return _seen(
            world,
            call,
            lambda state: state is not None and state.view() == view and state.stopping is not None,
            logs=logs,
            is_read=True,
            verdict="applied",
        )
    answer = (REFUSED, report.code.value, view)

    def is_right(state: FlowState | None) -> bool:
        if spec.expect_mutation(state, "cancel", args) == answer:
            return True
        ended = state is not None and state.has_ended and state.status != "cancelled"
        return ended and report.code == "terminal" and _state_view(state) == view

    return _seen(world, call, is_right, logs=logs, verdict="refused")


def _check_cancelled(world: World, call: Call, report: Any) -> None:
    """Everything below the flow has ended, and no code of it runs but what was given up."""
    world.seen[f"cancel {report.code or 'done'}"] += 1
    left = [name for name in call.code_left if world.model.home[name][0] == report.flow.owner_key]
    if left:
        raise Wrong(f"cancelled, but {left} still run")
    if any(task.ended_at is None for task in report.tasks):
        raise Wrong("cancelled, but children are still active")
    states = Counter(line.state.value for line in report.descendants)
    # Its controller may have been given up as well, which no line tells of.
    given_up = states["abandoned"] or not report.cancelled
    going_on = [line for line in report.descendants if line.state == "running"]
    # What others run for a flow below that has ended by itself is theirs to end.
    if not all(_is_linked_below(world, line) for line in going_on) or (
        report.cancelled and given_up
    ):
        raise Wrong(f"the report says {report.code}, and its lines are {states}: {going_on}")
    if not report.cancelled and not states["abandoned"]:
        logs = _logs_meant(world, call, report.flow)
        below = [one.now.controller for log in logs for one, _ in world.model.below(log)]
        if "deaf" not in below:
            raise Wrong(
                f"the report says {report.code}, and everything of {below} stops when asked"
            )


def _is_linked_below(world: World, line: Any) -> bool:
    task = world.model.task(line.task_id)
    return task is not None and not task.launched and line.depth > 0


def _check_descendants(world: World, call: Call, report: Any, log: FlowLog) -> None:
    """One line for each child, however deep, that lived when the cancel began, and true."""
    floor = world.order.acknowledged(call.invoked)
    depths = {one.now.flow_id: (one, depth) for one, depth in world.model.below(log)}
    for line in report.descendants:
        world.seen[f"line {line.state.value}"] += 1
        one, depth = depths.get(line.flow_id, (None, 0))
        if one is None or depth != line.depth:
            raise Wrong(f"this lies elsewhere: {line}")
        since = [s for s, at in zip(one.states, one.positions, strict=True) if s and at >= floor]
        states = [s for s in (one.at(floor), *since) if s and line.task_id in s.tasks]
        if not any(_says(line, state, state.tasks[line.task_id]) for state in states):
            raise Wrong(f"it was never like that: {line}")
    if report.code in (None, "cancel_pending", "abandoned"):
        _check_all_have_lines(world, {line.task_id for line in report.descendants}, log)


def _check_all_have_lines(world: World, told: set[str], log: FlowLog) -> None:
    """No child is left out that lived when the cancel was asked for; not so where instants lie."""
    if world.seen["clock jump"]:
        return
    began = log.first_position(lambda state: state.intent is not None) or 0
    asked_at = log.now.intent or 0
    for one, _ in world.model.below(log):
        state = one.at(began)
        missed = [] if state is None else [t for t in state.active if t.task_id not in told]
        # One that ended by itself in that very instant cannot be told from one that had ended before.
        ends = [one.now.tasks[task.task_id] for task in missed]
        left = [task for task in ends if task.ended_at != asked_at or task.asked_to_stop_at]
        if left:
            raise Wrong(f"no line tells of {left}")


def _says(line: Any, flow: FlowState, task: TaskState) -> bool:
    """Whether a line tells of a child as it was."""
    if task.is_active:
        state = "running"
    elif task.failure == ("abandoned", None, None):
        state = "abandoned"
    else:
        state = "settled" if task.killed_at is None else "killed"
    asked_at = flow.intent if task.asked_to_stop_at is None else task.asked_to_stop_at
    return (
        (line.run_id, line.task, line.state.value, line.status.value, line.killed_at, line.ended_at)
        == (task.run_id, task.text, state, task.status, task.killed_at, task.ended_at)
    ) and line.asked_at in (asked_at, task.asked_to_stop_at)


def _cancel_task(world: World, call: Call) -> Seen:
    _no_error(call)
    report, task_id = call.result, call.task_id or ""
    logs = _logs_of_task(world, call)

    def task_in(state: FlowState | None) -> TaskState | None:
        return None if state is None else state.tasks.get(task_id)

    if not report.found:
        return _seen(world, call, lambda s: task_in(s) is None, logs=logs, verdict="refused")
    view, reason = task_view(report.task), report.reason or ""
    known = report.cancelled or reason.startswith(("Task is already", "Task has not stopped"))
    if not known:
        return _failed(world, call)
    if report.cancelled != (view[3] == "cancelled") and not reason.startswith("Task is already"):
        raise Wrong(f"cancelled is {report.cancelled} of {view}")

    def is_right(state: FlowState | None) -> bool:
        task = task_in(state)
        return task is not None and task.view() == view

    # It may have ended a child, so it is no mere read; but its own event cannot be told from another's.
    return _seen(world, call, is_right, logs=logs, is_read=True, verdict="applied")


# ---- reads ----------------------------------------------------------------------------------------


def _get(world: World, call: Call) -> Seen:
    _no_error(call)
    view = _view_or_none(call.result)
    return _seen(world, call, lambda state: _state_view(state) == view)


def _whole(world: World, call: Call, is_right: Callable[[int], bool]) -> Seen:
    """A read of the whole store: the commits after which it was right."""
    assert call.returned is not None
    call.verdict = "read"
    floor = world.order.acknowledged(call.invoked)
    ends = [end for end in world.order.ends if end >= floor]
    right = [(end, end) for end in ends if is_right(end)]
    return Seen(call.name, call.invoked, call.returned, right, is_read=True)


def _states_at(world: World, actor: str, position: int) -> list[FlowState]:
    found = [log.at(position) for log in world.flows_of(actor)]
    return [state for state in found if state is not None]


def _list(world: World, call: Call) -> Seen:
    args, after = call.args, call.args.get("after")
    if isinstance(call.error, ValueError):
        return _whole(
            world,
            call,
            lambda at: all(state.flow_id != after for state in _states_at(world, call.actor, at)),
        )
    _no_error(call)
    views = [view_of(flow) for flow in call.result]
    return _whole(world, call, lambda at: _listed(world, call, args, at) == views)


def _listed(world: World, call: Call, args: dict[str, Any], position: int) -> list[Answer]:
    states = _states_at(world, call.actor, position)
    status = args.get("status")
    wanted = (status,) if isinstance(status, str) else status
    cursor = None
    if args.get("after") is not None:
        cursor = next((s.key for s in states if s.flow_id == args["after"]), -1)
    found = [
        state.view()
        for state in states
        if (wanted is None or state.status in wanted)
        and args.get("controller_id") in (None, state.controller)
        and args.get("correlation_id") in (None, state.correlation)
        and (cursor is None or state.key < cursor)
    ]
    return found[: args["limit"]]


def _find_latest(world: World, call: Call) -> Seen:
    _no_error(call)
    views = [] if call.result is None else [view_of(call.result)]
    return _whole(world, call, lambda at: _listed(world, call, {"limit": 1}, at) == views)


def _resolve(world: World, call: Call) -> Seen:
    """It reads several times, so only what it answers is judged: a flow it may mean, as it was."""
    _no_error(call)
    token, found = call.args["token"].strip(), call.result
    if found is None:
        return _seen(
            world, call, lambda state: state is None, logs=_logs_named(world, call.actor, token)
        )
    meant = (
        token in (found.flow_id, found.correlation_id)
        or (token == call.actor and call.actor != ADMIN)
        or (len(token) >= 4 and found.flow_id.startswith(token))
    )
    if not meant:
        raise Wrong(f"{token!r} does not mean {found.flow_id}")
    view = view_of(found)
    logs = [log for log in world.flows_of(call.actor) if log.now.view()[:2] == view[:2]]
    return _seen(world, call, lambda state: _state_view(state) == view, logs=logs)


def _summary(world: World, call: Call) -> Seen:
    _no_error(call)
    found = call.result
    told = None
    if found is not None:
        shown = tuple(sorted((name, count) for name, count in found.by_status.items() if count))
        told = (found.total, found.active, found.failures, shown)
    nested = bool(call.args.get("nested")) and found is not None
    if nested:
        _check_sum(world, call, found.total)
    return _seen(
        world,
        call,
        lambda state: (
            (None if state is None else spec.summary_of(state)) == told
            or (nested and state is not None)
        ),
        is_read=True,
    )


def _check_sum(world: World, call: Call, total: int) -> None:
    """It is added up flow by flow, so it lies between what there was at first and what there is now."""
    floor = world.order.acknowledged(call.invoked)
    for log in _logs_named(world, call.actor, call.flow_id):
        trees = [one for one, _ in world.model.below(log)]
        least = sum(len(state.tasks) for one in trees if (state := one.at(floor)))
        if least <= total <= sum(len(one.now.tasks) for one in trees):
            return
    raise Wrong(f"there are not {total} children")


def _list_tasks(world: World, call: Call) -> Seen:
    _no_error(call)
    status = call.args.get("status")
    wanted = (status,) if isinstance(status, str) else status
    views = sorted(task_view(task) for task in call.result)

    def is_right(state: FlowState | None) -> bool:
        tasks = () if state is None else state.tasks.values()
        kept = [task.view() for task in tasks if wanted is None or task.status in wanted]
        return sorted(kept) == views

    return _seen(world, call, is_right, is_read=True)


def _get_task(world: World, call: Call) -> Seen:
    _no_error(call)
    view = None if call.result is None else task_view(call.result)

    def is_right(state: FlowState | None) -> bool:
        task = None if state is None else state.tasks.get(call.task_id or "")
        return (None if task is None else task.view()) == view

    return _seen(world, call, is_right, logs=_logs_of_task(world, call), is_read=True)


def _result(world: World, call: Call) -> Seen:
    if isinstance(call.error, e.FlowNotFound):
        return _seen(world, call, lambda state: state is None)
    _no_error(call)
    view = view_of(call.result)
    return _seen(
        world,
        call,
        lambda state: state is not None and state.has_ended and state.view() == view,
        logs=_logs_meant(world, call, call.result),
    )


def _wait_task(world: World, call: Call) -> Seen:
    logs, task_id = _logs_of_task(world, call), call.task_id or ""
    if isinstance(call.error, e.FlowNotFound):
        return _seen(
            world, call, lambda state: state is None or task_id not in state.tasks, logs=logs
        )
    _no_error(call)
    status = status_of(call.result)

    def is_right(state: FlowState | None) -> bool:
        task = None if state is None else state.tasks.get(task_id)
        return task is not None and not task.is_active and task.status == status

    return _seen(world, call, is_right, logs=logs)


def _events(call: Call) -> list[dict[str, Any]]:
    return [told_as(event) for event in call.result]


def _history(world: World, call: Call) -> Seen:
    _no_error(call)
    after, limit = call.args.get("after_seq", 0), call.args.get("limit", 1000)
    told = _events(call)

    def at(position: int) -> list[dict[str, Any]]:
        for log in _logs_named(world, call.actor, call.flow_id):
            if log.at(position) is not None:
                kept = [p for p in log.positions[1:] if p <= position][after : after + limit]
                return [world.model.entries[p - 1].event for p in kept]
        return []

    return _whole(world, call, lambda position: at(position) == told)


def _watch(world: World, call: Call) -> Seen:
    one = call.args["one"]
    if isinstance(call.error, e.FlowNotFound) and one:
        return _seen(world, call, lambda state: state is None)
    _no_error(call)
    told = _events(call)
    if one:
        logs = _logs_named(world, call.actor, call.flow_id)
        numbers = [event["seq"] for event in told]
        kept = [[world.model.entries[p - 1].event for p in log.positions[1:]] for log in logs]
        right = any(told == entries[: len(told)] for entries in kept) or not told
        if numbers != list(range(1, len(told) + 1)) or not right:
            raise Wrong("the events are not the flow's history")
    else:
        mine = [entry for entry in world.model.entries if call.actor in (ADMIN, entry.owner)]
        if told != [entry.event for entry in mine[: len(told)]]:
            raise Wrong("the events are not the history")
    if len(told) < call.owed:
        raise Wrong(f"{len(told)} events were told within seconds, of {call.owed} there were")
    call.verdict = "read"
    positions = {event.position for event in call.result}
    newest = max(positions, default=0)
    return Seen(call.name, call.invoked, call.returned or 0, [(newest, world.order.last)])


def _whatever(world: World, call: Call) -> Seen | None:
    _no_error(call)
    call.verdict = "read"
    if call.op == "list_unreadable" and call.result:
        raise Wrong("rows cannot be read")
    return None


def _no_error(call: Call) -> None:
    if call.error is not None:
        raise Wrong(f"raised {call.error!r}")


_JUDGES: dict[str, Callable[[Any, Call], Seen | None]] = {
    "create_managed": _create,
    "get": _get,
    "find_latest": _find_latest,
    "list": _list,
    "resolve": _resolve,
    "get_task_summary": _summary,
    "list_tasks": _list_tasks,
    "history": _history,
    "watch": _watch,
    "result": _result,
    "get_task": _get_task,
    "wait_task": _wait_task,
    "list_unreadable": _whatever,
    "unregistered_controllers": _whatever,
    "run_task": _run_task,
    "cancel": _cancel,
    "cancel_task": _cancel_task,
    "spawn_detached": _spawn,
    "retry_task": _retry_task,
    "retry_flow": _retry_flow,
    **answers.JUDGES,
    **dict.fromkeys(_MUTATIONS, _mutation),
    **dict.fromkeys(_REPORTS, _report),
}
