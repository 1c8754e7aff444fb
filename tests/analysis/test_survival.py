"""Evidence that survives, and being right: correlations are scipy's, intervals those of a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kvbench.analysis.results import compute_results
from kvbench.metrics.answers import CORRELATION
from kvbench.statistics import RESAMPLES, rank_correlations
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.folder import RunFolder
from kvbench.store.records import Cell
from kvbench.store.rows import Row
from tests.helpers.records import ASKED, FULL_ASKED, asked, sample

SAMPLES = 14


def made(seed: int, questions: int = 2) -> tuple[list[AnswerRecord], np.ndarray, np.ndarray]:
    """Records of two layers with two heads, and what they should give: mean survival and mean score."""
    rng = np.random.default_rng(seed)
    survival = rng.integers(0, 5, (SAMPLES, 2, 2)) / 4  # with ties
    scores = (rng.random((SAMPLES, questions)) < survival.mean((1, 2))[:, None]).astype(float)
    records = [sample(f"s{i:02d}", scores[i].tolist(), survival[i].tolist()) for i in range(SAMPLES)]
    return records, survival.mean((1, 2)), scores.mean(1)


def correlations(path: Path, cells: Sequence[tuple[Cell, list[AnswerRecord]]]) -> dict[tuple[str, float | None], Row]:
    questions = len(cells[0][1][0].answers)
    full = [sample(f"s{i:02d}", [1.0] * questions, [[1.0, 1.0]]) for i in range(SAMPLES)]
    rows = compute_results(RunFolder(asked(path, [(FULL_ASKED, full), *cells]))).rows
    return {(row.method, row.ratio_asked): row for row in rows if row.metric == CORRELATION}


def looped(held: np.ndarray, scores: np.ndarray) -> list[float]:
    """Ends of the interval from samples drawn one resample after the other: ``[samples]`` or ``[samples, ratios]``."""
    found = []
    for some in np.random.default_rng(0).integers(0, SAMPLES, (RESAMPLES, SAMPLES)):
        x, y = held[some].ravel(), scores[some].ravel()
        if len(set(x)) > 1 and len(set(y)) > 1:
            found.append(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    assert len(found) > 0.95 * RESAMPLES
    return [float(end) for end in np.percentile(found, [2.5, 97.5])]


def test_correlations_of_weighted_points_are_those_of_points_written_out() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, 9) / 3, rng.integers(0, 2, 9).astype(float)
    weights = rng.integers(0, 3, (40, 9)).astype(float)
    for found, some in zip(rank_correlations(x, y, weights), weights.astype(int), strict=True):
        a, b = np.repeat(x, some), np.repeat(y, some)
        if len(set(a)) < 2 or len(set(b)) < 2:
            assert np.isnan(found)
        else:
            assert found == pytest.approx(stats.spearmanr(a, b).statistic)


def test_a_row_is_spearman_over_samples_with_a_bootstrap_over_samples(tmp_path: Path) -> None:
    records, held, scores = made(3)
    [(key, row)] = correlations(tmp_path / "run", [(ASKED, records)]).items()
    assert key == ("sinks", 0.5)
    assert row.value == pytest.approx(stats.spearmanr(held, scores).statistic)
    assert [row.ci_low, row.ci_high] == pytest.approx(looped(held, scores), abs=1e-9)
    assert (row.n, row.groups, row.unit, row.params["bin"]) == (SAMPLES, SAMPLES, "point", None)


def test_for_one_question_it_is_near_the_point_biserial_correlation_of_ranks(tmp_path: Path) -> None:
    """With right and wrong only, Spearman's is the point-biserial correlation of the ranks of survival."""
    records, held, scores = made(4, questions=1)
    [row] = correlations(tmp_path / "run", [(ASKED, records)]).values()
    assert row.value == pytest.approx(stats.pointbiserialr(scores > 0, stats.rankdata(held)).statistic)


def test_over_ratios_each_sample_at_each_ratio_is_a_point(tmp_path: Path) -> None:
    (low, held_low, scores_low), (high, held_high, scores_high) = made(5), made(6)
    rows = correlations(tmp_path / "run", [(ASKED, low), (replace(ASKED, ratio_asked="0.8"), high)])
    assert set(rows) == {("sinks", 0.5), ("sinks", 0.8), ("sinks", None)}
    row, held, scores = rows["sinks", None], np.stack([held_low, held_high], 1), np.stack([scores_low, scores_high], 1)
    assert row.value == pytest.approx(stats.spearmanr(held.ravel(), scores.ravel()).statistic)
    assert [row.ci_low, row.ci_high] == pytest.approx(looped(held, scores), abs=1e-9)
    assert (row.n, row.groups, row.params["bin"]) == (2 * SAMPLES, SAMPLES, "ratios=0.5+0.8")


def test_what_is_not_defined_has_no_number(tmp_path: Path) -> None:
    records, _, _ = made(7)
    right = [replace(record, answers=sample("", [1.0, 1.0]).answers) for record in records]
    lacking = [replace(record, survival=None) for record in records]
    rare = [replace(record, answers=sample("", [float(i > 0)] * 2).answers) for i, record in enumerate(records)]
    methods = {"local": right, "kivi": lacking, "window": rare}
    rows = correlations(tmp_path / "run", [(replace(ASKED, method=name), some) for name, some in methods.items()])
    assert set(rows) == {("local", 0.5), ("window", 0.5)}  # kivi has no survival, and full is no method
    assert rows["local", 0.5].value is None  # all right
    assert rows["window", 0.5].value is not None
    assert rows["window", 0.5].ci_low is None  # more than a third of the resamples lack the only wrong answer
