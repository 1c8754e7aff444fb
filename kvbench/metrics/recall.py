"""Recall of a stated fact: whether every token of the answer is the most probable one, and the answer's likelihood."""

from __future__ import annotations

from kvbench.metrics.base import ANSWERS, Array, Metric, Shown, Totals


def _accuracy(t: Totals) -> Array:
    return t["correct"] / t["pieces"]


def _answer_nll(t: Totals) -> Array:
    return t["nll"] / t["tokens"]


RECALL = (
    Metric(
        "accuracy", _accuracy, "all answer tokens are the teacher-forced argmax|v:1",
        tested="correct", shown=Shown("accuracy", 2, "high", (ANSWERS,), "recall accuracy", is_plotted=True),
    ),
    Metric(
        "answer_nll", _answer_nll, "nats per answer token|v:1", tested="nll",
        shown=Shown("answer nll", 2, "low", (ANSWERS,)),
    ),
)
