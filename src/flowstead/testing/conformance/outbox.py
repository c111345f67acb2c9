"""Updates wait in the outbox until they have gone out: one for each slot of a flow, found when they are due."""

from __future__ import annotations

import pytest
from msgspec import Raw
from msgspec.structs import replace

from flowstead.errors import WriteConflict
from flowstead.model.flow import StoredFlow
from flowstead.model.update import StoredUpdate, Update, UpdateStatus
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.store.port import EVERYONE, Scope, Store
from flowstead.testing.conformance.fixtures import MakeStore, StoreFixtures
from flowstead.testing.conformance.isolation import STRANGERS
from flowstead.testing.conformance.reads import ids, positions
from flowstead.testing.conformance.rows import (
    ALICE,
    BOB,
    NOW,
    changes,
    creates,
    ends,
    flow_of,
    put,
    put_end,
    put_update,
    update_of,
    updates,
)

FINAL = [status for status in UpdateStatus if status is not UpdateStatus.PENDING]


async def all_of(store: Store, scope: Scope = EVERYONE, **conditions: object) -> list[Update]:
    """Every update in scope."""
    flow_id, statuses = conditions.get("flow_id"), conditions.get("statuses", ())
    assert flow_id is None or isinstance(flow_id, str)
    assert isinstance(statuses, tuple)
    return await store.list_updates(
        scope, flow_id=flow_id, statuses=statuses, after_key=0, limit=100
    )


async def due(store: Store, until: int = NOW) -> list[StoredUpdate]:
    """What goes out alone, and is due."""
    return await store.list_updates_due(until=until, limit=100)


async def told(store: Store) -> list[tuple[str, str]]:
    """The text and the status of every update."""
    return [(update.text, update.status) for update in await all_of(store)]


class Outbox(StoreFixtures):
    """The updates of a commit, `list_updates_due`, `list_digests_due`, `next_update_due` and `list_updates`."""

    # ---- writing ----------------------------------------------------------------------------------

    async def test_an_update_comes_back_as_it_was_written(self, store: Store) -> None:
        """To keep: the record handed in. To hand out: the same, with its JSON decoded."""
        flow = await put(store, current_step="classify")
        update = await put_update(
            store,
            flow,
            "reminder:1",
            data=Raw(b'{ "n" : [1] }'),
            requester_origin=Raw(b'{"channel":"slack"}'),
            attempt=2,
            failure="no answer",
            version=3,
        )

        [kept], [shown] = await due(store), await all_of(store)

        assert codec.encode(kept) == codec.encode(update)
        assert type(shown) is Update
        assert (shown.data, shown.requester_origin) == ({"n": [1]}, {"channel": "slack"})
        assert (shown.idempotency_key, shown.attempt) == (update.idempotency_key, 2)

    async def test_an_update_goes_in_with_the_turn_that_caused_it_or_not_at_all(
        self, store: Store
    ) -> None:
        """Beside a flow, an event, a child."""
        flow = await put(store)
        new = codec.update_row(update_of(store.next_key(), flow), fresh=True)
        stale = changes(replace(flow, revision=5), seen=4, seqs=[2])

        with pytest.raises(WriteConflict):
            await store.commit([replace(stale, updates=[new])])
        before = await all_of(store)
        await store.commit([replace(changes(replace(flow, revision=2), seqs=[2]), updates=[new])])

        assert before == []
        assert len(await all_of(store)) == 1

    async def test_an_update_has_no_place_in_the_history(self, store: Store) -> None:
        """It uses no position, alone or beside a flow."""
        flow = await put(store)

        await put_update(store, flow, "a")
        one = updates(update_of(store.next_key(), flow, "b")).updates
        write = creates(flow_of(store.next_key(), "next"))
        position = await store.commit([replace(write, updates=one)])

        assert position == 2
        assert await positions(store) == [1, 2]
        assert await store.last_position() == 2

    @pytest.mark.parametrize("slot", ["done", "reminder:1"])
    async def test_a_slot_is_taken_once_and_the_second_batch_is_refused_whole(
        self, store: Store, slot: str
    ) -> None:
        """However far the first has come. Another flow has slots of its own."""
        flow, other = await put(store), await put(store, "other")
        first = await put_update(store, flow, slot, text="first")
        await store.commit(
            [updates(replace(first, status=UpdateStatus.DELIVERED, due_at=None), fresh=False)]
        )

        with pytest.raises(WriteConflict):
            await store.commit(
                [
                    creates(flow_of(store.next_key(), "beside")),
                    updates(update_of(store.next_key(), flow, "free", text="free")),
                    updates(update_of(store.next_key(), flow, slot, text="second")),
                ]
            )
        await put_update(store, other, slot, text="other")

        assert await told(store) == [("first", "delivered"), ("other", "pending")]
        assert await ids(store, ALICE) == ["other", "flow"]

    async def test_a_slot_taken_twice_in_one_batch_is_refused(self, store: Store) -> None:
        """Uniqueness holds inside a batch, too."""
        flow = await put(store)
        twice = [update_of(store.next_key(), flow, "done") for _ in range(2)]

        with pytest.raises(WriteConflict):
            await store.commit([updates(*twice)])

        assert await all_of(store) == []

    async def test_the_key_of_an_update_that_is_taken_by_another_is_refused(
        self, store: Store
    ) -> None:
        """Two updates never share a key of the store."""
        flow = await put(store)
        first = await put_update(store, flow, "first", text="first")

        with pytest.raises(WriteConflict):
            await store.commit([updates(update_of(first.key, flow, "second"))])

        assert await told(store) == [("first", "pending")]

    # ---- progress ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("status", list(UpdateStatus))
    async def test_newer_progress_takes_the_place_of_older_however_far_that_has_come(
        self, store: Store, status: UpdateStatus
    ) -> None:
        """One row, under the key it had, with a higher version: no reader mixes up the two."""
        flow = await put(store)
        older = await put_update(store, flow, text="older")
        await store.commit([updates(replace(older, status=status, attempt=1), fresh=False)])

        newer = await put_update(store, flow, text="newer", due_at=NOW - 5)

        [stored] = await due(store)
        assert await told(store) == [("newer", "pending")]
        assert (stored.key, stored.attempt, stored.due_at) == (older.key, 0, NOW - 5)
        assert stored.version > older.version
        assert stored.idempotency_key == newer.idempotency_key != older.idempotency_key

    async def test_progress_is_replaced_as_often_as_it_comes_and_inside_one_batch(
        self, store: Store
    ) -> None:
        """The last one stays, and each has another version."""
        flow = await put(store)
        three = [update_of(store.next_key(), flow, text=f"{n}") for n in range(3)]

        await store.commit([updates(*three)])
        [first] = await due(store)
        await put_update(store, flow, text="3")
        [second] = await due(store)

        assert (first.text, second.text) == ("2", "3")
        assert first.key == second.key == three[0].key
        assert second.version > first.version

    async def test_a_version_that_is_ahead_is_kept(self, store: Store) -> None:
        """Whoever counts versions by other means than the store's may."""
        flow = await put(store)
        await put_update(store, flow, version=3)

        await put_update(store, flow, version=9)

        assert [update.version for update in await due(store)] == [9]

    async def test_progress_may_move_to_a_digest_and_back(self, store: Store) -> None:
        """The bucket is the newer one's."""
        flow = await put(store)

        await put_update(store, flow)
        await put_update(store, flow, bucket="daily")
        in_digest = (await due(store), await store.list_digests_due(until=NOW, limit=9))
        await put_update(store, flow)

        assert (len(in_digest[0]), len(in_digest[1])) == (0, 1)
        assert len(await due(store)) == 1
        assert await store.list_digests_due(until=NOW, limit=9) == []

    async def test_progress_of_one_flow_does_not_touch_that_of_another(self, store: Store) -> None:
        """Nor what is in other slots of the same flow."""
        flow, other = await put(store), await put(store, "other")
        await put_update(store, flow, text="a")
        await put_update(store, other, text="b")
        await put_update(store, flow, "reminder:1", text="c")

        await put_update(store, flow, text="d")

        assert sorted(await told(store)) == [("b", "pending"), ("c", "pending"), ("d", "pending")]

    # ---- done -------------------------------------------------------------------------------------

    async def test_the_end_of_a_flow_supersedes_its_pending_progress(self, store: Store) -> None:
        """Progress is not due any more, and says why; nobody else's is touched."""
        flow, other = await put(store), await put(store, "other")
        await put_update(store, flow, text="progress")
        await put_update(store, flow, "reminder:1", text="reminder")
        await put_update(store, other, text="other")

        await put_end(store, flow, due_at=NOW + 5)

        [progress] = [update for update in await all_of(store) if update.text == "progress"]
        assert (progress.status, progress.due_at) == ("superseded", None)
        assert sorted(update.text for update in await due(store)) == ["other", "reminder"]
        assert await store.next_update_due() == NOW
        assert [u.text for u in await due(store, NOW + 5)] == ["reminder", "other", "done"]

    @pytest.mark.parametrize("status", FINAL)
    async def test_the_end_of_a_flow_leaves_progress_alone_that_is_final(
        self, store: Store, status: UpdateStatus
    ) -> None:
        """What has gone out has gone out."""
        flow = await put(store)
        progress = await put_update(store, flow, text="progress", due_at=None, status=status)

        await put_end(store, flow)

        assert await told(store) == [("progress", status.value), ("done", "pending")]
        [shown, _] = await all_of(store)
        assert shown.idempotency_key == progress.idempotency_key

    async def test_progress_and_the_end_may_come_in_one_batch(self, store: Store) -> None:
        """In this order only the end goes out."""
        flow = await put(store)

        await store.commit(
            [
                updates(update_of(store.next_key(), flow, text="progress")),
                ends(flow, update_of(store.next_key(), flow, "done", text="done")),
            ]
        )

        assert await told(store) == [("progress", "superseded"), ("done", "pending")]

    async def test_progress_in_a_digest_is_superseded_as_well(self, store: Store) -> None:
        """A digest tells of no flow that has ended."""
        flow = await put(store)
        await put_update(store, flow, text="progress", bucket="daily")

        await put_end(store, flow)

        assert await store.list_digests_due(until=NOW, limit=9) == []
        assert await told(store) == [("progress", "superseded"), ("done", "pending")]

    async def test_the_end_of_a_flow_that_is_refused_supersedes_nothing(self, store: Store) -> None:
        """A batch is written whole or not at all."""
        flow = await put(store)
        await put_update(store, flow, "reminder:1", text="reminder")
        await put_update(store, flow, text="progress")
        taken = update_of(store.next_key(), flow, "reminder:1")

        with pytest.raises(WriteConflict):
            await store.commit([ends(flow), updates(taken)])

        assert await told(store) == [("reminder", "pending"), ("progress", "pending")]

    async def test_progress_is_superseded_although_nobody_is_told_of_the_end(
        self, store: Store
    ) -> None:
        """A runtime without a notifier may end what another one has begun to tell of."""
        flow, other = await put(store), await put(store, "other")
        await put_update(store, flow, text="progress")
        await put_update(store, other, text="other")

        await store.commit([ends(flow)])

        assert await told(store) == [("progress", "superseded"), ("other", "pending")]
        assert [update.text for update in await due(store)] == ["other"]

    # ---- how far it has come ----------------------------------------------------------------------

    async def test_what_became_of_an_update_is_written_over_it(self, store: Store) -> None:
        """Once more later, delivered, or given up: the record and when it is due."""
        flow = await put(store)
        update = await put_update(store, flow)
        later = replace(update, attempt=1, due_at=NOW + 50, failure="no answer")
        delivered = replace(
            later, attempt=2, due_at=None, status=UpdateStatus.DELIVERED, delivered_at=NOW + 50
        )

        await store.commit([updates(later, fresh=False)])
        early, [again] = await due(store, NOW + 49), await due(store, NOW + 50)
        await store.commit([updates(delivered, fresh=False)])

        assert early == []
        assert codec.encode(again) == codec.encode(later)
        assert await due(store, NOW + 50) == []
        [shown] = await all_of(store)
        assert (shown.status, shown.attempt, shown.delivered_at) == ("delivered", 2, NOW + 50)

    async def test_a_report_of_progress_that_was_replaced_meanwhile_changes_nothing(
        self, store: Store
    ) -> None:
        """It is no conflict either: the rest of its batch is written."""
        flow = await put(store)
        await put_update(store, flow, text="older")
        [older] = await due(store)
        await put_update(store, flow, text="newer")
        delivered = replace(older, status=UpdateStatus.DELIVERED, due_at=None)

        await store.commit(
            [creates(flow_of(store.next_key(), "beside")), updates(delivered, fresh=False)]
        )

        assert await told(store) == [("newer", "pending")]
        assert await ids(store, ALICE) == ["beside", "flow"]
        [newer] = await due(store)
        await store.commit(
            [updates(replace(newer, status=UpdateStatus.DELIVERED, due_at=None), fresh=False)]
        )
        assert await told(store) == [("newer", "delivered")]

    async def test_an_attempt_that_failed_does_not_bring_back_what_was_superseded_meanwhile(
        self, store: Store
    ) -> None:
        """Nobody is told of progress after the end."""
        flow = await put(store)
        await put_update(store, flow, text="progress")
        [progress] = await due(store)
        await put_end(store, flow)

        await store.commit([updates(replace(progress, due_at=NOW + 50), fresh=False)])

        assert await told(store) == [("progress", "superseded"), ("done", "pending")]
        assert [update.text for update in await due(store, NOW + 50)] == ["done"]

    async def test_a_report_of_an_update_that_is_not_there_changes_nothing(
        self, store: Store
    ) -> None:
        """It makes none."""
        flow = await put(store)

        await store.commit([updates(update_of(store.next_key(), flow), fresh=False)])

        assert await all_of(store) == []

    # ---- what is due ------------------------------------------------------------------------------

    async def test_updates_are_due_at_their_instant_longest_due_first(self, store: Store) -> None:
        """Then by key. Those that are final, never due, or go out in a digest are not among them."""
        flow = await put(store)
        early, late = store.next_key(), store.next_key()
        for key, slot, at in ((late, "20b", 20), (early, "20a", 20), (0, "10", 10), (0, "30", 30)):
            update = update_of(key or store.next_key(), flow, slot, text=slot, due_at=at)
            await store.commit([updates(update)])
        await put_update(store, flow, "final", due_at=5, status=UpdateStatus.DELIVERY_FAILED)
        await put_update(store, flow, "never", due_at=None)
        await put_update(store, flow, "digest", due_at=5, bucket="daily")

        async def found(until: int, limit: int = 10) -> list[str]:
            page = await store.list_updates_due(until=until, limit=limit)
            return [update.text for update in page]

        assert await found(9) == []
        assert await found(10) == ["10"]
        assert await found(29) == ["10", "20a", "20b"]
        assert await found(99) == ["10", "20a", "20b", "30"]
        assert await found(99, limit=2) == ["10", "20a"]

    async def test_digests_are_due_by_owner_and_bucket_oldest_first_in_each(
        self, store: Store
    ) -> None:
        """Whenever each of them is due, as long as it is; those that go out alone are not among them."""
        hers, his = await put(store), await put(store, owner_key="bob")
        for flow, bucket, slot, at in (
            (his, "daily", "1", 10),
            (hers, "weekly", "2", 10),
            (hers, "daily", "3", 20),
            (hers, "daily", "4", 10),
            (hers, "daily", "5", 31),
            (his, "", "6", 30),
            (hers, None, "7", 10),
        ):
            await put_update(store, flow, slot, text=slot, due_at=at, bucket=bucket)
        await put_update(store, hers, "8", due_at=10, bucket="daily", status=UpdateStatus.DIGESTED)

        async def found(until: int, limit: int = 10) -> list[tuple[str, str | None, str]]:
            page = await store.list_digests_due(until=until, limit=limit)
            return [(update.owner_key, update.bucket, update.text) for update in page]

        assert await found(9) == []
        assert await found(30) == [
            ("alice", "daily", "3"),
            ("alice", "daily", "4"),
            ("alice", "weekly", "2"),
            ("bob", "", "6"),
            ("bob", "daily", "1"),
        ]
        assert await found(10) == [
            ("alice", "daily", "4"),
            ("alice", "weekly", "2"),
            ("bob", "daily", "1"),
        ]
        assert await found(31, limit=3) == [("alice", "daily", n) for n in ("3", "4", "5")]

    async def test_the_next_update_is_the_first_that_is_pending(self, store: Store) -> None:
        """Alone or in a digest, due already or not yet; or the first that is due later than an instant."""
        flow = await put(store)
        assert await store.next_update_due() is None
        await put_update(store, flow, "final", due_at=5, status=UpdateStatus.DELIVERED)
        await put_update(store, flow, "never", due_at=None)
        assert await store.next_update_due() is None

        await put_update(store, flow, "later", due_at=30)
        await put_update(store, flow, "digest", due_at=20, bucket="daily")

        assert await store.next_update_due() == 20
        assert await store.next_update_due(after=19) == 20
        assert await store.next_update_due(after=20) == 30
        assert await store.next_update_due(after=30) is None
        for update in await store.list_digests_due(until=20, limit=9):
            digested = replace(update, status=UpdateStatus.DIGESTED, due_at=None)
            await store.commit([updates(digested, fresh=False)])
        assert await store.next_update_due() == 30

    # ---- listing ----------------------------------------------------------------------------------

    async def test_updates_are_listed_oldest_first_in_pages(self, store: Store) -> None:
        """By their keys, after one, as many as asked for."""
        flow = await put(store)
        keys = [store.next_key() for _ in range(5)]
        for key in reversed(keys):
            await store.commit([updates(update_of(key, flow, f"{key}", text=f"{key}"))])

        async def page(after: int, limit: int, flow_id: str | None = None) -> list[str]:
            found = await store.list_updates(
                ALICE, flow_id=flow_id, statuses=(), after_key=after, limit=limit
            )
            return [update.text for update in found]

        names = [f"{key}" for key in keys]
        for flow_id in (None, "flow"):
            assert await page(0, 2, flow_id) == names[:2]
            assert await page(keys[1], 2, flow_id) == names[2:4]
            assert await page(keys[3], 2, flow_id) == names[4:]
            assert await page(keys[4], 2, flow_id) == []
            assert await page(keys[0] - 1, 9, flow_id) == names
        assert [update.number for update in await all_of(store)] == keys

    async def test_progress_that_took_another_s_place_is_listed_in_that_place(
        self, store: Store
    ) -> None:
        """Its `number` is the key it took over, not the one it was written with."""
        flow = await put(store)
        await put_update(store, flow, "progress", text="old", version=1)
        [old] = await all_of(store)
        await put_update(store, flow, "progress", text="new", version=2)

        [new] = await all_of(store)
        after = await store.list_updates(
            ALICE, flow_id=None, statuses=(), after_key=new.number, limit=9
        )

        assert (new.text, new.number) == ("new", old.number)
        assert after == []

    async def test_updates_are_listed_by_status(self, store: Store) -> None:
        """No statuses: any."""
        flow = await put(store)
        for status in UpdateStatus:
            await put_update(store, flow, status.value, text=status.value, status=status)

        async def listed(*statuses: str) -> list[str]:
            return [update.text for update in await all_of(store, ALICE, statuses=statuses)]

        assert await listed() == [status.value for status in UpdateStatus]
        assert await listed("pending") == ["pending"]
        assert await listed("digested", "delivered") == ["delivered", "digested"]
        assert await listed("unheard-of") == []

    async def test_updates_are_those_in_scope_and_of_one_flow_if_asked(self, store: Store) -> None:
        """An operator sees everybody's; of a shared id, those of the newest flow."""
        flows: dict[str, StoredFlow] = {}
        for name, flow_id, owner in (("hers", "flow", "alice"), ("his", "flow", "bob")):
            flows[name] = await put(store, flow_id, owner_key=owner)
        flows["other"] = await put(store, "other")
        for name, flow in flows.items():
            await put_update(store, flow, text=name)

        async def listed(scope: Scope, flow_id: str | None = None) -> list[str]:
            return [update.text for update in await all_of(store, scope, flow_id=flow_id)]

        assert await listed(ALICE) == ["hers", "other"]
        assert await listed(BOB) == ["his"]
        assert await listed(EVERYONE) == ["hers", "his", "other"]
        assert await listed(ALICE, "flow") == ["hers"]
        assert await listed(EVERYONE, "flow") == ["his"]
        assert await listed(BOB, "other") == []
        assert await listed(ALICE, "ghost") == []
        for owner in STRANGERS[1:]:
            assert await listed(Scope(owner)) == [], owner
            assert await listed(Scope(owner), "flow") == [], owner

    async def test_updates_are_there_after_a_restart(
        self, store: Store, another: MakeStore
    ) -> None:
        """With what became of them; keys go on above theirs, slots stay taken."""
        flow = await put(store)
        await put_update(store, flow, text="older")
        await put_update(store, flow, text="progress")
        [progress] = await due(store)
        last = await put_end(store, flow)
        await store.commit([updates(replace(last, attempt=3), fresh=False)])
        await store.aclose()

        again = another()
        await again.open()

        assert await told(again) == [("progress", "superseded"), ("done", "pending")]
        [done] = await due(again)
        assert (done.key, done.attempt) == (last.key, 3)
        assert again.next_key() > last.key
        with pytest.raises(WriteConflict):
            await put_update(again, flow, "done")
        await again.commit([updates(progress, fresh=False)])
        assert await told(again) == [("progress", "superseded"), ("done", "pending")]
        assert await again.list_unreadable() == []

    # ---- bad rows ---------------------------------------------------------------------------------

    async def test_an_unreadable_update_is_left_out_and_listed(self, store: Store) -> None:
        """It is not due, takes no place in a page, and keeps its slot; the others go out."""
        flow = await put(store)
        bad = []
        for slot, bucket in (("alone", None), ("digest", "daily")):
            update = update_of(store.next_key(), flow, slot, due_at=NOW - 9, bucket=bucket)
            row = codec.update_row(update, fresh=True)._replace(doc="{")
            write = FlowWrite(flow=None, tasks=[], events=[], updates=[row])
            await self.commit_damaged(store, write)
            bad.append(update.key)
        assert await store.next_update_due() is None
        good = await put_update(store, flow, "good")
        daily = await put_update(store, flow, "good-digest", bucket="daily")

        alone = await store.list_updates_due(until=NOW, limit=1)
        digests = await store.list_digests_due(until=NOW, limit=1)
        shown = await store.list_updates(ALICE, flow_id=None, statuses=(), after_key=0, limit=1)

        assert [update.key for update in alone] == [good.key]
        assert [update.key for update in digests] == [daily.key]
        assert [update.idempotency_key for update in shown] == [good.idempotency_key]
        assert await store.next_update_due() == NOW
        with pytest.raises(WriteConflict):
            await put_update(store, flow, "alone")
        listed = await store.list_unreadable()
        assert [(row.table, row.key) for row in listed] == [("updates", key) for key in bad]

    async def test_unreadable_progress_stops_neither_newer_progress_nor_the_end(
        self, store: Store
    ) -> None:
        """Newer progress takes its place; beside the end it stays as it is, and never goes out."""
        flow, other = await put(store), await put(store, "other")
        for one in (flow, other):
            row = codec.update_row(update_of(store.next_key(), one), fresh=True)
            write = FlowWrite(None, [], [], updates=[row._replace(doc="[]")])
            await self.commit_damaged(store, write)

        await put_update(store, flow, text="newer")
        await put_end(store, other)

        assert sorted(update.text for update in await due(store)) == ["done", "newer"]
        assert len(await store.list_unreadable()) == 1
