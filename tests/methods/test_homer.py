"""HOMER: contexts read in chunks that are merged in pairs, against a slow loop over layers and chunks."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kvbench.errors import UserError
from kvbench.inference.homer import HomerSession
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.methods import kept, make_method
from kvbench.methods.prefixes.homer import Homer
from kvbench.models.attention import register
from tests.helpers.models import VOCABULARY, small_config

N, MORE = 120, 12


def ids(n: int = N, seed: int = 3, rows: int = 2) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(seed))


def homer(ratio: str, **options: str) -> Homer:
    method = make_method("homer", Fraction(ratio), {"suffix": "8", **options})
    assert isinstance(method, Homer)
    return method


def opened(model: nn.Module, ratio: str, rows: int = 2, **options: str) -> HomerSession:
    text = Text(N, N, (0,) * rows, has_continuation=True)
    session = open_session(model, homer(ratio, **options), text)
    assert isinstance(session, HomerSession)
    return session


def read(model: nn.Module, ratio: str, text: Tensor | None = None, **options: str) -> tuple[HomerSession, Tensor]:
    """The session after a context, and logits of its last token and of what follows."""
    given = ids() if text is None else text
    with torch.inference_mode(), prepared(model, None, N + MORE):
        session = opened(model, ratio, len(given), **options)
        (last,) = session.prefill(given, N - 1)
        (more,) = session.extend(ids(MORE, 4)[: len(given)])
    return session, torch.cat([last.logits, more.logits], 1)


@given(
    n=st.integers(64, 3000), layers=st.integers(2, 40), ratio=st.sampled_from(["0", "0.1", "0.3", "0.5", "0.7", "0.8"]),
)
def test_what_is_held_is_exact_and_chunks_cover_the_text(n: int, layers: int, ratio: str) -> None:
    method = homer(ratio)
    if method.ratio and kept(n, method.ratio) < 28:
        with pytest.raises(UserError, match="need"):
            method.plan(n, layers)
        return
    plan = method.plan(n, layers)
    chunks = 2 ** len(plan.levels)
    assert plan.entries == kept(n, method.ratio)
    assert plan.sinks + plan.chunk * chunks + plan.suffix == n
    if plan.levels:
        assert plan.held - plan.held // 2 <= plan.chunk, "a chunk has what it keeps"
        assert plan.levels[0] > 0
        assert plan.levels[-1] < layers
        assert plan.positions < n
    else:
        assert plan.positions == n
        assert not method.ratio


def test_one_chunk_is_the_full_cache(model: nn.Module) -> None:
    session, found = read(model, "0")
    full = model(torch.cat([ids(), ids(MORE, 4)], 1)).logits[:, N - 1 :]
    assert (found - full).abs().max() < 1e-5
    assert session.kept == N + MORE


def slow(model: Any, text: Tensor, method: Homer) -> list[list[int]]:
    """Which tokens of one Llama's context are held in the end: chunk by chunk, layer by layer, in plain loops."""
    plan = method.plan(N, len(model.model.layers))
    count = 2 ** len(plan.levels)
    sinks, suffix = list(range(plan.sinks)), list(range(N - plan.suffix, N))
    chunks = [
        {"ids": [*sinks, *range(plan.sinks + i * plan.chunk, plan.sinks + (i + 1) * plan.chunk), *suffix]}
        for i in range(count)
    ]
    for chunk in chunks:
        chunk["hidden"] = model.model.embed_tokens(text[None, chunk["ids"]])
        chunk["place"] = torch.arange(plan.positions)
    for number, layer in enumerate(model.model.layers):
        if number in plan.levels:
            merged = []
            for left, right in zip(chunks[0::2], chunks[1::2], strict=True):
                parts = []
                for side, quota in ((left, plan.held - plan.held // 2), (right, plan.held // 2)):
                    inner = range(plan.sinks, len(side["ids"]) - plan.suffix)
                    best = sorted(sorted(inner, key=lambda t: -float(side["score"][t]))[:quota])
                    parts.append(best)
                ends = slice(len(left["ids"]) - plan.suffix, None)
                merged.append({
                    "ids": [*sinks, *(left["ids"][t] for t in parts[0]), *(right["ids"][t] for t in parts[1]), *suffix],
                    "hidden": torch.cat([
                        (left["hidden"][:, : plan.sinks] + right["hidden"][:, : plan.sinks]) / 2,
                        left["hidden"][:, parts[0]], right["hidden"][:, parts[1]],
                        (left["hidden"][:, ends] + right["hidden"][:, -plan.suffix :]) / 2,
                    ], 1),
                    "place": torch.cat([
                        left["place"][: plan.sinks], left["place"][parts[0]], right["place"][parts[1]],
                        left["place"][ends],
                    ]),
                })
            chunks = merged
        for chunk in chunks:
            cos, sin = model.model.rotary_emb(chunk["hidden"], chunk["place"][None])
            seen: dict[str, Tensor] = {}
            size = len(chunk["ids"])
            causal = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
            attention = layer.self_attn
            normed = layer.input_layernorm(chunk["hidden"])
            query, key = (
                part(normed).view(1, size, -1, 16).transpose(1, 2) for part in (attention.q_proj, attention.k_proj)
            )

            def turned(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                half = torch.cat([-x[..., 8:], x[..., :8]], -1)
                return x * cos[:, None] + half * sin[:, None]

            key = turned(key).repeat_interleave(2, 1)
            seen["score"] = (turned(query)[:, :, -1:] @ key.transpose(-1, -2)).amax((0, 1, 2))
            chunk["hidden"] = layer(
                chunk["hidden"], attention_mask=causal, position_embeddings=(cos, sin),
                position_ids=chunk["place"][None],
            )
            chunk["score"] = seen["score"]
    return [chunk["ids"] for chunk in chunks]


@pytest.fixture(scope="module")
def deep() -> Any:
    """Eight layers: several between merges."""
    config = LlamaConfig(**{**small_config("llama").to_dict(), "num_hidden_layers": 8})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=register()).eval().requires_grad_(False)


@pytest.mark.parametrize("ratio", ["0.3", "0.6", "0.75"])
@pytest.mark.parametrize("layers", [3, 8])
def test_it_keeps_what_a_loop_keeps(llama: nn.Module, deep: Any, layers: int, ratio: str) -> None:
    """The same tokens, told by the values of the first layer, which depend on the token only."""
    text = ids(rows=1)
    model: Any = llama if layers == 3 else deep
    session, _ = read(model, ratio, text)
    method = homer(ratio)
    plan = method.plan(N, layers)
    with torch.inference_mode():
        (expected,) = slow(model, text[0], method)
        first = model.model.layers[0]
        values = first.self_attn.v_proj(first.input_layernorm(model.get_input_embeddings()(text[0, expected])))
    held = session.cache.layers[0].values[0, :, : plan.entries].transpose(0, 1).flatten(1)
    assert (held - values).abs().max() < 1e-5


def test_held_entries_positions_and_bytes(model: nn.Module) -> None:
    session, found = read(model, "0.6")
    assert bool(torch.isfinite(found).all())
    plan = homer("0.6").plan(N, 3)
    assert session.kept == session.cache.entries() == 48 + MORE
    assert all(layer.keys.shape[-2] == 48 + MORE for layer in session.cache.layers)
    assert session.peak == plan.positions * 2 ** len(plan.levels)
    assert session.bytes().logical == session.cache.logical_bytes() == session.bytes().physical
    assert session.visible(torch.tensor([N, N + 3])).tolist() == [48, 51]


def test_rows_do_not_depend_on_their_batch(model: nn.Module) -> None:
    _, both = read(model, "0.6")
    for row in range(2):
        with torch.inference_mode(), prepared(model, None, N + MORE):
            session = opened(model, "0.6", 1)
            (last,) = session.prefill(ids()[row : row + 1], N - 1)
            (more,) = session.extend(ids(MORE, 4)[row : row + 1])
        assert (torch.cat([last.logits, more.logits], 1) - both[row]).abs().max() < 1e-5


def test_written_one_by_one_or_read_at_once(llama: nn.Module) -> None:
    _, together = read(llama, "0.6")
    with torch.inference_mode(), prepared(llama, None, N + MORE):
        session = opened(llama, "0.6")
        for _ in session.prefill(ids(), N - 1):
            pass
        steps = torch.stack([session.step(column) for column in ids(MORE, 4).unbind(1)], 1)
        filled = opened(llama, "0.6")
        filled.fill(2, 0)
        assert filled.kept == 48
        filled.expand(2)
        assert filled.step(torch.ones(4, dtype=torch.long)).shape == (4, VOCABULARY)
    assert (steps - together[:, 1:]).abs().max() < 1e-5


def test_equal_halves_keep_the_same_tokens(llama: nn.Module) -> None:
    """Two chunks of the same text: both keep the same places of it."""
    half = ids(54, rows=1)
    text = torch.cat([ids(4, 1, 1), half, half, ids(8, 2, 1)], 1)
    session, _ = read(llama, "0.5", text)
    plan = homer("0.5").plan(N, 3)
    assert (plan.chunk, plan.held) == (54, 48)
    values = session.cache.layers[0].values[0, :, 4 : 4 + 48].transpose(0, 1).flatten(1)
    assert (values[:24] - values[24:]).abs().max() < 1e-6


def test_what_it_cannot_do_is_a_sentence(llama: nn.Module) -> None:
    session = open_session(llama, homer("0.5"), Text(N, N, (0, 0)))
    with pytest.raises(UserError, match="cannot score the context"):
        list(session.prefill(ids(), 0))
    with pytest.raises(UserError, match="need"):
        homer("0.9").plan(N, 3)
    with pytest.raises(UserError, match="has one"):
        homer("0.5").plan(N, 1)
    assert homer("0.5").plan(N, 2).levels == (1,)
