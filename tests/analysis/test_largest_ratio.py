"""The largest ratio without significant loss: from p-values that are known in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kvbench.analysis.results import compute_results
from kvbench.metrics.largest_ratio import LARGEST_RATIO
from kvbench.statistics import MOST_FLIPS, paired_p_value, smallest_p_value
from kvbench.store.folder import RunFolder
from kvbench.store.rows import Row
from tests.helpers.records import ASKED, CELL, FULL_ASKED, LOCAL, SINKS, asked, made, sample


def found(path: Path, wrong: Mapping[str, Sequence[int]], samples: int = 12, right: int | None = None) -> Row | None:
    """The row of a method that answers so many samples wrongly at each ratio; negative numbers: so many more rightly
    than the full cache, which has the first ``right`` of them."""
    right = samples if right is None else right
    cells = [(FULL_ASKED, [sample(f"s{i:02d}", [float(i < right)]) for i in range(samples)])]
    for ratio, (lost, gained) in wrong.items():
        scores = [float(lost <= i < right + gained) for i in range(samples)]
        cells.append((replace(ASKED, ratio_asked=ratio), [sample(f"s{i:02d}", [s]) for i, s in enumerate(scores)]))
    rows = compute_results(RunFolder(asked(path, cells))).rows
    return next((row for row in rows if row.metric == LARGEST_RATIO), None)


@pytest.mark.parametrize("differences", [[1.0, 2.0, 0.5], [1.0, 1.0, 0.0, 3.0, 1.0], [0.0, 0.0], [2.0] * 7])
def test_the_smallest_p_value_is_the_smallest_over_all_signs(differences: list[float]) -> None:
    values = [paired_p_value(np.array(signs) * differences, 0) for signs in product((-1, 1), repeat=len(differences))]
    least = min(value for value in values if value is not None)
    assert smallest_p_value(len(differences), int(np.count_nonzero(differences))) == pytest.approx(least)


def test_the_smallest_p_value_of_many_groups_is_that_of_the_flips() -> None:
    least = paired_p_value(np.ones(60), 0)
    assert least is not None
    assert smallest_p_value(60, 60) == pytest.approx(least)
    assert least == pytest.approx(2 / (MOST_FLIPS + 1))
    assert smallest_p_value(60, 4) == 2**-3
    assert smallest_p_value(1, 1) == smallest_p_value(9, 0) == 1.0


def test_it_is_the_ratio_before_the_first_that_loses(tmp_path: Path) -> None:
    """9 losses of 12: p = 2^-8, times 3 tests. 8 changes, half of them gains: far from significant, but 2^-7 times 2
    could have been."""
    row = found(tmp_path / "run", {"0.3": (4, 4), "0.6": (4, 4), "0.9": (9, 0)}, samples=16, right=12)
    assert row is not None
    assert (row.value, row.params["outcome"], row.params["loses_at"]) == (0.6, "found", 0.9)
    assert row.params["of"] == "answer_accuracy"
    assert row.params["untested"] == {}
    assert row.delta == pytest.approx(0.0)
    assert row.delta_ci_low is not None
    assert row.params["bin"] == "ratios=0.3+0.6+0.9"


def test_a_larger_ratio_does_not_count_beyond_one_that_loses(tmp_path: Path) -> None:
    row = found(tmp_path / "run", {"0.3": (4, 4), "0.6": (10, 0), "0.9": (4, 4)}, samples=16, right=12)
    assert row is not None
    assert (row.value, row.params["loses_at"]) == (0.3, 0.6)


def test_none_where_the_smallest_loses(tmp_path: Path) -> None:
    row = found(tmp_path / "run", {"0.3": (10, 0), "0.6": (12, 0)})
    assert row is not None
    assert (row.value, row.delta, row.params["outcome"], row.params["loses_at"]) == (None, None, "none", 0.3)


def test_too_few_differing_samples_make_no_claim(tmp_path: Path) -> None:
    """5 losses: no p below 2^-4, so that even the smaller of two tests could not be below .05."""
    row = found(tmp_path / "run", {"0.3": (3, 0), "0.6": (5, 0)})
    assert row is not None
    assert (row.value, row.params["outcome"], row.params["loses_at"]) == (None, "too few samples", None)
    assert row.params["untested"] == {"0.3": [3, 12], "0.6": [5, 12]}


def test_a_tested_ratio_counts_though_a_larger_one_could_not_be_tested(tmp_path: Path) -> None:
    row = found(tmp_path / "run", {"0.3": (4, 4), "0.6": (3, 0)}, samples=16, right=12)
    assert row is not None
    assert (row.value, row.params["outcome"], row.params["untested"]) == (0.3, "found", {"0.6": [3, 16]})


@pytest.mark.parametrize(("samples", "outcome"), [(12, "found"), (5, "too few samples")])
def test_equal_answers_are_no_loss_if_there_are_enough_to_see_one(tmp_path: Path, samples: int, outcome: str) -> None:
    """Had all of 12 been lost, p would have been 2^-11; of 5, 2^-4, which two tests double."""
    row = found(tmp_path / "run", {"0.3": (0, 0), "0.6": (0, 0)}, samples=samples)
    assert row is not None
    assert (row.params["outcome"], row.value) == (outcome, 0.6 if outcome == "found" else None)


def test_a_gain_is_no_loss(tmp_path: Path) -> None:
    row = found(tmp_path / "run", {"0.3": (0, 12), "0.6": (0, 11)}, samples=30, right=18)
    assert row is not None
    assert (row.value, row.params["loses_at"]) == (0.6, None)


def test_there_is_none_for_one_ratio_nor_under_the_floor(tmp_path: Path) -> None:
    assert found(tmp_path / "one", {"0.3": (0, 0)}) is None
    assert found(tmp_path / "floor", {"0.3": (0, 0), "0.6": (2, 0)}, right=4) is None


def test_perplexity_is_judged_as_well(tmp_path: Path) -> None:
    """Twenty documents: one nat more on all of them is significant, noise around the full cache is not."""
    full = replace(CELL, method="full", ratio_asked=None, role="control")
    cells = [
        (full, 0.0), (SINKS, 0.0), (replace(SINKS, ratio_asked="0.9"), 1.0), (replace(LOCAL, ratio_asked="0.5"), 2.0),
        (replace(LOCAL, ratio_asked="0.9"), 3.0), (replace(LOCAL, method="window"), 0.0),
    ]
    rows = compute_results(RunFolder(made(tmp_path / "run", cells))).rows
    mine = {row.method: row for row in rows if row.metric == LARGEST_RATIO}
    assert set(mine) == {"sinks", "local"}
    p = {(row.method, row.ratio_asked): row.p_value for row in rows if row.metric == "ppl"}
    assert (p["sinks", 0.5] or 0) > 0.05 > (p["sinks", 0.9] or 1)
    assert (mine["sinks"].value, mine["sinks"].params["of"], mine["local"].value) == (0.5, "ppl", None)
    assert mine["local"].params["outcome"] == "none"
