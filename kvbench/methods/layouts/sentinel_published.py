"""The span sampler of the released Sentinel code, on words, included to show which ratio it really reaches.

Written from a description of its behaviour. Lines of text under 30 words are left alone; in longer ones, spans of 2 to
M words are sampled by rejection, with a bounded number of tries, until the target share of words is covered. Because
tries run out, the share that is really removed saturates.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby

import numpy as np

SHORTEST_LINE = 30
TRIES_PER_SPAN = 3


def draw_words(n: int, ratio: Fraction, top: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Spans (first word, last word) in a line of ``n`` words, ascending, none overlapping."""
    if n < SHORTEST_LINE or n - top - 1 < 0 or ratio == 0:
        return []
    mean = Fraction(2 + top, 2)
    target = (ratio * mean / (mean - 1) * n).__floor__()
    tries = TRIES_PER_SPAN * (target // mean).__floor__()
    covered = np.zeros(n, dtype=bool)
    spans: list[tuple[int, int]] = []
    tried = 0
    while True:
        left = int(rng.integers(0, n - top))
        right = left + int(rng.integers(1, top))
        tried += 1
        if not covered[left : right + 1].any():
            covered[left : right + 1] = True
            spans.append((left, right))
        if covered.sum() >= target or tried >= tries:
            return sorted(spans)


def word_spans(
    n: int, ratio: Fraction, top: int, rng: np.random.Generator, words: Sequence[tuple[int, int, int]]
) -> tuple[list[int], list[int]]:
    """The gaps and lengths, in tokens, of spans sampled in each line of a block of ``n`` tokens.

    Args:
        words: for every token the index of its line, of its word in the line, and the number of words in the line.
            Spans that reach the first or last token of the block may be cut by it and are left out.
    """
    gaps, lengths, end = [], [], 0
    for _, tokens in groupby(range(n), key=lambda i: words[i][0]):
        places = list(tokens)
        number = np.array([words[i][1] for i in places])
        for left, right in draw_words(words[places[0]][2], ratio, top, rng):
            inside = np.flatnonzero((number >= left) & (number <= right))
            if len(inside) < 2:
                continue
            start, stop = places[inside[0]], places[inside[-1]] + 1
            first = start == 0 or words[start - 1][2] == 0  # preceded by nothing, or by a BOS only
            if first or stop == n:
                continue
            gaps.append(start - end)
            lengths.append(stop - start)
            end = stop
    return [*gaps, n - end], lengths
