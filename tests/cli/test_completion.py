"""What the shell completes, and what a bug report says, without PyTorch where it is not asked for."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvbench
from kvbench.cli import completion
from kvbench.cli.about import about
from kvbench.cli.app import app
from kvbench.data.tasks import GROUPS, task_names
from kvbench.methods import METHODS
from kvbench.metrics import GENERATION_NAMES, METRIC_NAMES
from kvbench.models.packaged import PACKAGED
from kvbench.models.random_models import PREFIX, SHAPES
from kvbench.models.references import DEFAULT_MODEL
from kvbench.protocols.registry import NAMES
from kvbench.store.environment import describe


def completed(words: str) -> list[str]:
    """What bash is offered for the last of these words."""
    asked = {"_KVBENCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return CliRunner().invoke(app, [], prog_name="kvbench", env=asked).output.split()


def test_the_names_are_those_of_the_tables() -> None:
    assert set(completion.method("")) == set(METHODS)
    assert set(completion.TRAINED) == {name for name, kind in METHODS.items() if kind.adapter_kinds}
    assert (DEFAULT_MODEL, *PACKAGED) == completion.MODELS
    assert tuple(PREFIX + name for name in SHAPES) == completion.SHAPES
    assert completion.PROTOCOLS == NAMES
    assert (completion.METRICS, completion.WRITTEN) == (METRIC_NAMES, GENERATION_NAMES)
    assert completion.GROUPS == GROUPS
    assert completion.task("") == [*GROUPS, *task_names()]


@pytest.mark.parametrize(("words", "offered"), [
    ("kvbench run --method sn", ["snapkv"]),
    ("kvbench run --method snapkv --method ccm", ["ccm-concat", "ccm-merge"]),
    ("kvbench run --task ruler-niah-single", [f"ruler-niah-single-{i}" for i in (1, 2, 3)]),
    ("kvbench sweep --protocol o", ["online"]), ("kvbench run --metric rouge", ["rouge1", "rouge2", "rougeL"]),
    ("kvbench report RUN --metric pp", ["ppl"]), ("kvbench profile --model shape:gpt", ["shape:gpt2"]),
    ("kvbench ask --model kv", ["kvbench-tiny"]), ("kvbench train --method gi", ["gist"]),
    ("kvbench list tas", ["tasks"]), ("kvbench rep", ["report"]), ("kvbench run --method zz", []),
])
def test_names_are_completed(words: str, offered: list[str]) -> None:
    assert completed(words) == offered


@pytest.mark.parametrize("more", [{}, {"_KVBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "kvbench run --method sn",
                                       "COMP_CWORD": "3"}])
def test_neither_the_version_nor_a_completion_imports_pytorch(more: dict[str, str]) -> None:
    started = "import sys; sys.argv = ['kvbench', '--version']; from kvbench.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", started], env={**os.environ, **more}, capture_output=True, text=True,
        timeout=60, check=True,
    )
    assert done.stdout.strip() in ("snapkv", f"kvbench {kvbench.__version__}")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "kvbench.cli.app" in imported
    assert not imported & {"torch", "numpy", "transformers"}


def test_a_bug_report_is_the_same_in_either_order() -> None:
    orders = (["--version", "--verbose"], ["--verbose", "--version"])
    first, second = (CliRunner().invoke(app, words) for words in orders)
    assert (first.exit_code, second.exit_code) == (0, 0)

    def lines(output: str) -> list[str]:
        return [line for line in output.splitlines() if not line.startswith("memory:")]

    assert lines(first.output) == lines(second.output)
    assert lines(first.output)[0] == f"kvbench {kvbench.__version__}"
    for word in ("commit: ", "python: ", "processor: ", "threads: ", "gpu", "cache: ", "extras: ", "  peft "):
        assert word in first.output
    assert "memory: " in first.output


def test_a_bug_report_names_no_person_and_needs_no_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVBENCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    text = "\n".join(about())
    assert "cache:      ~/.cache/kvbench" in text
    assert "torch:      cannot be imported (ModuleNotFoundError" in text
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text


def test_the_environment_names_the_code_that_runs() -> None:
    """Its own version, which an installation in place may not know, and the commit of the checkout."""
    found = describe()
    assert found["packages"]["kvbench"] == kvbench.__version__
    is_checkout = (Path(kvbench.__file__).parents[1] / ".git").exists()
    if not is_checkout or shutil.which("git") is None:
        pytest.skip("no checkout, or no git")
    assert re.fullmatch("[0-9a-f]{40}", found["code"]["commit"])
