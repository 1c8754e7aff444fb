"""Tables for people, in the terminal: every value with its interval, every ratio as realised."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvbench.store.records import Results, Row

WIDTH = 140
"""Width of tables where the output is not a terminal."""

_BINS = {"distance": "distance in tokens", "step": "time step (chunks in memory)"}
_ROLE_ORDER = ("full", "adapted", "none")


def print_results(results: Results, console: Console, folder: Path | None = None) -> None:
    """All tables of a run, its failures, and where it lies."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    for task in dict.fromkeys(row.task for row in results.rows):
        for protocol in dict.fromkeys(row.protocol for row in results.rows if row.task == task):
            rows = [r for r in results.rows if r.task == task and r.protocol == protocol]
            console.print(task_tables(rows))
    for failure in results.failures:
        console.print(Text(f"failed: {failure.error} {failure.hint}".strip(), style="red"))
    if folder is not None:
        console.print(Text(f"run folder: {folder}"), soft_wrap=True)


def task_tables(rows: list[Row]) -> Group:
    """The main table of a task, and one by distance where there are bins."""
    whole = [r for r in rows if r.params.get("bin") is None]
    names = {r.metric for r in whole}
    table = _recall_table(whole) if "answer_nll" in names else _lm_table(whole)
    parts: list[Table | Text] = [table, Text(_caption(whole[0]), style="dim")]
    for metric, label in (("ppl", "perplexity"), ("accuracy", "accuracy")):
        binned = [r for r in rows if r.metric == metric and r.params.get("bin")]
        if binned:
            parts.append(_bin_table(binned, label))
    return Group(*parts, Text(""))


Key = tuple[str, float | None]


def _cells(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Rows by (method, ratio), controls first, in the order of the plan."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.ratio_asked), {})[row.metric] = row

    def order(key: Key) -> tuple[float, int]:
        method, ratio = key
        place = _ROLE_ORDER.index(method) if method in _ROLE_ORDER else len(_ROLE_ORDER)
        return (ratio if ratio is not None else -1.0, place)

    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def _lm_table(rows: list[Row]) -> Table:
    table = _new_table(rows[0], "perplexity")
    for name in ("ppl\n[95 % CI]", "diff to full\n[95 % CI]", "p", "recovery", "KL"):
        table.add_column(name, justify="right")
    _memory_columns(table)
    for (method, ratio), metrics in _cells(rows).items():
        ppl = metrics["ppl"]
        table.add_row(
            *_head(method, ratio, ppl), _value(ppl, 2), _delta(ppl, 2), _p(ppl),
            _plain(metrics.get("recovery"), 2), _plain(metrics.get("kl"), 3), *_memory(metrics),
            style=_style(method),
        )
    return table


def _recall_table(rows: list[Row]) -> Table:
    table = _new_table(rows[0], "recall of a stated number")
    for name in ("accuracy\n[95 % CI]", "diff to full\n[95 % CI]", "p", "nll of answer\n[95 % CI]"):
        table.add_column(name, justify="right")
    _memory_columns(table)
    for (method, ratio), metrics in _cells(rows).items():
        accuracy = metrics["accuracy"]
        table.add_row(
            *_head(method, ratio, accuracy), _value(accuracy, 2), _delta(accuracy, 2), _p(accuracy),
            _value(metrics["answer_nll"], 2), *_memory(metrics), style=_style(method),
        )
    return table


def _bin_table(rows: list[Row], what: str) -> Table:
    """A metric by distance in tokens, or by time step."""
    bins = list(dict.fromkeys(str(r.params["bin"]) for r in rows if r.params.get("bin")))
    label = bins[0].partition("=")[0]
    table = Table(
        title=f"{what} by {_BINS.get(label, label)} [95 % CI]", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("asked", justify="right")
    for name in bins:
        table.add_column(name.partition("=")[2], justify="right")
    for (method, ratio), _ in _cells(rows).items():
        mine = {r.params["bin"]: r for r in rows if (r.method, r.ratio_asked) == (method, ratio)}
        cells = [_value(mine[name], 2) if name in mine else "-" for name in bins]
        table.add_row(method, _number(ratio, None), *cells, style=_style(method))
    return table


def _new_table(row: Row, what: str) -> Table:
    table = Table(
        title=f"{row.task}: {what}  ({row.model}, {row.protocol}, {row.n} documents in {row.groups} groups)",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for name in ("removed:\nasked", "\nrealised", "\nmean"):
        table.add_column(name, justify="right")
    return table


def _memory_columns(table: Table) -> None:
    for name in ("peak\nentries", "KV held\n(of full)", "removal"):
        table.add_column(name, justify="right")


def _head(method: str, ratio: float | None, row: Row) -> tuple[str, str, str, str]:
    return method, _number(ratio, None), _number(row.ratio_realised, 3), _number(row.ratio_mean, 3)


def _memory(metrics: dict[str, Row]) -> tuple[str, str, str]:
    physical, full = metrics["kv_bytes_physical"], metrics["kv_bytes_full"]
    held = _bytes(physical.value)
    if physical.value is not None and full.value:
        held += f"\n({100 * physical.value / full.value:.1f} %)"
    return str(physical.entries_peak), held, physical.removal


def _style(method: str) -> str:
    return "dim" if method in _ROLE_ORDER else ""


def _caption(row: Row) -> str:
    return (
        "removed: asked; realised when a sequence has been read; mean over the scored queries. "
        "KV held: distinct storages alive then.\np: paired sign-flip test against full, Holm-adjusted. "
        f"{row.signature.partition(':')[2]}"
    )


def _value(row: Row, digits: int) -> str:
    if row.value is None:
        return "n/a"
    if row.ci_low is None or row.ci_high is None:
        return f"{row.value:.{digits}f}"
    return f"{row.value:.{digits}f}\n[{row.ci_low:.{digits}f}, {row.ci_high:.{digits}f}]"


def _delta(row: Row, digits: int) -> str:
    if row.delta is None:
        return "-"
    if row.delta_ci_low is None or row.delta_ci_high is None:
        return f"{row.delta:+.{digits}f}"
    return f"{row.delta:+.{digits}f}\n[{row.delta_ci_low:+.{digits}f}, {row.delta_ci_high:+.{digits}f}]"


def _p(row: Row) -> str:
    if row.p_value is None:
        return "-"
    return "<.001" if row.p_value < 0.001 else f"{row.p_value:.3f}".lstrip("0")


def _plain(row: Row | None, digits: int) -> str:
    return "-" if row is None else _number(row.value, digits)


def _number(value: float | None, digits: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
