"""Tables as plain data, from which Markdown, CSV, LaTeX and the HTML page are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvbench.metrics import SHOWN
from kvbench.metrics.base import ANSWERS, GREEDY, LM, TEXTS, TIMING
from kvbench.parsing import bytes_of
from kvbench.reporting.best import unranked
from kvbench.reporting.tables.bins import bin_tables
from kvbench.reporting.tables.format import (
    by_setting,
    cells_of,
    entry_of,
    is_control,
    length_of,
    number_of,
    reading_note,
    removal_note,
)
from kvbench.reporting.tables.largest_ratio import largest_ratio_tables
from kvbench.reporting.tables.plain import Table, TableCell
from kvbench.reporting.tables.survival import survival_tables
from kvbench.statistics import SIGNIFICANT
from kvbench.store.faults import faults_in
from kvbench.store.records import WRITING
from kvbench.store.rows import Row

_MEMORY = "kv_bytes_physical"
_HEAD = ("method", "removed: asked", "realised")


def columns_of(table: str) -> tuple[str, ...]:
    """The metrics that are columns of a table."""
    return tuple(name for name, shown in SHOWN.items() if table in shown.tables)


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Create one table for each task, protocol, model and seed, one for its greedy texts, and those of what its rows
    say beside."""
    found: list[Table] = []
    for (title, protocol, model, seed), mine in by_setting(rows).items():
        task = _file_name(mine[0], rows)
        if protocol == "profile":
            timed = [r for r in mine if r.params["batch_size"] and r.params["seq_len"]]
            found.append(_table(timed, task, TIMING, columns_of(TIMING), ("seq_len", "batch_size", "bin")))
            continue
        whole = [r for r in mine if r.params.get("bin") is None]
        present = {row.metric for row in whole}
        asks = bool(present & {"answer_nll", "answer_accuracy"})
        kinds = columns_of(ANSWERS if asks else TEXTS if protocol in WRITING else LM)
        if "answer_nll" not in present and "accuracy" in present:
            kinds += ("accuracy",)
        found.append(_table(whole, task, f"{protocol}", kinds, title=title))
        greedy = [r for r in mine if r.params.get("bin") == "decode=greedy"]
        if greedy:
            found.append(_table(greedy, f"{task}-greedy", GREEDY, columns_of(TEXTS)))
        lead = f"{title} ({model}, {protocol}, seed {seed}): "
        found += bin_tables(mine, task, lead) if protocol == "answer" else []
        found += survival_tables(mine, task, lead) + largest_ratio_tables(mine, task, lead)
    return [table for table in found if table.rows]


def _file_name(row: Row, rows: Sequence[Row]) -> str:
    """The task as part of file names, with the length of its contexts if it was measured at several, and documents."""
    several = len({length_of(other) for other in rows if other.task == row.task}) > 1
    known = "-known" if row.params.get("question") == "known" else ""
    documents = f"-{row.params['documents'].replace(' ', '-')}" if row.params.get("documents") else ""
    return f"{row.task}{f'-{length_of(row)}' if several else ''}{known}{documents}"


def _table(
    rows: Sequence[Row], name: str, what: str, columns: Sequence[str], by: tuple[str, ...] = (), title: str = "",
) -> Table:
    shown = [metric for metric in columns if any(row.metric == metric for row in rows)]
    keys = list(dict.fromkeys(tuple(row.params.get(key) for key in by) for row in rows))
    by = tuple(key for i, key in enumerate(by) if any(k[i] is not None for k in keys))
    lines: list[tuple[TableCell, ...]] = []
    why = unranked(rows, columns[0])
    for key in dict.fromkeys(tuple(row.params.get(k) for k in by) for row in rows):
        mine = [row for row in rows if tuple(row.params.get(k) for k in by) == key]
        lead = tuple(TableCell("" if k is None else str(k), k) for k in key)
        cells = cells_of(mine)
        best = {metric: set() if why else _best(cells, metric) for metric in shown}
        for (method, ratio), metrics in cells.items():
            first = next(iter(metrics.values()))
            values = tuple(
                entry_of(metrics.get(metric), (method, ratio) in best[metric]) for metric in shown
            )
            lines.append((
                *lead, TableCell(method, method), TableCell(number_of(ratio, None), ratio),
                TableCell(number_of(first.ratio_realised, 3), first.ratio_realised), *values, _held(metrics),
            ))
    if not rows:
        return Table(name, what, (), (), ())
    head = tuple({"seq_len": "length", "batch_size": "batch"}.get(key, "") for key in by)
    one, faults = rows[0], faults_in((row.method, row.params) for row in rows)
    if one.protocol == "profile":
        notes: tuple[str, ...] = (
            f"* differs from the faster full cache (paired requests, Holm-adjusted p < {SIGNIFICANT}). Brackets: "
            "where the median of another such run will lie. Bold: best of its ratio, and its interval does not meet "
            "that of the next.", one.signature.partition(":")[2].partition("|P:")[0], *faults,
        )
        return Table(
            name, f"{name}: {what} ({one.model}, {one.n} requests in {one.groups} processes)",
            (*head, *_HEAD, *(SHOWN[metric].heading for metric in shown), "KV held"), tuple(lines), notes,
        )
    remarks = [note for note in (reading_note(rows), removal_note(rows)) if note]
    notes = (
        f"* differs from full (paired, Holm-adjusted p < {SIGNIFICANT}). Bold: best of its ratio, and its interval "
        "does not meet that of the next.", *filter(None, [why]), *remarks,
        one.signature.partition(":")[2],
        *faults,
    )
    return Table(
        name, f"{title or name}: {what} ({one.model}, seed {one.seed}, {one.n} {one.unit}s in {one.groups} groups)",
        (*head, *_HEAD, *(SHOWN[metric].heading for metric in shown), "KV held"), tuple(lines), notes,
    )


def _best(cells: dict[tuple[str, float | None], dict[str, Row]], metric: str) -> set[tuple[str, float | None]]:
    """Keys of the cells that are best at their ratio, with an interval that does not overlap that of the next best."""
    better = SHOWN[metric].better
    if better is None:
        return set()
    sign = 1.0 if better == "low" else -1.0
    found = set()
    for ratio in {ratio for method, ratio in cells if ratio is not None}:
        rows = [
            (sign * row.value, key, row) for key, metrics in cells.items()
            if key[1] == ratio and not is_control(key[0])
            and (row := metrics.get(metric)) is not None and row.value is not None
        ]
        ordered = sorted(rows, key=lambda item: item[0])
        if len(ordered) > 1 and _apart(ordered[0][2], ordered[1][2], better):
            found.add(ordered[0][1])
    return found


def _apart(best: Row, next_: Row, better: str) -> bool:
    ends = (best.ci_high, next_.ci_low) if better == "low" else (next_.ci_high, best.ci_low)
    return ends[0] is not None and ends[1] is not None and ends[0] < ends[1]


def _held(metrics: dict[str, Row]) -> TableCell:
    row = metrics.get(_MEMORY)
    return TableCell("-") if row is None else TableCell(bytes_of(row.value), row.value)


def renamed(table: Table, taken: set[str]) -> Table:
    """The table with a name that is not in ``taken``."""
    name, number = table.name, 2
    while name in taken:
        name, number = f"{table.name}-{number}", number + 1
    return replace(table, name=name)
