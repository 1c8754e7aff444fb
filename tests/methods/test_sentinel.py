"""Sentinel's options: the raw recent window, the published sampler, prediction from the closing sentinel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from kvbench.cache.evicting import EvictingCache
from kvbench.errors import UserError
from kvbench.inference.reader import Reader
from kvbench.methods import TextStructure, make_layout, make_method
from kvbench.methods.layouts.layout import CLOSE, OPEN, OUTSIDE, TEXT
from kvbench.methods.layouts.sentinel import span_layout
from kvbench.methods.layouts.sentinel_published import draw_words, word_spans
from kvbench.protocols.block import word_places
from tests.helpers.models import VOCABULARY, adapter_for


@given(n=st.integers(60, 300), w=st.integers(1, 40), percent=st.integers(5, 50), seed=st.integers(0, 5))
def test_the_last_w_tokens_are_always_raw(n: int, w: int, percent: int, seed: int) -> None:
    """Text sees each of the w tokens before it, and every span leaves once w more tokens were read."""
    removed = percent * n // 100
    assume(w <= n - removed - -(-removed // 24))  # a wider window leaves too little to remove
    method = make_method("sentinel", Fraction(percent, 100), {"recent": str(w)})
    layout = make_layout(method, n, seed, 0)
    assert len(layout.held_after(len(layout))) == n - percent * n // 100
    mask, where = layout.mask, layout.raw_slots
    for i in range(0, n, 7):
        assert bool(mask[where[i], where[max(0, i - w) : i + 1]].all())
    kind, segment = layout.tokens.kind, layout.tokens.segment
    for slot in layout.tokens.slot[kind == CLOSE].tolist():
        last = int(layout.tokens.raw[:slot][(kind[:slot] == TEXT) & (segment[:slot] == segment[slot])].max())
        read = int(layout.tokens.raw[:slot][kind[:slot] == TEXT].max())
        assert read == last + w
        assert int(layout.position[slot]) == last


@torch.inference_mode()
def test_closing_later_makes_the_same_summary(llama: nn.Module) -> None:
    """The closing sentinel's keys and values do not depend on when it is fed."""
    method = make_method("sentinel", Fraction(1, 2))
    ids = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for recent in (0, 9):
        layout = span_layout([6, 34 - 12], [12], recent)
        run, cache = Reader(llama, adapter_for(llama, method)), EvictingCache()
        with run.ready():
            run.one_pass(ids, layout, cache=cache)
        slot = int(layout.tokens.slot[layout.tokens.kind == CLOSE])
        found.append([(x.keys[:, :, slot], x.values[:, :, slot]) for x in cache.layers])
    for now, later in zip(*found, strict=True):
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(now, later, strict=True))


def test_a_recent_window_that_leaves_too_little_is_refused() -> None:
    with pytest.raises(UserError, match="outside the last 60") as refusal:
        make_method("sentinel", Fraction(7, 10), {"recent": "60"}).check(100, in_chunks=False)
    assert "at most 0.38" in refusal.value.hint
    make_method("sentinel", Fraction(38, 100), {"recent": "60"}).check(100, in_chunks=False)
    # A short end of a document, where the rest of it had room:
    short = make_layout(make_method("sentinel", Fraction(7, 10), {"recent": "60"}), 50, 0, 0)
    assert len(short.held_after(len(short))) == 15
    layout = make_layout(make_method("sentinel", Fraction(38, 100), {"recent": "60"}), 100, 0, 0)
    assert len(layout.held_after(len(layout))) == 62


def test_what_closing_sentinels_see() -> None:
    """Two spans with two closing sentinels each: O t t C C . O t t C C, pair by pair."""
    rows = {}
    for sees in ("span", "previous", "summaries"):
        layout = span_layout([0, 1, 1, 1], [2, 2, 2], closing=2, sees=sees)
        assert layout.tokens.kind.tolist() == [OPEN, TEXT, TEXT, CLOSE, CLOSE, TEXT] * 3
        assert layout.tokens.row.tolist() == [0, -1, -1, 1, 2, -1] * 3
        assert layout.held_after(len(layout)).tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
        rows[sees] = [torch.nonzero(layout.mask[slot]).flatten().tolist() for slot in (16, 17)]
    own = [12, 13, 14, 15, 16]
    assert rows["span"][0] == own
    assert rows["previous"][0] == [9, 10, *own]
    assert rows["summaries"][0] == [3, 4, 9, 10, *own]
    assert [row[1] for row in rows.values()] == [[3, 4, 5, 9, 10, 11, 15, 16, 17]] * 3


def test_sinks_are_in_no_span() -> None:
    for seed in range(20):
        layout = make_layout(make_method("sentinel", Fraction(9, 10), {"sinks": "6"}), 200, seed, 0)
        text = layout.tokens.kind == TEXT
        assert layout.tokens.segment[text][:6].tolist() == [OUTSIDE] * 6
        assert len(layout.held_after(len(layout))) == 20
    free = [make_layout(make_method("sentinel", Fraction(9, 10)), 200, seed, 0) for seed in range(20)]
    assert any(layout.tokens.segment[layout.tokens.kind == TEXT][0] != OUTSIDE for layout in free)


def test_summaries_that_would_save_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="would save nothing"):
        make_method("sentinel", Fraction(1, 2), {"closing": "6", "span": "6"}).check(100, False)
    for options in ({"closing": "2"}, {"sinks": "4"}):
        with pytest.raises(UserError, match="sampler=published excludes"):
            make_method("sentinel", Fraction(1, 2), {**options, "sampler": "published"}).check(100, False)
    with pytest.raises(UserError, match=r"keeps 8 entries.*at most 0.68"):
        make_layout(make_method("sentinel", Fraction(7, 10), {"closing": "8"}), 100, 0, 0)


def test_prediction_from_the_closing_sentinel() -> None:
    plain, moved = (span_layout([3, 2], [4], predict_from_close=flag) for flag in (False, True))
    assert plain.read_slots.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10]
    assert moved.read_slots.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert moved.tokens.kind[8] == CLOSE
    seen = [int(moved.mask[slot].sum()) - 1 for slot in moved.read_slots]
    assert moved.visible_before.tolist() == seen
    with pytest.raises(UserError, match="sampler=published excludes"):
        make_method("sentinel", Fraction(1, 2), {"recent": "4", "sampler": "published"}).check(100, False)
    with pytest.raises(UserError, match="exclude each other"):
        make_method("sentinel", Fraction(1, 2), {"recent": "4", "predict_from_cr": "true"}).check(100, False)


@pytest.mark.parametrize("span", [2, 6, 60])
def test_span_length_is_obeyed(span: int) -> None:
    layout = make_layout(make_method("sentinel", Fraction(2, 5), {"span": str(span)}), 300, 0, 0)
    kind, segment = layout.tokens.kind, layout.tokens.segment
    lengths = [int(((segment == u) & (kind == TEXT)).sum()) for u in range(int((kind == OPEN).sum()))]
    assert max(lengths) <= span
    assert sum(lengths) - len(lengths) == 120


@given(
    n=st.integers(1, 200), percent=st.integers(0, 95), top=st.sampled_from([6, 25]), seed=st.integers(0, 50),
)
def test_published_spans_of_words(n: int, percent: int, top: int, seed: int) -> None:
    """2 to M words, none overlapping, the last word free, short lines alone, tries bounded."""
    ratio = Fraction(percent, 100)
    spans = draw_words(n, ratio, top, np.random.default_rng(seed))
    if n < 30:
        assert spans == []
    taken = [w for left, right in spans for w in range(left, right + 1)]
    assert len(taken) == len(set(taken))
    assert all(2 <= right - left + 1 <= top for left, right in spans)
    assert all(right <= n - 2 for _, right in spans)
    if n >= 30 and percent:
        target = int(ratio * Fraction(2 + top, top) * n)
        longest = spans[-1] if spans else (0, 0)
        assert len(taken) < target + top or len(spans) == 1
        assert longest[1] < n


def test_published_sampler_saturates_near_a_half() -> None:
    """In lines of 120 words: the asked 0.9 realises about half, the asked 0.2 about what is asked."""
    removed = {}
    for percent in (20, 90):
        rng = np.random.default_rng(0)
        drawn = [draw_words(120, Fraction(percent, 100), 25, rng) for _ in range(300)]
        removed[percent] = sum(right - left for spans in drawn for left, right in spans) / (300 * 120)
    assert 0.18 < removed[20] < 0.28
    assert 0.42 < removed[90] < 0.56


def test_words_of_tokens() -> None:
    text = "one two three\nfour  five\n"
    ends = [3, 5, 7, 13, 14, 18, 19, 20, 24, 25]  # one| t|wo| three|\n|four| | |five|\n
    places = word_places(text, ends)
    assert [(line, word) for line, word, _ in places] == [
        (0, 0), (0, 1), (0, 1), (0, 2), (0, 2), (1, 0), (1, 0), (1, 1), (1, 2), (1, 2),
    ]
    assert [count for _, _, count in places] == [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]


def test_word_spans_become_token_spans() -> None:
    """Two tokens per word; spans that touch the edge of the block are left out."""
    words = tuple((0, i // 2, 40) for i in range(80))
    rng_a, rng_b = np.random.default_rng(3), np.random.default_rng(3)
    gaps, lengths = word_spans(80, Fraction(1, 2), 6, rng_a, words)
    expected = [(2 * left, 2 * (right + 1)) for left, right in draw_words(40, Fraction(1, 2), 6, rng_b) if left > 0]
    starts = np.cumsum(np.array(gaps[:-1]) + np.array([0, *lengths[:-1]]))
    assert [(int(a), int(a) + length) for a, length in zip(starts, lengths, strict=True)] == expected
    assert sum(gaps) + sum(lengths) == 80
    layout = make_layout(
        make_method("sentinel", Fraction(1, 2), {"sampler": "published"}), 80, 0, 0, TextStructure(words=words)
    )
    assert layout.n_raw == 80
    with pytest.raises(UserError, match="spans of words"):
        make_layout(make_method("sentinel", Fraction(1, 2), {"sampler": "published"}), 80, 0, 0)
