"""chrF of the texts against one reference each, by sacrebleu (0 to 100, over the whole corpus)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kvbench.metrics.base import FLUENCY, GREEDY, TEXTS, Array, Shown, Totals
from kvbench.metrics.texts import Columns, Sample, TextMetric

BETA = 2


@cache
def _library() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _columns(sample: Sample) -> Columns | None:
    if sample.reference is None:
        return None
    texts = [output.text for output in sample.outputs]
    counted = _library()._extract_corpus_statistics(texts, [[sample.reference] * len(texts)])
    return {"chrf": np.sum(counted, axis=0, dtype=np.float64).tolist()}


def chrf_of(sums: Array) -> Array:
    """chrF from summed counts ``[..., 18]``: n-grams of the text, of the reference, and common ones, by order."""
    written, reference, common = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    counts = (written > 0) & (reference > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        orders = counts.sum(-1)
        precision = np.where(counts, common / written, 0.0).sum(-1) / orders
        recall = np.where(counts, common / reference, 0.0).sum(-1) / orders
        score = 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
    return np.where(np.isfinite(score), score, 0.0)


def _value(t: Totals) -> Array:
    return chrf_of(t["chrf"])


CHRF = TextMetric(
    "chrf", _value, "sacrebleu|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no", exchange_test=True, columns=_columns,
    shown=Shown("chrF", 2, None, (TEXTS, FLUENCY, GREEDY)),
)
