"""Training sequences: windows of running text, copies, and facts to be recalled.

Plain text alone teaches a small model little about its context. A quarter of the sequences therefore repeat a passage,
or state facts (``The key of Mary is 4821.``) and restate them later, so that there is something in the cache worth
keeping. Every batch is a function of (seed, step), so that an interrupted training can be resumed exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvbench.data.facts import FACT_HIGH, FACT_LOW, NAMES, THINGS, fact

PLAIN_SHARE, COPY_SHARE = 0.75, 0.12
"""Shares of the mixture; the rest are recall sequences."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Mixture:
    """Samples batches from one stream of token ids.

    Attributes:
        stream: int64 ``[tokens]``, concatenated documents.
        encode: maps a text to the token ids that it has within another text.
        length: tokens in a sequence.
        seed: a batch is a function of it and the step.
    """

    stream: np.ndarray
    encode: Encode
    length: int
    seed: int

    def batch(self, step: int, rows: int) -> np.ndarray:
        """int64 ``[rows, length]``."""
        rng = np.random.default_rng([self.seed, step])
        return np.stack([self._row(rng) for _ in range(rows)])

    def _row(self, rng: np.random.Generator) -> np.ndarray:
        share = rng.random()
        if share < PLAIN_SHARE:
            return self._text(rng, self.length)
        if share < PLAIN_SHARE + COPY_SHARE:
            return self._copies(rng)
        return self._recall(rng)

    def _text(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        start = int(rng.integers(0, len(self.stream) - tokens))
        return self.stream[start : start + tokens]

    def _copies(self, rng: np.random.Generator) -> np.ndarray:
        """A passage, other text, and the passage again several times, with short gaps between."""
        longest = min(181, self.length // 3)
        passage = self._text(rng, int(rng.integers(24, max(25, longest))))
        parts = [passage, self._text(rng, int(rng.integers(0, min(201, self.length // 3))))]
        while sum(map(len, parts)) < self.length:
            parts += [passage, self._text(rng, int(rng.integers(8, 81)))]
        return np.concatenate(parts)[: self.length]

    def _recall(self, rng: np.random.Generator) -> np.ndarray:
        """One to five facts, stated and restated with prose in between."""
        count = int(rng.integers(1, 6))
        names = rng.choice(len(NAMES), count, replace=False)
        facts = [
            np.array(self.encode(fact(
                THINGS[rng.integers(len(THINGS))], NAMES[name],
                int(rng.integers(FACT_LOW, FACT_HIGH, endpoint=True)),
            )))
            for name in names
        ]
        parts = [self._text(rng, int(rng.integers(4, 91)))]
        order = list(range(count))
        while sum(map(len, parts)) < self.length:
            parts += [facts[order[0]], self._text(rng, int(rng.integers(4, 91)))]
            order = order[1:] or [int(rng.integers(count))]
        return np.concatenate(parts)[: self.length]
