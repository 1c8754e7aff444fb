"""What a page shows of single documents: where a method loses most, what was written or answered, what was held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvbench.errors import UserError
from kvbench.metrics.prefix_match import common_prefix
from kvbench.reporting.page.content import short
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.faults import named, remarks_of
from kvbench.store.folder import RunFolder
from kvbench.store.records import HUMAN, Cell, DocumentRecord, GenerationRecord

WORST = 5
"""Number of documents listed for each method at each ratio."""
SHOWN = 6
"""Number of documents of a task whose texts or answers are shown."""
_LONGEST, _LONGEST_PREFIX = 1600, 8000
"""Characters of a text and of a prefix that are shown."""


@dataclass(frozen=True)
class Worst:
    """A document on which a method loses most; ``more`` is in nats per token above the full cache."""

    task: str
    method: str
    ratio: str | None
    document: str
    more: float


def worst_documents(folder: RunFolder) -> list[Worst]:
    """The documents with the largest loss of each method on tasks that score text, by task, method and ratio."""
    found: list[Worst] = []
    for cells in _by_setting(folder, _scores_text):
        full = next((c for c in cells if c.method == "full"), None)
        if full is None:
            continue
        base = {name: r.nll / r.tokens for name, r in _readable(folder, full).items() if r.tokens}
        for cell in (c for c in cells if c.role == "method"):
            records = _readable(folder, cell)
            more = {n: r.nll / r.tokens - base[n] for n, r in records.items() if n in base and r.tokens}
            names = sorted(more, key=lambda name: -more[name])[:WORST]
            found += [Worst(cell.task, _method(cell), cell.ratio_asked, name, more[name]) for name in names]
    return found


def texts_of(folder: RunFolder) -> list[dict[str, Any]]:
    """Texts side by side: for the first documents of each task that writes, the prefix, what its author wrote, and the
    first text of each kind by each method, with the number of characters that are also the full cache's."""
    found: list[dict[str, Any]] = []
    if folder.manifest().without_texts:
        return found
    for cells in _by_setting(folder, lambda cell: cell.writes):
        by_cell = [(cell, _texts(folder, cell)) for cell in cells]
        people = next((records for cell, records in by_cell if cell.name == HUMAN), {})
        full = next((records for cell, records in by_cell if cell.name == "full"), {})
        for name in list(people or full)[:SHOWN]:
            person, whole = people.get(name), full.get(name)
            found.append({
                **_about(cells[0]), "document": name,
                "prefix": "" if person is None else (person.prefix or "")[:_LONGEST_PREFIX],
                "ends": () if person is None else person.prefix_ends,
                "human": "" if person is None else person.of("human")[0].text[:_LONGEST],
                "kept": [
                    [_method(cell), cell.ratio_asked, records[name].kept] for cell, records in by_cell
                    if name in records and records[name].kept is not None
                ],
                "texts": [
                    line for cell, records in by_cell if cell.name != HUMAN and name in records
                    for line in _written(cell, records[name], whole)
                ],
            })
    return found


def answers_of(folder: RunFolder) -> list[dict[str, Any]]:
    """Answers side by side: for the first contexts of each task that asks, the answers of each method with their
    scores, and the share of the evidence that was held."""
    found: list[dict[str, Any]] = []
    if folder.manifest().without_texts:
        return found
    for cells in _by_setting(folder, lambda cell: cell.answers):
        by_cell = [(cell, _answers(folder, cell)) for cell in cells]
        names = list(dict.fromkeys(name for _, records in by_cell for name in records))
        for name in names[:SHOWN]:
            found.append({
                **_about(cells[0]), "document": name,
                "answers": [
                    [_method(cell), cell.ratio_asked, [a.text[:200] for a in record.answers],
                     [short(a.score) for a in record.answers], short(record.evidence)]
                    for cell, records in by_cell if (record := records.get(name)) is not None
                ],
            })
    return found


def survival_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The share of the evidence that each cell holds by layer, mean over heads and contexts."""
    found = []
    for cells in _by_setting(folder, lambda cell: cell.answers):
        for cell in cells:
            held = [r.survival for r in _answers(folder, cell).values() if r.survival is not None]
            if held and cell.role == "method":
                layers = np.asarray(held).mean(axis=(0, 2))
                found.append({
                    **_about(cell), "method": _method(cell), "asked": cell.ratio_asked,
                    "layers": [short(v) for v in layers.tolist()],
                })
    return found


def _written(cell: Cell, record: GenerationRecord, full: GenerationRecord | None) -> Iterator[list[Any]]:
    for decode in dict.fromkeys(output.decode for output in record.outputs):
        text = record.of(decode)[0].text[:_LONGEST]
        theirs = full.of(decode)[0].text if full is not None and decode == "greedy" else None
        same = None if theirs is None else common_prefix([*map(ord, text)], [*map(ord, theirs)])
        yield [_method(cell), cell.ratio_asked, decode, text, same]


def _by_setting(folder: RunFolder, is_meant: Callable[[Cell], bool]) -> Iterator[list[Cell]]:
    """The cells of each task, model and seed that are meant."""
    found: dict[str, list[Cell]] = {}
    for cell in filter(is_meant, folder.cells()):
        found.setdefault(cell.setting, []).append(cell)
    yield from found.values()


def _scores_text(cell: Cell) -> bool:
    return not (cell.writes or cell.answers or cell.is_profile)


def _about(cell: Cell) -> dict[str, str]:
    parts = [f"{name} {cell.options[name]}" for name in ("length", "question") if name in cell.options]
    return {"task": ", ".join((cell.task, *parts)), "model": cell.model}


def _method(cell: Cell) -> str:
    return named(cell.method, remarks_of(cell))


# Damaged records are reported among the failures: here, they are as good as none.
def _readable(folder: RunFolder, cell: Cell) -> dict[str, DocumentRecord]:
    try:
        return folder.records(cell)
    except UserError:
        return {}


def _texts(folder: RunFolder, cell: Cell) -> dict[str, GenerationRecord]:
    try:
        return folder.texts(cell)
    except UserError:
        return {}


def _answers(folder: RunFolder, cell: Cell) -> dict[str, AnswerRecord]:
    try:
        return folder.answers(cell)
    except UserError:
        return {}
