"""The executors of a runtime: built in, brought along, or offered by packages that are really installed."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowstead.executors import Call, Command, Executors, ExecutorUnusable
from tests.executors.stage import Attempt

MODULE = """
import msgspec

class Remote(msgspec.Struct, frozen=True):
    host: str

class RemoteExecutor:
    name = "remote"
    spec = Remote
    external = True

    async def run(self, call):
        return [call.spec.host, call.input]

made = RemoteExecutor()
wrong_name = RemoteExecutor()
not_one = object()

class Greedy(RemoteExecutor):
    name = "greedy"
"""

Install = Callable[[str, str, dict[str, str]], Any]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package: a module, and what an installer writes about it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, code: str, points: dict[str, str]) -> Any:
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(code))
        about = tmp_path / f"{package}-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name} = {target}" for name, target in points.items()]
        (about / "entry_points.txt").write_text("\n".join(["[flowstead.executors]", *lines]) + "\n")
        monkeypatch.delitem(sys.modules, package, raising=False)

    return install


class Ours:
    """An executor of the host."""

    name = "ours"
    external = False

    class spec(msgspec.Struct):
        number: int

    def __init__(self) -> None:
        self.closed = 0

    async def run(self, call: Call) -> Any:
        return call.spec.number

    async def aclose(self) -> None:
        self.closed += 1
        raise OSError("would not close")


def test_those_built_in_are_found_by_name_and_by_spec() -> None:
    executors = Executors()

    assert [executors.named(name).name for name in ("code", "process", "command")] == [
        "code",
        "process",
        "command",
    ]
    assert executors.for_spec(Command(["ls"])) is executors.named("command")
    assert executors.for_spec(Ours.spec(number=1)) is None
    assert executors.for_spec(len) is None


def test_nobody_is_found_by_the_class_of_a_spec_or_by_a_subclass() -> None:
    class Mine(Command, frozen=True):
        pass

    assert Executors().for_spec(Command) is None
    assert Executors().for_spec(Mine(["ls"])) is None


def test_an_unknown_name_is_told_with_those_there_are(install: Install) -> None:
    install("farpackage", MODULE, {"remote": "farpackage:made"})

    with pytest.raises(
        LookupError, match=r"no executor 'nope'; there are: code, .*remote."
    ) as told:
        Executors([Ours()]).named("nope")

    assert "ours, process, remote" in str(told.value)
    assert "farpackage" not in sys.modules


@pytest.mark.parametrize("target", ["made", "RemoteExecutor"])
async def test_a_package_offers_an_executor_or_a_class_that_makes_one(
    install: Install, target: str
) -> None:
    install("farpackage", MODULE, {"remote": f"farpackage:{target}"})
    executors = Executors()

    executor = executors.named("remote")
    spec = sys.modules["farpackage"].Remote("far")

    assert executors.for_spec(spec) is executor is executors.named("remote")
    assert await executor.run(Attempt(spec=spec, input=7).call) == ["far", 7]


def test_packages_are_looked_at_only_when_nobody_else_takes_a_spec(install: Install) -> None:
    install("farpackage", MODULE, {"remote": "farpackage:made"})
    executors = Executors()

    executors.for_spec(Command(["ls"]))
    executors.named("command")
    executors.for_spec(print)
    was_loaded = "farpackage" in sys.modules
    unknown = executors.for_spec(Ours.spec(number=1))

    assert not was_loaded
    assert "farpackage" in sys.modules
    assert unknown is None
    spec = sys.modules["farpackage"].Remote("far")
    found = executors.for_spec(spec)
    assert found is not None
    assert found.name == "remote"


@pytest.mark.parametrize(
    ("code", "target", "problem"),
    [
        ("import no_such_module", "made", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "made", "SystemExit: 3"),
        ("", "made", "AttributeError"),
        (MODULE, "not_one", "TypeError: its `name` is not a text"),
        (MODULE, "Remote", "TypeError"),
        (MODULE, "Greedy", "ValueError: it calls itself 'greedy'"),
        (MODULE + "made.spec = 7", "made", "its `spec` is neither None nor a class"),
        (MODULE + "made.external = None", "made", "its `external` is neither True nor False"),
        (MODULE + "made.run = print", "made", "its `run` is not an async method"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_and_spoils_nobody_else(
    install: Install, caplog: pytest.LogCaptureFixture, code: str, target: str, problem: str
) -> None:
    install("badpackage", code, {"bad": f"badpackage:{target}"})
    install("farpackage", MODULE, {"remote": "farpackage:made"})
    executors = Executors()

    with pytest.raises(ExecutorUnusable, match=r"the executor 'bad' of badpackage 1.2") as told:
        executors.named("bad")
    with pytest.raises(ExecutorUnusable):
        executors.named("bad")

    assert problem in str(told.value)
    assert executors.named("remote").name == "remote"
    assert executors.for_spec(Ours.spec(number=1)) is None
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.message for record in records] == ["executor.unusable"]
    assert records[0].package == "badpackage 1.2"  # type: ignore[attr-defined]


def test_what_two_packages_offer_is_used_from_neither(install: Install) -> None:
    install("farpackage", MODULE, {"remote": "farpackage:made"})
    install("nearpackage", MODULE, {"remote": "nearpackage:made"})

    with pytest.raises(ExecutorUnusable, match=r"farpackage 1.2 and nearpackage 1.2 .*more than"):
        Executors().named("remote")


def test_a_package_cannot_take_the_place_of_what_is_built_in_or_brought_along(
    install: Install,
) -> None:
    install("farpackage", MODULE, {"code": "farpackage:made", "ours": "farpackage:made"})
    ours = Ours()
    executors = Executors([ours])

    assert executors.named("ours") is ours
    assert executors.for_spec(Ours.spec(number=1)) is ours
    assert type(executors.named("code")).__module__ == "flowstead.executors.code"
    assert "farpackage" not in sys.modules


def test_a_package_cannot_take_a_spec_that_is_taken(install: Install) -> None:
    code = MODULE + "from flowstead.executors import Command\nmade.spec = Command"
    install("farpackage", code, {"remote": "farpackage:made"})
    executors = Executors()

    with pytest.raises(ExecutorUnusable, match="Command is taken by 'command' and by 'remote'"):
        executors.named("remote")
    assert executors.for_spec(Command(["ls"])) is executors.named("command")


def test_what_the_host_brings_must_be_executors_of_different_names() -> None:
    with pytest.raises(TypeError, match="is no executor: it is a class"):
        Executors([Ours])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="is no executor: its `name` is not a text"):
        Executors([object()])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="two executors named 'ours'"):
        Executors([Ours(), Ours()])


async def test_closing_closes_those_that_can_be_closed(caplog: pytest.LogCaptureFixture) -> None:
    class Other(Ours):
        name = "other"

        class spec(msgspec.Struct):  # type: ignore[misc]
            pass

    both = [Ours(), Other()]

    await Executors(both).aclose()

    assert [executor.closed for executor in both] == [1, 1]
    assert [record.message for record in caplog.records] == ["executor.not_closed"] * 2
