"""What text metrics are computed from: columns per document, which are summed over groups."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbench.metrics.base import Array, Metric, Shown, Totals
from kvbench.store.records import Output


@dataclass(frozen=True)
class Sample:
    """The texts of one document under one way of decoding, and what they are compared with.

    Attributes:
        outputs: one text per draw.
        reference: the author's text; for the row of the authors' texts, that of the next document; None if there is no
            such text.
        reference_vector, prefix_vector: sentence embeddings, base64-encoded; None if there are none.
        full: the texts of the full cache under the same decoding; empty if there are none.
    """

    outputs: tuple[Output, ...]
    reference: str | None
    reference_vector: str | None
    prefix_vector: str | None
    full: tuple[Output, ...]


Columns = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class TextMetric(Metric):
    """A metric of texts.

    Attributes:
        columns: computes a document's columns, whose sums ``value`` is a function of; None if the document lacks what
            the metric needs, which leaves the metric out.
    """

    columns: Callable[[Sample], Columns | None] = lambda sample: None


def mean_of(column: str, count: str) -> Callable[[Totals], Array]:
    """The ``value`` of a metric that is a mean: the sum of one column divided by that of another."""

    return lambda t: share(t[column], t[count])


def share(part: Array, whole: Array) -> Array:
    """A share; not defined (nan) where the whole is 0, as of texts that are all too short for a metric."""
    with np.errstate(invalid="ignore"):
        return part / whole


def over_texts(column: str, measure: Callable[[Output, Sample], float | None]) -> Callable[[Sample], Columns | None]:
    """The ``columns`` of a mean over texts: the sum of a measure, and the number of texts."""

    def columns(sample: Sample) -> Columns | None:
        found = [measure(output, sample) for output in sample.outputs]
        present = [value for value in found if value is not None]
        if len(present) < len(found) or not found:
            return None
        return {column: float(sum(present)), f"{column}_texts": float(len(present))}

    return columns


def text_mean(
    name: str, signature: str, measure: Callable[[Output, Sample], float | None], shown: Shown
) -> TextMetric:
    """A metric that is the mean over all texts of a measure of one text."""
    return TextMetric(
        name, mean_of(name, f"{name}_texts"), f"mean over texts|{signature}", exchange_test=True,
        columns=over_texts(name, measure), shown=shown,
    )


def words(text: str) -> list[str]:
    """Words, separated by spaces, as in Su et al. (arXiv 2202.06417)."""
    return text.split()


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return list(zip(*(found[i:] for i in range(n)), strict=False))


def unpacked(vector: str) -> NDArray[np.float64]:
    """Decode a vector that was stored in half precision as base64."""
    return np.frombuffer(base64.b64decode(vector), dtype=np.float16).astype(np.float64)


def cosine(a: str, b: str) -> float:
    """Cosine similarity of two stored vectors."""
    left, right = unpacked(a), unpacked(b)
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
