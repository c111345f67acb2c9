"""How to test a flow: `pytest test_my_flow.py`, or run it as a program."""

import flowstead
from flowstead.testing import Simulation, explore


class Bank:
    """A world of the flow's own: who charges again under the same key is charged once."""

    def __init__(self) -> None:
        self.charges: dict[str, int] = {}

    async def charge(self, key: str, cents: int) -> None:
        self.charges.setdefault(key, cents)


def shop(bank: Bank) -> flowstead.Registry:
    registry = flowstead.Registry()

    @registry.task(retry=flowstead.Retry())
    async def charge(ctx: flowstead.TaskContext, cents: int) -> None:
        await bank.charge(ctx.task_id, cents)  # without the key, the exploration fails

    @registry.controller("shop/order")
    async def order(flow: flowstead.FlowContext) -> None:
        await flow.run(charge, flow.state_json["cents"])

    return registry


def orders_are_charged_once(sim: Simulation) -> None:
    bank = Bank()
    flow = sim.run_flow(shop(bank), "shop/order", state_json={"cents": 4200})
    assert flow.status == "succeeded"
    assert list(bank.charges.values()) == [4200]


def test_orders_are_charged_once() -> None:
    explore(orders_are_charged_once, seeds=50)


if __name__ == "__main__":
    gone = explore(orders_are_charged_once, seeds=50)
    print(f"{gone.runs} runs, {gone.crashes} crashes, no failure")
