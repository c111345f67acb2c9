"""Flows with a bug that no plain run shows, each beside its mended self.

Each function plays one flow in the simulation it is given and asserts what should be true in the end. With
`mended` it should be true in every run; without, some run shows that it is not.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import count
from typing import Any, TypeAlias

from flowstead import FlowContext, Registry, Retry, Runtime, TaskContext
from flowstead.errors import ChildError
from flowstead.testing import Simulation

Bug: TypeAlias = Callable[[Simulation, bool], None]

BY_CRASHES: list[Bug] = []
"""Found by a crash before some step of the plain run."""
BY_SEEDS: list[Bug] = []
"""Found only where steps are shuffled, the disk is slow or fails, or several things happen at once."""


def found_by_a_crash(bug: Bug) -> Bug:
    BY_CRASHES.append(bug)
    return bug


def found_by_a_seed(bug: Bug) -> Bug:
    BY_SEEDS.append(bug)
    return bug


class Bank:
    """Somebody who is charged; who charges again under the same key is charged once."""

    def __init__(self) -> None:
        self.charges: list[str | None] = []

    async def charge(self, key: str | None = None) -> str:
        await asyncio.sleep(0)
        if key is None or key not in self.charges:
            self.charges.append(key)
        return "paid"


@found_by_a_crash
def an_effect_in_the_controller_outside_a_step(sim: Simulation, mended: bool) -> None:
    bank, registry = Bank(), Registry()

    @registry.controller("order")
    async def order(flow: FlowContext) -> None:
        if mended:
            await flow.once("charge", lambda: bank.charge(flow.flow_id))
        else:
            await bank.charge()

    sim.run_flow(registry, "order")

    assert len(bank.charges) == 1


@found_by_a_crash
def a_step_named_at_random(sim: Simulation, mended: bool) -> None:
    bank, registry = Bank(), Registry()

    @registry.task
    async def charge(ctx: TaskContext, order: str) -> str:
        return await bank.charge(ctx.run_id)

    @registry.controller("order")
    async def order(flow: FlowContext) -> None:
        number = 1 if mended else random.randrange(1_000_000)
        await flow.run(charge, "o-1", name=f"charge {number}")

    sim.run_flow(registry, "order")

    assert len(bank.charges) == 1


@found_by_a_crash
def a_step_named_by_a_counter_kept_over_entries(sim: Simulation, mended: bool) -> None:
    bank, registry, entries = Bank(), Registry(), count(1)

    @registry.task
    async def charge(ctx: TaskContext, order: str) -> str:
        return await bank.charge(ctx.run_id)

    @registry.controller("order")
    async def order(flow: FlowContext) -> None:
        number = next(count(1) if mended else entries)
        await flow.run(charge, "o-1", name=f"charge {number}")

    sim.run_flow(registry, "order")

    assert len(bank.charges) == 1


@found_by_a_crash
def the_memory_of_the_process_as_state(sim: Simulation, mended: bool) -> None:
    memory: dict[str, Any] = {}
    registry, published = Registry(), set()

    @registry.task
    async def write(ctx: TaskContext, subject: str) -> str:
        memory["draft"] = f"on {subject}"
        return f"on {subject}"

    @registry.task
    async def publish(ctx: TaskContext, draft: Any) -> None:
        published.add(draft)

    @registry.controller("article")
    async def article(flow: FlowContext) -> None:
        draft = await flow.run(write, "actors")
        await flow.run(publish, draft if mended else memory.get("draft"))

    async def host(runtime: Runtime) -> None:
        memory.clear()
        flows = runtime.tasks.flow.bind_session(session_key="me")
        flow = await flows.create_managed(
            controller_id="article", goal="publish", idempotency_key="1"
        )
        await flows.result(flow.flow_id)

    sim.run(host, registry=registry)

    assert published == {"on actors"}


@found_by_a_crash
def an_update_that_counts_again_when_entered_again(sim: Simulation, mended: bool) -> None:
    registry = Registry()

    @registry.task
    async def read(ctx: TaskContext, page: int) -> int:
        return page

    @registry.controller("reader")
    async def reader(flow: FlowContext) -> None:
        for page in (1, 2):
            await flow.run(read, page)
            done = page if mended else flow.state_json["pages"] + 1
            await flow.update(state_json={"pages": done})

    flow = sim.run_flow(registry, "reader", state_json={"pages": 0})

    assert flow.state_json == {"pages": 2}


@found_by_a_crash
def a_task_that_charges_again_when_it_is_started_again(sim: Simulation, mended: bool) -> None:
    bank, registry = Bank(), Registry()

    @registry.task
    async def charge(ctx: TaskContext, order: str) -> str:
        return await bank.charge(ctx.task_id if mended else None)

    @registry.controller("order")
    async def order(flow: FlowContext) -> None:
        await flow.run(charge, "o-1")

    sim.run_flow(registry, "order")

    assert len(bank.charges) == 1


@found_by_a_crash
def an_idempotency_key_made_anew_for_each_attempt(sim: Simulation, mended: bool) -> None:
    bank, registry = Bank(), Registry()

    @registry.task
    async def charge(ctx: TaskContext, order: str) -> str:
        return await bank.charge(order if mended else f"{order}, attempt {ctx.attempt}")

    @registry.controller("order")
    async def order(flow: FlowContext) -> None:
        await flow.run(charge, "o-1")

    sim.run_flow(registry, "order")

    assert len(bank.charges) == 1


@found_by_a_crash
def marking_it_done_before_doing_it(sim: Simulation, mended: bool) -> None:
    registry, marked, sent = Registry(), set(), set()

    async def send() -> None:
        if not mended:
            if "welcome" in marked:
                return
            marked.add("welcome")
        await asyncio.sleep(0)
        sent.add("welcome")

    @registry.controller("mail")
    async def mail(flow: FlowContext) -> None:
        await flow.once("send", send)

    sim.run_flow(registry, "mail")

    assert sent == {"welcome"}


@found_by_a_crash
def a_lock_that_a_crash_leaves_taken(sim: Simulation, mended: bool) -> None:
    registry, holders = Registry(), list[str]()

    @registry.task(timeout=600)
    async def deploy(ctx: TaskContext, version: int) -> None:
        me = ctx.task_id if mended else "somebody"
        while holders and not (mended and holders == [me]):  # noqa: ASYNC110
            await asyncio.sleep(10)
        holders[:] = [me]
        await asyncio.sleep(5)
        holders.clear()

    @registry.controller("release")
    async def release(flow: FlowContext) -> None:
        await flow.run(deploy, 1)

    flow = sim.run_flow(registry, "release")

    assert flow.status == "succeeded"


@found_by_a_seed
def results_in_the_order_they_came_in(sim: Simulation, mended: bool) -> None:
    registry = Registry()
    came_in: dict[str, None] = {}

    @registry.task
    async def ask(ctx: TaskContext, whom: str) -> str:
        came_in[whom] = None
        return whom

    @registry.controller("survey")
    async def survey(flow: FlowContext) -> None:
        answers = await flow.map(ask, ["Ada", "Grace", "Edsger"])
        await flow.update(state_json=answers if mended else list(came_in))

    flow = sim.run_flow(registry, "survey")

    assert flow.state_json == ["Ada", "Grace", "Edsger"]


@found_by_a_seed
def a_lost_update_between_two_children(sim: Simulation, mended: bool) -> None:
    registry, guests = Registry(), {"list": frozenset[str]()}

    @registry.task
    async def invite(ctx: TaskContext, guest: str) -> None:
        await asyncio.sleep(len(guest))  # as long as it takes to ask them; nobody answers together
        if mended:
            guests["list"] |= {guest}
        else:
            invited = guests["list"]
            await ctx.progress("one more")
            guests["list"] = invited | {guest}

    @registry.controller("party")
    async def party(flow: FlowContext) -> None:
        await flow.map(invite, ["Ada", "Alan"])

    sim.run_flow(registry, "party")

    assert guests["list"] == {"Ada", "Alan"}


@found_by_a_crash
def a_bare_function_as_a_child_that_must_not_be_lost(sim: Simulation, mended: bool) -> None:
    registry, sent = Registry(), set()

    async def send(ctx: TaskContext, text: str) -> None:
        sent.add(text)

    if mended:
        registry.task(send)

    async def host(runtime: Runtime) -> None:
        flows = runtime.tasks.flow.bind_session(session_key="me")
        flow = await flows.create_managed(controller_id="mail", goal="send", idempotency_key="1")
        if not await flows.list_tasks(flow.flow_id):
            created = await flows.run_task(
                flow_id=flow.flow_id, run=send, run_id="send", task="send", input_json="hello"
            )
            created.unwrap()
        [child] = await flows.list_tasks(flow.flow_id)
        await flows.wait_task(child.task_id)

    sim.run(host, registry=registry)

    assert sent == {"hello"}


@found_by_a_seed
def every_error_taken_for_an_answer(sim: Simulation, mended: bool) -> None:
    bank, registry, refunds = Bank(), Registry(), set()
    awaited: type[BaseException] = ChildError if mended else BaseException

    @registry.task
    async def charge(ctx: TaskContext, order: str) -> str:
        return await bank.charge(order)

    @registry.task
    async def refund(ctx: TaskContext, order: str) -> None:
        refunds.add(order)

    @registry.controller("order")
    async def order(flow: FlowContext) -> None:
        try:
            await flow.run(charge, "o-1")
        except awaited:
            await flow.run(refund, "o-1")

    sim.run_flow(registry, "order")

    assert bank.charges == ["o-1"]
    assert not refunds


@found_by_a_seed
def a_deadline_too_short_for_a_slow_disk(sim: Simulation, mended: bool) -> None:
    registry = Registry()

    @registry.task(timeout=60 if mended else 1, retry=Retry() if mended else None)
    async def index(ctx: TaskContext, page: int) -> None:
        await ctx.progress("reading")

    @registry.controller("search")
    async def search(flow: FlowContext) -> None:
        await flow.map(index, [1, 2, 3])

    flow = sim.run_flow(registry, "search")

    assert flow.status == "succeeded"


@found_by_a_seed
def giving_up_after_the_second_attempt_although_nothing_failed(
    sim: Simulation, mended: bool
) -> None:
    registry = Registry()

    @registry.task
    async def download(ctx: TaskContext, parts: int) -> int:
        if ctx.attempt > 2 and not mended:
            raise RuntimeError("poisoned: tried twice already")
        for _ in range(parts):
            await asyncio.sleep(0)
        return parts

    @registry.controller("mirror")
    async def mirror(flow: FlowContext) -> None:
        await flow.run(download, 60)

    flow = sim.run_flow(registry, "mirror")

    assert flow.status == "succeeded"


@found_by_a_crash
def a_flow_made_without_an_idempotency_key(sim: Simulation, mended: bool) -> None:
    registry, made = Registry(), set()

    @registry.controller("order")
    async def order(flow: FlowContext) -> None:
        made.add(flow.flow_id)

    async def host(runtime: Runtime) -> None:
        flows = runtime.tasks.flow.bind_session(session_key="me")
        key = "o-1" if mended else None
        flow = await flows.create_managed(controller_id="order", goal="o-1", idempotency_key=key)
        await flows.result(flow.flow_id)

    sim.run(host, registry=registry)

    assert len(made) == 1


@found_by_a_seed
def an_answer_that_nobody_looks_at(sim: Simulation, mended: bool) -> None:
    async def host(runtime: Runtime) -> str:
        flows = runtime.tasks.flow.bind_session(session_key="me")
        flow = await flows.create_managed(controller_id="mail", goal="send", idempotency_key="1")
        if flow.ended_at is None:
            finished = await flows.finish(
                flow_id=flow.flow_id, expected_revision=flow.revision, state_json="sent"
            )
            if mended:
                finished.unwrap()
        found = await flows.get(flow.flow_id)
        assert found is not None
        return found.status

    assert sim.run(host) == "succeeded"
