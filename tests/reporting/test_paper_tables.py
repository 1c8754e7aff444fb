"""LaTeX tables of a paper: how wide they are, what they explain, what they say of the ratio; and that all compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.analysis.results import compute_results
from kvbench.reporting.paper.columns import paper_tables
from kvbench.reporting.paper.paper import Paper, write_paper
from kvbench.reporting.paper.widths import COLUMN, PAGE, is_wide, width_of
from kvbench.reporting.tables.latex import latex
from kvbench.reporting.tables.plain import Table
from kvbench.store.folder import RunFolder
from kvbench.store.records import Failure
from kvbench.store.rows import Row
from tests.helpers.records import CELL, SINKS, made

needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
METHODS = ("streaming-llm", "expected-attention", "snapkv")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def row(method: str, ratio: float | None, **changes: object) -> Row:
    usual = Row(
        "minidocs", "block", "m", method, ratio, ratio, ratio, 9, "real", {}, 12, "ppl", 81.77, 75.0, 88.6, 12,
        "document", 5.5, 4.0, 7.0, 0.001, "full", 0, "ppl:block|v:1",
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def rows(ratios: tuple[float, ...], means: dict[str, float] | None = None, task: str = "minidocs") -> list[Row]:
    """Of the full cache and three methods; ``means``: what is removed on average, as a multiple of what was asked."""
    found = [row("full", None, task=task, ratio_mean=0.0, delta=None, p_value=None)]
    return found + [
        row(name, ratio, task=task, ratio_mean=(means or {}).get(name, 1.0) * ratio)
        for name in METHODS for ratio in ratios
    ]


def tables(found: list[Row]) -> dict[str, Table]:
    return {table.name: table for table in paper_tables(found, METHODS)}


def table(found: list[Row], name: str = "ppl-minidocs") -> Table:
    return tables(found)[name]


def lines(found: Table) -> dict[str, list[str]]:
    return {line[0].text: [cell.text for cell in line[1:]] for line in found.rows}


def test_a_table_takes_both_columns_only_if_it_must() -> None:
    for count, wide in ((1, False), (2, False), (3, False), (4, True)):
        found = table(rows(RATIOS[:count]))
        assert is_wide(found) == wide, (count, width_of(found))
        assert latex(found, is_wide(found)).startswith(r"\begin{table*}" if wide else r"\begin{table}")


def test_a_table_that_no_page_holds_is_shared_among_several() -> None:
    found = [one for name, one in tables(rows(RATIOS, {"snapkv": 0.5})).items() if name.startswith("ppl-minidocs")]
    assert [one.name for one in found] == ["ppl-minidocs-part-1", "ppl-minidocs-part-2"]
    assert all(width_of(one) <= PAGE for one in found)
    assert [head for one in found for head in one.columns if head.startswith("0")] == [f"{r:g}" for r in RATIOS]
    tasks = [f"task-{i}" for i in range(7)]
    many = tables([one for task in tasks for one in rows((0.5,), task=task)])
    assert [len(one.columns) for one in many.values() if one.name.startswith("ppl-block")] == [5, 4]


@needs_latex
def test_widths_are_those_of_latex(tmp_path: Path) -> None:
    lesser = table([replace(one, value=9.5) if one.method == "snapkv" else one for one in rows((0.5, 0.7))])
    found = [table(rows(RATIOS[:count])) for count in (1, 3, 5)] + [lesser] + [table(rows((0.5, 0.7), {"snapkv": 0.5}))]
    boxes = [
        "\n".join(latex(one, align="r").splitlines()).partition(r"\begin{tabular}")[2].partition(r"\end{tabular}")[0]
        for one in found
    ]
    measured = "\n".join(
        rf"\setbox0\hbox{{\footnotesize\setlength{{\tabcolsep}}{{3pt}}\begin{{tabular}}{box}\end{{tabular}}}}"
        r"\typeout{WIDTH \the\wd0}" for box in boxes
    )
    (tmp_path / "w.tex").write_text(
        "\\documentclass[10pt]{article}\\usepackage{booktabs}\\begin{document}" + measured + "\\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "w.tex"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    widths = [float(width) for width in re.findall(r"WIDTH ([\d.]+)pt", done.stdout)]
    assert [width_of(one) for one in found] == pytest.approx(widths, rel=0.03)


def test_a_dash_is_explained_where_there_is_one() -> None:
    assert "dash" not in table(rows((0.5, 0.7))).notes[0]
    left_out = [one for one in rows((0.5, 0.7)) if (one.method, one.ratio_asked) != ("snapkv", 0.7)]
    assert lines(table(left_out))["snapkv"][1] == "-"
    assert "A dash: not measured." in table(left_out).notes[0]
    assert r"A dash: not measured." in latex(table(left_out)).partition(r"\begin{tabular}")[0]  # in the caption
    nothing_removed = table([row("full", None, ratio_mean=0.0)])
    assert nothing_removed.columns == ("method", "ppl")
    assert "removed" not in nothing_removed.title


def test_a_table_of_speed_explains_its_dashes() -> None:
    bins = {"bin": None, "seq_len": 256, "batch_size": 1}
    timed = {"protocol": "profile", "params": bins, "metric": "ttft_s", "unit": "request"}
    (found,) = paper_tables([row("full", None, **timed), row("snapkv", 0.5, **timed)], METHODS)
    assert lines(found)["full"][0] == "-"
    assert "A dash: does not apply, or was not measured." in found.notes[0]


def test_the_mean_ratio_stands_beside_the_asked_one_where_they_differ() -> None:
    same = table(rows((0.5, 0.7), {"snapkv": 0.98}))
    assert same.columns == ("method", "0.5", "0.7")
    assert "Mean" not in same.notes[0]
    for name in ("ppl-minidocs", "ppl-above-full-minidocs"):
        found = table(rows((0.5, 0.7), {"snapkv": 0.9, "streaming-llm": 0.28}), name)
        assert found.columns == ("method", "0.5", "mean", "0.7", "mean")
        assert lines(found)["snapkv"][1::2] == ["0.45", "0.63"]
        assert lines(found)["streaming-llm"][1::2] == ["0.14", "0.20"]
        assert "Mean: the share of the cache that was removed on average over the predicted tokens" in found.notes[0]
    assert lines(table(rows((0.5,), {"snapkv": 0.9})))["full"][1] == "0.00"


def test_a_mean_that_all_methods_share_stands_in_the_heading() -> None:
    found = table(rows((0.5, 0.7), dict.fromkeys(METHODS, 0.8)))
    assert found.columns == ("method", "0.5\nmean 0.40", "0.7\nmean 0.56")
    assert "Mean: the share" in found.notes[0]


def test_a_method_without_a_ratio_says_what_it_removes() -> None:
    found = table([*rows((0.5,)), row("kivi", None, ratio_mean=0.58, ratio_realised=0.6)])
    assert found.columns == ("method", "0.5")  # a method that is not ranked is not in the table
    ranked = paper_tables([*rows((0.5,)), row("kivi", None, ratio_mean=0.58)], (*METHODS, "kivi"))
    assert lines(ranked[0])["kivi"][1] == "0.58"


def test_a_table_of_several_tasks_has_one_column_for_the_mean() -> None:
    both = [*rows((0.5,), {"snapkv": 0.9}, "a"), *rows((0.5,), {"snapkv": 0.8}, "b")]
    found = table(both, "ppl-block-0-5")
    assert found.columns == ("method", "mean", "a", "b")
    assert lines(found)["snapkv"][0] == "0.40 to 0.45"
    assert lines(found)["streaming-llm"][0] == "0.50"


def test_answers_say_what_was_removed_when_the_context_had_been_read() -> None:
    answered = [replace(one, protocol="answer", metric="answer_accuracy", ratio_mean=None) for one in rows((0.5, 0.7))]
    apart = [replace(one, ratio_realised=0.4) if one.ratio_asked == 0.5 else one for one in answered]
    assert table(answered, "answer-accuracy-minidocs").columns == ("method", "0.5", "0.7")
    found = table(apart, "answer-accuracy-minidocs")
    assert found.columns == ("method", "0.5\nrealised 0.40", "0.7\nrealised 0.70")
    assert "Realised: the share of the cache that was removed when the context has been read" in found.notes[0]


def test_what_nobody_measured_differs_from_nothing() -> None:
    unverified = [replace(one, ratio_mean=None, ratio_realised=None, removal="unverified") for one in rows((0.5,))]
    assert table(unverified).columns == ("method", "0.5")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Paper:
    """A run of which one ratio of a method was left out, and one method failed altogether."""
    full = replace(SINKS, method="full", ratio_asked=None, role="control")
    cells = [(full, 0.0), *((replace(CELL, ratio_asked=ratio), 1.0) for ratio in ("0.5", "0.7", "0.9"))]
    cells += [(replace(CELL, method="theirs"), 1.0)]
    asked = [*cells, (replace(CELL, method="snapkv"), 2.0), (replace(CELL, method="snapkv", ratio_asked="0.9"), 2.0),
             (replace(CELL, method="h2o"), 2.0)]
    run = made(tmp_path_factory.mktemp("left") / "run", asked)
    folder = RunFolder(run)
    for cell, _ in asked[-2:]:
        shutil.rmtree(run / "cells" / cell.key)
        folder.open_cell(cell)
        folder.fail(cell, Failure(cell.key, f"{cell.label}: it cannot.", left_out=cell.method == "snapkv"))
    return write_paper([run], compute_results(folder), run.parent / "out")


def test_the_setup_names_what_was_measured_and_nothing_by_its_key(written: Paper) -> None:
    text = (written.document.parent / "setup.txt").read_text(encoding="utf-8")
    assert "snapkv [li2024snapkv] (ratio 0.5; removal" in text
    assert "sinks [xiao2023streaming] (ratio 0.5, 0.7, 0.9; removal" in text
    assert "theirs (ratio 0.5; removal real; no reference given)" in text
    assert "Left out: snapkv 0.9 on minidocs: it cannot. Failed: h2o 0.5 on minidocs: it cannot." in text
    assert "h2o" not in text.partition("Incomplete")[0]
    assert "zhang2023h2o" not in (written.document.parent / "references.bib").read_text(encoding="utf-8")
    assert not re.search(r"\b[0-9a-f]{12}\b", text), text


def test_ratios_of_one_task_are_not_those_of_another(tmp_path: Path) -> None:
    other = replace(CELL, task="books", data_hash="e")
    run = made(tmp_path / "run", [
        *((replace(CELL, ratio_asked=ratio), 1.0) for ratio in ("0.5", "0.7")), (replace(other, ratio_asked="0.9"), 1.0)
    ])
    written = write_paper([run], compute_results(RunFolder(run)), tmp_path)
    assert "(ratio 0.5, 0.7; on books 0.9; removal" in (tmp_path / "paper" / "setup.txt").read_text(encoding="utf-8")
    assert all(path.is_file() for path in (*written.figures, *written.tables))


def test_the_setup_says_what_a_document_needs_for_its_references(written: Paper) -> None:
    head = (written.document.parent / "setup.tex").read_text(encoding="utf-8").partition(r"\begingroup")[0]
    assert all(line.startswith("% ") for line in head.splitlines())
    assert r"\bibliography{references}" in head
    assert r"\bibliographystyle" in head


def test_a_column_is_as_wide_as_its_figures() -> None:
    assert pytest.approx(8 / 2.54 * 72.27) == COLUMN


@needs_latex
def test_the_document_compiles_with_the_heading_above_everything(written: Paper, tmp_path: Path) -> None:
    folder = tmp_path / "paper"
    shutil.copytree(written.document.parent, folder)
    for command in (("pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"), ("bibtex", "main")):
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:].decode(errors="replace")
        assert b"Overfull" not in done.stdout
    if shutil.which("pdftotext") is not None:
        subprocess.run(["pdftotext", "-bbox", "-l", "1", "main.pdf", "words.html"], cwd=folder, check=True)
        words = re.findall(r'xMin="([\d.]+)" yMin="([\d.]+)".*>(.*)</word>', (folder / "words.html").read_text())
        left = [(float(top), word) for start, top, word in words if float(start) < 100]
        assert min(left)[1] in ("1", "Results")
