"""Triage a mailbox: business mail is posted to Slack and the flow waits for your reply, personal mail is told at
once, and the rest comes in one message at the end of the day.

    python examples/inbox_triage.py [MAILBOX ...] [--store PATH] [--work DIR] [--reply TEXT]
    python examples/inbox_triage.py --demo          kill -9 half way, kill -9 while it waits, count

A mailbox is an mbox file, a Maildir, or a folder of .eml or .txt messages. Stop it however you like and run it
again: what was triaged answers from the record, what was told is not told again, and it still waits for the reply.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import flowstead
from mailboxes import classify, default_mailboxes, open_mailboxes, parse
from screen import Screen

CONTROLLER = "examples/inbox-triage"
OWNER = "agent:main:main"
OUTBOXES = {
    "business": "slack.jsonl",
    "personal": "notify.jsonl",
    "later": "end_of_day.jsonl",
    "owner": "owner.jsonl",
}
DAY = 24 * 3600.0
SOON = 15_000  # ms
ENDED = {"flow.succeeded", "flow.failed", "flow.cancelled"}

Mail = Mapping[str, Callable[[], bytes]]


# ---- the flow -------------------------------------------------------------------------------------


def make_registry(mail: Mail, think: float) -> flowstead.Registry:
    """The code of the triage. What goes on record are message keys and routes, never what a message says."""
    registry = flowstead.Registry()

    @registry.task(timeout=60)
    async def triage(ctx: flowstead.TaskContext, key: str) -> dict[str, str]:
        if key not in mail:
            return {"route": "gone", "why": "no longer in the mailbox"}
        await asyncio.sleep(think * (0.5 + int(key[:4], 16) / 0xFFFF))  # a model would think here
        route, why = classify(parse(mail[key]()))
        return {"route": route, "why": why}

    @registry.controller(CONTROLLER)
    async def inbox_triage(flow: flowstead.FlowContext) -> None:
        keys = flow.state_json["messages"]
        # All are on record; as many run at once as Limits.running_children says.
        steps = {await flow.start(triage, key, name=f"triage {key}"): key for key in keys}
        routes = {}
        async for step in flow.as_completed(steps):
            key = steps[step]
            routes[key] = route = (await step.result())["route"]
            # A step happens once for each name, so the name says which message it is about.
            told, name = {"key": key, "route": route}, f"tell {key}"
            if route == "later":
                await flow.later("It can wait.", told, bucket="end of day", name=name)
            elif route != "gone":
                await flow.notify(f"New {route} mail.", told, name=name)

        business = [key for key in keys if routes[key] == "business"]
        state = {
            "messages": keys,
            "businessThreads": business,
            "personalItems": [key for key in keys if routes[key] == "personal"],
            "eodSummary": [key for key in keys if routes[key] == "later"],
        }
        if business:
            await flow.update(current_step="await_business_reply", state_json=state)
            # It may take a week. Meanwhile the flow is a row in the file: nothing of it is in memory.
            state["reply"] = await flow.wait(
                "business reply",
                kind="reply",
                channel="slack",
                threadKey=f"slack:{business[0]}",
                prompt=f"{len(business)} business messages are on Slack. What shall be answered?",
                timeout=7 * DAY,
                on_timeout="resume",  # with None: nobody cared to answer
                remind=[DAY],
            )
        await flow.finish(current_step="done", state_json=state)

    return registry


# ---- what the world is told -----------------------------------------------------------------------


class Outbox:
    """A file standing in for a service that is told things: one line for each update, none twice.

    An update is sent at least once: a crash between the sending and its record makes the runtime send it again. So
    each carries a key, and a key that is there already is not written again. This is the receiver's half of
    "exactly once", and the pattern to copy. Nothing awaits between looking and writing.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        posted = path.read_bytes()
        whole = posted[: posted.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))  # half a line was never acknowledged
        self._keys = {json.loads(line)["key"] for line in whole.splitlines()}

    def post(self, key: str, **what: object) -> None:
        if key in self._keys:
            return
        os.write(self._file, json.dumps({"key": key, **what}).encode() + b"\n")
        os.fsync(self._file)
        self._keys.add(key)


class FileChannel:
    """The notifier: `send` is all it takes to be one. Returning says that the update was taken."""

    def __init__(self, work: Path, mail: Mail) -> None:
        self._outboxes = {route: Outbox(work / name) for route, name in OUTBOXES.items()}
        self._mail = mail

    async def send(self, update: flowstead.Update) -> None:
        key = update.idempotency_key
        if update.kind == "notice":
            about = self._about(update.data["key"])
            self._outboxes[update.data["route"]].post(key, **about)
        elif update.kind == "digest":
            items = [self._about(item["data"]["key"]) for item in update.items]
            self._outboxes["later"].post(key, text=update.text, items=items)
        else:  # the flow has ended, or nobody has replied yet
            self._outboxes["owner"].post(key, kind=update.kind, text=update.text)

    def _about(self, key: str) -> dict[str, str]:
        """What people want to see of a message: read from the mailbox, because it is not on record."""
        if key not in self._mail:
            return {"message": key}
        message = parse(self._mail[key]())
        return {"message": key, "sender": message.sender, "subject": message.subject}


class DigestAt(flowstead.DigestTime, frozen=True, kw_only=True):
    """The end of the day at an instant of one's choice (epoch ms), and every second after it."""

    first: int

    def next_after(self, now_ms: int) -> int:
        return max(self.first, (now_ms // 1000 + 1) * 1000)


# ---- one run of the program -----------------------------------------------------------------------


async def run(mailboxes: list[Path], given: argparse.Namespace, screen: Screen) -> int:
    started_at = _now()
    digest_time = None if given.digest_at is None else DigestAt(first=given.digest_at)
    all_ended_well = True
    with open_mailboxes(mailboxes) as mail:
        async with flowstead.open_runtime(
            given.store or given.work / "flows.db",
            registry=make_registry(mail, given.think),
            notifier=FileChannel(given.work, mail),
            digest_time=digest_time,
            # What may wait for a week need not stay in memory for long.
            limits=flowstead.Limits(park_seconds=0.5),
        ) as runtime:
            flows = runtime.tasks.flow.bind_session(
                session_key=OWNER, requester_origin={"channel": "slack"}
            )
            for flow in await flows_to_follow(flows, list(mail)):
                screen.say(f"flow {flow.flow_id}", "bold")
                await show_triage(flows, flow, mail, started_at, screen)
                if await see_to_reply(flows, flow, given.reply, screen):
                    ended = await flows.result(flow.flow_id)
                    all_ended_well &= show_end(ended, given.work, screen)
            await see_to_updates(flows, screen)
    return 0 if all_ended_well else 1


async def flows_to_follow(
    flows: flowstead.SessionFlows, messages: list[str]
) -> list[flowstead.Flow]:
    """New mail makes a new flow. Those that have not ended are followed, or else the newest."""
    found = await flows.list(controller_id=CONTROLLER, limit=10_000)
    known = {key for flow in found for key in flow.state_json["messages"]}
    new = [key for key in messages if key not in known]
    if new or not found:
        flow = await flows.create_managed(
            controller_id=CONTROLLER,
            goal=f"triage {len(new)} messages",
            current_step="classify",
            idempotency_key=hashlib.sha256("".join(new).encode()).hexdigest(),
            state_json={"messages": new},
        )
        found.insert(0, flow)
    return [flow for flow in reversed(found) if flow.ended_at is None] or found[:1]


async def show_triage(
    flows: flowstead.SessionFlows, flow: flowstead.Flow, mail: Mail, started_at: int, screen: Screen
) -> None:
    """Follow the flow's history until it waits or has ended, one line for each message triaged now."""
    total = len(flow.state_json["messages"])
    triaged = [task for task in await flows.list_tasks(flow.flow_id) if task.task == "triage"]
    done = sum((task.ended_at or started_at) < started_at for task in triaged)
    if done:
        screen.say(f"{done} of {total} answer from the record", "cyan")
    with screen.counting("triage", total) as count:
        count(done)
        async with flows.watch(flow.flow_id, after_seq=0) as events:
            async for event in events:
                if event.type in {*ENDED, "flow.waiting"}:
                    break
                if event.type != "task.ended" or event.task_id is None or event.at < started_at:
                    continue
                task = await flows.get_task(event.task_id)
                if task is not None and task.task == "triage":
                    done += 1
                    count(done)
                    about = parse(mail[task.input_json]()).about if task.input_json in mail else ""
                    answer = task.result_json or {"route": task.status, "why": "no result"}
                    screen.say_mail(done, total, answer["route"], about, answer["why"])


async def see_to_reply(
    flows: flowstead.SessionFlows, flow: flowstead.Flow, reply: str | None, screen: Screen
) -> bool:
    """Answer what the flow waits for; False if nobody is there to say what."""
    for wait in await flows.list_waits(flow.flow_id):
        text = reply or await screen.ask(wait.prompt or "")
        if text is None:
            screen.say(f"It waits until {_clock(wait.deadline_at)} for a reply: {wait.prompt}")
            screen.say("Run it again to answer, at a terminal or with --reply TEXT.", "bold")
            return False
        # By its id a signal counts once, however often it is sent.
        id = f"terminal:{wait.task_id}"
        report = await flows.signal(key=wait.key, payload={"text": text}, id=id)
        screen.say(f"your reply: {report.reason}", "cyan")
    return True


async def see_to_updates(flows: flowstead.SessionFlows, screen: Screen) -> None:
    """Stay until all is told that is due soon. The rest is in the file, for whoever has it open then."""
    while updates := await flows.list_updates(status="pending", limit=100_000):
        due_at = min(update.due_at or 0 for update in updates)
        if due_at > _now() + SOON:
            screen.say(f"{len(updates)} to be told at {_clock(due_at)}; run it again then.", "bold")
            return
        await asyncio.sleep(0.05)


def show_end(flow: flowstead.Flow, work: Path, screen: Screen) -> bool:
    """How it ended, and whether well."""
    if flow.status != "succeeded":
        screen.say(f"{flow.status}: {flow.failure.message if flow.failure else ''}", "red")
        return False
    state = flow.state_json
    screen.say(
        f"{len(state['businessThreads']):4} business   posted in {work / OUTBOXES['business']}"
    )
    screen.say(f"{len(state['personalItems']):4} personal   told in {work / OUTBOXES['personal']}")
    screen.say(f"{len(state['eodSummary']):4} later      for {work / OUTBOXES['later']}")
    screen.say(f"{flow.status} at revision {flow.revision}, step {flow.current_step}", "bold")
    return True


def _now() -> int:
    return time.time_ns() // 1_000_000


def _clock(at: int | None) -> str:
    return "whenever" if at is None else f"{datetime.fromtimestamp(at / 1000):%Y-%m-%d %H:%M}"


def main() -> int:
    asked = argparse.ArgumentParser(description="Triage a mailbox, durably.")
    option = asked.add_argument
    option("mailbox", nargs="*", type=Path, help="default: the examples' own mail")
    option("--store", type=Path, help="default: flows.db in the work folder")
    option("--work", type=Path, default=Path("inbox-triage"), help="where the outboxes are")
    option("--reply", metavar="TEXT", help="answers the flow; else you are asked at the terminal")
    option("--digest-in", type=float, metavar="SECONDS", help="instead of 18:00 UTC")
    option("--digest-at", type=int, metavar="MS", help="the same as an instant, epoch ms")
    option("--think", type=float, default=0.0, metavar="SECONDS", help="for each message")
    option("--demo", action="store_true", help="kill -9 half way and while it waits, count")
    given = asked.parse_args()
    mailboxes = given.mailbox or default_mailboxes()
    if missing := [str(path) for path in mailboxes if not path.exists()]:
        asked.error(f"no such mailbox: {', '.join(missing)}")
    screen = Screen()
    if given.demo:
        import demo_crash

        return demo_crash.run(mailboxes, screen)
    if given.digest_in is not None:
        given.digest_at = _now() + round(given.digest_in * 1000)
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        return asyncio.run(run(mailboxes, given, screen))
    except flowstead.StoreError as error:
        screen.say(str(error), "red")
    except KeyboardInterrupt:
        screen.say("Stopped. Run it again to go on, or to answer.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
