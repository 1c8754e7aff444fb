"""ROUGE-1, -2 and -L: F1 of a text against its reference, by rouge-score (0 to 1), mean over texts."""

from __future__ import annotations

from functools import cache
from typing import Any

from kvbench.metrics.base import FLUENCY, GREEDY, TEXTS, Shown
from kvbench.metrics.texts import Sample, TextMetric, text_mean
from kvbench.store.records import Output

NAMES = ("rouge1", "rouge2", "rougeL")


_SHOWN = {
    "rouge1": Shown("ROUGE-1", 3, None, (TEXTS, FLUENCY)), "rouge2": Shown("ROUGE-2", 3, None, (FLUENCY,)),
    "rougeL": Shown("ROUGE-L", 3, None, (TEXTS, FLUENCY, GREEDY), "ROUGE-L with the author's text", is_plotted=True),
}


@cache
def _library() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(NAMES), use_stemmer=False)


@cache
def _scores(text: str, reference: str) -> dict[str, float]:
    return {name: score.fmeasure for name, score in _library().score(reference, text).items()}


def _rouge(name: str) -> TextMetric:
    def measure(output: Output, sample: Sample) -> float | None:
        if sample.reference is None:
            return None
        return float(_scores(output.text, sample.reference)[name])

    return text_mean(name, "rouge-score|F1|stemmer:no|tok:ascii alphanumerics, lower case", measure, _SHOWN[name])


ROUGE = tuple(_rouge(name) for name in NAMES)
