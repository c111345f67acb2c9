"""What is promised of code that runs: held against each event at the instant of its commit.

The model knows flows and children by their history alone; here it is also known which code runs, and what each
child was asked to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tests.simulation.model import PART_ATTEMPTS, PARTS, Entry, FlowState, TaskState, Wrong

if TYPE_CHECKING:
    from tests.simulation.machine import World


class Asked(NamedTuple):
    """The function of a launched child, and how often it may fail."""

    function: str
    max_attempts: int


def check(world: World, entry: Entry) -> None:
    """Hold an event against every promise.

    Raises:
        Wrong: One is broken.
    """
    if entry.task_id is None:
        return
    flow = world.model.flows[world.model.home[entry.task_id]].now
    task = flow.tasks[entry.task_id]
    if entry.type == "task.ended":
        check_its_code_has_ended(world, entry)
        check_all_attempts_were_made(world, flow, task, entry)
    elif entry.type == "task.started":
        check_it_is_not_done_twice(world, task, entry)
        check_it_was_due(world, entry)


def check_its_code_has_ended(world: World, entry: Entry) -> None:
    """A child ends with its code, never before; not so where code runs of which this process knows nothing."""
    if world.is_up and not world.overtaken and entry.task_id in world.running:
        raise Wrong(f"ended while its code runs: {entry}")


def check_all_attempts_were_made(
    world: World, flow: FlowState, task: TaskState, entry: Entry
) -> None:
    """A child ends as failed once it has failed as often as it may; being cut off is not failing."""
    failure: dict[str, Any] = entry.changed.get("failure") or {}
    asked = asked_of(world, task)
    # Only what the code itself raises: some failures are not tried again.
    if asked is None or failure.get("code") != "ValueError":
        return
    if flow.has_ended or flow.intent is not None or task.asked_to_stop_at is not None:
        return
    if task.retries != asked.max_attempts - 1:
        raise Wrong(f"failed after {task.retries} retries of {asked.max_attempts - 1}: {entry}")


def check_it_is_not_done_twice(world: World, task: TaskState, entry: Entry) -> None:
    """A child that must not be done twice is lost when it is cut off."""
    asked = asked_of(world, task)
    if asked is not None and asked.function == "fragile" and task.interruptions:
        raise Wrong(f"cut off, and done again: {entry}")


def check_it_was_due(world: World, entry: Entry) -> None:
    """A retry starts no earlier than planned; one that stands in line keeps its place if the clock is put back."""
    log = world.model.flows[world.model.home[entry.task_id or ""]]
    before = log.states[-2]
    assert before is not None
    task = before.tasks[entry.task_id or ""]
    if task.due is None or task.due_since <= world.put_back_at:
        return
    if entry.event["at"] < task.due:
        raise Wrong(f"it was not due before {task.due}: {entry}")


def asked_of(world: World, task: TaskState) -> Asked | None:
    """What a launched child is to do; None for one that is linked."""
    if not task.launched:
        return None
    function, retry = task.text, None
    if task.run_id in PARTS:
        return Asked(function, PART_ATTEMPTS)
    if task.text[:1] == "t" and task.text[1:].isdigit():
        args = world.calls[int(task.text[1:])].args
        function, retry = args["run"], args.get("retry")
    usual = 3 if function == "flaky" else 1
    return Asked(function, usual if retry is None else retry.max_attempts)
