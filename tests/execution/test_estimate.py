"""Estimates of a dry run: sizes from the configuration are those of the model, and what cannot fit is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.cache.shape import cache_shape
from kvbench.execution.estimate import speed_of
from kvbench.models.sizes import sizes_of
from tests.helpers.command import Call
from tests.helpers.models import CONTEXT, FAMILIES, small_model

ASKED = ["run", "--method", "sinks", "--ratio", "0.5", "--dry-run", "--threads", "1"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_sizes_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model: Any = small_model(kind)
    model.config.save_pretrained(tmp_path)
    found = sizes_of(tmp_path)
    assert found is not None
    assert found.layers == len(cache_shape(model).layers)
    assert found.entry_bytes == sum(4 * one.heads * (one.keys + one.values) for one in cache_shape(model).layers)
    assert found.context == CONTEXT
    assert found.vocabulary == model.config.vocab_size
    (tmp_path / "config.json").write_text("[]")
    assert sizes_of(tmp_path) is None


def test_time_and_memory_are_said(called: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    out = called([*ASKED, "--task", "minidocs", "--limit", "4"]).out
    assert re.search(r"Memory of kvbench-tiny: weights 10\.4 MiB, full cache of the longest text 3\.0 MiB", out)
    assert "NOT FIT" not in out
    assert re.search(r"About \d+ s on this machine", out)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Free", (), {"available": 1 << 20}))
    assert "NOT FIT" in called([*ASKED, "--task", "minidocs"]).out


def test_a_dialogue_is_read_at_every_step(
    called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of 400 characters, some 100 tokens: steps 1, 2 and 4 read 3, 4 and 6 of them."""
    monkeypatch.setattr("kvbench.execution.estimate.speed_of", lambda dtype: 1e9)  # a fast machine takes 0 s
    data = tmp_path / "turns.jsonl"
    data.write_text(json.dumps({"turns": ["word " * 80] * 6, "answer": "word"}) + "\n")
    out = called([*ASKED, "--task", "online", "--data", data]).out
    entry = 6144  # bytes of an entry of kvbench-tiny
    assert re.search(rf"full cache of the longest text {600 * entry / 2**20:.1f} MiB", out), out
    assert "About 0 s" not in out


def test_a_dtype_without_instructions_is_named(called: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some processors multiply in bfloat16 at a tenth of their speed in float32."""
    asked: list[str | Path] = [*ASKED, "--task", "minidocs", "--limit", "4", "--dtype"]
    speeds = {"bfloat16": 1e9, "float32": 1e10}
    monkeypatch.setattr("kvbench.execution.estimate.speed_of", speeds.__getitem__)
    assert "multiplies in bfloat16 at 0.10 of its speed in float32" in called([*asked, "bfloat16"]).out
    assert "multiplies in" not in called([*asked, "float32"]).out
    speeds["bfloat16"] = 2e10
    assert "multiplies in" not in called([*asked, "bfloat16"]).out


def test_the_estimate_knows_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    multiply = torch.mm

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        asked.append(a.dtype)
        return multiply(a, b)

    monkeypatch.setattr("torch.mm", watched)
    assert speed_of.__wrapped__("bfloat16") > 0
    assert speed_of.__wrapped__("auto") > 0
    assert set(asked[: len(asked) // 2]) == {torch.bfloat16}
    assert set(asked[len(asked) // 2 :]) == {torch.float32}


def test_samples_are_counted_and_not_texts(called: Call) -> None:
    out = called([*ASKED, "--task", "ruler-vt", "--no-baselines"]).out
    rows = [line for line in out.splitlines() if "│" in line and "ruler-vt" in line]
    assert len(rows) == 4
    assert all(re.search(r"│ 20 +│ 0 ", row) for row in rows)


def test_a_group_is_all_its_tasks(called: Call) -> None:
    out = called([*ASKED, "--task", "babi", "--set", "question=hidden", "--no-baselines"]).out
    assert [f"babi-{task}" in out for task in range(1, 6)] == [True] * 5


def test_a_method_that_cannot_be_used_on_one_of_two_tasks_is_left_out_of_it(
    called: Call, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """A text of some 60 tokens, of which SnapKV's window would be all that it keeps."""
    (tmp_path / "own.toml").write_text(
        'name = "own"\nversion = 1\nsummary = "own"\nkind = "answer"\nprotocols = ["answer"]\n[corpus]\n'
        'embedded = "minidocs.jsonl"\ncut = "document"\n[answer]\nrecipe = "passkey"\n'
    )
    asked = ["run", "--model", model_folder("llama"), "--method", "snapkv:window=100", "--ratio", "0.7", "--limit", "1",
             "--no-baselines", "--threads", "1", "--set", "question=hidden", "--set", "length=300"]
    both = called([*asked, "--task", tmp_path / "own.toml", "--task", "recall"])
    assert both.code == 0, both.err
    assert (both.out + both.err).count("left out: snapkv") == 1
    alone = called([*asked, "--task", tmp_path / "own.toml"])
    assert (alone.code, alone.out) == (2, "")
