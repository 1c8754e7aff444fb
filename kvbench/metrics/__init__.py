"""Metrics: from sufficient statistics per group to a value with its signature."""

from __future__ import annotations

from kvbench.metrics import distinct, mauve
from kvbench.metrics.agreement import AGREEMENT, KL_BINS
from kvbench.metrics.answers import ANSWERED, CORRELATION, CORRELATION_SHOWN, CORRELATION_SIGNATURE
from kvbench.metrics.base import Metric, Shown, Totals
from kvbench.metrics.bleu import BLEU
from kvbench.metrics.chrf import CHRF
from kvbench.metrics.degeneration import DEGENERATION
from kvbench.metrics.gen_ppl import GEN_PPL
from kvbench.metrics.largest_ratio import LARGEST_RATIO, LARGEST_RATIO_SHOWN, LARGEST_RATIO_SIGNATURE
from kvbench.metrics.memory import MEMORY
from kvbench.metrics.perplexity import PERPLEXITY, RECOVERY_SHOWN, RECOVERY_SIGNATURE, recovery
from kvbench.metrics.prefix_match import PREFIX_MATCH
from kvbench.metrics.profile import PROFILE_SHOWN
from kvbench.metrics.recall import RECALL
from kvbench.metrics.repetition import REPETITION
from kvbench.metrics.rouge import ROUGE
from kvbench.metrics.semantic import SEMANTIC
from kvbench.metrics.texts import TextMetric

LM_METRICS = PERPLEXITY + AGREEMENT + MEMORY
RECALL_METRICS = RECALL + MEMORY
ANSWER_METRICS = (*PERPLEXITY, *(m for m in RECALL if m.name == "accuracy"), *AGREEMENT, *MEMORY)
TEXT_METRICS: tuple[TextMetric, ...] = (
    GEN_PPL, BLEU, CHRF, *ROUGE, *SEMANTIC, *REPETITION, *DEGENERATION, PREFIX_MATCH,
)
GENERATION_NAMES = (*(m.name for m in TEXT_METRICS), "distinct", "mauve")
METRIC_NAMES = tuple(dict.fromkeys((
    *(m.name for m in LM_METRICS + RECALL_METRICS), "recovery", *GENERATION_NAMES, *(m.name for m in ANSWERED),
)))
OTHER_NAMES = {
    "perplexity": "ppl", "loss": "nll", "bpb": "bits_per_byte", "kld": "kl", "acc": "accuracy",
    "exact_match": "answer_accuracy", "gen_perplexity": "gen_ppl", "rouge": "rougeL", "rouge-l": "rougeL",
    "chrf++": "chrf", "bertscore": "semantic", "similarity": "semantic", "memory": "kv_bytes_physical",
}
"""What metrics are called elsewhere."""
OVER_CELLS = {CORRELATION: CORRELATION_SIGNATURE, LARGEST_RATIO: LARGEST_RATIO_SIGNATURE}
"""Numbers that are no function of the sums of one cell, and their signatures."""
SHOWN: dict[str, Shown] = {
    **{m.name: m.shown for m in PERPLEXITY}, "recovery": RECOVERY_SHOWN,
    **{m.name: m.shown for m in (*LM_METRICS, *RECALL_METRICS, *ANSWERED, *TEXT_METRICS)},
    "mauve": mauve.SHOWN, "distinct": distinct.SHOWN, **PROFILE_SHOWN,
    CORRELATION: CORRELATION_SHOWN, LARGEST_RATIO: LARGEST_RATIO_SHOWN,
}
"""How every metric is shown; tables have their columns in this order."""
NEED_SCORER, NEED_ENCODER = ("gen_ppl",), ("semantic", "prefix_coherence")

__all__ = [
    "AGREEMENT", "ANSWERED", "ANSWER_METRICS", "GENERATION_NAMES", "KL_BINS", "LM_METRICS", "MEMORY", "METRIC_NAMES",
    "NEED_ENCODER", "NEED_SCORER", "OTHER_NAMES", "OVER_CELLS", "PREFIX_MATCH", "RECALL_METRICS", "RECOVERY_SIGNATURE",
    "SHOWN", "TEXT_METRICS", "Metric", "Shown", "TextMetric", "Totals", "recovery",
]
