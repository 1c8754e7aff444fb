"""Perplexity, mean negative log-likelihood, bits per byte: token-weighted over the whole corpus."""

from __future__ import annotations

import numpy as np

from kvbench.metrics.base import LM, Array, Metric, Shown, Totals


def _nll(t: Totals) -> Array:
    return t["nll"] / t["tokens"]


def _ppl(t: Totals) -> Array:
    return np.asarray(np.exp(_nll(t)))


def _bits_per_byte(t: Totals) -> Array:
    return np.asarray(t["nll"] / (np.log(2) * t["n_bytes"]))


PERPLEXITY = (
    Metric(
        "ppl", _ppl, "exp(sum nll/sum tokens)|v:1", tested="nll",
        shown=Shown("ppl", 2, "low", (LM,), "perplexity", is_plotted=True),
    ),
    Metric("nll", _nll, "nats|sum nll/sum tokens|v:1", tested="nll", shown=Shown("nll", 3, "low", (LM,))),
    Metric(
        "bits_per_byte", _bits_per_byte, "sum nll/(ln2*sum utf8 bytes)|v:1", tested="nll",
        shown=Shown("bits/byte", 3, "low", (LM,)),
    ),
)


def recovery(method: Totals, full: Totals, none: Totals) -> Array:
    """Share of the benefit of context that the method keeps, in nll: (none - method) / (none - full)."""
    return (none["nll"] - method["nll"]) / (none["nll"] - full["nll"])


RECOVERY_SIGNATURE = "(nll_none-nll)/(nll_none-nll_full)|v:1"
RECOVERY_SHOWN = Shown("recovery", 2, "high", (LM,))
