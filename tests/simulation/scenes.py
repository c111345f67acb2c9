"""Short plays that chance alone would stage too seldom: reviews, flows below flows, stops that nobody obeys.

Each leaves it to the seed when the process dies in it, and which of several ways it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from flowstead.testing import CALM
from tests.simulation.model import ABANDON_AFTER, KILL_AFTER, RUNNING_CHILDREN
from tests.simulation.operations import ADMIN, Spec, draw

if TYPE_CHECKING:
    from tests.simulation.machine import World

_OWN = {"whose": "own", "input": "good", "run_id": None, "once": False, "queue_timeout": None}


def asked(random: Random, op: str, **given: Any) -> Spec:
    """An operation with these arguments, and others by chance."""
    spec = draw(random, op)
    spec[1].update({name: value for name, value in (_OWN | given).items() if name in spec[1]})
    return spec


def call(world: World, random: Random, op: str, **given: Any) -> None:
    """Make such a call, if anybody lives to answer it."""
    if world.is_up:
        world.call(asked(random, op, **given))


def new_flow(world: World, random: Random, controller: str = "shop/triage") -> str | None:
    """A flow of its own; its id, if it was made."""
    known = {log.now.flow_id for log in world.flows_of(ADMIN)}
    call(
        world,
        random,
        "create_managed",
        given=None,
        key=None,
        controller=controller,
        status="queued",
    )
    made = [log.now for log in world.flows_of(ADMIN) if log.now.flow_id not in known]
    found = [state.flow_id for state in made if state.parent_task is None]
    return found[-1] if found else None


def newest_task(world: World) -> str | None:
    """The child made last."""
    return next(reversed(world.model.home), None)


def something_happens(world: World, random: Random) -> None:
    """Time passes, or the process dies in one way or another, and lives again."""
    way = random.choice(("time", "time", "kill", "crash", "close", "power", "later", "night"))
    if not world.is_up:
        world.boot()
    power = world.files is None and way == "power"
    match way:
        case "time":
            world.advance(random.choice((0.05, 0.4, 1.1, 2.5)))
        case "close":
            world.close()
        case "night":
            # Whatever comes due meanwhile finds nobody alive.
            world.kill()
            world.jump_clock(random.choice((30, 3600)))
        case "crash":
            world.crash_after(random.randrange(1, 60))
            world.advance(2.0)
        case "later":
            world.crash_after(random.randrange(1, 400))
            world.advance(6.0)
        case _:
            world.kill(power=power)
    if not world.is_up:
        world.boot()


def play(world: World, random: Random) -> int:
    """One of the plays; answers how many operations it took."""
    scene = random.choice(SCENES)
    world.seen[f"scene {scene.__name__}"] += 1
    if random.random() < 0.5:
        world.set_faults(CALM)
    return scene(world, random)


def review(world: World, random: Random) -> int:
    """A child that a person has to look at, and answers: right, wrong, too late, somebody else's."""
    controller = random.choice(("shop/triage", "shop/triage", "asks"))
    flow = new_flow(world, random, controller)
    if flow is None:
        return 1
    for doing in random.sample(("review", "review once", "invalid"), 2):
        kind = random.choice(("work", "work", "flaky", "fragile"))
        if controller != "asks":
            call(world, random, "run_task", flow=flow, kind=kind, doing=doing)
    if controller == "asks" and random.random() < 0.5:
        for _ in range(2):
            call(world, random, "retry_task", task=asked_for(world, flow), input="same")
    something_happens(world, random)
    for _ in range(random.randint(2, 4)):
        way = random.choice(
            ("resume", "resume", "retry_task", "retry_task", "cancel_task", "set_waiting")
        )
        whose = random.choice(("own", "own", "own", "own", "foreign"))
        call(world, random, way, flow=flow, task=asked_for(world, flow), whose=whose, revision="right",
             input=random.choice(("same", "new")), grace=1.0, state="unset")  # fmt: skip
        if random.random() < 0.4:
            something_happens(world, random)
    return 5


def asked_for(world: World, flow: str) -> str | int:
    """The child that a person has to look at, or any if there is none."""
    found = [
        task.task_id
        for log in world.flows_of(ADMIN)
        for task in log.now.active
        if log.now.flow_id == flow and task.review is not None
    ]
    return found[0] if found else newest_task(world) or 0


def tree(world: World, random: Random) -> int:
    """Flows below flows, stopped from above or from below, or asked to."""
    flow = new_flow(world, random, random.choice(("root", "root", "branch")))
    if random.random() < 0.3:
        _wait_for_a_failure(world)
    for _ in range(random.randint(0, 2)):
        something_happens(world, random)
    if flow is None or not world.is_up:
        return 2
    below = [log.now.flow_id for log in world.flows_of(ADMIN) if log.now.parent_task is not None]
    if random.random() < 0.5:
        # One flow more, and perhaps one too many: too deep, or too many under one.
        for inside in (flow, *below[:2]):
            call(world, random, "run_task", flow=inside, kind="nested", nested="leaf")
    target = flow if not below or random.random() < 0.6 else random.choice(below[:3])
    ops = random.choice((("cancel",), ("request_cancel",), ("request_cancel", "cancel"), ("fail",)))
    for op in ops:
        call(world, random, op, flow=target, revision="none" if op == "cancel" else "right",
             grace=random.choice((0.01, 8.0)), step="unset", state="unset")  # fmt: skip
        if random.random() < 0.4:
            something_happens(world, random)
    call(world, random, "get_task_summary", flow=flow, nested=True)
    return 4


def _wait_for_a_failure(world: World) -> None:
    """Until a flow below has failed, and its children are still being stopped."""
    for _ in range(16):
        if not world.is_up or not world.advance(0.3):
            return
        logs = [log.now for log in world.flows_of(ADMIN) if log.now.parent_task is not None]
        if any(state.status == "failed" and state.active for state in logs):
            return


def ladder(world: World, random: Random) -> int:
    """A stop that is not obeyed, rung by rung, with a crash on any of them."""
    controller = random.choice(("shop/triage", "shop/triage", "deaf"))
    flow = new_flow(world, random, controller)
    if flow is None:
        return 1
    if controller == "deaf" and world.is_up:
        world.advance(2.0)
    else:
        for _ in range(2):
            kind, doing = (
                random.choice(("work", "tool", "narrow")),
                random.choice(("deaf", "deaf", "hang")),
            )
            call(world, random, "run_task", flow=flow, kind=kind, doing=doing)
    op = random.choice(("cancel", "cancel", "cancel_task", "fail"))
    call(world, random, op, flow=flow, task=newest_task(world) or 0, revision="right", grace=0.01,
         state="unset", step="unset")  # fmt: skip
    for rung in (0.3, KILL_AFTER, ABANDON_AFTER):
        if not world.is_up:
            world.boot()
        world.advance(rung)
        if random.random() < 0.3:
            something_happens(world, random)
    call(world, random, "cancel", flow=flow, revision="none", grace=8.0)
    return 5


def rush_for_slots(world: World, random: Random) -> int:
    """More children in several flows than may run at once."""
    for _ in range(3):
        flow = new_flow(world, random)
        if flow is None or not world.is_up:
            return 2
        kind = random.choice(("narrow", "narrow", "work", "fragile"))
        world.call(
            *(
                asked(random, "run_task", flow=flow, kind=kind,
                      doing=random.choice(("nap", "hang", "fail late")),
                      queue_timeout=random.choice((None, 1.0, 4.0)))
                for _ in range(3)
            )
        )  # fmt: skip
    something_happens(world, random)
    for number in range(4):
        world.release(number)
    something_happens(world, random)
    return 8


def oversleep(world: World, random: Random) -> int:
    """A child waits for its start, but not for ever; nobody lives when it has waited too long."""
    flow = new_flow(world, random)
    if flow is None:
        return 1
    for _ in range(RUNNING_CHILDREN):
        # What must not be done twice is lost, so that its place is free in the next process.
        call(world, random, "run_task", flow=flow, kind="fragile", doing="hang")
    call(world, random, "run_task", flow=flow, kind="work", queue_timeout=random.choice((1.0, 4.0)))
    if world.is_up:
        world.kill()
        world.jump_clock(random.choice((30, 3600)))
    world.boot()
    world.advance(1.0)
    return 4


def fail(world: World, random: Random) -> int:
    """Children that fail in many ways, take long, or are not wanted for long; under policies that differ."""
    flow = new_flow(world, random)
    if flow is None:
        return 1
    for _ in range(3):
        kind = random.choice(("flaky", "picky", "work", "quiet", "timed", "fragile"))
        doing = random.choice(_FAILING) if kind != "quiet" else random.choice(("murmur", "hang"))
        call(world, random, "run_task", flow=flow, kind=kind, doing=doing,
             retry=True, queue_timeout=random.choice((None, None, 4.0)))  # fmt: skip
    something_happens(world, random)
    if world.is_up:
        world.advance(random.choice((1.0, 4.0, 7.0)))
    return 4


_FAILING = (
    "transient later", "transient later", "transient once", "transient", "fatal", "denied", "invalid", "exit",
    "odd", "fail late once", "hang",
)  # fmt: skip


def again(world: World, random: Random) -> int:
    """A flow that has ended badly is gone on with, by several at once."""
    controller = random.choice(("shop/triage", "raise", "collect", "root", "patient"))
    flow = new_flow(world, random, controller)
    if flow is None:
        return 1
    for doing in ("succeed", "fail"):
        call(world, random, "run_task", flow=flow, kind="work", doing=doing)
    something_happens(world, random)
    call(world, random, random.choice(("fail", "cancel")), flow=flow, revision="right", grace=8.0,
         state="small")  # fmt: skip
    if world.is_up:
        again = [
            asked(random, "retry_flow", flow=flow, whose=random.choice(("own", "own", "admin")))
            for _ in range(2)
        ]
        world.call(*again)
    something_happens(world, random)
    call(world, random, "retry_flow", flow=flow)
    return 7


def programs(world: World, random: Random) -> int:
    """Children that run outside, and a process that dies on them."""
    flow = new_flow(world, random)
    if flow is None:
        return 1
    for _ in range(2):
        call(world, random, "run_task", flow=flow, kind="tool", once=random.random() < 0.4,
             doing=random.choice(("hang", "nap", "stubborn", "fail late")))  # fmt: skip
    task = newest_task(world) or 0
    for op in ("", random.choice(("cancel_task", "cancel", "request_cancel", ""))):
        if op:
            call(world, random, op, flow=flow, task=task, revision="right", grace=0.01)
        something_happens(world, random)
    return 4


def detached(world: World, random: Random) -> int:
    """A run of its own, which the process may not survive, and which somebody may want to stop."""
    call(world, random, "spawn_detached")
    something_happens(world, random)
    op = random.choice(("cancel", "cancel_task", "retry_task", "complete_task", "finish"))
    call(world, random, op, flow=0, task=newest_task(world) or 0, revision="right", grace=1.0,
         result="good")  # fmt: skip
    something_happens(world, random)
    return 2


def signals(world: World, random: Random) -> int:
    """Signals before anybody waits and while several do: again, late, for others, by every way there is."""
    sent = _GENTLE | {
        "id": random.choice((None, None, "once", "s1")),
        "lifetime": random.choice(("usual", 2.0)),
    }
    if random.random() < 0.4:
        _signal(world, random, **sent)
    flows = [new_flow(world, random, random.choice(_STANDING)) for _ in range(random.randint(1, 2))]
    flow = next(filter(None, flows), None)
    if flow is None:
        return 2
    something_happens(world, random)
    for _ in range(random.randint(1, 3)):
        if world.is_up:
            count = random.choice((1, 1, 2, 3))
            world.call(*(_signal_spec(random, flow, **sent) for _ in range(count)))
        if random.random() < 0.6:
            something_happens(world, random)
    call(world, random, "list_waits", flow=flow)
    return 5


_STANDING = ("awaits", "awaits", "selects", "lingers", "tells")
_GENTLE: dict[str, object] = {"whose": "own"}


def _signal_spec(random: Random, flow: object = 0, **given: object) -> Spec:
    op = random.choice(("signal",) * 5 + ("answer",))
    by = "token" if op == "answer" else random.choice(("key", "key", "key", "name", "token"))
    key = random.choice(("A", "A", "B", "B", "C"))
    step = random.choice(("answer", "reply", "again", "maybe"))
    usual = {"flow": flow, "by": by, "key": key, "step": step, "which": 0, **given}
    return asked(random, op, **(usual | {"by": "token"} if op == "answer" else usual))


def _signal(world: World, random: Random, **given: object) -> None:
    if world.is_up:
        world.call(_signal_spec(random, **given))


def meet(world: World, random: Random) -> int:
    """A signal and its wait, one right before the other; and then nothing happens for a while."""
    ops = [
        _signal_spec(random, by="key", key=key, whose="own", lifetime="usual", id=None)
        for key in "AB"
    ]
    create = [
        asked(random, "create_managed", given=None, key=None, controller="awaits", status="queued")
        for _ in range(2)
    ]
    for _, given in create:
        given["owner"] = "agent:a"
    if not world.flows_of(ADMIN):
        new_flow(world, random)
    for some in random.choice(
        ((ops, create), (create, ops), ([*ops, *create], []), ([*create, *ops], []))
    ):
        if world.is_up and some:
            world.call(*some)
    if world.is_up:
        world.advance(7.0)
    return 4


def too_late(world: World, random: Random) -> int:
    """An answer after the deadline, which nobody has noticed yet: the clock has been put forward."""
    flow = new_flow(world, random, random.choice(("awaits", "awaits", "mailbox", "approves")))
    if flow is not None and world.is_up:
        world.advance(random.choice((0.5, 1.5)))
        world.jump_clock(world.simulation.clock.shift_ms // 1000 + 30)
    for by in ("key", "name", "token"):
        key = random.choice(("A", "B"))
        _signal(world, random, flow=flow or 0, by=by, key=key, step="answer", whose="own")
    call(world, random, "vote", flow=flow or 0, decision="approve")
    call(world, random, "tell", flow=flow or 0, inbox="inbox")
    return 5


def stand(world: World, random: Random) -> int:
    """Controllers that stand still long enough to leave, are woken while they do, and whose process dies."""
    flows = [new_flow(world, random, random.choice(("awaits", "selects"))) for _ in range(2)]
    if world.is_up:
        world.advance(random.choice((0.9, 0.99, 1.0, 1.01, 1.5)))
    if random.random() < 0.5 and world.is_up:
        world.crash_after(random.randrange(1, 60))
    if world.is_up:
        world.call(*(_signal_spec(random, flow or 0, whose="own") for flow in flows * 2))
    something_happens(world, random)
    if random.random() < 0.3:
        way = random.choice(("resume", "set_waiting", "request_cancel", "cancel_task", "update"))
        call(world, random, way, flow=flows[0] or 0, task=newest_task(world) or 0, revision="right",
             state="unset", grace=1.0)  # fmt: skip
        something_happens(world, random)
    for key in ("A", "B", "C"):
        _signal(world, random, by="key", key=key, whose="own")
    return 6


def deadlines(world: World, random: Random) -> int:
    """Waits of the flow itself, over in one way or another: answered, too late, while nobody lives."""
    for wait in random.sample(("deadline", "deadline", "wake", "remind", "thread"), 2):
        controller = random.choice(("shop/triage", "shop/triage", "tells"))
        flow = new_flow(world, random, controller)
        if flow is None:
            return 2
        call(world, random, "set_waiting", flow=flow, revision="right", wait=wait, state="unset",
             blocked=random.choice(("no", "no", "summary")))  # fmt: skip
        if random.random() < 0.4:
            _signal(world, random, flow=flow, by=random.choice(("own", "token", "key")), key="own")
    something_happens(world, random)
    if world.is_up:
        world.advance(random.choice((2.0, 3.0, 3.5)))
    for _ in range(2):
        by = random.choice(("own", "token", "key"))
        _signal(world, random, flow=random.choice((0, 1)), by=by, key="own", whose="own")
    return 7


def approve(world: World, random: Random) -> int:
    """An approval: voted on early, twice, by nobody who may; and a flow that somebody changes meanwhile."""
    flow = new_flow(world, random, "approves")
    if flow is None:
        return 1
    for _ in range(random.randint(2, 5)):
        if random.random() < 0.5:
            something_happens(world, random)
        if random.random() < 0.12:
            call(world, random, "update", flow=flow, revision="right", state="small")
        if world.is_up:
            votes = random.choice((1, 1, 2))
            digest = random.choice(("right", "right", "right", "first", "wrong"))
            kind = random.choice(("approve",) * 8 + ("reject", "edit"))
            world.call(
                *(
                    asked(random, "vote", flow=flow, decision=kind, digest=digest)
                    for _ in range(votes)
                )
            )
    something_happens(world, random)
    return 5


def mail(world: World, random: Random) -> int:
    """Messages to a flow that takes some of them, and answers."""
    flow = new_flow(world, random, "mailbox")
    if flow is None:
        return 1
    for _ in range(random.randint(1, 3)):
        ops = [random.choice(("tell", "tell", "ask")) for _ in range(random.choice((1, 2, 3)))]
        if world.is_up:
            world.call(*(asked(random, op, flow=flow, inbox="inbox") for op in ops), patience=2.0)
        if random.random() < 0.6:
            something_happens(world, random)
    return 5


def early(world: World, random: Random) -> int:
    """Signals, votes and messages for a flow whose controller has not begun."""
    controller = random.choice(("awaits", "selects", "approves", "mailbox"))
    call(
        world,
        random,
        "create_managed",
        given=None,
        key=None,
        controller=controller,
        status="waiting",
    )
    logs = world.flows_of(ADMIN)
    if not logs or not world.is_up:
        return 1
    flow = logs[0].now.flow_id
    for _ in range(random.randint(1, 4)):
        if controller == "approves":
            call(world, random, "vote", flow=flow, decision="approve", to="name", digest="first")
        elif controller == "mailbox":
            call(world, random, "tell", flow=flow, inbox="inbox")
        else:
            step = random.choice(("answer", "reply"))
            _signal(world, random, flow=flow, by="name", step=step, whose="own")
    if random.random() < 0.5:
        something_happens(world, random)
    call(world, random, "resume", flow=flow, revision="right", state="unset", status="queued")
    something_happens(world, random)
    return 6


SCENES: tuple[Callable[[World, Random], int], ...] = (
    review, tree, tree, ladder, ladder, rush_for_slots, again, programs, detached, fail, oversleep,
    signals, signals, stand, stand, deadlines, approve, approve, mail, early, meet, too_late,
)  # fmt: skip
