"""``compress``: a method around a model's own ``generate`` gives what kvbench's own loop gives, row by row."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvbench.api.compress import compress
from kvbench.inference.compressed_cache import seed_of
from kvbench.inference.generation import generate, greedy, read_prompt
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.sampling import Sampling
from kvbench.methods import METHODS, CachePolicy, make_method
from tests.helpers.models import FAMILIES, VOCABULARY, adapter_for, small_model

N, NEW = 60, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 4}, "pyramidkv": {"window": 4}, "adakv": {"window": 4}, "chunkkv": {"window": 4},
    "expected-attention": {"future": 16}, "kivi": {"group": 8, "recent": 8}, "think": {"recent": 8, "window": 4},
    "h2o": {}, "refreshkv": {"window": 4},
}
POLICIES = [name for name, kind in METHODS.items() if issubclass(kind, CachePolicy)]
LAYOUTS = ["full", "none", "window", "sinks", "local", "scattered"]
GENERATE: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 10_000, "pad_token_id": 0}


def ids_of(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random rows, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
    width = max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = row, 1
    return ids, mask


def given_to(name: str) -> dict[str, Any]:
    known = METHODS[name].options()
    return {key: value for key, value in OPTIONS.get(name, {}).items() if key in known}


def ratio_of(name: str) -> str:
    return "0" if not make_method(name, Fraction(0), {}).uses_ratio(False) else "0.3" if name == "think" else "0.5"


def ours(model: nn.Module, name: str, ids: Tensor, during: str) -> Tensor:
    """What the loop of kvbench writes after a row, ``[1, NEW]``."""
    options = {key: str(value) for key, value in given_to(name).items()}
    method = make_method(name, Fraction(ratio_of(name)), options)
    planned = ids.shape[1] + (NEW if during == "both" else 0)
    adapter = adapter_for(model, method)
    with torch.no_grad(), prepared(model, adapter, ids.shape[1] + NEW):
        text = Text(ids.shape[1], planned, (seed_of(ids[0]),), has_continuation=True)
        session = open_session(model, method, text, adapter=adapter, chunk=ids.shape[1], at_once=True)
        logits = read_prompt(session, ids)
        if during == "both":
            return torch.stack(list(generate(session, logits, greedy(1, NEW), Sampling())), 1)
        written = [logits.argmax(-1)]
        while len(written) < NEW:
            *_, part = session.extend(written[-1][:, None])
            written.append(part.logits[:, -1].argmax(-1))
    return torch.stack(written, 1)


@pytest.mark.parametrize("during", ["prefill", "both"])
@pytest.mark.parametrize("name", [*LAYOUTS, *POLICIES])
def test_generate_equals_our_loop_row_by_row(llama: nn.Module, name: str, during: str) -> None:
    ids, mask = ids_of(N, 41, N, 33)
    asked = None if ratio_of(name) == "0" else ratio_of(name)
    with compress(llama, name, asked, during=during, **given_to(name)) as run:
        out: Tensor = llama.generate(ids, attention_mask=mask, **GENERATE)  # type: ignore[operator]
    for row in range(len(ids)):
        alone = ids[row, mask[row].bool()][None]
        assert torch.equal(out[row, N:], ours(llama, name, alone, during)[0]), (name, row)
    assert run.report.tokens == int(mask.sum()) + len(ids) * (NEW - 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_removed_is_the_models_own_generate(kind: str, attention: str) -> None:
    """Token by token, with and without padding; afterwards the model is as it was."""
    model: Any = small_model(kind)
    model.set_attn_implementation(attention)
    for lengths in ((N, N), (N, 33, 47)):
        ids, mask = ids_of(*lengths)
        stock = model.generate(ids, attention_mask=mask, **GENERATE)
        for name in ("full", "knorm"):
            with compress(model, name, None if name == "full" else 0):
                assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATE), stock)
        assert model.config._attn_implementation == attention
        assert not {"generate", "forward"} & set(vars(model))
        assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATE), stock)


def test_it_is_the_loop_of_transformers(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = type(llama)._sample
    monkeypatch.setattr(type(llama), "_sample", lambda *args, **more: calls.append(1) or own(*args, **more))
    with compress(llama, "knorm", 0.5):
        llama.generate(ids_of(N)[0], **GENERATE)
    assert calls == [1]
