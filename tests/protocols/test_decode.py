"""Removal while text is written: greedy texts are those of a loop over transformers' own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvbench.data.documents import load_corpus
from kvbench.data.tasks import load_task
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.protocols.decode import Decode
from kvbench.protocols.pieces import make_tokenizer
from kvbench.store.folder import RunFolder
from tests.helpers.command import Call, kvbench, refused

PREFIX, NEW, ENTRIES, EVERY = 80, 60, 48, 16
RUN = [
    "run", "--task", "minidocs-gen", "--protocol", "decode", "--limit", "2", "--no-baselines", "--threads", "1",
    "--metric", "bleu", "--set", f"prefix={PREFIX}", "--set", f"new_tokens={NEW}", "--set", f"entries={ENTRIES}",
    "--set", f"every={EVERY}",
]
METHODS = ["knorm", "sinks", "window", "streaming-llm:positions=absolute"]


@torch.inference_mode()
def written(model: Any, prefix: list[int], method: str) -> tuple[list[int], int]:
    """A greedy text, and the entries that are held when its last token is written."""
    cache, ids, place = DynamicCache(), list(prefix), 0
    fed, since, text = ids, 0, list[int]()
    positions = list(range(len(prefix)))
    while True:
        out = model(
            torch.tensor([fed]), past_key_values=cache, position_ids=torch.arange(place, place + len(fed))[None]
        )
        place += len(fed)
        since += 1 if text else 0
        if text and since == EVERY and method != "full":
            since = 0
            _remove(cache, positions, method)
        text.append(int(out.logits[0, -1].argmax()))
        if len(text) == NEW:
            return text, int(cache.layers[0].keys.shape[-2])
        fed = text[-1:]
        positions.append(place)


def _remove(cache: DynamicCache, positions: list[int], method: str) -> None:
    for layer in cache.layers:
        n = layer.keys.shape[-2]
        if method == "knorm":
            chosen = layer.keys.norm(dim=-1).topk(ENTRIES, largest=False).indices.sort(-1).values
        else:  # four sinks, and the last
            chosen = torch.tensor([*range(4), *range(n - ENTRIES + 4, n)]).expand(*layer.keys.shape[:2], -1)
        layer.keys = layer.keys.gather(-2, chosen[..., None].expand(-1, -1, -1, layer.keys.shape[-1]))
        layer.values = layer.values.gather(-2, chosen[..., None].expand(-1, -1, -1, layer.values.shape[-1]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("decode")
    asked = [part for method in METHODS for part in ("--method", method)]
    found = kvbench(*RUN, *asked, "--wide", "--out", folder / "run", cwd=folder)
    assert found.code == 0, found.err
    assert f"{ENTRIES} kept" in found.out
    assert "when the text has been written" in " ".join(found.out.split())
    return RunFolder(folder / "run")


def test_texts_are_those_of_a_loop(measured: RunFolder) -> None:
    loaded = load_model(resolve_model("kvbench-tiny"), "cpu", "float32")
    task, tokenizer = load_task("minidocs-gen"), make_tokenizer(loaded.tokenizer, "auto")
    options = {
        "prefix": str(PREFIX), "new_tokens": str(NEW), "decode": "greedy", "draws": "1", "top_p": "0.9",
        "temperature": "1", "batch": "auto", "chunk": "64", "bos": "auto", "entries": str(ENTRIES), "every": str(EVERY),
    }
    protocol = Decode.resolve(task, options, 1024, "kvbench-tiny")
    pieces = {d.id: cut.pieces for d, cut in protocol.pieces(load_corpus(task, None).documents, tokenizer, 0, False)}
    for cell in measured.cells():
        if cell.method not in ("full", "knorm", "streaming-llm"):
            continue
        for name, record in measured.texts(cell).items():
            text, held = written(loaded.model, list(pieces[name][0].ids[:PREFIX]), cell.method)
            [output] = record.outputs
            assert list(output.ids) == text[: len(output.ids)], (cell.method, name)
            if not output.ended:
                assert len(output.ids) == NEW
                assert record.raw == PREFIX + NEW - 1
                assert record.held == held


def test_caches_do_not_grow(measured: RunFolder) -> None:
    for cell in measured.cells():
        for record in measured.texts(cell).values():
            if cell.method in ("sinks", "window"):
                assert record.held <= ENTRIES
            elif cell.method in ("knorm", "streaming-llm"):
                assert record.held < ENTRIES + EVERY
                assert record.peak == PREFIX + EVERY
            if cell.method not in ("full", "human"):
                assert record.kv_logical / record.kv_full == pytest.approx(record.held / record.raw, abs=0.01)


def test_what_cannot_be_had_is_refused(called: Call) -> None:
    refused(called, [*RUN, "--method", "kivi"], "holds a constant number of entries", "Leave it out")
    refused(called, [*RUN, "--method", "knorm", "--ratio", "0.5"], "--ratio has no meaning")
    refused(called, [*RUN, "--method", "knorm", "--set", "every=64"], "nothing would ever be removed")
    refused(called, [*RUN, "--method", "knorm", "--set", "entries=160"], "nothing would ever be removed")
    refused(called, [*RUN, "--method", "local"], "local holds", "keeps 48")
    refused(called, [*RUN, "--method", "knorm", "--budget-tokens", "64"], "Use --set entries=")
    refused(called, [*RUN, "--method", "knorm", "--set", "step=8"], "--set every=")
    refused(called, ["run", "--task", "minidocs", "--protocol", "decode", "--method", "knorm"], "not measured with")
