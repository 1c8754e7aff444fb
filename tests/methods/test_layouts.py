"""Layouts against independent, entry-by-entry statements of the same rules."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbench.errors import UserError
from kvbench.methods import METHODS, LayoutMethod, kept, layout_id, make_layout, make_method
from kvbench.methods.layouts.chunks import Chunked
from kvbench.methods.layouts.layout import CLOSE, OPEN, TEXT, Layout
from kvbench.methods.layouts.sentinel import MAX_SPAN, span_layout
from kvbench.methods.layouts.spans import SpanRule
from kvbench.methods.memories.memory import Memory

RATIOS = ("0", "0.1", "0.3", "0.5", "0.7", "0.9")
ratios = st.integers(0, 96).map(lambda percent: Fraction(percent, 100))


@given(st.integers(1, 2000), st.integers(0, 99))
def test_kept_is_exact_and_never_empty(n: int, percent: int) -> None:
    found = kept(n, Fraction(percent, 100))
    assert found == max(1, math.ceil(n * (100 - percent) / 100 - 1e-9))
    assert 1 <= found <= n


def closed_form(name: str, n: int, ratio: Fraction) -> int:
    """Entries held after n tokens, as the definitions say."""
    match name:
        case "full" | "adapted":
            return n
        case "none":
            return n % 32
        case "sinks" | "sinks-tuned":
            return min(n, max(5, kept(n, ratio)))
        case "unigist" | "unigist-tuned":
            return max(5, kept(n, ratio)) if ratio else n
        case _:
            return kept(n, ratio)


WHOLE_AXIS = [
    name for name, kind in METHODS.items() if issubclass(kind, LayoutMethod) and not issubclass(kind, (Chunked, Memory))
]


@pytest.mark.parametrize("name", WHOLE_AXIS)
@given(n=st.integers(32, 300), ratio=ratios, seed=st.integers(0, 3), which=st.integers(0, 15))
def test_held_entries_equal_the_closed_form(name: str, n: int, ratio: Fraction, seed: int, which: int) -> None:
    method = make_method(name, ratio)
    layout = make_layout(method, n, seed, which)
    assert layout.n_raw == n
    assert len(layout.held_after(len(layout))) == closed_form(name, n, method.ratio)


@pytest.mark.parametrize("name", ["local", "sinks", "window", "none"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_query_sees_what_is_held_before_it(name: str, ratio: str) -> None:
    """Attend first, evict after: query i sees itself and the entries held after i tokens."""
    n, asked = 200, Fraction(ratio)
    layout = make_layout(make_method(name, asked), n, 0, 0)
    for i in range(n):
        expected = min(i, kept(n, asked)) if name == "window" else min(i, closed_form(name, i, asked)) if i else 0
        assert int(layout.visible_before[i]) == expected, (name, ratio, i)


def test_local_is_the_published_rule() -> None:
    for percent in range(0, 100, 7):
        ratio = Fraction(percent, 100)
        mask = make_layout(make_method("local", ratio), 90, 0, 0).mask
        for i in range(90):
            first = (percent * i) // 100
            assert mask[i].tolist() == [first <= k <= i for k in range(90)]


def slow_sentinel_mask(layout: Layout) -> list[list[bool]]:
    """The attention rule of the paper's code, pair by pair."""
    kind, segment = layout.tokens.kind.tolist(), layout.tokens.segment.tolist()
    size = len(kind)
    mask = [[False] * size for _ in range(size)]
    for q in range(size):
        for k in range(q + 1):
            same, outside = segment[q] == segment[k] and segment[q] >= 0, segment[k] < 0
            if q == k:
                seen = True
            elif kind[q] == OPEN:
                seen = False
            elif kind[q] == CLOSE:
                seen = same
            elif kind[k] == CLOSE:
                seen = True
            else:
                seen = kind[k] == TEXT and (outside or same)
            mask[q][k] = seen
    return mask


@given(n=st.integers(32, 90), ratio=ratios, seed=st.integers(0, 20))
def test_sentinel_mask_equals_the_pairwise_rule(n: int, ratio: Fraction, seed: int) -> None:
    layout = make_layout(make_method("sentinel", ratio), n, seed, 0)
    assert layout.mask.tolist() == slow_sentinel_mask(layout)


@given(n=st.integers(32, 1200), ratio=ratios, seed=st.integers(0, 50))
def test_spans_remove_exactly_what_is_asked(n: int, ratio: Fraction, seed: int) -> None:
    gaps, lengths = SpanRule(MAX_SPAN).sample(n, ratio, np.random.default_rng(seed))
    removed = math.floor(ratio * n)
    assert sum(gaps) + sum(lengths) == n
    assert len(gaps) == len(lengths) + 1
    assert all(gap >= 0 for gap in gaps)
    assert all(2 <= length <= 25 for length in lengths)
    assert sum(length - 1 for length in lengths) == removed
    if lengths:
        assert len(lengths) >= math.ceil(removed / 24)


@given(
    n=st.integers(32, 600), ratio=ratios, seed=st.integers(0, 50), longest=st.integers(9, 40),
    summary=st.integers(1, 8), recent=st.integers(0, 20), sinks=st.integers(0, 12),
)
def test_spans_of_any_rule(
    n: int, ratio: Fraction, seed: int, longest: int, summary: int, recent: int, sinks: int
) -> None:
    """As many entries as asked are removed outside the first and the last, or it is truly impossible."""
    rule, removed = SpanRule(longest, summary, recent, sinks), math.floor(ratio * n)
    room = max(0, n - recent - sinks)
    most = max((  # the most that k spans can remove, for any k
        min(room - k * summary, k * (longest - summary)) for k in range(room // (summary + 1) + 1)
    ), default=0)
    assert rule.most_removed(n) == most
    if removed > most:
        with pytest.raises(UserError, match="cannot remove"):
            rule.sample(n, ratio, np.random.default_rng(seed))
        return
    gaps, lengths = rule.sample(n, ratio, np.random.default_rng(seed))
    assert sum(gaps) + sum(lengths) == n
    assert min(gaps) >= 0
    assert all(summary < length <= longest for length in lengths)
    assert sum(length - summary for length in lengths) == removed
    assert not lengths or (gaps[0] >= sinks and gaps[-1] >= recent)


def test_spans_beyond_reach_are_refused() -> None:
    with pytest.raises(UserError, match="cannot remove"):
        SpanRule(MAX_SPAN).sample(100, Fraction(97, 100), np.random.default_rng(0))


def test_sentinel_positions_repeat_the_token_before() -> None:
    layout = span_layout([3, 2], [4])
    kinds = [TEXT] * 3 + [OPEN] + [TEXT] * 4 + [CLOSE] + [TEXT] * 2
    assert layout.tokens.kind.tolist() == kinds
    assert layout.position.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8]
    assert span_layout([0, 0], [4]).position.tolist() == [0, 0, 1, 2, 3, 3]


def test_sentinel_entries_leave_when_the_span_closes() -> None:
    layout = span_layout([3, 2], [4])
    assert layout.held_after(8).tolist() == list(range(8))  # the span is still open
    assert layout.held_after(9).tolist() == [0, 1, 2, 8]  # its closing sentinel remains


def test_layouts_are_functions_of_seed_length_ratio_and_id() -> None:
    method = make_method("sentinel", Fraction(7, 10))
    first, again = (make_layout(method, 256, 0, 3) for _ in range(2))
    assert torch.equal(first.tokens.kind, again.tokens.kind)
    others = [make_layout(method, 256, 1, 3), make_layout(method, 256, 0, 4)]
    assert all(not torch.equal(first.tokens.kind, other.tokens.kind) for other in others)


def test_layout_ids_are_spread_and_fixed() -> None:
    ids = [layout_id(f"document-{i}", 0) for i in range(400)]
    assert set(ids) == set(range(16))
    assert layout_id("article-000", 2) == layout_id("article-000", 2)


def test_published_scattered_sampler_keeps_a_random_number() -> None:
    method = make_method("scattered", Fraction(1, 2), {"sampler": "published"})
    counts = {len((layout := make_layout(method, 200, 0, i)).held_after(len(layout))) for i in range(16)}
    assert len(counts) > 5
    assert 85 < sum(counts) / len(counts) < 115
