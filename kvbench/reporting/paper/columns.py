"""Tables of a paper: a line for each method, a column for each ratio of a task, or for each of several tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvbench.metrics import SHOWN
from kvbench.reporting.best import removed_of, unranked
from kvbench.reporting.paper.selection import comparisons, is_paired
from kvbench.reporting.paper.widths import PAGE, width_of
from kvbench.reporting.tables.format import CONTROLS, length_of, reading_note, removal_note, with_documents
from kvbench.reporting.tables.latex import slug
from kvbench.reporting.tables.plain import Table, TableCell
from kvbench.reporting.tables.tables import renamed
from kvbench.statistics import LEVEL, SIGNIFICANT
from kvbench.store.rows import Row

_TASKS = 6
"""Largest number of tasks in a table."""
_HEADING = 12
_APART = 0.02
"""Difference between what was asked for and what was removed from which on tables say it."""

_SPEED = ("ttft_s", "tpot_s", "decode_tok_s", "decode_speedup", "decode_peak_bytes")

_DASH = "-"

Place = tuple[str, int | None, float | None]
"""Task, length of its contexts and ratio; a column is one of them."""


@dataclass(frozen=True)
class _Plan:
    """What the tables of one comparison share; ``columns`` are shared among several of them if they are too wide."""

    rows: Sequence[Row]
    order: Sequence[str]
    columns: Sequence[Place]
    name: str
    title: str
    about: str
    is_difference: bool


def paper_tables(rows: Sequence[Row], order: Sequence[str], metrics: Sequence[str] = ()) -> list[Table]:
    """All tables, with their methods in the given order."""
    found: list[Table] = []
    columns: list[Place]
    for (protocol, metric, model, seed, question), mine in comparisons(rows, metrics).items():
        tasks = list(dict.fromkeys((with_documents(row), length_of(row)) for row in mine))
        ratios = sorted({row.ratio_asked for row in mine if row.ratio_asked is not None})
        asked = "" if question is None else f", question {question}"
        about = f"{model}, protocol {protocol}{asked}, seed {seed}"
        for is_difference in (False, True) if is_paired(metric) else (False,):
            what = f"{SHOWN[metric].axis}{' above that of the full cache' if is_difference else ''}"
            name = f"{metric}{'-above-full' if is_difference else ''}"
            if len(tasks) == 1 or not ratios:
                for task, length in tasks:
                    by = ", by share of the cache to be removed" if ratios else ""
                    title = f"{what} on {task}{'' if length is None else f', length {length}'}{by}"
                    columns = [(task, length, ratio) for ratio in (*ratios,) or (None,)]
                    found += _tables(_Plan(mine, order, columns, f"{name}-{task}{asked}", title, about, is_difference))
                continue
            for ratio in ratios:
                title = f"{what} with {ratio:g} of the cache to be removed"
                columns = [(task, length, ratio) for task, length in tasks]
                full_name = f"{name}-{protocol}{asked}-{ratio:g}"
                found += _tables(_Plan(mine, order, columns, full_name, title, about, is_difference))
    return list(_with_own_names([*found, *_speed_tables(rows)]))


def _tables(plan: _Plan) -> list[Table]:
    """The fewest tables with at most ``_TASKS`` tasks each that fit a page."""
    columns, most = plan.columns, _TASKS if len({place[:2] for place in plan.columns}) > 1 else len(plan.columns)
    for count in range(-(-len(columns) // most), len(columns) + 1):
        size = -(-len(columns) // count)
        parts = [columns[start : start + size] for start in range(0, len(columns), size)]
        named = [f"-part-{number}" if len(parts) > 1 else "" for number in range(1, len(parts) + 1)]
        tables = [_table(plan, part, f"{plan.name}{name}") for part, name in zip(parts, named, strict=True)]
        if all(width_of(table) <= PAGE for table in tables):
            break
    return tables


def _table(plan: _Plan, columns: Sequence[Place], name: str) -> Table:
    rows = plan.rows
    at = {(row.name, (with_documents(row), length_of(row), row.ratio_asked)): row for row in rows}
    controls = [name for name in CONTROLS if any(row.name == name for row in rows)]
    methods = [name for name in plan.order if any(row.name == name for row in rows)]
    chosen = {
        (name, place): row for name in (*controls, *methods) for place in columns
        if (row := at.get((name, place)) or at.get((name, (*place[:2], None)))) is not None
    }
    several = len({place[:2] for place in plan.columns}) > 1
    is_apart = any(
        abs(removed - (place[2] or 0.0)) > _APART for (name, place), row in chosen.items()
        if name in methods and (removed := removed_of(row)) is not None
    )
    what = "mean" if any(row.ratio_mean is not None for row in chosen.values()) else "realised"
    said = {place: _removed_cell([chosen[name, place] for name in methods if (name, place) in chosen]).text
            for place in columns}
    is_shared = not several and not any(" to " in text for text in said.values())  # then a heading can say it
    lines: list[tuple[TableCell, ...]] = []
    for method in (*controls, *methods):
        if plan.is_difference and all(row.delta is None for (name, _), row in chosen.items() if name == method):
            continue
        cells = [_cell(chosen, method, place, methods, plan.is_difference) for place in columns]
        if all(cell.sort is None for cell in cells):
            continue
        mine = [[row] if (row := chosen.get((method, place))) is not None else [] for place in columns]
        if is_apart and several:
            cells.insert(0, _removed_cell([row for rows in mine for row in rows]))
        elif is_apart and not is_shared:
            cells = [each for cell, rows in zip(cells, mine, strict=True) for each in (cell, _removed_cell(rows))]
        lines.append((TableCell(method, method), *cells))
    used = list(chosen.values())
    heads = [_head(place, used[0].metric, several) for place in columns]
    if is_apart and several:
        heads.insert(0, what)
    elif is_apart and is_shared:
        heads = [f"{head}\n{what} {said[place]}" for place, head in zip(columns, heads, strict=True)]
    elif is_apart:
        heads = [each for head in heads for each in (head, what)]
    return Table(
        slug(name), _title(plan, columns, used, several), ("method", *heads), tuple(lines),
        (_note(used, lines, what if is_apart else ""), *dict.fromkeys(row.signature for row in used)),
    )


def _head(place: Place, metric: str, several: bool) -> str:
    task, _, ratio = place
    return _broken(task) if several else SHOWN[metric].heading if ratio is None else f"{ratio:g}"


def _title(plan: _Plan, columns: Sequence[Place], used: Sequence[Row], several: bool) -> str:
    lengths = sorted({length for _, length, _ in columns if length is not None})
    length = f", length {', '.join(map(str, lengths))}" if several and lengths else ""
    counts = sorted({row.n for row in used})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{plan.title[0].upper()}{plan.title[1:]} ({plan.about}{length}, {many} {used[0].unit}s per task)"


def _note(used: Sequence[Row], lines: Sequence[Sequence[TableCell]], removed: str) -> str:
    """What the marks of a table mean, those that occur.

    Args:
        removed: heading of the columns that say what was removed; empty if there are none.
    """
    when = "on average over the predicted tokens" if removed == "mean" else "when the context has been read"
    remarks = [
        f"± half of the {100 * LEVEL:g} % interval; * differs from the full cache (paired test, Holm-adjusted "
        f"p < {SIGNIFICANT:g}). Bold: the best value of a column, which need not differ from the next.",
        f"{removed.capitalize()}: the share of the cache that was removed {when}; methods that fill their budget "
        "differently differ in it although the same was asked of them." if removed else "",
        _dash_note(lines, "not measured"),
        *dict.fromkeys(unranked(_of_task(used, row), row.metric) for row in used), reading_note(used),
        removal_note(used),
    ]
    return " ".join(filter(None, remarks))


def _of_task(rows: Iterable[Row], one: Row) -> list[Row]:
    return [row for row in rows if (with_documents(row), length_of(row)) == (with_documents(one), length_of(one))]


def _dash_note(lines: Sequence[Sequence[TableCell]], what: str) -> str:
    return f"A dash: {what}." if any(cell.text == _DASH for line in lines for cell in line) else ""


def _removed_cell(rows: Sequence[Row]) -> TableCell:
    """The share that was removed, or the least and the most of several."""
    found = sorted(f"{share:.2f}" for row in rows if (share := removed_of(row)) is not None)
    return TableCell(_DASH if not found else found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}")


def _cell(
    chosen: dict[tuple[str, Place], Row], method: str, place: Place, methods: Sequence[str], is_difference: bool
) -> TableCell:
    row = chosen.get((method, place))
    value = None if row is None else row.delta if is_difference else row.value
    if row is None or value is None:
        return TableCell(_DASH)
    rivals = [chosen[name, place].value for name in methods if (name, place) in chosen]
    present = [rival for rival in rivals if rival is not None]
    best = {"low": min, "high": max}.get(SHOWN[row.metric].better or "")
    is_ranked = not unranked(_of_task(chosen.values(), row), row.metric)
    is_best = method in methods and len(set(present)) > 1 and best is not None and is_ranked
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
        text += f"±{shown.scale * (ends[1] - ends[0]) / 2:.{shown.digits}f}"
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
            (TableCell(name), TableCell(_DASH if ratio is None else f"{ratio:g}"), *(
                TableCell(_DASH) if (row := at.get((name, ratio, metric))) is None else TableCell(_text(row), row.value)
                for metric in shown
            )) for name, ratio in dict.fromkeys(key[:2] for key in at)
        )
        note = (
            "± half of the interval in which the median of another such run will lie; * differs from the faster full "
            f"cache (paired requests, Holm-adjusted p < {SIGNIFICANT:g}). "
            f"{_dash_note(lines, 'does not apply, or was not measured')}".strip()
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
