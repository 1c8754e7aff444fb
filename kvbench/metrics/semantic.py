"""Semantic similarity: cosine of sentence embeddings, of a text with its reference and with its own prefix.

Cosines of texts in one language and register are high in any case: the row of the authors' texts compares each
reference with that of another document, which is the lower bound for the other rows.
"""

from __future__ import annotations

from kvbench.metrics.base import GREEDY, MEANING, TEXTS, Shown
from kvbench.metrics.texts import Sample, cosine, text_mean
from kvbench.store.records import Output

_RECIPE = "cosine|all-MiniLM-L6-v2|long texts in windows of 254 word pieces, averaged|empty text: 0|v:1"


def _semantic(output: Output, sample: Sample) -> float | None:
    if output.vector is None or sample.reference_vector is None:
        return None
    return cosine(output.vector, sample.reference_vector) if output.text.strip() else 0.0


def _coherence(output: Output, sample: Sample) -> float | None:
    if output.vector is None or sample.prefix_vector is None:
        return None
    return cosine(output.vector, sample.prefix_vector) if output.text.strip() else 0.0


SEMANTIC = (
    text_mean(
        "semantic", f"with the reference|{_RECIPE}", _semantic,
        Shown("semantic", 3, None, (TEXTS, MEANING, GREEDY), "similarity to the author's text", is_plotted=True),
    ),
    text_mean(
        "prefix_coherence", f"with the prefix|{_RECIPE}", _coherence, Shown("coherence", 3, None, (TEXTS, MEANING)),
    ),
)
