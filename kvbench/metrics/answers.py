"""Answers to questions about long contexts: whether they are right, and what of the evidence is still held."""

from __future__ import annotations

from kvbench.metrics.base import ANSWERS, Array, Metric, Shown, Totals

RIGHT = 0.5
"""An answer is right if it has more than this share of its references; FLOOR below which a task is not solved."""
FLOOR = 0.5


def _accuracy(t: Totals) -> Array:
    return t["score"] / t["questions"]


def _survival(t: Totals) -> Array:
    return t["survival"] / t["survivals"]


def _negative(t: Totals) -> Array:
    return t["negative"] / t["full_right"]


def _length(t: Totals) -> Array:
    return t["written"] / t["full_written"]


ANSWERED = (
    Metric(
        "answer_accuracy", _accuracy, "mean score of the answers|v:1", tested="score",
        shown=Shown("accuracy", 2, "high", (ANSWERS,), "answer accuracy", is_plotted=True),
    ),
    Metric(
        "evidence_survival", _survival, "share of the evidence's entries held, mean over layers and heads|v:1",
        shown=Shown("evidence", 2, None, (ANSWERS,), "evidence held", is_plotted=True),
    ),
    Metric(
        "negative_share", _negative, "share of full's right answers that are wrong now|v:1",
        shown=Shown("lost", 2, "low", (ANSWERS,), "right answers lost"),
    ),
    Metric(
        "answer_length", _length, "tokens written/tokens that full wrote|v:1", exchange_test=False,
        shown=Shown("length", 2, None, (ANSWERS,), "length against full"),
    ),
)

CORRELATION = "survival_correlation"
CORRELATION_SIGNATURE = "Spearman over samples of the share of evidence held and the score|v:1"
CORRELATION_SHOWN = Shown("evidence held and score", 2, None)
"""The correlation of two columns of a cell, which is no function of their sums."""
