"""The controller face as users write it, held to strict types. Checked, never run."""

from __future__ import annotations

from typing import Any, assert_type

from flowstead import (
    ChildError,
    ChildTimedOut,
    Flow,
    FlowContext,
    Registry,
    Retry,
    Step,
    Succeeded,
    TaskContext,
    open_runtime,
)

registry = Registry()


@registry.task(timeout=60, retry=Retry(max_attempts=4))
async def classify(ctx: TaskContext, thread: dict[str, Any]) -> str:
    """Registered with a policy."""
    return str(thread["subject"])


@registry.task
async def post(ctx: TaskContext, text: str) -> None:
    """Registered as it is."""
    await ctx.progress(text)


@registry.controller("my-plugin/inbox-triage")
async def inbox_triage(flow: FlowContext) -> None:
    """Steps, values and failures."""
    assert_type(flow.flow, Flow)
    assert_type(flow.flow_id, str)
    assert_type(flow.revision, int)
    assert_type(flow.current_step, str | None)
    routes = await flow.map(classify, flow.state_json["threads"], limit=8)
    assert_type(routes, list[Any])
    await flow.update(current_step="posting", state_json={"routes": routes})
    try:
        await flow.run(post, "hello", name="post", timeout=5)
    except ChildTimedOut as late:
        assert_type(late.task_id, str)
    except ChildError as error:
        await flow.fail(blocked_summary=error.failure.message)

    async def stamp() -> int:
        return 1

    await flow.once("stamp", stamp)
    await flow.finish(state_json=None)


@registry.controller("my-plugin/fan-out")
async def fan_out(flow: FlowContext) -> None:
    """Steps beside the controller."""
    await flow.run(classify, {}, fallback=[post, "post"])
    steps = [await flow.start(classify, thread, timeout=5) for thread in flow.state_json]
    assert_type(steps, list[Step])
    async for step in flow.as_completed(steps):
        assert_type(step, Step)
        assert_type(step.name, str)
        assert_type(step.task_id, str)
        if isinstance(outcome := await step.outcome(), Succeeded):
            assert_type(outcome, Succeeded)
    [winner] = await flow.first(steps)
    assert_type(winner, Step)
    assert_type(await flow.gather(*steps, return_outcomes=True), list[Any])
    await winner.cancel()


async def serve() -> None:
    """A registry goes to a runtime; a registered function stays callable with its own types."""
    async with open_runtime("flows.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="agent:main")
        flow = await flows.create_managed(controller_id="my-plugin/inbox-triage", goal="triage")
        await flows.result(flow.flow_id)
