"""Compares cells of two runs (or of one) on the same documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvbench import metrics
from kvbench.analysis.answers import answer_rows
from kvbench.analysis.curves import is_of_curve
from kvbench.analysis.results import scored_rows
from kvbench.analysis.texts import decoded_rows
from kvbench.errors import UserError, unknown
from kvbench.statistics import holm
from kvbench.store.faults import faults_in, named, remarks_of
from kvbench.store.folder import RunFolder
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import HUMAN, ITSELF, Cell, GenerationRecord
from kvbench.store.rows import Row

_BYTES = {metric.name for metric in metrics.MEMORY}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: some cells of a run.

    Attributes:
        name: as given by the user.
        method, ratio: the selected method and ratio; None for all requested cells of the run.
    """

    name: str
    folder: RunFolder
    method: str | None = None
    ratio: str | None = None

    def cells(self, setting: str) -> list[Cell]:
        """The selected cells of a setting; without a selection, all except controls and baselines."""
        mine = [c for c in self.folder.cells() if c.setting == setting and c.name != HUMAN]
        if self.method is None:
            return [c for c in mine if c.role == "method"]
        return [c for c in mine if c.name == self.method and self.ratio in (None, c.ratio_asked)]


def _known_as(method: str, names: Iterable[str]) -> str:
    """The name that a method has in a run, regardless of the order of its options."""
    return next((name for name in names if _apart(name) == _apart(method)), method)


def _apart(name: str) -> tuple[str, frozenset[str]]:
    method, _, options = name.partition(":")
    return method, frozenset(part.strip() for part in options.split(",") if part)


@dataclass(frozen=True)
class Pair:
    """Rows of the second cell, with ``delta`` = second - first and the name of the first as ``baseline``.

    Attributes:
        first: rows of the first cell, by metric and bin.
        faults: messages about outdated cells.
    """

    names: tuple[str, str]
    first: dict[tuple[str, str | None], Row]
    rows: tuple[Row, ...]
    faults: tuple[str, ...] = ()


def parse_side(text: str) -> Side:
    """Parse ``RUN``, ``RUN:METHOD`` or ``RUN:METHOD:RATIO``; the method with its own options, as in
    ``snapkv:window=16``.

    Raises:
        UserError: RUN is not a run folder, or has no such cell.
    """
    path, method, ratio = text, None, None
    if not Path(path).is_dir():
        parts = text.split(":")
        for cut in range(len(parts) - 1, max(0, len(parts) - 4), -1):
            if Path(":".join(parts[:cut])).is_dir():
                path, rest = ":".join(parts[:cut]), parts[cut:]
                ratio = rest.pop() if len(rest) > 1 and "=" not in rest[-1] else None
                method = ":".join(rest)
                break
    folder = RunFolder(Path(path))
    cells = folder.cells()
    if any(cell.is_profile for cell in cells):
        raise UserError(
            f"{path} is a profile: its requests were not timed in turn with another run's, so that a difference "
            "could be the machine's.", "Profile both methods in one run: kvbench profile --method A --method B.",
        )
    if method is not None:
        names = dict.fromkeys(cell.name for cell in cells)
        method = _known_as(method, names)
        if method not in names:
            raise unknown(f"method of {path}", method, names)
        ratios = dict.fromkeys(c.ratio_asked or "-" for c in cells if c.name == method)
        if ratio is not None and ratio not in ratios:
            raise unknown(f"ratio of {method} in {path}", ratio, ratios)
    return Side(text, folder, method, ratio)


def compare(first: Side, second: Side) -> list[Pair]:
    """Compare all cells that the two sides have in common, on every task that both measured.

    Raises:
        UserError: they cannot be compared; the message says why.
    """
    infos = [side.folder.manifest().tasks for side in (first, second)]
    found = []
    for one, other in _shared(first, second):
        pairs = _paired(first.cells(one), second.cells(other))
        for a, b in pairs:
            _check(infos[0][one], infos[1][other], a, b)
            found.append(_compared(first, second, a, b, infos[0][one]))
    if not found:
        raise UserError(
            f"{first.name} and {second.name} have no method and ratio in common.",
            "Choose one of each: RUN:METHOD:RATIO.",
        )
    return _adjusted(found)


def _shared(first: Side, second: Side) -> list[tuple[str, str]]:
    """Pairs of settings to compare: equal ones, or those of the same task if each side has only one.

    Raises:
        UserError: there are none, or several to choose from.
    """
    sides = []
    for side in (first, second):
        settings: dict[str, list[str]] = {}
        for cell in side.folder.cells():
            mine = settings.setdefault(cell.task, [])
            if cell.setting not in mine and cell.setting in side.folder.manifest().tasks:
                mine.append(cell.setting)
        sides.append(settings)
    tasks = [task for task in sides[0] if task in sides[1]]
    if not tasks:
        raise UserError(
            f"{first.name} and {second.name} have no task in common ({', '.join(sides[0])}; {', '.join(sides[1])})."
        )
    found: list[tuple[str, str]] = []
    for task in tasks:
        a, b = sides[0][task], sides[1][task]
        same = [(setting, setting) for setting in a if setting in b]
        if not same and len(a) == len(b) == 1:
            same = [(a[0], b[0])]
        found += same
    if not found:
        raise UserError(
            f"{first.name} and {second.name} have several models or seeds each, and none in common.",
            "Compare runs of one model and one seed.",
        )
    return found


def _paired(first: Sequence[Cell], second: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Pairs of cells to compare: the only one of each side, or those of equal method and ratio, or of equal ratio."""
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    named = {(c.name, c.ratio_asked): c for c in first}
    same = [(named[c.name, c.ratio_asked], c) for c in second if (c.name, c.ratio_asked) in named]
    if same:
        return same
    ratios = {c.ratio_asked: c for c in first}
    if len(ratios) == len(first) and len({c.ratio_asked for c in second}) == len(second):
        return [(ratios[c.ratio_asked], c) for c in second if c.ratio_asked in ratios]
    return []


def _check(one: TaskInfo, other: TaskInfo, a: Cell, b: Cell) -> None:
    """Check that two cells were scored on the same text in the same way."""
    wrong = [
        f"{what} differ ({x} and {y})" for what, x, y in (
            ("versions of the task", a.task_version, b.task_version), ("texts", a.data_hash[:12], b.data_hash[:12]),
            ("protocols", a.protocol, b.protocol), ("settings", one.signature, other.signature),
        ) if x != y
    ]
    if one.documents != other.documents:
        same = len(set(one.documents) & set(other.documents))
        wrong.append(f"documents differ ({len(one.documents)} and {len(other.documents)}, {same} in common)")
    if wrong:
        raise UserError(
            f"{a.label} and {b.label} cannot be compared: {'; '.join(wrong)}.",
            "Measure both on the same documents with the same settings.",
        )


def _compared(first: Side, second: Side, a: Cell, b: Cell, info: TaskInfo) -> Pair:
    # Different models may have the same name.
    which = [f", {c.model}@{c.model_hash[:8] or 'unknown'}" if a.model_hash != b.model_hash else "" for c in (a, b)]
    names = tuple(
        f"{_short(c)} ({s.folder.path.name}{w})" for s, c, w in zip((first, second), (a, b), which, strict=True)
    )
    # Rows are paired with the full cache, whose place the first cell takes.
    standing = replace(a, method="full", variant="", role="control", options={**a.options, "side": "first"})
    if info.kind == "generation":
        records = {standing.key: first.folder.texts(a), b.key: second.folder.texts(b)}
        _complete(info, records[standing.key], first, a)
        _complete(info, records[b.key], second, b)
        rows = decoded_rows([standing, b], records, _people(first, a) or _people(second, b), info)
        if any(side.folder.manifest().without_texts for side in (first, second)):
            # Without texts it is known only against the full cache of the same run.
            rows = [row for row in rows if row.metric != metrics.PREFIX_MATCH.name]
    elif info.asks:
        answers = first.folder.answers(a), second.folder.answers(b)
        _complete(info, answers[0], first, a)
        _complete(info, answers[1], second, b)
        rows = answer_rows([(standing, answers[0]), (b, answers[1])], info)
    else:
        mine, theirs = first.folder.records(a), second.folder.records(b)
        _complete(info, mine, first, a)
        _complete(info, theirs, second, b)
        chosen = info.documents
        rows = scored_rows([(standing, [mine[n] for n in chosen]), (b, [theirs[n] for n in chosen])], info)
    is_first = {id(row): row.name == "full" and row.baseline is None for row in rows}
    at = {(r.metric, r.params.get("bin")): r for r in rows if is_first[id(r)]}
    shown = tuple(
        replace(r, method=b.method, baseline=names[0]) for r in rows
        if not is_first[id(r)] and r.delta is not None and r.metric not in _BYTES
        and not is_of_curve(r) and (r.metric not in metrics.NEED_SCORER or _scorer(a) == _scorer(b))
    )
    return Pair((names[0], names[1]), at, shown, tuple(faults_in((c.method, remarks_of(c)) for c in (a, b))))


def _people(side: Side, cell: Cell) -> dict[str, GenerationRecord]:
    """The authors' texts beside a cell; empty if there are none, or if they were taken out."""
    found = [c for c in side.folder.cells() if c.setting == cell.setting and c.name == HUMAN]
    return side.folder.texts(found[0]) if found and not side.folder.manifest().without_texts else {}


def _scorer(cell: Cell) -> str | None:
    """The scorer of the cell's texts; a model that scores its own texts is named with its hash."""
    scorer = cell.options.get("scorer")
    return f"{cell.model}@{cell.model_hash}" if scorer == ITSELF else scorer


def _complete(info: TaskInfo, records: dict[str, Any], side: Side, cell: Cell) -> None:
    missing = [name for name in info.documents if name not in records]
    if missing:
        raise UserError(
            f"{cell.label} in {side.folder.path} lacks {len(missing)} of {len(info.documents)} documents.",
            "Run that command again to continue it.",
        )


def _adjusted(pairs: list[Pair]) -> list[Pair]:
    """Adjust p-values by Holm's method within each metric, over all pairs."""
    flat = [(i, j, row) for i, pair in enumerate(pairs) for j, row in enumerate(pair.rows)]
    adjusted = {(i, j): row for i, j, row in flat}
    for metric in dict.fromkeys(row.metric for _, _, row in flat):
        mine = [(i, j, row) for i, j, row in flat if row.metric == metric]
        for (i, j, row), p in zip(mine, holm([row.p_value for _, _, row in mine]), strict=True):
            adjusted[i, j] = replace(row, p_value=p)
    return [
        replace(pair, rows=tuple(adjusted[i, j] for j in range(len(pair.rows)))) for i, pair in enumerate(pairs)
    ]


def _short(cell: Cell) -> str:
    shown = named(cell.method, remarks_of(cell))
    return shown if cell.ratio_asked is None else f"{shown} {cell.ratio_asked}"
