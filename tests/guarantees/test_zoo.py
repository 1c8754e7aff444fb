"""Types of models: each is read as its own plain forward pass reads it, or refused by a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kvbench.errors import UserError
from kvbench.inference.opening import check_method
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.reader import Reader
from kvbench.methods import make_layout
from kvbench.methods.layouts.full import Full
from kvbench.methods.policies.h2o import H2O
from kvbench.models.attention import register
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import _check_attention
from kvbench.probe.probing import examine
from tests.helpers.sessions import read_all
from tests.helpers.zoo import zoo_config, zoo_model, zoo_text

ADMITTED = (
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "phi", "phi3", "gemma", "gemma3_text", "olmo",
    "olmo2", "olmo3", "cohere", "cohere2", "glm", "glm4", "glm4_moe", "granite", "granitemoe", "starcoder2",
    "smollm3", "exaone4", "ernie4_5", "hunyuan_v1_dense", "helium", "nemotron", "mixtral", "qwen2_moe",
    "qwen3_moe",
    "gpt_bigcode", "bitnet", "arcee", "llama4_text", "seed_oss", "ministral3", "internlm3", "olmoe",
    "phimoe", "persimmon", "apertus", "gemma4_text", "gemma3n_text",
)
"""Read right, in full and under a policy."""

LAYOUTS_ONLY = {
    "gemma2": "caps the logits", "gpt_oss": "learned sinks", "diffllama": "attention is computed 2 times",
    "deepseek_v2": "caches other keys than it attends", "deepseek_v3": "caches other keys than it attends",
    "jetmoe": "caches other keys than it attends", "doge": "masks of their own",
}
"""Read right in full, refused under policies."""

REFUSED = {
    "bert": "attends tokens that come later", "lfm2": "conv", "granitemoehybrid": "linear_attention",
    "qwen3_next": "linear_attention", "mamba": "a way of its own", "minimax": "linear_attention",
    "jamba": "linear_attention",
    "bloom": "a way of its own", "falcon": "a way of its own", "xglm": "a way of its own", "gptj": "a way of its own",
    "stablelm": "a way of its own", "biogpt": "a way of its own",
}
"""Refused altogether."""

LENGTH = 48
TOLERANCE = 1e-4


def own_logits(kind: str) -> Tensor:
    """The model's own forward pass with its own plain attention; ids, nothing stored."""
    with torch.inference_mode():
        logits: Tensor = zoo_model(kind)(input_ids=zoo_text(LENGTH), use_cache=False).logits
    return logits


def full_logits(model: nn.Module) -> Tensor:
    layout = make_layout(Full(), LENGTH, 0, 0)
    with torch.inference_mode():
        return read_all(Reader(model), zoo_text(LENGTH), layout, 7).logits


def policy_logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return torch.cat([p.logits for p in PolicySession(model, H2O(), LENGTH, (0,)).prefill(zoo_text(LENGTH))], 1)


def test_many_types_are_admitted() -> None:
    assert len(ADMITTED) >= 35
    assert len(ADMITTED) + len(LAYOUTS_ONLY) + len(REFUSED) >= 40


@pytest.mark.parametrize("kind", [*ADMITTED, *LAYOUTS_ONLY])
def test_what_is_admitted_is_read_as_the_model_reads(kind: str) -> None:
    model, own, facts = zoo_model(kind, register()), own_logits(kind), checked(kind)
    facts.check_length(kind, LENGTH, "")
    assert float((full_logits(model) - own).abs().max()) < TOLERANCE
    if kind in LAYOUTS_ONLY:
        with pytest.raises(UserError, match=LAYOUTS_ONLY[kind]):
            check_method(H2O(), model, kind, facts)
    else:
        check_method(H2O(), model, kind, facts)
        assert float((policy_logits(model) - own).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_is_refused_says_on_what_it_rests(kind: str) -> None:
    with pytest.raises(UserError, match=REFUSED[kind]) as refusal:
        checked(kind)
    assert refusal.value.exit_code == 2


def checked(kind: str) -> ModelFacts:
    """As a model is checked that is loaded from a folder."""
    _check_attention(AutoModelForCausalLM, zoo_config(kind))
    facts = examine(zoo_model(kind, register()), zoo_text(LENGTH, 1))
    facts.check(kind)
    return facts
