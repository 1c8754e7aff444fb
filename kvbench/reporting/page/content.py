"""The numbers of a page as JSON: rows as lists, with the texts that many of them share named by number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.colors import to_hex

from kvbench.analysis.curves import is_of_curve
from kvbench.metrics import SHOWN
from kvbench.metrics.base import Shown
from kvbench.reporting.best import unranked
from kvbench.reporting.figures.base import style_of
from kvbench.reporting.tables.compact import main_metric
from kvbench.reporting.tables.format import by_setting, is_control, length_of, name_of
from kvbench.store.rows import Row

COLUMNS = (
    "setting", "method", "metric", "bin", "asked", "realised", "mean", "entries", "value", "low", "high", "delta",
    "delta_low", "delta_high", "p", "n", "groups", "length", "batch", "recipe", "signature", "run",
)
"""What a row of the page holds, in this order."""
_OWN = (
    "method", "metric", "ratio_asked", "ratio_realised", "ratio_mean", "entries_peak", "value", "ci_low", "ci_high",
    "delta", "delta_ci_low", "delta_ci_high", "p_value", "n", "groups", "signature",
)
"""Fields of a row that are not part of its recipe."""
_SYMBOLS = {
    "o": ("circle", "●"), "s": ("square", "■"), "^": ("triangle-up", "▲"), "v": ("triangle-down", "▼"),
    "D": ("diamond", "◆"), "P": ("cross", "✚"), "X": ("x", "✖"), "*": ("star", "★"), "h": ("hexagon", "⬢"),
    "H": ("hexagon2", "⬢"), "p": ("pentagon", "⬟"), "<": ("triangle-left", "◀"), ">": ("triangle-right", "▶"),
    "8": ("octagon", "⬣"), "d": ("diamond-tall", "♦"), "1": ("y-down-open", "⅄"), "2": ("y-up-open", "Y"),
    "3": ("y-left-open", "≺"), "4": ("y-right-open", "≻"), "x": ("x-thin-open", "✕"), "+": ("cross-thin-open", "+"),
    "_": ("line-ew-open", "▬"), "|": ("line-ns-open", "|"), ".": ("circle", "•"),
}
"""matplotlib's markers as Plotly's symbols, and as characters."""
_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
_DIGITS = 6
"""Significant digits of the numbers of a page; results.json has all."""


@dataclass
class _Numbered:
    """Texts in order of their first appearance, which others refer to by number."""

    places: dict[str, int] = field(default_factory=dict)

    def of(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))

    def texts(self) -> list[str]:
        return list(self.places)


def content_of(runs: Sequence[tuple[str, Sequence[Row]]]) -> dict[str, Any]:
    """The numbers of runs, each given by its command and its rows, without the points of curves: these outnumber all
    others, and are in the figures and in rows.csv."""
    placed = [(number, row) for number, (_, rows) in enumerate(runs) for row in rows if not is_of_curve(row)]
    settings = by_setting([row for _, row in placed])
    places = {id(row): place for place, rows in enumerate(settings.values()) for row in rows}
    methods, recipes, signatures = _Numbered(), _Numbered(), _Numbered()
    listed = []
    for run, row in placed:
        params = dict(row.params)
        recipe = {name: value for name, value in dataclasses.asdict(row).items() if name not in _OWN}
        recipe["params"] = {name: value for name, value in params.items() if value is not None and name != "bin"}
        numbers = (
            row.ratio_asked, row.ratio_realised, row.ratio_mean, row.entries_peak, row.value, row.ci_low, row.ci_high,
            row.delta, row.delta_ci_low, row.delta_ci_high, row.p_value,
        )
        listed.append([
            places[id(row)], methods.of(name_of(row)), row.metric, params.get("bin"), *map(short, numbers), row.n,
            row.groups, params.get("seq_len") or length_of(row), params.get("batch_size"),
            recipes.of(json.dumps(recipe, ensure_ascii=False)), signatures.of(row.signature), run,
        ])
    return {
        "columns": COLUMNS, "rows": listed, "methods": [_method(name) for name in methods.texts()],
        "settings": [_setting(key, rows) for key, rows in settings.items()],
        "metrics": {name: _metric(name) for name in dict.fromkeys(row.metric for _, row in placed)},
        "recipes": [json.loads(text) for text in recipes.texts()], "signatures": signatures.texts(),
        "commands": [command for command, _ in runs],
    }


def short(value: float | None) -> float | None:
    """A number with six significant digits."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _metric(name: str) -> dict[str, Any]:
    shown = SHOWN.get(name, Shown(name, digits=4))  # some numbers of a profile are in no table
    return {"heading": shown.heading, "axis": shown.axis, "better": shown.better, "digits": shown.digits,
            "scale": shown.scale}


def _method(name: str) -> dict[str, Any]:
    style = style_of(name)
    symbol, glyph = _SYMBOLS[style["marker"]]
    return {
        "name": name, "colour": to_hex(style["color"]), "symbol": symbol, "glyph": glyph,
        "dash": _DASHES[style["linestyle"]], "control": is_control(name.partition(" ")[0]),
    }


def _setting(key: tuple[str, str, str, int], rows: Sequence[Row]) -> dict[str, Any]:
    label, protocol, model, seed = key
    whole = [row for row in rows if row.params.get("bin") is None] or rows
    question = rows[0].params.get("question")
    return {
        "label": label, "task": rows[0].task, "question": question, "protocol": protocol, "model": model,
        "seed": seed, "length": length_of(rows[0]), "unit": whole[0].unit, "main": main_metric(whole),
        "unranked": unranked(whole, main_metric(whole)),
    }
