"""A method of another package: the worked example of the docs, as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvbench.inference.policy_session import PolicySession
from tests.helpers.command import Outcome, kvbench
from tests.helpers.policies import masked, read, text

ROOT = Path(__file__).parents[2]
POLICY = "from kvbench.methods import CachePolicy\nclass Ends(CachePolicy):\n"
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()


def installed(folder: Path, code: str, value: str = "ends:Ends", name: str = "ends") -> dict[str, str]:
    """The environment in which a package with that module is installed."""
    module = value.partition(":")[0]
    (folder / f"{module}.py").write_text(code)
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[kvbench.methods]\n{name} = {value}\n")
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


@pytest.fixture(scope="module")
def example() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert found is not None
    return found.group(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, example: str) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("plugin")
    return folder, installed(folder, example)


def called(place: tuple[Path, dict[str, str]], *arguments: str) -> Outcome:
    return kvbench(*arguments, cwd=place[0], env=place[1])


def test_the_example_is_listed_run_and_reported(place: tuple[Path, dict[str, str]]) -> None:
    names = [row["name"] for row in called(place, "list", "methods", "--json").document["methods"]]
    assert names[-1] == "ends"
    found = called(place, "run", "--method", "ends", "--ratio", "0.5", "--task", "minidocs", "--limit", "2", "--out",
                   "run", "--json")
    assert found.code == 0, found.err
    row = next(r for r in found.document["rows"] if (r["method"], r["metric"]) == ("ends", "ppl"))
    assert row["ratio_realised"] == pytest.approx(0.5, abs=0.005)
    assert row["removal"] == "real"
    assert called(place, "report", "run").code == 0
    swept = called(place, "sweep", "--method", "ends", "--ratio", "0.5", "--ratio", "0.8", "--task", "minidocs",
                   "--limit", "2", "--out", "run", "--json")
    assert swept.code == 0, swept.err
    measured = [r for r in swept.document["rows"] if r["method"] == "ends" and r["metric"] != "largest_ratio"]
    assert {r["ratio_asked"] for r in measured} == {0.5, 0.8}
    assert "ends 0.8" in json.loads((place[0] / "run" / "masks.json").read_text())


def test_a_reference_of_the_package_is_cited_in_a_paper(
    place: tuple[Path, dict[str, str]], example: str, tmp_path: Path
) -> None:
    asked = ("--method", "ends", "--ratio", "0.5", "--task", "minidocs", "--limit", "2")
    ran = called(place, "run", *asked, "--out", "cited")
    assert ran.code == 0, ran.err
    entry = "@article{doe2026ends, title = {Ends}, author = {Doe, Jane}, year = {2026}}"
    given = example.replace('    name = "ends"\n', f'    name = "ends"\n    bibtex = "{entry}"\n')
    for name, code, said, cited in (
        ("without", example, "ends (ratio 0.5; removal real; no reference given)", False),
        ("with", given, "ends [doe2026ends] (ratio 0.5; removal real)", True),
    ):
        folder = tmp_path / name
        folder.mkdir()
        asked = ("report", str(place[0] / "cited"), "--out", "out", "--paper")
        found = called((folder, installed(folder, code)), *asked)
        assert found.code == 0, found.err
        assert said in (folder / "out" / "paper" / "setup.txt").read_text()
        assert (entry in (folder / "out" / "paper" / "references.bib").read_text()) == cited


def test_the_example_passes_the_proof(place: tuple[Path, dict[str, str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "ends and llama",
         str(ROOT / "tests" / "guarantees" / "test_equality.py")],
        cwd=ROOT, env={**os.environ, **place[1]}, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.search(r"[1-9]\d* passed|^\.+ ", done.stdout, flags=re.M), done.stdout


def test_the_example_of_a_memory_is_trained_and_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding-a-memory.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, flags=re.S)
    assert code is not None
    place = (tmp_path, installed(tmp_path, code.group(1), "mean_rows:MeanRows", "mean-rows"))
    (tmp_path / "texts.jsonl").write_text("".join(
        json.dumps({"text": f"Story {i}. " + "The sea was calm and the ship lay still in the harbour. " * 40}) + "\n"
        for i in range(4)
    ))
    trained = called(place, "train", "--method", "mean-rows", "--data", "texts.jsonl", "--steps", "2", "--length", "64",
                     "--batch-size", "2", "--out", "adapter")
    assert trained.code == 0, trained.err
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists(), "the writer reads embeddings only"
    found = called(place, "run", "--method", "mean-rows", "--ratio", "0.75", "--adapter", "adapter", "--task",
                   "minidocs", "--limit", "2", "--no-baselines", "--out", "run", "--json")
    assert found.code == 0, found.err
    row = next(r for r in found.document["rows"] if (r["method"], r["metric"]) == ("mean-rows", "ppl"))
    assert row["ratio_realised"] == pytest.approx(0.75, abs=0.01)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "mean-rows",
         str(ROOT / "tests" / "methods" / "test_memories.py")],
        cwd=ROOT, env={**os.environ, **place[1]}, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_example_of_a_policy_removes_what_it_masks(llama: nn.Module) -> None:
    space: dict[str, Any] = {"__name__": "example"}
    exec(re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)[1], space)
    policy = space["LargeValues"](Fraction(1, 2), step=7)
    ids = text()
    logits, run = read(llama, policy, ids)
    assert float((logits - masked(llama, run, ids)).abs().max()) < 1e-5
    first = run.cache.layers[0]
    whole = PolicySession(llama, space["LargeValues"](Fraction(0)), ids.shape[1], (3, 5))
    with torch.inference_mode():
        whole.feed(ids)
    left = whole.cache.layers[0].values.norm(dim=-1)
    held = torch.zeros_like(left, dtype=torch.bool).scatter_(-1, first.positions, True)
    assert float(left[held].mean()) > float(left[~held].mean())


@pytest.mark.parametrize(("code", "value", "words"), [
    ("raise RuntimeError('not today')", "ends:Ends", "RuntimeError: not today"),
    ("Ends = 3", "ends:Ends", "is no subclass of kvbench.methods.Method"),
    ("from kvbench.methods import Method\nclass Ends(Method):\n    name, summary = 'ends', 'as for kvbench 0.1'",
     "ends:Ends", "docs/adding-a-method.md"),
    *((f"{POLICY}    name, summary = 'ends', 'old'\n    {line}", "ends:Ends", "docs/adding-a-method.md") for line in (
        "compresses = True", "removes = False", "window = 32", "known = {}", "takes_ratio = False",
        "@classmethod\n    def uses_ratio(cls, options, in_chunks): return True",
    )),
    (f"{POLICY}    summary = 'none'", "ends:Ends", "has no name"),
    ("from kvbench.methods.layouts.windows import Local as Ends", "ends:Ends", "its name is taken"),
    ("", "ends:Ends", "AttributeError"),
    ("from kvbench.methods.layout import plain_tokens", "ends:Ends", "docs/adding-a-method.md says what has moved"),
])
def test_a_broken_package_is_a_sentence_where_it_is_asked_for(
    tmp_path: Path, code: str, value: str, words: str
) -> None:
    place = tmp_path, installed(tmp_path, code, value)
    few = ("--task", "minidocs", "--limit", "1", "--dry-run")
    found = called(place, "run", "--method", "ends", "--ratio", "0.5", *few)
    assert (found.code, found.out) == (2, "")
    assert words in found.err
    assert "Traceback" not in found.err
    others = called(place, "list", "methods", "--json")
    assert others.code == 0
    assert "ends" not in [row["name"] for row in others.document["methods"]]
    assert words in others.err
    assert called(place, "run", "--method", "sinks", "--ratio", "0.5", *few).code == 0


def test_an_edited_method_is_measured_again(tmp_path: Path) -> None:
    """Its version is the same; what its former code measured is marked where it is printed."""
    code = f"{POLICY}    name, summary = 'ends', 'ends'\n"
    place = tmp_path, installed(tmp_path, code)
    asked = ("run", "--method", "ends", "--ratio", "0.5", "--task", "minidocs", "--limit", "1", "--no-baselines",
             "--out", "run", "--json")

    def keys() -> set[str]:
        cells = called(place, *asked, "--dry-run").document["cells"]
        return {cell["key"] for cell in cells if cell["method"] == "ends"}

    before = keys()
    assert called(place, *asked).code == 0
    assert keys() == before
    (tmp_path / "ends.py").write_text(f"{code}    shares_heads = True\n")
    assert not keys() & before
    report = called(place, "report", "run")
    assert report.code == 0
    assert "its code has changed since" in report.out + report.err


@pytest.mark.parametrize(("body", "words"), [
    ("return view.values.norm(dim=-1)[..., 1:]", "of ends ([^ ]*ends.py, line 5) have the shape [1, 2, "),
    ("return view.valuez", "no attribute 'valuez' ([^ ]*ends.py, line 6)"),
])
def test_a_fault_in_a_method_says_where(tmp_path: Path, body: str, words: str) -> None:
    code = f"{POLICY}    name, summary = 'ends', 'ends'\n\n    def scores(self, view):\n        {body}\n"
    found = called(
        (tmp_path, installed(tmp_path, code)), "run", "--method", "ends", "--ratio", "0.5", "--task", "minidocs",
        "--limit", "1", "--no-baselines",
    )
    assert found.code == 1
    said = re.sub(r"\s+", " ", found.err + found.out)
    assert re.search(re.escape(words).replace(re.escape("[^ ]*"), "[^ ]*"), said), said


def test_an_unknown_method_names_the_page(tmp_path: Path) -> None:
    found = kvbench("run", "--method", "mine", "--ratio", "0.5", cwd=tmp_path)
    assert found.code == 2
    assert "One of your own: docs/adding-a-method.md" in re.sub(r"\s+", " ", found.err)


def test_the_example_of_a_task_can_be_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding-a-task.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", page, flags=re.S)
    (tmp_path / "notes.toml").write_text(blocks[0])
    text = "The ferry leaves at nine, and the tide turns an hour later. " * 40
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": f"{i}. {text}"}) + "\n" for i in range(2)))
    found = kvbench("run", "--task", "notes.toml", "--data", "notes.jsonl", "--method", "sinks", "--ratio", "0.5",
                    "--no-baselines", "--out", "run", "--json", cwd=tmp_path)
    assert found.code == 0, found.err
    assert {r["task"] for r in found.document["rows"]} == {"notes"}
    writes = blocks[0].replace('"lm"', '"generation"').replace('["block", "stream"]', '["generate"]') + blocks[1]
    (tmp_path / "written.toml").write_text(writes)
    dry = kvbench("run", "--task", "written.toml", "--data", "notes.jsonl", "--dry-run", "--json", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert {c["protocol"] for c in dry.document["cells"]} == {"generate"}


def test_the_page_names_the_group_that_is_read() -> None:
    from kvbench.methods import GROUP

    assert f'[project.entry-points."{GROUP}"]' in PAGE
