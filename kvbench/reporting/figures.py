"""Figures in the style of a paper: perplexity against removal, with bands, as PNG and PDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from kvbench.store.records import Row

_STYLES = {
    "sentinel": ("#D55E00", "o", "-"), "local": ("#0072B2", "s", "--"),
    "sinks": ("#009E73", "^", "-."), "scattered": ("#CC79A7", "D", ":"),
    "window": ("#E69F00", "v", "--"),
}
_SPARE = (("#56B4E9", "P", "-"), ("#000000", "X", "--"), ("#999999", "*", ":"))
_SETTINGS: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42,
    "ps.fonttype": 42, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.25,
}


def removal_figure(rows: list[Row], metric: str, folder: Path, metric_label: str) -> list[Path]:
    """A metric against the mean share of entries removed; one panel per task.

    Methods that fill their budget differently see different shares of the text at one asked
    ratio, so the x-axis is ``ratio_mean``: 1 - entries visible / text tokens before.

    Returns:
        The files written, PNG and PDF; none if no row has the metric.
    """
    chosen = [r for r in rows if r.metric == metric and r.params.get("bin") is None and r.value is not None]
    tasks = list(dict.fromkeys(r.task for r in chosen))
    if not tasks:
        return []
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(4.6 * len(tasks), 3.4), layout="constrained")
        axes = figure.subplots(1, len(tasks), squeeze=False)
        for panel, task in zip(axes[0], tasks, strict=True):
            _panel(panel, [r for r in chosen if r.task == task], metric_label)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{metric}-removal.{ending}" for ending in ("png", "pdf")]
        for path in paths:
            figure.savefig(path, dpi=200)
    return paths


def _panel(panel: Axes, rows: list[Row], label: str) -> None:
    first = rows[0]
    methods = [m for m in dict.fromkeys(r.method for r in rows) if m not in ("full", "none", "adapted")]
    spare = iter(_SPARE * 4)
    for method in methods:
        mine = sorted((r for r in rows if r.method == method), key=lambda r: r.ratio_mean or 0.0)
        colour, marker, line = _STYLES.get(method) or next(spare)
        x = [r.ratio_mean or 0.0 for r in mine]
        y = [r.value or 0.0 for r in mine]
        panel.plot(x, y, line, marker=marker, color=colour, label=method, markersize=5, linewidth=1.4)
        low = [v if r.ci_low is None else r.ci_low for v, r in zip(y, mine, strict=True)]
        high = [v if r.ci_high is None else r.ci_high for v, r in zip(y, mine, strict=True)]
        if len(mine) > 1:
            panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        else:
            error = [[y[0] - low[0]], [high[0] - y[0]]]
            panel.errorbar(x, y, yerr=error, color=colour, capsize=3, linewidth=0.9)
    for name, style in (("full", "-"), ("none", ":")):
        for row in (r for r in rows if r.method == name):
            panel.axhline(row.value or 0.0, color="0.35", linewidth=1, linestyle=style, label=name)
    values = [r.value for r in rows if r.value]
    if values and min(values) > 0 and max(values) > 2 * min(values) and first.metric != "accuracy":
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(ScalarFormatter())
        panel.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    panel.set_title(f"{first.task} ({first.model}, {first.protocol})", fontsize=9)
    panel.set_xlabel("share of cache entries removed (mean over queries)")
    panel.set_ylabel(label)
    panel.set_xlim(0, 1)
    panel.legend(fontsize=8)
