"""Figures of a profile: speed and memory by length and batch, latency and throughput, predicted and measured
speed-up, time per token by entries kept and by tokens read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from kvbench.metrics import SHOWN
from kvbench.reporting.figures.base import curve, draw, log_scale, style_of
from kvbench.store.rows import Row


def profile_figures(rows: list[Row], folder: Path) -> list[Path]:
    """Draw all figures for which there are enough rows."""
    usual = [r for r in rows if r.protocol == "profile" and r.params["bin"] is None]
    found: list[Path] = []
    for axis, other in (("seq_len", "batch_size"), ("batch_size", "seq_len")):
        for metric in ("decode_tok_s", "decode_peak_bytes"):
            found += _against(usual, metric, axis, other, folder)
    return [*found, *_trade(usual, folder), *_predicted(usual, folder), *_cost(usual, folder)]


def _against(rows: list[Row], metric: str, axis: str, other: str, folder: Path) -> list[Path]:
    """Draw a metric over length, at the largest batch size, or over two or more batch sizes, at the largest length."""
    chosen = [r for r in rows if r.metric == metric and r.params[axis] is not None]
    if len({r.params[axis] for r in chosen}) < (2 if axis == "batch_size" else 1):
        return []
    most = max(r.params[other] for r in chosen)
    chosen = [r for r in chosen if r.params[other] == most]

    def panel(place: Axes, mine: list[Row]) -> None:
        scale = SHOWN[metric].scale
        for key in _keys(mine):
            points = sorted((r for r in mine if _key(r) == key), key=lambda r: r.params[axis])
            curve(place, key[0], [r.params[axis] for r in points], points, scale, _label(*key))
        _binary(place)
        log_scale(place, [scale * (r.value or 0.0) for r in mine])
        place.set_xlabel("tokens of the prompt" if axis == "seq_len" else "batch")
        place.set_ylabel(f"{SHOWN[metric].axis} ({'batch' if other == 'batch_size' else 'length'} {most})", fontsize=8)

    name = f"{metric.removesuffix('_bytes')}-{'length' if axis == 'seq_len' else 'batch'}"
    return draw(chosen, panel, folder, name)


def _trade(rows: list[Row], folder: Path) -> list[Path]:
    """Draw latency against throughput, one line over batch sizes per method, at the largest length."""
    chosen = [r for r in rows if r.metric in ("decode_tok_s", "tpot_s") and r.params["seq_len"] is not None]
    if len({r.params["batch_size"] for r in chosen}) < 2:
        return []
    most = max(r.params["seq_len"] for r in chosen)
    chosen = [r for r in chosen if r.params["seq_len"] == most]

    def panel(place: Axes, mine: list[Row]) -> None:
        for key in _keys(mine):
            at = {(r.metric, r.params["batch_size"]): r.value or 0.0 for r in mine if _key(r) == key}
            batches = sorted({batch for _, batch in at})
            x = [at["decode_tok_s", batch] for batch in batches]
            y = [1e3 * at["tpot_s", batch] for batch in batches]
            place.plot(x, y, **{**style_of(key[0]), "label": _label(*key)})
        log_scale(place, [1e3 * (r.value or 0.0) for r in mine if r.metric == "tpot_s"])
        place.set_xlabel("tokens written per second, all rows of the batch")
        place.set_ylabel(f"ms per token of a row, length {most}")

    return draw(chosen, panel, folder, "latency-throughput")


def _predicted(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the measured speed-up against the one predicted from bytes."""
    chosen = [
        r for r in rows
        if r.metric in ("decode_speedup", "decode_speedup_predicted") and not r.name.startswith("full")
    ]

    def panel(place: Axes, mine: list[Row]) -> None:
        limit = 1.05 * max(r.value or 1.0 for r in mine)
        place.plot([1, limit], [1, limit], color="0.6", linewidth=1, linestyle=":", label="measured = predicted")
        for key in _keys(mine):
            where = {(r.metric, r.params["seq_len"], r.params["batch_size"]): r for r in mine if _key(r) == key}
            places = [at[1:] for at in where if at[0] == "decode_speedup"]
            points = [
                (where["decode_speedup_predicted", *at].value or 0.0, where["decode_speedup", *at]) for at in places
            ]
            y = [r.value or 0.0 for _, r in points]
            error = [
                [v - (r.ci_low if r.ci_low is not None else v) for v, (_, r) in zip(y, points, strict=True)],
                [(r.ci_high if r.ci_high is not None else v) - v for v, (_, r) in zip(y, points, strict=True)],
            ]
            style = {**style_of(key[0]), "linestyle": "none", "label": _label(*key)}
            place.errorbar([x for x, _ in points], y, yerr=error, capsize=2, elinewidth=0.8, **style)
        place.set_xlabel("speed-up that bytes predict")
        place.set_ylabel("speed-up measured")

    return draw(chosen, panel, folder, "speedup-predicted")


def _cost(rows: list[Row], folder: Path) -> list[Path]:
    """Draw time per token, with fitted lines, against entries kept and against tokens read, from three lengths on."""
    chosen = [r for r in rows if r.metric == "tpot_s" and r.params["seq_len"] is not None]
    if len({r.params["seq_len"] for r in chosen}) < 3:
        return []
    batch = max(r.params["batch_size"] for r in chosen)
    chosen = [r for r in chosen if r.params["batch_size"] == batch and r.name not in ("full-again",)]

    def over(what: str, label: str, name: str) -> list[Path]:
        def panel(place: Axes, mine: list[Row]) -> None:
            for key in _keys(mine):
                points = sorted((r for r in mine if _key(r) == key), key=lambda r: r.params["seq_len"])
                x = [float(r.params[what]) for r in points]
                y = [1e3 * (r.value or 0.0) for r in points]
                style = style_of(key[0])
                place.plot(x, y, **{**style, "linestyle": "none", "label": _label(*key)})
                slope, start = np.polyfit(x, y, 1)
                place.plot(x, [start + slope * v for v in x], color=style["color"], linestyle=style["linestyle"])
            place.set_xlabel(label)
            place.set_ylabel(f"ms per token, batch {batch}")
            place.set_ylim(bottom=0)
            place.set_xlim(left=0)

        return draw(chosen, panel, folder, name)

    kept = over("entries_mean", "entries kept (mean while writing)", "decode-cost-kept")
    return kept + over("seq_len", "tokens read", "decode-cost-read")


def _key(row: Row) -> tuple[str, float | None]:
    """Method and ratio, for which a panel has one line."""
    return row.name, row.ratio_asked


def _keys(rows: list[Row]) -> list[tuple[str, float | None]]:
    return list(dict.fromkeys(_key(r) for r in rows))


def _label(method: str, ratio: float | None) -> str:
    return method if ratio is None else f"{method} {ratio:g}"


def _binary(place: Axes) -> None:
    """Scale the x-axis by powers of two, with plain numbers as labels."""
    place.set_xscale("log", base=2)
    place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    place.xaxis.set_minor_formatter(NullFormatter())
