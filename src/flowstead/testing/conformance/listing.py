"""Listings: newest first, in pages, by conditions that mean exactly what they say."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from flowstead.model.flow import FlowStatus
from flowstead.store.port import EVERYONE, Store
from flowstead.testing.conformance.reads import ids
from flowstead.testing.conformance.rows import ALICE, changes, creates, flow_of, put


class Listing:
    """`list_flows` and its cursor, `key_of`."""

    async def test_flows_are_listed_newest_first_in_pages(self, store: Store) -> None:
        """`before_key` leaves out the flow it names; others' flows take no place in a page."""
        for n in range(7):
            await put(store, f"flow-{n}")
            await put(store, f"other-{n}", owner_key="bob")

        pages = [await ids(store, ALICE, limit=3)]
        for _ in range(3):
            before = await store.key_of(ALICE, pages[-1][-1])
            pages.append(await ids(store, ALICE, limit=3, before_key=before))

        assert pages == [
            ["flow-6", "flow-5", "flow-4"],
            ["flow-3", "flow-2", "flow-1"],
            ["flow-0"],
            [],
        ]
        assert await ids(store, ALICE, limit=0) == []

    async def test_pages_go_on_where_they_were_while_flows_are_added(self, store: Store) -> None:
        """A cursor is a place, not a count: nothing is told twice or left out."""
        for n in range(4):
            await put(store, f"flow-{n}")
        first = await ids(store, ALICE, limit=2)
        await put(store, "flow-4")

        rest = await ids(store, ALICE, before_key=await store.key_of(ALICE, first[-1]))

        assert (first, rest) == (["flow-3", "flow-2"], ["flow-1", "flow-0"])

    async def test_the_number_of_a_flow_is_its_key(self, store: Store) -> None:
        """`key_of` answers the key the flow was written with, and none for no flow."""
        flow = await put(store)

        assert await store.key_of(ALICE, "flow") == flow.key
        assert await store.key_of(EVERYONE, "flow") == flow.key
        assert await store.key_of(ALICE, "ghost") is None

    async def test_a_changed_flow_keeps_its_place_in_a_listing(self, store: Store) -> None:
        """Newest means made last, not changed last."""
        first = await put(store, "first")
        await put(store, "second")

        await store.commit([changes(replace(first, revision=2), seqs=[2])])

        assert await ids(store, ALICE) == ["second", "first"]

    async def test_flows_are_listed_by_their_keys_in_whatever_order_they_were_written(
        self, store: Store
    ) -> None:
        """Keys are given before commits, so a later key may be committed first."""
        keys = [store.next_key() for _ in range(3)]
        for n in (1, 2, 0):
            await store.commit([creates(flow_of(keys[n], f"flow-{n}"))])

        assert await ids(store, ALICE) == ["flow-2", "flow-1", "flow-0"]
        assert await ids(store, ALICE, limit=1, before_key=keys[2]) == ["flow-1"]

    async def test_a_cursor_need_not_be_a_flow(self, store: Store) -> None:
        """Any number is a place: before the first there is nothing, after the last everything."""
        flow = await put(store)

        assert await ids(store, ALICE, before_key=0) == []
        assert await ids(store, ALICE, before_key=flow.key + 1) == ["flow"]
        assert await ids(store, ALICE, before_key=2**62) == ["flow"]

    async def test_every_condition_narrows_a_listing(self, store: Store) -> None:
        """Each condition alone; the one on statuses holds where any of them fits."""
        a = await put(store, "a-1", controller_id="k1", correlation_id="c1")
        await put(store, "a-2", controller_id="k2", correlation_id="c1", status=FlowStatus.WAITING)
        await put(store, "b-1", controller_id="k1", status=FlowStatus.FAILED)
        b = await put(store, "b-2", status=FlowStatus.LOST, correlation_id="c2")

        assert await ids(store, ALICE, statuses=["running"]) == ["a-1"]
        assert await ids(store, ALICE, statuses=["failed", "lost"]) == ["b-2", "b-1"]
        assert await ids(store, ALICE, statuses=["failed", "failed"]) == ["b-1"]
        assert await ids(store, ALICE, statuses=["queued"]) == []
        assert await ids(store, ALICE, controller_id="k1") == ["b-1", "a-1"]
        assert await ids(store, ALICE, correlation_id="c1") == ["a-2", "a-1"]
        assert await ids(store, ALICE, id_prefix="a-") == ["a-2", "a-1"]
        assert await ids(store, ALICE, id_prefix="a-1") == ["a-1"]
        assert await ids(store, ALICE, id_prefix="a-11") == []
        assert await ids(store, ALICE, live=True) == ["a-2", "a-1"]
        assert await ids(store, ALICE, before_key=b.key) == ["b-1", "a-2", "a-1"]
        assert await ids(store, ALICE, before_key=a.key) == []

    async def test_live_flows_are_those_that_have_not_ended(self, store: Store) -> None:
        """Queued, running, waiting and blocked; `live=False` restricts nothing."""
        for status in FlowStatus:
            await put(store, status.value, status=status)

        assert await ids(store, ALICE, live=True) == ["blocked", "waiting", "running", "queued"]
        assert len(await ids(store, ALICE, live=False)) == len(FlowStatus)

    async def test_conditions_are_joined_by_and(self, store: Store) -> None:
        """One flow meets all of them; each of the others misses one."""
        await put(store, "a-1", controller_id="k", correlation_id="c")
        await put(store, "a-2", controller_id="k", correlation_id="c", status=FlowStatus.FAILED)
        await put(store, "a-3", controller_id="k", correlation_id="other")
        await put(store, "b-1", controller_id="k", correlation_id="c")
        await put(store, "a-4", owner_key="bob", controller_id="k", correlation_id="c")
        await put(store, "a-6", controller_id="other", correlation_id="c")
        last = await put(store, "a-5", controller_id="k", correlation_id="c")

        found = await ids(
            store,
            ALICE,
            statuses=["running", "failed"],
            controller_id="k",
            correlation_id="c",
            id_prefix="a",
            live=True,
            before_key=last.key,
        )

        assert found == ["a-1"]

    async def test_a_page_is_full_however_many_flows_a_condition_leaves_out(
        self, store: Store
    ) -> None:
        """The limit counts flows that are answered, not flows that are looked at."""
        for n in range(6):
            await put(store, f"flow-{n}", controller_id="even" if n % 2 == 0 else "odd")

        assert await ids(store, ALICE, limit=2, controller_id="even") == ["flow-4", "flow-2"]

    async def test_an_empty_condition_is_not_no_condition(self, store: Store) -> None:
        """Empty text names what is empty; only None asks for nothing. Every id begins with empty text."""
        await put(store, "without")
        await put(store, "with", controller_id="", correlation_id="")

        assert await ids(store, ALICE, controller_id="") == ["with"]
        assert await ids(store, ALICE, correlation_id="") == ["with"]
        assert await ids(store, ALICE, id_prefix="") == ["with", "without"]

    @pytest.mark.parametrize(
        ("prefix", "inside", "outside"),
        [
            ("a%", "a%b", "axb"),
            ("a_", "a_b", "axb"),
            ("a*", "a*b", "axb"),
            ("a'", "a'b", 'a"b'),
            ('a"', 'a"b', "a'b"),
            ("a\\", "a\\b", "ab"),
            ("é", "éa", "e\u0301a"),
            ("👩", "👩🏽", "🇨🇭"),
            ("a", "a", "A"),
            ("a\x00", "a\x00b", "ab"),
            ("שלום", "שלום-1", "שלו"),
            ("a", "a\U0010ffffz", "b"),
        ],
    )
    async def test_a_prefix_is_text_and_nothing_else(
        self, store: Store, prefix: str, inside: str, outside: str
    ) -> None:
        """No wildcards, no folding of case, no normalizing, no collation: code points from the start."""
        await put(store, inside)
        await put(store, outside)

        assert await ids(store, ALICE, id_prefix=prefix) == [inside]
        assert await ids(store, EVERYONE, id_prefix=prefix) == [inside]
