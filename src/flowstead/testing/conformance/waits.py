"""Waits are found by what answers them: a signal's key, or a token. Signals that come early are kept."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET, Raw
from msgspec.structs import replace

from flowstead.errors import WriteConflict
from flowstead.model.flow import FlowKey, FlowStatus, StoredFlow
from flowstead.model.task import StoredTask, TaskStatus
from flowstead.rules.wait_keys import token_digest
from flowstead.store import codec
from flowstead.store.codec import FlowWrite
from flowstead.store.port import EVERYONE, MOST_EXPIRED, Scope, Store, WaitLookup
from flowstead.testing.conformance.fixtures import MakeStore, StoreFixtures
from flowstead.testing.conformance.isolation import STRANGERS
from flowstead.testing.conformance.reads import found, ids, positions
from flowstead.testing.conformance.rows import (
    ALICE,
    BOB,
    NOW,
    changes,
    children,
    creates,
    flow_of,
    key_for,
    put,
    put_signal,
    put_task,
    signal_of,
    signals,
    task_of,
    wait_of,
    with_doc,
)

KEY = key_for()


async def put_waiting(
    store: Store, flow_id: str = "flow", *, key: str | None = KEY, **fields: Any
) -> StoredFlow:
    """Store a flow that waits by itself: for a key, for whoever has a token, or for both."""
    fields.setdefault("status", FlowStatus.WAITING)
    fields.setdefault("wait_json", Raw(b'{"kind":"reply"}'))
    token = fields.pop("token", None)
    return await put(
        store,
        flow_id,
        wait=wait_of(key, token=token),
        wait_key=key,
        wait_token=token and token_digest(token),
        **fields,
    )


async def put_wait(
    store: Store, flow: StoredFlow, task_id: str, *, key: str | None = KEY, **fields: Any
) -> StoredTask:
    """Store a child that waits for a key."""
    token = fields.pop("token", f"token of {task_id}")
    fields.setdefault("runtime", "signal")
    return await put_task(store, flow, task_id, wait=wait_of(key, token=token), **fields)


class Waits(StoreFixtures):
    """`look_up_waits`, `find_token`, `list_met`, `list_open_waits`, and the signals of a commit."""

    # ---- by key -----------------------------------------------------------------------------------

    async def test_nothing_is_found_for_a_key_nobody_waits_for(self, store: Store) -> None:
        """No flow, no signal, and no memory of either."""
        await put_waiting(store)

        answer = await found(store, key_for("another"), signal_id="id")

        assert answer.waiting == []
        assert answer.kept is None
        assert (answer.is_known, answer.was_awaited, answer.is_live) == (False, False, False)

    @pytest.mark.parametrize("status", list(FlowStatus))
    async def test_a_flow_waits_for_a_key_while_it_waits_or_is_blocked(
        self, store: Store, status: FlowStatus
    ) -> None:
        """Otherwise the key is only remembered, and that the flow is live unless it has ended."""
        await put_waiting(store, status=status)

        answer = await found(store, KEY)

        waits = status in (FlowStatus.WAITING, FlowStatus.BLOCKED)
        assert answer.waiting == ([FlowKey("alice", "flow")] if waits else [])
        assert answer.was_awaited
        live = waits or status in (FlowStatus.QUEUED, FlowStatus.RUNNING)
        assert answer.is_live is live

    @pytest.mark.parametrize("status", list(TaskStatus))
    async def test_a_flow_waits_for_a_key_while_a_child_of_it_is_queued_for_it(
        self, store: Store, status: TaskStatus
    ) -> None:
        """Whatever the flow itself is doing; an ended child is only remembered."""
        flow = await put(store, status=FlowStatus.RUNNING)
        await put_wait(store, flow, "wait", status=status)

        answer = await found(store, KEY)

        waits = status is TaskStatus.QUEUED
        assert answer.waiting == ([FlowKey("alice", "flow")] if waits else [])
        assert (answer.was_awaited, answer.is_live) == (True, True)

    async def test_a_key_is_remembered_after_the_flow_of_the_child_has_ended(
        self, store: Store
    ) -> None:
        """It was awaited, and nobody live did so; another live flow with that key changes this."""
        flow = await put(store, status=FlowStatus.CANCELLED)
        await put_wait(store, flow, "wait", status=TaskStatus.CANCELLED)
        before = await found(store, KEY)

        other = await put(store, "other")
        await put_wait(store, other, "ended", status=TaskStatus.TIMED_OUT)
        after = await found(store, KEY)

        assert (before.waiting, before.was_awaited, before.is_live) == ([], True, False)
        assert (after.waiting, after.was_awaited, after.is_live) == ([], True, True)

    async def test_flows_that_wait_for_the_same_key_are_named_once_each_oldest_first(
        self, store: Store
    ) -> None:
        """By their own keys: not by those of their children, nor in the order they were committed."""
        early, late = store.next_key(), store.next_key()
        await store.commit([creates(flow_of(late, "late"))])
        await store.commit([creates(flow_of(early, "early"))])
        await put_wait(store, flow_of(late, "late"), "wait-1")
        await put_wait(store, flow_of(early, "early"), "wait-2")
        await put_wait(store, flow_of(early, "early"), "wait-3")
        both = await put_waiting(store, "both")
        await put_wait(store, both, "wait-4")

        answer = await found(store, KEY)

        assert [key.flow_id for key in answer.waiting] == ["early", "late", "both"]
        assert (answer.was_awaited, answer.is_live) == (True, True)

    async def test_a_wait_that_was_answered_is_open_no_more(self, store: Store) -> None:
        """A change of the flow or of the child closes it."""
        flow = await put_waiting(store, "flow")
        other = await put(store, "other")
        task = await put_wait(store, other, "wait")

        ended = replace(task, status=TaskStatus.SUCCEEDED, ended_at=NOW)
        running = replace(flow, revision=2, status=FlowStatus.RUNNING, wait=None)
        await store.commit([changes(running, seqs=[2]), children(ended, fresh=False)])

        answer = await found(store, KEY)
        assert (answer.waiting, answer.was_awaited, answer.is_live) == ([], True, True)

    async def test_a_flow_that_waits_for_something_else_now_is_found_by_that_only(
        self, store: Store
    ) -> None:
        """The key of a row is the one it was last written with."""
        flow = await put_waiting(store)
        another = key_for("another")

        await store.commit(
            [changes(replace(flow, revision=2, wait=wait_of(another), wait_key=another), seqs=[2])]
        )

        assert (await found(store, another)).waiting == [FlowKey("alice", "flow")]
        assert (await found(store, KEY)).waiting == []

    async def test_a_running_flow_that_starts_to_wait_is_found(self, store: Store) -> None:
        """A row that had no key gets one by being changed, a child's as well."""
        flow = await put(store)
        task = await put_task(store, flow, "task")
        waiting = replace(flow, revision=2, status=FlowStatus.WAITING, wait_key=KEY)
        waits = replace(task, wait=wait_of(key_for("another"), token="t"))

        await store.commit([changes(waiting, seqs=[2]), children(waits, fresh=False)])

        assert (await found(store, KEY)).waiting == [FlowKey("alice", "flow")]
        assert (await found(store, key_for("another"))).waiting == [FlowKey("alice", "flow")]

    async def test_a_row_that_is_written_without_a_wait_has_none_any_more(
        self, store: Store
    ) -> None:
        """Neither its key nor its token lead to it; beside rows that wait, and alone."""
        for alone in (True, False):
            flow = await put_waiting(store, f"flow-{alone}", token=f"own-{alone}")
            task = await put_wait(store, flow, f"wait-{alone}")
            plain = replace(flow, revision=2, wait=None, wait_key=None, wait_token=None)
            writes = [changes(plain, seqs=[2]), children(replace(task, wait=None), fresh=False)]
            beside = flow_of(store.next_key(), "beside", wait_key=key_for("b"))
            await store.commit(writes if alone else [*writes, creates(beside)])

            answer = await found(store, KEY)

            assert (answer.waiting, answer.was_awaited) == ([], False)
            for token in (f"own-{alone}", f"token of wait-{alone}"):
                assert await store.find_token(token_digest(token)) is None, token
        assert (await found(store, key_for("b"))).was_awaited
        assert await store.list_open_waits(EVERYONE, flow_id=None, after_key=0, limit=9) == []
        assert await store.list_unreadable() == []

    async def test_many_are_looked_up_at_once_and_answered_in_the_order_asked(
        self, store: Store
    ) -> None:
        """One answer for each, whether found or not, also for the same key twice; none for none."""
        for n in range(20):
            await put_waiting(store, f"flow-{n}", key=key_for(f"t-{n}"))
        keys = [key_for(f"t-{n}") for n in (7, 3, 99, 7, 19)]

        answers = await store.look_up_waits([WaitLookup("alice", k, None, NOW) for k in keys])

        assert [[key.flow_id for key in answer.waiting] for answer in answers] == [
            ["flow-7"],
            ["flow-3"],
            [],
            ["flow-7"],
            ["flow-19"],
        ]
        assert await store.look_up_waits([]) == []

    async def test_the_key_of_another_owner_is_another_key_though_it_be_the_same(
        self, store: Store
    ) -> None:
        """The owner is compared, not only the digest: nothing of hers is told to anybody else."""
        await put_waiting(store, "own", owner_key="alice")
        flow = await put(store, "of-child", owner_key="alice")
        await put_wait(store, flow, "wait")
        await put_signal(store, wait_key=KEY, signal_id="id")

        for owner in STRANGERS:
            answer = await found(store, KEY, owner_key=owner, signal_id="id")
            assert (answer.waiting, answer.kept) == ([], None), owner
            told = (answer.is_known, answer.was_awaited, answer.is_live)
            assert told == (False, False, False), owner

    async def test_owners_who_wait_for_the_same_key_find_their_own_flows(
        self, store: Store
    ) -> None:
        """Flow ids, keys and signal ids may all be the same."""
        await put_waiting(store, owner_key="alice")
        await put_waiting(store, owner_key="bob")
        hers = await put_signal(store, wait_key=KEY, signal_id="id")
        his = await put_signal(store, wait_key=KEY, signal_id="id", owner_key="bob")

        for owner, signal in (("alice", hers), ("bob", his)):
            answer = await found(store, KEY, owner_key=owner, signal_id="id")
            assert answer.waiting == [FlowKey(owner, "flow")]
            assert answer.kept is not None and answer.kept.key == signal.key
            assert answer.is_known

    # ---- signals ----------------------------------------------------------------------------------

    async def test_a_kept_signal_comes_back_as_it_was_written(self, store: Store) -> None:
        """The record is the one handed in, its payload byte for byte."""
        signal = await put_signal(
            store, wait_key=KEY, signal_id="id", payload=Raw(b'{ "n" : [1.0] }')
        )

        kept = (await found(store, KEY)).kept

        assert kept is not None
        assert codec.encode(kept) == codec.encode(signal)

    async def test_the_oldest_signal_kept_for_a_key_is_found(self, store: Store) -> None:
        """By its key, in whatever order they were committed; those for other keys are not."""
        early, late = store.next_key(), store.next_key()
        await store.commit([signals(signal_of(late, wait_key=KEY))])
        await store.commit([signals(signal_of(early, wait_key=KEY))])
        await put_signal(store, wait_key=key_for("another"))

        kept = (await found(store, KEY)).kept

        assert kept is not None and kept.key == early

    async def test_a_signal_is_kept_until_it_expires_and_not_at_that_instant(
        self, store: Store
    ) -> None:
        """An expired one makes way for the next."""
        first = await put_signal(store, wait_key=KEY, expires_at=NOW + 10)
        second = await put_signal(store, wait_key=KEY, expires_at=NOW + 20)

        answers = [await found(store, KEY, now=NOW + after) for after in (9, 10, 19, 20)]

        kept = [answer.kept and answer.kept.key for answer in answers]
        expired = [[one.key for one in answer.expired] for answer in answers]
        assert kept == [first.key, second.key, second.key, None]
        assert expired == [[], [first.key], [first.key], [first.key, second.key]]

    async def test_of_many_signals_that_have_expired_the_first_are_found_until_they_are_put_aside(
        self, store: Store
    ) -> None:
        """So many at a time, only those of the owner; what is kept behind them is found after them."""
        gone = [signal_of(store.next_key(), wait_key=KEY, expires_at=NOW) for _ in range(300)]
        await store.commit([signals(*gone)])
        await put_signal(store, wait_key=KEY, owner_key="bob", expires_at=NOW)
        kept = await put_signal(store, wait_key=KEY, expires_at=NOW + 1)

        for first, last in ((0, MOST_EXPIRED), (MOST_EXPIRED, 300)):
            for only_kept in (False, True):
                lookup = WaitLookup("alice", KEY, None, NOW, only_kept)
                [answer] = await store.look_up_waits([lookup])
                assert [one.key for one in answer.expired] == [one.key for one in gone[first:last]]
                assert (answer.kept is None) == (last < 300)
            aside = [replace(one, taken_by="") for one in answer.expired]
            await store.commit([signals(*aside, fresh=False)])

        answer = await found(store, KEY)
        assert answer.kept is not None and answer.kept.key == kept.key
        assert answer.expired == []

    async def test_what_is_kept_is_counted_by_owner_until_it_expires_or_is_taken(
        self, store: Store
    ) -> None:
        """The first to expire first, whatever the keys."""
        assert await store.list_kept(now=NOW) == []
        await put_signal(store, wait_key=KEY, expires_at=NOW + 20)
        await put_signal(store, wait_key=key_for("b"), owner_key="bob", expires_at=NOW + 10)
        await put_signal(store, wait_key=KEY, expires_at=NOW)
        await put_signal(store, wait_key=KEY, expires_at=None)
        taken = await put_signal(store, wait_key=KEY, expires_at=NOW + 15)
        await store.commit([signals(replace(taken, taken_by="flow"), fresh=False)])

        assert await store.list_kept(now=NOW) == [("bob", NOW + 10), ("alice", NOW + 20)]
        assert await store.list_kept(now=NOW + 10) == [("alice", NOW + 20)]

    async def test_a_kept_signal_may_lose_its_id_and_another_have_it(self, store: Store) -> None:
        """The id is not known then, until it is used again."""
        signal = await put_signal(store, wait_key=KEY, signal_id="id")
        await store.commit([signals(replace(signal, taken_by="", signal_id=None), fresh=False)])

        assert not (await found(store, KEY, signal_id="id")).is_known
        again = await put_signal(store, wait_key=KEY, signal_id="id")
        answer = await found(store, KEY, signal_id="id")
        assert answer.is_known and answer.kept is not None and answer.kept.key == again.key
        assert await store.list_unreadable() == []

    async def test_a_signal_without_an_end_or_that_somebody_took_is_not_kept(
        self, store: Store
    ) -> None:
        """Its id is on record all the same."""
        await put_signal(store, wait_key=KEY, signal_id="turned-away", expires_at=None)
        await put_signal(store, wait_key=KEY, signal_id="matched", taken_by="flow")

        for name in ("turned-away", "matched"):
            answer = await found(store, KEY, signal_id=name)
            assert (answer.kept, answer.is_known) == (None, True)

    async def test_a_signal_is_known_by_its_id_whatever_key_it_names(self, store: Store) -> None:
        """Until then no id is known, and a signal without one never is."""
        before = await found(store, KEY, signal_id="id")
        await put_signal(store, wait_key=KEY, signal_id="id")
        await put_signal(store, wait_key=KEY)

        assert not before.is_known
        assert (await found(store, KEY, signal_id="id")).is_known
        assert (await found(store, key_for("another"), signal_id="id")).is_known
        for name in (None, "", "ID", "id "):
            assert not (await found(store, KEY, signal_id=name)).is_known, name

    async def test_a_kept_signal_that_is_taken_is_kept_no_more(self, store: Store) -> None:
        """The next one is found then, and the id stays known."""
        signal = await put_signal(store, wait_key=KEY, signal_id="id")
        following = await put_signal(store, wait_key=KEY)

        await store.commit([signals(replace(signal, taken_by="flow"), fresh=False)])

        answer = await found(store, KEY, signal_id="id")
        assert answer.kept is not None and answer.kept.key == following.key
        assert answer.is_known

    async def test_a_kept_signal_is_taken_once_and_who_comes_second_writes_nothing(
        self, store: Store
    ) -> None:
        """Not the flow it would have answered, nor anything else of the batch."""
        signal = await put_signal(store, wait_key=KEY)
        flow = await put_waiting(store)
        taken = signals(replace(signal, taken_by="other"), fresh=False)
        await store.commit([taken])
        before = await positions(store)

        with pytest.raises(WriteConflict):
            await store.commit(
                [
                    creates(flow_of(store.next_key(), "beside")),
                    changes(replace(flow, revision=2, goal="answered"), seqs=[2]),
                    signals(signal_of(store.next_key(), wait_key=KEY, signal_id="new")),
                    taken,
                ]
            )

        stored = await store.find_flow(ALICE, "flow")
        assert stored is not None and stored.goal == flow.goal
        assert await ids(store, ALICE) == ["flow"]
        assert not (await found(store, KEY, signal_id="new")).is_known
        assert await positions(store) == before

    async def test_a_signal_taken_twice_in_one_batch_is_refused(self, store: Store) -> None:
        """And is still there for whoever comes next."""
        signal = await put_signal(store, wait_key=KEY)
        taken = signals(replace(signal, taken_by="flow"), fresh=False)

        with pytest.raises(WriteConflict):
            await store.commit([taken, taken])

        assert (await found(store, KEY)).kept is not None
        await store.commit([taken])
        assert (await found(store, KEY)).kept is None

    async def test_a_signal_that_was_never_kept_cannot_be_taken(self, store: Store) -> None:
        """Neither one that is not there, nor one that was turned away."""
        late = await put_signal(store, wait_key=KEY, signal_id="late", expires_at=None)
        ghost = signal_of(store.next_key(), wait_key=KEY, signal_id="ghost")

        for signal in (late, ghost):
            taken = signals(replace(signal, taken_by="flow"), fresh=False)
            with pytest.raises(WriteConflict):
                await store.commit([taken])

        assert not (await found(store, KEY, signal_id="ghost")).is_known

    async def test_a_signal_id_is_used_once_per_owner_and_the_second_batch_is_refused_whole(
        self, store: Store
    ) -> None:
        """Whatever key it names and whether the first was kept; also inside one batch."""
        await put_signal(store, wait_key=KEY, signal_id="id", expires_at=None)
        twice = [signal_of(store.next_key(), wait_key=KEY, signal_id="twice") for _ in range(2)]
        beside = creates(flow_of(store.next_key(), "beside"))
        again = signal_of(store.next_key(), wait_key=key_for("another"), signal_id="id")

        with pytest.raises(WriteConflict):
            await store.commit([beside, signals(again)])
        with pytest.raises(WriteConflict):
            await store.commit([beside, signals(*twice)])

        assert await ids(store, EVERYONE) == []
        assert not (await found(store, KEY, signal_id="twice")).is_known
        await put_signal(store, wait_key=KEY, signal_id="id", owner_key="bob")

    async def test_signals_without_an_id_do_not_get_in_each_others_way(self, store: Store) -> None:
        """Any number of them, of one owner and for one key."""
        made = [signal_of(store.next_key(), wait_key=KEY) for _ in range(3)]
        await store.commit([signals(*made)])

        for signal in made:
            kept = (await found(store, KEY)).kept
            assert kept is not None and kept.key == signal.key
            await store.commit([signals(replace(signal, taken_by="flow"), fresh=False)])

        assert (await found(store, KEY)).kept is None

    async def test_the_key_of_a_signal_that_is_taken_by_another_is_refused(
        self, store: Store
    ) -> None:
        """Two signals never share a key of the store."""
        first = await put_signal(store, wait_key=KEY, signal_id="first")
        second = signal_of(first.key, wait_key=KEY, signal_id="second")

        with pytest.raises(WriteConflict):
            await store.commit([signals(second)])

        assert not (await found(store, KEY, signal_id="second")).is_known

    async def test_a_batch_that_does_not_fit_leaves_no_signal_behind(self, store: Store) -> None:
        """A signal goes in with the turn that it belongs to, or not at all; nor is one taken."""
        flow = await put_waiting(store)
        kept = await put_signal(store, wait_key=KEY)
        stale = changes(replace(flow, revision=5), seen=4, seqs=[2])
        new = signal_of(store.next_key(), wait_key=KEY, signal_id="id", taken_by="flow")

        with pytest.raises(WriteConflict):
            await store.commit(
                [signals(new), signals(replace(kept, taken_by="flow"), fresh=False), stale]
            )

        answer = await found(store, KEY, signal_id="id")
        assert not answer.is_known
        assert answer.kept is not None and answer.kept.key == kept.key

    async def test_a_signal_has_no_place_in_the_history(self, store: Store) -> None:
        """It uses no position, alone or beside a flow."""
        await put(store)

        await put_signal(store, wait_key=KEY)
        one = signals(signal_of(store.next_key(), wait_key=KEY)).signals
        write = creates(flow_of(store.next_key(), "next"))
        position = await store.commit([replace(write, signals=one)])

        assert position == 2
        assert await positions(store) == [1, 2]
        assert await store.last_position() == 2

    async def test_waits_and_signals_are_there_after_a_restart(
        self, store: Store, another: MakeStore
    ) -> None:
        """And keys go on above theirs."""
        flow = await put_waiting(store, token="secret")
        await put_wait(store, flow, "wait", key=key_for("another"))
        signal = await put_signal(store, wait_key=KEY, signal_id="id")
        taken = await put_signal(store, wait_key=KEY, signal_id="taken")
        await store.commit([signals(replace(taken, taken_by="flow"), fresh=False)])
        await store.aclose()

        again = another()
        await again.open()

        answer = await found(again, KEY, signal_id="taken")
        assert answer.waiting == [FlowKey("alice", "flow")]
        assert answer.kept is not None and answer.kept.key == signal.key
        assert answer.is_known
        assert (await found(again, key_for("another"))).waiting == [FlowKey("alice", "flow")]
        assert await again.find_token(token_digest("secret")) is not None
        assert again.next_key() > taken.key
        with pytest.raises(WriteConflict):
            await put_signal(again, wait_key=KEY, signal_id="id")
        assert await again.list_unreadable() == []

    # ---- by token ---------------------------------------------------------------------------------

    async def test_a_token_names_the_wait_it_answers(self, store: Store) -> None:
        """A flow's own, or a child's, whose id comes with it; whoever it belongs to."""
        await put_waiting(store, "own", token="one", owner_key="bob")
        flow = await put(store, "of-child")
        await put_wait(store, flow, "wait", token="two", key=None)

        assert await store.find_token(token_digest("one")) == (FlowKey("bob", "own"), None)
        assert await store.find_token(token_digest("two")) == (FlowKey("alice", "of-child"), "wait")

    async def test_a_flow_that_waits_for_nothing_is_found_by_its_token_and_not_listed(
        self, store: Store
    ) -> None:
        """What it once gave leads to it; there is nothing to answer."""
        flow = await put_waiting(store, token="one")
        idle = replace(flow, revision=2, wait_json=Raw(b"null"), wait=None, wait_key=None)
        await store.commit([changes(idle, seqs=[2])])

        assert await store.find_token(token_digest("one")) == (FlowKey("alice", "flow"), None)
        for scope, flow_id in ((EVERYONE, None), (ALICE, None), (ALICE, "flow")):
            listed = await store.list_open_waits(scope, flow_id=flow_id, after_key=0, limit=9)
            assert listed == []

    async def test_what_is_no_token_finds_nothing(self, store: Store) -> None:
        """Only the digest does: neither the token itself, nor a part, nor a key."""
        await put_waiting(store, token="secret")
        digest = token_digest("secret")

        for text in ("secret", digest[:-1], digest.upper(), token_digest("other"), KEY, "", "%"):
            assert await store.find_token(text) is None, text

    async def test_a_wait_that_has_ended_is_found_by_its_token_as_long_as_its_row_has_it(
        self, store: Store
    ) -> None:
        """A row written without it, or with another, is not found by the old one."""
        flow = await put_waiting(store, token="one")
        task = await put_wait(store, flow, "wait", token="two")

        ended = replace(task, status=TaskStatus.TIMED_OUT, ended_at=NOW)
        moved = replace(flow, revision=2, wait_token=token_digest("three"))
        await store.commit([changes(moved, seqs=[2]), children(ended, fresh=False)])
        found = [await store.find_token(token_digest(t)) for t in ("one", "two", "three")]
        gone = replace(moved, revision=3, wait_token=None, status=FlowStatus.RUNNING)
        await store.commit([changes(gone, seqs=[3])])

        key = FlowKey("alice", "flow")
        assert found == [None, (key, "wait"), (key, None)]
        assert await store.find_token(token_digest("three")) is None

    # ---- what a crash left unmatched --------------------------------------------------------------

    async def test_open_waits_for_which_a_signal_is_kept_are_met(self, store: Store) -> None:
        """Of flows and of children, each with its flow and its key; whose they are does not matter."""
        own = await put_waiting(store, "own")
        child = await put(store, "child", owner_key="bob")
        his = key_for("his", owner_key="bob")
        await put_wait(store, child, "wait", key=his)
        await put_waiting(store, "alone", key=key_for("alone"))
        await put_signal(store, wait_key=KEY)
        await put_signal(store, wait_key=KEY)
        await put_signal(store, wait_key=his, owner_key="bob")
        await put_signal(store, wait_key=key_for("nobody"))

        met = await store.list_met(after_key=0, limit=10, now=NOW)

        assert met == [
            (own.key, FlowKey("alice", "own"), KEY),
            (child.key, FlowKey("bob", "child"), his),
        ]

    async def test_a_wait_is_not_met_by_a_signal_that_is_not_kept_any_more(
        self, store: Store
    ) -> None:
        """Expired, taken, or turned away."""
        await put_waiting(store)
        await put_signal(store, wait_key=KEY, expires_at=NOW)
        await put_signal(store, wait_key=KEY, taken_by="other")
        await put_signal(store, wait_key=KEY, expires_at=None)

        assert await store.list_met(after_key=0, limit=10, now=NOW) == []
        assert len(await store.list_met(after_key=0, limit=10, now=NOW - 1)) == 1

    async def test_a_wait_that_is_not_open_is_not_met(self, store: Store) -> None:
        """A flow that goes on, one that has ended, and a child that has."""
        await put_waiting(store, "running", status=FlowStatus.RUNNING)
        await put_waiting(store, "ended", status=FlowStatus.FAILED)
        flow = await put(store)
        await put_wait(store, flow, "wait", status=TaskStatus.SUCCEEDED)
        await put_signal(store, wait_key=KEY)

        assert await store.list_met(after_key=0, limit=10, now=NOW) == []

    async def test_a_wait_is_never_met_by_the_signal_of_another_owner(self, store: Store) -> None:
        """Though it names the same key."""
        await put_waiting(store)
        flow = await put(store, "of-child")
        await put_wait(store, flow, "wait")
        await put_signal(store, wait_key=KEY, owner_key="bob")

        assert await store.list_met(after_key=0, limit=10, now=NOW) == []

    async def test_what_is_met_is_listed_in_pages_of_whole_flows(self, store: Store) -> None:
        """Flows after a key, oldest first; one that several signals meet is answered with all its keys."""
        flows = []
        for n in range(3):
            flow = await put_waiting(store, f"flow-{n}")
            await put_wait(store, flow, f"wait-{n}", key=key_for("b"))
            await put_wait(store, flow, f"more-{n}", key=key_for("b"))
            flows.append(flow)
        await put_signal(store, wait_key=key_for("b"))
        await put_signal(store, wait_key=KEY)

        seen, after = [], 0
        while page := await store.list_met(after_key=after, limit=2, now=NOW):
            seen.append([(flow.flow_id, key) for _, flow, key in page])
            after = page[-1][0]

        both = sorted([KEY, key_for("b")])
        flat = [one for page in seen for one in page]
        assert sorted(flat) == [(f"flow-{n}", key) for n in range(3) for key in both]
        assert [{flow for flow, _ in page} for page in seen] == [{"flow-0", "flow-1"}, {"flow-2"}]
        assert after == flows[-1].key

    # ---- all that are open ------------------------------------------------------------------------

    async def test_open_waits_are_listed_oldest_first_and_as_they_are_kept(
        self, store: Store
    ) -> None:
        """Flows' own and children's, by their own keys; the records are the stored ones."""
        flow = await put(store, "flow")
        own = await put_waiting(store, "own", token="t", status=FlowStatus.BLOCKED)
        task = await put_wait(store, flow, "wait")
        keyless = await put_waiting(store, "keyless", key=None, token="k")

        listed = await store.list_open_waits(ALICE, flow_id=None, after_key=0, limit=10)

        kept = [codec.encode(record) for record in (own, task, keyless)]
        assert [codec.encode(record) for record in listed] == kept
        assert [type(record) for record in listed] == [StoredFlow, StoredTask, StoredFlow]

    async def test_what_waits_for_nothing_from_outside_is_not_listed(self, store: Store) -> None:
        """Flows that go on, stand in a wait of their children, or are blocked long after their last wait; children
        that have ended, and those somebody else reports on."""
        await put_waiting(store, "running", status=FlowStatus.RUNNING, token="a")
        await put_waiting(store, "ended", status=FlowStatus.LOST, token="b")
        await put_waiting(store, "in-children", awaiting=(("wait",),))
        await put_waiting(store, "since", status=FlowStatus.BLOCKED, token="c", wait_json=UNSET)
        flow = await put(store, "no-wait", status=FlowStatus.BLOCKED)
        await put_task(store, flow, "linked")
        await put_wait(store, flow, "answered", status=TaskStatus.SUCCEEDED)
        await put_wait(store, flow, "withdrawn", status=TaskStatus.CANCELLED)

        assert await store.list_open_waits(EVERYONE, flow_id=None, after_key=0, limit=10) == []

    async def test_open_waits_are_those_in_scope_and_of_one_flow_if_asked(
        self, store: Store
    ) -> None:
        """An operator sees everybody's; of a shared id, those of the newest flow."""
        hers = await put_waiting(store, token="a")
        await put_wait(store, hers, "her-wait")
        his = await put_waiting(store, owner_key="bob", token="b")
        await put_wait(store, his, "his-wait")
        await put_waiting(store, "other", token="c")

        async def listed(scope: Scope, flow_id: str | None = None) -> list[str]:
            waits = await store.list_open_waits(scope, flow_id=flow_id, after_key=0, limit=10)
            return [w.task_id if isinstance(w, StoredTask) else w.owner_key for w in waits]

        assert await listed(ALICE) == ["alice", "her-wait", "alice"]
        assert await listed(BOB) == ["bob", "his-wait"]
        assert await listed(EVERYONE) == ["alice", "her-wait", "bob", "his-wait", "alice"]
        assert await listed(ALICE, "flow") == ["alice", "her-wait"]
        assert await listed(EVERYONE, "flow") == ["bob", "his-wait"]
        assert await listed(BOB, "other") == []
        assert await listed(ALICE, "ghost") == []
        for owner in STRANGERS[1:]:
            assert await listed(Scope(owner)) == [], owner
            assert await listed(Scope(owner), "flow") == [], owner

    @pytest.mark.parametrize("scope", [ALICE, EVERYONE], ids=["owner", "operator"])
    @pytest.mark.parametrize("flow_id", [None, "flow"])
    async def test_open_waits_are_listed_in_pages(
        self, store: Store, scope: Scope, flow_id: str | None
    ) -> None:
        """After a key, as many as asked for; what is left out takes no place in a page."""
        flow = await put_waiting(store, token="own")
        made = [flow.key]
        for n in range(4):
            made.append((await put_wait(store, flow, f"wait-{n}")).key)
            await put_wait(store, flow, f"done-{n}", status=TaskStatus.SUCCEEDED)
            await put_waiting(store, f"in-children-{n}", awaiting=(("wait",),))

        pages: list[list[int]] = []
        while page := await store.list_open_waits(
            scope, flow_id=flow_id, after_key=pages[-1][-1] if pages else 0, limit=2
        ):
            pages.append([wait.key for wait in page])

        assert pages == [made[:2], made[2:4], made[4:]]

    # ---- bad rows ---------------------------------------------------------------------------------

    async def test_an_unreadable_signal_is_passed_by_and_listed(self, store: Store) -> None:
        """The next one is found; its id is on record, and guarded."""
        bad = signal_of(store.next_key(), wait_key=KEY, signal_id="bad")
        row = codec.signal_row(bad, fresh=True)._replace(doc="{")
        await self.commit_damaged(store, FlowWrite(flow=None, tasks=[], events=[], signals=[row]))
        good = await put_signal(store, wait_key=KEY)

        answer = await found(store, KEY, signal_id="bad")

        assert answer.kept is not None and answer.kept.key == good.key
        assert answer.is_known
        with pytest.raises(WriteConflict):
            await put_signal(store, wait_key=KEY, signal_id="bad")
        [listed] = await store.list_unreadable()
        assert (listed.table, listed.key) == ("signals", bad.key)
        assert listed.problem

    async def test_an_unreadable_wait_is_left_out_of_listings_and_takes_no_place(
        self, store: Store
    ) -> None:
        """A flow's own and a child's."""
        flow = await put(store)
        hurt = flow_of(store.next_key(), "hurt", status=FlowStatus.WAITING, wait_key=KEY)
        await self.commit_damaged(store, with_doc(creates(hurt), "{"))
        task = task_of(store.next_key(), flow, "bad", wait=wait_of(KEY, token="t"))
        row = codec.task_row(task, due_at=None, fresh=True)._replace(doc="{}")
        await self.commit_damaged(store, FlowWrite(flow=None, tasks=[row], events=[]))
        good = await put_wait(store, flow, "good")

        for scope in (ALICE, EVERYONE):
            listed = await store.list_open_waits(scope, flow_id=None, after_key=0, limit=1)
            assert [wait.key for wait in listed] == [good.key]
        unreadable = {(row.table, row.key) for row in await store.list_unreadable()}
        assert unreadable == {("flows", hurt.key), ("tasks", task.key)}
