"""Whether MAUVE can be trusted here: human texts must score close to 1 against other human texts."""

from __future__ import annotations

import numpy as np

from kvbench.data.documents import load_corpus
from kvbench.data.tasks import load_task
from kvbench.judges.encoder import SentenceEncoder
from kvbench.metrics.mauve import LEAST_TEXTS, measure

WORDS = 24
"""Words of each text."""
LEAST, SPREAD = 0.9, 0.05
"""The least value for two halves of one collection, and the largest difference between seeds of the clustering."""


def compare_halves(device: str) -> tuple[str, bool]:
    """Measure MAUVE of two random halves of the embedded documents, with all seeds of the clustering: the result in
    words, and whether it is as expected."""
    texts = []
    for document in load_corpus(load_task("minidocs"), None).documents:
        words = document.text.split()
        texts += [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS, WORDS)]
    order = np.random.default_rng(0).permutation(len(texts))
    size = min(LEAST_TEXTS, len(texts) // 2)
    vectors = SentenceEncoder.load(device).encode([texts[i] for i in order[: 2 * size]]).astype(np.float64)
    values = measure(vectors[:size], vectors[size:])
    mean, spread = float(np.mean(values)), float(np.max(values) - np.min(values))
    return (
        f"{mean:.3f} for two halves of {size} texts, {spread:.3f} apart over {len(values)} seeds",
        mean >= LEAST and spread <= SPREAD,
    )
