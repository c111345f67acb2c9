"""A support router: examine the ticket, choose a specialist, hand over the slice of it that one needs."""

import asyncio
from typing import Any

import flowstead

Slice = dict[str, Any]
registry = flowstead.Registry()
TICKETS: list[Slice] = [
    {"id": "T-1", "text": "charged twice", "invoices": [42, 42], "log": "ok", "card": "4111-1"},
    {"id": "T-2", "text": "It crashes", "invoices": [9], "log": "no space left", "card": "5500-0"},
]
SLICES = {"billing": ["id", "invoices"], "technical": ["id", "log"]}


@registry.task
async def examine(ctx: flowstead.TaskContext, text: str) -> str:
    # Where a model would be asked.
    return "billing" if "charged" in text else "technical"


@registry.task
async def billing(ctx: flowstead.TaskContext, given: Slice) -> str:
    return f"refund one of {given['invoices']}"


@registry.task
async def technical(ctx: flowstead.TaskContext, given: Slice) -> str:
    return f"found in the log: {given['log']}"


@registry.controller("support/ticket")
async def ticket(flow: flowstead.FlowContext) -> None:
    whole = flow.state_json
    chosen = await flow.run(examine, whole["text"])
    piece = {name: whole[name] for name in SLICES[chosen]}
    answer = await flow.run(chosen, piece, name="specialist", timeout=30)
    await flow.update(state_json={**whole, "chosen": chosen, "answer": answer})


async def main() -> None:
    async with flowstead.open_runtime("support.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="support")
        for whole in TICKETS:
            given = {"controller_id": "support/ticket", "goal": "answer", "state_json": whole}
            made = await flows.create_managed(idempotency_key=whole["id"], **given)
            done = (await flows.result(made.flow_id)).state_json
            _, child = await flows.list_tasks(made.flow_id)
            print(whole["id"], made.status, "->", done["chosen"], list(child.input_json))
            print("   ", done["answer"])


if __name__ == "__main__":
    asyncio.run(main())
