import asyncio

import flowstead

registry = flowstead.Registry()


@registry.task
async def greet(ctx: flowstead.TaskContext, name: str) -> str:
    return f"Hello, {name}!"


@registry.controller("hello")
async def hello(flow: flowstead.FlowContext) -> None:
    await flow.update(state_json=await flow.map(greet, ["Ada", "Grace", "Edsger"], limit=2))


async def main() -> None:
    async with flowstead.open_runtime("flows.db", registry=registry) as runtime:
        flows = runtime.tasks.flow.bind_session(session_key="me")
        flow = await flows.create_managed(controller_id="hello", goal="greet", idempotency_key="1")
        print(flow.status, "->", (await flows.result(flow.flow_id)).state_json)


asyncio.run(main())
