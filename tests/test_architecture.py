"""The floors: imports go down only, and the pure floors stay pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "flowstead"

FLOORS = ("model", "rules", "store", "engine")
"""From the ground up; modules at the top level are the door, folders not named here are faces."""

PURE_MAY_IMPORT = {
    "__future__",
    "collections",
    "enum",
    "hashlib",
    "builtins",
    "math",
    "msgspec",
    "typing",
    "flowstead",
}
SOME_MAY_IMPORT = {
    # Reckons with dates, and never asks for the present one.
    "flowstead.rules.digests": {"datetime", "zoneinfo"},
    "flowstead.rules.shapes": {"jsonschema_rs"},
    # Reads what others have written.
    "flowstead.rules.type_schemas": {"datetime", "decimal", "uuid"},
}
NEVER = {"pickle", "marshal", "shelve", "yaml"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports_of(path: Path) -> list[str]:
    """Every module a file imports, by full name, wherever in the file the import stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            found.append(node.module)
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def floor_of(dotted: str) -> int | None:
    """The height of a flowstead module: 0 for errors and log, 1 for model and up, the door above all floors."""
    parts = dotted.split(".")
    if parts[0] != "flowstead" or len(parts) < 2:
        return None
    if parts[1] in ("errors", "log"):
        return 0
    if parts[1] in FLOORS:
        return 1 + FLOORS.index(parts[1])
    is_module = (SOURCE / f"{parts[1]}.py").exists() or (SOURCE / parts[1]).is_dir()
    return 1 + len(FLOORS) if is_module else None


def dotted(path: Path) -> str:
    return ".".join(("flowstead", *path.relative_to(SOURCE).with_suffix("").parts))


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_down_the_floors_only(path: Path) -> None:
    here = floor_of(dotted(path))
    if path.name == "errors.py":
        # Names for type checkers only; nothing is imported when it runs.
        return

    for name in imports_of(path):
        there = floor_of(name)
        if here is not None and there is not None:
            assert there <= here, f"{dotted(path)} (floor {here}) imports {name} (floor {there})"


@pytest.mark.parametrize("floor", ["model", "rules"])
def test_the_pure_floors_know_no_loop_no_clock_and_no_chance(floor: str) -> None:
    for path in sorted((SOURCE / floor).glob("*.py")):
        allowed = PURE_MAY_IMPORT | SOME_MAY_IMPORT.get(dotted(path), set())
        for name in imports_of(path):
            assert name.split(".")[0] in allowed, f"{dotted(path)} imports {name}"


@pytest.mark.parametrize("module", ["digests", "type_schemas"])
def test_whoever_reckons_with_dates_below_the_clock_never_asks_what_time_it_is(module: str) -> None:
    tree = ast.parse((SOURCE / "rules" / f"{module}.py").read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    assert not names & {"now", "utcnow", "today", "uuid1", "uuid4"}


def test_nothing_imports_the_runtime_but_the_front() -> None:
    importers = [
        dotted(path)
        for path in modules()
        if any(n.startswith("flowstead.runtime") for n in imports_of(path))
        and not dotted(path).startswith("flowstead.testing.")
    ]

    assert importers == ["flowstead.__init__"]


def test_the_supervisor_does_not_know_the_actor() -> None:
    names = imports_of(SOURCE / "engine" / "supervisor.py")

    assert not any("actor" in name or name == "flowstead.engine.engine" for name in names)


def test_nothing_but_json_is_stored_and_nothing_is_evaluated() -> None:
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not NEVER & {name.split(".")[0] for name in imports_of(path)}, dotted(path)
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"eval", "exec", "print"}, dotted(path)


def statements_of(path: Path) -> list[ast.expr]:
    """The first argument of every call that runs SQL."""
    verbs = {"execute", "executemany", "executescript"}
    return [
        node.args[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in verbs
    ]


def test_statements_are_never_formatted() -> None:
    found = 0
    for path in sorted((SOURCE / "store").glob("*.py")):
        for statement in statements_of(path):
            parts = list(ast.walk(statement))
            found += 1
            assert not any(isinstance(part, ast.JoinedStr | ast.Mod) for part in parts), path

    assert found > 20


def test_time_ids_and_chance_come_from_one_module() -> None:
    allowed = {"flowstead.engine.clock", "flowstead.store.lock", "flowstead.store.quarantine"}
    for path in modules():
        # The test kit stands beside the door, and draws what happens from seeds.
        if dotted(path) not in allowed and not dotted(path).startswith("flowstead.testing."):
            tops = {name.split(".")[0] for name in imports_of(path)}
            tops -= SOME_MAY_IMPORT.get(dotted(path), set())
            assert not tops & {"time", "random", "secrets", "uuid", "uuid_utils", "datetime"}, (
                dotted(path)
            )


def test_every_module_says_what_it_is() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), dotted(path)
