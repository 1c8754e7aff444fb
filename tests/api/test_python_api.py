"""The public names: loaded when they are used, and used as the documentation says."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvbench
from kvbench.api.evaluate import spelled
from kvbench.api.identity import model_hash
from kvbench.errors import UserError
from kvbench.methods import METHODS
from kvbench.models.references import assets
from tests.helpers.harness import without_surroundings

ROOT = Path(__file__).parents[2]
LM_EVAL = ROOT / "docs" / "lm-eval.md"
EXAMPLES = ROOT / "examples"


def test_the_code_of_the_page_on_lm_eval_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a task of its own, since those of the harness are on the hub."""
    without_surroundings(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "The mill by the bridge stood still. " * 20}) + "\n")
    task = {
        "task": "rows", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}, "cache_dir": "cache"}, "doc_to_text": "{{text}}",
        "doc_to_target": "The mill",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    names: dict[str, Any] = {"MODEL": str(assets() / "kvbench-tiny")}
    [code] = re.findall(r"```python\n(.*?)```", LM_EVAL.read_text(), re.DOTALL)
    exec(compile(code.replace('["lambada_openai"]', "[TASK]"), str(LM_EVAL), "exec"), names | {"TASK": task})


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_and_are_short(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(path.read_text().splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("wrong", [{"methods": ["snapvk"]}, {"ratios": [1.5]}, {"sede": 1}, {"options": {"blok": 1}}])
def test_bad_requests_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    for measure in (kvbench.evaluate, kvbench.profile):
        with pytest.raises(UserError):
            measure(**wrong)
    with pytest.raises(UserError, match="not a run folder"):
        kvbench.load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_single_name_is_a_list_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Unknown method 'snapvk'"):
        kvbench.evaluate(methods="snapvk", ratios=0.5, tasks="minidocs")
    with pytest.raises(UserError, match="seq_len 8 is below 32"):
        kvbench.profile(methods="snapkv", ratios=0.5, seq_lens=8)


def test_method_objects_are_spelled_as_on_the_command_line() -> None:
    methods = [METHODS["snapkv"](), METHODS["snapkv"](window=16), "sinks"]
    assert spelled(methods) == ("snapkv", "snapkv:window=16", "sinks")


def test_results_are_loaded_without_pytorch() -> None:
    old = Path(__file__).parents[1] / "frozen" / "old_run"
    code = (
        f"import sys, kvbench; found = kvbench.load({str(old)!r}); assert len(found.frame()) == len(found.rows) > 100\n"
        "assert 'snapkv' in str(found) and found.ok\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_kvbench_loads_nothing() -> None:
    code = (
        "import sys, kvbench; assert 'compress' in dir(kvbench)\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_and_others_are_not() -> None:
    for name in kvbench.__all__:
        assert getattr(kvbench, name)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = kvbench.compres  # type: ignore[attr-defined]


def test_a_model_object_is_saved_once_and_measured(
    llama_4096: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {
        "methods": ["knorm"], "ratios": [0.5], "tasks": ["minidocs"], "limit": 1, "options": {"block": 64},
        "baselines": False, "threads": 1, "progress": False,
    }
    found = kvbench.evaluate(llama_4096, tokenizer=tiny_tokenizer, out="object", **asked)
    assert found.ok, found.failures
    (cell,) = {(row.model, row.ratio_realised) for row in found.rows if row.metric == "ppl" and row.method == "knorm"}
    assert f"LlamaForCausalLM-{model_hash(llama_4096)}" in cell[0]
    assert cell[1] == pytest.approx(0.5, abs=0.02)
    again = kvbench.evaluate(llama_4096, tokenizer=tiny_tokenizer, out="object", **asked)
    assert again.rows == found.rows
    assert not list((Path(os.environ["KVBENCH_CACHE"]) / "models").glob("*.part"))
    with pytest.raises(UserError, match="without its tokenizer"):
        kvbench.evaluate(llama_4096, **asked)
