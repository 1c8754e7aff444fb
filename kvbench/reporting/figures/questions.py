"""Figure of accuracy by number of the question about a context, after SCBench (arXiv 2412.10319)."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.reporting.figures.base import SETTINGS, add_legend, curve, free_name, methods_of, save
from kvbench.reporting.tables.format import by_setting
from kvbench.store.rows import Row


def question_figures(rows: list[Row], folder: Path) -> list[Path]:
    """Draw a line for each method over the questions in the order in which they are asked, one panel for each ratio;
    methods without a ratio are in every panel. One figure for each task, question, model and seed."""
    chosen = [
        row for row in rows if row.metric == "answer_accuracy" and str(row.params.get("bin")).startswith("question=")
        and row.value is not None
    ]
    paths, taken = [], set[str]()
    for (task, _, model, seed), mine in by_setting(chosen).items():
        fixed = [row for row in mine if row.ratio_asked is None]
        ratios = sorted({row.ratio_asked for row in mine if row.ratio_asked is not None})
        panels = [(f"{ratio:g} removed", [*fixed, *(r for r in mine if r.ratio_asked == ratio)]) for ratio in ratios]
        panels = panels or [("", fixed)]
        with rc_context(SETTINGS):
            figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
            places = list(figure.subplots(1, len(panels), squeeze=False, sharey=True).flat)
            for place, (title, group) in zip(places, panels, strict=True):
                _panel(place, group)
                place.set_title(title, fontsize=9)
            places[0].set_ylabel("accuracy")
            figure.suptitle(f"{task} ({model}, seed {seed})", fontsize=9)
            add_legend(figure, places)
            known = "-known" if mine[0].params.get("question") == "known" else ""
            paths += save(figure, folder, free_name(f"questions-{mine[0].task}{known}", taken))
    return paths


def _panel(place: Axes, rows: list[Row]) -> None:
    for method in methods_of(rows):
        points = sorted((row for row in rows if row.name == method), key=_number)
        curve(place, method, [float(_number(row)) for row in points], points)
    numbers = sorted({_number(row) for row in rows})
    place.set_xticks(numbers if len(numbers) <= 12 else numbers[:: -(-len(numbers) // 12)])
    place.set_ylim(-0.02, 1.02)
    place.set_xlabel("number of the question about a context")


def _number(row: Row) -> int:
    return int(str(row.params["bin"]).partition("=")[2])
