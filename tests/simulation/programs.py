"""Random programs for a world: several callers at once, crashes, power cuts and faults, all from one seed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

import msgspec

from flowstead.testing import CALM, Faults
from tests.simulation import checks, scenes
from tests.simulation.machine import World
from tests.simulation.model import INTERRUPTIONS, Wrong
from tests.simulation.operations import Spec, draw

FAULTS: Final = {
    "delay": Faults(delay=0.05),
    "slow": Faults(delay=0.01, slow=0.3),
    "busy": Faults(busy=0.6),
    "fail_before": Faults(delay=0.01, fail_before=0.7),
    "fail_after": Faults(delay=0.01, fail_after=0.5),
    "fail_unknown": Faults(delay=0.01, fail_unknown=0.4),
    "fail_read": Faults(delay=0.01, fail_read=0.3),
    "fail_open": Faults(fail_open=0.5),
    "all": Faults(
        delay=0.02, slow=0.05, busy=0.02, fail_before=0.1, fail_after=0.1, fail_unknown=0.1,
        fail_read=0.05, fail_open=0.2,
    ),
}  # fmt: skip
OPERATIONS: Final = 60
SCENES: Final = 5


class Failed(AssertionError):
    """A seed found something; the message says how to play it again."""


def world_of(seed: int, directory: Path | None = None) -> World:
    """The world a seed plays in: shuffled or not, on a disk that keeps what it wrote or may lose the newest."""
    random = Random(seed)
    shuffle, normal = random.random() < 0.5, random.random() < 0.4
    durability = "normal" if normal and directory is None else "full"
    return World(seed, shuffle=shuffle, durability=durability, directory=directory)


def play(
    seed: int, directory: Path | None = None, *, scene: Callable[..., int] | None = None
) -> World:
    """Play a seed's program to its end and check everything; the world comes back closed.

    Args:
        seed: The world, and what happens in it.
        directory: Where the real SQLite store keeps its files, instead of a simulated disk.
        scene: Play this one again and again instead of everything there is.

    Raises:
        Failed: Something was wrong; the message has the seed and the end of the world's log.
    """
    with world_of(seed, directory) as world:
        try:
            _play(world, Random(seed * 7919 + 1), directory, scene)
        except Exception as error:
            told = "\n".join(world.simulation.log[-12:])
            again = f"FLOWSTEAD_SEED={seed} pytest tests/simulation/test_seeds.py"
            raise Failed(
                f"{type(error).__name__}: {error}\n\n{told}\n\nplay it again: {again}"
            ) from error
    return world


def _play(
    world: World,
    random: Random,
    directory: Path | None,
    scene: Callable[..., int] | None,
) -> None:
    world.disk.faults = Faults(delay=random.choice((0.0, 0.0, 0.002, 0.02)))
    world.boot()
    left = OPERATIONS if scene is None else SCENES
    while left > 0:
        if not world.is_up:
            world.boot()
        left -= _step(world, random) if scene is None else min(scene(world, random), 1)
        checks.check_standing_still(world)
        if not world.is_up and directory is not None:
            checks.check_file(world, directory)
    finish(world)


def finish(world: World) -> None:
    """Heal the world, and ask everything that only a world at rest can answer."""
    world.heal()
    checks.check_at_rest(world)
    checks.check_i12_strangers_see_nothing(world)
    checks.check_i11_an_idle_restart_changes_nothing(world)
    checks.check_i10_closing_leaves_nobody_waiting(world)
    if world.violations:
        raise Wrong("\n".join(world.violations))


def _step(world: World, random: Random) -> int:
    """One thing that happens; answers how many operations it took."""
    if world.is_up and world.overtaken and random.random() < 0.4:
        world.ask_the_overtaken(draw(random), draw(random))
        return 2
    chance = random.random()
    if chance < 0.40:
        return _clients(world, random)
    if chance < 0.50:
        return scenes.play(world, random)
    if chance < 0.64:
        world.call(draw(random))
        return 1
    if chance < 0.66:
        return _rush(world, random)
    if chance < 0.68:
        return _cancel_at_work(world, random)
    if chance < 0.70:
        return _look_closely(world, random)
    if chance < 0.72:
        return _await_the_end(world, random)
    if chance < 0.73:
        return _create_twice(world, random)
    if chance < 0.79:
        world.advance(random.choice((0.1, 1.0, 3.0, 7.0, 25.0)))
        return 0
    if chance < 0.82:
        world.release(random.randrange(8))
        return 0
    if chance < 0.86:
        world.set_faults(random.choice((CALM, *FAULTS.values())))
        return _clients(world, random)
    if chance < 0.89:
        world.jump_clock(random.choice((-3600, -5, 0, 30, 3600)))
        return 0
    return _fate(world, random)


def _fate(world: World, random: Random) -> int:
    """The process, or the machine, ends in one way or another."""
    is_simulated = world.files is None
    power = is_simulated and random.random() < (0.7 if world.durability == "normal" else 0.3)
    ways = (
        "kill", "crash", "crash", "crash closing", "crash later", "crash opening", "close", "takeover",
        "again and again", "sleep",
    )  # fmt: skip
    match random.choice(ways):
        case "kill":
            world.kill(power=power)
        case "crash":
            world.crash_after(random.randrange(1, 120), power=power)
            return _clients(world, random)
        case "crash closing":
            world.crash_after(random.randrange(1, 60), power=power)
            world.close()
        case "crash opening":
            world.kill(power=power)
            world.crash_after(random.randrange(1, 30), power=power)
            world.boot()
        case "again and again":
            return _kill_again_and_again(world, random)
        case "sleep":
            return _sleep(world, random)
        case "crash later":
            world.crash_after(random.randrange(1, 60), power=power)
            world.advance(30.0)
        case "close":
            _start_work(world, random, "hang", kind=random.choice(("work", "fragile")))
            if world.is_up:
                world.close()
                checks.check_i10_closing_leaves_nobody_waiting(world)
        case _ if is_simulated and not world.overtaken:
            return _overtake(world, random)
    return 0


def _start_work(world: World, random: Random, doing: str, *, kind: str = "work") -> None:
    """A new flow with one child, which runs from here on, unless the process dies on the way."""
    create, run = (draw(random, op) for op in ("create_managed", "run_task"))
    create[1].update(given=None, key=None, controller="shop/triage")
    run[1].update(flow=0, whose="own", kind=kind, doing=doing, run_id=None, input="good")
    for asked in (create, run):
        if world.is_up:
            world.call(asked)


def _overtake(world: World, random: Random) -> int:
    """A second runtime takes the store while code runs in the first, which is asked for a change later on."""
    _start_work(world, random, "hang")
    update = draw(random, "update")
    update[1].update(flow=0, whose="own", revision="right", state="small")
    if world.is_up and world.take_over():
        world.ask_the_overtaken(update)
    return 3


def _kill_again_and_again(world: World, random: Random) -> int:
    """A child that runs each time the process dies, oftener than it is started again."""
    _start_work(world, random, "hang")
    for _ in range(INTERRUPTIONS + 2):
        if world.is_up:
            world.kill()
        world.boot()
        world.advance(0.5)
    return 2


def _sleep(world: World, random: Random) -> int:
    """Nobody lives at the instant at which a requested cancel is due; the flow has been changed since it was."""
    create, cancel, update = (
        draw(random, op) for op in ("create_managed", "request_cancel", "update")
    )
    create[1].update(given=None, key=None, controller="shop/triage")
    cancel[1].update(flow=0, whose="own", revision="right")
    update[1].update(flow=0, whose="own", revision="right", state="small")
    for asked in (create, cancel, update):
        if world.is_up:
            world.call(asked)
    if world.is_up:
        world.kill()
    world.jump_clock(random.choice((30, 3600)))
    return 3


def _create_twice(world: World, random: Random) -> int:
    """The same flow asked for several times at the same moment, by a key that few have used before."""
    asked = [draw(random, "create_managed") for _ in range(3)]
    key = random.choice(("K3", "K4", "K5"))
    for _, given in asked:
        given.update(owner=asked[0][1]["owner"], key=key, variant="x")
    world.call(*asked)
    return 2


def _rush(world: World, random: Random) -> int:
    """More calls of one flow at the same moment than its mailbox holds, and somebody who watches it."""
    create = draw(random, "create_managed")
    create[1].update(given=None, key=None, controller="shop/triage")
    world.call(create)
    if not world.is_up:
        return 1
    op = random.choice(("run_task", "run_task", "update", "set_waiting"))
    asked = [draw(random, op) for _ in range(12)]
    watch = draw(random, "watch")
    for _, given in (watch, *asked):
        given.update(flow=0, whose="own", input="good", run_id=None)
    world.call(watch, *asked)
    return 3


def _cancel_at_work(world: World, random: Random) -> int:
    """A cancel that does not wait for a child which takes its time to stop."""
    _start_work(world, random, "stubborn")
    cancel = draw(random, "cancel")
    cancel[1].update(flow=0, whose="own", grace=0.01, revision="none")
    if world.is_up:
        world.call(cancel)
    return 3


def _look_closely(world: World, random: Random) -> int:
    """Readers that never pause beside somebody who writes, on a disk that takes its time."""
    if world.disk.faults == CALM:
        world.disk.faults = Faults(delay=0.02)
    writes = [draw(random, "update") for _ in range(3)]
    reads = [[draw(random, op) for op in ("get", "list", "history") * 2] for _ in range(2)]
    watch = draw(random, "watch")
    for _, given in (watch, *writes, *reads[0], *reads[1]):
        given.update(flow=0, whose="own")

    async def client(program: list[Spec]) -> None:
        for asked in program:
            await asyncio.wait({world.begin(asked)}, timeout=4.0)

    async def together() -> None:
        await asyncio.gather(*(client(program) for program in ([watch], writes, *reads)))

    world.play(together())
    return 6


def _await_the_end(world: World, random: Random) -> int:
    """A flow with work under way ends while callers begin to wait for that, on a disk that is slow or fails."""
    finish = draw(random, "finish")
    finish[1].update(flow=0, whose="own", revision="right", state="unset")
    _start_work(world, random, "hang")
    if not world.is_up:
        return 1
    world.set_faults(random.choice((CALM, FAULTS["fail_unknown"], FAULTS["fail_after"])))
    world.disk.faults = msgspec.structs.replace(world.disk.faults, delay=0.02)
    watch, *waits = (draw(random, op) for op in ("watch", *["result"] * 8))
    for _, given in (watch, *waits):
        given.update(flow=0, whose="own")

    async def calm_down() -> None:
        await asyncio.sleep(0.5)
        world.set_faults(CALM)

    async def later(asked: Spec) -> None:
        await asyncio.sleep(random.random() * 0.05)
        await asyncio.wait({world.begin(asked)}, timeout=4.0)

    async def together() -> None:
        world.begin(watch)
        await asyncio.gather(calm_down(), *(later(asked) for asked in (finish, *waits)))

    if world.play(together()):
        world.advance(2 * checks.TOLD_SECONDS)
    return 4


def _clients(world: World, random: Random) -> int:
    """Several callers, each with a few calls one after another, all at the same time."""
    programs = [
        [
            (random.choice((0.0, 0.0, 0.0, 0.3, 1.0)), draw(random))
            for _ in range(random.randint(1, 4))
        ]
        for _ in range(random.randint(1, 4))
    ]

    async def client(program: list[tuple[float, Spec]]) -> None:
        for pause, asked in program:
            if pause:
                await asyncio.sleep(pause)
            task = world.begin(asked)
            # Some calls wait for an end; their caller goes on with the rest.
            await asyncio.wait({task}, timeout=4.0)

    async def together() -> None:
        await asyncio.gather(*(client(program) for program in programs))

    world.play(together())
    return sum(len(program) for program in programs)


def rush(world: World, *, seed: int) -> None:
    """A few callers with a program of their own, whatever the world's seed."""
    if not world.is_up:
        world.boot()
    _clients(world, Random(seed))
