"""Compact tables for the terminal: a line for each cell, best first, within 100 columns, and what they say in words.

Everything else (realised ratios, intervals, peaks, bins) stands in the wide tables and on the report page.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvbench.metrics import SHOWN
from kvbench.metrics.base import FLUENCY
from kvbench.reporting.best import are_unequal, best, loss, removed_or_asked, unranked
from kvbench.reporting.tables.format import (
    asked_of,
    cells_of,
    held_of,
    is_control,
    number_of,
    reading_note,
    removal_note,
    style_of,
    task_of,
)
from kvbench.reporting.tables.tables import columns_of
from kvbench.reporting.tables.texts import text_notes
from kvbench.statistics import SIGNIFICANT, least_groups
from kvbench.store.records import WRITING
from kvbench.store.rows import Row

COMPACT_WIDTH = 100
"""Columns of a terminal that the tables fit."""
_BAR, _PARTS = 8, " ▏▎▍▌▋▊▉█"
_BESIDE, _MOST_BESIDE = ("mauve", "semantic", "chrf", "rougeL", "prefix_match"), 2
"""Metrics of written texts that stand beside the first one, without a difference, and how many of them do."""
_MOVED = 0.005
"""Difference between the ratio asked for and the one realised from which on both are shown."""
UNEQUALLY = (
    "Methods asked for the same ratio did not remove equally much: named are all that none beats with as much removed."
)
Cells = dict[tuple[str, float | None], dict[str, Row]]


def compact_tables(rows: list[Row]) -> Group:
    """The compact table of a task, with a sentence of reading and remarks."""
    whole = [row for row in rows if row.params.get("bin") is None]
    metric = main_metric(whole)
    cells = cells_of(whole)
    ordered = _by_value(cells, metric)
    table = _table(whole, metric, {key: cells[key] for key in ordered})
    parts: list[Table | Text] = [Text(_title(whole[0], metric), style="bold"), table]
    why = unranked(whole, metric)
    parts.append(Text(why, style="yellow") if why else Text(reading(whole, metric)))
    notes = [*(text_notes(whole) if whole[0].protocol in WRITING else ()), reading_note(whole), removal_note(whole)]
    parts += [Text(note, style="dim") for note in notes if note]
    return Group(*parts, Text(""))


def main_metric(rows: Sequence[Row]) -> str:
    """The metric that the cells of a task are sorted by."""
    present = {row.metric for row in rows}
    order: tuple[str, ...] = ("answer_accuracy", "accuracy", "ppl", "decode_tok_s")
    if rows[0].protocol in WRITING:
        order = (*columns_of(FLUENCY), *(row.metric for row in rows))
    elif "answer_nll" not in present:
        order = ("answer_accuracy", "ppl", "accuracy")
    return next((name for name in order if name in present), rows[0].metric)


def reading(rows: Sequence[Row], metric: str) -> str:
    """What the table says, in words: the best at each ratio, and what could be told apart from the full cache."""
    mine = [row for row in rows if row.metric == metric and row.value is not None]
    rivals = [row for row in mine if not is_control(row.name) and row.delta is not None]
    if not rivals:
        return "Nothing is compared with the full cache."
    said = []
    for alike in _by_ratio(rivals):
        if len(alike) < 2:
            continue
        found = sorted(best(alike), key=loss)
        if are_unequal(alike):
            what = "realised" if found[0].ratio_mean is None else "mean"
            each = [
                f"{row.name} ({_difference(row).strip(' *')}, {what} {number_of(removed_or_asked(row), 2)})"
                for row in found
            ]
            said.append(f"at {alike[0].ratio_asked:g} {_listed(each, 3)}")
        else:
            names = _listed([row.name for row in found], 3)
            said.append(f"at {alike[0].ratio_asked:g} {names} ({_difference(found[0]).strip(' *')})")
    tested = [row for row in mine if row.p_value is not None]
    few = too_few_to_test(tested)
    if few:
        verdict = few
    else:
        same = [_named(row) for row in rivals if row.p_value is not None and row.p_value >= SIGNIFICANT]
        verdict = (
            "All differ from the full cache (p < .05)." if not same else
            f"No significant difference to the full cache: {_listed(same)}."
        ) if tested else ""
    lead = "Best, with the difference to the full cache" if SHOWN[metric].better else "Closest to the full cache"
    named = f"{lead}: " + "; ".join(said[:6]) + ". " if said else ""
    warning = f"{UNEQUALLY} " if said and any(map(are_unequal, _by_ratio(rivals))) else ""
    return f"{named}{warning}{verdict}".strip()


def _by_ratio(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that were asked for the same ratio, in ascending order."""
    ratios = sorted({row.ratio_asked for row in rows if row.ratio_asked is not None})
    return [[row for row in rows if row.ratio_asked == ratio] for ratio in ratios]


def too_few_to_test(tested: Sequence[Row]) -> str:
    """A sentence if so few groups cannot be significantly different however large the difference is; else empty."""
    if not tested:
        return ""
    fewest, count = min(tested, key=lambda row: row.groups), len(tested)
    groups, least = fewest.groups, least_groups(count)
    if least is not None and groups >= least:
        return ""
    what = f"{fewest.unit}s" if groups == fewest.n else "groups"
    enough = f"; it takes {least} {what} at least" if least is not None else ""
    return (
        f"Too few documents to test: with {groups} groups, no difference could be significant in {count} "
        f"comparison{'s' if count > 1 else ''}{enough}."
    )


def _table(rows: list[Row], metric: str, cells: Cells) -> Table:
    present = {row.metric for row in rows}
    is_text = rows[0].protocol in WRITING
    beside = [name for name in _BESIDE if is_text and name in present and name != metric][:_MOST_BESIDE]
    bars = _bars(cells, metric)
    mine = [row for row in rows if row.metric == metric and not is_control(row.name)]
    has_mean = any(row.ratio_mean is not None for row in mine) and any(map(are_unequal, _by_ratio(mine)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold", min_width=12)
    table.add_column("removed", justify="right", no_wrap=True)
    if has_mean:
        table.add_column("mean", justify="right", no_wrap=True)
    table.add_column(_heading(metric), justify="right", no_wrap=True)
    if bars:
        table.add_column("", no_wrap=True, width=_BAR)
    table.add_column("to full", justify="right", no_wrap=True)
    for name in beside:
        table.add_column(SHOWN[name].heading, justify="right", no_wrap=True)
    table.add_column("KV held", justify="right", no_wrap=True)
    for (method, ratio), metrics in cells.items():
        row = metrics.get(metric)
        bar = [_bar(bars[method, ratio])] if bars else []
        first = next(iter(metrics.values()))
        mean = [number_of(first.ratio_mean, 2)] if has_mean else []
        table.add_row(
            method, _removed(first), *mean, "-" if row is None else _value(row), *bar,
            "-" if row is None else _difference(row), *(_plain(metrics.get(name)) for name in beside),
            held_of(metrics, not is_text), style=style_of(method),
        )
    return table


def _title(row: Row, metric: str) -> str:
    better = ", lower is better" if SHOWN[metric].better == "low" else ""
    return f"{task_of(row)}: {_heading(metric)}{better}  ({row.model}, {row.protocol}, {row.n} {row.unit}s)"


def _heading(metric: str) -> str:
    return {"ppl": "perplexity", "accuracy": "accuracy", "answer_accuracy": "accuracy"}.get(
        metric, SHOWN[metric].heading
    )


def _sign(metric: str) -> float:
    """1 if low values are better, or neither; -1 if high ones are."""
    return -1.0 if SHOWN[metric].better == "high" else 1.0


def _by_value(cells: Cells, metric: str) -> list[tuple[str, float | None]]:
    """Keys of the cells, best first; those without a value last."""
    def order(key: tuple[str, float | None]) -> tuple[bool, float]:
        row = cells[key].get(metric)
        value = None if row is None else row.value
        return value is None, _sign(metric) * (value or 0.0)

    return sorted(cells, key=order)


def _bars(cells: Cells, metric: str) -> dict[tuple[str, float | None], float]:
    """A share for the bar of each cell: of right answers, or of what the context is worth; empty if there is none."""
    found = {}
    for key, metrics in cells.items():
        row = metrics.get(metric)
        if metric in ("accuracy", "answer_accuracy"):
            found[key] = 0.0 if row is None else row.value or 0.0
        elif "recovery" in metrics or key[0] in ("full", "none"):
            recovery = metrics.get("recovery")
            found[key] = float(key[0] == "full") if recovery is None else recovery.value or 0.0
        else:
            found[key] = 0.0
    return found if any(share > 0 for key, share in found.items() if key[0] != "full") else {}


def _bar(share: float) -> str:
    eighths = round(8 * _BAR * min(1.0, max(0.0, share)))
    return (_PARTS[8] * (eighths // 8) + _PARTS[eighths % 8]).rstrip()


def _removed(row: Row) -> str:
    asked = asked_of(row)
    if row.ratio_realised is None or row.name == "full":
        return asked
    if row.ratio_asked is not None and abs(row.ratio_realised - row.ratio_asked) <= _MOVED:
        return asked
    return number_of(row.ratio_realised, 2) if asked == "-" else f"{asked} ({number_of(row.ratio_realised, 2)})"


def _value(row: Row) -> str:
    return _with_half(row.value, row.ci_low, row.ci_high, row.metric, "")


def _difference(row: Row) -> str:
    if row.delta is None:
        return "-"
    mark = "*" if row.p_value is not None and row.p_value < SIGNIFICANT else " "
    return _with_half(row.delta, row.delta_ci_low, row.delta_ci_high, row.metric, "+") + mark


def _with_half(value: float | None, low: float | None, high: float | None, metric: str, plus: str) -> str:
    """A value and half of its interval; five digits at most before a power of ten is written."""
    if value is None:
        return "n/a"
    digits = max(0, SHOWN[metric].digits - (abs(value) >= 100) - (abs(value) >= 1000))
    form = f"{plus}.{digits}f" if abs(value) < 1e5 else f"{plus}.2e"
    if low is None or high is None:
        return f"{value:{form}}"
    half = (high - low) / 2
    return f"{value:{form}} ±{half:{form.removeprefix('+')}}"


def _plain(row: Row | None) -> str:
    if row is None or row.value is None:
        return "-"
    mark = "*" if row.p_value is not None and row.p_value < SIGNIFICANT else " "
    return f"{SHOWN[row.metric].scale * row.value:.{SHOWN[row.metric].digits}f}{mark}"


def _named(row: Row) -> str:
    return row.name if row.ratio_asked is None else f"{row.name} {row.ratio_asked:g}"


def _listed(names: Sequence[str], most: int = 6) -> str:
    """Names with commas; only some of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
