"""Agreement with the full cache on the same targets: more sensitive than perplexity."""

from __future__ import annotations

import numpy as np

from kvbench.metrics.base import LM, Array, Metric, Shown, Totals

KL_BINS = 1000
KL_LOW, KL_HIGH = 1e-8, 1e2


def _kl(t: Totals) -> Array:
    return t["kl"] / t["tokens"]


def _top1(t: Totals) -> Array:
    return t["top1"] / t["tokens"]


def _kl_p99(t: Totals) -> Array:
    """99th percentile of the per-token KL, interpolated inside a logarithmic bin."""
    counts = t["kl_bins"]
    below = np.cumsum(counts, axis=-1)
    target = 0.99 * below[..., -1:]
    place = np.argmax(below >= target, axis=-1)[..., None]
    inside = np.take_along_axis(counts, place, -1)
    before = np.take_along_axis(below, place, -1) - inside
    part = np.where(inside > 0, (target - before) / np.maximum(inside, 1e-300), 0.0)
    return np.asarray(KL_LOW * (KL_HIGH / KL_LOW) ** ((place + part)[..., 0] / KL_BINS))


AGREEMENT = (
    Metric("kl", _kl, "KL(full||method)|nats|mean per token|v:1",
           shown=Shown("KL", 3, "low", (LM,), "KL from the full cache (nats per token)")),
    Metric("kl_p99", _kl_p99, f"KL(full||method)|nats|99th percentile|bins:{KL_BINS} log|v:1",
           shown=Shown("KL, 99 %", 3, "low")),
    Metric("top1_agreement", _top1, "argmax equals full's|share of tokens|v:1",
           shown=Shown("top-1", 3, "high", (LM,))),
)
