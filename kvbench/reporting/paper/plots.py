"""Figures of a paper as plain data: panels of lines, made from rows; :mod:`drawing` draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvbench.metrics import SHOWN
from kvbench.reporting.best import removed_or_asked
from kvbench.reporting.paper.selection import Comparison, comparisons, is_paired
from kvbench.reporting.tables.format import UNVERIFIED, by_setting, is_control, length_of, task_of, with_documents
from kvbench.reporting.tables.latex import slug
from kvbench.store.rows import Row

BINS = {
    "position": "text tokens before the target", "since": "text tokens since the last summary",
    "distance": "tokens since the number was stated", "depth": "depth of the needle, % of the context",
    "question": "number of the question about a context",
}
"""Kinds of bins that are drawn, and what their numbers are."""
_ABOVE = "nats per token above full"
_CEILING = 1.25
"""Largest loss that is drawn, as a multiple of that without any context."""


@dataclass(frozen=True)
class Line:
    """Values of a method with the ends of their intervals; ``x`` is the same for all of them."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        levels: name and value of what is drawn as a horizontal line.
        bounds: ends of the y-axis; None where they follow from the values.
        is_log: whether the x-axis is logarithmic, by powers of two.
    """

    title: str
    lines: tuple[Line, ...]
    x_label: str
    y_label: str
    levels: tuple[tuple[str, float], ...] = ()
    bounds: tuple[float | None, float | None] = (None, None)
    is_log: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure: one panel is a column wide, several are a page wide. ``caption`` is plain text."""

    name: str
    panels: tuple[Panel, ...]
    caption: str


def plots_of(rows: Sequence[Row], metrics: Sequence[str] = ()) -> list[Plot]:
    """All figures that there are rows for: quality by removal and by bytes, by place in the text, and speed."""
    found: list[Plot] = []
    shares = _bytes(rows)
    for key, mine in comparisons(rows, metrics).items():
        found += _quality(key, mine, "removal", "share of cache entries removed", removed_or_asked)
        found += _quality(key, mine, "bytes", "bytes of cache held, % of full", lambda row: shares.get(_cell(row)))
    return _with_own_names([*found, *_binned(rows), *_speed(rows)])


def _quality(
    key: Comparison, rows: Sequence[Row], name: str, label: str, place: Callable[[Row], float | None]
) -> Iterator[Plot]:
    protocol, metric, model, seed, question = key
    shown, paired = SHOWN[metric], is_paired(metric)
    lengths = {length for row in rows if (length := length_of(row)) is not None}
    panels, beyond = [], list[str]()
    for mine in by_setting([_difference(row) for row in rows] if paired else rows).values():
        levels = {row.name: row.value or 0.0 for row in mine if row.name in ("full", "adapted", "none", "human")}
        top = _CEILING * levels["none"] if paired and levels.get("none", 0) > 0 else None
        drawn = [row for row in mine if not is_control(row.name) and place(row) is not None]
        points = [(row, place(row) or 0.0) for row in drawn]
        beyond += [_label(row) for row, _ in points if top is not None and (row.value or 0.0) > top]
        low = min((row.ci_low or row.value or 0.0 for row in drawn), default=0.0)
        bounds = (-0.02, 1.02) if "accuracy" in metric else (None, None)
        if top is not None:
            bounds = (min(0.0, low) - 0.05 * top, top)
        task = with_documents(mine[0])
        title = task if len(lengths) < 2 else f"{task}, {length_of(mine[0])}"
        what = f"{shown.axis} above the full cache" if paired else shown.axis
        axis = f"mean {label}" if label.startswith("share") and protocol != "answer" else label
        panels.append(Panel(title, _lines(points, shown.scale), axis, what, tuple(levels.items()), bounds))
    panels = [panel for panel in panels if panel.lines]
    if panels:
        asked = "" if question is None else f", question {question}"
        at = f", length {', '.join(map(str, sorted(lengths)))}" if lengths else ""
        said = f"{shown.axis}{' above that of the full cache (paired)' if paired else ''} against {_when(label, rows)}"
        counts = sorted({row.n for row in rows})
        over = f" Beyond the panel: {', '.join(dict.fromkeys(beyond))}." if beyond else ""
        yield Plot(
            slug(f"{name}-{metric}-{with_documents(rows[0]) if len(panels) == 1 else protocol}{asked}"), tuple(panels),
            f"{said[0].upper()}{said[1:]}: {model}, protocol {protocol}{at}{asked}, seed {seed}, "
            f"{_range(counts)} {rows[0].unit}s per task.{_unsure(rows)}{over}",
        )


def _when(label: str, rows: Sequence[Row]) -> str:
    if not label.startswith("share"):
        return label
    if any(row.removal == UNVERIFIED for row in rows):
        return f"{label} (as asked, not verified)"
    return f"{label} ({'when the context has been read' if rows[0].protocol == 'answer' else 'mean over queries'})"


def _unsure(rows: Sequence[Row]) -> str:
    return " Bars: 95 % bootstrap intervals." if any(row.ci_low is not None for row in rows) else ""


def _bytes(rows: Sequence[Row]) -> dict[tuple[object, ...], float]:
    """Cell -> bytes held, in per cent of the full cache's."""
    whole = [row for row in rows if row.params.get("bin") is None and row.protocol != "profile"]
    full = {_cell(row): row.value for row in whole if row.metric == "kv_bytes_full"}
    return {
        _cell(row): 100 * row.value / full[_cell(row)]  # type: ignore[operator]
        for row in whole if row.metric == "kv_bytes_physical" and row.value is not None and full.get(_cell(row))
    }


def _cell(row: Row) -> tuple[object, ...]:
    return task_of(row), row.protocol, row.model, row.seed, row.name, row.ratio_asked


def _difference(row: Row) -> Row:
    """The row with its difference to the full cache in place of its value; the full cache's own is 0."""
    if row.delta is None:
        return replace(row, value=0.0, ci_low=None, ci_high=None)
    return replace(row, value=row.delta, ci_low=row.delta_ci_low, ci_high=row.delta_ci_high)


def _lines(points: Sequence[tuple[Row, float]], scale: float = 1.0, label: Callable[[Row], str] | None = None) -> tuple[
    Line, ...
]:
    """One line for each method, over increasing ``x``."""
    name = label or (lambda row: row.name)
    found = []
    for method in dict.fromkeys(name(row) for row, _ in points):
        mine = sorted(((x, row) for row, x in points if name(row) == method), key=lambda point: point[0])
        y = tuple(scale * (row.value or 0.0) for _, row in mine)
        low = tuple(v if row.ci_low is None else scale * row.ci_low for v, (_, row) in zip(y, mine, strict=True))
        high = tuple(v if row.ci_high is None else scale * row.ci_high for v, (_, row) in zip(y, mine, strict=True))
        found.append(Line(method, tuple(x for x, _ in mine), y, low, high))
    return tuple(found)


def _binned(rows: Sequence[Row]) -> Iterator[Plot]:
    """Loss, or accuracy, by place in the text: a panel for each ratio."""
    for kind, label in BINS.items():
        metric = {"position": "nll", "since": "nll", "distance": "accuracy"}.get(kind, "answer_accuracy")
        chosen = [
            row for row in rows if str(row.params.get("bin")).startswith(f"{kind}=") and row.metric == metric
            and (row.value if metric != "nll" else row.delta) is not None
        ]
        shown = [_difference(row) for row in chosen] if metric == "nll" else chosen
        for (task, protocol, model, seed), mine in by_setting(shown).items():
            fixed = [row for row in mine if row.ratio_asked is None and (metric != "nll" or not is_control(row.name))]
            ratios = sorted({row.ratio_asked for row in mine if row.ratio_asked is not None})
            panels = [
                Panel(
                    f"{ratio:g} removed",
                    _lines([(r, _number(r)) for r in [*fixed, *(r for r in mine if r.ratio_asked == ratio)]]),
                    label, _ABOVE if metric == "nll" else SHOWN[metric].axis,
                    bounds=(None, None) if metric == "nll" else (-0.02, 1.02), is_log=kind in ("position", "since"),
                ) for ratio in ratios
            ]
            if panels and max(len(line.x) for panel in panels for line in panel.lines) > 2:
                what = "Loss above that of the full cache" if metric == "nll" else "Accuracy"
                yield Plot(
                    slug(f"{kind}-{task}"), tuple(panels),
                    f"{what} by {label}: {task} ({model}, protocol {protocol}, seed {seed}).{_unsure(mine)}",
                )


def _number(row: Row) -> float:
    number = float(str(row.params["bin"]).partition("=")[2])
    return 1 + number if str(row.params["bin"]).startswith("since") else max(number, 1.0)


def _speed(rows: Sequence[Row]) -> Iterator[Plot]:
    """Throughput and memory of a profile, over lengths at the largest batch and over batches at the largest length."""
    usual = [row for row in rows if row.protocol == "profile" and row.params["bin"] is None and row.value is not None]
    for model in dict.fromkeys(row.model for row in usual):
        for axis, other, label in (
            ("seq_len", "batch_size", "tokens of the prompt"), ("batch_size", "seq_len", "batch"),
        ):
            panels = []
            for metric in ("decode_tok_s", "decode_peak_bytes"):
                mine = [row for row in usual if row.model == model and row.metric == metric and row.params[axis]]
                if len({row.params[axis] for row in mine}) < 2:
                    continue
                most = max(row.params[other] for row in mine)
                points = [(row, float(row.params[axis])) for row in mine if row.params[other] == most]
                shown = SHOWN[metric]
                title = f"{'batch' if other == 'batch_size' else 'length'} {most}"
                panels.append(Panel(title, _lines(points, shown.scale, _label), label, shown.axis, is_log=True))
            if panels:
                yield Plot(
                    slug(f"speed-{label}-{model}"), tuple(panels),
                    f"Throughput and memory of decoding by {label}: {model}. Bars: where the median of another such "
                    "run will lie.",
                )


def _label(row: Row) -> str:
    return row.name if row.ratio_asked is None else f"{row.name} {row.ratio_asked:g}"


def _range(counts: Sequence[int]) -> str:
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def _with_own_names(plots: Sequence[Plot]) -> list[Plot]:
    taken: dict[str, int] = {}
    found = []
    for plot in plots:
        taken[plot.name] = number = taken.get(plot.name, 0) + 1
        found.append(plot if number == 1 else replace(plot, name=f"{plot.name}-{number}"))
    return found
