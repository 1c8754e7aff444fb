"""Adapters: exact when closed, plain LoRA when open, refused when they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kvbench.errors import UserError
from kvbench.models.adapter import CARD, ROWS, WEIGHTS, Adapter, read_card
from kvbench.models.lora import attention_linears
from tests.helpers.models import VOCABULARY, small_adapter, small_model

IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_closed_gate_is_the_base_model_bit_for_bit(model: nn.Module) -> None:
    adapter, base = small_adapter(model), model(IDS).logits
    with adapter.applied(model):
        adapter.open_gate(torch.empty(0, dtype=torch.long))
        assert torch.equal(model(IDS).logits, base)
        adapter.open_gate(torch.tensor([5, 20]))
        changed = (model(IDS).logits - base).abs().amax(dim=(0, 2))
    assert changed[:5].max() == 0
    assert changed[5] > 1e-3
    assert torch.equal(model(IDS).logits, base)


@torch.inference_mode()
def test_an_adapter_never_acts_twice(llama: nn.Module) -> None:
    adapter = small_adapter(llama, "plain")
    with adapter.applied(llama):
        once = llama(IDS).logits
        with adapter.applied(llama):
            assert torch.equal(llama(IDS).logits, once)
        assert torch.equal(llama(IDS).logits, once)


@pytest.mark.parametrize("gate", ["gated", "plain", "full"])
@torch.inference_mode()
def test_closing_inside_is_the_base_model_bit_for_bit(model: nn.Module, gate: str) -> None:
    """The teacher of a distillation is the base model, whatever is trained; tied weights included."""
    adapter, base = small_adapter(model, gate), model(IDS).logits
    with adapter.applied(model):
        adapter.open_gate(torch.arange(40))
        assert (model(IDS).logits - base).abs().max() > 1e-3
        with adapter.closed(model):
            assert torch.equal(model(IDS).logits, base)
        assert (model(IDS).logits - base).abs().max() > 1e-3
    assert torch.equal(model(IDS).logits, base)


@torch.inference_mode()
def test_whole_weights_are_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    adapter = small_adapter(model, "full")
    adapter.save(tmp_path / "adapter", "small")
    with adapter.applied(model):
        ours = model(IDS).logits
    loaded = Adapter.load(tmp_path / "adapter", small_model(family))
    with loaded.applied(model):
        assert torch.equal(model(IDS).logits, ours)


def test_the_model_is_restored_after_an_error(llama: nn.Module) -> None:
    before = dict(llama.named_modules())
    with pytest.raises(RuntimeError, match="planted"), small_adapter(llama).applied(llama):
        raise RuntimeError("planted")
    assert dict(llama.named_modules()) == before


def test_every_family_has_its_attention_projections(family: str, model: nn.Module) -> None:
    names = {path.rpartition(".")[2] for path in attention_linears(model)}
    assert names == {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mistral": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "neox": {"query_key_value", "dense"},
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
        "gpt2": {"c_attn", "c_proj"},
    }[family]


@torch.inference_mode()
def test_saved_and_loaded_by_us_and_by_peft(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = small_model(family)
    adapter = small_adapter(model, "plain")
    adapter.save(tmp_path / "adapter", "small")
    with adapter.applied(model):
        adapter.open_gate(torch.empty(0, dtype=torch.long))
        ours = model(IDS).logits
    loaded = Adapter.load(tmp_path / "adapter", model)
    assert torch.equal(loaded.rows, adapter.rows)
    with loaded.applied(model):
        loaded.open_gate(torch.empty(0, dtype=torch.long))
        assert torch.equal(model(IDS).logits, ours)
    peft = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert (peft(IDS).logits - ours).abs().max() < 1e-5
    assert (ours - small_model(family)(IDS).logits).abs().max() > 1e-2


def test_loading_refuses_what_does_not_fit(tmp_path: Path, llama: nn.Module) -> None:
    folder = tmp_path / "adapter"
    small_adapter(llama).save(folder, "small")
    with pytest.raises(UserError, match="does not fit this model"):
        Adapter.load(folder, small_model("gpt2"))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read"):
        Adapter.load(folder, llama)
    (folder / ROWS).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Adapter.load(folder, llama)
    (folder / CARD).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_card(folder)
    (folder / CARD).unlink()
    with pytest.raises(UserError, match="not an adapter folder"):
        read_card(folder)


def test_card_says_what_it_is(tmp_path: Path, llama: nn.Module) -> None:
    small_adapter(llama).save(tmp_path / "adapter", "small")
    card = json.loads((tmp_path / "adapter" / CARD).read_text())
    assert card["method"] == "sentinel"
    assert card["gate"] == "gated"
    assert read_card(tmp_path / "adapter").rank == 4
