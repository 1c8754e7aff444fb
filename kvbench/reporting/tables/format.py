"""Formats rows as cells of a table: values with their intervals, ratios, p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from kvbench.metrics import SHOWN
from kvbench.parsing import bytes_of
from kvbench.reporting.tables.plain import Table as Plain
from kvbench.reporting.tables.plain import TableCell
from kvbench.statistics import SIGNIFICANT
from kvbench.store.faults import named
from kvbench.store.rows import Row

WIDTH = 140
"""Width of tables, in characters, if the output is not a terminal."""

_ROLE_ORDER = ("human", "full", "adapted", "none")
CONTROLS = ("human", "full", "full-again", "full-dynamic", "adapted", "none")
"""Methods that the others are compared with, or that bound them."""


def is_control(name: str) -> bool:
    """Whether the others are compared with a method, or bounded by it; also with its adapter's name behind it."""
    return name.partition(":")[0] in CONTROLS


Key = tuple[str, float | None]
"""Name of a method as shown, and requested ratio."""

UNVERIFIED = "unverified"
"""``removal`` of rows whose removal nobody has measured."""


def name_of(row: Row) -> str:
    return named(row.method, row.params)


def by_setting(rows: Sequence[Row]) -> dict[tuple[str, str, str, int], list[Row]]:
    """Group rows by (task and question, protocol, model, seed), which are compared in one table or panel."""
    found: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((task_of(row), row.protocol, row.model, row.seed), []).append(row)
    return found


def task_of(row: Row) -> str:
    """The task, with the length of its contexts and the question if it has them: ``needles, length 1024``, or ``recall,
    question known``."""
    length, question = length_of(row), row.params.get("question")
    task = with_documents(row) if length is None else f"{with_documents(row)}, length {length}"
    return task if question is None else f"{task}, question {question}"


def with_documents(row: Row) -> str:
    """The task, with its number of documents where runs over others are reported as well: ``books (8 documents)``."""
    documents = row.params.get("documents")
    return row.task if documents is None else f"{row.task} ({documents})"


def length_of(row: Row) -> int | None:
    """Tokens of the contexts of a task that asks questions; None for other tasks."""
    length: int | None = row.params.get("context_length")
    return length


def reading_note(rows: Sequence[Row]) -> str:
    """Note on how the prefix was read, if methods in one table read it in different ways; empty otherwise."""
    once = {row.name for row in rows if row.params.get("prefill") == "once"}
    masked = {row.name for row in rows if "prefill" not in row.params} - set(_ROLE_ORDER)
    if rows[0].protocol not in ("prefix", "generate") or not once or not masked:
        return ""
    layouts, policies = (", ".join(sorted(names)) for names in (masked, once))
    return (
        f"Layouts ({layouts}) read the prefix under their mask; policies ({policies}) read it whole and are cut once."
    )


def removal_note(rows: Sequence[Row]) -> str:
    """Note on cells that another program measured; empty if there are none."""
    if all(row.removal != UNVERIFIED for row in rows):
        return ""
    return (
        f"{UNVERIFIED}: answered by another program; the ratio is what was asked of it. What it removed, and bytes, "
        "were not measured."
    )


def cells_of(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Group rows by (method, ratio), then metric: without a ratio first, then by ratio; controls before other
    methods."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((name_of(row), row.ratio_asked), {})[row.metric] = row

    def order(key: Key) -> tuple[float, int]:
        method, ratio = key
        place = _ROLE_ORDER.index(method) if method in _ROLE_ORDER else len(_ROLE_ORDER)
        return (ratio if ratio is not None else -1.0, place)

    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def new_table(row: Row, what: str, removed: tuple[str, ...] = ("asked", "realised", "mean")) -> Table:
    table = Table(
        title=f"{task_of(row)}: {what}  ({row.model}, {row.protocol}, seed {row.seed}, {row.n} documents in "
        f"{row.groups} groups)",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for place, name in enumerate(removed):
        table.add_column(f"{'' if place else 'removed:'}\n{name}", justify="right")
    return table


def as_rich(table: Plain) -> Table:
    """A table for the terminal, without its notes; intervals stand below their values."""
    found = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(table.columns):
        found.add_column(column, justify="right" if place else "left", no_wrap=not place)
    for row in table.rows:
        found.add_row(*(cell.text.replace(" [", "\n[") for cell in row), style=style_of(row[0].text))
    return found


def style_of(method: str) -> str:
    return "dim" if method in _ROLE_ORDER else ""


def value_of(row: Row, more: int = 0) -> str:
    """Format a value with its interval.

    Args:
        more: number of decimals beyond those that the metric is usually shown with.
    """
    digits = SHOWN[row.metric].digits + more
    if row.value is None:
        return "n/a"
    if row.ci_low is None or row.ci_high is None:
        return f"{row.value:.{digits}f}"
    return f"{row.value:.{digits}f}\n[{row.ci_low:.{digits}f}, {row.ci_high:.{digits}f}]"


def delta_of(row: Row, more: int = 0) -> str:
    """Format the difference to the baseline with its interval; see :func:`value_of`."""
    digits = SHOWN[row.metric].digits + more
    if row.delta is None:
        return "-"
    if row.delta_ci_low is None or row.delta_ci_high is None:
        return f"{row.delta:+.{digits}f}"
    return f"{row.delta:+.{digits}f}\n[{row.delta_ci_low:+.{digits}f}, {row.delta_ci_high:+.{digits}f}]"


def entry_of(row: Row | None, is_best: bool = False) -> TableCell:
    """A cell with a value, its interval, and a star where it differs significantly from the baseline."""
    if row is None or row.value is None:
        return TableCell("-")
    scale, digits = SHOWN[row.metric].scale, SHOWN[row.metric].digits
    value = scale * row.value
    mark = "*" if row.p_value is not None and row.p_value < SIGNIFICANT else ""
    text = f"{value:.{digits}f}{mark}"
    if row.ci_low is not None and row.ci_high is not None:
        text += f" [{scale * row.ci_low:.{digits}f}, {scale * row.ci_high:.{digits}f}]"
    return TableCell(text, value, is_best)


def held_of(metrics: Mapping[str, Row], with_bytes: bool = True) -> str:
    """Format the bytes that the cache holds, after their share of the full cache's; or the share alone."""
    physical, full = metrics.get("kv_bytes_physical"), metrics.get("kv_bytes_full")
    if physical is None or physical.value is None:
        return "-"
    share = f"{100 * physical.value / full.value:.0f} % " if full is not None and full.value else ""
    return f"{share}{bytes_of(physical.value):>9}" if with_bytes or not share else share.strip()


def p_of(row: Row) -> str:
    if row.p_value is None:
        return "-"
    return "<.001" if row.p_value < 0.001 else f"{row.p_value:.3f}".lstrip("0")


def asked_of(row: Row) -> str:
    """Format what was requested: a ratio, or a budget."""
    if row.params.get("budget_tokens"):
        return f"{row.params['budget_tokens']} kept"
    if row.params.get("budget_bytes"):
        return bytes_of(float(row.params["budget_bytes"]))
    return number_of(row.ratio_asked, None)


def number_of(value: float | None, digits: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"
