"""Tables as files: made from rows written by hand."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.analysis.results import compute_results
from kvbench.reporting.tables import export
from kvbench.reporting.tables.tables import tables_of
from kvbench.store.folder import RunFolder
from kvbench.store.rows import Row
from tests.helpers.command import Call
from tests.helpers.records import LOCAL, SINKS, made

FULL = replace(SINKS, method="full", ratio_asked=None, role="control")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made(tmp_path / "run_1", [(FULL, 0.0), (SINKS, 1.0), (LOCAL, 12.0)])


@pytest.fixture
def rows(run: Path) -> list[Row]:
    return list(compute_results(RunFolder(run)).rows)


def test_a_table_has_a_line_for_every_cell(rows: list[Row]) -> None:
    (sheet,) = tables_of(rows)
    at = {column: i for i, column in enumerate(sheet.columns)}
    assert [row[at["method"]].text for row in sheet.rows] == ["full", "sinks", "local"]
    assert [row[at["removed: asked"]].text for row in sheet.rows] == ["-", "0.5", "0.5"]
    ppl = [row[at["ppl"]] for row in sheet.rows]
    wanted = {row.method: row for row in rows if row.metric == "ppl"}
    assert [entry.sort for entry in ppl] == [wanted[m].value for m in ("full", "sinks", "local")]
    assert ppl[2].text.startswith(f"{wanted['local'].value:.2f}* [{wanted['local'].ci_low:.2f}, ")


def test_the_best_is_marked_only_beyond_the_intervals(rows: list[Row]) -> None:
    def best(rows: list[Row]) -> list[bool]:
        (sheet,) = tables_of(rows)
        place = sheet.columns.index("ppl")
        return [row[place].is_best for row in sheet.rows]

    assert best(rows) == [False, True, False]  # sinks before local, by far; full is no rival
    near = [replace(r, ci_low=0.0) if r.metric == "ppl" and r.method == "local" else r for r in rows]
    assert best(near) == [False, False, False]


def test_markdown_is_escaped(rows: list[Row]) -> None:
    text = export.markdown(tables_of(rows)[0])
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5
    assert len({line.count("|") - line.count(r"\|") for line in table}) == 1
    assert re.search(r"\*\*\d+\.\d\d\\\* \[", text)  # bold, with its star escaped
    assert r"block\|L:512" in text


def test_latex_is_escaped_and_has_the_rules_of_booktabs(rows: list[Row]) -> None:
    text = export.latex(replace(tables_of(rows)[0], title="50 % of a_b & c#d"))
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{@{}lllllllll@{}}"):
        assert rule in text, text
    assert r"50 \% of a\_b \& c\#d" in text
    assert re.search(r"\\textbf\{\d+\.\d\d\* \[", text)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    assert {line.count("&") for line in body.splitlines() if line.endswith(r"\\")} == {8}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(rows: list[Row], tmp_path: Path) -> None:
    source = tmp_path / "t.tex"
    source.write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\usepackage[landscape]{geometry}\\begin{document}\n"
        f"{export.latex(tables_of(rows)[0])}\\end{{document}}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", source.name], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_csv_holds_every_row(rows: list[Row], tmp_path: Path) -> None:
    export.write_tables(rows, tmp_path / "tables")
    found = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "rows.csv").read_text())))
    assert len(found) == len(rows)
    assert [float(r["value"]) for r in found if r["metric"] == "ppl"] == [
        pytest.approx(r.value) for r in rows if r.metric == "ppl"
    ]
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {
        "minidocs.md", "minidocs.tex", "minidocs.csv", "rows.csv",
    }


def test_report_writes_all_of_it(called: Call, run: Path) -> None:
    found = called(["report", run])
    assert found.code == 0, found.err
    assert (run / "report.html").is_file()
    assert (run / "tables" / "minidocs.tex").is_file()
    assert "page:" in found.out
