"""A flow that is retried after an approval: people are asked again, and nothing is done again."""

from __future__ import annotations

import flowstead
from tests.faulty_store import flows_of


async def test_a_retried_flow_asks_for_its_approvals_again_and_does_what_was_done_no_more() -> None:

    paid: list[str] = []
    registry = flowstead.Registry()

    @registry.task
    async def pay(ctx: flowstead.TaskContext, order: dict[str, int]) -> str:
        paid.append(ctx.flow_id)
        return "paid"

    @registry.controller("pays")
    async def pays(flow: flowstead.FlowContext) -> None:
        decision = await flow.approve("Pay?", {"amount": 82}, name="ok")
        await flow.run(pay, decision.items, name="pay", approval=decision)
        if flow.flow.retry_of is None:
            raise RuntimeError("the receipt was lost")

    async with flowstead.open_runtime(":memory:", registry=registry) as runtime:
        flows = flows_of(runtime)
        first = await flows.create_managed(controller_id="pays", goal="pay")
        await approve_what_is_asked(flows, first.flow_id)
        assert (await flows.result(first.flow_id)).status == "failed"

        again = (await flows.retry_flow(first.flow_id)).unwrap()
        await approve_what_is_asked(flows, again.flow_id)

        assert (await flows.result(again.flow_id)).status == "succeeded"
        assert paid == [first.flow_id]


async def approve_what_is_asked(flows: flowstead.SessionFlows, flow_id: str) -> None:
    async with flows.watch(flow_id, after_seq=0) as events:
        async for event in events:
            if event.type == "flow.waiting":
                break
    [question] = await flows.list_waits(flow_id)
    assert question.approval is not None
    report = await flows.vote(
        "approve", approver="ada", digest=question.approval.digest, token=question.token
    )
    assert report.counted
