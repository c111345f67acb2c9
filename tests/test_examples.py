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
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flowstead.testing import Simulation, explore, offline
from tests import invariants

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PATTERN = EXAMPLES / "patterns"
PATTERNS = sorted(PATTERN.glob("*.py"))
INBOX = EXAMPLES / "inbox.mbox"
README = ROOT / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
OUTBOXES = ("slack.jsonl", "notify.jsonl", "end_of_day.jsonl")

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
            timeout=60,
        )
        assert done.returncode == exit_code, done.stdout + done.stderr
        assert exit_code or not done.stderr, done.stderr
        return done.stdout

    return run


def posted(work: Path) -> list[str]:
    """The key of every effect, as often as it happened."""
    return [
        json.loads(line)["key"]
        for name in OUTBOXES
        for line in (work / name).read_text().splitlines()
    ]


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
    (tmp_path / "test_broken.py").write_text(broken, encoding="utf-8")

    told = program("-m", "pytest", "-q", "test_broken.py", exit_code=1)

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
    done = subprocess.run(command, cwd=work, capture_output=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


def lasting(told: str) -> str:
    """What a program says, without what a crash may change: how often and in which order, in this process."""
    lines = [line for line in told.splitlines() if not line.startswith(("first in", "in this"))]
    return re.sub(r"attempt \d+", "attempt", "\n".join(lines))


def test_short_examples_stay_short() -> None:
    assert len((EXAMPLES / "first_steps.py").read_text().splitlines()) <= 25
    assert len((EXAMPLES / "seed.py").read_text().splitlines()) < 60


def test_the_triage_routes_each_message_once_and_a_second_run_does_nothing_twice(
    program: Program, tmp_path: Path
) -> None:
    first = program(EXAMPLES / "inbox_triage.py", INBOX, "--work", "work")

    assert "succeeded at revision 4, step await_business_reply" in first
    assert re.search(r"business +Framework contract: two open points", first)
    assert re.search(r"business +Angebot für sechs Schreibtische", first)
    assert re.search(r"personal +Saturday", first)
    assert re.search(r"personal +Invitation: Roadmap", first)
    assert re.search(r"later +48 hours only", first)
    assert len(posted(tmp_path / "work")) == len(set(posted(tmp_path / "work"))) == 16

    second = program(EXAMPLES / "inbox_triage.py", INBOX, "--work", "work")

    assert "16 of 16 answer from the record" in second
    assert second.splitlines()[0] == first.splitlines()[0]
    assert len(posted(tmp_path / "work")) == 16


def test_new_mail_is_a_new_flow_and_old_mail_is_not_posted_again(
    program: Program, tmp_path: Path
) -> None:
    program(EXAMPLES / "inbox_triage.py", INBOX, "--work", "work")
    letter = b"From: Ada King <ada@king.example>\nSubject: Saturday?\n\nShall we walk?\n"
    (tmp_path / "letter.eml").write_bytes(letter)

    told = program(EXAMPLES / "inbox_triage.py", INBOX, "letter.eml", "--work", "work")

    assert re.search(r"\[ 17/17\] personal +Saturday\? +a person wrote to you", told)
    assert len(posted(tmp_path / "work")) == len(set(posted(tmp_path / "work"))) == 17


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
        told = program(EXAMPLES / "inbox_triage.py", given, "--work", f"work-{given}")

        assert len(posted(tmp_path / f"work-{given}")) == 16, told


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

    told = program(EXAMPLES / "inbox_triage.py", "broken.eml", "--work", "work")

    assert "[  1/1]" in told
    assert "\x1b" not in told
    assert len(posted(tmp_path / "work")) == 1


def test_an_empty_mailbox_is_triaged_at_once(program: Program, tmp_path: Path) -> None:
    (tmp_path / "empty.mbox").touch()

    told = program(EXAMPLES / "inbox_triage.py", "empty.mbox", "--work", "work")

    assert "succeeded at revision 4, step done" in told


def test_a_mailbox_that_is_not_there_is_named(program: Program) -> None:
    program(EXAMPLES / "inbox_triage.py", "nowhere.mbox", exit_code=2)


def test_half_a_line_in_an_outbox_is_no_effect(program: Program, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "slack.jsonl").write_text('{"key": "0123"}\n{"key": "45')

    program(EXAMPLES / "inbox_triage.py", INBOX, "--work", "work")

    assert posted(work).count("0123") == 1
    assert len(posted(work)) == 17


@pytest.mark.crash
def test_the_demo_loses_nothing_and_does_nothing_twice(program: Program) -> None:
    told = program(EXAMPLES / "inbox_triage.py", "--demo", INBOX)

    assert "kill -9" in told
    assert "answer from the record" in told
    assert re.search(r"[1-8]  were cut off in the middle and started again as attempt 2", told)
    assert "16 effects for 16 messages: 0 lost · 0 done twice" in told


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_program_in_the_readme_runs(program: Program, tmp_path: Path, block: int) -> None:
    (tmp_path / "block.py").write_text(BLOCKS[block], encoding="utf-8")

    program("block.py")
