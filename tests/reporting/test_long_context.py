"""Reports of questions about long contexts: heat maps over several runs, lines by question, and tables."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from kvbench.analysis.results import compute_results
from kvbench.reporting.figures import base, needles, questions
from kvbench.reporting.tables.tables import tables_of
from kvbench.reporting.tables.terminal import task_tables
from kvbench.store.folder import RunFolder
from kvbench.store.rows import Row
from tests.helpers.command import Call
from tests.helpers.page import numbers_of
from tests.helpers.records import ASKED, FULL_ASKED, SINKS, asked, made, sample

LENGTHS, DEPTHS, RATIOS = (512, 1024, 2048), (0, 50, 100), ("0.5", "0.9")


def score(method: str, ratio: float, length: int, depth: int, number: int) -> float:
    if method == "full":
        return 1.0
    return float((depth + 100 * number) / 200 >= ratio - 256 / length)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run for each length: two samples at each depth, two questions each."""
    cells = [FULL_ASKED, *(
        replace(ASKED, method=method, ratio_asked=ratio) for method in ("sinks", "snapkv") for ratio in RATIOS
    )]
    return [
        asked(tmp_path / f"run_{length}", [(cell, [
            sample(
                f"s{i}-{depth}", [score(cell.method, float(cell.ratio_asked or 0), length, depth, i)] * 2,
                [[depth / 100, 0.5]], f"depth={depth:03d}",
            ) for depth in DEPTHS for i in range(2)
        ]) for cell in cells if length < 2048 or cell.method != "snapkv"], length) for length in LENGTHS
    ]


@pytest.fixture
def rows(runs: list[Path]) -> list[Row]:
    return [row for run in runs for row in compute_results(RunFolder(run)).rows]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are drawn, by the name they would be saved under."""
    figures: dict[str, Figure] = {}

    def keep(figure: Figure, folder: Path, name: str) -> list[Path]:
        figures[name] = figure
        return [folder / name]

    for module in (needles, questions, base):
        monkeypatch.setattr(module, "save", keep)
    return figures


def test_a_heat_map_has_the_accuracy_at_every_length_and_depth(
    rows: list[Row], drawn: dict[str, Figure], tmp_path: Path
) -> None:
    needles.needle_figures(rows, tmp_path)
    figure = drawn["heatmap-needles"]
    maps = {place.get_title(): place for place in figure.axes if place.images}
    assert list(maps) == ["full", "sinks 0.5", "sinks 0.9", "snapkv 0.5", "snapkv 0.9"]
    for title, place in maps.items():
        method, _, ratio = title.partition(" ")
        found = place.images[0].get_array()
        assert found.shape == (len(DEPTHS), len(LENGTHS))  # the beginning of the context is above
        for (y, depth), (x, length) in ((a, b) for a in enumerate(DEPTHS) for b in enumerate(LENGTHS)):
            if method == "snapkv" and length == 2048:
                assert np.ma.getmaskarray(found)[y, x]
                continue
            wanted = np.mean([score(method, float(ratio or 0), length, depth, i) for i in range(2)])
            assert found[y, x] == pytest.approx(wanted), (title, depth, length)
        assert place.images[0].get_clim() == (0, 1)
    first = maps["snapkv 0.5"]  # of the last line
    assert [label.get_text() for label in first.get_yticklabels()] == [str(depth) for depth in DEPTHS]
    assert [label.get_text() for label in first.get_xticklabels()] == [str(length) for length in LENGTHS]
    assert figure.get_suptitle() == "needles (m, seed 0; 2 samples a cell)"


def test_questions_known_have_a_figure_of_their_own(
    tmp_path: Path, drawn: dict[str, Figure]
) -> None:
    known = {"options": {"question": "known"}}
    records = [sample(f"s{i}", [1.0], bin=f"depth={50 * i:03d}") for i in range(3)]
    cells = [FULL_ASKED, ASKED, replace(FULL_ASKED, **known), replace(ASKED, **known)]
    run = asked(tmp_path / "run", [(cell, records) for cell in cells])
    needles.needle_figures(list(compute_results(RunFolder(run)).rows), tmp_path)
    assert set(drawn) == {"heatmap-needles", "heatmap-needles-known"}


def test_many_methods_at_one_ratio_are_broken_into_lines(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    records = [sample(f"s{i}", [1.0], bin=f"depth={50 * i:03d}") for i in range(3)]
    cells = [FULL_ASKED, *(replace(ASKED, method=f"m{i}") for i in range(6))]
    run = asked(tmp_path / "run", [(cell, records) for cell in cells])
    needles.needle_figures(list(compute_results(RunFolder(run)).rows), tmp_path)
    axes = drawn["heatmap-needles"].axes
    assert sum(bool(place.images) for place in axes) == 7
    assert sum(not place.axison for place in axes) == 3  # two lines of five


def test_tasks_with_full_only_have_no_panel(rows: list[Row], drawn: dict[str, Figure], tmp_path: Path) -> None:
    alone = [replace(row, task="unsolved") for row in rows if row.method == "full"]
    base.removal_figure([*rows, *alone], "answer_accuracy", tmp_path, "accuracy")
    panels = [place.get_title() for place in drawn["answer_accuracy-removal"].axes if place.get_title()]
    assert len(panels) == len(LENGTHS)
    assert not any("unsolved" in title for title in panels)
    assert base.removal_figure(alone, "answer_accuracy", tmp_path, "accuracy") == []


def test_lines_by_question_go_through_the_means(rows: list[Row], drawn: dict[str, Figure], tmp_path: Path) -> None:
    questions.question_figures(rows, tmp_path)
    assert set(drawn) == {"questions-needles", "questions-needles-2", "questions-needles-3"}  # one for each length
    places = drawn["questions-needles"].axes
    assert [place.get_title() for place in places] == ["0.5 removed", "0.9 removed"]
    wanted = {
        (row.method, row.ratio_asked, row.params["bin"]): row.value for row in rows
        if row.metric == "answer_accuracy" and row.params["context_length"] == 512
    }
    for place, ratio in zip(places, RATIOS, strict=True):
        lines = {str(line.get_label()): line for line in place.lines}
        assert set(lines) == {"full", "sinks", "snapkv"}
        for method, line in lines.items():
            at = None if method == "full" else float(ratio)
            assert list(line.get_xdata()) == [1, 2]
            assert list(line.get_ydata()) == [wanted[method, at, f"question={number}"] for number in (1, 2)]


def test_tables_tell_lengths_apart(rows: list[Row]) -> None:
    tables = {table.name: table for table in tables_of(rows)}
    for length in LENGTHS:
        assert f"length {length}" in tables[f"needles-{length}"].title
        for part in ("depth", "question", "survival"):
            assert f"needles-{length}-{part}" in tables
    depth = tables["needles-512-depth"]
    assert depth.columns == ("method", "asked", "000", "050", "100")
    sinks = next(line for line in depth.rows if (line[0].text, line[1].text) == ("sinks", "0.9"))
    assert [cell.sort for cell in sinks[2:]] == [
        np.mean([score("sinks", 0.9, 512, depth, i) for i in range(2)]) for depth in DEPTHS
    ]


def test_the_terminal_says_what_is_lost_and_where(rows: list[Row]) -> None:
    text = StringIO()
    Console(file=text, width=140).print(task_tables([row for row in rows if row.params["context_length"] == 2048]))
    said = " ".join(text.getvalue().split())
    for words in (
        "needles, length 2048: accuracy of the answers", "accuracy by depth of the needle in percent",
        "accuracy by number of the question about a context", "correlation of evidence held and score",
        "largest ratio without significant loss (accuracy)", "too few samples to test",
    ):
        assert words in said


def test_a_report_of_several_lengths_has_all_of_it(called: Call, runs: list[Path], tmp_path: Path) -> None:
    found = called(["report", *runs[:2], "--out", tmp_path / "report"])
    assert found.code == 0, found.err
    assert (tmp_path / "report" / "figures" / "heatmap-needles.pdf").is_file()
    page = tmp_path / "report" / "report.html"
    assert "Not decided at some ratios, since too few documents differ: " in page.read_text()
    content = numbers_of(page)
    bins = {str(row[content["columns"].index("bin")]).partition("=")[0] for row in content["rows"]}
    assert {"depth", "question"} <= bins
    assert (tmp_path / "report" / "tables" / "needles-1024-largest-ratio.csv").is_file()


def test_other_runs_have_none_of_it(tmp_path: Path) -> None:
    full = replace(SINKS, method="full", ratio_asked=None, role="control")
    rows = list(compute_results(RunFolder(made(tmp_path / "run", [(full, 0.0), (SINKS, 1.0)]))).rows)
    assert needles.needle_figures(rows, tmp_path) + questions.question_figures(rows, tmp_path) == []
    assert [table.name for table in tables_of(rows)] == ["minidocs"]
