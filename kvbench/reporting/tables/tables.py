"""Tables as plain data: what Markdown, CSV, LaTeX and the HTML page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvbench.reporting.tables.format import by_setting, cells_of, number_of, reading_note
from kvbench.store.faults import faults_in
from kvbench.store.records import Row
from kvbench.units import bytes_of

SIGNIFICANT = 0.05
_CONTROLS = ("human", "full", "full-again", "full-dynamic", "adapted", "none")


@dataclass(frozen=True)
class Entry:
    """One cell of a table.

    Attributes:
        sort: what it is sorted by; None sorts last.
        is_best: the best of its ratio, beyond the intervals.
    """

    text: str
    sort: float | str | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table with its title, its notes, and a name for files.

    Attributes:
        columns: headings.
        rows: as many entries as columns each.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A metric as a column.

    Attributes:
        better: ``low`` or ``high`` where one value is better than another; None where it is not.
        scale: values are multiplied by it.
    """

    metric: str
    heading: str
    digits: int = 2
    better: str | None = None
    scale: float = 1.0


_LM = (
    Column("ppl", "ppl", 2, "low"), Column("nll", "nll", 3, "low"), Column("bits_per_byte", "bits/byte", 3, "low"),
    Column("recovery", "recovery", 2, "high"), Column("kl", "KL", 3, "low"),
    Column("top1_agreement", "top-1", 3, "high"),
)
_RECALL = (Column("accuracy", "accuracy", 2, "high"), Column("answer_nll", "answer nll", 2, "low"))
_TEXT = (
    Column("gen_ppl", "gen ppl"), Column("bleu", "BLEU"), Column("chrf", "chrF"), Column("rouge1", "ROUGE-1", 3),
    Column("rougeL", "ROUGE-L", 3), Column("semantic", "semantic", 3), Column("prefix_coherence", "coherence", 3),
    Column("mauve", "MAUVE", 3), Column("diversity", "diversity", 3), Column("rep4", "rep-4", 3),
    Column("loop_share", "loops", 2), Column("prefix_match", "greedy match", 2),
)
_PROFILE = (
    Column("ttft_s", "first token s", 3, "low"), Column("prefill_tok_s", "prefill tok/s", 0, "high"),
    Column("tpot_s", "ms per token", 2, "low", 1e3), Column("decode_tok_s", "decode tok/s", 1, "high"),
    Column("decode_speedup", "speed-up", 2, "high"), Column("decode_speedup_predicted", "bytes predict", 2),
    Column("bandwidth_share", "of bandwidth", 2), Column("prefill_peak_bytes", "prefill peak MiB", 1, "low", 2**-20),
    Column("decode_peak_bytes", "decode peak MiB", 1, "low", 2**-20),
)
_MEMORY = "kv_bytes_physical"
_HEAD = ("method", "removed: asked", "realised")


def sheets_of(rows: Sequence[Row]) -> list[Sheet]:
    """One table for each task and protocol, and one for the greedy texts."""
    found: list[Sheet] = []
    for (title, protocol, _, _), mine in by_setting(rows).items():
        task = mine[0].task + ("-known" if mine[0].params.get("question") == "known" else "")
        if protocol == "profile":
            timed = [r for r in mine if r.params["batch_size"] and r.params["seq_len"]]
            found.append(_sheet(timed, task, "time and memory", _PROFILE, ("seq_len", "batch_size", "bin")))
            continue
        whole = [r for r in mine if r.params.get("bin") is None]
        kinds: tuple[Column, ...] = _LM
        if protocol == "generate" or _has(whole, "answer_nll"):
            kinds = _TEXT if protocol == "generate" else _RECALL
        elif _has(whole, "accuracy"):
            kinds = (*_LM, *_RECALL[:1])
        found.append(_sheet(whole, task, f"{protocol}", kinds, title=title))
        greedy = [r for r in mine if r.params.get("bin") == "decode=greedy"]
        if greedy:
            found.append(_sheet(greedy, f"{task}-greedy", "greedy texts", _TEXT))
    return [sheet for sheet in found if sheet.rows]


def _has(rows: Sequence[Row], metric: str) -> bool:
    return any(row.metric == metric for row in rows)


def _sheet(
    rows: Sequence[Row], name: str, what: str, columns: Sequence[Column], by: tuple[str, ...] = (), title: str = "",
) -> Sheet:
    shown = [column for column in columns if _has(rows, column.metric)]
    keys = list(dict.fromkeys(tuple(row.params.get(key) for key in by) for row in rows))
    by = tuple(key for i, key in enumerate(by) if any(k[i] is not None for k in keys))
    lines: list[tuple[Entry, ...]] = []
    for key in dict.fromkeys(tuple(row.params.get(k) for k in by) for row in rows):
        mine = [row for row in rows if tuple(row.params.get(k) for k in by) == key]
        lead = tuple(Entry("" if k is None else str(k), k) for k in key)
        cells = cells_of(mine)
        best = {column.metric: _best(cells, column) for column in shown}
        for (method, ratio), metrics in cells.items():
            first = next(iter(metrics.values()))
            values = tuple(
                _entry(metrics.get(c.metric), c, (method, ratio) in best[c.metric]) for c in shown
            )
            lines.append((
                *lead, Entry(method, method), Entry(number_of(ratio, None), ratio),
                Entry(number_of(first.ratio_realised, 3), first.ratio_realised), *values, _held(metrics),
            ))
    if not rows:
        return Sheet(name, what, (), (), ())
    head = tuple({"seq_len": "length", "batch_size": "batch"}.get(key, "") for key in by)
    one, faults = rows[0], faults_in((row.method, row.params) for row in rows)
    if one.protocol == "profile":
        notes: tuple[str, ...] = (
            f"* differs from the faster full cache (paired requests, Holm-adjusted p < {SIGNIFICANT}). Brackets: "
            "where the median of another such run will lie. Bold: best of its ratio, and its interval does not meet "
            "that of the next.", one.signature.partition(":")[2].partition("|P:")[0], *faults,
        )
        return Sheet(
            name, f"{name}: {what} ({one.model}, {one.n} requests in {one.groups} processes)",
            (*head, *_HEAD, *(c.heading for c in shown), "KV held"), tuple(lines), notes,
        )
    reading = reading_note(rows)
    notes = (
        f"* differs from full (paired, Holm-adjusted p < {SIGNIFICANT}). Bold: best of its ratio, and its interval "
        "does not meet that of the next.", *([reading] if reading else ()), one.signature.partition(":")[2],
        *faults,
    )
    return Sheet(
        name, f"{title or name}: {what} ({one.model}, seed {one.seed}, {one.n} {one.unit}s in {one.groups} groups)",
        (*head, *_HEAD, *(c.heading for c in shown), "KV held"), tuple(lines), notes,
    )


def _best(cells: dict[tuple[str, float | None], dict[str, Row]], column: Column) -> set[tuple[str, float | None]]:
    """The cells that are best at their ratio, where the interval of the next is apart."""
    if column.better is None:
        return set()
    sign = 1.0 if column.better == "low" else -1.0
    found = set()
    for ratio in {ratio for method, ratio in cells if ratio is not None}:
        rows = [
            (sign * row.value, key, row) for key, metrics in cells.items()
            if key[1] == ratio and key[0] not in _CONTROLS
            and (row := metrics.get(column.metric)) is not None and row.value is not None
        ]
        ordered = sorted(rows, key=lambda item: item[0])
        if len(ordered) > 1 and _apart(ordered[0][2], ordered[1][2], column.better):
            found.add(ordered[0][1])
    return found


def _apart(best: Row, next_: Row, better: str) -> bool:
    ends = (best.ci_high, next_.ci_low) if better == "low" else (next_.ci_high, best.ci_low)
    return ends[0] is not None and ends[1] is not None and ends[0] < ends[1]


def _entry(row: Row | None, column: Column, is_best: bool) -> Entry:
    if row is None or row.value is None:
        return Entry("-")
    value, digits = column.scale * row.value, column.digits
    mark = "*" if row.p_value is not None and row.p_value < SIGNIFICANT else ""
    text = f"{value:.{digits}f}{mark}"
    if row.ci_low is not None and row.ci_high is not None:
        text += f" [{column.scale * row.ci_low:.{digits}f}, {column.scale * row.ci_high:.{digits}f}]"
    return Entry(text, value, is_best)


def _held(metrics: dict[str, Row]) -> Entry:
    row = metrics.get(_MEMORY)
    return Entry("-") if row is None else Entry(bytes_of(row.value), row.value)


def renamed(sheet: Sheet, taken: set[str]) -> Sheet:
    """With a name that no other sheet has."""
    name, number = sheet.name, 2
    while name in taken:
        name, number = f"{sheet.name}-{number}", number + 1
    return replace(sheet, name=name)
