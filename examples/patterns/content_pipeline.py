"""A content pipeline: research, draft, edit, publish; when the editor fails, another one takes over."""

import asyncio
import importlib
import inspect
import textwrap
from pathlib import Path

import flowstead

registry = flowstead.Registry()


@registry.task
async def research(ctx: flowstead.TaskContext, topic: str) -> list[str]:
    module = importlib.import_module(topic)  # what a search of the web would be
    names = [name for name, _ in inspect.getmembers(module, inspect.isroutine) if name[0] != "_"]
    return [topic, str(inspect.getdoc(module)), f"See also: {', '.join(names)}."]


@registry.task
async def draft(ctx: flowstead.TaskContext, notes: list[str]) -> str:
    return "\n\n".join(notes) + "\n"


@registry.task(retry=flowstead.Retry(max_attempts=2, initial=0.01))
async def house_editor(ctx: flowstead.TaskContext, text: str) -> str:
    raise ConnectionError("the house editor does not answer")


@registry.task
async def spare_editor(ctx: flowstead.TaskContext, text: str) -> str:
    return textwrap.indent(text, "  ")


@registry.controller("content/article")
async def article(flow: flowstead.FlowContext) -> None:
    text = await flow.run(draft, await flow.run(research, flow.state_json))
    edited = await flow.run(house_editor, text, name="edit", fallback=[spare_editor])

    async def publish() -> int:  # done twice after a crash, it writes the same
        return await asyncio.to_thread(Path(f"{flow.state_json}.md").write_text, edited, "utf-8")

    await flow.once("publish", publish)


async def main() -> None:
    async with flowstead.open_runtime("content.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="desk")
        given = {"controller_id": "content/article", "goal": "write", "state_json": "textwrap"}
        made = await flows.create_managed(idempotency_key="textwrap", **given)
        done = await flows.result(made.flow_id)
        print(f"{made.status} -> {done.status}: {done.state_json}.md")
        for task in await flows.list_tasks(made.flow_id):
            print(f"  {task.run_id:16} {task.status:10} {task.task}, attempt {task.attempt}")


if __name__ == "__main__":
    asyncio.run(main())
