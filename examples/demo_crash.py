"""The triage in a process of its own, killed half way with kill -9 and started again; then everything is counted.

What is claimed at the end is read from the store and from the effect files, not from what the processes said.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import flowstead
import inbox_triage
from mailboxes import default_mailboxes, open_mailboxes
from screen import STYLES, Screen

LINE = re.compile(r"\[ *(\d+)/\d+\] (\w+)")
SECONDS_OF_THINKING = 4.0


class Snapshot(NamedTuple):
    """The store and the effects at one instant."""

    flow: flowstead.Flow
    tasks: dict[str, flowstead.Task]
    events: list[flowstead.Event]
    effects: Counter[str]
    digests: int

    def starts(self, task: flowstead.Task) -> int:
        return self._count("task.started", task)

    def ends(self, task: flowstead.Task) -> int:
        return self._count("task.ended", task)

    def _count(self, kind: str, task: flowstead.Task) -> int:
        return sum(e.type == kind and e.task_id == task.task_id for e in self.events)


def run(mailboxes: list[Path], screen: Screen) -> int:
    """The whole demo; answers the exit code."""
    with tempfile.TemporaryDirectory(prefix="flowstead-demo-") as folder:
        return _run(mailboxes, Path(folder), screen)


def _run(mailboxes: list[Path], work: Path, screen: Screen) -> int:
    with open_mailboxes(mailboxes) as mail:
        keys = list(mail)
    if len(keys) < 2:
        screen.say("The demo needs a mailbox with two messages at least.", "red")
        return 1
    think = min(1.0, SECONDS_OF_THINKING * 8 / len(keys))
    began = time.monotonic()

    screen.say(f"1  Triage {len(keys)} messages, 8 at once, in a process of its own", "bold")
    with _started(mailboxes, work, think) as first:
        for done in _follow(first, len(keys), screen):
            if done >= len(keys) // 2:
                first.kill()
                break
    if first.returncode != -signal.SIGKILL:
        screen.say(f"The process ended by itself ({first.returncode}) before the kill.", "red")
        return 1
    screen.say(f"   kill -9 {first.pid}", "bold red")
    before = asyncio.run(_look(work))

    screen.say()
    screen.say("2  Start it again on the same file", "bold")
    with _started(mailboxes, work, think) as second:
        for _ in _follow(second, len(keys), screen):
            pass
    if second.returncode != 0:
        screen.say(f"The second process ended with exit code {second.returncode}.", "red")
        return 1
    after = asyncio.run(_look(work))

    screen.say()
    screen.say("3  What the store and the effect files say", "bold")
    return _tell(keys, before, after, time.monotonic() - began, screen)


def _started(mailboxes: list[Path], work: Path, think: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(inbox_triage.__file__)), "--work", str(work)]
    command += ["--think", str(think), "--", *map(str, mailboxes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")


def _follow(process: subprocess.Popen[str], total: int, screen: Screen) -> Iterator[int]:
    """Show what the process prints and yield how many messages are done; kill it if nobody listens."""
    assert process.stdout is not None
    try:
        with screen.counting("   triage", total) as count:
            for line in process.stdout:
                found = LINE.match(line)
                if found:
                    count(int(found[1]))
                screen.say("   " + line.rstrip(), STYLES.get(found[2], "red") if found else "cyan")
                if found:
                    yield int(found[1])
    except KeyboardInterrupt:
        process.kill()
        raise


async def _look(work: Path) -> Snapshot:
    """Open the store without the triage's code, so that nothing moves, and read everything."""
    async with flowstead.open_runtime(work / "flows.db") as runtime:
        flows = runtime.tasks.flow.bind_session(session_key=inbox_triage.OWNER)
        [flow] = await flows.list(controller_id=inbox_triage.CONTROLLER)
        tasks = await flows.list_tasks(flow.flow_id)
        events: list[flowstead.Event] = []
        while page := await flows.history(flow.flow_id, after_seq=len(events)):
            events.extend(page)
    effects: Counter[str] = Counter()
    for name in inbox_triage.OUTBOXES.values():
        effects.update(json.loads(line)["key"] for line in _lines(work / name))
    triaged = {task.input_json: task for task in tasks if task.task == "triage"}
    return Snapshot(flow, triaged, events, effects, len(_lines(work / inbox_triage.DIGEST)))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _tell(keys: list[str], before: Snapshot, after: Snapshot, took: float, screen: Screen) -> int:
    answered = [key for key in keys if key in before.tasks and before.ends(before.tasks[key])]
    running = [key for key in keys if key in before.tasks and before.tasks[key].status == "running"]
    untouched = len(keys) - len(answered) - len(running)
    posted = sum(before.effects[key] for key in running)
    lost = [key for key in keys if not after.effects[key]]
    twice = [key for key, count in after.effects.items() if count > 1]

    problems = list(_problems(keys, answered, running, before, after))
    if lost or twice or after.digests != 1:
        problems.append(f"effects: {len(lost)} lost, {len(twice)} twice, {after.digests} digests")

    def fact(count: int | str, what: str) -> None:
        screen.say(f"   {count:>6}  {what}")

    fact(
        len(answered),
        "ran before the kill; after it they answered from the record, run once in all",
    )
    fact(len(running), "were cut off in the middle and started again as attempt 2")
    fact(posted, "of these had posted already; their key kept them from posting twice")
    fact(untouched, "had not begun; they ran once, after the restart")
    fact(len(after.events), "events in the history, without a gap")
    fact(after.flow.revision, f"is the final revision; the flow {after.flow.status}")
    fact(f"{took:.1f}", "seconds in all")
    screen.say()
    for problem in problems:
        screen.say(f"   wrong: {problem}", "bold red")
    style = "bold red" if problems else "bold green"
    verdict = f"{len(lost)} lost · {len(twice)} done twice"
    screen.say(
        f"   {sum(after.effects.values())} effects for {len(keys)} messages: {verdict}", style
    )
    return 1 if problems else 0


def _problems(
    keys: list[str], answered: list[str], running: list[str], before: Snapshot, after: Snapshot
) -> Iterator[str]:
    """Everything that is not as it was promised."""
    if after.flow.status != "succeeded":
        yield f"the flow is {after.flow.status}"
    if set(after.tasks) != set(keys):
        yield f"{len(after.tasks)} children for {len(keys)} messages"
    if [event.seq for event in after.events] != list(range(1, len(after.events) + 1)):
        yield "the history has a gap"
    if after.events[: len(before.events)] != before.events:
        yield "the history from before the kill was changed"
    for key, task in after.tasks.items():
        attempts = 2 if key in running else 1
        if task.status != "succeeded" or after.ends(task) != 1:
            yield f"{task.run_id} is {task.status} and ended {after.ends(task)} times"
        if not attempts == task.attempt == after.starts(task):
            yield f"{task.run_id} was started {after.starts(task)} times, not {attempts}"
        if key in answered and task != before.tasks[key]:
            yield f"{task.run_id} had ended before the kill, and changed after it"


if __name__ == "__main__":
    sys.exit(run(default_mailboxes(), Screen()))
