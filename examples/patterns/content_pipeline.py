"""A content pipeline: research, draft, publish, each looked at before the next; a kill between two is harmless."""

import asyncio
import importlib
from pathlib import Path
from typing import Any

import flowstead

registry = flowstead.Registry()
TOPICS = ["statistics", "textwrap", "perpetual_motion"]


@registry.task
async def research(ctx: flowstead.TaskContext, topic: str) -> dict[str, Any]:
    module = importlib.import_module(topic)  # what a search of the web would be
    return {"topic": topic, "about": str(module.__doc__).strip(), "see": list(module.__all__)}


@registry.task
async def draft(ctx: flowstead.TaskContext, notes: dict[str, Any]) -> str:
    return f"# {notes['topic']}\n\n{notes['about']}\n"


@registry.task
async def publish(ctx: flowstead.TaskContext, article: dict[str, str]) -> None:
    path = Path(f"{article['topic']}.md")  # written twice after a crash, it says the same
    await asyncio.to_thread(path.write_text, article["text"], "utf-8")


@registry.controller("content/article")
async def article(flow: flowstead.FlowContext) -> None:
    try:
        notes = await flow.run(research, flow.state_json)
    except flowstead.ChildError as nothing:  # nothing to write about: end here, saying why
        await flow.fail(current_step="research", blocked_summary=str(nothing))
        return
    text = await flow.run(draft, notes)
    if len(text.split()) < 20:  # too thin to go out: draft again, from all there is
        more = {**notes, "about": f"{notes['about']}\n\nSee also: {', '.join(notes['see'])}."}
        text = await flow.run(draft, more, name="draft again")
    await flow.run(publish, {"topic": notes["topic"], "text": text})


async def main() -> None:
    async with flowstead.open_runtime("content.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="desk")
        for topic in TOPICS:
            given = {"controller_id": "content/article", "goal": "write", "state_json": topic}
            made = await flows.create_managed(idempotency_key=topic, **given)
            done = await flows.result(made.flow_id)
            steps = [task.run_id for task in await flows.list_tasks(made.flow_id)]
            print(f"{topic}: {made.status} -> {done.status} {done.blocked_summary or ''}".strip())
            print(f"  {', '.join(steps)}")


if __name__ == "__main__":
    asyncio.run(main())
