"""From records of time and memory to rows: medians with intervals, and differences paired with the full cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench.analysis.rows import NO_DIFFERENCE, NO_INTERVAL, Compression, Difference, Estimate, remarks, row
from kvbench.statistics import fitted_slope, paired_p_value, repeat_interval
from kvbench.store.folder import RunFolder
from kvbench.store.manifest import ProfileInfo
from kvbench.store.profile_records import AGAIN, FULL, STOCK, MemoryRecord, ProbeRecord, SearchRecord, TimingRecord
from kvbench.store.records import GOES_ON, Cell, Failure
from kvbench.store.rows import Row

Array = NDArray[np.float64]

_PERCENTILES = ((90, 10), (95, 20), (99, 100))
"""Percentiles of the gaps between tokens, and the number of gaps that each requires."""
_DRIFT = {"cpu": 0.05, "cuda": 0.02}
"""Relative drift of a machine from one run to the next, by device. No spread within a run can show it, so intervals
of seconds and speeds extend at least this far from the median. (Ratios are paired within minutes, and do not need
it.)"""
_SPREAD, _EXTREME = 0.1, 0.5
"""A timing is unstable if its standard deviation or an extreme is this far from the mean, relative to the mean."""


@dataclass(frozen=True)
class Profiled:
    """A cell with its records of time and memory."""

    cell: Cell
    times: tuple[TimingRecord, ...]
    memory: MemoryRecord | None
    bandwidth: float

    @property
    def batch(self) -> int:
        return int(self.cell.options["batch_size"])

    @property
    def speed(self) -> Array:
        """Tokens per second of every timed request."""
        return np.array([t.decode_tok_s(self.batch) for t in self.times])

    @property
    def step_bytes(self) -> float:
        """Bytes that one decoding step of the batch must read: weights and cache."""
        first = self.times[0]
        return first.read_bytes + float(np.mean([t.entries for t in self.times])) * first.entry_bytes

    @property
    def group(self) -> tuple[str, str]:
        """Cells of one group were timed in turn: length and batch size, or length and memory budget."""
        options = self.cell.options
        return options["seq_len"], options.get("memory_budget") or options["batch_size"]


def profile_results(
    folder: RunFolder, info: ProfileInfo, cells: Sequence[Cell]
) -> tuple[list[Row], list[Failure]]:
    """All rows of a profile, and a failure for every incomplete cell."""
    rows: list[Row] = []
    failures: list[Failure] = []
    found: list[Profiled] = []
    for cell in cells:
        records = list(folder.measurements(cell).values())
        if cell.options["batch_size"] == "0":
            ended = next((r for r in records if isinstance(r, SearchRecord)), None)
            if ended is not None:
                probes = sum(isinstance(r, ProbeRecord) for r in records)
                rows.append(_plain_row(cell, info, "max_batch", Estimate(float(ended.batch)), probes, 1, "probe"))
            elif folder.failure(cell) is None:
                failures.append(Failure(
                    cell.key, f"{cell.name} at {cell.options['seq_len']}: the search for the largest batch has not "
                    "ended.", GOES_ON, incomplete=True,
                ))
            continue
        times = sorted(
            (r for r in records if isinstance(r, TimingRecord) and not r.warmup), key=lambda r: r.pair
        )
        memory = next((r for r in records if isinstance(r, MemoryRecord)), None)
        is_weighed = memory is not None or cell.name == AGAIN or "memory_budget" in cell.options
        done = len({t.repeat for t in times})
        is_whole = done >= info.repeats and is_weighed
        if times and (done >= info.repeats or folder.failure(cell) is None):
            found.append(Profiled(cell, tuple(times), memory, math.nan))
        if not is_whole and folder.failure(cell) is None:
            lacks = "" if is_weighed else ", and its memory is not measured"
            failures.append(Failure.to_go_on(cell, f"{done} of {info.repeats} repeats are done{lacks}"))
    bandwidth = [t.bandwidth for p in found for t in p.times if t.bandwidth]
    speed = float(np.median(bandwidth)) if bandwidth else math.nan
    found = [Profiled(p.cell, p.times, p.memory, speed) for p in found]
    timed: list[Row] = []
    for group in dict.fromkeys(p.group for p in found):
        mine = [p for p in found if p.group == group]
        for part in mine:
            timed += _time_rows(part, mine, info)
            timed += _memory_rows(part, info)
    return [*timed, *_cost_rows(found, info), *rows], failures


def _baseline(part: Profiled, group: Sequence[Profiled], seconds: Callable[[Profiled], float]) -> Profiled | None:
    """The cell that ``part`` is compared with: the faster of ``full`` and ``full-dynamic``, the cache of transformers.

    ``full-again`` is compared with ``full``, and replaces it if it failed. Without either there is no comparison:
    ``full-dynamic`` alone would flatter every method.
    """
    named = {p.cell.name: p for p in group}
    ours, stock = named.get(FULL) or named.get(AGAIN), named.get(STOCK)
    if ours is None:
        return None
    if part.cell.name == AGAIN and part is not ours:
        return ours
    if stock is None or len(stock.times) < len(ours.times) or seconds(stock) >= seconds(ours):
        return None if part is ours else ours  # full-dynamic is absent, or slow and timed only once per process
    return None if part is stock else stock


def _time_rows(part: Profiled, group: Sequence[Profiled], info: ProfileInfo) -> list[Row]:
    is_twin = part.cell.name == AGAIN
    baseline = _baseline(part, group, lambda p: -float(np.median(p.speed)))
    ttft_baseline = _baseline(part, group, lambda p: float(np.median([t.ttft_s or 0.0 for t in p.times])))
    times, rows = part.times, []
    values: dict[str, list[Any]] = {
        "ttft_s": [t.ttft_s for t in times], "prefill_s": [t.prefill_s for t in times],
        "compress_s": [t.compress_s for t in times],
        "prefill_tok_s": [t.prefill_tok_s(t.raw, part.batch) for t in times],
        "tpot_s": [t.tpot_s for t in times], "itl_s": [float(np.median(t.gaps)) for t in times],
        "decode_tok_s": list(part.speed),
    }
    base: dict[str, Callable[[TimingRecord, int], Any]] = {
        "ttft_s": lambda t, b: t.ttft_s, "tpot_s": lambda t, b: t.tpot_s, "decode_tok_s": TimingRecord.decode_tok_s,
    }
    for name, column in values.items():
        if any(value is None for value in column):
            continue
        delta, against = None, ttft_baseline if name == "ttft_s" else baseline
        if against is not None and name in base:
            theirs = {t.pair: base[name](t, against.batch) for t in against.times}
            delta = np.array([
                v - theirs[t.pair] for v, t in zip(column, times, strict=True) if t.pair in theirs
            ], dtype=np.float64)
        rows.append(_row(part, info, name, np.array(column, dtype=np.float64), delta, against, drifts=True))
    gaps = np.concatenate([t.gaps for t in times])
    for percent, least in _PERCENTILES:
        if len(gaps) >= least:
            rows.append(_row(part, info, f"itl_p{percent}_s", np.array([np.percentile(gaps, percent)])))
    if baseline is not None:
        rows += _speedup_rows(part, baseline, is_twin, info)
    if ttft_baseline is not None:
        rows += _first_rows(part, ttft_baseline, is_twin, info)
    if math.isfinite(part.bandwidth):
        reached = part.step_bytes / np.array([t.tpot_s for t in times]) / part.bandwidth
        rows.append(_row(part, info, "bandwidth_share", reached))
    return rows


def _speedup_rows(part: Profiled, baseline: Profiled, is_twin: bool, info: ProfileInfo) -> list[Row]:
    """Decoding speed relative to the baseline, request by request; for ``full-again`` also its distance from 1."""
    theirs = {t.pair: t for t in baseline.times}
    pairs = [(t, theirs[t.pair]) for t in part.times if t.pair in theirs]
    if not pairs:
        return []
    ratio = np.array([a.decode_tok_s(part.batch) / b.decode_tok_s(baseline.batch) for a, b in pairs])
    predicted = part.batch * baseline.step_bytes / (baseline.batch * part.step_bytes)
    rows = [
        _row(part, info, "decode_speedup", ratio, np.log(ratio), baseline, is_log=True),
        _row(part, info, "decode_speedup_predicted", np.array([predicted])),
    ]
    if is_twin:
        rows.append(_row(part, info, "aa_gap", np.array([abs(float(np.median(ratio)) - 1)])))
    return rows


def _first_rows(part: Profiled, baseline: Profiled, is_twin: bool, info: ProfileInfo) -> list[Row]:
    """Speed-up of the time to the first token."""
    theirs = {t.pair: t.ttft_s for t in baseline.times}
    pairs = [(t.ttft_s, theirs[t.pair]) for t in part.times if t.pair in theirs]
    first = np.array([b / a for a, b in pairs if a and b])
    if not len(first):
        return []
    rows = [_row(part, info, "ttft_speedup", first, np.log(first), baseline, is_log=True)]
    if is_twin:
        rows.append(_row(part, info, "aa_gap_ttft", np.array([abs(float(np.median(first)) - 1)])))
    return rows


def _memory_rows(part: Profiled, info: ProfileInfo) -> list[Row]:
    m = part.memory
    if m is None:
        return []
    found = {
        "weights_bytes": m.weights, "prefill_peak_bytes": m.prefill_peak, "decode_peak_bytes": m.decode_peak,
        "kv_bytes_logical": m.kv_logical, "kv_bytes_physical": m.kv_physical, "kv_bytes_full": m.kv_full,
        "kv_bytes_logical_end": m.kv_logical_end, "kv_bytes_physical_end": m.kv_physical_end,
        "rss_peak_bytes": m.rss_peak,
    }
    return [
        _row(part, info, name, np.array([value], dtype=np.float64)) for name, value in found.items()
        if value is not None
    ]


def _cost_rows(found: Sequence[Profiled], info: ProfileInfo) -> list[Row]:
    """Time per token as a function of entries kept, and of prompt tokens: slopes over at least three lengths."""
    rows = []
    usual = [p for p in found if "memory_budget" not in p.cell.options]
    for key in dict.fromkeys((p.cell.name, p.cell.ratio_asked, p.batch) for p in usual):
        mine = [p for p in usual if (p.cell.name, p.cell.ratio_asked, p.batch) == key]
        if len({p.cell.options["seq_len"] for p in mine}) < 3:
            continue
        y = np.array([t.tpot_s for p in mine for t in p.times])
        for name, x in (
            ("tpot_per_entry_s", [t.entries for p in mine for t in p.times]),
            ("tpot_per_raw_s", [t.raw for p in mine for t in p.times]),
        ):
            if min(x) == max(x):
                continue  # a cache of constant size: the slope is undefined
            slope, low, high = fitted_slope(np.array(x, dtype=np.float64), y)
            rows.append(_plain_row(
                mine[0].cell, info, name, Estimate.of(slope, (low, high)), len(y), info.repeats, "repeat", seq_len=None,
            ))
    return rows


def _row(
    part: Profiled, info: ProfileInfo, name: str, values: Array, paired: Array | None = None,
    baseline: Profiled | None = None, is_log: bool = False, drifts: bool = False,
) -> Row:
    """Row of the median of ``values`` with its interval; ``paired``: differences to the baseline, tested against 0."""
    interval = repeat_interval(values) if len(values) > 1 else NO_INTERVAL
    if drifts and len(values) > 1:
        middle, share = float(np.median(values)), _DRIFT[info.device.partition(":")[0]]
        low, high = repeat_interval(values)
        interval = min(low, middle * (1 - share)), max(high, middle * (1 + share))
    difference = NO_DIFFERENCE
    if paired is not None and len(paired):
        apart = Estimate() if is_log else Estimate.of(float(np.median(paired)), repeat_interval(paired))
        p_value = paired_p_value(paired, part.cell.seed) if len(paired) > 1 else None
        difference = Difference(apart, p_value, baseline.cell.name if baseline else None)
    elif paired is not None and baseline is not None:
        difference = Difference(baseline=baseline.cell.name)
    return _plain_row(
        part.cell, info, name, Estimate.of(float(np.median(values)), interval), len(part.times),
        len({t.repeat for t in part.times}), "repeat", part, difference,
    )


def _plain_row(
    cell: Cell, info: ProfileInfo, name: str, estimate: Estimate, n: int, groups: int, unit: str,
    part: Profiled | None = None, difference: Difference = NO_DIFFERENCE, **more: Any,
) -> Row:
    options = dict(cell.options)
    first = part.times[0] if part else None
    entries = float(np.mean([t.entries for t in part.times])) if part else None
    params: dict[str, Any] = {
        **options, "seq_len": int(options["seq_len"]), "batch_size": int(options["batch_size"]) or None,
        "new_tokens": int(options["new_tokens"]), "step": None,
        "bin": f"budget={options['memory_budget']}" if "memory_budget" in options else None, **remarks(cell),
        "cache": "transformers" if cell.name == STOCK else "kvbench", "entries_mean": entries,
        "notes": list(info.notes), "warnings": _warnings(part), **more,
    }
    average = first.raw + (len(first.gaps) + 1) / 2 if first else 1.0
    compression = Compression(
        1 - first.held / first.raw if first else None, 1 - entries / average if entries is not None else None,
        part.memory.entries_peak if part and part.memory else None,
    )
    signature = (
        f"{info.signature}|P:{params['seq_len']}|B:{params['batch_size']}|G:{params['new_tokens']}"
        f"|median of {n} in {groups} processes, interval for the median of a repetition|v:1"
    )
    return row(
        cell, name, signature, estimate, difference, unit=unit, n=n, groups=groups, params=params,
        compression=compression,
    )


def _warnings(part: Profiled | None) -> list[str]:
    """Warnings about an unreliable timing."""
    if part is None or len(part.times) < 2:
        return []
    seconds = np.array([t.tpot_s for t in part.times])
    found = []
    if seconds.std(ddof=1) >= _SPREAD * seconds.mean():
        share = 100 * seconds.std(ddof=1) / seconds.mean()
        found.append(f"unstable: the standard deviation is {share:.0f} % of the mean")
    if max(seconds.max() / seconds.mean() - 1, 1 - seconds.min() / seconds.mean()) >= _EXTREME:
        found.append("an extreme is 50 % or more from the mean")
    return found
