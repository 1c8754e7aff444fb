"""Tables of a comparison."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from kvbench.analysis.comparison import Pair
from kvbench.metrics import NEED_SCORER
from kvbench.reporting.tables.format import delta_of, p_of, task_of, value_of
from kvbench.statistics import SIGNIFICANT
from kvbench.store.rows import Row


def comparison_tables(pairs: list[Pair]) -> list[Table | Text]:
    """One table for each pair of cells on a task, and notes below them."""
    tables: list[Table | Text] = [_table(pair) for pair in pairs]
    left_out = {name for pair in pairs for name, _ in pair.first if name not in {row.metric for row in pair.rows}}
    if judged := [name for name in NEED_SCORER if name in left_out]:
        tables.append(Text(f"{', '.join(judged)}: left out, since different models have judged."))
    faults = dict.fromkeys(fault for pair in pairs for fault in pair.faults)
    return [*tables, *(Text(fault, style="yellow") for fault in faults), Text(
        "difference: second less first, paired by document [95 % CI]; p: Holm-adjusted within each metric over all "
        f"tables. yes: p < {SIGNIFICANT}; -: there is no test for this metric.", style="dim",
    )]


def _table(pair: Pair) -> Table:
    row = pair.rows[0]
    table = Table(
        title=f"{task_of(row)} ({row.protocol}, {row.n} documents in {row.groups} groups): {pair.names[0]} against "
        f"{pair.names[1]}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )
    table.add_column("metric", no_wrap=True)
    for name in ("first", "second", "difference", "p", "significant"):
        table.add_column(name, justify="right")
    for second in pair.rows:
        first = pair.first[second.metric, second.params.get("bin")]
        table.add_row(
            _name(second), *(_flat(value_of(r, 1)) for r in (first, second)), _flat(delta_of(second, 1)),
            p_of(second), _verdict(second),
        )
    return table


def _name(row: Row) -> str:
    place = row.params.get("bin")
    return row.metric if place is None else f"{row.metric} ({place})"


def _flat(text: str) -> str:
    return text.replace("\n", " ")


def _verdict(row: Row) -> str:
    if row.p_value is None:
        return "-"
    return "yes" if row.p_value < SIGNIFICANT else "no"
