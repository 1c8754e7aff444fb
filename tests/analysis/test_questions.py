"""Accuracy by the number of the question about a context, and by bin: means over samples, without tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvbench.analysis.results import compute_results
from kvbench.store.folder import RunFolder
from kvbench.store.rows import Row
from tests.helpers.records import ASKED, FULL_ASKED, asked, sample

SAMPLES, QUESTIONS = 16, 4


@pytest.fixture
def scores() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "full": (rng.random((SAMPLES, QUESTIONS)) < 0.9).astype(float),
        "sinks": (rng.random((SAMPLES, QUESTIONS)) < [0.9, 0.7, 0.4, 0.2]).astype(float),
    }


def rows_of(path: Path, scores: dict[str, np.ndarray]) -> list[Row]:
    cells = {"full": FULL_ASKED, "sinks": ASKED}
    run = asked(path, [
        (cells[name], [sample(f"s{i:02d}", s.tolist(), bin=f"depth={50 * (i % 3):03d}") for i, s in enumerate(table)])
        for name, table in scores.items()
    ])
    return [row for row in compute_results(RunFolder(run)).rows if row.metric == "answer_accuracy"]


def test_accuracy_by_question_is_the_mean_over_samples(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    rows = {(row.method, row.params["bin"]): row for row in rows_of(tmp_path / "run", scores)}
    for number in range(QUESTIONS):
        for name, table in scores.items():
            row = rows[name, f"question={number + 1}"]
            assert row.value == pytest.approx(table[:, number].mean())
            assert (row.n, row.groups, row.p_value) == (SAMPLES, SAMPLES, None)
        row = rows["sinks", f"question={number + 1}"]
        apart = scores["sinks"][:, number] - scores["full"][:, number]
        assert row.delta == pytest.approx(apart.mean())
        drawn = np.random.default_rng(0).integers(0, SAMPLES, (5000, SAMPLES))
        ends = np.percentile(apart[drawn].mean(1), [2.5, 97.5])
        assert [row.delta_ci_low, row.delta_ci_high] == pytest.approx(list(ends))
    assert {name for _, name in rows} == {
        None, "depth=000", "depth=050", "depth=100", *(f"question={i + 1}" for i in range(QUESTIONS)),
    }


def test_parts_are_not_tested_and_do_not_weaken_the_test_of_the_whole(
    tmp_path: Path, scores: dict[str, np.ndarray]
) -> None:
    rows = rows_of(tmp_path / "run", scores)
    assert [row.params["bin"] for row in rows if row.p_value is not None] == [None]


def test_one_question_per_context_has_no_rows_by_question(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    rows = rows_of(tmp_path / "run", {name: table[:, :1] for name, table in scores.items()})
    assert not any(str(row.params["bin"]).startswith("question") for row in rows)


def test_contexts_may_have_different_numbers_of_questions(tmp_path: Path) -> None:
    counts = [1, 2, 3, 2, 3, 1]
    run = asked(tmp_path / "run", [
        (cell, [sample(f"s{i}", [float((i + k) % 2) for k in range(count)]) for i, count in enumerate(counts)])
        for cell in (FULL_ASKED, ASKED)
    ])
    rows = [row for row in compute_results(RunFolder(run)).rows if row.method == "sinks" and row.params["bin"]]
    assert {row.params["bin"]: (row.n, row.value) for row in rows if row.metric == "answer_accuracy"} == {
        "question=1": (6, 0.5), "question=2": (4, 0.5), "question=3": (2, 0.0),
    }
