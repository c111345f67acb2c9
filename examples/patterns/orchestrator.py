"""An orchestrator: a thousand items, eight workers, one item in twenty failing at first."""

import asyncio
import hashlib
from collections import Counter
from typing import Any

import flowstead

registry = flowstead.Registry()
ITEMS, WORKERS = 1000, 8
busy: Counter[str] = Counter()


@registry.task(timeout=30, retry=flowstead.Retry(max_attempts=4, initial=0.05))
async def work(ctx: flowstead.TaskContext, item: int) -> dict[str, Any]:
    busy["now"] += 1
    busy["most"] = max(busy["most"], busy["now"])
    try:
        await asyncio.sleep(0)
        if item % 20 == 0 and ctx.attempt == 1:
            raise ConnectionError(f"item {item}: the service is busy")
        return {"item": item, "digest": hashlib.sha256(str(item).encode()).hexdigest()[:8]}
    finally:
        busy["now"] -= 1


@registry.controller("batch/digest")
async def digest(flow: flowstead.FlowContext) -> None:
    outcomes = await flow.map(work, range(ITEMS), limit=WORKERS, return_outcomes=True)
    merged: dict[str, str] = {}
    counts = {"twice": 0, "failed": 0}
    for outcome in outcomes:
        match outcome:
            case flowstead.Succeeded({"item": item, "digest": found}):
                counts["twice"] += str(item) in merged
                merged[str(item)] = found
            case _:
                counts["failed"] += 1
    await flow.update(state_json={**counts, "merged": merged})


async def main() -> None:
    async with flowstead.open_runtime("orchestrator.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="boss")
        given = {"controller_id": "batch/digest", "goal": "digest"}
        made = await flows.create_managed(idempotency_key="1", **given)
        done = (await flows.result(made.flow_id)).state_json
        again = sum(task.attempt > 1 for task in await flows.list_tasks(made.flow_id))
        print(f"{made.status} -> {ITEMS} items, {len(done['merged'])} merged")
        print(f"  {done['twice']} twice, {done['failed']} failed, {again} tried again")
        print(f"  at most {busy['most']} at once in this process")


if __name__ == "__main__":
    asyncio.run(main())
