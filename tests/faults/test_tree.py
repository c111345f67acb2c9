"""A tree of children of every kind over five levels, cancelled at its root: who is left, and what is told of them.

The census is taken from outside: what the operating system says of processes and descriptors, asyncio of its
tasks, `threading` of threads, and the children's own code of itself. The report must say the same of the tree as
the census taken before it was cut down: one line for each that was alive.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import anyio
import psutil

from flowstead import (
    CancelReport,
    Command,
    FlowContext,
    Limits,
    Nested,
    Registry,
    Runtime,
    SessionFlows,
    Settlement,
    Task,
    TaskContext,
)
from flowstead.executors import SyncContext
from flowstead.testing import ManualClock
from tests.faults.support import TREE
from tests.faulty_store import flows_of, new_flow, running, settle, soon
from tests.invariants import check_all

T = TypeVar("T")

LEVELS = 5
BRANCHES = 2
PATIENCE = 60.0

Plan = dict[str, Any]

NESTED = sum(BRANCHES**level for level in range(1, LEVELS))
LIMITS = Limits(running_children=TREE, threads=TREE, kill_after=1000, abandon_after=1000)

IN_THE_LOOP = ("waits", "groups", "shields", "swallows")


def plan_of(size: int, *more: str) -> Plan:
    """What each flow of the tree begins: so many children in all, the flows below among them, and some more."""
    nodes: list[Plan] = []
    root = _branch(LEVELS, nodes)
    room = size - NESTED
    programs, threads = size * 6 // 100, size * 4 // 100
    in_the_loop = room - programs - threads - len(more)
    leaves = [*more, *["runs a program"] * programs, *["looks"] * threads]
    leaves += [IN_THE_LOOP[n % len(IN_THE_LOOP)] for n in range(in_the_loop)]
    for n, leaf in enumerate(leaves):
        # The first ones deepest, so that their end has the longest way up.
        nodes[-1 - n % len(nodes)]["leaves"].append(leaf)
    return root


def _branch(levels: int, nodes: list[Plan]) -> Plan:
    plan: Plan = {"leaves": []}
    nodes.append(plan)
    plan["below"] = [_branch(levels - 1, nodes) for _ in range(BRANCHES if levels > 1 else 0)]
    return plan


class Tree:
    """The code of the tree, and what it knows of itself."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.registry.controller("node")(self.node)
        for name in (*IN_THE_LOOP, "looks", "never"):
            self.registry.task(getattr(self, name), name=name)
        self.alive: dict[str, str] = {}
        self.cleaning = 0
        self.may_clean_up = asyncio.Event()
        self.over = threading.Event()

    async def node(self, flow: FlowContext) -> None:
        """Begin what the plan says, and wait for all of it."""
        plan = flow.state_json
        steps = [
            await flow.start(Nested("node"), below, name=f"node-{n}")
            for n, below in enumerate(plan["below"])
        ]
        for n, leaf in enumerate(plan["leaves"]):
            steps.append(await flow.start(PROGRAMS.get(leaf, leaf), name=f"{leaf}-{n}"))
        await flow.gather(*steps)

    # ---- children in the loop ---------------------------------------------------------------------

    async def waits(self, ctx: TaskContext, _given: object) -> None:
        with _Alive(self, ctx):
            await asyncio.Event().wait()

    async def groups(self, ctx: TaskContext, _given: object) -> None:
        """Has tasks of its own."""
        with _Alive(self, ctx):
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever, name="inside a child")
                group.start_soon(anyio.sleep_forever, name="inside a child")

    async def shields(self, ctx: TaskContext, _given: object) -> None:
        """Takes its time to clean up, and will not be disturbed meanwhile."""
        with _Alive(self, ctx):
            try:
                await asyncio.Event().wait()
            finally:
                self.cleaning += 1
                with anyio.CancelScope(shield=True):
                    await self.may_clean_up.wait()

    async def swallows(self, ctx: TaskContext, _given: object) -> None:
        """Does not stop before it has been told many times, more often than it is told at once."""
        with _Alive(self, ctx):
            for _ in range(20):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    pass
            await asyncio.Event().wait()

    # ---- children in threads ----------------------------------------------------------------------

    def looks(self, ctx: SyncContext, _given: object) -> None:
        with _Alive(self, ctx):
            while not self.over.wait(0.01):
                ctx.check_cancelled()

    def never(self, ctx: SyncContext, _given: object) -> None:
        """Does not end before the test says so, asked or not."""
        with _Alive(self, ctx):
            self.over.wait()


PROGRAMS = {
    "runs a program": Command(["sleep", "600"]),
    # What is ignored stays so beyond the exec: whoever is seen as `sleep` ignores it.
    "ignores SIGTERM": Command(
        ["sh", "-c", 'trap "" TERM; exec sleep 600'], env={"MARK": "ignores SIGTERM"}
    ),
}


class _Alive:
    """A child says that its code runs, for as long as it does."""

    def __init__(self, tree: Tree, ctx: TaskContext | SyncContext) -> None:
        self._tree, self._ctx = tree, ctx

    def __enter__(self) -> None:
        self._tree.alive[self._ctx.task_id] = (self._ctx.run_id or "").rpartition("-")[0]

    def __exit__(self, *_: object) -> None:
        del self._tree.alive[self._ctx.task_id]


# ---- the census ------------------------------------------------------------------------------------


def programs() -> dict[str, psutil.Process]:
    """The programs that run now under this process, by the child they say they are."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name, task_id = process.name(), process.environ().get("FLOWSTEAD_TASK_ID")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if task_id is not None and name == "sleep":
            found[task_id] = process
    return found


def children_in_the_loop() -> set[str]:
    """The children that have an asyncio task."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return {name.split()[-1] for name in names if name.startswith("flowstead child ")}


def tasks_of_children() -> list[str]:
    """The asyncio tasks of flows, children and controllers, and those children have made."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    ours = ("flow ", "flowstead child", "flowstead controller", "inside a child")
    return [name for name in names if name.startswith(ours)]


async def below(flows: SessionFlows, flow_id: str) -> list[tuple[Task, int]]:
    """All children under a flow as the records have them, and how deep they are."""
    found, unseen = [], [(flow_id, 0)]
    while unseen:
        here, depth = unseen.pop()
        for task in await flows.list_tasks(here):
            found.append((task, depth))
            if task.child_flow_id is not None:
                unseen.append((task.child_flow_id, depth + 1))
    return found


class Stand:
    """A tree that stands in a runtime, and the census of it."""

    def __init__(self, runtime: Runtime, tree: Tree, flow_id: str, size: int) -> None:
        self.runtime, self.tree, self.flow_id, self.size = runtime, tree, flow_id, size
        self.flows = flows_of(runtime)
        self.leaves: dict[str, str] = {}
        self.programs: dict[str, psutil.Process] = {}
        self.nested: dict[str, Task] = {}
        self.flow_of: dict[str, str] = {}
        self.depth_of: dict[str, int] = {}

    async def grow(self) -> None:
        """Wait until everything the plan says runs, and take the census."""
        wanted = self.size - NESTED
        running = self.runtime.statistics
        await in_time(lambda: running().running_children == self.size)
        await in_time(lambda: len(self.tree.alive) + len(programs()) == wanted)
        self.leaves, self.programs = dict(self.tree.alive), programs()
        for task, depth in await below(self.flows, self.flow_id):
            self.flow_of[task.task_id], self.depth_of[task.task_id] = task.flow_id, depth
            if task.child_flow_id is not None:
                self.nested[task.task_id] = task
        assert len(self.nested) == NESTED, "vacuous: the tree has not grown"
        assert self.everybody == set(self.flow_of), "vacuous: the census has missed somebody"
        assert len(self.everybody) == self.size

    @property
    def everybody(self) -> set[str]:
        """All that lives below the root, by their ids."""
        return {*self.leaves, *self.programs, *self.nested}

    def count(self, kind: str) -> int:
        """How many children of a kind run in this process."""
        return Counter(self.leaves.values())[kind]

    def above(self, tasks: set[str]) -> set[str]:
        """The nested flows that cannot end before some children do."""
        stands_for = {task.child_flow_id: task_id for task_id, task in self.nested.items()}
        found, unseen = set[str](), {self.flow_of[task_id] for task_id in tasks}
        while unseen:
            if task_id := stands_for.get(unseen.pop()):
                found.add(task_id)
                unseen.add(self.flow_of[task_id])
        return found

    def check_nobody_is_left(self) -> None:
        """Nobody of the tree runs any more, wherever one looks."""
        assert self.tree.alive == {}
        assert programs() == {}
        assert not [process for process in self.programs.values() if process.is_running()]
        assert tasks_of_children() == []
        assert self.runtime.statistics().running_children == 0


async def in_time(is_so: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for what threads and processes have to bring about first."""
    with anyio.fail_after(PATIENCE):
        while True:
            told = is_so()
            if told if isinstance(told, bool) else await told:
                return
            await asyncio.sleep(0.005)


def in_a_loop_of_its_own(play: Callable[[Tree], Coroutine[Any, Any, T]]) -> T:
    """Play a scene; afterwards there are the threads and descriptors there were before."""
    threads, descriptors = set(threading.enumerate()), psutil.Process().num_fds()
    result = asyncio.run(_to_the_end(play))
    for thread in set(threading.enumerate()) - threads:
        # Those that wait for more work are told to go as the loop ends.
        thread.join(PATIENCE)
    assert set(threading.enumerate()) <= threads
    assert psutil.Process().num_fds() <= descriptors
    return result


# ---- scenes ----------------------------------------------------------------------------------------


def test_of_a_tree_cancelled_at_its_root_nothing_is_left_and_the_report_has_a_line_for_each(
    db: Path,
):
    async def play(tree: Tree) -> None:
        async with running(
            db, registry=tree.registry, limits=LIMITS, durability="normal"
        ) as runtime:
            await cut_down_a_small_one(runtime)
            descriptors = psutil.Process().num_fds()
            it = await plant(runtime, tree, TREE)
            kinds = {*IN_THE_LOOP, "looks"}
            assert set(it.leaves.values()) == kinds, "vacuous: a kind is missing"
            assert it.programs, "vacuous: there is no program"

            cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=PATIENCE))
            await in_time(lambda: tree.cleaning == it.count("shields"))
            assert not cancelling.done()
            tree.may_clean_up.set()
            report = await cancelling

            assert (report.cancelled, report.code) == (True, None)
            assert runtime.statistics().running_children == 0
            await settle()
            it.check_nobody_is_left()
            assert psutil.Process().num_fds() <= descriptors
            lines = lines_of(report)
            assert set(lines) == it.everybody
            assert {(line.state, line.status) for line in lines.values()} == {
                ("settled", "cancelled")
            }
            assert {line.task_id: line.depth for line in lines.values()} == it.depth_of
            assert max(it.depth_of.values()) == LEVELS - 1
            assert all(told_in_order(line) and line.killed_at is None for line in lines.values())

    in_a_loop_of_its_own(play)
    check_all(db)


STUBBORN = "ignores SIGTERM"


def test_of_a_tree_with_stubborn_parts_the_report_says_who_runs_who_was_killed_and_who_was_given_up(
    db: Path,
):
    async def play(tree: Tree) -> None:
        clock = ManualClock()
        async with running(
            db, registry=tree.registry, limits=LIMITS, durability="normal", clock=clock
        ) as runtime:
            it = await plant(runtime, tree, TREE, "never", *[STUBBORN] * 3)
            [never] = [task_id for task_id, kind in it.leaves.items() if kind == "never"]
            stubborn = {i for i, p in it.programs.items() if p.environ().get("MARK") == STUBBORN}
            assert len(stubborn) == 3, "vacuous: nobody is stubborn"

            # Asked: whoever obeys is gone; the clock stands before anybody is killed.
            tree.may_clean_up.set()
            patience = LIMITS.kill_after + LIMITS.abandon_after + 1000
            cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=patience))
            last = {never, *stubborn, *it.above({never, *stubborn})}
            await in_time(lambda: clock.advance(0.1) or children_in_the_loop() == last)
            pending = await report_now(it, clock)

            assert (pending.cancelled, pending.code) == (False, "cancel_pending")
            assert states_of(pending) == in_states(it, running=last)
            assert "thread" in (lines_of(pending)[never].why or "")
            assert set(programs()) == stubborn

            # Killed: the programs are gone, the thread is not.
            clock.advance(LIMITS.kill_after)
            last = {never, *it.above({never})}
            await in_time(lambda: children_in_the_loop() == last)
            killed = await report_now(it, clock)

            assert killed.code == "cancel_pending"
            assert states_of(killed) == in_states(it, running=last, killed=stubborn)
            assert programs() == {}

            # Given up: the tree has ended without it.
            clock.advance(LIMITS.abandon_after)
            report = await soon(cancelling)

            assert report.flow
            assert report.flow.status == "cancelled"
            assert (report.cancelled, report.code) == (False, "abandoned")
            assert states_of(report) == in_states(it, killed=stubborn, abandoned={never})
            assert set(lines_of(report)) == it.everybody
            assert all(told_in_order(line) for line in report.descendants)
            statistics = runtime.statistics()
            assert (statistics.running_children, statistics.abandoned) == (0, 1)
            assert set(tree.alive) == {never}, "vacuous: it has stopped by itself"

            tree.over.set()
            await in_time(lambda: not tree.alive and not tasks_of_children())
            it.check_nobody_is_left()

    in_a_loop_of_its_own(play)
    check_all(db)


async def plant(runtime: Runtime, tree: Tree, size: int, *more: str) -> Stand:
    """A tree that has grown."""
    flow_id = await new_flow(flows_of(runtime), "node", state_json=plan_of(size, *more))
    it = Stand(runtime, tree, flow_id, size)
    await it.grow()
    return it


async def report_now(it: Stand, clock: ManualClock) -> CancelReport:
    """Cancel once more, and lose patience at once."""
    cancelling = asyncio.create_task(it.flows.cancel(it.flow_id, grace=0.1))
    await in_time(lambda: clock.advance(0.1) or cancelling.done())
    return await cancelling


async def cut_down_a_small_one(runtime: Runtime) -> None:
    """So that what is opened once, and kept, is open."""
    plan = {"below": [{"below": [], "leaves": ["runs a program", "looks"]}], "leaves": []}
    flows = flows_of(runtime)
    flow_id = await new_flow(flows, "node", state_json=plan)
    await in_time(lambda: len(programs()) == 1)
    assert (await flows.cancel(flow_id)).cancelled


async def _to_the_end(play: Callable[[Tree], Coroutine[Any, Any, T]]) -> T:
    tree = Tree()
    try:
        return await play(tree)
    finally:
        tree.over.set()
        tree.may_clean_up.set()


def lines_of(report: CancelReport) -> dict[str, Settlement]:
    """The lines of a report by child; one for each."""
    lines = {line.task_id: line for line in report.descendants}
    assert len(lines) == len(report.descendants)
    return lines


def states_of(report: CancelReport) -> dict[str, str]:
    return {task_id: line.state.value for task_id, line in lines_of(report).items()}


def in_states(it: Stand, **others: set[str]) -> dict[str, str]:
    """Everybody has settled but some."""
    states = dict.fromkeys(it.everybody, "settled")
    for state, tasks in others.items():
        states |= dict.fromkeys(tasks, state)
    return states


def told_in_order(line: Settlement) -> bool:
    """Whether the rungs of a line follow one another."""
    rungs = [line.asked_at, line.killed_at, line.ended_at]
    stamped = [rung for rung in rungs if rung is not None]
    return line.asked_at is not None and line.ended_at is not None and stamped == sorted(stamped)
