"""The ledger face: an orchestrator of your own keeps its flow here, one durable step after the other."""

import asyncio
import time

import flowstead


async def main() -> None:
    now_ms = time.time_ns() // 1_000_000
    async with flowstead.open_runtime("flows.db") as runtime:
        flows = runtime.tasks.flow.bind_session(
            session_key="agent:main:main", requester_origin={"channel": "slack"}
        )
        created = await flows.create_managed(
            controller_id="my-plugin/inbox-triage",
            goal="triage inbox",
            current_step="classify",
            state_json={"businessThreads": [], "personalItems": [], "eodSummary": []},
        )
        child = await flows.run_task(
            flow_id=created.flow_id,
            runtime="acp",
            child_session_key="agent:main:subagent:classifier",
            run_id="inbox-classify-1",
            task="Classify inbox messages",
            status="running",
            started_at=now_ms,
            last_event_at=now_ms,
        )
        if not child.created:
            raise RuntimeError(child.reason)
        waiting = await flows.set_waiting(
            flow_id=created.flow_id,
            expected_revision=created.revision,
            current_step="await_business_reply",
            state_json={**created.state_json, "businessThreads": ["slack:thread-1"]},
            wait_json={"kind": "reply", "channel": "slack", "threadKey": "slack:thread-1"},
        )
        if not waiting.applied:
            raise RuntimeError(waiting.code)
        resumed = await flows.resume(
            flow_id=waiting.flow.flow_id,
            expected_revision=waiting.flow.revision,
            status="running",
            current_step="finalize",
            state_json=waiting.flow.state_json,
        )
        # A refusal can be raised instead of looked at: unwrap() answers the flow or raises.
        flow = resumed.unwrap()
        done = await flows.finish(
            flow_id=flow.flow_id, expected_revision=flow.revision, state_json=flow.state_json
        )
        print(done.unwrap().status, done.unwrap().revision)


asyncio.run(main())
