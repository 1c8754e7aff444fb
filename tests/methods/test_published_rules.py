"""Methods that merge, draw and look again, against loops written from what was published, token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from kvbench.cache.shape import CacheShape
from kvbench.errors import UserError
from kvbench.inference.policy_session import PolicySession
from kvbench.methods import kept
from kvbench.methods.policies.policy import CachePolicy
from kvbench.methods.policies.random import random_numbers
from kvbench.methods.policies.think import ThinK
from tests.helpers.models import VOCABULARY
from tests.helpers.policies import policy_of, read, text, view

LENGTH, LOTS, HEADS, SINKS = 60, (3, 5), 2, 4
WORD = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood (2014), on Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def draw_of(lot: int, seed: int, layer: int, head: int, place: int) -> float:
    state = splitmix64((lot * 1009 + seed) & WORD)
    state = splitmix64((state + layer * 1024 + head) & WORD)
    return (splitmix64((state + place) & WORD) >> 40) / (1 << 24)


@pytest.fixture(scope="module")
def eager(llama: nn.Module) -> Any:
    """The small model, computed by transformers, so that it says what was attended."""
    model: Any = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    return model


class Held:
    """What a layer holds of one text, and the attention that each entry received."""

    def __init__(self) -> None:
        self.keys = self.values = torch.empty(HEADS, 0, 16)
        self.sums = torch.empty(HEADS, 0)
        self.places: list[list[int]] = [[] for _ in range(HEADS)]

    def without(self, gone: list[int]) -> None:
        """Remove an entry from each head."""
        for head, at in enumerate(gone):
            self.places[head].pop(at)
        left = torch.tensor([[i for i in range(self.keys.shape[1]) if i != at] for at in gone])
        rows = torch.arange(HEADS)[:, None]
        self.keys, self.values, self.sums = (t[rows, left] for t in (self.keys, self.values, self.sums))


def fed(model: Any, layers: list[Held], token: Tensor, place: int) -> Tensor:
    """Logits after one more token, whose keys, values and attention are added to the layers."""
    cache = DynamicCache()
    if place:
        for number, layer in enumerate(layers):
            cache.update(layer.keys[None].clone(), layer.values[None].clone(), number)
    mask = torch.ones(1, 1, 1, layers[0].keys.shape[1] + 1, dtype=torch.bool)
    with torch.inference_mode():
        out = model(input_ids=token.view(1, 1), past_key_values=cache, attention_mask=mask,
                    position_ids=torch.tensor([[place]]), output_attentions=True)
    for layer, stored, attention in zip(layers, cache.layers, out.attentions, strict=True):
        layer.keys, layer.values = stored.keys[0].clone(), stored.values[0].clone()
        layer.sums = functional.pad(layer.sums, (0, 1)) + attention[0, :, 0].view(HEADS, 2, -1).sum(1)
        for places in layer.places:
            places.append(place)
    logits: Tensor = out.logits[0, 0]
    return logits


def spread(layer: Held, number: int, lot: int, many: int) -> int:
    """CaM: the entry behind the sinks goes, and its value may be added to those of the next; says how many were."""
    merged = 0
    for head in range(HEADS):
        read = layer.places[head][-1] + 1
        usual = [float(s) / (read - p) for s, p in zip(layer.sums[head], layer.places[head], strict=True)]
        next_ = list(range(SINKS + 1, len(usual)))[:many]
        chance = min(1.0, usual[SINKS] / (sum(usual[i] for i in next_) / len(next_)))
        if draw_of(lot, 0, number, head, layer.places[head][SINKS]) < chance:
            merged += 1
            for i in next_:
                layer.values[head, i] += layer.values[head, SINKS] / many
    layer.without([SINKS] * HEADS)
    return merged


@pytest.mark.parametrize("many", [5, 32])
def test_cam_is_its_rule_token_by_token(llama: nn.Module, eager: Any, many: int) -> None:
    """Also where fewer entries are left than a value is shared among: the shares stay what they are."""
    ids, policy = text(LENGTH), policy_of("cam", "0.6", step="1", spread=str(many))
    budget, merged = kept(LENGTH, policy.ratio), 0
    assert SINKS + 5 < budget < SINKS + 32
    logits, run = read(llama, policy, ids)
    for row, lot in enumerate(LOTS):
        layers = [Held() for _ in range(3)]
        for place in range(LENGTH):
            theirs = fed(eager, layers, ids[row, place], place)
            assert float((logits[row, place] - theirs).abs().max()) < 1e-5
            for number, layer in enumerate(layers):
                if layer.keys.shape[1] > budget:
                    merged += spread(layer, number, lot, many)
        _assert_same(run, layers, row)
    assert 50 < merged < 2 * 3 * HEADS * (LENGTH - budget)


def into_nearest(layer: Held, keep: int, recent: int, before: float | None, values_only: bool) -> tuple[float, int]:
    """D2O: one entry of each head goes, the least attended, into the one with the nearest key.

    Returns:
        The threshold, and how many were merged.
    """
    gone, found = [], []
    for head in range(HEADS):
        old = [i for i in range(keep + 1 - recent) if layer.places[head][i] >= SINKS]
        at = min(old, key=lambda i, h=head: (float(layer.sums[h, i]), i))  # type: ignore[misc]
        cosines = functional.cosine_similarity(layer.keys[head, at], layer.keys[head], dim=-1)
        cosines[at] = -2
        gone.append(at)
        found.append((float(cosines.max()), int(cosines.argmax())))
    mean = sum(cosine for cosine, _ in found) / HEADS
    threshold, merged = mean if before is None else 0.5 * before + 0.5 * mean, 0
    for head, (cosine, nearest) in enumerate(found):
        if cosine >= threshold:
            merged += 1
            for tensor in (layer.values,) if values_only else (layer.keys, layer.values):
                tensor[head, nearest] = (tensor[head, nearest] + cosine * tensor[head, gone[head]]) / 2
    layer.without(gone)
    return threshold, merged


@pytest.mark.parametrize("merge", ["both", "values"])
def test_d2o_is_its_rule_token_by_token(llama: nn.Module, eager: Any, merge: str) -> None:
    """The threshold moves from removal to removal, and each text of a batch has its own."""
    ids, policy = text(LENGTH), policy_of("d2o", "0.6", step="1", merge=merge)
    logits, run = read(llama, policy, ids)
    merged = removed = 0
    for row in range(2):
        layers = [Held() for _ in range(3)]
        thresholds: list[float | None] = [None] * 3
        for place in range(LENGTH):
            theirs = fed(eager, layers, ids[row, place], place)
            assert float((logits[row, place] - theirs).abs().max()) < 1e-5
            half = kept(place + 1, policy.ratio)
            keep = min(place + 1, max(SINKS + 1, half))
            recent = min(half // 2, max(0, half - SINKS))
            for number, layer in enumerate(layers):
                if layer.keys.shape[1] > keep:
                    before = thresholds[number]
                    thresholds[number], more = into_nearest(layer, keep, recent, before, merge == "values")
                    merged, removed = merged + more, removed + HEADS
        _assert_same(run, layers, row)
        for layer, threshold in zip(run.cache.layers, thresholds, strict=True):
            assert layer.carried is not None
            assert float(layer.carried[row]) == pytest.approx(threshold, abs=1e-5)
    assert 0.2 * removed < merged < 0.8 * removed


def test_a_text_that_is_continued_twice_keeps_its_threshold(llama: nn.Module) -> None:
    _, run = read(llama, policy_of("d2o", step="4"), text())
    before = [layer.carried for layer in run.cache.layers]
    run.cache.batch_repeat_interleave(2)
    for layer, carried in zip(run.cache.layers, before, strict=True):
        assert carried is not None
        assert layer.carried is not None
        assert layer.carried.tolist() == [carried[0], carried[0], carried[1], carried[1]]


def _assert_same(run: PolicySession, layers: list[Held], row: int) -> None:
    for mine, theirs in zip(run.cache.layers, layers, strict=True):
        assert mine.positions[row].tolist() == theirs.places
        assert float((mine.keys[row] - theirs.keys).abs().max()) < 1e-5
        assert float((mine.values[row] - theirs.values).abs().max()) < 1e-5


def test_draws_are_those_of_splitmix64() -> None:
    seen = view(24)
    found = random_numbers(seen)
    for row, lot in enumerate((3, 5)):
        for head in range(2):
            assert found[row, head].tolist() == [draw_of(lot, 0, 0, head, place) for place in range(24)]


def test_draws_are_even_in_every_bit() -> None:
    count = 1 << 16
    some = torch.zeros(2, 2, 1, 8).expand(-1, -1, count, -1)
    places = torch.arange(count).expand(2, 2, count)
    found = random_numbers(view(keys=some, values=some, positions=places)).flatten().double()
    error = (1 / 12 / len(found)) ** 0.5
    assert float(found.mean()) == pytest.approx(0.5, abs=4 * error)
    shares = torch.histc(found.float(), 10, 0, 1) / len(found)
    assert float((shares - 0.1).abs().max()) < 4 * (0.09 / len(found)) ** 0.5
    numbers = (found * (1 << 24)).long()
    for bit in range(24):
        assert float((numbers >> bit & 1).double().mean()) == pytest.approx(0.5, abs=4 * (0.25 / len(found)) ** 0.5)


def test_a_random_choice_leaves_sinks(llama: nn.Module) -> None:
    for sinks, always in (("4", True), ("0", False)):
        _, run = read(llama, policy_of("random", "0.8", sinks=sinks), text())
        first = [layer.positions[..., :4].tolist() == [[[0, 1, 2, 3]] * 2] * 2 for layer in run.cache.layers]
        assert all(first) is always


def test_what_follows_a_context_is_attended_under_refreshkv(llama: nn.Module, eager: Any) -> None:
    """Against the model's own forward, token by token: kept(P, r) of the context, and all that came after it; every
    ``step``-th token looks at all, and the choice after it is by its attention to the context."""
    context, step, policy = 40, 8, policy_of("refreshkv", "0.6", step="8", kernel="3")
    keep = kept(context, policy.ratio)
    ids = torch.randint(1, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(9))
    run = PolicySession(llama, policy, context, (3,), chunk=context, history=[])
    with torch.inference_mode():
        list(run.prefill(ids[:, :context]))
        parts = list(run.extend(ids[:, context:]))
    assert [(p.start, p.stop) for p in parts] == [(0, 1), (1, 8), (8, 9), (9, 16), (16, 17), (17, 20)]
    assert run.history is not None
    held = dict(zip((context + p.start for p in parts), run.history[1:], strict=True))
    for start, layers in held.items():
        for places in layers:
            for head in range(HEADS):
                mine = places[0, head].tolist()
                after = [p for p in mine if p >= context]
                assert after == list(range(context, start))
                assert len(mine) - len(after) == (context if start % step == 0 else keep)
    _follow_by_masks(eager, policy, ids, held, torch.cat([p.logits for p in parts], 1)[0], context, keep)


def _follow_by_masks(
    eager: Any, policy: CachePolicy, ids: Tensor, held: dict[int, list[Tensor]], logits: Tensor, context: int, keep: int
) -> None:
    """One pass under a mask of what was attended gives the same logits, and its attention the same choices."""
    length = ids.shape[1]
    masks = torch.ones(3, HEADS, length, length, dtype=torch.bool).tril()
    for start, layers in held.items():
        stop = min([other for other in held if other > start], default=length)
        for number, places in enumerate(layers):
            for head in range(HEADS):
                masks[number, head, start:stop, :start] = False
                masks[number, head, start:stop, places[0, head]] = True
    for number, layer in enumerate(eager.model.layers):
        bias = torch.zeros(1, 4, length, length).masked_fill(~masks[number].repeat_interleave(2, 0), float("-inf"))
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias}), with_kwargs=True
        )
    try:
        with torch.inference_mode():
            out = eager(input_ids=ids, use_cache=False, output_attentions=True)
    finally:
        for layer in eager.model.layers:
            layer.self_attn._forward_pre_hooks.clear()
            layer.self_attn._forward_pre_hooks_with_kwargs.clear()
    assert float((out.logits[0, context:] - logits).abs().max()) < 1e-5
    for look in (start for start in held if start % 8 == 0):
        for number, attention in enumerate(out.attentions):
            there = attention[0, :, look, :context].view(HEADS, 2, context)
            worth = (there / there.sum(-1, keepdim=True)).mean(1)
            smooth = functional.avg_pool1d(worth[None], 3, stride=1, padding=1)[0]
            smooth[:, -1] = float("inf")
            chosen = smooth.topk(keep).indices.sort(-1).values
            assert torch.equal(held[look + 1][number][0, :, :keep], chosen)


@pytest.mark.parametrize("width", [16, 64, 128])
def test_channels_that_stay_are_within_the_bytes(width: int) -> None:
    """Whole channels leave, so that a little less than the budget may be held, and never more."""
    shape, recent = CacheShape.uniform(4, 2, width, 4), 32
    for n in (200, 512, 1000):
        for given in range(shape.entry_bytes * (n // 2), shape.entry_bytes * n, shape.entry_bytes * 3 + 5):
            try:
                channels = ThinK(budget_bytes=given).with_budget_for(n, shape).channels
            except UserError:
                continue
            old = n - recent
            held = shape.entry_bytes * recent + 4 * 2 * 4 * old * (width + channels)
            assert held <= given
            assert channels == width or held + 4 * 2 * 4 * old > given, "another channel would have with_budget_for"
