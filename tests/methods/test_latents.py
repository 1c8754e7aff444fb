"""LoRC's cache of coordinates: what is rebuilt is what low-rank weights compute, and as few bytes as the ranks say."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

from kvbench.cache.latents import Latents
from kvbench.errors import UserError
from kvbench.inference.opening import check_method
from kvbench.inference.policy_session import PolicySession
from kvbench.methods import kept
from kvbench.methods.policies.lorc import LoRC
from kvbench.methods.policies.low_rank import columns_of, shared_out
from kvbench.models.facts import ModelFacts
from tests.helpers.models import VOCABULARY, normalises_keys, small_model
from tests.helpers.policies import LENGTH, policy_of, read, text

RANKS = ("progressive", "uniform")


def with_weights_of_low_rank(model: Any, ranks: tuple[int, ...]) -> Any:
    """A copy of a Llama whose weights are the best of these ranks, by their own decomposition."""
    other = copy.deepcopy(model)
    for layer, rank in zip(other.model.layers, ranks, strict=True):
        for module in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            module.weight.data = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    return other


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("ratio", ["0.25", "0.5", "0.75"])
def test_logits_are_those_of_a_model_with_such_weights(llama: nn.Module, ratio: str, ranks: str) -> None:
    """In one forward pass of its own, however the text is cut, and token by token after it."""
    ids, policy = text(), policy_of("lorc", ratio, step="7", ranks=ranks)
    assert isinstance(policy, LoRC)
    with torch.inference_mode():
        expected = with_weights_of_low_rank(llama, policy.by_layer(llama))(input_ids=ids).logits
        for chunk in (7, 40, None):
            run = PolicySession(llama, policy, LENGTH - 9, (3, 5), chunk=chunk)
            logits = [part.logits for part in run.prefill(ids[:, : LENGTH - 9])]
            logits += [run.step(ids[:, place])[:, None] for place in range(LENGTH - 9, LENGTH)]
            assert float((torch.cat(logits, 1) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_are_those_of_the_ranks(model: nn.Module, ranks: str) -> None:
    """On every family: 2 r numbers for a token and layer instead of 2 d; kept(d, r) on average over the layers."""
    if normalises_keys(model):
        pytest.skip("refused")
    policy = policy_of("lorc", "0.6", ranks=ranks)
    assert isinstance(policy, LoRC)
    by_layer, size = policy.by_layer(model), columns_of(model)
    assert sum(by_layer) == len(by_layer) * kept(size, Fraction(3, 5))
    assert (len(set(by_layer)) == 1) is (ranks == "uniform")
    _, run = read(model, policy, text())
    assert run.cache.logical_bytes() == 2 * LENGTH * 2 * sum(by_layer) * 4
    assert run.cache.physical_bytes() == run.cache.logical_bytes()
    assert [len(layer.packed) for layer in run.cache.layers] == [1] * len(by_layer)
    assert run.cache.mean_entries() == pytest.approx(LENGTH * sum(by_layer) / len(by_layer) / size)
    assert [layer.held for layer in run.cache.layers] == [LENGTH] * len(by_layer)


def test_entries_are_rebuilt_where_they_stood(model: nn.Module) -> None:
    """On every family, biases and rotations included: against the entries of a cache that stores them whole."""
    if normalises_keys(model):
        pytest.skip("refused")
    ids, policy = text(), policy_of("lorc", "0.5", step="7")
    packed = PolicySession(model, policy, LENGTH, (3, 5))
    whole = PolicySession(model, policy, LENGTH, (3, 5))
    with torch.inference_mode():
        for start in range(0, 63, 7):
            packed.feed(ids[:, start : start + 7])
            packed.remove()
            whole.feed(ids[:, start : start + 7])
    for mine, theirs in zip(packed.cache.layers, whole.cache.layers, strict=True):
        assert isinstance(mine.packed[0], Latents)
        assert mine.keys.shape[2] == 0
        for one, other in zip(mine.present(), theirs.present(), strict=True):
            assert float((one - other).abs().max()) < 1e-4
        spare, _ = mine.packed[0].unpack(3)
        assert spare.shape[2] == 63 + 3
        assert torch.equal(spare[:, :, :63], mine.present()[0])


def test_keys_that_are_normalised_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="Qwen3ForCausalLM changes its keys or values after their projection"):
        check_method(policy_of("lorc"), small_model("qwen3"), "qwen3", ModelFacts("Qwen3ForCausalLM"))


def test_values_that_are_limited_are_refused_by_name() -> None:
    model: Any = small_model("llama")
    model.config.clip_qkv = 30.0  # too high for the text that is tried
    with pytest.raises(UserError, match="a limit"):
        check_method(policy_of("lorc"), model, "olmo", ModelFacts("Olmo"))


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_models_as_they_are_loaded_by_others(family: str) -> None:
    """With parameters that want gradients, in half precision, outside any inference mode; a cache can be copied."""
    model = small_model(family).requires_grad_(True).to(torch.bfloat16)
    policy = policy_of("lorc", "0.5", step="7")
    check_method(policy, model, family, ModelFacts(family))
    run = PolicySession(model, policy, 40, (3, 5), chunk=40)
    with torch.no_grad():
        for _ in run.prefill(text(40)):
            pass
        layers = copy.deepcopy(run.cache.layers)
    mine, theirs = run.cache.layers[0].packed[0], layers[0].packed[0]
    assert isinstance(mine, Latents)
    assert isinstance(theirs, Latents)
    assert theirs.keys.data_ptr() != mine.keys.data_ptr()
    assert theirs.of_keys is mine.of_keys, "the bases belong to the model"
    assert run.cache.logical_bytes() < 0.6 * 40 * run.cache.entry_bytes()


@given(
    some.lists(some.floats(0.25, 1), min_size=1, max_size=9), some.integers(1, 40), some.floats(0, 1),
)
def test_ranks_are_shared_out_whole(weights: list[float], most: int, part: float) -> None:
    layers = len(weights)
    total = layers + round(part * layers * (most - 1))
    found = shared_out(total, tuple(weights), most)
    assert sum(found) == total
    assert 1 <= min(found) <= max(found) <= most
    for one, other in zip(range(layers), reversed(range(layers)), strict=True):
        if weights[one] > weights[other]:
            assert found[one] >= found[other]


def test_the_first_layers_get_the_highest_ranks(llama: nn.Module) -> None:
    policy = policy_of("lorc", "0.5", ranks="progressive")
    assert isinstance(policy, LoRC)
    ranks = policy.by_layer(llama)
    assert list(ranks) == sorted(ranks, reverse=True)
    assert ranks[-1] == pytest.approx(ranks[0] / 2, abs=1)


def test_texts_are_written_from_coordinates(llama: nn.Module) -> None:
    ids, policy = text(40), policy_of("lorc", "0.5", step="4")
    run = PolicySession(llama, policy, 40, (3, 5), chunk=40)
    with torch.inference_mode():
        for _ in run.prefill(ids):
            pass
        run.expand(2)
        token = torch.arange(4) % VOCABULARY
        for _ in range(9):
            assert torch.isfinite(run.step(token)).all()
    assert run.cache.layers[0].packed[0].tensors()[0].shape[:2] == (4, 48)
    assert run.cache.layers[0].keys.shape[2] == 1
