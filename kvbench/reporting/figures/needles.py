"""Heat maps of a needle grid: accuracy by length of the context and depth of the needle, for each method and ratio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from kvbench.reporting.figures.base import SETTINGS, free_name, save
from kvbench.reporting.tables.format import length_of
from kvbench.store.rows import Row

ACROSS = 5
"""Largest number of maps side by side."""
_CELLS = 60
"""Number of cells in a map above which they are not labelled with their values."""

Key = tuple[str, float | None]


def needle_figures(rows: list[Row], folder: Path) -> list[Path]:
    """Draw a figure of maps for each task, question, model and seed: those without a ratio first, then a line of maps
    for each method with a column for each ratio, or all in turn where there is one ratio.

    Lengths come from one run folder each; where a length has not been measured at a depth, the map is grey.
    """
    chosen = [
        row for row in rows if row.metric == "answer_accuracy" and str(row.params.get("bin")).startswith("depth=")
        and length_of(row) is not None and row.value is not None
    ]
    figures: dict[tuple[str, str | None, str, int], list[Row]] = {}
    for row in chosen:
        figures.setdefault((row.task, row.params.get("question"), row.model, row.seed), []).append(row)
    paths, taken = [], set[str]()
    for (task, question, model, seed), mine in figures.items():
        known = "" if question is None else f", question {question}"
        lines = _lines(mine)
        lengths = sorted({length_of(row) or 0 for row in mine})
        depths = sorted({_depth(row) for row in mine})
        across, down = max(map(len, lines)), len(lines)
        size = (1.1 + across * max(1.5, 0.34 * len(lengths) + 0.5), 0.9 + down * max(1.5, 0.17 * len(depths) + 0.6))
        with rc_context(SETTINGS | {"axes.grid": False}):
            figure = Figure(figsize=size, layout="constrained")
            places = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
            shown = None
            for line, keys in zip(places, lines, strict=True):
                for place, key in zip(line, [*keys, *[None] * (across - len(keys))], strict=True):
                    if key is None:
                        place.set_axis_off()
                    else:
                        shown = _map(place, key, [r for r in mine if (r.name, r.ratio_asked) == key], lengths, depths)
            _label_edges(places)
            if shown is not None:
                figure.colorbar(shown, ax=places, label="accuracy", shrink=min(1.0, 1.6 / down + 0.2), pad=0.02)
            figure.supxlabel("length of the context in tokens", fontsize=9)
            figure.supylabel("depth of the needle, % of the context", fontsize=9)
            figure.suptitle(f"{task}{known} ({model}, seed {seed}; {_samples(mine)})", fontsize=9)
            paths += save(figure, folder, free_name(f"heatmap-{task}{known.replace(', question ', '-')}", taken))
    return paths


def _lines(rows: list[Row]) -> list[list[Key | None]]:
    """The maps of a figure, line by line: methods and ratios, None for those that were not measured."""
    keys = list(dict.fromkeys((row.name, row.ratio_asked) for row in rows))
    ratios = sorted({ratio for _, ratio in keys if ratio is not None})
    fixed: list[Key | None] = [key for key in keys if key[1] is None]
    methods = list(dict.fromkeys(name for name, ratio in keys if ratio is not None))
    if len(ratios) < 2:
        return _broken([*fixed, *((name, ratio) for name in methods for ratio in ratios)], ACROSS)
    grid: list[list[Key | None]] = [
        [(name, ratio) if (name, ratio) in keys else None for ratio in ratios] for name in methods
    ]
    return [*_broken(fixed, max(len(ratios), ACROSS - 1)), *grid]


def _broken(keys: list[Key | None], across: int) -> list[list[Key | None]]:
    return [keys[start : start + across] for start in range(0, len(keys), across)]


def _map(place: Axes, key: Key, rows: list[Row], lengths: list[int], depths: list[int]) -> AxesImage:
    values = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        values[depths.index(_depth(row)), lengths.index(length_of(row) or 0)] = row.value
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    shown = place.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1, aspect="auto")
    if values.size <= _CELLS:
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                place.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6,
                           color="black" if value > 0.6 else "white")
    place.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45 if len(lengths) > 4 else 0)
    place.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    place.tick_params(length=0, labelsize=7)
    place.set_title(key[0] if key[1] is None else f"{key[0]} {key[1]:g}", fontsize=8)
    return shown


def _label_edges(places: NDArray[np.object_]) -> None:
    """Label the lengths below the last map of each column, and the depths beside the first of each line."""
    for line in places:
        next(place for place in line if place.axison).tick_params(labelleft=True)
    for column in places.T:
        next(place for place in column[::-1] if place.axison).tick_params(labelbottom=True)


def _depth(row: Row) -> int:
    return int(str(row.params["bin"]).partition("=")[2])


def _samples(rows: list[Row]) -> str:
    counts = sorted({row.n for row in rows})
    return f"{counts[0]} sample{'s' if counts[0] > 1 else ''} a cell" if len(counts) == 1 else (
        f"{counts[0]} to {counts[-1]} samples a cell")
