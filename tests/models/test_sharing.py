"""Layers that read another layer's entries: against a forward pass written out, with every kind of method on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.cache.shape import cache_shape
from kvbench.errors import UserError
from kvbench.inference.reader import Reader
from kvbench.methods import make_layout
from kvbench.models.references import resolve_model
from kvbench.models.sharing import Sharing, share_layers
from tests.helpers.models import FAMILIES, adapter_for, normalises_keys, small_model
from tests.helpers.policies import LENGTH, masked, policy_of, read, text
from tests.helpers.sessions import layout_method, read_all

PATTERNS = ((0, 0, 2), (0, 1, 1), (0, 0, 0))


def shared_model(family: str, sources: tuple[int, ...] = (0, 0, 2)) -> nn.Module:
    model = small_model(family)
    share_layers(model, Sharing(sources), family)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def sharing(request: pytest.FixtureRequest) -> nn.Module:
    return shared_model(request.param)


def written_out(model: Any, ids: Tensor, sources: tuple[int, ...]) -> Tensor:
    """A Llama's logits by its weights alone, with keys and values of the source layers."""
    heads, shared, width = 4, 2, 16
    places = torch.arange(ids.shape[1]).float()
    angle = places[:, None] * 10000.0 ** (-torch.arange(width // 2).float() / (width // 2))
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def split(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, width).transpose(1, 2)

    x, entries = model.model.embed_tokens(ids), {}
    for number, layer in enumerate(model.model.layers):
        normed, attention = layer.input_layernorm(x), layer.self_attn
        query = turned(split(attention.q_proj(normed), heads))
        if sources[number] == number:
            entries[number] = (
                turned(split(attention.k_proj(normed), shared)), split(attention.v_proj(normed), shared)
            )
        keys, values = (each.repeat_interleave(heads // shared, 1) for each in entries[sources[number]])
        out = functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(model.model.norm(x))
    return logits


@pytest.mark.parametrize("sources", PATTERNS)
@torch.inference_mode()
def test_it_is_the_forward_pass_written_out(sources: tuple[int, ...]) -> None:
    """Without a cache, and with transformers' own, which holds the source layers only."""
    from transformers import DynamicCache

    model, ids = shared_model("llama", sources), text()
    expected, cache = written_out(model, ids, sources), DynamicCache()
    assert float((model(input_ids=ids, use_cache=False).logits - expected).abs().max()) < 1e-5
    parts = [model(input_ids=part, past_key_values=cache).logits for part in torch.split(ids, 40, 1)]
    assert float((torch.cat(parts, 1) - expected).abs().max()) < 1e-5
    assert [layer.keys.shape[-2] for layer in cache.layers] == [LENGTH] * len(set(sources))


@torch.inference_mode()
def test_to_share_nothing_is_the_model_bit_for_bit(family: str, model: nn.Module) -> None:
    assert torch.equal(shared_model(family, (0, 1, 2))(input_ids=text()).logits, model(input_ids=text()).logits)


@torch.inference_mode()
def test_projections_that_are_not_read_make_no_difference() -> None:
    model, ids = shared_model("llama"), text()
    before = model(input_ids=ids).logits
    model.get_parameter("model.layers.1.self_attn.k_proj.weight").fill_(3.0)
    model.get_parameter("model.layers.1.self_attn.v_proj.weight").fill_(3.0)
    assert torch.equal(before, model(input_ids=ids).logits)
    model.get_parameter("model.layers.1.self_attn.q_proj.weight").fill_(3.0)
    assert not torch.equal(before, model(input_ids=ids).logits)


@pytest.mark.parametrize(("name", "ratio"), [
    ("full", "0"), ("local", "0.7"), ("sentinel", "0.7"), ("meanpool", "0.8"), ("ccm-merge", "0"), ("beacon", "0.7"),
])
@torch.inference_mode()
def test_layouts_stream_as_in_one_pass(sharing: nn.Module, name: str, ratio: str) -> None:
    """On every family, with the bytes of two of three layers, counted against all three."""
    method, ids = layout_method(name, ratio), text()
    layout = make_layout(method, LENGTH, 0, 0)
    reader = Reader(sharing, adapter_for(sharing, method))
    with reader.ready():
        masked_pass = reader.one_pass(ids, layout)
        session = read_all(reader, ids, layout, 7)
    assert float((session.logits - masked_pass).abs().max()) < 1e-5
    found, entry = session.session.bytes(), cache_shape(sharing).entry_bytes
    assert len(session.session.cache.layers) == 2
    assert found.logical == found.physical == 2 * entry * len(layout.held_after(len(layout)))
    assert found.full == 2 * LENGTH * entry * 3 // 2


@pytest.mark.parametrize("name", ["snapkv", "h2o", "lagkv", "adakv", "expected-attention"])
def test_policies_remove_what_a_mask_hides(sharing: nn.Module, name: str) -> None:
    """By the queries of the layers that keep entries; those that share them see the same choice."""
    ids = text()
    logits, run = read(sharing, policy_of(name, step="7"), ids)
    assert float((logits - masked(sharing, run, ids)).abs().max()) < 1e-5
    assert len(run.cache.layers) == 2
    assert run.bytes().full == 3 * LENGTH * run.cache.layers[0].entry_bytes()


def test_coordinates_are_those_of_the_layers_that_keep_entries(sharing: nn.Module) -> None:
    if normalises_keys(sharing):
        pytest.skip("refused: test_latents.py")
    _, run = read(sharing, policy_of("lorc", "0.5"), text())
    share = run.bytes().logical / run.bytes().full
    assert share == pytest.approx(2 / 3 * 0.5, abs=0.02)


@pytest.mark.parametrize(("pattern", "layers", "sources"), [
    ("pairs", 6, (0, 0, 2, 2, 4, 4)), ("pairs", 5, (0, 0, 2, 2, 4)), ("yoco", 6, (0, 1, 2, 2, 2, 2)), ("yoco", 1, (0,)),
    ("0_0_2_0", 4, (0, 0, 2, 0)),
])
def test_patterns(pattern: str, layers: int, sources: tuple[int, ...]) -> None:
    assert Sharing.parse(pattern, layers).sources == sources


@pytest.mark.parametrize(("pattern", "message"), [
    ("0_0_2_2", "names 4 layers, and the model has 6"), ("0_2_2_3_4_5", "layer 1 cannot read from layer 2, which lies"),
    ("0_0_1_3_4_5", "layer 2 cannot read from layer 1, which keeps nothing itself"), ("triples", "is unknown"),
    ("", "is unknown"),
])
def test_bad_patterns(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_model(f"kvbench-tiny:share={pattern}")


RUN = ["run", "--task", "minidocs", "--limit", "2", "--no-baselines", "--json"]


def test_a_run_is_of_the_model_that_shares(tmp_path: Path, called: Callable[..., Any]) -> None:
    """Its own fingerprint and half of the bytes; weights that were trained so give the same as their adapter."""
    story = tmp_path / "story.txt"
    story.write_text("The lamp was lit again, and the keeper wrote the hour in his book. " * 60)
    trained = tmp_path / "shared"
    found = called(["train", "--share", "pairs", "--method", "adapted", "--set", "adapter=full", "--data", str(story),
                    "--steps", "2", "--length", "64", "--batch-size", "1", "--out", str(trained)])
    assert found.code == 0, found.err
    pairs = called([*RUN, "--share", "pairs", "--method", "local", "--method", "adapted", "--ratio", "0.7",
                    "--adapter", str(trained), "--out", str(tmp_path / "pairs")])
    weights = called([*RUN, "--share", str(trained), "--method", "local", "--ratio", "0.7",
                      "--out", str(tmp_path / "weights")])
    assert (pairs.code, weights.code) == (0, 0), pairs.err + weights.err
    rows = {row["method"]: row for row in json.loads(pairs.out)["rows"] if row["metric"] == "ppl"}
    own = {row["method"]: row for row in json.loads(weights.out)["rows"] if row["metric"] == "ppl"}
    assert rows["adapted"]["value"] == pytest.approx(own["full"]["value"], rel=1e-6)
    assert rows["full"]["value"] != pytest.approx(own["full"]["value"], rel=1e-3)
    assert rows["full"]["model"] == "kvbench-tiny:share=pairs"
    held = {row["method"]: row["value"] for row in json.loads(pairs.out)["rows"] if row["metric"] == "kv_bytes_logical"}
    whole = {row["method"]: row["value"] for row in json.loads(pairs.out)["rows"] if row["metric"] == "kv_bytes_full"}
    assert held["full"] / whole["full"] == pytest.approx(0.5)
    assert held["local"] / whole["local"] == pytest.approx(0.15, abs=0.002)


@pytest.mark.parametrize(("words", "message"), [
    (["run", "--share", "pairs", "--method", "sentinel"], "needs an adapter trained for kvbench-tiny:share=pairs"),
    (["run", "--share", "thirds"], "--share thirds is unknown"),
    (["run", "--share", "pairs", "--model", "kvbench-tiny:share=yoco"], "differ"),
    (["profile", "--share", "pairs", "--model", "shape:gpt2"], "has none"),
    (["train", "--share", "pairs", "--method", "adapted", "--set", "objective=distil", "--data", "README.md", "--out",
      "x"], "would learn from the shared model"),
])
def test_what_cannot_share_is_a_sentence(words: list[str], message: str, called: Callable[..., Any]) -> None:
    found = called(words)
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err
