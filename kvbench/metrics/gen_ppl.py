"""Fluency of generated text: its perplexity under a scoring model, given the prefix.

Below the value of the authors' own texts, lower is not better: repetition is easy to predict (arXiv 1904.09751). It is
therefore read beside ``rep4``.
"""

from __future__ import annotations

import numpy as np

from kvbench.metrics.base import FLUENCY, GREEDY, TEXTS, Array, Shown, Totals
from kvbench.metrics.texts import Columns, Sample, TextMetric


def _columns(sample: Sample) -> Columns | None:
    if any(output.nll is None for output in sample.outputs):
        return None
    return {
        "gen_nll": sum(output.nll or 0.0 for output in sample.outputs),
        "gen_nll_tokens": sum(output.nll_tokens for output in sample.outputs),
    }


def _value(t: Totals) -> Array:
    return np.asarray(np.exp(t["gen_nll"] / t["gen_nll_tokens"]))


GEN_PPL = TextMetric(
    "gen_ppl", _value, "exp(sum nll/sum tokens) of the texts given their prefixes|v:2", exchange_test=True,
    columns=_columns,
    shown=Shown("gen ppl", 2, None, (TEXTS, FLUENCY, GREEDY), "perplexity of the written text", is_plotted=True),
)
