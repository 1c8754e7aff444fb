"""Tables of a profile: time, memory, the largest batch, and remarks on them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from kvbench.parsing import bytes_of
from kvbench.reporting.tables.format import held_of, name_of, number_of
from kvbench.store.profile_records import AGAIN, FULL, STOCK
from kvbench.store.rows import Row

Key = tuple[int, int, str | None]
"""Length, batch size, and the memory budget that the batch size was searched for, if any."""

_DIM = (FULL, AGAIN, STOCK)


def profile_tables(rows: list[Row]) -> list[Table | Text]:
    """All tables and remarks printed for a profile."""
    timed = [r for r in rows if r.params["batch_size"] is not None and r.params["seq_len"] is not None]
    parts: list[Table | Text] = []
    if timed:
        parts += [_time_table(timed), _memory_table(timed)]
    if any(r.metric == "max_batch" for r in rows):
        parts.append(_largest_table(rows))
    return [*parts, Text("\n".join(_remarks(rows)), style="dim"), Text("")]


def compact_profile(rows: list[Row]) -> list[Table | Text]:
    """One table within 100 columns, and in words from where on there is a gain."""
    timed = [r for r in rows if r.params["batch_size"] is not None and r.params["seq_len"] is not None]
    parts: list[Table | Text] = [_compact_table(timed)] if timed else []
    if any(r.metric == "max_batch" for r in rows):
        parts.append(_largest_table(rows))
    return [*parts, Text("\n".join(_found(rows) + _warnings(rows))), Text("")]


def _compact_table(rows: list[Row]) -> Table:
    first = rows[0]
    table = Table(
        title=f"profile  ({first.model}, {first.params['new_tokens']} tokens written, n = {first.n})",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )
    table.add_column("length\nx batch", no_wrap=True)
    table.add_column("method", overflow="fold", min_width=12)
    for name in ("removed", "first\ntoken s", "decode\ntok/s", "speed-up", "bytes\npredict", "KV held"):
        table.add_column(name, justify="right", no_wrap=True)
    before: Key | None = None
    for (key, method, ratio), found in _cells(rows).items():
        if "tpot_s" not in found:
            continue
        table.add_row(
            _where(key) if key != before else "", method, number_of(ratio, None), _number(found, "ttft_s", 3),
            _number(found, "decode_tok_s", 1), _half(found.get("decode_speedup")),
            _number(found, "decode_speedup_predicted", 2), held_of(found),
            style="dim" if method in _DIM else "",
        )
        before = key
    return table


def _half(row: Row | None) -> str:
    """A value and half of its interval."""
    if row is None or row.value is None or row.ci_low is None or row.ci_high is None:
        return "-"
    return f"{row.value:.2f} ±{(row.ci_high - row.ci_low) / 2:.2f}"


def _cells(rows: Sequence[Row]) -> dict[tuple[Key, str, float | None], dict[str, Row]]:
    found: dict[tuple[Key, str, float | None], dict[str, Row]] = {}
    for row in rows:
        p = row.params
        key = (p["seq_len"] or 0, p["batch_size"] or 0, p["bin"])
        found.setdefault((key, name_of(row), row.ratio_asked), {})[row.metric] = row
    return found


def _new_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("length\nx batch", no_wrap=True)
    table.add_column("method", no_wrap=True)
    table.add_column("removed:\nasked", justify="right", no_wrap=True)
    table.add_column("\nrealised", justify="right", no_wrap=True)
    return table


def _time_table(rows: list[Row]) -> Table:
    first = rows[0]
    table = _new_table(f"profile: time  ({first.model}, {first.params['new_tokens']} tokens written, n = {first.n})")
    for name in ("first\ntoken s", "prefill\ntok/s", "compress\ns", "ms per token\n[95 %]", "decode\ntok/s",
                 "speed-up\n[95 %]", "bytes\npredict", "of copy\nspeed"):
        table.add_column(name, justify="right", no_wrap=True)
    before: Key | None = None
    for (key, method, ratio), found in _cells(rows).items():
        if "tpot_s" not in found:
            continue
        speedup = found.get("decode_speedup")
        table.add_row(
            _where(key) if key != before else "", method, number_of(ratio, None),
            number_of(found["tpot_s"].ratio_realised, 3), _number(found, "ttft_s", 3),
            _number(found, "prefill_tok_s", 0), _number(found, "compress_s", 3), _interval(found["tpot_s"], 1e3, 2),
            _number(found, "decode_tok_s", 1), _interval(speedup, 1, 2),
            _number(found, "decode_speedup_predicted", 2), _number(found, "bandwidth_share", 2),
            style="dim" if method in _DIM else "",
        )
        before = key
    return table


def _memory_table(rows: list[Row]) -> Table:
    table = _new_table("profile: memory  (a pass and a process of its own)")
    for name in ("weights", "prefill\n+ peak", "decode\n+ peak", "less than\nfull by", "KV held\n(of full)",
                 "physical\n/ logical", "process\npeak"):
        table.add_column(name, justify="right", no_wrap=True)
    cells, before = _cells(rows), None
    for (key, method, ratio), found in cells.items():
        if "decode_peak_bytes" not in found:
            continue
        full = [cells[key, name, None] for name in (FULL, STOCK) if (key, name, None) in cells]
        peaks = [f["decode_peak_bytes"].value or 0.0 for f in full if "decode_peak_bytes" in f]
        mine, share = found["decode_peak_bytes"].value or 0.0, "-"
        if peaks and method not in _DIM and min(peaks):
            share = f"{100 * (1 - mine / min(peaks)):.0f} %"
        table.add_row(
            _where(key) if key != before else "", method, number_of(ratio, None),
            number_of(found["decode_peak_bytes"].ratio_realised, 3), *(
                bytes_of(found[n].value) if n in found else "-"
                for n in ("weights_bytes", "prefill_peak_bytes", "decode_peak_bytes")
            ), share, _held(found), _physical(found), bytes_of(found["rss_peak_bytes"].value),
            style="dim" if method in _DIM else "",
        )
        before = key
    return table


def _largest_table(rows: list[Row]) -> Table:
    budget = next(r.params["memory_budget"] for r in rows if r.metric == "max_batch")
    table = Table(
        title=f"profile: the largest batch in {budget}, and throughput there", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )
    for name in ("length", "method"):
        table.add_column(name)
    for name in ("asked", "largest\nbatch", "decode tok/s\n[95 %]", "over full\n[95 %]"):
        table.add_column(name, justify="right")
    for row in (r for r in rows if r.metric == "max_batch"):
        same = {
            r.metric: r for r in rows if (r.name, r.ratio_asked, r.params["seq_len"], r.params["bin"])
            == (row.name, row.ratio_asked, row.params["seq_len"], row.params["bin"])
        }
        table.add_row(
            str(row.params["seq_len"]), name_of(row), number_of(row.ratio_asked, None), f"{row.value:.0f}",
            _interval(same.get("decode_tok_s"), 1, 1), _interval(same.get("decode_speedup"), 1, 2),
            style="dim" if row.name in _DIM else "",
        )
    return table


def _remarks(rows: list[Row]) -> list[str]:
    lines = [
        "[95 %]: where the median of another such run will lie. "
        "speed-up: median of paired requests, over the faster full cache of the same length and batch "
        f"({', '.join(sorted({r.baseline for r in rows if r.baseline and r.name != AGAIN} or {FULL}))}). "
        "bytes predict: weights and live entries that a step must read. + peak: the most allocated beyond the "
        "weights.",
        f"{STOCK}: the cache of transformers. {AGAIN}: the full cache measured twice, whose gap is the noise.",
    ]
    lines += _found(rows)
    for raw in (r for r in rows if r.metric == "tpot_per_raw_s"):
        kept = next((r for r in rows if r.metric == "tpot_per_entry_s" and _same(r, raw)), None)
        per_entry = "" if kept is None else f"{_scaled(kept)} us per token for 1000 more entries kept, "
        lines.append(
            f"{_named(raw)} at batch {raw.params['batch_size']}: {per_entry}{_scaled(raw)} us per token for 1000 "
            "more tokens read."
        )
    lines += _warnings(rows)
    return [*lines, rows[0].signature.partition(":")[2].partition("|P:")[0] if rows else ""]


def _found(rows: list[Row]) -> list[str]:
    """The noise of the measurement, and from where on each method gains more than that."""
    lines: list[str] = []
    gaps = [r for r in rows if r.metric == "aa_gap"]
    if gaps:
        shown = ", ".join(f"{_where(_key(r))}: {100 * (r.value or 0):.1f} %" for r in gaps)
        lines.append(f"A/A gap of decoding ({shown}). No smaller gain is claimed.")
        lines += [break_even(rows, method, ratio) for method, ratio in _methods(rows)]
    return lines


def _warnings(rows: list[Row]) -> list[str]:
    """What makes single numbers doubtful, and what was measured in another way than usual."""
    lines = sorted({
        f"{_where(_key(r))} {_named(r)}: {warning}; repeat on a quieter machine, or with more --rounds."
        for r in rows for warning in r.params["warnings"]
    })
    notes = dict.fromkeys(note for row in rows for note in row.params["notes"])
    if any(row.params.get("adapter") == "random" for row in rows):
        notes["trained methods have random adapters"] = None
    if any(row.params.get("fill") == "synthetic" for row in rows):
        notes["the cache was filled with random entries instead of being read (synthetic)"] = None
    if notes:
        lines.append("Note: " + "; ".join(notes) + ".")
    return lines


def break_even(rows: list[Row], method: str, ratio: float | None) -> str:
    """Sentence that gives the smallest length x batch size from which the speed-up exceeds the noise."""
    noise = {_key(r): r.value or 0.0 for r in rows if r.metric == "aa_gap"}
    mine = [
        r for r in rows if (r.name, r.ratio_asked, r.metric) == (method, ratio, "decode_speedup")
        and r.params["bin"] is None and _key(r) in noise
    ]
    mine.sort(key=lambda r: (r.params["seq_len"] * r.params["batch_size"], r.params["seq_len"]))
    gains = [(r.ci_low if r.ci_low is not None else r.value or 0.0) > 1 + noise[_key(r)] for r in mine]
    name = method if ratio is None else f"{method} {ratio:g}"
    if not any(gains):
        return f"{name}: no gain beyond the noise in what was measured."
    first = gains.index(True)
    if all(gains[first:]):
        return f"{name}: gains from {_where(_key(mine[first]))} on, of what was measured."
    places = ", ".join(_where(_key(r)) for r, gain in zip(mine, gains, strict=True) if gain)
    return f"{name}: gains at {places} only, of what was measured."


def _methods(rows: list[Row]) -> list[tuple[str, float | None]]:
    return list(dict.fromkeys(
        (r.name, r.ratio_asked) for r in rows if r.metric == "decode_speedup" and r.name not in _DIM
    ))


def _key(row: Row) -> Key:
    return row.params["seq_len"] or 0, row.params["batch_size"] or 0, row.params["bin"]


def _same(row: Row, other: Row) -> bool:
    return (row.name, row.ratio_asked, row.params["batch_size"]) == (
        other.name, other.ratio_asked, other.params["batch_size"]
    )


def _named(row: Row) -> str:
    return name_of(row) if row.ratio_asked is None else f"{name_of(row)} {row.ratio_asked:g}"


def _where(key: Key) -> str:
    return f"{key[0]} x {key[1]}" + (" (equal memory)" if key[2] else "")


def _number(found: dict[str, Row], name: str, digits: int) -> str:
    row = found.get(name)
    return "-" if row is None or row.value is None else f"{row.value:.{digits}f}"


def _interval(row: Row | None, scale: float, digits: int) -> str:
    if row is None or row.value is None:
        return "-"
    digits = max(0, min(digits, 4 - len(f"{scale * row.value:.0f}")))
    value = f"{scale * row.value:.{digits}f}"
    if row.ci_low is None or row.ci_high is None:
        return value
    return f"{value}\n[{scale * row.ci_low:.{digits}f}, {scale * row.ci_high:.{digits}f}]"


def _scaled(row: Row) -> str:
    return _interval(row, 1e9, 1).replace("\n", " ")


def _held(found: dict[str, Row]) -> str:
    physical, full = found["kv_bytes_physical"].value, found["kv_bytes_full"].value
    return bytes_of(physical) + (f"\n({100 * physical / full:.0f} %)" if physical is not None and full else "")


def _physical(found: dict[str, Row]) -> str:
    """Physical over logical bytes: the larger of the values after prefill and after decoding."""
    shares = [
        (found[f"kv_bytes_physical{at}"].value or 0) / (found[f"kv_bytes_logical{at}"].value or 1)
        for at in ("", "_end")
    ]
    return f"{max(shares):.3f}"
