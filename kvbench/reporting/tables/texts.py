"""Tables of generated text: fluency and overlap, meaning and diversity, degeneration."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from kvbench.metrics import SHOWN
from kvbench.metrics.base import DEGENERATION, FLUENCY, GREEDY, MEANING
from kvbench.parsing import bytes_of
from kvbench.reporting.tables.format import asked_of, cells_of, new_table, number_of, reading_note, style_of, value_of
from kvbench.reporting.tables.tables import columns_of
from kvbench.statistics import SIGNIFICANT
from kvbench.store.rows import Row

_TABLES = (FLUENCY, MEANING, DEGENERATION)
_BYTES = "kv_bytes_physical"


def text_tables(rows: list[Row]) -> list[Table | Text]:
    """The tables of a task that generates text, with an explanation of their numbers."""
    whole = [row for row in rows if row.params.get("bin") is None]
    greedy = [row for row in rows if row.params.get("bin") == "decode=greedy"]
    parts: list[Table | Text] = [
        _table(whole, title, (*columns_of(title), *((_BYTES,) if title == DEGENERATION else ()))) for title in _TABLES
    ]
    if greedy:
        parts.append(_table(greedy, GREEDY, columns_of(GREEDY)))
    return [*(part for part in parts if part is not None), Text(_caption(whole), style="dim")]


def _table(rows: list[Row], title: str, names: tuple[str, ...]) -> Table | Text:
    present = {row.metric for row in rows}
    names = tuple(name for name in names if name in present)
    if not names:
        return Text("")
    table = new_table(rows[0], title, ("asked", "realised"))
    for name in names:
        heading = "KV held\n(of full)" if name == _BYTES else f"{SHOWN[name].heading}\n[95 % CI]"
        table.add_column(heading, justify="right")
    for (method, _), metrics in cells_of(rows).items():
        first = next(iter(metrics.values()))
        cells = [_cell(name, metrics) for name in names]
        realised = number_of(first.ratio_realised, 3)
        table.add_row(method, asked_of(first), realised, *cells, style=style_of(method))
    return table


def _cell(name: str, metrics: dict[str, Row]) -> str:
    row = metrics.get(name)
    if row is None:
        return "-"
    if name == _BYTES:
        whole = metrics["kv_bytes_full"].value
        share = f"\n({100 * row.value / whole:.1f} %)" if row.value is not None and whole else ""
        return bytes_of(row.value) + share
    shown = value_of(row)
    value, line, interval = shown.partition("\n")
    mark = "*" if row.p_value is not None and row.p_value < SIGNIFICANT else ""
    return f"{value}{mark}{line}{interval}"


def _caption(rows: list[Row]) -> str:
    signature = rows[0].signature.partition(":")[2].partition("|v:")[0]
    when = "when the text has been written" if rows[0].protocol == "decode" else "when the prefix has been read"
    first = f"*: differs from full (paired, Holm-adjusted p < {SIGNIFICANT}). Realised: {when}."
    note = reading_note(rows)
    return "\n".join((first, *text_notes(rows), *([note] if note else ()), signature))


def text_notes(rows: list[Row]) -> list[str]:
    """What must be known to read metrics of written text."""
    scorer = rows[0].params.get("scorer")
    scorer = "the uncompressed model itself" if scorer == "itself" else scorer
    present, lines = {(row.name, row.metric) for row in rows}, []
    if any(metric == "gen_ppl" for _, metric in present):
        lines.append(f"gen ppl: under {scorer}, given the prefix; below the human value is not better.")
    if any(method == "human" for method, _ in present):
        ceiling = ", their MAUVE is that of what the authors wrote next (the ceiling)"
        lines.append(
            "human: the authors' own texts; their overlap and meaning are with another document's reference "
            f"(the floor){ceiling if ('human', 'mauve') in present else ''}."
        )
    few = next((row for row in rows if row.metric == "mauve" and "few texts" in row.signature), None)
    if few is not None:
        lines.append(f"MAUVE on {few.n} texts is optimistic and noisy (below 1000); its interval: over clusterings.")
    return lines
