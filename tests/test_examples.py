"""The examples and the README are run as their readers run them: as programs, in an empty folder."""

from __future__ import annotations

import hashlib
import json
import mailbox
import os
import re
import runpy
import signal
import sqlite3
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flowstead import Flow, Runtime
from flowstead.testing import Simulation, explore, offline
from tests import invariants

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PATTERN = EXAMPLES / "patterns"
PATTERNS = sorted(PATTERN.glob("*.py"))
INBOX = EXAMPLES / "inbox.mbox"
README = ROOT / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
TRIAGE = EXAMPLES / "inbox_triage.py"
BOXES = ("slack", "notify", "end_of_day", "owner")
QUESTION = "What shall be answered?"
NEVER = str(4_118_000_000_000)  # a digest time long after any test

# How many commits a process that runs a pattern is left to live for, where it is killed again and again.
COMMITS_OF_A_LIFE = {
    "content_pipeline": 4,
    "fallback_editor": 4,
    "orchestrator": 25,
    "research_fan_out": 6,
    "support_router": 4,
}
DOOMED = """
import os, runpy, signal, sys
from flowstead.store.sqlite import SqliteStore

commit, left = SqliteStore.commit, int(sys.argv[2])


async def commit_and_die(store, writes):
    global left
    left -= 1
    if left == 0 and sys.argv[3] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    answer = await commit(store, writes)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer


SqliteStore.commit = commit_and_die
runpy.run_path(sys.argv[1], run_name="__main__")
"""

# Give a program a terminal of its own; what is written to this process is typed there.
AT_A_TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
# The triage in a process that dies when it has told so many things, before the last of them is on record.
TELLS_AND_DIES = """
import os, runpy, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import inbox_triage

post, left = inbox_triage.Outbox.post, int(sys.argv.pop(2))


def post_and_die(*given, **what):
    global left
    post(*given, **what)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


inbox_triage.Outbox.post = post_and_die
del sys.argv[0]
sys.exit(inbox_triage.main())
"""

Program = Callable[..., str]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Run a program in a folder of its own and answer what it printed."""

    def run(*command: str | Path, exit_code: int = 0, also: Path | None = None) -> str:
        paths = [str(also)] if also else []
        done = subprocess.run(
            [sys.executable, "-W", "error", *map(str, command)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONIOENCODING": "utf-8",
                "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            },
            capture_output=True,
            encoding="utf-8",
            timeout=100,
        )
        assert done.returncode == exit_code, done.stdout + done.stderr
        assert exit_code or not done.stderr, done.stderr
        return done.stdout

    return run


def lines(work: Path, name: str) -> list[dict[str, Any]]:
    """What was written to an outbox of the triage."""
    return [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]


def updates(work: Path) -> list[dict[str, Any]]:
    """What the triage has on record of what it told."""
    return recorded(work / "flows.db", "v_updates")


def told(work: Path) -> list[str]:
    """The key of every message that somebody was told of, as often as it was told."""
    items = [*lines(work, "slack"), *lines(work, "notify")]
    items += [item for digest in lines(work, "end_of_day") for item in digest["items"]]
    return [item["message"] for item in items]


def test_the_ledger_example_ends_succeeded_at_revision_three(program: Program) -> None:
    assert program(EXAMPLES / "seed.py") == "succeeded 3\n"
    assert program(EXAMPLES / "seed.py") == "succeeded 3\n"


def test_the_first_steps_answer_from_the_record_when_run_again(program: Program) -> None:
    greetings = "['Hello, Ada!', 'Hello, Grace!', 'Hello, Edsger!']"

    assert program(EXAMPLES / "first_steps.py") == f"queued -> {greetings}\n"
    assert program(EXAMPLES / "first_steps.py") == f"succeeded -> {greetings}\n"


def without_numbers(text: str) -> str:
    """Step numbers are not for ever; what is said about them is."""
    return " ".join(re.sub(r"\d+", "0", text).split())


def test_the_flow_test_explores_hundreds_of_runs_and_finds_nothing(program: Program) -> None:
    told = program(EXAMPLES / "test_my_flow.py")

    assert re.fullmatch(r"\d{3} runs, \d{3} crashes, no failure\n", told)


def test_the_flow_test_without_its_key_fails_as_the_readme_shows(
    program: Program, tmp_path: Path
) -> None:
    source = (EXAMPLES / "test_my_flow.py").read_text(encoding="utf-8")
    broken = source.replace("(ctx.task_id, ", '(f"{ctx.task_id}-{ctx.attempt}", ')
    (tmp_path / "test_my_flow.py").write_text(broken, encoding="utf-8")

    told = program("-m", "pytest", "-q", "test_my_flow.py", exit_code=1)

    [shown] = re.findall(r"^```text\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
    assert broken != source
    told = without_numbers(told)
    for line in shown.splitlines():
        assert line == "  ..." or without_numbers(line) in told


@pytest.mark.parametrize("path", PATTERNS, ids=lambda path: path.stem)
def test_a_pattern_fits_on_a_page(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_every_pattern_is_run_here() -> None:
    assert {path.stem for path in PATTERNS} == set(COMMITS_OF_A_LIFE)


def written(work: Path, kind: str) -> dict[str, str]:
    """What the program has left behind in files of one kind."""
    return {path.name: path.read_text(encoding="utf-8") for path in work.glob(f"*.{kind}")}


def recorded(path: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table or a view, read as any SQLite shell would."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]


def run_again(told: str) -> str:
    """What a program says of flows that have ended before."""
    ended = re.sub(r"queued -> (succeeded|failed)\b", r"\1 -> \1", told)
    return ended.replace("queued", "succeeded")


def test_the_content_pipeline_looks_at_each_result_and_goes_on_or_ends_saying_why(
    program: Program, tmp_path: Path
) -> None:
    first = program(PATTERN / "content_pipeline.py")

    assert first.splitlines() == [
        "statistics: queued -> succeeded",
        "  research, draft, publish",
        "textwrap: queued -> succeeded",
        "  research, draft, draft again, publish",
        "perpetual_motion: queued -> failed child 'research' failed: ModuleNotFoundError:"
        " No module named 'perpetual_motion'",
        "  research",
    ]
    articles = written(tmp_path, "md")
    see_also = ", ".join(textwrap.__all__)
    assert articles == {
        "statistics.md": f"# statistics\n\n{str(statistics.__doc__).strip()}\n",
        "textwrap.md": f"# textwrap\n\n{str(textwrap.__doc__).strip()}\n\nSee also: {see_also}.\n",
    }

    for name in articles:
        (tmp_path / name).unlink()
    second = program(PATTERN / "content_pipeline.py")

    assert second == run_again(first)
    assert not written(tmp_path, "md")


def test_a_crash_before_any_step_of_the_content_pipeline_is_harmless() -> None:
    registry = runpy.run_path(str(PATTERN / "content_pipeline.py"))["registry"]
    ended: set[str] = set()
    published: set[tuple[str, ...]] = set()

    def research(topic: str) -> dict[str, Any]:
        if topic == "ghosts":
            raise LookupError(topic)
        return {"topic": topic, "about": "Buzz.", "see": ["hive"]}

    def scenario(sim: Simulation) -> None:
        out: list[tuple[str, str]] = []
        world = {
            "research": research,
            "draft": lambda notes: notes["about"],
            "publish": lambda article: out.append((article["topic"], article["text"])),
        }
        for topic in ("bees", "ghosts"):
            given: dict[str, Any] = {"state_json": topic, "idempotency_key": topic}
            flow = sim.run_flow(offline(registry, world), "content/article", **given)
            ended.add(f"{topic} {flow.status} {flow.blocked_summary}")
        assert set(out) == {("bees", "Buzz.\n\nSee also: hive.")}
        published.add(tuple(topic for topic, _ in out))

    gone = explore(scenario, seeds=0)

    assert gone.crashes >= gone.steps_crashed_at > 50
    assert ended == {
        "bees succeeded None",
        "ghosts failed child 'research' failed: LookupError: ghosts",
    }
    # Only a crash between the writing and its record has it written once more.
    assert published == {("bees",), ("bees", "bees")}


def test_the_next_editor_takes_over_and_with_none_left_nothing_goes_out(
    program: Program, tmp_path: Path
) -> None:
    first = program(PATTERN / "fallback_editor.py")

    assert [" ".join(line.split()) for line in first.splitlines()] == [
        "morning: queued -> succeeded",
        "edit succeeded house_editor, attempt 1",
        "publish succeeded publish, attempt 1",
        "noon: queued -> succeeded",
        "edit failed house_editor, attempt 2",
        "edit/fallback-1 succeeded agency, attempt 1",
        "publish succeeded publish, attempt 1",
        "night: queued -> failed unedited: child 'edit/fallback-1' failed: ConnectionError:"
        " agency does not answer",
        "edit failed house_editor, attempt 2",
        "edit/fallback-1 failed agency, attempt 1",
    ]
    text = "The boat left at six. Nobody had counted the chairs, and two were missing."
    assert written(tmp_path, "txt") == {
        "morning.txt": textwrap.fill(text, 40),
        "noon.txt": textwrap.fill(text, 72),
    }

    second = program(PATTERN / "fallback_editor.py")

    assert second == run_again(first)


def test_the_research_merges_every_package_into_one_report_and_counts_the_gaps(
    program: Program, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    install(site, "paperclip-1.0", name="paperclip", needs=["wire", "paint>1", "x; extra == 'y'"])
    install(site, "elsewhere-1.0", name="ghost", needs=[])  # listed, but not found by its name
    names = "sorted({p.metadata['Name'] for p in metadata.distributions() if p.metadata['Name']})"
    listing = f"from importlib import metadata\nprint(*{names}, sep='\\n')"
    packages = program("-c", listing, also=site).split()

    first = program(PATTERN / "research_fan_out.py", also=site)

    found = len(packages) - 1
    assert first.startswith(f"queued -> {found} packages, 1 gaps, in report.txt\n")
    report = tmp_path / "report.txt"
    rows = report.read_text(encoding="utf-8").splitlines()
    assert "paperclip: 3 files, 2 needs" in rows
    assert sorted([*(row.partition(":")[0] for row in rows), "ghost"]) == packages
    files = [int(row.split()[1]) for row in rows]
    assert files == sorted(files, reverse=True)
    ended = {row["run_id"]: row["status"] for row in recorded(tmp_path / "research.db", "v_tasks")}
    assert ended.pop("package ghost") == "failed"
    assert ended == dict.fromkeys(
        ["list", "write", *(f"package {name}" for name in packages if name != "ghost")],
        "succeeded",
    )

    report.unlink()
    second = program(PATTERN / "research_fan_out.py")

    assert second == run_again(first)
    assert not report.exists()


def install(site: Path, folder: str, *, name: str, needs: list[str]) -> None:
    """Put a package of three files where Python looks for packages."""
    info = site / f"{folder}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (site / f"{name}.py").touch()
    files = [f"{name}.py", f"{info.name}/METADATA", f"{info.name}/RECORD"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")


def test_the_router_shows_a_specialist_its_slice_of_the_ticket_only(
    program: Program, tmp_path: Path
) -> None:
    first = program(PATTERN / "support_router.py")

    assert first.splitlines() == [
        "T-1 queued -> billing ['id', 'invoices']",
        "    refund one of [42, 42]",
        "T-2 queued -> technical ['id', 'log']",
        "    found in the log: no space left",
    ]
    flows, children = (recorded(tmp_path / "support.db", table) for table in ("flows", "tasks"))
    for card in ("4111-1", "5500-0"):
        assert card in str(flows)
        assert card not in str(children)

    second = program(PATTERN / "support_router.py")

    assert second == run_again(first)


def test_the_orchestrator_accounts_for_every_item_and_merges_none_twice(
    program: Program, tmp_path: Path
) -> None:
    first = program(PATTERN / "orchestrator.py")

    # Of fifty that failed at first, 45 were tried once more, and 5 as often as it goes.
    assert first == (
        "queued -> 1000 items: 995 merged, 0 twice, failed: [0, 200, 400, 600, 800]\n"
        f"in this process: {1000 + 45 + 5 * 2} runs, at most 8 at once\n"
    )
    [flow] = recorded(tmp_path / "orchestrator.db", "v_flows")
    children = recorded(tmp_path / "orchestrator.db", "v_tasks")
    digests = {str(n): hashlib.sha256(str(n).encode()).hexdigest()[:8] for n in range(1000)}
    for failed in (0, 200, 400, 600, 800):
        del digests[str(failed)]
    assert json.loads(flow["state_json"])["merged"] == digests
    assert len(children) == 1000
    assert sum(child["attempt"] > 1 for child in children) == 50
    assert sum(child["status"] == "failed" for child in children) == 5

    second = program(PATTERN / "orchestrator.py")

    assert second == (
        "succeeded -> 1000 items: 995 merged, 0 twice, failed: [0, 200, 400, 600, 800]\n"
        "in this process: 0 runs, at most 0 at once\n"
    )


@pytest.mark.crash
@pytest.mark.parametrize("path", PATTERNS, ids=lambda path: path.stem)
def test_a_pattern_killed_again_and_again_ends_as_if_nothing_had_been(
    program: Program, tmp_path: Path, path: Path
) -> None:
    calm = program(path)
    expected = {kind: written(tmp_path, kind) for kind in ("md", "txt")}
    for file in tmp_path.iterdir():
        file.unlink()

    killed = 0
    while live(path, tmp_path, "before" if killed % 2 else "after") == -signal.SIGKILL:
        killed += 1
        [db] = tmp_path.glob("*.db")
        invariants.check_all(db)
    told = program(path)

    assert killed >= 3
    assert lasting(told) == lasting(run_again(calm))
    assert {kind: written(tmp_path, kind) for kind in ("md", "txt")} == expected


def live(path: Path, work: Path, when: str) -> int:
    """Run a pattern in a process that dies at one of its commits, and answer how it ended."""
    commits = str(COMMITS_OF_A_LIFE[path.stem])
    command = [sys.executable, "-W", "error", "-c", DOOMED, str(path), commits, when]
    done = subprocess.run(command, cwd=work, capture_output=True, timeout=100)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


def lasting(told: str) -> str:
    """What a program says, without what a crash may change: how often and in which order, in this process."""
    lines = [line for line in told.splitlines() if not line.startswith(("first in", "in this"))]
    return re.sub(r"attempt \d+", "attempt", "\n".join(lines))


def test_short_examples_stay_short() -> None:
    assert len((EXAMPLES / "first_steps.py").read_text().splitlines()) <= 25
    assert len((EXAMPLES / "seed.py").read_text().splitlines()) < 60


def test_the_triage_tells_of_each_message_and_waits_for_the_reply(
    program: Program, tmp_path: Path
) -> None:
    work = tmp_path / "work"

    first = program(TRIAGE, INBOX, "--work", "work", "--digest-at", NEVER)

    assert re.search(r"business +Framework contract: two open points", first)
    assert re.search(r"business +Angebot für sechs Schreibtische", first)
    assert re.search(r"personal +Saturday", first)
    assert re.search(r"personal +Invitation: Roadmap", first)
    assert re.search(r"later +48 hours only", first)
    assert re.search(
        rf"It waits until [-0-9: ]+ for a reply: 6 business .* {re.escape(QUESTION)}\n", first
    )
    assert "Run it again to answer" in first
    assert "5 to be told at 2100-" in first
    counts = [len(lines(work, name)) for name in BOXES]
    assert counts == [6, 5, 0, 0]
    [flow] = recorded(work / "flows.db", "v_flows")
    assert (flow["status"], flow["current_step"]) == ("waiting", "await_business_reply")

    second = program(TRIAGE, INBOX, "--work", "work", "--digest-at", NEVER)

    assert "16 of 16 answer from the record" in second
    assert second.splitlines()[0] == first.splitlines()[0]
    assert second.splitlines()[-3:] == first.splitlines()[-3:]
    assert len(told(work)) == len(set(told(work))) == 11


def test_a_reply_ends_the_triage_and_is_in_its_state_and_further_runs_do_nothing(
    program: Program, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    program(TRIAGE, INBOX, "--work", "work", "--digest-at", NEVER)

    second = program(TRIAGE, INBOX, "--work", "work", "--reply", "Yes, on Thursday.")
    third = program(TRIAGE, INBOX, "--work", "work", "--reply", "No!")

    assert "your reply: Taken." in second
    assert re.search(r"succeeded at revision \d+, step done\n5 to be told at 2100-", second)
    assert "your reply" not in third
    assert third.splitlines()[-5:] == second.splitlines()[-5:]
    [flow] = recorded(work / "flows.db", "v_flows")
    state = json.loads(flow["state_json"])
    assert state["reply"] == {"text": "Yes, on Thursday."}
    assert [line["message"] for line in lines(work, "slack")] != []
    assert {line["message"] for line in lines(work, "slack")} == set(state["businessThreads"])
    assert {line["message"] for line in lines(work, "notify")} == set(state["personalItems"])
    assert len(state["eodSummary"]) == 5
    assert [line["kind"] for line in lines(work, "owner")] == ["done"]
    assert len(told(work)) == len(set(told(work))) == 11


def test_what_can_wait_comes_in_one_message_at_the_end_of_the_day(
    program: Program, tmp_path: Path
) -> None:
    given = ["--work", "work", "--reply", "Yes.", "--digest-in", "3"]

    shown = program(TRIAGE, INBOX, *given)

    [digest] = lines(tmp_path / "work", "end_of_day")
    [flow] = recorded(tmp_path / "work" / "flows.db", "v_flows")
    items = [item["message"] for item in digest["items"]]
    assert sorted(items) == sorted(json.loads(flow["state_json"])["eodSummary"])
    assert "48 hours only: 40 % off everything" in [item["subject"] for item in digest["items"]]
    assert "to be told at" not in shown
    assert len(told(tmp_path / "work")) == len(set(told(tmp_path / "work"))) == 16


def test_what_a_message_says_is_told_and_not_on_record(program: Program, tmp_path: Path) -> None:
    program(TRIAGE, INBOX, "--work", "work", "--digest-at", NEVER)

    tables = ("flows", "tasks", "events", "updates", "signals")
    record = str([recorded(tmp_path / "work" / "flows.db", table) for table in tables])
    shown = [*lines(tmp_path / "work", "slack"), *lines(tmp_path / "work", "notify")]
    assert len(shown) == 11
    for line in shown:
        assert line["message"] in record
        assert line["subject"] not in record
        assert line["sender"] not in record


def test_new_mail_is_a_new_flow_and_old_mail_is_not_told_again(
    program: Program, tmp_path: Path
) -> None:
    program(TRIAGE, INBOX, "--work", "work", "--digest-at", NEVER)
    letter = b"From: Ada King <ada@king.example>\nSubject: Saturday?\n\nShall we walk?\n"
    (tmp_path / "letter.eml").write_bytes(letter)

    shown = program(TRIAGE, INBOX, "letter.eml", "--work", "work", "--digest-at", NEVER)

    assert "It waits until" in shown
    assert re.search(r"\[  1/1\] personal +Saturday\? +a person wrote to you", shown)
    flows = recorded(tmp_path / "work" / "flows.db", "v_flows")
    assert sorted(flow["status"] for flow in flows) == ["succeeded", "waiting"]
    assert len(told(tmp_path / "work")) == len(set(told(tmp_path / "work"))) == 12


def test_a_maildir_and_a_folder_of_files_are_mailboxes_too(
    program: Program, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    maildir = mailbox.Maildir(tmp_path / "maildir")
    with_from_lines = mailbox.mbox(INBOX, create=False)
    for number in with_from_lines.keys():  # noqa: SIM118, a mailbox iterates over messages
        maildir.add(with_from_lines.get_bytes(number))
        (folder / f"{number}.eml").write_bytes(with_from_lines.get_bytes(number))
    with_from_lines.close()
    maildir.close()

    for given in ("folder", "maildir"):
        shown = program(TRIAGE, given, "--work", given + ".out", "--digest-at", NEVER)

        assert "[ 16/16]" in shown
        assert len(told(tmp_path / f"{given}.out")) == 11, shown


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\xff\xfe" * 40,
        b"Subject: =?utf-8?q?\xff=ZZ?=\nFrom: <<<>>@\nContent-Type: text/plain; charset=none-such\n\n\xff",
        b"Content-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/calendar\n",
        b"Subject: \x1b]0;owned\x07 hello\nFrom: a@b.example\n\nhi\n",
    ],
)
def test_broken_mail_is_triaged_like_any_other(
    program: Program, tmp_path: Path, raw: bytes
) -> None:
    (tmp_path / "broken.eml").write_bytes(raw)

    shown = program(TRIAGE, "broken.eml", "--work", "work", "--digest-in", "0")

    assert "[  1/1]" in shown
    assert "\x1b" not in shown
    assert len(told(tmp_path / "work")) == 1


def test_an_empty_mailbox_is_triaged_at_once(program: Program, tmp_path: Path) -> None:
    (tmp_path / "empty.mbox").touch()

    shown = program(TRIAGE, "empty.mbox", "--work", "work")

    assert re.search(r"succeeded at revision \d+, step done\n$", shown)


def test_a_mailbox_that_is_not_there_is_named(program: Program) -> None:
    program(TRIAGE, "nowhere.mbox", exit_code=2)


def test_half_a_line_in_an_outbox_was_never_told(program: Program, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "slack.jsonl").write_text('{"key": "0123", "message": "4567"}\n{"key": "89')

    program(TRIAGE, INBOX, "--work", "work", "--digest-at", NEVER)

    assert len(lines(work, "slack")) == 7
    assert told(work).count("4567") == 1


@pytest.mark.crash
def test_what_was_told_when_the_process_died_is_sent_again_and_not_told_twice(
    tmp_path: Path, program: Program
) -> None:
    given = [str(INBOX), "--work", "work", "--reply", "Yes.", "--digest-in", "0"]
    work = tmp_path / "work"
    command = [sys.executable, "-W", "error", "-c", TELLS_AND_DIES, str(TRIAGE), "4", *given]

    sent_again = 0
    while True:
        died = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=100)
        if died.returncode == 0:
            break
        assert died.returncode == -signal.SIGKILL, died.stderr.decode()
        status = {u["idempotency_key"]: u["status"] for u in updates(work)}
        out = [line["key"] for name in BOXES for line in lines(work, name)]
        sent_again += sum(status[key] == "pending" for key in out)
        invariants.check_all(work / "flows.db")

    assert sent_again >= 3
    assert sorted(told(work)) == sorted(set(told(work)))
    assert len(told(work)) == 16
    assert [line["kind"] for line in lines(work, "owner")] == ["done"]
    delivered = [u["idempotency_key"] for u in updates(work) if u["status"] == "delivered"]
    assert sorted(delivered) == sorted(line["key"] for name in BOXES for line in lines(work, name))


class Terminal:
    """A program at a terminal of its own, at which this test sits."""

    def __init__(self, work: Path, *command: str | Path, term: str) -> None:
        self._program = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, sys.executable, *map(str, command)],
            cwd=work,
            env={**os.environ, "TERM": term, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._seen, self._read_to = b"", 0

    @property
    def shown(self) -> str:
        """Everything that has been read."""
        return self._seen.decode(errors="replace")

    def until(self, text: str) -> None:
        """Read until the program has shown this, after what was waited for before."""
        assert self._program.stdout is not None
        while (place := self._seen.find(text.encode(), self._read_to)) < 0:
            read = os.read(self._program.stdout.fileno(), 65536)
            assert read, self.shown
            self._seen += read
        self._read_to = place + len(text.encode())

    def type(self, keys: bytes) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(keys)
        self._program.stdin.flush()

    def ended(self) -> int:
        """Read to the end, and answer the exit code."""
        rest, _ = self._program.communicate(timeout=100)
        self._seen += rest
        return self._program.returncode

    def take_away(self) -> None:
        """Hang up, if the program has not ended."""
        self._program.kill()
        self._program.communicate()


@pytest.fixture
def at_a_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start a program at a terminal of its own."""
    terminals: list[Terminal] = []

    def start(*command: str | Path, term: str = "dumb") -> Terminal:
        terminals.append(Terminal(tmp_path, *command, term=term))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.take_away()


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_at_a_terminal_the_triage_asks_and_the_line_that_is_typed_is_the_reply(
    at_a_terminal: Callable[..., Terminal], tmp_path: Path, term: str
) -> None:
    given = [INBOX, "--work", "work", "--digest-at", NEVER]
    terminal = at_a_terminal(TRIAGE, *given, term=term)

    terminal.until(QUESTION)
    terminal.type("\n  Ja, für alle. \n".encode())

    assert terminal.ended() == 0, terminal.shown
    [flow] = recorded(tmp_path / "work" / "flows.db", "v_flows")
    assert flow["status"] == "succeeded"
    assert json.loads(flow["state_json"])["reply"] == {"text": "Ja, für alle."}


@pytest.mark.parametrize(("keys", "exit_code"), [(b"\x03", 1), (b"\x04", 0)], ids=["^C", "^D"])
def test_who_goes_away_from_the_question_is_asked_again_by_the_next_run(
    at_a_terminal: Callable[..., Terminal], tmp_path: Path, keys: bytes, exit_code: int
) -> None:
    given = [TRIAGE, INBOX, "--work", "work", "--digest-at", NEVER]
    terminal = at_a_terminal(*given)

    terminal.until(QUESTION)
    terminal.type(keys)

    assert terminal.ended() == exit_code, terminal.shown
    assert re.search(r"[Rr]un it again .*to answer", terminal.shown)
    [flow] = recorded(tmp_path / "work" / "flows.db", "v_flows")
    assert flow["status"] == "waiting"

    again = at_a_terminal(*given)
    again.until(QUESTION)
    again.type(b"Now, yes.\n")

    assert again.ended() == 0, again.shown
    [flow] = recorded(tmp_path / "work" / "flows.db", "v_flows")
    assert json.loads(flow["state_json"])["reply"] == {"text": "Now, yes."}
    assert len(lines(tmp_path / "work", "slack")) == 6


@pytest.mark.crash
def test_the_demo_loses_nothing_and_does_nothing_twice(
    at_a_terminal: Callable[..., Terminal],
) -> None:
    terminal = at_a_terminal(TRIAGE, "--demo", INBOX)

    terminal.until("No process is there")
    terminal.until(QUESTION)
    terminal.type(b"Yes to the licences.\n")

    assert terminal.ended() == 0, terminal.shown
    assert len(re.findall(r"kill -9 \d+", terminal.shown)) == 2
    assert "16 of 16 answer from the record" in terminal.shown
    facts = dict(
        reversed(fact) for fact in re.findall(r"^ +(\d+)  (.+?)\r?$", terminal.shown, re.M)
    )
    assert 1 <= int(facts["were cut off in the middle and started again as attempt 2"]) <= 8
    assert facts["business messages, posted to Slack"] == "6"
    assert facts["personal messages, told at once"] == "5"
    assert facts["for later, in 1 message at the end of the day"] == "5"
    assert facts["question outlived its process, and was answered in the next one:"] == "1"
    assert facts["message that the flow is done"] == "1"
    assert "{'text': 'Yes to the licences.'}" in terminal.shown
    assert "16 effects for 16 messages: 0 lost · 0 done twice" in terminal.shown


@pytest.mark.crash
def test_the_demo_answers_for_itself_where_nobody_can(program: Program, tmp_path: Path) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "1.eml").write_bytes(b"From: Ada King <a@k.example>\nSubject: Our contract\n\n.\n")
    (letters / "2.eml").write_bytes(b"From: Ada King <a@k.example>\nSubject: Dinner?\n\n.\n")

    shown = program(TRIAGE, "--demo", letters)

    assert "{'text': 'Yes to all of it, on Thursday.'}" in shown
    assert "2 effects for 2 messages: 0 lost · 0 done twice" in shown


DAY = [
    "'bill' needs review: a total of -5",
    "[[['billed 5', 'o-1.pdf'], ['billed 5', 'o-2.pdf']], 'sent\\n']",
]
TOLD = {
    "Twenty-five lines": (
        ["queued -> ['Hello, Ada!', 'Hello, Grace!', 'Hello, Edsger!']"],
        ["succeeded -> ['Hello, Ada!', 'Hello, Grace!', 'Hello, Edsger!']"],
    ),
    "Children, supervised": (
        DAY,
        DAY,
    ),
    "Waits that wake": (
        [
            "Pay 82? {'amount': 82, 'thread': 't-7'}",
            "{'receipt': {'no': 4711}}",
            "[done] invoice 7 is done.",
        ],
        ["{'receipt': {'no': 4711}}"],
    ),
}
"""What the programs of a chapter of the README say, in the first run and in the second."""


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_program_in_the_readme_runs_twice_in_one_folder_and_does_what_it_says(
    program: Program, tmp_path: Path, block: int
) -> None:
    text = README.read_text(encoding="utf-8")
    chapter = re.findall(r"^## (.+)$", text[: text.index(BLOCKS[block])], re.M)[-1]
    (tmp_path / "block.py").write_text(BLOCKS[block], encoding="utf-8")

    for expected in TOLD.get(chapter, ([], [])):
        told = program("block.py").splitlines()

        assert [line for line in expected if line not in told] == []
    assert not (tmp_path / "flows.db").exists() or not [
        update for update in updates(tmp_path) if update["status"] == "pending"
    ]


def test_the_programs_of_the_readme_that_are_looked_at_are_there() -> None:
    chapters = re.findall(r"^## (.+)$", README.read_text(encoding="utf-8"), re.M)

    assert set(TOLD) <= set(chapters)


def test_an_invoice_as_the_readme_pays_it_is_paid_once_wherever_the_process_dies() -> None:
    [block] = [block for block in BLOCKS if "shop/invoice" in block]
    source = block.replace("asyncio.run(main())", "")

    def scenario(sim: Simulation) -> None:
        world: dict[str, Any] = {}
        exec(compile(source, "README.md", "exec", dont_inherit=True), world)

        async def host(runtime: Runtime) -> Flow:
            flows = runtime.tasks.flow.bind_session(session_key="me")
            flow = await flows.create_managed(
                controller_id="shop/invoice",
                goal="invoice 7",
                state_json={"amount": 82, "thread": "t-7"},
                idempotency_key="invoice-7",
            )
            await flows.signal(kind="reply", thread="t-7", payload={"no": 4711}, id="mail-1")
            async with flows.watch(flow.flow_id, after_seq=0) as events:
                async for event in events:
                    if event.type == "flow.waiting":
                        break
            for question in await flows.list_waits(flow.flow_id):
                assert question.approval is not None
                for approver, role in (("ada", "lead"), ("grace", "finance")):
                    await flows.vote(
                        "approve",
                        approver=approver,
                        role=role,
                        digest=question.approval.digest,
                        token=question.token,
                    )
            return await flows.result(flow.flow_id)

        flow = sim.run(host, registry=world["registry"])
        # What must not be done twice is lost where nobody can know whether it was done.
        assert flow.status == "succeeded" or "pay" in str(flow.failure), flow.failure
        if flow.status == "succeeded":
            assert flow.state_json == {"receipt": {"no": 4711}}

    gone = explore(scenario, seeds=0)

    assert gone.crashes >= gone.steps_crashed_at > 50
