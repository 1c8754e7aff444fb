"""Entries that stand for several tokens: what they take of attention is what their tokens would take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvbench.inference.attention_statistics import received_attention
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.reader import Reader
from kvbench.methods import make_layout
from kvbench.methods.layouts.layout import SUM, TEXT
from kvbench.methods.policies import subgen
from kvbench.methods.policies.subgen import far_apart, nearest
from kvbench.models.attention import masked_attention
from kvbench.models.attention_hooks import LISTENER, AttentionCall
from tests.helpers.models import adapter_for
from tests.helpers.policies import LENGTH, policy_of, read, text, view
from tests.helpers.sessions import layout_method

WEIGHTED = [("subgen", {}), ("subgen", {"estimate": "sample"}), ("d2o", {"count": "true"})]


def attended_one_by_one(run: PolicySession) -> Callable[[int, Tensor, float | None], Tensor]:
    """Attention over each entry as often as it has tokens, head by head, without a bias."""
    def attend(layer: int, query: Tensor, scaling: float | None) -> Tensor:
        stored = run.cache.layers[layer]
        (keys, values), weights = stored.present(), stored.weights
        batch, heads, entries, _ = keys.shape
        group, m = query.shape[1] // heads, query.shape[2]
        out = query.new_empty(*query.shape[:3], values.shape[-1])
        for row in range(batch):
            for head in range(heads):
                times = torch.ones(entries) if weights is None else weights[row, head]
                index = torch.arange(entries).repeat_interleave(times.round().long())
                for mine in range(head * group, (head + 1) * group):
                    logits = query[row, mine] @ keys[row, head, index].T * (scaling or query.shape[-1] ** -0.5)
                    hidden = index > torch.arange(entries - m, entries)[:, None]
                    out[row, mine] = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ values[row, head, index]
        return out

    return attend


@pytest.mark.parametrize(("name", "options"), WEIGHTED, ids=str)
def test_an_entry_takes_what_its_tokens_take(model: nn.Module, name: str, options: dict[str, str]) -> None:
    """On every family, step by step: the logits of attention over as many copies of each entry as it has tokens."""
    ids, policy = text(), policy_of(name, "0.7", step="7", **options)
    weighed, copies = (PolicySession(model, policy, LENGTH, (3, 5)) for _ in range(2))
    copies.attend = attended_one_by_one(copies)  # type: ignore[method-assign]
    with torch.inference_mode():
        for start in range(0, LENGTH, 7):
            part = ids[:, start : start + 7]
            assert float((weighed.feed(part) - copies.feed(part)).abs().max()) < 1e-4
            for run in (weighed, copies):
                run.remove()
    weights = weighed.cache.layers[0].weights
    assert weights is not None
    assert float(weights.max()) > 1


@pytest.mark.parametrize(("name", "ratio", "options"), [
    ("meanpool", "0.8", {}), ("meanpool", "0.75", {"n_comp": "3", "merge_at": "unrotated"}),
    ("ccm-merge", "0", {"segment": "16"}),
])
def test_a_mean_takes_what_its_sources_take(llama: nn.Module, name: str, ratio: str, options: dict[str, str]) -> None:
    """Every call of attention against one over as many copies of each mean as it has sources, without a bias."""
    method = layout_method(name, ratio, count="true", **options)
    layout = make_layout(method, LENGTH, 0, 0)
    calls: list[AttentionCall] = []
    reader = Reader(llama, adapter_for(llama, method))
    token = LISTENER.set(calls.append)
    try:
        with torch.inference_mode(), reader.ready():
            reader.one_pass(text(), layout)
    finally:
        LISTENER.reset(token)
    segment = layout.tokens.segment
    chunk = int((segment[layout.tokens.kind == TEXT] == 0).sum())
    sources = segment + 1 if name == "ccm-merge" else torch.full_like(segment, chunk // int(options.get("n_comp", 2)))
    times = torch.where(layout.tokens.kind == SUM, sources, 1)
    assert int(times.max()) > 2
    if name == "meanpool":
        last = layout.tokens.kind == SUM
        last &= segment == segment.max()  # a shorter chunk at the end: its means are of fewer
        end = int((segment[layout.tokens.kind == TEXT] == segment.max()).sum())
        runs = torch.arange(int(last.sum()) + 1) * end // int(last.sum())
        times[last] = runs.diff()
    copies = torch.arange(len(layout)).repeat_interleave(times)
    assert len(calls) == 3
    for call in calls:
        assert call.mask is not None
        found = masked_attention(call.mask, call.query, call.key, call.value, None)
        plain = layout.mask[:, copies]
        expected = masked_attention(plain, call.query, call.key[:, :, copies], call.value[:, :, copies], None)
        assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("estimate", ["centroid", "sample"])
def test_counts_are_the_tokens_read(model: nn.Module, estimate: str) -> None:
    """In every head at every step, and in a prefix that is compressed once; with the sums of values, for means."""
    ids, policy = text(), policy_of("subgen", "0.7", step="7", estimate=estimate)
    run, whole = (PolicySession(model, policy, LENGTH, (3, 5)) for _ in range(2))
    with torch.inference_mode():
        for start in range(0, LENGTH, 7):
            run.feed(ids[:, start : start + 7])
            run.remove()
            for layer in run.cache.layers:
                if layer.weights is not None:
                    assert torch.equal(layer.weights.sum(-1), torch.full((2, layer.keys.shape[1]), float(run.read)))
                    assert torch.equal(layer.weights[..., :4], torch.ones(2, layer.keys.shape[1], 4))
        whole.feed(ids)
        before = [layer.values.sum(-2) for layer in whole.cache.layers]
        whole.remove()
    for layer, total in zip(whole.cache.layers, before, strict=True):
        assert layer.weights is not None
        assert float(layer.weights.sum(-1).min()) == LENGTH
        if estimate == "centroid":
            assert float(((layer.weights[..., None] * layer.values).sum(-2) - total).abs().max()) < 1e-3
    assert run.cache.physical_bytes() == run.cache.logical_bytes()
    heads = run.cache.layers[0].keys.shape[1]
    counts = sum(2 * heads * layer.held * 4 for layer in run.cache.layers)
    assert run.cache.logical_bytes() == counts + run.cache.layers[0].held * run.cache.entry_bytes()


def test_tokens_with_one_key_lose_nothing() -> None:
    """Keys that are repeated, whatever the values: attention after clustering is full attention."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(2, 2, 6, 8, generator=generator)
    which = torch.randint(6, (2, 2, 30), generator=generator)
    seen = view(30, keys=some.gather(-2, which[..., None].expand(-1, -1, -1, 8)))
    policy, query = policy_of("subgen", "0.5", sinks="2", share="10"), torch.randn(2, 4, 1, 8, generator=generator)
    full = masked_attention(None, query, seen.keys, seen.values, 0.4)
    entries = policy.chosen(seen, 11)
    assert entries.shape[-1] == 11
    merged = policy.merged(seen, entries)
    assert merged.weights is not None

    def attention(weights: Tensor) -> Tensor:
        def kept(tensor: Tensor) -> Tensor:
            return tensor.gather(-2, entries[..., None].expand(-1, -1, -1, tensor.shape[-1]))

        bias = weights.gather(-1, entries).log()[:, :, None]
        return masked_attention(bias, query, kept(merged.keys), kept(merged.values), 0.4)

    assert float((attention(merged.weights) - full).abs().max()) < 1e-5
    assert float((attention(torch.ones_like(merged.weights)) - full).abs().max()) > 1e-2


def test_centres_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs of 8 points, and in rounds: 20, 15, 12, 9, 7, 6."""
    monkeypatch.setattr(subgen, "AT_ONCE", 8)
    points = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(1))
    found, near = far_apart(points, 6), nearest(points, points[:, :, :5])
    for row in range(2):
        for head in range(3):
            mine, stay = points[row, head], list(range(20))
            for count in (15, 12, 9, 7, 6):
                apart = {i: min(float((mine[i] - mine[j]).norm()) for j in stay if j < i) for i in stay[1:]}
                stay = [stay[0], *sorted(sorted(apart, key=apart.__getitem__)[len(stay) - count :])]
            assert found[row, head].tolist() == stay
            assert near[row, head].tolist() == torch.cdist(mine[None], mine[None, :5])[0].argmin(-1).tolist()
    assert far_apart(torch.zeros(1, 1, 4, 2), 3)[0, 0, 0] == 0  # all alike: the first stays


def test_a_sample_is_any_of_its_tokens_alike() -> None:
    """Of a cluster that grows in three removals, over many draws; it is one of them as it was."""
    counts = torch.zeros(9)
    for seed in range(400):
        policy = policy_of("subgen", "0.5", sinks="0", share="0", estimate="sample")
        keys = torch.zeros(1, 1, 3, 2)
        values = torch.arange(3.0).view(1, 1, 3, 1)
        carried: Tensor | None = None
        weights: Tensor | None = None
        places = torch.arange(3)
        for stop in (3, 6, 9):
            seen = view(
                keys.shape[2], keys=keys, values=values, positions=places.view(1, 1, -1), carried=carried,
                attention_sums=torch.zeros(1, 1, keys.shape[2]), queries=None, weights=weights,
            )
            seen.row_seeds.resize_(1).fill_(seed)
            entries = policy.chosen(seen, 1)
            keys, values, carried, weights = policy.merged(seen, entries)
            keys, values = keys[:, :, :1], values[:, :, :1]
            assert weights is not None
            weights = torch.cat([weights[..., :1], torch.ones(1, 1, 3)], -1)
            if stop == 9:
                counts[int(values)] += 1
            keys = torch.cat([keys, torch.zeros(1, 1, 3, 2)], 2)
            values = torch.cat([values, torch.arange(stop, stop + 3.0).view(1, 1, 3, 1)], 2)
            places = torch.cat([places[:1], torch.arange(stop, stop + 3)])
    assert float(counts.min()) > 400 / 9 / 2
    assert float(counts.max()) < 400 / 9 * 2


def test_attention_that_is_summed_counts_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 4, 5, 8, generator=generator), torch.randn(1, 2, 9, 8, generator=generator)
    times = torch.tensor([1, 3, 1, 2, 1, 1, 1, 1, 1])
    copies = keys.repeat_interleave(times, 2)
    places = torch.arange(9).expand(1, 2, 9)
    mine = received_attention(query, keys, 0.3, places, bias=times.float().log().expand(1, 2, 9))
    theirs = received_attention(query, copies, 0.3, torch.arange(12).expand(1, 2, 12))
    index = torch.arange(9).repeat_interleave(times).expand(1, 2, 12)
    assert float((mine - torch.zeros(1, 2, 9).scatter_add(-1, index, theirs)).abs().max()) < 1e-5


def test_a_window_of_queries_counts_tokens() -> None:
    seen = view(12)
    times = torch.tensor([1.0, 4, 2, *[1] * 9]).expand(2, 2, 12)
    plain, weighed = seen.attention(3), view(12, weights=times).attention(3)
    wanted = plain * times[:, :, None, None]
    assert float((weighed - wanted / wanted.sum(-1, keepdim=True)).abs().max()) < 1e-5


def test_texts_that_are_written_go_on_being_clustered(llama: nn.Module) -> None:
    policy = policy_of("subgen", "0.6", step="4")
    _, run = read(llama, policy, text(40))
    with torch.inference_mode():
        for token in range(20):
            run.step(text()[:, 40 + token])
    layer = run.cache.layers[-1]
    assert layer.weights is not None
    assert torch.equal(layer.weights.sum(-1), torch.full((2, 2), 60.0))
    assert layer.held == policy.held_after(60)


@pytest.mark.parametrize("budget", [("--budget-bytes", "9KB"), ("--equal-bytes",)])
def test_bytes_are_not_promised(budget: tuple[str, ...], called: Callable[..., Any]) -> None:
    """Counts come on top of what entries take."""
    found = called(["run", "--method", "subgen", *budget, "--limit", "1"])
    assert found.code == 2
    assert "bytes" in found.err


@pytest.mark.parametrize(("option", "message"), [
    ("share=96", "share=96: not a whole number of 0 to 95"), ("estimate=best", "estimate"), ("count=2", "count"),
    ("sinks=400", "below the 401"),
])
def test_bad_options(option: str, message: str, called: Callable[..., Any]) -> None:
    found = called(["run", "--method", "subgen", "--ratio", "0.5", "--limit", "1", "--set", option])
    assert found.code == 2
    assert message in found.err
