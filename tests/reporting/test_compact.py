"""The compact tables of the terminal: they fit, they are sorted, and their sentence says what the numbers say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from kvbench.analysis.results import compute_results
from kvbench.api.results import Evaluation
from kvbench.reporting.best import NO_USE, best, unranked
from kvbench.reporting.page.summary import summary_of
from kvbench.reporting.tables.compact import UNEQUALLY, main_metric, reading
from kvbench.reporting.tables.terminal import print_results
from kvbench.store.folder import RunFolder
from kvbench.store.records import Cell
from kvbench.store.rows import Results, Row
from tests.helpers.command import Call
from tests.helpers.records import ASKED, DOCUMENTS, FULL_ASKED, SINKS, asked, made, sample

FULL = replace(SINKS, method="full", ratio_asked=None, role="control")
LONG = "ein-verfahren-mit-überlangem-namen:window=128,kernel=13,pool=max"


def printed(results: Results, wide: bool = False) -> str:
    text = StringIO()
    print_results(results, Console(file=text), None, wide)
    return text.getvalue()


def cells_of_method(method: str, ratios: Sequence[str]) -> list[Cell]:
    return [replace(SINKS, method=method, ratio_asked=ratio) for ratio in ratios]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three methods at two ratios, worse by known amounts."""
    grid = [*cells_of_method("sinks", ("0.5", "0.9")), *cells_of_method("local", ("0.5", "0.9"))]
    cells = [(FULL, 0.0), *zip(grid, (0.02, 3.0, 1.0, 20.0), strict=True)]
    return compute_results(RunFolder(made(tmp_path / "run", cells)))


def test_a_line_for_each_cell_best_first_within_100_columns(results: Results) -> None:
    text = printed(results)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    found = [re.match(r" (\S+) +([\d.-]+)(?: \(0.45\))? +([\d.]+) ±([\d.]+) ", line) for line in lines]
    table = [(m[1], m[2], float(m[3])) for m in found if m]
    assert [(method, removed) for method, removed, _ in table] == [
        ("full", "-"), ("sinks", "0.5"), ("local", "0.5"), ("sinks", "0.9"), ("local", "0.9"),
    ]
    values = {(row.method, row.ratio_asked): row for row in results.rows if row.metric == "ppl"}
    for (method, removed, value), match in zip(table, (m for m in found if m), strict=True):
        row = values[method, None if removed == "-" else float(removed)]
        low, high = row.ci_low or 0.0, row.ci_high or 0.0
        assert value == pytest.approx(row.value, abs=0.05)
        assert float(match[4]) == pytest.approx((high - low) / 2, abs=0.06)


def test_the_sentence_names_the_best_and_what_was_not_decided(results: Results) -> None:
    mine = [row for row in results.rows if row.params.get("bin") is None]
    assert main_metric(mine) == "ppl"
    said = reading(mine, "ppl")
    assert re.search(r"at 0.5 sinks \(\+\d.*at 0.9 sinks \(\+\d", said)
    tested = {(r.method, r.ratio_asked): r.p_value for r in mine if r.metric == "ppl"}
    assert tested["local", 0.9] < 0.05  # type: ignore[operator]
    same = [f"{method} {ratio:g}" for (method, ratio), p in tested.items() if p is not None and p >= 0.05]
    if same:
        assert said.endswith(f"No significant difference to the full cache: {', '.join(same)}.")
    else:
        assert said.endswith("All differ from the full cache (p < .05).")
    starred = [line for line in printed(results).splitlines() if "*" in line and line.startswith(" ")]
    assert len(starred) == len([p for p in tested.values() if p is not None and p < 0.05])


def test_methods_that_removed_unequally_are_not_ranked_by_the_ratio_asked(results: Results) -> None:
    """A policy that fills its budget as it reads removes little on average, and little is what it loses."""
    mean = {("sinks", 0.5): 0.14, ("local", 0.5): 0.45, ("sinks", 0.9): 0.88, ("local", 0.9): 0.89}
    mine = [
        replace(row, ratio_mean=mean[row.method, row.ratio_asked or 0.0]) if row.ratio_asked else row
        for row in results.rows if row.params.get("bin") is None
    ]
    said = reading(mine, "ppl")
    assert re.search(r"at 0.5 sinks \(\+[^)]*, mean 0.14\), local \(\+[^)]*, mean 0.45\); at 0.9 sinks \(\+", said)
    assert said.count("mean 0.") == 2
    assert UNEQUALLY in said
    lines = printed(replace(results, rows=tuple(mine))).splitlines()
    assert max(map(len, lines)) <= 100
    assert next(line for line in lines if "method" in line).split()[:3] == ["method", "removed", "mean"]
    found = [re.match(r" (\S+) +0.5 \(0.45\) +([\d.]+) ", line) for line in lines]
    assert {m[1]: m[2] for m in found if m} == {"sinks": "0.14", "local": "0.45"}
    assert UNEQUALLY not in reading([row for row in results.rows if row.params.get("bin") is None], "ppl")
    whole = "; ".join(summary_of(mine).sentences)
    assert "0.5 removed: lowest perplexity, among those that removed as much on average: sinks" in whole


@pytest.mark.parametrize(("low", "is_ranked"), [(0.3, True), (0.0, False), (-0.4, False)])
def test_a_model_that_makes_no_use_of_its_context_ranks_nothing(results: Results, low: float, is_ranked: bool) -> None:
    """The interval of the difference between no context and the full cache reaches 0: removal costs nothing here."""
    whole = [row for row in results.rows if row.params.get("bin") is None]
    some = next(row for row in whole if row.metric == "ppl" and row.delta is not None)
    none = replace(
        some, method="none", ratio_asked=None, delta=0.5, delta_ci_low=low, delta_ci_high=1.0, baseline="full"
    )
    rows = (*whole, none)
    text = re.sub(r"\s+", " ", printed(replace(results, rows=rows)))
    wide = re.sub(r"\s+", " ", printed(replace(results, rows=rows), wide=True))
    assert ("Best, with the difference" in text) == is_ranked
    assert (NO_USE in text) == (NO_USE in wide) == (not is_ranked)
    said = "; ".join(summary_of(rows).sentences)
    assert ("lowest perplexity" in said) == is_ranked
    assert ("does not predict reliably better with a context" in said) == (not is_ranked)
    better = replace(none, metric="answer_accuracy", delta_ci_low=-1.0, delta_ci_high=-low)
    assert (unranked([better], "answer_accuracy") == "") == is_ranked


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10)), min_size=1, max_size=8))
def test_the_best_are_those_that_none_beats_with_as_much_removed(
    results: Results, drawn: list[tuple[int, int]]
) -> None:
    bare = next(row for row in results.rows if row.metric == "ppl")
    rows = [
        replace(bare, method=str(i), metric="ppl", value=float(value), ratio_mean=share / 10)
        for i, (value, share) in enumerate(drawn)
    ]
    found = {row.method for row in best(rows)}
    assert found
    for row, (value, share) in zip(rows, drawn, strict=True):
        beaten = any(other < value and theirs >= share for other, theirs in drawn)
        assert (row.method in found) == (not beaten)


@pytest.mark.parametrize(("documents", "methods", "few"), [(4, 1, True), (6, 1, False), (6, 3, True), (9, 3, False)])
def test_too_few_documents_are_said_where_no_difference_could_be_significant(
    tmp_path: Path, documents: int, methods: int, few: bool
) -> None:
    """However large the difference is: p is at least 2 / 2^n for n documents, times the number of comparisons."""
    grid = [replace(SINKS, method=name) for name in ("sinks", "local", "window")[:methods]]
    cells = [(FULL, 0.0), *((cell, 50.0) for cell in grid)]
    run = made(tmp_path / "run", cells, documents=DOCUMENTS[:documents])
    rows = [row for row in compute_results(RunFolder(run)).rows if row.metric == "ppl" and not row.params.get("bin")]
    p_values = [row.p_value for row in rows if row.p_value is not None]
    assert len(p_values) == methods
    assert (min(p_values) >= 0.05) == few
    said = reading(rows, "ppl")
    assert ("Too few documents to test" in said) == few
    enough = 6 if methods == 1 else 7
    assert (f"; it takes {enough} documents at least." in said) == few
    more = made(tmp_path / "more", cells, documents=DOCUMENTS[:enough])
    p_values = [row.p_value for row in compute_results(RunFolder(more)).rows if row.metric == "ppl" and row.p_value]
    assert max(p_values) < 0.05  # and that many are enough


def test_groups_are_counted_where_they_hold_several_documents(results: Results) -> None:
    rows = [replace(row, groups=3) for row in results.rows if row.metric == "ppl" and not row.params.get("bin")]
    assert "with 3 groups, no difference could be significant in 4 comparisons; it takes 8 groups at least" in reading(
        rows, "ppl"
    )


def test_answers_have_bars_and_ties_are_named(tmp_path: Path) -> None:
    def records(share: int) -> list[object]:
        return [sample(f"d{i}", [float(i < share)]) for i in range(20)]

    run = asked(tmp_path / "run", [  # type: ignore[arg-type]
        (FULL_ASKED, records(20)), (replace(ASKED, method="snapkv"), records(10)),
        (replace(ASKED, method="tova"), records(10)), (replace(ASKED, method="random"), records(0)),
    ])
    lines = printed(compute_results(RunFolder(run))).splitlines()
    bars = {line.split()[0]: line.count("█") for line in lines if re.match(r" \w+ +(-|0\.5) ", line)}
    assert bars == {"full": 8, "snapkv": 4, "tova": 4, "random": 0}
    assert "at 0.5 snapkv, tova (-0.50" in " ".join(" ".join(lines).split())


def test_long_names_and_large_numbers_do_not_break_the_line(results: Results) -> None:
    def longer(row: Row) -> Row:
        if row.method != "local":
            return row
        if row.metric != "ppl":
            return replace(row, method=LONG)
        low, value, high = 1e7, 6.5e7, 9e7
        return replace(row, method=LONG, value=value, ci_low=low, ci_high=high, delta=value, delta_ci_low=low,
                       delta_ci_high=high)

    text = printed(replace(results, rows=tuple(map(longer, results.rows))))
    assert max(map(len, text.splitlines())) <= 100
    assert "6.50e+07" in text
    folded = "".join(line.split()[0] for line in text.splitlines() if line.startswith(" ") and line.split())
    assert LONG in folded or LONG[:20] in folded


def test_written_texts_fit_as_well(results: Results) -> None:
    """With every metric that may stand beside fluency, and numbers in the hundreds."""
    rows = []
    for row in (row for row in results.rows if row.metric == "ppl"):
        text = replace(row, task="minidocs-gen", protocol="generate")
        large = {name: 100 * (getattr(row, name) or 1.0) for name in ("value", "ci_low", "ci_high", "delta",
                                                                       "delta_ci_low", "delta_ci_high")}
        rows.append(replace(text, metric="gen_ppl", **large))
        rows += [replace(text, metric=name) for name in ("chrf", "rougeL", "semantic", "mauve", "prefix_match")]
        rows += [replace(text, metric=f"kv_bytes_{kind}") for kind in ("physical", "full")]
    lines = printed(replace(results, rows=tuple(rows))).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    assert [line.split()[0] for line in lines if re.match(r" (full|sinks|local) ", line)] == [
        "full", "sinks", "local", "sinks", "local",
    ]


def test_a_notebook_shows_the_same_table(results: Results, tmp_path: Path) -> None:
    found = Evaluation(tmp_path / "<run>", results)
    html = found._repr_html_()
    text = unescape(re.sub(r"<[^>]+>", "", html))
    assert text.rstrip() == str(found).rstrip()
    assert "&lt;run&gt;" in html


def test_wide_prints_everything_and_files_stay_as_they_were(called: Call, results: Results, tmp_path: Path) -> None:
    compact, wide = called(["report", "run"]), called(["report", "run", "--wide"])
    assert (compact.code, wide.code) == (0, 0)
    assert "removed:" in wide.out
    assert "[95 % CI]" in wide.out
    assert "[95 % CI]" not in compact.out
    assert "[95 % CI]" in (tmp_path / "run" / "table.txt").read_text()
    assert "block|L:512" in (tmp_path / "run" / "table.txt").read_text()
