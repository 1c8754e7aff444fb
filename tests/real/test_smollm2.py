"""A real model, fetched by ``make real``: its numbers against transformers' own forward pass; run by make test-real."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.data.documents import embedded_documents
from kvbench.errors import UserError
from kvbench.models.packaged import PACKAGED
from tests.helpers.command import Call

pytestmark = pytest.mark.real
NAME = "smollm2-135m"
THERE = os.environ.get("KVBENCH_CACHE")
"""The user's cache, before the tests were given one of their own."""


@pytest.fixture(autouse=True)
def _cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    if THERE:
        monkeypatch.setenv("KVBENCH_CACHE", THERE)
    else:
        monkeypatch.delenv("KVBENCH_CACHE")
    try:
        PACKAGED[NAME].folder()
    except UserError as error:
        pytest.fail(str(error))


def test_the_full_cache_is_transformers_own_forward_pass(called: Call) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = PACKAGED[NAME].folder()
    found = called(["run", "--model", NAME, "--method", "knorm", "--ratio", "0.5", "--task", "minidocs", "--limit", "2",
                    "--set", "block=256", "--no-baselines", "--json"])
    assert found.code == 0, found.err
    [row] = [row for row in found.document["rows"]
             if (row["method"], row["metric"], row["params"]["bin"]) == ("full", "nll", None)]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for document in embedded_documents()[:2]:
        ids = tokenizer(document.text, return_tensors="pt").input_ids[0]
        for block in ids.split(256):
            if len(block) >= 32:
                with torch.no_grad():
                    logits = model(block[None]).logits[0, :-1].log_softmax(-1)
                total -= float(logits.gather(-1, block[1:, None]).sum())
                count += len(block) - 1
    assert row["value"] == pytest.approx(total / count, abs=1e-4)


def test_it_finds_needles(called: Call) -> None:
    found = called(["run", "--model", NAME, "--method", "snapkv", "--ratio", "0.5", "--task", "ruler-niah-single-2",
                    "--limit", "5", "--set", "length=1024", "--set", "stop=line", "--set", "question=hidden",
                    "--no-baselines", "--json"])
    assert found.code == 0, found.err
    accuracy = {row["method"]: row["value"] for row in found.document["rows"] if row["metric"] == "answer_accuracy"}
    assert accuracy["full"] >= 0.8


def test_the_name_is_the_hash_of_the_file(called: Call, tmp_path: Path) -> None:
    from kvbench.models.references import resolve_model

    reference = resolve_model(NAME)
    assert (reference.short_name, reference.fingerprint) == (NAME, f"{PACKAGED[NAME].gguf[:16]}.1")
    assert reference.weight_bytes == 538_090_408
