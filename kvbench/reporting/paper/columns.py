"""Tables of a paper: a line for each method, a column for each ratio of a task, or for each of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvbench.metrics import SHOWN
from kvbench.reporting.best import UNDER_FLOOR
from kvbench.reporting.paper.selection import comparisons, is_paired
from kvbench.reporting.tables.format import CONTROLS, length_of, reading_note, removal_note
from kvbench.reporting.tables.latex import slug
from kvbench.reporting.tables.plain import Table, TableCell
from kvbench.reporting.tables.tables import renamed
from kvbench.statistics import LEVEL, SIGNIFICANT
from kvbench.store.rows import Row

_TASKS = 6
"""Largest number of tasks in a table."""
_LETTERS = 46
"""Letters of small print that fit a column of 8 cm, between three spaces each."""
_HEADING = 12

_SPEED = ("ttft_s", "tpot_s", "decode_tok_s", "decode_speedup", "decode_peak_bytes")

Place = tuple[str, int | None, float | None]
"""Task, length of its contexts and ratio; a column is one of them."""


def paper_tables(rows: Sequence[Row], order: Sequence[str], metrics: Sequence[str] = ()) -> list[Table]:
    """All tables, with their methods in the given order."""
    found: list[Table] = []
    columns: list[Place]
    for (protocol, metric, model, seed, question), mine in comparisons(rows, metrics).items():
        tasks = list(dict.fromkeys((row.task, length_of(row)) for row in mine))
        ratios = sorted({row.ratio_asked for row in mine if row.ratio_asked is not None})
        asked = "" if question is None else f", question {question}"
        about = f"{model}, protocol {protocol}{asked}, seed {seed}"
        for is_difference in (False, True) if is_paired(metric) else (False,):
            what = f"{SHOWN[metric].axis}{' above that of the full cache' if is_difference else ''}"
            name = f"{metric}{'-above-full' if is_difference else ''}"
            if len(tasks) == 1 or not ratios:
                for task, length in tasks:
                    title = f"{what} on {task}{'' if length is None else f', length {length}'}, by ratio removed"
                    columns = [(task, length, ratio) for ratio in (*ratios,) or (None,)]
                    found.append(_table(mine, order, columns, f"{name}-{task}{asked}", title, about, is_difference))
                continue
            for ratio in ratios:
                for start in range(0, len(tasks), _TASKS):
                    columns = [(task, length, ratio) for task, length in tasks[start : start + _TASKS]]
                    part = f"-part-{start // _TASKS + 1}" if len(tasks) > _TASKS else ""
                    found.append(_table(
                        mine, order, columns, f"{name}-{protocol}{asked}-{ratio:g}{part}",
                        f"{what} with {ratio:g} of the cache entries removed", about, is_difference,
                    ))
    return list(_with_own_names([*found, *_speed_tables(rows)]))


def is_wide(table: Table) -> bool:
    """Whether a table takes both columns of a page."""
    lines = [[cell.text for cell in row] for row in table.rows]
    heads = [max(column.split("\n"), key=len) for column in table.columns]
    return sum(max(map(len, column)) for column in zip(heads, *lines, strict=True)) > _LETTERS


def _table(
    rows: Sequence[Row], order: Sequence[str], columns: Sequence[Place], name: str, title: str, about: str,
    is_difference: bool,
) -> Table:
    at = {(row.name, (row.task, length_of(row), row.ratio_asked)): row for row in rows}
    controls = [name for name in CONTROLS if any(row.name == name for row in rows)]
    methods = [name for name in order if any(row.name == name for row in rows)]
    lines: list[tuple[TableCell, ...]] = []
    chosen = {
        (name, place): row for name in (*controls, *methods) for place in columns
        if (row := at.get((name, place)) or at.get((name, (*place[:2], None)))) is not None
    }
    for method in (*controls, *methods):
        if is_difference and all(row.delta is None for (name, _), row in chosen.items() if name == method):
            continue
        cells = [_cell(chosen, method, place, methods, is_difference) for place in columns]
        if any(cell.sort is not None for cell in cells):
            lines.append((TableCell(method, method), *cells))
    used = list(chosen.values())
    several = len({place[:2] for place in columns}) > 1
    heads = tuple(_broken(place[0]) if several else "-" if place[2] is None else f"{place[2]:g}" for place in columns)
    lengths = sorted({length for _, length, _ in columns if length is not None})
    counts = sorted({row.n for row in used})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    floor = UNDER_FLOOR if any(row.params.get("under_floor") for row in used) else ""
    remarks = "".join(f" {remark}" for remark in (floor, reading_note(used), removal_note(used)) if remark)
    note = (
        f"± half of the {100 * LEVEL:g} % interval; * differs from the full cache (paired test, Holm-adjusted "
        f"p < {SIGNIFICANT:g}). Bold: the best value of a column, which need not differ from the next.{remarks}"
    )
    length = f", length {', '.join(map(str, lengths))}" if several and lengths else ""
    return Table(
        slug(name), f"{title[0].upper()}{title[1:]} ({about}{length}, {many} {used[0].unit}s per task)",
        ("method", *heads), tuple(lines), (note, *dict.fromkeys(row.signature for row in used)),
    )


def _cell(
    chosen: dict[tuple[str, Place], Row], method: str, place: Place, methods: Sequence[str], is_difference: bool
) -> TableCell:
    row = chosen.get((method, place))
    value = None if row is None else row.delta if is_difference else row.value
    if row is None or value is None:
        return TableCell("-")
    rivals = [chosen[name, place].value for name in methods if (name, place) in chosen]
    present = [rival for rival in rivals if rival is not None]
    best = {"low": min, "high": max}.get(SHOWN[row.metric].better or "")
    is_best = method in methods and len(set(present)) > 1 and best is not None and not row.params.get("under_floor")
    return TableCell(
        _text(row, is_difference), value, is_best and best is not None and row.value == best(present)
    )


def _text(row: Row, is_difference: bool = False) -> str:
    """A value, or the difference, with half of its interval, and a star if the difference is significant."""
    shown, value, ends = SHOWN[row.metric], row.value, (row.ci_low, row.ci_high)
    if is_difference:
        value, ends = row.delta, (row.delta_ci_low, row.delta_ci_high)
    text = f"{shown.scale * (value or 0.0):{'+' if is_difference else ''}.{shown.digits}f}"
    if ends[0] is not None and ends[1] is not None:
        text += f" ±{shown.scale * (ends[1] - ends[0]) / 2:.{shown.digits}f}"
    return f"{text}*" if row.p_value is not None and row.p_value < SIGNIFICANT else text


def _speed_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table of time and memory for each model and length, at its largest batch."""
    usual = [row for row in rows if row.protocol == "profile" and row.params["bin"] is None and row.value is not None]
    usual = [row for row in usual if row.metric in _SPEED and row.params["seq_len"] and row.params["batch_size"]]
    for model, length in dict.fromkeys((row.model, row.params["seq_len"]) for row in usual):
        mine = [row for row in usual if (row.model, row.params["seq_len"]) == (model, length)]
        batch = max(row.params["batch_size"] for row in mine)
        at = {(row.name, row.ratio_asked, row.metric): row for row in mine if row.params["batch_size"] == batch}
        shown = [metric for metric in _SPEED if any(key[2] == metric for key in at)]
        lines = tuple(
            (TableCell(name), TableCell("-" if ratio is None else f"{ratio:g}"), *(
                TableCell("-") if (row := at.get((name, ratio, metric))) is None else TableCell(_text(row), row.value)
                for metric in shown
            )) for name, ratio in dict.fromkeys(key[:2] for key in at)
        )
        note = (
            "± half of the interval in which the median of another such run will lie; * differs from the faster full "
            f"cache (paired requests, Holm-adjusted p < {SIGNIFICANT:g})."
        )
        yield Table(
            slug(f"speed-{model}-{length}"),
            f"Time and memory with prompts of {length} tokens in batches of {batch} ({model}, {mine[0].n} requests)",
            ("method", "removed", *(SHOWN[metric].heading for metric in shown)), lines, (note,),
        )


def _broken(task: str) -> str:
    """The name of a task as a heading, broken at hyphens into lines."""
    lines = [""]
    for part in task.replace("-", "-\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > _HEADING:
            lines.append(part)
        else:
            lines[-1] += part
    return "\n".join(lines)


def _with_own_names(tables: Sequence[Table]) -> Iterator[Table]:
    taken = set[str]()
    for table in tables:
        named = renamed(table, taken)
        taken.add(named.name)
        yield named
