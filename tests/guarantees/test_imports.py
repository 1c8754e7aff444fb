"""The rooms of the house: what is in one imports what is in those below it, and nothing goes round in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2] / "kvbench"

ROOMS = (
    "__main__", "cli", "integrations", "api", "doctor", "profiling", "execution", "planning", "training", "judges",
    "probe", "protocols", "inference", "methods", "cache", "data", "config", "models", "reporting", "analysis",
    "metrics", "store", "statistics", "parsing", "errors", "__init__",
)
"""From top to bottom."""

MODULES = {
    ".".join(("kvbench", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(module: str) -> Iterator[str]:
    """The modules of kvbench that a module imports, also inside functions, but not for type checkers only."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_checkers = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in for_checkers:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import) and node not in for_checkers:
            yield from (name.name for name in node.names)


def arrows() -> dict[str, set[str]]:
    return {module: {other for other in imported(module) if other in MODULES} - {module} for module in MODULES}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_no_import_points_up() -> None:
    wrong = [
        f"{module} imports {other}" for module, others in arrows().items() for other in others
        if ROOMS.index(room(module)) > ROOMS.index(room(other))
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_imported_in_a_circle() -> None:
    assert len(list(TopologicalSorter(arrows()).static_order())) == len(MODULES)  # it raises where there is one


def test_the_test_sees_what_is_imported_inside_functions() -> None:
    assert "kvbench.cache.evicting" in set(imported("kvbench.cache.shape"))
    assert "kvbench.planning.quality" in set(imported("kvbench.cli.run"))


def test_only_the_opening_of_sessions_asks_for_the_mechanism() -> None:
    """What a method does to the cache is asked of its session; two kinds of methods are told apart in one place."""
    asking = re.compile(r"policy is (not )?None|\.is_policy|isinstance\([^)]*\b(Writing|CachePolicy|LayoutMethod)\b")
    found = {module for module, path in MODULES.items() if asking.search(path.read_text(encoding="utf-8"))}
    assert found <= {"kvbench.inference.opening", "kvbench.doctor.model_checks"}


def test_there_are_few_rooms() -> None:
    code = {path.name for path in ROOT.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert len(code) <= len(ROOMS) == 26
