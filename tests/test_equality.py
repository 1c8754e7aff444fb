"""The main guarantee: one masked pass and a stream with entries really removed give the same logits."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from kvbench.cache.evicting import EvictingCache
from kvbench.methods import METHODS, Layout, make_layout, make_method
from kvbench.methods.layout import Tokens
from kvbench.runtime import Reader, Trace
from tests.conftest import VOCABULARY, small_adapter
from tests.test_layouts import closed_form

N = 96
TOLERANCE = 1e-5


def reader(model: nn.Module, name: str) -> Reader:
    adapter = None
    if METHODS[name].needs_adapter:
        adapter = small_adapter(model, "plain" if name == "adapted" else "gated")
    return Reader(model, adapter, Trace())


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, N), generator=torch.Generator().manual_seed(3))


def expected_peak(layout: Layout, chunk: int) -> int:
    """The most entries ever held, counted from the rule that an entry dies after its last query."""
    last = layout.last_query
    starts = range(0, len(layout), chunk)
    return max(
        int((last[:s] >= s).sum()) + min(s + chunk, len(layout)) - s for s in starts
    )


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("ratio", ["0.3", "0.7", "0.9"])
@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_streamed_equals_one_pass(model: nn.Module, name: str, ratio: str, chunk: int) -> None:
    method = make_method(name, Fraction(ratio))
    layout = make_layout(method, N, 0, 5)
    run, cache = reader(model, name), EvictingCache()
    with run.ready():
        masked = run.one_pass(ids(), layout)
        parts = list(run.stream(ids(), layout, cache, chunk))
    streamed = torch.cat([part.logits for part in parts], 1)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert (streamed - masked).abs().max() < TOLERANCE
    held = closed_form(name, N, method.ratio)
    assert run.trace.held == cache.entries() == held
    assert run.trace.peak == expected_peak(layout, chunk)
    assert cache.logical_bytes() == cache.physical_bytes()
    assert len(cache.layers) == 3
    assert all(layer.keys.shape[-2] == held for layer in cache.layers)


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_decoding_token_by_token_after_a_prefill(model: nn.Module, name: str) -> None:
    """What follows a compressed context, fed at once or one by one, sees the held entries only."""
    context, more = N - 16, 16
    layout = make_layout(make_method(name, Fraction("0.7")), context, 0, 5)
    run, text = reader(model, name), ids()
    held = layout.held_after(len(layout))
    with run.ready():
        at_once, one_by_one = EvictingCache(), EvictingCache()
        for cache in (at_once, one_by_one):
            for _ in run.stream(text[:, :context], layout, cache, 7):
                pass
        together = run.go_on(text[:, context:], context, at_once)
        steps = [
            run.go_on(text[:, context + i : context + i + 1], context + i, one_by_one) for i in range(more)
        ]
        masked = masked_continuation(run, text, layout, held, context)
    assert (torch.cat(steps, 1) - together).abs().max() < TOLERANCE
    assert (together - masked).abs().max() < TOLERANCE
    assert one_by_one.entries() == len(held) + more


def masked_continuation(run: Reader, text: Tensor, layout: Layout, held: Tensor, context: int) -> Tensor:
    """The same logits from one forward pass with a hand-made mask and nothing removed."""
    more, size = text.shape[1] - context, len(layout)
    mask = torch.zeros(size + more, size + more, dtype=torch.bool)
    mask[:size, :size] = layout.mask
    mask[size:, held] = True
    mask[size:, size:] = torch.ones(more, more, dtype=torch.bool).tril()
    embeddings = run.model.get_input_embeddings()(text[:, context:])
    inputs = torch.cat([run.embed(text[:, :context], layout), embeddings], 1)
    position = torch.cat([layout.position, torch.arange(context, context + more)])
    if run.adapter is not None:
        run.adapter.open_gate(layout.special_slots)
    out = run.model(inputs_embeds=inputs, attention_mask=mask[None, None], position_ids=position[None])
    return out.logits[:, size:]


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.takes_ratio])
@torch.inference_mode()
def test_ratio_zero_is_the_base_model_exactly(model: nn.Module, name: str) -> None:
    layout = make_layout(make_method(name, Fraction(0)), N, 0, 5)
    run = reader(model, name)
    base = model(ids()).logits
    with run.ready():
        assert torch.equal(run.one_pass(ids(), layout), base)


@torch.inference_mode()
def test_the_test_sees_a_wrong_mask(model: nn.Module) -> None:
    """A policy that shows one entry too few is far outside the tolerance."""
    right = make_layout(make_method("local", Fraction("0.7")), N, 0, 0)

    def wrong_policy(queries: Tokens, keys: Tokens) -> Tensor:
        return right.policy(queries, keys) & (keys.raw != queries.raw - 3)

    wrong = Layout(right.tokens, right.position, wrong_policy, N)
    run = Reader(model)
    assert (run.one_pass(ids(), right) - run.one_pass(ids(), wrong)).abs().max() > 100 * TOLERANCE


@torch.inference_mode()
def test_rows_do_not_depend_on_their_batch(model: nn.Module) -> None:
    layout = make_layout(make_method("sentinel", Fraction("0.7")), N, 0, 5)
    run = reader(model, "sentinel")
    with run.ready():
        both = run.one_pass(ids(), layout)
        alone = run.one_pass(ids()[1:], layout)
    assert (both[1:] - alone).abs().max() < TOLERANCE
