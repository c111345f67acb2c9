"""The triage in processes of its own: one is killed half way, one while it waits for the reply, one ends it.

What is claimed at the end is read from the store and from the outboxes, not from what the processes said.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flowstead
import inbox_triage
from mailboxes import classify, default_mailboxes, open_mailboxes, parse
from screen import STYLES, Screen

LINE = re.compile(r"\[ *(\d+)/\d+\] (\w+)")
DONE = re.compile(r"\[? *(\d+)(/| of )\d")
SECONDS_OF_THINKING = 3.0
SECONDS_TO_THE_DIGEST = 9.0
CANNED_REPLY = "Yes to all of it, on Thursday."


class Snapshot(NamedTuple):
    """The store and the outboxes at one instant."""

    flow: flowstead.Flow
    tasks: dict[str, flowstead.Task]
    waits: list[flowstead.OpenWait]
    updates: list[flowstead.Update]
    events: list[flowstead.Event]
    lines: dict[str, list[dict[str, Any]]]

    def starts(self, task: flowstead.Task) -> int:
        return self._count("task.started", task)

    def ends(self, task: flowstead.Task) -> int:
        return self._count("task.ended", task)

    def _count(self, kind: str, task: flowstead.Task) -> int:
        return sum(e.type == kind and e.task_id == task.task_id for e in self.events)

    def sent_unrecorded(self) -> set[str]:
        """The keys of updates that are in an outbox, and not on record as delivered."""
        keys = {line["key"] for lines in self.lines.values() for line in lines}
        return keys - {u.idempotency_key for u in self.updates if u.status == "delivered"}

    def told(self, *routes: str) -> Counter[str]:
        """The messages in these outboxes, each as often as it is there."""
        lines = [line for route in routes for line in self.lines[route]]
        return Counter(item["message"] for line in lines for item in line.get("items", [line]))


def run(mailboxes: list[Path], screen: Screen) -> int:
    """The whole demo; answers the exit code."""
    with open_mailboxes(mailboxes) as mail:
        routes = {key: classify(parse(read()))[0] for key, read in mail.items()}
    if len(routes) < 2 or "business" not in routes.values():
        screen.say("The demo needs two messages at least, one of them business mail.", "red")
        return 1
    with tempfile.TemporaryDirectory(prefix="flowstead-demo-") as folder:
        try:
            return Demo(mailboxes, list(routes), Path(folder), screen).play()
        except EndedEarly as error:
            screen.say(str(error), "bold red")
        except KeyboardInterrupt:
            screen.say("Stopped.")
    return 1


class EndedEarly(Exception):
    """A process did not do its part."""


class Demo:
    """One performance, in a folder of its own."""

    def __init__(self, mailboxes: list[Path], keys: list[str], work: Path, screen: Screen) -> None:
        self._mailboxes, self._keys, self._work, self._screen = mailboxes, keys, work, screen
        self._began = time.time()

    def play(self) -> int:
        say, half = self._screen.say, len(self._keys) // 2

        say(f"1  Triage {len(self._keys)} messages, 8 at once, in a process of its own", "bold")
        with self._started() as first:
            for line in self._shown(first):
                if (found := LINE.match(line)) and int(found[1]) >= half:
                    break
            self._kill(first)
        before = asyncio.run(self._look())

        say()
        say("2  Start it again on the same file; kill it again where it waits for a person", "bold")
        # A terminal of its own, at which nobody answers.
        keyboard, terminal = os.openpty()
        with self._started(stdin=terminal) as second:
            for line in self._shown(second):
                if line.startswith("? "):
                    break
            self._until_parked(second)
            self._kill(second)
        os.close(keyboard)
        os.close(terminal)
        waiting = asyncio.run(self._look())

        say()
        say("3  No process is there, but the question is: it is in the file", "bold")
        reply = asyncio.run(self._asked(waiting))
        with self._started("--reply", reply) as third:
            for _ in self._shown(third):
                pass
            if third.wait() != 0:
                raise EndedEarly(f"The third process ended with exit code {third.returncode}.")
        after = asyncio.run(self._look())

        say()
        say("4  What the store and the outboxes say", "bold")
        return self._tell(before, waiting, after, reply)

    # ---- processes --------------------------------------------------------------------------------

    @contextmanager
    def _started(
        self, *more: str, stdin: int = subprocess.DEVNULL
    ) -> Iterator[subprocess.Popen[str]]:
        think = min(1.0, SECONDS_OF_THINKING * 8 / len(self._keys))
        digest_at = round((self._began + SECONDS_TO_THE_DIGEST) * 1000)
        command = [sys.executable, str(Path(inbox_triage.__file__)), "--work", str(self._work)]
        command += ["--think", str(think), "--digest-at", str(digest_at), *more]
        command += ["--", *map(str, self._mailboxes)]
        with subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # one that asks would never end by itself

    def _shown(self, process: subprocess.Popen[str]) -> Iterator[str]:
        """Show what the process prints, and yield it line by line."""
        assert process.stdout is not None
        with self._screen.counting("   triage", len(self._keys)) as count:
            for line in process.stdout:
                if done := DONE.match(line):
                    count(int(done[1]))
                found = LINE.match(line)
                style = STYLES.get(found[2], "red") if found else "cyan"
                self._screen.say("   " + line.rstrip(), style)
                yield line

    def _until_parked(self, process: subprocess.Popen[str]) -> None:
        """Wait until nothing of the flow is in memory. Other programs may read the file, so this one does."""
        parked = "SELECT count(*) FROM v_history WHERE type = 'flow.parked'"
        address = f"{(self._work / 'flows.db').as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as reader:
            while process.poll() is None and reader.execute(parked).fetchone() == (0,):
                time.sleep(0.02)

    def _kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL: no handler runs, no `finally`, nothing is flushed."""
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise EndedEarly(f"The process ended by itself ({process.returncode}) before the kill.")
        self._screen.say(f"   kill -9 {process.pid}", "bold red")

    async def _asked(self, waiting: Snapshot) -> str:
        if len(waiting.waits) != 1:
            raise EndedEarly(f"{len(waiting.waits)} open questions in the file, instead of one.")
        question = waiting.waits[0].prompt or ""
        if reply := await self._screen.ask(question):
            return reply
        self._screen.say(f"   ? {question}  {CANNED_REPLY}", "bold yellow")
        return CANNED_REPLY

    # ---- the count --------------------------------------------------------------------------------

    async def _look(self) -> Snapshot:
        """Open the store without code and without a notifier, so that nothing moves, and read everything."""
        async with flowstead.open_runtime(self._work / "flows.db") as runtime:
            flows = runtime.tasks.flow.bind_session(session_key=inbox_triage.OWNER)
            [flow] = await flows.list(controller_id=inbox_triage.CONTROLLER)
            tasks = await flows.list_tasks(flow.flow_id)
            waits = await flows.list_waits(flow.flow_id)
            updates = await flows.list_updates(limit=100_000)
            events: list[flowstead.Event] = []
            while page := await flows.history(flow.flow_id, after_seq=len(events)):
                events.extend(page)
        lines = {
            route: [json.loads(line) for line in (self._work / name).read_text().splitlines()]
            for route, name in inbox_triage.OUTBOXES.items()
        }
        triaged = {task.input_json: task for task in tasks if task.task == "triage"}
        return Snapshot(flow, triaged, waits, updates, events, lines)

    def _tell(self, before: Snapshot, waiting: Snapshot, after: Snapshot, reply: str) -> int:
        keys, say = self._keys, self._screen.say
        answered = [key for key in keys if key in before.tasks and before.ends(before.tasks[key])]
        running = [
            key for key in keys if key in before.tasks and before.tasks[key].status == "running"
        ]
        told = after.told("business", "personal", "later")
        ends = [line for line in after.lines["owner"] if line["kind"] == "done"]
        state = after.flow.state_json
        problems = [
            *_problems_with_triage(keys, answered, running, before, after),
            *_problems_with_waiting(waiting, after, reply),
            *_problems_with_updates(before, waiting, after),
        ]

        def fact(count: int | str, what: str) -> None:
            say(f"   {count:>6}  {what}")

        fact(len(answered), "were triaged before the first kill; they answered from the record")
        fact(len(running), "were cut off in the middle and started again as attempt 2")
        fact(len(keys) - len(answered) - len(running), "had not begun; they ran once, later")
        fact(after.told("business").total(), "business messages, posted to Slack")
        fact(after.told("personal").total(), "personal messages, told at once")
        digests = len(after.lines["later"])
        fact(after.told("later").total(), f"for later, in {digests} message at the end of the day")
        fact(
            len(before.sent_unrecorded() | waiting.sent_unrecorded()),
            "were told before a kill and sent again after it: known by their key",
        )
        fact(len(waiting.waits), "question outlived its process, and was answered in the next one:")
        say(f"           {state.get('reply')}")
        fact(len(ends), "message that the flow is done")
        fact(len(after.events), "events in the history, without a gap")
        fact(after.flow.revision, f"is the final revision; the flow {after.flow.status}")
        fact(f"{time.time() - self._began:.1f}", "seconds in all")
        say()
        for problem in problems:
            say(f"   wrong: {problem}", "bold red")
        lost = sum(key not in told for key in keys)
        twice = sum(count > 1 for count in told.values())
        say(
            f"   {told.total()} effects for {len(keys)} messages: {lost} lost · {twice} done twice",
            "bold red" if problems else "bold green",
        )
        return 1 if problems else 0


def _problems_with_triage(
    keys: list[str], answered: list[str], running: list[str], before: Snapshot, after: Snapshot
) -> Iterator[str]:
    """Everything that is not as it was promised of the children."""
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


def _problems_with_waiting(waiting: Snapshot, after: Snapshot, reply: str) -> Iterator[str]:
    """And of the question."""
    if (waiting.flow.status, waiting.events[-1].type) != ("waiting", "flow.parked"):
        yield f"at the second kill the flow was {waiting.flow.status}, {waiting.events[-1].type}"
    if after.events[: len(waiting.events)] != waiting.events:
        yield "the history from before the second kill was changed"
    if after.flow.status != "succeeded" or after.waits:
        yield f"the flow is {after.flow.status}, with {len(after.waits)} open waits"
    if after.flow.state_json.get("reply") != {"text": reply}:
        yield f"the reply on record is {after.flow.state_json.get('reply')}"


def _problems_with_updates(before: Snapshot, waiting: Snapshot, after: Snapshot) -> Iterator[str]:
    """And of what the world was told: by what is in the state, and by what was to be sent."""
    state = after.flow.state_json
    routes = {"business": "businessThreads", "personal": "personalItems", "later": "eodSummary"}
    for route, field in routes.items():
        if after.told(route) != Counter(state[field]):
            yield f"{after.told(route).total()} told of {len(state[field])} {route} messages"
    if len(after.lines["later"]) != bool(state["eodSummary"]):
        yield f"{len(after.lines['later'])} digests"
    for name, count in (("outbox", len(after.lines["owner"])), ("store", _ends(after))):
        if count != 1:
            yield f"{count} terminal updates in the {name}"
    sent = {update.idempotency_key for update in after.updates if update.status == "delivered"}
    lines = [line["key"] for route in after.lines.values() for line in route]
    if len(lines) != len(sent) or set(lines) != sent:
        yield f"{len(lines)} lines in the outboxes for {len(sent)} updates"
    if pending := sum(update.status == "pending" for update in after.updates):
        yield f"{pending} updates are still to be sent"
    if _ends(before) + _ends(waiting):
        yield "the end was told before it came"


def _ends(snapshot: Snapshot) -> int:
    return sum(update.kind == "done" for update in snapshot.updates)


if __name__ == "__main__":
    sys.exit(run(default_mailboxes(), Screen()))
