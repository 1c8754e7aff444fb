"""Metrics: sufficient statistics per group in, a value with its signature out."""

from __future__ import annotations

from kvbench.metrics.agreement import AGREEMENT, KL_BINS
from kvbench.metrics.base import Metric, Totals
from kvbench.metrics.memory import MEMORY
from kvbench.metrics.perplexity import PERPLEXITY, RECOVERY_SIGNATURE, recovery
from kvbench.metrics.recall import RECALL

LM_METRICS = PERPLEXITY + AGREEMENT + MEMORY
RECALL_METRICS = RECALL + MEMORY
ANSWER_METRICS = (*PERPLEXITY, *(m for m in RECALL if m.name == "accuracy"), *AGREEMENT, *MEMORY)
METRIC_NAMES = tuple(dict.fromkeys((*(m.name for m in LM_METRICS + RECALL_METRICS), "recovery")))

__all__ = [
    "ANSWER_METRICS", "KL_BINS", "LM_METRICS", "MEMORY", "METRIC_NAMES", "RECALL_METRICS", "RECOVERY_SIGNATURE",
    "Metric", "Totals", "recovery",
]
