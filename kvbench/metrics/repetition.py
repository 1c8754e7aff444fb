"""Repetition inside a text: rep-n = 1 - distinct / all n-grams, and diversity (Su et al., arXiv 2202.06417)."""

from __future__ import annotations

from kvbench.metrics.base import DEGENERATION, GREEDY, MEANING, TEXTS, Array, Shown, Totals
from kvbench.metrics.texts import Columns, Sample, TextMetric, mean_of, ngrams, share

ORDERS = (2, 3, 4)
_TABLES = {2: (DEGENERATION,), 3: (DEGENERATION,), 4: (TEXTS, MEANING, GREEDY)}


def _counts(n: int, sample: Sample) -> Columns:
    """Sum of rep-n over the texts that have n-grams, and the number of these texts."""
    found = [ngrams(output.text, n) for output in sample.outputs]
    shares = [1 - len(set(grams)) / len(grams) for grams in found if grams]
    return {f"rep{n}": sum(shares), f"rep{n}_texts": len(shares)}


def _rep(n: int) -> TextMetric:
    def columns(sample: Sample) -> Columns:
        return _counts(n, sample)

    return TextMetric(
        f"rep{n}", mean_of(f"rep{n}", f"rep{n}_texts"), f"1-distinct/all {n}-grams of words in a text|mean over texts"
        "|v:1", exchange_test=True, columns=columns, shown=Shown(f"rep-{n}", 3, None, _TABLES[n]),
    )


def _all_orders(sample: Sample) -> Columns:
    return {name: value for n in ORDERS for name, value in _counts(n, sample).items()}


def _diversity(t: Totals) -> Array:
    value = 1 - share(t["rep2"], t["rep2_texts"])
    for n in ORDERS[1:]:
        value = value * (1 - share(t[f"rep{n}"], t[f"rep{n}_texts"]))
    return value


REPETITION = (
    *(_rep(n) for n in ORDERS),
    TextMetric(
        "diversity", _diversity, "product over n=2,3,4 of (1-rep_n)|v:1", exchange_test=True, columns=_all_orders,
        shown=Shown("diversity", 3, None, (TEXTS, MEANING), "diversity (1 is no repetition)", is_plotted=True),
    ),
)
