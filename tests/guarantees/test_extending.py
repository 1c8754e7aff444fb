"""The examples of the docs, added to a copy of the package as the pages say, and how many files that takes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import command

ROOT = Path(__file__).parents[2]
SMALL = ("--limit", "2", "--no-baselines", "--ratio", "0.5", "--json", "--out", "r")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout: the code is copied, data are linked."""
    shutil.copytree(ROOT / "kvbench", tmp_path / "kvbench", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (tmp_path / "kvbench" / "assets").symlink_to(ROOT / "kvbench" / "assets")
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".toml") and "assets" not in path.parts
    }


def followed(folder: Path, page: str, file: str, table: str, imports: str) -> int:
    """Do what a page says: write its file, change a line of the table, import the name. How many files are touched."""
    before = files(folder)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", text, flags=re.S) if imports.rsplit(maxsplit=1)[-1] in c)
    (folder / file).write_text(code, encoding="utf-8")
    old, new = re.findall(r"^[-+](?![-+])(.*)$", re.findall(r"```diff\n(.*?)```", text, flags=re.S)[0], flags=re.M)
    place = folder / table
    assert old in place.read_text(encoding="utf-8")
    changed = place.read_text(encoding="utf-8").replace(old, new)
    place.write_text(changed.replace("\nfrom kvbench", f"\n{imports}\nfrom kvbench", 1), encoding="utf-8")
    after = files(folder)
    return sum(before.get(name) != text for name, text in after.items())


def kvbench(folder: Path, *words: str) -> Any:
    """The document that the copy's command prints; in a warm process too, the copy is imported anew."""
    found = command.kvbench(*words, cwd=folder, env={"PYTHONPATH": str(folder)})
    assert found.code == 0, found.err
    return found.document


def test_a_metric_is_a_file_and_a_name(copy: Path) -> None:
    touched = followed(
        copy, "adding-a-metric.md", "kvbench/metrics/next_token.py", "kvbench/metrics/__init__.py",
        "from kvbench.metrics.next_token import NEXT_TOKEN",
    )
    assert touched == 2
    rows = kvbench(copy, "run", "--task", "minidocs", "--method", "sinks", "--set", "block=64", *SMALL)["rows"]
    mine = {row["method"]: row for row in rows if row["metric"] == "next_token" and row["params"]["bin"] is None}
    assert set(mine) == {"full", "sinks"}
    assert 0 < mine["full"]["value"] < 1
    assert mine["sinks"]["p_value"] is not None
    kvbench(copy, "report", "r", "--json")
    assert "next token" in (copy / "r" / "tables" / "minidocs.md").read_text(encoding="utf-8")
    listed = kvbench(copy, "list", "metrics", "--json")["metrics"]
    assert any(metric["name"] == "next_token" for metric in listed)


def test_a_protocol_is_a_file_and_a_name(copy: Path) -> None:
    touched = followed(
        copy, "adding-a-protocol.md", "kvbench/protocols/later.py", "kvbench/protocols/registry.py",
        "from kvbench.protocols.later import Later",
    )
    assert touched == 2
    task = (copy / "tasks" / "minidocs.toml").read_text(encoding="utf-8")
    own = re.sub(r'^protocols = .*$', 'protocols = ["prefix", "later"]', task, flags=re.M)
    (copy / "own.toml").write_text(own.replace('name = "minidocs"', 'name = "own"'), encoding="utf-8")
    words = ("run", "--task", "own.toml", "--method", "knorm", "--set", "prefix=64", "--set", "continuation=32")
    found = {
        name: next(row for row in kvbench(copy, *words, "--protocol", name, *SMALL[:-1], name)["rows"]
                   if row["metric"] == "ppl" and row["method"] == "knorm")
        for name in ("prefix", "later")
    }
    assert found["later"]["protocol"] == "later"
    assert found["later"]["signature"] == found["prefix"]["signature"].replace("prefix|", "later|")
    assert found["later"]["value"] != found["prefix"]["value"]


@pytest.mark.parametrize(("number", "name", "module", "folder"), [
    (0, "Ends", "ends", "layouts"), (1, "LargeValues", "large_values", "policies"),
])
def test_a_method_is_a_file_and_a_name(copy: Path, number: int, name: str, module: str, folder: str) -> None:
    """In the package itself, as it can be in one of its own (test_plugins.py)."""
    before = files(copy)
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, flags=re.S)[number]
    inside = {  # the package cannot import what it is about to offer
        "from kvbench.methods import RUNNING, Layout, LayoutMethod, kept":
            "from kvbench.methods.budget import kept\nfrom kvbench.methods.layouts.layout import RUNNING, Layout\n"
            "from kvbench.methods.layouts.method import LayoutMethod",
        "from kvbench.methods import CachePolicy, LayerView":
            "from kvbench.methods.policies.policy import CachePolicy, LayerView",
    }
    for outside, here in inside.items():
        code = code.replace(outside, here)
    (copy / "kvbench" / "methods" / folder / f"{module}.py").write_text(code, encoding="utf-8")
    registry = copy / "kvbench" / "methods" / "registry.py"
    text = registry.read_text(encoding="utf-8").replace("    Full, NoContext,", f"    Full, {name}, NoContext,")
    line = f"from kvbench.methods.{folder}.{module} import {name}"
    registry.write_text(text.replace("\nfrom kvbench", f"\n{line}\nfrom kvbench", 1), encoding="utf-8")
    assert sum(before.get(file) != text for file, text in files(copy).items()) == 2
    asked = module.replace("_", "-")
    rows = kvbench(copy, "run", "--task", "minidocs", "--method", asked, "--set", "block=64", *SMALL)["rows"]
    assert next(r for r in rows if (r["method"], r["metric"]) == (asked, "ppl"))["ratio_realised"] == 0.5


def test_a_task_is_a_file(copy: Path) -> None:
    before = files(copy)
    page = (ROOT / "docs" / "adding-a-task.md").read_text(encoding="utf-8")
    (copy / "tasks" / "notes.toml").write_text(re.findall(r"```toml\n(.*?)```", page, flags=re.S)[0], encoding="utf-8")
    assert sum(before.get(file) != text for file, text in files(copy).items()) == 1
    text = "The ferry leaves at nine, and the tide turns an hour later. " * 40
    (copy / "notes.jsonl").write_text("".join(json.dumps({"text": f"{i}. {text}"}) + "\n" for i in range(2)))
    rows = kvbench(copy, "run", "--task", "notes", "--data", "notes.jsonl", "--method", "sinks", *SMALL)["rows"]
    assert {row["task"] for row in rows} == {"notes"}
