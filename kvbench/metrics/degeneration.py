"""Degenerate texts: length, empty texts, and texts that repeat themselves in a loop."""

from __future__ import annotations

from collections import Counter

from kvbench.metrics.base import DEGENERATION as TABLE
from kvbench.metrics.base import GREEDY, TEXTS, Shown
from kvbench.metrics.texts import Sample, ngrams, text_mean
from kvbench.store.records import Output

LOOP = 3
"""A text loops if one of its 4-grams of words occurs at least this often."""


def _length(output: Output, sample: Sample) -> float:
    return float(len(output.ids))


def _is_empty(output: Output, sample: Sample) -> float:
    return float(not output.text.strip())


def _loops(output: Output, sample: Sample) -> float:
    counts = Counter(ngrams(output.text, 4))
    return float(max(counts.values(), default=0) >= LOOP)


DEGENERATION = (
    text_mean("gen_length", "tokens written, the end token left out|v:1", _length,
              Shown("tokens", 1, None, (TABLE,))),
    text_mean("empty_share", "share of texts without a character|v:1", _is_empty,
              Shown("empty", 2, None, (TABLE,))),
    text_mean("loop_share", f"share of texts in which a 4-gram of words stands {LOOP} times or more|v:1", _loops,
              Shown("loops", 2, None, (TEXTS, TABLE, GREEDY))),
)
