"""BLEU of the texts against one reference each, by sacrebleu (0 to 100, over the whole corpus).

sacrebleu counts the n-grams; its formula for the corpus (13a, exponential smoothing) is applied here to arrays of
summed counts, so that resampling is cheap. With one reference for open-ended text, values are close to 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kvbench.metrics.base import FLUENCY, TEXTS, Array, Shown, Totals
from kvbench.metrics.texts import Columns, Sample, TextMetric

ORDER = 4


@cache
def _library() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


def _columns(sample: Sample) -> Columns | None:
    if sample.reference is None:
        return None
    texts = [output.text for output in sample.outputs]
    counted = _library()._extract_corpus_statistics(texts, [[sample.reference] * len(texts)])
    return {"bleu": np.sum(counted, axis=0, dtype=np.float64).tolist()}


def bleu_of(sums: Array) -> Array:
    """BLEU from summed counts ``[..., 10]``: text and reference lengths, matches and n-grams by order."""
    written, reference = sums[..., 0], sums[..., 1]
    matches, total = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    with np.errstate(divide="ignore", invalid="ignore"):
        smooth = 2.0 ** np.cumsum((matches == 0) & (total > 0), axis=-1)
        precision = np.where(matches > 0, matches, 1 / smooth) / total
        brevity = np.where(written < reference, np.exp(1 - reference / written), 1.0)
        score = 100 * brevity * np.exp(np.log(precision).mean(-1))
    return np.where((total > 0).all(-1) & (matches > 0).any(-1), score, 0.0)


def _value(t: Totals) -> Array:
    return bleu_of(t["bleu"])


BLEU = TextMetric(
    "bleu", _value, "sacrebleu|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp", exchange_test=True, columns=_columns,
    shown=Shown("BLEU", 2, None, (TEXTS, FLUENCY)),
)
