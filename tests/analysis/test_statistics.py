"""Statistics against closed forms, published examples and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kvbench.metrics import LM_METRICS, RECALL_METRICS, recovery
from kvbench.metrics.agreement import KL_BINS, KL_HIGH, KL_LOW
from kvbench.statistics import RESAMPLES, GroupSums, bootstrap_intervals, holm, least_groups, paired_p_value


def mean_of(tables: list[np.ndarray]) -> np.ndarray:
    return (tables[0][:, 0] / tables[0][:, 1])[None]


def test_bootstrap_interval_of_a_mean_is_the_closed_form() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    table = np.stack([values, np.ones(400)], 1)
    low, high = bootstrap_intervals([GroupSums(table)], mean_of, 0)[0]
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.01)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.01)


def test_bootstrap_covers_the_truth_at_its_level() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(150):
        table = np.stack([rng.exponential(2.0, 60), np.ones(60)], 1)
        low, high = bootstrap_intervals([GroupSums(table)], mean_of, trial)[0]
        hits += low <= 2.0 <= high
    assert 0.87 < hits / 150 <= 1.0


def test_bootstrap_is_seeded_and_paired() -> None:
    rng = np.random.default_rng(2)
    a = np.stack([rng.normal(5, 3, 80), np.ones(80)], 1)
    b = a + np.array([0.1, 0.0])

    def difference(tables: list[np.ndarray]) -> np.ndarray:
        return (tables[1][:, 0] / tables[1][:, 1] - tables[0][:, 0] / tables[0][:, 1])[None]

    first = bootstrap_intervals([GroupSums(a), GroupSums(b)], difference, 7)
    assert np.array_equal(first, bootstrap_intervals([GroupSums(a), GroupSums(b)], difference, 7))
    assert first[0] == pytest.approx([0.1, 0.1])


def test_one_group_has_no_interval() -> None:
    assert np.isnan(bootstrap_intervals([GroupSums(np.array([[3.0, 1.0]]))], mean_of, 0)).all()
    assert paired_p_value(np.array([1.0]), 0) is None


def test_sign_flip_test_is_exact_for_few_groups() -> None:
    assert paired_p_value(np.ones(6), 0) == pytest.approx(2 / 64)
    assert paired_p_value(np.zeros(6), 0) == 1.0
    assert paired_p_value(np.array([1.0, -1.0, 1.0, -1.0]), 0) == 1.0


def test_sign_flip_test_is_fair_and_has_power() -> None:
    rng = np.random.default_rng(3)
    fair = [paired_p_value(rng.normal(0, 1, 40), i) or 0 for i in range(60)]
    assert 0.3 < np.mean(np.array(fair) < 0.5) < 0.7
    assert (paired_p_value(rng.normal(1, 1, 40), 0) or 1) < 0.001


def test_holm_golden() -> None:
    """Values of R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_never_below_raw(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    sorted_adjusted = [adjusted[i] for i in order]
    assert sorted_adjusted == sorted(sorted_adjusted)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True) if a is not None)


def metric(name: str) -> object:
    return next(m for m in LM_METRICS + RECALL_METRICS if m.name == name)


def totals(**columns: float) -> dict[str, np.ndarray]:
    return {name: np.array([value]) for name, value in columns.items()}


def test_metrics_are_token_weighted() -> None:
    t = totals(nll=30.0, tokens=10.0, n_bytes=40.0, kl=2.0, top1=7.0, correct=3.0, pieces=4.0)
    values = {name: float(metric(name).value(t)[0]) for name in (  # type: ignore[attr-defined]
        "ppl", "nll", "bits_per_byte", "kl", "top1_agreement", "accuracy", "answer_nll")}
    assert values == pytest.approx({
        "ppl": np.exp(3), "nll": 3.0, "bits_per_byte": 30 / (np.log(2) * 40), "kl": 0.2,
        "top1_agreement": 0.7, "accuracy": 0.75, "answer_nll": 3.0,
    })


def test_recovery_is_one_at_full_and_zero_at_none() -> None:
    full, none, half = totals(nll=30.0), totals(nll=40.0), totals(nll=35.0)
    found = [float(recovery(m, full, none)[0]) for m in (full, none, half)]
    assert found == [1.0, 0.0, 0.5]


def test_quantile_from_bins_is_that_of_numpy() -> None:
    values = np.random.default_rng(0).lognormal(-3, 1.5, 20_000)
    place = np.log(np.clip(values, KL_LOW, KL_HIGH) / KL_LOW) / np.log(KL_HIGH / KL_LOW) * KL_BINS
    counts = np.bincount(place.astype(int), minlength=KL_BINS)[None].astype(float)
    found = metric("kl_p99").value({"kl_bins": counts})[0]  # type: ignore[attr-defined]
    assert found == pytest.approx(np.quantile(values, 0.99), rel=0.01)


def test_intervals_are_those_of_scipy() -> None:
    """The same draws and the same percentiles, which are only not drawn anew for every table."""
    values = np.random.default_rng(1).lognormal(size=(37, 1))
    found = stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval
    mine = bootstrap_intervals([GroupSums(values)], lambda tables: tables[0].T / 37, 5)[0]
    assert mine == pytest.approx([found.low, found.high], rel=1e-9)


def test_flips_are_those_of_a_plain_loop() -> None:
    differences = np.random.default_rng(2).normal(0.2, 1, 30)
    plain = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    ).pvalue
    assert paired_p_value(differences, 0) == pytest.approx(plain, abs=0.02)


@pytest.mark.parametrize("tests", [1, 2, 5, 40, 200])
def test_the_least_groups_are_those_of_the_test_itself(tests: int) -> None:
    """Groups that all differ in one direction are significant with so many, and not with one fewer (the exact test)."""
    least = least_groups(tests)
    assert least is not None
    for groups, is_enough in ((least, True), (least - 1, False)):
        found = holm([paired_p_value(np.arange(1.0, groups + 1), 0)] * tests)
        assert all((p is not None and p < 0.05) == is_enough for p in found)
    assert least_groups(10_000) is None
