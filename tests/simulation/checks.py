"""The twelve invariants, each a function to be asked of a world that stands still.

I2, I3 and I5 are also held by the model, which folds every event at the instant of its commit, and by the order
of calls, which no answer may run ahead of.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from flowstead import StoreError
from flowstead.model.flow import FlowKey
from flowstead.store import codec
from flowstead.store.codec import EventRow, FlowRow, TaskRow
from tests import invariants
from tests.invariants import FlowRows, TaskRows
from tests.simulation import model as spec
from tests.simulation.judge import task_view, view_of
from tests.simulation.machine import CLOCK_SECONDS
from tests.simulation.operations import ADMIN, OWNERS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.simulation.machine import World
    from tests.simulation.operations import Call


TOLD_SECONDS = 10.0
"""In a calm world, an end is told, and code is stopped by it, within this much simulated time."""


def _flow_rows(world: World, key: int) -> FlowRows:
    """One flow of the simulated disk, in the shape the checker of files knows."""
    tables = world.disk.written
    row = tables.flows[key]
    flow = FlowRows(row._asdict(), json.loads(row.doc))
    for task_key in tables.children.get(key, ()):
        task = tables.tasks[task_key]
        flow.tasks[task.task_id] = TaskRows(task._asdict(), json.loads(task.doc))
    for _, position in sorted(tables.lines[key].items()):
        event = json.loads(tables.events[position].doc)
        flow.events.append(event)
        if task_id := event.get("taskId"):
            flow.tasks[task_id].events.append(event)
    return flow


def _live_runtimes(world: World) -> list[Any]:
    return [] if world.runtime is None else [world.runtime]


def check_i1_one_actor_for_each_flow(world: World) -> None:
    """One directory of actors, each under its own key, in the one runtime that owns the store."""
    for runtime in _live_runtimes(world):
        for key, actor in runtime._core.engine._actors.items():
            assert actor.key == key, f"the actor of {actor.key} is kept as {key}"
    epoch = world.disk.written.epoch
    for runtime in world.overtaken:
        assert runtime._core.engine.store._epoch < epoch, "an overtaken runtime holds the epoch"


def check_i2_revisions_count_changes(world: World, flow: FlowRows) -> None:
    """Revisions and seqs are counted without gaps, and the record stands at the last."""
    invariants.check_history_has_no_gap(flow)
    invariants.check_revisions(flow)


def check_i3_nothing_is_told_before_it_is_durable(world: World) -> None:
    """Nobody has been answered from, nor does code run by, what the disk does not hold."""
    told = world.order.acknowledged(world.tick())
    assert told <= len(world.model.entries), f"position {told} was told of and is not there"
    if not world.overtaken:
        for task_id, attempt in world.running.items():
            task = world.model.task(task_id)
            assert task is not None, f"{task_id} runs and does not exist"
            assert task.attempt >= attempt, f"{task_id} runs as {attempt}: {task}"


def check_i4_actors_know_what_is_stored(world: World) -> None:
    """An actor without a draft under way holds the record that is stored, to the byte, or none."""
    if world.files is not None:
        return
    tables = world.disk.written
    for runtime in _live_runtimes(world):
        for key, actor in runtime._core.engine._actors.items():
            if actor.doc is None or actor._draft is not None:
                continue
            stored = tables.flows[tables.flow_keys[key]].doc.encode()
            assert actor.doc == stored, f"{key}: in memory {actor.doc!r}, stored {stored!r}"
            active = {
                tables.tasks[row].task_id: tables.tasks[row].doc.encode()
                for row in tables.children.get(actor._flow.key, ())
                if tables.tasks[row].status in spec.ACTIVE
            }
            known = {name: codec.encode(task) for name, task in actor._children.active.items()}
            assert known == active, f"{key}: children in memory {known}, stored {active}"


def check_i5_the_end_is_final(world: World, flow: FlowRows) -> None:
    """Ended stays ended, an intent stays stamped, and the record is what the history tells."""
    invariants.check_end_is_final(flow)
    invariants.check_cancel_intent_is_kept(flow)
    invariants.check_history_tells_the_flow(flow)
    invariants.check_times_of_flow(flow)


def check_i6_children_end_once(world: World, flow: FlowRows) -> None:
    """One end for each child, told once, under the attempt that was running, with its own result."""
    for task in flow.tasks.values():
        for check in invariants.OF_A_TASK:
            check(task)
        if task.doc["status"] == "succeeded":
            _check_result(world, task)
    groups = Counter[str]()
    for task in flow.tasks.values():
        if task.doc["status"] == "running" and "launch" in task.doc:
            launch = task.doc["launch"]
            groups[launch.get("group", "")] += 1
            limit = launch.get("limit", spec.RUNNING_CHILDREN)
            running = groups[launch.get("group", "")]
            assert running <= limit, f"{flow.name}: {running} children run, {limit} may"


def _check_result(world: World, task: TaskRows) -> None:
    told, doc = task.doc.get("resultJson"), task.doc
    known = world.model.task(doc["taskId"])
    assert known is not None
    if known.carried:
        return  # its result is that of another child
    if known.child_flow is not None:
        log = world.model.child_flow(world.model.home[known.task_id][0], known)
        assert log is not None
        expected: Any = json.loads(log.now.state)
    elif known.wait is not None or known.letter is not None or doc["runtime"] == "notice":
        return  # its result is judged with what it was answered by
    elif "launch" not in doc:
        expected = {"token": doc["terminalSummary"]}
    elif doc["task"] == "post":
        expected = "posted"
    else:
        expected = {"by": doc["taskId"], "attempt": doc["attempt"]}
    assert told == expected, f"{task.name} succeeded with {told!r}, not {expected!r}"


def check_nobody_awaits_what_has_ended(world: World, flow: FlowRows) -> None:
    """What ends a wait of a controller wakes it in the same transaction; nobody waits for a flow that is over."""
    statuses = {name: task.doc["status"] for name, task in flow.tasks.items()}
    for group in flow.doc.get("awaiting", ()):
        over = [name for name in group if statuses[name] not in spec.ACTIVE]
        assert not over, f"{flow.name} awaits {group}, of which {over} have ended"
        assert flow.doc["status"] in ("waiting", "blocked"), f"{flow.name} awaits: {flow.doc}"
    if flow.doc.get("endedAt") is not None or flow.doc.get("cancelRequestedAt") is not None:
        left = [
            task.name
            for task in flow.tasks.values()
            if task.doc["status"] == "queued" and ("wait" in task.doc or "letter" in task.doc)
        ]
        assert not left, f"{flow.name} goes on no more, and {left} are left: {flow.doc}"


def check_i7_one_commit_at_a_time(world: World) -> None:
    """The world counts commits as they begin and end; two at once are noted where it happens."""
    assert not world.violations, world.violations


def check_i8_every_row_can_be_read(world: World, flow: FlowRows) -> None:
    """Every record decodes, and the columns beside it say the same."""
    codec.read_stored_flow(json.dumps(flow.doc).encode())
    invariants.check_flow_columns(flow)
    for task in flow.tasks.values():
        codec.read_stored_task(json.dumps(task.doc).encode())
        invariants.check_task_columns(task, flow)


def check_i9_unanswered_calls_are_done_or_not_at_all(world: World) -> None:
    """A call whose caller is gone has changed one thing or nothing."""
    made = Counter(call.number for call in world.made_by.values())
    twice = [number for number, count in made.items() if count > 1]
    assert not twice, f"calls {twice} were applied more than once"


def check_i10_closing_leaves_nobody_waiting(world: World) -> None:
    """After an orderly close every call has been answered, and no child that ran is recorded as running."""
    waiting = [call.name for call in world.calls if call.verdict == "open"]
    assert not waiting, f"never answered: {waiting}"
    for task_id in world.stopped:
        task = world.model.task(task_id)
        assert task is not None, f"{task_id} ran and does not exist"
        once = world.asked_of(task_id).once
        left = task.status == "running" or (task.status == "lost" and not once)
        assert not left, f"stopped by the close, and left running or lost: {task}"


def check_i11_an_idle_restart_changes_nothing(world: World) -> None:
    """Opening and closing a store that is at rest leaves every row as it was."""
    assert world.close(), "nobody dies in a calm world"
    world.boot()
    assert world.advance(10.0), "nobody dies in a calm world"
    assert world.close(), "nobody dies in a calm world"
    if any(_goes_on(log.now) for log in world.model.flows.values()):
        # A controller that waits for somebody else's child is entered again, and may write.
        world.boot()
        world.close()
        return
    before = dump(world)
    world.boot()
    assert world.advance(60.0), "nobody dies in a calm world"
    assert world.close(), "nobody dies in a calm world"
    after = dump(world)
    assert before == after, f"an idle restart changed {before ^ after}"


def _goes_on(state: spec.FlowState) -> bool:
    # One that cannot be parked is entered again, and waits again.
    stays = state.controller == "lingers" and state.awaits
    # One that was let go on by the restart itself may have begun to wait for the clock.
    stays |= any(task.wait and task.wait.deadline for task in state.open_waits)
    return stays or (state.controller in spec.CONTROLLERS and state.status in spec.ACTIVE)


def check_i12_strangers_see_nothing(world: World) -> None:
    """What an owner can list is his, whole; what is another's is not there."""
    if world.runtime is None:
        return
    world.play(_ask_as_strangers(world), place="looking around")


async def _ask_as_strangers(world: World) -> None:
    for owner in OWNERS:
        flows = world.runtime.tasks.flow.bind_session(session_key=owner)
        others = [log.now for log in world.flows_of(ADMIN) if log.now.owner != owner]
        try:
            listed = await flows.list(limit=1000)
            assert all(flow.owner_key == owner for flow in listed), f"{owner} sees others' flows"
            for state in others[:3]:
                found = await flows.get(state.flow_id)
                assert found is None or found.owner_key == owner, f"{owner} sees {found}"
                for task_id in list(state.tasks)[:2]:
                    assert await flows.get_task(task_id) is None, f"{owner} sees {task_id}"
        except StoreError:
            assert world._failing, "a read failed in a calm world"


def check_nobody_waits_for_what_has_happened(world: World) -> None:
    """In a calm world, whoever waits for an end is told of it within seconds."""
    long_ago = world.seconds - TOLD_SECONDS
    if world.runtime is None or not world.is_calm or world.calm_since > long_ago:
        return
    for call in world.clients.values():
        if call.overtaken or call.returned is not None or not 0 < call.began <= long_ago:
            continue
        ended = _end_awaited(world, call)
        assert ended is None or world.model.entries[ended - 1].seconds > long_ago, (
            f"{call.name} still waits for what happened at position {ended}"
        )


def check_no_code_outlives_its_flow(world: World) -> None:
    """In a calm world, the code of a flow that has ended stops within seconds."""
    long_ago = world.seconds - TOLD_SECONDS
    if world.runtime is None or not world.is_calm or world.calm_since > long_ago:
        return
    for task_id in world.running:
        log = world.model.flows[world.model.home[task_id]]
        ended = log.first_position(lambda state: state.has_ended)
        if ended is not None and world.put_back_at >= world.model.entries[ended - 1].seconds:
            continue  # by the wall clock, its time has not run out
        assert ended is None or world.model.entries[ended - 1].seconds > long_ago, (
            f"{task_id} runs on, though its flow ended at position {ended}"
        )


def check_stops_come_to_an_end(world: World) -> None:
    """In a calm world, a child that is asked to stop has ended, or is given up, within seconds."""
    patience = TOLD_SECONDS + spec.KILL_AFTER + spec.ABANDON_AFTER
    if world.runtime is None or not world.is_calm:
        return
    for log in world.model.flows.values():
        for task in log.now.active:
            since = _by_the_clock(world, max(task.asked_since, world.calm_since))
            asked = task.asked_to_stop_at is not None and task.child_flow is None
            assert not asked or world.seconds - since <= patience, f"it does not end: {task}"


def check_waits_come_due(world: World) -> None:
    """In a calm world, what is due by the clock is seen to soon: timers, deadlines, letters, and parking."""
    if world.runtime is None or not world.is_calm or world.files is not None:
        world.overdue.clear()
        return
    now, overdue = world.wall, world.overdue
    due = {
        row.task_id
        for row in world.disk.written.tasks.values()
        if row.status == "queued" and row.due_at is not None and row.due_at <= now and _is_wait(row)
    }
    due |= {
        f"{row.owner_key} {row.flow_id}"
        for row in world.disk.written.flows.values()
        if row.due_at is not None
        and 1 < row.due_at <= now
        and row.ended_at is None
        # One that is to end may have to wait for whoever runs its children.
        and json.loads(row.doc).get("cancelRequestedAt") is None
    }
    for name in set(overdue) - due:
        del overdue[name]
    for name in due:
        since = max(overdue.setdefault(name, world.seconds), world.calm_since)
        overdue[name] = max(since, world.clock_set_at)
        late = world.seconds - overdue[name]
        assert late <= CLOCK_SECONDS + TOLD_SECONDS, f"{name} was due {late} s ago"


def check_signals_meet_their_waits(world: World) -> None:
    """In a calm world, nothing is kept for long for which somebody waits."""
    if world.runtime is None or not world.is_calm or world.files is not None:
        world.met.clear()
        return
    tables = world.disk.written
    kept = [r for r in tables.signals.values() if r.kept and (r.expires_at or 0) > world.wall]
    waited = _waited_for(world) if kept else set()
    met = {row.key for row in kept if (row.owner_key, row.wait_key) in waited}
    for key in set(world.met) - met:
        del world.met[key]
    for key in met:
        since = max(world.met.setdefault(key, world.seconds), world.calm_since)
        assert world.seconds - since <= TOLD_SECONDS / 2, f"not handed over: {tables.signals[key]}"


def _waited_for(world: World) -> set[tuple[str, str | None]]:
    """What somebody waits for, whose deadline has not passed."""
    tables = world.disk.written
    waited = {
        (tables.flows[row.flow_key].owner_key, row.wait_key)
        for row in tables.tasks.values()
        if row.wait_key and row.status == "queued" and not _is_over(world, json.loads(row.doc))
    }
    for row in tables.flows.values():
        if row.wait_key and row.status in ("waiting", "blocked"):
            doc = json.loads(row.doc)
            if doc.get("wait") and not _is_over(world, doc):
                waited.add((row.owner_key, row.wait_key))
    return waited


def _is_over(world: World, doc: dict[str, Any]) -> bool:
    deadline = (doc.get("wait") or {}).get("deadlineAt")
    return deadline is not None and deadline <= world.wall


def _is_wait(row: TaskRow) -> bool:
    doc = json.loads(row.doc)
    return "wait" in doc or "letter" in doc


def _by_the_clock(world: World, since: float) -> float:
    """The second from which on time counts; what is due by a clock that was set meanwhile comes a little later."""
    was_set = world.clock_set_at >= since
    return max(since, world.clock_set_at + CLOCK_SECONDS) if was_set else since


def check_nobody_stands_in_line_for_ever(world: World) -> None:
    """In a calm world, a child that was to wait only so long for its start does not wait much longer."""
    if world.runtime is None or not world.is_calm:
        return
    for log in world.model.flows.values():
        for task in log.now.active:
            limit = world.asked_of(task.task_id).queue_timeout
            if limit is None or task.has_started or log.now.intent is not None:
                continue
            since = _by_the_clock(world, task.created_since)
            late = max(since + limit, world.calm_since) + TOLD_SECONDS
            assert world.seconds <= late, f"it was to wait {limit} s: {task}"


def _end_awaited(world: World, call: Call) -> int | None:
    """The position of the end that a call waits for, if it is on disk."""
    if call.op == "result":
        named = [log for log in world.flows_of(call.actor) if log.now.flow_id == call.flow_id]
        ends = [log.first_position(lambda state: state.has_ended) for log in named]
        # For operators an id may mean either of two flows.
        return None if None in ends else max(filter(None, ends), default=None)
    task_id = call.task_id or ""
    if call.op == "ask" and call.token in world.desk.letters:
        task_id = world.desk.letters[call.token][1]
    if call.op in ("ask", "wait_task") and task_id in world.model.home:
        log = world.model.flows[world.model.home[task_id]]
        return log.first_position(lambda state: task_id in state.ends)
    return None


OF_A_FLOW = (
    check_i2_revisions_count_changes,
    check_i5_the_end_is_final,
    check_i6_children_end_once,
    check_i8_every_row_can_be_read,
    check_nobody_awaits_what_has_ended,
)
OF_A_WORLD = (
    check_i1_one_actor_for_each_flow,
    check_i3_nothing_is_told_before_it_is_durable,
    check_i4_actors_know_what_is_stored,
    check_i7_one_commit_at_a_time,
    check_i9_unanswered_calls_are_done_or_not_at_all,
    check_nobody_waits_for_what_has_happened,
    check_no_code_outlives_its_flow,
    check_stops_come_to_an_end,
    check_nobody_stands_in_line_for_ever,
    check_waits_come_due,
    check_signals_meet_their_waits,
)


def check_standing_still(world: World) -> None:
    """Everything that can be asked without letting the world move, of what has changed since the last time."""
    for check in OF_A_WORLD:
        check(world)
    if world.files is not None or len(world.disk.written.events) != len(world.model.entries):
        # Between a write and its sync there is nothing to compare.
        return
    touched, world.touched = sorted(world.touched), set()
    for key in touched:
        if key not in world.disk.written.flows:
            continue
        flow = _flow_rows(world, key)
        for check_flow in OF_A_FLOW:
            check_flow(world, flow)
        _check_model(world, flow)


def _check_model(world: World, flow: FlowRows) -> None:
    """The stored rows are what the model made of the history."""
    state = world.model.flows[(flow.row["owner_key"], flow.row["flow_id"])].now
    stored = view_of(codec.read_flow(json.dumps(flow.doc).encode()))
    assert stored == state.view(), f"stored {stored}, the model says {state.view()}"
    told = {name: task.view() for name, task in state.tasks.items()}
    kept = {
        name: task_view(codec.read_task(json.dumps(task.doc).encode()))
        for name, task in flow.tasks.items()
    }
    assert kept == told, f"stored {kept}, the model says {told}"


def check_at_rest(world: World) -> None:
    """After healing: nobody waits, nothing that could go on stands still, and a restart changes nothing."""
    engine = world.runtime._core.engine
    statistics = engine.statistics()
    assert statistics.waiting_mutations == 0, f"mailboxes are not empty: {statistics}"
    assert not world.running, f"children still run: {sorted(world.running)}"
    held = engine._slots._held, engine._slots._lines, engine._slots._kept
    nested = [
        task for log in world.model.flows.values() for task in log.now.active if task.child_flow
    ]
    assert statistics.running_children <= len(nested), f"{statistics}, {nested}"
    assert not any(held[1:]) and not any(held[0].values()), f"slots are lost: {held}"
    assert not world.outside.alive(), f"programs are left: {world.outside.alive()}"
    late = [call.name for call in world.clients.values() if not _may_wait(world, call)]
    assert not late, f"never answered: {late}"
    for log in world.model.flows.values():
        _check_flow_rests(world, log.now)
    if world.files is None:
        check_waits_rest(world)
        check_updates_rest(world)
    check_standing_still(world)


def check_waits_rest(world: World) -> None:
    """No wake-up is lost: controllers that stand still are parked, and nothing that is kept has met its wait."""
    tables = world.disk.written
    for row in tables.flows.values():
        doc = json.loads(row.doc)
        if row.ended_at is not None or not doc.get("awaiting"):
            continue
        is_there = _is_driven(world, world.model.flows[(row.owner_key, row.flow_id)].now)
        world.seen["parked at rest"] += not is_there
        may_stay = doc.get("parkAt") == 1 or doc["status"] == "blocked"
        assert may_stay or "parkAt" not in doc, f"not parked: {doc}"
        assert is_there == ("parkAt" in doc), f"its controller is there: {is_there}: {doc}"


def check_updates_rest(world: World) -> None:
    """Whatever had to be told has arrived, once; or it is on record that it has not."""
    tables = world.disk.written
    arrived = list(world.channel.received.values())
    rows = [(row, json.loads(row.doc)) for row in tables.updates.values()]
    for row in tables.flows.values():
        policy = json.loads(row.doc).get("notifyPolicy", "done_only")
        ends = [doc for one, doc in rows if (one.flow_key, one.slot) == (row.key, "done")]
        expected = row.ended_at is not None and policy != "silent"
        assert len(ends) == expected, f"{row.flow_id}, {policy}: {ends}"
    for one, doc in rows:
        world.seen[f"update {one.status}"] += 1
        came = doc["idempotencyKey"] in world.channel.received
        is_put_by = one.bucket is not None and (one.due_at or 0) > world.wall - 60_000
        assert one.status != "pending" or is_put_by, f"not told: {doc}"
        assert one.status != "delivered" or came, f"never arrived: {doc}"
        if one.status == "delivery_failed":
            log = world.model.flows[(doc["ownerKey"], doc["flowId"])]
            assert one.slot in log.now.given_up, f"nobody knows that it was given up: {doc}"
    items = Counter(item["text"] for update in arrived for item in update.items)
    twice = [text for text, times in items.items() if times > 1]
    assert not twice, f"in two digests: {twice}"


def _check_flow_rests(world: World, state: spec.FlowState) -> None:
    waits = [task for task in state.active if _may_stand(world, state, task)]
    for task in state.active:
        assert task in waits or not task.launched, f"{state.flow_id}: {task} stands still"
        assert task.review is None or state.status == "blocked", f"{task} needs somebody: {state}"
    if state.intent is not None and not state.active:
        assert state.has_ended, f"cancel was requested, and nothing ends {state}"
    if state.controller in spec.CONTROLLERS and not (state.intent and state.active):
        nested = [task for task in waits if task.child_flow is not None]
        # One that somebody let go on while its controller stood in a wait goes on when the wait ends.
        stands = state.open_waits and _is_driven(world, state)
        assert state.status not in spec.ACTIVE or nested or stands, f"it is stuck: {state}"
    if state.mirrored and not state.active:
        [task] = state.tasks.values()
        given_back = state.status == "blocked" and task.outcome == "blocked"
        assert state.has_ended or given_back, f"its task has ended: {state}"


def _is_driven(world: World, state: spec.FlowState) -> bool:
    """Whether the flow's controller is in memory."""
    crews = world.runtime._core.engine.supervisor._crews
    crew = crews.get(FlowKey(state.owner, state.flow_id))
    return crew is not None and crew.controller is not None


def _may_stand(world: World, state: spec.FlowState, task: spec.TaskState) -> bool:
    """Whether a launched child waits for a person, for a flow that does, or for its controller's."""
    if task.review is not None:
        return not state.has_ended and state.intent is None
    if task.child_flow is not None:
        log = world.model.child_flow(state.owner, task)
        return log is not None and _waits_for_others(world, log.now)
    # A step of a bare function waits for its controller, which waits for its flow to be resumed.
    return state.status in ("waiting", "blocked") and task.text in ("bare", "post")


def _waits_for_others(world: World, state: spec.FlowState) -> bool:
    """Whether a flow that has not ended waits for somebody: for its owner, or for whoever runs its children."""
    if state.has_ended:
        return False
    others = [task for task in state.active if not task.launched]
    return bool(
        state.status in ("waiting", "blocked")
        or others
        or any(_may_stand(world, state, task) for task in state.active)
    )


def _may_wait(world: World, call: Any) -> bool:
    """Whoever waits for an end that did not come may wait on."""
    if call.op == "result":
        found = [log.now for log in world.flows_of(call.actor) if log.now.flow_id == call.flow_id]
        # For operators an id may mean another flow by now than when they began to wait.
        return any(not state.has_ended for state in found)
    if call.op == "ask" and call.token in world.desk.letters:
        task = world.model.task(world.desk.letters[call.token][1])
        return task is not None and task.is_active
    if call.op == "wait_task":
        task = world.model.task(call.task_id or "")
        return task is not None and task.is_active
    return False


def dump(world: World) -> set[FlowRow | TaskRow | EventRow | tuple[Any, ...]]:
    """Every row of the store."""
    if world.files is not None:
        rows = invariants.dump(world.files.path)
        return {(table, *row) for table, found in rows.items() for row in found}
    tables = world.disk.written
    flows = {row._replace(expected_revision=None) for row in tables.flows.values()}
    tasks = {row._replace(fresh=False) for row in tables.tasks.values()}
    rows = {*flows, *tasks, *tables.events.values()}
    rows |= {row._replace(fresh=False) for row in tables.signals.values()}
    return rows | {row._replace(fresh=False) for row in tables.updates.values()}


def check_file(world: World, directory: Path) -> None:
    """The real file of a process that is gone, checked on a copy with everything there is to check."""
    assert world.files is not None
    copied = directory / "copy"
    copied.mkdir()
    for name in ("flows.db", "flows.db-wal"):
        if (file := world.files.path.with_name(name)).exists():
            shutil.copyfile(file, copied / name)
            (copied / name).chmod(0o600)
    if (copied / "flows.db").exists():
        invariants.check_all(copied / "flows.db")
    shutil.rmtree(copied)
