"""An orchestrator: a thousand items, eight workers; one item in twenty fails at first, some of them for good."""

import asyncio
import hashlib
from collections import Counter
from typing import Any

import flowstead

registry = flowstead.Registry()
ITEMS, WORKERS = 1000, 8
here: Counter[str] = Counter()


@registry.task(timeout=30, retry=flowstead.Retry(initial=0.05))
async def work(ctx: flowstead.TaskContext, item: int) -> dict[str, Any]:
    here["runs"] += 1
    here["now"] += 1
    here["most"] = max(here["most"], here["now"])
    try:
        await asyncio.sleep(0)
        if item % 200 == 0 or (item % 20 == 0 and ctx.attempt == 1):
            raise ConnectionError(f"item {item}: the service is busy")
        return {"item": item, "digest": hashlib.sha256(str(item).encode()).hexdigest()[:8]}
    finally:
        here["now"] -= 1


@registry.controller("batch/digest")
async def digest(flow: flowstead.FlowContext) -> None:
    items = range(ITEMS)
    outcomes = await flow.map(work, items, limit=WORKERS, return_outcomes=True)
    merged: dict[str, str] = {}
    failed, twice = [], 0
    for item, outcome in zip(items, outcomes, strict=True):
        match outcome:
            case flowstead.Succeeded({"item": done, "digest": found}):
                twice += str(done) in merged
                merged[str(done)] = found
            case _:
                failed.append(item)
    await flow.update(state_json={"merged": merged, "failed": failed, "twice": twice})


async def main() -> None:
    async with flowstead.open_runtime("orchestrator.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="boss")
        given = {"controller_id": "batch/digest", "goal": "digest"}
        made = await flows.create_managed(idempotency_key="1", **given)
        done = (await flows.result(made.flow_id)).state_json
        told = f"{len(done['merged'])} merged, {done['twice']} twice, failed: {done['failed']}"
        print(f"{made.status} -> {ITEMS} items: {told}")
        print(f"in this process: {here['runs']} runs, at most {here['most']} at once")


if __name__ == "__main__":
    asyncio.run(main())
