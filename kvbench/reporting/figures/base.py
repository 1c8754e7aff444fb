"""Shared code of the figures (styles, panels, saving as PNG and PDF), and the figure of a metric against removal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any
from zlib import crc32

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, ScalarFormatter
from PIL import Image

from kvbench.reporting.tables.format import UNVERIFIED, by_setting
from kvbench.store.rows import Row

_STYLES = {
    "sentinel": ("#D55E00", "o", "-"), "local": ("#0072B2", "s", "--"),
    "sinks": ("#009E73", "^", "-."), "scattered": ("#CC79A7", "D", ":"),
    "window": ("#E69F00", "v", "--"), "local-tuned": ("#0072B2", "s", "-"),
    "sinks-tuned": ("#009E73", "^", "-"), "scattered-tuned": ("#CC79A7", "D", "-"),
    "ccm-concat": ("#56B4E9", "P", "-"), "ccm-merge": ("#8C564B", "X", "-"),
    "gist": ("#7F7F7F", "*", "--"), "meanpool": ("#BCBD22", "h", ":"), "pic": ("#17BECF", "<", "-."),
    "prompt": ("0.45", "p", ":"), "unigist": ("#4477AA", "d", "--"), "unigist-tuned": ("#4477AA", "d", "-"),
    "beacon": ("#EE6677", "8", "-"), "strided": ("#228833", ">", "--"), "strided-tuned": ("#228833", ">", "-"),
    "icae": ("#CC3311", "o", "-"), "comprexit": ("#CC3311", "s", "--"), "ic-former": ("#CC3311", "^", ":"),
    "rmt": ("#0077BB", "P", "-"), "autocompressors": ("#0077BB", "X", "--"),
    "gradual-forgetting": ("#BBBBBB", "*", ":"), "output-memory": ("#0077BB", "v", ":"),
    "homer": ("#EE7733", "d", "-."),
    "full": ("0.2", "_", "-"), "none": ("0.2", "|", ":"), "adapted": ("0.5", "_", "--"),
    "streaming-llm": ("#117733", "d", "-"), "random": ("0.45", "x", ":"), "knorm": ("#AA4499", "1", "--"),
    "keydiff": ("#332288", "p", "-"), "lagkv": ("#44AA99", "8", "-."),
    "lagkv-tuned": ("#44AA99", "8", "-"), "tova": ("#999933", "2", "--"),
    "h2o": ("#661100", "H", "-"), "snapkv": ("#6699CC", ">", "-"), "pyramidkv": ("#6699CC", "3", ":"),
    "chunkkv": ("#CC6677", "4", "-"), "adakv": ("#004488", "D", "-"), "expected-attention": ("#88CCEE", "s", "-."),
    "cascading": ("#BB5566", "v", "-"), "cam": ("#DDAA33", "x", "-."), "d2o": ("#997700", "P", "--"),
    "subgen": ("#997700", "o", "-"),
    "kivi": ("#EE3377", "X", "-"), "fp8": ("#EE3377", "h", ":"), "think": ("#009988", "*", "-"),
    "refreshkv": ("#AAAA00", "<", ":"), "lorc": ("#555555", "+", "--"),
    "human": ("#882255", "_", "-."), "full-again": ("0.6", "_", ":"), "full-dynamic": ("#882255", "1", "--"),
}
LINES = ("full", "adapted", "none", "human")
"""Methods without a ratio, drawn as horizontal lines."""
_SPARE = ("#332288", ".", "-.")
_MARKERS, _DASHES = "os^vDPX*hp<>8d", ("--", "-.", ":")
_FEW = 7
"""Maximum number of lines in a legend inside a panel."""
_TITLE = 52
"""Characters of a title that fit above a panel."""
SETTINGS: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42,
    "ps.fonttype": 42, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.25,
}

Panel = Callable[[Axes, list[Row]], None]


def style_of(method: str) -> dict[str, Any]:
    """Colour, marker and line of a method, the same in every figure; variants share the colour of their method."""
    name, _, variant = method.partition(" ")[0].partition(":")
    colour, marker, line = _STYLES.get(name, _SPARE)
    if variant:
        number = crc32(variant.encode())
        marker, line = _MARKERS[number % len(_MARKERS)], _DASHES[number // len(_MARKERS) % len(_DASHES)]
    return {"color": colour, "marker": marker, "linestyle": line, "label": method, "markersize": 5, "linewidth": 1.4}


_SMALL, _SAMPLE = 7.5, 0.62
"""Points of a letter in a legend below all panels, and inches that a line's sample and the space around it take."""


def draw(rows: Sequence[Row], panel: Panel, folder: Path, name: str) -> list[Path]:
    """Draw one panel per task, model and seed, side by side, and save them as PNG and PDF.

    Returns:
        The files written; none if there are no rows.
    """
    settings = by_setting(rows)
    if not settings:
        return []
    across = min(len(settings), 4)
    down = -(-len(settings) // across)
    several = len({seed for *_, seed in settings}) > 1
    with rc_context(SETTINGS):
        figure = Figure(figsize=(4.6 * across, 3.4 * down), layout="constrained")
        places = list(figure.subplots(down, across, squeeze=False).flat)
        for place, ((task, protocol, model, seed), mine) in zip(places, settings.items(), strict=False):
            panel(place, mine)
            about = model if task == protocol else f"{model}, {protocol}"
            title = f"{task} ({about}{f', seed {seed}' if several else ''})"
            place.set_title(fill(title, _TITLE), fontsize=9)  # two lines, not over the next panel
        for place in places[len(settings) :]:
            place.set_axis_off()
        add_legend(figure, places[: len(settings)])
        return save(figure, folder, name)


def add_legend(figure: Figure, places: Sequence[Axes]) -> None:
    """Add a legend to every panel, or one below all of them if there are too many lines."""
    found: dict[str, Any] = {}
    most = 0
    for place in places:
        handles, labels = place.get_legend_handles_labels()
        most = max(most, len(labels))
        for label, handle in zip(labels, handles, strict=True):
            found.setdefault(label, handle)
    if most <= _FEW:
        for place in places:
            place.legend(fontsize=8)
    elif found:
        columns = _columns(list(found), float(figure.get_size_inches()[0]))
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=_SMALL,
            handlelength=2.6,
        )
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.2 * -(-len(found) // columns))


def _columns(labels: Sequence[str], width: float) -> int:
    """The most columns of a legend, filled from the top, that are together no wider than ``width`` inches."""
    widths = [_SAMPLE + TextPath((0, 0), label, size=_SMALL).get_extents().width / 72 for label in labels]
    for columns in range(len(labels), 1, -1):
        needed, rest = 0.0, widths
        for place in range(columns):
            rows = -(-len(rest) // (columns - place))  # as matplotlib fills them: the first ones are longest
            needed += max(rest[:rows])
            rest = rest[rows:]
        if needed <= width:
            return columns
    return 1


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Save a figure as PDF with embedded fonts, and as PNG with a colour palette, which takes a third of the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, page = (folder / f"{name}.{ending}" for ending in ("png", "pdf"))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once for both
    figure.savefig(page)
    figure.savefig(picture, dpi=160)
    with Image.open(picture) as drawn:
        with_palette = drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with_palette.save(picture, optimize=True)
    return [picture, page]


def free_name(name: str, taken: set[str]) -> str:
    """File name of the next figure of that name, with a number if others have it already; it is added to ``taken``."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    taken.add(found)
    return found


def curve(
    panel: Axes, method: str, x: list[float], rows: list[Row], scale: float = 1.0, label: str | None = None
) -> None:
    """Plot values of a method over ``x`` with their intervals: a band, or an error bar if there is only one point."""
    style = style_of(method) | {"label": label or method}
    y = [scale * (r.value or 0.0) for r in rows]
    low = [v if r.ci_low is None else scale * r.ci_low for v, r in zip(y, rows, strict=True)]
    high = [v if r.ci_high is None else scale * r.ci_high for v, r in zip(y, rows, strict=True)]
    panel.plot(x, y, **style)
    if len(rows) > 1:
        panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    else:
        error = [[y[0] - low[0]], [high[0] - y[0]]]
        panel.errorbar(x, y, yerr=error, color=style["color"], capsize=3, linewidth=0.9)


def log_scale(panel: Axes, values: Sequence[float | None]) -> None:
    """Use a logarithmic y-axis with plain numbers if values differ by more than a factor of two."""
    present = [v for v in values if v]
    if present and min(present) > 0 and max(present) > 2 * min(present):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(ScalarFormatter())
        is_wide = max(present) > 10 * min(present)
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if is_wide else (1.5, 2, 3, 4, 5, 6, 7, 8, 9)))


def methods_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows))


def _is_line(name: str) -> bool:
    """Whether a method has no ratio, and is drawn as a line across; also with its adapter's name behind it."""
    return name.partition(":")[0] in LINES


def removal_figure(rows: list[Row], metric: str, folder: Path, metric_label: str) -> list[Path]:
    """Draw a metric against the mean fraction of entries removed.

    Methods that fill their budget differently see different fractions of the text at the same requested
    ratio, so the x-axis is ``ratio_mean``: 1 - entries visible / text tokens before. Answers have no scored queries:
    theirs is the ratio when the context has been read, or what was asked where nobody measured it. What has neither is
    left out, and so are tasks without a method that removes.
    """
    chosen = [
        r for r in rows if r.metric == metric and r.params.get("bin") is None and r.value is not None
        and not (r.removal == UNVERIFIED and r.ratio_asked is None and not _is_line(r.name))
    ]
    # A task under the floor has the full cache only: its panel would be one line.
    panels = [mine for mine in by_setting(chosen).values() if any(not _is_line(r.name) for r in mine)]
    chosen = [row for mine in panels for row in mine]
    is_answer = any(r.protocol == "answer" for r in chosen)

    def removed(row: Row) -> float:
        measured = row.ratio_realised if is_answer else row.ratio_mean
        return (row.ratio_asked if measured is None and row.removal == UNVERIFIED else measured) or 0.0

    def panel(place: Axes, mine: list[Row]) -> None:
        for method in (name for name in methods_of(mine) if not _is_line(name)):
            points = sorted((r for r in mine if r.name == method), key=removed)
            curve(place, method, [removed(r) for r in points], points)
        for name in sorted(filter(_is_line, methods_of(mine)), key=lambda name: LINES.index(name.partition(":")[0])):
            line = {k: v for k, v in style_of(name).items() if k in ("color", "linestyle")}
            for row in (r for r in mine if r.name == name):
                place.axhline(row.value or 0.0, linewidth=1, label=name, **line)
        if metric != "accuracy" and not is_answer:
            log_scale(place, [r.value for r in mine])
        when = "when the context has been read" if is_answer else "mean over queries"
        if any(r.removal == UNVERIFIED for r in mine):
            when = "asked, not verified"
        place.set_xlabel(f"share of cache entries removed ({when})")
        place.set_ylabel(metric_label)
        place.set_xlim(min(0, *map(removed, mine)), 1)
        if is_answer:
            place.set_ylim(-0.02, 1.02)

    return draw(chosen, panel, folder, f"{metric}-removal")
