"""Tables for the terminal: values with their intervals, and ratios as requested and as realised."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvbench.metrics import SHOWN
from kvbench.parsing import bytes_of
from kvbench.reporting.best import unranked
from kvbench.reporting.tables.bins import bin_tables
from kvbench.reporting.tables.compact import COMPACT_WIDTH, compact_tables, main_metric
from kvbench.reporting.tables.format import (
    WIDTH,
    as_rich,
    asked_of,
    by_setting,
    cells_of,
    delta_of,
    new_table,
    number_of,
    p_of,
    reading_note,
    removal_note,
    style_of,
    value_of,
)
from kvbench.reporting.tables.largest_ratio import largest_ratio_tables
from kvbench.reporting.tables.profile import compact_profile, profile_tables
from kvbench.reporting.tables.survival import survival_tables
from kvbench.reporting.tables.texts import text_tables
from kvbench.store.faults import faults_in
from kvbench.store.records import WRITING
from kvbench.store.rows import Results, Row


def print_results(
    results: Results, console: Console, folder: Path | None = None, wide: bool = False, told: Container[str] = (),
) -> None:
    """Print the tables of a run, its failures, and the path of its folder.

    Args:
        wide: print all that is known, with intervals, in tables of up to 140 columns, instead of a line for each cell.
        told: sentences about what was left out that the command has printed already.
    """
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH if wide else COMPACT_WIDTH)
    for rows in by_setting(results.rows).values():
        if wide:
            console.print(task_tables(rows))
        elif rows[0].protocol == "profile":
            console.print(*compact_profile(rows), sep="\n")
        else:
            console.print(compact_tables(rows))
    kinds = {row.protocol == "profile" for row in results.rows}
    for is_profile in () if wide else sorted(kinds):
        console.print(Text(_COMPACT_PROFILE if is_profile else _COMPACT, style="dim"))
    for sentence in faults_in((row.method, row.params) for row in results.rows):
        console.print(Text(sentence, style="yellow"))
    left_out = dict.fromkeys(failure.sentence for failure in results.failures if failure.left_out)
    for sentence in left_out:  # once, whatever the number of seeds
        if sentence not in told:
            console.print(Text(sentence, style="dim"))
    for failure in results.failures:
        if not failure.left_out:
            console.print(Text(failure.sentence, style="yellow" if failure.incomplete else "red"))
    if folder is not None:
        console.print(Text(f"run folder: {folder}"), soft_wrap=True)


_COMPACT = (
    "±: half of the 95 % interval. *: differs from the full cache (paired test, Holm-adjusted p < .05). "
    "removed: asked, and realised if that differs. All columns, intervals, bins and settings: --wide."
)

_COMPACT_PROFILE = (
    "±: half of the interval in which the median of another such run will lie. speed-up: over the faster full cache, "
    "in paired requests. bytes predict: from the weights and live entries that a step must read. Times of each phase, "
    "memory and settings: --wide."
)


def task_tables(rows: list[Row]) -> Group:
    """The main table of a task, and those of bins, of evidence, and of ratios without loss that there are rows of."""
    if rows[0].protocol == "profile":
        return Group(*profile_tables(rows))
    whole = [r for r in rows if r.params.get("bin") is None]
    if whole and whole[0].protocol in WRITING:
        return Group(*text_tables(rows), Text(""))
    names = {r.metric for r in whole}
    table = next((make(whole) for metric, make in _TABLES.items() if metric in names), None) or _lm_table(whole)
    parts: list[Table | Text] = [table, Text(_caption(whole), style="dim")]
    why = unranked(whole, main_metric(whole)) if whole else ""
    if why:
        parts.append(Text(why, style="yellow"))
    parts += map(as_rich, bin_tables(rows, ""))
    for noted in (*survival_tables(rows, ""), *largest_ratio_tables(rows, "")):
        parts += [as_rich(noted), Text("\n".join(noted.notes), style="dim")]
    return Group(*parts, Text(""))


def _lm_table(rows: list[Row]) -> Table:
    table = new_table(rows[0], "perplexity")
    for name in ("ppl\n[95 % CI]", "diff to full\n[95 % CI]", "p", "recovery", "KL"):
        table.add_column(name, justify="right")
    _memory_columns(table)
    for (method, _), metrics in cells_of(rows).items():
        ppl = metrics["ppl"]
        table.add_row(
            *_head(method, ppl), value_of(ppl), delta_of(ppl), p_of(ppl),
            *(_plain(metrics.get(name)) for name in ("recovery", "kl")), *_memory(metrics),
            style=style_of(method),
        )
    return table


def _recall_table(rows: list[Row]) -> Table:
    table = new_table(rows[0], "recall of a stated number")
    for name in ("accuracy\n[95 % CI]", "diff to full\n[95 % CI]", "p", "nll of answer\n[95 % CI]"):
        table.add_column(name, justify="right")
    _memory_columns(table)
    for (method, _), metrics in cells_of(rows).items():
        accuracy = metrics["accuracy"]
        table.add_row(
            *_head(method, accuracy), value_of(accuracy), delta_of(accuracy), p_of(accuracy),
            value_of(metrics["answer_nll"]), *_memory(metrics), style=style_of(method),
        )
    return table


def _answer_table(rows: list[Row]) -> Table:
    table = new_table(rows[0], "accuracy of the answers")
    more = {"evidence_survival": "evidence\nheld", "answer_length": "length"}
    more = {name: heading for name, heading in more.items() if any(row.metric == name for row in rows)}
    for name in ("accuracy\n[95 % CI]", "diff to full\n[95 % CI]", "p", "lost\n[95 % CI]", *more.values()):
        table.add_column(name, justify="right")
    _memory_columns(table)
    for (method, _), metrics in cells_of(rows).items():
        accuracy, lost = metrics["answer_accuracy"], metrics.get("negative_share")
        table.add_row(
            *_head(method, accuracy), value_of(accuracy), delta_of(accuracy), p_of(accuracy),
            "-" if lost is None else value_of(lost),
            *(_plain(metrics.get(name)) for name in more), *_memory(metrics), style=style_of(method),
        )
    return table


_TABLES: dict[str, Callable[[list[Row]], Table]] = {"answer_nll": _recall_table, "answer_accuracy": _answer_table}
"""Tables of tasks that ask questions, by a metric that only they have."""

def _memory_columns(table: Table) -> None:
    for name in ("peak\nentries", "KV held\n(of full)", "removal"):
        table.add_column(name, justify="right")


def _head(method: str, row: Row) -> tuple[str, str, str, str]:
    return method, asked_of(row), number_of(row.ratio_realised, 3), number_of(row.ratio_mean, 3)


def _memory(metrics: dict[str, Row]) -> tuple[str, str, str]:
    if "kv_bytes_physical" not in metrics:
        return "-", "-", next(iter(metrics.values())).removal
    physical, full = metrics["kv_bytes_physical"], metrics["kv_bytes_full"]
    held = bytes_of(physical.value)
    if physical.value is not None and full.value:
        held += f"\n({100 * physical.value / full.value:.1f} %)"
    return str(physical.entries_peak), held, physical.removal


def _caption(rows: list[Row]) -> str:
    note = "\n".join(note for note in (reading_note(rows), removal_note(rows)) if note)
    return (
        "removed: asked; realised when a sequence has been read; mean over the scored queries. "
        "KV held: distinct storages alive then.\np: paired sign-flip test against full, Holm-adjusted. "
        + (f"{note}\n" if note else "") + rows[0].signature.partition(":")[2]
    )


def _plain(row: Row | None) -> str:
    return "-" if row is None else number_of(row.value, SHOWN[row.metric].digits)
