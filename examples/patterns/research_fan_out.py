"""Competitive research: look into every installed package side by side, merge what comes in as it comes in."""

import asyncio
from importlib import metadata
from pathlib import Path
from typing import Any

import flowstead

registry = flowstead.Registry()
REPORT = Path("report.txt")


@registry.task(timeout=30, retry=flowstead.Retry(initial=0.05))
async def look_into(ctx: flowstead.TaskContext, name: str) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        package = metadata.distribution(name)
        needs = [line for line in package.requires or [] if "extra ==" not in line]
        return {"name": name, "files": len(package.files or []), "needs": len(needs)}

    return await asyncio.to_thread(read)


async def installed() -> list[str]:
    return sorted({p.metadata["Name"] for p in metadata.distributions() if p.metadata["Name"]})


@registry.controller("research/packages")
async def compare(flow: flowstead.FlowContext) -> None:
    # A step of its own: run again after a crash, the flow goes on with the list it began with.
    names = await flow.once("list", installed)
    steps = [await flow.start(look_into, name, name=f"package {name}") for name in names]
    found = []
    async for step in flow.as_completed(steps):
        outcome = await step.outcome()
        if isinstance(outcome, flowstead.Succeeded):  # one that fails leaves a gap, no more
            found.append(outcome.result)

    async def write() -> None:
        ranked = sorted(found, key=lambda one: (-one["files"], one["name"]))
        rows = [f"{one['name']}: {one['files']} files, {one['needs']} needs\n" for one in ranked]
        await asyncio.to_thread(REPORT.write_text, "".join(rows), "utf-8")

    await flow.once("write", write)
    await flow.update(state_json={"found": found, "gaps": len(names) - len(found)})


async def main() -> None:
    async with flowstead.open_runtime("research.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="analyst")
        given = {"controller_id": "research/packages", "goal": "compare"}
        made = await flows.create_managed(idempotency_key="1", **given)
        done = (await flows.result(made.flow_id)).state_json
        print(f"{made.status} -> {len(done['found'])} packages, {done['gaps']} gaps, in {REPORT}")
        print("first in:", ", ".join(one["name"] for one in done["found"][:3]))


if __name__ == "__main__":
    asyncio.run(main())
