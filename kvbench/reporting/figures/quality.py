"""Figures of quality: realised against requested ratio, quality against bytes, memory over time, loss by position."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from kvbench.reporting.figures.base import curve, draw, log_scale, methods_of, style_of
from kvbench.reporting.tables.format import by_setting, is_control, task_of
from kvbench.store.rows import Row


def asked_figures(rows: list[Row], folder: Path) -> list[Path]:
    """Draw realised against requested ratio, and the fraction of earlier tokens that queries see at each ratio."""
    chosen = [r for r in rows if r.metric == "nll" and r.params.get("bin") is None and r.ratio_asked is not None]
    if len({r.ratio_asked for r in chosen}) < 2:
        return []

    def realised(place: Axes, mine: list[Row]) -> None:
        place.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":", label="asked = realised")
        _by_ratio(place, mine, [r.ratio_realised for r in mine])
        place.set_ylabel("share of entries removed: realised")
        place.set_ylim(0, 1)

    def seen(place: Axes, mine: list[Row]) -> None:
        place.plot([0, 1], [1, 0], color="0.6", linewidth=1, linestyle=":", label="1 - asked")
        _by_ratio(place, mine, [None if r.ratio_mean is None else 1 - r.ratio_mean for r in mine])
        place.set_ylabel("share of earlier tokens that a query sees")
        place.set_ylim(0, 1)

    return draw(chosen, realised, folder, "asked-realised") + draw(chosen, seen, folder, "visible-share")


def _by_ratio(place: Axes, rows: list[Row], values: list[float | None]) -> None:
    for method in methods_of(rows):
        mine = [(r.ratio_asked or 0.0, v) for r, v in zip(rows, values, strict=True) if r.name == method]
        points = sorted((x, v) for x, v in mine if v is not None)
        place.plot([x for x, _ in points], [y for _, y in points], **style_of(method))
    place.set_xlabel("share of entries removed: asked")
    place.set_xlim(0, 1)


def _style_at(method: str, ratio: float | None) -> dict[str, Any]:
    """The method's style, fainter at low ratios."""
    if ratio is None:
        return style_of(method)
    return style_of(method) | {"label": f"{method} {ratio:g}", "alpha": 0.35 + 0.65 * ratio}


def memory_figure(rows: list[Row], folder: Path) -> list[Path]:
    """Draw perplexity against peak KV memory, over time steps (after figure 10 of arXiv 2312.03414)."""
    chosen = [r for r in rows if r.metric == "ppl" and r.params.get("step") is not None and r.value is not None]

    def panel(place: Axes, mine: list[Row]) -> None:
        for key in dict.fromkeys((r.name, r.ratio_asked) for r in mine):
            points = sorted((r for r in mine if (r.name, r.ratio_asked) == key), key=lambda r: r.params["step"])
            peak = [r.params["entries_peak_mean"] * r.params["entry_bytes"] / 2**20 for r in points]
            y = [r.value or 0.0 for r in points]
            ends = [(r.ci_low or v, r.ci_high or v) for r, v in zip(points, y, strict=True)]
            error = [[v - low for v, (low, _) in zip(y, ends, strict=True)],
                     [high - v for v, (_, high) in zip(y, ends, strict=True)]]
            style = _style_at(*key)
            place.plot(peak, y, **style)
            place.errorbar(peak, y, yerr=error, fmt="none", ecolor=style["color"], alpha=0.35, linewidth=0.8)
            for x, row in list(zip(peak, points, strict=True))[:: max(1, len(points) - 1)]:  # the first and the last
                at = (x, row.value or 0.0)
                place.annotate(str(row.params["step"]), at, fontsize=6, xytext=(2, 3), textcoords="offset points")
        place.set_xscale("log")
        for which in (place.xaxis.set_major_formatter, place.xaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
        place.tick_params(axis="x", which="minor", labelsize=7)
        place.set_xlabel("peak KV memory (MiB, mean of sequences); numbers: steps")
        place.set_ylabel("perplexity")
        log_scale(place, [r.value for r in mine])

    return draw(chosen, panel, folder, "memory-steps")


def position_figure(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the loss above the full cache by position in the text, at the highest ratio of each method only, for
    legibility."""
    chosen = [r for r in rows if str(r.params.get("bin")).startswith("position=") and r.delta is not None]

    def panel(place: Axes, mine: list[Row]) -> None:
        for method in methods_of(mine):
            most = max((r.ratio_asked or 0.0 for r in mine if r.name == method), default=0.0)
            points = [r for r in mine if r.name == method and (r.ratio_asked or 0.0) == most]
            x = [max(1, int(str(r.params["bin"]).removeprefix("position="))) for r in points]
            label = method if points[0].ratio_asked is None else f"{method} {most:g}"
            curve(place, method, [float(v) for v in x], [_as_delta(r) for r in points], label=label)
        place.set_xscale("log", base=2)
        place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.set_xlabel("text tokens before the target")
        place.set_ylabel("nats per token above the full cache")

    return draw(chosen, panel, folder, "loss-position")


def _as_delta(row: Row) -> Row:
    """The row with its difference to the full cache in place of its value."""
    return replace(row, value=row.delta, ci_low=row.delta_ci_low, ci_high=row.delta_ci_high)


MANY = 12
"""Number of methods above which those that are never on the Pareto front are drawn in grey."""
_BEHIND: dict[str, Any] = {
    "color": "0.7", "linewidth": 0.8, "markersize": 3.5, "label": "others, never on the front", "linestyle": "-",
}


def pareto_figure(rows: list[Row], folder: Path) -> list[Path]:
    """Draw quality against bytes for all methods and ratios, with the Pareto front.

    Perplexity is drawn as the paired difference to the full cache, since documents differ far more than methods do.
    Where entries were only masked, no bytes were freed: such rows are left out.
    """
    quality = {"ppl": "perplexity above that of the full cache (paired)", "accuracy": "recall accuracy"}
    whole = [r for r in rows if r.params.get("bin") is None and r.value is not None]
    kept = {_cell(r): r.value or 0.0 for r in whole if r.metric == "kv_bytes_physical"}
    full = {_cell(r): r.value or 0.0 for r in whole if r.metric == "kv_bytes_full"}
    by_recall = {r.task for r in whole if r.metric == "answer_nll"}
    compared = [r for r in whole if r.metric == ("accuracy" if r.task in by_recall else "ppl") and full.get(_cell(r))]
    compared = [r if r.metric == "accuracy" else _as_delta(r) for r in compared
                if r.metric == "accuracy" or r.delta is not None or r.name == "full"]
    floors = {
        _cell(r)[:4]: r.value for r in compared if r.name == "none" and r.metric == "ppl" and (r.value or 0.0) > 0
    }
    freeing = [r for r in compared if kept.get(_cell(r)) and r.name != "none" and r.removal != "masked"]
    panels = [mine for mine in by_setting(freeing).values() if any(not is_control(r.name) for r in mine)]
    chosen = [row for mine in panels for row in mine]

    def panel(place: Axes, mine: list[Row]) -> None:
        best = max if mine[0].metric == "accuracy" else min
        points = sorted((100 * kept[_cell(r)] / full[_cell(r)], r.value or 0.0) for r in mine)
        front: list[tuple[float, float]] = []
        for x, y in points:
            if not front or (best(y, front[-1][1]) == y and y != front[-1][1]):
                front.append((x, y))
        ends = [*front, (max(x for x, _ in points), front[-1][1])]
        place.step([x for x, _ in ends], [y for _, y in ends], where="post", color="0.6", linewidth=5, alpha=0.4,
                   label="front", zorder=0)
        methods = methods_of(mine)
        leading = {r.name for r in mine if (100 * kept[_cell(r)] / full[_cell(r)], r.value or 0.0) in front}
        for method in methods:
            own = sorted((r for r in mine if r.name == method), key=lambda r: kept[_cell(r)])
            shares = [100 * kept[_cell(r)] / full[_cell(r)] for r in own]
            if len(methods) <= MANY or method in leading or method == "full":
                curve(place, method, shares, own)
            else:
                place.plot(shares, [r.value or 0.0 for r in own], **style_of(method) | _BEHIND)
        top = 1.25 * (floors.get(_cell(mine[0])[:4]) or float("inf"))
        beyond = sorted({r.name for r in mine if (r.value or 0.0) > top})
        if beyond:  # far worse than ``none``: named instead of drawn
            place.set_ylim(min([-0.05 * top, *(r.ci_low or 0.0 for r in mine)]), top)
            said = f"above: {', '.join(beyond)}"
            place.text(0.99, 0.98, said, transform=place.transAxes, ha="right", va="top", fontsize=7)
        place.set_xlabel("bytes of cache held, % of full (measured)")
        place.set_ylabel(quality[mine[0].metric])

    return draw(chosen, panel, folder, "quality-bytes")


def _cell(row: Row) -> tuple[object, ...]:
    return task_of(row), row.protocol, row.model, row.seed, row.name, row.ratio_asked


def distance_figure(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the loss above the full cache by distance from the last summary."""
    chosen = [r for r in rows if str(r.params.get("bin")).startswith("since=") and r.delta is not None]

    def panel(place: Axes, mine: list[Row]) -> None:
        for key in dict.fromkeys((r.name, r.ratio_asked) for r in mine):
            points = [r for r in mine if (r.name, r.ratio_asked) == key]
            x = [1 + int(str(r.params["bin"]).removeprefix("since=")) for r in points]
            place.plot(x, [r.delta or 0.0 for r in points], **_style_at(*key))
        place.set_xscale("log", base=2)
        place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.set_xlabel("text tokens since the last summary, counted from 1")
        place.set_ylabel("nats per token above the full cache")

    return draw(chosen, panel, folder, "loss-distance")
