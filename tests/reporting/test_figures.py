"""Figures: what is drawn, and that all of it is on the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kvbench.analysis.results import compute_results
from kvbench.reporting.figures import quality
from kvbench.reporting.figures.base import add_legend
from kvbench.store.folder import RunFolder
from kvbench.store.rows import Row
from tests.helpers.records import CELL, made


def test_what_was_only_masked_is_not_drawn_over_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has freed none; a panel in which nothing has is left out."""
    drawn: list[Row] = []
    monkeypatch.setattr(quality, "draw", lambda rows, *_: drawn.extend(rows) or [])
    full = replace(CELL, method="full", ratio_asked=None, role="control")
    masked = replace(CELL, method="local", execution="onepass")
    runs = (made(tmp_path / "a", [(full, 0.0), (CELL, 1.0), (masked, 2.0)]),
            made(tmp_path / "b", [(replace(one, task="books"), float(i)) for i, one in enumerate((full, masked))]))
    quality.pareto_figure([row for run in runs for row in compute_results(RunFolder(run)).rows], tmp_path)
    assert [(row.task, row.method, row.removal) for row in drawn] == [
        ("minidocs", "full", "real"), ("minidocs", "sinks", "real"),
    ]


def test_a_legend_is_no_wider_than_its_figure() -> None:
    """Drawn by matplotlib itself: from few labels to many, short and long."""
    for count, letters in ((9, 4), (23, 8), (25, 30), (31, 12), (12, 60)):
        figure = Figure(figsize=(12, 4))
        panel = figure.subplots()
        for number in range(count):
            panel.plot([0, 1], label=f"{number:02d}" + "m" * (letters if number % 3 == 0 else 2))
        add_legend(figure, [panel])
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        assert 0 <= box.x0 < box.x1 <= 12, (count, letters, box)
        assert box.width > 5 or count * letters < 100
