"""Any text and any instant is kept as it is."""

from __future__ import annotations

import pytest
from msgspec import Raw

from flowstead.model.flow import FlowKey
from flowstead.store import codec
from flowstead.store.port import Scope, Store
from flowstead.testing.conformance.reads import ids, loaded
from flowstead.testing.conformance.rows import ALICE, HOSTILE, put, put_task

hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())


class Texts:
    """What callers name things by is compared and kept code point by code point."""

    @hostile
    async def test_any_text_is_kept_in_a_flow(self, store: Store, text: str) -> None:
        """In every field, and wherever a flow is found by it."""
        flow = await put(
            store,
            text,
            owner_key=text,
            controller_id=text,
            correlation_id=text,
            idempotency_key=text,
            goal=text,
            current_step=text,
            state_json=Raw(codec.encode({text: [text]})),
        )
        scope = Scope(text)

        found = await store.find_flow(scope, text)

        assert codec.encode((await loaded(store, text, text)).flow) == codec.encode(flow)
        assert found is not None
        assert (found.flow_id, found.owner_key, found.goal) == (text, text, text)
        assert found.state_json == {text: [text]}
        assert await ids(store, scope, controller_id=text, correlation_id=text) == [text]
        assert await ids(store, scope, id_prefix=text) == [text]
        assert await store.find_by_idempotency_key(text, text) == FlowKey(text, text)
        assert await store.count_by_controller() == {text: 1}
        assert await store.list_unfinished([text], after_key=0, limit=9) == [
            (flow.key, FlowKey(text, text))
        ]

    @hostile
    async def test_any_text_is_kept_in_a_child(self, store: Store, text: str) -> None:
        """In every field, and wherever a child is found by it."""
        flow = await put(store)
        await put_task(store, flow, text, run_id=text, runtime=text, label=text, task=text)

        child = await store.find_task(ALICE, text)
        summary = await store.summarize(ALICE, "flow")

        assert child is not None
        assert child[0] == FlowKey("alice", "flow")
        assert (child[1].task_id, child[1].label, child[1].runtime) == (text, text, text)
        assert (await loaded(store)).run_ids == [(text, text)]
        assert [t.run_id for t in await store.list_tasks(ALICE, "flow", task_ids=[text])] == [text]
        assert summary is not None and summary.by_runtime[text] == 1

    async def test_texts_that_look_alike_are_different_texts(self, store: Store) -> None:
        """A collation that folds case, accents or trailing spaces would find two of these equal."""
        alike = ["flow", "Flow", "flow ", " flow", "flöw", "flo\u0308w", "flow\x00", "ﬂow"]

        for text in alike:
            await put(store, text, idempotency_key=text)

        assert await ids(store, ALICE) == alike[::-1]
        for text in alike:
            assert (await loaded(store, text)).flow.flow_id == text
            assert await store.find_by_idempotency_key("alice", text) == FlowKey("alice", text)

    async def test_the_largest_instant_is_kept(self, store: Store) -> None:
        """Instants are whole milliseconds of up to 63 bits; a float or a 32-bit column would lose some."""
        largest = 2**63 - 1

        await put(store, cancel_requested_at=largest, due_at=largest)

        assert (await loaded(store)).flow.cancel_requested_at == largest
        assert await store.next_due(after=largest - 1) == largest
