"""Rows of a task that generates text: every metric of every cell, from the texts on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from kvbench import metrics
from kvbench.analysis.estimates import Array, CellSums, bin_rows, difference_of, row_of
from kvbench.analysis.rows import NO_DIFFERENCE, Difference, Estimate
from kvbench.metrics import TextMetric
from kvbench.metrics import distinct as distinct_metric
from kvbench.metrics import mauve as mauve_metric
from kvbench.metrics.texts import Sample
from kvbench.parsing import parse_json
from kvbench.store.folder import MAUVE, RunFolder
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import HUMAN, Cell, GenerationRecord, Output
from kvbench.store.rows import Row

Records = dict[str, GenerationRecord]
Counts = Mapping[str, Mapping[str, Any]]
"""Metric -> column -> a number or a vector of one document."""

DISTINCT = "distinct"

_MEMORY = ("raw", "held", "visible", "queries", "kv_logical", "kv_physical", "kv_full")


def generation_rows(folder: RunFolder, cells: Sequence[Cell], info: TaskInfo) -> list[Row]:
    """Rows of a task, with unadjusted p-values.

    The main rows are of the sampled texts if there are any; the bin of the greedy texts is then
    ``decode=greedy``. Cells with the role ``reference`` are compared with, but get no rows.
    """
    records = {cell.key: folder.texts(cell) for cell in cells}
    people = next((records[cell.key] for cell in cells if cell.name == HUMAN), {})
    shown = [cell for cell in cells if cell.role != "reference"]
    written = [cell for cell in shown if cell.name != HUMAN]
    if not written:
        return []
    kinds = _kinds(written, records)
    rows = decoded_rows(shown, records, people, info)
    if "greedy" in kinds[1:]:
        rows += _match_rows(written, records, people, info)
    return rows + _mauve_rows(folder, shown, records, info)


def decoded_rows(
    shown: Sequence[Cell], records: dict[str, Records], people: Records, info: TaskInfo
) -> list[Row]:
    """Rows of all metrics but MAUVE, for every way of decoding; sampled texts first."""
    written = [cell for cell in shown if cell.name != HUMAN]
    kinds = _kinds(written, records)
    rows: list[Row] = []
    for decode in kinds:
        is_main = decode == kinds[0]
        chosen = shown if is_main else written
        rows += _decoding_rows(chosen, records, people, info, decode, None if is_main else f"decode={decode}")
    return rows


def _kinds(written: Sequence[Cell], records: dict[str, Records]) -> list[str]:
    """Ways of decoding, that of the main rows first."""
    found = next(iter(records[written[0].key].values())).kinds
    return sorted(found, key=lambda kind: kind != "nucleus")


def _decoding_rows(
    cells: Sequence[Cell], records: dict[str, Records], people: Records, info: TaskInfo, decode: str,
    bin_name: str | None,
) -> list[Row]:
    full = next((records[c.key] for c in cells if c.name == "full"), None)
    kinds = [m for m in metrics.TEXT_METRICS if bin_name is None or m is not metrics.PREFIX_MATCH]
    counts = {c.key: _counts(c, records[c.key], people, full, info, decode, kinds) for c in cells}
    parts = [_aggregate(c, records[c.key], counts[c.key], kinds) for c in cells]
    rows = bin_rows(parts, (*kinds, *metrics.MEMORY) if bin_name is None else kinds, info, bin_name)
    return rows + _distinct_rows(parts, counts, records, info, bin_name)


def _match_rows(
    cells: Sequence[Cell], records: dict[str, Records], people: Records, info: TaskInfo
) -> list[Row]:
    """Agreement of the greedy texts with those of the full cache, for the main table."""
    full = next((records[c.key] for c in cells if c.name == "full"), None)
    kinds = (metrics.PREFIX_MATCH,)
    parts = []
    for cell in cells:
        counts = _counts(cell, records[cell.key], people, full, info, "greedy", kinds)
        parts.append(_aggregate(cell, records[cell.key], counts, kinds))
    return bin_rows(parts, (metrics.PREFIX_MATCH,), info, None)


def without_texts(
    cell: Cell, mine: Records, people: Records, full: Records | None, info: TaskInfo
) -> list[GenerationRecord]:
    """The records of a complete cell with what metrics count in the texts instead of the texts.

    Args:
        people, full: records of the authors' texts and of the full cache; empty and None if they are not complete.
    """
    kinds = ("human",) if cell.name == HUMAN else mine[info.documents[0]].kinds
    counts = {kind: _counts(cell, mine, people, full, info, kind, metrics.TEXT_METRICS) for kind in kinds}
    return [
        mine[name].without_texts({
            kind: {key: dict(found) for key, found in counts[kind][name].items()} for kind in kinds
        })
        for name in info.documents
    ]


def _counts(
    cell: Cell, mine: Records, people: Records, full: Records | None, info: TaskInfo, decode: str,
    kinds: Sequence[TextMetric],
) -> dict[str, Counts]:
    """What metrics count in each document's texts; those that lack what they need are left out."""
    kind = "human" if cell.name == HUMAN else decode
    found: dict[str, Counts] = {
        name: columns[kind] for name in info.documents if (columns := mine[name].columns) is not None
    }
    if found:
        return found
    samples = _samples(cell, mine, people, full, info, decode)
    first = [(mine[name].group, "".join(output.text for output in samples[name].outputs[:1])) for name in samples]
    bigrams = distinct_metric.counts(first, distinct_metric.budget(info.new_tokens or 0)).tolist()
    for (name, sample), counted in zip(samples.items(), bigrams, strict=True):
        # Draws are averaged: a document has the same weight in every row, however many texts it has.
        averaged = {
            metric.name: {key: (np.asarray(value) / len(sample.outputs)).tolist() for key, value in sums.items()}
            for metric in kinds if (sums := metric.columns(sample)) is not None
        }
        found[name] = {**averaged, DISTINCT: {DISTINCT: counted}}
    return found


def _samples(
    cell: Cell, mine: Records, people: Records, full: Records | None, info: TaskInfo, decode: str
) -> dict[str, Sample]:
    """Samples by document. A human text is compared with that of the next document of another group.

    If the human texts are missing, samples have no references, and metrics that need them are left out.
    """
    names = list(info.documents)
    found = {}
    for i, name in enumerate(names):
        person = people.get(name)
        reference = person.of("human")[0] if person is not None else None
        outputs = mine[name].of(decode)
        if cell.name == HUMAN:
            outputs, reference = mine[name].of("human"), _stranger(names, i, people)
        found[name] = Sample(
            outputs, None if reference is None else reference.text, None if reference is None else reference.vector,
            None if person is None else person.prefix_vector, full[name].of(decode) if full is not None else (),
        )
    return found


def _stranger(names: list[str], i: int, people: Records) -> Output | None:
    """Another author's text: the reference of the next document, of another group if possible; None if there is
    none."""
    later = [*names[i + 1 :], *names[:i]]
    other = [name for name in later if people[name].group != people[names[i]].group] or later
    return people[other[0]].of("human")[0] if other else None


def _aggregate(
    cell: Cell, records: Records, counts: Mapping[str, Counts], kinds: Sequence[TextMetric]
) -> CellSums:
    """Sum a cell's columns by group; metrics that some document has no columns for are left out."""
    groups = sorted({records[name].group for name in counts})
    place = {group: i for i, group in enumerate(groups)}
    columns: dict[str, list[tuple[int, Any]]] = {}
    usable = {metric.name for metric in kinds}
    for name, counted in counts.items():
        record = records[name]
        at = place[record.group]
        for column in _MEMORY:
            columns.setdefault(column, []).append((at, float(getattr(record, column))))
        columns.setdefault("pieces", []).append((at, 1.0))
        for metric in kinds:
            if metric.name not in counted:
                usable.discard(metric.name)
                continue
            for column, value in counted[metric.name].items():
                columns.setdefault(f"{metric.name}/{column}", []).append((at, value))
    sums = _summed(columns, len(groups), usable)
    peaks = [records[name].peak for name in counts]
    missing = {metric.name for metric in kinds} - usable
    if cell.name == HUMAN:  # human texts have no cache
        missing |= {metric.name for metric in metrics.MEMORY}
    return CellSums(cell, len(counts), tuple(groups), sums, max(peaks), sum(peaks) / len(peaks), frozenset(missing))


def _summed(
    columns: dict[str, list[tuple[int, Any]]], groups: int, usable: set[str]
) -> dict[str, Array]:
    """Sum columns by group, under their own names; those that metrics share, such as ``rep2``, are equal in all of
    them."""
    sums: dict[str, Array] = {}
    for key, entries in columns.items():
        metric, _, column = key.rpartition("/")
        if metric and (metric not in usable or column in sums):
            continue
        values = np.asarray([value for _, value in entries], dtype=np.float64)
        total = np.zeros((groups, *values.shape[1:]))
        np.add.at(total, [at for at, _ in entries], values)
        sums[column] = total
    return sums


def _distinct_rows(
    parts: Sequence[CellSums], counts: Mapping[str, Mapping[str, Counts]], records: dict[str, Records],
    info: TaskInfo, bin_name: str | None,
) -> list[Row]:
    new_tokens = info.new_tokens or 0
    found = {}
    for part in parts:
        sums = np.zeros((len(part.groups), 3))
        for name, counted in counts[part.cell.key].items():
            sums[part.groups.index(records[part.cell.key][name].group)] += counted[DISTINCT][DISTINCT]
        found[part.cell.key] = distinct_metric.distinct(sums)
    full = next((p for p in parts if p.cell.name == "full"), None)
    rows = []
    for part in parts:
        mine = found[part.cell.key]
        low, high, _ = distinct_metric.interval(mine)
        baseline = full if full is not None and full is not part and full.groups == part.groups else None
        difference = NO_DIFFERENCE
        if baseline is not None:
            apart = distinct_metric.difference(mine, found[baseline.cell.key])
            estimate = Estimate.of(apart.value, distinct_metric.interval(apart)[:2])
            difference = difference_of(estimate, distinct_metric.p_value(apart), baseline)
        rows.append(row_of(
            part, info, bin_name, DISTINCT, distinct_metric.signature(new_tokens), "document",
            Estimate.of(mine.value, (low, high)), difference,
        ))
    return rows


def _mauve_rows(
    folder: RunFolder, cells: Sequence[Cell], records: dict[str, Records], info: TaskInfo
) -> list[Row]:
    """Rows of MAUVE, measured after the run once per seed; differences to the full cache are paired by seed."""
    values: dict[str, list[float]] = {}
    for cell in cells:
        path = folder.cell_folder(cell) / MAUVE
        with suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: not measured
            stored = parse_json(path.read_text(encoding="utf-8"))
            if stored["documents"] == len(info.documents):
                values[cell.key] = stored["values"]
    full = next((c for c in cells if c.name == "full" and c.key in values), None)
    rows = []
    for cell in (c for c in cells if c.key in values):
        part = _aggregate(cell, records[cell.key], {name: {} for name in info.documents}, ())
        mean, low, high = mauve_metric.over_seeds(values[cell.key])
        difference = NO_DIFFERENCE
        if full is not None and full is not cell:
            pairs = np.subtract(values[cell.key], values[full.key])
            delta, *interval = mauve_metric.over_seeds(pairs.tolist())
            difference = Difference(Estimate.of(delta, (interval[0], interval[1])), None, "full")
        signature = mauve_metric.signature(part.n, cell.options["mauve_features"])
        rows.append(row_of(
            part, info, None, "mauve", signature, "document", Estimate.of(mean, (low, high)), difference,
        ))
    return rows
