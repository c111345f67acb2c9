"""What is promised of code that runs: held against each event at the instant of its commit.

The model knows flows and children by their history alone; here it is also known which code runs, and what each
child was asked to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from flowstead.model.retry import Retry
from tests.simulation.model import (
    ABANDON_AFTER,
    DEADLINE,
    KILL_AFTER,
    PART_ATTEMPTS,
    PARTS,
    Entry,
    FlowState,
    TaskState,
    Wrong,
)
from tests.simulation.running import ASKED_TO_WAIT, ONCE, RETRIES

if TYPE_CHECKING:
    from tests.simulation.machine import World

PASSED_ON_SECONDS = 6.0
"""In a calm world, an intent has reached the flows below within so many seconds."""
_NEVER_AGAIN = frozenset({"auth", "fatal"})
_USUALLY_AGAIN = frozenset({"transient", "timed_out", None})
"""Categories that are tried again where a policy does not say; None for a failure without one."""
_GIVEN_UP = ("abandoned", None, None)


class Asked(NamedTuple):
    """The function of a launched child, and under which policy it runs."""

    function: str
    retry: Retry | None = None
    once: bool = False
    queue_timeout: float | None = None
    doing: str | None = None

    @property
    def max_attempts(self) -> int:
        return 1 if self.retry is None else self.retry.max_attempts


LINKED = Asked("")
"""Nothing is known of what others run."""


def check(world: World, entry: Entry) -> None:
    """Hold an event against every promise.

    Raises:
        Wrong: One is broken.
    """
    if entry.type == "flow.cancelled":
        check_nothing_lives_below(world, entry)
    if entry.task_id is None:
        return
    flow = world.model.flows[world.model.home[entry.task_id]].now
    task = flow.tasks[entry.task_id]
    if task.carried:
        return
    if task.failure is not None:
        kind, _, category = task.failure
        world.seen[f"{entry.type} {category or kind}"] += 1
    match entry.type:
        case "task.ended":
            check_its_code_has_ended(world, task, entry)
            check_all_attempts_were_made(world, flow, task, entry)
            check_it_was_not_lost_for_nothing(world, task, entry)
            check_its_flow_has_ended(world, flow, task, entry)
            check_it_waited_long_enough(world, task, entry)
            check_no_program_is_left(world, task, entry)
        case "task.started":
            check_it_is_not_done_twice(world, task, entry)
            check_it_was_due(world, entry)
            check_nobody_above_is_being_cancelled(world, entry)
        case "task.released" | "task.interrupted":
            check_it_is_not_done_twice(world, task, entry)
        case "task.retry_scheduled" | "task.review_requested":
            check_it_may_be_tried_again(world, task, entry)
            check_no_program_is_left(world, task, entry)
        case "task.kill_requested":
            check_it_is_killed_once(world, task, entry)


# ---- ends -----------------------------------------------------------------------------------------


def check_its_code_has_ended(world: World, task: TaskState, entry: Entry) -> None:
    """A child ends with its code, never before, unless it was given up after every other means."""
    if task.failure == _GIVEN_UP:
        if task.status == "timed_out":
            _check_its_deadline_is_over(task, entry)
        else:
            check_it_was_given_time(world, task.killed_at, ABANDON_AFTER, entry)
        world.code.give_up(task.task_id)
    # Not so where code runs of which this process knows nothing.
    if world.is_up and not world.overtaken and entry.task_id in world.running:
        raise Wrong(f"ended while its code runs: {entry}")


def _check_its_deadline_is_over(task: TaskState, entry: Entry) -> None:
    least = DEADLINE + KILL_AFTER + ABANDON_AFTER
    if entry.seconds - task.started_since < least - 0.001:
        raise Wrong(f"it had {least} s from {task.started_since}: {entry}")


def check_it_was_given_time(world: World, since: int | None, seconds: float, entry: Entry) -> None:
    """No rung of a stop is climbed before its time."""
    assert since is not None
    if entry.event["at"] < since + round(seconds * 1000):
        raise Wrong(f"it had time until {since + round(seconds * 1000)}: {entry}")


def check_it_is_killed_once(world: World, task: TaskState, entry: Entry) -> None:
    """No rung is climbed twice, unless nobody here has seen yet to what an earlier process has left outside."""
    before = world.model.flows[world.model.home[task.task_id]].states[-2]
    assert before is not None
    if before.tasks[task.task_id].killed_at is None:
        check_it_was_given_time(world, task.asked_to_stop_at, KILL_AFTER, entry)
    elif world.asked_of(task.task_id).function != "tool" or task.task_id in world.running:
        raise Wrong(f"it was killed before: {entry}")


def check_all_attempts_were_made(
    world: World, flow: FlowState, task: TaskState, entry: Entry
) -> None:
    """A child ends as failed once it has failed as often as it may; being cut off is not failing."""
    asked = asked_of(world, task)
    if asked is None or task.status not in ("failed", "timed_out") or task.child_flow is not None:
        return
    if flow.has_ended or flow.intent is not None or task.asked_to_stop_at is not None:
        return
    assert task.failure is not None
    kind, code, category = task.failure
    if task.failure == _GIVEN_UP:
        return  # there is no second attempt beside the first
    if category == "validation" and not _is_worth_it(asked.retry, kind, category):
        raise Wrong(f"nobody has looked at it: {entry}")
    failures = task.attempt - task.interruptions
    if category in _NEVER_AGAIN and failures > 1 + task.answers + task.retries:
        raise Wrong(f"tried again, though hopeless: {entry}")
    again = _is_worth_it(asked.retry, kind, category) and code != "queue"
    if again and failures < asked.max_attempts:
        raise Wrong(f"failed {failures} times of {asked.max_attempts}: {entry}")


def check_it_may_be_tried_again(world: World, task: TaskState, entry: Entry) -> None:
    """Only what may succeed next time is tried again, and only as often as the policy says."""
    asked = asked_of(world, task)
    assert asked is not None and task.failure is not None
    kind, _, category = task.failure
    if entry.type == "task.review_requested":
        if category != "validation":
            raise Wrong(f"nobody need look at it: {entry}")
        return
    failures = task.attempt - task.interruptions
    if asked.once or failures >= asked.max_attempts:
        raise Wrong(f"failed {failures} times of {asked.max_attempts}, and tried again: {entry}")
    if not _is_worth_it(asked.retry, kind, category):
        raise Wrong(f"this is not worth another attempt: {entry}")
    wait = round(ASKED_TO_WAIT * 1000)
    if asked.doing == "transient later" and (task.due or 0) < entry.event["at"] + wait:
        raise Wrong(f"it asked to be left alone for {wait} ms: {entry}")


def _is_worth_it(retry: Retry | None, kind: str, category: str | None) -> bool:
    named = "timed_out" if kind == "timed_out" else category
    if retry is None or retry.reasons is None:
        return named in _USUALLY_AGAIN
    return (named or "other") in retry.reasons


def check_it_was_not_lost_for_nothing(world: World, task: TaskState, entry: Entry) -> None:
    """Lost is what was cut off: too often, without its function, or though it must not be done twice."""
    asked = asked_of(world, task)
    if task.status == "lost" and asked is not None and asked.once and asked.function != "bare":
        if task.failure != ("interrupted", "unknown", None):
            raise Wrong(f"nobody knows whether it was done, and that is not what it says: {entry}")
        if not world.code.begun.get(task.task_id) and task.attempt == 0:
            raise Wrong(f"it never began: {entry}")


def check_its_flow_has_ended(world: World, flow: FlowState, task: TaskState, entry: Entry) -> None:
    """A child that stands for a flow ends with it, in the same way."""
    if task.child_flow is None:
        return
    log = world.model.child_flow(flow.owner, task)
    if log is None:
        if task.status == "succeeded":
            raise Wrong(f"its flow was never made: {entry}")
        return
    left = [task.task_id for task in log.now.active if task.launched]
    if left or not log.now.has_ended:
        raise Wrong(f"its flow has not ended, or {left} in it: {entry}, {log.now}")
    if task.status != log.now.status and task.status != "timed_out":
        raise Wrong(f"its flow has ended otherwise: {entry}, {log.now}")


def check_nothing_lives_below(world: World, entry: Entry) -> None:
    """A flow is cancelled when everything below it has ended, and not before."""
    root = world.model.flows[(entry.owner, entry.event["flowId"])]
    for log, depth in world.model.below(root):
        # What others run for a flow below that has ended, they may go on with.
        left = [task.task_id for task in log.now.active if task.launched or not depth]
        if left or (depth and not log.now.has_ended):
            raise Wrong(f"{left} of {log.now.flow_id}, {depth} below, have not ended: {entry}")


def check_it_waited_long_enough(world: World, task: TaskState, entry: Entry) -> None:
    """A child that nobody has started in time ends as timed out, and not before."""
    asked = asked_of(world, task)
    if task.failure == ("timed_out", "idle", None) and asked is not None:
        is_calm = world.is_calm and task.started_since > world.calm_since
        if asked.function != "quiet" or (asked.doing == "murmur" and is_calm):
            raise Wrong(f"it gave a sign of life each second: {entry}")
    if task.status != "timed_out" or task.failure != ("timed_out", "queue", None):
        return
    if asked is None or asked.queue_timeout is None or task.has_started or task.attempt:
        raise Wrong(f"it had started, or has no such deadline: {entry}")
    check_it_was_given_time(world, task.created_at, asked.queue_timeout, entry)


def check_no_program_is_left(world: World, task: TaskState, entry: Entry) -> None:
    """Of a child that has ended, or waits, nothing runs outside."""
    if not world.overtaken and (left := world.outside.alive(task.task_id)):
        raise Wrong(f"{left} runs: {entry}")


# ---- starts ---------------------------------------------------------------------------------------


def check_it_is_not_done_twice(world: World, task: TaskState, entry: Entry) -> None:
    """A child that must not be done twice begins once, unless somebody wants it again."""
    asked = asked_of(world, task)
    if asked is None or not asked.once or asked.function == "bare":
        return
    begun = len(world.code.begun.get(task.task_id, ()))
    # A program that is adopted is only seen to.
    if begun > task.answers and asked.function != "tool":
        raise Wrong(f"it has begun {begun} times: {entry}")
    if task.interruptions:
        raise Wrong(f"cut off, and done again: {entry}")


def check_it_was_due(world: World, entry: Entry) -> None:
    """A retry starts no earlier than planned; one that stands in line keeps its place if the clock is put back."""
    log = world.model.flows[world.model.home[entry.task_id or ""]]
    before = log.states[-2]
    assert before is not None
    task = before.tasks[entry.task_id or ""]
    check_it_is_still_wanted(world, task, entry)
    if task.due is None or task.due_since <= world.put_back_at:
        return
    if entry.event["at"] < task.due:
        raise Wrong(f"it was not due before {task.due}: {entry}")


def check_it_is_still_wanted(world: World, task: TaskState, entry: Entry) -> None:
    """A child does not start for the first time after the instant until which it was to wait."""
    asked = asked_of(world, task)
    if asked is None or asked.queue_timeout is None or task.has_started:
        return
    if entry.event["at"] > task.created_at + round(asked.queue_timeout * 1000):
        raise Wrong(f"it was to wait {asked.queue_timeout} s from {task.created_at}: {entry}")


def check_nobody_above_is_being_cancelled(world: World, entry: Entry) -> None:
    """An intent reaches the flows below: in a moment, and in the next process before anything else."""
    log = world.model.flows[world.model.home[entry.task_id or ""]]
    for above in world.model.above(log):
        position = above.first_position(lambda state: state.intent is not None)
        if position is None:
            continue
        if position <= world.found_at_boot:
            raise Wrong(
                f"{above.now.flow_id} above it was asked to cancel before the boot: {entry}"
            )
        since = max(world.model.entries[position - 1].seconds, world.calm_since)
        if world.is_calm and entry.seconds - since > PASSED_ON_SECONDS:
            raise Wrong(f"{above.now.flow_id} above it was asked to cancel: {entry}")


# ---- what they were asked to do -------------------------------------------------------------------


def asked_of(world: World, task: TaskState) -> Asked | None:
    """What a launched child is to do; None for one that is linked."""
    if not task.launched:
        return None
    flow = world.model.flows[world.model.home[task.task_id]].now
    if flow.controller == "collect" and task.run_id in PARTS:
        return Asked(task.text, Retry(max_attempts=PART_ATTEMPTS, jitter=0.0))
    args: dict[str, Any] = {"run": task.text}
    if task.text[:1] == "t" and task.text[1:].isdigit():
        args = world.calls[int(task.text[1:])].args
    function = args["run"]
    once = args.get("idempotent", True) is False or function == ONCE
    retry = None if once else args.get("retry", RETRIES.get(function))
    doing = None if task.answers else (args.get("input_json") or {}).get("do")
    return Asked(function, retry, once, args.get("queue_timeout"), doing)
