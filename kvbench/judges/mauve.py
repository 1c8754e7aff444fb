"""MAUVE of a finished run, computed from the stored vectors once per cell, and stored with the cell's records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from kvbench.judges.choice import NOTHING
from kvbench.metrics.mauve import LEAST_TEXTS, measure
from kvbench.metrics.texts import unpacked
from kvbench.parsing import parse_json
from kvbench.store.folder import MAUVE, RunFolder, write_atomic
from kvbench.store.records import HUMAN, Cell, GenerationRecord, Output


def measure_similarity(folder: RunFolder, console: Console) -> None:
    """Compute MAUVE where it is missing; tasks with fewer than 200 documents are skipped.

    If several texts were sampled per document, each draw is compared by itself, so that both sides
    have equally many texts, and the mean over draws is stored for every seed of the clustering.
    """
    for setting, info in folder.manifest().tasks.items():
        documents = info.documents
        if info.kind != "generation" or len(documents) < LEAST_TEXTS:
            continue
        mine = [cell for cell in folder.cells() if cell.setting == setting]
        cells = [cell for cell in mine if cell.options.get("mauve_features", NOTHING) != NOTHING]
        people = next((folder.texts(cell) for cell in cells if cell.method == HUMAN), {})
        if not set(documents) <= set(people):
            continue
        reference = _vectors([people[d].of("human")[0] for d in documents])
        for cell in cells:
            found = folder.texts(cell)
            path = folder.cell_folder(cell) / MAUVE
            if reference is None or not set(documents) <= set(found) or _is_measured(path, len(documents)):
                continue
            values: list[list[float]] = []
            with console.status(f"mauve: {cell.label}"):
                for outputs in _texts_to_compare([found[d] for d in documents], cell):
                    written = _vectors(outputs)
                    if written is None:
                        break
                    values.append(measure(reference, written))
            if values:
                content = {"documents": len(documents), "values": np.mean(values, axis=0).tolist()}
                write_atomic(path, json.dumps(content) + "\n")


def _is_measured(path: Path, documents: int) -> bool:
    try:
        return bool(parse_json(path.read_text(encoding="utf-8"))["documents"] == documents)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _texts_to_compare(records: Sequence[GenerationRecord], cell: Cell) -> list[list[Output]]:
    """One text per document, for every draw: what the author wrote next, or sampled text (greedy if there is none)."""
    drawn = "nucleus" if records[0].of("nucleus") else "greedy"
    rows = [record.of("after" if cell.method == HUMAN else drawn) for record in records]
    if cell.method == HUMAN and any(
        len(row[0].ids) < len(record.of("human")[0].ids) for row, record in zip(rows, records, strict=True)
    ):
        return []  # some documents end too soon; MAUVE of shorter texts would not be comparable
    return [list(draw) for draw in zip(*rows, strict=True)]


def _vectors(outputs: Sequence[Output]) -> NDArray[np.float64] | None:
    """Vectors ``[texts, width]`` of the outputs; None if any of them has none."""
    packed = [output.features or output.vector for output in outputs]
    if any(vector is None for vector in packed):
        return None
    return np.stack([unpacked(vector) for vector in packed if vector is not None])
