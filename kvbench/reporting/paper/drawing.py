"""Draws the figures of a paper at their printed size, under ``kvbench.mplstyle``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from textwrap import fill
from typing import Any

from matplotlib import RcParams, rc_context, rc_params_from_file, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation

from kvbench.reporting.paper.plots import Line, Panel, Plot

STYLE = "kvbench.mplstyle"
COLUMN, PAGE = 8 / 2.54, 17 / 2.54
"""Widths in inches."""
MOST = 8
"""Largest number of coloured lines."""
OTHERS = "others"
_GREY: dict[str, Any] = {"color": "0.78", "linewidth": 0.5, "linestyle": "-", "marker": "", "label": OTHERS}
LEVELS: dict[str, dict[str, Any]] = {
    "full": {"color": "black", "linestyle": "-", "marker": ""},
    "none": {"color": "black", "linestyle": ":", "marker": ""},
    "adapted": {"color": "0.4", "linestyle": "--", "marker": ""},
    "human": {"color": "0.4", "linestyle": "-.", "marker": ""},
}
"""What is compared with: black and grey lines that are not counted."""
_ASIDE = 0.9
"""Points by which lines are drawn aside of each other, so that bars of equal places do not cover each other."""
_LABEL = (32, 26)
"""Letters of a line beside the y-axis of a single panel, and of one of several."""
_INSIDE: tuple[Any, ...] = (
    "upper left", "upper right", "lower left", "lower right", "upper center", "lower center", "center left",
    "center right", "center",
)
_FREE = 2.5
"""Points between a legend inside a panel and what is drawn, half a marker among them."""


def style() -> RcParams:
    """The settings of the style file."""
    with as_file(files("kvbench.reporting.paper").joinpath(STYLE)) as path:
        found: RcParams = rc_params_from_file(path, use_default_template=False)
    return found


def coloured(names: Sequence[str], settings: RcParams) -> dict[str, dict[str, Any]]:
    """Colour, dashes and marker for the first eight names, the same in every figure; all others are grey."""
    cycle = list(settings["axes.prop_cycle"])
    return {name: dict(look) for name, look in zip(names[:MOST], cycle, strict=False)}


def draw(plot: Plot, looks: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw a figure as PDF with embedded fonts; see :func:`figure_of`."""
    with rc_context():
        rcParams.update(style())
        rcParams["text.parse_math"] = False  # names may have dollars
        file = io.BytesIO()
        figure_of(plot, looks).savefig(file, format="pdf", metadata={"CreationDate": None})
    return file.getvalue()


def figure_of(plot: Plot, looks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw a figure: 8 cm wide if it has one panel, 17 cm otherwise.

    Args:
        looks: name of a line -> how it is drawn (:func:`coloured`); lines that have none are grey.
    """
    count = len(plot.panels)
    across = count if count <= 4 else 3
    down = -(-count // across)
    width = COLUMN if count == 1 else PAGE
    figure = Figure(figsize=(width, 0.3 + down * (1.9 if count == 1 else 1.65)))
    places = list(figure.subplots(down, across, squeeze=False, sharey=_shares_y(plot)).flat)
    for place, panel in zip(places, plot.panels, strict=False):
        _draw_panel(place, panel, looks, count > 1)
    for place in places[count:]:
        place.set_axis_off()
    for number, place in enumerate(places[:count]):
        if number % across and len({panel.y_label for panel in plot.panels}) == 1:
            place.set_ylabel("")
        if number + across < count:
            place.set_xlabel("")
    _add_legend(figure, places[:count], places[count:], [*LEVELS, *map(_label, looks), OTHERS])
    return figure


def _label(name: str) -> str:
    """A name as a label: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _shares_y(plot: Plot) -> bool:
    """Whether all panels have one y-axis: what it shows has the same fixed ends in all of them."""
    bounds = {panel.bounds for panel in plot.panels}
    return len(bounds) == 1 and None not in bounds.pop()


def _draw_panel(place: Axes, panel: Panel, looks: Mapping[str, Mapping[str, Any]], has_title: bool) -> None:
    for name, value in panel.levels:
        place.axhline(value, label=name, linewidth=0.8, zorder=1, **LEVELS[name])
    places = {name: number - (len(looks) - 1) / 2 for number, name in enumerate(looks)}
    for line in panel.lines:
        look = LEVELS.get(line.name) or looks.get(line.name)
        ends = (line.y, line.low, line.high) if line.name in places else (line.y,)
        place.update_datalim([(x, y) for ys in ends for x, y in zip(line.x, ys, strict=True)])
        _draw_line(place, line, {"label": _label(line.name), **look} if look else _GREY, places.get(line.name))
    place.set_xlabel(panel.x_label)
    place.set_ylabel(fill(panel.y_label, _LABEL[has_title]))
    if has_title:
        place.set_title(panel.title)
    if panel.is_log:
        place.set_xscale("log", base=2)
        place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.xaxis.set_minor_formatter(NullFormatter())
    place.autoscale_view()
    place.set_ylim(*panel.bounds)


def _draw_line(place: Axes, line: Line, look: Mapping[str, Any], aside: float | None) -> None:
    """Draw a line with its intervals, ``aside`` steps to the right; without intervals if that is None."""
    if aside is None:
        place.plot(line.x, line.y, zorder=2, **look)
        return
    moved = ScaledTranslation(aside * _ASIDE / 72, 0, place.get_figure().dpi_scale_trans)  # type: ignore[union-attr]
    place.plot(line.x, line.y, zorder=4, transform=place.transData + moved, **look)
    # Bars, not bands: eight bands are one grey area in print.
    place.vlines(
        line.x, line.low, line.high, colors=look["color"], linewidth=0.5, alpha=0.7, zorder=3,
        transform=place.transData + moved,
    )


def _add_legend(figure: Figure, places: Sequence[Axes], empty: Sequence[Axes], order: Sequence[str]) -> None:
    """Add one legend where it takes no room, in an empty place or inside a single panel, otherwise below all panels."""
    found: dict[str, Any] = {}
    for place in places:
        handles, labels = place.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    found = {name: found[name] for name in order if name in found}
    inside, where = (empty[0], _INSIDE[-1:]) if empty else (places[0], _INSIDE)
    if found and not ((empty or len(places) == 1) and _fits_inside(figure, inside, where, found)):
        _add_below(figure, found)


def _fits_inside(figure: Figure, place: Axes, corners: Sequence[Any], found: Mapping[str, Any]) -> bool:
    """Put the legend where no line, bar or marker is; False, and no legend, if there is no such place."""
    figure.draw_without_rendering()  # lays out, so that places on paper are known
    area = place.get_window_extent()
    drawn = [(line.get_transform(), line.get_path()) for line in place.get_lines()]
    drawn += [(bars.get_transform(), path) for bars in place.collections for path in bars.get_paths()]
    paths = [transform.transform_path(path) for transform, path in drawn]
    for columns in (1, 2, 3):
        for where in corners:
            legend = place.legend(
                list(found.values()), list(found), loc=where, ncols=columns, frameon=True, facecolor="white",
                edgecolor="none", framealpha=1,  # without lines of the grid
            )
            box = legend.get_window_extent().padded(_FREE * figure.dpi / 72)
            inside = area.width >= box.width and area.height >= box.height
            if inside and not any(path.intersects_bbox(box, filled=False) for path in paths):
                return True
            legend.remove()
    return False


def _add_below(figure: Figure, found: Mapping[str, Any]) -> None:
    """Add a legend below all panels, in as few rows of equal length as fit the width."""
    for columns in range(len(found), 0, -1):
        rows = -(-len(found) // columns)
        legend = figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=-(-len(found) // rows), borderpad=0.4,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.125 * rows)
