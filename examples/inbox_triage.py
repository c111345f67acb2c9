"""Triage a mailbox: business mail is posted to a channel, personal mail told at once, the rest kept for later.

    python examples/inbox_triage.py [MAILBOX ...] [--store PATH] [--work DIR]
    python examples/inbox_triage.py --demo          kill -9 half way, start again, count

A mailbox is an mbox file, a Maildir, or a folder of .eml or .txt messages. Stop it however you like and run it
again: messages that were triaged answer from the record.
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
from pathlib import Path

import flowstead
from mailboxes import classify, default_mailboxes, open_mailboxes, parse
from screen import Screen

CONTROLLER = "examples/inbox-triage"
OWNER = "agent:main:main"
OUTBOXES = {"business": "slack.jsonl", "personal": "notify.jsonl", "later": "end_of_day.jsonl"}
DIGEST = "digest.jsonl"
ENDED = {"flow.succeeded", "flow.failed", "flow.cancelled"}


class Outbox:
    """A file standing in for a service that is told things: one line for each effect, none twice.

    Effects happen at least once: a crash between an effect and its record makes the runtime run the step again.
    So each effect carries a key, and a key that is there already is not posted again. This is the pattern to
    copy; a real service takes the key as its idempotency key. Nothing awaits between looking and posting.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        posted = path.read_bytes()
        whole = posted[: posted.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))  # half a line is no effect
        self._keys = {json.loads(line)["key"] for line in whole.splitlines()}

    def post(self, key: str, **what: object) -> None:
        if key in self._keys:
            return
        os.write(self._file, json.dumps({"key": key, **what}).encode() + b"\n")
        os.fsync(self._file)
        self._keys.add(key)


def make_registry(
    mail: Mapping[str, Callable[[], bytes]], work: Path, think: float
) -> flowstead.Registry:
    """The code of the triage. What goes on record are message keys and routes, never what a message says."""
    registry = flowstead.Registry()
    outboxes = {route: Outbox(work / name) for route, name in OUTBOXES.items()}
    digests = Outbox(work / DIGEST)

    @registry.task(timeout=60)
    async def triage(ctx: flowstead.TaskContext, key: str) -> dict[str, str]:
        if key not in mail:
            return {"route": "gone", "why": "no longer in the mailbox"}
        message = parse(mail[key]())
        pause = think * (0.5 + int(key[:4], 16) / 0xFFFF) / 2
        await asyncio.sleep(pause)  # a model would think here
        route, why = classify(message)
        outboxes[route].post(key, sender=message.sender, subject=message.subject, why=why)
        await asyncio.sleep(pause)  # the message would be filed here
        return {"route": route, "why": why}

    @registry.controller(CONTROLLER)
    async def inbox_triage(flow: flowstead.FlowContext) -> None:
        keys = flow.state_json["messages"]
        answers = await flow.map(triage, keys, limit=8)

        routed: dict[str, list[str]] = {route: [] for route in (*OUTBOXES, "gone")}
        for key, answer in zip(keys, answers, strict=True):
            routed[answer["route"]].append(key)
        state = {
            "messages": keys,
            "businessThreads": routed["business"],
            "personalItems": routed["personal"],
            "eodSummary": routed["later"],
        }
        await flow.update(current_step="summarize", state_json=state)

        counts = {route: len(found) for route, found in routed.items() if found}

        async def post_digest() -> dict[str, int]:
            digests.post(flow.flow_id, **counts)
            return counts

        await flow.once("post digest", post_digest)
        waits_for = [f"slack:{key}" for key in routed["business"]]
        await flow.update(
            current_step="await_business_reply" if waits_for else "done",
            state_json={**state, "awaitingReplyOn": waits_for},
        )

    return registry


async def run(mailboxes: list[Path], store: Path, work: Path, think: float, screen: Screen) -> int:
    started_at = time.time_ns() // 1_000_000
    with open_mailboxes(mailboxes) as mail:
        registry = make_registry(mail, work, think)
        async with flowstead.open_runtime(store, registry=registry) as runtime:
            flows = runtime.tasks.flow.bind_session(
                session_key=OWNER, requester_origin={"channel": "slack"}
            )
            # The same mail is the same flow: a second run finds the first one's, ended or not.
            flow = await flows.create_managed(
                controller_id=CONTROLLER,
                goal=f"triage {len(mail)} messages",
                idempotency_key=hashlib.sha256("".join(mail).encode()).hexdigest(),
                state_json={"messages": list(mail)},
            )
            screen.say(f"flow {flow.flow_id}", "bold")
            await show_progress(flows, flow, mail, started_at, screen)
            flow = await flows.result(flow.flow_id)
    if flow.status != "succeeded":
        screen.say(f"{flow.status}: {flow.failure.message if flow.failure else ''}", "red")
        return 1
    state = flow.state_json
    screen.say(
        f"{len(state['businessThreads']):4} business   posted in {work / OUTBOXES['business']}"
    )
    screen.say(f"{len(state['personalItems']):4} personal   told in {work / OUTBOXES['personal']}")
    screen.say(f"{len(state['eodSummary']):4} later      kept in {work / OUTBOXES['later']}")
    screen.say(f"{flow.status} at revision {flow.revision}, step {flow.current_step}", "bold")
    return 0


async def show_progress(
    flows: flowstead.SessionFlows,
    flow: flowstead.Flow,
    mail: Mapping[str, Callable[[], bytes]],
    started_at: int,
    screen: Screen,
) -> None:
    """Follow the flow's history to its end, one line for each message triaged now."""
    total = len(flow.state_json["messages"])
    triaged = [task for task in await flows.list_tasks(flow.flow_id) if task.task == "triage"]
    done = sum((task.ended_at or started_at) < started_at for task in triaged)
    if done:
        screen.say(f"{done} of {total} answer from the record", "cyan")
    with screen.counting("triage", total) as count:
        count(done)
        async with flows.watch(flow.flow_id, after_seq=0) as events:
            async for event in events:
                if event.type in ENDED:
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


def main() -> int:
    asked = argparse.ArgumentParser(description="Triage a mailbox, durably.")
    asked.add_argument("mailbox", nargs="*", type=Path, help="default: the examples' own mail")
    asked.add_argument("--store", type=Path, help="default: flows.db in the work folder")
    asked.add_argument("--work", type=Path, default=Path("inbox-triage"), help="where effects go")
    asked.add_argument(
        "--think", type=float, default=0.0, metavar="SECONDS", help="for each message"
    )
    asked.add_argument("--demo", action="store_true", help="kill -9 half way, start again, count")
    given = asked.parse_args()
    mailboxes = given.mailbox or default_mailboxes()
    if missing := [str(path) for path in mailboxes if not path.exists()]:
        asked.error(f"no such mailbox: {', '.join(missing)}")
    screen = Screen()
    if given.demo:
        import demo_crash

        return demo_crash.run(mailboxes, screen)
    given.work.mkdir(parents=True, exist_ok=True)
    store = given.store or given.work / "flows.db"
    try:
        return asyncio.run(run(mailboxes, store, given.work, given.think, screen))
    except flowstead.StoreError as error:
        screen.say(str(error), "red")
    except KeyboardInterrupt:
        screen.say("stopped; run it again to go on")
    return 1


if __name__ == "__main__":
    sys.exit(main())
