"""A pipeline with a fallback editor: when the house editor does not answer, the next one on the list takes over."""

import asyncio
import textwrap
from pathlib import Path

import flowstead

registry = flowstead.Registry()
TEXT = "The boat left at six.  Nobody had counted the chairs,   and two were missing."
OUT = {"morning": [], "noon": ["house_editor"], "night": ["house_editor", "agency"]}


async def edit(who: str, issue: str, width: int) -> str:
    if who in OUT[issue]:  # where a call to a model would fail
        raise ConnectionError(f"{who} does not answer")
    return textwrap.fill(" ".join(TEXT.split()), width)


@registry.task(timeout=30, retry=flowstead.Retry(max_attempts=2, initial=0.01))
async def house_editor(ctx: flowstead.TaskContext, issue: str) -> str:
    return await edit("house_editor", issue, 40)


@registry.task(timeout=30)
async def agency(ctx: flowstead.TaskContext, issue: str) -> str:
    return await edit("agency", issue, 72)


@registry.controller("content/edited")
async def edited(flow: flowstead.FlowContext) -> None:
    issue = flow.state_json
    try:
        text = await flow.run(house_editor, issue, name="edit", fallback=[agency])
    except flowstead.ChildError as last:  # not one of them: nothing goes out unedited
        await flow.fail(current_step="edit", blocked_summary=f"unedited: {last}")
        return

    async def publish() -> int:  # done twice after a crash, it writes the same
        return await asyncio.to_thread(Path(f"{issue}.txt").write_text, text, "utf-8")

    await flow.once("publish", publish)


async def main() -> None:
    async with flowstead.open_runtime("editors.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="desk")
        for issue in OUT:
            given = {"controller_id": "content/edited", "goal": "edit", "state_json": issue}
            made = await flows.create_managed(idempotency_key=issue, **given)
            done = await flows.result(made.flow_id)
            print(f"{issue}: {made.status} -> {done.status} {done.blocked_summary or ''}".strip())
            for task in await flows.list_tasks(made.flow_id):
                print(f"  {task.run_id:15} {task.status:9} {task.task}, attempt {task.attempt}")


if __name__ == "__main__":
    asyncio.run(main())
