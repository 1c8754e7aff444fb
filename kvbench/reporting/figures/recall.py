"""Figure of recall accuracy by distance from the stated number."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.reporting.figures.base import SETTINGS, free_name, save
from kvbench.reporting.tables.format import Key, by_setting
from kvbench.store.rows import Row


def recall_figure(rows: list[Row], folder: Path) -> list[Path]:
    """Draw a table of accuracy by method and distance on grey, one panel per ratio; bold if the interval of the
    difference to the full cache is below 0."""
    chosen = [
        r for r in rows if r.metric == "accuracy" and str(r.params.get("bin")).startswith("distance=")
        and r.value is not None
    ]
    paths, taken = [], set[str]()
    for (name, *_), mine in by_setting(chosen).items():
        ratios = sorted({r.ratio_asked for r in mine if r.ratio_asked is not None})
        fixed = [r for r in mine if r.ratio_asked is None]
        groups = [([r for r in mine if r.ratio_asked == ratio] + fixed, f"{ratio:g} removed") for ratio in ratios]
        groups = groups or [(fixed, mine[0].task)]
        with rc_context(SETTINGS | {"axes.grid": False}):
            most = max(len({r.name for r in group}) for group, _ in groups)
            size = (3.6 * len(groups), 0.8 + 0.21 * most)
            figure = Figure(figsize=size, layout="constrained")
            places = list(figure.subplots(1, len(groups), squeeze=False).flat)
            for place, (group, title) in zip(places, groups, strict=True):
                _panel(place, group, title)
            figure.suptitle(name, fontsize=9)
            known = "-known" if mine[0].params.get("question") == "known" else ""
            paths += save(figure, folder, free_name(f"recall-distance{known}", taken))
    return paths


def _panel(place: Axes, rows: list[Row], title: str) -> None:
    distances = sorted({int(str(r.params["bin"]).partition("=")[2]) for r in rows})
    table: dict[Key, dict[int, Row]] = {}
    for row in rows:
        table.setdefault((row.name, row.ratio_asked), {})[int(str(row.params["bin"]).partition("=")[2])] = row
    ordered = sorted(table.items(), key=lambda item: -sum(r.value or 0.0 for r in item[1].values()))
    values = [[(line[d].value or 0.0) if d in line else float("nan") for d in distances] for _, line in ordered]
    place.imshow(values, cmap="Greys", vmin=0, vmax=1.4, aspect="auto")
    for y, (_, line) in enumerate(ordered):
        for x, distance in enumerate(distances):
            if distance in line:
                row = line[distance]
                is_less = row.delta_ci_high is not None and row.delta_ci_high < 0
                place.text(
                    x, y, f"{row.value:.2f}", ha="center", va="center", fontsize=7.5,
                    color="white" if (row.value or 0) > 0.75 else "black", weight="bold" if is_less else "normal",
                )
    place.set_xticks(range(len(distances)), [str(d) for d in distances])
    place.set_yticks(range(len(ordered)), [method for (method, _), _ in ordered])
    place.tick_params(length=0, labelsize=8)
    place.set_xlabel("tokens since the number was stated")
    place.set_title(title, fontsize=9)
