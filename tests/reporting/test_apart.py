"""Runs that are reported together: what differs has two names, and what is alike stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.analysis.results import compute_results
from kvbench.reporting import report
from kvbench.reporting.apart import told_apart
from kvbench.reporting.paper.columns import paper_tables
from kvbench.reporting.report import write_report
from kvbench.reporting.tables.format import is_control, name_of, task_of
from kvbench.store.folder import RunFolder
from kvbench.store.records import Cell
from kvbench.store.rows import Row
from tests.helpers.records import CELL, DOCUMENTS, made

FULL = replace(CELL, method="full", ratio_asked=None, role="control")
TRAINED = replace(CELL, method="sentinel", adapter="adapters/long", adapter_hash="a" * 16)


def together(*runs: Path) -> list[Row]:
    folders = [RunFolder(run) for run in runs]
    rows = told_apart(folders, [compute_results(folder) for folder in folders])
    return [row for mine in rows for row in mine if row.metric == "ppl" and row.params.get("bin") is None]


def run(path: Path, *cells: Cell, documents: Sequence[str] = DOCUMENTS) -> Path:
    return made(path, [(cell, float(place)) for place, cell in enumerate(cells)], documents=list(documents))


def test_what_two_runs_have_alike_stands_once(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", FULL, CELL), run(tmp_path / "b", FULL, replace(CELL, method="local"))
    assert [row.name for row in together(first, second)] == ["full", "sinks", "local"]
    assert {(task_of(row), row.model) for row in together(first, second)} == {("minidocs", "m")}


def test_adapters_of_one_method_are_named(tmp_path: Path) -> None:
    """By their names, and where these are equal too, by what is in them."""
    first = run(tmp_path / "a", FULL, TRAINED)
    short = run(tmp_path / "b", FULL, replace(TRAINED, adapter="adapters/short", adapter_hash="b" * 16))
    alike = run(tmp_path / "c", FULL, replace(TRAINED, adapter="elsewhere/long", adapter_hash="c" * 16))
    names = [row.name for row in together(first, short)]
    assert names == ["full", "sentinel:adapter=long", "sentinel:adapter=short"]
    assert [row.name for row in together(first, first)] == ["full", "sentinel"]
    names = [row.name for row in together(first, alike)]
    assert names == ["full", "sentinel:adapter=long@aaaaaaaa", "sentinel:adapter=long@cccccccc"]
    tuned = [
        run(tmp_path / name, replace(TRAINED, method="adapted", ratio_asked=None, adapter=name, adapter_hash=name * 16))
        for name in ("e", "f")
    ]
    assert [is_control(row.name) for row in together(*tuned, first)] == [True, True, True, False]
    variant = run(tmp_path / "d", FULL, replace(TRAINED, variant="sinks=4", adapter_hash="d" * 16))
    assert [name_of(row) for row in together(first, variant)] == ["full", "sentinel", "sentinel:sinks=4"]


def test_other_documents_are_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, few = run(tmp_path / "a", FULL, CELL), run(tmp_path / "b", FULL, CELL, documents=DOCUMENTS[:8])
    found = [(task_of(row), row.name, row.n) for row in together(first, few)]
    assert found == [
        ("minidocs (20 documents)", "full", 20), ("minidocs (20 documents)", "sinks", 20),
        ("minidocs (8 documents)", "full", 8), ("minidocs (8 documents)", "sinks", 8),
    ]
    others = run(tmp_path / "c", FULL, documents=DOCUMENTS[8:16])
    tasks = {task_of(row) for row in together(first, few, others)}
    assert tasks == {"minidocs (20 documents)", "minidocs (8 documents of b)", "minidocs (8 documents of c)"}
    monkeypatch.setattr(report, "write_figures", lambda *_: [])
    tables = {path.name for path in write_report([first, few], tmp_path / "both").tables}
    assert {"minidocs-20-documents.csv", "minidocs-8-documents.csv"} <= tables
    rows = [row for row in write_report([first, few], tmp_path / "both").results.rows if row.metric == "ppl"]
    heads = paper_tables(rows, ["sinks"])[0].columns
    assert [head for head in heads if "minidocs" in head] == ["minidocs (20 documents)", "minidocs (8 documents)"]


def test_precisions_are_two_models(tmp_path: Path) -> None:
    first, half = run(tmp_path / "a", FULL, CELL), run(tmp_path / "b", replace(FULL, dtype="bfloat16"))
    elsewhere = run(tmp_path / "c", replace(FULL, dtype="bfloat16", task="books"))
    assert {row.model for row in together(first, half)} == {"m (auto)", "m (bfloat16)"}
    assert {row.model for row in together(first, elsewhere)} == {"m"}
