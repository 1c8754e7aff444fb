"""MAUVE: how close the distribution of generated texts is to that of human texts (arXiv 2102.01454).

It compares clusters of texts, so that it needs many, and its noise exceeds the differences of interest: it is measured
with several seeds of the clustering, and shown beside the value of human text (what the authors wrote after the
reference, against the references). Resampling texts would duplicate points and change the clusters, so the interval
covers only the seeds of the clustering. The library is GPL-3.0 and only called.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from kvbench.metrics.base import MEANING, TEXTS, Shown

Array = NDArray[np.float64]

SHOWN = Shown("MAUVE", 3, None, (TEXTS, MEANING))
LEAST_TEXTS = 200
"""Minimum number of texts; with fewer it is not measured."""
MANY_TEXTS = 1000
"""With fewer texts the value is shown with a warning: it is optimistic and noisy."""
SEEDS = (25, 26, 27, 28, 29)
"""Seeds of the clustering; the library's default first."""


def buckets(n: int) -> int:
    """Number of clusters for ``n`` texts per side: n / 10, as in the library, and the same for every row of a table."""
    return max(2, round(n / 10))


def measure(people: Array, written: Array, seeds: Sequence[int] = SEEDS) -> list[float]:
    """MAUVE between the embeddings ``[n, width]`` of human and of generated texts, once per seed."""
    from mauve import compute_mauve

    with _without_native_warnings():
        return [
            float(compute_mauve(
                p_features=people, q_features=written, num_buckets=buckets(len(people)), seed=seed, verbose=False
            ).mauve)
            for seed in seeds
        ]


@contextmanager
def _without_native_warnings() -> Iterator[None]:
    """Silence the native clustering, which warns of few points for every seed; the signature says it once."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds and the bounds of its 95 % t-interval."""
    from scipy import stats  # takes half a second, which most reports need not pay

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(stats.sem(values))
    return mean, mean - half, mean + half


def signature(n: int, features: str) -> str:
    """The settings that define what the number means."""
    warning = "" if n >= MANY_TEXTS else f"|few texts (below {MANY_TEXTS}): optimistic and noisy"
    return (
        f"mauve-text|features:{features} of the continuations|n:{n}|buckets:{buckets(n)}|scaling:5"
        f"|k-means seeds:{len(SEEDS)}|interval: t over the seeds, clustering only{warning}|v:1"
    )
