"""The examples and the README are run as their readers run them: as programs, in an empty folder."""

from __future__ import annotations

import json
import mailbox
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PATTERNS = sorted((EXAMPLES / "patterns").glob("*.py"))
INBOX = EXAMPLES / "inbox.mbox"
README = ROOT / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
OUTBOXES = ("slack.jsonl", "notify.jsonl", "end_of_day.jsonl")

Program = Callable[..., str]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Run a program in a folder of its own and answer what it printed."""

    def run(*command: str | Path, exit_code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", *map(str, command)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
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
    assert {path.stem for path in PATTERNS} == {
        "content_pipeline",
        "orchestrator",
        "research_fan_out",
        "support_router",
    }


def test_the_content_pipeline_publishes_what_the_spare_editor_made_of_it_once(
    program: Program, tmp_path: Path
) -> None:
    first = program(EXAMPLES / "patterns" / "content_pipeline.py")

    assert first.startswith("queued -> succeeded: textwrap.md\n")
    assert re.search(r"edit +failed +house_editor, attempt 2\n", first)
    assert re.search(r"edit/fallback-1 +succeeded +spare_editor, attempt 1\n", first)
    article = tmp_path / "textwrap.md"
    assert "Text wrapping and filling." in article.read_text(encoding="utf-8")

    article.unlink()
    second = program(EXAMPLES / "patterns" / "content_pipeline.py")

    assert second == first.replace("queued", "succeeded", 1)
    assert not article.exists()


def test_the_research_merges_every_package_into_one_report(
    program: Program, tmp_path: Path
) -> None:
    names = "sorted({p.metadata['Name'] for p in metadata.distributions() if p.metadata['Name']})"
    packages = program("-c", f"from importlib import metadata\nprint(*{names}, sep='\\n')").split()

    first = program(EXAMPLES / "patterns" / "research_fan_out.py")

    assert first.startswith(f"queued -> {len(packages)} packages, 0 gaps, in report.txt\n")
    report = tmp_path / "report.txt"
    rows = report.read_text(encoding="utf-8").splitlines()
    assert sorted(row.partition(":")[0] for row in rows) == packages

    report.unlink()
    second = program(EXAMPLES / "patterns" / "research_fan_out.py")

    assert second == first.replace("queued", "succeeded", 1)
    assert not report.exists()


def test_the_router_shows_a_specialist_its_slice_of_the_ticket_only(program: Program) -> None:
    first = program(EXAMPLES / "patterns" / "support_router.py")

    assert first.splitlines() == [
        "T-1 queued -> billing ['id', 'invoices']",
        "    refund one of [42, 42]",
        "T-2 queued -> technical ['id', 'log']",
        "    found in the log: no space left",
    ]

    second = program(EXAMPLES / "patterns" / "support_router.py")

    assert second == first.replace("queued", "succeeded")


def test_the_orchestrator_accounts_for_every_item_once_with_eight_at_work(
    program: Program,
) -> None:
    first = program(EXAMPLES / "patterns" / "orchestrator.py")

    assert first == (
        "queued -> 1000 items, 1000 merged\n"
        "  0 twice, 0 failed, 50 tried again\n"
        "  at most 8 at once in this process\n"
    )

    second = program(EXAMPLES / "patterns" / "orchestrator.py")

    assert second == first.replace("queued", "succeeded").replace("most 8", "most 0")


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
