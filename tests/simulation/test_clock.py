"""Wall clocks that are put right while a runtime sleeps."""

from __future__ import annotations

import asyncio

from flowstead.testing import Simulation
from tests.simulation.machine import LIMITS

HOUR_MS = 3_600_000


def test_a_due_instant_is_met_when_the_wall_clock_is_put_forward() -> None:
    with Simulation(1) as simulation:
        runtime = simulation.boot(limits=LIMITS)

        async def ask_for_a_cancel() -> str:
            flows = runtime.tasks.flow.bind_session(session_key="agent:a")
            flow = await flows.create_managed(controller_id="shop/triage", goal="triage")
            await flows.request_cancel(flow_id=flow.flow_id, expected_revision=0)
            return flow.flow_id

        flow_id = simulation.play(ask_for_a_cancel())
        simulation.kill()
        simulation.clock.shift_ms = -HOUR_MS
        runtime = simulation.boot(limits=LIMITS)

        async def end() -> str:
            await asyncio.sleep(5.0)
            simulation.clock.shift_ms = 0
            await asyncio.sleep(LIMITS.cancel_grace + 90.0)
            flow = await runtime.admin.get(flow_id)
            assert flow is not None
            return flow.status

        status = simulation.play(end())
        simulation.shut()

        assert status == "cancelled"
