"""Every public operation as data: the choices its arguments have, and how it is called.

Whoever drives a world draws a `Spec`, an operation with one choice for each argument, from a seed or from
hypothesis; what the choices mean (the newest flow, the right revision) is settled when the call is made.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from flowstead import Nested

if TYPE_CHECKING:
    from tests.simulation.machine import World

OWNERS = ("agent:a", "agent:b")
ADMIN = "admin"

Choices = dict[str, tuple[Any, ...]]
Spec = tuple[str, dict[str, Any]]


@dataclass(eq=False)
class Call:
    """One call as it was made, and what came of it. Instants are ticks of the world."""

    number: int
    op: str
    actor: str
    flow_id: str | None
    task_id: str | None
    args: dict[str, Any]
    invoked: int
    runtime: Any = None
    returned: int | None = None
    died: int | None = None
    result: Any = None
    error: Exception | None = None
    verdict: str = "open"
    """open, then applied, refused, read, failed (nothing changed, and no reason but the world), or unknown."""
    troubled: bool = False
    """Whether the disk or the runtime was failing or closing while it waited."""
    overtaken: bool = False
    of_zombie: bool = False
    """Whether it was made to a runtime that had been overtaken already."""
    code_left: list[str] = field(default_factory=list)
    began: float = 0.0
    """The simulated second at which it was made; 0 before that."""
    walls: tuple[int, int] = (0, 0)
    """What the wall clock showed when it was made, and when it was answered, the earlier first."""
    owed: int = 0
    """How many events a watcher has to be told before it goes."""

    @property
    def token(self) -> str:
        return f"t{self.number}"

    @property
    def name(self) -> str:
        return f"{self.token} {self.op}({self.actor}, {self.flow_id}, {self.task_id}, {self.args})"

    def was_open_at(self, tick: int) -> bool:
        """Whether the call was under way at an instant."""
        ends = [end for end in (self.returned, self.died) if end is not None]
        return self.invoked < tick and (not ends or tick <= min(ends))


@dataclass(frozen=True)
class Operation:
    """How to draw it, and how to call it."""

    choices: Choices
    run: Callable[[World, Call, Any], Awaitable[Any]]
    mutates: bool = False


_FLOW: Choices = {"flow": (0, 0, 0, 1, 1, 2, 3), "whose": ("own",) * 9 + ("foreign", "unknown")}
_READ: Choices = {**_FLOW, "whose": (*("own",) * 7, "foreign", "unknown", "admin", "admin")}
_TASK: Choices = {"task": (0, 0, 0, 1, 1, 2, 3, 4), "whose": ("own",) * 8 + ("foreign", "unknown")}
_READ_TASK: Choices = {**_TASK, "whose": (*("own",) * 6, "foreign", "unknown", "admin")}
_PATCH: Choices = {
    "revision": ("right",) * 9 + ("stale", "future", "negative"),
    "step": ("token",) * 4 + ("none", "unset"),
    "state": ("unset", "unset", "small", "none", "nan", "large"),
}
_GRACE: Choices = {"grace": (0.01, 0.01, 1.0, 5.0, 40.0)}
_DOING = (
    "succeed", "succeed", "nap", "nap", "fail", "fail late", "hang", "hang", "swallow", "stubborn", "progress",
    "exit", "odd", "transient", "transient once", "transient later", "fatal", "denied", "invalid", "review",
    "review once", "murmur", "deaf", "deaf for a while",
)  # fmt: skip
KINDS = (
    "work", "work", "work", "flaky", "timed", "fragile", "bare", "picky", "quiet", "narrow", "tool", "nested",
)  # fmt: skip
_QUEUE_TIMEOUT = (None,) * 6 + (1.0, 4.0)


_WAIT = ("plain", "plain", "thread", "deadline", "deadline", "wake", "remind", "bad")
_BY = ("key", "key", "key", "key", "name", "name", "own", "own", "token")
_SIGNAL: Choices = {
    **_FLOW,
    "by": _BY,
    "key": ("A", "A", "B", "B", "C", "C", "own", "own", "nearly", "nobody"),
    "step": (
        "answer",
        "answer",
        "again",
        "reply",
        "reply",
        "maybe",
        "nap",
        "approval",
        "none such",
    ),
    "id": (None, None, None, None, "s1", "s2", "s3"),
    "lifetime": ("usual", "usual", None, 2.0, 12.0),
    "which": (0, 0, 0, 1, 2),
}


_CATCH_UP_SECONDS = 5.0


def _mutation(op: str) -> Callable[[World, Call, Any], Awaitable[Any]]:
    async def run(world: World, call: Call, flows: Any) -> Any:
        args = {name: value for name, value in call.args.items() if name not in ("defect", "bad")}
        if "bad" in call.args:
            args["state_json"] = call.args["bad"]
        return await getattr(flows, op)(flow_id=call.flow_id, **args)

    return run


def _of_flow(op: str, *names: str) -> Callable[[World, Call, Any], Awaitable[Any]]:
    async def run(world: World, call: Call, flows: Any) -> Any:
        args = {name: call.args[name] for name in names if name in call.args}
        return await getattr(flows, op)(call.flow_id, **args)

    return run


def _of_task(op: str) -> Callable[[World, Call, Any], Awaitable[Any]]:
    async def run(world: World, call: Call, flows: Any) -> Any:
        args = {name: value for name, value in call.args.items() if name not in ("defect", "bad")}
        if "defect" in call.args:
            args["result_json"] = call.args["bad"]
        return await getattr(flows, op)(call.task_id, **args)

    return run


async def _create(world: World, call: Call, flows: Any) -> Any:
    return await flows.create_managed(**call.args)


async def _run_task(world: World, call: Call, flows: Any) -> Any:
    args = {name: value for name, value in call.args.items() if name not in ("defect", "bad")}
    if "defect" in call.args:
        args["input_json"] = call.args["bad"]
    return await flows.run_task(flow_id=call.flow_id, **_runnable(world, args))


async def _spawn(world: World, call: Call, flows: Any) -> Any:
    args = {name: value for name, value in call.args.items() if name not in ("defect", "bad")}
    if "defect" in call.args:
        args["input_json"] = call.args["bad"]
    return await flows.spawn_detached(goal="detached", **_runnable(world, args))


def _runnable(world: World, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with what is to be run in the place of its name."""
    nested = args.pop("nested", None)
    if args.get("run") == "bare":
        args["run"] = world.code.bare
    elif args.get("run") == "nested":
        args["run"] = Nested(nested)
    return args


async def _retry_task(world: World, call: Call, flows: Any) -> Any:
    args = {name: value for name, value in call.args.items() if name not in ("defect", "bad")}
    if "defect" in call.args:
        args["input_json"] = call.args["bad"]
    return await flows.retry_task(call.task_id, **args)


async def _signal(world: World, call: Call, flows: Any) -> Any:
    args = {
        name: call.args[name] for name in ("payload", "id", "name", "token") if name in call.args
    }
    if "lifetime" in call.args:
        args["lifetime"] = call.args["lifetime"]
    if "fields" in call.args:
        args["key"] = json.loads(call.args["fields"])
    if call.flow_id is not None:
        args["flow_id"] = call.flow_id
    return await flows.signal(**args)


async def _answer(world: World, call: Call, flows: Any) -> Any:
    args = {name: call.args[name] for name in ("payload", "id") if name in call.args}
    return await call.runtime.answer(call.args["token"], **args)


async def _tell(world: World, call: Call, flows: Any) -> Any:
    args = {name: call.args[name] for name in ("inbox", "id") if name in call.args}
    return await flows.tell(call.flow_id, call.args["message"], **args)


async def _ask(world: World, call: Call, flows: Any) -> Any:
    return await flows.ask(call.flow_id, call.args["message"], inbox=call.args["inbox"])


async def _vote(world: World, call: Call, flows: Any) -> Any:
    args = {name: value for name, value in call.args.items() if name != "decision"}
    return await flows.vote(call.args["decision"], flow_id=call.flow_id, **args)


async def _list_updates(world: World, call: Call, flows: Any) -> Any:
    return await flows.list_updates(limit=1000)


async def _list_waits(world: World, call: Call, flows: Any) -> Any:
    return await flows.list_waits(limit=1000)


async def _find_latest(world: World, call: Call, flows: Any) -> Any:
    return await flows.find_latest()


async def _list(world: World, call: Call, flows: Any) -> Any:
    return await flows.list(**call.args)


async def _resolve(world: World, call: Call, flows: Any) -> Any:
    return await flows.resolve(call.args["token"])


async def _watch(world: World, call: Call, flows: Any) -> Any:
    """Watch for a second, and a few more for what is durable by then; answer what was seen."""
    found: list[Any] = []
    one = call.args["one"]
    after = {"after_seq": 0} if one else {"after_position": 0}

    def note(event: Any) -> None:
        found.append(event)
        if not any(durable.event == told_as(event) for durable in world.durable(call, event.seq)):
            world.violations.append(f"{call.name} was told before it was durable: {event}")

    async with flows.watch(call.flow_id if one else None, **after) as events:
        with anyio.move_on_after(1.0):
            async for event in events:
                note(event)
        owed, trouble = world.events_for(call), world.trouble_at
        if len(found) < owed:
            with anyio.move_on_after(_CATCH_UP_SECONDS):
                async for event in events:
                    note(event)
                    if len(found) == owed:
                        break
    # What happened before it was calm has to be told as well, once it is calm.
    call.owed = owed if world.is_calm and world.trouble_at == trouble else 0
    return found


def told_as(event: Any) -> dict[str, Any]:
    """An event as it was handed out, in the shape of those on the disk."""
    told: dict[str, Any] = msgspec.to_builtins(event)
    told.pop("position", None)
    return told


async def _unreadable(world: World, call: Call, flows: Any) -> Any:
    return await world.runtime.admin.list_unreadable()


async def _unregistered(world: World, call: Call, flows: Any) -> Any:
    return world.runtime.admin.unregistered_controllers()


OPERATIONS: dict[str, Operation] = {
    "create_managed": Operation(
        {
            "owner": (OWNERS[0], OWNERS[0], OWNERS[1]),
            "controller": (
                "shop/triage", "shop/triage", "plan", "plan", "raise", "give up", "patient", "bare",
                "race", "collect", "fall back", "root", "root", "asks", "deaf", "awaits", "awaits",
                "selects", "selects", "approves", "mailbox", "tells", "lingers",
            ),
            "policy": ("done_only", "done_only", "state_changes", "state_changes", "silent"),
            "wait": _WAIT,
            "given": (None, None, None, "mine-1", "mine-2"),
            "key": (None, None, None, "K1", "K2"),
            "variant": ("x", "x", "x", "y"),
            "correlation": (None, "order-1", "order-2"),
            "status": ("queued", "queued", "running", "waiting", "blocked"),
        },
        _create,
        mutates=True,
    ),
    "get": Operation(_READ, _of_flow("get")),
    "find_latest": Operation({"whose": ("own", "own", "admin"), "flow": (0, 1)}, _find_latest),
    "list": Operation(
        {
            "whose": ("own", "own", "foreign", "admin"),
            "flow": (0, 1),
            "status": (None, None, "queued", ("running", "waiting"), ("succeeded", "cancelled"), ()),
            "controller": (None, None, None, "plan", "shop/triage"),
            "correlation": (None, None, None, "order-1"),
            "limit": (100, 100, 1, 2),
            "after": (None, None, None, 0, 1, 2, "unknown"),
        },
        _list,
    ),
    "resolve": Operation(
        {"whose": ("own", "own", "foreign", "admin"), "flow": (0, 1, 2),
         "by": ("id", "owner", "order-1", "prefix", "long prefix", "nonsense")},
        _resolve,
    ),
    "get_task_summary": Operation(
        {**_READ, "nested": (None, None, True)}, _of_flow("get_task_summary", "nested")
    ),
    "list_tasks": Operation(
        {**_READ, "status": (None, None, "running", ("queued", "cancelled"))},
        _of_flow("list_tasks", "status"),
    ),
    "history": Operation(
        {**_READ, "after_seq": (0, 0, 1, 3, 50), "limit": (1000, 1000, 1, 3)},
        _of_flow("history", "after_seq", "limit"),
    ),
    "watch": Operation({**_READ, "one": (True, True, False)}, _watch),
    "result": Operation(_READ, _of_flow("result")),
    "get_task": Operation(_READ_TASK, _of_task("get_task")),
    "wait_task": Operation(_READ_TASK, _of_task("wait_task")),
    "list_unreadable": Operation({"whose": ("admin",), "flow": (0,)}, _unreadable),
    "unregistered_controllers": Operation({"whose": ("admin",), "flow": (0,)}, _unregistered),
    "run_task": Operation(
        {
            **_FLOW,
            "kind": ("linked", "linked", *KINDS),
            "run_id": (None, None, None, "r1", "r2"),
            "doing": _DOING,
            "begun": ("queued", "running"),
            "input": ("good",) * 6 + ("nan",),
            "retry": (False, False, True),
            "once": (False,) * 5 + (True,),
            "queue_timeout": _QUEUE_TIMEOUT,
            "nested": ("branch", "leaf"),
        },
        _run_task,
        mutates=True,
    ),
    "spawn_detached": Operation(
        {
            "owner": (OWNERS[0], OWNERS[0], OWNERS[1]),
            "kind": ("linked", *KINDS),
            "doing": _DOING,
            "begun": ("queued", "running"),
            "input": ("good",) * 6 + ("nan",),
            "retry": (False, False, True),
            "once": (False,) * 5 + (True,),
            "queue_timeout": _QUEUE_TIMEOUT,
            "nested": ("branch", "leaf"),
        },
        _spawn,
        mutates=True,
    ),
    "retry_task": Operation(
        {**_READ_TASK, "input": ("same", "same", "new", "nan")}, _retry_task, mutates=True
    ),
    "retry_flow": Operation(_READ, _of_flow("retry_flow"), mutates=True),
    "start_task": Operation(_TASK, _of_task("start_task"), mutates=True),
    "progress_task": Operation(
        {**_TASK, "summary": (True, True, False)}, _of_task("progress_task"), mutates=True
    ),
    "complete_task": Operation(
        {
            **_TASK,
            "result": ("good", "good", "good", "good", "nan", "large"),
            "outcome": (None, None, "succeeded", "blocked"),
        },
        _of_task("complete_task"),
        mutates=True,
    ),
    "fail_task": Operation(
        {**_TASK, "status": ("failed", "timed_out", "cancelled")},
        _of_task("fail_task"),
        mutates=True,
    ),
    "cancel_task": Operation(
        {**_READ_TASK, **_GRACE}, _of_task("cancel_task"), mutates=True
    ),
    "set_waiting": Operation(
        {
            **_FLOW,
            **_PATCH,
            "blocked": ("no", "no", "task", "summary"),
            "wait": _WAIT,
            "on_timeout": ("fail", "resume", "resume", "block"),
        },
        _mutation("set_waiting"),
        mutates=True,
    ),
    "resume": Operation(
        {**_FLOW, **_PATCH, "status": ("queued", "running")}, _mutation("resume"), mutates=True
    ),
    "update": Operation({**_FLOW, **_PATCH}, _mutation("update"), mutates=True),
    "finish": Operation({**_FLOW, **_PATCH}, _mutation("finish"), mutates=True),
    "fail": Operation(
        {**_FLOW, **_PATCH, "blocked": ("no", "task", "summary")}, _mutation("fail"), mutates=True
    ),
    "signal": Operation(_SIGNAL, _signal, mutates=True),
    "answer": Operation({**_SIGNAL, "by": ("token",)}, _answer, mutates=True),
    "tell": Operation(
        {**_FLOW, "inbox": ("inbox",) * 4 + ("other",), "id": (None, None, "m1", "m2")},
        _tell,
        mutates=True,
    ),
    "ask": Operation({**_FLOW, "inbox": ("inbox",) * 4 + ("other",)}, _ask, mutates=True),
    "vote": Operation(
        {
            **_FLOW,
            "decision": ("approve",) * 6 + ("reject", "edit"),
            "approver": ("ann", "ann", "bob", "bob", "cy", ""),
            "digest": ("right",) * 5 + ("first", "wrong"),
            "to": ("name", "name", "token"),
        },
        _vote,
        mutates=True,
    ),
    "list_waits": Operation({"whose": ("own", "own", "foreign"), "flow": (0, 1)}, _list_waits),
    "list_updates": Operation({"whose": ("own", "own", "foreign"), "flow": (0, 1)}, _list_updates),
    "request_cancel": Operation(
        {**_FLOW, "revision": _PATCH["revision"]}, _mutation("request_cancel"), mutates=True
    ),
    "cancel": Operation(
        {**_READ, **_GRACE, "revision": ("none", "none", "none", "right", "stale", "future")},
        _of_flow("cancel", "expected_revision", "grace"),
        mutates=True,
    ),
}  # fmt: skip

WEIGHTS = {
    "create_managed": 6, "run_task": 9, "set_waiting": 3, "resume": 3, "update": 5, "cancel": 4,
    "start_task": 2, "complete_task": 3, "progress_task": 2, "get": 3, "list": 2, "retry_task": 3,
    "spawn_detached": 2, "retry_flow": 3, "cancel_task": 2, "signal": 8, "tell": 2, "vote": 3,
}  # fmt: skip
WEIGHTED = tuple(name for name in OPERATIONS for _ in range(WEIGHTS.get(name, 1)))


def draw(random: Random, op: str | None = None) -> Spec:
    """One operation with one choice for each of its arguments."""
    name = op or random.choice(WEIGHTED)
    choices = OPERATIONS[name].choices
    return name, {argument: random.choice(given) for argument, given in choices.items()}
