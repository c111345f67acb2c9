"""The conformance suite as a stranger meets it: installed, in a project of their own, failing stores that lie."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

STORES = '''
"""A store that wraps another one, and the ways to get it wrong."""

import asyncio
import unicodedata

from msgspec.structs import replace

from flowstead.errors import SnapshotUnreadable, WriteConflict
from flowstead.store.codec import FlowWrite
from flowstead.store.memory import MemoryStore, MemoryTables
from flowstead.store.port import EVERYONE


class Wrapped:
    """Passes everything on."""

    def __init__(self, tables):
        self.inner = MemoryStore(tables)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class LosesABatch(Wrapped):
    lost = 0

    async def commit(self, writes):
        if len(writes) == 2 and not self.lost:
            self.lost = 1
            return self.inner.tables.last_position + 1
        return await self.inner.commit(writes)


class IgnoresTheRevision(Wrapped):
    async def commit(self, writes):
        stored = self.inner.tables.flows
        return await self.inner.commit(
            [
                FlowWrite(write.flow._replace(expected_revision=stored[write.flow.key].revision),
                          write.tasks, write.events)
                if write.flow and write.flow.expected_revision and write.flow.key in stored
                else write
                for write in writes
            ]
        )


class IgnoresTheEpoch(Wrapped):
    async def commit(self, writes):
        if self.inner._epoch:
            self.inner._epoch = self.inner.tables.epoch
        return await self.inner.commit(writes)


class WritesHalfABatch(Wrapped):
    async def commit(self, writes):
        position = self.inner.tables.last_position + 1
        for write in writes:
            await self.inner.commit([write])
        return position


class WritesHalfABatchWhenCancelled(WritesHalfABatch):
    async def commit(self, writes):
        position = await self.inner.commit(writes[:1]) if writes else 1
        await asyncio.sleep(0)
        await self.inner.commit(writes[1:])
        return position


class LeavesGaps(Wrapped):
    async def commit(self, writes):
        try:
            return await self.inner.commit(writes)
        except WriteConflict:
            self.inner.tables.last_position += 1
            raise


class AnswersTheLastPosition(Wrapped):
    async def commit(self, writes):
        await self.inner.commit(writes)
        return self.inner.tables.last_position


class ForgetsOnReopen(Wrapped):
    async def open(self, **options):
        await self.inner.open(**options)
        self.inner.tables.flows.clear()
        self.inner.tables.flow_keys.clear()


class GivesKeysAgain(Wrapped):
    async def open(self, **options):
        await self.inner.open(**options)
        self.inner.tables.key = 0


class ListsOldestFirst(Wrapped):
    async def list_flows(self, scope, query, limit):
        return (await self.inner.list_flows(scope, query, 10_000))[::-1][:limit]


class TellsTheSeenPositionAgain(Wrapped):
    async def events_after(self, scope, position, limit):
        return await self.inner.events_after(scope, max(position - 1, 0), limit)


class CountsTheLimitBeforeTheOwner(Wrapped):
    async def events_after(self, scope, position, limit):
        mine = {event.position for event in await self.inner.events_after(scope, 0, 10_000)}
        page = await self.inner.events_after(EVERYONE, position, limit)
        return [event for event in page if event.position in mine]


class TicksAtTheInstantItself(Wrapped):
    async def list_due(self, *, after, until):
        return await self.inner.list_due(after=after - 1, until=until - 1)


class ListsTheLastUnfinishedAgain(Wrapped):
    async def list_unfinished(self, controllers, *, after_key, limit):
        return await self.inner.list_unfinished(
            controllers, after_key=max(after_key - 1, 0), limit=limit
        )


class LetsEverybodyIn(Wrapped):
    async def open(self, *, takeover=False):
        await self.inner.open(takeover=True)


class FreesWhatIsNotItsOwn(Wrapped):
    async def aclose(self):
        await self.inner.aclose()
        self.inner.tables.owner = None


class KeepsTheLockWhenCancelled(Wrapped):
    async def open(self, *, takeover=False):
        await self.inner.open(takeover=takeover)
        await asyncio.sleep(0)


class UsesAKeyTwice(Wrapped):
    async def commit(self, writes):
        for write in writes:
            if write.flow and write.flow.idempotency_key is not None:
                used = write.flow.owner_key, write.flow.idempotency_key
                self.inner.tables.idempotency_keys.pop(used, None)
        return await self.inner.commit(writes)


class HandsOutItsMemory(Wrapped):
    kept = None

    async def find_flow(self, scope, flow_id):
        self.kept = self.kept or await self.inner.find_flow(scope, flow_id)
        return self.kept


class NormalizesText(Wrapped):
    async def commit(self, writes):
        return await self.inner.commit([self.normalized(write) for write in writes])

    def normalized(self, write):
        if write.flow is None:
            return write
        flow_id = unicodedata.normalize("NFC", write.flow.flow_id)
        return FlowWrite(write.flow._replace(flow_id=flow_id), write.tasks, write.events)


class FoldsCase(Wrapped):
    async def list_flows(self, scope, query, limit):
        if query.id_prefix is None:
            return await self.inner.list_flows(scope, query, limit)
        every = await self.inner.list_flows(scope, type(query)(), 10_000)
        prefix = query.id_prefix.lower()
        return [flow for flow in every if flow.flow_id.lower().startswith(prefix)][:limit]


class StumblesOverABadRow(Wrapped):
    async def load(self, keys):
        found = await self.inner.load(keys)
        for one in found:
            if isinstance(one, SnapshotUnreadable):
                raise one
        return found


class TakesABadRowForNone(Wrapped):
    async def load(self, keys):
        found = await self.inner.load(keys)
        return [None if isinstance(one, SnapshotUnreadable) else one for one in found]


class LetsASignalBeTakenTwice(Wrapped):
    async def commit(self, writes):
        kept = self.inner.tables.signals
        return await self.inner.commit(
            [
                FlowWrite(write.flow, write.tasks, write.events,
                          [row for row in write.signals if row.fresh or kept[row.key].kept],
                          write.updates)
                for write in writes
            ]
        )


class UsesASignalIdTwice(Wrapped):
    async def commit(self, writes):
        for write in writes:
            for row in write.signals:
                self.inner.tables.signal_ids.pop((row.owner_key, row.signal_id), None)
        return await self.inner.commit(writes)


class KeepsSignalsForEver(Wrapped):
    async def look_up_waits(self, asked):
        return await self.inner.look_up_waits([replace(one, now=0) for one in asked])


class TrustsTheDigestAlone(Wrapped):
    async def look_up_waits(self, asked):
        owners = {row.owner_key for row in self.inner.tables.flows.values()} or {""}
        found = []
        for one in asked:
            theirs = [replace(one, owner_key=owner) for owner in sorted(owners)]
            answers = await self.inner.look_up_waits(theirs)
            found.append(max(answers, key=lambda answer: len(answer.waiting)))
        return found


class CutsAFlowInTheMidst(Wrapped):
    async def list_met(self, *, after_key, limit, now):
        return (await self.inner.list_met(after_key=after_key, limit=limit, now=now))[:limit]


class ListsWhatHasEnded(Wrapped):
    async def list_open_waits(self, scope, *, flow_id, after_key, limit):
        tables = self.inner.tables
        before = tables.tasks
        tables.tasks = {key: row._replace(status="queued") for key, row in before.items()}
        try:
            return await self.inner.list_open_waits(
                scope, flow_id=flow_id, after_key=after_key, limit=limit
            )
        finally:
            tables.tasks = before


class ReplacesUnderTheSameVersion(Wrapped):
    async def commit(self, writes):
        position = await self.inner.commit(writes)
        for key, row in self.inner.tables.updates.items():
            if row.slot == "progress" and row.status == "pending":
                self.inner.tables.updates[key] = row._replace(version=0)
        return position


class GoesOnAfterTheEnd(Wrapped):
    async def commit(self, writes):
        before = dict(self.inner.tables.updates)
        position = await self.inner.commit(writes)
        for key, row in self.inner.tables.updates.items():
            if row.status == "superseded" and key in before:
                self.inner.tables.updates[key] = before[key]
                self.inner.tables.pending[key] = None
        return position


class RefusesALateReport(Wrapped):
    async def commit(self, writes):
        updates = self.inner.tables.updates
        for write in writes:
            for row in write.updates:
                if not row.fresh and row.key in updates and updates[row.key].version != row.version:
                    raise WriteConflict("The version has moved on.")
        return await self.inner.commit(writes)


class MixesDigests(Wrapped):
    async def list_digests_due(self, *, until, limit):
        found = await self.inner.list_digests_due(until=until, limit=10_000)
        return sorted(found, key=lambda update: update.key)[:limit]


def leaking(verb):
    """A store that forgets on whose behalf it reads, in one verb."""

    async def leak(self, scope, *args, **kwargs):
        return await getattr(self.inner, verb)(EVERYONE, *args, **kwargs)

    return type(f"Leaks_{verb}", (Wrapped,), {verb: leak})


SCOPED = ["find_flow", "key_of", "list_flows", "find_task", "list_tasks", "summarize", "history",
          "last_seq", "events_after", "list_open_waits", "list_updates"]

LEAKS = [leaking(verb) for verb in SCOPED]
'''

TESTS = """
import pytest
from flowstead.testing.conformance import StoreConformance

import stores


def suite(kind):
    class Suite(StoreConformance):
        @pytest.fixture
        def make_store(self):
            tables = stores.MemoryTables()
            return lambda: kind(tables)

    Suite.__name__ = Suite.__qualname__ = f"Test{kind.__name__}"
    return Suite


for kind in [*stores.Wrapped.__subclasses__(), *stores.WritesHalfABatch.__subclasses__()]:
    globals()[f"Test{kind.__name__}"] = suite(kind)

del kind


class TestWrapped(StoreConformance):
    @pytest.fixture
    def tables(self):
        return stores.MemoryTables()

    @pytest.fixture
    def make_store(self, tables):
        first = [stores.Wrapped(tables)]
        return first.pop

    @pytest.fixture
    def make_again(self, tables):
        return lambda: stores.Wrapped(tables)

    async def commit_damaged(self, store, write):
        return await store.inner.commit([write])


class TestWithoutAStore(StoreConformance):
    pass
"""

CAUGHT = {
    "LosesABatch": "test_positions_grow_over_commits_and_have_no_gap_inside_a_batch",
    "IgnoresTheRevision": "test_a_stale_write_is_refused_and_nothing_changes",
    "IgnoresTheEpoch": "test_a_takeover_stops_the_overtaken_from_writing",
    "WritesHalfABatch": "test_one_misfit_refuses_the_whole_batch",
    "WritesHalfABatchWhenCancelled": (
        "test_a_batch_whose_caller_was_cancelled_is_there_whole_or_not_at_all[1]"
    ),
    "LeavesGaps": "test_a_refused_batch_uses_no_position",
    "AnswersTheLastPosition": "test_a_flow_goes_in_with_its_children_and_its_history",
    "ForgetsOnReopen": "test_reopening_sees_everything",
    "GivesKeysAgain": "test_keys_never_repeat_and_grow",
    "ListsOldestFirst": "test_flows_are_listed_newest_first_in_pages",
    "TellsTheSeenPositionAgain": "test_events_after_a_position_are_read_in_pages",
    "CountsTheLimitBeforeTheOwner": (
        "test_a_page_of_one_owners_events_is_full_whoever_else_writes"
    ),
    "TicksAtTheInstantItself": "test_what_is_due_is_found_after_one_instant_up_to_another",
    "ListsTheLastUnfinishedAgain": "test_what_has_to_move_again_is_listed_in_pages",
    "LetsEverybodyIn": "test_a_second_owner_is_refused_and_the_first_goes_on",
    "FreesWhatIsNotItsOwn": ("test_an_overtaken_store_that_closes_leaves_the_new_owner_alone"),
    "KeepsTheLockWhenCancelled": "test_a_cancelled_open_leaves_the_store_to_nobody[1-open]",
    "UsesAKeyTwice": "test_an_idempotency_key_is_used_once_per_owner",
    "HandsOutItsMemory": "test_what_is_handed_out_is_not_shared",
    "NormalizesText": "test_texts_that_look_alike_are_different_texts",
    "FoldsCase": "test_a_prefix_is_text_and_nothing_else[a-a-A]",
    "StumblesOverABadRow": "test_an_unreadable_flow_is_refused_alone_and_listed[cut]",
    "TakesABadRowForNone": "test_an_unreadable_flow_still_guards_its_id",
    "LetsASignalBeTakenTwice": (
        "test_a_kept_signal_is_taken_once_and_who_comes_second_writes_nothing"
    ),
    "UsesASignalIdTwice": (
        "test_a_signal_id_is_used_once_per_owner_and_the_second_batch_is_refused_whole"
    ),
    "KeepsSignalsForEver": "test_a_signal_is_kept_until_it_expires_and_not_at_that_instant",
    "TrustsTheDigestAlone": ("test_the_key_of_another_owner_is_another_key_though_it_be_the_same"),
    "CutsAFlowInTheMidst": "test_what_is_met_is_listed_in_pages_of_whole_flows",
    "ListsWhatHasEnded": "test_what_waits_for_nothing_from_outside_is_not_listed",
    "ReplacesUnderTheSameVersion": (
        "test_a_report_of_progress_that_was_replaced_meanwhile_changes_nothing"
    ),
    "GoesOnAfterTheEnd": "test_the_end_of_a_flow_supersedes_its_pending_progress",
    "RefusesALateReport": "test_a_report_of_progress_that_was_replaced_meanwhile_changes_nothing",
    "MixesDigests": "test_digests_are_due_by_owner_and_bucket_oldest_first_in_each",
    "Leaks_list_open_waits": "test_open_waits_are_those_in_scope_and_of_one_flow_if_asked",
    "Leaks_list_updates": "test_updates_are_those_in_scope_and_of_one_flow_if_asked",
    "Leaks_find_flow": "test_another_owner_finds_no_flow",
    "Leaks_key_of": "test_another_owner_finds_no_flow",
    "Leaks_list_flows": "test_another_owner_lists_no_flow",
    "Leaks_find_task": "test_another_owner_finds_no_child",
    "Leaks_list_tasks": "test_another_owner_finds_no_child",
    "Leaks_summarize": "test_another_owner_finds_no_child",
    "Leaks_history": "test_another_owner_reads_no_history",
    "Leaks_last_seq": "test_another_owner_reads_no_history",
    "Leaks_events_after": "test_another_owner_reads_no_history",
}
"""Which test finds out which store; each fails others as well."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says in a stranger's project: the whole suite for a good store, one test for each bad one."""
    project = tmp_path_factory.mktemp("project")
    project.joinpath("pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    project.joinpath("stores.py").write_text(STORES, encoding="utf-8")
    project.joinpath("test_stores.py").write_text(TESTS, encoding="utf-8")
    named = [f"test_stores.py::Test{kind}::{test}" for kind, test in CAUGHT.items()]
    arguments = ["-p", "anyio", "-p", "no:cacheprovider", "-rA", "--tb=short", "--color=no"]
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", *arguments),
            "test_stores.py::TestWrapped",
            "test_stores.py::TestWithoutAStore::test_a_new_store_has_nothing",
            *named,
        ],
        cwd=project,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def outcomes(told: str, kind: str, outcome: str) -> list[str]:
    """The names of one store's tests that ended so."""
    return re.findall(rf"^{outcome} test_stores\.py::Test{kind}::(\S+)", told, re.MULTILINE)


def test_a_store_that_keeps_its_promises_passes_in_a_strangers_project(told: str) -> None:
    passed = outcomes(told, "Wrapped", "PASSED")

    assert len({name.partition("[")[0] for name in passed}) >= 140
    assert outcomes(told, "Wrapped", "FAILED") == []
    assert outcomes(told, "Wrapped", "ERROR") == []
    assert outcomes(told, "Wrapped", "SKIPPED") == []


@pytest.mark.parametrize("kind", CAUGHT)
def test_a_store_that_breaks_a_promise_is_failed_by_the_test_of_that_promise(
    told: str, kind: str
) -> None:
    assert outcomes(told, kind, "FAILED") == [CAUGHT[kind]]


def test_a_failing_assertion_shows_both_of_its_sides(told: str) -> None:
    assert "['flow-0', 'flow-1', 'flow-2']" in told


def test_whoever_gives_no_store_is_told_what_to_give(told: str) -> None:
    assert outcomes(told, "WithoutAStore", "ERROR") == ["test_a_new_store_has_nothing"]
    assert "Give your subclass of StoreConformance a fixture `make_store`" in told


def test_the_tools_for_tests_are_imported_without_pytest() -> None:
    program = "import flowstead.testing, sys; print('pytest' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("False\n", "")
