"""The seeded bugs still fit today's code, and the hunt says so when it has caught nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants import run
from tests.mutants.patches import ROOT, Misfit, Mutant, all_mutants, plant, planted, read
from tests.mutants.run import LEAST_BY_SIMULATION, SIMULATION, Hunt
from tests.mutants.witness import VARIABLE, pytest_configure

MUTANTS = all_mutants()
LEAST = 220

HEADER = "Bug: Something is wrong.\nHunters: tests/unit\n\n"
DIFF = "--- a/src/code.py\n+++ b/src/code.py\n@@ -1,3 +1,3 @@\n one\n-two\n+TWO\n three\n"


# ---- the patches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_patch_fits_and_leaves_code_that_can_be_read(mutant: Mutant) -> None:
    changed = planted(mutant, ROOT)

    assert changed
    for path, text in changed.items():
        assert text != path.read_text(encoding="utf-8")
        ast.parse(text, str(path))


def test_there_are_enough_bugs_and_no_two_are_the_same() -> None:
    assert len(MUTANTS) >= LEAST
    for what in (
        [mutant.number for mutant in MUTANTS],
        [mutant.bug for mutant in MUTANTS],
        [mutant.hunks for mutant in MUTANTS],
    ):
        assert len(set(map(str, what))) == len(what)


def test_the_headers_say_what_is_wrong_and_name_hunters_that_exist() -> None:
    for mutant in MUTANTS:
        assert mutant.bug[0].isupper(), mutant.name
        assert mutant.bug.endswith("."), mutant.name
        for hunter in mutant.hunters:
            assert hunter.startswith("tests/"), mutant.name
            assert (ROOT / hunter).exists(), mutant.name


def test_the_simulation_hunts_most_of_them_alone() -> None:
    alone = [
        mutant
        for mutant in MUTANTS
        if all(hunter.startswith(SIMULATION) for hunter in mutant.hunters)
    ]

    assert len(alone) >= LEAST_BY_SIMULATION


# ---- reading and planting -------------------------------------------------------------------------


def patch_in(folder: Path, text: str, name: str = "01-a-bug.patch") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def tree_with(folder: Path, text: str) -> Path:
    (folder / "src").mkdir()
    (folder / "src" / "code.py").write_text(text, encoding="utf-8")
    return folder


def test_a_patch_is_planted_wherever_its_text_stands_now(tmp_path: Path) -> None:
    mutant = read(patch_in(tmp_path, HEADER + DIFF))
    root = tree_with(tmp_path, "a new line\none\ntwo\nthree\n")

    plant(mutant, root)

    assert (root / "src" / "code.py").read_text() == "a new line\none\nTWO\nthree\n"


@pytest.mark.parametrize("text", ["one\n2\nthree\n", "one\ntwo\nthree\n" * 2])
def test_a_patch_whose_text_is_gone_or_there_twice_does_not_fit(tmp_path: Path, text: str) -> None:
    mutant = read(patch_in(tmp_path, HEADER + DIFF))
    root = tree_with(tmp_path, text)

    with pytest.raises(Misfit, match="fits src"):
        plant(mutant, root)

    assert (root / "src" / "code.py").read_text() == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a-bug.patch", HEADER + DIFF),
        ("01-a-bug.patch", DIFF),
        ("01-a-bug.patch", "Bug: Something is wrong.\n\n" + DIFF),
        ("01-a-bug.patch", HEADER),
        ("01-a-bug.patch", HEADER + DIFF.replace("/src/", "/tests/")),
    ],
    ids=["no number", "no header", "no hunters", "no diff", "a diff against something else"],
)
def test_a_patch_that_is_not_complete_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(Misfit):
        read(patch_in(tmp_path, text, name))


# ---- the hunt -------------------------------------------------------------------------------------

FAILED = "FAILED tests/unit/test_x.py::test_it - AssertionError\n"
A_MUTANT = Mutant(1, "01-a-bug", "Something is wrong.", ("tests/unit",), MUTANTS[0].hunks)


def hunted(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[Path], tuple[int | None, str]]
) -> int:
    """The exit code of a hunt for one bug in which a hunter answers like that."""

    def hunt(src: Path, hunter: str, scratch: Path) -> Hunt:
        return Hunt(hunter, *answer(src))

    monkeypatch.setattr(run, "hunt", hunt)
    monkeypatch.setattr(run, "all_mutants", lambda: [A_MUTANT])
    return run.main(["01"], with_control=True)


def is_mutated(src: Path) -> bool:
    hunk = A_MUTANT.hunks[0]
    return hunk.old not in (src.parent / hunk.file).read_text(encoding="utf-8")


def test_a_bug_is_caught_by_a_hunter_that_fails_on_it_and_not_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = hunted(monkeypatch, lambda src: (1, FAILED) if is_mutated(src) else (0, ""))

    assert code == 0
    assert "tests/unit/test_x.py::test_it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda src: (0, ""), "survives: Something is wrong."),
        (lambda src: (1, FAILED), "fails without any bug"),
        (lambda src: (4 * is_mutated(src), ""), "cannot be hunted"),
        (lambda src: (None if is_mutated(src) else 0, ""), "was not done after"),
    ],
    ids=["it survives", "the hunter always fails", "the hunter does not run", "no time is left"],
)
def test_a_hunt_that_proves_nothing_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: Callable[[Path], tuple[int | None, str]],
    told: str,
) -> None:
    code = hunted(monkeypatch, answer)

    assert code == 1
    assert told in capsys.readouterr().out


def test_a_patch_that_fits_no_more_fails_the_hunt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def misfit(mutant: Mutant, root: Path) -> None:
        raise Misfit("it fits 0 times")

    monkeypatch.setattr(run, "plant", misfit)

    code = hunted(monkeypatch, lambda src: (0, ""))

    assert code == 1
    assert "does not apply: it fits 0 times" in capsys.readouterr().out


def test_no_other_tree_is_tested_than_the_one_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(ROOT / "src"))
    pytest_configure(pytestconfig)

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(pytest.UsageError, match="was meant"):
        pytest_configure(pytestconfig)
